"""The train command: a config to a network, by the one loop of `train`."""

import contextlib
import dataclasses
import functools
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from flax_skd.io import (
    augment,
    checkpoint,
    data,
    sources,
    summed_arrays,
)
from flax_skd.method.spec import ViTSpec
from flax_skd.run import (
    commands,
    evaluate,
    feed,
    programs,
    sharding,
    training_checks,
)
from flax_skd.run import train as loop

AUGMENTS = {
    "none": lambda options: augment.none,
    "flip_crop": lambda options: functools.partial(
        augment.flip_crop, scale=(options.min_scale, 1.0), flip=options.flip
    ),
    "deit": lambda options: functools.partial(
        augment.deit, scale=(options.min_scale, 1.0), flip=options.flip
    ),
    "shift_crop": lambda options: functools.partial(
        augment.shift_crop, pad=options.pad, flip=options.flip
    ),
}
NETWORK = "network"  # the directory of the trained network inside the workdir
# Name -> function of the config, of programs that stand on higher floors.
Programs = Mapping[str, Callable[[Any], programs.Program]]
NONE: Programs = types.MappingProxyType({})


def spec_of(model: Any) -> ViTSpec:
    """The network of a config's `model` section: a named variant, or its sizes."""
    if model.variant:
        return ViTSpec.named(
            model.variant, image_size=model.image_size, num_classes=model.num_classes
        )
    channels = model.in_channels
    names = {f.name for f in dataclasses.fields(ViTSpec)}
    sizes = {k: v for k, v in model.items() if k in names}
    return ViTSpec(
        **sizes, mean=(0.5,) * channels, std=(0.5,) * channels, crop_fraction=1.0
    )


def augment_named(options: Any):
    """The host augmentation of a config's `augment` section."""
    if options.name not in AUGMENTS:
        raise ValueError(
            f"augment {options.name!r}: choose one of {', '.join(AUGMENTS)}."
        )
    return AUGMENTS[options.name](options)


def program_of(config: Any, others: Programs) -> programs.Program:
    """The program a config names, with what it starts from read.

    Args:
      config: of training.
      others: programs beside those of `programs`, by name.

    Raises:
      ValueError: if the program is unknown or its start is not what it needs.
    """
    if config.program == "scratch":
        return programs.scratch(config, spec_of(config.model))
    if config.program == "transfer":
        return programs.transfer(config, commands.load_network(config.model))
    if config.program in others:
        return others[config.program](config)
    if config.program not in ("piad", "finetune"):
        known = ", ".join(["scratch, transfer, piad or finetune", *others])
        raise ValueError(f"program {config.program!r}: choose {known}.")
    if not config.model.path:
        raise ValueError(
            f"program {config.program!r} starts from a directory: give "
            "--config.model.path, of contract for piad, of extract for finetune."
        )
    if config.program == "piad":
        supernet = checkpoint.load_supernet(config.model.path)
        return programs.piad_program(config, supernet)
    return programs.finetune(config, checkpoint.load_subnet(config.model.path))


