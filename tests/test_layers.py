"""GELU, LayerNorm and joined projections: the formulas, their slopes, what they keep."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_skd.method.layers import LayerNorm, Linear, gelu, together

X = np.concatenate([np.linspace(-9, 9, 181), [0.0, 1e-6, -30.0, 30.0]])


def phi(x):
    """The normal distribution function in float64."""
    return np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


FORMS = {"exact": lambda x: x * phi(x), "tanh": tanh_gelu}


@pytest.mark.parametrize("form", FORMS)
def test_gelu_and_its_slope_are_those_of_the_formula(form):
    formula, h = FORMS[form], 1e-5
    slope = (formula(X + h) - formula(X - h)) / (2 * h)
    x = jnp.asarray(X, jnp.float32)
    y, back = jax.vjp(lambda v: gelu(v, form), x)
    np.testing.assert_allclose(y, formula(X), rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(back(jnp.ones_like(x))[0], slope, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
def test_gelu_of_bfloat16_is_computed_in_float32_and_rounded_once(form):
    x = jnp.asarray(X, jnp.bfloat16)
    want = gelu(x.astype(jnp.float32), form).astype(jnp.bfloat16)
    got, back = jax.vjp(lambda v: gelu(v, form), x)
    assert got.dtype == back(got)[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.astype(jnp.float32), want.astype(jnp.float32))


def kept(function, *args):
    """Shapes of what the backward pass of a function keeps."""
    return [x.shape for x in jax.tree.leaves(jax.vjp(function, *args)[1])]


def test_the_backward_pass_of_gelu_keeps_one_array():
    x = jnp.ones((3, 5))
    assert kept(lambda v: gelu(v, "exact"), x) == [x.shape]


@pytest.fixture
def norm():
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (4, 7, 24)).astype(np.float32)
    x[..., 5] += 300  # a channel with a large mean, as trained networks have
    params = {k: rng.normal(size=24).astype(np.float32) for k in ("scale", "bias")}
    return LayerNorm(1e-6), {"params": params}, jnp.asarray(x)


def test_layer_norm_and_its_gradients_are_those_of_flax(norm):
    ours, params, x = norm
    flax = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)
    y, back = jax.vjp(ours.apply, params, x)
    want, flax_back = jax.vjp(flax.apply, params, x)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    g = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    got, want = (jax.tree.leaves(b(g)) for b in (back, flax_back))
    assert len(got) == 3
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


def test_layer_norm_equals_float64(norm):
    ours, params, x = norm
    wide = np.asarray(x, np.float64)
    centred = wide - wide.mean(-1, keepdims=True)
    want = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    want = want * params["params"]["scale"] + params["params"]["bias"]
    np.testing.assert_allclose(ours.apply(params, x), want, rtol=1e-5, atol=1e-5)


def test_the_backward_pass_of_layer_norm_keeps_one_array_of_its_inputs_size(norm):
    ours, params, x = norm
    sizes = [math.prod(s) for s in kept(ours.apply, params, x)]
    assert sizes.count(x.size) == 1 and max(sizes) == x.size


def test_layer_norm_of_bfloat16_keeps_its_input_and_rounds_gradients_once(norm):
    ours, params, x = norm
    half = x.astype(jnp.bfloat16)
    y, back = jax.vjp(ours.apply, params, half)
    wide, wide_back = jax.vjp(ours.apply, params, half.astype(jnp.float32))
    np.testing.assert_array_equal(y, wide)
    g = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)
    (got, dx), (want, wide_dx) = back(g), wide_back(g)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert dx.dtype == half.dtype
    np.testing.assert_array_equal(dx, wide_dx.astype(jnp.bfloat16))
    large = [a for a in jax.tree.leaves(back) if a.size == x.size]
    assert [a.dtype for a in large] == [jnp.bfloat16]


class _Joined(nn.Module):
    use_bias: bool
    apart: bool

    @nn.compact
    def __call__(self, x):
        linears = [
            Linear("bnd,dhe->bhne", (24, 2, e), self.use_bias, name=f"to_{i}")
            for i, e in enumerate((5, 5, 3))
        ]
        return [f(x) for f in linears] if self.apart else together(linears, x)


@pytest.mark.parametrize("use_bias", [True, False])
def test_maps_made_together_are_those_made_apart(use_bias):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 7, 24)), jnp.float32)
    joined, apart = (_Joined(use_bias, apart) for apart in (False, True))
    params = joined.init(jax.random.key(0), x)
    params = jax.tree.map(lambda p: p + 0.1, params)  # no bias is zero
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, apart.init(jax.random.key(0), x)
    )

    def value(model, params, x):
        return sum((y * jnp.cos(y)).sum() for y in model.apply(params, x))

    for a, b in zip(joined.apply(params, x), apart.apply(params, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    got, want = (
        jax.tree.leaves(jax.grad(value, (1, 2))(model, params, x))
        for model in (joined, apart)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
