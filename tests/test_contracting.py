"""Recipes of contraction: the same function, repaired cuts, and lists measured on it."""

import pathlib

import numpy as np
import pytest
from pictures import encoded, write_tar

from flax_skd.io import checkpoint, data, sources
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import (
    compensation,
    contraction,
    costs,
    importance,
    latency,
    macs,
    packing,
    piad,
    statistics,
    subnet,
)
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import (
    commands,
    config_files,
    contracting,
    feed,
    recipes,
    sharding,
    time_budget,
    unit_choice,
)

pytest.importorskip("orbax.checkpoint")
WIDTHS = SubnetSpec((9, 0, 3), (6, 0, 12), (40, 13, 0))


pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def files(spec, params, tmp_path_factory):
    """A directory of the tiny network, and labelled images of its size."""
    folder = tmp_path_factory.mktemp("files")
    spec = spec.replace(crop_fraction=1.0)
    full = piad.from_rows([SubnetSpec.full(spec)], spec)
    checkpoint.save_supernet(folder / "net", Supernet(params, spec, full, {}))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (48, 16, 16, 3)).astype(np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(48) % 5)
    return folder


def config_of(files, **changes):
    config = config_files.load("configs/balanced.py")
    config.model.path = str(files / "net")
    config.data.source = f"npz:{files}/images.npz"
    config.data.images, config.data.batch_size = 32, 16
    config.list.images = 16
    config.update_from_flattened_dict(
        {k.replace("__", "."): v for k, v in changes.items()}
    )
    return config


def contracted(files, name, **changes):
    config = config_of(files, **changes)
    said = contracting.contract(config, workdir=str(files / name), overwrite=True)
    return checkpoint.load_supernet(files / name), said


@pytest.fixture(scope="module")
def balanced(files):
    return contracted(files, "balanced", compare="wpac")


def logits(spec, params, batch, widths=None):
    return ViT(spec, widths).apply({"params": params}, batch["image"])


def test_the_function_is_kept_and_the_size_is_told(balanced, files, params, batch):
    network, said = balanced
    before = logits(network.spec, params, batch)
    for folder in ("balanced", "balanced-wpac"):
        turned = checkpoint.load_supernet(files / folder)
        after = logits(turned.spec, turned.params, batch)
        # Balanced pairs are not orthogonal: rounding grows with their condition.
        np.testing.assert_allclose(after, before, atol=1e-4)
    assert checkpoint.load_supernet(files / "balanced-wpac").compensation is None
    size = packing.size(network.compensation) / 1e6
    assert f"{size:.1f} MB of compensation" in said
    assert "compensation" not in said.splitlines()[1]


def test_the_images_that_are_told_are_no_padding(files, tmp_path):
    plain = {"criterion": "wpac", "units": "", "compensation": "none"}
    few = {"data__images": 5, "data__batch_size": 16}
    _, said = contracted(files, "padded", **plain, **few)
    assert "5 calibration images" in said and " on 5 of them" in said
    rng = np.random.default_rng(0)
    pictures = [encoded(int(v), size=(16, 16)) for v in rng.integers(0, 256, 8)]
    members = {f"{i}.png": b"words" if i < 5 else p for i, p in enumerate(pictures)}
    tar = write_tar(tmp_path / "bad.tar", members)
    changes = {"data__images": 0, "data__batch_size": 4, "cost": "top_logit"}
    changes |= {"data__source": tar, "data__on_bad_image": "skip"}
    _, said = contracted(files, "skipped", **plain, **changes)
    assert "3 calibration images" in said and " on 3 of them" in said


