"""Balanced pairs keep the function and lose what the singular values say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shake
from test_second_moments import SMALL, images, network
from test_statistics import collect

from flax_skd.method import balance, contraction, vit
from flax_skd.method.balance import Balanced
from flax_skd.method.vit import ViT

__all__ = ["images", "network"]  # fixtures
MOMENTS = ("gradient", "plain", "attended")
OPTIONS = {
    "default": Balanced(),
    "plain": Balanced(query="plain", key="plain", mixed="plain"),
    "attended": Balanced(keys="attended"),
    "gradient metric": Balanced(metric="gradient"),
    "uncentred": Balanced(moment="uncentred"),
    "qk alone": Balanced(parts=("qk",)),
    "vo alone": Balanced(parts=("vo",)),
}


@pytest.fixture(scope="module")
def stats(network, images):
    return collect(SMALL, network, images, 8, moments=MOMENTS)


def bases_of(params, stats, options):
    return contraction.bases(
        params, SMALL, stats, criterion=contraction.balanced_criterion(options)
    )


def assert_same_logits(before, after, images):
    a, b = (ViT(SMALL).apply({"params": p}, images["image"]) for p in (before, after))
    np.testing.assert_allclose(b, a, atol=1e-5 * float(jnp.abs(a).max()))


@pytest.mark.parametrize("name", OPTIONS)
def test_every_choice_of_moments_keeps_the_logits(network, images, stats, name):
    changes = bases_of(network, stats, OPTIONS[name])
    assert_same_logits(network, contraction.inject(network, changes), images)
    plain = bases_of(network, stats, Balanced())
    same = [np.allclose(a, b, atol=1e-3) for a, b in zip(changes[0], plain[0])]
    changed = {"default": [], "plain": [0, 1, 2, 3], "attended": [0, 1]}
    changed |= {"qk alone": [2, 3], "vo alone": [0, 1]}
    assert [i for i, s in enumerate(same) if not s] == changed.get(name, [2, 3])


def root(matrix):
    values, vectors = np.linalg.eigh(np.float64(matrix))
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def tail(singular):
    """Sums of squares of what a cut to 0, 1, ... leaves out."""
    return np.append(np.cumsum(np.square(singular[::-1]))[::-1], 0.0)


def factorised_errors(basis, query, key):
    """tr(E^T G_q E G_k) [H, d + 1] at every cut."""
    left, right = np.float64(basis.query), np.float64(basis.key)
    dim = left.shape[-1]
    cut = [
        np.eye(dim) - left[..., :m] @ right[..., :m].swapaxes(1, 2)
        for m in range(dim + 1)
    ]
    errors = [np.einsum("hba,hbc,hcd,had->h", e, query, e, key) for e in cut]
    return np.stack(errors, 1)


@pytest.mark.parametrize("name", ["default", "plain", "attended"])
def test_cut_scores_lose_the_cut_singular_values_and_least(network, stats, name):
    options = OPTIONS[name]
    others = [
        contraction.bases(network, SMALL, stats),
        contraction.bases(network, SMALL, stats, criterion="random"),
    ]
    for i, basis in enumerate(bases_of(network, stats, options)):
        query = np.float64(stats.branches[i][options.query].query)
        keys = stats.branches[i][options.key]
        key = keys.key_attended if name == "attended" else keys.key
        key = np.float64(key)
        got = factorised_errors(basis, query, key)
        for h in range(SMALL.num_heads):
            singular = np.linalg.svd(root(query[h]) @ root(key[h]))[1]
            want = tail(singular)
            np.testing.assert_allclose(got[h], want, atol=1e-4 * want[0])
        for other in others:
            errors = factorised_errors(other[i], query, key)
            assert (got <= errors + 1e-6 * errors[:, :1]).all()
            assert (got < 0.99 * errors)[:, 1:-1].any()


@pytest.mark.parametrize("name", ["default", "gradient metric", "uncentred"])
def test_cut_outputs_lose_the_cut_singular_values_of_each_head(network, stats, name):
    options = OPTIONS[name]
    heads, dim = SMALL.num_heads, SMALL.head_dim
    for i, basis in enumerate(bases_of(network, stats, options)):
        moment = np.float64(stats.branch_covariance(i, "attn", options.mixed))
        if name == "uncentred":
            mean = np.float64(stats.branch_mean(i, "attn", options.mixed))
            moment = moment + np.outer(mean, mean)
        metric = np.eye(SMALL.width)
        if name == "gradient metric":
            metric = np.float64(stats.branches[i]["gradient"].gram)
        block = network[f"block_{i}"]
        scale = np.float64(block["layer_scale1"])
        half = scale[:, None] * root(metric)
        for h in range(heads):
            rows = slice(h * dim, (h + 1) * dim)
            left, kernel = root(moment[rows, rows]), block["attn"]["out"]["kernel"][h]
            value, out = (np.float64(side[h]) for side in (basis.value, basis.out))
            kernel = np.float64(kernel)
            got = [
                np.square(
                    left @ (kernel - value[:, :m] @ out[:m] @ kernel) @ half
                ).sum()
                for m in range(dim + 1)
            ]
            want = tail(np.linalg.svd(left @ kernel @ half)[1])
            np.testing.assert_allclose(got, want, atol=1e-4 * want[0])


def test_dead_heads_and_fewer_tokens_than_dims_keep_the_function(network, images):
    dead = jax.tree.map(lambda x: x, network)
    attn = dead["block_0"]["attn"]
    for site in ("query", "key", "value"):
        attn[site] = jax.tree.map(
            lambda x: x.at[..., 0, :].set(0.0), attn[site]
        )  # kernel [D, H, d], bias [H, d]
    attn["out"]["kernel"] = attn["out"]["kernel"].at[1, 3:].set(0.0)
    one = {name: array[:1] for name, array in images.items()}  # five tokens
    stats = collect(SMALL, dead, one, 1, moments=MOMENTS)
    for options in OPTIONS.values():
        changes = bases_of(dead, stats, options)
        assert_same_logits(dead, contraction.inject(dead, changes), images)
        for basis in changes:
            assert_inverse(basis.query, basis.key.swapaxes(1, 2))
            assert_inverse(basis.value, basis.out)


def assert_inverse(left, right):
    product = np.float64(left) @ np.float64(right)
    identity = np.broadcast_to(np.eye(product.shape[-1]), product.shape)
    np.testing.assert_allclose(product, identity, atol=1e-5)
    norms = np.linalg.norm(np.float64(left), axis=1)
    assert norms.min() > 0.99 and norms.max() < balance.FLOOR**-0.25


def test_pairs_of_matrices_near_singular_are_inverse_in_float32():
    rng = np.random.default_rng(0)

    def near_singular():
        axes = np.linalg.qr(rng.normal(size=(64, 64)))[0]
        return (axes * np.logspace(0, -12, 64)) @ axes.T

    for _ in range(4):
        left, right = near_singular(), balance.root(near_singular())[0]
        value, out = balance.pair(left[None], right[None])
        assert value.dtype == out.dtype == np.float32
        assert_inverse(value, out)


def test_the_scale_of_a_cost_does_not_matter(network, stats):
    # Weights by gradients scale with the cost; 2^k is exact in float32.
    larger = stats._replace(
        branches=jax.tree.map(lambda x: x * 2.0**20, stats.branches)
    )
    for a, b in zip(
        jax.tree.leaves(bases_of(network, stats, Balanced())),
        jax.tree.leaves(bases_of(network, larger, Balanced())),
        strict=True,
    ):
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_criteria_name_the_moments_they_need(network, images):
    made = contraction.balanced_criterion(Balanced(query="plain", keys="attended"))
    assert made.moments == ("plain", "gradient", "attended")
    assert made.weightings == ()
    alone = contraction.balanced_criterion(Balanced(parts=("vo",), mixed="plain"))
    assert (alone.moments, alone.weightings) == (("plain",), ("gradient",))
    assert contraction.CRITERIA["balanced"].moments == ("gradient",)


def test_attended_keys_that_were_not_collected_are_asked_for(network, images):
    stats = collect(SMALL, network, images, 8, moments=("gradient",))
    criterion = contraction.balanced_criterion(Balanced(keys="attended"))
    with pytest.raises(ValueError, match=r"moments=\('gradient', 'attended'\)"):
        contraction.contract(network, SMALL, stats, criterion=criterion)


def test_a_network_of_one_token_has_no_attended_keys_and_needs_none():
    one = SMALL.replace(patch_size=8, class_token=False, pool="avg")
    params = shake(vit.init(one, jax.random.key(0)), scale=0.3)
    images = {"image": np.ones((2, 8, 8, 3), np.float32)}
    images |= {"label": np.zeros(2, np.int32), "weight": np.ones(2, np.float32)}
    found = collect(one, params, images, 2, moments=("gradient", "attended"))
    made = [
        contraction.contract(
            params,
            one,
            found,
            criterion=contraction.balanced_criterion(Balanced(keys=keys)),
        )
        for keys in ("attended", "image")
    ]
    jax.tree.map(np.testing.assert_array_equal, *made)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (Balanced(query="taylor"), "query 'taylor': choose one of"),
        (Balanced(keys="token"), "keys 'token': choose one of .'image', 'attended'"),
        (Balanced(metric="fisher"), "metric 'fisher'"),
        (Balanced(moment="centred"), "moment 'centred'"),
        (Balanced(parts=()), "name 'qk', 'vo' or both"),
    ],
)
def test_options_that_are_not_known_list_what_is_allowed(options, match):
    with pytest.raises(ValueError, match=match):
        contraction.balanced_criterion(options)
