"""What a step may drop instead of a level: the variants of the paper's ablation.

Each is a `CutOf`, so that it trains by the one step and the one loop; the dropout list
in `state.extra` says how much a step drops, and is what all of them are cut by in the
end. Nothing is scaled up for what is dropped: a sub-network has no such scale either.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from flax_skd.method import macs, piad
from flax_skd.method.growth import PAPER_GROUPS, Groups
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import ViTSpec
from flax_skd.method.vit import BlockMasks
from flax_skd.run.objective import Array, CutOf, Masks, Metrics

# Branch -> one number a unit, [L, groups].
OfUnits = dict[str, Array]


def alike(dropout_list: DropoutList, spec: ViTSpec, groups: Groups) -> OfUnits:
    """Log weights under which every unit is dropped as easily as any other."""
    del dropout_list
    ends = groups.ends(spec)
    return {name: jnp.zeros((spec.depth, len(ends[name]) - 1)) for name in ends}


def unimportant_first(
    dropout_list: DropoutList, spec: ViTSpec, groups: Groups
) -> OfUnits:
    """Log weights of being dropped that fall with importance.

    The list ranks the units: what survives more levels matters more. A unit that
    survives n of them (level 0 included) has weight 1 / n.
    """
    rows = jnp.arange(dropout_list.qk_dim.shape[0])
    live = (rows <= dropout_list.levels)[:, None, None]
    tables = {"attn": dropout_list.vo_dim, "mlp": dropout_list.mlp_dim}

    def weigh(name, ends):
        starts = jnp.array(ends[:-1], jnp.int32)[None, None]
        survives = (tables[name][..., None] > starts) & live  # [rows, L, groups]
        return -jnp.log(survives.sum(0).astype(jnp.float32))

    return {name: weigh(name, ends) for name, ends in groups.ends(spec).items()}


def random_units(
    spec: ViTSpec,
    *,
    groups: Groups = PAPER_GROUPS,
    weights: Callable[[DropoutList, ViTSpec, Groups], OfUnits] = alike,
    draw: Callable[..., Array] = piad.sample_level,
) -> CutOf:
    """Channel dropout: as many MACs as a random level saves, in units drawn at random.

    A unit is a group of head dims, of all heads together, or of hidden units, wherever
    it lies in its branch. They go in a random order while no more is saved than by the
    level. A branch without a unit adds nothing.

    Args:
      spec: the full network.
      groups: what a unit is.
      weights: log weights by which the order is drawn, without replacement.
      draw: of the level whose MACs are met.
    """
    sizes = {name: np.diff(ends) for name, ends in groups.ends(spec).items()}
    prices = _prices(spec, sizes)

    def cut_of(params, rng, batch_size, state):
        del batch_size
        level_rng, unit_rng = jax.random.split(rng)
        dropout_list = state.extra.dropout_list
        row = dropout_list.row(draw(level_rng, dropout_list))
        target = 1 - piad.macs_share(spec, row)
        flat, unflatten = ravel_pytree(weights(dropout_list, spec, groups))
        # Gumbel noise on log weights, sorted, is a draw without replacement.
        order = jnp.argsort(-flat - jax.random.gumbel(unit_rng, flat.shape))
        # Sums of the same prices in another order differ by rounding.
        gone = jnp.cumsum(prices[order]) <= target + 1e-5
        kept = jnp.ones(flat.shape).at[order].set(1 - gone.astype(jnp.float32))
        share = 1 - ((1 - kept) * prices).sum()
        return params, _masks(unflatten(kept), sizes), _metrics(dropout_list, share)

    return cut_of


def random_branches(spec: ViTSpec, *, rate: float = 0.2) -> CutOf:
    """LayerDrop (Fan, Grave and Joulin, ICLR 2020): whole branches skipped at a rate.

    Args:
      spec: the full network.
      rate: chance of each branch to be skipped in a step, in [0, 1).

    Raises:
      ValueError: if the rate is out of range.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"branch_rate = {rate} must be in [0, 1).")
    whole = {"attn": np.array([spec.head_dim]), "mlp": np.array([spec.mlp_dim])}
    prices = _prices(spec, whole)

    def cut_of(params, rng, batch_size, state):
        del batch_size
        on = jax.random.bernoulli(rng, 1 - rate, prices.shape).astype(jnp.float32)
        share = 1 - ((1 - on) * prices).sum()
        attn, mlp = on.reshape(2, spec.depth)
        masks = tuple(BlockMasks(attn_gate=a, mlp_gate=m) for a, m in zip(attn, mlp))
        return params, masks, _metrics(state.extra.dropout_list, share)

    return cut_of


def _prices(spec: ViTSpec, sizes: dict[str, np.ndarray]) -> Array:
    """Shares of all MACs of the units, attention of every block first, flat."""
    price, full = macs.prices(spec), macs.macs(spec)
    of_dim = {"attn": (price.qk + price.vo) / full, "mlp": price.mlp / full}
    each = [np.tile(of_dim[name] * sizes[name], spec.depth) for name in sizes]
    return jnp.array(np.concatenate(each), jnp.float32)


def _metrics(dropout_list: DropoutList, share: Array) -> Metrics:
    return {"levels": dropout_list.levels.astype(jnp.float32), "macs_share": share}


def _masks(kept: OfUnits, sizes: dict[str, np.ndarray]) -> Masks:
    """Masks of units kept (1) or not (0)."""
    dims = {
        name: jnp.repeat(kept[name], sizes[name], 1, total_repeat_length=total)
        for name, total in ((n, int(s.sum())) for n, s in sizes.items())
    }
    on = {name: units.max(1) for name, units in kept.items()}
    blocks = zip(dims["attn"], dims["mlp"], on["attn"], on["mlp"], strict=True)
    return tuple(BlockMasks(attn, attn, mlp, *gates) for attn, mlp, *gates in blocks)


# What a step of PIAD drops instead of a level, by its name in a config.
MASKS: dict[str, Callable[..., CutOf]] = {
    "random_units": lambda spec, *, groups, draw, rate: random_units(
        spec, groups=groups, draw=draw
    ),
    "weighted_units": lambda spec, *, groups, draw, rate: random_units(
        spec, groups=groups, draw=draw, weights=unimportant_first
    ),
    "branches": lambda spec, *, groups, draw, rate: random_branches(spec, rate=rate),
}
