"""Every format is read back and gives the masked super-network's logits."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import types

import export_page
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from flax.training import checkpoints
from flax.traverse_util import unflatten_dict

from flax_skd.io import checkpoint, model_card, summed_arrays
from flax_skd.io.checkpoint import Supernet
from flax_skd.io.formats import (
    arrays,
    flax_attention,
    folding,
    onnx,
    stablehlo,
    timm,
    writers,
)
from flax_skd.io.formats import nnx as nnx_format
from flax_skd.method import macs, piad, subnet, vit
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import evaluate, export_index, exporting, main

OPTIONS = {"platforms": ("cpu",), "opset": 20}
EMPTY = SubnetSpec((0,) * 3, (0,) * 3, (0,) * 3)
FLAX_REFUSES = {
    "distilled": "distillation token",
    "distilled, positions of patches only": "distillation token",
    "distilled, norm of the tokens": "distillation token",
    "pre-norm": "pre_norm",
    "average then norm": "fc_norm",
}
TIMM_REFUSES = {"pre-logits": "no place for a pre-logits layer: export as"}


@pytest.fixture(scope="module")
def ragged():
    return export_page.network()


def close(got, want):
    # Sums in another order, of logits of a few units.
    np.testing.assert_allclose(np.asarray(got), want, atol=1e-5, rtol=1e-5)


def apply(small, images):
    return jax.jit(ViT(small.spec, small.widths).apply)(
        {"params": small.params}, images
    )


def supported(refused):
    return [name for name in export_page.VARIANTS if name not in refused]


def test_safetensors_load_as_the_page_says(ragged, tmp_path):
    small, images, want = ragged
    arrays.write_safetensors(tmp_path / "safetensors", small)
    names = export_page.run("safetensors", folder=tmp_path, images=images)
    close(names["logits"], want)


def test_npz_holds_the_params_and_the_sizes(ragged, tmp_path):
    small, images, want = ragged
    arrays.write_npz(tmp_path / "npz", small)
    names = export_page.run("npz", folder=tmp_path, images=images)
    params = unflatten_dict(dict(names["arrays"]), sep=".")
    widths = SubnetSpec(**names["facts"]["widths"]).check(small.spec)
    assert names["scale"] == small.spec.head_dim**-0.5 and widths == small.widths
    close(jax.jit(ViT(small.spec, widths).apply)({"params": params}, images), want)


@pytest.mark.parametrize("variant", supported(FLAX_REFUSES))
def test_the_plain_flax_module_of_the_page_runs_the_params(variant, tmp_path):
    spec = export_page.TINY.replace(**export_page.VARIANTS[variant])
    small, images, want = export_page.network(spec)
    flax_attention.write(tmp_path / "flax", small)
    names = export_page.run("plain_vit", "flax", folder=tmp_path, images=images)
    close(names["logits"], want)
    plain = names["PlainViT"](names["config"])
    fresh = jax.eval_shape(plain.init, jax.random.key(0), images)
    assert jax.tree.map(np.shape, fresh["params"]) == jax.tree.map(
        np.shape, names["params"]
    )


def test_the_plain_module_needs_flax_alone_and_fits_in_60_lines():
    code = export_page.BLOCKS["plain_vit"]
    assert len(code.splitlines()) < 60 and "skd" not in code


def test_the_bridge_turns_the_plain_module_into_nnx(ragged, tmp_path):
    small, images, want = ragged
    flax_attention.write(tmp_path / "flax", small)
    labels = ("plain_vit", "flax", "flax, plain nnx")
    names = export_page.run(*labels, folder=tmp_path, images=images)
    close(names["logits"], want)


@pytest.mark.parametrize("variant", FLAX_REFUSES)
def test_flax_refuses_by_name_what_it_has_no_place_for(variant, tmp_path):
    spec = export_page.TINY.replace(**export_page.VARIANTS[variant])
    small = export_page.small_network(spec, export_page.EVEN)[0]
    with pytest.raises(ValueError, match=FLAX_REFUSES[variant]):
        flax_attention.write(tmp_path / "flax", small)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("width", [2, 6])
def test_flax_attention_gives_what_the_cut_attention_gives(width):
    """One block's attention, in float64 from the equation."""
    widths = export_page.EVEN._replace(qk_dim=(width,) * 3, vo_dim=(3,) * 3)
    small = export_page.small_network(widths=widths)[0]
    x = np.random.default_rng(3).normal(size=(2, 5, 12))
    p = small.params["block_1"]["attn"]
    q, k, v = (
        np.einsum("bnd,dhe->bhne", x, p[n]["kernel"]) + p[n]["bias"][:, None]
        for n in ("query", "key", "value")
    )
    scores = np.einsum("bhqe,bhke->bhqk", q, k) / np.sqrt(small.spec.head_dim)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    want = np.einsum("bhqk,bhke,hed->bqd", weights, v, p["out"]["kernel"])
    want = want + p["out"]["bias"]
    named, config = flax_attention.convert(small)
    block = "Transformer/encoderblock_1/MultiHeadDotProductAttention_1/"
    mine = {k[len(block) :]: v for k, v in named.items() if k.startswith(block)}
    head_dim = config["head_dim"][1]
    assert head_dim == max(width, 3)
    plain = nn.MultiHeadDotProductAttention(2, qkv_features=2 * head_dim)
    got = plain.apply({"params": unflatten_dict(mine, sep="/")}, x.astype(np.float32))
    close(got, want)


