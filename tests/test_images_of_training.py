"""Which images a training config trains on, measures on and is evaluated on."""

import numpy as np
import pytest

from flax_skd.io import sources
from flax_skd.method.spec import ViTSpec
from flax_skd.run import config_files, feed, main, training


@pytest.mark.parametrize(
    ("source", "asked", "found"),
    [
        ("digits:train", "auto", "digits:test"),
        ("npz:own.npz", "auto", ""),
        ("npz:own.npz", "digits:test", "digits:test"),
        ("digits:train", "", ""),
    ],
)
def test_the_digits_evaluate_nothing_but_the_digits(source, asked, found):
    data = config_files.load("configs/piad.py").data
    data.source, data.eval_source = source, asked
    assert feed.eval_source_of(data) == found


def own_images(path, count=64):
    rng = np.random.default_rng(count)
    images = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
    np.savez(path, images=images, labels=np.arange(count) % 12)
    return f"npz:{path}"


def test_importance_is_measured_on_images_of_training_unless_others_are_named(
    tmp_path,
):
    spec = ViTSpec.named("Ti/16", image_size=16, num_classes=12)
    config = config_files.load("configs/piad.py")
    config.seed = 5
    config.data.source, config.data.images = own_images(tmp_path / "own.npz"), 24
    config.piad.calibration.images = 16
    trained = feed.open_images(config.data, spec)
    known = {np.asarray(trained[i][0]).tobytes() for i in range(24)}
    source = feed.calibration_of(config, spec).source
    found = {np.asarray(source[i][0]).tobytes() for i in range(len(source))}
    assert len(found) == 16 and found < known
    config.piad.calibration.images = 32
    assert feed.calibration_of(config, spec).num_examples == 24
    config.piad.calibration.source = own_images(tmp_path / "other.npz", 40)
    others = feed.calibration_of(config, spec)
    assert (others.num_examples, others.batch_size) == (32, 64)
    assert np.asarray(others.source[0][0]).tobytes() not in known


def test_a_run_on_own_images_opens_no_others(tmp_path, monkeypatch):
    own = own_images(tmp_path / "own.npz")
    opened, original = [], sources.open_source

    def watched(description, **options):
        opened.append(description)
        return original(description, **options)

    monkeypatch.setattr(sources, "open_source", watched)
    scratch = config_files.load("configs/scratch.py")
    scratch.model.update(num_classes=12, in_channels=3, depth=1)
    piad = config_files.load("configs/piad.py")
    for config in (scratch, piad):
        config.data.source, config.data.batch_size = own, 16
        config.epochs, config.warmup_epochs = 3.0, 0.0
    piad.model.path = f"{tmp_path}/start/network"
    piad.piad.calibration.images = 32
    for config, name in ((scratch, "start"), (piad, "piad")):
        done = training.train(
            config, workdir=f"{tmp_path}/{name}", overwrite=False, resume=False
        )
        assert "not evaluated" in done
    assert set(opened) == {own}


def test_a_missing_source_is_asked_for_by_the_flag_that_mends_it(tmp_path, capsys):
    args = ["train", "--config=configs/scratch.py:Ti/16", f"--workdir={tmp_path}/run"]
    assert main.main(args) == 1
    assert "--config.data.source" in capsys.readouterr().err
