"""S, the student: an untouched timm backbone and the hook through which it sees the corrupted image."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from einops import rearrange, repeat
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from unimim.errors import UserError
from unimim.initialization import SCHEMES, Init, Token, check_init, fill_positions, initialize_backbone
from unimim.interfaces import RGB, Student
from unimim.selection import inverse, pick, places


class MaskTokenStudent(Student):
    """Masked patches are replaced by one learned token after the patch embedding, and all tokens go through the backbone.

    BEiT's way (Bao et al., 2022), also SimMIM's, MaskFeat's and MaskDistill's. Works on timm's ViT, BEiT, EVA and Swin.

    Args:
        backbone: a timm name, such as `vit_base_patch16_224` or `beit_base_patch16_224`.
        model_args: further arguments of the timm model, such as `img_size` or `drop_path_rate`.
        mean: of the pixels in [0, 1], by which the student normalizes them (ImageNet's unless the recipe says otherwise).
        std: their standard deviation, likewise.
        init: how the weights begin: as timm has them, or as an official code has them, "beit" (BEiT, BEiT v2, data2vec, EVA),
            "simmim_vit" (also feature distillation), "simmim_swin", "mae" (also MILAN, dBOT, MaskAlign), "maskfeat" or "ibot".
            Values and sources stand in `unimim.initialization`. The head follows, unless it has its own.
        decayed: parameters that get weight decay though tokens, positions and bias tables commonly get none, as in the official
            code: `cls_token`, `mask_token` (a decoder's too), `pos_embed`, `relative_position_bias_table`.

    Raises:
        ValueError: timm has no such name or argument, the backbone does not start with a patch embedding, or `init` or
            `decayed` is unknown or not for this backbone.
    """

    def __init__(
        self,
        backbone: str,
        model_args: dict[str, Any] | None = None,
        mean: RGB = IMAGENET_DEFAULT_MEAN,
        std: RGB = IMAGENET_DEFAULT_STD,
        init: Init = "timm",
        decayed: Sequence[Token] = (),
    ) -> None:
        super().__init__(backbone, model_args, mean, std)
        patch_embed: Any = self.backbone.patch_embed
        refuse_mixing(self)
        self.mask_token = nn.Parameter(torch.zeros(patch_embed.proj.out_channels))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        begin(self, init, decayed)
        if init != "timm":
            SCHEMES[init].mask_token(self.mask_token)
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


class VisibleStudent(Student):
    """Masked patches are dropped once positions are added: the backbone sees the visible ones only.

    MAE's way (He et al., 2022), also MILAN's, dBOT's and MaskAlign's. Works on timm's ViT and EVA; BEiT's bias of every
    pair of patches and Swin's windows need the whole grid.

    Args:
        backbone: a timm name, such as `vit_base_patch16_224`.
        model_args: further arguments of the timm model, such as `img_size` or `drop_path_rate`.
        mean: of the pixels in [0, 1], by which the student normalizes them (ImageNet's unless the recipe says otherwise).
        std: their standard deviation, likewise.
        positions: "learned", or "sincos" for MAE's fixed table.
        init: how the weights begin: as timm has them, or as an official code has them, "beit" (BEiT, BEiT v2, data2vec, EVA),
            "simmim_vit" (also feature distillation), "simmim_swin", "mae" (also MILAN, dBOT, MaskAlign), "maskfeat" or "ibot".
            Values and sources stand in `unimim.initialization`. The head follows, unless it has its own.
        decayed: parameters that get weight decay though tokens, positions and bias tables commonly get none, as in the official
            code: `cls_token`, `mask_token` (a decoder's too), `pos_embed`, `relative_position_bias_table`.

    Raises:
        ValueError: timm has no such name or argument, the backbone cannot drop patches, or has no positions to fill, or
            `init` or `decayed` is unknown or not for this backbone.
    """

    drops_patches = True

    def __init__(
        self,
        backbone: str,
        model_args: dict[str, Any] | None = None,
        mean: RGB = IMAGENET_DEFAULT_MEAN,
        std: RGB = IMAGENET_DEFAULT_STD,
        positions: Literal["learned", "sincos"] = "learned",
        init: Init = "timm",
        decayed: Sequence[Token] = (),
    ) -> None:
        super().__init__(backbone, model_args, mean, std)
        if not isinstance(self.backbone, (VisionTransformer, Eva)):
            raise UserError(f"{backbone} needs the whole grid and cannot drop patches: use MaskTokenStudent, or a ViT or EVA")
        refuse_mixing(self)
        begin(self, init, decayed)
        if positions == "sincos":
            if self.backbone.pos_embed is None:
                raise UserError(f"positions='sincos': {backbone} has no table of positions to fill")
            fill_positions(self.backbone, None)
            self.backbone.pos_embed.requires_grad_(False)
        elif positions != "learned":
            raise UserError(f"model.student.positions is {positions!r}, known are 'learned' and 'sincos'")
        self._mask: Tensor | None = None
        if isinstance(self.backbone, Eva):
            self.backbone.patch_drop = KeptIndices()  # type: ignore[assignment]
        self.backbone.patch_drop.register_forward_hook(self._drop)

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """[b 3 H W] in [0, 1], bool [b h w] -> [b prefix+visible d], the visible patches in row-major order"""
        self._mask = mask
        try:
            return self.backbone.forward_features(self.normalize(images))
        finally:
            self._mask = None

    def _drop(self, module: nn.Module, inputs: tuple[Tensor], output: Any) -> Any:
        if self._mask is None:  # someone calls the backbone by itself
            return output
        (tokens,) = inputs
        prefix = self.num_prefix_tokens
        shown = inverse(self._mask)
        h, w = self.grid_size
        patches = rearrange(tokens[:, prefix:], "b (h w) d -> b h w d", h=h, w=w)
        visible = rearrange(pick(patches, shown), "(b n) d -> b n d", b=len(tokens))
        kept = torch.cat([tokens[:, :prefix], visible], dim=1)
        if not isinstance(module, KeptIndices):
            return kept
        return kept, places(shown, visible.shape[1])


class KeptIndices(nn.Module):
    """Fills the slot for patch dropout of timm's EVA, which wants tokens and the indices of the kept patches (None: all)."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """[b prefix+n d] -> the same, None"""
        return tokens, None


def begin(student: Student, init: Init, decayed: Sequence[Token]) -> None:
    """Gives a student its first weights and notes what the head and the optimizer will ask for.

    Raises:
        ValueError: `init` or `decayed` is unknown, or not for this backbone.
    """
    check_init("model.student.init", init)
    if unknown := [name for name in decayed if name not in get_args(Token)]:
        raise UserError(f"model.student.decayed has {unknown}, known are {', '.join(get_args(Token))}")
    initialize_backbone(student.backbone, init)
    student.init, student.decayed = init, tuple(decayed)


def refuse_mixing(student: Student) -> None:
    """
    Raises:
        ValueError: the patch embedding of the student's backbone looks beyond a patch, so that masked pixels would leak.
    """
    patch_embed: Any = student.backbone.patch_embed
    proj = patch_embed.proj
    patch = tuple(side // cells for side, cells in zip(student.image_size, patch_embed.grid_size, strict=True))
    if not isinstance(proj, nn.Conv2d) or not proj.kernel_size == proj.stride == patch or any(proj.padding):
        raise UserError(f"{student.name} mixes patches before it embeds them, masked ones would leak: use a plain ViT or BEiT")
