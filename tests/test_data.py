"""Batches hold each image as preprocessed, in the promised order, and resume."""

import functools
import io
import itertools
import logging
import math

import numpy as np
import pytest

from flax_skd.io import augment, data
from flax_skd.io.examples import BadImageError, EncodedSource
from flax_skd.io.sources import ArraySource, open_source
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


def numbered(n=10):
    """Image i holds i everywhere, so that a batch tells which images it is made of."""
    images = np.arange(n, dtype=np.uint8)[:, None, None, None]
    return ArraySource(np.tile(images, (1, 8, 8, 3)), np.arange(n) % 3, num_classes=3)


def with_bad_files(n=6, bad=(2, 3)):
    files = []
    for i in range(n):
        file = io.BytesIO()
        pil.new("RGB", (8, 8), (i, i, i)).save(file, "PNG")
        files.append(b"words" if i in bad else file.getvalue())
    names = [f"{i}.png" for i in range(n)]
    return EncodedSource(files.__getitem__, names, labels=[0] * n, name="files")


# Batches for evaluation.


def test_evaluation_sees_every_image_once_in_order_and_fills_the_last_batch():
    batches = data.eval_batches(numbered(10), SPEC, batch_size=4)
    got = list(batches)
    assert len(batches) == len(got) == math.ceil(10 / 4)
    assert batches.num_examples == 10
    for batch in got:
        assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
            "image": ((4, 8, 8, 3), np.uint8),
            "label": ((4,), np.int32),
            "weight": ((4,), np.float32),
        }
    images = np.concatenate([b["image"][:, 0, 0, 0] for b in got])
    assert images.tolist() == [*range(10), 0, 0]
    assert np.concatenate([b["weight"] for b in got]).tolist() == [1] * 10 + [0, 0]
    labels = np.concatenate([b["label"] for b in got])
    assert labels.tolist() == [i % 3 for i in range(10)] + [0, 0]


def test_batches_for_evaluation_may_be_read_twice_and_left_early():
    batches = data.eval_batches(numbered(10), SPEC, batch_size=2)
    first = next(iter(batches))
    for _ in range(2):
        again = list(batches)
        assert len(again) == 5
        np.testing.assert_array_equal(again[0]["image"], first["image"])


def test_indices_choose_and_order_the_images():
    batches = data.eval_batches(numbered(), SPEC, batch_size=2, indices=[7, 1, 3])
    got = [b["image"][:, 0, 0, 0].tolist() for b in batches]
    assert got == [[7, 1], [3, 0]]


@pytest.mark.parametrize("indices", [[], [10], [-1]])
def test_indices_that_are_no_positions_are_refused(indices):
    with pytest.raises(ValueError, match="indices must be positions in arrays"):
        data.eval_batches(numbered(10), SPEC, batch_size=2, indices=indices)


@pytest.mark.parametrize(
    ("indices", "found"),
    [
        (np.arange(10) > 6, r"bool \[10\]"),
        ([True, False], r"bool \[2\]"),
        ([1.7], r"float64 \[1\]"),
        (["1"], r"<U1 \[1\]"),
        ([[1, 2]], r"int64 \[1, 2\]"),
        (3, r"int64 \[\]"),
    ],
)
def test_a_mask_or_a_fraction_is_no_position(indices, found):
    with pytest.raises(ValueError, match=f"{found}, not integers.*np.flatnonzero"):
        data.eval_batches(numbered(10), SPEC, batch_size=2, indices=indices)


