"""The two faces of one sub-network: masks on the full one, and extracted slices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import BlockMasks, Params


def masks(spec: ViTSpec, widths: SubnetSpec) -> tuple[BlockMasks, ...]:
    """Masks under which the full network computes what the sub-network computes.

    Args:
      spec: the full network.
      widths: integer arrays or tuples [..., L]; traced values are welcome, and a
        leading axis [B, L] gives every example its own sub-network.

    Returns:
      One `BlockMasks` a block, float32.

    Raises:
      ValueError: if there is not one width a block, or one that is known does not fit.
    """
    fields = SubnetSpec(*widths).of_blocks()
    qk, vo, mlp = (
        jnp.asarray(_checked(name, field, spec), jnp.int32)
        for name, field in zip(SubnetSpec._fields, fields)
    )
    if _known(fields[:2]) and np.any(np.equal(fields[0], 0) != np.equal(fields[1], 0)):
        raise ValueError(
            f"qk_dim = {fields[0]}, vo_dim = {fields[1]}: attention is removed by both "
            "being 0, and kept by neither."
        )

    def prefix(width, size):
        dims = jnp.arange(size).reshape((1,) * width.ndim + (size,))
        return (dims < width[..., None]).astype(jnp.float32)

    return tuple(
        BlockMasks(
            prefix(qk[..., i], spec.head_dim),
            prefix(vo[..., i], spec.head_dim),
            prefix(mlp[..., i], spec.mlp_dim),
            (vo[..., i] > 0).astype(jnp.float32),
            (mlp[..., i] > 0).astype(jnp.float32),
        )
        for i in range(spec.depth)
    )


def _checked(name: str, widths: Any, spec: ViTSpec) -> Any:
    """Widths [..., L]; of those on a device, or traced, the shape alone is known."""
    shape = widths.shape if hasattr(widths, "shape") else (len(widths),)
    if shape[-1:] != (spec.depth,):
        raise ValueError(
            f"{name} has shape {shape}; it needs one width for each of {spec.depth} "
            "blocks, [..., L]."
        )
    most = spec.mlp_dim if name == "mlp_dim" else spec.head_dim
    if _known(widths):
        known = np.asarray(widths)
        whole = np.issubdtype(known.dtype, np.integer)
        if not whole or not ((known >= 0) & (known <= most)).all():
            raise ValueError(f"{name} = {widths}: whole numbers of 0 to {most}.")
    return widths


def _known(widths: Any) -> bool:
    """Whether the numbers are at hand: not traced, nor on a device."""
    return not any(isinstance(w, jax.Array) for w in jax.tree.leaves(widths))


def as_data(widths: SubnetSpec) -> SubnetSpec:
    """Widths as int32 arrays: data of a compiled program, which then serves them all."""
    return SubnetSpec(*(np.asarray(field, np.int32) for field in widths))


def masked(params: Params, spec: ViTSpec, widths: SubnetSpec) -> Params:
    """Parameters with which the full network computes what the sub-network computes.

    The same function and gradients as under `masks`: there features are multiplied,
    here what makes the queries and what reads the values and hidden units, once a batch.

    Args:
      params: of the full network.
      spec: its sizes.
      widths: integers or integer arrays [L], traced or not; one cut for all examples.

    Returns:
      A tree of the same shapes, linear in `params`.
    """
    out = dict(params)
    for i, mask in enumerate(masks(spec, widths)):
        block = dict(params[f"block_{i}"])
        attn, mlp = dict(block["attn"]), dict(block["mlp"])
        attn["query"] = {
            k: x * jnp.broadcast_to(mask.qk, x.shape) for k, x in attn["query"].items()
        }
        attn["out"] = _read(attn["out"], mask.vo[None, :, None], mask.attn_gate)
        mlp["fc2"] = _read(mlp["fc2"], mask.mlp[:, None], mask.mlp_gate)
        out[f"block_{i}"] = {**block, "attn": attn, "mlp": mlp}
    return out


def _read(linear: Params, rows: jax.Array, gate: jax.Array) -> Params:
    return {"kernel": linear["kernel"] * rows, "bias": linear["bias"] * gate}


def extract(params: Params, widths: SubnetSpec) -> Params:
    """The parameters of a sub-network: prefix slices, no arithmetic.

    Args:
      params: of the full network or of any larger sub-network.
      widths: tuples of ints, at most the widths `params` has.

    Returns:
      A new tree; a removed branch takes its LayerNorm and LayerScale with it.

    Raises:
      ValueError: if `params` is narrower than asked, there is not one width a block, or
        the widths are none: negative, no whole numbers, or attention without queries or
        without values; the message names the block.
    """
    if "params" in params:
        raise ValueError("params are inside a collection: give variables['params'].")
    out = {k: v for k, v in params.items() if not k.startswith("block_")}
    widths = SubnetSpec(*widths).static()
    lengths = dict(zip(widths._fields, map(len, widths)))
    blocks = 1 + max((int(k[6:]) for k in params if k.startswith("block_")), default=-1)
    if len(set(lengths.values())) > 1 or blocks > lengths["qk_dim"]:
        raise ValueError(
            f"widths of {lengths} blocks, and the parameters are of at least {blocks}: "
            "give one width of each kind for every block."
        )
    for i, (qk, vo, mlp) in enumerate(zip(*widths)):
        block = params.get(f"block_{i}", {})  # none of a block that was removed whole
        _check_widths(block, i, qk, vo, mlp)
        kept: Params = {}
        if vo:
            kept |= _branch(block, "attn", 1, _cut_attention(block["attn"], qk, vo))
        if mlp:
            kept |= _branch(block, "mlp", 2, _cut_mlp(block["mlp"], mlp))
        if kept:
            out[f"block_{i}"] = kept
    return out


def _branch(block: Params, name: str, number: int, cut: Params) -> Params:
    beside = (f"norm{number}", f"layer_scale{number}")
    return {name: cut, **{k: block[k] for k in beside if k in block}}


def _cut_attention(attn: Params, qk: int, vo: int) -> Params:
    width = {"query": qk, "key": qk, "value": vo}
    cut = {
        name: jax.tree.map(lambda x, w=w: x[..., :w], attn[name])
        for name, w in width.items()
    }
    return {**cut, "out": {**attn["out"], "kernel": attn["out"]["kernel"][:, :vo]}}


def _cut_mlp(mlp: Params, width: int) -> Params:
    return {
        "fc1": jax.tree.map(lambda x: x[..., :width], mlp["fc1"]),
        "fc2": {**mlp["fc2"], "kernel": mlp["fc2"]["kernel"][:width]},
    }


def _check_widths(block: Params, index: int, qk: int, vo: int, mlp: int) -> None:
    if min(qk, vo, mlp) < 0 or (qk == 0) != (vo == 0):
        raise ValueError(
            f"qk_dim = {qk}, vo_dim = {vo}, mlp_dim = {mlp} in block {index}: widths are "
            "0 or more, and attention is removed by both of its widths being 0."
        )
    have = widths_of_block(block)
    for name, w, most in zip(SubnetSpec._fields, (qk, vo, mlp), have):
        if w > most:
            raise ValueError(
                f"{name} = {w} in block {index}, but the parameters hold {most}: "
                "extract from a network at least that wide."
            )


def widths_of_block(block: Params) -> tuple[int, int, int]:
    """(qk_dim, vo_dim, mlp_dim) that the parameters of one block hold."""
    qk = block["attn"]["query"]["kernel"].shape[-1] if "attn" in block else 0
    vo = block["attn"]["value"]["kernel"].shape[-1] if "attn" in block else 0
    mlp = block["mlp"]["fc1"]["kernel"].shape[-1] if "mlp" in block else 0
    return qk, vo, mlp


def widths_of(params: Params, spec: ViTSpec) -> SubnetSpec:
    """The widths that a parameter tree holds, full or extracted."""
    blocks = [widths_of_block(params.get(f"block_{i}", {})) for i in range(spec.depth)]
    return SubnetSpec(*zip(*blocks)).check(spec)
