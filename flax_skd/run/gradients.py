"""The gradient of a batch, whole or summed over microbatches to save memory."""

from typing import Any

import jax
import jax.numpy as jnp

from flax_skd.run.objective import Array, Batch, Loss, Metrics


def of_batch(
    loss: Loss, state: Any, batch: Batch, rng: Array, *, accumulate: int = 1
) -> tuple[Metrics, Any]:
    """Metrics of a batch, the loss among them, and the gradient at `state.params`.

    Args:
      loss: function (params, batch, rng, state) -> (loss [], metrics).
      state: of `train.TrainState`.
      batch: arrays [B, ...].
      rng: a key.
      accumulate: microbatches, one after the other, whose mean is taken. Example i
        goes to microbatch i modulo this, so that a batch cut over devices stays where
        it is. Each draws by its own key: under PIAD each has its own level.

    Returns:
      ({"loss": [], ...}, tree like `state.params`).

    Raises:
      ValueError: if the batch cannot be cut into so many parts.
    """
    step = jax.value_and_grad(loss, has_aux=True)

    def part(microbatch, key):
        (value, metrics), grads = step(state.params, microbatch, key, state)
        return {"loss": value, **metrics}, grads

    if accumulate == 1:
        return part(batch, rng)
    parts = jax.tree.map(lambda x: _cut(x, accumulate), batch)

    def add(total, index):
        microbatch = jax.tree.map(lambda x: x[index], parts)
        found = part(microbatch, jax.random.fold_in(rng, index))
        return jax.tree.map(jnp.add, total, found), None

    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(part, first, rng)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, jnp.arange(accumulate))
    return jax.tree.map(lambda x: x / accumulate, total)


def _cut(x: Array, parts: int) -> Array:
    """[B, ...] -> [parts, B / parts, ...]."""
    size = x.shape[0]
    if parts < 1 or size % parts:
        raise ValueError(
            f"a batch of {size} does not divide into accumulate = {parts} microbatches: "
            f"take {max(1, size // max(parts, 1)) * max(parts, 1)} images, or another "
            "number of microbatches."
        )
    return x.reshape(size // parts, parts, *x.shape[1:]).swapaxes(0, 1)
