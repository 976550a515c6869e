"""Kills a PIAD training at random moments, resumes it, and compares with one left alone.

    python benchmarks/kill_and_resume.py [--kills=30] [--processes=1] [--out=DIR]

A tiny network on handwritten digits, a checkpoint every five steps, a list that grows
every epoch. Each kill is SIGKILL to the process group of `flax-skd train`; with
--processes=2 it hits one of two, and the other has a minute to end by itself. At the end:
whether every array of the last checkpoint and of the network has the bits of the run that
was left alone, whether each resume took the newest whole step, and whether the same files
lie there. Ends with status 1 where one of these fails. About 20 s a kill on two CPU cores.
"""

import argparse
import collections
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np
import tables
from watched_run import Run

from flax_skd.io import checkpoint, run_state, whole_steps
from flax_skd.io.extras import require
from flax_skd.method import piad, vit
from flax_skd.method.spec import ViTSpec

SPEC = ViTSpec(
    image_size=8,
    patch_size=2,
    width=16,
    depth=2,
    num_heads=2,
    mlp_dim=32,
    num_classes=10,
    in_channels=1,
    mean=(0.5,),
    std=(0.5,),
    crop_fraction=1.0,
)
AIMS = ("step",) * 4 + ("save",) * 3 + ("growth",) * 3 + ("start",) * 2


class Kill(NamedTuple):
    """One kill, and what was found after it.

    Attributes:
      aim: what it waited for.
      phase: what the main thread did, as it noted itself.
      step: the last one finished.
      saving: whether a checkpoint was half written.
      whole: the newest whole step on disk, -1 for none.
      resumed: the step that the next start went on from; -1 for none.
      seconds: until the other processes had ended; 0 where there are none.
    """

    aim: str
    phase: str
    step: int
    saving: bool
    whole: int
    resumed: int
    seconds: float


def _wait(run: Run, aim: str, rng: np.random.Generator) -> None:
    """Returns at a random moment of the kind, or before the run could end."""
    count, seen, before = int(rng.integers(1, 4)), 0, ""
    steps, begun = int(rng.integers(1, 13)), None
    end = time.monotonic() + rng.uniform(0, 10) if aim == "start" else None
    while not run.ended():
        phase, step = run.note()
        if phase == "network" or (end and time.monotonic() >= end):
            return
        seen += phase == aim != before
        before = phase
        if begun is None and step:
            begun = step
        if aim == "step" and begun and step >= begun + steps:
            time.sleep(rng.uniform(0, 0.05))
            return
        if aim in ("save", "growth") and seen >= (count if aim == "save" else 1):
            time.sleep(rng.uniform(0, 0.3))
            return
        time.sleep(0.001)


def _killed(run: Run, aim: str, rng: np.random.Generator) -> Kill:
    run.start()
    _wait(run, aim, rng)
    if run.ended():
        raise SystemExit(f"the run ended before it was killed:\n{run.log()[-3000:]}")
    seconds = run.kill(int(rng.integers(run.processes)))
    phase, step = run.note()
    saving = any(run.steps.glob("*tmp*")) if run.steps.is_dir() else False
    whole = whole_steps.steps(run.steps)
    return Kill(aim, phase, step, saving, whole[0] if whole else -1, -1, seconds)


def files(folder: pathlib.Path) -> list[str]:
    """Names in a workdir, but for the log and for the names that orbax draws."""
    paths = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    names = {re.sub("[0-9a-f]{32}", "*", path) for path in paths}
    log = (run_state.LOG, f"{run_state.BOARD}/")
    return sorted(name for name in names if not name.startswith(log))


def arrays(run: Run) -> dict[str, np.ndarray]:
    """Everything in the last checkpoint and in the network, by path."""
    last = run.steps / str(whole_steps.steps(run.steps)[0]) / "state"
    network = checkpoint.load_supernet(run.folder / "run/network")
    handler = require("orbax.checkpoint").PyTreeCheckpointHandler()
    found = {
        "state": handler.restore(last),
        "network": {"params": network.params, "list": network.dropout_list._asdict()},
    }
    leaves = jax.tree_util.tree_leaves_with_path(found)
    return {jax.tree_util.keystr(path): _plain(x) for path, x in leaves}


def _plain(x: Any) -> np.ndarray:
    key = isinstance(x, jax.Array) and jax.dtypes.issubdtype(
        x.dtype, jax.dtypes.prng_key
    )
    return np.asarray(jax.random.key_data(x) if key else x)


