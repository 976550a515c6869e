"""What cards say of accuracy: what was measured of that very network, or nothing."""

import hashlib
import json
import logging

import export_page
import jax
import pytest

from flax_skd.io import checkpoint
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import macs, piad, vit
from flax_skd.run import accuracies, commands, evaluate, exporting

SPEC = export_page.TINY
TUNED = {"config": {"lr": 1e-3}, "steps": 12, "weights": "ema"}


def saved(folder, seed=2):
    """A super-network directory; seeds differ in weights and in nothing else."""
    params = vit.init(SPEC, jax.random.key(seed))
    levels = piad.uniform(SPEC, steps=6)
    made = Supernet(params, SPEC, levels, {"criterion": "wpac"})
    checkpoint.save_supernet(folder, made)
    return folder


def swept(folder, supernet, asked=True):
    """`sweep.json` of all levels, as the command leaves it."""
    folder.mkdir()
    levels = checkpoint.load_supernet(supernet).dropout_list
    rows = [
        evaluate.row(
            "wpac",
            SPEC,
            evaluate.list_cut(SPEC, levels, level),
            evaluate.Score(90.0 - level, 99.0, 0.1, 70.0, 40),
        )
        for level in range(int(levels.levels) + 1)
    ]
    path = folder / "sweep.json"
    path.write_text(json.dumps(rows))
    if asked:
        data = (supernet / "supernet.json").read_bytes()
        sums = {"wpac": hashlib.sha256(data).hexdigest()}
        text = json.dumps({"images": "ab", "networks": sums})
        (folder / "asked.json").write_text(text)
    return path


def extracted(supernet, out, **done):
    """What `extract` writes of half the MACs, with what was done to it since."""
    commands.extract(
        workdir=str(supernet), out=str(out), overwrite=False, cost=macs.macs, limit=0.5
    )
    small = checkpoint.load_subnet(out)
    small = small._replace(provenance=small.provenance | done)
    checkpoint.save_subnet(out, small, overwrite=True)
    return out


@pytest.fixture
def told(monkeypatch):
    """Warnings of the lookup."""
    lines = []
    monkeypatch.setattr(
        logging.getLogger(accuracies.__name__),
        "warning",
        lambda text, *values: lines.append(text % values),
    )
    return lines


def tops(workdir, measured, budgets=""):
    networks = exporting.chosen(str(workdir), budgets, str(measured))
    return [one.accuracy and one.accuracy["top1"] for one in networks]


def test_levels_of_the_network_that_was_swept_have_their_accuracies(tmp_path, told):
    supernet = saved(tmp_path / "super")
    sweep = swept(tmp_path / "sweep", supernet)
    levels = checkpoint.load_supernet(supernet).dropout_list
    half = piad.level_for(levels, SPEC, macs.macs(SPEC) // 2)
    assert tops(supernet, sweep, "0.5,1") == [90.0 - half, 90.0]
    assert not told


def test_an_accuracy_in_another_precision_says_so(tmp_path):
    supernet = saved(tmp_path / "super")
    sweep = swept(tmp_path / "sweep", supernet)
    asked = tmp_path / "sweep" / "asked.json"
    for dtype, says in (("float32", {}), ("bfloat16", {"dtype": "bfloat16"})):
        asked.write_text(json.dumps(json.loads(asked.read_text()) | {"dtype": dtype}))
        (whole,) = exporting.chosen(str(supernet), "1", str(sweep))
        want = {"top1": 90.0, "top5": 99.0, "kl": 0.1, "agreement": 70.0, "images": 40}
        assert whole.accuracy == want | says


def test_a_sweep_of_other_weights_of_the_same_sizes_is_refused_with_both_files(
    tmp_path,
):
    other = saved(tmp_path / "other", seed=3)
    sweep = swept(tmp_path / "sweep", other)
    supernet = saved(tmp_path / "super")
    with pytest.raises(ValueError, match="is of another super-network than") as error:
        tops(supernet, sweep, "0.5")
    for name in ("super/supernet.json", "sweep/asked.json", "sweep/sweep.json"):
        assert str(tmp_path / name) in str(error.value)
    assert tops(other, sweep, "1") == [90.0]


def test_an_exported_sub_network_remembers_which_super_network_it_is_of(tmp_path):
    supernet = saved(tmp_path / "super")
    (one,) = exporting.chosen(str(supernet), "0.5", "")
    checkpoint.save_subnet(tmp_path / "small", one.network)
    own = swept(tmp_path / "own", supernet)
    assert tops(tmp_path / "small", own) == tops(supernet, own, "0.5") != [None]
    other = swept(tmp_path / "sweep", saved(tmp_path / "other", seed=3))
    with pytest.raises(ValueError, match="small/spec.json, of the same name 'wpac'"):
        tops(tmp_path / "small", other)


@pytest.mark.parametrize(
    ("done", "says"),
    [
        (TUNED, "trained for 12 steps"),
        ({"recalibrated": {"chosen": "round 1", "kl": {}}}, "was recalibrated"),
    ],
)
def test_what_was_changed_after_its_cut_was_not_measured(tmp_path, told, done, says):
    supernet = saved(tmp_path / "super")
    sweep = swept(tmp_path / "sweep", supernet)
    small = extracted(supernet, tmp_path / "small", **done)
    assert tops(small, sweep) == [None]
    assert says in told[-1] and str(sweep) in told[-1]


def test_recalibration_that_kept_the_cut_as_it_was_keeps_its_accuracy(tmp_path):
    supernet = saved(tmp_path / "super")
    kept = {"recalibrated": {"chosen": "stored", "kl": {"stored": 0.1}}}
    small = extracted(supernet, tmp_path / "small", **kept)
    sweep = swept(tmp_path / "sweep", supernet)
    assert tops(small, sweep) == tops(supernet, sweep, "0.5") != [None]


def test_a_sweep_older_than_sums_is_taken_by_sizes_and_says_so(tmp_path, told):
    supernet = saved(tmp_path / "super")
    sweep = swept(tmp_path / "sweep", supernet, asked=False)
    assert tops(supernet, sweep, "0.5,1")[1] == 90.0
    (line,) = told
    assert "asked.json does not say" in line and "by name, level and sizes" in line


def test_a_level_that_was_not_swept_has_none_and_the_log_says_so(tmp_path, told):
    supernet = saved(tmp_path / "super")
    sweep = swept(tmp_path / "sweep", supernet)
    sweep.write_text(json.dumps(json.loads(sweep.read_text())[1:]))
    assert tops(supernet, sweep, "1") == [None]
    assert "has no row of 'wpac' at level 0" in told[-1]


def test_a_broken_record_beside_the_sweep_is_named(tmp_path):
    supernet = saved(tmp_path / "super")
    sweep = swept(tmp_path / "sweep", supernet)
    for text in ("{", '{"networks": 3}', "[1]"):
        sweep.with_name("asked.json").write_text(text)
        with pytest.raises(ValueError, match="asked.json: "):
            tops(supernet, sweep, "1")
