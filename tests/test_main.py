"""The program as a user runs it, from files to files, on a tiny network."""

import contextlib
import io
import json
import pathlib
import re
import shutil
import signal
import tarfile

import jax
import numpy as np
import pytest
from pictures import encoded
from PIL import Image

import flax_skd
from flax_skd.io import checkpoint, conversion
from flax_skd.method import macs
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import (
    config_files,
    configured_loss,
    evaluate,
    main,
    sweeping,
    training,
)

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
IMAGES = 40


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def files(spec, params, tmp_path_factory):
    """A timm file and a tar of labelled images."""
    folder = tmp_path_factory.mktemp("files")
    conversion.write_timm(folder / "tiny.safetensors", params, spec)
    rng = np.random.default_rng(0)
    labels = {}
    with tarfile.open(folder / "images.tar", "w") as tar:
        for i in range(IMAGES):
            pixels = rng.integers(0, 256, (20, 18, 3)).astype(np.uint8)
            _add(tar, f"{i:03d}.png", _png(pixels))
            labels[f"{i:03d}.png"] = i % spec.num_classes
        _add(tar, "labels.json", json.dumps(labels).encode())
    return folder


def _png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def contract_args(files, workdir, *more):
    return [
        "contract",
        "--config=configs/wpac.py",
        f"--config.model.path={files}/tiny.safetensors",
        "--config.model.recipe=augreg",
        "--config.model.fields.num_heads=2",
        f"--config.data.source=tar:{files}/images.tar",
        "--config.data.images=32",
        "--config.data.batch_size=16",
        f"--workdir={workdir}",
        *more,
    ]


@pytest.fixture(scope="module")
def supernet(files):
    workdir = files / "supernet"
    args = contract_args(files, workdir, "--config.compare=taylor1,random")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main.main(args) == 0
    changes = re.findall(r"changed by at most (\S+) on 16", printed.getvalue())
    assert len(changes) == 3 and max(map(float, changes)) < 1e-4
    return workdir


def test_contract_writes_a_network_with_the_same_logits(
    supernet, files, spec, params, batch
):
    loaded = checkpoint.load_supernet(supernet)
    spec = spec.replace(crop_fraction=loaded.spec.crop_fraction)
    assert loaded.spec == spec and int(loaded.dropout_list.levels) == 31
    before = ViT(spec).apply({"params": params}, batch["image"])
    for folder in (supernet, f"{supernet}-taylor1", f"{supernet}-random"):
        turned = checkpoint.load_supernet(folder).params
        after = ViT(spec).apply({"params": turned}, batch["image"])
        np.testing.assert_allclose(after, before, atol=1e-5)
    facts = loaded.provenance
    assert facts["criterion"] == "wpac" and facts["calibration_images"] == 32
    assert facts["source"]["file"] == "tiny.safetensors"
    assert re.fullmatch("[0-9a-f]{64}", facts["source"]["sha256"])
    assert facts["flax_skd"] == flax_skd.__version__


def test_sweep_writes_a_table_and_resumes_with_the_criteria_it_lacks(
    supernet, files, capsys
):
    out = files / "sweep"
    args = ["sweep", f"--workdir={supernet}", f"--out={out}", "--config.kept=1/2,3/4"]
    args += [f"--config.data.source=tar:{files}/images.tar"]
    args += ["--config.data.batch_size=16", "--config.cuts=attention,mlp"]
    assert main.main(args) == 0
    assert "| attention |" in capsys.readouterr().out.replace("  ", "")
    first = json.loads((out / "sweep.json").read_text())
    assert len(first) == 5 and first[0]["images"] == IMAGES
    assert tuple(first[0]) == evaluate.COLUMNS
    assert main.main(args) == 1  # nothing is overwritten silently
    assert "pass --resume" in capsys.readouterr().err
    assert main.main([*args, "--resume", "--config.compare=taylor1"]) == 0
    both = json.loads((out / "sweep.json").read_text())
    assert both[:5] == first and {r["criterion"] for r in both[5:]} == {"taylor1"}
    capsys.readouterr()
    for other, words in (
        ("--config.kept=1/4", "kept: saved '1/2,3/4', now '1/4'"),
        ("--config.data.images=10", "images: saved '40 images"),
        ("--config.dtype=bfloat16", "dtype: saved 'float32', now 'bfloat16'"),
    ):
        assert main.main([*args, "--resume", "--config.compare=random", other]) == 1
        assert words in capsys.readouterr().err
    assert json.loads((out / "sweep.json").read_text()) == both


