"""A small process beside each of several, to say what became of it and of the others.

JAX ends a process outright when another one is lost, from a thread of its own, and no
Python is left to speak. The witness reads a pipe that this process holds: when it closes
without a farewell, the process is gone, and the witness says so on the same stderr. It
runs this file as a script, so it imports the standard library alone.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys

WAITING, JOINED, LEAVING, LEFT = b"w", b"j", b"l", b"."
AGAIN = (
    "Start all processes of the run again; a training goes on from its newest whole "
    "checkpoint with --resume."
)


class Witness:
    """Starts a witness of this process.

    Args:
      process: which one this is.
      processes: how many there are.
      coordinator: HOST:PORT of process 0, or "" where unknown.
    """

    def __init__(self, process: int, processes: int, coordinator: str):
        told = [str(process), str(processes), coordinator, str(os.getpid())]
        self._child = subprocess.Popen(
            [sys.executable, "-E", "-S", __file__, *told],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )

    def tell(self, word: bytes) -> None:
        """What the process is at: `WAITING` for the others, `LEAVING` by itself ..."""
        with contextlib.suppress(OSError):  # it was ended before us
            self._child.stdin.write(word)
            self._child.stdin.flush()
        if word == LEFT:
            with contextlib.suppress(OSError):
                self._child.stdin.close()
            self._child.wait()


def verdict(process: int, processes: int, coordinator: str, heard: bytes) -> str:
    """What to say of a process that is gone; "" after a farewell.

    Args:
      process, processes, coordinator: see `Witness`.
      heard: all that it told.
    """
    if heard.endswith(LEFT):
        return ""
    this = f"flax-skd: process {process} of {processes}"
    if heard == WAITING:
        return (
            f"{this} was ended: the others were not there in time, unless it was killed. "
            "Start all of them with the same --processes and --coordinator, whose port "
            "every host must reach."
        )
    # Who may be lost: not 0 if it answers.
    alive = {process} | ({0} if coordinator and _reachable(coordinator) else set())
    others = sorted(set(range(processes)) - alive)
    if process and coordinator and 0 in others:
        lost = f"process 0 ({coordinator}) is gone, and the run with it"
    elif heard.endswith(LEAVING):
        other = f"process {others[0]}" if len(others) == 1 else "another one"
        return (
            f"{this} ended, and {other} did not end with it: it is gone, or an error "
            f"above says what went wrong. {AGAIN}"
        )
    elif not others:
        lost = "it was killed, or lines above say what else"
    elif len(others) == 1:
        lost = f"process {others[0]} is gone, unless this one was killed itself"
    else:
        lost = (
            "another process is gone (JAX's lines above number those that 'stopped "
            "sending heartbeats'), unless this one was killed itself"
        )
    return f"{this} was ended: {lost}. {AGAIN}"


def _reachable(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


def _heard(parent: int) -> bytes:
    """Everything the parent writes until it is gone."""
    heard = b""
    while os.getppid() == parent:
        # A fork of the parent may hold the pipe open, so its life is asked for as well.
        if select.select([0], [], [], 1.0)[0]:
            word = os.read(0, 1)
            if not word:
                break
            heard += word
    return heard


def main(arguments: list[str]) -> None:
    """The witness itself.

    Args:
      arguments: of `Witness`, and the process id of the one it watches.
    """
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # it must outlive the other
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    process, processes, coordinator, parent = arguments
    heard = _heard(int(parent))
    said = verdict(int(process), int(processes), coordinator, heard)
    if said:
        print(f"\n{said}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
