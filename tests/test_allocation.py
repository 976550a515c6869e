"""Lists from measured loss: greedy on the true loss, nested, within a target."""

import numpy as np
import pytest

from flax_skd.method import allocation, growth, macs
from flax_skd.method.spec import SubnetSpec

GROUPS = growth.Groups(4, 4)


def quadratic(spec, weights):
    """Losses that add up over branches, weights [L, 3], convex in what is cut."""
    full = np.array(SubnetSpec.full(spec), float)

    def losses(many):
        cut = [1 - np.array(widths) / full for widths in many]
        return [float((weights.T * c**2).sum()) for c in cut]

    return losses


def test_the_cheapest_cut_per_mac_goes_first(spec):
    weights = np.ones((3, 3))
    weights[1, 2] = 0.01  # hidden units of block 1 hardly matter
    rounds = []
    found = allocation.allocate(
        spec,
        quadratic(spec, weights),
        target=0.9 * macs.macs(spec),
        share=0.01,
        groups=GROUPS,
        after_round=rounds.append,
    )
    assert int(found.levels) == len(rounds)
    assert found.widths(1, spec).mlp_dim == (40, 30, 40)
    assert found.widths(2, spec).mlp_dim == (40, 20, 40)
    assert rounds[0].loss == 0 and rounds[1].loss == pytest.approx(rounds[0].predicted)


def test_one_cut_a_round_is_greedy_descent(spec):
    """Against a plain restatement on a loss that does not add up."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(9, 9)) ** 2
    full = np.array(SubnetSpec.full(spec), float)

    def loss_of(widths):
        cut = (1 - np.array(widths) / full).ravel()
        return float(cut @ mix @ cut + cut @ mix[0])

    found = allocation.allocate(
        spec,
        lambda many: [loss_of(w) for w in many],
        target=0.5 * macs.macs(spec),
        share=1e-9,
        groups=GROUPS,
    )
    now = SubnetSpec.full(spec)
    for level in range(1, int(found.levels) + 1):
        options = []
        for field, step in (("qk_dim", 3), ("vo_dim", 3), ("mlp_dim", 10)):
            for block in range(3):
                sizes = list(getattr(now, field))
                if sizes[block] > step:
                    sizes[block] -= step
                    new = now._replace(**{field: tuple(sizes)})
                elif sizes[block]:
                    gone = ("mlp_dim",) if field == "mlp_dim" else ("qk_dim", "vo_dim")
                    new = now
                    for name in gone:
                        sizes = list(getattr(now, name))
                        sizes[block] = 0
                        new = new._replace(**{name: tuple(sizes)})
                else:
                    continue
                saved = macs.macs(spec, now) - macs.macs(spec, new)
                options.append(((loss_of(new) - loss_of(now)) / saved, new))
        now = min(options, key=lambda option: option[0])[1]
        assert found.widths(level, spec) == now


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("kinds", [allocation.SEPARATE, allocation.TIED])
def test_the_list_is_nested_and_stops_at_the_target(spec, share, kinds):
    weights = np.random.default_rng(1).uniform(0.1, 1, (3, 3))
    found = allocation.allocate(
        spec,
        quadratic(spec, weights),
        target=0.3 * macs.macs(spec),
        share=share,
        kinds=kinds,
        groups=GROUPS,
    )
    levels = range(int(found.levels) + 1)
    counts = [macs.macs(spec, found.widths(level, spec)) for level in levels]
    assert (np.diff(counts) < 0).all()
    assert counts[-1] <= 0.3 * counts[0] < counts[-2]
    if kinds is allocation.TIED:
        np.testing.assert_array_equal(found.qk_dim, found.vo_dim)
    else:
        assert (np.asarray(found.qk_dim) != np.asarray(found.vo_dim)).any()


def test_parameters_are_a_cost_too(spec):
    found = allocation.allocate(
        spec,
        quadratic(spec, np.ones((3, 3))),
        target=0.5 * macs.param_count(spec),
        cost=macs.param_count,
        groups=GROUPS,
    )
    last = found.widths(int(found.levels), spec)
    assert macs.param_count(spec, last) <= 0.5 * macs.param_count(spec)


def test_the_record_shows_that_losses_do_not_add_up(spec):
    def losses(many):
        full = np.array(SubnetSpec.full(spec), float)
        return [float((1 - np.array(w) / full).sum() ** 2) for w in many]

    rounds = []
    allocation.allocate(
        spec,
        losses,
        target=0.6 * macs.macs(spec),
        share=0.5,
        groups=GROUPS,
        after_round=rounds.append,
    )
    assert rounds[1].loss > 1.5 * rounds[0].predicted


def test_a_target_below_the_ends_is_refused(spec):
    with pytest.raises(ValueError, match="every branch removed"):
        allocation.allocate(spec, quadratic(spec, np.ones((3, 3))), target=1)


def test_a_loss_that_is_not_finite_names_the_block(spec):
    with pytest.raises(ValueError, match="the loss of block 0 is nan"):
        allocation.allocate(
            spec, lambda many: [0.0, *[np.nan] * (len(many) - 1)], target=1
        )


@pytest.mark.parametrize("share", [0, 1.5])
def test_a_share_out_of_range_is_refused(spec, share):
    with pytest.raises(ValueError, match="share"):
        allocation.allocate(spec, lambda many: [], target=1, share=share)
