"""Images in class folders, read as they are asked for."""

import dataclasses
import errno
import os
import pathlib

from flax_skd.io.examples import (
    SUFFIXES,
    EncodedSource,
    bad_image,
    check_classes,
    is_class,
)

# What is wrong with one file alone, as a link to nowhere; a failing disk is not.
_OF_ONE_FILE = (errno.ENOENT, errno.EISDIR, errno.ELOOP, errno.EACCES)


@dataclasses.dataclass(frozen=True)
class _FileReader:
    source: str
    root: pathlib.Path
    names: list[str]

    def __call__(self, index: int) -> bytes:
        name = self.names[index]
        try:
            return (self.root / name).read_bytes()
        except OSError as error:
            if error.errno not in _OF_ONE_FILE:
                raise
            problem = f"cannot be read ({error.strerror})"
            raise bad_image(self.source, name, problem) from error


def open_folder(path: str, *, num_classes: int | None = None) -> EncodedSource:
    """Images of a folder of class folders, PATH/CLASS/NAME.

    Classes are numbered in the order of their names. Hidden files and folders are
    passed over.

    Args:
      num_classes: if given, class folders must be as many.

    Raises:
      ValueError: if there is no such folder or no image, or an image lies deeper; the
        message says which.
    """
    source, root = f"folder:{path}", pathlib.Path(path)
    if not root.is_dir():
        raise ValueError(f"{source}: there is no folder {path}.")
    classes = sorted(
        entry.name
        for entry in os.scandir(root)
        if entry.is_dir() and is_class(entry.name)
    )
    names, labels = [], []
    for label, folder in enumerate(classes):
        found = _images(root / folder, source)
        names += [f"{folder}/{file}" for file in found]
        labels += [label] * len(found)
    if not names:
        raise ValueError(
            f"{source}: no image found; images lie in {path}/CLASS/NAME with NAME "
            f"ending in one of {', '.join(SUFFIXES)}."
        )
    remedy = "make an empty folder of its name"
    check_classes(classes, source=source, num_classes=num_classes, missing=remedy)
    return EncodedSource(
        _FileReader(source, root, names),
        names,
        labels=labels,
        name=source,
        num_classes=len(classes),
    )


def _images(folder: pathlib.Path, source: str) -> list[str]:
    """Names of the images of one class, in order."""
    found = []
    for here, below, files in os.walk(folder, onerror=_raise, followlinks=True):
        below[:] = filter(is_class, below)
        images = [
            file
            for file in sorted(files)
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        ]
        if images and here != os.fspath(folder):
            raise ValueError(
                f"{source}: {here}/{images[0]} lies deeper than CLASS/NAME and would be "
                "left out: move it into the folder of its class, or take it away."
            )
        found += images
    return found


def _raise(error: OSError) -> None:
    raise error
