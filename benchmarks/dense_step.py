"""The dense train step beside a plain Flax ViT's with optax, and beside PyTorch.

    python benchmarks/dense_step.py [--variant=Ti/16] [--batch_size=64] [--torch] [--out=DIR]

Random weights and images serve. Three measures: `forward`; `gradient`, forward and
backward; `step`, the whole update (normalisation of uint8 pixels, AdamW with decay of
kernels alone, and with --ema a moving average, on both sides). In each, every program
takes turns with ours in one process. `plain` has the layout of heads that is fastest on
a CPU, `textbook` is `nn.MultiHeadDotProductAttention`. On a CPU with glibc a step pays for
every page it touches, unless freed memory is kept:
`MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=-1` before the command.
"""

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import random_inputs
import rival_steps
import tables
from rival_steps import DECAY, KEEP, RATE, Step, freed_memory, program

from flax_skd.method import attention, macs, vit
from flax_skd.method.spec import ViTSpec
from flax_skd.run import objective, time_budget, timing, train
from flax_skd.run.commands import DTYPES

ATTENTION = {
    "fastest": attention.fastest_attention,
    "einsum": attention.einsum_attention,
    "dot_product": attention.dot_product_attention,
}
MEASURES = ("forward", "gradient", "step")
# Dense bfloat16 peaks in teraflops, of the makers' data sheets.
PEAKS = {
    "NVIDIA H200": 989,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA L4": 121,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
}


def ours(spec: ViTSpec, batch: Any, args: argparse.Namespace) -> dict[str, Callable]:
    """Measure -> what makes its program, of this package."""
    model = vit.ViT(spec, dtype=DTYPES[args.dtype], attention=ATTENTION[args.attention])
    loss = objective.classification_loss(model)
    params = vit.init(spec, jax.random.key(0))
    kernel = params["head"]["kernel"]  # zeros, with which all gradients are zeros
    head = {"kernel": 0.02 * jax.random.normal(jax.random.key(3), kernel.shape)}
    params = params | {"head": params["head"] | head}
    optimizer = train.make_optimizer(RATE, weight_decay=DECAY)
    state = train.initial_state(params, optimizer, jax.random.key(1))
    update = functools.partial(
        train.train_step, loss=loss, optimizer=optimizer, ema_decay=KEEP
    )
    rng = jax.random.key(2)
    return {
        "forward": lambda: program(
            lambda p, b: model.apply({"params": p}, b["image"]), params, batch
        ),
        "gradient": lambda: program(
            jax.value_and_grad(lambda p, b: loss(p, b, rng, None)[0]), params, batch
        ),
        "step": lambda: Step(
            update, state if args.ema else state._replace(ema=None), batch
        ),
    }


def measure(args: argparse.Namespace) -> dict[str, dict[str, dict]]:
    """Measure -> row -> times."""
    spec = ViTSpec.named(args.variant, image_size=args.image_size)
    spec = spec.replace(depth=args.depth or spec.depth)
    drawn = random_inputs.batch(spec, args.batch_size, np.random.default_rng(0))
    batch = jax.device_put(drawn)
    rows = {"ours": ours(spec, batch, args)}
    for name in filter(None, args.rows.split(",")):
        rows[name] = rival_steps.plain(spec, batch, args, rival_steps.PLAIN[name])
    if args.torch:
        rows["pytorch"] = rival_steps.pytorch(spec, batch, args)
    flops = 2 * macs.macs(spec) * args.batch_size
    peak = args.peak_tflops or PEAKS.get(jax.devices()[0].device_kind, 0)
    found = {}
    for name in args.measures.split(","):
        programs = {row: made[name]() for row, made in rows.items() if name in made}
        times = timing.paired(
            programs,
            against="ours",
            rounds=args.rounds,
            least=args.least_s,
            ahead=name == "step",
        )
        work = flops * (1 if name == "forward" else 3)
        found[name] = {
            row: time._asdict()
            | {"images_per_s": args.batch_size / time.seconds}
            | ({"peak_share": work / time.seconds / peak / 1e12} if peak else {})
            for row, time in times.items()
        }
    return found


def markdown(found: dict[str, dict[str, dict]], args: argparse.Namespace) -> str:
    """The table."""
    lines = [
        "| measure | program | images/s | our time over its (quartiles) | of the peak |",
        "|---|---|---|---|---|",
    ]
    for name, rows in found.items():
        for row, time in rows.items():
            share = f"{100 * time['peak_share']:.1f} %" if "peak_share" in time else ""
            lines.append(
                f"| {name} | {row} | {time['images_per_s']:.1f} | "
                f"{1 / time['ratio']:.3f} ({1 / time['high']:.3f} to "
                f"{1 / time['low']:.3f}) | {share} |"
            )
    blocks = f"{args.depth} blocks, " if args.depth else ""
    average = "with" if args.ema else "without"
    lines.append(
        f"\n{args.variant} at {args.image_size}, {blocks}{args.dtype}, batch {args.batch_size}, "
        f"{average} a moving average, attention {args.attention}, freed memory "
        f"{freed_memory()}, {args.rounds} rounds; {time_budget.device_name()}, "
        f"{os.cpu_count()} cores, jax {jax.__version__}."
    )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--variant", default="Ti/16", help="such as S/16")
    add("--image_size", type=int, default=224)
    add("--depth", type=int, default=0, help="blocks, if not the variant's")
    add("--batch_size", type=int, default=64)
    add("--rounds", type=int, default=9)
    add("--least_s", type=float, default=0.02, help="seconds of one measurement")
    add("--dtype", default="float32", choices=DTYPES)
    add("--attention", default="fastest", choices=ATTENTION, help="of ours")
    add("--rows", default="plain", help="of plain,textbook, between commas")
    add("--measures", default=",".join(MEASURES))
    add("--ema", action="store_true", help="a moving average, on both sides")
    add("--torch", action="store_true", help="PyTorch too, which must be installed")
    add("--peak_tflops", type=float, default=0.0, help="of a device not in the table")
    add("--out", help="directory for dense_step.json and dense_step.md")
    args = parser.parse_args()
    found = measure(args)
    text = markdown(found, args)
    print(text)
    flags = {k: v for k, v in vars(args).items() if k != "out"}
    facts = {"rows": found, "cores": os.cpu_count(), "flags": flags}
    facts["freed_memory"] = freed_memory()
    tables.write(args.out, "dense_step", facts, text)


if __name__ == "__main__":
    main()
