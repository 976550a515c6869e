"""The model and the loss that a training config asks for."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from flax_skd.io import checkpoint
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import growth, piad
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import ViT
from flax_skd.run import buckets, commands, distillation, elastic, mixing, objective
from flax_skd.run.objective import CutOf, Loss


def vit_of(config: Any, spec: ViTSpec, widths: SubnetSpec | None = None) -> ViT:
    """The model of a training config, full or of static widths."""
    dtype = commands.dtype_named(config.dtype)
    return ViT(spec, widths, dtype=dtype, remat=config.remat)


def smoothing_of(config: Any) -> float:
    """Label smoothing of the loss: none where mixed targets are smooth already.

    Raises:
      ValueError: if it is not in [0, 1).
    """
    if not 0 <= config.label_smoothing < 1:
        raise ValueError(
            f"label_smoothing = {config.label_smoothing} must be in [0, 1)."
        )
    return 0.0 if _mixing(config) else config.label_smoothing


def _mixing(config: Any) -> mixing.Mixing | None:
    """The mixing of a config's `mixing` section, None where all of it is off."""
    chosen = dict(config.mixing.items())
    if not any(chosen[name] for name in ("mixup", "cutmix", "erase")):
        return None
    return mixing.Mixing(smoothing=config.label_smoothing, **chosen)


def mixed_loss(config: Any, spec: ViTSpec, loss: Loss) -> Loss:
    """The loss on mixed and erased images, if the config asks for it."""
    options = _mixing(config)
    if options is None:
        return loss

    def mixed(params, batch, rng, state):
        mix_rng, rng = jax.random.split(rng)
        batch = mixing.mixed_batch(mix_rng, batch, spec, options)
        return loss(params, batch, rng, state)

    return mixed


def ordinary(config: Any, model: ViT) -> Loss:
    """Of a network of one size."""
    loss = objective.classification_loss(
        model, label_smoothing=smoothing_of(config), drop_path=config.drop_path
    )
    return mixed_loss(config, model.spec, loss)


def compiled_sizes(
    config: Any, spec: ViTSpec, teacher: Supernet | None = None
) -> buckets.Buckets | None:
    """The sizes a step is compiled for, if the config names any."""
    options = config.piad
    shares = tuple(commands.shares("piad.compiled", options.compiled))
    if not shares:
        return None
    plain = {"masks": "levels", "sampling": "per_step", "draw": "uniform"}
    other = {k: options[k] for k, v in plain.items() if options[k] != v}
    if other or options.loss not in ("labels", "teacher"):
        raise ValueError(
            f"piad.compiled = {options.compiled!r} goes with {plain} and the losses "
            f"'labels' and 'teacher', not with {other or options.loss!r}."
        )

    def loss_of(within):
        model = vit_of(config, spec, within)
        cut_of = objective.level_within(spec, within)
        return _level_loss(config, model, cut_of, teacher)

    return buckets.Buckets(spec, loss_of, shares=shares, seed=config.seed)


def _piad_cut(options: Any, spec: ViTSpec, groups: growth.Groups) -> CutOf:
    """What a step drops: a level of the list, or a variant of the ablation."""
    draws: dict[str, Callable[..., jax.Array]] = {
        "uniform": piad.sample_level,
        "macs": functools.partial(piad.sample_level_by_macs, spec=spec),
    }
    if options.draw not in draws:
        raise ValueError(f"draw {options.draw!r}: choose one of {', '.join(draws)}.")
    draw = draws[options.draw]
    if options.masks == "levels":
        return objective.sampled_levels(spec, sampling=options.sampling, draw=draw)
    if options.sampling != "per_step" or options.loss in ("in_place", "sandwich"):
        raise ValueError(
            f"masks {options.masks!r} go with sampling 'per_step' and the losses "
            f"'labels' and 'teacher', not {options.sampling!r} and {options.loss!r}."
        )
    if options.masks not in ("none", *elastic.MASKS):
        known = ", ".join(["levels", "none", *elastic.MASKS])
        raise ValueError(f"masks {options.masks!r}: choose one of {known}.")
    if options.masks in ("none", "branches") and options.draw != "uniform":
        raise ValueError(
            f"masks {options.masks!r} draw no level, and draw {options.draw!r} says how."
        )
    if options.masks == "none":
        return objective.whole
    return elastic.MASKS[options.masks](
        spec, groups=groups, draw=draw, rate=options.branch_rate
    )


def of_piad(
    config: Any, model: ViT, groups: growth.Groups, teacher: Supernet | None = None
) -> Loss:
    """Of a network of many sizes: a level, or a variant of the ablation, a step."""
    cut_of = _piad_cut(config.piad, model.spec, groups)
    return _level_loss(config, model, cut_of, teacher)


def _check_options(config: Any) -> None:
    """Refuses what a loss would not look at."""
    options = config.piad
    plain = {"sampling": "per_step", "draw": "uniform"}
    ignored = {} if options.loss in ("labels", "teacher") else plain
    other = {k: options[k] for k, v in ignored.items() if options[k] != v}
    if other:
        raise ValueError(
            f"loss {options.loss!r} takes several levels a step and goes with {plain}, "
            f"not with {other}."
        )
    if options.loss != "labels" and config.drop_path:
        raise ValueError(
            f"drop_path = {config.drop_path} goes with the loss 'labels', not with "
            f"{options.loss!r}: give --config.drop_path=0.0."
        )


def _level_loss(
    config: Any, model: ViT, cut_of: CutOf, teacher: Supernet | None
) -> Loss:
    _check_options(config)
    spec, options = model.spec, config.piad
    smoothing = smoothing_of(config)
    made = {
        "labels": lambda: objective.classification_loss(
            model,
            label_smoothing=smoothing,
            drop_path=config.drop_path,
            cut_of=cut_of,
        ),
        "in_place": lambda: distillation.with_full(model, label_smoothing=smoothing),
        "sandwich": lambda: distillation.with_full(
            model,
            levels_of=distillation.smallest_and_random,
            label_smoothing=smoothing,
        ),
        "teacher": lambda: distillation.with_teacher(
            model,
            taught_by(config, teacher.spec, spec),
            cut_of=cut_of,
            label_smoothing=smoothing,
        ),
    }
    if options.loss not in made:
        raise ValueError(f"loss {options.loss!r}: choose one of {', '.join(made)}.")
    return mixed_loss(config, spec, made[options.loss]())


def teacher_of(config: Any) -> Supernet | None:
    """The network that teaches in PIAD, in float32, if the loss is of one."""
    path, loss = config.piad.teacher, config.piad.loss
    if bool(path) != (loss == "teacher"):
        raise ValueError(
            f"piad.loss = {loss!r} and piad.teacher = {path!r}: the loss 'teacher' needs "
            "a directory, --config.piad.teacher, and no other takes one."
        )
    if not path:
        return None
    found = checkpoint.load_supernet(path)
    return found._replace(params=commands.in_float32(found.params))


def taught_by(config: Any, teacher: ViTSpec, spec: ViTSpec) -> distillation.Teacher:
    """The teacher of a network of `spec`, in the precision of training."""
    model = vit_of(config, teacher)
    return distillation.frozen(model, student=spec)
