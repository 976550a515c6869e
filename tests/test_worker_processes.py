"""Processes that prepare training images: the batches of threads, and no stray ends."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_repeated_augmentation import SPEC

from flax_skd.io import augment, checkpoint, data
from flax_skd.io.examples import BadImageError, EncodedSource
from flax_skd.io.sources import ArraySource
from flax_skd.run import config_files, training

pytest.importorskip("grain")
pictures = pytest.importorskip("pictures")


def arrays(n=40):
    images = np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3)).astype(np.uint8)
    return ArraySource(images, np.arange(n) % 3, num_classes=3)


def batches(source=None, **options):
    """Of 32 images, two stacks each, unless told otherwise."""
    usual = {"batch_size": 32, "seed": 3, "augment": augment.flip_crop}
    return data.train_batches(source or arrays(), SPEC, **(usual | options))


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name])
        assert found[name].dtype == wanted[name].dtype


@pytest.mark.parametrize(
    "options",
    [{}, {"repeats": 3, "batch_size": 6, "process_index": 1, "process_count": 2}],
)
def test_batches_and_positions_are_those_of_threads(options):
    threads, processes = batches(**options), batches(workers=2, **options)
    assert processes.get_state() == threads.get_state()
    for _ in range(5):  # into the next epochs
        assert_same(next(processes), next(threads))
        assert processes.get_state() == threads.get_state()
    processes.close()
    assert_same(next(processes), next(threads))  # it starts them again
    processes.close()


def test_a_position_of_threads_serves_processes_and_that_of_processes_threads():
    first, second, third = batches(), batches(workers=3), batches()
    next(first)
    second.set_state(first.get_state())
    assert_same(next(second), next(first))
    third.set_state(second.get_state())
    second.close()
    assert_same(next(third), next(first))


def test_an_image_that_a_process_cannot_decode_is_named():
    files = [pictures.encoded(i) for i in range(8)]
    names = [f"image {i}" for i in range(8)]
    files[5] = b"nothing"
    source = EncodedSource(files.__getitem__, names, labels=[0] * 8, name="here")
    broken = batches(source, batch_size=4, workers=1)
    with pytest.raises(BadImageError, match="here: image 5 does not decode"):
        for _ in range(2):
            next(broken)
    broken.close()
    options = {"batch_size": 4, "on_bad_image": "skip"}
    threads, processes = (
        batches(source, **options),
        batches(source, workers=1, **options),
    )
    for _ in range(2):
        assert_same(next(processes), next(threads))
    processes.close()


# Prints who prepares its images, and is killed or goes on.
RUN = """
import multiprocessing, sys
sys.path[:0] = sys.argv[1:]
import test_worker_processes

if __name__ == "__main__":
    found = test_worker_processes.batches(workers=2)
    next(found)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    sys.stdin.readline()
    try:
        for _ in range(1000):
            next(found)
    except RuntimeError as error:
        print(error, flush=True)
"""


@pytest.fixture
def a_run(tmp_path):
    """A process that draws batches, and the pids of its workers."""
    script = tmp_path / "script.py"
    script.write_text(RUN)
    here = os.path.dirname(os.path.abspath(__file__))
    run = subprocess.Popen(
        [sys.executable, script, here, os.path.dirname(here)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    yield run, [int(pid) for pid in run.stdout.readline().split()]
    run.kill()
    run.communicate()


def test_what_ends_a_process_is_said_and_a_signal_to_all_ends_none(a_run):
    run, workers = a_run
    assert len(workers) == 2
    for pid, number in itertools.product(workers, (signal.SIGINT, signal.SIGTERM)):
        os.kill(pid, number)  # as Ctrl-C and a scheduler do, of the run and its workers
    time.sleep(0.5)
    assert all(map(alive, workers))
    os.kill(workers[0], signal.SIGKILL)
    said, _ = run.communicate("\n", timeout=60)
    assert "a process that prepares images has ended" in said
    assert "-9" in said and "--config.data.workers" in said


def test_a_run_that_is_killed_leaves_no_process(a_run):
    run, workers = a_run
    run.kill()
    end = time.monotonic() + 60
    while any(map(alive, workers)) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(map(alive, workers))


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_run_goes_on_with_another_number_of_workers(tmp_path):
    config = config_files.load("configs/scratch.py")
    changes = {"width": 16, "depth": 1, "mlp_dim": 16, "patch_size": 4}
    config.model.update(changes)
    config.update({"epochs": 2.0, "warmup_epochs": 0.5, "checkpoint_every": 2})
    config.data.update({"images": 64, "batch_size": 32, "eval_source": ""})

    def train(folder, workers, *, resume=False):
        config.data.workers = workers
        training.train(config, workdir=folder, overwrite=False, resume=resume)
        return checkpoint.load_supernet(folder / "network").params

    whole = train(tmp_path / "whole", 0)
    shutil.copytree(tmp_path / "whole/checkpoints", tmp_path / "part/checkpoints")
    shutil.rmtree(tmp_path / "part/checkpoints/4")
    part = train(tmp_path / "part", 1, resume=True)
    jax.tree.map(np.testing.assert_array_equal, part, whole)


def test_fewer_than_no_workers_are_refused():
    with pytest.raises(ValueError, match="workers = -1 at least 0"):
        batches(workers=-1)
