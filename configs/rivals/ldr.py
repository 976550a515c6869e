"""LDR (NeurIPS 2024), and TLEG (AAAI 2024, arXiv:2312.05614): blocks from components.

    flax-skd train --config=configs/rivals/ldr.py:reduced --config.model.path=START \
        --config.data.source=npz:F:train --config.data.eval_source=npz:F:test \
        --workdir=DIR

START is a directory of a full network, which teaches and from whose mean block training
starts. DIR/network has the full depth, DIR/network-depth-6 and so on the others: starts
to be fine-tuned. Components 1, 2, 4, 8 and 12 in stages, only the new ones training, 100
epochs each. The paper's DeiT-B scores 76.6, 79.4, 81.7, 83.1, 83.7 % with so many; with
12, Chebyshev polynomials 77.7, Taylor 74.8, Fourier 77.1, Legendre 73.1 %. TLEG:
--config.rival.basis=linear --config.rival.components=2.

The paper's are the polynomials, the components and the epochs of the stages; the rest is
the recipe of `configs/piad.py`, as for every system.
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files


def get_config(variant: str = "") -> ConfigDict:
    """The paper's stages in our recipe, or `reduced`; see `configs/rivals/base.py`."""
    config = config_files.load(f"configs/rivals/base.py:{variant}")
    with config.unlocked():
        config.program = "ldr"
        config.rival.basis = "chebyshev"  # or "linear"
        # Components after each stage; stages are equally long.
        config.rival.components = "1,2,4,8,12" if not variant else "1,2,4"
        config.rival.depths = "4,6,8,10" if not variant else "1,2,3"  # beside the full
        config.rival.teacher = ""  # a directory; empty: the start itself teaches
        if not variant:
            config.epochs = 500.0
    return config
