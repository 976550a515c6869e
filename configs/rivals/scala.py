"""Scala (Zhang et al., NeurIPS 2024, arXiv:2412.04786): static widths by slicing.

    flax-skd train --config=configs/rivals/scala.py:reduced --config.model.path=START \
        --config.data.source=npz:F:train --config.data.eval_source=npz:F:test \
        --workdir=DIR

START is a directory of a full network. DIR/network is the full network trained,
DIR/network-0.5 that of ratio 0.5, and so on: ordinary networks to evaluate, fine-tune and
export. A step costs the four networks it trains, about twice a dense one. The paper's
ViT-S, 100 epochs, ratios .25, .5, .75, 1: 58.7, 68.3, 73.3, 76.1 % with 13 widths,
59.8, 72.0, 75.6, 76.7 % with 4; ViT-B, 300 epochs: 75.3, 79.3, 81.2, 82.0 and
75.6, 80.9, 81.9, 82.2 %. Widths off the grid fall to 1.6 to 1.9 %. There the full network
learns from the outputs of a pre-trained one too: rival.teacher.

The paper's are the grid, the 100 epochs and the 10 of the full network alone; the rest is
the recipe of `configs/piad.py`, as for every system. The command its authors publish has
2e-3 per 512 images, 3 epochs of warm-up, weak RandAugment, no repeated augmentation, and
DeiT-S as the teacher.
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files


def get_config(variant: str = "") -> ConfigDict:
    """The paper's 4 widths in our recipe, or `reduced`; see `configs/rivals/base.py`."""
    config = config_files.load(f"configs/rivals/base.py:{variant}")
    with config.unlocked():
        config.program = "scala"
        config.rival.ratios = "1/4,1/2,3/4,1"  # the grid; the paper's other has 13
        # Cut with the width: dims of every head (6 heads have no quarter), or "heads".
        config.rival.attention = "head_dims"
        config.rival.warm_epochs = 10.0 if not variant else 0.8  # full network alone
        config.rival.teacher = ""  # of the full network, a directory; empty: no teacher
        if not variant:
            config.epochs = 100.0
    return config
