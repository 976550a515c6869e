"""Recalibration: own statistics of a cut network, and a head led back to the full one."""

import jax
import numpy as np
import pytest

from flax_skd.io import checkpoint
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import (
    compensation,
    costs,
    macs,
    piad,
    recalibration,
    statistics,
    subnet,
)
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import commands, main, recalibrating

WIDTHS = SubnetSpec((6, 0, 3), (6, 0, 9), (30, 13, 0))


def batches_of(spec, count, seed):
    rng = np.random.default_rng(seed)
    shape = (8, spec.image_size, spec.image_size, 3)
    return [
        {
            "image": rng.integers(0, 256, shape).astype(np.uint8),
            "label": np.zeros(8, np.int32),
            "weight": np.array([1.0] * 7 + [0.0], np.float32),
        }
        for _ in range(count)
    ]


def statistics_of(spec, params, batches, tokens, widths=None):
    """Second moments under one weighting, of a cut if there are widths."""
    return statistics.collect(
        ViT(spec),
        params,
        batches,
        cost=costs.top_logit,
        weightings=(),
        moments=(tokens,),
        masks=widths and subnet.masks(spec, widths),
    )


@pytest.fixture(scope="module")
def network(spec, params):
    """The tiny network with a compensation of its own units."""
    stats = statistics_of(spec, params, batches_of(spec, 4, 0), "plain")
    full = SubnetSpec.full(spec)
    zeros = compensation.from_moments(
        [(np.zeros(spec.num_heads * spec.head_dim), None)] * spec.depth,
        [(np.zeros(spec.mlp_dim), None)] * spec.depth,
        spec,
    )
    repairs = recalibration.own_compensation(stats, spec, zeros, full, tokens="plain")
    return Supernet(params, spec, piad.from_rows([full], spec), {}, repairs)


def _inner_units(spec, params, widths, images):
    """(block, branch) -> its inner units [n, units] before their mask, under a cut."""
    found = {}

    def tap(block, name, feature):
        units = np.asarray(feature, np.float64)
        if name == "mixed":
            units = units.swapaxes(1, 2)
        if name in ("mixed", "hidden"):
            branch = "attn" if name == "mixed" else "mlp"
            found[block, branch] = units.reshape(len(images) * spec.num_tokens, -1)
        return feature

    masks = subnet.masks(spec, widths)
    ViT(spec).apply({"params": params}, images, masks, tap)
    return found


def test_moments_under_a_cut_are_those_of_all_units_on_the_stream_it_leaves(
    spec, params
):
    batches = batches_of(spec, 2, 1)
    stats = statistics_of(spec, params, batches, "plain", WIDTHS)
    images = np.concatenate([b["image"][:7] for b in batches])
    units = _inner_units(spec, params, WIDTHS, images)
    assert len(units) == 2 * spec.depth
    for (block, branch), seen in units.items():
        mean = stats.branch_mean(block, branch, "plain")
        np.testing.assert_allclose(mean, seen.mean(0), atol=1e-5)
        covariance = stats.branch_covariance(block, branch, "plain")
        np.testing.assert_allclose(covariance, np.cov(seen.T, bias=True), atol=1e-5)


def test_own_statistics_of_the_full_network_are_the_stored_ones(spec, network):
    stats = statistics_of(
        spec,
        network.params,
        batches_of(spec, 4, 0),
        "plain",
        SubnetSpec.full(spec),
    )
    again = recalibration.own_compensation(
        stats, spec, network.compensation, SubnetSpec.full(spec), tokens="plain"
    )
    for new, old in zip(jax.tree.leaves(again), jax.tree.leaves(network.compensation)):
        np.testing.assert_allclose(new, old, atol=1e-4)


def test_a_removed_branch_keeps_its_stored_repair(spec, network):
    stats = statistics_of(
        spec, network.params, batches_of(spec, 1, 0), "gradient", WIDTHS
    )
    own = recalibration.own_compensation(stats, spec, network.compensation, WIDTHS)
    assert own.attn[1] is network.compensation.attn[1]
    assert own.mlp[2] is network.compensation.mlp[2]
    assert np.abs(own.mlp[1].mean - network.compensation.mlp[1].mean).max() > 1e-4


