"""A training run on disk: `checkpoints` (orbax) and `log.jsonl` in one workdir."""

import contextlib
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import jax

from flax_skd.io import processes, whole_steps
from flax_skd.io.differences import differences, shapes
from flax_skd.io.directory import as_json, barrier, local, probe
from flax_skd.io.extras import require

_LOG = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LOG = "log.jsonl"
KEPT = 3  # checkpoints that stay, the newest
BOARD = "tensorboard"  # the folder of its files
# What a process that was killed leaves of the networks it was writing.
_UNFINISHED = re.compile(r"\.network(-.+)?\.[0-9a-f]{8}\.(tmp|old)")


def claim(
    workdir: str | os.PathLike, *, overwrite: bool = False, resume: bool = False
) -> pathlib.Path:
    """Makes a workdir ours, and never silently another run's.

    Args:
      workdir: new, empty, or holding a run if one of the two below is given; files
        that are not a run's are left alone.
      overwrite: delete the run that is there: its checkpoints and log, nothing else.
      resume: keep the run that is there, but for what was never finished.

    Returns:
      The absolute path of the directory, which exists and can be written.

    Raises:
      ValueError: if a run is there and neither is given, or both are, or nothing can
        be written, or not every process sees what the first writes.
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
        _make_writable(path)
        if overwrite:
            _delete(path)
        for left in path.iterdir():
            if _UNFINISHED.fullmatch(left.name):
                shutil.rmtree(left)
    processes.check_shared(path)
    return path


def _make_writable(path: pathlib.Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe(path)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror or error}): make room, mend "
            "its permissions, or name another --workdir."
        ) from error


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


def _manager(folder: pathlib.Path) -> Any:
    """Of orbax, saving in the background, every step sealed by `whole_steps`."""
    ocp = require("orbax.checkpoint")

    def seal():
        if jax.process_index() == 0:
            for fresh in folder.glob("*.orbax-checkpoint-tmp*"):
                whole_steps.seal(fresh, int(fresh.name.partition(".")[0]))

    return ocp.CheckpointManager(
        folder,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=KEPT,
            create=True,
            cleanup_tmp_directories=True,  # of a process that was killed
            enable_async_checkpointing=True,
            # Called when all items are written and the folder has no name yet.
            async_options=ocp.AsyncOptions(post_finalization_callback=seal),
        ),
        item_names=("state", "data", "config"),
    )


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

        To resume, steps that are newer than the newest whole one are set aside.

        Args:
          workdir: see `claim`; None for none.
          batches: a grain iterator.
          config: of the run, as JSON holds it.
          overwrite, resume: see `claim`.

        Raises:
          ValueError: if `claim` refuses, `batches` has no position that could be
            saved, JSON cannot hold the config, or there are steps and none is whole.
        """
        self.workdir = self.manager = None
        self._batches, self._config = batches, as_json(config, "config")
        if not workdir:
            return
        has_position = isinstance(batches, require("grain").DatasetIterator)
        if not has_position:
            raise ValueError(
                f"{type(batches).__name__} cannot say where in the data it is, so no "
                "run can be resumed: pass a grain iterator, or no workdir."
            )
        self.workdir = claim(workdir, overwrite=overwrite, resume=resume)
        self._folder = self.workdir / CHECKPOINTS
        self._step = self._take_newest() if resume else None
        self.manager = _manager(self._folder)

    def _take_newest(self) -> int | None:
        """The newest whole step, newer ones set aside; before orbax reads any."""
        if not whole_steps.steps(self._folder):
            return None
        step, damaged = whole_steps.newest(self._folder)
        whole_steps.set_aside(self._folder, damaged, step)
        return step

    def restore(self, state: Any) -> Any:
        """The newest whole state, `batches` moved with it; `state` if none was saved.

        Args:
          state: a pytree of arrays with the wanted shapes and shardings.

        Raises:
          ValueError: if there is no workdir, the config differs (each difference is
            shown), or the checkpoint does not fit the state.
        """
        if self.manager is None:
            raise ValueError("a run without a workdir cannot be resumed: give one.")
        if self._step is None:
            _LOG.warning("nothing to resume in %s", self._folder)
            return state
        state = self._read(self._step, state)
        _LOG.info("resumed after step %d", self._step)
        return state

    def _read(self, step: int, state: Any) -> Any:
        ocp, grain = require("orbax.checkpoint"), require("grain.checkpoint")

        def read(**items):
            try:
                return self.manager.restore(step, args=ocp.args.Composite(**items))
            except Exception as error:  # orbax and tensorstore raise many types
                raise ValueError(
                    f"checkpoint {step} in {self._folder} cannot be restored: it is of "
                    f"another network or optimizer, or of another orbax ({error})."
                ) from error

        saved = read(config=ocp.args.JsonRestore()).config["config"]
        wrong = differences(saved, self._config)
        if wrong:
            raise ValueError(
                f"checkpoint {step}: the run in {self._folder} had another config:\n  "
                + "\n  ".join(wrong)
                + "\nResume with the saved config, or start anew in another workdir."
            )
        _check_processes(self._folder, step)
        _check_shapes(self._folder, step, state)
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        data = grain.CheckpointRestore(self._batches)
        return read(state=ocp.args.StandardRestore(like), data=data).state

    def save(self, step: int, state: Any) -> None:
        """Saves after `step` updates, in the background, unless that step is there."""
        if not self.manager or step in self.manager.all_steps():
            return
        ocp, grain = require("orbax.checkpoint"), require("grain.checkpoint")
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.CheckpointSave(self._batches),
            config=ocp.args.JsonSave({"config": self._config}),
        )
        with self._named():
            self.manager.save(step, args=items, force=True)

    def last(self) -> str:
        """The newest whole checkpoint, in words; a save that fails meanwhile is none."""
        if not self.manager:
            return "none"
        with contextlib.suppress(Exception):  # said when the run is closed
            self.manager.wait_until_finished()
        return self._newest()

    def _newest(self) -> str:
        there = whole_steps.steps(self._folder)  # orbax counts those that failed
        return f"step {there[0]} in {self._folder}" if there else "none"

    def close(self) -> None:
        """Waits for what is being saved, and ends; what never began leaves nothing."""
        if self.manager:
            with self._named():
                self.manager.close()
            if jax.process_index() == 0:
                with contextlib.suppress(OSError):
                    self._folder.rmdir()  # only if it is empty

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Says which save failed, and what is left."""
        try:
            yield
        except Exception as error:  # orbax and tensorstore raise many types
            raise OSError(
                f"a checkpoint could not be saved in {self._folder}: {error}\nMake room "
                "or mend its permissions, then run the same again with --resume. Last "
                f"good checkpoint: {self._newest()}."
            ) from error


def _check_processes(path: pathlib.Path, step: int) -> None:
    """Each process has a place in the data of its own, which no other number fits."""
    names = (path / str(step) / "data").glob("process_*-of-*.json")
    saved = {int(name.stem.rpartition("-")[2]) for name in names}
    if saved and saved != {jax.process_count()}:
        raise ValueError(
            f"checkpoint {step} in {path} was saved by {max(saved)} processes, of which "
            f"each had its part of the images, and this run has {jax.process_count()}: "
            f"start {max(saved)}. They may have other numbers of devices."
        )


def _check_shapes(path: Any, step: int, state: Any) -> None:
    """All arrays that the checkpoint lacks, has too many, or has of another shape."""
    handler = require("orbax.checkpoint").PyTreeCheckpointHandler()
    try:
        saved = handler.metadata(path / str(step) / "state").tree
    except Exception as error:  # orbax and tensorstore raise many types
        raise ValueError(
            f"checkpoint {step} in {path} cannot be restored: it is damaged ({error})."
        ) from error
    wrong = differences(shapes(saved), shapes(state))
    if wrong:
        raise ValueError(
            f"checkpoint {step} in {path} cannot be restored: it is of another network "
            "or optimizer, whose arrays have other shapes:\n  " + "\n  ".join(wrong)
        )