def test_a_sweep_of_another_network_is_not_resumed(supernet, files, capsys, tmp_path):
    shutil.copytree(supernet, tmp_path / "net")
    args = ["sweep", f"--workdir={tmp_path}/net", "--config.cuts=mlp"]
    args += [f"--config.data.source=tar:{files}/images.tar", "--config.kept=1/2"]
    assert main.main([*args, "--config.data.batch_size=16"]) == 0
    fields = json.loads((tmp_path / "net" / "supernet.json").read_text())
    fields["provenance"]["note"] = "another"
    (tmp_path / "net" / "supernet.json").write_text(json.dumps(fields))
    assert main.main([*args, "--config.data.batch_size=16", "--resume"]) == 1
    assert "sweep.json is of another sweep" in capsys.readouterr().err


def test_a_sweep_killed_while_it_overwrites_keeps_no_row_of_other_images(
    supernet, files, tmp_path, monkeypatch
):
    args = ["sweep", f"--workdir={supernet}", f"--out={tmp_path}", "--config.cuts=mlp"]
    args += [f"--config.data.source=tar:{files}/images.tar", "--config.kept=1/2"]
    assert main.main([*args, "--config.data.batch_size=16"]) == 0

    def killed(*args, **options):
        raise KeyboardInterrupt

    fewer = [*args, "--config.data.batch_size=16", "--config.data.images=10"]
    with monkeypatch.context() as patch:
        patch.setattr(sweeping, "run_sweep", killed)
        assert main.main([*fewer, "--overwrite"]) == main.INTERRUPTED
    assert main.main([*fewer, "--resume"]) == 0
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert {row["images"] for row in rows} == {10}


@pytest.mark.parametrize(("name", "heeded"), [("sweep", True), ("train", False)])
def test_of_several_processes_only_those_that_train_go_on_at_sigterm(
    monkeypatch, name, heeded
):
    found = []
    look = main.COMMANDS[name]._replace(
        run=lambda values: found.append(signal.getsignal(signal.SIGTERM))
    )
    monkeypatch.setitem(main.COMMANDS, name, look)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        assert main.main([name, "--workdir=x"]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [handler is signal.SIG_DFL for handler in found] == [heeded]


def test_extract_writes_the_largest_network_within_the_budget(
    supernet, files, batch, capsys
):
    out = files / "half"
    args = ["extract", f"--workdir={supernet}", f"--out={out}"]
    assert main.main([*args, "--budget=0.5"]) == 0
    assert "MACs (full count)" in capsys.readouterr().out
    modes = {file.stat().st_mode & 0o777 for file in out.iterdir()}
    assert len(modes) == 1  # whoever may read one file may read the other
    small, whole = checkpoint.load_subnet(out), checkpoint.load_supernet(supernet)
    level = small.provenance["level"]
    limit = macs.macs(whole.spec) / 2
    assert macs.macs(small.spec, small.widths) <= limit
    bigger = whole.dropout_list.widths(level - 1, whole.spec)
    assert macs.macs(whole.spec, bigger) > limit
    masked = ViT(whole.spec).apply(
        {"params": whole.params},
        batch["image"],
        flax_skd.masks(whole.spec, small.widths),
    )
    alone = ViT(small.spec, small.widths).apply(
        {"params": small.params}, batch["image"]
    )
    np.testing.assert_allclose(alone, masked, atol=1e-5)
    assert main.main([*args, "--params=12000"]) == 1
    assert "not empty" in capsys.readouterr().err
    assert main.main([*args, "--params=12000", "--overwrite"]) == 0
    small = checkpoint.load_subnet(out)
    assert macs.param_count(small.spec, small.widths) <= 12000


def test_a_profile_makes_budgets_in_time(supernet, files, capsys):
    profile, out = files / "profile", files / "quick"
    args = ["profile", f"--workdir={supernet}", f"--out={profile}"]
    args += ["--config.batch_size=1", "--config.rounds=1", "--config.shares=0.5"]
    args += ["--config.stairs=", "--config.levels=1"]
    extract = ["extract", f"--workdir={supernet}", f"--out={out}"]
    assert main.main([*extract, "--latency_ms=9"]) == 1
    assert "flax-skd profile" in capsys.readouterr().err
    assert main.main(args) == 0
    extract += [f"--profile={profile}"]
    assert main.main([*extract, "--latency_ms=1e6"]) == 0
    assert checkpoint.load_subnet(out).provenance["level"] == 0
    assert main.main([*extract, "--latency_ms=1e-9", "--overwrite"]) == 1
    assert main.main([*extract, "--images_per_s=1", "--batch_size=3"]) == 1
    assert "never profiled" in capsys.readouterr().err
    sweep = ["sweep", f"--workdir={supernet}", f"--out={files}/timed"]
    sweep += [f"--config.data.source=tar:{files}/images.tar", "--config.kept=1/2"]
    sweep += ["--config.data.batch_size=16", f"--config.profile={profile}"]
    assert main.main([*sweep, "--config.profile_batch=3"]) == 1
    assert "never profiled" in capsys.readouterr().err
    assert not (files / "timed").exists()  # before anything is measured
    assert main.main([*sweep, "--config.profile="]) == 0
    assert main.main([*sweep, "--resume"]) == 0  # of rows that are there
    assert (files / "timed" / "latency.png").stat().st_size > 1000


def test_convert_writes_our_format_and_timm_back_bit_for_bit(files, spec, params):
    args = ["convert", "--config.model.recipe=augreg"]
    source = f"--config.model.path={files}/tiny.safetensors"
    heads = "--config.model.fields.num_heads=2"
    assert main.main([*args, source, heads, f"--workdir={files}/network"]) == 0
    loaded = checkpoint.load_supernet(files / "network")
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(params)):
        np.testing.assert_array_equal(a, b)
    back = f"--workdir={files}/back.safetensors"
    assert main.main([*args, f"--config.model.path={files}/network", back]) == 0
    again = conversion.read(
        files / "back.safetensors", recipe="augreg", fields={"num_heads": 2}
    )
    for a, b in zip(jax.tree.leaves(again.params), jax.tree.leaves(params)):
        np.testing.assert_array_equal(a, b)


