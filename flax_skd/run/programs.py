"""What to train: scratch, transfer, PIAD, one extracted network; data for one loop."""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_skd.io import checkpoint
from flax_skd.io.checkpoint import Subnet, Supernet
from flax_skd.method import costs, growth, importance, macs, piad, vit
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import Params, ViT
from flax_skd.run import commands, configured_loss, feed, lists, sharding
from flax_skd.run.objective import Elastic, Loss
from flax_skd.run.train import AfterUpdate, BeforeLoss


class Program(NamedTuple):
    """Everything in which the programs differ.

    Attributes:
      model: what is trained.
      params: where it starts.
      loss: what a step minimises.
      save: function (directory, params, extra, facts), replacing what is there.
      extra: what the loss reads besides, such as a dropout list.
      before_epoch: function (index, state) -> the next `extra` or state, or None.
      every_epochs: epochs from one call of `before_epoch` to the next.
      sizes: function of `extra` -> {name: widths} to evaluate; None as widths is the
        model as it is.
      before_step, after_update, before_loss: see `train.fit`, or None.
      network: function (params, extra) -> parameters of `model`, which are evaluated:
        where what is trained is not the network itself.
      stages: calls of `before_epoch` that a run must make to be whole.
      files: what `save` writes.
      beside: names of what it writes `beside` that, directories of sub-networks.
      frozen: parameters of a teacher, or None; see `updates.TrainState`.
    """

    model: ViT
    params: Params
    loss: Loss
    save: Callable[[pathlib.Path, Params, Any, dict[str, Any]], None]
    extra: Any = None
    before_epoch: Callable[[int, Any], Any] | None = None
    every_epochs: float = 1.0
    sizes: Callable[[Any], dict[str, SubnetSpec | None]] = lambda extra: {"full": None}
    before_step: Callable[[int, Any], tuple[Any, Loss]] | None = None
    after_update: AfterUpdate | None = None
    network: Callable[[Params, Any], Params] = lambda params, extra: params
    before_loss: BeforeLoss | None = None
    stages: int = 1
    files: tuple[str, ...] = checkpoint.SUPERNET_FILES
    beside: tuple[str, ...] = ()
    frozen: Params | None = None


def beside(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Where a network of another size lies, beside that of the run."""
    return directory.with_name(f"{directory.name}-{name}")


def written(
    program: Program, directory: pathlib.Path
) -> dict[pathlib.Path, tuple[str, ...]]:
    """The directories that a program saves, and all that each of them holds."""
    small = dict.fromkeys(program.beside, checkpoint.SUBNET_FILES)
    others = {beside(directory, name): files for name, files in small.items()}
    return {directory: program.files, **others}


def scratch(config: Any, spec: ViTSpec) -> Program:
    """A fresh network of the config's sizes."""
    params = vit.init(spec, jax.random.key(config.seed))
    return _whole(config, spec, params, {})


def transfer(config: Any, network: Supernet) -> Program:
    """A trained network with a fresh head, for other classes."""
    spec = network.spec.replace(num_classes=config.model.num_classes)
    # A fresh head is zero: the first step changes nothing but the head.
    fresh = jax.eval_shape(lambda: vit.init(spec, jax.random.key(0)))
    heads = {name: fresh[name] for name in ("head", "head_dist") if name in fresh}
    heads = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), heads)
    return _whole(config, spec, {**network.params, **heads}, network.provenance)


def _whole(config: Any, spec: ViTSpec, params: Params, provenance: dict) -> Program:
    """Ordinary training of a full network."""
    model = configured_loss.vit_of(config, spec)

    def save(directory, params, extra, facts):
        del extra
        one_level = piad.uniform(spec, steps=1)
        network = Supernet(params, spec, one_level, provenance)
        save_trained(directory, network, facts)

    return Program(model, params, configured_loss.ordinary(config, model), save)


def save_trained(
    directory: pathlib.Path, network: Supernet, facts: dict[str, Any]
) -> None:
    """Writes a super-network with facts of its training, replacing what is there."""
    trained = commands.stamped(network, facts)
    checkpoint.save_supernet(directory, trained, overwrite=directory.exists())


