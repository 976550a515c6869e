"""UVC: the budget is met by what is extracted, duals are multipliers, masks are cuts."""

import jax
import jax.numpy as jnp
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
from flax_skd.method import macs, subnet
from flax_skd.method.vit import ViT
from flax_skd.rivals import structure, uvc
from flax_skd.run import main
from flax_skd.run.train import TrainState

pytestmark = pytest.mark.usefixtures("one_device")
RATES = structure.Rates(cut=0.2, shrink=0.1, group_dual=0.005, budget_dual=0.05)


def as_arrays(found):
    return jax.tree.map(jnp.asarray, found)


def wild():
    """A structure in the middle of a search, nothing alike."""
    rng = np.random.default_rng(0)
    pair = (DEEP.depth, 2)
    return structure.start(DEEP)._replace(
        cut=rng.uniform(0.1, 0.6, pair).astype(np.float32),
        gates=rng.normal(2, 1, pair).astype(np.float32),
        group_dual=rng.uniform(0, 0.2, pair).astype(np.float32),
        budget_dual=np.float32(0.7),
    )


def plain_norms(params):
    found = {"qk": [], "vo": [], "mlp": []}
    for i in range(DEEP.depth):
        b = jax.tree.map(lambda x: np.asarray(x, np.float64), params[f"block_{i}"])
        q, k, v = (b["attn"][n]["kernel"] for n in ("query", "key", "value"))
        o, w1, w2 = (
            b["attn"]["out"]["kernel"],
            b["mlp"]["fc1"]["kernel"],
            b["mlp"]["fc2"]["kernel"],
        )
        dims, units = range(DEEP.head_dim), range(DEEP.mlp_dim)
        found["qk"].append(
            [(q[..., j] ** 2).sum() + (k[..., j] ** 2).sum() for j in dims]
        )
        found["vo"].append(
            [(v[..., j] ** 2).sum() + (o[:, j] ** 2).sum() for j in dims]
        )
        found["mlp"].append([(w1[:, m] ** 2).sum() + (w2[m] ** 2).sum() for m in units])
    return {k: np.array(v) / np.sum(v, -1, keepdims=True) for k, v in found.items()}


def plain_bottom(row, cut):
    """(sum of the smallest, n times the next) of one block, by sorting."""
    n, rising = len(row), np.sort(row)
    count = int(np.ceil(np.float32(cut) * n))
    return rising[:count].sum(), n * rising[min(count, n - 1)]


def plain_search(found, params, budget):
    """One step on cuts and duals, block by block."""
    norms, full = plain_norms(params), macs.macs(DEEP)
    cost = macs.prices(DEEP)
    price = (
        (cost.qk + cost.vo) * DEEP.head_dim / full,
        cost.mlp * DEEP.mlp_dim / full,
    )
    kinds, sizes = (("qk", "vo"), ("mlp",)), (DEEP.head_dim, DEEP.mlp_dim)
    cut, y = np.array(found.cut, np.float64), np.array(found.group_dual, np.float64)
    share = cost.embed_and_head / full
    for i in range(DEEP.depth):
        for j in range(2):
            gate = 1 / (1 + np.exp(-float(found.gates[i, j])))
            rows = [norms[k][i] for k in kinds[j]]
            slope = np.mean([plain_bottom(r, found.cut[i, j])[1] for r in rows])
            step = y[i, j] * slope - float(found.budget_dual) * price[j] * gate
            cut[i, j] = np.clip(cut[i, j] - 0.2 * step, 0, 1 - 1 / sizes[j])
            share += gate * price[j] * (1 - cut[i, j])
            y[i, j] += 0.005 * np.mean([plain_bottom(r, cut[i, j])[0] for r in rows])
    return cut, y, max(0, float(found.budget_dual) + 0.05 * (share - budget))


def searching(budget):
    return jax.jit(
        lambda found, params: structure.searched(
            found, params, DEEP, budget=budget, rates=RATES
        )
    )


def test_a_step_of_the_search_is_descent_and_ascent_on_the_lagrangian():
    before, params = wild(), params_of(DEEP)
    after, taken = searching(0.5)(as_arrays(before), params)
    cut, y, z = plain_search(before, params, 0.5)
    np.testing.assert_allclose(after.cut, cut, atol=1e-5)
    np.testing.assert_allclose(after.group_dual, y, atol=1e-6)
    assert float(after.budget_dual) == pytest.approx(z, rel=1e-5)
    for kind, column in (("qk", 0), ("vo", 0), ("mlp", 1)):
        count = np.ceil(np.asarray(after.cut)[:, column] * taken[kind].shape[1])
        np.testing.assert_array_equal(taken[kind].sum(1), count)


def searched(budget, *, steps=240):
    step, params = searching(budget), params_of(DEEP)
    shrink = jax.jit(lambda p, f, t: structure.shrunk(p, f, t, rate=RATES.shrink))
    found, seen = as_arrays(structure.start(DEEP)), []
    for _ in range(steps):
        found, taken = step(found, params)
        params = shrink(params, found, taken)
        seen.append(jax.device_get((found.group_dual, found.budget_dual)))
    return jax.device_get(found), jax.device_get(params), seen


