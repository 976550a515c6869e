"""Lists are measured on cuts as they are extracted: repaired."""

import jax
import numpy as np
import pytest
from conftest import random_repairs

from flax_skd.method import (
    allocation,
    compensation,
    costs,
    growth,
    importance,
    macs,
    subnet,
)
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import lists

GROUPS = growth.Groups(attn=4, mlp=8)


@pytest.fixture(scope="module")
def repairs(spec):
    return random_repairs(spec)


def test_a_stage_of_growth_measures_the_smallest_level_as_it_is_repaired(
    spec, params, batch, repairs
):
    measured = {"cost": costs.top_logit, "sensitivity": importance.kl}

    def grown(levels, stage, repairs):
        return lists.grown(
            *(levels, stage),
            stages=4,
            model=ViT(spec),
            params=params,
            batches=[batch],
            repairs=repairs,
            share=0.7,
            groups=GROUPS,
            **measured,
        )

    first = grown(growth.start(spec, GROUPS), 0, repairs)
    widths = first.widths(int(first.levels), spec)
    assert widths != SubnetSpec.full(spec)
    whole = compensation.repaired(params, spec, repairs, widths)
    found = importance.measure(ViT(spec), whole, [batch], widths, **measured)
    target = growth.schedule(1, 4, model_macs=macs.macs(spec), share=0.7)
    want = growth.grow(first, spec, found, target_macs_saved=target, groups=GROUPS)
    second = grown(first, 1, repairs)
    jax.tree.map(np.testing.assert_array_equal, second, want)
    bare = jax.tree.leaves(grown(first, 1, None))
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(second), bare))


def test_a_list_by_loss_measures_the_divergence_of_repaired_cuts(
    spec, params, batch, repairs, monkeypatch
):
    cuts = [SubnetSpec.uniform(spec, 6, 6, 20), SubnetSpec.uniform(spec, 12, 9, 31)]
    asked = {}

    def allocate(spec, losses, **options):
        asked.update(options)
        return losses(cuts)

    monkeypatch.setattr(allocation, "allocate", allocate)
    found = lists.by_loss(
        *(ViT(spec), params, [batch]),
        target=123.0,
        repairs=repairs,
        share=0.5,
        kinds=allocation.TIED,
        groups=GROUPS,
        cost=macs.param_count,
    )

    def log_probabilities(params, widths):
        small = ViT(spec, widths).apply(
            {"params": subnet.extract(params, widths)}, batch["image"]
        )
        return np.asarray(jax.nn.log_softmax(small), np.float64)

    full = log_probabilities(params, SubnetSpec.full(spec))
    for kl, widths in zip(found, cuts, strict=True):
        whole = compensation.repaired(params, spec, repairs, widths)
        cut = log_probabilities(whole, widths)
        want = (np.exp(full) * (full - cut)).sum(-1).mean()
        assert kl == pytest.approx(want, rel=1e-3) and want > 1e-3
    given = asked["target"], asked["share"], asked["kinds"], asked["groups"]
    assert given == (123.0, 0.5, allocation.TIED, GROUPS)
    assert asked["cost"] is macs.param_count
