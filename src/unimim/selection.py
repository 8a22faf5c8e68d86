"""Which patches: indices of a known number, for which no step waits."""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor


def counted(mask: Tensor, count: int) -> Tensor:
    """The mask, bool [b h w] with `count` True in each image, which says so from now on to `pick` and `places`.

    Where a mask does not say how many it has, whoever indexes by it has to wait for the device, and the result is the same.
    One made in inference mode, where torch does not see changes in place, does not say it.
    """
    carrying: Any = mask
    if not mask.is_inference():
        carrying.counted = (count, mask._version)
    return mask


def count_of(mask: Tensor) -> int | None:
    """How many are True in each image, where the mask says it and was not changed in place since."""
    count, version = vars(mask).get("counted", (None, None))
    return count if version is not None and version == mask._version else None


def inverse(mask: Tensor) -> Tensor:
    """`~mask`, counted where the mask is."""
    count = count_of(mask)
    return ~mask if count is None else counted(~mask, mask[0].numel() - count)


def places(mask: Tensor, count: int) -> Tensor:
    """bool [b ...] with `count` True in each image -> long [b count]: where they are, in row-major order."""
    return (~mask.flatten(1)).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]


def pick(values: Tensor, mask: Tensor) -> Tensor:
    """`values[mask]`: [b h w ...], bool [b h w] -> [m ...], without a wait where the mask is counted."""
    count = count_of(mask)
    if count is None:
        return values[mask]
    return values.flatten(0, mask.ndim - 1).index_select(0, rows(places(mask, count), mask[0].numel()))


def rows(indices: Tensor, length: int, start: int = 0) -> Tensor:
    """long [b k], places in each image -> long [b k], flat: `length` places an image, those given count from `start`."""
    first = torch.arange(len(indices), device=indices.device) * length + start
    return rearrange(indices + first[:, None], "b k -> (b k)")


def put(tokens: Tensor, at: Tensor, values: Tensor) -> Tensor:
    """A copy of [b n d] with the values [b k d] in the rows `at`, long [b k], flat."""
    everywhere = tokens.flatten(0, 1).index_copy(0, at, values.flatten(0, 1).to(tokens.dtype))
    return rearrange(everywhere, "(b n) d -> b n d", b=len(tokens))
