"""The whole method in one command, on scikit-learn's handwritten digits."""

import functools
import pathlib
import shutil
import sys

import jax
import numpy as np

from flax_skd.io import checkpoint, data, sources
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import compensation, macs, piad, subnet
from flax_skd.method.contraction import CRITERIA
from flax_skd.method.vit import ViT
from flax_skd.run import (
    commands,
    config_files,
    evaluate,
    recipes,
    report,
    sweeping,
    training,
)
from flax_skd.run.interrupt import Stopped
from flax_skd.run.recipes import Recipe

# As of configs/balanced.py, and plain criteria beside it.
RECIPES = {
    "balanced": Recipe(CRITERIA["balanced"], "greedy", "least_squares"),
    **{name: Recipe(CRITERIA[name]) for name in ("wpac", "taylor1", "pca")},
}
START = "balanced"
EIGHTHS = tuple(i / 8 for i in range(1, 9))
PARTS = ("train", "contracted", "piad", "subnet", "finetune", "supernet")
FILES = ("sweep.json", "sweep.csv", "sweep.png", "list.png")
MARKER = "flax_skd_demo.txt"  # written first, so that a demo that stopped has it too


def run(
    folder: str,
    *,
    overwrite: bool = False,
    fast: bool = False,
    seed: int = 0,
    start: str = START,
) -> str:
    """Trains, contracts, trains every size, sweeps, extracts, reloads, fine-tunes.

    Args:
      folder: where everything is left; new unless `overwrite`.
      overwrite: delete the demo that is there; what else is there is left.
      fast: train a third as long.
      seed: of all three trainings.
      start: key of `RECIPES`, whose network PIAD trains.

    Returns:
      The table and where things lie.

    Raises:
      ValueError: if the folder holds something and `overwrite` is not given, or
        something and no demo.
      RuntimeError: if the reloaded sub-network is not the super-network's level.
    """
    path = _fresh(folder, overwrite)
    train = functools.partial(_train, path, fast=fast, seed=seed)
    _say("1/6  training a small ViT on 1,347 handwritten digits ...")
    train("scratch", "train")
    trained = checkpoint.load_supernet(path / "train" / training.NETWORK)

    _say("2/6  closed forms: in every head and MLP, what matters first ...")
    networks = contracted(trained)
    first = networks[start]._replace(dropout_list=piad.uniform(trained.spec))
    first = commands.stamped(first, {"criterion": start, "trained_on": "digits:train"})
    checkpoint.save_supernet(path / "contracted", first)

    _say("3/6  PIAD: training so that every prefix is a good network ...")
    train("piad", "piad", start="contracted")
    supernet = checkpoint.load_supernet(path / "piad" / training.NETWORK)
    checkpoint.save_supernet(path / "supernet", supernet)

    _say("4/6  every size: as it comes, after closed forms, after PIAD ...")
    test = sources.open_source("digits:test", num_classes=trained.spec.num_classes)
    batches = data.eval_batches(test, trained.spec, batch_size=batch_size())
    rows = _sweep(networks, supernet, batches)
    report.write(path, rows, title="Handwritten digits: one ViT, every size")
    title = "What each block keeps, level by level"
    heat = report.list_figure(supernet.dropout_list, supernet.spec, title=title)
    heat.savefig(path / "list.png", dpi=150)

    _say("5/6  the half-size network: extract, save, reload, compare ...")
    worst, small = _half_size(supernet, path / "subnet", next(iter(batches))["image"])
    _say("6/6  fine-tuning the half-size network ...")
    tuned = train("finetune", "finetune", start="subnet")
    share = macs.macs(small.spec, small.widths) / macs.macs(small.spec)
    return f"""
{report.pivot(rows)}

Top-1 in %, {batches.num_examples} test images; kept is the share of the block MACs. "none" is
the network as trained, "wpac" the paper's rotation, "balanced" our closed forms; only
"piad" trains anything after the cut.
Half-size network reloaded from disk: {share:.0%} of all MACs, logits equal to the
super-network's at that level to {worst:.0e}. Fine-tuned: {tuned}.

{path}/supernet          the super-network: every size in one
{path}/subnet            the half-size network on its own
{path}/finetune/network  the same, fine-tuned
{path}/sweep.png         accuracy against MACs (and sweep.csv, sweep.json)
{path}/list.png          which block gave up what, level by level"""


