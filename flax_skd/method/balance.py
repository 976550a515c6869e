"""Balanced pairs: the bases of q/k and v/out that lose least at every cut at once.

Any invertible pair keeps a head's function; the truncated product is best in the bases
of a singular value decomposition (docs/method.md). On the host in float64: inverse
square roots of matrices near singular, once a network.
"""

from typing import Any, NamedTuple

import numpy as np

from flax_skd.method import second_moments
from flax_skd.method.statistics import Statistics
from flax_skd.method.vit import Params

# Of the largest eigenvalue. What is below is lost in float32 sums, and the columns of a
# pair have norms of at most about FLOOR^-1/4, so that a pair rounded to float32 is
# inverse to 1e-5.
FLOOR = 1e-6

Pair = tuple[np.ndarray, np.ndarray]


class Balanced(NamedTuple):
    """What is balanced, and against which second moments.

    Attributes:
      query, key, mixed: weights of tokens in the moments of q, k and z, a key of
        `second_moments.WEIGHTINGS`.
      keys: "image", centred by the mean of their image, or "attended", by their mean
        under each query's attention; the latter have no token weights.
      metric: "identity", or "gradient" for the Gram matrix of dC/d(branch output).
      moment: "covariance" of z, for cuts that fold means, or "uncentred".
      parts: which of "qk" and "vo" are balanced.
    """

    query: str = "gradient"
    key: str = "gradient"
    mixed: str = "gradient"
    keys: str = "image"
    metric: str = "identity"
    moment: str = "covariance"
    parts: tuple[str, ...] = ("qk", "vo")

    def check(self) -> "Balanced":
        """Returns these options; ValueError for a value that is not allowed."""
        weightings = tuple(second_moments.WEIGHTINGS)
        allowed = {
            **dict.fromkeys(("query", "key", "mixed"), weightings),
            "keys": ("image", "attended"),
            "metric": ("identity", "gradient"),
            "moment": ("covariance", "uncentred"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"balanced {name} {getattr(self, name)!r}: choose one of {values}."
                )
        if not self.parts or not set(self.parts) <= {"qk", "vo"}:
            raise ValueError(f"balanced parts {self.parts}: name 'qk', 'vo' or both.")
        return self

    def moments(self) -> tuple[str, ...]:
        """What `statistics.collect` has to be asked for."""
        names = []
        if "qk" in self.parts:
            names += [self.query, self.key]
        if "vo" in self.parts:
            names += [self.mixed]
        if "qk" in self.parts and self.keys == "attended":
            names += [second_moments.ATTENDED]
        return tuple(dict.fromkeys(names))


def query_key(statistics: Statistics, index: int, options: Balanced) -> Pair:
    """The pair of queries and keys of a block, each [H, d, d], query @ key^T = I.

    With the singular value decomposition G_q^1/2 G_k^1/2 = U S V^T, queries take the
    columns of G_q^-1/2 U and keys those of G_q^1/2 U, which are G_k^-1/2 V but for the
    factors S. The error tr(E^T G_q E G_k) is then least at every cut.
    """
    query, key = (
        second_moments.of_block(statistics.branches, index, name)
        for name in (options.query, options.key)
    )
    keys = key.key
    if options.keys == "attended":
        keys = key.key_attended
        _check_attended(statistics, options.key)
    right = np.stack([root(gram)[0] for gram in np.asarray(keys)])
    left, dual = pair(np.asarray(query.query), right)
    return left, dual.swapaxes(1, 2)


def _check_attended(statistics: Statistics, name: str) -> None:
    if statistics.tokens == 1:  # the one key, by which every query is answered
        return
    if not any(np.any(block[name].key_attended) for block in statistics.branches):
        raise ValueError(
            "the statistics hold no attended keys: collect them with moments=("
            f"{name!r}, {second_moments.ATTENDED!r})."
        )


def value_out(
    block: Params, statistics: Statistics, index: int, options: Balanced
) -> Pair:
    """The pair of values and rows of `out` of a block, each [H, d, d], value @ out = I.

    With the singular value decomposition C^1/2 W_o F^1/2 = U S V^T, values take the
    columns of C^-1/2 U and `out` the rows of U^T C^1/2, so that the error
    |C^1/2 (W_o - cut) F^1/2|^2 is least at every cut of a head. LayerScale is part of
    W_o here, since F measures what comes after it.
    """
    name = options.mixed
    kernel = np.asarray(block["attn"]["out"]["kernel"], np.float64)
    if "layer_scale1" in block:
        kernel = kernel * np.asarray(block["layer_scale1"], np.float64)
    if options.metric == "gradient":
        moments = second_moments.of_block(statistics.branches, index, name)
        values, vectors = _eigh(moments.gram)
        kernel = kernel @ (vectors * np.sqrt(np.maximum(values, 0)))
    heads, dim, _ = kernel.shape
    mixed = np.asarray(statistics.branch_covariance(index, "attn", name), np.float64)
    if options.moment == "uncentred":
        mean = np.asarray(statistics.branch_mean(index, "attn", name), np.float64)
        mixed = mixed + np.outer(mean, mean)
    mixed = mixed.reshape(heads, dim, heads, dim)
    mixed = np.stack([mixed[h, :, h] for h in range(heads)])
    return pair(mixed, kernel)


def pair(moments: np.ndarray, right: np.ndarray) -> Pair:
    """(A, A^-1) of every head, A = C^-1/2 U with C^1/2 right = U S V^T.

    Columns of A may be scaled, and rows of A^-1 by the inverse, without a change at any
    cut. With S^1/2 both moments would become S, but dims of little use would have tiny
    weights in one map and huge ones in the other. Here each column has the norm of its
    row: no S is divided by, and the pair is as near to orthogonal as its directions
    allow.
    """
    pairs = []
    for moment, matrix in zip(moments, right, strict=True):
        half, inverse_half = root(moment)
        axes = np.linalg.svd(half @ matrix, full_matrices=matrix.shape[1] < len(half))[
            0
        ]
        columns, rows = inverse_half @ axes, half @ axes
        scale = np.linalg.norm(rows, axis=0) / np.linalg.norm(columns, axis=0)
        largest = np.abs(columns).argmax(0)[None]
        # Signs are fixed (the largest entry of a column is positive): results repeat.
        scale = np.sqrt(scale) * np.sign(np.take_along_axis(columns, largest, 0))[0]
        pairs.append((columns * scale, (rows / scale).T))
    return tuple(np.stack(side).astype(np.float32) for side in zip(*pairs))


def root(moment: Any) -> Pair:
    """(C^1/2, C^-1/2) in float64, eigenvalues at least `FLOOR` of the largest.

    Directions that never occurred count as almost nothing, and a head that is all zeros
    has C = I.
    """
    values, vectors = _eigh(moment)
    if not values[-1] > 0:
        values = np.ones_like(values)
    values = np.sqrt(np.maximum(values, FLOOR * values[-1]))
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def _eigh(moment: Any) -> Pair:
    moment = np.asarray(moment, np.float64)
    return np.linalg.eigh((moment + moment.T) / 2)
