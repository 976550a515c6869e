"""Checkpoints under the names of other libraries, written out from our params."""

import json

import jax
import numpy as np
from safetensors.numpy import save_file

from flax_skd.io import conversion
from flax_skd.method import vit
from flax_skd.method.spec import IMAGENET_MEAN, ViTSpec

PLAIN = ViTSpec(
    image_size=12,
    patch_size=4,
    width=8,
    depth=2,
    num_heads=2,
    mlp_dim=12,
    num_classes=5,
)
HEADS = {"num_heads": 2}
QKV = ("query", "key", "value")


def same(a, b):
    """Whether two trees are equal bit for bit."""
    equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b)
    return jax.tree.all(equal)


def read_timm(path, spec=PLAIN, **fields):
    names = ("mean", "std") if spec.in_channels != 3 else ()
    fields = HEADS | {name: getattr(spec, name) for name in names} | fields
    return conversion.read(path, recipe="augreg", fields=fields)


def random_params(spec: ViTSpec):
    """The model's own parameter tree with random leaves; no bias is zero."""
    size = (1, spec.image_size, spec.image_size, spec.in_channels)
    images = jax.ShapeDtypeStruct(size, np.float32)
    tree = jax.eval_shape(vit.ViT(spec).init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


def _torch_linear(out, name, layer):
    out[f"{name}.weight"] = layer["kernel"].T
    out[f"{name}.bias"] = layer["bias"]


def _torch_norm(out, name, layer):
    out[f"{name}.weight"], out[f"{name}.bias"] = layer["scale"], layer["bias"]


def _torch_patches(out, name, layer):
    out[f"{name}.weight"] = np.einsum("hwio->oihw", layer["kernel"])
    out[f"{name}.bias"] = layer["bias"]


def _out(attn):
    kernel = attn["out"]["kernel"]
    return {
        "kernel": kernel.reshape(-1, kernel.shape[-1]),
        "bias": attn["out"]["bias"],
    }


def _head_rows(kernel):
    """[D, H, d] as torch keeps it: row h * d + j is unit j of head h."""
    return np.stack([kernel[:, h].T for h in range(kernel.shape[1])]).reshape(
        -1, kernel.shape[0]
    )


def timm(params, spec):
    out = {}
    _torch_patches(out, "patch_embed.proj", params["patch_embed"])
    tokens = {"class_token": "cls_token", "dist_token": "dist_token"}
    for ours, theirs in tokens.items():
        if ours in params:
            out[theirs] = params[ours].reshape(1, 1, -1)
    if "register_tokens" in params:
        out["reg_token"] = params["register_tokens"][None]
    out["pos_embed"] = params["pos_embed"][None]
    for ours, theirs in (("pre_norm", "norm_pre"), ("norm", "norm")):
        if ours in params:
            _torch_norm(out, theirs, params[ours])
    if "fc_norm" in params:
        _torch_norm(out, "fc_norm", params["fc_norm"])
    for ours, theirs in (("pre_logits", "pre_logits.fc"), ("head", "head")):
        if ours in params:
            _torch_linear(out, theirs, params[ours])
    if "head_dist" in params:
        _torch_linear(out, "head_dist", params["head_dist"])
    for i in range(spec.depth):
        block, name = params[f"block_{i}"], f"blocks.{i}"
        attn = block["attn"]
        rows = [_head_rows(attn[n]["kernel"]) for n in QKV]
        out[f"{name}.attn.qkv.weight"] = np.concatenate(rows)
        if "bias" in attn["query"]:
            biases = [attn[n]["bias"].reshape(-1) for n in QKV]
            out[f"{name}.attn.qkv.bias"] = np.concatenate(biases)
        _torch_linear(out, f"{name}.attn.proj", _out(attn))
        for n in ("1", "2"):
            _torch_norm(out, f"{name}.norm{n}", block[f"norm{n}"])
            _torch_linear(out, f"{name}.mlp.fc{n}", block["mlp"][f"fc{n}"])
            if f"layer_scale{n}" in block:
                out[f"{name}.ls{n}.gamma"] = block[f"layer_scale{n}"]
    return {key: np.ascontiguousarray(value) for key, value in out.items()}


HF4 = {
    "block": "encoder.layer.{}.",
    "query": "attention.attention.query",
    "key": "attention.attention.key",
    "value": "attention.attention.value",
    "out": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
HF5 = {
    "block": "layers.{}.",
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "out": "attention.o_proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def huggingface(params, spec, *, prefix="vit.", names=HF4):
    out = {}
    embeddings = f"{prefix}embeddings."
    _torch_patches(
        out, f"{embeddings}patch_embeddings.projection", params["patch_embed"]
    )
    out[f"{embeddings}cls_token"] = params["class_token"].reshape(1, 1, -1)
    out[f"{embeddings}position_embeddings"] = params["pos_embed"][None]
    if "dist_token" in params:
        token = params["dist_token"].reshape(1, 1, -1)
        out[f"{embeddings}distillation_token"] = token
    _torch_norm(out, f"{prefix}layernorm", params["norm"])
    if "pre_logits" in params:
        _torch_linear(out, f"{prefix}pooler.dense", params["pre_logits"])
    if spec.distilled:
        _torch_linear(out, "cls_classifier", params["head"])
        _torch_linear(out, "distillation_classifier", params["head_dist"])
    elif "head" in params:
        _torch_linear(out, "classifier", params["head"])
    for i in range(spec.depth):
        block, name = params[f"block_{i}"], prefix + names["block"].format(i)
        attn = block["attn"]
        for n in QKV:
            layer = {"kernel": _head_rows(attn[n]["kernel"]).T}
            layer["bias"] = attn[n]["bias"].reshape(-1)
            _torch_linear(out, name + names[n], layer)
        _torch_linear(out, name + names["out"], _out(attn))
        _torch_norm(out, f"{name}layernorm_before", block["norm1"])
        _torch_norm(out, f"{name}layernorm_after", block["norm2"])
        for n in ("fc1", "fc2"):
            _torch_linear(out, name + names[n], block["mlp"][n])
    return {key: np.ascontiguousarray(value) for key, value in out.items()}


def vit_jax(params, spec, *, prefix="", norm2=2, mlp=3, attn=1):
    """vit_jax's names; norm2 = 1, mlp = attn = 0 are big_vision's."""
    position = "Transformer/posembed_input/pos_embedding" if attn else "pos_embedding"
    out = {position: params["pos_embed"][None]}
    if "class_token" in params:
        out["cls"] = params["class_token"].reshape(1, 1, -1)
    layers = {"embedding": "patch_embed", "Transformer/encoder_norm": "norm"}
    layers |= {name: name for name in ("pre_logits", "head") if name in params}
    for theirs, ours in layers.items():
        out |= {f"{theirs}/{leaf}": v for leaf, v in params[ours].items()}
    for i in range(spec.depth):
        block, name = params[f"block_{i}"], f"Transformer/encoderblock_{i}"
        parts = {
            "LayerNorm_0": block["norm1"],
            f"LayerNorm_{norm2}": block["norm2"],
            f"MlpBlock_{mlp}/Dense_0": block["mlp"]["fc1"],
            f"MlpBlock_{mlp}/Dense_1": block["mlp"]["fc2"],
            **{
                f"MultiHeadDotProductAttention_{attn}/{n}": block["attn"][n]
                for n in (*QKV, "out")
            },
        }
        for part, layer in parts.items():
            out |= {f"{name}/{part}/{leaf}": v for leaf, v in layer.items()}
    return {prefix + key: value for key, value in out.items()}


def scanned(tensors, depth):
    """big_vision's scanned blocks: one array for all of them."""
    out, top = {}, "Transformer/encoderblock"
    for key, value in tensors.items():
        head, found, rest = key.partition(f"{top}_0/")
        if found:
            layers = [tensors[f"{head}{top}_{i}/{rest}"] for i in range(depth)]
            out[f"{head}{top}/{rest}"] = np.stack(layers)
        elif f"{top}_" not in key:
            out[key] = value
    return out


def write_hf(folder, tensors, *, processor=None, **changes):
    save_file(tensors, folder / "model.safetensors")
    config = {
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "hidden_size": 8,
        "image_size": [12, 12],
    }
    (folder / "config.json").write_text(json.dumps(config | changes))
    processor = processor or {
        "image_mean": list(IMAGENET_MEAN),
        "image_std": [0.5] * 3,
        "resample": 3,
        "do_center_crop": True,
        "size": {"shortest_edge": 256},
        "crop_size": 224,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
