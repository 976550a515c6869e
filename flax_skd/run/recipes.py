"""Recipes of contraction: the axes of heads, the order of units, what repairs a cut."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_skd.io.checkpoint import Supernet
from flax_skd.method import compensation, contraction, moments, unit_order
from flax_skd.method.contraction import Criterion
from flax_skd.method.pass_checks import check_gradients
from flax_skd.method.statistics import Statistics
from flax_skd.run import unit_choice

MEASURED = "measured"
MEASURED_ORDERS = ("greedy", "variance_weight", "taylor2")


class Recipe(NamedTuple):
    """What a contraction does.

    Attributes:
      criterion: of the axes of heads.
      units: order of hidden units, of `unit_order.ORDERS` or
        `contraction.UNIT_ORDERS`; empty for the criterion's own; `MEASURED` for the one
        of `MEASURED_ORDERS` that costs each block least.
      compensation: what repairs a cut, of `compensation.MODES`.
      tokens: weights of tokens in the moments of units and head outputs, of
        `second_moments.WEIGHTINGS`.
      ridge: of covariances, of repairs and of greedy orders, see
        `moments.regularised`.
      seed: of the random criterion.
    """

    criterion: Criterion
    units: str = ""
    compensation: str = "none"
    tokens: str = "gradient"
    ridge: float = moments.RIDGE
    seed: int = 0

    def check(self) -> "Recipe":
        """Returns this recipe; ValueError for a name that is not known."""
        known = {
            "units": ("", MEASURED, *contraction.UNIT_ORDERS, *unit_order.ORDERS),
            "compensation": tuple(compensation.MODES),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                choices = ", ".join(v or "''" for v in values)
                raise ValueError(
                    f"{name} {getattr(self, name)!r}: choose one of {choices}."
                )
        return self

    def moments(self) -> tuple[str, ...]:
        """What `statistics.collect` has to be asked for."""
        needs = self.units in (MEASURED, *unit_order.ORDERS)
        needs = needs or self.compensation != "none"
        own = (self.tokens,) if needs else ()
        return tuple(dict.fromkeys((*self.criterion.moments, *own)))


def sums_for(recipes: Iterable[Recipe]) -> dict[str, tuple[str, ...]]:
    """What one pass has to collect for all of these, as `statistics.collect` takes it."""
    made = list(recipes)
    weightings = {w for recipe in made for w in recipe.criterion.weightings}
    moments = {m for recipe in made for m in recipe.moments()}
    return {"weightings": tuple(sorted(weightings)), "moments": tuple(sorted(moments))}


def contracted(
    network: Supernet,
    stats: Statistics,
    recipe: Recipe,
    *,
    batches: Iterable[dict[str, Any]] = (),
) -> Supernet:
    """The network in new coordinates, with what repairs its cuts; the same function.

    Args:
      network: whose statistics `stats` are.
      stats: with the criterion's weightings and the recipe's moments.
      recipe: what to do.
      batches: images on which a recipe with measured units measures them.
    """
    spec = network.spec
    units = recipe.units or None
    if recipe.tokens == "gradient" and recipe.moments():
        check_gradients(stats)
    if recipe.units == MEASURED:
        units = _measured(network, stats, recipe, batches)
    elif recipe.units in unit_order.ORDERS:
        units = _orders(network, stats, recipe)
    changes = contraction.bases(
        network.params,
        spec,
        stats,
        criterion=recipe.criterion,
        units=units,
        seed=recipe.seed,
    )
    params = jax.device_get(jax.jit(contraction.inject)(network.params, changes))
    repairs = None
    if recipe.compensation != "none":
        moment = functools.partial(stats.branch_moment, weighting=recipe.tokens)
        blocks = [*enumerate(changes)]
        repairs = compensation.from_moments(
            [moments.rotated(moment(i, "attn"), c.value) for i, c in blocks],
            [moments.permuted(moment(i, "mlp"), c.units) for i, c in blocks],
            spec,
            ridge=recipe.ridge,
        )
        repairs = jax.device_get(compensation.MODES[recipe.compensation](repairs))
    return network._replace(params=params, compensation=repairs)


def _orders(network: Supernet, stats: Statistics, recipe: Recipe):
    """The order of every block's hidden units, by `unit_order`."""
    order, found = unit_order.ORDERS[recipe.units], []
    for i in range(network.spec.depth):
        block = network.params[f"block_{i}"]
        w2 = np.asarray(block["mlp"]["fc2"]["kernel"], np.float64)
        if "layer_scale2" in block:
            w2 = w2 * np.asarray(block["layer_scale2"], np.float64)
        covariance = stats.branch_moment(i, "mlp", recipe.tokens)[1]
        try:
            found.append(order(covariance, w2, ridge=recipe.ridge))
        except ValueError as error:
            raise ValueError(f"block {i}: {error}") from error
    return tuple(found)


def _measured(network: Supernet, stats: Statistics, recipe: Recipe, batches):
    """Every block's order from the one of `MEASURED_ORDERS` that costs it least."""
    recipes = {name: recipe._replace(units=name) for name in MEASURED_ORDERS}
    turned = {n: contracted(network, stats, r) for n, r in recipes.items()}
    names = unit_choice.chosen(turned, batches)
    orders = {n: _units(network, stats, recipes[n]) for n in dict.fromkeys(names)}
    return tuple(orders[name][i] for i, name in enumerate(names))


def _units(network: Supernet, stats: Statistics, recipe: Recipe):
    if recipe.units in unit_order.ORDERS:
        return _orders(network, stats, recipe)
    of_all = contraction.bases(
        network.params,
        network.spec,
        stats,
        criterion=recipe.criterion,
        units=recipe.units,
    )
    return [basis.units for basis in of_all]
