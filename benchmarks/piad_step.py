"""Time of a PIAD step, masked or in compiled sizes, over the dense step of the network.

    python benchmarks/piad_step.py [--variant=Ti/16] [--image_size=224] [--out=DIR]
        [--list=docs/networks/cifar10_ti16_64px_piad]

All are steps of `train.fit` with AdamW, side by side, taking turns; random weights and
images serve. The masked step is compiled once and pays for the whole network at every
level; compiled sizes (`run.buckets`) are a few programs, each paying for its own, and
each is timed: what a step takes in the mean is their sum by the levels they have. The
"repaired" steps train a network whose cuts least squares repairs, by random factors.
`--list` takes the levels of a super-network of the same depth and heads; those of a
wider or narrower MLP are taken in proportion.
"""

import argparse
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import random_inputs
import tables
from rival_steps import freed_memory

from flax_skd.io import checkpoint
from flax_skd.io.extras import require
from flax_skd.method import compensation, macs, piad, vit
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.run import buckets, objective, sharding, timing, train, updates
from flax_skd.run.commands import DTYPES


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


def listed(path: str, spec: ViTSpec) -> piad.DropoutList:
    """The levels of a super-network, its hidden units in proportion to the spec's."""
    network = checkpoint.load_supernet(path)
    levels, full = network.dropout_list, network.spec.mlp_dim
    return levels._replace(mlp_dim=np.asarray(levels.mlp_dim) * spec.mlp_dim // full)


KINDS = ("masked", "masked repaired", "sizes", "sizes repaired")


class Kind(NamedTuple):
    """One kind of training.

    Attributes:
      shares: of the MACs, where compiled sizes begin; () for one program.
      loss_of: function of the widths of a program -> its loss.
      repairs: of the cuts, or None.
    """

    shares: tuple[float, ...]
    loss_of: Callable[[SubnetSpec], objective.Loss]
    repairs: compensation.Compensation | None


def kinds_of(spec: ViTSpec, shares: tuple[float, ...], dtype: Any) -> dict[str, Kind]:
    """What is compared; the dense step is the first."""

    def dense(widths):
        del widths
        return objective.classification_loss(vit.ViT(spec, dtype=dtype))

    def masked(widths):
        del widths
        cut_of = objective.sampled_levels(spec)
        model = vit.ViT(spec, dtype=dtype)
        return objective.classification_loss(model, cut_of=cut_of)

    def within(widths):
        cut_of = objective.level_within(spec, widths)
        model = vit.ViT(spec, widths, dtype=dtype)
        return objective.classification_loss(model, cut_of=cut_of)

    repairs = random_repairs(spec)
    return {
        "dense": Kind((), dense, None),
        "masked": Kind((), masked, None),
        "masked repaired": Kind((), masked, repairs),
        "sizes": Kind(shares, within, None),
        "sizes repaired": Kind(shares, within, repairs),
    }


class _Compiling:
    """What JAX has spent so far on tracing, lowering and compiling."""

    seconds = 0.0

    @classmethod
    def on_event(cls, event: str, seconds: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            cls.seconds += seconds


class Run:
    """A training of one kind, as `train.fit` runs it, on one device.

    Attributes:
      programs: [(share of the levels, step without arguments)].
      compiling: seconds of tracing, lowering and compiling these, as JAX reports them.
    """

    def __init__(
        self,
        spec: ViTSpec,
        kind: Kind,
        levels: piad.DropoutList,
        batch,
        accumulate: int = 1,
    ):
        optimizer = train.make_optimizer(1e-4)
        extra = objective.Elastic(levels, kind.repairs, np.int32(0))
        params, rng = vit.init(spec, jax.random.key(0)), jax.random.key(1)
        mesh = sharding.mesh(devices=jax.devices()[:1])
        state = train.initial_state(params, optimizer, rng, extra=extra)
        place = sharding.param_sharding(state, mesh)
        self._state, self._batch = sharding.copy_to(state, place), batch
        cut = functools.partial(objective.cut_params, spec=spec)
        step_of = updates.compiled(
            mesh,
            place,
            several=bool(kind.shares),
            before_loss=cut if kind.shares else None,
            optimizer=optimizer,
            ema_decay=0.999,
            accumulate=accumulate,
        )
        firsts = [*buckets.starts(levels, spec, kind.shares), int(levels.levels) + 1]
        self.programs = []
        before = _Compiling.seconds
        for first, after in itertools.pairwise(firsts):
            widths = buckets.coarse(levels.widths(first, spec), spec)
            step = step_of(kind.loss_of(widths))
            run = functools.partial(self._step, step, np.int32(after - 1))
            self.programs.append(((after - first) / firsts[-1], run))
            jax.block_until_ready(run())
        self.compiling = _Compiling.seconds - before

    def _step(self, step, level):
        extra = self._state.extra._replace(level=level)
        self._state, metrics = step(self._state._replace(extra=extra), self._batch)
        return self._state.params, metrics


def compile_times(run_of: Callable[[str], Run], names: list[str], rounds: int):
    """Name -> compile times over the first name's of the same round: median, quartiles."""
    ratios = []
    for _ in range(rounds):
        seconds = []
        for name in names:
            jax.clear_caches()
            seconds.append(run_of(name).compiling)
        ratios.append(np.array(seconds) / seconds[0])
    found = np.quantile(ratios, (0.5, 0.25, 0.75), axis=0)
    return dict(zip(names, found.T.tolist(), strict=True))


def main() -> None:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="Ti/16", help="such as S/16")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--least_s", type=float, default=0.02, help="of a measurement")
    parser.add_argument("--compile_rounds", type=int, default=3, help="0: once")
    parser.add_argument("--shares", default="0.75,0.5,0.3", help="compiled sizes")
    parser.add_argument("--kinds", default=",".join(KINDS), help="compared with dense")
    parser.add_argument("--list", help="super-network whose levels are drawn")
    parser.add_argument("--out", help="directory for piad_step.json and piad_step.md")
    args = parser.parse_args()
    jax.monitoring.register_event_duration_secs_listener(_Compiling.on_event)
    spec = ViTSpec.named(args.variant, image_size=args.image_size)
    shares = tuple(map(float, args.shares.split(",")))
    batch = random_inputs.batch(spec, args.batch_size, np.random.default_rng(0))
    levels = piad.uniform(spec)
    if args.list:
        levels = listed(args.list, spec)
    smallest = macs.macs(spec, levels.widths(int(levels.levels), spec))
    kinds = kinds_of(spec, shares, DTYPES[args.dtype])
    names = ["dense", *args.kinds.split(",")]

    def run_of(name, images):
        cut = {field: array[:images] for field, array in batch.items()}
        return Run(spec, kinds[name], levels, cut, args.accumulate)

    few = 8 * args.accumulate  # compile as long as many
    compiling = {}
    if args.compile_rounds:
        compiling = compile_times(
            lambda name: run_of(name, few), names, args.compile_rounds
        )
    runs = {name: run_of(name, args.batch_size) for name in names}
    programs = {
        f"{name} {i}": program
        for name, run in runs.items()
        for i, (_, program) in enumerate(run.programs)
    }
    bar = require("tqdm").tqdm(total=args.rounds * (len(programs) - 1))
    times = timing.paired(
        programs,
        against="dense 0",
        rounds=args.rounds,
        least=args.least_s,
        ahead=True,
        progress=bar.update,
    )
    bar.close()
    found = {}
    for name, run in runs.items():
        # Every level is as likely: a program counts by its share of them.
        rows = [
            (part, times[f"{name} {i}"]) for i, (part, _) in enumerate(run.programs)
        ]
        found[name] = {
            field: sum(part * getattr(row, field) for part, row in rows)
            for field in ("ratio", "low", "high")
        }
        found[name]["programs"] = [{"levels": p, **row._asdict()} for p, row in rows]
        once = run.compiling / runs["dense"].compiling
        found[name]["compile_ratio"] = compiling.get(name, (once,) * 3)
    lines = [
        "| step | time / dense (quartiles) | each program | compile time / dense (quartiles) |",
        "|---|---|---|---|",
    ]
    for name, row in found.items():
        compiled, low, high = row["compile_ratio"]
        each = ", ".join(f"{program['ratio']:.2f}" for program in row["programs"])
        lines.append(
            f"| {name} | {row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f}) | "
            f"{each} | {compiled:.1f} ({low:.1f} to {high:.1f}) |"
        )
    lines.append(
        f"\n{args.variant} at {args.image_size}, {args.dtype}, batch {args.batch_size}, "
        f"{args.rounds} rounds that take turns, a list of {int(levels.levels)} levels down "
        f"to {smallest / macs.macs(spec):.0%} of the MACs, sizes compiled at 1 and "
        f"{args.shares} of the MACs, freed memory {freed_memory()}; {jax.devices()[0].device_kind}, {os.cpu_count()} "
        f"cores, jax {jax.__version__}."
    )
    text = "\n".join(lines)
    found["freed_memory"] = freed_memory()
    found["flags"] = {k: v for k, v in vars(args).items() if k != "out"}
    print(text)
    tables.write(args.out, "piad_step", found, text)


if __name__ == "__main__":
    main()
