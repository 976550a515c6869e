"""Super-networks and sub-networks on disk: the same comes back, or it is said why."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from flax_skd.io import checked, checkpoint, directory, tensor_layout
from flax_skd.io.checkpoint import Subnet, Supernet
from flax_skd.method import compensation, macs, packing, piad, subnet, vit
from flax_skd.method.spec import SubnetSpec
from flax_skd.run import sharding

PROVENANCE = {"sha256": "0" * 64, "criterion": "wpac", "config": {"batch": [1, 2]}}


@pytest.fixture(scope="module")
def supernet(spec, params):
    return Supernet(params, spec, piad.uniform(spec, steps=4), PROVENANCE)


@pytest.fixture(scope="module")
def small(spec, params):
    widths = SubnetSpec((12, 0, 3), (10, 0, 4), (40, 7, 0))
    cut = subnet.extract(params, widths)
    return Subnet(cut, spec, widths, {"parent": "super", "level": 3})


@pytest.fixture
def saved(tmp_path, supernet):
    checkpoint.save_supernet(tmp_path / "super", supernet)
    return tmp_path / "super"


@pytest.fixture
def saved_small(tmp_path, small):
    checkpoint.save_subnet(tmp_path / "small", small)
    return tmp_path / "small"


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        assert g.dtype == w.dtype
        assert isinstance(g, np.ndarray)
        np.testing.assert_array_equal(g, w)


def edit(path, **changes):
    fields = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            fields.pop(key, None)
        else:
            fields[key] = value
    path.write_text(json.dumps(fields))


def test_a_super_network_comes_back_as_it_was(saved, supernet):
    got = checkpoint.load_supernet(saved)
    assert_same(got.params, supernet.params)
    for table, want in zip(got.dropout_list, supernet.dropout_list):
        np.testing.assert_array_equal(table, want)
        assert table.dtype == np.int32
    assert (got.spec, got.provenance) == (supernet.spec, PROVENANCE)


def test_room_for_more_levels_comes_back(tmp_path, supernet, spec):
    rows = [supernet.dropout_list.widths(i, spec) for i in range(2)]
    levels = piad.from_rows(rows, spec, max_levels=5)
    checkpoint.save_supernet(tmp_path / "s", supernet._replace(dropout_list=levels))
    got = checkpoint.load_supernet(tmp_path / "s").dropout_list
    assert got.qk_dim.shape == (6, spec.depth)
    assert int(got.levels) == 1


def test_bfloat16_parameters_come_back_as_bfloat16(tmp_path, supernet, small):
    def half(params):
        return jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)

    wide = supernet._replace(params=half(supernet.params))
    checkpoint.save_supernet(tmp_path / "a", wide)
    assert_same(checkpoint.load_supernet(tmp_path / "a").params, wide.params)
    narrow = small._replace(params=half(small.params))
    checkpoint.save_subnet(tmp_path / "b", narrow)
    assert_same(checkpoint.load_subnet(tmp_path / "b").params, narrow.params)


def repairs_of(spec, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def one(n):
        data = rng.normal(size=(3 * n, n)).astype(np.float32)
        return (data.mean(0), np.cov(data.T).astype(np.float32))

    sizes = compensation.inner_units(spec)
    found = compensation.from_moments(
        [one(sizes["attn"]) for _ in range(spec.depth)],
        [one(sizes["mlp"]) for _ in range(spec.depth)],
        spec,
    )
    return packing.cast(found, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_compensation_comes_back_as_it_was(tmp_path, spec, supernet, dtype):
    repairs = repairs_of(spec, dtype)
    checkpoint.save_supernet(tmp_path / "s", supernet._replace(compensation=repairs))
    assert_same(checkpoint.load_supernet(tmp_path / "s").compensation, repairs)


def test_means_alone_come_back_and_none_is_none(tmp_path, spec, supernet):
    means = compensation.means_only(repairs_of(spec))
    checkpoint.save_supernet(tmp_path / "s", supernet._replace(compensation=means))
    assert_same(checkpoint.load_supernet(tmp_path / "s").compensation, means)
    checkpoint.save_supernet(tmp_path / "n", supernet)
    assert checkpoint.load_supernet(tmp_path / "n").compensation is None


def test_a_compensation_of_another_network_is_refused(tmp_path, spec, supernet):
    other = repairs_of(spec.replace(mlp_dim=spec.mlp_dim + 1))
    broken = supernet._replace(compensation=other)
    checkpoint.save_supernet(tmp_path / "s", broken)
    with pytest.raises(ValueError, match="not a compensation of this network"):
        checkpoint.load_supernet(tmp_path / "s")


def test_sharded_parameters_are_saved_whole(tmp_path, supernet):
    place = sharding.param_sharding(supernet.params, sharding.mesh())
    there = supernet._replace(params=jax.device_put(supernet.params, place))
    checkpoint.save_supernet(tmp_path / "s", there)
    assert_same(checkpoint.load_supernet(tmp_path / "s").params, supernet.params)


def test_a_sub_network_comes_back_as_it_was(saved_small, small):
    got = checkpoint.load_subnet(saved_small)
    assert_same(got.params, small.params)
    assert got[1:] == small[1:]
    fields = json.loads((saved_small / "spec.json").read_text())
    assert fields["macs"]["full"] == macs.macs(small.spec, small.widths)
    assert fields["macs"]["paper"] == macs.macs(
        small.spec, small.widths, convention="paper"
    )
    keys = load_file(saved_small / "params.safetensors")
    assert keys["block_0.attn.query.kernel"].shape == (24, 2, 12)


def test_networks_are_read_without_orbax(saved, saved_small):
    code = (
        "import sys; from flax_skd.io import checkpoint; "
        f"checkpoint.load_subnet({str(saved_small)!r}); "
        f"checkpoint.load_supernet({str(saved)!r}); "
        "assert not [m for m in sys.modules if m.startswith('orbax')]; print('read')"
    )
    root = pathlib.Path(checkpoint.__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.stdout == "read\n", out.stderr


SAVES = {
    "supernet": (checkpoint.save_supernet, checkpoint.load_supernet),
    "subnet": (checkpoint.save_subnet, checkpoint.load_subnet),
}


@pytest.mark.parametrize("kind", SAVES)
def test_nothing_is_overwritten_unasked_and_only_our_own_if_asked(
    kind, tmp_path, supernet, small
):
    save, load = SAVES[kind]
    network = supernet if kind == "supernet" else small
    path = tmp_path / "net"
    path.mkdir()
    save(path, network)  # an empty directory is free
    with pytest.raises(ValueError, match="not empty.*overwrite=True"):
        save(path, network)
    save(path, network._replace(provenance={"second": True}), overwrite=True)
    assert load(path).provenance == {"second": True}
    (path / "thesis.tex").write_text("dear to its owner")
    with pytest.raises(ValueError, match=r"thesis\.tex.*Name another"):
        save(path, network, overwrite=True)
    assert (path / "thesis.tex").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["net"]  # no temporary left


def test_a_save_that_fails_loses_nothing(saved_small, small):
    bad = small._replace(provenance={"model": object()})
    with pytest.raises(ValueError, match=r"spec\.json must be plain"):
        checkpoint.save_subnet(saved_small, bad, overwrite=True)
    assert checkpoint.load_subnet(saved_small).provenance == small.provenance
    assert [p.name for p in saved_small.parent.iterdir()] == [saved_small.name]


def test_the_current_directory_and_a_mount_point_are_not_replaced(
    tmp_path, small, monkeypatch
):
    (tmp_path / "a").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    with pytest.raises(ValueError, match="is the current directory.*/network"):
        checkpoint.save_subnet(".", small)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.ismount", lambda path: path == tmp_path / "a")
    with pytest.raises(ValueError, match=f"a is a mount point.*{tmp_path}/a/network"):
        checkpoint.save_subnet("a", small)
    checkpoint.save_subnet("a/network", small)


def test_a_place_where_nothing_may_be_made_is_named_first(tmp_path, small, monkeypatch):
    # Whoever may do everything, as root may, is not held back by the mode of a folder.
    def refused(**options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(directory.tempfile, "TemporaryDirectory", refused)
    words = rf"made: nothing can be written in {tmp_path} \(Read-only"
    with pytest.raises(ValueError, match=words):
        checkpoint.save_subnet(tmp_path / "new" / "net", small)
    assert not [*tmp_path.iterdir()]


def test_of_two_that_write_at_once_the_second_is_refused(tmp_path, small, monkeypatch):
    path, move = tmp_path / "net", directory._move
    first = small._replace(provenance={"first": True})

    def late(*args):
        monkeypatch.setattr(directory, "_move", move)
        checkpoint.save_subnet(path, first)
        move(*args)

    monkeypatch.setattr(directory, "_move", late)
    with pytest.raises(ValueError, match="was filled meanwhile by another program"):
        checkpoint.save_subnet(path, small)
    assert checkpoint.load_subnet(path).provenance == {"first": True}
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_a_file_of_a_later_version_says_so_before_its_fields(saved_small):
    edit(saved_small / "spec.json", format_version=2, colour="red")
    with pytest.raises(ValueError, match="format version 2.* use the flax_skd version"):
        checkpoint.load_subnet(saved_small)


def test_a_bucket_address_is_not_taken_for_a_local_path(small):
    with pytest.raises(ValueError, match="mount the bucket"):
        checkpoint.save_subnet("gs://bucket/net", small)


@pytest.mark.parametrize("load", [checkpoint.load_supernet, checkpoint.load_subnet])
def test_another_directory_is_told_what_was_expected(load, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"expected .*json.* It holds .*notes\.txt"):
        load(tmp_path)
    with pytest.raises(ValueError, match="holds nothing"):
        load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"colour": 1}, "unknown fields ..colour"),
        ({"spec": None}, "missing fields ..spec"),
        ({"spec": {"width": 3}}, "missing fields"),
        ({"spec": [1]}, "unknown fields .1"),
        ({"format": "flax_skd sub-network"}, "not a super-network"),
        ({"format_version": 99}, "format version 99"),
        ({"levels": 2}, "says 2 levels"),
    ],
)
def test_an_edited_super_network_file_is_named(saved, changes, says):
    edit(saved / "supernet.json", **changes)
    with pytest.raises(ValueError, match=rf"supernet\.json(.|\n)*({says})"):
        checkpoint.load_supernet(saved)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"widths": {"qk_dim": [1, 1, 1]}}, "widths must be"),
        ({"widths": {"qk_dim": "1", "vo_dim": [], "mlp_dim": []}}, "whole numbers"),
        (
            {"widths": {"qk_dim": [99] * 3, "vo_dim": [1] * 3, "mlp_dim": [1] * 3}},
            "qk_dim = 99 in block 0",
        ),
        ({"macs": {"full": 1, "paper": 1}}, "was edited"),
    ],
)
def test_an_edited_sub_network_file_is_named(saved_small, changes, says):
    edit(saved_small / "spec.json", **changes)
    with pytest.raises(ValueError, match=rf"spec\.json.*{says}"):
        checkpoint.load_subnet(saved_small)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "3", "[" * 100_000, "\xff"])
def test_a_broken_json_is_named(saved_small, text):
    (saved_small / "spec.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"spec\.json"):
        checkpoint.load_subnet(saved_small)


@pytest.mark.parametrize("kept", [0, 5, 100, 5000])
def test_a_file_cut_short_is_named(saved_small, kept):
    path = saved_small / "params.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"params\.safetensors .*'bytes': {kept},"):
        checkpoint.load_subnet(saved_small)
    edit(saved_small / "spec.json", files=None)
    with pytest.raises(ValueError, match=r"params\.safetensors cannot be read"):
        checkpoint.load_subnet(saved_small)


@pytest.mark.parametrize("kind", SAVES)
def test_every_flipped_bit_of_the_arrays_is_refused(kind, saved, saved_small):
    folder = saved if kind == "supernet" else saved_small
    (path,) = folder.glob("*.safetensors")
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in (0, 8, len(content) - 1, *rng.integers(0, len(content), 20)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=rf"{path} is not what was saved"):
            SAVES[kind][1](folder)
    path.write_bytes(content)
    assert SAVES[kind][1](folder).spec


@pytest.mark.parametrize("kind", SAVES)
def test_arrays_of_another_network_are_refused_and_those_without_sums_read(
    kind, tmp_path, supernet, small
):
    save, load = SAVES[kind]
    network = supernet if kind == "supernet" else small
    params = jax.tree.map(lambda x: np.array(x) + 1, network.params)
    save(tmp_path / "a", network)
    save(tmp_path / "b", network._replace(params=params))
    (ours,), (theirs,) = ((tmp_path / n).glob("*.safetensors") for n in "ab")
    shutil.copy(theirs, ours)
    with pytest.raises(ValueError, match=f"{ours} is not .* of another"):
        load(tmp_path / "a")
    for sums in ([], {}, {ours.name: None}, {ours.name: {"bytes": 1}}):
        edit(next(ours.parent.glob("*.json")), files=sums)
        with pytest.raises(ValueError, match=f"{ours} is not .*saved was"):
            load(tmp_path / "a")
    # As earlier versions wrote them, and whoever edits a file on purpose.
    (facts,) = (tmp_path / "a").glob("*.json")
    edit(facts, files=None)
    assert_same(load(tmp_path / "a").params, params)


def test_all_faults_of_the_arrays_are_listed_together(saved_small):
    path = saved_small / "params.safetensors"
    flat = load_file(path)
    del flat["norm.scale"]
    flat["norm.colour"] = np.zeros(3, np.float32)
    flat["head.bias"] = np.zeros(6, np.float32)
    flat["class_token"][3] = np.nan
    flat["pos_embed"] = flat["pos_embed"].astype(np.int32)
    save_file(flat, path)
    edit(saved_small / "spec.json", files=None)
    with pytest.raises(ValueError, match=r"params\.safetensors .*5 faults") as error:
        checkpoint.load_subnet(saved_small)
    for fault in (
        "missing norm.scale [24]",
        "surplus norm.colour",
        "head.bias has shape [6], not [5]",
        "class_token holds nan or inf",
        "pos_embed has dtype int32",
    ):
        assert fault in str(error.value)


def test_a_super_network_of_another_spec_is_refused(saved, supernet):
    other = supernet.spec.replace(num_classes=7).to_dict()
    edit(saved / "supernet.json", spec=other)
    with pytest.raises(ValueError, match=r"tensors does not match(.|\n)*head\.bias"):
        checkpoint.load_supernet(saved)
    edit(saved / "supernet.json", spec=supernet.spec.replace(depth=10**6).to_dict())
    with pytest.raises(ValueError, match="1000000 blocks"):
        checkpoint.load_supernet(saved)


@pytest.mark.parametrize("size", [2**20, 2**40, 10**30])
def test_sizes_of_an_edited_spec_are_not_allocated(saved_small, small, size):
    spec = small.spec.replace(image_size=size * 4, num_classes=size)
    edit(
        saved_small / "spec.json",
        spec=spec.to_dict(),
        macs={c: macs.macs(spec, small.widths, convention=c) for c in macs.CONVENTIONS},
    )
    with pytest.raises(ValueError, match=r"params\.safetensors"):
        checkpoint.load_subnet(saved_small)


SHAPED = [
    ({}, None),
    ({}, SubnetSpec((12, 0, 3), (10, 0, 4), (40, 7, 0))),
    ({"registers": 2, "pos_embed_prefix": False, "qkv_bias": False}, None),
    ({"distilled": True, "layer_scale": True, "pre_norm": True}, None),
    ({"layer_scale": True}, SubnetSpec((0, 5, 1), (0, 6, 2), (0, 0, 9))),
    ({"class_token": False, "pool": "avg", "fc_norm": True}, None),
    ({"pre_logits": 7}, None),
    ({"num_classes": 0}, None),
]


@pytest.mark.parametrize(("changes", "widths"), SHAPED)
def test_shapes_in_closed_form_are_those_of_the_model(spec, changes, widths):
    spec = spec.replace(**changes)
    widths = widths or SubnetSpec.full(spec)
    tree = jax.eval_shape(lambda: vit.init(spec, jax.random.key(0), widths=widths))
    want = {k: v.shape for k, v in flatten_dict(tree, sep="/").items()}
    assert tensor_layout.shapes(spec, widths) == want


def rewrite(folder, tree):
    """A super-network with this tree of arrays, as earlier versions wrote it."""
    (folder / "arrays.safetensors").unlink()
    edit(folder / "supernet.json", files=None)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as saver:
        saver.save(folder / "arrays", args=ocp.args.PyTreeSave(tree))


@pytest.fixture
def older(tmp_path, spec, supernet):
    """A whole one, in bfloat16, with what repairs it."""
    params = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), supernet.params)
    repairs = repairs_of(spec)
    network = supernet._replace(params=params, compensation=repairs)
    checkpoint.save_supernet(tmp_path / "older", network)
    levels = {k: np.asarray(v) for k, v in supernet.dropout_list._asdict().items()}
    packed = unflatten_dict(packing.pack(repairs), sep=".")
    tree = {"params": params, "dropout_list": levels, "compensation": packed}
    rewrite(tmp_path / "older", tree)
    return tmp_path / "older", network


def test_a_super_network_of_an_earlier_version_is_read(older):
    folder, network = older
    got = checkpoint.load_supernet(folder)
    assert_same(got.params, network.params)
    assert_same(got.compensation, network.compensation)
    for table, want in zip(got.dropout_list, network.dropout_list):
        np.testing.assert_array_equal(table, want)
    assert (got.spec, got.provenance) == (network.spec, PROVENANCE)


def test_a_super_network_of_an_earlier_version_is_replaced_if_asked(older):
    folder, network = older
    with pytest.raises(ValueError, match="not empty.*overwrite=True"):
        checkpoint.save_supernet(folder, network)
    checkpoint.save_supernet(folder, network, overwrite=True)
    assert sorted(p.name for p in folder.iterdir()) == [
        "arrays.safetensors",
        "supernet.json",
    ]
    assert_same(checkpoint.load_supernet(folder).params, network.params)


def test_damaged_arrays_of_an_earlier_version_are_named(older):
    folder, _ = older
    for path in (folder / "arrays").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="arrays cannot be read"):
        checkpoint.load_supernet(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"params": {"a": np.zeros(1 << 28, np.uint8)}}, "unpacks to 2684"),
        ({"params": np.zeros(3)}, "not params and dropout_list"),
        ({"dropout_list": [np.zeros(3)]}, "(not params and|dropout list has)"),
        ({"compensation": {"x": np.full(3, np.nan)}}, "not a compensation"),
        ({"dropout_list": {"levels": np.float32("nan")}}, "not whole numbers"),
    ],
)
def test_arrays_of_another_form_or_of_endless_size_are_named(
    saved, supernet, changes, says
):
    levels = {k: np.asarray(v) for k, v in supernet.dropout_list._asdict().items()}
    if isinstance(changes.get("dropout_list"), dict):
        changes = {"dropout_list": levels | changes["dropout_list"]}
    tree = {"params": supernet.params, "dropout_list": levels} | changes
    if "unpacks" not in says:  # which only orbax does
        path = saved / "arrays.safetensors"
        flat = {
            jax.tree_util.keystr(k, simple=True, separator="."): np.asarray(
                x, order="C"
            )
            for k, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        save_file(flat, path)
        edit(saved / "supernet.json", files=None)
        with pytest.raises(ValueError, match=rf"arrays\.safetensors.*{says}"):
            checkpoint.load_supernet(saved)
    rewrite(saved, tree)
    with pytest.raises(ValueError, match=rf"arrays.*{says}"):
        checkpoint.load_supernet(saved)


def test_a_compensation_that_is_not_finite_is_named(spec):
    repairs = packing.pack(repairs_of(spec))
    repairs["block_1.mlp.mean"] = np.full_like(repairs["block_1.mlp.mean"], np.inf)
    with pytest.raises(ValueError, match="block_1.mlp.mean holds what is no finite"):
        checked.repairs(repairs, spec)
    del repairs["block_1.mlp.mean"]
    with pytest.raises(ValueError, match="block_1.mlp.mean.* missing"):
        checked.repairs(repairs, spec)


def test_what_does_not_match_is_not_saved_either(tmp_path, supernet, small):
    params = {**supernet.params, "norm": {"scale": jnp.full(24, jnp.nan)}}
    with pytest.raises(ValueError, match=r"norm\.bias(.|\n)*norm\.scale holds nan"):
        checkpoint.save_supernet(tmp_path / "a", supernet._replace(params=params))
    levels = supernet.dropout_list._replace(levels=np.int32(9))
    with pytest.raises(ValueError, match="levels = 9"):
        checkpoint.save_supernet(tmp_path / "a", supernet._replace(dropout_list=levels))
    grown = supernet.dropout_list._replace(mlp_dim=supernet.dropout_list.mlp_dim[::-1])
    with pytest.raises(ValueError, match="level 0"):
        checkpoint.save_supernet(tmp_path / "a", supernet._replace(dropout_list=grown))
    with pytest.raises(ValueError, match="this sub-network does not match"):
        checkpoint.save_subnet(tmp_path / "a", small._replace(params=supernet.params))
    assert not list(tmp_path.iterdir())


def test_a_loaded_sub_network_computes_the_same_logits(saved_small, small, batch):
    got = checkpoint.load_subnet(saved_small)
    model = vit.ViT(got.spec, got.widths)
    want = model.apply({"params": small.params}, batch["image"])
    logits = model.apply({"params": got.params}, batch["image"])
    np.testing.assert_array_equal(logits, want)
