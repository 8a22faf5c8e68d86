"""Positions of patches: MAE's fixed sine-cosine table, and tables that are fed another grid."""

import torch
from einops import rearrange
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor
from torch.nn import functional as F

from unimim.errors import UserError
from unimim.shapes import Grid


def sincos_positions(width: int, grid_size: Grid, num_prefix_tokens: int) -> Tensor:
    """[1 prefix+h*w width] as in MAE's official code; zeros for the prefix tokens.

    timm's table has the same four quarters (sine and cosine of row and column) in another order.

    Raises:
        ValueError: the width is no multiple of 4.
    """
    if width % 4:
        raise UserError(f"sine-cosine positions need a width that is a multiple of 4, not {width}")
    quarters = build_sincos2d_pos_embed(list(grid_size), dim=width).chunk(4, dim=1)
    table = torch.cat([quarters[i] for i in (1, 3, 0, 2)], dim=1)
    return torch.cat([torch.zeros(num_prefix_tokens, width), table])[None]


def resized_positions(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """[1 prefix+h*w d] for another grid, as DINO and BEiT v2's CLIP do it, which the authors of MaskDistill point to.

    Bicubic, without antialiasing, on a scale of (new + 0.1) / old (their guard against rounding, which shifts every sample a
    little). On a smooth table timm's antialiased resize differs from it by 5 %.
    """
    count = old[0] * old[1]
    prefix, patches = table[:, :-count], table[:, -count:]
    grid = rearrange(patches, "1 (h w) d -> 1 d h w", h=old[0])
    scale = tuple((after + 0.1) / before for before, after in zip(old, new, strict=True))
    grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    return torch.cat([prefix, rearrange(grid, "1 d h w -> 1 (h w) d")], dim=1)
