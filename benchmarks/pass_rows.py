"""The rows of `statistics_pass.py`: each a compiled function of one batch."""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.io import conversion, data, sources
from flax_skd.method import contraction, costs, statistics, vit
from flax_skd.method.spec import ViTSpec
from flax_skd.run import objective, train

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
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
