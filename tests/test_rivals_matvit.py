"""MatViT: the sum of four losses, and a super-network of four rows."""

import jax
import numpy as np
import pytest
from reference import logits
from rival_runs import (
    SPEC,
    arguments,
    assert_same_networks,
    batch_of,
    params_of,
    stopped_and_resumed,
    trained,
)

from flax_skd.io import checkpoint
from flax_skd.method import macs
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.rivals import matvit
from flax_skd.run import main

pytestmark = pytest.mark.usefixtures("one_device")
PREFIXES = [1.0, 0.5, 0.25, 0.125]


def plain_loss(params, batch):
    """CE of each size by the float64 network on copied arrays, added up."""
    total = 0.0
    images = (batch["image"] / 255 - 0.5) / 0.5
    for share in PREFIXES:
        units = int(share * SPEC.mlp_dim)
        small = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
        for i in range(SPEC.depth):
            mlp = small[f"block_{i}"]["mlp"]
            for name in ("kernel", "bias"):
                mlp["fc1"][name] = mlp["fc1"][name][..., :units]
            mlp["fc2"]["kernel"] = mlp["fc2"]["kernel"][:units]
        z = logits(images, small, SPEC)
        log_probs = z - np.log(np.exp(z).sum(-1, keepdims=True))
        total -= log_probs[np.arange(len(z)), batch["label"]].mean()
    return total


def test_the_loss_is_the_sum_of_the_four_losses():
    params, batch = params_of(), batch_of()
    models = [ViT(SPEC, row) for row in matvit.rows(SPEC, PREFIXES)]
    value, _ = jax.jit(matvit.sum_of(models))(params, batch, None, None)
    assert float(value) == pytest.approx(plain_loss(params, batch), rel=1e-5)


def test_attention_is_whole_in_every_row():
    rows = matvit.rows(SPEC, PREFIXES)
    full = SubnetSpec.full(SPEC)
    assert [row.mlp_dim[0] for row in rows] == [32, 16, 8, 4]
    assert {(row.qk_dim, row.vo_dim) for row in rows} == {(full.qk_dim, full.vo_dim)}


@pytest.mark.parametrize(
    ("prefixes", "match"),
    [([], "fall from 1"), ([0.5], "fall from 1"), ([1.0, 1.0], "fall from 1")]
    + [([1.0, 0.3], "not whole units"), ([1.0, 0.0], "fall from 1")],
)
def test_bad_prefixes_are_errors(prefixes, match):
    with pytest.raises(ValueError, match=match):
        matvit.rows(SPEC, prefixes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("matvit")


@pytest.fixture(scope="module")
def network(folder):
    return trained("matvit", folder, "whole")


def test_the_command_trains_and_resumes_to_the_bit(network, folder, monkeypatch):
    again = stopped_and_resumed(
        "matvit", folder, "stopped", after=5, monkeypatch=monkeypatch
    )
    assert_same_networks(again, network)
    moved = checkpoint.load_supernet(network).params["head"]["kernel"]
    assert np.abs(moved - params_of()["head"]["kernel"]).max() > 1e-4


def test_what_it_wrote_is_extracted_and_swept(network, folder, capsys):
    small = folder / "small"
    budget = macs.macs(SPEC, matvit.rows(SPEC, PREFIXES)[2])
    args = ["extract", f"--workdir={network}", f"--out={small}", f"--macs={budget}"]
    assert main.main(args) == 0
    assert checkpoint.load_subnet(small).widths.mlp_dim == (8,) * SPEC.depth
    args = ["sweep", f"--workdir={network}", "--config.data.source=digits:test"]
    args += ["--config.data.images=32", "--config.cuts=levels", "--config.every=1"]
    assert main.main(args) == 0
    assert "matvit" in capsys.readouterr().out


def test_a_bad_call_says_what_is_needed(folder, capsys):
    for more, match in (
        ("--config.model.path=", "give --config.model.path"),
        ("--config.rival.prefixes=1,x", "write shares like"),
        ("--config.program=scalar", "piad or finetune, hpm_kd, ldr, matvit"),
    ):
        assert main.main(arguments("matvit", folder, "bad", more)) == 1
        assert match in capsys.readouterr().err
    assert main.main(["train", "--config=configs/rivals/matvit.py:tiny"]) == 2
    assert "choose reduced" in capsys.readouterr().err
