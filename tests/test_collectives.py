"""What devices send each other in a step and in a pass, as compiled, against theory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collectives import axes, collectives, total
from conftest import random_repairs

from flax_skd.method import (
    compensation,
    layers,
    partial_sums,
    piad,
    statistics,
    subnet,
    vit,
)
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import ViT
from flax_skd.run import distillation, mixing, objective, sharding, train, updates

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight (virtual) devices"
)
# Sizes that eight devices divide where rules cut them, and no two alike by chance.
SPEC = ViTSpec(
    image_size=16,
    patch_size=4,
    width=24,
    depth=2,
    num_heads=2,
    mlp_dim=40,
    num_classes=5,
)
BATCH = 16
SCALARS = 2 * 4  # loss and accuracy


@functools.cache
def shapes():
    """Parameters by path, without a number in them."""
    tree = jax.eval_shape(lambda: vit.init(SPEC, jax.random.key(0)))
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in paths}


def size(keep=lambda path: True):
    return 4 * sum(math.prod(x.shape) for p, x in shapes().items() if keep(p))


@functools.cache
def compiled(*, taught=False, mixed=False, repaired=False, **shape):
    """Collectives of the train step of `fit` on a mesh, and the mesh."""
    mesh = sharding.mesh(shape, devices=jax.devices()[: math.prod(shape.values())])
    optimizer = train.make_optimizer(1e-3)
    state = jax.eval_shape(
        lambda: train.initial_state(
            params := vit.init(SPEC, jax.random.key(0)),
            optimizer,
            jax.random.key(1),
            extra=objective.Elastic(piad.uniform(SPEC), random_repairs(SPEC))
            if repaired
            else None,
            frozen=params if taught else None,
        )
    )
    place = sharding.param_sharding(state, mesh)
    cut_of = objective.sampled_levels(SPEC) if repaired else objective.whole
    loss = objective.classification_loss(ViT(SPEC), cut_of=cut_of)
    if taught:
        teacher = distillation.frozen(ViT(SPEC), student=SPEC)
        loss = distillation.with_teacher(ViT(SPEC), teacher)
    if mixed:
        plain = loss
        options = mixing.Mixing(mixup=0.8, cutmix=1.0, smoothing=0.1, erase=0.25)

        def loss(params, batch, rng, state):
            batch = mixing.mixed_batch(rng, batch, SPEC, options)
            return plain(params, batch, rng, state)

    step_of = updates.compiled(
        mesh, place, several=False, optimizer=optimizer, ema_decay=0.9
    )
    batch = {
        "image": jax.ShapeDtypeStruct((BATCH, 16, 16, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((BATCH,), np.int32),
    }
    program = step_of(loss).lower(state, batch).compile()
    return collectives(program.as_text(), mesh.size), mesh


def over(found, mesh, *names):
    return [c for c in found if axes(c, mesh) == names]


def activations(examples):
    """Bytes of the residual stream of so many images."""
    return 4 * examples * SPEC.num_tokens * SPEC.width


def test_a_sum_over_images_in_a_given_order_gathers_none_of_them():
    """Of the position embedding's gradient, on GPUs."""
    mesh = sharding.mesh()
    step = jax.jit(
        lambda g: layers.sum_in_order(2 * g),
        in_shardings=sharding.batch_sharding(mesh),
        out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
    )
    g = jax.ShapeDtypeStruct((BATCH, 3, 4), jnp.float32)
    found = collectives(step.lower(g).compile().as_text(), 8)
    assert [c.kind for c in found] == ["all-reduce"]
    assert total(found, "all-reduce") == 4 * 3 * 4
    ones = np.ones(g.shape, np.float32)
    np.testing.assert_array_equal(step(ones), np.full((3, 4), 2 * BATCH))


def test_data_parallelism_sums_every_gradient_once_and_sends_nothing_else():
    found, mesh = compiled(data=8)
    assert {c.kind for c in found} == {"all-reduce"}
    assert found == over(found, mesh, "data")
    assert total(found, "all-reduce") == size() + SCALARS


