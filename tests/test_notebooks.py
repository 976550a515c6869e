"""The notebooks run from top to bottom, and are committed without outputs."""

import functools
import json
import pathlib

import jax
import pytest

from flax_skd.run import sharding

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "colab").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_without_outputs(path):
    assert code_cells(path)
    for cell in code_cells(path):
        assert not cell["outputs"] and cell["execution_count"] is None


def test_the_quickstart_runs_and_wpac_beats_plain_cuts(monkeypatch, capsys):
    monkeypatch.setenv("FLAX_SKD_FAST", "1")
    one = functools.partial(sharding.mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "mesh", one)
    (path,) = (p for p in NOTEBOOKS if p.stem == "quickstart")
    names = {}
    for cell in code_cells(path):
        exec("".join(cell["source"]), names)  # noqa: S102, our own notebook
    top1 = {(r["criterion"], r["kept"]): r["top1"] for r in names["rows"]}
    assert top1["wpac", 0.75] > top1["none", 0.75]
    assert "MACs, (64, 10)" in capsys.readouterr().out
