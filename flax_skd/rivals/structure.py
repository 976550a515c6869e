"""UVC's structure: what is cut, which branches stay, and the duals that decide it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.method import macs
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import Array, Params

KINDS = {"attn": ("qk", "vo"), "mlp": ("mlp",)}  # what shares a width


class Structure(NamedTuple):
    """`extra` of the train state. Branches in the order attention, MLP.

    Attributes:
      stage: int32 [], 0 while it is searched, 1 once it is fixed.
      cut: float32 [L, 2], the share of head dims (r) and hidden units (s) to cut.
      gates: float32 [L, 2], logits of keeping a branch (g).
      group_dual: float32 [L, 2], not negative, of what is cut being zero (p and y).
      budget_dual: float32 [], not negative, of the MACs (z).
      masks: {"qk": [L, d], "vo": [L, d], "mlp": [L, M]}, 1 for what stays; all 1 while
        it is searched.
      on: float32 [L, 2], 1 for branches that stay.
    """

    stage: Any
    cut: Any
    gates: Any
    group_dual: Any
    budget_dual: Any
    masks: Any
    on: Any


class Rates(NamedTuple):
    """Steps of the search: of `cut`, of the weights' shrinking, of both duals."""

    cut: float
    shrink: float
    group_dual: float
    budget_dual: float


def start(spec: ViTSpec, *, gate: float = 4.0) -> Structure:
    """Nothing cut, every gate likely open, duals zero."""
    pair = (spec.depth, 2)
    zeros, ones = np.zeros(pair, np.float32), np.ones(pair, np.float32)
    sizes = {"qk": spec.head_dim, "vo": spec.head_dim, "mlp": spec.mlp_dim}
    masks = {k: np.ones((spec.depth, n), np.float32) for k, n in sizes.items()}
    gates = np.full(pair, gate, np.float32)
    return Structure(np.int32(0), zeros, gates, zeros, np.float32(0), masks, ones)


def group_norms(params: Params, spec: ViTSpec) -> dict[str, Array]:
    """Squared norms of what goes with each dim of every head and each hidden unit.

    Returns:
      {"qk": [L, d], "vo": [L, d], "mlp": [L, M]}, of sum 1 over the last axis.
    """

    def of(block):
        attn, mlp = block["attn"], block["mlp"]
        square = {
            name: jnp.square(attn[name]["kernel"]).sum((0, 1))
            for name in ("query", "key", "value")
        }
        return {
            "qk": square["query"] + square["key"],
            "vo": square["value"] + jnp.square(attn["out"]["kernel"]).sum((0, 2)),
            "mlp": jnp.square(mlp["fc1"]["kernel"]).sum(0)
            + jnp.square(mlp["fc2"]["kernel"]).sum(1),
        }

    blocks = [of(params[f"block_{i}"]) for i in range(spec.depth)]
    norms = jax.tree.map(lambda *rows: jnp.stack(rows), *blocks)
    return {k: x / x.sum(-1, keepdims=True) for k, x in norms.items()}


def _ranks(norms: Array) -> Array:
    return jnp.argsort(jnp.argsort(norms, axis=-1), axis=-1)


def bottom(norms: Array, cut: Array) -> tuple[Array, Array, Array]:
    """What a cut would take: the ceil(cut n) smallest groups of every block.

    Args:
      norms: [L, n], of sum 1 over n.
      cut: [L], shares.

    Returns:
      Which groups, bool [L, n]; the sum of their norms, [L]; and what the sum rises by
      per unit of cut, [L]: n times the next smallest.
    """
    size = norms.shape[-1]
    count = jnp.ceil(cut * size)[:, None]
    ranks = _ranks(norms).astype(jnp.float32)
    taken = ranks < count
    edge = jnp.where(ranks == jnp.minimum(count, size - 1), norms, 0.0).sum(-1)
    return taken, jnp.where(taken, norms, 0.0).sum(-1), size * edge


def prices(spec: ViTSpec) -> tuple[float, np.ndarray]:
    """Shares of all MACs: of what is never cut, and of each branch of a block, [2]."""
    price, full = macs.prices(spec), macs.macs(spec)
    attn = (price.qk + price.vo) * spec.head_dim / full
    of_branch = np.array([attn, price.mlp * spec.mlp_dim / full], np.float32)
    return price.embed_and_head / full, of_branch


def expected_share(spec: ViTSpec, cut: Array, gates: Array) -> Array:
    """MACs(s, r, g) over those of the full network, gates as probabilities, []."""
    fixed, price = prices(spec)
    kept = jax.nn.sigmoid(gates) * (1 - cut)
    return fixed + jnp.einsum("lb,b->", kept, jnp.asarray(price))


