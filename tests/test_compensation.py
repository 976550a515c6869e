"""What is kept stands in for what is cut: at every cut, masked and extracted."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import shake

from flax_skd.method import (
    compensation,
    contraction,
    moments,
    packing,
    refit,
    subnet,
    vit,
)
from flax_skd.method.compensation import MODES, repaired
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import ViT

TREE = jax.tree_util


def features(size, *, tokens=400, seed=0):
    """Correlated, with a mean: [tokens, size] float64."""
    rng = np.random.default_rng(seed)
    mix = np.eye(size) + rng.normal(size=(size, size)) / np.sqrt(4 * size)
    return rng.normal(size=(tokens, size)) @ mix + rng.normal(size=size)


def moment_of(x):
    return x.mean(0), np.cov(x.T, bias=True)


def drawn(spec):
    """Features of every branch, not those of any network: (attn, mlp)."""
    sizes = compensation.inner_units(spec)
    return tuple(
        [features(sizes[kind], seed=10 * i + k) for i in range(spec.depth)]
        for k, kind in enumerate(("attn", "mlp"))
    )


def fitted(spec, found, **options):
    attn, mlp = ([moment_of(x) for x in xs] for xs in found)
    return compensation.from_moments(attn, mlp, spec, **options)


@pytest.fixture(scope="module")
def repairs(spec):
    return fitted(spec, drawn(spec))


def widths_of(*blocks):
    return SubnetSpec(*zip(*blocks))


def images_of(spec, count=3):
    rng = np.random.default_rng(3)
    size = (count, spec.image_size, spec.image_size, spec.in_channels)
    return rng.normal(size=size).astype(np.float32)


# Oracle: least squares of NumPy on the features themselves


def least_squares(x, kernel, bias, kept):
    """Kernel and bias of the kept columns with least squared error of the output."""
    kernel, bias = np.asarray(kernel, np.float64), np.asarray(bias, np.float64)
    inputs = np.concatenate([x[:, kept], np.ones((len(x), 1))], axis=1)
    solved = np.linalg.lstsq(inputs, x @ kernel + bias, rcond=None)[0]
    return solved[:-1], solved[-1]


def in_order(kernel):
    """Rows of `out` [H, d, D] as dim 1 of every head, dim 2 of every head, ..."""
    return np.stack([kernel[h, e] for e in range(kernel.shape[1]) for h in range(2)])


def test_hidden_units_are_refitted_as_by_lstsq_at_every_cut(spec, params):
    found = drawn(spec)
    made = fitted(spec, found, ridge=1e-9)
    at = jax.jit(lambda widths: repaired(params, spec, made, widths))
    for m in range(1, spec.mlp_dim + 1):
        widths = SubnetSpec.uniform(spec, spec.head_dim, spec.head_dim, m)
        new = jax.device_get(at(SubnetSpec(*map(jnp.array, widths))))
        for i in range(spec.depth):
            old, fc2 = (t[f"block_{i}"]["mlp"]["fc2"] for t in (params, new))
            kernel, bias = least_squares(
                found[1][i], old["kernel"], old["bias"], np.arange(m)
            )
            # float32 through a factor of condition about 10
            np.testing.assert_allclose(fc2["kernel"][:m], kernel, atol=1e-5)
            np.testing.assert_allclose(fc2["bias"], bias, atol=2e-5)
            assert not np.any(fc2["kernel"][m:])


def test_head_dims_are_refitted_by_those_of_all_heads_together(spec, params):
    found = drawn(spec)
    made = fitted(spec, found, ridge=1e-9)
    heads, dim = spec.num_heads, spec.head_dim
    for m in range(1, dim + 1):
        widths = SubnetSpec.uniform(spec, dim, m, spec.mlp_dim)
        new = jax.device_get(repaired(params, spec, made, widths))
        kept = [h * dim + e for h in range(heads) for e in range(m)]
        for i in range(spec.depth):
            old, out = (t[f"block_{i}"]["attn"]["out"] for t in (params, new))
            rows = np.reshape(old["kernel"], (heads * dim, -1))
            kernel, bias = least_squares(found[0][i], rows, old["bias"], kept)
            got = np.reshape(out["kernel"][:, :m], (heads * m, -1))
            np.testing.assert_allclose(got, kernel, atol=1e-5)
            np.testing.assert_allclose(out["bias"], bias, atol=2e-5)


def test_the_factor_is_of_the_covariance_in_the_order_of_cutting(spec, repairs):
    x = drawn(spec)[0][1].reshape(-1, spec.num_heads, spec.head_dim)
    columns = in_order(x.transpose(1, 2, 0)).T
    mean, factor = repairs.attn[1]
    np.testing.assert_allclose(mean, columns.mean(0), atol=1e-5)
    want = moments.regularised(moment_of(columns)[1])
    np.testing.assert_allclose(factor @ factor.T, want, atol=1e-5)
    np.testing.assert_array_equal(factor, np.tril(factor))


def test_means_alone_go_to_the_bias_and_leave_kept_rows(spec, params, repairs):
    widths = SubnetSpec.uniform(spec, 5, 4, 11)
    new = repaired(params, spec, compensation.means_only(repairs), widths)
    old, fc2 = (t["block_2"]["mlp"]["fc2"] for t in (params, new))
    np.testing.assert_array_equal(fc2["kernel"][:11], old["kernel"][:11])
    folded = old["bias"] + repairs.mlp[2].mean[11:] @ old["kernel"][11:]
    np.testing.assert_allclose(fc2["bias"], folded, atol=1e-5)


# The network


def inner_features(spec, params, images):
    """z [t, H d] and hidden units [t, M] of every block, from its taps."""
    seen = {}

    def tap(block, name, feature):
        seen[block, name] = np.asarray(feature, np.float64)
        return feature

    ViT(spec).apply({"params": params}, images, taps=tap)
    mixed, hidden = [], []
    for i in range(spec.depth):
        q, k, v = (seen[i, name] for name in ("query", "key", "value"))
        scores = np.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(spec.head_dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        z = np.einsum("bhqk,bhkd->bqhd", weights, v)
        mixed.append(z.reshape(-1, spec.num_heads * spec.head_dim))
        hidden.append(seen[i, "hidden"].reshape(-1, spec.mlp_dim))
    return mixed, hidden


def test_what_the_value_bias_adds_is_kept_for_every_input(spec, params):
    # Cut value dims with nothing but their bias: attention rows sum to one, so their
    # share of the output is the same for every token of every image.
    kept = 5
    only_bias = jax.tree.map(lambda x: x, params)
    for i in range(spec.depth):
        value = only_bias[f"block_{i}"]["attn"]["value"]
        value["kernel"] = value["kernel"].at[..., kept:].set(0.0)
    found = inner_features(spec, only_bias, images_of(spec, 2))
    made = compensation.means_only(fitted(spec, found))
    widths = SubnetSpec.uniform(spec, spec.head_dim, kept, spec.mlp_dim)
    small = subnet.extract(repaired(only_bias, spec, made, widths), widths)
    others = 2 * images_of(spec, 6)[2:]
    want = ViT(spec).apply({"params": only_bias}, others)
    got = ViT(spec, widths).apply({"params": small}, others)
    np.testing.assert_allclose(got, want, atol=1e-5)
    bare = subnet.extract(only_bias, widths)
    lost = ViT(spec, widths).apply({"params": bare}, others) - want
    assert np.abs(lost).max() > 1e-3


def test_least_squares_loses_less_than_means_and_they_less_than_nothing(spec, params):
    found = inner_features(spec, params, images_of(spec, 32))
    made = fitted(spec, found)
    widths = SubnetSpec.uniform(spec, spec.head_dim, spec.head_dim, 20)
    x, old = found[1][0], jax.tree.map(np.asarray, params["block_0"]["mlp"]["fc2"])
    want = x @ old["kernel"] + old["bias"]
    errors = {}
    for mode, of in MODES.items():
        new = subnet.extract(repaired(params, spec, of(made), widths), widths)
        fc2 = jax.tree.map(np.asarray, new["block_0"]["mlp"]["fc2"])
        got = x[:, :20] @ fc2["kernel"] + fc2["bias"]
        errors[mode] = np.square(got - want).mean()
    assert errors["least_squares"] < 0.7 * errors["mean"] < 0.7 * errors["none"]


VARIANTS = {
    "plain": {},
    "layer_scale": {"layer_scale": True},
    "pre_norm": {"pre_norm": True, "qkv_bias": False},
    "distilled": {"distilled": True, "layer_scale": True},
    "registers without positions": {"registers": 2, "pos_embed_prefix": False},
    "distilled without positions": {"distilled": True, "pos_embed_prefix": False},
    "patches alone": {"class_token": False, "pool": "avg", "pos_embed_prefix": False},
}
WIDTHS = {
    "uneven": widths_of((12, 5, 40), (3, 12, 7), (1, 1, 1)),
    "holes": widths_of((0, 0, 9), (4, 4, 0), (7, 3, 40)),
    "a run of holes": widths_of((5, 6, 7), (0, 0, 0), (0, 0, 13)),
    "late start": widths_of((0, 0, 0), (0, 0, 8), (6, 6, 0)),
    "nothing": widths_of((0, 0, 0), (0, 0, 0), (0, 0, 0)),
}


@functools.cache
def variant(name):
    """(spec, params, repairs, images); zero and tiny entries in every LayerScale."""
    spec = ViTSpec(16, 8, 12, 3, 2, 40, 5, head_dim=12, **VARIANTS[name])
    params = shake(vit.init(spec, jax.random.key(1)))
    for path, leaf in TREE.tree_leaves_with_path(params):
        if "layer_scale" in TREE.keystr(path):
            block, scale = (key.key for key in path)
            params[block][scale] = leaf.at[:2].set(jnp.array([0.0, 1e-20]))
    return spec, params, fitted(spec, drawn(spec)), images_of(spec)


@functools.cache
def masked(name):
    """Jitted once for all widths: params, widths -> (loss, logits), gradient."""
    spec, _, repairs, images = variant(name)

    def loss(params, widths):
        new = repaired(params, spec, repairs, widths)
        masks = subnet.masks(spec, widths)
        logits = ViT(spec).apply({"params": new}, images, masks)
        return jnp.square(logits).sum(), logits

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def extracted(name, widths):
    spec, params, repairs, images = variant(name)

    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        small = subnet.extract(repaired(params, spec, repairs, widths), widths)
        logits = ViT(spec, widths).apply({"params": small}, images)
        return jnp.square(logits).sum(), logits

    return jax.jit(loss)(params)


# Every cut with LayerScale, and every place where the stream may start.
GRADIENTS = [
    *(("layer_scale", cut) for cut in WIDTHS),
    ("pre_norm", "late start"),
    ("registers without positions", "late start"),
]


@pytest.mark.parametrize(("name", "cut"), GRADIENTS)
def test_masked_is_extracted_in_logits_and_in_gradients(name, cut):
    widths = WIDTHS[cut]
    traced = SubnetSpec(*map(jnp.array, widths))
    (_, logits), gradient = masked(name)(variant(name)[1], traced)
    (_, want), want_gradient = extracted(name, widths)
    np.testing.assert_allclose(logits, want, atol=1e-5, rtol=1e-5)
    for (path, got), want in zip(
        TREE.tree_leaves_with_path(gradient), jax.tree.leaves(want_gradient)
    ):
        scale = max(1.0, float(jnp.abs(want).max()))
        np.testing.assert_allclose(
            got, want, atol=1e-5 * scale, err_msg=TREE.keystr(path)
        )
    # Every row teaches, the cut ones through those that stand in for them.
    assert np.abs(gradient["block_1"]["mlp"]["fc2"]["kernel"][-1]).max() > 0


def in_place(params, spec, found, widths):
    """float64 parameters of a network in which removed branches add their mean."""
    new = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    heads, dim = spec.num_heads, spec.head_dim
    for i, (qk, vo, mlp) in enumerate(zip(*widths)):
        attn, fc = new[f"block_{i}"]["attn"], new[f"block_{i}"]["mlp"]
        for name in ("query", "key") if qk else ():
            attn[name] = {k: x[..., :qk] for k, x in attn[name].items()}
        kept = [h * dim + e for h in range(heads) for e in range(vo)]
        rows = attn["out"]["kernel"].reshape(heads * dim, -1)
        kernel, bias = least_squares(found[0][i], rows, attn["out"]["bias"], kept)
        attn["value"] = {k: x[..., :vo] for k, x in attn["value"].items()}
        attn["out"] = {"kernel": kernel.reshape(heads, vo, spec.width), "bias": bias}
        kernel, bias = least_squares(
            found[1][i], fc["fc2"]["kernel"], fc["fc2"]["bias"], np.arange(mlp)
        )
        if not mlp:  # a unit without output: NumPy's erf wants one at least
            mlp, kernel = 1, np.zeros((1, spec.width))
        fc["fc1"] = {k: x[..., :mlp] for k, x in fc["fc1"].items()}
        fc["fc2"] = {"kernel": kernel, "bias": bias}
    return new


# Every variant and every cut, not every pair of them.
@pytest.mark.parametrize(
    ("name", "cut"), [*zip(VARIANTS, itertools.cycle(WIDTHS), strict=False)]
)
def test_a_removed_branch_leaves_its_mean_where_it_was(name, cut):
    spec, params, _, images = variant(name)
    found = drawn(spec)
    made = fitted(spec, found, ridge=1e-9)
    new = repaired(params, spec, made, WIDTHS[cut])
    masks = subnet.masks(spec, WIDTHS[cut])
    got = ViT(spec).apply({"params": new}, images, masks)
    want = reference.logits(images, in_place(params, spec, found, WIDTHS[cut]), spec)
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_at_full_width_nothing_changes_bit_for_bit(name, dtype):
    spec, params, repairs, _ = variant(name)
    made = packing.cast(repairs, jnp.dtype(dtype))
    same = repaired(params, spec, made, SubnetSpec.full(spec))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    jitted = jax.jit(lambda p, w: repaired(p, spec, made, w))
    same = jitted(params, SubnetSpec(*map(jnp.array, SubnetSpec.full(spec))))
    jax.tree.map(np.testing.assert_array_equal, same, params)


def test_a_network_that_is_whole_from_some_block_on_keeps_its_parameters_there():
    spec, params, repairs, _ = variant("layer_scale")
    widths = widths_of((0, 0, 0), (12, 12, 40), (12, 12, 40))
    new = repaired(params, spec, repairs, widths)
    for name in ("block_1", "block_2", "norm", "head"):
        jax.tree.map(np.testing.assert_array_equal, new[name], params[name])
    assert np.abs(new["pos_embed"] - params["pos_embed"]).max() > 0.1


@pytest.mark.parametrize("cut", WIDTHS)
def test_traced_widths_are_static_widths(cut):
    spec, params, repairs, _ = variant("layer_scale")
    jitted = jax.jit(lambda p, w: repaired(p, spec, repairs, w))
    traced = jitted(params, SubnetSpec(*map(jnp.array, WIDTHS[cut])))
    static = repaired(params, spec, repairs, WIDTHS[cut])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), traced, static
    )


# Blocks 0 and 1, the third is whole; prefixes of the kept leaves that are made anew.
REFITTED = {
    ((12, 12, 40), (12, 12, 7)): ["block_1/mlp/fc2", "block_1/layer_scale2"],
    ((12, 12, 40), (5, 12, 40)): [],  # queries and keys alone
    ((12, 12, 40), (12, 5, 40)): ["block_1/attn/out", "block_1/layer_scale1"],
    ((12, 12, 40), (0, 0, 40)): ["block_0/mlp/fc2", "block_0/layer_scale2"],
    ((12, 12, 0), (0, 0, 40)): ["block_0/attn/out", "block_0/layer_scale1"],
    ((0, 0, 40), (12, 12, 40)): ["pos_embed", "pre_norm/bias"],
    ((0, 0, 0), (0, 0, 7)): [
        *("pos_embed", "pre_norm/bias", "block_1/mlp/fc2", "block_1/layer_scale2")
    ],
}


def is_kept(widths, path):
    """Whether a leaf is of no block, or of a branch that is there."""
    block, _, rest = path.partition("/")
    if not block.startswith("block_"):
        return True
    attention = rest.startswith(("norm1", "attn", "layer_scale1"))
    return (widths.vo_dim if attention else widths.mlp_dim)[int(block[6:])] > 0


@pytest.mark.parametrize("name", ["plain", "layer_scale", "pre_norm"])
@pytest.mark.parametrize("cut", REFITTED)
def test_what_known_widths_leave_alone_is_handed_through_and_is_right_bit_for_bit(
    name, cut
):
    spec, params, repairs, _ = variant(name)
    widths = widths_of(*cut, (12, 12, 40))
    jitted = jax.jit(lambda p, w: repaired(p, spec, repairs, w))
    traced = jitted(params, SubnetSpec(*map(jnp.array, widths)))
    code = jax.make_jaxpr(lambda p: repaired(p, spec, repairs, widths))(params).jaxpr
    through = [any(out is var for var in code.invars) for out in code.outvars]
    anew = set(REFITTED[cut]) - ({"pos_embed"} if spec.pre_norm else set())
    leaves = zip(TREE.tree_leaves_with_path(params), jax.tree.leaves(traced), through)
    for (keys, leaf), new, same in leaves:
        path = "/".join(key.key for key in keys)
        if is_kept(widths, path):
            assert same != path.startswith(tuple(anew)), path
        if same:
            np.testing.assert_array_equal(new, leaf, err_msg=path)


def test_both_orders_of_multiplying_equal_the_formula():
    """Fewer rows are cut than the map has columns, and more."""
    rng = np.random.default_rng(0)
    factor = np.tril(rng.normal(size=(12, 12))) + 4 * np.eye(12)
    kernel = rng.normal(size=(12, 4))
    for width in (9, 3):
        seen = factor[width:, :width].T @ kernel[width:]
        want = kernel[:width] + np.linalg.solve(factor[:width, :width].T, seen)
        found, _ = refit.on_host((np.zeros(12), factor), kernel, np.zeros(4), width)
        np.testing.assert_allclose(found[:width], want, rtol=1e-5, atol=1e-5)
        assert not found[width:].any()


def test_a_factor_with_a_zero_on_its_diagonal_is_named():
    factor = np.eye(8, dtype=np.float32)
    factor[2, 2] = 0
    with pytest.raises(ValueError, match="zero on its diagonal.*contract"):
        refit.on_host((np.zeros(8), factor), np.ones((8, 3)), np.zeros(3), 5)


def test_no_gradient_flows_into_means_and_factors():
    spec, params, repairs, _ = variant("plain")

    def total(repairs):
        new = repaired(params, spec, repairs, WIDTHS["uneven"])
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(new))

    assert not any(np.any(g) for g in jax.tree.leaves(jax.grad(total)(repairs)))


def test_parameters_in_bfloat16_stay_so():
    spec, params, repairs, _ = variant("registers without positions")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    new = repaired(half, spec, repairs, WIDTHS["late start"])
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(jnp.bfloat16)}


# Moments: other coordinates, and any rank


def test_moments_follow_the_contraction_of_the_network(spec, params):
    rng = np.random.default_rng(5)
    shape = (spec.num_heads, spec.head_dim, spec.head_dim)
    # Any rotation: `inject` wants the inverse to be the transpose.
    value = np.linalg.qr(rng.normal(size=shape))[0].astype(np.float32)
    units = rng.permutation(spec.mlp_dim)
    axes = contraction.orthogonal(value, jnp.array(value))
    basis = contraction.Basis(*axes, jnp.array(units))
    turned = contraction.inject(params, (basis,) * spec.depth)
    images = images_of(spec, 4)
    before, after = (inner_features(spec, p, images) for p in (params, turned))
    for i in range(spec.depth):
        for got, x in (
            (moments.rotated(moment_of(before[0][i]), value), after[0][i]),
            (moments.permuted(moment_of(before[1][i]), units), after[1][i]),
        ):
            for a, b in zip(got, moment_of(x)):
                np.testing.assert_allclose(a, b, atol=1e-5)


def test_means_without_a_covariance_change_coordinates_too():
    assert moments.rotated((np.ones(4), None), 2 * np.ones((2, 2, 2)))[1] is None
    mean, covariance = moments.permuted((np.arange(3), None), [2, 0, 1])
    assert mean.tolist() == [2, 0, 1] and covariance is None


def with_hidden(spec, x):
    """The same hidden features in every block, and any head outputs."""
    return fitted(spec, (drawn(spec)[0], [x] * spec.depth))


@pytest.mark.parametrize("tokens", [1, 2, 15, 39])
def test_fewer_tokens_than_units_are_predicted_where_they_can_be(spec, params, tokens):
    x = features(spec.mlp_dim, tokens=tokens).astype(np.float32)
    made = with_hidden(spec, x)
    for m in (1, 20, 39):
        widths = SubnetSpec.uniform(spec, 12, 12, m)
        new = repaired(params, spec, made, widths)["block_0"]["mlp"]["fc2"]
        old = params["block_0"]["mlp"]["fc2"]
        new, old = (jax.tree.map(np.asarray, linear) for linear in (new, old))
        lost = x @ (new["kernel"] - old["kernel"]) + new["bias"] - old["bias"]
        before = (x - x.mean(0))[:, m:] @ old["kernel"][m:]
        assert np.isfinite(lost).all()
        # m units span the tokens - 1 directions there are, but for the ridge.
        share = 0.05 if m >= tokens else 1.0
        assert np.linalg.norm(lost) <= share * np.linalg.norm(before) + 1e-5


def test_dead_units_predict_nothing_and_cost_nothing(spec, params):
    x = features(spec.mlp_dim)
    x[:, ::3] = 0.5  # constant: their mean is all they are
    made = with_hidden(spec, x)
    widths = SubnetSpec.uniform(spec, 12, 12, 21)
    new = repaired(params, spec, made, widths)["block_0"]["mlp"]["fc2"]
    old = params["block_0"]["mlp"]["fc2"]["kernel"]
    np.testing.assert_allclose(new["kernel"][:21:3], old[:21:3], atol=1e-6)
    assert np.abs(new["kernel"][1:21:3] - old[1:21:3]).max() > 1e-3


def test_a_layer_that_is_constant_is_folded_whole(spec, params):
    x = np.ones((30, spec.mlp_dim))
    widths = SubnetSpec.uniform(spec, 12, 12, 3)
    new = repaired(params, spec, with_hidden(spec, x), widths)
    old, fc2 = (t["block_1"]["mlp"]["fc2"] for t in (params, new))
    np.testing.assert_allclose(fc2["kernel"][:3], old["kernel"][:3], atol=1e-6)
    folded = old["bias"] + old["kernel"][3:].sum(0)
    np.testing.assert_allclose(fc2["bias"], folded, atol=1e-5)


# Storage


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_and_unpacked_is_the_same(spec, repairs, dtype):
    made = packing.cast(repairs, jnp.dtype(dtype))
    flat = packing.pack(made)
    assert flat["block_2.mlp.factor"].shape == (40 * 41 // 2,)
    assert flat["block_0.attn.mean"].dtype == np.float32
    again = packing.unpack(flat, spec)
    jax.tree.map(np.testing.assert_array_equal, again, made)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(made), strict=True):
        assert a.dtype == b.dtype
    assert packing.size(made) == sum(x.nbytes for x in flat.values())


def test_means_are_stored_without_factors(spec, repairs):
    flat = packing.pack(compensation.means_only(repairs))
    assert sorted({name.split(".")[-1] for name in flat}) == ["mean"]
    again = packing.unpack(flat, spec)
    assert all(r.factor is None for r in (*again.attn, *again.mlp))
    assert packing.size(again) == 4 * spec.depth * (24 + 40)


def test_factors_in_bfloat16_predict_nearly_as_well(spec, params):
    x = inner_features(spec, params, images_of(spec, 32))
    made = fitted(spec, x)
    widths = SubnetSpec.uniform(spec, spec.head_dim, spec.head_dim, 20)
    old, h = params["block_0"]["mlp"]["fc2"], x[1][0]

    def error(compensated):
        fc2 = repaired(params, spec, compensated, widths)["block_0"]["mlp"]["fc2"]
        fc2 = jax.tree.map(lambda new, old: np.asarray(new - old), fc2, old)
        lost = h @ fc2["kernel"] + fc2["bias"]
        return np.square(lost).mean()

    half = error(packing.cast(made, jnp.bfloat16))
    assert error(made) <= half < 1.1 * error(made)


# Errors


def test_a_level_for_each_example_is_refused(spec, params, repairs):
    widths = SubnetSpec(*(jnp.full((4, spec.depth), 3) for _ in range(3)))
    with pytest.raises(ValueError, match=r"\(4, 3\).*One sub-network at a time"):
        repaired(params, spec, repairs, widths)


def test_widths_that_are_none_are_refused(spec, params, repairs):
    wrong = SubnetSpec((4,) * 3, (4,) * 3, (4, 41, 4))
    with pytest.raises(ValueError, match="mlp_dim = 41 in block 1"):
        repaired(params, spec, repairs, wrong)


def test_moments_of_another_network_are_refused(spec):
    attn, mlp = ([moment_of(x) for x in xs] for xs in drawn(spec))
    with pytest.raises(ValueError, match="mlp: 2 moments, the network has 3"):
        compensation.from_moments(attn, mlp[:2], spec)
    with pytest.raises(ValueError, match="block_0/attn: .*has 24 inner units"):
        compensation.from_moments(mlp, attn, spec)


@pytest.mark.parametrize("bad", [np.nan, -1.0])
def test_a_covariance_that_is_none_names_its_block(spec, bad):
    attn, mlp = ([moment_of(x) for x in xs] for xs in drawn(spec))
    mlp[1][1][4, 4] = bad
    with pytest.raises(ValueError, match="block_1/mlp: the covariance is not finite"):
        compensation.from_moments(attn, mlp, spec)


def test_stored_arrays_that_do_not_fit_are_listed(spec, repairs):
    flat = packing.pack(repairs)
    flat["block_0.mlp.factor"] = flat["block_0.mlp.factor"][:-1]
    flat["block_7.mlp.mean"] = flat.pop("block_1.mlp.mean")
    with pytest.raises(
        ValueError, match=r"block_1.mlp.mean.*missing.*block_0.*block_7"
    ):
        packing.unpack(flat, spec)
