"""Random crops, flips and colours of training images, on the host.

An augmentation is a function (image, rng, spec) -> uint8 [S, S, C]; its options are
keywords, set with `functools.partial`. The steps it is made of take and give PIL
images, so that another one goes between two of them.
"""

import math

import numpy as np

from flax_skd.io import preprocess, rand_augment
from flax_skd.io.extras import require
from flax_skd.method.spec import ViTSpec

_RATIO = (3 / 4, 4 / 3)
_TRIES = 10  # for a crop that fits, as in torchvision


def none(image, rng: np.random.Generator, spec: ViTSpec) -> np.ndarray:
    """The preprocessing of evaluation; draws nothing."""
    del rng
    return preprocess.evaluation(image, spec)


def flip_crop(
    image,
    rng: np.random.Generator,
    spec: ViTSpec,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = _RATIO,
    flip: float = 0.5,
) -> np.ndarray:
    """A random part of the image, resized to the square, and a random flip.

    Inception's crop (arXiv:1409.4842) as DeiT uses it.

    Args:
      image: a PIL image, or uint8 [H, W, C].
      scale: least and greatest area of the part, as a fraction of the image's.
      ratio: least and greatest width / height of the part.
      flip: probability of the horizontal flip; 0 where sides matter (digits).

    Returns:
      uint8 [image_size, image_size, in_channels].
    """
    image = _flipped_crop(image, rng, spec, scale=scale, ratio=ratio, flip=flip)
    return preprocess.to_array(image)


def deit(
    image,
    rng: np.random.Generator,
    spec: ViTSpec,
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    flip: float = 0.5,
    magnitude: float = 9.0,
) -> np.ndarray:
    """`flip_crop`, then two operations of RandAugment: what DeiT does to one image.

    Args:
      image: a PIL image, or uint8 [H, W, C].
      scale: least and greatest area of the crop, as a fraction of the image's.
      flip: probability of the horizontal flip; 0 where sides matter (digits).
      magnitude: of RandAugment, 0 to 10; see `rand_augment.rand_augment`.

    Returns:
      uint8 [image_size, image_size, in_channels].

    Raises:
      ValueError: if the magnitude is out of range.
    """
    if not 0 <= magnitude <= 10:
        raise ValueError(f"magnitude = {magnitude} must be 0 to 10.")
    image = _flipped_crop(image, rng, spec, scale=scale, ratio=_RATIO, flip=flip)
    fill = tuple(min(255, max(0, round(255 * mean))) for mean in spec.mean)
    image = rand_augment.rand_augment(
        image, rng, fill=fill, magnitude=magnitude, resample=spec.interpolation
    )
    return preprocess.to_array(image)


def shift_crop(
    image,
    rng: np.random.Generator,
    spec: ViTSpec,
    *,
    pad: int = 4,
    flip: float = 0.5,
) -> np.ndarray:
    """The image moved by up to `pad` pixels, and a random flip: for small images.

    Args:
      image: a PIL image, or uint8 [H, W, C]; its central square is resized to
        `image_size` first.
      pad: pixels of zeros added on every side before the square is cut out again.
      flip: probability of the horizontal flip; 0 where sides matter (digits).

    Returns:
      uint8 [image_size, image_size, in_channels].

    Raises:
      ValueError: if `pad` is negative.
    """
    if pad < 0:
        raise ValueError(f"pad = {pad} must be at least 0.")
    size = spec.image_size
    image = preprocess.to_pil(image, spec.in_channels)
    image = preprocess.resize_short_side(image, size, spec)
    image = random_flip(preprocess.central_square(image, size), rng, flip=flip)
    array = preprocess.to_array(image)
    # By hand: four times as fast as np.pad.
    padded = np.zeros((size + 2 * pad, size + 2 * pad, array.shape[-1]), np.uint8)
    padded[pad : pad + size, pad : pad + size] = array
    top, left = rng.integers(0, 2 * pad + 1, size=2)
    return padded[top : top + size, left : left + size]


def _flipped_crop(
    image, rng: np.random.Generator, spec: ViTSpec, *, scale, ratio, flip
):
    image = preprocess.to_pil(image, spec.in_channels)
    box = crop_box(image.size, rng, scale=scale, ratio=ratio)
    side = (spec.image_size, spec.image_size)
    image = image.crop(box).resize(side, preprocess.resampling(spec))
    return random_flip(image, rng, flip=flip)


def crop_box(
    size: tuple[int, int],
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) in an image of `size` (width, height), pixels.

    Its area is uniform in `scale`, its shape log-uniform in `ratio`. Where ten draws
    do not fit it is the largest central box whose shape lies in `ratio`.

    Raises:
      ValueError: if `scale` does not rise within 0 to 1.
    """
    if not 0 <= scale[0] <= scale[1] <= 1:
        raise ValueError(
            f"scale = {scale}: the least share of the area (min_scale) must be 0 to 1, "
            "and the most at least that."
        )
    width, height = size
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_TRIES):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(0, width - w + 1))
            top = int(rng.integers(0, height - h + 1))
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_flip(image, rng: np.random.Generator, *, flip: float):
    """A PIL image, mirrored left to right with probability `flip`.

    Raises:
      ValueError: if `flip` is no probability.
    """
    if not 0 <= flip <= 1:
        raise ValueError(f"flip = {flip} must be 0 to 1.")
    if rng.random() >= flip:
        return image
    return image.transpose(require("PIL.Image").Transpose.FLIP_LEFT_RIGHT)