def test_a_repaired_cut_is_the_same_masked_and_extracted_and_nearer_the_full(
    balanced, params, batch
):
    network = balanced[0]
    spec, repairs = network.spec, network.compensation
    whole = compensation.repaired(network.params, spec, repairs, WIDTHS)
    masked = ViT(spec).apply(
        {"params": whole}, batch["image"], subnet.masks(spec, WIDTHS)
    )
    small = logits(spec, subnet.extract(whole, WIDTHS), batch, WIDTHS)
    np.testing.assert_allclose(masked, small, rtol=1e-5, atol=1e-5)
    full = logits(spec, params, batch)
    plain = subnet.extract(network.params, WIDTHS)
    lost = np.square(logits(spec, plain, batch, WIDTHS) - full).mean()
    assert np.square(small - full).mean() < 0.8 * lost


def test_extraction_gives_the_repaired_weights_without_data(balanced, batch):
    network = balanced[0]
    small, level = commands.subnet_within(network, cost=macs.macs, limit=0.5)
    assert level > 0
    whole = compensation.repaired(
        network.params, network.spec, network.compensation, small.widths
    )
    want = logits(
        network.spec, subnet.extract(whole, small.widths), batch, small.widths
    )
    got = logits(small.spec, small.params, batch, small.widths)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["importance", "loss"])
def test_a_list_is_measured_on_the_network_and_reaches_its_share(files, kind):
    network, _ = contracted(
        files,
        kind,
        list__kind=kind,
        list__share=0.5,
        list__attn=4,
        list__mlp=4,
        list__stages=2,
    )
    spec, levels = network.spec, network.dropout_list
    last = levels.widths(int(levels.levels), spec)
    share = macs.macs(spec, last) / macs.macs(spec)
    assert int(levels.levels) > 3
    assert (share <= 0.5) if kind == "loss" else (0.5 <= share < 0.7)
    tied = np.array_equal(levels.qk_dim, levels.vo_dim)
    assert tied == (kind == "importance")


def test_every_round_of_a_list_by_loss_has_other_images(files, spec):
    source = sources.open_source(f"npz:{files}/images.npz")
    batches = data.eval_batches(source, spec.replace(crop_fraction=1.0), batch_size=8)
    turns = feed.InTurn(batches, sharding.mesh(), images=16, seed=0)
    seen = [np.concatenate([np.asarray(b["image"]) for b in turns]) for _ in range(4)]
    assert all(len(images) == 16 for images in seen)
    first_round = np.concatenate(seen[:3]).reshape(48, -1)
    every = np.stack([source[i].image for i in range(48)]).reshape(48, -1)
    np.testing.assert_array_equal(
        first_round[np.lexsort(first_round.T)], every[np.lexsort(every.T)]
    )
    assert not np.array_equal(first_round, every)  # in an order of its own
    np.testing.assert_array_equal(seen[3], seen[0])


def test_a_list_may_save_parameters_instead(files):
    network, _ = contracted(
        files, "smaller", list__kind="loss", list__share=0.4, list__cost="params"
    )
    spec, levels = network.spec, network.dropout_list
    last = levels.widths(int(levels.levels), spec)
    assert macs.param_count(spec, last) <= 0.6 * macs.param_count(spec)


def test_a_list_may_save_time_as_it_was_profiled(files):
    """In a profile where hidden units cost nothing to speak of, they are kept longest."""
    spec = checkpoint.load_supernet(files / "net").spec
    times = latency.Latency(1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-9)
    name, lanes = time_budget.device_name(), {"attn_lane": 1, "mlp_lane": 1}
    found = time_budget.Profile(name, "float32", spec, lanes, {4: times}, {}, [])
    (files / "profile").mkdir()
    time_budget.write(files / "profile", found, rounds=1)
    network, _ = contracted(
        files,
        "faster",
        list__kind="loss",
        list__share=0.4,
        list__cost="latency",
        list__attn=4,
        list__mlp=4,
        list__profile=str(files / "profile"),
    )
    levels = network.dropout_list
    last = levels.widths(int(levels.levels), spec)
    full = SubnetSpec.full(spec)
    assert latency.seconds(times, last) <= 0.6 * latency.seconds(times, full)
    assert sum(last.mlp_dim) > 0.8 * sum(full.mlp_dim)
    assert sum(last.qk_dim) < 0.6 * sum(full.qk_dim)


