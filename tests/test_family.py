"""One super-network served at many levels: the same as extract, and little compiled."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_skd.io import checkpoint
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import compensation, macs, piad, subnet
from flax_skd.method.attention import einsum_attention
from flax_skd.method.compensation import Compensation, Repair
from flax_skd.method.latency import Latency
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import time_budget
from flax_skd.run.family import SubnetFamily
from flax_skd.run.time_budget import Profile

TIMES = Latency(3e-3, 5e-4, 2e-5, 4e-5, 3e-4, 1e-5)


@pytest.fixture(scope="module")
def repairs(spec):
    """Means, and factors that are well-conditioned."""
    rng = np.random.default_rng(3)

    def repair(size):
        factor = np.tril(rng.normal(size=(size, size))) / size + np.eye(size)
        mean = rng.normal(size=size)
        return Repair(mean.astype(np.float32), factor.astype(np.float32))

    attn, mlp = compensation.inner_units(spec).values()
    blocks = range(spec.depth)
    return Compensation(
        tuple(repair(attn) for _ in blocks), tuple(repair(mlp) for _ in blocks)
    )


@pytest.fixture(scope="module")
def supernet(spec, params, repairs):
    rows = [
        SubnetSpec.full(spec),
        SubnetSpec((12, 12, 7), (12, 9, 7), (40, 23, 40)),
        SubnetSpec((6, 12, 7), (6, 9, 7), (40, 23, 11)),
        SubnetSpec((6, 0, 7), (6, 0, 5), (0, 23, 11)),
    ]
    return Supernet(params, spec, piad.from_rows(rows, spec), {}, repairs)


@pytest.fixture(scope="module")
def profile(spec):
    lanes = {"attn_lane": 4, "mlp_lane": 8}
    name = time_budget.device_name()
    return Profile(name, "float32", spec, lanes, {1: TIMES}, {}, [])


def by_hand(supernet, widths, images):
    """Extracted as the command does it, and applied."""

    @jax.jit  # eagerly, every little operation compiles
    def logits(params, repairs, images):
        whole = compensation.repaired(params, supernet.spec, repairs, widths)
        small = subnet.extract(whole, widths)
        return ViT(supernet.spec, widths).apply({"params": small}, images)

    return logits(supernet.params, supernet.compensation, images)


def held():
    """Bytes of all arrays on all devices, those that share memory once."""
    buffers = {
        (shard.device, shard.data.unsafe_buffer_pointer()): shard.data.nbytes
        for array in jax.live_arrays()
        for shard in array.addressable_shards
    }
    return sum(buffers.values())


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("repaired", [True, False])
def test_every_level_computes_what_extract_computes(supernet, batch, repaired):
    if not repaired:
        supernet = supernet._replace(compensation=None)
    family = SubnetFamily(supernet)
    levels = supernet.dropout_list
    for level in (3, 0, 2, 1):
        assert family.use(level=level) == family.level == level
        widths = levels.widths(level, supernet.spec)
        assert family.widths == widths
        assert subnet.widths_of(family.params, supernet.spec) == widths
        want = by_hand(supernet, widths, batch["image"])
        np.testing.assert_allclose(family(batch["image"]), want, atol=1e-5)


def test_a_family_from_disk_serves_the_network_saved_in_any_precision(
    tmp_path, supernet, batch
):
    checkpoint.save_supernet(tmp_path / "super", supernet)
    family = SubnetFamily.load(tmp_path / "super")
    want = by_hand(supernet, family.widths, batch["image"])
    np.testing.assert_allclose(family(batch["image"]), want, atol=1e-5)
    short = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), supernet.params)
    half = SubnetFamily(supernet._replace(params=short))
    half.use(level=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {
        jnp.dtype("float32")
    }
    assert np.isfinite(half(batch["image"])).all()


def test_more_than_the_full_network_is_the_full_network(supernet):
    family = SubnetFamily(supernet)
    for limit in (float("inf"), 1e300):
        assert family.use(macs=limit) == family.use(params=limit) == 0


def test_a_level_seen_before_compiles_nothing_again(supernet, batch):
    traces = []

    def counted(*args):
        traces.append(1)
        return einsum_attention(*args)

    family = SubnetFamily(supernet, attention=counted)
    first = {}
    for level in (0, 1, 2):
        family.use(level=level)
        first[level] = family(batch["image"])
    seen, depth = len(traces), supernet.spec.depth
    # Two extractions, three forward passes, each traced once.
    assert family.compiled == 5 and seen == 3 * depth
    for level in (1, 0, 2, 1, 2, 0):
        family.use(level=level)
        np.testing.assert_array_equal(family(batch["image"]), first[level])
    assert family.compiled == 5 and len(traces) == seen
    family(batch["image"][:2])
    assert family.compiled == 6 and len(traces) == seen + depth


def test_no_more_programs_are_kept_than_asked_for(supernet, batch):
    family = SubnetFamily(supernet, executables=3)
    for level in (1, 2, 3):
        family.use(level=level)
        family(batch["image"])
    assert family.compiled == 6 and len(family._programs) == 3
    family.use(level=3)
    family(batch["image"])
    assert family.compiled == 6  # the ones used last are there
    family.use(level=2)
    family(batch["image"])
    # Its extraction was gone, and took the place of its forward pass, used before.
    assert family.compiled == 8 and len(family._programs) == 3
    with pytest.raises(ValueError, match="executables = 1: at least 2"):
        SubnetFamily(supernet, executables=1)


def test_the_device_holds_one_full_copy_and_the_kernels_of_one_level(supernet, batch):
    images = np.asarray(batch["image"])
    host = jax.tree.map(np.array, supernet.params)  # copies
    before, full = held(), size(host)
    family = SubnetFamily(supernet._replace(params=host))
    assert held() - before == full
    for level in (1, 2, 3, 1, 2):
        family.use(level=level)
        family(images)
        # What no cut changes is held once: less than both added up.
        assert full < held() - before < full + size(family.params)
    family.use(level=0)
    assert held() - before == full


def test_what_a_cut_leaves_alone_is_not_copied(supernet):
    family = SubnetFamily(supernet._replace(compensation=None))
    whole = family.params
    family.use(level=1)
    assert family.params["head"]["kernel"] is whole["head"]["kernel"]
    kept = family.params["block_0"]["attn"]["query"]["kernel"]
    assert kept is whole["block_0"]["attn"]["query"]["kernel"]  # 12 of 12 dims


def test_a_compensation_copies_what_a_cut_changes_and_no_more(supernet, spec):
    """One MLP cut: its kernels and the bias that takes the mean of the rest."""
    rows = [SubnetSpec.full(spec), SubnetSpec((12,) * 3, (12,) * 3, (40, 40, 11))]
    levels = piad.from_rows(rows, spec)
    own = {}
    for name, repairs in (("repaired", supernet.compensation), ("cut", None)):
        made = supernet._replace(compensation=repairs, dropout_list=levels)
        family = SubnetFamily(made)
        there = {id(leaf) for leaf in jax.tree.leaves(family.params)}
        family.use(level=1)
        fresh = [x for x in jax.tree.leaves(family.params) if id(x) not in there]
        own[name] = size(fresh)
    bias = supernet.params["block_2"]["mlp"]["fc2"]["bias"]
    assert own["repaired"] == own["cut"] + bias.nbytes


@pytest.mark.parametrize(
    ("unit", "cost"), [("macs", macs.macs), ("params", macs.param_count)]
)
def test_budgets_choose_the_largest_level_within(supernet, unit, cost):
    family, spec = SubnetFamily(supernet), supernet.spec
    sizes = [cost(spec, supernet.dropout_list.widths(i, spec)) for i in range(4)]
    for level, count in enumerate(sizes):
        assert family.use(**{unit: float(count)}) == level
        if level:
            assert family.use(**{unit: (count + 1) / sizes[0]}) == level
    assert family.use(**{unit: 1.0}) == 0


def test_a_budget_in_time_goes_by_the_profile_and_its_lanes(supernet, profile, batch):
    family, spec = SubnetFamily(supernet, profile=profile), supernet.spec
    assert family.levels.qk_dim[2].tolist() == [8, 12, 8]
    cost = profile.predicted(1)
    times = [cost(spec, family.levels.widths(i, spec)) / 1e6 for i in range(4)]
    for level, time in enumerate(times):
        assert family.use(latency_ms=1.001 * time) == level
        assert family.use(images_per_s=999 / time) == level
    want = by_hand(supernet, family.levels.widths(3, spec), batch["image"])
    np.testing.assert_allclose(family(batch["image"]), want, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({}, "give one of level, macs, params, latency_ms, images_per_s; got none"),
        ({"level": 1, "macs": 0.5}, r"got \['level', 'macs'\]"),
        ({"level": 1.0}, "level = 1.0 must be a whole number"),
        ({"level": 4}, r"level 4 does not exist: choose 0 \(full\) to 3"),
        ({"macs": 0.0}, "macs = 0.0 must be above 0"),
        ({"params": float("nan")}, "params = nan must be above 0"),
        ({"macs": 1e-3}, r"the smallest sub-network \(level 3\) costs"),
        ({"latency_ms": 1e-3}, "no level takes 0.001 ms for a batch of 1"),
        ({"latency_ms": -1.0}, "above 0"),
        ({"images_per_s": 9.0, "batch_size": 7}, "batches of 7 were never profiled"),
    ],
)
def test_what_cannot_be_asked_changes_nothing(supernet, profile, asked, complaint):
    family = SubnetFamily(supernet, profile=profile)
    family.use(level=1)
    with pytest.raises(ValueError, match=complaint):
        family.use(**asked)
    assert family.level == 1


def test_time_without_a_profile_or_with_another_networks_is_refused(
    supernet, profile, spec
):
    with pytest.raises(
        ValueError, match="latency_ms = 8 needs times .*flax-skd profile"
    ):
        SubnetFamily(supernet).use(latency_ms=8.0)
    other = profile._replace(spec=spec.replace(width=48))
    with pytest.raises(ValueError, match="width = 48, not 24"):
        SubnetFamily(supernet, profile=other)
    with pytest.raises(ValueError, match="on the dtype 'float32', this is 'bfloat16'"):
        SubnetFamily(supernet, profile=profile, dtype=jnp.bfloat16)
    with pytest.raises(ValueError, match="measured on the device 'an abacus'"):
        SubnetFamily(supernet, profile=profile._replace(device="an abacus"))


def test_images_of_another_size_are_refused(supernet, batch):
    with pytest.raises(ValueError, match="images have shape"):
        SubnetFamily(supernet)(batch["image"][:, :8])


def test_threads_that_call_and_switch_get_the_logits_of_some_level(supernet, batch):
    images = np.asarray(batch["image"])
    family = SubnetFamily(supernet)
    allowed, wrong = [], []
    for level in range(4):
        family.use(level=level)
        allowed.append(np.asarray(family(images)))
    family = SubnetFamily(supernet)

    def calls():
        for _ in range(12):
            got = np.asarray(family(images))
            if not any(np.allclose(got, want, atol=1e-5) for want in allowed):
                wrong.append(got)

    def switches():
        for turn in range(12):
            family.use(level=turn % 4)

    threads = [threading.Thread(target=f) for f in (calls, switches, calls, switches)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and family.compiled <= 3 + 4
