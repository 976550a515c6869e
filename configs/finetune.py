"""Fine-tune one extracted sub-network.

    flax-skd train --config=configs/finetune.py --config.model.path=SUBNET --workdir=DIR

SUBNET is a directory that extract wrote; the fine-tuned one is left in DIR/network. As it
stands: the handwritten digits of the demo. With `:imagenet` it has the paper's numbers: 30
epochs, learning rate 5e-5 per 512 images, drop-path 0.1; DeiT-B then scores 81.45 at
10.57 GMACs and 81.24 at 8.47 (the paper's count).
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files


def get_config(variant: str = "") -> ConfigDict:
    """The paper's setting (Li et al., AAAI 2026), or the digits without a variant."""
    config = config_files.load(f"configs/training_base.py:{variant}")
    config.program = "finetune"
    config.model.path = ""
    config.model.fresh = False  # True: its sizes with new weights, to compare

    config.epochs = 30.0 if variant else 20.0
    config.lr = 1e-4 if variant else 5e-4  # 5e-5 * batch / 512
    config.min_lr = 1e-6
    config.drop_path = 0.1
    return config
