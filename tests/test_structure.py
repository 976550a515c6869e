"""The house rules, read from the source of every module."""

import ast
import graphlib
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

import flax_skd

ROOT = pathlib.Path(flax_skd.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.name != "__init__.py" and "configs" not in path.relative_to(ROOT).parts
}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}

# A module imports from lower floors only. A new module is placed here first.
FLOORS = {
    "method.spec": 0,
    **dict.fromkeys(
        [
            *("method.attention", "method.layers", "method.vit", "method.macs"),
            *("method.subnet", "method.losses", "method.costs", "method.moments"),
            *("method.partial_sums", "method.refit", "method.observed"),
        ],
        1,
    ),
    **dict.fromkeys(
        [
            *("method.statistics", "method.second_moments", "method.feature_sums"),
            *("method.compensation", "method.unit_order", "method.pass_checks"),
            "method.pilots",
        ],
        2,
    ),
    **dict.fromkeys(
        [
            *("method.contraction", "method.importance", "method.piad"),
            *("method.growth", "method.allocation", "method.packing"),
            *("method.balance", "method.recalibration", "method.latency"),
            "method.latency_design",
        ],
        3,
    ),
    **dict.fromkeys([name for name in MODULES if name.startswith("io.")], 4),
    **dict.fromkeys(
        [
            *("run.sharding", "run.train", "run.objective", "run.optimizer"),
            *("run.gradients", "run.lists", "run.distributed", "run.witness"),
            "run.updates",
            *("run.interrupt", "run.elastic", "run.distillation", "run.mixing"),
            *("run.progress", "run.evaluate", "run.report"),
            *("run.recipes", "run.unit_choice", "run.export_index"),
            *("run.settling", "run.buckets", "run.faults"),
            *("run.timing", "run.time_budget", "run.profile_report", "run.family"),
            "run.accuracies",
        ],
        5,
    ),
    **dict.fromkeys(
        [
            *("run.commands", "run.demo", "run.training", "run.contracting"),
            *("run.config_files", "run.feed", "run.programs", "run.sweeping"),
            *("run.subcommands", "run.recalibrating", "run.exporting"),
            *("run.profiling", "run.configured_loss", "run.training_checks"),
        ],
        6,
    ),
    # The other systems: what they hand to the one loop is read by `main` alone.
    **dict.fromkeys([name for name in MODULES if name.startswith("rivals.")], 7),
    "run.main": 8,
}
# Inside method/, the only imports along a floor: `vit` is built of `attention` and
# `layers`, three modules read its types, `growth` makes lists of `piad` from `importance`, and so
# does `allocation` from losses; a module too long for one file reads its other half. Inside io/ and run/ a floor is one layer, whose modules may use each
# other without a circle.
ALONG_A_FLOOR = {
    ("method.vit", "method.attention"),
    ("method.vit", "method.layers"),
    ("method.subnet", "method.vit"),
    ("method.costs", "method.vit"),
    ("method.growth", "method.piad"),
    ("method.growth", "method.importance"),
    ("method.allocation", "method.growth"),
    ("method.allocation", "method.piad"),
    ("method.observed", "method.vit"),
    ("method.statistics", "method.second_moments"),
    ("method.statistics", "method.pass_checks"),
    ("method.statistics", "method.pilots"),
    ("method.pilots", "method.second_moments"),
    ("method.pass_checks", "method.feature_sums"),
    ("method.statistics", "method.feature_sums"),
    ("method.feature_sums", "method.second_moments"),
    ("method.contraction", "method.balance"),
    ("method.latency", "method.piad"),
    ("method.latency_design", "method.latency"),
}
LIGHT = {"jax", "flax", "optax", "numpy", "flax_skd", *sys.stdlib_module_names}


def imports(tree):
    """Dotted names that any import statement of a module may load."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide the floor they come from"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def neighbours(name):
    """Modules of flax_skd that a module imports, without the leading package."""
    found = {n.removeprefix("flax_skd.") for n in imports(TREES[name])}
    return sorted(found & set(MODULES))


def on_import(node):
    """Import statements that run when the module is imported: not in a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from on_import(child)


def public_definitions(node, prefix=""):
    """(dotted name, node) of every public function, class and method."""
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if child.name.startswith("_"):
            continue
        yield prefix + child.name, child
        if isinstance(child, ast.ClassDef):
            yield from public_definitions(child, f"{prefix}{child.name}.")


def test_every_module_stands_on_a_floor():
    unplaced = sorted(set(MODULES) - set(FLOORS))
    assert MODULES and not unplaced, f"place them in FLOORS: {unplaced}"


