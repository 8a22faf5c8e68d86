"""Which patches: indices of a known number, for which no step waits, and a last block that leaves the other patches out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


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


class LastBlock:
    """The last block that is run of a ViT, BEiT or EVA of timm: it can be told which patches' tokens are looked at.

    Then the projection of its attention and its MLP run on these alone. What comes out at the other patches is unfinished.
    The block is timm's own, with hooks installed once; as long as nothing is told, it does what it always does.

    Args:
        block: of a timm model, with `attn.proj` and `mlp`.
        num_prefix_tokens: of the model; they come before the patches' tokens.
    """

    def __init__(self, block: Any, num_prefix_tokens: int) -> None:
        self.num_prefix_tokens = num_prefix_tokens
        self.patches: Tensor | None = None
        self.length = 0
        self.unfinished = 0.0
        for module in (block.attn.proj, block.mlp):
            module.register_forward_pre_hook(self._take)
            module.register_forward_hook(self._put)

    def _take(self, module: nn.Module, inputs: tuple[Tensor]) -> Any:
        """[b prefix+n d] -> [b k d]"""
        if self.patches is None:
            return None
        (tokens,) = inputs
        if tokens.shape[1] != self.length:  # it is for another grid
            return None
        at = rows(self.patches, tokens.shape[1], self.num_prefix_tokens)
        return rearrange(tokens.flatten(0, 1).index_select(0, at), "(b k) d -> b k d", b=len(tokens))

    def _put(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Any:
        """[b k d] -> [b prefix+n d], `unfinished` where nothing was computed"""
        if self.patches is None or output.shape[1] != self.patches.shape[1]:  # `_take` has left it as it was
            return None
        at = rows(self.patches, self.length, self.num_prefix_tokens)
        return put(output.new_full((len(output), self.length, output.shape[-1]), self.unfinished), at, output)


def last_block(network: Any, layer: int = -1) -> LastBlock | None:
    """The block `layer` of a ViT, BEiT or EVA of timm; None of other networks, and of blocks with parallel branches."""
    if not isinstance(network, (VisionTransformer, Beit, Eva)):
        return None
    return told(network.blocks[layer], network.num_prefix_tokens)


def told(block: Any, num_prefix_tokens: int) -> LastBlock | None:
    """The block as one that can be told; None of one that is not made of one attention and one MLP, as timm names them."""
    fits = hasattr(getattr(block, "attn", None), "proj") and hasattr(block, "mlp")
    return LastBlock(block, num_prefix_tokens) if fits else None


@contextmanager
def only(selected: Tensor, blocks: Sequence[LastBlock], unfinished: float = 0.0) -> Iterator[None]:
    """Within it these last blocks finish the tokens of the selected patches, bool [b h w], and no others.

    Args:
        selected: where it does not say its count, or all are, every token is finished.
        blocks: the last of their networks.
        unfinished: what is added to the other tokens instead.
    """
    count, length = count_of(selected), selected[0].numel()
    if count is None or count == length:
        yield
        return
    for block in blocks:
        block.patches, block.length, block.unfinished = places(selected, count), block.num_prefix_tokens + length, unfinished
    try:
        yield
    finally:
        for block in blocks:
            block.patches = None
