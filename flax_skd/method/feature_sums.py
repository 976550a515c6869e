"""Sums of one feature of one block: what a batch adds to the statistics."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from flax_skd.method import second_moments
from flax_skd.method.spec import ViTSpec
from flax_skd.method.vit import Array

SITES = ("query", "key", "value", "hidden")


class Moments(NamedTuple):
    """Sums under one token weighting w, of features about the pilot mean.

    Attributes:
      weight: sum of w, [H].
      first: sum of w f, [H, d].
      second: sum of w f^T f, [H, d, d].
    """

    weight: Array
    first: Array
    second: Array


class FeatureSums(NamedTuple):
    """Sums of one feature over all tokens of all images; H = 1 for hidden units.

    Attributes:
      first: sum of f about the pilot mean, [H, d].
      square: sum of f^2 about the pilot mean, [H, d].
      taylor1: sum of |g f|, [H, d].
      taylor2: sum of (g f)^2 / 2, [H, d].
      moments: `Moments` by weighting name; empty for hidden units.
    """

    first: Array
    square: Array
    taylor1: Array
    taylor2: Array
    moments: dict[str, Moments]


def heads(feature: Array) -> Array:
    """[B, H, N, d] as it is, hidden units [B, N, M] with one head; float32."""
    if feature.ndim == 3:
        feature = feature[:, None]
    return feature.astype(jnp.float32)


def of(feature: Array, gradient: Array, seen: Any, zeros: FeatureSums) -> FeatureSums:
    """The sums of one batch, as `observed.observed` asks for them.

    Args:
      feature: [B, H, N, d], or hidden units [B, N, M].
      gradient: dC/d(feature), of its shape.
      seen: the mean the sums are taken about [H, d], and [B], 0 for padding.
      zeros: names the weightings.
    """
    (pilot, live), f, g = seen, heads(feature), heads(gradient)
    live = live.reshape(-1, 1, 1)
    centred = f - pilot[None, :, None]
    present = centred * live[..., None]
    moments = {}
    for name in zeros.moments:
        weight = second_moments.WEIGHTINGS[name].own(f, g) * live
        weighted = weight[..., None] * centred
        moments[name] = Moments(
            weight.sum((0, 2)),
            weighted.sum((0, 2)),
            jnp.einsum("bhnd,bhne->hde", weighted, centred, precision="highest"),
        )
    # g is zero for a padded example: the cost does not see it.
    return FeatureSums(
        first=present.sum((0, 2)),
        square=(present * centred).sum((0, 2)),
        taylor1=jnp.abs(f * g).sum((0, 2)),
        taylor2=jnp.square(f * g).sum((0, 2)) / 2,
        moments=moments,
    )


def zeros(spec: ViTSpec, weightings: tuple[str, ...]) -> dict[str, FeatureSums]:
    """Accumulators of one block, by site."""

    def site(heads, size, names):
        rows, shapes = (heads, size), ((heads,), (heads, size), (heads, size, size))
        held = {name: Moments(*map(jnp.zeros, shapes)) for name in names}
        return FeatureSums(*map(jnp.zeros, (rows,) * 4), held)

    shapes = dict.fromkeys(SITES, (spec.num_heads, spec.head_dim, weightings))
    shapes["hidden"] = (1, spec.mlp_dim, ())
    return {name: site(*shapes[name]) for name in SITES}
