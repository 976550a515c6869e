"""Closed forms of others, restated for the harness of `closed_forms.py`.

CLOVER: singular vectors of the weights of a head. Variance-based pruning (ICCV 2025):
the hidden units of least variance in the whole network go, their means stay. CORP
(arXiv:2602.05243): hidden units by share of active tokens times energy, a ridge from
kept to cut units; dims of queries and keys by energy, the kept ones corrected for the
cut ones. Ours in words and code, from their papers; what they leave open is said below.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.io.checkpoint import Supernet
from flax_skd.method import balance, contraction, moments, piad
from flax_skd.method.compensation import Compensation, Repair
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT

STEPS = 64  # levels of a rival's list


def _clover(block, statistics, index, rng):
    """Singular vectors of W_q W_k^T and of W_v W_o of every head, no data."""
    del statistics, index, rng
    attn = block["attn"]
    query, key, value = (
        np.asarray(attn[name]["kernel"], np.float64).swapaxes(0, 1)
        for name in ("query", "key", "value")
    )
    out = np.asarray(attn["out"]["kernel"], np.float64)
    grams = [x.swapaxes(1, 2) @ x for x in (query, key, value)]
    right = np.stack([balance.root(gram)[0] for gram in grams[1]])
    left, dual = balance.pair(grams[0], right)
    axes = (left, dual.swapaxes(1, 2), *balance.pair(grams[2], out))
    return tuple(map(jnp.asarray, axes))


CLOVER = contraction.Criterion(_clover, "taylor2")


def _in_order(network: Supernet, units, heads=None) -> Supernet:
    """The network with permuted hidden units, and dims of q and k where given."""
    spec = network.spec
    eye = np.broadcast_to(
        np.eye(spec.head_dim, dtype=np.float32),
        (spec.num_heads,) + (spec.head_dim,) * 2,
    )
    changes = []
    for i, order in enumerate(units):
        qk = eye
        if heads is not None:
            qk = np.stack(
                [np.eye(spec.head_dim, dtype=np.float32)[:, o] for o in heads[i]]
            )
        changes.append(contraction.Basis(qk, qk, eye, eye, np.asarray(order)))
    params = jax.device_get(contraction.inject(network.params, tuple(changes)))
    return network._replace(params=params, compensation=None)


def _hidden_moment(stats, i):
    return stats.branch_moment(i, "mlp", "plain")


def _only_mlp(spec, repairs) -> Compensation:
    """Repairs of the MLP; of attention nothing is cut, so nothing is repaired."""
    none = Repair(jnp.zeros(spec.num_heads * spec.head_dim), None)
    return Compensation((none,) * spec.depth, tuple(repairs))


def variance_pruned(network: Supernet, stats) -> Supernet:
    """Variance-based pruning with its list: one global rank of all hidden units."""
    spec = network.spec
    found = [_hidden_moment(stats, i) for i in range(spec.depth)]
    spread = np.stack([covariance.diagonal() for _, covariance in found])
    units = [np.argsort(-s, kind="stable") for s in spread]
    repairs = [
        Repair(jnp.asarray(mean[order], jnp.float32), None)
        for (mean, _), order in zip(found, units)
    ]
    full, rows = SubnetSpec.full(spec), []
    ranked = np.sort(spread.reshape(-1))
    for step in range(STEPS):
        bar = ranked[min(step * len(ranked) // STEPS, len(ranked) - 1)]
        kept = tuple(int(k) for k in (spread >= bar).sum(1))
        rows.append(full._replace(mlp_dim=kept))
    turned = _in_order(network, units)
    return turned._replace(
        compensation=_only_mlp(spec, repairs), dropout_list=piad.from_rows(rows, spec)
    )


@functools.partial(jax.jit, static_argnums=0)
def _active(model, params, batch):
    found = {}

    def tap(block, name, feature):
        if name == "hidden":
            live = batch["weight"].reshape(-1, 1, 1)
            found[block] = ((feature > 0) * live).sum((0, 1))
        return feature

    model.apply({"params": params}, batch["image"], None, tap)
    return [found[i] for i in range(model.spec.depth)]


def active_share(network: Supernet, batches) -> list[np.ndarray]:
    """Share of tokens at which a hidden unit is positive, [M] a block."""
    model, total, images = ViT(network.spec), None, 0.0
    for batch in batches:
        counts = jax.device_get(_active(model, network.params, batch))
        total = counts if total is None else [a + b for a, b in zip(total, counts)]
        images += float(np.asarray(batch["weight"]).sum())
    return [t / (images * network.spec.num_tokens) for t in total]


class Corp:
    """CORP: a network for every cut, as its correction of q and k is not nested.

    Left open by the paper and chosen here: queries and keys by the product of their
    energies, lambda of the q/k correction 1e-3 of the mean product of eigenvalues. The
    floor of the ridge of hidden units is relative, 1e-3 of their mean variance, where the
    text has an absolute lambda. Keys are centred over the tokens of an image, which
    softmax does not see.
    """

    def __init__(self, network: Supernet, stats, batches):
        spec = network.spec
        tokens = float(stats.images) * spec.num_tokens
        units, repairs, heads, self._grams = [], [], [], []
        for i, active in enumerate(active_share(network, batches)):
            mean, covariance = _hidden_moment(stats, i)
            energy = covariance.diagonal() + np.square(mean)
            order = np.argsort(-active * energy, kind="stable")
            ridge = max(1e-3, _oas(covariance, tokens))
            mean, covariance = moments.permuted((mean, covariance), order)
            factor = moments.factor_of(covariance, ridge, f"block_{i}/mlp")
            repairs.append(
                Repair(*(jnp.asarray(x, jnp.float32) for x in (mean, factor)))
            )
            units.append(order)
            block = stats.branches[i]["plain"]
            grams = [
                np.asarray(g, np.float64) / tokens for g in (block.query, block.key)
            ]
            product = np.prod([np.einsum("hdd->hd", g) for g in grams], axis=0)
            order = np.argsort(-product, axis=1, kind="stable")
            heads.append(order)
            self._grams.append(
                [
                    np.stack([g[np.ix_(o, o)] for g, o in zip(gram, order)])
                    for gram in grams
                ]
            )
        turned = _in_order(network, units, heads)
        full = SubnetSpec.full(spec)
        shares = [1 - step / STEPS for step in range(STEPS)]
        rows = [
            full._replace(
                qk_dim=tuple(max(1, round(s * d)) for d in full.qk_dim),
                mlp_dim=tuple(max(1, round(s * m)) for m in full.mlp_dim),
            )
            for s in shares
        ]
        self.network = turned._replace(
            compensation=_only_mlp(spec, repairs),
            dropout_list=piad.from_rows(rows, spec),
        )

    def at(self, widths: SubnetSpec) -> Supernet:
        """The network whose kept queries and keys are corrected for this cut."""
        new = dict(self.network.params)
        for i, kept in enumerate(widths.qk_dim):
            block = new[f"block_{i}"]
            attn = dict(block["attn"])
            if kept < self.network.spec.head_dim:
                left, right = zip(
                    *(
                        _corrected(query, key, kept)
                        for query, key in zip(*self._grams[i])
                    )
                )
                for name, turn in (("query", left), ("key", right)):
                    attn[name] = turned(attn[name], np.stack(turn))
            new[f"block_{i}"] = {**block, "attn": attn}
        return self.network._replace(params=new)


def _oas(covariance: np.ndarray, tokens: float) -> float:
    """Shrinkage of the oracle approximating estimator (Chen et al., 2010)."""
    size, trace = len(covariance), covariance.trace()
    square = np.square(covariance).sum()
    above = (1 - 2 / size) * square + trace**2
    below = (tokens + 1 - 2 / size) * (square - trace**2 / size)
    return 1.0 if below <= 0 else min(1.0, above / below)


def _corrected(query: np.ndarray, key: np.ndarray, kept: int):
    """(A, B) [r, r], A B^T = I + M with G_q M G_k + lambda M = C_q C_k."""
    cross = query[:kept, kept:] @ key[kept:, :kept]
    (a, u), (b, v) = (np.linalg.eigh(g[:kept, :kept]) for g in (query, key))
    scale = np.maximum(a, 0)[:, None] * np.maximum(b, 0)[None]
    correction = u @ ((u.T @ cross @ v) / (scale + 1e-3 * scale.mean())) @ v.T
    left, singular, right = np.linalg.svd(np.eye(kept) + correction)
    root = np.sqrt(singular)
    return left * root, right.T * root


def turned(linear, turn: np.ndarray):
    """The first r dims of every head times `turn` [H, r, s], zeros beyond s."""
    _, size, kept = turn.shape

    def of(x):
        new = np.zeros(x.shape, np.float32)
        new[..., :kept] = np.einsum("...hr,hrs->...hs", np.asarray(x)[..., :size], turn)
        return new

    return {name: of(x) for name, x in linear.items()}
