"""Super-networks and sub-networks on disk.

A super-network is a directory of `supernet.json` and `arrays` (orbax); a sub-network
one of `spec.json` and `params.safetensors`, readable without orbax.
"""

import math
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils

from flax_skd.io import checked
from flax_skd.io import directory as folder
from flax_skd.io.extras import require
from flax_skd.method import packing
from flax_skd.method.compensation import Compensation
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import Params

SUPERNET_FILES = ("supernet.json", "arrays")
SUBNET_FILES = ("spec.json", "params.safetensors")
_MOST_INFLATION = 100  # times the files' size; weights hardly compress
_SLACK = 2**24  # bytes: tables of levels, and networks of tests, compress more


class SuperNet(NamedTuple):
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


class SubNet(NamedTuple):
    """A sub-network on its own.

    Attributes:
      params: extracted, of the sizes in `widths`.
      spec: of the full network.
      widths: what was kept of it.
      provenance: where it was cut from, as JSON holds it: parent, level.
    """

    params: Params
    spec: ViTSpec
    widths: SubnetSpec
    provenance: dict[str, Any]


def save_supernet(
    directory: str | os.PathLike, supernet: SuperNet, *, overwrite: bool = False
) -> None:
    """Writes a super-network directory, whole or not at all.

    Args:
      directory: new or empty.
      supernet: its arrays may be sharded, over hosts too.
      overwrite: replace the super-network that is there.

    Raises:
      ValueError: if the directory holds anything and `overwrite` is not given, or
        anything but a super-network; if params or levels do not match the spec.
    """
    spec = supernet.spec
    tree = jax.tree.map(_to_host, {"params": supernet.params})
    tree["dropout_list"] = {
        name: np.asarray(_to_host(table), np.int32)
        for name, table in supernet.dropout_list._asdict().items()
    }
    if supernet.compensation is not None:
        repairs = jax.tree.map(_to_host, supernet.compensation)
        tree["compensation"] = unflatten_dict(packing.pack(repairs), sep="/")
    flat = flatten_dict(tree["params"], sep=".")
    checked.params(flat, spec, SubnetSpec.full(spec), "this super-network")
    checked.levels(tree["dropout_list"], spec, "this super-network")
    facts = {
        "levels": int(tree["dropout_list"]["levels"]),
        "spec": spec.to_dict(),
        "provenance": supernet.provenance,
    }

    def write(fresh: pathlib.Path) -> None:
        folder.write_json(fresh / SUPERNET_FILES[0], "super-network", facts)
        ocp = require("orbax.checkpoint")
        alone = ocp.options.MultiprocessingOptions(
            primary_host=0, active_processes={0} if jax.process_count() > 1 else None
        )
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as saver:
            saver.save(fresh / SUPERNET_FILES[1], args=ocp.args.PyTreeSave(tree))

    folder.write_whole(directory, write, files=SUPERNET_FILES, overwrite=overwrite)


def load_supernet(directory: str | os.PathLike) -> SuperNet:
    """Reads a super-network directory, on any machine and mesh.

    Args:
      directory: as `save_supernet` wrote it.

    Returns:
      A `SuperNet` of numpy arrays.

    Raises:
      ValueError: if the directory is not a super-network, was edited or is damaged;
        the message names the file and everything that is wrong with the arrays.
    """
    path = folder.existing(directory, SUPERNET_FILES, "super-network")
    facts = path / SUPERNET_FILES[0]
    fields = folder.read_json(facts, "super-network", {"levels", "spec", "provenance"})
    spec = folder.parse(facts, ViTSpec.from_dict, fields["spec"])
    arrays = path / SUPERNET_FILES[1]
    tree = _read_arrays(arrays)
    tree = tree if isinstance(tree, dict) else {}
    groups = {name for name, group in tree.items() if isinstance(group, dict)}
    if groups != set(tree) or groups - {"compensation"} != {"params", "dropout_list"}:
        raise ValueError(f"{arrays} holds {sorted(tree)}, not params and dropout_list.")
    levels = checked.levels(tree["dropout_list"], spec, str(arrays))
    if fields["levels"] != int(levels.levels):
        raise ValueError(
            f"{facts} says {fields['levels']!r} levels, {arrays} holds "
            f"{int(levels.levels)}: one of them was edited."
        )
    flat = flatten_dict(tree["params"], sep=".")
    checked.params(flat, spec, SubnetSpec.full(spec), str(arrays))
    repairs = None
    if "compensation" in tree:
        packed = flatten_dict(tree["compensation"], sep="/")
        repairs = folder.parse(arrays, lambda x: checked.repairs(x, spec), packed)
    return SuperNet(tree["params"], spec, levels, fields["provenance"], repairs)


