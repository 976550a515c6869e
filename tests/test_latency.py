"""Budgets in time: the additive model, its fit, and what is refused. No timings here."""

import itertools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls
from sklearn.isotonic import isotonic_regression

from flax_skd.io import checkpoint
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import allocation, latency, latency_design, piad, subnet, vit
from flax_skd.method.latency import Latency, Predicted
from flax_skd.method.spec import SubnetSpec
from flax_skd.run import (
    commands,
    config_files,
    profile_report,
    profiling,
    time_budget,
    timing,
)
from flax_skd.run.time_budget import Profile

TRUE = Latency(3e-3, 5e-4, 2e-5, 4e-5, 3e-4, 1e-5)
RAGGED = SubnetSpec((12, 0, 3), (10, 0, 4), (40, 7, 0))


@pytest.fixture
def levels(spec):
    return piad.uniform(spec, steps=8)


@pytest.fixture
def profile(spec):
    """Batches of 1 and of 4 that take twice as long."""
    models = {1: TRUE, 4: Latency(*(2 * x for x in TRUE))}
    lanes = {"attn_lane": 1, "mlp_lane": 1}
    name = time_budget.device_name()
    return Profile(name, "float32", spec, lanes, models, {}, [])


def designed(spec):
    return list(latency_design.design(spec, shares=(0.25, 0.5)).values())


def test_seconds_are_a_sum_over_the_branches_that_are_there():
    want = TRUE.fixed
    for qk, vo, mlp in zip(*RAGGED):
        if vo:
            want += TRUE.attn + TRUE.qk * qk + TRUE.vo * vo
        if mlp:
            want += TRUE.mlp + TRUE.unit * mlp
    np.testing.assert_allclose(latency.seconds(TRUE, RAGGED), want, rtol=1e-12)


def test_the_fit_finds_the_coefficients_that_made_the_times(spec):
    networks = designed(spec)
    times = [latency.seconds(TRUE, w) for w in networks]
    np.testing.assert_allclose(latency.fit(networks, times), TRUE, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_the_fit_is_the_non_negative_least_squares_of_relative_errors(spec, seed):
    """Noise so large that plain least squares would have negative coefficients."""
    rng = np.random.default_rng(seed)
    networks = designed(spec)
    times = [latency.seconds(TRUE, w) * rng.uniform(0.5, 1.5) for w in networks]
    found = np.array(latency.fit(networks, times))
    rows = np.stack([latency.features(w) for w in networks]) / np.array(times)[:, None]
    least = 1e-3 * np.array([0, 0, 1, 1, 0, 1]) / rows.max(0)
    want = least + nnls(rows, 1 - rows @ least)[0]
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-12)
    assert (found >= 0).all()


def test_every_cut_saves_time_even_where_none_was_measured(spec):
    """Otherwise a list by latency divides by zero."""
    networks = designed(spec)
    flat = [1e-3 * (1 + 0.1 * sum(w > 0 for w in n.mlp_dim)) for n in networks]
    found = latency.fit(networks, flat)
    assert min(found.qk, found.vo, found.unit) > 0
    whole = latency.seconds(found, SubnetSpec.full(spec))
    assert found.qk * spec.head_dim * spec.depth < 2e-3 * whole


def test_networks_that_leave_a_coefficient_open_are_refused(spec):
    uniform = [SubnetSpec.uniform(spec, w, w, 3 * w) for w in (2, 4, 6, 8, 10, 12)]
    with pytest.raises(ValueError, match="do not tell .* apart: measure each width"):
        latency.fit(uniform, [1.0] * len(uniform))
    with pytest.raises(ValueError, match="one positive number a network"):
        latency.fit(designed(spec), [0.0] * len(designed(spec)))


def test_anchors_are_the_isotonic_regression_of_what_was_measured():
    rng = np.random.default_rng(0)
    sums = rng.permutation(np.linspace(1.0, 3.0, 30))
    measured = 1.2 * sums + rng.normal(0, 0.3, 30)
    points = latency.anchors(zip(sums, measured))
    x, y = np.transpose(points)
    order = np.argsort(sums)
    np.testing.assert_array_equal(x, sums[order])
    np.testing.assert_allclose(y, isotonic_regression(measured[order]), atol=0.01)
    assert (np.diff(y) > 0).all()  # a cut always saves something


