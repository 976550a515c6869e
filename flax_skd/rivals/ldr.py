"""LDR and TLEG: every block is a fixed combination of a few shared components."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.method import piad
from flax_skd.method.vit import Params
from flax_skd.rivals import stages, start
from flax_skd.run import commands, configured_loss, distillation
from flax_skd.run.objective import Array, Loss
from flax_skd.run.programs import Program, save_trained


def chebyshev(depth: int, components: int) -> np.ndarray:
    """a(l, n) = T_n((l - 1) / L), l = 1..L, of the first kind: [L, components]."""
    x = np.arange(depth) / depth
    columns = [np.ones(depth), x]
    while len(columns) < components:
        columns.append(2 * x * columns[-1] - columns[-2])
    return np.stack(columns[:components], 1)


def linear(depth: int, components: int) -> np.ndarray:
    """TLEG's two: 1 and l / L, [L, 2].

    Raises:
      ValueError: if other than two components are asked for.
    """
    if components != 2:
        raise ValueError(f"rival.basis 'linear' has 2 components, not {components}.")
    return np.stack([np.ones(depth), np.arange(1, depth + 1) / depth], 1)


BASES: dict[str, Callable[[int, int], np.ndarray]] = {
    "chebyshev": chebyshev,
    "linear": linear,
}


def recomposed(components: Params, coefficients: np.ndarray) -> Params:
    """The parameters of a network: W_l = sum_n a(l, n) A_n in every block.

    Args:
      components: trees of one block, `component_0` and so on, and what lies outside
        the blocks under `outside`.
      coefficients: a [L, n], of any depth L.
    """
    blocks = [components[f"component_{n}"] for n in range(coefficients.shape[1])]

    def block(row):
        terms = [jax.tree.map(lambda x, a=a: x * a, b) for a, b in zip(row, blocks)]
        return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), terms)

    found = {f"block_{i}": block(row) for i, row in enumerate(_floats(coefficients))}
    return {**components["outside"], **found}


def _floats(coefficients: np.ndarray) -> list[list[float]]:
    return [[float(a) for a in row] for row in coefficients]


def decomposed(params: Params, components: int) -> Params:
    """Components to start from: the mean of the blocks, and zeros.

    A component of zeros changes nothing when its stage begins, so that the loss goes on
    from where it was. The papers start from new weights.
    """
    blocks = [value for name, value in params.items() if name.startswith("block_")]
    mean = jax.tree.map(lambda *x: np.mean(x, 0, dtype=np.float32), *blocks)
    zeros = jax.tree.map(np.zeros_like, mean)
    found = {f"component_{n}": zeros for n in range(1, components)}
    outside = {k: v for k, v in params.items() if not k.startswith("block_")}
    return {"outside": outside, "component_0": mean, **found}


def stage_of(counts: list[int]) -> dict[str, int]:
    """The stage in which each component trains, of the counts after every stage."""
    return {
        f"component_{n}": sum(n >= count for count in counts) for n in range(counts[-1])
    }


def of_components(
    base: Loss, coefficients: np.ndarray, trains_in: dict[str, int]
) -> Loss:
    """The loss of the recomposed network, its gradient for the new components alone.

    What lies outside the blocks trains in every stage.

    Args:
      base: of the network, such as `distillation.with_teacher`.
      coefficients: [L, n].
      trains_in: see `stage_of`; the stage itself is `state.extra.stage`.
    """

    def loss(params: Params, batch: dict[str, Array], rng: Array, state: Any):
        found = dict(params)
        for name, stage in trains_in.items():
            on = state.extra.stage == stage
            found[name] = jax.tree.map(
                lambda x, on=on: jnp.where(on, x, jax.lax.stop_gradient(x)),
                params[name],
            )
        return base(recomposed(found, coefficients), batch, rng, state)

    return loss


def _checked(config: Any, depth: int) -> tuple[list[int], list[int], Callable]:
    """Counts of components, depths and the basis of a config."""
    options = config.rival
    try:
        counts, depths = (
            [int(part) for part in commands.listed(text)]
            for text in (options.components, options.depths)
        )
    except ValueError as error:
        raise ValueError(
            f"rival.components = {options.components!r}, rival.depths = "
            f"{options.depths!r}: write whole numbers between commas."
        ) from error
    if not counts or counts[0] < 1 or sorted(set(counts)) != counts:
        raise ValueError(
            f"rival.components = {options.components!r}: components after each stage, "
            "rising, at least 1."
        )
    if any(d < 1 or d == depth for d in depths):
        raise ValueError(
            f"rival.depths = {options.depths!r}: depths other than the full {depth}, "
            "at least 1."
        )
    if options.basis not in BASES:
        raise ValueError(
            f"rival.basis {options.basis!r}: choose one of {', '.join(BASES)}."
        )
    return counts, depths, BASES[options.basis]


def program(config: Any) -> Program:
    """Components in stages; `network` of full depth, `network-depth-3` beside it."""
    found = start.network(config)
    spec = found.spec
    counts, depths, basis = _checked(config, spec.depth)
    made = counts[-1]
    known = start.named(config.rival.teacher) if config.rival.teacher else found
    base = distillation.with_teacher(
        configured_loss.vit_of(config, spec),
        configured_loss.taught_by(config, known.spec, spec),
        label_smoothing=configured_loss.smoothing_of(config),
    )
    base = configured_loss.mixed_loss(config, spec, base)
    full = basis(spec.depth, made)
    trains_in = stage_of(counts)
    in_turn = stages.Stages(len(counts))
    recompose = jax.jit(lambda params: recomposed(params, full))

    def hold(before, after, batch, metrics):
        del batch, metrics
        stage = before.extra.stage
        return stages.only(
            lambda name: trains_in.get(name, stage) == stage, before, after
        )

    def save(directory, params, extra, facts):
        del extra
        facts = {**facts, "trained": "ldr"}
        whole = jax.device_get(recompose(params))
        one_level = piad.uniform(spec, steps=1)
        trained = found._replace(params=whole, dropout_list=one_level)
        save_trained(directory, trained, facts)
        others = {
            f"depth-{d}": (
                jax.device_get(recomposed(params, basis(d, made))),
                spec.replace(depth=d),
            )
            for d in depths
        }
        start.save_sizes(directory, others, facts)

    return Program(
        configured_loss.vit_of(config, spec),
        decomposed(found.params, made),
        of_components(base, full, trains_in),
        save,
        extra=stages.Stage(np.int32(0)),
        before_epoch=in_turn.begin,
        every_epochs=config.epochs / len(counts),
        stages=len(counts),
        after_update=hold,
        network=lambda params, extra: recompose(params),
        beside=tuple(f"depth-{d}" for d in depths),
        frozen=known.params,
    )
