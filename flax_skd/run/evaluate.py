"""Accuracy of sub-networks, and the sweep over cuts or levels to a table."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_skd.io import checked
from flax_skd.method import compensation, losses, macs, subnet
from flax_skd.method.compensation import Compensation
from flax_skd.method.piad import DropoutList
from flax_skd.method.spec import SubnetSpec, ViTSpec
from flax_skd.method.vit import Array, Params, ViT

COLUMNS = (
    *("criterion", "cut", "kept", "level", "macs", "macs_paper", "params"),
    *("top1", "top5", "kl", "agreement", "images"),
)
CUTS: dict[str, tuple[str, ...]] = {
    "attention": ("qk_dim", "vo_dim"),
    "qk": ("qk_dim",),
    "vo": ("vo_dim",),
    "mlp": ("mlp_dim",),
    "all": ("qk_dim", "vo_dim", "mlp_dim"),
}


class Score(NamedTuple):
    """What a sub-network does on labelled images.

    Attributes:
      top1, top5: accuracy in percent.
      kl: mean KL divergence from the full network's output, nats; with fewer than two
        classes the mean of `losses.divergences`, which has no logarithm then.
      agreement: share of images with the full network's first class, percent.
      images: how many.
    """

    top1: float
    top5: float
    kl: float
    agreement: float
    images: int


class Cut(NamedTuple):
    """One sub-network of a sweep, and what the table calls it.

    Attributes:
      cut: a key of `CUTS`.
      kept: share of the cut branches that is kept; of the block MACs for a level.
      level: of a dropout list, or None.
      widths: static widths.
    """

    cut: str
    kept: float
    level: int | None
    widths: SubnetSpec


def fixed_cut(spec: ViTSpec, cut: str, kept: float) -> Cut:
    """The same share of one kind of branch in every block, at least one dim.

    Raises:
      ValueError: if the cut is unknown or the share not in (0, 1].
    """
    if cut not in CUTS:
        known = ", ".join([*CUTS, "levels", "budgets"])
        raise ValueError(f"cut {cut!r}: choose of {known}.")
    if not 0 < kept <= 1:
        raise ValueError(f"kept = {kept} must lie in (0, 1].")
    full = SubnetSpec.full(spec)
    sizes = {
        name: tuple(max(1, round(kept * size)) for size in getattr(full, name))
        for name in CUTS[cut]
    }
    return Cut(cut, kept, None, full._replace(**sizes).check(spec))


def list_cut(spec: ViTSpec, dropout_list: DropoutList, level: int) -> Cut:
    """A level of a dropout list as a row of a sweep."""
    widths = dropout_list.widths(level, spec)
    return Cut("all", round(macs.branch_fraction(spec, widths), 4), level, widths)


def score_sums(
    model: ViT,
    params: Params,
    batch: dict[str, Array],
    full: Array,
    widths: SubnetSpec | None,
    repairs: Compensation | None = None,
) -> Score:
    """Sums over one batch of what `Score` averages; traced widths, one compile."""
    logits = full
    if widths is not None:
        params = compensation.repaired(params, model.spec, repairs, widths)
        masks = subnet.masks(model.spec, widths)
        logits = model.apply({"params": params}, batch["image"], masks)
    live, labels = batch["weight"], batch["label"]
    _, top = jax.lax.top_k(logits, min(5, logits.shape[-1]))
    right = top == labels[:, None]
    kl = losses.divergences(logits, full, num_classes=model.spec.num_classes)

    def total(values):
        return (values.astype(live.dtype) * live).sum()

    return Score(
        top1=total(right[:, 0]),
        top5=total(right.any(-1)),
        kl=total(kl),
        agreement=total(top[:, 0] == full.argmax(-1)),
        images=live.sum(),
    )


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model: ViT, params: Params, images: Array) -> Array:
    """What a model makes of a batch, as it is; compiled once for a model and a shape."""
    return model.apply({"params": params}, images)


@functools.partial(jax.jit, static_argnums=0)
def float32_logits(spec: ViTSpec, params: Params, images: Array) -> Array:
    """Logits [B, K] whose products are float32 on every device.

    Left to itself a TPU multiplies float32 in bfloat16, and a recent GPU in TF32.
    """
    with jax.default_matmul_precision("highest"):
        return ViT(spec).apply({"params": params}, images)


# Compiled once too, however often a run evaluates.
_jitted_sums = jax.jit(score_sums, static_argnums=0)


def evaluate(
    model: ViT,
    params: Params,
    batches: Iterable[dict[str, Any]],
    widths: Sequence[SubnetSpec | None],
    *,
    repairs: Compensation | None = None,
    progress: Callable[[int], Any] = lambda images: None,
) -> list[Score]:
    """Scores of many sub-networks of one network, each image read once.

    Args:
      model: of the full network.
      params: its parameters.
      batches: dicts of `image`, `label`, `weight` (0 for padding), of one shape.
      widths: the sub-networks; None for the model as it is, extracted perhaps.
      repairs: the compensation of the network, if it has one.
      progress: called with the size of a batch each time a sub-network has seen it.

    Returns:
      One `Score` a sub-network; agreement and KL are against the full network.

    Raises:
      ValueError: if there is no image, or the logits are not finite.
    """
    traced = [w and subnet.as_data(w) for w in widths]
    totals = None
    for batch in batches:
        full = logits_of(model, params, batch["image"])
        sums = []
        for w in traced:
            # Waited for: progress is what is done, and no two programs that meet over
            # devices are in flight at once (virtual CPU devices may then deadlock).
            sums.append(
                jax.block_until_ready(
                    _jitted_sums(model, params, batch, full, w, repairs)
                )
            )
            progress(len(batch["label"]))
        totals = sums if totals is None else jax.tree.map(jnp.add, totals, sums)
    if totals is None:
        raise ValueError("no images to evaluate: the source of batches is empty.")
    return [_score(total) for total in jax.device_get(totals)]


def _score(total: Score) -> Score:
    images = int(total.images)
    if not images:
        raise ValueError("no images to evaluate: every image was skipped.")
    if not jnp.isfinite(total.kl):
        raise ValueError(
            "the logits are not finite: look for NaN in the parameters, or evaluate "
            "in float32."
        )
    percent = (100 * float(x) / images for x in (total.top1, total.top5))
    kl, agreement = float(total.kl) / images, 100 * float(total.agreement) / images
    return Score(*percent, kl, agreement, images)


def row(criterion: str, spec: ViTSpec, cut: Cut, score: Score) -> dict[str, Any]:
    """One line of the sweep's table, keys as in `COLUMNS`."""
    values = (
        *(criterion, cut.cut, cut.kept, cut.level),
        *checked.macs_of(spec, cut.widths).values(),
        macs.param_count(spec, cut.widths),
        *(round(x, 4) for x in score[:4]),
        score.images,
    )
    return dict(zip(COLUMNS, values, strict=True))


def sweep(
    networks: dict[str, Params],
    model: ViT,
    batches: Iterable[dict[str, Any]],
    cuts: list[Cut],
    *,
    repairs: dict[str, Compensation] | None = None,
    progress: Callable[[int], Any] = lambda images: None,
    after_each: Callable[[str, list[dict[str, Any]]], None] = lambda name, rows: None,
) -> list[dict[str, Any]]:
    """The table of criteria against cuts.

    Args:
      networks: full parameters by criterion; all the same function.
      model: the full network.
      batches: an iterable that can be read once a criterion.
      cuts: what to evaluate.
      repairs: compensation by criterion, of those that have one.
      progress: as in `evaluate`.
      after_each: called with a criterion and its rows when they are done, so that
        finished work can be kept.

    Returns:
      Rows with the keys of `COLUMNS`, criterion by criterion.
    """
    rows = []
    for name, params in networks.items():
        scores = evaluate(
            model,
            params,
            batches,
            [c.widths for c in cuts],
            repairs=(repairs or {}).get(name),
            progress=progress,
        )
        fresh = [row(name, model.spec, c, s) for c, s in zip(cuts, scores)]
        after_each(name, fresh)
        rows += fresh
    return rows
