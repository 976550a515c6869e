"""Mixed batches against plain NumPy, their chances, and one program for all steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_skd.method import costs, losses, vit
from flax_skd.run import mixing, sharding

OFF = mixing.Mixing(mixup=0, cutmix=0, smoothing=0, erase=0)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


@pytest.fixture(scope="module")
def images():
    """Pixel values that name image and place, so that a copy shows where it is from."""
    return jnp.arange(6 * 16 * 16 * 3, dtype=jnp.float32).reshape(6, 16, 16, 3) / 100


@pytest.fixture(scope="module")
def targets():
    return jnp.eye(5)[jnp.array([0, 1, 2, 3, 4, 1])]


def classes_kept(targets, before):
    """The share of its label that the first image keeps; its pair's is another."""
    assert before[0].argmax() != before[-1].argmax()
    return float(targets[0, before[0].argmax()])


# Labels.


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smoothed_targets_are_what_numpy_says(smoothing):
    labels = np.array([2, 0, 4])
    expected = np.full((3, 5), smoothing / 5)
    expected[np.arange(3), labels] += 1 - smoothing
    got = mixing.smoothed_targets(jnp.array(labels), num_classes=5, smoothing=smoothing)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    again = mixing.smoothed_targets(
        jnp.eye(5)[labels], num_classes=5, smoothing=smoothing
    )
    np.testing.assert_allclose(again, expected, rtol=1e-6)


def test_smoothed_targets_give_the_loss_of_label_smoothing():
    logits, labels = jax.random.normal(jax.random.key(0), (4, 5)), jnp.arange(4)
    targets = mixing.smoothed_targets(labels, num_classes=5, smoothing=0.1)
    np.testing.assert_allclose(
        losses.cross_entropies(logits, targets),
        losses.cross_entropies(logits, labels, label_smoothing=0.1),
        rtol=1e-5,
    )


def test_a_class_that_is_none_is_noticed():
    got = mixing.smoothed_targets(jnp.array([-1, 5, 1]), num_classes=5, smoothing=0.1)
    assert np.isnan(got).any(-1).tolist() == [True, True, False]


# Mixup.


def test_mixup_is_the_weighted_mean_with_the_reversed_batch(images, targets):
    for key in keys(5):
        got, labels = mixing.mixup(key, images, targets, alpha=0.8)
        share = classes_kept(labels, targets)
        x, t = np.asarray(images), np.asarray(targets)
        np.testing.assert_allclose(
            got, share * x + (1 - share) * x[::-1], rtol=1e-5, atol=1e-5
        )
        np.testing.assert_allclose(labels, share * t + (1 - share) * t[::-1], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.8, 1.0, 0.2])
def test_shares_follow_the_beta_law(targets, alpha):
    tiny = jnp.zeros((6, 1, 1, 1))

    def share(key):
        return mixing.mixup(key, tiny, targets, alpha=alpha)[1][0, 0]

    shares = np.asarray(jax.jit(jax.vmap(share))(keys(4000)))
    variance = 1 / (4 * (2 * alpha + 1))
    assert shares.min() >= 0 and shares.max() <= 1
    assert abs(shares.mean() - 0.5) < 4 * np.sqrt(variance / 4000)
    assert abs(shares.var() / variance - 1) < 0.08


# Cutmix.


def test_cutmix_pastes_one_box_of_the_reversed_batch(images, targets):
    for key in keys(8):
        got, labels = map(np.asarray, mixing.cutmix(key, images, targets, alpha=1.0))
        x, t = np.asarray(images), np.asarray(targets)
        other = (got != x).any(-1)
        assert (other == other[0]).all()
        rows, columns = (np.flatnonzero(other[0].any(axis)) for axis in (1, 0))
        box = np.zeros((16, 16), bool)
        if rows.size:
            box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        np.testing.assert_array_equal(other[0], box)
        np.testing.assert_array_equal(got, np.where(box[None, ..., None], x[::-1], x))
        share = np.float32((~box).mean())
        assert classes_kept(labels, t) == share  # exactly
        np.testing.assert_array_equal(labels, share * t + (1 - share) * t[::-1])


