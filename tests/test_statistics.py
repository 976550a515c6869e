"""The streaming sums against plain float64 formulas over stored features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shake

from flax_skd.io import sources
from flax_skd.method import costs, statistics
from flax_skd.method.vit import ViT

BOTH = ("gradient", "plain")


def collect(spec, params, batch, size, **options):
    """Statistics over `batch` cut into batches of `size`, the last one padded."""
    batches = []
    for start in range(0, len(batch["label"]), size):
        part = {k: v[start : start + size] for k, v in batch.items()}
        pad = size - len(part["label"])
        batches.append(
            {
                k: np.pad(v, ((0, pad),) + ((0, 0),) * (v.ndim - 1))
                for k, v in part.items()
            }
        )
    options = {"cost": costs.correct_logit, "weightings": BOTH, **options}
    return statistics.collect(ViT(spec), params, batches, **options)


def features_and_gradients(spec, params, batch, cost=costs.correct_logit):
    """Every f and dC/df, by adding zeros and differentiating: nothing shared."""
    found = {}

    def record(i, name, f):
        found[i, name] = f
        return f

    images, labels = batch["image"], batch["label"]
    ViT(spec).apply({"params": params}, images, taps=record)
    shapes = {k: v.shape for k, v in found.items()}
    kept = {k: np.asarray(v, np.float64) for k, v in found.items()}

    def total(extra):
        taps = lambda i, name, f: f + extra[i, name]
        logits = ViT(spec).apply({"params": params}, images, taps=taps)
        return cost(logits, labels).sum()

    grads = jax.grad(total)({k: jnp.zeros(s) for k, s in shapes.items()})
    return kept, {k: np.asarray(v, np.float64) for k, v in grads.items()}


@pytest.mark.parametrize("site", ["query", "key", "value"])
def test_covariances_equal_the_formula_in_float64(spec, params, batch, site):
    got = collect(spec, params, batch, 4)
    features, gradients = features_and_gradients(spec, params, batch)
    for block in range(spec.depth):
        f, g = features[block, site], gradients[block, site]
        mean = f.mean((0, 2))
        centred = f - mean[:, None]
        weight = np.abs(f * g).mean(-1)
        np.testing.assert_allclose(got.mean(block, site), mean, rtol=1e-5, atol=1e-6)
        for name, w in (("gradient", weight), ("plain", np.ones_like(weight))):
            want = np.einsum("bhn,bhnd,bhne->hde", w, centred, centred)
            have = got.covariance(block, site, name)
            np.testing.assert_allclose(have, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("site", statistics.SITES)
def test_taylor_scores_equal_the_formula_in_float64(spec, params, batch, site):
    got = collect(spec, params, batch, 12)
    features, gradients = features_and_gradients(spec, params, batch)
    for block in range(spec.depth):
        product = features[block, site] * gradients[block, site]
        axes = (0, 2) if product.ndim == 4 else (0, 1)
        sums = got.sums[block][site]
        for have, want in (
            (sums.taylor1, np.abs(product).sum(axes)),
            (sums.taylor2, np.square(product).sum(axes) / 2),
        ):
            want = want.reshape(have.shape)
            np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-6 * want.max())


def assert_close(a, b):
    """Equal to 1e-5 of each array's largest entry: order of summation is free."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, atol=1e-5 * max(1e-6, np.abs(y).max()))


def derived(stats, spec):
    """What does not depend on the pilot mean."""
    blocks = range(spec.depth)
    return (
        [stats.mean(b, s) for b in blocks for s in statistics.SITES],
        [stats.covariance(b, "value", w) for b in blocks for w in BOTH],
        [stats.sums[b]["hidden"].taylor2 for b in blocks],
    )


@pytest.mark.parametrize("size", [1, 5, 7])
def test_statistics_do_not_depend_on_the_batch_size(spec, params, batch, size):
    whole = collect(spec, params, batch, 12)
    parts = collect(spec, params, batch, size)
    assert float(parts.images) == 12
    assert_close(derived(parts, spec), derived(whole, spec))


def test_statistics_do_not_depend_on_the_number_of_devices(spec, params, batch):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shards = [jax.device_put(batch, rows)]
    options = {"cost": costs.correct_logit, "weightings": BOTH}
    spread = statistics.collect(ViT(spec), params, shards, **options)
    assert_close(derived(spread, spec), derived(collect(spec, params, batch, 12), spec))


def test_a_large_common_offset_does_not_ruin_the_covariance(spec, params, batch):
    shifted = jax.tree.map(lambda x: x, params)
    bias = params["block_0"]["attn"]["value"]["bias"]
    shifted["block_0"]["attn"]["value"]["bias"] = bias + 300.0
    # The output bias takes the offset back, so that features elsewhere stay.
    out = shifted["block_0"]["attn"]["out"]
    out["bias"] = out["bias"] - 300.0 * out["kernel"].sum((0, 1))
    far = collect(spec, shifted, batch, 4).covariance(0, "value", "plain")
    near = collect(spec, params, batch, 4).covariance(0, "value", "plain")
    # Raw sums in float32 would be wrong by 300^2 * 2^-24 * 204 tokens, about 1.
    np.testing.assert_allclose(far, near, atol=1e-3 * float(jnp.abs(near).max()))


@pytest.mark.parametrize("name", ["cross_entropy", "top_logit", "self_kl"])
def test_other_costs_weigh_tokens_by_their_own_gradient(spec, params, batch, name):
    cost = costs.COSTS[name]
    got = collect(spec, params, batch, 12, cost=cost)
    features, gradients = features_and_gradients(spec, params, batch, cost)
    want = np.abs(features[1, "hidden"] * gradients[1, "hidden"]).sum((0, 1))
    assert want.max() > 0
    np.testing.assert_allclose(
        got.sums[1]["hidden"].taylor1[0], want, rtol=1e-4, atol=1e-6 * want.max()
    )


