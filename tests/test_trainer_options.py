"""What Lightning lets one ask of a Trainer: done as asked, or refused in one line; the schedule ends where training does."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
from conftest import PLAIN, tiny_model
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
)
from pytorch_lightning.tuner import Tuner
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from unimim import FineTuning, LinearProbe, MaskTokenStudent, ResumableSampler, SeededSamples, UperNetSegmentation

VIT = "vit_tiny_patch16_224"
TASKS = ["pretraining", "finetuning", "segmentation", "probing"]


def task(name: str, **options: Any) -> Any:
    if name == "pretraining":
        return tiny_model(**{"min_lr": 1e-4, **options})
    if name == "finetuning":
        return FineTuning(VIT, model_args=PLAIN, num_classes=3, **{"lr": 1e-3, "min_lr": 1e-4, "warmup_epochs": 1, **options})
    if name == "segmentation":
        return UperNetSegmentation(VIT, model_args={**PLAIN, "depth": 4}, num_classes=3, channels=8, warmup_steps=1)
    backbone = timm.create_model(VIT, **PLAIN, num_classes=0, global_pool="")
    return LinearProbe(backbone, 3, lrs=(0.1,), **{"warmup_epochs": 1, **options})


def samples(name: str, count: int = 12) -> list[Any]:
    images = torch.rand(count, 3, 32, 32)
    if name == "pretraining":
        return list(images)
    labels = torch.arange(count) % 3
    return list(zip(images, labels[:, None, None].expand(-1, 32, 32) if name == "segmentation" else labels, strict=True))


class Stream(IterableDataset[Any]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class Rates(pl.Callback):
    """The first group's rate at each step of the optimizer."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.found.append(optimizer.param_groups[0]["lr"])


def trainer(tmp_path: Path, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, **{"max_epochs": 1, **quiet, **options})


# Accumulation that changes


@pytest.mark.parametrize(("epochs", "steps", "warm"), [(1.0, 6, 6), (1.5, 6, 8), (2.0, 6, 9)])
def test_the_cosine_ends_where_training_does_when_accumulation_changes(
    tmp_path: Path, epochs: float, steps: int, warm: int
) -> None:
    """Epochs of 6 batches: 6 updates, then 3, then 2 (of which the last is of 2 batches)."""
    scheduler = GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
    rates = Rates()
    model = task("pretraining", lr=1e-3, min_lr=1e-4, warmup_lr=0.0, warmup_epochs=epochs)
    runner = trainer(tmp_path, max_epochs=3, callbacks=[scheduler, rates])
    runner.fit(model, DataLoader(samples("pretraining"), batch_size=2))
    assert runner.global_step == len(rates.found) == 6 + 3 + 2
    assert model.total_steps == 11
    assert rates.found[warm] == max(rates.found) == pytest.approx(1e-3)
    assert runner.lr_scheduler_configs[0].scheduler.get_last_lr()[0] == pytest.approx(1e-4)
    assert rates.found[steps] < 1e-3 or warm == steps


