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
from unimim.letters.initialization import SCHEMES, Init, Token, check_init, fill_positions, initialize_backbone
from unimim.letters.interfaces import Student
from unimim.letters.mask import Mask
from unimim.letters.tokens import Tokens
from unimim.shapes import RGB
from unimim.weights.models import create_backbone


class TimmStudent(Student):
    """What both students share: a timm model as the backbone. It is what pretraining is for, and stays timm's own.

    Args:
        backbone: a timm name; built with `global_pool=''` and `num_classes=0`, so that it ends in its final norm.
        model_args: further arguments of the timm model, such as `img_size` or `drop_path_rate`.
        mean: of the pixels in [0, 1], by which they are normalized. It also becomes the `mean` of `backbone.pretrained_cfg`, so
            that whoever gets the backbone feeds it the same.
        std: their standard deviation, likewise.

    Raises:
        ValueError: timm has no such name, the model does not take these arguments, its image is not a whole number of
            patches, or mean and std are not those of pixels in [0, 1].
    """

    def __init__(
        self,
        backbone: str,
        model_args: dict[str, Any] | None = None,
        mean: RGB = IMAGENET_DEFAULT_MEAN,
        std: RGB = IMAGENET_DEFAULT_STD,
    ) -> None:
        super().__init__(mean, std)
        self.name = backbone
        self.model_args = dict(model_args or {})
        if taken := [key for key in ("num_classes", "global_pool", "patch_drop_rate") if key in self.model_args]:
            raise UserError(
                f"model.student.model_args cannot hold {', '.join(taken)}: a student has no classifier, and masking "
                f"is model.masking's"
            )
        self.backbone = create_backbone(backbone, {"num_classes": 0, "global_pool": "", **self.model_args})
        if not hasattr(getattr(self.backbone, "patch_embed", None), "grid_size") or not hasattr(self.backbone, "feature_info"):
            raise UserError(f"{backbone} has no patch embedding: a student is a ViT, BEiT, EVA or Swin")
        self.backbone.pretrained_cfg = {**self.backbone.pretrained_cfg, "mean": tuple(mean), "std": tuple(std)}
        height, width = self.backbone.patch_embed.img_size
        reduction = self.backbone.feature_info[-1]["reduction"]
        if height % reduction or width % reduction:
            raise UserError(
                f"{backbone} with img_size {height}x{width}: that is no whole number of its patches of {reduction} pixels"
            )
        self.image_size = height, width
        self.grid_size = height // reduction, width // reduction
        self.embed_dim = int(self.backbone.num_features)
        self.num_prefix_tokens = getattr(self.backbone, "num_prefix_tokens", 0)

    def ask(self, blocks: Sequence[int]) -> None:
        """Adds these blocks to those whose tokens come out, by index from 0.

        Raises:
            ValueError: the backbone has no such block, or one of another width or grid.
        """
        known = self.backbone.feature_info
        of_last = known[-1]["num_chs"], known[-1]["reduction"]
        for block in blocks:
            if not 0 <= block < len(known) or (known[block]["num_chs"], known[block]["reduction"]) != of_last:
                raise UserError(
                    f"model.head asks for the tokens of block {block} of {self.name}, which has blocks 0 to {len(known) - 1}, "
                    f"and of those only the ones of the last width and grid can be given"
                )
        self.blocks = tuple(sorted({*self.blocks, *blocks}))

    def encode(self, images: Tensor, where: Mask) -> Tokens:
        """Runs the backbone on images [b 3 H W] in [0, 1], whose patches `where` get tokens."""
        images = self.normalize(images)
        if not self.blocks:
            return self.split(self.backbone.forward_features(images), where, {})
        prefix: Any = {"return_prefix_tokens": True} if self.num_prefix_tokens else {}
        last, earlier = self.backbone.forward_intermediates(
            images, indices=list(self.blocks), norm=False, output_fmt="NLC", **prefix
        )
        pairs = earlier if prefix else [(patches, patches[:, :0]) for patches in earlier]
        blocks = {block: Tokens(prefix, patches, where) for block, (patches, prefix) in zip(self.blocks, pairs, strict=True)}
        return self.split(last, where, blocks)

    def split(self, tokens: Tensor, where: Mask, blocks: dict[int, Tokens]) -> Tokens:
        """[b prefix+n d], or [b h w d] of a hierarchical backbone -> tokens"""
        if tokens.ndim == 4:
            tokens = rearrange(tokens, "b h w d -> b (h w) d")
        return Tokens(tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :], where, blocks)


class MaskTokenStudent(TimmStudent):
    """Masked patches are replaced by one learned token after the patch embedding, and all tokens go through the backbone.

    BEiT's way (Bao et al., 2022), also SimMIM's, MaskFeat's and MaskDistill's. Works on timm's ViT, BEiT, EVA and Swin.

    Args:
        backbone: a timm name, such as `vit_base_patch16_224` or `beit_base_patch16_224`.
        model_args: further arguments of the timm model, such as `img_size` or `drop_path_rate`.
        mean: of the pixels in [0, 1], by which the student normalizes them (ImageNet's unless the recipe says otherwise).
        std: their standard deviation, likewise.
        init: how the weights begin: as timm has them, or as an official code has them, "beit" (BEiT, BEiT v2, data2vec, EVA),
            "simmim_vit" (also feature distillation), "simmim_swin", "mae" (also MILAN, dBOT, MaskAlign), "maskfeat" or "ibot".
            Values and sources stand in `unimim.letters.initialization`. The head follows, unless it has its own.
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
        self._mask: Mask | None = None
        patch_embed.register_forward_hook(self._insert)

    def forward(self, images: Tensor, mask: Mask) -> Tokens:
        """[b 3 H W] in [0, 1], the hidden patches -> tokens [b p+n d] of all patches"""
        self._mask = mask
        try:
            return self.encode(images, mask.full())
        finally:
            self._mask = None

    def _insert(self, module: Any, inputs: tuple[Tensor], tokens: Tensor) -> Tensor:
        if self._mask is None:  # someone calls the backbone by itself
            return tokens
        rows, columns = (fine // coarse for fine, coarse in zip(module.grid_size, self.grid_size, strict=True))
        mask = repeat(self._mask.tensor, "b h w -> b (h p) (w q) 1", p=rows, q=columns)
        if tokens.ndim == 3:
            mask = rearrange(mask, "b h w 1 -> b (h w) 1")
        return torch.where(mask, self.mask_token.to(tokens.dtype), tokens)


class VisibleStudent(TimmStudent):
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
            Values and sources stand in `unimim.letters.initialization`. The head follows, unless it has its own.
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
        self._visible: Mask | None = None
        if isinstance(self.backbone, Eva):
            self.backbone.patch_drop = KeptIndices()  # type: ignore[assignment]
        self.backbone.patch_drop.register_forward_hook(self._drop)

    def forward(self, images: Tensor, mask: Mask) -> Tokens:
        """[b 3 H W] in [0, 1], the hidden patches -> tokens [b p+n d] of the visible ones"""
        self._visible = ~mask
        try:
            return self.encode(images, self._visible)
        finally:
            self._visible = None

    def _drop(self, module: nn.Module, inputs: tuple[Tensor], output: Any) -> Any:
        if self._visible is None:  # someone calls the backbone by itself
            return output
        (tokens,) = inputs
        prefix = self.num_prefix_tokens
        kept = torch.cat([tokens[:, :prefix], self._visible.take(tokens[:, prefix:])], dim=1)
        return (kept, self._visible.indices) if isinstance(module, KeptIndices) else kept


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
