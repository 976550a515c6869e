"""Numbers that are not finite are found at once, and the place is named."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import (
    assert_same,
    batches,
    examples,
    linear_loss,
    linear_params,
    rows,
    run,
)

from flax_skd.run import faults, train


def float_batches(wrong=None):
    """Images as floats; of example 100 + `wrong` one number is nan."""
    source = [{**e, "image": e["image"].astype(np.float32)} for e in examples()]
    if wrong is not None:
        source[wrong]["image"][5, 2, 1] = np.nan
    return batches(source)


def of_step(step):
    """An example that this step is the first to draw."""
    data = batches()
    return [int(next(data)["index"][1]) for _ in range(step)][-1]


def test_an_image_that_is_not_finite_is_named_at_its_step(tmp_path):
    example = of_step(3)
    with pytest.raises(train.NonFiniteLossError) as error:
        run(float_batches(example - 100), workdir=tmp_path, log_every_steps=1)
    assert "at step 3, examples" in str(error.value)
    assert f"Not finite: batch image of example {example}. " in str(error.value)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert all(math.isfinite(v) for row in rows(tmp_path) for v in row.values())


def test_after_a_fault_the_last_good_state_goes_on_to_the_same_end(tmp_path):
    whole = run(float_batches())
    options = {"workdir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(train.NonFiniteLossError, match=f"step 2 in {tmp_path}"):
        run(float_batches(of_step(3) - 100), **options)
    assert_same(run(float_batches(), resume=True, **options), whole)


def spoiled_slope(params, batch, rng, state):
    """At step 4 the slope in the bias, and in nothing else, is not finite."""
    value, metrics = linear_loss(params, batch, rng, state)
    x = jnp.where(state.step == 3, params["bias"].sum() * 0, 1.0)
    return value + jnp.sqrt(x), metrics


def test_a_gradient_that_is_not_finite_is_named_with_its_parameter(tmp_path):
    with pytest.raises(train.NonFiniteLossError) as error:
        run(loss=spoiled_slope, workdir=tmp_path, checkpoint_every=1)
    assert "at step 4" in str(error.value)
    # Clipping by the norm of all spreads it over every parameter within the step.
    assert "Not finite: gradient bias (1 of 2). Last good" in str(error.value)
    assert f"step 3 in {tmp_path}" in str(error.value)


def spoiling(step, name):
    """Plain descent whose update of one parameter is nan at one step."""

    def update(grads, count, params=None):
        del params
        grads = jax.tree.map(lambda g: -0.1 * g, grads)
        bad = jnp.where(count == step - 1, jnp.nan, 0.0)
        return {**grads, name: grads[name] + bad}, count + 1

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)


def test_a_parameter_that_is_not_finite_is_named_and_not_saved(tmp_path):
    options = {"workdir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(train.NonFiniteLossError) as error:
        run(optimizer=spoiling(3, "kernel"), **options)
    assert "at step 3" in str(error.value)
    assert "Not finite: parameter kernel (1 of 2). Last good" in str(error.value)
    saved = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert saved == {"1", "2"}


def test_parameters_that_are_not_finite_to_begin_with_are_named_before_a_step():
    params = linear_params()
    params["kernel"] = params["kernel"].at[3, 1].set(jnp.inf)
    with pytest.raises(
        train.NonFiniteLossError, match=r"before step 1: parameter kernel \(1 of 2\)"
    ):
        run(params=params)


def test_the_level_of_the_step_is_named():
    def loss(params, batch, rng, state):
        value, _ = linear_loss(params, batch, rng, state)
        return value / 0.0, {"level": jnp.float32(2)}

    with pytest.raises(train.NonFiniteLossError, match="at step 1, level 2, examples"):
        run(loss=loss)


def test_long_lists_of_places_are_cut_and_counted():
    tree = {"a": {f"p{i}": np.zeros(2) for i in range(6)}}
    finite = np.array([True, False, False, True, False, False])
    assert faults.named(finite, tree) == "a/p1, a/p2, a/p4, ... (4 of 6)"
    assert faults.named(np.ones(6, bool), tree) == ""
    image = np.zeros((5, 2, 2), np.float32)
    image[[1, 4], 0, 1] = np.inf
    batch = {"image": image, "label": np.arange(5)}
    assert faults.of_batch(batch) == "image of row 1, 4"
    assert faults.of_batch({"image": image[:1], "label": np.arange(1)}) == ""
