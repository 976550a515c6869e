"""train, contract, sweep and PIAD by the command line; run on its own, one of two."""

import os
import sys

import jax

from flax_skd.run import main

TRAIN = [
    *("train", "--config=configs/scratch.py", "--config.epochs=0.25"),
    *("--config.model.depth=1", "--config.model.width=16", "--config.model.mlp_dim=24"),
    *("--config.data.batch_size=64", "--config.warmup_epochs=0.0"),
    *("--config.evaluate_epochs=100.0", "--config.weights=raw"),
]
CONTRACT = [
    *("contract", "--config=configs/wpac.py", "--config.data.source=digits:train"),
    *(
        "--config.data.images=100",
        "--config.data.batch_size=40",
        "--config.list.levels=4",
    ),
    "--config.compensation=least_squares",
]
SWEEP = [
    *("sweep", "--config.data.source=digits:test", "--config.data.images=90"),
    *("--config.cuts=mlp,levels", "--config.kept=1/2", "--config.every=2"),
    "--config.data.batch_size=40",
]
# Parameters and what repairs their cuts lie cut over the devices of both processes.
PIAD = [
    *("train", "--config=configs/piad.py", "--config.epochs=0.25"),
    *("--config.data.batch_size=64", "--config.piad.calibration.images=32"),
    *("--config.mesh.fsdp=4", "--config.weights=raw"),
]


def run(folder, *hosts):
    """The four commands, one after the other; 0 if all of them end well."""
    train = [*TRAIN, f"--workdir={folder}/train"]
    contract = [*CONTRACT, f"--config.model.path={folder}/train/network"]
    contract.append(f"--workdir={folder}/wpac")
    sweep = [*SWEEP, f"--workdir={folder}/wpac", f"--out={folder}/sweep"]
    grown = [*PIAD, f"--config.model.path={folder}/wpac", f"--workdir={folder}/piad"]
    return max(main.main([*c, *hosts]) for c in (train, contract, sweep, grown))


def other_commands(folder, index, *hosts):
    """One that each process is given differently; 0 if it was refused."""
    return main.main([*SWEEP, f"--workdir={folder}/{index}", *hosts]) - 1


if __name__ == "__main__":
    port, index, target = sys.argv[1:]
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    os.environ.setdefault("MPLBACKEND", "agg")
    hosts = [f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={index}"]
    sys.exit(other_commands(target, index, *hosts) or run(target, *hosts))
