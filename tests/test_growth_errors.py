"""What cannot be grown says why, and what to do."""

import numpy as np
import pytest
from test_growth import GROUPS, most, random_importance

from flax_skd.method import growth, macs, piad
from flax_skd.method.spec import SubnetSpec


@pytest.mark.parametrize(
    "call",
    [
        lambda: growth.ends(8, 0),
        lambda: growth.ends(8, 2, lane=0),
        lambda: growth.schedule(-1, 50, model_macs=10),
        lambda: growth.schedule(0, 0, model_macs=10),
        lambda: growth.schedule(0, 5, model_macs=10, share=1.5),
    ],
)
def test_counts_out_of_range_are_refused(call):
    with pytest.raises(ValueError, match="at least 1"):
        call()


def grow_with(spec, importance=None, dropout_list=None, target=1.0):
    return growth.grow(
        dropout_list or growth.start(spec, GROUPS),
        spec,
        importance or random_importance(spec, 0),
        target_macs_saved=target,
        groups=GROUPS,
    )


def test_a_target_that_cannot_be_reached_says_what_the_most_is(spec):
    share = int(1000 * most(spec) / macs.macs(spec)) / 1000
    match = f"at most {macs.readable(most(spec))} of .* share of at most {share}"
    with pytest.raises(ValueError, match=match):
        grow_with(spec, target=most(spec) + 1)


def test_a_list_with_no_groups_left_says_so(spec):
    finished = grow_with(spec, target=most(spec))
    same = grow_with(spec, dropout_list=finished, target=most(spec))
    np.testing.assert_array_equal(same.mlp_dim, finished.mlp_dim)
    with pytest.raises(ValueError, match="no groups left to drop"):
        grow_with(spec, dropout_list=finished, target=most(spec) + 1)


@pytest.mark.parametrize("target", [float("nan"), float("inf"), -1.0])
def test_a_target_that_is_no_number_of_macs_is_refused(spec, target):
    with pytest.raises(ValueError, match="must be finite and >= 0"):
        grow_with(spec, target=target)


def test_a_list_of_another_network_is_refused(spec):
    deeper = growth.start(spec.replace(depth=4), GROUPS)
    with pytest.raises(ValueError, match=r"\(max_levels \+ 1, 3\)"):
        grow_with(spec, dropout_list=deeper)
    narrower = growth.start(spec.replace(mlp_dim=32), GROUPS)
    with pytest.raises(ValueError, match="level 0 .* not this full network"):
        grow_with(spec, dropout_list=narrower)
    overfull = growth.start(spec, GROUPS)._replace(levels=np.int32(99))
    with pytest.raises(ValueError, match="levels = 99 does not fit"):
        grow_with(spec, dropout_list=overfull)


def test_a_list_without_room_names_the_capacity(spec):
    cramped = piad.from_rows([SubnetSpec.full(spec)], spec, max_levels=2)
    with pytest.raises(ValueError, match="room for 2 more levels and grows by"):
        grow_with(spec, dropout_list=cramped, target=most(spec))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (np.nan, "importance of mlp in block 1 is not finite"),
        (np.inf, "importance of mlp in block 1 is not finite"),
        (-1.0, "importance of mlp in block 1 is -1.0 at dim 3"),
    ],
)
def test_importance_that_cannot_be_names_the_block(spec, value, match):
    importance = random_importance(spec, 0)
    importance.mlp[1, 3] = value
    with pytest.raises(ValueError, match=match):
        grow_with(spec, importance)


def test_importance_of_another_network_is_refused(spec):
    importance = random_importance(spec.replace(mlp_dim=32), 0)
    with pytest.raises(
        ValueError, match=r"shape \(3, 32\), the network 3 blocks of 40"
    ):
        grow_with(spec, importance)
