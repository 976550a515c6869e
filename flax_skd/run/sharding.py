"""The mesh, and where parameters and batches lie on it."""

import collections
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "model")

# Path pattern -> mesh axes of the array's axes; the first that matches counts, and what
# none matches lies whole on every device: norms, tokens, positions, small biases. Heads
# and hidden units go over `model`, so that a branch needs one sum over it; the width
# goes over `fsdp`, which only saves memory. Moments and averages of an array have its
# path at the end of theirs. Factors of repairs are cut to save memory alone, and
# gathered where a step re-fits by them.
RULES = (
    (r"attn/(query|key|value)/kernel$", PartitionSpec("fsdp", "model", None)),
    (r"attn/(query|key|value)/bias$", PartitionSpec("model", None)),
    (r"attn/out/kernel$", PartitionSpec("model", None, "fsdp")),
    (r"mlp/fc1/kernel$", PartitionSpec("fsdp", "model")),
    (r"mlp/fc1/bias$", PartitionSpec("model")),
    (r"mlp/fc2/kernel$", PartitionSpec("model", "fsdp")),
    (r"patch_embed/kernel$", PartitionSpec(None, None, None, "fsdp")),
    (r"(pre_logits|head|head_dist)/kernel$", PartitionSpec("fsdp", None)),
    (r"compensation/(attn|mlp)/\d+/factor$", PartitionSpec("fsdp", "model")),
)


def mesh(
    shape: Mapping[str, int] | None = None, *, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of named axes.

    Args:
      shape: size of each axis, names from `AXES`; by default all devices on `data`.
        -1 or 0 as the size of `data` takes all devices that the others leave.
      devices: by default all there are, of all processes.

    Raises:
      ValueError: if an axis is unknown, the sizes do not make up the devices, one
        process has more of them than another, or the axis `model` reaches over several
        processes, which have different examples.
    """
    devices = list(devices if devices is not None else jax.devices())
    asked = dict(shape or {"data": -1})
    # `model` last: its devices are neighbours.
    sizes = {name: asked[name] for name in AXES if name in asked}
    if sizes.get("data") in (-1, 0):
        others = math.prod(size for name, size in sizes.items() if name != "data")
        sizes["data"] = len(devices) // max(1, others)
    made = math.prod(sizes.values()) if min(sizes.values(), default=0) > 0 else 0
    if len(sizes) != len(asked) or made != len(devices):
        raise ValueError(
            f"mesh {asked}: the axes are {AXES} and their sizes must multiply to the "
            f"{len(devices)} devices there are."
        )
    mesh = jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),  # the default is Explicit
        devices=devices,
    )
    _check_processes(mesh)
    return mesh


def _check_processes(mesh: Mesh) -> None:
    counts = collections.Counter(d.process_index for d in mesh.devices.flat)
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"devices of each process: {dict(sorted(counts.items()))}. All must have as "
            "many, since each reads as many images: look for a device that is not found."
        )
    if "model" not in mesh.shape:
        return
    rows = mesh.devices.reshape(-1, mesh.shape["model"])
    if any(len({device.process_index for device in row}) > 1 for row in rows):
        raise ValueError(
            f"mesh {dict(mesh.shape)}: the axis 'model' must divide the "
            f"{jax.local_device_count()} devices of a process: choose a smaller one."
        )


def param_sharding(params: Any, mesh: Mesh) -> Any:
    """Where each array of a tree lies by `RULES`: parameters, optimizer state or both.

    Args:
      params: any pytree of arrays; paths are keys joined by `/`.
      mesh: of any axes; those that a rule names and the mesh lacks are left out.

    Returns:
      The tree with a `NamedSharding` in place of each array. An axis that the mesh
      does not divide stays whole.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, axes in RULES:
            if re.search(pattern, name):
                return NamedSharding(mesh, _fitting(axes, np.shape(leaf), mesh))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, params)


