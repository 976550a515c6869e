"""The card of an exported sub-network: what it is, where from, what it costs."""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from flax_skd.io import checked
from flax_skd.io import directory as folder
from flax_skd.io.checkpoint import Subnet
from flax_skd.method import macs
from flax_skd.method.spec import SubnetSpec

FILES = ("card.json", "card.md")
_FIELDS = (
    *("source", "spec", "widths", "macs", "macs_of_full_network", "parameters"),
    *("parameters_of_full_network", "accuracy", "licence_of_source", "exports"),
)
LICENCE_UNKNOWN = (
    "not stated: the licence of the source weights holds for this network too; ask "
    "whoever published them"
)


def card(
    network: Subnet,
    *,
    exports: Mapping[str, Mapping[str, Any]],
    accuracy: Mapping[str, Any] | None = None,
    licence: str = "",
) -> dict[str, Any]:
    """The facts of one exported sub-network.

    Args:
      network: what was exported.
      exports: by format, `bytes` on disk and the `macs` of its widths, by convention.
      accuracy: what was measured, such as `top1` in percent of `images`, or None.
      licence: of the source weights; empty if it was not told.

    Returns:
      Fields as JSON holds them.
    """
    spec, widths = network.spec, network.widths
    fields = {
        "source": network.provenance,
        "spec": spec.to_dict(),
        "widths": widths._asdict(),
        "macs": checked.macs_of(spec, widths),
        "macs_of_full_network": checked.macs_of(spec, SubnetSpec.full(spec)),
        "parameters": macs.param_count(spec, widths),
        "parameters_of_full_network": macs.param_count(spec),
        "accuracy": dict(accuracy) if accuracy else None,
        "licence_of_source": licence or LICENCE_UNKNOWN,
        "exports": {name: dict(facts) for name, facts in exports.items()},
    }
    return folder.as_json(fields, "a model card")


def write(directory: pathlib.Path, fields: dict[str, Any]) -> None:
    """Writes `card.json` and `card.md` into a directory that is being filled."""
    folder.write_json(directory / FILES[0], "model card", fields)
    (directory / FILES[1]).write_text(markdown(fields), encoding="utf-8")


def add_export(
    directory: pathlib.Path, name: str, files: Iterable[pathlib.Path]
) -> None:
    """Adds a format that was written later to the card there, if there is one.

    Args:
      directory: of the card.
      name: of a format that pads nothing.
      files: its files.

    Raises:
      ValueError: if the card was edited; the message names it.
    """
    path = directory / FILES[0]
    if not path.is_file():
        return
    fields = folder.read_json(path, "model card", set(_FIELDS))
    size = sum(file.stat().st_size for file in files)
    exports = fields["exports"] | {name: {"bytes": size, "macs": fields["macs"]}}
    fields = {key: fields[key] for key in _FIELDS} | {"exports": exports}
    with folder.replaced(path) as fresh:
        folder.write_json(fresh, "model card", fields)
    with folder.replaced(directory / FILES[1]) as fresh:
        fresh.write_text(markdown(fields), encoding="utf-8")


def markdown(fields: dict[str, Any]) -> str:
    """A card as a page.

    Args:
      fields: as `card` returns them.
    """
    share = fields["macs"]["full"] / fields["macs_of_full_network"]["full"]
    lines = [
        f"# Vision Transformer sub-network, {100 * share:.0f} % of the MACs",
        "",
        "| | this network | full network |",
        "|---|---|---|",
    ]
    for name, note in (
        ("full", "full count"),
        ("paper", "paper's: no q k^T, no attention times v"),
    ):
        counts = fields["macs"][name], fields["macs_of_full_network"][name]
        lines.append(_row(f"MACs an image ({note})", *map(macs.readable, counts)))
    counts = fields["parameters"], fields["parameters_of_full_network"]
    lines.append(_row("parameters", *(f"{n:,}" for n in counts)))
    lines += ["", f"Accuracy: {_accuracy(fields['accuracy'])}.", ""]
    lines += [f"Licence of the source weights: {fields['licence_of_source']}.", ""]
    return "\n".join([*lines, *_widths(fields), *_exports(fields), *_source(fields)])


def _row(*cells: Any) -> str:
    return f"| {' | '.join(str(c) for c in cells)} |"


def _accuracy(measured: dict[str, Any] | None) -> str:
    if not measured:
        return "not measured"
    return ", ".join(f"{name} {value}" for name, value in measured.items())


def _widths(fields: dict[str, Any]) -> list[str]:
    spec, widths = fields["spec"], fields["widths"]
    lines = ["## Widths", "", "0 is a branch removed with its LayerNorm.", ""]
    lines += [_row("block", *widths), "|" + "---|" * (len(widths) + 1)]
    whole = (spec["head_dim"], spec["head_dim"], spec["mlp_dim"])
    lines.append(_row("full", *whole))
    lines += [_row(i, *row) for i, row in enumerate(zip(*widths.values()))]
    return [*lines, ""]


def _exports(fields: dict[str, Any]) -> list[str]:
    lines = ["## Exports", "", "| format | bytes | MACs (full count) | of it padding |"]
    lines.append("|---|---|---|---|")
    for name, facts in fields["exports"].items():
        count = facts["macs"]["full"]
        added = count - fields["macs"]["full"]
        cells = (f"{facts['bytes']:,}", macs.readable(count), macs.readable(added))
        lines.append(_row(name, *cells))
    return [*lines, ""]


def _source(fields: dict[str, Any]) -> list[str]:
    text = json.dumps(fields["source"], indent=2)
    return ["## Source", "", "```json", text, "```", ""]