def test_a_bad_image_stops_evaluation_unless_skipped_by_weight(caplog):
    with pytest.raises(BadImageError, match=r"files: 2.png does not decode"):
        list(data.eval_batches(with_bad_files(), SPEC, batch_size=4))
    batches = data.eval_batches(
        with_bad_files(), SPEC, batch_size=4, on_bad_image="skip"
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            weights = np.concatenate([b["weight"] for b in batches])
            assert weights.tolist() == [1, 1, 0, 0, 1, 1, 0, 0]
    assert batches.num_skipped == 2
    assert sum("2.png" in r.message for r in caplog.records) == 1


@pytest.fixture
def with_deep_file(tmp_path):
    """Four images, of which one has 16 bits a channel."""
    (tmp_path / "a").mkdir()
    for i in range(4):
        kind = ("L", "I;16")[i == 2]
        pil.new(kind, (8, 8), i).save(tmp_path / "a" / f"{i}.png")
    return open_source(f"folder:{tmp_path}")


def test_an_image_that_does_not_serve_is_named_or_skipped(with_deep_file, training):
    words = r"folder:.*: a/2.png does not serve \(.*I;16.*on_bad_image=skip"
    evaluation = functools.partial(data.eval_batches, with_deep_file, SPEC)
    for batches in (evaluation(batch_size=4), training(with_deep_file)):
        with pytest.raises(BadImageError, match=words):
            list(itertools.islice(batches, 2))
    (batch,) = evaluation(batch_size=4, on_bad_image="skip")
    assert batch["weight"].tolist() == [1, 1, 0, 1]
    batch = next(training(with_deep_file, on_bad_image="skip"))
    assert sorted(batch["index"].tolist()) == [0, 1, 3, 3]


def test_other_words_for_bad_images_and_empty_batches_are_refused():
    with pytest.raises(ValueError, match="on_bad_image = 'ignore'"):
        data.eval_batches(numbered(), SPEC, batch_size=4, on_bad_image="ignore")
    with pytest.raises(ValueError, match="batch_size = 0"):
        data.eval_batches(numbered(), SPEC, batch_size=0)


# Batches for training.


@pytest.fixture
def training():
    pytest.importorskip("grain")
    return functools.partial(
        data.train_batches, spec=SPEC, batch_size=4, seed=0, augment=augment.none
    )


def test_training_sees_every_image_once_an_epoch_in_ever_new_orders(training):
    batches = training(numbered(12))
    epochs = [[next(batches)["index"].tolist() for _ in range(3)] for _ in range(3)]
    flat = [[i for batch in epoch for i in batch] for epoch in epochs]
    assert all(sorted(epoch) == list(range(12)) for epoch in flat)
    assert flat[0] != flat[1] != flat[2] != list(range(12))


def test_a_training_batch_holds_the_images_its_index_names(training):
    batch = next(training(numbered(12)))
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        "image": ((4, 8, 8, 3), np.uint8),
        "label": ((4,), np.int32),
        "index": ((4,), np.int32),
    }
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["label"], batch["index"] % 3)


def test_training_depends_on_the_seed_alone(training):
    shift = functools.partial(augment.shift_crop, pad=2)
    one, same, other = (
        next(training(numbered(12), augment=shift, seed=seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one["image"], same["image"])
    assert (one["image"] != other["image"]).any()


def test_augmentation_of_an_image_differs_between_epochs(training):
    source = ArraySource(np.arange(192, dtype=np.uint8).reshape(1, 8, 8, 3), [0])
    shift = functools.partial(augment.shift_crop, pad=4)
    batches = training(source, batch_size=1, augment=shift)
    assert len({next(batches)["image"].tobytes() for _ in range(10)}) > 3


def test_training_resumes_exactly(training):
    shift = functools.partial(augment.shift_crop, pad=2)
    batches, resumed = (training(numbered(10), augment=shift) for _ in range(2))
    for _ in range(4):  # the next batch crosses the end of an epoch
        next(batches)
    resumed.set_state(batches.get_state())
    for _ in range(6):
        expected, got = next(batches), next(resumed)
        for key in expected:
            np.testing.assert_array_equal(got[key], expected[key])


def test_processes_share_out_every_epoch(training):
    parts = [training(numbered(12), process_index=i, process_count=2) for i in range(2)]
    for _ in range(2):
        epoch = [next(p)["index"].tolist() for p in parts for _ in range(3)]
        assert all(len(b) == 2 for b in epoch)
        assert sorted(i for b in epoch for i in b) == list(range(12))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 11}, "batch_size = 11 but arrays has 10 images"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"process_count": 3}, "batch_size = 4 must be .* multiple of the 3"),
        ({"process_index": 1}, "process 1 of 1"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"on_bad_image": "ignore"}, "on_bad_image"),
    ],
)
def test_impossible_training_options_are_refused_at_once(training, options, words):
    with pytest.raises(ValueError, match=words):
        training(numbered(10), **options)


def test_a_bad_image_stops_training_with_its_name(training):
    batches = training(with_bad_files())
    with pytest.raises(BadImageError, match=r"files: [23].png does not decode"):
        list(itertools.islice(batches, 3))


def test_the_next_image_takes_the_place_of_a_bad_one(training, caplog):
    batches = training(with_bad_files(), batch_size=6, on_bad_image="skip")
    with caplog.at_level(logging.WARNING):
        for batch in itertools.islice(batches, 3):
            assert sorted(batch["index"].tolist()) == [0, 1, 4, 4, 4, 5]
    assert sum("3.png" in r.message for r in caplog.records) == 1


def test_training_on_bad_images_alone_ends_with_an_error(training):
    source = with_bad_files(4, bad=range(4))
    with pytest.raises(ValueError, match="no image of files decodes"):
        next(training(source, on_bad_image="skip"))