def test_a_run_whose_accumulation_changes_goes_on_bit_for_bit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the end of an epoch, and from amid one."""
    images = samples("pretraining", 16)

    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(SeededSamples(images), 2, sampler=ResumableSampler(images), drop_last=True)

    def run(name: str, ckpt_path: Path | None = None) -> dict[str, Tensor]:
        pl.seed_everything(5, verbose=False)
        saver = ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=1)
        model = task("pretraining")
        callbacks = [GradientAccumulationScheduler({0: 1, 1: 2, 2: 4}), saver]
        runner = trainer(tmp_path, max_epochs=3, enable_checkpointing=True, callbacks=callbacks)
        runner.fit(model, Data(), ckpt_path=ckpt_path)
        assert runner.global_step == 8 + 4 + 2, name
        return model.state_dict()

    whole = run("whole")
    for step in (8, 10, 12, 13):
        caplog.clear()
        resumed = run(f"from_{step}", tmp_path / "whole" / f"step={step}.ckpt")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), step
        assert "the checkpoint is of" not in caplog.text, step


def test_two_accumulations_are_one_too_many(tmp_path: Path) -> None:
    runner = trainer(tmp_path, accumulate_grad_batches=2, callbacks=[GradientAccumulationScheduler({1: 2})])
    with pytest.raises(ValueError, match="accumulate_grad_batches is 2, and GradientAccumulationScheduler would change it"):
        runner.fit(task("pretraining"), DataLoader(samples("pretraining"), batch_size=2))


# Data without a length


@pytest.mark.parametrize("name", TASKS)
def test_a_stream_is_trained_on_for_so_many_steps(tmp_path: Path, name: str) -> None:
    rates = Rates()
    options = {} if name == "segmentation" else {"warmup_epochs": 0}
    model = task(name, **options)
    stream = DataLoader(Stream(samples(name)), batch_size=4)
    runner = trainer(tmp_path, max_epochs=-1, max_steps=7, callbacks=[rates])
    runner.fit(model, stream)
    assert runner.global_step == len(rates.found) == 7
    assert rates.found[-1] < rates.found[1]
    runner = trainer(tmp_path, max_epochs=2, limit_train_batches=3)
    runner.fit(task(name), stream)
    assert runner.global_step == 6


@pytest.mark.parametrize("name", TASKS)
def test_a_stream_without_an_end_is_refused(tmp_path: Path, name: str) -> None:
    stream = DataLoader(Stream(samples(name)), batch_size=4)
    with pytest.raises(ValueError, match="the data is a stream, .*: set trainer.max_steps, or trainer.limit_train_batches"):
        trainer(tmp_path).fit(task(name), stream)
    if name == "segmentation":
        return
    with pytest.raises(ValueError, match="model.warmup_epochs is 1, but the data is a stream, .* or warmup_epochs to 0"):
        trainer(tmp_path, max_steps=4).fit(task(name), stream)


# Numbers of batches


@pytest.mark.parametrize("name", TASKS)
def test_nothing_to_train_on(tmp_path: Path, name: str) -> None:
    loader = DataLoader(samples(name), batch_size=4)
    for nothing in (0, 0.0):
        with pytest.raises(ValueError, match=r"nothing to train on: trainer.limit_train_batches is 0"):
            trainer(tmp_path, limit_train_batches=nothing).fit(task(name), loader)
    with pytest.raises(ValueError, match="none has a whole batch of 16: lower data.batch_size"):
        trainer(tmp_path).fit(task(name), DataLoader(samples(name), batch_size=16, drop_last=True))


@pytest.mark.parametrize("name", TASKS)
def test_fewer_batches_and_no_validation(tmp_path: Path, name: str) -> None:
    loader = DataLoader(samples(name), batch_size=4)
    for options, steps in (({"overfit_batches": 2}, 4), ({"limit_val_batches": 0}, 6), ({"overfit_batches": 0.5}, 2)):
        runner = trainer(tmp_path, max_epochs=2, **options)
        runner.fit(task(name), loader, *([] if name == "pretraining" else [loader]))
        assert runner.global_step == steps


# Callbacks of Lightning


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("kind", [LearningRateFinder, BatchSizeFinder, BackboneFinetuning])
def test_callbacks_behind_the_schedule_are_refused(tmp_path: Path, name: str, kind: Any) -> None:
    with pytest.raises(ValueError, match=f"trainer.callbacks: {kind.__name__} .*leave it out") as caught:
        trainer(tmp_path, callbacks=[kind()]).fit(task(name), DataLoader(samples(name), batch_size=4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", TASKS[:3])
def test_the_tuner_finds_a_rate_and_a_batch(tmp_path: Path, name: str) -> None:
    class Data(pl.LightningDataModule):
        batch_size = 2

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(samples(name), batch_size=self.batch_size)

        val_dataloader = train_dataloader

    model, data = task(name), Data()
    runner = trainer(tmp_path, max_epochs=10)
    found = Tuner(runner).lr_find(model, data, num_training=20, min_lr=1e-6, max_lr=1e-1)
    assert model.lr == found.suggestion() != 1e-3
    Tuner(runner).scale_batch_size(model, datamodule=data, max_trials=2, steps_per_trial=1)
    assert data.batch_size == 4
    rates = Rates()
    runner = trainer(tmp_path, max_epochs=2, callbacks=[rates])
    runner.fit(model, data)
    assert runner.global_step == len(rates.found) == 6


@pytest.mark.parametrize("name", ["finetuning", "segmentation"])
def test_a_rate_that_is_set_on_a_model_is_its_peak_without_a_data_module_too(tmp_path: Path, name: str) -> None:
    model = task(name)
    model.lr = 3e-3
    runner = trainer(tmp_path)
    runner.fit(model, DataLoader(samples(name), batch_size=4))
    assert max(group["initial_lr"] for group in runner.optimizers[0].param_groups) == model.peak_lr == 3e-3


# A step of one's own


@pytest.mark.parametrize("name", TASKS)
def test_a_step_of_ones_own_keeps_what_the_task_has(tmp_path: Path, name: str) -> None:
    """Guard, callbacks, schedule, and what a checkpoint says; a file of it resumes and loads."""
    kind = type(task(name))
    own = type("Own", (kind,), {"training_step": lambda self, batch, batch_idx: 2 * kind.training_step(self, batch, batch_idx)})
    theirs, ours = (task(name) for _ in range(2))
    ours.__class__ = own
    said = []
    for model in (theirs, ours):
        runner = trainer(tmp_path, max_epochs=2)
        runner.fit(model, DataLoader(samples(name), batch_size=4))
        runner.save_checkpoint(tmp_path / "own.ckpt")
        content = torch.load(tmp_path / "own.ckpt", weights_only=True)
        kinds = sorted(type(callback).__name__ for callback in runner.callbacks)
        groups = [(group["lr"], group["initial_lr"]) for group in runner.optimizers[0].param_groups]
        said.append((set(content), kinds, groups, content.get("classes"), set(content.get("metrics", ()))))
    assert said[0] == said[1]
    assert model.guard is None or model.guard in runner.callbacks
    runner = trainer(tmp_path, max_epochs=3)
    runner.fit(model, DataLoader(samples(name), batch_size=4), ckpt_path=tmp_path / "own.ckpt")
    assert runner.global_step == 9


# Checkpoints of other models


@pytest.mark.parametrize("name", TASKS[:3])
def test_a_checkpoint_of_another_width_is_refused_with_its_first_keys(tmp_path: Path, name: str) -> None:
    def wide(width: int) -> Any:
        args = {**PLAIN, "depth": 4, "embed_dim": width}
        if name == "pretraining":
            return tiny_model(student=MaskTokenStudent(VIT, args))
        if name == "finetuning":
            return FineTuning(VIT, model_args=args, num_classes=3)
        return UperNetSegmentation(VIT, model_args=args, num_classes=3, channels=8)

    loader = DataLoader(samples(name, 4), batch_size=4)
    runner = trainer(tmp_path)
    runner.fit(wide(24), loader)
    runner.save_checkpoint(tmp_path / "narrow.ckpt")
    said = r"another model than this \w+: \d+ of another shape \(.*\.cls_token \(1, 1, 24\) for \(1, 1, 32\), .*trained with"
    with pytest.raises(ValueError, match=said) as caught:
        trainer(tmp_path, max_epochs=2).fit(wide(32), loader, ckpt_path=tmp_path / "narrow.ckpt")
    assert "\n" not in str(caught.value)
    trainer(tmp_path, max_epochs=2).fit(wide(24), loader, ckpt_path=tmp_path / "narrow.ckpt")


def test_a_checkpoint_of_another_task_is_refused_and_a_part_is_taken_where_that_is_asked(tmp_path: Path) -> None:
    runner = trainer(tmp_path)
    runner.fit(task("pretraining"), DataLoader(samples("pretraining"), batch_size=4))
    runner.save_checkpoint(tmp_path / "encoder.ckpt")
    loader = DataLoader(samples("finetuning"), batch_size=4)
    with pytest.raises(ValueError, match="another model than this FineTuning: .* missing .*; .* unexpected .*; give the"):
        trainer(tmp_path).fit(task("finetuning"), loader, ckpt_path=tmp_path / "encoder.ckpt")
    runner = trainer(tmp_path)
    model = task("finetuning")
    runner.fit(model, loader)
    runner.save_checkpoint(tmp_path / "tuned.ckpt")
    content = torch.load(tmp_path / "tuned.ckpt", weights_only=False)
    del content["state_dict"]["backbone.head.weight"]
    torch.save(content, tmp_path / "headless.ckpt")
    given = {"map_location": "cpu", "weights_only": False}
    part = FineTuning.load_from_checkpoint(tmp_path / "headless.ckpt", strict=False, **given)
    assert torch.equal(part.backbone.cls_token, model.backbone.cls_token)
    model.strict_loading = False
    trainer(tmp_path).validate(model, loader, ckpt_path=tmp_path / "headless.ckpt", verbose=False)


# Batches and classes


def test_an_odd_batch_is_not_mixed(tmp_path: Path) -> None:
    """Told before the first step where the loader knows its length, else when it comes."""
    model = task("finetuning", mixup=0.8)
    said = "a batch has 1 images, but mixup and cutmix mix pairs: make data.batch_size even, .*drop_last=True"
    items = samples("finetuning", 9)
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path).fit(model, DataLoader(items, batch_size=4))
    with pytest.raises(ValueError, match=said):
        trainer(tmp_path, max_steps=3).fit(
            task("finetuning", mixup=0.8, warmup_epochs=0), DataLoader(Stream(items), batch_size=4)
        )
    trainer(tmp_path).fit(model, DataLoader(items, batch_size=4, drop_last=True))
    trainer(tmp_path, limit_train_batches=1).fit(model, DataLoader(items, batch_size=4))  # the last one is never reached


@pytest.mark.parametrize("name", TASKS[1:])
def test_one_class_is_nothing_to_tell_apart(tmp_path: Path, name: str) -> None:
    class One(pl.LightningDataModule):
        classes = ("ant",)

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(samples(name), batch_size=4)

    with pytest.raises(ValueError, match="the data has 1 class, .*give it images of 2 or more"):
        trainer(tmp_path).fit(task(name), One())
    with pytest.raises(ValueError, match="num_classes"):
        FineTuning(VIT, num_classes=1)


def test_a_probe_whose_every_rate_is_lost_says_so(tmp_path: Path) -> None:
    """An image that is no number kills the batch norm and with it all heads; a rate that is too high kills its own head."""
    items = samples("probing")
    items[6][0][0, 0, 0] = torch.nan
    model = task("probing")
    with pytest.raises(FloatingPointError, match="loss of every rate is NaN or infinite at step 2: see that the pixels"):
        trainer(tmp_path).fit(model, DataLoader(items, batch_size=4))
    backbone = timm.create_model(VIT, **PLAIN, num_classes=0, global_pool="")
    trainer(tmp_path, max_epochs=3).fit(
        LinearProbe(backbone, 3, lrs=(0.1, 1e38), warmup_epochs=0), DataLoader(samples("probing"), batch_size=4)
    )


def test_an_encoder_that_is_frozen_whole_has_nothing_to_learn(tmp_path: Path) -> None:
    model = task("finetuning")
    model.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing is left to learn, every parameter has requires_grad=False"):
        trainer(tmp_path).fit(model, DataLoader(samples("finetuning"), batch_size=4))
