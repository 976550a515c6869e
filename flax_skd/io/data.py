"""Batches of labelled images, for evaluation and for training."""

import collections
import concurrent.futures
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Sequence

import numpy as np

from flax_skd.io import draws, preprocess, worker_processes
from flax_skd.io.bad_images import BadImages, prepared
from flax_skd.io.examples import BadImageError, Source
from flax_skd.io.extras import require
from flax_skd.method.spec import ViTSpec

Batch = dict[str, np.ndarray]

_AHEAD = 2  # batches decoded before they are asked for
_STACK = 16  # most images that one thread prepares in a go


def _threads() -> int:
    return min(16, (os.cpu_count() or 1) + 1)  # decoding lets go of Python's lock


@dataclasses.dataclass
class EvalBatches:
    """Batches for evaluation; see `eval_batches`. Iterating again starts again.

    Attributes:
      rows: first and end of those of every batch that are read; None for all.
    """

    source: Source
    spec: ViTSpec
    batch_size: int
    indices: Sequence[int] | np.ndarray
    bad: BadImages
    rows: tuple[int, int] | None = None

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def of_process(self, index: int, count: int) -> "EvalBatches":
        """What process `index` of `count` reads: its rows of every batch.

        All have the same number of batches; their rows in turn make up the whole.

        Raises:
          ValueError: if a batch does not divide over the processes.
        """
        if self.batch_size % count:
            raise ValueError(
                f"batch_size = {self.batch_size} must be a multiple of the {count} "
                "processes."
            )
        share = self.batch_size // count
        return dataclasses.replace(self, rows=(index * share, (index + 1) * share))

    @property
    def num_examples(self) -> int:
        """Images, those that turn out not to decode included."""
        return len(self.indices)

    @property
    def num_skipped(self) -> int:
        """Images found so far that do not decode."""
        return len(self.bad)

    def __iter__(self) -> Iterator[Batch]:
        pool = concurrent.futures.ThreadPoolExecutor(_threads())
        try:
            start, end = self.rows or (0, self.batch_size)
            batches = (
                [
                    pool.submit(self._load, int(i))
                    for i in self.indices[at + start : at + end]
                ]
                for at in range(0, len(self.indices), self.batch_size)
            )
            waiting = collections.deque(itertools.islice(batches, _AHEAD))
            while waiting:
                loaded = [future.result() for future in waiting.popleft()]
                waiting.extend(itertools.islice(batches, 1))
                yield self._stack(loaded)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _load(self, index: int) -> tuple[np.ndarray, int] | None:
        def prepare(image):
            return preprocess.evaluation(image, self.spec)

        try:
            return prepared(self.source, index, prepare)
        except BadImageError as error:
            self.bad.meet(index, error)
            return None

    def _stack(self, loaded: list[tuple[np.ndarray, int] | None]) -> Batch:
        start, end = self.rows or (0, self.batch_size)
        size, side = end - start, self.spec.image_size
        batch: Batch = {
            "image": np.zeros((size, side, side, self.spec.in_channels), np.uint8),
            "label": np.zeros(size, np.int32),
            "weight": np.zeros(size, np.float32),
        }
        for row, example in enumerate(loaded):
            if example is not None:
                batch["image"][row], batch["label"][row] = example
                batch["weight"][row] = 1
        return batch


