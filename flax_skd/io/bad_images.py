"""Images that do not decode or do not serve: an error that names them, or skipped."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_skd.io import preprocess
from flax_skd.io.examples import BadImageError, Source, bad_image

_LOG = logging.getLogger(__name__)
_CHOICES = ("error", "skip")


class BadImages:
    """What is done with them, and which they were.

    Args:
      on_bad_image: `error` or `skip`.

    Raises:
      ValueError: for another word.
    """

    def __init__(self, on_bad_image: str):
        if on_bad_image not in _CHOICES:
            raise ValueError(f"on_bad_image = {on_bad_image!r}: choose of {_CHOICES}.")
        self._skip = on_bad_image == "skip"
        self._seen: set[int] = set()
        self._lock = threading.Lock()

    def __reduce__(self):
        return BadImages, ("skip" if self._skip else "error",)  # a lock does not pickle

    def __len__(self) -> int:
        return len(self._seen)

    def meet(self, index: int, error: BadImageError) -> None:
        """Raises `error`, or notes it and logs it once."""
        if not self._skip:
            raise error
        with self._lock:
            new = index not in self._seen
            self._seen.add(index)
            count = len(self._seen)
        if new:
            _LOG.warning("skipped image %d (%d so far): %s", index, count, error)


def prepared(
    source: Source, index: int, prepare: Callable[[Any], np.ndarray]
) -> tuple[np.ndarray, int]:
    """The pixels of an image by `prepare`, and its label; a BadImageError names it."""
    example = source[index]
    try:
        return prepare(example.image), example.label
    except preprocess.UnfitImageError as error:
        problem = f"does not serve ({error})"
        raise bad_image(source.name, example.name, problem) from error
