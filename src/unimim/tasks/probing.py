"""What a frozen encoder knows: features of its patch tokens, and linear and attentive probes on them."""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any, Literal

import torch
from einops import rearrange, reduce
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_only
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from unimim.data.batches import check_classes, check_images, check_labelled, check_pixels
from unimim.errors import NotFiniteError, UserError
from unimim.letters.interfaces import Frozen, check_positive
from unimim.shapes import RGB
from unimim.tasks.optim import check_rates, check_warmup, parameter_groups, schedule
from unimim.tasks.task import Task
from unimim.training.cpu import faster_on_cpu
from unimim.training.waiting import may_wait
from unimim.weights.checkpoint import load_backbone
from unimim.weights.models import check_image_size, check_timm_model, uncompiled

Feature = Literal["mean", "cls"]
"""One vector an image: the mean of the patch tokens, or the CLS token."""


@torch.no_grad()
def extract_features(
    backbone: Any, batches: Iterable[tuple[Tensor, Tensor]], feature: Feature = "mean"
) -> tuple[Tensor, Tensor]:
    """Features [n d] and labels [n] of all batches of (images [b 3 H W] in [0, 1], labels [b]), in eval mode.

    Pixels are normalized by the `mean` and `std` of `backbone.pretrained_cfg`, on the backbone's device. A feature comes
    from the tokens that end `forward_features`: behind the final norm, if the backbone was made with `global_pool=''`.

    The first batch is looked at as a training's is.

    In several processes each has its share of the images; `unimim.tasks.knn.gather_shards` puts features and labels together.

    Raises:
        ValueError: the first batch is not as `check_pixels` wants it, float32 or as the backbone's weights; as `pool`.
    """
    training = backbone.training
    device, dtype = next((parameter.device, parameter.dtype) for parameter in backbone.parameters())
    mean, std = (torch.tensor(backbone.pretrained_cfg[name], device=device).view(3, 1, 1) for name in ("mean", "std"))
    backbone.eval()
    features, labels = [], []
    for number, (images, batch_labels) in enumerate(batches):
        kind = dtype if images.dtype == dtype else torch.float32
        (check_images if number else check_pixels)(images, kind)
        check_image_size(backbone, images)
        with faster_on_cpu(backbone):
            tokens = backbone.forward_features(((images.to(device) - mean) / std).to(dtype))
        features.append(pool(backbone, tokens, feature).float())
        labels.append(batch_labels.to(device))
    backbone.train(training)
    return torch.cat(features), torch.cat(labels)


def patch_tokens(backbone: Any, tokens: Tensor) -> Tensor:
    """What `forward_features` of a timm model gives, [b prefix+n d] or [b h w d] -> [b n d], without CLS and registers.

    Raises:
        ValueError: the model gives no tokens, but a map of channels first.
    """
    if tokens.shape[-1] != backbone.num_features or tokens.ndim not in (3, 4):
        raise UserError(
            f"{type(backbone).__name__} gives no tokens of {backbone.num_features} channels, but {tuple(tokens.shape)}: probes "
            f"take a ViT, BEiT, EVA or Swin"
        )
    return rearrange(tokens, "b h w d -> b (h w) d") if tokens.ndim == 4 else tokens[:, backbone.num_prefix_tokens :]


def pool(backbone: Any, tokens: Tensor, feature: Feature) -> Tensor:
    """Tokens of a timm model, [b prefix+n d] or [b h w d] -> [b d].

    Raises:
        ValueError: as `patch_tokens` and `check_feature`.
    """
    check_feature(backbone, feature)
    patches = patch_tokens(backbone, tokens)
    return tokens[:, 0] if feature == "cls" else reduce(patches, "b n d -> b d", "mean")


def check_feature(backbone: Any, feature: Feature) -> None:
    """
    Raises:
        ValueError: the CLS token is asked of a model that has none, or the feature is of another name.
    """
    known = ["mean"] if getattr(backbone, "cls_token", None) is None else ["mean", "cls"]
    if feature not in known:
        raise UserError(f"feature is {feature!r}, but this {type(backbone).__name__} has {' and '.join(known)} only")


