"""What a run logs of a step is of that step."""

import jax
import numpy as np
import optax
from test_train import ONE, batches, rows

from flax_skd.run import settling, train


def test_the_rate_that_is_logged_is_the_one_the_step_took(tmp_path):
    """Of a loss of slope 1, plain descent moves by the rate of the step."""
    rate = train.cosine(0.5, steps=6, warmup_steps=2, end=0.1)
    optimizer, places = optax.sgd(rate), [0.0]

    def loss(params, batch, rng, state):
        return params["w"].sum(), {"before": params["w"].sum()}

    def evaluate(state):
        places.append(float(state.params["w"][0]))
        return {}

    start = {"w": np.zeros(1, np.float32)}
    train.fit(
        train.initial_state(start, optimizer, jax.random.key(0)),
        batches(),
        loss=loss,
        optimizer=optimizer,
        steps=6,
        mesh=ONE(),
        workdir=tmp_path,
        evaluate=evaluate,
        evaluate_every=1,
        schedule=rate,
        log_every_steps=1,
    )
    log = [row for row in rows(tmp_path) if "lr" in row]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    moved = -np.diff(places)
    np.testing.assert_allclose([row["lr"] for row in log], moved, atol=1e-6)
    assert len({round(x, 4) for x in moved}) >= 5  # no two steps in a row are alike
    np.testing.assert_allclose([r["before"] for r in log], places[:-1], atol=1e-6)


class Told:
    """A progress that reports every step, and keeps what it is told."""

    def __init__(self):
        self.steps, self.reports = [], []

    def step(self, step, values, images):
        self.steps.append((step, values["loss"], images))
        return True

    def report(self, step, more):
        self.reports.append((step, more))


def test_images_of_a_step_are_those_of_all_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    told = Told()
    running = settling.Running(told, None, None, {"w": np.zeros(2)})
    for step in (1, 2):
        fine = {"grad_finite": np.ones(1, bool), "param_finite": np.ones(1, bool)}
        norms = {"loss": step / 2, "grad_norm": 1.0, "param_norm": 1.0}
        batch = {"image": np.zeros((4, 2)), "label": np.zeros(4)}
        running.follow(step, norms | fine, batch)
    assert told.steps == [(1, 0.5, 12)]  # one step behind the run
    running.settle()
    running.settle()  # once is enough
    assert told.steps == [(1, 0.5, 12), (2, 1.0, 12)]
    assert told.reports == [(1, {}), (2, {})]
