"""Optional packages, imported where they are used."""

import importlib
import types

_PIP_NAMES = {
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "orbax.checkpoint": "orbax-checkpoint",
    "tensorflow_datasets": "tensorflow-datasets",
    "ml_collections": "ml-collections",
    "absl": "absl-py",
}


def require(module: str) -> types.ModuleType:
    """Imports `module`, or says which `pip install` mends its absence.

    Args:
      module: dotted name, such as `PIL.Image`.

    Raises:
      ImportError: if the package that holds it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or not module.startswith(error.name):
            raise
        name = _PIP_NAMES.get(module, _PIP_NAMES.get(top, top))
        raise ImportError(
            f"flax_skd needs {name} for this and it is not installed: "
            f"pip install {name}"
        ) from error
