"""Contraction keeps the function, and orders by what the formulas say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_statistics import BOTH, collect, features_and_gradients

from flax_skd.io import checkpoint
from flax_skd.method import contraction, costs, piad, statistics, vit
from flax_skd.method.vit import ViT
from flax_skd.run import recipes


@pytest.fixture(scope="module")
def stats(spec, params, batch):
    return collect(spec, params, batch, 6, weightings=BOTH, moments=("gradient",))


@pytest.mark.parametrize("criterion", contraction.CRITERIA)
def test_every_criterion_keeps_the_logits(spec, params, batch, stats, criterion):
    turned = contraction.contract(params, spec, stats, criterion=criterion)
    before = ViT(spec).apply({"params": params}, batch["image"])
    after = ViT(spec).apply({"params": turned}, batch["image"])
    np.testing.assert_allclose(after, before, atol=1e-5)
    kernel = "block_1", "attn", "value", "kernel"
    a, b = (
        jax.tree_util.tree_reduce(lambda x, y: x, _get(t, kernel))
        for t in (params, turned)
    )
    assert float(jnp.abs(a - b).max()) > 1e-3  # it did something


def _get(tree, path):
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize("criterion", contraction.CRITERIA)
def test_pairs_are_inverse_and_orders_are_permutations(spec, params, stats, criterion):
    for basis in contraction.bases(params, spec, stats, criterion=criterion):
        query, key, value, out = (np.float64(x) for x in basis[:4])
        identity = np.broadcast_to(np.eye(spec.head_dim), query.shape)
        np.testing.assert_allclose(query @ key.swapaxes(1, 2), identity, atol=1e-5)
        np.testing.assert_allclose(value @ out, identity, atol=1e-5)
        if criterion != "balanced":
            np.testing.assert_array_equal(query, key)
            np.testing.assert_array_equal(value, out.swapaxes(1, 2))
        assert sorted(basis.units.tolist()) == list(range(spec.mlp_dim))


def test_wpac_axes_are_the_eigenvectors_of_the_weighted_covariance(
    spec, params, batch, stats
):
    features, gradients = features_and_gradients(spec, params, batch)

    def covariance(block, site):
        f, g = features[block, site], gradients[block, site]
        w = np.abs(f * g).mean(-1)
        f = f - f.mean((0, 2))[:, None]
        return np.einsum("bhn,bhnd,bhne->hde", w, f, f)

    for i, basis in enumerate(contraction.bases(params, spec, stats)):
        for rotation, matrix in (
            (basis.query, covariance(i, "query") + covariance(i, "key")),
            (basis.value, covariance(i, "value")),
        ):
            values, _ = np.linalg.eigh(matrix)
            turned = np.einsum("hda,hde,heb->hab", rotation, matrix, rotation)
            diagonal = turned.diagonal(axis1=1, axis2=2)
            scale = values.max()
            np.testing.assert_allclose(diagonal, values[:, ::-1], atol=1e-5 * scale)
            assert (np.diff(diagonal) <= 1e-5 * scale).all()


def test_taylor_orders_dims_and_units_by_falling_score(spec, params, batch, stats):
    features, gradients = features_and_gradients(spec, params, batch)
    turned = contraction.contract(params, spec, stats, criterion="taylor1")

    def score(block, site, axes):
        return np.abs(features[block, site] * gradients[block, site]).sum(axes)

    for i in range(spec.depth):
        qk = score(i, "query", (0, 2)) + score(i, "key", (0, 2))
        vo = score(i, "value", (0, 2))
        for site, order in (("query", qk), ("key", qk), ("value", vo)):
            old, new = (
                t[f"block_{i}"]["attn"][site]["kernel"] for t in (params, turned)
            )
            for h in range(spec.num_heads):
                want = old[:, h][:, np.argsort(-order[h])]
                np.testing.assert_array_equal(new[:, h], want)
        units = np.argsort(-score(i, "hidden", (0, 1)))
        old, new = (t[f"block_{i}"]["mlp"]["fc2"]["kernel"] for t in (params, turned))
        np.testing.assert_array_equal(new, old[units])


def test_magnitude_orders_by_the_norm_of_columns(spec, params, stats):
    turned = contraction.contract(params, spec, stats, criterion="magnitude")
    for i in range(spec.depth):
        block = turned[f"block_{i}"]
        attn = {
            k: np.square(block["attn"][k]["kernel"]).sum(0)
            for k in ("query", "key", "value")
        }
        fc1 = np.square(block["mlp"]["fc1"]["kernel"]).sum(0)
        for norms in (attn["query"] + attn["key"], attn["value"], fc1):
            assert (np.diff(norms) <= 1e-6).all()


def test_random_is_repeated_by_its_seed_and_changed_by_another(spec, params, stats):
    def units(seed):
        kwargs = {"criterion": "random", "seed": seed}
        return [b.units for b in contraction.bases(params, spec, stats, **kwargs)]

    assert all((a == b).all() for a, b in zip(units(0), units(0)))
    assert any((a != b).any() for a, b in zip(units(0), units(1)))


def test_unit_orders_can_be_chosen_apart(spec, params, stats):
    got = contraction.bases(params, spec, stats, criterion="wpac", units="taylor1")
    score = np.asarray(stats.sums[0]["hidden"].taylor1[0])
    assert (np.diff(score[got[0].units]) <= 0).all()


def test_unit_orders_found_elsewhere_are_taken_as_they_are(spec, params, stats):
    rng = np.random.default_rng(0)
    orders = tuple(rng.permutation(spec.mlp_dim) for _ in range(spec.depth))
    got = contraction.bases(
        params, spec, stats, criterion=contraction.CRITERIA["pca"], units=orders
    )
    for basis, order in zip(got, orders, strict=True):
        np.testing.assert_array_equal(basis.units, order)


def test_equal_eigenvalues_and_dead_units_still_keep_the_function(spec, params, batch):
    # A head whose values are constant has a zero covariance; a unit that never fires
    # has zero importance.
    dead = jax.tree.map(lambda x: x, params)
    value, fc1 = dead["block_0"]["attn"]["value"], dead["block_0"]["mlp"]["fc1"]
    value["kernel"] = jnp.zeros_like(value["kernel"])
    fc1["bias"] = fc1["bias"].at[:4].set(-1e4)
    stats = collect(spec, dead, batch, 12)
    turned = contraction.contract(dead, spec, stats)
    before = ViT(spec).apply({"params": dead}, batch["image"])
    after = ViT(spec).apply({"params": turned}, batch["image"])
    np.testing.assert_allclose(after, before, atol=1e-5)
    assert np.asarray(turned["block_0"]["mlp"]["fc1"]["bias"])[-4:].max() == -1e4


def test_a_head_of_zeros_is_nothing_to_order_by(spec, batch):
    fresh = vit.init(spec, jax.random.key(0))
    options = {"cost": costs.correct_logit, "weightings": ("gradient", "plain")}
    batch = {**batch, "weight": np.ones(12, np.float32)}
    stats = statistics.collect(ViT(spec), fresh, [batch], **options)
    for name in ("wpac", "taylor1", "pca"):
        with pytest.raises(ValueError, match="a fresh head is all zeros"):
            contraction.contract(fresh, spec, stats, criterion=name)
    for options in (
        {"criterion": "magnitude"},
        {"criterion": "pca", "units": "random"},
    ):
        contraction.contract(fresh, spec, stats, **options)
    network = checkpoint.Supernet(fresh, spec, piad.uniform(spec), {})
    recipe = recipes.Recipe(contraction.CRITERIA["random"], units="greedy")
    with pytest.raises(ValueError, match="a fresh head is all zeros"):
        recipes.contracted(network, stats, recipe)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"criterion": "svd"}, "'svd': choose one of wpac, pca"),
        ({"units": "greedy"}, "'greedy': choose one of"),
        ({"units": (np.arange(40),)}, "of 1 blocks, not of 3"),
        ({"units": (np.zeros(40, int),) * 3}, "block 0 is no permutation of 0 to 39"),
    ],
)
def test_unknown_names_and_wrong_orders_say_what_is_allowed(
    spec, params, stats, options, match
):
    with pytest.raises(ValueError, match=match):
        contraction.contract(params, spec, stats, **options)
