"""What the recipes of the other systems share; not a program by itself.

The full setting is that of `configs/piad.py:S/16`: ViT-S/16 of ImageNet at 224 pixels,
1,024 images a step drawn three times each, AdamW, 1e-3 without warm-up, RandAugment,
mixup, cutmix and erasing, no drop path. It is no other paper's: systems are compared under
one recipe, and from a paper are only its epochs, sizes and stages, which each config
names. `reduced` is the CIFAR-10 setting of `configs/ablation.py`: the same images, epochs
and sizes as every variant there.
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files


def get_config(variant: str = "") -> ConfigDict:
    """PIAD's recipe without the `piad` section, and with an empty `rival` section."""
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
