"""The zip inside a `.pth` file: its members, its storages, and tensors as views.

Everything is checked against the file before it is read or allocated: memory is
bounded by the size of the file.
"""

import math
import re
import zipfile
from typing import Any, NamedTuple

import numpy as np

_MAX_PROGRAM = 8 << 20  # bytes of pickle; a network of 1,000 tensors needs 0.1 MB
_MAX_VIEWS = 4  # tensors may repeat the file's bytes this often (tied weights, EMA)
_MAX_DIMS = 8
_MAX_INT = 1 << 62  # larger sizes are lies, and slow to multiply
DTYPES = {
    "torch.FloatStorage": "f4",
    "torch.HalfStorage": "f2",
    "torch.DoubleStorage": "f8",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "i8",
    "torch.IntStorage": "i4",
    "torch.ShortStorage": "i2",
    "torch.CharStorage": "i1",
    "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
}


class TorchFileError(ValueError):
    """A `.pth` file that cannot be read: damaged, cut short or of another format."""


class UnsafePickleError(TorchFileError):
    """A `.pth` file that asks for something outside the allow-list; it was not run."""


class Storage(NamedTuple):
    """What the pickle claims of one storage: member, element type, count."""

    key: str
    dtype: str
    numel: int


def bfloat16_to_float32(bits: np.ndarray) -> np.ndarray:
    """bfloat16 is the upper half of a float32; `bits` are its uint16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class TorchArchive:
    """The members of one open `.pth` zip.

    Args:
      archive: the open zip.
      file_size: bytes of the file on disk, the bound of everything inside.

    Raises:
      TorchFileError: if a member is compressed, twice there, too large or missing.
      UnsafePickleError: if a member's name leads out of the archive.
    """

    def __init__(self, archive: zipfile.ZipFile, file_size: int):
        self._archive = archive
        self._file_size = file_size
        self._members = _members(archive, file_size)
        self._prefix = self._find_prefix()
        self._order = self._byte_order()
        self._storages: dict[str, tuple[Storage, np.ndarray]] = {}
        self._viewed = 0

    def _find_prefix(self) -> str:
        found = [n for n in self._members if re.fullmatch(r"([^/]+/)?data\.pkl", n)]
        if len(found) != 1:
            raise TorchFileError(
                f"{len(found)} members are called data.pkl, torch.save writes one: "
                "re-save it with a current torch."
            )
        prefix = found[0].removesuffix("data.pkl")
        if prefix + "constants.pkl" in self._members:
            raise TorchFileError(
                "this is a TorchScript archive, which is a program: save "
                "model.state_dict() instead."
            )
        return prefix

    def _byte_order(self) -> str:
        info = self._members.get(self._prefix + "byteorder")
        order = self._archive.read(info) if info and info.file_size < 64 else b"little"
        if order not in (b"little", b"big"):
            raise TorchFileError(f"unknown byte order {order!r}.")
        return "<" if order == b"little" else ">"

    def program(self) -> bytes:
        """The pickle, unread."""
        info = self._members[self._prefix + "data.pkl"]
        if info.file_size > _MAX_PROGRAM:
            raise TorchFileError(
                f"data.pkl has {info.file_size} bytes, at most {_MAX_PROGRAM} are "
                "read: save the state dict alone."
            )
        return self._archive.read(info)

    def _read_storage(self, storage: Storage) -> np.ndarray:
        if storage.key in self._storages:
            known, values = self._storages[storage.key]
            if known != storage:
                raise TorchFileError(f"storage {storage.key} is declared twice.")
            return values
        info = self._members.get(f"{self._prefix}data/{storage.key}")
        if info is None:
            raise TorchFileError(f"storage {storage.key} is missing from the file.")
        size = 2 if storage.dtype == "bfloat16" else np.dtype(storage.dtype).itemsize
        if storage.numel * size != info.file_size:
            raise TorchFileError(
                f"storage {storage.key} claims {storage.numel} elements of {size} "
                f"bytes, the file holds {info.file_size} bytes."
            )
        values = _decode(self._archive.read(info), storage.dtype, self._order)
        self._storages[storage.key] = storage, values
        return values

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any) -> np.ndarray:
        """A read-only view of a storage, checked to lie inside it."""
        if type(storage) is not Storage:
            raise TorchFileError("a tensor without a storage.")
        values = self._read_storage(storage)
        _check_view(offset, size, stride, values.size)
        self._viewed += math.prod(size) * values.itemsize
        if self._viewed > _MAX_VIEWS * max(self._file_size, 1 << 12):
            raise TorchFileError("the tensors repeat the file's bytes too often.")
        # Strides along axes of length one mean nothing and may be any number.
        steps = [s * values.itemsize if n > 1 else 0 for n, s in zip(size, stride)]
        return np.lib.stride_tricks.as_strided(
            values[offset:], size, steps, writeable=False
        )


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The archive's members, once it is plain that reading them is harmless."""
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename
        if name in members:
            raise TorchFileError(f"member {name!r} is there twice.")
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise UnsafePickleError(f"member name {name!r} is refused.")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise TorchFileError(
                f"member {name!r} is compressed or encrypted, torch.save does "
                "neither: re-save it with torch."
            )
        if info.compress_size != info.file_size:
            raise TorchFileError(
                f"member {name!r} claims {info.compress_size} bytes stored and "
                f"{info.file_size} in all, and nothing is compressed."
            )
        members[name] = info
    if sum(info.file_size for info in members.values()) > size:
        raise TorchFileError("the members claim more bytes than the file has.")
    return members


def _decode(raw: bytes, dtype: str, order: str) -> np.ndarray:
    if dtype == "bfloat16":
        return bfloat16_to_float32(np.frombuffer(raw, f"{order}u2"))
    values = np.frombuffer(raw, np.dtype(dtype).newbyteorder(order))
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _check_view(offset: Any, size: Any, stride: Any, numel: int):
    """Refuses a view that leaves its storage or is larger than it."""
    plain = type(size) is tuple and type(stride) is tuple and type(offset) is int
    if not plain or len(size) != len(stride) or len(size) > _MAX_DIMS:
        raise TorchFileError("a tensor without a plain offset, size and stride.")
    if any(
        type(n) is not int or not 0 <= n < _MAX_INT for n in (offset, *size, *stride)
    ):
        raise TorchFileError(
            f"offset {offset}, size {size}, stride {stride}: each number must be an "
            "integer from 0 to 2**62."
        )
    last = offset + sum((n - 1) * s for n, s in zip(size, stride))
    inside = offset <= numel and last < numel if math.prod(size) else offset <= numel
    if not inside or max((math.prod(size), *size)) > max(numel, 1):
        raise TorchFileError(
            f"a tensor of offset {offset}, size {size}, stride {stride} does not fit "
            f"its storage of {numel} elements."
        )
