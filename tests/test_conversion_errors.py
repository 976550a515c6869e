"""What conversion refuses, and that every error says which file and what to do."""

import family_files
import numpy as np
import pytest
from family_files import PLAIN, read_timm, write_hf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from flax_skd.io import conversion
from flax_skd.io.conversion import ConversionError
from flax_skd.io.torch_archive import TorchFileError


@pytest.fixture(scope="module")
def params():
    return family_files.random_params(PLAIN)


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "weights.safetensors"


@pytest.fixture
def timm_tensors(params):
    return family_files.timm(params, PLAIN)


def test_a_known_file_name_is_no_answer_to_what_is_unknown(tmp_path, timm_tensors):
    path = tmp_path / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"
    save_file(timm_tensors, path)
    with pytest.raises(ConversionError, match=r"num_heads: variant=.*fields="):
        conversion.read(path)


def test_sources_that_contradict_the_tensors_or_each_other_are_listed(
    tmp_path, weights, timm_tensors, params
):
    save_file(timm_tensors, weights)
    with pytest.raises(ConversionError) as error:
        conversion.read(weights, variant="Ti/16", recipe="augreg")
    for line in ("width: variant Ti/16 says 192, the tensors 8", "depth", "mlp_dim"):
        assert line in str(error.value)
    write_hf(tmp_path, family_files.huggingface(params, PLAIN), hidden_size=9)
    with pytest.raises(ConversionError, match="config says 9, the tensors 8"):
        conversion.read(tmp_path)
    with pytest.raises(ConversionError, match="num_heads = 3 does not divide"):
        read_timm(weights, num_heads=3)
    with pytest.raises(ConversionError, match="no fields of ViTSpec"):
        read_timm(weights, heads=3)
    with pytest.raises(ConversionError, match="recipe 'x'"):
        conversion.read(weights, recipe="x")


def test_missing_surplus_and_wrong_keys_are_listed_together(weights, timm_tensors):
    tensors = dict(timm_tensors)
    del tensors["blocks.1.attn.qkv.weight"], tensors["norm.bias"]
    tensors["extra.weight"] = tensors["head_dist.bias"] = np.ones(5, np.float32)
    tensors["blocks.0.mlp.fc1.bias"] = np.ones(13, np.float32)
    tensors["blocks.0.norm1.weight"] = np.ones((2, 8), np.float32)
    save_file(tensors, weights)
    with pytest.raises(ConversionError) as error:
        read_timm(weights)
    for line in (
        "missing: blocks.1.attn.qkv.weight",
        "missing: norm.bias",
        "missing: dist_token",
        "missing: head_dist.weight",
        "surplus: extra.weight",
        "wrong shape: blocks.0.mlp.fc1.bias",
        "wrong shape: blocks.0.norm1.weight: [2, 8]",
    ):
        assert str(error.value).count(line) == 1
    assert str(weights) in str(error.value)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("blocks.0.attn.rope.freqs", "rotary"),
        ("blocks.0.attn.q_norm.weight", "query and key norms"),
        ("blocks.0.mlp.w12.weight", "SwiGLU"),
        ("blocks.0.mlp.fc1_g.weight", "SwiGLU"),
        ("attn_pool.latent", "attention-pooling"),
        ("MAPHead_0/probe", "attention-pooling"),
        ("blocks.0.attns.0.qkv.weight", "parallel"),
        ("blocks.0.attn.relative_position_bias_table", "relative position"),
        ("blocks.0.attn.rel_pos.mlp.fc1.weight", "relative position"),
        ("patch_embed.backbone.stem.conv.weight", "conv stem"),
        ("conv_root/kernel", "conv stem"),
    ],
)
def test_other_architectures_are_refused_by_name(weights, timm_tensors, key, what):
    save_file(timm_tensors | {key: np.ones(8, np.float32)}, weights)
    with pytest.raises(ConversionError, match=f"{what}.*{key.split('/')[0]}"):
        read_timm(weights)


def test_a_network_without_a_position_table_is_told_what_it_may_be(
    weights, timm_tensors
):
    """Of rotary positions a file may hold nothing (timm's DINOv3)."""
    del timm_tensors["pos_embed"]
    save_file(timm_tensors, weights)
    with pytest.raises(ConversionError, match=r"missing: pos_embed \(rotary"):
        read_timm(weights)


def test_tensors_that_are_not_finite_floats_are_named(weights, timm_tensors):
    tensors = timm_tensors | {"norm.bias": np.full(8, np.nan, np.float32)}
    save_file(tensors | {"pos_embed": np.full((1, 10, 8), np.inf)}, weights)
    with pytest.raises(ConversionError, match=r"(?s)norm\.bias.*pos_embed"):
        read_timm(weights)


