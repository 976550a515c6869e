"""Dropout lists from measurements: the paper's importance, or the loss itself."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import jax

from flax_skd.method import (
    allocation,
    compensation,
    costs,
    growth,
    importance,
    macs,
    subnet,
)
from flax_skd.method.compensation import Compensation
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import Params, ViT
from flax_skd.run import evaluate

_LOG = logging.getLogger(__name__)


def grown(
    dropout_list: DropoutList,
    stage: int,
    *,
    stages: int,
    model: ViT,
    params: Params,
    batches: Iterable[dict[str, Any]],
    repairs: Compensation | None = None,
    share: float = 0.875,
    groups: growth.Groups = growth.PAPER_GROUPS,
    cost: costs.Cost = costs.correct_logit,
    sensitivity: importance.Sensitivity = importance.cross_entropy,
) -> DropoutList:
    """One stage of PIAD's growth: importance at the smallest level, then new levels.

    Args:
      dropout_list: so far; `growth.start` makes the first.
      stage: from 0, of `stages`.
      model, params, batches: as in `importance.measure`.
      repairs: the compensation of the network, if it has one.
      share: of all MACs, saved after the last stage.
      groups: units of every branch.
      cost, sensitivity: of the importance.
    """
    spec = model.spec
    widths = dropout_list.widths(int(dropout_list.levels), spec)
    if repairs is not None:
        params = _repaired(params, spec, repairs, subnet.as_data(widths))
    measured = importance.measure(
        model,
        params,
        batches,
        widths,
        cost=cost,
        sensitivity=sensitivity,
    )
    target = growth.schedule(stage, stages, model_macs=macs.macs(spec), share=share)
    return growth.grow(
        dropout_list, spec, measured, target_macs_saved=target, groups=groups
    )


# Compiled once for a network, whatever its widths.
_repaired = jax.jit(compensation.repaired, static_argnums=1)


def by_importance(
    model: ViT,
    params: Params,
    batches: Iterable[dict[str, Any]],
    *,
    repairs: Compensation | None = None,
    stages: int = 8,
    share: float = 0.875,
    cost: costs.Cost = costs.correct_logit,
    sensitivity: importance.Sensitivity = importance.cross_entropy,
) -> DropoutList:
    """The paper's list without its training: all stages of growth on one network.

    Args: as of `grown`.
    """
    dropout_list = growth.start(model.spec)
    for stage in range(stages):
        dropout_list = grown(
            dropout_list,
            stage,
            stages=stages,
            model=model,
            params=params,
            batches=batches,
            repairs=repairs,
            share=share,
            cost=cost,
            sensitivity=sensitivity,
        )
    return dropout_list


def by_loss(
    model: ViT,
    params: Params,
    batches: Iterable[dict[str, Any]],
    *,
    target: float,
    repairs: Compensation | None = None,
    share: float = 0.25,
    kinds: allocation.Kinds = allocation.SEPARATE,
    groups: growth.Groups = allocation.GROUPS,
    cost: Callable[..., float] = macs.macs,
) -> DropoutList:
    """A list by the divergence from the full network, which needs no labels.

    Args:
      model, params: the full network.
      batches: calibration images, read once a round; best others every time
        (`feed.InTurn`): a list measured on few and the same is fitted to them.
      target: cost of the smallest level.
      repairs: the compensation, on in every measurement.
      share, kinds, groups, cost: as in `allocation.allocate`.
    """

    def losses(many):
        scores = evaluate.evaluate(model, params, batches, many, repairs=repairs)
        return [score.kl for score in scores]

    def report(done: allocation.Round) -> None:
        left = done.cost / cost(model.spec, SubnetSpec.full(model.spec))
        _LOG.info(
            "list: %d cuts, KL %.4f (%.4f if they added up), %.1f %% left",
            *(done.cuts, done.loss, done.predicted, 100 * left),
        )

    return allocation.allocate(
        model.spec,
        losses,
        target=target,
        share=share,
        kinds=kinds,
        groups=groups,
        cost=cost,
        after_round=report,
    )
