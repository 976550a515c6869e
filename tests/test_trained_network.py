"""What the train command measures and saves: raw or averaged, cut as it is extracted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_repairs, shake

from flax_skd.io import checkpoint
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import compensation, losses, piad, subnet
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import ViT
from flax_skd.run import config_files, programs, train, training

pytestmark = pytest.mark.usefixtures("one_device")
IMAGES = 48


@pytest.fixture(scope="module")
def supernet(spec, params):
    spec = spec.replace(crop_fraction=1.0)
    full = SubnetSpec.full(spec)
    levels = piad.from_rows([full], spec)
    return Supernet(params, spec, levels, {}, random_repairs(spec))


@pytest.fixture(scope="module")
def half(supernet):
    return SubnetSpec.uniform(supernet.spec, 6, 6, 16)


@pytest.fixture(scope="module")
def folder(supernet, tmp_path_factory):
    """The super-network, and images labelled at random."""
    folder = tmp_path_factory.mktemp("files")
    checkpoint.save_supernet(folder / "net", supernet)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (IMAGES, 16, 16, 3)).astype(np.uint8)
    labels = rng.integers(0, supernet.spec.num_classes, IMAGES)
    np.savez(folder / "images.npz", images=images, labels=labels)
    return folder


def config_of(folder, **changes):
    config = config_files.load("configs/piad.py")
    config.model.path = str(folder / "net")
    sections = config.data, config.piad.calibration
    for section in sections:
        section.source = f"npz:{folder}/images.npz"
        section.batch_size = 16
    config.piad.calibration.images = IMAGES
    config.data.eval_source = config.data.source
    config.update(changes)
    return config


def with_widths(extra, widths, *, first):
    """`extra` with a list of one level more, whose rows from `first` on are `widths`."""
    tables = [np.array(table) for table in extra.dropout_list[:3]]
    for table, width in zip(tables, widths):
        table[first:] = width
    levels = piad.DropoutList(*map(jnp.asarray, tables), levels=jnp.int32(1))
    return extra._replace(dropout_list=levels)


def extracted_logits(supernet, params, widths, images):
    repairs = supernet.compensation
    whole = compensation.repaired(params, supernet.spec, repairs, widths)
    small = subnet.extract(whole, widths)
    return ViT(supernet.spec, widths).apply({"params": small}, images)


def test_piad_trains_its_levels_with_what_repairs_them(supernet, half, folder, batch):
    program = programs.piad_program(config_of(folder, label_smoothing=0.0), supernet)
    extra = with_widths(program.extra, half, first=0)  # whatever level is drawn
    state = train.TrainState(jnp.int32(0), supernet.params, None, None, None, extra)
    value, _ = jax.jit(program.loss)(supernet.params, batch, jax.random.key(0), state)
    logits = extracted_logits(supernet, supernet.params, half, batch["image"])
    want = losses.cross_entropy(logits, batch["label"])
    np.testing.assert_allclose(value, want, rtol=1e-5)
    bare = ViT(supernet.spec).apply(
        {"params": supernet.params}, batch["image"], subnet.masks(supernet.spec, half)
    )
    assert abs(losses.cross_entropy(bare, batch["label"]) - want) > 0.01


def top1(logits, labels):
    return 100 * float((np.asarray(logits).argmax(-1) == labels).mean())


@pytest.mark.parametrize("weights", ["raw", "ema"])
def test_each_score_is_of_its_weights_and_size_and_the_asked_weights_are_saved(
    supernet, half, folder, tmp_path, monkeypatch, weights
):
    ends = {"raw": shake(supernet.params, 1), "ema": shake(supernet.params, 2)}
    scores = {}

    def fit(state, batches, *, evaluate, **options):
        """As if it had trained: the list has grown, and both sets of weights moved."""
        extra = with_widths(state.extra, half, first=1)
        state = state._replace(params=ends["raw"], ema=ends["ema"], extra=extra)
        scores.update(evaluate(state))
        return state

    monkeypatch.setattr(train, "fit", fit)
    config = config_of(folder, weights=weights)
    said = training.train(
        config, workdir=str(tmp_path / "run"), overwrite=False, resume=False
    )
    data = np.load(folder / "images.npz")
    full = SubnetSpec.full(supernet.spec)
    want = {
        f"{name}{size}_top1": top1(
            extracted_logits(supernet, params, widths, data["images"]), data["labels"]
        )
        for name, params in ends.items()
        for size, widths in (("", full), ("_smallest", half))
    }
    assert scores == pytest.approx(want)
    assert len(set(want.values())) == 4  # none could stand for another
    assert f"{want[f'{weights}_smallest_top1']:.2f} %" in said
    saved = checkpoint.load_supernet(tmp_path / "run" / training.NETWORK)
    for mine, asked in zip(
        jax.tree.leaves(saved.params), jax.tree.leaves(ends[weights]), strict=True
    ):
        np.testing.assert_array_equal(mine, asked)
    assert saved.dropout_list.widths(1, supernet.spec) == half
    assert saved.provenance["weights"] == weights
    for mine, given in zip(
        jax.tree.leaves(saved.compensation), jax.tree.leaves(supernet.compensation)
    ):
        np.testing.assert_array_equal(mine, given)
