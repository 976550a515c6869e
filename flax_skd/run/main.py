"""flax-skd: the command line."""

import logging
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import flags
from absl import logging as absl_logging

from flax_skd.io.extras import require
from flax_skd.method import macs
from flax_skd.run import (
    commands,
    config_files,
    contracting,
    demo,
    distributed,
    sweeping,
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
    "fast": ("boolean", False, "a shorter training, under a minute in all"),
    "seed": ("integer", 0, "of the trainings"),
    "coordinator": ("string", None, "HOST:PORT of the first of several processes"),
    "processes": ("integer", None, "how many processes (a TPU pod needs no flag)"),
    "process": ("integer", None, "which of them this is, from 0"),
    "distributed": ("boolean", False, "find the processes by Slurm or Open MPI"),
}
HOSTS = ("coordinator", "processes", "process", "distributed")


def _extract(f: Any) -> str:
    given = {
        k: v for k in ("budget", "macs", "params") if (v := f[k].value) is not None
    }
    if len(given) != 1:
        raise ValueError(
            "give exactly one of --budget (share of the MACs), --macs and --params; "
            f"got {sorted(given) or 'none'}."
        )
    ((kind, limit),) = given.items()
    if (kind == "budget") != (limit <= 1):
        raise ValueError(
            f"--{kind}={limit:g}: --budget is a share, above 0 and at most 1; --macs and "
            "--params are counts."
        )
    cost = macs.param_count if kind == "params" else macs.macs
    return commands.extract(
        workdir=f.workdir, out=f.out, overwrite=f.overwrite, cost=cost, limit=limit
    )