def test_whole_heads_have_the_shapes_of_vit_jax():
    widths = SubnetSpec((6,) * 3, (6,) * 3, (10,) * 3)
    named, config = flax_attention.convert(export_page.small_network(widths=widths)[0])
    block = "Transformer/encoderblock_2"
    shapes = {
        "cls": (1, 1, 12),
        "Transformer/posembed_input/pos_embedding": (1, 5, 12),
        "embedding/kernel": (4, 4, 3, 12),
        f"{block}/MultiHeadDotProductAttention_1/query/kernel": (12, 2, 6),
        f"{block}/MultiHeadDotProductAttention_1/out/kernel": (2, 6, 12),
        f"{block}/MlpBlock_3/Dense_1/kernel": (10, 12),
        f"{block}/LayerNorm_2/scale": (12,),
        "Transformer/encoder_norm/bias": (12,),
        "head/kernel": (12, 5),
    }
    assert {name: named[name].shape for name in shapes} == shapes
    assert config["head_dim"] == (6,) * 3 and config["gelu"] == "exact"


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(10)(x))
        return nn.Dense(x.shape[-1])(y)


class Encoder1DBlock(nn.Module):
    features: int | None

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=self.features)(y, y)
        return x + MlpBlock()(nn.LayerNorm()(x))


class Transformer(nn.Module):
    features: int | None

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = Encoder1DBlock(self.features, name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class AutoNamed(nn.Module):
    """A ViT as vit_jax and big_vision write it: Linen numbers the submodules."""

    features: int | None

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(12, (4, 4), (4, 4), "VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, 12)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, 12))
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], 1)
        x = x + self.param("pos_embedding", nn.initializers.zeros, (1, 5, 12))
        x = Transformer(self.features, name="Transformer")(x)
        return nn.Dense(5, name="head")(x[:, 0])


@pytest.mark.parametrize(("width", "features"), [(6, None), (3, 6)])
def test_a_vit_of_auto_named_modules_runs_even_widths(width, features):
    """Whole heads as they are; cut heads with one argument more."""
    widths = SubnetSpec((width,) * 3, (width,) * 3, (10,) * 3)
    spec = export_page.TINY.replace(gelu="tanh")
    small, images, want = export_page.network(spec, widths)
    params = unflatten_dict(flax_attention.convert(small)[0], sep="/")
    params = checkpoints.convert_pre_linen(params)
    posembed = params["Transformer"].pop("posembed_input")
    got = jax.jit(AutoNamed(features).apply)({"params": params | posembed}, images)
    close(got, want)


