"""What DeiT does to a whole batch: erase, mix, smooth; inside the jitted step.

An image is mixed with its pair, the one as far from the other end of the batch. All
draws are of the global batch, so that sharding it over devices changes nothing.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from flax_skd.method import vit
from flax_skd.method.spec import ViTSpec

Array = jax.Array
Batch = dict[str, Array]

# Of the box that is erased: least and greatest area, as a fraction of the image's, and
# least height / width; the greatest is the inverse.
_AREA, _ASPECT = (0.02, 1 / 3), 0.3
_TRIES = 10  # for a box that fits; the image is left as it is if none does


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How batches are mixed; the recipe of DeiT unless told otherwise.

    Attributes:
      mixup, cutmix: alpha of the Beta(alpha, alpha) law of the share an image keeps; 0
        for never.
      switch: probability of cutmix instead of mixup, where both may be.
      smoothing: share of the target spread over all classes.
      erase: probability that a box of an image is replaced by noise.

    Raises:
      ValueError: if a value is not possible.
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1
    erase: float = 0.25

    def __post_init__(self):
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            if not 0 <= alpha < math.inf:
                raise ValueError(f"{name} = {alpha} must be 0 (never) or more.")
        for name in ("switch", "smoothing", "erase"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} = {value} must be in [0, 1].")


def mixed_batch(rng: Array, batch: Batch, spec: ViTSpec, options: Mixing) -> Batch:
    """A batch as it was read, erased and mixed: what `classification_loss` takes.

    Args:
      rng: a key.
      batch: `image` [B, S, S, C], uint8, or float already normalised; `label` int [B],
        or float [B, K] probabilities; anything else is kept as it is.
      spec: whose mean, std and number of classes, K, apply.
      options: static.

    Returns:
      The batch with `image` float [B, S, S, C] normalised and `label` float [B, K].
    """
    erase_rng, mix_rng = jax.random.split(rng)
    images = vit.normalise(batch["image"], spec)
    targets = smoothed_targets(
        batch["label"], num_classes=spec.num_classes, smoothing=options.smoothing
    )
    if options.erase:
        images = random_erasing(erase_rng, images, probability=options.erase)
    images, targets = mix(mix_rng, images, targets, options)
    return {**batch, "image": images, "label": targets}


def smoothed_targets(labels: Array, *, num_classes: int, smoothing: float) -> Array:
    """Probabilities of the classes, a share of them spread evenly.

    Args:
      labels: int [B], or float [B, K] probabilities.
      num_classes: K.
      smoothing: the share, in [0, 1].

    Returns:
      [B, K], float32; nan where a class is not one of 0..K-1, so that it is noticed.

    Raises:
      ValueError: if the labels are of another shape.
    """
    if labels.ndim == 2 and labels.shape[1] == num_classes:
        targets = labels.astype(jnp.float32)
    elif labels.ndim == 1 and num_classes:
        known = (labels >= 0) & (labels < num_classes)
        one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
        targets = jnp.where(known[:, None], one_hot, jnp.nan)
    else:
        raise ValueError(
            f"labels of shape {labels.shape} for {num_classes} classes: give [B] "
            "classes or [B, K] probabilities."
        )
    return (1 - smoothing) * targets + smoothing / max(num_classes, 1)


def mixup(
    rng: Array, images: Array, targets: Array, *, alpha: float
) -> tuple[Array, Array]:
    """Weighted means of each image and its pair (arXiv:1710.09412).

    Args:
      rng: a key.
      images: float [B, S, S, C].
      targets: float [B, K].
      alpha: above 0; the image keeps the share ~ Beta(alpha, alpha), one for the batch.

    Returns:
      Images and targets, mixed by the same share.
    """
    return _blend(images, targets, *_mixup_weights(rng, alpha))


def cutmix(
    rng: Array, images: Array, targets: Array, *, alpha: float
) -> tuple[Array, Array]:
    """A box of each image is its pair's (arXiv:1905.04899).

    The box is one for the batch, of the image's shape, around any pixel; what lies
    outside the image is cut off.

    Args:
      rng: a key.
      images: float [B, S, S, C].
      targets: float [B, K].
      alpha: above 0; the box has the share ~ Beta(alpha, alpha) of the pixels, before
        the cut.

    Returns:
      Images, and targets mixed by the share of pixels that are each image's.
    """
    return _blend(images, targets, *_cutmix_weights(rng, images.shape, alpha))


def mix(
    rng: Array, images: Array, targets: Array, options: Mixing
) -> tuple[Array, Array]:
    """Either `mixup` or `cutmix`, by chance, the same for the whole batch.

    Args:
      rng: a key.
      images: float [B, S, S, C].
      targets: float [B, K].
      options: an alpha of 0 leaves that one out, so that the other is done always;
        both 0: nothing is.

    Returns:
      Images and targets of the same shapes.
    """
    if not (options.mixup or options.cutmix):
        return images, targets
    if not options.cutmix:
        return mixup(rng, images, targets, alpha=options.mixup)
    if not options.mixup:
        return cutmix(rng, images, targets, alpha=options.cutmix)
    switch_rng, rng = jax.random.split(rng)
    switch = jax.random.bernoulli(switch_rng, options.switch)
    # Both kinds differ in their weights alone, which cost nothing beside the images.
    pixels, share = _mixup_weights(rng, options.mixup)
    cut_pixels, cut_share = _cutmix_weights(rng, images.shape, options.cutmix)
    pixels = jnp.where(switch, cut_pixels, pixels)
    return _blend(images, targets, pixels, jnp.where(switch, cut_share, share))


def random_erasing(rng: Array, images: Array, *, probability: float) -> Array:
    """A box of some images becomes normal noise, pixel by pixel (arXiv:1708.04896).

    Args:
      rng: a key.
      images: float [B, S, S, C], normalised, so that the noise is of their scale.
      probability: that an image is one of them.

    Returns:
      Images of the same shape and dtype.
    """
    batch, height, width, _ = images.shape
    keys = jax.random.split(rng, 4)
    chosen = jax.random.bernoulli(keys[0], probability, (batch,))
    sides = _erased_sides(keys[1], batch, (height, width))
    room = jnp.array([[height, width]]) - sides
    # The corner is uniform over all that keep the box inside.
    corner = jax.random.randint(keys[2], (batch, 2), 0, room + 1)
    box = _box(corner, corner + sides, (height, width))
    noise = jax.random.normal(keys[3], images.shape, images.dtype)
    return jnp.where(box & chosen.reshape(-1, 1, 1, 1), noise, images)


def _erased_sides(rng: Array, batch: int, size: tuple[int, int]) -> Array:
    """Sides of the first box of ten that fits, int [B, 2]; 0 if none does.

    The area is uniform, the shape log-uniform.
    """
    uniform = jax.random.uniform(rng, (2, batch, _TRIES))
    areas = math.prod(size) * (_AREA[0] + (_AREA[1] - _AREA[0]) * uniform[0])
    shapes = _ASPECT ** (1 - 2 * uniform[1])
    sides = jnp.stack([jnp.sqrt(areas * shapes), jnp.sqrt(areas / shapes)], axis=-1)
    sides = jnp.round(sides).astype(jnp.int32)
    fit = ((sides > 0) & (sides < jnp.array(size).reshape(1, 1, 2))).all(-1)
    first = fit.argmax(axis=1).reshape(-1, 1, 1)
    sides = jnp.take_along_axis(sides, first, axis=1)[:, 0]
    return jnp.where(fit.any(axis=1)[:, None], sides, 0)


def _mixup_weights(rng: Array, alpha: float) -> tuple[Array, Array]:
    """What an image keeps: of each pixel [1, 1, 1, 1], and of the label []."""
    share = jax.random.beta(rng, alpha, alpha, (), jnp.float32)
    return share.reshape(1, 1, 1, 1), share


def _cutmix_weights(
    rng: Array, shape: tuple[int, ...], alpha: float
) -> tuple[Array, Array]:
    """What an image keeps: of each pixel [1, S, S, 1], and of the label []."""
    share_rng, centre_rng = jax.random.split(rng)
    size = jnp.array([shape[1:3]])
    side = jnp.sqrt(1 - jax.random.beta(share_rng, alpha, alpha, (), jnp.float32))
    half = (side * size.astype(jnp.float32)).astype(jnp.int32) // 2
    centre = jax.random.randint(centre_rng, (1, 2), 0, size)
    low, high = jnp.maximum(centre - half, 0), jnp.minimum(centre + half, size)
    box = _box(low, high, shape[1:3])
    kept = shape[1] * shape[2] - (high - low).prod()
    share = kept.astype(jnp.float32) / (shape[1] * shape[2])
    return jnp.where(box, 0.0, 1.0), share


def _box(low: Array, high: Array, size: tuple[int, int]) -> Array:
    """Whether pixels lie in boxes low [N, 2] (row, column) to high: [N, S, S, 1]."""
    pixels = jnp.stack(jnp.indices(size), axis=-1)[None]
    low, high = low.reshape(-1, 1, 1, 2), high.reshape(-1, 1, 1, 2)
    return ((pixels >= low) & (pixels < high)).all(-1, keepdims=True)


def _blend(
    images: Array, targets: Array, pixels: Array, share: Array
) -> tuple[Array, Array]:
    weights, share = pixels.astype(images.dtype), share.astype(targets.dtype)
    mixed = weights * images + (1 - weights) * images[::-1]
    return mixed, share * targets + (1 - share) * targets[::-1]
