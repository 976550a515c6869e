"""What a train step minimises, and the masks under which it does."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from flax_skd.method import losses
from flax_skd.method.vit import BlockMasks, Params, ViT

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, Array]
Masks = tuple[BlockMasks, ...]
Loss = Callable[[Params, Batch, Array, Array], tuple[Array, Metrics]]
MasksOf = Callable[[Array, int, Array], Masks | None]


def drop_path_masks(
    rng: Array, masks: Masks | None, batch_size: int, *, depth: int, rate: float
) -> Masks:
    """Stochastic depth: each example skips each branch now and then.

    Args:
      rng: a key.
      masks: of the sub-network, whose gates are multiplied; None for the full one.
      batch_size: B.
      depth: blocks, L.
      rate: chance to skip in the last block, in [0, 1); falls linearly to 0 in the
        first. Branches that stay are scaled by 1 / (1 - chance).

    Returns:
      One `BlockMasks` a block, its gates [B].
    """
    chances = jnp.linspace(0.0, rate, depth)[:, None, None]
    kept = jax.random.bernoulli(rng, 1 - chances, (depth, 2, batch_size))
    gates = jnp.where(kept, 1 / (1 - chances), 0.0)
    masks = masks or (BlockMasks(*(None,) * 5),) * depth

    def times(gate, other):
        return gate if other is None else gate * other

    return tuple(
        m._replace(attn_gate=times(g[0], m.attn_gate), mlp_gate=times(g[1], m.mlp_gate))
        for m, g in zip(masks, gates, strict=True)
    )


def classification_loss(
    model: ViT,
    *,
    label_smoothing: float = 0.0,
    drop_path: float = 0.0,
    masks_of: MasksOf | None = None,
) -> Loss:
    """Cross-entropy of a ViT, as `fit` wants it.

    Args:
      model: full, or of a sub-network's widths.
      label_smoothing: share of the target spread over all classes.
      drop_path: chance to skip a branch of the last block; see `drop_path_masks`.
      masks_of: function (rng, batch size, step) -> masks of this step's sub-networks.

    Returns:
      Function (params, batch, rng, step) -> (loss [], {"accuracy": []}) of batches
      {"image": [B, S, S, C], "label": int [B] or float [B, K]}.

    Raises:
      ValueError: if a rate is not in [0, 1).
    """
    for name, rate in (("label_smoothing", label_smoothing), ("drop_path", drop_path)):
        if not 0 <= rate < 1:
            raise ValueError(f"{name} = {rate} must be in [0, 1).")

    def loss(params, batch, rng, step):
        level_rng, drop_rng = jax.random.split(rng)
        size = batch["label"].shape[0]
        masks = masks_of(level_rng, size, step) if masks_of else None
        if drop_path:
            depth = model.spec.depth
            masks = drop_path_masks(drop_rng, masks, size, depth=depth, rate=drop_path)
        logits = model.apply({"params": params}, batch["image"], masks)
        value = losses.cross_entropy(
            logits, batch["label"], label_smoothing=label_smoothing
        )
        return value, {"accuracy": losses.accuracy(logits, batch["label"])}

    return loss
