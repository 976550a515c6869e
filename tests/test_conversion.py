"""Every family's files, written by `family_files`, read back to the same params."""

import functools
import hashlib
import json
import math
import os
import pathlib

import family_files
import flax
import jax
import ml_dtypes
import numpy as np
import pth_files
import pytest
from family_files import HEADS, PLAIN, read_timm, same, write_hf
from safetensors.numpy import load_file, save_file

from flax_skd.io import conversion
from flax_skd.io.conversion import ConversionError
from flax_skd.method.spec import IMAGENET_MEAN

SPECS = {
    "plain": PLAIN,
    "distilled": PLAIN.replace(distilled=True),
    "headless": PLAIN.replace(num_classes=0),
    "deit3": PLAIN.replace(pos_embed_prefix=False, layer_scale=True),
    "registers": PLAIN.replace(registers=3, layer_scale=True, qkv_bias=False),
    "pooled": PLAIN.replace(class_token=False, pool="avg"),
    "fc_norm": PLAIN.replace(pool="avg", fc_norm=True),
    "pre_norm": PLAIN.replace(pre_norm=True),
    "pre_logits": PLAIN.replace(pre_logits=6),
    "grey": PLAIN.replace(in_channels=1, mean=(0.5,), std=(0.5,)),
}
NPZ = {  # vit_jax and big_vision, with the prefixes of their training checkpoints
    "vit_jax": {},
    "old vit_jax": {"prefix": "opt/target/"},
    "big_vision": {"prefix": "params/", "norm2": 1, "mlp": 0, "attn": 0},
}


@pytest.fixture(scope="module")
def params():
    return family_files.random_params(PLAIN)


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "weights.safetensors"


@pytest.fixture
def timm_tensors(params):
    return family_files.timm(params, PLAIN)


@pytest.mark.parametrize("name", SPECS)
def test_a_timm_file_gives_its_params_and_spec(weights, name):
    spec = SPECS[name]
    params = family_files.random_params(spec)
    save_file(family_files.timm(params, spec), weights)
    source = read_timm(weights, spec)
    assert source.spec == spec and source.family == "timm"
    assert same(source.params, params)
    assert source.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "net.backbone."])
def test_what_a_network_was_saved_in_may_stand_before_its_names(
    weights, params, timm_tensors, prefix
):
    save_file({prefix + name: x for name, x in timm_tensors.items()}, weights)
    source = read_timm(weights, PLAIN)
    assert source.spec == PLAIN and same(source.params, params)


def test_a_file_of_two_networks_is_refused_and_what_else_it_holds_is_named(
    weights, timm_tensors
):
    teacher = {f"teacher.{name}": x for name, x in timm_tensors.items()}
    student = {f"student.{name}": x for name, x in timm_tensors.items()}
    save_file(teacher | student, weights)
    with pytest.raises(conversion.ConversionError, match="'student.', 'teacher.'"):
        read_timm(weights, PLAIN)
    save_file(teacher | {"centre": timm_tensors["head.bias"]}, weights)
    with pytest.raises(conversion.ConversionError, match="surplus: centre"):
        read_timm(weights, PLAIN)


@pytest.mark.parametrize("name", SPECS)
def test_writing_timm_and_reading_it_is_the_identity_both_ways(weights, tmp_path, name):
    spec = SPECS[name]
    original = family_files.timm(family_files.random_params(spec), spec)
    save_file(original, weights)
    source = read_timm(weights, spec)
    copy = tmp_path / "copy.safetensors"
    conversion.write_timm(copy, source.params, source.spec)
    assert same(load_file(copy), original)
    assert same(read_timm(copy, spec).params, source.params)
    frozen = conversion.to_timm(flax.core.freeze(source.params), source.spec)
    assert same(frozen, original)


def test_a_clip_style_file_without_patch_bias_comes_back_without_it(weights):
    spec = SPECS["pre_norm"]
    tensors = family_files.timm(family_files.random_params(spec), spec)
    del tensors["patch_embed.proj.bias"]
    save_file(tensors, weights)
    source = read_timm(weights, spec)
    assert not source.params["patch_embed"]["bias"].any()
    assert same(conversion.to_timm(source.params, source.spec), tensors)


def test_the_norm_of_a_distilled_networks_two_tokens_is_timms_norm_of_all(weights):
    spec = SPECS["distilled"].replace(fc_norm=True)
    params = family_files.random_params(spec)
    conversion.write_timm(weights, params, spec)
    source = read_timm(weights, spec)
    assert source.spec == SPECS["distilled"]
    params["norm"] = params.pop("fc_norm")
    assert same(source.params, params)


