"""Images inside a tar, read in place."""

import collections
import dataclasses
import json
import os
import pathlib
import posixpath
import tarfile
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

from flax_skd.io.examples import (
    SUFFIXES,
    EncodedSource,
    check_classes,
    check_file,
    is_class,
)


@dataclasses.dataclass(frozen=True)
class _TarReader:
    """Reads by position, with a handle of its own: safe in threads, and it pickles."""

    path: str
    spans: np.ndarray  # int64 [n, 2]: offset, size

    def __call__(self, index: int) -> bytes:
        offset, size = self.spans[index].tolist()
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size)


class _Bounded:
    """A file that reads no more than it has: a header may ask for eight gigabytes."""

    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size = file, size
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        return self._file.read(min(size, max(self._size - self.tell(), 0)))


def open_tar(
    path: str, *, labels: str | None = None, num_classes: int | None = None
) -> EncodedSource:
    """Images in an uncompressed tar, read in place; nothing is extracted.

    Labels come from `labels.json` in the tar, {file name: class}, else from class
    folders. Links, devices, sparse files and names that are hidden or lead out of the
    tar are passed over.

    Args:
      labels: `sorted` if there is one image a class and its index, sorted by file
        name, is the class; or the path of a JSON file {file name: class}.
      num_classes: if given, labels must lie below it, and class folders be as many.

    Raises:
      ValueError: if it is no such tar, holds no image, or a label is missing or
        wrong; the message says which.
    """
    name = f"tar:{path}"
    members = _index_tar(path)
    files = [m for m in members if m.lower().endswith(SUFFIXES)]
    if not files:
        raise ValueError(
            f"{name}: no image found; looked for {', '.join(SUFFIXES)} files."
        )
    files.sort(key=lambda m: (posixpath.basename(m), m))
    found: Sequence[Any]
    if labels == "sorted":
        found, known = range(len(files)), len(files)
        if num_classes not in (None, known):
            raise ValueError(
                f"{name}: labels = 'sorted' is one image a class, and there are {known} "
                f"images for {num_classes} classes: give the path of a JSON file {{file "
                "name: class}."
            )
    elif labels is not None:
        found, known = _labels_of(files, _read_json(labels), labels), None
    elif (inside := _labels_member(members)) is not None:
        text = _TarReader(path, np.asarray([members[inside]]))(0)
        where = f"{inside} in {path}"
        found, known = _labels_of(files, _parse_json(text, where), where), None
    else:
        found, known = _labels_of_folders(files, name, num_classes)
    return EncodedSource(
        _TarReader(path, np.asarray([members[m] for m in files], np.int64)),
        files,
        labels=found,
        name=name,
        num_classes=known if num_classes is None else num_classes,
    )


def _index_tar(path: str) -> dict[str, tuple[int, int]]:
    """{name: (offset, size)} of the regular files; the later of two wins, as in tar.

    `./a` is `a`, which tar writes of a folder that it is given as `.`.
    """
    check_file(path, f"tar:{path}")
    end, last, members = os.path.getsize(path), -1, {}
    try:
        with (
            open(path, "rb") as file,
            tarfile.open(fileobj=_Bounded(file, end), mode="r:") as tar,
        ):
            while (member := tar.next()) is not None:
                if member.size < 0 or member.offset <= last:
                    raise tarfile.ReadError("a header points backwards")
                last = member.offset
                if not _is_plain(member):
                    continue
                if member.offset_data + member.size > end:
                    raise tarfile.ReadError(f"{member.name} is cut short")
                members[posixpath.normpath(member.name)] = (
                    member.offset_data,
                    member.size,
                )
                tar.members.clear()  # else every header is kept
            stop = tar.offset
        with open(path, "rb") as file:  # tarfile takes a damaged header for the end
            file.seek(stop)
            if any(file.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError(f"the header at byte {stop} is damaged")
    except (tarfile.TarError, ValueError, OverflowError, OSError, EOFError) as error:
        raise _not_a_tar(path, error) from error
    except (MemoryError, RecursionError) as error:  # sizes or chains a header made up
        raise _not_a_tar(path, "a header is damaged") from error
    return members


def _not_a_tar(path: str, reason: object) -> ValueError:
    return ValueError(
        f"tar:{path} does not read as a tar ({reason}): it must be whole and "
        "uncompressed (gunzip a .tar.gz first)."
    )


def _is_plain(member: tarfile.TarInfo) -> bool:
    parts = member.name.split("/")
    outside = ".." in parts or member.name.startswith("/")
    hidden = parts[-1].startswith(".")  # such as the ._name files of a Mac
    hidden |= not all(is_class(p) for p in parts[:-1] if p != ".")
    return member.isreg() and not member.issparse() and not outside and not hidden


def _labels_member(members: dict[str, Any]) -> str | None:
    found = [m for m in members if posixpath.basename(m) == "labels.json"]
    return min(found, key=lambda m: m.count("/"), default=None)


def _read_json(path: str) -> dict[str, Any]:
    try:
        return _parse_json(pathlib.Path(path).expanduser().read_bytes(), path)
    except OSError as error:
        raise ValueError(
            f"labels = {path!r} cannot be read ({error.strerror}): give 'sorted' or "
            "the path of a JSON file {file name: class}."
        ) from error


def _parse_json(text: bytes, where: str) -> dict[str, Any]:
    try:
        table = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    if type(table) is not dict:
        raise ValueError(f"{where} must hold {{file name: class}}.")
    return table


def _labels_of(files: list[str], table: dict[str, Any], where: str) -> list[Any]:
    """Looks up each file by its path, else by its name if no other has that name."""
    table = {posixpath.normpath(name): label for name, label in table.items()}
    count = collections.Counter(map(posixpath.basename, files))
    short = {f: name for f in files if count[name := posixpath.basename(f)] == 1}
    keys = [f if f in table else short.get(f, f) for f in files]
    missing = [f for f, key in zip(files, keys) if key not in table]
    if missing:
        raise ValueError(
            f"{where} has no label for {len(missing)} of {len(files)} images: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}."
        )
    return [table[key] for key in keys]


def _labels_of_folders(
    files: list[str], name: str, num_classes: int | None
) -> tuple[list[int], int]:
    folders = [posixpath.dirname(f) for f in files]
    classes = {folder: i for i, folder in enumerate(sorted(set(folders)))}
    if len(classes) < 2 or "" in classes:
        raise ValueError(
            f"{name}: no labels: it has no labels.json and no class folders (images "
            f"lie in {', '.join(repr(c) for c in classes)}). Pass labels='sorted' if "
            "there is one image a class in the order of the names, or the path of a "
            "JSON file {file name: class}."
        )
    remedy = "pass labels='FILE.json' with {file name: class}"
    check_classes([*classes], source=name, num_classes=num_classes, missing=remedy)
    return [classes[folder] for folder in folders], len(classes)
