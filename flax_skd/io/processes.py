"""What the processes of one run must share: what they were told, and where they write."""

import json
import os
import pathlib
import secrets
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_skd.io.differences import differences

SEEN_WITHIN_S = 60  # what a network file system may take to show a new file


def check_alike(told: dict[str, Any]) -> None:
    """Refuses processes that would compute different things as if they were one.

    Args:
      told: what decides the result, as JSON holds it.

    Raises:
      ValueError: in every process; says which one has what.
    """
    if jax.process_count() == 1:
        return
    text = np.frombuffer(json.dumps(told, default=str).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.resize(text, sizes.max())
    rows = zip(multihost_utils.process_allgather(padded), sizes, strict=True)
    first, *others = (json.loads(bytes(row[:size])) for row, size in rows)
    for number, other in enumerate(others, 1):
        words = "process 0 has", f"process {number} has"
        if wrong := differences(first, other, words=words):
            raise ValueError(
                "the processes of a run must be started by the same command, on the "
                "same files:\n  " + "\n  ".join(wrong)
            )


def check_shared(folder: pathlib.Path) -> None:
    """Waits for all processes, and refuses a folder that each has for itself.

    Args:
      folder: which process 0 can write.

    Raises:
      ValueError: in every process, if one does not see what process 0 writes there.
    """
    if jax.process_count() == 1:
        return
    number = np.uint32(secrets.randbits(32))
    mark = folder / f".flax_skd_{multihost_utils.broadcast_one_to_all(number)}"
    if jax.process_index() == 0:
        mark.touch()
    multihost_utils.sync_global_devices("marked")
    seen = multihost_utils.process_allgather(np.bool_(_appears(mark)))
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        raise ValueError(
            f"{folder} is not one directory for all processes: what process 0 writes "
            f"there, process {seen.argmin()} does not see. Name a --workdir on a file "
            "system that all of them share."
        )


def _appears(mark: pathlib.Path) -> bool:
    end = time.monotonic() + SEEN_WITHIN_S
    while not mark.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
        if mark.parent.parent.is_dir():
            os.listdir(mark.parent.parent)  # has a network file system look again
    return True