def features(rng, images=40, width=6):
    full = rng.normal(size=(images, width)) + 1
    cut = full @ (np.eye(width) + 0.3 * rng.normal(size=(width, width))) - 0.5
    return cut + 0.2 * rng.normal(size=cut.shape), full


def test_the_errors_of_left_out_images_are_those_of_fits_without_them():
    """The ridge chosen is the one that plain leave-one-out chooses, refit n times."""
    rng = np.random.default_rng(0)
    cut, full = features(rng)
    kernel = rng.normal(size=(6, 3))
    level = np.square(cut - cut.mean(0)).sum() / 6

    def fit(x, y, ridge):
        mx, my = x.mean(0), y.mean(0)
        change = np.zeros((6, 6))
        if np.isfinite(ridge):
            gram = (x - mx).T @ (x - mx) + ridge * level * np.eye(6)
            change = np.linalg.solve(gram, (x - mx).T @ (y - my - x + mx))
        return np.eye(6) + change, my - mx @ (np.eye(6) + change)

    def left_out(ridge):
        total = 0.0
        for i in range(len(cut)):
            rest = np.arange(len(cut)) != i
            matrix, offset = fit(cut[rest], full[rest], ridge)
            total += np.square((full[i] - cut[i] @ matrix - offset) @ kernel).sum()
        return total

    best = min(recalibration.RIDGES, key=left_out)
    found = recalibration.correction(cut, full, kernel)
    assert found.ridge == best
    for mine, plain in zip(found[:2], fit(cut, full, best)):
        np.testing.assert_allclose(mine, plain, atol=1e-10)


