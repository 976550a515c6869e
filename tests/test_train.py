"""One loop: it learns, resumes to the bit, and says what went wrong."""

import functools
import gc
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from flax_skd.io import run_state
from flax_skd.method import losses, subnet, vit
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import ViT
from flax_skd.run import gradients, objective, sharding, train

SPEC = ViTSpec(
    image_size=8,
    patch_size=4,
    width=16,
    depth=2,
    num_heads=2,
    mlp_dim=24,
    num_classes=3,
    mean=(0.5,) * 3,
)
CONFIG = {"data": {"name": "noise", "size": 12}, "lr": (1e-2, 3)}
ONE = functools.partial(sharding.mesh, {"data": 1}, devices=jax.devices()[:1])


def examples(count=12):
    rng = np.random.default_rng(0)
    return [
        {
            "image": rng.integers(0, 256, (8, 8, 3)).astype(np.uint8),
            "label": np.int32(i % 3),
            "index": np.int32(100 + i),
        }
        for i in range(count)
    ]


def batches(source=None, repeat=None, size=4):
    data = grain.MapDataset.source(source or examples()).seed(3).shuffle()
    return iter(data.repeat(repeat).batch(size, drop_remainder=True).to_iter_dataset())


def linear_loss(params, batch, rng, state):
    """Quick to compile: the loop does not care what it trains."""
    x = batch["image"].reshape(-1, 192).astype(jnp.float32) / 255 - 0.5
    x = x * (1 + jax.random.key_data(rng)[0].astype(jnp.float32) / 2.0**32)
    logits = x @ params["kernel"] + params["bias"][None]
    value = losses.cross_entropy(logits, batch["label"])
    return value, {"accuracy": losses.accuracy(logits, batch["label"])}


def linear_params(classes=3):
    return {"kernel": jnp.ones((192, classes)) * 0.1, "bias": jnp.zeros(classes)}


def run(data=None, *, steps=8, params=None, **options):
    options = {"mesh": ONE(), "config": CONFIG, "ema_decay": 0.9} | options
    options = {"loss": linear_loss} | options
    options = {"optimizer": train.make_optimizer(3e-3, clip_norm=1.0)} | options
    params = params or linear_params()
    state = train.initial_state(params, options["optimizer"], jax.random.key(1))
    return train.fit(state, data or batches(), steps=steps, **options)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = map(jax.random.key_data, (x, y))
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def uninterrupted():
    return run()


def rows(workdir):
    return [
        json.loads(line)
        for line in (workdir / "log.jsonl").read_text().split("\n")[:-1]
    ]


class Halt(grain.DatasetIterator):
    """Acts before it hands out the batch of one step."""

    def __init__(self, inner, step, act):
        super().__init__(inner)
        self._inner, self._left, self._act = inner, step, act

    def __next__(self):
        self._left -= 1
        if not self._left:
            self._act()
        return next(self._inner)

    def get_state(self):
        return self._inner.get_state()

    def set_state(self, state):
        self._inner.set_state(state)


def power_cut():
    raise RuntimeError("power cut")


def test_a_tiny_problem_is_learnt_with_one_trace(tmp_path):
    traces = []
    inner = objective.classification_loss(ViT(SPEC), drop_path=0.1)

    def loss(*args):
        traces.append(1)
        return inner(*args)

    rate = train.cosine(1e-2, steps=90, warmup_steps=5)
    optimizer = train.make_optimizer(rate, weight_decay=0.0, clip_norm=1.0)
    params = vit.init(SPEC, jax.random.key(0))
    state = train.initial_state(params, optimizer, jax.random.key(1))
    first = jax.device_get(params)
    state = train.fit(
        state,
        batches(),
        loss=loss,
        optimizer=optimizer,
        steps=90,
        workdir=tmp_path,
        mesh=ONE(),
        log_every_steps=30,
        schedule=rate,
    )
    log = rows(tmp_path)
    assert [r["step"] for r in log] == [30, 60, 90]
    assert log[0]["loss"] > 0.5
    assert log[-1]["loss"] < 0.1
    assert log[-1]["accuracy"] > 0.95
    assert log[-1]["images_per_s"] > 0
    assert 0 <= log[-1]["data_wait"] <= 1
    assert log[0]["lr"] > log[1]["lr"] > log[2]["lr"] > 0
    assert int(state.step) == 90
    assert len(traces) == 1
    assert_same(params, first)  # what was given is not donated