def linear_probe(features: Tensor, labels: Tensor, test_features: Tensor, penalty: float = 1e-3, steps: int = 200) -> Tensor:
    """Labels of test features [n d] by multinomial logistic regression on features [N d] with labels [N].

    Each channel is standardized by the training features; the cross-entropy, with `penalty / 2` times the squared weights,
    is minimized by L-BFGS from zero, so the result has no seed.
    """
    std, mean = torch.std_mean(features, dim=0)
    standardized, test_standardized = ((x - mean) / (std + 1e-6) for x in (features, test_features))
    linear = nn.Linear(features.shape[1], int(labels.max()) + 1, device=features.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(standardized), labels) + penalty / 2 * linear.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    predicted: Tensor = linear(test_standardized).argmax(1)
    return predicted


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """The share of predictions [n] that equal the labels [n]."""
    return float((predicted == labels).float().mean())


def loaded(
    backbone: str | nn.Module,
    checkpoint: str | None,
    checkpoint_key: str | None,
    mean: RGB | None,
    std: RGB | None,
    model_args: dict[str, Any] | None,
) -> Any:
    """A backbone by the name of its file, or of timm's weights; by the name of its architecture and a file; or as it is.

    Raises:
        ValueError: it is no timm model, and as `load_backbone`; what belongs to a file is given beside a model.
    """
    if isinstance(backbone, str):
        source, name = (backbone, None) if checkpoint is None else (checkpoint, backbone)
        return load_backbone(source, name, True, checkpoint_key, mean, std, **(model_args or {}))
    check_timm_model("model.backbone", backbone)
    if any(value is not None for value in (checkpoint, checkpoint_key, mean, std, model_args)):
        raise UserError("model.checkpoint, checkpoint_key, mean, std and model_args are for a backbone given by its name")
    return uncompiled(backbone)


