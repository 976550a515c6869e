"""The arrays of a super-network as earlier versions wrote them, by orbax."""

import math
import pathlib
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from flax_skd.io.extras import require

_MOST_INFLATION = 100  # times the files' size; weights hardly compress
_SLACK = 2**24  # bytes: tables of levels, and networks of tests, compress more


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of an orbax directory, whatever mesh wrote them, paths joined by dots.

    Raises:
      ValueError: if it is incomplete, damaged, or unpacks to far more than it has; the
        message names it.
    """
    ocp = require("orbax.checkpoint")
    held = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(path).item_metadata.tree
            _check_sizes(tree, _MOST_INFLATION * held + _SLACK)
            as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
            args = jax.tree.map(lambda _: as_numpy, tree)
            tree = reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))
    except Exception as error:  # orbax and tensorstore raise many types
        raise ValueError(
            f"{path} cannot be read ({error}): it is incomplete or damaged. Copy it "
            "again, or save the super-network again."
        ) from error
    return flatten_dict(tree, sep=".") if isinstance(tree, dict) else {}


def _check_sizes(tree: Any, most: int) -> None:
    """Raises ValueError if the arrays say that they take more than `most` bytes."""
    total = sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
    if total > most:
        raise ValueError(f"it unpacks to {total} bytes, at most {most} are read")
