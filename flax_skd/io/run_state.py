"""A training run on disk: `checkpoints` (orbax) and `log.jsonl` in one workdir."""

import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp

from flax_skd.io.directory import as_json, barrier, local
from flax_skd.io.extras import require

_LOG = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
BOARD = "tensorboard"  # the folder of its files


def claim(
    workdir: str | os.PathLike, *, overwrite: bool = False, resume: bool = False
) -> pathlib.Path:
    """Makes a workdir ours, and never silently another run's.

    Args:
      workdir: new, empty, or holding a run if one of the two below is given; files
        that are not a run's are left alone.
      overwrite: delete the run that is there: its checkpoints and log, nothing else.
      resume: keep the run that is there.

    Returns:
      The absolute path of the directory, which exists.

    Raises:
      ValueError: if a run is there and neither is given, or both are.
    """
    if overwrite and resume:
        raise ValueError("--overwrite and --resume exclude each other: give one.")
    path = local(workdir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a directory.")
    there = [name for name in (CHECKPOINTS, LOG) if (path / name).exists()]
    if there and not (overwrite or resume):
        raise ValueError(
            f"{path} holds another run ({', '.join(there)}): pass --resume to go on "
            "with it, --overwrite to delete it, or another workdir."
        )
    barrier("claim")
    if jax.process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            _delete(path)
    barrier("claimed")
    return path


def _delete(workdir: pathlib.Path) -> None:
    """Deletes a run: the log and step directories, finished or not."""
    (workdir / LOG).unlink(missing_ok=True)
    board = workdir / BOARD
    for events in board.glob("events.out.tfevents.*"):
        events.unlink()
    if board.is_dir() and not any(board.iterdir()):
        board.rmdir()
    steps = workdir / CHECKPOINTS
    for step in steps.iterdir() if steps.is_dir() else ():
        if step.name.partition(".")[0].isdigit() and step.is_dir():
            shutil.rmtree(step)
    if steps.is_dir() and not any(steps.iterdir()):
        steps.rmdir()


def manager(workdir: str | os.PathLike, *, max_to_keep: int = 3) -> Any:
    """An orbax `CheckpointManager` of a run, saving in the background.

    Args:
      workdir: of the run.
      max_to_keep: the newest so many checkpoints stay.
    """
    ocp = require("orbax.checkpoint")
    return ocp.CheckpointManager(
        local(workdir) / CHECKPOINTS,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep, create=True, enable_async_checkpointing=True
        ),
        item_names=("state", "data", "config"),
    )


def save(manager: Any, step: int, *, state: Any, batches: Any, config: Any) -> None:
    """Saves a run after `step` updates, unless that step is there.

    Args:
      manager: of `manager`.
      step: updates done.
      state: any pytree of arrays.
      batches: a grain iterator; its position is what is saved.
      config: what JSON holds; a resumed run must have the same.
    """
    if step in manager.all_steps():
        return
    ocp, grain = require("orbax.checkpoint"), require("grain.checkpoint")
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=grain.CheckpointSave(batches),
        config=ocp.args.JsonSave({"config": as_json(config, "config")}),
    )
    manager.save(step, args=items, force=True)


def restore(manager: Any, *, state: Any, batches: Any, config: Any) -> Any:
    """Restores the newest checkpoint of a run, on the mesh of `state`.

    Args:
      manager: of `manager`.
      state: a pytree of arrays with the wanted shapes and shardings; only its form
        is used.
      batches: a grain iterator, moved to the saved position.
      config: of this run.

    Returns:
      The saved state.

    Raises:
      ValueError: if the config differs (each difference is shown), or the checkpoint
        does not fit the state or is damaged.
    """
    ocp, grain = require("orbax.checkpoint"), require("grain.checkpoint")
    step, path = manager.latest_step(), manager.directory

    def read(**items):
        try:
            return manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # orbax and tensorstore raise many types
            raise ValueError(
                f"checkpoint {step} in {path} cannot be restored: it is damaged, or "
                f"of another network or optimizer ({error})."
            ) from error

    saved = read(config=ocp.args.JsonRestore()).config["config"]
    wrong = differences(saved, as_json(config, "config"))
    if wrong:
        raise ValueError(
            f"the run in {path} had another config:\n  "
            + "\n  ".join(wrong)
            + "\nResume with the saved config, or start anew in another workdir."
        )
    _check_shapes(path, step, state)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    return read(
        state=ocp.args.StandardRestore(like), data=grain.CheckpointRestore(batches)
    ).state


