"""Budgets in time: a profile of this device as it lies on disk, and what fits it."""

import os
import pathlib
import platform
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from flax_skd.io import directory as folder
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import latency
from flax_skd.method.latency import Anchors, Latency, Predicted
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import ViTSpec

FILES = ("profile.json", "profile.md", "profile.png")
_FIELDS = {
    *("device", "dtype", "spec", "lanes", "jax", "rounds"),
    *("latency", "anchors", "measured"),
}
_HOW = "run flax-skd profile --workdir=SUPERNET --out=DIR here"


class Profile(NamedTuple):
    """Measured times of one network on one device.

    Attributes:
      device: as `device_name` says.
      dtype: of the computation.
      spec: the full network.
      lanes: {"attn_lane", "mlp_lane"}: multiples that widths are rounded up to.
      latency: coefficients by batch size.
      anchors: of `latency.anchors`, by batch size.
      measured: rows of what was measured, as JSON holds them.
    """

    device: str
    dtype: str
    spec: ViTSpec
    lanes: dict[str, int]
    latency: dict[int, Latency]
    anchors: dict[int, Anchors]
    measured: list[dict[str, Any]]

    def predicted(self, batch_size: int) -> Predicted:
        """The cost of a batch, as `piad.level_for` takes it.

        Raises:
          ValueError: if no batch of that size was profiled.
        """
        if batch_size not in self.latency:
            raise ValueError(
                f"batches of {batch_size} were never profiled, only of "
                f"{', '.join(map(str, sorted(self.latency)))}: {_HOW} with "
                f"--config.batch_size={batch_size}, or give one of these."
            )
        points = self.anchors.get(batch_size, ())
        return Predicted(self.latency[batch_size], self.spec, batch_size, points)


class Budget(NamedTuple):
    """A budget in time, in the form of one in MACs.

    Attributes:
      cost: function of (spec, widths).
      limit: the most it may be, nanoseconds.
      profile: where it comes from.
    """

    cost: Predicted
    limit: float
    profile: Profile

    def level(self, dropout_list: DropoutList) -> int:
        """The largest sub-network of a list, rounded already, within this budget.

        Raises:
          ValueError: if there is none; says what the smallest takes.
        """
        return latency.level_for(dropout_list, self.limit / 1e9, cost=self.cost)

    def prepare(self, supernet: Supernet) -> Supernet:
        """The super-network with its list `rounded`, if any level fits.

        Raises:
          ValueError: if none does, or the profile is of another network.
        """
        changed = rounded(self.profile, supernet)
        self.level(changed.dropout_list)
        return changed


def rounded(profile: Profile, supernet: Supernet) -> Supernet:
    """The super-network with its list in widths that the device likes.

    Raises:
      ValueError: if the profile is of another network.
    """
    latency.check_same_speed(profile.spec, supernet.spec)
    levels = latency.in_lanes(supernet.dropout_list, supernet.spec, **profile.lanes)
    return supernet._replace(dropout_list=levels)


def budget(
    profile: Profile,
    *,
    latency_ms: float | None = None,
    images_per_s: float | None = None,
    batch_size: int | None = None,
) -> Budget:
    """A budget in milliseconds of a batch, or in images a second; give one.

    Args:
      profile: of this device; `read` checks that.
      latency_ms: the most that one batch may take.
      images_per_s: the least to get through, one batch after the other.
      batch_size: as profiled. By default 1 for a latency, and the largest profiled for
        images a second.

    Raises:
      ValueError: if not exactly one is given, it is not positive, or no batch of that
        size was profiled.
    """
    given = [x for x in (latency_ms, images_per_s) if x is not None]
    if len(given) != 1 or not 0 < given[0] < float("inf"):
        raise ValueError(
            f"latency_ms = {latency_ms}, images_per_s = {images_per_s}: give one of "
            "them, above 0."
        )
    if batch_size is None:
        batch_size = 1 if images_per_s is None else max(profile.latency)
    cost = profile.predicted(batch_size)
    if images_per_s is None:
        return Budget(cost, 1e6 * latency_ms, profile)
    return Budget(cost, 1e9 * batch_size / images_per_s, profile)


def read(directory: str | os.PathLike, *, dtype: str | None = None) -> Profile:
    """The profile that `flax-skd profile` wrote, for use on this device.

    Args:
      directory: its `--out`.
      dtype: what the network will compute in; None for the profile's.

    Raises:
      ValueError: if there is none, it was edited, or it is of another device or dtype.
    """
    if not directory:
        raise ValueError(
            "a budget in time needs --profile=DIR, what sub-networks take on this "
            f"device: {_HOW} first."
        )
    try:
        path = folder.existing(directory, FILES[:1], "profile") / FILES[0]
    except ValueError as error:
        raise ValueError(f"{error} No time was ever measured there: {_HOW}.") from error
    fields = folder.read_json(path, "profile", _FIELDS)
    found = folder.parse(path, _parsed, fields)
    check_here(found, dtype=dtype or found.dtype, source=str(path))
    return found


def check_here(found: Profile, *, dtype: str, source: str = "the profile") -> None:
    """Refuses times of another device or precision.

    Args:
      found: a profile.
      dtype: what the network will compute in.
      source: what to call the profile in the message.

    Raises:
      ValueError: if it was measured on another device, or in another dtype.
    """
    for what, here, there in (
        ("device", device_name(), found.device),
        ("dtype", dtype, found.dtype),
    ):
        if here != there:
            raise ValueError(
                f"{source} was measured on the {what} {there!r}, this is {here!r}: "
                f"times do not carry over. For this {what}, {_HOW}."
            )


def write(fresh: pathlib.Path, found: Profile, *, rounds: int) -> None:
    """Writes `profile.json` of a profile into a directory.

    Args:
      fresh: the directory.
      found: the profile.
      rounds: how often each time was measured, for the record.
    """
    facts = found._asdict() | {
        "spec": found.spec.to_dict(),
        "latency": {str(b): m._asdict() for b, m in found.latency.items()},
        "anchors": {str(b): points for b, points in found.anchors.items()},
        "jax": jax.__version__,
        "rounds": rounds,
    }
    folder.write_json(fresh / FILES[0], "profile", facts)


def _parsed(fields: dict[str, Any]) -> Profile:
    lanes = fields["lanes"]
    if sorted(lanes) != ["attn_lane", "mlp_lane"]:
        raise ValueError(f"lanes {lanes!r:.200}: attn_lane and mlp_lane.")
    models = {int(b): Latency.from_dict(f) for b, f in fields["latency"].items()}
    if not models:
        raise ValueError("no batch size was profiled.")
    points = {
        int(batch_size): latency.checked_anchors(pairs)
        for batch_size, pairs in fields["anchors"].items()
    }
    return Profile(
        fields["device"],
        fields["dtype"],
        ViTSpec.from_dict(fields["spec"]),
        {name: int(lane) for name, lane in lanes.items()},
        models,
        points,
        fields["measured"],
    )


def device_name() -> str:
    """The first device: its kind; of a CPU the model and how many cores serve us."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    return f"{_processor()}, {cores or os.cpu_count()} cores"


def _processor() -> str:
    # The standard library does not know it on Linux.
    path = pathlib.Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return " ".join((names or [platform.processor() or platform.machine()])[0].split())


def milliseconds(profile: Profile, batch_size: int) -> Callable[..., float]:
    """Function of (spec, widths) -> predicted milliseconds, for the axis of a figure."""
    cost = profile.predicted(batch_size)
    return lambda spec, widths: cost(spec, widths) / 1e6
