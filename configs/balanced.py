"""Closed forms beyond the paper: balanced heads, greedy units, cuts that are repaired.

    flax-skd contract --config=configs/balanced.py:Ti/16 --config.model.path=FILE \
        --config.data.source=tar:IMAGES.tar --workdir=DIR

The same pass over the calibration images as `wpac.py`, with second moments of every
branch; then closed forms (docs/method.md), and nothing is trained. What repairs a cut
is stored beside the parameters. With `--config.list.kind=loss` the blocks are not cut
alike but where it costs least, measured again and again.
"""

from ml_collections import ConfigDict

from flax_skd.run import config_files


def get_config(variant: str = "") -> ConfigDict:
    """`wpac.py` with other criteria."""
    config = config_files.load(f"configs/wpac.py:{variant}")
    config.criterion = "balanced"
    config.units = "greedy"
    config.compensation = "least_squares"
    return config
