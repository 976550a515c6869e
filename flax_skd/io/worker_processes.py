"""Training images prepared by processes of their own, where threads are not enough.

The threads of a process share Python's lock, and a sixth of every image is done under it
(`benchmarks/input_pipeline.py`).
"""

import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

from flax_skd.io.extras import require


class WorkerBatches:
    """An iterator over batches that processes prepare; they start with the first one.

    Its state is a position, and nothing of the processes, so that a run goes on with
    another number of them or none.
    """

    def __init__(self, starting_at: Callable[[int], Any], stride: int):
        """Of a function that begins at a position, which a batch moves by `stride`."""
        self._starting_at, self._stride = starting_at, stride
        self._position, self._batches = 0, None
        # Checkpoints take the positions of grain's iterators alone.
        require("grain").DatasetIterator.register(WorkerBatches)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.start_prefetch()
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if "exit code" not in str(error):
                raise
            raise RuntimeError(
                f"a process that prepares images has ended ({error}) It may have been "
                "killed for its memory, or /dev/shm be full: give it more room, or "
                "--config.data.workers fewer, 0 for none."
            ) from error
        self._position += self._stride
        return batch

    def get_state(self) -> dict[str, int]:
        """The position, as grain has it of batches that threads prepare."""
        return {"next_index": self._position}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from a position."""
        self.close()
        self._position = state["next_index"]

    def start_prefetch(self) -> None:
        """Starts the processes, if they do not run."""
        if self._batches is None:
            self._batches = self._starting_at(self._position)
            self._batches.start_prefetch()

    def close(self) -> None:
        """Ends the processes; the next batch would start them again."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


def spread(elements: Any, workers: int, *, ahead: int) -> Any:
    """The elements of a `grain.MapDataset`, prepared by processes, in their order.

    Args:
      elements: pure functions of their position, which pickle.
      workers: processes.
      ahead: elements prepared before they are asked for, of all together.

    Returns:
      A `grain.IterDataset`.
    """
    grain, flags = require("grain"), require("absl.flags").FLAGS
    if not flags.is_parsed():  # grain has flags, and here nobody gives it any
        flags.mark_as_parsed()
    threads = math.ceil(((os.cpu_count() or 1) + 1) / workers)
    options = grain.ReadOptions(
        num_threads=threads,
        prefetch_buffer_size=max(threads, math.ceil(ahead / workers)),
    )
    processes = grain.MultiprocessingOptions(num_workers=workers)
    return elements.to_iter_dataset(options).mp_prefetch(processes, _begin)


def _begin(index: int, count: int) -> None:
    """In a worker: what would end it is for the run to decide, whose end is its own."""
    del index, count
    jax.config.update("jax_platforms", "cpu")  # the accelerator is the run's
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_run, daemon=True).start()


def _end_with_the_run() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
