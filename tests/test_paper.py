"""The methods of the paper's table against independent implementations: transformers', torch's, scikit-learn's, or a literal
loop written here from the method's description."""

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import all_tokens
from einops import rearrange, repeat
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BeitConfig,
    BeitForMaskedImageModeling,
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    FlavaImageCodebook,
    FlavaImageCodebookConfig,
    SwinConfig,
    SwinForMaskedImageModeling,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder, ViTMAEEmbeddings

from unimim import (
    AttentiveMasking,
    CenteredSoftmax,
    CodebookTarget,
    CosineLoss,
    DecoderHead,
    DVAETarget,
    EMAHeadTarget,
    EMATarget,
    FeatureTarget,
    InstanceNorm,
    LayerNorm,
    LinearHead,
    Mask,
    MaskedImageModeling,
    MaskTokenStudent,
    MeanColorTarget,
    PixelTarget,
    PromptingDecoderHead,
    PrototypeHead,
    RandomMasking,
    SoftCrossEntropyLoss,
    VisibleStudent,
    VQKDTarget,
)
from unimim.letters.interfaces import Masking, TargetGenerator
from unimim.letters.targets.tokens import kmeans
from unimim.shapes import Grid

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_BASE = "vit_base_patch16_clip_quickgelu_224.openai"
KINDS = ("weight", "bias")

TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
"""What all plain transformers of this file are: a 4x4 grid, two blocks; below, the same in transformers' words."""
THEIRS = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 96,
}


# --- what the references share ------------------------------------------------------------------------------------


def noisy(module: nn.Module) -> nn.Module:
    """Every parameter random: fresh networks hold zeros and ones, behind which a missing or swapped tensor hides."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.2)
    return module.eval()


def epsilons(module: nn.Module) -> set[float]:
    """Of its layer norms: large activations, as noise gives them, hardly show it."""
    return {norm.eps for norm in module.modules() if isinstance(norm, nn.LayerNorm)}


def close(ours: Tensor, theirs: Tensor) -> None:
    """1e-5, and of something that varies."""
    assert theirs.numel() == 1 or theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def scaled(images: Tensor, mean: tuple = IMAGENET_MEAN, std: tuple = IMAGENET_STD) -> Tensor:
    """[0, 1] -> what a reference is fed."""
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def some(count: int, b: int = 2, cells: int = 16) -> Tensor:
    """Random masks bool [b cells], with `count` hidden."""
    return torch.rand(b, cells).argsort(1) < count


class GivenMask(Masking):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        return self.mask[: len(images)]


class GivenTarget(TargetGenerator):
    """Long [b h w] or float [b h w c]."""

    def __init__(self, target: Tensor, dim: int) -> None:
        super().__init__()
        self.target = target
        self.dim = dim

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        return self.target[: len(images)]


def equation(**parts: object) -> MaskedImageModeling:
    return MaskedImageModeling(**{"normalization": nn.Identity(), "head": LinearHead, **parts}).eval()


def moved(theirs: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """Takes weights and biases out of `theirs`: their name -> our name."""
    return {f"{ours}.{kind}": theirs.pop(f"{name}.{kind}") for name, ours in names.items() for kind in KINDS}


def moved_block(theirs: dict[str, Tensor], source: str, place: str) -> dict[str, Tensor]:
    """Takes a transformer block of transformers' ViT, ViTMAE, BEiT or Swin out of `theirs`, and gives it timm's names."""
    names = {
        "layernorm_before": "norm1",
        "attention.o_proj": "attn.proj",
        "layernorm_after": "norm2",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    block = moved(theirs, {f"{source}.{name}": f"{place}.{ours}" for name, ours in names.items()})
    attention = f"{source}.attention"
    block[f"{place}.attn.qkv.weight"] = torch.cat([theirs.pop(f"{attention}.{letter}_proj.weight") for letter in "qkv"])
    if f"{attention}.k_proj.bias" in theirs:
        block[f"{place}.attn.qkv.bias"] = torch.cat([theirs.pop(f"{attention}.{letter}_proj.bias") for letter in "qkv"])
    else:
        for letter in "qv":
            block[f"{place}.attn.{letter}_bias"] = theirs.pop(f"{attention}.{letter}_proj.bias")
    for number in (1, 2):
        if f"{source}.lambda_{number}" in theirs:
            block[f"{place}.gamma_{number}"] = theirs.pop(f"{source}.lambda_{number}")
    return block


def load_all(module: nn.Module, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Strictly on both sides: nothing of ours keeps its own value, nothing of theirs is left over."""
    assert not theirs
    module.load_state_dict(ours, strict=True)


def patches(images: Tensor, patch: int) -> Tensor:
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch, q=patch)


# --- MAE ----------------------------------------------------------------------------------------------------------

DECODER = {"width": 32, "depth": 3, "num_heads": 4}


def mae_config(**changes: object) -> ViTMAEConfig:
    decoder = {
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 3,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 128,
    }
    return ViTMAEConfig(**{**THEIRS, **decoder, "mask_ratio": 0.75, "layer_norm_eps": 1e-6, **changes})


def moved_encoder(theirs: dict[str, Tensor], prefix: str, depth: int) -> dict[str, Tensor]:
    """Embeddings and blocks of a ViT with learned positions; its final norm is elsewhere in each."""
    ours = {
        "cls_token": theirs.pop(f"{prefix}.embeddings.cls_token"),
        "pos_embed": theirs.pop(f"{prefix}.embeddings.position_embeddings"),
        **moved(theirs, {f"{prefix}.embeddings.patch_embeddings.projection": "patch_embed.proj"}),
    }
    for index in range(depth):
        ours.update(moved_block(theirs, f"{prefix}.layers.{index}", f"blocks.{index}"))
    return ours


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_mae_is_transformers_mae(norm_pix_loss: bool) -> None:
    reference = noisy(ViTMAEForPreTraining(mae_config(norm_pix_loss=norm_pix_loss)))
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = reference(scaled(images), noise=torch.rand(3, 16))
    mask = expected.mask.bool().view(3, 4, 4)  # theirs: 1 = removed
    assert mask.flatten(1).sum(1).tolist() == [12, 12, 12]
    student = VisibleStudent("vit_tiny_patch16_224", TIMM)
    model = equation(
        teacher=PixelTarget(8),
        normalization=LayerNorm(unbiased=True) if norm_pix_loss else nn.Identity(),
        masking=GivenMask(mask),
        student=student,
        head=partial(DecoderHead, **DECODER),
        loss=nn.MSELoss(),
    )
    theirs = dict(reference.state_dict())
    encoder = {**moved_encoder(theirs, "vit", 2), **moved(theirs, {"vit.layernorm": "norm"})}
    decoder = {
        "mask_token": theirs.pop("decoder.mask_token").flatten(),
        **moved(theirs, {f"decoder.decoder_{name}": ours for name, ours in (("embed", "embed"), ("norm", "norm"))}),
        **moved(theirs, {"decoder.decoder_pred": "predict"}),
    }
    for index in range(3):
        decoder.update(moved_block(theirs, f"decoder.decoder_layers.{index}", f"blocks.{index}"))
    positions = theirs.pop("decoder.decoder_pos_embed")
    if "positions" in model.head.state_dict():
        decoder["positions"] = positions
    load_all(student.backbone, encoder, {})
    load_all(model.head, decoder, theirs)
    assert model.head.positions.shape == positions.shape
    model.head.positions.copy_(positions)
    assert epsilons(model.student) == epsilons(model.head) == {1e-6}
    with torch.no_grad():
        hidden = Mask(mask)
        prediction = model.head(model.student(images, hidden), hidden, hidden)
        close(prediction, expected.logits[expected.mask.bool()])
        close(model.training_step(images, 0), expected.loss)
        everywhere = model.head(model.student(images, hidden), hidden, hidden.full())
    close(everywhere, expected.logits.flatten(0, 1))
    assert expected.loss > 0.5


