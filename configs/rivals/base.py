"""What the recipes of the other systems share; not a program by itself.

The full setting is DeiT's: ViT-S/16 of ImageNet at 224 pixels, 1,024 images a step, AdamW,
1e-3, mixup, cutmix and erasing. `reduced` is the CIFAR-10 setting of
`configs/ablation.py`: the same images, epochs and sizes as every variant there.
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files


def get_config(variant: str = "") -> ConfigDict:
    """The recipe without the `piad` section, and with an empty `rival` section."""
    names = {"": "configs/piad.py:S/16", "reduced": "configs/ablation.py:piad"}
    if variant not in names:
        raise ValueError(f"no recipe for {variant!r}: choose reduced, or nothing.")
    config = config_files.load(names[variant])
    with config.unlocked():
        del config.piad
        del config.drop_path
        config.program = ""
        config.rival = ConfigDict()
    return config
