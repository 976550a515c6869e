"""The order of each block's hidden units that loses least, as measured."""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np

from flax_skd.io.checkpoint import Supernet
from flax_skd.method import piad
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import evaluate

_LOG = logging.getLogger(__name__)
SHARES = (3 / 4, 1 / 2)  # of hidden units kept


def chosen(
    networks: dict[str, Supernet], batches: Iterable[dict[str, Any]]
) -> tuple[str, ...]:
    """For every block the key of the network whose cut of that MLP alone costs least.

    An order that wins at half may lose at three quarters: the divergences from the full
    network at all `SHARES` are multiplied, so that each counts by its ratio.

    Args:
      networks: the same network under different unit orders, repairs included.
      batches: images, read once a network; labels do not matter.

    Returns:
      Keys, one a block; of equal ones the first.
    """
    spec = next(iter(networks.values())).spec
    full = SubnetSpec.full(spec)
    cuts = [
        piad.narrowed(full, block, ("mlp_dim",), max(1, round(share * spec.mlp_dim)))
        for share in SHARES
        for block in range(spec.depth)
    ]
    losses = []
    for network in networks.values():
        scores = evaluate.evaluate(
            ViT(spec), network.params, batches, cuts, repairs=network.compensation
        )
        losses.append(np.reshape([s.kl for s in scores], (len(SHARES), spec.depth)))
    floor = np.finfo(np.float32).eps  # below it divergences are rounding
    totals = np.log(np.maximum(losses, floor)).sum(1)
    names = list(networks)
    found = tuple(names[i] for i in totals.argmin(0))
    counts = ", ".join(f"{name} {found.count(name)}" for name in names)
    _LOG.info("unit orders by measured loss, blocks: %s", counts)
    return found
