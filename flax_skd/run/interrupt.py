"""Ending a run when it is told to, with its state saved."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax


class Stopped(SystemExit):
    """The run was told to end, and saved what it had."""


@contextlib.contextmanager
def sigterm(manager: Any) -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step: whether to save and end after it."""
    if manager and jax.process_count() > 1:
        yield manager.reached_preemption  # all hosts must agree on the step
        return
    main = threading.current_thread() is threading.main_thread()
    if not manager or not main:
        yield lambda step: False
        return
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
