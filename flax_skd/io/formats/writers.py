"""The table of export formats: what each is, and the function that writes it."""

from collections.abc import Callable
from typing import NamedTuple

from flax_skd.io import checkpoint
from flax_skd.io.formats import arrays, flax_attention, onnx, stablehlo, timm


class Format(NamedTuple):
    """One export format.

    Attributes:
      summary: one line.
      write: function (directory, network, *, overwrite, and `options`).
      files: what it writes there.
      options: keywords of `write` that a user may set.
      equal_heads: whether q/k and v/out are padded to one width.
    """

    summary: str
    write: Callable[..., None]
    files: tuple[str, ...]
    options: tuple[str, ...] = ()
    equal_heads: bool = False


FORMATS = {
    "safetensors": Format(
        "a sub-network directory: safetensors and spec.json",
        arrays.write_safetensors,
        checkpoint.SUBNET_FILES,
    ),
    "npz": Format(
        "the same arrays as npz, with spec.json", arrays.write_npz, arrays.NPZ_FILES
    ),
    "flax": Format(
        "npz for plain flax.linen.MultiHeadDotProductAttention, vit_jax's names",
        flax_attention.write,
        flax_attention.FILES,
        equal_heads=True,
    ),
    "nnx": Format(
        "a sub-network directory that formats.nnx.load turns into an NNX module",
        arrays.write_safetensors,
        checkpoint.SUBNET_FILES,
    ),
    "timm": Format(
        "timm's state dict as safetensors", timm.write, timm.FILES, equal_heads=True
    ),
    "jax_export": Format(
        "StableHLO of jax.export, any batch size",
        stablehlo.write,
        stablehlo.FILES,
        ("platforms",),
    ),
    "onnx": Format("one ONNX file, any batch size", onnx.write, onnx.FILES, ("opset",)),
}


def named(names: list[str]) -> dict[str, Format]:
    """The formats of these names, each once.

    Raises:
      ValueError: if there is none, or one is unknown; the known ones are listed.
    """
    unknown = [name for name in names if name not in FORMATS]
    if unknown or not names:
        lines = [f"  {name:12}{f.summary}" for name, f in FORMATS.items()]
        raise ValueError(
            f"no format {', '.join(unknown) or 'given'}; there are:\n"
            + "\n".join(lines)
        )
    return {name: FORMATS[name] for name in names}
