"""The whole method in one command, on scikit-learn's handwritten digits."""

import pathlib
import shutil
import sys

import jax
import numpy as np

from flax_skd.io import checkpoint, data, sources
from flax_skd.io.checkpoint import SuperNet
from flax_skd.method import contraction, macs, piad, subnet
from flax_skd.method.vit import ViT
from flax_skd.run import commands, config_files, report, training

CRITERIA = ("wpac", "taylor1", "pca")
EIGHTHS = ",".join(f"{i}/8" for i in range(1, 9))
PARTS = ("train", "supernet", "subnet", "sweep.json", "sweep.csv", "sweep.png")


def run(folder: str, *, overwrite: bool = False, fast: bool = False) -> str:
    """Trains, contracts, sweeps, extracts, saves, reloads and checks.

    Args:
      folder: where everything is left; new unless `overwrite`.
      overwrite: delete the demo that is there.
      fast: train a third as long.

    Returns:
      The table and where things lie.

    Raises:
      ValueError: if the folder holds something and `overwrite` is not given.
      RuntimeError: if the reloaded sub-network is not the super-network's level.
    """
    path = _fresh(folder, overwrite)
    config = config_files.load("configs/scratch.py")
    config.epochs = config.epochs // 3 if fast else config.epochs
    _say("1/4  training a small ViT on 1,347 handwritten digits ...")
    _say(
        training.train(
            config, workdir=str(path / "train"), overwrite=False, resume=False
        )
    )
    trained = checkpoint.load_supernet(path / "train" / training.NETWORK)

    _say("2/4  WPAC: rotating every head, what matters first ...")
    networks = contracted(trained)
    supernet = trained._replace(
        params=networks["wpac"], dropout_list=piad.uniform(trained.spec)
    )
    facts = {"criterion": "wpac", "trained_on": config.data.source}
    supernet = commands.stamped(supernet, facts)
    checkpoint.save_supernet(path / "supernet", supernet)

    _say("3/4  every size, as it comes and after contraction ...")
    test = sources.open_source("digits:test", num_classes=trained.spec.num_classes)
    batches = data.eval_batches(test, trained.spec, batch_size=batch_size())
    cuts = commands.cuts_of(supernet, "all", EIGHTHS)
    rows = commands.run_sweep(networks, ViT(trained.spec), batches, cuts)
    report.write(path, rows, title="Handwritten digits: a ViT cut to size, untrained")

    _say("4/4  the half-size network: extract, save, reload, compare ...")
    worst, small = _half_size(supernet, path / "subnet", next(iter(batches))["image"])
    share = macs.macs(small.spec, small.widths) / macs.macs(small.spec)
    return f"""
{report.pivot(rows)}

Top-1 in %, {batches.num_examples} test images; kept is the share of the block MACs.
Half-size network reloaded from disk: {share:.0%} of all MACs, logits equal to the
super-network's at that level to {worst:.0e}.

{path}/supernet   the super-network: every size in one
{path}/subnet     the half-size network on its own
{path}/sweep.png  accuracy against MACs (and sweep.csv, sweep.json)"""


def batch_size() -> int:
    """Of evaluation: 75 divides the 450 test images, rounded up to the devices."""
    devices = jax.device_count()
    return -(-75 // devices) * devices


def contracted(trained: SuperNet) -> dict[str, dict]:
    """The trained parameters under each criterion, and as they came."""
    train = sources.open_source("digits:train", num_classes=trained.spec.num_classes)
    calibration = sources.take(train, 1024)
    stats = commands.calibrate(
        trained,
        data.eval_batches(calibration, trained.spec, batch_size=64),
        cost="logit",
        dtype=commands.dtype_named("float32"),
        weightings=("plain", "taylor"),
    )
    networks = {
        name: contraction.contract(trained.params, trained.spec, stats, criterion=name)
        for name in CRITERIA
    }
    return {**networks, "none": trained.params}


def _half_size(supernet: SuperNet, target: pathlib.Path, images: np.ndarray):
    """Extracts at half the block MACs; largest logit difference after a reload."""
    spec = supernet.spec
    level = int(supernet.dropout_list.levels + 1) // 2
    widths = supernet.dropout_list.widths(level, spec)
    params = subnet.extract(supernet.params, widths)
    facts = {"level": level, "supernet": supernet.provenance}
    checkpoint.save_subnet(target, checkpoint.SubNet(params, spec, widths, facts))
    small = checkpoint.load_subnet(target)
    alone = ViT(small.spec, small.widths).apply({"params": small.params}, images)
    masked = ViT(spec).apply(
        {"params": supernet.params}, images, subnet.masks(spec, widths)
    )
    worst = float(np.abs(np.asarray(alone) - np.asarray(masked)).max())
    if not worst < 1e-4:
        raise RuntimeError(
            f"the reloaded sub-network differs from the super-network by {worst:.1e}."
        )
    return worst, small


def _fresh(folder: str, overwrite: bool) -> pathlib.Path:
    path = pathlib.Path(folder)
    there = sorted(p.name for p in path.iterdir()) if path.is_dir() else []
    if (there and not overwrite) or (path.exists() and not path.is_dir()):
        raise ValueError(
            f"{path} is not empty: pass --overwrite to replace it, or --out=DIR."
        )
    for name in PARTS:  # what a demo leaves, and nothing else
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)
    path.mkdir(parents=True, exist_ok=True)
    return path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
