"""What a calibration pass reads of a batch, and what it must not leave behind."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.method.feature_sums import SITES


def arrays_of(batch: dict[str, Any]) -> dict[str, Any]:
    """The arrays a pass reads of a batch; ValueError if one is missing or misshapen."""
    if not hasattr(batch, "keys"):  # a source, or one batch, given for the batches
        raise ValueError(
            f"batches hold a {type(batch).__name__}, not dicts of arrays: give a list "
            "of batches, or of a source eval_batches(source, spec, batch_size=50)."
        )
    names = ("image", "label", "weight")
    wrong = ", ".join(k for k in names if k not in batch)
    if not wrong:
        shapes = {k: np.shape(batch[k]) for k in names}
        if shapes["label"] == shapes["weight"] == shapes["image"][:1]:
            return {k: batch[k] for k in names}
        # A label of shape [1] would broadcast to all images.
        wrong = f"arrays of the right shapes, but {shapes}"
    raise ValueError(
        f"a batch has no {wrong}: it needs image [B, S, S, C], label [B] and weight "
        "[B], 1 for an image and 0 for padding."
    )


def check_every(every: int, images: int, devices: int) -> None:
    """Raises ValueError unless `hidden_every` divides the images that a device has."""
    if every < 1 or images // devices % every:
        raise ValueError(
            f"hidden_every = {every} must divide the {images // devices} images that a "
            f"device has of a batch of {images}."
        )


def check_finite(statistics: Any) -> None:
    """Raises ValueError naming the first block and feature that is not finite."""
    sums = statistics.sums, statistics.branches
    sums, branches = jax.device_get(jax.tree.map(lambda x: jnp.isfinite(x).all(), sums))
    # Features first: a bad one spoils every gradient before it as well.
    kinds = ("values", lambda f: [f.first]), ("gradients", jax.tree.leaves)
    bad = [
        (f"{what} of {site}", index)
        for what, leaves in kinds
        for index, block in enumerate(sums)
        for site in SITES
        if not all(leaves(block[site]))
    ]
    good = [all(jax.tree.leaves(block)) for block in branches]
    bad += [("second moments", i) for i, fine in enumerate(good) if not fine]
    for what, index in bad[:1]:
        raise ValueError(
            f"the {what} in block {index} are not finite on the calibration images: "
            "look for NaN or inf in the parameters there or before it and in the "
            "images and for labels that are no class, or use float32."
        )


def check_gradients(statistics: Any) -> None:
    """Raises ValueError if no gradient of the cost reached any block."""
    sums = [block[site].taylor1.any() for block in statistics.sums for site in SITES]
    if not any(jax.device_get(sums)):
        raise ValueError(
            "no gradient of the cost reaches the network, to order it by: "
            "a fresh head is all zeros. Train it first, or take magnitude or random."
        )
