"""Super-networks and sub-networks on disk.

A super-network is a directory of `supernet.json` and `arrays.safetensors`; a sub-network
one of `spec.json` and `params.safetensors`. The JSON has the size and a sum of the other
file. Earlier versions wrote neither sums nor safetensors for super-networks, but a
folder `arrays`, by orbax, which is still read.
"""

import hashlib
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from flax_skd.io import checked, orbax_arrays, summed_arrays
from flax_skd.io import directory as folder
from flax_skd.method import packing
from flax_skd.method.compensation import Compensation
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import Params

SUPERNET_FILES = ("supernet.json", "arrays.safetensors")
OLDER_SUPERNET_FILES = ("supernet.json", "arrays")
SUBNET_FILES = ("spec.json", "params.safetensors")


class Supernet(NamedTuple):
    """A contracted network and its nested sub-networks.

    Attributes:
      params: of the full network.
      spec: its sizes.
      dropout_list: its levels.
      provenance: what it was made from, as JSON holds it: the source file's sha256,
        config, criterion.
      compensation: what repairs a cut, or None.
    """

    params: Params
    spec: ViTSpec
    dropout_list: DropoutList
    provenance: dict[str, Any]
    compensation: Compensation | None = None


class Subnet(NamedTuple):
    """A sub-network on its own.

    Attributes:
      params: extracted, of the sizes in `widths`.
      spec: of the full network.
      widths: what was kept of it.
      provenance: where it was cut from, as JSON holds it: parent, level, and what was
        done to it since.
    """

    params: Params
    spec: ViTSpec
    widths: SubnetSpec
    provenance: dict[str, Any]


def save_supernet(
    directory: str | os.PathLike, supernet: Supernet, *, overwrite: bool = False
) -> None:
    """Writes a super-network directory, whole or not at all.

    Args:
      directory: new or empty.
      supernet: its arrays may be sharded, over hosts too.
      overwrite: replace the super-network that is there.

    Raises:
      ValueError: if the directory holds anything and `overwrite` is not given, or
        anything but a super-network; if params or levels do not match the spec,
        the provenance is not plain JSON, or the place is read-only.
    """
    spec = supernet.spec
    params = _flat(supernet.params)
    checked.params(params, spec, SubnetSpec.full(spec), "this super-network")
    levels = {
        name: np.asarray(_to_host(table), np.int32)
        for name, table in supernet.dropout_list._asdict().items()
    }
    checked.levels(levels, spec, "this super-network")
    arrays = _under("params", params) | _under("dropout_list", levels)
    if supernet.compensation is not None:
        repairs = jax.tree.map(_to_host, supernet.compensation)
        arrays |= _under("compensation", packing.pack(repairs))
    facts = {
        "levels": int(levels["levels"]),
        "spec": spec.to_dict(),
        "provenance": supernet.provenance,
    }

    def write(fresh: pathlib.Path) -> None:
        sums = summed_arrays.write(fresh / SUPERNET_FILES[1], arrays)
        fields = facts | {"files": sums}
        folder.write_json(fresh / SUPERNET_FILES[0], "super-network", fields)

    folder.write_whole(
        directory,
        write,
        files=SUPERNET_FILES,
        older=OLDER_SUPERNET_FILES,
        overwrite=overwrite,
    )


def load_supernet(directory: str | os.PathLike) -> Supernet:
    """Reads a super-network directory, on any machine and mesh.

    Args:
      directory: as `save_supernet` wrote it.

    Returns:
      A `Supernet` of numpy arrays.

    Raises:
      ValueError: if the directory is not a super-network, was edited or is damaged;
        the message names the file and everything that is wrong with the arrays.
    """
    path = folder.local(directory)
    older = (path / OLDER_SUPERNET_FILES[1]).is_dir()
    files = OLDER_SUPERNET_FILES if older else SUPERNET_FILES
    facts, arrays = (
        folder.existing(path, files, "super-network") / name for name in files
    )
    names = {"levels", "spec", "provenance"}
    fields = folder.read_json(facts, "super-network", names, may_have={"files"})
    spec = folder.parse(facts, ViTSpec.from_dict, fields["spec"])
    if older:
        flat = orbax_arrays.read(arrays)
    else:
        flat = summed_arrays.read(arrays, fields.get("files"), noun="super-network")
    groups = _groups(flat)
    if set(groups) - {"compensation"} != {"params", "dropout_list"}:
        raise ValueError(
            f"{arrays} holds {sorted(groups)}, not params and dropout_list."
        )
    levels = checked.levels(groups["dropout_list"], spec, str(arrays))
    if fields["levels"] != int(levels.levels):
        raise ValueError(
            f"{facts} says {fields['levels']!r} levels, {arrays} holds "
            f"{int(levels.levels)}: one of them was edited."
        )
    params = groups["params"]
    checked.params(params, spec, SubnetSpec.full(spec), str(arrays))
    repairs = None
    if "compensation" in groups:
        packed = groups["compensation"]
        repairs = folder.parse(arrays, lambda x: checked.repairs(x, spec), packed)
    params = unflatten_dict(params, sep=".")
    return Supernet(params, spec, levels, fields["provenance"], repairs)


