"""MatViT: four prefixes of every MLP, the sum of their four losses."""

import itertools
from typing import Any

from flax_skd.method import losses, piad, subnet
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import Params, ViT
from flax_skd.rivals import start
from flax_skd.run import commands, configured_loss
from flax_skd.run.objective import Array, Loss
from flax_skd.run.programs import Program, save_trained


def rows(spec: ViTSpec, prefixes: list[float]) -> list[SubnetSpec]:
    """The same share of every MLP, attention whole: a row a prefix.

    Args:
      spec: the full network.
      prefixes: shares of the hidden units, falling, 1 first.

    Raises:
      ValueError: if the shares do not fall from 1 or are not whole units.
    """
    widths = [share * spec.mlp_dim for share in prefixes]
    falls = all(a > b for a, b in itertools.pairwise(widths))
    if not prefixes or prefixes[0] != 1 or not falls or widths[-1] <= 0:
        raise ValueError(f"rival.prefixes = {prefixes}: shares must fall from 1.")
    if any(width != int(width) for width in widths):
        raise ValueError(
            f"rival.prefixes = {prefixes} of mlp_dim = {spec.mlp_dim} are not whole "
            "units: choose shares that are."
        )
    full = SubnetSpec.full(spec)
    return [full._replace(mlp_dim=(int(width),) * spec.depth) for width in widths]


def sum_of(models: list[ViT], *, label_smoothing: float = 0.0) -> Loss:
    """loss = sum over sizes of CE(labels) (Devvrit et al., arXiv:2310.07707).

    Args:
      models: of static widths, the full one first; each is a slice of the parameters.
      label_smoothing: of all.

    Returns:
      A `Loss`; every size is computed at its own cost, not masked.
    """

    def loss(params: Params, batch: dict[str, Array], rng: Array, state: Any):
        del rng, state
        every = [
            model.apply(
                {"params": subnet.extract(params, model.widths)}, batch["image"]
            )
            for model in models
        ]
        values = [
            losses.cross_entropy(
                logits, batch["label"], label_smoothing=label_smoothing
            )
            for logits in every
        ]
        return sum(values), {
            "accuracy": losses.accuracy(every[0], batch["label"]),
            "smallest_accuracy": losses.accuracy(every[-1], batch["label"]),
        }

    return loss


def program(config: Any) -> Program:
    """A super-network whose list is the rows of `rival.prefixes`."""
    found = start.network(config)
    spec = found.spec
    levels = rows(spec, commands.shares("rival.prefixes", config.rival.prefixes))
    models = [configured_loss.vit_of(config, spec, row) for row in levels]
    loss = sum_of(models, label_smoothing=configured_loss.smoothing_of(config))

    def save(directory, params, extra, facts):
        del extra
        nested = piad.from_rows(levels, spec)
        trained = found._replace(params=params, dropout_list=nested)
        save_trained(directory, trained, {**facts, "trained": "matvit"})

    sizes = {"full": None, "smallest": levels[-1]}
    return Program(
        configured_loss.vit_of(config, spec),
        found.params,
        configured_loss.mixed_loss(config, spec, loss),
        save,
        sizes=lambda extra: sizes,
    )
