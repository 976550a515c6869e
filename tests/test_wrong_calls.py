"""What a user gets wrong is refused at once, before any work, and says what to do."""

import re
import signal

import jax
import pytest
from test_train import Halt, batches, run

from flax_skd.io import checkpoint
from flax_skd.method import piad, vit
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.run import config_files, main, programs, train

TRAIN = ["train", "--config.epochs=1.0", "--config.warmup_epochs=0.0"]
DIGITS = ViTSpec(
    image_size=8,
    patch_size=2,
    width=8,
    depth=1,
    num_heads=1,
    mlp_dim=8,
    num_classes=10,
    in_channels=1,
    mean=(0.5,),
    std=(0.5,),
)


@pytest.fixture
def network(tmp_path):
    """A super-network of digits, as `contract` would write one."""
    levels = piad.from_rows([SubnetSpec.full(DIGITS)], DIGITS)
    params = vit.init(DIGITS, jax.random.key(0))
    found = checkpoint.Supernet(params, DIGITS, levels, {"criterion": "wpac"})
    checkpoint.save_supernet(tmp_path / "supernet", found)
    return tmp_path / "supernet"


def refused(arguments, capsys):
    """The error line of a command that does nothing else."""
    assert main.main(arguments) in (1, 2)
    out, err = capsys.readouterr()
    assert not out
    return err


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("epochs=-3.0", "epochs = -3.0 must be a number above 0"),
        ("epochs=inf", "epochs = inf must be a number above 0"),
        ("epochs=nan", "epochs = nan must be a number above 0"),
        ("evaluate_epochs=inf", "evaluate_epochs = inf"),
        ("clip_norm=-1.0", "clip_norm = -1.0 must be a number 0 or more"),
        ("ema_decay=nan", "ema_decay = nan must be 0 to 1"),
        ("weight_decay=-0.1", "weight_decay = -0.1"),
    ],
)
def test_numbers_that_would_train_to_nothing(tmp_path, capsys, entry, words):
    told = refused([*TRAIN, f"--workdir={tmp_path}/run", f"--config.{entry}"], capsys)
    assert words in told and not (tmp_path / "run").exists()


@pytest.mark.parametrize("classes", [0, 1])
def test_fewer_than_two_classes_are_not_trained(network, tmp_path, capsys, classes):
    model = f"--config.model.num_classes={classes}"
    for start in (
        (),
        ("--config=configs/transfer.py", f"--config.model.path={network}"),
    ):
        source = "--config.data.source=digits:train"
        args = ["train", *start, model, source, f"--workdir={tmp_path}/run"]
        assert f"num_classes = {classes}: training tells" in refused(args, capsys)
    assert not (tmp_path / "run").exists()


def test_right_classes_are_not_counted_without_a_head(network, tmp_path, capsys):
    found = checkpoint.load_supernet(network)
    body = {k: v for k, v in found.params.items() if k != "head"}
    bare = found._replace(params=body, spec=DIGITS.replace(num_classes=0))
    checkpoint.save_supernet(tmp_path / "bare", bare)
    args = ["sweep", f"--workdir={tmp_path}/bare", "--config.data.source=digits:test"]
    assert "has no head, and a sweep counts" in refused(args, capsys)


@pytest.mark.parametrize("name", ["sweep", "training_base", "rivals/base"])
def test_a_config_that_trains_nothing(name, tmp_path, capsys):
    args = ["train", f"--config=configs/{name}.py", f"--workdir={tmp_path}/run"]
    assert "trains nothing: take one with a `program`" in refused(args, capsys)


def test_a_network_that_no_run_here_wrote_is_not_replaced(network, tmp_path, capsys):
    there = (tmp_path / "network").absolute()
    network.rename(there)
    before = (there / "supernet.json").read_bytes()
    told = refused([*TRAIN, f"--workdir={tmp_path}"], capsys)
    assert f"{there} is not empty" in told and "another workdir" in told
    assert (there / "supernet.json").read_bytes() == before
    # With --overwrite a network is replaced, and nothing else: said before the run too.
    (there / "notes.txt").write_text("dear to its owner")
    told = refused([*TRAIN, f"--workdir={tmp_path}", "--overwrite"], capsys)
    assert "notes.txt" in told and sorted(p.name for p in tmp_path.iterdir()) == [
        "network"
    ]


