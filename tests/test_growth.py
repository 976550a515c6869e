"""Dropout lists grow in the order of a brute-force search, within their target."""

import itertools

import numpy as np
import pytest

from flax_skd.method import growth, macs, piad
from flax_skd.method.growth import Groups, Removal
from flax_skd.method.importance import Importance
from flax_skd.method.spec import SubnetSpec, ViTSpec

GROUPS = Groups(attn=4, mlp=5)


def random_importance(spec, seed, decimals=9):
    rng = np.random.default_rng(seed)
    shapes = ((spec.depth, spec.head_dim), (spec.depth, spec.mlp_dim))
    return Importance(*(np.round(rng.exponential(size=s), decimals) for s in shapes))


def saved(spec, widths):
    return macs.macs(spec) - macs.macs(spec, widths)


def most(spec):
    return saved(spec, SubnetSpec(*((0,) * spec.depth,) * 3))


def rows_of(dropout_list, spec):
    return [dropout_list.widths(s, spec) for s in range(int(dropout_list.levels) + 1)]


def grown(spec, importance, share, groups=GROUPS):
    return growth.grow(
        growth.start(spec, groups),
        spec,
        importance,
        target_macs_saved=share * most(spec),
        groups=groups,
    )


# The worked example of the method and the hull itself


def steps_of(lost, each=1):
    return [Removal(0, "mlp", 0, each, float(x)) for x in lost]


def test_the_worked_example_has_the_slopes_of_the_paper():
    # Eight groups of 64 dims, from the end 2, 3, 4, 5, 9, .1, 8, 10.
    spec = ViTSpec(16, 4, 24, 1, 2, 40, 5, head_dim=64)
    groups = np.array([10, 8, 0.1, 9, 5, 4, 3, 2])
    importance = Importance(np.repeat(groups / 8, 8)[None], np.full((1, 40), 1e9))
    found = growth.removals(SubnetSpec.full(spec), spec, importance)
    attention = [r for r in found if r.branch == "attn"]
    group_macs = saved(spec, SubnetSpec((56,), (56,), (40,)))
    slopes = [r.slope * group_macs for r in attention]
    np.testing.assert_allclose(slopes, [2, 3, 4, 4.7, 8, 10])
    # 9, 5 and the .1 behind them go at once.
    assert [r.width for r in attention] == [56, 48, 40, 16, 8, 0]
    assert attention[3].macs_saved == 3 * group_macs


def brute_force_hull(points):
    """Points of the lower hull: all that lie above no line between two others."""
    kept = []
    for i, (x, y) in enumerate(points):
        below = any(
            (y - y0) * (x1 - x0) > (y1 - y0) * (x - x0)
            for (x0, y0), (x1, y1) in itertools.product(points[:i], points[i + 1 :])
        )
        if not below:
            kept.append((x, y))
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_removals_are_the_segments_of_a_brute_force_lower_hull(seed):
    rng = np.random.default_rng(seed)
    # Whole numbers: sums and cross products are exact, ties are frequent.
    cost, lost = rng.integers(1, 9, 12), rng.integers(0, 9, 12)
    steps = [Removal(0, "mlp", 0, int(c), float(y)) for c, y in zip(cost, lost)]
    points = [(0, 0.0), *zip(cost.cumsum().tolist(), lost.cumsum().tolist())]
    hull = growth.lower_hull(steps)
    ends = np.cumsum([(0, 0), *((r.macs_saved, r.lost) for r in hull)], axis=0)
    assert [tuple(p) for p in ends] == brute_force_hull(points)
    slopes = [r.slope for r in hull]
    assert slopes == sorted(slopes)


def test_groups_of_equal_worth_are_dropped_one_by_one():
    assert len(growth.lower_hull(steps_of([1, 1, 1, 1]))) == 4
    assert len(growth.lower_hull(steps_of([0, 0, 0]))) == 3


# Units


@pytest.mark.parametrize("size", [1, 3, 8, 10, 40, 64, 197])
@pytest.mark.parametrize("groups", [1, 3, 8, 32])
def test_groups_are_as_even_as_can_be(size, groups):
    ends = growth.ends(size, groups)
    sizes = np.diff(ends)
    assert ends[0] == 0 and ends[-1] == size
    assert len(sizes) == min(size, groups)
    assert sizes.min() >= 1 and sizes.max() - sizes.min() <= 1


def test_a_lane_rounds_the_size_of_groups_up():
    assert growth.ends(768, 32, lane=128) == (0, 128, 256, 384, 512, 640, 768)
    assert growth.ends(20, 4, lane=8) == (0, 8, 16, 20)
    assert growth.ends(4, 4, lane=8) == (0, 4)


def test_every_published_size_has_forty_units_a_block():
    for name in ("Ti/16", "S/16", "B/16"):
        assert growth.capacity(ViTSpec.named(name)) == 40 * 12
        assert growth.start(ViTSpec.named(name)).qk_dim.shape == (481, 12)


# Lists


