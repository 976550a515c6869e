"""What weights cannot tell: fields from a config, a variant, a recipe or the caller.

Nothing is guessed from a file's or an architecture's name.
"""

import dataclasses
import math
from typing import Any

from flax_skd.io.weight_files import ConversionError
from flax_skd.method.spec import HALF, IMAGENET_MEAN, IMAGENET_STD, ViTSpec

_EXACT = {"norm_eps": 1e-6, "gelu": "exact", "interpolation": "bicubic"}
_IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
# How published families were trained and are evaluated.
RECIPES: dict[str, dict[str, Any]] = {
    # timm's port of AugReg, run with timm's layers.
    "augreg": {**_EXACT, "mean": HALF, "std": HALF, "crop_fraction": 0.9},
    # The same weights as vit_jax runs them: tanh GELU, a square of the whole image.
    "augreg_jax": {
        **_EXACT,
        "gelu": "tanh",
        "interpolation": "bilinear",
        "mean": HALF,
        "std": HALF,
        "crop_fraction": 1.0,
        "crop_mode": "squash",
    },
    # 0.9 as timm evaluates DeiT at 224 pixels.
    "deit": {**_EXACT, **_IMAGENET, "crop_fraction": 0.9},
    # The whole image; timm takes 0.9 for those of ImageNet-1k alone at 224 pixels.
    "deit3": {**_EXACT, **_IMAGENET, "crop_fraction": 1.0},
}
_RECIPE_WAY = f"recipe= (one of {', '.join(RECIPES)})"
_WAYS = {
    "num_heads": "variant= (such as 'Ti/16'), a Hugging Face folder's config.json",
    "pool": f"{_RECIPE_WAY}, a timm folder's config.json",
    "norm_eps": f"{_RECIPE_WAY}, a Hugging Face folder's config.json",
    "gelu": f"{_RECIPE_WAY}, a Hugging Face folder's config.json",
    **{
        name: f"{_RECIPE_WAY}, a folder's config.json or preprocessor_config.json"
        for name in ("mean", "std", "crop_fraction", "interpolation")
    },
}
_GELU = {
    "gelu": "exact",
    "gelu_python": "exact",
    "gelu_new": "tanh",
    "gelu_fast": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}  # PIL's numbers
_HF_NAMES = {
    "num_heads": "num_attention_heads",
    "norm_eps": "layer_norm_eps",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "mlp_dim": "intermediate_size",
    "patch_size": "patch_size",
    "in_channels": "num_channels",
    "image_size": "image_size",
}
_VARIANT_FIELDS = ("width", "depth", "mlp_dim", "patch_size", "num_heads")


def from_timm(beside: dict[str, dict]) -> dict[str, Any]:
    """Fields of a timm folder's `config.json`: preprocessing and pooling."""
    config = beside.get("config", {})
    trained = config.get("pretrained_cfg", config)
    if not isinstance(trained, dict):
        raise ConversionError("config.json: pretrained_cfg is no JSON object.")
    names = {"mean": "mean", "std": "std", "crop_fraction": "crop_pct"}
    names |= {name: name for name in ("interpolation", "crop_mode")}
    found = {k: trained[n] for k, n in names.items() if n in trained}
    if config.get("global_pool"):
        found["pool"] = config["global_pool"]
    return found


def from_huggingface(beside: dict[str, dict]) -> dict[str, Any]:
    """Fields of a Hugging Face folder's `config.json` and preprocessor."""
    config = beside.get("config", {})
    found = {k: config[n] for k, n in _HF_NAMES.items() if n in config}
    for name in ("image_size", "patch_size"):  # [224, 224] is 224
        side = found.get(name)
        if isinstance(side, list) and side and side.count(side[0]) == len(side):
            found[name] = side[0]
    if "hidden_act" in config:
        act = str(config["hidden_act"])
        if act not in _GELU:
            raise ConversionError(
                f"config.json: hidden_act {act!r} is not supported, only "
                f"{', '.join(_GELU)}."
            )
        found["gelu"] = _GELU[act]
    if "pooler_act" in config:
        found["pooler_act"] = config["pooler_act"]
    channels = found.get("in_channels", 3)
    channels = channels if type(channels) is int else 3  # refused with the sizes
    return found | _preprocessing(beside.get("preprocessor", {}), channels)


def _preprocessing(processor: dict[str, Any], channels: int) -> dict[str, Any]:
    if not processor:
        return {}
    if not processor.get("do_resize", True):
        raise ConversionError(
            "preprocessor_config.json: do_resize = false leaves images as large as they "
            "come, and this network takes one size: set it to true, with a size."
        )
    found = _normalisation(processor, channels)
    if "resample" in processor:
        if processor["resample"] not in (2, 3):
            raise ConversionError(
                f"preprocessor_config.json: resample = {processor['resample']!r} is "
                "not supported, only 2 (bilinear) and 3 (bicubic)."
            )
        found["interpolation"] = _RESAMPLE[processor["resample"]]
    if not processor.get("do_center_crop", False):
        found["crop_fraction"] = 1.0
    elif "size" in processor and "crop_size" in processor:
        sides = _side(processor["crop_size"]), _side(processor["size"])
        found["crop_fraction"] = _fraction(*sides)
    if "size" in processor:
        found["crop_mode"] = "squash" if _is_square(processor) else "center"
    return found


