"""Multiply-accumulates and parameters of any sub-network, in closed form.

Two conventions, always named:
  * `full`: every matrix product and nothing else.
  * `paper`: linear layers with biases, GELU (1 an element) and LayerNorm (2 an
    element), patch embedding and head included, but not q k^T and attention times v
    (Li et al., AAAI 2026).
Counts are Python ints for one image: ViT-B/16 overflows int32.
"""

import math
from typing import NamedTuple

from flax_skd.method.spec import SubnetSpec, ViTSpec

CONVENTIONS = ("full", "paper")


class Prices(NamedTuple):
    """What makes up the MACs of an image: what any width has, and what each dim adds.

    Attributes:
      embed_and_head: patch embedding, pre-logits, heads, last LayerNorm.
      qk, vo, mlp: of one kept dim per head, or of one hidden unit, in one block.
      attn_fixed, mlp_fixed: of a branch that is there at all, whatever its width.
    """

    embed_and_head: int
    qk: int
    vo: int
    mlp: int
    attn_fixed: int
    mlp_fixed: int


def prices(spec: ViTSpec, *, convention: str = "full") -> Prices:
    """The six numbers every count is a sum of.

    Raises:
      ValueError: if the convention is unknown.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention {convention!r}: choose one of {CONVENTIONS}.")
    n, d, h, patches = spec.num_tokens, spec.width, spec.num_heads, spec.grid**2
    patch = spec.patch_size**2 * spec.in_channels
    heads = spec.num_classes * (1 + spec.distilled)
    ends = patches * patch * d + d * spec.pre_logits + _head_kernels(spec)
    if convention == "full":
        pair = 2 * n * d * h + n * n * h  # two projections and one N x N product
        return Prices(ends, qk=pair, vo=pair, mlp=2 * n * d, attn_fixed=0, mlp_fixed=0)
    norm = 2 * d
    last = 1 + spec.distilled if spec.fc_norm else n  # what the last LayerNorm sees
    norms = last * norm + spec.pre_norm * n * norm
    ends += patches * d + spec.pre_logits + heads + norms
    bias = n * h * spec.qkv_bias
    return Prices(
        ends,
        qk=2 * n * d * h + 2 * bias,
        vo=2 * n * d * h + bias,
        mlp=2 * n * d + 2 * n,  # the bias and the GELU of a hidden unit
        attn_fixed=n * d + n * norm,  # the bias of `out`, and LayerNorm
        mlp_fixed=n * d + n * norm,
    )


def _head_kernels(spec: ViTSpec) -> int:
    # The distillation token's head reads the token itself.
    read = (spec.pre_logits or spec.width) + spec.width * spec.distilled
    return read * spec.num_classes


def macs(
    spec: ViTSpec, widths: SubnetSpec | None = None, *, convention: str = "full"
) -> int:
    """Multiply-accumulates of one image through a sub-network.

    Args:
      spec: the full network.
      widths: None for the full network.
      convention: `full` or `paper`.

    Returns:
      A count of the whole network, embedding and head included; `macs.readable` is
      for printing it.

    Raises:
      ValueError: if the convention is unknown, or the widths do not fit `spec`.
    """
    price = prices(spec, convention=convention)
    return price.embed_and_head + sum(
        qk * price.qk
        + vo * price.vo
        + mlp * price.mlp
        + bool(vo) * price.attn_fixed
        + bool(mlp) * price.mlp_fixed
        for qk, vo, mlp in zip(*_known(spec, widths))
    )


def _known(spec: ViTSpec, widths: SubnetSpec | None) -> SubnetSpec:
    if isinstance(widths, str) and widths in CONVENTIONS:
        raise ValueError(
            f"widths = {widths!r}: give it by name, convention={widths!r}."
        )
    return SubnetSpec.full(spec) if widths is None else SubnetSpec(*widths).check(spec)


def param_count(spec: ViTSpec, widths: SubnetSpec | None = None) -> int:
    """Number of parameters of a sub-network.

    Args:
      spec: the full network.
      widths: None for the full network.

    Returns:
      A count of numbers, biases and embeddings included.

    Raises:
      ValueError: if the widths do not fit `spec`; the message names the block.
    """
    d, h = spec.width, spec.num_heads
    tokens = spec.num_tokens if spec.pos_embed_prefix else spec.grid**2
    total = spec.patch_size**2 * spec.in_channels * d + d + (tokens * d)
    total += spec.num_prefix * d + 2 * d * (1 + spec.pre_norm)
    total += spec.pre_logits * (d + 1)
    total += _head_kernels(spec) + spec.num_classes * (1 + spec.distilled)
    scale = d * spec.layer_scale
    for qk, vo, mlp in zip(*_known(spec, widths)):
        if vo:
            total += 2 * d + scale + 2 * h * (qk + vo) * d + d
            total += (2 * qk + vo) * h * spec.qkv_bias
        if mlp:
            total += 2 * d + scale + 2 * d * mlp + mlp + d
    return total


def branch_fraction(spec: ViTSpec, widths: SubnetSpec) -> float:
    """Block MACs of a sub-network over those of the full one, `full` convention."""
    ends = prices(spec).embed_and_head
    return (macs(spec, widths) - ends) / (macs(spec) - ends)


def readable(count: float) -> str:
    """A count for a table: `1.254G`, `93.2M`, `512`."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size * (1 - 5e-5):  # what rounds to a thousand of the next
            digits = max(0, 3 - int(math.log10(count / size)))
            return f"{count / size:.{digits}f}{unit}"
    return str(count)
