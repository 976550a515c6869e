"""A dropout list from measured loss: what costs least per MAC goes first.

The importance of the paper is a product of two proxies, and losses of single cuts do
not add up. Here every candidate cut is measured on top of what is cut already, and
again after every few: greedy descent on the true loss, whatever it is a function of.
Queries with keys, values with `out`, and hidden units are cut apart unless told
otherwise. Host-side float64.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from flax_skd.method import growth, macs, piad
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec, ViTSpec

# Kind of branch -> the widths cut together.
Kinds = Mapping[str, tuple[str, ...]]
SEPARATE = {"qk": ("qk_dim",), "vo": ("vo_dim",), "mlp": ("mlp_dim",)}
TIED = {"heads": ("qk_dim", "vo_dim"), "mlp": ("mlp_dim",)}

GROUPS = growth.Groups(attn=8, mlp=16)
# widths of many sub-networks -> their losses
Losses = Callable[[Sequence[SubnetSpec]], Sequence[float]]


class Step(NamedTuple):
    """One cut as it was measured.

    Attributes:
      block, kind: what is cut; a key of `SEPARATE` or `TIED`.
      widths: of the whole network after this cut alone.
      saved: cost saved by it.
      rise: of the loss.
    """

    block: int
    kind: str
    widths: SubnetSpec
    saved: float
    rise: float


class Round(NamedTuple):
    """What one round measured and did, for the record.

    Attributes:
      loss: measured before it.
      predicted: `loss` plus the rises of all its cuts, as if they added up.
      cuts: how many.
      cost: left after it.
    """

    loss: float
    predicted: float
    cuts: int
    cost: float


def candidates(
    widths: SubnetSpec,
    spec: ViTSpec,
    *,
    kinds: Kinds = SEPARATE,
    groups: growth.Groups = GROUPS,
    cost: Callable[[ViTSpec, SubnetSpec], float] = macs.macs,
) -> list[Step]:
    """Every branch cut by one more group; their `rise` is not known yet.

    The last group of a branch takes the branch, queries and values together.

    Args:
      widths: of the smallest level so far.
      spec: the full network.
      kinds: which widths are cut together.
      groups: into how many groups a branch is cut.
      cost: what is saved, as `macs.macs`.
    """
    ends = groups.ends(spec)
    now, found = cost(spec, widths), []
    for block in range(spec.depth):
        for kind, fields in kinds.items():
            size = getattr(widths, fields[0])[block]
            if not size:
                continue
            smaller = max(
                w for w in ends["mlp" if kind == "mlp" else "attn"] if w < size
            )
            # A head without queries is no head: attention goes as a whole.
            gone = ("qk_dim", "vo_dim") if not smaller and kind != "mlp" else fields
            cut = piad.narrowed(widths, block, gone, smaller)
            found.append(Step(block, kind, cut, now - cost(spec, cut), 0.0))
    return found


def allocate(
    spec: ViTSpec,
    losses: Losses,
    *,
    target: float,
    share: float = 0.25,
    kinds: Kinds = SEPARATE,
    groups: growth.Groups = GROUPS,
    cost: Callable[[ViTSpec, SubnetSpec], float] = macs.macs,
    after_round: Callable[[Round], None] = lambda round: None,
) -> DropoutList:
    """Cuts the network down, the loss re-measured around every solution.

    A round measures every branch with one more group cut, and takes the cheapest by
    rise of the loss per cost saved. Cuts of one round are taken as if they added up,
    which is why there are more rounds than one.

    Args:
      spec: the full network.
      losses: measures sub-networks, such as the divergence from the full one on
        calibration images; called with the network so far and all candidates.
      target: cost of the smallest level; the list stops at the first at most that.
      share: of the candidates that a round takes, in (0, 1]; at least one. Fewer a
        round is nearer to greedy and dearer.
      kinds: `SEPARATE`, or `TIED` for formats that hold one width a head.
      groups: of head dims and hidden units.
      cost: function of (spec, widths) that falls with every cut: `macs.macs`,
        `macs.param_count`, a latency.
      after_round: called with what every round did.

    Returns:
      A `DropoutList`, a level for every cut.

    Raises:
      ValueError: if the target cannot be reached, or a loss is not finite.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share = {share} must be in (0, 1].")
    widths = SubnetSpec.full(spec)
    rows = [widths]
    while cost(spec, widths) > target:
        steps = candidates(widths, spec, kinds=kinds, groups=groups, cost=cost)
        if not steps:
            raise ValueError(
                f"a cost of {target:g} cannot be reached: with every branch removed "
                f"the network still costs {cost(spec, widths):g}."
            )
        loss, steps = _measured(widths, steps, losses)
        taken = steps[: max(1, round(share * len(steps)))]
        predicted, cuts = loss, 0
        for step in taken:
            after = _apply(widths, step)
            if after == widths:
                continue  # another cut of the round took the branch already
            widths = after
            rows.append(widths)
            predicted, cuts = predicted + step.rise, cuts + 1
            if cost(spec, widths) <= target:
                break
        after_round(Round(loss, predicted, cuts, cost(spec, widths)))
    return piad.from_rows(rows, spec)


def _measured(widths: SubnetSpec, steps: list[Step], losses: Losses):
    """The loss as it is, and the steps with their rises, cheapest first."""
    found = np.asarray(losses([widths, *(s.widths for s in steps)]), np.float64)
    if not np.isfinite(found).all():
        bad = np.flatnonzero(~np.isfinite(found))[0]
        where = f"block {steps[bad - 1].block}" if bad else "the network so far"
        raise ValueError(f"the loss of {where} is {found[bad]}, not finite.")
    rises = found[1:] - found[0]
    steps = [s._replace(rise=float(r)) for s, r in zip(steps, rises, strict=True)]
    return float(found[0]), sorted(steps, key=lambda s: s.rise / s.saved)


def _apply(widths: SubnetSpec, step: Step) -> SubnetSpec:
    """`widths` with the cut of a step on top of others of its round."""
    # In its other blocks the step has the widths the round began with, which only fall.
    return SubnetSpec(*(tuple(map(min, *pair)) for pair in zip(widths, step.widths)))
