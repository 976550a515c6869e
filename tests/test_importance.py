"""Importance at a level against an explicit loop over extracted networks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shake

from flax_skd.method import costs, growth, importance, macs, statistics, subnet
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import sharding

CUT = SubnetSpec((12, 0, 5), (12, 0, 7), (40, 16, 0))  # with removed branches, untied


def batches(batch, size):
    """`batch` in batches of `size`; what pads the last is bright and labelled."""
    out = []
    for start in range(0, len(batch["label"]), size):
        part = {k: v[start : start + size] for k, v in batch.items()}
        pad = size - len(part["label"])
        filling = {"image": 255, "label": 1, "weight": 0}
        out.append(
            {
                k: np.pad(
                    v,
                    ((0, pad),) + ((0, 0),) * (v.ndim - 1),
                    constant_values=filling[k],
                )
                for k, v in part.items()
            }
        )
    return out


def measure(spec, params, batch, widths, size=12, **options):
    return importance.measure(
        ViT(spec), params, batches(batch, size), widths, **options
    )


# The restatement: extracted networks one by one, float64 afterwards


def logits_of(spec, params, batch, widths):
    small = subnet.extract(params, widths)
    out = ViT(spec, widths).apply({"params": small}, batch["image"])
    return np.asarray(out, np.float64)


def scores_of(spec, params, batch, widths):
    """sum |f g| of every kept dim, by adding zeros to the features of the subnet."""
    model, small = ViT(spec, widths), subnet.extract(params, widths)
    found = {}

    def record(block, site, feature):
        if site in statistics.SITES:
            found[block, site] = feature
        return feature

    model.apply({"params": small}, batch["image"], taps=record)

    def total(extra):
        def add(block, site, feature):
            return feature + extra.get((block, site), 0.0)

        logits = model.apply({"params": small}, batch["image"], taps=add)
        return logits[np.arange(len(batch["label"])), batch["label"]].sum()

    grads = jax.grad(total)({k: jnp.zeros_like(f) for k, f in found.items()})
    attn = np.zeros((spec.depth, spec.head_dim))
    mlp = np.zeros((spec.depth, spec.mlp_dim))
    for (block, site), feature in found.items():
        product = np.abs(np.float64(feature) * np.float64(grads[block, site]))
        sums = product.reshape(-1, product.shape[-1])
        if site == "hidden":
            mlp[block, : sums.shape[1]] += sums.sum(0)
        else:  # [B, H, N, d]: heads, tokens and images alike
            attn[block, : sums.shape[1]] += sums.sum(0)
    return attn, mlp


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def mean_loss(name, logits, current, labels):
    rows = np.arange(len(labels))
    if name == "cross_entropy":
        return -log_softmax(logits)[rows, labels].mean()
    if name == "accuracy":
        return -(logits.argmax(-1) == labels).mean()
    p = np.exp(log_softmax(current))
    return (p * (log_softmax(current) - log_softmax(logits))).sum(-1).mean()


def without(widths, block, branch):
    fields = ("qk_dim", "vo_dim") if branch == 0 else ("mlp_dim",)
    cut = {
        f: tuple(0 if i == block else w for i, w in enumerate(getattr(widths, f)))
        for f in fields
    }
    return widths._replace(**cut)


def restated(labels, widths, name, logits, scores):
    """gamma * alpha from the logits of every extracted network, by its widths."""
    base = mean_loss(name, logits[widths], logits[widths], labels)
    rises = {w: mean_loss(name, x, logits[widths], labels) for w, x in logits.items()}
    floor = 1e-3 * np.median(
        [max(0, r - base) for w, r in rises.items() if w != widths]
    )
    parts = []
    for branch, sums in enumerate(scores):
        skipped = [without(widths, block, branch) for block in range(len(sums))]
        gamma = [max(floor, rises[w] - base) for w in skipped]
        total = sums.sum(1, keepdims=True)
        alpha = np.divide(sums, total, out=np.zeros_like(sums), where=total > 0)
        parts.append(np.array(gamma)[:, None] * alpha)
    return parts


def assert_close(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        assert w.max() > 0
        np.testing.assert_allclose(g, w, atol=tolerance * w.max())


@pytest.mark.parametrize("cut", ["full", "cut"])
def test_importance_is_that_of_a_loop_over_extracted_networks(spec, params, batch, cut):
    widths = SubnetSpec.full(spec) if cut == "full" else CUT
    branches = itertools.product(range(spec.depth), (0, 1))
    logits = {
        w: logits_of(spec, params, batch, w)
        for w in {widths, *(without(widths, *branch) for branch in branches)}
    }
    # Labels the network mostly gets right, so that skipping a branch costs accuracy.
    right = logits[widths].argmax(-1).astype(np.int32)
    batch = {**batch, "label": np.where(np.arange(12) < 10, right, batch["label"])}
    scores = scores_of(spec, params, batch, widths)
    for name in ("cross_entropy", "kl", "accuracy"):
        sensitivity = importance.sensitivity_named(name, spec.num_classes)
        got = measure(spec, params, batch, widths, sensitivity=sensitivity)
        want = restated(batch["label"], widths, name, logits, scores)
        # Losses of about 1 are good to 1e-7 in float32, their rises are about .01.
        assert_close(got, want, 1e-4)


def test_dims_that_are_cut_have_no_importance(spec, params, batch):
    got = measure(spec, params, batch, CUT)
    for block, width in enumerate(np.maximum(CUT.qk_dim, CUT.vo_dim)):
        assert (got.attn[block, :width] > 0).all()
        assert (got.attn[block, width:] == 0).all()
    for block, width in enumerate(CUT.mlp_dim):
        assert (got.mlp[block, :width] > 0).all()
        assert (got.mlp[block, width:] == 0).all()


@pytest.mark.parametrize("size", [5, 16])
def test_neither_batch_size_nor_padding_counts(spec, params, batch, size):
    whole = measure(spec, params, batch, CUT)
    assert_close(measure(spec, params, batch, CUT, size=size), whole, 1e-5)


def test_a_padded_example_that_is_not_finite_leaves_the_rises_alone(
    spec, params, batch
):
    def bad_when_padded(logits, current, labels):
        ce = importance.cross_entropy(logits, current, labels)
        return jnp.where(labels == -1, jnp.nan, ce)

    (padded,) = batches(batch, 16)
    padded["label"][12:] = -1
    got = importance.measure(
        ViT(spec), params, [padded], CUT, sensitivity=bad_when_padded
    )
    assert_close(got, measure(spec, params, batch, CUT), 1e-5)


@pytest.mark.parametrize("cost", [costs.top_log_probability, costs.top_logit])
def test_kl_and_the_costs_of_the_first_class_need_no_labels(spec, params, batch, cost):
    options = {"cost": cost, "sensitivity": importance.kl}
    one = measure(spec, params, batch, CUT, **options)
    other = measure(
        spec, params, {**batch, "label": 0 * batch["label"]}, CUT, **options
    )
    np.testing.assert_array_equal(one.attn, other.attn)
    np.testing.assert_array_equal(one.mlp, other.mlp)


def test_a_backbone_without_a_head_is_measured_by_its_feature(spec, params, batch):
    headless = spec.replace(num_classes=0)
    body = {k: v for k, v in params.items() if k != "head"}
    got = measure(
        headless,
        body,
        batch,
        CUT,
        cost=costs.cost_named("feature", 0),
        sensitivity=importance.sensitivity_named("feature", 0),
    )
    assert (got.mlp[0] > 0).all() and (got.attn[1] == 0).all()


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight virtual devices")
def test_eight_devices_grow_the_list_of_one(spec, params, batch):
    batch = {k: np.concatenate([v, v])[:16] for k, v in batch.items()}
    lists = []
    for mesh in (
        sharding.mesh({"data": 1}, devices=jax.devices()[:1]),
        sharding.mesh({"data": 8}),
    ):
        spread = [sharding.shard_batch(b, mesh) for b in batches(batch, 8)]
        there = jax.device_put(params, sharding.param_sharding(params, mesh))
        dropout_list = growth.start(spec)
        for epoch in range(2):
            widths = dropout_list.widths(int(dropout_list.levels), spec)
            dropout_list = growth.grow(
                dropout_list,
                spec,
                importance.measure(ViT(spec), there, spread, widths),
                target_macs_saved=growth.schedule(
                    epoch, 2, model_macs=macs.macs(spec), share=0.6
                ),
            )
        lists.append(dropout_list)
    assert int(lists[0].levels) > 10
    for one, many in zip(*lists, strict=True):
        np.testing.assert_array_equal(one, many)


def test_one_trace_serves_all_batches_and_levels(spec, params, batch):
    traces = []

    def cost(logits, labels):
        traces.append(1)
        return costs.correct_logit(logits, labels)

    half = SubnetSpec.uniform(spec, 6, 6, 20)
    for widths in (SubnetSpec.full(spec), half, CUT):
        arrays = SubnetSpec(*map(jnp.asarray, widths))
        measure(spec, params, batch, widths, size=5, cost=cost)
        measure(spec, params, batch, arrays, size=5, cost=cost)
    assert len(traces) == 1


# Errors


def test_no_images_are_an_error(spec, params, batch):
    empty = {**batch, "weight": np.zeros(12, np.float32)}
    for source in ([], [empty]):
        with pytest.raises(ValueError, match="no calibration images"):
            importance.measure(ViT(spec), params, source, CUT)
    without = {k: x for k, x in batch.items() if k != "weight"}
    with pytest.raises(ValueError, match="a batch has no weight"):
        importance.measure(ViT(spec), params, [without], CUT)


def test_a_nan_in_the_parameters_is_an_error_that_names_a_block(spec, params, batch):
    broken = shake(params, scale=0.0)
    kernel = broken["block_1"]["mlp"]["fc1"]["kernel"]
    broken["block_1"]["mlp"]["fc1"]["kernel"] = kernel.at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"in block \d is not finite"):
        measure(spec, broken, batch, CUT)


def test_widths_of_another_network_are_refused(spec, params, batch):
    with pytest.raises(ValueError, match="mlp_dim = 41 in block 0"):
        measure(spec, params, batch, SubnetSpec((12,) * 3, (12,) * 3, (41,) * 3))


def test_sensitivities_are_looked_up_by_name():
    with pytest.raises(ValueError, match="'loss': choose one of cross_entropy"):
        importance.sensitivity_named("loss", 10)
    with pytest.raises(ValueError, match="no head: use sensitivity 'feature'"):
        importance.sensitivity_named("kl", 0)


@pytest.mark.parametrize("name", importance.SENSITIVITIES)
def test_a_sensitivity_tells_outputs_of_a_single_logit_apart_or_is_refused(name):
    one, other, labels = jnp.ones((3, 1)), jnp.zeros((3, 1)), jnp.zeros(3, jnp.int32)
    rise = importance.SENSITIVITIES[name](one, other, labels)
    rise = rise - importance.SENSITIVITIES[name](other, other, labels)
    if name == "feature":
        assert importance.sensitivity_named(name, 1) is importance.SENSITIVITIES[name]
        assert rise.min() > 0
    else:
        assert not rise.any()
        with pytest.raises(ValueError, match="a single logit: use .* 'feature'"):
            importance.sensitivity_named(name, 1)
