"""What format timm writes, run by timm on torch; skipped where they are absent."""

import export_page
import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed: pip install '.[timm]'")
pytest.importorskip(
    "timm",
    reason="timm is not installed: pip install '.[timm]'",
    exc_type=ImportError,
)

import torch
from timm.layers import Attention

from flax_skd.io.formats import timm
from flax_skd.method.spec import SubnetSpec

SUPPORTED = [name for name in export_page.VARIANTS if name != "pre-logits"]


def close(got, want):
    got = got.detach().numpy()
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", SUPPORTED)
def test_the_builder_of_the_page_runs_any_widths(variant, tmp_path):
    spec = export_page.TINY.replace(**export_page.VARIANTS[variant])
    small, images, want = export_page.network(spec)
    timm.write(tmp_path / "timm", small)
    names = export_page.run("build_timm", "timm", folder=tmp_path, images=images)
    close(names["logits"], want)


@pytest.mark.parametrize("variant", SUPPORTED)
def test_the_builder_of_the_page_runs_even_widths(variant, tmp_path):
    spec = export_page.TINY.replace(**export_page.VARIANTS[variant])
    small, images, want = export_page.network(spec, export_page.EVEN)
    timm.write(tmp_path / "timm", small)
    names = export_page.run("build_timm", "timm", folder=tmp_path, images=images)
    assert not names["config"]["constructor_suffices"]
    close(names["logits"], want)


@pytest.mark.parametrize("hidden", [1, 7, 11, 20])
def test_the_constructor_suffices_for_whole_heads_and_one_mlp_width(hidden, tmp_path):
    widths = SubnetSpec((6,) * 3, (6,) * 3, (hidden,) * 3)
    small, images, want = export_page.network(widths=widths)
    timm.write(tmp_path / "timm", small)
    names = export_page.run("timm, constructor", folder=tmp_path, images=images)
    assert names["config"]["constructor_suffices"]
    close(names["logits"], want)


def test_attention_of_a_cut_head_scales_by_its_own_width():
    """The reason to fold the scale: timm knows nothing of the full head."""
    attention = Attention(12, 2, attn_head_dim=3)
    assert attention.scale == 3**-0.5


def test_a_gradient_reaches_every_tensor(tmp_path):
    small, images, _ = export_page.network()
    timm.write(tmp_path / "timm", small)
    names = export_page.run("build_timm", "timm", folder=tmp_path, images=images)
    names["logits"].square().sum().backward()
    still = [n for n, p in names["model"].named_parameters() if p.grad is None]
    assert not still and torch.isfinite(names["model"].pos_embed.grad).all()
