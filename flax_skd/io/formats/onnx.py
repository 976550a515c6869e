"""A sub-network as one ONNX file, by jax2onnx.

jax2onnx pins an orbax-checkpoint older than a fresh one, so this module imports neither
orbax nor what needs it, and runs from a sub-network directory alone:

    python -m flax_skd.io.formats.onnx SUBNET_DIR OUT

OUT is a file, NAME.onnx, or the folder that `write` makes; in an export its card is told.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import shlex
import sys

from flax_skd.io import checkpoint, model_card
from flax_skd.io import directory as folder
from flax_skd.io.checkpoint import Subnet
from flax_skd.io.extras import require
from flax_skd.io.formats import folding
from flax_skd.method.vit import ViT

FILES = ("config.json", "model.onnx")
OPSET = 20  # the first with Gelu
_ENVIRONMENT = "onnx_env"
_OLDEST = 15  # Shape with `start`, which a batch of any size needs


def convert(network: Subnet, *, opset: int = OPSET) -> bytes:
    """The content of an ONNX file: `images` [B, S, S, C] float32 -> `logits` [B, K].

    Images are normalised, channels last, B any number.

    Args:
      network: a sub-network.
      opset: version of ONNX's operators.

    Raises:
      ValueError: if the network is empty, or the opset cannot hold it.
      ImportError: if jax2onnx is not installed.
    """
    folding.check_kept(network.widths)
    check_opset(opset)
    jax2onnx, onnx = require("jax2onnx"), require("onnx")
    newest = onnx.defs.onnx_opset_version()
    if opset > newest:
        raise ValueError(
            f"opset {opset}: the installed onnx knows {_OLDEST} to {newest}."
        )
    spec = network.spec
    params = folding.in_float32(network.params)
    model = ViT(spec, network.widths)
    # It warns of every shape it need not store.
    logging.getLogger("onnx_ir.serde").setLevel(logging.ERROR)
    proto = jax2onnx.to_onnx(
        lambda images: model.apply({"params": params}, images),
        [("B", spec.image_size, spec.image_size, spec.in_channels)],
        model_name="flax_skd",
        opset=opset,
        input_names=["images"],
        output_names=["logits"],
    )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ValueError(
            f"opset {opset} does not hold this network ({error}): use {OPSET}."
        ) from error
    return proto.SerializeToString()


def check_opset(opset: int) -> None:
    """Raises ValueError for an opset too old; how new one may be, onnx knows."""
    if opset < _OLDEST:
        raise ValueError(
            f"opset {opset} is too old for batches of any size: use {_OLDEST} or newer "
            f"({OPSET} unless your runtime asks for another)."
        )


def write(
    directory: str | os.PathLike,
    network: Subnet,
    *,
    opset: int = OPSET,
    overwrite: bool = False,
) -> None:
    """Writes `model.onnx` and `config.json`, which states the preprocessing.

    Raises:
      ValueError: as `convert`, or if the directory may not be written.
      ImportError: if jax2onnx is not installed.
    """
    content = convert(network, opset=opset)
    facts = {"opset": opset, "preprocessing": folding.preprocessing(network.spec)}
    folder.write_files(
        directory, FILES, "onnx export", facts, content, overwrite=overwrite
    )


def installed() -> bool:
    """Whether jax2onnx can be imported here."""
    return importlib.util.find_spec("jax2onnx") is not None


def environment_commands() -> list[str]:
    """Shell commands that make an environment where this module runs."""
    return [
        f"{shlex.quote(sys.executable)} -m venv {_ENVIRONMENT}",
        f"{_ENVIRONMENT}/bin/pip install jax2onnx onnxruntime flax optax safetensors",
        f"{_ENVIRONMENT}/bin/pip install --no-deps {shlex.quote(_this_package())}",
    ]


def command(subnet: pathlib.Path, out: pathlib.Path, *, opset: int) -> str:
    """The shell command that converts one sub-network there, unless it did before."""
    python = f"{_ENVIRONMENT}/bin/python -m flax_skd.io.formats.onnx"
    paths = shlex.join(map(str, (subnet, out)))
    version = f" --opset={opset}" if opset != OPSET else ""
    return f"{python} {paths} --keep{version}"


def _this_package() -> str:
    """What to give pip for the code that runs now: its checkout, or its origin."""
    checkout = pathlib.Path(__file__).parents[3]
    if (checkout / "setup.py").is_file():
        return str(checkout)
    found = importlib.metadata.distribution("flax-skd")
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    url = origin.get("url", f"flax-skd=={found.version}")
    version_control = origin.get("vcs_info")
    if version_control:
        return f"{version_control['vcs']}+{url}@{version_control['commit_id']}"
    return url


def main(arguments: list[str]) -> None:
    """SUBNET_DIR OUT: the file or the folder, whole or not at all."""
    parser = argparse.ArgumentParser("python -m flax_skd.io.formats.onnx")
    parser.add_argument("subnet", help="a directory of spec.json, params.safetensors")
    parser.add_argument("out", help="NAME.onnx, or the directory to write")
    parser.add_argument("--opset", type=int, default=OPSET)
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--keep", action="store_true", help="pass over a finished OUT")
    given = parser.parse_args(arguments)
    out = folder.local(given.out)
    single = out.suffix == ".onnx"
    files = [out] if single else [out / name for name in FILES]
    # Either appears whole, so what is there is finished.
    kept = given.keep and all(file.is_file() for file in files)
    try:
        if not kept:
            _convert_to(out, single, given)
        if not single and pathlib.Path(given.subnet).resolve().parent == out.parent:
            model_card.add_export(out.parent, "onnx", files)
    except (ValueError, ImportError, OSError) as error:
        parser.exit(1, f"{error}\n")
    size = files[-1].stat().st_size
    parser.exit(0, f"{'kept' if kept else 'wrote'} {files[-1]}: {size:,} bytes\n")


def _convert_to(out: pathlib.Path, single: bool, given: argparse.Namespace) -> None:
    if not single:
        folder.check_target(out, FILES, given.overwrite)  # before the work
        network = checkpoint.load_subnet(given.subnet)
        write(out, network, opset=given.opset, overwrite=given.overwrite)
        return
    if out.is_dir() or (out.exists() and not given.overwrite):
        raise ValueError(f"{out} exists: name another file, or pass --overwrite.")
    content = convert(checkpoint.load_subnet(given.subnet), opset=given.opset)
    out.parent.mkdir(parents=True, exist_ok=True)
    with folder.replaced(out) as fresh:
        fresh.write_bytes(content)


if __name__ == "__main__":
    main(sys.argv[1:])
