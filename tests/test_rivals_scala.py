"""Scala: what each width touches, the chain of teachers, and ordinary networks."""

import itertools

import jax
import jax.numpy as jnp
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
from flax_skd.method.vit import ViT
from flax_skd.rivals import scala, stages
from flax_skd.run import main

pytestmark = pytest.mark.usefixtures("one_device")
RATIOS = (1.0, 0.75, 0.5, 0.25)


def networks():
    ends = [scala.first] * 3 + [scala.last]
    specs = [scala.sliced_spec(SPEC, ratio, "head_dims") for ratio in RATIOS]
    return [(ViT(spec), end) for spec, end in zip(specs, ends)]


# Letters of the axes, by the ends of paths; all other arrays are [D].
AXES = {
    "DHd": ("query/kernel", "key/kernel", "value/kernel"),
    "Hd": ("query/bias", "key/bias", "value/bias"),
    "HdD": ("out/kernel",),
    "DM": ("fc1/kernel",),
    "M": ("fc1/bias",),
    "MD": ("fc2/kernel",),
    "---D": ("patch_embed/kernel",),
    "-D": ("pos_embed",),
    "D-": ("head/kernel",),
    "-": ("head/bias",),
}


def touched(params, spec, end):
    """True where a network of this width reads."""
    kept = dict(zip("DHdM", (spec.width, spec.num_heads, spec.head_dim, spec.mlp_dim)))

    def mark(path, x):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = [a for a, ends in AXES.items() if name.endswith(ends)]
        rows = []
        for letter, size in zip(found[0] if found else "D", x.shape, strict=True):
            count = kept.get(letter, size)
            rows.append(range(count) if end == "first" else range(size - count, size))
        mask = np.zeros(x.shape, bool)
        mask[np.ix_(*rows)] = True
        return mask

    return jax.tree_util.tree_map_with_path(mark, params)


@pytest.mark.parametrize(
    ("ratio", "end", "attention"),
    [(0.5, "first", "head_dims"), (0.25, "last", "head_dims"), (0.5, "last", "heads")],
)
def test_a_width_has_gradients_in_its_rows_and_columns_alone(ratio, end, attention):
    params, small = params_of(), scala.sliced_spec(SPEC, ratio, attention)
    loss = scala.of_four([(ViT(small), getattr(scala, end))])
    found, _ = jax.jit(jax.grad(loss, has_aux=True))(params, batch_of(), None, None)
    expected = touched(params, small, end)
    for (path, grads), mask in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected)
    ):
        grads = np.asarray(grads)
        assert not grads[~mask].any(), path
        # No softmax changes when all keys do by the same amount.
        if "key']['bias" not in jax.tree_util.keystr(path):
            assert np.count_nonzero(grads[mask]) > 0.6 * mask.sum(), path


def test_a_sliced_network_is_the_plain_network_of_its_sizes():
    params, batch = params_of(), batch_of()
    small = scala.sliced_spec(SPEC, 0.5, "heads")
    assert (small.width, small.num_heads, small.head_dim) == (8, 1, 8)
    cut = scala.sliced(params, small, scala.last)
    images = (batch["image"] / 255 - 0.5) / 0.5
    found = jax.jit(ViT(small).apply)({"params": cut}, batch["image"])
    np.testing.assert_allclose(found, logits(images, cut, small), atol=1e-5)
    assert cut["block_1"]["attn"]["out"]["kernel"].shape == (1, 8, 8)
    np.testing.assert_array_equal(
        cut["block_1"]["attn"]["out"]["kernel"],
        params["block_1"]["attn"]["out"]["kernel"][1:, :, 8:],
    )


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_every_network_learns_labels_and_the_next_larger_one():
    params, batch = params_of(), batch_of()
    images = (batch["image"] / 255 - 0.5) / 0.5
    outputs = [
        log_softmax(logits(images, scala.sliced(params, m.spec, end), m.spec))
        for m, end in networks()
    ]
    rows = np.arange(len(batch["label"]))
    want = -sum(out[rows, batch["label"]].mean() for out in outputs)
    for teacher, student in itertools.pairwise(outputs):
        want += (np.exp(teacher) * (teacher - student)).sum(-1).mean()
    value, _ = jax.jit(scala.of_four(networks()))(params, batch, None, None)
    assert float(value) == pytest.approx(want, rel=1e-5)