def test_a_prediction_goes_through_the_anchors_and_keeps_the_ratio_beyond(spec):
    points = latency.anchors([(2.0, 3.0), (1.0, 2.0)])
    assert points == ((1.0, 2.0), (2.0, 3.0))
    sums = (0.5, 1.0, 1.5, 2.0, 4.0)
    found = [latency.bent(time, points) for time in sums]
    np.testing.assert_allclose(found, (1.0, 2.0, 2.5, 3.0, 6.0))
    assert latency.bent(0.7, ()) == 0.7
    full = SubnetSpec.full(spec)
    sums = latency.seconds(TRUE, full)
    cost = Predicted(TRUE, spec, 1, ((sums, 2 * sums),))
    np.testing.assert_allclose(cost(spec, full), 2e9 * sums)


def test_the_design_cuts_every_width_alone_and_removes_branches(spec):
    found = latency_design.design(spec, shares=(0.5,), attn_lane=4, mlp_lane=16)
    assert found["full"] == SubnetSpec.full(spec)
    assert set(found["qk 0.5"].qk_dim) == {8} and set(found["qk 0.5"].vo_dim) == {12}
    assert set(found["mlp 0.5"].mlp_dim) == {32}
    assert found["full, half of the heads"].vo_dim == (0, 12, 0)
    half = found["all 0.5, every other branch"]
    assert half.qk_dim == (0, 8, 0) and half.mlp_dim == (32, 0, 32)
    assert found["all 0.5, heads alone"] == SubnetSpec((8,) * 3, (8,) * 3, (0,) * 3)
    assert found["all 0.5, mlp alone"] == SubnetSpec((0,) * 3, (0,) * 3, (32,) * 3)
    # Nothing but embedding and head: what no cut can save.
    assert not latency.features(found["full, no branch"])[1:].any()
    assert len(set(found.values())) == len(found)
    with pytest.raises(ValueError, match="share of 2 must lie between 0 and 1"):
        latency_design.design(spec, shares=(2.0,))


def test_stairs_go_up_from_half_a_branch_and_stop_at_its_size(spec):
    found = latency_design.stairs(spec, above_half=(0, 1, 99))
    heads = [w.qk_dim[0] for n, w in found.items() if n.startswith("heads")]
    assert heads == [6, 7, 12] and found["heads 7"].mlp_dim == (40,) * 3
    assert [w.mlp_dim[0] for n, w in found.items() if n[:3] == "mlp"] == [20, 21, 40]


@pytest.mark.parametrize(("attn_lane", "mlp_lane"), [(1, 1), (4, 16), (5, 7)])
def test_rounding_a_list_goes_to_the_next_multiple(spec, attn_lane, mlp_lane):
    rows = [SubnetSpec.full(spec), RAGGED, RAGGED._replace(mlp_dim=(17, 1, 0))]
    before = piad.from_rows(rows, spec, max_levels=5)
    after = latency.in_lanes(before, spec, attn_lane=attn_lane, mlp_lane=mlp_lane)
    for name, lane in (
        ("qk_dim", attn_lane),
        ("vo_dim", attn_lane),
        ("mlp_dim", mlp_lane),
    ):
        old, size = getattr(before, name), getattr(SubnetSpec.full(spec), name)[0]
        want = np.minimum(size, np.ceil(old / lane) * lane)
        np.testing.assert_array_equal(getattr(after, name), want)
    assert int(after.levels) == 2 and len(after.qk_dim) == 6
    with pytest.raises(ValueError, match="must be at least 1"):
        latency.in_lanes(before, spec, attn_lane=0)


def test_the_level_for_a_time_fits_it_and_the_next_larger_does_not(spec, levels):
    cost = Predicted(TRUE, spec, 1)
    times = [latency.seconds(TRUE, levels.widths(i, spec)) for i in range(8)]
    assert times == sorted(times, reverse=True)
    for limit in np.linspace(times[-1], 1.1 * times[0], 9):
        level = latency.level_for(levels, limit, cost=cost)
        assert times[level] <= limit * (1 + 1e-9)
        assert level == 0 or times[level - 1] > limit


