"""Options together, as chance has them: each alone is tested where it belongs."""

import json

import family_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_networks as some
from conftest import random_repairs
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from flax_skd.io import checkpoint, conversion, tensor_layout
from flax_skd.io.checkpoint import Subnet
from flax_skd.io.formats import arrays, timm
from flax_skd.method import compensation, macs, subnet
from flax_skd.method.compensation import repaired
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import ViT

SEEDS = range(24)
COMPILED = (3, 6, 8)  # branches removed, LayerScale and `pre_norm`, three blocks


def close(got, want, tolerance=3e-5):
    scale = max(1, np.abs(want).max())
    np.testing.assert_allclose(got, want, atol=tolerance * scale, rtol=0)


def small_of(seed):
    """A sub-network of some branches, every second one repaired, and its logits."""
    spec = some.spec_of(seed)
    params, widths = some.params_of(spec, seed), some.widths_of(spec, seed)
    if not any((*widths.vo_dim, *widths.mlp_dim)):
        widths = SubnetSpec.full(spec)
    repairs = random_repairs(spec, seed) if seed % 2 else None
    params = subnet.extract(repaired(params, spec, repairs, widths), widths)
    images = some.images_of(spec)
    return (
        Subnet(params, spec, widths, {}),
        images,
        some.logits(params, spec, images),
    )


def products(jaxpr):
    """Multiplications of all matrix products, inside of calls too."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (summed, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            made = np.prod(equation.outvars[0].aval.shape, dtype=int)
            total += int(made * np.prod([left[i] for i in summed], dtype=int))
        inside = jax.tree.leaves(list(equation.params.values()))
        total += sum(products(x) for x in inside if hasattr(x, "eqns"))
    return total


@pytest.mark.parametrize("seed", SEEDS)
def test_closed_forms_count_what_is_there(seed):
    spec = some.spec_of(seed)
    params, images = some.params_of(spec, seed), some.images_of(spec, 1)
    for widths in (SubnetSpec.full(spec), some.widths_of(spec, seed)):
        small = subnet.extract(params, widths)
        shapes = {k: x.shape for k, x in flatten_dict(small, sep="/").items()}
        assert tensor_layout.shapes(spec, widths) == shapes
        count = sum(x.size for x in jax.tree.leaves(small))
        assert macs.param_count(spec, widths) == count
        model = ViT(spec, widths)
        traced = jax.make_jaxpr(lambda p, x, m=model: m.apply({"params": p}, x))
        assert products(traced(small, images)) == macs.macs(spec, widths)


@pytest.mark.parametrize("seed", SEEDS)
def test_files_of_a_sub_network_give_its_logits(seed, tmp_path):
    small, images, want = small_of(seed)
    arrays.write_safetensors(tmp_path / "ours", small)
    found = checkpoint.load_subnet(tmp_path / "ours")
    assert found.spec == small.spec and found.widths == small.widths
    assert family_files.same(found.params, small.params)
    arrays.write_npz(tmp_path / "npz", small)
    facts = json.loads((tmp_path / "npz" / "spec.json").read_text())
    plain = unflatten_dict(dict(np.load(tmp_path / "npz" / "params.npz")), sep=".")
    close(some.logits(plain, ViTSpec.from_dict(facts["spec"]), images), want)
    spec = small.spec
    if spec.pre_logits or (spec.distilled and spec.registers):
        with pytest.raises(ValueError, match="has no place for"):
            timm.write(tmp_path / "timm", small)
        return
    timm.write(tmp_path / "timm", small)
    config = json.loads((tmp_path / "timm" / "config.json").read_text())["config"]
    tensors = load_file(tmp_path / "timm" / "model.safetensors")
    close(some.timm_logits(tensors, config, images), want)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_network_comes_back_from_timms_names_at_any_image_size(seed, tmp_path):
    spec = some.spec_of(seed)
    params, images = some.params_of(spec, seed), some.images_of(spec)
    path = tmp_path / "weights.safetensors"
    conversion.write_timm(path, params, spec)
    names = ("num_heads", "pool", "norm_eps", "gelu", "mean", "std", "crop_fraction")
    names += ("interpolation",)
    names += ("pos_embed_prefix",) if spec.num_prefix else ()
    fields = {name: getattr(spec, name) for name in names}
    found = conversion.read(path, fields=fields)
    want = some.logits(params, spec, images)
    close(some.logits(found.params, found.spec, images), want)
    larger = conversion.read(path, fields=fields, image_size=4 * spec.patch_size)
    kept = spec.num_prefix if spec.pos_embed_prefix else 0
    old, new = (x.params["pos_embed"] for x in (found, larger))
    np.testing.assert_array_equal(new[:kept], old[:kept])
    grid = old[kept:].reshape(spec.grid, spec.grid, -1)
    resized = jax.image.resize(grid, (4, 4, spec.width), "bicubic")
    close(new[kept:].reshape(4, 4, -1), resized)
    assert np.isfinite(
        some.logits(larger.params, larger.spec, some.images_of(larger.spec))
    ).all()


@pytest.mark.parametrize("seed", COMPILED)
def test_masked_is_extracted_and_both_are_a_plain_forward_pass(seed):
    spec, images = some.spec_of(seed), some.images_of(some.spec_of(seed))
    params, repairs = some.params_of(spec, seed), random_repairs(spec, seed)

    @jax.jit
    def masked(params, widths):
        def loss(params):
            new = repaired(params, spec, repairs, widths)
            masks = subnet.masks(spec, widths)
            logits = ViT(spec).apply({"params": new}, images, masks)
            return jnp.square(logits).sum(), logits

        return jax.grad(loss, has_aux=True)(params)

    wide = some.widths_of(spec, seed)
    for widths in (wide, some.widths_of(spec, seed + 1, wide)):
        traced = SubnetSpec(*map(jnp.array, widths))
        whole = jax.device_get(compensation.repaired(params, spec, repairs, widths))
        small = subnet.extract(whole, widths)
        gradient, found = masked(params, traced)
        close(found, some.logits(small, spec, images), 1e-4)
        again = subnet.extract(subnet.extract(whole, wide), widths)
        assert family_files.same(again, small)

    @jax.jit
    def extracted(params):
        def loss(params):
            new = repaired(params, spec, repairs, widths)
            cut = {"params": subnet.extract(new, widths)}
            return jnp.square(ViT(spec, widths).apply(cut, images)).sum()

        return jax.grad(loss)(params)

    want = extracted(params)
    top = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    for mine, plain in zip(jax.tree.leaves(gradient), jax.tree.leaves(want)):
        np.testing.assert_allclose(mine, plain, atol=2e-4 * max(1, top))


def test_every_option_is_among_these_networks():
    """And those that meet where a format could lose one of them."""
    specs = [some.spec_of(seed) for seed in SEEDS]
    flags = ("class_token", "distilled", "pos_embed_prefix", "qkv_bias", "layer_scale")
    for name in (*flags, "pre_norm", "fc_norm"):
        assert {getattr(spec, name) for spec in specs} == {False, True}
    assert {spec.num_classes for spec in specs} == {0, 1, 2, 5}
    assert {bool(spec.registers) for spec in specs} == {False, True}
    both = [s for s in specs if s.distilled and s.fc_norm]
    assert any(not s.registers and not s.pre_logits for s in both)
    assert any(spec.num_heads * spec.head_dim > spec.width for spec in specs)
