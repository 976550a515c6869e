"""Every source hands out the right image with the right label, or says why not."""

import os
import pickle

import numpy as np
import pytest
from pictures import contents, encoded, numbered_arrays, write_tar

from flax_skd.io.sources import (
    ArraySource,
    BadImageError,
    fingerprint,
    open_source,
    open_unlabelled,
    take,
)

pil = pytest.importorskip("PIL.Image")


@pytest.fixture
def arrays():
    return numbered_arrays()


# Descriptions.


@pytest.mark.parametrize("text", ["coco:here", "digits:valid", "folder:", "tfds:x", ""])
def test_an_unknown_description_lists_the_forms(text):
    with pytest.raises(ValueError, match="(?s)no source.*digits.*folder:.*tar:.*tfds:"):
        open_source(text)


@pytest.mark.parametrize("kind", ["folder", "tar", "npz"])
def test_a_path_that_is_missing_is_named(kind, tmp_path):
    with pytest.raises(ValueError, match=f"{kind}:.*there is no .*nowhere"):
        open_source(f"{kind}:{tmp_path}/nowhere")


def test_labels_belong_to_tars_only():
    with pytest.raises(ValueError, match=r"'sorted' goes with tar:PATH"):
        open_source("digits", labels="sorted")


def test_a_forgotten_prefix_is_told_before_labels_are(tmp_path):
    for text in ("images.tar", str(tmp_path / "images.tar"), tmp_path / "images.tar"):
        with pytest.raises(ValueError, match="(?s)no source .*images.tar'.* tar:PATH"):
            open_source(text, labels="sorted")


# Digits.


def test_digits_are_split_once_and_evenly_over_the_classes():
    pytest.importorskip("sklearn")
    train, test, both = (open_source(f"digits{s}") for s in (":train", ":test", ""))
    assert len(train) + len(test) == len(both) == 1797
    assert abs(len(test) - 450) <= 5
    counts = np.bincount([test[i].label for i in range(len(test))], minlength=10)
    whole = np.bincount([both[i].label for i in range(len(both))], minlength=10)
    assert np.abs(counts - whole / 4).max() <= 0.5
    assert both.num_classes == 10
    assert both[0].image.shape == (8, 8, 1)
    assert both[0].image.dtype == np.uint8
    assert max(both[i].image.max() for i in range(50)) == 255
    again = open_source("digits:test")
    assert all((again[i].image == test[i].image).all() for i in range(len(test)))


# Arrays.


def test_arrays_come_back_as_they_are(arrays):
    source = ArraySource(*arrays, num_classes=3, name="mine")
    assert (len(source), source.num_classes, source.name) == (7, 3, "mine")
    assert contents(source) == [(i, i % 3, f"image {i}") for i in range(7)]


def test_arrays_that_are_not_uint8_images_are_refused(arrays):
    images, labels = arrays
    for wrong in (images / 255, images[0], images[:0]):
        with pytest.raises(ValueError, match="give at least one, as uint8"):
            ArraySource(wrong, labels)
    with pytest.raises(ValueError, match="7 images but 6 labels"):
        ArraySource(images, labels[:6])


@pytest.mark.parametrize("wrong", [2.0, "2", True, None])
def test_a_label_that_is_not_an_int_is_shown(arrays, wrong):
    labels = [0, 1, wrong, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=f"label of image 2 is {wrong!r}.*an int"):
        ArraySource(arrays[0], labels)


@pytest.mark.parametrize("wrong", [3, -1, 10**30])
def test_a_label_out_of_range_is_shown_with_what_is_allowed(arrays, wrong):
    labels = [0, 1, wrong, 0, 0, 0, 0]
    with pytest.raises(ValueError, match=f"image 2 is {wrong}; allowed are 0 to 2"):
        ArraySource(arrays[0], labels, num_classes=3)


# Without labels.


def test_an_unlabelled_source_has_the_images_of_the_other_and_no_classes(tmp_path):
    members = {f"{'abc'[i % 3]}/{i:04d}.png": encoded(20 * i) for i in range(8)}
    tar = write_tar(tmp_path / "images.tar", members)
    free = open_unlabelled(tar)
    assert free.name == tar and free.num_classes is None
    images = sorted((i, name) for i, _, name in contents(open_source(tar)))
    assert contents(free) == [(i, 0, name) for i, name in images]
    bare = write_tar(tmp_path / "bare.tar", {"1.png": encoded(1), "2.png": encoded(2)})
    assert contents(open_unlabelled(bare)) == [(1, 0, "1.png"), (2, 0, "2.png")]
    with pytest.raises(ValueError, match="there is no .*nowhere"):
        open_unlabelled("tar:nowhere.tar")