def test_duals_are_not_negative_and_complementary():
    found, params, seen = searched(0.5)
    assert all((y >= 0).all() and z >= 0 for y, z in seen)
    share = float(structure.expected_share(DEEP, found.cut, found.gates))
    assert found.budget_dual > 0 and share == pytest.approx(0.5, abs=0.08)
    # What is cut has been shrunk to nothing wherever its dual is positive.
    norms = jax.device_get(structure.group_norms(params, DEEP))
    for kind, column in (("qk", 0), ("vo", 0), ("mlp", 1)):
        for i in range(DEEP.depth):
            left, _ = plain_bottom(norms[kind][i], found.cut[i, column])
            assert found.group_dual[i, column] * left < 5e-3
    loose, _, seen = searched(1.0, steps=20)  # a budget that binds nothing
    assert loose.budget_dual == 0 and not loose.cut.any()
    assert max(z for _, z in seen) == 0


def test_shrinking_is_the_proximal_step():
    found, params = as_arrays(wild()), params_of(DEEP)
    taken = {
        k: jnp.asarray(np.random.default_rng(1).random(m.shape) < 0.4)
        for k, m in found.masks.items()
    }
    out = structure.shrunk(params, found, taken, rate=0.3)
    for i in range(DEEP.depth):
        by = 1 / (1 + 2 * 0.3 * np.asarray(found.group_dual)[i])
        w2 = params[f"block_{i}"]["mlp"]["fc2"]["kernel"]
        units = np.where(taken["mlp"][i], by[1], 1.0)
        got = out[f"block_{i}"]["mlp"]["fc2"]["kernel"]
        np.testing.assert_allclose(got, w2 * units[:, None], atol=1e-6)
        v = params[f"block_{i}"]["attn"]["out"]["kernel"]
        dims = np.where(taken["vo"][i], by[0], 1.0)
        got = out[f"block_{i}"]["attn"]["out"]["kernel"]
        np.testing.assert_allclose(got, v * dims[None, :, None], atol=1e-6)


@pytest.mark.parametrize("budget", [0.3, 0.5, 0.8])
def test_the_budget_is_met_by_what_is_extracted(budget):
    found = wild()
    found.gates[1, 1] = -1.0  # a branch that goes
    widths = structure.widths_within(found, DEEP, budget)
    assert widths.mlp_dim[1] == 0 and min(widths.mlp_dim[2:]) > 0
    params = params_of(DEEP)
    norms = plain_norms(params)
    # As the program has them: jit sorts the keys of a dict.
    jitted = jax.jit(structure.group_norms, static_argnums=1)(params, DEEP)
    done = structure.fixed(found, widths, jitted)
    assert done.masks["mlp"].sum(-1).tolist() == list(widths.mlp_dim)
    assert done.masks["qk"].sum(-1).tolist() == list(widths.qk_dim)
    small = subnet.extract(structure.kept_first(params, done.masks), widths)
    share = macs.macs(DEEP, subnet.widths_of(small, DEEP)) / macs.macs(DEEP)
    assert budget - 0.1 < share <= budget
    kept = np.flatnonzero(done.masks["mlp"][0])
    assert set(kept) == set(np.argsort(-norms["mlp"][0])[: widths.mlp_dim[0]])
    images = batch_of()["image"]
    state = TrainState(0, params, None, None, None, as_arrays(done))
    _, masks, _ = uvc.gated(DEEP, temperature=0.5)(params, jax.random.key(0), 6, state)
    masked = jax.jit(ViT(DEEP).apply)({"params": params}, images, masks)
    alone = jax.jit(ViT(DEEP, widths).apply)({"params": small}, images)
    np.testing.assert_allclose(masked, alone, atol=1e-5)


def test_a_budget_below_one_dim_a_branch_is_an_error():
    with pytest.raises(ValueError, match="less than one dim a branch"):
        structure.widths_within(wild(), DEEP, 0.01)


def test_gates_are_hard_and_open_as_often_as_their_probability():
    gates = jnp.float32([[0.0, 2.0]] * 500)
    drawn = uvc.sampled_gates(jax.random.key(0), gates, temperature=0.5)
    assert set(np.unique(drawn)) <= {0.0, 1.0}
    # 500 draws: within four standard errors.
    assert np.abs(drawn.mean(0) - np.array([0.5, 0.8808])).max() < 4 * 0.5 / 500**0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("uvc")


MORE = ("--config.rival.search_epochs=1", "--config.rival.gate_every=2")


@pytest.fixture(scope="module")
def network(folder):
    return trained("uvc", folder, "whole", *MORE)


def test_the_command_trains_and_resumes_to_the_bit(network, folder, monkeypatch):
    again = stopped_and_resumed(
        "uvc", folder, "stopped", *MORE, after=3, monkeypatch=monkeypatch
    )
    assert_same_networks(again, network)
    found = checkpoint.load_supernet(network)
    assert int(found.dropout_list.levels) == 1
    share = macs.macs(DEEP, found.dropout_list.widths(1, DEEP)) / macs.macs(DEEP)
    assert 0.42 < share <= 0.5


def test_the_structure_is_extracted_by_its_budget(network, folder):
    small = folder / "small"
    args = ["extract", f"--workdir={network}", f"--out={small}", "--budget=0.5"]
    assert main.main(args) == 0
    found = checkpoint.load_subnet(small)
    assert found.widths == checkpoint.load_supernet(network).dropout_list.widths(
        1, DEEP
    )


def test_a_bad_call_says_what_is_needed(folder, capsys):
    for more, match in (
        ("--config.rival.budget=1.5", "must lie in (0, 1)"),
        ("--config.rival.search_epochs=2", "must lie in (0, 2.0)"),
        ("--config.rival.gate_every=0", "at least 1"),
        ("--config.rival.search_epochs=1.99", "a last stage that never began"),
    ):
        assert main.main(arguments("uvc", folder, "bad", MORE[0], more)) == 1
        assert match in capsys.readouterr().err
