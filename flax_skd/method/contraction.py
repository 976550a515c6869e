"""Rotations and unit orders from statistics, injected without changing the function.

Every criterion has one signature, (block, statistics, index, rng) -> axes and unit
order of `Basis`, so that tables compare them. `wpac` is the method of Li et al., AAAI
2026; `balanced` takes any invertible pair; the others are the plain criteria they are
measured against.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.method import balance
from flax_skd.method.pass_checks import check_gradients
from flax_skd.method.spec import ViTSpec
from flax_skd.method.statistics import Statistics
from flax_skd.method.vit import Array, Params


class Basis(NamedTuple):
    """A change of coordinates of one block, what matters first.

    Attributes:
      query, key: [H, d, d], columns are the new dims; query @ key^T = I.
      value: [H, d, d], columns are the new dims of values.
      out: [H, d, d], its rows are the new rows of `out`; value @ out = I.
      units: permutation [M] of the hidden units.
    """

    query: Array
    key: Array
    value: Array
    out: Array
    units: Array


Axes = tuple[Array, Array, Array, Array]


def orthogonal(qk: Array, vo: Array) -> Axes:
    """The axes of `Basis` of orthogonal [H, d, d], each its own inverse transposed."""
    return qk, qk, vo, vo.swapaxes(1, 2)


@jax.jit
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
    return jax.nn.one_hot(_order(scores), scores.shape[-1], axis=1, dtype=jnp.float32)


def _pca(weighting: str):
    def axes(block, statistics, index, rng):
        del block, rng
        query, key, value = (
            statistics.covariance(index, site, weighting)
            for site in ("query", "key", "value")
        )
        return orthogonal(principal_axes(query + key), principal_axes(value))

    return axes


def _taylor(name: str):
    def axes(block, statistics, index, rng):
        del block, rng
        score = {s: getattr(v, name) for s, v in statistics.sums[index].items()}
        qk = _permutation(score["query"] + score["key"])
        return orthogonal(qk, _permutation(score["value"]))

    return axes


def _magnitude(block, statistics, index, rng):
    del statistics, index, rng
    query, key, value = (
        jnp.square(block["attn"][name]["kernel"]).sum(0)
        for name in ("query", "key", "value")
    )
    return orthogonal(_permutation(query + key), _permutation(value))


def _random(block, statistics, index, rng):
    del statistics, index
    shape = block["attn"]["query"]["kernel"].shape[1:]
    qk, vo = (_permutation(jax.random.uniform(key, shape)) for key in rng[:2])
    return orthogonal(qk, vo)


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
      axes: function of (block, statistics, index, rng) -> the first four of `Basis`.
      units: the key of `UNIT_ORDERS` it takes unless told otherwise.
      weightings, moments: what `statistics.collect` has to be asked for.
      gradients: whether the axes depend on gradients.
    """

    axes: Callable[..., Axes]
    units: str
    weightings: tuple[str, ...] = ()
    moments: tuple[str, ...] = ()
    gradients: bool = True


def balanced_criterion(options: balance.Balanced) -> Criterion:
    """Balanced pairs (`balance`); a part that is not balanced takes WPAC's rotation.

    Raises:
      ValueError: if an option is unknown.
    """
    parts = options.check().parts
    both = len(set(parts)) == 2

    def axes(block, statistics, index, rng):
        query = key = value = out = None
        if not both:
            query, key, value, out = _pca("gradient")(block, statistics, index, rng)
        if "qk" in parts:
            query, key = balance.query_key(statistics, index, options)
        if "vo" in parts:
            value, out = balance.value_out(block, statistics, index, options)
        return tuple(map(jnp.asarray, (query, key, value, out)))

    reads = "gradient" in (*options.moments(), options.metric) or not both
    weightings = () if both else ("gradient",)
    return Criterion(axes, "taylor2", weightings, options.moments(), reads)