BAD = {
    "no command": (["shrink"], 2, "no command 'shrink'"),
    "unknown flag": (["extract", "--workdr=x"], 2, "workdr"),
    "unknown config key": (
        ["contract", "--workdir=x", "--config.data.sauce=y"],
        2,
        "no entry 'data.sauce'",
    ),
    "wrong type": (
        ["contract", "--workdir=x", "--config.list.levels=many"],
        2,
        "levels",
    ),
    "no workdir": (["contract"], 2, "--workdir is needed"),
    "surplus words": (["contract", "--workdir=x", "y"], 2, "surplus arguments"),
    "no config": (["train", "--workdir=x", "--config=no.py"], 2, "shipped with"),
    "half a run": (["train", "--workdir={tmp}/x", "--processes=2"], 1, "go together"),
    "no such process": (
        ["sweep", "--workdir=x", "--coordinator=h:1", "--processes=2", "--process=2"],
        1,
        "choose 0 to 1",
    ),
    "no network": (["contract", "--workdir={tmp}/x"], 1, "give --config.model.path"),
    "no budget": (["extract", "--workdir=x", "--out=y"], 1, "exactly one of --budget"),
    "two budgets": (
        ["extract", "--workdir=x", "--out=y", "--budget=.5", "--macs=9"],
        1,
        "exactly one of --budget",
    ),
    "budget above 1": (
        ["extract", "--workdir=x", "--out=y", "--budget=2"],
        1,
        "--budget is a share",
    ),
    "unreachable budget": (
        ["extract", "--workdir={files}/supernet", "--out={tmp}/y", "--budget=0.001"],
        1,
        "the smallest sub-network",
    ),
    "not a super-network": (
        ["extract", "--workdir={files}", "--out={tmp}/y", "--budget=0.5"],
        1,
        "not a super-network directory",
    ),
}


