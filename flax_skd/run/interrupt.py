"""Ending a run when it is told to, by SIGTERM or Ctrl-C, with its state saved."""

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax

_LOG = logging.getLogger(__name__)


class Stopped(SystemExit):
    """The run was told to end, and saved what it had."""


@contextlib.contextmanager
def told_to_stop(manager: Any) -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step: whether to save and end after it.

    One process stops so at SIGTERM and at the first SIGINT; a second one interrupts.
    Several agree on the step, which orbax does at SIGTERM alone.
    """
    if manager and jax.process_count() > 1:
        yield manager.reached_preemption  # all hosts must agree on the step
        return
    main = threading.current_thread() is threading.main_thread()
    if not manager or not main:
        yield lambda step: False
        return
    asked = threading.Event()

    def ask(number, frame):
        del frame
        if number == signal.SIGINT:
            _LOG.warning("ending after this step; Ctrl-C again ends at once, unsaved")
            signal.signal(signal.SIGINT, before[number])
        asked.set()

    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    # Shells have jobs in the background ignore SIGINT, and those go on ignoring it.
    before = {s: old for s, old in before.items() if old not in (signal.SIG_IGN, None)}
    for number in before:
        signal.signal(number, ask)
    try:
        yield lambda step: asked.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
