"""What sub-networks of a super-network take on this device, for budgets in time.

    flax-skd profile --workdir=SUPERNET --out=DIR

Cost: a compilation and `rounds` paired forwards of about 50 networks, for batches of 1 and
of `batch_size`. ViT-Ti on a 2-core CPU: about 10 minutes; on a GPU mostly compilation.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Batches of 1 and of 32; widths as they come."""
    config = ConfigDict()
    config.batch_size = 32
    config.rounds = 15  # medians are over these
    config.dtype = "float32"
    # Multiples that widths are rounded up to; the table of widths shows what they save.
    config.attn_lane = 1
    config.mlp_lane = 1
    config.shares = "0.25,0.5,0.75"  # of every width, what the model is fitted to
    config.levels = 6  # of the list, to check it, and as many as anchors in between
    config.stairs = "0,1,2,4,8,16"  # widths so much above half a branch
    return config
