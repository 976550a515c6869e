"""Hostile files, many of them, to every reader: what came of it.

`python benchmarks/fuzz_readers.py --inputs=100000` writes damaged files one after the
other and reads each; `tests/fuzzing.py` says how they are damaged and what a reader is
held to. Input N is the same for the same seed: `--reader=NAME --start=N --inputs=1`
shows one again. The readers run in a process of their own, so that one that dies is
counted too.
"""

import argparse
import collections
import multiprocessing
import os
import pathlib
import platform
import resource
import sys
import tempfile

import tables

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))

MOST = 8 << 30  # bytes a worker may add to its address space
PATIENCE = 3600  # seconds without an answer; the CPU time of an input is bounded apart


def work(pipe, tasks, seed):
    """Sends (reader, index, outcome or text of a fault) for every input of `tasks`.

    Args:
      pipe: to send on; an input is announced with None before it is read.
      tasks: {reader: range of indices}.
      seed: of the damage.
    """
    import fuzzing

    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        found = [*fuzzing.readers(root), fuzzing.older(root)]
        readers = {r.name: r for r in found}
        (root / "box").mkdir()
        with fuzzing.Box(root / "box") as box:
            for name in tasks:
                for files in readers[name].seeds:
                    box.warm(readers[name], files)
            used = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
            most = used * resource.getpagesize() + MOST
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            for name, indices in tasks.items():
                for index in indices:
                    pipe.send((name, index, None))
                    files = fuzzing.damage(readers[name], seed, index)
                    try:
                        found = tuple(box.check(readers[name], files))
                    except fuzzing.Fault as fault:
                        found = str(fault)
                    pipe.send((name, index, found))


def run(tasks, seed):
    """Yields what `work` sends; a worker that died is a fault, and another goes on."""
    context = multiprocessing.get_context("spawn")
    left = {name: list(indices) for name, indices in tasks.items()}
    while any(left.values()):
        ours, theirs = context.Pipe(duplex=False)
        todo = {name: indices for name, indices in left.items() if indices}
        worker = context.Process(target=work, args=(theirs, todo, seed))
        worker.start()
        theirs.close()
        begun = None
        try:
            while any(left.values()):
                if not ours.poll(PATIENCE):
                    raise EOFError
                name, index, found = ours.recv()
                if found is None:
                    begun = name, index
                    continue
                left[name].pop(0)
                yield name, index, found
        except EOFError:
            worker.join(10)
            worker.kill()
            worker.join()
            if begun is None or worker.exitcode == 1:  # an exception of our own
                raise RuntimeError(f"the worker failed after {begun}") from None
            left[begun[0]].pop(0)
            yield *begun, f"the process died with code {worker.exitcode}"
        worker.join()


def summary(name, rows):
    """What came of the inputs of one reader: (index, outcome or text of a fault)."""
    good = [found for _, found in rows if not isinstance(found, str)]
    return {
        "reader": name,
        "inputs": len(rows),
        "outcomes": dict(collections.Counter(found[0] for found in good)),
        "faults": [[index, f] for index, f in rows if isinstance(f, str)],
        "worst_cpu_s": max((f[1] for f in good), default=0.0),
        "worst_mb": max((max(f[2:]) for f in good), default=0) / 1e6,
        "cpu_s": sum(f[1] for f in good),
    }


HEAD = """| reader | inputs | read | refused | faults | worst CPU s | worst MB | inputs/s |
|---|---|---|---|---|---|---|---|"""


def line(row):
    """A reader as Markdown."""
    kinds = {k: n for k, n in row["outcomes"].items() if k != "read"}
    told = ", ".join(f"{n} {k}" for k, n in sorted(kinds.items()))
    return (
        f"| {row['reader']} | {row['inputs']} | {row['outcomes'].get('read', 0)} | "
        f"{told} | {len(row['faults'])} | {row['worst_cpu_s']:.2f} | "
        f"{row['worst_mb']:.1f} | {row['inputs'] / max(row['cpu_s'], 1e-9):.0f} |"
    )


def table(rows, seed):
    """All readers as Markdown, with the sum."""
    total = sum(row["inputs"] for row in rows)
    faults = sum(len(row["faults"]) for row in rows)
    told = (
        f"{total} inputs, seed {seed}, Python {platform.python_version()}: {faults} "
        "faults. MB are above what the process held; inputs/s are of CPU time."
    )
    return "\n".join([told, "", HEAD, *map(line, rows)])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="first input's number")
    parser.add_argument("--reader", default="", help="only this one")
    parser.add_argument("--out", default="", help="folder for JSON and Markdown")
    args = parser.parse_args()
    import fuzzing

    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        found = [*fuzzing.readers(root), fuzzing.older(root)]
        shares = {r.name: r.share for r in found}
    if args.reader:
        shares = {args.reader: shares[args.reader]}
    tasks = {
        name: range(
            args.start,
            args.start + max(1, round(args.inputs * share / sum(shares.values()))),
        )
        for name, share in shares.items()
    }
    found = {name: [] for name in tasks}
    for name, index, what in run(tasks, args.seed):
        found[name].append((index, what))
        if isinstance(what, str):
            print(f"{name} {index}: {what}", flush=True)
        if len(found[name]) == len(tasks[name]):
            print(line(summary(name, found[name])), flush=True)
    rows = [summary(name, inputs) for name, inputs in found.items()]
    text = table(rows, args.seed)
    print(text)
    tables.write(args.out, "fuzz_readers", rows, text)
    return 1 if any(row["faults"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
