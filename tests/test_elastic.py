"""What the ablation drops instead of levels: how much, which, and in which order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_skd.method import growth, macs, piad
from flax_skd.method.growth import Groups
from flax_skd.method.vit import ViT
from flax_skd.run import configured_loss, elastic, objective, train
from flax_skd.run.config_files import load
from flax_skd.run.objective import Elastic

GROUPS = Groups(attn=4, mlp=8)


@pytest.fixture(scope="module")
def levels(spec):
    """Attention of block 0 goes first, then the MLP of block 2, in unequal steps."""
    full = piad.uniform(spec, steps=1).widths(0, spec)
    first = full._replace(qk_dim=(6, 12, 12), vo_dim=(6, 12, 12))
    second = first._replace(mlp_dim=(40, 40, 10))
    third = second._replace(mlp_dim=(20, 40, 0))
    rows = [full, first, second, third]
    return jax.tree.map(jnp.asarray, piad.from_rows(rows, spec, max_levels=6))


@pytest.fixture(scope="module")
def state(params, levels):
    return train.TrainState(jnp.int32(0), params, None, None, None, Elastic(levels))


def kept(masks):
    """(attention units [L, 4], MLP units [L, 8]) of masks, each 1 or 0."""
    attn = np.stack([np.asarray(m.qk) for m in masks]).reshape(3, 4, 3)
    mlp = np.stack([np.asarray(m.mlp) for m in masks]).reshape(3, 8, 5)
    for units in (attn, mlp):
        assert (units == units[..., :1]).all(), "a unit is dropped whole"
    return attn[..., 0], mlp[..., 0]


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_random_units_save_what_the_level_saves(spec, params, state, level):
    cut_of = elastic.random_units(
        spec, groups=GROUPS, draw=lambda rng, levels: jnp.int32(level)
    )
    cost, full = macs.prices(spec), macs.macs(spec)
    target = full - macs.macs(spec, state.extra.dropout_list.widths(level, spec))
    largest = max((cost.qk + cost.vo) * 3, cost.mlp * 5)
    for seed in range(5):
        masks, metrics = jax.jit(lambda rng: cut_of(params, rng, 12, state)[1:])(
            jax.random.key(seed)
        )
        attn, mlp = kept(masks)
        saved = (1 - attn).sum() * (cost.qk + cost.vo) * 3
        saved += (1 - mlp).sum() * cost.mlp * 5
        assert target - largest < saved <= target
        np.testing.assert_allclose(metrics["macs_share"], 1 - saved / full, atol=1e-6)
        assert float(metrics["levels"]) == 3


def test_a_branch_without_units_is_skipped_and_every_unit_is_dropped_sometimes(
    spec, params, state
):
    deep = jax.tree.map(jnp.asarray, piad.uniform(spec, steps=4))
    state = state._replace(extra=Elastic(deep))
    cut_of = elastic.random_units(spec, groups=Groups(attn=2, mlp=2))
    rngs = jax.random.split(jax.random.key(0), 300)
    masks, _ = jax.jit(jax.vmap(lambda rng: cut_of(params, rng, 12, state)[1:]))(rngs)
    for m in masks:
        for dims, gate in ((m.qk, m.attn_gate), (m.mlp, m.mlp_gate)):
            np.testing.assert_array_equal(gate, np.asarray(dims).any(-1))
            assert 0 < np.asarray(gate).mean() < 1
            share = np.asarray(dims).mean(0)
            assert (0 < share).all() and (share < 1).all()


def test_unimportant_units_are_those_the_list_drops_first(spec, levels):
    found = elastic.unimportant_first(levels, spec, GROUPS)
    attn, mlp = np.exp(-np.asarray(found["attn"])), np.exp(-np.asarray(found["mlp"]))
    np.testing.assert_allclose(attn, [[4, 4, 1, 1], [4] * 4, [4] * 4], rtol=1e-6)
    want = [[4] * 4 + [3] * 4, [4] * 8, [3, 3, 2, 2, 2, 2, 2, 2]]
    np.testing.assert_allclose(mlp, want, rtol=1e-6)


def test_weighted_units_are_dropped_in_proportion_to_their_weight(spec, levels, params):
    """One unit is dropped; who it is follows the weights."""
    cost = macs.prices(spec)

    def one_mlp_unit(rng, dropout_list):
        return jnp.int32(1)

    full = piad.uniform(spec, steps=1).widths(0, spec)
    one = full._replace(mlp_dim=(40, 40, 35))  # exactly one unit of the MLP
    later = one._replace(mlp_dim=(5, 40, 35))
    rows = [full, one, later, later._replace(mlp_dim=(5, 5, 5))]
    dropout_list = jax.tree.map(jnp.asarray, piad.from_rows(rows, spec))
    extra = Elastic(dropout_list)
    state = train.TrainState(jnp.int32(0), params, None, None, None, extra)
    assert (cost.qk + cost.vo) * 3 > cost.mlp * 5, "attention units do not fit"
    cut_of = elastic.random_units(
        spec, groups=GROUPS, weights=elastic.unimportant_first, draw=one_mlp_unit
    )
    rngs = jax.random.split(jax.random.key(0), 4000)
    masks = jax.jit(jax.vmap(lambda rng: cut_of(params, rng, 12, state)[1]))(rngs)
    dropped = 1 - np.stack([np.asarray(m.mlp) for m in masks], 1)[..., ::5]
    assert set(dropped.sum((1, 2))) <= {0.0, 1.0}  # an attention unit first: nothing
    share = dropped.sum(0) / dropped.sum()
    weight = np.exp(
        np.asarray(elastic.unimportant_first(dropout_list, spec, GROUPS)["mlp"])
    )
    np.testing.assert_allclose(share, weight / weight.sum(), atol=0.03)


def test_branches_are_skipped_at_the_rate(spec, params, state):
    cut_of = elastic.random_branches(spec, rate=0.3)
    rngs = jax.random.split(jax.random.key(0), 2000)
    masks, metrics = jax.vmap(lambda rng: cut_of(params, rng, 12, state)[1:])(rngs)
    gates = np.stack([[m.attn_gate, m.mlp_gate] for m in masks])
    assert set(np.unique(gates)) == {0.0, 1.0}
    np.testing.assert_allclose(gates.mean(-1), 0.7, atol=0.05)
    cost, full = macs.prices(spec), macs.macs(spec)
    price = np.array([(cost.qk + cost.vo) * spec.head_dim, cost.mlp * spec.mlp_dim])
    saved = ((1 - gates) * price[None, :, None]).sum((0, 1))
    np.testing.assert_allclose(metrics["macs_share"], 1 - saved / full, atol=1e-6)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_out_of_range_is_refused(spec, rate):
    with pytest.raises(ValueError, match="branch_rate"):
        elastic.random_branches(spec, rate=rate)


@pytest.mark.parametrize("name", ["none", *elastic.MASKS])
def test_every_variant_trains_by_the_one_loss(spec, params, batch, state, name):
    cut_of = objective.whole
    if name != "none":
        cut_of = elastic.MASKS[name](
            spec, groups=GROUPS, draw=piad.sample_level, rate=0.5
        )
    loss = objective.classification_loss(ViT(spec), cut_of=cut_of)
    gradient = jax.grad(lambda p: loss(p, batch, jax.random.key(3), state)[0])
    grads = jax.jit(gradient)(params)
    norms = [float(jnp.abs(x).max()) for x in jax.tree.leaves(grads)]
    assert np.isfinite(norms).all() and max(norms) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masks": "holes"}, "choose one of levels, none, random_units"),
        ({"masks": "branches", "loss": "sandwich"}, "not 'per_step' and 'sandwich'"),
        ({"masks": "none", "sampling": "per_example"}, "sampling 'per_step'"),
        ({"draw": "dice"}, "choose one of uniform, macs"),
        ({"masks": "none", "draw": "macs"}, "'none' draw no level"),
        ({"masks": "branches", "draw": "macs"}, "'branches' draw no level"),
    ],
)
def test_masks_that_do_not_go_together_are_refused(spec, change, message):
    options = load("configs/piad.py").piad
    options.update(change)
    with pytest.raises(ValueError, match=message):
        configured_loss._piad_cut(options, spec, growth.PAPER_GROUPS)
