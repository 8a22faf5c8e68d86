"""T against references: MAE's patches, MaskFeat's HOG in loops, transformers' CLIP; and what a frozen network may not do."""

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from unimim import FeatureTarget, Frozen, HOGTarget, LayerNorm, PixelTarget
from unimim.shapes import Grid
from unimim.weights.files import load_strictly, read_state_dict
from unimim.weights.models import refuse_wrong_gelu

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP_BASE = "vit_base_patch16_clip_quickgelu_224.openai"
CLIP_LARGE = "vit_large_patch14_clip_quickgelu_224.openai"


def planes(values: tuple[float, float, float]) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


def fill_with_noise(network: nn.Module) -> None:
    """Every parameter: fresh networks hold zeros and ones, behind which a missing or swapped tensor hides."""
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.5 if parameter.ndim == 1 else 0.05)


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# --- pixels -------------------------------------------------------------------------------------------------------


def mae_patches(images: Tensor, patch: int) -> Tensor:
    """[b 3 H W] -> [b h w c] by slices: within a patch rows, then columns, then channels (MAE's patchify)."""
    b, _, height, width = images.shape
    patches = torch.empty(b, height // patch, width // patch, 3 * patch * patch, dtype=images.dtype)
    for row in range(height // patch):
        for column in range(width // patch):
            block = images[:, :, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            for y in range(patch):
                for x in range(patch):
                    for channel in range(3):
                        patches[:, row, column, (y * patch + x) * 3 + channel] = block[:, channel, y, x]
    return patches


@pytest.mark.parametrize(("patch", "grid_size"), [(16, (2, 3)), (8, (4, 2))])
def test_pixels_are_maes_patches(patch: int, grid_size: Grid) -> None:
    images = torch.rand(2, 3, grid_size[0] * patch, grid_size[1] * patch)
    target = PixelTarget(patch)
    assert target.dim == 3 * patch * patch
    normalized = (images - planes(IMAGENET_MEAN)) / planes(IMAGENET_STD)
    torch.testing.assert_close(target(images, grid_size), mae_patches(normalized, patch))
    own = PixelTarget(patch, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    expected = mae_patches((images - planes((0.1, 0.2, 0.3))) / planes((0.4, 0.5, 0.6)), patch)
    torch.testing.assert_close(own(images, grid_size), expected)


def test_pixels_with_layer_norm_are_maes_norm_pix() -> None:
    """MAE divides by the root of the unbiased variance plus 1e-6; a flat patch becomes zeros."""
    images = torch.rand(2, 3, 16, 16)
    images[0, :, :8, :8] = planes(IMAGENET_MEAN)  # zeros after normalization
    images[1, :, :8, :8] = planes(IMAGENET_MEAN) + 1e-4 * torch.rand(3, 8, 8)  # variance below eps: its place counts
    target = LayerNorm(eps=1e-6, unbiased=True)(PixelTarget(8)(images, (2, 2)))
    for patch, ours in zip(
        mae_patches((images - planes(IMAGENET_MEAN)) / planes(IMAGENET_STD), 8).view(-1, 192), target.view(-1, 192), strict=True
    ):
        mean = patch.sum() / 192
        variance = ((patch - mean) ** 2).sum() / 191
        torch.testing.assert_close(ours, (patch - mean) / (variance + 1e-6) ** 0.5, rtol=1e-5, atol=1e-5)
    assert (target[0, 0, 0] == 0).all()
    biased = LayerNorm(eps=1e-6)(PixelTarget(8)(images, (2, 2)))
    assert not torch.allclose(biased, target, rtol=1e-5, atol=1e-5)  # the 0.3 % between 191 and 192 would be seen


@pytest.mark.parametrize("kind", [PixelTarget, HOGTarget])
def test_a_patch_that_does_not_meet_the_grid(kind: type) -> None:
    with pytest.raises(ValueError, match=r"model\.teacher\.patch_size") as error:
        kind(patch_size=16)(torch.rand(1, 3, 224, 224), (7, 7))
    message = one_line(error)
    assert f"{kind.__name__}(patch_size=16)" in message
    assert "224x224 pixels on a 7x7 grid are patches of 32 pixels" in message
    for size in ((32, 64), (64, 32), (40, 32)):  # each side counts
        with pytest.raises(ValueError, match="do not meet"):
            kind(patch_size=16)(torch.rand(1, 3, *size), (2, 2))


# --- HOG ----------------------------------------------------------------------------------------------------------

SOBEL = ((1, 0, -1), (2, 0, -2), (1, 0, -1))


def mirror(index: int, side: int) -> int:
    """Reflection that does not repeat the border: -1 -> 1, side -> side - 2."""
    return -index if index < 0 else 2 * (side - 1) - index if index >= side else index


def gradients(plane: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[H W] -> gx, gy [H W], pixel by pixel: each the sum of 3x3 neighbours times the Sobel kernel or its transpose."""
    height, width = plane.shape
    across, down = np.zeros_like(plane), np.zeros_like(plane)
    for y in range(height):
        for x in range(width):
            for dy in range(3):
                for dx in range(3):
                    value = plane[mirror(y + dy - 1, height), mirror(x + dx - 1, width)]
                    across[y, x] += SOBEL[dy][dx] * value
                    down[y, x] += SOBEL[dx][dy] * value
    return across, down


def loop_hog(images: np.ndarray, patch: int, cell: int, bins: int) -> tuple[np.ndarray, float]:
    """MaskFeat's HOG in float64, [b 3 H W] -> [b h w c], and how close any pixel's phase comes to the edge of a bin."""
    b, channels, height, width = images.shape
    cells = patch // cell
    histogram = np.zeros((b, height // patch, width // patch, channels, bins, cells, cells))
    closest = math.inf
    for image in range(b):
        for channel in range(channels):
            across, down = gradients(images[image, channel])
            for y in range(height):
                for x in range(width):
                    phase = math.atan2(across[y, x], down[y, x]) / math.pi * bins
                    vote = math.hypot(across[y, x], down[y, x])
                    if vote > 0:
                        closest = min(closest, abs(phase - round(phase)))
                    place = (image, y // patch, x // patch, channel)
                    histogram[(*place, math.floor(phase) % bins, y % patch // cell, x % patch // cell)] += vote
    lengths = np.sqrt((histogram**2).sum(4, keepdims=True))
    return (histogram / np.maximum(lengths, 1e-12)).reshape(*histogram.shape[:3], -1), closest


def images_off_the_edges(b: int, height: int, width: int, bins: int) -> Tensor:
    """Random images in which no pixel's phase is within 1e-4 of the edge of a bin: there rounding may choose either.

    Reflection leaves gx = 0 in the first and the last column, which is the edge at phase 0, unless gy is 0 as well: the
    two outer columns of each side are flat. (In the first and the last row gy = 0, an edge only for an even `bins`.)
    """
    while True:
        images = torch.rand(b, 3, height, width)
        images[..., [0, 1, -2, -1]] = torch.rand(b, 3, 1, 4)
        if loop_hog(images.double().numpy(), 4, 4, bins)[1] > 1e-4:
            return images


@pytest.fixture(scope="module")
def hog_images() -> Tensor:
    """Two images of 32x32, for 9 bins; drawn one by one, since one alone misses the edges more often."""
    torch.manual_seed(0)
    return torch.cat([images_off_the_edges(1, 32, 32, 9) for _ in range(2)])


def test_hog_is_maskfeats(hog_images: Tensor) -> None:
    target = HOGTarget(patch_size=16, cell_size=8, bins=9)
    expected, closest = loop_hog(hog_images.double().numpy(), 16, 8, 9)
    assert closest > 1e-4
    assert target.dim == 108
    hog = target(hog_images, (2, 2))
    assert hog.shape == (2, 2, 2, 108)
    torch.testing.assert_close(hog.double(), torch.from_numpy(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("patch", "cell", "bins", "size"), [(8, 4, 9, (16, 24)), (12, 4, 7, (24, 12)), (8, 8, 5, (8, 24))])
def test_hog_of_other_patches_cells_and_bins(patch: int, cell: int, bins: int, size: Grid) -> None:
    """Grids that are not square, cells in rows of three: an order that is swapped somewhere shows."""
    images = images_off_the_edges(1, *size, bins)
    expected, _ = loop_hog(images.double().numpy(), patch, cell, bins)
    target = HOGTarget(patch, cell, bins)
    hog = target(images, (size[0] // patch, size[1] // patch))
    assert hog.shape[-1] == target.dim == 3 * bins * (patch // cell) ** 2
    torch.testing.assert_close(hog.double(), torch.from_numpy(expected), rtol=0, atol=1e-5)


def test_the_layout_of_hog() -> None:
    """Channel, bin, cell row, cell column: one vertical edge in one cell of one channel lights one number.

    Across such an edge gx is not 0 and gy is: the phase is +9/2 or -9/2, bin 4 of 9 both ways.
    """
    images = torch.zeros(1, 3, 32, 32)
    images[0, 1, :, 26:] = 1  # second channel; the gradient lies on columns 25 and 26: patch column 1, cell column 1
    hog = HOGTarget()(images, (2, 2))[0].view(2, 2, 3, 9, 2, 2)
    lit = [tuple(place) for place in torch.nonzero(hog).tolist()]
    assert lit == [(row, 1, 1, 4, cell, 1) for row in range(2) for cell in range(2)]
    assert (hog[hog > 0] == 1).all()


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_flat_cells_have_an_empty_histogram(level: float) -> None:
    """Zeros, not nan; and no rounding errors scaled to length 1, which Sobel's kernels as a convolution leave."""
    assert (HOGTarget()(torch.full((1, 3, 32, 32), level), (2, 2)) == 0).all()


def test_hog_of_pieces_is_hog_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU works on a few images at a time, five here and then two."""
    images = torch.rand(7, 3, 32, 48)
    whole = HOGTarget()(images, (2, 3))
    monkeypatch.setattr("unimim.letters.targets.hog.PIXELS_AT_ONCE", 6 * images[0].numel() - 1)
    assert torch.equal(HOGTarget()(images, (2, 3)), whole)
    assert torch.equal(torch.cat([HOGTarget()(image[None], (2, 3)) for image in images]), whole)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_pixel_that_is_no_number_spoils_its_cell_alone(value: float) -> None:
    """The target is nan there, which training takes for what it is."""
    images = torch.rand(2, 3, 32, 32)
    clean = HOGTarget()(images, (2, 2))
    images[1, 2, 20, 4] = value
    hog = HOGTarget()(images, (2, 2))
    spoilt = torch.zeros(2, 2, 2, 3, 9, 2, 2, dtype=torch.bool)
    spoilt[1, 1, 0, 2, :, 0, 0] = True
    spoilt = spoilt.flatten(3)
    assert not hog[spoilt].isfinite().all()
    assert torch.equal(hog[~spoilt], clean[~spoilt])


def test_hog_does_not_see_the_normalization_of_pixels(hog_images: Tensor) -> None:
    """MaskFeat feeds normalized images, here pixels lie in [0, 1]: gradients drop the mean, and length 1 drops the std."""
    normalized = (hog_images - planes(IMAGENET_MEAN)) / planes(IMAGENET_STD)
    expected, _ = loop_hog(normalized.double().numpy(), 16, 8, 9)
    for images in (hog_images, normalized):
        hog = HOGTarget()(images, (2, 2)).double()
        torch.testing.assert_close(hog, torch.from_numpy(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hog_keeps_its_precision_under_autocast(hog_images: Tensor, dtype: torch.dtype) -> None:
    plain = HOGTarget()(hog_images, (2, 2))
    with torch.autocast("cpu", dtype=dtype):
        assert F.conv2d(hog_images, torch.ones(1, 3, 1, 1)).dtype == dtype  # a convolution outside loses it
        assert torch.equal(HOGTarget()(hog_images, (2, 2)), plain)
    assert plain.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_hog_in_a_model_of_another_dtype(hog_images: Tensor, dtype: torch.dtype) -> None:
    """Lightning's precisions 64-true and bf16-true convert the whole module, buffers included, and the images."""
    hog = HOGTarget().to(dtype)(hog_images.to(dtype), (2, 2))
    expected = HOGTarget()(hog_images.to(dtype).float(), (2, 2))
    torch.testing.assert_close(hog.float(), expected, rtol=0, atol=1e-5)


def test_cells_that_do_not_fill_the_patch() -> None:
    with pytest.raises(ValueError, match="patch_size 16 is no multiple of cell_size 6") as error:
        HOGTarget(patch_size=16, cell_size=6)
    one_line(error)


# --- features of CLIP, against transformers -----------------------------------------------------------------------


def transformers_clip(state_dict: dict[str, Tensor], blocks: int) -> CLIPVisionModelWithProjection:
    """transformers' vision tower with timm's weights; every key is written by name, and loading is strict."""
    config = CLIPVisionConfig(
        num_hidden_layers=blocks,
        hidden_size=768,
        intermediate_size=3072,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
        projection_dim=512,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    mapped = {
        "vision_model.embeddings.class_embedding": state_dict["cls_token"][0, 0],
        "vision_model.embeddings.position_embedding.weight": state_dict["pos_embed"][0],
        "vision_model.embeddings.patch_embedding.weight": state_dict["patch_embed.proj.weight"],
        "visual_projection.weight": state_dict["head.weight"],
    }
    names = {"norm_pre": "pre_layrnorm", "norm": "post_layernorm"}
    for block in range(blocks):
        theirs = f"encoder.layers.{block}"
        for ours, name in {"norm1": "layer_norm1", "attn.proj": "self_attn.out_proj", "norm2": "layer_norm2"}.items():
            names[f"blocks.{block}.{ours}"] = f"{theirs}.{name}"
        for layer in ("fc1", "fc2"):
            names[f"blocks.{block}.mlp.{layer}"] = f"{theirs}.mlp.{layer}"
        for kind in ("weight", "bias"):
            thirds = state_dict[f"blocks.{block}.attn.qkv.{kind}"].chunk(3)
            for name, third in zip("qkv", thirds, strict=True):
                mapped[f"vision_model.{theirs}.self_attn.{name}_proj.{kind}"] = third
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            mapped[f"vision_model.{theirs}.{kind}"] = state_dict[f"{ours}.{kind}"]
    clip = CLIPVisionModelWithProjection(config).eval()
    clip.load_state_dict(mapped, strict=True)
    return clip


@pytest.fixture(scope="module")
def clip_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a CLIP tower of two blocks, all noise; its projection has no bias, as in CLIP."""
    torch.manual_seed(0)
    network = timm.create_model(CLIP_BASE, depth=2)
    fill_with_noise(network)
    nn.init.zeros_(network.head.bias)
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    torch.save(network.state_dict(), path)
    return path


@torch.no_grad()
def test_clip_is_transformers_clip(clip_weights: Path) -> None:
    """Patch tokens before `ln_post`, after it, and projected; theirs get pixels normalized by CLIP's mean and std."""
    clip = transformers_clip(torch.load(clip_weights, weights_only=True), blocks=2)
    images = torch.rand(2, 3, 224, 224)
    output = clip.vision_model((images - planes(CLIP_MEAN)) / planes(CLIP_STD), output_hidden_states=True)
    before = output.last_hidden_state
    after = clip.vision_model.post_layernorm(before)
    cases = [
        ({"norm": False}, before, 768),
        ({"norm": True}, after, 768),
        ({"norm": True, "project": True}, clip.visual_projection(after), 512),
        ({"norm": False, "layer": 0}, output.hidden_states[1], 768),
        ({"norm": True, "layer": -2}, clip.vision_model.post_layernorm(output.hidden_states[1]), 768),
    ]
    for arguments, tokens, dim in cases:
        target = FeatureTarget(CLIP_BASE, weights=str(clip_weights), model_args={"depth": 2}, **arguments)
        assert target.dim == dim
        expected = tokens[:, 1:].unflatten(1, (14, 14))  # without CLS
        assert expected.std() > 0.1
        torch.testing.assert_close(target(images, (14, 14)), expected, rtol=1e-5, atol=1e-5)
    other = torch.stack([case[1][:, 1:, :512] for case in cases])
    for first in range(len(cases)):
        for second in range(first):
            assert not torch.allclose(other[first], other[second], rtol=1e-2, atol=1e-2)  # no two cases are one


def test_a_teacher_with_patch_14_meets_a_student_with_patch_16() -> None:
    """CLIP ViT-L/14 beside a ViT-B/16: 14 patches of 14 pixels, positions resized once, as BEiT v2's CLIP does it."""
    target = FeatureTarget(CLIP_LARGE, weights="random", model_args={"depth": 1})
    network = target.frozen.network
    nn.init.normal_(network.pos_embed)
    positions = network.pos_embed.clone()
    seen = []
    network.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    images = torch.rand(1, 3, 224, 224)
    features = target(images, (14, 14))
    assert seen == [(1, 3, 196, 196)]
    assert features.shape == (1, 14, 14, 1024)
    assert features.dtype == torch.float32
    assert target.dim == 1024
    grid = positions[:, 1:].transpose(1, 2).unflatten(2, (16, 16))
    resized = F.interpolate(grid, scale_factor=(14.1 / 16, 14.1 / 16), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(network.pos_embed, torch.cat([positions[:, :1], resized], dim=1))
    assert torch.equal(target(images, (14, 14)), features)
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_second_grid_is_refused_where_resizing_again_would_lose_detail() -> None:
    target = FeatureTarget("vit_tiny_patch16_224", weights="random", model_args={"depth": 1, "embed_dim": 12, "num_heads": 2})
    nn.init.normal_(target.frozen.network.pos_embed)
    images = torch.rand(1, 3, 224, 224)
    target(images, (14, 14))  # the network's own size
    small = target(images, (7, 7))
    with pytest.raises(ValueError, match="takes 112x112 pixels here, not 224x224: .* a second FeatureTarget for a second grid"):
        target(images, (14, 14))
    assert torch.equal(target(images, (7, 7)), small)


@pytest.mark.parametrize("returned", [lambda x: [x], lambda x: x.flatten(2)])
def test_a_network_that_returns_no_feature_map(returned: object) -> None:
    class Odd(nn.Module):
        def forward(self, images: Tensor) -> object:
            return returned(images)

    target = FeatureTarget(Odd(), dim=3, mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(ValueError, match=r"Odd has to return a feature map \[b c h w\]"):
        target(torch.rand(1, 3, 8, 8), (2, 2))


# --- features of any network --------------------------------------------------------------------------------------


class Mirror(nn.Module):
    """Returns every `step`-th pixel of what it is fed, and keeps what it was fed."""

    def __init__(self, step: int = 8) -> None:
        super().__init__()
        self.step = step

    def forward(self, images: Tensor) -> Tensor:
        self.fed = images
        return images[:, :, :: self.step, :: self.step]


def mirror_target(**changes: object) -> FeatureTarget:
    return FeatureTarget(**{"network": Mirror(), "dim": 3, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), **changes})


@pytest.mark.parametrize("grid_size", [(4, 4), (8, 4), (2, 8), (8, 8), (1, 1)])
def test_a_finer_map_is_averaged(grid_size: Grid) -> None:
    images = torch.rand(2, 3, 64, 64)
    fine = images[:, :, ::8, ::8]
    target = mirror_target()(images, grid_size)
    rows, columns = 8 // grid_size[0], 8 // grid_size[1]
    assert target.shape == (2, *grid_size, 3)
    for row in range(grid_size[0]):
        for column in range(grid_size[1]):
            cells = fine[:, :, row * rows : (row + 1) * rows, column * columns : (column + 1) * columns]
            torch.testing.assert_close(target[:, row, column], cells.mean((2, 3)))


def test_a_hierarchical_teacher() -> None:
    """Stages of a Swin: the last meets 7x7 at 224 px, an earlier one is finer and is averaged onto that grid."""
    model_args = {"embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)}
    images = torch.rand(1, 3, 224, 224)
    for layer, dim in ((-1, 96), (3, 96), (0, 12)):
        target = FeatureTarget(
            "swin_tiny_patch4_window7_224", "random", layer, norm=False, resolution=224, model_args=model_args
        )
        assert target.dim == dim
        assert target(images, (7, 7)).shape == (1, 7, 7, dim)


@pytest.mark.parametrize("grid_size", [(3, 4), (4, 3), (16, 16), (4, 16), (5, 5)])
def test_grids_that_do_not_meet(grid_size: Grid) -> None:
    with pytest.raises(ValueError, match="the grids of teacher and student do not meet") as error:
        mirror_target()(torch.rand(1, 3, 64, 64), grid_size)
    message = one_line(error)
    assert "(3, 8, 8) (c h w) at 64x64 pixels" in message
    assert f"the student's grid is {grid_size[0]}x{grid_size[1]}" in message
    assert "set model.teacher.resolution (now None)" in message


def test_a_resolution_whose_grid_does_not_meet() -> None:
    tiny = {"depth": 1, "embed_dim": 12, "num_heads": 2}
    target = FeatureTarget("vit_tiny_patch16_224", weights="random", model_args=tiny, resolution=96)
    assert target(torch.rand(1, 3, 32, 32), (3, 3)).shape == (1, 3, 3, 12)
    with pytest.raises(ValueError, match=r"\(12, 6, 6\) .* 4x4 .* \(now 96\)") as error:
        target(torch.rand(1, 3, 32, 32), (4, 4))
    one_line(error)


def test_a_dim_that_is_not_the_networks() -> None:
    with pytest.raises(ValueError, match=r"\(3, 8, 8\) .* c is 5; .* or model\.teacher\.dim") as error:
        mirror_target(dim=5)(torch.rand(1, 3, 64, 64), (4, 4))
    one_line(error)
    with pytest.raises(ValueError, match=r"^model\.teacher\.dim is 5, but block 0 of vit_tiny_patch16_224 has 192$"):
        FeatureTarget("vit_tiny_patch16_224", weights="random", dim=5, model_args={"depth": 1})


@pytest.mark.parametrize("missing", ["dim", "mean", "std"])
def test_a_network_of_ones_own_needs(missing: str) -> None:
    with pytest.raises(ValueError, match=r"model\.teacher: .*\(Mirror\) needs dim, mean and std") as error:
        mirror_target(**{missing: None})
    one_line(error)


@pytest.mark.parametrize(
    "arguments",
    [{"project": True}, {"layer": 3}, {"norm": False}, {"model_args": {"depth": 1}}, {"weights": "random"}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_arguments_that_only_timm_networks_have(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"^model\.teacher: .* are for timm's networks; Mirror is your own$") as error:
        mirror_target(**arguments)
    assert next(iter(arguments)) in one_line(error)


@pytest.mark.parametrize("arguments", [{"norm": False}, {"layer": 0}, {"model_args": {"depth": 2, "num_classes": 0}}], ids=str)
def test_a_projection_that_is_not_there(arguments: dict) -> None:
    with pytest.raises(ValueError, match=r"model\.teacher\.project needs a linear head") as error:
        FeatureTarget("vit_tiny_patch16_224", "random", project=True, **{"model_args": {"depth": 2}, **arguments})
    one_line(error)


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_is_not_there(layer: int) -> None:
    with pytest.raises(ValueError, match=rf"^model\.teacher\.layer is {layer}, but vit_tiny_patch16_224 has blocks 0 to 1$"):
        FeatureTarget("vit_tiny_patch16_224", "random", layer=layer, model_args={"depth": 2})


# --- what the network is fed --------------------------------------------------------------------------------------


def test_the_teachers_own_statistics() -> None:
    images = torch.rand(2, 3, 32, 32)
    target = mirror_target(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    features = target(images, (4, 4))
    expected = (images - planes((0.1, 0.2, 0.3))) / planes((0.4, 0.5, 0.6))
    torch.testing.assert_close(target.frozen.network.fed, expected)
    torch.testing.assert_close(features, expected[:, :, ::8, ::8].permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("vit_tiny_patch16_224", {}, ((0.5,) * 3, (0.5,) * 3)),
        ("vit_tiny_patch16_224", {"mean": IMAGENET_MEAN}, (IMAGENET_MEAN, (0.5,) * 3)),
        ("vit_tiny_patch16_224", {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}, ((0.0,) * 3, (1.0,) * 3)),
        ("vit_small_patch16_224.dino", {}, (IMAGENET_MEAN, IMAGENET_STD)),
        ("vit_base_patch16_clip_quickgelu_224.openai", {}, (CLIP_MEAN, CLIP_STD)),
    ],
)
def test_a_timm_network_gets_the_statistics_of_its_weights(name: str, given: dict, expected: tuple) -> None:
    tiny = {"depth": 1, "embed_dim": 12, "num_heads": 2, "img_size": 32}
    target = FeatureTarget(name, weights="random", model_args=tiny, **given)
    fed = []
    target.frozen.network.patch_embed.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0]))
    images = torch.rand(1, 3, 32, 32)
    target(images, (2, 2))
    torch.testing.assert_close(fed[0], (images - planes(expected[0])) / planes(expected[1]))


def test_pixels_are_clamped_after_the_resize_and_before_the_statistics() -> None:
    """Bicubic interpolation overshoots at sharp edges; a network was never trained on such pixels."""
    images = (torch.rand(2, 3, 32, 32) > 0.5).float()
    raw = F.interpolate(images, (48, 48), mode="bicubic", antialias=True)
    assert raw.min() < -0.05
    assert raw.max() > 1.05
    target = mirror_target(resolution=48, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    target(images, (3, 3))
    fed = target.frozen.network.fed
    assert fed.shape[-2:] == (48, 48)
    torch.testing.assert_close(fed, (raw.clamp(0, 1) - 0.5) / 0.25)


def test_the_resize_is_pillows_bicubic() -> None:
    """BEiT v2 makes the teacher's view of the same crop with Pillow; ours differs by its rounding to 256 steps only."""
    coarse = torch.rand(1, 3, 28, 28)
    smooth = F.interpolate(coarse, (224, 224), mode="bicubic").clamp(0, 1)
    pixels = (smooth * 255).round()
    target = mirror_target(network=Mirror(14), resolution=196)
    target(pixels / 255, (14, 14))
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).byte().numpy()).resize((196, 196), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    assert (target.frozen.network.fed - expected).abs().max() < 1.5 / 255


def test_images_of_the_right_size_are_not_touched() -> None:
    target = mirror_target(resolution=32)
    images = torch.rand(1, 3, 32, 32)
    target(images, (4, 4))
    assert torch.equal(target.frozen.network.fed, images)


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("vit_base_patch16_clip_224.openai", CLIP_BASE),
        ("vit_large_patch14_clip_224.openai", CLIP_LARGE),
        ("vit_large_patch14_clip_336.openai", "vit_large_patch14_clip_quickgelu_336.openai"),
        ("vit_base_patch16_clip_224.metaclip_400m", "vit_base_patch16_clip_quickgelu_224.metaclip_400m"),
    ],
)
@pytest.mark.parametrize("weights", [None, "random", "clip.pt"])
def test_clip_without_quickgelu_is_refused(name: str, right: str, weights: str | None) -> None:
    """Before anything is downloaded or read."""
    with pytest.raises(ValueError, match=f"{name}.* computes GELU, .* use '{right}'$") as error:
        FeatureTarget(name, weights=weights)
    one_line(error)


@pytest.mark.parametrize("name", ["vit_base_patch16_clip_224", "vit_large_patch14_clip_224"])
def test_clip_from_a_file_needs_to_say_whose(clip_weights: Path, name: str) -> None:
    """OpenAI's and LAION's files have the same keys: a name without timm's tag does not tell which GELU they want."""
    with pytest.raises(ValueError, match=name.replace("_clip_", "_clip_quickgelu_")) as error:
        FeatureTarget(name, weights=str(clip_weights), model_args={"depth": 2})
    one_line(error)


def test_every_openai_tower_of_timm_is_refused_or_quick() -> None:
    """Towers fine-tuned from OpenAI's weights with GELU, and weights trained with GELU, stay allowed."""
    towers = [name for name in timm.list_models("vit_*_clip_*", pretrained=True) if name.endswith(".openai")]
    assert len(towers) >= 8
    for name in towers:
        if "quickgelu" in name:
            refuse_wrong_gelu(name)
        else:
            with pytest.raises(ValueError, match="QuickGELU"):
                refuse_wrong_gelu(name)
    for name in ("vit_base_patch16_clip_224.laion2b", "vit_base_patch16_clip_224.openai_ft_in1k", "vit_base_patch16_224.dino"):
        assert timm.models.is_model_pretrained(name)
        refuse_wrong_gelu(name)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("vit_base_patch16_clip_quikgelu_224.openai", "vit_base_patch16_clip_quickgelu_224"),
        ("vit_base_patch16_224.dinoo", "vit_base_patch16_224.dino"),
    ],
)
def test_an_unknown_name_lists_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"^timm has no (model|weights) '{name}'.*\. Nearest: ") as error:
        FeatureTarget(name, weights="random")
    assert nearest in one_line(error).split("Nearest: ")[1].split(", ")


def test_a_name_like_no_other() -> None:
    with pytest.raises(ValueError, match=r"^timm has no model '0123456789'\.$"):
        FeatureTarget("0123456789")


def test_an_argument_that_timm_does_not_know() -> None:
    with pytest.raises(ValueError, match="'vit_tiny_patch16_224' does not take these model_args: .*dept") as error:
        FeatureTarget("vit_tiny_patch16_224", weights="random", model_args={"dept": 2})
    one_line(error)


@pytest.mark.parametrize("argument", ["pretrained", "checkpoint_path"])
def test_weights_are_no_model_args(argument: str) -> None:
    """They would come in beside the checks."""
    with pytest.raises(ValueError, match=f"model_args of 'vit_tiny_patch16_224' cannot hold {argument}") as error:
        FeatureTarget("vit_tiny_patch16_224", weights="random", model_args={argument: "x"})
    one_line(error)


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a network: the error says what to give instead."""

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub\nand a second line")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"cannot be had from the hub .* weights=PATH .* weights='random'") as error:
        FeatureTarget("vit_tiny_patch16_224")
    one_line(error)


# --- weights from a file ------------------------------------------------------------------------------------------


def tiny_teacher(weights: str) -> FeatureTarget:
    return FeatureTarget(
        "vit_tiny_patch16_224", weights, model_args={"img_size": 32, "depth": 1, "embed_dim": 12, "num_heads": 2}
    )


FORMATS: dict[str, Callable[[dict[str, Tensor], Path], object]] = {
    "plain.pt": torch.save,
    "legacy.pth": lambda state_dict, path: torch.save(state_dict, path, _use_new_zipfile_serialization=False),
    "tensors.safetensors": save_file,
    "state_dict.ckpt": lambda state_dict, path: torch.save({"state_dict": state_dict, "epoch": 3}, path),
    "model.pth": lambda state_dict, path: torch.save({"model": state_dict, "args": {"lr": 0.1}}, path),
    "module.pt": lambda state_dict, path: torch.save({"module": state_dict}, path),
}


@pytest.mark.parametrize("name", FORMATS)
def test_weights_from_a_file(tmp_path: Path, name: str) -> None:
    teacher, images = tiny_teacher("random"), torch.rand(2, 3, 32, 32)
    fill_with_noise(teacher.frozen.network)
    FORMATS[name](teacher.frozen.network.state_dict(), tmp_path / name)
    assert torch.equal(tiny_teacher(str(tmp_path / name))(images, (2, 2)), teacher(images, (2, 2)))
    assert not torch.allclose(tiny_teacher("random")(images, (2, 2)), teacher(images, (2, 2)))


class Linear(nn.Module):
    """A network of the user's with one parameter tensor of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 8, 8)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(self.conv(images))


def own_target(network: nn.Module, **changes: object) -> FeatureTarget:
    return FeatureTarget(network, dim=6, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), **changes)


def refused(network: nn.Module, path: Path, kind: type[Exception]) -> str:
    """The one line of the error, after which the network holds what it held."""
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(kind) as error:
        own_target(network, weights=str(path))
    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert str(path) in str(error.value)
    return one_line(error)


def test_weights_of_a_network_of_ones_own(tmp_path: Path) -> None:
    saved = Linear()
    fill_with_noise(saved)
    nn.init.normal_(saved.norm.running_mean)
    torch.save(saved.state_dict(), tmp_path / "own.pt")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(
        own_target(Linear(), weights=str(tmp_path / "own.pt"))(images, (4, 4)), own_target(saved)(images, (4, 4))
    )


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "there is no file" in refused(Linear(), tmp_path / "nothing.pt", FileNotFoundError)
    assert "there is no file" in refused(Linear(), tmp_path, FileNotFoundError)  # a folder


@pytest.mark.parametrize("name", ["plain.pt", "legacy.pth", "tensors.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_a_truncated_file(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    FORMATS[name](Linear().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    message = refused(Linear(), path, ValueError)
    assert "truncated" in message or (share == 0 and "holds no weights" in message)


class Code:
    """A pickle of this runs `Path.touch` when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return Path.touch, (self.trace,)


def save_as_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize(
    ("save", "read_without_care"),
    [
        (torch.save, lambda path: torch.load(path, weights_only=False)),
        (FORMATS["legacy.pth"], lambda path: torch.load(path, weights_only=False)),
        (save_as_pickle, lambda path: pickle.loads(path.read_bytes())),
    ],
    ids=["zip", "legacy", "bare pickle"],
)
def test_a_pickle_with_code_is_not_run(
    tmp_path: Path, save: Callable[[object, Path], None], read_without_care: Callable[[Path], object]
) -> None:
    path, trace = tmp_path / "code.pt", tmp_path / "trace"
    save({**Linear().state_dict(), "code": Code(trace)}, path)
    message = refused(Linear(), path, ValueError)
    assert "is refused: its pickle holds more than tensors and plain data" in message
    assert not trace.exists()
    read_without_care(path)
    assert trace.exists()  # the code is there, and works


@pytest.mark.parametrize(
    ("content", "words"),
    [(torch.zeros(3), "holds no state dict"), ({"epoch": 3}, "holds no state dict"), ([1, 2], "holds no state dict")],
    ids=["tensor", "numbers", "list"],
)
def test_a_file_of_something_else(tmp_path: Path, content: object, words: str) -> None:
    torch.save(content, tmp_path / "other.pt")
    assert words in refused(Linear(), tmp_path / "other.pt", ValueError)


@pytest.mark.parametrize("text", ["<!DOCTYPE html>\n<html>", "version https://git-lfs.github.com/spec/v1\noid sha256:0"])
def test_a_file_that_a_download_left(tmp_path: Path, text: str) -> None:
    (tmp_path / "text.pt").write_text(text)
    assert f"holds no weights, it starts with b'{text[:10]}" in refused(Linear(), tmp_path / "text.pt", ValueError)


def renamed(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("conv", "convolution"): value for key, value in state_dict.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {k: v for k, v in w.items() if k != "conv.bias"}, ["1 missing (conv.bias)"]),
        (lambda w: {**w, "head.weight": torch.zeros(2)}, ["1 unexpected (head.weight)"]),
        (renamed, ["2 missing (conv.weight, conv.bias)", "2 unexpected (convolution.weight, convolution.bias)"]),
        (
            lambda w: {**w, "conv.weight": torch.zeros(6, 3, 4, 4)},
            ["1 of another shape (conv.weight (6, 3, 4, 4) for (6, 3, 8, 8))"],
        ),
        (lambda w: {}, ["7 missing (conv.weight, conv.bias, norm.weight)"]),  # the first three are enough
    ],
    ids=["missing", "unexpected", "renamed", "other shape", "empty"],
)
def test_weights_that_do_not_fit(tmp_path: Path, change: Callable[[dict], dict], words: list[str]) -> None:
    """The other tensors would fit, and are not loaded either."""
    other = Linear()
    fill_with_noise(other)
    torch.save(change(dict(other.state_dict())), tmp_path / "other.pt")
    message = refused(Linear(), tmp_path / "other.pt", ValueError)
    assert "does not fit Linear, nothing was loaded" in message
    assert all(word in message for word in words)


def test_weights_of_another_timm_model(clip_weights: Path) -> None:
    with pytest.raises(
        ValueError, match="does not fit vit_base_patch16_224, nothing was loaded: .* missing .* unexpected"
    ) as error:
        FeatureTarget("vit_base_patch16_224", weights=str(clip_weights), model_args={"depth": 2})
    one_line(error)


def test_reading_and_loading_by_themselves(tmp_path: Path) -> None:
    source, module = Linear(), Linear()
    torch.save({"state_dict": {"model": source.state_dict()}}, tmp_path / "nested.pt")
    load_strictly(module, read_state_dict(tmp_path / "nested.pt"), "nested.pt")
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in module.state_dict().items())


# --- Frozen -------------------------------------------------------------------------------------------------------


def test_no_gradient_through_a_frozen_network() -> None:
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    network = Linear()
    target = own_target(network)
    assert not target(images, (4, 4)).requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())
    trainable = Linear()(images)
    assert trainable.requires_grad  # without the target it would


def test_a_frozen_network_is_in_no_module_tree() -> None:
    target = own_target(Linear())
    assert list(target.parameters()) == []
    assert dict(target.state_dict()) == {}
    assert [name for name, _ in target.named_modules()] == [""]
    assert [name for name, _ in target.named_buffers()] == ["mean", "std"]  # not persistent
    assert target.networks() == [target.frozen.network]
    assert list(nn.Sequential(target).state_dict()) == []


def test_a_frozen_network_stays_in_eval_mode() -> None:
    """Batch norm would follow the images in train mode."""
    network = Linear().train()
    target = own_target(network)
    statistics = network.norm.running_mean.clone()
    images = torch.rand(4, 3, 32, 32)
    before = target(images, (4, 4))
    nn.Sequential(target).train()
    assert not target.training
    assert not any(module.training for module in network.modules())
    assert torch.equal(target(images, (4, 4)), before)
    assert torch.equal(network.norm.running_mean, statistics)
    assert int(network.norm.num_batches_tracked) == 0


def test_a_frozen_network_moves_with_its_target() -> None:
    target = own_target(Linear())
    images = torch.rand(2, 3, 32, 32)
    single = target(images, (4, 4))
    nn.Sequential(target).to(torch.float64)
    assert {tensor.dtype for tensor in target.frozen.network.parameters()} == {torch.float64}
    assert target.frozen.network.norm.running_mean.dtype == torch.float64
    assert target.mean.dtype == torch.float64
    double = target(images.double(), (4, 4))
    assert double.dtype == torch.float32
    torch.testing.assert_close(double, single)
    target.to("meta")
    tensors = [*target.frozen.network.parameters(), *target.frozen.network.buffers(), target.mean, target.std]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert target(images.double().to("meta"), (4, 4)).device.type == "meta"


def test_a_deep_copy_shares_the_frozen_network() -> None:
    target = own_target(Linear())
    duplicate = copy.deepcopy(target)
    assert duplicate is not target
    assert duplicate.mean is not target.mean
    assert duplicate.frozen is target.frozen
    assert copy.deepcopy(Frozen(Linear())).network is not Frozen(Linear()).network
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(duplicate(images, (4, 4)), target(images, (4, 4)))


@pytest.mark.parametrize(
    ("name", "grid", "fix"),
    [
        ("hiera_tiny_224", (7, 7), {"norm": False}),
        ("sam2_hiera_tiny", (28, 28), {"norm": False, "resolution": 896}),
        ("maxvit_pico_rw_256", (8, 8), {"resolution": 256}),
        ("efficientformer_l1", (7, 7), {"resolution": 224}),
    ],
)
def test_a_timm_network_that_does_not_take_the_size_or_the_norm_says_so(name: str, grid: Grid, fix: dict[str, Any]) -> None:
    """timm asserts, or adds tensors of different sizes; with the fix that the line names, features come."""
    small = {
        "hiera_tiny_224": {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)},
        "sam2_hiera_tiny": {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1), "global_att_blocks": ()},
        "maxvit_pico_rw_256": {},
        "efficientformer_l1": {},
    }[name]
    images = torch.rand(1, 3, 448, 448)
    with pytest.raises(ValueError, match=rf"model.teacher: timm's {name} does not give block .* pixels \(.*set model.teacher"):
        FeatureTarget(name, weights="random", model_args=small)(images, (14, 14))
    features = FeatureTarget(name, weights="random", model_args=small, **fix)(images, grid)
    assert features.shape[:3] == (1, *grid)
    assert features.isfinite().all()
