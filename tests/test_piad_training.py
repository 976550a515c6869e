"""PIAD in the loop: the list grows, nothing recompiles, and a resume keeps the bits."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shake
from test_train import ONE, Halt, assert_same, batches

from flax_skd.method import growth, importance, macs, vit
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import ViT
from flax_skd.run import objective, train

SPEC = ViTSpec(
    image_size=8,
    patch_size=4,
    width=16,
    depth=2,
    num_heads=2,
    mlp_dim=32,
    num_classes=3,
)
GROUPS = growth.Groups(attn=4, mlp=8)
EPOCH_STEPS = 2


def grower(calls):
    rng = np.random.default_rng(1)
    calibration = {
        "image": rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8),
        "label": (np.arange(8) % 3).astype(np.int32),
        "weight": np.ones(8, np.float32),
    }

    def before_epoch(epoch, state):
        calls.append(epoch)
        levels = state.extra.dropout_list
        widths = levels.widths(int(levels.levels), SPEC)
        measured = importance.measure(ViT(SPEC), state.params, [calibration], widths)
        target = growth.schedule(epoch, 3, model_macs=macs.macs(SPEC), share=0.7)
        return objective.Elastic(
            growth.grow(levels, SPEC, measured, target_macs_saved=target, groups=GROUPS)
        )

    return before_epoch


def run(data=None, *, calls=None, traces=None, **options):
    ordinary = objective.classification_loss(
        ViT(SPEC), cut_of=objective.sampled_levels(SPEC)
    )

    def loss(*args):
        if traces is not None:
            traces.append(1)
        return ordinary(*args)

    optimizer = train.make_optimizer(3e-3, clip_norm=1.0)
    params = shake(vit.init(SPEC, jax.random.key(0)))
    extra = objective.Elastic(growth.start(SPEC, GROUPS))
    state = train.initial_state(params, optimizer, jax.random.key(1), extra=extra)
    return train.fit(
        state,
        data or batches(),
        loss=loss,
        optimizer=optimizer,
        steps=8,
        mesh=ONE(),
        before_epoch=grower([] if calls is None else calls),
        epoch_steps=EPOCH_STEPS,
        **options,
    )


@pytest.fixture(scope="module")
def uninterrupted():
    return run()


def test_the_list_grows_every_epoch_and_the_step_is_traced_once(uninterrupted):
    calls, traces = [], []
    state = run(calls=calls, traces=traces)
    assert calls == [0, 1, 2, 3] and len(traces) == 1
    assert_same(state, uninterrupted)
    levels = jax.device_get(state.extra.dropout_list)
    rows = [levels.widths(s, SPEC) for s in range(int(levels.levels) + 1)]
    counts = [macs.macs(SPEC, row) for row in rows]
    assert rows[0] == SubnetSpec.full(SPEC) and (np.diff(counts) < 0).all()
    saved = 1 - counts[-1] / macs.macs(SPEC)
    assert 0.4 < saved <= 0.7


ELSEWHERE = "import test_piad_training as t; t.run(workdir={!r})"


def test_one_seed_gives_the_same_bits_in_another_process(tmp_path, uninterrupted):
    here = pathlib.Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE.format(str(tmp_path))],
        env=os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{here.parent}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # That run is finished: this one only reads what it saved.
    elsewhere = run(workdir=tmp_path, resume=True)
    assert int(elsewhere.step) == 8
    assert_same(elsewhere, uninterrupted)


@pytest.mark.parametrize("step", [4, 5])
def test_a_run_stopped_in_or_between_epochs_resumes_to_the_bit(
    tmp_path, uninterrupted, step
):
    def stop():
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(Halt(batches(), step, stop), workdir=tmp_path, checkpoint_every=1)
    assert_same(run(workdir=tmp_path, resume=True), uninterrupted)


def test_what_is_cut_is_not_trained_at_that_level():
    levels = growth.start(SPEC, GROUPS)
    half = SubnetSpec.uniform(SPEC, 4, 4, 16)
    tables = [np.array(t) for t in levels[:3]]
    for table, width in zip(tables, (4, 4, 16)):
        table[:] = width  # the list's every level is the half network
    levels = levels._replace(
        **dict(zip(SubnetSpec._fields, tables)), levels=np.int32(0)
    )
    params = shake(vit.init(SPEC, jax.random.key(0)))
    loss = objective.classification_loss(
        ViT(SPEC), cut_of=objective.sampled_levels(SPEC)
    )
    extra = objective.Elastic(jax.tree.map(jnp.asarray, levels))
    state = train.TrainState(0, params, None, None, None, extra)
    batch = {k: jnp.asarray(v) for k, v in next(batches()).items()}
    grads, metrics = jax.grad(loss, has_aux=True)(
        params, batch, jax.random.key(0), state
    )
    assert float(jnp.abs(grads["block_0"]["mlp"]["fc1"]["kernel"][:, 16:]).max()) == 0
    assert float(jnp.abs(grads["block_0"]["mlp"]["fc1"]["kernel"][:, :16]).max()) > 0
    share = macs.macs(SPEC, half) / macs.macs(SPEC)
    assert float(metrics["macs_share"]) == pytest.approx(share, rel=1e-5)
