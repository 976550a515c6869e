"""Convert and extract, and what all commands share: networks, statistics, words."""

import fractions
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flax_skd
from flax_skd.io import checkpoint, conversion, data, directory
from flax_skd.io.checkpoint import Subnet, Supernet
from flax_skd.io.source_fields import RECIPES
from flax_skd.method import compensation, costs, macs, piad, statistics, subnet
from flax_skd.method.spec import ViTSpec
from flax_skd.method.vit import ViT
from flax_skd.run import feed, sharding

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def load_network(model: Any) -> Supernet:
    """A network from a weights file of any family, or a directory of ours.

    Args:
      model: the `model` section of a config.

    Returns:
      A `Supernet`; of a weights file it has one level, the full network.

    Raises:
      ValueError: if nothing is named, or the file does not hold a plain ViT.
    """
    if not model.path:
        raise ValueError(
            "no network: give --config.model.path, a weights file or a directory that "
            "convert, train or contract wrote."
        )
    path = pathlib.Path(model.path).expanduser()
    if (path / checkpoint.SUPERNET_FILES[0]).is_file():
        network = checkpoint.load_supernet(path)
        _check_says_the_same(model, network.spec, path)
        if model.image_size not in (0, network.spec.image_size):
            raise ValueError(
                f"{path} holds a network for {network.spec.image_size} pixels, not "
                f"{model.image_size}: resample when converting the weights file."
            )
        return network._replace(params=in_float32(network.params))
    source = conversion.read(
        path,
        variant=model.variant or None,
        recipe=model.recipe or None,
        fields={k: v for k, v in model.fields.items() if v is not None},
        image_size=model.image_size or None,
        entry=model.get("entry", "") or None,
    )
    facts = {"file": path.name, "sha256": source.sha256, "family": source.family}
    one_level = piad.uniform(source.spec, steps=1)
    return Supernet(source.params, source.spec, one_level, {"source": facts})


def _check_says_the_same(model: Any, spec: ViTSpec, path: pathlib.Path) -> None:
    """Refuses what a weights file needs where it would change a directory of ours."""
    if model.recipe and model.recipe not in RECIPES:
        raise ValueError(
            f"recipe {model.recipe!r}: choose one of {', '.join(RECIPES)}, or none for a "
            "directory, which states all of its network."
        )
    told = dict(RECIPES.get(model.recipe, {}))
    told |= {k: v for k, v in model.fields.items() if v is not None}
    wrong = [
        f"{name} = {getattr(spec, name)!r}, not {value!r}"
        for name, value in told.items()
        if getattr(spec, name, value) != value
    ]
    if model.get("entry", ""):
        wrong.append(f"one network, and no entry {model.entry!r}")
    if wrong:
        raise ValueError(
            f"{path} holds {'; '.join(wrong)}, as model.recipe and model.fields have it: "
            "what a file cannot tell is said where it is converted."
        )


def in_float32(params: Any) -> Any:
    """Parameters to compute with, whatever precision they were stored in."""
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def convert(config: Any, *, workdir: str, overwrite: bool) -> str:
    """A weights file to a directory of ours, or to timm safetensors by its name."""
    network = load_network(config.model)
    if workdir.endswith(".safetensors"):
        if directory.local(workdir).exists() and not overwrite:
            raise ValueError(f"{workdir} exists: name another, or pass --overwrite.")
        if config.dtype != "float32":
            raise ValueError(
                f"dtype {config.dtype!r}: timm's format is written in float32; leave "
                "--config.dtype away, or name a directory."
            )
        conversion.write_timm(workdir, network.params, network.spec)
    else:
        dtype = dtype_named(config.dtype)
        stored = jax.tree.map(lambda x: np.asarray(x, dtype), network.params)
        network = network._replace(params=stored)
        checkpoint.save_supernet(workdir, stamped(network, {}), overwrite=overwrite)
    count = macs.param_count(network.spec)
    return f"wrote {workdir}: {count:,} parameters, {network.spec}"


