"""Golden counts of the paper, and the closed form against XLA and a plain sum."""

import math

import jax
import numpy as np
import pytest

from flax_skd.method import macs, subnet, vit
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import ViT

PAPER = {  # attention and MLP of one block in millions, total and full count in G
    "Ti/16": (29.200, 58.438, 1.0827, 1.2537),
    "S/16": (116.498, 233.071, 4.2569, 4.5989),
    "B/16": (465.386, 930.924, 16.8798, 17.5638),
}


@pytest.mark.parametrize("name", PAPER)
def test_counts_equal_the_paper_to_all_printed_digits(name):
    spec = ViTSpec.named(name)
    one = spec.replace(depth=1)
    bare = macs.macs(one, SubnetSpec((0,), (0,), (0,)), convention="paper")
    norm = 2 * spec.num_tokens * spec.width
    size = spec.head_dim
    attention = (
        macs.macs(one, SubnetSpec((size,), (size,), (0,)), convention="paper") - bare
    )
    mlp = (
        macs.macs(one, SubnetSpec((0,), (0,), (spec.mlp_dim,)), convention="paper")
        - bare
    )
    assert (
        round((attention - norm) / 1e6, 3),
        round((mlp - norm) / 1e6, 3),
        round(macs.macs(spec, convention="paper") / 1e9, 4),
        round(macs.macs(spec, convention="full") / 1e9, 4),
    ) == PAPER[name]


def plain_count(spec, widths):
    """Every matrix product, written out."""
    n, d, h = spec.num_tokens, spec.width, spec.num_heads
    total = spec.grid**2 * spec.patch_size**2 * spec.in_channels * d
    for qk, vo, mlp in zip(*widths):
        total += 2 * n * d * h * qk + h * n * n * qk  # q, k and their product
        total += n * d * h * vo + h * n * n * vo + n * h * vo * d  # v, mix, out
        total += n * d * mlp + n * mlp * d
    return total + d * spec.num_classes


def test_the_full_convention_counts_every_matrix_product(spec):
    for widths in (
        SubnetSpec.full(spec),
        SubnetSpec((5, 0, 12), (3, 0, 7), (0, 20, 40)),
    ):
        assert macs.macs(spec, widths) == plain_count(spec, widths)


def test_xla_agrees_on_the_extracted_network(spec, params):
    big = spec.replace(width=96, mlp_dim=384, num_heads=3, head_dim=32)
    widths = SubnetSpec((32, 16, 8), (32, 8, 24), (384, 200, 64))
    small = subnet.extract(vit.init(big, jax.random.key(0)), widths)
    images = np.zeros((4, 16, 16, 3), np.float32)
    forward = jax.jit(lambda p, x: ViT(big, widths).apply({"params": p}, x))
    flops = forward.lower(small, images).compile().cost_analysis()["flops"]
    # XLA counts the elementwise work too: a cross-check, never the source.
    assert 1.0 < flops / (2 * 4 * macs.macs(big, widths)) < 1.15


def test_the_second_head_of_a_distilled_network_reads_the_token_itself(spec):
    big = spec.replace(distilled=True, pre_logits=64, num_classes=50)
    shapes = jax.eval_shape(lambda: vit.init(big, jax.random.key(0)))
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    assert macs.param_count(big) == count
    plain = big.replace(num_classes=0, pre_logits=0)
    heads = 24 * 64 + 64 * 50 + 24 * 50
    assert macs.macs(big) - macs.macs(plain) == heads
    paper = macs.macs(big, convention="paper") - macs.macs(plain, convention="paper")
    assert paper == heads + 64 + 2 * 50


@pytest.mark.parametrize("distilled", [False, True])
def test_the_paper_counts_what_the_last_layer_norm_sees(spec, distilled):
    tokens, pooled = (
        macs.macs(spec.replace(distilled=distilled, fc_norm=on), convention="paper")
        for on in (False, True)
    )
    seen = spec.grid**2 + 1 + distilled, 1 + distilled  # rows of 24, 2 an element
    assert tokens - pooled == 2 * 24 * (seen[0] - seen[1])


def test_the_half_width_network_costs_half_the_block_macs():
    spec = ViTSpec.named("S/16")
    assert macs.branch_fraction(spec, SubnetSpec.uniform(spec, 32, 32, 768)) == 0.5


def test_counts_are_exact_beyond_int32():
    spec = ViTSpec.named("H/14")
    assert macs.macs(spec, SubnetSpec.full(spec)) == plain_count(
        spec, SubnetSpec.full(spec)
    )
    assert macs.macs(spec) > 2**36


def test_an_unknown_convention_lists_the_known_ones():
    with pytest.raises(ValueError, match="choose one of \\('full', 'paper'\\)"):
        macs.macs(ViTSpec.named("Ti/16"), convention="theirs")
    with pytest.raises(ValueError, match="give it by name, convention='paper'"):
        macs.macs(ViTSpec.named("Ti/16"), "paper")


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (17_563_828_224, "17.56G"),
        (1_253_683_200, "1.254G"),
        (5_717_416, "5.717M"),
        (7, "7"),
        (999_949, "999.9k"),
        (999_999, "1.000M"),
        (999_999_999, "1.000G"),
    ],
)
def test_counts_are_written_with_four_digits(count, text):
    assert macs.readable(count) == text
