"""PIAD in a few compiled sizes: a step computes little more than the level it drew.

The masked step computes the whole network at every level. Here the levels lie in a few
buckets, and the host draws the level of a step. One program cuts the parameters to it
(`objective.cut_params`). Another takes their gradient: it is compiled for the largest
level of the bucket, its widths a little rounded up (`coarse`). A list only grows at its
end, so a bucket keeps its widths: as many compilations as buckets, however long the run.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flax_skd.method import macs
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import Params
from flax_skd.run import objective
from flax_skd.run.objective import Elastic, Loss


class Buckets:
    """Draws levels for `train.fit`, each as likely as any, and the bucket of each.

    Args:
      spec: the full network.
      loss_of: function of static widths -> the loss of a model of these widths, with
        `objective.level_within` them.
      shares: of all MACs, falling, below 1: where the next bucket begins.
      seed: of the draws; step t draws by (seed, t), on every process the same.

    Raises:
      ValueError: if the shares do not fall between 1 and 0.
    """

    def __init__(
        self,
        spec: ViTSpec,
        loss_of: Callable[[SubnetSpec], Loss],
        *,
        shares: tuple[float, ...],
        seed: int,
    ):
        edges = (1.0, *shares, 0.0)
        if any(a <= b for a, b in itertools.pairwise(edges)):
            raise ValueError(
                f"sizes {shares}: shares of the MACs must fall, from below 1 to above 0."
            )
        self._spec, self._shares, self._seed = spec, shares, seed
        self._loss_of = functools.cache(loss_of)
        self._list: DropoutList | None = None
        self._starts: list[int] = []

    def renew(self, extra: Elastic) -> Elastic:
        """Takes note of a list that has grown; gives `extra` back, with a level."""
        self._list = jax.device_get(extra.dropout_list)
        self._starts = starts(self._list, self._spec, self._shares)
        return extra._replace(level=np.int32(0))

    def after(self, grow: Callable[[int, Any], Elastic]) -> Callable[[int, Any], Any]:
        """A `before_epoch` that takes note of what `grow` made."""
        return lambda epoch, state: self.renew(grow(epoch, state))

    def before_step(self, step: int, extra: Elastic) -> tuple[Elastic, Loss]:
        """The level of a step, in `extra`, and the loss of its bucket."""
        if self._list is None:  # a run that is resumed within an epoch
            self.renew(extra)
        levels = int(self._list.levels)
        level = np.random.default_rng((self._seed, step)).integers(levels + 1)
        first = max(start for start in self._starts if start <= level)
        widths = coarse(self._list.widths(first, self._spec), self._spec)
        return extra._replace(level=np.int32(level)), self._loss_of(widths)

    def before_loss(self, params: Params, extra: Elastic) -> Params:
        """What the losses are given; pure, and compiled once for all of them."""
        return objective.cut_params(params, extra, self._spec)


def coarse(widths: SubnetSpec, spec: ViTSpec) -> SubnetSpec:
    """Widths rounded up to quarters of a head and sixteenths of the hidden units.

    Blocks of equal widths share what is compiled for them.
    """

    def up(width, size, parts):
        step = max(1, size // parts)
        return min(size, -(-width // step) * step)

    heads = ([up(w, spec.head_dim, 4) for w in field] for field in widths[:2])
    units = [up(w, spec.mlp_dim, 16) for w in widths.mlp_dim]
    return SubnetSpec(*heads, units).check(spec)


def starts(
    dropout_list: DropoutList, spec: ViTSpec, shares: tuple[float, ...]
) -> list[int]:
    """First levels of the buckets a list has: 0, and the first within each share."""
    cost = [macs.macs(spec, widths) for widths in dropout_list.all_widths(spec)]
    found: dict[int, Any] = {0: None}
    for share in shares:
        inside = [i for i, c in enumerate(cost) if c <= share * cost[0]]
        if inside:
            found[inside[0]] = None
    return sorted(found)
