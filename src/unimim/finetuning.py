"""Fine-tuning: the whole pretrained backbone learns to classify (the paper judges encoders so, on ImageNet-1k)."""

from typing import Any

import pytorch_lightning as pl
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from unimim.optim import schedule, undecayed


class FineTuning(pl.LightningModule):
    """Cross-entropy on the logits of a timm classifier, with a lower learning rate for lower layers.

    Args:
        backbone: a timm model with a classifier, such as `load_backbone(path, num_classes=10, global_pool="avg")`. Pixels
            are normalized by its `pretrained_cfg`.
        lr: peak learning rate of the head, absolute (BEiT v2, ViT-B: 5e-4 at a batch of 1024).
        layer_decay: factor on the learning rate from each block to the one below (BEiT v2, ViT-B: 0.65).
        betas, weight_decay: AdamW's.
        warmup_epochs: epochs (or a part of one) of linear warm-up from 0.
        min_lr: where the head's cosine ends.
        label_smoothing: of the cross-entropy (BEiT v2: 0.1).

    Raises:
        ValueError: the model has no classifier.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        lr: float = 5e-4,
        layer_decay: float = 0.65,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        warmup_epochs: float = 20,
        min_lr: float = 1e-6,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        classes = int(backbone.num_classes)  # type: ignore[arg-type]
        if classes < 2 or not backbone.global_pool:
            raise ValueError("fine-tuning needs a backbone with a classifier: make it with num_classes and global_pool")
        config: Any = backbone.pretrained_cfg
        self.backbone = backbone
        self.lr, self.layer_decay, self.betas, self.weight_decay = lr, layer_decay, betas, weight_decay
        self.warmup_epochs, self.min_lr = warmup_epochs, min_lr
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.acc1 = MulticlassAccuracy(classes, average="micro")
        self.acc5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro")
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """[b 3 H W] in [0, 1] -> logits [b classes]"""
        logits: Tensor = self.backbone((images - self.mean) / self.std)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss: Tensor = self.loss(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.acc1(logits, labels)
        self.acc5(logits, labels)
        self.log("val/acc1", self.acc1, prog_bar=True)
        self.log("val/acc5", self.acc5)

    def configure_optimizers(self) -> Any:
        """AdamW in groups by layer, with warm-up and cosine per step."""
        groups = param_groups_layer_decay(
            self.backbone, self.weight_decay, no_weight_decay_list=undecayed(self.backbone), layer_decay=self.layer_decay
        )
        for group in groups:  # timm stores the factor, and leaves it to its own schedulers to apply it
            group["lr"] = self.lr * group["lr_scale"]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas)
        return schedule(optimizer, self.trainer, self.warmup_epochs, min_lr=self.min_lr)
