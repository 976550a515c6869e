"""A checkpoint's tensors: under which path each belongs, and the sizes they prove."""

import collections
import dataclasses
import math
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from flax_skd.io.key_tables import (
    BLOCK,
    HEADS_BIAS,
    HEADS_FIRST,
    HEADS_LAST,
    PATCH_KERNEL,
    TABLES,
    Flat,
    Rule,
)
from flax_skd.io.tensor_layout import QKV_BIAS, layout, raise_listed
from flax_skd.io.weight_files import ConversionError

_MAX_DEPTH = 1000
_HINTS = {"pos_embed": " (rotary or relative positions are not supported)"}
_QKV_HEADS = {HEADS_LAST: slice(1, 3), HEADS_FIRST: slice(0, 2), HEADS_BIAS: slice(2)}


@dataclasses.dataclass
class Flattened:
    """A checkpoint's tensors under our paths, kernels flat, and what did not fit the table.

    Attributes:
      flat: our path -> tensor.
      keys: our path -> the file's key.
      used: the table's keys that occurred, for naming missing ones alike.
      heads: (H, d) of every tensor that tells.
      surplus, wrong: lines for the error message.
    """

    family: str
    flat: Flat = dataclasses.field(default_factory=dict)
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    used: set[str] = dataclasses.field(default_factory=set)
    heads: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    surplus: list[str] = dataclasses.field(default_factory=list)
    wrong: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def num_heads(self) -> int | None:
        """H where the file's axes show it."""
        return next((h for h, _ in self.heads.values()), None)

    def add(self, name: str, key: str, value: np.ndarray, rules: dict[str, Rule]):
        """Files one tensor: `name` in the file, `key` without the family's prefix."""
        template, block = _template(key)
        rule = rules.get(template)
        if rule is None:
            self.surplus.append(name)
            return
        if not rule.transform.fits(value.shape):
            want = rule.transform.layout
            self.wrong[name] = f"{list(value.shape)}, expected {want}"
            return
        self.used.add(rule.key)
        if rule.transform in _QKV_HEADS:
            self.heads[name] = value.shape[_QKV_HEADS[rule.transform]]
        for path, part in zip(rule.paths, rule.transform.forward(value)):
            path = path.replace("{i}", block)
            if path in self.flat:
                self.surplus.append(f"{name} (means the same as {self.keys[path]})")
                return
            self.flat[path], self.keys[path] = part, name


def flatten(tensors: Flat, family: str) -> Flattened:
    """Files every tensor of a checkpoint under our paths."""
    out = Flattened(family)
    rules = {rule.key: rule for rule in TABLES[family]}
    canonical = {"timm": _timm_keys, "huggingface": _hf_keys, "jax": _jax_keys}
    # By name: formats do not keep an order, and a message should repeat.
    filed = sorted(canonical[family](tensors), key=lambda entry: entry[0])
    for name, key, value in filed:
        out.add(name, key, value, rules)
    if len(set(out.heads.values())) > 1:
        common = collections.Counter(out.heads.values()).most_common(1)[0][0]
        out.wrong |= {
            name: f"{h} heads of {d}, others have {common[0]} of {common[1]}"
            for name, (h, d) in out.heads.items()
            if (h, d) != common
        }
    teacher = any("cls_classifier" in k or "distillation_cl" in k for k in tensors)
    if family == "huggingface" and "dist_token" in out.flat and not teacher:
        # A DeiT whose head reads the class token alone: the distillation token is
        # then a register, exactly.
        out.flat["register_tokens"] = out.flat.pop("dist_token")[None]
        out.keys["register_tokens"] = out.keys.pop("dist_token")
    return out


def _template(key: str) -> tuple[str, str]:
    match = BLOCK.match(key)
    if match is None or str(int(match[2][:5])) != match[2]:
        return key, ""
    return f"{match[1]}{{i}}{key[match.end() :]}", match[2]


def _timm_keys(tensors: Flat) -> Iterator[tuple[str, str, np.ndarray]]:
    # What a network was saved in leaves a prefix: `module.`, `model.`, `_orig_mod.`.
    found = filter(None, map(PATCH_KERNEL["timm"].fullmatch, tensors))
    prefix, *others = sorted({match[1] or "" for match in found})
    if others:
        raise ConversionError(
            f"it holds several networks, under {[prefix, *others][:8]}: save one alone."
        )
    for name, value in tensors.items():
        inside = name.startswith(prefix)
        yield name, name.removeprefix(prefix) if inside else "?" + name, value


def _hf_keys(tensors: Flat) -> Iterator[tuple[str, str, np.ndarray]]:
    for name, value in tensors.items():
        yield name, name.removeprefix("vit.").removeprefix("deit."), value


def _jax_keys(tensors: Flat) -> Iterator[tuple[str, str, np.ndarray]]:
    prefixes = ("params/", "opt/target/", "")
    prefix = next(p for p in prefixes if f"{p}embedding/kernel" in tensors)
    scanned = f"{prefix}Transformer/encoderblock/"
    for name, value in tensors.items():
        if not name.startswith(prefix):
            yield name, "?" + name, value
        elif not name.startswith(scanned):
            yield name, name.removeprefix(prefix), value
        elif value.ndim == 0 or not value.size or len(value) > _MAX_DEPTH:
            yield name, "?" + name, value
        else:
            for i, part in enumerate(value):
                key = f"Transformer/encoderblock_{i}/{name.removeprefix(scanned)}"
                yield name, key, part


