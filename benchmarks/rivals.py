"""The other systems and PIAD in the reduced CIFAR-10 setting, for equal images seen.

    python benchmarks/rivals.py --data=$FLAX_SKD_DATA/cifar10_jpeg.npz --work=DIR \
        [--ablation=DIR] [--seeds=0,1] [--systems=piad,scala] [--out=DIR]

All start from the network of `configs/ablation.py:start` (PIAD and HPM-KD from the same
one contracted, which has the same logits) and see as many images as a variant of the
ablation; UVC once a budget. --ablation is the --work of benchmarks/ablation.py, whose
start, contraction and PIAD runs are read, or made if missing. What lies there is not
repeated: runs as directories, scores and times as JSON. MACs are of what is extracted.
--start is a network to start from instead, for all; not with --ablation, which trains
from a given network by another recipe and for fewer images than a system sees here.
"""

import argparse
import json
import logging
import pathlib
import statistics
from typing import Any

import ablation
import rival_times
import tables

from flax_skd.io import checkpoint
from flax_skd.io.extras import require
from flax_skd.method import macs, piad, subnet
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import ViT
from flax_skd.rivals import scala, table
from flax_skd.run import config_files, evaluate, sweeping, training

# System -> config, what it starts from, and its runs: name -> changes of the config.
RIVAL = "configs/rivals/{}.py:reduced"
SYSTEMS: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    "piad": ("configs/ablation.py:piad", "wpac", {"piad": {}}),
    "in_place": ("configs/ablation.py:in_place", "wpac", {"in_place": {}}),
    "matvit": (RIVAL.format("matvit"), "start", {"matvit": {}}),
    "scala": (RIVAL.format("scala"), "start", {"scala": {}}),
    "hpm_kd": (RIVAL.format("hpm_kd"), "wpac", {"hpm_kd": {}}),
    "ldr": (RIVAL.format("ldr"), "start", {"ldr": {}}),
    "uvc": (
        RIVAL.format("uvc"),
        "start",
        {f"uvc_{n}_12": {"rival.budget": n / 12} for n in (4, 6, 8)},
    ),
}
TWELFTHS = (4, 6, 8, 12)
BETWEEN = 7 / 12  # of the MACs, where no system trains
MOST_LEVELS = 24  # of a list, on its curve
DIRECTORIES = ("data", "work", "ablation", "out")  # flags that no number depends on
Point = dict[str, float]


class Systems(ablation.Bench):
    """One seed of the comparison; starts and PIAD are those of the ablation."""

    def __init__(self, args: argparse.Namespace, seed: int):
        super().__init__(args, seed)
        self.args = args
        self.here = self.work
        if args.ablation:
            self.work = pathlib.Path(args.ablation) / f"seed_{seed}"

    def config(self, system: str, changes: dict[str, Any]):
        """Of one run, with what it starts from."""
        file, start, _ = SYSTEMS[system]
        config = config_files.load(file)
        config.seed = self.seed
        config.data.source, config.data.eval_source = self.train, ""
        found = self.contracted() if start == "wpac" else self.started()
        config.model.path = str(found)
        for name, value in (self.args.set | changes).items():
            config.update_from_flattened_dict({name: value})
        return config

    def run(self, system: str, name: str, changes: dict[str, Any]) -> pathlib.Path:
        """The directory of a trained network; an interrupted run goes on."""
        folder = self.work if system in ("piad", "in_place") else self.here
        target = folder / name
        if not (target / training.NETWORK).is_dir():
            config = self.config(system, changes)
            config.checkpoint_every = 200
            training.train(
                config,
                workdir=str(target),
                overwrite=False,
                resume=True,
                others=table.PROGRAMS,
            )
        return target / training.NETWORK

    def scored(self, system: str) -> dict[str, Any]:
        """Points of a system, MACs share and top-1, and one nobody trained."""
        kept = self.here / f"{system}.json"
        if not kept.is_file():
            networks = [
                self.run(system, name, changes)
                for name, changes in SYSTEMS[system][2].items()
            ]
            sizes = [size for n in networks for size in _sizes(system, n)]
            offered = {
                "points": [self._point(*size) for size in sizes],
                "offered": sum(_offered(system, n) for n in networks),
                "between": self._point(*_between(system, networks)),
            }
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(offered, indent=1) + "\n")
        return json.loads(kept.read_text())

    def _point(self, params, spec: ViTSpec, widths: SubnetSpec) -> Point:
        small = ViT(spec, widths)
        batches = self._test_batches(spec)
        (row,) = evaluate.evaluate(small, params, batches, [None])
        full = macs.macs(checkpoint.load_supernet(self.started()).spec)
        return {"share": macs.macs(spec, widths) / full, "top1": row.top1}


