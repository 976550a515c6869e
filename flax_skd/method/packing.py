"""A compensation as it is stored: bytes, dtypes, flat arrays of packed triangles."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flax_skd.method.compensation import Compensation, Repair, inner_units, of_each
from flax_skd.method.spec import ViTSpec


def cast(compensation: Compensation, dtype: Any) -> Compensation:
    """Factors in another dtype, for storage; means and all arithmetic stay float32."""

    def one(repair):
        factor = repair.factor
        return repair._replace(factor=None if factor is None else factor.astype(dtype))

    return of_each(compensation, one)


def size(compensation: Compensation) -> int:
    """Bytes that `pack` of this takes."""
    total = 0
    for repair in (*compensation.attn, *compensation.mlp):
        total += repair.mean.nbytes
        if repair.factor is not None:
            n = len(repair.factor)
            total += n * (n + 1) // 2 * repair.factor.dtype.itemsize
    return total


def pack(compensation: Compensation) -> dict[str, np.ndarray]:
    """Flat arrays to store: `block_3.mlp.mean` [n] and `block_3.mlp.factor`.

    Factors are the rows of the lower triangle, one after the other, [n (n + 1) / 2].
    """
    flat = {}
    for kind, repairs in compensation._asdict().items():
        for i, (mean, factor) in enumerate(repairs):
            flat[f"block_{i}.{kind}.mean"] = np.asarray(mean)
            if factor is not None:
                flat[f"block_{i}.{kind}.factor"] = _packed(factor)
    return flat


def unpack(flat: Mapping[str, Any], spec: ViTSpec) -> Compensation:
    """The inverse of `pack`.

    Raises:
      ValueError: if arrays are missing, not known or not of the spec's sizes; the
        message lists them all.
    """
    sizes, shapes = inner_units(spec), {}
    for i in range(spec.depth):
        for kind, n in sizes.items():
            shapes[f"block_{i}.{kind}.mean"] = (n,)
            shapes[f"block_{i}.{kind}.factor"] = (n * (n + 1) // 2,)
    missing = [name for name in shapes if name.endswith("mean") and name not in flat]
    bad = [k for k, v in flat.items() if shapes.get(k) != np.shape(v)]
    if missing or bad:
        raise ValueError(
            f"not a compensation of this network: {missing} missing, {bad} not known "
            "or of another size."
        )

    def one(block, kind):
        mean, factor = (flat.get(f"{block}.{kind}.{name}") for name in Repair._fields)
        if factor is not None:
            factor = _unpacked(factor, sizes[kind])
        return Repair(np.asarray(mean), factor)

    blocks = [f"block_{i}" for i in range(spec.depth)]
    return Compensation(*(tuple(one(b, kind) for b in blocks) for kind in sizes))


def _packed(factor: Any) -> np.ndarray:
    """The rows of a lower triangle [n, n], one after the other: [n (n + 1) / 2]."""
    return np.asarray(factor)[np.tri(len(factor), dtype=bool)]


def _unpacked(packed: Any, size: int) -> np.ndarray:
    """The inverse of `_packed`, zeros above the diagonal; dtypes stay."""
    factor = np.zeros((size, size), np.asarray(packed).dtype)
    factor[np.tri(size, dtype=bool)] = packed
    return factor
