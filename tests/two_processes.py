"""Calibration, growth and three steps; run on its own, one of two processes of it."""

import json
import pathlib
import sys

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils

from flax_skd.io import augment, data, processes, run_state
from flax_skd.io.sources import ArraySource
from flax_skd.method import (
    compensation,
    growth,
    importance,
    macs,
    piad,
    statistics,
    vit,
)
from flax_skd.method.spec import ViTSpec
from flax_skd.method.vit import ViT
from flax_skd.run import buckets, evaluate, feed, objective, sharding, train

SPEC = ViTSpec(
    image_size=8,
    patch_size=4,
    width=16,
    depth=1,
    num_heads=2,
    mlp_dim=24,
    num_classes=3,
    crop_fraction=1.0,
)
IMAGES = 13  # no multiple of anything: the second process has one image less


def images():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (IMAGES, 8, 8, 3)).astype(np.uint8)
    return ArraySource(pixels, np.arange(IMAGES) % 3, num_classes=3)


def parameters():
    """Without a zero, so that every gradient flows."""
    fresh = vit.init(SPEC, jax.random.key(0))
    leaves, tree = jax.tree.flatten(fresh)
    rng = np.random.default_rng(1)
    noise = [0.1 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return tree.unflatten([np.asarray(x) + n for x, n in zip(leaves, noise)])


def results(mesh, workdir):
    """What one process and two must agree on; numpy arrays by name."""
    model, params = ViT(SPEC), parameters()
    batches = feed.OnMesh(data.eval_batches(images(), SPEC, batch_size=8), mesh)
    there = sharding.gathered(params, mesh)
    sums = statistics.collect(model, there, batches)
    levels = growth.start(SPEC)
    widths = levels.widths(0, SPEC)
    measured = importance.measure(model, there, batches, widths)
    target = growth.schedule(0, 1, model_macs=macs.macs(SPEC), share=0.6)
    levels = growth.grow(levels, SPEC, measured, target_macs_saved=target)
    [score] = evaluate.evaluate(model, there, batches, [None])
    state, losses = three_steps(params, mesh, workdir)
    small, sizes = three_steps(params, mesh, f"{workdir}_sizes", **repaired_sizes())
    found = {
        "sums": sums,
        "importance": measured,
        "levels": levels,
        "score": score,
        "losses": [losses, sizes],
        "params": sharding.gathered([state.params, small.params], mesh),
    }
    return {
        jax.tree_util.keystr(path): np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(jax.device_get(found))
    }


def repaired_sizes():
    """What `fit` takes to train PIAD in compiled sizes, cuts repaired."""
    rng = np.random.default_rng(3)
    moments = {
        kind: [(rng.normal(size=n), (x := rng.normal(size=(2 * n, n))).T @ x)]
        for kind, n in compensation.inner_units(SPEC).items()
    }
    repairs = compensation.from_moments(**moments, spec=SPEC)
    levels = piad.uniform(SPEC, steps=4)

    def loss_of(within):
        cut_of = objective.level_within(SPEC, within)
        return objective.classification_loss(ViT(SPEC, within), cut_of=cut_of)

    sizes = buckets.Buckets(SPEC, loss_of, shares=(0.8, 0.5), seed=1)
    return {
        "extra": objective.Elastic(levels, repairs, np.int32(0)),
        "before_step": sizes.before_step,
        "before_loss": sizes.before_loss,
    }


def three_steps(params, mesh, workdir, *, extra=None, **options):
    """The state after, and the loss of every step."""
    batches = data.train_batches(
        images(),
        SPEC,
        batch_size=8,
        seed=0,
        augment=lambda *args: augment.shift_crop(*args, pad=2),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    optimizer = optax.sgd(0.1)
    state = train.fit(
        train.initial_state(params, optimizer, jax.random.key(2), extra=extra),
        batches,
        loss=objective.classification_loss(ViT(SPEC)),
        optimizer=optimizer,
        steps=3,
        mesh=mesh,
        workdir=workdir,
        log_every_steps=1,
        **options,
    )
    log = (pathlib.Path(workdir) / run_state.LOG).read_text().splitlines()
    return state, [json.loads(line)["loss"] for line in log]


def main(port, index, target):
    """One process of two; leaves its results in a file in the folder `target`."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.distributed.initialize(
        coordinator_address=f"127.0.0.1:{port}",
        num_processes=2,
        process_id=int(index),
        initialization_timeout=30,
    )
    found = results(sharding.mesh({"fsdp": 2, "model": 2}), f"{target}/run")
    mesh = sharding.mesh({"fsdp": 2, "model": 2})
    params = parameters()
    cut = sharding.copy_to(params, sharding.param_sharding(params, mesh))
    for _ in range(30):  # nothing waits in between but for what `gathered` waits for
        whole = sharding.gathered(cut, mesh)
    found["gathered"] = np.asarray(whole["head"]["kernel"])
    processes.SEEN_WITHIN_S = 1
    own = pathlib.Path(target, f"own_{index}")
    own.mkdir()
    other = jax.tree.map(lambda x: x + int(index), parameters())
    mesh = sharding.mesh()
    for name, wrong in {
        "an axis over processes": lambda: sharding.mesh({"model": 4}),
        "other commands": lambda: processes.check_alike({"lr": int(index), "steps": 3}),
        "other weights": lambda: three_steps(other, mesh, f"{target}/no"),
        "a folder each": lambda: run_state.claim(own),
    }.items():
        try:
            wrong()
        except ValueError as error:
            found[name] = np.array(str(error))
    np.savez(f"{target}/{index}.npz", **found)
    multihost_utils.sync_global_devices("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
