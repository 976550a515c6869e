"""LDR and TLEG: polynomial sums at any depth, and stages that train the new alone."""

import jax
import numpy as np
import pytest
from rival_runs import (
    DEEP,
    arguments,
    assert_same_networks,
    batch_of,
    params_of,
    stopped_and_resumed,
    trained,
)

from flax_skd.io import checkpoint
from flax_skd.method.vit import ViT
from flax_skd.rivals import ldr, stages
from flax_skd.run import main, objective
from flax_skd.run.train import TrainState

pytestmark = pytest.mark.usefixtures("one_device")


def components(count=3):
    """Trees of one block each, none of them zero."""
    made = {f"component_{n}": params_of(DEEP, seed=n)["block_1"] for n in range(count)}
    outside = {k: v for k, v in params_of(DEEP).items() if not k.startswith("block_")}
    return {"outside": outside, **made}


@pytest.mark.parametrize("depth", [1, 3, 4, 7])
def test_every_block_is_the_polynomial_sum_at_any_depth(depth):
    parts = components()
    found = jax.jit(lambda p: ldr.recomposed(p, ldr.chebyshev(depth, 3)))(parts)
    assert sorted(k for k in found if k.startswith("block_")) == sorted(
        f"block_{i}" for i in range(depth)
    )
    for i in range(depth):
        x = i / depth
        a, b, c = (parts[f"component_{n}"]["mlp"]["fc1"]["kernel"] for n in range(3))
        want = a + x * b + (2 * x * x - 1) * np.asarray(c, np.float64)
        np.testing.assert_allclose(
            found[f"block_{i}"]["mlp"]["fc1"]["kernel"], want, atol=1e-5
        )
    spec = DEEP.replace(depth=depth)
    logits = jax.jit(ViT(spec).apply)({"params": found}, batch_of()["image"])
    assert np.isfinite(logits).all()


def test_chebyshev_is_the_cosine_of_the_multiple_angle():
    x = np.arange(5) / 5
    want = np.cos(np.arange(12) * np.arccos(x)[:, None])
    np.testing.assert_allclose(ldr.chebyshev(5, 12), want, atol=1e-12)


def test_two_linear_components_are_tleg():
    a, b = (params_of(DEEP, seed=n)["block_1"]["norm1"]["bias"] for n in range(2))
    found = ldr.recomposed(components(2), ldr.linear(4, 2))
    for i in range(4):
        want = a + (i + 1) / 4 * b
        np.testing.assert_allclose(
            found[f"block_{i}"]["norm1"]["bias"], want, atol=1e-6
        )
    with pytest.raises(ValueError, match="has 2 components, not 3"):
        ldr.linear(4, 3)


def test_a_start_is_the_mean_block_and_a_new_component_changes_nothing():
    params = params_of(DEEP)
    parts = ldr.decomposed(params, 4)
    found = ldr.recomposed(parts, ldr.chebyshev(DEEP.depth, 4))
    kernels = [params[f"block_{i}"]["attn"]["out"]["kernel"] for i in range(4)]
    for i in range(4):
        got = found[f"block_{i}"]["attn"]["out"]["kernel"]
        np.testing.assert_allclose(got, np.mean(kernels, 0), atol=1e-6)
    assert found["head"] is params["head"]


@pytest.mark.parametrize(("stage", "new"), [(0, {0}), (1, {1}), (2, {2, 3})])
def test_a_stage_trains_its_new_components_alone(stage, new):
    trains_in = ldr.stage_of([1, 2, 4])
    base = objective.classification_loss(ViT(DEEP))
    loss = ldr.of_components(base, ldr.chebyshev(DEEP.depth, 4), trains_in)
    parts = components(4)
    state = TrainState(0, parts, None, None, None, stages.Stage(np.int32(stage)))
    step = jax.jit(jax.grad(loss, has_aux=True))
    grads, _ = step(parts, batch_of(), jax.random.key(0), state)
    moved = {
        name: max(float(np.abs(x).max()) for x in jax.tree.leaves(tree))
        for name, tree in grads.items()
    }
    assert {n for n in range(4) if moved[f"component_{n}"] > 0} == new
    assert moved["outside"] > 0
    after = state._replace(params=jax.tree.map(lambda x: x + 1, parts))
    held = stages.only(
        lambda name: trains_in.get(name, stage) == stage, state, after
    ).params
    same = {n for n in parts if np.array_equal(*(kernel(t[n]) for t in (held, parts)))}
    assert same == {f"component_{n}" for n in set(range(4)) - new}


def kernel(tree):
    return jax.tree.leaves(tree)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ldr")


@pytest.fixture(scope="module")
def network(folder):
    return trained("ldr", folder, "whole", "--config.epochs=3")


def test_the_command_trains_and_resumes_to_the_bit(network, folder, monkeypatch):
    again = stopped_and_resumed(
        "ldr", folder, "stopped", "--config.epochs=3", after=6, monkeypatch=monkeypatch
    )
    assert_same_networks(again, network)
    names = {p.name for p in network.parent.glob("network-*")}
    assert names == {"network-depth-1", "network-depth-2", "network-depth-3"}
    blocks = checkpoint.load_supernet(network).params
    first, last = (blocks[f"block_{i}"]["mlp"]["fc1"]["kernel"] for i in (0, 3))
    assert np.abs(first - last).max() > 1e-5  # the later components have moved
    small = checkpoint.load_subnet(network.with_name("network-depth-3"))
    assert small.spec.depth == 3 and small.provenance["trained"] == "ldr"


def test_a_depth_is_exported_and_the_whole_extracted(network, folder):
    out, small = folder / "exports", folder / "small"
    args = ["export", f"--workdir={network}-depth-2", f"--out={out}", "--formats=npz"]
    assert main.main(args) == 0
    args = ["extract", f"--workdir={network}", f"--out={small}", "--budget=1"]
    assert main.main(args) == 0


def test_a_bad_call_says_what_is_needed(folder, capsys):
    for more, match in (
        ("--config.rival.components=2,1", "rising, at least 1"),
        ("--config.rival.components=few", "write whole numbers"),
        ("--config.rival.depths=4", "depths other than the full 4"),
        ("--config.rival.basis=fourier", "choose one of chebyshev, linear"),
        ("--config.rival.basis=linear", "has 2 components, not 4"),
        ("--config.rival.components=1,2,3,4,5", "a last stage that never began"),
    ):
        assert main.main(arguments("ldr", folder, "bad", more)) == 1
        assert match in capsys.readouterr().err
