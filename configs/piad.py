"""PIAD: train a contracted super-network so that every prefix is a good network.

    flax-skd train --config=configs/piad.py --config.model.path=SUPERNET --workdir=DIR

SUPERNET is a directory that contract wrote; the trained super-network, with the dropout
list it learnt, is left in DIR/network. As it stands: the handwritten digits of the demo.
With `:Ti/16`, `:S/16` or `:B/16` it has the paper's numbers for ImageNet: 300 epochs (150
for B), AdamW, learning rate 5e-4 per 512 images, weight decay 0.05, label smoothing 0.1.
A step costs what a dense training step does. The paper's sub-networks of DeiT-B keep
81.5, 80.9, 80.4 and 77.0 % at 10/12, 8/12, 6/12 and 4/12 of the MACs (full 81.8).
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files

EPOCHS = {"": 60.0, "Ti": 300.0, "S": 300.0, "B": 150.0}


def get_config(variant: str = "") -> ConfigDict:
    """The paper's setting (Li et al., AAAI 2026), or the digits without a variant."""
    size = variant.partition("/")[0]
    if size not in EPOCHS or bool(size) != bool(variant):
        raise ValueError(f"no recipe for {variant!r}: choose Ti/16, S/16 or B/16.")
    imagenet = "imagenet" if variant else ""
    config = config_files.load(f"configs/training_base.py:{imagenet}")
    config.program = "piad"
    config.model.path = ""
    config.epochs = EPOCHS[size]
    config.lr = 1e-3  # 5e-4 * batch / 512

    config.piad = ConfigDict()
    config.piad.groups = ConfigDict()
    config.piad.groups.attn = 8  # of head dims, all heads together
    config.piad.groups.mlp = 32  # of hidden units
    config.piad.groups.attn_lane = 1  # round group sizes up to what hardware likes
    config.piad.groups.mlp_lane = 1
    config.piad.share = 0.875  # of all MACs, saved in the end
    config.piad.progressive_epochs = 50.0 if variant else 0.0  # 0: a third, at most 50
    config.piad.grow_epochs = 1.0  # between two measurements; less for short runs
    config.piad.masks = "levels"  # none | random_units | weighted_units | branches
    config.piad.branch_rate = 0.2  # at which branches are skipped
    config.piad.sampling = "per_step"  # or "per_example"
    # Shares of the MACs, falling, such as "0.85,0.675,0.475,0.275": a step computes the
    # smallest of these sizes that holds its level, each compiled once, and all its
    # microbatches have that level; empty masks the whole network.
    config.piad.compiled = ""
    config.piad.draw = "uniform"  # over levels, or over "macs"
    config.piad.loss = "labels"  # in_place | sandwich | teacher
    config.piad.teacher = ""  # directory of a frozen teacher
    config.piad.cost = "logit"
    config.piad.sensitivity = "cross_entropy"  # accuracy | kl (no labels)
    config.piad.calibration = ConfigDict()
    config.piad.calibration.source = ""  # empty: data.source and its labels
    config.piad.calibration.labels = ""
    config.piad.calibration.images = 1024  # of data.source at most; 0 for all
    config.piad.calibration.batch_size = 64
    config.piad.calibration.on_bad_image = "error"
    return config
