"""The variants of `closed_forms.py`: recipes, and what is no recipe, as data."""

import functools
from collections.abc import Callable

import rival_forms
import same_image
from harness import Harness, Scores

from flax_skd.io.checkpoint import Supernet
from flax_skd.method.balance import Balanced
from flax_skd.method.contraction import CRITERIA, balanced_criterion
from flax_skd.method.spec import SubnetSpec
from flax_skd.run import evaluate
from flax_skd.run.recipes import Recipe

WPAC = CRITERIA["wpac"]
BALANCED = CRITERIA["balanced"]
OURS = Recipe(BALANCED, "greedy", "least_squares")

# Cut, share, variant, and what measures it.
Row = tuple[str, float, str, Callable[[], Scores]]
# Of a harness and a cut: share -> the network and what it keeps.
Cuts = Callable[[float], tuple[Supernet, SubnetSpec]]
Variant = Recipe | Callable[[Harness, str], Cuts]


def _variance_pruned(harness: Harness, cut: str) -> Cuts:
    network = rival_forms.variance_pruned(harness.network, harness.stats())

    def of(share: float):
        spec, levels = network.spec, network.dropout_list
        limit = share * spec.depth * spec.mlp_dim
        rows = levels.all_widths(spec)
        return network, next(row for row in rows if sum(row.mlp_dim) <= limit)

    return of


def _corp(harness: Harness, cut: str) -> Cuts:
    rival = corp_of(harness)

    def of(share: float):
        widths = evaluate.fixed_cut(harness.network.spec, cut, share).widths
        return rival.at(widths), widths

    return of


@functools.cache
def corp_of(harness: Harness) -> rival_forms.Corp:
    return rival_forms.Corp(harness.network, harness.stats(), harness.batches())


def _same_image(harness: Harness, cut: str) -> Cuts:
    images = harness.config.list.images
    fitted = same_image.SameImage(harness.network, harness.batches(images))

    def of(share: float):
        widths = evaluate.fixed_cut(harness.network.spec, cut, share).widths
        return fitted.at(widths), widths

    return of


def of_recipe(recipe: Recipe, harness: Harness, cut: str) -> Cuts:
    network = harness.contracted(recipe)
    return lambda share: (
        network,
        evaluate.fixed_cut(network.spec, cut, share).widths,
    )


# Cut -> shares -> variants; the first is what the others are compared with.
PARTS: dict[tuple[str, tuple[float, ...]], dict[str, Variant]] = {
    ("attention", (3 / 4, 2 / 4)): {
        "wpac": Recipe(WPAC),
        "taylor1": Recipe(CRITERIA["taylor1"]),
        "pca": Recipe(CRITERIA["pca"]),
        "clover": Recipe(rival_forms.CLOVER),
        "balanced": Recipe(BALANCED),
        "balanced + mean": Recipe(BALANCED, compensation="mean"),
        "balanced + least squares": Recipe(BALANCED, compensation="least_squares"),
    },
    ("qk", (1 / 4, 1 / 8)): {
        "wpac": Recipe(WPAC),
        "taylor1": Recipe(CRITERIA["taylor1"]),
        "pca": Recipe(CRITERIA["pca"]),
        "clover": Recipe(rival_forms.CLOVER),
        "corp": _corp,
        "balanced, plain tokens": Recipe(
            balanced_criterion(Balanced(query="plain", key="plain", parts=("qk",)))
        ),
        "balanced, weighted queries": Recipe(
            balanced_criterion(Balanced(key="plain", parts=("qk",)))
        ),
        "same image, each cut anew, plain tokens": _same_image,
        "balanced": Recipe(BALANCED),
        "balanced, attended keys": Recipe(
            balanced_criterion(Balanced(keys="attended", parts=("qk",)))
        ),
    },
    ("vo", (2 / 4, 1 / 4)): {
        "wpac": Recipe(WPAC),
        "wpac + least squares": Recipe(WPAC, compensation="least_squares"),
        "clover": Recipe(rival_forms.CLOVER),
        "balanced": Recipe(BALANCED),
        "balanced + least squares": Recipe(BALANCED, compensation="least_squares"),
        "balanced + least squares, plain tokens": Recipe(
            balanced_criterion(Balanced(mixed="plain", parts=("vo",))),
            compensation="least_squares",
            tokens="plain",
        ),
        "balanced, gradient metric + least squares": Recipe(
            balanced_criterion(Balanced(metric="gradient", parts=("vo",))),
            compensation="least_squares",
        ),
    },
    ("mlp", (3 / 4, 2 / 4, 1 / 4)): {
        "taylor2": Recipe(WPAC),
        "taylor2 + mean": Recipe(WPAC, compensation="mean"),
        "taylor2 + least squares": Recipe(WPAC, compensation="least_squares"),
        "variance-based pruning": _variance_pruned,
        "variance-based pruning, blocks alike": Recipe(
            WPAC, "variance", "mean", "plain"
        ),
        "corp": _corp,
        "variance * weight + least squares": Recipe(
            WPAC, "variance_weight", "least_squares"
        ),
        "greedy + least squares, plain tokens": Recipe(
            WPAC, "greedy", "least_squares", "plain"
        ),
        "greedy + least squares": Recipe(WPAC, "greedy", "least_squares"),
        "measured order + least squares": Recipe(WPAC, "measured", "least_squares"),
    },
}
