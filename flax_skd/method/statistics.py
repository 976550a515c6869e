"""Streaming sums of features and their gradients: one pass, whatever its batches.

For a feature f (queries, keys, values, hidden units) and g = dC/df, the cost summed
over images, one backward pass leaves every sum the contraction needs (Li et al., AAAI
2026, "WPAC"). The sums are computed *by* that pass: each tap is an identity whose
derivative with respect to a dummy accumulator is the sum, so no gradient of a feature
outlives its layer and memory does not grow with the number of images.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.method import costs, feature_sums, partial_sums, pilots, second_moments
from flax_skd.method.feature_sums import SITES, FeatureSums
from flax_skd.method.observed import observed
from flax_skd.method.pass_checks import arrays_of, check_every, check_finite
from flax_skd.method.vit import Array, BlockMasks, Params, ViT


class Statistics(NamedTuple):
    """What a calibration pass leaves behind.

    Attributes:
      images: number of images seen, [].
      tokens: tokens an image, int.
      pilot: one dict a block, site -> [H, d]: the mean the sums are taken about. Those
        of `branches` have points of their own, a key for each weighting, such as
        "hidden gradient".
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
        pilot = self.pilot[block][f"{second_moments.INNER[branch]} {weighting}"]
        return second_moments.mean(moments, pilot)

    def branch_covariance(self, block: int, branch: str, weighting: str) -> Array:
        """Covariance about `branch_mean` over the sum of weights, [n, n]."""
        moments = second_moments.of_branch(self.branches, block, branch, weighting)
        return second_moments.covariance(moments)

    def branch_moment(self, block: int, branch: str, weighting: str):
        """Both of these in float64 on the host, a `moments.Moment`."""
        asked = block, branch, weighting
        both = self.branch_mean(*asked), self.branch_covariance(*asked)
        return tuple(np.asarray(x, np.float64) for x in both)


def pilot_means(model: ViT, params: Params, batch: dict[str, Array], masks=None):
    """Mean of every feature over one batch, the point the sums are taken about.

    One dict a block, site -> [H, d] float32; of `mixed` too. `masks` as in `collect`.
    """
    live = batch["weight"]
    found: list[dict[str, Array]] = [{} for _ in range(model.spec.depth)]

    def tap(block, name, feature):
        if name not in (*SITES, "mixed"):
            return feature
        f = feature_sums.heads(feature) * live.reshape(-1, 1, 1, 1)
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
    weightings: tuple[str, ...] = ("gradient",),
    moments: tuple[str, ...] = (),
    masks: tuple[BlockMasks, ...] | None = None,
    hidden_every: int = 1,
) -> Any:
    """The sums of one batch, by one forward and one backward pass.

    Args:
      model: the full network.
      params: its parameters.
      batch: `image` [B, S, S, C], `label` [B], `weight` [B], 0 for padding.
      pilot: of `pilot_means`.
      cost: function (logits, labels) -> [B], such as those of `costs.COSTS`.
      weightings: which second moments of heads to collect.
      moments: weightings of `second_moments` to collect; with
        `second_moments.ATTENDED` also those of attended keys, for about the cost of
        attention once more.
      masks: of a sub-network (`subnet.masks`). The sums are then those of its residual
        stream, but of all units, also of those that it cuts.
      hidden_every: `moments` of hidden units take images 0, k, 2 k, ... of a batch.

    Returns:
      One dict a block, site -> `FeatureSums`. With `moments`, a pair: those, and one
      dict a block, weighting -> `second_moments.BlockMoments`.
    """
    zeros = jax.tree.map(jnp.zeros_like, _shapes(model, weightings, moments))
    options = cost, moments, hidden_every
    both = _both_sums(model, options, zeros, batch, (params, pilot, masks))
    return both if moments else both[0]


def _shapes(model, weightings, moments):
    """Of the sums: of `FeatureSums` and of `second_moments`, one dict a block each."""
    spec, blocks = model.spec, range(model.spec.depth)
    return jax.eval_shape(
        lambda: (
            tuple(feature_sums.zeros(spec, weightings) for _ in blocks),
            tuple(second_moments.zeros(spec, moments) for _ in blocks),
        )
    )


def _both_sums(model, options, zeros, batch, shared):
    (cost, moments, every), (params, pilot, masks) = options, shared
    live = batch["weight"]

    def total(zeros):
        sums, branches = zeros
        also = second_moments.taps(
            *(model.spec, branches, pilot, live, moments),
            masks=masks,
            hidden_every=every,
        )

        def tap(block, name, feature):
            if name in SITES:
                seen = pilot[block][name], live
                feature = observed(feature_sums.of, feature, seen, sums[block][name])
            return also(block, name, feature) if moments else feature

        logits = model.apply({"params": params}, batch["image"], masks, tap)
        labels = jnp.where(live > 0, batch["label"], 0)  # that of padding may be any
        return jnp.sum(cost(logits, labels) * live)

    return jax.grad(total)(zeros)


