"""The ViT against an independent NumPy forward, and masked against extracted."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from conftest import shake

from flax_skd.method import attention, layers, macs, subnet, vit
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import ViT

VARIANTS = {
    "plain": {},
    "average pooling": {"pool": "avg", "class_token": False},
    "fc_norm": {"pool": "avg", "fc_norm": True},
    "distilled": {"distilled": True},
    "pre-logits": {"pre_logits": 11},
    "no qkv bias": {"qkv_bias": False},
    "LayerScale and free prefix": {"layer_scale": True, "pos_embed_prefix": False},
    "registers": {"registers": 3},
    "tanh GELU, eps, pre_norm": {"gelu": "tanh", "norm_eps": 1e-3, "pre_norm": True},
    "grey images": {"in_channels": 1, "mean": (0.3,), "std": (0.2,)},
    "no head": {"num_classes": 0},
    "wide heads": {"head_dim": 7},
}


def make(spec, changes):
    if "pre_logits" in changes and changes.get("distilled"):
        raise AssertionError("no published network has both")
    spec = spec.replace(**changes)
    return spec, shake(vit.init(spec, jax.random.key(3)), seed=4)


def in_float64(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def images_for(spec, count=3):
    size = (count, spec.image_size, spec.image_size, spec.in_channels)
    return np.random.default_rng(5).normal(size=size).astype(np.float32)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_a_plain_float64_forward(spec, changes):
    spec, params = make(spec, changes)
    images = images_for(spec)
    want = reference.logits(images, in_float64(params), spec)
    have = ViT(spec).apply({"params": params}, images)
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_parameters_are_counted_without_a_network(spec, changes):
    spec, params = make(spec, changes)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert macs.param_count(spec) == count
    widths = SubnetSpec((4, 0, 2), (3, 0, 4), (0, 7, spec.mlp_dim))
    small = subnet.extract(params, widths)
    assert macs.param_count(spec, widths) == sum(x.size for x in jax.tree.leaves(small))


def test_uint8_images_are_normalised_by_the_spec(spec, params, batch):
    spec = spec.replace(mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    floats = (batch["image"] / 255.0 - np.array(spec.mean)) / np.array(spec.std)
    have = ViT(spec).apply({"params": params}, batch["image"])
    want = ViT(spec).apply({"params": params}, floats.astype(np.float32))
    np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-5)


def test_images_of_another_size_are_refused_with_both_sizes(spec, params):
    with pytest.raises(ValueError, match=r"\(1, 8, 8, 3\), the network takes .*16"):
        ViT(spec).apply({"params": params}, np.zeros((1, 8, 8, 3), np.float32))


def test_attention_functions_agree_at_unequal_widths():
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(a, (2, 3, 7, w)) for a, w in zip(keys, (4, 4, 6)))
    for args in ((q, k, v), (v, v, q)):
        np.testing.assert_allclose(
            attention.dot_product_attention(*args, 0.3),
            attention.einsum_attention(*args, 0.3),
            atol=1e-5,
        )


@pytest.mark.parametrize("tokens", [7, 8])
def test_zeros_put_in_for_cudnn_change_no_gradient(tokens):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, 3, tokens, w) for w in (4, 4, 6, 6)]
    *args, g = (jax.random.normal(a, s) for a, s in zip(keys, shapes))

    def back(attend):
        return jax.vjp(lambda *args: attend(*args, 0.3), *args)[1](g)

    have, want = map(
        back, (attention.dot_product_attention, attention.einsum_attention)
    )
    for a, b in zip(have, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "capability", "fused"),
    [
        ("gpu", "9.0", True),
        ("gpu", "8.0", True),
        ("gpu", "12.1", True),
        ("gpu", "7.5", False),
        ("gpu", "gfx942", False),
        ("tpu", None, False),
        ("cpu", None, False),
    ],
)
def test_cudnn_is_asked_where_it_computes_bfloat16(
    monkeypatch, platform, capability, fused
):
    """What is asked, seen from the call; no GPU is here."""
    asked = []

    def attend(q, k, v, **options):
        asked.append((q.shape, options["implementation"]))
        return jnp.zeros(q.shape, q.dtype)

    device = types.SimpleNamespace(platform=platform)
    if capability:
        device.compute_capability = capability
    monkeypatch.setattr(attention, "_default_device", lambda: device)
    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    for dtype, width in (("float32", 12), ("bfloat16", 12), ("bfloat16", 136)):
        x = jnp.ones((2, 3, 7, width), dtype)
        attention.fastest_attention(x, x, x, 0.3)
    # An even number of tokens, heads of a multiple of eight.
    assert asked == [((2, 8, 3, 16), "cudnn")] * fused


def test_the_device_is_the_one_that_jax_computes_on():
    devices = jax.devices()
    assert attention._default_device() == devices[0]
    with jax.default_device(devices[3]):
        assert attention._default_device() == devices[3]
    with jax.default_device("cpu"):
        assert attention._default_device() == jax.devices("cpu")[0]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.03)]
)
@pytest.mark.parametrize("widths", [(4, 6), (9, 5), (5, 9), (11, 8)])
def test_gradients_of_attention_are_those_of_its_formula(widths, dtype, tolerance):
    """At widths below and above the number of tokens, whose products differ."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, 3, 7, w) for w in (widths[0], *widths, widths[1])]
    *args, cotangent = (jax.random.normal(a, s) for a, s in zip(keys, shapes))

    def formula(q, k, v):
        weights = jax.nn.softmax(0.3 * (q @ k.swapaxes(2, 3)))
        return weights @ v

    def attend(*args):
        args = (x.astype(dtype) for x in args)
        return attention.einsum_attention(*args, 0.3).astype(jnp.float32)

    want = jax.vjp(formula, *args)[1](cotangent)
    have = jax.vjp(attend, *args)[1](cotangent)
    for a, b in zip(have, want, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))


