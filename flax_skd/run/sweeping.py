"""The sweep command: sub-networks of super-networks to a table and figures."""

import json
import logging
import pathlib
from typing import Any

import jax

from flax_skd.io import checkpoint, processes, sources
from flax_skd.io.checkpoint import Supernet
from flax_skd.io.differences import differences
from flax_skd.io.directory import as_json, parse, replaced
from flax_skd.method import piad
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import ViT
from flax_skd.run import (
    accuracies,
    commands,
    evaluate,
    feed,
    report,
    sharding,
    time_budget,
)
from flax_skd.run.accuracies import ASKED

_LOG = logging.getLogger(__name__)


def cuts_of(
    supernet: Supernet, cuts: str, kept: str, *, every: int = 1
) -> list[evaluate.Cut]:
    """The rows a sweep config asks for; the full network comes first, once."""
    if every < 1:
        raise ValueError(f"every = {every} must be at least 1.")
    spec = supernet.spec
    full = evaluate.Cut("all", 1.0, 0, SubnetSpec.full(spec))
    rows = []
    shares = commands.shares("kept", kept)
    levels = supernet.dropout_list
    for cut in commands.listed(cuts):
        if cut == "levels":
            chosen = range(every, int(levels.levels) + 1, every)
            rows += [evaluate.list_cut(spec, levels, level) for level in chosen]
        elif cut == "budgets":
            rows += [_within(spec, levels, share) for share in shares]
        else:
            rows += [evaluate.fixed_cut(spec, cut, share) for share in shares]
    others = list(dict.fromkeys(r for r in rows if r.widths != full.widths))
    if len({r.level is None for r in others if r.cut == "all"}) > 1:
        raise ValueError(
            f"cuts = {cuts!r}: 'all' cuts every block alike, levels and budgets are of "
            "the list, and one line would join them: sweep them into two folders, --out."
        )
    return [full, *others]


def _within(spec: ViTSpec, levels: DropoutList, share: float) -> evaluate.Cut:
    """The largest level within a share of the MACs."""
    if not 0 < share <= 1:
        raise ValueError(f"kept = {share} must lie in (0, 1].")
    return evaluate.list_cut(spec, levels, piad.level_within(levels, spec, share))


def sweep(config: Any, *, workdir: str, out: str, overwrite: bool, resume: bool) -> str:
    """The table of criteria against cuts, written after every criterion."""
    main = checkpoint.load_supernet(workdir)
    if not main.spec.num_classes:
        raise ValueError(
            f"{workdir} has no head, and a sweep counts images of the right class: give "
            "a network with one."
        )
    name = accuracies.name_of(main.provenance)
    paths, supernets = {name: workdir}, {name: main}
    for name in commands.listed(config.compare):
        paths[name] = f"{workdir}-{name}"
        supernets[name] = checkpoint.load_supernet(paths[name])
    folder = pathlib.Path(out or f"{workdir}-sweep").expanduser()
    cuts = cuts_of(main, config.cuts, config.kept, every=config.every)
    times = _times(config, main.spec, cuts)  # whatever is wrong is said first
    batches = feed.batches_of(config.data, main.spec, seed=config.seed)
    asked = {
        "images": sources.fingerprint(batches.source),
        "on_bad_image": config.data.on_bad_image,
        "dtype": config.dtype,
        **{key: config[key] for key in ("cuts", "kept", "every")},
        "networks": {k: checkpoint.supernet_sum(p) for k, p in paths.items()},
    }
    processes.check_alike(asked)
    done, asked = _finished(folder, asked, overwrite=overwrite, resume=resume)
    there = {row["criterion"] for row in done}
    supernets = {k: v for k, v in supernets.items() if k not in there}
    title = f"{batches.num_examples} images of {batches.source.name}"
    writes = jax.process_index() == 0
    if writes:
        _begin(folder, asked, main, overwrite=overwrite)

    def keep(name, fresh):
        done.extend(fresh)
        if writes:
            report.write(folder, done, title=title)
        _LOG.info("%s: %d rows of %d images", name, len(fresh), fresh[0]["images"])

    run_sweep(
        supernets,
        ViT(main.spec, dtype=commands.dtype_named(config.dtype)),
        batches,
        cuts,
        after_each=keep,
    )
    if writes and times:
        label = f"predicted ms for a batch of {config.profile_batch}"
        timed = [r | {"ms": times[r["cut"], r["kept"], r["level"]]} for r in done]
        axis = report.Axis("ms", label, 1)
        drawn = report.figure(timed, title=title, along=axis)
        drawn.savefig(folder / "latency.png", dpi=150)
    return f"{report.table(done)}\n\nwrote {folder}/sweep.json, sweep.csv, sweep.png, list.png"


