"""Seconds to extract sub-networks: from memory, with least squares, from disk.

    python benchmarks/extraction.py [--variant=B/16] [--levels=8] [--out=DIR]

Random weights serve. Levels are spread over a uniform list and over one whose blocks
have widths of their own, as a list by loss has. The first extraction of each is told
apart: what has to be compiled is compiled there. What is read from disk was read before
(warm cache), and is held against reading the same bytes, side by side.
"""

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tables

from flax_skd.io import checkpoint
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import compensation, piad, subnet, vit
from flax_skd.method.compensation import Compensation, Repair
from flax_skd.method.spec import SubnetSpec, ViTSpec

TITLES = {
    "slices": "plain slices, views",
    "copies": "plain slices, copied",
    "least_squares": "least squares",
    "read": "reading the same bytes",
    "load": "load_supernet",
    "disk": "load_supernet and plain slices",
    "read_repairs": "reading the same bytes, with least squares",
    "load_repairs": "load_supernet, with least squares",
}


def supernet(spec: ViTSpec, levels: int) -> tuple[Supernet, list[SubnetSpec]]:
    """A network of random weights with what repairs it, and the cuts to extract."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: vit.init(spec, jax.random.key(0)))
    params = jax.tree.map(
        lambda x: (0.02 * rng.normal(size=x.shape)).astype(np.float32), shapes
    )

    def repair(size):
        factor = np.tril(0.1 * rng.normal(size=(size, size)) / size**0.5)
        factor = (factor + np.eye(size)).astype(np.float32)
        return Repair(rng.normal(size=size).astype(np.float32), factor)

    sizes = compensation.inner_units(spec)
    repairs = Compensation(
        *(tuple(repair(sizes[kind]) for _ in range(spec.depth)) for kind in sizes)
    )
    uniform = piad.uniform(spec)
    rows = np.linspace(1, int(uniform.levels), levels // 2).round().astype(int)
    cuts = [uniform.widths(int(row), spec) for row in rows]
    for share in np.linspace(0.9, 0.2, levels - len(cuts)):
        shares = np.clip(share + rng.uniform(-0.2, 0.2, (2, spec.depth)), 0.1, 1.0)
        heads = tuple(int(s * spec.head_dim) for s in shares[0])
        units = tuple(int(s * spec.mlp_dim) for s in shares[1])
        cuts.append(SubnetSpec(heads, heads, units))
    return Supernet(params, spec, uniform, {}, repairs), cuts


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    before = time.perf_counter()
    found = run()
    jax.block_until_ready(found)
    return time.perf_counter() - before


def repaired(network: Supernet, widths: SubnetSpec) -> Any:
    """As the extract command does it."""
    whole = compensation.repaired(
        network.params, network.spec, network.compensation, widths
    )
    return subnet.extract(jax.device_get(whole), widths)


def read_all(directory: pathlib.Path) -> int:
    """Reads every byte under a directory; how many there are."""
    files = (p for p in directory.rglob("*") if p.is_file())
    return sum(len(p.read_bytes()) for p in files)


def measure(args: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every row, the first call first; bytes on disk."""
    spec = ViTSpec.named(args.variant)
    network, cuts = supernet(spec, args.levels)
    params = network.params
    seconds: dict[str, list[float]] = {name: [] for name in TITLES}
    for cut in cuts:

        def copied(cut=cut):
            return jax.tree.map(np.copy, subnet.extract(params, cut))

        seconds["slices"].append(timed(lambda cut=cut: subnet.extract(params, cut)))
        seconds["copies"].append(timed(copied))
        seconds["least_squares"].append(timed(lambda cut=cut: repaired(network, cut)))
    sizes = {}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        plain, full = (pathlib.Path(folder) / name for name in ("plain", "full"))
        checkpoint.save_supernet(plain, network._replace(compensation=None))
        checkpoint.save_supernet(full, network)
        sizes = {"plain": read_all(plain), "full": read_all(full)}  # and warms up

        def extracted(cut):
            return subnet.extract(checkpoint.load_supernet(plain).params, cut)

        for turn in range(args.rounds):
            cut = cuts[turn % len(cuts)]
            seconds["read"].append(timed(lambda: read_all(plain)))
            seconds["load"].append(timed(lambda: checkpoint.load_supernet(plain)))
            seconds["disk"].append(timed(lambda cut=cut: extracted(cut)))
            seconds["read_repairs"].append(timed(lambda: read_all(full)))
            seconds["load_repairs"].append(
                timed(lambda: checkpoint.load_supernet(full))
            )
    return seconds, sizes


def markdown(seconds: dict[str, list[float]], sizes: dict[str, int], args) -> str:
    """The table; ratios are of neighbours in one round."""
    lines = [
        "| | first, ms | median of the others (least to most), ms | over reading |",
        "|---|---|---|---|",
    ]
    against = {"load": "read", "disk": "read", "load_repairs": "read_repairs"}
    for name, title in TITLES.items():
        first, *others = (1e3 * s for s in seconds[name])
        others = others or [first]
        ratio = ""
        if name in against:
            pairs = zip(seconds[name], seconds[against[name]])
            ratio = f"{np.median([a / b for a, b in pairs]):.2f}"
        lines.append(
            f"| {title} | {first:.1f} | {np.median(others):.1f} ({min(others):.1f} to "
            f"{max(others):.1f}) | {ratio} |"
        )
    lines.append(
        f"\n{args.variant}, {args.levels} levels, {args.rounds} rounds from disk; "
        f"{sizes['plain'] / 1e6:.0f} MB, {sizes['full'] / 1e6:.0f} MB with least "
        f"squares; {os.cpu_count()} cores, jax {jax.__version__}."
    )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="B/16")
    parser.add_argument("--levels", type=int, default=8, help="at least 2")
    parser.add_argument("--rounds", type=int, default=5, help="of those from disk")
    parser.add_argument("--work", help="where to write the network; temporary")
    parser.add_argument("--out", help="directory for extraction.json and extraction.md")
    args = parser.parse_args()
    seconds, sizes = measure(args)
    text = markdown(seconds, sizes, args)
    print(text)
    flags = {k: v for k, v in vars(args).items() if k not in ("out", "work")}
    facts = {"seconds": seconds, "bytes": sizes, "flags": flags}
    tables.write(args.out, "extraction", facts, text)


if __name__ == "__main__":
    main()
