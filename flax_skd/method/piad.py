"""Dropout lists: nested sub-networks as rows of a table, and budgets into it."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.method import macs
from flax_skd.method.spec import SubnetSpec, ViTSpec, whole


class DropoutList(NamedTuple):
    """Levels of a super-network: row 0 is full, every row a prefix of the one before.

    A pytree of arrays, so that a level is a traced index and a growing list never
    recompiles what reads it.

    Attributes:
      qk_dim, vo_dim, mlp_dim: int32 [max_levels + 1, L], rows past `levels` repeat it.
      levels: int32 [], the last valid row.
    """

    qk_dim: Any
    vo_dim: Any
    mlp_dim: Any
    levels: Any

    def row(self, level: Any) -> SubnetSpec:
        """The widths at a level or levels (traced), as integer arrays [..., L]."""
        return SubnetSpec(*(jnp.asarray(table)[level] for table in self[:3]))

    def widths(self, level: int, spec: ViTSpec) -> SubnetSpec:
        """The widths at a level as static tuples.

        Raises:
          ValueError: if there is no such level, or it is no whole number.
        """
        level = whole("level", level)
        if not 0 <= level <= int(self.levels):
            raise ValueError(
                f"level {level} does not exist: choose 0 (full) to {int(self.levels)}."
            )
        return SubnetSpec(*(np.asarray(table)[level] for table in self[:3])).check(spec)

    def all_widths(self, spec: ViTSpec) -> list[SubnetSpec]:
        """The `widths` of every level, 0 first; `from_rows` makes a list of them again."""
        return [self.widths(level, spec) for level in range(int(self.levels) + 1)]


def from_rows(rows: list[SubnetSpec], spec: ViTSpec, *, max_levels: int = 0):
    """A list from its rows, checked.

    Args:
      rows: widths of level 0, 1, ...
      spec: the full network.
      max_levels: room for later growth; at least `len(rows) - 1` is taken.

    Returns:
      A `DropoutList` of numpy arrays.

    Raises:
      ValueError: if row 0 is not the full network or a row grows again.
    """
    if not rows:
        raise ValueError("a dropout list needs its level 0, the full network.")
    tables = [
        np.array(field, np.int32) for field in zip(*(r.check(spec) for r in rows))
    ]
    if rows[0].check(spec) != SubnetSpec.full(spec):
        raise ValueError("level 0 of a dropout list must be the full network.")
    for name, table in zip(SubnetSpec._fields, tables):
        grown = np.argwhere(np.diff(table, axis=0) > 0)
        if grown.size:
            level, block = grown[0]
            raise ValueError(
                f"{name} grows from level {level} to {level + 1} in block {block}: "
                "a dropout list only cuts."
            )
    pad = max(0, max_levels + 1 - len(rows))
    tables = [np.pad(t, ((0, pad), (0, 0)), mode="edge") for t in tables]
    return DropoutList(*tables, levels=np.int32(len(rows) - 1))


def narrowed(
    widths: SubnetSpec, block: int, fields: Sequence[str], width: int
) -> SubnetSpec:
    """`widths` with some fields of one block at most `width`."""
    changed = {name: list(getattr(widths, name)) for name in fields}
    for sizes in changed.values():
        sizes[block] = min(sizes[block], width)
    return widths._replace(**{name: tuple(s) for name, s in changed.items()})


def uniform(spec: ViTSpec, *, steps: int = 32) -> DropoutList:
    """All blocks alike: level s keeps (steps - s) / steps of every branch.

    The MACs of blocks are linear in the widths, so this is also the share of the block
    MACs that is left, up to rounding to whole dims. No branch goes below one dim.

    Args:
      spec: the full network.
      steps: how many levels, the full network included.

    Returns:
      A `DropoutList` of numpy arrays.

    Raises:
      ValueError: if `steps` is below 1.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps} must be at least 1.")

    def keep(size, share):
        return max(1, round(size * share))

    rows = []
    for s in range(steps):
        share = (steps - s) / steps
        head = keep(spec.head_dim, share)
        rows.append(
            SubnetSpec.uniform(spec, head, head, keep(spec.mlp_dim, share)),
        )
    return from_rows(rows, spec)


