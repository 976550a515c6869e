"""Second moments of what is cut: queries, keys, head outputs and hidden units.

Sums of the pass of `statistics`, taken where both a feature and the gradient of what it
leads to are at hand: of q and k in one head each, of all head outputs and of all hidden
units of a branch together, with the gradient at the branch's output.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_skd.method.layers import times
from flax_skd.method.observed import observed
from flax_skd.method.spec import ViTSpec
from flax_skd.method.vit import Array, BlockMasks, Taps

ATTENDED = "attended"  # asks for `BlockMoments.key_attended`; not a weighting
# Output of a branch: (its field of BlockMoments, the tap of its inner units).
BRANCHES = {"attn_out": ("attn", "mixed"), "mlp_out": ("mlp", "hidden")}
INNER = dict(BRANCHES.values())
_ROUNDING = 1e-5  # of float32 sums, relative


class TokenWeights(NamedTuple):
    """Weights of tokens, before padding is taken out.

    Attributes:
      own: function (f, g) -> weights without the last axis, g = dC/df.
      output: function g -> weights without the last axis, g = dC/d(branch output).
    """

    own: Callable[[Array, Array], Array]
    output: Callable[[Array], Array]


WEIGHTINGS: dict[str, TokenWeights] = {
    "gradient": TokenWeights(
        lambda f, g: jnp.abs(f * g).mean(-1), lambda g: jnp.linalg.norm(g, axis=-1)
    ),
    "plain": TokenWeights(
        lambda f, g: jnp.ones(f.shape[:-1]), lambda g: jnp.ones(g.shape[:-1])
    ),
}


class BranchMoments(NamedTuple):
    """Sums over tokens t of the n inner units f of a branch, about the pilot mean p.

    n = H d for attention (z of all heads, index h * d + e), n = M for hidden units.

    Attributes:
      weight: sum of w, [].
      first: sum of w (f - p), [n].
      second: sum of w (f - p)^T (f - p), [n, n].
    """

    weight: Array
    first: Array
    second: Array


class BlockMoments(NamedTuple):
    """Second moments of one block under one token weighting.

    Attributes:
      query: sum of w q^T q, not centred, [H, d, d].
      key: sum of w (k - kbar)^T (k - kbar), [H, d, d], kbar the plain mean over the
        tokens of the same image and head.
      key_attended: sum over queries i of sum_j a_ij k_j^T k_j - kbar_i^T kbar_i,
        [H, d, d], a the attention and kbar_i = sum_j a_ij k_j; no weights. Zero unless
        asked for.
      gram: sum of g^T g, [D, D], g = dC/d(output of attention); no weights.
      attn, mlp: of the branches.
    """

    query: Array
    key: Array
    key_attended: Array
    gram: Array
    attn: BranchMoments
    mlp: BranchMoments


def checked(moments: tuple[str, ...]) -> tuple[str, ...]:
    """The weightings among `moments`.

    Raises:
      ValueError: if a name is unknown, or `ATTENDED` stands without a weighting.
    """
    names = tuple(dict.fromkeys(name for name in moments if name != ATTENDED))
    if not set(names) <= set(WEIGHTINGS) or (moments and not names):
        raise ValueError(
            f"moments {moments!r}: name token weightings of "
            f"{tuple(WEIGHTINGS)}, and {ATTENDED!r} beside them for attended keys."
        )
    return names


def zeros(spec: ViTSpec, moments: tuple[str, ...]) -> dict[str, BlockMoments]:
    """Accumulators of one block, by weighting; nothing if `moments` is empty."""

    def branch(size):
        return BranchMoments(*map(jnp.zeros, ((), (size,), (size, size))))

    heads = (spec.num_heads, spec.head_dim, spec.head_dim)
    return {
        name: BlockMoments(
            *map(jnp.zeros, (heads, heads, heads, (spec.width, spec.width))),
            branch(spec.num_heads * spec.head_dim),
            branch(spec.mlp_dim),
        )
        for name in checked(moments)
    }


def taps(
    spec: ViTSpec,
    accumulators: tuple[dict[str, BlockMoments], ...],
    pilot: tuple[dict[str, Array], ...],
    live: Array,
    moments: tuple[str, ...],
    *,
    masks: tuple[BlockMasks, ...] | None = None,
    hidden_every: int = 1,
) -> Taps:
    """A tap that leaves features as they are and sums them as the gradient comes back.

    The sums are the cotangents of `accumulators`.

    Args:
      spec: sizes of the network.
      accumulators: of `zeros`, one a block.
      pilot: of `statistics.pilot_means`, with or without `pilots.weighted`.
      live: [B], 0 for padding.
      moments: as given to `zeros`.
      masks: of the sub-network, whose queries are those that attend; None for all.
      hidden_every: the sums of hidden units are those of images 0, k, 2 k, ...
    """
    every = {"mlp_out": hidden_every, "attn_out": 1}
    before = {}  # features of this block, which a later tap of it reads

    def tap(block, name, feature):
        before[name] = feature
        fields: tuple[str, ...] = ()
        seen: dict[str, Any] = {"live": live}
        sums_of: Callable[..., Any] = _head_sums
        if name == "query":
            fields = ("query",)
        elif name == "key":
            fields, sums_of = ("key", "key_attended"), _key_sums
            if ATTENDED in moments:
                queries = times(before["query"], masks[block].qk if masks else None)
                seen["query"] = queries * spec.head_dim**-0.5
        elif name in BRANCHES:
            branch, inner = BRANCHES[name]
            fields = (branch, "gram") if branch == "attn" else (branch,)
            sums_of = functools.partial(_branch_sums, every=every[name])
            points, plain = pilot[block], pilot[block][inner]
            points = {w: points.get(f"{inner} {w}", plain) for w in accumulators[block]}
            seen |= {"inner": before[inner], "pilot": points}
        if not fields:
            return feature
        chosen = {
            weighting: tuple(getattr(sums, field) for field in fields)
            for weighting, sums in accumulators[block].items()
        }
        return observed(sums_of, feature, seen, chosen)

    return tap


def _outer(left: Array, right: Array) -> Array:
    """Sums of left^T right over images and tokens, a matrix a head."""
    return jnp.einsum("bhnd,bhne->hde", left, right, precision="highest")


def _head_sums(feature, gradient, seen, names, centre=lambda f: f):
    f, g = feature.astype(jnp.float32), gradient.astype(jnp.float32)
    centred, sums = centre(f), {}
    for name in names:
        weight = WEIGHTINGS[name].own(f, g) * seen["live"].reshape(-1, 1, 1)
        sums[name] = (_outer(weight[..., None] * centred, centred),)
    return sums


def _key_sums(feature, gradient, seen, names):
    def centre(f):
        return f - f.mean(2, keepdims=True)

    sums = _head_sums(feature, gradient, seen, names, centre)
    keys = centre(feature.astype(jnp.float32))
    attended = jnp.zeros((keys.shape[1], *2 * keys.shape[-1:]))
    if "query" in seen:
        attended = _attended(seen["query"].astype(jnp.float32), keys, seen["live"])
    return {name: (*own, attended) for name, own in sums.items()}


def _attended(queries: Array, keys: Array, live: Array) -> Array:
    """Covariances of keys under each query's attention, summed over queries."""
    # Softmax and covariance alike do not see that the keys were centred.
    scores = jnp.einsum("bhid,bhjd->bhij", queries, keys, precision="highest")
    attention = jax.nn.softmax(scores) * live.reshape(-1, 1, 1, 1)
    means = jnp.einsum("bhij,bhjd->bhid", attention, keys, precision="highest")
    weighted = attention.sum(2)[..., None] * keys
    return _outer(weighted, keys) - _outer(means, means)


