"""Metrics by name: who waits for one that no one logs is told before the first step, and a run without a checkpoint why."""

import re
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, LambdaCallback, LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_warn

from unimim.errors import UserError
from unimim.lightning import has_saved, intervals

COUNTED = ("epoch", "step")
"""What a ModelCheckpoint knows beside the metrics."""
FILENAME = "filename of ModelCheckpoint"
KNOWN = ("unimim", "pytorch_lightning")
"""Packages whose parts log only what is said of them."""


class CheckMonitors(pl.Callback):
    """Ends a run before its first step where a part of it waits for a metric that no one will log.

    Such parts are `ModelCheckpoint`, `EarlyStopping`, and a schedule of the learning rate that monitors a metric; of a name in
    the `filename` of a ModelCheckpoint it warns. What will be logged is what the task and the callbacks declare (`metrics`).
    With a module or a callback of one's own, which may log more, nothing is refused here: Lightning says it where the metric is
    first needed.

    Raises:
        ValueError: when training starts, as said.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not all(is_known(part) for part in (pl_module, *callbacks)):
            return
        logged = [name for part in (pl_module, *callbacks) for name in getattr(part, "metrics", ())]
        validated = [name for name in getattr(pl_module, "metrics", ()) if name.startswith("val/")]
        if not trainer.enable_validation:
            logged = [name for name in logged if name not in validated]
        for part, name in waiting(trainer):
            of_rates = name.startswith("lr-") and any(isinstance(callback, LearningRateMonitor) for callback in callbacks)
            if name in logged or of_rates or (name in COUNTED and part != "EarlyStopping"):
                continue
            if part == FILENAME:
                rank_zero_warn(f"{part} names {name!r}, which nothing logs in this run: files are named as if it were 0")
                continue
            why = "which validation logs, and this run has none" if name in validated else "which nothing logs in this run"
            knn = "" if "val/knn" in logged or name != "val/knn" else " (val/knn needs unimim.KNNCallback in trainer.callbacks)"
            raise UserError(f"{part} waits for {name!r}, {why}: give one of {', '.join(logged)}{knn}")


def is_known(part: Any) -> bool:
    """Whether a part of a run is a package's, and not of one's own."""
    return type(part).__module__.partition(".")[0] in KNOWN and not isinstance(part, LambdaCallback)


def waiting(trainer: pl.Trainer) -> list[tuple[str, str]]:
    """Who waits for a metric, and its name."""
    found = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (ModelCheckpoint, EarlyStopping)) and callback.monitor:
            found.append((type(callback).__name__, callback.monitor))
        if isinstance(callback, ModelCheckpoint):
            found += [(FILENAME, name) for name in re.findall(r"\{(.*?)[:\}]", callback.filename or "")]
    schedules = [config for config in trainer.lr_scheduler_configs if config.reduce_on_plateau and config.monitor]
    return [*found, *((type(config.scheduler).__name__, str(config.monitor)) for config in schedules)]


def why_unsaved(trainer: pl.Trainer) -> str | None:
    """Why a training that has ended has saved no checkpoint; None where it has saved one."""
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return "trainer.fast_dev_run tries the run, and saves nothing"
    if not savers:
        return "trainer.enable_checkpointing is false"
    if any(has_saved(saver) for saver in savers):
        return None
    return "; ".join(reason(saver, trainer) for saver in savers)


def reason(saver: ModelCheckpoint, trainer: pl.Trainer) -> str:
    """Why one of them has saved none."""
    if saver.save_top_k == 0 and not saver.save_last:
        return "save_top_k of ModelCheckpoint is 0"
    measured = list(trainer.callback_metrics)
    if saver.monitor and saver.monitor not in (*measured, *COUNTED):
        return f"ModelCheckpoint monitors {saver.monitor!r}, which was not logged ({', '.join(measured) or 'nothing was'})"
    when = " ".join(f"{name} {value}" for name, value in intervals(saver).items() if value) or "never"
    return f"ModelCheckpoint saves by {when}, which this run, ended at step {trainer.global_step}, has not reached"
