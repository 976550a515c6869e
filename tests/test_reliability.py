"""Killed, half lost, damaged, mixed up, out of room: what a run does about it."""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import killed_training
import numpy as np
import plain_code
import pytest
from test_train import assert_same

from flax_skd.io import run_state, whole_steps
from flax_skd.run import updates, witness

SECONDS = 400  # then what hangs is ended: other work may share the cores
ENDED_BY_JAX = (-signal.SIGABRT, 1)  # jaxlib aborts, up to 0.8 it exits with 1


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The state, and the names of the files that are left."""
    folder = tmp_path_factory.mktemp("whole")
    return killed_training.run(folder), names(folder)


def names(folder):
    """Files but for the log and for the names that orbax draws."""
    paths = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    shown = {re.sub("[0-9a-f]{32}", "*", p) for p in paths}
    return {p for p in shown if not p.startswith(("log.jsonl", "tensorboard/"))}


def started(folder, *arguments, said=subprocess.PIPE):
    here = pathlib.Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    env |= {"XLA_FLAGS": plain_code.flags(1), "FLAX_SKD_HEARTBEAT_S": "10"}
    return subprocess.Popen(
        [sys.executable, killed_training.__file__, str(folder), *arguments],
        env=env,
        stdout=said,
        stderr=subprocess.STDOUT,
        text=True,
    )


# Killed, or out of room.


def test_a_run_killed_again_and_again_loses_nothing_that_was_saved(
    tmp_path, uninterrupted
):
    folder = tmp_path / "run"
    steps, left = folder / "checkpoints", []
    for end, at, code in [
        ("dying_in_a_save", "4", -signal.SIGKILL),
        ("with_no_room_from", "1", 1),
        ("dying_in_growth", "2", -signal.SIGKILL),
    ]:
        before = whole_steps.steps(steps)
        process = started(folder, end, at)
        said, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == code, said
        assert not before or f"resumed after step {before[0]}" in said
        left.append([whole_steps.steps(steps)[0], len(list(steps.glob("*tmp*")))])
        if end == "with_no_room_from":
            assert f"could not be saved in {steps}" in said
            assert f"good checkpoint: step 2 in {steps}" in said
    # In the save of step 4, twice, and after step 6, whose save may have been under way.
    assert left[:2] == [[2, 1], [2, 1]] and left[2][0] in (4, 6)
    (folder / ".network.0123abcd.tmp").mkdir()  # killed while the network was written
    (folder / ".network-0.5.0123abcd.old").mkdir()
    state, files = uninterrupted
    assert_same(killed_training.run(folder, resume=True), state)
    assert names(folder) == files


def test_an_older_step_that_was_half_deleted_does_no_harm(tmp_path, uninterrupted):
    killed_training.run(tmp_path, steps=6)
    for name in ("_CHECKPOINT_METADATA", "commit_success.txt", "state/_METADATA"):
        (tmp_path / "checkpoints/2" / name).unlink(missing_ok=True)
    state, files = uninterrupted
    assert_same(killed_training.run(tmp_path, resume=True), state)
    assert names(tmp_path) == files


# Two processes.


def pair(folder, end, at):
    """Two processes; the seconds the second to end took to notice, codes, and logs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    files = [folder.parent / f"{end}{i}.txt" for i in (0, 1)]
    both = []
    for i, file in enumerate(files):
        with file.open("w") as said:
            both.append(started(folder, end, at, port, str(i), said=said))
    limit = time.monotonic() + SECONDS
    try:
        while all(p.poll() is None for p in both) and time.monotonic() < limit:
            time.sleep(0.1)
        first = time.monotonic()
        codes = [p.wait(SECONDS) for p in both]
    finally:
        for process in both:
            process.kill()
    seconds = time.monotonic() - first
    # The witness speaks when the process is gone.
    ended = [f for f, code in zip(files, codes) if code in ENDED_BY_JAX]
    while any(witness.AGAIN not in f.read_text() for f in ended):
        assert time.monotonic() < limit, "no witness spoke"
        time.sleep(0.1)
    return seconds, codes, [file.read_text() for file in files]


def test_when_one_process_dies_the_other_says_so_and_both_resume(
    tmp_path, uninterrupted
):
    folder = tmp_path / "run"
    seconds, codes, logs = pair(folder, "dying_before", "8")
    assert codes[1] == -signal.SIGKILL and codes[0] in ENDED_BY_JAX, logs[0][-3000:]
    assert seconds < 60
    last = logs[0].strip().splitlines()[-1]
    # Ended by JAX, or by what a step raised first where it was summing with the other.
    said = "was ended: process 1 is gone|ended, and process 1 did not end with it"
    assert re.search(f"process 0 of 2 ({said})", last)
    assert "Start all processes of the run again" in last and "--resume" in last
    whole, _ = whole_steps.newest(folder / "checkpoints")
    assert whole in (4, 6)  # the save after 6 may have been under way
    _, codes, logs = pair(folder, "well", "")
    assert codes == [0, 0], "\n".join(log[-3000:] for log in logs)
    assert f"resumed after step {whole}" in logs[0]
    assert "was ended" not in "".join(logs)
    state, _ = uninterrupted
    with np.load(folder / "final.npz") as final:
        np.testing.assert_array_equal(final["w"], state.params["w"])


