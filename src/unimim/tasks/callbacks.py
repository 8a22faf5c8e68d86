"""What a person sees of a training: pictures, k-NN accuracy of the encoder as it learns, and a progress bar."""

import os
import time
from collections import deque
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.cloud_io import get_filesystem
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.data import extract_batch_size
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from unimim.data.listing import NO_PHOTOS
from unimim.data.sampling import aside
from unimim.errors import UserError
from unimim.letters.interfaces import check_positive
from unimim.pictures.patches import sheet
from unimim.tasks.knn import gather_shards, knn
from unimim.tasks.optim import all_steps
from unimim.tasks.pretraining import MaskedImageModeling
from unimim.tasks.probing import accuracy, extract_features
from unimim.training.checkpoints import run_folder
from unimim.weights.written import naming


class PictureCallback(pl.Callback):
    """Draws `MaskedImageModeling.pictures` of the same few images while it trains, on one sheet: `pictures/epoch=E-step=S.png`.

    The sheet lies in the run's folder, beside `checkpoints`, and goes to the logger too where that is W&B or TensorBoard.
    Images are those of the data module's `pictured(count)`, where it has one (validation images), else the first of the
    first batch that is trained on. Masks are the same on every sheet. Training goes on as it would without this callback:
    what is drawn at random here is drawn aside, and blocks are not compiled anew for a batch as small as this.

    Every process computes, because a model in shards needs all of them; the first one writes. Where a folder of photos has
    runs in it, no one takes the sheets for photos: beside them is a file `.nomedia`. Under FSDP1, and with
    `trainer.fast_dev_run`, nothing is drawn.

    Args:
        images: how many.
        every_n_epochs: epochs between two sheets; the last epoch always has one.

    Attributes:
        path: of the newest sheet, on the first process.

    Raises:
        ValueError: a number below 1; what is trained is no `MaskedImageModeling`; as the data, for an unreadable image.
    """

    def __init__(self, images: int = 4, every_n_epochs: int = 10) -> None:
        check_positive("PictureCallback", images=images, every_n_epochs=every_n_epochs)
        self.images = images
        self.every_n_epochs = every_n_epochs
        self.path: str | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not isinstance(pl_module, MaskedImageModeling):
            raise UserError(f"PictureCallback draws the pretraining of MaskedImageModeling, not {type(pl_module).__name__}")
        if isinstance(trainer.strategy, FSDPStrategy):
            rank_zero_info("no pictures: FSDPStrategy keeps its shards apart outside of a step; ModelParallelStrategy does not")
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self.shown: Tensor | None = None
        if hasattr(data, "pictured"):
            with aside("pictures"):
                self.shown = data.pictured(self.images)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self.shown is None:
            assert isinstance(pl_module, MaskedImageModeling)
            pl_module.check_batch(batch)
            self.shown = batch[: self.images].clone()  # a view would keep the whole batch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if isinstance(trainer.strategy, FSDPStrategy) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.shown is None or not is_due(trainer, self.every_n_epochs):  # a resumed epoch may have no batch left
            return
        assert isinstance(pl_module, MaskedImageModeling)
        modes = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        with aside("pictures"), trainer.precision_plugin.forward_context():
            images = trainer.precision_plugin.convert_input(self.shown.to(pl_module.device))  # no hooks: they are finished
            pl_module.check_batch(images)
            with torch.compiler.set_stance("force_eager"):
                drawn = pl_module.pictures(images)
        for module, training in modes.items():
            module.training = training
        if trainer.is_global_zero:
            self.write(trainer, drawn)

    def write(self, trainer: pl.Trainer, drawn: dict[str, Tensor]) -> None:
        """Puts all on one sheet: a file, and an image of the loggers that show images.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        picture = sheet(drawn)
        folder = os.path.join(run_folder(trainer), "pictures")  # noqa: PTH118
        self.path = f"{folder}/epoch={trainer.current_epoch}-step={trainer.global_step}.png"
        files = get_filesystem(folder)
        fix = "make room, set another folder (save_dir of trainer.logger), or give --pictures false; the checkpoints are kept"
        with naming(self.path, fix):
            files.makedirs(folder, exist_ok=True)
            files.touch(f"{folder}/{NO_PHOTOS}")
            with files.open(self.path, "wb") as file:
                picture.save(file, "PNG")
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image("pictures", [picture], trainer.global_step, caption=["; ".join(drawn)])
                if (copies := Path(logger.save_dir or ".", "wandb")).is_dir():
                    (copies / NO_PHOTOS).touch()
            elif isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("pictures", pil_to_tensor(picture), trainer.global_step)


class KNNCallback(pl.Callback):
    """Logs `val/knn`, the k-NN accuracy of the frozen encoder on labelled images, while it is pretrained.

    The labelled images come from the data module's `labelled_dataloader("train")` and `labelled_dataloader("val")`. They
    are seen by no gradient, and no random number is drawn: training goes on as it would without this callback. Several
    processes share the images, and get the accuracy that one would.

    Args:
        every_n_epochs: epochs between two measurements; the last epoch is always measured.
        k: neighbours that vote.
        temperature: of their votes, see `unimim.tasks.knn.knn`.

    Raises:
        ValueError: a number below 1; the data module has no labelled images, or fewer than k.
    """

    metrics = ("val/knn",)
    """The names of all that is logged."""

    def __init__(self, every_n_epochs: int = 10, k: int = 20, temperature: float = 0.07) -> None:
        check_positive("KNNCallback", every_n_epochs=every_n_epochs, k=k)
        self.every_n_epochs = every_n_epochs
        self.k = k
        self.temperature = temperature

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "labelled_dataloader"):
            raise UserError(f"KNNCallback needs a data module with labelled_dataloader(split), got {type(data).__name__}")
        self.loaders: list[Any] = [own_part(data.labelled_dataloader(split), trainer) for split in ("train", "val")]
        labelled = len(self.loaders[0].dataset)
        if labelled < self.k:
            raise UserError(f"KNNCallback asks {self.k} neighbours, but only {labelled} images have labels")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MaskedImageModeling)
        if not is_due(trainer, self.every_n_epochs):
            return
        backbone = pl_module.student.backbone
        (bank, bank_labels), (features, labels) = (
            [gather_shards(part, len(loader.dataset)) for part in extract_features(backbone, loader)] for loader in self.loaders
        )
        predicted = knn(features, bank, bank_labels, self.k, self.temperature)
        pl_module.log("val/knn", accuracy(predicted, labels), prog_bar=True, sync_dist=True)


def is_due(trainer: pl.Trainer, every_n_epochs: int) -> bool:
    """Whether the epoch that ends is one of each n, or the last."""
    epoch = trainer.current_epoch + 1
    last = trainer.should_stop or epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps
    return last or epoch % every_n_epochs == 0


class TrainingBar(TQDMProgressBar):
    """Lightning's progress bar, with the time that is left of the whole training, and the images a second of all processes.

    In a terminal of 80 columns both and the loss have room, which is why Lightning's own rate and time are left out.

    Images a second are those of the last batches, with the wait for data and without validations. The time left is that of
    the updates still to come, each taking what those of this process took on average, with all that was between them. The
    first batch, which starts everything, counts in neither.

    Args:
        refresh_rate: batches between two looks; 0 shows nothing.
        batches: how many are the last ones.
    """

    def __init__(self, refresh_rate: int = 1, batches: int = 50) -> None:
        super().__init__(refresh_rate)
        self.batches: deque[tuple[int, float]] = deque(maxlen=batches)
        self.steps: float = float("inf")
        self.first: tuple[int, float] | None = None
        self.since = 0.0

    def init_train_tqdm(self) -> Any:
        bar = super().init_train_tqdm()
        bar.bar_format = "{desc}|{bar}| {n_fmt}/{total_fmt}{postfix}"
        return bar

    def on_train_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_start(trainer, *args)
        self.steps = all_steps(trainer)
        self.first = None
        self.batches.clear()

    def on_train_epoch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.since = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self.since = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first = trainer.global_step, now
        else:
            self.batches.append((extract_batch_size(batch) * trainer.world_size, now - self.since))
        self.since = now
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What stands behind the bar: `left` (HOURS:MINUTES:SECONDS), `images/s`, and what is logged for it."""
        items: dict[str, Any] = {}
        if self.first is not None and trainer.global_step > self.first[0] and self.steps != float("inf"):
            a_step = (time.monotonic() - self.first[1]) / (trainer.global_step - self.first[0])
            items["left"] = tqdm.format_interval(round(a_step * (self.steps - trainer.global_step)))
        if self.batches:
            images, seconds = map(sum, zip(*self.batches, strict=True))
            items["images/s"] = f"{images / seconds:.0f}"
        items |= super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        return items


def own_part(loader: Any, trainer: pl.Trainer) -> DataLoader[Any]:
    """A loader of this process's part of the images, as `gather_shards` puts them together."""
    if trainer.world_size == 1:
        return loader
    sampler: Any = DistributedSampler(loader.dataset, trainer.world_size, trainer.global_rank, shuffle=False)
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        sampler=sampler,
        num_workers=loader.num_workers,
        timeout=loader.timeout,
        generator=torch.Generator(),
    )
