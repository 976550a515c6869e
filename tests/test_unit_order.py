"""Orders of hidden units against brute force, ties and layers of low rank."""

import numpy as np
import pytest

from flax_skd.method import moments, unit_order
from flax_skd.method.unit_order import ORDERS, greedy


def layer(size, *, width=5, tokens=400, seed=0):
    """(covariance [M, M], w2 [M, D]) of correlated units of unlike variance."""
    rng = np.random.default_rng(seed)
    mix = np.eye(size) + rng.normal(size=(size, size)) / np.sqrt(size)
    x = rng.normal(size=(tokens, size)) @ mix * rng.uniform(0.3, 2, size)
    return np.atleast_2d(np.cov(x.T)), rng.normal(size=(size, width))


def error(covariance, w2, kept):
    """E |x W - x_kept W'|^2 with the best W', from the covariance alone."""
    gone = np.setdiff1d(np.arange(len(w2)), kept)
    best = np.zeros_like(w2)
    best[gone] = w2[gone]
    if len(kept):
        square = covariance[np.ix_(kept, kept)]
        cross = covariance[np.ix_(kept, gone)]
        best[kept] = -np.linalg.solve(square, cross @ w2[gone])
    return np.trace(best.T @ covariance @ best)


def brute_force(covariance, w2):
    """Remove, again and again, what costs least once all the rest is re-fitted."""
    kept, removed = list(range(len(w2))), []
    while kept:
        costs = [error(covariance, w2, [k for k in kept if k != unit]) for unit in kept]
        removed.append(kept.pop(int(np.argmin(costs))))
    return removed[::-1]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_greedy_removes_what_brute_force_removes(size, seed):
    covariance, w2 = layer(size, seed=seed)
    ridged = moments.regularised(covariance)
    assert greedy(covariance, w2).tolist() == brute_force(ridged, w2)


def loop(covariance, w2):
    """The recursion as it is written, float64, one unit after the other."""
    inverse, rows = np.linalg.inv(moments.regularised(covariance)), w2.copy()
    alive, removed = np.ones(len(w2), bool), []
    for _ in range(len(w2)):
        score = np.full(len(w2), np.inf)
        score[alive] = np.square(rows[alive]).sum(1) / inverse.diagonal()[alive]
        unit = int(np.argmin(score))
        column = inverse[:, unit] / inverse[unit, unit]
        rows = rows - np.outer(column, rows[unit])
        inverse = inverse - np.outer(column, inverse[unit])
        alive[unit] = False
        removed.append(unit)
    return removed[::-1]


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocked_updates_and_fresh_starts_change_nothing(block):
    # 200 units: two fresh starts (100, 50 left), blocks that do not divide them.
    covariance, w2 = layer(200, width=30, tokens=2000)
    assert greedy(covariance, w2, block=block).tolist() == loop(covariance, w2)


def test_greedy_keeps_what_predicts_the_rest():
    # Units 0 to 2 are sums of 3 and 4, which have the smaller weights themselves.
    rng = np.random.default_rng(0)
    source = rng.normal(size=(500, 2))
    x = np.concatenate([source @ rng.normal(size=(2, 3)), source], axis=1)
    w2 = np.diag([3.0, 2.0, 2.5, 1.0, 1.0])
    covariance = np.cov(x.T)
    kept = greedy(covariance, w2)[:2]
    plain = unit_order.variance_weight(covariance, w2)[:1]
    whole = np.trace(w2.T @ covariance @ w2)
    ridged = moments.regularised(covariance)
    assert error(ridged, w2, kept) < 1e-2 * whole < error(ridged, w2, plain)


# Ties, dead units, low rank


def test_the_lowest_of_equal_units_is_kept_longest():
    for order in ORDERS.values():
        assert order(np.eye(6), np.ones((6, 2))).tolist() == list(range(6))


def test_the_later_of_two_copies_goes_before_the_earlier():
    covariance, w2 = layer(20)
    twice = np.repeat(np.arange(20), 2)
    # A copy is a tie but for rounding: same variance, same weights.
    order = greedy(covariance[np.ix_(twice, twice)], w2[twice]).tolist()
    first_out = order[20:]
    assert sorted(first_out) == list(range(1, 40, 2))


@pytest.mark.parametrize("name", ORDERS)
def test_dead_units_go_first(name):
    covariance, w2 = layer(12)
    dead = [2, 5, 11]
    covariance[dead] = covariance[:, dead] = 0.0
    w2[dead] = 100.0
    w2[7] = 1e-3  # alive, and worth next to nothing
    order = ORDERS[name](covariance, w2).tolist()
    assert order[-3:] == dead
    assert sorted(order) == list(range(12))


def test_a_layer_of_dead_units_keeps_its_order():
    assert greedy(np.zeros((4, 4)), np.ones((4, 3))).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("tokens", [2, 10, 60])
def test_a_covariance_of_low_rank_is_spanned_by_what_is_kept(tokens):
    covariance, w2 = layer(100, tokens=tokens)
    order = greedy(covariance, w2)
    assert sorted(order.tolist()) == list(range(100))
    # `tokens` - 1 units span all there is, to the ridge's 1e-4 of the mean variance.
    whole = np.trace(w2.T @ covariance @ w2)
    ridged = moments.regularised(covariance)
    left = error(ridged, w2, order[: tokens - 1])
    assert left < 5e-2 * whole


def test_the_scale_of_features_and_weights_does_not_matter():
    covariance, w2 = layer(30)
    want = greedy(covariance, w2).tolist()
    for scale in (1e-12, 1e12):
        assert greedy(scale * covariance, w2).tolist() == want
        assert greedy(covariance, scale * w2).tolist() == want


# The plain orders


def test_variance_orders_by_variance_alone():
    covariance = np.diag([1.0, 3.0, 2.0])
    got = unit_order.variance(covariance, np.diag([9.0, 1.0, 5.0]))
    assert got.tolist() == [1, 2, 0]


def test_variance_weight_orders_by_the_error_of_one_cut():
    covariance, w2 = layer(9)
    alone = [covariance[i, i] * (w2[i] ** 2).sum() for i in range(9)]
    got = unit_order.variance_weight(covariance, w2)
    assert got.tolist() == np.argsort(alone)[::-1].tolist()


# Errors


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 4\) for 5 rows .* must be \(5, 5\)"):
        greedy(np.eye(4), np.ones((5, 3)))


def test_a_block_of_no_removals_is_refused():
    with pytest.raises(ValueError, match="block = 0 must be at least 1"):
        greedy(np.eye(3), np.eye(3), block=0)


def test_numbers_that_are_not_finite_are_refused():
    covariance, w2 = layer(4)
    covariance[1, 2] = np.nan
    with pytest.raises(ValueError, match="must be finite"):
        greedy(covariance, w2)


def test_a_covariance_that_is_none_is_refused():
    # As rounding leaves it where few images make features that hardly vary.
    covariance = np.eye(6)
    covariance[0, 1] = covariance[1, 0] = 1.1
    with pytest.raises(ValueError, match=r"order of hidden units.*take more images"):
        greedy(covariance, np.ones((6, 2)))
