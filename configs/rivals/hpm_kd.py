"""HPM-KD (arXiv:2512.09886): students in a chain, several teachers, moving temperature.

    flax-skd train --config=configs/rivals/hpm_kd.py:reduced --config.model.path=SUPERNET \
        --config.data.source=npz:F:train --config.data.eval_source=npz:F:test \
        --workdir=DIR

SUPERNET is a directory of contract or train; its levels give the sizes of the students
(uniform ones, if it has only one). DIR/network is the full network as it was,
DIR/network-8_12 the student of 8/12 of the MACs. Temperature from 3; a stage is kept if it
gains at least 1 %. The paper's logs have it no better than plain distillation on CIFAR-100:
62.27 against 62.46 % at 2.3 times smaller, 56.86 against 59.08 % at 7 times.

Of the paper are the temperature and the least gain; the rest is the recipe of
`configs/piad.py`, as for every system.
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files


def get_config(variant: str = "") -> ConfigDict:
    """Its chain in our recipe, or `reduced`; see `configs/rivals/base.py`."""
    config = config_files.load(f"configs/rivals/base.py:{variant}")
    with config.unlocked():
        config.program = "hpm_kd"
        config.rival.shares = "8/12,6/12,4/12"  # of the MACs, a stage each
        config.rival.temperature = 3.0  # a stage starts at
        config.rival.least_gain = 1.0  # points of accuracy that keep a stage
        config.rival.images = 1024 if not variant else 512  # measured on, clean
    return config