def train(
    config: Any, *, workdir: str, overwrite: bool, resume: bool, others: Programs = NONE
) -> str:
    """Trains, evaluates raw and averaged weights, and saves the network.

    Args:
      config: as `configs/scratch.py`, `piad.py` or `finetune.py` make it.
      workdir: for checkpoints, `log.jsonl` and the directory `network`.
      overwrite: delete an earlier run.
      resume: go on with an earlier run of the same config.
      others: see `program_of`.

    Returns:
      What to print: where the network lies and its accuracy.
    """
    training_checks.check_numbers(config)
    program = program_of(config, others)
    target = pathlib.Path(workdir).expanduser() / NETWORK
    training_checks.check_networks(target, program, overwrite=overwrite, resume=resume)
    spec = program.model.spec
    if spec.num_classes < 2:
        raise ValueError(
            f"num_classes = {spec.num_classes}: training tells classes apart, so give "
            "two or more, or a network with a head."
        )
    source = feed.open_images(config.data, spec)
    batches = data.train_batches(
        source,
        spec,
        batch_size=config.data.batch_size,
        seed=config.seed,
        augment=augment_named(config.data.augment),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        on_bad_image=config.data.on_bad_image,
        repeats=config.data.repeats,
        workers=config.data.workers,
    )
    per_epoch = len(source) // config.data.batch_size
    steps = max(1, round(config.epochs * per_epoch))
    epoch_steps = max(1, round(program.every_epochs * per_epoch))
    training_checks.check_stages(program.stages, epoch_steps, steps)
    schedule = loop.cosine(
        config.lr,
        steps=steps,
        warmup_steps=round(config.warmup_epochs * per_epoch),
        end=config.min_lr,
    )
    optimizer = loop.make_optimizer(
        schedule, weight_decay=config.weight_decay, clip_norm=config.clip_norm or None
    )
    rng, mesh = jax.random.key(config.seed + 1), sharding.mesh(config.mesh)
    scores: dict[str, float] = {}
    parts = max(1, config.accumulate)  # fit refuses what is less
    sharding.check_divides(config.data.batch_size, mesh, parts=parts)
    with contextlib.closing(batches):
        state = loop.fit(
            loop.initial_state(
                *(commands.in_float32(program.params), optimizer, rng),
                extra=program.extra,
                frozen=program.frozen,
            ),
            batches,
            loss=program.loss,
            optimizer=optimizer,
            steps=steps,
            config=_what_decides(config, program, source),
            mesh=mesh,
            workdir=workdir,
            overwrite=overwrite,
            resume=resume,
            checkpoint_every=config.checkpoint_every,
            evaluate=_evaluator(config, program, mesh, scores),
            evaluate_every=max(1, round(config.evaluate_epochs * per_epoch)),
            before_epoch=program.before_epoch,
            before_step=program.before_step,
            before_loss=program.before_loss,
            after_update=program.after_update,
            epoch_steps=epoch_steps,
            ema_decay=config.ema_decay,
            accumulate=config.accumulate,
            schedule=schedule,
            log_every_s=config.log_every_s,
        )
    params = state.ema if config.weights == "ema" else state.params
    facts = {"config": config.to_dict(), "steps": steps, "weights": config.weights}
    whole = jax.device_get(sharding.gathered((params, state.extra), mesh))
    program.save(target, *whole, facts)
    found = ", ".join(f"{k} {v:.2f} %" for k, v in scores.items()) or "not evaluated"
    return f"wrote {target}: {steps} steps, {found}"


def _what_decides(
    config: Any, program: programs.Program, source: sources.Source
) -> dict[str, Any]:
    """What a resumed run must share: not the mesh, nor when it tells and saves.

    What it reads and holds in no checkpoint goes by its contents: paths may hold
    something else by then.
    """
    free = ("mesh", "log_every_s", "checkpoint_every", "evaluate_epochs")
    fields = {k: value for k, value in config.to_dict().items() if k not in free}
    fields["dataset"] = sources.fingerprint(source)
    del fields["data"]["workers"]  # they change no batch
    fields["network"] = dataclasses.asdict(program.model.spec)
    # Where a run stopped for memory or at a bad image, the other value goes on: compared
    # as if it were the usual one.
    fields["remat"] = False
    calibration = fields.get("piad", {}).get("calibration", {})
    for section in (fields["data"], calibration):
        section["on_bad_image"] = "error"
    if calibration.get("source"):
        images = feed.open_images(config.piad.calibration, program.model.spec)
        fields["calibration"] = sources.fingerprint(images)
    if program.frozen is not None:
        fields["teacher"] = summed_arrays.of_tree(program.frozen)
    return fields


def _evaluator(
    config: Any, program: programs.Program, mesh: Mesh, latest: dict[str, float]
):
    """Function of the train state -> top-1 of raw and averaged weights, or None.

    What it found last is left in `latest`.
    """
    name = feed.eval_source_of(config.data)
    if not name:
        return None
    model, spec = program.model, program.model.spec
    source = sources.open_source(
        name,
        labels=config.data.eval_labels or None,
        num_classes=spec.num_classes,
    )
    batches = data.eval_batches(
        source,
        spec,
        batch_size=config.data.batch_size,
        on_bad_image=config.data.on_bad_image,
    )
    images = feed.OnMesh(batches, mesh)

    def evaluator(state):
        whole = sharding.gathered(state.extra, mesh)  # repairs may be cut over hosts
        extra, repairs = jax.device_get(whole), getattr(whole, "compensation", None)
        sizes = program.sizes(extra)
        for name, params in (("raw", state.params), ("ema", state.ema)):
            params = program.network(sharding.gathered(params, mesh), extra)
            found = evaluate.evaluate(
                model, params, images, list(sizes.values()), repairs=repairs
            )
            for size, score in zip(sizes, found):
                key = f"{name}_top1" if size == "full" else f"{name}_{size}_top1"
                latest[key] = score.top1
        return dict(latest)

    return evaluator
