"""An identity whose derivative is a sum: what a backward pass sees on its way."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from flax_skd.method.vit import Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def observed(sums_of: Callable, feature: Array, seen: Any, zeros: Any) -> Array:
    """`feature`, unchanged; the cotangent of `zeros` is the sums of this batch.

    Args:
      sums_of: function (feature, its gradient, seen, zeros) -> sums of the structure
        of `zeros`, which is there for its structure alone.
      feature: any array on the way to the cost.
      seen: pytree of other arrays the sums need; no gradient flows into them.
      zeros: accumulators.
    """
    del sums_of, seen, zeros
    return feature


def _forward(sums_of, feature, seen, zeros):
    del sums_of
    return feature, (feature, seen, zeros)


def _backward(sums_of, saved, gradient):
    return gradient, None, sums_of(saved[0], gradient, *saved[1:])


observed.defvjp(_forward, _backward)
