"""Several processes as one run: who the others are, and where to meet them."""

import os

import jax


def start(
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    detect: bool = False,
) -> None:
    """Joins the processes of a run, before any device is used.

    Nothing happens on one machine of its own. A TPU pod is found by what its machines
    have in their environment; other hosts are named, or found by the cluster's manager.

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
    jax.distributed.initialize(
        coordinator_address=coordinator, num_processes=processes, process_id=process
    )


def _detect() -> None:
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"no cluster that JAX knows was found here ({error}) Leave --distributed "
            "out on one machine, or name the processes by --coordinator=HOST:PORT, "
            "--processes=N and --process=I."
        ) from error


def _on_pod() -> bool:
    """Whether this is one of several machines of a TPU pod."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
