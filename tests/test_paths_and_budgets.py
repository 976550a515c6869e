"""Where commands write, whose configs they read, and what a share of a network finds."""

import pathlib

import jax
import pytest
from test_wrong_calls import DIGITS, network, refused

from flax_skd.io import checkpoint
from flax_skd.method import macs, piad, vit
from flax_skd.method.spec import SubnetSpec
from flax_skd.run import commands, family, main, sweeping

_ = network  # a fixture
LISTS = pathlib.Path(__file__).parents[1] / "docs" / "networks"


@pytest.fixture
def home(tmp_path, monkeypatch, network):
    """The home of a user who works elsewhere, with a super-network in it."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def test_what_a_shell_leaves_to_us_is_the_home_everywhere(home, capsys):
    (home / "there.safetensors").write_text("precious")
    convert = ["convert", "--config.model.path=~/supernet"]
    told = refused([*convert, "--workdir=~/there.safetensors"], capsys)
    assert "pass --overwrite" in told
    assert (home / "there.safetensors").read_text() == "precious"
    sweep = ["sweep", "--workdir=~/supernet", "--config.data.source=digits:test"]
    assert main.main([*sweep, "--config.data.images=8", "--config.cuts=levels"]) == 0
    assert (home / "supernet-sweep" / "sweep.json").is_file()
    assert not [*(home / "elsewhere").iterdir()]


def test_the_current_directory_goes_by_its_name(home, monkeypatch):
    monkeypatch.chdir(home / "supernet")
    sweep = ["sweep", "--workdir=.", "--config.data.source=digits:test"]
    assert main.main([*sweep, "--config.data.images=8", "--config.cuts=levels"]) == 0
    assert (home / "supernet-sweep" / "sweep.json").is_file()
    assert main.main(["extract", "--workdir=.", "--out=../half", "--budget=1.0"]) == 0
    facts = checkpoint.load_subnet(home / "half").provenance
    assert facts["parent"] == "supernet"
    assert facts["supernet_sha256"] == checkpoint.supernet_sum(home / "supernet")


@pytest.mark.parametrize(
    ("command", "config", "lacks"),
    [
        ("contract", "configs/sweep.py", "criterion"),
        ("contract", "configs/piad.py", "criterion"),
        ("sweep", "configs/wpac.py", "cuts"),
        ("profile", "configs/sweep.py", "lane"),
    ],
)
def test_a_config_of_another_command_is_refused(command, config, lacks, capsys):
    told = refused([command, f"--config={config}", "--workdir=x"], capsys)
    assert f"{config} is no config of {command}" in told and lacks in told


def test_what_a_directory_states_is_not_said_otherwise(network, tmp_path, capsys):
    convert = ["convert", f"--config.model.path={network}", f"--workdir={tmp_path}/x"]
    for more, match in (
        ("recipe=deit", r"not (0.485"),
        ("fields.num_heads=3", "num_heads = 1, not 3"),
        ("entry=ema", "no entry 'ema'"),
    ):
        assert match in refused([*convert, f"--config.model.{more}"], capsys)
    assert main.main([*convert, "--config.model.fields.num_heads=1"]) == 0
    capsys.readouterr()
    half = ["--config.dtype=bfloat16", f"--workdir={tmp_path}/x.safetensors"]
    assert "is written in float32" in refused([*convert, *half], capsys)


@pytest.mark.parametrize("cost", [macs.macs, macs.param_count])
def test_the_share_of_a_level_finds_that_level(cost):
    found = checkpoint.load_supernet(LISTS / "cifar10_ti16_64px_piad")
    spec, levels = found.spec, found.dropout_list
    full = cost(spec)
    for level in range(int(levels.levels) + 1):
        mine = cost(spec, levels.widths(level, spec))
        at = piad.level_within(levels, spec, mine / full, cost=cost)
        assert cost(spec, levels.widths(at, spec)) == mine


def test_every_way_to_ask_for_a_share_finds_the_same_level(network):
    spec = DIGITS.replace(width=24, depth=3, num_heads=3, head_dim=8, mlp_dim=40)
    levels = piad.uniform(spec, steps=7)
    params = vit.init(spec, jax.random.key(0))
    found = checkpoint.Supernet(params, spec, levels, {})
    served = family.SubnetFamily(found)
    for level in range(int(levels.levels) + 1):
        share = macs.macs(spec, levels.widths(level, spec)) / macs.macs(spec)
        (*_, cut) = sweeping.cuts_of(found, "budgets", repr(share))
        assert cut.level == level == served.use(macs=share)
        assert commands.subnet_within(found, cost=macs.macs, limit=share)[1] == level


def test_rows_that_are_the_same_are_measured_once(network):
    found = checkpoint.load_supernet(network)
    assert len(sweeping.cuts_of(found, "mlp,mlp", "0.5,0.5,1/2")) == 2
    levels = piad.from_rows(
        [SubnetSpec.full(DIGITS), SubnetSpec.uniform(DIGITS, 4, 4, 4)], DIGITS
    )
    found = found._replace(dropout_list=levels)
    assert len(sweeping.cuts_of(found, "levels,budgets", "0.9,0.95")) == 2
    with pytest.raises(ValueError, match="sweep them into two folders"):
        sweeping.cuts_of(found, "all,levels", "0.5")
    with pytest.raises(ValueError, match=r"kept = 5.0 must lie in \(0, 1\]"):
        sweeping.cuts_of(found, "budgets", "5")
