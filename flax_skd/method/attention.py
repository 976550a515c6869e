"""The attention functions a ViT may be given."""

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
    scores = jnp.einsum(
        "bhqd,bhkd->bhqk", q * scale, k, preferred_element_type=jnp.float32
    )
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    mixed = jnp.einsum(
        "bhqk,bhkd->bhqd",
        weights.astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    return (mixed / weights.sum(-1, keepdims=True)).astype(v.dtype)


def dot_product_attention(q: Array, k: Array, v: Array, scale: float) -> Array:
    """`einsum_attention` by `jax.nn.dot_product_attention`, for accelerators.

    That function wants equal widths of q and v; the narrower is padded with zeros,
    which changes nothing.
    """
    width = max(q.shape[-1], v.shape[-1])
    q, k, padded_v = (
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1]))).swapaxes(1, 2)
        for x in (q, k, v)
    )
    mixed = jax.nn.dot_product_attention(q, k, padded_v, scale=scale)
    return mixed.swapaxes(1, 2)[..., : v.shape[-1]]
