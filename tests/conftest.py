"""Strict JAX, eight CPU devices, and one tiny network with non-zero biases."""

import os

import plain_code

# Before jax starts: its CPU backend reads both once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {plain_code.flags(8)}"

import functools
import pathlib
import tempfile

import jax
import numpy as np
import pytest

from flax_skd.method import compensation, vit
from flax_skd.method.spec import ViTSpec
from flax_skd.run import sharding

# One a worker: a file that another is still writing would be read as a broken one.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "alone")
CACHE = pathlib.Path(tempfile.gettempdir()) / "flax_skd_jax_cache" / WORKER


def pytest_configure():
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    # Eight devices share two cores: programs in flight at once may wait for each other.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    # Programs that tests start share the cache.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


def shake(params, seed=0, scale=0.1):
    """Adds noise to every leaf, so that no bias is zero and no scale is one."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [
        leaf + scale * jax.random.normal(key, leaf.shape, leaf.dtype)
        for leaf, key in zip(leaves, keys)
    ]
    return jax.tree.unflatten(treedef, noisy)


def random_repairs(spec, seed=0):
    """The compensation of features that are random, correlated and off centre."""
    rng = np.random.default_rng(seed)

    def moment(n):
        data = rng.normal(size=(4 * n, n)) @ rng.normal(size=(n, n)) + 0.3
        return data.mean(0), np.atleast_2d(np.cov(data.T))

    sizes = compensation.inner_units(spec)
    blocks = range(spec.depth)
    return compensation.from_moments(
        [moment(sizes["attn"]) for _ in blocks],
        [moment(sizes["mlp"]) for _ in blocks],
        spec,
    )


@pytest.fixture(scope="module", autouse=True)
def forgetting():
    """What one file compiled is of no use to the next and would fill the memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def spec():
    return ViTSpec(
        image_size=16,
        patch_size=4,
        width=24,
        depth=3,
        num_heads=2,
        mlp_dim=40,
        num_classes=5,
    )


@pytest.fixture(scope="session")
def params(spec):
    return shake(vit.init(spec, jax.random.key(1)))


@pytest.fixture(scope="session")
def batch(spec):
    rng = np.random.default_rng(0)
    size = (12, spec.image_size, spec.image_size, spec.in_channels)
    return {
        "image": rng.integers(0, 256, size).astype(np.uint8),
        "label": rng.integers(0, spec.num_classes, 12).astype(np.int32),
        "weight": np.ones(12, np.float32),
    }


@pytest.fixture(scope="module")
def one_device():
    """The program as on a user's machine; test_sharding has the eight devices."""
    with pytest.MonkeyPatch.context() as patch:
        one = functools.partial(sharding.mesh, devices=jax.devices()[:1])
        patch.setattr(sharding, "mesh", one)
        yield