def finetune(config: Any, small: Subnet) -> Program:
    """One extracted network, on its own; `model.fresh` keeps its sizes alone."""
    model = configured_loss.vit_of(config, small.spec, small.widths)
    if config.model.fresh:
        rng = jax.random.key(config.seed)
        params = vit.init(small.spec, rng, widths=small.widths)
        small = small._replace(params=params)

    def save(directory, params, extra, facts):
        del extra
        facts = {**small.provenance, **facts}
        trained = small._replace(params=params, provenance=facts)
        checkpoint.save_subnet(directory, trained, overwrite=directory.exists())

    loss = configured_loss.ordinary(config, model)
    files = checkpoint.SUBNET_FILES
    return Program(model, small.params, loss, save, files=files)


def piad_program(config: Any, supernet: Supernet) -> Program:
    """PIAD (Li et al., AAAI 2026): a growing dropout list, a level a step.

    What repairs the cuts of the network it starts from stays, constant, and is on in
    every step.
    """
    spec, options = supernet.spec, config.piad
    plain = options.sampling == "per_step" and options.masks in ("levels", "none")
    if supernet.compensation is not None and not plain:
        raise ValueError(
            f"sampling {options.sampling!r} with masks {options.masks!r} cuts other than "
            "by one level a step, and only such cuts can be repaired, which this network "
            "asks for: take sampling 'per_step' and masks 'levels', or contract with "
            "--config.compensation=none."
        )
    model = configured_loss.vit_of(config, spec)
    groups = growth.Groups(**options.groups)

    def sizes(extra):
        levels = extra.dropout_list
        last = levels.widths(int(levels.levels), spec)
        return {"full": None, "smallest": last}

    def save(directory, params, extra, facts):
        rows = extra.dropout_list.all_widths(spec)
        network = supernet._replace(
            params=params,
            dropout_list=piad.from_rows(rows, spec),
            compensation=extra.compensation,  # as trained, whatever lies there now
        )
        save_trained(directory, network, {**facts, "trained": "piad"})

    teacher = configured_loss.teacher_of(config)
    loss = configured_loss.of_piad(config, model, groups, teacher)
    extra = Elastic(growth.start(spec, groups), supernet.compensation)
    stages = _stages(config)
    grow, before_step = _grower(config, model, groups, stages), None
    before_loss = None
    if compiled := configured_loss.compiled_sizes(config, spec, teacher):
        extra, grow = extra._replace(level=np.int32(0)), compiled.after(grow)
        before_step, before_loss = compiled.before_step, compiled.before_loss
    return Program(
        model,
        supernet.params,
        loss,
        save,
        extra=extra,
        before_epoch=grow,
        every_epochs=options.grow_epochs,
        sizes=sizes,
        before_step=before_step,
        before_loss=before_loss,
        stages=stages,
        frozen=teacher and teacher.params,
    )


def _stages(config: Any) -> int:
    """How often the list of a PIAD run grows."""
    options = config.piad
    if not 0 < options.grow_epochs < float("inf"):
        raise ValueError(f"piad.grow_epochs = {options.grow_epochs} must be above 0.")
    if not 0 <= options.progressive_epochs < float("inf"):
        raise ValueError(
            f"piad.progressive_epochs = {options.progressive_epochs} must be above 0, or "
            "0 for a third of the run."
        )
    epochs = options.progressive_epochs or growth.progressive_epochs(config.epochs)
    return max(1, round(epochs / options.grow_epochs))


def _grower(config: Any, model: ViT, groups: growth.Groups, stages: int):
    """`before_epoch` of PIAD: `lists.grown`, as long as there are stages."""
    spec, options = model.spec, config.piad
    batches = feed.calibration_of(config, spec)
    mesh = sharding.mesh(config.mesh)
    cost = costs.cost_named(options.cost, spec.num_classes)
    rise = importance.sensitivity_named(options.sensitivity, spec.num_classes)
    # The share of the last stage: known to be too large before the run, not in it.
    full = macs.macs(spec)
    last = growth.schedule(stages - 1, stages, model_macs=full, share=options.share)
    growth.check_target(last, spec)

    def before_epoch(stage, state):
        if stage >= stages:
            return state.extra
        levels, repairs = state.extra.dropout_list, state.extra.compensation
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
