"""UperNet (Xiao et al., 2018) over any timm backbone: its pyramid of features, its head, and the auxiliary head.

The layout and the initialization of the heads are mmsegmentation's, which the MaskDistill paper's ADE20K protocol (BEiT v2's
configs) uses. Batch norms are plain; Lightning's `Trainer(sync_batchnorm=True)` synchronises them under several GPUs.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from unimim.errors import UserError
from unimim.weights.models import check_image_size, checkpoint_activations

STRIDES = (4, 8, 16, 32)
"""Pixels between neighbours in each level of the pyramid."""
LEVELS = len(STRIDES)
POOLS = (1, 2, 3, 6)
"""Bins a side of UperNet's pyramid pooling."""


class FeaturePyramid(nn.Module):
    """Four maps of features, each half as fine as the one before: at strides of 4, 8, 16 and 32 pixels, but for what follows.

    A backbone with one stride (ViT, BEiT, EVA) gives the tokens of four of its blocks, neither normalized nor with their
    CLS and register tokens. Transposed convolutions double their grid, max pooling halves it. As in BEiT v2's segmentation
    code, a grid of 16 px patches is enlarged 4 times by two of them for the first level, 2 times by one for the second, kept
    for the third and halved for the fourth; one of 8 px patches is enlarged 2 times, kept, halved and quartered. Patches of
    14 pixels count as 16: the strides are then 3.5, 7, 14 and 28.

    A hierarchical backbone gives its last four stages, at their own strides: 4 to 32 in a Swin, a ConvNeXt or a ResNet. Where
    it is made of layer norms (Swin, ConvNeXt; not ResNet), each has a layer norm of its own behind it, as in Swin's and
    ConvNeXt's segmentation code.

    Args:
        backbone: a timm model; what lies behind the last block used (norm, pooling, classifier, blocks) is taken from it, for
            it would get no gradient. So its weights are loaded before.
        blocks: of a backbone with one stride, the four blocks that are used, from 0. None: the last of the first third, of
            the first half, of the first two thirds and of all blocks, which is BEiT v2's 3, 5, 7, 11 of 12 and
            7, 11, 15, 23 of 24, and 9, 15, 21, 31 of a ViT-H's 32 (for which no source is known).
        checkpointing: keep only the input of each block for the backward pass and compute the rest again: less memory, the
            same gradients. (Batch norms within the backbone, as a ResNet's, then see every batch twice.)

    Attributes:
        channels: d of each of the four maps.

    Raises:
        ValueError: the backbone gives no maps of its blocks, or no four levels; `blocks` are not four of its blocks in
            ascending order; it knows no checkpointing.
    """

    def __init__(self, backbone: Any, blocks: list[int] | None = None, checkpointing: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        name = type(backbone).__name__
        if not hasattr(backbone, "forward_intermediates") or not hasattr(backbone, "feature_info"):
            raise UserError(f"{name} gives no features of its blocks: take a timm model that has forward_intermediates")
        features = list(backbone.feature_info)
        strides = [feature["reduction"] for feature in features]
        one_stride = len(set(strides)) == 1
        if one_stride:
            self.indices = four_blocks(len(features), blocks)
        else:
            self.indices = last_stages(name, strides)
            if blocks is not None:
                raise UserError(f"{name} is hierarchical and gives its last four stages: blocks are for a ViT, BEiT or EVA")
        self.channels: list[int] = [features[index]["num_chs"] for index in self.indices]
        backbone.prune_intermediate_layers(self.indices, prune_norm=True, prune_head=True)
        if checkpointing:
            checkpoint_activations(backbone)
        if one_stride:
            doublings = [round(math.log2(strides[0] / stride)) for stride in STRIDES]
            self.coarsest = round(strides[0] / 2 ** doublings[-1])
            self.levels = nn.ModuleList(rescaling(d, times) for d, times in zip(self.channels, doublings, strict=True))
        else:
            self.coarsest = strides[-1]
            self.levels = nn.ModuleList(self.norms())

    def norms(self) -> list[nn.Module]:
        """Layer norms over the channels, of the backbone's own epsilon; nothing for a backbone without layer norms."""
        own = [module for module in self.backbone.modules() if isinstance(module, nn.LayerNorm)]
        return [LayerNorm2d(d, eps=own[0].eps) if own else nn.Identity() for d in self.channels]

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalized images [b 3 H W] -> [b d1 H/4 W/4], [b d2 H/8 W/8], [b d3 H/16 W/16], [b d4 H/32 W/32].

        Raises:
            ValueError: the images are not of the size that the backbone was built for, or smaller than the coarsest stride.
        """
        check_image_size(self.backbone, images)
        height, width = images.shape[-2:]
        if min(height, width) < self.coarsest:
            raise UserError(
                f"the images are {height}x{width} pixels, but the pyramid's coarsest stride is {self.coarsest} pixels: "
                f"take images at least that large"
            )
        maps = self.backbone.forward_intermediates(images, indices=self.indices, output_fmt="NCHW", intermediates_only=True)
        return [level(features) for level, features in zip(self.levels, maps, strict=True)]


class UperNetHead(nn.Module):
    """UperNet's head: pyramid pooling on the coarsest level, then a feature pyramid network from there to the finest.

    Args:
        in_channels: d of each of the four levels, the finest first.
        channels: width of the head (BEiT v2: 768 on ViT-B, 1024 on ViT-L; Swin: 512).
        num_classes: of the classifier.
        dropout: probability of dropping a whole channel before the classifier (mmsegmentation: 0.1).

    Raises:
        ValueError: `in_channels` are not four.
    """

    def __init__(self, in_channels: list[int], channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        if len(in_channels) != LEVELS:
            raise UserError(f"UperNetHead takes four levels, got in_channels {in_channels}")
        *finer, coarsest = in_channels
        self.pools = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), convolution(coarsest, channels, 1)) for bins in POOLS
        )
        self.pooled = convolution(coarsest + len(POOLS) * channels, channels, 3)
        self.laterals = nn.ModuleList(convolution(d, channels, 1) for d in finer)
        self.smooth = nn.ModuleList(convolution(channels, channels, 3) for _ in finer)
        self.fuse = convolution(LEVELS * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(channels, num_classes)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Four maps [b d_i h_i w_i], the finest first -> logits [b classes h_1 w_1].

        Raises:
            ValueError: one image in training, whose 1x1 pool has a single value a channel: no batch norm can use it.
        """
        self.check_batch(levels[0])
        *finer, coarsest = levels
        pools = [enlarged(pool(coarsest), coarsest.shape[-2:]) for pool in self.pools]
        tops = [self.pooled(torch.cat([coarsest, *pools], dim=1))]
        for lateral, level in zip(reversed(self.laterals), reversed(finer), strict=True):  # from coarse to fine
            tops.insert(0, lateral(level) + enlarged(tops[0], level.shape[-2:]))
        smooth = [convolve(top) for convolve, top in zip(self.smooth, tops[:-1], strict=True)] + tops[-1:]
        fused = self.fuse(torch.cat([enlarged(level, smooth[0].shape[-2:]) for level in smooth], dim=1))
        logits: Tensor = self.classifier(self.dropout(fused))
        return logits

    def check_batch(self, images: Tensor) -> None:
        """
        Raises:
            ValueError: as `forward`.
        """
        synchronised = any(isinstance(module, nn.SyncBatchNorm) for module in self.pools.modules())
        if self.training and len(images) == 1 and not synchronised:
            raise UserError(
                "a batch of 1 image cannot be trained on: UperNet's pool of 1x1 has a single value a channel, which no batch "
                "norm can use; set data.batch_size to at least 2"
            )


class FCNHead(nn.Module):
    """The auxiliary head: one 3x3 convolution and a classifier on one level (mmsegmentation's FCN head, on the third).

    Args:
        in_channels: d of the level.
        channels: width of the head (mmsegmentation: 256).
        num_classes: of the classifier.
        dropout: probability of dropping a whole channel before the classifier (mmsegmentation: 0.1).
    """

    def __init__(self, in_channels: int, channels: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.convolution = convolution(in_channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(channels, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """[b d h w] -> logits [b classes h w]"""
        logits: Tensor = self.classifier(self.dropout(self.convolution(features)))
        return logits


def four_blocks(depth: int, blocks: list[int] | None) -> list[int]:
    """The four blocks whose tokens become levels, checked; None: those of `FeaturePyramid`.

    Raises:
        ValueError: they are not four of the `depth` blocks in ascending order.
    """
    chosen = [depth // 3 - 1, depth // 2 - 1, depth - depth // 3 - 1, depth - 1] if blocks is None else list(blocks)
    if len(chosen) != LEVELS or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= depth:
        given = f"blocks {chosen}" if blocks is not None else "fewer than four"
        raise UserError(f"a pyramid takes four of the backbone's {depth} blocks (0 to {depth - 1}, ascending), got {given}")
    return chosen


def last_stages(name: str, strides: list[int]) -> list[int]:
    """The last four stages of the hierarchical backbone `name`, checked; `strides` are those of all its stages.

    Raises:
        ValueError: there are no four, each twice as coarse as the one before.
    """
    chosen = list(range(len(strides)))[-LEVELS:]
    coarseness = [strides[index] for index in chosen]
    if coarseness != [coarseness[0] * 2**level for level in range(LEVELS)]:
        raise UserError(f"{name} has levels at strides {strides}, but a pyramid needs four, each twice the one before")
    return chosen


def rescaling(d: int, doublings: int) -> nn.Module:
    """[b d h w] -> [b d h' w'], the grid doubled so many times by transposed convolutions, or halved by max pooling."""
    if doublings <= 0:
        return nn.MaxPool2d(2**-doublings) if doublings else nn.Identity()
    steps: list[nn.Module] = [nn.ConvTranspose2d(d, d, kernel_size=2, stride=2)]
    for _ in range(doublings - 1):
        steps += [nn.BatchNorm2d(d), nn.GELU(), nn.ConvTranspose2d(d, d, kernel_size=2, stride=2)]
    return nn.Sequential(*steps)


def convolution(in_channels: int, channels: int, kernel_size: int) -> nn.Module:
    """mmsegmentation's block: convolution without bias, batch norm, ReLU; initialized as mmcv's ConvModule is."""
    block = Conv2dNormActivation(in_channels, channels, kernel_size)
    nn.init.kaiming_normal_(block[0].weight, mode="fan_out", nonlinearity="relu")
    return block


def classifier(channels: int, num_classes: int) -> nn.Module:
    """A 1x1 convolution to logits, initialized as mmsegmentation's decode heads do it (conv_seg: normal, std 0.01; bias 0)."""
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.get_parameter("bias"))
    return layer


def enlarged(maps: Tensor, size: Sequence[int]) -> Tensor:
    """[b c h w] -> [b c H W], bilinear, corners not aligned; of that size as they are."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)
