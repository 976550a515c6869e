"""Scores against plain NumPy, and the sweep's files."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest

from flax_skd.io import checkpoint, data, sources
from flax_skd.method import compensation, macs, piad, subnet
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import evaluate, report, sweeping


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def batches(batch, size=5):
    """The batch in parts, the last one padded with nonsense of weight 0."""
    for start in range(0, len(batch["label"]), size):
        part = {k: v[start : start + size] for k, v in batch.items()}
        pad = size - len(part["label"])
        yield {
            "image": np.pad(part["image"], ((0, pad), (0, 0), (0, 0), (0, 0))),
            "label": np.pad(part["label"], (0, pad)),
            "weight": np.pad(part["weight"], (0, pad)),
        }


def test_scores_equal_the_definitions_on_padded_batches(spec, params, batch):
    spec = spec.replace(num_classes=9)
    params = {**params, "head": {"kernel": jnp.ones((24, 9)), "bias": jnp.ones(9)}}
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(24, 9)).astype(np.float32)
    params["head"] = {"kernel": kernel, "bias": np.zeros(9, np.float32)}
    widths = SubnetSpec.uniform(spec, 4, 5, 11)
    (score,) = evaluate.evaluate(ViT(spec), params, batches(batch), [widths])
    masks = subnet.masks(spec, widths)
    full = log_softmax(ViT(spec).apply({"params": params}, batch["image"]))
    cut = log_softmax(ViT(spec).apply({"params": params}, batch["image"], masks))
    labels = batch["label"]
    ranks = (-cut).argsort(-1)
    assert score.images == 12
    assert score.top1 == pytest.approx(100 * (ranks[:, 0] == labels).mean())
    in_five = (ranks[:, :5] == labels[:, None]).any(-1)
    assert score.top5 == pytest.approx(100 * in_five.mean())
    assert score.kl == pytest.approx(
        (np.exp(full) * (full - cut)).sum(-1).mean(), rel=1e-4
    )
    assert score.agreement == pytest.approx(
        100 * (full.argmax(-1) == ranks[:, 0]).mean()
    )


@pytest.mark.parametrize("classes", [0, 1])
def test_one_logit_or_a_feature_is_as_far_as_it_moved(spec, params, batch, classes):
    spec = spec.replace(num_classes=classes)
    head = {k: v[..., :1] for k, v in params["head"].items()}
    params = {k: v for k, v in params.items() if k != "head"}
    params |= {"head": head} if classes else {}
    widths = SubnetSpec.uniform(spec, 4, 5, 11)
    (score,) = evaluate.evaluate(ViT(spec), params, batches(batch), [widths])
    full = ViT(spec).apply({"params": params}, batch["image"])
    masks = subnet.masks(spec, widths)
    cut = ViT(spec).apply({"params": params}, batch["image"], masks)
    want = float(jnp.square(full - cut).mean())
    assert score.kl == pytest.approx(want, rel=1e-4) and want > 1e-6


def test_the_full_network_agrees_with_itself(spec, params, batch):
    full = SubnetSpec.full(spec)
    (score,) = evaluate.evaluate(ViT(spec), params, [batch], [full])
    assert score.agreement == 100 and abs(score.kl) < 1e-6 and score.top5 == 100


def test_no_images_is_an_error(spec, params, batch):
    full = [SubnetSpec.full(spec)]
    with pytest.raises(ValueError, match="no images to evaluate"):
        evaluate.evaluate(ViT(spec), params, [], full)
    empty = {**batch, "weight": np.zeros(12, np.float32)}
    with pytest.raises(ValueError, match="every image was skipped"):
        evaluate.evaluate(ViT(spec), params, [empty], full)


def test_logits_that_are_not_finite_are_an_error(spec, params, batch):
    broken = {**params, "norm": {**params["norm"], "bias": jnp.full(24, jnp.nan)}}
    with pytest.raises(ValueError, match="logits are not finite"):
        evaluate.evaluate(ViT(spec), broken, [batch], [SubnetSpec.full(spec)])


@pytest.mark.parametrize(
    ("cut", "widths"),
    [
        ("attention", (6, 6, 40)),
        ("qk", (6, 12, 40)),
        ("vo", (12, 6, 40)),
        ("mlp", (12, 12, 20)),
        ("all", (6, 6, 20)),
    ],
)
def test_a_cut_touches_its_own_branches_only(spec, cut, widths):
    found = evaluate.fixed_cut(spec, cut, 0.5)
    assert found.widths == SubnetSpec.uniform(spec, *widths)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("heads", 0.5), "'heads': choose of attention, qk, vo, mlp, all"),
        (("qk", 0.0), r"kept = 0.0 must lie in \(0, 1\]"),
        (("qk", 1.5), r"kept = 1.5 must lie in \(0, 1\]"),
    ],
)
def test_a_cut_that_cannot_be_says_what_can(spec, args, match):
    with pytest.raises(ValueError, match=match):
        evaluate.fixed_cut(spec, *args)


def supernet(spec, params):
    return checkpoint.Supernet(params, spec, piad.uniform(spec, steps=4), {})


def test_a_sweep_lists_the_full_network_once_and_levels_on_request(spec, params):
    net = supernet(spec, params)
    cuts = sweeping.cuts_of(net, "all,qk", "1/2,1", every=1)
    assert [(c.cut, c.kept) for c in cuts] == [("all", 1), ("all", 0.5), ("qk", 0.5)]
    levels = sweeping.cuts_of(net, "levels", "", every=2)
    assert [c.level for c in levels] == [0, 2]
    (_, half) = sweeping.cuts_of(net, "budgets", "0.5")
    limit = macs.macs(spec) / 2
    assert macs.macs(spec, half.widths) <= limit and half.level > 0
    assert macs.macs(spec, net.dropout_list.widths(half.level - 1, spec)) > limit
    with pytest.raises(ValueError, match="write shares like 1/4"):
        sweeping.cuts_of(net, "all", "1/0")


def test_a_sweep_measures_each_network_with_what_repairs_it_and_no_other(
    spec, params, batch
):
    def moments(size):
        x = np.random.default_rng(size).normal(size=(3 * size, size))
        return [(x.mean(0) + 0.5, np.cov(x.T))] * spec.depth

    sizes = compensation.inner_units(spec)
    repairs = compensation.from_moments(
        moments(sizes["attn"]), moments(sizes["mlp"]), spec
    )
    plain = supernet(spec, params)
    networks = {"repaired": plain._replace(compensation=repairs), "plain": plain}
    whole = spec.replace(crop_fraction=1.0)
    source = sources.ArraySource(batch["image"], batch["label"])
    found = sweeping.run_sweep(
        networks,
        ViT(whole),
        data.eval_batches(source, whole, batch_size=8),
        [evaluate.fixed_cut(spec, "all", 0.5)],
    )
    assert [row["criterion"] for row in found] == ["repaired", "plain"]
    widths = SubnetSpec.uniform(spec, 6, 6, 20)
    full = log_softmax(ViT(spec).apply({"params": params}, batch["image"]))
    for row, own in zip(found, (repairs, None)):
        small = subnet.extract(compensation.repaired(params, spec, own, widths), widths)
        logits = ViT(spec, widths).apply({"params": small}, batch["image"])
        kl = (np.exp(full) * (full - log_softmax(logits))).sum(-1).mean()
        assert row["kl"] == pytest.approx(kl, abs=1e-4) and row["images"] == 12
    assert abs(found[0]["kl"] - found[1]["kl"]) > 1e-2


def test_sweep_rows_have_the_columns_and_survive_their_files(
    spec, params, batch, tmp_path
):
    cuts = sweeping.cuts_of(supernet(spec, params), "all,mlp", "1/4,1/2")
    networks = {"one": params, "two": params}
    seen = []
    rows = evaluate.sweep(
        networks, ViT(spec), [batch], cuts, after_each=lambda n, r: seen.append(n)
    )
    assert seen == ["one", "two"] and len(rows) == 10
    assert all(tuple(r) == evaluate.COLUMNS for r in rows)
    assert rows[1]["macs"] == macs.macs(spec, cuts[1].widths)
    assert rows[1]["macs_paper"] == macs.macs(spec, cuts[1].widths, convention="paper")
    assert rows[1]["params"] == macs.param_count(spec, cuts[1].widths)
    report.write(tmp_path, rows, title="test")
    assert json.loads((tmp_path / "sweep.json").read_text()) == rows
    assert report.read(tmp_path / "sweep.json") == rows
    with (tmp_path / "sweep.csv").open() as file:
        assert [r["criterion"] for r in csv.DictReader(file)] == ["one"] * 5 + [
            "two"
        ] * 5
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


def test_tables_are_markdown_with_a_line_a_row(spec, params, batch):
    cuts = sweeping.cuts_of(supernet(spec, params), "all", "1/2")
    rows = evaluate.sweep({"wpac": params}, ViT(spec), [batch], cuts)
    rows[0]["kl"] = -1e-8  # the rounding of a network against itself
    assert "0.000" in report.table(rows) and "-0.000" not in report.table(rows)
    lines = report.table(rows).splitlines()
    assert len(lines) == 4 and "MACs (full count)" in lines[0]
    assert report.pivot(rows).splitlines()[0] == "| cut | kept | wpac |"


@pytest.mark.parametrize("text", ["{}x", '[{"cut": 1}]', "[3]"])
def test_a_file_that_is_no_sweep_is_refused_by_name(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(ValueError, match="sweep.json is not a list of sweep rows"):
        report.read(tmp_path / "sweep.json")


def test_the_heat_map_draws_every_block_and_level(spec):
    rows = [SubnetSpec.full(spec), SubnetSpec((12, 6, 6), (12, 3, 6), (40, 20, 5))]
    levels = piad.from_rows(rows, spec, max_levels=9)
    fig = report.list_figure(levels, spec, title="test")
    pictures = [axis.images[0].get_array() for axis in fig.axes if axis.images]
    assert len(pictures) == 3  # q/k and v/out are drawn apart where they differ
    np.testing.assert_allclose(pictures[1][:, 1], [1, 0.25, 0.5])
    np.testing.assert_allclose(pictures[2][:, 1], [1, 0.5, 0.125])


def test_what_a_contraction_promises_is_measured_in_float32_on_every_device(
    spec, params, batch
):
    lowered = evaluate.float32_logits.lower(spec, params, batch["image"]).as_text()
    products = lowered.count("dot_general")
    assert products and products == lowered.count("precision = [HIGHEST, HIGHEST]")
    got = evaluate.float32_logits(spec, params, batch["image"])
    want = ViT(spec).apply({"params": params}, batch["image"])
    np.testing.assert_allclose(got, want, atol=1e-5)
