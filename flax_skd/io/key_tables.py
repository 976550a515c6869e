"""One key table a family of checkpoints, two ways: file key <-> our paths.

Tensors meet the tables flat: attention kernels are [D, A] and [A, D] with A = H d, as
heads are not known from every file. A table fits a family's published files exactly;
what is in no table is surplus.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Flat = dict[str, np.ndarray]


class Transform(NamedTuple):
    """How a file's tensor becomes ours.

    Attributes:
      layout: the file's axes, for messages.
      fits: whether a shape can be read.
      forward: file tensor -> our flat tensors.
      inverse: our flat tensors and num_heads -> file tensor.
    """

    layout: str
    fits: Callable[[tuple[int, ...]], bool]
    forward: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    inverse: Callable[[tuple[np.ndarray, ...], int], np.ndarray]


class Rule(NamedTuple):
    """One line of a table; `{i}` stands for the block in key and paths."""

    key: str
    paths: tuple[str, ...]
    transform: Transform


def _of_rank(*ranks: int) -> Callable[[tuple[int, ...]], bool]:
    return lambda shape: len(shape) in ranks


_PLAIN = Transform("[n]", _of_rank(1), lambda x: (x,), lambda xs, h: xs[0])
_KERNEL = Transform("[in, out]", _of_rank(2), lambda x: (x,), lambda xs, h: xs[0])
_LINEAR = Transform("[out, in]", _of_rank(2), lambda x: (x.T,), lambda xs, h: xs[0].T)
_CONV = Transform(
    "[D, C, P, P]",
    _of_rank(4),
    lambda x: (x.transpose(2, 3, 1, 0),),
    lambda xs, h: xs[0].transpose(3, 2, 0, 1),
)
_HWIO = Transform("[P, P, C, D]", _of_rank(4), lambda x: (x,), lambda xs, h: xs[0])
_TOKEN = Transform(
    "[1, 1, D]",
    lambda s: len(s) == 3 and s[:2] == (1, 1),
    lambda x: (x[0, 0],),
    lambda xs, h: xs[0][None, None],
)
_TOKENS = Transform(
    "[1, N, D]",
    lambda s: len(s) == 3 and s[0] == 1,
    lambda x: (x[0],),
    lambda xs, h: xs[0][None],
)
_QKV = Transform(
    "[3 D, D]",
    lambda s: len(s) == 2 and s[0] % 3 == 0,
    lambda x: tuple(part.T for part in np.split(x, 3)),
    lambda xs, h: np.concatenate([x.T for x in xs]),
)
_QKV_BIAS = Transform(
    "[3 D]",
    lambda s: len(s) == 1 and s[0] % 3 == 0,
    lambda x: tuple(np.split(x, 3)),
    lambda xs, h: np.concatenate(xs),
)
HEADS_LAST = Transform(
    "[D, H, d]",
    _of_rank(3),
    lambda x: (x.reshape(x.shape[0], x.shape[1] * x.shape[2]),),
    lambda xs, h: xs[0].reshape(xs[0].shape[0], h, -1),
)
HEADS_FIRST = Transform(
    "[H, d, D]",
    _of_rank(3),
    lambda x: (x.reshape(x.shape[0] * x.shape[1], x.shape[2]),),
    lambda xs, h: xs[0].reshape(h, -1, xs[0].shape[1]),
)
HEADS_BIAS = Transform(
    "[H, d]",
    _of_rank(2),
    lambda x: (x.reshape(-1),),
    lambda xs, h: xs[0].reshape(h, -1),
)


def _linear(
    key: str, path: str, names=("weight", "bias"), kernel=_LINEAR
) -> list[Rule]:
    sep = "/" if kernel is _KERNEL else "."
    return [
        Rule(f"{key}{sep}{names[0]}", (f"{path}/kernel",), kernel),
        Rule(f"{key}{sep}{names[1]}", (f"{path}/bias",), _PLAIN),
    ]


def _norm(key: str, path: str, scale: str = ".weight", bias: str = ".bias"):
    return [
        Rule(key + scale, (f"{path}/scale",), _PLAIN),
        Rule(key + bias, (f"{path}/bias",), _PLAIN),
    ]


def _timm() -> list[Rule]:
    block, ours = "blocks.{i}", "block_{i}"
    qkv = ("query", "key", "value")
    return [
        *_linear("patch_embed.proj", "patch_embed", kernel=_CONV),
        Rule("cls_token", ("class_token",), _TOKEN),
        Rule("dist_token", ("dist_token",), _TOKEN),
        Rule("reg_token", ("register_tokens",), _TOKENS),
        Rule("pos_embed", ("pos_embed",), _TOKENS),
        *_norm("norm_pre", "pre_norm"),
        *_norm(f"{block}.norm1", f"{ours}/norm1"),
        Rule(
            f"{block}.attn.qkv.weight",
            tuple(f"{ours}/attn/{n}/kernel" for n in qkv),
            _QKV,
        ),
        Rule(
            f"{block}.attn.qkv.bias",
            tuple(f"{ours}/attn/{n}/bias" for n in qkv),
            _QKV_BIAS,
        ),
        *_linear(f"{block}.attn.proj", f"{ours}/attn/out"),
        Rule(f"{block}.ls1.gamma", (f"{ours}/layer_scale1",), _PLAIN),
        *_norm(f"{block}.norm2", f"{ours}/norm2"),
        *_linear(f"{block}.mlp.fc1", f"{ours}/mlp/fc1"),
        *_linear(f"{block}.mlp.fc2", f"{ours}/mlp/fc2"),
        Rule(f"{block}.ls2.gamma", (f"{ours}/layer_scale2",), _PLAIN),
        # The names of DeiT III's own files.
        Rule(f"{block}.gamma_1", (f"{ours}/layer_scale1",), _PLAIN),
        Rule(f"{block}.gamma_2", (f"{ours}/layer_scale2",), _PLAIN),
        *_norm("norm", "norm"),
        *_norm("fc_norm", "fc_norm"),
        *_linear("pre_logits.fc", "pre_logits"),
        *_linear("head", "head"),
        *_linear("head_dist", "head_dist"),
    ]


_HF_BLOCK = (  # transformers 4, transformers 5, ours
    ("attention.attention.query", "attention.q_proj", "attn/query"),
    ("attention.attention.key", "attention.k_proj", "attn/key"),
    ("attention.attention.value", "attention.v_proj", "attn/value"),
    ("attention.output.dense", "attention.o_proj", "attn/out"),
    ("intermediate.dense", "mlp.fc1", "mlp/fc1"),
    ("output.dense", "mlp.fc2", "mlp/fc2"),
)


def _huggingface() -> list[Rule]:
    rules = [
        *_linear("embeddings.patch_embeddings.projection", "patch_embed", kernel=_CONV),
        Rule("embeddings.cls_token", ("class_token",), _TOKEN),
        Rule("embeddings.distillation_token", ("dist_token",), _TOKEN),
        Rule("embeddings.position_embeddings", ("pos_embed",), _TOKENS),
        *_norm("layernorm", "norm"),
        *_linear("pooler.dense", "pre_logits"),
        *_linear("classifier", "head"),
        *_linear("cls_classifier", "head"),
        *_linear("distillation_classifier", "head_dist"),
    ]
    for block in ("encoder.layer.{i}", "layers.{i}"):
        rules += _norm(f"{block}.layernorm_before", "block_{i}/norm1")
        rules += _norm(f"{block}.layernorm_after", "block_{i}/norm2")
        for *names, path in _HF_BLOCK:
            for name in names:
                rules += _linear(f"{block}.{name}", f"block_{{i}}/{path}")
    return rules


def _jax() -> list[Rule]:
    block, ours, top = "Transformer/encoderblock_{i}", "block_{i}", "Transformer"
    names, scale = ("kernel", "bias"), ("/scale", "/bias")
    rules = [
        Rule("embedding/kernel", ("patch_embed/kernel",), _HWIO),
        Rule("embedding/bias", ("patch_embed/bias",), _PLAIN),
        Rule("cls", ("class_token",), _TOKEN),
        Rule(f"{top}/posembed_input/pos_embedding", ("pos_embed",), _TOKENS),
        Rule("pos_embedding", ("pos_embed",), _TOKENS),
        *_norm(f"{top}/encoder_norm", "norm", *scale),
        *_linear("pre_logits", "pre_logits", names, _KERNEL),
        *_linear("head", "head", names, _KERNEL),
        *_norm(f"{block}/LayerNorm_0", f"{ours}/norm1", *scale),
    ]
    # vit_jax counts its submodules together, big_vision each kind on its own.
    for norm2, mlp, attn in ((2, 3, 1), (1, 0, 0)):
        rules += _norm(f"{block}/LayerNorm_{norm2}", f"{ours}/norm2", *scale)
        for fc in (0, 1):
            key = f"{block}/MlpBlock_{mlp}/Dense_{fc}"
            rules += _linear(key, f"{ours}/mlp/fc{fc + 1}", names, _KERNEL)
        key = f"{block}/MultiHeadDotProductAttention_{attn}"
        for name in ("query", "key", "value"):
            path = f"{ours}/attn/{name}"
            rules.append(Rule(f"{key}/{name}/kernel", (f"{path}/kernel",), HEADS_LAST))
            rules.append(Rule(f"{key}/{name}/bias", (f"{path}/bias",), HEADS_BIAS))
        path = f"{ours}/attn/out"
        rules.append(Rule(f"{key}/out/kernel", (f"{path}/kernel",), HEADS_FIRST))
        rules.append(Rule(f"{key}/out/bias", (f"{path}/bias",), _PLAIN))
    return rules


TABLES: dict[str, list[Rule]] = {
    "timm": _timm(),
    "huggingface": _huggingface(),
    "jax": _jax(),
}
PATCH_KERNEL = {  # its presence tells the family
    "timm": re.compile(r"(.*\.)?patch_embed\.proj\.weight"),
    "huggingface": re.compile(
        r"((vit|deit)\.)?embeddings\.patch_embeddings\.projection\.weight"
    ),
    "jax": re.compile(r"(params/|opt/target/)?embedding/kernel"),
}
BLOCK = re.compile(
    r"^(blocks\.|encoder\.layer\.|layers\.|Transformer/encoderblock_)(\d+)"
)
REFUSED = (
    (
        re.compile(r"(^|[._/])(rope|rotary\w*|freqs\w*)($|[._/])"),
        "rotary position embeddings",
    ),
    (
        re.compile(r"[._/](q_norm|k_norm|query_ln|key_ln)($|[._/])"),
        "query and key norms",
    ),
    (
        re.compile(r"mlp\.(w\d+|fc1_g|fc1_x|gate_proj)\.|gate_proj"),
        "a gated (SwiGLU) MLP",
    ),
    (re.compile(r"(^|[./])(attn_pool|MAPHead_\d+)[./]"), "an attention-pooling head"),
    (re.compile(r"\.(attns|ffns)\.\d+\."), "parallel blocks"),
    (
        re.compile(r"relative_position_bias|rel_pos(\.|_bias|_h|_w)"),
        "relative position biases",
    ),
    (re.compile(r"attn\.(q_bias|v_bias)$"), "separate query and value biases"),
    (
        re.compile(r"conv_root|gn_root|^stem\.|patch_embed\.(backbone|conv|proj\.\d)"),
        "a conv stem",
    ),
)
# One letter an axis; equal letters are equal sizes. T positions, R registers, A = H d,
# L pre_logits, F the head's input.
SHAPES = {
    "patch_embed/kernel": "PPCD",
    "patch_embed/bias": "D",
    "class_token": "D",
    "dist_token": "D",
    "register_tokens": "RD",
    "pos_embed": "TD",
    **{
        f"{n}/{p}": "D"
        for n in ("pre_norm", "norm", "fc_norm")
        for p in ("scale", "bias")
    },
    **{
        f"block_{{i}}/{n}/{p}": "D"
        for n in ("norm1", "norm2")
        for p in ("scale", "bias")
    },
    **{f"block_{{i}}/attn/{n}/kernel": "DA" for n in ("query", "key", "value")},
    **{f"block_{{i}}/attn/{n}/bias": "A" for n in ("query", "key", "value")},
    "block_{i}/attn/out/kernel": "AD",
    "block_{i}/attn/out/bias": "D",
    "block_{i}/layer_scale1": "D",
    "block_{i}/mlp/fc1/kernel": "DM",
    "block_{i}/mlp/fc1/bias": "M",
    "block_{i}/mlp/fc2/kernel": "MD",
    "block_{i}/mlp/fc2/bias": "D",
    "block_{i}/layer_scale2": "D",
    "pre_logits/kernel": "DL",
    "pre_logits/bias": "L",
    "head/kernel": "FK",
    "head/bias": "K",
    "head_dist/kernel": "DK",
    "head_dist/bias": "K",
}
