"""A profile as tables to print and a figure to look at."""

from typing import Any

from flax_skd.method import macs
from flax_skd.method.spec import SubnetSpec
from flax_skd.run import report

CLOSE = 0.10  # a prediction further off than this is marked
MULTIPLES = (4, 8, 16)
_USES = {"fit": "fit", "anchor": "fit, anchor", "check": "check, not in the fit"}
Rows = list[dict[str, Any]]


def table(profile: Any) -> str:
    """Markdown: predicted against measured by batch size, then times by width."""
    parts = [
        f"{profile.device}, {profile.dtype}. Medians (quartiles) over rounds; the full "
        + "network's time is of the same round."
    ]
    for batch_size in profile.latency:
        rows = [r for r in profile.measured if r["batch_size"] == batch_size]
        parts.append(_predictions(rows, batch_size, profile.spec))
        if any(r["use"] == "stairs" for r in rows):
            parts.append(_stairs(rows))
    return "\n\n".join(parts)


def error(row: dict[str, Any]) -> float:
    """Predicted over measured seconds, less 1."""
    return row["predicted"] / row["seconds"] - 1


def _predictions(rows: Rows, batch_size: int, spec: Any) -> str:
    lines = [
        f"Batch {batch_size}:\n",
        "| sub-network | MACs | time over full | ms | predicted ms | error % "
        + "| used for | compile s |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        if row["use"] in _USES:
            share = macs.macs(spec, SubnetSpec(**row["widths"])) / macs.macs(spec)
            mark = " **over 10**" if abs(error(row)) > CLOSE else ""
            lines.append(
                f"| {row['name']} | {100 * share:.0f} % | {row['ratio']:.3f} "
                f"({row['low']:.3f} to {row['high']:.3f}) | {1e3 * row['seconds']:.4g} "
                f"| {1e3 * row['predicted']:.4g} | {100 * error(row):+.1f}{mark} "
                f"| {_USES[row['use']]} | {row['compile_seconds']:.1f} |"
            )
    return "\n".join([*lines, "", verdict(rows)])


def verdict(rows: Rows) -> str:
    """One sentence on the levels that the fit has not seen."""
    checks = [row for row in rows if row["use"] == "check"]
    if not checks:
        return "No level of a list was left to check the fit with."
    worst = max(checks, key=lambda row: abs(error(row)))
    far = sum(abs(error(row)) > CLOSE for row in checks)
    mean = sum(abs(error(row)) for row in checks) / len(checks)
    return (
        f"Levels not used for the fit: off by {100 * mean:.1f} % in the mean, at most "
        f"{100 * abs(error(worst)):.1f} % ({worst['name']}); {far} of {len(checks)} by "
        f"more than {100 * CLOSE:.0f} %."
    )


def stairs_of(rows: Rows) -> dict[str, dict[int, float]]:
    """Branch -> kept dims -> time over the full network's."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["use"] == "stairs":
            branch, _, width = row["name"].partition(" ")
            found.setdefault(branch, {})[int(width)] = row["ratio"]
    return found


def _stairs(rows: Rows) -> str:
    """What rounding a width up to a multiple does to the time of the whole network."""
    lines = [
        "Widths of one branch in every block, the other full. Where the next multiple "
        + "takes no more, rounding up to it (`attn_lane`, `mlp_lane`) keeps more dims "
        + "for nothing:\n",
        "| branch | dims | time over full | "
        + " | ".join(f"at next multiple of {m}" for m in MULTIPLES)
        + " |",
        "|" + "---|" * (3 + len(MULTIPLES)),
    ]
    for branch, ratios in stairs_of(rows).items():
        for width, ratio in sorted(ratios.items()):
            cells = [
                f"{there:.3f} ({100 * (there / ratio - 1):+.0f} %)"
                if (there := ratios.get(-(-width // m) * m)) and width % m
                else ""
                for m in MULTIPLES
            ]
            lines.append(f"| {branch} | {width} | {ratio:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(profile: Any):
    """Predicted against measured, a panel a batch size; then time by width.

    Returns:
      A matplotlib figure, made without a screen.
    """
    stairs = stairs_of(profile.measured)
    count = len(profile.latency) + len(stairs)
    fig, axes = report.panels(count, (3.8 * count, 3.8))
    for axis, batch_size in zip(axes, profile.latency):
        _scatter(axis, [r for r in profile.measured if r["batch_size"] == batch_size])
        axis.set_title(f"batch {batch_size}", fontsize=10)
    for axis, (branch, ratios) in zip(axes[len(profile.latency) :], stairs.items()):
        widths = sorted(ratios)
        axis.plot(widths, [ratios[w] for w in widths], marker="o", markersize=4)
        axis.set_title(f"{branch}, the other branch full", fontsize=10)
        axis.set_xlabel("kept dims in every block")
        axis.set_ylabel("time over the full network's")
    fig.suptitle(f"{profile.device}, {profile.dtype}", fontsize=11)
    return fig


def _scatter(axis, rows: Rows) -> None:
    ends = (0.0, 1.05e3 * max(row["seconds"] for row in rows))
    axis.plot(ends, ends, color="grey", linewidth=0.8)
    axis.fill_between(
        ends,
        [(1 - CLOSE) * x for x in ends],
        [(1 + CLOSE) * x for x in ends],
        color="grey",
        alpha=0.15,
        linewidth=0,
        label="within 10 %",
    )
    for use, label, marker in (
        ("fit", "fitted", "o"),
        ("anchor", "levels, fitted", "^"),
        ("check", "levels, not fitted", "s"),
    ):
        mine = [row for row in rows if row["use"] == use]
        axis.plot(
            [1e3 * row["seconds"] for row in mine],
            [1e3 * row["predicted"] for row in mine],
            marker,
            markersize=4,
            label=label,
        )
    axis.set_xlabel("measured, ms a batch")
    axis.set_ylabel("predicted, ms a batch")
    axis.legend(frameon=False, fontsize=8)