def test_a_predicted_cost_serves_wherever_macs_do(spec, levels):
    cost = Predicted(TRUE, spec, 1)
    full = SubnetSpec.full(spec)
    limit = 0.7 * cost(spec, full)
    level = piad.level_for(levels, spec, limit, cost=cost)
    assert cost(spec, levels.widths(level, spec)) <= limit
    made = allocation.allocate(
        spec,
        lambda many: [-float(sum(map(sum, w))) for w in many],
        target=limit,
        cost=cost,
    )
    last = made.widths(int(made.levels), spec)
    assert (
        cost(spec, last) <= limit < cost(spec, made.widths(int(made.levels) - 1, spec))
    )


def test_a_time_that_nothing_reaches_says_what_the_smallest_takes(spec, levels):
    cost = Predicted(TRUE, spec, 2)
    smallest = latency.seconds(TRUE, levels.widths(7, spec))
    told = r"level 7\) takes ([\d.]+) ms for a batch of 2"
    with pytest.raises(ValueError, match=told) as error:
        latency.level_for(levels, 1e-6, cost=cost)
    asked = float(re.search(told, str(error.value))[1]) / 1e3
    assert smallest <= asked < 1.001 * smallest
    assert latency.level_for(levels, asked, cost=cost) == 7
    with pytest.raises(ValueError, match="no level takes nan"):
        latency.level_for(levels, float("nan"), cost=cost)


def test_a_profile_of_another_network_is_refused_by_field(spec, levels):
    wider = spec.replace(mlp_dim=48, mean=(0.1, 0.2, 0.3))
    with pytest.raises(
        ValueError, match="mlp_dim = 48, not 40.*run flax-skd profile"
    ) as e:
        Predicted(TRUE, wider, 1)(spec, SubnetSpec.full(spec))
    assert "mean" not in str(e.value)  # which changes no time
    latency.check_same_speed(spec, spec.replace(crop_fraction=1.0, std=(1.0,) * 3))


@pytest.mark.parametrize(
    "fields", [{}, [], TRUE._asdict() | {"qk": -1.0}, TRUE._asdict() | {"qk": "1"}]
)
def test_coefficients_from_json_are_checked(fields):
    assert Latency.from_dict(json.loads(json.dumps(TRUE._asdict()))) == TRUE
    with pytest.raises(ValueError, match="a latency has the coefficients"):
        Latency.from_dict(fields)


def test_a_budget_is_of_one_image_or_of_the_largest_batch(profile):
    slow = time_budget.budget(profile, latency_ms=8)
    assert (slow.cost.batch_size, slow.limit) == (1, 8e6)
    fast = time_budget.budget(profile, images_per_s=500)
    assert fast.cost.batch_size == 4
    np.testing.assert_allclose(fast.limit, 1e9 * 4 / 500)
    chosen = time_budget.budget(profile, latency_ms=8, batch_size=4)
    assert chosen.cost == profile.predicted(4)


def test_units_that_were_never_profiled_are_refused_with_the_way_out(profile):
    with pytest.raises(
        ValueError, match="batches of 32 were never profiled, only of 1, 4"
    ):
        time_budget.budget(profile, latency_ms=8, batch_size=32)
    with pytest.raises(ValueError, match="needs --profile=DIR.*flax-skd profile"):
        time_budget.read("")


@pytest.mark.parametrize(
    ("latency_ms", "images_per_s"), [(None, None), (1, 1), (-1, None), (None, np.nan)]
)
def test_a_budget_is_one_positive_number(profile, latency_ms, images_per_s):
    with pytest.raises(ValueError, match="give one of them, above 0"):
        time_budget.budget(profile, latency_ms=latency_ms, images_per_s=images_per_s)


def test_a_prepared_super_network_has_widths_that_the_device_likes(
    profile, spec, params, levels
):
    supernet = Supernet(params, spec, levels, {})
    lanes = {"attn_lane": 4, "mlp_lane": 16}
    fits = time_budget.budget(profile._replace(lanes=lanes), latency_ms=1e3)
    found = fits.prepare(supernet).dropout_list
    assert not (found.qk_dim % 4).any() and not (found.mlp_dim % 16 % 8).any()
    assert (found.mlp_dim >= levels.mlp_dim).all()
    with pytest.raises(ValueError, match="no level takes 0.0001 ms"):
        time_budget.budget(profile, latency_ms=1e-4).prepare(supernet)
    other = supernet._replace(spec=spec.replace(patch_size=8))
    with pytest.raises(ValueError, match="patch_size"):
        fits.prepare(other)


