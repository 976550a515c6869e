"""ONNX files run by onnxruntime; skipped where jax2onnx is absent.

Its pins keep it out of the training environment: docs/export.md makes one for it.
"""

import export_page
import numpy as np
import pytest

_WHY = "needs jax2onnx in its own environment, see docs/export.md"
pytest.importorskip("jax2onnx", reason=_WHY)
onnxruntime = pytest.importorskip("onnxruntime", reason=_WHY)

from flax_skd.io import checkpoint
from flax_skd.io.formats import onnx

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("variant", export_page.VARIANTS)
def test_onnxruntime_gives_the_masked_networks_logits(variant, tmp_path):
    spec = export_page.TINY.replace(**export_page.VARIANTS[variant])
    small, images, want = export_page.network(spec)
    onnx.write(tmp_path / "onnx", small)
    for size in (4, 1):
        names = export_page.run("onnx", folder=tmp_path, images=images[:size])
        np.testing.assert_allclose(names["logits"], want[:size], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("opset", [15, 18, 23])
def test_older_and_newer_opsets_hold_the_network(opset):
    small, images, want = export_page.network()
    session = onnxruntime.InferenceSession(onnx.convert(small, opset=opset))
    (logits,) = session.run(["logits"], {"images": images})
    np.testing.assert_allclose(logits, want, atol=1e-5, rtol=1e-5)


def test_an_opset_of_the_future_is_refused():
    with pytest.raises(ValueError, match="the installed onnx knows 15 to"):
        onnx.convert(export_page.network()[0], opset=999)


def test_the_module_converts_a_directory(tmp_path, capsys):
    small, _, _ = export_page.network()
    checkpoint.save_subnet(tmp_path / "small", small)
    with pytest.raises(SystemExit) as ended:
        onnx.main([str(tmp_path / "small"), str(tmp_path / "model.onnx")])
    assert ended.value.code == 0 and "wrote" in capsys.readouterr().err
    onnxruntime.InferenceSession(tmp_path / "model.onnx")
