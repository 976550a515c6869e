"""What a training run is refused for before it begins."""

import pathlib
from typing import Any

from flax_skd.io import checkpoint, directory, run_state
from flax_skd.run import programs


def check_numbers(config: Any) -> None:
    """Refuses numbers of a config that would train, and to nothing of use."""
    if not config.get("program"):
        raise ValueError(
            "this config trains nothing: take one with a `program`, such as "
            "configs/scratch.py, piad.py, transfer.py or finetune.py."
        )
    if config.weights not in ("ema", "raw"):
        raise ValueError(f"weights {config.weights!r}: choose ema or raw.")
    above, others = ("epochs", "evaluate_epochs", "lr"), ("warmup_epochs", "min_lr")
    for name in (*above, *others, "weight_decay", "clip_norm"):
        value = config[name]
        if not 0 <= value < float("inf") or (name in above and not value):
            words = "above 0" if name in above else "0 or more"
            raise ValueError(f"{name} = {value} must be a number {words}.")
    if not 0 <= config.ema_decay <= 1:
        raise ValueError(f"ema_decay = {config.ema_decay} must be 0 to 1.")


def check_networks(
    target: pathlib.Path, program: programs.Program, *, overwrite: bool, resume: bool
) -> None:
    """Before the run, not after it: whether its networks may be written."""
    names = run_state.CHECKPOINTS, run_state.LOG
    run = any((target.parent / name).exists() for name in names)
    if run and not (overwrite or resume):
        return  # the loop refuses it, and says what to do
    older = checkpoint.OLDER_SUPERNET_FILES
    replace = overwrite or (resume and run)
    try:
        for path, files in programs.written(program, target).items():
            directory.check_target(directory.local(path), files, replace, older=older)
    except ValueError as error:
        raise ValueError(
            f"the network of a run is written to {target.name} in its workdir, and {error} "
            "For a run that is another workdir."
        ) from error


def check_stages(stages: int, epoch_steps: int, steps: int) -> None:
    """Refuses a run that ends before its last stage begins."""
    if (stages - 1) * epoch_steps >= steps:
        raise ValueError(
            f"{stages} stages begin {epoch_steps} steps apart, and the run has {steps}: "
            "it would end with a list that is not whole, or a last stage that never "
            "began. Give more epochs; of piad fewer --config.piad.progressive_epochs (0 "
            "for a third of the run), or a larger --config.piad.grow_epochs."
        )
