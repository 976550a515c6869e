"""The contract command: statistics, then a super-network a criterion."""

import logging
from typing import Any

import jax
import jax.numpy as jnp

from flax_skd.io import checkpoint, directory
from flax_skd.method import contraction, piad
from flax_skd.method.vit import ViT
from flax_skd.run import commands, feed

_LOG = logging.getLogger(__name__)


def contract(config: Any, *, workdir: str, overwrite: bool) -> str:
    """Statistics, then one super-network a criterion."""
    names = [config.criterion, *commands.listed(config.compare)]
    targets = {n: workdir if i == 0 else f"{workdir}-{n}" for i, n in enumerate(names)}
    chosen = {name: contraction.criterion_named(name) for name in names}
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
        weightings=tuple(sorted({w for c in chosen.values() for w in c.weightings})),
    )
    levels = piad.uniform(network.spec, steps=config.levels)
    # The promise of a contraction, checked where it is made; float32 whatever dtype.
    images = next(iter(batches))["image"]
    logits = jax.jit(lambda p: ViT(network.spec).apply({"params": p}, images))
    before = logits(network.params)
    lines = []
    for name, target in targets.items():
        # The unit order asked for is the main criterion's; the others keep their own.
        units = (config.units or None) if name == config.criterion else None
        params = contraction.contract(
            network.params,
            network.spec,
            stats,
            criterion=name,
            units=units,
            seed=config.seed,
        )
        facts = {
            "criterion": name,
            "calibration_images": int(stats.images),
            "config": config.to_dict(),
        }
        turned = network._replace(params=params, dropout_list=levels)
        checkpoint.save_supernet(
            target, commands.stamped(turned, facts), overwrite=overwrite
        )
        worst = float(jnp.abs(logits(params) - before).max())
        lines.append(
            f"wrote {target}: {name}, {int(stats.images)} calibration images; logits "
            f"changed by at most {worst:.0e} on {len(images)} of them (largest "
            f"{float(jnp.abs(before).max()):.0f})"
        )
    return "\n".join(lines)