def save_subnet(
    directory: str | os.PathLike, network: SubNet, *, overwrite: bool = False
) -> None:
    """Writes a sub-network directory, whole or not at all.

    The keys of `params.safetensors` are the params' paths joined by dots.

    Args:
      directory: new or empty.
      network: its arrays may be sharded, over hosts too.
      overwrite: replace the sub-network that is there.

    Raises:
      ValueError: if the directory holds anything and `overwrite` is not given, or
        anything but a sub-network; if params do not match the spec and widths.
    """
    spec, widths = network.spec, network.widths.check(network.spec)
    params = jax.tree.map(_to_host, network.params)
    params = flatten_dict(params, sep=".")
    checked.params(params, spec, widths, "this sub-network")
    facts = {
        "spec": spec.to_dict(),
        "widths": widths._asdict(),
        "macs": checked.macs_of(spec, widths),
        "provenance": network.provenance,
    }

    def write(fresh: pathlib.Path) -> None:
        folder.write_json(fresh / SUBNET_FILES[0], "sub-network", facts)
        flat = {k: np.ascontiguousarray(v) for k, v in params.items()}
        # Not save_file, which lets nobody else read what it wrote.
        content = require("safetensors.numpy").save(flat)
        (fresh / SUBNET_FILES[1]).write_bytes(content)

    folder.write_whole(directory, write, files=SUBNET_FILES, overwrite=overwrite)


def load_subnet(directory: str | os.PathLike) -> SubNet:
    """Reads a sub-network directory; needs safetensors, not orbax.

    Args:
      directory: as `save_subnet` wrote it.

    Returns:
      A `SubNet` of numpy arrays.

    Raises:
      ValueError: if the directory is not a sub-network, was edited or is damaged;
        the message names the file and everything that is wrong with the arrays.
    """
    path = folder.existing(directory, SUBNET_FILES, "sub-network")
    facts, arrays = (path / name for name in SUBNET_FILES)
    fields = folder.read_json(
        facts, "sub-network", {"spec", "widths", "macs", "provenance"}
    )
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
    reader = require("safetensors.numpy")
    try:
        flat = reader.load_file(arrays)
    except Exception as error:  # the format's own error type is not a ValueError
        raise ValueError(
            f"{arrays} cannot be read ({error}): it is cut short or damaged. Copy it "
            "again, or save the sub-network again."
        ) from error
    checked.params(flat, spec, widths, str(arrays))
    return SubNet(unflatten_dict(flat, sep="."), spec, widths, fields["provenance"])


def _to_host(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def _read_arrays(path: pathlib.Path) -> dict[str, Any]:
    """All arrays of an orbax directory as numpy, whatever mesh wrote them."""
    ocp = require("orbax.checkpoint")
    held = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(path).item_metadata.tree
            _check_sizes(tree, _MOST_INFLATION * held + _SLACK)
            as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
            args = jax.tree.map(lambda _: as_numpy, tree)
            return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=args))
    except Exception as error:  # orbax and tensorstore raise many types
        raise ValueError(
            f"{path} cannot be read ({error}): it is incomplete or damaged. Copy it "
            "again, or save the super-network again."
        ) from error


def _check_sizes(tree: Any, most: int) -> None:
    """Raises ValueError unless arrays say they take at most so many bytes."""
    total = sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )
    if total > most:
        raise ValueError(f"it unpacks to {total} bytes, at most {most} are read")