# The authors' program orders hidden units by sum (g h)^2 / 2, the paper's text by
# sum |g h|; `units="taylor1"` gives the latter.
CRITERIA: dict[str, Criterion] = {
    "wpac": Criterion(_pca("gradient"), "taylor2", ("gradient",)),
    "pca": Criterion(_pca("plain"), "taylor2", ("plain",), gradients=False),
    "taylor1": Criterion(_taylor("taylor1"), "taylor1"),
    "taylor2": Criterion(_taylor("taylor2"), "taylor2"),
    "magnitude": Criterion(_magnitude, "magnitude", gradients=False),
    "random": Criterion(_random, "random", gradients=False),
    "balanced": balanced_criterion(balance.Balanced()),
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
    criterion: str | Criterion = "wpac",
    units: str | tuple[Array, ...] | None = None,
    seed: int = 0,
) -> tuple[Basis, ...]:
    """The change of coordinates of every block under a criterion, one `Basis` each.

    Args and errors: as of `contract`, which changes the network by them.
    """
    chosen = criterion_named(criterion) if isinstance(criterion, str) else criterion
    units = _checked_units(chosen.units if units is None else units, spec)
    named = isinstance(units, str)
    if chosen.gradients or (named and units.startswith("taylor")):
        check_gradients(statistics)
    out = []
    for i in range(spec.depth):
        rng = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), 3)
        args = (params[f"block_{i}"], statistics, i, rng)
        order = _order(UNIT_ORDERS[units](*args)) if named else units[i]
        out.append(Basis(*chosen.axes(*args), jnp.asarray(order, jnp.int32)))
    return tuple(out)


def _checked_units(units: str | tuple[Array, ...], spec: ViTSpec):
    if isinstance(units, str):
        if units not in UNIT_ORDERS:
            raise ValueError(f"unit order {units!r}: choose one of {[*UNIT_ORDERS]}.")
        return units
    if len(units) != spec.depth:
        raise ValueError(f"unit orders of {len(units)} blocks, not of {spec.depth}.")
    for i, order in enumerate(units):
        if not np.array_equal(np.sort(order), np.arange(spec.mlp_dim)):
            raise ValueError(
                f"the unit order of block {i} is no permutation of 0 to "
                f"{spec.mlp_dim - 1}: give each hidden unit once."
            )
    return units


def inject(params: Params, changes: tuple[Basis, ...]) -> Params:
    """Rewrites every block in new coordinates; the function stays the same.

    W_q <- W_q query; W_k <- W_k key; W_v <- W_v value; W_o <- out W_o; biases with
    their kernels; hidden units permuted.
    """
    new = dict(params)
    for i, basis in enumerate(changes):
        new[f"block_{i}"] = _inject_block(params[f"block_{i}"], basis)
    return new


@jax.jit  # blocks are alike: one compilation serves all of them
def _inject_block(block: Params, basis: Basis) -> Params:
    def rotate(linear, rotation):
        turned = {"kernel": _einsum("dhe,hef->dhf", linear["kernel"], rotation)}
        if "bias" in linear:
            turned["bias"] = _einsum("he,hef->hf", linear["bias"], rotation)
        return turned

    attn, mlp = block["attn"], block["mlp"]
    out = _einsum("hed,hfe->hfd", attn["out"]["kernel"], basis.out)
    return {
        **block,
        "attn": {
            "query": rotate(attn["query"], basis.query),
            "key": rotate(attn["key"], basis.key),
            "value": rotate(attn["value"], basis.value),
            "out": {**attn["out"], "kernel": out},
        },
        "mlp": {
            "fc1": jax.tree.map(lambda x: x[..., basis.units], mlp["fc1"]),
            "fc2": {**mlp["fc2"], "kernel": mlp["fc2"]["kernel"][basis.units]},
        },
    }


def _einsum(equation: str, kernel: Array, rotation: Array) -> Array:
    wide = kernel.astype(jnp.float32)
    turned = jnp.einsum(equation, wide, rotation, precision="highest")
    return turned.astype(kernel.dtype)


def contract(
    params: Params,
    spec: ViTSpec,
    statistics: Statistics,
    *,
    criterion: str | Criterion = "wpac",
    units: str | tuple[Array, ...] | None = None,
    seed: int = 0,
) -> Params:
    """A network with the same logits whose prefixes are good: `inject` of `bases`.

    Args:
      params: of the full network the statistics were collected on.
      spec: its sizes.
      statistics: of `collect`, with `weightings` and `moments` as of `CRITERIA[name]`.
      criterion: `wpac`, `balanced` or another key of `CRITERIA`, or a `Criterion`.
      units: a key of `UNIT_ORDERS`, or permutations [M], one a block; None for the
        criterion's own.
      seed: of the random criterion.

    Returns:
      A tree of the shapes and dtypes of `params`.

    Raises:
      ValueError: if a name is unknown, an order is no permutation of a block's units,
        a moment was not collected, or no gradient reached the network that needs one.
    """
    options = {"criterion": criterion, "units": units, "seed": seed}
    return inject(params, bases(params, spec, statistics, **options))
