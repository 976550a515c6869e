"""One loop, for training from scratch, fine-tuning, PIAD and the other systems."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from flax_skd.io import processes, run_state, summed_arrays
from flax_skd.run import distributed, faults, sharding, updates
from flax_skd.run.interrupt import Stopped, told_to_stop
from flax_skd.run.objective import Loss, classification_loss
from flax_skd.run.optimizer import cosine, make_optimizer
from flax_skd.run.progress import Progress
from flax_skd.run.settling import NonFiniteLossError, Running, closing
from flax_skd.run.updates import (
    AfterUpdate,
    BeforeLoss,
    TrainState,
    initial_state,
    train_step,
)

__all__ = [
    "NonFiniteLossError",
    "Stopped",
    "TrainState",
    "classification_loss",
    "cosine",
    "fit",
    "initial_state",
    "make_optimizer",
    "train_step",
]


def fit(
    state: TrainState,
    batches: Iterator[dict[str, np.ndarray]],
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    steps: int,
    config: dict[str, Any] | None = None,
    mesh: Mesh | None = None,
    workdir: str | os.PathLike | None = None,
    resume: bool = False,
    overwrite: bool = False,
    checkpoint_every: int = 1000,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    before_epoch: Callable[[int, TrainState], Any] | None = None,
    before_step: Callable[[int, Any], tuple[Any, Loss]] | None = None,
    before_loss: BeforeLoss | None = None,
    after_update: AfterUpdate | None = None,
    epoch_steps: int = 1,
    ema_decay: float = 0.9999,
    accumulate: int = 1,
    schedule: optax.Schedule | None = None,
    log_every_steps: int | None = None,
    log_every_s: float = 60.0,
) -> TrainState:
    """Trains to `steps` updates.

    Args:
      state: of `initial_state`; kept, not donated.
      batches: a grain iterator of this process's batches, {"image", "label",
        "index"} or whatever `loss` takes; "index" names examples in errors.
      loss, optimizer, ema_decay, accumulate, after_update: see `train_step`.
      steps: updates in all, those of a resumed run included.
      config: all that decides the result, data set included, as JSON holds it. A
        resumed run must have the same.
      mesh: by default all devices on one axis.
      workdir: for checkpoints and log; None writes nothing.
      resume: go on from the newest checkpoint in `workdir`, if there is one.
      overwrite: delete the run in `workdir` first.
      checkpoint_every: updates; the last is always saved.
      evaluate: function of the state -> numbers to log.
      evaluate_every: updates; by default only after the last.
      before_epoch: function (epoch, state) -> `extra` of the epoch that begins, of
        the same shapes: how a dropout list grows. Or the whole state, where a stage of
        training starts from other parameters.
      before_step: function (step, extra) -> `extra` and loss of that step, in place of
        `loss`; every loss it returns is compiled once.
      before_loss: function (params, extra) -> the parameters that the losses of
        `before_step` are given, compiled once for all; gradients go back through it.
      epoch_steps: updates in an epoch.
      schedule: of the learning rate, to be logged.
      log_every_steps, log_every_s: report at whichever comes first.

    Returns:
      The state after the last update, on the mesh.

    Raises:
      NonFiniteLossError: names the step, the examples and the last good checkpoint.
      Stopped: after SIGTERM or Ctrl-C, with the state saved; says how to go on.
      ValueError: if `workdir`, `config`, the batches or the mesh do not fit, or
        `before_loss` comes alone.
    """
    counts = {"steps": steps, "checkpoint_every": checkpoint_every}
    for name, count in (counts | {"accumulate": accumulate}).items():
        if count < 1:
            raise ValueError(f"{name} = {count} must be at least 1.")
    if before_loss and not before_step:
        raise ValueError("before_loss is for the losses of before_step: give both.")
    _check_alike(config, state)
    mesh = mesh or sharding.mesh()
    place = sharding.param_sharding(state, mesh)

    step_of = updates.compiled(
        mesh,
        place,
        several=before_step is not None,
        before_loss=before_loss,
        optimizer=optimizer,
        ema_decay=ema_decay,
        accumulate=accumulate,
        after_update=after_update,
    )
    # The step donates its state, and the caller's must live on.
    state = sharding.copy_to(state, place)
    with contextlib.ExitStack() as stack:
        disk = run_state.Checkpoints(
            workdir,
            batches=batches,
            config=config or {},
            overwrite=overwrite,
            resume=resume,
        )
        stack.push(closing(disk.close))
        if resume:
            state = state._replace(**disk.restore(updates.saved(state)))
            state = sharding.copy_to(state, place)
        start = int(state.step)
        progress = Progress(
            disk.workdir and disk.workdir / run_state.LOG,
            start=start,
            steps=steps,
            every_steps=log_every_steps,
            every_s=log_every_s,
        )
        stack.push(closing(progress.close))
        asked = stack.enter_context(told_to_stop(disk.manager))
        running = Running(progress, disk, schedule, state.params)
        if wrong := faults.of_params(state.params, mesh):
            raise NonFiniteLossError(
                f"not finite before step {start + 1}: parameter {wrong}. Start from "
                "other weights, or from an older checkpoint."
            )
        stack.enter_context(distributed.lost_peers_named())

        def due(step):
            return step == steps or step % (evaluate_every or steps) == 0

        if evaluate and start and due(start):  # it may have died in that evaluation
            with progress.paused():
                progress.write_once(start, evaluate(state))
        ready: set[Loss] = set()  # losses whose step is compiled
        for step in range(start + 1, steps + 1):
            if before_epoch and (step - 1) % epoch_steps == 0:
                running.settle()
                with progress.paused():
                    found = before_epoch((step - 1) // epoch_steps, state)
                if isinstance(found, TrainState):
                    state = sharding.copy_to(found, place)
                else:
                    state = state._replace(extra=sharding.copy_to(found, place.extra))
            with progress.waiting():
                host_batch = _draw(batches, step, steps)
                batch = sharding.shard_batch(host_batch, mesh, parts=accumulate)
            now = loss
            if before_step:
                extra, now = before_step(step, state.extra)
                extra = jax.tree.map(_on_mesh, extra, place.extra)
                state = state._replace(extra=extra)
            known = now in ready
            with contextlib.nullcontext() if known else progress.compiling(step):
                state, metrics = step_of(now)(state, batch)
            ready.add(now)
            running.follow(step, metrics, host_batch)
            stopping = asked(step) and step < steps
            if stopping or step == steps or step % checkpoint_every == 0:
                running.settle()  # a state that is not finite must not be saved
                disk.save(step, updates.saved(state))
            if evaluate and due(step):
                running.settle()
                with progress.paused():
                    progress.write(step, evaluate(state))
            if stopping:
                raise Stopped(
                    f"stopped when told to, after step {step} of {steps}; saved in "
                    f"{disk.workdir}. Run the same again with --resume to go on."
                )
    return state


def _check_alike(config: dict[str, Any] | None, state: TrainState) -> None:
    """Copies of a state on several hosts are one state only if they start as one."""
    if jax.process_count() > 1:
        leaves = jax.tree.leaves((state.params, state.extra))
        local = [x for x in leaves if getattr(x, "is_fully_addressable", True)]
        start = summed_arrays.of_tree(local)
        processes.check_alike({**(config or {}), "sum of what it starts from": start})


def _on_mesh(x, place):
    return x if isinstance(x, jax.Array) else sharding.copy_to(x, place)


def _draw(batches: Iterator[Any], step: int, steps: int) -> dict[str, np.ndarray]:
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(
            f"the data ended before step {step} of {steps}: repeat it, or ask for fewer "
            "steps."
        ) from None
