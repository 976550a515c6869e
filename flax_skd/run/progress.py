"""What a run tells while it trains: a bar, log lines, and rows of JSON."""

import contextlib
import json
import logging
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from flax_skd.io.extras import require
from flax_skd.io.run_state import BOARD

_LOG = logging.getLogger(__name__)


class Progress:
    """Means over the steps since the last report, reported now and then.

    Only the first process shows and writes anything. A report is a line in the log
    and a row in `path`: step, means of the metrics, images/s of all hosts, the share of
    the time spent waiting for data, and the seconds left at this pace, of all steps but
    those that are compiled. Where tensorboardX
    is installed, the row goes to its files as well.
    """

    def __init__(
        self,
        path: pathlib.Path | None,
        *,
        start: int,
        steps: int,
        every_steps: int | None,
        every_s: float,
    ):
        """Starts the clock.

        Args:
          path: of the rows, appended to; None for none. Rows of steps after `start`
            are dropped: those steps are about to run again.
          start: updates done.
          steps: updates in all.
          every_steps, every_s: report at whichever comes first.
        """
        self._steps, self._every = steps, (every_steps, every_s)
        self._path = path if jax.process_index() == 0 else None
        self._board = None
        if self._path:
            _rewind(self._path, start)
            self._board = _tensorboard(self._path.parent / BOARD, start)
        self._bar = require("tqdm").tqdm(
            total=steps,
            initial=start,
            unit="step",
            # None: only where a terminal can show it.
            disable=None if jax.process_index() == 0 else True,
        )
        self._clear()

        self._compiled: set[int] = set()

    def _clear(self) -> None:
        self._since, self._wait, self._images = time.monotonic(), 0.0, 0
        self._sums: dict[str, float] = {}
        self._count = self._timed = 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time meanwhile as waiting for data."""
        before = time.monotonic()
        yield
        self._wait += time.monotonic() - before

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock meanwhile."""
        before = time.monotonic()
        yield
        self._since += time.monotonic() - before

    @contextlib.contextmanager
    def compiling(self, step: int) -> Iterator[None]:
        """Stops the clock meanwhile, and leaves this step out of the pace."""
        self._compiled.add(step)
        with self.paused():
            yield

    def step(self, step: int, values: dict[str, float], images: int) -> bool:
        """Takes in one finished step; true if a report is due.

        Args:
          step: updates done.
          values: metrics of the step.
          images: of all hosts.
        """
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._count += 1
        if step not in self._compiled:
            self._timed += 1
            self._images += images
        self._bar.update()
        every_steps, every_s = self._every
        return (
            step == self._steps
            or bool(every_steps and step % every_steps == 0)
            or time.monotonic() - self._since >= every_s
        )

    def report(self, step: int, more: dict[str, float]) -> None:
        """Logs and writes the means since the last report, and starts new ones.

        Args:
          step: updates done.
          more: fields to add, such as the learning rate.
        """
        seconds = max(time.monotonic() - self._since, 1e-9)
        values = {k: v / self._count for k, v in self._sums.items()}
        row = values | more
        if self._timed:  # else all of the time was compilation
            row |= {
                "images_per_s": self._images / seconds,
                "data_wait": min(1.0, self._wait / seconds),
                "seconds_left": (self._steps - step) * seconds / self._timed,
            }
        self.write(step, row)
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()})
        self._clear()

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Logs and writes one row.

        Raises:
          OSError: if it cannot be written; says where, and what to do.
        """
        if jax.process_index():
            return
        row = {k: float(v) for k, v in row.items()}  # numpy's and jax's too
        left = row.get("seconds_left")
        told = [f"{k} {v:.5g}" for k, v in row.items() if k != "seconds_left"]
        told += [] if left is None else [f"left {_readable(left)}"]
        _LOG.info("step %d/%d: %s", step, self._steps, ", ".join(told))
        if self._path:
            with _named(self._path), self._path.open("a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step, **row}) + "\n")
        if self._board:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)

    def write_once(self, step: int, row: dict[str, Any]) -> None:
        """`write`, unless the log ends with this row."""
        line = json.dumps({"step": step} | {k: float(v) for k, v in row.items()})
        there = self._path and self._path.exists()
        if not there or line not in self._path.read_text().splitlines()[-1:]:
            self.write(step, row)

    def close(self) -> None:
        """Ends the bar and what tensorboard reads."""
        self._bar.close()
        if self._board:
            self._board.close()


def _readable(seconds: float) -> str:
    """`40 s`, `3 min`, `2 h 5 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _tensorboard(folder: pathlib.Path, start: int) -> Any:
    """A writer for tensorboard from the step after `start` on; None without the package."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start + 1)


def _rewind(path: pathlib.Path, step: int) -> None:
    """Drops rows after `step`, and a last row that was cut short."""
    if not path.exists():
        return
    kept = []
    # Whatever a full disk or a power cut left there, the rows that are whole stay.
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    fresh = path.with_suffix(".tmp")
    with _named(path):
        fresh.write_text("".join(kept), encoding="utf-8")
        os.replace(fresh, path)


@contextlib.contextmanager
def _named(path: pathlib.Path) -> Iterator[None]:
    """A full disk does not say which file it had no room for."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{path} could not be written ({error}): make room or mend its permissions, "
            "then run the same again with --resume."
        ) from error
