"""Two processes on one machine, as two hosts would be, do what one process does."""

import functools
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import plain_code
import pytest
import two_commands
import two_processes
from flax.traverse_util import flatten_dict

from flax_skd.io import checkpoint, data
from flax_skd.run import sharding

pytest.importorskip("grain")
pytest.importorskip("PIL")

SECONDS = 200  # then they are ended: a process that waits for the other waits for ever


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def started(script, index, port, folder):
    here = pathlib.Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    env["XLA_FLAGS"] = plain_code.flags(2)
    log = (folder / f"{index}.log").open("w")
    with log:
        return subprocess.Popen(
            [sys.executable, script.__file__, str(port), str(index), folder],
            env=env,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def run_both(script, folder):
    """Runs a script as two processes that end well; what each of them said."""
    port = free_port()
    processes = [started(script, index, port, folder) for index in (0, 1)]
    end = time.monotonic() + SECONDS
    try:
        codes = [p.wait(max(0.1, end - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        codes = "too slow"
    finally:
        for process in processes:
            process.kill()
            process.wait()
    logs = [(folder / f"{index}.log").read_text() for index in (0, 1)]
    assert codes == [0, 0], "\n".join(log[-3000:] for log in logs)
    return logs


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The results of both processes."""
    folder = tmp_path_factory.mktemp("pod")
    run_both(two_processes, folder)
    return [dict(np.load(folder / f"{index}.npz")) for index in (0, 1)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The results of one process with one device."""
    mesh = sharding.mesh({"data": 1}, devices=jax.devices()[:1])
    return two_processes.results(mesh, tmp_path_factory.mktemp("alone") / "run")


def test_both_processes_have_the_same_results(found):
    for name, value in found[0].items():
        if name == "a folder each":
            continue  # it names the folder
        np.testing.assert_array_equal(found[1][name], value, err_msg=name)


def test_what_two_processes_have_in_parts_is_gathered_again_and_again(found):
    want = two_processes.parameters()["head"]["kernel"]
    np.testing.assert_array_equal(found[0]["gathered"], want)


@pytest.mark.parametrize("part", ["sums", "importance", "losses", "params"])
def test_two_processes_measure_and_train_as_one_does(found, alone, part):
    names = [name for name in alone if name.startswith(f"['{part}']")]
    assert names
    for name in names:
        want = alone[name]
        near = 1e-5 * max(1e-3, np.abs(want).max())
        np.testing.assert_allclose(
            found[0][name], want, rtol=1e-5, atol=near, err_msg=name
        )


def test_two_processes_grow_the_list_and_score_of_one(found, alone):
    assert int(alone["['levels'].levels"]) > 5
    assert int(alone["['score'].images"]) == two_processes.IMAGES
    for name, want in alone.items():
        if name.startswith(("['levels']", "['score'].top")):
            np.testing.assert_array_equal(found[0][name], want, err_msg=name)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("an axis over processes", "must divide the 2 devices of a process"),
        ("other commands", "lr: process 0 has 0, process 1 has 1"),
        ("other weights", "sum of what it starts from: process 0 has "),
        ("a folder each", "process 0 writes there, process 1 does not see"),
    ],
)
def test_what_two_processes_must_share_is_refused_by_both(found, what, words):
    for one in found:
        assert words in str(one[what])


# The command line.


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Folders of four commands by one process and by two, and what the two said."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    mesh = functools.partial(sharding.mesh, {"data": 1}, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "mesh", lambda *args, **kwargs: mesh())
        assert two_commands.run(one) == 0
    return one, two, run_both(two_commands, two)


def test_train_by_two_processes_gives_the_network_of_one(commands):
    one, two, _ = commands
    networks = [checkpoint.load_supernet(f / "train/network") for f in (one, two)]
    want, got = (flatten_dict(n.params, sep="/") for n in networks)
    assert sorted(got) == sorted(want)
    for name in want:
        if name.endswith("key/bias"):
            continue  # its gradient is zero but for rounding, which AdamW divides by
        np.testing.assert_allclose(
            got[name], want[name], rtol=1e-5, atol=1e-5, err_msg=name
        )


def test_contract_and_sweep_by_two_processes_give_the_table_of_one(commands):
    one, two, _ = commands
    want, got = (
        json.loads((folder / "sweep/sweep.json").read_text()) for folder in (one, two)
    )
    want, got = (x["rows"] if isinstance(x, dict) else x for x in (want, got))
    assert len(got) == len(want) > 2
    for a, b in zip(got, want):
        for name in ("criterion", "cut", "level", "macs", "params", "images"):
            assert a[name] == b[name]
        assert a["top1"] == pytest.approx(b["top1"], abs=100 / 90 + 1e-3)
        assert a["kl"] == pytest.approx(b["kl"], rel=0.01, abs=1e-6)


def test_repaired_piad_cut_over_two_processes_grows_and_scores_as_that_of_one(commands):
    one, two, _ = commands
    want, got = (checkpoint.load_supernet(f / "piad/network") for f in (one, two))
    assert want.compensation is not None and got.compensation is not None
    assert int(want.dropout_list.levels) > 3
    for a, b in zip(want.dropout_list, got.dropout_list, strict=True):
        np.testing.assert_array_equal(a, b)
    # Not by parameters: eigenvectors of eigenvalues that are nearly one are not the same.
    want, got = (
        json.loads((f / "piad/log.jsonl").read_text().splitlines()[-1])
        for f in (one, two)
    )
    assert sorted(got) == sorted(want) and "raw_smallest_top1" in want
    for name in want:
        assert got[name] == pytest.approx(want[name], abs=2 * 100 / 450 + 1e-3)


def test_only_the_first_process_tells_and_writes(commands):
    _, folder, logs = commands
    assert "wrote" in logs[0] and "step 5/" in logs[0]
    assert "wrote" not in logs[1] and " step " not in logs[1]
    assert "rows of" in logs[0] and "rows of" not in logs[1]
    # Each directory once, whole, and nothing half written beside it.
    for network in (folder / "train/network", folder / "wpac"):
        files = sorted(p.name for p in network.iterdir())
        assert files == sorted(checkpoint.SUPERNET_FILES)
    there = {p.name for p in folder.iterdir() if p.suffix != ".log"}
    assert there == {"train", "wpac", "sweep", "piad"}


def test_two_processes_that_were_told_different_things_say_which(commands):
    for log in commands[2]:
        assert re.search("workdir: process 0 has '.*/0', process 1 has '.*/1'", log)


# What each process reads.


def test_processes_share_out_every_batch_and_pad_the_last():
    source = two_processes.images()
    whole = data.eval_batches(source, two_processes.SPEC, batch_size=4)
    parts = [list(whole.of_process(index, 2)) for index in (0, 1)]
    assert [len(part) for part in parts] == [len(whole)] * 2 == [4, 4]
    for want, *rows in zip(whole, *parts, strict=True):
        for key, values in want.items():
            got = np.concatenate([batch[key] for batch in rows])
            np.testing.assert_array_equal(got, values)
    assert parts[1][-1]["weight"].tolist() == [0, 0]


def test_a_batch_that_does_not_divide_over_the_processes_is_refused():
    source = two_processes.images()
    batches = data.eval_batches(source, two_processes.SPEC, batch_size=5)
    with pytest.raises(ValueError, match="batch_size = 5 .* multiple of the 2"):
        batches.of_process(0, 2)


def noise(image, rng, spec):
    """Shows the draws themselves: no two are the same by chance."""
    return rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)


def test_processes_share_out_the_examples_of_one_with_draws_of_their_own():
    def training(**options):
        return data.train_batches(
            *(two_processes.images(), two_processes.SPEC),
            batch_size=4,
            seed=0,
            augment=noise,
            **options,
        )

    whole = training()
    parts = [training(process_index=i, process_count=2) for i in (0, 1)]
    for _ in range(8):  # over the ends of two epochs, whose length is odd
        want, got = next(whole), [next(part) for part in parts]
        assert (got[0]["image"] != got[1]["image"]).any((1, 2, 3)).all()
        for index, part in enumerate(got):
            for key, values in part.items():
                np.testing.assert_array_equal(values, want[key][index::2])