def test_names_of_deit3s_own_files_are_read(weights):
    spec = SPECS["deit3"]
    params = family_files.random_params(spec)
    tensors = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): value
        for key, value in family_files.timm(params, spec).items()
    }
    save_file(tensors, weights)
    assert same(read_timm(weights, spec).params, params)


@pytest.mark.parametrize("names", [family_files.HF4, family_files.HF5])
@pytest.mark.parametrize("prefix", ["vit.", "deit.", ""])
@pytest.mark.parametrize("kind", ["plain", "distilled", "pooler"])
def test_a_hugging_face_folder_needs_no_more_words(tmp_path, names, prefix, kind):
    spec = PLAIN.replace(norm_eps=1e-12, crop_fraction=0.875, mean=IMAGENET_MEAN)
    if kind == "distilled":
        spec = spec.replace(distilled=True)
    if kind == "pooler":
        spec = spec.replace(num_classes=0, pre_logits=8)
    params = family_files.random_params(spec)
    tensors = family_files.huggingface(params, spec, prefix=prefix, names=names)
    write_hf(tmp_path, tensors)
    source = conversion.read(tmp_path)
    assert source.spec == spec and source.family == "huggingface"
    assert same(source.params, params)


HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
BOTH = {"height": 12, "width": 12}


@pytest.mark.parametrize(
    ("processor", "mode", "mean", "std"),
    [
        ({"size": BOTH}, "squash", 0.5, 0.5),
        ({"size": 12, "image_processor_type": "ViTImageProcessor"}, "squash", 0.5, 0.5),
        ({"size": 12, "feature_extractor_type": "CLIPFeatureEx"}, "center", 0.5, 0.5),
        ({"size": {"shortest_edge": 12}}, "center", 0.5, 0.5),
        ({"size": BOTH, "rescale_factor": 1 / 127.5}, "squash", 0.25, 0.25),
        ({"size": BOTH, "do_rescale": False}, "squash", 0.5 / 255, 0.5 / 255),
        ({"size": BOTH, "do_normalize": False}, "squash", 0, 1),
        ({"size": BOTH, "image_mean": 0.5, "image_std": 1}, "squash", 0.5, 1),
        (
            {"size": BOTH, "image_mean": 1, "do_rescale": False},
            "squash",
            1 / 255,
            0.5 / 255,
        ),
    ],
)
def test_a_preprocessor_is_followed(tmp_path, params, processor, mode, mean, std):
    tensors = family_files.huggingface(params, PLAIN)
    write_hf(tmp_path, tensors, processor=HALF | processor)
    spec = conversion.read(tmp_path).spec
    assert (spec.crop_mode, spec.crop_fraction) == (mode, 1.0)
    np.testing.assert_allclose([spec.mean, spec.std], [[mean] * 3, [std] * 3])


@pytest.mark.parametrize(("crop", "size"), [(224, 256), (224, 400), (384, 450)])
def test_an_image_is_resized_to_the_size_that_a_preprocessor_says(
    tmp_path, params, crop, size
):
    sides = {"size": {"shortest_edge": size}, "crop_size": crop, "do_center_crop": True}
    tensors = family_files.huggingface(params, PLAIN)
    write_hf(tmp_path, tensors, processor=HALF | sides)
    fraction = conversion.read(tmp_path).spec.crop_fraction
    # As `preprocess.evaluation` takes it; 224 / (224 / 400) is a bit below 400.
    assert math.floor(crop / fraction) == size
    assert fraction == pytest.approx(crop / size, rel=1e-15)


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        ({"size": BOTH, "do_resize": False}, "do_resize = false leaves"),
        ({"size": BOTH, "rescale_factor": 0}, "rescale_factor = 0 is no positive"),
        ({"rescale_factor": 1.0, "image_mean": "half"}, "image_mean = 'half' must be"),
        ({"image_std": [0.5, None, 1]}, "image_std = .* must be a number, or a list"),
        ({"image_mean": 10**400}, "too large"),
        ({"size": 10**400, "crop_size": 224, "do_center_crop": True}, "is no length"),
    ],
)
def test_a_preprocessor_that_cannot_be_followed_is_refused(
    tmp_path, params, processor, words
):
    tensors = family_files.huggingface(params, PLAIN)
    write_hf(tmp_path, tensors, processor=HALF | processor)
    with pytest.raises(ConversionError, match=words):
        conversion.read(tmp_path)


