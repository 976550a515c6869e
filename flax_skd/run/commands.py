"""What each subcommand does, from a config to files: load, compute, save, report."""

import fractions
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

import flax_skd
from flax_skd.io import checkpoint, conversion, data, directory
from flax_skd.io.checkpoint import SubNet, SuperNet
from flax_skd.method import contraction, costs, macs, piad, statistics, subnet
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import evaluate, feed, report, sharding

_LOG = logging.getLogger(__name__)
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def load_network(model: Any) -> SuperNet:
    """A network from a weights file of any family, or a directory of ours.

    Args:
      model: the `model` section of a config.

    Returns:
      A `SuperNet`; of a weights file it has one level, the full network.

    Raises:
      ValueError: if nothing is named, or the file does not hold a plain ViT.
    """
    if not model.path:
        raise ValueError(
            "no network: give --config.model.path, a weights file or a directory that "
            "convert, train or contract wrote."
        )
    path = pathlib.Path(model.path)
    if (path / checkpoint.SUPERNET_FILES[0]).is_file():
        network = checkpoint.load_supernet(path)
        if model.image_size not in (0, network.spec.image_size):
            raise ValueError(
                f"{path} holds a network for {network.spec.image_size} pixels, not "
                f"{model.image_size}: resample when converting the weights file."
            )
        return network
    source = conversion.read(
        path,
        variant=model.variant or None,
        recipe=model.recipe or None,
        fields={k: v for k, v in model.fields.items() if v is not None},
        image_size=model.image_size or None,
    )
    facts = {"file": path.name, "sha256": source.sha256, "family": source.family}
    full = piad.from_rows([SubnetSpec.full(source.spec)], source.spec)
    return SuperNet(source.params, source.spec, full, {"source": facts})


def convert(config: Any, *, workdir: str, overwrite: bool) -> str:
    """A weights file to a directory of ours, or to timm safetensors by its name."""
    network = load_network(config.model)
    if workdir.endswith(".safetensors"):
        if pathlib.Path(workdir).exists() and not overwrite:
            raise ValueError(f"{workdir} exists: name another, or pass --overwrite.")
        conversion.write_timm(workdir, network.params, network.spec)
    else:
        checkpoint.save_supernet(workdir, stamped(network, {}), overwrite=overwrite)
    count = macs.param_count(network.spec)
    return f"wrote {workdir}: {count:,} parameters, {network.spec}"


def stamped(network: SuperNet, facts: dict[str, Any]) -> SuperNet:
    """The network with more provenance and the version of this package."""
    facts = {**network.provenance, **facts, "flax_skd": flax_skd.__version__}
    return network._replace(provenance=facts)


def calibrate(
    network: SuperNet, batches: data.EvalBatches, *, cost: str, dtype: Any, weightings
) -> statistics.Statistics:
    """The statistics pass over the mesh, with a progress bar."""
    mesh = sharding.mesh()
    spec = network.spec
    cost = costs.cost_named(cost, spec.num_classes)
    model = ViT(spec, dtype=dtype)
    with feed.progress("statistics", batches.num_examples) as bar:

        def counted():
            for batch in feed.OnMesh(batches, mesh):
                yield batch
                bar.update(min(batches.batch_size, bar.total - bar.n))

        found = statistics.collect(
            model,
            feed.placed(network.params, mesh),
            counted(),
            cost=cost,
            weightings=weightings,
        )
    # The same on every host, and what follows is done by each for itself.
    return jax.device_get(found)


def contract(config: Any, *, workdir: str, overwrite: bool) -> str:
    """Statistics, then one super-network a criterion."""
    names = [config.criterion, *_listed(config.compare)]
    targets = {n: workdir if i == 0 else f"{workdir}-{n}" for i, n in enumerate(names)}
    chosen = {name: contraction.criterion_named(name) for name in names}
    for target in targets.values():
        # Before the long pass, not after it.
        directory.check_target(
            directory.local(target), checkpoint.SUPERNET_FILES, overwrite
        )
    network = load_network(config.model)
    batches = feed.batches_of(config.data, network.spec, seed=config.seed)
    stats = calibrate(
        network,
        batches,
        cost=config.cost,
        dtype=dtype_named(config.dtype),
        weightings=tuple(sorted({w for c in chosen.values() for w in c.weightings})),
    )
    levels = piad.uniform(network.spec, steps=config.levels)
    # The promise of a contraction, checked where it is made; float32 whatever dtype.
    images = next(iter(batches))["image"]
    logits = jax.jit(lambda p: ViT(network.spec).apply({"params": p}, images))
    before = logits(network.params)
    lines = []
    for name, target in targets.items():
        # The unit order asked for is the main criterion's; the others keep their own.
        units = (config.units or None) if name == config.criterion else None
        params = contraction.contract(
            network.params,
            network.spec,
            stats,
            criterion=name,
            units=units,
            seed=config.seed,
        )
        facts = {
            "criterion": name,
            "calibration_images": int(stats.images),
            "config": config.to_dict(),
        }
        turned = network._replace(params=params, dropout_list=levels)
        checkpoint.save_supernet(target, stamped(turned, facts), overwrite=overwrite)
        worst = float(jnp.abs(logits(params) - before).max())
        lines.append(
            f"wrote {target}: {name}, {int(stats.images)} calibration images; logits "
            f"changed by at most {worst:.0e} on {len(images)} of them (largest "
            f"{float(jnp.abs(before).max()):.0f})"
        )
    return "\n".join(lines)


