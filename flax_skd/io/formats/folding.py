"""What other attention code needs of a cut network, done to its parameters, exactly."""

from typing import Any

import jax
import numpy as np
from flax.core import unfreeze

from flax_skd.io.checkpoint import Subnet
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import Params


def check_kept(widths: SubnetSpec) -> None:
    """Refuses a network without a branch.

    Raises:
      ValueError: if every width is 0.
    """
    if not any(widths.vo_dim) and not any(widths.mlp_dim):
        raise ValueError(
            "this level is empty: every branch of every block is removed, and nothing "
            "but embedding and head would be exported. Choose a larger budget."
        )


def in_float32(params: Params) -> Params:
    """The tree as plain dicts of float32 NumPy arrays, each its own memory."""
    return jax.tree.map(lambda x: np.array(x, np.float32), unfreeze(params))


def equal_heads(widths: SubnetSpec) -> SubnetSpec:
    """Widths whose queries, keys, values and out are as wide as the wider of both."""
    width = tuple(max(qk, vo) for qk, vo in zip(widths.qk_dim, widths.vo_dim))
    return SubnetSpec(width, width, tuple(widths.mlp_dim))


def padded(network: Subnet) -> Subnet:
    """The same function with heads of one width in every block.

    Zero dims of q and k add 0 to q k^T, zero dims of v meet zero rows of `out`: exact.

    Args:
      network: a sub-network.

    Returns:
      Its float32 form with `equal_heads` widths.
    """
    widths = equal_heads(network.widths)
    params = in_float32(network.params)
    for i, width in enumerate(widths.vo_dim):
        if not width:
            continue
        attn = params[f"block_{i}"]["attn"]
        for name in ("query", "key", "value"):
            attn[name] = {k: _widened(x, -1, width) for k, x in attn[name].items()}
        attn["out"]["kernel"] = _widened(attn["out"]["kernel"], 1, width)
    return network._replace(params=params, widths=widths)


def _widened(x: np.ndarray, axis: int, width: int) -> np.ndarray:
    zeros = [(0, 0)] * x.ndim
    zeros[axis] = (0, width - x.shape[axis])
    return np.pad(x, zeros)


def own_scale(params: Params, spec: ViTSpec) -> Params:
    """Parameters for attention that scales by the width it sees.

    softmax(q k^T / sqrt(d)) = softmax(q' k^T / sqrt(w)) for q' = q sqrt(w / d): the
    factor goes into kernel and bias of the queries.

    Args:
      params: of a sub-network; w is its width of queries, padding included.
      spec: of the full network; d is its `head_dim`.
    """

    def block(old: Params) -> Params:
        if "attn" not in old:
            return old
        query = old["attn"]["query"]
        width = query["kernel"].shape[-1]
        factor = np.float32(np.sqrt(width / spec.head_dim))
        query = {name: x * factor for name, x in query.items()}
        return {**old, "attn": {**old["attn"], "query": query}}

    return {k: block(v) if k.startswith("block_") else v for k, v in params.items()}


def without_layer_scale(params: Params) -> Params:
    """LayerScale folded into the last linear map of its branch."""
    new = {}
    for name, old in params.items():
        if not name.startswith("block_"):
            new[name] = old
            continue
        block = dict(old)
        for key, branch, last in (
            ("layer_scale1", "attn", "out"),
            ("layer_scale2", "mlp", "fc2"),
        ):
            if key in block:
                scale = block.pop(key)
                folded = {k: x * scale for k, x in block[branch][last].items()}
                block[branch] = {**block[branch], last: folded}
        new[name] = block
    return new


def position_for_every_token(params: Params, spec: ViTSpec) -> tuple[Params, ViTSpec]:
    """Position embeddings for the prefix tokens too: zeros, where they had none."""
    if spec.pos_embed_prefix:
        return params, spec
    table = np.pad(params["pos_embed"], ((spec.num_prefix, 0), (0, 0)))
    return {**params, "pos_embed": table}, spec.replace(pos_embed_prefix=True)


def norm_of_every_token(params: Params, spec: ViTSpec) -> tuple[Params, ViTSpec]:
    """The last LayerNorm on all tokens, if it is on those alone that the head reads."""
    if not spec.fc_norm or spec.pool != "token":
        return params, spec
    rest = {name: x for name, x in params.items() if name != "fc_norm"}
    return rest | {"norm": params["fc_norm"]}, spec.replace(fc_norm=False)


def without_patch_bias(params: Params, spec: ViTSpec) -> Params:
    """The bias of the patch embedding moved into the patches' position embeddings."""
    prefix = spec.num_prefix if spec.pos_embed_prefix else 0
    table = np.array(params["pos_embed"])
    table[prefix:] += params["patch_embed"]["bias"]
    patch = {"kernel": params["patch_embed"]["kernel"]}
    return {**params, "patch_embed": patch, "pos_embed": table}


def preprocessing(spec: ViTSpec) -> dict[str, Any]:
    """What every format states of its images, as JSON holds it."""
    names = (
        *("image_size", "in_channels", "mean", "std"),
        *("crop_fraction", "interpolation", "crop_mode"),
    )
    return {name: getattr(spec, name) for name in names}