def test_a_run_cut_short_resumes_to_the_bit(tmp_path, uninterrupted):
    with pytest.raises(RuntimeError, match="power cut"):
        run(
            Halt(batches(), 6, power_cut),
            workdir=tmp_path,
            checkpoint_every=2,
            log_every_steps=1,
        )
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4]
    with (tmp_path / "log.jsonl").open("a") as f:
        f.write('{"step": 5, "loss": 1}\n{"st')  # rows that run again, and a stump
    state = run(workdir=tmp_path, resume=True, log_every_steps=1)
    assert_same(state, uninterrupted)
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_writing_checkpoints_changes_nothing(tmp_path, uninterrupted):
    state = run(workdir=tmp_path, checkpoint_every=1)
    assert_same(state, uninterrupted)
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert steps == [6, 7, 8]
    finished = run(workdir=tmp_path, resume=True)
    assert_same(finished, uninterrupted)


def test_a_run_resumes_on_another_mesh(tmp_path, uninterrupted):
    run(steps=4, workdir=tmp_path)
    mesh = sharding.mesh({"data": 4}, devices=jax.devices()[:4])
    state = run(workdir=tmp_path, resume=True, mesh=mesh)
    for got, want in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(uninterrupted.params)
    ):
        # Four devices add in another order, and AdamW divides by small numbers.
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def keyless_loss(params, batch, rng, state):
    """As `linear_loss`, without a draw."""
    return linear_loss(params, batch, jax.random.key(0), state)