def test_measured_units_are_in_every_block_one_of_the_orders_tried(spec, params, batch):
    full = piad.from_rows([SubnetSpec.full(spec)], spec)
    network = Supernet(params, spec, full, {})
    recipe = recipes.Recipe(contraction.CRITERIA["wpac"], compensation="mean")
    stats = statistics.collect(
        ViT(spec),
        params,
        [batch],
        weightings=recipe.criterion.weightings,
        moments=recipe._replace(units="measured").moments(),
    )

    def kernels(units):
        recipe_of = recipe._replace(units=units)
        turned = recipes.contracted(network, stats, recipe_of, batches=[batch])
        return [
            np.asarray(turned.params[f"block_{i}"]["mlp"]["fc1"]["kernel"])
            for i in range(spec.depth)
        ]

    alone = [kernels(name) for name in recipes.MEASURED_ORDERS]
    for i, kernel in enumerate(kernels(recipes.MEASURED)):
        assert any(np.array_equal(kernel, other[i]) for other in alone)


def test_a_network_that_loses_less_is_chosen_in_the_block_where_it_does(
    balanced, batch
):
    """Without its repair a block of the second network loses more than in the first."""
    network = balanced[0]
    mlp = list(network.compensation.mlp)
    mlp[1] = mlp[1]._replace(mean=mlp[1].mean + 3, factor=None)
    worse = network._replace(compensation=network.compensation._replace(mlp=tuple(mlp)))
    first = list(network.compensation.mlp)
    first[0] = first[0]._replace(mean=first[0].mean + 3, factor=None)
    other = network._replace(
        compensation=network.compensation._replace(mlp=tuple(first))
    )
    names = unit_choice.chosen({"a": worse, "b": other}, [batch])
    assert names[:2] == ("a", "b")


def test_heads_are_tied_if_asked(files):
    network, _ = contracted(
        files, "tied", list__kind="loss", list__share=0.4, list__tie_heads=True
    )
    np.testing.assert_array_equal(
        network.dropout_list.qk_dim, network.dropout_list.vo_dim
    )


def test_means_alone_and_half_precision_are_stored_as_asked(files):
    means, _ = contracted(files, "means", compensation="mean")
    assert means.compensation.mlp[0].factor is None
    half, _ = contracted(files, "half", compensation_dtype="bfloat16")
    assert half.compensation.mlp[0].factor.dtype.name == "bfloat16"
    assert half.compensation.mlp[0].mean.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"criterion": "magic"}, "choose one of wpac"),
        ({"units": "best"}, "units 'best': choose one of ''"),
        ({"compensation": "all"}, "choose one of none, mean, least_squares"),
        ({"tokens": "heavy"}, "heavy"),
        ({"balanced.parts": "mlp"}, "name 'qk', 'vo' or both"),
        ({"balanced.keys": "none"}, "choose one of"),
        ({"list.kind": "best"}, "choose one of"),
        ({"list.share": 1.0}, "list.share = 1.0"),
        ({"list.kind": "loss", "list.cost": "joules"}, "macs, params, latency"),
        ({"list.kind": "loss", "list.cost": "latency"}, "needs list.profile=DIR"),
        ({"list.kind": "loss", "list.attn": 0}, "list.attn = 0 must be at least 1"),
        ({"list.kind": "loss", "list.mlp": -1}, "list.mlp = -1 must be at least 1"),
        ({"list.kind": "importance", "list.sensitivity": "foo"}, "'foo': choose one"),
        ({"list.kind": "importance", "list.share": 0.999}, "share = 0.999 cannot be r"),
        ({"list.kind": "loss", "list.share": 0.999}, "saves 0.9.* of its cost"),
        ({"cost": "foo"}, "cost 'foo': choose one of"),
        ({"seed": -1}, "seed = -1 must be 0 to"),
    ],
)
def test_options_that_do_not_exist_are_refused_before_the_pass(
    files, monkeypatch, change, message
):
    monkeypatch.setattr(statistics, "_add_batch", None)
    config = config_of(files)
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        contracting.contract(config, workdir=str(files / "bad"), overwrite=False)
    assert not (files / "bad").exists()


