"""Where numbers stopped being finite: which parameters, which gradients, which examples."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_skd.run.objective import Array

_SHOWN = 3


def squares(tree: Any) -> Array:
    """Sum of squares of every leaf, float32 [leaves], in the order of `jax.tree`.

    A leaf that holds a number that is not finite, or whose squares overflow, gives one
    that is not finite: the norm of a tree and the place of a fault from one pass.
    """
    sums = [jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(tree)]
    return jnp.stack(sums)


def named(finite: Any, tree: Any) -> str:
    """The leaves of a tree that are not finite, in words; "" if all are.

    Args:
      finite: bool [leaves], in the order of `jax.tree`.
      tree: whose paths name them; its leaves are not looked at.
    """
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    wrong = [path for path, good in zip(paths, finite, strict=True) if not good]
    if not wrong:
        return ""
    return f"{_listed(wrong)} ({len(wrong)} of {len(paths)})"


def of_params(params: Any, mesh: Mesh) -> str:
    """As `named`, of parameters on a mesh."""
    found = _finite(NamedSharding(mesh, PartitionSpec()))(params)
    return named(jax.device_get(found), params)


@functools.lru_cache(maxsize=8)
def _finite(place: NamedSharding):
    """A jitted look at every leaf, compiled once for trees of the same shapes."""

    def finite(tree):
        return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])

    return jax.jit(finite, out_shardings=place)


def of_batch(batch: dict[str, np.ndarray]) -> str:
    """Which rows of a host batch hold numbers that are not finite; "" if none do.

    Args:
      batch: arrays [B, ...]; "index", where it is there, names the rows.
    """
    told = []
    for key, values in batch.items():
        values = np.asarray(values)
        if not jnp.issubdtype(values.dtype, jnp.floating):
            continue
        finite = np.isfinite(values.reshape(len(values), -1)).all(1)
        rows = np.flatnonzero(~finite)
        names = np.asarray(batch["index"])[rows] if "index" in batch else rows
        if rows.size:
            noun = "example" if "index" in batch else "row"
            told.append(f"{key} of {noun} {_listed(list(map(str, names.tolist())))}")
    return "; ".join(told)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
