"""PIAD against WPAC alone over seeds of the demo, at shares of all MACs.

    python benchmarks/demo_seeds.py [--seeds=5] [--work=DIR] [--out=DIR]

Every seed trains its own network, contracts it and trains the super-network, as
`flax-skd demo --seed=N` does. About two and a half minutes a seed on two CPU cores.
"""

import argparse
import pathlib
import statistics
import tempfile

import tables

from flax_skd.io import checkpoint, data, sources
from flax_skd.method.vit import ViT
from flax_skd.run import demo, evaluate, sweeping

BUDGETS = "4/12,6/12,8/12,10/12"


def scores(folder: pathlib.Path) -> dict[str, float]:
    """Top-1 of one demo: full before and after PIAD, and both at the budgets."""
    found = {}
    for name in ("contracted", "supernet"):
        network = checkpoint.load_supernet(folder / name)
        test = sources.open_source("digits:test", num_classes=network.spec.num_classes)
        batches = data.eval_batches(test, network.spec, batch_size=75)
        cuts = sweeping.cuts_of(network, "budgets", BUDGETS)
        rows = evaluate.evaluate(
            ViT(network.spec),
            network.params,
            batches,
            [c.widths for c in cuts],
            repairs=network.compensation,
        )
        label = "start" if name == "contracted" else "piad"
        for size, row in zip(("full", *BUDGETS.split(",")), rows, strict=True):
            found[f"{label} {size}"] = row.top1
    return found


def main() -> None:
    """Runs the seeds, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--start", default="wpac", choices=demo.RECIPES)
    parser.add_argument("--work", help="directory for the runs; temporary by default")
    parser.add_argument("--out", help="directory for demo_seeds.json and demo_seeds.md")
    args = parser.parse_args()
    work = pathlib.Path(args.work or tempfile.mkdtemp())
    found = []
    for seed in range(args.seeds):
        folder = str(work / f"seed_{seed}")
        demo.run(folder, overwrite=True, seed=seed, start=args.start)
        found.append(scores(work / f"seed_{seed}"))
    lines = [f"| MACs | {args.start} alone | after PIAD | gain |", "|---|---|---|---|"]
    for size in ("full", *BUDGETS.split(",")):
        cells = []
        before, after = ([f[f"{x} {size}"] for f in found] for x in ("start", "piad"))
        for values in (before, after, [b - a for a, b in zip(before, after)]):
            spread = f"({min(values):.1f} to {max(values):.1f})"
            cells.append(f"{statistics.mean(values):.1f} {spread}")
        lines.append(f"| {size} | {' | '.join(cells)} |")
    lines.append(
        f"\nTop-1 in %, 450 test images of scikit-learn's digits, {args.seeds} seeds: "
        f"mean (least to most). {args.start} alone cuts all blocks alike."
    )
    text = "\n".join(lines)
    print(text)
    tables.write(args.out, "demo_seeds", found, text)


if __name__ == "__main__":
    main()
