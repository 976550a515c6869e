"""The networks kept in docs/networks load, and are what their cards say."""

import pathlib

import numpy as np
import pytest

from flax_skd.io import checkpoint
from flax_skd.method import macs

FOLDER = pathlib.Path(__file__).parents[1] / "docs" / "networks"
CARDS = sorted(FOLDER.glob("*.md"))


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.stem)
def test_a_network_is_what_its_card_says(card):
    pytest.importorskip("orbax.checkpoint")
    folder = card.with_suffix("")
    network, text = checkpoint.load_supernet(folder), card.read_text()
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 16e6
    assert network.params["head"]["kernel"].dtype.name == "bfloat16"
    assert f"{macs.macs(network.spec) / 1e6:.1f} MMACs" in text
    levels = int(network.dropout_list.levels)
    if levels:
        assert f"{levels + 1} nested sub-networks" in text
        smallest = network.dropout_list.widths(levels, network.spec)
        share = macs.macs(network.spec, smallest) / macs.macs(network.spec)
        np.testing.assert_allclose(share, 1 / 8, atol=0.01)
    else:
        assert f"{macs.param_count(network.spec):,} parameters" in text


def test_there_are_cards():
    assert [card.stem for card in CARDS] == [
        "cifar10_ti16_64px",
        "cifar10_ti16_64px_piad",
    ]
