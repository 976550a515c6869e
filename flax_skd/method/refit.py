"""Rows of a cut linear map, re-fitted by least squares: traced or on the host."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

Array = jax.Array
Repair = tuple[Any, Any]  # of `compensation`: mean [n], factor [n, n] or None


def traced(repair: Repair, kernel: Array, bias: Array, width: Array):
    """(W(m), b(m)) in float32, m = `width` rows kept; by masks, so that m may be traced.

    W(m) = mask W + Lc^-T (mask * (Lc^T ((1 - mask) W))); b(m) = b + mean (W - W(m)).

    Columns do not know of each other: on the mesh of the context (`jax.set_mesh`),
    if its axes are automatic, each device re-fits its share of them.

    Args:
      repair: mean [n] and factor Lc [n, n], constants to the gradient.
      kernel: W [n, D], rows in the order of cutting.
      bias: [D].
      width: int32 [].
    """
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape.values())
    automatic = all(kind == AxisType.Auto for kind in mesh.axis_types)
    if repair[1] is None or parts == 1 or not automatic:
        return _traced(repair, kernel, bias, width)
    every, columns = PartitionSpec(), PartitionSpec(None, mesh.axis_names)
    spread = jax.shard_map(
        _traced,
        in_specs=(every, columns, PartitionSpec(mesh.axis_names), every),
        out_specs=(columns, PartitionSpec(mesh.axis_names)),
    )
    kernel, bias = jax.lax.with_sharding_constraint((kernel, bias), every)
    more = -len(bias) % parts
    new = spread(
        repair, jnp.pad(kernel, ((0, 0), (0, more))), jnp.pad(bias, (0, more)), width
    )
    new, bias = jax.lax.with_sharding_constraint(new, every)
    return new[:, : kernel.shape[1]], bias[: kernel.shape[1]]


def _traced(repair: Repair, kernel: Array, bias: Array, width: Array):
    mean, factor = jax.lax.stop_gradient(repair)
    kept = (jnp.arange(len(kernel)) < width).astype(jnp.float32)[:, None]
    new = kept * kernel
    if factor is not None:
        factor = factor.astype(jnp.float32)
        seen = kept * jnp.matmul(factor.T, kernel - new, precision="highest")
        solved = jax.scipy.linalg.solve_triangular(factor, seen, trans=1, lower=True)
        new = new + kept * solved
    lost = jnp.matmul(mean.astype(jnp.float32), kernel - new, precision="highest")
    return new, bias.astype(jnp.float32) + lost


def on_host(repair: Repair, kernel: Any, bias: Any, width: int):
    """As `traced`, in numpy, from the rows and columns that a known cut leaves.

    Lc[:m, :m]^T X = Lc[m:, :m]^T W[m:]; W(m) = W[:m] + X.

    Raises:
      ValueError: if the factor has a zero on its diagonal.
    """
    mean, factor, kernel, bias = (
        None if x is None else np.asarray(x, np.float32)
        for x in (*repair, kernel, bias)
    )
    new = kernel.copy()
    new[width:] = 0
    if factor is not None and 0 < width < len(kernel):
        new[:width] += _predicted(factor, kernel, width)
    return new, bias + mean @ (kernel - new)


def _predicted(factor: np.ndarray, kernel: np.ndarray, width: int) -> np.ndarray:
    """The X of `on_host`, multiplied in the cheaper of two orders."""
    from scipy.linalg.blas import strsm  # jax needs scipy too

    seen, cut = factor[width:, :width].T, kernel[width:]
    few = len(cut) < cut.shape[1]
    right = seen if few else seen @ cut
    # What numpy holds by rows BLAS reads as its transpose. The transposed equation is
    # solved, X^T Lc[:m, :m] = right^T, so that nothing has to be turned around.
    factor = factor[:width, :width].T
    if not factor.diagonal().all():  # BLAS would divide by it and say nothing
        raise ValueError(
            "a repair's factor has a zero on its diagonal, so it is no Cholesky factor: "
            "the super-network is damaged; contract the network again."
        )
    solved = strsm(1.0, factor, right.T, side=1, lower=0, trans_a=1).T
    return solved @ cut if few else solved
