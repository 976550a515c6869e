"""Stages of a run: which one it is in, on host and device, and what it trains."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.run.objective import Array
from flax_skd.run.train import TrainState


class Stage(NamedTuple):
    """`extra` of a train state that has its stage alone, int32 []."""

    stage: Any


class Stages:
    """Counts stages for `train.fit`, in `extra.stage` and, beside it, on the host.

    Args:
      count: how many there are; what comes later belongs to the last.
    """

    def __init__(self, count: int):
        self._count = count
        self._now: int | None = None

    def begin(self, index: int, state: Any) -> Any:
        """A `before_epoch`, called once a stage: `extra` of the stage."""
        self._now = min(index, self._count - 1)
        return state.extra._replace(stage=np.int32(self._now))

    def now(self, extra: Any) -> int:
        """The stage of a step; waits for the device at most once, after a resume."""
        if self._now is None:  # a run that is resumed within a stage
            self._now = int(jax.device_get(extra.stage))
        return self._now


def only(
    trained: Callable[[str], Array | bool], before: TrainState, after: TrainState
) -> TrainState:
    """The state after a step, all but some of its parameters as before.

    A gradient of zero does not keep them: weight decay and momentum go on.

    Args:
      trained: function of a top-level name in `params` -> whether it may change, bool
        [], traced or not.
      before, after: the step.
    """
    params = {
        name: jax.tree.map(
            lambda new, old, name=name: jnp.where(trained(name), new, old),
            *(after.params[name], before.params[name]),
        )
        for name in after.params
    }
    return after._replace(params=params)
