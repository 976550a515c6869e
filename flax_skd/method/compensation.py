"""Means and Cholesky factors that repair a cut, nested in the cut.

What is cut still had a mean, and what is kept can predict the rest of it: a closed form
without training, one factor of a branch for all its cuts (docs/method.md). `repaired`
returns full-shaped parameters, so that `ViT.apply(repaired, masks)` and
`subnet.extract(repaired, widths)` are one function, in logits and in gradients.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.method import moments, refit
from flax_skd.method.moments import Moment
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import Array, Params

_LAST = {"attn": "out", "mlp": "fc2"}  # the linear map whose rows are cut


class Repair(NamedTuple):
    """What is known of a branch's n inner units, in their order of cutting.

    Attributes:
      mean: [n].
      factor: [n, n], lower-triangular Lc with Lc Lc^T = S, the centred covariance;
        None to fold means only.
    """

    mean: Array
    factor: Array | None


class Compensation(NamedTuple):
    """One `Repair` a block for each kind of branch.

    Attributes:
      attn: of head outputs z, n = H d, in the order dim 1 of every head, dim 2 of every
        head, ...: index e * H + h.
      mlp: of hidden units after the nonlinearity, n = M.
    """

    attn: tuple[Repair, ...]
    mlp: tuple[Repair, ...]


def inner_units(spec: ViTSpec) -> dict[str, int]:
    """Rows of the last linear map of each kind of branch."""
    return {"attn": spec.num_heads * spec.head_dim, "mlp": spec.mlp_dim}


def from_moments(
    attn: Sequence[Moment],
    mlp: Sequence[Moment],
    spec: ViTSpec,
    *,
    ridge: float = moments.RIDGE,
) -> Compensation:
    """The compensation of a network from moments in that network's coordinates.

    Args:
      attn: one (mean [H d], covariance [H d, H d]) of head outputs a block, index
        h * d + e. A covariance of None leaves the means alone.
      mlp: one (mean [M], covariance [M, M]) of hidden units a block.
      spec: sizes of the full network.
      ridge: as in `moments.regularised`.

    Returns:
      Float32 arrays; the factorisation is done on the host in float64.

    Raises:
      ValueError: if a shape does not fit the spec, or a covariance is not finite or has
        eigenvalues below -ridge; the message names the block.
    """
    sizes = inner_units(spec)
    order = np.arange(sizes["attn"]).reshape(spec.num_heads, -1).T.reshape(-1)
    orders = {"attn": order, "mlp": np.arange(spec.mlp_dim)}
    repairs = {}
    for kind, blocks in (("attn", attn), ("mlp", mlp)):
        if len(blocks) != spec.depth:
            raise ValueError(
                f"{kind}: {len(blocks)} moments, the network has {spec.depth} blocks."
            )
        repairs[kind] = []
        for i, moment in enumerate(blocks):
            where = f"block_{i}/{kind}"
            moments.check_shapes(moment, sizes[kind], where)
            mean, covariance = moments.permuted(moment, orders[kind])
            factor = covariance
            if covariance is not None:
                factor = moments.factor_of(covariance, ridge, where)
                factor = jnp.asarray(factor, jnp.float32)
            repairs[kind].append(Repair(jnp.asarray(mean, jnp.float32), factor))
    return Compensation(*map(tuple, repairs.values()))


def means_only(compensation: Compensation) -> Compensation:
    """The same means, no factors: kept units predict nothing."""
    return of_each(compensation, lambda repair: repair._replace(factor=None))


def of_each(compensation: Compensation, change: Callable) -> Compensation:
    """`change` of every `Repair`."""
    return Compensation(*(tuple(map(change, repairs)) for repairs in compensation))


# How a cut is repaired, as data: `repaired` of what the mode leaves.
MODES: dict[str, Callable[[Compensation], Compensation | None]] = {
    "none": lambda compensation: None,
    "mean": means_only,
    "least_squares": lambda compensation: compensation,
}


def repaired(
    params: Params,
    spec: ViTSpec,
    compensation: Compensation | None,
    widths: SubnetSpec,
) -> Params:
    """Parameters whose kept rows stand in for the cut ones.

    For a branch with rows W [n, D] of its last linear map, m of them kept (mask):

      W(m) = mask W + Lc^-T (mask * (Lc^T ((1 - mask) W)))
      b(m) = b + mean W - mean W(m)

    which is Lc[:m, :m]^-T G[:m] for G = Lc^T W. G is a linear change of variables, the
    same at every m: training W through this function trains the same networks as
    training G would, only the steps differ by it. Rows beyond m are zero; at full width
    nothing changes, bit for bit. Factor and mean are constants to the gradient.

    A removed branch (width 0) adds its mean output, b + mean W times LayerScale, to the
    output bias of the nearest branch kept before it. That branch's LayerScale is folded
    into its last linear map first and is 1 afterwards: the same function for entries of
    any size, 0 too, where dividing by it has no answer. Before the first kept branch,
    the bias of `pre_norm`, or the position embedding and every token without one. Nobody
    reads the stream in between, so this moves the mean and changes nothing else.

    Args:
      params: of the full network in the coordinates of the moments.
      spec: its sizes.
      compensation: None to leave `params` as they are.
      widths: tuples of ints or integer arrays [L], traced or not.

    Returns:
      A tree of the shapes and dtypes of `params`. Where widths are ints and no array is
      traced it holds numpy arrays, and nothing is compiled. Arrays that widths in ints
      do not change are passed on as they are: a compiled program need not hold them.

    Raises:
      ValueError: if widths or compensation do not have one entry a block, or, where all
        is known, widths do not fit or a factor has a zero on its diagonal.
    """
    if compensation is None:
        return params
    widths = SubnetSpec(*widths)
    kept = {"attn": widths.vo_dim, "mlp": widths.mlp_dim}
    _check_depths(spec, compensation, kept)
    unchanged, same_start = _unchanged(spec, kept)
    if _known(params, compensation, kept):
        widths.check(spec)
        params, compensation = jax.device_get((params, compensation))
        make = _Make(np, refit.on_host)
    else:
        kept = {kind: jnp.asarray(w, jnp.int32) for kind, w in kept.items()}
        make = _Make(jnp, refit.traced)
    new = dict(params)
    nothing = (make.of.zeros(spec.width, np.float32), make.of.array(False))
    carry = nothing
    for i in reversed(range(spec.depth)):
        block = new[f"block_{i}"] = dict(params[f"block_{i}"])
        for kind, number in (("mlp", 2), ("attn", 1)):
            if (i, kind) in unchanged:
                carry = nothing
                continue
            repair, width = getattr(compensation, kind)[i], kept[kind][i]
            scale = f"layer_scale{number}"
            block[kind], changed, carry = _repair_branch(
                make, repair, width, block[kind], block.get(scale), _LAST[kind], carry
            )
            if scale in block:
                block[scale] = changed
    return new if same_start else _add_to_stream(new, spec, carry[0])


def _ints(kept: dict) -> bool:
    return all(
        isinstance(w, int | np.integer) for width in kept.values() for w in width
    )


def _unchanged(spec: ViTSpec, kept: dict) -> tuple[set[tuple[int, str]], bool]:
    """Branches (block, kind) that known widths do not change; whether the start is one.

    These are the whole branches that take the mean of no removed one: the next is kept.
    """
    if not _ints(kept):
        return set(), False
    whole = {"attn": spec.head_dim, "mlp": spec.mlp_dim}
    found, removed = set(), False
    for i in reversed(range(spec.depth)):
        for kind in ("mlp", "attn"):
            if kept[kind][i] == whole[kind] and not removed:
                found.add((i, kind))
            removed = kept[kind][i] == 0
    return found, not removed


class _Make(NamedTuple):
    """numpy or jax.numpy, and how rows are re-fitted there."""

    of: Any
    refit: Callable[..., Any]


def _known(params, compensation, kept) -> bool:
    if not _ints(kept):
        return False
    leaves = jax.tree.leaves((params, compensation))
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def _repair_branch(make, repair, width, branch, layer_scale, name, carry):
    """(branch, its LayerScale, what is carried past it and whether there is any)."""
    carried, carrying = carry
    last = branch[name]
    group = last["kernel"].shape[0] if last["kernel"].ndim == 3 else 1
    rows = _rows(last["kernel"])
    kernel, bias = make.refit(repair, rows, last["bias"], width * group)
    xp = make.of
    scale = xp.ones_like(bias)
    if layer_scale is not None:
        scale = layer_scale.astype(jnp.float32)
    on = xp.asarray(width > 0)
    takes = on & carrying
    mean_output = scale * bias  # of a removed branch: b(0) = b + mean W
    kernel = xp.where(takes, scale[None] * kernel, kernel)
    bias = xp.where(takes, scale * bias + carried, bias)
    if layer_scale is not None:
        layer_scale = xp.where(takes, xp.ones_like(layer_scale), layer_scale)
    new = {
        "kernel": _unrows(kernel, last["kernel"]),
        "bias": bias.astype(last["bias"].dtype),
    }
    carry = (xp.where(on, 0.0, carried + mean_output), ~on)
    return {**branch, name: new}, layer_scale, carry


def _check_depths(spec: ViTSpec, compensation: Compensation, kept: dict) -> None:
    for kind, width in kept.items():
        blocks = len(getattr(compensation, kind))
        # A tuple may hold tracers, which numpy would try to read.
        shape = width.shape if hasattr(width, "shape") else (len(width),)
        if shape != (spec.depth,) or blocks != spec.depth:
            raise ValueError(
                f"{kind}: widths of shape {shape} and repairs of {blocks} blocks, the "
                f"network has {spec.depth}. One sub-network at a time: a level for "
                "each example cannot be repaired in one set of parameters."
            )


def _rows(kernel: Array) -> Array:
    """[n, D] in the order of cutting, of [M, D] or [H, d, D]; float32."""
    if kernel.ndim == 3:
        kernel = kernel.swapaxes(0, 1).reshape(-1, kernel.shape[-1])
    return kernel.astype(jnp.float32)


def _unrows(rows: Array, like: Array) -> Array:
    """The inverse of `_rows`, in the shape and dtype of `like`."""
    if like.ndim == 3:
        heads, dim, width = like.shape
        rows = rows.reshape(dim, heads, width).swapaxes(0, 1)
    return rows.astype(like.dtype)


def _add_to_stream(params: Params, spec: ViTSpec, shift: Array) -> Params:
    """`params` whose residual stream starts with `shift` [D] more in every token."""

    def plus(x):
        row = shift.reshape((1,) * (x.ndim - 1) + shift.shape)
        return (x.astype(jnp.float32) + row).astype(x.dtype)

    if spec.pre_norm:
        norm = params["pre_norm"]
        return {**params, "pre_norm": {**norm, "bias": plus(norm["bias"])}}
    names = ["pos_embed"]
    if not spec.pos_embed_prefix:
        names += ["class_token", "dist_token", "register_tokens"]
    return {**params, **{name: plus(params[name]) for name in names if name in params}}
