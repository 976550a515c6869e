"""The profile command: what sub-networks take on this device, measured and fitted."""

import pathlib
from typing import Any

import jax
import numpy as np

from flax_skd.io import checkpoint
from flax_skd.io import directory as folder
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import latency, latency_design
from flax_skd.method.latency import Anchors, Latency
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.run import commands, feed, profile_report, time_budget, timing
from flax_skd.run.time_budget import FILES


def profile(config: Any, *, workdir: str, out: str, overwrite: bool) -> str:
    """Measures sub-networks of a super-network, fits, checks, writes; what to print.

    Args:
      config: `configs/profile.py`.
      workdir: of the super-network, whose levels check the fit.
      out: directory of the profile.
      overwrite: replace the one that is there.

    Raises:
      ValueError: before anything is measured, if the profile may not be written, or the
        config's lanes and shares leave nothing to fit.
    """
    folder.check_target(folder.local(out), FILES, overwrite)
    for name in ("batch_size", "rounds", "attn_lane", "mlp_lane"):
        if config[name] < 1:
            raise ValueError(f"config.{name} = {config[name]} must be at least 1.")
    supernet = checkpoint.load_supernet(workdir)
    lanes = {"attn_lane": config.attn_lane, "mlp_lane": config.mlp_lane}
    networks = _networks(supernet, config, lanes)
    _check_design(supernet.spec, networks, config)
    found = time_budget.Profile(
        time_budget.device_name(), config.dtype, supernet.spec, lanes, {}, {}, []
    )
    for batch_size in sorted({1, config.batch_size}):
        chosen = {
            name: network
            for name, network in networks.items()
            if network[0] != "stairs" or batch_size == config.batch_size
        }
        rows = _measured(supernet, chosen, config, batch_size)
        model, points = fitted(rows, batch_size)
        found.latency[batch_size], found.anchors[batch_size] = model, points
        found.measured.extend(rows)
        for row in rows:
            sums = latency.seconds(model, SubnetSpec(**row["widths"]))
            row["predicted"] = latency.bent(sums, points)
    text = profile_report.table(found)

    def write(fresh: pathlib.Path) -> None:
        time_budget.write(fresh, found, rounds=config.rounds)
        (fresh / FILES[1]).write_text(text + "\n")
        profile_report.figure(found).savefig(fresh / FILES[2], dpi=150)

    folder.write_whole(out, write, files=FILES, overwrite=overwrite)
    return f"{text}\n\nwrote {out}: {', '.join(FILES)}"


def _networks(
    supernet: Supernet, config: Any, lanes: dict[str, int]
) -> dict[str, tuple[str, SubnetSpec]]:
    """Name -> (what it is for: fit, anchor, check or stairs; widths), none twice.

    Levels are anchors and checks by turns; the full network is the first anchor.
    """
    spec = supernet.spec
    levels = latency.in_lanes(supernet.dropout_list, spec, **lanes)
    turns = np.linspace(0, int(levels.levels), 2 * config.levels + 1).round()
    on_list = [
        (f"level {i}" if i else "full", levels.widths(i, spec))
        for i in turns.astype(int).tolist()
    ]
    shares = _numbers(config, "shares", float)
    designed = latency_design.design(spec, shares=shares, **lanes)
    taken, found = set(), {}
    for use, networks in (
        ("anchor", on_list[::2]),
        ("fit", designed.items()),
        ("check", on_list[1::2]),
    ):
        for name, widths in networks:
            if widths not in taken:
                taken.add(widths)
                found[name] = (use, widths)
    above = _numbers(config, "stairs", int)
    for name, widths in latency_design.stairs(spec, above_half=above).items():
        found[name] = ("stairs", widths)
    return found


def _check_design(spec: ViTSpec, networks: dict[str, Any], config: Any) -> None:
    """Before minutes of measuring: whether the times can be fitted."""
    fitted_to = [w for use, w in networks.values() if use in ("fit", "anchor")]
    sizes = {"attn_lane": ("head_dim", "qk_dim"), "mlp_lane": ("mlp_dim", "mlp_dim")}
    for lane, (size, field) in sizes.items():
        full = getattr(spec, size)
        if {w for one in fitted_to for w in getattr(one, field)} <= {0, full}:
            raise ValueError(
                f"config.{lane} = {config[lane]} rounds every share of {size} = {full} "
                f"in config.shares = {config.shares!r} up to the whole branch: what a "
                "dim takes cannot be told from what a branch takes. Take a smaller lane, "
                f"at most {max(1, full // 2)}, or smaller shares."
            )
    latency.check_told_apart(fitted_to)


def _numbers(config: Any, name: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in commands.listed(config[name])]
    except ValueError as error:
        raise ValueError(
            f"config.{name} = {config[name]!r}: numbers between commas ({error})."
        ) from error


def _measured(
    supernet: Supernet, networks: dict[str, Any], config: Any, batch_size: int
) -> list[dict[str, Any]]:
    """One row a network: name, use, batch size, widths, times."""
    spec, device = supernet.spec, jax.local_devices()[0]
    dtype = commands.dtype_named(config.dtype)
    params = jax.device_put(commands.in_float32(supernet.params), device)
    size = (batch_size, spec.image_size, spec.image_size, spec.in_channels)
    pixels = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    images = jax.device_put(pixels, device)
    programs, compile_seconds = {}, {}
    with feed.progress(f"compile, batch {batch_size}", len(networks), unit="it") as bar:
        for name, (_, widths) in networks.items():
            programs[name], compile_seconds[name] = timing.compiled(
                params, spec, widths, images, dtype=dtype
            )
            bar.update(1)
    turns = config.rounds * (len(networks) - 1)
    with feed.progress(f"time, batch {batch_size}", turns, unit="it") as bar:
        times = timing.paired(
            programs, against="full", rounds=config.rounds, progress=bar.update
        )
    return [
        {"name": name, "use": use, "batch_size": batch_size}
        | {"widths": widths._asdict(), "compile_seconds": compile_seconds[name]}
        | times[name]._asdict()
        for name, (use, widths) in networks.items()
    ]


def fitted(rows: list[dict[str, Any]], batch_size: int) -> tuple[Latency, Anchors]:
    """The fit to the rows that are for it, of one batch size, and its anchors."""
    mine = [
        (row, SubnetSpec(**row["widths"]))
        for row in rows
        if row["batch_size"] == batch_size and row["use"] in ("fit", "anchor")
    ]
    model = latency.fit([w for _, w in mine], [row["seconds"] for row, _ in mine])
    return model, latency.anchors(
        (latency.seconds(model, widths), row["seconds"])
        for row, widths in mine
        if row["use"] == "anchor"
    )
