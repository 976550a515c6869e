"""Directories that this package writes: whole or not at all, and read with care."""

import contextlib
import errno
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

FORMAT_VERSION = 1

T = TypeVar("T")


def local(path: str | os.PathLike) -> pathlib.Path:
    """An absolute path on a mounted file system.

    Raises:
      ValueError: for an address such as gs://bucket.
    """
    if "://" in str(path):
        raise ValueError(
            f"{path} is not a path on this machine: mount the bucket, or write to a "
            "local directory and copy it."
        )
    return pathlib.Path(path).expanduser().resolve()


def write_whole(
    directory: str | os.PathLike,
    write: Callable[[pathlib.Path], None],
    *,
    files: tuple[str, ...],
    overwrite: bool,
    older: tuple[str, ...] = (),
) -> None:
    """Fills a new directory by `write` and moves it to its name when it is complete.

    On several hosts the first process writes and the others wait.

    Args:
      directory: new, empty, or with `overwrite` one that holds `files`.
      write: function of the temporary directory.
      files: all that such a directory may hold.
      overwrite: replace what is there.
      older: the same of an earlier version, which may be replaced too.

    Raises:
      ValueError: if something is there that may not be replaced.
    """
    target = local(directory)
    check_target(target, files, overwrite, older=older)
    barrier(f"write {target.name}")
    if jax.process_index() == 0:
        fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
        fresh.mkdir(parents=True)
        try:
            write(fresh)
            _move(fresh, target, overwrite)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    barrier(f"wrote {target.name}")


def write_files(
    directory: str | os.PathLike,
    files: tuple[str, ...],
    noun: str,
    facts: dict[str, Any],
    *contents: bytes | bytearray,
    overwrite: bool,
) -> None:
    """`write_whole` of `files`: first a JSON of `noun` and `facts`, then `contents`."""

    def write(fresh: pathlib.Path) -> None:
        write_json(fresh / files[0], noun, facts)
        for name, content in zip(files[1:], contents, strict=True):
            (fresh / name).write_bytes(content)

    write_whole(directory, write, files=files, overwrite=overwrite)


@contextlib.contextmanager
def replaced(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new name to write a file at, which takes the name `path` if all goes well."""
    fresh = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield fresh
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def check_target(
    target: pathlib.Path,
    files: tuple[str, ...],
    overwrite: bool,
    *,
    older: tuple[str, ...] = (),
) -> None:
    """Raises ValueError unless a directory may be written, or replaced.

    Args:
      target: an absolute path.
      files: all that such a directory may hold.
      overwrite: whether a directory of `files` may be replaced.
      older: the same of an earlier version.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: name a directory.")
    there = sorted(p.name for p in target.iterdir()) if target.is_dir() else []
    if there and not overwrite:
        raise ValueError(
            f"{target} is not empty: name another directory, or pass --overwrite "
            "(overwrite=True) to replace what is there."
        )
    if there and there not in (sorted(files), sorted(older)):
        raise ValueError(
            f"{target} holds {there}; only a directory of {sorted(files)} is replaced. "
            "Name another one."
        )
    _check_place(target)


def _check_place(target: pathlib.Path) -> None:
    """Said before the work: whether a directory can be made there and take the name."""
    if target.exists():
        here = pathlib.Path.cwd()
        standing = target in (here, *here.parents)
        if standing or os.path.ismount(target):
            what = "the current directory" if standing else "a mount point"
            raise ValueError(
                f"{target} is {what} and is not replaced: name a new folder in it, "
                f"such as {target / 'network'}."
            )
    parent = next(p for p in target.parents if p.exists())
    try:
        probe(parent)
    except OSError as error:
        raise ValueError(
            f"{target} cannot be made: nothing can be written in {parent} "
            f"({error.strerror or error}); name a place where you may write."
        ) from error


def probe(folder: pathlib.Path) -> None:
    """Writes in a folder and deletes it again; OSError if that is not possible.

    Permissions do not tell: some file systems, as /proc, take no file of anyone, and a
    full one has no room for it.
    """
    with tempfile.TemporaryDirectory(prefix=".flax_skd_", dir=folder) as name:
        pathlib.Path(name, "probe").write_bytes(b"x")


def _move(fresh: pathlib.Path, target: pathlib.Path, overwrite: bool) -> None:
    if not (overwrite and target.exists()):
        try:
            fresh.rename(target)  # takes the place of an empty directory
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise ValueError(
                f"{target} was filled meanwhile by another program, whose files are "
                "left as they are: name another directory."
            ) from error
        return
    old = fresh.with_suffix(".old")
    target.rename(old)
    try:
        fresh.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)


