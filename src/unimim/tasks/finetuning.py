"""Fine-tuning: the whole pretrained backbone learns to classify (the paper judges encoders so, on ImageNet-1k)."""

import csv
import sys
from pathlib import Path
from typing import Any

import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

from unimim.data.batches import images_in
from unimim.errors import UserError
from unimim.shapes import RGB
from unimim.tasks.optim import check_rates, check_warmup, fused_adamw, layer_decay_groups, schedule
from unimim.tasks.supervised import Supervised
from unimim.training.faults import SkipNonFinite
from unimim.training.shards import shard
from unimim.weights.models import check_image_size, checkpoint_activations
from unimim.weights.written import naming, whole


class FineTuning(Supervised):
    """Cross-entropy on the logits of a timm classifier, with a lower learning rate for lower layers.

    The recipe's defaults here are plain; `conf/finetune` has the published ones. A subclass overrides what it wants otherwise:
    `forward`, `augment`, `training_step`, `validation_step`, `configure_optimizers`, or `configure_callbacks`, where it adds to
    `super()`'s.

    Args:
        backbone: a timm name, or a timm model with a classifier, such as
            `load_backbone(path, num_classes=10, global_pool="avg")`. Pixels are normalized by its `pretrained_cfg`.
        checkpoint: where a named backbone's weights come from: a file that `load_backbone` takes. None trains from scratch.
        checkpoint_key: the entry of that file to take, as in `load_backbone`.
        mean: of the pixels in [0, 1], where the file does not say it.
        std: likewise.
        num_classes: of a named backbone's classifier.
        model_args: further arguments of a named backbone, such as `drop_path_rate`.
        lr: peak learning rate of the head, absolute, at `recipe_batch` images a step (BEiT v2, ViT-B: 5e-4 at 1024).
        recipe_batch: the images of a step for which `lr` is meant; another batch is told, with the lr that would fit. None
            is silent.
        scale_lr: take that lr, `lr * batch / recipe_batch`; warmup_lr and min_lr follow.
        layer_decay: factor on the learning rate from each block to the one below (BEiT v2, ViT-B: 0.65).
        betas: AdamW's.
        weight_decay: AdamW's; 1-D parameters do not decay.
        warmup_epochs: epochs (or a part of one) of linear warm-up.
        warmup_lr: where it begins, absolute.
        min_lr: where the head's cosine ends.
        label_smoothing: of the cross-entropy (BEiT v2: 0.1).
        mixup: its alpha (BEiT v2: 0.8); 0 is none. With `cutmix`, one of the two is drawn for every batch.
        cutmix: its alpha (BEiT v2: 1.0); 0 is none.
        erasing: probability of random erasing, of an image (BEiT v2: 0.25).
        head_init_scale: factor on a new classifier's weights (MAE: 0.001; 1 for BEiT, whose 0.001 timm applies by itself); one
            from a file stays as it is.
        checkpointing: less memory for more time: activations are computed again in the backward pass.
        max_skipped_updates: updates whose loss or gradient is NaN or infinite change nothing; more than this many end the run.

    Raises:
        ValueError: the backbone is no timm model or has no classifier, a number is out of its range; and as `load_backbone`.
    """

    name_of_task, name_of_classifier = "fine-tuning", "classifier"

    metrics: tuple[str, ...] = ("train/loss", "val/acc1", "val/acc5")
    """The names of all that is logged."""

    def __init__(
        self,
        backbone: str | nn.Module | None = None,
        checkpoint: str | None = None,
        num_classes: int = 1000,
        model_args: dict[str, Any] | None = None,
        lr: float = 5e-4,
        recipe_batch: int | None = None,
        scale_lr: bool = False,
        layer_decay: float = 0.65,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        warmup_epochs: float = 20,
        warmup_lr: float = 0.0,
        min_lr: float = 1e-6,
        label_smoothing: float = 0.1,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        erasing: float = 0.0,
        head_init_scale: float = 1.0,
        checkpointing: bool = False,
        max_skipped_updates: int = 0,
        checkpoint_key: str | None = None,
        mean: RGB | None = None,
        std: RGB | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"] if isinstance(backbone, nn.Module) else [])
        if not 0 <= label_smoothing < 1 or (recipe_batch is not None and recipe_batch < 1):
            raise UserError(
                f"model: label_smoothing within 0 to 1, recipe_batch at least 1; got {label_smoothing}, {recipe_batch}"
            )
        check_rates(lr, weight_decay, betas, warmup_lr, min_lr)
        check_warmup(warmup_epochs)
        if (
            not 0 < layer_decay <= 1
            or not mixup >= 0
            or not cutmix >= 0
            or not 0 <= erasing <= 1
            or not 0 < head_init_scale <= 1
        ):
            raise UserError(
                f"model: layer_decay within 0 to 1, head_init_scale within 0 to 1, mixup and cutmix not below 0, erasing a "
                f"probability; got {layer_decay}, {head_init_scale}, {mixup}, {cutmix}, {erasing}"
            )
        self.guard = SkipNonFinite(max_skipped_updates)
        given = {"global_pool": "avg", **(model_args or {}), "num_classes": num_classes}
        self.backbone: Any = self.start_from(backbone, checkpoint, checkpoint_key, mean, std, model_args, given)
        self.num_classes = classes = int(self.backbone.num_classes)
        if classes < 2 or not self.backbone.global_pool:
            raise UserError(
                "fine-tuning needs a backbone with a classifier of 2 or more: make it with num_classes and global_pool"
            )
        if checkpointing:
            checkpoint_activations(self.backbone)
        self.lr, self.recipe_batch, self.scale_lr, self.layer_decay = lr, recipe_batch, scale_lr, layer_decay
        self.betas, self.weight_decay = betas, weight_decay
        self.warmup_epochs, self.warmup_lr, self.min_lr = warmup_epochs, warmup_lr, min_lr
        report = getattr(self.backbone, "load_report", None)
        head_is_new = report is None or any(name.startswith("head") for name in report.new)
        if head_init_scale != 1 and head_is_new:
            with torch.no_grad():
                for parameter in self.backbone.get_classifier().parameters():
                    parameter.mul_(head_init_scale)
        self.erasing = RandomErasing(erasing, mode="pixel", device="cpu") if erasing else None
        self.mix = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=classes) if mixup or cutmix else None
        self.loss = nn.CrossEntropyLoss(label_smoothing=0.0 if self.mix else label_smoothing)  # Mixup smooths by itself
        self.acc1 = MulticlassAccuracy(classes, average="micro")
        self.acc5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro")

    # Its steps

    def forward(self, images: Tensor) -> Tensor:
        """[b 3 H W] in [0, 1] -> logits [b classes]"""
        logits: Tensor = self.backbone(self.normalize(images))
        return logits

    def normalize(self, images: Tensor) -> Tensor:
        """As `Supervised.normalize`, [b 3 H W] -> [b 3 H W]; refuses images of another size than the backbone was built for."""
        normalized = super().normalize(images)
        check_image_size(self.backbone, images)
        return normalized

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """(images [b 3 H W] in [0, 1], labels [b]) -> the loss."""
        images, labels = self.augment(*batch)
        loss: Tensor = self.loss(self.backbone(images), labels)
        return self.logged(loss)

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalizes, then erases and mixes: labels [b] become [b classes] where images are mixed.

        Raises:
            ValueError: as `normalize`; an odd number of images is to be mixed.
        """
        images = self.normalize(images)
        if self.erasing is not None:
            self.erasing.device = images.device  # its noise is made where the images are
            images = self.erasing(images)
        if self.mix is not None:
            self.check_even(len(images))
            images, labels = self.mix(images, labels)
        return images, labels

    def check_even(self, images: int) -> None:
        """
        Raises:
            ValueError: so many images of a batch cannot be mixed in pairs.
        """
        if self.mix is not None and images % 2:
            raise UserError(
                f"a batch has {images} images, but mixup and cutmix mix pairs: make data.batch_size even, and let a loader of "
                f"your own drop its last batch (drop_last=True)"
            )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Top-1 and top-5 of (images, labels)."""
        images, labels = batch
        logits = self(images)
        self.acc1(logits, labels)
        self.acc5(logits, labels)
        self.log("val/acc1", self.acc1, prog_bar=True)
        self.log("val/acc5", self.acc5)

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> tuple[Tensor, Tensor]:
        """Images [b 3 H W] in [0, 1], or (images, labels) -> the five highest probabilities [b 5] and their labels [b 5]."""
        probabilities = self(images_in(batch)).float().softmax(1)
        top: tuple[Tensor, Tensor] = probabilities.topk(min(5, probabilities.shape[1]), dim=1)
        return top

    # Its optimization

    def configure_model(self) -> None:
        """Shards the backbone where the strategy asks for it."""
        shard(self, [self.backbone])

    def configure_optimizers(self) -> Any:
        """AdamW in groups by layer, with warm-up and cosine per step."""
        lr, warmup_lr, min_lr = (self.lr_scale * rate for rate in (self.lr, self.warmup_lr, self.min_lr))
        groups = layer_decay_groups(self.backbone, lr, self.weight_decay, self.layer_decay)
        optimizer = fused_adamw(groups, lr, self.betas)
        return schedule(optimizer, self.trainer, self.warmup_epochs, warmup_lr, min_lr)

    def check_batch_size(self, size: int) -> None:
        """Refuses an odd number of images where they are mixed."""
        if self.mix is not None and size % 2:
            raise UserError(f"data.batch_size is {size}, but mixup and cutmix mix pairs: make it even")

    def on_fit_start(self) -> None:
        """Looks at the size of the last batch, where the loader knows how many images it has."""
        loader: Any = self.trainer.train_dataloader
        counted = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
        if counted and loader.batch_size and not loader.drop_last and self.trainer.num_training_batches == len(loader):
            self.check_even(len(loader.sampler) % loader.batch_size)
        super().on_fit_start()

    # Its predictions

    def write_predictions(
        self, files: list[Path], batches: list[tuple[Tensor, Tensor]], destination: Path, unreadable: list[bool]
    ) -> int:
        """A CSV of file, and label and probability of the five likeliest classes, one readable file a row; returns the rows.

        Of fewer batches than there are files (`--trainer.limit_predict_batches`), it has the first files.

        The file is UTF-8, in which names of files that are not UTF-8 keep their bytes, as the system stores them: Python reads
        them back with `open(path, encoding="utf-8", errors="surrogateescape", newline="")`, pandas with
        `encoding_errors="surrogateescape"`.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        written = 0
        places = range(1, batches[0][0].shape[1] + 1)
        header = ["file", *(f"{what}_{place}" for place in places for what in ("label", "probability"))]
        fix, errors = "make room, or give another --output", sys.getfilesystemencodeerrors()
        with (
            naming(destination, fix),
            whole(destination) as part,
            part.open("w", newline="", encoding="utf-8", errors=errors) as opened,
        ):
            writer = csv.writer(opened)
            writer.writerow(header)
            names = self.names_of_classes()
            rows = zip(torch.cat([p for p, _ in batches]).tolist(), torch.cat([i for _, i in batches]).tolist(), strict=True)
            for file, skipped, (probabilities, labels) in zip(files, unreadable, rows, strict=False):
                if skipped:
                    continue
                pairs = zip(labels, probabilities, strict=True)
                writer.writerow([str(file), *(value for label, p in pairs for value in (names[label], f"{p:.6f}"))])
                written += 1
        return written
