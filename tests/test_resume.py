"""A run that was killed and resumed against one that never was: the same images, masks, losses and weights, bit for bit.

Run as a script, this file trains: `python test_resume.py RUNS PORT ...`, a JSON list of `Run` and a port for each, one after
the other, each in a process that was forked for it.
"""

import csv
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import PLAIN, ROOT, tiny_model, tiny_student
from PIL import Image
from pytorch_lightning.callbacks import Checkpoint, EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from unimim import (
    CenteredSoftmax,
    ClassFolderData,
    CodebookTarget,
    EMAHeadTarget,
    EMATarget,
    ExactResume,
    FashionMNISTData,
    FeatureTarget,
    FineTuning,
    ImageFolderData,
    Mask,
    PrototypeHead,
    ResumableSampler,
    ScenesData,
    SeededSamples,
    SegmentationFolderData,
    SoftCrossEntropyLoss,
    StopOnSignal,
    UperNetSegmentation,
)
from unimim.data.folder import ImageFiles
from unimim.data.sampling import derived_seed, seeded
from unimim.tasks.optim import fused_adamw
from unimim.training.resume import digest_of_names, settings

IMAGES = 22
"""In the folder: 5 batches of 4 and two images over, in one process and in two (of 2)."""
BATCHES = 5
EPOCHS = 3


@dataclass(frozen=True)
class Run:
    """One training: of which task, how, and what happens to it."""

    task: str
    images: str
    """The folder of images."""
    folder: str
    """Where `RANK.jsonl` and checkpoints are written."""
    processes: int = 1
    workers: int = 0
    accumulate: int = 1
    batch_size: int = 4
    """Of all processes."""
    seed: int = 3
    seed_by_rank: bool = False
    """Whether each process adds its rank to the seed."""
    max_epochs: int = EPOCHS
    max_steps: int = -1
    resume: str | None = None
    save_everywhere: bool = False
    killed_at: int | None = None
    """The batch, counted over epochs, in which every process is killed by SIGKILL."""
    stopped_at: int | None = None
    """After which batch the training is told to stop."""
    fails_at: int | None = None
    """The batch in which an exception is raised, of which `exception.ckpt` is written."""
    fails_in_validation: int | None = None
    """The epoch in whose validation one is."""
    average: bool = False
    """Whether it keeps a moving average of the weights."""
    exact_first: bool = False
    """Whether `ExactResume` is given to the Trainer, before any other callback."""
    trainer: dict[str, Any] = field(default_factory=dict)
    """Further options of the Trainer."""


def train(run: Run) -> pl.Trainer:
    pl.seed_everything(run.seed + run.seed_by_rank * int(os.environ.get("LOCAL_RANK", 0)), verbose=False)
    model, data = TASKS[run.task](run)
    folder = Path(run.folder)
    folder.mkdir(exist_ok=True, parents=True)
    chance = hashlib.sha256(run.folder.encode()).digest()[0]  # whatever was drawn before the first step has no say
    torch.manual_seed(chance)
    np.random.seed(chance)
    random.seed(chance)
    callbacks: list[pl.Callback] = [Log(run)]
    if run.exact_first:
        callbacks.insert(0, ExactResume())
    if run.average:
        callbacks.append(EMAWeightAveraging(decay=0.5, use_buffers=False))
    if run.save_everywhere:
        callbacks.append(SaveEverywhere(folder))
    if run.fails_at is not None or run.fails_in_validation is not None:
        callbacks.append(OnExceptionCheckpoint(folder, "exception"))
    if run.killed_at is not None:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=2 // run.accumulate, save_top_k=-1))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=run.processes,
        strategy="ddp" if run.processes > 1 else "auto",
        max_epochs=run.max_epochs,
        max_steps=run.max_steps,
        accumulate_grad_batches=run.accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        **run.trainer,
    )
    trainer.fit(model, datamodule=data, ckpt_path=run.resume)
    sampler = trainer.train_dataloader.sampler
    (folder / f"{trainer.global_rank}.order").write_text(json.dumps(list(sampler)))
    (folder / f"{trainer.global_rank}.weights").write_text(digest(*model.state_dict().values()))
    return trainer


class Log(pl.Callback):
    """A line for each batch: where it is, what it saw and what came out. And what else happens to a run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.mask = ""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.file, self.ends = (
            (Path(self.run.folder) / f"{trainer.global_rank}.{suffix}").open("w") for suffix in ("jsonl", "ends")
        )
        if hasattr(pl_module, "masking"):
            pl_module.masking.register_forward_hook(self.see)

    def see(self, module: nn.Module, inputs: Any, mask: Mask) -> None:
        self.mask = digest(mask.tensor)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.run.killed_at == trainer.fit_loop.total_batch_idx:
            time.sleep(0.1)  # until the other process, if there is one, has what it waits for
            os.kill(os.getpid(), signal.SIGKILL)
        if self.run.fails_at == trainer.fit_loop.total_batch_idx:
            raise KeyError("fails")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        seen = {
            "epoch": trainer.current_epoch,
            "batch": batch_idx,
            "images": [
                digest(*image)
                for image in ([[one] for one in batch] if isinstance(batch, Tensor) else zip(*batch, strict=True))
            ],
            "mask": self.mask,
            "loss": float(outputs["loss"]).hex(),
            "lr": [group["lr"].hex() for group in trainer.optimizers[0].param_groups],
            "step": trainer.global_step,
            "logged": trainer.fit_loop.epoch_loop._batches_that_stepped,
            "total": trainer.fit_loop.total_batch_idx,
            "last": trainer.fit_loop.epoch_loop.batch_progress.is_last_batch,
        }
        print(json.dumps(seen), file=self.file, flush=True)
        trainer.should_stop = self.run.stopped_at == seen["total"]

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.run.fails_in_validation == trainer.current_epoch:
            raise KeyError("fails")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit":
            self.write_end(trainer, "val")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.write_end(trainer, "end")

    def write_end(self, trainer: pl.Trainer, kind: str) -> None:
        """Of a validation or an epoch: where it is, and all metrics as callbacks see them."""
        metrics = {name: float(value).hex() for name, value in trainer.callback_metrics.items()}
        logged = trainer.fit_loop.epoch_loop._batches_that_stepped
        end = [trainer.current_epoch, trainer.fit_loop.batch_idx, kind, trainer.global_step, logged, metrics]
        print(json.dumps(end), file=self.ends, flush=True)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.file.close()
        self.ends.close()


class SaveEverywhere(Checkpoint):
    """A checkpoint at every place where one can be written: EPOCH_BATCH, EPOCH_BATCH_val, EPOCH_end, fit_end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, trainer: pl.Trainer, name: str) -> None:
        trainer.save_checkpoint(self.folder / f"{name}.ckpt")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.save(trainer, f"{trainer.current_epoch}_{batch_idx}")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.save(trainer, f"{trainer.current_epoch}_{trainer.fit_loop.batch_idx}_val")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.save(trainer, f"{trainer.current_epoch}_end")

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.save(trainer, "fit_end")


