"""Growing a dropout list: what matters least per MAC goes first.

A unit is a group of head dims (of all heads together) or of hidden units, cut from the
end only (Li et al., AAAI 2026, "PIAD"). Host-side float64 on a few hundred numbers: the
same importance gives the same list everywhere.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from flax_skd.method import macs, piad
from flax_skd.method.importance import Importance
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec, ViTSpec

# Branch (a field of `Importance`) -> the widths it has, cut together. The paper ties
# queries and keys to values; this table is the one place that says so.
BRANCHES = {"attn": ("qk_dim", "vo_dim"), "mlp": ("mlp_dim",)}


class Groups(NamedTuple):
    """Into how many units a branch is cut.

    Attributes:
      attn: groups of head dims in a block.
      mlp: groups of hidden units in a block.
      attn_lane, mlp_lane: the size of a group is rounded up to a multiple of this,
        which may leave fewer groups; 1 for the evenest sizes.
    """

    attn: int = 8
    mlp: int = 32
    attn_lane: int = 1
    mlp_lane: int = 1

    def ends(self, spec: ViTSpec) -> dict[str, tuple[int, ...]]:
        """Branch -> the widths it may be cut to, rising from 0 to all of it."""
        return {
            "attn": ends(spec.head_dim, self.attn, lane=self.attn_lane),
            "mlp": ends(spec.mlp_dim, self.mlp, lane=self.mlp_lane),
        }


PAPER_GROUPS = Groups()


class Removal(NamedTuple):
    """One or more units at the end of a branch that are dropped at once.

    Attributes:
      block: index.
      branch: a key of `BRANCHES`.
      width: what is left of the branch.
      macs_saved: by this removal after those before it in the branch.
      lost: the importance of its dims.
    """

    block: int
    branch: str
    width: int
    macs_saved: int
    lost: float

    @property
    def slope(self) -> float:
        """Importance lost per MAC saved, the score."""
        return self.lost / self.macs_saved


def ends(size: int, groups: int, *, lane: int = 1) -> tuple[int, ...]:
    """Group boundaries of a branch, from 0 to `size`.

    Args:
      size: dims of the branch.
      groups: how many to make; no more than there are dims.
      lane: sizes are rounded up to a multiple of it, but for the last group's.

    Raises:
      ValueError: if `groups` or `lane` is not positive.
    """
    for name, count in (("groups", groups), ("lane", lane)):
        if count < 1:
            raise ValueError(f"{name} = {count} must be at least 1.")
    if lane == 1:
        return tuple(sorted({round(i * size / groups) for i in range(groups + 1)}))
    step = math.ceil(size / (groups * lane)) * lane
    return (*range(0, size, step), size)


def capacity(spec: ViTSpec, groups: Groups = PAPER_GROUPS) -> int:
    """The most removals there can be: `max_levels` of a list that never overflows."""
    return spec.depth * sum(len(widths) - 1 for widths in groups.ends(spec).values())


def start(spec: ViTSpec, groups: Groups = PAPER_GROUPS) -> DropoutList:
    """A list of the full network alone, with room for every removal."""
    full = SubnetSpec.full(spec)
    return piad.from_rows([full], spec, max_levels=capacity(spec, groups))


def progressive_epochs(epochs: float) -> float:
    """Epochs that grow the list: a third of the run, at most the paper's 50."""
    return min(50.0, epochs / 3)


def schedule(
    epoch: int, progressive: int, *, model_macs: int, share: float = 0.875
) -> float:
    """MACs the smallest level may have saved after an epoch's growth.

    Args:
      epoch: from 0; or a stage, where the list grows at other times.
      progressive: how many epochs (`progressive_epochs`), or stages, grow the list.
      model_macs: of the full network, embedding and head included.
      share: r, of `model_macs`, saved in the end.

    Returns:
      r (epoch + 1) / progressive of the MACs.

    Raises:
      ValueError: if an argument is out of range.
    """
    if epoch < 0 or progressive < 1 or not 0 < share < 1:
        raise ValueError(
            f"epoch = {epoch} must not be negative, progressive = {progressive} at "
            f"least 1 and share = {share} in (0, 1)."
        )
    return share * model_macs * min(epoch + 1, progressive) / progressive


def grow(
    dropout_list: DropoutList,
    spec: ViTSpec,
    importance: Importance,
    *,
    target_macs_saved: float,
    groups: Groups = PAPER_GROUPS,
) -> DropoutList:
    """Appends the least important removals while a target of saved MACs is kept.

    Args:
      dropout_list: to grow (`start` makes the first); its rows stay.
      spec: the full network.
      importance: measured at the smallest level of the list.
      target_macs_saved: most that the smallest level may save against the full
        network, full count (`schedule`); growth stops before the first removal that
        exceeds it.
      groups: units of every branch.

    Returns:
      A list of numpy tables of the same shape, with more levels or the same.

    Raises:
      ValueError: if the target cannot be reached, no group is left, the list has no
        room or does not fit, or the importance is not finite (the block is named).
    """
    tables, levels = _tables(dropout_list, spec), int(dropout_list.levels)
    widths = dropout_list.widths(levels, spec)
    full = macs.macs(spec)
    saved = full - macs.macs(spec, widths)
    check_target(target_macs_saved, spec, saved)
    rows = []
    for removal in removals(widths, spec, importance, groups=groups):
        saved += removal.macs_saved
        if saved > target_macs_saved:
            break
        widths = drop(widths, removal)
        rows.append(widths)
    return _append(tables, levels, rows)


