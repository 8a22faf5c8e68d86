"""T as histograms of oriented gradients: MaskFeat (Wei et al., 2022), section 3 and its released code."""

import math

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from unimim.interfaces import Grid, TargetGenerator, check_positive


class HOGTarget(TargetGenerator):
    """MaskFeat's HOG: c = 3 * bins * (patch_size / cell_size)**2, ordered channel, bin, cell row, cell column.

    In each colour channel: gradients by 3x3 Sobel kernels with reflected borders; their magnitude is added to the bin of
    their unsigned orientation, without interpolation; bins are summed over square cells; and the bins of one cell and
    channel are scaled to length 1. MaskFeat feeds pixels normalized by mean and std: gradients do not see the mean, and
    the length 1 takes the std away, but for rounding: a gradient on the edge of two bins may fall into the other. As in
    MaskFeat's formula, what rounding leaves in a flat cell is scaled to length 1 too.

    Args:
        patch_size: side of the student's patch in pixels.
        cell_size: side of a cell in pixels (MaskFeat: 8).
        bins: orientations in half a turn (MaskFeat: 9).

    Raises:
        ValueError: the patch is no multiple of the cell; on use, the images are not `patch_size` times the student's grid.
    """

    kernel: Tensor

    def __init__(self, patch_size: int = 16, cell_size: int = 8, bins: int = 9) -> None:
        super().__init__()
        check_positive("HOGTarget", patch_size=patch_size, cell_size=cell_size, bins=bins)
        if patch_size % cell_size:
            raise ValueError(f"HOGTarget: patch_size {patch_size} is no multiple of cell_size {cell_size}")
        self.patch_size = patch_size
        self.cell_size = cell_size
        self.bins = bins
        self.dim = 3 * bins * (patch_size // cell_size) ** 2
        across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("kernel", torch.stack([across, across.T])[:, None], persistent=False)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> [b h w c]"""
        h, w = grid_size
        self.check_patch_size(self.patch_size, images, grid_size)
        planes = F.pad(rearrange(images.float(), "b c H W -> (b c) 1 H W"), (1, 1, 1, 1), mode="reflect")
        across, down = F.conv2d(planes, self.kernel.float()).unbind(1)  # each [(b c) H W]
        magnitude = torch.hypot(across, down)
        turn = torch.atan2(across, down).div_(math.pi).mul_(self.bins)
        bin_of = turn.floor_().long() % self.bins
        histogram = torch.stack(
            [F.avg_pool2d(magnitude.where(bin_of == k, 0), self.cell_size) for k in range(self.bins)], dim=1
        )  # averages: the sum that MaskFeat takes differs by a factor, which the next line takes away
        histogram = F.normalize(histogram, dim=1)
        return rearrange(histogram, "(b c) k (h i) (w j) -> b h w (c k i j)", b=len(images), h=h, w=w)