class Checkpoints:
    """The checkpoints of one run; without a workdir it saves nothing.

    Attributes:
      workdir: absolute path, or None.
      manager: orbax's, or None.
    """

    def __init__(
        self,
        workdir: str | os.PathLike | None,
        *,
        batches: Any,
        config: Any,
        overwrite: bool = False,
        resume: bool = False,
    ):
        """Claims the workdir, after a look at what shall be saved in it.

        Args:
          workdir: see `claim`; None for none.
          batches: a grain iterator.
          config: of the run, as JSON holds it.
          overwrite, resume: see `claim`.

        Raises:
          ValueError: if `claim` refuses, `batches` has no position that could be
            saved, or JSON cannot hold the config.
        """
        self.workdir = self.manager = None
        self._items = {"batches": batches, "config": as_json(config, "config")}
        if not workdir:
            return
        has_position = isinstance(batches, require("grain").DatasetIterator)
        if not has_position:
            raise ValueError(
                f"{type(batches).__name__} cannot say where in the data it is, so no "
                "run can be resumed: pass a grain iterator, or no workdir."
            )
        self.workdir = claim(workdir, overwrite=overwrite, resume=resume)
        self.manager = manager(self.workdir)

    def restore(self, state: Any) -> Any:
        """The newest saved state, `batches` moved with it; `state` if there is none."""
        if self.manager is None:
            raise ValueError("a run without a workdir cannot be resumed: give one.")
        if self.manager.latest_step() is None:
            _LOG.warning("nothing to resume in %s", self.manager.directory)
            return state
        state = restore(self.manager, state=state, **self._items)
        _LOG.info("resumed after step %d", self.manager.latest_step())
        return state

    def save(self, step: int, state: Any) -> None:
        """Saves after `step` updates, in the background."""
        if self.manager:
            save(self.manager, step, state=state, **self._items)

    def last(self) -> str:
        """The newest whole checkpoint, in words."""
        if self.manager:
            self.manager.wait_until_finished()
            if self.manager.latest_step() is not None:
                return f"step {self.manager.latest_step()} in {self.manager.directory}"
        return "none"

    def close(self) -> None:
        """Waits for what is being saved, and ends."""
        if self.manager:
            self.manager.close()


def _check_shapes(path: Any, step: int, state: Any) -> None:
    """All arrays that the checkpoint lacks, has too many, or has of another shape."""
    handler = require("orbax.checkpoint").PyTreeCheckpointHandler()
    try:
        saved = handler.metadata(path / str(step) / "state").tree
    except Exception as error:  # orbax and tensorstore raise many types
        raise ValueError(
            f"checkpoint {step} in {path} cannot be restored: it is damaged ({error})."
        ) from error
    wrong = differences(_shapes(saved), _shapes(state))
    if wrong:
        raise ValueError(
            f"checkpoint {step} in {path} cannot be restored: it is of another network "
            "or optimizer, whose arrays have other shapes:\n  " + "\n  ".join(wrong)
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    def shape(x):
        key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return tuple(jax.random.key_data(x).shape if key else x.shape)

    return {
        jax.tree_util.keystr(path, simple=True, separator="."): shape(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(x, "shape")
    }


def differences(saved: Any, now: Any) -> list[str]:
    """One line for each field that two JSON values do not share."""
    old, new = _flat(saved), _flat(now)

    def shown(fields, key):
        return repr(fields[key]) if key in fields else "nothing"

    return [
        f"{key}: saved {shown(old, key)}, now {shown(new, key)}"
        for key in sorted(old | new)
        if key not in old or key not in new or old[key] != new[key]
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix or "config": value}
    flat = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
