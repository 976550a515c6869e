"""Specs refuse what cannot be; dropout lists are nested and meet their budgets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_skd.method import macs, piad, subnet, vit
from flax_skd.method.spec import SubnetSpec, ViTSpec


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"head_dim": 0, "num_heads": 5}, "num_heads = 5 does not divide width = 24"),
        ({"patch_size": 5}, "patch_size = 5 does not divide image_size = 16"),
        ({"depth": 0}, "depth = 0 must be at least 1"),
        ({"num_classes": -1}, "num_classes = -1 must be at least 0"),
        ({"gelu": "relu"}, r"gelu = 'relu': choose one of \('exact', 'tanh'\)"),
        ({"mean": (0.5,)}, "one number for each of the 3 channels"),
        ({"mean": 0.5}, "mean = 0.5 needs one number for each of the 3 channels"),
        ({"mean": ("a", 0.5, 0.5)}, "mean = 'a' must be a finite number"),
        ({"mean": "abc"}, "mean = 'a' must be a finite number"),
        ({"std": (0.5, 0.5, float("nan"))}, "std = nan must be a finite number"),
        ({"std": (0.5, 0.5, float("inf"))}, "std = inf must be a finite number"),
        ({"std": (0.5, 0.5, 0.0)}, r"std = \(0.5, 0.5, 0.0\) .* must be positive"),
        ({"norm_eps": -1}, "norm_eps = -1.0 must be positive"),
        ({"norm_eps": "1e-6"}, "norm_eps = '1e-6' must be a finite number"),
        ({"norm_eps": 10**400}, "must be a finite number"),
        ({"in_channels": 0}, "in_channels = 0 must be at least 1"),
        ({"crop_fraction": 1.5}, "crop_fraction = 1.5 in"),
        ({"crop_fraction": float("nan")}, "crop_fraction = nan must be a finite"),
        ({"class_token": False}, "pool = 'token' needs class_token"),
        ({"distilled": True, "pool": "avg"}, "pool = 'token'"),
        ({"width": 24.0}, "width = 24.0 must be a whole number"),
        ({"qkv_bias": "no"}, r"qkv_bias = 'no': choose one of \(False, True\)"),
        ({"fc_norm": None}, r"fc_norm = None: choose one of \(False, True\)"),
        ({"num_heads": "2"}, "num_heads = '2' must be a whole number"),
        (
            {"distilled": True, "pre_logits": 8, "num_classes": 0},
            "two features cannot be averaged",
        ),
    ],
)
def test_an_impossible_spec_says_what_and_why(spec, changes, match):
    with pytest.raises(ValueError, match=match):
        spec.replace(**changes)


def test_numbers_of_any_kind_are_kept_as_floats(spec):
    made = spec.replace(
        mean=np.full(3, 0.5, np.float32), std=[1, 1, 1], norm_eps=np.float32(1)
    )
    assert (made.mean, made.std, made.norm_eps) == ((0.5,) * 3, (1.0,) * 3, 1.0)
    assert {type(x) for x in (*made.mean, *made.std, made.norm_eps)} == {float}


@pytest.mark.parametrize("flags", [{}, {"qkv_bias": 0, "layer_scale": np.bool_(1)}])
def test_a_spec_survives_json(spec, flags):
    import json

    spec = spec.replace(**flags)
    text = json.dumps(spec.to_dict())
    assert ViTSpec.from_dict(json.loads(text)) == spec
    assert hash(ViTSpec.from_dict(json.loads(text))) == hash(spec)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({"widht": 3}, r"unknown fields \['widht'\]"),
        ({"width": "24"}, "width = '24' should be int"),
        ({"width": True}, "width = True should be int"),
    ],
)
def test_edited_json_is_refused_by_field(spec, edit, match):
    with pytest.raises(ValueError, match=match):
        ViTSpec.from_dict({**spec.to_dict(), **edit})


def test_an_unknown_variant_lists_the_sizes():
    with pytest.raises(ValueError, match="'XL/16': write size/patch, .*Ti, S, B, L, H"):
        ViTSpec.named("XL/16")


@pytest.mark.parametrize(
    ("widths", "match"),
    [
        (((4,) * 2, (4,) * 3, (4,) * 3), "qk_dim has 2 entries, the network 3 blocks"),
        (((4,) * 3, (4,) * 3, (4, 41, 4)), "mlp_dim = 41 in block 1: must be 0 to 40"),
        (((4, 4, 0), (4,) * 3, (4,) * 3), "block 2: qk_dim = 0, vo_dim = 4"),
        (((4,) * 3, (4,) * 3, (4, 0.5, 4)), "mlp_dim = 0.5 must be a whole number"),
        (
            (4, 4, 4),
            "qk_dim = 4: give one width for every block, or use SubnetSpec.uni",
        ),
        (
            dict.fromkeys(SubnetSpec._fields, (4,) * 3),
            r"of a dict, SubnetSpec\(\*\*widt",
        ),
    ],
)
def test_widths_that_do_not_fit_name_the_block(spec, widths, match):
    with pytest.raises(ValueError, match=match):
        SubnetSpec(*widths).check(spec)


def test_the_uniform_list_is_nested_and_its_macs_fall_at_every_level():
    spec = ViTSpec.named("Ti/16")
    levels = piad.uniform(spec)
    counts = [macs.macs(spec, levels.widths(s, spec)) for s in range(32)]
    assert levels.widths(0, spec) == SubnetSpec.full(spec)
    assert (np.diff(counts) < 0).all()
    assert macs.branch_fraction(spec, levels.widths(16, spec)) == 0.5


@pytest.mark.parametrize("cost", [macs.macs, macs.param_count])
def test_the_network_for_a_budget_fits_and_the_next_larger_does_not(spec, cost):
    levels = piad.uniform(spec)
    for share in (0.99, 0.7, 0.5, 0.2):
        limit = int(share * cost(spec, SubnetSpec.full(spec)))
        level = piad.level_for(levels, spec, limit, cost=cost)
        assert cost(spec, levels.widths(level, spec)) <= limit
        assert cost(spec, levels.widths(level - 1, spec)) > limit


def test_a_budget_below_the_smallest_network_says_how_small_it_is(spec):
    smallest = macs.macs(spec, piad.uniform(spec).widths(31, spec))
    with pytest.raises(ValueError, match=f"costs {macs.readable(smallest)}"):
        piad.level_for(piad.uniform(spec), spec, smallest - 1)


def test_a_list_that_grows_again_or_starts_cut_is_refused(spec):
    full, half = SubnetSpec.full(spec), SubnetSpec.uniform(spec, 6, 6, 20)
    with pytest.raises(ValueError, match="grows from level 1 to 2 in block 0"):
        piad.from_rows([full, half, full], spec)
    with pytest.raises(ValueError, match="level 0 .* must be the full network"):
        piad.from_rows([half], spec)
    with pytest.raises(ValueError, match="needs its level 0"):
        piad.from_rows([], spec)
    with pytest.raises(ValueError, match="steps = 0 must be at least 1"):
        piad.uniform(spec, steps=0)
    with pytest.raises(ValueError, match=r"a budget of 0\.5: .* costs"):
        piad.level_for(piad.uniform(spec), spec, 0.5)
    with pytest.raises(ValueError, match="a budget of nan"):
        piad.level_for(piad.uniform(spec), spec, float("nan"))


WRONG = {
    "qk_dim": ((4, 4), (4,) * 3, (4,) * 3),
    "vo_dim": ((4,) * 3, (4, -1, 4), (4,) * 3),
    "mlp_dim": ((4,) * 3, (4,) * 3, (4, 41, 4)),
}


@pytest.mark.parametrize("name", WRONG)
def test_masks_and_slices_of_widths_that_are_none_are_refused(spec, params, name):
    widths = SubnetSpec(*WRONG[name])
    with pytest.raises(ValueError, match=name):
        subnet.masks(spec, widths)
    with pytest.raises(ValueError, match=name):
        subnet.extract(params, widths)
    with pytest.raises(ValueError, match=name):
        subnet.masks(spec, SubnetSpec(*map(np.array, widths)))


def test_a_slice_of_attention_without_queries_is_refused(spec, params):
    with pytest.raises(ValueError, match=r"vo_dim = 4, .* in block 1: .* by both"):
        subnet.extract(params, SubnetSpec((4, 0, 4), (4,) * 3, (4,) * 3))
    for known in (tuple, np.array):
        widths = SubnetSpec(known((4, 0, 4)), known((4,) * 3), known((4,) * 3))
        with pytest.raises(ValueError, match="removed by both"):
            subnet.masks(spec, widths)
    with pytest.raises(ValueError, match=r"qk_dim = 4\.0 must be a whole number"):
        subnet.extract(params, SubnetSpec((4.0,) * 3, (4,) * 3, (4,) * 3))
    for scalar in (4, np.int64(4), np.array(4)):
        widths = SubnetSpec(scalar, (4,) * 3, (4,) * 3)
        for cut in (subnet.extract, lambda p, w: subnet.masks(spec, w)):
            with pytest.raises(ValueError, match="one width for every block"):
                cut(params, widths)
    fewer = SubnetSpec((4,) * 2, (4,) * 2, (4,) * 2)
    first_gone = {k: x for k, x in params.items() if k != "block_0"}
    for tree in (params, first_gone):
        with pytest.raises(ValueError, match="the parameters are of at least 3"):
            subnet.extract(tree, fewer)


@pytest.mark.parametrize("as_given", [tuple, list, np.array])
def test_widths_are_any_three_sequences(spec, params, as_given):
    want = SubnetSpec((4, 0, 4), (3, 0, 4), (20, 7, 0))
    widths = as_given([as_given(field) for field in want])
    assert macs.macs(spec, widths) == macs.macs(spec, want)
    assert macs.param_count(spec, widths) == macs.param_count(spec, want)
    fresh = vit.init(spec, jax.random.key(0), widths=widths)
    small = subnet.extract(params, widths)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, fresh)
    images = np.zeros((1, spec.image_size, spec.image_size, 3), np.float32)
    got = vit.ViT(spec, widths).apply({"params": small}, images)
    masked = vit.ViT(spec).apply({"params": params}, images, subnet.masks(spec, widths))
    np.testing.assert_allclose(got, masked, atol=1e-5)


def test_sizes_of_numpy_are_those_of_python(spec):
    made = spec.replace(width=np.int64(24), depth=np.int32(3))
    assert made == spec and type(made.width) is int
    found = SubnetSpec(*np.full((3, 3), 4)).check(spec)
    assert found == SubnetSpec.uniform(spec, 4, 4, 4) and type(found[0][0]) is int


def test_a_traced_level_reads_the_row_and_padding_repeats_the_last(spec):
    rows = [SubnetSpec.full(spec), SubnetSpec.uniform(spec, 6, 5, 20)]
    levels = piad.from_rows(rows, spec, max_levels=7)
    row = jax.jit(lambda table, s: table.row(s))(levels, 1)
    assert SubnetSpec(*map(tuple, row)).check(spec) == rows[1]
    assert levels.qk_dim.shape == (8, 3)
    assert (levels.vo_dim[2:] == 5).all() and int(levels.levels) == 1
    with pytest.raises(ValueError, match="level 2 does not exist: choose 0"):
        levels.widths(2, spec)


def test_the_widths_of_all_levels_make_the_same_list_again(spec):
    levels = piad.uniform(spec, steps=5)
    again = piad.from_rows(levels.all_widths(spec), spec)
    assert len(levels.all_widths(spec)) == 5
    assert all(np.array_equal(a, b) for a, b in zip(levels, again, strict=True))


def test_levels_are_drawn_uniformly_with_both_ends(spec):
    levels = piad.uniform(spec, steps=8)
    drawn = piad.sample_level(jax.random.key(0), levels, (8000,))
    counts = np.bincount(np.asarray(drawn), minlength=8)
    assert len(counts) == 8
    # Chi-square with 7 degrees of freedom: 24.3 is its 0.999 quantile.
    assert ((counts - 1000) ** 2 / 1000).sum() < 24.3
    assert drawn.dtype == jnp.int32
