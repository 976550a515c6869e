"""What a train step minimises, and the sub-network for which it does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_skd.method import compensation, losses, piad, subnet
from flax_skd.method.compensation import Compensation
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import BlockMasks, Params, ViT

Array = jax.Array
Batch = dict[str, Array]
Metrics = dict[str, Array]
Masks = tuple[BlockMasks, ...]
# (params, batch, rng, train state before the step, without what the optimizer and the
# average keep) -> (loss [], metrics)
Loss = Callable[[Params, Batch, Array, Any], tuple[Array, Metrics]]
# (params, rng, batch size, train state) -> (params, masks, metrics)
CutOf = Callable[[Params, Array, int, Any], tuple[Params, Masks | None, Metrics]]


class Elastic(NamedTuple):
    """`extra` of a train state whose network has many sizes.

    Attributes:
      dropout_list: the levels.
      compensation: what repairs a cut, constant; None for plain slices.
      level: int32 [], of the step, where the host draws it; None where the step does.
    """

    dropout_list: DropoutList
    compensation: Compensation | None = None
    level: Any = None


def cut(params: Params, spec: ViTSpec, widths: SubnetSpec, extra: Elastic):
    """(params, masks) under which the full model is the sub-network of `widths`."""
    widths = _apart(widths)
    params = compensation.repaired(params, spec, extra.compensation, widths)
    return params, subnet.masks(spec, widths)


def cut_params(params: Params, extra: Elastic, spec: ViTSpec) -> Params:
    """Parameters with which the full model is the sub-network of `extra.level`."""
    widths = _apart(extra.dropout_list.row(extra.level))
    params = compensation.repaired(params, spec, extra.compensation, widths)
    return subnet.masked(params, spec, widths)


def _apart(widths: SubnetSpec) -> SubnetSpec:
    """The same widths [..., L], but each block reads its own from an array of its own.

    What is computed from them then looks the same in every block and is compiled once.
    Left to itself, a compiler pulls the index of the block into each computation.
    """
    blocks = range(widths.mlp_dim.shape[-1])
    rows = [jnp.stack([field[..., i] for field in widths]) for i in blocks]
    rows = jax.lax.optimization_barrier(rows)
    return SubnetSpec(*(jnp.stack(field, -1) for field in zip(*rows)))


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
    masks = masks or (BlockMasks(),) * depth

    def times(gate, other):
        return gate if other is None else gate * other

    return tuple(
        m._replace(attn_gate=times(g[0], m.attn_gate), mlp_gate=times(g[1], m.mlp_gate))
        for m, g in zip(masks, gates, strict=True)
    )


def whole(params: Params, rng: Array, batch_size: int, state: Any):
    """`CutOf` of ordinary training: the model as it is."""
    del rng, batch_size, state
    return params, None, {}


def sampled_levels(
    spec: ViTSpec,
    *,
    sampling: str = "per_step",
    draw: Callable[..., Array] = piad.sample_level,
) -> CutOf:
    """`CutOf` of PIAD: a random level of the dropout list in `state.extra`.

    Args:
      spec: the full network.
      sampling: `per_step`, one level for the batch, or `per_example`, one each, which
        lowers the variance of the gradient and leaves no room for a compensation.
      draw: function (rng, dropout list, shape) -> levels, uniform unless told
        otherwise.

    Raises:
      ValueError: if the sampling is unknown.
    """
    if sampling not in ("per_step", "per_example"):
        raise ValueError(f"sampling {sampling!r}: choose per_step or per_example.")

    def cut_of(params, rng, batch_size, state):
        shape = (batch_size,) if sampling == "per_example" else ()
        dropout_list = state.extra.dropout_list
        levels = draw(rng, dropout_list, shape)
        params, masks = cut(params, spec, dropout_list.row(levels), state.extra)
        return params, masks, level_metrics(spec, dropout_list, levels)

    return cut_of


def level_within(spec: ViTSpec, within: SubnetSpec) -> CutOf:
    """`CutOf` of PIAD for a model of static widths and parameters of `cut_params`.

    Args:
      spec: the full network.
      within: widths of the model, at least those of `state.extra.level`. Nothing beyond
        them is computed, and all between is 0.
    """

    def cut_of(params, rng, batch_size, state):
        del rng, batch_size
        metrics = level_metrics(spec, state.extra.dropout_list, state.extra.level)
        return subnet.extract(params, within), None, metrics

    return cut_of


def level_metrics(spec: ViTSpec, dropout_list: DropoutList, levels: Array) -> Metrics:
    """For the log: mean level and share of MACs, and how long the list is."""
    return {
        "level": levels.astype(jnp.float32).mean(),
        "levels": dropout_list.levels.astype(jnp.float32),
        "macs_share": piad.macs_share(spec, dropout_list.row(levels)).mean(),
    }


def classification_loss(
    model: ViT,
    *,
    label_smoothing: float = 0.0,
    drop_path: float = 0.0,
    cut_of: CutOf = whole,
) -> Loss:
    """Cross-entropy of a ViT, as `fit` wants it.

    Args:
      model: full, or of a sub-network's widths.
      label_smoothing: share of the target spread over all classes.
      drop_path: chance to skip a branch of the last block; see `drop_path_masks`.
      cut_of: what is trained in this step, such as `sampled_levels`.

    Returns:
      Function (params, batch, rng, state) -> (loss [], {"accuracy": [], ...}) of
      batches {"image": [B, S, S, C], "label": int [B] or float [B, K]}.

    Raises:
      ValueError: if a rate is not in [0, 1).
    """
    for name, rate in (("label_smoothing", label_smoothing), ("drop_path", drop_path)):
        if not 0 <= rate < 1:
            raise ValueError(f"{name} = {rate} must be in [0, 1).")

    def loss(params, batch, rng, state):
        level_rng, drop_rng = jax.random.split(rng)
        size = batch["label"].shape[0]
        params, masks, metrics = cut_of(params, level_rng, size, state)
        if drop_path:
            depth = model.spec.depth
            masks = drop_path_masks(drop_rng, masks, size, depth=depth, rate=drop_path)
        logits = model.apply({"params": params}, batch["image"], masks)
        value = losses.cross_entropy(
            logits, batch["label"], label_smoothing=label_smoothing
        )
        accuracy = losses.accuracy(logits, batch["label"])
        return value, {"accuracy": accuracy, **metrics}

    return loss
