"""UVC (Yu et al., ICLR 2022, arXiv:2203.08243): one structure within a budget, by duals.

    flax-skd train --config=configs/rivals/uvc.py:reduced --config.model.path=START \
        --config.rival.budget=0.5 --config.data.source=npz:F:train \
        --config.data.eval_source=npz:F:test --workdir=DIR

START is a directory of a full network, which teaches too. DIR/network has two levels: the
full network (cut to, not trained on) and the structure found: extract the budget.
30 epochs of search, 120 with the structure fixed. The paper's DeiT-S goes from 4.6 G to
2.65 G MACs at 79.44 % and 2.32 G at 78.82 %, DeiT-Ti to about half at 0.3 % less with
distillation and 0.9 % without. Its count could not be reproduced: here it is of what is
extracted. It states no rates for our scales: these are ours.

The paper's are the epochs of both stages and a gate step every 50; the rest is the recipe
of `configs/piad.py`, as for every system, in one run. The commands its authors publish
search at 1e-4 with 512 images a step, and train what was found in a second run.
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files


def get_config(variant: str = "") -> ConfigDict:
    """The paper's stages in our recipe, or `reduced`; see `configs/rivals/base.py`."""
    config = config_files.load(f"configs/rivals/base.py:{variant}")
    slow = 1 / 160 if not variant else 1.0  # 37,500 steps of search against 234
    with config.unlocked():
        config.program = "uvc"
        config.rival.budget = 0.5  # share of the MACs, full count
        config.rival.search_epochs = 30.0 if not variant else 3.0
        config.rival.rates = ConfigDict()  # a step, on shares
        config.rival.rates.cut = 0.2 * slow
        config.rival.rates.shrink = 0.1
        config.rival.rates.group_dual = 0.005 * slow
        config.rival.rates.budget_dual = 0.05 * slow
        config.rival.gate_rate = 30.0
        config.rival.gate_every = 50 if not variant else 10  # steps
        config.rival.gate_start = 4.0  # logit: open 98 times of 100
        config.rival.gate_temperature = 0.5
        if not variant:
            config.epochs = 150.0
    return config
