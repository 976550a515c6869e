"""Parts of the ViT: linear maps by their einsum, GELU, LayerNorm, masking."""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

Array = jax.Array


def parameter(module: nn.Module, name: str, init: Any, shape: tuple[int, ...]) -> Array:
    """`module.param`, float32, without tracing `init` where it is not needed.

    Flax traces the initializer of every parameter that it is given, to compare shapes:
    a third of the time to trace a ViT's gradient.
    """
    found = module.get_variable("params", name)
    if found is None or found.shape != shape:  # Flax makes it, or says what is wrong
        found = module.param(name, init, shape, jnp.float32)
    return found


class Linear(nn.Module):
    """einsum(equation, x, kernel), plus a bias along the axes the kernel makes.

    The equation is the documentation; `product` computes it.
    """

    equation: str
    shape: tuple[int, ...]
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: Any = None

    def setup(self):
        """Makes kernel and bias, for this map alone or for `together`."""
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(
                f"dtype = {jnp.dtype(self.dtype).name}: that of the computation, float32 "
                "or bfloat16; images may be uint8 in both."
            )
        summed, made = _summed_and_made(self.equation)
        axes = self.equation.partition(",")[2]
        init = self.kernel_init or nn.initializers.variance_scaling(
            1.0,
            "fan_in",
            "truncated_normal",
            in_axis=[axes.index(a) for a in summed],
            out_axis=[axes.index(a) for a in made],
        )
        self.kernel = parameter(self, "kernel", init, self.shape)
        self.bias = None
        if self.use_bias:
            shape = tuple(self.shape[axes.index(a)] for a in made)
            self.bias = parameter(self, "bias", nn.initializers.zeros, shape)

    def __call__(self, x: Array) -> Array:
        return product(self.equation, x, self.kernel, self.bias, self.dtype)


def together(linears: list[Linear], x: Array) -> list[Array]:
    """What each of several maps to heads makes of `x`, by one product.

    Their kernels are joined along the head dims, which may differ in number. The
    gradient of `x` is then one product too: over the mesh axis that cuts the heads it
    is summed once, not once a map.

    Args:
      linears: of the equation bnd,dhe->bhne, all with a bias or none.
      x: [B, N, D].

    Returns:
      Of each, [B, H, N, e].
    """
    kernel = jnp.concatenate([linear.kernel for linear in linears], -1)
    bias = None
    if linears[0].use_bias:
        bias = jnp.concatenate([linear.bias for linear in linears], -1)
    # Cut apart before heads come first: then each part is copied once, not twice.
    y = product("bnd,dhe->bnhe", x, kernel, bias, linears[0].dtype)
    ends = np.cumsum([linear.shape[-1] for linear in linears])
    return [part.swapaxes(1, 2) for part in jnp.split(y, ends[:-1], -1)]


@functools.partial(jax.jit, static_argnums=(0, 4))  # traced once for equal shapes
def product(
    equation: str, x: Array, kernel: Array, bias: Array | None, dtype: Any
) -> Array:
    """einsum(equation, x, kernel) + bias as one product of matrices.

    All tokens times all made axes. Left as an einsum of [B, N, M], the gradient of an
    MLP is 2.3 times slower on a CPU.
    """
    x_axes, kernel_axes = equation.partition("->")[0].split(",")
    summed, made = _summed_and_made(equation)
    kept = [a for a in x_axes if a not in summed]
    sizes = dict(zip(x_axes, x.shape)) | dict(zip(kernel_axes, kernel.shape))
    width = math.prod(sizes[a] for a in summed)
    rows = x.transpose([x_axes.index(a) for a in (*kept, *summed)])
    y = rows.reshape(-1, width).astype(dtype) @ kernel.reshape(width, -1).astype(dtype)
    if bias is not None:
        y = y + bias.reshape(1, -1).astype(dtype)
    made_axes = [*kept, *made]
    y = y.reshape([sizes[a] for a in made_axes])
    return y.transpose([made_axes.index(a) for a in equation.partition("->")[2]])


def _summed_and_made(equation: str) -> tuple[list[str], list[str]]:
    """The kernel's axes that the input has, and those that it has not."""
    x_axes, kernel_axes = equation.partition("->")[0].split(",")
    summed = [a for a in kernel_axes if a in x_axes]
    return summed, [a for a in kernel_axes if a not in summed]