def sample_level(rng: jax.Array, dropout_list: DropoutList, shape=()) -> jax.Array:
    """Levels drawn uniformly over 0..levels, the smallest network included."""
    # The authors' program never draws the smallest level (off by one).
    return jax.random.randint(rng, shape, 0, dropout_list.levels + 1)


def macs_share(spec: ViTSpec, widths: SubnetSpec) -> jax.Array:
    """MACs of traced widths over those of the full network, full count, float32.

    Args:
      spec: the full network.
      widths: integer arrays [..., L].

    Returns:
      [...]; for logs and for drawing, the exact count is `macs.macs`.
    """
    price, full = macs.prices(spec), macs.macs(spec)
    share = jnp.float32(price.embed_and_head / full)
    for field, each in zip(widths, (price.qk, price.vo, price.mlp)):
        share = share + field.sum(-1).astype(jnp.float32) * (each / full)
    return share


def sample_level_by_macs(
    rng: jax.Array, dropout_list: DropoutList, shape=(), *, spec: ViTSpec
) -> jax.Array:
    """Levels drawn so that their MACs are uniform between smallest and full.

    A list has many levels where importance is low; this spends the steps evenly over
    sizes instead. `functools.partial(sample_level_by_macs, spec=spec)` is a `draw`.
    """
    rows = jnp.arange(dropout_list.qk_dim.shape[0])
    shares = macs_share(spec, dropout_list.row(rows))  # falls; padding repeats the last
    wanted = jax.random.uniform(rng, shape, minval=shares[-1], maxval=shares[0])
    # The nearest level: count the midpoints between neighbours that lie above.
    middle = (shares[1:] + shares[:-1]) / 2
    above = middle.reshape((1,) * len(shape) + (-1,)) > wanted[..., None]
    return jnp.minimum(above.sum(-1), dropout_list.levels).astype(jnp.int32)


def level_for(
    dropout_list: DropoutList,
    spec: ViTSpec,
    limit: float,
    *,
    cost: Callable[[ViTSpec, SubnetSpec], float] = macs.macs,
) -> int:
    """The largest sub-network of the list that fits a budget.

    Args:
      dropout_list: the levels to choose from.
      spec: the full network.
      limit: the most that `cost` may be.
      cost: function of (spec, widths): `macs.macs`, `macs.param_count` or your own;
        it must not rise with the level.

    Returns:
      The first level whose cost is at most `limit`.

    Raises:
      ValueError: if no level fits, the message says what the smallest costs; or the
        limit is nan, or the list is of another network.
    """
    if math.isnan(limit):
        raise ValueError("a budget of nan: give a number.")
    smallest = 0.0
    for level in range(int(dropout_list.levels) + 1):
        smallest = cost(spec, dropout_list.widths(level, spec))
        if smallest <= limit:
            return level
    raise ValueError(
        f"no level reaches a budget of {_readable(limit)}: the smallest "
        f"sub-network (level {int(dropout_list.levels)}) costs "
        f"{macs.readable(smallest)} ({smallest:,}). Ask for at least that, or make a "
        "list that goes further down."
    )


def level_within(
    dropout_list: DropoutList,
    spec: ViTSpec,
    budget: float,
    *,
    cost: Callable[[ViTSpec, SubnetSpec], float] = macs.macs,
) -> int:
    """`level_for` of a count or, at most 1, of a share of the full network's.

    A level's own share, a quotient of two counts, finds that level: what the division
    rounded off is given back.
    """
    if budget <= 1:
        budget = budget * cost(spec, SubnetSpec.full(spec)) * (1 + 1e-14)
    return level_for(dropout_list, spec, budget, cost=cost)


def _readable(limit: float) -> str:
    return macs.readable(int(limit)) if limit >= 1 else f"{limit:g}"
