"""HPM-KD: weights of teachers sum to one, a stage is kept if it gains, others stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rival_runs import (
    SPEC,
    arguments,
    assert_same_networks,
    batch_of,
    params_of,
    stopped_and_resumed,
    trained,
)

from flax_skd.io import checkpoint
from flax_skd.method import macs, subnet
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.rivals import hpm_kd
from flax_skd.run import main
from flax_skd.run.train import TrainState

pytestmark = pytest.mark.usefixtures("one_device")
WIDTHS = [SubnetSpec.uniform(SPEC, d, d, 4 * d) for d in (6, 4, 2)]


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def plain_weights(logits, trusted):
    probs = softmax(np.asarray(logits, np.float64))
    mean = sum(t * p for t, p in zip(trusted, probs)) / sum(trusted)
    scores = np.array(
        [t * p.max(-1) * (p * mean).sum(-1) for t, p in zip(trusted, probs)]
    )
    return scores / scores.sum(0)


@pytest.mark.parametrize("trusted", [(1, 1, 1), (1, 0, 1), (1, 0, 0)])
def test_weights_are_positive_for_the_trusted_and_sum_to_one(trusted):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (3, 5, 10)).astype(np.float32)
    found = hpm_kd.teacher_weights(jnp.asarray(logits), jnp.float32(trusted))
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-6)
    np.testing.assert_allclose(found, plain_weights(logits, trusted), atol=1e-6)
    assert ((np.asarray(found) > 0) == (np.array(trusted) > 0)[:, None]).all()


def test_a_sure_teacher_that_the_others_agree_with_has_the_larger_weight():
    sure, unsure, other = (
        np.array([[4.0, 0, 0]]),
        np.array([[1.0, 0, 0]]),
        np.array([[0, 0, 4.0]]),
    )
    logits = jnp.float32(np.stack([sure, unsure, sure, other]))
    first, second, _, last = hpm_kd.teacher_weights(logits, jnp.ones(4))[:, 0]
    assert first > second and first > last


def test_the_temperature_falls_from_three_to_one():
    heats = [hpm_kd.temperature(jnp.float32(a), first=3.0) for a in (0, 0.5, 1)]
    assert [float(t) for t in heats] == [3, 2, 1]


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [(50, 51, True), (50, 50.9, False), (50, 40, False), (0, 100, True)],
)
def test_a_stage_is_kept_if_it_gains_a_point(before, after, kept):
    assert hpm_kd.keeps(before, after) is kept


def students():
    params = {
        hpm_kd.name_of(i): jax.device_get(subnet.extract(params_of(seed=i), w))
        for i, w in enumerate(WIDTHS)
    }
    return [ViT(SPEC, w) for w in WIDTHS], params


def test_the_loss_of_a_stage_is_labels_and_what_larger_networks_say():
    models, params = students()
    batch, full = batch_of(), params_of(seed=5)
    chain = hpm_kd.Chain(np.int32(2), np.float32([1, 0, 0]), np.float32(0.25))
    state = TrainState(0, params, None, None, None, chain, full)
    loss = hpm_kd.of_stage(ViT(SPEC), models, 2)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), grads = step(params, batch, jax.random.key(0), state)

    def logits(model, tree):
        found = jax.jit(model.apply)({"params": tree}, batch["image"])
        return np.asarray(found, np.float64)

    z = logits(models[2], params["student_2"])
    above = np.stack(
        [logits(ViT(SPEC), full)]
        + [logits(models[i], params[f"student_{i}"]) for i in range(2)]
    )
    heat = 1 + 2 * 0.75
    weights = plain_weights(above, (1, 1, 0))
    target = (weights[..., None] * softmax(above / heat)).sum(0)
    kl = (target * (np.log(target) - np.log(softmax(z / heat)))).sum(-1).mean()
    ce = -np.log(softmax(z))[np.arange(len(z)), batch["label"]].mean()
    assert float(metrics["temperature"]) == pytest.approx(heat)
    assert float(value) == pytest.approx(ce + heat**2 * kl, rel=1e-5)
    for name, tree in grads.items():
        moved = any(np.asarray(x).any() for x in jax.tree.leaves(tree))
        assert moved == (name == "student_2")


def test_only_the_student_of_the_stage_changes():
    _, params = students()
    chain = hpm_kd.Chain(np.int32(1), np.zeros(3, np.float32), np.float32(0))
    before = TrainState(0, params, None, None, None, chain)
    after = before._replace(params=jax.tree.map(lambda x: x + 1, params))
    held = hpm_kd.only_the_student(before, after, None, {"accuracy": jnp.float32(1)})
    for name, tree in held.params.items():
        kept = params if name != "student_1" else after.params
        jax.tree.map(np.testing.assert_array_equal, tree, kept[name])
    assert float(held.extra.accuracy) == pytest.approx(0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("hpm_kd")


MORE = (
    *("--config.epochs=2", "--config.rival.images=32", "--config.lr=3e-3"),
    "--config.rival.shares=8/12,4/12",
)


@pytest.fixture(scope="module")
def network(folder):
    return trained("hpm_kd", folder, "whole", *MORE)


def test_the_command_trains_and_resumes_to_the_bit(network, folder, monkeypatch):
    again = stopped_and_resumed(
        "hpm_kd", folder, "stopped", *MORE, after=6, monkeypatch=monkeypatch
    )
    assert_same_networks(again, network)
    facts = checkpoint.load_supernet(network).provenance
    assert facts["trained"] == "hpm_kd" and len(facts["kept"]) == 2
    full = checkpoint.load_supernet(network).params
    above = full
    for name, share, kept in zip(("8_12", "4_12"), (8, 4), facts["kept"]):
        small = checkpoint.load_subnet(network.with_name(f"network-{name}"))
        assert macs.macs(SPEC, small.widths) <= share / 12 * macs.macs(SPEC)
        cut = subnet.extract(above, small.widths)
        # The average of the same numbers is the same but for rounding.
        same = np.allclose(small.params["head"]["bias"], cut["head"]["bias"], atol=1e-6)
        assert same != bool(kept)  # a stage that is not kept is undone
        above = small.params


def test_a_stage_that_must_gain_nothing_is_kept(folder):
    found = trained("hpm_kd", folder, "easy", *MORE, "--config.rival.least_gain=-100")
    assert checkpoint.load_supernet(found).provenance["kept"] == [1.0] * 2
    students = [
        checkpoint.load_subnet(found.with_name(f"network-{name}"))
        for name in ("8_12", "4_12")
    ]
    biases = [student.params["head"]["bias"] for student in students]
    assert len({bias.tobytes() for bias in biases}) == 2  # each has learnt its own


def test_a_student_is_exported_and_the_whole_extracted(network, folder):
    out, small = folder / "exports", folder / "small"
    args = ["export", f"--workdir={network}-4_12", f"--out={out}", "--formats=npz"]
    assert main.main(args) == 0
    args = ["extract", f"--workdir={network}", f"--out={small}", "--budget=1"]
    assert main.main(args) == 0


def test_a_bad_call_says_what_is_needed(folder, capsys):
    for more, match in (
        ("--config.rival.shares=6/12,8/12", "must fall"),
        ("--config.rival.shares=0.7,0.699", "too coarse"),
        ("--config.rival.shares=0.001", "no level reaches"),
        ("--config.epochs=0.5", "a last stage that never began"),
    ):
        assert main.main(arguments("hpm_kd", folder, "bad", more)) == 1
        assert match in capsys.readouterr().err
