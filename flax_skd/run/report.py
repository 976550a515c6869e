"""Rows of a sweep as JSON, CSV, a table to print and a figure to look at."""

import csv
import json
import pathlib
from typing import Any, NamedTuple

from flax_skd.io.extras import require
from flax_skd.method import macs
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.run.evaluate import COLUMNS

Rows = list[dict[str, Any]]

_HEADINGS = {
    "cut": "cut",
    "kept": "kept",
    "criterion": "criterion",
    "macs": "MACs (full count)",
    "macs_paper": "MACs (paper's)",
    "params": "parameters",
    "top1": "top-1 %",
    "top5": "top-5 %",
    "kl": "KL",
    "agreement": "agrees %",
}


def _cell(name: str, value: Any) -> str:
    if name in ("macs", "macs_paper", "params"):
        return macs.readable(value)
    if name in ("top1", "top5", "agreement"):
        return f"{value:.1f}"
    return f"{value:z.3f}" if isinstance(value, float) else str(value)  # no -0.000


def table(rows: Rows) -> str:
    """The rows as an aligned Markdown table."""
    lines = [list(_HEADINGS.values())]
    lines += [[_cell(k, r[k]) for k in _HEADINGS] for r in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * w for w in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |"
        for line in lines
    )


def pivot(rows: Rows) -> str:
    """Top-1, one line a cut and share, one column a criterion; Markdown."""
    criteria = list(dict.fromkeys(r["criterion"] for r in rows))
    cells: dict[tuple[str, float], dict[str, str]] = {}
    for r in rows:
        found = cells.setdefault((r["cut"], r["kept"]), {})
        found[r["criterion"]] = _cell("top1", r["top1"])
    lines = ["| cut | kept | " + " | ".join(criteria) + " |"]
    lines.append("|" + "---|" * (len(criteria) + 2))
    # Cuts as they came, the whole network first and then smaller and smaller.
    cuts = list(dict.fromkeys(cut for cut, _ in cells))
    order = sorted(cells, key=lambda key: (cuts.index(key[0]), -key[1]))
    for (cut, kept), found in ((key, cells[key]) for key in order):
        values = " | ".join(found.get(c, "") for c in criteria)
        lines.append(f"| {cut} | {kept:g} | {values} |")
    return "\n".join(lines)


def read(path: str | pathlib.Path) -> Rows:
    """Rows of a `sweep.json`.

    Raises:
      ValueError: if the file is not one; the message names it.
    """
    try:
        rows = json.loads(pathlib.Path(path).read_text())
        if all(set(row) == set(COLUMNS) for row in rows):
            return rows
    except (ValueError, TypeError):
        pass
    raise ValueError(
        f"{path} is not a list of sweep rows with the keys {', '.join(COLUMNS)}: "
        "remove it, or sweep with --overwrite."
    )


def write(directory: str | pathlib.Path, rows: Rows, *, title: str) -> list[str]:
    """Writes `sweep.json`, `sweep.csv` and `sweep.png`; returns their paths."""
    directory = pathlib.Path(directory)
    paths = [directory / f"sweep.{kind}" for kind in ("json", "csv", "png")]
    lines = ",\n".join(json.dumps(row) for row in rows)
    paths[0].write_text(f"[\n{lines}\n]\n")
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    figure(rows, title=title).savefig(paths[2], dpi=150)
    return [str(p) for p in paths]


class Axis(NamedTuple):
    """What sizes are drawn along.

    Attributes:
      key: of a row.
      label: what it is, and its unit.
      unit: what a row's number is divided by.
    """

    key: str
    label: str
    unit: float


