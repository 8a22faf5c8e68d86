"""T as the mean colour of each patch: the masked patch prediction of the first ViT (Dosovitskiy et al., 2021)."""

import torch
from einops import rearrange, reduce
from torch import Tensor

from unimim.errors import UserError
from unimim.letters.interfaces import TargetGenerator
from unimim.shapes import Grid


class MeanColorTarget(TargetGenerator):
    """The mean colour of each patch, in steps: discrete, of 2**(3 * bits) classes (512, as in ViT's appendix B.1.2).

    Args:
        bits: of each channel (ViT: 3, that is 8 equal steps from 0 to 1). The class is r * 64 + g * 8 + b.

    Raises:
        ValueError: `bits` is not from 1 to 8; on use, the images are not whole patches.
    """

    def __init__(self, bits: int = 3) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise UserError(f"model.teacher.bits is {bits}, but a channel has 1 to 8")
        self.steps = 2**bits
        self.dim = self.steps**3

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> long [b h w]"""
        (height, width), (h, w) = images.shape[-2:], grid_size
        if height % h or width % w:
            raise UserError(f"images of {height}x{width} pixels are no whole patches of a {h}x{w} grid: set data.image_size")
        colors = reduce(images.float(), "b c (h p) (w q) -> b h w c", "mean", h=h, w=w)
        red, green, blue = (colors * self.steps).floor().clamp(0, self.steps - 1).to(torch.long).unbind(-1)
        return (red * self.steps + green) * self.steps + blue

    def picture(self, values: Tensor, target: Tensor) -> Tensor:
        """The middle of each class's colours: long [b h w], or logits [b h w c] -> [b 3 h w] in [0, 1]"""
        codes = values if values.dtype == torch.long else values.argmax(-1)
        steps = torch.stack([codes // self.steps**2, codes // self.steps % self.steps, codes % self.steps], dim=-1)
        return rearrange((steps + 0.5) / self.steps, "b h w c -> b c h w")
