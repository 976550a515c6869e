"""Sums over batches that lie on many devices: each keeps its own until the end.

Left to the compiler, the devices exchange the whole sums at every batch; kept apart,
once a pass.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

# (sums, batch, what all devices share) -> sums
Add = Callable[[Any, Any, Any], Any]


def place_of(array: Any) -> NamedSharding | None:
    """How the first axis of an array lies on devices; None if each has all of it."""
    sharding = getattr(array, "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))


def count(place: NamedSharding | None) -> int:
    """How many parts of the first axis there are, and so how many sums."""
    if place is None:
        return 1
    names = place.spec[0] if isinstance(place.spec[0], tuple) else (place.spec[0],)
    return math.prod(place.mesh.shape[name] for name in names)


def zeros(like: Any, place: NamedSharding | None) -> Any:
    """Accumulators of zeros like the arrays of `like`, one set a part: [parts, ...]."""

    def made():
        parts = count(place)
        return jax.tree.map(lambda x: jnp.zeros((parts, *x.shape), x.dtype), like)

    return made() if place is None else jax.jit(made, out_shardings=place)()


def apart(add: Add, place: NamedSharding | None) -> Add:
    """`add` as every part does it on its own, to accumulators that `zeros` made."""

    def own(sums, batch, shared):
        sums = add(jax.tree.map(lambda x: x[0], sums), batch, shared)
        return jax.tree.map(lambda x: x[None], sums)

    if place is None:
        return own
    rows, whole = place.spec, PartitionSpec()
    return jax.shard_map(
        own,
        mesh=place.mesh,
        in_specs=(rows, rows, whole),
        out_specs=rows,
        check_vma=False,  # what is shared has no part in the sums' derivative
    )


@jax.jit
def joined(sums: Any) -> Any:
    """The sums of all parts: the one exchange between devices."""
    return jax.tree.map(lambda x: x.sum(0), sums)