@pytest.mark.parametrize(
    "shape", [{"data": 8}, {"data": 5}, {"data": 2, "fsdp": 2, "model": 2}]
)
def test_every_device_repairs_its_columns_of_a_cut_and_gathers_the_others(shape):
    mesh = sharding.mesh(shape, devices=jax.devices()[: math.prod(shape.values())])
    repairs, params = random_repairs(SPEC), vit.init(SPEC, jax.random.key(0))
    widths = subnet.as_data(SubnetSpec(*([7, 12], [7, 12], [30, 40])))

    def cut(params, widths):
        return compensation.repaired(params, SPEC, repairs, widths)

    def back(made):
        return lambda p, w, g: jax.vjp(lambda p: made(p, w), p)[1](g)[0]

    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shared = updates._on(mesh, cut)
    for alone, mine, inputs in (
        (cut, shared, (params, widths)),
        (back(cut), back(shared), (params, widths, params)),
    ):
        whole = jax.jit(alone).lower(*inputs).compile()
        part = jax.jit(mine, in_shardings=place, out_shardings=place)
        part = part.lower(*inputs).compile()
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            *(jax.device_get(f(*inputs)) for f in (part, whole)),
        )
        if mesh.size == 8:
            work = [f.cost_analysis()["flops"] for f in (part, whole)]
            assert (
                work[0] < work[1] / 5
            )  # an eighth, and the means, which are not shared
        found = collectives(part.as_text(), mesh.size)
        assert {c.kind for c in found} == {"all-gather"}
        columns = mesh.size * -(-SPEC.width // mesh.size)
        rows = 2 * (SPEC.num_heads * SPEC.head_dim + SPEC.mlp_dim + 2)
        assert total(found, "all-gather") <= 4 * rows * columns


def test_mixing_sends_images_and_labels_to_the_mirror_device_and_nothing_more():
    found, _ = compiled(mixed=True, data=8)
    sums = [c for c in found if c.kind == "all-reduce"]
    assert total(sums, "all-reduce") == size() + SCALARS
    assert {c.kind for c in found} == {"all-reduce", "collective-permute"}
    image = SPEC.in_channels * SPEC.image_size**2
    sent = BATCH // 8 * 4 * (image + SPEC.num_classes)
    assert total(found, "collective-permute") == sent


def cut(path):
    return path.endswith("kernel")  # of width 24, which 8 divides; norms stay whole


def test_fsdp_gathers_parameters_once_and_sums_gradients_once():
    found, _ = compiled(fsdp=8)
    assert {c.kind for c in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert total(found, "all-gather") == size(cut)
    # A scatter leaves an eighth of what comes in. Where the compiler has none (CPU), it
    # sums whole gradients and cuts them: twice the bytes on the links.
    summed = total(found, "all-reduce") + 8 * total(found, "reduce-scatter")
    # The norm of the parameters, a number for each array that is cut.
    norms = 4 * sum(map(cut, shapes()))
    assert summed == size() + SCALARS + norms


def test_fsdp_cuts_a_teacher_too_and_gathers_it_once():
    alone, _ = compiled(fsdp=8)
    found, _ = compiled(taught=True, fsdp=8)
    assert total(found, "all-gather") == 2 * size(cut)
    kinds = ("all-reduce", "reduce-scatter")
    more = sum(total(found, kind) - total(alone, kind) for kind in kinds)
    assert more == 4  # the divergence, logged


def test_fsdp_cuts_the_factors_of_repairs_and_gathers_each_once():
    alone, _ = compiled(repaired=True, data=8)
    found, _ = compiled(repaired=True, fsdp=8)
    rows = SPEC.num_heads * SPEC.head_dim, SPEC.mlp_dim
    factors = 4 * SPEC.depth * sum(n * n for n in rows)
    gathers = total(found, "all-gather") - total(alone, "all-gather")
    assert gathers == factors + size(cut)


def test_tensor_parallelism_sums_activations_after_and_before_each_branch():
    found, _ = compiled(model=2)
    assert {c.kind for c in found} == {"all-reduce"}
    stream = [c for c in found if c.bytes >= activations(BATCH)]
    forward = [c for c in stream if "transpose" not in c.source]
    assert [c.bytes for c in forward] == [activations(BATCH)] * 2 * SPEC.depth
    # Queries, keys and values are one product, and so is the gradient of what they read.
    # A small gradient may share an operation with it.
    backward = [c.bytes // activations(BATCH) for c in stream if c not in forward]
    assert backward == [1] * 2 * SPEC.depth


@pytest.mark.parametrize("shape", [{"data": 4, "model": 2}, {"data": 2, "fsdp": 4}])
def test_no_activations_of_other_examples_are_gathered(shape):
    found, mesh = compiled(**shape)
    for c in found:
        moved = c.kind in ("all-gather", "all-to-all", "collective-permute")
        assert not (moved and "data" in axes(c, mesh)), c
        assert not any(BATCH * SPEC.num_tokens in s or BATCH in s for s in c.shapes), c


def statistics_program(moments):
    """Collectives of one batch of the pass on eight devices, and those at its end."""
    mesh = sharding.mesh()
    rows = sharding.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((BATCH, 16, 16, 3), np.float32, sharding=rows),
        "label": jax.ShapeDtypeStruct((BATCH,), np.int32, sharding=rows),
        "weight": jax.ShapeDtypeStruct((BATCH,), np.float32, sharding=rows),
    }
    spec = SPEC.replace(depth=1)
    params = jax.eval_shape(lambda: vit.init(spec, jax.random.key(0)))
    model, place = ViT(spec), partial_sums.place_of(batch["weight"])
    pilot = jax.eval_shape(
        functools.partial(statistics.pilot_means, model), params, batch
    )
    like = jnp.zeros(()), statistics._shapes(model, ("gradient",), moments)
    sums = partial_sums.zeros(like, place)
    options = lambda logits, labels: logits[:, 0], moments, 1
    args = (model, options, place, sums, batch, (params, pilot, None))
    each = statistics._add_batch.lower(*args).compile()
    last = partial_sums.joined.lower(sums).compile()
    size = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(like))
    return *(collectives(p.as_text(), 8) for p in (each, last)), size


def test_statistics_are_exchanged_once_a_pass_and_not_at_every_batch():
    each, last, size = statistics_program(("gradient",))
    assert each == []
    assert {c.kind for c in last} == {"all-reduce"}
    assert total(last, "all-reduce") == size


HLO = """
  %all-reduce.1 = (f32[24]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), channel_id=1, \
replica_groups=[2,4]<=[8], to_apply=%add, metadata={op_name="jit(f)/sum"}
  %g = f32[8,16]{1,0} all-gather(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}
  %r = f32[] reduce-scatter-start(%y), replica_groups=[4,2]<=[2,2,2]T(2,0,1), to_apply=%add
  %m = f32[4] all-gather(%w), channel_id=1, replica_groups=mesh['axis_0'=2,'axis_1'=4], \
device_ids=([2,2,2]T(1,0,2)) {'axis_0'}, dimensions={0}
  %p = u8[3]{0} collective-permute(%z), source_target_pairs={{0,1},{1,0}}
  %no = f32[8]{0} add(%all-reduce.1, %g)
"""


def test_bytes_groups_and_sources_are_read_from_text():
    found = collectives(HLO, 8)
    assert [c.kind for c in found] == [
        *("all-reduce", "all-gather", "reduce-scatter"),
        *("all-gather", "collective-permute"),
    ]
    assert [c.bytes for c in found] == [24 * 4 + 6 * 2, 8 * 16 * 4, 4, 16, 3]
    assert found[0].source == "jit(f)/sum" and found[0].shapes == ((24,), (2, 3))
    mesh = sharding.mesh({"data": 2, "fsdp": 2, "model": 2})
    assert axes(found[0], mesh) == ("fsdp", "model")
    assert axes(found[1], mesh) == ("data",)
    assert found[2].groups == {frozenset(g) for g in ((0, 2), (4, 6), (1, 3), (5, 7))}
    assert axes(found[2], mesh) == ("fsdp",)
    assert found[3].groups == {frozenset(g) for g in ((0, 2), (1, 3), (4, 6), (5, 7))}
    assert axes(found[4], mesh) == ("model",)
