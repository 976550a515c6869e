"""Small networks of random options, and what timm computes of one, in NumPy float64."""

import math

import jax
import numpy as np
import reference
from flax.traverse_util import unflatten_dict

from flax_skd.io import tensor_layout
from flax_skd.method.spec import SubnetSpec, ViTSpec


def spec_of(seed):
    """Options drawn apart; what `ViTSpec` refuses is drawn again."""
    rng = np.random.default_rng(seed)

    def one(*choices):
        return choices[rng.integers(len(choices))]

    def maybe(chance=0.35):
        return bool(rng.random() < chance)

    while True:
        heads, head_dim, patch = one(1, 2, 3), one(0, 0, 1, 5, 7), one(2, 4)
        width = heads * int(rng.integers(3, 8)) if not head_dim else one(5, 8, 13)
        channels, pool = one(1, 3), one("token", "token", "avg")
        try:
            return ViTSpec(
                image_size=patch * one(1, 2, 3),
                patch_size=patch,
                width=width,
                depth=one(1, 2, 3),
                num_heads=heads,
                mlp_dim=one(1, 3, 9, 16),
                num_classes=one(0, 1, 2, 5),
                head_dim=head_dim,
                in_channels=channels,
                pool=pool,
                class_token=pool == "token" or maybe(),
                distilled=pool == "token" and maybe(0.6),
                registers=one(0, 0, 0, 1, 3),
                pos_embed_prefix=not maybe(),
                pre_logits=one(0, 0, 0, 0, 0, 6, width),
                qkv_bias=not maybe(),
                layer_scale=maybe(),
                pre_norm=maybe(),
                fc_norm=maybe(),
                gelu=one("exact", "tanh"),
                norm_eps=one(1e-6, 1e-3, 0.1),
                mean=(0.4,) * channels,
                std=(0.2,) * channels,
            )
        except ValueError:
            continue


def params_of(spec, seed):
    """Every number random; kernels keep what they read in size."""
    rng, flat = np.random.default_rng(seed), {}
    for path, shape in tensor_layout.shapes(spec, SubnetSpec.full(spec)).items():
        scale = 0.35
        if path.endswith("kernel"):
            made = (
                2
                if path.endswith(("query/kernel", "key/kernel", "value/kernel"))
                else 1
            )
            scale = 1 / math.sqrt(math.prod(shape[:-made]))
        flat[path] = rng.normal(0, scale, shape).astype(np.float32)
    return unflatten_dict(flat, sep="/")


def widths_of(spec, seed, within=None):
    """Each branch removed, whole, of one dim or of some; at most `within`."""
    rng = np.random.default_rng(seed)

    def cut(most):
        return int((most, 1, *rng.integers(1, most + 1, 2))[rng.integers(4)])

    blocks = []
    for qk, vo, mlp in zip(*(within or SubnetSpec.full(spec))):
        there = qk and rng.random() > 0.2
        attn = (cut(qk), cut(vo)) if there else (0, 0)
        blocks.append((*attn, cut(mlp) if mlp and rng.random() > 0.2 else 0))
    return SubnetSpec(*zip(*blocks))


def images_of(spec, count=3):
    size = (count, spec.image_size, spec.image_size, spec.in_channels)
    return np.random.default_rng(1).normal(size=size).astype(np.float32)


def logits(params, spec, images):
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    return reference.logits(images, wide, spec)


def timm_logits(tensors, config, images):
    """What timm's class makes of a state dict, which is read whole."""
    left = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    read = set()

    def get(name):
        read.add(name)
        return left[name]

    images = np.asarray(images, np.float64)
    found = np.stack([_timm_one(get, config, image) for image in images])
    assert read == set(left)
    return found


def _timm_one(get, config, image):
    a, eps = config["arguments"], config["norm_eps"]

    def linear(x, name, bias=True):
        return x @ get(f"{name}.weight").T + (get(f"{name}.bias") if bias else 0)

    def norm(x, name):
        scale = {"scale": get(f"{name}.weight"), "bias": get(f"{name}.bias")}
        return reference.layer_norm(x, scale, eps)

    def head(x, name="head"):
        return linear(x, name) if a["num_classes"] else x

    kernel = {"kernel": get("patch_embed.proj.weight").transpose(2, 3, 1, 0), "bias": 0}
    if not a["pre_norm"]:
        kernel["bias"] = get("patch_embed.proj.bias")
    there = a["class_token"], config["distilled"], a["reg_tokens"]
    names = zip(("cls_token", "dist_token", "reg_token"), there)
    prefix = [get(name)[0] for name, here in names if here]
    x = _patches(image, kernel, a["patch_size"])
    x = np.concatenate([*prefix, x]) + get("pos_embed")[0]
    if a["pre_norm"]:
        x = norm(x, "norm_pre")
    for i, (head_dim, hidden) in enumerate(zip(config["head_dim"], config["mlp_dim"])):
        block = f"blocks.{i}"
        if head_dim:
            qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv", a["qkv_bias"])
            z = _attend(*qkv.reshape(len(x), 3, -1, head_dim).transpose(1, 2, 0, 3))
            y = linear(z, f"{block}.attn.proj")
            x = x + y * (get(f"{block}.ls1.gamma") if a["init_values"] else 1)
        if hidden:
            y = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
            kind = {"gelu": "exact", "gelu_tanh": "tanh"}[a["act_layer"]]
            y = linear(reference.gelu(y, kind), f"{block}.mlp.fc2")
            x = x + y * (get(f"{block}.ls2.gamma") if a["init_values"] else 1)
    if not a["fc_norm"]:
        x = norm(x, "norm")
    if config["distilled"]:  # this class has no other norm
        return (head(x[0]) + head(x[1], "head_dist")) / 2
    x = x[0] if a["global_pool"] == "token" else x[sum(map(len, prefix)) :].mean(0)
    return head(norm(x, "fc_norm") if a["fc_norm"] else x)


def _patches(image, layer, size):
    grid = range(0, len(image), size)
    rows = [
        np.einsum("pqc,pqcd->d", image[i : i + size, j : j + size], layer["kernel"])
        for i in grid
        for j in grid
    ]
    return np.stack(rows) + layer["bias"]


def _attend(q, k, v):
    """[H, N, d] each; scaled by the width that is there."""
    scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = weights / weights.sum(-1, keepdims=True) @ v
    return mixed.transpose(1, 0, 2).reshape(mixed.shape[1], -1)
