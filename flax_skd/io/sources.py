"""Where labelled images come from: one line of text opens any of them."""

import os
import re
import zlib

import numpy as np

from flax_skd.io import folder_images, npz_images, tar_images
from flax_skd.io.examples import (
    ArraySource,
    BadImageError,
    Example,
    Source,
    check_labels,
    classes_of,
    decode,
)
from flax_skd.io.extras import require

__all__ = [
    "ArraySource",
    "BadImageError",
    "Example",
    "Source",
    "fingerprint",
    "open_source",
    "open_unlabelled",
    "take",
]

_KINDS = ("digits", "folder", "tar", "npz", "tfds")
_FORMS = """\
  digits, digits:train, digits:test   the 8x8 digits that come with scikit-learn
  folder:PATH                         PATH/class/name.jpg
  tar:PATH                            a tar of images, with labels.json or class folders
  npz:PATH, npz:PATH:SPLIT            arrays, or encoded images with offsets
  tfds:NAME:SPLIT                     a prepared TensorFlow dataset (array_record)"""


def open_source(
    description: str, *, labels: str | None = None, num_classes: int | None = None
) -> Source:
    """Opens a source of labelled images.

    Args:
      description: `digits[:train|:test]`, `folder:PATH`, `tar:PATH`,
        `npz:PATH[:SPLIT]` or `tfds:NAME:SPLIT`.
      labels: of a tar only: `sorted` (one image a class, sorted by file name) or the
        path of a JSON file {file name: class}.
      num_classes: if given, labels must lie below it, and class folders be as many.

    Returns:
      A `Source`: `source[i]` is an `Example` of image, label and name, and `len` says
      how many there are. Images are read as they are asked for.

    Raises:
      ValueError: if there is no such source or it does not serve; the message names
        it and says what would.
      ImportError: if the package is not installed that reads such a source.
    """
    kind, _, rest = str(description).partition(":")  # a path too is told the forms
    if labels is not None and kind != "tar" and kind in _KINDS:
        raise ValueError(
            f"labels = {labels!r} goes with tar:PATH; {description!r} has its own."
        )
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes = {num_classes} must be at least 1, or None.")
    if kind == "digits" and rest in ("", "train", "test"):
        return _digits(rest, description, num_classes)
    if kind in ("folder", "tar", "npz"):
        rest = os.path.expanduser(rest)
    if kind == "folder" and rest:
        return folder_images.open_folder(rest, num_classes=num_classes)
    if kind == "tar" and rest:
        return tar_images.open_tar(rest, labels=labels, num_classes=num_classes)
    if kind == "npz" and rest:
        path, colon, split = rest.rpartition(":")
        if not colon or os.path.exists(rest):
            return npz_images.open_npz(rest, num_classes=num_classes)
        return npz_images.open_npz(path, split=split, num_classes=num_classes)
    # A split may hold colons too: cifar10:3.0.2:train[:50%].
    if kind == "tfds" and (parts := re.fullmatch(r"([^\[]+):([^:\[]+(?:\[.*)?)", rest)):
        return _TfdsSource(*parts.groups(), num_classes=num_classes)
    raise ValueError(f"no source {description!r}; the forms are\n{_FORMS}")


def open_unlabelled(description: str) -> Source:
    """As `open_source`, for what reads no label: every label is 0, whatever is there.

    A tar needs no labels then, and class folders may be any number.

    Args:
      description: as of `open_source`.

    Raises:
      ValueError: as of `open_source`, but for what concerns labels.
    """
    labels = "sorted" if description.startswith("tar:") else None  # looks for none
    return _Unlabelled(open_source(description, labels=labels))


def take(source: Source, n: int, *, seed: int = 0) -> Source:
    """`n` distinct images of a source, chosen by `seed`, in a fixed random order.

    For the same seed a smaller choice is the beginning of a larger one.

    Raises:
      ValueError: if there are fewer than `n`, the message says how many; or the seed
        is negative.
    """
    if seed < 0:
        raise ValueError(f"seed = {seed} must be at least 0.")
    if not 1 <= n <= len(source):
        raise ValueError(
            f"asked for {n} images of {source.name}, which has {len(source)}: "
            f"choose 1 to {len(source)}."
        )
    order = np.random.default_rng(seed).permutation(len(source))
    return _Selection(source, order[:n])


