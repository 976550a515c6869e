"""The ablation of PIAD, and networks trained alone, in a reduced CIFAR-10 setting.

    python benchmarks/ablation.py --data=$FLAX_SKD_DATA/cifar10_jpeg.npz --work=DIR \
        [--seeds=2] [--variants=piad,layer_drop] [--alone=4/12,8/12] [--out=DIR]

Of `configs/ablation.py`. Every variant starts from the same contracted network and
trains as long; all are cut by the list that PIAD learnt from that start. A run whose
network lies in --work already is not repeated, so that an interrupted benchmark goes on.
With `--start=docs/networks/cifar10_ti16_64px --alone=` the network is a pre-trained one.
"""

import argparse
import fractions
import logging
import pathlib
import statistics

import tables

from flax_skd.io import checkpoint, data, sources
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import macs, piad
from flax_skd.method.vit import ViT
from flax_skd.run import (
    commands,
    config_files,
    contracting,
    evaluate,
    sweeping,
    training,
)

BUDGETS = ("4/12", "6/12", "8/12", "10/12")
SIZES = ("full", *BUDGETS)
VARIANTS = (
    *("random_truncation", "channel_dropout", "weighted_channel_dropout"),
    *("layer_drop", "piad", "piad_without_wpac", "in_place", "per_example"),
    *("sandwich", "macs", "piad_balanced"),
)
# Cut by the list they learnt themselves as well.
OWN_LIST = (
    *("piad_without_wpac", "in_place", "sandwich", "macs", "per_example"),
    "piad_balanced",
)
Scores = dict[str, float]


class Bench:
    """One seed: its directory, its data, and runs that are not repeated."""

    def __init__(self, args: argparse.Namespace, seed: int):
        self.work, self.seed = pathlib.Path(args.work) / f"seed_{seed}", seed
        self.train, self.test = f"npz:{args.data}:train", f"npz:{args.data}:test"
        self.start, self.test_images = args.start, args.test_images

    def started(self) -> pathlib.Path:
        """The network all variants start from: given, or trained from scratch."""
        return pathlib.Path(self.start or self.trained("start", "start"))

    def trained(self, name: str, variant: str, start: str = "") -> pathlib.Path:
        """The directory of a trained network."""
        target = self.work / name
        if not (target / training.NETWORK).is_dir():
            setting = "pretrained/" if self.start else ""
            config = config_files.load(f"configs/ablation.py:{setting}{variant}")
            config.seed = self.seed
            config.data.source, config.data.eval_source = self.train, ""
            if start:
                config.model.path = start
            training.train(config, workdir=str(target), overwrite=True, resume=False)
        return target / training.NETWORK

    def contracted(self, method: str = "wpac") -> pathlib.Path:
        """The trained start under `configs/METHOD.py`, by 1,024 of its images."""
        target = self.work / method
        if not target.is_dir():
            config = config_files.load(f"configs/{method}.py")
            config.model.path = str(self.started())
            config.data.source, config.seed = self.train, self.seed
            contracting.contract(config, workdir=str(target), overwrite=True)
        return target

    def supernet(self, variant: str) -> Supernet:
        """What a variant of the ablation trained."""
        name, start = variant, self.contracted()
        if variant == "piad_without_wpac":
            name, start = "piad", self.started()
        elif variant == "piad_balanced":
            name, start = "piad", self.contracted("balanced")
        return checkpoint.load_supernet(self.trained(variant, name, str(start)))

    def scores(self, network: Supernet, levels: piad.DropoutList) -> Scores:
        """Top-1 at the budgets, cut by a list."""
        cuts = sweeping.cuts_of(
            network._replace(dropout_list=levels), "budgets", ",".join(BUDGETS)
        )
        rows = evaluate.evaluate(
            ViT(network.spec),
            network.params,
            self._test_batches(network.spec),
            [cut.widths for cut in cuts],
            repairs=network.compensation,
        )
        return dict(zip(SIZES, [row.top1 for row in rows], strict=True))

    def alone(self, kind: str, budget: str, levels: piad.DropoutList) -> Scores:
        """Top-1 of one size trained on its own, with new weights."""
        name = f"alone_{kind}_{budget.replace('/', '_')}"
        start = checkpoint.load_supernet(self.started())
        share = float(fractions.Fraction(budget))
        small, _ = commands.subnet_within(
            start._replace(dropout_list=levels), cost=macs.macs, limit=share
        )
        checkpoint.save_subnet(self.work / f"{name}_cut", small, overwrite=True)
        network = checkpoint.load_subnet(
            self.trained(name, "alone", str(self.work / f"{name}_cut"))
        )
        (row,) = evaluate.evaluate(
            ViT(network.spec, network.widths),
            network.params,
            self._test_batches(network.spec),
            [None],
        )
        return {budget: row.top1}

    def _test_batches(self, spec):
        source = sources.open_source(self.test, num_classes=spec.num_classes)
        if self.test_images:
            source = sources.take(source, self.test_images)
        return data.eval_batches(source, spec, batch_size=500)


def of_seed(bench: Bench, variants: list[str], alone: list[str]) -> dict[str, Scores]:
    """Everything of one seed: row -> size -> top-1."""
    found, supernets = {}, {}
    supernets["wpac, nothing trained"] = checkpoint.load_supernet(bench.contracted())
    if "piad_balanced" in variants:
        balanced = checkpoint.load_supernet(bench.contracted("balanced"))
        supernets["balanced, nothing trained"] = balanced
    levels = bench.supernet("piad").dropout_list
    supernets |= {variant: bench.supernet(variant) for variant in variants}
    for name, network in supernets.items():
        found[name] = bench.scores(network, levels)
        if name in OWN_LIST:
            own = bench.scores(network, network.dropout_list)
            found[f"{name}, own list"] = own
    spec = supernets["piad"].spec
    for kind, chosen in (("uniform", piad.uniform(spec)), ("extracted", levels)):
        row = {}
        for budget in alone:
            row |= bench.alone(kind, budget, chosen)
        if row:
            found[f"alone, {kind} widths"] = row
    return found


def table(found: list[dict[str, Scores]]) -> str:
    """Mean over seeds, and the spread."""
    lines = [f"| | {' | '.join(SIZES)} |", "|---" * (len(SIZES) + 1) + "|"]
    for name in found[0]:
        cells = []
        for size in SIZES:
            values = [seed[name][size] for seed in found if size in seed[name]]
            cells.append(
                f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"
                if values
                else ""
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the seeds, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="npz of CIFAR-10 as JPEGs")
    parser.add_argument("--work", required=True, help="directory for the runs")
    parser.add_argument(
        "--start", default="", help="a pre-trained network, its directory"
    )
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--test-images", type=int, default=0, help="0 for all")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--alone", default="4/12,6/12,8/12")
    parser.add_argument("--out", help="directory for ablation.json and ablation.md")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    variants, alone = (
        [x for x in a.split(",") if x] for a in (args.variants, args.alone)
    )
    found = []
    for seed in range(args.seeds):
        found.append(of_seed(Bench(args, seed), variants, alone))
        print(table(found), flush=True)
    tables.write(args.out, "ablation", found, table(found))


if __name__ == "__main__":
    main()
