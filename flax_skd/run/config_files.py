"""Config files: by path, or those shipped with the package from anywhere."""

import importlib.util
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_LOADED: list[str] = []  # files of the last `load`, what each starts from behind it
_ENTRY = re.compile(r"\s*config\.([\w.]+) = [^#]*(?:# (.*))?")


class Entry(NamedTuple):
    """One entry of a config: dotted name, value, and what its file says beside it."""

    name: str
    value: Any
    comment: str


def find(argument: str) -> str:
    """Finds a config file: as named, or among those shipped with the package.

    Args:
      argument: `path[:variant]`.

    Raises:
      ValueError: if there is no such file; lists the shipped ones.
    """
    path, colon, variant = os.path.expanduser(argument).partition(":")
    package = pathlib.Path(__file__).resolve().parents[1]
    shipped = [package / "configs", package.parent / "configs"]
    parts = pathlib.PurePath(path).parts
    nested = parts[-2:] if parts[-2:-1] == ("rivals",) else parts[-1:]
    for place in (pathlib.Path(path), *(f.joinpath(*nested) for f in shipped)):
        if place.is_file():
            return f"{place}{colon}{variant}"
    files = {p.relative_to(f).as_posix() for f in shipped for p in f.rglob("*.py")}
    known = sorted(f for f in files if not f.endswith("__init__.py"))
    raise ValueError(f"no config file {path!r}; shipped with flax_skd: {known}.")


def load(argument: str) -> Any:
    """The config that a file's `get_config` makes.

    Args:
      argument: `path[:variant]`, found as by `find`.
    """
    path, colon, variant = find(argument).partition(":")
    _LOADED.append(path)
    module_spec = importlib.util.spec_from_file_location("flax_skd_config", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.get_config(variant) if colon else module.get_config()


def entries(argument: str) -> list[Entry]:
    """Every entry of a config, in the order of the files that set them.

    Args:
      argument: `path[:variant]`, found as by `find`.
    """
    _LOADED.clear()
    values = dict(_leaves(load(argument)))
    comments: dict[str, str] = {}
    for path in reversed(_LOADED):  # a file wins over what it starts from
        for line in pathlib.Path(path).read_text().splitlines():
            if (found := _ENTRY.match(line)) and found[1] in values:
                comments[found[1]] = found[2] or ""
    names = [*comments, *(name for name in values if name not in comments)]
    return [Entry(name, values[name], comments.get(name, "")) for name in names]


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
