"""A training as a process that can be killed, and that notes where it is meanwhile."""

import mmap
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

from flax_skd.io import checkpoint, run_state
from flax_skd.run import lists, main, settling

SIZE = 64  # bytes of the note


def noting(path: str, arguments: list[str]) -> int:
    """`flax-skd` with a note of its phase in a file that outlives it."""
    with open(path, "r+b") as f:
        note = mmap.mmap(f.fileno(), SIZE)
    step = 0

    def write(phase):
        note[:] = f"{phase} {step}".ljust(SIZE).encode()

    def during(phase, owner, name):
        plain = getattr(owner, name)

        def noted(*args, **kwargs):
            write(phase)
            try:
                return plain(*args, **kwargs)
            finally:
                write("step" if step else "start")

        setattr(owner, name, noted)

    follow = settling.Running.follow

    def followed(running, number, *args):
        nonlocal step
        step = number
        write("step")
        follow(running, number, *args)

    settling.Running.follow = followed
    during("restore", run_state.Checkpoints, "restore")
    during("save", run_state.Checkpoints, "save")
    during("growth", lists, "grown")
    during("network", checkpoint, "save_supernet")
    write("start")
    return main.main(arguments)


class Run:
    """A training in a directory, that can be started again and again."""

    def __init__(self, folder: pathlib.Path, processes: int, more: list[str]):
        self.folder, self.processes, self._more = folder, processes, more
        self.steps = folder / "run" / run_state.CHECKPOINTS
        self._folders = [folder / f"process_{i}" for i in range(processes)]
        for path in self._folders:
            path.mkdir(parents=True)
        self.started: list[subprocess.Popen] = []

    def start(self) -> None:
        """Starts all processes, resuming what is there."""
        hosts = []
        if self.processes > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = s.getsockname()[1]
            hosts = [f"--coordinator=127.0.0.1:{port}", f"--processes={self.processes}"]
        self.started = []
        for index, path in enumerate(self._folders):
            (path / "note").write_bytes(b"start 0".ljust(SIZE))
            mine = [*hosts, f"--process={index}"] if hosts else []
            command = [
                sys.executable,
                __file__,
                str(path / "note"),
                "train",
            ]
            command += [*self._more, f"--workdir={self.folder / 'run'}", *mine]
            with (path / "log").open("wb") as log:
                process = subprocess.Popen(
                    [*command, "--resume"],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a process group of its own
                )
            self.started.append(process)

    def note(self, index: int = 0) -> tuple[str, int]:
        """Phase and step of a process."""
        phase, step = (self._folders[index] / "note").read_bytes().split()
        return phase.decode(), int(step)

    def log(self, index: int = 0) -> str:
        """What the newest start of a process has said."""
        return (self._folders[index] / "log").read_text(errors="replace")

    def ended(self) -> bool:
        """Whether any process is gone."""
        return any(p.poll() is not None for p in self.started)

    def resumed(self) -> int:
        """The step that the newest start went on from."""
        found = re.findall(r"resumed after step (\d+)", self.log())
        return int(found[-1]) if found else -1

    def kill(self, index: int) -> float:
        """Kills one process; the seconds until the others had ended."""
        os.killpg(self.started[index].pid, signal.SIGKILL)
        before = time.monotonic()
        for process in self.started:
            process.wait()
        return time.monotonic() - before if self.processes > 1 else 0.0


if __name__ == "__main__":
    sys.exit(noting(sys.argv[1], sys.argv[2:]))