def test_repeated_is_a_broadcast_whose_gradient_is_the_sum():
    x, weights = (
        jax.random.normal(jax.random.key(i), s)
        for i, s in enumerate([(3, 4), (5, 3, 4)])
    )
    have, back = jax.vjp(lambda x: layers.repeated(x, 5), x)
    np.testing.assert_array_equal(have, jnp.broadcast_to(x, (5, 3, 4)))
    np.testing.assert_allclose(back(weights)[0], weights.sum(0), rtol=1e-5, atol=1e-6)


def test_an_empty_batch_has_no_logits_and_no_gradient(spec, params, batch):
    """The last batch of a host may be empty, in a loop of one's own."""

    def total(params):
        logits = ViT(spec).apply({"params": params}, batch["image"][:0])
        assert logits.shape == (0, spec.num_classes)
        return logits.sum()

    gradient = jax.jit(jax.grad(total))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_attention_survives_scores_that_overflow_exp():
    q = jnp.full((1, 1, 3, 2), 100.0)
    v = jnp.arange(6.0).reshape(1, 1, 3, 2)
    have = attention.einsum_attention(q, q, v, 1.0)
    np.testing.assert_allclose(have[0, 0, 0], [2.0, 3.0], atol=1e-6)


def test_bfloat16_stays_near_float32_and_returns_float32(spec, params, batch):
    wide = ViT(spec).apply({"params": params}, batch["image"])
    half = ViT(spec, dtype=jnp.bfloat16).apply({"params": params}, batch["image"])
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, wide, atol=0.05 * float(jnp.abs(wide).max()))


def test_rematerialised_blocks_give_the_same_gradients(spec, params, batch):
    widths = SubnetSpec((4, 0, 2), (3, 0, 4), (0, 7, spec.mlp_dim))

    def grads(remat):
        def total(p):
            args = (batch["image"], subnet.masks(spec, widths))
            return ViT(spec, remat=remat).apply({"params": p}, *args).sum()

        return jax.grad(total)(params)

    for a, b in zip(jax.tree.leaves(grads(True)), jax.tree.leaves(grads(False))):
        np.testing.assert_allclose(a, b, atol=1e-5)