def test_when_the_coordinator_dies_the_other_says_so(tmp_path):
    seconds, codes, logs = pair(tmp_path / "run", "coordinator", "")
    assert codes[0] == -signal.SIGKILL and codes[1] in ENDED_BY_JAX, logs[1][-3000:]
    assert seconds < 60
    last = logs[1].strip().splitlines()[-1]
    assert "process 1 of 2 was ended: process 0 (127.0.0.1:" in last
    assert "is gone, and the run with it" in last and "--resume" in last


def test_a_witness_says_what_it_can_know():
    with socket.create_server(("127.0.0.1", 0)) as coordinator:
        there = f"127.0.0.1:{coordinator.getsockname()[1]}"
        say = witness.verdict
        assert say(1, 2, there, witness.LEAVING + witness.LEFT) == ""
        assert "another one did not end" in say(1, 2, there, witness.LEAVING)
        assert "process 1 did not end" in say(0, 2, there, witness.LEAVING)
        assert "it was killed" in say(1, 2, there, witness.WAITING + witness.JOINED)
        assert "others were not there in time" in say(1, 2, there, witness.WAITING)
        assert "it was killed" in say(1, 2, there, b"")
        assert "process 2 is gone, unless" in say(1, 3, there, b"")
        assert "stopped sending" in say(1, 4, there, b"")
    assert f"process 0 ({there}) is gone" in say(1, 4, there, b"")


# Damaged and swapped files.


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Workdirs of two runs that differ in their seed, after six steps."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("ours", 3), ("other", 4)):
        config = {**killed_training.CONFIG, "seed": seed}
        killed_training.run(folder / name, steps=6, config=config)
    # The same images in another order would be at another place.
    step = folder / "other/checkpoints/6"
    place = step / "data/process_0-of-1.json"
    place.write_text(place.read_text().replace("6", "5"))
    (step / whole_steps.FILE).unlink()
    whole_steps.seal(step, 6)
    return folder / "ours", folder / "other"


@pytest.fixture
def ours(two_runs, tmp_path):
    shutil.copytree(two_runs[0], tmp_path / "run")
    return tmp_path / "run"


def sealed_files(step):
    return sorted(json.loads((step / whole_steps.FILE).read_text())["files"])


def test_every_file_cut_short_anywhere_is_named(ours):
    step = ours / "checkpoints/6"
    assert whole_steps.faults(step, 6) == []
    for name in (*sealed_files(step), whole_steps.FILE):
        path = step / name
        content = path.read_bytes()
        # Up to the byte before last: nobody misses the newline of a JSON.
        for kept in np.linspace(0, len(content) - 2, 20).astype(int):
            path.write_bytes(content[:kept])
            (fault,) = whole_steps.faults(step, 6)
            assert str(path) in fault, (name, kept)
        path.unlink()
        assert f"{path} is not there" in whole_steps.faults(step, 6)[0]
        path.write_bytes(content)
    assert whole_steps.faults(step, 6) == []


def test_a_flipped_bit_anywhere_is_named(ours):
    step, rng = ours / "checkpoints/6", np.random.default_rng(0)
    for name in sealed_files(step):
        path = step / name
        content = path.read_bytes()
        for at in rng.integers(0, len(content), 5):
            flipped = bytearray(content)
            flipped[at] ^= 1 << rng.integers(8)
            path.write_bytes(flipped)
            (fault,) = whole_steps.faults(step, 6)
            assert fault.startswith(str(path)), (name, at)
        path.write_bytes(content)


def swap_a_file(ours, other):
    name = "data/process_0-of-1.json"
    shutil.copy(other / "checkpoints/6" / name, ours / "checkpoints/6" / name)
    return name


def swap_the_state(ours, other):
    shutil.rmtree(ours / "checkpoints/6/state")
    shutil.copytree(other / "checkpoints/6/state", ours / "checkpoints/6/state")
    return "state/"


def swap_a_step(ours, other):
    shutil.rmtree(ours / "checkpoints/6")
    shutil.copytree(ours / "checkpoints/4", ours / "checkpoints/6")
    return f"{whole_steps.FILE} is of step 4"


def edit_the_config(ours, other):
    path = ours / "checkpoints/6/config/metadata"
    path.write_text(path.read_text().replace("3", "5"))
    return "config/metadata"


def edit_the_checksums(ours, other):
    path = ours / "checkpoints/6" / whole_steps.FILE
    path.write_text(path.read_text().replace('"sha256"', '"sha"', 1))
    return f"{whole_steps.FILE} was edited"


def edit_the_note(ours, other):
    path = ours / "checkpoints/6" / whole_steps.NOTE
    path.write_text("[3]")
    return f"{path.name} was edited"


def cut_the_arrays(ours, other):
    path = max(
        (ours / "checkpoints/6/state").rglob("d/*"), key=lambda p: p.stat().st_size
    )
    path.write_bytes(path.read_bytes()[:100])
    return f"{path.name} has 100 bytes"


