"""The pages under docs/ are true: their commands parse, their Python runs."""

import ast
import contextlib
import io
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tarfile

import export_page
import jax
import numpy as np
import pytest
from PIL import Image

import flax_skd as skd
from flax_skd.io import conversion
from flax_skd.method import macs
from flax_skd.run import config_files, main
from flax_skd.run.subcommands import FLAGS

ROOT = pathlib.Path(__file__).parents[1]
DOCS = {page.stem: page for page in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README": ROOT / "README.md", **DOCS}
# Page -> the command that its options are of.
TASKS = {
    "convert": ["convert"],
    "contract": ["contract"],
    "train_on_a_pod": ["train", "--config=configs/piad.py:S/16"],
    "extract": ["extract"],
    "measure": ["sweep"],
}
# The tiny network and its images instead of real ones.
SMALLER = {
    'variant="Ti/16", recipe="augreg"': 'recipe="augreg", fields={"num_heads": 2}',
    '"configs/balanced.py:Ti/16"': '"configs/balanced.py"',
    '"vit_tiny.safetensors", "augreg"': '"network", ""',
    '"tar:calibration.tar", "sorted"': '"tar:calibration.tar", ""',
    "images = 1000": "images = 30",
    "images=1000": "images=30",
    "tar:other.tar": "tar:calibration.tar",
    '"configs/piad.py:S/16"': '"configs/piad.py"',
    '"tfds:imagenet2012:train"': '"tar:calibration.tar"',
    '"tfds:imagenet2012:validation"': '"tar:validation.tar"',
    "= 1024, 300.0": "= 8, 1.0\nconfig.piad.calibration.images = 16",
    "batch_size=50": "batch_size=20",
}


def fenced(page):
    """(language, text) of every fenced block."""
    return re.findall(r"(?ms)^```(\w*)\n(.*?)^```", page.read_text())


def commands(page):
    """The arguments of every `flax-skd ...` in a fenced block."""
    code = "".join(text for language, text in fenced(page) if language != "python")
    lines = code.replace("\\\n", " ").splitlines()
    found = (re.search(r"(?:^|\s)flax-skd (.*)", line) for line in lines)
    return [shlex.split(match[1]) for match in found if match]


def spans(text):
    """Inline code, fenced blocks left out."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_has_these_flags_and_entries(page):
    for name, *rest in commands(PAGES[page]):
        values = main.parse(name, rest)
        assert name == "demo" or values.workdir


def test_every_whole_command_within_a_sentence_parses():
    cards = sorted((ROOT / "docs" / "networks").glob("*.md"))
    said = [s for page in (*PAGES.values(), *cards) for s in spans(page.read_text())]
    whole = [s for s in said if s.startswith("flax-skd ") and "--workdir=" in s]
    assert len(whole) > 3
    for _, name, *rest in map(shlex.split, whole):
        main.parse(name, rest)


def test_the_commands_of_the_pages_are_found():
    assert {p: len(commands(PAGES[p])) for p in TASKS} == {
        "convert": 2,
        "contract": 2,
        "train_on_a_pod": 4,
        "extract": 3,
        "measure": 2,
    }
    assert commands(DOCS["convert"])[1] == [
        *("convert", "--config.model.path=network", "--workdir=again.safetensors")
    ]


@pytest.mark.parametrize("page", TASKS)
def test_every_option_that_a_page_mentions_parses(page):
    name, *config = TASKS[page]
    flags = main.COMMANDS[name].flags
    needed = [f"--{flag}=x" for flag in ("workdir", "out") if flag in flags]
    mentioned = [s for s in spans(PAGES[page].read_text()) if s.startswith("--")]
    options = [s for s in mentioned if "=" in s]
    assert options
    for option in options:
        main.parse(name, [*needed, *config, option])


# results.md quotes flags of the benchmarks too.
@pytest.mark.parametrize("page", [page for page in PAGES if page != "results"])
def test_every_flag_that_a_page_mentions_exists(page):
    known = set(FLAGS) | {"config", "help"}
    for file in (ROOT / "configs").glob("*.py"):
        found = config_files.load(f"configs/{file.name}")
        known |= {f"config.{key}" for key in entries(found.to_dict())}
    for span in spans(PAGES[page].read_text()):
        names = set(re.findall(r"(?<!\S)--([a-z]\w*(?:\.\w+)*)", span))
        assert names - {"config.NAME"} <= known, span


def entries(config):
    """Paths of a nested dict, sections included."""
    for key, value in config.items():
        yield key
        for rest in entries(value) if isinstance(value, dict) else ():
            yield f"{key}.{rest}"


def templates():
    """Every text of the package, values in it as a NUL."""
    found = []
    for file in (ROOT / "flax_skd").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                found += ["".join(p if isinstance(p, str) else "\0" for p in parts)]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


@pytest.mark.parametrize("page", TASKS)
def test_every_message_that_a_page_explains_is_one_of_the_program(page):
    text, said = PAGES[page].read_text(), templates()
    section = text.partition("## Errors people meet")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if "|" in line]
    messages = [span for row in rows for span in spans(row)]
    assert len(messages) > 3
    for message in messages:
        pattern = "[^\n]*".join(map(re.escape, message.split("...")))
        assert re.search(pattern, said), message


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    folder = PAGES[page].parent
    for link, anchor in re.findall(
        r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", PAGES[page].read_text()
    ):
        target = folder / link if link else PAGES[page]
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), f"{link}#{anchor}"


def anchors(page):
    """What links to the headings of a page end in."""
    titles = re.findall(r"(?m)^#+ (.*)$", page.read_text())
    return {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}


def test_the_index_links_every_page():
    linked = set(re.findall(r"\]\((\w+)\.md\)", DOCS["index"].read_text()))
    assert linked == set(DOCS) - {"index"}


def examples(page):
    """Label -> code of every Python block; each has one."""
    blocks = [text for language, text in fenced(DOCS[page]) if language == "python"]
    found = [re.match(r"# example: (.*)\n", text) for text in blocks]
    assert all(found), page
    return {match[1]: text for match, text in zip(found, blocks)}


def run(label, folder, **names):
    """Executes an example in `folder` on the tiny network; returns all names."""
    page = {"train": "train_on_a_pod"}.get(label, label.partition(",")[0])
    code = examples(page)[label]
    for old, new in SMALLER.items():
        code = code.replace(old, new)
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as told:
        exec(compile(code, f"{page}.md: {label}", "exec"), names)  # noqa: S102
    return {**names, "printed": told.getvalue()}


def test_nothing_is_replaced_that_no_page_says():
    code = "".join(text for page in TASKS for text in examples(page).values())
    assert [old for old in SMALLER if old not in code] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory, one_device):
    """A timm file and tars of labelled images."""
    path, rng = tmp_path_factory.mktemp("pages"), np.random.default_rng(0)
    params = export_page.small_network()[1]
    conversion.write_timm(path / "vit_tiny.safetensors", params, export_page.TINY)
    for name in ("calibration", "validation"):
        with tarfile.open(path / f"{name}.tar", "w") as tar:
            for i in range(40):
                png = io.BytesIO()
                pixels = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(png, "PNG")
                info = tarfile.TarInfo(f"class_{i % 5}/{i}.png")
                info.size = png.tell()
                png.seek(0)
                tar.addfile(info, png)
    return path


@pytest.fixture(scope="module")
def converted(folder):
    return run("convert", folder)


@pytest.fixture(scope="module")
def contracted(folder, converted):
    return run("contract", folder)


def test_the_example_of_convert_keeps_every_parameter(folder, converted):
    want = export_page.small_network()[1]
    again = conversion.read(
        folder / "again.safetensors", recipe="augreg", fields={"num_heads": 2}
    )
    network = skd.load_supernet(folder / "network")
    assert int(network.dropout_list.levels) == 0
    for params in (network.params, again.params):
        jax.tree.map(np.testing.assert_array_equal, params, want)


def test_the_example_of_contract_writes_the_same_function(folder, contracted):
    assert "logits changed by at most" in contracted["printed"]
    before, after = (skd.load_supernet(folder / n) for n in ("network", "supernet"))
    images = np.random.default_rng(1).integers(0, 256, (8, 8, 8, 3)).astype(np.uint8)
    logits = [
        skd.ViT(net.spec).apply({"params": net.params}, images)
        for net in (before, after)
    ]
    np.testing.assert_allclose(*logits, atol=1e-5)
    assert after.compensation is not None
    rows = run("contract, read", folder)["printed"].splitlines()
    counts = [int(row.split()[1]) for row in rows]
    assert counts[0] == skd.macs(after.spec)
    assert counts == sorted(counts, reverse=True) and len(counts) == 32


def test_the_example_of_train_leaves_a_super_network_and_its_list(folder, contracted):
    names = run("train", folder)
    assert "ema_smallest_top1" in names["printed"]
    assert names["trained"].provenance["trained"] == "piad"
    assert int(names["trained"].dropout_list.levels) > 0
    assert (folder / "list.png").stat().st_size > 1000


def test_the_examples_of_extract_write_a_level_and_fit_it(folder, contracted):
    names = run("extract", folder)
    supernet, widths, spec = names["supernet"], names["widths"], names["spec"]
    assert skd.macs(spec, widths) <= skd.macs(spec) // 2
    images = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    found = run("extract, run", folder, images=images)["logits"]
    masks = skd.masks(spec, widths)
    want = skd.ViT(spec).apply({"params": names["whole"]}, images, masks)
    np.testing.assert_allclose(found, want, atol=1e-5)
    fitted = run("extract, fitted", folder, supernet=supernet, widths=widths, skd=skd)
    kl = fitted["done"].kl
    assert kl[fitted["done"].chosen] == min(kl.values()) <= kl["stored"]
    shapes = (jax.tree.map(np.shape, n["small"]) for n in (names, fitted))
    assert next(shapes) == next(shapes)


def test_the_examples_of_measure_print_a_table_and_count(folder, contracted):
    names = run("measure", folder)
    assert [row["kept"] < 1 for row in names["rows"]] == [False, True, True]
    assert "MACs (full count)" in names["printed"]
    assert (folder / "sweep.png").stat().st_size > 1000
    names = run("measure, costs", folder)
    spec, half = names["spec"], names["half"]
    counts = [macs.macs(spec, half), macs.macs(spec, half, convention="paper")]
    counts.append(skd.param_count(spec, half))
    assert list(map(int, names["printed"].split())) == counts


def test_the_api_pages_are_made_from_docstrings_without_a_warning(tmp_path):
    pytest.importorskip("pdoc", reason="pdoc is not installed: pip install '.[docs]'")
    (line,) = re.findall(r"(?m)^pdoc .*-o api .*$", DOCS["index"].read_text())
    program = shlex.split(line.replace("-o api", f"-o {tmp_path}"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", *program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "Warn" not in done.stderr, done.stderr[-2000:]
    modules = [
        file.relative_to(ROOT).with_suffix("")
        for file in (ROOT / "flax_skd").rglob("[!_]*.py")
    ]
    missing = [m for m in modules if not (tmp_path / f"{m}.html").is_file()]
    assert len(modules) > 50 and not missing
