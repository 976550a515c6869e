"""Scala: one ratio slices width, heads and MLP; four networks learn in every step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flax_skd.method import losses, piad, vit
from flax_skd.method.spec import ViTSpec
from flax_skd.method.vit import Params, ViT
from flax_skd.rivals import stages, start
from flax_skd.run import commands, configured_loss, distillation
from flax_skd.run.objective import Array, Loss
from flax_skd.run.programs import Program, save_trained

# What of attention a ratio cuts beside the width: whole heads, or dims of every head.
ATTENTION = {"heads": "num_heads", "head_dims": "head_dim"}


def sliced_spec(spec: ViTSpec, ratio: float, attention: str = "heads") -> ViTSpec:
    """The network of a ratio, an ordinary one: width, MLP, and heads or their dims.

    Its attention has its own scale, as it is trained by it.

    Raises:
      ValueError: if a size is not whole, or `attention` unknown.
    """
    if attention not in ATTENTION:
        known = ", ".join(ATTENTION)
        raise ValueError(f"rival.attention {attention!r}: choose one of {known}.")
    names = ("width", "mlp_dim", ATTENTION[attention])
    sizes = {name: ratio * getattr(spec, name) for name in names}
    if any(size < 1 or size != int(size) for size in sizes.values()):
        raise ValueError(
            f"ratio {ratio:g} of rival.ratios makes {sizes}: choose ratios that give "
            "whole numbers, or another rival.attention."
        )
    if spec.pre_logits:
        raise ValueError("a network with pre_logits has a width that no ratio cuts.")
    return spec.replace(**{name: int(size) for name, size in sizes.items()})


def first(size: int, kept: int) -> slice:
    """The first rows or columns of an axis."""
    del size
    return slice(kept)


def last(size: int, kept: int) -> slice:
    """The last ones: isolated activation."""
    return slice(size - kept, size)


def sliced(
    params: Params, small: ViTSpec, end: Callable[[int, int], slice] = first
) -> Params:
    """The parameters of a smaller network: every axis cut to its size there.

    Args:
      params: of the full network.
      small: of the ratio.
      end: `first` or `last`.
    """
    shapes = _shapes(small)
    return jax.tree.map(
        lambda x, to: x[tuple(map(end, x.shape, to.shape))], params, shapes
    )


@functools.lru_cache(maxsize=64)
def _shapes(spec: ViTSpec) -> Params:
    return jax.eval_shape(lambda: vit.init(spec, jax.random.key(0)))


def of_four(
    networks: list[tuple[ViT, Callable[[int, int], slice]]],
    *,
    label_smoothing: float = 0.0,
    teacher: distillation.Teacher | None = None,
) -> Loss:
    """CE of every network, and KL of each from the next larger one of the step.

    The chain 1 -> m2 -> m1 -> s (Zhang et al., arXiv:2412.04786). There a distillation
    token's output learns by KL and the class token's from labels; a network here has
    one output, the class token's, which learns from both.

    Args:
      networks: model and end of the slices, the full network first, falling.
      label_smoothing: of all.
      teacher: of the full network, such as `distillation.frozen`; none for labels
        alone.
    """

    def loss(params: Params, batch: dict[str, Array], rng: Array, state: Any):
        del rng
        above = teacher(batch["image"], state) if teacher else None
        value, accuracies = 0.0, []
        for model, end in networks:
            small = sliced(params, model.spec, end)
            logits = model.apply({"params": small}, batch["image"])
            value += losses.cross_entropy(
                logits, batch["label"], label_smoothing=label_smoothing
            )
            if above is not None:
                value += distillation.divergence(logits, above)
            accuracies.append(losses.accuracy(logits, batch["label"]))
            above = logits
        names = {"accuracy": accuracies[0], "smallest_accuracy": accuracies[-1]}
        return value, names

    return loss


class Sampling:
    """Stable sampling: the four ratios of a step, drawn by the host.

    One ratio in (s, (s + 1) / 2] and one in ((s + 1) / 2, 1), s the smallest, uniform
    over the grid; without a ratio on a side it goes without. Each pair is compiled
    once, so that a grid of 13 makes 30 programs and one of four makes one.

    Args:
      ratios: the grid, with 1 and at least one smaller.
      loss_of: function of the ratios of a step, falling -> its loss.
      seed: step t draws by (seed, t), on every process the same.
      stage: of `stages.Stages`: in stage 0 the full network trains alone.
    """

    def __init__(
        self,
        ratios: list[float],
        loss_of: Callable[[tuple[float, ...]], Loss],
        *,
        seed: int,
        stage: stages.Stages,
    ):
        self._ratios, self._seed, self._stage = sorted(ratios), seed, stage
        self._loss_of = functools.cache(loss_of)

    def drawn(self, step: int) -> tuple[float, ...]:
        """The ratios of a step: 1, m2, m1, s."""
        smallest, *others = self._ratios[:-1]
        middle = (smallest + 1) / 2
        rng = np.random.default_rng((self._seed, step))
        sides = ([r for r in others if r > middle], [r for r in others if r <= middle])
        between = (float(rng.choice(side)) for side in sides if side)
        return (1.0, *between, smallest)

    def before_step(self, step: int, extra: stages.Stage) -> tuple[stages.Stage, Loss]:
        """See `train.fit`."""
        alone = self._stage.now(extra) == 0
        return extra, self._loss_of((1.0,) if alone else self.drawn(step))


def _ratios(text: str) -> list[float]:
    ratios = commands.shares("rival.ratios", text)
    if len(set(ratios)) < 2 or max(ratios) != 1 or min(ratios) <= 0:
        raise ValueError(
            f"rival.ratios = {text!r}: give 1 and at least one smaller ratio above 0."
        )
    return sorted(set(ratios))


def program(config: Any) -> Program:
    """Full network and one network a ratio; `network-0.5` is that of ratio 0.5."""
    found, options = start.network(config), config.rival
    ratios = _ratios(options.ratios)
    specs = {r: sliced_spec(found.spec, r, options.attention) for r in ratios}
    if not 0 <= options.warm_epochs < config.epochs:
        raise ValueError(
            f"rival.warm_epochs = {options.warm_epochs} must lie in [0, {config.epochs})."
        )
    warm = stages.Stages(2)
    known = teacher = None
    if options.teacher:
        known = start.named(options.teacher)
        teacher = configured_loss.taught_by(config, known.spec, found.spec)

    def end_of(ratio):
        return last if ratio == ratios[0] else first

    def loss_of(drawn):
        four = of_four(
            [(configured_loss.vit_of(config, specs[r]), end_of(r)) for r in drawn],
            label_smoothing=configured_loss.smoothing_of(config),
            teacher=teacher,
        )
        return configured_loss.mixed_loss(config, found.spec, four)

    sampling = Sampling(ratios, loss_of, seed=config.seed, stage=warm)

    def save(directory, params, extra, facts):
        del extra
        facts = {**facts, "trained": "scala"}
        one_level = piad.uniform(found.spec, steps=1)
        trained = found._replace(params=params, dropout_list=one_level)
        save_trained(directory, trained, facts)
        smaller = {
            f"{r:g}": (sliced(params, specs[r], end_of(r)), specs[r])
            for r in ratios[:-1]
        }
        start.save_sizes(directory, smaller, facts)

    def begin(index, state):
        return warm.begin(index if options.warm_epochs else 1, state)

    return Program(
        configured_loss.vit_of(config, found.spec),
        found.params,
        loss_of((1.0,)),
        save,
        extra=stages.Stage(np.int32(0)),
        before_epoch=begin,
        every_epochs=options.warm_epochs or config.epochs,
        stages=2 if options.warm_epochs else 1,
        before_step=sampling.before_step,
        beside=tuple(f"{r:g}" for r in ratios[:-1]),
        frozen=known and known.params,
    )