def digest(*tensors: Tensor) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    return sha.hexdigest()[:16]


# Tiny models of each kind, on real augmentations


def photos(run: Run) -> ImageFolderData:
    size = run.batch_size // run.processes
    return ImageFolderData(f"{run.images}/classes", 32, size, run.workers, crop_scale=(0.3, 1.0), color_jitter=0.4)


def pretraining(run: Run) -> tuple[Any, Any]:
    student = tiny_student()
    student.backbone.blocks[1].drop_path1.drop_prob = 0.3
    return tiny_model(student=student, warmup_epochs=1, lr=1e-3), photos(run)


def data2vec(run: Run) -> tuple[Any, Any]:
    return tiny_model(teacher=EMATarget(2, 0.9, 1.0), loss=nn.SmoothL1Loss(), lr=1e-3), photos(run)


def ibot(run: Run) -> tuple[Any, Any]:
    parts = {"normalization": CenteredSoftmax(8), "head": partial(PrototypeHead, hidden=16, bottleneck=8)}
    return tiny_model(teacher=EMAHeadTarget(8, 0.9), loss=SoftCrossEntropyLoss(), lr=1e-3, **parts), photos(run)


def codebook(run: Run) -> tuple[Any, Any]:
    features = FeatureTarget("vit_tiny_patch16_224", weights="random", model_args=PLAIN)
    teacher = CodebookTarget(features, codes=6, fit_images=10)
    return tiny_model(teacher=teacher, loss=nn.CrossEntropyLoss(), lr=1e-3), photos(run)


def fashion(run: Run) -> tuple[Any, Any]:
    size = run.batch_size // run.processes
    return tiny_model(lr=1e-3), FashionMNISTData(run.images, 32, size, run.workers, train_images=IMAGES)


def scenes(run: Run) -> tuple[Any, Any]:
    size = run.batch_size // run.processes
    data = ScenesData(run.images, 32, (1, 2), (0.5, 1.0), IMAGES, 4, batch_size=size, num_workers=run.workers, labelled=False)
    return tiny_model(lr=1e-3), data


def finetuning(run: Run) -> tuple[Any, Any]:
    model_args = {**PLAIN, "drop_path_rate": 0.2, "drop_rate": 0.1}
    recipe = {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.5, "warmup_epochs": 1, "lr": 1e-3}
    model = FineTuning("vit_tiny_patch16_224", num_classes=2, model_args=model_args, **recipe)
    size = run.batch_size // run.processes
    return model, ClassFolderData(f"{run.images}/classes", 32, size, run.workers)


def segmentation(run: Run) -> tuple[Any, Any]:
    model_args = {**PLAIN, "depth": 4, "drop_path_rate": 0.2}
    model = UperNetSegmentation(
        "vit_tiny_patch16_224", num_classes=3, model_args=model_args, channels=8, warmup_steps=2, lr=1e-3
    )
    size = run.batch_size // run.processes
    data = SegmentationFolderData(f"{run.images}/maps", ["a", "b", "c"], 32, size, run.workers, resize=(80, 48))
    return model, data


TASKS = {
    "pretraining": pretraining,
    "data2vec": data2vec,
    "ibot": ibot,
    "codebook": codebook,
    "fashion": fashion,
    "scenes": scenes,
    "finetuning": finetuning,
    "segmentation": segmentation,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Small photos in two classes, a few with label maps, and a link to Fashion-MNIST where it is."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for split, count in (("train", IMAGES), ("val", 4)):
        for i in range(count):
            coarse = draw.integers(0, 256, (6, 7, 3), dtype=np.uint8)
            photo = Image.fromarray(coarse).resize((56 + i, 48), Image.Resampling.BICUBIC)
            for path in (root / "classes" / split / "ab"[i % 2], root / "maps" / "images" / split):
                path.mkdir(parents=True, exist_ok=True)
                photo.save(path / f"{i}.jpg")
            path = root / "maps" / "labels" / split
            path.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 3, (6, 7), dtype=np.uint8)).resize(photo.size, 0).save(path / f"{i}.png")
    if (ROOT / "data" / "FashionMNIST").is_dir():
        (root / "FashionMNIST").symlink_to(ROOT / "data" / "FashionMNIST")
    return str(root)


# How runs are compared


def lines(folder: str | Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / f"{rank}.jsonl").read_text().splitlines()]


def ends(folder: str | Path, rank: int = 0) -> list[list[Any]]:
    """Of validations and epochs: [epoch, batch, "val" or "end", ...]."""
    return [json.loads(line) for line in (Path(folder) / f"{rank}.ends").read_text().splitlines()]


def is_ahead(end: list[Any], checkpoint: Path, begins: tuple[int, int]) -> bool:
    """Whether a validation or the end of an epoch comes after the place in a checkpoint's name, or else after `begins`."""
    words = checkpoint.stem.split("_")
    if not words[0].isdigit() or words[1] == "end":
        return (end[0], end[1]) >= begins
    place = [int(words[0]), int(words[1])]
    return end[:2] > place or (end[:2] == place and end[2] != words[-1])


def check_the_same(resumed: Run, whole: Run, begins: tuple[int, int]) -> None:
    """All batches from `begins`, (epoch, batch), on are those of the run that was never interrupted, and so are the weights.

    So are the validations and the ends of epochs from where the checkpoint was written.
    """
    for rank in range(whole.processes):
        if resumed.resume:
            ahead = [end for end in ends(whole.folder, rank) if is_ahead(end, Path(resumed.resume), begins)]
            assert ends(resumed.folder, rank) == ahead, (resumed, rank)
        expected = [line for line in lines(whole.folder, rank) if (line["epoch"], line["batch"]) >= begins]
        assert lines(resumed.folder, rank) == expected, (resumed, rank)
        name = f"{rank}.weights"
        assert (Path(resumed.folder) / name).read_text() == (Path(whole.folder) / name).read_text(), (resumed, rank)


