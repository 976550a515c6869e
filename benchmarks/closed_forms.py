"""Training-free cuts of a real ViT: the paper's way, ours part by part, rivals.

    python benchmarks/closed_forms.py --path=FILE --variant=Ti/16 --recipe=augreg \
        --calibration=tar:IMAGES.tar --labels=sorted --test=tar:VAL.tar [--out=DIR]

One statistics pass, then every variant from the same sums, every row on the same test
images: top-1 with a bootstrap interval, KL to the full network, and the difference to
the first row of its cut, paired over images. `--table=parts` cuts one kind of branch,
`--table=whole` the network to shares of its MACs.
"""

import argparse
import functools
import json
import logging
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.io import data, sources
from flax_skd.io.checkpoint import SuperNet
from flax_skd.method import (
    balance,
    compensation,
    contraction,
    costs,
    macs,
    piad,
    subnet,
)
from flax_skd.method.balance import Balanced
from flax_skd.method.contraction import CRITERIA, balanced_criterion
from flax_skd.method.vit import ViT
from flax_skd.run import (
    commands,
    config_files,
    contracting,
    evaluate,
    feed,
)
from flax_skd.run.contracting import Recipe

WPAC = CRITERIA["wpac"]
BALANCED = CRITERIA["balanced"]
OURS = Recipe(BALANCED, "greedy", "least_squares")


def _clover(block, statistics, index, rng):
    """CLOVER: singular vectors of W_q W_k^T and of W_v W_o, no data."""
    del statistics, index, rng
    attn = block["attn"]
    query, key, value = (
        np.asarray(attn[name]["kernel"], np.float64).swapaxes(0, 1)
        for name in ("query", "key", "value")
    )
    out = np.asarray(attn["out"]["kernel"], np.float64)
    grams = [x.swapaxes(1, 2) @ x for x in (query, key, value)]
    right = np.stack([balance.root(gram)[0] for gram in grams[1]])
    left, dual = balance.pair(grams[0], right)
    axes = (left, dual.swapaxes(1, 2), *balance.pair(grams[2], out))
    return tuple(map(jnp.asarray, axes))


CLOVER = contraction.Criterion(_clover, "taylor2")
# Cut -> shares -> variants; the first is what the others are compared with.
PARTS: dict[tuple[str, tuple[float, ...]], dict[str, Recipe]] = {
    ("attention", (3 / 4, 2 / 4)): {
        "wpac": Recipe(WPAC),
        "taylor1": Recipe(CRITERIA["taylor1"]),
        "pca": Recipe(CRITERIA["pca"]),
        "clover": Recipe(CLOVER),
        "balanced": Recipe(BALANCED),
        "balanced + mean": Recipe(BALANCED, compensation="mean"),
        "balanced + least squares": Recipe(BALANCED, compensation="least_squares"),
    },
    ("qk", (1 / 4, 1 / 8)): {
        "wpac": Recipe(WPAC),
        "taylor1": Recipe(CRITERIA["taylor1"]),
        "pca": Recipe(CRITERIA["pca"]),
        "clover": Recipe(CLOVER),
        "balanced, plain tokens": Recipe(
            balanced_criterion(Balanced(query="plain", key="plain", parts=("qk",)))
        ),
        "balanced, weighted queries": Recipe(
            balanced_criterion(Balanced(key="plain", parts=("qk",)))
        ),
        "balanced": Recipe(BALANCED),
        "balanced, attended keys": Recipe(
            balanced_criterion(Balanced(keys="attended", parts=("qk",)))
        ),
    },
    ("vo", (2 / 4, 1 / 4)): {
        "wpac": Recipe(WPAC),
        "wpac + least squares": Recipe(WPAC, compensation="least_squares"),
        "clover": Recipe(CLOVER),
        "balanced": Recipe(BALANCED),
        "balanced + least squares": Recipe(BALANCED, compensation="least_squares"),
        "balanced + least squares, plain tokens": Recipe(
            balanced_criterion(Balanced(mixed="plain", parts=("vo",))),
            compensation="least_squares",
            tokens="plain",
        ),
        "balanced, gradient metric + least squares": Recipe(
            balanced_criterion(Balanced(metric="gradient", parts=("vo",))),
            compensation="least_squares",
        ),
    },
    ("mlp", (3 / 4, 2 / 4, 1 / 4)): {
        "taylor2": Recipe(WPAC),
        "taylor2 + mean": Recipe(WPAC, compensation="mean"),
        "taylor2 + least squares": Recipe(WPAC, compensation="least_squares"),
        "variance + mean, plain tokens": Recipe(WPAC, "variance", "mean", "plain"),
        "variance * weight + least squares": Recipe(
            WPAC, "variance_weight", "least_squares"
        ),
        "greedy + least squares, plain tokens": Recipe(
            WPAC, "greedy", "least_squares", "plain"
        ),
        "greedy + least squares": Recipe(WPAC, "greedy", "least_squares"),
    },
}
BUDGETS = (10 / 12, 8 / 12, 6 / 12, 4 / 12)


