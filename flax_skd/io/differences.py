"""What two values do not share, field by field: configs, and shapes of arrays."""

from typing import Any

import jax
import jax.numpy as jnp


def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of a tree's arrays by their path; of a key, that of its data."""

    def shape(x):
        key = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return tuple(jax.random.key_data(x).shape if key else x.shape)

    return {
        jax.tree_util.keystr(path, simple=True, separator="."): shape(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(x, "shape")
    }


def differences(
    saved: Any, now: Any, *, words: tuple[str, str] = ("saved", "now")
) -> list[str]:
    """One line for each field that two JSON values do not share, `words` before each."""
    old, new = _flat(saved), _flat(now)

    def shown(fields, key):
        return repr(fields[key]) if key in fields else "nothing"

    return [
        f"{key}: {words[0]} {shown(old, key)}, {words[1]} {shown(new, key)}"
        for key in sorted(old | new)
        if key not in old or key not in new or old[key] != new[key]
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix or "config": value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
