"""Speed and memory of the statistics pass beside a plain forward and backward pass.

    python benchmarks/statistics_pass.py [--path=WEIGHTS --data=tar:IMAGES] [--out=DIR]

Without flags: random weights, random images, nothing to download.
"""

import argparse
import functools
import json
import os
import pathlib
import resource
import statistics as stats
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.io import conversion, data, sources
from flax_skd.io.extras import require
from flax_skd.method import costs, statistics, vit
from flax_skd.method.spec import ViTSpec

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
WEIGHTINGS = {"taylor": ("taylor",), "both": ("taylor", "plain")}
TITLES = {
    "plain": "forward + backward, gradient of all parameters",
    "input": "forward + backward, gradient of the image alone",
    "taylor": "statistics pass, Taylor-weighted moments",
    "both": "statistics pass, Taylor-weighted and plain moments",
}
TABLE_HEAD = (
    "| pass | images/s | time over the first row | compile s | planned MB | "
    "peak MB, host | peak MB, device |"
)
SHORT, LONG = 2, 8  # batches of the two passes whose memory is compared


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--variant", default="Ti/16", help="of the network, such as S/16")
    add("--image_size", type=int, default=224, help="pixels, of the random network")
    add("--path", help="weights file to read instead; any family conversion reads")
    add("--recipe", help="how that family was trained, such as augreg")
    add("--data", help="images to read instead, such as tar:PATH or folder:PATH")
    add("--labels", help="of a tar: sorted, or a JSON file {name: class}")
    add("--dtype", default="float32", choices=DTYPES, help="of the computation")
    add("--batch_size", type=int, default=32)
    add("--images", type=int, default=256, help="a multiple of the batch size")
    add("--repeats", type=int, default=5, help="rounds; each times every row once")
    add("--out", help="directory for statistics_pass.json and statistics_pass.md")
    add("--memory_of", choices=["nothing", *TITLES], help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if min(args.batch_size, args.images, args.repeats) < 1:
        parser.error("--batch_size, --images and --repeats must be at least 1")
    if args.images % args.batch_size:
        parser.error(
            f"--images={args.images} must be a multiple of --batch_size="
            f"{args.batch_size}, so that no row pays for padding"
        )
    return args


def network(args: argparse.Namespace):
    """The network to measure: of --path, or random. Returns (model, params)."""
    if args.path:
        source = conversion.read(args.path, variant=args.variant, recipe=args.recipe)
        spec, params = source.spec, jax.device_put(source.params)
    else:
        spec = ViTSpec.named(args.variant, image_size=args.image_size)
        # A fresh head is zero, and so would every gradient before it be.
        leaves, tree = jax.tree.flatten(vit.init(spec, jax.random.key(0)))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noise = [0.02 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves)]
        params = jax.tree.unflatten(tree, map(jnp.add, leaves, noise))
    return vit.ViT(spec, dtype=DTYPES[args.dtype]), params


def batches(args: argparse.Namespace, spec: ViTSpec, count: int = 0):
    """`count` batches, or --images images, one by one so that few are alive."""
    count = count or args.images // args.batch_size
    if args.data:
        source = sources.open_source(
            args.data, labels=args.labels, num_classes=spec.num_classes
        )
        chosen = sources.take(source, count * args.batch_size)
        yield from data.eval_batches(chosen, spec, batch_size=args.batch_size)
        return
    rng = np.random.default_rng(0)
    size = (args.batch_size, spec.image_size, spec.image_size, spec.in_channels)
    for _ in range(count):
        yield {
            "image": rng.integers(0, 256, size, np.uint8),
            "label": rng.integers(0, spec.num_classes, size[0], np.int32),
            "weight": np.ones(size[0], np.float32),
        }


def gradient_step(model: vit.ViT, of: str):
    """A plain pass as a function (last result, params, batch, pilot) -> result."""

    def total(params, image, batch):
        logits = model.apply({"params": params}, image)
        return jnp.sum(costs.correct_logit(logits, batch["label"]) * batch["weight"])

    def step(last, params, batch, pilot):
        del last, pilot
        image = vit.normalise(batch["image"], model.spec)
        return jax.grad(total, argnums=0 if of == "plain" else 1)(params, image, batch)

    return step


def prepared(name: str, model: vit.ViT, params, batch, pilot):
    """Compiles a row: (step, function that makes its first carry, seconds it took)."""
    if name in WEIGHTINGS:
        sums_of = functools.partial(
            statistics.batch_sums, model, weightings=WEIGHTINGS[name]
        )
        shapes = jax.eval_shape(sums_of, params, batch, pilot)

        def step(sums, *inputs):  # a batch of `statistics.collect`
            return jax.tree.map(jnp.add, sums, sums_of(*inputs))

    else:
        shapes, step = (), gradient_step(model, name)

    def start():
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    before = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(start(), params, batch, pilot)
    return lowered.compile(), start, time.perf_counter() - before


def run(compiled, carry, params, images, pilot):
    """All batches through a step, to the end."""
    for batch in images:
        result = compiled(carry, params, batch, pilot)
        # A plain pass carries nothing: its gradients are used up before the next.
        carry = result if carry else carry
    return jax.block_until_ready(result)