def test_a_place_where_nothing_can_be_written_is_named_before_the_pass(
    files, monkeypatch
):
    if not pathlib.Path("/proc/self").exists():
        pytest.skip("no file system here that refuses all")
    monkeypatch.setattr(commands, "load_network", None)
    with pytest.raises(ValueError, match="/proc/foo cannot be made: nothing can be"):
        contracting.contract(config_of(files), workdir="/proc/foo", overwrite=False)


# Images without labels.

OTHER = np.array([7, -1, 99], np.int32)  # no classes of five


@pytest.fixture(scope="module")
def tar(tmp_path_factory):
    """Eight images, more than the five classes, in three folders."""
    names = [f"{'abc'[i % 3]}/{i:04d}.png" for i in range(8)]
    members = {n: encoded(20 * i, size=(16, 16)) for i, n in enumerate(names)}
    return write_tar(tmp_path_factory.mktemp("tar") / "images.tar", members)


def test_the_costs_that_read_no_label_are_those_that_labels_do_not_change():
    rng = np.random.default_rng(0)
    logits, current = rng.normal(size=(2, 3, 5)).astype(np.float32)
    right = np.array([0, 1, 2], np.int32)
    free = {
        name
        for name, cost in costs.COSTS.items()
        if np.array_equal(cost(logits, right), cost(logits, OTHER))
    }
    assert free == set(contracting.LABEL_FREE_COSTS)
    right = logits.argmax(-1).astype(np.int32)
    free = {
        name
        for name, read in importance.SENSITIVITIES.items()
        if np.array_equal(read(logits, current, right), read(logits, current, OTHER))
    }
    assert free == set(contracting.LABEL_FREE_SENSITIVITIES)


@pytest.mark.parametrize(
    ("cost", "kind", "sensitivity", "reads"),
    [
        ("logit", "uniform", "kl", True),
        ("cross_entropy", "loss", "kl", True),
        ("top_logit", "uniform", "cross_entropy", False),
        ("self_kl", "loss", "cross_entropy", False),
        ("top_logit", "importance", "cross_entropy", True),
        ("top_logit", "importance", "accuracy", True),
        ("top_logit", "importance", "kl", False),
        ("feature", "importance", "feature", False),
    ],
)
def test_labels_are_read_by_the_cost_and_by_importance(
    files, cost, kind, sensitivity, reads
):
    changes = {"list__kind": kind, "list__sensitivity": sensitivity}
    config = config_of(files, cost=cost, **changes)
    assert contracting.reads_labels(config) == reads


@pytest.mark.parametrize("kind", ["importance", "loss"])
@pytest.mark.parametrize("labels", ["", "sorted"])
def test_a_tar_without_labels_calibrates_what_reads_none(files, tar, kind, labels):
    config = config_of(files, cost="top_logit", list__kind=kind, units="measured")
    config.data.source, config.data.labels, config.data.images = tar, labels, 8
    config.data.batch_size, config.list.images, config.list.sensitivity = 8, 4, "kl"
    config.list.share, config.list.stages, config.list.attn = 0.3, 1, 2
    folder = str(files / f"free_{kind}")
    contracting.contract(config, workdir=folder, overwrite=True)
    network = checkpoint.load_supernet(folder)
    assert network.provenance["calibration_images"] == 8
    assert int(network.dropout_list.levels) >= 1


def test_what_reads_labels_is_refused_without_them_as_ever(files, tar):
    config = config_of(files, cost="logit")
    config.data.source, config.data.images = tar, 8
    with pytest.raises(ValueError, match="3 class folders .* the network 5 classes"):
        contracting.contract(config, workdir=str(files / "no"), overwrite=True)
    config.data.labels = "sorted"
    with pytest.raises(ValueError, match="and there are 8 images for 5 classes"):
        contracting.contract(config, workdir=str(files / "no"), overwrite=True)
