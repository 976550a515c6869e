"""The metrics of the newest step: not fetched before the next one runs, then checked."""

import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flax_skd.run import faults
from flax_skd.run.objective import Metrics

_LOG = logging.getLogger(__name__)


class NonFiniteLossError(ValueError):
    """The loss or its gradient is nan or infinite."""


class Running:
    """Follows a run, one step behind it.

    Args:
      progress: of `progress.Progress`.
      disk: of `run_state.Checkpoints`.
      schedule: of the learning rate, or None.
      params: whose paths name what is wrong; the arrays are not kept.
    """

    def __init__(self, progress: Any, disk: Any, schedule: Any, params: Any):
        self._progress, self._disk, self._schedule = progress, disk, schedule
        self._newest: tuple[int, Metrics, dict[str, np.ndarray]] | None = None
        self._tree = jax.tree.map(lambda _: 0, params)

    def follow(self, step: int, metrics: Metrics, batch: dict[str, np.ndarray]):
        """Settles the step before and remembers this one."""
        self.settle()
        self._newest = (step, metrics, batch)

    def settle(self) -> None:
        """Waits for the newest step, checks its numbers and passes them on."""
        if self._newest is None:
            return
        (step, metrics, batch), self._newest = self._newest, None
        found = jax.device_get(metrics)
        finite = {k: found.pop(f"{k}_finite") for k in ("grad", "param")}
        values = {k: float(v) for k, v in found.items()}
        self._check(step, values, finite, batch)
        images = len(jax.tree.leaves(batch)[0]) * jax.process_count()
        if self._progress.step(step, values, images):
            rate = {"lr": float(self._schedule(step - 1))} if self._schedule else {}
            self._progress.report(step, rate)

    def _check(self, step, values, finite, batch):
        checked = {name: values[name] for name in ("loss", "grad_norm", "param_norm")}
        if all(map(math.isfinite, checked.values())):
            return
        level = f", level {values['level']:g}" if "level" in values else ""
        ids = np.asarray(batch["index"]).tolist() if "index" in batch else "unknown"
        # What comes first spoils what comes after it: only that is named.
        places = (
            ("batch", faults.of_batch(batch)),
            ("gradient", faults.named(finite["grad"], self._tree)),
            ("parameter", faults.named(finite["param"], self._tree)),
        )
        told = next((f"Not finite: {n} {where}. " for n, where in places if where), "")
        raise NonFiniteLossError(
            f"{checked} at step {step}{level}, examples {ids}. {told}Last good "
            f"checkpoint: {self._disk.last()}. Look at these examples and their labels "
            "(one that is no class gives nan), lower the learning rate, or clip the "
            "gradient."
        )


def closing(close: Callable[[], None]) -> Callable[..., None]:
    """For `ExitStack.push`: calls `close`, whose error never hides why a run ended."""

    def leave(kind, error, trace):
        del kind, trace
        try:
            close()
        except Exception as later:
            if error is None:
                raise
            _LOG.warning("and as the run ended: %s", later)

    return leave
