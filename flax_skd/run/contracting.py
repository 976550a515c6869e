"""The contract command: from statistics to super-networks, one a criterion."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.io import (
    checkpoint,
    data,
    directory,
    processes,
    sources,
    summed_arrays,
)
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import (
    allocation,
    balance,
    contraction,
    costs,
    growth,
    importance,
    macs,
    packing,
    piad,
)
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import ViT
from flax_skd.run import commands, evaluate, feed, lists, sharding, time_budget
from flax_skd.run.recipes import Recipe, contracted, sums_for

# Of `costs.COSTS` and `importance.SENSITIVITIES`.
LABEL_FREE_COSTS = ("top_logit", "self_kl", "feature")
LABEL_FREE_SENSITIVITIES = ("kl", "feature")


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
    # Whatever would end it after the long pass is refused before.
    _check_options(config)
    for target in targets.values():
        directory.check_target(
            directory.local(target),
            checkpoint.SUPERNET_FILES,
            overwrite,
            older=checkpoint.OLDER_SUPERNET_FILES,
        )
    network = commands.load_network(config.model)
    _check_reach(config, network.spec)
    batches = _batches(config.data, network.spec, config)
    if jax.process_count() > 1:
        read = {"images": sources.fingerprint(batches.source)}
        processes.check_alike(read | {"network": summed_arrays.of_tree(network.params)})
    stats = commands.calibrate(
        network,
        batches,
        cost=config.cost,
        dtype=commands.dtype_named(config.dtype),
        hidden_every=config.hidden_every,
        **sums_for(recipes.values()),
    )
    changed = _logits_changed(network, _first_images(batches))
    measuring = _few(config, network.spec)
    lines = []
    for name, recipe in recipes.items():
        turned = contracted(network, stats, recipe, batches=measuring)
        # The list is the main criterion's; the others are there to be compared by it.
        options = config.list if name == config.criterion else None
        turned = turned._replace(dropout_list=list_of(turned, options, config))
        facts = {
            "criterion": name,
            "calibration_images": int(stats.images),
            "config": config.to_dict(),
        }
        stored = commands.stamped(_stored(turned, config), facts)
        checkpoint.save_supernet(targets[name], stored, overwrite=overwrite)
        lines.append(
            f"wrote {targets[name]}: {name}, {int(stats.images)} calibration images; "
            f"{changed(turned.params)}{_size(stored)}"
        )
    return "\n".join(lines)


def _logits_changed(network: Supernet, images: np.ndarray) -> Callable[[Any], str]:
    """Function of parameters -> the promise of a contraction, as it is kept.

    In float32, whatever dtype the statistics had.
    """
    logits = functools.partial(evaluate.float32_logits, network.spec, images=images)
    before = logits(network.params)
    largest = float(jnp.abs(before).max())

    def told(params):
        worst = float(jnp.abs(logits(params) - before).max())
        where = f"{len(images)} of them (largest {largest:.0f})"
        return f"logits changed by at most {worst:.0e} on {where}"

    return told


def _stored(network: Supernet, config: Any) -> Supernet:
    if network.compensation is None:
        return network
    dtype = commands.dtype_named(config.compensation_dtype)
    return network._replace(compensation=packing.cast(network.compensation, dtype))


def _size(network: Supernet) -> str:
    if network.compensation is None:
        return ""
    return f"; {packing.size(network.compensation) / 1e6:.1f} MB of compensation"


LISTS = ("uniform", "importance", "loss")


def _check_options(config: Any) -> None:
    """What can be told without the network."""
    commands.dtype_named(config.compensation_dtype)
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed = {config.seed} must be 0 to {2**32 - 1}.")
    options = config.list
    if options.kind not in LISTS:
        raise ValueError(f"list.kind {options.kind!r}: choose one of {LISTS}.")
    if options.kind == "loss":
        _list_cost(options)
    known = importance.SENSITIVITIES
    if options.kind == "importance" and options.sensitivity not in known:
        raise ValueError(
            f"list.sensitivity {options.sensitivity!r}: choose one of "
            f"{', '.join(known)}."
        )
    for name in ("images", "levels", "stages", "attn", "mlp"):
        if options[name] < 1:
            raise ValueError(f"list.{name} = {options[name]} must be at least 1.")
    if not 0 < options.cuts <= 1:
        raise ValueError(f"list.cuts = {options.cuts} must be above 0 and at most 1.")
    if not 0 < options.share < 1:
        raise ValueError(f"list.share = {options.share} must be in (0, 1).")


def _check_reach(config: Any, spec: ViTSpec) -> None:
    """Raises ValueError for a list that this network cannot have."""
    costs.cost_named(config.cost, spec.num_classes)
    options = config.list
    if options.kind == "uniform":
        return
    cost: Callable[..., float] = macs.macs
    if options.kind == "importance":
        importance.sensitivity_named(options.sensitivity, spec.num_classes)
    else:
        cost = _list_cost(options)
    nothing = SubnetSpec.uniform(spec, 0, 0, 0)
    most = 1 - cost(spec, nothing) / cost(spec, SubnetSpec.full(spec))
    if options.share > most:
        raise ValueError(
            f"list.share = {options.share} cannot be reached: without any branch the "
            f"network saves {most:.3f} of its cost. Ask for less."
        )


def _list_cost(options: Any) -> Callable[..., float]:
    """What a list by loss saves."""
    if options.cost == "latency":
        if not options.profile:
            raise ValueError(
                "list.cost=latency needs list.profile=DIR, what flax-skd profile wrote "
                "of a super-network of these sizes on this device."
            )
        profile = time_budget.read(options.profile)
        return profile.predicted(options.batch_size or max(profile.latency))
    counted = {"macs": macs.macs, "params": macs.param_count}
    if options.cost not in counted:
        raise ValueError(
            f"list.cost {options.cost!r}: choose one of {', '.join(counted)}, latency."
        )
    return counted[options.cost]


def reads_labels(config: Any) -> bool:
    """Whether the cost or the list does; the divergences of the others do not."""
    if config.cost not in LABEL_FREE_COSTS:
        return True
    measured = config.list.kind == "importance"
    return measured and config.list.sensitivity not in LABEL_FREE_SENSITIVITIES


def _batches(section: Any, spec: ViTSpec, config: Any) -> data.EvalBatches:
    """Calibration batches; images without labels serve where nothing reads any."""
    opened = feed.labelled if reads_labels(config) else feed.unlabelled
    return feed.batches_of(section, spec, seed=config.seed, opened=opened)


def _first_images(batches: data.EvalBatches) -> np.ndarray:
    """Those of the first batch that has any, without padding or what was skipped."""
    first = next(b for b in batches if b["weight"].any())
    return first["image"][first["weight"] > 0]


def _few(config: Any, spec: ViTSpec) -> feed.OnMesh:
    """The calibration images that are measured again and again."""
    section, count = _small_batches(config, spec)
    with section.unlocked():
        section.images = count
    batches = _batches(section, spec, config)
    return feed.OnMesh(batches, sharding.mesh())


def _other_few(config: Any, spec: ViTSpec) -> feed.InTurn:
    """So many of the calibration images, others every time."""
    section, count = _small_batches(config, spec)
    batches = _batches(section, spec, config)
    return feed.InTurn(batches, sharding.mesh(), images=count, seed=config.seed)


def _small_batches(config: Any, spec: ViTSpec) -> tuple[Any, int]:
    """The data section in batches for few images, and how many these are."""
    section = config.data.copy_and_resolve_references()
    there = section.images or _batches(section, spec, config).num_examples
    count = min(config.list.images, there)
    with section.unlocked():
        # No more padding than the devices ask for: every image counts many times.
        each = -(-count // section.batch_size) * jax.device_count()
        section.batch_size = -(-count // each) * jax.device_count()
    return section, count


def list_of(network: Supernet, options: Any, config: Any) -> piad.DropoutList:
    """The list a config asks for, of a contracted network."""
    spec = network.spec
    if options is None or options.kind == "uniform":
        return piad.uniform(spec, steps=config.list.levels)
    mesh = sharding.mesh()
    model = ViT(spec, dtype=commands.dtype_named(config.dtype))
    params = sharding.gathered(network.params, mesh)
    repairs = network.compensation and sharding.gathered(network.compensation, mesh)
    if options.kind == "importance":
        return lists.by_importance(
            model,
            params,
            _few(config, spec),
            repairs=repairs,
            stages=options.stages,
            share=options.share,
            cost=costs.cost_named(config.cost, spec.num_classes),
            sensitivity=importance.sensitivity_named(
                options.sensitivity, spec.num_classes
            ),
        )
    cost = _list_cost(options)
    return lists.by_loss(
        model,
        params,
        _other_few(config, spec),
        repairs=repairs,
        target=(1 - options.share) * cost(spec, SubnetSpec.full(spec)),
        cost=cost,
        share=options.cuts,
        kinds=allocation.TIED if options.tie_heads else allocation.SEPARATE,
        groups=growth.Groups(options.attn, options.mlp),
    )
