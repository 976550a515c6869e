"""Sizes of a Vision Transformer and of the sub-networks cut from it."""

import contextlib
import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

_SIZES = {  # name: width, depth, num_heads, mlp_dim
    "Ti": (192, 12, 3, 768),
    "S": (384, 12, 6, 1536),
    "B": (768, 12, 12, 3072),
    "L": (1024, 24, 16, 4096),
    "H": (1280, 32, 16, 5120),
}
_COUNTS = {  # name: least
    **dict.fromkeys(("image_size", "patch_size", "width", "depth", "num_heads"), 1),
    **dict.fromkeys(("head_dim", "mlp_dim", "in_channels"), 1),
    **dict.fromkeys(("num_classes", "registers", "pre_logits"), 0),
}
_CHOICES = {
    "pool": ("token", "avg"),
    "gelu": ("exact", "tanh"),
    "interpolation": ("bicubic", "bilinear"),
    "crop_mode": ("center", "squash"),
    **dict.fromkeys(("class_token", "distilled", "pos_embed_prefix"), (False, True)),
    **dict.fromkeys(("qkv_bias", "layer_scale", "pre_norm", "fc_norm"), (False, True)),
}


@dataclasses.dataclass(frozen=True)
class ViTSpec:
    """Everything that fixes the function of a full ViT but its parameters.

    Sizes are counts; `image_size` and `patch_size` are pixels of a square image.
    `head_dim` defaults to `width / num_heads`.

    Attributes:
      pool: what the head reads: the class token (`token`) or the mean of the patch
        tokens (`avg`).
      class_token, distilled, registers: tokens in front of the patches, in the order
        class, distillation, registers. A distilled network has a second head and its
        logits are the mean of both.
      pos_embed_prefix: whether those tokens have position embeddings too.
      pre_logits: width of a tanh layer before the head, 0 for none.
      qkv_bias: whether queries, keys and values have biases.
      layer_scale: a learnt factor for every dim of what a branch adds.
      pre_norm: LayerNorm between the embedding and the first block.
      fc_norm: the last LayerNorm acts on the pooled feature, not on the tokens.
      gelu: `exact` (by erf) or the `tanh` approximation.
      norm_eps: LayerNorm epsilon.
      mean, std: the image normalisation the parameters were trained with, of pixels
        scaled to [0, 1].
      crop_fraction, crop_mode: evaluation resizes the short side (`center`), or both
        sides whatever their ratio (`squash`), to `image_size / crop_fraction` and takes
        the central square.
      interpolation: of that resizing, `bicubic` or `bilinear`.

    Raises:
      ValueError: if a field is not possible; the message says which and why.
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_dim: int
    num_classes: int
    head_dim: int = 0
    in_channels: int = 3
    pool: str = "token"
    class_token: bool = True
    distilled: bool = False
    registers: int = 0
    pos_embed_prefix: bool = True
    pre_logits: int = 0
    qkv_bias: bool = True
    layer_scale: bool = False
    pre_norm: bool = False
    fc_norm: bool = False
    gelu: str = "exact"
    norm_eps: float = 1e-6
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    crop_fraction: float = 0.9
    interpolation: str = "bicubic"
    crop_mode: str = "center"

    def __post_init__(self):
        put = functools.partial(object.__setattr__, self)  # the class is frozen
        for name in _COUNTS:
            put(name, whole(name, getattr(self, name)))
        if not self.head_dim:
            if self.num_heads < 1 or self.width % self.num_heads:
                raise ValueError(
                    f"num_heads = {self.num_heads} does not divide width = "
                    f"{self.width}: choose a divisor, or give head_dim."
                )
            put("head_dim", self.width // self.num_heads)
        self._check()
        for name in ("mean", "std"):
            put(name, _channels(name, getattr(self, name), self.in_channels))
        for name in ("norm_eps", "crop_fraction"):
            put(name, _finite(name, getattr(self, name)))
        if min(*self.std, self.norm_eps) <= 0 or not 0 < self.crop_fraction <= 1:
            raise ValueError(
                f"std = {self.std} and norm_eps = {self.norm_eps} must be positive and "
                f"crop_fraction = {self.crop_fraction} in (0, 1]."
            )

    def _check(self):
        for name, least in _COUNTS.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} = {value} must be at least {least}.")
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} = {value!r}: choose one of {allowed}.")
            object.__setattr__(self, name, allowed[allowed.index(value)])  # 1 is True
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size = {self.patch_size} does not divide image_size = {self.image_size}."
            )
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool = 'token' needs class_token = True; or use 'avg'.")
        if self.distilled and self.pool != "token":
            raise ValueError("a distilled network reads its tokens: pool = 'token'.")
        apart = self.distilled and self.pre_logits not in (0, self.width)
        if apart and not self.num_classes:
            raise ValueError(
                f"pre_logits = {self.pre_logits} and width = {self.width} of a distilled "
                "network without a head: its two features cannot be averaged."
            )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_prefix(self) -> int:
        """Tokens in front of the patches."""
        return self.class_token + self.distilled + self.registers

    @property
    def num_tokens(self) -> int:
        """Tokens in every block, N."""
        return self.grid**2 + self.num_prefix

    def replace(self, **changes: Any) -> "ViTSpec":
        """This spec with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Fields as JSON can hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "ViTSpec":
        """The inverse of `to_dict`; unknown or missing fields are errors."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        needed = {n for n, f in known.items() if f.default is dataclasses.MISSING}
        surplus = sorted(set(fields) - set(known))
        missing = sorted(needed - set(fields))
        if surplus or missing:
            raise ValueError(
                f"not a ViTSpec: unknown fields {surplus}, missing fields {missing}."
            )
        for name, value in fields.items():
            wanted = known[name].type
            kinds = (int, float) if wanted is float else (wanted,)
            if wanted in (int, float, str, bool) and type(value) not in kinds:
                raise ValueError(
                    f"not a ViTSpec: {name} = {value!r} should be {wanted.__name__}."
                )
        return cls(**fields)

    @classmethod
    def named(
        cls, name: str, *, image_size: int = 224, num_classes: int = 1000
    ) -> "ViTSpec":
        """A plain ViT of a published size: `Ti/16`, `B/32`, `H/14`; no extras.

        Args:
          name: one of Ti, S, B, L, H, a slash, and the patch size in pixels.
          image_size: pixels.
          num_classes: of the head; 0 for a backbone without one.

        Raises:
          ValueError: if the name is not known; the message lists what is.
        """
        size, _, patch = name.partition("/")
        if size not in _SIZES or not patch.isdigit():
            raise ValueError(
                f"unknown variant {name!r}: write size/patch, size one of "
                f"{', '.join(_SIZES)}, for example Ti/16."
            )
        return cls(image_size, int(patch), *_SIZES[size], num_classes)


def whole(name: str, value: Any) -> int:
    """An int of any integer; what is not whole would be cut off in silence."""
    try:
        return int(operator.index(value))
    except TypeError as error:
        raise ValueError(f"{name} = {value!r} must be a whole number.") from error


def _finite(name: str, value: Any) -> float:
    """A float of a finite number; a text of one is none."""
    with contextlib.suppress(TypeError, OverflowError):
        if math.isfinite(value):
            return float(value)
    raise ValueError(f"{name} = {value!r} must be a finite number.")


def _channels(name: str, values: Any, count: int) -> tuple[float, ...]:
    """One number a channel; JSON hands lists back."""
    found = tuple(values) if hasattr(values, "__iter__") else ()
    if len(found) != count:
        raise ValueError(
            f"{name} = {values!r} needs one number for each of the {count} channels."
        )
    return tuple(_finite(name, value) for value in found)


class SubnetSpec(NamedTuple):
    """Widths of a sub-network: kept dims of every branch, one entry a block.

    The same nouns serve as static sizes (tuples of ints, hashable) and as traced data
    (integer arrays [..., L]); a NamedTuple is both without importing jax.

    Attributes:
      qk_dim: kept dims of queries and keys in every head; 0 removes attention.
      vo_dim: kept dims of values and out in every head; 0 with `qk_dim` only.
      mlp_dim: kept hidden units; 0 removes the MLP.
    """

    qk_dim: Any
    vo_dim: Any
    mlp_dim: Any

    @classmethod
    def uniform(
        cls, spec: ViTSpec, qk_dim: int, vo_dim: int, mlp_dim: int
    ) -> "SubnetSpec":
        """The same widths in every block."""
        return cls(*((w,) * spec.depth for w in (qk_dim, vo_dim, mlp_dim))).check(spec)

    @classmethod
    def full(cls, spec: ViTSpec) -> "SubnetSpec":
        """The widths of the whole network."""
        return cls.uniform(spec, spec.head_dim, spec.head_dim, spec.mlp_dim)

    def of_blocks(self) -> "SubnetSpec":
        """Returns these; ValueError for a number meant for all blocks, or a name."""
        for name, field in zip(self._fields, self):
            some = getattr(field, "shape", hasattr(field, "__len__"))
            if isinstance(field, str) or not some:
                raise ValueError(
                    f"{name} = {field!r}: give one width for every block, or use "
                    "SubnetSpec.uniform; of a dict, SubnetSpec(**widths)."
                )
        return self

    def static(self) -> "SubnetSpec":
        """These as tuples of ints; ValueError for what is not whole."""
        fields = self.of_blocks()._asdict().items()
        return SubnetSpec(*(tuple(whole(k, w) for w in field) for k, field in fields))

    def check(self, spec: ViTSpec) -> "SubnetSpec":
        """Returns these widths as tuples of ints.

        Raises:
          ValueError: if they do not fit `spec`; the message names the block.
        """
        full = (spec.head_dim, spec.head_dim, spec.mlp_dim)
        widths = self.static()
        for name, field, most in zip(self._fields, widths, full):
            if len(field) != spec.depth:
                raise ValueError(
                    f"{name} has {len(field)} entries, the network {spec.depth} blocks."
                )
            for block, w in enumerate(field):
                if not 0 <= w <= most:
                    raise ValueError(
                        f"{name} = {w} in block {block}: must be 0 to {most}."
                    )
        for block, (qk, vo) in enumerate(zip(widths.qk_dim, widths.vo_dim)):
            if (qk == 0) != (vo == 0):
                raise ValueError(
                    f"block {block}: qk_dim = {qk}, vo_dim = {vo}; attention is "
                    "removed by both being 0, and kept by neither."
                )
        return widths
