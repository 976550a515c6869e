"""Training-free cuts of a real ViT: the paper's way, ours part by part, rivals.

    python benchmarks/closed_forms.py --path=FILE --variant=Ti/16 --recipe=augreg \
        --calibration=tar:IMAGES.tar --labels=sorted --test=tar:VAL.tar --work=DIR \
        [--tables=whole] [--out=DIR]

One statistics pass, then every variant from the same sums, every row on the same test
images: top-1 with a bootstrap interval, KL to the full network, and the difference to
the first row of its cut, paired over images. `--tables=parts` cuts one kind of branch
(`--cuts=qk,vo` some of them), `whole` the network to shares of its MACs, `images` asks
how many calibration images and whether labels are needed. Rows and statistics that lie
in --work already are not taken again.
"""

import argparse
import functools
import logging
from collections.abc import Callable, Iterator

import rival_forms
import tables
from harness import HEAD, Harness, line, row
from variants import OURS, PARTS, WPAC, Cuts, Row, corp_of, of_recipe

from flax_skd.io.checkpoint import Supernet
from flax_skd.method import costs, second_moments
from flax_skd.method.spec import SubnetSpec
from flax_skd.run import recalibrating
from flax_skd.run.recipes import Recipe

BUDGETS = (10 / 12, 8 / 12, 6 / 12, 4 / 12)
LISTS = {"importance": {"images": 64, "stages": 4}, "loss": {"images": 32, "cuts": 0.5}}


def parts(harness: Harness, cuts: list[str]) -> Iterator[Row]:
    """One kind of branch cut in every block alike."""
    for (cut, shares), variants in PARTS.items():
        if cuts and cut not in cuts:
            continue
        for name, variant in variants.items():
            make = functools.partial(of_recipe, variant)
            if not isinstance(variant, Recipe):
                make = variant
            made = functools.cache(functools.partial(make, harness, cut))
            for share in shares:
                yield cut, share, name, functools.partial(_scored, harness, made, share)


def _scored(harness: Harness, made: Callable[[], Cuts], share: float):
    return harness.scores(*made()(share))


def whole(harness: Harness, cuts: list[str]) -> Iterator[Row]:
    """All branches, at shares of all MACs."""
    del cuts
    ours = functools.cache(lambda: harness.contracted(OURS))
    wpac = functools.cache(lambda: harness.contracted(Recipe(WPAC)))

    def listed(name, network, kind):
        def make():
            options = {"share": 0.7, **LISTS.get(kind, {})}
            return harness.listed(network(), name, kind, **options)

        return functools.cache(make)

    def clover():
        return harness.contracted(Recipe(rival_forms.CLOVER))

    def pruned():
        return rival_forms.variance_pruned(harness.network, harness.stats())

    alike = listed("ours", ours, "uniform")
    by_loss = listed("ours", ours, "loss")
    variants = {
        "wpac, importance list": listed("wpac", wpac, "importance"),
        "ours, uniform": alike,
        "ours, list by loss": by_loss,
        "ours, uniform, recalibrated": alike,
        "ours, list by loss, recalibrated": by_loss,
        "corp, uniform q/k and MLP": lambda: corp_of(harness).network,
        "variance-based pruning, MLP alone": functools.cache(pruned),
        "clover, uniform": listed("clover", clover, "uniform"),
        "wpac, uniform": listed("wpac", wpac, "uniform"),
        "ours, importance list": listed("ours", ours, "importance"),
    }
    for name, make in variants.items():
        for share in BUDGETS:
            scored = functools.partial(_whole, harness, name, make, share)
            yield "whole network", share, name, scored


def _whole(harness: Harness, name: str, make: Callable[[], Supernet], share: float):
    network = make()
    widths = harness.within(network, share)
    if name.startswith("corp"):
        network = corp_of(harness).at(widths)
    if name.endswith("recalibrated"):
        network = _recalibrated(harness, network, widths)
    return harness.scores(network, widths)


def _recalibrated(harness: Harness, network: Supernet, widths: SubnetSpec) -> Supernet:
    """Fitted to four fifths of the calibration images, chosen by the rest."""
    batches = list(harness.batches(harness.recalibration_images))
    end = len(batches) * 4 // 5
    done = recalibrating.recalibrated(
        network, widths, batches[:end], batches[end:], rounds=1
    )
    return network._replace(params=done.params, compensation=None)


def images(harness: Harness, cuts: list[str]) -> Iterator[Row]:
    """Ours, uniform: few and many images, labels or none, a pass in half precision."""
    del cuts
    for count, *how in (
        (harness.config.data.images, "logit"),
        (256, "logit"),
        (256, "logit", "bfloat16"),
        (256, "top_logit"),
        (256, "self_kl"),
        (64, "logit"),
    ):
        stats = functools.partial(harness.stats, count, *how)

        @functools.cache
        def network(stats=stats):
            made = harness.contracted(OURS, stats())
            return harness.listed(made, "ours", "uniform")

        name = f"{count} images, cost {', '.join(how)}"
        for share in BUDGETS[:3]:
            yield (
                "uniform",
                share,
                name,
                functools.partial(_whole, harness, name, network, share),
            )


TABLES = {"parts": parts, "whole": whole, "images": images}


def main() -> None:
    """Runs tables row by row."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--path", required=True, help="weights file, or a directory")
    parser.add_argument("--variant", default="", help="such as Ti/16")
    parser.add_argument("--recipe", default="")
    parser.add_argument("--calibration", required=True, help="source of images")
    parser.add_argument("--labels", default="")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--cost", default="logit", choices=sorted(costs.COSTS))
    parser.add_argument("--test", required=True, help="source of labelled images")
    parser.add_argument("--recalibration-images", type=int, default=500)
    parser.add_argument("--test-images", type=int, default=0, help="0 for all")
    parser.add_argument("--tables", default="parts,whole,images")
    parser.add_argument("--cuts", default="", help="of parts: attention,qk,vo,mlp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", required=True, help="directory for finished rows")
    parser.add_argument("--out", help="directory for closed_forms_TABLE.{md,json}")
    args = parser.parse_args()
    logging.getLogger("flax_skd").setLevel(logging.INFO)
    logging.getLogger("flax_skd").addHandler(logging.StreamHandler())
    harness = Harness(args, _moments(args.tables))
    cuts = [cut for cut in args.cuts.split(",") if cut]
    for table in args.tables.split(","):
        rows, firsts = [], {}
        for cut, share, name, make in TABLES[table](harness, cuts):
            try:
                scores = harness.kept((cut, share, name), make)
            except ValueError as error:
                print(f"{cut}, {share:.3f}, {name}: {error}", flush=True)
                continue
            first = firsts.setdefault((cut, share), scores)
            rows.append(row(cut, share, name, scores, first))
            print(line(rows[-1]), flush=True)
        text = "\n".join([HEAD, *map(line, rows)])
        tables.write(args.out, f"closed_forms_{table}", rows, text)


def _moments(tables: str) -> tuple[str, ...]:
    """What the pass must hold for these tables."""
    if "parts" in tables.split(","):
        return (*second_moments.WEIGHTINGS, second_moments.ATTENDED)
    return tuple(second_moments.WEIGHTINGS)


if __name__ == "__main__":
    main()
