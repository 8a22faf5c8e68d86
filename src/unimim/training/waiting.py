"""When a training step may wait for the device, which computes one step while the CPU prepares the next: where it is logged."""

from typing import Any

import pytorch_lightning as pl

from unimim.lightning import is_logged


def may_wait(trainer: pl.Trainer) -> bool:
    """Whether this step of a training is logged (each `trainer.log_every_n_steps`-th), which all processes answer alike.

    On a CPU, where nothing runs ahead, and where `log_every_n_steps` is 0, it is every step.
    """
    steps: Any = trainer
    if trainer.strategy.root_device.type == "cpu" or not steps.log_every_n_steps:
        return True
    return is_logged(trainer)
