"""Named arrays in one safetensors file, and the sum that tells a flipped bit."""

import os
import pathlib
import zlib
from typing import Any

import jax
import numpy as np

from flax_skd.io.extras import require

_CHUNK = 1 << 20  # bytes that are summed while they lie in the cache


def write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Writes arrays of any dtype that JAX has, bfloat16 among them.

    Args:
      path: of a new file.
      arrays: on the host, each whole.

    Returns:
      What `read` checks the file against, as JSON holds it.
    """
    flat = {key: np.asarray(x, order="C") for key, x in arrays.items()}
    # Not save_file, which lets nobody else read what it wrote.
    content = require("safetensors.numpy").save(flat)
    path.write_bytes(content)
    return {path.name: {"bytes": len(content), "crc32": zlib.crc32(content)}}


def read(path: pathlib.Path, files: Any, *, noun: str) -> dict[str, np.ndarray]:
    """The arrays of a file.

    Args:
      path: of the file.
      files: what `write` returned, out of a JSON; None, of directories that were
        written before there were sums, checks nothing.
      noun: what to save again, for errors.

    Raises:
      ValueError: if the file is not what was written, or no safetensors file; the
        message names it.
    """
    again = f"Copy it again, or save the {noun} again."
    if files is not None:
        wanted = files.get(path.name) if isinstance(files, dict) else None
        found = _sum(path)
        if found != wanted:
            raise ValueError(
                f"{path} is not what was saved, but damaged, edited, or of another "
                f"{noun}: it has {found}, saved was {wanted!s:.200}. {again}"
            )
    try:
        return require("safetensors.numpy").load_file(path)
    except Exception as error:  # the format's own error type is not a ValueError
        raise ValueError(
            f"{path} cannot be read ({error}): it is cut short or damaged. {again}"
        ) from error


def of_tree(tree: Any) -> str:
    """A short text that other arrays, or the same at other places, do not have."""
    total = 0
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        total = zlib.crc32(f"{path} {x.shape} {x.dtype}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8), total)
    return f"{total:08x}"


def _sum(path: str | os.PathLike) -> dict[str, int]:
    # CRC-32 finds every flipped bit and misses other damage once in 2**32. SHA-256
    # takes half as long again where the processor helps, and many times that elsewhere.
    total, count = 0, 0
    chunk = memoryview(bytearray(_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(chunk):
            total, count = zlib.crc32(chunk[:size], total), count + size
    return {"bytes": count, "crc32": total}
