"""The mesh: eight devices compute what one computes."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_repairs
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_skd.io import checkpoint, run_state
from flax_skd.method import piad
from flax_skd.method.vit import ViT
from flax_skd.run import (
    buckets,
    config_files,
    objective,
    sharding,
    train,
    training,
)

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight (virtual) devices"
)
CUBE = {"data": 2, "fsdp": 2, "model": 2}


def loss_and_grads(spec, params, batch, mesh):
    loss = objective.classification_loss(ViT(spec), drop_path=0.3)
    place = sharding.param_sharding(params, mesh)
    compute = jax.jit(
        jax.value_and_grad(lambda p, b: loss(p, b, jax.random.key(2), 0)[0]),
        in_shardings=(place, sharding.batch_sharding(mesh)),
    )
    params = jax.device_put(params, place)
    return jax.device_get(compute(params, sharding.shard_batch(batch, mesh)))


@pytest.mark.parametrize("shape", [{"data": 8}, CUBE, {"fsdp": 2, "model": 4}])
def test_eight_devices_give_the_loss_and_gradients_of_one(spec, params, batch, shape):
    batch = jax.tree.map(lambda x: np.concatenate([x, x])[:16], batch)
    one = sharding.mesh({"data": 1}, devices=jax.devices()[:1])
    many = sharding.mesh(shape)
    want_loss, want = loss_and_grads(spec, params, batch, one)
    got_loss, got = loss_and_grads(spec, params, batch, many)
    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)
    # Relative to the largest: the gradient of the keys' bias is zero but for rounding.
    largest = max(np.abs(w).max() for w in jax.tree.leaves(want))
    for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * largest)


def test_inside_a_users_shard_map_gradients_are_those_of_one_device(
    spec, params, batch
):
    images, mesh = batch["image"][:8], sharding.mesh({"data": 8})

    def gradients(params, images):
        total = jax.grad(lambda p: ViT(spec).apply({"params": p}, images).sum())
        return total(params)

    rows, whole = PartitionSpec("data"), PartitionSpec()
    apart = jax.shard_map(gradients, mesh=mesh, in_specs=(whole, rows), out_specs=whole)
    want, got = jax.jit(gradients)(params, images), jax.jit(apart)(params, images)
    largest = max(np.abs(w).max() for w in jax.tree.leaves(want))
    for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * largest)


def test_on_a_users_explicit_axes_auto_axes_gives_what_one_device_does(
    spec, params, batch
):
    images, rows = batch["image"][:8], PartitionSpec("data")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))

    def logits(params, images):
        return ViT(spec).apply({"params": params}, images)

    def both(apply):
        grads = jax.grad(lambda p, images: jnp.square(apply(p, images)).sum())
        return jax.jit(lambda p, images: (apply(p, images), grads(p, images)))

    want = both(logits)(params, images)
    with jax.set_mesh(mesh):
        there = jax.device_put(images, NamedSharding(mesh, rows))
        kept = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        with_auto = jax.sharding.auto_axes(logits, out_sharding=rows)
        got = both(with_auto)(kept, there)
    assert got[0].sharding.spec[0] == "data"
    largest = max(np.abs(w).max() for w in jax.tree.leaves(want))
    for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * largest)


def after_five_steps(spec, params, batch, optimizer, mesh):
    state = train.initial_state(params, optimizer, jax.random.key(3))
    loss = objective.classification_loss(ViT(spec), drop_path=0.3)
    return train.fit(
        state,
        itertools.repeat({k: batch[k][:8] for k in ("image", "label")}),
        loss=loss,
        optimizer=optimizer,
        steps=5,
        mesh=mesh,
        ema_decay=0.9,
    )


# The gradient of the keys' bias is zero, as softmax does not see a shift: AdamW makes
# whole steps of its rounding.
@pytest.mark.parametrize(
    ("optimizer", "but"),
    [(optax.sgd(0.1), "nothing"), (train.make_optimizer(1e-3), "key/bias")],
    ids=["sgd", "adamw"],
)
def test_five_steps_on_a_mesh_of_three_axes_are_those_of_one_device(
    spec, params, batch, optimizer, but
):
    one = sharding.mesh({"data": 1}, devices=jax.devices()[:1])
    want = after_five_steps(spec, params, batch, optimizer, one)
    got = after_five_steps(spec, params, batch, optimizer, sharding.mesh(CUBE))
    moved = 0
    for name in ("params", "ema"):
        before, after = jax.tree.leaves(params), getattr(want, name)
        paths = jax.tree_util.tree_leaves_with_path(after)
        there = jax.tree.leaves(getattr(got, name))
        for (path, w), g, p in zip(paths, there, before, strict=True):
            path = jax.tree_util.keystr(path, simple=True, separator="/")
            if not path.endswith(but):
                np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5, err_msg=path)
                moved += np.abs(w - p).max() > 5e-4
    assert moved > 40  # nearly all arrays of both trees, far beyond the tolerance


# End of path -> into how many parts the array is cut on that mesh.
CUT = {
    **{f"attn/{site}/kernel": 4 for site in ("query", "key", "value", "out")},
    **{f"attn/{site}/bias": 2 for site in ("query", "key", "value")},
    "mlp/fc1/kernel": 4,
    "mlp/fc1/bias": 2,
    "mlp/fc2/kernel": 4,
    "patch_embed/kernel": 2,
    "head/kernel": 2,
}


@pytest.mark.parametrize(("sizes", "shape"), [(True, {"data": 8}), (False, CUBE)])
def test_steps_with_repaired_cuts_are_those_of_one_device(
    spec, params, batch, sizes, shape
):
    level = np.int32(0) if sizes else None
    extra = objective.Elastic(
        piad.uniform(spec, steps=4), random_repairs(spec, seed=2), level
    )

    def loss_of(within):
        cut_of = objective.level_within(spec, within)
        return objective.classification_loss(ViT(spec, within), cut_of=cut_of)

    def trained(mesh):
        options = {}
        if sizes:
            compiled = buckets.Buckets(spec, loss_of, shares=(0.8, 0.5), seed=1)
            options["before_step"] = compiled.before_step
            options["before_loss"] = compiled.before_loss
        cut_of = objective.sampled_levels(spec)
        optimizer = optax.sgd(0.05)
        state = train.fit(
            train.initial_state(params, optimizer, jax.random.key(3), extra=extra),
            itertools.repeat({k: batch[k][:8] for k in ("image", "label")}),
            loss=objective.classification_loss(ViT(spec), cut_of=cut_of),
            optimizer=optimizer,
            steps=3,
            mesh=mesh,
            **options,
        )
        for repair in (*state.extra.compensation.attn, *state.extra.compensation.mlp):
            parts = repair.factor.size // repair.factor.addressable_shards[0].data.size
            assert parts == mesh.size // mesh.shape["data"]
        return jax.device_get(state.params)

    want = trained(sharding.mesh({"data": 1}, devices=jax.devices()[:1]))
    got = trained(sharding.mesh(shape))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), want, params)
    assert max(jax.tree.leaves(moved)) > 1e-3
    for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)


def test_a_state_is_cut_by_its_paths_and_stays_so(spec, params, batch):
    optimizer = train.make_optimizer(1e-3)
    state = after_five_steps(spec, params, batch, optimizer, sharding.mesh(CUBE))
    cut = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state._replace(rng=None)):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        parts = leaf.size // leaf.addressable_shards[0].data.size
        assert parts == next((n for end, n in CUT.items() if path.endswith(end)), 1)
        cut += parts > 1
    # Parameters, both moments of AdamW and the average, of 3 blocks of 10 arrays.
    assert cut == 4 * (3 * 10 + 2)


def test_what_is_cut_can_be_gathered(params):
    mesh = sharding.mesh(CUBE)
    there = sharding.copy_to(params, sharding.param_sharding(params, mesh))
    whole = sharding.gathered(there, mesh)
    assert not all(x.is_fully_replicated for x in jax.tree.leaves(there))
    assert all(x.is_fully_replicated for x in jax.tree.leaves(whole))
    jax.tree.map(np.testing.assert_array_equal, whole, params)


def test_heads_that_do_not_divide_stay_whole(params):
    mesh = sharding.mesh({"data": 1, "model": 8})
    block = sharding.param_sharding(params, mesh)["block_0"]
    assert block["attn"]["query"]["kernel"].is_fully_replicated  # 2 heads
    assert block["mlp"]["fc1"]["kernel"].spec == PartitionSpec(None, "model")


@pytest.mark.parametrize("rest", [-1, 0])
def test_the_data_axis_takes_the_devices_that_are_left(rest):
    mesh = sharding.mesh({"data": rest, "fsdp": 2, "model": 2})
    assert dict(mesh.shape) == CUBE
    with pytest.raises(ValueError, match=r"'fsdp': 3.* multiply to the 8 devices"):
        sharding.mesh({"data": rest, "fsdp": 3})


@pytest.mark.parametrize("name", ["scratch", "transfer", "piad", "finetune"])
def test_every_training_config_has_all_devices_on_one_axis(name):
    mesh = sharding.mesh(config_files.load(f"configs/{name}.py").mesh)
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "model": 1}


def test_the_programs_train_on_the_mesh_of_their_config(tmp_path):
    pytest.importorskip("sklearn")

    def trained(program, folder, *, resume=False, start="", **sizes):
        config = config_files.load(f"configs/{program}.py")
        config.epochs = config.evaluate_epochs = 1
        config.warmup_epochs = 0
        config.data.batch_size = 256
        config.mesh.update(sizes)
        if start:
            config.model.path = str(tmp_path / start / training.NETWORK)
            config.piad.calibration.images = 64
            config.piad.loss = "teacher"
            config.piad.teacher = config.model.path
        else:
            config.model.depth = 1
        workdir = str(tmp_path / folder)
        training.train(config, workdir=workdir, overwrite=False, resume=resume)
        return checkpoint.load_supernet(tmp_path / folder / training.NETWORK)

    first = trained("scratch", "whole", fsdp=2, model=2)
    again = trained("scratch", "whole", resume=True)  # on another mesh
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    grown = trained("piad", "grown", start="whole", fsdp=4, model=2)
    assert int(grown.dropout_list.levels) > 0


def test_a_batch_is_shared_out_over_data_and_fsdp():
    mesh = sharding.mesh(CUBE)
    images = np.arange(8 * 3).reshape(8, 3).astype(np.float32)
    out = sharding.shard_batch({"image": images}, mesh)["image"]
    np.testing.assert_array_equal(out, images)
    assert {s.data.shape for s in out.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize(("size", "near"), [(30, "24 or 32"), (5, "take 8"), (0, "8")])
def test_a_batch_that_does_not_divide_names_the_nearest_that_does(size, near):
    with pytest.raises(ValueError, match=f"batch of {size} .* 8 devices.*{near}"):
        sharding.shard_batch({"label": np.zeros(size, np.int32)}, sharding.mesh())


@pytest.mark.parametrize(("size", "parts"), [(60, 1), (64, 3)])
def test_a_batch_that_does_not_divide_is_refused_before_a_run_is_overwritten(
    tmp_path, size, parts
):
    earlier = tmp_path / run_state.CHECKPOINTS / "100"
    earlier.mkdir(parents=True)
    config = config_files.load("configs/scratch.py")
    config.data.batch_size, config.accumulate = size, parts
    with pytest.raises(ValueError, match=f"a batch of {size} does not divide"):
        training.train(config, workdir=str(tmp_path), overwrite=True, resume=False)
    assert earlier.is_dir()


def test_arrays_of_different_lengths_are_no_batch():
    batch = {"image": np.zeros((8, 2)), "label": np.zeros(16)}
    with pytest.raises(ValueError, match=r"\[8, 16\] examples"):
        sharding.shard_batch(batch, sharding.mesh())


@pytest.mark.parametrize("shape", [{"data": 3}, {"rows": 8}, {"data": 16, "model": 0}])
def test_a_mesh_that_is_not_the_devices_is_refused(shape):
    with pytest.raises(ValueError, match="multiply to the 8 devices"):
        sharding.mesh(shape)


def test_processes_with_unlike_numbers_of_devices_are_refused():
    devices = np.array([types.SimpleNamespace(process_index=i) for i in (0, 0, 1)])
    mesh = types.SimpleNamespace(devices=devices, shape={"data": 3})
    with pytest.raises(ValueError, match=r"each process: \{0: 2, 1: 1\}"):
        sharding._check_processes(mesh)


def test_parameters_are_replicated_by_default(params):
    places = sharding.param_sharding(params, sharding.mesh())
    assert jax.tree.structure(places) == jax.tree.structure(params)
    assert all(p.is_fully_replicated for p in jax.tree.leaves(places))


def test_a_rule_cuts_the_axes_that_divide_and_leaves_the_others_whole():
    mesh = sharding.mesh({"data": 2, "model": 4})
    tree = {"mlp": {"fc1": {"kernel": np.zeros((8, 12)), "bias": np.zeros(6)}}}
    places = sharding.param_sharding(tree, mesh)["mlp"]["fc1"]
    assert places["kernel"].spec == PartitionSpec(None, "model")  # there is no fsdp
    assert places["bias"].is_fully_replicated  # four devices do not divide six
