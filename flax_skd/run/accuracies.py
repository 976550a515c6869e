"""Accuracies that a sweep measured, for the cards of an export: of that network alone."""

import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from flax_skd.io.checkpoint import Subnet
from flax_skd.io.directory import parse
from flax_skd.method import macs
from flax_skd.run import report

_LOG = logging.getLogger(__name__)
ASKED = "asked.json"  # beside the rows: which networks they are of
_COLUMNS = ("top1", "top5", "kl", "agreement", "images")


class Sweep(NamedTuple):
    """A sweep as it lies on disk.

    Attributes:
      path: of its `sweep.json`.
      rows: in it.
      sums: `checkpoint.supernet_sum` of its networks by name; empty of sweeps older
        than `asked.json`.
      dtype: that it computed in, as far as `asked.json` says.
    """

    path: pathlib.Path
    rows: report.Rows
    sums: Mapping[str, Any]
    dtype: str = "float32"


def name_of(facts: Mapping[str, Any]) -> str:
    """What the rows of a sweep call a super-network, by its provenance."""
    return facts.get("trained", facts.get("criterion", "as trained"))


def read(path: str) -> Sweep:
    """The rows of a `sweep.json`, and of which networks they are.

    Raises:
      ValueError: if a file is no sweep's; the message names it.
    """
    file = pathlib.Path(path).expanduser()
    found = Sweep(file, report.read(file), {})
    asked = file.with_name(ASKED)
    if asked.is_file():
        fields = parse(asked, lambda text: dict(json.loads(text)), asked.read_bytes())
        sums = parse(asked, dict, fields.get("networks", {}))
        dtype = str(fields.get("dtype", found.dtype))
        found = found._replace(sums=sums, dtype=dtype)
    return found


def check_same(
    found: Sweep,
    *,
    name: str,
    supernet_sum: str | None,
    source: pathlib.Path,
) -> None:
    """Refuses a sweep of another network than the one that is exported.

    Older sweeps and sub-networks do not state their sum. Then there is a warning, and
    rows are still taken by their sizes.

    Args:
      found: the sweep.
      name: of the super-network in its rows.
      supernet_sum: of the super-network exported, or that the sub-network was cut from.
      source: the file that says so.

    Raises:
      ValueError: if the sweep has rows of this name, and they are of other weights.
    """
    asked, then = found.path.with_name(ASKED), found.sums.get(name)
    if not any(row["criterion"] == name for row in found.rows):
        return
    if then is None or supernet_sum is None:
        silent = asked if then is None else source
        _LOG.warning(
            "%s does not say which super-network it is of: accuracies in %s are taken "
            "by name, level and sizes alone.",
            *(silent, found.path),
        )
    elif then != supernet_sum:
        raise ValueError(
            f"{found.path} is of another super-network than {source}, of the same name "
            f"{name!r}: {asked} has the sum {then!s:.12}, this one {supernet_sum:.12}. "
            "Sweep this one, or leave --measured away."
        )


def accuracy(found: Sweep, network: Subnet, *, name: str) -> dict[str, Any] | None:
    """What the sweep measured of a sub-network, or None and a warning that says why.

    An export computes in float32: another `dtype` of the sweep is among the facts.

    Args:
      found: a sweep of the super-network, as `check_same` holds.
      network: a level of it, as it was cut or as it was trained afterwards.
      name: of the super-network in the sweep's rows.
    """
    facts = network.provenance
    if changed := _changed_since(facts):
        _LOG.warning(
            "no accuracy: the sub-network was %s, and %s has its level as it was cut.",
            *(changed, found.path),
        )
        return None
    spec, widths = network.spec, network.widths
    level = facts.get("level")
    counts = macs.macs(spec, widths), macs.param_count(spec, widths)
    wanted = (name, level, *counts)
    for row in found.rows if level is not None else ():
        if tuple(row[k] for k in ("criterion", "level", "macs", "params")) == wanted:
            other = {} if found.dtype == "float32" else {"dtype": found.dtype}
            return {key: row[key] for key in _COLUMNS} | other
    _LOG.warning(
        "no accuracy: %s has no row of %r at level %s with these sizes.",
        *(found.path, name, level),
    )
    return None


def _changed_since(facts: Mapping[str, Any]) -> str:
    """What was done to a sub-network after its cut, by its provenance."""
    if "steps" in facts:
        return f"trained for {facts['steps']} steps"
    fitted = facts.get("recalibrated", {})
    # "stored" is the cut as it was, where nothing that was tried is better.
    return "recalibrated" if fitted.get("chosen", "stored") != "stored" else ""
