"""The contract command: from statistics to super-networks, one a criterion.

A recipe says what is done to a network: the axes its heads turn to, the order of its
hidden units, what repairs a cut, and which list of sub-networks it has.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.io import checkpoint, directory
from flax_skd.io.checkpoint import SuperNet
from flax_skd.method import (
    allocation,
    balance,
    compensation,
    contraction,
    costs,
    growth,
    importance,
    macs,
    moments,
    packing,
    piad,
    unit_order,
)
from flax_skd.method.contraction import Criterion
from flax_skd.method.statistics import Statistics
from flax_skd.method.vit import ViT
from flax_skd.run import commands, feed, lists, sharding


class Recipe(NamedTuple):
    """What a contraction does.

    Attributes:
      criterion: of the axes of heads.
      units: order of hidden units, of `unit_order.ORDERS` or
        `contraction.UNIT_ORDERS`; empty for the criterion's own.
      compensation: what repairs a cut, of `compensation.MODES`.
      tokens: weights of tokens in the moments of units and head outputs, of
        `second_moments.WEIGHTINGS`.
      ridge: of covariances, see `moments.regularised`.
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
            "units": ("", *contraction.UNIT_ORDERS, *unit_order.ORDERS),
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
        needs = self.units in unit_order.ORDERS or self.compensation != "none"
        own = (self.tokens,) if needs else ()
        return tuple(dict.fromkeys((*self.criterion.moments, *own)))


def contracted(network: SuperNet, stats: Statistics, recipe: Recipe) -> SuperNet:
    """The network in new coordinates, with what repairs its cuts; the same function.

    Args:
      network: whose statistics `stats` are.
      stats: with the criterion's weightings and the recipe's moments.
      recipe: what to do.
    """
    spec = network.spec
    units = recipe.units or None
    if recipe.units in unit_order.ORDERS:
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
        repairs = compensation.from_moments(
            [
                moments.rotated(_moment(stats, i, "attn", recipe.tokens), change.value)
                for i, change in enumerate(changes)
            ],
            [
                moments.permuted(_moment(stats, i, "mlp", recipe.tokens), change.units)
                for i, change in enumerate(changes)
            ],
            spec,
            ridge=recipe.ridge,
        )
        repairs = jax.device_get(compensation.MODES[recipe.compensation](repairs))
    return network._replace(params=params, compensation=repairs)


def _moment(stats: Statistics, index: int, branch: str, tokens: str) -> moments.Moment:
    mean = np.asarray(stats.branch_mean(index, branch, tokens), np.float64)
    return mean, np.asarray(stats.branch_covariance(index, branch, tokens), np.float64)


def _orders(network: SuperNet, stats: Statistics, recipe: Recipe):
    """The order of every block's hidden units, by `unit_order`."""
    order, found = unit_order.ORDERS[recipe.units], []
    for i in range(network.spec.depth):
        block = network.params[f"block_{i}"]
        w2 = np.asarray(block["mlp"]["fc2"]["kernel"], np.float64)
        if "layer_scale2" in block:
            w2 = w2 * np.asarray(block["layer_scale2"], np.float64)
        found.append(order(_moment(stats, i, "mlp", recipe.tokens)[1], w2))
    return tuple(found)


def recipes_of(config: Any) -> dict[str, Recipe]:
    """Criterion -> recipe: the main one as the config says, the others plain."""
    main = contraction.criterion_named(config.criterion)
    if config.criterion == "balanced":
        options = {k: v for k, v in config.balanced.items() if k != "parts"}
        parts = tuple(commands.listed(config.balanced.parts))
        main = contraction.balanced_criterion(balance.Balanced(parts=parts, **options))
    first = Recipe(
        main,
        units=config.units,
        compensation=config.compensation,
        tokens=config.tokens,
        ridge=config.ridge,
        seed=config.seed,
    )
    found = {config.criterion: first.check()}
    for name in commands.listed(config.compare):
        found[name] = Recipe(contraction.criterion_named(name), seed=config.seed)
    return found