def every_segment(spec, importance):
    """(slope, block, branch, width) of all hull segments, by brute force, sorted."""
    full, out = SubnetSpec.full(spec), []
    for block in range(spec.depth):
        for kind, fields, scores in (
            (0, ("qk_dim", "vo_dim"), importance.attn[block]),
            (1, ("mlp_dim",), importance.mlp[block]),
        ):
            points = []
            for width in growth.ends(len(scores), (GROUPS.attn, GROUPS.mlp)[kind]):
                cut = {}
                for name in fields:
                    field = list(getattr(full, name))
                    field[block] = width
                    cut[name] = tuple(field)
                widths = full._replace(**cut)
                gain = saved(spec, widths)
                points.append((gain, scores[width:].sum(), width))
            points.sort()
            hull = brute_force_hull([(x, y) for x, y, _ in points])
            width_at = {x: width for x, _, width in points}
            for (x0, y0), (x1, y1) in itertools.pairwise(hull):
                out.append(((y1 - y0) / (x1 - x0), block, kind, width_at[x1]))
    return sorted(out)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_is_that_of_all_hull_segments_sorted(spec, seed):
    importance = random_importance(spec, seed)
    found = growth.removals(
        SubnetSpec.full(spec),
        spec,
        importance,
        groups=GROUPS,
    )
    have = [(r.block, ("attn", "mlp").index(r.branch), r.width) for r in found]
    want = every_segment(spec, importance)
    assert have == [w[1:] for w in want]
    np.testing.assert_allclose([r.slope for r in found], [w[0] for w in want])


@pytest.mark.parametrize(("seed", "share"), [*enumerate((0.05, 0.3, 0.6, 0.875, 1))])
def test_lists_are_nested_and_meet_their_target(spec, seed, share):
    importance = random_importance(spec, seed)
    target = share * most(spec)
    dropout_list = grown(spec, importance, share)
    rows = rows_of(dropout_list, spec)
    piad.from_rows(rows, spec)  # refuses a row that grows
    gains = [saved(spec, row) for row in rows]
    assert (np.diff(gains) > 0).all()
    assert gains[-1] <= target
    left = growth.removals(rows[-1], spec, importance, groups=GROUPS)
    if share < 1:
        assert gains[-1] + left[0].macs_saved > target
    else:
        assert left == [] and rows[-1].mlp_dim == (0,) * spec.depth


def test_macs_of_removals_are_exact_differences(spec):
    widths = SubnetSpec.full(spec)
    importance = random_importance(spec, 4)
    for removal in growth.removals(widths, spec, importance, groups=GROUPS):
        before, widths = widths, growth.drop(widths, removal)
        gain = macs.macs(spec, before) - macs.macs(spec, widths)
        assert removal.macs_saved == gain
    assert saved(spec, widths) == most(spec)


@pytest.mark.parametrize("decimals", [0, 1, 9])
@pytest.mark.parametrize("seed", range(4))
def test_growing_in_two_steps_is_growing_in_one(spec, seed, decimals):
    importance = random_importance(spec, seed, decimals)
    at_once = grown(spec, importance, 0.8)
    stepwise = growth.start(spec, GROUPS)
    for share in (0.1, 0.1, 0.45, 0.8):
        before = rows_of(stepwise, spec)
        stepwise = growth.grow(
            stepwise,
            spec,
            importance,
            target_macs_saved=share * most(spec),
            groups=GROUPS,
        )
        assert rows_of(stepwise, spec)[: len(before)] == before
    for one, many in zip(at_once, stepwise, strict=True):
        np.testing.assert_array_equal(one, many)


def test_tables_keep_their_shape_and_repeat_the_last_row(spec):
    small = growth.start(spec, GROUPS)
    large = grown(spec, random_importance(spec, 0), 0.5)
    assert [t.shape for t in large] == [t.shape for t in small]
    assert [t.dtype for t in large] == [t.dtype for t in small]
    levels = int(large.levels)
    assert 0 < levels < len(large.mlp_dim) - 1
    for table in large[:3]:
        assert (table[levels:] == table[levels]).all()
    assert int(small.levels) == 0 and (small.mlp_dim == spec.mlp_dim).all()


def test_ties_go_by_block_and_attention_before_the_mlp(spec):
    cost = macs.prices(spec)
    per_dim = cost.qk + cost.vo
    importance = Importance(
        np.full((spec.depth, spec.head_dim), float(per_dim)),
        np.full((spec.depth, spec.mlp_dim), float(cost.mlp)),
    )
    found = growth.removals(SubnetSpec.full(spec), spec, importance, groups=GROUPS)
    assert {r.slope for r in found} == {1.0}
    want = (["attn"] * 4 + ["mlp"] * 5) * spec.depth
    assert [r.branch for r in found] == want
    assert [r.block for r in found] == sorted(r.block for r in found)


def test_widths_between_group_ends_and_untied_ones_are_cut_to_the_next_end(spec):
    widths = SubnetSpec((7, 12, 5), (12, 4, 5), (33, 40, 1))
    dropout_list = piad.from_rows([SubnetSpec.full(spec), widths], spec, max_levels=40)
    out = growth.grow(
        dropout_list,
        spec,
        random_importance(spec, 2),
        target_macs_saved=most(spec),
        groups=GROUPS,
    )
    rows = rows_of(out, spec)
    assert rows[1] == widths
    assert rows[-1] == SubnetSpec(*((0,) * 3,) * 3)
    gains = [saved(spec, row) for row in rows]
    assert (np.diff(gains) > 0).all()
    ends = {0, 3, 6, 9, 12}
    for row in rows[2:]:
        changed = set(row.qk_dim) - set(widths.qk_dim)
        assert changed <= ends and set(row.vo_dim) - {12, 4, 5} <= ends


def test_the_schedule_reaches_the_papers_share_of_the_whole_model():
    count = macs.macs(ViTSpec.named("B/16"))
    targets = [growth.schedule(e, 50, model_macs=count) for e in range(52)]
    np.testing.assert_allclose(np.diff(targets[:50]), 0.875 * count / 50)
    assert targets[0] == pytest.approx(0.875 * count / 50)
    assert targets[49] == targets[51] == pytest.approx(0.875 * count)


def test_progressive_epochs_are_fifty_or_a_third_of_a_short_run():
    counts = [growth.progressive_epochs(n) for n in (300, 150, 30, 1)]
    assert counts == [50, 50, 10, pytest.approx(1 / 3)]
