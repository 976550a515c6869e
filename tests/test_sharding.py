"""The mesh: eight devices compute what one computes."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from flax_skd.method.vit import ViT
from flax_skd.run import objective, sharding

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight (virtual) devices"
)


def loss_and_grads(spec, params, batch, mesh):
    loss = objective.classification_loss(ViT(spec), drop_path=0.3)
    place = sharding.param_sharding(params, mesh)
    compute = jax.jit(
        jax.value_and_grad(lambda p, b: loss(p, b, jax.random.key(2), 0)[0]),
        in_shardings=(place, sharding.batch_sharding(mesh)),
    )
    params = jax.device_put(params, place)
    return jax.device_get(compute(params, sharding.shard_batch(batch, mesh)))


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "model": 2}])
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


def test_a_batch_is_shared_out_over_data_and_fsdp():
    mesh = sharding.mesh({"data": 2, "fsdp": 2, "model": 2})
    images = np.arange(8 * 3).reshape(8, 3).astype(np.float32)
    out = sharding.shard_batch({"image": images}, mesh)["image"]
    np.testing.assert_array_equal(out, images)
    assert {s.data.shape for s in out.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize(("size", "near"), [(30, "24 or 32"), (5, "take 8"), (0, "8")])
def test_a_batch_that_does_not_divide_names_the_nearest_that_does(size, near):
    with pytest.raises(ValueError, match=f"batch of {size} .* 8 devices.*{near}"):
        sharding.shard_batch({"label": np.zeros(size, np.int32)}, sharding.mesh())


def test_arrays_of_different_lengths_are_no_batch():
    batch = {"image": np.zeros((8, 2)), "label": np.zeros(16)}
    with pytest.raises(ValueError, match=r"\[8, 16\] examples"):
        sharding.shard_batch(batch, sharding.mesh())


@pytest.mark.parametrize("shape", [{"data": 3}, {"rows": 8}, {"data": 16, "model": 0}])
def test_a_mesh_that_is_not_the_devices_is_refused(shape):
    with pytest.raises(ValueError, match="multiply to the 8 devices"):
        sharding.mesh(shape)


def test_parameters_are_replicated_by_default(params):
    places = sharding.param_sharding(params, sharding.mesh())
    assert jax.tree.structure(places) == jax.tree.structure(params)
    assert all(p.is_fully_replicated for p in jax.tree.leaves(places))


def test_a_rule_cuts_the_axes_that_divide_and_leaves_the_others_whole():
    mesh = sharding.mesh({"data": 2, "model": 4})
    tree = {"block_0": {"fc1": {"kernel": np.zeros((8, 6)), "bias": np.zeros(6)}}}
    rules = (("fc1/kernel", PartitionSpec(("model", "data"), "model")),)
    places = sharding.param_sharding(tree, mesh, rules=rules)["block_0"]["fc1"]
    assert places["kernel"].spec == PartitionSpec(("model", "data"), None)
    assert places["bias"].spec == PartitionSpec()
    rules = ((".", PartitionSpec("fsdp")),)  # an axis this mesh lacks
    places = sharding.param_sharding(tree, mesh, rules=rules)["block_0"]["fc1"]
    assert places["bias"].is_fully_replicated