def _cut(params, spec: ViTSpec, widths: SubnetSpec):
    return subnet.extract(params, widths), spec, widths


def _beside(network: pathlib.Path):
    """The networks of other sizes that a run left beside its super-network."""
    folders = sorted(network.parent.glob(f"{network.name}-*"))
    return [checkpoint.load_subnet(folder)[:3] for folder in folders]


def _sizes(system: str, network: pathlib.Path):
    """(params, spec, widths) of what a run offers; of a long list some levels."""
    found = checkpoint.load_supernet(network)
    levels, spec = found.dropout_list, found.spec
    every = max(1, int(levels.levels) // MOST_LEVELS)
    cuts = sweeping.cuts_of(found, "levels", "", every=every)
    # At the table's budgets too; and UVC trains its one structure alone.
    cuts = cuts[1:] if system == "uvc" else cuts
    if system in ("piad", "in_place"):
        cuts += sweeping.cuts_of(found, "budgets", "4/12,6/12,8/12")[1:]
    widths = dict.fromkeys(cut.widths for cut in cuts)
    return [_cut(found.params, spec, w) for w in widths] + _beside(network)


def _offered(system: str, network: pathlib.Path) -> int:
    levels = int(checkpoint.load_supernet(network).dropout_list.levels)
    return levels + (system != "uvc") + len(_beside(network))


def _between(system: str, networks: list[pathlib.Path]):
    """A size that nobody trained, near `BETWEEN`, by the slices the system has.

    Scala: a ratio off the grid. MatViT: a prefix off the grid. LDR: the depth below, as
    no depth but the full one trains. Otherwise the next larger network, all its branches
    cut alike.
    """
    found = checkpoint.load_supernet(networks[0])
    spec = found.spec
    if system == "scala":
        small = scala.sliced_spec(spec, 11 / 16, "head_dims")
        cut = scala.sliced(found.params, small)
        return cut, small, SubnetSpec.full(small)
    if system == "matvit":
        full = SubnetSpec.full(spec)
        width = spec.mlp_dim * 3 // 8
        return _cut(found.params, spec, full._replace(mlp_dim=(width,) * spec.depth))
    limit = BETWEEN * macs.macs(spec)
    sizes = [size for n in networks for size in _sizes(system, n)]
    if system == "ldr":
        return max(
            (s for s in sizes if macs.macs(*s[1:]) <= limit),
            key=lambda size: macs.macs(*size[1:]),
        )
    if system in ("piad", "in_place"):
        larger = _cut(found.params, spec, SubnetSpec.full(spec))
    else:
        larger = min(
            (s for s in sizes if macs.macs(*s[1:]) > limit),
            key=lambda size: macs.macs(*size[1:]),
        )
    for alike in piad.uniform(spec, steps=64).all_widths(spec):
        both = zip(larger[2], alike, strict=True)
        widths = SubnetSpec(*(tuple(map(min, a, b)) for a, b in both))
        if macs.macs(spec, widths) <= limit:
            return _cut(larger[0], spec, widths)
    raise ValueError(f"{system} has nothing below {BETWEEN:.2f} of the MACs.")


def at_share(points: list[Point], share: float) -> Point | None:
    """The largest size within a share of the MACs; 1e-3 for rounding of budgets."""
    fits = [p for p in points if p["share"] <= share + 1e-3]
    return max(fits, key=lambda p: p["share"]) if fits else None


def _cell(points: list[Point | None]) -> str:
    there = [p for p in points if p]
    if not there:
        return ""
    values = [p["top1"] for p in there]
    share = statistics.mean(p["share"] for p in there)
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread} at {100 * share:.0f} %"