def eval_batches(
    source: Source,
    spec: ViTSpec,
    *,
    batch_size: int,
    on_bad_image: str = "error",
    indices: Sequence[int] | np.ndarray | None = None,
) -> EvalBatches:
    """Every image once, in order, preprocessed as for evaluation.

    Args:
      source: of images; see `flax_skd.io.sources.open_source`.
      spec: says size, channels, crop and interpolation.
      batch_size: images of a batch.
      on_bad_image: `error`, or `skip`: an image that does not decode, or does not
        serve (16 bits a channel), gets weight 0.
      indices: positions in the source, integers, in the order wanted; all if None.

    Returns:
      An iterable, which may be iterated again, of `image` uint8 [B, S, S, C], `label`
      int32 [B] and `weight` float32 [B]. The last batch is filled up with zeros of
      weight 0. It has a length in batches, `num_examples` and `num_skipped`.

    Raises:
      ValueError: if an option is not possible, or indices are a mask or no positions;
        and, while iterating, if an image does not decode.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} must be at least 1.")
    indices = np.arange(len(source)) if indices is None else indices
    indices = _positions(indices, source)
    return EvalBatches(source, spec, batch_size, indices, BadImages(on_bad_image))


def _positions(indices: Sequence[int] | np.ndarray, source: Source) -> np.ndarray:
    """Indices as integers [n]; a mask would read the images 0 and 1 over and over."""
    found = np.asarray(indices)
    if found.size and (found.dtype.kind not in "iu" or found.ndim != 1):
        raise ValueError(
            f"indices are {found.dtype} {list(found.shape)}, not integers [n]: give "
            "positions, of a mask np.flatnonzero(mask)."
        )
    if not found.size or not 0 <= found.min() <= found.max() < len(source):
        raise ValueError(
            f"indices must be positions in {source.name}, at least one of 0 to "
            f"{len(source) - 1}."
        )
    return found


def train_batches(
    source: Source,
    spec: ViTSpec,
    *,
    batch_size: int,
    seed: int,
    augment: draws.Augment,
    process_index: int = 0,
    process_count: int = 1,
    on_bad_image: str = "error",
    repeats: int = 1,
    workers: int = 0,
):
    """Endless shuffled batches; every epoch has an order of its own.

    Args:
      source: of images; see `flax_skd.io.sources.open_source`.
      spec: says size and channels.
      batch_size: of all processes together; each yields its share of it.
      seed: 0 to 2**32 - 1; fixes order and augmentation, on every process the same.
      augment: (image, rng, spec) -> uint8 [S, S, C], such as `augment.flip_crop`.
      process_index, process_count: which part of the source is read here.
      on_bad_image: `error`, or `skip`: the next image takes the place of one that
        does not decode.
      repeats: how often an epoch draws an image, each time augmented anew. It has
        len(source) draws all the same, so that it sees 1 / repeats of the images. The
        draws of an image follow each other in the order of all processes together.
      workers: processes that prepare images, 0 for threads of this one; batches are
        the same. They import the script that asks for them, which therefore does so
        under `if __name__ == "__main__"`.

    Returns:
      A `grain.DatasetIterator` of `image` uint8 [b, S, S, C], `label` int32 [b] and
      `index` int32 [b], the positions in the source. Its `get_state` and `set_state`
      resume exactly, with other `workers` too. `close` ends threads and processes.

    Raises:
      ValueError: if an option is not possible, or the source holds less than a batch;
        and, while iterating, if an image does not decode.
    """
    _check_sizes(source, batch_size, seed, processes=(process_index, process_count))
    if repeats < 1 or workers < 0:
        raise ValueError(
            f"repeats = {repeats} must be at least 1, workers = {workers} at least 0."
        )
    share, threads = batch_size // process_count, _threads()
    drawn = draws.examples(
        *(source, spec, augment, BadImages(on_bad_image)), seed=seed, repeats=repeats
    )
    # Augmented before it is shared out: else the processes would draw the same.
    examples = drawn[process_index::process_count]
    # Not single images: grain looks through all elements that wait, for each of them.
    stack = math.gcd(share, _STACK)
    stacks = examples.batch(stack, drop_remainder=True)
    ahead = max(_AHEAD * share // stack, threads)

    def joined(stacks):
        return iter(stacks.batch(share // stack, drop_remainder=True, batch_fn=_joined))

    def starting_at(position):
        return joined(worker_processes.spread(stacks[position:], workers, ahead=ahead))

    if workers:
        return worker_processes.WorkerBatches(starting_at, share // stack)
    options = require("grain").ReadOptions(
        num_threads=threads, prefetch_buffer_size=ahead
    )
    return joined(stacks.to_iter_dataset(options))


def _check_sizes(
    source: Source, batch_size: int, seed: int, *, processes: tuple[int, int]
) -> None:
    """Raises ValueError unless `processes`, index and count, can draw such batches."""
    process_index, process_count = processes
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count} cannot be.")
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size = {batch_size} must be a positive multiple of the "
            f"{process_count} processes."
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed = {seed} must be 0 to {2**32 - 1}.")
    if len(source) < batch_size:
        raise ValueError(
            f"batch_size = {batch_size} but {source.name} has {len(source)} images: "
            "choose a smaller batch."
        )


def _joined(stacks: Sequence[Batch]) -> Batch:
    return {name: np.concatenate([s[name] for s in stacks]) for name in stacks[0]}
