"""Seconds of any sub-network from a few measured ones: an additive model of the widths.

As MACs are (`macs`), time is taken as a sum over branches: a part that is there
whatever is cut (softmax, LayerNorm, the residual), and a part for every kept dim. All
blocks are alike. What does not add up (caches, odd widths) bends the sum: measured
levels of the list say how far, anchors between which predictions are drawn. The rest is
the error of the model, which whoever measures has to state.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flax_skd.method import piad
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec, ViTSpec

# Fields of a spec that say which pixels come in, and change no time.
_UNTIMED = ("mean", "std", "crop_fraction", "interpolation", "crop_mode", "norm_eps")
# The least that all dims of a kind may take together, as a share of the time.
_LEAST = 1e-3


class Latency(NamedTuple):
    """Seconds of one batch, as the sum of these.

    Attributes:
      fixed: embedding, head and whatever else is always there.
      attn, mlp: of a branch that is there, whatever its width.
      qk, vo: of one kept dim of queries and keys, or of values and out, in every head
        of one block.
      unit: of one hidden unit of one block.
    """

    fixed: float
    attn: float
    qk: float
    vo: float
    mlp: float
    unit: float

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Latency":
        """The inverse of `_asdict`.

        Raises:
          ValueError: if a coefficient is missing, surplus, negative or no number.
        """
        fine = isinstance(fields, Mapping) and sorted(fields) == sorted(cls._fields)
        if not fine or not all(
            isinstance(x, int | float) and 0 <= x < float("inf")
            for x in fields.values()
        ):
            raise ValueError(
                f"a latency has the coefficients {list(cls._fields)}, none negative; "
                f"got {fields!r:.200}."
            )
        return cls(**{name: float(fields[name]) for name in cls._fields})


# (sum over the branches, measured), seconds of one network each, both rising.
Anchors = tuple[tuple[float, float], ...]


class Predicted(NamedTuple):
    """Times of one network's sub-networks as a cost: (spec, widths) -> nanoseconds.

    `piad.level_for` and `allocation.allocate` take it as they take `macs.macs`.

    Attributes:
      latency: the coefficients.
      spec: the full network they were measured on.
      batch_size: images of one batch.
      anchors: of `anchors`; without any the sum stands as it is.
    """

    latency: Latency
    spec: ViTSpec
    batch_size: int
    anchors: Anchors = ()

    def __call__(self, spec: ViTSpec, widths: SubnetSpec) -> float:
        """Nanoseconds of one batch.

        Raises:
          ValueError: if the spec is another network's.
        """
        check_same_speed(self.spec, spec)
        return 1e9 * bent(seconds(self.latency, widths), self.anchors)


def features(widths: SubnetSpec) -> np.ndarray:
    """What every coefficient of `Latency` is multiplied by, float64 [6]."""
    qk, vo, mlp = (np.asarray(field, np.float64) for field in widths)
    counts = (vo > 0).sum(), qk.sum(), vo.sum(), (mlp > 0).sum(), mlp.sum()
    return np.array([1.0, *counts])


def seconds(latency: Latency, widths: SubnetSpec) -> float:
    """c0 + sum over blocks of [attn + qk w_qk + vo w_vo] + [mlp + unit w_mlp].

    Args:
      latency: the coefficients.
      widths: tuples of ints; a branch of width 0 takes no time at all.
    """
    return float(features(widths) @ np.array(latency))


def bent(time: float, points: Anchors) -> float:
    """Seconds for a sum over branches: on the line through the anchors.

    Below the first and above the last anchor its ratio of measured to sum holds.
    """
    if not points:
        return time
    sums, measured = np.array(points).T
    end = np.clip(time, sums[0], sums[-1])
    return float(np.interp(end, sums, measured) * time / end)


def anchors(pairs: Iterable[tuple[float, float]]) -> Anchors:
    """The anchors of networks that were measured.

    Where a network with a larger sum took less time than one with a smaller, both get
    the mean of their times, but for a thousandth of their sums: a cut always saves
    something.

    Args:
      pairs: (sum over the branches, measured), seconds of one network each.
    """
    rising: list[tuple[float, float, list[float]]] = []
    for time, measured in sorted(dict(pairs).items()):
        rising.append((measured - _LEAST * time, 1.0, [time]))
        while len(rising) > 1 and rising[-2][0] >= rising[-1][0]:
            (a, n, left), (b, m, right) = rising[-2:]
            rising[-2:] = [((n * a + m * b) / (n + m), n + m, left + right)]
    return tuple(
        (time, mean + _LEAST * time) for mean, _, times in rising for time in times
    )


def checked_anchors(pairs: Any) -> Anchors:
    """Anchors as JSON holds them.

    Raises:
      ValueError: if they are not pairs of positive numbers, both rising.
    """
    points = np.array(pairs, dtype=object).reshape(-1, 2)
    fine = all(isinstance(x, float) and 0 < x < float("inf") for x in points.flat)
    if not fine or not (np.diff(points.astype(float), axis=0) > 0).all():
        raise ValueError(
            f"anchors are pairs of positive seconds, both rising; got {pairs!r:.200}."
        )
    return tuple((float(a), float(b)) for a, b in points)


def fit(networks: Sequence[SubnetSpec], times: Sequence[float]) -> Latency:
    """Non-negative least squares of the relative errors.

    With six coefficients all sets of those that are not zero can be tried: the best
    answer is the least squares of its own set. The coefficients of a dim stay above
    a thousandth of the time over all dims of the kind, so that every cut saves something
    and a list can be made by latency.

    Args:
      networks: widths that were measured; `latency_design.design` makes a set that
        tells all coefficients apart.
      times: seconds of each.

    Raises:
      ValueError: if a time is not positive, or the networks leave a coefficient open.
    """
    rows, taken = np.stack([features(w) for w in networks]), np.asarray(times, float)
    if taken.shape != rows.shape[:1] or not (np.isfinite(taken) & (taken > 0)).all():
        raise ValueError(f"times {times!r:.200}: one positive number a network.")
    check_told_apart(networks)
    rows = rows / taken[:, None]  # relative errors: the wanted value is 1
    size = rows.max(0)
    rows = rows / size
    least = _LEAST * np.array(
        [name in ("qk", "vo", "unit") for name in Latency._fields]
    )
    found = least + _non_negative(rows, 1 - rows @ least)
    return Latency(*map(float, found / size))


def check_told_apart(networks: Sequence[SubnetSpec]) -> None:
    """Raises ValueError if networks leave a coefficient open, whatever their times."""
    rows = np.stack([features(w) for w in networks])
    size = rows.max(0)
    if not size.all() or np.linalg.matrix_rank(rows / size) < rows.shape[1]:
        raise ValueError(
            f"{len(networks)} networks do not tell {', '.join(Latency._fields)} apart: "
            "measure each width cut alone, and removed branches (latency_design.design)."
        )


def _non_negative(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The x >= 0 with the least |rows x - wanted|."""
    count = rows.shape[1]
    best, answer = float(wanted @ wanted), np.zeros(count)
    for chosen in itertools.product((False, True), repeat=count):
        if not any(chosen):
            continue
        x = np.zeros(count)
        x[list(chosen)] = np.linalg.lstsq(rows[:, chosen], wanted, rcond=None)[0]
        error = rows @ x - wanted
        if x.min() >= 0 and error @ error < best:
            best, answer = float(error @ error), x
    return answer


