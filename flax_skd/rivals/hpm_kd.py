"""HPM-KD: a chain of smaller and smaller students, taught by all larger ones."""

import itertools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.method import losses, macs, piad, subnet
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import Params, ViT
from flax_skd.rivals import stages, start
from flax_skd.run import (
    commands,
    configured_loss,
    evaluate,
    feed,
    sharding,
)
from flax_skd.run.objective import Array, Loss
from flax_skd.run.programs import Program, save_trained

_LOG = logging.getLogger(__name__)
_FORGET = 0.05  # of the running accuracy, a step


class Chain(NamedTuple):
    """`extra` of the train state.

    Attributes:
      stage: int32 [], the student that learns.
      kept: float32 [S], 1 for students whose stage was kept: they teach.
      accuracy: float32 [], of the student, running, from 0 in every stage.
    """

    stage: Any
    kept: Any
    accuracy: Any


def teacher_weights(logits: Array, trusted: Array) -> Array:
    """Shares of the teachers in what each image is taught, by confidence and agreement.

    w_t ~ trusted_t max_k p_t(k) sum_k p_t(k) q(k), q the mean of the trusted teachers:
    the chance that teacher and mean draw the same class. The source names the two parts
    and no formula; the product is ours.

    Args:
      logits: [T, B, K].
      trusted: [T], 1 or 0, one of them 1.

    Returns:
      [T, B], not negative, of sum 1 over T.
    """
    probs = jax.nn.softmax(logits)
    mean = jnp.einsum("t,tbk->bk", trusted / trusted.sum(), probs)
    agreement = jnp.einsum("tbk,bk->tb", probs, mean)
    scores = trusted[:, None] * probs.max(-1) * agreement
    return scores / scores.sum(0, keepdims=True)


def temperature(accuracy: Array, *, first: float) -> Array:
    """From `first`, where the student knows nothing, to 1, where it knows all.

    The source adapts it to the state of training without a formula; this is ours.
    """
    return 1 + (first - 1) * (1 - accuracy)


def taught(
    student: Array, teachers: Array, weights: Array, *, temperature: Array
) -> Array:
    """temperature^2 KL(sum_t w_t softmax(z_t / temperature) || student), mean.

    Args:
      student: [B, K].
      teachers: [T, B, K]; no gradient flows to them.
      weights: [T, B].
      temperature: [].
    """
    soft = jax.nn.softmax(teachers / temperature)
    target = jax.lax.stop_gradient(jnp.einsum("tb,tbk->bk", weights, soft))
    log_probs = jax.nn.log_softmax(student / temperature)
    log_target = jnp.log(jnp.maximum(target, jnp.finfo(target.dtype).tiny))
    return temperature**2 * (target * (log_target - log_probs)).sum(-1).mean()


def of_stage(
    full: ViT,
    students: list[ViT],
    stage: int,
    *,
    first: float = 3.0,
    label_smoothing: float = 0.0,
) -> Loss:
    """CE(labels) + `taught` of one student, all larger networks frozen.

    Args:
      full: model of the full network, `frozen` of the train state, which always
        teaches.
      students: models, falling in size; the first `stage` teach where kept.
      stage: which one learns.
      first: temperature a stage starts at.
      label_smoothing: of the labels.
    """
    teachers = [full, *students[:stage]]

    def loss(params: Params, batch: dict[str, Array], rng: Array, state: Any):
        del rng
        trees = [state.frozen, *(params[name_of(i)] for i in range(stage))]
        above = jnp.stack(
            [
                model.apply({"params": jax.lax.stop_gradient(tree)}, batch["image"])
                for model, tree in zip(teachers, trees, strict=True)
            ]
        )
        own = {"params": params[name_of(stage)]}
        logits = students[stage].apply(own, batch["image"])
        trusted = jnp.concatenate([jnp.ones(1), state.extra.kept[:stage]])
        heat = temperature(state.extra.accuracy, first=first)
        kl = taught(logits, above, teacher_weights(above, trusted), temperature=heat)
        value = losses.cross_entropy(
            logits, batch["label"], label_smoothing=label_smoothing
        )
        accuracy = losses.accuracy(logits, batch["label"])
        metrics = {"accuracy": accuracy, "teacher_kl": kl, "temperature": heat}
        return value + kl, metrics

    return loss


def name_of(student: int) -> str:
    """Where a student lies in the parameters."""
    return f"student_{student}"


def only_the_student(before, after, batch, metrics):
    """`after_update`: the others stay as they are; the running accuracy goes on."""
    del batch
    chain = before.extra
    accuracy = chain.accuracy + _FORGET * (metrics["accuracy"] - chain.accuracy)
    after = after._replace(extra=chain._replace(accuracy=accuracy))
    return stages.only(
        lambda name: chain.stage == int(name.rpartition("_")[2]), before, after
    )


def keeps(before: float, after: float, *, least: float = 1.0) -> bool:
    """The rule of a stage: kept if accuracy gained at least `least` points.

    Args:
      before: percent, of the slice the student started as.
      after: percent, of what it became.
      least: points.
    """
    return after - before >= least