def sincos_by_hand(h: int, w: int, width: int) -> Tensor:
    """MAE's table: sines and cosines of the column, then of the row, each over frequencies 10000^(-k / (width / 4))."""
    table = torch.zeros(1 + h * w, width, dtype=torch.float64)  # zeros for CLS
    for row in range(h):
        for column in range(w):
            for k in range(width // 4):
                frequency = 10000 ** (-k / (width // 4))
                values = [f(place * frequency) for place in (column, row) for f in (math.sin, math.cos)]
                for quarter, value in enumerate(values):
                    table[1 + row * w + column, quarter * (width // 4) + k] = value
    return table.float()


def test_positions_are_maes_sincos_tables() -> None:
    """Theirs are made for square grids; the same table by hand also for grids that are not."""
    embeddings = ViTMAEEmbeddings(mae_config())
    embeddings.initialize_weights()
    decoder = ViTMAEDecoder(mae_config(), num_patches=16)
    assert decoder.decoder_pos_embed.abs().sum() > 0
    close(sincos_by_hand(4, 4, 24), embeddings.position_embeddings[0])
    student = VisibleStudent("vit_tiny_patch16_224", TIMM, positions="sincos")
    close(student.backbone.pos_embed, embeddings.position_embeddings.detach())
    assert student.backbone.pos_embed.requires_grad is False
    close(DecoderHead(student, PixelTarget(8), **DECODER).positions, decoder.decoder_pos_embed.detach())
    assert VisibleStudent("vit_tiny_patch16_224", TIMM).backbone.pos_embed.requires_grad  # learned, unless asked
    wide = VisibleStudent("vit_tiny_patch16_224", {**TIMM, "img_size": (24, 40)}, positions="sincos")
    close(wide.backbone.pos_embed[0], sincos_by_hand(3, 5, 24))
    head = DecoderHead(wide, PixelTarget(8), **DECODER)
    close(head.positions[0], sincos_by_hand(3, 5, 32))
    assert "positions" not in dict(head.named_parameters())


@torch.no_grad()
def test_sincos_positions_are_added_before_patches_are_dropped() -> None:
    """The fixed table in the student does what the same table as learned positions does in the reference."""
    student = VisibleStudent("vit_tiny_patch16_224", TIMM, positions="sincos")
    table = student.backbone.pos_embed.clone()
    noisy(student)
    student.backbone.pos_embed.copy_(table)
    images, mask = torch.rand(2, 3, 32, 32), some(10)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="", **TIMM).eval()
    plain.load_state_dict(student.backbone.state_dict())
    tokens = plain.patch_embed(scaled(images)) + sincos_by_hand(4, 4, 24)[1:]
    for image in range(2):
        visible = torch.cat([plain.cls_token[0], tokens[image][~mask[image]]])[None]
        close(all_tokens(student(images, Mask(mask.view(2, 4, 4))))[image], plain.norm(plain.blocks(visible))[0])


# --- BEiT ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_beit_is_transformers_beit(shared: bool) -> None:
    config = BeitConfig(
        **THEIRS,
        vocab_size=27,
        use_mask_token=True,
        use_absolute_position_embeddings=False,
        use_relative_position_bias=not shared,
        use_shared_relative_position_bias=shared,
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
        layer_norm_eps=1e-6,
    )
    reference = noisy(BeitForMaskedImageModeling(config))
    images, mask, tokens = torch.rand(2, 3, 32, 32), some(6), torch.randint(27, (2, 16))
    with torch.no_grad():
        expected = reference(scaled(images), bool_masked_pos=mask, labels=tokens[mask])
    model_args = {
        **TIMM,
        "init_values": 0.1,
        "use_abs_pos_emb": False,
        "use_rel_pos_bias": not shared,
        "use_shared_rel_pos_bias": shared,
    }
    model = equation(
        teacher=GivenTarget(tokens.view(2, 4, 4), 27),
        masking=GivenMask(mask.view(2, 4, 4)),
        student=MaskTokenStudent("beit_base_patch16_224", model_args),
        loss=nn.CrossEntropyLoss(),
    )
    theirs = dict(reference.state_dict())
    ours = {
        "cls_token": theirs.pop("beit.embeddings.cls_token"),
        **moved(theirs, {"beit.embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm"}),
    }
    for index in range(2):
        ours.update(moved_block(theirs, f"beit.layers.{index}", f"blocks.{index}"))
        if not shared:
            table = theirs.pop(f"beit.layers.{index}.relative_position_bias.relative_position_bias_table")
            ours[f"blocks.{index}.attn.relative_position_bias_table"] = table
    if shared:
        ours["rel_pos_bias.relative_position_bias_table"] = theirs.pop("beit.shared_position_bias.relative_position_bias_table")
    model.student.mask_token.data.copy_(theirs.pop("beit.embeddings.mask_token").flatten())
    load_all(model.head.linear, {kind: theirs.pop(f"lm_head.{kind}") for kind in KINDS}, {})
    load_all(model.student.backbone, ours, theirs)
    assert epsilons(model.student) == {1e-6}
    selected = Mask(mask.view(2, 4, 4))
    with torch.no_grad():
        close(model.head(model.student(images, selected), selected, selected), expected.logits[mask])
        close(model.training_step(images, 0), expected.loss)


# --- SimMIM -------------------------------------------------------------------------------------------------------


def pixel_shuffle_as_linear(theirs: dict[str, Tensor], patch: int) -> dict[str, Tensor]:
    """SimMIM's 1x1 convolution before a PixelShuffle, (c p q), as one linear layer in the order of MAE's patches, (p q c)."""
    return {
        "weight": rearrange(theirs.pop("decoder.0.weight"), "(c p q) d 1 1 -> (p q c) d", p=patch, q=patch),
        "bias": rearrange(theirs.pop("decoder.0.bias"), "(c p q) -> (p q c)", p=patch, q=patch),
    }


def test_simmim_is_transformers_vit() -> None:
    """Their loss divides by the hidden pixels plus 1e-5, and by 3: a mean up to 1e-8."""
    config = ViTConfig(**THEIRS, encoder_stride=8, layer_norm_eps=1e-6)
    reference = noisy(ViTForMaskedImageModeling(config))
    images, mask = torch.rand(2, 3, 32, 32), some(9)
    with torch.no_grad():
        expected = reference(scaled(images), bool_masked_pos=mask)
    selected = Mask(mask.view(2, 4, 4))
    model = equation(
        teacher=PixelTarget(8),
        masking=GivenMask(selected.tensor),
        student=MaskTokenStudent("vit_tiny_patch16_224", TIMM),
        loss=nn.L1Loss(),
    )
    theirs = dict(reference.state_dict())
    ours = {**moved_encoder(theirs, "vit", 2), **moved(theirs, {"vit.layernorm": "norm"})}
    model.student.mask_token.data.copy_(theirs.pop("vit.embeddings.mask_token").flatten())
    load_all(model.head.linear, pixel_shuffle_as_linear(theirs, 8), {})
    load_all(model.student.backbone, ours, theirs)
    with torch.no_grad():
        prediction = model.head(model.student(images, selected), selected, selected)
        close(prediction, patches(expected.reconstruction, 8)[mask])
        close(model.training_step(images, 0), expected.loss)


def test_simmim_is_transformers_swin() -> None:
    """Two stages, patches of 4 pixels, windows of 4 that are shifted in every second block; hidden are cells of 8 pixels."""
    config = SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=12,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        encoder_stride=8,
        drop_path_rate=0.0,
        layer_norm_eps=1e-5,
    )
    reference = noisy(SwinForMaskedImageModeling(config))
    images, mask = torch.rand(2, 3, 64, 64), some(38, cells=64)
    selected = Mask(mask.view(2, 8, 8))
    with torch.no_grad():
        fine = repeat(selected.tensor, "b h w -> b (h p w q)", p=2, q=2)
        assert torch.equal(fine.view(2, 16, 16)[:, 1::2, ::2], selected.tensor)
        expected = reference(scaled(images), bool_masked_pos=fine)
    model_args = {
        "img_size": 64,
        "patch_size": 4,
        "embed_dim": 12,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "window_size": 4,
        "drop_path_rate": 0.0,
    }
    student = MaskTokenStudent("swin_tiny_patch4_window7_224", model_args)
    assert student.grid_size == (8, 8)
    model = equation(teacher=PixelTarget(8), masking=GivenMask(selected.tensor), student=student, loss=nn.L1Loss())
    theirs = dict(reference.state_dict())
    names = {
        "swin.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "swin.embeddings.norm": "patch_embed.norm",
        "swin.encoder.layers.0.downsample.norm": "layers.1.downsample.norm",
        "swin.layernorm": "norm",
    }
    ours = moved(theirs, names)
    ours["layers.1.downsample.reduction.weight"] = theirs.pop("swin.encoder.layers.0.downsample.reduction.weight")
    for stage, index in itertools.product(range(2), range(2)):
        source, place = f"swin.encoder.layers.{stage}.blocks.{index}", f"layers.{stage}.blocks.{index}"
        ours.update(moved_block(theirs, source, place))
        table = theirs.pop(f"{source}.attention.relative_position_bias.relative_position_bias_table")
        ours[f"{place}.attn.relative_position_bias_table"] = table
    student.mask_token.data.copy_(theirs.pop("swin.embeddings.mask_token").flatten())
    load_all(model.head.linear, pixel_shuffle_as_linear(theirs, 8), {})
    load_all(student.backbone, ours, theirs)
    with torch.no_grad():
        prediction = model.head(student(images, selected), selected, selected)
        close(prediction, patches(expected.reconstruction, 8)[mask])
        close(model.training_step(images, 0), expected.loss)


def test_simmims_masking_hides_units() -> None:
    """Thirty of the 49 cells of 32 pixels, each of two by two patches."""
    torch.manual_seed(1)
    masks = RandomMasking(0.6123, unit=2)(torch.zeros(200, 3, 224, 224), (14, 14)).tensor
    assert masks.shape == (200, 14, 14)
    assert masks.dtype == torch.bool
    cells = torch.zeros(200, 7, 7)
    for row in range(14):
        for column in range(14):
            cells[:, row // 2, column // 2] += masks[:, row, column]
    assert set(cells.unique().tolist()) == {0, 4}
    hidden = (cells == 4).float()
    assert (hidden.sum((1, 2)) == 30).all()
    frequency = hidden.mean(0)  # each cell alike: 30/49 with a standard deviation of 0.035
    assert (frequency - 30 / 49).abs().max() < 5 * 0.035
    assert len(hidden.flatten(1).unique(dim=0)) == 200
    ones = RandomMasking(0.6123)(torch.zeros(2, 3, 224, 224), (14, 14)).tensor
    assert (ones.flatten(1).sum(1) == round(0.6123 * 196)).all()
    wide = RandomMasking(0.5, unit=2)(torch.zeros(3, 3, 8, 8), (4, 6)).tensor
    assert (wide.flatten(1).sum(1) == 12).all()
    blocks = rearrange(wide, "b (h p) (w q) -> b h w (p q)", p=2, q=2)
    assert torch.equal(blocks.all(-1), blocks.any(-1))


@pytest.mark.parametrize("grid_size", [(7, 14), (14, 7), (7, 7)])
def test_units_that_do_not_fill_the_grid(grid_size: Grid) -> None:
    with pytest.raises(ValueError, match="unit") as error:
        RandomMasking(0.6, unit=2)(torch.zeros(2, 3, 224, 224), grid_size)
    assert "\n" not in str(error.value)
    assert f"{grid_size[0]}x{grid_size[1]}" in str(error.value)


# --- CLIP: attention and other sizes ------------------------------------------------------------------------------


def moved_clip(network: nn.Module) -> dict[str, Tensor]:
    """timm's CLIP tower without its projection, under transformers' names."""
    ours = dict(network.state_dict())
    theirs = {
        "embeddings.class_embedding": ours.pop("cls_token").flatten(),
        "embeddings.position_embedding.weight": ours.pop("pos_embed")[0],
        "embeddings.patch_embedding.weight": ours.pop("patch_embed.proj.weight"),
        **moved(ours, {"norm_pre": "pre_layrnorm", "norm": "post_layernorm"}),
    }
    for block in range(2):
        place = f"encoder.layers.{block}"
        names = {
            "norm1": "layer_norm1",
            "attn.proj": "self_attn.out_proj",
            "norm2": "layer_norm2",
            "mlp.fc1": "mlp.fc1",
            "mlp.fc2": "mlp.fc2",
        }
        theirs.update(moved(ours, {f"blocks.{block}.{name}": f"{place}.{other}" for name, other in names.items()}))
        for kind in KINDS:
            thirds = ours.pop(f"blocks.{block}.attn.qkv.{kind}").chunk(3)
            for letter, third in zip("qkv", thirds, strict=True):
                theirs[f"{place}.self_attn.{letter}_proj.{kind}"] = third
    assert set(ours) <= {"head.weight", "head.bias"}
    return theirs


def transformers_clip(network: nn.Module, image_size: int = 32) -> CLIPVisionModel:
    config = CLIPVisionConfig(**{**THEIRS, "image_size": image_size}, hidden_act="quick_gelu", layer_norm_eps=1e-5)
    config._attn_implementation = "eager"
    clip = CLIPVisionModel(config).eval()
    clip.load_state_dict(moved_clip(network), strict=True)
    return clip


@torch.no_grad()
def test_attention_of_cls_is_transformers_clips() -> None:
    """MILAN: what CLS looks at in the last block, as probabilities over all tokens, averaged over the heads."""
    target = FeatureTarget(CLIP_BASE, weights="random", model_args=TIMM)
    for parameter in noisy(target.frozen.network).parameters():
        parameter.mul_(2)  # sharper attention
    images = torch.rand(3, 3, 32, 32)
    clip = transformers_clip(target.frozen.network)
    output = clip(scaled(images, CLIP_MEAN, CLIP_STD), output_attentions=True)
    first, last = (layer.mean(1)[:, 0, 1:].view(3, 4, 4) for layer in output.attentions)
    assert last.amax((1, 2)).min() > 2 * last.amin((1, 2)).max()
    assert not torch.allclose(first, last, atol=1e-2)
    before = target(images, (4, 4))
    attention = target.attention(images, (4, 4))
    close(attention, last)
    assert not attention.requires_grad
    close(target(images, (4, 4)), before)  # looking changes nothing
    close(before, clip.post_layernorm(output.last_hidden_state)[:, 1:].unflatten(1, (4, 4)))
    other = torch.rand(3, 3, 32, 32)  # and one look does not stay for the next images
    seen = clip(scaled(other, CLIP_MEAN, CLIP_STD), output_attentions=True).attentions[-1]
    target.attention(images, (4, 4))
    close(target.attention(other, (4, 4)), seen.mean(1)[:, 0, 1:].view(3, 4, 4))
    target.attention(images, (4, 4))
    features = clip(scaled(other, CLIP_MEAN, CLIP_STD)).last_hidden_state
    close(target(other, (4, 4)), clip.post_layernorm(features)[:, 1:].unflatten(1, (4, 4)))


def dino_resize(positions: Tensor, old: Grid, new: Grid) -> Tensor:
    """[1 1+n d], as BEiT v2's CLIP: bicubic by (new + 0.1) / old, so that rounding down gives `new`; CLS stays."""
    grid = rearrange(positions[:, 1:], "1 (h w) d -> 1 d h w", h=old[0])
    factors = tuple((side + 0.1) / before for side, before in zip(new, old, strict=True))
    grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
    assert grid.shape[-2:] == new
    return torch.cat([positions[:, :1], rearrange(grid, "1 d h w -> 1 (h w) d")], dim=1)


@pytest.mark.parametrize("grid_size", [(3, 3), (7, 7), (3, 6), (5, 4)])
@torch.no_grad()
def test_resized_positions_are_beit_v2s(grid_size: Grid) -> None:
    """A tower built for a 4x4 grid on another; the expected one is built for that grid, with positions by hand."""
    target = FeatureTarget(CLIP_BASE, weights="random", model_args=TIMM)
    network = noisy(target.frozen.network)
    size = (grid_size[0] * 8, grid_size[1] * 8)
    state = dict(network.state_dict())
    by_hand = dino_resize(state["pos_embed"], (4, 4), grid_size)
    plain = F.interpolate(rearrange(state["pos_embed"][:, 1:], "1 (h w) d -> 1 d h w", h=4), grid_size, mode="bicubic")
    assert (rearrange(plain, "1 d h w -> 1 (h w) d") - by_hand[:, 1:]).abs().max() > 1e-3  # the 0.1 is seen
    other = timm.create_model(CLIP_BASE.split(".")[0], **{**TIMM, "img_size": size}).eval()
    other.load_state_dict({**{name: value.clone() for name, value in state.items()}, "pos_embed": by_hand})
    images = torch.rand(2, 3, *size)
    expected = other.forward_features(scaled(images, CLIP_MEAN, CLIP_STD))[:, 1:].unflatten(1, grid_size)
    close(target(images, grid_size), expected)
    close(target(images, grid_size), expected)  # resized once


# --- tokens: DALL-E's dVAE ----------------------------------------------------------------------------------------


def blurred(b: int, height: int, width: int) -> Tensor:
    """Images in [0, 1] whose patches are not all alike."""
    coarse = F.interpolate(torch.rand(b, 3, height // 8, width // 8), (height, width), mode="bilinear")
    return 0.8 * coarse + 0.2 * torch.rand(b, 3, height, width)


@torch.no_grad()
def fake_dalle(path: Path) -> FlavaImageCodebook:
    """transformers' codebook at width 8 with 64 codes; its weights in a file with the names of the published one."""
    codebook = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=64)).eval()
    for parameter in codebook.parameters():
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, a=0.5)
        else:
            nn.init.normal_(parameter, std=0.3)
    for name, parameter in codebook.named_parameters():
        if "conv_4" in name:
            parameter.data.mul_(32)  # else the residual paths, divided by 64, would hardly be seen
    logits = codebook(blurred(64, 32, 32))
    codebook.blocks.output.conv.bias.data.sub_(logits.mean((0, 2, 3)))  # else two or three codes would win everywhere
    published = {}
    for name, value in codebook.state_dict().items():
        stem, kind = name.replace(".group.", ".").replace(".path.", ".").rsplit(".", 1)
        published[f"{stem}.{kind[0]}"] = value  # w, b
    assert "blocks.group_1.block_1.res_path.conv_1.w" in published
    assert {"blocks.input.w", "blocks.group_2.block_1.id_path.b", "blocks.output.conv.w"} <= set(published)
    torch.save(published, path)
    return codebook


def argmax_with_margin(logits: Tensor) -> Tensor:
    """The largest over dim 1, where no rounding could choose another."""
    first, second = logits.topk(2, dim=1).values.unbind(1)
    assert (first - second).min() > 1e-5
    return logits.argmax(1)


@torch.no_grad()
def test_dvae_is_transformers_codebook(tmp_path: Path) -> None:
    codebook = fake_dalle(tmp_path / "dalle.pt")
    target = DVAETarget(weights=str(tmp_path / "dalle.pt"), width=8, codes=64)
    assert target.dim == 64
    images = blurred(4, 32, 48)  # eight pixels a patch: nothing to resize
    tokens = argmax_with_margin(codebook(images * 0.8 + 0.1))
    assert len(tokens.unique()) > 5
    ours = target(images, (4, 6))
    assert ours.dtype == torch.long
    assert torch.equal(ours, tokens)
    assert torch.equal(tokens, codebook.get_codebook_indices(images * 0.8 + 0.1))
    assert not torch.equal(codebook.get_codebook_indices(images), tokens)  # the mapping of pixels is seen


@torch.no_grad()
def test_dvae_sees_eight_pixels_a_patch(tmp_path: Path) -> None:
    codebook = fake_dalle(tmp_path / "dalle.pt")
    target = DVAETarget(weights=str(tmp_path / "dalle.pt"), width=8, codes=64)
    images = blurred(2, 64, 64)
    assert torch.equal(target(images, (8, 8)), argmax_with_margin(codebook(images * 0.8 + 0.1)))
    small = F.interpolate(images, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.equal(target(images, (4, 4)), argmax_with_margin(codebook(small * 0.8 + 0.1)))


# --- tokens: BEiT v2's VQ-KD --------------------------------------------------------------------------------------


def fake_vqkd(path: Path) -> tuple[BeitModel, dict[str, Tensor]]:
    """transformers' BEiT as the tokenizer's encoder, and a file with all names of the published one."""
    config = BeitConfig(
        **THEIRS,
        use_absolute_position_embeddings=True,
        use_relative_position_bias=False,
        use_shared_relative_position_bias=False,
        layer_scale_init_value=0.0,
        use_mean_pooling=True,  # no norm after the last block
        drop_path_rate=0.0,
        layer_norm_eps=1e-6,
    )
    encoder = noisy(BeitModel(config, add_pooling_layer=False))
    theirs = dict(encoder.state_dict())
    ours = {
        "cls_token": theirs.pop("embeddings.cls_token"),
        "pos_embed": theirs.pop("embeddings.position_embeddings"),
        **moved(theirs, {"embeddings.patch_embeddings.projection": "patch_embed.proj"}),
        "fc_norm.weight": 1 + 0.2 * torch.randn(24),
        "fc_norm.bias": 0.2 * torch.randn(24),
    }
    for index in range(2):
        ours.update(moved_block(theirs, f"layers.{index}", f"blocks.{index}"))
    assert not theirs
    published = {f"encoder.{name}": value for name, value in ours.items()}
    published["encode_task_layer.0.weight"] = torch.randn(24, 24) / 2
    published["encode_task_layer.0.bias"] = torch.randn(24) / 5
    published["encode_task_layer.2.weight"] = torch.randn(6, 24) / 5
    published["encode_task_layer.2.bias"] = torch.randn(6) / 20
    codes = F.normalize(torch.randn(50, 6), dim=1) * (0.9 + 0.2 * torch.rand(50, 1))
    published["quantize.embedding.weight"] = codes
    left_aside = {
        "decoder.cls_token": torch.randn(1, 1, 24),
        "decoder.blocks.0.attn.qkv.weight": torch.randn(72, 24),
        "decode_task_layer.0.weight": torch.randn(24, 24),
        "decode_task_layer.2.bias": torch.randn(512),
        "quantize.embedding.cluster_size": torch.rand(50),
        "quantize.embedding.embed_avg": torch.randn(50, 6),
        "quantize.embedding.initted": torch.ones(1),
        "quantize.cluster_size": torch.rand(50),
        "teacher.model.visual.class_embedding": torch.randn(24),
    }
    torch.save({"model": {**published, **left_aside}}, path)
    return encoder, published


@torch.no_grad()
def test_vqkd_is_a_literal_composition(tmp_path: Path) -> None:
    encoder, weights = fake_vqkd(tmp_path / "vqkd.pt")
    target = VQKDTarget(weights=str(tmp_path / "vqkd.pt"), codes=50, code_dim=6, model_args=TIMM)
    assert target.dim == 50
    images = repeat(torch.rand(16, 3, 4, 4).round(), "b c h w -> b c (h p) (w q)", p=8, q=8) * torch.rand(16, 3, 32, 32)
    tokens = encoder(images * 2 - 1).last_hidden_state[:, 1:]
    tokens = F.layer_norm(tokens, (24,), weights["encoder.fc_norm.weight"], weights["encoder.fc_norm.bias"], eps=1e-6)
    hidden = torch.tanh(tokens @ weights["encode_task_layer.0.weight"].T + weights["encode_task_layer.0.bias"])
    vectors = hidden @ weights["encode_task_layer.2.weight"].T + weights["encode_task_layer.2.bias"]
    vectors = vectors / vectors.norm(dim=-1, keepdim=True)
    codes = weights["quantize.embedding.weight"]
    distances = ((vectors[:, :, None] - codes) ** 2).sum(-1)  # b n codes
    expected = argmax_with_margin(-distances.flatten(0, 1)).view(16, 4, 4)
    assert len(expected.unique()) > 5
    ours = target(images, (4, 4))
    assert ours.dtype == torch.long
    assert torch.equal(ours, expected)


# --- tokens: the nearest code, k-means, mean colours ----------------------------------------------------------------


def nearest_by_hand(vectors: Iterable[Tensor], codes: Tensor) -> list[int]:
    chosen = []
    for vector in vectors:
        distances = [float(((vector.double() - code.double()) ** 2).sum()) for code in codes]
        nearest, second = sorted(distances)[:2]
        assert second - nearest > 1e-6
        chosen.append(distances.index(nearest))
    return chosen


@pytest.mark.parametrize("normalize", [False, True])
def test_codebook_takes_the_nearest_code(tmp_path: Path, normalize: bool) -> None:
    vectors = torch.randn(3, 4, 5, 7) * (0.5 + torch.rand(3, 4, 5, 1))
    codes = torch.randn(20, 7) * (0.2 + 2 * torch.rand(20, 1))
    torch.save(codes, tmp_path / "codes.pt")
    target = CodebookTarget(GivenTarget(vectors, 7), codes=20, codebook=str(tmp_path / "codes.pt"), normalize=normalize)
    assert target.dim == 20
    tokens = target(torch.rand(3, 3, 8, 8), (4, 5))
    assert tokens.dtype == torch.long
    asked = vectors / vectors.norm(dim=-1, keepdim=True) if normalize else vectors  # the codes are taken as they are
    expected = nearest_by_hand(asked.flatten(0, 2), codes)
    assert tokens.shape == (3, 4, 5)
    assert tokens.flatten().tolist() == expected
    assert (vectors.flatten(0, 2) @ codes.T).argmax(1).tolist() != expected  # distance, not a product


def colours_by_hand(images: Tensor, grid_size: Grid, bits: int) -> Tensor:
    height, width = images.shape[-2] // grid_size[0], images.shape[-1] // grid_size[1]
    tokens = torch.zeros(len(images), *grid_size, dtype=torch.long)
    for b, row, column in itertools.product(range(len(images)), range(grid_size[0]), range(grid_size[1])):
        for channel in range(3):
            patch = images[b, channel, row * height : (row + 1) * height, column * width : (column + 1) * width]
            place = min(int(float(patch.double().mean()) * 2**bits), 2**bits - 1)
            tokens[b, row, column] += place * (2**bits) ** (2 - channel)
    return tokens


@pytest.mark.parametrize("bits", [1, 3])
def test_mean_colours(bits: int) -> None:
    """The first vision transformer's: red counts most, white is in the last bin."""
    images = 0.9 * repeat(torch.rand(4, 3, 3, 5), "b c h w -> b c (h p) (w q)", p=4, q=4) + 0.1 * torch.rand(4, 3, 12, 20)
    images[0, :, :4, :4] = 1
    images[0, :, :4, 4:8] = 0
    target = MeanColorTarget(bits)
    assert target.dim == 2 ** (3 * bits)
    tokens = target(images, (3, 5))
    assert tokens.dtype == torch.long
    assert torch.equal(tokens, colours_by_hand(images, (3, 5), bits))
    assert tokens[0, 0, :2].tolist() == [target.dim - 1, 0]
    assert len(tokens.unique()) > min(7, 8 * bits)


def test_mean_colours_have_three_bits_unless_asked() -> None:
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 0.8
    assert MeanColorTarget().dim == 512
    assert MeanColorTarget()(red, (1, 1)).item() == 6 * 64
    assert MeanColorTarget()(red.roll(1, 1), (1, 1)).item() == 6 * 8
    assert MeanColorTarget()(red.roll(2, 1), (1, 1)).item() == 6


# --- data2vec -----------------------------------------------------------------------------------------------------


def literal_average(student: MaskTokenStudent, name: str, model_args: dict, images: Tensor, top: int) -> Tensor:
    """A network of its own with the student's weights; each of its top blocks' outputs layer-normalized, then averaged."""
    network = timm.create_model(name, num_classes=0, global_pool="", **model_args).eval()
    network.load_state_dict(student.backbone.state_dict())
    outputs: list[Tensor] = []
    for block in network.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    with torch.no_grad():
        network.forward_features(scaled(images))
    normed = [F.layer_norm(output, output.shape[-1:]) for output in outputs[-top:]]
    return (sum(normed) / top)[:, 1:].unflatten(1, (4, 4))


DEEP = {**TIMM, "depth": 3}
BEIT = {**DEEP, "init_values": 0.1, "use_abs_pos_emb": False}


@pytest.mark.parametrize(("name", "model_args"), [("vit_tiny_patch16_224", DEEP), ("beit_base_patch16_224", BEIT)])
@pytest.mark.parametrize("top", [1, 2, 3])
def test_data2vecs_target(name: str, model_args: dict, top: int) -> None:
    student = noisy(MaskTokenStudent(name, model_args))
    target = EMATarget(top_blocks=top)
    target.attach(student)
    assert target.dim == 24
    images = torch.rand(2, 3, 32, 32)
    close(target(images, (4, 4)), literal_average(student, name, model_args, images, top))


def test_data2vecs_teacher_sees_the_whole_image() -> None:
    """Even while the student works on a hidden one: the mask is not in the copy."""
    student = noisy(MaskTokenStudent("vit_tiny_patch16_224", DEEP))
    images, mask = torch.rand(2, 3, 32, 32), Mask(some(9).view(2, 4, 4))
    student(images, mask)
    target = EMATarget(top_blocks=2)
    target.attach(student)
    expected = literal_average(student, "vit_tiny_patch16_224", DEEP, images, 2)
    during = []
    hook = student.backbone.blocks[0].register_forward_pre_hook(lambda *_: during.append(target(images, (4, 4))))
    hidden = student(images, mask)
    hook.remove()
    close(during[0], expected)
    close(target(images, (4, 4)), expected)
    assert not torch.allclose(hidden.patches, student(images, Mask(torch.zeros_like(mask.tensor))).patches, atol=1e-2)
    assert not target(images, (4, 4)).requires_grad


def cosine(start: float, end: float, progress: float) -> float:
    return end - (end - start) * (1 + math.cos(math.pi * progress)) / 2


@pytest.mark.parametrize("final", [None, 0.98])
def test_data2vecs_average_in_closed_form(final: float | None) -> None:
    """A student that moves by one step each time: after k of them a constant momentum lags m (1 - m^k) / (1 - m) behind."""
    student = noisy(MaskTokenStudent("vit_tiny_patch16_224", DEEP))
    target = EMATarget(top_blocks=2, momentum=0.7, final_momentum=final)
    target.attach(student)
    head = LinearHead(student, target)
    target.attach_head(head)
    start = {name: value.detach().clone() for name, value in student.backbone.named_parameters()}
    step = {name: torch.randn_like(value) for name, value in start.items()}
    k = 5
    momenta = [0.7 if final is None else cosine(0.7, final, i / k) for i in range(1, k + 1)]
    for i in range(1, k + 1):
        with torch.no_grad():
            for name, value in student.backbone.named_parameters():
                value.copy_(start[name] + i * step[name])
        target.update(student, head, i / k)
    way = sum(i * (1 - momenta[i - 1]) * math.prod(momenta[i:]) for i in range(1, k + 1))
    if final is None:
        assert way == pytest.approx(k - 0.7 * (1 - 0.7**k) / 0.3)
    else:
        assert momenta[-1] == pytest.approx(0.98)
        assert momenta[1] == pytest.approx(0.7 + 0.28 * (1 - math.cos(0.4 * math.pi)) / 2)
    expected = noisy(MaskTokenStudent("vit_tiny_patch16_224", DEEP))
    expected.backbone.load_state_dict({name: start[name] + way * step[name] for name in start})
    teacher = teacher_parameters(target, set(start))
    for name, value in teacher.items():
        close(value, start[name] + way * step[name])
    images = torch.rand(2, 3, 32, 32)
    theirs = literal_average(expected, "vit_tiny_patch16_224", DEEP, images, 2)
    torch.testing.assert_close(target(images, (4, 4)), theirs, rtol=1e-4, atol=1e-4)


def teacher_parameters(target: TargetGenerator, names: set[str]) -> dict[str, Tensor]:
    """The backbone inside an EMA target, by the names that the student's own has."""
    found = {}
    for full, value in target.state_dict().items():
        for name in names:
            if full == name or full.endswith(f".{name}"):
                assert name not in found
                found[name] = value
    assert set(found) == names
    return found


# --- iBOT ---------------------------------------------------------------------------------------------------------


def literal_prototypes(head: PrototypeHead, dims: tuple[int, int, int, int]) -> nn.Module:
    """DINO's head of torch's own parts: an MLP, then length 1, then a weight-normalized layer whose lengths are 1."""
    width, hidden, bottleneck, prototypes = dims
    mlp = nn.Sequential(
        nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
    )
    last = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
    last.parametrizations.weight.original0.data.fill_(1)
    linears = [module for module in head.modules() if isinstance(module, nn.Linear)]
    for ours, theirs in zip(linears[:3], (mlp[0], mlp[2], mlp[4]), strict=True):
        theirs.load_state_dict(ours.state_dict())
    (directions,) = [p for p in head.parameters() if p.shape == (prototypes, bottleneck)]
    last.parametrizations.weight.original1.data.copy_(directions)
    counted = sum(p.numel() for p in mlp.parameters()) + directions.numel()
    assert counted == sum(p.numel() for p in head.parameters())  # nothing else, and no bias at the end

    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.last = mlp, last

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.mlp(tokens)
            return self.last(x / x.norm(dim=-1, keepdim=True))

    return Literal()


@torch.no_grad()
def test_prototypes_are_a_weight_normalized_layer() -> None:
    student = noisy(MaskTokenStudent("vit_tiny_patch16_224", TIMM))
    head = noisy(PrototypeHead(student, GivenTarget(torch.zeros(0), 19), hidden=40, bottleneck=12))
    literal = literal_prototypes(head, (24, 40, 12, 19))
    images, mask = torch.rand(2, 3, 32, 32), Mask(some(7).view(2, 4, 4))
    tokens = student(images, mask)
    for selected in (mask, ~mask, mask.full()):
        cosines = head(tokens, mask, selected)
        close(cosines, literal(tokens.grid()[selected.tensor]))
        assert cosines.abs().max() <= 1 + 1e-6


@torch.no_grad()
def test_ibots_teacher_is_an_average_of_student_and_head() -> None:
    """Before any step it says of the whole image what student and head say; then it follows both."""
    student = noisy(MaskTokenStudent("vit_tiny_patch16_224", TIMM))
    target = EMAHeadTarget(prototypes=19, momentum=0.6, final_momentum=1.0)
    target.attach(student)
    assert target.dim == 19
    head = noisy(PrototypeHead(student, target, hidden=40, bottleneck=12))
    target.attach_head(head)
    images = torch.rand(2, 3, 32, 32)
    nothing, everything = Mask(torch.zeros(2, 4, 4, dtype=torch.bool)), Mask(torch.ones(2, 4, 4, dtype=torch.bool))

    def whole(student: MaskTokenStudent, head: PrototypeHead) -> Tensor:
        return head(student(images, nothing), nothing, everything).view(2, 4, 4, 19)

    close(target(images, (4, 4)), whole(student, head))
    modules = (student.backbone, head)
    average = [{name: value.clone() for name, value in module.state_dict().items()} for module in modules]
    for progress in (0.25, 0.75):
        noisy(student)
        noisy(head)
        target.update(student, head, progress)
        m = cosine(0.6, 1.0, progress)
        for module, kept in zip(modules, average, strict=True):
            for name, value in module.state_dict().items():
                kept[name] = m * kept[name] + (1 - m) * value
    for module, kept in zip(modules, average, strict=True):
        module.load_state_dict(kept)
    close(target(images, (4, 4)), whole(student, head))


def test_centered_softmax_in_closed_form() -> None:
    """iBOT: a batch is centred by what the batches before it left; the center is their mean, weighted 0.1 * 0.9^age."""
    normalization = CenteredSoftmax(11, temperature=0.07, momentum=0.9).train()
    batches = [0.3 * torch.randn(4, 3, 5, 11) + torch.randn(11) * 0.2 for _ in range(6)]
    for k, batch in enumerate(batches):
        center = sum(0.1 * 0.9 ** (k - 1 - i) * batches[i].mean((0, 1, 2)) for i in range(k)) if k else torch.zeros(11)
        logits = (batch - center) / 0.07
        exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
        close(normalization(batch), exponentials / exponentials.sum(-1, keepdim=True))
    center = sum(0.1 * 0.9 ** (5 - i) * batches[i].mean((0, 1, 2)) for i in range(6))
    (kept,) = normalization.state_dict().values()  # it goes on where a checkpoint left it
    close(kept.flatten(), center)


def test_the_center_rests_in_eval_mode() -> None:
    normalization = CenteredSoftmax(11)
    batch = torch.randn(4, 3, 5, 11) + torch.arange(11)
    normalization.eval()
    for _ in range(3):
        torch.testing.assert_close(normalization(batch), (batch / 0.07).softmax(-1))
    normalization.train()
    normalization(batch)
    normalization.eval()
    moved_once = normalization(batch)
    close(moved_once, ((batch - 0.1 * batch.mean((0, 1, 2))) / 0.07).softmax(-1))
    close(normalization(batch), moved_once)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_soft_cross_entropy(temperature: float) -> None:
    cosines, probabilities = torch.rand(13, 7) * 2 - 1, torch.randn(13, 7).softmax(-1)
    loss = SoftCrossEntropyLoss(temperature)(cosines, probabilities)
    close(loss, -(probabilities * (cosines / temperature).log_softmax(-1)).sum(-1).mean())
    close(loss, F.cross_entropy(cosines / temperature, probabilities))
    one_hot = F.one_hot(torch.arange(13) % 7, 7).float()
    classes = nn.CrossEntropyLoss()(cosines / temperature, torch.arange(13) % 7)
    close(SoftCrossEntropyLoss(temperature)(cosines, one_hot), classes)
    torch.testing.assert_close(SoftCrossEntropyLoss()(cosines, one_hot), SoftCrossEntropyLoss(0.1)(cosines, one_hot))


# --- MILAN --------------------------------------------------------------------------------------------------------


def attend(weights: dict[str, Tensor], queries: Tensor, context: Tensor, heads: int) -> Tensor:
    """[q d] over [k d] -> [q d], one head and one query after the other."""
    width = queries.shape[-1]
    size = width // heads
    (wq, wk, wv), (bq, bk, bv) = weights["attention.in_proj_weight"].chunk(3), weights["attention.in_proj_bias"].chunk(3)
    q, k, v = queries @ wq.T + bq, context @ wk.T + bk, context @ wv.T + bv
    result = torch.zeros_like(queries)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for row in range(len(queries)):
            scores = (k[:, part] * q[row, part]).sum(1) / math.sqrt(size)
            shares = scores.exp() / scores.exp().sum()
            result[row, part] = (shares[:, None] * v[:, part]).sum(0)
    return result @ weights["attention.out_proj.weight"].T + weights["attention.out_proj.bias"]


def normed(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


@torch.no_grad()
def test_prompting_decoder_by_hand() -> None:
    """MILAN: masked tokens are the queries; keys and values are the fixed visible ones with CLS, and the masked ones."""
    student = noisy(VisibleStudent("vit_tiny_patch16_224", TIMM))
    head = PromptingDecoderHead(student, GivenTarget(torch.zeros(0), 10), width=16, depth=2, num_heads=4)
    noisy(head)
    head.positions.copy_(torch.randn_like(head.positions))
    images, mask = torch.rand(3, 3, 32, 32), some(11, b=3)
    given = student(images, Mask(mask.view(3, 4, 4)))
    tokens = all_tokens(given)
    assert epsilons(head) == {1e-6}
    weights = head.state_dict()
    expected = torch.zeros(3, 16, 10)
    for image in range(3):
        hidden = mask[image]
        projected = tokens[image] @ weights["embed.weight"].T + weights["embed.bias"]  # CLS, then the visible ones
        places = head.positions[0, 1:]
        fixed = torch.cat([projected[:1] + head.positions[0, :1], projected[1:] + places[~hidden]])
        x = weights["mask_token"].flatten() + places[hidden]
        for index in range(2):
            block = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"blocks.{index}.")}
            queries = normed(block, "norm1", x)
            x = x + attend(block, queries, torch.cat([fixed, queries]), heads=4)
            inner = F.gelu(normed(block, "norm2", x) @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"])
            x = x + inner @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]
        together = torch.zeros(16, 16)
        together[hidden], together[~hidden] = x, fixed[1:]
        expected[image] = normed(weights, "norm", together) @ weights["predict.weight"].T + weights["predict.bias"]
    grid = Mask(mask.view(3, 4, 4))
    for selected in (grid, grid.full(), ~grid, Mask(some(5, b=3).view(3, 4, 4))):
        close(head(given, grid, selected), expected[selected.tensor.flatten(1)])


class Attentive(TargetGenerator):
    """A teacher whose attention is given, the same for every image."""

    dim = 3

    def __init__(self, attention: Tensor) -> None:
        super().__init__()
        self.given = attention

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        return torch.zeros(len(images), *grid_size, 3)

    def attention(self, images: Tensor, grid_size: Grid) -> Tensor:
        return self.given.expand(len(images), -1, -1)


def exact_probabilities(shares: list[float], kept: int) -> dict[tuple[int, ...], float]:
    """Of every set that drawing one after the other without replacement can give."""
    probabilities: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(len(shares)), kept):
        chance, left = 1.0, 1.0
        for index in order:
            chance *= shares[index] / left
            left -= shares[index]
        key = tuple(sorted(order))
        probabilities[key] = probabilities.get(key, 0.0) + chance
    return probabilities


def chance_of(kept: Tensor, probabilities: dict[tuple[int, ...], float]) -> float:
    """p of the chi-square test; bool [draws cells], True = kept."""
    counts = Counter(tuple(row.nonzero().flatten().tolist()) for row in kept)
    assert set(counts) <= set(probabilities)
    statistic = sum((counts[key] - len(kept) * p) ** 2 / (len(kept) * p) for key, p in probabilities.items())
    freedom = torch.tensor((len(probabilities) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 3), (0.67, 2)])
def test_attentive_masking_draws_without_replacement(ratio: float, kept: int) -> None:
    """Kept patches are drawn by CLS's attention, whose sum over patches is below one: its look at itself is not among them."""
    torch.manual_seed(2)
    attention = torch.tensor([[0.30, 0.05, 0.15], [0.02, 0.20, 0.08]])
    shares = (attention.flatten() / attention.sum()).tolist()
    probabilities = exact_probabilities(shares, kept)
    assert sum(probabilities.values()) == pytest.approx(1)
    draws = 20_000
    masking = AttentiveMasking(ratio)
    masking.attach(Attentive(attention))
    masks = masking(torch.zeros(draws, 3, 2, 3), (2, 3)).tensor
    assert masks.dtype == torch.bool
    assert masks.shape == (draws, 2, 3)
    assert (masks.flatten(1).sum(1) == 6 - kept).all()
    assert chance_of(~masks.flatten(1), probabilities) > 1e-6
    top = torch.rand(draws, 6) * attention.flatten()  # a sampler that is nearly right is told apart
    wrong = torch.zeros(draws, 6, dtype=torch.bool).scatter(1, top.topk(kept, dim=1).indices, True)
    assert chance_of(wrong, probabilities) < 1e-6
    if kept == 3:
        assert chance_of(masks.flatten(1), probabilities) < 1e-6  # and one that hides what it should keep


def test_attentive_masking_hides_an_exact_count() -> None:
    """Three quarters of 14x14 as in MILAN, also where a softmax left nearly nothing for most patches."""
    attention = torch.rand(14, 14).mul(60).sub(60).exp()
    masking = AttentiveMasking(0.75)
    masking.attach(Attentive(attention))
    masks = masking(torch.zeros(64, 3, 14, 14), (14, 14)).tensor
    assert (masks.flatten(1).sum(1) == 147).all()
    assert not masks[:, attention == attention.max()].any()
    few = torch.rand(14, 14).argsort(1) < 2  # 28 patches get all of the attention, 49 stay
    masking.attach(Attentive(few / 28))
    masks = masking(torch.zeros(64, 3, 14, 14), (14, 14)).tensor
    assert (masks.flatten(1).sum(1) == 147).all()
    assert not masks[:, few].any()
    assert len(masks.flatten(1).unique(dim=0)) == 64


# --- k-means ------------------------------------------------------------------------------------------------------


def test_kmeans_is_scikit_learns() -> None:
    """Lloyd's iterations from the same centres."""
    torch.manual_seed(3)
    points = torch.randn(8, 5)[torch.randint(8, (400,))] * 2 + 0.7 * torch.randn(400, 5)
    start = points[torch.randperm(400)[:8]]
    for iterations in (1, 3, 10):
        reference = KMeans(8, init=start.double().numpy(), n_init=1, max_iter=iterations, tol=0, algorithm="lloyd")
        reference.fit(points.double().numpy())
        expected = torch.from_numpy(np.array(reference.cluster_centers_)).float()
        close(kmeans(points, start, iterations), expected)


# --- normalization and loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_instance_norm_is_torchs(eps: float) -> None:
    target = torch.randn(3, 4, 5, 7) * (0.1 + torch.rand(3, 1, 1, 7)) + torch.randn(3, 1, 1, 7)
    expected = nn.InstanceNorm2d(7, eps=eps)(rearrange(target, "b h w c -> b c h w"))
    close(InstanceNorm(eps)(target), rearrange(expected, "b c h w -> b h w c"))


def test_instance_norms_eps_is_torchs() -> None:
    target = torch.randn(2, 3, 3, 4) * 1e-3
    close(InstanceNorm()(target), nn.InstanceNorm2d(4)(target.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_cosine_loss(weight: float) -> None:
    """MILAN's 2 - 2 cos is the weight 2."""
    prediction, target = torch.randn(9, 6) * 3, torch.randn(9, 6) * (0.1 + torch.rand(9, 1))
    expected = weight * (1 - nn.CosineSimilarity(dim=-1)(prediction, target)).mean()
    close(CosineLoss(weight)(prediction, target), expected)
    close(CosineLoss(weight)(prediction, 5 * F.normalize(target, dim=-1)), expected)
    close(CosineLoss()(prediction, prediction), torch.zeros(()))