@pytest.mark.parametrize("devices", [1, 8])
def test_microbatches_do_what_the_whole_batch_does(devices):
    mesh = sharding.mesh({"data": devices}, devices=jax.devices()[:devices])
    options = {"loss": keyless_loss, "mesh": mesh, "optimizer": optax.sgd(0.1)}
    whole, parts = (
        run(batches(examples(48), size=16), steps=3, accumulate=n, **options)
        for n in (1, 2)
    )
    for tree in ("params", "ema"):
        leaves = (jax.tree.leaves(getattr(s, tree)) for s in (parts, whole))
        for got, want in zip(*leaves, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_the_mean_over_microbatches_with_keys_of_their_own():
    batch = {k: jnp.asarray(v) for k, v in next(batches()).items()}
    state = train.TrainState(0, linear_params(), None, None, None)
    rng = jax.random.key(7)
    metrics, grads = gradients.of_batch(linear_loss, state, batch, rng, accumulate=2)
    want = []
    for index in (0, 1):
        part = {k: v[index::2] for k, v in batch.items()}
        key = jax.random.fold_in(rng, index)
        found = jax.value_and_grad(linear_loss, has_aux=True)(
            state.params, part, key, state
        )
        want.append(({"loss": found[0][0], **found[0][1]}, found[1]))
    want = jax.tree.map(lambda a, b: (a + b) / 2, *want)
    for a, b in zip(jax.tree.leaves((metrics, grads)), jax.tree.leaves(want)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_run_with_microbatches_is_traced_once_and_resumes_to_the_bit(tmp_path):
    traces = []

    def loss(*args):
        traces.append(1)
        return linear_loss(*args)

    whole = run(accumulate=2, loss=loss)
    assert len(traces) == 2  # the shapes of the sums, and the step
    run(steps=3, workdir=tmp_path, accumulate=2)
    assert_same(run(workdir=tmp_path, accumulate=2, resume=True), whole)


def test_a_batch_that_does_not_make_microbatches_is_refused():
    with pytest.raises(
        ValueError, match="over 1 devices in 3 microbatches: take 3 or 6"
    ):
        run(accumulate=3)
    two = sharding.mesh({"data": 2}, devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="over 2 devices in 4 microbatches: take 8"):
        run(accumulate=4, mesh=two)
    with pytest.raises(ValueError, match="accumulate = 0 must be at least 1"):
        run(accumulate=0)
    state = train.TrainState(0, linear_params(), None, None, None)
    with pytest.raises(ValueError, match="accumulate = 3 microbatches: take 3"):
        gradients.of_batch(
            linear_loss, state, next(batches()), jax.random.key(0), accumulate=3
        )


def test_sigterm_saves_and_says_how_to_go_on(tmp_path, uninterrupted):
    before = signal.getsignal(signal.SIGTERM)
    data = Halt(batches(), 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(train.Stopped, match="step 3 of 8.*--resume"):
        run(data, workdir=tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same(run(workdir=tmp_path, resume=True), uninterrupted)


def test_training_works_outside_the_main_thread(tmp_path):
    states = []
    thread = threading.Thread(
        target=lambda: states.append(run(steps=1, workdir=tmp_path))
    )
    thread.start()
    thread.join()
    assert int(states[0].step) == 1


KILLED = """
import os, signal, jax
import test_train as t
data = t.Halt(t.batches(), 6, lambda: os.kill(os.getpid(), signal.SIGKILL))
t.run(data, workdir={workdir!r}, checkpoint_every=1)
"""


def test_a_run_killed_outright_resumes_to_the_bit(tmp_path, uninterrupted):
    here = pathlib.Path(__file__).parent
    code = KILLED.format(workdir=str(tmp_path))
    paths = os.pathsep.join([str(here), str(here.parent)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert_same(run(workdir=tmp_path, resume=True), uninterrupted)


def spoiled_loss(what):
    """The fourth step's loss, or only its gradient, is not finite."""

    def loss(params, batch, rng, state):
        value, metrics = linear_loss(params, batch, rng, state)
        x = jnp.where(state.step == 3, params["bias"].sum() * 0, 1.0)
        # At 0 the square root has a value and no slope.
        return value + (jnp.sqrt(x) if what == "gradient" else 1 / x - 1), metrics

    return loss


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_names_step_examples_and_checkpoint(tmp_path, what):
    data = batches()
    ids = [next(data)["index"].tolist() for _ in range(4)][-1]
    with pytest.raises(train.NonFiniteLossError) as error:
        run(workdir=tmp_path, checkpoint_every=1, loss=spoiled_loss(what))
    text = str(error.value)
    assert f"at step 4, examples {ids}" in text
    assert f"step 3 in {tmp_path}" in text
    saved = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert saved == {"1", "2", "3"}


def test_parameters_that_overflow_are_not_saved(tmp_path):
    params = jax.tree.map(lambda x: x + 1e20, linear_params())

    def loss(params, batch, rng, state):
        return (params["kernel"] * 1e-30).sum() + params["bias"][0] * 0, {}

    with pytest.raises(train.NonFiniteLossError, match=r"param_norm.*checkpoint: none"):
        run(workdir=tmp_path, params=params, loss=loss)


def test_a_label_that_is_no_class_stops_the_run():
    wrong = [{**e, "label": np.int32(3)} for e in examples()]
    with pytest.raises(
        train.NonFiniteLossError, match="no class.*step 1|step 1.*no class"
    ):
        run(batches(wrong), steps=2)


def test_another_config_is_refused_and_the_difference_shown(tmp_path):
    run(steps=1, workdir=tmp_path)
    other = {"data": {"name": "digits", "size": 12}, "lr": (1e-2, 3), "seed": 1}
    with pytest.raises(ValueError, match="another config") as error:
        run(steps=2, workdir=tmp_path, resume=True, config=other)
    text = str(error.value)
    assert "data.name: saved 'noise', now 'digits'" in text
    assert "seed: saved nothing, now 1" in text
    assert "size" not in text
    assert "lr" not in text


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    run(steps=1, workdir=tmp_path)
    with pytest.raises(ValueError, match="another network") as error:
        run(steps=2, workdir=tmp_path, resume=True, params=linear_params(4))
    assert "params.bias: saved (3,), now (4,)" in str(error.value)


# orbax leaves its readers behind when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named(tmp_path):
    run(steps=1, workdir=tmp_path)
    for path in (tmp_path / "checkpoints" / "1").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ValueError, match="checkpoint 1 .* cannot be restored"):
        run(workdir=tmp_path, resume=True)
    gc.collect()


def test_a_run_is_never_overwritten_unasked(tmp_path, uninterrupted):
    (tmp_path / "notes.txt").write_text("kept")
    run(steps=2, workdir=tmp_path, log_every_steps=1)
    with pytest.raises(ValueError, match="another run.*--resume.*--overwrite"):
        run(workdir=tmp_path)
    (tmp_path / "checkpoints" / "mine").mkdir()
    run_state.claim(tmp_path, overwrite=True)
    left = sorted(p.name for p in tmp_path.rglob("*"))
    assert left == ["checkpoints", "mine", "notes.txt"]
    (tmp_path / "checkpoints" / "mine").rmdir()
    state = run(workdir=tmp_path, overwrite=True)
    assert_same(state, uninterrupted)
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_a_workdir_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        run_state.claim(tmp_path / "file")
    with pytest.raises(ValueError, match="exclude"):
        run_state.claim(tmp_path, overwrite=True, resume=True)
    with pytest.raises(ValueError, match="without a workdir"):
        run(resume=True)


def test_what_cannot_be_saved_is_said_before_anything_is_deleted(tmp_path):
    run(steps=1, workdir=tmp_path)
    with pytest.raises(ValueError, match="grain iterator"):
        run(iter([]), workdir=tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="config must be plain"):
        run(workdir=tmp_path, overwrite=True, config={"model": object()})
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_resume_in_an_empty_workdir_starts_at_the_beginning(tmp_path, uninterrupted):
    assert_same(run(workdir=tmp_path, resume=True), uninterrupted)


def test_data_that_ends_early_is_said():
    with pytest.raises(ValueError, match="ended before step 4 of 8"):
        run(batches(repeat=1))


def test_evaluation_is_called_when_due_and_logged(tmp_path):
    seen = []

    def evaluate(state):
        seen.append(int(state.step))
        return {"top1": state.params["bias"].sum()}

    run(steps=5, workdir=tmp_path, evaluate=evaluate, evaluate_every=2)
    assert seen == [2, 4, 5]
    assert [r["step"] for r in rows(tmp_path) if "top1" in r] == seen


def test_only_kernels_decay():
    params = vit.init(SPEC.replace(layer_scale=True), jax.random.key(0))
    params = jax.tree.map(jnp.ones_like, params)
    optimizer = train.make_optimizer(0.5, weight_decay=0.1)
    zero = jax.tree.map(jnp.zeros_like, params)
    with jax.numpy_dtype_promotion("standard"):  # as in `train_step`
        updates, _ = optimizer.update(zero, optimizer.init(params), params)
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        want = -0.05 if path[-1].key == "kernel" else 0.0
        np.testing.assert_allclose(update, want, rtol=1e-6)


def test_one_step_is_adamw_with_clipping_and_a_warm_average():
    optimizer = train.make_optimizer(0.1, weight_decay=0.2, clip_norm=0.5)
    params = {"kernel": np.array([3.0, 4.0], np.float32)}
    state = train.initial_state(params, optimizer, jax.random.key(0))
    state, metrics = train.train_step(
        state,
        {},
        loss=lambda p, b, rng, t: (0.5 * (p["kernel"] ** 2).sum(), {}),
        optimizer=optimizer,
        ema_decay=0.99,
    )
    w = np.array([3.0, 4.0])
    g = w * 0.5 / 5  # clipped from norm 5 to 0.5
    new = w - 0.1 * (g / (np.abs(g) + 1e-8) + 0.2 * w)  # both moments corrected
    np.testing.assert_allclose(state.params["kernel"], new, rtol=1e-6)
    np.testing.assert_allclose(state.ema["kernel"], 0.1 * w + 0.9 * new, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"], 5)
    np.testing.assert_allclose(metrics["param_norm"], np.linalg.norm(new), rtol=1e-6)
    assert int(state.step) == 1


def test_every_step_draws_by_a_key_of_its_own():
    optimizer, rng = train.make_optimizer(0.1), jax.random.key(5)
    state, draws = train.initial_state(linear_params(), optimizer, rng), []

    def loss(params, batch, rng, state):
        return params["bias"].sum(), {"draw": jax.random.uniform(rng)}

    for _ in range(4):
        state, metrics = train.train_step(
            state, {}, loss=loss, optimizer=optimizer, ema_decay=0.9
        )
        draws.append(float(metrics["draw"]))
    # Of the key of the run and the step alone, so that a resumed run draws the same.
    keys = [jax.random.fold_in(rng, step) for step in range(4)]
    assert draws == [float(jax.random.uniform(key)) for key in keys]
    assert len(set(draws)) == 4


def test_a_loss_is_not_handed_what_optimizer_and_average_keep():
    optimizer, seen = train.make_optimizer(0.1), []
    state = train.initial_state(linear_params(), optimizer, jax.random.key(0), extra=7)

    def loss(params, batch, rng, state):
        seen.append(state)
        return sum((x**2).sum() for x in jax.tree.leaves(params)), {}

    train.train_step(state, {}, loss=loss, optimizer=optimizer, ema_decay=0.9)
    (told,) = seen
    assert told.extra == 7 and told.step == 0
    assert told.opt_state is None and told.ema is None


def test_a_run_without_average_carries_none(tmp_path):
    optimizer = train.make_optimizer(1e-3)
    state = train.initial_state(linear_params(), optimizer, jax.random.key(1))
    go = functools.partial(
        *(train.fit, state._replace(ema=None), batches()),
        loss=linear_loss,
        optimizer=optimizer,
        mesh=ONE(),
        workdir=tmp_path,
    )
    assert go(steps=2).ema is None
    assert go(steps=3, resume=True).ema is None


def test_what_is_frozen_is_data_of_the_step_and_in_no_checkpoint(tmp_path):
    optimizer, seen = train.make_optimizer(1e-3), []

    def loss(params, batch, rng, state):
        seen.append(isinstance(state.frozen["kernel"], jax.core.Tracer))
        value, metrics = linear_loss(params, batch, rng, state)
        towards = jnp.square(params["kernel"] - state.frozen["kernel"]).sum()
        return value + towards, metrics

    def go(frozen=1.0, **options):
        fixed = {"kernel": jnp.full((192, 3), frozen)}
        state = train.initial_state(
            *(linear_params(), optimizer, jax.random.key(1)), frozen=fixed
        )
        options = {"optimizer": optimizer, "mesh": ONE()} | options
        return train.fit(state, batches(), loss=loss, **options)

    whole = go(steps=4)
    assert all(seen)
    np.testing.assert_array_equal(whole.frozen["kernel"], np.ones((192, 3)))
    assert np.ptp(go(0.0, steps=4).params["kernel"] - whole.params["kernel"]) > 1e-4
    go(steps=2, workdir=tmp_path)
    saved = ocp.PyTreeCheckpointHandler().metadata(tmp_path / "checkpoints/2/state")
    assert set(saved.tree) == {*train.TrainState._fields} - {"frozen"}
    assert_same(go(steps=4, workdir=tmp_path, resume=True), whole)


def test_the_cosine_warms_up_and_ends():
    rate = train.cosine(2.0, steps=110, warmup_steps=10, end=0.5)
    for step, want in ((0, 0.0), (5, 1.0), (10, 2.0), (60, 1.25), (110, 0.5)):
        np.testing.assert_allclose(rate(step), want, rtol=1e-6)
    np.testing.assert_allclose(train.cosine(2.0, steps=10)(0), 2.0)
    with pytest.raises(ValueError, match="warmup_steps = 10 of steps = 10"):
        train.cosine(1.0, steps=10, warmup_steps=10)


def test_drop_path_keeps_the_mean_and_spares_the_first_block():
    masks = objective.drop_path_masks(jax.random.key(0), None, 4000, depth=3, rate=0.4)
    assert (masks[0].attn_gate == 1).all()
    for m, chance in zip(masks, (0.0, 0.2, 0.4)):
        for gate in (m.attn_gate, m.mlp_gate):
            np.testing.assert_allclose(np.unique(gate)[-1], 1 / (1 - chance), rtol=1e-6)
            # 4,000 draws: five standard deviations
            sigma = math.sqrt(chance / (1 - chance) / 4000)
            np.testing.assert_allclose(gate.mean(), 1, atol=5 * sigma + 1e-6)
    assert not np.array_equal(masks[2].attn_gate, masks[2].mlp_gate)


def test_drop_path_multiplies_the_gates_of_a_sub_network():
    widths = SubnetSpec((8, 0), (8, 0), (24, 3))
    under = subnet.masks(SPEC, widths)
    masks = objective.drop_path_masks(jax.random.key(0), under, 50, depth=2, rate=0.5)
    assert (masks[1].attn_gate == 0).all()
    assert set(np.unique(masks[1].mlp_gate)) == {0.0, 2.0}
    np.testing.assert_array_equal(masks[1].mlp, under[1].mlp)


def test_the_loss_trains_a_masked_sub_network():
    widths = SubnetSpec((8, 0), (8, 0), (24, 0))
    calls = []

    def cut_of(params, rng, size, state):
        calls.append(size)
        return params, subnet.masks(SPEC, widths), {}

    loss = objective.classification_loss(ViT(SPEC), cut_of=cut_of)
    batch = next(batches())
    batch = {k: jnp.asarray(v) for k, v in batch.items()}
    params = vit.init(SPEC, jax.random.key(0))
    params["head"]["kernel"] += 0.1 * jax.random.normal(jax.random.key(1), (16, 3))
    value, metrics = loss(params, batch, jax.random.key(0), None)
    cut = ViT(SPEC, widths).apply(
        {"params": subnet.extract(params, widths)}, batch["image"]
    )
    np.testing.assert_allclose(
        value, losses.cross_entropy(cut, batch["label"]), rtol=1e-5
    )
    np.testing.assert_allclose(
        metrics["accuracy"], losses.accuracy(cut, batch["label"])
    )
    assert calls == [4]


@pytest.mark.parametrize("name", ["drop_path", "label_smoothing"])
def test_a_rate_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} = 1.0"):
        objective.classification_loss(ViT(SPEC), **{name: 1.0})


def test_cross_entropy_is_the_plain_formula():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, 4)).astype(np.float32)
    labels = np.array([0, 3, 1, 2, 2], np.int32)
    log_p = logits - np.log(np.exp(logits.astype(float)).sum(-1, keepdims=True))
    each = [-0.9 * log_p[i, c] - 0.1 * log_p[i].mean() for i, c in enumerate(labels)]
    got = losses.cross_entropies(logits, labels, label_smoothing=0.1)
    np.testing.assert_allclose(got, each, rtol=1e-5)
    soft = np.eye(4, dtype=np.float32)[labels]
    np.testing.assert_allclose(
        losses.cross_entropies(logits, soft, label_smoothing=0.1), each, rtol=1e-5
    )
    got = losses.cross_entropy(logits, labels, label_smoothing=0.1)
    np.testing.assert_allclose(got, np.mean(each), rtol=1e-5)


def test_a_class_that_is_none_makes_the_loss_nan():
    logits = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    labels = np.array([0, -1], np.int32)
    found = losses.cross_entropies(logits, labels)
    assert np.isnan(found).tolist() == [False, True]
    assert np.isnan(losses.cross_entropy(logits, labels))
