"""Which saved steps of a run are whole: checksums in each, and the newest that holds.

`checksums.json` in a step's folder has size and SHA-256 of its files, written before the
folder gets its name. What orbax would read without a word, a flipped bit or a file of
another run, is found by it.
"""

import hashlib
import json
import logging
import pathlib

import jax
import numpy as np
from jax.experimental import multihost_utils

from flax_skd.io import directory

_LOG = logging.getLogger(__name__)

FILE = "checksums.json"
# orbax writes these two after the checksums, and reads a step without them.
NOTE = "_CHECKPOINT_METADATA"
_AFTER = (NOTE, "commit_success.txt")
_NONE, _UNREADABLE = -1, -2  # in place of a step


def seal(folder: pathlib.Path, step: int) -> None:
    """Writes the checksums of a step that is complete but for its name."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [p.relative_to(folder).as_posix() for p in paths]
    files = {
        name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for name, path in zip(names, paths)
        if name not in _AFTER
    }
    facts = {"step": step, "files": files}
    directory.write_json(folder / FILE, "checksums", facts)


def faults(folder: pathlib.Path, step: int) -> list[str]:
    """What is wrong with the files of a step, each by its path; empty if it is whole.

    Raises:
      OSError: if a file that is there cannot be read, which is no damage.
    """
    sums = folder / FILE
    if not sums.is_file():
        return [f"{sums} is not there: the step was not saved whole"]
    try:
        fields = directory.read_json(sums, "checksums", {"step", "files"})
        wanted = {k: (v["bytes"], v["sha256"]) for k, v in fields["files"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        return [f"{sums} was edited ({error!r})"]
    except ValueError as error:
        return [str(error)]
    if fields["step"] != step:
        return [f"{sums} is of step {fields['step']!r}"]
    found = [_fault(folder / name, *want) for name, want in wanted.items()]
    return [fault for fault in (*found, _stops_orbax(folder / NOTE)) if fault]


def _stops_orbax(note: pathlib.Path) -> str:
    """What is no JSON there, orbax passes over; what is another JSON, it does not."""
    try:
        value = json.loads(note.read_bytes())
    except (FileNotFoundError, RecursionError, ValueError):
        return ""
    return "" if isinstance(value, dict) else f"{note} was edited"


def _fault(path: pathlib.Path, size: int, digest: str) -> str:
    if not path.is_file():
        return f"{path} is not there"
    there = path.stat().st_size
    if there != size:
        return f"{path} has {there} bytes, saved were {size}"
    if _digest(path) != digest:
        return f"{path} is not what was saved: damaged, edited, or of another run"
    return ""


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def steps(checkpoints: pathlib.Path) -> list[int]:
    """The steps that lie in a folder, whole or not, newest first."""
    there = checkpoints.iterdir() if checkpoints.is_dir() else ()
    return sorted((int(p.name) for p in there if p.name.isdecimal()), reverse=True)


def newest(checkpoints: pathlib.Path) -> tuple[int, dict[int, list[str]]]:
    """The newest whole step; process 0 looks, and tells the others.

    Args:
      checkpoints: with at least one step.

    Returns:
      The step, and the faults of newer ones, which only process 0 knows.

    Raises:
      OSError: if a file cannot be read.
      ValueError: if no step is whole; names the faults of each.
    """
    found: dict[int, list[str]] = {}
    step, error = _NONE, None
    if jax.process_index() == 0:
        try:
            step, found = _look(checkpoints)
        except OSError as caught:
            step, error = _UNREADABLE, caught
    if jax.process_count() > 1:
        step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if error:
        raise error
    if step >= 0:
        return step, found
    each = "\n".join(_told(checkpoints, s, said) for s, said in found.items())
    raise ValueError(each or f"{checkpoints} cannot be read; process 0 says why.")


def _look(checkpoints: pathlib.Path) -> tuple[int, dict[int, list[str]]]:
    found: dict[int, list[str]] = {}
    for step in steps(checkpoints):
        wrong = faults(checkpoints / str(step), step)
        if not wrong:
            return step, found
        found[step] = wrong
    return _NONE, found


def _told(checkpoints: pathlib.Path, step: int, wrong: list[str]) -> str:
    return (
        f"checkpoint {step} in {checkpoints} cannot be restored: it is damaged:\n  "
        + "\n  ".join(wrong[:10])
        + (f"\n  and {len(wrong) - 10} more" if len(wrong) > 10 else "")
    )


def set_aside(
    checkpoints: pathlib.Path, found: dict[int, list[str]], used: int
) -> None:
    """Renames damaged steps to `STEP.damaged`, and warns; deletes nothing.

    Args:
      checkpoints: where they lie.
      found: of `newest`.
      used: the step that is used in their place.
    """
    for step, wrong in found.items():
        target = checkpoints / f"{step}.damaged"
        count = 1
        while target.exists():
            count += 1
            target = checkpoints / f"{step}.damaged{count}"
        (checkpoints / str(step)).rename(target)
        _LOG.warning(
            "%s\nGoing on from step %d. The damaged one is kept as %s: delete it when "
            "you need it no more.",
            *(_told(checkpoints, step, wrong), used, target),
        )
    directory.barrier("set aside")
