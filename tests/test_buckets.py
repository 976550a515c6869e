"""PIAD in compiled sizes: the same gradients, the same levels, few compilations."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shake
from test_piad_training import EPOCH_STEPS, GROUPS, SPEC, grower
from test_train import ONE, Halt, assert_same, batches

from flax_skd.method import compensation, growth, macs, piad, vit
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import buckets, config_files, configured_loss, objective, train

SHARES = (0.75, 0.5)


def levels_of(share=1.0):
    """A list of uneven cuts, down to a share of its rows; a branch goes in the end."""
    rows = [
        SubnetSpec((8, 8), (8, 8), (32, 32)),
        SubnetSpec((8, 6), (8, 6), (32, 28)),
        SubnetSpec((6, 6), (8, 4), (32, 16)),
        SubnetSpec((6, 4), (6, 4), (20, 16)),
        SubnetSpec((4, 0), (4, 0), (20, 8)),
        SubnetSpec((2, 0), (4, 0), (12, 0)),
    ]
    return piad.from_rows(rows[: max(1, round(share * 6))], SPEC, max_levels=8)


def repairs():
    rng = np.random.default_rng(3)

    def moment(size):
        x = rng.normal(size=(3 * size, size)) @ rng.normal(size=(size, size))
        return x.mean(0), np.cov(x.T)

    return compensation.from_moments(
        [moment(16) for _ in range(2)], [moment(32) for _ in range(2)], SPEC
    )


@pytest.mark.parametrize(
    ("start", "level", "repaired"), [(0, 1, False), (2, 3, True), (4, 5, False)]
)
def test_gradients_are_those_of_the_masked_step(start, level, repaired):
    levels = jax.tree.map(jnp.asarray, levels_of())
    within = buckets.coarse(levels_of().widths(start, SPEC), SPEC)
    extra = objective.Elastic(levels, repairs() if repaired else None, jnp.int32(level))
    params = shake(vit.init(SPEC, jax.random.key(0)))
    state = train.TrainState(0, params, None, None, None, extra)
    batch = {k: jnp.asarray(v) for k, v in next(batches()).items()}

    def masked(params, rng, batch_size, state):
        widths = levels.row(jnp.int32(level))
        return *objective.cut(params, SPEC, widths, state.extra), {}

    small = objective.classification_loss(
        ViT(SPEC, within), cut_of=objective.level_within(SPEC, within)
    )

    def compiled(params, batch, rng, state):
        return small(objective.cut_params(params, state.extra, SPEC), batch, rng, state)

    losses = [objective.classification_loss(ViT(SPEC), cut_of=masked), compiled]
    (want, _), full = jax.jit(jax.value_and_grad(losses[0], has_aux=True))(
        params, batch, jax.random.key(0), state
    )
    (got, metrics), grads = jax.jit(jax.value_and_grad(losses[1], has_aux=True))(
        params, batch, jax.random.key(0), state
    )
    assert float(metrics["level"]) == level
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for mine, plain in zip(jax.tree.leaves(grads), jax.tree.leaves(full)):
        np.testing.assert_allclose(mine, plain, rtol=1e-5, atol=1e-6)


def test_buckets_begin_at_the_first_level_within_a_share_and_stay_as_a_list_grows():
    cost = [macs.macs(SPEC, levels_of().widths(i, SPEC)) for i in range(6)]
    known = []
    for share in (0.2, 0.5, 0.7, 0.9, 1.0):
        found = buckets.starts(levels_of(share), SPEC, SHARES)
        assert found[: len(known)] == known and found[0] == 0
        for edge, first in zip(SHARES, found[1:]):
            assert cost[first] <= edge * cost[0] < cost[first - 1]
        known = found
    assert len(known) == 3


def test_compiled_widths_hold_those_of_the_level_in_quarters_and_sixteenths():
    spec = SPEC.replace(depth=4)
    widths = SubnetSpec((8, 5, 1, 0), (8, 3, 2, 0), (32, 29, 1, 0))
    found = buckets.coarse(widths, spec)
    assert found == SubnetSpec((8, 6, 2, 0), (8, 4, 2, 0), (32, 30, 2, 0))
    assert buckets.coarse(found, spec) == found
    odd = spec.replace(head_dim=3, mlp_dim=7)  # nothing to round to
    assert buckets.coarse(
        SubnetSpec((3, 2, 1, 0), (3, 1, 1, 0), (7, 5, 1, 0)), odd
    ) == (SubnetSpec((3, 2, 1, 0), (3, 1, 1, 0), (7, 5, 1, 0)))


def computations(depth):
    """Distinct computations with a product in the compiled cut of a network's blocks."""
    spec = SPEC.replace(depth=depth)
    params = vit.init(spec, jax.random.key(0))
    extra = objective.Elastic(piad.uniform(spec, steps=4), None, jnp.int32(1))
    cut = jax.jit(objective.cut_params, static_argnums=2).lower(params, extra, spec)
    hlo = re.sub(r", metadata={[^}]*}", "", cut.compile().as_text())
    bodies = [body for body in hlo.split("\n\n") if "ENTRY" not in body]
    return {re.sub(r"[.\d]* |\.\d+", " ", b) for b in bodies if " multiply(" in b}


