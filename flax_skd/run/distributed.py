"""Several processes as one run: who the others are, and what happens if one is lost."""

import atexit
import contextlib
import logging
import os
import time
from collections.abc import Iterator

import jax

from flax_skd.run import witness

_LOG = logging.getLogger(__name__)

HEARTBEAT = "FLAX_SKD_HEARTBEAT_S"
WAIT_S = 300  # for processes that have not started yet
HEARTBEAT_S = 45  # seconds; JAX's own default, 100, is more than a minute


def heartbeat() -> int:
    """Seconds of silence after which a process counts as lost.

    Raises:
      ValueError: if `FLAX_SKD_HEARTBEAT_S` is set to no whole number above 1.
    """
    text = os.environ.get(HEARTBEAT, str(HEARTBEAT_S))
    if not text.isdecimal() or int(text) < 2:
        raise ValueError(
            f"{HEARTBEAT}={text}: write whole seconds, 2 or more; without it, "
            f"{HEARTBEAT_S}."
        )
    return int(text)


def start(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    detect: bool = False,
) -> None:
    """Joins the processes of a run, before any device is used.

    On a single machine this does nothing. The machines of a TPU pod find each other by
    their environment; other hosts are named, or found by the cluster's manager.
    When a process is lost, the others end after at most `heartbeat` seconds, and say so.

    Args:
      coordinator: HOST:PORT of process 0, the same in every process.
      processes: how many there are.
      process: which of them this is, from 0.
      detect: leave it to JAX, which knows Slurm, Open MPI and others.

    Raises:
      ValueError: if what is given does not name a process of a run, or no cluster is
        found.
    """
    if jax.distributed.is_initialized():
        return
    if coordinator is None and processes is None and process is None:
        if detect or _on_pod():
            _detect()
        return
    if coordinator is None or processes is None or process is None:
        raise ValueError(
            "--coordinator=HOST:PORT, --processes=N and --process=I go together; got "
            f"coordinator {coordinator}, processes {processes}, process {process}."
        )
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdigit()):
        raise ValueError(f"--coordinator={coordinator}: write HOST:PORT.")
    if not 0 <= process < processes:
        raise ValueError(
            f"--process={process} of --processes={processes}: choose 0 to "
            f"{processes - 1}."
        )
    _LOG.info(
        "process %d of %d: waiting for the others, %d s at most; the first is %s",
        *(process, processes, WAIT_S, coordinator),
    )
    with _watched(process, processes, coordinator):
        jax.distributed.initialize(
            initialization_timeout=WAIT_S,
            coordinator_address=coordinator,
            num_processes=processes,
            process_id=process,
            heartbeat_timeout_seconds=heartbeat(),
        )


def _detect() -> None:
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat())
    except ValueError as error:
        raise ValueError(
            f"no cluster that JAX knows was found here ({error}) Leave --distributed "
            "out on one machine, or name the processes by --coordinator=HOST:PORT, "
            "--processes=N and --process=I."
        ) from error
    with _watched(jax.process_index(), jax.process_count(), ""):
        pass  # who it is was not known before


@contextlib.contextmanager
def _watched(process: int, processes: int, coordinator: str) -> Iterator[None]:
    """Starts a witness, which watches the joining inside and all that follows.

    A process that ends by itself tells it so first; any other end is a death.
    """
    if processes == 1:
        yield
        return
    seen = witness.Witness(process, processes, coordinator)
    seen.tell(witness.WAITING)
    try:
        yield
    except BaseException:
        seen.tell(witness.LEFT)  # the error says what it was
        raise
    seen.tell(witness.JOINED)

    def leave():
        seen.tell(witness.LEAVING)
        jax.distributed.shutdown()  # waits for the others; JAX ends us if it cannot
        seen.tell(witness.LEFT)

    atexit.register(leave)


@contextlib.contextmanager
def lost_peers_named() -> Iterator[None]:
    """Holds back an error of the devices until JAX has had time to say who is lost.

    A lost process breaks the connections of the others at once, and what they raise
    then tells of sockets; JAX knows which process it was after `heartbeat` seconds.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() > 1:
            _LOG.error(
                "a step failed: %s\nIf another process is lost, the next %d s tell.",
                *(error, heartbeat()),
            )
            time.sleep(heartbeat() + 5)
        raise


def _on_pod() -> bool:
    """Whether this is one of several machines of a TPU pod."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
