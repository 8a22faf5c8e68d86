"""The private names of Lightning that this package needs: no other file uses one.

Lightning has no public name for what these do. What breaks without each is said in its docstring, and `tests/test_lightning.py`
looks that each is still there.
"""

import atexit
from collections.abc import Callable
from functools import partial
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import BatchSizeFinder, LearningRateFinder, ModelCheckpoint, WeightAveraging
from pytorch_lightning.core.saving import _default_map_location, _load_state
from pytorch_lightning.loops import evaluation_loop, fit_loop
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from pytorch_lightning.trainer.connectors.signal_connector import _get_sigkill_signal

# Of a task


def trainer_of(task: pl.LightningModule) -> Any:
    """Returns the task's Trainer, None where it has none. (`task.trainer` raises an error there.)"""
    return task._trainer


def before_transfer(task: pl.LightningModule, batch: Any) -> Any:
    """Calls the hook `on_before_batch_transfer` of the task, or of its data module, as a training does."""
    return task._on_before_batch_transfer(batch, dataloader_idx=0)


def saved_device(storage: Any, location: str) -> Any:
    """Maps a tensor of a checkpoint to the device that it was saved from, or to the CPU where there is none."""
    return _default_map_location(storage, location)


def task_from(cls: type, content: dict[str, Any], strict: bool | None, **arguments: Any) -> Any:
    """Makes a task of the arguments, and fills it from the content of a checkpoint, as `load_from_checkpoint` does."""
    return _load_state(cls, content, strict=strict, **arguments)


# Of a step


def is_logged(trainer: pl.Trainer) -> bool:
    """Returns whether the metrics of this step go to the loggers, each `log_every_n_steps`-th; all processes answer alike."""
    return bool(trainer._logger_connector.should_update_logs)


def log_step(trainer: pl.Trainer) -> None:
    """Logs the metrics of a step that ends the training within a callback, behind which Lightning would have logged them."""
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


# Of a run that goes on


def read_anew(trainer: pl.Trainer) -> None:
    """Begins to read the training's data again: workers may have read on from elsewhere (Lightning's issue 21938)."""
    iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def is_validation_due(trainer: pl.Trainer) -> bool:
    """Returns whether a validation follows the batch at which the progress stands."""
    loop: Any = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def set_progress(trainer: pl.Trainer, begun: bool, due: bool) -> None:
    """Lets the training go on within an epoch, where it has `begun`, and with a validation, where one is `due`.

    Without it Lightning would go on where it takes the run to have stopped, which is another batch in several cases, would
    validate twice or not at all, and would make another loader.
    """
    loop: Any = trainer.fit_loop
    loop._restart_stage = fit_loop.RestartStage.RESTARTED_MID_EPOCH if begun else fit_loop.RestartStage.NONE
    loop.epoch_loop.restarting = begun
    loop.epoch_loop.reset_restart_stage()
    validation = loop.epoch_loop.val_loop
    validation.restarting = False  # all of it, which Lightning does in the place of a batch where it was amid one
    stages = evaluation_loop.RestartStage
    validation._restart_stage = stages.RESTARTED_MID_EVALUATION if due else stages.NONE
    # Lightning adds one when it begins, and one after a validation
    loop.epoch_loop._batches_that_stepped = loop.epoch_loop.global_step - int(begun) - int(due)
    loop._last_train_dl_reload_epoch = trainer.current_epoch


# Of processes and signals


def cluster_environment(trainer: pl.Trainer) -> ClusterEnvironment:
    """Returns who starts the processes, by which the Trainer counts them, also where it trains in one."""
    environment: ClusterEnvironment = trainer._accelerator_connector.cluster_environment
    return environment


def kill_at_exit(strategy: Strategy) -> None:
    """Lets the processes that Lightning started end with this one: a process that hangs would stay."""
    if isinstance(strategy.launcher, _SubprocessScriptLauncher):
        atexit.register(strategy.launcher.kill, _get_sigkill_signal())


def replace_signal_handlers(trainer: pl.Trainer, register: Callable[[Callable[[], None]], None]) -> None:
    """Calls `register(lightnings_own)` where Lightning registers its handlers of signals, which it does in every run."""
    connector: Any = trainer._signal_connector
    own = type(connector).register_signal_handlers
    connector.register_signal_handlers = lambda: register(lambda: own(connector))


def stop_sigterm_broadcast(trainer: pl.Trainer) -> None:
    """Takes out the broadcast by which Lightning asks for a SIGTERM: every step of several processes would wait for it."""
    loop: Any = trainer.fit_loop.epoch_loop
    loop._broadcast_sigterm_tensor = lambda: None


# Of its callbacks and plugins


def runs_before_training(finder: LearningRateFinder | BatchSizeFinder) -> bool:
    """Returns whether a finder is the Tuner's, which runs before a training and is gone when it begins."""
    return finder._early_exit


def has_saved(saver: ModelCheckpoint) -> bool:
    """Returns whether it has saved a checkpoint in this run."""
    return bool(saver._last_checkpoint_saved)


def intervals(saver: ModelCheckpoint) -> dict[str, Any]:
    """Returns when it saves, by its arguments' names, with the defaults that Lightning chose."""
    return {name: getattr(saver, f"_{name}") for name in ("every_n_epochs", "every_n_train_steps", "train_time_interval")}


def averages_buffers(average: WeightAveraging) -> bool:
    """Returns whether an average of the weights takes averages of the buffers too."""
    return average._use_buffers


def layer_sync(strategy: Strategy) -> Any:
    """Returns the plugin that synchronises batch norms (`trainer.sync_batchnorm`), None where it is not asked for."""
    return getattr(strategy, "_layer_sync", None)


def leave_out_layer_sync(strategy: Any) -> None:
    """Takes the plugin of `layer_sync` away."""
    strategy._layer_sync = None


# Of the command line


class RunsSubcommand:
    """Lets a subclass of LightningCLI, of which it is a first base, wrap the run of a subcommand."""

    def run_subcommand(self, run: Callable[[], None]) -> None:
        """Runs the subcommand."""
        run()

    def _run_subcommand(self, subcommand: str) -> None:
        run: Any = super()
        self.run_subcommand(partial(run._run_subcommand, subcommand))


def parser_of(cli: Any, subcommand: str) -> Any:
    """Returns the parser of a subcommand of a LightningCLI, which writes its configuration."""
    return cli._parser(subcommand)
