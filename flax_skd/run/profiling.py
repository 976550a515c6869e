"""The profile command: what sub-networks take on this device, measured and fitted."""

import pathlib
import sys
from typing import Any

import jax
import numpy as np

from flax_skd.io import checkpoint
from flax_skd.io import directory as folder
from flax_skd.io.checkpoint import SuperNet
from flax_skd.io.extras import require
from flax_skd.method import latency, latency_design
from flax_skd.method.latency import Latency
from flax_skd.method.spec import SubnetSpec
from flax_skd.run import commands, profile_report, time_budget, timing
from flax_skd.run.time_budget import FILES


def profile(config: Any, *, workdir: str, out: str, overwrite: bool) -> str:
    """Measures sub-networks of a super-network, fits, checks, writes; what to print.

    Args:
      config: `configs/profile.py`.
      workdir: of the super-network, whose levels check the fit.
      out: directory of the profile.
      overwrite: replace the one that is there.
    """
    folder.check_target(folder.local(out), FILES, overwrite)
    for name in ("batch_size", "rounds", "attn_lane", "mlp_lane"):
        if config[name] < 1:
            raise ValueError(f"config.{name} = {config[name]} must be at least 1.")
    supernet = checkpoint.load_supernet(workdir)
    lanes = {"attn_lane": config.attn_lane, "mlp_lane": config.mlp_lane}
    networks = _networks(supernet, config, lanes)
    found = time_budget.Profile(
        time_budget.device_name(), config.dtype, supernet.spec, lanes, {}, []
    )
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

    def write(fresh: pathlib.Path) -> None:
        time_budget.write(fresh, found, rounds=config.rounds)
        (fresh / FILES[1]).write_text(text + "\n")
        profile_report.figure(found).savefig(fresh / FILES[2], dpi=150)

    folder.write_whole(out, write, files=FILES, overwrite=overwrite)
    return f"{text}\n\nwrote {out}: {', '.join(FILES)}"


def _networks(
    supernet: SuperNet, config: Any, lanes: dict[str, int]
) -> dict[str, tuple[str, SubnetSpec]]:
    """Name -> (what it is for: fit, check or stairs; widths), no widths twice."""
    spec = supernet.spec
    shares = _numbers(config, "shares", float)
    found = {
        name: ("fit", widths)
        for name, widths in latency_design.design(spec, shares=shares, **lanes).items()
    }
    levels = latency.in_lanes(supernet.dropout_list, spec, **lanes)
    last = int(levels.levels)
    for level in np.linspace(0, last, config.levels + 1).round().astype(int)[1:]:
        found[f"level {level}"] = ("check", levels.widths(int(level), spec))
    above = _numbers(config, "stairs", int)
    for name, widths in latency_design.stairs(spec, above_half=above).items():
        found[name] = ("stairs", widths)
    taken = {widths for use, widths in found.values() if use == "fit"}
    return {n: (u, w) for n, (u, w) in found.items() if u != "check" or w not in taken}


def _numbers(config: Any, name: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in commands.listed(config[name])]
    except ValueError as error:
        raise ValueError(
            f"config.{name} = {config[name]!r}: numbers between commas ({error})."
        ) from error


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
