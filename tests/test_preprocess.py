"""Images are preprocessed as published checkpoints expect, and augmented at random."""

import functools
import itertools

import numpy as np
import pytest

from flax_skd.io import augment, preprocess
from flax_skd.method.spec import ViTSpec

pil = pytest.importorskip("PIL.Image")

SPEC = ViTSpec(
    image_size=8,
    patch_size=4,
    width=8,
    depth=1,
    num_heads=1,
    mlp_dim=8,
    num_classes=3,
    crop_fraction=1.0,
)


def photograph(width, height, mode="RGB"):
    """A smooth image with texture, so that a wrong crop or filter shows."""
    y, x = np.mgrid[:height, :width]
    planes = [127 + 90 * np.sin(x / 5 + y / (7 + k)) + (x * y) % 17 for k in range(3)]
    return pil.fromarray(np.stack(planes, -1).astype(np.uint8)).convert(mode)


# Preprocessing of evaluation.


@pytest.mark.parametrize(
    ("size", "resized"),
    # floor(224 / 0.9) = 248; the long side is int(248 * long / short).
    [((500, 375), (330, 248)), ((375, 500), (248, 330)), ((227, 227), (248, 248))],
)
def test_evaluation_resizes_and_crops_as_torchvision_does(size, resized):
    spec = SPEC.replace(image_size=224, crop_fraction=0.9)
    image = photograph(*size)
    large = np.asarray(image.resize(resized, pil.Resampling.BICUBIC))
    top, left = (int(round((side - 224) / 2.0)) for side in large.shape[:2])  # noqa: RUF046
    expected = large[top : top + 224, left : left + 224]
    np.testing.assert_array_equal(preprocess.evaluation(image, spec), expected)


def test_a_squashed_image_is_whole_whatever_the_ratio_of_its_sides():
    spec = SPEC.replace(image_size=224, crop_fraction=0.875, crop_mode="squash")
    image = photograph(500, 375)
    square = np.asarray(image.resize((256, 256), pil.Resampling.BICUBIC))
    expected = square[16:240, 16:240]
    np.testing.assert_array_equal(preprocess.evaluation(image, spec), expected)


@pytest.mark.parametrize("size", [(1, 65_000), (65_000, 1)])
def test_a_strip_that_would_grow_to_gigabytes_is_refused(size):
    spec = SPEC.replace(image_size=224)
    with pytest.raises(preprocess.UnfitImageError, match="14560000 .*MAX_IMAGE_PIX"):
        preprocess.evaluation(pil.new("L", size), spec)


def test_an_image_of_the_resized_size_is_cropped_only():
    spec = SPEC.replace(image_size=224, crop_fraction=0.9)
    image = photograph(248, 248)
    expected = np.asarray(image)[12:236, 12:236]
    np.testing.assert_array_equal(preprocess.evaluation(image, spec), expected)


def test_an_image_of_the_right_size_is_untouched_without_a_crop():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    np.testing.assert_array_equal(preprocess.evaluation(image, SPEC), image)


def test_interpolation_is_the_one_of_the_spec():
    image = photograph(20, 20)
    spec = SPEC.replace(interpolation="bilinear")
    expected = np.asarray(image.resize((8, 8), pil.Resampling.BILINEAR))
    np.testing.assert_array_equal(preprocess.evaluation(image, spec), expected)
    assert (preprocess.evaluation(image, SPEC) != expected).any()


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "P", "1", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_8_bit_mode_comes_out_in_the_channels_of_the_spec(mode, channels):
    spec = SPEC.replace(in_channels=channels, mean=(0,) * channels, std=(1,) * channels)
    got = preprocess.evaluation(photograph(8, 8, mode="L").convert(mode), spec)
    assert got.shape == (8, 8, channels)
    assert got.dtype == np.uint8
    assert got.std() > 0


def test_a_palette_with_transparency_keeps_its_colours():
    image = photograph(8, 8).quantize(16)
    plain = preprocess.evaluation(image, SPEC)
    image.info["transparency"] = bytes(16)
    np.testing.assert_array_equal(preprocess.evaluation(image, SPEC), plain)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_an_image_of_more_than_8_bits_is_refused_not_clipped(kind):
    image = pil.fromarray(np.full((8, 8), 300, kind))
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        preprocess.evaluation(image, SPEC)
    with pytest.raises(ValueError, match="must be uint8"):
        preprocess.evaluation(np.full((8, 8, 3), 300, kind), SPEC)


def test_channels_other_than_1_and_3_are_refused():
    spec = SPEC.replace(in_channels=4, mean=(0,) * 4, std=(1,) * 4)
    with pytest.raises(ValueError, match="in_channels = 4"):
        preprocess.evaluation(photograph(8, 8), spec)


# Augmentation.


