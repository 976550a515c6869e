"""The export command: sub-networks in the formats of other programs, with an index."""

import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax_skd.io import checked, checkpoint, model_card
from flax_skd.io import directory as folder
from flax_skd.io.checkpoint import Subnet, Supernet
from flax_skd.io.formats import folding, onnx, stablehlo, writers
from flax_skd.io.formats.writers import Format
from flax_skd.method import macs
from flax_skd.run import accuracies, commands, export_index

_LOG = logging.getLogger(__name__)
_SUM = "supernet_sha256"  # in the provenance of what is cut from a super-network


class Chosen(NamedTuple):
    """One sub-network to export.

    Attributes:
      folder: its name under the target.
      budget: the share asked for, or None for a sub-network directory.
      network: itself, in float32.
      accuracy: what a sweep measured, or None.
    """

    folder: str
    budget: float | None
    network: Subnet
    accuracy: dict[str, Any] | None


def export(
    *,
    workdir: str,
    out: str,
    formats: str,
    budgets: str,
    overwrite: bool,
    options: Mapping[str, Any],
    measured: str = "",
    licence: str = "",
) -> str:
    """Writes a folder a budget, each with a folder a format and a card, and an index.

    Args:
      workdir: a super-network or sub-network directory.
      out: the directory to write, whole or not at all.
      formats: names out of `writers.FORMATS`, between commas.
      budgets: shares of the full network's MACs, between commas; of a super-network.
      overwrite: replace what an earlier export left.
      options: `platforms` (of jax_export) and `opset` (of onnx).
      measured: a `sweep.json` to take accuracies from, or empty.
      licence: of the source weights, for the cards.

    Returns:
      The table to print, and what is left to do for ONNX.

    Raises:
      ValueError: for unknown formats, budgets, options, an empty network, a sweep of
        another network, or a target that may not be written.
      ImportError: if a format's package is missing; it names the pip install.
    """
    wanted = writers.named(commands.listed(formats))
    stablehlo.check_platforms(options["platforms"])
    onnx.check_opset(options["opset"])
    target = folder.local(out)
    networks = chosen(workdir, budgets, measured)
    files = export_index.written_before(target) or export_index.FILES
    folder.check_target(target, files, overwrite)
    export_index.check_alone(target)
    wanted, later = _written_here(wanted)
    todo = _onnx_commands(target, networks, options["opset"]) if later else []
    rows: export_index.Rows = []

    def fill(fresh: pathlib.Path) -> None:
        for one in networks:
            fields = _write_one(fresh, one, wanted, options=options, licence=licence)
            rows.extend(_row(one, name, fields) for name in wanted)
        to_come = [f"{c.folder}/onnx/{n}" for c in networks for n in onnx.FILES]
        export_index.write(fresh, rows, todo=todo, later=to_come if later else [])

    folder.write_whole(target, fill, files=files, overwrite=overwrite)
    done = f"{export_index.table(rows)}\n\nwrote {target}/index.md and what it lists"
    return f"{done}\n\n{export_index.left_to_do(todo)}" if todo else done


def _written_here(wanted: dict[str, Format]) -> tuple[dict[str, Format], bool]:
    """Formats this environment can write, and whether ONNX is left for another."""
    if "onnx" not in wanted or onnx.installed():
        return wanted, False
    # The other environment starts from a sub-network directory.
    rest = {name: form for name, form in wanted.items() if name != "onnx"}
    return {"safetensors": writers.FORMATS["safetensors"]} | rest, True


def _onnx_commands(target: pathlib.Path, networks: list[Chosen], opset: int):
    places = [target / one.folder for one in networks]
    return onnx.environment_commands() + [
        onnx.command(p / "safetensors", p / "onnx", opset=opset) for p in places
    ]