def collect(
    model: ViT,
    params: Params,
    batches: Iterable[dict[str, Any]],
    *,
    cost: costs.Cost = costs.correct_logit,
    weightings: tuple[str, ...] = ("gradient",),
    moments: tuple[str, ...] = (),
    masks: tuple[BlockMasks, ...] | None = None,
    hidden_every: int = 1,
) -> Statistics:
    """Sums over all batches, in one jitted pass.

    The result does not depend on batch size or number of devices, but for rounding.
    Devices that share out a batch keep sums of their own and exchange them at the end.

    Args:
      model: the full network.
      params: its parameters.
      batches: dicts of `image` [B, S, S, C], `label` [B] and `weight` [B], 0 for
        padding, all of one shape, such as those of `eval_batches`; global arrays if
        there is a mesh. Where the cost reads no label, any will do.
      cost: function (logits, labels) -> [B], such as those of `costs.COSTS`.
      weightings: how tokens are weighted, `gradient` or `plain`, in the covariances of
        queries, keys and values by which `wpac` and `pca` rotate; one set each.
      moments: the same for the second moments of queries, keys, head outputs and hidden
        units, which `balanced` and a compensation read. `attended` beside one of them
        adds those of keys under each query's attention.
      masks: of a sub-network (`subnet.masks`). The sums are then those of its residual
        stream, but of all units, also of those that it cuts.
      hidden_every: k >= 1, a divisor of a device's share of a batch. The `moments` of
        hidden units, which cost most, are then taken from every k-th image alone.

    Returns:
      `Statistics`, as `contract` takes them; a criterion says what it reads of
      `weightings` and `moments` (`contraction.CRITERIA`).

    Raises:
      ValueError: if there is no batch or one is no dict, lacks an array or has one of
        another shape, a name is unknown, the cost is no function, a sum is not finite
        (the block is named), or `hidden_every` does not divide.
    """
    _check_names(weightings, moments)
    _check_cost(cost)
    options, total = (cost, tuple(moments), hidden_every), None
    for batch in batches:
        batch = arrays_of(batch)
        if total is None:
            place = partial_sums.place_of(batch["weight"])
            check_every(hidden_every, len(batch["weight"]), partial_sums.count(place))
            pilot = jax.jit(pilot_means, static_argnums=0)(model, params, batch, masks)
            pilot = pilots.weighted(pilot, moments)
            shapes = jnp.zeros(()), _shapes(model, weightings, moments)
            total = partial_sums.zeros(shapes, place)
            if moments:  # the first batch twice: about what its weights say is the mean
                shared = params, pilot, masks
                total = _add_batch(model, options, place, total, batch, shared)
                found = partial_sums.joined(pilots.firsts(total[1][1]))
                pilot = pilots.refined(pilot, found)
                total = partial_sums.zeros(shapes, place)
        shared = params, pilot, masks
        total = _add_batch(model, options, place, total, batch, shared)
        # One batch at a time: none waits on the devices, and progress is what is done.
        jax.block_until_ready(total[0])
    if total is None:
        raise ValueError("no calibration images: the source of batches is empty.")
    images, sums = partial_sums.joined(total)
    if not float(images):
        raise ValueError("no calibration images: all of them have weight 0.")
    statistics = Statistics(images, model.spec.num_tokens, pilot, *sums)
    check_finite(statistics)
    return statistics


def _check_names(weightings: tuple[str, ...], moments: tuple[str, ...]) -> None:
    second_moments.checked(moments)
    known = second_moments.WEIGHTINGS
    if isinstance(weightings, str) or not set(weightings) <= set(known):
        raise ValueError(
            f"weightings {weightings!r}: a tuple of names, of {', '.join(known)}."
        )


def _check_cost(cost: costs.Cost) -> None:
    named = cost in [*costs.COSTS]
    if named or not callable(cost):
        name = cost if named else "logit"
        raise ValueError(
            f"cost = {cost!r}: give a function (logits, labels) -> [B], such as "
            f"costs.cost_named({name!r}, num_classes) of flax_skd.method.costs."
        )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _add_batch(model, options, place, total, batch, shared):
    def add(total, batch, shared):
        images, sums = total
        # No cotangent depends on the accumulators: the totals stand in for zeros.
        fresh = _both_sums(model, options, sums, batch, shared)
        return images + batch["weight"].sum(), jax.tree.map(jnp.add, sums, fresh)

    return partial_sums.apart(add, place)(total, batch, shared)