def searched(
    structure: Structure,
    params: Params,
    spec: ViTSpec,
    *,
    budget: float,
    rates: Rates,
) -> tuple[Structure, dict[str, Array]]:
    """One step on cuts and duals: descent on the Lagrangian, then ascent.

    L = loss + sum_l y_l B_l(s_l) + z (MACs(s, r, g) - budget), B_l the `bottom` norm
    (Yu et al., arXiv:2203.08243); the weights' part is `shrunk`.

    Args:
      structure, params: after the optimizer's step.
      spec: of the full network.
      budget: share of the MACs.
      rates: of the steps.

    Returns:
      The structure, and which groups are to shrink, by kind as in `group_norms`.
    """
    norms = group_norms(params, spec)
    _, price = prices(spec)
    sizes = np.array([spec.head_dim, spec.mlp_dim], np.float32)

    def measured(cut):
        taken, sums, slopes = {}, [], []
        for i, kinds in enumerate(KINDS.values()):
            found = [bottom(norms[kind], cut[:, i]) for kind in kinds]
            taken |= {kind: f[0] for kind, f in zip(kinds, found, strict=True)}
            sums.append(sum(f[1] for f in found) / len(kinds))
            slopes.append(sum(f[2] for f in found) / len(kinds))
        return taken, jnp.stack(sums, 1), jnp.stack(slopes, 1)

    _, _, slope = measured(structure.cut)
    saving = jax.nn.sigmoid(structure.gates) * jnp.asarray(price)[None]
    grads = structure.group_dual * slope - structure.budget_dual * saving
    most = jnp.asarray(1 - 1 / sizes)[None]
    cut = jnp.clip(structure.cut - rates.cut * grads, 0.0, most)
    taken, norm, _ = measured(cut)
    over = expected_share(spec, cut, structure.gates) - budget
    y = structure.group_dual + rates.group_dual * norm
    z = structure.budget_dual + rates.budget_dual * over
    found = structure._replace(
        cut=cut, group_dual=jnp.maximum(y, 0.0), budget_dual=jnp.maximum(z, 0.0)
    )
    return found, taken


def shrunk(
    params: Params, structure: Structure, taken: dict[str, Array], *, rate: float
) -> Params:
    """The proximal step of y B: groups to be cut are divided by 1 + 2 rate y."""
    out = dict(params)
    for i in range(structure.cut.shape[0]):
        block, scale = params[f"block_{i}"], {}
        for j, kinds in enumerate(KINDS.values()):
            by = 1 / (1 + 2 * rate * structure.group_dual[i, j])
            scale |= {kind: jnp.where(taken[kind][i], by, 1.0) for kind in kinds}
        out[f"block_{i}"] = {
            **block,
            **per_unit(block, scale, lambda x, s, axis: x * _along(s, x.ndim, axis)),
        }
    return out


def _along(values: Array, ndim: int, axis: int) -> Array:
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def per_unit(block: Params, values: dict[str, Array], change) -> Params:
    """The two branches of a block with `change(x, value, axis)` along their units.

    Args:
      block: parameters.
      values: by kind, one number a unit.
      change: function (array, values, axis of the units) -> array.
    """
    attn, mlp = block["attn"], block["mlp"]

    def last(tree, kind):
        return jax.tree.map(lambda x: change(x, values[kind], x.ndim - 1), tree)

    out, fc2 = attn["out"], mlp["fc2"]
    return {
        "attn": {
            "query": last(attn["query"], "qk"),
            "key": last(attn["key"], "qk"),
            "value": last(attn["value"], "vo"),
            "out": {**out, "kernel": change(out["kernel"], values["vo"], 1)},
        },
        "mlp": {
            "fc1": last(mlp["fc1"], "mlp"),
            "fc2": {**fc2, "kernel": change(fc2["kernel"], values["mlp"], 0)},
        },
    }


def widths_within(structure: Structure, spec: ViTSpec, budget: float) -> SubnetSpec:
    """The widths nearest to the cuts that fit the budget, counted as extracted.

    All cuts are moved by one number, the smallest with which the network fits: the
    search meets its budget on average, this to the last dim. Branches whose gate is
    more likely closed than open go.

    Args:
      structure: of the search, on the host.
      spec: the full network.
      budget: share of its MACs.

    Raises:
      ValueError: if not even one dim a branch fits.
    """
    on = np.asarray(structure.gates) > 0
    sizes = np.array([spec.head_dim, spec.mlp_dim])
    limit = budget * macs.macs(spec)

    def moved(by):
        kept = np.floor((1 - np.clip(structure.cut + by, 0, 1)) * sizes)
        heads, units = (np.maximum(kept, 1) * on).astype(int).T
        return SubnetSpec(tuple(heads), tuple(heads), tuple(units)).check(spec)

    low, high = -1.0, 1.0
    if macs.macs(spec, moved(high)) > limit:
        raise ValueError(
            f"rival.budget = {budget:g} is less than one dim a branch takes, "
            f"{macs.macs(spec, moved(high)) / macs.macs(spec):.3f}: ask for more."
        )
    for _ in range(40):
        middle = (low + high) / 2
        fits = macs.macs(spec, moved(middle)) <= limit
        low, high = (low, middle) if fits else (middle, high)
    return moved(high)


def fixed(structure: Structure, widths: SubnetSpec, norms: Any) -> Structure:
    """The structure of these widths: in every block the groups of largest norm."""

    def mask(norm, width):
        ranks = np.argsort(np.argsort(-np.asarray(norm), axis=-1), axis=-1)
        return (ranks < np.array(width)[:, None]).astype(np.float32)

    # By name: a dict that went through jit has its keys sorted.
    of_kind = {"qk": widths.qk_dim, "vo": widths.vo_dim, "mlp": widths.mlp_dim}
    masks = {kind: mask(norms[kind], width) for kind, width in of_kind.items()}
    on = np.stack([np.array(widths.vo_dim) > 0, np.array(widths.mlp_dim) > 0], 1)
    return structure._replace(stage=np.int32(1), masks=masks, on=on.astype(np.float32))


def kept_first(params: Params, masks: dict[str, Any]) -> Params:
    """The same function with the units that stay in front, so that they are a prefix."""
    orders = {
        k: jnp.argsort(-jnp.asarray(m), axis=-1, stable=True) for k, m in masks.items()
    }
    out = dict(params)
    for i in range(orders["mlp"].shape[0]):
        block, order = params[f"block_{i}"], {k: o[i] for k, o in orders.items()}
        out[f"block_{i}"] = {**block, **per_unit(block, order, jnp.take)}
    return out
