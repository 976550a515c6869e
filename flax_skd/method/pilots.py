"""The points that second moments are taken about: weighted means of a first batch."""

from typing import Any

import jax.numpy as jnp

from flax_skd.method import second_moments
from flax_skd.method.vit import Array


def weighted(
    pilot: tuple[dict[str, Array], ...], moments: tuple[str, ...]
) -> tuple[dict[str, Array], ...]:
    """`statistics.pilot_means` with a point for each weighting of inner units: theirs."""
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
    """The small sums of branches, of which alone `refined` is made."""
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
    """`weighted`, moved to the weighted means of sums about it, of `firsts`.

    Where weights single out tokens far from the mean of all, as those of the last block
    single out the class token, sums about the plain mean would cancel.
    """

    def moved(point, weight, first):
        mean = first / jnp.where(weight > 0, weight, 1.0)
        return point + mean.reshape(point.shape)

    return tuple(
        block | {key: moved(block[key], *sums) for key, sums in held.items()}
        for block, held in zip(pilot, found, strict=True)
    )
