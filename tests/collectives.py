"""What a compiled program sends between devices, read from the text of its HLO."""

import math
import re
from typing import NamedTuple

import numpy as np

KINDS = (
    *("all-reduce", "all-gather", "reduce-scatter"),
    *("all-to-all", "collective-permute", "collective-broadcast"),
)
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_LINE = re.compile(
    rf"^\s*(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ({'|'.join(KINDS)})(?:-start)?\("
)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One operation that sends arrays between devices.

    Attributes:
      kind: of `KINDS`.
      shapes: of its results, on one device.
      bytes: of its results, on one device.
      groups: sets of device numbers that exchange with each other.
      source: the operation of the program it was made for.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    groups: frozenset[frozenset[int]]
    source: str


def collectives(hlo: str, devices: int) -> list[Collective]:
    """Every operation between devices, in order; once each, within loops too.

    Args:
      hlo: of `compiled.as_text()`.
      devices: of the program.
    """
    found = []
    for line in hlo.splitlines():
        match = _LINE.match(line)
        if not match:
            continue
        _, result, kind = match.groups()
        arrays = _ARRAY.findall(result)
        shapes = tuple(tuple(map(int, filter(None, s.split(",")))) for _, s in arrays)
        size = sum(
            _bytes(name) * math.prod(shape) for (name, _), shape in zip(arrays, shapes)
        )
        source = re.search(r'op_name="([^"]*)"', line)
        found.append(
            Collective(
                kind, shapes, size, _groups(line, devices), source[1] if source else ""
            )
        )
    return found


def _bytes(dtype: str) -> int:
    return (_BITS.get(dtype) or int(re.search(r"\d+", dtype)[0])) // 8


# What devices exchange, in the forms there are: listed, {{0,1},{2,3}}; an iota,
# [groups,size]<=[dims]T(order); axes of a mesh, mesh['a'=2,'b'=4], device_ids=(iota)
# {'b'}; or nothing, for all devices.
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_IOTA_GROUPS = re.compile(rf"replica_groups=\[([\d,]+)\]<={_IOTA}")
_MESH_GROUPS = re.compile(
    rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({_IOTA}\))? \{{(.*?)\}}"
)
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}")


def _groups(line: str, devices: int) -> frozenset[frozenset[int]]:
    rows = np.arange(devices)[None]
    if found := _IOTA_GROUPS.search(line):
        shape, dims, order = found.groups()
        rows = _iota(dims, order).reshape(_ints(shape))
    elif found := _MESH_GROUPS.search(line):
        sizes, dims, order, names = found.groups()
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", sizes))
        moved = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", names)]
        ids = _iota(dims or ",".join(sizes.values()), order)
        ids = ids.reshape([int(size) for size in sizes.values()])
        last = range(-len(moved), 0)
        rows = np.moveaxis(ids, moved, last)
        rows = rows.reshape(-1, math.prod(rows.shape[i] for i in last))
    elif found := _LISTED.search(line):
        rows = [_ints(row) for row in re.findall(r"\{([\d,]+)\}", found[1])]
    return frozenset(frozenset(map(int, row)) for row in rows)


def _iota(dims: str, order: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(order)) if order else ids


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def axes(collective: Collective, mesh) -> tuple[str, ...]:
    """The mesh axes along which devices that exchange differ."""
    places = np.stack(np.unravel_index(np.arange(mesh.size), mesh.devices.shape), 1)
    groups = (places[sorted(group)] for group in collective.groups)
    differ = np.any([(g != g[:1]).any(0) for g in groups], axis=0)
    return tuple(name for name, yes in zip(mesh.axis_names, differ) if yes)


def total(found: list[Collective], kind: str) -> int:
    """Bytes of all results of one kind, on one device."""
    return sum(c.bytes for c in found if c.kind == kind)
