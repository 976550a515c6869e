"""A reduced setting in which the variants of PIAD are compared: CIFAR-10 in minutes.

    flax-skd train --config=configs/ablation.py:start --config.data.source=npz:F:train \
        --config.data.eval_source=npz:F:test --workdir=START
    flax-skd contract --config.model.path=START/network ... --workdir=WPAC
    flax-skd train --config=configs/ablation.py:piad --config.model.path=WPAC ...

10,000 of the 50,000 training images, the same for all; a ViT of 4 blocks, width 64, 4
heads of 16 dims, patches of 8 pixels. With `:pretrained/piad` and so on the same images
train a ViT-Ti/16 that was pre-trained. `benchmarks/ablation.py` runs it all.
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files

# Variant -> entries of the `piad` section (Li et al., AAAI 2026, and our additions).
VARIANTS = {
    "random_truncation": {"masks": "none"},
    "channel_dropout": {"masks": "random_units"},
    "weighted_channel_dropout": {"masks": "weighted_units"},
    "layer_drop": {"masks": "branches"},
    "piad": {},
    "in_place": {"loss": "in_place"},
    "sandwich": {"loss": "sandwich"},
    "per_example": {"sampling": "per_example"},
    "macs": {"draw": "macs"},
}
IMAGES = 10_000


def get_config(variant: str = "piad") -> ConfigDict:
    """`start`, `alone` (one size on its own, new weights), or one of `VARIANTS`.

    With `pretrained/` before it, a variant starts from a network that `contract` made
    of a pre-trained one, ViT-Ti/16 at 64 pixels.
    """
    setting, _, name = variant.rpartition("/")
    names = {"start": "scratch", "alone": "finetune", **dict.fromkeys(VARIANTS, "piad")}
    if setting == "pretrained" and name in VARIANTS:
        return _pretrained(name)
    if setting or name not in names:
        raise ValueError(
            f"variant {variant!r}: choose one of {', '.join(names)}, or pretrained/ and "
            f"one of {', '.join(VARIANTS)}."
        )
    config = config_files.load(f"configs/{names[name]}.py")
    with config.unlocked():
        _recipe(config)
        if name == "start":
            config.model.update(SIZES)
            config.epochs = START_EPOCHS
            config.warmup_epochs = 1.0
        elif name == "alone":
            config.model.fresh = True
            config.epochs = START_EPOCHS + EPOCHS
            config.warmup_epochs = 1.0
            config.drop_path = 0.0
        else:
            config.epochs = EPOCHS
            config.piad.update(VARIANTS[name])
            config.piad.calibration.images = 512
            config.piad.calibration.batch_size = 128
    return config


def _pretrained(name: str) -> ConfigDict:
    """1.5 epochs over the 10,000 images, the list grown in four stages of the first."""
    config = config_files.load("configs/cifar10.py:piad")
    config.data.images = IMAGES
    config.data.batch_size = 64
    config.epochs = 1.5
    config.ema_decay = 0.99
    config.evaluate_epochs = 100.0
    config.log_every_s = 20.0
    config.piad.update(VARIANTS[name])
    config.piad.progressive_epochs = 0.5
    config.piad.calibration.images = 128
    return config


START_EPOCHS, EPOCHS = 12.0, 8.0
SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "width": 64,
    "depth": 4,
    "num_heads": 4,
    "mlp_dim": 256,
    "in_channels": 3,
}


def _recipe(config: ConfigDict) -> None:
    """What all runs share."""
    config.data.images = IMAGES
    config.data.batch_size = 128
    config.data.augment.flip = 0.5
    config.data.augment.pad = 4
    config.lr = 1e-3
    config.min_lr = 1e-5
    config.weight_decay = 0.05
    config.label_smoothing = 0.1
    config.clip_norm = 1.0
    config.ema_decay = 0.99
    config.evaluate_epochs = 100.0  # once, at the end
    config.log_every_s = 20.0
