"""A sub-network for plain Flax: `nn.MultiHeadDotProductAttention`, vit_jax's names."""

import os
from typing import Any

import numpy as np

from flax_skd.io import directory as folder
from flax_skd.io import tensor_layout
from flax_skd.io.checkpoint import Subnet
from flax_skd.io.formats import arrays, folding
from flax_skd.method.spec import ViTSpec
from flax_skd.method.vit import Params

FILES = ("config.json", "params.npz")


def convert(network: Subnet) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays by vit_jax's names joined by `/`, and the sizes to build a module with.

    Queries carry the full head's scale, LayerScale is folded into `out` and `fc2`, and
    a qkv without bias gets zeros.

    Args:
      network: a sub-network.

    Returns:
      Float32 arrays; fields as JSON holds them, `head_dim` and `mlp_dim` one entry a
      block.

    Raises:
      ValueError: if the network is empty, or has a part that vit_jax's layout has no
        place for; the message names it.
    """
    folding.check_kept(network.widths)
    spec = network.spec
    _check_parts(spec)
    padded = folding.padded(network)
    params = folding.without_layer_scale(folding.own_scale(padded.params, spec))
    params, spec = folding.position_for_every_token(params, spec)
    params, spec = folding.norm_of_every_token(params, spec)
    prefix = [params.pop("register_tokens")] if spec.registers else []
    flat = tensor_layout.flattened(_with_biases(params))
    named = tensor_layout.named("jax", flat, spec)
    if prefix:
        cls = [named["cls"][0]] if spec.class_token else []
        named["cls"] = np.concatenate([*cls, *prefix])[None]
    return named, _config(spec, padded.widths)


def _check_parts(spec: ViTSpec) -> None:
    refused = {
        "a distillation token": spec.distilled,
        "a LayerNorm before the first block (pre_norm)": spec.pre_norm,
        "a LayerNorm after average pooling (fc_norm)": spec.fc_norm
        and spec.pool == "avg",
    }
    found = [what for what, there in refused.items() if there]
    if found:
        raise ValueError(
            f"format flax has no place for {' and '.join(found)}: export as timm, nnx, "
            "jax_export or onnx, which have."
        )


def _with_biases(params: Params) -> Params:
    """Zero biases of queries, keys and values where there are none."""
    for name, block in params.items():
        if name.startswith("block_") and "attn" in block:
            for part in ("query", "key", "value"):
                shape = block["attn"][part]["kernel"].shape[1:]
                block["attn"][part].setdefault("bias", np.zeros(shape, np.float32))
    return params


def _config(spec: ViTSpec, widths: Any) -> dict[str, Any]:
    names = (
        *("patch_size", "width", "num_heads", "num_classes", "pool", "pre_logits"),
        *("gelu", "norm_eps"),
    )
    return {
        **{name: getattr(spec, name) for name in names},
        "prefix_tokens": spec.num_prefix,
        "head_dim": widths.vo_dim,
        "mlp_dim": widths.mlp_dim,
    }


def write(
    directory: str | os.PathLike, network: Subnet, *, overwrite: bool = False
) -> None:
    """Writes `convert(network)` as `params.npz` and `config.json`.

    Raises:
      ValueError: as `convert`, or if the directory may not be written.
    """
    named, config = convert(network)
    facts = {"config": config, "preprocessing": folding.preprocessing(network.spec)}
    content = arrays.npz(named)
    folder.write_files(
        directory, FILES, "flax export", facts, content, overwrite=overwrite
    )
