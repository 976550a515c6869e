"""MatViT (MatFormer, arXiv:2310.07707): four prefixes of every MLP, four losses a step.

    flax-skd train --config=configs/rivals/matvit.py:reduced --config.model.path=START \
        --config.data.source=npz:F:train --config.data.eval_source=npz:F:test \
        --workdir=DIR

START is a directory of a full network; DIR/network is a super-network of four levels.
Attention is never cut, so that the smallest of a ViT-S/16 keeps half of the MACs. The
paper's networks are its own, trained on other data: no number of it can be held against
this recipe, which is that of `configs/piad.py`, as for every system. The prefixes are the
paper's.
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files


def get_config(variant: str = "") -> ConfigDict:
    """Its prefixes in our recipe, or `reduced`; see `configs/rivals/base.py`."""
    config = config_files.load(f"configs/rivals/base.py:{variant}")
    with config.unlocked():
        config.program = "matvit"
        config.rival.prefixes = "1,1/2,1/4,1/8"  # of the hidden units, each a level
    return config
