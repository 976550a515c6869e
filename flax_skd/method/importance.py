"""How much every dim matters to a network already cut: sensitivity times share.

I = gamma * alpha (Li et al., AAAI 2026, "PIAD"): gamma is what the loss rises by when a
branch is skipped, alpha the share of a dim in its branch's sum of |g f|. Both are
measured on calibration images under the masks of one level, so that one compilation
serves every level of a growing list.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_skd.method import costs, pass_checks, statistics, subnet
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import Array, BlockMasks, Params, ViT

Sensitivity = Callable[[Array, Array, Array], Array]

FLOOR = 1e-3  # of the median sensitivity


def cross_entropy(logits: Array, current: Array, labels: Array) -> Array:
    """-log p(label). The paper divides the rise by it, a factor common to all."""
    del current
    return costs.cross_entropy(logits, labels)


def error(logits: Array, current: Array, labels: Array) -> Array:
    """1 for a wrong first class: the rise is the drop in accuracy."""
    del current
    return (logits.argmax(-1) != labels).astype(jnp.float32)


def kl(logits: Array, current: Array, labels: Array) -> Array:
    """KL divergence from the current level's output; needs no labels."""
    del labels
    return optax.kl_divergence(jax.nn.log_softmax(logits), jax.nn.softmax(current))


def feature_distance(features: Array, current: Array, labels: Array) -> Array:
    """Squared distance to the current level's feature, or to its single logit."""
    del labels
    return jnp.square(features - current).mean(-1)


# The authors' program takes the relative drop of top-1, which may be negative.
SENSITIVITIES: dict[str, Sensitivity] = {
    "cross_entropy": cross_entropy,
    "accuracy": error,
    "kl": kl,
    "feature": feature_distance,
}


def sensitivity_named(name: str, num_classes: int) -> Sensitivity:
    """Looks a sensitivity up and checks that the network has what it reads.

    Args:
      name: a key of `SENSITIVITIES`.
      num_classes: of the network, 0 for a backbone without a head.

    Raises:
      ValueError: if the name is unknown, or it compares classes and there are not two:
        no branch would matter more than another.
    """
    if name not in SENSITIVITIES:
        raise ValueError(
            f"sensitivity {name!r}: choose one of {', '.join(SENSITIVITIES)}."
        )
    if num_classes < 2 and name != "feature":
        there = "a single logit" if num_classes else "no head"
        raise ValueError(
            f"sensitivity {name!r} compares classes and the network has {there}: "
            "use sensitivity 'feature'."
        )
    return SENSITIVITIES[name]


class Importance(NamedTuple):
    """What the loss is expected to rise by when a dim is dropped, summed over heads.

    Attributes:
      attn: [L, d] of a dim of queries, keys and values in every head together.
      mlp: [L, M] of a hidden unit.
    """

    attn: Any
    mlp: Any

    def check(self, spec: ViTSpec) -> "Importance":
        """Returns these as float64 numpy arrays.

        Raises:
          ValueError: if they do not fit `spec`, or one is negative or not finite; the
            message names the block.
        """
        checked = Importance(*(np.asarray(field, np.float64) for field in self))
        sizes = spec.head_dim, spec.mlp_dim
        for name, field, size in zip(self._fields, checked, sizes):
            if field.shape != (spec.depth, size):
                raise ValueError(
                    f"importance of {name} has shape {field.shape}, the network "
                    f"{spec.depth} blocks of {size}: measure it on this network."
                )
            _check_finite(f"importance of {name}", field)
            if (field < 0).any():
                block, dim = np.argwhere(field < 0)[0]
                raise ValueError(
                    f"importance of {name} in block {block} is {field[block, dim]} at "
                    f"dim {dim}: must not be negative."
                )
        return checked


class ImportanceSums(NamedTuple):
    """What `measure` adds up over batches and devices.

    Attributes:
      images: how many, [].
      attn, mlp: sums of |g f| over tokens, [L, d] and [L, M].
      rise: sum over images of what skipping each branch costs, [L, 2], attention
        first; not clamped.
    """

    images: Array
    attn: Array
    mlp: Array
    rise: Array


def measure(
    model: ViT,
    params: Params,
    batches: Iterable[dict[str, Any]],
    widths: SubnetSpec,
    *,
    cost: costs.Cost = costs.correct_logit,
    sensitivity: Sensitivity = cross_entropy,
) -> Importance:
    """Importance of every dim that a sub-network has left.

    Compiled once for a model, its costs and a shape of batches: the widths are data.

    Args:
      model: of the full network.
      params: its parameters.
      batches: clean calibration images, dicts of `image` [B, S, S, C], `label` [B] and
        `weight` [B], 0 for padding; global arrays if there is a mesh.
      widths: of the smallest level so far.
      cost: of alpha, function (logits, labels) -> [B], such as those of `costs.COSTS`.
      sensitivity: of gamma, function (logits, logits of the current level, labels) ->
        [B], such as those of `SENSITIVITIES`; its mean rise counts.

    Returns:
      `Importance` in float64, 0 beyond the widths.

    Raises:
      ValueError: if there is no image, a batch lacks an array, or a sum is not finite
        (the block is named).
    """
    widths = subnet.as_data(widths)
    widths.check(model.spec)
    total = None
    for batch in batches:
        batch = pass_checks.arrays_of(batch)
        sums = _jitted_sums(
            model, params, batch, widths, cost=cost, sensitivity=sensitivity
        )
        # One program over devices at a time, as in `evaluate`.
        sums = jax.block_until_ready(sums)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None or not float(total.images):
        raise ValueError("no calibration images: the source of batches is empty.")
    return from_sums(jax.device_get(total), widths)


