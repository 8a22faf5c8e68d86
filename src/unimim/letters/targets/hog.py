"""T as histograms of oriented gradients: MaskFeat (Wei et al., 2022), section 3 and its released code."""

import math

import torch
from einops import rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from unimim.errors import UserError
from unimim.letters.interfaces import TargetGenerator, check_positive
from unimim.pictures.patches import hog_glyphs
from unimim.shapes import Grid

PIXELS_AT_ONCE = 2**18
"""Of all channels, that a CPU works on at a time: one image of 224, whose gradients then stay in its cache."""


class HOGTarget(TargetGenerator):
    """MaskFeat's HOG: c = 3 * bins * (patch_size / cell_size)**2, ordered channel, bin, cell row, cell column.

    In each colour channel: gradients by 3x3 Sobel kernels with reflected borders; their magnitude is added to the bin of
    their unsigned orientation, without interpolation; bins are summed over square cells; and the bins of one cell and
    channel are scaled to length 1. MaskFeat feeds pixels normalized by mean and std: gradients do not see the mean, and
    the length 1 takes the std away, but for rounding: a gradient on the edge of two bins may fall into the other. In 8-bit
    photos many do, since an `across` of 0 is such an edge; there MaskFeat's own bins hang on rounding too.

    Args:
        patch_size: side of the student's patch in pixels.
        cell_size: side of a cell in pixels (MaskFeat: 8).
        bins: orientations in half a turn (MaskFeat: 9).

    Raises:
        ValueError: the patch is no multiple of the cell; on use, the images are not `patch_size` times the student's grid.
    """

    votes: Tensor

    def __init__(self, patch_size: int = 16, cell_size: int = 8, bins: int = 9) -> None:
        super().__init__()
        check_positive("HOGTarget", patch_size=patch_size, cell_size=cell_size, bins=bins)
        if patch_size % cell_size:
            raise UserError(f"HOGTarget: patch_size {patch_size} is no multiple of cell_size {cell_size}")
        self.patch_size = patch_size
        self.cell_size = cell_size
        self.bins = bins
        self.dim = 3 * bins * (patch_size // cell_size) ** 2
        whole_turn = torch.arange(-bins, bins + 1)
        self.register_buffer("votes", F.one_hot(whole_turn % bins, bins), persistent=False)

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> [b h w c]"""
        self.check_patch_size(self.patch_size, images, grid_size)
        on_cpu = images.device.type == "cpu"
        at_once = max(1, PIXELS_AT_ONCE // images.shape[1:].numel()) if on_cpu else len(images)
        return torch.cat([self.histograms(piece, grid_size) for piece in images.split(at_once)])

    def histograms(self, images: Tensor, grid_size: Grid) -> Tensor:
        """Of all cells: [b 3 H W] -> [b h w c]"""
        h, w = grid_size
        padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
        smooth = padded[:, :, :-2].add(padded[:, :, 1:-1], alpha=2).add_(padded[:, :, 2:])  # Sobel's kernels are separable
        across = smooth[..., :-2] - smooth[..., 2:]
        smooth = padded[..., :-2].add(padded[..., 1:-1], alpha=2).add_(padded[..., 2:])
        down = smooth[:, :, :-2] - smooth[:, :, 2:]
        magnitude = torch.hypot(across, down)
        turn = torch.atan2(across, down).div_(math.pi).mul_(self.bins).floor_().add_(self.bins)
        vote = turn.int().clamp_(0, 2 * self.bins)  # a row of `votes`, also where a pixel is nan
        # A bag is one row of a cell: the sum of its pixels' one-hot votes, weighted by magnitude.
        bags, weights = (rearrange(x, "b c H (w q) -> (b c H w) q", q=self.cell_size) for x in (vote, magnitude))
        histogram = F.embedding_bag(bags, self.votes.float(), mode="sum", per_sample_weights=weights)
        rows = rearrange(histogram, "(b c H w) k -> b c H w k", b=len(images), c=3, H=images.shape[2])
        cells = F.normalize(reduce(rows, "b c (h p) w k -> b c h w k", "sum", p=self.cell_size), dim=-1)
        return rearrange(cells, "b c (h i) (w j) k -> b h w (c k i j)", h=h, w=w)

    def picture(self, values: Tensor, target: Tensor) -> Tensor:
        """Strokes along the edges, in the colour of their channel, as bright as in the target: [b h w c] -> [b 3 H' W']."""
        i = self.patch_size // self.cell_size
        histograms = rearrange(values.float(), "b h w (c k i j) -> b c (h i) (w j) k", c=3, i=i, j=i)
        return hog_glyphs(histograms / target.float().max().clamp(min=1e-6))
