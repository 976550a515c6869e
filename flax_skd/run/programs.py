"""What to train: scratch, transfer, PIAD, one extracted network; data for one loop."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_skd.io import checkpoint
from flax_skd.io.checkpoint import SubNet, SuperNet
from flax_skd.method import costs, growth, importance, piad, vit
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import Params, ViT
from flax_skd.run import (
    commands,
    distillation,
    elastic,
    feed,
    lists,
    mixing,
    objective,
    sharding,
)
from flax_skd.run.objective import CutOf, Elastic, Loss


class Program(NamedTuple):
    """Everything in which the programs differ.

    Attributes:
      model: what is trained.
      params: where it starts.
      loss: what a step minimises.
      extra: what the loss reads besides, such as a dropout list.
      before_epoch: function (index, state) -> the next `extra`, or None.
      every_epochs: epochs from one call of `before_epoch` to the next.
      sizes: function of `extra` -> {name: widths} to evaluate; None as widths is the
        model as it is.
      save: function (directory, params, extra, facts), replacing what is there.
    """

    model: ViT
    params: Params
    loss: Loss
    extra: Any
    before_epoch: Callable[[int, Any], Any] | None
    sizes: Callable[[Any], dict[str, SubnetSpec | None]]
    save: Callable[[pathlib.Path, Params, Any, dict[str, Any]], None]
    every_epochs: float = 1.0


def _as_it_is(extra: Any) -> dict[str, None]:
    del extra
    return {"full": None}


def _vit(config: Any, spec: ViTSpec, widths: SubnetSpec | None = None) -> ViT:
    dtype = commands.dtype_named(config.dtype)
    return ViT(spec, widths, dtype=dtype, remat=config.remat)


def _smoothing(config: Any) -> float:
    """Label smoothing of the loss: none where mixed targets are smooth already."""
    return 0.0 if _mixing(config) else config.label_smoothing


def _mixing(config: Any) -> mixing.Mixing | None:
    """The mixing of a config's `mixing` section, None where all of it is off."""
    chosen = dict(config.mixing.items())
    if not any(chosen[name] for name in ("mixup", "cutmix", "erase")):
        return None
    return mixing.Mixing(smoothing=config.label_smoothing, **chosen)


def _mixed(config: Any, spec: ViTSpec, loss: Loss) -> Loss:
    """The loss on mixed and erased images, if the config asks for it."""
    options = _mixing(config)
    if options is None:
        return loss

    def mixed(params, batch, rng, state):
        mix_rng, rng = jax.random.split(rng)
        batch = mixing.mixed_batch(mix_rng, batch, spec, options)
        return loss(params, batch, rng, state)

    return mixed


def _ordinary_loss(config: Any, model: ViT) -> Loss:
    loss = objective.classification_loss(
        model, label_smoothing=_smoothing(config), drop_path=config.drop_path
    )
    return _mixed(config, model.spec, loss)


def scratch(config: Any, spec: ViTSpec) -> Program:
    """A fresh network of the config's sizes."""
    params = vit.init(spec, jax.random.key(config.seed))
    return _whole(config, spec, params, {})


def transfer(config: Any, network: SuperNet) -> Program:
    """A trained network with a fresh head, for other classes."""
    spec = network.spec.replace(num_classes=config.model.num_classes)
    # A fresh head is zero: the first step changes nothing but the head.
    fresh = jax.eval_shape(lambda: vit.init(spec, jax.random.key(0)))
    heads = {name: fresh[name] for name in ("head", "head_dist") if name in fresh}
    heads = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), heads)
    return _whole(config, spec, {**network.params, **heads}, network.provenance)


def _whole(config: Any, spec: ViTSpec, params: Params, provenance: dict) -> Program:
    """Ordinary training of a full network."""
    model = _vit(config, spec)

    def save(directory, params, extra, facts):
        del extra
        full = piad.from_rows([SubnetSpec.full(spec)], spec)
        facts = {**provenance, **facts}
        network = commands.stamped(SuperNet(params, spec, full, {}), facts)
        checkpoint.save_supernet(directory, network, overwrite=directory.exists())

    loss = _ordinary_loss(config, model)
    return Program(model, params, loss, None, None, _as_it_is, save)