def barrier(name: str) -> None:
    """Waits for all processes; nothing when there is one."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def existing(
    directory: str | os.PathLike, files: tuple[str, ...], noun: str
) -> pathlib.Path:
    """The path of a directory that holds all of `files`.

    Raises:
      ValueError: if it does not; says what was expected and what is there.
    """
    path = local(directory)
    missing = [name for name in files if not (path / name).exists()]
    if missing:
        there = sorted(p.name for p in path.iterdir()) if path.is_dir() else "nothing"
        raise ValueError(
            f"{path} is not a {noun} directory: expected {', '.join(files)}; "
            f"{', '.join(missing)} not found. It holds {there!s:.200}."
        )
    return path


def as_json(value: Any, noun: str) -> Any:
    """A value as it comes back from JSON (tuples turn into lists).

    Raises:
      ValueError: if JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{noun} must be plain numbers, strings, lists and dicts: {error}."
        ) from error


def write_json(path: pathlib.Path, noun: str, fields: dict[str, Any]) -> None:
    """Writes fields with the format's and the package's version beside them."""
    # Imported here: the package's front page imports every module, this one too.
    import flax_skd

    head = {
        "format": f"flax_skd {noun}",
        "format_version": FORMAT_VERSION,
        "package_version": flax_skd.__version__,
    }
    fields = as_json(fields, path.name)
    path.write_text(json.dumps(head | fields, indent=2) + "\n", encoding="utf-8")


def read_json(
    path: pathlib.Path,
    noun: str,
    names: set[str],
    *,
    may_have: set[str] | frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """The inverse of `write_json`.

    Args:
      path: of the file.
      noun: as it was written.
      names: fields that must be there.
      may_have: fields that earlier versions did not write.

    Raises:
      ValueError: if the file is broken, of another format or version, or has missing
        or unknown fields; the message names the file.
    """
    fields = parse(path, json.loads, path.read_bytes())
    fields = fields if isinstance(fields, dict) else {}
    _check_format(path, noun, fields)
    wanted = names | {"format", "format_version", "package_version"}
    surplus = sorted(set(fields) - wanted - may_have)
    missing = sorted(wanted - set(fields))
    if surplus or missing:
        raise ValueError(f"{path}: unknown fields {surplus}, missing fields {missing}.")
    return fields


def _check_format(path: pathlib.Path, noun: str, fields: dict[str, Any]) -> None:
    """Before the fields: those of another version are other ones."""
    if fields.get("format", f"flax_skd {noun}") != f"flax_skd {noun}":
        raise ValueError(f"{path} says it is a {fields['format']!r}, not a {noun}.")
    if fields.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {fields['format_version']!r}, this program "
            f"reads {FORMAT_VERSION}: use the flax_skd version that wrote it "
            f"({fields.get('package_version')})."
        )


def parse(path: pathlib.Path, read: Callable[[Any], T], value: Any) -> T:
    """read(value), any fault a ValueError that names the file."""
    try:
        return read(value)
    except (
        *(AttributeError, OverflowError, RecursionError, TypeError, ValueError),
    ) as error:
        raise ValueError(f"{path}: {error}") from error
