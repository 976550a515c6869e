"""What the closed forms cost: seconds, peak memory and bytes, stage by stage.

    python benchmarks/closed_forms_cost.py [--variant=Ti/16] [--images=64] [--out=DIR]
        [--depth=2]

Random weights and images of the size; one process a row, so that its peak memory is its
own. Rows of a table are read against the plain pass (forward and backward over the same
images), as ratios: the machine does not matter then. Allocation is the first
round of a list by loss, on one batch. It and the passes are compiled before the clock
starts; contraction runs once, compiling included. `--depth` takes fewer blocks than a
large variant has, to see what one costs.
"""

import argparse
import multiprocessing
import os
import resource
import time

import tables

ROWS = ("plain pass", "wpac", "ours")


def measure(row: str, variant: str, depth: int, images: int, batch_size: int) -> dict:
    """Seconds of every stage and the peak memory of this process."""
    import jax
    import numpy as np
    import random_inputs

    from flax_skd.io.checkpoint import Supernet
    from flax_skd.method import (
        compensation,
        contraction,
        costs,
        macs,
        packing,
        piad,
        statistics,
        subnet,
    )
    from flax_skd.method.spec import ViTSpec
    from flax_skd.method.vit import ViT
    from flax_skd.run import lists, recipes

    spec = ViTSpec.named(variant)
    spec = spec.replace(depth=depth or spec.depth)
    params = jax.device_get(random_inputs.params(spec))
    rng, model = np.random.default_rng(0), ViT(spec)
    weight = np.ones(batch_size, np.float32)
    batches = [
        {**random_inputs.batch(spec, batch_size, rng), "weight": weight}
        for _ in range(max(1, images // batch_size))
    ]
    found = {}

    def timed(name, function):
        start = time.perf_counter()
        result = function()
        jax.block_until_ready(
            [x for x in jax.tree.leaves(result) if hasattr(x, "shape")]
        )
        seconds = time.perf_counter() - start
        found[name] = {"seconds": seconds, "peak_mb": peak_mb()}
        return result

    if row == "plain pass":

        @jax.jit
        def gradient(params, batch):
            def total(params):
                logits = model.apply({"params": params}, batch["image"])
                return costs.correct_logit(logits, batch["label"]).sum()

            return jax.grad(total)(params)

        jax.block_until_ready(gradient(params, batches[0]))
        timed("statistics", lambda: [gradient(params, b) for b in batches])
    else:
        recipe = recipes.Recipe(contraction.CRITERIA["wpac"])
        if row == "ours":
            recipe = recipes.Recipe(
                contraction.CRITERIA["balanced"], "greedy", "least_squares"
            )
        options = {
            "weightings": recipe.criterion.weightings,
            "moments": recipe.moments(),
        }
        statistics.collect(model, params, batches[:1], **options)  # compiles
        stats = timed(
            "statistics", lambda: statistics.collect(model, params, batches, **options)
        )
        levels = piad.uniform(spec)
        network = Supernet(params, spec, levels, {})
        stats = jax.device_get(stats)
        turned = timed(
            "contraction", lambda: recipes.contracted(network, stats, recipe)
        )
        if row == "ours":

            def one_round():
                return lists.by_loss(
                    model,
                    turned.params,
                    batches[:1],
                    repairs=turned.compensation,
                    target=macs.macs(spec) - 1,  # the first cut is below it
                ).levels

            one_round()  # compiles
            timed("allocation", one_round)
        level = piad.level_for(levels, spec, macs.macs(spec) // 2)
        widths = levels.widths(level, spec)
        repairs = jax.jit(compensation.repaired, static_argnums=1)
        traced = subnet.as_data(widths)

        def extracted():
            whole = repairs(turned.params, spec, turned.compensation, traced)
            return subnet.extract(whole, widths)

        jax.block_until_ready(extracted())
        timed("extraction", extracted)
        if turned.compensation is not None:
            found["stored_mb"] = packing.size(turned.compensation) / 1e6
    return found


def peak_mb() -> float:
    """The most memory this process had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Measures every row in a process of its own and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="Ti/16")
    parser.add_argument("--depth", type=int, default=0, help="0: the variant's")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = {}
    for row in ROWS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            call = (row, args.variant, args.depth, args.images, args.batch_size)
            rows[row] = pool.apply(measure, call)
    stages = ("statistics", "contraction", "allocation", "extraction")
    blocks = f", {args.depth} blocks" if args.depth else ""
    title = f"{args.variant}{blocks}, {args.images} images: seconds, peak MB so far"
    lines = [f"| {title} | {' | '.join(stages)} | MB stored |"]
    lines += ["|---" * (len(stages) + 2) + "|"]
    plain = rows["plain pass"]["statistics"]
    for row, found in rows.items():
        told = {
            s: f"{v['seconds']:.3g}, {v['peak_mb']:.0f}"
            for s, v in found.items()
            if s in stages
        }
        own = found["statistics"]
        ratios = (own[k] / plain[k] for k in ("seconds", "peak_mb"))
        told["statistics"] += " ({:.2f}, {:.2f})".format(*ratios)
        stored = f"{found['stored_mb']:.1f}" if "stored_mb" in found else ""
        cells = [*(told.get(s, "") for s in stages), stored]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    lines.append(
        f"\nIn brackets as a ratio to the plain pass. float32, batch {args.batch_size}, "
        f"{os.cpu_count()} cores."
    )
    text = "\n".join(lines)
    print(text)
    size = args.variant.replace("/", "").lower()
    name = f"closed_forms_cost_{size}" + (f"_{args.depth}" if args.depth else "")
    tables.write(args.out, name, rows, text)


if __name__ == "__main__":
    main()
