"""Streaming sums of features and their gradients: one pass, whatever its batches.

For a feature f (queries, keys, values, hidden units) and g = dC/df, the cost summed
over images, one backward pass leaves every sum the contraction needs (Li et al., AAAI
2026, "WPAC"). The sums are computed *by* that pass: each tap is an identity whose
derivative with respect to a dummy accumulator is the sum, so no gradient of a feature
outlives its layer and memory does not grow with the number of images.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_skd.method import costs, second_moments
from flax_skd.method.second_moments import observed
from flax_skd.method.spec import ViTSpec
from flax_skd.method.vit import Array, BlockMasks, Params, ViT

SITES = ("query", "key", "value", "hidden")
HIGHEST = jax.lax.Precision.HIGHEST

# Weight of a token of a head [B, H, N] from f, g [B, H, N, d].
WEIGHTINGS: dict[str, Callable[[Array, Array], Array]] = {
    "taylor": second_moments.WEIGHTINGS["gradient"].own,
    "plain": second_moments.WEIGHTINGS["plain"].own,
}


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


class Statistics(NamedTuple):
    """What a calibration pass leaves behind.

    Attributes:
      images: number of images seen, [].
      tokens: tokens an image, int.
      pilot: one dict a block, site -> [H, d]: the mean the sums are taken about.
      sums: one dict a block, site -> `FeatureSums`.
      branches: one dict a block, weighting -> `second_moments.BlockMoments`.
    """

    images: Array
    tokens: int
    pilot: tuple[dict[str, Array], ...]
    sums: tuple[dict[str, FeatureSums], ...]
    branches: tuple[dict[str, second_moments.BlockMoments], ...] = ()

    def mean(self, block: int, site: str) -> Array:
        """Plain mean of a feature over all tokens, [H, d]."""
        count = self.images * self.tokens
        return self.pilot[block][site] + self.sums[block][site].first / count

    def covariance(self, block: int, site: str, weighting: str) -> Array:
        """sum_t w_t (f_t - mu)^T (f_t - mu), [H, d, d], mu the plain mean.

        Raises:
          ValueError: if the pass did not collect this weighting.
        """
        sums = self.sums[block][site]
        if weighting not in sums.moments:
            raise ValueError(
                f"the statistics hold no {weighting!r} moments of {site}, only "
                f"{sorted(sums.moments)}: collect them with weightings=({weighting!r},)."
            )
        moment = sums.moments[weighting]
        mean = sums.first / (self.images * self.tokens)
        cross = mean[..., None] * moment.first[:, None]
        shift = moment.weight[:, None, None] * mean[..., None] * mean[:, None]
        return moment.second - cross - cross.swapaxes(1, 2) + shift

    def branch_mean(self, block: int, branch: str, weighting: str) -> Array:
        """Weighted mean of the inner units of `branch`, "attn" or "mlp", [n]."""
        moments = second_moments.of_branch(self.branches, block, branch, weighting)
        pilot = self.pilot[block][second_moments.INNER[branch]]
        return second_moments.mean(moments, pilot)

    def branch_covariance(self, block: int, branch: str, weighting: str) -> Array:
        """Covariance about `branch_mean` over the sum of weights, [n, n]."""
        moments = second_moments.of_branch(self.branches, block, branch, weighting)
        return second_moments.covariance(moments)


def _heads(feature: Array) -> Array:
    """[B, H, N, d] as it is, hidden units [B, N, M] with one head; float32."""
    if feature.ndim == 3:
        feature = feature[:, None]
    return feature.astype(jnp.float32)


def _sums_of(feature, gradient, seen, zeros) -> FeatureSums:
    (pilot, live), f, g = seen, _heads(feature), _heads(gradient)
    live = live.reshape(-1, 1, 1)
    centred = f - pilot[None, :, None]
    present = centred * live[..., None]
    moments = {}
    for name in zeros.moments:
        weight = WEIGHTINGS[name](f, g) * live
        weighted = weight[..., None] * centred
        moments[name] = Moments(
            weight.sum((0, 2)),
            weighted.sum((0, 2)),
            jnp.einsum("bhnd,bhne->hde", weighted, centred, precision=HIGHEST),
        )
    # g is zero for a padded example: the cost does not see it.
    return FeatureSums(
        first=present.sum((0, 2)),
        square=(present * centred).sum((0, 2)),
        taylor1=jnp.abs(f * g).sum((0, 2)),
        taylor2=jnp.square(f * g).sum((0, 2)) / 2,
        moments=moments,
    )


def _zeros(spec: ViTSpec, weightings: tuple[str, ...], moments: tuple[str, ...]):
    """Accumulators: of `FeatureSums` and of `second_moments`, one dict a block each."""

    def site(heads, size, names):
        rows, shapes = (heads, size), ((heads,), (heads, size), (heads, size, size))
        held = {name: Moments(*map(jnp.zeros, shapes)) for name in names}
        return FeatureSums(*map(jnp.zeros, (rows,) * 4), held)

    shapes = dict.fromkeys(SITES, (spec.num_heads, spec.head_dim, weightings))
    shapes["hidden"] = (1, spec.mlp_dim, ())
    blocks = range(spec.depth)  # with arrays of their own: `collect` donates them
    sums = tuple({name: site(*shapes[name]) for name in SITES} for _ in blocks)
    return sums, tuple(second_moments.zeros(spec, moments) for _ in blocks)


def pilot_means(model: ViT, params: Params, batch: dict[str, Array], masks=None):
    """Mean of every feature over one batch, the point the sums are taken about.

    One dict a block, site -> [H, d] float32; of `mixed` too. `masks` as in `collect`.
    """
    live = batch["weight"]
    found = [{} for _ in range(model.spec.depth)]

    def tap(block, name, feature):
        if name not in (*SITES, "mixed"):
            return feature
        f = _heads(feature) * live.reshape(-1, 1, 1, 1)
        # An all-padding batch has no mean: zero is as good a point as any.
        count = jnp.maximum(live.sum(), 1) * f.shape[2]
        found[block][name] = f.sum((0, 2)) / count
        return feature

    model.apply({"params": params}, batch["image"], masks, tap)
    return tuple(found)


def batch_sums(
    model: ViT,
    params: Params,
    batch: dict[str, Array],
    pilot: tuple[dict[str, Array], ...],
    *,
    cost: costs.Cost = costs.correct_logit,
    weightings: tuple[str, ...] = ("taylor",),
    moments: tuple[str, ...] = (),
    masks: tuple[BlockMasks, ...] | None = None,
) -> Any:
    """The sums of one batch, by one forward and one backward pass.

    Args:
      model: the full network.
      params: its parameters.
      batch: `image` [B, S, S, C], `label` [B], `weight` [B], 0 for padding.
      pilot: of `pilot_means`.
      cost: function (logits, labels) -> [B], such as those of `losses.COSTS`.
      weightings: which second moments of heads to collect.
      moments: weightings of `second_moments` to collect; with
        `second_moments.ATTENDED` attended keys too, about the cost of attention again.
      masks: of a sub-network (`subnet.masks`), whose sums are then taken: of all units,
        those that are cut too, on the stream that the cut leaves.

    Returns:
      One dict a block, site -> `FeatureSums`. With `moments`, a pair: those, and one
      dict a block, weighting -> `second_moments.BlockMoments`.
    """
    zeros = _zeros(model.spec, weightings, moments)
    both = _both_sums(model, params, batch, pilot, cost, moments, masks, zeros)
    return both if moments else both[0]


def _both_sums(model, params, batch, pilot, cost, moments, masks, zeros):
    live = batch["weight"]

    def total(zeros):
        sums, branches = zeros
        also = second_moments.taps(model.spec, branches, pilot, live, moments)

        def tap(block, name, feature):
            if name in SITES:
                seen = pilot[block][name], live
                feature = observed(_sums_of, feature, seen, sums[block][name])
            return also(block, name, feature) if moments else feature

        logits = model.apply({"params": params}, batch["image"], masks, tap)
        return jnp.sum(cost(logits, batch["label"]) * live)

    return jax.grad(total)(zeros)


def collect(
    model: ViT,
    params: Params,
    batches: Iterable[dict[str, Any]],
    *,
    cost: costs.Cost = costs.correct_logit,
    weightings: tuple[str, ...] = ("taylor",),
    moments: tuple[str, ...] = (),
    masks: tuple[BlockMasks, ...] | None = None,
) -> Statistics:
    """Sums over all batches, in one jitted pass.

    The result does not depend on batch size or number of devices, but for rounding.

    Args:
      model, params, cost, weightings, moments, masks: as in `batch_sums`.
      batches: dicts of arrays, all of one shape; global arrays if there is a mesh.

    Raises:
      ValueError: if there is no batch, or a sum is not finite (the block is named).
    """
    asked, total = (model, cost, tuple(moments)), None  # what it is compiled for
    for batch in batches:
        if total is None:
            pilot = jax.jit(pilot_means, static_argnums=0)(model, params, batch, masks)
            total = (jnp.zeros(()), _zeros(model.spec, weightings, moments))
        total = _add_batch(*asked, total, params, batch, pilot, masks)
    if total is None:
        raise ValueError("no calibration images: the source of batches is empty.")
    statistics = Statistics(total[0], model.spec.num_tokens, pilot, *total[1])
    check_finite(statistics)
    return statistics


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _add_batch(model, cost, moments, total, params, batch, pilot, masks):
    images, sums = total
    # No cotangent depends on the accumulators: the totals stand in for zeros.
    fresh = _both_sums(model, params, batch, pilot, cost, moments, masks, sums)
    return images + batch["weight"].sum(), jax.tree.map(jnp.add, sums, fresh)


def check_finite(statistics: Statistics) -> None:
    """Raises ValueError naming the first block and feature that is not finite."""
    sums = statistics.sums, statistics.branches
    sums, branches = jax.device_get(jax.tree.map(lambda x: jnp.isfinite(x).all(), sums))
    # Features first: a bad one spoils every gradient before it as well.
    kinds = ("values", lambda f: [f.first]), ("gradients", jax.tree.leaves)
    bad = [
        (f"{what} of {site}", index)
        for what, leaves in kinds
        for index, block in enumerate(sums)
        for site in SITES
        if not all(leaves(block[site]))
    ]
    good = [all(jax.tree.leaves(block)) for block in branches]
    bad += [("second moments", i) for i, fine in enumerate(good) if not fine]
    for what, index in bad[:1]:
        raise ValueError(
            f"the {what} in block {index} are not finite on the calibration images: "
            "look for NaN or inf in the parameters there or before it and in the "
            "images, or use float32."
        )
