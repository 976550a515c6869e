"""Images/s of extracted sub-networks over the full network's, and where time goes.

    python benchmarks/subnet_speed.py [--variants=Ti/16,S/16] [--batch_size=32] [--out=DIR]
        [--lists=docs/networks/cifar10_ti16_64px_piad]

Random weights and images serve: time depends on widths alone. Rows take turns with the
full network, and ratios are of times side by side. `--lists` names super-networks: the
level of each at half of all MACs is measured too, in variants of its sizes.
"""

import argparse
import os
import pathlib
import time
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import random_inputs
import tables

from flax_skd.io import checkpoint
from flax_skd.io.extras import require
from flax_skd.method import macs, piad, vit
from flax_skd.method.attention import fastest_attention
from flax_skd.method.layers import Linear
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.run import time_budget, timing

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class FusedHeads(nn.Module):
    """The heads of a ViT with one product for queries, keys and values."""

    spec: ViTSpec
    qk_dim: int
    vo_dim: int
    dtype: jnp.dtype
    attention: timing.Program

    @nn.compact
    def __call__(self, x, masks, tap):
        """Attention of x [B, N, D]; `masks` and `tap` are those of training."""
        del masks, tap
        spec, widths = self.spec, (self.qk_dim, self.qk_dim, self.vo_dim)
        parts = [
            _Parameters((spec.width, spec.num_heads, width), name=name)()
            for name, width in zip(("query", "key", "value"), widths)
        ]
        # Side by side, so that each of q, k and v is one run of columns. Joining them
        # here costs little beside the product; an exported form would store them joined.
        kernel = jnp.concatenate([k.reshape(spec.width, -1) for k, _ in parts], axis=1)
        bias = jnp.concatenate([b.reshape(1, -1) for _, b in parts], axis=1)
        rows = x.reshape(-1, spec.width).astype(self.dtype) @ kernel + bias
        ends = np.cumsum([spec.num_heads * w for w in widths])[:2]
        q, k, v = (
            part.reshape(*x.shape[:2], spec.num_heads, -1).swapaxes(1, 2)
            for part in jnp.split(rows, ends, axis=1)
        )
        z = self.attention(q, k, v, spec.head_dim**-0.5)
        shape = (spec.num_heads, self.vo_dim, spec.width)
        return Linear("bhne,hed->bnd", shape, dtype=self.dtype, name="out")(z)


class _Parameters(nn.Module):
    """Kernel and bias, for someone else to multiply by."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        zeros = nn.initializers.zeros
        return (
            self.param("kernel", zeros, self.shape),
            self.param("bias", zeros, self.shape[1:]),
        )


def products_alone(q, k, v, scale):
    """`einsum_attention` without maximum, exp and sum."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", q * scale, k)
    return jnp.einsum("bhqk,bhkd->bhqd", scores, v)


def no_mixing(q, k, v, scale):
    """What is left without the two products: every token keeps its own value."""
    return v + (q * k).sum(-1, keepdims=True) * scale