def test_a_backbone_without_a_head_is_calibrated_by_its_feature(spec, params, batch):
    headless = spec.replace(num_classes=0)
    body = {k: v for k, v in params.items() if k != "head"}
    got = collect(headless, body, batch, 12, cost=costs.cost_named("feature", 0))
    assert float(got.sums[0]["hidden"].taylor1.min()) > 0
    with pytest.raises(ValueError, match="no head: use cost 'feature'"):
        costs.cost_named("logit", 0)


@pytest.mark.parametrize("name", ["top_logit", "self_kl"])
def test_the_slope_of_the_largest_is_finite_where_it_is_computed_twice(
    spec, params, batch, name
):
    """Of features behind a LayerNorm, compiled into every loop that reads them."""
    headless = spec.replace(num_classes=0)
    body = {k: v for k, v in params.items() if k != "head"}

    @jax.jit
    def slopes(body):
        def total(body):
            features = ViT(headless).apply({"params": body}, batch["image"])
            return costs.COSTS[name](features, batch["label"]).sum()

        return jax.grad(total)(body)

    for leaf in jax.tree.leaves(slopes(body)):
        assert np.isfinite(leaf).all()


def test_an_unknown_cost_lists_the_known_ones():
    with pytest.raises(ValueError, match="'loss': choose one of logit, top_logit"):
        costs.cost_named("loss", 10)


@pytest.mark.parametrize("name", costs.COSTS)
def test_a_cost_of_a_single_logit_has_a_gradient_or_is_refused(name):
    logits, labels = jnp.ones((2, 1)), jnp.zeros(2, jnp.int32)
    slope = jax.grad(lambda x: costs.COSTS[name](x, labels).sum())(logits)
    if slope.any():
        assert costs.cost_named(name, 1) is costs.COSTS[name]
    else:
        with pytest.raises(ValueError, match="a single logit: use cost 'top_logit'"):
            costs.cost_named(name, 1)


def test_a_nan_in_the_parameters_is_traced_to_its_block(spec, params, batch):
    broken = shake(params, scale=0.0)
    kernel = broken["block_1"]["attn"]["key"]["kernel"]
    broken["block_1"]["attn"]["key"]["kernel"] = kernel.at[0, 0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="values of key in block 1 are not finite"):
        collect(spec, broken, batch, 12)


@pytest.mark.parametrize("cost", [costs.correct_logit, costs.cross_entropy])
@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_that_is_no_class_is_an_error_unless_it_is_padding(
    spec, params, batch, cost, label
):
    labels = np.array(batch["label"])
    labels[3] = label
    wrong = {**batch, "label": labels}
    with pytest.raises(ValueError, match="labels that are no class"):
        collect(spec, params, wrong, 12, cost=cost)
    live = np.ones(12, np.float32)
    live[3] = 0
    ignored = {"label": labels, "weight": live}
    got = collect(spec, params, {**batch, **ignored}, 12, cost=cost)
    ignored["label"] = batch["label"]
    assert_close(got, collect(spec, params, {**batch, **ignored}, 12, cost=cost))
    collect(spec, params, wrong, 12, cost=costs.top_logit)  # reads no label


def test_names_and_arrays_that_are_not_there_are_named(spec, params, batch):
    for names in ("gradient", ("taylor",)):
        with pytest.raises(ValueError, match="a tuple of names, of gradient, plain"):
            collect(spec, params, batch, 12, weightings=names)
    with pytest.raises(ValueError, match="moments 'gradient': name token weightings"):
        collect(spec, params, batch, 12, moments="gradient")
    with pytest.raises(ValueError, match=r"a batch has no weight: .* 0 for padding"):
        statistics.collect(ViT(spec), params, [{"image": 0, "label": 0}])


def test_a_label_or_weight_for_all_images_at_once_is_refused(spec, params, batch):
    # Broadcast in silence, one weight would count one image and move every mean.
    for name, x in (("weight", np.ones(1)), ("label", 0), ("label", np.ones((12, 1)))):
        with pytest.raises(ValueError, match=rf"'{name}': .* label \[B\] and weight"):
            statistics.collect(ViT(spec), params, [{**batch, name: x}])


def test_no_batches_is_an_error(spec, params):
    with pytest.raises(ValueError, match="no calibration images"):
        statistics.collect(ViT(spec), params, [], cost=costs.correct_logit)


def test_a_moment_that_was_not_collected_says_how_to(spec, params, batch):
    got = collect(spec, params, batch, 12, weightings=("gradient",))
    with pytest.raises(ValueError, match=r"collect them with weightings=\('plain',\)"):
        got.covariance(0, "value", "plain")


def test_the_pass_is_traced_once_for_all_batches(spec, params, batch):
    traces = []

    def cost(logits, labels):
        traces.append(1)
        return costs.correct_logit(logits, labels)

    collect(spec, params, batch, 3, cost=cost)
    assert len(traces) == 1


def test_what_is_no_function_and_what_are_no_batches_is_told(spec, params, batch):
    model = ViT(spec)
    for name, known in (("self_kl", "self_kl"), ("kl", "logit")):
        words = rf"cost = '{name}': .* costs.cost_named\('{known}', num_classes\)"
        with pytest.raises(ValueError, match=words):
            statistics.collect(model, params, [batch], cost=name)
    source = sources.ArraySource(batch["image"], batch["label"])
    for wrong, kind in ((source, "Example"), (batch, "str"), (batch["image"], "ndarr")):
        with pytest.raises(ValueError, match=rf"hold a {kind}.*eval_batches\(source"):
            statistics.collect(model, params, wrong)