def test_a_time_extracts_what_its_level_says(profile, spec, params, levels):
    """`flax-skd extract --latency_ms`: a budget in time goes the way of one in MACs."""
    supernet = Supernet(params, spec, levels, {})
    time = latency.seconds(TRUE, levels.widths(3, spec))
    fits = time_budget.budget(profile, latency_ms=1.001e3 * time)
    small, level = commands.subnet_within(
        fits.prepare(supernet), cost=fits.cost, limit=fits.limit
    )
    assert level == 3 and small.widths == levels.widths(3, spec)


def ticking(seconds_of):
    """A clock that programs move on: (clock, programs)."""
    now = [0.0]

    def program(name):
        def run():
            now[0] += seconds_of[name]()

        return run

    return lambda: now[0], {name: program(name) for name in seconds_of}


def test_ratios_are_of_times_side_by_side_on_a_machine_that_slows_down():
    """The machine is slower at every call: ratios of medians far apart would drift."""
    slow = itertools.count(1)
    clock, programs = ticking(
        {"full": lambda: 4.0 * (1 + next(slow) / 1e3), "half": lambda: 1.0}
    )
    found = timing.paired(programs, against="full", rounds=5, clock=clock)
    assert list(found) == ["full", "half"] and found["full"].ratio == 1
    np.testing.assert_allclose(found["half"].ratio, 0.25, rtol=0.02)
    np.testing.assert_allclose(
        found["half"].seconds, found["half"].ratio * found["full"].seconds
    )
    assert found["half"].low <= found["half"].ratio <= found["half"].high


def test_one_slow_round_does_not_move_the_median():
    times = iter([1.0] * 4 + [50.0] + [1.0] * 2)  # two to warm up
    clock, programs = ticking({"full": lambda: 2.0, "half": lambda: next(times)})
    found = timing.paired(programs, against="full", rounds=5, clock=clock)
    assert found["half"].ratio == 0.5 and found["half"].seconds == 1.0


def test_short_programs_run_often_enough_to_be_measured():
    calls = {"full": 0, "short": 0}

    def counted(name, seconds):
        def run():
            calls[name] += 1
            return seconds

        return run

    clock, programs = ticking(
        {"full": counted("full", 1.0), "short": counted("short", 1 / 16)}
    )
    timing.paired(programs, against="full", rounds=3, least=0.5, clock=clock)
    assert calls == {"full": 2 + 3, "short": 2 + 3 * 8}
    with pytest.raises(ValueError, match="rounds = 0"):
        timing.paired(programs, against="full", rounds=0)


def test_steps_that_run_behind_the_host_are_waited_for_at_the_end(monkeypatch):
    order = []
    clock, programs = ticking({"full": lambda: 0.25})
    run = programs["full"]
    told = {"full": lambda: (run(), order.append("call"))}
    monkeypatch.setattr(jax, "block_until_ready", lambda made: order.append("wait"))
    timing.paired(told, against="full", rounds=1, least=1, clock=clock, ahead=True)
    assert order == ["call", "wait"] * 2 + ["call"] * 4 + ["wait"]


def test_what_is_timed_is_the_extracted_network(spec, params, batch):
    images = jax.device_put(batch["image"])
    run, seconds = timing.compiled(params, spec, RAGGED, images, dtype=np.float32)
    want = vit.ViT(spec, RAGGED).apply(
        {"params": subnet.extract(params, RAGGED)}, images
    )
    np.testing.assert_allclose(run(), want, atol=1e-5)
    assert seconds > 0


def profiled(folder, spec, params, **changes):
    """What the command says of a network with a list of five levels."""
    levels = piad.uniform(spec, steps=5)
    checkpoint.save_supernet(folder / "super", Supernet(params, spec, levels, {}))
    config = config_files.load("configs/profile.py")
    config.update({"rounds": 1, "shares": "0.5", "levels": 2} | changes)
    text = profiling.profile(
        config, workdir=str(folder / "super"), out=str(folder / "out"), overwrite=False
    )
    return folder, text, config