class Scores(NamedTuple):
    """Of every test image: whether the first class is right, and KL in nats."""

    right: np.ndarray
    kl: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _scored(model, params, repairs, batch, full, widths):
    params = compensation.repaired(params, model.spec, repairs, widths)
    logits = model.apply(
        {"params": params}, batch["image"], subnet.masks(model.spec, widths)
    )
    log_full, log_cut = jax.nn.log_softmax(full), jax.nn.log_softmax(logits)
    kl = (jnp.exp(log_full) * (log_full - log_cut)).sum(-1)
    return logits.argmax(-1) == batch["label"], kl


class Harness:
    """One network, its statistics and its test images."""

    def __init__(self, args: argparse.Namespace):
        config = config_files.load("configs/balanced.py")
        config.model.path, config.model.recipe = args.path, args.recipe
        config.model.variant = args.variant
        config.data.source, config.data.labels = args.calibration, args.labels
        config.data.images, config.seed = args.images, args.seed
        self.config = config
        self.network = commands.load_network(config.model)
        spec = self.network.spec
        self.model = ViT(spec)
        self.calibration = feed.batches_of(config.data, spec, seed=args.seed)
        recipes = [r for variants in PARTS.values() for r in variants.values()]
        asked = recipes if args.table == "parts" else [OURS, Recipe(WPAC)]
        self.stats = commands.calibrate(
            self.network,
            self.calibration,
            cost=args.cost,
            dtype=jnp.float32,
            weightings=("plain", "taylor"),
            moments=tuple(sorted({m for r in asked for m in r.moments()})),
        )
        test = sources.open_source(args.test, num_classes=spec.num_classes)
        self.test = list(data.eval_batches(test, spec, batch_size=50))
        apply = jax.jit(lambda p, x: self.model.apply({"params": p}, x))
        self.full = [apply(self.network.params, batch["image"]) for batch in self.test]

    def contracted(self, recipe: Recipe) -> SuperNet:
        """The network under a recipe."""
        return contracting.contracted(self.network, self.stats, recipe)

    def scores(self, network: SuperNet, widths) -> Scores:
        """Of one sub-network."""
        widths = type(widths)(*(np.array(w, np.int32) for w in widths))
        found = []
        for batch, full in zip(self.test, self.full, strict=True):
            right, kl = _scored(
                self.model, network.params, network.compensation, batch, full, widths
            )
            live = batch["weight"] > 0
            found.append((np.asarray(right)[live], np.asarray(kl)[live]))
        return Scores(*(np.concatenate(part) for part in zip(*found)))

    def listed(self, network: SuperNet, kind: str, **options: Any) -> SuperNet:
        """The network with a list that was measured on it."""
        config = self.config.copy_and_resolve_references()
        config.list.kind = kind
        config.list.update(options)
        return network._replace(
            dropout_list=contracting._list_of(network, config.list, config)
        )