def markdown(found: dict[str, list[dict[str, Any]]], times: dict[str, float]) -> str:
    """Top-1 at the budgets, mean over seeds, with the MACs of the size that fits."""
    heads = [f"{n}/12" for n in TWELFTHS]
    heads = ["", *heads, "a size nobody trained", "sizes", "time / dense"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for system, seeds in found.items():
        cells = [
            _cell([at_share(s["points"], n / 12) for s in seeds]) for n in TWELFTHS
        ]
        cells.append(_cell([s["between"] for s in seeds]))
        cells.append(" ".join(sorted({str(s["offered"]) for s in seeds})))
        runs = len(SYSTEMS[system][2])
        each = f" ({runs} runs)" if runs > 1 else ""
        time = f"{times[system]:.2f}{each}" if system in times else ""
        lines.append(f"| {system} | {' | '.join([*cells, time])} |")
    return "\n".join(lines)


def figure(found: dict[str, list[dict[str, Any]]]):
    """Accuracy over MACs, a line a system and seed; circles where nobody trained."""
    plt = require("matplotlib.pyplot")
    drawn, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (system, seeds) in enumerate(found.items()):
        for n, seed in enumerate(seeds):
            points = sorted(seed["points"], key=lambda p: p["share"])
            xs, ys = zip(*((p["share"], p["top1"]) for p in points), strict=True)
            label = system if n == 0 else None
            axes.plot(xs, ys, marker=".", color=f"C{i}", label=label, alpha=0.8)
            between = seed["between"]
            axes.plot(between["share"], between["top1"], "o", mfc="none", color=f"C{i}")
    axes.set(xlabel="share of the MACs (full count)", ylabel="top-1 %")
    axes.set_title("CIFAR-10, reduced: equal images seen; circles: nobody trained it")
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


def _pair(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, json.loads(value)


def _times(bench: Systems, systems: list[str], rounds: int) -> dict[str, float]:
    runs = {system: next(iter(SYSTEMS[system][2].values())) for system in systems}
    configs = {
        system: bench.config(system, changes) for system, changes in runs.items()
    }
    return rival_times.relative(configs, rounds)


def main() -> None:
    """Trains what is missing, prints the table after every system, writes it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="npz of CIFAR-10 as JPEGs")
    parser.add_argument("--work", required=True, help="directory for the runs")
    parser.add_argument("--ablation", default="", help="--work of ablation.py, if any")
    parser.add_argument("--start", default="", help="a network, its directory")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--test-images", type=int, default=0, help="0 for all")
    parser.add_argument("--rounds", type=int, default=20, help="of the timing; 0: none")
    parser.add_argument(
        "--set", action="append", default=[], help="entry=JSON of every config"
    )
    parser.add_argument("--out", help="directory for rivals.json, .md and .png")
    args = parser.parse_args()
    args.set = dict(map(_pair, args.set))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    systems = args.systems.split(",")
    if args.start and args.ablation:
        parser.error(
            f"--start={args.start} with --ablation={args.ablation}: from a given network "
            "the ablation trains PIAD by another recipe, for fewer images than the other "
            "systems see: leave out one of the two."
        )
    if unknown := set(systems) - set(SYSTEMS):
        parser.error(f"--systems {sorted(unknown)}: choose of {', '.join(SYSTEMS)}")
    benches = [Systems(args, int(seed)) for seed in args.seeds.split(",")]
    found: dict[str, list[dict[str, Any]]] = {}
    for system in systems:
        found[system] = [bench.scored(system) for bench in benches]
        print(markdown(found, {}), flush=True)
    times = _times(benches[0], systems, args.rounds) if args.rounds else {}
    text = markdown(found, times)
    print(text)
    flags = {k: v for k, v in vars(args).items() if k not in DIRECTORIES}
    rows = {"systems": found, "time_over_dense": times, "flags": flags}
    tables.write(args.out, "rivals", rows, text)
    if args.out:
        figure(found).savefig(pathlib.Path(args.out) / "rivals.png", dpi=150)


if __name__ == "__main__":
    main()
