"""PIAD's masks and the losses that teach, against plain restatements."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_repairs

from flax_skd.io.checkpoint import Supernet
from flax_skd.method import compensation, growth, losses, macs, piad, subnet, vit
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import configured_loss, distillation, objective, programs, train
from flax_skd.run.config_files import load


@pytest.fixture(scope="module")
def levels(spec):
    return jax.tree.map(jnp.asarray, piad.uniform(spec, steps=4))


@pytest.fixture(scope="module")
def state(params, levels):
    return train.TrainState(
        jnp.int32(0), params, None, None, None, objective.Elastic(levels)
    )


@pytest.fixture(scope="module")
def cut(spec, params, batch, levels):
    """Logits of the extracted network at a level."""

    @functools.cache
    def logits(level):
        widths = piad.uniform(spec, steps=4).widths(level, spec)
        small = subnet.extract(params, widths)
        return ViT(spec, widths).apply({"params": small}, batch["image"])

    return logits


def kl(logits, teacher):
    p, q = (np.asarray(jax.nn.softmax(x), np.float64) for x in (teacher, logits))
    return (p * np.log(p / q)).sum(-1).mean()


@pytest.mark.parametrize("sampling", ["per_step", "per_example"])
def test_piad_trains_the_level_it_drew(spec, params, batch, state, cut, sampling):
    cut_of = objective.sampled_levels(spec, sampling=sampling)
    loss = objective.classification_loss(ViT(spec), cut_of=cut_of)
    rng = jax.random.key(5)
    value, metrics = loss(params, batch, rng, state)
    level_rng, _ = jax.random.split(rng)
    shape = (12,) if sampling == "per_example" else ()
    drawn = np.asarray(piad.sample_level(level_rng, state.extra.dropout_list, shape))
    drawn = np.broadcast_to(drawn, (12,))
    rows = jnp.stack([cut(int(s))[i] for i, s in enumerate(drawn)])
    want = losses.cross_entropy(rows, batch["label"])
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(metrics["level"], drawn.mean(), rtol=1e-6)
    assert float(metrics["levels"]) == 3
    shares = [
        macs.macs(spec, state.extra.dropout_list.widths(int(s), spec)) / macs.macs(spec)
        for s in drawn
    ]
    np.testing.assert_allclose(metrics["macs_share"], np.mean(shares), rtol=1e-5)


def test_an_unknown_sampling_lists_the_known_ones(spec):
    with pytest.raises(ValueError, match="'per_epoch': choose per_step or per_example"):
        objective.sampled_levels(spec, sampling="per_epoch")


def test_levels_drawn_by_macs_spread_evenly_over_sizes(spec):
    # A list with many large networks and few small ones.
    rows = [piad.uniform(spec, steps=40).widths(s, spec) for s in (*range(10), 20, 39)]
    uneven = piad.from_rows(rows, spec, max_levels=20)
    shares = [macs.macs(spec, w) / macs.macs(spec) for w in rows]
    draw = functools.partial(piad.sample_level_by_macs, spec=spec)
    drawn = np.asarray(draw(jax.random.key(0), uneven, (4000,)))
    assert drawn.min() == 0 and drawn.max() == len(rows) - 1
    middle = (min(shares) + max(shares)) / 2
    found = np.array(shares)[drawn]
    # Uniform in MACs: the mean is the middle of the range, to the coarse grid.
    assert abs(found.mean() - middle) < 0.05
    assert np.array(shares).mean() > middle + 0.1


def test_in_place_distillation_is_the_labels_and_the_full_network(
    spec, params, batch, state, cut
):
    rng = jax.random.key(7)
    value, metrics = distillation.with_full(ViT(spec))(params, batch, rng, state)
    (level,) = distillation.one_random(rng, state.extra.dropout_list)
    part = kl(cut(int(level)), cut(0))
    want = float(losses.cross_entropy(cut(0), batch["label"])) + part
    np.testing.assert_allclose(value, want, rtol=1e-4)
    np.testing.assert_allclose(metrics["subnet_loss"], part, rtol=1e-3, atol=1e-5)


def test_the_sandwich_trains_full_smallest_and_a_random_level(
    spec, params, batch, state, cut
):
    rng = jax.random.key(8)
    loss = distillation.with_full(ViT(spec), levels_of=distillation.smallest_and_random)
    value, _ = loss(params, batch, rng, state)
    smallest, random = distillation.smallest_and_random(rng, state.extra.dropout_list)
    assert int(smallest) == 3
    own = float(losses.cross_entropy(cut(0), batch["label"]))
    parts = [kl(cut(int(s)), cut(0)) for s in (smallest, random)]
    np.testing.assert_allclose(value, own + np.mean(parts), rtol=1e-4)


def test_no_gradient_reaches_the_teacher(spec, params, batch, state):
    def part(p):
        full = ViT(spec).apply({"params": p}, batch["image"])
        return distillation.divergence(jnp.zeros_like(full), full)

    grads = jax.grad(part)(params)
    assert all(float(jnp.abs(g).max()) == 0 for g in jax.tree.leaves(grads))


def test_a_frozen_teacher_adds_its_divergence(spec, params, batch, state, cut):
    other = jax.tree.map(lambda x: x * 0.9, params)
    teacher = distillation.frozen(ViT(spec), student=spec)
    state = state._replace(frozen=other)
    loss = distillation.with_teacher(ViT(spec), teacher)
    value, metrics = loss(params, batch, jax.random.key(0), state)
    taught = kl(cut(0), ViT(spec).apply({"params": other}, batch["image"]))
    want = float(losses.cross_entropy(cut(0), batch["label"])) + taught
    np.testing.assert_allclose(value, want, rtol=1e-4)
    np.testing.assert_allclose(metrics["teacher_kl"], taught, rtol=1e-3)


def test_a_teacher_reads_images_by_its_own_mean_and_std(spec, params, batch, state):
    """Mixed images come normalised, for the student."""
    own = spec.replace(mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))
    state = state._replace(frozen=params)
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, batch["image"].shape, np.uint8)
    want = ViT(own).apply({"params": params}, vit.normalise(pixels, own))
    teacher = distillation.frozen(ViT(own), student=spec)
    for images in (jnp.asarray(pixels), vit.normalise(pixels, spec)):
        np.testing.assert_allclose(teacher(images, state), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"), [("num_classes", 7), ("image_size", 32), ("in_channels", 1)]
)
def test_a_teacher_of_other_classes_or_images_is_refused(spec, name, value):
    changes = {name: value}
    if name == "in_channels":
        changes |= {"mean": (0.5,), "std": (0.5,)}
    words = f"teacher has {name} = {getattr(spec, name)}, the student {value}: "
    with pytest.raises(ValueError, match=words):
        distillation.frozen(ViT(spec), student=spec.replace(**changes))


@pytest.mark.parametrize("name", ["labels", "in_place"])
def test_a_compensated_network_is_trained_as_it_is_extracted(
    spec, params, batch, levels, name
):
    repairs = random_repairs(spec)
    extra = objective.Elastic(levels, repairs)
    state = train.TrainState(jnp.int32(0), params, None, None, None, extra)
    widths = piad.uniform(spec, steps=4).widths(2, spec)
    refit = jax.jit(compensation.repaired, static_argnums=1)
    whole = refit(params, spec, repairs, widths)
    small = subnet.extract(whole, widths)
    logits = ViT(spec, widths).apply({"params": small}, batch["image"])
    plain = ViT(spec, widths).apply(
        {"params": subnet.extract(params, widths)}, batch["image"]
    )
    assert float(jnp.abs(logits - plain).max()) > 1e-2, "repairs change the cut"
    want = losses.cross_entropy(logits, batch["label"])
    if name == "labels":
        cut_of = objective.sampled_levels(spec, draw=lambda *args: jnp.int32(2))
        loss = objective.classification_loss(ViT(spec), cut_of=cut_of)
    else:
        loss = distillation.with_full(
            ViT(spec),
            levels_of=lambda rng, dropout_list: [jnp.int32(2)],
        )
        full = ViT(spec).apply({"params": params}, batch["image"])
        want = losses.cross_entropy(full, batch["label"]) + kl(logits, full)
    value, _ = jax.jit(loss)(params, batch, jax.random.key(0), state)
    np.testing.assert_allclose(value, want, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": "per_example"},
        {"masks": "random_units"},
        {"masks": "weighted_units"},
        {"masks": "branches"},
    ],
)
def test_a_compensation_goes_with_one_level_a_step_alone(spec, params, change):
    full = SubnetSpec.full(spec)
    network = Supernet(
        params, spec, piad.from_rows([full], spec), {}, random_repairs(spec)
    )
    config = load("configs/piad.py")
    config.piad.update(change)
    with pytest.raises(ValueError, match="--config.compensation=none"):
        programs.piad_program(config, network)


@pytest.mark.parametrize("loss", ["labels", "in_place", "sandwich"])
@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_every_loss_refuses_a_smoothing_that_is_no_share(spec, loss, rate):
    config = load("configs/piad.py")
    config.label_smoothing, config.piad.loss, config.drop_path = rate, loss, 0.0
    with pytest.raises(ValueError, match=r"label_smoothing = .* must be in \[0, 1\)"):
        configured_loss.of_piad(config, ViT(spec), growth.Groups())
