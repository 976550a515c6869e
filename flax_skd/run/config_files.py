"""Config files: by path, or those shipped with the package from anywhere."""

import importlib.util
import pathlib
from typing import Any


def find(argument: str) -> str:
    """Finds a config file: as named, or among those shipped with the package.

    Args:
      argument: `path[:variant]`.

    Raises:
      ValueError: if there is no such file; lists the shipped ones.
    """
    path, colon, variant = argument.partition(":")
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
    module_spec = importlib.util.spec_from_file_location("flax_skd_config", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.get_config(variant) if colon else module.get_config()