def test_a_network_that_is_not_cut_needs_no_correction():
    _, full = features(np.random.default_rng(1))
    matrix, offset, _ = recalibration.correction(full, full, np.eye(6))
    np.testing.assert_allclose(matrix, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(offset, 0, atol=1e-12)


def test_pure_noise_moves_no_more_than_the_mean():
    rng = np.random.default_rng(2)
    cut, full = rng.normal(size=(2, 8, 6))
    found = recalibration.correction(cut, cut + full, np.eye(6))
    assert found.ridge >= 1


def test_features_that_do_not_belong_together_are_an_error():
    with pytest.raises(ValueError, match="same two or more images"):
        recalibration.correction(np.ones((1, 3)), np.ones((1, 3)), np.eye(3))
    with pytest.raises(ValueError, match="same two or more images"):
        recalibration.correction(np.ones((4, 3)), np.ones((4, 2)), np.eye(3))


def test_the_head_reads_corrected_features(params, spec):
    rng = np.random.default_rng(3)
    matrix, offset = rng.normal(size=(spec.width,) * 2), rng.normal(size=spec.width)
    one = recalibration.Correction(matrix, offset, 1.0)
    new = recalibration.with_head(params, {"head": one})["head"]
    feature = rng.normal(size=(4, spec.width))
    old = params["head"]
    want = (feature @ matrix + offset) @ np.asarray(old["kernel"]) + np.asarray(
        old["bias"]
    )
    np.testing.assert_allclose(feature @ new["kernel"] + new["bias"], want, atol=1e-4)


def test_the_choice_is_never_worse_on_images_held_out(spec, network):
    done = recalibrating.recalibrated(
        network, WIDTHS, batches_of(spec, 4, 5), batches_of(spec, 2, 6)
    )
    assert done.kl[done.chosen] == min(done.kl.values()) <= done.kl["stored"]
    assert {"stored", "round 1", "round 2", "stored, head"} < set(done.kl)
    small = subnet.extract(done.params, WIDTHS)
    images = batches_of(spec, 1, 7)[0]["image"]
    alone = ViT(spec, WIDTHS).apply({"params": small}, images)
    masked = ViT(spec).apply(
        {"params": done.params}, images, subnet.masks(spec, WIDTHS)
    )
    np.testing.assert_allclose(alone, masked, atol=1e-5)


@pytest.mark.parametrize("classes", [0, 1])
def test_a_network_of_one_class_or_none_is_fitted_by_what_it_gives(
    spec, network, classes
):
    params = {k: v for k, v in network.params.items() if k != "head"}
    if classes:
        params["head"] = {k: v[..., :1] for k, v in network.params["head"].items()}
    spec = spec.replace(num_classes=classes)
    few = network._replace(params=params, spec=spec)
    batches, held_out = batches_of(spec, 4, 5), batches_of(spec, 2, 6)
    done = recalibrating.recalibrated(few, WIDTHS, batches, held_out, rounds=1)
    assert len(done.kl) == (4 if classes else 2)
    images, masks = live_images(held_out), subnet.masks(spec, WIDTHS)
    full = ViT(spec).apply({"params": params}, images)
    cut = ViT(spec).apply({"params": done.params}, images, masks)
    want = np.square(np.asarray(full - cut)).mean()
    assert done.kl[done.chosen] == pytest.approx(want, rel=1e-3)
    assert 0 < done.kl[done.chosen] == min(done.kl.values())


def live_images(batches):
    return np.concatenate([b["image"][b["weight"] > 0] for b in batches])


def head_features(spec, params, widths, images):
    """What the head reads, from logits: of a head that is the identity."""
    eye = {"kernel": np.eye(spec.width, dtype=np.float32)}
    eye["bias"] = np.zeros(spec.width, np.float32)
    spec, params = spec.replace(num_classes=spec.width), {**params, "head": eye}
    masks = widths and subnet.masks(spec, widths)
    return np.asarray(ViT(spec).apply({"params": params}, images, masks), np.float64)


def probabilities(features, head):
    kernel, bias = (np.asarray(head[name], np.float64) for name in ("kernel", "bias"))
    logits = features @ kernel + bias
    logits = np.exp(logits - logits.max(-1, keepdims=True))
    return logits / logits.sum(-1, keepdims=True)


def candidates_by_hand(spec, network, batches):
    """All that recalibration tries, one after the other, as the docs derive it."""
    repairs, found = network.compensation, {}
    for name in ("stored", "round 1", "round 2"):
        if found:  # statistics of the network that the round before left
            last = [*found.values()][-1]
            own = statistics_of(spec, last, batches, "gradient", WIDTHS)
            stored = network.compensation
            repairs = recalibration.own_compensation(own, spec, stored, WIDTHS)
        found[name] = compensation.repaired(network.params, spec, repairs, WIDTHS)
    images, head = live_images(batches), network.params["head"]
    full = head_features(spec, network.params, None, images)
    for name, params in list(found.items()):
        cut = head_features(spec, params, WIDTHS, images)
        to_full = recalibration.correction(cut, full, head["kernel"])
        found[f"{name}, head"] = recalibration.with_head(params, {"head": to_full})
    return found


def test_what_is_tried_is_measured_on_the_images_held_out_and_the_least_is_given(
    spec, network
):
    batches, held_out = batches_of(spec, 4, 5), batches_of(spec, 2, 6)
    done = recalibrating.recalibrated(network, WIDTHS, batches, held_out)
    found = candidates_by_hand(spec, network, batches)
    images = live_images(held_out)
    full = head_features(spec, network.params, None, images)
    p = probabilities(full, network.params["head"])
    kl = {}
    for name, params in found.items():
        features = head_features(spec, params, WIDTHS, images)
        q = probabilities(features, params["head"])
        kl[name] = (p * np.log(p / q)).sum(-1).mean()
    assert [*done.kl] == [*kl]
    for name, value in kl.items():
        assert done.kl[name] == pytest.approx(value, rel=1e-3), name
    # No two are so near that one could pass for another.
    assert min(np.diff(sorted(kl.values()))) > 2e-3 * max(kl.values())
    assert done.chosen == min(kl, key=kl.get)
    for mine, plain in zip(
        jax.tree.leaves(done.params), jax.tree.leaves(found[done.chosen]), strict=True
    ):
        np.testing.assert_allclose(mine, plain, rtol=1e-3, atol=1e-4)


class Counted(list):
    """Batches that know how often they were read."""

    reads = 0

    def __iter__(self):
        self.reads += 1
        return super().__iter__()


@pytest.mark.parametrize("rounds", [0, 1])
def test_images_are_read_once_a_round_once_for_the_heads_and_once_to_choose(
    spec, network, rounds
):
    batches = Counted(batches_of(spec, 2, 5))
    held_out = Counted(batches_of(spec, 1, 6))
    done = recalibrating.recalibrated(network, WIDTHS, batches, held_out, rounds=rounds)
    assert batches.reads == rounds + 1 and held_out.reads == 1
    assert len(done.kl) == 2 * (rounds + 1)


def test_a_network_without_compensation_is_told_how_to_get_one(spec, network):
    bare = network._replace(compensation=None)
    with pytest.raises(ValueError, match="configs/balanced.py"):
        recalibrating.recalibrated(bare, WIDTHS, [], [])


def test_what_was_fitted_is_extracted_and_said(spec, network, tmp_path):
    levels = piad.from_rows([SubnetSpec.full(spec), WIDTHS], spec)
    checkpoint.save_supernet(tmp_path / "net", network._replace(dropout_list=levels))
    fitted = jax.tree.map(lambda x: np.asarray(x) + 1, network.params)

    def fit(supernet, widths):
        assert widths == WIDTHS and supernet.compensation is not None
        kl = {"stored": 0.5, "round 1": 0.25}
        return recalibrating.Recalibrated(fitted, kl, "round 1")

    said = commands.extract(
        workdir=str(tmp_path / "net"),
        out=str(tmp_path / "small"),
        overwrite=False,
        cost=macs.macs,
        limit=macs.macs(spec, WIDTHS),
        fit=fit,
    )
    small = checkpoint.load_subnet(tmp_path / "small")
    assert "level 1" in said and small.widths == WIDTHS
    assert small.provenance["recalibrated"]["chosen"] == "round 1"
    for new, want in zip(
        jax.tree.leaves(small.params), jax.tree.leaves(subnet.extract(fitted, WIDTHS))
    ):
        np.testing.assert_array_equal(new, want)


def test_a_fifth_of_the_images_is_held_out_and_no_label_is_read(
    spec, network, tmp_path, monkeypatch
):
    pixels = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    pixels = np.broadcast_to(pixels, (20, 16, 16, 3)).copy()
    labels = np.arange(20)  # more than the network has classes
    np.savez(tmp_path / "images.npz", images=pixels, labels=labels)
    seen = {}

    def fake(network, widths, batches, held_out):
        for name, part in (("fit", batches), ("held out", held_out)):
            seen[name] = [
                int(image[0, 0, 0])
                for batch in part
                for image, live in zip(batch["image"], batch["weight"])
                if live
            ]

    monkeypatch.setattr(recalibrating, "recalibrated", fake)
    fit = recalibrating.fitted_to(f"npz:{tmp_path}/images.npz", images=15)
    fit(network._replace(spec=spec.replace(crop_fraction=1.0)), WIDTHS)
    assert len(seen["fit"]) == 12 and len(seen["held out"]) == 3
    assert len({*seen["fit"], *seen["held out"]}) == 15


def test_a_place_that_is_taken_is_named_before_the_fit(tmp_path):
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="small is not empty"):
        commands.extract(
            workdir=str(tmp_path / "not read"),
            out=str(tmp_path / "small"),
            overwrite=False,
            cost=macs.macs,
            limit=0.5,
        )


def test_the_command_names_a_source_that_does_not_serve(tmp_path, capsys):
    arguments = [f"--workdir={tmp_path}", f"--out={tmp_path}/small", "--budget=0.5"]
    missing = f"--recalibrate=npz:{tmp_path}/none.npz"
    assert main.main(["extract", *arguments, missing]) == 1
    assert "none.npz" in capsys.readouterr().err


def test_too_few_images_to_fit_to_are_an_error(tmp_path):
    np.savez(
        tmp_path / "few.npz",
        images=np.zeros((9, 8, 8, 3), np.uint8),
        labels=np.zeros(9, int),
    )
    with pytest.raises(ValueError, match="at least ten"):
        recalibrating.fitted_to(f"npz:{tmp_path}/few.npz")