def infer(
    found: Flattened, *, pos_embed_prefix: bool | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the tensors prove and what they suggest of a `ViTSpec`.

    Args:
      found: the tensors; zero patch biases are added where timm has none.
      pos_embed_prefix: decides where the position table could be read both ways.

    Raises:
      ConversionError: listing every missing, surplus and wrong-shape key.
    """
    flat = found.flat
    net = _flags(flat)
    kernel = flat.get("patch_embed/kernel")
    if net.pre_norm and kernel is not None and found.family == "timm":
        # timm leaves the patch bias out in front of norm_pre.
        flat.setdefault("patch_embed/bias", np.zeros(kernel.shape[-1], np.float32))
    paths = layout(net)
    sizes = _vote(flat, paths)
    _check(found, paths, sizes)
    if net.pre_logits and net.num_classes and found.family == "huggingface":
        raise ConversionError("it has a pooler that its classifier does not read.")
    facts = {name: getattr(net, name) for name in vars(net)} | {
        "width": sizes["D"],
        "mlp_dim": sizes["M"],
        "patch_size": sizes["P"],
        "in_channels": sizes["C"],
        "num_classes": sizes.get("K", 0),
        "registers": sizes.get("R", 0),
        "pre_logits": sizes.get("L", 0),
    }
    prefix = facts["class_token"] + facts["distilled"] + facts["registers"]
    side, inside = _grid(found, sizes["T"], prefix, pos_embed_prefix)
    facts |= {"image_size": side * sizes["P"], "pos_embed_prefix": inside}
    if found.num_heads:
        facts["num_heads"] = found.num_heads
    likely = {}
    if net.fc_norm or not net.class_token:
        likely["pool"] = "avg"
    elif net.distilled or found.family != "timm":
        likely["pool"] = "token"
    return facts, likely


def _flags(flat: Flat) -> types.SimpleNamespace:
    parts = {tuple(path.split("/")) for path in flat}
    tops = {p[0] for p in parts}
    rests = {"/".join(p[1:]) for p in parts}
    distilled = bool(tops & {"dist_token", "head_dist"})
    return types.SimpleNamespace(
        depth=max(1, sum(top.startswith("block_") for top in tops)),
        class_token="class_token" in tops or distilled,
        distilled=distilled,
        registers="register_tokens" in tops,
        pre_norm="pre_norm" in tops,
        fc_norm="fc_norm" in tops,
        pre_logits="pre_logits" in tops,
        num_classes=bool(tops & {"head", "head_dist"}),
        layer_scale=bool(rests & {"layer_scale1", "layer_scale2"}),
        qkv_bias=bool(rests & set(QKV_BIAS)),
    )


def _vote(flat: Flat, paths: dict[str, str]) -> dict[str, int]:
    """The size of every axis letter that most tensors agree on."""
    votes: dict[str, collections.Counter[int]]
    votes = collections.defaultdict(collections.Counter)
    for path, axes in paths.items():
        if path in flat and flat[path].ndim == len(axes):
            for letter, size in zip(axes, flat[path].shape):
                votes[letter][size] += 1
    return {letter: counter.most_common(1)[0][0] for letter, counter in votes.items()}


def _check(found: Flattened, paths: dict[str, str], sizes: dict[str, int]):
    wrong = dict(found.wrong)
    for path, axes in paths.items():
        if path in found.flat:
            shape = found.flat[path].shape
            want = tuple(sizes.get(letter) for letter in axes)
            if shape != want or 0 in shape:
                line = f"{path} {list(shape)}, the other tensors say {list(want)}"
                wrong.setdefault(found.keys[path], line)
    there = {path for path in paths if path in found.flat}
    lacks = {_file_key(p, found): _HINTS.get(p, "") for p in paths if p not in there}
    beyond = dict.fromkeys(found.keys[p] for p in found.flat if p not in there)
    raise_listed(
        [f"{key}{hint}" for key, hint in lacks.items() if key not in wrong],
        [*found.surplus, *beyond],
        [f"{key}: {line}" for key, line in wrong.items()],
    )


def _file_key(path: str, found: Flattened) -> str:
    """The key under which this family's file should have held a path."""
    top, _, rest = path.partition("/")
    number = top.removeprefix("block_") if top.startswith("block_") else ""
    template = f"block_{{i}}/{rest}" if number else path
    rules = [rule for rule in TABLES[found.family] if template in rule.paths]
    if not rules:
        return path
    best = next((rule for rule in rules if rule.key in found.used), rules[0])
    return best.key.replace("{i}", number)


def _grid(
    found: Flattened, count: int, prefix: int, chosen: bool | None
) -> tuple[int, bool]:
    """Patches along a side, and whether the position table covers the prefix."""
    ways = {
        inside: math.isqrt(count - prefix * inside)
        for inside in ((True, False) if prefix else (True,))
        if count > prefix * inside
        and math.isqrt(count - prefix * inside) ** 2 == count - prefix * inside
    }
    if found.family == "huggingface":
        ways.pop(False, None)
    key = found.keys["pos_embed"]
    if chosen in ways:
        return ways[chosen], chosen
    if len(ways) == 1:
        inside, side = ways.popitem()
        return side, inside
    if ways:
        raise ConversionError(
            f"{key} of {count} positions can be read with and without {prefix} prefix "
            "tokens: give fields={'pos_embed_prefix': True or False}."
        )
    raise ConversionError(
        f"{key} has {count} positions: neither that nor {count} - {prefix} prefix "
        "tokens is a square grid of patches."
    )
