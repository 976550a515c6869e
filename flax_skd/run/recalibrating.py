"""Recalibration: one size fitted to images by closed forms, never worse than before."""

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from flax_skd.io import data, sources
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import compensation, costs, losses, recalibration, subnet
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.statistics import collect
from flax_skd.method.vit import Array, Params, ViT
from flax_skd.run import evaluate

_LOG = logging.getLogger(__name__)
Batches = Iterable[dict[str, Any]]
_BATCH = 50  # images of a pass at once


class Recalibrated(NamedTuple):
    """One size, fitted.

    Attributes:
      params: full-shaped; `subnet.extract` cuts them.
      kl: mean divergence from the full network on the images held out, of every
        network that was tried, in this order; "stored" is the network as it was.
      chosen: the key of the smallest.
    """

    params: Params
    kl: dict[str, float]
    chosen: str


def recalibrated(
    network: Supernet,
    widths: SubnetSpec,
    batches: Batches,
    held_out: Batches,
    *,
    rounds: int = 2,
) -> Recalibrated:
    """Fits the repairs of one cut to the cut network's own statistics, then its head.

    Every round takes the statistics of the network as the round before left it. The
    best of all rounds, with and without the head corrected, by the divergence from the
    full network on images that no fit has seen, is returned; the network as it was is
    one of the candidates.

    Args:
      network: with a compensation.
      widths: of the size wanted.
      batches: images to fit to, read `rounds` times and once more for the features.
      held_out: other images, to choose by, read once.
      rounds: 0 corrects the head alone.

    Raises:
      ValueError: if the network has no compensation, or there are no images.
    """
    if network.compensation is None:
        raise ValueError(
            "the super-network has no compensation to fit: contract it with "
            "--config.compensation=least_squares (configs/balanced.py)."
        )
    spec = network.spec
    cost = costs.top_logit if spec.num_classes else costs.feature  # read no labels
    model = ViT(spec)
    traced = subnet.as_data(widths)
    masks = subnet.masks(spec, traced)
    repaired = jax.jit(compensation.repaired, static_argnums=1)
    repairs = network.compensation
    found = {"stored": repaired(network.params, spec, repairs, traced)}
    for number in range(1, rounds + 1):
        last = [*found.values()][-1]
        own = collect(
            model,
            last,
            batches,
            cost=cost,
            weightings=(),
            moments=("gradient",),
            masks=masks,
        )
        repairs = recalibration.own_compensation(
            jax.device_get(own), spec, network.compensation, widths
        )
        found[f"round {number}"] = repaired(network.params, spec, repairs, traced)
    if spec.num_classes:
        found |= _heads_corrected(model, network.params, found, masks, batches)
    kl = _divergences(model, network.params, found, masks, held_out)
    chosen = min(kl, key=kl.__getitem__)
    told = ", ".join(f"{name} {value:z.4f}" for name, value in kl.items())
    _LOG.info("recalibration, KL on images held out: %s; chosen: %s", told, chosen)
    return Recalibrated(jax.device_get(found[chosen]), kl, chosen)


def fitted_to(
    description: str, *, images: int = 1000
) -> Callable[[Supernet, SubnetSpec], Recalibrated]:
    """`recalibrated` by the images of a source, a fifth of them held out.

    Args:
      description: as of `sources.open_source`; no label is read, and images that do
        not decode are logged and passed over.
      images: the most to take, the same ones every time.

    Raises:
      ValueError: if the source does not serve or has fewer than ten images.
    """
    source = sources.open_unlabelled(description)
    count = min(images, len(source))
    if count < 10:
        raise ValueError(
            f"{description}: {count} images; give at least ten, better a thousand."
        )
    order = np.random.default_rng(0).permutation(len(source))[:count]
    parts = order[count // 5 :], order[: count // 5]

    def fit(network: Supernet, widths: SubnetSpec) -> Recalibrated:
        batches, held_out = (
            data.eval_batches(
                source,
                network.spec,
                batch_size=min(_BATCH, len(part)),
                on_bad_image="skip",
                indices=[*map(int, part)],
            )
            for part in parts
        )
        return recalibrated(network, widths, batches, held_out)

    return fit


@functools.partial(jax.jit, static_argnums=0)
def _head_features(model: ViT, params: Params, images: Array, masks: Any):
    found = {}

    def tap(block, name, feature):
        if name in recalibration.HEADS and block == model.spec.depth:
            found[name] = feature
        return feature

    model.apply({"params": params}, images, masks, tap)
    return found


def _features(
    model: ViT, networks: list[tuple[Params, Any]], batches: Batches
) -> list[dict[str, np.ndarray]]:
    """What each head of each network reads of every image that is no padding.

    All networks see a batch before the next is read: an image is decoded once.
    """
    found: list[dict[str, list]] = [{} for _ in networks]
    for batch in batches:
        live = np.asarray(batch["weight"]) > 0
        for kept, (params, masks) in zip(found, networks):
            seen = _head_features(model, params, batch["image"], masks)
            for name, feature in seen.items():
                kept.setdefault(name, []).append(np.asarray(feature)[live])
    return [
        {name: np.concatenate(parts) for name, parts in kept.items()} for kept in found
    ]


def _heads_corrected(
    model: ViT, full: Params, found: dict[str, Params], masks: Any, batches: Batches
) -> dict[str, Params]:
    """The cut networks that were found, the head of each led back to the full one's."""
    networks = [(full, None), *((params, masks) for params in found.values())]
    whole, *all_cut = _features(model, networks, batches)
    return {
        f"{name}, head": recalibration.with_head(
            params,
            {
                head: recalibration.correction(
                    cut[head], whole[head], full[head]["kernel"]
                )
                for head in cut
            },
        )
        for (name, params), cut in zip(found.items(), all_cut, strict=True)
    }


def _divergences(
    model: ViT, full: Params, found: dict[str, Params], masks: Any, batches: Batches
) -> dict[str, float]:
    """Mean divergence of each cut network from the full one, each image read once."""
    totals, images = dict.fromkeys(found, 0.0), 0.0
    for batch in batches:
        want = evaluate.logits_of(model, full, batch["image"])
        for name, params in found.items():
            totals[name] += float(_divergence(model, want, params, masks, batch))
        images += float(np.asarray(batch["weight"]).sum())
    if not images:
        raise ValueError("no images to choose by: hold some out.")
    return {name: total / images for name, total in totals.items()}


@functools.partial(jax.jit, static_argnums=0)
def _divergence(model, want, params, masks, batch):
    found = model.apply({"params": params}, batch["image"], masks)
    each = losses.divergences(found, want, num_classes=model.spec.num_classes)
    return (each * batch["weight"]).sum()
