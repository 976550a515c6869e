"""Weights and images drawn at random, where no number depends on them."""

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.method import vit
from flax_skd.method.spec import ViTSpec


def params(spec: ViTSpec) -> vit.Params:
    """Fresh weights with noise: a head of zeros would leave nothing to see or learn."""
    leaves, tree = jax.tree.flatten(vit.init(spec, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
    return jax.tree.unflatten(tree, map(jnp.add, leaves, noise))


def batch(spec: ViTSpec, size: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """`image` uint8 [B, S, S, C] and `label` int32 [B]."""
    shape = (size, spec.image_size, spec.image_size, spec.in_channels)
    return {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": rng.integers(0, spec.num_classes, size, np.int32),
    }
