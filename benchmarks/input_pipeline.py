"""Images/s per core of the training input: augmented, and grain's ceiling, decode alone.

    python benchmarks/input_pipeline.py [--augment=deit] [--source=tar:IMAGES.tar] [--out=DIR]

Without a source: JPEGs of about 500 x 375 pixels made of smooth random fields with
grain, which cost a decoder what photographs do. Rows take turns: grain with nothing but
the decoder; grain with decoder and the resize of evaluation; the same decoder and
augmentation as training in a loop, which is what they cost by themselves; the batches a
training run draws (`data.train_batches`), prepared by threads and by `--workers` processes.
The first batches start them, fill buffers and are not counted. A run's own waiting is
`data_wait` in its log lines. Last, how much of an image is done under Python's lock, which
bounds what the threads of a process can do together.
"""

import argparse
import contextlib
import functools
import io
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import tables

from flax_skd.io import augment, data, preprocess, sources
from flax_skd.io.examples import EncodedSource
from flax_skd.io.extras import require
from flax_skd.method.spec import ViTSpec

AUGMENT = {"deit": augment.deit, "flip_crop": augment.flip_crop, "none": augment.none}
TITLES = {
    "decode": "grain, decode alone",
    "resize": "grain, decode and the square of evaluation",
    "plain": "a loop on one core, decode and augment",
    "train": "train_batches, decode and augment",
    "workers": "train_batches, by processes",
}


