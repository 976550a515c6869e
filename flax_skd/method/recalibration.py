"""Closed forms for one size: statistics of the cut network itself, and its head.

The compensation that is stored with a super-network knows the full network. In a cut
one the stream has drifted, and the factors that fit it best are those of its own units.
What is then left of the drift at the end, a ridge from the features of the cut network
to those of the full one takes out of the head. No labels (docs/method.md).
"""

from typing import Any, NamedTuple

import numpy as np

from flax_skd.method import compensation
from flax_skd.method.compensation import Compensation
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.statistics import Statistics
from flax_skd.method.vit import Params

# Ridges tried, relative to the mean variance of a feature; infinity moves means alone.
RIDGES = (*np.logspace(-3, 3, 13), np.inf)
HEADS = ("head", "head_dist")


def own_compensation(
    statistics: Statistics,
    spec: ViTSpec,
    stored: Compensation,
    widths: SubnetSpec,
    *,
    tokens: str = "gradient",
) -> Compensation:
    """The compensation of the network that statistics were taken of, cut or not.

    Args:
      statistics: with second moments under `tokens`, of the network as it is cut and
        repaired, in its own coordinates (`statistics.collect` with masks).
      spec: the full network.
      stored: stands for branches that are removed, which no gradient reaches.
      widths: of the cut.
      tokens: weights of tokens in the moments.
    """
    attn, mlp = (
        [statistics.branch_moment(i, branch, tokens) for i in range(spec.depth)]
        for branch in ("attn", "mlp")
    )
    fresh = compensation.from_moments(attn, mlp, spec)
    kept = Compensation(attn=widths.vo_dim, mlp=widths.mlp_dim)
    return Compensation(
        *(
            tuple(new if width else old for new, old, width in zip(*branches))
            for branches in zip(fresh, stored, kept, strict=True)
        )
    )


class Correction(NamedTuple):
    """Features of a cut network led back to those of the full one: f A + c.

    Attributes:
      matrix: A, [F, F].
      offset: c, [F].
      ridge: the one chosen, of `RIDGES`.
    """

    matrix: np.ndarray
    offset: np.ndarray
    ridge: float


def correction(cut: Any, full: Any, kernel: Any) -> Correction:
    """The ridge from cut to full features that predicts left-out images best.

    With X, Y the centred features and S = X^T X, A = I + (S + r I)^-1 X^T (Y - X)
    shrinks to no change, not to zero. Image i left out is missed by e_i / (1 - h_i), h
    the diagonal of 1/n + X (S + r I)^-1 X^T; the ridge of the least sum of squared
    errors of the logits is taken. Logits are linear in features, so this is the ridge
    to the full network's logits as well; scale and bias of a LayerNorm before the head
    are part of A and c.

    Args:
      cut, full: features [n, F] of the same n images, what the head reads.
      kernel: of the head, [F, K]: which features matter.

    Raises:
      ValueError: with fewer than two images, or shapes that do not belong together.
    """
    cut, full, kernel = (np.asarray(x, np.float64) for x in (cut, full, kernel))
    if cut.shape != full.shape or len(cut) < 2 or kernel.shape[0] != cut.shape[1]:
        raise ValueError(
            f"features {cut.shape} and {full.shape}, a head of {kernel.shape}: give the "
            "same two or more images to both networks."
        )
    x, y = cut - cut.mean(0), full - full.mean(0)
    left, singular, right = np.linalg.svd(x, full_matrices=False)
    level = max(np.square(x).sum() / x.shape[1], np.finfo(float).tiny)
    drift = left.T @ (y - x)
    metric = kernel @ kernel.T

    def fit(ridge):
        share = 0 * singular
        if np.isfinite(ridge):
            share = np.square(singular) / (np.square(singular) + ridge * level)
        missed = (y - x) - left @ (share[:, None] * drift)
        held = 1 / len(x) + (np.square(left) * share).sum(1)
        missed /= np.maximum(1 - held, 1e-6)[:, None]
        return float(np.einsum("nf,fg,ng->", missed, metric, missed)), share

    ridge = min(RIDGES, key=lambda r: fit(r)[0])
    _, share = fit(ridge)
    gain = np.divide(share, singular, out=0 * singular, where=singular > 0)
    matrix = np.eye(x.shape[1]) + right.T @ (gain[:, None] * drift)
    return Correction(matrix, full.mean(0) - cut.mean(0) @ matrix, float(ridge))


def with_head(params: Params, corrections: dict[str, Correction]) -> Params:
    """`params` whose heads read corrected features: A W and b + c W.

    Args:
      params: of a network with the heads that `corrections` names.
      corrections: head -> correction.
    """
    new = dict(params)
    for name, (matrix, offset, _) in corrections.items():
        kernel, bias = (np.asarray(params[name][x]) for x in ("kernel", "bias"))
        wide = kernel.astype(np.float64)
        new[name] = {
            "kernel": (matrix @ wide).astype(kernel.dtype),
            "bias": (bias + offset @ wide).astype(bias.dtype),
        }
    return new
