"""Lightning's private names stand in one file, and each of them is still there: else the message says what breaks."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import ROOT, tiny_model
from pytorch_lightning.callbacks import BatchSizeFinder, ModelCheckpoint, WeightAveraging
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.core import saving
from pytorch_lightning.loops import evaluation_loop, fit_loop
from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers import subprocess_script
from pytorch_lightning.trainer.connectors import signal_connector
from torch.utils.data import DataLoader

SOURCE = ROOT / "src" / "unimim"
ROOM = SOURCE / "lightning.py"
OTHERS = {
    "_version", "_backward_hooks", "_compiled_call_impl", "_call_impl", "_orig_mod", "_C", "_autograd", "_apply",
    "_top_saved_tensors_default_hooks", "_softmax_backward_data", "_linear_pointwise", "_foreach_norm", "_foreach_copy_",
    "_foreach_lerp_", "_non_persistent_buffers_set", "_step_supports_amp_scaling", "_BatchNorm",  # torch
    "_pos_embed",  # timm
    "_conv_stem", "_bn0", "_swish", "_blocks",  # efficientnet_lite_pytorch
    "_actions",  # argparse
}  # fmt: skip
"""Private names of other libraries, which are not Lightning's."""


def private_names(path: Path) -> Iterator[str]:
    """Those that a file reads or sets of something other than its own `self`, or imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))


@pytest.mark.parametrize("path", sorted(set(SOURCE.rglob("*.py")) - {ROOM}), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_other_file_touches_what_is_private_to_lightning(path: Path) -> None:
    own = {node.attr for node in ast.walk(ast.parse(path.read_text()))
           if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"}  # fmt: skip
    of_lightning = {name for name in private_names(ROOM) if name not in OTHERS} | {"_trainer", "_run_subcommand"}
    assert not set(private_names(path)) - OTHERS - own
    assert not own & of_lightning


@pytest.fixture(scope="module")
def trainer() -> pl.Trainer:
    """After a training of one step."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    made = pl.Trainer(accelerator="cpu", max_steps=1, **quiet)  # type: ignore[arg-type]
    made.fit(tiny_model(), DataLoader(torch.rand(2, 3, 32, 32), batch_size=2))
    return made


NAMES = {
    "task._trainer": "whether a task is in a Trainer cannot be asked: steps outside of one fail at the log",
    "task._on_before_batch_transfer": "a codebook is fitted to batches that the data has not finished",
    "saving._default_map_location": "load_from_checkpoint fails for weights of a device that is not there",
    "saving._load_state": "load_from_checkpoint makes no task",
    "trainer._logger_connector.should_update_logs": "train/loss waits for the device in every step",
    "trainer._logger_connector.on_batch_end": "the last step before a signal's checkpoint is not logged",
    "trainer._logger_connector.update_train_step_metrics": "the last step before a signal's checkpoint is not logged",
    "loop._data_fetcher": "a resumed run reads what the workers had begun to read",
    "loop.epoch_loop._should_check_val_fx": "a resumed run validates twice, or not at all",
    "loop._restart_stage": "a resumed run begins its epoch again",
    "loop.epoch_loop.reset_restart_stage": "a resumed run begins its epoch again",
    "loop.epoch_loop.val_loop._restart_stage": "a validation that is due is left out",
    "loop.epoch_loop._batches_that_stepped": "the steps of a resumed run are logged under other numbers",
    "loop._last_train_dl_reload_epoch": "a resumed run makes a second loader",
    "loop.epoch_loop._broadcast_sigterm_tensor": "every step of several processes waits for a broadcast",
    "fit_loop.RestartStage.RESTARTED_MID_EPOCH": "a resumed run begins its epoch again",
    "evaluation_loop.RestartStage.RESTARTED_MID_EVALUATION": "a validation that is due is left out",
    "trainer._accelerator_connector.cluster_environment": "processes that no one joined train on their own, and end well",
    "trainer._signal_connector.register_signal_handlers": "a signal saves nothing",
    "subprocess_script._SubprocessScriptLauncher": "a process that hangs stays after an error of the first",
    "signal_connector._get_sigkill_signal": "a process that hangs stays after an error of the first",
    "finder._early_exit": "the Tuner is refused",
    "saver._last_checkpoint_saved": "a run that saved nothing does not say so",
    "saver._every_n_epochs": "a run that saved nothing does not say why",
    "saver._every_n_train_steps": "a run that saved nothing does not say why",
    "saver._train_time_interval": "a run that saved nothing does not say why",
    "average._use_buffers": "an average of tables of integers rounds them to wrong ones",
    "strategy._layer_sync": "batch norms in shards are not synchronised",
    "cli._run_subcommand": "errors of a run leave processes behind",
    "cli._parser": "no configuration is saved with a run",
}
"""What is used, from one of the objects below, and what breaks where Lightning has it no longer."""


@pytest.mark.parametrize("name", NAMES)
def test_lightning_still_has(name: str, trainer: pl.Trainer) -> None:
    holders: dict[str, Any] = {
        "task": trainer.lightning_module,
        "trainer": trainer,
        "loop": trainer.fit_loop,
        "saving": saving,
        "fit_loop": fit_loop,
        "evaluation_loop": evaluation_loop,
        "subprocess_script": subprocess_script,
        "signal_connector": signal_connector,
        "finder": BatchSizeFinder(),
        "saver": ModelCheckpoint(),
        "average": WeightAveraging(),
        "strategy": DDPStrategy(),
        "cli": LightningCLI,
    }
    first, *parts = name.split(".")
    found = holders[first]
    for part in parts:
        assert hasattr(found, part), f"{name} is gone: {NAMES[name]}; see src/unimim/lightning.py"
        found = getattr(found, part)


def test_every_name_of_the_room_is_in_the_table() -> None:
    told = {part for name in NAMES for part in name.split(".")}
    intervals = {"_every_n_epochs", "_every_n_train_steps", "_train_time_interval", "_layer_sync"}  # by getattr
    assert set(private_names(ROOM)) | intervals <= told
