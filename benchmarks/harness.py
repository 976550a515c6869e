"""What the tables of `closed_forms.py` share: one network, its sums, its test images."""

import argparse
import functools
import json
import pathlib
import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_skd.io import data, sources
from flax_skd.io.checkpoint import Supernet
from flax_skd.io.differences import differences
from flax_skd.method import compensation, losses, piad, subnet
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.statistics import Statistics
from flax_skd.method.vit import ViT
from flax_skd.run import commands, config_files, contracting, feed, recipes
from flax_skd.run.recipes import Recipe


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
    kl = losses.divergences(logits, full, num_classes=model.spec.num_classes)
    return logits.argmax(-1) == batch["label"], kl


class Harness:
    """One network, its statistics, taken when they are asked for, and test images.

    Attributes:
      network: as it was read.
      config: of `configs/balanced.py`, whose list and data sections apply.
      moments: what the statistics hold.
      recalibration_images: how many of the calibration images a refit sees.
    """

    def __init__(self, args: argparse.Namespace, moments: tuple[str, ...]):
        config = config_files.load("configs/balanced.py")
        config.model.path, config.model.recipe = args.path, args.recipe
        config.model.variant = args.variant
        config.data.source, config.data.labels = args.calibration, args.labels
        config.data.images, config.seed = args.images, args.seed
        config.data.batch_size, config.cost = args.batch_size, args.cost
        self.config, self.moments = config, moments
        self.network = commands.load_network(config.model)
        self.model = ViT(self.network.spec)
        self.recalibration_images = args.recalibration_images
        self._test, self._test_images = args.test, args.test_images
        self._work = _claimed(pathlib.Path(args.work), args)
        self._statistics: dict[tuple[int, str, str], Statistics] = {}

    def batches(self, images: int = 0):
        """Calibration images, so many of them; 0 for as many as the call said."""
        section = self.config.data.copy_and_resolve_references()
        section.images = images or section.images
        return feed.batches_of(section, self.network.spec, seed=self.config.seed)

    def stats(
        self, images: int = 0, cost: str = "", dtype: str = "float32"
    ) -> Statistics:
        """Of the calibration images, each kind once: memory, --work, or a pass."""
        key = images or self.config.data.images, cost or self.config.cost, dtype
        if key in self._statistics:
            return self._statistics[key]
        name = "_".join(("statistics", *map(str, key), *self.moments))
        path = self._work / f"{name}.pickle"  # written here, read by nobody else
        if path.exists():
            self._statistics[key] = pickle.loads(path.read_bytes())
            return self._statistics[key]
        found = commands.calibrate(
            self.network,
            self.batches(key[0]),
            cost=key[1],
            dtype=commands.dtype_named(dtype),
            weightings=("plain", "gradient"),
            moments=self.moments,
        )
        path.write_bytes(pickle.dumps(found))
        self._statistics[key] = found
        return found

    def contracted(self, recipe: Recipe, stats: Statistics | None = None) -> Supernet:
        """The network under a recipe."""
        return recipes.contracted(
            self.network,
            stats or self.stats(),
            recipe,
            batches=self.batches(self.config.list.images),
        )

    @functools.cached_property
    def test(self) -> list[tuple[dict[str, Any], jax.Array]]:
        """Test batches and the full network's logits of them."""
        spec = self.network.spec
        source = sources.open_source(self._test, num_classes=spec.num_classes)
        if self._test_images:
            source = sources.take(source, self._test_images, seed=self.config.seed)
        apply = jax.jit(lambda p, x: self.model.apply({"params": p}, x))
        return [
            (batch, apply(self.network.params, batch["image"]))
            for batch in data.eval_batches(source, spec, batch_size=50)
        ]

    def scores(self, network: Supernet, widths: SubnetSpec) -> Scores:
        """Of one sub-network, against the full network as it was read."""
        widths = subnet.as_data(widths)
        found = []
        for batch, full in self.test:
            right, kl = _scored(
                self.model, network.params, network.compensation, batch, full, widths
            )
            live = batch["weight"] > 0
            found.append((np.asarray(right)[live], np.asarray(kl)[live]))
        return Scores(*(np.concatenate(part) for part in zip(*found)))

    def kept(self, row: tuple[str, float, str], make: Callable[[], Scores]) -> Scores:
        """The scores of a row, from an earlier run where there was one."""
        name = _file_name(f"{row[0]} {row[1]:.4f} {row[2]}")
        path = self._work / f"{name}.npz"
        if path.exists():
            with np.load(path) as held:
                return Scores(held["right"], held["kl"])
        scores = make()
        np.savez(path, **scores._asdict())
        return scores

    def listed(
        self, network: Supernet, name: str, kind: str, **options: Any
    ) -> Supernet:
        """The network of this name with a list measured on it, now or by an earlier run."""
        config = self.config.copy_and_resolve_references()
        config.list.kind = kind
        config.list.update(options)
        said = " ".join((name, kind, *(f"{k} {v}" for k, v in options.items())))
        path = self._work / f"list_{_file_name(said)}.npz"
        if path.exists():
            with np.load(path) as held:
                return network._replace(dropout_list=DropoutList(**held))
        levels = contracting.list_of(network, config.list, config)
        np.savez(path, **levels._asdict())
        return network._replace(dropout_list=levels)

    def within(self, network: Supernet, share: float) -> SubnetSpec:
        """Widths of the largest level within a share of all MACs."""
        levels, spec = network.dropout_list, network.spec
        return levels.widths(piad.level_within(levels, spec, share), spec)


def _claimed(work: pathlib.Path, args: argparse.Namespace) -> pathlib.Path:
    """The folder of finished rows; those of other flags, --tables apart, are refused."""
    free = ("work", "out", "tables", "cuts")
    asked = {name: value for name, value in vars(args).items() if name not in free}
    path = work / "asked.json"
    if path.exists() and (wrong := differences(json.loads(path.read_text()), asked)):
        raise SystemExit(f"--work={work} holds other rows:\n  " + "\n  ".join(wrong))
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asked) + "\n")
    return work


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.]+", "_", text)


def interval(values: np.ndarray, rounds: int = 2000) -> tuple[float, float]:
    """A 95 % bootstrap interval of the mean."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (rounds, len(values)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def row(cut: str, share: float, name: str, scores: Scores, first: Scores) -> dict:
    """One line of a table, all in percent but KL."""
    right = 100.0 * scores.right
    difference = right - 100.0 * first.right
    return {
        "cut": cut,
        "kept": round(share, 4),
        "variant": name,
        "top1": float(right.mean()),
        "interval": interval(right),
        "kl": float(scores.kl.mean()),
        "difference": float(difference.mean()),
        "difference_interval": interval(difference),
    }


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