def test_a_position_table_without_a_square_grid_is_named(weights, timm_tensors):
    save_file(timm_tensors | {"pos_embed": np.ones((1, 8, 8), np.float32)}, weights)
    with pytest.raises(ConversionError, match="pos_embed has 8 positions"):
        read_timm(weights)


def test_a_hugging_face_network_that_runs_differently_is_refused(tmp_path, params):
    tensors = family_files.huggingface(params, PLAIN)
    write_hf(tmp_path, tensors, hidden_act="quick_gelu")
    with pytest.raises(ConversionError, match="hidden_act 'quick_gelu'"):
        conversion.read(tmp_path)
    bare = PLAIN.replace(num_classes=0, pre_logits=8)
    pooled = family_files.huggingface(family_files.random_params(bare), bare)
    write_hf(tmp_path, pooled, pooler_act="relu")
    with pytest.raises(ConversionError, match="pooler_act 'relu' is not supported"):
        conversion.read(tmp_path)
    write_hf(tmp_path, pooled, pooler_act="tanh")
    assert conversion.read(tmp_path).spec.pre_logits == 8
    write_hf(tmp_path, tensors, pooler_act="relu")  # of no pooler
    assert conversion.read(tmp_path).spec.pre_logits == 0
    pooler = {"vit.pooler.dense.weight": np.eye(8, dtype=np.float32)}
    pooler["vit.pooler.dense.bias"] = np.ones(8, np.float32)
    write_hf(tmp_path, tensors | pooler)
    with pytest.raises(ConversionError, match="pooler that its classifier"):
        conversion.read(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mean": 0.5}, "mean = 0.5 needs one number for each of the 3 channels"),
        ({"std": (0.0, 1, 1)}, "must be positive"),
        ({"norm_eps": -1.0}, "norm_eps = -1.0 .*must be positive"),
    ],
)
def test_a_field_that_cannot_be_is_named_with_the_file(
    weights, timm_tensors, fields, words
):
    save_file(timm_tensors, weights)
    given_fields = {"num_heads": PLAIN.num_heads} | fields
    with pytest.raises(ConversionError, match=f"weights.safetensors: .*{words}"):
        conversion.read(weights, recipe="augreg", fields=given_fields)


def test_two_names_of_one_parameter_are_surplus(weights, timm_tensors):
    twice = {f"blocks.0.{n}": np.ones(8, np.float32) for n in ("ls1.gamma", "gamma_1")}
    save_file(timm_tensors | twice, weights)
    with pytest.raises(
        ConversionError, match=r"surplus: .*ls1\.gamma \(means the same"
    ):
        read_timm(weights)


def test_a_folder_without_weights_or_with_a_broken_config_says_so(
    tmp_path, timm_tensors
):
    with pytest.raises(ConversionError, match=r"none of model\.safetensors"):
        conversion.read(tmp_path)
    save_file(timm_tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"mean": [0.5,')
    with pytest.raises(ConversionError, match=r"config\.json is cut short"):
        conversion.read(tmp_path)
    with pytest.raises(ConversionError, match="does not exist"):
        conversion.read(tmp_path / "absent.npz")


def test_params_that_are_not_of_the_spec_are_not_written(params):
    broken = {k: v for k, v in params.items() if k != "norm"}
    with pytest.raises(ConversionError, match=r"(?s)missing: norm/scale.*mlp/fc1"):
        conversion.to_timm(broken, PLAIN.replace(mlp_dim=11))


def test_an_npz_of_objects_or_of_a_bomb_is_refused(tmp_path):
    path = tmp_path / "weights.npz"
    np.savez(path, **{"embedding/kernel": np.array([{}], object)})
    with pytest.raises(ConversionError, match="Python objects"):
        conversion.read(path)
    np.savez_compressed(path, **{"embedding/kernel": np.zeros(4_000_000)})
    with pytest.raises(ConversionError, match="unpacks to more"):
        conversion.read(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".pth"])
def test_a_file_cut_short_is_named_in_the_error(tmp_path, timm_tensors, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, **timm_tensors)
    else:
        save_file(timm_tensors, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 9):
        path.write_bytes(whole[:length])
        with pytest.raises((ConversionError, TorchFileError), match="weights"):
            conversion.read(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_flipped_bits_give_params_or_a_documented_error(
    tmp_path_factory, params, suffix, data
):
    path = tmp_path_factory.mktemp("fuzz") / f"weights{suffix}"
    tensors = family_files.timm(params, PLAIN)
    np.savez(path, **tensors) if suffix == ".npz" else save_file(tensors, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        # Headers lie at both ends.
        at = data.draw(st.integers(-3000, 3000))
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        source = read_timm(path)
    except ConversionError as error:
        assert str(path) in str(error)
    else:
        assert source.spec == PLAIN
