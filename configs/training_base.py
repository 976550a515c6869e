"""What the recipes of training share; not a program by itself.

As it stands: the handwritten digits of the demo. With `:imagenet` it is DeiT's recipe, for
1,024 images a step. Every program names its start, its epochs and its learning rate.
"""

from ml_collections import ConfigDict


def get_config(variant: str = "") -> ConfigDict:
    """Data, augmentation, optimizer and mesh: of the digits, or of `imagenet`."""
    if variant not in ("", "imagenet"):
        raise ValueError(f"no recipe for {variant!r}: choose imagenet, or nothing.")
    config = ConfigDict()
    config.program = ""
    config.model = ConfigDict()

    config.data = ConfigDict()
    config.data.source = "" if variant else "digits:train"
    # Images to evaluate on, empty for none; auto: the digits' for the digits, or none.
    config.data.eval_source = "" if variant else "auto"
    config.data.eval_labels = ""  # of a tar, as data.labels
    config.data.labels = ""
    config.data.images = 0  # how many, the same ones every time; 0 for all
    config.data.batch_size = 1024 if variant else 64
    config.data.augment = ConfigDict()
    augment = "deit" if variant else "shift_crop"
    config.data.augment.name = augment  # deit | flip_crop | shift_crop | none
    config.data.augment.flip = 0.5 if variant else 0.0
    config.data.augment.min_scale = 0.08  # flip_crop, deit: least share of the area
    config.data.augment.pad = 1  # shift_crop: pixels
    config.data.repeats = 3 if variant else 1  # repeated augmentation
    config.data.on_bad_image = "error"
    config.data.workers = 0  # processes that prepare images; 0 for threads

    config.min_lr = 1e-5
    config.warmup_epochs = 0.0
    config.weight_decay = 0.05
    config.label_smoothing = 0.1
    config.mixing = ConfigDict()  # all zero: off
    config.mixing.mixup = 0.8 if variant else 0.0
    config.mixing.cutmix = 1.0 if variant else 0.0
    config.mixing.switch = 0.5  # share of batches that take cutmix
    config.mixing.erase = 0.25 if variant else 0.0
    config.drop_path = 0.0
    config.clip_norm = 0.0 if variant else 1.0
    config.ema_decay = 0.99996 if variant else 0.99
    config.weights = "ema"  # what is saved as the network; or "raw"
    config.dtype = "bfloat16" if variant else "float32"
    config.remat = False  # True: less memory, a third more work
    config.accumulate = 1  # microbatches of an update: less memory
    config.mesh = ConfigDict()  # of devices
    config.mesh.data = -1  # -1: all that the others leave
    config.mesh.fsdp = 1  # cuts parameters along the width, to save memory
    config.mesh.model = 1  # cuts heads and hidden units
    config.checkpoint_every = 1000  # steps
    config.evaluate_epochs = 10.0
    config.log_every_s = 30.0
    config.seed = 0
    return config
