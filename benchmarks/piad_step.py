"""Time of the masked PIAD step over the dense step of the same network.

    python benchmarks/piad_step.py [--variant=Ti/16] [--image_size=224] [--out=DIR]

Both are `train.train_step` with AdamW, side by side, taking turns; random weights and
images serve. The PIAD step draws a level of a real list's size each time, and must be
compiled once.
"""

import argparse
import functools
import json
import os
import pathlib
import statistics
import time

import jax
import numpy as np

from flax_skd.io.extras import require
from flax_skd.method import piad, vit
from flax_skd.method.spec import ViTSpec
from flax_skd.run import objective, train


def steps_of(spec: ViTSpec, batch: dict, traces: list[str]):
    """(state, compiled step) of dense and of PIAD training."""
    model, optimizer = vit.ViT(spec), train.make_optimizer(1e-4)
    losses = {
        "dense": objective.classification_loss(model),
        "piad": objective.classification_loss(
            model, cut_of=objective.sampled_levels(spec)
        ),
    }
    for name, loss in losses.items():

        def counted(*args, name=name, loss=loss):
            traces.append(name)
            return loss(*args)

        state = train.initial_state(
            vit.init(spec, jax.random.key(0)),
            optimizer,
            jax.random.key(1),
            extra=objective.Elastic(piad.uniform(spec)),
        )
        step = functools.partial(
            train.train_step, loss=counted, optimizer=optimizer, ema_decay=0.999
        )
        yield name, [state, jax.jit(step, donate_argnums=0)]


def main() -> None:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="Ti/16", help="such as S/16")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", help="directory for piad_step.json and piad_step.md")
    args = parser.parse_args()
    spec = ViTSpec.named(args.variant, image_size=args.image_size)
    rng = np.random.default_rng(0)
    shape = (args.batch_size, spec.image_size, spec.image_size, 3)
    batch = {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": rng.integers(0, spec.num_classes, args.batch_size, np.int32),
    }
    traces: list[str] = []
    rows = dict(steps_of(spec, batch, traces))
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in require("tqdm").trange(args.rounds + 1):
        for name, row in sorted(rows.items(), reverse=bool(turn % 2)):
            before = time.perf_counter()
            row[0], metrics = row[1](row[0], batch)
            jax.block_until_ready((row[0].params, metrics))
            if turn:  # the first compiles
                seconds[name].append(time.perf_counter() - before)
    ratios = [a / b for a, b in zip(seconds["piad"], seconds["dense"])]
    compiled = {name: traces.count(name) for name in rows}
    found = {
        "ratio": [statistics.median(ratios), min(ratios), max(ratios)],
        "images_per_second": {
            name: args.batch_size / statistics.median(s) for name, s in seconds.items()
        },
        "traces": compiled,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "flags": {k: v for k, v in vars(args).items() if k != "out"},
    }
    middle, low, high = found["ratio"]
    text = (
        "| step | images/s | time over dense | traces |\n|---|---|---|---|\n"
        f"| dense | {found['images_per_second']['dense']:.1f} | 1 | "
        f"{compiled['dense']} |\n"
        f"| PIAD, masked | {found['images_per_second']['piad']:.1f} | {middle:.2f} "
        f"({low:.2f} to {high:.2f}) | {compiled['piad']} |\n\n"
        f"{args.variant} at {args.image_size}, float32, batch {args.batch_size}, median "
        f"of {args.rounds} rounds (least to most); {found['device']}, "
        f"{found['cores']} cores, jax {found['jax']}."
    )
    print(text)
    if args.out:
        out = pathlib.Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "piad_step.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / "piad_step.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
