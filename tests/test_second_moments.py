"""Second moments of branches against plain float64 formulas over stored features."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shake
from test_statistics import assert_close, collect, features_and_gradients

from flax_skd.method import pass_checks, second_moments, statistics, subnet, vit
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import ViT

ALL = ("gradient", "plain", "attended")
SMALL = ViTSpec(
    image_size=8,
    patch_size=4,
    width=16,
    depth=2,
    num_heads=2,
    mlp_dim=12,
    num_classes=3,
    layer_scale=True,
)


@pytest.fixture(scope="module")
def network():
    return shake(vit.init(SMALL, jax.random.key(3)), seed=4, scale=0.3)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(2)
    return {
        "image": rng.integers(0, 256, (8, 8, 8, 3)).astype(np.uint8),
        "label": rng.integers(0, 3, 8).astype(np.int32),
        "weight": np.ones(8, np.float32),
    }


@pytest.fixture(scope="module")
def stats(network, images):
    return collect(SMALL, network, images, 8, moments=ALL)


@pytest.fixture(scope="module")
def seen(network, images):
    return features_and_gradients(SMALL, network, images)


def near(got, want):
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def own_weight(f, g, weighting):
    return np.abs(f * g).mean(-1) if weighting == "gradient" else np.ones(f.shape[:-1])


@pytest.mark.parametrize("weighting", second_moments.WEIGHTINGS)
def test_moments_of_queries_and_keys_equal_the_formula(stats, seen, weighting):
    features, gradients = seen
    for i in range(SMALL.depth):
        got = stats.branches[i][weighting]
        for site in ("query", "key"):
            f, g = features[i, site], gradients[i, site]
            weight = own_weight(f, g, weighting)
            if site == "key":
                f = f - f.mean(2, keepdims=True)
            want = np.einsum("bhn,bhnd,bhne->hde", weight, f, f)
            near(getattr(got, site), want)


def test_attended_keys_are_centred_by_each_querys_attention(stats, seen):
    features, _ = seen
    for i in range(SMALL.depth):
        q, k = features[i, "query"], features[i, "key"]
        want = np.zeros((SMALL.num_heads, SMALL.head_dim, SMALL.head_dim))
        for image, head, token in np.ndindex(q.shape[:3]):
            keys = k[image, head]
            a = np.exp(keys @ q[image, head, token] * SMALL.head_dim**-0.5)
            a /= a.sum()
            mean = a @ keys
            want[head] += (a[:, None] * keys).T @ keys - np.outer(mean, mean)
        near(stats.branches[i]["plain"].key_attended, want)
        near(stats.branches[i]["gradient"].key_attended, want)


def test_under_masks_keys_are_attended_by_the_queries_that_are_left(network, images):
    widths = SubnetSpec.uniform(SMALL, 3, SMALL.head_dim, SMALL.mlp_dim)
    masks = subnet.masks(SMALL, widths)
    masked = collect(SMALL, network, images, 8, moments=ALL, masks=masks)
    cut = subnet.masked(network, SMALL, widths)  # the same function, queries of 3 dims
    own = collect(SMALL, cut, images, 8, moments=ALL)
    for i in range(SMALL.depth):
        got, want = (s.branches[i]["plain"].key_attended for s in (masked, own))
        near(got, want)


@pytest.mark.parametrize("weighting", second_moments.WEIGHTINGS)
@pytest.mark.parametrize("branch", ["attn", "mlp"])
def test_moments_of_branches_equal_the_formula(stats, seen, branch, weighting):
    features, gradients = seen
    for i in range(SMALL.depth):
        f = features[i, "mixed" if branch == "attn" else "hidden"]
        if branch == "attn":
            f = np.moveaxis(f, 1, 2)
        g = gradients[i, f"{branch}_out"].reshape(-1, SMALL.width)
        f = f.reshape(len(g), -1)
        ones = np.ones(len(g))
        weight = np.linalg.norm(g, axis=1) if weighting == "gradient" else ones
        mean = weight @ f / weight.sum()
        centred = f - mean
        want = (weight[:, None] * centred).T @ centred / weight.sum()
        near(stats.branch_mean(i, branch, weighting), mean)
        near(stats.branch_covariance(i, branch, weighting), want)
        if branch == "attn":
            near(stats.branches[i][weighting].gram, g.T @ g)


def derived(stats):
    """What does not depend on the pilot mean."""
    named = [(i, w) for i in range(SMALL.depth) for w in second_moments.WEIGHTINGS]
    both = [(*n, branch) for n in named for branch in ("attn", "mlp")]
    return (
        [stats.branches[i][w][:4] for i, w in named],
        [stats.branch_mean(i, b, w) for i, w, b in both],
        [stats.branch_covariance(i, b, w) for i, w, b in both],
    )


def test_moments_do_not_depend_on_batch_size_or_padding(network, images, stats):
    # 8 images by 3: the last batch holds one image of padding.
    parts = collect(SMALL, network, images, 3, moments=ALL)
    assert_close(derived(parts), derived(stats))


def test_moments_do_not_depend_on_the_number_of_devices(network, images, stats):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    shards = [jax.device_put(images, rows)]
    spread = statistics.collect(ViT(SMALL), network, shards, moments=ALL)
    assert_close(derived(spread), derived(stats))


def test_a_vector_added_to_all_keys_changes_neither_logits_nor_moments(
    network, images, stats
):
    moved = jax.tree.map(lambda x: x, network)
    key = moved["block_0"]["attn"]["key"]
    key["bias"] = key["bias"] + jnp.arange(SMALL.head_dim, dtype=jnp.float32)[None]
    before, after = (
        ViT(SMALL).apply({"params": p}, images["image"]) for p in (network, moved)
    )
    near(after, before)
    got = collect(SMALL, moved, images, 8, moments=("plain", "attended"))
    for name in ("key", "key_attended"):
        a, b = (getattr(s.branches[0]["plain"], name) for s in (got, stats))
        # keys up to 7 larger in float32
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


def test_moments_of_images_much_alike_do_not_cancel(network, images):
    # Where one token alone has weight, as in the last block, its distance from the mean
    # of all tokens is a thousand times its variance over such images.
    rng = np.random.default_rng(5)
    noise = rng.integers(0, 3, images["image"].shape).astype(np.uint8)
    alike = {**images, "image": images["image"][:1] // 2 + noise}
    got = collect(SMALL, network, alike, 4, moments=("gradient", "plain"))
    features, gradients = features_and_gradients(SMALL, network, alike)
    for i in range(SMALL.depth):
        f, g = features[i, "hidden"], gradients[i, "mlp_out"].reshape(-1, SMALL.width)
        f = f.reshape(len(g), -1)
        for weighting in second_moments.WEIGHTINGS:
            gradient = np.linalg.norm(g, axis=1)
            weight = gradient if weighting == "gradient" else np.ones(len(g))
            centred = f - weight @ f / weight.sum()
            want = (weight[:, None] * centred).T @ centred / weight.sum()
            found = got.branch_covariance(i, "mlp", weighting)
            np.testing.assert_allclose(found, want, atol=1e-4 * want.max())
            assert np.linalg.eigvalsh(found)[0] > -1e-5 * np.trace(found) / len(found)


@pytest.mark.parametrize("tokens", [1, 500])
def test_where_nothing_varies_there_is_no_covariance(tokens):
    # Of one image the last block's class token alone has weight: one feature, and
    # about a pilot that is its own rounding away. Unit 3 varies.
    rng = np.random.default_rng(tokens)
    weight = rng.random(tokens).astype(np.float32)[:, None]
    same = np.tile(rng.normal(size=8).astype(np.float32), (tokens, 1))
    same[:, 3] += 0.1 * rng.normal(size=tokens).astype(np.float32)
    sums = second_moments.BranchMoments(
        *(weight.sum(), (weight * same).sum(0), (weight * same).T @ same)
    )
    found = np.array(second_moments.covariance(sums))
    assert (found[3, 3] > 0) == (tokens > 1)
    found[3, 3] = 0
    assert not found.any()


def test_attended_keys_are_left_out_unless_asked_for(network, images):
    got = collect(SMALL, network, images, 8, moments=("plain",))
    assert not np.any(got.branches[0]["plain"].key_attended)
    assert np.any(got.branches[0]["plain"].key)
    with pytest.raises(ValueError, match=r"collect them with moments=\('gradient',\)"):
        got.branch_mean(0, "mlp", "gradient")
    with pytest.raises(ValueError, match="branch 'query': choose 'attn' or 'mlp'"):
        got.branch_covariance(0, "query", "plain")


def test_sums_that_are_not_finite_are_traced_to_their_block(stats):
    moments = stats.branches[1]["plain"]
    broken = moments._replace(gram=jnp.full((16, 16), np.inf))
    bad = stats._replace(branches=(stats.branches[0], {"plain": broken}))
    pass_checks.check_finite(stats)
    with pytest.raises(ValueError, match="second moments in block 1 are not finite"):
        pass_checks.check_finite(bad)


@pytest.mark.parametrize("moments", [("taylor",), ("attended",)])
def test_an_unknown_weighting_lists_the_known_ones(network, images, moments):
    with pytest.raises(ValueError, match="token weightings of .'gradient', 'plain'"):
        collect(SMALL, network, images, 8, moments=moments)


def test_a_pass_without_moments_holds_none(network, images):
    shapes = jax.eval_shape(
        lambda batch: statistics.batch_sums(
            ViT(SMALL),
            network,
            batch,
            statistics.pilot_means(ViT(SMALL), network, batch),
        ),
        images,
    )
    assert [set(block) for block in shapes] == [set(statistics.SITES)] * SMALL.depth


def test_hidden_moments_of_every_second_image_are_those_of_these_images(
    network, images, stats
):
    options = {"moments": ("gradient",), "hidden_every": 2}
    got = collect(SMALL, network, images, 4, **options)
    half = {k: v[::2] for k, v in images.items()}
    want = collect(SMALL, network, half, 4, moments=("gradient",))
    for i in range(SMALL.depth):
        for have, there in zip(
            *(
                [
                    s.branch_mean(i, "mlp", "gradient"),
                    s.branch_covariance(i, "mlp", "gradient"),
                ]
                for s in (got, want)
            )
        ):
            near(have, there)
        few, whole = (s.branches[i]["gradient"] for s in (got, stats))
        assert abs(few.mlp.weight - whole.mlp.weight) > 0.1 * whole.mlp.weight
        near(few.query, whole.query)  # all else is of all images
        near(few.gram, whole.gram)
        near(
            got.branch_covariance(i, "attn", "gradient"),
            stats.branch_covariance(i, "attn", "gradient"),
        )


def test_hidden_moments_of_every_image_of_a_device_do_not_depend_on_their_number(
    network, images
):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    options = {"moments": ("gradient",), "hidden_every": 2}
    spread = statistics.collect(
        ViT(SMALL), network, [jax.device_put(images, rows)], **options
    )
    alone = collect(SMALL, network, images, 8, **options)
    for i in range(SMALL.depth):
        near(
            spread.branch_covariance(i, "mlp", "gradient"),
            alone.branch_covariance(i, "mlp", "gradient"),
        )


@pytest.mark.parametrize("every", [0, 3])
def test_hidden_images_that_do_not_divide_are_refused(network, images, every):
    with pytest.raises(ValueError, match=f"hidden_every = {every} must divide the 8"):
        collect(SMALL, network, images, 8, moments=("plain",), hidden_every=every)
