"""The notebooks run from a clean kernel, and are committed without outputs."""

import ast
import functools
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import types

import jax
import numpy as np
import plain_code
import pytest
from PIL import Image

from flax_skd.io import checkpoint, conversion
from flax_skd.method import vit
from flax_skd.method.spec import ViTSpec

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "colab").glob("*.ipynb"))}


def cells(path, kind="code"):
    found = json.loads(path.read_text())["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def code(cell):
    """The Python of a cell, without the lines that are Jupyter's."""
    if cell["source"][0].startswith("%%"):
        return ""
    return "".join(line for line in cell["source"] if not line.startswith("%"))


def replacement(path):
    """What stands in the place of the first code cell, for a real checkpoint."""
    texts = ["".join(cell["source"]) for cell in cells(path, "markdown")]
    (text,) = (text for text in texts if "change this cell" in text and "##" in text)
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


def colab(monkeypatch):
    """Stands in for what Colab alone has; returns the folders that are mounted."""
    mounted = []
    drive = types.SimpleNamespace(mount=mounted.append)
    module = types.SimpleNamespace(drive=drive)
    monkeypatch.setitem(sys.modules, "google", types.SimpleNamespace(colab=module))
    monkeypatch.setitem(sys.modules, "google.colab", module)
    return mounted


def names(text, context):
    """Names that a text reads (ast.Load) or makes (ast.Store), imports included."""
    nodes = list(ast.walk(ast.parse(text)))
    found = {
        n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, context)
    }
    if context is ast.Store:
        kinds = (ast.Import, ast.ImportFrom)
        imports = [a for n in nodes if isinstance(n, kinds) for a in n.names]
        found |= {alias.asname or alias.name for alias in imports}
    return found


def test_there_is_a_notebook_a_task():
    assert list(NOTEBOOKS) == ["export_and_deploy", "quickstart", "train_piad"]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_are_committed_without_outputs(name):
    assert cells(NOTEBOOKS[name])
    for cell in cells(NOTEBOOKS[name]):
        assert not cell["outputs"] and cell["execution_count"] is None


@pytest.mark.parametrize("name", NOTEBOOKS)
@pytest.mark.parametrize("chips", ["", "cuda12", "tpu"])
def test_the_first_cell_installs_for_the_runtime(name, chips, tmp_path):
    """Colab's, with its folder, `nvidia-smi` and `pip` stood in for."""
    first = "".join(cells(NOTEBOOKS[name])[0]["source"])
    if chips == "tpu":
        (tmp_path / "accel0").touch()
    text = first.removeprefix("%%bash\n").replace("/dev/", f"{tmp_path}/")
    text = text.replace(f"{tmp_path}/null", "/dev/null")
    has = 0 if chips == "cuda12" else 1
    tools = f'nvidia-smi() {{ return {has}; }}; pip() {{ echo "$@"; }}\n'
    env = {"PATH": os.environ["PATH"], "COLAB_RELEASE_TAG": "release"}
    run = functools.partial(subprocess.run, ["bash", "-c", tools + text], text=True)
    extras = ["export"] * (name == "export_and_deploy") + [chips] * bool(chips)
    wanted = f"[{','.join(extras)}]" if extras else ""
    done = run(env=env, capture_output=True, check=True)
    assert done.stdout == f"install --quiet /content/flax_skd{wanted}\n"
    del env["COLAB_RELEASE_TAG"]
    assert run(env=env, capture_output=True, check=True).stdout == ""
    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}": [' in setup for extra in extras)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebooks_have_no_logic_of_their_own(name):
    kinds = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.While, ast.Try)
    for cell in cells(NOTEBOOKS[name]):
        assert not [n for n in ast.walk(ast.parse(code(cell))) if isinstance(n, kinds)]


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_one_cell_to_change_makes_all_that_the_others_read(name):
    _, first, *others = (code(cell) for cell in cells(NOTEBOOKS[name]))
    made = names(first, ast.Store)
    read = set()
    for text in reversed(others):
        read = (read - names(text, ast.Store)) | names(text, ast.Load)
    wanted = read & made
    assert wanted and wanted <= names(replacement(NOTEBOOKS[name]), ast.Store)