def supernet_sum(directory: str | os.PathLike) -> str:
    """SHA-256 of what states a super-network's sizes and the sums of its arrays.

    Args:
      directory: as `save_supernet` wrote it.
    """
    return hashlib.sha256(
        (folder.local(directory) / SUPERNET_FILES[0]).read_bytes()
    ).hexdigest()


def save_subnet(
    directory: str | os.PathLike, network: Subnet, *, overwrite: bool = False
) -> None:
    """Writes a sub-network directory, whole or not at all.

    The keys of `params.safetensors` are the params' paths joined by dots.

    Args:
      directory: new or empty.
      network: its arrays may be sharded, over hosts too.
      overwrite: replace the sub-network that is there.

    Raises:
      ValueError: if the directory holds anything and `overwrite` is not given, or
        anything but a sub-network; if params do not match the spec and widths,
        the provenance is not plain JSON, or the place is read-only.
    """
    facts = facts_of(network)
    params = _flat(network.params)
    checked.params(params, network.spec, network.widths, "this sub-network")

    def write(fresh: pathlib.Path) -> None:
        sums = summed_arrays.write(fresh / SUBNET_FILES[1], params)
        fields = facts | {"files": sums}
        folder.write_json(fresh / SUBNET_FILES[0], "sub-network", fields)

    folder.write_whole(directory, write, files=SUBNET_FILES, overwrite=overwrite)


def facts_of(network: Subnet) -> dict[str, Any]:
    """What the JSON of a sub-network says of it, whatever its arrays lie in."""
    widths = SubnetSpec(*network.widths).check(network.spec)
    return {
        "spec": network.spec.to_dict(),
        "widths": widths._asdict(),
        "macs": checked.macs_of(network.spec, widths),
        "provenance": network.provenance,
    }


def load_subnet(directory: str | os.PathLike) -> Subnet:
    """Reads a sub-network directory.

    Args:
      directory: as `save_subnet` wrote it.

    Returns:
      A `Subnet` of numpy arrays.

    Raises:
      ValueError: if the directory is not a sub-network, was edited or is damaged;
        the message names the file and everything that is wrong with the arrays.
    """
    path = folder.existing(directory, SUBNET_FILES, "sub-network")
    facts, arrays = (path / name for name in SUBNET_FILES)
    names = {"spec", "widths", "macs", "provenance"}
    fields = folder.read_json(facts, "sub-network", names, may_have={"files"})
    spec = folder.parse(facts, ViTSpec.from_dict, fields["spec"])
    widths = folder.parse(
        facts, lambda w: checked.widths(w).check(spec), fields["widths"]
    )
    counts = checked.macs_of(spec, widths)
    if fields["macs"] != counts:
        raise ValueError(
            f"{facts} says macs {fields['macs']}, but its spec and widths give {counts}: "
            "the file was edited. Save the sub-network again."
        )
    flat = summed_arrays.read(arrays, fields.get("files"), noun="sub-network")
    checked.params(flat, spec, widths, str(arrays))
    return Subnet(unflatten_dict(flat, sep="."), spec, widths, fields["provenance"])


def _to_host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _flat(params: Params) -> dict[str, np.ndarray]:
    """On the host, by paths joined by dots."""
    return flatten_dict(jax.tree.map(_to_host, params), sep=".")


def _under(group: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{group}.{name}": x for name, x in arrays.items()}


def _groups(flat: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """The inverse of `_under`, of all groups; a name with no dot is one of its own."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    for path, x in flat.items():
        group, dot, name = path.partition(".")
        groups.setdefault(group if dot else f"{group} alone", {})[name] = x
    return groups