@pytest.mark.parametrize(("args", "status", "match"), BAD.values(), ids=BAD)
def test_a_bad_call_ends_with_one_clear_line(
    supernet, files, tmp_path, capsys, args, status, match
):
    args = [a.format(files=files, tmp=tmp_path) for a in args]
    assert main.main(args) == status
    error = capsys.readouterr().err
    assert match in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--config.data.images=41"], "41"),
        (["--config.cost=nice"], "cost 'nice': choose one of"),
        (["--config.criterion=best"], "criterion 'best': choose one of"),
        (["--config.dtype=float8"], "dtype 'float8': choose one of"),
        (["--config.model.fields.num_heads=5"], "5"),
        (["--config.data.source=zip:x"], "zip:x"),
    ],
)
def test_a_bad_config_value_says_what_is_allowed(files, tmp_path, capsys, more, match):
    assert main.main([*contract_args(files, tmp_path / "x"), *more]) == 1
    error = capsys.readouterr().err
    assert match in error and "Traceback" not in error
    assert not (tmp_path / "x").exists()


def test_a_converted_network_keeps_its_image_size(supernet, files, tmp_path, capsys):
    args = ["convert", f"--config.model.path={supernet}", f"--workdir={tmp_path}/x"]
    assert main.main([*args, "--config.model.image_size=32"]) == 1
    assert "holds a network for 16 pixels, not 32" in capsys.readouterr().err


def test_a_workdir_that_holds_a_run_is_found_before_the_long_pass(
    supernet, files, capsys
):
    before = (supernet / "supernet.json").read_bytes()
    assert main.main(contract_args(files, supernet)) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (supernet / "supernet.json").read_bytes() == before


def test_the_version_is_that_of_the_package(capsys):
    assert main.main(["--version"]) == 0
    assert f"flax-skd {flax_skd.__version__} (jax {jax.__version__}" in (
        capsys.readouterr().out
    )


def test_help_names_every_command_flag_and_config_entry(capsys):
    assert main.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}" in text for name in main.COMMANDS)
    for name, command in main.COMMANDS.items():
        assert main.main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert all(f"--{flag}" in text for flag in command.flags)
    assert main.main(["contract", "--help"]) == 0
    assert "--config.data.batch_size" in capsys.readouterr().out


VARIANTS = {
    "convert": "Ti/16",
    "sweep": None,
    "profile": None,
    "finetune": "imagenet",
    "training_base": "imagenet",
    "cifar10": "start",
    "ablation": "pretrained/macs",
    "base": "reduced",
}


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.py")), ids=lambda p: p.stem)
def test_help_lists_every_entry_of_every_shipped_config_with_its_value(path):
    default = "reduced" if path.parent.name == "rivals" else "S/16"
    variant = VARIANTS.get(path.stem, default)
    name = path.relative_to(CONFIGS.parent).as_posix()
    for asked in (name, f"{name}:{variant}") if variant else (name,):
        text = main.command_help("train", asked).partition("change one entry")[2]
        config = config_files.load(asked)
        lines = dict(re.findall(r"--config\.([\w.]+) = ?([^#\n]*)", text))
        assert len(lines) > 1 and text.count("--config.") == len(lines)
        for entry, told in lines.items():
            value = config
            for part in entry.split("."):
                value = value[part]
            assert not hasattr(value, "items")
            assert told.strip() == ("" if value is None else repr(value))
        assert sum(1 for _ in leaves(config)) == len(lines)


def leaves(config):
    for value in config.values():
        if hasattr(value, "items"):
            yield from leaves(value)
        else:
            yield value


def test_help_tells_what_the_file_says_beside_an_entry_and_nothing_of_its_base():
    told = main.command_help("train", "configs/ablation.py:piad")
    name = "--config.data.augment.name = 'shift_crop'"
    assert f"{name}  # deit | flip_crop | shift_crop | none" in told
    assert "--config.lr = 0.001\n" in told  # piad.py says 5e-4 * batch / 512


def test_what_uses_devices_may_run_in_several_processes():
    for name in ("train", "contract", "sweep"):
        assert {"coordinator", "processes", "process"} < set(main.COMMANDS[name].flags)
        values = main.parse(name, ["--workdir=x", "--coordinator=h:1", "--process=1"])
        assert (values.coordinator, values.process) == ("h:1", 1)
        assert values.processes is None and not values.distributed


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = config_files.load("configs/wpac.py:Ti/16")
    assert config.model.variant == "Ti/16"
    assert config_files.load("wpac.py").model.variant == ""