def test_no_gradient_flows_to_the_teacher():
    params, batch = params_of(), batch_of()
    labels = batch["label"]

    def without_chain(params):
        """The largest network's part alone reaches what only it has."""
        z = ViT(SPEC).apply({"params": params}, batch["image"])
        return -jax.nn.log_softmax(z)[jnp.arange(len(labels)), labels].mean()

    pair = [networks()[0], networks()[2]]
    chained = jax.jit(jax.grad(scala.of_four(pair), has_aux=True))
    grads, _ = chained(params, batch, None, None)
    alone = jax.jit(jax.grad(without_chain))(params)
    found, want = (tree["block_0"]["mlp"]["fc1"]["kernel"] for tree in (grads, alone))
    np.testing.assert_allclose(found[:, 16:], want[:, 16:], atol=1e-6)
    assert np.abs(want[:, 16:]).max() > 1e-4


def test_the_grid_is_sampled_on_both_sides_of_the_middle():
    grid = [1 - i / 16 for i in range(13)]
    warm = stages.Stages(2)
    made = []
    sampling = scala.Sampling(
        grid, lambda drawn: made.append(drawn) or drawn, seed=3, stage=warm
    )
    extra = stages.Stage(np.int32(0))
    assert sampling.before_step(1, extra)[1] == (1.0,)
    extra = warm.begin(1, type("State", (), {"extra": extra}))
    steps = [sampling.before_step(t, extra)[1] for t in range(2000)]
    assert {s[0] for s in steps} == {1.0} and {s[-1] for s in steps} == {0.25}
    assert {s[1] for s in steps} == {r for r in grid if 0.625 < r < 1}
    assert {s[2] for s in steps} == {r for r in grid if 0.25 < r <= 0.625}
    assert len(made) == len(set(made)) == 1 + 5 * 6
    assert sampling.drawn(7) == sampling.drawn(7)
    two = scala.Sampling([1.0, 0.5], list, seed=0, stage=warm)
    assert two.drawn(1) == (1.0, 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scala")


@pytest.fixture(scope="module")
def network(folder):
    return trained("scala", folder, "whole", "--config.rival.warm_epochs=0.5")


def test_the_command_trains_and_resumes_to_the_bit(network, folder, monkeypatch):
    again = stopped_and_resumed(
        *("scala", folder, "stopped", "--config.rival.warm_epochs=0.5"),
        after=5,
        monkeypatch=monkeypatch,
    )
    assert_same_networks(again, network)
    names = {p.name for p in network.parent.glob("network-*")}
    assert names == {"network-0.25", "network-0.5", "network-0.75"}
    full = checkpoint.load_supernet(network).params
    for name, end in (("0.5", scala.first), ("0.25", scala.last)):
        small = checkpoint.load_subnet(network.with_name(f"network-{name}"))
        assert small.spec.width == float(name) * SPEC.width
        want = scala.sliced(full, small.spec, end)
        jax.tree.map(np.testing.assert_array_equal, small.params, want)


def test_a_width_is_exported_like_any_sub_network(network, folder):
    out = folder / "exports"
    args = ["export", f"--workdir={network}-0.5", f"--out={out}", "--formats=npz"]
    assert main.main(args) == 0
    assert list(out.rglob("*.npz"))


def test_a_bad_call_says_what_is_needed(folder, capsys):
    for more, match in (
        ("--config.rival.ratios=1/3,1", "give whole numbers"),
        ("--config.rival.ratios=0.5,0.75", "give 1 and at least one"),
        ("--config.rival.attention=rows", "choose one of heads, head_dims"),
        ("--config.rival.warm_epochs=2", "must lie in [0, 2.0)"),
        ("--config.rival.warm_epochs=1.99", "a last stage that never began"),
    ):
        assert main.main(arguments("scala", folder, "bad", more)) == 1
        assert match in capsys.readouterr().err


def test_a_network_of_another_size_that_no_run_wrote_is_not_replaced(folder, capsys):
    dear = folder / "taken" / "network-0.5" / "notes.txt"
    dear.parent.mkdir(parents=True)
    dear.write_text("dear to its owner")
    assert main.main(arguments("scala", folder, "taken")) == 1
    assert "network-0.5 is not empty" in capsys.readouterr().err
    assert main.main(arguments("scala", folder, "taken", "--overwrite")) == 1
    assert "network-0.5 holds ['notes.txt']" in capsys.readouterr().err
    assert [p.name for p in dear.parents[1].iterdir()] == ["network-0.5"]
