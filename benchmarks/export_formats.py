"""Every format of one exported network: bytes, seconds to load, images/s, exactness.

    python benchmarks/export_formats.py --exports=exports/budget_0.5 --supernet=supernet \
        --images=tar:VAL.tar [--python=timm=ENV/bin/python] [--python=onnx=ENV/bin/python]

Each format runs in a process of its own, in the environment given for it where the one at
hand lacks its package, and takes turns with the others, round by round: read the columns
against each other. The difference is to the super-network's masked logits on real images.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import tables

ROOT = pathlib.Path(__file__).parents[1]
FORMATS = ("safetensors", "npz", "flax", "nnx", "timm", "jax_export", "onnx")
BATCH = 8


def _safetensors(folder: pathlib.Path):
    import jax

    import flax_skd as skd

    small = skd.load_subnet(folder)
    apply = jax.jit(skd.ViT(small.spec, small.widths).apply)
    return lambda images: apply({"params": small.params}, images)


def _npz(folder: pathlib.Path):
    import jax
    from flax.traverse_util import unflatten_dict

    import flax_skd as skd

    facts = json.loads((folder / "spec.json").read_text())
    spec = skd.ViTSpec.from_dict(facts["spec"])
    params = unflatten_dict(dict(np.load(folder / "params.npz")), sep=".")
    widths = skd.SubnetSpec(**{k: tuple(v) for k, v in facts["widths"].items()})
    apply = jax.jit(skd.ViT(spec, widths).apply)
    return lambda images: apply({"params": params}, images)


def _flax(folder: pathlib.Path):
    import export_page
    import jax

    facts = json.loads((folder / "config.json").read_text())
    size = facts["preprocessing"]["image_size"]
    some = np.zeros((1, size, size, facts["preprocessing"]["in_channels"]), np.float32)
    names = export_page.run("plain_vit", "flax", folder=folder.parent, images=some)
    apply = jax.jit(names["PlainViT"](names["config"]).apply)
    return lambda images: apply({"params": names["params"]}, images)


def _nnx(folder: pathlib.Path):
    from flax import nnx

    from flax_skd.io.formats.nnx import load

    model, call = load(folder), nnx.jit(lambda model, images: model(images))
    return lambda images: call(model, images)


def _jax_export(folder: pathlib.Path):
    import jax
    from jax import export

    found = export.deserialize((folder / "model.stablehlo").read_bytes())
    return jax.jit(found.call)


def _timm(folder: pathlib.Path):
    import export_page
    import torch
    from safetensors.torch import load_file

    build = export_page.run("build_timm")["build_timm"]
    model = build(json.loads((folder / "config.json").read_text())["config"])
    model.load_state_dict(load_file(folder / "model.safetensors"))

    @torch.inference_mode()
    def run(images):
        return model.eval()(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()

    return run


def _onnx(folder: pathlib.Path):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    return lambda images: session.run(None, {"images": images})[0]


LOADERS = {
    "safetensors": _safetensors,
    "npz": _npz,
    "flax": _flax,
    "nnx": _nnx,
    "timm": _timm,
    "jax_export": _jax_export,
    "onnx": _onnx,
}


def child(name: str, folder: pathlib.Path, reference: pathlib.Path) -> dict:
    """Measures one format in this process; the import of its package is not counted."""
    with np.load(reference) as held:
        images, want = held["images"], held["want"]
    LOADERS[name](folder)  # packages imported, files in the cache
    start = time.perf_counter()
    run = LOADERS[name](folder)
    load = time.perf_counter() - start
    got = np.asarray(run(images))
    np.asarray(run(images[:BATCH]))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        np.asarray(run(images[:BATCH]))
        times.append(time.perf_counter() - start)
    return {
        "bytes": sum(p.stat().st_size for p in folder.iterdir()),
        "load_s": load,
        "images_per_s": BATCH / statistics.median(times),
        "difference": float(np.abs(got - want).max()),
    }


def _reference(supernet: str, exports: pathlib.Path, images: str, path: pathlib.Path):
    """Images as every format takes them, and the super-network's logits of the cut."""
    import jax

    import flax_skd as skd

    network = skd.load_supernet(supernet)
    spec = network.spec
    widths = skd.load_subnet(exports / "safetensors").widths
    batches = skd.eval_batches(skd.open_source(images), spec, batch_size=16)
    pixels = next(iter(batches))["image"].astype(np.float32) / 255
    mean, std = (np.asarray(x, np.float32) for x in (spec.mean, spec.std))
    floats = (pixels - mean) / std
    params = skd.repaired(network.params, spec, network.compensation, widths)
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)
    want = jax.jit(skd.ViT(spec).apply)(
        {"params": params}, floats, masks=skd.masks(spec, widths)
    )
    np.savez(path, images=floats, want=np.asarray(want))


def main() -> None:
    """Runs every format in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--exports", type=pathlib.Path, required=True)
    parser.add_argument("--supernet", help="directory the exports were made from")
    parser.add_argument("--images", help="source of real images")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--python", action="append", default=[], help="FORMAT=PATH")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="directory for export_formats.{md,json}")
    parser.add_argument("--child", nargs=2, help="used by itself")
    args = parser.parse_args()
    sys.path += [str(ROOT / "tests"), str(ROOT)]
    if args.child:
        name, reference = args.child
        print(json.dumps(child(name, args.exports / name, pathlib.Path(reference))))
        return
    programs = dict(entry.split("=", 1) for entry in args.python)
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as work:
        reference = pathlib.Path(work) / "reference.npz"
        _reference(args.supernet, args.exports, args.images, reference)
        for _ in range(args.rounds):
            for name in args.formats.split(","):
                call = [programs.get(name, sys.executable), __file__]
                call += [f"--exports={args.exports}", "--child", name, str(reference)]
                done = subprocess.run(call, check=True, capture_output=True, text=True)
                found.setdefault(name, []).append(
                    json.loads(done.stdout.splitlines()[-1])
                )
    lines = ["| format | bytes | load, s | images/s | largest difference |"]
    lines += ["|---" * 5 + "|"]
    for name, rows in found.items():
        middle = {k: statistics.median(row[k] for row in rows) for k in rows[0]}
        lines.append(
            f"| {name} | {middle['bytes']:,.0f} | {middle['load_s']:.2f} | "
            f"{middle['images_per_s']:.1f} | {middle['difference']:.1e} |"
        )
    text = "\n".join(lines)
    print(text)
    tables.write(args.out, "export_formats", found, text)


if __name__ == "__main__":
    main()
