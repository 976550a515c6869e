"""The table of subcommands: what each takes, and the function that runs it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from flax_skd.method import macs
from flax_skd.run import (
    commands,
    contracting,
    demo,
    exporting,
    profiling,
    recalibrating,
    sweeping,
    time_budget,
    training,
)


class Command(NamedTuple):
    """One subcommand.

    Attributes:
      summary: one line.
      example: arguments that make sense.
      config: the config file it reads unless told otherwise, or none.
      flags: names of `FLAGS` it takes.
      run: function of the parsed flags -> what to print.
    """

    summary: str
    example: str
    config: str
    flags: tuple[str, ...]
    run: Callable[[Any], str]


FLAGS = {  # name: (kind, default, help)
    "workdir": ("string", None, "directory to work in (see the summary)"),
    "out": ("string", "", "directory to write"),
    "overwrite": ("boolean", False, "replace what an earlier run left"),
    "resume": ("boolean", False, "go on where an earlier run stopped"),
    "budget": ("float", None, "share of the full network's MACs (full count), 0 to 1"),
    "macs": ("float", None, "most multiply-accumulates an image (full count)"),
    "params": ("float", None, "most parameters"),
    "latency_ms": ("float", None, "most milliseconds a batch of 1 (with --profile)"),
    "images_per_s": ("float", None, "least images a second (with --profile)"),
    "profile": ("string", "", "directory that flax-skd profile wrote on this device"),
    "batch_size": ("integer", None, "of --latency_ms or --images_per_s, as profiled"),
    "recalibrate": ("string", "", "source of images to fit the sub-network to"),
    "recalibrate_images": ("integer", 1000, "how many of them at most"),
    "formats": (
        "string",
        "safetensors",
        "to write, between commas; any other lists all",
    ),
    "budgets": ("string", "", "shares of the MACs, between commas: 0.25,0.5,0.75,1.0"),
    "measured": ("string", "", "a sweep.json to take accuracies from"),
    "licence": ("string", "", "of the source weights, for the model cards"),
    "platforms": ("string", "cpu,cuda,tpu", "of format jax_export"),
    "opset": ("integer", 20, "of format onnx"),
    "fast": ("boolean", False, "a shorter training, under a minute in all"),
    "seed": ("integer", 0, "of the trainings"),
    "coordinator": ("string", None, "HOST:PORT of the first of several processes"),
    "processes": ("integer", None, "how many processes (a TPU pod needs no flag)"),
    "process": ("integer", None, "which of them this is, from 0"),
    "distributed": ("boolean", False, "find the processes by Slurm or Open MPI"),
}
HOSTS = ("coordinator", "processes", "process", "distributed")


BUDGETS = ("budget", "macs", "params", "latency_ms", "images_per_s")


def _extract(f: Any) -> str:
    given = {k: v for k in BUDGETS if (v := f[k].value) is not None}
    if len(given) != 1:
        raise ValueError(
            "give exactly one of --budget (share of the MACs), --macs, --params, "
            f"--latency_ms and --images_per_s; got {sorted(given) or 'none'}."
        )
    fit = None
    if f.recalibrate:
        fit = recalibrating.fitted_to(f.recalibrate, images=f.recalibrate_images)
    write = functools.partial(
        commands.extract, workdir=f.workdir, out=f.out, overwrite=f.overwrite, fit=fit
    )
    ((kind, limit),) = given.items()
    if not 0 < limit < float("inf"):
        raise ValueError(f"--{kind}={limit:g} must be a number above 0.")
    if kind in ("latency_ms", "images_per_s"):
        profile = time_budget.read(f.profile)
        fits = time_budget.budget(profile, **given, batch_size=f.batch_size)
        return write(cost=fits.cost, limit=fits.limit, prepare=fits.prepare)
    if (kind == "budget") != (limit <= 1):
        raise ValueError(
            f"--{kind}={limit:g}: --budget is a share, above 0 and at most 1; --macs and "
            "--params are counts."
        )
    cost = macs.param_count if kind == "params" else macs.macs
    return write(cost=cost, limit=limit)


def _export(f: Any) -> str:
    return exporting.export(
        workdir=f.workdir,
        out=f.out,
        formats=f.formats,
        budgets=f.budgets,
        overwrite=f.overwrite,
        options={
            "platforms": tuple(commands.listed(f.platforms)),
            "opset": f.opset,
        },
        measured=f.measured,
        licence=f.licence,
    )


def table(others: training.Programs) -> dict[str, Command]:
    """Every subcommand by its name.

    Args:
      others: programs that `train` runs beside its own.
    """
    return {
        "demo": Command(
            "train, contract, sweep and extract a small ViT on handwritten digits",
            "[--fast]",
            "",
            ("out", "overwrite", "fast", "seed"),
            lambda f: demo.run(
                f.out or "flax_skd_demo",
                overwrite=f.overwrite,
                fast=f.fast,
                seed=f.seed,
            ),
        ),
        "convert": Command(
            "read a checkpoint of another library into --workdir (or write timm's "
            "format, if that ends in .safetensors)",
            "--config.model.path=FILE --config.model.variant=Ti/16 "
            "--config.model.recipe=augreg --workdir=DIR",
            "convert.py",
            ("workdir", "overwrite"),
            lambda f: commands.convert(
                f.config, workdir=f.workdir, overwrite=f.overwrite
            ),
        ),
        "contract": Command(
            "turn a pre-trained ViT into a super-network in --workdir",
            "--config=configs/balanced.py:Ti/16 --config.model.path=FILE "
            "--config.model.recipe=augreg --config.data.source=tar:IMAGES.tar --workdir=DIR",
            "balanced.py",
            ("workdir", "overwrite", *HOSTS),
            lambda f: contracting.contract(
                f.config, workdir=f.workdir, overwrite=f.overwrite
            ),
        ),
        "train": Command(
            "train the network that --config says (scratch.py, transfer.py, piad.py, "
            "finetune.py, rivals/...); checkpoints, log and it go to --workdir",
            "--config=configs/scratch.py --workdir=DIR",
            "scratch.py",
            ("workdir", "overwrite", "resume", *HOSTS),
            lambda f: training.train(
                f.config,
                workdir=f.workdir,
                overwrite=f.overwrite,
                resume=f.resume,
                others=others,
            ),
        ),
        "sweep": Command(
            "accuracy of sub-networks of the super-network in --workdir: table and figure",
            "--workdir=DIR --config.data.source=tar:IMAGES.tar",
            "sweep.py",
            ("workdir", "out", "overwrite", "resume", *HOSTS),
            lambda f: sweeping.sweep(
                f.config,
                workdir=f.workdir,
                out=f.out,
                overwrite=f.overwrite,
                resume=f.resume,
            ),
        ),
        "extract": Command(
            "cut the largest sub-network within a budget out of the super-network in "
            "--workdir and write it to --out",
            "--workdir=DIR --out=SMALL --budget=0.5",
            "",
            (
                *("workdir", "out", "overwrite", *BUDGETS, "profile", "batch_size"),
                *("recalibrate", "recalibrate_images"),
            ),
            _extract,
        ),
        "profile": Command(
            "measure what sub-networks of the super-network in --workdir take on this "
            "device, for budgets in time, and write it to --out",
            "--workdir=DIR --out=PROFILE",
            "profile.py",
            ("workdir", "out", "overwrite"),
            lambda f: profiling.profile(
                f.config, workdir=f.workdir, out=f.out, overwrite=f.overwrite
            ),
        ),
        "export": Command(
            "write sub-networks of the super-network, or the one sub-network, in --workdir "
            "in other programs' formats, with cards, an index and a figure",
            "--workdir=DIR --out=EXPORTS --formats=flax,timm,onnx --budgets=0.5,1.0",
            "",
            (
                *("workdir", "out", "overwrite", "formats", "budgets", "measured"),
                *("licence", "platforms", "opset"),
            ),
            _export,
        ),
    }


REQUIRED = {
    **dict.fromkeys(("extract", "export", "profile"), ("workdir", "out")),
    "demo": (),
}
