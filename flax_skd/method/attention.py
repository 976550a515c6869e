"""The attention functions a ViT may be given."""

from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array


def einsum_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """softmax(scale q k^T) v, the reference attention.

    Args:
      q, k: [B, H, N, qk_dim].
      v: [B, H, N, vo_dim].
      scale: of the full head at every cut, `ViTSpec.head_dim ** -0.5`.

    Returns:
      [B, H, N, vo_dim]. The division by the softmax sum comes after the product with
      v: it then touches N d numbers instead of N^2.
    """
    scores = _scores(q * scale, k)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    mixed = _mixed(weights.astype(v.dtype), v)
    return (mixed / weights.sum(-1, keepdims=True)).astype(v.dtype)


# The derivatives of the two products are products of the same kind, and `_over_queries`.


@jax.custom_vjp
def _scores(q: Array, k: Array) -> Array:
    """q k^T of every head, float32."""
    return jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)


@jax.custom_vjp
def _mixed(weights: Array, v: Array) -> Array:
    """weights v of every head, float32."""
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v, preferred_element_type=jnp.float32)


def _over_queries(weights: Array, x: Array) -> Array:
    """weights^T x of every head, [B, H, N, d], float32.

    A product over the rows of its larger factor is fast on a CPU if the longer axis of
    what it makes comes last: with heads of 16 dims and 197 tokens 2.5 times faster.
    Left to itself the gradient of keys has the head dims last, that of values first.
    """
    if x.shape[-1] > weights.shape[-1]:
        equation = "bhqk,bhqd->bhkd"
        return jnp.einsum(equation, weights, x, preferred_element_type=jnp.float32)
    equation = "bhqd,bhqk->bhdk"
    y = jnp.einsum(equation, x, weights, preferred_element_type=jnp.float32)
    return y.swapaxes(2, 3)


def _scores_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    q, k = kept
    g = g.astype(q.dtype)
    return _mixed(g, k).astype(q.dtype), _over_queries(g, q).astype(k.dtype)


def _mixed_backward(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    weights, v = kept
    g = g.astype(v.dtype)
    return _scores(g, v).astype(v.dtype), _over_queries(weights, g).astype(v.dtype)


_scores.defvjp(lambda q, k: (_scores(q, k), (q, k)), _scores_backward)
_mixed.defvjp(lambda weights, v: (_mixed(weights, v), (weights, v)), _mixed_backward)


def dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    scale: float,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> Array:
    """`einsum_attention` by `jax.nn.dot_product_attention`.

    That function wants equal widths of q and v, cuDNN also widths that eight divides
    and an even number of tokens: zeros are put in, and no token looks at those.

    Args:
      q, k, v, scale: as of `einsum_attention`.
      implementation: `xla`, `cudnn` or None, as of that function.
    """
    tokens, width = q.shape[2], max(q.shape[-1], v.shape[-1])
    odd, lengths = tokens % 2, None
    if odd:
        lengths = jnp.full(q.shape[0], tokens, jnp.int32)
    q, k, padded_v = (
        jnp.pad(
            x.swapaxes(1, 2),
            ((0, 0), (0, odd), (0, 0), (0, width + -width % 8 - x.shape[-1])),
        )
        for x in (q, k, v)
    )
    mixed = jax.nn.dot_product_attention(
        q,
        k,
        padded_v,
        scale=scale,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return mixed[:, :tokens, :, : v.shape[-1]].swapaxes(1, 2)


def fastest_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """The fastest of these for where JAX computes.

    `dot_product_attention` by cuDNN in bfloat16 on an NVIDIA GPU that has it, which
    never writes the N x N weights (FlashAttention, arXiv:2205.14135);
    `einsum_attention` anywhere else. Decided when the program is traced, by
    `jax.default_device` or else JAX's first device: a program traced on such a GPU for
    another device needs `einsum_attention` by name.

    Args and returns: as of `einsum_attention`.
    """
    in_half = q.dtype == k.dtype == v.dtype == jnp.bfloat16
    narrow = max(q.shape[-1], v.shape[-1]) <= 128  # cuDNN's limit before Hopper
    if in_half and narrow and _has_cudnn(_default_device()):
        return dot_product_attention(q, k, v, scale, "cudnn")
    return einsum_attention(q, k, v, scale)


def _default_device() -> jax.Device:
    """Where JAX puts what is given no device."""
    device = jax.config.jax_default_device  # a device, the name of a backend or None
    if isinstance(device, jax.Device):
        return device
    return jax.local_devices(backend=device)[0]


def _has_cudnn(device: jax.Device) -> bool:
    """Whether it is an NVIDIA GPU, Ampere (compute capability 8.0) or later."""
    capability = getattr(device, "compute_capability", "")
    digits = capability.replace(".", "", 1).isdigit()  # not so of ROCm: gfx942
    return device.platform == "gpu" and digits and float(capability) >= 8
