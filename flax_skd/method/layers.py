"""Parts of the ViT: a linear map by its einsum, LayerNorm, masking."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class Linear(nn.Module):
    """einsum(equation, x, kernel), plus a bias along the axes the kernel makes."""

    equation: str
    shape: tuple[int, ...]
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        inputs, out = self.equation.split("->")
        x_axes, kernel_axes = inputs.split(",")
        made = [a for a in kernel_axes if a not in x_axes]
        init = self.kernel_init or nn.initializers.variance_scaling(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=[i for i, a in enumerate(kernel_axes) if a not in made],
            out_axis=[i for i, a in enumerate(kernel_axes) if a in made],
        )
        kernel = self.param("kernel", init, self.shape)
        y = jnp.einsum(self.equation, x.astype(self.dtype), kernel.astype(self.dtype))
        if self.use_bias:
            sizes = dict(zip(kernel_axes, self.shape))
            bias = self.param(
                "bias", nn.initializers.zeros, tuple(sizes[a] for a in made)
            )
            bias = bias.reshape([sizes[a] if a in made else 1 for a in out])
            y = y + bias.astype(self.dtype)
        return y


def layer_norm(name: str, x: Array, epsilon: float) -> Array:
    """LayerNorm in float32 whatever comes in; inside a compact method."""
    # The variance from centred values: E[x^2] - E[x]^2 loses digits
    # on the few residual channels with a large mean.
    norm = nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, name=name)
    return norm(x.astype(jnp.float32))


def times(x: Array, mask: Array | None) -> Array:
    """Multiplies the last axis of x by a mask of shape [d] or [B, d]."""
    if mask is None:
        return x
    rows = mask.shape[:-1] or (1,)
    shape = rows + (1,) * (x.ndim - 2) + mask.shape[-1:]
    return x * mask.reshape(shape).astype(x.dtype)
