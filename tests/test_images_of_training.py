"""Which images a training config trains on, measures on and is evaluated on."""

import numpy as np
import pytest

from flax_skd.io import sources
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


def test_importance_is_measured_on_images_of_training_unless_others_are_named():
    config = config_files.load("configs/piad.py")
    config.data.source, config.data.labels = "tar:own.tar", "sorted"
    found = feed.calibration_of(config)
    assert (found.source, found.labels) == ("tar:own.tar", "sorted")
    assert (found.images, found.batch_size) == (1024, 64)
    config.piad.calibration.source = "tar:other.tar"
    found = feed.calibration_of(config)
    assert (found.source, found.labels) == ("tar:other.tar", "")


def test_a_run_on_own_images_opens_no_others(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(64) % 12)
    opened, original = [], sources.open_source

    def watched(description, **options):
        opened.append(description)
        return original(description, **options)

    monkeypatch.setattr(sources, "open_source", watched)
    scratch = config_files.load("configs/scratch.py")
    scratch.model.update(num_classes=12, in_channels=3, depth=1)
    piad = config_files.load("configs/piad.py")
    for config in (scratch, piad):
        config.data.source, config.data.batch_size = f"npz:{tmp_path}/own.npz", 16
        config.epochs, config.warmup_epochs = 3.0, 0.0
    piad.model.path = f"{tmp_path}/start/network"
    piad.piad.calibration.images = 32
    for config, name in ((scratch, "start"), (piad, "piad")):
        done = training.train(
            config, workdir=f"{tmp_path}/{name}", overwrite=False, resume=False
        )
        assert "not evaluated" in done
    assert set(opened) == {f"npz:{tmp_path}/own.npz"}


def test_a_missing_source_is_asked_for_by_the_flag_that_mends_it(tmp_path, capsys):
    args = ["train", "--config=configs/scratch.py:Ti/16", f"--workdir={tmp_path}/run"]
    assert main.main(args) == 1
    assert "--config.data.source" in capsys.readouterr().err