def _branch_sums(output, gradient, seen, names, *, every):
    del output
    f, g = seen["inner"][::every], gradient[::every]
    f, g = f.astype(jnp.float32), g.astype(jnp.float32)
    if f.ndim == 4:  # [B, H, N, d]
        f = f.swapaxes(1, 2).reshape(*g.shape[:2], -1)
    product = functools.partial(jnp.einsum, "bnc,bne->ce", precision="highest")
    sums = {}
    for name, zeros in names.items():
        centred = f - seen["pilot"][name].reshape(1, 1, -1)
        weight = WEIGHTINGS[name].output(g) * seen["live"][::every].reshape(-1, 1)
        weighted = weight[..., None] * centred
        second = product(weighted, centred)
        moments = BranchMoments(weight.sum(), weighted.sum((0, 1)), second)
        sums[name] = (moments, product(g, g)) if len(zeros) == 2 else (moments,)
    return sums


def mean(moments: BranchMoments, pilot: Array) -> Array:
    """Weighted mean of the inner units, [n]; the pilot mean if all weights are zero."""
    return pilot.reshape(-1) + moments.first / _positive(moments.weight)


def covariance(moments: BranchMoments) -> Array:
    """Covariance [n, n] about the weighted mean, over the sum of weights.

    Zero for a unit of which nothing but rounding is left, as of every unit where one
    token alone has weight: noise would be no covariance, or predict.
    """
    weight = _positive(moments.weight)
    first, second = moments.first / weight, moments.second / weight
    found = second - first[:, None] * first[None]
    varies = found.diagonal() > _ROUNDING * second.diagonal()
    return jnp.where(varies[:, None] & varies[None], found, 0.0)


def _positive(weight: Array) -> Array:
    return jnp.where(weight > 0, weight, 1.0)


def of_block(
    branches: tuple[dict[str, BlockMoments], ...], block: int, weighting: str
) -> BlockMoments:
    """The moments of a block; ValueError if the pass did not collect this weighting."""
    held = branches[block] if branches else {}
    if weighting not in held:
        raise ValueError(
            f"the statistics hold no {weighting!r} second moments, only "
            f"{sorted(held)}: collect them with moments=({weighting!r},)."
        )
    return held[weighting]


def of_branch(
    branches: tuple[dict[str, BlockMoments], ...],
    block: int,
    branch: str,
    weighting: str,
) -> BranchMoments:
    """The moments of the "attn" or "mlp" branch of a block; errors as of `of_block`."""
    if branch not in INNER:
        raise ValueError(f"branch {branch!r}: choose 'attn' or 'mlp'.")
    return getattr(of_block(branches, block, weighting), branch)
