"""SKD super-networks: one pre-trained Vision Transformer, every size, in JAX/Flax."""

from flax_skd.io.checkpoint import (
    Subnet,
    Supernet,
    load_subnet,
    load_supernet,
    save_subnet,
    save_supernet,
)
from flax_skd.io.conversion import read
from flax_skd.io.data import eval_batches
from flax_skd.io.sources import open_source
from flax_skd.method.compensation import Compensation, repaired
from flax_skd.method.contraction import contract
from flax_skd.method.macs import macs, param_count
from flax_skd.method.piad import DropoutList, level_for, uniform
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.statistics import collect
from flax_skd.method.subnet import extract, masks
from flax_skd.method.vit import ViT, init
from flax_skd.run.family import SubnetFamily

__version__ = "0.1.0"
__all__ = [
    "Compensation",
    "DropoutList",
    "Subnet",
    "SubnetFamily",
    "SubnetSpec",
    "Supernet",
    "ViT",
    "ViTSpec",
    "collect",
    "contract",
    "eval_batches",
    "extract",
    "init",
    "level_for",
    "load_subnet",
    "load_supernet",
    "macs",
    "masks",
    "open_source",
    "param_count",
    "read",
    "repaired",
    "save_subnet",
    "save_supernet",
    "uniform",
]
