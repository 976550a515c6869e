"""The profile command: what sub-networks take on this device, and budgets in time."""

import os
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_skd.io import checkpoint
from flax_skd.io import directory as folder
from flax_skd.io.checkpoint import SuperNet
from flax_skd.io.extras import require
from flax_skd.method import latency
from flax_skd.method.latency import Latency, Predicted
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.run import commands, profile_report, timing

FILES = ("profile.json", "profile.md", "profile.png")
_FIELDS = {"device", "dtype", "spec", "lanes", "jax", "rounds", "latency", "measured"}
_HOW = "run flax-skd profile --workdir=SUPERNET --out=DIR here"


class Profile(NamedTuple):
    """Measured times of one network on one device.

    Attributes:
      device: as `device_name` says.
      dtype: of the computation.
      spec: the full network.
      lanes: {"attn_lane", "mlp_lane"}: multiples that widths are rounded up to.
      latency: coefficients by batch size.
      measured: rows of what was measured, as JSON holds them.
    """

    device: str
    dtype: str
    spec: ViTSpec
    lanes: dict[str, int]
    latency: dict[int, Latency]
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
        return Predicted(self.latency[batch_size], self.spec, batch_size)

    def rounded(self, dropout_list: DropoutList) -> DropoutList:
        """The list in widths that this device likes (`latency.in_lanes`)."""
        return latency.in_lanes(dropout_list, self.spec, **self.lanes)


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

    def prepare(self, supernet: SuperNet) -> SuperNet:
        """The super-network with its list rounded, if any level fits.

        Raises:
          ValueError: if none does, or the profile is of another network.
        """
        latency.check_same_speed(self.profile.spec, supernet.spec)
        rounded = self.profile.rounded(supernet.dropout_list)
        self.level(rounded)
        return supernet._replace(dropout_list=rounded)


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
    for what, here, there in (
        ("device", device_name(), found.device),
        ("dtype", dtype or found.dtype, found.dtype),
    ):
        if here != there:
            raise ValueError(
                f"{path} was measured on the {what} {there!r}, this is {here!r}: "
                f"times do not carry over. For this {what}, {_HOW}."
            )
    return found