def place_after(epoch: int, batch: int, accumulate: int) -> tuple[int, int]:
    """Where a checkpoint written after a batch goes on: at a whole step."""
    done = batch + 1
    return (epoch + 1, 0) if done == BATCHES else (epoch, done // accumulate * accumulate)


def every_resume(whole: Run) -> list[tuple[Run, tuple[int, int]]]:
    """A run from each checkpoint of a run that saves everywhere, and where it begins."""
    runs = []
    for checkpoint in sorted(Path(whole.folder).glob("*.ckpt")):
        words = checkpoint.stem.split("_")
        if words[0] == "fit" or words[:2] == [str(EPOCHS - 1), "end"]:
            continue  # nothing is left to do
        begins = (int(words[0]) + 1, 0) if words[1] == "end" else place_after(int(words[0]), int(words[1]), whole.accumulate)
        options = {**asdict(whole), "resume": str(checkpoint), "save_everywhere": False}
        runs.append((Run(**{**options, "folder": f"{whole.folder}/from_{checkpoint.stem}"}), begins))
    return runs


# One process


@pytest.mark.filterwarnings("error:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_from_every_checkpoint(tmp_path: Path, images: str, workers: int, accumulate: int) -> None:
    """Each batch of each epoch, its end, and the end of a validation, with persistent workers where there are any."""
    whole = Run("finetuning", images, str(tmp_path), workers=workers, accumulate=accumulate, save_everywhere=True)
    train(whole)
    assert [(line["epoch"], line["batch"]) for line in lines(tmp_path)] == [(e, b) for e in range(3) for b in range(5)]
    assert len({image for line in lines(tmp_path) for image in line["images"]}) == 60
    runs = every_resume(whole)
    assert len(runs) == 15 + 3 + 2
    for resumed, begins in runs if workers == 0 else runs[accumulate::4]:
        train(resumed)
        check_the_same(resumed, whole, begins)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "finetuning"])
def test_every_task(tmp_path: Path, images: str, task: str) -> None:
    """Also where running means move with batches whose gradients a checkpoint in the midst of an accumulation loses."""
    if task in ("fashion", "scenes") and not (Path(images) / "FashionMNIST").is_dir():
        pytest.skip("there is no Fashion-MNIST: make data")
    whole = Run(task, images, str(tmp_path), accumulate=2, save_everywhere=True)
    train(whole)
    assert len(lines(tmp_path)) == EPOCHS * BATCHES
    for resumed, begins in every_resume(whole):
        if Path(resumed.folder).name in ("from_0_2", "from_1_1", "from_1_end", "from_2_0"):
            train(resumed)
            check_the_same(resumed, whole, begins)


def test_trainings_that_count_steps(tmp_path: Path, images: str) -> None:
    """Lightning treats `max_steps` as a training that always restarts: it would add a batch to an epoch that is over."""
    whole = Run("pretraining", images, str(tmp_path), max_epochs=-1, max_steps=13, save_everywhere=True)
    train(whole)
    assert len(lines(tmp_path)) == 13
    for resumed, begins in every_resume(whole):
        if begins != (2, 3):
            train(resumed)
            check_the_same(resumed, whole, begins)


@pytest.mark.parametrize("stopped_after", [2, 7, 10, 14])
def test_an_epoch_that_was_cut_short_is_finished(tmp_path: Path, images: str, stopped_after: int) -> None:
    """Lightning counts it as done, and a training whose last epoch it is as over."""

    whole = Run("data2vec", images, str(tmp_path / "whole"))
    train(whole)
    stopped = Run("data2vec", images, str(tmp_path / "stopped"), save_everywhere=True, stopped_at=stopped_after - 1)
    train(stopped)
    assert len(lines(stopped.folder)) == stopped_after
    for name in ("fit_end", f"{(stopped_after - 1) // BATCHES}_end"):
        resumed = Run("data2vec", images, str(tmp_path / name), resume=f"{stopped.folder}/{name}.ckpt")
        train(resumed)
        check_the_same(resumed, whole, divmod(stopped_after, BATCHES))


def test_resumed_again_and_again(tmp_path: Path, images: str) -> None:
    """From the last batch of an epoch, then from exceptions within a step: Lightning's progress stays whole."""
    whole = Run("pretraining", images, str(tmp_path / "whole"), accumulate=2, save_everywhere=True)
    train(whole)
    checkpoint = f"{whole.folder}/0_4.ckpt"
    for i, (begins, fails_at) in enumerate([((1, 0), 7), ((1, 2), 8), ((1, 2), 12), ((2, 2), None)]):
        resumed = Run(**{**asdict(whole), "folder": str(tmp_path / f"{i}"), "resume": checkpoint, "fails_at": fails_at})
        if fails_at is None:
            train(resumed)
            check_the_same(resumed, whole, begins)
        else:
            with pytest.raises(KeyError, match="fails"):
                train(resumed)
            first = begins[0] * BATCHES + begins[1]
            assert lines(resumed.folder) == lines(whole.folder)[first:fails_at]
            checkpoint = f"{resumed.folder}/exception.ckpt"


def test_a_validation_that_failed_is_made_whole(tmp_path: Path, images: str) -> None:
    whole = Run("finetuning", images, str(tmp_path / "whole"))
    train(whole)
    failed = Run("finetuning", images, str(tmp_path / "failed"), fails_in_validation=1)
    with pytest.raises(KeyError, match="fails"):
        train(failed)
    assert len(ends(failed.folder)) == 2
    resumed = Run("finetuning", images, str(tmp_path / "resumed"), resume=f"{failed.folder}/exception.ckpt")
    train(resumed)
    assert ends(resumed.folder) == ends(whole.folder)[2:]
    assert lines(resumed.folder) == lines(whole.folder)[2 * BATCHES :]