def _chain_of(config: Any, found: Any) -> dict[str, SubnetSpec]:
    """Name -> widths of every student, by the levels of the super-network."""
    spec, levels, text = found.spec, found.dropout_list, config.rival.shares
    parts = commands.listed(text)
    shares = commands.shares("rival.shares", text)
    edges = [1.0, *shares, 0.0]
    if not shares or any(a <= b for a, b in itertools.pairwise(edges)):
        raise ValueError(
            f"rival.shares = {text!r}: shares of the MACs must fall, below 1, above 0."
        )
    if not int(levels.levels):  # a network that nobody made a list for
        levels = piad.uniform(spec)
    limits = [int(share * macs.macs(spec)) for share in shares]
    widths = [levels.widths(piad.level_for(levels, spec, n), spec) for n in limits]
    if len(set(widths)) < len(widths):
        raise ValueError(
            f"rival.shares = {text!r}: the levels of the network are too coarse to tell "
            "these sizes apart. Choose fewer."
        )
    return dict(zip((part.replace("/", "_") for part in parts), widths, strict=True))


class Judge:
    """What a stage starts from: the student before it, or the slice that it was.

    Args:
      students: models, falling in size.
      full: parameters of the full network.
      batches: clean images to measure on.
      mesh: of the run.
      least: see `keeps`.
    """

    def __init__(self, students: list[ViT], full: Params, batches, mesh, *, least):
        self._students, self._full, self._least = students, full, least
        self._batches, self._mesh = batches, mesh

    def _top1(self, stage: int, params: Params) -> float:
        images = feed.OnMesh(self._batches, self._mesh)
        placed = sharding.gathered(params, self._mesh)
        (score,) = evaluate.evaluate(self._students[stage], placed, images, [None])
        return score.top1

    def __call__(self, params: Params, stage: int) -> tuple[Params, bool]:
        """Parameters of a student that has learnt, and whether its stage is kept."""
        model, own = self._students[stage], params[name_of(stage)]
        above = params[name_of(stage - 1)] if stage else self._full
        slice_ = subnet.extract(above, model.widths)
        scores = self._top1(stage, slice_), self._top1(stage, own)
        kept = keeps(*scores, least=self._least)
        what = "kept" if kept else "undone"
        _LOG.info("stage %d: %.1f to %.1f %%, %s", stage, *scores, what)
        return (own if kept else slice_), kept


def program(config: Any) -> Program:
    """The full network as it was, and `network-8_12` and so on, each of one stage.

    Of the paper's six parts this has three: chain, teachers, temperature. The choice of
    hyper-parameters by a first run, parallel runs and a cache are not of the loss.
    """
    found, options = start.network(config), config.rival
    chain = _chain_of(config, found)
    widths, count = list(chain.values()), len(chain)
    students = [configured_loss.vit_of(config, found.spec, w) for w in widths]
    in_turn, mesh = stages.Stages(count), sharding.mesh(config.mesh)
    batches = feed.of_training(
        config,
        found.spec,
        images=options.images,
        batch_size=config.data.batch_size,
        on_bad_image=config.data.on_bad_image,
    )
    judge = Judge(students, found.params, batches, mesh, least=options.least_gain)
    losses_ = [
        configured_loss.mixed_loss(
            config,
            found.spec,
            of_stage(
                configured_loss.vit_of(config, found.spec),
                students,
                stage,
                first=options.temperature,
                label_smoothing=configured_loss.smoothing_of(config),
            ),
        )
        for stage in range(count)
    ]

    def begin(index, state):
        extra = in_turn.begin(index, state)
        if not 0 < index < count:
            return extra
        learnt = state.ema if config.weights == "ema" else state.params
        learnt = jax.device_get(sharding.gathered(learnt, mesh))
        own, kept = judge(learnt, index - 1)
        fresh = {
            name_of(index - 1): own,
            name_of(index): subnet.extract(own, widths[index]),
        }
        marks = np.array(jax.device_get(extra.kept))
        marks[index - 1] = kept
        return state._replace(
            params={**state.params, **fresh},
            ema={**state.ema, **fresh},
            extra=Chain(extra.stage, marks, np.float32(0)),
        )

    def save(directory, params, extra, facts):
        facts = {**facts, "trained": "hpm_kd", "kept": extra.kept[:-1].tolist()}
        own, kept = judge(params, count - 1)
        params = {**params, name_of(count - 1): own}
        facts["kept"] = [*facts["kept"], float(kept)]
        full = found._replace(dropout_list=piad.uniform(found.spec, steps=1))
        save_trained(directory, full, facts)
        trees = (params[name_of(i)] for i in range(count))
        sizes = {n: (tree, found.spec) for n, tree in zip(chain, trees, strict=True)}
        start.save_sizes(directory, sizes, facts)

    cuts = itertools.accumulate(widths, subnet.extract, initial=found.params)
    return Program(
        students[-1],
        {name_of(i): tree for i, tree in enumerate(itertools.islice(cuts, 1, None))},
        losses_[0],
        save,
        extra=Chain(np.int32(0), np.zeros(count, np.float32), np.float32(0)),
        before_epoch=begin,
        every_epochs=config.epochs / count,
        stages=count,
        sizes=lambda extra: {"smallest": None},
        before_step=lambda step, extra: (extra, losses_[in_turn.now(extra)]),
        after_update=only_the_student,
        network=lambda params, extra: params[name_of(count - 1)],
        beside=tuple(chain),
        frozen=found.params,
    )