def differing(run: Run, reference: Run) -> list[str]:
    """Paths of arrays that have not the same bits in both."""
    got, want = arrays(run), arrays(reference)
    return [
        name
        for name in sorted(got | want)
        if name not in got
        or name not in want
        or got[name].dtype != want[name].dtype
        or got[name].tobytes() != want[name].tobytes()
    ]


def _finish(run: Run) -> None:
    run.start()
    for process in run.started:
        if process.wait():
            raise SystemExit(f"a run ended with an error:\n{run.log()[-3000:]}")


def measure(
    work: pathlib.Path, kills: int, processes: int, seed: int
) -> dict[str, Any]:
    """Two runs, one of them killed; what is equal."""
    full = piad.uniform(SPEC, steps=2)
    start = checkpoint.Supernet(vit.init(SPEC, jax.random.key(0)), SPEC, full, {})
    checkpoint.save_supernet(work / "start", start)
    epochs = max(2, kills // 2)
    more = [
        *("--config=configs/piad.py", f"--config.model.path={work / 'start'}"),
        *(f"--config.epochs={epochs}.0", "--config.checkpoint_every=5"),
        f"--config.piad.progressive_epochs={epochs}.0",
        *("--config.piad.groups.mlp=8", "--config.piad.calibration.images=128"),
        *("--config.evaluate_epochs=5.0", "--config.log_every_s=1.0"),
    ]
    alone = Run(work / "alone", processes, more)
    _finish(alone)
    run, rng = Run(work / "killed", processes, more), np.random.default_rng(seed)
    aims = [AIMS[i % len(AIMS)] for i in range(kills)]
    found: list[Kill] = []
    for aim in rng.permutation(aims):
        kill = _killed(run, str(aim), rng)
        if found:
            found[-1] = found[-1]._replace(resumed=run.resumed())
        found.append(kill)
        print(f"{len(found)}: {kill}", flush=True)
    _finish(run)
    found[-1] = found[-1]._replace(resumed=run.resumed())
    there, wanted = (set(files(r.folder / "run")) for r in (run, alone))
    return {
        "kills": [kill._asdict() for kill in found],
        "arrays": len(arrays(run)),
        "differing": differing(run, alone),
        "files_more": sorted(there - wanted),
        "files_less": sorted(wanted - there),
        # A start that was killed before it read a checkpoint resumed from none.
        "lost": [k._asdict() for k in found if k.resumed not in (-1, k.whole)],
    }


def table(found: dict[str, Any]) -> str:
    """What was measured, as Markdown."""
    kills = [Kill(**kill) for kill in found["kills"]]
    counts = collections.Counter(kill.phase for kill in kills)
    lines = ["| fell into | kills | of these with a checkpoint half written |"]
    lines += ["|---|---|---|"]
    for phase, count in counts.most_common():
        half = sum(k.saving for k in kills if k.phase == phase)
        lines.append(f"| {phase} | {count} | {half} |")
    read = sum(kill.resumed >= 0 for kill in kills)
    said = f"{len(kills)} kills; {read} of the starts after them read a checkpoint, "
    said += f"{len(found['lost'])} of these not the newest whole one; "
    said += f"{len(found['differing'])} of {found['arrays']} arrays differ; "
    said += f"files too many: {found['files_more'] or 'none'}, "
    said += f"too few: {found['files_less'] or 'none'}."
    lines += ["", said]
    slowest = max(kill.seconds for kill in kills)
    if slowest:
        lines += [f"The others had ended after {slowest:.0f} s at most."]
    return "\n".join(lines)


def cli() -> int:
    """Measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", help="directory for the runs; temporary by default")
    parser.add_argument("--out", help="directory for kill_and_resume.json and .md")
    args = parser.parse_args()
    work = pathlib.Path(args.work or tempfile.mkdtemp())
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(work / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    found = measure(work, args.kills, args.processes, args.seed)
    found["flags"] = {k: v for k, v in vars(args).items() if k not in ("out", "work")}
    text = table(found)
    print(text)
    tables.write(args.out, "kill_and_resume", found, text)
    failed = ("differing", "files_more", "files_less", "lost")
    return int(any(found[name] for name in failed))


if __name__ == "__main__":
    sys.exit(cli())