def test_a_signal_loses_neither_a_validation_nor_a_row(tmp_path: Path, images: str) -> None:
    """Also at the last batch of an epoch, and where a checkpoint waits for a metric of the training at the epoch's end."""
    logged = []
    for at in (-1, 4, 11):
        folder = tmp_path / f"{at}"
        rows: list[dict[str, str]] = []
        for stopped in (False,) if at < 0 else (True, False):
            resume = next(folder.glob("*SIGTERM.ckpt"), None)
            pl.seed_everything(3, verbose=False)
            model, data = finetuning(Run("finetuning", images, str(folder)))
            logger = CSVLogger(folder, name="log")
            best = ModelCheckpoint(folder, "best", monitor="train/loss", save_on_train_epoch_end=True)
            trainer = pl.Trainer(
                accelerator="cpu", max_epochs=EPOCHS, logger=logger, log_every_n_steps=1, val_check_interval=0.2,
                callbacks=[StopOnSignal(), best, *([SignalAt(at)] if stopped else [])], num_sanity_val_steps=0,
                enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            with pytest.raises(SIGTERMException) if stopped else nullcontext():
                trainer.fit(model, datamodule=data, ckpt_path=resume)
            with Path(logger.log_dir, "metrics.csv").open() as file:
                rows += [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
        logged.append(rows)
    assert sum("val/acc1" in row for row in logged[0]) == BATCHES * EPOCHS
    assert sum("train/loss" in row for row in logged[0]) == BATCHES * EPOCHS
    assert logged[1:] == logged[:1] * 2


class SignalAt(pl.Callback):
    """Sends SIGTERM to its own process within a batch, counted over epochs."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_after_backward(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    ("option", "value"), [("limit_train_batches", 4), ("reload_dataloaders_every_n_epochs", 1), ("val_check_interval", 2)]
)
def test_options_of_the_trainer(tmp_path: Path, images: str, option: str, value: int) -> None:
    options = {"workers": 2 * (option == "reload_dataloaders_every_n_epochs"), "trainer": {option: value}}
    whole = Run("finetuning", images, str(tmp_path), save_everywhere=True, **options)
    train(whole)
    for checkpoint in Path(tmp_path).glob("1_[13e]*.ckpt"):
        resumed = Run("finetuning", images, f"{tmp_path}/from_{checkpoint.stem}", resume=str(checkpoint), **options)
        train(resumed)
        epoch, batch = (int(word.replace("end", "3")) for word in checkpoint.stem.split("_")[:2])
        over = batch + 1 == (4 if option == "limit_train_batches" else BATCHES) or "end" in checkpoint.stem
        check_the_same(resumed, whole, (epoch + 1, 0) if over else (epoch, batch + 1))


@pytest.mark.parametrize(
    ("checkpoint", "batch_size", "accumulate", "begins", "said"),
    [
        ("1_2", 6, 1, (1, 2), "it goes on after 12 images of epoch 1, and the order of the images differs"),
        ("1_1", 6, 1, (1, 1), "it goes on after 8 images of epoch 1 (2 are seen again), and the order of the images differs"),
        ("1_2", 4, 2, (1, 2), "it goes on after 12 images of epoch 1 (4 are seen again), and the order"),
        ("1_2", 2, 2, (1, 6), "it goes on after 12 images of epoch 1, and masks differ from what it would have been"),
        ("1_4", 6, 1, (2, 0), "it goes on after 20 images of epoch 1, and the order of the images differs"),
        ("1_4_val", 10, 1, (2, 0), "it goes on after 20 images of epoch 1, and the order of the images differs"),
    ],
)
def test_another_batch_goes_on_after_the_images_that_were_seen(
    tmp_path: Path,
    images: str,
    caplog: pytest.LogCaptureFixture,
    checkpoint: str,
    batch_size: int,
    accumulate: int,
    begins: tuple[int, int],
    said: str,
) -> None:
    whole = Run("finetuning", images, str(tmp_path), save_everywhere=True)
    train(whole)
    resumed = Run(
        "finetuning",
        images,
        f"{tmp_path}/resumed",
        batch_size=batch_size,
        accumulate=accumulate,
        resume=f"{tmp_path}/{checkpoint}.ckpt",
    )
    with caplog.at_level("INFO"):
        train(resumed)
    notes = [record.getMessage() for record in caplog.records if "the checkpoint is of" in record.getMessage()]
    assert len(notes) == 1
    before = "1 processes x 4 images x 1 accumulated, 22 images in all, seed 3"
    assert f"{before}, this run has 1 processes x {batch_size}" in notes[0]
    assert said in notes[0]
    assert ("schedules go on by their steps" in notes[0]) == (batch_size * accumulate != 4)
    first, *_ = lines(resumed.folder)
    assert (first["epoch"], first["batch"]) == begins
    order = [image for line in lines(tmp_path) if line["epoch"] == begins[0] for image in line["images"]]
    seen = [image for line in lines(resumed.folder) if line["epoch"] == begins[0] for image in line["images"]]
    part = order[begins[1] * batch_size :]
    assert seen[: len(part)] == part[: len(seen)]


def test_images_whose_gradients_were_lost_are_seen_again(tmp_path: Path, images: str) -> None:
    """Of three batches the third waited for a fourth; a run that does not accumulate takes it first."""
    train(Run("pretraining", images, str(tmp_path), accumulate=2, save_everywhere=True))
    resumed = Run("pretraining", images, f"{tmp_path}/resumed", resume=f"{tmp_path}/1_2.ckpt")
    train(resumed)
    first = lines(resumed.folder)[0]
    assert (first["epoch"], first["batch"]) == (1, 2)
    assert first["images"] == lines(tmp_path)[BATCHES + 2]["images"]


def test_another_seed_is_said(tmp_path: Path, images: str, caplog: pytest.LogCaptureFixture) -> None:
    train(Run("pretraining", images, str(tmp_path), save_everywhere=True, max_epochs=1))
    with caplog.at_level("INFO"):
        train(Run("pretraining", images, f"{tmp_path}/other", resume=f"{tmp_path}/0_1.ckpt", seed=4, max_epochs=1))
    assert "seed 4: it goes on after 8 images of epoch 0, and the order of the images differs" in caplog.text


def test_more_images_are_said(tmp_path: Path, images: str, caplog: pytest.LogCaptureFixture) -> None:
    train(Run("pretraining", images, str(tmp_path), save_everywhere=True, max_epochs=1))
    grown = tmp_path / "grown" / "classes"
    shutil.copytree(Path(images) / "classes", grown)
    shutil.copy(next((grown / "train" / "a").iterdir()), grown / "train" / "a" / "new.jpg")
    with caplog.at_level("INFO"):
        train(Run("pretraining", str(grown.parent), f"{tmp_path}/other", resume=f"{tmp_path}/0_1.ckpt", max_epochs=1))
    assert "1 accumulated, 22 images in all, seed 3, this run has 1 processes" in caplog.text
    assert "23 images in all, seed 3: it goes on after 8 images of epoch 0, and the order of the images differs" in caplog.text


def test_other_settings_are_said(tmp_path: Path, images: str, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing where all are the same; nothing of what a checkpoint does not know, as one of version 0.1.0."""
    train(Run("pretraining", images, str(tmp_path), save_everywhere=True, max_epochs=1))
    file = f"{tmp_path}/0_1.ckpt"
    other = {"precision": "bf16-mixed", "gradient_clip_algorithm": "value"}
    with caplog.at_level("INFO"):
        train(Run("pretraining", images, f"{tmp_path}/same", resume=file, max_epochs=1))
        assert "the checkpoint's run" not in caplog.text
        train(Run("pretraining", images, f"{tmp_path}/other", resume=file, max_epochs=1, trainer=other))
    assert (
        "the checkpoint's run had precision 32-true, now bf16-mixed; gradient clipping 1.0 by norm, now 1.0 by "
        "value: numbers differ from what they would have been" in caplog.text
    )
    assert settings(pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False))["strategy"] == "DDPStrategy"
    old = torch.load(file, weights_only=True)
    old["run"] = {name: value for name, value in old["run"].items() if isinstance(value, int)}
    assert sorted(old["run"]) == ["accumulate_grad_batches", "batch_size", "images", "processes", "seed"]
    torch.save(old, tmp_path / "old.ckpt")
    caplog.clear()
    with caplog.at_level("INFO"):
        train(Run("pretraining", images, f"{tmp_path}/old", resume=f"{tmp_path}/old.ckpt", max_epochs=1, trainer=other))
    assert "the checkpoint's run" not in caplog.text
    assert "the checkpoint is of" not in caplog.text


def test_images_of_other_names_are_said(tmp_path: Path, images: str, caplog: pytest.LogCaptureFixture) -> None:
    """A copy elsewhere has the same; one file that is called otherwise makes others of them."""
    train(Run("pretraining", images, str(tmp_path), save_everywhere=True, max_epochs=1))
    copy = tmp_path / "copy" / "classes"
    shutil.copytree(Path(images) / "classes", copy)
    said = "the images are others than those of the checkpoint's run: as many, but with other file names"
    with caplog.at_level("INFO"):
        resume = {"resume": f"{tmp_path}/0_1.ckpt", "max_epochs": 1}
        train(Run("pretraining", str(copy.parent), f"{tmp_path}/moved", **resume))
        assert said not in caplog.text
        first = min((copy / "train" / "a").iterdir())
        first.rename(first.with_name(f"other{first.suffix}"))
        train(Run("pretraining", str(copy.parent), f"{tmp_path}/renamed", **resume))
    assert caplog.text.count(said) == 1


def test_the_digest_of_names_is_of_the_names_below_the_shared_folder() -> None:
    class Files:
        def __init__(self, *names: str) -> None:
            self.files = [Path(name) for name in names]

    def digest(*names: str) -> str | None:
        return digest_of_names(SeededSamples(Files(*names)))

    assert digest("/a/x/1.png", "/a/y/2.png") == digest("b/c/x/1.png", "b/c/y/2.png") == digest("x/1.png", "y/2.png")
    assert digest("/a/x/1.png", "/a/y/2.png") != digest("/a/y/2.png", "/a/x/1.png")  # the order counts
    assert digest("/a/x/1.png") == digest("/b/1.png") != digest("/b/2.png")
    assert digest("/a/x1/1.png", "/a/x2/1.png") != digest("/a/x1/1.png", "/a/x3/1.png")
    assert digest_of_names(TensorDataset(torch.rand(3))) is None


@pytest.mark.parametrize(
    ("name", "begins", "said"),
    [
        ("1_2", (1, 3), "the rest of epoch 1 has the first images of this run's order"),
        ("1_4", (2, 0), "epoch 2 has the images of this run's order"),
        ("1_4_val", (2, 0), "epoch 2 has the images of this run's order"),
        ("1_end", (2, 0), "epoch 2 has the images of this run's order"),
    ],
)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_checkpoint_without_a_place(
    tmp_path: Path,
    images: str,
    caplog: pytest.LogCaptureFixture,
    workers: int,
    name: str,
    begins: tuple[int, int],
    said: str,
) -> None:
    """Nothing is taken for granted: within an epoch its images come from the beginning, and Lightning warns."""
    whole = Run("finetuning", images, str(tmp_path), save_everywhere=True)
    train(whole)
    checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
    del checkpoint["run"]
    torch.save(checkpoint, tmp_path / f"{name}.ckpt")
    resumed = Run("finetuning", images, f"{tmp_path}/resumed", workers=workers, resume=f"{tmp_path}/{name}.ckpt")
    with caplog.at_level("INFO"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(resumed)
    messages = [record.getMessage() for record in caplog.records]
    notes = [message for message in messages if "does not say which images its run had seen" in message]
    assert len(notes) == 1
    assert notes[0].endswith(said)
    assert any("your dataloader is not resumable" in str(warning.message) for warning in caught) == (begins == (1, 3))
    if begins == (2, 0):
        check_the_same(resumed, whole, begins)
        return
    seen, order = lines(resumed.folder), lines(whole.folder)
    assert (seen[0]["epoch"], seen[0]["batch"]) == begins
    assert [line["images"] for line in seen[:2]] == [line["images"] for line in order[BATCHES : BATCHES + 2]]
    assert [line["images"] for line in seen[2:]] == [line["images"] for line in order[2 * BATCHES :]]


@pytest.mark.parametrize("own_first", [True, False])
def test_an_average_of_the_weights(tmp_path: Path, images: str, own_first: bool) -> None:
    """Batch norms move amid an accumulation, in the model and not in its average, whichever callback comes first."""
    whole = Run("segmentation", images, str(tmp_path), accumulate=2, save_everywhere=True, average=True, exact_first=own_first)
    train(whole)
    saved = torch.load(tmp_path / "1_2.ckpt", weights_only=True)
    before = torch.load(tmp_path / "1_1.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state"):
        assert saved[key].keys() == before[key].keys()
        assert all(torch.equal(saved[key][name], before[key][name]) for name in saved[key]), key
    assert any(name.endswith("running_mean") for name in saved["current_model_state"])
    for resumed, begins in every_resume(whole):
        if Path(resumed.folder).name in ("from_1_2", "from_2_4"):
            train(resumed)
            check_the_same(resumed, whole, begins)


@pytest.mark.parametrize("part", ["current", "average"])
def test_neither_an_average_nor_its_model_is_saved_with_nan(tmp_path: Path, images: str, part: str) -> None:
    trainer = train(Run("finetuning", images, str(tmp_path), max_epochs=1, average=True))
    (average,) = (callback for callback in trainer.callbacks if isinstance(callback, EMAWeightAveraging))
    model = {"current": trainer.lightning_module, "average": average._average_model.module}[part]
    with torch.no_grad():
        model.backbone.head.bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"not all of it is finite: backbone\.head\.bias;"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")


def test_the_state_of_an_optimizer_that_was_not_fused(tmp_path: Path, images: str) -> None:
    """Of an older checkpoint: what is loaded stays fused, and so are the counts of steps that it keeps on the device."""
    whole = Run("pretraining", images, str(tmp_path), save_everywhere=True, max_epochs=2)
    train(whole)
    checkpoint = torch.load(tmp_path / "0_2.ckpt", weights_only=True)
    for group in checkpoint["optimizer_states"][0]["param_groups"]:
        group["fused"] = None
    torch.save(checkpoint, tmp_path / "0_2.ckpt")
    resumed = Run("pretraining", images, f"{tmp_path}/resumed", resume=f"{tmp_path}/0_2.ckpt", max_epochs=2)
    trainer = train(resumed)
    assert all(group["fused"] is True for group in trainer.optimizers[0].param_groups)
    check_the_same(resumed, whole, (0, 3))
    weight = nn.Parameter(torch.ones(2, device="meta"))
    optimizer = fused_adamw([{"params": [weight]}], 1e-3, (0.9, 0.98))
    (group,) = optimizer.state_dict()["param_groups"]
    state = {"step": torch.ones(()), "exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    optimizer.load_state_dict({"state": {0: state}, "param_groups": [{**group, "fused": None}]})
    assert {moment.device.type for moment in optimizer.state[weight].values()} == {"meta"}


@pytest.mark.parametrize("equal", [False, True], ids=["sizes", "shapes"])
def test_an_optimizer_that_was_grouped_otherwise(tmp_path: Path, images: str, equal: bool) -> None:
    """As of a run that began before its recipe let the mask token decay: one line says so, and what to give."""
    whole = Run("pretraining", images, str(tmp_path), save_everywhere=True, max_epochs=2)
    train(whole)
    checkpoint = torch.load(tmp_path / "0_2.ckpt", weights_only=True)
    first, second = (group["params"] for group in checkpoint["optimizer_states"][0]["param_groups"])
    second.append(first.pop())
    if equal:
        first.append(second.pop(0))
    torch.save(checkpoint, tmp_path / "0_2.ckpt")
    resumed = Run("pretraining", images, f"{tmp_path}/resumed", resume=f"{tmp_path}/0_2.ckpt", max_epochs=2)
    told = r"groups of \[\d+, \d+\] parameters, this one of \[\d+, \d+\](, of other shapes)?: .* --config RUN/config.yaml"
    with pytest.raises(ValueError, match=told) as error:
        train(resumed)
    assert "\n" not in str(error.value)
    assert ("of other shapes" in str(error.value)) == equal


def test_what_is_drawn_beside_the_steps_shifts_nothing(tmp_path: Path, images: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a validation, not the images that k-means reads first: persistent workers have one iterator for all."""
    with_validation, without = (
        Run("finetuning", images, str(tmp_path / f"{count}"), trainer={"limit_val_batches": count}) for count in (1.0, 0)
    )
    for run in (with_validation, without):
        train(run)
    check_the_same(without, with_validation, (0, 0))
    other, fitted = (
        Run(task, images, str(tmp_path / task), workers=workers, save_everywhere=True)
        for task, workers in (("pretraining", 0), ("codebook", 2))
    )
    for run in (other, fitted):
        train(run)
    assert [line["images"] for line in lines(other.folder)] == [line["images"] for line in lines(fitted.folder)]
    assert len({line["mask"] for line in lines(other.folder)}) == EPOCHS * BATCHES
    monkeypatch.setattr("unimim.letters.targets.tokens.kmeans", None)  # what is in the checkpoint is not fitted again
    resumed = Run("codebook", images, str(tmp_path / "resumed"), workers=2, resume=f"{fitted.folder}/0_3.ckpt")
    train(resumed)
    check_the_same(resumed, fitted, (0, 4))


class OwnModule(pl.LightningModule):
    """A user's, which knows nothing of this."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Noisy(Dataset[Tensor]):
    """Ten samples with noise of torch, numpy and random."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Tensor:
        return index + torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()])


@pytest.mark.parametrize("resumable", [True, False])
def test_ones_own_module_and_data(tmp_path: Path, resumable: bool) -> None:
    """`ExactResume` given to the Trainer; a loader without `ResumableSampler` is still warned of."""
    data = Noisy()
    weights = []
    for resume in (None, tmp_path / "0_2.ckpt"):
        torch.manual_seed(1)
        model = OwnModule()
        exact = DataLoader(SeededSamples(data), 2, sampler=ResumableSampler(data), drop_last=True)
        loader = exact if resumable else DataLoader(data, 2)
        trainer = pl.Trainer(
            accelerator="cpu",
            max_epochs=2,
            callbacks=[ExactResume(), SaveEverywhere(tmp_path)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            filters = list(warnings.filters)
            trainer.fit(model, loader, ckpt_path=resume)
            assert warnings.filters == filters  # what is hidden is hidden once
        said = any("your dataloader is not resumable" in str(warning.message) for warning in caught)
        assert said == (resume is not None and not resumable)
        weights.append(model.layer[1].weight.detach())
    assert torch.equal(*weights) == resumable


def of_two(sampler: ResumableSampler) -> ResumableSampler:
    """As if it were made in one of two processes."""
    sampler.num_replicas = 2
    return sampler


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (
            DataLoader(Noisy(), 2, sampler=ResumableSampler(Noisy())),
            r"yields \(epoch, index\), which Noisy does not take \(.*\): wrap it, DataLoader\(SeededSamples\(dataset\), \.\.",
        ),
        (
            DataLoader(TensorDataset(torch.rand(3, 3)), 1, sampler=ResumableSampler(range(3))),
            "which TensorDataset does not take",
        ),
        (
            DataLoader(SeededSamples(Noisy()), None, sampler=ResumableSampler(Noisy())),
            "DataLoader has batch_size=None, but a place within an epoch is counted in batches: give it a batch_size",
        ),
        (
            DataLoader(SeededSamples(Noisy()), 2, sampler=of_two(ResumableSampler(Noisy()))),
            "shares the images among 2 processes, but 1 train: make it in train_dataloader",
        ),
    ],
)
def test_loaders_through_which_no_place_goes(loader: DataLoader[Any], said: str) -> None:
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[ExactResume()], logger=False, **options)
    with pytest.raises(ValueError, match=said) as caught:
        trainer.fit(OwnModule(), loader)
    assert "\n" not in str(caught.value)


def test_a_trainer_that_is_used_again_says_nothing(tmp_path: Path, images: str, caplog: pytest.LogCaptureFixture) -> None:
    trainer = train(Run("finetuning", images, str(tmp_path), max_epochs=1))
    with caplog.at_level("INFO"):
        trainer.validate(trainer.lightning_module, trainer.datamodule, verbose=False)
    assert "will override existing callbacks" not in caplog.text
    assert sum(isinstance(callback, ExactResume) for callback in trainer.callbacks) == 1


def test_overfitting_reads_by_index(tmp_path: Path, images: str) -> None:
    """Lightning then puts its own sampler in the place of ours: each epoch has the same images, augmented alike."""
    run = Run("pretraining", images, str(tmp_path), trainer={"overfit_batches": 2})
    train(run)
    seen = [line["images"] for line in lines(tmp_path)]
    assert seen[:2] == seen[2:4] == seen[4:]


# The parts


def test_the_order_is_a_permutation_that_processes_share(monkeypatch: pytest.MonkeyPatch) -> None:
    data = range(22)

    def orders(processes: int, epoch: int) -> list[list[int]]:
        found = []
        for rank in range(processes):
            monkeypatch.setattr("unimim.data.sampling.distributed.is_initialized", lambda: True)
            monkeypatch.setattr("unimim.data.sampling.distributed.broadcast_object_list", lambda seed: None)  # alike in all
            monkeypatch.setattr("unimim.data.sampling.distributed.get_world_size", lambda processes=processes: processes)
            monkeypatch.setattr("unimim.data.sampling.distributed.get_rank", lambda rank=rank: rank)
            sampler = ResumableSampler(data)
            sampler.set_epoch(epoch)
            places = list(sampler)
            assert {epoch} == {place[0] for place in places}
            assert len(sampler) == len(places) == 22 // processes
            found.append([index for _, index in places])
        return found

    for epoch in (0, 1, 7):
        (alone,) = orders(1, epoch)
        assert sorted(alone) == list(data)
        assert alone != sorted(alone)
        for processes in (2, 3, 4):
            shares = orders(processes, epoch)
            assert [index for turn in zip(*shares, strict=True) for index in turn] == alone[: 22 // processes * processes]
    assert orders(1, 0) != orders(1, 1)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    before = orders(1, 0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "6")
    assert orders(1, 0) != before


def test_the_sampler_goes_on_within_one_epoch_only() -> None:
    sampler = ResumableSampler(range(9))
    sampler.set_epoch(2)
    whole = list(sampler)
    other = ResumableSampler(range(9))
    other.resume(2, 4)
    other.set_epoch(2)  # Lightning says it again
    assert list(other) == whole[4:]
    assert len(other) == 9
    other.set_epoch(3)
    assert len(list(other)) == 9


def test_a_loader_that_a_resumed_run_has_read_begins_at_its_first_image_again(tmp_path: Path) -> None:
    dataset = SeededSamples([(torch.rand(3, 32, 32), index % 2) for index in range(12)])
    loader = DataLoader(dataset, 2, sampler=ResumableSampler(dataset), drop_last=True)
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "default_root_dir": tmp_path,
    }

    class Seen(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)
            self.batches = 0

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.batches += 1
            return torch.nn.functional.cross_entropy(self.layer(batch[0].mean((2, 3))), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = pl.Trainer(max_steps=4, callbacks=[ExactResume()], **options)
    trainer.fit(Seen(), loader)
    trainer.save_checkpoint(tmp_path / "amid.ckpt")
    goes_on, anew = Seen(), Seen()
    pl.Trainer(max_epochs=1, callbacks=[ExactResume()], **options).fit(goes_on, loader, ckpt_path=tmp_path / "amid.ckpt")
    pl.Trainer(max_epochs=1, callbacks=[ExactResume()], **options).fit(anew, loader)
    assert (goes_on.batches, anew.batches) == (2, 6)


def test_an_image_is_augmented_alike_in_every_batch_worker_and_process(images: str) -> None:
    data = ClassFolderData(f"{images}/classes", 32, 4, 0)
    data.setup("fit")
    photos: ImageFiles = data.splits["train"]
    samples = SeededSamples(photos)
    alone = torch.stack([samples[1, index][0] for index in range(IMAGES)])
    torch.manual_seed(8)
    for batch_size, workers in ((1, 0), (5, 2), (3, 2)):
        sampler = ResumableSampler(photos)
        sampler.set_epoch(1)
        order = torch.tensor([index for _, index in sampler])
        loader = DataLoader(samples, batch_size, sampler=sampler, num_workers=workers)
        assert torch.equal(torch.cat([pixels for pixels, _ in loader]), alone[order])
    assert not torch.equal(samples[2, 0][0], alone[0])
    assert not torch.equal(samples[1, 0][0], samples[0][0])  # an index alone is of epoch 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_image_is_replaced_alike(tmp_path: Path, workers: int) -> None:
    for i in range(6):
        Image.new("RGB", (40, 40), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"no image")
    data = ImageFolderData(str(tmp_path), 32, 3, workers, color_jitter=0.4, on_bad_image="skip")
    data.setup("fit")
    loader = data.train_dataloader()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="skipped")
        seen = torch.cat([data.on_after_batch_transfer(batch, 0) for batch in loader])
        order = [index for _, index in loader.sampler]
        generator = torch.Generator().manual_seed(derived_seed("sample", 0, 2))
        pixels, jitter = data.augmentation.draw(data.augmentation.cut(Image.open(tmp_path / "3.png"), generator), generator)
    assert torch.equal(seen[order.index(2)], data.augmentation.finish(pixels[None], jitter[None])[0])


def test_garments_are_mirrored_by_epoch_and_index(images: str) -> None:
    if not (Path(images) / "FashionMNIST").is_dir():
        pytest.skip("there is no Fashion-MNIST: make data")
    data = FashionMNISTData(images, train_images=IMAGES, batch_size=4)
    data.setup()
    garments = data.train_dataloader().dataset
    together = torch.stack(garments.__getitems__([(1, index) for index in range(IMAGES)]))
    assert torch.equal(together, torch.stack([garments[1, index] for index in range(IMAGES)]))
    plain, mirrored = data.splits["train"][0] / 255, together[:, 0, 2:-2, 2:-2]
    flips = [bool(torch.equal(image, garment.flip(-1))) for image, garment in zip(mirrored, plain, strict=True)]
    assert 4 < sum(flips) < IMAGES - 4
    assert not torch.equal(together, torch.stack(garments.__getitems__([(2, index) for index in range(IMAGES)])))


def test_derived_seeds_are_the_same_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert derived_seed("sample", 1, 2) == 12856242793407523849
    assert derived_seed("sample", 12) != derived_seed("sample", 1, 2)
    monkeypatch.delenv("PL_GLOBAL_SEED")
    unset = derived_seed("step", 0)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    assert derived_seed("step", 0) == unset


def test_seeded_leaves_no_trace() -> None:
    def drawn() -> list[float]:
        return [torch.rand(()).item(), torch.randn(()).item(), np.random.rand(), np.random.randn(), random.gauss(0, 1)]

    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    drawn()
    first = drawn()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    drawn()
    with seeded("a", 1):
        inside = drawn()
    assert drawn() == first
    with seeded("a", 1):
        assert drawn() == inside
    with seeded("a", 2):
        assert not {*drawn()} & {*inside}


# Several processes, and SIGKILL


def launch(runs: list[Run], processes: int = 1) -> None:
    """Trains one run after the other, each in `processes` of its own, which have to end as the run says."""
    ports = []
    for _ in runs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(str(free.getsockname()[1]))
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    started = []
    for rank in range(processes):
        of_rank = {"LOCAL_RANK": str(rank)} if processes > 1 else {}
        command = [sys.executable, __file__, json.dumps([asdict(run) for run in runs]), *ports]
        with Path(f"{runs[0].folder}_{rank}.txt").open("w") as file:
            group = subprocess.Popen(command, env={**environment, **of_rank}, stdout=file, stderr=file, start_new_session=True)
        started.append((group, Path(file.name)))
    try:
        for group, said in started:
            assert group.wait(timeout=240) == 0, said.read_text()[-3000:]
    finally:
        for group, _ in started:
            with suppress(ProcessLookupError):
                os.killpg(group.pid, signal.SIGKILL)
            group.wait()


def resumed_from_newest(dead: Run) -> Run:
    newest = max(Path(dead.folder).glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return Run(**{**asdict(dead), "folder": f"{dead.folder}_resumed", "killed_at": None, "resume": str(newest)})


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_resumed(tmp_path: Path, images: str, processes: int) -> None:
    """SIGKILL at a batch that a seed draws; with 0 and 2 workers, in the first and second epoch, with accumulation and without.

    Each run is in processes of its own. The ones that were never interrupted have no workers.
    """
    wholes = [
        Run(task, images, str(tmp_path / task), processes, accumulate=accumulate)
        for task, accumulate in (("finetuning", 1), ("ibot", 2))
    ]
    dead: list[tuple[Run, Run]] = []
    for whole, workers, epoch in product(wholes, (0, 2), (0, 1)):
        folder = f"{whole.folder}_{workers}_{epoch}"
        at = BATCHES * epoch + random.Random(f"{whole.task} {workers} {epoch} {processes}").randrange(2, BATCHES)
        dead.append((Run(**{**asdict(whole), "folder": folder, "workers": workers, "killed_at": at}), whole))
    launch([*wholes, *(run for run, _ in dead)], processes)
    resumed = [resumed_from_newest(run) for run, _ in dead]
    launch(resumed, processes)
    for run, (killed, whole) in zip(resumed, dead, strict=True):
        assert [len(lines(killed.folder, rank)) for rank in range(processes)] == [killed.killed_at] * processes
        first = lines(run.folder)[0]
        assert first["epoch"] == killed.killed_at // BATCHES
        assert 0 < first["total"] <= killed.killed_at
        check_the_same(run, whole, (first["epoch"], first["batch"]))
    if processes > 1:
        masks = [{line["mask"] for line in lines(wholes[1].folder, rank)} for rank in (0, 1)]
        assert not masks[0] & masks[1]


@pytest.mark.slow
def test_two_processes(tmp_path: Path, images: str, caplog: pytest.LogCaptureFixture) -> None:
    """They share each epoch's images, and go on together from wherever a checkpoint was written; one goes on with all."""
    runs = []
    for task, workers, accumulate in [("finetuning", 0, 2), ("segmentation", 0, 1), ("codebook", 2, 2), ("data2vec", 2, 1)]:
        folder = str(tmp_path / task)
        options = {"processes": 2, "workers": workers, "accumulate": accumulate}
        whole = Run(task, images, folder, save_everywhere=True, **options)
        runs.append((whole, (0, 0), whole))
        for name, begins in {"0_2": (0, 3 // accumulate * accumulate), "0_4": (1, 0), "1_1": (1, 2)}.items():
            resumed = Run(task, images, f"{folder}/from_{name}", resume=f"{folder}/{name}.ckpt", **options)
            runs.append((resumed, begins, whole))
    options = {"processes": 2, "seed_by_rank": True, "max_epochs": 2}
    by_rank = Run("finetuning", images, str(tmp_path / "by_rank"), save_everywhere=True, **options)
    resumed = Run("finetuning", images, str(tmp_path / "by_rank_1_1"), resume=f"{by_rank.folder}/1_1.ckpt", **options)
    runs += [(by_rank, (0, 0), by_rank), (resumed, (1, 2), by_rank)]
    launch([run for run, *_ in runs], 2)
    for resumed, begins, whole in runs:
        check_the_same(resumed, whole, begins)
    for epoch in range(EPOCHS):
        seen = [
            image
            for rank in (0, 1)
            for line in lines(tmp_path / "finetuning", rank)
            if line["epoch"] == epoch
            for image in line["images"]
        ]
        assert len(set(seen)) == len(seen) == 20
    shares = [json.loads((Path(by_rank.folder) / f"{rank}.order").read_text()) for rank in (0, 1)]
    assert sorted(index for share in shares for _, index in share) == list(range(IMAGES))
    assert "the checkpoint is of" not in (tmp_path / "finetuning_0.txt").read_text()
    folder = str(tmp_path / "data2vec")
    alone = Run("data2vec", images, f"{folder}/alone", resume=f"{folder}/1_2.ckpt")  # 4 images for one as for two
    with caplog.at_level("INFO"):
        train(alone)
    assert lines(alone.folder)[0]["batch"] == 3
    for line, first, second in zip(lines(alone.folder), *(lines(folder, rank)[8:] for rank in (0, 1)), strict=True):
        assert set(line["images"]) == {*first["images"], *second["images"]}
    assert (
        "the checkpoint is of 2 processes x 2 images x 1 accumulated, 22 images in all, seed 3, this run has 1 processes x 4 "
        "images x 1 accumulated, 22 images in all, seed 3: it goes on after 12 images of epoch 1, and masks differ from what "
        "it would have been"
    ) in caplog.text


if __name__ == "__main__":
    warnings.filterwarnings("error", message="You're resuming from a checkpoint that ended before the epoch ended")
    for each, os.environ["MASTER_PORT"] in zip(json.loads(sys.argv[1]), sys.argv[2:], strict=True):
        run = Run(**each)
        child = os.fork()  # nothing has run yet in this process, which only saves the imports
        if not child:
            train(run)
            os._exit(0)  # to end as Python does takes longer than the training
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != (0 if run.killed_at is None else -signal.SIGKILL):
            sys.exit(f"{run} ended with {status}")