def contract(config: Any, *, workdir: str, overwrite: bool) -> str:
    """Statistics, then one super-network a criterion."""
    recipes = recipes_of(config)
    targets = {
        n: workdir if i == 0 else f"{workdir}-{n}" for i, n in enumerate(recipes)
    }
    _check_list(config.list)
    for target in targets.values():
        # Before the long pass, not after it.
        directory.check_target(
            directory.local(target), checkpoint.SUPERNET_FILES, overwrite
        )
    network = commands.load_network(config.model)
    batches = feed.batches_of(config.data, network.spec, seed=config.seed)
    stats = commands.calibrate(
        network,
        batches,
        cost=config.cost,
        dtype=commands.dtype_named(config.dtype),
        weightings=tuple(
            sorted({w for r in recipes.values() for w in r.criterion.weightings})
        ),
        moments=tuple(sorted({m for r in recipes.values() for m in r.moments()})),
    )
    # The promise of a contraction, checked where it is made; float32 whatever dtype.
    images = next(iter(batches))["image"]
    logits = jax.jit(lambda p: ViT(network.spec).apply({"params": p}, images))
    before = logits(network.params)
    lines = []
    for name, recipe in recipes.items():
        turned = contracted(network, stats, recipe)
        # The list is the main criterion's; the others are there to be compared by it.
        options = config.list if name == config.criterion else None
        turned = turned._replace(dropout_list=_list_of(turned, options, config))
        facts = {
            "criterion": name,
            "calibration_images": int(stats.images),
            "config": config.to_dict(),
        }
        stored = commands.stamped(_stored(turned, config), facts)
        checkpoint.save_supernet(targets[name], stored, overwrite=overwrite)
        worst = float(jnp.abs(logits(turned.params) - before).max())
        lines.append(
            f"wrote {targets[name]}: {name}, {int(stats.images)} calibration images; "
            f"logits changed by at most {worst:.0e} on {len(images)} of them (largest "
            f"{float(jnp.abs(before).max()):.0f}){_size(stored)}"
        )
    return "\n".join(lines)


def _stored(network: SuperNet, config: Any) -> SuperNet:
    if network.compensation is None:
        return network
    dtype = commands.dtype_named(config.compensation_dtype)
    return network._replace(compensation=packing.cast(network.compensation, dtype))


def _size(network: SuperNet) -> str:
    if network.compensation is None:
        return ""
    return f"; {packing.size(network.compensation) / 1e6:.1f} MB of compensation"


LISTS = ("uniform", "importance", "loss")


def _check_list(options: Any) -> None:
    if options.kind not in LISTS:
        raise ValueError(f"list.kind {options.kind!r}: choose one of {LISTS}.")
    if not 0 < options.share < 1:
        raise ValueError(f"list.share = {options.share} must be in (0, 1).")


def _list_of(network: SuperNet, options: Any, config: Any) -> piad.DropoutList:
    """The list a config asks for, of a contracted network."""
    spec = network.spec
    if options is None or options.kind == "uniform":
        return piad.uniform(spec, steps=config.list.levels)
    section = config.data.copy_and_resolve_references()
    with section.unlocked():
        section.images = min(options.images, section.images or options.images)
    mesh = sharding.mesh()
    batches = feed.OnMesh(feed.batches_of(section, spec, seed=config.seed), mesh)
    model = ViT(spec, dtype=commands.dtype_named(config.dtype))
    params = feed.placed(network.params, mesh)
    repairs = network.compensation and feed.placed(network.compensation, mesh)
    if options.kind == "importance":
        return lists.by_importance(
            model,
            params,
            batches,
            repairs=repairs,
            stages=options.stages,
            share=options.share,
            cost=costs.cost_named(config.cost, spec.num_classes),
            sensitivity=importance.sensitivity_named(
                options.sensitivity, spec.num_classes
            ),
        )
    return lists.by_loss(
        model,
        params,
        batches,
        repairs=repairs,
        target=(1 - options.share) * macs.macs(spec),
        share=options.cuts,
        kinds=allocation.TIED if options.tie_heads else allocation.SEPARATE,
        groups=growth.Groups(options.attn, options.mlp),
    )