def dtype_named(name: str) -> Any:
    """A dtype of computation; an unknown name lists the known ones."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def cuts_of(
    supernet: SuperNet, cuts: str, kept: str, *, every: int = 1
) -> list[evaluate.Cut]:
    """The rows a sweep config asks for; the full network comes first, once."""
    spec = supernet.spec
    full = evaluate.Cut("all", 1.0, 0, SubnetSpec.full(spec))
    rows = [full]
    try:
        shares = [float(fractions.Fraction(share)) for share in _listed(kept)]
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"kept = {kept!r}: write shares like 1/4,0.5,3/4.") from error
    levels = supernet.dropout_list
    for cut in _listed(cuts):
        if cut == "levels":
            chosen = range(every, int(levels.levels) + 1, every)
            rows += [evaluate.list_cut(spec, levels, level) for level in chosen]
        elif cut == "budgets":
            limits = [int(share * macs.macs(spec)) for share in shares]
            chosen = [piad.level_for(levels, spec, limit) for limit in limits]
            rows += [evaluate.list_cut(spec, levels, level) for level in chosen]
        else:
            rows += [evaluate.fixed_cut(spec, cut, share) for share in shares]
    return [r for r in rows if r is full or r.widths != full.widths]


def sweep(config: Any, *, workdir: str, out: str, overwrite: bool, resume: bool) -> str:
    """The table of criteria against cuts, written after every criterion."""
    main = checkpoint.load_supernet(workdir)
    facts = main.provenance
    name = facts.get("trained", facts.get("criterion", "as trained"))
    networks = {name: main.params}
    for name in _listed(config.compare):
        networks[name] = checkpoint.load_supernet(f"{workdir}-{name}").params
    folder = pathlib.Path(out or f"{workdir.rstrip('/')}-sweep")
    done = _finished(folder / "sweep.json", overwrite=overwrite, resume=resume)
    networks = {
        k: v for k, v in networks.items() if k not in {r["criterion"] for r in done}
    }
    cuts = cuts_of(main, config.cuts, config.kept, every=config.every)
    batches = feed.batches_of(config.data, main.spec, seed=config.seed)
    title = f"{batches.num_examples} images of {batches.source.name}"
    writes = jax.process_index() == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
        title_of_list = "What each block keeps, level by level"
        heat = report.list_figure(main.dropout_list, main.spec, title=title_of_list)
        heat.savefig(folder / "list.png", dpi=150)

    def keep(name, fresh):
        done.extend(fresh)
        if writes:
            report.write(folder, done, title=title)
        _LOG.info("%s: %d rows of %d images", name, len(fresh), fresh[0]["images"])

    run_sweep(
        networks,
        ViT(main.spec, dtype=dtype_named(config.dtype)),
        batches,
        cuts,
        after_each=keep,
    )
    return f"{report.table(done)}\n\nwrote {folder}/sweep.json, sweep.csv, sweep.png, list.png"


def _finished(path: pathlib.Path, *, overwrite: bool, resume: bool) -> report.Rows:
    """Rows to keep from an earlier, perhaps interrupted sweep."""
    if not path.exists() or overwrite:
        return []
    if not resume:
        raise ValueError(
            f"{path} is there: pass --resume to add the criteria it lacks, --overwrite "
            "to start again, or another --out."
        )
    return report.read(path)


def run_sweep(networks, model, batches, cuts, *, after_each=lambda name, rows: None):
    """`evaluate.sweep` over the mesh, with a progress bar."""
    mesh = sharding.mesh()
    total = len(networks) * len(cuts) * len(batches) * batches.batch_size
    with feed.progress("sweep", total) as bar:
        return evaluate.sweep(
            {name: feed.placed(p, mesh) for name, p in networks.items()},
            model,
            feed.OnMesh(batches, mesh),
            cuts,
            progress=bar.update,
            after_each=after_each,
        )


def extract(*, workdir: str, out: str, overwrite: bool, cost: Any, limit: float) -> str:
    """The largest sub-network of a super-network within a budget, on its own.

    Args:
      cost: function of (spec, widths) the budget is counted in.
      limit: the most it may be; at most 1 is a share of the full network.
    """
    supernet = checkpoint.load_supernet(workdir)
    small, level = subnet_within(supernet, cost=cost, limit=limit)
    facts = {"parent": pathlib.Path(workdir).name, "level": level}
    facts["supernet"] = supernet.provenance
    small = small._replace(provenance=facts)
    checkpoint.save_subnet(out, small, overwrite=overwrite)
    count = macs.macs(small.spec, small.widths)
    return (
        f"wrote {out}: level {level} of {int(supernet.dropout_list.levels)}, "
        f"{macs.readable(count)} of {macs.readable(macs.macs(small.spec))} MACs (full "
        f"count), {macs.readable(macs.param_count(small.spec, small.widths))} parameters"
    )


def subnet_within(supernet: SuperNet, *, cost: Any, limit: float) -> tuple[SubNet, int]:
    """The largest sub-network within a budget, and its level."""
    spec = supernet.spec
    if limit <= 0:
        raise ValueError(f"a budget of {limit} must be positive.")
    if limit <= 1:
        limit = int(limit * cost(spec, SubnetSpec.full(spec)))
    level = piad.level_for(supernet.dropout_list, spec, int(limit), cost=cost)
    widths = supernet.dropout_list.widths(level, spec)
    params = subnet.extract(supernet.params, widths)
    return SubNet(params, spec, widths, {"level": level}), level