COMMANDS = {
    "demo": Command(
        "train, contract, sweep and extract a small ViT on handwritten digits",
        "[--fast]",
        "",
        ("out", "overwrite", "fast", "seed"),
        lambda f: demo.run(
            f.out or "flax_skd_demo", overwrite=f.overwrite, fast=f.fast, seed=f.seed
        ),
    ),
    "convert": Command(
        "read a checkpoint of another library into --workdir (or write timm's "
        "format, if that ends in .safetensors)",
        "--config.model.path=FILE --config.model.variant=Ti/16 "
        "--config.model.recipe=augreg --workdir=DIR",
        "convert.py",
        ("workdir", "overwrite"),
        lambda f: commands.convert(f.config, workdir=f.workdir, overwrite=f.overwrite),
    ),
    "contract": Command(
        "turn a pre-trained ViT into a super-network in --workdir",
        "--config=configs/wpac.py:Ti/16 --config.model.path=FILE "
        "--config.model.recipe=augreg --config.data.source=tar:IMAGES.tar --workdir=DIR",
        "wpac.py",
        ("workdir", "overwrite", *HOSTS),
        lambda f: contracting.contract(
            f.config, workdir=f.workdir, overwrite=f.overwrite
        ),
    ),
    "train": Command(
        "train a ViT from scratch; checkpoints, log and the network go to --workdir",
        "--config=configs/scratch.py --workdir=DIR",
        "scratch.py",
        ("workdir", "overwrite", "resume", *HOSTS),
        lambda f: training.train(
            f.config, workdir=f.workdir, overwrite=f.overwrite, resume=f.resume
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
        ("workdir", "out", "overwrite", "budget", "macs", "params"),
        _extract,
    ),
}
REQUIRED = {"extract": ("workdir", "out"), "demo": ()}


def overview() -> str:
    """What `flax-skd --help` prints."""
    lines = ["flax-skd: one Vision Transformer, every size.", ""]
    lines += ["usage: flax-skd COMMAND [--flag=value ...]", ""]
    lines += [f"  {name:9}{c.summary}" for name, c in COMMANDS.items()]
    lines += ["", "flax-skd COMMAND --help shows flags, config and an example."]
    return "\n".join(lines)


def command_help(name: str) -> str:
    """What `flax-skd COMMAND --help` prints."""
    command = COMMANDS[name]
    lines = [f"flax-skd {name}: {command.summary}.", ""]
    lines += ["example:", f"  flax-skd {name} {command.example}", "", "flags:"]
    lines += [f"  --{flag:11}{FLAGS[flag][2]}" for flag in command.flags]
    if command.config:
        lines += [f"  --{'config':11}config file[:variant]; configs/{command.config}"]
        lines += ["  --config.x   change one entry of it:", ""]
        lines += _entries(f"configs/{command.config}")
    return "\n".join(lines)


def _entries(config: str) -> list[str]:
    """What a config file sets, then what the file it starts from sets."""
    text = pathlib.Path(config_files.find(config)).read_text()
    lines = [line.strip() for line in text.splitlines()]
    lines = [
        "    " + line.replace("config.", "--config.", 1).replace("placeholder", "")
        for line in lines
        if line.startswith("config.") and "ConfigDict()" not in line
    ]
    base = re.search(r"config_files\.load\(f?.(configs/\w+\.py)", text)
    if base:
        lines += ["", f"    of {base[1]}, where not set above:", *_entries(base[1])]
    return lines


def parse(name: str, arguments: list[str]) -> flags.FlagValues:
    """The flags of one command, each call its own."""
    command, values = COMMANDS[name], flags.FlagValues()
    kinds = {
        "string": flags.DEFINE_string,
        "boolean": flags.DEFINE_boolean,
        "integer": flags.DEFINE_integer,
        "float": flags.DEFINE_float,
    }
    for flag in command.flags:
        kind, default, text = FLAGS[flag]
        kinds[kind](flag, default, text, flag_values=values)
    if command.config:
        path, arguments = _split_config(arguments, f"configs/{command.config}")
        config_flags = require("ml_collections.config_flags")
        config_flags.DEFINE_config_dict(
            "config",
            config_files.load(path),
            lock_config=True,
            flag_values=values,
            sys_argv=[name, *arguments],
        )
    rest = values([f"flax-skd {name}", *arguments])[1:]
    if rest:
        raise ValueError(f"surplus arguments {rest}: flags look like --name=value.")
    for flag in REQUIRED.get(name, ("workdir",)):
        if not values[flag].value:
            raise ValueError(f"--{flag} is needed; see flax-skd {name} --help.")
    return values


def _split_config(arguments: list[str], path: str) -> tuple[str, list[str]]:
    """Takes `--config=FILE` or `--config FILE` out; `path` if there is none."""
    others, rest = [], iter(arguments)
    for argument in rest:
        head, equals, value = argument.partition("=")
        if head in ("--config", "-config"):
            path = value if equals else next(rest, "")
        else:
            others.append(argument)
    return path, others


def main(arguments: list[str]) -> int:
    """Runs one command.

    Args:
      arguments: without the program's name.

    Returns:
      The exit status: 0, 1 for an error of the input, 2 for one of the call.
    """
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h", "help"):
        print(overview())
        return 0
    if name not in COMMANDS:
        print(f"flax-skd: no command {name!r}.\n\n{overview()}", file=sys.stderr)
        return 2
    if {"--help", "-h", "-help"} & set(rest):
        print(command_help(name))
        return 0
    _show_log()
    try:
        values = parse(name, rest)
    except (flags.Error, ValueError, TypeError) as error:
        print(f"flax-skd {name}: {error}", file=sys.stderr)
        return 2
    except (AttributeError, KeyError) as error:
        # ml_collections raises either for an entry that a locked config lacks.
        entry = str(error.args[0]).strip("\"'")
        lists = f"flax-skd {name} --help lists them"
        print(
            f"flax-skd {name}: no entry {entry!r} in the config; {lists}.",
            file=sys.stderr,
        )
        return 2
    try:
        if "coordinator" in COMMANDS[name].flags:
            distributed.start(
                coordinator=values.coordinator,
                processes=values.processes,
                process=values.process,
                detect=values.distributed,
            )
        if jax.process_index():
            logging.getLogger("flax_skd").setLevel(logging.WARNING)  # one log a run
        done = COMMANDS[name].run(values)
        if jax.process_index() == 0:
            print(done)
    except (ValueError, ImportError, OSError) as error:
        print(f"flax-skd {name}: {error}", file=sys.stderr)
        return 1
    return 0


def _show_log() -> None:
    """Our log lines from INFO on, those of the libraries from WARNING on."""
    ours = logging.getLogger("flax_skd")
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        ours.addHandler(handler)
        ours.propagate = False
    ours.setLevel(logging.INFO)
    absl_logging.set_verbosity(absl_logging.WARNING)


def cli() -> None:
    """The console script."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    cli()
