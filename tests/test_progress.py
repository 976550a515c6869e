"""What a run tells: rows, the time left, and tensorboard where it is installed."""

import json
import pathlib
import sys
import time

import pytest

from flax_skd.run import progress
from flax_skd.run.progress import Progress


def told(path, *, start=0, steps=4, every=2):
    """Runs `steps` steps of 10 images, each with a loss of its number."""
    bar = Progress(path, start=start, steps=steps, every_steps=every, every_s=1e9)
    for step in range(start + 1, steps + 1):
        if bar.step(step, {"loss": float(step)}, 10):
            bar.report(step, {"lr": 0.5})
    bar.write(steps, {"top1": 90.0})
    bar.close()
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_row_has_the_means_since_the_last_and_the_time_left(tmp_path):
    first, last, score = told(tmp_path / "log.jsonl")
    assert (first["step"], first["loss"], first["lr"]) == (2, 1.5, 0.5)
    assert (last["step"], last["loss"]) == (4, 3.5)
    pace = 10 / first["images_per_s"]  # seconds a step
    assert first["seconds_left"] == pytest.approx(2 * pace, rel=1e-6)
    assert last["seconds_left"] == 0
    assert score == {"step": 4, "top1": 90.0}


def test_compilation_is_left_out_of_the_pace(tmp_path):
    path, options = tmp_path / "log.jsonl", {"every_steps": 1, "every_s": 1e9}
    bar = progress.Progress(path, start=0, steps=3, **options)
    with bar.compiling(1):
        time.sleep(0.5)
    for step in (1, 2):
        assert bar.step(step, {"loss": 1.0}, 10)
        bar.report(step, {})
    bar.close()
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first == {"step": 1, "loss": 1.0}
    assert second["images_per_s"] > 20 and second["seconds_left"] < 0.5


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (89.4, "89 s"),
        (91, "2 min"),
        (3599, "1 h 0 min"),
        (7500, "2 h 5 min"),
    ],
)
def test_the_time_left_is_told_in_words(seconds, words):
    assert progress._readable(seconds) == words


def scalars(folder):
    """(name, step) -> value of every scalar in the event files, purges applied."""
    reader = pytest.importorskip("tensorboardX.record_writer")
    del reader
    from tensorboardX.proto import event_pb2

    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            if event.session_log.status == event.session_log.START:
                found = {k: v for k, v in found.items() if k[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_tensorboard_gets_every_row(tmp_path):
    pytest.importorskip("tensorboardX")
    rows = told(tmp_path / "log.jsonl")
    found = scalars(tmp_path / "tensorboard")
    for row in rows:
        for name, value in row.items():
            if name != "step":
                assert found[name, row["step"]] == pytest.approx(value, rel=1e-6)


def test_tensorboard_forgets_steps_that_run_again(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    ticks = iter(range(10_000))  # names of event files hold whole seconds
    monkeypatch.setattr("tensorboardX.event_file_writer.time.time", lambda: next(ticks))
    told(tmp_path / "log.jsonl", every=1)
    told(tmp_path / "log.jsonl", start=2, steps=3, every=1)
    found = scalars(tmp_path / "tensorboard")
    assert sorted(step for name, step in found if name == "loss") == [1, 2, 3]


def test_without_the_package_rows_are_written_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert len(told(tmp_path / "log.jsonl")) == 3
    assert not (tmp_path / "tensorboard").exists()


def test_a_log_that_a_power_cut_left_damaged_keeps_its_whole_rows(tmp_path):
    path = tmp_path / "log.jsonl"
    told(path, steps=4)
    rows = path.read_bytes().splitlines()
    left = [rows[0], b"\xff\x80", b"[" * 100_000, b"\0\0", b"3", rows[1][:9]]
    path.write_bytes(b"\n".join(left))
    assert [row["step"] for row in told(path, start=2)] == [2, 4, 4]


FULL = pathlib.Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs a device without room")
def test_a_disk_that_fills_up_is_named_and_what_to_do(tmp_path):
    path = tmp_path / "log.jsonl"
    bar = Progress(path, start=0, steps=4, every_steps=2, every_s=1e9)
    bar.write(1, {"loss": 1.0})
    path.unlink()
    path.symlink_to(FULL)
    with pytest.raises(OSError, match=rf"{path} could not .* space.*--resume"):
        bar.write(2, {"loss": 1.0})
    bar.close()


def test_a_log_that_may_not_be_written_is_named_at_the_start(tmp_path):
    path = tmp_path / "log.jsonl"
    told(path)
    path.with_suffix(".tmp").mkdir()
    with pytest.raises(OSError, match=rf"{path} could not be written.*--resume"):
        told(path, start=2)
