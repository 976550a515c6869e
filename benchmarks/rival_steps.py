"""What `dense_step.py` holds our train step against: plain Flax with optax, and PyTorch."""

import argparse
import functools
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_skd.io.extras import require
from flax_skd.method import vit
from flax_skd.method.spec import ViTSpec
from flax_skd.run.commands import DTYPES

RATE, DECAY, KEEP = 1e-4, 0.05, 0.999


def freed_memory() -> str:
    """`kept` if glibc was told to keep what a program frees, else `returned`.

    Returned to the kernel, every page that a step touches is cleared and mapped again.
    """
    return "kept" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "returned"


class PlainAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v on [B, H, N, d], one product for q, k and v."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        """x [B, N, D] -> [B, N, D]."""
        batch, tokens, width = x.shape
        qkv = nn.Dense(3 * width, dtype=self.dtype)(x)
        qkv = qkv.reshape(batch, tokens, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        q, k, v = qkv
        scores = jnp.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
        weights = nn.softmax(scores.astype(jnp.float32)).astype(self.dtype)
        z = jnp.einsum("bhqk,bhkd->bhqd", weights, v)
        z = z.swapaxes(1, 2).reshape(batch, tokens, width)
        return nn.Dense(width, dtype=self.dtype)(z)


def textbook_attention(heads: int, dtype: Any) -> nn.Module:
    """Flax's own."""
    return nn.MultiHeadDotProductAttention(heads, dtype=dtype)


class PlainViT(nn.Module):
    """A Vision Transformer as one writes it in an afternoon."""

    spec: ViTSpec
    dtype: Any
    attention: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, images):
        """uint8 [B, S, S, 3] -> logits [B, K]."""
        spec, patch = self.spec, (self.spec.patch_size,) * 2
        norm = functools.partial(nn.LayerNorm, epsilon=spec.norm_eps)
        mean, std = (jnp.array(m).reshape(1, 1, 1, -1) for m in (spec.mean, spec.std))
        x = (images.astype(jnp.float32) / 255 - mean) / std
        x = nn.Conv(spec.width, patch, patch, "VALID", dtype=self.dtype)(x)
        x = x.reshape(len(images), -1, spec.width)
        init = nn.initializers.normal(0.02)
        token = self.param("class_token", init, (1, 1, spec.width))
        position = self.param("position", init, (1, spec.num_tokens, spec.width))
        token = jnp.broadcast_to(token, (len(images), 1, spec.width))
        x = jnp.concatenate([token.astype(x.dtype), x], axis=1)
        x = x + position.astype(x.dtype)
        for _ in range(spec.depth):
            x = x + self.attention(spec.num_heads, self.dtype)(norm()(x))
            y = nn.Dense(spec.mlp_dim, dtype=self.dtype)(norm()(x))
            y = nn.gelu(y, approximate=False)
            x = x + nn.Dense(spec.width, dtype=self.dtype)(y)
        return nn.Dense(spec.num_classes)(norm()(x)[:, 0])


PLAIN = {"plain": PlainAttention, "textbook": textbook_attention}


class Step:
    """A compiled update that carries its own state from call to call."""

    def __init__(self, update: Callable, state: Any, batch: Any):
        self._state, self._batch = state, batch
        self._update = jax.jit(update, donate_argnums=0).lower(state, batch).compile()

    def __call__(self):
        """One update; arrays to wait for."""
        self._state, told = self._update(self._state, self._batch)
        return told, self._state


def program(function: Callable, *inputs: Any) -> Callable:
    compiled = jax.jit(function).lower(*inputs).compile()
    return lambda: compiled(*inputs)


def plain(spec, batch, args, heads: Callable[..., nn.Module]) -> dict[str, Callable]:
    """Measure -> what makes its program, of Flax and optax alone."""
    model = PlainViT(spec, DTYPES[args.dtype], heads)
    params = jax.jit(model.init)(jax.random.key(0), batch["image"][:1])["params"]

    def loss(params, batch):
        logits = model.apply({"params": params}, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch["label"]
        ).mean()

    kernels = jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )
    optimizer = optax.adamw(RATE, weight_decay=DECAY, mask=kernels)

    def update(state, batch):
        params, opt_state, ema = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1 - KEEP)
        return (params, opt_state, ema), value

    own = jax.tree.map(jnp.copy, params)  # the state is donated
    ema = jax.tree.map(jnp.copy, params) if args.ema else None
    return {
        "forward": lambda: program(
            lambda p, b: model.apply({"params": p}, b["image"]), params, batch
        ),
        "gradient": lambda: program(jax.value_and_grad(loss), params, batch),
        "step": lambda: Step(update, (own, optimizer.init(own), ema), batch),
    }


def pytorch(spec: ViTSpec, batch: Any, args: argparse.Namespace) -> dict[str, Callable]:
    """Measure -> what makes its program, of PyTorch; no step."""
    torch = require("torch")
    functional = torch.nn.functional
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count())
    d, m, count = spec.width, spec.mlp_dim, len(batch["label"])

    def made(*shape):
        return (0.02 * torch.randn(*shape, device=device)).requires_grad_()

    def linear(out, inner):
        return made(out, inner), made(out)

    blocks = [
        (linear(3 * d, d), linear(d, d), linear(m, d), linear(d, m), made(4, d))
        for _ in range(spec.depth)
    ]
    patch = made(d, 3, *(spec.patch_size,) * 2), made(d)
    token, position, last = made(1, 1, d), made(1, spec.num_tokens, d), made(2, d)
    head = linear(spec.num_classes, d)
    leaves = [patch, token, position, last, head, blocks]
    leaves = jax.tree.leaves(leaves, is_leaf=lambda x: isinstance(x, torch.Tensor))
    # Channels first and normalised before the clock starts.
    images = vit.normalise(batch["image"], spec).transpose(0, 3, 1, 2)
    images = torch.tensor(np.asarray(images), device=device)
    labels = torch.tensor(np.asarray(batch["label"]), device=device).long()

    def norm(x, scale, shift):
        return functional.layer_norm(x, (d,), 1 + scale, shift, spec.norm_eps)

    def forward():
        x = functional.conv2d(images, *patch, stride=spec.patch_size)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([token.expand(count, -1, -1), x], 1) + position
        for qkv, out, fc1, fc2, norms in blocks:
            y = functional.linear(norm(x, *norms[:2]), *qkv)
            y = y.reshape(count, -1, 3, spec.num_heads, spec.head_dim)
            y = functional.scaled_dot_product_attention(*y.permute(2, 0, 3, 1, 4))
            x = x + functional.linear(y.transpose(1, 2).flatten(2), *out)
            y = functional.gelu(functional.linear(norm(x, *norms[2:]), *fc1))
            x = x + functional.linear(y, *fc2)
        return functional.linear(norm(x, *last)[:, 0], *head)

    def timed(run):
        def run_there():
            low = args.dtype == "bfloat16"
            with torch.autocast(device, torch.bfloat16, enabled=low):
                found = run()
            if device == "cuda":
                torch.cuda.synchronize()
            return found

        return run_there

    def gradient():
        value = functional.cross_entropy(forward().float(), labels)
        return torch.autograd.grad(value, leaves)

    return {
        "forward": lambda: timed(torch.no_grad()(forward)),
        "gradient": lambda: timed(gradient),
    }
