"""What a recipe is told reaches the statistics, the repairs and the orders."""

import jax
import numpy as np
import pytest
from conftest import shake

from flax_skd.io import data, sources
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import (
    compensation,
    contraction,
    costs,
    moments,
    piad,
    statistics,
    unit_order,
    vit,
)
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import commands, config_files, contracting, recipes

pytestmark = pytest.mark.usefixtures("one_device")
WPAC = contraction.CRITERIA["wpac"]


def network_of(params, spec):
    return Supernet(params, spec, piad.from_rows([SubnetSpec.full(spec)], spec), {})


def statistics_of(network, batch, recipe):
    return statistics.collect(
        ViT(network.spec),
        network.params,
        [batch],
        weightings=recipe.criterion.weightings,
        moments=recipe.moments(),
    )


def test_a_config_says_every_part_of_the_recipe():
    config = config_files.load("configs/balanced.py")
    config.update({"units": "taylor2", "compensation": "mean", "tokens": "plain"})
    config.update({"ridge": 0.25, "seed": 9, "compare": "random"})
    config.balanced.parts = "vo"
    found = contracting.recipes_of(config)
    assert [*found] == ["balanced", "random"]
    given = found["balanced"]
    assert given[1:] == ("taylor2", "mean", "plain", 0.25, 9)
    assert found["random"] == recipes.Recipe(contraction.CRITERIA["random"], seed=9)


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
@pytest.mark.parametrize("tokens", ["plain", "gradient"])
def test_repairs_are_of_the_moments_of_the_network_that_was_turned(
    spec, params, batch, ridge, tokens
):
    """Measured again in the new coordinates, instead of turned with them."""
    recipe = recipes.Recipe(WPAC, "greedy", "least_squares", tokens, ridge)
    network = network_of(params, spec)
    turned = recipes.contracted(network, statistics_of(network, batch, recipe), recipe)
    again = statistics_of(turned, batch, recipe)
    want = compensation.from_moments(
        *(
            [again.branch_moment(i, branch, tokens) for i in range(spec.depth)]
            for branch in ("attn", "mlp")
        ),
        spec,
        ridge=ridge,
    )
    for mine, plain in zip(
        jax.tree.leaves(turned.compensation), jax.tree.leaves(want), strict=True
    ):
        scale = np.abs(plain).max()
        np.testing.assert_allclose(mine, plain, atol=2e-3 * scale)


def test_the_ridge_of_repairs_is_that_of_the_greedy_order_too(spec, params, batch):
    recipe = recipes.Recipe(WPAC, "greedy", ridge=0.5)
    network = network_of(params, spec)
    stats = statistics_of(network, batch, recipe)
    turned = recipes.contracted(network, stats, recipe).params
    for i in range(spec.depth):
        mlp = params[f"block_{i}"]["mlp"]
        covariance = stats.branch_moment(i, "mlp", "gradient")[1]
        orders = [
            unit_order.greedy(covariance, mlp["fc2"]["kernel"], ridge=ridge)
            for ridge in (recipe.ridge, moments.RIDGE)
        ]
        got = turned[f"block_{i}"]["mlp"]["fc1"]["kernel"]
        np.testing.assert_array_equal(got, mlp["fc1"]["kernel"][:, orders[0]])
        assert not np.array_equal(*orders)


@pytest.mark.parametrize("units", ["greedy", "variance_weight"])
def test_the_order_of_units_counts_the_layer_scale_behind_them(spec, batch, units):
    """A scale that is folded into the last weights of a branch is the same network."""
    scaled = spec.replace(layer_scale=True)
    fresh = shake(vit.init(scaled, jax.random.key(0)), 3)
    rng = np.random.default_rng(0)
    folded = dict(fresh)
    for i in range(spec.depth):
        scale = np.exp(2 * rng.normal(size=spec.width)).astype(np.float32)
        block = {**fresh[f"block_{i}"], "layer_scale2": scale}
        fresh[f"block_{i}"] = block
        fc2 = {name: np.asarray(x) * scale for name, x in block["mlp"]["fc2"].items()}
        mlp = {**block["mlp"], "fc2": fc2}
        ones = np.ones(spec.width, np.float32)
        folded[f"block_{i}"] = {**block, "mlp": mlp, "layer_scale2": ones}
    recipe = recipes.Recipe(WPAC, units)
    kernels = []
    for given in (fresh, folded):
        network = network_of(given, scaled)
        stats = statistics_of(network, batch, recipe)
        turned = recipes.contracted(network, stats, recipe).params
        kernels.append(
            [turned[f"block_{i}"]["mlp"]["fc1"]["kernel"] for i in range(spec.depth)]
        )
    for mine, plain in zip(*kernels, strict=True):
        np.testing.assert_array_equal(mine, plain)


def test_a_statistics_pass_takes_the_cost_and_the_moments_it_is_asked_for(
    spec, params, batch
):
    whole = spec.replace(crop_fraction=1.0)
    network = network_of(params, whole)
    source = sources.ArraySource(batch["image"], batch["label"])
    asked = {"weightings": ("plain",), "moments": ("plain",), "hidden_every": 2}
    found = commands.calibrate(
        network,
        data.eval_batches(source, whole, batch_size=12),
        cost="self_kl",
        dtype=np.float32,
        **asked,
    )
    want, other = (
        statistics.collect(ViT(whole), params, [batch], cost=cost, **asked)
        for cost in (costs.top_log_probability, costs.correct_logit)
    )
    same = jax.tree.map(
        lambda a, b: np.allclose(a, b, rtol=1e-4, atol=1e-5), found, want
    )
    assert jax.tree.all(same)
    unlike = jax.tree.map(lambda a, b: not np.allclose(a, b, rtol=1e-2), found, other)
    assert any(jax.tree.leaves(unlike))
