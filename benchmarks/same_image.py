"""Queries and keys for the error that sees both of one image.

Balanced pairs take q and k as drawn apart. The error of scores is sum over images b of
tr(E^T Gq_b E Gk_b), E = I - A B^T of rank r, with Gram matrices of the same image. It has
no closed form; alternating least squares finds a minimum, for every rank anew: not
nested, but what a nested basis could reach at best.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from rival_forms import turned

from flax_skd.io.checkpoint import Supernet
from flax_skd.method import balance
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT

ROUNDS = 10


@functools.partial(jax.jit, static_argnums=0)
def _grams(model, params, images):
    """(Gq, Gk) [L, B, H, d, d]; keys centred over the tokens of an image."""
    found = {"query": {}, "key": {}}

    def tap(block, name, feature):
        if name in found:
            f = feature - feature.mean(2, keepdims=True) * (name == "key")
            found[name][block] = jnp.einsum("bhnd,bhne->bhde", f, f)
        return feature

    model.apply({"params": params}, images, None, tap)
    return tuple(
        jnp.stack([found[name][i] for i in range(model.spec.depth)])
        for name in ("query", "key")
    )


def error(left: np.ndarray, right: np.ndarray, query: np.ndarray, key: np.ndarray):
    """Sum over images of tr(E^T Gq E Gk), E = I - A B^T, one head."""
    lost = np.eye(len(left)) - left @ right.T
    return float(np.einsum("ji,bjk,kl,bli->", lost, query, lost, key, optimize=True))


def alternating(left, query, key, rounds: int = ROUNDS):
    """A, B [d, r] of least `error` from a start A, solved in turn."""

    def solve(fixed, one, other):
        # sum_b other B (A^T one A) = sum_b other one A, for B
        inner = np.einsum("dr,bde,es->brs", fixed, one, fixed, optimize=True)
        size, rank = fixed.shape
        system = np.einsum("brs,bde->dres", inner, other, optimize=True)
        want = np.einsum("bde,bef,fr->dr", other, one, fixed, optimize=True)
        system = system.reshape(size * rank, -1)
        system += 1e-9 * np.trace(system) / len(system) * np.eye(len(system))
        return np.linalg.solve(system, want.reshape(-1)).reshape(size, rank)

    for _ in range(rounds):
        right = solve(left, query, key)
        left = solve(right, key, query)
    return left, solve(left, query, key)


class SameImage:
    """The network for a cut of queries and keys, refitted for that cut."""

    def __init__(self, network: Supernet, batches):
        self.network, model = network, ViT(network.spec)
        parts = [
            jax.device_get(_grams(model, network.params, batch["image"]))
            for batch in batches
        ]
        self._grams = [np.concatenate(side, axis=1) for side in zip(*parts)]

    def at(self, widths: SubnetSpec) -> Supernet:
        """Kernels whose first dims are the pair of this cut, zeros beyond."""
        new, told = dict(self.network.params), []
        for i, kept in enumerate(widths.qk_dim):
            pairs, gains = zip(*(self._pair(i, h, kept) for h in range(self._heads)))
            told += gains
            block = new[f"block_{i}"]
            attn = dict(block["attn"])
            for name, turn in zip(("query", "key"), zip(*pairs)):
                attn[name] = turned(attn[name], np.stack(turn))
            new[f"block_{i}"] = {**block, "attn": attn}
        print(
            f"error of scores over that of balanced pairs, rank {widths.qk_dim[0]}: "
            f"median {np.median(told):.3f}, least {min(told):.3f}",
            flush=True,
        )
        return self.network._replace(params=new, compensation=None)

    @property
    def _heads(self) -> int:
        return self.network.spec.num_heads

    def _pair(self, block: int, head: int, kept: int):
        query, key = (g[block, :, head].astype(np.float64) for g in self._grams)
        root, _ = balance.root(key.sum(0))
        left, dual = balance.pair(query.sum(0)[None], root[None])
        start, right = left[0][:, :kept], dual[0].T[:, :kept]
        fitted = alternating(start, query, key)
        return fitted, error(*fitted, query, key) / error(start, right, query, key)
