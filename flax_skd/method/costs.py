"""Costs of calibration: what a feature has to matter for.

Each is a function (outputs [B, K], labels [B]) -> [B], one number an image, so that
the gradient of their sum keeps images apart. A cost of the label, and its gradient,
are nan where that is no class.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from flax_skd.method.vit import Array

Cost = Callable[[Array, Array], Array]


def correct_logit(logits: Array, labels: Array) -> Array:
    """The logit of the correct class, the choice of the SKD authors' program."""
    labels, known = _classes(logits, labels)
    return jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0] * known


def top_logit(logits: Array, labels: Array) -> Array:
    """The logit of the model's own first class: `correct_logit` without labels.

    Its gradient does not vanish where the model is sure, as that of a log-probability.
    """
    del labels
    return _largest(logits)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """-log p(label)."""
    labels, known = _classes(logits, labels)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels) * known


def _classes(logits: Array, labels: Array) -> tuple[Array, Array]:
    """Labels within 0..K-1, and [B], nan where one is not: a factor spoils gradients."""
    labels = labels.astype(jnp.int32)
    inside = (labels >= 0) & (labels < logits.shape[-1])
    known = jnp.where(inside, 1.0, jnp.nan).astype(logits.dtype)
    return jnp.where(inside, labels, 0), known


def top_log_probability(logits: Array, labels: Array) -> Array:
    """log p of the model's own first class; needs no labels.

    KL to the model's own output has no gradient at the full network. The gradient of
    the log-probability of a label from that output is its first factor: the outer
    product of such gradients is the curvature of the KL.
    """
    del labels
    return _largest(jax.nn.log_softmax(logits))


def _largest(values: Array) -> Array:
    # Not `max`: its gradient looks for values that equal it, which a compiler may
    # compute twice, with other roundings, so that none does and 0 / 0 comes out.
    first = values.argmax(-1, keepdims=True)
    return jnp.take_along_axis(values, first, axis=-1)[:, 0]


def feature(features: Array, labels: Array) -> Array:
    """A fixed random projection of the pooled feature, for a backbone without head."""
    del labels
    width = features.shape[-1]
    direction = jax.random.normal(jax.random.key(0), (1, width)) / width**0.5
    return (features * direction).sum(-1)


COSTS: dict[str, Cost] = {
    "logit": correct_logit,
    "top_logit": top_logit,
    "cross_entropy": cross_entropy,
    "self_kl": top_log_probability,
    "feature": feature,
}


def cost_named(name: str, num_classes: int) -> Cost:
    """Looks a cost up and checks that the network has what it reads.

    Args:
      name: a key of `COSTS`.
      num_classes: of the network, 0 for a backbone without a head.

    Raises:
      ValueError: if the name is unknown, or the cost needs a head that is not there or
        compares classes and there is one, so that its gradient is zero.
    """
    if name not in COSTS:
        raise ValueError(f"cost {name!r}: choose one of {', '.join(COSTS)}.")
    if not num_classes and name != "feature":
        raise ValueError(
            f"cost {name!r} reads class logits and the network has no head: "
            "use cost 'feature'."
        )
    if num_classes == 1 and name in ("cross_entropy", "self_kl"):
        raise ValueError(
            f"cost {name!r} compares classes and the network has a single logit: use "
            "cost 'top_logit'."
        )
    return COSTS[name]