def _begin(
    folder: pathlib.Path, asked: dict[str, Any], main: Supernet, *, overwrite: bool
) -> None:
    """Leaves in the folder what was asked, and the figure of the list."""
    folder.mkdir(parents=True, exist_ok=True)
    if overwrite:  # else a sweep that is killed has rows of what was asked before
        (folder / "sweep.json").unlink(missing_ok=True)
    # At once: other processes may be reading it.
    with replaced(folder / ASKED) as fresh:
        fresh.write_text(json.dumps(asked) + "\n", encoding="utf-8")
    title = "What each block keeps, level by level"
    heat = report.list_figure(main.dropout_list, main.spec, title=title)
    heat.savefig(folder / "list.png", dpi=150)


def _times(config: Any, spec: ViTSpec, cuts: list[evaluate.Cut]) -> dict[Any, float]:
    """Predicted ms of every cut, by what tells its rows apart; {} without a profile."""
    if not config.profile:
        return {}
    found = time_budget.read(config.profile, dtype=config.dtype)
    milliseconds = time_budget.milliseconds(found, config.profile_batch)
    return {(c.cut, c.kept, c.level): milliseconds(spec, c.widths) for c in cuts}


def _finished(
    folder: pathlib.Path, asked: dict[str, Any], *, overwrite: bool, resume: bool
) -> tuple[report.Rows, dict[str, Any]]:
    """Rows to keep from an earlier, perhaps interrupted sweep, and all that was asked.

    Raises:
      ValueError: if rows are there and `resume` is not given, or was asked of other
        images, cuts or networks: rows of one table are to be compared.
    """
    path = folder / "sweep.json"
    if not path.exists() or overwrite:
        return [], asked
    if not resume:
        raise ValueError(
            f"{path} is there: pass --resume to add the criteria it lacks, --overwrite "
            "to start again, or another --out."
        )
    rows, was = report.read(path), {}
    if (folder / ASKED).exists():
        was = parse(folder / ASKED, json.loads, (folder / ASKED).read_bytes())
        was = parse(folder / ASKED, dict, was)
    asked, earlier = as_json(asked, ASKED), was.pop("networks", {})
    # A network that was not measured, or is not asked for now, does no harm.
    common = {row["criterion"] for row in rows} & set(asked["networks"])
    then, now = ({k: n.get(k) for k in common} for n in (earlier, asked["networks"]))
    wrong = differences(was | {"networks": then}, asked | {"networks": now})
    if wrong:
        raise ValueError(
            f"{path} is of another sweep, as {ASKED} beside it says:\n  "
            + "\n  ".join(wrong)
            + "\nPass --overwrite to start again, or another --out."
        )
    return rows, asked | {"networks": earlier | asked["networks"]}


def run_sweep(supernets, model, batches, cuts, *, after_each=lambda name, rows: None):
    """`evaluate.sweep` of super-networks over the mesh, with a progress bar."""
    mesh = sharding.mesh()
    images = feed.OnMesh(batches, mesh)
    total = len(supernets) * len(cuts) * images.rows
    with feed.progress("sweep", total) as bar:
        return evaluate.sweep(
            {name: sharding.gathered(s.params, mesh) for name, s in supernets.items()},
            model,
            images,
            cuts,
            repairs={
                name: sharding.gathered(s.compensation, mesh)
                for name, s in supernets.items()
                if s.compensation is not None
            },
            progress=bar.update,
            after_each=after_each,
        )
