"""Damages every file of what is saved, at many places, and counts what is noticed.

    python benchmarks/damage.py [--places=100] [--out=DIR]

A step of a training run, a super-network and a sub-network, all small. Every file is cut
short at so many places, all of them where it is that short, and has one bit flipped at
so many. Each case is one of: an error that names the file, or its folder where the reader
hides it; another error; read with the same bits as before; read with other bits, silently.
Rows without our checksums show what orbax notices of the step's arrays by itself.
"""

import argparse
import collections
import gc
import json
import pathlib
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import tables
from kill_and_resume import SPEC

from flax_skd.io import augment, checkpoint, data, run_state, sources, whole_steps
from flax_skd.io.extras import require
from flax_skd.method import piad, subnet, vit
from flax_skd.method.spec import SubnetSpec
from flax_skd.run import train, updates

KINDS = ("file named", "folder named", "other error", "same bits", "other bits")


def damaged(content: bytes, places: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(how, content) of every case of a file."""
    rng = np.random.default_rng(seed)
    count = min(places, len(content))
    for kept in np.unique(np.linspace(0, max(0, len(content) - 1), count).astype(int)):
        yield "cut short", content[:kept]
    for at in rng.choice(len(content), count, replace=False):
        flipped = bytearray(content)
        flipped[at] ^= 1 << int(rng.integers(8))
        yield "bit flipped", bytes(flipped)


def tried(folder: pathlib.Path, read: Callable[[], Any], places: int) -> dict[str, Any]:
    """Counts of what `read` does about every case, and examples of what is silent."""
    counts, silent = collections.Counter(), []
    whole = leaves(read())
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    for number, path in enumerate(require("tqdm").tqdm(paths, desc=folder.name)):
        content = path.read_bytes()
        for how, broken in damaged(content, places, number):
            path.write_bytes(broken)
            try:
                same = leaves(read()) == whole
                kind = "same bits" if same else "other bits"
            except Exception as error:  # noqa: BLE001 (whatever it is, it is counted)
                kind = _kind(error, folder, path)
            counts[how, kind] += 1
            if kind in ("other bits", "other error"):
                silent.append(f"{path.relative_to(folder)}: {how}, {kind}")
        path.write_bytes(content)
    gc.collect()
    return {
        "files": number + 1,
        "counts": {how: [counts[how, k] for k in KINDS] for how, _ in counts},
        "not_named": dict(collections.Counter(silent)),
    }


def _kind(error: Exception, folder: pathlib.Path, path: pathlib.Path) -> str:
    """Of an error, which must be one that the command line shows as a message."""
    said = str(error)
    if not isinstance(error, ValueError | OSError) or str(folder) not in said:
        return "other error"
    return "file named" if str(path) in said else "folder named"


def leaves(tree: Any) -> list[bytes]:
    """The bytes of all arrays, and of what else there is, in order."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path).encode() + _bytes(x) for path, x in flat]


def _bytes(x: Any) -> bytes:
    if not hasattr(x, "dtype"):
        return repr(x).encode()
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def a_step(folder: pathlib.Path) -> Callable[[], Any]:
    """Saves one; how to read it as `--resume` does, with our checksums."""
    optimizer = train.make_optimizer(1e-3)
    params = vit.init(SPEC, jax.random.key(0))
    state = updates.saved(train.initial_state(params, optimizer, jax.random.key(1)))
    batches = data.train_batches(
        sources.open_source("digits:train", num_classes=10),
        SPEC,
        batch_size=64,
        seed=0,
        augment=augment.none,
    )
    facts = {"batches": batches, "config": {"seed": 0}}
    disk = run_state.Checkpoints(folder, **facts)
    disk.save(1, state)
    disk.close()

    def read():
        disk = run_state.Checkpoints(folder, **facts, resume=True)
        try:
            restored = disk.restore(state)
        finally:
            disk.close()
        place = json.dumps(batches.get_state())
        return {**restored, "rng": jax.random.key_data(restored["rng"])}, [place]

    return read


def by_orbax(step: pathlib.Path) -> Callable[[], Any]:
    """How to read the arrays of a step without our checksums."""
    ocp = require("orbax.checkpoint")

    def read():
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            try:
                state = reader.restore(step / "state")
            except Exception as error:
                raise ValueError(f"{step / 'state'}: {error}") from error
        return state

    return read


def measure(work: pathlib.Path, places: int) -> dict[str, Any]:
    """All that is saved, one after the other."""
    read = a_step(work / "run")
    step = work / "run" / run_state.CHECKPOINTS / "1"
    found = {"a step": tried(step, read, places)}
    (step / whole_steps.FILE).unlink()
    found["its arrays, by orbax alone"] = tried(step / "state", by_orbax(step), places)
    params = vit.init(SPEC, jax.random.key(0))
    network = checkpoint.Supernet(params, SPEC, piad.uniform(SPEC, steps=4), {"a": 1})
    checkpoint.save_supernet(work / "supernet", network)
    found["a super-network"] = tried(
        work / "supernet",
        lambda: _plain(checkpoint.load_supernet(work / "supernet")),
        places,
    )
    widths = SubnetSpec.uniform(SPEC, 4, 4, 16)
    cut = subnet.extract(params, widths)
    checkpoint.save_subnet(
        work / "subnet", checkpoint.Subnet(cut, SPEC, widths, {"a": 1})
    )
    found["a sub-network"] = tried(
        work / "subnet",
        lambda: _plain(checkpoint.load_subnet(work / "subnet")),
        places,
    )
    return found


def _plain(network: Any) -> Any:
    """With the sizes as leaves, which are no arrays."""
    return network._replace(spec=[network.spec])


def table(found: dict[str, Any]) -> str:
    """The counts as Markdown."""
    lines = [f"| what | files | damage | cases | {' | '.join(KINDS)} |"]
    lines += ["|---" * (4 + len(KINDS)) + "|"]
    for what, part in found.items():
        for how, counts in part["counts"].items():
            cells = [what, part["files"], how, sum(counts), *counts]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measures, prints the table and writes it; 1 if `--resume` missed anything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--places", type=int, default=100)
    parser.add_argument("--out", help="directory for damage.json and damage.md")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # orbax leaves its readers behind when they fail
    with tempfile.TemporaryDirectory() as work:
        found = measure(pathlib.Path(work), args.places)
    text = table(found)
    print(text)
    tables.write(args.out, "damage", {"places": args.places, **found}, text)
    counts = found["a step"]["counts"].values()
    return int(any(other or silent for *_, other, _, silent in counts))


if __name__ == "__main__":
    sys.exit(main())
