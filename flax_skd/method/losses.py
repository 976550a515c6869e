"""The losses of training, as plain functions."""

import jax
import jax.numpy as jnp

Array = jax.Array


def cross_entropies(
    logits: Array, labels: Array, *, label_smoothing: float = 0.0
) -> Array:
    """Cross-entropy of every example, in nats.

    Args:
      logits: [B, K].
      labels: int [B] classes, or float [B, K] probabilities (mixed images, a teacher).
      label_smoothing: share of the target spread over all K classes.

    Returns:
      [B], float32; nan where a class is not one of 0..K-1, so that it is noticed.
    """
    classes = logits.shape[-1]
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    known = jnp.ones(labels.shape[:1], bool)
    if labels.ndim == 1:
        labels = labels.astype(jnp.int32)  # 8 bits hold no 300 classes to compare with
        known = (labels >= 0) & (labels < classes)
        labels = jax.nn.one_hot(labels, classes, dtype=jnp.float32)
    targets = (1 - label_smoothing) * labels + label_smoothing / classes
    return jnp.where(known, -(targets * log_probs).sum(-1), jnp.nan)


def cross_entropy(
    logits: Array, labels: Array, *, label_smoothing: float = 0.0
) -> Array:
    """Mean of `cross_entropies`, of the same arguments, [] in float32."""
    return cross_entropies(logits, labels, label_smoothing=label_smoothing).mean()


def divergences(outputs: Array, full: Array, *, num_classes: int) -> Array:
    """How far the outputs of a sub-network are from the full network's.

    The KL divergence of the full network's prediction, in nats. A single logit predicts
    nothing else, and features predict nothing: of those the mean squared difference.

    Args:
      outputs: [B, K], or features [B, F] if K = 0.
      full: of the full network, of the same shape.
      num_classes: K.

    Returns:
      [B], of every image.
    """
    if num_classes < 2:
        return jnp.square(outputs - full).mean(-1)
    log_full, log_cut = jax.nn.log_softmax(full), jax.nn.log_softmax(outputs)
    return (jnp.exp(log_full) * (log_full - log_cut)).sum(-1)


def accuracy(logits: Array, labels: Array) -> Array:
    """Share of examples whose largest logit is the label's.

    Args:
      logits: [B, K].
      labels: int [B], or float [B, K] of which the largest counts.

    Returns:
      [], float32.
    """
    if labels.ndim == 2:
        labels = labels.argmax(-1)
    return (logits.argmax(-1) == labels).astype(jnp.float32).mean()
