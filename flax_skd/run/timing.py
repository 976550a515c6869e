"""Times of programs that take turns, as ratios to one of them."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_skd.method import subnet
from flax_skd.method.attention import fastest_attention
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import Params, ViT

Program = Callable[[], Any]


class Timing(NamedTuple):
    """What a program takes.

    Attributes:
      seconds: of one call: `ratio` times the median of the program it is held against.
      ratio: of its time to the other's right before or after it; median over rounds.
      low, high: quartiles of that ratio.
    """

    seconds: float
    ratio: float
    low: float
    high: float


def paired(
    programs: Mapping[str, Program],
    *,
    against: str,
    rounds: int,
    least: float = 0.02,
    ahead: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    progress: Callable[[int], Any] = lambda done: None,
) -> dict[str, Timing]:
    """Times every program beside one of them, turn by turn.

    On a machine with other work, times of minutes apart cannot be compared, but a
    program's with that of another right beside it can. Every round runs all programs,
    each next to `against`, before it in one round and after it in the next.

    Args:
      programs: name -> function that returns arrays; called once to warm up.
      against: the name of the one that the others are held against.
      rounds: how often; medians are taken over them.
      least: seconds that a measurement lasts at least; short programs run repeatedly.
      ahead: whether a call begins before the one before it has ended, as steps of a
        training do, which run behind the host; else each is waited for.
      clock: seconds.
      progress: called with the number of measurements just done.

    Raises:
      ValueError: if `rounds` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"rounds = {rounds} must be at least 1.")
    calls = {}
    for name, run in programs.items():
        jax.block_until_ready(run())  # warm up
        once = _timed(run, 1, ahead, clock)
        calls[name] = max(1, math.ceil(least / max(once, 1e-9)))
    others = [name for name in programs if name != against]
    base: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for turn in range(rounds):
        shift = turn * len(others) // rounds  # nobody always comes first
        for name in others[shift:] + others[:shift]:
            pair = (against, name) if turn % 2 else (name, against)
            both = {p: _timed(programs[p], calls[p], ahead, clock) for p in pair}
            base.append(both[against])
            ratios[name].append(both[name] / both[against])
            progress(1)
        if not others:
            base.append(_timed(programs[against], calls[against], ahead, clock))
    full = float(np.median(base))
    timings = {against: Timing(full, 1.0, 1.0, 1.0)}
    for name, found in ratios.items():
        low, middle, high = (float(q) for q in np.quantile(found, (0.25, 0.5, 0.75)))
        timings[name] = Timing(middle * full, middle, low, high)
    return {name: timings[name] for name in programs}


def _timed(run: Program, calls: int, ahead: bool, clock: Callable[[], float]) -> float:
    before = clock()
    for _ in range(calls):
        made = run()
        if not ahead:
            jax.block_until_ready(made)
    jax.block_until_ready(made)
    return (clock() - before) / calls


def compiled(
    params: Params,
    spec: ViTSpec,
    widths: SubnetSpec,
    images: jax.Array,
    *,
    dtype: Any,
    attention: Callable[..., Any] = fastest_attention,
) -> tuple[Program, float]:
    """An extracted sub-network as a program, and the seconds its compilation took.

    Args:
      params: of the full network, on the device.
      spec: its sizes.
      widths: what is extracted.
      images: [B, S, S, C] on the device.
      dtype: of the computation.
      attention: as of `ViT`.
    """
    model = ViT(spec, widths, dtype=dtype, attention=attention)
    small = subnet.extract(params, widths)

    def forward(params, images):
        return model.apply({"params": params}, images)

    before = time.perf_counter()
    run = jax.jit(forward).lower(small, images).compile()
    return lambda: run(small, images), time.perf_counter() - before
