"""T as pixels: what MAE and SimMIM reconstruct."""

import torch
from einops import rearrange
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from unimim.letters.interfaces import TargetGenerator, check_positive
from unimim.pictures.patches import unnormalised
from unimim.shapes import RGB, Grid


class PixelTarget(TargetGenerator):
    """The colours of each patch, c = 3 * patch_size**2, ordered as in MAE's official code: row, column, channel.

    MAE's per-patch normalization is N: `LayerNorm(unbiased=True)`.

    Args:
        patch_size: side of the student's patch in pixels.
        mean: of the pixels in [0, 1]; MAE and SimMIM reconstruct pixels normalized by ImageNet's.
        std: their standard deviation, likewise.

    Raises:
        ValueError: on use, the images are not `patch_size` times the student's grid.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, patch_size: int = 16, mean: RGB = IMAGENET_DEFAULT_MEAN, std: RGB = IMAGENET_DEFAULT_STD) -> None:
        super().__init__()
        check_positive("PixelTarget", patch_size=patch_size)
        self.patch_size = patch_size
        self.dim = 3 * patch_size**2
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> [b h w c]"""
        h, w = grid_size
        self.check_patch_size(self.patch_size, images, grid_size)
        pixels = (images - self.mean) / self.std
        return rearrange(pixels, "b c (h p) (w q) -> b h w (p q c)", h=h, w=w)

    def picture(self, values: Tensor, target: Tensor) -> Tensor:
        """The pixels themselves: [b h w c], [b h w c] -> [b 3 H W] in [0, 1]; those that N normalized have no contrast left."""
        pixels = rearrange(values.float(), "b h w (p q c) -> b c (h p) (w q)", p=self.patch_size, q=self.patch_size)
        return (pixels * self.std + self.mean).clamp(0, 1)

    def reconstruction(self, prediction: Tensor, target: Tensor, before: Tensor) -> Tensor | None:
        """As `unnormalised`: where N changed the pixels, by the true mean and spread of each patch."""
        return self.picture(unnormalised(prediction, target, before), before)
