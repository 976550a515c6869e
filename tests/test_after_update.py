"""What a step does beside the optimizer's part, and what a stage starts from."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import ONE

from flax_skd.run import train

OPTIMIZER = train.make_optimizer(0.1, weight_decay=0.0)


def loss(params, batch, rng, state):
    del rng
    value = ((params["w"] - batch["x"].mean()) ** 2).sum()
    return value, {"dual": state.extra}


def project(before, after, batch, metrics):
    """Parameters at most 0.15, a dual that rises by what was above and by the metric."""
    del batch
    over = jnp.maximum(after.params["w"] - 0.15, 0.0).sum()
    kept = {"w": jnp.minimum(after.params["w"], 0.15)}
    return after._replace(params=kept, extra=before.extra + over + 0 * metrics["dual"])


def start():
    return train.initial_state(
        {"w": np.zeros(3, np.float32)},
        OPTIMIZER,
        jax.random.key(0),
        extra=np.float32(0),
    )


def fitted(steps, **options):
    batches = itertools.repeat({"x": np.ones(4, np.float32)})
    return train.fit(
        start(),
        batches,
        loss=loss,
        optimizer=OPTIMIZER,
        steps=steps,
        mesh=ONE(),
        ema_decay=0.5,
        **options,
    )


def test_the_average_moves_after_it_and_extra_is_carried_on():
    one, two = (fitted(n, after_update=project) for n in (1, 2))
    # Adam's first steps are of the rate's size: 0.1, then 0.2, which is too much.
    np.testing.assert_allclose(one.params["w"], 0.1, atol=1e-5)
    np.testing.assert_allclose(two.params["w"], 0.15, atol=1e-6)
    assert float(one.extra) == 0
    # The second is a little shorter, as the gradient has fallen.
    assert float(two.extra) == pytest.approx(3 * 0.05, abs=2e-3)
    keep = 2 / 11
    want = keep * np.asarray(one.ema["w"]) + (1 - keep) * 0.15
    np.testing.assert_allclose(two.ema["w"], want, atol=1e-6)


def test_a_stage_may_start_from_other_parameters():
    def before_epoch(epoch, state):
        if epoch == 0:
            return state.extra
        fresh = {"w": np.full(3, 7.0, np.float32)}
        return state._replace(params=fresh, ema=fresh, extra=np.float32(epoch))

    found = fitted(2, before_epoch=before_epoch, epoch_steps=1)
    assert float(found.extra) == 1 and int(found.step) == 2
    np.testing.assert_allclose(found.params["w"], 7, atol=0.2)
