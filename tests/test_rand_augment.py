"""RandAugment keeps size and mode, and does more the greater its magnitude."""

import dataclasses

import numpy as np
import pytest

from flax_skd.io import augment, rand_augment
from flax_skd.method.spec import ViTSpec

pil = pytest.importorskip("PIL.Image")

FILL = {"RGB": (124, 116, 104), "L": (90,)}
NO_MAGNITUDE = {"AutoContrast", "Equalize", "Invert"}
SPEC = ViTSpec(
    image_size=16,
    patch_size=4,
    width=8,
    depth=1,
    num_heads=1,
    mlp_dim=8,
    num_classes=3,
)


def gradient(mode="RGB", size=(40, 32)):
    """Brighter to the right, greener downwards, with a grain that can be sharpened."""
    x, y = np.meshgrid(np.linspace(30, 200, size[0]), np.linspace(20, 180, size[1]))
    grain = 20 * (np.indices(x.shape).sum(0) % 2)
    image = pil.fromarray(np.stack([x + grain, y, (x + y) / 2], -1).astype(np.uint8))
    return image.convert(mode)


def applied(image, name, magnitude, direction=1, resample="bicubic"):
    done = rand_augment.apply(
        image,
        name,
        magnitude=magnitude,
        direction=direction,
        fill=FILL[image.mode],
        resample=resample,
    )
    assert (done.size, done.mode) == (image.size, image.mode)
    return np.asarray(done)


def distance(one, other):
    return np.abs(np.asarray(one, float) - np.asarray(other, float)).mean()


def test_there_are_the_fifteen_operations():
    assert len(rand_augment.OPERATIONS) == len(set(rand_augment.OPERATIONS)) == 15


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", rand_augment.OPERATIONS)
def test_each_operation_changes_a_gradient_and_keeps_its_size_and_mode(
    name, mode, direction
):
    image = gradient(mode)
    moved = distance(applied(image, name, 9.0, direction), image)
    # Grey has no saturation to change.
    assert (moved == 0) if (name, mode) == ("Color", "L") else (moved > 0.5)


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize(
    "name", [n for n in rand_augment.OPERATIONS if n not in NO_MAGNITUDE]
)
def test_severity_increases_with_magnitude(name, direction):
    image = gradient()
    moved = [distance(applied(image, name, m, direction), image) for m in (1, 4, 7, 10)]
    if name == "Solarize":  # how many pixels turn, for each turns by more or less
        turned = [applied(image, name, m) != np.asarray(image) for m in (1, 4, 7, 10)]
        moved = [t.mean() for t in turned]
    assert moved == sorted(moved) and moved[-1] > moved[0]


@pytest.mark.parametrize("name", sorted(NO_MAGNITUDE))
def test_three_operations_have_no_magnitude(name):
    image = gradient()
    np.testing.assert_array_equal(applied(image, name, 0), applied(image, name, 10))


def test_pixel_operations_are_what_numpy_says():
    image = gradient()
    x = np.asarray(image).astype(int)
    expected = {
        "Invert": 255 - x,
        "Posterize": x // 128 * 128,  # one bit is left
        "Solarize": np.where(x < 26, x, 255 - x),
        "SolarizeAdd": np.where(x < 128, np.minimum(x + 99, 255), x),
    }
    for name, want in expected.items():
        np.testing.assert_array_equal(applied(image, name, 9.0), want, err_msg=name)
    for direction, factor in ((1, 1.81), (-1, 0.19)):
        got = applied(image, "Brightness", 9.0, direction).astype(float)
        assert np.abs(got - np.clip(factor * x, 0, 255)).max() <= 1
        grey = round(np.asarray(image.convert("L")).mean())
        got = applied(image, "Contrast", 9.0, direction).astype(float)
        assert np.abs(got - np.clip(grey + factor * (x - grey), 0, 255)).max() <= 1.5