def test_a_number_for_all_channels_is_of_as_many_as_the_network_has(tmp_path):
    spec = PLAIN.replace(in_channels=1, mean=(0.25,), std=(0.5,))
    tensors = family_files.huggingface(family_files.random_params(spec), spec)
    processor = {"image_mean": 0.25, "image_std": 0.5, "resample": 3}
    write_hf(tmp_path, tensors, processor=processor, num_channels=1)
    found = conversion.read(tmp_path).spec
    assert (found.mean, found.std) == (spec.mean, spec.std)


def test_an_entry_of_a_pth_file_is_chosen_by_name(tmp_path, timm_tensors, params):
    path = tmp_path / "model_best.pth.tar"
    storages = {}
    average = {k: v + 1 for k, v in timm_tensors.items()}
    entries = {"state_dict": timm_tensors, "state_dict_ema": average}
    entries = {k: pth_files.state_dict(v, storages) for k, v in entries.items()}
    pth_files.write(path, pth_files.mapping(entries), storages)
    read = functools.partial(conversion.read, path, recipe="augreg", fields=HEADS)
    with pytest.raises(ValueError, match=r"choose one by entry=.*config.model.entry"):
        read()
    assert same(read(entry="state_dict").params, params)
    got = read(entry="state_dict_ema").params["head"]["bias"]
    np.testing.assert_array_equal(got, params["head"]["bias"] + 1)
    with pytest.raises(ValueError, match="no dictionary 'ema'"):
        read(entry="ema")


def test_an_entry_of_another_kind_of_file_is_refused(weights, timm_tensors):
    save_file(timm_tensors, weights)
    with pytest.raises(ConversionError, match=r"entry = 'model' .* leave it out"):
        conversion.read(weights, recipe="augreg", fields=HEADS, entry="model")


def test_a_timm_file_that_cannot_be_written_leaves_the_one_there(tmp_path, params):
    path = tmp_path / "new" / "weights.safetensors"
    conversion.write_timm(path, params, PLAIN)
    before = path.read_bytes()

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pathlib.Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            conversion.write_timm(path, params, PLAIN)
    assert path.read_bytes() == before and [*path.parent.iterdir()] == [path]


def test_shards_are_read_through_their_index(tmp_path, params):
    tensors = family_files.huggingface(params, PLAIN)
    write_hf(tmp_path, tensors)
    (tmp_path / "model.safetensors").unlink()
    keys = sorted(tensors)
    parts = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, part in parts.items():
        save_file({key: tensors[key] for key in part}, tmp_path / name)
    index = {"weight_map": {k: name for name, part in parts.items() for k in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(conversion.read(tmp_path).params, params)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"b\.safetensors.*missing"):
        conversion.read(tmp_path)


def test_a_deit_that_reads_one_token_keeps_the_other_as_a_register(tmp_path):
    spec = PLAIN.replace(distilled=True)
    params = family_files.random_params(spec)
    tensors = family_files.huggingface(params, spec, prefix="deit.")
    for leaf in ("weight", "bias"):
        tensors[f"classifier.{leaf}"] = tensors.pop(f"cls_classifier.{leaf}")
        del tensors[f"distillation_classifier.{leaf}"]
    write_hf(tmp_path, tensors)
    source = conversion.read(tmp_path)
    assert source.spec.registers == 1 and not source.spec.distilled
    np.testing.assert_array_equal(
        source.params["register_tokens"], params["dist_token"][None]
    )


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("names", NPZ)
@pytest.mark.parametrize("pre_logits", [0, 6])
def test_an_npz_of_the_original_code_tells_its_heads(
    tmp_path, names, stacked, pre_logits
):
    spec = PLAIN.replace(
        pre_logits=pre_logits, gelu="tanh", crop_fraction=1.0, crop_mode="squash"
    )
    spec = spec.replace(interpolation="bilinear")
    if names == "big_vision":
        spec = spec.replace(pos_embed_prefix=False)
    params = family_files.random_params(spec)
    tensors = family_files.vit_jax(params, spec, **NPZ[names])
    if stacked:
        tensors = family_files.scanned(tensors, spec.depth)
    if names != "vit_jax":  # what the optimiser and the clock keep
        tensors["opt/state/step"] = np.int32(3)
        tensors["opt/0/mu/embedding/bias"] = np.full(8, np.nan, np.float32)
        tensors["chrono/accum_examples_seen"] = np.float64(3)
    np.savez(tmp_path / "weights.npz", **tensors)
    source = conversion.read(tmp_path / "weights.npz", recipe="augreg_jax")
    assert source.spec == spec and source.family == "jax"
    assert same(source.params, params)


@pytest.mark.parametrize("key", [None, "model"])
def test_a_pth_file_gives_the_params_of_the_same_tensors(tmp_path, params, key):
    storages = {}
    top = pth_files.state_dict(family_files.timm(params, PLAIN), storages)
    path = tmp_path / "weights.pth"
    pth_files.write(path, pth_files.mapping({key: top}) if key else top, storages)
    source = read_timm(path)
    assert same(source.params, params) and source.spec == PLAIN


def test_bfloat16_in_an_npz_is_seen_through_numpys_name_for_it(tmp_path, params):
    tensors = family_files.vit_jax(params, PLAIN)
    half = {k: v.astype(ml_dtypes.bfloat16) for k, v in tensors.items()}
    np.savez(tmp_path / "w.npz", **{k: v.view("V2") for k, v in half.items()})
    source = conversion.read(tmp_path / "w.npz", recipe="augreg_jax")
    want = jax.tree.map(
        lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params
    )
    assert same(source.params, want)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_other_float_types_become_float32(weights, timm_tensors, dtype):
    tensors = {k: v.astype(dtype) for k, v in timm_tensors.items()}
    save_file(tensors, weights)
    state = conversion.to_timm(read_timm(weights).params, PLAIN)
    assert same(state, {k: v.astype(np.float32) for k, v in tensors.items()})


def test_a_timm_folder_gives_its_preprocessing_and_pool(tmp_path, timm_tensors):
    save_file(timm_tensors, tmp_path / "model.safetensors")
    trained = {"mean": [0.1] * 3, "std": [0.2] * 3, "crop_pct": 0.95}
    trained["interpolation"] = "bilinear"
    config = {"architecture": "vit_tiny_patch16_224", "global_pool": "avg"}
    config["pretrained_cfg"] = trained
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError) as error:
        conversion.read(tmp_path)
    unknown = {line.split(":")[0].strip() for line in str(error.value).split("\n")[1:]}
    assert unknown == {"num_heads", "norm_eps", "gelu"}
    spec = read_timm(tmp_path, std=(0.3,) * 3).spec  # fields > config > recipe
    assert spec == PLAIN.replace(
        mean=(0.1,) * 3,
        std=(0.3,) * 3,
        crop_fraction=0.95,
        interpolation="bilinear",
        pool="avg",
    )