def test_nnx_loads_as_the_page_says_and_has_gradients(ragged, tmp_path):
    small, images, want = ragged
    writers.FORMATS["nnx"].write(tmp_path / "nnx", small)
    names = export_page.run("nnx", folder=tmp_path, images=images)
    close(names["logits"], want)
    pure = nnx.to_pure_dict(names["weights"])
    jax.tree.map(np.testing.assert_array_equal, pure, small.params)
    slopes = nnx.jit(nnx.grad(lambda model: model(images).sum()))(names["model"])
    assert np.abs(slopes["head"]["bias"][...]).min() > 0


def test_nnx_computes_in_bfloat16_from_float32_params(ragged):
    small, images, want = ragged
    model = nnx_format.module(small, dtype=jnp.bfloat16)
    got = np.asarray(nnx.jit(lambda model, x: model(x))(model, images))
    assert got.dtype == np.float32
    assert 1e-5 < np.abs(got - want).max() < 0.5  # bfloat16 has 3 digits


@pytest.mark.parametrize("variant", ["plain", "distilled"])
def test_stablehlo_takes_any_batch_with_params_inside_or_outside(variant):
    spec = export_page.TINY.replace(**export_page.VARIANTS[variant])
    small, images, want = export_page.network(spec)
    inside = stablehlo.params_inside(small)
    outside = stablehlo.params_outside(small)
    assert inside.platforms == ("cpu", "cuda", "tpu")
    for size in (1, 4):
        close(inside.call(images[:size]), want[:size])
        close(outside.call(small.params, images[:size]), want[:size])


def test_stablehlo_takes_pixels_and_normalises_them(ragged):
    small, _, _ = ragged
    pixels = np.random.default_rng(1).integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)
    got = stablehlo.params_inside(
        small, platforms=("cpu",), image_dtype=jnp.uint8
    ).call(pixels)
    images = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    close(got, apply(small, images))


