"""What happens beside training: k-NN accuracy of the encoder as it learns."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, DistributedSampler

from unimim.pretraining import MaskedImageModeling
from unimim.probing import accuracy, extract_features, gather_shards, knn


class KNNCallback(pl.Callback):
    """Logs `val/knn`, the k-NN accuracy of the frozen encoder on labelled images, while it is pretrained.

    The labelled images come from the data module's `labelled_dataloader("train")` and `labelled_dataloader("val")`. They
    are seen by no gradient, and no random number is drawn: training goes on as it would without this callback. Several
    processes share the images, and get the accuracy that one would.

    Args:
        every_n_epochs: epochs between two measurements; the last epoch is always measured.
        k, temperature: of the vote, see `unimim.probing.knn`.

    Raises:
        ValueError: the data module has no labelled images, or fewer than k.
    """

    def __init__(self, every_n_epochs: int = 10, k: int = 20, temperature: float = 0.07) -> None:
        self.every_n_epochs = every_n_epochs
        self.k = k
        self.temperature = temperature

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "labelled_dataloader"):
            raise ValueError(f"KNNCallback needs a data module with labelled_dataloader(split), got {type(data).__name__}")
        self.loaders: list[Any] = [shard(data.labelled_dataloader(split), trainer) for split in ("train", "val")]
        labelled = len(self.loaders[0].dataset)
        if labelled < self.k:
            raise ValueError(f"KNNCallback asks {self.k} neighbours, but only {labelled} images have labels")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MaskedImageModeling)
        epoch = trainer.current_epoch + 1
        last = trainer.should_stop or epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if epoch % self.every_n_epochs and not last:
            return
        backbone = pl_module.student.backbone
        (bank, bank_labels), (features, labels) = (
            [gather_shards(part, len(loader.dataset)) for part in extract_features(backbone, loader)] for loader in self.loaders
        )
        predicted = knn(features, bank, bank_labels, self.k, self.temperature)
        pl_module.log("val/knn", accuracy(predicted, labels), prog_bar=True, sync_dist=True)


def shard(loader: Any, trainer: pl.Trainer) -> DataLoader[Any]:
    """A loader of this process's part of the images, as `gather_shards` puts them together."""
    if trainer.world_size == 1:
        return loader
    sampler: Any = DistributedSampler(loader.dataset, trainer.world_size, trainer.global_rank, shuffle=False)
    workers = loader.num_workers
    return DataLoader(
        loader.dataset, batch_size=loader.batch_size, sampler=sampler, num_workers=workers, generator=torch.Generator()
    )