def _parsed(fields: dict[str, Any]) -> Profile:
    lanes = fields["lanes"]
    if sorted(lanes) != ["attn_lane", "mlp_lane"]:
        raise ValueError(f"lanes {lanes!r:.200}: attn_lane and mlp_lane.")
    models = {int(b): Latency.from_dict(f) for b, f in fields["latency"].items()}
    if not models:
        raise ValueError("no batch size was profiled.")
    return Profile(
        fields["device"],
        fields["dtype"],
        ViTSpec.from_dict(fields["spec"]),
        {name: int(lane) for name, lane in lanes.items()},
        models,
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


def profile(config: Any, *, workdir: str, out: str, overwrite: bool) -> str:
    """Measures sub-networks of a super-network, fits, checks, writes; what to print.

    Args:
      config: `configs/profile.py`.
      workdir: of the super-network, whose levels check the fit.
      out: directory of the profile.
      overwrite: replace the one that is there.
    """
    folder.check_target(folder.local(out), FILES, overwrite)
    supernet = checkpoint.load_supernet(workdir)
    lanes = {"attn_lane": config.attn_lane, "mlp_lane": config.mlp_lane}
    networks = _networks(supernet, config, lanes)
    found = Profile(device_name(), config.dtype, supernet.spec, lanes, {}, [])
    for batch_size in sorted({1, config.batch_size}):
        chosen = {
            name: network
            for name, network in networks.items()
            if network[0] != "stairs" or batch_size == config.batch_size
        }
        rows = _measured(supernet, chosen, config, batch_size)
        found.latency[batch_size] = fitted(rows, batch_size)
        found.measured.extend(rows)
        _add_predictions(rows, found.latency[batch_size])
    text = profile_report.table(found)
    facts = found._asdict() | {
        "spec": found.spec.to_dict(),
        "latency": {str(b): m._asdict() for b, m in found.latency.items()},
        "jax": jax.__version__,
        "rounds": config.rounds,
    }

    def write(fresh: pathlib.Path) -> None:
        folder.write_json(fresh / FILES[0], "profile", facts)
        (fresh / FILES[1]).write_text(text + "\n")
        profile_report.figure(found).savefig(fresh / FILES[2], dpi=150)

    folder.write_whole(out, write, files=FILES, overwrite=overwrite)
    return f"{text}\n\nwrote {out}: {', '.join(FILES)}"


def _networks(
    supernet: SuperNet, config: Any, lanes: dict[str, int]
) -> dict[str, tuple[str, SubnetSpec]]:
    """Name -> (what it is for: fit, check or stairs; widths), no widths twice."""
    spec = supernet.spec
    shares = [float(share) for share in commands.listed(config.shares)]
    found = {
        name: ("fit", widths)
        for name, widths in latency.design(spec, shares=shares, **lanes).items()
    }
    levels = latency.in_lanes(supernet.dropout_list, spec, **lanes)
    last = int(levels.levels)
    for level in np.linspace(0, last, config.levels + 1).round().astype(int)[1:]:
        found[f"level {level}"] = ("check", levels.widths(int(level), spec))
    above = [int(more) for more in commands.listed(config.stairs)]
    for name, widths in latency.stairs(spec, above_half=above).items():
        found[name] = ("stairs", widths)
    taken = {widths for use, widths in found.values() if use == "fit"}
    return {n: (u, w) for n, (u, w) in found.items() if u != "check" or w not in taken}


def _measured(
    supernet: SuperNet, networks: dict[str, Any], config: Any, batch_size: int
) -> list[dict[str, Any]]:
    """One row a network: name, use, batch size, widths, times."""
    spec, device = supernet.spec, jax.local_devices()[0]
    dtype = commands.dtype_named(config.dtype)
    params = jax.device_put(commands.in_float32(supernet.params), device)
    size = (batch_size, spec.image_size, spec.image_size, spec.in_channels)
    pixels = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    images = jax.device_put(pixels, device)
    programs, compile_seconds = {}, {}
    with _bar(f"compile, batch {batch_size}", len(networks)) as bar:
        for name, (_, widths) in networks.items():
            programs[name], compile_seconds[name] = timing.compiled(
                params, spec, widths, images, dtype=dtype
            )
            bar.update(1)
    turns = config.rounds * (len(networks) - 1)
    with _bar(f"time, batch {batch_size}", turns) as bar:
        times = timing.paired(
            programs, against="full", rounds=config.rounds, progress=bar.update
        )
    return [
        {"name": name, "use": use, "batch_size": batch_size}
        | {"widths": widths._asdict(), "compile_seconds": compile_seconds[name]}
        | times[name]._asdict()
        for name, (use, widths) in networks.items()
    ]


def _bar(what: str, total: int):
    rest = 0.2 if sys.stderr.isatty() else 60
    return require("tqdm").tqdm(desc=what, total=total, mininterval=rest)


def fitted(rows: list[dict[str, Any]], batch_size: int) -> Latency:
    """The fit to the rows that are for it, of one batch size."""
    mine = [r for r in rows if r["use"] == "fit" and r["batch_size"] == batch_size]
    widths = [SubnetSpec(**row["widths"]) for row in mine]
    return latency.fit(widths, [row["seconds"] for row in mine])


def _add_predictions(rows: list[dict[str, Any]], model: Latency) -> None:
    for row in rows:
        row["predicted"] = latency.seconds(model, SubnetSpec(**row["widths"]))


def milliseconds(profile: Profile, batch_size: int) -> Callable[..., float]:
    """Function of (spec, widths) -> predicted milliseconds, for the axis of a figure."""
    cost = profile.predicted(batch_size)
    return lambda spec, widths: cost(spec, widths) / 1e6
