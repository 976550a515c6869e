"""flax-skd: the command line."""

import logging
import os
import platform
import signal
import sys
from typing import Any

import jax
from absl import flags
from absl import logging as absl_logging

import flax_skd
from flax_skd.io import processes
from flax_skd.io.extras import require
from flax_skd.rivals import table
from flax_skd.run import config_files, distributed, subcommands
from flax_skd.run.subcommands import FLAGS, REQUIRED

INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it
COMMANDS = subcommands.table(table.PROGRAMS)


def overview() -> str:
    """What `flax-skd --help` prints."""
    lines = ["flax-skd: one Vision Transformer, every size.", ""]
    lines += ["usage: flax-skd COMMAND [--flag=value ...]", ""]
    lines += [f"  {name:9}{c.summary}" for name, c in COMMANDS.items()]
    lines += ["", "flax-skd COMMAND --help shows flags, config and an example."]
    return "\n".join(lines)


def command_help(name: str, config: str = "") -> str:
    """What `flax-skd COMMAND --help` prints; `config` is the file asked for, if any."""
    command = COMMANDS[name]
    lines = [f"flax-skd {name}: {command.summary}.", ""]
    lines += ["example:", f"  flax-skd {name} {command.example}", "", "flags:"]
    width = max(map(len, (*command.flags, "config.x"))) + 2
    lines += [f"  --{flag:{width}}{FLAGS[flag][2]}" for flag in command.flags]
    if command.config:
        lines += [
            f"  --{'config':{width}}config file[:variant]; configs/{command.config}"
        ]
        lines += [f"  --{'config.x':{width}}change one entry of it:", ""]
        lines += _entries(config or f"configs/{command.config}")
    return "\n".join(lines)


def _entries(config: str) -> list[str]:
    """A line for each entry of a config: name, value, comment."""
    lines = []
    for name, value, comment in config_files.entries(config):
        line = f"    --config.{name} = {'' if value is None else repr(value)}".rstrip()
        lines.append(f"{line}  # {comment}" if comment else line)
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
        config = config_files.load(path)
        _check_serves(name, path, config)
        config_flags.DEFINE_config_dict(
            "config",
            config,
            lock_config=True,
            flag_values=values,
            sys_argv=[name, *arguments],
        )
    rest = values([f"flax-skd {name}", *arguments])[1:]
    if rest:
        raise ValueError(f"surplus arguments {rest}: flags look like --name=value.")
    for flag in ("workdir", "out", "profile", "measured"):
        if flag in command.flags and values[flag].value:
            values[flag].value = _path(values[flag].value)
    for flag in REQUIRED.get(name, ("workdir",)):
        if not values[flag].value:
            raise ValueError(f"--{flag} is needed; see flax-skd {name} --help.")
    return values


def _path(text: str) -> str:
    """A path with the name of what it is last, to which names of others are added."""
    # A shell completes a folder with /, and leaves the ~ of --flag=~/x to us.
    path = os.path.expanduser(text).rstrip("/") or "/"
    return path if os.path.basename(path).strip(".") else os.path.abspath(path)


def _check_serves(name: str, path: str, config: Any) -> None:
    """Raises ValueError if the config file of another command was given."""
    default = f"configs/{COMMANDS[name].config}"
    missing = set(config_files.load(default)) - set(config)
    if missing and name != "train":  # which reads configs of many programs
        raise ValueError(
            f"{path} is no config of {name}: it lacks {', '.join(sorted(missing))}. "
            f"Take {default}, or one like it."
        )


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
      The exit status: 0, 1 for an error of the input, 2 for one of the call, 130 for
      an interruption (Ctrl-C).
    """
    name, *rest = arguments or ["--help"]
    if name in ("--help", "-h", "help"):
        print(overview())
        return 0
    if name in ("--version", "version"):
        python = platform.python_version()
        print(
            f"flax-skd {flax_skd.__version__} (jax {jax.__version__}, Python {python})"
        )
        return 0
    if name not in COMMANDS:
        print(f"flax-skd: no command {name!r}.\n\n{overview()}", file=sys.stderr)
        return 2
    if {"--help", "-h", "-help"} & set(rest):
        try:
            print(command_help(name, _split_config(rest, "")[0]))
        except (ValueError, OSError) as error:
            print(f"flax-skd {name}: {error}", file=sys.stderr)
            return 2
        return 0
    _show_log()
    try:
        values = _values(name, rest)
    except (flags.Error, ValueError, TypeError) as error:
        print(f"flax-skd {name}: {error}", file=sys.stderr)
        return 2
    return _run(name, values)


def _values(name: str, arguments: list[str]) -> flags.FlagValues:
    """`parse`; for an entry that the config lacks, its whole name and where it lacks."""
    try:
        return parse(name, arguments)
    except (AttributeError, KeyError) as error:
        # ml_collections raises either for an entry that a locked config lacks.
        entry, *hints = str(error.args[0]).strip("\"'").replace("\\n", "\n").split("\n")
        hint = f" {hints[0]}" if hints else ""
        path, others = _split_config(arguments, f"configs/{COMMANDS[name].config}")
        raise ValueError(
            f"no entry {_entry(_bare(entry), others)!r} in {path}; flax-skd {name} "
            f"--config={path} --help lists them.{hint}"
        ) from error


def _run(name: str, values: flags.FlagValues) -> int:
    """Runs a command whose flags are good; returns the exit status."""
    try:
        if "coordinator" in COMMANDS[name].flags:
            distributed.start(
                coordinator=values.coordinator,
                processes=values.processes,
                process=values.process,
                detect=values.distributed,
            )
            processes.check_alike(_told(name, values))
            if name != "train" and jax.distributed.is_initialized():
                # JAX catches it, for a run to save its state; others have none.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if jax.process_index():
            logging.getLogger("flax_skd").setLevel(logging.WARNING)  # one log a run
        done = COMMANDS[name].run(values)
        if jax.process_index() == 0:
            print(done)
    except (ValueError, ImportError, OSError) as error:
        print(f"flax-skd {name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"flax-skd {name}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _told(name: str, values: flags.FlagValues) -> dict[str, Any]:
    """The command and its flags, but for which process this is."""
    names = set(COMMANDS[name].flags) - set(subcommands.HOSTS)
    told = {flag: values[flag].value for flag in sorted(names)}
    return {"command": name, **told, "config": values.config.to_dict()}


def _entry(last: str, arguments: list[str]) -> str:
    """The whole name of an entry, whose last part alone ml_collections tells."""
    names = [argument.partition("=")[0].lstrip("-") for argument in arguments]
    found = [n for n in names if n.startswith("config.") and n.endswith(f".{last}")]
    return found[0].removeprefix("config.") if found else last


def _bare(entry: str) -> str:
    """An entry's name without the quotes and words that ml_collections puts around it."""
    return entry.strip("\\\"'")


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
    status = main(sys.argv[1:])
    if status == INTERRUPTED:
        # A compilation that goes on in a thread of XLA's crashes an ordinary exit.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    cli()