WIDTHS = {
    "full": SubnetSpec((12,) * 3, (12,) * 3, (40,) * 3),
    "ragged": SubnetSpec((5, 12, 1), (3, 7, 12), (9, 40, 1)),
    "branches removed": SubnetSpec((5, 0, 12), (3, 0, 7), (0, 20, 40)),
    "a whole block removed": SubnetSpec((5, 0, 12), (3, 0, 7), (9, 0, 40)),
    "no branch at all": SubnetSpec((0,) * 3, (0,) * 3, (0,) * 3),
}


@pytest.mark.parametrize("layer_scale", [False, True])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_masked_equals_extracted_in_logits_and_gradients(
    spec, batch, widths, layer_scale
):
    spec, params = make(spec, {"layer_scale": layer_scale})
    small = subnet.extract(params, widths)

    def masked(p):
        logits = ViT(spec).apply(
            {"params": p}, batch["image"], subnet.masks(spec, widths)
        )
        return (logits**2).sum(), logits

    def of_masked_parameters(p):
        p = subnet.masked(p, spec, widths)
        logits = ViT(spec).apply({"params": p}, batch["image"])
        return (logits**2).sum(), logits

    def extracted(p):
        logits = ViT(spec, widths).apply({"params": p}, batch["image"])
        return (logits**2).sum(), logits

    wide, logits = jax.grad(masked, has_aux=True)(params)
    same, same_logits = jax.grad(of_masked_parameters, has_aux=True)(params)
    np.testing.assert_allclose(logits, same_logits, atol=1e-5)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(wide), strict=True):
        scale = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)
    narrow, cut_logits = jax.grad(extracted, has_aux=True)(small)
    np.testing.assert_allclose(logits, cut_logits, atol=1e-5)
    # The gradient of the small network is the slice of the masked one ...
    for a, b in zip(
        jax.tree.leaves(subnet.extract(wide, widths)),
        jax.tree.leaves(narrow),
        strict=True,
    ):
        scale = max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=1e-5 * scale)
    # ... and what was cut has none.
    for i, (qk, vo, mlp) in enumerate(zip(*widths)):
        attn, hidden = wide[f"block_{i}"]["attn"], wide[f"block_{i}"]["mlp"]
        cut = [attn[n]["kernel"][..., qk:] for n in ("query", "key")]
        cut += [attn["value"]["kernel"][..., vo:], attn["out"]["kernel"][:, vo:]]
        cut += [hidden["fc1"]["kernel"][:, mlp:], hidden["fc2"]["kernel"][mlp:]]
        assert all(float(jnp.abs(c).sum()) == 0 for c in cut)


def test_extracting_everything_changes_nothing(spec, params):
    same = subnet.extract(params, SubnetSpec.full(spec))
    assert jax.tree.structure(same) == jax.tree.structure(params)
    pairs = zip(jax.tree.leaves(same), jax.tree.leaves(params))
    assert all((a == b).all() for a, b in pairs)


def test_extracting_twice_equals_extracting_the_smaller(spec, params):
    middle, small = WIDTHS["ragged"], SubnetSpec((2, 3, 0), (3, 1, 0), (0, 8, 1))
    twice = subnet.extract(subnet.extract(params, middle), small)
    once = subnet.extract(params, small)
    assert jax.tree.structure(twice) == jax.tree.structure(once)
    pairs = zip(jax.tree.leaves(twice), jax.tree.leaves(once))
    assert all((a == b).all() for a, b in pairs)
    assert subnet.widths_of(once, spec) == small


def test_extracting_more_than_there_is_names_the_block(spec, params):
    small = subnet.extract(params, WIDTHS["ragged"])
    with pytest.raises(ValueError, match="qk_dim = 12 in block 0, .* hold 5"):
        subnet.extract(small, SubnetSpec.full(spec))
    with pytest.raises(ValueError, match=r"give variables\['params'\]"):
        subnet.extract({"params": params}, SubnetSpec.full(spec))


