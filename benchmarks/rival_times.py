"""What a step of each system of `rivals.py` takes, beside a dense one."""

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import random_inputs

from flax_skd.io import checkpoint
from flax_skd.method.vit import ViT
from flax_skd.rivals import table
from flax_skd.run import configured_loss, timing, train, training


class Kind(NamedTuple):
    """A kind of step: its stage, updates before one of it, share of a run's steps."""

    stage: int
    done: int
    share: float


def relative(configs: dict[str, Any], rounds: int) -> dict[str, float]:
    """Seconds a step over those of a dense one, mean over the steps of a run.

    Args:
      configs: system -> config of one of its runs.
      rounds: in which all take turns.
    """
    steps, kinds = {}, {}
    for system, config in configs.items():
        kinds[system] = kinds_of(config)
        for kind in kinds[system]:
            steps[f"{system} {kind}"] = _step(config, kind)
    steps["dense"] = _dense(copy.deepcopy(next(iter(configs.values()))))
    found = timing.paired(steps, against="dense", rounds=rounds)
    return {
        system: sum(kind.share * found[f"{system} {kind}"].ratio for kind in own)
        for system, own in kinds.items()
    }


def kinds_of(config) -> list[Kind]:
    """The kinds of steps of a run: of its stages; in UVC's search with gates or not."""
    every, count = training.program_of(config, table.PROGRAMS).every_epochs, 1
    if config.program in ("scala", "uvc"):  # a first stage, and the rest of the run
        count = 1 + (every < config.epochs)
    elif config.program != "piad":
        count = max(1, round(config.epochs / every))
    lengths = [every] * (count - 1) + [config.epochs - every * (count - 1)]
    found = [Kind(n, 0, length / config.epochs) for n, length in enumerate(lengths)]
    if config.program != "uvc":
        return found
    # A median over calls of one program would never see a step in so many.
    part, (search, *fixed) = 1 / config.rival.gate_every, found
    plain = search._replace(share=search.share * (1 - part))
    gates = Kind(0, config.rival.gate_every - 1, search.share * part)
    return [plain, gates, *fixed]


def _step(config, kind: Kind):
    """One compiled step of a program, as a function without arguments."""
    program = training.program_of(config, table.PROGRAMS)
    extra, loss = program.extra, program.loss
    if hasattr(extra, "stage"):
        extra = extra._replace(stage=np.int32(kind.stage))
    if program.before_step:
        extra, loss = program.before_step(1, extra)
    start = program.params, extra, kind.done
    return _compiled(config, start, program.model.spec, loss, program)


def _dense(config):
    found = checkpoint.load_supernet(config.model.path)
    with config.unlocked():
        config.drop_path = 0.0
    loss = configured_loss.ordinary(config, ViT(found.spec))
    return _compiled(config, (found.params, None, 0), found.spec, loss, None)


def _compiled(config, start, spec, loss, program):
    params, extra, done = start
    optimizer = train.make_optimizer(config.lr, clip_norm=config.clip_norm)
    frozen = program and program.frozen
    state = train.initial_state(
        params, optimizer, jax.random.key(0), extra=extra, frozen=frozen
    )
    state = state._replace(step=jnp.asarray(done, state.step.dtype))
    size = config.data.batch_size
    batch = random_inputs.batch(spec, size, np.random.default_rng(0))

    def step(state, batch):
        return train.train_step(
            state,
            batch,
            loss=loss,
            optimizer=optimizer,
            ema_decay=config.ema_decay,
            after_update=program and program.after_update,
        )

    compiled = jax.jit(step)
    return lambda: compiled(state, batch)
