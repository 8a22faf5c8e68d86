"""When a training step may wait for the device, which computes one step while the CPU prepares the next: where it is logged."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor


def may_wait(trainer: pl.Trainer) -> bool:
    """Whether this step of a training is logged (each `trainer.log_every_n_steps`-th), which all processes answer alike.

    On a CPU, where nothing runs ahead, and where `log_every_n_steps` is 0, it is every step.
    """
    steps: Any = trainer
    if trainer.strategy.root_device.type == "cpu" or not steps.log_every_n_steps:
        return True
    return bool(trainer._logger_connector.should_update_logs)


def log_loss(task: pl.LightningModule, loss: Tensor) -> None:
    """Logs `train/loss`, the mean over all processes, in steps that may wait and in an epoch's last.

    Not by `self.log(..., sync_dist=True)`, which has a barrier and a collective in every step, as the progress bar waits for
    the device in every step to show a number that lies there. In between, the bar goes on to show the last logged loss.
    """
    trainer = task._trainer
    if trainer is None:  # Lightning says that there is nothing to log to
        task.log("train/loss", loss)
    elif may_wait(trainer) or trainer.is_last_batch:
        mean: Any = trainer.strategy.reduce(loss.detach().to(torch.float32, copy=True), reduce_op="mean")
        task.log("train/loss", mean.cpu(), prog_bar=True)
