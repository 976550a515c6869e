"""Rotations and unit orders from statistics, injected without changing the function.

Every criterion has one signature, (block, statistics, index, rng) -> `Basis`, so that
tables compare them. `wpac` is the method of Li et al., AAAI 2026; the others are the
plain criteria it is measured against.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flax_skd.method.spec import ViTSpec
from flax_skd.method.statistics import HIGHEST, Statistics
from flax_skd.method.vit import Array, Params


class Basis(NamedTuple):
    """A change of coordinates of one block, what matters first.

    Attributes:
      qk: orthogonal [H, d, d], columns are the new dims of queries and keys.
      vo: orthogonal [H, d, d], of values and the rows of `out`.
      units: permutation [M] of the hidden units.
    """

    qk: Array
    vo: Array
    units: Array


def principal_axes(covariance: Array) -> Array:
    """Eigenvectors of symmetric matrices, eigenvalues falling.

    Args:
      covariance: [H, d, d].

    Returns:
      [H, d, d], eigenvectors in columns. Signs are fixed (the largest entry of a column
      is positive), so that results repeat.
    """
    _, vectors = jnp.linalg.eigh(covariance)
    vectors = vectors[..., ::-1]
    largest = jnp.argmax(jnp.abs(vectors), axis=1, keepdims=True)
    return vectors * jnp.sign(jnp.take_along_axis(vectors, largest, axis=1))


def _order(scores: Array) -> Array:
    """Indices by falling score; equal scores keep their order."""
    return jnp.argsort(-scores, axis=-1, stable=True)


def _permutation(scores: Array) -> Array:
    """Permutation matrices [H, d, d] that sort dims by falling score [H, d]."""
    order = _order(scores)
    return jax.nn.one_hot(order, scores.shape[-1], axis=1, dtype=jnp.float32)


def _pca(weighting: str):
    def axes(block, statistics, index, rng):
        del block, rng
        query, key, value = (
            statistics.covariance(index, site, weighting)
            for site in ("query", "key", "value")
        )
        return principal_axes(query + key), principal_axes(value)

    return axes


def _taylor(name: str):
    def axes(block, statistics, index, rng):
        del block, rng
        score = {s: getattr(v, name) for s, v in statistics.sums[index].items()}
        qk = _permutation(score["query"] + score["key"])
        return qk, _permutation(score["value"])

    return axes


def _magnitude(block, statistics, index, rng):
    del statistics, index, rng
    query, key, value = (
        jnp.square(block["attn"][name]["kernel"]).sum(0)
        for name in ("query", "key", "value")
    )
    return _permutation(query + key), _permutation(value)


def _random(block, statistics, index, rng):
    del statistics, index
    shape = block["attn"]["query"]["kernel"].shape[1:]
    return tuple(_permutation(jax.random.uniform(key, shape)) for key in rng[:2])


UNIT_ORDERS: dict[str, Callable[..., Array]] = {
    "taylor1": lambda block, stats, i, rng: stats.sums[i]["hidden"].taylor1[0],
    "taylor2": lambda block, stats, i, rng: stats.sums[i]["hidden"].taylor2[0],
    "magnitude": lambda block, stats, i, rng: jnp.square(
        block["mlp"]["fc1"]["kernel"]
    ).sum(0),
    "random": lambda block, stats, i, rng: jax.random.uniform(
        rng[2], block["mlp"]["fc1"]["kernel"].shape[-1:]
    ),
}


class Criterion(NamedTuple):
    """How to order a block, and what to collect for it.

    Attributes:
      axes: function of (block, statistics, index, rng) -> (qk, vo) of `Basis`.
      units: the key of `UNIT_ORDERS` it takes unless told otherwise.
      weightings: second moments its statistics need.
    """

    axes: Callable[..., tuple[Array, Array]]
    units: str
    weightings: tuple[str, ...] = ()


# The authors' program orders hidden units by sum (g h)^2 / 2, the paper's text by
# sum |g h|; `units="taylor1"` gives the latter.
CRITERIA: dict[str, Criterion] = {
    "wpac": Criterion(_pca("taylor"), "taylor2", ("taylor",)),
    "pca": Criterion(_pca("plain"), "taylor2", ("plain",)),
    "taylor1": Criterion(_taylor("taylor1"), "taylor1"),
    "taylor2": Criterion(_taylor("taylor2"), "taylor2"),
    "magnitude": Criterion(_magnitude, "magnitude"),
    "random": Criterion(_random, "random"),
}


def criterion_named(name: str) -> Criterion:
    """Looks a criterion up; an unknown name is an error that lists the known ones."""
    if name not in CRITERIA:
        raise ValueError(f"criterion {name!r}: choose one of {', '.join(CRITERIA)}.")
    return CRITERIA[name]


def bases(
    params: Params,
    spec: ViTSpec,
    statistics: Statistics,
    *,
    criterion: str = "wpac",
    units: str | None = None,
    seed: int = 0,
) -> tuple[Basis, ...]:
    """The change of coordinates of every block under a criterion.

    Args:
      params: of the full network the statistics were collected on.
      spec: its sizes.
      statistics: of `statistics.collect`, with the criterion's weightings.
      criterion: a key of `CRITERIA`.
      units: a key of `UNIT_ORDERS`; None for the criterion's own.
      seed: of the random criterion.

    Raises:
      ValueError: if a name is unknown, or a moment was not collected.
    """
    chosen = criterion_named(criterion)
    units = units or chosen.units
    if units not in UNIT_ORDERS:
        raise ValueError(f"unit order {units!r}: choose one of {tuple(UNIT_ORDERS)}.")
    out = []
    for i in range(spec.depth):
        rng = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), 3)
        args = (params[f"block_{i}"], statistics, i, rng)
        out.append(Basis(*chosen.axes(*args), _order(UNIT_ORDERS[units](*args))))
    return tuple(out)


def inject(params: Params, changes: tuple[Basis, ...]) -> Params:
    """Rewrites every block in new coordinates; the function stays the same.

    W_q, W_k <- (.) R_qk; W_v <- W_v R_vo; W_o <- R_vo^T W_o; hidden units permuted.
    """
    new = dict(params)
    for i, basis in enumerate(changes):
        new[f"block_{i}"] = _inject_block(params[f"block_{i}"], basis)
    return new


def _inject_block(block: Params, basis: Basis) -> Params:
    def rotate(linear, rotation):
        turned = {"kernel": _einsum("dhe,hef->dhf", linear["kernel"], rotation)}
        if "bias" in linear:
            turned["bias"] = _einsum("he,hef->hf", linear["bias"], rotation)
        return turned

    attn, mlp = block["attn"], block["mlp"]
    out = _einsum("hed,hef->hfd", attn["out"]["kernel"], basis.vo)
    return {
        **block,
        "attn": {
            "query": rotate(attn["query"], basis.qk),
            "key": rotate(attn["key"], basis.qk),
            "value": rotate(attn["value"], basis.vo),
            "out": {**attn["out"], "kernel": out},
        },
        "mlp": {
            "fc1": jax.tree.map(lambda x: x[..., basis.units], mlp["fc1"]),
            "fc2": {**mlp["fc2"], "kernel": mlp["fc2"]["kernel"][basis.units]},
        },
    }


def _einsum(equation: str, kernel: Array, rotation: Array) -> Array:
    product = jnp.einsum(
        equation,
        kernel.astype(jnp.float32),
        rotation,
        precision=HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return product.astype(kernel.dtype)


def contract(
    params: Params,
    spec: ViTSpec,
    statistics: Statistics,
    *,
    criterion: str = "wpac",
    units: str | None = None,
    seed: int = 0,
) -> Params:
    """`inject` of `bases`: a network with the same logits whose prefixes are good.

    Args and errors: as in `bases`.
    """
    changes = bases(
        params, spec, statistics, criterion=criterion, units=units, seed=seed
    )
    return jax.jit(inject)(params, changes)
