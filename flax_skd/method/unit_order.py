"""Orders of hidden units from their covariance and their output weights.

Every order has one signature, (covariance [M, M], w2 [M, D], ridge=...) -> indices [M],
what is kept longest first, so that tables compare them.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.method.moments import RIDGE, factor_of, regularised
from flax_skd.method.vit import Array

_SMALLEST_STAGE = 64
_DEAD = 1e-10  # of the largest variance: the rounding of a constant feature
_TIE = 1e-5  # relative: the rounding of a score


def _falling(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")


def variance(covariance: Any, w2: Any, *, ridge: float = RIDGE) -> np.ndarray:
    """Units by falling variance, as variance-based pruning cuts them.

    Args:
      covariance: [M, M] of the hidden units, centred.
      w2: [M, D], not looked at.
      ridge: not looked at.

    Returns:
      Indices [M]; equal variances keep their order.
    """
    del w2, ridge
    return _falling(np.asarray(covariance).diagonal())


def variance_weight(covariance: Any, w2: Any, *, ridge: float = RIDGE) -> np.ndarray:
    """Units by falling variance times squared norm of their output weights.

    The error of cutting one unit whose mean is folded and which nothing predicts.

    Args:
      covariance: [M, M] of the hidden units, centred.
      w2: [M, D].
      ridge: not looked at.

    Returns:
      Indices [M]; equal scores keep their order.
    """
    del ridge
    norms = np.square(np.asarray(w2, np.float64)).sum(1)
    return _falling(np.asarray(covariance, np.float64).diagonal() * norms)


def greedy(
    covariance: Any, w2: Any, *, ridge: float = RIDGE, block: int = 64
) -> np.ndarray:
    """Units in the reverse of greedy backward elimination with re-fitting.

    At each step the unit goes whose removal costs least once all others have been
    re-fitted, argmin_i |w_i|^2 / [S^-1]_ii with W the re-fitted rows; then
    W -= S^-1[:, i] w_i / [S^-1]_ii, and S^-1 is downdated by the same rank one
    (docs/method.md). Rank-one updates are gathered and applied `block` at a time; when
    half of the units have gone, the rest starts anew from its own S^-1, computed on the
    host in float64: this halves the arrays and forgets the rounding.

    Units that do not vary (dead) go first. Scores within 1e-5 of the least are a tie:
    the highest index goes first, so that the lowest is kept longest.

    Args:
      covariance: [M, M] of the hidden units, centred, of any rank.
      w2: [M, D].
      ridge: makes S positive definite, as in `moments.regularised`.
      block: removals between two updates of the whole arrays; of speed alone.

    Returns:
      Indices [M], kept longest first.

    Raises:
      ValueError: if the shapes do not belong together, a number is not finite, or the
        covariance has eigenvalues below -ridge of its mean variance.
    """
    if block < 1:
        raise ValueError(f"block = {block} must be at least 1.")
    covariance, w2 = (np.asarray(x, np.float64) for x in (covariance, w2))
    size = len(w2)
    if covariance.shape != (size, size):
        raise ValueError(
            f"a covariance of shape {covariance.shape} for {size} rows of output "
            f"weights: it must be ({size}, {size})."
        )
    if not (np.isfinite(covariance).all() and np.isfinite(w2).all()):
        raise ValueError("covariance and w2 must be finite: look for NaN.")
    spread = covariance.diagonal()
    dead = spread <= _DEAD * spread.max()
    moment = regularised(covariance, ridge)
    factor_of(covariance, ridge, "order of hidden units")  # fails where S is no moment
    kept, removed = np.flatnonzero(~dead), [*np.flatnonzero(dead)[::-1]]
    while len(kept):
        count = len(kept) if len(kept) <= _SMALLEST_STAGE else len(kept) // 2
        inverse = np.linalg.inv(moment[np.ix_(kept, kept)])
        # What is left predicts what has gone: the re-fitted rows, afresh.
        rows = inverse @ (moment[kept] @ w2)
        # A scale common to all scores changes nothing and keeps float32 in its range.
        steps = min(block, len(kept))
        out = _stage(
            jnp.asarray(inverse / np.abs(inverse).max(), jnp.float32),
            jnp.asarray(rows / max(np.abs(rows).max(), 1e-300), jnp.float32),
            blocks=-(-count // steps),
            steps=steps,
        )
        out = np.asarray(out)[:count]
        removed += [*kept[out]]
        kept = np.delete(kept, out)
    return np.asarray(removed[::-1])


@functools.partial(jax.jit, static_argnames=("blocks", "steps"))
def _stage(inverse: Array, rows: Array, *, blocks: int, steps: int) -> Array:
    """Indices of the first `blocks * steps` removals, in their order."""

    def one_block(_, state):
        inverse, rows, alive, order, done = state
        start = (
            alive,
            inverse.diagonal(),
            jnp.square(rows).sum(1),
            jnp.zeros((steps, len(rows)), rows.dtype),
            jnp.zeros((steps, rows.shape[1]), rows.dtype),
            order,
        )
        one = functools.partial(_remove, inverse, rows, done)
        alive, _, _, columns, cut, order = jax.lax.fori_loop(0, steps, one, start)
        # columns^T columns is the sum of the gathered rank ones.
        update = functools.partial(jnp.matmul, columns.T, precision="highest")
        return inverse - update(columns), rows - update(cut), alive, order, done + steps

    order = jnp.zeros(blocks * steps, jnp.int32)
    state = (inverse, rows, jnp.ones(len(rows), bool), order, 0)
    return jax.lax.fori_loop(0, blocks, one_block, state)[3]


def _remove(inverse, rows, done, step, state):
    """One removal: column and row of the unit as they stand, then the scores after it.

    `columns` holds u = S^-1[:, i] / [S^-1]_ii^1/2 of the removals gathered so far and
    `cut` their w_i / [S^-1]_ii^1/2, so that S^-1 now is inverse - columns^T columns and
    W now is rows - columns^T cut.
    """
    alive, diagonal, norms, columns, cut, order = state
    score = jnp.where(alive, jnp.maximum(norms, 0.0) / diagonal, jnp.inf)
    tied = score <= score.min() * (1 + _TIE)
    unit = len(score) - 1 - jnp.argmax(tied[::-1])
    product = functools.partial(jnp.matmul, precision="highest")
    mine = columns[:, unit]
    column = inverse[unit] - product(mine, columns)
    root = jnp.sqrt(column[unit])
    alive = alive.at[unit].set(False)
    # Rows that have gone are zero up to rounding, and stay as they are.
    column = jnp.where(alive, column / root, 0.0)
    row = (rows[unit] - product(mine, cut)) / root
    along = product(rows, row) - product(product(cut, row), columns)
    norms = norms - 2 * column * along + jnp.square(column) * jnp.square(row).sum()
    return (
        alive,
        jnp.where(alive, diagonal - jnp.square(column), 1.0),
        norms,
        columns.at[step].set(column),
        cut.at[step].set(row),
        order.at[done + step].set(unit.astype(jnp.int32)),
    )


ORDERS: dict[str, Callable[..., np.ndarray]] = {
    "greedy": greedy,
    "variance_weight": variance_weight,
    "variance": variance,
}