def batch_sums(
    model: ViT,
    params: Params,
    batch: dict[str, Array],
    widths: SubnetSpec,
    *,
    cost: costs.Cost,
    sensitivity: Sensitivity,
) -> ImportanceSums:
    """The sums of one batch: a forward and backward pass, and 2L + 1 forward ones.

    Args: as of `measure`; `widths` may be traced.
    """
    spec, live = model.spec, batch["weight"]
    masks = subnet.masks(spec, widths)
    taylor1 = [
        {site: sums.taylor1.sum(0) for site, sums in block.items()}
        for block in statistics.batch_sums(
            *(model, params, batch, _no_pilot(spec)),
            cost=cost,
            weightings=(),
            masks=masks,
        )
    ]
    # Row 0 skips nothing. Mapped, not unrolled: one network in the program.
    logits = jax.lax.map(
        lambda gates: model.apply(
            {"params": params}, batch["image"], _gated(masks, gates)
        ),
        jnp.concatenate([jnp.ones((1, 2 * spec.depth)), 1 - jnp.eye(2 * spec.depth)]),
    )
    losses = jax.vmap(sensitivity, (0, None, None))(logits, logits[0], batch["label"])
    # The difference of each image, since a rise is small beside the sum of losses.
    rise = jnp.where(live[None] > 0, losses[1:] - losses[:1], 0.0) * live[None]
    return ImportanceSums(
        images=live.sum(),
        attn=jnp.stack([b["query"] + b["key"] + b["value"] for b in taylor1]),
        mlp=jnp.stack([b["hidden"] for b in taylor1]),
        rise=rise.sum(1).reshape(spec.depth, 2),
    )


_jitted_sums = jax.jit(
    batch_sums, static_argnums=0, static_argnames=("cost", "sensitivity")
)


def _no_pilot(spec: ViTSpec) -> tuple[dict[str, Array], ...]:
    """Zeros: sums of |g f| are not taken about a mean."""
    head = jnp.zeros((spec.num_heads, spec.head_dim))
    hidden = jnp.zeros((1, spec.mlp_dim))
    return ({"query": head, "key": head, "value": head, "hidden": hidden},) * spec.depth


def _gated(masks: tuple[BlockMasks, ...], gates: Array) -> tuple[BlockMasks, ...]:
    """The masks with every branch's gate times one of `gates` [2L]."""
    # The authors' "skip" feeds LN(x) through the residual; here the branch adds zero.
    return tuple(
        m._replace(attn_gate=m.attn_gate * on[0], mlp_gate=m.mlp_gate * on[1])
        for m, on in zip(masks, gates.reshape(-1, 2))
    )


def from_sums(sums: ImportanceSums, widths: SubnetSpec) -> Importance:
    """gamma * alpha, in float64 on the host.

    Args:
      sums: over all batches.
      widths: they were taken at.

    Raises:
      ValueError: if a sum is not finite; the message names the block.
    """
    sums = ImportanceSums(*(np.asarray(field, np.float64) for field in sums))
    for name, field in zip(("attn", "mlp"), (sums.attn, sums.mlp)):
        _check_finite(f"|gradient * feature| of {name}", field)
    _check_finite("the rise of the loss without a branch", sums.rise)
    left = (np.maximum(widths.qk_dim, widths.vo_dim), np.asarray(widths.mlp_dim))
    gamma = _floored(np.maximum(sums.rise / sums.images, 0), np.stack(left, 1) > 0)
    alpha = [_shares(s, n) for s, n in zip((sums.attn, sums.mlp), left)]
    return Importance(*(a * g[:, None] for a, g in zip(alpha, gamma.T)))


def _floored(gamma: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Sensitivities at least `FLOOR` of their median, over branches still there."""
    # Accuracy on few images leaves most branches at 0, and so the median: the next
    # best scale is that of the others, and without any alpha alone decides.
    for chosen in (gamma[present], gamma[gamma > 0]):
        if chosen.size and np.median(chosen) > 0:
            return np.maximum(gamma, FLOOR * np.median(chosen))
    return np.ones_like(gamma)


def _shares(scores: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Scores [L, n] over their sum within the first `left` [L]; 0 beyond."""
    inside = np.arange(scores.shape[1])[None] < left[:, None]
    # A branch no gradient reaches (a head of zeros, say) is shared out evenly.
    dead = ~(scores * inside).any(1, keepdims=True)
    scores = np.where(inside, np.where(dead, 1.0, scores), 0.0)
    return scores / np.maximum(scores.sum(1, keepdims=True), np.finfo(float).tiny)


def _check_finite(what: str, field: np.ndarray) -> None:
    """Raises ValueError naming the first block whose numbers are not finite."""
    bad = np.flatnonzero(~np.isfinite(field).all(1))
    if bad.size:
        raise ValueError(
            f"{what} in block {bad[0]} is not finite: look for NaN or inf in the "
            "parameters and calibration images and for labels that are no class, or "
            "use float32."
        )