def _train(path: pathlib.Path, program: str, name: str, *, fast, seed, start=""):
    """Runs a shipped config in a folder of the demo; returns its scores in words."""
    config = config_files.load(f"configs/{program}.py")
    config.seed = seed
    config.epochs = config.epochs // 3 if fast else config.epochs
    if start:
        config.model.path = str(path / start)
    workdir = str(path / name)
    try:
        done = training.train(config, workdir=workdir, overwrite=False, resume=False)
    except Stopped as error:  # a demo is short: it starts again
        again = f"stopped; to start anew: flax-skd demo --out={path} --overwrite"
        raise Stopped(again) from error
    _say(done)
    return done.partition("steps, ")[2]


def _sweep(networks: dict, supernet: Supernet, batches: data.EvalBatches):
    """Rows of uniform cuts of every criterion, and of the levels PIAD learnt."""
    spec, model = supernet.spec, ViT(supernet.spec)
    ends, full = macs.prices(spec).embed_and_head, macs.macs(spec)
    uniform = [evaluate.fixed_cut(spec, "all", share) for share in EIGHTHS]
    levels, learnt = supernet.dropout_list, []
    smallest = macs.macs(spec, levels.widths(int(levels.levels), spec))
    for share in EIGHTHS:
        limit = int(ends + share * (full - ends))
        if limit >= smallest:  # the list ends where growth did
            level = piad.level_for(levels, spec, limit)
            cut = evaluate.list_cut(spec, levels, level)
            learnt.append(cut._replace(kept=share))
    rows = sweeping.run_sweep({"piad": supernet}, model, batches, learnt)
    return rows + sweeping.run_sweep(networks, model, batches, uniform)


def batch_size() -> int:
    """Of evaluation: 75 divides the 450 test images, rounded up to the devices."""
    devices = jax.device_count()
    return -(-75 // devices) * devices


def contracted(trained: Supernet) -> dict[str, Supernet]:
    """The trained network under each recipe, and as it came."""
    train = sources.open_source("digits:train", num_classes=trained.spec.num_classes)
    calibration = sources.take(train, 1024)
    stats = commands.calibrate(
        trained,
        data.eval_batches(calibration, trained.spec, batch_size=64),
        cost="logit",
        dtype=commands.dtype_named("float32"),
        **recipes.sums_for(RECIPES.values()),
    )
    networks = {
        name: recipes.contracted(trained, stats, recipe)
        for name, recipe in RECIPES.items()
    }
    return {**networks, "none": trained}


def _half_size(supernet: Supernet, target: pathlib.Path, images: np.ndarray):
    """Extracts at half the block MACs; largest logit difference after a reload."""
    spec = supernet.spec
    ends, full = macs.prices(spec).embed_and_head, macs.macs(spec)
    half = (ends + full) // 2
    small, level = commands.subnet_within(supernet, cost=macs.macs, limit=half)
    facts = {"level": level, "supernet": supernet.provenance}
    checkpoint.save_subnet(target, small._replace(provenance=facts))
    small = checkpoint.load_subnet(target)
    widths = small.widths
    whole = compensation.repaired(supernet.params, spec, supernet.compensation, widths)
    apart, masked = jax.jit(ViT(spec, widths).apply), jax.jit(ViT(spec).apply)
    alone = apart({"params": small.params}, images)
    within = masked({"params": whole}, images, subnet.masks(spec, widths))
    worst = float(np.abs(np.asarray(alone) - np.asarray(within)).max())
    if not worst < 1e-4:
        raise RuntimeError(
            f"the reloaded sub-network differs from the super-network by {worst:.1e}."
        )
    return worst, small


def _fresh(folder: str, overwrite: bool) -> pathlib.Path:
    """The folder, marked as a demo's and without what an earlier demo left there.

    `train` or `supernet` may be somebody's own: they go only where a demo made them.
    """
    path = pathlib.Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder by --out=DIR.")
    there = {p.name for p in path.iterdir()} if path.is_dir() else set()
    # An earlier version's demo has no marker; whole, it has all of these.
    if there and MARKER not in there and not {*PARTS, *FILES} <= there:
        raise ValueError(
            f"{path} is not empty and holds no {MARKER}, which every demo leaves: "
            "--overwrite replaces a demo and nothing else. Name a new folder by "
            "--out=DIR."
        )
    if there and not overwrite:
        raise ValueError(
            f"{path} is not empty: pass --overwrite to replace it, or --out=DIR."
        )
    path.mkdir(parents=True, exist_ok=True)
    written = ", ".join((*PARTS, *FILES))
    (path / MARKER).write_text(
        f"A demo of flax-skd lies here. With --overwrite the next one deletes {written}.\n"
    )
    for name in (*PARTS, *FILES):
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)
    return path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