def finetune(config: Any, small: SubNet) -> Program:
    """One extracted network, on its own; `model.fresh` keeps its sizes alone."""
    model = _vit(config, small.spec, small.widths)
    if config.model.fresh:
        rng = jax.random.key(config.seed)
        params = vit.init(small.spec, rng, widths=small.widths)
        small = small._replace(params=params)

    def save(directory, params, extra, facts):
        del extra
        facts = {**small.provenance, **facts}
        trained = small._replace(params=params, provenance=facts)
        checkpoint.save_subnet(directory, trained, overwrite=directory.exists())

    loss = _ordinary_loss(config, model)
    return Program(model, small.params, loss, None, None, _as_it_is, save)


def piad_program(config: Any, supernet: SuperNet) -> Program:
    """PIAD (Li et al., AAAI 2026): a growing dropout list, a level a step.

    What repairs the cuts of the network it starts from stays, constant, and is on in
    every step.
    """
    spec, options = supernet.spec, config.piad
    if supernet.compensation is not None and options.sampling == "per_example":
        raise ValueError(
            "sampling 'per_example' cuts every example by itself, and a compensated "
            "network has one set of weights a cut: take sampling 'per_step', or "
            "contract with --config.compensation=none."
        )
    model = _vit(config, spec)
    groups = growth.Groups(
        options.groups.attn,
        options.groups.mlp,
        options.groups.attn_lane,
        options.groups.mlp_lane,
    )

    def sizes(extra):
        levels = extra.dropout_list
        last = levels.widths(int(levels.levels), spec)
        return {"full": None, "smallest": last}

    def save(directory, params, extra, facts):
        levels = extra.dropout_list
        rows = [levels.widths(s, spec) for s in range(int(levels.levels) + 1)]
        network = supernet._replace(
            params=params, dropout_list=piad.from_rows(rows, spec)
        )
        network = commands.stamped(network, {**facts, "trained": "piad"})
        checkpoint.save_supernet(directory, network, overwrite=directory.exists())

    return Program(
        model,
        supernet.params,
        _piad_loss(config, model, groups),
        Elastic(growth.start(spec, groups), supernet.compensation),
        _grower(config, model, groups),
        sizes,
        save,
        options.grow_epochs,
    )


def _piad_cut(options: Any, spec: ViTSpec, groups: growth.Groups) -> CutOf:
    """What a step drops: a level of the list, or a variant of the ablation."""
    draws = {
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
    if options.masks == "none":
        return objective.whole
    if options.masks not in elastic.MASKS:
        known = ", ".join(["levels", "none", *elastic.MASKS])
        raise ValueError(f"masks {options.masks!r}: choose one of {known}.")
    return elastic.MASKS[options.masks](
        spec, groups=groups, draw=draw, rate=options.branch_rate
    )


def _piad_loss(config: Any, model: ViT, groups: growth.Groups) -> Loss:
    spec, options = model.spec, config.piad
    cut_of = _piad_cut(options, spec, groups)
    smoothing = _smoothing(config)
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
            _teacher(options.teacher, spec),
            cut_of=cut_of,
            label_smoothing=smoothing,
        ),
    }
    if options.loss not in made:
        raise ValueError(f"loss {options.loss!r}: choose one of {', '.join(made)}.")
    return _mixed(config, spec, made[options.loss]())


def _teacher(path: str, spec: ViTSpec):
    if not path:
        raise ValueError("loss 'teacher' needs --config.piad.teacher, a directory.")
    found = checkpoint.load_supernet(path)
    return distillation.frozen(
        ViT(found.spec), found.params, num_classes=spec.num_classes
    )


def _grower(config: Any, model: ViT, groups: growth.Groups):
    """`before_epoch` of PIAD: measure at the smallest level, append what it bears."""
    spec, options = model.spec, config.piad
    if not options.grow_epochs > 0:
        raise ValueError(f"grow_epochs = {options.grow_epochs} must be above 0.")
    epochs = options.progressive_epochs or growth.progressive_epochs(config.epochs)
    stages = max(1, round(epochs / options.grow_epochs))
    batches = feed.batches_of(options.calibration, spec, seed=config.seed)
    mesh = sharding.mesh(config.mesh)
    cost = costs.cost_named(options.cost, spec.num_classes)
    rise = importance.sensitivity_named(options.sensitivity, spec.num_classes)

    def before_epoch(stage, state):
        if stage >= stages:
            return state.extra
        levels, repairs = state.extra
        levels = lists.grown(
            jax.device_get(levels),
            stage,
            stages=stages,
            model=model,
            params=sharding.gathered(state.params, mesh),
            batches=feed.OnMesh(batches, mesh),
            repairs=repairs and sharding.gathered(repairs, mesh),
            share=options.share,
            groups=groups,
            cost=cost,
            sensitivity=rise,
        )
        return state.extra._replace(dropout_list=levels)

    return before_epoch
