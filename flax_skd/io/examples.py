"""What an image source hands out, and the checks every source shares."""

import io
import logging
import operator
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from flax_skd.io.extras import require

_LOG = logging.getLogger(__name__)
# A closed list: some of PIL's other formats start programs (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class Example(NamedTuple):
    """One labelled image.

    Attributes:
      image: a PIL image, or uint8 [H, W, C].
      label: index of the class.
      name: what to call it in logs and errors.
    """

    image: Any
    label: int
    name: str


class Source(Protocol):
    """Random access to examples.

    Attributes:
      name: what it is, for logs and errors.
      num_classes: labels lie in 0 .. num_classes - 1; None if not known.
    """

    name: str
    num_classes: int | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class BadImageError(ValueError):
    """An image that does not decode or does not serve; `example` is its name."""

    def __init__(self, message: str, example: str):
        super().__init__(message, example)  # both in args, so that it pickles
        self.example = example

    def __str__(self) -> str:
        return self.args[0]


# Folders that systems leave behind beside those of classes.
_STRAY = ("lost+found", "__MACOSX", "@eaDir")


def is_class(folder: str) -> bool:
    """Whether a folder of this name may stand for a class."""
    return not folder.startswith(".") and folder not in _STRAY


def check_classes(
    folders: Sequence[str], *, source: str, num_classes: int | None, missing: str
) -> None:
    """Raises ValueError unless there is a folder for each of `num_classes`.

    Folders are numbered in the order of their names, so that one too few or too many
    would shift the labels of all after it.

    Args:
      folders: names of the class folders.
      source: name of the source, for the error.
      num_classes: None if any number serves.
      missing: what to do where a class has no images, for the error.
    """
    if num_classes in (None, len(folders)):
        return
    some = ", ".join(folders[:8]) + (", ..." if len(folders) > 8 else "")
    raise ValueError(
        f"{source} has {len(folders)} class folders ({some}) and the network "
        f"{num_classes} classes. A label is the place of the folder among the names in "
        f"order: take away what is no class; for a class without images {missing}; or "
        f"give the right num_classes."
    )


def classes_of(own: int | None, *, source: str, num_classes: int | None) -> int | None:
    """How many classes there are, for a source that numbers its labels itself.

    If it has fewer than the network, they may be the network's first ones or others
    altogether. Labels do not tell, so a warning says so.

    Args:
      own: as the source states it, None if it does not.
      source: name of the source, for the warning.
      num_classes: of the network; None if any number serves.
    """
    if None not in (own, num_classes) and own < num_classes:
        _LOG.warning(
            "%s states %d classes and the network has %d: label i is read as the "
            "network's class i, which is wrong unless the classes are its first %d.",
            *(source, own, num_classes, own),
        )
    return num_classes or own


def check_file(path: str, source: str) -> None:
    """Raises ValueError, naming the source, unless `path` is a file."""
    if not pathlib.Path(path).is_file():
        raise ValueError(f"{source}: there is no file {path}.")


def decode(data: bytes, *, source: str, name: str):
    """Decodes a JPEG, PNG, WEBP or BMP.

    Args:
      data: the whole file.
      source, name: of the source and of the image, for the error.

    Returns:
      The PIL image, read to its end, in the mode it was stored in.

    Raises:
      BadImageError: if it does not decode, is cut short, or has more pixels than
        `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    pil = require("PIL.Image")
    try:
        image = pil.open(io.BytesIO(data), formats=FORMATS)
        most = pil.MAX_IMAGE_PIXELS
        if most is not None and image.width * image.height > most:
            raise ValueError(
                f"{image.width} x {image.height} pixels are more than the {most} "
                "allowed by PIL.Image.MAX_IMAGE_PIXELS"
            )
        image.load()
    except pil.UnidentifiedImageError as error:
        reason = f"not one of {', '.join(FORMATS)}"
        raise bad_image(source, name, f"does not decode ({reason})") from error
    except Exception as error:  # decoders raise almost anything on a damaged file
        raise bad_image(source, name, f"does not decode ({error})") from error
    return image


def bad_image(source: str, name: str, problem: str) -> BadImageError:
    """The error of one image of a source, which says what to do."""
    return BadImageError(
        f"{source}: {name} {problem}: mend or remove the file, or pass "
        "on_bad_image='skip' (--config.data.on_bad_image=skip).",
        name,
    )


def check_labels(
    labels: Iterable[Any],
    names: Sequence[str],
    *,
    source: str,
    num_classes: int | None,
) -> np.ndarray:
    """Labels as int32 [n], checked.

    Raises:
      ValueError: if there are not as many as names, or one is not an int or not in
        0 .. num_classes - 1; the message names the image, the label, what is allowed.
    """
    labels = labels.tolist() if isinstance(labels, np.ndarray) else list(labels)
    if len(labels) != len(names):
        raise ValueError(f"{source}: {len(names)} images but {len(labels)} labels.")
    most = np.iinfo(np.int32).max if num_classes is None else num_classes - 1
    for name, label in zip(names, labels):
        if isinstance(label, bool) or not hasattr(label, "__index__"):
            raise ValueError(
                f"{source}: the label of {name} is {label!r}; it must be an int."
            )
        if not 0 <= operator.index(label) <= most:
            raise ValueError(
                f"{source}: the label of {name} is {label}; allowed are 0 to {most}. "
                "Mend the label or give the right num_classes."
            )
    return np.asarray(labels, np.int32)


class EncodedSource:
    """Images that are encoded files: `read(i)` hands over the bytes of image i."""

    def __init__(
        self,
        read: Callable[[int], bytes],
        names: Sequence[str],
        *,
        labels: Iterable[Any],
        name: str,
        num_classes: int | None = None,
    ):
        self.name, self.num_classes = name, num_classes
        self._read, self._names = read, names
        self._labels = check_labels(labels, names, source=name, num_classes=num_classes)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]  # counts from the end, or an IndexError
        name, label = self._names[index], int(self._labels[index])
        image = decode(self._read(index), source=self.name, name=name)
        return Example(image, label, name)


class ArraySource:
    """Images that are an array already.

    Args:
      images: uint8 [n, H, W, C].
      labels: ints [n].
      num_classes: if given, labels must lie below it.
      name: for logs and errors.

    Raises:
      ValueError: if the arrays are not of that kind; the message says what was found.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: Iterable[int],
        *,
        num_classes: int | None = None,
        name: str = "arrays",
    ):
        if images.ndim != 4 or images.dtype != np.uint8 or not len(images):
            raise ValueError(
                f"{name}: images are {images.dtype} {list(images.shape)}; give at "
                "least one, as uint8 [n, height, width, channels], 0 to 255."
            )
        self.name, self.num_classes = name, num_classes
        self._images = images
        names = [f"image {i}" for i in range(len(images))]
        self._labels = check_labels(labels, names, source=name, num_classes=num_classes)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        label = int(self._labels[index])
        return Example(np.asarray(self._images[index]), label, f"image {index}")
