"""A sub-network as arrays and a JSON of its sizes: safetensors or npz."""

import io
import os
import pathlib

import numpy as np

from flax_skd.io import checked, checkpoint
from flax_skd.io import directory as folder
from flax_skd.io.checkpoint import SubNet
from flax_skd.io.formats import folding

NPZ_FILES = ("spec.json", "params.npz")


def write_safetensors(
    directory: str | os.PathLike, network: SubNet, *, overwrite: bool = False
) -> None:
    """Writes the sub-network directory that `load_subnet` reads.

    Raises:
      ValueError: if the network is empty, or the directory may not be written.
    """
    folding.check_kept(network.widths)
    checkpoint.save_subnet(directory, network, overwrite=overwrite)


def write_npz(
    directory: str | os.PathLike, network: SubNet, *, overwrite: bool = False
) -> None:
    """Writes `spec.json` and `params.npz`, for a reader with NumPy and nothing else.

    Names are the params' paths joined by dots; arrays are float32.

    Raises:
      ValueError: if the network is empty, or the directory may not be written.
    """
    folding.check_kept(network.widths)
    facts = {
        "spec": network.spec.to_dict(),
        "widths": network.widths._asdict(),
        "macs": checked.macs_of(network.spec, network.widths),
        "provenance": network.provenance,
    }
    flat = checkpoint.flatten_dict(folding.in_float32(network.params), sep=".")

    def write(fresh: pathlib.Path) -> None:
        folder.write_json(fresh / NPZ_FILES[0], "sub-network", facts)
        (fresh / NPZ_FILES[1]).write_bytes(npz(flat))

    folder.write_whole(directory, write, files=NPZ_FILES, overwrite=overwrite)


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    """The content of an npz file of these arrays."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()
