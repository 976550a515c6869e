"""What a super-network or sub-network from a disk must be, checked in full."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from flax_skd.io import tensor_layout
from flax_skd.method import macs, packing, piad
from flax_skd.method.compensation import Compensation
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec, ViTSpec


def macs_of(spec: ViTSpec, widths: SubnetSpec) -> dict[str, int]:
    """MACs by convention, as a sub-network's JSON states them."""
    return {c: macs.macs(spec, widths, convention=c) for c in macs.CONVENTIONS}


def widths(fields: Any) -> SubnetSpec:
    """Widths from JSON; whether they fit a spec is not looked at."""
    names = list(SubnetSpec._fields)
    if not isinstance(fields, dict) or sorted(fields) != sorted(names):
        raise ValueError(f"widths must be {names}, not {fields!r:.200}.")
    for name in names:
        whole = isinstance(fields[name], list)
        if not whole or any(type(w) is not int for w in fields[name]):
            raise ValueError(
                f"{name} = {fields[name]!r:.200}: a list of whole numbers."
            )
    return SubnetSpec(*(tuple(fields[name]) for name in names))


def levels(tables: dict[str, Any], spec: ViTSpec, where: str) -> DropoutList:
    """The tables as a `DropoutList`; the first fault found is an error."""
    names = list(DropoutList._fields)
    if sorted(tables) != sorted(names):
        raise ValueError(
            f"{where}: the dropout list has {sorted(tables)}, not {sorted(names)}."
        )
    found = DropoutList(**{k: np.asarray(t) for k, t in tables.items()})
    kinds = sorted({str(t.dtype) for t in found})
    if not all(np.issubdtype(t.dtype, np.integer) for t in found):
        raise ValueError(f"{where}: the dropout list has {kinds}, not whole numbers.")
    shapes = {np.shape(t) for t in found[:3]}
    rows = max(s[0] if s else 0 for s in shapes)
    last = int(found.levels) if np.shape(found.levels) == () else -1
    if shapes != {(rows, spec.depth)} or not 0 <= last < rows:
        raise ValueError(
            f"{where}: the dropout list has tables of shapes {sorted(shapes)} and "
            f"levels = {found.levels}; for {spec.depth} blocks it needs three of "
            f"[rows, {spec.depth}] and levels from 0 to rows - 1."
        )
    try:
        return piad.from_rows(found.all_widths(spec), spec, max_levels=rows - 1)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def params(
    found: dict[str, Any], spec: ViTSpec, widths: SubnetSpec, where: str
) -> None:
    """Raises one ValueError that lists all missing, surplus and unfit arrays."""
    shapes = tensor_layout.shapes(spec, widths)
    wanted = {path.replace("/", "."): shape for path, shape in shapes.items()}
    wrong = [f"missing {k} {list(s)}" for k, s in wanted.items() if k not in found]
    wrong += [f"surplus {k}" for k in found if k not in wanted]
    for key, shape in wanted.items():
        x = found.get(key)
        if x is None:
            continue
        if x.shape != shape:
            wrong.append(f"{key} has shape {list(x.shape)}, not {list(shape)}")
        elif not jnp.issubdtype(x.dtype, jnp.floating):
            wrong.append(f"{key} has dtype {x.dtype}, not a floating one")
        elif not np.isfinite(x).all():
            wrong.append(f"{key} holds nan or inf")
    if wrong:
        raise ValueError(
            f"{where} does not match its spec ({len(wrong)} faults):\n  "
            + "\n  ".join(wrong)
        )


def repairs(packed: dict[str, Any], spec: ViTSpec) -> Compensation:
    """A compensation from its flat arrays, of the sizes of `spec` and finite."""
    found = packing.unpack(packed, spec)
    for name, x in packed.items():
        if not jnp.issubdtype(x.dtype, jnp.floating) or not np.isfinite(x).all():
            raise ValueError(f"compensation {name} holds what is no finite number.")
    return found
