"""The mask, a value that travels through a step: some patches of each image, and how many, so that no step waits."""

from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from unimim.errors import UserError
from unimim.shapes import Grid


class Mask:
    """Some patches of each image: the hidden ones, which M returns, or those that a term selects.

    Every image has the same number of them, known as a plain number. So indexing needs no answer from a device, and no shape
    in a step depends on the data. A mask is not changed in place: another one is another `Mask`.

    Args:
        tensor: bool [b h w], True at the patches.
        count: how many are True in each image. None counts them, for which a GPU has to be waited for.
        predicted: of the hidden patches, those that are to be predicted; None: all of them.

    Raises:
        ValueError: the tensor is not bool [b h w], or, where it is counted, images have different numbers of patches.
    """

    def __init__(self, tensor: Tensor, count: int | None = None, predicted: "Mask | None" = None) -> None:
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.bool or tensor.ndim != 3:
            given = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise UserError(f"a mask is made of a bool tensor [b h w], True = hidden, not of {given}")
        if count is None:
            counts = sorted(set(tensor.flatten(1).sum(1).tolist()))
            if len(counts) > 1:
                raise UserError(
                    f"a mask hides {counts[0]} and {counts[1]} patches of two images: it has to be one count in every image"
                )
            count = counts[0] if counts else 0
        self.tensor = tensor
        self.count = count
        self.predicted = self if predicted is None else predicted

    @property
    def grid_size(self) -> Grid:
        """(h, w)"""
        _, h, w = self.tensor.shape
        return h, w

    @property
    def cells(self) -> int:
        """h * w"""
        h, w = self.grid_size
        return h * w

    def __invert__(self) -> "Mask":
        return Mask(~self.tensor, self.cells - self.count)

    def full(self) -> "Mask":
        """Gives all patches of the same images."""
        return Mask(torch.ones_like(self.tensor), self.cells)

    @cached_property
    def indices(self) -> Tensor:
        """long [b count]: the places of the patches in each image, in row-major order."""
        return (~self.tensor.flatten(1)).to(torch.uint8).argsort(dim=1, stable=True)[:, : self.count]

    @cached_property
    def rows(self) -> Tensor:
        """long [b * count]: the same places, counted through the whole batch."""
        first = torch.arange(len(self.tensor), device=self.tensor.device) * self.cells
        return rearrange(self.indices + first[:, None], "b k -> (b k)")

    def of(self, values: Tensor) -> Tensor:
        """Takes the values of the patches: [b h w ...] -> [m ...], m = b * count, in row-major order."""
        return values.flatten(0, 2).index_select(0, self.rows)

    def take(self, tokens: Tensor) -> Tensor:
        """Takes the tokens of the patches: [b n d] of all patches -> [b count d]"""
        return rearrange(tokens.flatten(0, 1).index_select(0, self.rows), "(b k) d -> b k d", b=len(tokens))

    def put(self, tokens: Tensor, values: Tensor) -> Tensor:
        """Gives a copy of the tokens [b n d] of all patches with the values [b count d] at the patches."""
        everywhere = tokens.flatten(0, 1).index_copy(0, self.rows, values.flatten(0, 1).to(tokens.dtype))
        return rearrange(everywhere, "(b n) d -> b n d", b=len(tokens))

    def __repr__(self) -> str:
        b, h, w = self.tensor.shape
        return f"Mask({self.count} of {h}x{w} patches in each of {b} images)"


class WholeImage:
    """Stands for the image as a whole: a term selects it when its target is [b c], not of patches."""

    count = 1

    def of(self, values: Tensor) -> Tensor:
        """Takes all: [b c] -> [b c]"""
        return values


Selection = Mask | WholeImage
