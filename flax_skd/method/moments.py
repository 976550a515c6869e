"""Means and covariances of a branch's inner units: coordinates, and Cholesky factors.

On the host in float64: once a network, and small beside the pass that collects them.
"""

from typing import Any

import numpy as np

RIDGE = 1e-4

# Mean [n] and centred covariance [n, n], None where means are all there is.
Moment = tuple[Any, Any]


def rotated(moment: Moment, value: Any) -> Moment:
    """Moments of z' = z R, one R a head: what a change of the value basis makes of z.

    Args:
      moment: of head outputs, index h * d + e.
      value: [H, d, d], its columns the new dims.

    Returns:
      The moment in the new coordinates, float64.
    """
    mean, covariance = moment
    value = np.asarray(value, np.float64)
    heads, dim, _ = value.shape
    mean = np.einsum("hd,hde->he", np.reshape(mean, (heads, dim)), value)
    if covariance is not None:
        blocks = np.asarray(covariance, np.float64).reshape((heads, dim) * 2)
        left = np.einsum("hdgc,hde->hegc", blocks, value)
        blocks = np.einsum("hegc,gcf->hegf", left, value)
        covariance = blocks.reshape(heads * dim, heads * dim)
    return mean.reshape(-1), covariance


def permuted(moment: Moment, units: Any) -> Moment:
    """Moments of units in a new order, `units` [n] their old indices."""
    mean, covariance = moment
    if covariance is not None:
        covariance = np.asarray(covariance)[np.ix_(units, units)]
    return np.asarray(mean)[units], covariance


def regularised(covariance: Any, ridge: float = RIDGE) -> np.ndarray:
    """S + ridge * mean(diag S) I in float64, positive definite.

    The ridge is relative to the mean variance, so that it does not depend on the units
    of the features or on how tokens were weighted. With it, S may be of any rank: dead
    units, fewer tokens than dims. Directions of less variance than the ridge predict
    nothing. Where S is zero, I.

    Args:
      covariance: [n, n], symmetric but for rounding.
      ridge: of the mean variance, at least the rounding of the sums (1e-5 in float32).
    """
    covariance = np.asarray(covariance, np.float64)
    covariance = (covariance + covariance.T) / 2
    level = ridge * covariance.diagonal().mean()
    return covariance + (level if level > 0 else 1.0) * np.eye(len(covariance))


def factor_of(covariance: Any, ridge: float, where: str) -> np.ndarray:
    """The lower-triangular Lc [n, n] of `regularised`, Lc Lc^T.

    Raises:
      ValueError: naming `where`, if the covariance is not finite or has eigenvalues
        below -ridge of its mean variance.
    """
    try:
        factor = np.linalg.cholesky(regularised(covariance, ridge))
    except np.linalg.LinAlgError:
        factor = np.full((1, 1), np.nan)
    if not np.isfinite(factor).all():
        raise ValueError(
            f"{where}: the covariance is not finite, or has an eigenvalue below "
            f"-{ridge} of its mean variance: look for NaN or inf in the features, take "
            "more images, or raise ridge."
        )
    return factor


def check_shapes(moment: Moment, size: int, where: str) -> None:
    """Raises ValueError naming `where` unless it is (mean [n], [n, n] or None)."""
    shapes = [np.shape(x) for x in moment if x is not None]
    if shapes != [(size,), (size, size)][: len(shapes)]:
        raise ValueError(
            f"{where}: moments of shapes {shapes}, the branch has {size} inner units: "
            f"give a mean [{size}] and a covariance [{size}, {size}] or None."
        )
