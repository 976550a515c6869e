"""One super-network served at many levels, switched while it runs."""

import collections
import os
import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_skd.io import checkpoint
from flax_skd.io.checkpoint import Supernet
from flax_skd.method import compensation, piad, subnet
from flax_skd.method import macs as counts
from flax_skd.method.attention import fastest_attention
from flax_skd.method.spec import SubnetSpec
from flax_skd.method.vit import Array, Params, ViT
from flax_skd.run import time_budget
from flax_skd.run.time_budget import Profile


class _Current(NamedTuple):
    level: int
    widths: SubnetSpec
    params: Params


class SubnetFamily:
    """Every sub-network of a super-network behind one call.

    The device holds one copy of the full parameters and the kernels of the current
    level, re-fitted and extracted; what a cut leaves alone is shared with the full
    copy, and what repairs a cut stays on the host. Compiled programs are kept, the
    ones used last, so that a level seen before is switched to without compiling. A new
    level compiles its extraction, and a level its forward pass for every new shape of
    images: send batches of few sizes.

    Threads may call and switch at once. A call runs to its end at the level it began
    with; while one thread compiles, others go on with what is compiled. Until the last
    such call has ended, and during a switch, the kernels of two levels are held.

    Attributes:
      spec: the full network.
      levels: the dropout list, in the widths the profile asks for if there is one.
      compiled: how many programs were compiled so far.
    """

    def __init__(
        self,
        supernet: Supernet,
        *,
        profile: Profile | None = None,
        executables: int = 16,
        dtype: Any = jnp.float32,
        attention: Callable[..., Array] = fastest_attention,
        device: Any = None,
    ):
        """Starts at level 0, the full network.

        Args:
          supernet: what to serve.
          profile: times on this device, for budgets in time; widths are then rounded
            up to its lanes.
          executables: most compiled programs kept: two a level with one batch size.
          dtype: of the computation, as of `ViT`.
          attention: as of `ViT`.
          device: where it runs, by default the first.

        Raises:
          ValueError: if `executables` is below 2, or the profile is of another network,
            device or dtype.
        """
        self.spec = supernet.spec
        self.levels = supernet.dropout_list
        if profile is not None:
            time_budget.check_here(profile, dtype=jnp.dtype(dtype).name)
            self.levels = time_budget.rounded(profile, supernet).dropout_list
        self._profile, self._device = profile, device or jax.local_devices()[0]
        self._dtype, self._attention = dtype, attention
        self._programs = _Programs(executables)
        params = jax.tree.map(lambda x: np.asarray(x, np.float32), supernet.params)
        self._params = jax.device_put(params, self._device)
        self._repairs = jax.tree.map(np.asarray, supernet.compensation)
        self._switching = threading.Lock()
        # Extraction of the full network changes nothing: its kernels are the one copy.
        self._now = _Current(0, SubnetSpec.full(self.spec), self._params)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        *,
        profile: str | os.PathLike | None = None,
        executables: int = 16,
        dtype: Any = jnp.float32,
        device: Any = None,
    ) -> "SubnetFamily":
        """The family of a super-network directory.

        Args:
          directory: as `contract` or `train` wrote it.
          profile: directory that `flax-skd profile` wrote on this device.
          executables, dtype, device: as of the class.

        Raises:
          ValueError: if a directory is not what it should be.
        """
        supernet = checkpoint.load_supernet(directory)
        times = profile and time_budget.read(profile, dtype=jnp.dtype(dtype).name)
        return cls(
            supernet,
            profile=times or None,
            executables=executables,
            dtype=dtype,
            device=device,
        )

    @property
    def level(self) -> int:
        """The current level; 0 is the full network."""
        return self._now.level

    @property
    def widths(self) -> SubnetSpec:
        """The widths of the current level."""
        return self._now.widths

    @property
    def params(self) -> Params:
        """The extracted parameters of the current level, on the device."""
        return self._now.params

    @property
    def compiled(self) -> int:
        """How many programs were compiled so far."""
        return self._programs.built

    def __call__(self, images: Any) -> Array:
        """Logits [B, K] at the current level, as `ViT` gives them.

        Args:
          images: [B, S, S, C], uint8 pixels or normalised floats.
        """
        now = self._now  # of this call, whoever switches meanwhile
        images = jax.device_put(images, self._device)
        key = ("forward", now.widths, images.shape, images.dtype)
        run = self._programs.get(key, lambda: self._forward(now, images))
        return run(now.params, images)

    def use(
        self,
        *,
        level: int | None = None,
        macs: float | None = None,
        params: float | None = None,
        latency_ms: float | None = None,
        images_per_s: float | None = None,
        batch_size: int | None = None,
    ) -> int:
        """Switches to a level, or to the largest one within a budget; give one.

        Args:
          level: 0 is the full network.
          macs: an image (full count); at most 1 is a share of the full network's.
          params: of the sub-network; at most 1 is a share.
          latency_ms: of one batch, by the profile.
          images_per_s: the least to get through, by the profile.
          batch_size: of the batch that takes this time, as in `time_budget.budget`.

        Returns:
          The level, which the next call runs at.

        Raises:
          ValueError: if not one is given, nothing fits the budget, or a time is asked
            for without a profile.
        """
        counted = {"macs": macs, "params": params}
        timed = {"latency_ms": latency_ms, "images_per_s": images_per_s}
        asked = {"level": level} | counted | timed
        given = [name for name, value in asked.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(asked)}; got {given or 'none'}.")
        if given[0] in counted:
            level = self._level_within(given[0], asked[given[0]])
        elif given[0] in timed:
            if self._profile is None:
                raise ValueError(
                    f"{given[0]} = {asked[given[0]]:g} needs times measured on this "
                    "device: run flax-skd profile, and load the family with profile=DIR."
                )
            fits = time_budget.budget(self._profile, **timed, batch_size=batch_size)
            level = fits.level(self.levels)
        self._switch(level)
        return level

    def _level_within(self, unit: str, limit: float) -> int:
        cost = counts.macs if unit == "macs" else counts.param_count
        if not limit > 0:
            raise ValueError(f"{unit} = {limit} must be above 0.")
        return piad.level_within(self.levels, self.spec, limit, cost=cost)

    def _switch(self, level: int) -> None:
        widths = self.levels.widths(level, self.spec)
        with self._switching:
            if widths == self._now.widths:
                self._now = self._now._replace(level=level)
                return
            if widths == SubnetSpec.full(self.spec):
                self._now = _Current(level, widths, self._params)
                return
            extract = self._programs.get(
                ("extract", widths), lambda: self._extraction(widths)
            )
            small = extract(self._params, self._repairs)
            self._now = _Current(level, widths, small)

    def _forward(self, now: _Current, images: Array):
        """The compiled forward pass of a level and a shape of images."""
        model = ViT(self.spec, now.widths, dtype=self._dtype, attention=self._attention)

        def forward(params, images):
            return model.apply({"params": params}, images)

        with jax.default_device(self._device):  # the attention is chosen by it
            return jax.jit(forward).lower(now.params, images).compile()

    def _extraction(self, widths: SubnetSpec):
        """Function (params, repairs) -> extracted params, sharing what is unchanged."""

        def extracted(params, repairs):
            whole = compensation.repaired(params, self.spec, repairs, widths)
            return subnet.extract(whole, widths)

        args = (self._params, self._repairs)
        traced, shape = jax.make_jaxpr(extracted, return_shape=True)(*args)
        # A compiled program copies what it hands through, so those are left out of it.
        index = {id(var): i for i, var in enumerate(traced.jaxpr.invars)}
        passed = [index.get(id(var)) for var in traced.jaxpr.outvars]

        def changed(params, repairs):
            leaves = jax.tree.leaves(extracted(params, repairs))
            return [leaf for leaf, i in zip(leaves, passed) if i is None]

        run, tree = jax.jit(changed).lower(*args).compile(), jax.tree.structure(shape)

        def shared(params, repairs):
            there, fresh = jax.tree.leaves(params), iter(run(params, repairs))
            leaves = [next(fresh) if i is None else there[i] for i in passed]
            return jax.tree.unflatten(tree, leaves)

        return shared


class _Programs:
    """At most `most` compiled programs; the one not used for longest goes first."""

    def __init__(self, most: int):
        if most < 2:
            raise ValueError(
                f"executables = {most}: at least 2, one extracts and one computes."
            )
        self.built = 0
        self._most = most
        self._kept: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
        self._lock, self._building = threading.Lock(), threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """What is kept under a key, built if it is not there."""
        program = self._found(key)
        if program is not None:
            return program
        with self._building:  # two threads that want one program compile it once
            program = self._found(key)
            if program is None:
                program = build()
                with self._lock:
                    self.built += 1
                    self._kept[key] = program
                    while len(self._kept) > self._most:
                        self._kept.popitem(last=False)
            return program

    def _found(self, key: Hashable) -> Any:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)
