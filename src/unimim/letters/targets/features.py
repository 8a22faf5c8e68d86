"""T as the features of a frozen network: CLIP (MaskDistill, MVP, MILAN, EVA), DINO, or any network of the user's."""

from typing import Any, NamedTuple

import torch
from einops import rearrange, reduce
from pytorch_lightning.utilities import rank_zero_info
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from unimim.errors import UserError
from unimim.letters.initialization import Init, check_init, initialize_backbone
from unimim.letters.interfaces import Frozen, TargetGenerator, check_positive, check_statistics
from unimim.letters.positions import resized_positions
from unimim.shapes import RGB, Grid
from unimim.weights.files import chosen_in, description, load_strictly, read_file, state_dict_in
from unimim.weights.fitting import fit
from unimim.weights.models import check_name, check_object, create_backbone, own_seed


class FeatureTarget(TargetGenerator):
    """What a frozen network says of each patch of the whole image.

    The teacher sees the student's own crop, resized to its resolution and normalized by its own mean and std. A feature
    map finer than the student's grid by a whole factor is averaged.

    Args:
        network: a timm name, such as `vit_base_patch16_clip_quickgelu_224.openai` or `vit_base_patch16_224.dino`; or an
            `nn.Module` of yours that maps [b 3 H' W'] to a feature map [b c h' w'], which needs `dim`, `mean` and `std`.
        weights: None takes timm's pretrained weights from the hub; a path loads any file that `load_backbone` reads, or the
            encoder in a checkpoint of this package's pretraining (dBOT's stages: the student of one is the teacher of the
            next); "random" draws a timm network's with a seed of its own, the same in every process and in a run that goes on
            (frozen weights are in no checkpoint). A module of yours comes with its weights, unless a path is given.
        layer: index of the block (timm networks), from 0, or from the end if negative.
        norm: whether the network's final norm follows the block; in CLIP that is `ln_post`.
        project: whether the network's linear head follows the norm; in CLIP that is the projection to 512 (ViT-B).
        resolution: side of the teacher's input in pixels. None: the student's grid times the teacher's patch, so that
            the grids meet; for a module of yours, the size of the images.
        mean: of the teacher's pixels in [0, 1]; None takes that of timm's `pretrained_cfg`.
        std: their standard deviation, likewise.
        dim: c; None asks timm.
        model_args: further arguments of the timm model.
        checkpoint_key: the entry of the file to take, where it has several, as in `load_backbone`.
        init: how weights "random" begin, by its name in `unimim.letters.initialization`; other weights are not touched.

    Raises:
        ValueError: unknown name or `init`, a class in place of a network, weights that do not fit or cannot be had, an
            argument that the network has no use for; on use, grids that do not meet, or a size or a norm that the timm model
            does not take.
        FileNotFoundError: there is no file at `weights`.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: str | nn.Module,
        weights: str | None = None,
        layer: int = -1,
        norm: bool = True,
        project: bool = False,
        resolution: int | None = None,
        mean: RGB | None = None,
        std: RGB | None = None,
        dim: int | None = None,
        model_args: dict[str, Any] | None = None,
        checkpoint_key: str | None = None,
        init: Init = "timm",
    ) -> None:
        super().__init__()
        check_init("model.teacher.init", init)
        self.is_timm = isinstance(network, str)
        if not self.is_timm:
            check_object("model.teacher.network", network, nn.Module, "unimim.EfficientNetLite0(), or the name of a timm model")
        self.name = network if isinstance(network, str) else type(network).__name__
        module: Any = network
        if self.is_timm:
            clip_of_unknown_gelu = "_clip_" in self.name and "_quickgelu_" not in self.name and "." not in self.name
            if clip_of_unknown_gelu and weights not in (None, "random"):
                quick = self.name.replace("_clip_", "_clip_quickgelu_")
                raise UserError(f"{self.name!r} computes GELU: for OpenAI's weights use {quick!r}, else name timm's tag")
            check_name(self.name)
        content = read_file(weights) if weights not in (None, "random") else None
        pretrained = description(content)  # of a checkpoint of our own pretraining
        if pretrained:
            model_args = {"num_classes": 0, "global_pool": "", **pretrained["model_args"], **(model_args or {})}
            mean, std = mean or pretrained["mean"], std or pretrained["std"]
        if self.is_timm:
            with own_seed():
                module = create_backbone(self.name, model_args or {}, pretrained=weights is None)
                if weights == "random":
                    initialize_backbone(module, init)
            blocks = len(module.feature_info)
            if not -blocks <= layer < blocks:
                raise UserError(f"model.teacher.layer is {layer}, but {self.name} has blocks 0 to {blocks - 1}")
            layer %= blocks
            channels = self._projected(module, layer, norm) if project else module.feature_info[layer]["num_chs"]
            if dim not in (None, channels):
                raise UserError(f"model.teacher.dim is {dim}, but block {layer} of {self.name} has {channels}")
            dim = channels
            if content is not None:
                self._fill(module, content, str(weights), model_args or {}, checkpoint_key)
            mean, std = mean or module.pretrained_cfg["mean"], std or module.pretrained_cfg["std"]
        elif (layer, norm, project, model_args, init) != (-1, True, False, None, "timm") or weights == "random":
            raise UserError(
                f"model.teacher: layer, norm, project, model_args, init and weights='random' are for timm's networks; "
                f"{self.name} is your own"
            )
        if dim is None or mean is None or std is None:
            raise UserError(f"model.teacher: a network of your own ({self.name}) needs dim, mean and std beside it")
        check_statistics("model.teacher", mean, std)
        if resolution is not None:
            check_positive("model.teacher", resolution=resolution)
        if content is not None and not self.is_timm:
            load_strictly(module, state_dict_in(content, str(weights), checkpoint_key), str(weights))
        self.dim = dim
        self.layer, self.norm, self.project, self.resolution = layer, norm, project, resolution
        self.frozen = Frozen(module)
        self.resized = False
        self._looked: tuple[Tensor, int, Grid, Seen] | None = None
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def _fill(self, network: Any, content: Any, source: str, model_args: dict[str, Any], checkpoint_key: str | None) -> None:
        """Loads weights in any layout that `load_backbone` reads; of a checkpoint of ours, the encoder."""
        ours = description(content)
        state_dict, entry = (content["state_dict"], "") if ours else chosen_in(content, source, checkpoint_key)
        report = fit(network, state_dict, {**(ours or {}), "name": self.name}, model_args, source, entry=entry)
        rank_zero_info(str(report))

    def _projected(self, network: Any, layer: int, norm: bool) -> int:
        head = getattr(network, "head", None)
        if not isinstance(head, nn.Linear) or not norm or layer != len(network.feature_info) - 1:
            raise UserError(
                f"model.teacher.project needs a linear head behind the last block and its norm; {self.name} with "
                f"layer {layer} and norm {norm} has none (a timm model made with num_classes=0 lost it)"
            )
        return head.out_features

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> float32 [b h w c]"""
        return self.seen(images, grid_size).patches

    def forward_image(self, images: Tensor, grid_size: Grid) -> Tensor:
        """Gives the CLS token of a ViT, behind the same norm and projection as its patches: [b 3 H W] -> float32 [b c]

        Raises:
            ValueError: the network has no CLS token.
        """
        return self.forward_both(images, grid_size)[1]

    def forward_both(self, images: Tensor, grid_size: Grid) -> tuple[Tensor, Tensor]:
        """Gives patches and CLS of one run: [b 3 H W] -> float32 [b h w c], float32 [b c]"""
        self.check_cls("predict")
        seen = self.seen(images, grid_size, prefix=True)
        assert seen.prefix is not None
        return seen.patches, seen.prefix[:, 0]

    def seen(self, images: Tensor, grid_size: Grid, prefix: bool = False) -> "Seen":
        """Looks at the images, unless `attention` has looked at them already."""
        looked, self._looked = self._looked, None
        if looked is not None and looked[0] is images and looked[1:3] == (images._version, grid_size):
            return looked[3]
        return self.look(images, grid_size, prefix=prefix)

    def check_cls(self, purpose: str) -> None:
        """
        Raises:
            ValueError: the network is no ViT of timm with a CLS token.
        """
        network: Any = self.frozen.network
        if not self.is_timm or getattr(network, "cls_token", None) is None or not getattr(network, "num_prefix_tokens", 0):
            raise UserError(f"model.teacher: {self.name} has no CLS token to {purpose}: use a ViT of timm that has one")

    @torch.no_grad()
    def attention(self, images: Tensor, grid_size: Grid) -> Tensor:
        """The attention of CLS to each patch, in the block of the target, mean of its heads.

        [b 3 H W] in [0, 1] -> float32 [b h w]. The teacher runs once: its features wait for `forward` of the same images.

        Raises:
            ValueError: the network is no ViT of timm with a CLS token, or its blocks are others than the plain ones.
        """
        network: Any = self.frozen.network
        if not isinstance(network, VisionTransformer) or network.cls_token is None:
            raise UserError(f"model.teacher: {self.name} has no CLS token to attend: use a ViT of timm that has one")
        block: Any = network.blocks[self.layer]
        if not isinstance(block, Block):
            raise UserError(f"model.teacher: the blocks of {self.name} are no plain ones, whose attention is read here")
        looked = self.look(images, grid_size, prefix=True, with_input=True)
        before = looked.before
        assert before is not None
        self._looked = images, images._version, grid_size, Seen(looked.patches, looked.prefix, None)
        attn: Any = block.attn
        q, k, _ = rearrange(
            attn.qkv(block.norm1(before)), "b n (three heads d) -> three b heads n d", three=3, heads=attn.num_heads
        )
        scores = attn.q_norm(q[:, :, :1]) @ attn.k_norm(k).transpose(-2, -1) * attn.scale
        of_cls = scores.float().softmax(-1).mean(1)[:, 0, network.num_prefix_tokens :]
        fine_h, fine_w = network.patch_embed.grid_size
        (h, w), of_cls = grid_size, rearrange(of_cls, "b (h w) -> b h w", h=fine_h)
        return reduce(of_cls, "b (h p) (w q) -> b h w", "sum", h=h, w=w, p=fine_h // h, q=fine_w // w)

    @torch.no_grad()
    def look(self, images: Tensor, grid_size: Grid, prefix: bool = False, with_input: bool = False) -> "Seen":
        """Runs the network: [b 3 H W] in [0, 1] -> float32 [b h w c]; of a ViT also what else is asked for.

        Args:
            images: [b 3 H W] in [0, 1].
            grid_size: (h, w) of the student.
            prefix: whether CLS and registers are asked for.
            with_input: whether what goes into the block is asked for (and CLS and registers).
        """
        size = self.input_size(images, grid_size)
        images = self.resize(images, size)
        seen = self.features((images - self.mean) / self.std, prefix, with_input)
        features = seen.patches
        if not isinstance(features, Tensor) or features.ndim != 4:
            raise UserError(f"model.teacher: {self.name} has to return a feature map [b c h w], as one tensor")
        features = features.float()
        (h, w), (fine_h, fine_w) = grid_size, features.shape[-2:]
        if features.shape[1] != self.dim or fine_h % h or fine_w % w:
            raise UserError(
                f"the grids of teacher and student do not meet: {self.name} gives {tuple(features.shape[1:])} (c h w) "
                f"at {size[0]}x{size[1]} pixels, the student's grid is {h}x{w} and c is {self.dim}; set "
                f"model.teacher.resolution (now {self.resolution}) or model.teacher.dim"
            )
        features = F.avg_pool2d(features, (fine_h // h, fine_w // w))
        tokens = None if seen.prefix is None else seen.prefix.float()
        return Seen(rearrange(features, "b c h w -> b h w c"), tokens, seen.before)

    def input_size(self, images: Tensor, grid_size: Grid) -> Grid:
        """(H', W') in pixels of what the teacher sees."""
        if self.resolution is not None:
            return self.resolution, self.resolution
        if self.is_timm:
            patch = self.frozen.network.feature_info[self.layer]["reduction"]
            return grid_size[0] * patch, grid_size[1] * patch
        height, width = images.shape[-2:]
        return height, width

    def features(self, images: Tensor, prefix: bool = False, with_input: bool = False) -> "Seen":
        """Normalized images [b 3 H' W'] -> [b c h' w'], and what else is asked for, as in `look`."""
        network: Any = self.frozen.network
        if not self.is_timm:
            return Seen(network(images), None, None)
        fixed = getattr(getattr(network, "patch_embed", None), "img_size", None)
        if fixed not in (None, tuple(images.shape[-2:])):
            if not hasattr(network, "set_input_size") or self.resized:
                raise UserError(
                    f"{self.name} takes {fixed[0]}x{fixed[1]} pixels here, not {images.shape[-2]}x{images.shape[-1]}: "
                    f"set model.teacher.resolution, or make a second FeatureTarget for a second grid"
                )
            self.resized = True  # positions resized twice would have lost detail
            table, old = getattr(network, "pos_embed", None), network.patch_embed.grid_size
            network.set_input_size(img_size=tuple(images.shape[-2:]))  # resizes the positions once, not in every step
            network.requires_grad_(False)  # the positions are a new parameter, in older timm one that learns
            if isinstance(network, VisionTransformer) and network.pos_embed is not None and table is not None:
                network.pos_embed.copy_(resized_positions(table, old, network.patch_embed.grid_size))
        try:
            if with_input:
                seen = self.block_and_input(images)
            else:
                asked: Any = {"return_prefix_tokens": True} if prefix else {}
                (features,) = network.forward_intermediates(
                    images, indices=[self.layer], norm=self.norm, intermediates_only=True, stop_early=True, **asked
                )
                patches, tokens = features if prefix else (features, None)
                seen = Seen(patches, tokens, None)
        except (AssertionError, IndexError, RuntimeError) as error:
            if type(error) not in (AssertionError, IndexError, RuntimeError):  # a device's, as of memory
                raise
            made_for = network.pretrained_cfg["input_size"][-1]
            reason = next(iter(str(error).splitlines()), "") or "no reason given"
            raise UserError(
                f"model.teacher: timm's {self.name} does not give block {self.layer} with norm {self.norm} at "
                f"{images.shape[-2]}x{images.shape[-1]} pixels ({reason}): set model.teacher.resolution (it is made "
                f"for {made_for}), or model.teacher.norm to false"
            ) from error
        if self.project:
            patches = rearrange(network.head(rearrange(seen.patches, "b c h w -> b h w c")), "b h w c -> b c h w")
            seen = Seen(patches, None if seen.prefix is None else network.head(seen.prefix), seen.before)
        return seen

    def block_and_input(self, images: Tensor) -> "Seen":
        """Normalized images [b 3 H' W'] -> of a ViT's block, what comes out and what goes in.

        Nothing is recorded by a hook: compiled, a hook within a block would be passed over without a word.
        """
        network: Any = self.frozen.network
        if self.layer == 0:
            before = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(images))))
        else:
            ((patches, prefix),) = network.forward_intermediates(
                images,
                indices=[self.layer - 1],
                return_prefix_tokens=True,
                norm=False,
                stop_early=True,
                output_fmt="NLC",
                intermediates_only=True,
            )
            before = torch.cat([prefix, patches], dim=1)
        after = network.blocks[self.layer](before)
        after = network.norm(after) if self.norm else after
        prefix, patches = after[:, : network.num_prefix_tokens], after[:, network.num_prefix_tokens :]
        height = network.patch_embed.dynamic_feat_size(images.shape[-2:])[0]
        return Seen(rearrange(patches, "b (h w) d -> b d h w", h=height), prefix, before)


class Seen(NamedTuple):
    """What a run of the network gives."""

    patches: Tensor
    """[b h w c], or as a feature map [b c h w]"""
    prefix: Tensor | None
    """[b p c]: CLS and registers of a ViT, where they were asked for"""
    before: Tensor | None
    """[b p+n d]: what went into the block, where it was asked for"""
