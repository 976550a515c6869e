"""The images that a config names, onto the mesh, with a bar to watch."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from flax_skd.io import data, sources
from flax_skd.io.extras import require
from flax_skd.method.spec import ViTSpec
from flax_skd.run import sharding

Opened = Callable[[Any, ViTSpec], sources.Source]


def labelled(section: Any, spec: ViTSpec) -> sources.Source:
    """The source of a `data` section, its labels checked."""
    return sources.open_source(
        section.source,
        labels=section.labels or None,
        num_classes=spec.num_classes or None,
    )


def unlabelled(section: Any, spec: ViTSpec) -> sources.Source:
    """The source of a `data` section, for what reads no label."""
    del spec
    return sources.open_unlabelled(section.source)


def open_images(
    section: Any, spec: ViTSpec, *, seed: int = 0, opened: Opened = labelled
) -> sources.Source:
    """The source that the `data` section of a config names, opened by `opened`.

    Unless `section.images` is 0, that many of its images, chosen by `seed`.
    """
    if not section.source:
        raise ValueError(
            "no images: give --config.data.source, for example tar:IMAGES.tar, "
            "folder:DIR, npz:FILE, tfds:NAME:SPLIT or digits:test."
        )
    source = opened(section, spec)
    if section.images:
        source = sources.take(source, section.images, seed=seed)
    return source


def calibration_of(config: Any, spec: ViTSpec) -> data.EvalBatches:
    """What `piad.calibration` names; of the images of training where it names no source."""
    section = config.piad.calibration
    if section.source:
        return batches_of(section, spec, seed=config.seed)
    return of_training(
        config,
        spec,
        images=section.images,
        batch_size=section.batch_size,
        on_bad_image=section.on_bad_image,
    )


def of_training(
    config: Any, spec: ViTSpec, *, images: int, batch_size: int, on_bad_image: str
) -> data.EvalBatches:
    """Evaluation batches of the images that a config trains on, so many at most.

    0 for all.
    """
    source = open_images(config.data, spec)
    if images:
        source = sources.take(source, min(images, len(source)), seed=config.seed)
    return data.eval_batches(
        source, spec, batch_size=batch_size, on_bad_image=on_bad_image
    )


def eval_source_of(section: Any) -> str:
    """Where the images to evaluate on are, by the `data` section; "" for none."""
    if section.eval_source != "auto":
        return section.eval_source
    return "digits:test" if section.source.startswith("digits") else ""


def batches_of(
    section: Any, spec: ViTSpec, *, seed: int, opened: Opened = labelled
) -> data.EvalBatches:
    """Evaluation batches of the `data` section of a config; 0 images for all."""
    return data.eval_batches(
        open_images(section, spec, seed=seed, opened=opened),
        spec,
        batch_size=section.batch_size,
        on_bad_image=section.on_bad_image,
    )


class OnMesh:
    """Batches as global arrays, examples shared out over the mesh.

    Each process reads its part of every batch. Iterating again starts again. A batch
    that does not divide over the devices is taken larger, the last one padded.

    Attributes:
      rows: of all batches together, padding included.
    """

    def __init__(self, batches: data.EvalBatches, mesh: jax.sharding.Mesh):
        self._mesh, parts = mesh, sharding.batch_parts(mesh)
        size = math.ceil(batches.batch_size / parts) * parts
        batches = dataclasses.replace(batches, batch_size=size)
        self.rows = len(batches) * size
        self._batches = batches.of_process(jax.process_index(), jax.process_count())

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            yield sharding.shard_batch(batch, self._mesh)


class InTurn:
    """As `OnMesh`, but every iteration reads the next few images alone, and so on.

    A list that is measured on few images would be fitted to them; here every round of
    measuring sees others.
    """

    def __init__(
        self,
        batches: data.EvalBatches,
        mesh: jax.sharding.Mesh,
        *,
        images: int,
        seed: int,
    ):
        """Reads `images` of the images of `batches` at a time, in a random order."""
        self._batches, self._mesh, self._images = batches, mesh, images
        self._order = np.random.default_rng(seed).permutation(batches.indices)
        self._read = 0

    def __iter__(self) -> Iterator[Any]:
        places = self._read + np.arange(self._images)
        chosen = self._order[places % len(self._order)]
        self._read += self._images
        batches = dataclasses.replace(self._batches, indices=chosen)
        return iter(OnMesh(batches, self._mesh))


def progress(what: str, total: int, *, unit: str = "img"):
    """A tqdm bar on the first process; a line a minute off a terminal."""
    return require("tqdm").tqdm(
        total=total,
        desc=what,
        unit=unit,
        mininterval=0.2 if sys.stderr.isatty() else 60,
        disable=jax.process_index() > 0,
    )
