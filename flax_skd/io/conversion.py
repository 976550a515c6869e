"""Checkpoints of other libraries: file -> params and ViTSpec, and back to timm."""

import dataclasses
import logging
import os
import pathlib
from typing import Any

import numpy as np

from flax_skd.io import directory, source_fields, tensor_layout, tensor_sizes
from flax_skd.io.extras import require
from flax_skd.io.key_tables import PATCH_KERNEL, REFUSED, TABLES, Flat
from flax_skd.io.weight_files import ConversionError, locate, read_tensors, sha256
from flax_skd.method.spec import ViTSpec

_MAX_GRID = 512  # patches along a side
_CONFIGS = {
    "timm": source_fields.from_timm,
    "huggingface": source_fields.from_huggingface,
    "jax": lambda beside: {},
}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A checkpoint that was read.

    Attributes:
      params: nested dict of float32 arrays, the layout of `vit.ViT`.
      spec: of the network.
      sha256: hex digest of the weight file (of all shards in the order of names).
      path: as it was given.
      family: `timm`, `huggingface` or `jax`.
    """

    params: dict[str, Any]
    spec: ViTSpec
    sha256: str
    path: str
    family: str


def read(
    path: str | os.PathLike,
    *,
    variant: str | None = None,
    recipe: str | None = None,
    fields: dict[str, Any] | None = None,
    image_size: int | None = None,
    entry: str | None = None,
) -> Converted:
    """Reads a ViT checkpoint of timm/DeiT, Hugging Face, AugReg or big_vision.

    Sizes come from the tensors. The rest (heads of a fused qkv, LayerNorm epsilon,
    GELU, preprocessing) comes from `fields`, else the config beside the weights, else
    `variant` and `recipe`. Names of files and architectures are never interpreted.

    Args:
      path: a .safetensors, .npz, .pth, .pth.tar, .pt or .bin file, which stands alone,
        or a folder with such weights and `config.json`.
      variant: a published size, such as `Ti/16`; gives the heads, and the tensors must
        agree.
      recipe: how the family was trained and is evaluated: `augreg`, `augreg_jax`,
        `deit` or `deit3`.
      fields: of `ViTSpec`; they win over config and recipe, not over the tensors.
      image_size: pixels; position embeddings of another size are resampled.
      entry: of a `.pth` file that holds several state dicts, which to take, such as
        `model_ema` or `state_dict_ema`.

    Returns:
      A `Converted`: the params as float32, whatever the file's float type, their spec,
      and where they came from.

    Raises:
      ConversionError: if the file is damaged, not such a ViT, has missing, surplus or
        wrong keys (listed together), or if a field stays unknown or is contradicted.
      torch_pickle.TorchFileError: if a `.pth` file is damaged or unsafe.
    """
    files, beside = locate(pathlib.Path(path).expanduser())
    tensors = read_tensors(files, entry=entry)
    try:
        family = _family(tensors)
        found = tensor_sizes.flatten(tensors, family)
        facts, likely = tensor_sizes.infer(
            found, pos_embed_prefix=(fields or {}).get("pos_embed_prefix")
        )
        values = source_fields.resolve(
            facts,
            likely=likely,
            config=_CONFIGS[family](beside),
            variant=variant,
            recipe=recipe,
            fields=fields,
        )
        spec = _spec(values, found.flat)
        params = tensor_layout.nest(found.flat, spec)
        if image_size is not None and image_size != spec.image_size:
            params, spec = _resample(params, spec, image_size)
    except ConversionError as error:
        raise ConversionError(f"{os.fspath(path)}: {error}") from error
    return Converted(params, spec, sha256(files), os.fspath(path), family)


def _family(tensors: Flat) -> str:
    refused = {
        f"{what} ({key})"
        for key in tensors
        for pattern, what in REFUSED
        if pattern.search(key)
    }
    if refused:
        kinds = sorted(refused)
        raise ConversionError(
            "this ViT does not support what the file holds: "
            f"{'; '.join(kinds[:8])}{' ...' if len(kinds) > 8 else ''}"
        )
    found = [f for f, p in PATCH_KERNEL.items() if any(map(p.fullmatch, tensors))]
    if len(found) != 1:
        raise ConversionError(
            f"no ViT of a known family ({', '.join(TABLES)}): expected one patch "
            "embedding such as patch_embed.proj.weight, "
            "vit.embeddings.patch_embeddings.projection.weight or embedding/kernel; "
            f"the file holds {sorted(tensors)[:8]}."
        )
    return found[0]


def _spec(values: dict[str, Any], flat: Flat) -> ViTSpec:
    inner = flat["block_0/attn/query/kernel"].shape[1]
    heads = values["num_heads"]
    if type(heads) is not int or heads < 1 or inner % heads:
        raise ConversionError(
            f"num_heads = {heads!r} does not divide the width of attention, {inner}: "
            "give the right variant= or fields={'num_heads': ...}."
        )
    if values.get("head_dim") not in (None, 0, inner // heads):
        raise ConversionError(
            f"head_dim = {values['head_dim']} contradicts {heads} heads of "
            f"{inner // heads} in the tensors."
        )
    try:
        spec = ViTSpec.from_dict(values | {"head_dim": inner // heads})
        if not np.isfinite([*spec.mean, *spec.std]).all() or not 0 < spec.norm_eps < 1:
            raise ValueError(
                f"mean = {spec.mean} and std = {spec.std} must be finite, norm_eps = "
                f"{spec.norm_eps} in (0, 1)."
            )
        return spec
    except (ValueError, TypeError) as error:
        raise ConversionError(str(error)) from error


def _resample(params: dict[str, Any], spec: ViTSpec, image_size: int):
    if type(image_size) is not int or image_size > _MAX_GRID * spec.patch_size:
        raise ConversionError(
            f"image_size = {image_size!r}: give pixels as an integer, at most "
            f"{_MAX_GRID} patches of {spec.patch_size}."
        )
    try:
        new = spec.replace(image_size=image_size)
    except (ValueError, TypeError) as error:
        raise ConversionError(f"image_size = {image_size!r}: {error}") from error
    logging.getLogger(__name__).warning(
        "position embedding resampled from %d x %d to %d x %d patches",
        *(spec.grid, spec.grid, new.grid, new.grid),
    )
    prefix = spec.num_prefix if spec.pos_embed_prefix else 0
    table = params["pos_embed"]
    grid = table[prefix:].reshape(spec.grid, spec.grid, -1)
    grid = resample_grid(grid, new.grid).reshape(-1, table.shape[1])
    return params | {"pos_embed": np.concatenate([table[:prefix], grid])}, new


def resample_grid(grid: np.ndarray, size: int) -> np.ndarray:
    """Bicubic resampling with antialiasing of [g, g, D] to [size, size, D].

    Keys' kernel with a = -1/2, widened when shrinking and normalised at the edges: what
    torch's `interpolate(mode="bicubic", antialias=True)` does, as timm uses it.
    """
    weights = _bicubic_weights(grid.shape[0], size)
    out = np.einsum("ag,bh,ghd->abd", weights, weights, grid, optimize=True)
    return out.astype(grid.dtype)


def _bicubic_weights(old: int, new: int) -> np.ndarray:
    scale = max(old / new, 1.0)
    centres = (np.arange(new)[:, None] + 0.5) * old / new - 0.5
    x = np.abs(centres - np.arange(old)) / scale
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    return weights / weights.sum(1, keepdims=True)


def to_timm(params: dict[str, Any], spec: ViTSpec) -> dict[str, np.ndarray]:
    """The state dict of this spec under timm's names.

    timm's VisionTransformer (VisionTransformerDistilled) of this spec loads it, but for
    a `pre_logits` layer: it is written as `pre_logits.fc`, which timm once had. Nor has
    timm registers beside a distillation token.

    Args:
      params: of the full network.
      spec: its sizes.

    Returns:
      Contiguous arrays by timm's names, in the table's order.

    Raises:
      ConversionError: if params and spec disagree; every key is listed.
    """
    flat = tensor_layout.unnest(params, spec)
    if spec.distilled:  # there timm norms all tokens: the same for those that are read
        flat = {path.replace("fc_norm", "norm"): x for path, x in flat.items()}
    if spec.pre_norm and not flat["patch_embed/bias"].any():
        del flat["patch_embed/bias"]  # timm has none in front of norm_pre
    return tensor_layout.named("timm", flat, spec)


def write_timm(path: str | os.PathLike, params: dict[str, Any], spec: ViTSpec) -> None:
    """Writes `to_timm(params, spec)` as safetensors, whole or not at all.

    Args:
      path: of the file, whose folder is made; what is there is replaced.
      params: of the full network.
      spec: its sizes.

    Raises:
      ConversionError: if params and spec disagree.
    """
    # Not save_file, which lets nobody else read what it wrote.
    save = require("safetensors.numpy").save
    content = save(to_timm(params, spec), metadata={"format": "pt"})
    target = directory.local(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with directory.replaced(target) as fresh:
        fresh.write_bytes(content)