def stamped(network: Supernet, facts: dict[str, Any]) -> Supernet:
    """The network with more provenance and the version of this package."""
    facts = {**network.provenance, **facts, "flax_skd": flax_skd.__version__}
    return network._replace(provenance=facts)


def calibrate(
    network: Supernet,
    batches: data.EvalBatches,
    *,
    cost: str,
    dtype: Any,
    weightings: tuple[str, ...],
    moments: tuple[str, ...] = (),
    hidden_every: int = 1,
) -> statistics.Statistics:
    """The statistics pass over the mesh, with a progress bar."""
    mesh, spec = sharding.mesh(), network.spec
    with feed.progress("statistics", batches.num_examples) as bar:

        def counted():
            for batch in feed.OnMesh(batches, mesh):
                yield batch
                bar.update(min(len(batch["weight"]), bar.total - bar.n))

        found = statistics.collect(
            ViT(spec, dtype=dtype),
            sharding.gathered(network.params, mesh),
            counted(),
            cost=costs.cost_named(cost, spec.num_classes),
            weightings=weightings,
            moments=moments,
            hidden_every=hidden_every,
        )
    # The same on every host, and what follows is done by each for itself.
    return jax.device_get(found)


def dtype_named(name: str) -> Any:
    """A dtype of computation; an unknown name lists the known ones."""
    if name not in DTYPES:
        raise ValueError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def shares(name: str, text: str) -> list[float]:
    """Shares between commas, such as 1/4,0.5; the error names what they are of."""
    try:
        return [float(fractions.Fraction(part)) for part in listed(text)]
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{name} = {text!r}: write shares like 1/4,0.5,3/4."
        ) from error


def listed(text: str) -> list[str]:
    """The parts of a text between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def extract(
    *,
    workdir: str,
    out: str,
    overwrite: bool,
    cost: Any,
    limit: float,
    fit: Callable[..., Any] | None = None,
    prepare: Callable[[Supernet], Supernet] = lambda supernet: supernet,
) -> str:
    """The largest sub-network of a super-network within a budget, on its own.

    Args:
      cost: function of (spec, widths) the budget is counted in.
      limit: the most it may be; at most 1 is a share of the full network.
      fit: function (supernet, widths) -> `recalibrating.Recalibrated`, or none.
      prepare: what is done to the super-network first.
    """
    # Before a fit of minutes.
    directory.check_target(directory.local(out), checkpoint.SUBNET_FILES, overwrite)
    supernet = prepare(checkpoint.load_supernet(workdir))
    small, level = subnet_within(supernet, cost=cost, limit=limit)
    facts = {
        "parent": directory.local(workdir).name,
        "supernet_sha256": checkpoint.supernet_sum(workdir),
        "level": level,
        "supernet": supernet.provenance,
    }
    if fit is not None:
        done = fit(supernet, small.widths)
        small = small._replace(params=subnet.extract(done.params, small.widths))
        facts["recalibrated"] = {"chosen": done.chosen, "kl": done.kl}
    small = small._replace(provenance=facts)
    checkpoint.save_subnet(out, small, overwrite=overwrite)
    count = macs.macs(small.spec, small.widths)
    return (
        f"wrote {out}: level {level} of {int(supernet.dropout_list.levels)}, "
        f"{macs.readable(count)} of {macs.readable(macs.macs(small.spec))} MACs (full "
        f"count), {macs.readable(macs.param_count(small.spec, small.widths))} parameters"
    )


def subnet_within(supernet: Supernet, *, cost: Any, limit: float) -> tuple[Subnet, int]:
    """The largest sub-network within a budget, repaired if it can be, and its level."""
    spec = supernet.spec
    if limit <= 0:
        raise ValueError(f"a budget of {limit} must be positive.")
    level = piad.level_within(supernet.dropout_list, spec, limit, cost=cost)
    widths = supernet.dropout_list.widths(level, spec)
    whole = compensation.repaired(supernet.params, spec, supernet.compensation, widths)
    # On the host: a slice on a device is compiled, one for every width.
    params = subnet.extract(jax.device_get(whole), widths)
    return Subnet(params, spec, widths, {"level": level}), level
