"""Fine-tuning: the whole pretrained backbone learns to classify (the paper judges encoders so, on ImageNet-1k)."""

import csv
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_info
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from unimim.backbones import check_image_size, check_timm_model, checkpoint_activations, create_backbone
from unimim.checkpoint import agreeing_classes, describe_network, load_backbone
from unimim.faults import SkipNonFinite, guarded
from unimim.launching import check_processes, step_in_words
from unimim.optim import fitting_lr, fused_adamw, layer_decay_groups, schedule
from unimim.processor import sparing
from unimim.randomness import exact_resume
from unimim.sharding import gather, scatter, shard
from unimim.task import Task
from unimim.waiting import log_loss


class FineTuning(Task):
    """Cross-entropy on the logits of a timm classifier, with a lower learning rate for lower layers.

    The recipe's defaults here are plain; `conf/finetune` has the published ones. A subclass overrides what it wants otherwise:
    `forward`, `augment`, `training_step`, `validation_step`, `configure_optimizers`, or `configure_callbacks`, where it adds to
    `super()`'s.

    Args:
        backbone: a timm name, or a timm model with a classifier, such as
            `load_backbone(path, num_classes=10, global_pool="avg")`. Pixels are normalized by its `pretrained_cfg`.
        checkpoint: where a named backbone's weights come from: a file that `load_backbone` takes. None trains from scratch.
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

    mean: Tensor
    std: Tensor

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
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"] if isinstance(backbone, nn.Module) else [])
        if not 0 <= label_smoothing < 1 or (recipe_batch is not None and recipe_batch < 1):
            raise ValueError(
                f"model: label_smoothing within 0 to 1, recipe_batch at least 1; got {label_smoothing}, {recipe_batch}"
            )
        if (
            not lr > 0
            or not 0 < layer_decay <= 1
            or min(weight_decay, warmup_epochs, mixup, cutmix) < 0
            or not 0 <= erasing <= 1
        ):
            raise ValueError(
                f"model: lr above 0, layer_decay within 0 to 1, weight_decay, warmup_epochs, mixup and cutmix not below 0, "
                f"erasing a probability; got {lr}, {layer_decay}, {weight_decay}, {warmup_epochs}, {mixup}, {cutmix}, {erasing}"
            )
        if not 0 <= min_lr <= lr or not 0 <= warmup_lr <= lr or not 0 < head_init_scale <= 1:
            raise ValueError(
                f"model: min_lr and warmup_lr within 0 to lr, head_init_scale within 0 to 1; got {min_lr}, {warmup_lr} with lr "
                f"{lr}, {head_init_scale}"
            )
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"model.betas are at least 0 and below 1, got {list(betas)}")
        self.guard = SkipNonFinite(max_skipped_updates)
        self.checkpoint = self.pretrained_from = checkpoint
        self.backbone: Any = backbone
        if backbone is None:  # it has a default so that a checkpoint of fine-tuning can say it on the command line
            raise ValueError("model.backbone is missing: a timm name, such as vit_base_patch16_224, or a timm model")
        if isinstance(backbone, str):
            given: dict[str, Any] = {"global_pool": "avg", **(model_args or {}), "num_classes": num_classes}
            if checkpoint is None:
                self.backbone = create_backbone(backbone, given)
            else:
                self.backbone = load_backbone(checkpoint, backbone=backbone, **given)
                given = self.backbone.load_report.backbone["model_args"]  # with those it was pretrained with
            self.hparams.update({"model_args": given, "checkpoint": None})  # so that its own checkpoint needs no other file
        elif checkpoint is not None or model_args is not None:
            raise ValueError("model.checkpoint and model.model_args are for a backbone given by its name")
        check_timm_model("model.backbone", self.backbone)
        classes = int(self.backbone.num_classes)
        if classes < 2 or not self.backbone.global_pool:
            raise ValueError("fine-tuning needs a backbone with a classifier: make it with num_classes and global_pool")
        if checkpointing:
            checkpoint_activations(self.backbone)
        config = self.backbone.pretrained_cfg
        self.lr, self.recipe_batch, self.scale_lr, self.layer_decay = lr, recipe_batch, scale_lr, layer_decay
        self.lr_scale = 1.0
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
        self.classes: list[str] = []
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))

    # Its steps

    def forward(self, images: Tensor) -> Tensor:
        """[b 3 H W] in [0, 1] -> logits [b classes]"""
        logits: Tensor = self.backbone(self.normalize(images))
        return logits

    def normalize(self, images: Tensor) -> Tensor:
        """[b 3 H W] in [0, 1] -> [b 3 H W] by `mean` and `std`.

        Raises:
            ValueError: the images are not of the size that the backbone was built for.
        """
        check_image_size(self.backbone, images)
        return (images - self.mean) / self.std

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """(images [b 3 H W] in [0, 1], labels [b]) -> the loss."""
        images, labels = self.augment(*batch)
        with sparing(self):
            loss: Tensor = self.loss(self.backbone(images), labels)
        log_loss(self, loss)
        return loss

    def augment(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Normalizes, then erases and mixes: labels [b] become [b classes] where images are mixed."""
        images = self.normalize(images)
        if self.erasing is not None:
            self.erasing.device = images.device  # its noise is made where the images are
            images = self.erasing(images)
        if self.mix is not None:
            images, labels = self.mix(images, labels)
        return images, labels

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Top-1 and top-5 of (images, labels)."""
        images, labels = batch
        with sparing(self):
            logits = self(images)
        self.acc1(logits, labels)
        self.acc5(logits, labels)
        self.log("val/acc1", self.acc1, prog_bar=True)
        self.log("val/acc5", self.acc5)

    def predict_step(self, images: Tensor, batch_idx: int) -> tuple[Tensor, Tensor]:
        """[b 3 H W] in [0, 1] -> the five highest probabilities [b 5] and their labels [b 5]."""
        with sparing(self):
            probabilities = self(images).float().softmax(1)
        top: tuple[Tensor, Tensor] = probabilities.topk(min(5, probabilities.shape[1]), dim=1)
        return top

    def on_validation_epoch_start(self) -> None:
        gather(self)

    def on_validation_epoch_end(self) -> None:
        scatter(self)

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

    def configure_callbacks(self) -> list[pl.Callback]:
        """The guard against updates that are not finite, and what makes a resumed run exact.

        A subclass with callbacks of its own adds them to these: `[*super().configure_callbacks(), ...]`; else it has neither.
        """
        return [*guarded(self.trainer, self.guard), *exact_resume(self.trainer)]

    def setup(self, stage: str) -> None:
        """Takes the names of the classes from the data, and the learning rate that fits the batch.

        Raises:
            ValueError: the data has another number of classes; an odd batch, which cannot be mixed; and as `check_processes`.
        """
        check_processes(self.trainer)
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "predict" or data is None:
            return
        if getattr(data, "labelled", True) is False:
            raise ValueError(f"fine-tuning needs labels, and {type(data).__name__} gives none: set data.labelled to true")
        self.classes = list(getattr(data, "classes", self.classes))
        expected = int(self.backbone.num_classes)
        if self.classes and len(self.classes) != expected:
            raise ValueError(
                f"the data has {len(self.classes)} classes, the classifier {expected}: set model.num_classes to "
                f"{len(self.classes)}"
            )
        batch = getattr(data, "batch_size", None)
        if stage != "fit" or batch is None:
            return
        if self.mix is not None and batch % 2:
            raise ValueError(f"data.batch_size is {batch}, but mixup and cutmix mix pairs: make it even")
        total = batch * self.trainer.world_size * self.trainer.accumulate_grad_batches
        self.lr_scale = fitting_lr(self.lr, total, self.recipe_batch, self.scale_lr) / self.lr

    def on_fit_start(self) -> None:
        """Says the effective values of a step."""
        trainer: Any = self.trainer
        if batch := getattr(trainer.train_dataloader, "batch_size", None):
            rank_zero_info(step_in_words(trainer, batch, self.lr * self.lr_scale))

    def on_train_start(self) -> None:
        """Says so where nothing pretrained is fine-tuned. (Under FSDP2 the checkpoint of a resumed run is not known before.)"""
        if isinstance(self.hparams.get("backbone"), str) and self.checkpoint is None and self.trainer.ckpt_path is None:
            rank_zero_info(f"no model.checkpoint: {self.hparams['backbone']} is trained from scratch")

    # What it keeps

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what `load_backbone` needs, the names of the classes, and the last metrics; what is not finite is not saved."""
        self.guard.check_saved(self.trainer, checkpoint)
        described = describe_network(self.backbone, self.hparams, self.mean, self.std)
        if described is not None:
            checkpoint["backbone"] = described
        checkpoint["classes"] = self.classes
        checkpoint["pretrained_from"] = self.pretrained_from
        checkpoint["metrics"] = {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the names of the classes from it, and where its training began.

        Raises:
            ValueError: the data has other classes than the checkpoint.
        """
        super().on_load_checkpoint(checkpoint)
        self.classes = agreeing_classes(self.classes, list(checkpoint.get("classes", [])))
        self.pretrained_from = checkpoint.get("pretrained_from")

    def write_predictions(
        self, files: list[Path], batches: list[tuple[Tensor, Tensor]], destination: Path, unreadable: list[bool]
    ) -> int:
        """A CSV of file, and label and probability of the five likeliest classes, one readable file a row; returns the rows.

        Of fewer batches than there are files (`--trainer.limit_predict_batches`), it has the first files.

        The file is UTF-8, in which names of files that are not UTF-8 keep their bytes, as the system stores them: Python reads
        them back with `open(path, encoding="utf-8", errors="surrogateescape", newline="")`, pandas with
        `encoding_errors="surrogateescape"`.
        """
        written = 0
        places = range(1, batches[0][0].shape[1] + 1)
        header = ["file", *(f"{what}_{place}" for place in places for what in ("label", "probability"))]
        part = destination.with_name(f"{destination.name}.part")  # whoever looks sees the whole table or none
        with part.open("w", newline="", encoding="utf-8", errors=sys.getfilesystemencodeerrors()) as opened:
            writer = csv.writer(opened)
            writer.writerow(header)
            rows = zip(torch.cat([p for p, _ in batches]).tolist(), torch.cat([i for _, i in batches]).tolist(), strict=True)
            for file, skipped, (probabilities, labels) in zip(files, unreadable, rows, strict=False):
                if skipped:
                    continue
                names = [self.classes[label] if self.classes else str(label) for label in labels]
                pairs = [value for name, p in zip(names, probabilities, strict=True) for value in (name, f"{p:.6f}")]
                writer.writerow([str(file), *pairs])
                written += 1
        part.replace(destination)
        return written
