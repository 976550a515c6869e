"""A sub-network as a Flax NNX module, by Flax's own bridge from Linen."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_skd.io import checkpoint
from flax_skd.io.checkpoint import Subnet
from flax_skd.io.formats import folding
from flax_skd.method.vit import ViT


def module(network: Subnet, *, dtype: Any = jnp.float32) -> nnx.Module:
    """The network as an NNX module: call it with images, train it with nnx.Optimizer.

    Args:
      network: a sub-network.
      dtype: of the computation, float32 or bfloat16.

    Returns:
      A module whose `nnx.Param` state is the tree of `network.params`, in float32.

    Raises:
      ValueError: if the network is empty.
    """
    folding.check_kept(network.widths)
    spec = network.spec

    def fresh() -> nnx.Module:
        linen = ViT(spec, network.widths, dtype=dtype)
        return nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0))

    def initialised() -> nnx.Module:
        size = (1, spec.image_size, spec.image_size, spec.in_channels)
        return nnx.bridge.lazy_init(fresh(), jnp.zeros(size))

    bridged = nnx.eval_shape(initialised)  # shapes alone: nothing is drawn or run
    state = nnx.state(bridged, nnx.Param)
    given = folding.in_float32(network.params)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, given))
    nnx.update(bridged, state, nnx.state(fresh(), nnx.RngState))
    return bridged


def load(directory: str | os.PathLike) -> nnx.Module:
    """The module of a sub-network directory, such as format nnx writes.

    Raises:
      ValueError: if the directory is not one, or damaged.
    """
    return module(checkpoint.load_subnet(directory))