def planned_bytes(compiled) -> int:
    """Bytes XLA plans for one call: arguments, results and temporaries."""
    plan = compiled.memory_analysis()
    held = plan.argument_size_in_bytes + plan.output_size_in_bytes
    return held + plan.temp_size_in_bytes - plan.alias_size_in_bytes


def peaks() -> dict[str, int]:
    """Most bytes held so far: by this process, and on its first device if it says."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    device = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in device:
        found["device"] = device["peak_bytes_in_use"]
    return found


def memory_here(args: argparse.Namespace) -> list[dict[str, int]]:
    """Runs one row in this process; its peaks after a short pass and a longer one."""
    model, params = network(args)
    first = jax.device_put(next(batches(args, model.spec)))
    pilot = jax.jit(functools.partial(statistics.pilot_means, model))(params, first)
    jax.block_until_ready(pilot)
    if args.memory_of == "nothing":
        return [peaks()]
    compiled, start, _ = prepared(args.memory_of, model, params, first, pilot)
    found = []
    for count in (SHORT, LONG):
        images = map(jax.device_put, batches(args, model.spec, count=count))
        run(compiled, start(), params, images, pilot)
        found.append(peaks())
    return found


def measure_memory(arguments: list[str]) -> dict[str, list[dict[str, int]]]:
    """`memory_here` of every row and of an idle process, each a fresh one."""
    found = {}
    for name in require("tqdm").tqdm(["nothing", *TITLES], desc="memory"):
        command = [sys.executable, os.path.abspath(__file__), *arguments]
        command.append(f"--memory_of={name}")
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_time(args: argparse.Namespace):
    """Seconds of every row in every round, compile seconds, planned bytes."""
    model, params = network(args)
    images = [jax.device_put(batch) for batch in batches(args, model.spec)]
    pilot = jax.jit(functools.partial(statistics.pilot_means, model))(params, images[0])
    rows = {name: prepared(name, model, params, images[0], pilot) for name in TITLES}
    for compiled, start, _ in rows.values():  # warm up
        run(compiled, start(), params, images[:1], pilot)
    names, seconds = list(rows), {name: [] for name in rows}
    for turn in require("tqdm").trange(args.repeats, desc="time"):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            compiled, start, _ = rows[name]
            carry = jax.block_until_ready(start())
            before = time.perf_counter()
            run(compiled, carry, params, images, pilot)
            seconds[name].append(time.perf_counter() - before)
    return {
        name: {
            "seconds": seconds[name],
            "compile_seconds": rows[name][2],
            "planned_bytes": planned_bytes(rows[name][0]),
        }
        for name in rows
    }


def summary(times, memory, args: argparse.Namespace) -> dict:
    """Everything measured, as JSON can hold it."""
    idle = memory["nothing"][0]
    rows = {}
    for name, row in times.items():
        # Ratios within a round: what slows the machine slows both.
        ratios = [a / b for a, b in zip(row["seconds"], times["plain"]["seconds"])]
        speeds = [args.images / s for s in row["seconds"]]
        rows[name] = {
            **row,
            "images_per_second": [stats.median(speeds), min(speeds), max(speeds)],
            "time_over_plain": [stats.median(ratios), min(ratios), max(ratios)],
            "peak_above_idle": [{k: p[k] - idle[k] for k in p} for p in memory[name]],
        }
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "flags": {k: v for k, v in vars(args).items() if k not in ("out", "memory_of")},
        "rows": rows,
    }


def markdown(found: dict) -> str:
    """The tables."""

    def spread(three, digits):
        middle, low, high = (f"{x:.{digits}f}" for x in three)
        return f"{middle} ({low} to {high})"

    def mb(*counts):
        return ", ".join("-" if c is None else f"{c / 1e6:,.0f}" for c in counts)

    lines = [TABLE_HEAD, "|---" * 7 + "|"]
    for name, row in found["rows"].items():
        short, long = row["peak_above_idle"]
        cells = [
            TITLES[name],
            spread(row["images_per_second"], 1),
            spread(row["time_over_plain"], 2),
            f"{row['compile_seconds']:.1f}",
            mb(row["planned_bytes"]),
            mb(short["rss"], long["rss"]),
            mb(short.get("device"), long.get("device")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    flags, size = found["flags"], found["flags"]["batch_size"]
    lines += [
        (
            f"\n{flags['path'] or flags['variant']}, {flags['dtype']}, batch {size}, "
            f"{flags['images']} images, {flags['repeats']} rounds, median (least to "
            f"most); {found['device']}, {found['cores']} cores, jax {found['jax']}."
        ),
        (
            f"Peaks after {SHORT * size} and {LONG * size} images, above an idle "
            "process; on the host with the compiler's own memory."
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the tables and writes them."""
    args = parse()
    if args.memory_of:
        return print(json.dumps(memory_here(args)))
    # Memory first: a child inherits the peak of the process that starts it.
    memory = measure_memory(sys.argv[1:])
    found = summary(measure_time(args), memory, args)
    print(table := markdown(found))
    if args.out:
        stem = pathlib.Path(args.out) / "statistics_pass"
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
        stem.with_suffix(".md").write_text(table + "\n")


if __name__ == "__main__":
    main()
