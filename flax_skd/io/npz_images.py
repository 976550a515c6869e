"""Images inside an npz: arrays of pixels, or encoded images one after the other."""

import dataclasses
import os
import zipfile

import numpy as np

from flax_skd.io import npy_members
from flax_skd.io.examples import ArraySource, EncodedSource, check_file, classes_of

_MOST_INFLATION = 100  # times the size of the file; more is a decompression bomb
_SLACK = 2**24  # bytes: a small file of zeros may inflate more


@dataclasses.dataclass(frozen=True)
class _SliceReader:
    data: np.ndarray  # uint8, all files one after the other
    offsets: np.ndarray  # int64 [n + 1]

    def __call__(self, index: int) -> bytes:
        return self.data[self.offsets[index] : self.offsets[index + 1]].tobytes()


def open_npz(
    path: str, *, split: str | None = None, num_classes: int | None = None
) -> ArraySource | EncodedSource:
    """Images in an npz.

    Either `images` uint8 [n, H, W, C] and `labels` ints [n]; or, with a split,
    `{split}_bytes` uint8 (encoded images, one after the other), `{split}_offsets`
    ints [n + 1], `{split}_labels` ints [n] and perhaps `classes`.

    Raises:
      ValueError: if it is not such a file; the message says what it holds.
    """
    name = f"npz:{path}" + (f":{split}" if split else "")
    check_file(path, name)
    wanted: tuple[str, ...] = ("images", "labels")
    if split is not None:
        wanted = tuple(f"{split}_{part}" for part in ("bytes", "offsets", "labels"))
    arrays = _read_npz(path, wanted, ("classes",))
    own = len(np.atleast_1d(arrays["classes"])) if "classes" in arrays else None
    known = classes_of(own, source=name, num_classes=num_classes)
    first, labels = arrays[wanted[0]], arrays[wanted[-1]]
    if split is None:
        return ArraySource(first, labels, num_classes=known, name=name)
    reader = _SliceReader(first, _offsets(arrays[wanted[1]], first, name))
    names = [f"{split} image {i}" for i in range(len(reader.offsets) - 1)]
    return EncodedSource(reader, names, labels=labels, name=name, num_classes=known)


def _offsets(offsets: np.ndarray, data: np.ndarray, name: str) -> np.ndarray:
    if data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError(f"{name}: bytes are {data.dtype} {data.shape}, not uint8 [n].")
    whole = offsets.dtype.kind in "iu" and offsets.ndim == 1 and len(offsets) > 1
    offsets = offsets.astype(np.int64) if whole else np.zeros(2, np.int64)
    inside = offsets[0] >= 0 and offsets[-1] <= len(data)
    if not whole or not inside or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"{name}: offsets must be ints [n + 1] that rise from 0 to the "
            f"{len(data)} bytes there are, with at least one image."
        )
    return offsets


def _read_npz(
    path: str, wanted: tuple[str, ...], optional: tuple[str, ...]
) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {i.filename: i for i in archive.infolist()}
            held = sorted(n.removesuffix(".npy") for n in infos)
            if missing := [w for w in wanted if w not in held]:
                raise ValueError(
                    f"it holds {', '.join(held)} and not {', '.join(missing)}; "
                    f"{_splits(held)}"
                )
            names = [n for n in (*wanted, *optional) if n in held]
            found = {n: infos[f"{n}.npy"] for n in names}
            most = _MOST_INFLATION * os.path.getsize(path) + _SLACK
            npy_members.check(list(found.values()), most=most)
            return {n: npy_members.read(archive, i) for n, i in found.items()}
    except Exception as error:  # zipfile and the header parser raise almost anything
        raise ValueError(f"npz:{path} does not serve: {error}.") from error


def _splits(held: list[str]) -> str:
    splits = [n.removesuffix("_bytes") for n in held if n.endswith("_bytes")]
    ways = ", ".join(f"npz:PATH:{s}" for s in splits)
    return f"write {ways}" if ways else "write npz:PATH for images and labels"
