"""M, the masking: which patches are hidden."""

import math
from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor

from unimim.errors import UserError
from unimim.letters.interfaces import Masking, TargetGenerator
from unimim.letters.mask import Mask
from unimim.shapes import Grid

Ratio = float | tuple[float, float]
"""A share of patches in (0, 1), or the ends of an interval from which one is drawn for each batch."""

TRIES = 10
"""Rectangles proposed to an image for each block; BEiT ends the search when none of them can be taken."""

MAX_BLOCKS = 40
"""Blocks searched for in one image before random patches fill the rest. Of 200,000 simulated draws of 78 on 14x14 none needed
more than 13; at 90 % none of 100,000 more than 31, and on 32x32 none of 5,000 more than 39."""


def ends(ratio: Ratio) -> tuple[float, float]:
    """The interval that a ratio stands for; a single number is both its ends.

    Raises:
        ValueError: it is no share between 0 and 1, nor two of them in their order.
    """
    pair = tuple(ratio) if isinstance(ratio, (tuple, list)) else (ratio, ratio)
    if len(pair) != 2 or not 0 < pair[0] <= pair[1] < 1:
        two = ", or is two of them, the lower one first" if isinstance(ratio, (tuple, list)) else ""
        raise UserError(f"model.masking.ratio is {ratio}, but a share of patches to hide lies between 0 and 1{two}")
    return pair


def hidden_counts(ratio: Ratio, cells: int) -> tuple[int, int]:
    """The least and the most of `cells` that are hidden: the ratio's ends times `cells`, rounded.

    Raises:
        ValueError: that is none of them, or all.
    """
    least, most = (round(end * cells) for end in ends(ratio))
    if least < 1 or most >= cells:
        raise UserError(f"model.masking.ratio {ratio} hides {'no' if least < 1 else 'every'} patch of a grid of {cells}")
    return least, most


def drawn_count(ratio: Ratio, cells: int) -> int:
    """How many of `cells` are hidden in this batch: of an interval, a share is drawn.

    Raises:
        ValueError: as `hidden_counts`.
    """
    least, most = hidden_counts(ratio, cells)
    if least == most:
        return least
    low, high = ends(ratio)
    share = low + (high - low) * torch.rand(()).item()  # a number of the CPU: a GPU's would have to be waited for
    return round(share * cells)


class RandomMasking(Masking):
    """Each patch alike, as MAE (He et al., 2022; there with a ratio of 0.75).

    Args:
        ratio: the share of patches to hide, in (0, 1); `round(ratio * cells)` in every image. Two numbers are the ends of an
            interval, from which one is drawn for each batch.
        unit: side of a cell in patches: SimMIM hides cells of 32 pixels, 2 patches of 16. A cell is a patch by default.

    Raises:
        ValueError: the ratio is outside (0, 1), or the unit below 1; on use, the ratio hides no cell of the grid, or every
            cell, or the grid is no whole number of units.
    """

    def __init__(self, ratio: Ratio = 0.75, unit: int = 1) -> None:
        super().__init__()
        if unit < 1:
            raise UserError(f"model.masking.unit is {unit}, but a cell has at least 1 patch")
        ends(ratio)
        self.ratio = ratio
        self.unit = unit

    def forward(self, images: Tensor, grid_size: Grid) -> Mask:
        h, w = grid_size
        if h % self.unit or w % self.unit:
            raise UserError(
                f"model.masking.unit is {self.unit}, but the student's grid of {h}x{w} patches is no multiple of it"
            )
        h, w = h // self.unit, w // self.unit
        scores = torch.rand(len(images), h * w, device=images.device)
        count = drawn_count(self.ratio, h * w)
        mask = repeat(highest(scores, count), "b (h w) -> b (h p) (w q)", h=h, p=self.unit, q=self.unit)
        return Mask(mask, count * self.unit**2)