@pytest.fixture(scope="module")
def real_files(tmp_path_factory):
    """A timm file of ViT-Ti/16's sizes, and tars of a few labelled images."""
    folder = tmp_path_factory.mktemp("real")
    spec = ViTSpec.named("Ti/16")
    shapes = jax.eval_shape(lambda: vit.init(spec, jax.random.key(0)))
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    conversion.write_timm(folder / "vit_tiny.safetensors", params, spec)
    png = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(png, "PNG")
    for name in ("calibration", "validation"):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for i in range(3):
                info = tarfile.TarInfo(f"class_{i}/{i}.png")
                info.size = png.tell()
                tar.addfile(info, io.BytesIO(png.getvalue()))
    return folder


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_scales_a_notebook_to_a_real_checkpoint_runs(
    name, real_files, monkeypatch
):
    monkeypatch.chdir(real_files)
    mounted = colab(monkeypatch)
    made = {}
    exec(replacement(NOTEBOOKS[name]), made)  # noqa: S102, our own notebook
    if name == "quickstart":
        assert (made["net"].spec.width, made["net"].spec.gelu) == (192, "exact")
        assert len(made["calibration"]) == len(made["validation"]) == 3
    else:
        assert made["wpac"].model.variant == "Ti/16"
    if name == "train_piad":
        assert made["piad"].program == "piad" and made["piad"].dtype == "bfloat16"
        assert made["folder"].startswith(mounted[0])
        assert not made[
            "piad"
        ].piad.progressive_epochs  # a third of however short a run


def outputs(name, folder):
    """Runs a notebook by nbmake, from a clean kernel: (what it prints, its pictures)."""
    pytest.importorskip("nbmake", reason="nbmake is missing: pip install '.[test]'")
    copy = folder / f"{name}.ipynb"
    copy.write_bytes(NOTEBOOKS[name].read_bytes())
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"}
    env["XLA_FLAGS"] = plain_code.flags(1)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"),
            *("--nbmake", "--nbmake-timeout=900", "--overwrite", str(copy)),
        ],
        env={**env, "FLAX_SKD_FAST": "1", "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    found = [o for cell in cells(copy) for o in cell["outputs"]]
    printed = "".join("".join(o["text"]) for o in found if o.get("name") == "stdout")
    return printed, [o for o in found if "image/png" in o.get("data", {})]


def test_the_quickstart_runs_and_wpac_beats_plain_cuts(tmp_path):
    printed, pictures = outputs("quickstart", tmp_path)
    top1 = re.findall(r"\| all \| 0.75 \| ([\d.]+) \| ([\d.]+) \|", printed)
    wpac, plain = map(float, top1[0])
    assert wpac > plain
    assert "MACs, (64, 10)" in printed and len(pictures) == 1
    assert float(re.search(r"changed by at most (\S+)", printed)[1]) < 1e-4
    assert checkpoint.load_subnet(tmp_path / "small").spec.num_classes == 10


def test_train_piad_runs_and_draws_the_list_it_grew(tmp_path):
    printed, pictures = outputs("train_piad", tmp_path)
    assert "ema_smallest_top1" in printed
    rows = re.findall(r"\| all +\| (\S+) +\| (piad|wpac alone) ", printed)
    assert len(rows) == 8
    assert min(float(kept) for kept, _ in rows) < 0.5
    assert len(pictures) == 2


def test_export_and_deploy_runs_and_every_format_agrees(tmp_path):
    printed, pictures = outputs("export_and_deploy", tmp_path)
    assert len(pictures) == 1
    differences = ast.literal_eval(re.search(r"{'safetensors'.*}", printed)[0])
    assert set(differences) == {"safetensors", "nnx", "jax_export"}
    assert max(differences.values()) < 1e-5
    assert len(re.findall(r"\| \[\w+\]\(budget_", printed)) == 6
    assert len(re.findall(r"images/s", printed)) == 4