def removals(
    widths: SubnetSpec,
    spec: ViTSpec,
    importance: Importance,
    *,
    groups: Groups = PAPER_GROUPS,
) -> list[Removal]:
    """Everything that can still be dropped, in the order in which it goes.

    Args:
      widths: of the smallest level so far.
      spec, importance, groups: as in `grow`.

    Returns:
      `Removal`s by rising slope; equal ones by block, attention before MLP.
    """
    importance, widths = importance.check(spec), SubnetSpec(*widths).check(spec)
    ends_of = groups.ends(spec)
    found: list[Removal] = []
    for block in range(spec.depth):
        sizes = {name: field[block] for name, field in zip(widths._fields, widths)}
        for branch in BRANCHES:
            dims = getattr(importance, branch)[block]
            steps = _steps(sizes, ends_of[branch], branch, dims, spec)
            found += lower_hull(Removal(block, branch, *step) for step in steps)
    # Stable: ties stay in the order they were found.
    return sorted(found, key=lambda removal: removal.slope)


def _steps(sizes, ends, branch, importance, spec):
    """(width, MACs saved, importance lost) of one group after another, from the end."""
    one, whole = spec.replace(depth=1), {n: (w,) for n, w in sizes.items()}

    def count(width):
        cut = {n: (min(sizes[n], width),) for n in BRANCHES[branch]}
        return macs.macs(one, SubnetSpec(**{**whole, **cut}))

    now = max(sizes[name] for name in BRANCHES[branch])
    for width in (w for w in reversed(ends) if w < now):
        yield width, count(now) - count(width), float(importance[width:now].sum())
        now = width


def lower_hull(steps: Iterable[Removal]) -> list[Removal]:
    """Merges removals of one branch until their slopes rise.

    Each is then a segment of the lower convex hull of the points (MACs saved,
    importance lost). Equal slopes stay apart.
    """
    # The authors' program averages over all cheaper units instead.
    hull: list[Removal] = []
    for step in steps:
        while hull and hull[-1].slope > step.slope:
            last = hull.pop()
            step = step._replace(
                macs_saved=last.macs_saved + step.macs_saved, lost=last.lost + step.lost
            )
        hull.append(step)
    return hull


def drop(widths: SubnetSpec, removal: Removal) -> SubnetSpec:
    """The widths after a removal."""
    fields = BRANCHES[removal.branch]
    return piad.narrowed(widths, removal.block, fields, removal.width)


def check_target(target: float, spec: ViTSpec, saved: int = 0) -> None:
    """Raises ValueError unless `target` MACs can be saved, `saved` of them already."""
    if not 0 <= target < math.inf:
        raise ValueError(f"target_macs_saved = {target} must be finite and >= 0.")
    nothing = SubnetSpec.uniform(spec, 0, 0, 0)
    full = macs.macs(spec)
    most = full - macs.macs(spec, nothing)
    if target <= most:
        return
    asked = f"target_macs_saved = {macs.readable(int(target))}"
    if saved == most:
        raise ValueError(
            f"no groups left to drop: every branch is removed already, which saves "
            f"{macs.readable(most)}; {asked}. Stop growing the list."
        )
    raise ValueError(
        f"{asked} cannot be reached: removing every branch saves at most "
        f"{macs.readable(most)} of {macs.readable(full)} MACs. Ask for a share of at "
        f"most {math.floor(1000 * most / full) / 1000}."
    )


def _tables(dropout_list: DropoutList, spec: ViTSpec) -> list[np.ndarray]:
    """The list's tables, checked against the network."""
    tables = [np.asarray(table) for table in dropout_list[:3]]
    shapes, levels = [t.shape for t in tables], int(dropout_list.levels)
    rows = len(tables[0])
    if shapes != [(rows, spec.depth)] * 3 or not 0 <= levels < rows:
        raise ValueError(
            f"a dropout list with tables of shapes {shapes} and levels = {levels} does "
            f"not fit: the tables must be (max_levels + 1, {spec.depth}), a column a "
            "block, and levels 0 to max_levels."
        )
    if dropout_list.widths(0, spec) != SubnetSpec.full(spec):
        raise ValueError(
            "level 0 of the dropout list is not this full network: start the list "
            "with growth.start(spec)."
        )
    return tables


def _append(tables: list[np.ndarray], levels: int, rows: list) -> DropoutList:
    room = len(tables[0]) - 1 - levels
    if len(rows) > room:
        raise ValueError(
            f"the dropout list has room for {room} more levels and grows by "
            f"{len(rows)}: make it with max_levels = growth.capacity(spec, groups)."
        )
    grown = []
    for index, table in enumerate(tables):
        table = np.array([*table[: levels + 1], *(row[index] for row in rows)])
        pad = room - len(rows)  # padding repeats the last row
        grown.append(np.pad(table, ((0, pad), (0, 0)), mode="edge").astype(np.int32))
    return DropoutList(*grown, levels=np.int32(levels + len(rows)))
