"""Semantic segmentation: UperNet on a pretrained backbone (the paper judges encoders so, on ADE20K)."""

import copy
import math
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_warn
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torchmetrics.classification import MulticlassConfusionMatrix

from unimim.data.batches import images_in
from unimim.errors import UserError
from unimim.lightning import layer_sync, leave_out_layer_sync
from unimim.pictures.labels import label_picture, overlay
from unimim.printing import printable
from unimim.shapes import IGNORED, RGB, Grid
from unimim.tasks.optim import check_rates, fused_adamw, layer_decay_groups, optimizer_steps, parameter_groups, warmup_poly
from unimim.tasks.supervised import Supervised
from unimim.tasks.upernet import FCNHead, FeaturePyramid, UperNetHead, enlarged
from unimim.training.faults import SkipNonFinite
from unimim.training.shards import shard
from unimim.weights.fitting import by
from unimim.weights.models import timm_model
from unimim.weights.written import naming, whole

AUXILIARY_CHANNELS = 256
AUXILIARY_LEVEL = 2
KEPT_SIZES = 2
"""Of whole images, for which a resized backbone is kept."""


class UperNetSegmentation(Supervised):
    """Cross-entropy on every pixel's logits of UperNet, with a lower learning rate for lower layers of the backbone.

    The recipe's defaults are BEiT v2's for a ViT-B on ADE20K. In a validation and on a photo, a backbone that was built for one
    size sees windows of that size ("slide"), or is resized to the image ("whole").

    Args:
        backbone: a timm name, or a timm model such as `load_backbone(path, img_size=512)`, from which the pyramid takes what
            it does not use. Pixels are normalized by its `pretrained_cfg`.
        checkpoint: where a named backbone's weights come from: a file that `load_backbone` takes. None trains from scratch.
        checkpoint_key: the entry of that file to take, as in `load_backbone`.
        mean: of the pixels in [0, 1], where the file does not say it.
        std: likewise.
        num_classes: of the labels (ADE20K: 150).
        model_args: further arguments of a named backbone, such as `img_size` (the crops' size) and `drop_path_rate`.
        blocks: the four blocks of a ViT whose features are used, from 0; None takes `FeaturePyramid`'s.
        checkpointing: less memory for more time: activations are computed again in the backward pass.
        channels: width of the head (BEiT v2: 768 for ViT-B, 1024 for ViT-L; Swin: 512).
        auxiliary_weight: of the loss of an FCN head of 256 channels on the third level; 0 is none.
        dropout: of both heads' last maps.
        lr: peak learning rate of the heads, absolute, at `recipe_batch` images a step (BEiT v2, ViT-B: 5e-5 at 16).
        recipe_batch: the images of a step for which `lr` is meant; another batch is told, with the lr that would fit. None
            is silent.
        scale_lr: take that lr: `lr * batch / recipe_batch`.
        layer_decay: factor on the learning rate from each block to the one below (BEiT v2, ViT-B: 0.75). The pyramid's own
            layers and the heads learn at the full rate.
        betas: AdamW's.
        weight_decay: AdamW's; 1-D parameters do not decay.
        warmup_steps: steps of linear warm-up.
        warmup_ratio: where it begins, as a part of the rate.
        power: of the poly schedule, which ends in 0.
        inference: "slide" averages the logits of windows; "whole" takes the image at once, with a backbone that accepts its
            size: Swin with `strict_img_size: false`, ViT, BEiT and EVA (whose positions are resized), ConvNeXt, ResNet.
        crop_size: side of a window in pixels, or (H, W); None is the size that the backbone was built for. A user's own
            backbone of a fixed size that does not tell it, such as a Hiera, has this one.
        stride: from one window to the next in pixels; None is two thirds of the window, rounded down (341 of 512).
        scales: each image is seen at these scales of the size that the data has fitted it to, and the probabilities are
            averaged at that size. (mmsegmentation, whose scales are 0.5 to 1.75, resizes the original image to each, and
            averages at the original's size.)
        flip: and mirrored.
        max_skipped_updates: updates whose loss or gradient is NaN or infinite change nothing; more than this many end the run.

    Attributes:
        classes: names of the classes in the order of their labels, as the data gives them.
        iou: [classes], of the last validation; NaN for a class that is neither in its labels nor predicted.

    Raises:
        ValueError: the backbone is no timm model, gives no four levels, was built for another size than `crop_size`, a number
            is out of its range; and as `load_backbone`.
    """

    name_of_task, name_of_classifier = "segmentation", "head"
    where_backbone, label_axes, ignored_label = "pyramid.backbone", 3, IGNORED

    def __init__(
        self,
        backbone: str | nn.Module | None = None,
        checkpoint: str | None = None,
        num_classes: int = 150,
        model_args: dict[str, Any] | None = None,
        blocks: list[int] | None = None,
        checkpointing: bool = False,
        channels: int = 768,
        auxiliary_weight: float = 0.4,
        dropout: float = 0.1,
        lr: float = 5e-5,
        recipe_batch: int | None = None,
        scale_lr: bool = False,
        layer_decay: float = 0.75,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.05,
        warmup_steps: int = 1500,
        warmup_ratio: float = 1e-6,
        power: float = 1.0,
        inference: Literal["slide", "whole"] = "slide",
        crop_size: int | Grid | None = None,
        stride: int | Grid | None = None,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
        max_skipped_updates: int = 0,
        checkpoint_key: str | None = None,
        mean: RGB | None = None,
        std: RGB | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"] if isinstance(backbone, nn.Module) else [])
        if num_classes < 2 or num_classes > IGNORED or channels < 1 or (recipe_batch is not None and recipe_batch < 1):
            raise UserError(
                f"model: num_classes within 2 to {IGNORED} ({IGNORED} is ignored), channels and recipe_batch at least 1; got "
                f"{num_classes}, {channels}, {recipe_batch}"
            )
        if inference not in ("slide", "whole"):
            raise UserError(f"model.inference is slide or whole, got {inference!r}")
        check_rates(lr, weight_decay, betas)
        if not 0 < layer_decay <= 1 or not 0 <= auxiliary_weight < math.inf or not 0 <= dropout < 1:
            raise UserError(
                f"model: layer_decay within 0 to 1, auxiliary_weight not below 0, dropout within 0 to 1; got {layer_decay}, "
                f"{auxiliary_weight}, {dropout}"
            )
        if warmup_steps < 0 or not 0 <= warmup_ratio <= 1 or not power > 0:
            raise UserError(
                f"model: warmup_steps not below 0, warmup_ratio within 0 to 1, power above 0; got {warmup_steps}, "
                f"{warmup_ratio}, {power}"
            )
        if not scales or min(scales) <= 0:
            raise UserError(f"model.scales are one or more factors above 0, got {list(scales)}")
        self.guard = SkipNonFinite(max_skipped_updates)
        given = {**(model_args or {}), "num_classes": 0, "global_pool": ""}
        network = self.start_from(backbone, checkpoint, checkpoint_key, mean, std, model_args, given)
        told = self.hparams["model_args"].get("img_size") if isinstance(backbone, str) else crop_size
        self.pyramid = FeaturePyramid(network, blocks, checkpointing)
        self.head = UperNetHead(self.pyramid.channels, channels, num_classes, dropout)
        self.auxiliary_head = (
            FCNHead(self.pyramid.channels[AUXILIARY_LEVEL], AUXILIARY_CHANNELS, num_classes, dropout)
            if auxiliary_weight
            else None
        )
        self.num_classes, self.auxiliary_weight = num_classes, auxiliary_weight
        self.lr, self.recipe_batch, self.scale_lr, self.layer_decay = lr, recipe_batch, scale_lr, layer_decay
        self.betas, self.weight_decay = betas, weight_decay
        self.warmup_steps, self.warmup_ratio, self.power = warmup_steps, warmup_ratio, power
        self.inference, self.scales, self.flip = inference, tuple(scales), flip
        self.built = built_size(network, told)
        self.crop_size = window_size(network, crop_size, self.built)
        self.stride = pair(stride) if stride is not None else (self.crop_size[0] * 2 // 3, self.crop_size[1] * 2 // 3)
        if any(not 0 < step <= side for step, side in zip(self.stride, self.crop_size, strict=True)):
            raise UserError(f"model.stride is within 1 to crop_size {by(self.crop_size)}, got {by(self.stride)}")
        self.confusion = MulticlassConfusionMatrix(num_classes, ignore_index=IGNORED, validate_args=False)
        self.sides: tuple[int, int] | None = None
        self.iou = torch.full((num_classes,), math.nan)
        self.resized: dict[Grid, tuple[FeaturePyramid, dict[str, Tensor]]] = {}

    # Its training

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """(images [b 3 H W] in [0, 1], labels [b H W]) -> the loss.

        Raises:
            ValueError: the images are not of the size that the backbone was built for.
        """
        images, labels = batch
        levels = self.pyramid(self.normalize(images))
        loss = self.loss(self.head(levels), labels)
        if self.auxiliary_head is not None:
            loss = loss + self.auxiliary_weight * self.loss(self.auxiliary_head(levels[AUXILIARY_LEVEL]), labels)
        return self.logged(loss)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of the pixels that count, at the labels' size.

        Args:
            logits: [b classes h w], enlarged bilinearly.
            labels: [b H W]; where none counts, the loss is 0 and so are all gradients.

        The mean is over this process's batch, as torch's: processes with few labelled pixels weigh as much as others.
        (mmsegmentation divides by all pixels, so there a batch with many ignored ones weighs less.)
        """
        logits = enlarged(logits.float(), labels.shape[-2:])
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return total / (labels != IGNORED).sum().clamp(min=1)

    def on_train_epoch_end(self) -> None:
        """Lets data that skips unreadable files say how many."""
        tell = getattr(getattr(self.trainer, "datamodule", None), "tell_unreadable", None)
        if tell is not None:
            tell(self.device)

    # Its answers

    def forward(self, images: Tensor) -> Tensor:
        """[b 3 H W] in [0, 1], of any size -> logits [b classes H W], float32, by `inference`.

        With several `scales`, or with `flip`, these are the logarithms of the averaged probabilities. Beside a window's (or
        the whole image's) activations, memory holds one map [b classes H W]; with scales and flip, four of the largest scale.
        """
        images = self.normalize(images)
        if self.scales == (1.0,) and not self.flip:
            return self.infer(images)
        size = pair(images.shape[-2:])
        total = images.new_zeros((len(images), self.num_classes, *size), dtype=torch.float32)
        for scale in self.scales:
            seen = images if scale == 1 else rescaled(images, scaled(size, scale))
            for mirrored in (False, True) if self.flip else (False,):
                logits = self.infer(seen.flip(-1) if mirrored else seen)
                probabilities = enlarged(logits, size).softmax(1)
                total += probabilities.flip(-1) if mirrored else probabilities
        mean = total.div_(len(self.scales) * (2 if self.flip else 1))
        return mean.clamp_(min=torch.finfo(mean.dtype).tiny).log_()

    def infer(self, images: Tensor) -> Tensor:
        """Normalized images [b 3 H W] -> logits [b classes H W]."""
        return self.slide(images) if self.inference == "slide" else self.whole(images)

    def slide(self, images: Tensor) -> Tensor:
        """Normalized images [b 3 H W] -> logits [b classes H W], the mean of all windows over a pixel.

        Windows of `crop_size` lie `stride` apart from the top left; the last of a row or column is shifted back inside, as
        mmsegmentation does it. An image smaller than a window is padded to one at its right and bottom with 0, which is
        the mean colour, and the padding is cut away again (mmsegmentation would give the network the small image).
        """
        (height, width), (h, w) = pair(images.shape[-2:]), self.crop_size
        images = F.pad(images, (0, max(w - width, 0), 0, max(h - height, 0)))
        rows, columns = pair(images.shape[-2:])
        total = images.new_zeros((len(images), self.num_classes, rows, columns), dtype=torch.float32)
        count = total.new_zeros((rows, columns))
        for top in starts(rows, h, self.stride[0]):
            for left in starts(columns, w, self.stride[1]):
                place = (..., slice(top, top + h), slice(left, left + w))
                total[place] += enlarged(self.head(self.pyramid(images[place])).float(), self.crop_size)
                count[place] += 1
        return total.div_(count)[..., :height, :width]

    def whole(self, images: Tensor) -> Tensor:
        """Normalized images [b 3 H W] -> logits [b classes H W], at once.

        Sides that are no multiple of the patch size are padded at the right and bottom with 0, and that is cut away again.

        Raises:
            ValueError: the backbone takes no other size than its own.
        """
        height, width = images.shape[-2:]
        patch = int(self.pyramid.backbone.feature_info[0]["reduction"])
        images = F.pad(images, (0, -width % patch, 0, -height % patch))
        size = pair(images.shape[-2:])
        return enlarged(self.head(self.pyramid_for(size)(images)).float(), size)[..., :height, :width]

    def pyramid_for(self, size: Grid) -> FeaturePyramid:
        """The pyramid, on a backbone for images of `size`; positions and bias tables are resized, all else is shared.

        Those for the last two sizes are kept until the weights change. Each holds its own positions and tables, and where there
        are relative positions one index of 8 (h w + 1)^2 bytes for all blocks: 8 MB for 512x512 pixels in patches of 16, 134 MB
        for 512x2048.

        Raises:
            ValueError: as `whole`; the backbone is in shards.
        """
        backbone = timm_model(self.pyramid.backbone)
        if self.built in (None, size) or not takes_only_its_size(backbone):
            return self.pyramid
        if not isinstance(backbone, (VisionTransformer, Beit, Eva)):
            told = hasattr(getattr(backbone, "patch_embed", None), "strict_img_size")
            other = ", or strict_img_size: false in model.model_args" if told else ""
            raise UserError(
                f"the image is {by(size)} pixels, but this {type(backbone).__name__} takes only {by(self.built or size)}: set "
                f"model.inference to slide{other}"
            )
        if isinstance(self.pyramid, FSDPModule):
            raise UserError(
                "model.inference: whole resizes a copy of the backbone, and shards cannot be copied: set it to slide, or "
                "trainer.strategy to ddp"
            )
        tables = {
            name: parameter.detach()
            for name, parameter in backbone.named_parameters()
            if name.endswith(("pos_embed", "relative_position_bias_table"))
        }
        kept = self.resized.pop(size, None)
        if kept is None or not all(torch.equal(table, kept[1][name]) for name, table in tables.items()):
            shared = {id(part): part for part in (*self.pyramid.parameters(), *self.pyramid.buffers())}
            with torch.inference_mode(False), torch.no_grad():
                pyramid = copy.deepcopy(self.pyramid, shared)
                network = timm_model(pyramid.backbone)
                if isinstance(network, Beit):
                    resize_blocks(network, size)
                network.set_input_size(img_size=size)
                kept = pyramid, {name: table.clone() for name, table in tables.items()}
        self.resized[size] = kept
        while len(self.resized) > KEPT_SIZES:
            self.resized.pop(next(iter(self.resized)))
        return kept[0].train(self.training)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Forgets the resized backbones: their tables would stay on the old device, or of the old dtype."""
        self.resized.clear()
        return super()._apply(fn, recurse)

    # Its metrics

    @property
    def metrics(self) -> list[str]:
        """The names of all that is logged."""
        foreground = ["val/miou_foreground"] if "background" in (self.classes or []) else []
        return ["train/loss", "val/miou", "val/macc", "val/aacc", *foreground]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Counts (images [b 3 H W], labels [b H' W']), which may be of another size than the images."""
        images, labels = batch
        logits = self(images)
        self.confusion.update(likeliest(logits, pair(labels.shape[-2:])), labels)

    def on_validation_epoch_start(self) -> None:
        self.confusion.reset()
        super().on_validation_epoch_start()

    def on_validation_epoch_end(self) -> None:
        """mIoU, mAcc and aAcc from one confusion matrix of all pixels that count, of all processes.

        A class that is neither in the labels nor predicted is left out of mIoU, one that is not in the labels of mAcc: as
        mmsegmentation does. Where a class is called background, there is also the mIoU of the others.
        """
        super().on_validation_epoch_end()
        confusion = self.confusion.compute()  # [label, prediction]
        right, labelled, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        self.iou = right / (labelled + predicted - right)
        accuracy = right / labelled
        names = self.names_of_classes()
        means = {"miou": self.iou.nanmean(), "macc": accuracy.nanmean(), "aacc": right.sum() / labelled.sum()}
        if "background" in names:
            foreground = [label for label, name in enumerate(names) if name != "background"]
            means["miou_foreground"] = self.iou[foreground].nanmean()
        for name, value in means.items():
            self.log(f"val/{name}", value, prog_bar=name == "miou", sync_dist=True)  # which is the same in all processes
        if not self.trainer.sanity_checking:
            self.print(
                table(
                    [printable(name) for name in names],
                    self.iou.tolist(),
                    accuracy.tolist(),
                    (labelled / labelled.sum()).tolist(),
                )
            )

    # Its pictures

    def predict_step(self, batch: Tensor | tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Images [b 3 H W] in [0, 1], or (images, labels) -> the likeliest labels [b H W].

        The images are seen as those of a validation are: scaled to fit in the data's `resize`, (long, short). Where the data
        has none, the short side is that of `crop_size` and the long side four times that (ADE20K: 2048, 512). So memory holds
        a map of at most [b classes short long], and eight classes at the photo's size.
        """
        images = images_in(batch)
        size, short = pair(images.shape[-2:]), min(self.crop_size)
        long, short = self.sides or (4 * short, short)
        seen = scaled(size, min(long / max(size), short / min(size)))
        logits = self(images if seen == size else rescaled(images, seen))
        return likeliest(logits, size)

    def write_prediction(self, image: Tensor, labels: Tensor, destination: Path) -> None:
        """A photo's two pictures: DESTINATION_overlay.png, with colours and a legend, and DESTINATION_labels.png.

        Args:
            image: [3 H W] in [0, 1].
            labels: [H W]
            destination: their path without the endings; its folder is made.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        pictures = {"overlay": overlay(image, labels, self.names_of_classes()), "labels": label_picture(labels)}
        for what, picture in pictures.items():
            file = Path(f"{destination}_{what}.png")
            with naming(file, "make room, or give another --output"), whole(file) as part, part.open("wb") as opened:
                picture.save(opened, "PNG")

    # Its optimization

    def configure_model(self) -> None:
        """Shards pyramid and heads where the strategy asks for it."""
        shard(self, [part for part in (self.pyramid, self.head, self.auxiliary_head) if part is not None])

    def configure_optimizers(self) -> Any:
        """AdamW: the backbone in groups by layer, the rest at the full rate; with warm-up and poly per step."""
        groups = layer_decay_groups(self.pyramid.backbone, self.peak_lr, self.weight_decay, self.layer_decay)
        added: list[nn.Module] = [part for part in (self.pyramid.levels, self.head, self.auxiliary_head) if part is not None]
        for group in parameter_groups(added, self.weight_decay):
            name = "heads" if group["weight_decay"] else "heads_no_decay"
            groups.append({**group, "name": name, "lr": self.peak_lr})
        optimizer = fused_adamw(groups, self.peak_lr, self.betas)
        steps = optimizer_steps(self.trainer)
        scheduler = warmup_poly(optimizer, self.warmup_steps, steps, self.warmup_ratio, self.power)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def check_batch_size(self, size: int) -> None:
        """Refuses a single image, which batch norm cannot train on."""
        if size == 1 and not self.synchronised:
            raise UserError(
                "data.batch_size is 1, but UperNet's pool of 1x1 of one image cannot be batch-normalized: set it to at least 2"
            )

    def setup(self, stage: str) -> None:
        """Takes the size of photos from the data, beside what `Supervised` takes."""
        self.synchronised = stage == "fit" and self.synchronise()
        self.sides = getattr(getattr(self.trainer, "datamodule", None), "resize", None)
        super().setup(stage)

    def synchronise(self) -> bool:
        """Whether batch norms see the images of all processes (`trainer.sync_batchnorm`); torch's cannot on a CPU."""
        strategy: Any = self.trainer.strategy
        asked = self.trainer.world_size > 1 and layer_sync(strategy) is not None
        if asked and strategy.root_device.type == "cpu":
            rank_zero_warn("trainer.sync_batchnorm: torch cannot synchronise batch norms on a CPU, each process has its own")
            leave_out_layer_sync(strategy)
            return False
        return asked


def window_size(backbone: Any, given: int | Grid | None, built: Grid | None) -> Grid:
    """(H, W) of a window: the given, or the size that the backbone was built for.

    Raises:
        ValueError: they differ, in a backbone that takes only its size; or there is neither.
    """
    if given is None:
        if built is None:
            raise UserError(f"model.crop_size is missing: {type(backbone).__name__} takes any size (ADE20K's protocol has 512)")
        return built
    size = pair(given)
    if min(size) < 1:
        raise UserError(f"model.crop_size is {by(size)}, but it is at least 1")
    if built is not None and size != built and takes_only_its_size(backbone):
        raise UserError(
            f"model.crop_size is {by(size)}, but the backbone was built for {by(built)} pixels: set img_size in "
            f"model.model_args to {size[0] if size[0] == size[1] else list(size)}"
        )
    return size


def built_size(backbone: Any, told: int | Grid | None = None) -> Grid | None:
    """(H, W) that a timm model was built for; None of one that has no such size, as a ConvNeXt.

    Args:
        told: the size of a model that has a fixed one and does not say it, as a Hiera; None is that of its weights.
    """
    size = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if size is None and backbone.pretrained_cfg.get("fixed_input_size"):
        size = getattr(backbone, "img_size", None) or told or backbone.pretrained_cfg["input_size"][1:]
    return None if size is None else pair(size)


def takes_only_its_size(backbone: Any) -> bool:
    """Of a timm model that was built for a size."""
    return bool(getattr(getattr(backbone, "patch_embed", None), "strict_img_size", True))


def resize_blocks(backbone: Beit, size: Grid) -> None:
    """Resizes the relative positions of each block for images of `size`, (H, W).

    All blocks come to have one table of which position is where, for it is the square of the number of tokens.
    """
    height, width = backbone.patch_embed.patch_size
    index = None
    block: Any
    for block in backbone.blocks:
        block.attn.set_window_size((size[0] // height, size[1] // width))
        index = block.attn.relative_position_index if index is None else index
        block.attn.relative_position_index = index


def pair(size: Any) -> Grid:
    """A side, or two, as (H, W)."""
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side that is at least as long as one; the last ends where the side does."""
    return [min(step * stride, side - window) for step in range(math.ceil((side - window) / stride) + 1)]


def scaled(size: Grid, factor: float) -> Grid:
    """(H, W) times a factor, at least one pixel each."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def rescaled(images: Tensor, size: Grid) -> Tensor:
    """[b 3 H W] -> [b 3 H' W'], bilinear, smoothed where it becomes smaller."""
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def likeliest(logits: Tensor, size: Grid) -> Tensor:
    """[b classes h w] -> the label [b H W] of the highest logit at another size, enlarging only a few classes at once."""
    best = enlarged(logits[:, :1], size)[:, 0]
    labels = torch.zeros_like(best, dtype=torch.long)
    for first in range(1, logits.shape[1], 8):
        value, label = enlarged(logits[:, first : first + 8], size).max(1)
        higher = value > best
        best, labels = torch.where(higher, value, best), torch.where(higher, label + first, labels)
    return labels


def table(names: list[str], iou: list[float], accuracy: list[float], share: list[float]) -> str:
    """A line a class: its IoU, its accuracy, and its share of the labelled pixels; nothing of an absent one."""

    def number(value: float) -> str:
        return f"{'-':>7}" if math.isnan(value) else f"{value:7.4f}"

    width = max(len("class"), *map(len, names))
    rows = zip(names, iou, accuracy, share, strict=True)
    head = f"{'class':{width}}     IoU     Acc   pixels"
    return "\n".join([head, *(f"{name:{width}} {number(i)} {number(a)} {s:8.2%}" for name, i, a, s in rows)])