def _fitting(axes: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    def fits(axis, size):
        return axis in mesh.shape and size % mesh.shape[axis] == 0

    return PartitionSpec(*(a if fits(a, n) else None for a, n in zip(axes, shape)))


def whole(params: Any, places: Any) -> Any:
    """Parameters gathered along `fsdp`, inside a jitted loss.

    They stay cut along `model`. Said outright, since a compiler left to choose sends
    activations of the whole batch where a kernel would be less. Gradients come back the
    same way, summed and then cut.

    Args:
      params: a tree of arrays.
      places: of them, of `param_sharding`.
    """

    def gather(x, place):
        axes = (None if axis == "fsdp" else axis for axis in place.spec)
        place = NamedSharding(place.mesh, PartitionSpec(*axes))
        return jax.lax.with_sharding_constraint(x, place)

    return jax.tree.map(gather, params, places)


def gathered(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays, each whole on every device of the mesh: any host can read it.

    What is cut is gathered by one program, and waited for: one an array, as `device_put`
    makes them, are in flight at once, and CPU devices of several processes then deadlock.
    """
    leaves, structure = jax.tree.flatten(tree)
    cut = {i: x for i, x in enumerate(leaves) if _is_cut(x, mesh)}
    rest = {i: x for i, x in enumerate(leaves) if i not in cut}
    place = NamedSharding(mesh, PartitionSpec())
    found = jax.device_put(rest, place)
    if cut:
        found |= jax.block_until_ready(_gatherer(place)(cut))
    return structure.unflatten(found[i] for i in range(len(leaves)))


def _is_cut(x: Any, mesh: Mesh) -> bool:
    place = getattr(x, "sharding", None)
    known = isinstance(place, NamedSharding) and place.mesh == mesh
    return known and not place.is_fully_replicated


@functools.lru_cache(maxsize=8)
def _gatherer(place: NamedSharding):
    """A jitted move to this place, compiled once for trees of the same shapes."""
    return jax.jit(lambda x: x, out_shardings=place)


def copy_to(tree: Any, places: Any) -> Any:
    """A copy of a tree on the mesh, which shares no memory with it.

    Args:
      tree: arrays, the same on every host, or already on the mesh.
      places: of `param_sharding`.
    """
    if jax.process_count() == 1:
        there = jax.device_put(tree, places)
    else:
        there = jax.tree.map(_copy_to_hosts, tree, places)
    # The CPU devices of one process may share the memory of what is put on all of
    # them; donating that frees it many times. What a computation returns is its own.
    leaves, tree = jax.tree.flatten(places)
    return _copier(tuple(leaves), tree)(there)


@functools.lru_cache(maxsize=64)
def _copier(leaves: tuple[NamedSharding, ...], tree: Any):
    """A jitted copy to these places, compiled once however often it is asked for."""
    places = jax.tree.unflatten(tree, leaves)
    return jax.jit(lambda x: jax.tree.map(jnp.copy, x), out_shardings=places)


def _copy_to_hosts(x: Any, place: NamedSharding) -> jax.Array:
    # `device_put` places no committed array on devices of other hosts.
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(jnp.copy(x), place)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _copy_to_hosts(jax.random.key_data(x), place)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    local = np.array(x)
    return jax.make_array_from_callback(local.shape, place, local.__getitem__)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples over the axes `data` and `fsdp`; all else whole."""
    return NamedSharding(mesh, PartitionSpec(_batch_axes(mesh)))


def batch_parts(mesh: Mesh) -> int:
    """How many equal parts a batch is cut into; its size is a multiple of this."""
    devices = math.prod(mesh.shape[n] for n in _batch_axes(mesh))
    return math.lcm(devices, jax.process_count())


def _batch_axes(mesh: Mesh) -> tuple[str, ...]:
    return tuple(n for n in ("data", "fsdp") if n in mesh.shape)


def shard_batch(batch: Any, mesh: Mesh, *, parts: int = 1) -> Any:
    """This process's examples as its part of one global batch.

    Args:
      batch: a pytree of numpy arrays [B, ...], B examples of this process.
      mesh: of any axes.
      parts: of the batch, one after the other, that must be shared out evenly too.

    Returns:
      The tree of global arrays [B * processes, ...], sharded by `batch_sharding`.

    Raises:
      ValueError: if the examples cannot be shared out evenly; names the nearest batch
        sizes that can.
    """
    sizes = {np.shape(x)[0] if np.ndim(x) else 0 for x in jax.tree.leaves(batch)}
    if len(sizes) != 1:
        raise ValueError(
            f"the arrays of a batch have {sorted(sizes)} examples: all must have the "
            "same number."
        )
    check_divides(sizes.pop() * jax.process_count(), mesh, parts=parts)
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)),
        batch,
    )


def check_divides(size: int, mesh: Mesh, *, parts: int = 1) -> None:
    """Raises ValueError unless a mesh can share a batch of all processes out evenly.

    Args:
      size: examples of all processes, as the config has it.
      mesh, parts: as of `shard_batch`.
    """
    devices = batch_parts(mesh)
    whole = devices * parts
    if size % whole or not size:
        below = size // whole * whole
        near = [str(n) for n in (below, below + whole) if n]
        cut = f" in {parts} microbatches" if parts > 1 else ""
        raise ValueError(
            f"a batch of {size} does not divide over {devices} devices{cut}: take "
            f"{' or '.join(near)} (--config.data.batch_size)."
        )
