"""WPAC: rotate every head of a pre-trained ViT so that what matters comes first.

    flax-skd contract --config=configs/wpac.py:Ti/16 --config.model.path=FILE \
        --config.data.source=tar:IMAGES.tar --workdir=DIR

The part after the colon is the size the file is expected to have (Ti, S, B, L or H,
and the patch size). Cost: one forward and one backward pass over the calibration
images, then an eigendecomposition per head. Nothing is trained.
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files


def get_config(variant: str = "") -> ConfigDict:
    """The paper's setting (Li et al., AAAI 2026): 1,024 images, weighted PCA."""
    config = config_files.load(f"configs/convert.py:{variant}")

    config.data = ConfigDict()
    config.data.source = ""  # tar: | folder: | npz: | tfds: | digits:
    config.data.labels = ""  # "sorted", or a JSON file; for tars without labels
    config.data.images = 1024
    config.data.batch_size = 64
    config.data.on_bad_image = "error"  # or "skip"

    # balanced | wpac | pca | taylor1 | taylor2 | magnitude | random
    config.criterion = "wpac"
    config.balanced = ConfigDict()  # what criterion balanced takes; see method.balance
    config.balanced.parts = "qk,vo"
    config.balanced.query = "gradient"  # weights of tokens: gradient | plain
    config.balanced.key = "gradient"
    config.balanced.mixed = "gradient"
    config.balanced.keys = "image"  # or attended
    config.balanced.metric = "identity"  # or gradient
    config.balanced.moment = "covariance"  # or uncentred
    # Order of hidden units: greedy | variance_weight | variance | taylor1 | taylor2 |
    # magnitude | random | measured (the best of three, block by block); empty is the
    # criterion's own (wpac: taylor2).
    config.units = ""
    # Second moments of hidden units from every k-th image; k divides a device's batch.
    config.hidden_every = 1
    config.compensation = "none"  # of cuts: mean | least_squares
    config.compensation_dtype = "float32"  # or bfloat16, half the size
    config.tokens = "gradient"  # their weights in the moments of units; or plain
    config.ridge = 1e-4  # of covariances, relative to the mean variance
    config.cost = "logit"  # cross_entropy | top_logit, self_kl (no labels) | feature
    config.compare = ""  # criteria to write beside it, as DIR-taylor1, from one pass
    config.list = ConfigDict()  # of sub-networks
    config.list.kind = "uniform"  # importance (the paper's) | loss (measured)
    config.list.levels = 32  # of a uniform list
    config.list.share = 0.75  # of the cost, saved by the last level of the others
    config.list.cost = "macs"  # loss: what a cut has to save; or params, latency
    config.list.profile = ""  # cost latency: the folder that flax-skd profile wrote
    config.list.batch_size = 0  # cost latency: as profiled; 0 for the largest
    config.list.images = 64  # of the calibration images; loss: others every round
    config.list.stages = 8  # of importance, each measured at the smallest level so far
    config.list.sensitivity = "cross_entropy"  # of importance: accuracy | kl
    config.list.cuts = 0.25  # loss: share of the candidates that a round cuts
    config.list.attn = 8  # loss: groups of head dims
    config.list.mlp = 16  # loss: groups of hidden units
    config.list.tie_heads = False  # loss: queries, keys and values of one width
    config.dtype = "float32"  # of the forward and backward pass
    config.seed = 0
    return config
