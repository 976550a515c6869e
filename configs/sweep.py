"""Accuracy of sub-networks of a super-network, without training.

    flax-skd sweep --workdir=DIR --config.data.source=tar:IMAGES.tar

Cost: one forward pass an image for every row of the table.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Eight sizes of the super-network, all branches cut alike."""
    config = ConfigDict()
    config.data = ConfigDict()
    config.data.source = ""
    config.data.labels = ""
    config.data.images = 0  # 0 for all
    config.data.batch_size = 50
    config.data.on_bad_image = "error"

    # attention, qk, vo, mlp or all: shares of these branches, in every block alike.
    # budgets: levels of the super-network's list within shares of all MACs.
    # levels: those of that list, one out of `every`.
    config.cuts = "all"
    config.kept = "1/8,2/8,3/8,4/8,5/8,6/8,7/8,8/8"
    config.every = 4
    config.profile = ""  # what flax-skd profile wrote here: a figure over time too
    config.profile_batch = 1
    config.compare = ""  # criteria contracted beside it with config.compare
    config.dtype = "float32"
    config.seed = 0
    return config
