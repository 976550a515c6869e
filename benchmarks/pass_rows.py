"""The rows of `statistics_pass.py`: each a compiled function of one batch."""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import random_inputs

from flax_skd.io import conversion, data, sources
from flax_skd.method import contraction, costs, statistics, vit
from flax_skd.method.spec import ViTSpec
from flax_skd.run import objective, train
from flax_skd.run.commands import DTYPES

# What each pass asks `statistics.batch_sums` for.
PASSES = {
    "taylor": {"weightings": ("gradient",)},
    "both": {"weightings": ("gradient", "plain")},
    "moments": {"weightings": (), "moments": ("gradient",)},
    "few": {"weightings": (), "moments": ("gradient",)},
}
TITLES = {
    "plain": "forward + backward, gradient of all parameters",
    "input": "forward + backward, gradient of the image alone",
    "taylor": "statistics pass, Taylor-weighted moments",
    "both": "statistics pass, Taylor-weighted and plain moments",
    "moments": "statistics pass of the closed forms",
    "few": "the same, hidden units of every k-th image",
    "step": "training step, AdamW",
}


def network(args: argparse.Namespace):
    """The network to measure: of --path, or random. Returns (model, params)."""
    if args.path:
        source = conversion.read(args.path, variant=args.variant, recipe=args.recipe)
        spec, params = source.spec, jax.device_put(source.params)
    else:
        spec = ViTSpec.named(args.variant, image_size=args.image_size)
        params = random_inputs.params(spec)
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
    for _ in range(count):
        drawn = random_inputs.batch(spec, args.batch_size, rng)
        yield {**drawn, "weight": np.ones(args.batch_size, np.float32)}


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


def training_step(model: vit.ViT, params):
    """An update as a function (state, params, batch, pilot) -> state, and its start."""
    optimizer = train.make_optimizer(1e-4)
    update = functools.partial(
        train.train_step,
        loss=objective.classification_loss(model),
        optimizer=optimizer,
        ema_decay=0.0,
    )

    def start():
        own = jax.tree.map(jnp.copy, params)
        state = train.initial_state(own, optimizer, jax.random.key(0))
        return state._replace(ema=None)

    return lambda state, params, batch, pilot: update(state, batch)[0], start


def prepared(name: str, model: vit.ViT, params, batch, pilot, hidden_every: int):
    """Compiles a row: (step, function that makes its first carry, seconds it took)."""
    if name == "step":
        step, start = training_step(model, params)
        return _compiled(step, start, params, batch, pilot)
    if name in PASSES:
        sums_of = functools.partial(
            statistics.batch_sums,
            model,
            hidden_every=hidden_every if name == "few" else 1,
            **PASSES[name],
        )
        shapes = jax.eval_shape(sums_of, params, batch, pilot)

        def step(sums, *inputs):  # a batch of `statistics.collect`
            return jax.tree.map(jnp.add, sums, sums_of(*inputs))

    else:
        shapes, step = (), gradient_step(model, name)

    def start():
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    return _compiled(step, start, params, batch, pilot)


def _compiled(step, start, params, batch, pilot):
    before = time.perf_counter()
    lowered = jax.jit(step, donate_argnums=0).lower(start(), params, batch, pilot)
    return lowered.compile(), start, time.perf_counter() - before


def contraction_seconds(args: argparse.Namespace) -> list[float]:
    """Rotations and injection, WPAC's: the first time, then again."""
    model, params = network(args)
    first = jax.device_put(next(batches(args, model.spec)))
    sums = statistics.collect(model, params, [first])
    found = []
    for _ in range(3):
        before = time.perf_counter()
        changes = contraction.bases(params, model.spec, sums, criterion="wpac")
        jax.block_until_ready(jax.jit(contraction.inject)(params, changes))
        found.append(time.perf_counter() - before)
    return found