def test_the_share_of_cutmix_is_of_the_box_its_draws_ask_for(targets):
    """NumPy's box from the same share and centre, over pictures that are not square."""
    size, canvas = np.array([12, 20]), jnp.zeros((6, 12, 20, 1))
    areas = []
    for key in keys(12, seed=3):
        share_key, centre_key = jax.random.split(key)
        share = float(jax.random.beta(share_key, 1.0, 1.0, (), jnp.float32))
        centre = np.asarray(jax.random.randint(centre_key, (1, 2), 0, size[None]))[0]
        half = np.floor(np.sqrt(1 - share) * size).astype(int) // 2
        sides = np.minimum(centre + half, size) - np.maximum(centre - half, 0)
        labels = mixing.cutmix(key, canvas, targets, alpha=1.0)[1]
        areas.append(sides.prod())
        assert abs(classes_kept(labels, targets) - (1 - areas[-1] / 240)) < 1e-6
    assert len(set(areas)) > 6


# One or the other.


def test_mix_takes_either_kind_as_often_as_told(images, targets):
    def is_cut(key, switch):
        """Cutmix takes each pixel from one image or the other."""
        got, _ = mixing.mix(key, images, targets, mixing.Mixing(switch=switch))
        return ((got == images) | (got == images[::-1])).all()

    for switch in (0.3, 1.0):
        run = jax.jit(jax.vmap(functools.partial(is_cut, switch=switch)))
        share = float(run(keys(300)).mean())
        assert abs(share - switch) <= 4 * np.sqrt(switch * (1 - switch) / 300)


def test_mix_with_one_kind_off_is_the_other_and_with_both_off_nothing(images, targets):
    given = jax.random.key(7), images, targets
    for got, want in (
        (mixing.mix(*given, mixing.Mixing(cutmix=0)), mixing.mixup(*given, alpha=0.8)),
        (mixing.mix(*given, mixing.Mixing(mixup=0)), mixing.cutmix(*given, alpha=1.0)),
        (mixing.mix(*given, OFF), (images, targets)),
    ):
        jax.tree.map(np.testing.assert_array_equal, got, want)


# Erasing.


def boxes(erased):
    """(rows, columns) of the box that was erased in each image, 0 for none."""
    for mask in erased:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if rows.size:
            inside = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert inside.all() and inside.sum() == mask.sum()
        yield rows.size, columns.size


def test_erasing_takes_one_box_of_a_quarter_of_the_images_in_its_bounds():
    images = jnp.full((2000, 24, 24, 1), 50.0)  # far from any normal noise
    erase = functools.partial(mixing.random_erasing, probability=0.25)
    got = np.asarray(jax.jit(erase)(jax.random.key(0), images))
    sides = np.array(list(boxes(got[..., 0] != 50)))
    hit = sides[:, 0] > 0
    assert abs(hit.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 2000)
    h, w = sides[hit].T
    # Sides are rounded to pixels: half a pixel each way.
    assert ((h + 0.5) * (w + 0.5) >= 0.02 * 576).all()
    assert ((h - 0.5) * (w - 0.5) <= 576 / 3).all()
    assert ((h + 0.5) / (w - 0.5) >= 0.3).all() and (h < 24).all()
    assert ((h - 0.5) / (w + 0.5) <= 1 / 0.3).all() and (w < 24).all()
    # Uniform over the bounds, but for the largest, which do not always fit.
    assert abs((h * w).mean() / 576 - (0.02 + 1 / 3) / 2) < 0.02
    assert abs(np.log(h / w).mean()) < 0.1
    # Every pixel may be hit, and what is put there is normal noise.
    assert (got != 50).any(0).all()
    noise = got[got != 50]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02


def test_channels_and_pixels_have_noise_of_their_own_and_the_rest_stays(images):
    got = np.asarray(mixing.random_erasing(jax.random.key(1), images, probability=1.0))
    changed = got != np.asarray(images)
    assert (changed == changed[..., :1]).all() and changed.any((1, 2, 3)).all()
    noise = got[changed]
    assert len(np.unique(noise)) == noise.size


def test_no_chance_to_erase_erases_nothing(images):
    got = mixing.random_erasing(jax.random.key(1), images, probability=0.0)
    np.testing.assert_array_equal(got, images)


# The whole batch.


