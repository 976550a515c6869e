"""Every number of a training config reaches what it is of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_skd.io import augment, checkpoint, data, sources
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import costs, growth, importance, piad, subnet, vit
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import (
    config_files,
    configured_loss,
    lists,
    mixing,
    objective,
    programs,
    train,
    training,
)

pytestmark = pytest.mark.usefixtures("one_device")
IMAGES, PER_EPOCH = 40, 5  # five batches of eight


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("files") / "images.npz"
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, 16, 16, 3)).astype(np.uint8)
    np.savez(file, images=images, labels=np.arange(IMAGES) % 5)
    return f"npz:{file}"


def config_of(name, source):
    config = config_files.load(f"configs/{name}.py")
    config.data.source, config.data.eval_source = source, ""
    config.data.batch_size = 8
    return config


@pytest.fixture(scope="module")
def reached(source, tmp_path_factory):
    """(config of unusual numbers, what `train.fit` is given for it)."""
    config = config_of("scratch", source)
    config.model.update(
        {"image_size": 16, "patch_size": 4, "num_classes": 5, "in_channels": 3}
    )
    config.data.augment.update({"name": "deit", "flip": 0.9, "min_scale": 0.4})
    config.update(
        {"epochs": 4.0, "warmup_epochs": 1.0, "lr": 0.02, "min_lr": 0.003, "seed": 7}
    )
    config.update({"weight_decay": 0.3, "clip_norm": 0.25, "ema_decay": 0.97})
    config.update({"drop_path": 0.4, "label_smoothing": 0.3, "accumulate": 2})
    config.update({"checkpoint_every": 11, "evaluate_epochs": 2.0})
    given = {}

    def fit(state, batches, **options):
        given.update(options, state=state, batch=next(batches))
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", fit)
        workdir = str(tmp_path_factory.mktemp("run") / "run")
        training.train(config, workdir=workdir, overwrite=False, resume=False)
    return config, given


def test_epochs_become_steps(reached):
    _, given = reached
    assert given["steps"] == 4 * PER_EPOCH
    assert given["evaluate_every"] == 2 * PER_EPOCH
    assert given["epoch_steps"] == PER_EPOCH
    assert given["checkpoint_every"] == 11 and given["accumulate"] == 2
    assert given["ema_decay"] == 0.97
    np.testing.assert_array_equal(
        jax.random.key_data(given["state"].rng), jax.random.key_data(jax.random.key(8))
    )


def test_the_rate_rises_in_the_warm_up_and_falls_to_the_least(reached):
    _, given = reached
    rates = [float(given["schedule"](step)) for step in (0, PER_EPOCH, 4 * PER_EPOCH)]
    np.testing.assert_allclose(rates, [0, 0.02, 0.003], atol=1e-7)
    assert float(given["schedule"](PER_EPOCH - 1)) == pytest.approx(0.02 * 4 / 5)


def test_the_optimizer_has_the_rate_the_decay_and_the_clipping_of_the_config(reached):
    _, given = reached
    rate = train.cosine(0.02, steps=20, warmup_steps=5, end=0.003)
    plain = train.make_optimizer(rate, weight_decay=0.3, clip_norm=0.25)
    params = {"kernel": np.array([2.0, -1.0], np.float32)}
    moments = [o.init(params) for o in (given["optimizer"], plain)]
    with jax.numpy_dtype_promotion("standard"):  # as in `train_step`
        for size in (0.1, 30.0, 0.2):
            grads = {"kernel": np.array([size, 3 * size], np.float32)}
            (mine, moments[0]), (want, moments[1]) = (
                optimizer.update(grads, state, params)
                for optimizer, state in zip((given["optimizer"], plain), moments)
            )
            np.testing.assert_allclose(mine["kernel"], want["kernel"], rtol=1e-6)
    assert np.abs(want["kernel"]).min() > 1e-3


def test_the_loss_drops_paths_and_smooths_labels_as_told(reached, batch):
    config, given = reached
    state, rng = given["state"], jax.random.key(3)
    model = ViT(training.spec_of(config.model))
    # A fresh head is zero, whatever is dropped before it.
    params = {**state.params, "head": {**state.params["head"]}}
    params["head"]["kernel"] = jax.random.normal(
        rng, state.params["head"]["kernel"].shape
    )
    plain = objective.classification_loss(model, label_smoothing=0.3, drop_path=0.4)
    want, mine = (
        jax.jit(loss)(params, batch, rng, state)[0] for loss in (plain, given["loss"])
    )
    np.testing.assert_allclose(mine, want, rtol=1e-6)


def test_images_are_augmented_and_ordered_as_told(reached, source):
    config, given = reached
    spec = training.spec_of(config.model)
    plain = data.train_batches(
        sources.open_source(source, num_classes=5),
        spec,
        batch_size=8,
        seed=7,
        augment=functools.partial(augment.deit, scale=(0.4, 1.0), flip=0.9),
    )
    for name, want in next(plain).items():
        np.testing.assert_array_equal(given["batch"][name], want)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("none", augment.none),
        (
            "flip_crop",
            functools.partial(augment.flip_crop, scale=(0.3, 1.0), flip=0.8),
        ),
        ("deit", functools.partial(augment.deit, scale=(0.3, 1.0), flip=0.8)),
        ("shift_crop", functools.partial(augment.shift_crop, pad=3, flip=0.8)),
    ],
)
def test_each_augmentation_takes_its_options_from_the_config(spec, name, plain):
    options = config_files.load("configs/scratch.py").data.augment
    options.update({"name": name, "flip": 0.8, "min_scale": 0.3, "pad": 3})
    image = np.random.default_rng(0).integers(0, 256, (24, 20, 3)).astype(np.uint8)
    for seed in range(8):
        mine, want = (
            made(image, np.random.default_rng(seed), spec)
            for made in (training.augment_named(options), plain)
        )
        np.testing.assert_array_equal(mine, want)


@pytest.mark.parametrize("of", ["one size", "levels"])
def test_images_are_mixed_as_the_config_says_and_labels_smoothed_once(
    spec, params, batch, of
):
    config = config_files.load("configs/piad.py")
    config.mixing.update({"mixup": 0.3, "cutmix": 0.7, "switch": 0.2, "erase": 0.6})
    config.label_smoothing = 0.2
    batch, rng = jax.tree.map(jnp.asarray, batch), jax.random.key(5)
    groups = growth.Groups(4, 8)
    extra = objective.Elastic(growth.start(spec, groups))  # the full network alone
    state = train.TrainState(jnp.int32(0), params, None, None, None, extra)
    loss = {
        "one size": lambda: configured_loss.ordinary(config, ViT(spec)),
        "levels": lambda: configured_loss.of_piad(config, ViT(spec), groups),
    }[of]()
    value, _ = jax.jit(loss)(params, batch, rng, state)
    first, rest = jax.random.split(rng)
    options = mixing.Mixing(0.3, 0.7, switch=0.2, smoothing=0.2, erase=0.6)
    mixed = mixing.mixed_batch(first, batch, spec, options)
    plain = objective.classification_loss(ViT(spec))
    want, _ = plain(params, mixed, rest, state)
    np.testing.assert_allclose(value, want, rtol=1e-5)


def test_the_list_of_piad_grows_by_the_options_of_the_config_and_on_repaired_cuts(
    spec, params, source, monkeypatch
):
    config = config_of("piad", source)
    config.update({"epochs": 8.0, "seed": 3})
    options = {"share": 0.6, "progressive_epochs": 6.0, "grow_epochs": 2.0}
    config.piad.update(options | {"cost": "self_kl", "sensitivity": "kl"})
    config.piad.groups.update({"attn": 4, "mlp": 8})
    config.piad.calibration.update({"source": source, "images": 16, "batch_size": 8})
    spec = spec.replace(crop_fraction=1.0)
    repairs = {"what": np.arange(3.0)}  # handed on, whatever it is
    full = piad.from_rows([SubnetSpec.full(spec)], spec)
    program = programs.piad_program(config, Supernet(params, spec, full, {}, repairs))
    assert program.stages == 3 and program.every_epochs == 2.0
    given = {}

    def grown(levels, stage, **options):
        given.update(options, stage=stage)
        return "a longer list"

    monkeypatch.setattr(lists, "grown", grown)
    state = train.TrainState(0, params, None, None, None, program.extra)
    assert program.before_epoch(2, state).dropout_list == "a longer list"
    assert given["stage"] == 2 and given["stages"] == 3 and given["share"] == 0.6
    assert given["groups"] == growth.Groups(4, 8)
    assert given["cost"] is costs.cost_named("self_kl", 5)
    assert given["sensitivity"] is importance.sensitivity_named("kl", 5)
    np.testing.assert_array_equal(given["repairs"]["what"], np.arange(3.0))
    seen = np.concatenate([np.asarray(b["image"]) for b in given["batches"]])
    chosen = sources.take(sources.open_source(source), 16, seed=3)
    np.testing.assert_array_equal(seen, [chosen[i].image for i in range(16)])
    assert program.before_epoch(3, state) is state.extra  # it is whole by then
    config.epochs, config.piad.progressive_epochs, config.piad.grow_epochs = 1, 0, 1 / 6
    small = programs.piad_program(config, Supernet(params, spec, full, {}))
    assert small.stages == 2  # a third of the run, which is less than an epoch


def test_a_fresh_network_of_a_sub_network_keeps_its_sizes_alone(spec, params):
    widths = SubnetSpec((6, 12, 3), (6, 12, 9), (30, 13, 40))
    small = checkpoint.Subnet(subnet.extract(params, widths), spec, widths, {})
    config = config_files.load("configs/finetune.py")
    config.seed = 4
    kept = programs.finetune(config, small).params
    jax.tree.map(np.testing.assert_array_equal, kept, small.params)
    config.model.fresh = True
    fresh = programs.finetune(config, small).params
    want = vit.init(spec, jax.random.key(4), widths=widths)
    jax.tree.map(np.testing.assert_array_equal, fresh, want)
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, small.params)
