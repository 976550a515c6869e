"""A run whose numbers are exact on any devices; as a script, it ends as it is told to."""

import logging
import os
import resource
import signal
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from flax_skd.io import whole_steps
from flax_skd.run import distributed, sharding, train

STEPS, EPOCH = 10, 3
CONFIG = {"data": "whole numbers", "seed": 3}


def images():
    rng = np.random.default_rng(0)
    return [{"image": rng.integers(0, 256, 6).astype(np.float32)} for _ in range(12)]


def batches():
    """Four examples a step, of all processes together."""
    index, count = jax.process_index(), jax.process_count()
    data = grain.MapDataset.source(images()).seed(3).shuffle().repeat()
    share = data[index::count].batch(4 // count, drop_remainder=True)
    return iter(share.to_iter_dataset())


def loss(params, batch, rng, state):
    """Its gradient is a mean of four whole numbers: exact, in any order of summing."""
    del rng
    return (batch["image"] @ params["w"]).mean() * state.extra["levels"], {}


def grown(epoch, state):
    return {"levels": jnp.float32(epoch + 1)}


OPTIMIZER = optax.sgd(2.0**-6, momentum=0.5)


def initial():
    return train.initial_state(
        {"w": jnp.zeros(6)},
        OPTIMIZER,
        jax.random.key(0),
        extra={"levels": jnp.float32(0)},
    )


def run(workdir, *, steps=STEPS, before_epoch=grown, **options):
    """A run that grows something every three steps and saves every two."""
    devices = None if jax.process_count() > 1 else jax.devices()[:1]
    return train.fit(
        initial(),
        batches(),
        loss=loss,
        optimizer=OPTIMIZER,
        steps=steps,
        mesh=sharding.mesh(devices=devices),
        workdir=workdir,
        checkpoint_every=2,
        before_epoch=before_epoch,
        epoch_steps=EPOCH,
        log_every_s=1e9,
        **{"config": CONFIG, **options},
    )


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def dying_in_a_save(step):
    seal = whole_steps.seal

    def sealed(folder, number):
        seal(folder, number)
        if number == step:
            die()  # complete, and without its name

    whole_steps.seal = sealed
    return {}


def dying_in_growth(epoch):
    return {"before_epoch": lambda e, s: die() if e == epoch else grown(e, s)}


def dying_before(step):
    def first(number, extra):
        if number == step and jax.process_index() == 1:
            die()
        return extra, loss

    return {"before_step": first}


def with_no_room_from(epoch):
    """No file may be longer than 40 bytes, from the beginning of an epoch."""

    def full(number, state):
        if number == epoch:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40, -1))
        return grown(number, state)

    return {"before_epoch": full}


def main(workdir, end, at, port="", index=""):
    log = logging.getLogger("flax_skd")
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    if port:
        distributed.start(
            coordinator=f"127.0.0.1:{port}", processes=2, process=int(index)
        )
    if end == "coordinator":
        time.sleep(2)
        if index == "0":
            die()
        time.sleep(600)
    options = {} if end == "well" else globals()[end](int(at))
    state = run(workdir, resume=True, **options)
    if index != "1":
        np.savez(f"{workdir}/final.npz", **jax.device_get(state.params))


if __name__ == "__main__":
    main(*sys.argv[1:])
