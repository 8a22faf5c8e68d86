"""T as pixels: what MAE and SimMIM reconstruct."""

import torch
from einops import rearrange
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from unimim.interfaces import RGB, Grid, TargetGenerator, check_positive


class PixelTarget(TargetGenerator):
    """The colours of each patch, c = 3 * patch_size**2, ordered as in MAE's official code: row, column, channel.

    MAE's per-patch normalization is N: `LayerNorm(unbiased=True)`.

    Args:
        patch_size: side of the student's patch in pixels.
        mean, std: statistics of the pixels; MAE and SimMIM reconstruct pixels normalized by ImageNet's.

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