def test_another_image_size_resamples_the_grid_and_says_so(
    weights, timm_tensors, params, caplog
):
    save_file(timm_tensors, weights)
    source = conversion.read(weights, recipe="augreg", fields=HEADS, image_size=20)
    assert source.spec == PLAIN.replace(image_size=20)
    assert "3 x 3 to 5 x 5" in caplog.text
    table, old = source.params["pos_embed"], params["pos_embed"]
    np.testing.assert_array_equal(table[0], old[0])
    want = jax.image.resize(old[1:].reshape(3, 3, 8), (5, 5, 8), "bicubic")
    # float64 weights here, float32 there.
    np.testing.assert_allclose(table[1:].reshape(5, 5, 8), want, atol=2e-6)
    same_size = conversion.read(weights, recipe="augreg", fields=HEADS, image_size=12)
    assert same(same_size.params, params)
    with pytest.raises(ConversionError, match="does not divide image_size"):
        conversion.read(weights, recipe="augreg", fields=HEADS, image_size=13)


@pytest.mark.parametrize("size", [1, 2, 4, 5, 9])
def test_resampling_shrinks_and_grows_like_antialiased_bicubic(size):
    grid = np.random.default_rng(0).normal(size=(5, 5, 3)).astype(np.float32)
    want = jax.image.resize(grid, (size, size, 3), "bicubic", antialias=True)
    got = conversion.resample_grid(grid, size)
    np.testing.assert_allclose(got, want, atol=2e-6)
    assert size != 5 or np.array_equal(got, grid)


def test_the_published_tiny_vit_goes_through_and_back_bit_for_bit(tmp_path):
    folder = os.environ.get("FLAX_SKD_DATA")
    if not folder:
        pytest.skip("FLAX_SKD_DATA names no folder with the checkpoint")
    name = "vit_tiny_patch16_224_augreg_in21k_ft_in1k.safetensors"
    path = pathlib.Path(folder) / name
    source = conversion.read(path, variant="Ti/16", recipe="augreg")
    assert sum(x.size for x in jax.tree.leaves(source.params)) == 5_717_416
    copy = tmp_path / "copy.safetensors"
    conversion.write_timm(copy, source.params, source.spec)
    assert same(load_file(copy), load_file(path))
