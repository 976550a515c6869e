"""From an image as it was stored to the square the network was trained on."""

import math

import numpy as np

from flax_skd.io.extras import require
from flax_skd.method.spec import ViTSpec


class UnfitImageError(ValueError):
    """An image that was read and cannot be brought to the network's size or kind."""


def evaluation(image, spec: ViTSpec) -> np.ndarray:
    """The central square of an image, as evaluation reads it.

    The short side, or with `crop_mode` `squash` both sides, is resized to
    `floor(image_size / crop_fraction)` and the central `image_size` pixels are kept,
    with the roundings of torchvision's Resize and CenterCrop on PIL images, so that
    published checkpoints see the pixels they were tested on. Pixels are not normalised:
    the network does that.

    Args:
      image: a PIL image, or uint8 [H, W, C].

    Returns:
      uint8 [image_size, image_size, in_channels].

    Raises:
      UnfitImageError: if the image is of a kind or a shape that has no such form.
    """
    short = math.floor(spec.image_size / spec.crop_fraction)
    image = to_pil(image, spec.in_channels)
    if spec.crop_mode == "squash":
        image = _resized(image, (short, short), spec)
    else:
        image = resize_short_side(image, short, spec)
    return to_array(central_square(image, spec.image_size))


def to_pil(image, channels: int):
    """A PIL image in RGB (3 channels) or grey (1).

    Args:
      image: a PIL image, or uint8 [H, W, C] with 1, 3 or 4 (alpha last) channels.

    Raises:
      UnfitImageError: for another kind of image; 16-bit and float images have no
        agreed way to 8 bits.
      ValueError: for another number of channels.
    """
    pil = require("PIL.Image")
    if channels not in (1, 3):
        raise ValueError(
            f"in_channels = {channels}: images are read with 1 or 3 channels; hand "
            "other batches over as arrays of your own."
        )
    if not isinstance(image, pil.Image):
        image = _from_array(pil, image)
    if image.mode[0] in "IF":
        raise UnfitImageError(
            f"it is of mode {image.mode}, with more than 8 bits a channel: convert it "
            "to 8 bits"
        )
    wanted = "RGB" if channels == 3 else "L"
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, and PIL does not warn
    return image if image.mode == wanted else image.convert(wanted)


def _from_array(pil, image):
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise UnfitImageError(
            f"it is {array.dtype} {list(array.shape)}, and must be uint8 [height, "
            "width, channels] with 1, 3 or 4 channels"
        )
    return pil.fromarray(array[..., 0] if array.shape[-1] == 1 else array)


def resize_short_side(image, short: int, spec: ViTSpec):
    """A PIL image with its short side `short` pixels, the long one rounded down.

    Raises:
      UnfitImageError: if that has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`: a
        strip of one by 65,000 pixels would take sixteen gigabytes.
    """
    width, height = image.size
    if width <= height:
        size = (short, int(short * height / width))
    else:
        size = (int(short * width / height), short)
    most = require("PIL.Image").MAX_IMAGE_PIXELS
    if most is not None and size[0] * size[1] > most:
        raise UnfitImageError(
            f"resized from {width} x {height} to {size[0]} x {size[1]} it has more "
            f"pixels than the {most} allowed by PIL.Image.MAX_IMAGE_PIXELS"
        )
    return _resized(image, size, spec)


def _resized(image, size: tuple[int, int], spec: ViTSpec):
    return image if size == image.size else image.resize(size, resampling(spec))


def central_square(image, size: int):
    """The central `size` x `size` pixels; halves round to even, as torchvision's."""
    left, top = (round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def resampling(spec: ViTSpec):
    """PIL's name for the interpolation of `spec`."""
    return require("PIL.Image").Resampling[spec.interpolation.upper()]


def to_array(image) -> np.ndarray:
    """uint8 [H, W, C] of a PIL image."""
    array = np.asarray(image)
    return array[..., None] if array.ndim == 2 else array