@pytest.fixture(scope="module")
def measured(spec, params, tmp_path_factory):
    """A profile on a device that takes what the model says, and twice that for two."""

    def compiled(params, spec, widths, images, *, dtype):
        return lambda: len(images) * latency.seconds(TRUE, widths), 0.5

    def paired(programs, *, against, rounds, progress):
        full = programs[against]()
        ratios = {name: run() / full for name, run in programs.items()}
        return {n: timing.Timing(r * full, r, r, r) for n, r in ratios.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "compiled", compiled)
        patch.setattr(timing, "paired", paired)
        folder = tmp_path_factory.mktemp("profile")
        yield profiled(folder, spec, params, batch_size=2, stairs="0,1")


def test_the_profile_command_writes_what_budgets_read(measured, spec):
    folder, text, _ = measured
    assert "off by 0.0 % in the mean" in text and "| level 4 |" in text
    there = sorted(p.name for p in (folder / "out").iterdir())
    assert there == sorted(time_budget.FILES)
    found = time_budget.read(folder / "out", dtype="float32")
    assert (found.spec, sorted(found.latency)) == (spec, [1, 2])
    uses = [(row["use"], row["batch_size"]) for row in found.measured]
    assert uses.count(("check", 1)) == 2 and uses.count(("stairs", 2)) == 4
    assert ("stairs", 1) not in uses
    for size, model in found.latency.items():
        np.testing.assert_allclose(model, size * np.array(TRUE), rtol=1e-6)
        points = found.anchors[size]
        assert profiling.fitted(found.measured, size) == (model, points)
        assert len(points) == 3  # the full network, two levels
        np.testing.assert_allclose(*np.transpose(points), rtol=1e-6)
    milliseconds = time_budget.milliseconds(found, 2)
    want = 2e3 * latency.seconds(TRUE, RAGGED)
    np.testing.assert_allclose(milliseconds(spec, RAGGED), want, rtol=1e-6)


def test_checks_and_stairs_and_other_batches_are_no_part_of_a_fit(measured):
    folder, _, _ = measured
    rows = time_budget.read(folder / "out").measured
    want = profiling.fitted(rows, 2)

    def slower(row):
        ours = row["batch_size"] == 2 and row["use"] in ("fit", "anchor")
        return row if ours else row | {"seconds": 100 * row["seconds"]}

    assert {row["use"] for row in rows} == {"fit", "anchor", "check", "stairs"}
    assert profiling.fitted([*map(slower, rows)], 2) == want


def test_what_is_profiled_computes_in_the_precision_that_is_asked(
    spec, params, tmp_path, monkeypatch
):
    asked = set()

    def compiled(params, spec, widths, images, *, dtype):
        asked.add(jnp.dtype(dtype).name)
        return lambda: latency.seconds(TRUE, widths), 0.5

    monkeypatch.setattr(timing, "compiled", compiled)
    profiled(tmp_path, spec, params, batch_size=1, stairs="", dtype="bfloat16")
    assert asked == {"bfloat16"}
    assert time_budget.read(tmp_path / "out").dtype == "bfloat16"


def test_a_real_device_can_be_profiled(tmp_path, spec):
    one = spec.replace(depth=1)
    params = vit.init(one, jax.random.key(0))
    _, text, _ = profiled(tmp_path, one, params, batch_size=1, stairs="")
    rows = time_budget.read(tmp_path / "out").measured
    assert {row["batch_size"] for row in rows} == {1}
    assert min(row["seconds"] for row in rows) > 0
    assert text.count("| fit |") == sum(row["use"] == "fit" for row in rows) > 6


def test_a_profile_is_not_overwritten_unasked(measured):
    folder, _, config = measured
    with pytest.raises(ValueError, match="--overwrite"):
        profiling.profile(
            config,
            workdir=str(folder / "super"),
            out=str(folder / "out"),
            overwrite=False,
        )


