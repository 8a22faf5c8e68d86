"""S, the student: an untouched timm backbone and the hook through which it sees the corrupted image."""

from typing import Any

import torch
from einops import rearrange, repeat
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from unimim.interfaces import RGB, Student


class MaskTokenStudent(Student):
    """Masked patches are replaced by one learned token after the patch embedding, and all tokens go through the backbone.

    BEiT's way (Bao et al., 2022), also SimMIM's, MaskFeat's and MaskDistill's. Works on timm's ViT and BEiT.

    Args:
        backbone: a timm name, such as `vit_base_patch16_224` or `beit_base_patch16_224`.
        model_args: further arguments of the timm model, such as `img_size` or `drop_path_rate`.
        mean, std: statistics by which the student normalizes pixels (ImageNet's unless the recipe says otherwise).

    Raises:
        ValueError: timm has no such name or argument, or the backbone does not start with a patch embedding.
    """

    def __init__(
        self,
        backbone: str,
        model_args: dict[str, Any] | None = None,
        mean: RGB = IMAGENET_DEFAULT_MEAN,
        std: RGB = IMAGENET_DEFAULT_STD,
    ) -> None:
        super().__init__(backbone, model_args, mean, std)
        patch_embed: Any = self.backbone.patch_embed
        proj, grid = patch_embed.proj, patch_embed.grid_size
        patch = tuple(side // cells for side, cells in zip(self.image_size, grid, strict=True))
        if not isinstance(proj, nn.Conv2d) or not proj.kernel_size == proj.stride == patch or any(proj.padding):
            raise ValueError(f"{backbone} mixes patches before it embeds them, masked ones would leak: use a plain ViT or BEiT")
        self.mask_token = nn.Parameter(torch.zeros(patch_embed.proj.out_channels))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self._mask: Tensor | None = None
        patch_embed.register_forward_hook(self._insert)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """[b 3 H W] in [0, 1], bool [b h w] -> [b h w d]"""
        h, w = self.grid_size
        self._mask = mask
        try:
            tokens = self.backbone.forward_features(self.normalize(images))
        finally:
            self._mask = None
        if tokens.ndim == 4:  # hierarchical backbones keep the grid
            return tokens
        return rearrange(tokens[:, self.num_prefix_tokens :], "b (h w) d -> b h w d", h=h, w=w)

    def _insert(self, module: Any, inputs: tuple[Tensor], tokens: Tensor) -> Tensor:
        if self._mask is None:  # someone calls the backbone by itself
            return tokens
        rows, columns = (fine // coarse for fine, coarse in zip(module.grid_size, self.grid_size, strict=True))
        mask = repeat(self._mask, "b h w -> b (h p) (w q) 1", p=rows, q=columns)
        if tokens.ndim == 3:
            mask = rearrange(mask, "b h w 1 -> b (h w) 1")
        return torch.where(mask, self.mask_token.to(tokens.dtype), tokens)
