"""The tokens, a value that travels through a step: what a student says of an image, and of which patches."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from unimim.errors import UserError
from unimim.letters.mask import Mask, Selection, WholeImage


class Tokens(NamedTuple):
    """The tokens of a student, S(M(x)). (torch's shards look for tensors in a named tuple, not in another class.)"""

    prefix: Tensor
    """[b p d]: CLS first, then registers; [b 0 d] of a student that has none."""
    patches: Tensor
    """[b n d]: those of the patches in `where`, in row-major order."""
    where: Mask
    """The patches that have tokens: all of them, or the visible ones."""
    blocks: "dict[int, Tokens]" = {}  # noqa: RUF012 (never changed)
    """The tokens that came out of earlier blocks, not normalized: those that a head names in `student_blocks`."""

    def of(self, selected: Selection) -> Tensor:
        """Takes the tokens of the selected patches [m d], in row-major order; of the whole image CLS, [b d].

        Raises:
            ValueError: the student has no CLS token; or a patch is selected that has no token. (That is looked for on a CPU, so
                at least when the model is built: elsewhere a look waits for the device.)
        """
        if isinstance(selected, WholeImage):
            if not self.prefix.shape[1]:
                raise UserError("selection 'image' is predicted from CLS, and the student's backbone has no such token")
            return self.prefix[:, 0]
        if self.where.count == self.where.cells:
            return rearrange(selected.take(self.patches), "b k d -> (b k) d")
        if selected.tensor.device.type == "cpu" and (selected.tensor & ~self.where.tensor).any():
            raise UserError(
                "the student drops the hidden patches, so a head without a decoder cannot predict them: set model.head to "
                "DecoderHead, or model.selection to visible"
            )
        tokens = rearrange(self.patches, "b n d -> (b n) d")
        if selected.count == self.where.count:  # what is selected has a token: these are all of them
            return tokens
        place = self.where.tensor.flatten(1).cumsum(1) - 1  # [b h*w]: of a patch among those of its image that have tokens
        first = torch.arange(len(place), device=place.device) * self.where.count
        return tokens.index_select(0, rearrange(place + first[:, None], "b n -> (b n)")[selected.rows])

    def grid(self) -> Tensor:
        """Gives the patch tokens on the grid, [b h w d].

        Raises:
            ValueError: only the visible patches have tokens.
        """
        h, w = self.where.grid_size
        if self.where.count != self.where.cells:
            raise UserError("the student drops the hidden patches: its tokens are no whole grid")
        return rearrange(self.patches, "b (h w) d -> b h w d", h=h, w=w)