def test_a_translation_moves_by_its_share_of_the_side_and_fills_with_the_mean():
    image = gradient(size=(40, 40))
    x = np.asarray(image)
    # 0.45 * 40 * 10 / 10 = 18 pixels
    got = applied(image, "TranslateXRel", 10, resample="bilinear")
    np.testing.assert_array_equal(got[:, :22], x[:, 18:])
    assert (got[:, 22:] == FILL["RGB"]).all()
    got = applied(image, "TranslateYRel", 10, -1, resample="bilinear")
    np.testing.assert_array_equal(got[18:], x[:22])
    assert (got[:18] == FILL["RGB"]).all()


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", ["Rotate", "ShearX", "ShearY"])
def test_the_two_directions_mirror_each_other(name, mode):
    if name == "Rotate":
        mirror = pil.Transpose.FLIP_LEFT_RIGHT
    else:  # a shear starts at the corner: turned over, it moves the other half
        mirror = pil.Transpose.TRANSPOSE
    image = gradient(mode)
    other = {"ShearX": "ShearY", "ShearY": "ShearX"}.get(name, name)
    direction = -1 if name == "Rotate" else 1
    one = applied(image.transpose(mirror), name, 9.0)
    two = applied(image, other, 9.0, direction)
    two = np.asarray(pil.fromarray(two).transpose(mirror))
    assert distance(one, two) < 2


def test_the_draws_fix_the_image_and_other_draws_give_others():
    image = gradient()

    def drawn(seed):
        rng = np.random.default_rng(seed)
        return rand_augment.rand_augment(image, rng, fill=FILL["RGB"]).tobytes()

    assert [drawn(s) for s in range(20)] == [drawn(s) for s in range(20)]
    assert len({drawn(s) for s in range(20)}) > 10


def test_operations_are_drawn_alike_and_applied_half_of_the_time(monkeypatch):
    calls = []

    def noted(image, name, *, magnitude, direction, fill, resample):
        calls.append((name, magnitude, direction))
        return image

    monkeypatch.setattr(rand_augment, "apply", noted)
    rng, image = np.random.default_rng(0), gradient()
    for _ in range(3000):
        rand_augment.rand_augment(image, rng, fill=FILL["RGB"])
    names, magnitudes, directions = zip(*calls)
    assert abs(len(calls) - 3000) < 4 * np.sqrt(6000 / 4)
    counts = np.array([names.count(n) for n in rand_augment.OPERATIONS])
    assert np.abs(counts - 200).max() < 60
    # N(9, 0.5), of which what lies above 10 is cut to 10.
    assert abs(np.mean(magnitudes) - 9) < 0.03 and max(magnitudes) == 10
    assert abs(np.std(magnitudes) - 0.49) < 0.03
    assert abs(np.mean(directions)) < 0.08


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "Blur"}, "operation 'Blur'"),
        ({"resample": "nearest"}, "resample = 'nearest'"),
        ({"magnitude": 11}, "magnitude = 11"),
        ({"direction": 0}, "direction = 0"),
        ({"fill": (1,)}, "fill = "),
        ({"image": pil.new("CMYK", (4, 4))}, "mode CMYK"),
    ],
)
def test_impossible_operations_are_refused(options, words):
    usual = {"image": gradient(), "name": "Rotate", "magnitude": 9.0}
    usual["fill"] = FILL["RGB"]
    with pytest.raises(ValueError, match=words):
        rand_augment.apply(**(usual | options))


# As the augmentation of a data set.


@pytest.mark.parametrize("channels", [3, 1])
def test_the_recipe_gives_squares_of_bytes_that_the_draws_fix(channels):
    half = (0.5,) * channels
    spec = dataclasses.replace(SPEC, in_channels=channels, mean=half, std=half)

    def drawn(seed):
        return augment.deit(gradient(), np.random.default_rng(seed), spec)

    assert drawn(0).shape == (16, 16, channels) and drawn(0).dtype == np.uint8
    for seed in range(5):
        np.testing.assert_array_equal(drawn(seed), drawn(seed))
    assert len({drawn(seed).tobytes() for seed in range(10)}) == 10


def test_the_recipe_without_operations_is_crop_and_flip(monkeypatch):
    monkeypatch.setattr(rand_augment, "rand_augment", lambda image, rng, **_: image)
    for seed in range(5):
        one, other = np.random.default_rng(seed), np.random.default_rng(seed)
        np.testing.assert_array_equal(
            augment.deit(gradient(), one, SPEC, scale=(0.3, 1.0), flip=0.2),
            augment.flip_crop(gradient(), other, SPEC, scale=(0.3, 1.0), flip=0.2),
        )


def test_the_recipe_refuses_magnitudes_off_the_scale():
    with pytest.raises(ValueError, match="magnitude = 90"):
        augment.deit(gradient(), np.random.default_rng(0), SPEC, magnitude=90)