def test_each_example_may_have_its_own_subnetwork(spec, params, batch):
    rows = [WIDTHS["full"], WIDTHS["ragged"], WIDTHS["branches removed"]] * 4
    widths = SubnetSpec(*(np.array(f) for f in zip(*rows)))
    together = ViT(spec).apply(
        {"params": params}, batch["image"], subnet.masks(spec, widths)
    )
    for i, row in enumerate(rows[:3]):
        alone = ViT(spec).apply(
            {"params": params}, batch["image"][i : i + 1], subnet.masks(spec, row)
        )
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)


def test_one_compilation_serves_every_subnetwork(spec, params, batch):
    traces = []

    @jax.jit
    def forward(widths):
        traces.append(1)
        masks = subnet.masks(spec, widths)
        return ViT(spec).apply({"params": params}, batch["image"], masks)

    outs = [
        forward(SubnetSpec(*(jnp.array(f) for f in widths)))
        for widths in WIDTHS.values()
    ]
    assert len(traces) == 1 and len(outs) == len(WIDTHS)


def test_named_variants_have_the_published_parameter_counts():
    published = {
        "Ti/16": 5_717_416,
        "S/16": 22_050_664,
        "B/16": 86_567_656,
        "B/32": 88_224_232,
        "L/16": 304_326_632,
        "H/14": 632_045_800,
    }
    counts = {n: macs.param_count(ViTSpec.named(n)) for n in published}
    assert counts == published
    distilled = ViTSpec.named("Ti/16").replace(distilled=True)
    assert macs.param_count(distilled) == 5_910_800  # DeiT-Ti distilled


def test_a_sub_network_without_a_block_is_cut_again(spec, params):
    wide = SubnetSpec((6, 0, 6), (6, 0, 6), (20, 0, 20))
    narrow = SubnetSpec((2, 0, 3), (2, 0, 3), (7, 0, 9))
    again = subnet.extract(subnet.extract(params, wide), narrow)
    want = subnet.extract(params, narrow)
    assert jax.tree.structure(again) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, again, want)
    with pytest.raises(ValueError, match="qk_dim = 1 in block 1, .* hold 0"):
        subnet.extract(want, SubnetSpec((1, 1, 1), (1, 1, 1), (1, 1, 1)))


@pytest.mark.parametrize("kind", [list, np.array, jnp.array])
def test_widths_of_a_json_or_an_array_make_the_module_that_tuples_make(spec, kind):
    widths = SubnetSpec((6, 3, 0), (6, 2, 0), (40, 0, 7))
    model = ViT(spec, SubnetSpec(*map(kind, widths)))
    assert model == ViT(spec, widths) and hash(model) == hash(ViT(spec, widths))
    with pytest.raises(ValueError, match="qk_dim = 99 in block 1"):
        ViT(spec, SubnetSpec(*map(kind, widths._replace(qk_dim=(6, 99, 0)))))


def test_integers_that_are_no_pixels_are_refused(spec, params, batch):
    images = np.zeros(batch["image"].shape, np.int32)
    with pytest.raises(ValueError, match="images are int32: give pixels as uint8"):
        ViT(spec).apply({"params": params}, images)


def test_fresh_parameters_are_float32_where_jax_computes_in_float64(spec, batch):
    there = spec.replace(layer_scale=True, registers=2, distilled=True)
    jax.config.update("jax_enable_x64", True)
    try:
        params = vit.init(there, jax.random.key(0))
        program = jax.make_jaxpr(ViT(there).apply)({"params": params}, batch["image"])
    finally:
        jax.config.update("jax_enable_x64", False)
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {"float32"}
    assert "f64[" not in str(program)


@pytest.mark.parametrize("dtype", [jnp.uint8, "int32"])
def test_a_computation_in_integers_is_refused(spec, params, batch, dtype):
    with pytest.raises(ValueError, match="that of the computation, float32 or bfloat"):
        ViT(spec, dtype=dtype).apply({"params": params}, batch["image"])