def test_no_augmentation_is_the_preprocessing_of_evaluation():
    image = photograph(20, 30)
    got = augment.none(image, np.random.default_rng(0), SPEC)
    np.testing.assert_array_equal(got, preprocess.evaluation(image, SPEC))


@pytest.mark.parametrize("name", ["flip_crop", "shift_crop"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_augmentation_is_a_function_of_image_and_rng(name, channels):
    spec = SPEC.replace(in_channels=channels, mean=(0,) * channels, std=(1,) * channels)
    image, function = photograph(40, 30), getattr(augment, name)
    first, again, other = (
        function(image, np.random.default_rng(seed), spec) for seed in (1, 1, 2)
    )
    assert first.shape == (8, 8, channels)
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_boxes_are_inside_the_image_and_keep_to_area_and_shape():
    rng, areas = np.random.default_rng(0), []
    for _ in range(500):
        left, top, right, bottom = augment.crop_box(
            (640, 480), rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)
        )
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 480
        assert 0.74 < (right - left) / (bottom - top) < 1.35
        areas.append((right - left) * (bottom - top) / (640 * 480))
    assert 0.079 < min(areas) < 0.12
    assert 0.9 < max(areas) <= 1


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 10), (493, 0, 506, 10)), ((10, 1000), (0, 493, 10, 506))]
)
def test_where_no_box_fits_it_is_the_largest_in_the_centre(size, box):
    got = augment.crop_box(
        size, np.random.default_rng(0), scale=(1, 1), ratio=(3 / 4, 4 / 3)
    )
    assert got == box


def test_crops_are_uniform_in_area_and_log_uniform_in_shape():
    rng = np.random.default_rng(0)
    count, side = 4000, 10_000  # large: no draw is refused, and no side is rounded
    scale, ratio = (0.05, 0.2), (1 / 4, 4)
    boxes = np.array(
        [
            augment.crop_box((side, side), rng, scale=scale, ratio=ratio)
            for _ in range(count)
        ]
    )
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    areas = (width * height / side**2 - scale[0]) / (scale[1] - scale[0])
    shapes = np.log(width / height) / np.log(16) + 1 / 2
    corners = boxes[:, 0] / (side - width), boxes[:, 1] / (side - height)
    for found in (areas, shapes, *corners):  # all uniform from 0 to 1
        # The largest distance from a uniform law: one draw in 10,000 is further.
        steps = np.arange(1, count + 1) / count
        assert np.abs(np.sort(found) - steps).max() < 2.23 / count**0.5


def test_flip_crop_of_the_whole_image_flips_about_half_of_the_time():
    image = photograph(8, 8)
    whole = functools.partial(augment.flip_crop, scale=(1, 1), ratio=(1, 1))
    rng, plain = np.random.default_rng(0), np.asarray(image)
    flipped = 0
    for _ in range(200):
        got = whole(image, rng, SPEC)
        is_flipped = bool((got == plain[:, ::-1]).all())
        assert is_flipped or (got == plain).all()
        flipped += is_flipped
    assert 70 < flipped < 130


@pytest.mark.parametrize("name", ["flip_crop", "shift_crop"])
def test_flips_can_be_turned_off_for_digits(name):
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, :2] = 255  # the left edge is bright
    options = {
        "flip_crop": {"scale": (1, 1), "ratio": (1, 1)},
        "shift_crop": {"pad": 1},
    }
    function = functools.partial(getattr(augment, name), flip=0.0, **options[name])
    for seed in range(20):
        got = function(image, np.random.default_rng(seed), SPEC)
        assert got[4, :4].mean() > got[4, 4:].mean()


def test_shift_crop_cuts_every_place_of_the_padded_image():
    image = np.random.default_rng(0).integers(1, 256, (8, 8, 3), np.uint8)
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    places = {
        padded[i : i + 8, j : j + 8].tobytes(): (i, j)
        for i, j in itertools.product(range(3), repeat=2)
    }
    rng = np.random.default_rng(0)
    seen = {
        places[augment.shift_crop(image, rng, SPEC, pad=1, flip=0.0).tobytes()]
        for _ in range(200)
    }
    assert len(seen) == 9


def test_a_negative_pad_is_refused():
    image, rng = np.zeros((8, 8, 3), np.uint8), np.random.default_rng(0)
    with pytest.raises(ValueError, match="pad = -1 must be at least 0"):
        augment.shift_crop(image, rng, SPEC, pad=-1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flip": 2.0}, "flip = 2.0 must be 0 to 1"),
        ({"scale": (-1.0, 1.0)}, "the least share of the area"),
        ({"scale": (1.5, 1.0)}, "the least share of the area"),
    ],
)
def test_shares_that_cannot_be_are_refused(options, words):
    image, rng = np.zeros((8, 8, 3), np.uint8), np.random.default_rng(0)
    with pytest.raises(ValueError, match=words):
        augment.flip_crop(image, rng, SPEC, **options)