@pytest.mark.parametrize(
    ("entry", "value", "complaint"),
    [
        ("rounds", 0, "config.rounds = 0 must be at least 1"),
        ("batch_size", 0, "config.batch_size = 0"),
        ("shares", "0.5,half", "config.shares = '0.5,half': numbers between commas"),
    ],
)
def test_a_profile_that_cannot_be_made_is_refused_before_it_takes_time(
    measured, tmp_path, entry, value, complaint
):
    config = config_files.load("configs/profile.py")
    config[entry] = value
    supernet, out = str(measured[0] / "super"), str(tmp_path / "out")
    with pytest.raises(ValueError, match=complaint):
        profiling.profile(config, workdir=supernet, out=out, overwrite=False)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"attn_lane": 12}, r"attn_lane = 12 rounds .*head_dim = 12 .*at most 6"),
        ({"mlp_lane": 64}, r"mlp_lane = 64 rounds .*mlp_dim = 40 .*at most 20"),
        ({"attn_lane": 8, "shares": "0.75"}, r"attn_lane = 8 .*'0.75'.*smaller shares"),
        ({"shares": ""}, "rounds every share of"),
    ],
)
def test_lanes_as_wide_as_a_branch_are_named_before_anything_is_compiled(
    spec, params, tmp_path, monkeypatch, changes, complaint
):
    def compiled(*args, **options):
        raise AssertionError("compiled")

    monkeypatch.setattr(timing, "compiled", compiled)
    with pytest.raises(ValueError, match=complaint):
        profiled(tmp_path, spec, params, levels=0, **changes)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("device", "an abacus", "measured on the device 'an abacus'.*flax-skd profile"),
        ("dtype", "bfloat16", "measured on the dtype 'bfloat16'"),
        ("latency", {}, "no batch size was profiled"),
        ("latency", {"1": {"fixed": 1}}, "a latency has the coefficients"),
        ("anchors", {"1": [[2.0, 1.0], [1.0, 3.0]]}, "anchors are pairs.*both rising"),
        ("anchors", {"1": [["a", 1.0]]}, "anchors are pairs of positive seconds"),
        ("lanes", {"attn_lane": 1}, "attn_lane and mlp_lane"),
        ("format", "flax_skd sub-network", "not a profile"),
    ],
)
def test_a_profile_from_elsewhere_or_edited_is_refused(
    measured, tmp_path, field, value, complaint
):
    text = (measured[0] / "out" / "profile.json").read_text()
    fields = json.loads(text) | {field: value}
    (tmp_path / "profile.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=complaint):
        time_budget.read(tmp_path, dtype="float32")


def test_a_directory_without_a_profile_says_how_to_make_one(tmp_path):
    with pytest.raises(
        ValueError, match="not a profile directory.*run flax-skd profile"
    ):
        time_budget.read(tmp_path / "nothing")


def row_of(name, use, widths, ratio, predicted):
    times = timing.Timing(ratio, ratio, ratio, ratio)._asdict()
    about = {"name": name, "use": use, "batch_size": 4, "compile_seconds": 1.0}
    return about | times | {"widths": widths._asdict(), "predicted": predicted}


def test_predictions_off_by_more_than_ten_percent_are_marked(profile, spec):
    full = SubnetSpec.full(spec)
    rows = [
        row_of("full", "fit", full, 1.0, 1.0),
        row_of("level 1", "check", RAGGED, 0.5, 0.52),
        row_of("level 2", "check", RAGGED, 0.4, 0.5),
    ]
    found = profile._replace(measured=rows, latency={4: TRUE})
    text = profile_report.table(found)
    assert "+4.0 |" in text and "+25.0 **over 10**" in text
    assert "at most 25.0 % (level 2); 1 of 2 by more than 10 %" in text


def test_the_table_of_widths_shows_what_rounding_up_does(profile, spec):
    full = SubnetSpec.full(spec)
    times = {5: 0.6, 6: 0.6, 7: 0.66, 8: 0.55}
    rows = [row_of("full", "fit", full, 1.0, 1.0)]
    rows += [row_of(f"heads {w}", "stairs", full, t, t) for w, t in times.items()]
    text = profile_report.table(profile._replace(measured=rows, latency={4: TRUE}))
    assert "| heads | 7 | 0.660 | 0.550 (-17 %) | 0.550 (-17 %) |" in text
    assert "| heads | 8 | 0.550 |  |  |  |" in text
    assert "No level of a list was left to check the fit with." in text