def test_a_list_that_a_run_would_not_finish(network, tmp_path, capsys):
    args = [*TRAIN, "--config=configs/piad.py", f"--config.model.path={network}"]
    args += [f"--workdir={tmp_path}/run"]
    told = refused([*args, "--config.piad.progressive_epochs=50.0"], capsys)
    assert re.search(r"50 stages begin .* and the run has 21", told)
    told = refused([*args, "--config.piad.progressive_epochs=-5.0"], capsys)
    assert "piad.progressive_epochs = -5.0 must be above 0" in told
    told = refused([*args, "--config.piad.share=0.99"], capsys)
    assert "cannot be reached: removing every branch saves at most" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": "in_place", "draw": "macs"}, "not with {'draw': 'macs'}"),
        ({"loss": "sandwich", "sampling": "per_example"}, "'sampling': 'per_example'"),
        ({"loss": "in_place", "drop_path": 0.1}, "drop_path = 0.1 goes with the loss"),
        ({"loss": "teacher", "drop_path": 0.1}, "drop_path = 0.1 goes with the loss"),
    ],
)
def test_an_option_that_a_loss_would_not_look_at(network, changes, words):
    config = config_files.load("configs/piad.py")
    config.drop_path = changes.pop("drop_path", 0.0)
    config.piad.update(changes)
    config.piad.teacher = str(network) if changes["loss"] == "teacher" else ""
    with pytest.raises(ValueError, match=re.escape(words)):
        programs.piad_program(config, checkpoint.load_supernet(network))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("list.images=0", "list.images = 0 must be at least 1"),
        ("list.levels=0", "list.levels = 0 must be at least 1"),
        ("list.stages=0", "list.stages = 0 must be at least 1"),
        ("list.cuts=0.0", "list.cuts = 0.0 must be above 0"),
        ("compensation_dtype=foo", "dtype 'foo': choose one of"),
    ],
)
def test_a_contraction_that_would_end_without_its_list(tmp_path, capsys, entry, words):
    # There is no network and there are no images: nothing was read before the refusal.
    args = ["contract", f"--workdir={tmp_path}/new", f"--config.{entry}"]
    assert words in refused(args, capsys)


@pytest.mark.parametrize("flag", ["macs=inf", "params=nan", "budget=-1", "budget=inf"])
def test_a_budget_that_is_no_number(network, tmp_path, capsys, flag):
    args = ["extract", f"--workdir={network}", f"--out={tmp_path}/small", f"--{flag}"]
    assert "must be a number above 0" in refused(args, capsys)


def test_a_slash_after_a_folder_changes_nothing(network, capsys):
    args = ["extract", f"--workdir={network}/", f"--out={network.parent}/small/"]
    assert main.main([*args, "--budget=1.0"]) == 0
    assert capsys.readouterr().out.startswith(f"wrote {network.parent}/small: level 0")


def test_a_mistyped_entry_gets_a_hint(tmp_path, capsys):
    args = ["train", f"--workdir={tmp_path}/run", "--config.data.batchsize=3"]
    told = refused(args, capsys)
    assert "no entry 'data.batchsize' in configs/scratch.py; flax-skd train" in told
    told = refused([*args, "--config=configs/piad.py:S/16"], capsys)
    assert "flax-skd train --config=configs/piad.py:S/16 --help lists them" in told
    assert 'Did you mean "batch_size"' in told and "\\" not in told


def test_help_lists_the_entries_of_the_config_that_is_named(capsys):
    assert main.main(["train", "--help", "--config=configs/piad.py:S/16"]) == 0
    assert "--config.piad.progressive_epochs = 50.0" in capsys.readouterr().out
    assert "no config file 'nowhere.py'" in refused(
        ["train", "--help", "--config=nowhere.py"], capsys
    )


def test_a_start_that_fails_leaves_the_workdir_free(tmp_path, capsys):
    args = [*TRAIN, f"--workdir={tmp_path}/run", "--config.data.eval_source="]
    assert "does not divide" in refused([*args, "--config.accumulate=3"], capsys)
    assert not [*(tmp_path / "run").glob("checkpoints*")]


# Ctrl-C.


@pytest.fixture
def pythons_own_handler():
    """Of Ctrl-C, whatever was left there by what ran before in this process."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, found)


def test_the_first_interrupt_saves_and_the_second_ends_at_once(
    tmp_path, caplog, pythons_own_handler
):
    def once():
        signal.raise_signal(signal.SIGINT)

    def twice():
        once()
        once()

    with pytest.raises(train.Stopped, match="step 3 of 8.*--resume"):
        run(Halt(batches(), 3, once), workdir=tmp_path / "one")
    assert "Ctrl-C again ends at once" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        run(Halt(batches(), 3, twice), workdir=tmp_path / "two")
    assert signal.getsignal(signal.SIGINT) is pythons_own_handler


def test_a_job_in_the_background_goes_on_ignoring_interrupts(
    tmp_path, pythons_own_handler
):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts it
    done = run(
        Halt(batches(), 3, lambda: signal.raise_signal(signal.SIGINT)),
        workdir=tmp_path / "run",
    )
    assert int(done.step) == 8
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_interrupt_elsewhere_is_one_line(monkeypatch, capsys, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("flax_skd.run.commands.load_network", interrupted)
    assert main.main(["contract", f"--workdir={tmp_path}/new"]) == main.INTERRUPTED
    assert capsys.readouterr().err == "flax-skd contract: interrupted.\n"
