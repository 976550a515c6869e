"""The train step: a pure function of a state, and its compiled forms on a mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_skd.method.vit import Params
from flax_skd.run import faults, gradients, sharding
from flax_skd.run.objective import Array, Batch, Loss, Metrics


class TrainState(NamedTuple):
    """All that a run carries from step to step.

    Attributes:
      step: int32 [], updates done.
      params: what is trained.
      opt_state: of the optimizer.
      ema: moving average of params, the same tree; None to go without.
      rng: a key; step t uses `fold_in(rng, t)`, so it never changes.
      extra: what else the loss reads, such as a `DropoutList`; an optimizer never sees
        it, and no step changes it but by `after_update`.
      frozen: parameters that the loss reads and nothing changes, those of a teacher:
        data of a compiled step, not constants of it, and of no checkpoint.
    """

    step: Any
    params: Params
    opt_state: Any
    ema: Params | None
    rng: Array
    extra: Any = None
    frozen: Params | None = None


def saved(state: TrainState) -> dict[str, Any]:
    """The fields of a state that its checkpoint holds."""
    return {k: x for k, x in state._asdict().items() if k != "frozen"}


# (state before, state after the optimizer, batch, metrics of the loss) -> state
AfterUpdate = Callable[[TrainState, TrainState, Batch, Metrics], TrainState]
# (params, extra) -> params
BeforeLoss = Callable[[Params, Any], Params]


def initial_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    rng: Array,
    *,
    extra: Any = None,
    frozen: Params | None = None,
) -> TrainState:
    """The state before the first step; its average starts at `params`."""
    params, extra, frozen = jax.tree.map(jnp.asarray, (params, extra, frozen))
    ema = jax.tree.map(jnp.copy, params)  # no memory may be donated twice
    moments = optimizer.init(params)
    return TrainState(jnp.int32(0), params, moments, ema, rng, extra, frozen)


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulate: int = 1,
    after_update: AfterUpdate | None = None,
) -> tuple[TrainState, Metrics]:
    """One update; pure. It is `gradient`, then `apply`.

    Args:
      state: before.
      batch: what `loss` takes.
      loss: function (params, batch, rng, state) -> (loss [], metrics); it sees no
        state of the optimizer and no average.
      optimizer: whose state `state` holds.
      ema_decay: most that the average keeps of itself; at step t it keeps
        min(ema_decay, (1 + t) / (10 + t)), so that the start is forgotten.
      accumulate: microbatches of the one update; see `gradients.of_batch`.
      after_update: what else a step does, inside it: function (state before, state
        after, batch, metrics) -> state, such as dual variables kept in `extra`. The
        average moves after it.

    Returns:
      The state after, and the metrics: `loss`, `grad_norm`, `param_norm` (of the
      state after), those of `loss`, and for errors `grad_finite` and `param_finite`,
      bool [leaves].
    """
    metrics, grads = gradient(state, batch, loss=loss, accumulate=accumulate)
    return apply(
        state,
        batch,
        metrics,
        grads,
        optimizer=optimizer,
        ema_decay=ema_decay,
        after_update=after_update,
    )


def gradient(
    state: TrainState, batch: Batch, *, loss: Loss, accumulate: int = 1
) -> tuple[Metrics, Params]:
    """The first half of `train_step`: metrics of the loss, and its gradient."""
    rng = jax.random.fold_in(state.rng, state.step)
    return gradients.of_batch(loss, _seen(state), batch, rng, accumulate=accumulate)


def _seen(state: TrainState) -> TrainState:
    """The state as a loss sees it, without three arrays a parameter."""
    return state._replace(opt_state=None, ema=None)


def apply(
    state: TrainState,
    batch: Batch,
    metrics: Metrics,
    grads: Params,
    *,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    after_update: AfterUpdate | None = None,
) -> tuple[TrainState, Metrics]:
    """The second half of `train_step`: what a gradient does to the state."""
    # optax multiplies floats by integer counts, which strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    after = state._replace(step=state.step + 1, params=params, opt_state=opt_state)
    if after_update is not None:
        after = after_update(state, after, batch, metrics)
    t = state.step.astype(jnp.float32)
    keep = jnp.minimum(ema_decay, (1 + t) / (10 + t))
    if after.ema is not None:
        ema = optax.incremental_update(after.params, after.ema, 1 - keep)
        after = after._replace(ema=ema)
    squares = {"grad": faults.squares(grads), "param": faults.squares(after.params)}
    norms = {f"{name}_norm": jnp.sqrt(s.sum()) for name, s in squares.items()}
    found = {f"{name}_finite": jnp.isfinite(s) for name, s in squares.items()}
    return after, {**norms, **found, **metrics}


def compiled(
    mesh: Mesh,
    place: TrainState,
    *,
    several: bool,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    accumulate: int = 1,
    before_loss: BeforeLoss | None = None,
    after_update: AfterUpdate | None = None,
) -> Callable[[Loss], Callable[[TrainState, Batch], tuple[TrainState, Metrics]]]:
    """The step on a mesh, by its loss; donates the state.

    Args:
      mesh: of devices.
      place: shardings of the state, a tree like it.
      several: whether losses change during a run. Then what they share, `before_loss`,
        the way back through it and the update, are programs of their own, each compiled
        once: of ViT-Ti the update is a third of a step's compilation. Otherwise a step
        is one program.
      optimizer, ema_decay, accumulate, after_update: see `train_step`.
      before_loss: with `several`, what every loss is given instead of the parameters.

    Returns:
      Function of a loss -> function of state and batch; every loss compiles once.
    """
    batches = sharding.batch_sharding(mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    rule = {
        "optimizer": optimizer,
        "ema_decay": ema_decay,
        "after_update": after_update,
    }
    given, back = _there_and_back(before_loss and _on(mesh, before_loss), place)
    update = jax.jit(
        functools.partial(apply, **rule),
        in_shardings=(place, batches, whole, place.params),
        out_shardings=(place, whole),
        donate_argnums=0,
    )

    @functools.cache
    def step_of(loss):
        loss = _on(mesh, _of_whole(loss, place))
        if not several:
            return jax.jit(
                functools.partial(train_step, loss=loss, accumulate=accumulate, **rule),
                in_shardings=(place, batches),
                out_shardings=(place, whole),
                donate_argnums=0,
            )
        differentiated = jax.jit(
            functools.partial(gradient, loss=loss, accumulate=accumulate),
            in_shardings=(_seen(place), batches),
            out_shardings=(whole, place.params),
        )

        def step(state, batch):
            cut = state._replace(params=given(state.params, state.extra))
            metrics, grads = differentiated(_seen(cut), batch)
            return update(state, batch, metrics, back(state.params, state.extra, grads))

        return step

    return step_of


def _on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is traced where it sees the mesh it will run on."""

    @functools.wraps(function)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return traced


def _of_whole(loss: Loss, place: TrainState) -> Loss:
    """`loss`, given parameters that are whole along `fsdp`; those of a teacher too."""

    def of_whole(params, batch, rng, state):
        params = sharding.whole(params, place.params)
        frozen = sharding.whole(state.frozen, place.frozen)
        return loss(params, batch, rng, state._replace(frozen=frozen))

    return of_whole


def _there_and_back(before_loss: BeforeLoss | None, place: TrainState):
    """`before_loss`, and the gradient through it, each compiled.

    Apart from the update: in one program with it, what `before_loss` multiplies by
    would be computed, and compiled, again for every moment of the optimizer.
    """
    if before_loss is None:
        return (lambda params, extra: params), (lambda params, extra, grads: grads)

    def back(params, extra, grads):
        return jax.vjp(lambda p: before_loss(p, extra), params)[1](grads)[0]

    inputs = place.params, place.extra
    return (
        jax.jit(before_loss, in_shardings=inputs, out_shardings=place.params),
        jax.jit(
            back,
            in_shardings=(*inputs, place.params),
            out_shardings=place.params,
            donate_argnums=2,
        ),
    )
