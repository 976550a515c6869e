"""What every system starts from, and the directories it leaves."""

import pathlib
from typing import Any

from flax_skd.io import checkpoint
from flax_skd.io.checkpoint import Subnet, Supernet
from flax_skd.method import subnet
from flax_skd.method.spec import ViTSpec
from flax_skd.method.vit import Params
from flax_skd.run import commands
from flax_skd.run.programs import beside


def network(config: Any) -> Supernet:
    """The full network of `model.path`, in float32, with the levels it has.

    Raises:
      ValueError: if no directory is named, or it holds no super-network.
    """
    if not config.model.path:
        raise ValueError(
            f"program {config.program!r} starts from a directory: give "
            "--config.model.path, which train, convert or contract wrote."
        )
    return named(config.model.path)


def named(path: str) -> Supernet:
    """A super-network of a directory, in float32, without what repairs its cuts."""
    found = checkpoint.load_supernet(path)
    return found._replace(params=commands.in_float32(found.params), compensation=None)


def save_sizes(
    directory: pathlib.Path,
    sizes: dict[str, tuple[Params, ViTSpec]],
    facts: dict[str, Any],
) -> None:
    """Writes networks of other sizes beside a super-network: `network-NAME`.

    Args:
      directory: of the super-network.
      sizes: name -> parameters and spec of an ordinary network; the parameters may
        be those of a sub-network of the spec.
      facts: of the training, as provenance.
    """
    for name, (params, spec) in sizes.items():
        target = beside(directory, name)
        widths = subnet.widths_of(params, spec)
        small = Subnet(params, spec, widths, {**facts, "size": name})
        checkpoint.save_subnet(target, small, overwrite=target.exists())