def restored(folder, step):
    """The state that `--resume` begins with, which must be the one after `step`."""
    data = killed_training.batches()
    disk = run_state.Checkpoints(
        folder, batches=data, config=killed_training.CONFIG, resume=True
    )
    state = killed_training.initial()
    state = state._replace(**disk.restore(updates.saved(state)))
    disk.close()
    assert (int(state.step), data.get_state()["next_index"]) == (step, step)
    return state


@pytest.mark.parametrize(
    "damage",
    [
        *(swap_a_file, swap_the_state, swap_a_step, edit_the_note),
        *(edit_the_config, edit_the_checksums, cut_the_arrays),
    ],
)
def test_resume_names_what_is_damaged_and_takes_the_step_before(
    ours, two_runs, caplog, damage
):
    shutil.copytree(ours, ours.parent / "older")
    shutil.rmtree(ours.parent / "older/checkpoints/6")
    before = restored(ours.parent / "older", 4)
    named = damage(ours, two_runs[1])
    damaged = contents(ours / "checkpoints/6")
    assert_same(restored(ours, 4), before)
    assert f"{ours}/checkpoints/6" in caplog.text and named in caplog.text
    assert "Going on from step 4" in caplog.text and "6.damaged" in caplog.text
    assert contents(ours / "checkpoints/6.damaged") == damaged
    assert whole_steps.steps(ours / "checkpoints") == [4, 2]


def contents(folder):
    return sorted(p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_a_run_with_a_damaged_step_ends_as_if_nothing_had_been(
    ours, two_runs, uninterrupted
):
    for _ in range(2):
        swap_the_state(ours, two_runs[1])
        assert_same(killed_training.run(ours, steps=10, resume=True), uninterrupted[0])
        assert whole_steps.steps(ours / "checkpoints") == [10, 8, 6]
        for step in (10, 8):
            shutil.rmtree(ours / f"checkpoints/{step}")
        shutil.copytree(two_runs[0] / "checkpoints/4", ours / "checkpoints/4")
    kept = sorted(p.name for p in ours.glob("checkpoints/*.damaged*"))
    assert kept == ["6.damaged", "6.damaged2"]


@pytest.mark.parametrize("name", [whole_steps.NOTE, "commit_success.txt"])
def test_the_files_that_are_not_summed_do_not_matter(ours, name):
    before = restored(ours, 6)
    for content in (b"", b"{", b"{}", b"\xff\xff"):
        (ours / "checkpoints/6" / name).write_bytes(content)
        assert_same(restored(ours, 6), before)
    (ours / "checkpoints/6" / name).unlink()
    assert_same(restored(ours, 6), before)


def test_where_no_step_is_whole_each_is_named_and_nothing_moved(ours):
    paths = [ours / f"checkpoints/{step}/state/_METADATA" for step in (2, 4, 6)]
    for path in paths:
        path.write_text("{}")
    with pytest.raises(ValueError, match="cannot be restored") as error:
        killed_training.run(ours, resume=True)
    assert all(f"{path} has 2 bytes" in str(error.value) for path in paths)
    assert whole_steps.steps(ours / "checkpoints") == [6, 4, 2]


def test_a_step_of_another_run_is_refused_by_its_config(ours, two_runs):
    shutil.rmtree(ours / "checkpoints/6")
    shutil.copytree(two_runs[1] / "checkpoints/6", ours / "checkpoints/6")
    with pytest.raises(
        ValueError, match=r"checkpoint 6: .*(.|\n)*seed: saved 4, now 3"
    ):
        killed_training.run(ours, resume=True)
    assert (ours / "checkpoints/6").is_dir()


# Directories that cannot be written.


@contextlib.contextmanager
def as_nobody():
    """Permissions do not bind the superuser."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_workdir_is_said_at_once():
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        folder.chmod(0o755)
        (folder / "run").mkdir()
        for path, mode in ((folder / "run", 0o555), (folder, 0o555)):
            path.chmod(mode)
        with as_nobody():
            for path in (folder / "run", folder / "new"):
                with pytest.raises(
                    ValueError, match=f"{path} cannot be written .*Perm"
                ):
                    run_state.claim(path)
        folder.chmod(0o755)
        (folder / "run").chmod(0o755)


def test_a_full_disk_is_said_before_the_first_step(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    with pytest.raises(ValueError, match=r"cannot be written \(No space left.*workdir"):
        run_state.claim(tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_a_resume_by_another_number_of_processes_says_so(tmp_path):
    (tmp_path / "7" / "data").mkdir(parents=True)
    (tmp_path / "7" / "data" / "process_0-of-1.json").touch()
    run_state._check_processes(tmp_path, 7)
    for index in range(2):
        (tmp_path / "7" / "data" / f"process_{index}-of-2.json").touch()
    (tmp_path / "7" / "data" / "process_0-of-1.json").unlink()
    with pytest.raises(ValueError, match="saved by 2 processes.* has 1: start 2"):
        run_state._check_processes(tmp_path, 7)
