"""Speed and memory of the statistics pass beside a plain forward and backward pass.

    python benchmarks/statistics_pass.py [--path=WEIGHTS --data=tar:IMAGES] [--out=DIR]
    python benchmarks/statistics_pass.py --variant=B/16 --images=16 --batch_size=8 \
        --rows=plain,taylor,moments,few,step --hidden_every=4

Without flags: random weights, random images, nothing to download. `moments` is what
`configs/balanced.py` collects, `few` the same with hidden units of every k-th image,
`step` a training step with AdamW, whose memory the passes are held against where it is
among the rows. Rotations and their injection are timed too, from the sums of one batch.
"""

import argparse
import functools
import json
import os
import resource
import statistics as stats
import subprocess
import sys
import time

import jax
import tables
from pass_rows import TITLES, batches, contraction_seconds, network, prepared

from flax_skd.io.extras import require
from flax_skd.method import statistics
from flax_skd.run.commands import DTYPES

TABLE_HEAD = (
    "| pass | images/s | time over the first row | compile s | planned MB | "
    "peak MB, host | peak MB, device | peak over the step's |"
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
    add("--rows", default="plain,input,taylor,both", help=f"of {','.join(TITLES)}")
    add("--hidden_every", type=int, default=4, help="k, of the row `few`")
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
    args.rows = args.rows.split(",")
    if args.rows[0] != "plain" or not set(args.rows) <= set(TITLES):
        parser.error(f"--rows starts with plain; the others are of {list(TITLES)}")
    return args


def run(compiled, carry, params, images, pilot):
    """All batches through a step, to the end."""
    for batch in images:
        # One at a time, as `statistics.collect` does: else several hold their memory.
        result = jax.block_until_ready(compiled(carry, params, batch, pilot))
        # A plain pass carries nothing: its gradients are used up before the next.
        carry = result if carry else carry
    return result


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
    inputs = params, first, pilot, args.hidden_every
    compiled, start, _ = prepared(args.memory_of, model, *inputs)
    found = []
    for count in (SHORT, LONG):
        images = map(jax.device_put, batches(args, model.spec, count=count))
        run(compiled, start(), params, images, pilot)
        found.append(peaks())
    return found


def measure_memory(
    rows: list[str], arguments: list[str]
) -> dict[str, list[dict[str, int]]]:
    """`memory_here` of every row and of an idle process, each a fresh one."""
    found = {}
    for name in require("tqdm").tqdm(["nothing", *rows], desc="memory"):
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
    inputs = params, images[0], pilot, args.hidden_every
    rows = {name: prepared(name, model, *inputs) for name in args.rows}
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
    if "step" in rows:  # nothing else stands in for it
        against = rows["step"]["peak_above_idle"][-1]
        for row in rows.values():
            last = row["peak_above_idle"][-1]
            row["peak_over_step"] = {k: last[k] / against[k] for k in last}
    return {
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "flags": {k: v for k, v in vars(args).items() if k not in ("out", "memory_of")},
        "rows": rows,
        "contraction_seconds": contraction_seconds(args),
    }


def markdown(found: dict) -> str:
    """The tables."""

    def spread(three, digits):
        middle, low, high = (f"{x:.{digits}f}" for x in three)
        return f"{middle} ({low} to {high})"

    def mb(*counts):
        return ", ".join("-" if c is None else f"{c / 1e6:,.0f}" for c in counts)

    def over(ratios):
        return ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()) if ratios else "-"

    lines = [TABLE_HEAD, "|---" * 8 + "|"]
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
            over(row.get("peak_over_step")),
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
        (
            "Rotations and injection (wpac): {:.2f} s the first time, then {:.2f} and "
            "{:.2f} s.".format(*found["contraction_seconds"])
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the tables and writes them."""
    args = parse()
    if args.memory_of:
        return print(json.dumps(memory_here(args)))
    # Memory first: a child inherits the peak of the process that starts it.
    memory = measure_memory(args.rows, sys.argv[1:])
    found = summary(measure_time(args), memory, args)
    text = markdown(found)
    print(text)
    tables.write(args.out, "statistics_pass", found, text)


if __name__ == "__main__":
    main()
