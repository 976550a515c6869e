"""A plain NumPy float64 ViT, written from the equations and nothing of ours."""

import math

import numpy as np

_erf = np.vectorize(math.erf)


def layer_norm(x, p, eps):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * p["scale"] + p["bias"]


def gelu(x, kind):
    if kind == "exact":
        return x * (1 + _erf(x / math.sqrt(2))) / 2
    return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def affine(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def attention(x, p, head_dim):
    """x [N, D]; one head at a time."""
    out = p["out"]["bias"].copy()
    for h in range(p["query"]["kernel"].shape[1]):
        q, k, v = (
            x @ p[n]["kernel"][:, h] + (p[n]["bias"][h] if "bias" in p[n] else 0.0)
            for n in ("query", "key", "value")
        )
        scores = q @ k.T / math.sqrt(head_dim)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = out + weights @ v @ p["out"]["kernel"][h]
    return out


def tokens(image, p, spec):
    """Patch by patch, row by row; then the prefix and the positions."""
    size, rows = spec.patch_size, []
    for top in range(0, spec.image_size, size):
        for left in range(0, spec.image_size, size):
            patch = image[top : top + size, left : left + size]
            rows.append(
                np.einsum("pqc,pqcd->d", patch, p["patch_embed"]["kernel"])
                + p["patch_embed"]["bias"]
            )
    x = np.stack(rows)
    if not spec.pos_embed_prefix:
        x = x + p["pos_embed"]
    prefix = [p[n].reshape(-1, spec.width) for n in PREFIX if n in p]
    x = np.concatenate([*prefix, x])
    return x + p["pos_embed"] if spec.pos_embed_prefix else x


PREFIX = ("class_token", "dist_token", "register_tokens")


def logits(images, p, spec):
    """Logits [B, K] of normalised images [B, S, S, C]."""
    return np.stack([one(image, p, spec) for image in np.asarray(images, np.float64)])


def one(image, p, spec):
    x = tokens(image, p, spec)
    if spec.pre_norm:
        x = layer_norm(x, p["pre_norm"], spec.norm_eps)
    for i in range(spec.depth):
        block = p.get(f"block_{i}", {})
        if "attn" in block:
            y = layer_norm(x, block["norm1"], spec.norm_eps)
            y = attention(y, block["attn"], spec.head_dim)
            x = x + y * block.get("layer_scale1", 1.0)
        if "mlp" in block:
            y = layer_norm(x, block["norm2"], spec.norm_eps)
            y = affine(
                gelu(affine(y, block["mlp"]["fc1"]), spec.gelu), block["mlp"]["fc2"]
            )
            x = x + y * block.get("layer_scale2", 1.0)
    if not spec.fc_norm:
        x = layer_norm(x, p["norm"], spec.norm_eps)
    if spec.pool == "avg":
        read = [x[spec.num_prefix :].mean(0)]
    else:
        read = list(x[: 1 + spec.distilled])
    if spec.fc_norm:
        read = [layer_norm(r, p["fc_norm"], spec.norm_eps) for r in read]
    if spec.pre_logits:
        read[0] = np.tanh(affine(read[0], p["pre_logits"]))
    if spec.num_classes:
        read = [affine(r, p[n]) for r, n in zip(read, ("head", "head_dist"))]
    return sum(read) / len(read)
