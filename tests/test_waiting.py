"""A step waits for the device only where it is logged; what is logged there is the loss of that very step."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import tiny_model
from torch.utils.data import DataLoader

from unimim.training.waiting import may_wait


@pytest.mark.parametrize(
    ("device", "every", "expected"), [("cuda", 3, False), ("cuda", 2, True), ("cuda", 0, True), ("cpu", 3, True)]
)
def test_when_a_step_may_wait(device: str, every: int, expected: bool) -> None:
    connector = SimpleNamespace(should_update_logs=every == 2)
    trainer: Any = SimpleNamespace(
        log_every_n_steps=every, _logger_connector=connector, strategy=SimpleNamespace(root_device=torch.device(device))
    )
    assert may_wait(trainer) is expected


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_loss_is_logged_where_steps_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulated: int) -> None:
    """As on a GPU: each third step, and an epoch's last for those who look at `callback_metrics` then."""
    monkeypatch.setattr("unimim.tasks.task.may_wait", lambda trainer: trainer._logger_connector.should_update_logs)
    losses, known = [], []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: object, outputs: Any, *_: object) -> None:
            losses.append(float(outputs["loss"]) * accumulated)
            known.append(float(trainer.callback_metrics.get("train/loss", torch.nan)))

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    logs = {"logger": pl.loggers.CSVLogger(tmp_path), "log_every_n_steps": 3}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=2, accumulate_grad_batches=accumulated, callbacks=[Watch()], **logs, **quiet
    )
    trainer.fit(tiny_model(warmup_epochs=0, lr=1e-2), DataLoader(torch.rand(8 * accumulated, 3, 32, 32), batch_size=2))
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = {int(row["step"]): float(row["train/loss"]) for row in csv.DictReader(file)}
    ends = losses[accumulated - 1 :: accumulated]  # of the steps
    assert list(rows) == [2, 5]
    assert list(rows.values()) == pytest.approx([ends[2], ends[5]])
    assert len(set(losses)) == 8 * accumulated
    seen = known[accumulated - 1 :: accumulated]
    assert seen[2:] == pytest.approx([ends[2], ends[3], ends[3], ends[5], ends[5], ends[7]])