@functools.partial(jax.jit, static_argnums=1)
def gelu(x: Array, form: str) -> Array:
    """x Phi(x), Phi the standard normal distribution function; float32 inside.

    The backward pass keeps one array of the size of `x`, the slope Phi + x Phi', where
    the derivative of every part of the formula keeps three.

    Args:
      x: of any shape.
      form: `exact`, by the error function, or `tanh`, its approximation
        (Hendrycks and Gimpel, 2016).
    """
    return _gelu(x, form)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _gelu(x: Array, form: str) -> Array:
    return _gelu_and_slope(x, form)[0]


@_gelu.defjvp
def _gelu_jvp(form, primals, tangents):
    y, slope = _gelu_and_slope(*primals, form)
    return y, slope * tangents[0]


def _gelu_and_slope(x: Array, form: str) -> tuple[Array, Array]:
    dtype, x = x.dtype, x.astype(jnp.float32)
    if form == "exact":
        phi = 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))
        rise = jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    else:
        a, b = math.sqrt(2 / math.pi), 0.044715
        # (1 + tanh u) / 2 = sigmoid(2 u), which keeps its digits in both tails.
        u = 2 * a * (x + b * x * x * x)
        phi = jax.nn.sigmoid(u)
        rise = 2 * a * (1 + 3 * b * x * x) * phi * jax.nn.sigmoid(-u)
    return (x * phi).astype(dtype), (phi + x * rise).astype(dtype)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis.

    In float32 whatever comes in.
    """

    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        size = x.shape[-1:]
        scale = parameter(self, "scale", nn.initializers.ones, size)
        bias = parameter(self, "bias", nn.initializers.zeros, size)
        row = (1,) * (x.ndim - 1) + size
        return _normalised(x, scale.reshape(row), bias.reshape(row), self.epsilon)


@functools.partial(jax.jit, static_argnums=3)
def _normalised(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    return _normalise(x, scale, bias, epsilon)


# Written out: what is kept is the input, half as large in bfloat16, and two numbers a row.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalise(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    return _normalise_forward(x, scale, bias, epsilon)[0]


def _normalise_forward(x: Array, scale: Array, bias: Array, epsilon: float):
    """The result, and what the backward pass reads."""
    # The variance from centred values: E[x^2] - E[x]^2 loses digits on the few
    # residual channels with a large mean.
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    centred = wide - mean
    variance = (centred * centred).mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    return centred * inverse * scale + bias, (x, scale, bias, mean, inverse)


def _normalise_backward(epsilon: float, kept, g: Array) -> tuple[Array, Array, Array]:
    x, scale, bias, *row = kept
    # Else XLA computes them again, wherever they are read.
    mean, inverse = jax.lax.optimization_barrier(row)
    y = (x.astype(jnp.float32) - mean) * inverse
    dy = g * scale
    along = (y * dy).mean(-1, keepdims=True)
    dx = inverse * (dy - dy.mean(-1, keepdims=True) - y * along)
    # Sums over rows, and inside `shard_map` over the devices that share the parameters.
    sums = jax.linear_transpose(lambda s, b: y * s + b, scale, bias)
    return dx.astype(x.dtype), *sums(g)


_normalise.defvjp(_normalise_forward, _normalise_backward)


def times(x: Array, mask: Array | None) -> Array:
    """Multiplies the last axis of x by a mask of shape [d] or [B, d]."""
    if mask is None:
        return x
    rows = mask.shape[:-1] or (1,)
    shape = rows + (1,) * (x.ndim - 2) + mask.shape[-1:]
    return x * mask.reshape(shape).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def repeated(x: Array, count: int) -> Array:
    """[count, ...], `count` times x [...].

    Its gradient is a sum over the first axis. On a CPU a product with ones is 20 times
    faster. On a GPU, XLA would have this axis last in memory, there and all through the
    network, and transpose before every product.
    """
    return jnp.broadcast_to(x, (count, *x.shape))


def _repeated_backward(count: int, kept: None, g: Array) -> tuple[Array]:
    def product(g):
        rows = g.reshape(count, math.prod(g.shape[1:]))  # -1 would refuse a count of 0
        return (jnp.ones(count, g.dtype) @ rows).reshape(g.shape[1:])

    def total(g):
        return g.sum(0)

    add = jax.lax.platform_dependent
    return (add(g, cpu=product, cuda=sum_in_order, default=total),)


def sum_in_order(x: Array) -> Array:
    """x.sum(0), of an array that lies in memory in the order of its axes."""
    if jax.__version_info__ >= (0, 11):  # before, this would gather what is sharded
        x = with_layout_constraint(x, Layout(tuple(range(x.ndim))))
    return x.sum(0)


repeated.defvjp(lambda x, count: (repeated(x, count), None), _repeated_backward)