def test_every_shipped_config_names_a_network_or_data_it_can_build():
    big = config_files.load("configs/scratch.py:S/16")
    assert macs.param_count(training.spec_of(big.model)) == 22_050_664
    small = training.spec_of(config_files.load("configs/scratch.py").model)
    assert small.in_channels == 1 and SubnetSpec.full(small).check(small)


TRAIN = ["train", "--config.epochs=1", "--config.warmup_epochs=0"]
TRAIN += ["--config.evaluate_epochs=1", "--config.checkpoint_every=10"]


def test_train_learns_digits_saves_the_network_and_protects_it(tmp_path, capsys):
    args = [*TRAIN, f"--workdir={tmp_path}/run", "--config.accumulate=2"]
    assert main.main(args) == 0
    assert re.search(r"ema_top1 \d+\.\d+ %", capsys.readouterr().out)
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    told = {name for row in map(json.loads, log) for name in row}
    assert {"loss", "accuracy", "images_per_s", "lr", "seconds_left"} <= told
    network = checkpoint.load_supernet(tmp_path / "run" / training.NETWORK)
    assert network.spec.num_classes == 10 and int(network.dropout_list.levels) == 0
    assert main.main(args) == 1
    assert "--resume" in capsys.readouterr().err
    assert main.main([*args, "--resume", "--config.lr=0.5"]) == 1
    assert "lr" in capsys.readouterr().err


def test_the_whole_recipe_trains_and_smooths_once(tmp_path, capsys):
    recipe = ["--config.mixing.mixup=0.8", "--config.mixing.cutmix=1.0"]
    recipe += ["--config.mixing.erase=0.25", "--config.data.augment.name=deit"]
    recipe += ["--config.data.repeats=3", "--config.drop_path=0.1"]
    assert main.main([*TRAIN, *recipe, f"--workdir={tmp_path}/run"]) == 0
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    losses = [row["loss"] for row in map(json.loads, log) if "loss" in row]
    assert losses and all(0 < value < 5 for value in losses)
    # Mixed targets are smooth already: the loss itself must not smooth again.
    config = config_files.load("configs/scratch.py")
    assert configured_loss.smoothing_of(config) == 0.1
    config.mixing.cutmix = 1.0
    assert configured_loss.smoothing_of(config) == 0.0
    assert configured_loss._mixing(config).smoothing == 0.1


def test_transfer_gives_a_trained_network_a_fresh_head(files, params, tmp_path, capsys):
    args = [
        "train",
        "--config=configs/transfer.py",
        f"--config.model.path={files}/tiny.safetensors",
        "--config.model.recipe=augreg",
        "--config.model.fields.num_heads=2",
        "--config.model.image_size=24",
        "--config.model.num_classes=7",
        f"--config.data.source=tar:{files}/images.tar",
        "--config.data.batch_size=16",
        "--config.epochs=1",
        *("--config.lr=1e-9", "--config.min_lr=0.0"),
        "--config.warmup_epochs=0",
        f"--workdir={tmp_path}/run",
    ]
    assert main.main(args) == 0
    network = checkpoint.load_supernet(tmp_path / "run" / training.NETWORK)
    assert network.spec.image_size == 24 and network.spec.num_classes == 7
    assert network.params["head"]["kernel"].shape == (24, 7)
    assert np.abs(network.params["head"]["kernel"]).max() < 1e-6
    kept, old = (t["block_1"]["mlp"]["fc1"]["kernel"] for t in (network.params, params))
    np.testing.assert_allclose(kept, old, atol=1e-6)
    assert network.provenance["source"]["file"] == "tiny.safetensors"


