"""Time of a PIAD step, masked or in compiled sizes, over the dense step of the network.

    python benchmarks/piad_step.py [--variant=Ti/16] [--image_size=224] [--out=DIR]
        [--list=docs/networks/cifar10_ti16_64px_piad]

All are `train.train_step` with AdamW, side by side, taking turns; random weights and
images serve. The masked step is compiled once and pays for the whole network at every
level; compiled sizes (`run.buckets`) are a few programs, each paying for its own. The
"repaired" steps train a network whose cuts least squares repairs, by random factors.
`--list` takes the levels of a super-network of the same depth and widths.
"""

import argparse
import functools
import json
import os
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.io import checkpoint
from flax_skd.io.extras import require
from flax_skd.method import compensation, macs, piad, vit
from flax_skd.method.spec import ViTSpec
from flax_skd.run import buckets, objective, train


def random_repairs(spec: ViTSpec) -> compensation.Compensation:
    """Means and lower factors of the shapes that a contraction stores."""
    rng = np.random.default_rng(2)

    def repairs(size):
        factor = np.eye(size) + np.tril(rng.normal(size=(size, size)), -1) / size
        mean = rng.normal(size=size)
        return compensation.Repair(
            *(jnp.asarray(x, jnp.float32) for x in (mean, factor))
        )

    sizes = compensation.inner_units(spec)
    return compensation.Compensation(
        **{
            kind: tuple(repairs(n) for _ in range(spec.depth))
            for kind, n in sizes.items()
        }
    )


def steps_of(spec: ViTSpec, levels: piad.DropoutList, shares: tuple[float, ...]):
    """(name, state, function of the step -> (extra, loss)) of each kind of training."""

    def bucket_loss(within):
        return objective.classification_loss(
            vit.ViT(spec, within), cut_of=objective.levels_within(spec, within)
        )

    taken = buckets.Buckets(spec, bucket_loss, shares=shares, seed=0)
    window = np.zeros(2, np.int32)
    masked = objective.classification_loss(
        vit.ViT(spec), cut_of=objective.sampled_levels(spec)
    )
    repairs = random_repairs(spec)
    kinds = {
        "dense": (objective.classification_loss(vit.ViT(spec)), None),
        "masked": (masked, None),
        "masked, repaired": (masked, repairs),
        "compiled sizes": (None, None),
        "compiled sizes, repaired": (None, repairs),
    }
    for name, (loss, repair) in kinds.items():
        extra = objective.Elastic(levels, repair, window)
        state = train.initial_state(
            vit.init(spec, jax.random.key(0)),
            train.make_optimizer(1e-4),
            jax.random.key(1),
            extra=extra,
        )
        before_step = taken.before_step
        if loss:
            before_step = functools.partial(_always, loss)
        yield name, state, before_step


def _always(loss, step, extra):
    del step
    return extra, loss


def compiled(loss, name: str, traces: list[str]):
    """The jitted step of a loss."""

    def counted(*args):
        traces.append(name)
        return loss(*args)

    step = functools.partial(
        train.train_step,
        loss=counted,
        optimizer=train.make_optimizer(1e-4),
        ema_decay=0.999,
    )
    return jax.jit(step, donate_argnums=0)


def main() -> None:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="Ti/16", help="such as S/16")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=32)
    parser.add_argument("--shares", default="0.75,0.5,0.3", help="compiled sizes")
    parser.add_argument("--list", help="super-network whose levels are drawn")
    parser.add_argument("--out", help="directory for piad_step.json and piad_step.md")
    args = parser.parse_args()
    spec = ViTSpec.named(args.variant, image_size=args.image_size)
    shares = tuple(map(float, args.shares.split(",")))
    rng = np.random.default_rng(0)
    shape = (args.batch_size, spec.image_size, spec.image_size, 3)
    batch = {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": rng.integers(0, spec.num_classes, args.batch_size, np.int32),
    }
    traces: list[str] = []
    levels = piad.uniform(spec)
    if args.list:
        levels = checkpoint.load_supernet(args.list).dropout_list
    smallest = macs.macs(spec, levels.widths(int(levels.levels), spec)) / macs.macs(
        spec
    )
    rows = {n: [state, of] for n, state, of in steps_of(spec, levels, shares)}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    compiling: dict[str, float] = dict.fromkeys(rows, 0.0)
    programs: dict = {}
    for turn in require("tqdm").trange(args.rounds):
        for name, row in sorted(rows.items(), reverse=bool(turn % 2)):
            state, before_step = row
            extra, loss = before_step(turn, state.extra)
            state = state._replace(extra=jax.tree.map(jnp.copy, extra))
            key = (name, loss)
            if key not in programs:
                before = time.perf_counter()
                step = compiled(loss, name, traces).lower(state, batch).compile()
                programs[key] = step
                compiling[name] += time.perf_counter() - before
            before = time.perf_counter()
            row[0], metrics = programs[key](state, batch)
            jax.block_until_ready((row[0].params, metrics))
            seconds[name].append(time.perf_counter() - before)
    # Levels differ from step to step: sums over all rounds, not medians of ratios.
    dense = sum(seconds["dense"])
    half = args.rounds // 2
    found = {
        name: {
            "ratio": sum(times) / dense,
            "halves": [
                sum(part) / sum(other)
                for part, other in (
                    (times[:half], seconds["dense"][:half]),
                    (times[half:], seconds["dense"][half:]),
                )
            ],
            "images_per_second": args.batch_size * args.rounds / sum(times),
            "programs": traces.count(name),
            "compile_ratio": compiling[name] / compiling["dense"],
        }
        for name, times in seconds.items()
    }
    lines = [
        "| step | images/s | time / dense (halves) | programs | compile time / dense |",
        "|---|---|---|---|---|",
    ]
    for name, row in found.items():
        first, second = row["halves"]
        lines.append(
            f"| {name} | {row['images_per_second']:.1f} | {row['ratio']:.2f} "
            f"({first:.2f}, {second:.2f}) | {row['programs']} | "
            f"{row['compile_ratio']:.1f} |"
        )
    lines.append(
        f"\n{args.variant} at {args.image_size}, float32, batch {args.batch_size}, "
        f"{args.rounds} rounds that take turns, a list of {int(levels.levels)} levels down "
        f"to {smallest:.0%} of the MACs, sizes "
        f"compiled at 1 and {args.shares} of the MACs; {jax.devices()[0].device_kind}, "
        f"{os.cpu_count()} cores, jax {jax.__version__}."
    )
    text = "\n".join(lines)
    found["flags"] = {k: v for k, v in vars(args).items() if k != "out"}
    print(text)
    if args.out:
        out = pathlib.Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "piad_step.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / "piad_step.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
