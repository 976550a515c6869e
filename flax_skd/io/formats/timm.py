"""A sub-network as timm's state dict, and what timm needs to build it."""

import os
from typing import Any

import numpy as np

from flax_skd.io import directory as folder
from flax_skd.io import tensor_layout
from flax_skd.io.checkpoint import Subnet
from flax_skd.io.extras import require
from flax_skd.io.formats import folding
from flax_skd.method.spec import SubnetSpec, ViTSpec

FILES = ("config.json", "model.safetensors")
# The first release whose `timm.layers.Attention` takes `attn_head_dim`.
CUT_HEADS_SINCE = "1.0.23"


def convert(network: Subnet) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """timm's state dict of a sub-network, and how to build the module.

    Args:
      network: a sub-network.

    Returns:
      Contiguous float32 arrays by timm's names; fields as JSON holds them:
      `arguments` of `VisionTransformer` (`VisionTransformerDistilled` if
      `distilled`), `norm_eps`, `head_dim` and `mlp_dim` one entry a block,
      `constructor_suffices` if a `VisionTransformer` of the arguments alone is the
      module, `timm` the release needed.

    Raises:
      ValueError: if the network is empty, or has a part that timm's class has not; the
        message names it.
    """
    folding.check_kept(network.widths)
    spec = network.spec
    _check_parts(spec)
    padded = folding.padded(network)
    params = folding.own_scale(padded.params, spec)
    params, spec = folding.position_for_every_token(params, spec)
    if spec.distilled:  # timm's class has no norm of single tokens
        params, spec = folding.norm_of_every_token(params, spec)
    if spec.pre_norm:  # timm has no bias in front of norm_pre
        params = folding.without_patch_bias(params, spec)
    named = tensor_layout.named("timm", tensor_layout.flattened(params), spec)
    return named, _config(spec, padded.widths)


def _check_parts(spec: ViTSpec) -> None:
    refused = {
        "a pre-logits layer": spec.pre_logits,
        "registers beside a distillation token": spec.distilled and spec.registers,
    }
    found = [what for what, there in refused.items() if there]
    if found:
        raise ValueError(
            f"timm's VisionTransformer has no place for {' and '.join(found)}: export as "
            "nnx, jax_export or onnx, which have one."
        )


def _config(spec: ViTSpec, widths: SubnetSpec) -> dict[str, Any]:
    whole_heads = set(widths.vo_dim) == {spec.width / spec.num_heads}
    uniform = len(set(widths.mlp_dim)) == 1 and 0 not in widths.mlp_dim
    return {
        "arguments": _arguments(spec, max(widths.mlp_dim)),
        "distilled": spec.distilled,
        "norm_eps": spec.norm_eps,
        "head_dim": widths.vo_dim,
        "mlp_dim": widths.mlp_dim,
        "constructor_suffices": whole_heads and uniform and not spec.distilled,
        "timm": ">=1.0" if whole_heads else f">={CUT_HEADS_SINCE}",
    }


def _arguments(spec: ViTSpec, mlp_dim: int) -> dict[str, Any]:
    return {
        "img_size": spec.image_size,
        "patch_size": spec.patch_size,
        "in_chans": spec.in_channels,
        "num_classes": spec.num_classes,
        "global_pool": spec.pool,
        "embed_dim": spec.width,
        "depth": spec.depth,
        "num_heads": spec.num_heads,
        # timm rounds the product down: half a unit more hits every width.
        "mlp_ratio": (mlp_dim + 0.5) / spec.width,
        "qkv_bias": spec.qkv_bias,
        "init_values": 1.0 if spec.layer_scale else None,
        "class_token": spec.class_token,
        "reg_tokens": spec.registers,
        "pre_norm": spec.pre_norm,
        "fc_norm": spec.fc_norm,
        "act_layer": "gelu" if spec.gelu == "exact" else "gelu_tanh",
    }


def write(
    directory: str | os.PathLike, network: Subnet, *, overwrite: bool = False
) -> None:
    """Writes `convert(network)` as `model.safetensors` and `config.json`.

    Raises:
      ValueError: as `convert`, or if the directory may not be written.
    """
    named, config = convert(network)
    facts = {"config": config, "preprocessing": folding.preprocessing(network.spec)}
    tensors = require("safetensors.numpy").save(named, metadata={"format": "pt"})
    folder.write_files(
        directory, FILES, "timm export", facts, tensors, overwrite=overwrite
    )