# A choice of images.


def test_take_chooses_distinct_images_and_repeats_itself(arrays):
    source = ArraySource(*arrays)
    names = [name for *_, name in contents(take(source, 5, seed=1))]
    assert len(set(names)) == 5
    assert names == [name for *_, name in contents(take(source, 5, seed=1))]
    assert names[:3] == [name for *_, name in contents(take(source, 3, seed=1))]
    assert names != [name for *_, name in contents(take(source, 5, seed=2))]


def test_take_of_all_takes_each_once(arrays):
    source = ArraySource(*arrays)
    assert sorted(contents(take(source, 7))) == sorted(contents(source))


@pytest.mark.parametrize("n", [0, -1, 8])
def test_take_of_more_than_there_are_says_how_many_there_are(arrays, n):
    with pytest.raises(ValueError, match=f"asked for {n} images of arrays, .* has 7"):
        take(ArraySource(*arrays), n)


def test_a_negative_seed_is_named(arrays):
    with pytest.raises(ValueError, match="seed = -1 must be at least 0"):
        take(ArraySource(*arrays), 2, seed=-1)


# Images that do not decode.


def bad_images():
    whole = encoded(3, form="JPEG", size=(64, 64))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    return {"cut": whole[: len(whole) // 2], "text": b"words", "empty": b"", "eps": eps}


@pytest.mark.parametrize("kind", bad_images())
def test_an_image_that_does_not_decode_is_named_with_its_source(tmp_path, kind):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(bad_images()[kind])
    source = open_source(f"folder:{tmp_path}")
    with pytest.raises(BadImageError, match="folder:.*a/x.jpg does not decode") as info:
        source[0]
    assert info.value.example == "a/x.jpg"
    assert str(pickle.loads(pickle.dumps(info.value))) == str(info.value)


@pytest.mark.parametrize("most", [10, 20])  # twice over is PIL's error, else a warning
def test_a_decompression_bomb_is_an_error(tmp_path, monkeypatch, most):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(encoded(1))
    monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", most)
    with pytest.raises(BadImageError, match=r"a/x.png does not decode"):
        open_source(f"folder:{tmp_path}")[0]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_of_which_pil_only_warns_is_an_error_too(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(encoded(1))
    monkeypatch.setattr(pil, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(BadImageError, match="6 x 5 pixels are more than the 20"):
        open_source(f"folder:{tmp_path}")[0]


# The measured data, where it is.


@pytest.mark.parametrize(
    ("text", "labels", "size"),
    [
        ("tar:{}/imagenet_val_650.tar", None, 650),
        ("tar:{}/imagenet_sample_1000.tar", "sorted", 1000),
        ("npz:{}/cifar10_jpeg.npz:test", None, 10_000),
    ],
)
def test_the_measured_data_opens(text, labels, size):
    if "FLAX_SKD_DATA" not in os.environ:
        pytest.skip("FLAX_SKD_DATA does not name the folder of measured data")
    text = text.format(os.environ["FLAX_SKD_DATA"])
    source = open_source(text, labels=labels, num_classes=1000)
    assert len(source) == size
    assert source[size - 1].image.mode == "RGB"


# Fingerprints.


def test_a_fingerprint_tells_data_apart_and_is_the_same_twice():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(40) % 3
    source = ArraySource(images, labels, num_classes=3)
    again = ArraySource(images.copy(), labels.copy(), num_classes=3)
    others = [
        ArraySource(images[:-1], labels[:-1], num_classes=3),
        ArraySource(images[::-1], labels[::-1], num_classes=3),
        ArraySource(images, (labels + 1) % 3, num_classes=3),
        take(source, 40, seed=1),
    ]
    assert fingerprint(source) == fingerprint(again)
    assert "40 images" in fingerprint(source)
    found = {fingerprint(other) for other in others}
    assert len(found) == 4 and fingerprint(source) not in found


def test_a_fingerprint_survives_an_image_that_does_not_decode():
    class Broken:
        name, num_classes = "broken", 2

        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise BadImageError("no image", f"image {index}")

    assert fingerprint(Broken()).startswith("3 images")
