"""What `help` says of the public names is complete, and true of their signatures."""

import importlib.resources
import inspect
import re

import pytest

import flax_skd

FUNCTIONS = [n for n in flax_skd.__all__ if inspect.isfunction(getattr(flax_skd, n))]
FIELDS = [n for n in flax_skd.__all__ if hasattr(getattr(flax_skd, n), "_fields")]


def section(doc, title):
    """The lines of a section, without their indent; none if it is not there."""
    found = re.search(rf"(?m)^{title}:\n((?:  .*\n|\n)+)", f"{doc}\n")
    return [line[2:] for line in found[1].splitlines()] if found else []


def names(lines):
    """What `a: ...` and `a, b: ...` describe, in their order."""
    heads = [re.match(r"(\w+(?:, \w+)*): ", line) for line in lines]
    return [name for head in heads if head for name in head[1].split(", ")]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_documents_its_arguments_result_and_errors(name):
    function = getattr(flax_skd, name)
    doc, signature = inspect.getdoc(function), inspect.signature(function)
    assert names(section(doc, "Args")) == list(signature.parameters)
    returns = signature.return_annotation is not None
    assert bool(section(doc, "Returns")) == returns
    assert section(doc, "Raises") and not re.search(
        r"as (in|of) `\w+sums`|as in `", doc
    )


@pytest.mark.parametrize("name", FIELDS)
def test_a_public_tuple_documents_every_field(name):
    thing = getattr(flax_skd, name)
    documented = names(section(inspect.getdoc(thing), "Attributes"))
    assert documented == list(thing._fields)


def test_a_spec_documents_every_field_but_the_sizes_of_its_first_lines():
    doc = inspect.getdoc(flax_skd.ViTSpec)
    documented = names(section(doc, "Attributes"))
    sizes = ["image_size", "patch_size", "width", "depth", "num_heads", "mlp_dim"]
    sizes += ["num_classes", "head_dim", "in_channels"]
    fields = list(inspect.signature(flax_skd.ViTSpec).parameters)
    assert sorted([*documented, *sizes]) == sorted(fields)
    assert "Sizes are counts" in doc and section(doc, "Raises")


def test_a_family_documents_what_it_takes():
    made = flax_skd.SubnetFamily.__init__
    parameters = list(inspect.signature(made).parameters)[1:]
    assert names(section(inspect.getdoc(made), "Args")) == parameters


def methods(name):
    """Of a public class, those that are its own."""
    members = inspect.getmembers(getattr(flax_skd, name), inspect.isroutine)
    ours = [(n, m) for n, m in members if not n.startswith("_")]
    return [m for _, m in ours if "flax_skd" in (getattr(m, "__module__", "") or "")]


@pytest.mark.parametrize("name", flax_skd.__all__)
def test_type_checkers_see_the_types_of_every_public_call(name):
    assert importlib.resources.files("flax_skd").joinpath("py.typed").is_file()
    thing = getattr(flax_skd, name)
    for call in [thing] if name in FUNCTIONS else methods(name):
        signature = inspect.signature(call)
        untyped = [
            p.name
            for p in signature.parameters.values()
            if p.annotation is p.empty and p.name != "self"
        ]
        assert not untyped and signature.return_annotation is not signature.empty
