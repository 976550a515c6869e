"""What a resumed run may read anew, and what must be what it was."""

import types

import jax
import numpy as np
import pytest
from conftest import random_repairs
from test_train import rows, run

from flax_skd.io import checkpoint, data, sources
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import piad, vit
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.run import config_files, feed, programs, sharding, train, training

ONE = {"mean": (0.5,), "std": (0.5,)}
SPEC = ViTSpec(8, 4, 16, 1, 2, mlp_dim=32, num_classes=10, in_channels=1, **ONE)


def decides(config, *, frozen=None, spec=SPEC):
    """What a run compares before it goes on, of images that are there."""
    program = types.SimpleNamespace(
        frozen=frozen, model=types.SimpleNamespace(spec=spec)
    )
    source = sources.open_source("digits:train")
    return training._what_decides(config, program, source)


def piad_config(**changes):
    config = config_files.load("configs/piad.py")
    config.update_from_flattened_dict(changes)
    return config


@pytest.mark.parametrize(
    "change",
    [
        {"data.on_bad_image": "skip"},
        {"piad.calibration.on_bad_image": "skip"},
        {"remat": True},
        {"mesh.fsdp": 2},
        {"data.workers": 4},
    ],
)
def test_what_a_run_may_need_to_go_on_may_change(change):
    assert decides(piad_config(**change)) == decides(piad_config())


@pytest.mark.parametrize("change", [{"seed": 3}, {"data.repeats": 2}, {"lr": 0.5}])
def test_what_decides_the_result_may_not(change):
    assert decides(piad_config(**change)) != decides(piad_config())


def test_a_start_that_reads_images_or_computes_otherwise_is_another_network():
    known = decides(piad_config())
    for other in (SPEC.replace(mean=(0.1,)), SPEC.replace(gelu="tanh")):
        assert decides(piad_config(), spec=other) != known


def test_a_teacher_goes_by_its_weights_not_by_where_they_lie(params):
    other = jax.tree.map(lambda x: x, params)
    other["head"]["bias"] = other["head"]["bias"] + 1
    same = jax.tree.map(np.array, params)
    found = [decides(piad_config(), frozen=tree) for tree in (params, other, same)]
    assert found[0] != found[1] and found[0] == found[2]


def test_images_of_calibration_go_by_what_they_are(spec, tmp_path):
    source = {"source": f"npz:{tmp_path}/c.npz", "images": 20}
    config = piad_config(**{f"piad.calibration.{k}": v for k, v in source.items()})
    found = []
    for seed in (0, 0, 1):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 8, 8, 3), np.uint8)
        np.savez(tmp_path / "c.npz", images=pixels, labels=np.arange(20) % 5)
        found.append(decides(config, spec=spec))
    assert found[0] == found[1] != found[2]


def test_a_network_is_saved_with_the_repairs_that_it_was_trained_with(spec, tmp_path):
    spec = spec.replace(num_classes=10)
    params = vit.init(spec, jax.random.key(0))
    full = piad.from_rows([SubnetSpec.full(spec)], spec)
    now = Supernet(params, spec, full, {}, random_repairs(spec, seed=1))
    program = programs.piad_program(piad_config(), now)
    trained = random_repairs(spec, seed=2)
    extra = program.extra._replace(compensation=trained)
    program.save(tmp_path / "network", params, extra, {})
    found = checkpoint.load_supernet(tmp_path / "network").compensation
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(trained), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(("died", "steps"), [(4, [4]), (2, [2, 4])])
def test_a_run_that_died_in_an_evaluation_is_evaluated(tmp_path, died, steps):
    def dies(state):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        every = {"checkpoint_every": died, "evaluate_every": died}
        run(steps=4, workdir=tmp_path, evaluate=dies, **every)
    for _ in range(2):  # and once is enough

        def evaluate(state):
            return {"top1": float(state.step)}

        run(steps=4, workdir=tmp_path, evaluate=evaluate, resume=True, **every)
        assert [row for row in rows(tmp_path) if "top1" in row] == [
            {"step": step, "top1": float(step)} for step in steps
        ]


@pytest.mark.parametrize("size", [5, 8, 12])
def test_measuring_takes_a_batch_of_any_size(spec, size):
    source = sources.take(sources.open_source("digits:test"), 30)
    small = spec.replace(num_classes=10)
    whole = data.eval_batches(source, small, batch_size=30)
    images = next(iter(whole))["image"]
    mesh = sharding.mesh()
    found = feed.OnMesh(data.eval_batches(source, small, batch_size=size), mesh)
    weights, seen = [], []
    for batch in found:
        assert len(batch["weight"]) % mesh.size == 0
        live = np.asarray(batch["weight"]) > 0
        weights.append(live.sum())
        seen.append(np.asarray(batch["image"])[live])
    assert sum(weights) == 30 and found.rows == sum(len(b["label"]) for b in found)
    np.testing.assert_array_equal(np.concatenate(seen), images)


def test_a_batch_is_told_as_the_config_has_it(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    mesh = types.SimpleNamespace(shape={"data": 16})
    told = r"a batch of 72 does not divide over 16 devices: take 64 or 80 \(--config"
    batch = {"label": np.zeros(36)}  # of one process
    monkeypatch.setattr(sharding, "batch_sharding", lambda mesh: None)
    with pytest.raises(ValueError, match=told):
        sharding.shard_batch(batch, mesh)


def test_a_learning_rate_does_not_rise_to_its_end():
    with pytest.raises(ValueError, match=r"1e-06 \(min_lr\) .* 7e-07 \(lr\)"):
        train.cosine(7e-7, steps=100, end=1e-6)
    assert train.cosine(1e-6, steps=100, end=1e-6)(50) == pytest.approx(1e-6)