def interval(values: np.ndarray, rounds: int = 2000) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (rounds, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def row(cut: str, share: float, name: str, scores: Scores, first: Scores) -> dict:
    """One line of the table, all in percent but KL."""
    right = 100.0 * scores.right
    difference = right - 100.0 * first.right
    return {
        "cut": cut,
        "kept": round(share, 4),
        "variant": name,
        "top1": right.mean(),
        "interval": interval(right),
        "kl": float(scores.kl.mean()),
        "difference": difference.mean(),
        "difference_interval": interval(difference),
    }


def parts(harness: Harness) -> list[dict]:
    """One kind of branch cut in every block alike."""
    rows = []
    for (cut, shares), variants in PARTS.items():
        firsts: dict[float, Scores] = {}
        for name, recipe in variants.items():
            network = harness.contracted(recipe)
            for share in shares:
                widths = evaluate.fixed_cut(network.spec, cut, share).widths
                scores = harness.scores(network, widths)
                first = firsts.setdefault(share, scores)
                rows.append(row(cut, share, name, scores, first))
                print(line(rows[-1]), flush=True)
    return rows


def whole(harness: Harness) -> list[dict]:
    """All branches, at shares of all MACs."""
    ours = harness.contracted(OURS)
    variants = {
        "wpac, importance list": lambda: harness.listed(
            harness.contracted(Recipe(WPAC)), "importance", images=256
        ),
        "wpac, uniform": lambda: harness.listed(
            harness.contracted(Recipe(WPAC)), "uniform"
        ),
        "clover, uniform": lambda: harness.listed(
            harness.contracted(Recipe(CLOVER)), "uniform"
        ),
        "ours, uniform": lambda: harness.listed(ours, "uniform", levels=64),
        "ours, importance list": lambda: harness.listed(ours, "importance", images=256),
        "ours, list by loss": lambda: harness.listed(ours, "loss"),
    }
    rows, firsts = [], {}
    for name, make in variants.items():
        network = make()
        for share in BUDGETS:
            limit = int(share * macs.macs(network.spec))
            level = piad.level_for(network.dropout_list, network.spec, limit)
            widths = network.dropout_list.widths(level, network.spec)
            scores = harness.scores(network, widths)
            first = firsts.setdefault(share, scores)
            rows.append(row("whole network", share, name, scores, first))
            rows[-1]["widths"] = widths._asdict()
            print(line(rows[-1]), flush=True)
    return rows


HEAD = """| cut | kept | | top-1 | KL | difference to the first |
|---|---|---|---|---|---|"""


def line(found: dict) -> str:
    """A row as Markdown."""
    low, high = found["interval"]
    down, up = found["difference_interval"]
    return (
        f"| {found['cut']} | {found['kept']:.3f} | {found['variant']} | "
        f"{found['top1']:.1f} ({low:.1f} to {high:.1f}) | {found['kl']:.3f} | "
        f"{found['difference']:+.1f} ({down:+.1f} to {up:+.1f}) |"
    )


def main() -> None:
    """Runs one of the two tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--path", required=True, help="weights file, or a directory")
    parser.add_argument("--variant", default="", help="such as Ti/16")
    parser.add_argument("--recipe", default="")
    parser.add_argument("--calibration", required=True, help="source of images")
    parser.add_argument("--labels", default="")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--cost", default="logit", choices=sorted(costs.COSTS))
    parser.add_argument("--test", required=True, help="source of labelled images")
    parser.add_argument("--table", choices=("parts", "whole"), default="parts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="directory for closed_forms_TABLE.{md,json}")
    args = parser.parse_args()
    logging.getLogger("flax_skd").setLevel(logging.INFO)
    logging.getLogger("flax_skd").addHandler(logging.StreamHandler())
    harness = Harness(args)
    rows = {"parts": parts, "whole": whole}[args.table](harness)
    if args.out:
        out = pathlib.Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        stem = out / f"closed_forms_{args.table}"
        stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        table = "\n".join([HEAD, *map(line, rows)])
        stem.with_suffix(".md").write_text(table + "\n")


if __name__ == "__main__":
    main()
