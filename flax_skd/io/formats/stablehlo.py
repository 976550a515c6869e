"""A sub-network as StableHLO: `jax.export`, read back by jax without our code."""

import os
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from flax_skd.io import directory as folder
from flax_skd.io.checkpoint import Subnet
from flax_skd.io.extras import require
from flax_skd.io.formats import folding
from flax_skd.method.vit import ViT

FILES = ("config.json", "model.stablehlo", "apply.stablehlo")
PLATFORMS = ("cpu", "cuda", "tpu")
_KNOWN = (*PLATFORMS, "rocm")


def params_inside(
    network: Subnet,
    *,
    platforms: tuple[str, ...] = PLATFORMS,
    image_dtype: Any = jnp.float32,
) -> export.Exported:
    """The function images -> logits, parameters in it as constants.

    Args:
      network: a sub-network.
      platforms: where it shall run; one module holds them all.
      image_dtype: float32 (normalised) or uint8 (pixels).

    Returns:
      Exported for images [b, S, S, C], any b.

    Raises:
      ValueError: if the network is empty or a platform unknown.
    """
    params = _checked(network, platforms)
    model = ViT(network.spec, network.widths)
    call = jax.jit(lambda images: model.apply({"params": params}, images))
    return export.export(call, platforms=platforms)(_images(network, image_dtype))


def params_outside(
    network: Subnet,
    *,
    platforms: tuple[str, ...] = PLATFORMS,
    image_dtype: Any = jnp.float32,
) -> export.Exported:
    """The function (params, images) -> logits, for parameters that still change.

    Args, errors and images as in `params_inside`; `params` is the nested dict of the
    sub-network, float32.
    """
    params = _checked(network, platforms)
    model = ViT(network.spec, network.widths)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    call = jax.jit(lambda p, images: model.apply({"params": p}, images))
    images = _images(network, image_dtype)
    return export.export(call, platforms=platforms)(shapes, images)


def _checked(network: Subnet, platforms: tuple[str, ...]):
    folding.check_kept(network.widths)
    check_platforms(platforms)
    return folding.in_float32(network.params)


def check_platforms(platforms: tuple[str, ...]) -> None:
    """Raises ValueError for a platform that jax has no lowering for, or none at all."""
    unknown = [p for p in platforms if p not in _KNOWN]
    if unknown or not platforms:
        raise ValueError(
            f"platforms {', '.join(unknown) or 'empty'}: StableHLO is exported for any "
            f"of {', '.join(_KNOWN)}."
        )


def _images(network: Subnet, dtype: Any) -> jax.ShapeDtypeStruct:
    spec = network.spec
    (batch,) = export.symbolic_shape("b")
    side = spec.image_size
    return jax.ShapeDtypeStruct((batch, side, side, spec.in_channels), dtype)


def write(
    directory: str | os.PathLike,
    network: Subnet,
    *,
    platforms: tuple[str, ...] = PLATFORMS,
    overwrite: bool = False,
) -> None:
    """Writes `model.stablehlo` (parameters inside) and `apply.stablehlo` (outside).

    Images are normalised floats; `config.json` states how.

    Raises:
      ValueError: as `params_inside`, or if the directory may not be written.
      ImportError: if flatbuffers is missing.
    """
    folding.check_kept(network.widths)
    check_platforms(platforms)
    require("flatbuffers")  # before the minute that lowering may take
    content = (
        params_inside(network, platforms=platforms).serialize(),
        params_outside(network, platforms=platforms).serialize(),
    )
    facts = {
        "platforms": platforms,
        "image_dtype": "float32",
        "preprocessing": folding.preprocessing(network.spec),
    }
    folder.write_files(
        directory, FILES, "jax_export export", facts, *content, overwrite=overwrite
    )
