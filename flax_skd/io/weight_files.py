"""Weight files as they lie on disk: safetensors, npz and `.pth` into named arrays."""

import hashlib
import json
import pathlib
import re
import zipfile
from typing import Any

import numpy as np

from flax_skd.io import npy_members, torch_pickle
from flax_skd.io.extras import require
from flax_skd.io.torch_archive import bfloat16_to_float32

_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin")
_IN_FOLDER = (
    *("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
)
_MOST_INFLATION = 16  # weights hardly compress; more is a decompression bomb
# What a training checkpoint of big_vision or vit_jax has beside the parameters.
_TRAINING = re.compile(r"opt/(?!target/)|chrono/")
_SAFETENSORS = {"F64": "f8", "F32": "f4", "F16": "f2"}


class ConversionError(ValueError):
    """A checkpoint that cannot become a ViT; the message lists every reason."""


def locate(path: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, dict]]:
    """The weight files of a file or folder, and the JSON files beside them.

    Args:
      path: a weight file, which stands alone, or a folder with one of
        `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`, in
        this order.

    Returns:
      Files in the order they are read, and {"config": ..., "preprocessor": ...} for
      `config.json` and `preprocessor_config.json` of a folder.

    Raises:
      ConversionError: if there is nothing to read.
    """
    if not path.is_dir():
        if not path.exists():
            raise ConversionError(f"{path} does not exist.")
        return [path], {}
    found = next((path / n for n in _IN_FOLDER if (path / n).is_file()), None)
    if found is None:
        raise ConversionError(
            f"{path} holds none of {', '.join(_IN_FOLDER)}: give the file itself."
        )
    files = _shards(found) if found.suffix == ".json" else [found]
    names = {"config": "config.json", "preprocessor": "preprocessor_config.json"}
    beside = {k: path / n for k, n in names.items() if (path / n).is_file()}
    return files, {k: read_json(p) for k, p in beside.items()}


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      ConversionError: if the file is damaged or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is cut short or no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds no JSON object.")
    return value


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index} has no weight_map.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if pathlib.PurePath(name).name != name or not name.endswith(".safetensors"):
            raise ConversionError(
                f"{index} names {name!r}: a shard is a .safetensors file beside it."
            )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ConversionError(f"{index}: shards {missing} are missing.")
    return [index.parent / name for name in names]


def read_tensors(
    files: list[pathlib.Path], *, entry: str | None = None
) -> dict[str, np.ndarray]:
    """All tensors of these files as finite float32.

    Args:
      files: of `locate`.
      entry: of `torch_pickle.load`; other kinds of files have no entries.

    Raises:
      ConversionError: if a file is cut short or damaged, of an unknown kind, or a
        tensor is in two files, not of floats, or not finite; the message names it.
      torch_pickle.TorchFileError: the same for `.pth` files.
    """
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        found = _read_file(file, entry)
        twice = sorted(set(found) & set(tensors))
        if twice:
            raise ConversionError(f"{file}: in an earlier shard already: {twice}.")
        tensors |= found
    wrong = {k: _problem(v) for k, v in tensors.items() if v.dtype.kind != "f"}
    with np.errstate(over="ignore"):
        tensors = {
            k: v.astype(np.float32, copy=False)
            for k, v in tensors.items()
            if k not in wrong
        }
    wrong |= {k: "not finite" for k, v in tensors.items() if not np.isfinite(v).all()}
    if wrong:
        listed = "".join(f"\n  {key}: {why}" for key, why in sorted(wrong.items()))
        raise ConversionError(
            f"{files[0]}: parameters must be finite floats, these are not:{listed}"
        )
    return tensors


def _problem(values: np.ndarray) -> str:
    return f"{values.dtype} of shape {list(values.shape)}"


def _read_file(path: pathlib.Path, entry: str | None) -> dict[str, np.ndarray]:
    if path.suffix in _SUFFIXES[2:] or path.name.endswith(".pth.tar"):
        return torch_pickle.load(path, entry=entry)
    if entry is not None:
        raise ConversionError(
            f"{path}: entry = {entry!r} chooses within a .pth file, and this is none: "
            "leave it out."
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    raise ConversionError(
        f"{path}: unknown kind of file, expected one of {', '.join(_SUFFIXES)}, "
        ".pth.tar, or a folder."
    )


def sha256(files: list[pathlib.Path]) -> str:
    """Hex digest of the files' bytes, one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    safetensors = require("safetensors")
    try:
        found = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ConversionError(
            f"{path} is cut short or no safetensors file ({error}): fetch it again."
        ) from error
    tensors = {}
    for key, info in found:
        kind, shape = info["dtype"], info["shape"]
        if kind == "BF16":
            values = bfloat16_to_float32(np.frombuffer(info["data"], "<u2"))
        elif kind in _SAFETENSORS:
            values = np.frombuffer(info["data"], "<" + _SAFETENSORS[kind])
        else:
            raise ConversionError(
                f"{path}: {key} has type {kind}, expected BF16 or one of "
                f"{', '.join(_SAFETENSORS)}."
            )
        tensors[key] = values.reshape(shape)
    return tensors


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [i for i in archive.infolist() if not _TRAINING.match(i.filename)]
            if len({i.filename for i in infos}) < len(infos):
                raise ValueError("it holds a member twice")
            npy_members.check(infos, most=_MOST_INFLATION * size + (1 << 20))
            return {
                i.filename.removesuffix(".npy"): _read_npy(archive, i) for i in infos
            }
    except Exception as error:  # zipfile, zlib and numpy raise a dozen kinds
        raise ConversionError(
            f"{path} is cut short or damaged ({type(error).__name__}: {error})."
        ) from error


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    values = npy_members.read(archive, info)
    dtype = values.dtype
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
        return bfloat16_to_float32(values.view("<u2"))  # how numpy saves bfloat16
    return values