def in_lanes(
    dropout_list: DropoutList, spec: ViTSpec, *, attn_lane: int = 1, mlp_lane: int = 1
) -> DropoutList:
    """The list with every width rounded up to what the hardware likes.

    Levels keep their order and only gain dims: for nothing, where the hardware takes as
    long for a width as for the next multiple.

    Args:
      dropout_list: its levels stay as many.
      spec: the full network; no width goes beyond it, and 0 stays 0.
      attn_lane, mlp_lane: multiples, at least 1.

    Raises:
      ValueError: if a lane is not positive.
    """
    if min(attn_lane, mlp_lane) < 1:
        raise ValueError(f"lanes {attn_lane} and {mlp_lane} must be at least 1.")
    full = SubnetSpec.full(spec)
    lanes = (attn_lane, attn_lane, mlp_lane)

    def rounded(widths):
        return SubnetSpec(
            *(
                tuple(round_up(w, size[0], lane) for w in field)
                for field, size, lane in zip(widths, full, lanes)
            )
        )

    rows = [rounded(widths) for widths in dropout_list.all_widths(spec)]
    return piad.from_rows(rows, spec, max_levels=len(dropout_list.qk_dim) - 1)


def level_for(dropout_list: DropoutList, limit: float, *, cost: Predicted) -> int:
    """The largest sub-network of a list whose batch takes at most `limit` seconds.

    Args:
      dropout_list: the levels to choose from.
      limit: seconds of one batch.
      cost: what levels take.

    Raises:
      ValueError: if no level is that fast; says what the smallest takes.
    """
    last = dropout_list.widths(int(dropout_list.levels), cost.spec)
    fastest = cost(cost.spec, last) / 1e9
    if not fastest <= limit:  # nan too
        raise ValueError(
            f"no level takes {readable(limit, cost.batch_size)}: the smallest "
            f"sub-network (level {int(dropout_list.levels)}) takes "
            f"{readable(_up(fastest), cost.batch_size)}. Ask for at least that, or make "
            "a list that goes further down."
        )
    return piad.level_for(dropout_list, cost.spec, 1e9 * limit, cost=cost)


def _up(time: float) -> float:
    """The next number of four digits: what a message asks for must be enough."""
    unit = 10.0 ** (np.floor(np.log10(time)) - 3) if time > 0 else 1.0
    return float(np.ceil(time / unit) * unit)


def readable(time: float, batch_size: int) -> str:
    """A time for a message: `8.2 ms for a batch of 32 (3,902 images/s)`."""
    rate = f"{batch_size / time:,.4g} images/s" if time > 0 else "no time"
    return f"{1e3 * time:.4g} ms for a batch of {batch_size} ({rate})"


def check_same_speed(profiled: ViTSpec, spec: ViTSpec) -> None:
    """Raises ValueError, naming the fields, unless two networks take the same time."""
    one, other = profiled.to_dict(), spec.to_dict()
    wrong = [
        f"{name} = {one[name]!r}, not {other[name]!r}"
        for name in one
        if name not in _UNTIMED and one[name] != other[name]
    ]
    if wrong:
        raise ValueError(
            f"the profile is of a network with {'; '.join(wrong)}: run flax-skd profile "
            "on this super-network."
        )


def round_up(width: float, size: int, lane: int) -> int:
    """The next multiple of `lane`, at most `size`; 0 stays 0."""
    return min(size, int(np.ceil(np.round(width / lane, 9))) * lane)
