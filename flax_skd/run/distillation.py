"""Losses that teach: the full network of the same step, or a frozen teacher."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flax_skd.method import losses, piad
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import ViTSpec
from flax_skd.method.vit import Params, ViT
from flax_skd.run import objective
from flax_skd.run.objective import Array, CutOf, Loss, whole

# (images, train state) -> logits [B, K]
Teacher = Callable[[Array, Any], Array]
LevelsOf = Callable[[Array, DropoutList], list[Array]]


def divergence(logits: Array, teacher: Array) -> Array:
    """Mean KL divergence from a teacher.

    Args:
      logits, teacher: [B, K]; no gradient flows to the teacher.
    """
    target = jax.nn.softmax(jax.lax.stop_gradient(teacher))
    return optax.kl_divergence(jax.nn.log_softmax(logits), target).mean()


def one_random(rng: Array, dropout_list: DropoutList) -> list[Array]:
    """`LevelsOf` of in-place distillation: one level, uniform."""
    return [piad.sample_level(rng, dropout_list)]


def smallest_and_random(rng: Array, dropout_list: DropoutList) -> list[Array]:
    """`LevelsOf` of the sandwich rule: the smallest level and one uniform."""
    return [jnp.asarray(dropout_list.levels), *one_random(rng, dropout_list)]


def with_full(
    model: ViT,
    *,
    levels_of: LevelsOf = one_random,
    label_smoothing: float = 0.0,
) -> Loss:
    """The full network learns the labels, sub-networks learn beside it.

    loss = CE(full, labels) + mean over levels of KL(full || level).
    In-place distillation is `one_random`, the sandwich rule `smallest_and_random` (Yu
    and Huang, ICCV 2019). A step costs one forward and backward pass a network.

    Args:
      model: of the full network.
      levels_of: function (rng, dropout list) -> levels of this step.
      label_smoothing: of the full network's labels.

    Returns:
      A `Loss`; the dropout list is in `state.extra`.
    """

    def loss(params: Params, batch: dict[str, Array], rng: Array, state: Any):
        spec, dropout_list = model.spec, state.extra.dropout_list

        def logits_at(level):
            widths = dropout_list.row(level)
            small, masks = objective.cut(params, spec, widths, state.extra)
            return model.apply({"params": small}, batch["image"], masks)

        full = model.apply({"params": params}, batch["image"])
        value = losses.cross_entropy(
            full, batch["label"], label_smoothing=label_smoothing
        )
        levels = levels_of(rng, dropout_list)
        parts = [divergence(logits_at(s), full) for s in levels]
        metrics = {
            "accuracy": losses.accuracy(full, batch["label"]),
            "subnet_loss": sum(parts) / len(parts),
            **objective.level_metrics(spec, dropout_list, jnp.stack(levels)),
        }
        return value + metrics["subnet_loss"], metrics

    return loss


def with_teacher(
    model: ViT,
    teacher: Teacher,
    *,
    cut_of: CutOf = whole,
    label_smoothing: float = 0.0,
) -> Loss:
    """CE(labels) + KL(teacher || student), the teacher frozen.

    Args:
      model: the student.
      teacher: function (images, train state) -> logits [B, K]; see `frozen`.
      cut_of: which sub-network learns in a step.
      label_smoothing: of the labels.
    """

    def loss(params: Params, batch: dict[str, Array], rng: Array, state: Any):
        size = batch["label"].shape[0]
        params, masks, metrics = cut_of(params, rng, size, state)
        logits = model.apply({"params": params}, batch["image"], masks)
        value = losses.cross_entropy(
            logits, batch["label"], label_smoothing=label_smoothing
        )
        kl = divergence(logits, teacher(batch["image"], state))
        accuracy = losses.accuracy(logits, batch["label"])
        metrics = {"accuracy": accuracy, "teacher_kl": kl, **metrics}
        return value + kl, metrics

    return loss


def frozen(model: ViT, *, student: ViTSpec) -> Teacher:
    """A teacher whose parameters are `frozen` of the train state.

    Args:
      model: the teacher.
      student: the network taught, whose mean and std normalised images have.

    Raises:
      ValueError: if the teacher has other classes or reads images of another shape.
    """
    for name in ("num_classes", "image_size", "in_channels"):
        own, other = getattr(model.spec, name), getattr(student, name)
        if own != other:
            raise ValueError(
                f"the teacher has {name} = {own}, the student {other}: they must be "
                "the same."
            )

    def logits(images, state):
        images = _renormalised(images, student, model.spec)
        return model.apply({"params": state.frozen}, images)

    return logits


def _renormalised(images: Array, old: ViTSpec, new: ViTSpec) -> Array:
    """Images normalised for one network as another wants them; uint8 as they are."""
    if images.dtype == jnp.uint8 or (old.mean, old.std) == (new.mean, new.std):
        return images

    def of_channels(values):
        return jnp.asarray(values, images.dtype).reshape(1, 1, 1, -1)

    pixels = images * of_channels(old.std) + of_channels(old.mean)
    return (pixels - of_channels(new.mean)) / of_channels(new.std)
