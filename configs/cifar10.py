"""CIFAR-10 from a pre-trained ViT-Ti/16 at 64 pixels: fine-tune, then WPAC and PIAD.

    flax-skd train --config=configs/cifar10.py:start --config.model.path=FILE \
        --config.data.source=npz:CIFAR.npz:train \
        --config.data.eval_source=npz:CIFAR.npz:test --workdir=START
    flax-skd contract --config.model.path=START/network \
        --config.data.source=npz:CIFAR.npz:train --workdir=WPAC
    flax-skd train --config=configs/cifar10.py:piad --config.model.path=WPAC \
        --config.data.source=npz:CIFAR.npz:train \
        --config.data.eval_source=npz:CIFAR.npz:test --workdir=PIAD

16 patches an image, so that an epoch takes minutes on two CPU cores; 3 epochs each. The
paper trains 300 epochs on ImageNet; the list grows here in eight stages of the first.
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files


def get_config(variant: str = "piad") -> ConfigDict:
    """`start` fine-tunes the file, `piad` trains the contracted network."""
    programs = {"start": "transfer", "piad": "piad"}
    if variant not in programs:
        raise ValueError(f"variant {variant!r}: choose start or piad.")
    config = config_files.load(f"configs/{programs[variant]}.py")
    config.data.source = config.data.eval_source = ""
    config.data.batch_size = 128
    config.data.augment.flip = 0.5
    config.data.augment.pad = 4
    config.epochs = 3.0
    config.evaluate_epochs = 1.0
    config.log_every_s = 60.0
    config.checkpoint_every = 500
    if variant == "start":
        config.model.variant = "Ti/16"
        config.model.recipe = "augreg"
        config.model.image_size = 64
        config.model.fields.crop_fraction = 1.0
        return config
    config.lr = 2e-4
    config.min_lr = 1e-6
    config.warmup_epochs = 0.1
    config.label_smoothing = 0.0
    config.ema_decay = 0.999
    config.piad.progressive_epochs = 1.0
    config.piad.grow_epochs = 0.125
    config.piad.calibration.images = 256
    return config
