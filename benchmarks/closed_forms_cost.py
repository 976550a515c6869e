"""What the closed forms cost: seconds, peak memory and bytes, stage by stage.

    python benchmarks/closed_forms_cost.py [--variant=Ti/16] [--images=64] [--out=DIR]

Random weights and images of the size; one process a row, so that its peak memory is its
own. Rows of a table are read against the plain pass (forward and backward over the same
images), as ratios: the machine does not matter then.
"""

import argparse
import json
import multiprocessing
import pathlib
import resource
import time

ROWS = ("plain pass", "wpac", "ours")


def measure(row: str, variant: str, images: int, batch_size: int) -> dict:
    """Seconds of every stage and the peak memory of this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flax_skd.io.checkpoint import SuperNet
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
    from flax_skd.method.vit import ViT, init
    from flax_skd.run import recipes

    spec = ViTSpec.named(variant)
    params = jax.device_get(init(spec, jax.random.key(0)))
    head = np.random.default_rng(1).normal(size=params["head"]["kernel"].shape)
    params["head"]["kernel"] = (0.02 * head).astype(np.float32)
    rng, model = np.random.default_rng(0), ViT(spec)
    batches = [
        {
            "image": rng.integers(
                0, 256, (batch_size, *(spec.image_size,) * 2, 3)
            ).astype(np.uint8),
            "label": rng.integers(0, 1000, batch_size).astype(np.int32),
            "weight": np.ones(batch_size, np.float32),
        }
        for _ in range(max(1, images // batch_size))
    ]
    found = {}

    def timed(name, function):
        start = time.perf_counter()
        result = function()
        jax.block_until_ready(
            [x for x in jax.tree.leaves(result) if hasattr(x, "shape")]
        )
        found[name] = time.perf_counter() - start
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
        network = SuperNet(params, spec, levels, {})
        stats = jax.device_get(stats)
        turned = timed(
            "contraction", lambda: recipes.contracted(network, stats, recipe)
        )
        level = piad.level_for(levels, spec, macs.macs(spec) // 2)
        widths = levels.widths(level, spec)
        repairs = jax.jit(compensation.repaired, static_argnums=1)
        traced = type(widths)(*(jnp.asarray(w, jnp.int32) for w in widths))

        def extracted():
            whole = repairs(turned.params, spec, turned.compensation, traced)
            return subnet.extract(whole, widths)

        jax.block_until_ready(extracted())
        timed("extraction", extracted)
        if turned.compensation is not None:
            found["MB stored"] = packing.size(turned.compensation) / 1e6
    found["peak MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return found


def main() -> None:
    """Measures every row in a process of its own and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--variant", default="Ti/16")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out")
    args = parser.parse_args()
    rows = {}
    for row in ROWS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            call = (row, args.variant, args.images, args.batch_size)
            rows[row] = pool.apply(measure, call)
    stages = ("statistics", "contraction", "extraction", "MB stored", "peak MB")
    lines = [f"| {args.variant}, {args.images} images | {' | '.join(stages)} |"]
    lines += ["|---" * (len(stages) + 1) + "|"]
    plain = rows["plain pass"]
    for row, found in rows.items():
        cells = [f"{found[s]:.3g}" if s in found else "" for s in stages]
        cells[0] += f" s ({found['statistics'] / plain['statistics']:.2f})"
        cells[-1] += f" ({found['peak MB'] / plain['peak MB']:.2f})"
        lines.append(f"| {row} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if args.out:
        name = f"closed_forms_cost_{args.variant.replace('/', '').lower()}"
        stem = pathlib.Path(args.out) / name
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
        stem.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