def _normalisation(processor: dict[str, Any], channels: int) -> dict[str, Any]:
    """Mean and std of pixels scaled to [0, 1], whatever they are scaled to there."""
    factor = processor.get("rescale_factor", 1 / 255)
    if not processor.get("do_rescale", True):
        factor = 1.0
    if not _is_number(factor) or not 0 < factor < float("inf"):
        raise ConversionError(
            f"preprocessor_config.json: rescale_factor = {factor!r} is no positive "
            "number."
        )
    found: dict[str, Any] = {"mean": 0.0, "std": 1.0}
    if processor.get("do_normalize", True):
        names = [name for name in found if f"image_{name}" in processor]
        found = {name: processor[f"image_{name}"] for name in names}
    # One number is of all channels.
    found = {k: [v] * channels if _is_number(v) else v for k, v in found.items()}
    for name, values in found.items():
        if not isinstance(values, list) or not all(map(_is_number, values)):
            raise ConversionError(
                f"preprocessor_config.json: image_{name} = {values!r:.200} must be a "
                "number, or a list of numbers, one a channel."
            )
    scale = 1.0 if abs(255 * factor - 1) < 1e-6 else 255 * factor
    try:
        return {k: [x / scale for x in v] for k, v in found.items()}
    except OverflowError as error:
        raise ConversionError(
            f"preprocessor_config.json: image_mean and image_std of {found!s:.200} are "
            "too large."
        ) from error


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_square(processor: dict[str, Any]) -> bool:
    """Whether `size` is of both sides. One number is, but for CLIP's and BiT's kinds."""
    size = processor["size"]
    if isinstance(size, dict):
        return "shortest_edge" not in size
    kind = str(
        processor.get("image_processor_type", processor.get("feature_extractor_type"))
    )
    return not kind.startswith(("CLIP", "Bit"))


def _side(size: Any) -> float:
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    if not _is_number(size) or not 1 <= size < 2**31:
        raise ConversionError(f"preprocessor_config.json: size {size!r} is no length.")
    return size


def _fraction(crop: float, size: float) -> float:
    """crop / size, from which the size is got back: rounded, it may be a pixel less."""
    fraction = crop / size
    return fraction if crop / fraction >= size else math.nextafter(fraction, 0)


def resolve(
    facts: dict[str, Any],
    *,
    likely: dict[str, Any],
    config: dict[str, Any],
    variant: str | None,
    recipe: str | None,
    fields: dict[str, Any] | None,
) -> dict[str, Any]:
    """All fields of the spec: `fields`, then config, then variant and recipe.

    Args:
      facts: what the tensors prove; nothing may contradict it.
      likely: what the tensors suggest, above the recipe and below the config.
      config: what JSON files beside the weights say.
      variant: a published size, such as `Ti/16`.
      recipe: a key of `RECIPES`.
      fields: of `ViTSpec`, by the caller.

    Raises:
      ConversionError: if sources contradict one another or the tensors, or a field
        stays unknown; the message lists all of them and how to give them.
    """
    fields = dict(fields or {})
    known = {f.name for f in dataclasses.fields(ViTSpec)}
    if set(fields) - known:
        raise ConversionError(
            f"fields: {sorted(set(fields) - known)} are no fields of ViTSpec: "
            f"{sorted(known)}."
        )
    if recipe is not None and recipe not in RECIPES:
        raise ConversionError(f"recipe {recipe!r}: choose one of {', '.join(RECIPES)}.")
    named = _variant(variant)
    given = [("fields", fields), ("config", config), (f"variant {variant}", named)]
    _check_conflicts(facts, given)
    pooler = config.get("pooler_act", "tanh")
    if facts.get("pre_logits") and pooler != "tanh":
        raise ConversionError(
            f"config.json: pooler_act {pooler!r} is not supported, only tanh."
        )
    recipe_fields = {"pool": "token", **RECIPES[recipe]} if recipe else {}
    merged = recipe_fields | named | likely | config | facts | fields
    unknown = sorted(set(_WAYS) - set(merged))
    if unknown:
        listed = "".join(
            f"\n  {name}: {_WAYS[name]}, or fields={{{name!r}: ...}}"
            for name in unknown
        )
        raise ConversionError(f"the file does not tell these, give each:{listed}")
    return {k: v for k, v in merged.items() if k in known}


def _variant(variant: str | None) -> dict[str, Any]:
    if variant is None:
        return {}
    try:
        spec = ViTSpec.named(variant)
    except ValueError as error:
        raise ConversionError(str(error)) from error
    return {name: getattr(spec, name) for name in _VARIANT_FIELDS}


def _check_conflicts(facts: dict[str, Any], given: list[tuple[str, dict[str, Any]]]):
    config, named = given[1], given[2]
    lines = [
        f"\n  {name}: {source} says {value!r}, the tensors {facts[name]!r}"
        for source, fields in given
        for name, value in fields.items()
        if name in facts and value != facts[name]
    ]
    lines += [
        f"\n  {name}: {named[0]} says {named[1][name]!r}, config {config[1][name]!r}"
        for name in named[1]
        if name in config[1] and name not in facts
        if named[1][name] != config[1][name]
    ]
    if lines:
        raise ConversionError(f"sources contradict one another:{''.join(lines)}")
