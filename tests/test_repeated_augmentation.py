"""Repeated augmentation: the order of the draws, their share-out, and resuming."""

import functools

import numpy as np
import pytest

from flax_skd.io import augment, data
from flax_skd.io.sources import ArraySource
from flax_skd.method.spec import ViTSpec

pytest.importorskip("grain")
pytest.importorskip("PIL")

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


def batches(n=12, **options):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 8, 8, 3)).astype(np.uint8)
    usual = {"batch_size": 4, "seed": 0, "augment": augment.none}
    source = ArraySource(images, np.arange(n) % 3, num_classes=3)
    return data.train_batches(source, SPEC, **(usual | options))


def noise(image, rng, spec):
    """Shows the draws themselves: no two are the same by chance."""
    return rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)


def drawn(iterator, count):
    return np.concatenate([next(iterator)["index"] for _ in range(count)])


def test_an_epoch_has_its_length_and_each_image_of_it_in_a_row():
    order = drawn(batches(repeats=3), 9).reshape(3, 4, 3)  # epoch, image, repeat
    assert (order == order[..., :1]).all()
    assert all(len(set(epoch)) == 4 for epoch in order[..., 0].tolist())
    assert order[0].tolist() != order[1].tolist() != order[2].tolist()


def test_the_images_are_the_first_of_the_order_without_repeats():
    once = drawn(batches(), 6).reshape(2, 12)
    thrice = drawn(batches(repeats=3), 6).reshape(2, 12)
    np.testing.assert_array_equal(thrice, np.repeat(once[:, :4], 3, axis=1))


def test_an_epoch_that_the_repeats_do_not_divide_ends_in_time():
    once = drawn(batches(10, batch_size=2), 10).reshape(2, 10)
    got = drawn(batches(10, batch_size=2, repeats=4), 10).reshape(2, 10)
    np.testing.assert_array_equal(got, np.repeat(once, 4, axis=1)[:, :10])


def test_one_repeat_is_the_usual_order_and_augmentation():
    shift = functools.partial(augment.shift_crop, pad=2)
    one, usual = batches(augment=shift, repeats=1), batches(augment=shift)
    for _ in range(5):
        a, b = next(one), next(usual)
        assert all((a[key] == b[key]).all() for key in b)


def test_the_draws_of_an_image_differ():
    got = next(batches(augment=noise, repeats=4))
    assert len(set(got["index"])) == 1
    assert len({image.tobytes() for image in got["image"]}) == 4


def test_processes_share_out_the_draws_of_one_process():
    options = {"augment": noise, "repeats": 2}
    whole = batches(10, **options)
    parts = [batches(10, process_index=i, process_count=2, **options) for i in (0, 1)]
    for _ in range(6):  # over the ends of two epochs
        want, got = next(whole), [next(part) for part in parts]
        assert (got[0]["index"] == got[1]["index"]).all()
        assert (got[0]["image"] != got[1]["image"]).any((1, 2, 3)).all()
        for i, part in enumerate(got):
            assert all((part[key] == want[key][i::2]).all() for key in want)


def test_repeated_augmentation_resumes_exactly():
    options = {"augment": augment.flip_crop, "repeats": 3}
    whole, resumed = batches(10, **options), batches(10, **options)
    for _ in range(4):
        next(whole)
    resumed.set_state(whole.get_state())
    for _ in range(5):
        want, got = next(whole), next(resumed)
        assert all((got[key] == want[key]).all() for key in want)


def test_less_than_one_repeat_is_refused():
    with pytest.raises(ValueError, match="repeats = 0"):
        batches(repeats=0)
