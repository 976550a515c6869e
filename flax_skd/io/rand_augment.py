"""RandAugment (arXiv:1909.13719) of PIL images, as DeiT trains with it.

Fifteen operations share one scale of magnitudes, 0 to 10. Severity increases with it:
10 always changes an image most. Operations that go two ways (left or right, darker or
brighter) choose theirs by chance.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flax_skd.io.extras import require

_MOST = 10.0  # the end of the scale
_STD = 0.5  # of the magnitudes drawn
_COUNT = 2  # operations drawn, with replacement
_PROBABILITY = 0.5  # that one which was drawn is applied
_DEGREES = 30
_SHEAR = 0.3
_SHIFT = 0.45  # of the side
_ENHANCE = 0.9  # factors 0.1 to 1.9
_ADDED = 110  # to the pixels below
_DARK = 128


class _How(NamedTuple):
    """What an operation needs beside the image.

    Attributes:
      severity: 0 to 1.
      direction: 1 or -1, for the operations that go two ways.
      fill: colour of pixels from outside, as PIL takes it.
      resample: PIL's interpolation, for those that move pixels.
    """

    severity: float
    direction: int
    fill: Any
    resample: Any


def _affine(image, matrix: tuple[float, ...], how: _How):
    method = require("PIL.Image").Transform.AFFINE
    return image.transform(
        image.size, method, matrix, resample=how.resample, fillcolor=how.fill
    )


def _by_table(image, table: list[int]):
    return image.point(table * len(image.getbands()))


def _autocontrast(image, how: _How):
    return require("PIL.ImageOps").autocontrast(image)


def _equalize(image, how: _How):
    return require("PIL.ImageOps").equalize(image)


def _invert(image, how: _How):
    return require("PIL.ImageOps").invert(image)


def _rotate(image, how: _How):
    angle = how.direction * how.severity * _DEGREES
    return image.rotate(angle, resample=how.resample, fillcolor=how.fill)


def _posterize(image, how: _How):
    step = 2 ** (4 + int(how.severity * 4))  # 4 bits down to none: black
    return _by_table(image, [i // step * step for i in range(256)])


def _solarize(image, how: _How):
    threshold = 256 - int(how.severity * 256)
    return require("PIL.ImageOps").solarize(image, threshold)


def _solarize_add(image, how: _How):
    added = int(how.severity * _ADDED)
    lighter = [min(255, i + added) for i in range(_DARK)]
    return _by_table(image, [*lighter, *range(_DARK, 256)])


def _enhance(kind: str) -> Callable[[Any, _How], Any]:
    def enhanced(image, how: _How):
        factor = 1 + how.direction * how.severity * _ENHANCE
        return getattr(require("PIL.ImageEnhance"), kind)(image).enhance(factor)

    return enhanced


def _shear_x(image, how: _How):
    return _affine(image, (1, how.direction * how.severity * _SHEAR, 0, 0, 1, 0), how)


def _shear_y(image, how: _How):
    return _affine(image, (1, 0, 0, how.direction * how.severity * _SHEAR, 1, 0), how)


def _translate_x(image, how: _How):
    pixels = how.direction * how.severity * _SHIFT * image.width
    return _affine(image, (1, 0, pixels, 0, 1, 0), how)


def _translate_y(image, how: _How):
    pixels = how.direction * how.severity * _SHIFT * image.height
    return _affine(image, (1, 0, 0, 0, 1, pixels), how)


_OPERATIONS: dict[str, Callable[[Any, _How], Any]] = {
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
    "Rotate": _rotate,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _enhance("Color"),
    "Contrast": _enhance("Contrast"),
    "Brightness": _enhance("Brightness"),
    "Sharpness": _enhance("Sharpness"),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
OPERATIONS = tuple(_OPERATIONS)


def rand_augment(
    image,
    rng: np.random.Generator,
    *,
    fill: Sequence[int],
    magnitude: float = 9.0,
    resample: str = "bicubic",
):
    """Two random operations on an image, each applied half of the time.

    Args:
      image: a PIL image, RGB or L (grey).
      rng: fixes everything that is drawn.
      fill: 0 to 255 for each channel: the colour of pixels from outside the image.
      magnitude: mean of the normal law the magnitude of each operation is drawn from;
        cut to 0..10.
      resample: `bicubic` or `bilinear`.

    Returns:
      A PIL image of the same size and mode.

    Raises:
      ValueError: if an option is not possible, or the image of another mode.
    """
    for name in rng.choice(OPERATIONS, size=_COUNT):
        if rng.random() >= _PROBABILITY:
            continue
        drawn = float(np.clip(rng.normal(magnitude, _STD), 0, _MOST))
        direction = 1 if rng.random() < 0.5 else -1
        image = apply(
            image,
            name,
            magnitude=drawn,
            direction=direction,
            fill=fill,
            resample=resample,
        )
    return image


def apply(
    image,
    name: str,
    *,
    magnitude: float,
    fill: Sequence[int],
    direction: int = 1,
    resample: str = "bicubic",
):
    """One operation.

    Args:
      image: a PIL image, RGB or L (grey).
      name: one of `OPERATIONS`.
      magnitude: 0 to 10; AutoContrast, Equalize and Invert have none.
      fill: 0 to 255 for each channel.
      direction: 1 or -1, for the operations that go two ways.
      resample: `bicubic` or `bilinear`.

    Returns:
      A PIL image of the same size and mode.

    Raises:
      ValueError: if an option is not possible, or the image of another mode.
    """
    if name not in _OPERATIONS or resample not in ("bicubic", "bilinear"):
        raise ValueError(
            f"operation {name!r} with resample = {resample!r}: choose of {OPERATIONS}, "
            "and bicubic or bilinear."
        )
    if not 0 <= magnitude <= _MOST or direction not in (1, -1):
        raise ValueError(
            f"magnitude = {magnitude} must be 0 to 10 and direction = {direction} 1 or "
            "-1."
        )
    if image.mode not in ("RGB", "L") or len(fill) != len(image.getbands()):
        raise ValueError(
            f"an image of mode {image.mode} and fill = {fill}: the image must be RGB "
            "or L, and fill have a number for each channel."
        )
    colour = tuple(fill) if len(fill) > 1 else fill[0]  # PIL's way for grey
    method = require("PIL.Image").Resampling[resample.upper()]
    how = _How(magnitude / _MOST, direction, colour, method)
    return _OPERATIONS[name](image, how)