def photograph(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG of smooth random fields of several scales and a little grain."""
    pil = require("PIL.Image")
    width, height = size
    total = np.full((height, width, 3), 128.0)
    for scale in (4, 16, 64):
        coarse = rng.normal(size=(scale * 3 // 4, scale, 3))
        for channel in range(3):
            field = pil.fromarray(coarse[..., channel].astype(np.float32))
            field = field.resize(size, pil.Resampling.BICUBIC)
            total[..., channel] += 160 / scale**0.5 * np.asarray(field)
    total += rng.normal(scale=4, size=total.shape)
    file = io.BytesIO()
    pixels = np.clip(total, 0, 255).astype(np.uint8)
    pil.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def generated(count: int) -> tuple[EncodedSource, float]:
    """A source of images in memory, and their mean size in kilobytes."""
    rng = np.random.default_rng(0)
    sizes = [(500, 375), (375, 500), (500, 333)]
    files = [photograph(rng, sizes[i % 3]) for i in range(count)]
    names = [f"image {i}" for i in range(count)]
    source = EncodedSource(
        files.__getitem__,
        names,
        labels=[i % 10 for i in range(count)],
        name="generated",
    )
    return source, sum(map(len, files)) / count / 1e3


def grain_batches(source: Any, args: argparse.Namespace, transform: Any) -> Iterator:
    """Endless batches by grain alone, its threads as `data.train_batches` has them."""
    grain = require("grain")
    count = data._threads()
    options = grain.ReadOptions(num_threads=count, prefetch_buffer_size=4 * count)
    positions = grain.MapDataset.range(len(source)).seed(0).shuffle().repeat()
    made = positions.map(lambda i: transform(source[int(i)].image))
    return iter(made.to_iter_dataset(options))


def rows(source: Any, spec: ViTSpec, args: argparse.Namespace) -> dict[str, Iterator]:
    """Row -> an endless iterator, one item an image."""

    def trained(workers):
        batches = data.train_batches(
            source,
            spec,
            batch_size=min(args.batch_size, len(source)),
            seed=0,
            augment=AUGMENT[args.augment],
            workers=workers,
        )
        with contextlib.closing(batches):
            for batch in batches:
                yield from batch["image"]

    def loop():
        for i in itertools.cycle(range(len(source))):
            rng = np.random.default_rng(i)
            yield AUGMENT[args.augment](source[i].image, rng, spec)

    square = functools.partial(preprocess.evaluation, spec=spec)
    return {
        "decode": grain_batches(source, args, lambda image: image.size),
        "resize": grain_batches(source, args, square),
        "plain": loop(),
        "train": trained(0),
        "workers": trained(args.workers),
    }


def measure(source: Any, args: argparse.Namespace) -> dict[str, list[dict]]:
    """Wall and CPU seconds of every turn of every row."""
    spec = ViTSpec.named("B/16", image_size=args.image_size)
    found: dict[str, list[dict]] = {name: [] for name in TITLES}
    for turn in require("tqdm").trange(args.rounds + 1):
        for name in sorted(TITLES, reverse=bool(turn % 2)):
            # One row's threads at a time: those of an idle one fill their buffers.
            images = rows(source, spec, args)[name]
            for _ in itertools.islice(images, args.batch_size):
                pass
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in itertools.islice(images, args.images):
                pass
            times = {
                "wall": time.perf_counter() - wall,
                "cpu": time.process_time() - cpu,
            }
            del images
            if turn:
                found[name].append(times)
    return found


def under_lock(source: Any, args: argparse.Namespace) -> tuple[float, float]:
    """(ms under Python's lock, ms) an image takes one thread, by another that looks.

    A thread that wakes must have the lock: where it is late, and later than 99 of 100
    wakings beside nothing, the lock was held. Short holds are not seen.
    """
    spec = ViTSpec.named("B/16", image_size=args.image_size)
    pause, before = 5e-4, sys.getswitchinterval()
    sys.setswitchinterval(5.0)  # nobody is made to let go
    stop = threading.Event()

    def lateness() -> float:
        start = time.perf_counter()
        time.sleep(pause)
        return time.perf_counter() - start - pause

    def looking() -> None:
        while not stop.is_set():
            late.append(lateness())

    usual = np.percentile([lateness() for _ in range(2000)], 99)
    late: list[float] = []
    other = threading.Thread(target=looking)
    other.start()
    start = time.perf_counter()
    for i in range(args.images):
        rng = np.random.default_rng(i)
        AUGMENT[args.augment](source[i % len(source)].image, rng, spec)
    taken = 1e3 * (time.perf_counter() - start) / args.images
    stop.set()
    other.join()
    sys.setswitchinterval(before)
    return float(np.mean(np.array(late) > usual)) * taken, taken


def summary(found: dict[str, list[dict]], args: argparse.Namespace) -> dict[str, dict]:
    """Rates and ratios to decoding, medians with the least and the most."""

    def spread(values):
        return [float(np.median(values)), float(min(values)), float(max(values))]

    cores = os.cpu_count() or 1
    rates = {
        name: [
            args.images / t["wall"] / (1 if name == "plain" else cores) for t in turns
        ]
        for name, turns in found.items()
    }
    return {
        name: {
            "images_per_s_core": spread(rates[name]),
            "images_per_cpu_s": spread([args.images / t["cpu"] for t in turns]),
            "of_ceiling": spread(np.divide(rates[name], rates["decode"])),
        }
        for name, turns in found.items()
    }


def markdown(rows: dict[str, dict], size: float, args: argparse.Namespace) -> str:
    """The table."""
    lines = [
        "| pipeline | images/s per core | images per CPU second | of the ceiling |",
        "|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [
            "{:.0f} ({:.0f} to {:.0f})".format(*row[key])
            for key in ("images_per_s_core", "images_per_cpu_s")
        ]
        if name == "workers":
            cells[1] = ""  # the time of other processes is not seen here
        share = "{:.2f} ({:.2f} to {:.2f})".format(*row["of_ceiling"])
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} | {share} |")
    kind = args.source or f"generated JPEGs of {size:.0f} kB"
    lines.append(
        f"\n{kind}, to {args.image_size} pixels, augment {args.augment}, {args.images} "
        f"images a turn, {args.rounds} rounds, median (least to most); "
        f"{os.cpu_count()} cores, {data._threads()} threads or {args.workers} processes."
    )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--source", help="images to read instead, such as tar:PATH or folder:PATH")
    add("--labels", help="of a tar: sorted, or a JSON file {name: class}")
    add("--augment", default="deit", choices=AUGMENT)
    add("--image_size", type=int, default=224)
    add("--batch_size", type=int, default=64)
    add("--images", type=int, default=512, help="of one row in one turn")
    add("--generated", type=int, default=64, help="different JPEGs to make")
    add("--workers", type=int, default=os.cpu_count(), help="processes of the last row")
    add("--rounds", type=int, default=5)
    add("--out", help="directory for input_pipeline.json and input_pipeline.md")
    args = parser.parse_args()
    if args.source:
        source, size = sources.open_source(args.source, labels=args.labels), 0.0
    else:
        source, size = generated(args.generated)
    found = summary(measure(source, args), args)
    held = [under_lock(source, args) for _ in range(args.rounds)]
    found["under_lock_ms"] = held
    lock, whole = np.median(held, axis=0)
    text = markdown({name: found[name] for name in TITLES}, size, args)
    text += (
        f"\n\nPython's lock: {lock:.2f} of {whole:.2f} ms an image on one core, so at most "
        f"{1e3 / lock:.0f} images/s by the threads of a process."
    )
    print(text)
    flags = {k: v for k, v in vars(args).items() if k != "out"}
    facts = {"rows": found, "cores": os.cpu_count(), "flags": flags}
    tables.write(args.out, "input_pipeline", facts, text)


if __name__ == "__main__":
    main()