def test_a_bad_program_or_start_says_what_is_needed(supernet, files, tmp_path, capsys):
    piad = ["train", "--config=configs/piad.py", f"--workdir={tmp_path}/run"]
    start = f"--config.model.path={supernet}"
    for more, match in (
        ([], "give --config.model.path, of contract for piad"),
        ([f"--config.model.path={files}"], "not a super-network directory"),
        (
            [start, "--config.program=prune"],
            "choose scratch, transfer, piad or finetune",
        ),
        ([start, "--config.piad.loss=nice"], "loss 'nice': choose one of labels"),
        ([start, "--config.piad.draw=odd"], "draw 'odd': choose one of uniform"),
        ([start, "--config.piad.loss=teacher"], "--config.piad.teacher"),
        ([start, "--config.weights=best"], "weights 'best': choose ema or raw"),
    ):
        assert main.main([*piad, *more]) == 1
        error = capsys.readouterr().err
        assert match in error and "Traceback" not in error
    assert main.main([*piad, "--config=configs/piad.py:L/16"]) == 2
    assert "no recipe for 'L/16'" in capsys.readouterr().err


def test_the_readme_leads_with_the_two_commands_and_ci_runs_the_second():
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", readme, re.DOTALL)
    assert blocks[0].split("\n")[0] == "pip install . && flax-skd demo"
    assert "pip install '.[test]' && pytest" in blocks[1]
    assert "pip install '.[test]' && pytest" in (ROOT / ".ci" / "run").read_text()


def test_the_python_of_the_readme_runs(supernet, files, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    code, served = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(code.strip().splitlines()) <= 13
    monkeypatch.chdir(files)
    # The tiny network instead of the real one; its tar has labels of its own.
    code = code.replace("vit_tiny.safetensors", "tiny.safetensors")
    code = code.replace('variant="Ti/16"', 'fields={"num_heads": 2}')
    code = code.replace('"tar:calibration.tar", labels="sorted"', '"tar:images.tar"')
    names = {}
    exec(code, names)  # noqa: S102, our own README
    spec, widths = names["net"].spec, names["widths"]
    assert names["logits"].shape == (50, spec.num_classes)
    assert macs.macs(spec, widths) <= 0.75 * macs.macs(spec)
    page = (ROOT / "docs" / "latency.md").read_text()
    assert f"```python\nimport flax_skd as skd\n\n{served}```" in page  # runs here too
    # Of the profile there is a test above.
    served = served.replace(', profile="profile"', "")
    served = re.sub(r"family.use\(latency_ms.*\n", "", served)
    names["images"] = names["batch"]["image"]
    exec(served, names)  # noqa: S102
    assert names["family"].level == 12
    assert names["logits"].shape == (50, spec.num_classes)


def test_resuming_on_another_dataset_is_refused(tmp_path, capsys):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 8, 8, 1)).astype(np.uint8)
    file = tmp_path / "data.npz"
    args = ["train", "--config=configs/scratch.py", f"--workdir={tmp_path}/run"]
    args += [f"--config.data.source=npz:{file}", "--config.data.eval_source="]
    args += ["--config.data.batch_size=8", "--config.epochs=0.5"]
    args += ["--config.warmup_epochs=0.0"]
    args += ["--config.model.depth=1", "--config.model.width=16"]
    np.savez(file, images=images, labels=np.arange(16) % 10)
    assert main.main(args) == 0
    np.savez(file, images=images[::-1], labels=np.arange(16) % 10)
    assert main.main([*args, "--resume"]) == 1
    told = capsys.readouterr().err
    assert "dataset" in told and told.count("16 images, ") == 2


def test_a_bad_validation_image_is_skipped_if_bad_images_are(tmp_path, capsys):
    for part, number in (("train", 8), ("test", 3)):
        for label in ("ant", "bee"):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(number):
                (tmp_path / part / label / f"{i}.png").write_bytes(encoded(20 * i))
    (tmp_path / "test" / "bee" / "0.png").write_bytes(b"words")
    args = ["train", "--config=configs/scratch.py", f"--workdir={tmp_path}/run"]
    args += [f"--config.data.source=folder:{tmp_path}/train"]
    args += [f"--config.data.eval_source=folder:{tmp_path}/test"]
    args += ["--config.data.batch_size=8", "--config.epochs=0.5"]
    args += ["--config.warmup_epochs=0.0", "--config.model.num_classes=2"]
    args += ["--config.model.depth=1", "--config.model.width=16"]
    assert main.main(args) == 1
    told = capsys.readouterr().err
    assert "bee/0.png does not decode" in told and "on_bad_image=skip" in told
    assert main.main([*args, "--overwrite", "--config.data.on_bad_image=skip"]) == 0
    assert "_top1 " in capsys.readouterr().out
