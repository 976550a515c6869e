"""The one Vision Transformer: full, masked or extracted, by data alone."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_skd.method.attention import fastest_attention
from flax_skd.method.layers import (
    Array,
    LayerNorm,
    Linear,
    gelu,
    parameter,
    repeated,
    times,
    together,
)
from flax_skd.method.spec import SubnetSpec, ViTSpec

Params = dict[str, Any]
Taps = Callable[[int, str, Array], Array]

_embed_init = nn.initializers.normal(0.02)


class BlockMasks(NamedTuple):
    """Multipliers of one block, shared or one row an example; None for all ones.

    Attributes:
      qk: [d] or [B, d], of the dims of queries (and so of keys) in every head.
      vo: [d] or [B, d], of the dims of values in every head.
      mlp: [M] or [B, M], of the hidden units after the nonlinearity.
      attn_gate, mlp_gate: [] or [B], of what the branch adds to the residual stream;
        0 also silences the branch's biases. Stochastic depth is a random gate.
    """

    qk: Array | None = None
    vo: Array | None = None
    mlp: Array | None = None
    attn_gate: Array | None = None
    mlp_gate: Array | None = None


class Block(nn.Module):
    """Attention and MLP, each behind its LayerNorm and added to its input."""

    spec: ViTSpec
    index: int
    qk_dim: int
    vo_dim: int
    mlp_dim: int
    dtype: Any
    attention: Callable[..., Array]

    @nn.compact
    def __call__(
        self, x: Array, masks: BlockMasks | None = None, taps: Taps | None = None
    ) -> Array:
        masks = masks or BlockMasks()
        tap = functools.partial(taps, self.index) if taps else lambda name, f: f
        for branch, gate, number in (
            (self._attn, masks.attn_gate, 1),
            (self._mlp, masks.mlp_gate, 2),
        ):
            if not (self.qk_dim if number == 1 else self.mlp_dim):
                continue
            norm = LayerNorm(self.spec.norm_eps, name=f"norm{number}")
            y = branch(norm(x), masks, tap)
            if self.spec.layer_scale:
                size, ones = (self.spec.width,), nn.initializers.ones
                scale = parameter(self, f"layer_scale{number}", ones, size)
                y = times(y, scale)
            y = tap("attn_out" if number == 1 else "mlp_out", y)
            x = x + (y if gate is None else times(y, gate[..., None]))
        return x

    def _attn(self, x: Array, masks: BlockMasks, tap) -> Array:
        sizes = self.qk_dim, self.vo_dim, self.dtype, self.attention
        return _Heads(self.spec, *sizes, name="attn")(x, masks, tap)

    def _mlp(self, x: Array, masks: BlockMasks, tap) -> Array:
        return _MLP(self.spec, self.mlp_dim, self.dtype, name="mlp")(x, masks, tap)


class _Heads(nn.Module):
    spec: ViTSpec
    qk_dim: int
    vo_dim: int
    dtype: Any
    attention: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Array, masks: BlockMasks, tap) -> Array:
        spec = self.spec

        def linear(name, width):
            shape = (spec.width, spec.num_heads, width)
            return Linear("bnd,dhe->bhne", shape, spec.qkv_bias, self.dtype, name=name)

        widths = {"query": self.qk_dim, "key": self.qk_dim, "value": self.vo_dim}
        made = together([linear(*item) for item in widths.items()], x)
        q, k, v = (tap(name, y) for name, y in zip(widths, made))
        q = times(q, masks.qk)
        # The scale is the full head's: a cut head is a part of it, not another head.
        z = tap("mixed", self.attention(q, k, v, spec.head_dim**-0.5))
        z = times(z, masks.vo)  # what is cut of values is cut of what attention mixes
        shape = (spec.num_heads, self.vo_dim, spec.width)
        return Linear("bhne,hed->bnd", shape, dtype=self.dtype, name="out")(z)


class _MLP(nn.Module):
    spec: ViTSpec
    mlp_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, masks: BlockMasks, tap) -> Array:
        width = self.spec.width
        fc1 = Linear("bnd,dm->bnm", (width, self.mlp_dim), dtype=self.dtype, name="fc1")
        hidden = times(tap("hidden", gelu(fc1(x), self.spec.gelu)), masks.mlp)
        fc2 = Linear("bnm,md->bnd", (self.mlp_dim, width), dtype=self.dtype, name="fc2")
        return fc2(hidden)


def normalise(images: Array, spec: ViTSpec) -> Array:
    """uint8 pixels to what the network was trained on; floats pass untouched.

    Args:
      images: [B, S, S, C], uint8, or float already normalised.
      spec: whose mean and std apply.

    Raises:
      ValueError: for other integers, which are neither.
    """
    if images.dtype != jnp.uint8:
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"images are {images.dtype}: give pixels as uint8, or normalised floats."
            )
        return images
    mean, std = (jnp.float32(m).reshape(1, 1, 1, -1) for m in (spec.mean, spec.std))
    return (images.astype(jnp.float32) / 255 - mean) / std


class ViT(nn.Module):
    """A Vision Transformer of any sub-network widths.

    Attributes:
      spec: the full network.
      widths: static widths of an extracted sub-network; None for the full network.
      dtype: of the computation, float32 or bfloat16. Parameters, LayerNorm, softmax
        and logits are float32 in both.
      attention: function (q, k, v, scale) -> mixed values, of `method.attention`.
      remat: recompute each block in the backward pass instead of storing it.

    Raises:
      ValueError: if the widths do not fit `spec`; the message names the block.
    """

    spec: ViTSpec
    widths: SubnetSpec | None = None
    dtype: Any = jnp.float32
    attention: Callable[..., Array] = fastest_attention
    remat: bool = False

    def __post_init__(self):
        if self.widths is not None:  # tuples: with lists or arrays it has no hash
            self.widths = SubnetSpec(*self.widths).check(self.spec)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        images: Array,
        masks: tuple[BlockMasks, ...] | None = None,
        taps: Taps | None = None,
    ) -> Array:
        """Logits [B, K] in float32, or the pooled feature [B, D] if K = 0.

        Args:
          images: [B, S, S, C], uint8 pixels or normalised floats.
          masks: one `BlockMasks` a block (`subnet.masks`); traced, so that one
            compilation serves every sub-network.
          taps: function (block, name, feature) -> feature, called on `query`, `key`,
            `value` [B, H, N, d] and `hidden` [B, N, M] before their masks, on the
            head outputs `mixed` [B, H, N, d], also before their mask, on what a branch
            adds to the stream, `attn_out`, `mlp_out` [B, N, D], after LayerScale and
            before the gate, and, as block L, on what `head` and `head_dist` read [B, D].

        Raises:
          ValueError: if the images are not of the spec's size.
        """
        spec = self.spec
        want = (spec.image_size, spec.image_size, spec.in_channels)
        if images.shape[1:] != want:
            raise ValueError(
                f"images have shape {images.shape}, the network takes (batch, "
                f"{', '.join(map(str, want))}): preprocess them, or resample the "
                "position embedding at conversion (image_size)."
            )
        x = self._embed(normalise(images, spec))
        widths = SubnetSpec.full(spec) if self.widths is None else self.widths
        block_type = nn.remat(Block) if self.remat and taps is None else Block
        for i, sizes in enumerate(zip(*widths)):
            sizes = (*sizes, self.dtype, self.attention)
            block = block_type(spec, i, *sizes, name=f"block_{i}")
            x = block(x, masks[i] if masks else None, taps)
        return self._head(x, taps or (lambda block, name, feature: feature))

    def _embed(self, images: Array) -> Array:
        spec, g, p = self.spec, self.spec.grid, self.spec.patch_size
        patches = images.reshape(-1, g, p, g, p, spec.in_channels).swapaxes(2, 3)
        patches = patches.reshape(-1, g * g, p, p, spec.in_channels)
        shape = (p, p, spec.in_channels, spec.width)
        embed = Linear("bnpqc,pqcd->bnd", shape, dtype=self.dtype, name="patch_embed")
        x = embed(patches)
        prefix = self._prefix(x.shape[0])
        count = spec.num_tokens if spec.pos_embed_prefix else g * g
        position = parameter(self, "pos_embed", _embed_init, (count, spec.width))
        position = repeated(position.astype(self.dtype), x.shape[0])
        if not spec.pos_embed_prefix:
            x = x + position
        x = jnp.concatenate([*prefix, x], axis=1)
        if spec.pos_embed_prefix:
            x = x + position
        if spec.pre_norm:
            x = LayerNorm(spec.norm_eps, name="pre_norm")(x).astype(self.dtype)
        return x

    def _prefix(self, batch: int) -> list[Array]:
        spec = self.spec
        tokens = [
            parameter(self, name, _embed_init, shape).reshape(1, -1, spec.width)
            for name, shape, there in (
                ("class_token", (spec.width,), spec.class_token),
                ("dist_token", (spec.width,), spec.distilled),
                ("register_tokens", (spec.registers, spec.width), spec.registers),
            )
            if there
        ]
        return [
            jnp.broadcast_to(t, (batch, *t.shape[1:])).astype(self.dtype)
            for t in tokens
        ]

    def _head(self, x: Array, taps: Taps) -> Array:
        spec = self.spec
        if spec.pool != "avg":
            x = x[:, : 1 + spec.distilled]
        if not spec.fc_norm:
            x = LayerNorm(spec.norm_eps, name="norm")(x)
        if spec.pool == "avg":
            pooled = [x[:, spec.num_prefix :].mean(1)]
        else:
            pooled = [x[:, i] for i in range(1 + spec.distilled)]
        if spec.fc_norm:
            norm = LayerNorm(spec.norm_eps, name="fc_norm")
            pooled = [norm(p) for p in pooled]
        if spec.pre_logits:
            shape = (spec.width, spec.pre_logits)
            layer = Linear("bd,de->be", shape, name="pre_logits")
            pooled[0] = jnp.tanh(layer(pooled[0]))
        if spec.num_classes:
            pooled = [
                Linear(
                    "bd,dk->bk",
                    (p.shape[-1], spec.num_classes),
                    kernel_init=nn.initializers.zeros,
                    name=name,
                )(taps(spec.depth, name, p))
                for p, name in zip(pooled, ("head", "head_dist"))
            ]
        return sum(pooled) / len(pooled)


def init(spec: ViTSpec, rng: Array, *, widths: SubnetSpec | None = None) -> Params:
    """Fresh parameters: fan-in scaled kernels, zero biases and head.

    Args:
      spec: the full network.
      rng: a key.
      widths: of a sub-network to train on its own.

    Returns:
      The nested dict that every function of this package takes as `params`.

    Raises:
      ValueError: if the widths do not fit `spec`; the message names the block.
    """
    images = jnp.zeros((1, spec.image_size, spec.image_size, spec.in_channels))
    return _init(ViT(spec, widths), rng, images)


@functools.partial(jax.jit, static_argnums=0)
def _init(model: ViT, rng: Array, images: Array) -> Params:
    return model.init(rng, images)["params"]
