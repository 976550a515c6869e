"""The index of an export: rows as JSON, a Markdown table and a figure."""

import pathlib
from typing import Any

from flax_skd.io import directory as folder
from flax_skd.io import model_card
from flax_skd.io.formats import writers
from flax_skd.method import macs
from flax_skd.run import report

FILES = ("index.json", "index.md", "index.png")
SCRIPT = "finish_onnx.sh"  # where something is left to do
Rows = list[dict[str, Any]]
# In the folders of an export, whatever its formats.
_NAMES = {*model_card.FILES, *(n for f in writers.FORMATS.values() for n in f.files)}
_HEADINGS = (
    *("budget", "level", "MACs (full count)", "MACs (paper's)", "parameters"),
    *("top-1 %", "format", "bytes", "MACs of padding"),
)


def written_before(target: pathlib.Path) -> tuple[str, ...]:
    """The top-level names of an earlier export there, by its index; () without one."""
    return tuple(sorted({path.partition("/")[0] for path in _listed(target)}))


def check_alone(target: pathlib.Path) -> None:
    """Raises ValueError, naming them, if files lie among those of an earlier export."""
    listed = _listed(target)
    if not listed:
        return
    paths = [p for p in target.rglob("*") if p.is_symlink() or not p.is_dir()]
    names = [p.relative_to(target).as_posix() for p in paths]
    others = sorted(name for name in names if not _is_ours(name, listed))
    if others:
        raise ValueError(
            f"{target} holds what its export did not write: {', '.join(others)!s:.300}. "
            "Only an export is replaced: move these, or name another directory."
        )


def _listed(target: pathlib.Path) -> set[str]:
    """Paths of all files, or as earlier versions wrote it: of files and whole folders."""
    path = target / FILES[0]
    if not path.is_file():
        return set()
    fields = folder.read_json(path, "export index", {"files", "rows", "commands"})
    return set(folder.parse(path, lambda names: map(str, names), fields["files"]))


def _is_ours(name: str, listed: set[str]) -> bool:
    whole_folder = name.partition("/")[0] in listed
    return name in listed or (whole_folder and pathlib.Path(name).name in _NAMES)


def write(
    directory: pathlib.Path, rows: Rows, *, todo: list[str], later: list[str]
) -> None:
    """Writes `index.json`, `index.md`, `index.png`, and `SCRIPT` if need be.

    Args:
      directory: that holds all else.
      rows: one an exported folder.
      todo: shell commands for what could not be written here.
      later: paths of the files that these will write.
    """
    names = [
        p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()
    ]
    files = sorted({*FILES, *names, *later, *([SCRIPT] if todo else [])})
    facts = {"files": files, "rows": rows, "commands": todo}
    folder.write_json(directory / FILES[0], "export index", facts)
    text = f"# Exported sub-networks\n\n{table(rows)}\n\n![sizes](index.png)\n"
    if todo:
        text += f"\n{left_to_do(todo)}\n"
        script = "\n".join(["#!/bin/sh", "set -e", *todo])
        (directory / SCRIPT).write_text(f"{script}\n", encoding="utf-8")
    (directory / FILES[1]).write_text(text, encoding="utf-8")
    figure(rows).savefig(directory / FILES[2], dpi=150)


def table(rows: Rows) -> str:
    """The rows of an index as a Markdown table."""
    lines = [f"| {' | '.join(_HEADINGS)} |", "|" + "---|" * len(_HEADINGS)]
    for row in rows:
        added = row["macs_with_padding"]["full"] - row["macs"]["full"]
        accuracy = row["accuracy"]
        cells = (
            "" if row["budget"] is None else f"{row['budget']:g}",
            "" if row["level"] is None else row["level"],
            *(macs.readable(row["macs"][c]) for c in macs.CONVENTIONS),
            macs.readable(row["parameters"]),
            f"{accuracy['top1']:.1f}" if accuracy else "",
            f"[{row['format']}]({row['folder']})",
            f"{row['bytes']:,}",
            macs.readable(added),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def figure(rows: Rows):
    """Bytes on disk against MACs, one line a format.

    Returns:
      A matplotlib figure, made without a screen.
    """
    fig, (axis,) = report.panels(1, (5.6, 4.0))
    for name in dict.fromkeys(row["format"] for row in rows):
        mine = [r for r in rows if r["format"] == name]
        mine.sort(key=lambda r: r["macs_with_padding"]["full"])
        x = [r["macs_with_padding"]["full"] / 1e6 for r in mine]
        y = [r["bytes"] / 1e6 for r in mine]
        axis.plot(x, y, marker="o", markersize=4, label=name)
    axis.set_xlabel("MMACs an image (full count, padding included)")
    axis.set_ylabel("MB on disk")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8)
    return fig


def left_to_do(todo: list[str]) -> str:
    """What remains for ONNX, with the commands that do it."""
    return (
        "jax2onnx is not installed here, and its pins clash with a new "
        "orbax-checkpoint. These commands make an environment for it and write the "
        f"ONNX files; `sh {SCRIPT}`, beside the index, runs them, and once more what an "
        "interruption left undone. This index has no rows of them, the cards do "
        "then:\n\n```\n" + "\n".join(todo) + "\n```"
    )
