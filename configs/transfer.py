"""Fine-tune a trained ViT on other classes: the start of a super-network for them.

    flax-skd train --config=configs/transfer.py:Ti/16 --config.model.path=FILE \
        --config.model.recipe=augreg --config.model.image_size=64 \
        --config.model.num_classes=10 --config.data.source=npz:CIFAR.npz:train \
        --config.data.eval_source=npz:CIFAR.npz:test --workdir=DIR

The head starts from zero, the position embedding is resampled to the image size. Three
epochs of CIFAR-10 at 64 pixels took ViT-Ti 37 minutes on two CPU cores with other work.
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files


def get_config(variant: str = "") -> ConfigDict:
    """A short run with a small learning rate."""
    config = config_files.load(f"configs/convert.py:{variant}")
    config.program = "transfer"
    config.model.num_classes = 10

    config.data = ConfigDict()
    config.data.source = ""
    config.data.eval_source = ""
    config.data.eval_labels = ""  # of a tar, as data.labels
    config.data.labels = ""
    config.data.images = 0  # so many of them, the same ones every time; 0 for all
    config.data.batch_size = 128
    config.data.augment = ConfigDict()
    config.data.augment.name = "shift_crop"  # deit | flip_crop | none
    config.data.augment.flip = 0.5
    config.data.augment.min_scale = 0.08  # flip_crop, deit: least share of the area
    config.data.augment.pad = 4  # shift_crop: pixels
    config.data.repeats = 1  # repeated augmentation
    config.data.on_bad_image = "error"
    config.data.workers = 0  # processes that prepare images; 0 for threads

    config.epochs = 3.0
    config.lr = 3e-4
    config.min_lr = 1e-6
    config.warmup_epochs = 0.2
    config.weight_decay = 0.05
    config.label_smoothing = 0.0
    config.mixing = ConfigDict()  # all zero: off
    config.mixing.mixup = 0.0
    config.mixing.cutmix = 0.0
    config.mixing.switch = 0.5  # share of batches that take cutmix
    config.mixing.erase = 0.0
    config.drop_path = 0.0
    config.clip_norm = 1.0
    config.ema_decay = 0.999
    config.weights = "ema"  # what is saved as the network; or "raw"
    config.dtype = "float32"
    config.remat = False  # True: less memory, a third more work
    config.accumulate = 1  # microbatches of an update: less memory
    config.mesh = ConfigDict()  # of devices
    config.mesh.data = -1  # -1: all that the others leave
    config.mesh.fsdp = 1  # cuts parameters along the width, to save memory
    config.mesh.model = 1  # cuts heads and hidden units
    config.checkpoint_every = 500  # steps
    config.evaluate_epochs = 1.0
    config.log_every_s = 60.0
    config.seed = 0
    return config