def test_stablehlo_files_load_as_the_page_says(ragged, tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    small, images, want = ragged
    stablehlo.write(tmp_path / "jax_export", small)
    names = export_page.run("jax_export", folder=tmp_path, images=images)
    close(names["logits"], want)
    export = names["export"]
    data = (tmp_path / "jax_export" / "apply.stablehlo").read_bytes()
    close(export.deserialize(data).call(small.params, images), want)


def test_stablehlo_without_flatbuffers_names_the_pip_install(
    ragged, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match="pip install flatbuffers"):
        stablehlo.write(tmp_path / "jax_export", ragged[0])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("platforms", [("cpu", "abacus"), ()])
def test_an_unknown_platform_is_refused(ragged, platforms):
    with pytest.raises(ValueError, match="any of cpu, cuda, tpu"):
        stablehlo.params_inside(ragged[0], platforms=platforms)


def test_padding_is_exact_and_its_macs_are_told(ragged):
    small, images, _ = ragged
    wide = folding.padded(small)
    assert wide.widths == SubnetSpec((6, 0, 3), (6, 0, 3), (20, 7, 0))
    one, other = (apply(n, images) for n in (small, wide))
    np.testing.assert_allclose(one, other, atol=1e-6)  # of zeros, summed
    assert macs.macs(wide.spec, wide.widths) > macs.macs(small.spec, small.widths)
    assert subnet.widths_of(small.params, small.spec) == small.widths  # untouched


@pytest.mark.parametrize("name", TIMM_REFUSES)
def test_timm_refuses_by_name_what_its_class_lacks(name):
    spec = export_page.TINY.replace(**export_page.VARIANTS[name])
    with pytest.raises(ValueError, match=TIMM_REFUSES[name]):
        timm.convert(export_page.small_network(spec)[0])
    spec = export_page.TINY.replace(distilled=True, registers=2)
    with pytest.raises(ValueError, match="registers beside a distillation token"):
        timm.convert(export_page.small_network(spec)[0])


def test_timm_of_the_full_network_is_what_conversion_writes(spec, params):
    from flax_skd.io import conversion

    small = checkpoint.Subnet(params, spec, SubnetSpec.full(spec), {})
    named, config = timm.convert(small)
    want = conversion.to_timm(params, spec)
    assert list(named) == list(want) and config["constructor_suffices"]
    jax.tree.map(np.testing.assert_array_equal, named, want)


def test_a_distilled_network_needs_more_than_the_plain_constructor():
    spec = export_page.TINY.replace(distilled=True)
    full = SubnetSpec.full(spec)
    config = timm.convert(export_page.small_network(spec, full)[0])[1]
    assert config["distilled"] and not config["constructor_suffices"]


def test_timms_distilled_class_which_norms_no_single_token_norms_all():
    spec = export_page.TINY.replace(distilled=True, fc_norm=True)
    small = export_page.small_network(spec)[0]
    named, config = timm.convert(small)
    assert not config["arguments"]["fc_norm"]
    assert [name for name in named if "fc_norm" in name] == []
    for name, leaf in (("weight", "scale"), ("bias", "bias")):
        np.testing.assert_array_equal(
            named[f"norm.{name}"], small.params["fc_norm"][leaf]
        )


@pytest.mark.parametrize("name", writers.FORMATS)
def test_no_format_exports_an_empty_network(name, tmp_path):
    small = export_page.small_network(widths=EMPTY)[0]
    form = writers.FORMATS[name]
    with pytest.raises(ValueError, match="larger budget"):
        form.write(tmp_path / "out", small, **{k: OPTIONS[k] for k in form.options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["npz", "flax", "timm"])
def test_a_target_that_exists_is_kept_unless_it_may_be_replaced(ragged, tmp_path, name):
    write = writers.FORMATS[name].write
    write(tmp_path / "out", ragged[0])
    with pytest.raises(ValueError, match="--overwrite"):
        write(tmp_path / "out", ragged[0])
    write(tmp_path / "out", ragged[0], overwrite=True)
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(ValueError, match="only a directory of"):
        write(tmp_path / "out", ragged[0], overwrite=True)


@pytest.mark.parametrize("name", [n for n in writers.FORMATS if n != "onnx"])
def test_a_frozen_dict_of_params_is_written_like_a_dict(ragged, tmp_path, name):
    form = writers.FORMATS[name]
    given = {k: OPTIONS[k] for k in form.options}
    frozen = ragged[0]._replace(params=freeze(ragged[0].params))
    for folder, small in (("of_dict", ragged[0]), ("frozen", frozen)):
        form.write(tmp_path / folder, small, **given)
    for file in form.files:
        content = [(tmp_path / f / file).read_bytes() for f in ("of_dict", "frozen")]
        assert content[0] == content[1]


class FakeONNX:
    """jax2onnx and onnx as far as `formats.onnx` uses them."""

    def __init__(self):
        self.ValidationError = type("ValidationError", (Exception,), {})
        self.checker = self
        self.defs = types.SimpleNamespace(onnx_opset_version=lambda: 26)

    def check_model(self, proto, full_check):
        if proto.opset == 22:
            raise self.ValidationError("no such operator")

    def to_onnx(self, call, inputs, *, opset, **names):
        shape = (2, *inputs[0][1:])
        logits = np.asarray(jax.jit(call)(np.ones(shape, np.float32)))
        content = logits.tobytes()
        return types.SimpleNamespace(opset=opset, SerializeToString=lambda: content)


@pytest.fixture
def fake_onnx(monkeypatch):
    fake, asked = FakeONNX(), []

    def require(name):
        asked.append(name)
        return fake

    monkeypatch.setattr(onnx, "require", require)
    return asked


def onnx_main(*arguments):
    with pytest.raises(SystemExit) as ended:
        onnx.main([str(a) for a in arguments])
    return ended.value.code


def test_onnx_works_from_a_sub_network_directory_without_orbax(
    ragged, tmp_path, fake_onnx, monkeypatch, capsys
):
    small, _, _ = ragged
    checkpoint.save_subnet(tmp_path / "small", small)
    real = summed_arrays.require

    def require(name):
        fake_onnx.append(name)
        return real(name)

    monkeypatch.setattr(summed_arrays, "require", require)
    out = tmp_path / "made" / "model.onnx"
    assert onnx_main(tmp_path / "small", out) == 0
    assert set(fake_onnx) == {"jax2onnx", "onnx", "safetensors.numpy"}
    images = np.ones((2, 8, 8, 3), np.float32)
    want = apply(small, images)
    close(np.frombuffer(out.read_bytes(), np.float32).reshape(want.shape), want)
    assert [p.name for p in out.parent.iterdir()] == ["model.onnx"]
    assert onnx_main(tmp_path / "small", out) == 1
    assert "pass --overwrite" in capsys.readouterr().err
    assert onnx_main(tmp_path / "small", out, "--overwrite") == 0
    assert onnx_main(tmp_path / "nothing", out, "--overwrite") == 1
    assert "not a sub-network directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("opset", "says"),
    [(14, "15 or newer"), (27, "knows 15 to 26"), (22, "no such operator")],
)
def test_an_opset_that_cannot_hold_the_network_is_refused(
    ragged, fake_onnx, opset, says
):
    with pytest.raises(ValueError, match=says):
        onnx.convert(ragged[0], opset=opset)


def test_onnx_without_jax2onnx_names_the_pip_install(ragged, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(ImportError, match="pip install jax2onnx"):
        onnx.convert(ragged[0])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    spec = export_page.TINY
    params = vit.init(spec, jax.random.key(2))
    facts = {"criterion": "wpac", "source": {"file": "tiny.npz", "sha256": "ab" * 32}}
    made = Supernet(params, spec, piad.uniform(spec, steps=6), facts)
    folder = tmp_path_factory.mktemp("networks") / "super"
    checkpoint.save_supernet(folder, made)
    return folder


def exported(workdir, out, *more):
    return main.main(["export", f"--workdir={workdir}", f"--out={out}", *more])


def test_the_ladder_is_a_folder_a_budget_with_cards_and_an_index(
    workdir, tmp_path, capsys
):
    out = tmp_path / "ladder"
    spec, levels = export_page.TINY, checkpoint.load_supernet(workdir).dropout_list
    level = piad.level_for(levels, spec, macs.macs(spec) // 2)
    cut = evaluate.list_cut(spec, levels, level)
    row = evaluate.row("wpac", spec, cut, evaluate.Score(61.5, 80.0, 0.1, 70.0, 40))
    (tmp_path / "sweep.json").write_text(json.dumps([row]))
    args = ["--formats=npz,flax,timm,nnx", "--budgets=0.5,1", "--licence=Apache-2.0"]
    args += [f"--measured={tmp_path}/sweep.json"]
    assert exported(workdir, out, *args) == 0
    assert "| 61.5 |" in capsys.readouterr().out
    names = {p.name for p in out.iterdir()}
    assert names == {*export_index.FILES, "budget_0.5", "budget_1"}
    index = json.loads((out / "index.json").read_text())
    assert [row["folder"] for row in index["rows"]] == [
        f"{budget}/{name}"
        for budget in ("budget_0.5", "budget_1")
        for name in ("npz", "flax", "timm", "nnx")
    ]
    for row in index["rows"]:
        assert row["macs"]["full"] <= row["budget"] * macs.macs(spec)
        assert row["bytes"] == sum(
            p.stat().st_size for p in (out / row["folder"]).iterdir()
        )
    small = checkpoint.load_subnet(out / "budget_0.5" / "nnx")
    assert small.widths == cut.widths
    assert small.provenance["supernet"]["criterion"] == "wpac"
    assert (out / "index.png").read_bytes().startswith(b"\x89PNG")
    card = (out / "budget_0.5" / "card.md").read_text()
    for fact in ("tiny.npz", "top1 61.5", "Apache-2.0", "paper's", "parameters"):
        assert fact in card
    page = (out / "budget_1" / "card.md").read_text()
    assert "Accuracy: not measured" in page


def test_an_export_is_replaced_only_when_told_and_only_by_another(workdir, tmp_path):
    out = tmp_path / "ladder"
    assert exported(workdir, out, "--budgets=0.5") == 0
    assert exported(workdir, out, "--budgets=0.5") == 1
    assert exported(workdir, out, "--budgets=0.75,1", "--overwrite") == 0
    assert {p.name for p in out.glob("budget_*")} == {"budget_0.75", "budget_1"}
    listed = json.loads((out / "index.json").read_text())["files"]
    files = [p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()]
    assert listed == sorted(files) and "budget_1/card.md" in listed


def test_cards_name_the_parent_of_a_command_run_inside_it(
    workdir, tmp_path, monkeypatch
):
    monkeypatch.chdir(workdir)
    assert exported(".", tmp_path / "out", "--budgets=0.5") == 0
    card = json.loads((tmp_path / "out" / "budget_0.5" / "card.json").read_text())
    assert card["source"]["parent"] == workdir.name == "super"


@pytest.mark.parametrize("place", [".", "budget_1", "budget_1/safetensors"])
@pytest.mark.parametrize("earlier", [False, True])
def test_a_users_file_in_an_export_is_named_and_kept(
    workdir, tmp_path, place, earlier, capsys
):
    out = tmp_path / "ladder"
    assert exported(workdir, out, "--budgets=1") == 0
    if earlier:  # versions that listed folders
        index = json.loads((out / "index.json").read_text())
        index["files"] = [*export_index.FILES, "budget_1"]
        (out / "index.json").write_text(json.dumps(index))
    mine = out / place / "notes.txt"
    mine.write_text("mine")
    assert exported(workdir, out, "--budgets=1", "--overwrite") == 1
    told = capsys.readouterr().err
    assert str(mine.relative_to(out)) in told and "another" in told
    assert mine.read_text() == "mine"
    mine.unlink()
    assert exported(workdir, out, "--budgets=0.5", "--overwrite") == 0
    assert not (out / "budget_1").exists()


def test_one_sub_network_is_exported_whole(ragged, tmp_path, capsys):
    small, images, want = ragged
    checkpoint.save_subnet(tmp_path / "small", small)
    assert exported(tmp_path / "small", tmp_path / "out", "--formats=flax") == 0
    names = export_page.run(
        "plain_vit", "flax", folder=tmp_path / "out" / "subnet", images=images
    )
    close(names["logits"], want)
    (row,) = json.loads((tmp_path / "out" / "index.json").read_text())["rows"]
    kept = folding.equal_heads(small.widths)
    assert row["macs_with_padding"]["full"] == macs.macs(small.spec, kept)
    added = row["macs_with_padding"]["full"] - row["macs"]["full"]
    assert f"| {macs.readable(added)} |" in capsys.readouterr().out
    args = (tmp_path / "small", tmp_path / "again", "--budgets=0.5")
    assert exported(*args) == 1
    assert "Leave --budgets away" in capsys.readouterr().err


def test_where_jax2onnx_is_absent_the_commands_that_finish_are_printed(
    workdir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(onnx, "installed", lambda: False)
    out = tmp_path / "ladder dir"
    assert exported(workdir, out, "--formats=onnx", "--budgets=0.5", "--opset=18") == 0
    commands = json.loads((out / "index.json").read_text())["commands"]
    script = (out / "finish_onnx.sh").read_text().splitlines()
    assert script[:2] == ["#!/bin/sh", "set -e"] and script[2:] == commands
    printed, page = capsys.readouterr().out, (out / "index.md").read_text()
    assert all(line in printed and line in page for line in commands)
    small = out / "budget_0.5" / "safetensors"
    assert checkpoint.load_subnet(small).spec == export_page.TINY
    assert commands[0].endswith("-m venv onnx_env")
    assert "jax2onnx" in commands[1] and "orbax" not in commands[1]
    assert commands[2].endswith(str(pathlib.Path(__file__).parents[1]))
    made = out / "budget_0.5" / "onnx"
    assert commands[3] == (
        f"onnx_env/bin/python -m flax_skd.io.formats.onnx '{small}' '{made}' --keep "
        "--opset=18"
    )


def test_a_finished_folder_is_whole_kept_and_in_the_card(
    workdir, tmp_path, monkeypatch, fake_onnx, capsys
):
    monkeypatch.setattr(onnx, "installed", lambda: False)
    out = tmp_path / "ladder"
    assert exported(workdir, out, "--formats=onnx", "--budgets=0.5,1") == 0
    places = [out / "budget_0.5", out / "budget_1"]
    todo = [(p / "safetensors", p / "onnx", "--keep") for p in places]
    assert onnx_main(*todo[0]) == 0
    (places[0] / "card.json").with_name("card.md").unlink()  # stopped before the card
    made = places[0] / "onnx" / "model.onnx"
    before = made.stat().st_ino
    assert [onnx_main(*step) for step in todo] == [0, 0]
    assert f"kept {made}" in capsys.readouterr().err and made.stat().st_ino == before
    for place in places:
        assert sorted(p.name for p in (place / "onnx").iterdir()) == sorted(onnx.FILES)
        config = json.loads((place / "onnx" / "config.json").read_text())
        assert config["preprocessing"]["mean"] == [0.5] * 3
        card = json.loads((place / "card.json").read_text())
        assert card["exports"]["onnx"] == {
            "bytes": sum(p.stat().st_size for p in (place / "onnx").iterdir()),
            "macs": card["macs"],
        }
        assert "| onnx | " in (place / "card.md").read_text()
    assert onnx_main(*todo[0][:2]) == 1
    assert "pass --overwrite" in capsys.readouterr().err
    assert exported(workdir, out, "--budgets=1", "--overwrite") == 0


def test_a_folder_that_is_not_whole_is_not_passed_over(ragged, tmp_path, fake_onnx):
    checkpoint.save_subnet(tmp_path / "small", ragged[0])
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"half")
    assert onnx_main(tmp_path / "small", tmp_path / "onnx", "--keep") == 1
    args = (tmp_path / "small", tmp_path / "onnx", "--keep", "--overwrite")
    (tmp_path / "onnx" / "model.onnx").unlink()
    assert onnx_main(*args) == 0
    assert sorted(p.name for p in (tmp_path / "onnx").iterdir()) == sorted(onnx.FILES)


FAKE = """
import os, types
def to_onnx(call, inputs, **names):
    if os.path.exists("stop") and os.path.exists("once"):
        os._exit(1)
    open("once", "w").close()
    return types.SimpleNamespace(SerializeToString=lambda: b"graph")
"""


def test_the_script_is_run_again_after_an_interruption(workdir, tmp_path, monkeypatch):
    """The second budget stops the first run: real processes, with no jax2onnx."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "jax2onnx.py").write_text(FAKE)
    (packages / "onnx.py").write_text(
        "class checker:\n    ValidationError = ValueError\n"
        "    check_model = staticmethod(lambda *a, **k: None)\n"
        "class defs:\n    onnx_opset_version = staticmethod(lambda: 26)\n"
    )
    python = tmp_path / "onnx_env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(onnx, "installed", lambda: False)
    monkeypatch.setattr(onnx, "environment_commands", list)
    out = tmp_path / "ladder"
    assert exported(workdir, out, "--formats=onnx", "--budgets=0.5,1") == 0
    paths = [str(packages), str(pathlib.Path(onnx.__file__).parents[3])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def finish():
        script = ["sh", str(out / export_index.SCRIPT)]
        return subprocess.run(
            script, cwd=tmp_path, env=env, capture_output=True, check=False
        )

    (tmp_path / "stop").touch()
    assert finish().returncode == 1
    assert (out / "budget_0.5" / "onnx").is_dir()
    assert not list((out / "budget_1").glob("*onnx*"))
    (tmp_path / "stop").unlink()
    done = finish()
    assert done.returncode == 0, done.stderr
    assert (out / "budget_1" / "onnx" / "model.onnx").read_bytes() == b"graph"


@pytest.mark.parametrize(
    ("origin", "want"),
    [
        ({"url": "file:///src/skd", "dir_info": {}}, "file:///src/skd"),
        (
            {"url": "https://x.org/skd", "vcs_info": {"vcs": "git", "commit_id": "ab"}},
            "git+https://x.org/skd@ab",
        ),
        (None, "flax-skd==9.1"),
    ],
)
def test_an_installed_package_is_installed_again_from_where_it_came(
    monkeypatch, tmp_path, origin, want
):
    text = json.dumps(origin) if origin else None
    found = types.SimpleNamespace(version="9.1", read_text=lambda name: text)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    monkeypatch.setattr(onnx, "__file__", str(tmp_path / "a" / "b" / "c" / "onnx.py"))
    assert onnx.environment_commands()[2].endswith(f" --no-deps {want}")


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--formats=pickle", "safetensors, npz"),
        ("--formats=,", "no format given"),
        ("--budgets=half", "write shares like"),
        ("--budgets=1.5", "at most 1"),
        ("--budgets=0.0001", "no level reaches"),
        ("--platforms=abacus", "rocm"),
        ("--opset=3", "15 or newer"),
        ("--measured=nowhere.json --budgets=1", "nowhere.json"),
    ],
)
def test_what_cannot_be_exported_is_said_before_anything_is_written(
    workdir, tmp_path, flag, says, capsys
):
    assert exported(workdir, tmp_path / "out", *flag.split()) == 1
    told = capsys.readouterr().err
    if flag == "--formats=pickle":
        assert all(f"  {name}" in told for name in writers.FORMATS)
    else:
        assert says in told
    assert not list(tmp_path.iterdir())


def test_the_python_example_of_the_page_runs(ragged, tmp_path):
    arrays.write_safetensors(tmp_path / "safetensors", ragged[0])
    names = export_page.run("python", folder=tmp_path)
    assert set(names["state_dict"]) > {"blocks.0.attn.qkv.weight", "head.weight"}
    assert (tmp_path / "for_torch" / "model.safetensors").is_file()


def test_a_card_without_facts_says_that_it_does_not_know(ragged):
    fields = model_card.card(ragged[0], exports={})
    page = model_card.markdown(fields)
    assert "Accuracy: not measured" in page and "not stated" in page
    assert fields["widths"]["qk_dim"] == [6, 0, 2]
    assert fields["macs"]["paper"] == macs.macs(
        export_page.TINY, ragged[0].widths, convention="paper"
    )


def test_an_empty_level_is_refused_by_the_command(tmp_path, capsys):
    spec = export_page.TINY
    rows = [SubnetSpec.full(spec), EMPTY]
    made = Supernet(
        vit.init(spec, jax.random.key(0)), spec, piad.from_rows(rows, spec), {}
    )
    checkpoint.save_supernet(tmp_path / "super", made)
    assert exported(tmp_path / "super", tmp_path / "out", "--budgets=0.5,1") == 1
    assert "larger budget" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="larger budget"):
        exporting.chosen(str(tmp_path / "super"), "0.5", "")