def panels(count: int, size: tuple[float, float], *, sharey: bool = False):
    """A matplotlib figure, made without a screen, and its panels side by side.

    Args:
      count: of the panels.
      size: of the figure, in inches.
      sharey: whether panels have one vertical axis.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    fig = Figure(figsize=size, layout="constrained")
    axes = list(fig.subplots(1, count, sharey=sharey, squeeze=False)[0])
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return fig, axes


def figure(rows: Rows, *, title: str, along: Axis | None = None):
    """Accuracy against size, one panel a cut and one line a criterion.

    Args:
      rows: of a sweep.
      title: of the figure.
      along: which size; MACs unless told otherwise.

    Returns:
      A matplotlib figure, made without a screen.
    """
    cuts = list(dict.fromkeys(r["cut"] for r in rows if r["kept"] < 1)) or ["all"]
    size = max(5.2, 3.6 * len(cuts)), 4.2
    fig, axes = panels(len(cuts), size, sharey=True)
    criteria = list(dict.fromkeys(r["criterion"] for r in rows))
    if along is None:
        unit, many = _unit(max(r["macs"] for r in rows))
        along = Axis("macs", f"{unit} an image (full count)", many)
    for axis, cut in zip(axes, cuts):
        for i, name in enumerate(criteria):
            mine = [r for r in rows if r["criterion"] == name]
            points = [r for r in mine if r["cut"] == cut or r["kept"] == 1]
            _line(axis, points, name, along, first=i == 0)
        axis.set_title(_panel_title(cut), fontsize=10)
        axis.set_xlabel(along.label)
    axes[0].set_ylabel("top-1 accuracy, %")
    axes[-1].legend(frameon=False, fontsize=8, loc="lower right")
    fig.suptitle(title, fontsize=11)
    return fig


def list_figure(dropout_list: DropoutList, spec: ViTSpec, *, title: str):
    """Which block keeps what, level by level: a heat map for each kind of width.

    Args:
      dropout_list: the levels.
      spec: the full network.
      title: of the figure.

    Returns:
      A matplotlib figure, made without a screen.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    rows = dropout_list.all_widths(spec)
    full = SubnetSpec.full(spec)
    names = {"qk_dim": "queries and keys", "vo_dim": "values and out", "mlp_dim": "MLP"}
    if all(row.qk_dim == row.vo_dim for row in rows):
        names = {"vo_dim": "attention", "mlp_dim": "MLP"}
    fig = Figure(figsize=(4.2 * len(names) + 0.8, 3.6), layout="constrained")
    axes = fig.subplots(1, len(names), sharey=True, squeeze=False)[0]
    shares = [100 * macs.macs(spec, row) / macs.macs(spec) for row in rows]
    for axis, (name, label) in zip(axes, names.items()):
        kept = [[getattr(row, name)[b] for row in rows] for b in range(spec.depth)]
        size = getattr(full, name)[0]
        picture = axis.imshow(
            [[k / size for k in line] for line in kept],
            aspect="auto",
            vmin=0,
            vmax=1,
            cmap="viridis",
            origin="lower",
            interpolation="nearest",
        )
        ticks = sorted({round(i * (len(rows) - 1) / 4) for i in range(5)})
        axis.set_xticks(ticks, [f"{t}\n{shares[t]:.0f} %" for t in ticks])
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("level, MACs left")
    axes[0].set_yticks(range(spec.depth))
    axes[0].set_ylabel("block")
    fig.colorbar(picture, ax=list(axes), label="share kept")
    fig.suptitle(title, fontsize=11)
    return fig


def _line(axis, points: Rows, name: str, along: Axis, *, first: bool):
    points = sorted(points, key=lambda r: r[along.key])
    axis.plot(
        [r[along.key] / along.unit for r in points],
        [r["top1"] for r in points],
        marker="o",
        markersize=4,
        linewidth=2.2 if first else 1.3,
        zorder=3 if first else 2,
        label=name,
    )


def _unit(most: int) -> tuple[str, int]:
    return ("GMACs", 10**9) if most >= 10**9 else ("MMACs", 10**6)


def _panel_title(cut: str) -> str:
    return {
        "all": "all branches cut",
        "attention": "attention cut",
        "qk": "queries and keys cut",
        "vo": "values and out cut",
        "mlp": "MLP cut",
    }[cut]
