"""Whether long runs grow: resident memory against steps, of training and of serving.

    python benchmarks/memory_slope.py [--steps=2000] [--out=DIR]

Each row runs in a process of its own; those that prepare its images, where a row has any,
are counted with it. Training is PIAD of a tiny ViT on the handwritten
digits as `flax-skd train` runs it, its list growing, checkpoints and log written; serving
switches a `SubnetFamily` to a random level and asks it for logits. Garbage is collected
before a sample is taken, every 50 steps. The slope is that of least squares over the
samples after the warm-up, in which programs compile and the list grows; its standard
error takes neighbouring samples as independent, which steps of an allocator are not.
"""

import argparse
import functools
import gc
import multiprocessing
import os
import pathlib
import resource
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import tables

from flax_skd.io import augment, data, sources
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import piad, vit
from flax_skd.method.spec import SubnetSpec
from flax_skd.run import config_files, family, programs, train, training

EVERY = 50
GROWN = 20.0  # epochs in which the list grows
KINDS = {
    "PIAD, masked": {"compiled": ""},
    "PIAD, compiled sizes": {"compiled": "0.75,0.5,0.35"},
    "PIAD, masked, images by two processes": {"compiled": "", "workers": 2},
    "serving, levels switched": None,
}


def resident():
    """Bytes of this process and of its workers that lie in memory."""
    gc.collect()
    pids = "self", *(child.pid for child in multiprocessing.active_children())
    tables = [pathlib.Path(f"/proc/{pid}/statm").read_text() for pid in pids]
    return sum(int(table.split()[1]) for table in tables) * resource.getpagesize()


def network(seed):
    """A tiny network for the digits, fresh."""
    spec = training.spec_of(config_files.load("configs/scratch.py").model)
    params = vit.init(spec, jax.random.key(seed))
    full = piad.from_rows([SubnetSpec.full(spec)], spec)
    return Supernet(params, spec, full, {})


def trained(steps, workdir, *, compiled, workers=0):
    """[(step, bytes)] of a training."""
    start = network(0)
    config = config_files.load("configs/piad.py")
    config.piad.compiled, config.piad.progressive_epochs = compiled, GROWN
    program = programs.piad_program(config, start)
    source = sources.open_source("digits:train", num_classes=start.spec.num_classes)
    batches = data.train_batches(
        source,
        start.spec,
        batch_size=config.data.batch_size,
        seed=0,
        augment=functools.partial(augment.shift_crop, pad=1, flip=0.0),
        workers=workers,
    )
    samples = []
    before = program.before_step or (lambda step, extra: (extra, program.loss))

    def sampled(step, extra):
        if step % EVERY == 0:
            samples.append((step, resident()))
        return before(step, extra)

    optimizer = train.make_optimizer(1e-3, weight_decay=0.05, clip_norm=1.0)
    train.fit(
        train.initial_state(
            program.params, optimizer, jax.random.key(1), extra=program.extra
        ),
        batches,
        loss=program.loss,
        optimizer=optimizer,
        steps=steps,
        workdir=workdir,
        checkpoint_every=250,
        before_epoch=program.before_epoch,
        before_step=sampled,
        before_loss=program.before_loss,
        epoch_steps=len(source) // config.data.batch_size,
        ema_decay=0.99,
        log_every_steps=EVERY,
    )
    batches.close()
    return samples


def served(steps):
    """[(switch, bytes)] of a family that is switched before every batch."""
    start = network(0)
    start = start._replace(dropout_list=piad.uniform(start.spec, steps=8))
    serving = family.SubnetFamily(start, executables=32)
    rng, samples = np.random.default_rng(0), []
    side = start.spec.image_size
    size = (16, side, side, start.spec.in_channels)
    for step in range(1, steps + 1):
        serving.use(level=int(rng.integers(8)))
        np.asarray(serving(rng.integers(0, 256, size).astype(np.uint8)))
        if step % EVERY == 0:
            samples.append((step, resident()))
    return samples


def slope(samples, warm_up):
    """MB for 1,000 steps by least squares after the warm-up, and its standard error."""
    steps, used = np.array([s for s in samples if s[0] > warm_up], float).T
    x, y = steps - steps.mean(), used / 1e6 - used.mean() / 1e6
    value = (x @ y) / (x @ x)
    spread = np.sqrt(((y - value * x) ** 2).sum() / max(len(x) - 2, 1) / (x @ x))
    return 1e3 * value, 1e3 * spread


def measure(pipe, kind, steps):
    """Sends the samples of one row."""
    options = KINDS[kind]
    with tempfile.TemporaryDirectory() as workdir:
        made = served(steps) if options is None else trained(steps, workdir, **options)
    pipe.send(made)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm_up", type=int, default=500)
    parser.add_argument("--rows", default="", help="those whose name has this in it")
    parser.add_argument("--out", default="", help="folder for JSON and Markdown")
    args = parser.parse_args()
    if args.warm_up < 0 or args.steps - args.warm_up < 3 * EVERY:
        parser.error(f"--steps must be --warm_up and {3 * EVERY} more")
    context, rows = multiprocessing.get_context("spawn"), []
    lines = ["| | steps | MB at the end | MB for 1,000 steps |", "|---|---|---|---|"]
    for kind in (name for name in KINDS if args.rows in name):
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=measure, args=(theirs, kind, args.steps))
        worker.start()
        theirs.close()
        samples = ours.recv()
        worker.join()
        value, spread = slope(samples, args.warm_up)
        rows.append({"row": kind, "samples": samples, "slope": value, "error": spread})
        end = samples[-1][1] / 1e6
        lines.append(
            f"| {kind} | {args.steps} | {end:.0f} | {value:.2f} +- {spread:.2f} |"
        )
        print(lines[-1], flush=True)
    text = "\n".join(lines)
    print(text)
    tables.write(args.out, "memory_slope", rows, text)


if __name__ == "__main__":
    main()