def chosen(workdir: str, budgets: str, measured: str) -> list[Chosen]:
    """The networks that budgets ask for, largest level within each."""
    path = folder.local(workdir)
    if (path / checkpoint.SUBNET_FILES[0]).is_file():
        if budgets:
            raise ValueError(
                f"{workdir} is one sub-network: budgets choose among those of a "
                "super-network. Leave --budgets away."
            )
        small = checkpoint.load_subnet(path)
        folding.check_kept(small.widths)
        facts = small.provenance
        accuracy_of = _accuracies(
            measured,
            facts.get("supernet", {}),
            supernet_sum=facts.get(_SUM),
            source=path / checkpoint.SUBNET_FILES[0],
        )
        return [Chosen("subnet", None, _float32(small), accuracy_of(small))]
    shares = _shares(budgets or "0.25,0.5,0.75,1.0")
    supernet = checkpoint.load_supernet(path)
    known = {"parent": path.name, _SUM: checkpoint.supernet_sum(path)}
    accuracy_of = _accuracies(
        measured,
        supernet.provenance,
        supernet_sum=known[_SUM],
        source=path / checkpoint.SUPERNET_FILES[0],
    )
    networks = [_within(supernet, known, share) for share in shares]
    return [one._replace(accuracy=accuracy_of(one.network)) for one in networks]


def _within(supernet: Supernet, known: dict[str, Any], share: float) -> Chosen:
    small, level = commands.subnet_within(supernet, cost=macs.macs, limit=share)
    folding.check_kept(small.widths)
    facts = {**known, "level": level, "supernet": supernet.provenance}
    small = _float32(small._replace(provenance=facts))
    return Chosen(f"budget_{share:g}", share, small, None)


def _accuracies(
    measured: str,
    facts: Mapping[str, Any],
    *,
    supernet_sum: str | None,
    source: pathlib.Path,
):
    """Function of a sub-network -> what a sweep of its super-network says, or None."""
    if not measured:
        return lambda network: None
    name = accuracies.name_of(facts)
    found = accuracies.read(measured)
    accuracies.check_same(found, name=name, supernet_sum=supernet_sum, source=source)
    return lambda network: accuracies.accuracy(found, network, name=name)


def _float32(network: Subnet) -> Subnet:
    return network._replace(params=commands.in_float32(network.params))


def _shares(budgets: str) -> list[float]:
    shares = commands.shares("budgets", budgets)
    wrong = [share for share in shares if not 0 < share <= 1]
    if wrong or not shares:
        raise ValueError(
            f"budgets = {budgets!r}: shares of the full network's MACs are above 0 and "
            f"at most 1; {wrong or 'none'} given."
        )
    return list(dict.fromkeys(shares))


def _write_one(
    fresh: pathlib.Path,
    one: Chosen,
    wanted: dict[str, Format],
    *,
    options: Mapping[str, Any],
    licence: str,
) -> dict[str, Any]:
    """Writes the formats and the card of one network; returns the card's fields."""
    spec, widths = one.network.spec, one.network.widths
    here, exports = fresh / one.folder, {}
    for name, form in wanted.items():
        given = {key: options[key] for key in form.options}
        form.write(here / name, one.network, **given)
        kept = folding.equal_heads(widths) if form.equal_heads else widths
        size = sum(p.stat().st_size for p in (here / name).iterdir())
        exports[name] = {"bytes": size, "macs": checked.macs_of(spec, kept)}
        _LOG.info("%s/%s: %s bytes", one.folder, name, f"{size:,}")
    fields = model_card.card(
        one.network, exports=exports, accuracy=one.accuracy, licence=licence
    )
    model_card.write(here, fields)
    return fields


def _row(one: Chosen, name: str, card: dict[str, Any]) -> dict[str, Any]:
    facts = card["exports"][name]
    return {
        "folder": f"{one.folder}/{name}",
        "budget": one.budget,
        "level": one.network.provenance.get("level"),
        "format": name,
        "bytes": facts["bytes"],
        "macs": card["macs"],
        "macs_with_padding": facts["macs"],
        "parameters": card["parameters"],
        "accuracy": card["accuracy"],
    }