def test_the_table_of_modules_says_of_each_its_floor_and_its_first_sentence():
    page = (pathlib.Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    rows = re.findall(r"(?m)^\| (\d) \| `([\w/]+)` \| (.+) \|$", page)
    told = {m.replace("/", "."): (int(floor), words) for floor, m, words in rows}
    docs = {name: ast.get_docstring(tree) for name, tree in TREES.items()}
    assert told == {n: (FLOORS[n], d.splitlines()[0]) for n, d in docs.items()}
    assert len(rows) == len(told)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_floors_below(name):
    def allowed(other):
        if FLOORS[other] == FLOORS[name]:
            return FLOORS[name] >= 4 or (name, other) in ALONG_A_FLOOR
        return FLOORS[other] < FLOORS[name]

    upward = [other for other in neighbours(name) if not allowed(other)]
    assert not upward, f"{name} (floor {FLOORS[name]}) imports {upward}"


def test_no_import_along_a_floor_is_listed_that_is_not_there():
    stale = {pair for pair in ALONG_A_FLOOR if pair[1] not in neighbours(pair[0])}
    assert not stale, f"take them out of ALONG_A_FLOOR: {stale}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: neighbours(name) for name in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert sorted(order) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_the_package_itself_is_imported_for_its_version_alone(name):
    """`import flax_skd` loads every floor: a module below may not lean on it."""
    tree = TREES[name]
    bare = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    handed_out = {a.name for n in bare if n.module == "flax_skd" for a in n.names}
    read = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "flax_skd"
    }
    folders = {"method", "io", "run"}
    assert read | handed_out - folders <= {"__version__"}


def test_sizes_are_plain_python():
    """A tool that only reads a spec should not have to install an accelerator stack."""
    tops = {n.partition(".")[0] for n in imports(TREES["method.spec"])}
    assert tops <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [n for n in MODULES if not n.startswith("run.")])
def test_method_and_io_import_nothing_heavy_as_they_load(name):
    loaded = ast.Module(list(on_import(TREES[name])), [])
    heavy = {n.partition(".")[0] for n in imports(loaded)} - LIGHT
    assert not heavy, f"{name}: import {sorted(heavy)} where it is used"


# Other packages may import what they like (flax itself loads orbax): only an import
# that runs in a file of flax_skd is refused, loaded already or not.
GUARD = """
import builtins, importlib, os, sys

LIGHT = {"jax", "flax", "optax", "numpy", "flax_skd", *sys.stdlib_module_names}
root = os.path.join(sys.argv[1], "")

def guarded(load):
    def guard(name, *args, **kwargs):
        top = name.partition(".")[0]
        caller = sys._getframe(1).f_code.co_filename
        if caller.startswith(root) and top not in LIGHT:
            raise ModuleNotFoundError(f"{caller} imports {name}", name=top)
        return load(name, *args, **kwargs)
    return guard

builtins.__import__ = guarded(builtins.__import__)
importlib.import_module = guarded(importlib.import_module)
import flax_skd

try:
    exec(compile("import absl", root + "probe.py", "exec"))
except ModuleNotFoundError:
    print("bare", len(flax_skd.__all__))
"""


def test_the_package_imports_with_jax_flax_optax_and_numpy_alone():
    done = subprocess.run(
        [sys.executable, "-c", GUARD, str(ROOT)],
        cwd=ROOT.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["bare", str(len(flax_skd.__all__))]


@pytest.mark.parametrize("name", MODULES)
def test_every_public_function_class_and_method_has_a_docstring(name):
    tree = TREES[name]
    bare = [
        what
        for what, node in [("module", tree), *public_definitions(tree)]
        if not (ast.get_docstring(node) or "").strip()
    ]
    assert not bare, f"{name}: say what these do: {bare}"


@pytest.mark.parametrize("name", flax_skd.__all__)
def test_every_name_the_package_hands_out_exists_and_is_documented(name):
    thing = getattr(flax_skd, name)
    doc = (thing.__doc__ or "").strip()
    # Dataclasses and named tuples make up "Name(field, ...)" where nobody wrote any.
    assert doc and not doc.startswith(f"{name}(")


def test_the_package_hands_out_each_name_once_and_in_order():
    assert flax_skd.__all__ == sorted(set(flax_skd.__all__))


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_longer_than_300_lines(name):
    lines = MODULES[name].read_text().count("\n")
    assert lines <= 300


def test_no_module_is_a_drawer_for_odds_and_ends():
    words = {word for name in MODULES for word in name.split(".")}
    assert words.isdisjoint({"utils", "util", "common", "helpers", "misc"})


@pytest.mark.parametrize("name", [n for n in MODULES if not n.startswith("run.")])
def test_method_and_io_do_not_print(name):
    calls = [n.func for n in ast.walk(TREES[name]) if isinstance(n, ast.Call)]
    assert "print" not in {f.id for f in calls if isinstance(f, ast.Name)}


@pytest.mark.parametrize("name", MODULES)
def test_every_module_can_be_imported(name):
    assert importlib.import_module(f"flax_skd.{name}").__doc__
