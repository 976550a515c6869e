"""The code of docs/export.md, taken out of the page and run as it stands."""

import os
import pathlib
import re

import jax
import numpy as np

from flax_skd.io.checkpoint import Subnet
from flax_skd.method import subnet, vit
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import ViT

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "export.md"
BLOCKS = dict(
    re.findall(
        r"```python\n# (?:module|example): (.*?)\n(.*?)```", PAGE.read_text(), re.DOTALL
    )
)
TINY = ViTSpec(
    image_size=8,
    patch_size=4,
    width=12,
    depth=3,
    num_heads=2,
    mlp_dim=20,
    num_classes=5,
)
# Unequal q/k and v/out, wider either way; no attention in one block, no MLP in another.
RAGGED = SubnetSpec((6, 0, 2), (4, 0, 3), (20, 7, 0))
EVEN = SubnetSpec((3,) * 3, (3,) * 3, (10,) * 3)
VARIANTS = {
    "plain": {},
    "tanh GELU": {"gelu": "tanh"},
    "LayerScale": {"layer_scale": True},
    "no qkv bias": {"qkv_bias": False},
    "registers": {"registers": 2},
    "no class token": {"class_token": False, "pool": "avg"},
    "average": {"pool": "avg"},
    "average then norm": {"pool": "avg", "fc_norm": True},
    "norm of the token": {"fc_norm": True},
    "positions of patches only": {"pos_embed_prefix": False},
    "distilled": {"distilled": True},
    "distilled, positions of patches only": {
        "distilled": True,
        "pos_embed_prefix": False,
    },
    "distilled, norm of the tokens": {"distilled": True, "fc_norm": True},
    "pre-norm": {"pre_norm": True},
    "pre-logits": {"pre_logits": 6},
    "no head": {"num_classes": 0},
    "wide heads": {"head_dim": 7},
}


def run(*labels, folder=None, **names):
    """Executes blocks one after the other inside `folder`; returns all names."""
    before = os.getcwd()
    os.chdir(folder or before)
    try:
        for label in labels:
            exec(compile(BLOCKS[label], f"{PAGE.name}: {label}", "exec"), names)  # noqa: S102
    finally:
        os.chdir(before)
    return names


def small_network(spec=TINY, widths=RAGGED, seed=0):
    """(a sub-network, the full params): every parameter random, no bias zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: vit.init(spec, jax.random.key(0)))
    params = jax.tree.map(
        lambda x: rng.normal(0.1, 0.4, x.shape).astype(np.float32), shapes
    )
    small = Subnet(subnet.extract(params, widths), spec, widths, {"level": 3})
    return small, params


def network(spec=TINY, widths=RAGGED):
    """(a sub-network, normalised images, the masked full network's logits)."""
    small, params = small_network(spec, widths)
    size = (4, spec.image_size, spec.image_size, spec.in_channels)
    images = np.random.default_rng(1).normal(size=size).astype(np.float32)
    masks = subnet.masks(spec, widths)
    want = jax.jit(ViT(spec).apply)({"params": params}, images, masks=masks)
    return small, images, np.asarray(want)
