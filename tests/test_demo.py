"""The demo, run as the README says; apart, for it takes as long as many files."""

import json
import os
import subprocess
import sys

import pytest

from flax_skd.io import checkpoint
from flax_skd.method import macs
from flax_skd.run import training


def test_the_demo_runs_as_the_readme_says(tmp_path):
    program = [sys.executable, "-m", "flax_skd.run.main", "demo", "--fast"]
    # One device and fast code, as on a user's machine, compiled a third sooner.
    env = {**os.environ, "XLA_FLAGS": "--xla_llvm_disable_expensive_passes=true"}
    done = subprocess.run(
        program, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "flax_skd_demo"
    rows = json.loads((folder / "sweep.json").read_text())
    top1 = {(r["criterion"], r["kept"]): r["top1"] for r in rows}
    assert top1["wpac", 1.0] == pytest.approx(top1["none", 1.0], abs=0.5)
    assert top1["wpac", 0.75] > top1["none", 0.75] + 10
    assert top1["balanced", 0.375] > top1["wpac", 0.375] + 5
    assert top1["piad", 0.375] > top1["wpac", 0.375] + 5
    kept = {r["kept"] for r in rows if r["criterion"] == "wpac"}
    assert kept == {i / 8 for i in range(1, 9)}
    for name in ("sweep.csv", "sweep.png", "list.png"):
        assert (folder / name).stat().st_size > 100
    small = checkpoint.load_subnet(folder / "subnet")
    whole = checkpoint.load_supernet(folder / "supernet")
    assert 0.4 < macs.branch_fraction(small.spec, small.widths) <= 0.5
    assert whole.provenance["criterion"] == "balanced"
    assert int(whole.dropout_list.levels) > 8
    tuned = checkpoint.load_subnet(folder / "finetune" / training.NETWORK)
    assert tuned.widths == small.widths
    assert "Half-size network reloaded from disk" in done.stdout
    again = subprocess.run(
        program, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1 and "--overwrite" in again.stderr