def listed(spec: ViTSpec, paths: str) -> dict[str, SubnetSpec]:
    """Title -> widths at half of all MACs, of every list made for these sizes."""
    found = {}
    for path in filter(None, paths.split(",")):
        levels = checkpoint.load_supernet(path).dropout_list
        full = [tuple(map(int, table[0])) for table in levels[:3]]
        if SubnetSpec(*full) == SubnetSpec.full(spec):
            level = piad.level_for(levels, spec, macs.macs(spec) // 2)
            title = f"level {level} of {pathlib.Path(path).name}"
            found[title] = levels.widths(level, spec)
    return found


def rows_of(
    spec: ViTSpec, lists: str
) -> dict[str, tuple[str, SubnetSpec, object, type]]:
    """Name -> (title, widths, attention function, class of the heads)."""
    d, m = spec.head_dim, spec.mlp_dim

    def row(title, qk, vo, mlp, attention=fastest_attention, heads=vit._Heads):
        return title, SubnetSpec.uniform(spec, qk, vo, mlp), attention, heads

    half = (d // 2, d // 2, m // 2)
    found = listed(spec, lists)
    return {
        "full": row("full network", d, d, m),
        "full_fused": row("full, q, k, v in one product", d, d, m, heads=FusedHeads),
        "half": row("half of every width", *half),
        "half_fused": row("half, q, k, v in one product", *half, heads=FusedHeads),
        "half_no_softmax": row(
            "half, scores used as they are", *half, attention=products_alone
        ),
        "half_no_mixing": row(
            "half, projections but no attention", *half, attention=no_mixing
        ),
        "half_heads": row("half of the attention widths", d // 2, d // 2, m),
        "half_mlp": row("half of the MLP", d, d, m // 2),
        "ends": row("embedding and head alone", 0, 0, 0),
        **{t: (t, w, fastest_attention, vit._Heads) for t, w in found.items()},
    }


def measure(variant: str, args: argparse.Namespace) -> dict[str, dict]:
    """Times of every row of one variant."""
    spec = ViTSpec.named(variant, image_size=args.image_size)
    params = random_inputs.params(spec)
    drawn = random_inputs.batch(spec, args.batch_size, np.random.default_rng(0))
    images = jax.device_put(drawn["image"])
    rows, programs, compile_seconds = rows_of(spec, args.lists), {}, {}
    for name, (_, widths, attention, heads) in rows.items():
        with mock.patch.object(vit, "_Heads", heads):
            programs[name], compile_seconds[name] = timing.compiled(
                params, spec, widths, images, dtype=jnp.float32, attention=attention
            )
    for name in ("full", "half"):  # what is fused is the same network
        np.testing.assert_allclose(
            programs[f"{name}_fused"](), programs[name](), atol=1e-4
        )
    total = args.rounds * (len(rows) - 1)
    with require("tqdm").tqdm(desc=variant, total=total, mininterval=5) as bar:
        times = timing.paired(
            programs,
            against="full",
            rounds=args.rounds,
            clock=CLOCKS[args.clock],
            progress=bar.update,
        )
    return {
        name: times[name]._asdict()
        | {
            "title": rows[name][0],
            "macs": macs.macs(spec, rows[name][1]) / macs.macs(spec),
            "compile_seconds": compile_seconds[name],
        }
        for name in rows
    }


def markdown(variant: str, rows: dict[str, dict], args: argparse.Namespace) -> str:
    """The table of one variant, and what the time of the half network is made of."""
    lines = [
        f"{variant} at {args.image_size}, float32, batch {args.batch_size}:\n",
        "| network | MACs | images/s over full (quartiles) | ms | compile s |",
        "|---|---|---|---|---|",
    ]
    for row in rows.values():
        lines.append(
            f"| {row['title']} | {100 * row['macs']:.0f} % | {1 / row['ratio']:.2f} "
            f"({1 / row['high']:.2f} to {1 / row['low']:.2f}) | "
            f"{1e3 * row['seconds']:.0f} | {row['compile_seconds']:.1f} |"
        )
    half = {name: row["ratio"] / rows["half"]["ratio"] for name, row in rows.items()}
    saved = {name: 1 - row["ratio"] for name, row in rows.items()}
    softmax, mixing = 1 - half["half_no_softmax"], 1 - half["half_no_mixing"]
    of_it = f"{100 * softmax:.0f} % softmax, which no cut shrinks"
    # A program without it is another program, not a part of this one.
    if softmax < 0.02:
        of_it = "softmax not to be told apart: nothing is faster without it"
    lines.append(
        f"\nOf the half network's time, scores and what is done with them take "
        f"{100 * mixing:.0f} % ({of_it}), "
        f"embedding and head {100 * half['ends']:.0f} %, the rest "
        f"{100 * (1 - mixing - half['ends']):.0f} %: projections, MLP, LayerNorm. "
        f"Halving attention saves {100 * saved['half_heads']:.0f} % of the full time, "
        f"halving the MLP {100 * saved['half_mlp']:.0f} %. One product for q, k and v: "
        f"{rows['full']['ratio'] / rows['full_fused']['ratio']:.3f} times the speed at "
        f"full width, {1 / half['half_fused']:.3f} at half."
    )
    return "\n".join(lines)


def main() -> None:
    """Measures, prints the tables and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variants", default="Ti/16,S/16")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--lists", default="", help="super-networks, between commas")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="cpu: seconds of all threads, for a CPU that others use too",
    )
    parser.add_argument(
        "--out", help="directory for subnet_speed.json, subnet_speed.md"
    )
    args = parser.parse_args()
    found = {name: measure(name, args) for name in args.variants.split(",")}
    text = "\n\n".join(markdown(*item, args) for item in found.items())
    text += (
        f"\n\nMedians of {args.rounds} rounds, {args.clock} time; {time_budget.device_name()}, "
        f"jax {jax.__version__}."
    )
    print(text)
    facts = {"rows": found, "cores": os.cpu_count(), "flags": vars(args)}
    tables.write(args.out, "subnet_speed", facts, text)


if __name__ == "__main__":
    main()
