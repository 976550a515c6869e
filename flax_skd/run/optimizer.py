"""The optimizer of training, from optax."""

import jax
import optax


def cosine(
    peak: float, *, steps: int, warmup_steps: int = 0, end: float = 0.0
) -> optax.Schedule:
    """Learning rate: linear from 0 to `peak`, then a half cosine to `end`.

    Args:
      peak: the largest rate.
      steps: of the whole run, warm-up included.
      warmup_steps: fewer than `steps`.
      end: the rate after `steps`.

    Raises:
      ValueError: if the warm-up does not end before the run, peak is not positive, or
        the rate would rise to `end`.
    """
    if not 0 <= warmup_steps < steps or peak <= 0:
        raise ValueError(
            f"warmup_steps = {warmup_steps} of steps = {steps} must be 0 or more and "
            f"fewer than steps, and the learning rate {peak} positive."
        )
    if end > peak:
        raise ValueError(
            f"the last learning rate {end} (min_lr) must be at most the largest, {peak} "
            "(lr)."
        )
    fall = optax.cosine_decay_schedule(peak, steps - warmup_steps, end / peak)
    if not warmup_steps:
        return fall
    rise = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([rise, fall], [warmup_steps])


def make_optimizer(
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.05,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """AdamW; only kernels decay, not biases, norms, tokens, positions or LayerScale.

    Args:
      learning_rate: a number or a schedule such as `cosine`.
      weight_decay: per step and unit of learning rate.
      clip_norm: the largest norm of the whole gradient; None for any.
    """

    def kernels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: path[-1].key == "kernel", params
        )

    adamw = optax.adamw(learning_rate, weight_decay=weight_decay, mask=kernels)
    if clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw)