@pytest.mark.parametrize(
    "options", [mixing.Mixing(), mixing.Mixing(2.0, 0.3, switch=0.1, erase=0.7)]
)
def test_a_mixed_batch_is_normalised_erased_mixed_and_keeps_the_rest(
    spec, batch, options
):
    pixels = jax.tree.map(jnp.asarray, batch)
    for key in keys(6):
        got = mixing.mixed_batch(key, pixels, spec, options)
        erase_key, mix_key = jax.random.split(key)
        images = vit.normalise(pixels["image"], spec)
        images = mixing.random_erasing(erase_key, images, probability=options.erase)
        targets = 0.9 * jnp.eye(5)[batch["label"]] + 0.02
        images, targets = mixing.mix(mix_key, images, targets, options)
        assert got["image"].dtype == got["label"].dtype == jnp.float32
        np.testing.assert_allclose(got["image"], images, atol=1e-6)
        np.testing.assert_allclose(got["label"], targets, atol=1e-6)
        np.testing.assert_array_equal(got["weight"], batch["weight"])


@pytest.mark.parametrize("seed", range(4))
def test_targets_sum_to_one(spec, batch, seed):
    pixels = jax.tree.map(jnp.asarray, batch)
    got = mixing.mixed_batch(jax.random.key(seed), pixels, spec, mixing.Mixing())
    np.testing.assert_allclose(got["label"].sum(-1), 1, rtol=1e-6)
    assert (got["label"] >= 0.1 / 5 - 1e-6).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16])
def test_labels_of_few_bits_are_the_classes_they_name(dtype):
    logits = jax.random.normal(jax.random.key(0), (2, 300))
    few, labels = jnp.array([1, 60], dtype), jnp.array([1, 60], jnp.int32)
    for cost in (losses.cross_entropies, costs.correct_logit, costs.cross_entropy):
        np.testing.assert_array_equal(cost(logits, few), cost(logits, labels))


def test_with_everything_off_labels_become_one_hot_and_nothing_else_happens(
    spec, batch
):
    pixels = jax.tree.map(jnp.asarray, batch)
    for smoothing in (0.0, 0.1):
        options = dataclasses.replace(OFF, smoothing=smoothing)
        got = mixing.mixed_batch(jax.random.key(0), pixels, spec, options)
        want = (1 - smoothing) * np.eye(5)[batch["label"]] + smoothing / 5
        np.testing.assert_allclose(got["label"], want, rtol=1e-6)
        images = vit.normalise(pixels["image"], spec)
        np.testing.assert_array_equal(got["image"], images)


def test_one_program_serves_all_steps(spec, batch):
    traces = []

    @jax.jit
    def step(rng, batch):
        traces.append(1)
        return mixing.mixed_batch(rng, batch, spec, mixing.Mixing())

    first, *others = (np.asarray(step(key, batch)["image"]) for key in keys(4))
    assert len(traces) == 1
    assert all((other != first).any() for other in others)


def test_a_batch_over_eight_devices_is_mixed_as_on_one(spec):
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (16, 16, 16, 3)).astype(np.uint8),
        "label": rng.integers(0, 5, 16).astype(np.int32),
    }
    options = mixing.Mixing(erase=0.5)
    step = jax.jit(lambda rng, batch: mixing.mixed_batch(rng, batch, spec, options))
    spread = sharding.shard_batch(batch, sharding.mesh())
    assert len(spread["image"].sharding.device_set) == 8
    kinds = set()
    for key in keys(8)[4:7]:
        one, many = step(key, batch), step(key, spread)
        for name in batch:
            np.testing.assert_allclose(many[name], one[name], atol=1e-6, err_msg=name)
        switch_key = jax.random.split(jax.random.split(key)[1])[0]
        kinds.add(bool(jax.random.bernoulli(switch_key, 0.5)))
    assert kinds == {False, True}  # mixup and cutmix


# Errors.


@pytest.mark.parametrize(
    ("name", "value"),
    [("mixup", -1), ("cutmix", np.nan), ("switch", 2), ("smoothing", -1), ("erase", 2)],
)
def test_impossible_options_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        mixing.Mixing(**{name: value})


def test_targets_of_another_number_of_classes_are_refused(targets):
    with pytest.raises(ValueError, match=r"labels of shape \(6, 5\) for 4 classes"):
        mixing.smoothed_targets(targets, num_classes=4, smoothing=0.0)
