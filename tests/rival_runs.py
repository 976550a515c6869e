"""The train command on a tiny network, whole or stopped and resumed."""

import functools

import jax
import numpy as np
import pytest
from conftest import shake

from flax_skd.io import checkpoint
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import piad, vit
from flax_skd.method.spec import ViTSpec
from flax_skd.run import main, training
from flax_skd.run import train as loop

SPEC = ViTSpec(
    image_size=8,
    patch_size=4,
    width=16,
    depth=2,
    num_heads=2,
    mlp_dim=32,
    num_classes=10,
    in_channels=1,
    mean=(0.5,),
    std=(0.5,),
    crop_fraction=1.0,
)
DEEP = SPEC.replace(depth=4)  # where blocks differ by their place
STEPS = 8


def batch_of(spec=SPEC, size=6):
    rng = np.random.default_rng(0)
    shape = (size, spec.image_size, spec.image_size, spec.in_channels)
    return {
        "image": rng.integers(0, 256, shape).astype(np.uint8),
        "label": rng.integers(0, spec.num_classes, size).astype(np.int32),
    }


@functools.cache
def params_of(spec=SPEC, seed=0):
    return jax.device_get(shake(vit.init(spec, jax.random.key(seed)), seed))


def start_in(folder, spec=SPEC):
    """A super-network directory of uniform levels."""
    if not (folder / "start").is_dir():
        levels = piad.uniform(spec, steps=8)
        network = Supernet(params_of(spec), spec, levels, {"made": "for a test"})
        checkpoint.save_supernet(folder / "start", network)
    return folder / "start"


def arguments(name, folder, workdir, *more):
    """Two epochs of four steps over 64 of the digits."""
    spec = DEEP if name in ("ldr", "uvc") else SPEC
    return [
        "train",
        f"--config=configs/rivals/{name}.py:reduced",
        f"--config.model.path={start_in(folder, spec)}",
        "--config.data.source=digits:train",
        "--config.data.eval_source=",
        "--config.data.images=64",
        "--config.data.batch_size=16",
        f"--config.epochs={STEPS // 4}",
        "--config.checkpoint_every=2",
        f"--workdir={folder / workdir}",
        *more,
    ]


def trained(name, folder, workdir, *more):
    """Runs the command; the directory of the network."""
    assert main.main(arguments(name, folder, workdir, *more)) == 0
    return folder / workdir / training.NETWORK


def stopped_and_resumed(name, folder, workdir, *more, after, monkeypatch):
    """As `trained`, but stopped after some steps and run again with --resume."""
    draw = loop._draw

    def failing(batches, step, steps):
        if step > after:
            raise RuntimeError("enough")
        return draw(batches, step, steps)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_draw", failing)
        with pytest.raises(RuntimeError, match="enough"):
            main.main(arguments(name, folder, workdir, *more))
    return trained(name, folder, workdir, *more, "--resume")


def assert_same_networks(one, other):
    """The same bits in the super-network and in every sub-network beside it."""
    names = sorted(p.name for p in one.parent.glob("network*"))
    assert names == sorted(p.name for p in other.parent.glob("network*"))
    for name in names:
        read = checkpoint.load_supernet if name == "network" else checkpoint.load_subnet
        first, second = (read(x.with_name(name)) for x in (one, other))
        jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
