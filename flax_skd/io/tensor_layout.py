"""The layout of a ViT's parameters: paths, shapes, nested and flat, from a spec."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_skd.io.key_tables import SHAPES, TABLES, Flat, Rule
from flax_skd.io.weight_files import ConversionError
from flax_skd.method.spec import SubnetSpec, ViTSpec

# Parts of a block that go with its attention; the others go with its MLP.
_ATTENTION = ("norm1", "attn", "layer_scale1")
QKV_BIAS = ("attn/query/bias", "attn/key/bias", "attn/value/bias")


def named(family: str, flat: Flat, spec: ViTSpec) -> Flat:
    """Tensors under a family's names, in the order of its table.

    Args:
      family: a key of `key_tables.TABLES`.
      flat: of `flattened`; lines of the table that lack a path are left out.
      spec: of the network.

    Returns:
      Contiguous arrays.
    """
    return {
        rule.key.replace("{i}", str(i)): np.ascontiguousarray(
            rule.transform.inverse(tuple(flat[p] for p in paths), spec.num_heads)
        )
        for rule, i, paths in lines_of(family, spec.depth)
        if all(path in flat for path in paths)
    }


def lines_of(family: str, depth: int) -> Iterator[tuple[Rule, int, tuple[str, ...]]]:
    """The lines of a table written out for each block, one for each path.

    Yields:
      rule, block (0 outside of blocks) and our paths. Of lines that mean the same, the
      table's first.
    """
    seen: set[tuple[str, ...]] = set()
    for rule in TABLES[family]:
        if rule.paths in seen:
            continue
        seen.add(rule.paths)
        for i in range(depth if "{i}" in rule.key else 1):
            yield rule, i, tuple(p.replace("{i}", str(i)) for p in rule.paths)


def layout(net: Any) -> dict[str, str]:
    """Our paths of a network and their axes, one letter each, as in `SHAPES`.

    Args:
      net: a `ViTSpec`, or anything with its flags and `depth`.
    """
    wanted = {
        "class_token": net.class_token,
        "dist_token": net.distilled,
        "register_tokens": net.registers,
        "pre_norm": net.pre_norm,
        "norm": not net.fc_norm,
        "fc_norm": net.fc_norm,
        "pre_logits": net.pre_logits,
        "head": net.num_classes,
        "head_dist": net.num_classes and net.distilled,
        "layer_scale1": net.layer_scale,
        "layer_scale2": net.layer_scale,
    }
    paths: dict[str, str] = {}
    for path, axes in SHAPES.items():
        top, _, rest = path.partition("/")
        if not wanted.get(rest if rest in wanted else top, True):
            continue
        if rest in QKV_BIAS and not net.qkv_bias:
            continue
        axes = axes.replace("F", "L" if net.pre_logits else "D")
        blocks = range(net.depth) if top == "block_{i}" else (0,)
        paths |= {path.replace("{i}", str(i)): axes for i in blocks}
    return paths


def shapes(spec: ViTSpec, widths: SubnetSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter of a sub-network by its path, nothing traced.

    Args:
      spec: of the full network.
      widths: of the sub-network, which fit the spec.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path, axes in layout(spec).items():
        top, _, rest = path.partition("/")
        sizes = _sizes(spec)
        if top.startswith("block_"):
            qk, vo, mlp = (w[int(top.removeprefix("block_"))] for w in widths)
            if not (qk if rest.startswith(_ATTENTION) else mlp):
                continue
            head = qk if rest.startswith(("attn/query", "attn/key")) else vo
            sizes |= {"A": (spec.num_heads, head), "M": (mlp,)}
        found[path] = sum((sizes[letter] for letter in axes), ())
    return found


def raise_listed(missing: list[str], surplus: list[str], wrong: list[str]) -> None:
    """One error for all keys, if there are any.

    Raises:
      ConversionError: unless all three are empty.
    """
    kinds = {"missing": missing, "surplus": surplus, "wrong shape": wrong}
    lines = [f"\n  {kind}: {line}" for kind, found in kinds.items() for line in found]
    if lines:
        raise ConversionError(
            "the tensors do not make one ViT; these must go, come or change:"
            + "".join(lines)
        )


def _sizes(spec: ViTSpec) -> dict[str, tuple[int, ...]]:
    """Axes of the full network, by their letters: A is two, heads and head_dim."""
    prefix = spec.num_prefix if spec.pos_embed_prefix else 0
    return {
        "D": (spec.width,),
        "A": (spec.num_heads, spec.head_dim),
        "M": (spec.mlp_dim,),
        "P": (spec.patch_size,),
        "C": (spec.in_channels,),
        "K": (spec.num_classes,),
        "L": (spec.pre_logits,),
        "R": (spec.registers,),
        "T": (spec.grid**2 + prefix,),
    }


def nest(flat: Flat, spec: ViTSpec) -> dict[str, Any]:
    """Nested params with heads as an axis, each array its own memory."""
    return unflatten_dict(
        {
            path: np.array(flat[path], np.float32, order="C").reshape(shape)
            for path, shape in shapes(spec, SubnetSpec.full(spec)).items()
        },
        sep="/",
    )


def unnest(params: dict[str, Any], spec: ViTSpec) -> Flat:
    """The inverse of `nest`.

    Raises:
      ConversionError: if params are not those of `spec`, with every path.
    """
    given = flatten_dict(params, sep="/")
    wanted = shapes(spec, SubnetSpec.full(spec))
    raise_listed(
        [path for path in wanted if path not in given],
        [path for path in given if path not in wanted],
        [
            f"{path}: {list(np.shape(given[path]))}, expected {list(shape)}"
            for path, shape in wanted.items()
            if path in given and np.shape(given[path]) != shape
        ],
    )
    return flattened(params)


def flattened(params: dict[str, Any]) -> Flat:
    """Params by path, float32, attention kernels as matrices: what the tables take.

    Args:
      params: nested, of any widths.
    """
    flat = {}
    for path, value in flatten_dict(params, sep="/").items():
        x = np.asarray(value, np.float32)
        if path.endswith("attn/out/kernel"):
            x = x.reshape(-1, x.shape[-1])
        elif "/attn/" in path and path.endswith("kernel"):
            x = x.reshape(x.shape[0], -1)
        elif "/attn/" in path:
            x = x.reshape(-1)
        flat[path] = x
    return flat
