"""A sub-network as arrays and a JSON of its sizes: safetensors or npz."""

import io
import os

import numpy as np
from flax.traverse_util import flatten_dict

from flax_skd.io import checkpoint
from flax_skd.io import directory as folder
from flax_skd.io.checkpoint import Subnet
from flax_skd.io.formats import folding

NPZ_FILES = ("spec.json", "params.npz")


def write_safetensors(
    directory: str | os.PathLike, network: Subnet, *, overwrite: bool = False
) -> None:
    """Writes the sub-network directory that `load_subnet` reads.

    Raises:
      ValueError: if the network is empty, or the directory may not be written.
    """
    folding.check_kept(network.widths)
    checkpoint.save_subnet(directory, network, overwrite=overwrite)


def write_npz(
    directory: str | os.PathLike, network: Subnet, *, overwrite: bool = False
) -> None:
    """Writes `spec.json` and `params.npz`, for a reader with NumPy and nothing else.

    Names are the params' paths joined by dots; arrays are float32.

    Raises:
      ValueError: if the network is empty, or the directory may not be written.
    """
    folding.check_kept(network.widths)
    facts = checkpoint.facts_of(network)
    content = npz(flatten_dict(folding.in_float32(network.params), sep="."))
    folder.write_files(
        directory, NPZ_FILES, "sub-network", facts, content, overwrite=overwrite
    )


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    """The content of an npz file of these arrays."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()