def test_more_blocks_are_not_more_to_compile():
    few, many = computations(2), computations(8)
    assert 1 <= len(many) == len(few)


def test_every_level_is_drawn_as_often_as_any_other():
    taken = buckets.Buckets(SPEC, lambda widths: widths, shares=SHARES, seed=0)
    extra = taken.renew(objective.Elastic(levels_of()))
    found = buckets.starts(levels_of(), SPEC, SHARES)
    counts = collections.Counter()
    for step in range(6000):
        drawn, widths = taken.before_step(step, extra)
        first = max(s for s in found if s <= drawn.level)
        assert widths == buckets.coarse(levels_of().widths(first, SPEC), SPEC)
        counts[int(drawn.level)] += 1
    assert set(counts) == set(range(6))
    # 1,000 each, within four standard errors.
    assert max(abs(c - 1000) for c in counts.values()) < 4 * 1000**0.5


def test_the_seed_decides_which_levels_are_drawn():
    extra = objective.Elastic(levels_of())

    def drawn(seed):
        taken = buckets.Buckets(SPEC, lambda widths: widths, shares=SHARES, seed=seed)
        return [int(taken.before_step(t, extra)[0].level) for t in range(1, 30)]

    assert drawn(0) == drawn(0) != drawn(1)


def run(data=None, *, traces=None, **options):
    def loss_of(within):
        inner = objective.classification_loss(
            ViT(SPEC, within), cut_of=objective.level_within(SPEC, within)
        )

        def loss(*args):
            if traces is not None:
                traces.append(within)
            return inner(*args)

        return loss

    compiled = buckets.Buckets(SPEC, loss_of, shares=SHARES, seed=0)
    optimizer = train.make_optimizer(3e-3, clip_norm=1.0)
    params = shake(vit.init(SPEC, jax.random.key(0)))
    extra = objective.Elastic(growth.start(SPEC, GROUPS), None, np.int32(0))
    return train.fit(
        train.initial_state(params, optimizer, jax.random.key(1), extra=extra),
        data or batches(),
        loss=loss_of(SubnetSpec.full(SPEC)),
        optimizer=optimizer,
        steps=12,
        mesh=ONE(),
        before_epoch=compiled.after(grower([])),
        before_step=compiled.before_step,
        before_loss=compiled.before_loss,
        epoch_steps=EPOCH_STEPS,
        **options,
    )


def test_a_run_compiles_each_size_once_and_resumes_to_the_bit(tmp_path):
    traces = []
    whole = run(traces=traces)
    assert 1 < len(traces) == len(set(traces)) <= 1 + len(SHARES)

    def stop():
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(Halt(batches(), 9, stop), workdir=tmp_path, checkpoint_every=1)
    assert_same(run(workdir=tmp_path, resume=True), whole)


def test_before_loss_without_before_step_is_an_error():
    with pytest.raises(ValueError, match="give both"):
        train.fit(
            None,
            batches(),
            loss=None,
            optimizer=None,
            steps=1,
            before_loss=lambda params, extra: params,
        )


@pytest.mark.parametrize("shares", [(1.0, 0.5), (0.5, 0.75), (0.5, 0.5), (0.5, 0.0)])
def test_shares_that_do_not_fall_are_an_error(shares):
    with pytest.raises(ValueError, match="must fall"):
        buckets.Buckets(SPEC, lambda widths: widths, shares=shares, seed=0)


def test_what_the_compiled_sizes_do_not_go_with_is_named():
    config = config_files.load("configs/piad.py")
    assert configured_loss.compiled_sizes(config, SPEC) is None
    config.piad.compiled = "0.75,0.5"
    assert configured_loss.compiled_sizes(config, SPEC) is not None
    config.piad.loss = "in_place"
    with pytest.raises(ValueError, match="in_place"):
        configured_loss.compiled_sizes(config, SPEC)
    config.piad.loss, config.piad.draw = "labels", "macs"
    with pytest.raises(ValueError, match="'draw': 'macs'"):
        configured_loss.compiled_sizes(config, SPEC)
