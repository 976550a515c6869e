"""The points that second moments are taken about: weighted means of a first batch."""

from typing import Any

import jax.numpy as jnp

from flax_skd.method import second_moments
from flax_skd.method.vit import Array


def weighted(
    pilot: tuple[dict[str, Array], ...], moments: tuple[str, ...]
) -> tuple[dict[str, Array], ...]:
    """The points of `statistics.pilot_means`, and one more for each weighting.

    Those are of inner units, under keys such as "hidden gradient", and start as theirs.
    """
    named = [
        (inner, name)
        for inner in second_moments.INNER.values()
        for name in second_moments.checked(moments)
    ]
    return tuple(
        {**block, **{f"{inner} {name}": block[inner] for inner, name in named}}
        for block in pilot
    )


def firsts(branches: tuple[dict[str, second_moments.BlockMoments], ...]) -> Any:
    """The sums of weights and of features by branch: all that `refined` reads."""
    return tuple(
        {
            f"{inner} {name}": getattr(sums, branch)[:2]
            for name, sums in block.items()
            for branch, inner in second_moments.INNER.items()
        }
        for block in branches
    )


def refined(
    pilot: tuple[dict[str, Array], ...], found: Any
) -> tuple[dict[str, Array], ...]:
    """The points of `weighted`, each moved to the weighted mean of its inner units.

    Sums about the plain mean would cancel where weights single out tokens far from it,
    as those of the last block single out the class token.

    Args:
      pilot: of `weighted`.
      found: of `firsts`, of sums about these points.
    """

    def moved(point, weight, first):
        mean = first / jnp.where(weight > 0, weight, 1.0)
        return point + mean.reshape(point.shape)

    return tuple(
        block | {key: moved(block[key], *sums) for key, sums in held.items()}
        for block, held in zip(pilot, found, strict=True)
    )