class Probe(Task, ABC):
    """A frozen backbone and, for each learning rate, a head that learns to classify its tokens.

    A batch passes the backbone once, and then all heads. They start from the same weights, each has its own rate and its
    own gradient clipping, and no parameter is shared: what a head learns does not depend on the other rates.
    The sweep over rates is DINOv2's protocol (Oquab et al., 2023). Rates rise linearly over `warmup_epochs` and then follow a
    cosine to 0, per step.

    The backbone stays in eval mode and gets no gradient. It is in no checkpoint, so the same has to be given to load one; a
    checkpoint knows its backbone by a digest of the weights.

    Logs `train/loss` (the lowest of the heads), `val/acc1` (the highest) and `val/best_lr` (its rate), and for each rate
    `train/loss_lr_RATE` and `val/acc1_lr_RATE`. When training ends, the accuracies are printed as a table.

    Args:
        head: from what `inputs` gives, to logits [b classes]; each rate gets a copy.
        betas: of an optimizer that has some; checked here.

    Raises:
        ValueError: no rate, one that is not above 0, or one given twice; fewer than two classes; a number out of its range.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        num_classes: int,
        lrs: tuple[float, ...],
        weight_decay: float,
        warmup_epochs: float,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__()
        if not lrs or not all(lr > 0 for lr in lrs) or len({f"{lr:g}" for lr in lrs}) < len(lrs):
            raise UserError(f"model.lrs takes one or more different rates above 0, got {list(lrs)}")
        if num_classes < 2:
            raise UserError(f"model.num_classes has to be 2 or more, got {num_classes}")
        check_rates(max(lrs), weight_decay, betas)
        check_warmup(warmup_epochs)
        config: Any = backbone.pretrained_cfg
        self.backbone = Frozen(backbone)
        self.num_classes = num_classes
        self.lrs = tuple(lrs)
        self.weight_decay, self.warmup_epochs = weight_decay, warmup_epochs
        self.accuracies: list[float] = []
        self.heads = nn.ModuleList(copy.deepcopy(head) for _ in lrs)
        self.acc1: Any = nn.ModuleList(MulticlassAccuracy(num_classes, average="micro", validate_args=False) for _ in lrs)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).view(3, 1, 1), persistent=False)

    @property
    def metrics(self) -> list[str]:
        """The names of all that is logged."""
        of_rates = [f"{what}_lr_{lr:g}" for what in ("train/loss", "val/acc1") for lr in self.lrs]
        return ["train/loss", "val/acc1", "val/best_lr", *of_rates]

    def check_batch(self, batch: Any) -> None:
        """Looks at the form of the first batch; a subclass whose batches are of another form overrides it.

        Raises:
            ValueError: it is not (images, labels), or the labels are of no class.
        """
        check_labelled(batch, self.num_classes, axes=1, ignored=-100, predicting=self.trainer.predicting)

    def setup(self, stage: str) -> None:
        """
        Raises:
            ValueError: the data has no labels, or another number of classes; several rates in fp16; a strategy that shards;
                and as `Task.setup`.
        """
        if self.trainer.precision == "16-mixed" and len(self.lrs) > 1:
            raise UserError(
                f"trainer.precision {self.trainer.precision} skips a step for all rates when one overflows, so none would be "
                f"independent of the others: use bf16-mixed or 32-true, or one rate"
            )
        if isinstance(self.trainer.strategy, (FSDPStrategy, ModelParallelStrategy)):
            raise UserError(
                f"trainer.strategy: of a probe the backbone learns nothing, so there is nothing to shard: got "
                f"{type(self.trainer.strategy).__name__}, set it to ddp (conf/trainer/ddp.yaml in place of fsdp2.yaml)"
            )
        super().setup(stage)
        check_classes(getattr(self.trainer, "datamodule", None), self.num_classes, "a probe", "probe")

    @abstractmethod
    def inputs(self, tokens: Tensor) -> Tensor:
        """What all heads see of the backbone's tokens."""

    @abstractmethod
    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Over the heads' parameters, in groups that have their lr and weight decay."""

    def forward(self, images: Tensor) -> Tensor:
        """[b 3 H W] in [0, 1] -> logits of all heads [rates b classes]"""
        check_images(images)
        check_image_size(self.backbone.network, images)
        with torch.no_grad():
            tokens = self.backbone.network.forward_features((images - self.mean) / self.std)
        inputs = self.inputs(tokens)
        return torch.stack([head(inputs) for head in self.heads])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        losses = torch.stack([F.cross_entropy(logits, labels) for logits in self(images)])
        self.log_dict({f"train/loss_lr_{lr:g}": loss for lr, loss in zip(self.lrs, losses.detach(), strict=True)})
        self.log("train/loss", losses.detach().nan_to_num(nan=torch.inf).min(), prog_bar=True)
        return losses.sum()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """
        Raises:
            FloatingPointError: no rate has a loss that is finite, as of an image that is not.
        """
        loss = self.trainer.callback_metrics.get("train/loss")
        if may_wait(self.trainer) and loss is not None and not loss.isfinite():
            raise NotFiniteError(
                f"the loss of every rate is NaN or infinite at step {self.trainer.global_step}: see that the pixels and the "
                f"backbone's weights are finite, or lower model.lrs; the last checkpoint is kept"
            )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        for metric, logits in zip(self.acc1, self(images), strict=True):
            metric.update(logits.argmax(1), labels)

    def on_validation_epoch_end(self) -> None:
        self.accuracies = [float(metric.compute()) for metric in self.acc1]  # of all processes
        best = self.accuracies.index(max(self.accuracies))
        for lr, metric, measured in zip(self.lrs, self.acc1, self.accuracies, strict=True):
            metric.reset()
            self.log(f"val/acc1_lr_{lr:g}", measured, sync_dist=True)
        self.log("val/acc1", self.accuracies[best], prog_bar=True, sync_dist=True)
        self.log("val/best_lr", self.lrs[best], sync_dist=True)

    def on_fit_end(self) -> None:
        if self.accuracies:
            rank_zero_only(print)(self.summary(), flush=True)

    def summary(self) -> str:
        """A line for each rate: its accuracy in the last validation, and which is the best."""
        best = self.accuracies.index(max(self.accuracies))
        rows = [
            f"{lr:>10g}  {measured:8.4f}" + ("  best" if i == best else "")
            for i, (lr, measured) in enumerate(zip(self.lrs, self.accuracies, strict=True))
        ]
        return "\n".join([f"{'lr':>10}  val/acc1", *rows])

    def configure_optimizers(self) -> Any:
        """One optimizer, with a group (or two, when some parameters do not decay) for each rate."""
        groups = []
        for lr, head in zip(self.lrs, self.heads, strict=True):
            for group in parameter_groups([head], self.weight_decay):
                kind = "" if group["weight_decay"] == self.weight_decay else "_no_decay"
                groups.append({**group, "lr": lr, "name": f"lr_{lr:g}{kind}"})
        return schedule(self.optimizer(groups), self.trainer, self.warmup_epochs)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """The Trainer's clipping, of each head by itself: a norm over all would let one rate slow the others."""
        if not gradient_clip_val:
            return
        for head in self.heads:
            if gradient_clip_algorithm == "value":
                nn.utils.clip_grad_value_(head.parameters(), gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(head.parameters(), gradient_clip_val)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the frozen weights, which tells one backbone from another."""
        sha = hashlib.sha256()
        for name, weight in sorted(self.backbone.network.state_dict().items()):
            sha.update(name.encode() + weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what tells this probe from others."""
        checkpoint["probe"] = {"kind": type(self).__name__, "lrs": list(self.lrs), "num_classes": self.num_classes}
        checkpoint["probe_backbone"] = self.digest

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """
        Raises:
            ValueError: the checkpoint is of no probe, of one with other heads, or on another backbone; and as `check_resumed`.
        """
        ours: dict[str, Any] = {}
        self.on_save_checkpoint(ours)
        if "probe" not in checkpoint:
            raise UserError("the checkpoint is not one of a probe (one of pretraining is given as --model.backbone)")
        if differing := [key for key, value in ours["probe"].items() if checkpoint["probe"].get(key) != value]:
            theirs = ", ".join(f"{key} {checkpoint['probe'].get(key)}" for key in differing)
            mine = ", ".join(f"{key} {ours['probe'][key]}" for key in differing)
            raise UserError(f"the checkpoint is of a probe with {theirs}, this one has {mine}: give those of the checkpoint")
        if checkpoint["probe_backbone"] != self.digest:
            raise UserError("the checkpoint's probe was trained on another backbone: give the same one as model.backbone")
        super().on_load_checkpoint(checkpoint)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Probe":
        self.backbone.network._apply(fn)
        return super()._apply(fn, recurse)


class LinearProbe(Probe):
    """One linear layer on one feature an image, which is normalized by a BatchNorm without affine (MAE, appendix A.1).

    Weights start from a normal of std 0.01, biases from 0; there is no weight decay, as there. SGD with momentum stands for
    MAE's LARS, which is for batches of 16,384; DINO and DINOv2 use it too.

    Args:
        backbone: what `load_backbone` takes (a checkpoint or a timm name), or a timm model; make a ViT, BEiT or EVA with
            `global_pool=''`, so that its tokens end in the final norm. Pixels are normalized by its `pretrained_cfg`.
        num_classes: of the labels.
        lrs: peak learning rates, absolute. DINOv2 tries 13, from 1e-5 to 0.1 for every 256 images of a batch.
        feature: the mean of the patch tokens, or the CLS token.
        momentum: SGD's.
        weight_decay: SGD's (MAE: 0).
        warmup_epochs: epochs (or a part of one) of linear warm-up from 0 (MAE: 10 of 90; DINO: none).
        checkpoint: a file that does not say which backbone it holds; `backbone` is its timm name then.
        checkpoint_key: the entry of that file to take, as in `load_backbone`.
        mean: of the pixels in [0, 1], where the file does not say it.
        std: likewise.
        model_args: further arguments of the timm model.

    Raises:
        ValueError: as `Probe`, or the CLS token of a backbone that has none.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        feature: Feature = "mean",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_epochs: float = 10,
        checkpoint: str | None = None,
        checkpoint_key: str | None = None,
        mean: RGB | None = None,
        std: RGB | None = None,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise UserError(f"model.momentum is at least 0 and below 1, got {momentum}")
        encoder = loaded(backbone, checkpoint, checkpoint_key, mean, std, model_args)
        check_feature(encoder, feature)
        dim: Any = encoder.num_features
        linear = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        super().__init__(encoder, linear, num_classes, lrs, weight_decay, warmup_epochs)
        self.save_hyperparameters(ignore=["backbone", "checkpoint"])
        self.feature: Feature = feature
        self.momentum = momentum
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)

    def inputs(self, tokens: Tensor) -> Tensor:
        """[b prefix+n d] or [b h w d] -> normalized features [b d]"""
        normalized: Tensor = self.norm(pool(self.backbone.network, tokens, self.feature))
        return normalized

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lrs[0], momentum=self.momentum)


class AttentiveProbe(Probe):
    """A learned query that attends to the patch tokens, an MLP and a linear layer (V-JEPA, Bardes et al., 2024; also AIM's).

    The pooling is timm's `AttentionPoolLatent`: one query, cross-attention with several heads, a residual MLP.

    Args:
        backbone: what `load_backbone` takes (a checkpoint or a timm name), or a timm model; make a ViT, BEiT or EVA with
            `global_pool=''`, so that its tokens end in the final norm. Pixels are normalized by its `pretrained_cfg`.
        num_classes: of the labels.
        lrs: peak learning rates, absolute (V-JEPA on ImageNet: 1e-3 at a batch of 1024, 20 epochs).
        num_heads: of the attention (V-JEPA: 12); a divisor of the backbone's width.
        betas: AdamW's.
        weight_decay: AdamW's (V-JEPA: 0.001); 1-D parameters do not decay.
        warmup_epochs: epochs (or a part of one) of linear warm-up from 0 (V-JEPA: none).
        checkpoint: a file that does not say which backbone it holds; `backbone` is its timm name then.
        checkpoint_key: the entry of that file to take, as in `load_backbone`.
        mean: of the pixels in [0, 1], where the file does not say it.
        std: likewise.
        model_args: further arguments of the timm model.

    Raises:
        ValueError: as `Probe`, or a width that the heads do not divide.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        num_classes: int,
        lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3),
        num_heads: int = 12,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 1e-3,
        warmup_epochs: float = 0,
        checkpoint: str | None = None,
        checkpoint_key: str | None = None,
        mean: RGB | None = None,
        std: RGB | None = None,
        model_args: dict[str, Any] | None = None,
    ) -> None:
        encoder = loaded(backbone, checkpoint, checkpoint_key, mean, std, model_args)
        dim: Any = encoder.num_features
        check_positive("model", num_heads=num_heads)
        if dim % num_heads:
            raise UserError(f"model.num_heads {num_heads} does not divide the backbone's {dim} channels")
        pooling = AttentionPoolLatent(dim, num_heads=num_heads, norm_layer=nn.LayerNorm)
        head = nn.Sequential(pooling, nn.Linear(dim, num_classes))
        super().__init__(encoder, head, num_classes, lrs, weight_decay, warmup_epochs, betas)
        self.save_hyperparameters(ignore=["backbone", "checkpoint"])
        self.betas = betas

    def inputs(self, tokens: Tensor) -> Tensor:
        """[b prefix+n d] or [b h w d] -> [b n d]"""
        return patch_tokens(self.backbone.network, tokens)

    def optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=self.lrs[0], betas=self.betas)