class BlockMasking(Masking):
    """Rectangles until the count is reached: BEiT's block-wise masking (Bao et al., 2022, algorithm 1).

    One rectangle after the other is proposed, its area uniform between `min_block` and what is left to hide, its aspect
    ratio log-uniform. It is taken when it adds at least one patch and not too many. Ten refusals in a row end the search;
    then random patches complete the count, as in BEiT v2, so that it is exact in every image. (BEiT's own generator, which
    stops short, misses the count in a third of the images.) All images of the batch search at the same time, and each is
    proposed its ten rectangles at once: a refused one changes nothing, so the first that fits is the one taken.

    Args:
        ratio: the share of patches to hide, in (0, 1); `round(ratio * h * w)` in every image. Two numbers are the ends of an
            interval, from which one is drawn for each batch (iBOT: 0.1 to 0.5).
        min_block: the smallest area proposed, in patches. BEiT has 16 on a 14x14 grid; None scales that with the grid, or takes
            the hidden count where that is less.
        min_aspect: aspect ratios lie between this and its inverse (BEiT: 0.3).

    Raises:
        ValueError: the ratio is outside (0, 1), `min_block` below 1, or `min_aspect` outside (0, 1]; on use, the ratio hides
            no patch of the grid or every patch, or fewer than one smallest block.
    """

    def __init__(self, ratio: Ratio = 0.4, min_block: int | None = None, min_aspect: float = 0.3) -> None:
        super().__init__()
        if min_block is not None and min_block < 1:
            raise UserError(f"model.masking.min_block is {min_block}, but a block has at least 1 patch")
        if not 0 < min_aspect <= 1:
            raise UserError(f"model.masking.min_aspect is {min_aspect}, but it lies between 0 and 1 (BEiT: 0.3)")
        ends(ratio)
        self.ratio = ratio
        self.min_block = min_block
        self.min_aspect = min_aspect

    def forward(self, images: Tensor, grid_size: Grid) -> Mask:
        h, w = grid_size
        b, device = len(images), images.device
        count = drawn_count(self.ratio, h * w)
        least, _ = hidden_counts(self.ratio, h * w)
        min_block = self.min_block if self.min_block is not None else min(least, max(1, round(16 * h * w / 196)))
        if min_block > least:
            raise UserError(
                f"model.masking.min_block is {min_block}, but ratio {self.ratio} hides only {least} patches of the grid: lower "
                f"it, or set it to null, which scales BEiT's 16"
            )
        log_aspect = math.log(self.min_aspect)
        rows = torch.arange(h, device=device)
        columns = torch.arange(w, device=device)
        mask = torch.zeros(b, h, w, device=device)
        left_to_hide = torch.full((b, 1), float(count), device=device)
        searching = torch.ones(b, 1, dtype=torch.bool, device=device)
        for _ in range(MAX_BLOCKS):
            draws = torch.rand(4, b, TRIES, device=device)
            # When less is left than min_block the interval is reversed, and still uniform: so it is in BEiT's generator.
            area = min_block + draws[0] * (left_to_hide - min_block)
            aspect = torch.exp(log_aspect * (1 - 2 * draws[1]))
            height = torch.round(torch.sqrt(area * aspect))  # [b t], as all of a try
            width = torch.round(torch.sqrt(area / aspect))
            top = torch.floor(draws[2] * (h - height + 1))
            left = torch.floor(draws[3] * (w - width + 1))
            in_rows = within(rows, top, height)  # [b t h]
            in_columns = within(columns, left, width)  # [b t w]
            added = height * width - ((in_rows @ mask) * in_columns).sum(2)
            fits = searching & (height < h) & (width < w) & (added > 0) & (added <= left_to_hide)
            first = fits & (fits.cumsum(1) == 1)
            mask = torch.maximum(mask, (in_rows * first[..., None]).mT @ in_columns)
            left_to_hide = left_to_hide - (added * first).sum(1, keepdim=True)
            searching = fits.any(1, keepdim=True)
            if device.type == "cpu" and not searching.any():  # elsewhere the question costs more than the answer saves
                break
        scores = 2 * mask.flatten(1) + torch.rand(b, h * w, device=device)
        return Mask(rearrange(highest(scores, count), "b (h w) -> b h w", h=h), count)


class AttentiveMasking(Masking):
    """What the teacher attends to is likelier to stay visible: MILAN's semantic-aware sampling (Hou et al., 2022), MaskAlign's.

    The visible patches are sampled one after the other, without replacement, the attention of the teacher's CLS token being
    their probability.

    Args:
        ratio: the share of patches to hide, in (0, 1); `round(ratio * h * w)` in every image. Two numbers are the ends of an
            interval, from which one is drawn for each batch.

    Raises:
        ValueError: the ratio is outside (0, 1); on `attach`, the teacher has no attention to sample by; on use, the ratio hides
            no patch of the grid, or every patch.
    """

    attention: Callable[[Tensor, Grid], Tensor]

    def __init__(self, ratio: Ratio = 0.75) -> None:
        super().__init__()
        ends(ratio)
        self.ratio = ratio

    def attach(self, teacher: TargetGenerator) -> None:
        """Takes `teacher.attention`, which gives the CLS attention of each patch: images, grid -> [b h w]."""
        if not hasattr(teacher, "attention"):
            raise UserError(f"AttentiveMasking samples by a teacher's attention, and {type(teacher).__name__} has none")
        attending: Any = teacher
        self.attention = attending.attention

    def forward(self, images: Tensor, grid_size: Grid) -> Mask:
        h, w = grid_size
        count = drawn_count(self.ratio, h * w)
        attention = rearrange(self.attention(images, grid_size), "b h w -> b (h w)").float()
        smallest = torch.finfo(attention.dtype).tiny  # a patch of no attention at all can still be drawn, as the last
        # Exponential clocks of these rates ring in the order of such a sampling; torch.multinomial would wait for the device.
        clocks = torch.empty_like(attention).exponential_() / attention.clamp(min=smallest)
        return Mask(rearrange(highest(clocks, count), "b (h w) -> b h w", h=h), count)


class NoMasking(Masking):
    """Nothing is hidden: plain feature distillation, whose loss is on all patches (`selection: all`)."""

    def forward(self, images: Tensor, grid_size: Grid) -> Mask:
        return Mask(torch.zeros(len(images), *grid_size, dtype=torch.bool, device=images.device), 0)


def within(cells: Tensor, start: Tensor, length: Tensor) -> Tensor:
    """Of whole numbers [b t]: 1 at the cells [n] from start to start + length, that one excluded, 0 elsewhere, [b t n]"""
    reached, not_passed = cells + 1 - start[..., None], (start + length)[..., None] - cells  # at least 1, or at most 0
    return reached.clamp(0, 1) * not_passed.clamp(0, 1)


def highest(scores: Tensor, count: int) -> Tensor:
    """[b n] -> bool [b n], True at the `count` highest scores of each row."""
    indices = scores.topk(count, dim=1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, indices, True)
