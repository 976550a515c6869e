"""What training draws: an image by its position, augmented by a seed of its own."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_skd.io.bad_images import BadImages, prepared
from flax_skd.io.examples import BadImageError, Source
from flax_skd.io.extras import require
from flax_skd.method.spec import ViTSpec

Augment = Callable[[Any, np.random.Generator, ViTSpec], np.ndarray]


def examples(
    source: Source,
    spec: ViTSpec,
    augment: Augment,
    bad: BadImages,
    *,
    seed: int,
    repeats: int,
):
    """Endless augmented examples, a pure function of their place.

    Args:
      source, spec, augment, seed, repeats: as of `data.train_batches`.
      bad: what is done with images that do not decode.

    Returns:
      A `grain.MapDataset` of `image` uint8 [S, S, C], `label` and `index`.
    """
    grain, loader = require("grain"), _Loader(source, spec, augment, bad)
    positions = grain.MapDataset.range(len(source)).seed(seed).shuffle()
    if repeats == 1:
        # This slice keeps all, but every step before the draws counts in their seeds.
        return positions[::1].repeat().random_map(loader)
    order = _RepeatedOrder(positions, len(source), repeats)
    return grain.MapDataset.source(order).seed(seed).random_map(loader)


@dataclasses.dataclass
class _Loader:
    """(position, rng) -> one augmented example."""

    source: Source
    spec: ViTSpec
    augment: Augment
    bad: BadImages

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        def prepare(image):
            return self.augment(image, rng, self.spec)

        total = len(self.source)
        for step in range(total):
            position = (int(index) + step) % total
            try:
                image, label = prepared(self.source, position, prepare)
            except BadImageError as error:
                self.bad.meet(position, error)
                continue
            return {
                "image": image,
                "label": np.int32(label),
                "index": np.int32(position),
            }
        raise ValueError(f"no image of {self.source.name} decodes.")


@dataclasses.dataclass
class _RepeatedOrder:
    """The positions of endless epochs, each image `repeats` times in a row.

    An epoch has as many draws as the source has images, and so sees a part of them, as
    in repeated augmentation (arXiv:1902.05509). The next epoch draws another part.
    """

    shuffled: Any  # grain.MapDataset, of a new order every `count` positions
    count: int
    repeats: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, draw: int) -> int:
        epoch, within = divmod(int(draw), self.count)
        return self.shuffled[epoch * self.count + within // self.repeats]