def fingerprint(source: Source) -> str:
    """A short text that another dataset, or the same in another order, does not have.

    Read off the number of images and eight of them, evenly spread: pixels and labels.
    """
    crc = 0
    for index in np.linspace(0, len(source) - 1, 8).round().astype(int):
        try:
            image, label, _ = source[int(index)]
            pixels = np.asarray(image)
            told = f"{pixels.shape} {label}".encode() + pixels.tobytes()
        except BadImageError as error:
            told = error.example.encode()
        crc = zlib.crc32(told, crc)
    return f"{len(source)} images, {crc:08x}"


class _Unlabelled:
    num_classes: int | None = None

    def __init__(self, source: Source):
        self.name, self._source = source.name, source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        return self._source[index]._replace(label=0)


class _Selection:
    def __init__(self, source: Source, indices: np.ndarray):
        self.name, self.num_classes = source.name, source.num_classes
        self._source, self._indices = source, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]


def _digits(split: str, name: str, num_classes: int | None) -> ArraySource:
    """1,797 images [8, 8, 1]; of each class a quarter, chosen once, is the test."""
    data = require("sklearn.datasets").load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    rng = np.random.default_rng(0)
    held_out = np.zeros(len(images), bool)
    for label in range(10):
        members = rng.permutation(np.flatnonzero(data.target == label))
        held_out[members[: round(len(members) / 4)]] = True
    chosen = {"": held_out | True, "train": ~held_out, "test": held_out}[split]
    count = classes_of(10, source=name, num_classes=num_classes)
    return ArraySource(
        images[chosen], data.target[chosen], num_classes=count, name=name
    )


class _TfdsSource:
    """A dataset prepared by TensorFlow Datasets, read without TensorFlow.

    The record holds the label, so labels are checked when they are read.
    """

    def __init__(self, dataset: str, split: str, *, num_classes: int | None):
        self.name = f"tfds:{dataset}:{split}"
        self._records, self._keys = _tfds_records(dataset, split, self.name)
        label = self._records.dataset_info.features[self._keys[1]]
        own = getattr(label, "num_classes", None)
        self.num_classes = classes_of(own, source=self.name, num_classes=num_classes)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        image, label = (self._records[index][key] for key in self._keys)
        name = f"record {index}"
        (label,) = check_labels(
            [label], [name], source=self.name, num_classes=self.num_classes
        )
        if isinstance(image, bytes):
            image = decode(image, source=self.name, name=name)
        return Example(image, int(label), name)


def _tfds_records(dataset: str, split: str, name: str):
    """Random access to the records, and the keys of image and label in one."""
    tfds = require("tensorflow_datasets")
    prepare = (
        f"tensorflow_datasets.builder({dataset!r}, file_format='array_record')"
        ".download_and_prepare()"
    )
    try:
        builder = tfds.builder(dataset, file_format="array_record")
        keys = builder.info.supervised_keys or ("image", "label")
        held = list(builder.info.features)
        if len(keys) != 2 or not set(keys) <= set(held):
            raise ValueError(
                f"it has {', '.join(held)}; needed are an image and a label"
            )
        skip = {keys[0]: tfds.decode.SkipDecoding()}  # decoding is ours, and named
        return builder.as_data_source(split=split, decoders=skip), keys
    except tfds.core.DatasetNotFoundError as error:
        raise ValueError(
            f"{name}: TensorFlow Datasets knows no {dataset!r}; a custom dataset must "
            "be imported first, or prepared under TFDS_DATA_DIR."
        ) from error
    except (KeyError, FileNotFoundError) as error:  # an empty table of splits
        raise ValueError(
            f"{name} is not prepared under TFDS_DATA_DIR (or ~/tensorflow_datasets): "
            f"run {prepare}."
        ) from error
    except (ValueError, NotImplementedError) as error:  # the latter of other formats
        reason = str(error)
        if "format" in reason:
            reason = (
                "it is prepared in another file format (tfrecord?), which needs "
                f"TensorFlow; prepare it again in another TFDS_DATA_DIR: {prepare}"
            )
        raise ValueError(f"{name}: {reason}.") from error
