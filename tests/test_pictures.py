"""Pictures against references: scikit-learn's PCA, a closed form, a literal loop; and what a run leaves to look at."""

import copy
import json
import math
import os
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
import yaml
from conftest import ROOT, TINY, all_tokens, tiny_model, tiny_student
from einops import rearrange, reduce
from PIL import Image
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.strategies import FSDPStrategy
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from unimim import (
    BlockMasking,
    CachedTarget,
    CenteredSoftmax,
    CodebookTarget,
    DecoderHead,
    EMAHeadTarget,
    EMATarget,
    FeatureTarget,
    HOGTarget,
    ImageFolderData,
    L2Norm,
    LayerNorm,
    Mask,
    MaskedImageModeling,
    MaskTokenStudent,
    MeanColorTarget,
    NoMasking,
    PictureCallback,
    PixelTarget,
    PrototypeHead,
    RandomMasking,
    ResumableSampler,
    SeededSamples,
    SoftCrossEntropyLoss,
    TargetGenerator,
    Tokens,
    TrainingBar,
)
from unimim.cli.main import main
from unimim.data.folder import image_files
from unimim.letters.interfaces import Student
from unimim.pictures.patches import (
    attention_map,
    code_colors,
    covered,
    encoder_features,
    hog_glyphs,
    lit,
    principal_components,
    sheet,
    unnormalised,
)
from unimim.tasks.pretraining import LETTERS


def test_principal_components_are_scikit_learns() -> None:
    target, other = torch.randn(2, 4, 5, 12), torch.randn(1, 3, 3, 12)
    rows = target.reshape(-1, 12).numpy()
    pca = PCA(3).fit(rows)
    signs = np.sign(pca.components_[np.arange(3), np.abs(pca.components_).argmax(1)])[None]
    low, high = np.quantile(pca.transform(rows) * signs, [0.02, 0.98], axis=0)
    for features in (target, other):
        expected = np.clip((pca.transform(features.reshape(-1, 12).numpy()) * signs - low) / (high - low), 0, 1)
        drawn = principal_components(features, target)
        torch.testing.assert_close(rearrange(drawn, "b c h w -> (b h w) c"), torch.tensor(expected).float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(principal_components(target), principal_components(target, target))


def test_what_is_not_finite_is_drawn_too() -> None:
    target = torch.randn(2, 4, 5, 12)
    target[0, :, 1, 3], target[1, 0, 0, 3], target[1, 2, 2, 4] = torch.inf, -torch.inf, torch.nan
    drawn = principal_components(torch.full_like(target, torch.inf), target)
    assert drawn.isfinite().all()
    assert principal_components(target).std() > 0.05


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_few_channels_are_drawn_too(channels: int) -> None:
    drawn = principal_components(torch.randn(1, 4, 4, channels))
    assert drawn.shape == (1, 3, 4, 4)
    assert [bool(plane.std() > 0.1) for plane in drawn[0]] == [k < channels for k in range(3)]


@pytest.mark.parametrize("normalization", [LayerNorm(), LayerNorm(unbiased=True), L2Norm(), nn.Identity()])
def test_unnormalised_takes_the_normalization_back(normalization: nn.Module) -> None:
    """The target itself becomes the pixels; a prediction lies between, by the same scale and shift."""
    pixels = PixelTarget(8)(torch.rand(2, 3, 32, 32), (4, 4))
    pixels[0, 0, 0] = 0.3  # a flat patch
    target = normalization(pixels)
    torch.testing.assert_close(unnormalised(target, target, pixels), pixels, atol=1e-4, rtol=0)
    noise = 0.1 * torch.randn(1, 1, 1, pixels.shape[-1])
    moved = unnormalised(target + noise, target, pixels)
    scale = (pixels.std(-1) / target.std(-1).clamp(min=1e-6))[..., None]
    torch.testing.assert_close(moved, pixels + scale * noise, atol=1e-4, rtol=1e-4)


def test_pixels_are_drawn_as_pixels_and_say_when_they_are_not_the_models_own() -> None:
    images, teacher = torch.rand(2, 3, 32, 32), PixelTarget(8)
    pixels = teacher(images, (4, 4))
    torch.testing.assert_close(teacher.picture(pixels, pixels), images)
    torch.testing.assert_close(teacher.reconstruction(pixels, pixels, pixels), images, atol=1e-4, rtol=0)
    normalized = LayerNorm(unbiased=True)(pixels)
    torch.testing.assert_close(teacher.reconstruction(normalized, normalized, pixels), images, atol=1e-4, rtol=0)
    assert HOGTarget(8, 4).reconstruction(pixels, normalized, pixels) is None


def test_a_class_of_mean_color_is_drawn_in_it() -> None:
    colors = rearrange(torch.rand(4, 4, 3), "h w c -> 1 c h w")
    teacher = MeanColorTarget(bits=3)
    codes = teacher(colors.repeat_interleave(8, 2).repeat_interleave(8, 3), (4, 4))
    assert (teacher.picture(codes, codes) - colors).abs().max() <= 1 / 16 + 1e-6
    logits = nn.functional.one_hot(codes, 512).float()
    assert torch.equal(teacher.picture(logits, codes), teacher.picture(codes, codes))


def test_codes_have_colors_of_their_own() -> None:
    codes = torch.arange(8192).view(1, 64, 128)
    colors = code_colors(codes)
    assert torch.equal(colors, code_colors(codes))
    assert len(rearrange(colors, "1 c h w -> (h w) c").mul(255).round().unique(dim=0)) > 8000
    near = (colors[..., 1:] - colors[..., :-1]).abs().amax(1)
    assert near.min() > 0.15


@pytest.mark.parametrize("degrees", [0, 20, 45, 90, 110, 135, 170])
def test_a_stroke_lies_along_the_edge(degrees: int) -> None:
    """Of an image that is a plane wave, the stroke is turned as its crests are, to within a bin."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    angle = math.radians(degrees)  # of the crests, counted as the stroke's below: x to the right, y down
    wave = torch.sin((x * -math.sin(angle) + y * math.cos(angle)) * 0.9) / 2 + 0.5
    teacher = HOGTarget(16, 16)
    target = teacher(wave.expand(1, 3, 32, 32), (2, 2))
    drawn = teacher.picture(target, target)
    assert drawn.shape == (1, 3, 32, 32)
    cell = drawn[0, 0, :16, :16]
    bright = [(column - 7.5, row - 7.5) for row in range(16) for column in range(16) if cell[row, column] > 0.9 * cell.max()]
    across = sum(u * u for u, _ in bright), sum(u * v for u, v in bright), sum(v * v for _, v in bright)
    found = math.degrees(math.atan2(2 * across[1], across[0] - across[2]) / 2) % 180  # the axis of inertia
    assert min(abs(found - degrees), 180 - abs(found - degrees)) <= 11


def test_glyphs_are_a_literal_loop() -> None:
    histograms = torch.rand(1, 3, 2, 1, 9)
    drawn, size = hog_glyphs(histograms, 7), 7
    for channel, row, i, j in [(0, 0, 0, 0), (1, 1, 3, 5), (2, 0, 6, 3), (0, 1, 3, 3)]:
        x, y = j - 3, i - 3
        strokes = [
            histograms[0, channel, row, 0, k]
            * min(1, max(0, 1.25 - abs(x * math.sin((k + 0.5) * math.pi / 9) + y * math.cos((k + 0.5) * math.pi / 9))))
            for k in range(9)
        ]
        expected = max(strokes) if math.hypot(x, y) <= size / 2 else 0.0
        assert float(drawn[0, channel, row * 7 + i, j]) == pytest.approx(float(expected), abs=1e-6)


def test_covered_and_lit() -> None:
    images, mask = torch.rand(2, 3, 8, 12), torch.rand(2, 2, 3) < 0.5
    drawn, light = covered(images, mask), lit(images, mask.float() + 1)
    for b, row, column in [(0, 0, 0), (1, 7, 11), (0, 3, 8), (1, 4, 4)]:
        hidden = bool(mask[b, row // 4, column // 4])
        assert torch.equal(drawn[b, :, row, column], torch.full((3,), 0.5) if hidden else images[b, :, row, column])
        share = 0.2 + 0.8 * (hidden + 1) / (1 + int(mask[b].any()))
        torch.testing.assert_close(light[b, :, row, column], images[b, :, row, column] * share)


def fed(student: Student, images: Tensor) -> Tensor:
    return student.normalize(images)


@pytest.mark.parametrize("kind", TINY)
def test_attention_of_every_encoder(kind: str) -> None:
    """The weights of the last block, by hand where a plain ViT has them; and what looks is what is read, no state stays."""
    student = tiny_student(kind).eval()
    images = torch.rand(2, 3, 32, 32)
    nothing = Mask(torch.zeros(2, *student.grid_size, dtype=torch.bool))
    before = student(images, nothing)
    attention = attention_map(student.backbone, images)
    features = encoder_features(student.backbone, images)
    after = student(images, nothing)
    assert torch.equal(all_tokens(before), all_tokens(after))
    tokens = rearrange(features, "b h w d -> b (h w) d")
    torch.testing.assert_close(tokens, after.patches)
    if kind == "swin" and student.grid_size != (4, 4):
        assert attention is None
        return
    assert attention.shape == (2, *student.grid_size)
    assert (attention >= 0).all()
    assert (attention.flatten(1).sum(1) <= 1 + 1e-5).all()
    if kind in ("vit", "vit_without_cls", "visible_vit_with_registers"):
        seen: list[Tensor] = []
        block = student.backbone.blocks[-1]
        hook = block.attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        student.backbone.forward_features(fed(student, images))
        hook.remove()
        q, k, _ = rearrange(block.attn.qkv(seen[0]), "b n (three heads d) -> three b heads n d", three=3, heads=2)
        weights = (q @ k.transpose(-2, -1) * block.attn.scale).softmax(-1).mean(1)
        prefix = student.num_prefix_tokens
        expected = weights[:, 0, prefix:] if prefix else weights.mean(1)
        torch.testing.assert_close(attention.flatten(1), expected)


def test_an_encoder_without_attention_has_no_map() -> None:
    backbone = timm.create_model("resnet10t", num_classes=0)
    assert attention_map(backbone, torch.rand(1, 3, 64, 64)) is None


def test_a_sheet_has_a_row_for_each_caption() -> None:
    rows = {"small": torch.ones(2, 3, 4, 4), "large": torch.zeros(2, 3, 32, 32), "broken": torch.full((2, 3, 4, 4), torch.nan)}
    picture = sheet(rows)
    tile = 224
    assert picture.size == (2 * tile + 12, 3 * (tile + 28))
    assert picture.getpixel((4, 24)) == (255, 255, 255)
    assert picture.getpixel((4, 24 + tile + 28)) == (0, 0, 0)
    assert picture.getpixel((4, 24 + 2 * (tile + 28))) == (0, 0, 0)


# What a training draws


class Oracle(nn.Module):
    """A head that knows the answer: N(T(x)) itself, or logits that choose the token."""

    def __init__(self, model: MaskedImageModeling, images: Tensor) -> None:
        super().__init__()
        target = model.normalization(model.teacher(images, model.student.grid_size))
        self.target = nn.functional.one_hot(target, model.teacher.dim).float() if target.dtype == torch.long else target

    def forward(self, tokens: Tokens, mask: Mask, selected: Mask) -> Tensor:
        return self.target[selected.tensor]


class Brightness(TargetGenerator):
    """A user's own, with nothing but the two things that it has to have."""

    dim = 1

    def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
        h, w = grid_size
        return reduce(images, "b c (h p) (w q) -> b h w 1", "mean", h=h, w=w)


def fitted_codebook() -> CodebookTarget:
    teacher = CodebookTarget(HOGTarget(8, 4), codes=8)
    teacher.prepare([torch.rand(4, 3, 32, 32)], (4, 4))
    return teacher


CROSS_ENTROPY = {"loss": nn.CrossEntropyLoss()}
EQUATIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "pixels": lambda: {"teacher": PixelTarget(8)},
    "normalized pixels": lambda: {"teacher": PixelTarget(8), "normalization": LayerNorm(unbiased=True)},
    "HOG": lambda: {"teacher": HOGTarget(8, 4)},
    "normalized HOG": lambda: {"teacher": HOGTarget(8, 4), "normalization": LayerNorm()},
    "mean colour": lambda: {"teacher": MeanColorTarget(1), **CROSS_ENTROPY},
    "codes": lambda: {"teacher": fitted_codebook(), **CROSS_ENTROPY},
    "EMA": lambda: {"teacher": EMATarget(1), "normalization": LayerNorm()},
    "EMA of the head": lambda: {
        "teacher": EMAHeadTarget(16), "normalization": CenteredSoftmax(16), "loss": SoftCrossEntropyLoss(),
        "head": partial(PrototypeHead, hidden=16, bottleneck=8),
    },
    "features": lambda: {"teacher": FeatureTarget("vit_tiny_patch16_224", "random", model_args=TINY["vit"][1])},
    "a user's own": lambda: {"teacher": Brightness()},
    "a student that drops": lambda: {
        "student": tiny_student("visible_vit"), "masking": RandomMasking(0.75),
        "head": partial(DecoderHead, width=16, depth=1, num_heads=2),
    },
    "the visible ones": lambda: {"student": tiny_student("visible_vit"), "selection": "visible"},
    "all, nothing hidden": lambda: {"masking": NoMasking(), "selection": "all"},
    "Swin": lambda: {"student": tiny_student("swin"), "teacher": Brightness()},
}  # fmt: skip


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_right_prediction_looks_as_its_target(name: str) -> None:
    """At the patches that count, and gray elsewhere; what is hidden is hidden; every picture is one."""
    model = tiny_model(**EQUATIONS[name]()).eval()
    images = torch.rand(2, 3, 32, 32)
    model.head = Oracle(model, images)
    mask = model.masking(images, model.student.grid_size)
    model.masking.forward = lambda images, grid_size: mask
    drawn = model.pictures(images)
    for caption, picture in drawn.items():
        assert picture.shape[:2] == (2, 3), caption
        assert 0 <= picture.min() <= picture.max() <= 1, caption
    captions = list(drawn)
    assert captions[1] == f"M(x), what the student sees: {100 * mask.tensor.float().mean():.0f} % hidden"
    target, prediction = drawn[captions[2]], drawn[captions[3]]
    assert torch.equal(drawn[captions[1]], covered(images, mask.tensor))
    torch.testing.assert_close(prediction, covered(target, ~model.select(mask).tensor))
    assert target.std() > 0.01
    completed = [caption for caption in captions if caption.startswith("the images, completed")]
    assert [("TRUE mean and spread" in caption) for caption in completed] == {
        "pixels": [False],
        "normalized pixels": [True],
    }.get(name, [])
    for caption in completed:
        torch.testing.assert_close(drawn[caption], images, atol=1e-3, rtol=0)


class Images(pl.LightningDataModule):
    """Random images in a random order, all of the global generator."""

    def train_dataloader(self) -> DataLoader[Tensor]:
        images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return DataLoader(images, batch_size=2, shuffle=True)


class ResumableImages(Images):
    """As `Images`, read so that a training goes on where it was interrupted."""

    def train_dataloader(self) -> DataLoader[Any]:
        images = super().train_dataloader().dataset
        return DataLoader(SeededSamples(images), batch_size=2, sampler=ResumableSampler(images), drop_last=True)


class PicturedImages(Images):
    """As `Images`, and some to look at, drawn at random."""

    def pictured(self, count: int) -> Tensor:
        return torch.rand(count, 3, 32, 32)


class Unseeded(MaskedImageModeling):
    """Without `ExactResume`, so that a number too many shows."""

    def configure_callbacks(self) -> list[pl.Callback]:
        return []


class Losses(pl.Callback):
    """Every loss, bit for bit, and which modules learn."""

    def __init__(self) -> None:
        self.losses: list[str] = []
        self.modes: set[tuple[bool, ...]] = set()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]).hex())
        self.modes.add(tuple(module.training for module in pl_module.modules()))


def losses_of(folder: Path, data: pl.LightningDataModule, callbacks: list[pl.Callback], **options: Any) -> Losses:
    pl.seed_everything(0, verbose=False)
    watch = Losses()
    name, model_args = TINY["vit"]
    model = Unseeded(
        teacher=EMAHeadTarget(16), normalization=CenteredSoftmax(16), masking=BlockMasking(0.4),
        student=MaskTokenStudent(name, {**model_args, "proj_drop_rate": 0.2}), loss=SoftCrossEntropyLoss(),
        head=partial(PrototypeHead, hidden=16, bottleneck=8), warmup_epochs=1,
    )  # fmt: skip
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[*callbacks, watch], **options,
    )  # fmt: skip
    trainer.fit(model, data)
    watch.losses += [str(torch.rand(())), str(np.random.rand())]
    return watch


@pytest.mark.parametrize("data", [Images, PicturedImages])
def test_training_goes_on_as_it_would_without_pictures(data: type[pl.LightningDataModule], tmp_path: Path) -> None:
    alone = losses_of(tmp_path, data(), [])
    pictures = PictureCallback(images=2, every_n_epochs=2)
    watched = losses_of(tmp_path, data(), [pictures])
    assert watched.losses == alone.losses
    assert watched.modes == alone.modes
    assert len(alone.modes) == 1
    files = sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))
    assert files == ["epoch=1-step=8.png", "epoch=2-step=12.png"]
    assert Path(pictures.path) == tmp_path / "pictures" / files[-1]


def test_sheets_show_the_same_images_under_the_same_masks(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[PictureCallback(images=2, every_n_epochs=1)],
    )  # fmt: skip
    trainer.fit(tiny_model(teacher=PixelTarget(8)), PicturedImages())
    sheets = [Image.open(path).convert("RGB") for path in sorted((tmp_path / "pictures").glob("*.png"))]
    assert len(sheets) == 3
    rows = [[sheet.crop((0, i * 252 + 24, sheet.width, (i + 1) * 252)).tobytes() for i in range(4)] for sheet in sheets]
    assert rows[0][:2] == rows[1][:2] == rows[2][:2]
    assert rows[0][3] != rows[2][3]


def tiles(picture: Image.Image, row: int, count: int, tile: int = 224) -> np.ndarray[Any, Any]:
    """The pictures of a row of a sheet, side by side with what is between them, uint8 [tile (tile+4)*count-4 3]."""
    top = (tile + 28) * row + 24
    return np.asarray(picture.convert("RGB").crop((4, top, (tile + 4) * count, top + tile)))


def sheet_of(folder: Path, data: pl.LightningDataModule, **parts: Any) -> Image.Image:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, callbacks=[callback := PictureCallback(images=2)],
    )  # fmt: skip
    trainer.fit(tiny_model(**parts), data)
    return Image.open(callback.path).convert("RGB")


def folder_data(root: Path, kind: type[ImageFolderData] = ImageFolderData) -> ImageFolderData:
    """Whose batches are finished on the device, with a jitter that would be seen."""
    return kind(str(root), 32, batch_size=2, num_workers=0, color_jitter=0.9)


def test_photos_are_shown_as_they_are(tmp_path: Path) -> None:
    data = folder_data(photos(tmp_path / "photos", 4))
    picture = sheet_of(tmp_path, data, teacher=PixelTarget(8))
    expected = sheet({"x, the images": data.pictured(2)})
    assert np.array_equal(tiles(picture, 0, 2), tiles(expected, 0, 2))


def test_a_run_within_the_photos_adds_no_photo(tmp_path: Path) -> None:
    before = image_files(photos(tmp_path / "photos", 4))
    sheet_of(tmp_path / "photos", folder_data(tmp_path / "photos"))
    assert len(list((tmp_path / "photos").rglob("*.png"))) == 1
    assert image_files(tmp_path / "photos") == before


def test_fsdp1_draws_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Outside of a step it has no whole parameters."""
    callback, model = PictureCallback(), tiny_model()
    trainer: Any = SimpleNamespace(strategy=FSDPStrategy(), datamodule=None, fast_dev_run=False)
    with caplog.at_level("INFO"):
        callback.on_fit_start(trainer, model)
        callback.shown = torch.rand(1, 3, 32, 32)
        callback.on_train_epoch_end(trainer, model)
    assert "no pictures: FSDPStrategy" in caplog.text
    assert callback.path is None


def test_a_folder_val_without_images_is_not_shown(tmp_path: Path) -> None:
    photos(tmp_path / "train", 4)
    (tmp_path / "val").mkdir()
    data = folder_data(tmp_path)
    data.setup()
    assert data.pictured(4).shape == (4, 3, 32, 32)


def test_without_pictures_of_its_own_training_images_are_shown_finished(tmp_path: Path) -> None:
    data = folder_data(photos(tmp_path / "photos", 4), Unpictured)
    callback, watch = PictureCallback(images=1), FirstBatch()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[callback, watch],
    )  # fmt: skip
    trainer.fit(tiny_model(teacher=PixelTarget(8)), data)
    expected = sheet({"x, the images": watch.images[:1]})
    assert np.array_equal(tiles(Image.open(callback.path), 0, 1), tiles(expected, 0, 1))


class Unpictured(ImageFolderData):
    """As a user's own data, which says nothing of pictures."""

    @property
    def pictured(self) -> Any:
        raise AttributeError


class FirstBatch(pl.Callback):
    """The images of the first step."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Tensor, batch_idx: int) -> None:
        if trainer.global_step == 0:
            self.images = batch


@pytest.mark.parametrize("name", ["HOG", "pixels", "features", "codes"])
def test_a_cache_is_drawn_as_its_teacher(name: str, tmp_path: Path) -> None:
    """After an epoch that read it: with the images that are shown, which are in no cache."""
    root = photos(tmp_path / "photos", 4)
    parts = EQUATIONS[name]()
    teacher, student = parts.pop("teacher"), tiny_student()
    asked, cached = (
        sheet_of(tmp_path / folder, folder_data(root), teacher=target, student=copy.deepcopy(student), **parts)
        for folder, target in (("asked", teacher), ("cached", CachedTarget(teacher, str(tmp_path / "cache"), 1)))
    )
    assert asked.size == cached.size  # as many rows
    for row in range(3):  # images, what is hidden, target
        ours, wanted = (tiles(picture, row, 2, 256 if name == "HOG" else 224) for picture in (cached, asked))
        assert np.array_equal(ours, wanted)


def test_blocks_are_not_compiled_for_pictures(tmp_path: Path) -> None:
    """Nor is the training's graph another one afterwards."""
    torch._dynamo.reset()
    counters.clear()
    model = tiny_model()
    model.compile_blocks(backend="eager")
    graphs: list[int] = []

    class Counting(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            graphs.append(counters["stats"]["unique_graphs"])

    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, callbacks=[PictureCallback(3, 1), Counting()],
    )  # fmt: skip
    trainer.fit(model, PicturedImages())
    assert len(list(tmp_path.rglob("*.png"))) == 2
    assert graphs[0] > 0
    assert len(set(graphs)) == 1


def test_a_resumed_training_is_drawn(tmp_path: Path) -> None:
    """Also from between an epoch's last batch and its end, when there are no images to draw yet."""

    class AtLastBatch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    for epochs, path, callbacks in [(1, None, [AtLastBatch()]), (2, tmp_path / "last.ckpt", [PictureCallback(2, 1)])]:
        trainer = pl.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(tiny_model(), ResumableImages(), ckpt_path=path, weights_only=True)
    assert [path.name for path in tmp_path.rglob("*.png")] == ["epoch=1-step=8.png"]


def test_pictures_are_of_pretraining(tmp_path: Path) -> None:
    for wrong in ({"images": 0}, {"every_n_epochs": 0}):
        with pytest.raises(ValueError, match="PictureCallback: .* is 0, but it is at least 1"):
            PictureCallback(**wrong)
    trainer = pl.Trainer(callbacks=[PictureCallback()], logger=False, default_root_dir=tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match="draws the pretraining of MaskedImageModeling, not BoringModel"):
        trainer.fit(BoringModel())


class Clock(pl.Callback):
    """Two seconds for each batch and none for anything else, but ten for the first."""

    def __init__(self) -> None:
        self.now = 100.0

    def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
        self.now += 2 if trainer.global_step else 10


def test_the_bar_tells_images_a_second_and_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, bar = Clock(), TrainingBar()
    monkeypatch.setattr("unimim.tasks.callbacks.time.monotonic", lambda: clock.now)
    told: list[dict[str, Any]] = []
    shown = TrainingBar.get_metrics
    monkeypatch.setattr(TrainingBar, "get_metrics", lambda self, *args: told.append(shown(self, *args)) or told[-1])
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[clock, bar],
    )  # fmt: skip
    trainer.fit(tiny_model(), Images())
    steps = [entry for i, entry in enumerate(told) if entry != (told[i - 1] if i else None)]
    assert "images/s" not in told[0]
    assert "left" not in told[0]
    assert {entry["images/s"] for entry in told[1:]} == {"1"}  # two images in two seconds
    assert [entry["left"] for entry in steps[1:]][:7] == [f"00:{2 * left:02}" for left in range(6, -1, -1)]
    assert all("train/loss" in entry for entry in told)


def test_the_bar_has_room_in_80_columns(tmp_path: Path) -> None:
    """Late in an epoch of a long training, what is told in the end is still to be seen."""
    lines: list[str] = []

    class Narrow(TrainingBar):
        def get_metrics(self, *args: Any) -> dict[str, Any]:
            late = {"left": "51:06:40", "images/s": "2048"}
            return {key: late.get(key, value) for key, value in super().get_metrics(*args).items()}

        def on_train_batch_end(self, *args: Any) -> None:
            super().on_train_batch_end(*args)
            bar = self.train_progress_bar
            many = {"n": 4321, "total": 5004, "prefix": "Epoch 123: ", "ncols": 80}
            lines.append(bar.format_meter(**{**bar.format_dict, **many}))

    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        default_root_dir=tmp_path, callbacks=[Narrow()],
    )  # fmt: skip
    trainer.fit(tiny_model(), Images())
    assert len(lines[-1]) == 80
    assert re.match(r"Epoch 123: \|.+\| 4321/5004, left=51:06:40, images/s=2048, train/loss=\d\.\d+$", lines[-1])


# The command line

MODEL_ARGS = "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"
SMALL = [
    "fit", "--config", str(ROOT / "conf/pretrain/mae_vit_base.yaml"), "--model.teacher.patch_size=8",
    f"--model.student.model_args={MODEL_ARGS}",
    "--model.head.width=16", "--model.head.depth=1", "--model.head.num_heads=2", "--model.warmup_epochs=0",
    "--data.image_size=32", "--data.batch_size=2", "--data.num_workers=0",
    "--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false",
]  # fmt: skip


def photos(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.effect_noise((50 + i, 40), 80).convert("RGB").save(folder / f"{i}.jpg")
    return folder


def said(text: str, word: str) -> str:
    (line,) = re.findall(rf"^{word}: (.+)$", text, re.M)
    return line


def test_a_folder_of_two_photos_becomes_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = photos(tmp_path / "photos", 2)
    monkeypatch.chdir(tmp_path)
    main(["pretrain", *SMALL, f"--data.root={root}"])
    path = Path(said(capsys.readouterr().out, "pictures"))
    assert path == Path("outputs/pretrain/version_0/pictures/epoch=0-step=1.png")
    assert Image.open(path).size[1] == 7 * 252
    main(["pretrain", *SMALL, f"--data.root={root}", "--pictures=false"])
    assert "pictures: " not in capsys.readouterr().out
    assert not Path("outputs/pretrain/version_1/pictures").exists()
    main(["pretrain", *SMALL, f"--data.root={root}", "--pictures=false", "--trainer.callbacks=PictureCallback"])
    assert "pictures: " not in capsys.readouterr().out
    main(["pretrain", *SMALL, f"--data.root={root}", "--trainer.fast_dev_run=true"])
    assert "pictures: " not in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.png"))) == 1
    main(["pretrain", *SMALL, f"--data.root={root}", "--trainer.callbacks=PictureCallback", "--trainer.callbacks.images=1"])
    of_one, of_two = (Image.open(name).crop((232, 24, 456, 248)) for name in (said(capsys.readouterr().out, "pictures"), path))
    assert len(of_one.getcolors()) == 1 < len(of_two.getcolors(2**20))  # where the second photo would be


@pytest.mark.parametrize(
    ("content", "words", "expected"),
    [
        ([], [], "data.root: no image in or below"),
        ([b"no image", b"none"], [], "0.jpg (cannot identify image file"),
        ([b"no image", b"none"], ["--data.on_bad_image=skip"], "none of the 2 image files can be read, the first is"),
        ([None], [], "has 1 images, which is less than one batch of 2: set data.batch_size to 1 or less"),
    ],
)
def test_a_folder_that_cannot_be_drawn_is_one_line(
    content: list[bytes | None], words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photos(tmp_path / "photos", len(content))
    for i, data in enumerate(content):
        if data is not None:
            (root / f"{i}.jpg").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="^unimim: error: ") as end:
        main(["pretrain", *SMALL, f"--data.root={root}", *words])
    assert expected in str(end.value.code)
    assert "\n" not in str(end.value.code)
    assert not list(tmp_path.rglob("*.png"))


def test_the_next_command_is_one_that_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From pretraining to fine-tuning to predictions, as printed, with the words in capitals filled in."""
    root = photos(tmp_path / "photos", 4)
    for split in ("train", "val"):
        for name in ("a", "b"):
            photos(tmp_path / "classes" / split / name, 2)
    monkeypatch.chdir(tmp_path)
    main(["pretrain", *SMALL, f"--data.root={root}"])
    fast = ["--data.batch_size=2", "--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    command = said(capsys.readouterr().out, "next").replace("FOLDER", "classes").replace("CLASSES", "2")
    program, *words = shlex.split(command)
    assert program == "unimim"
    main([*words, *fast, "--trainer.max_epochs=1"])
    program, *words = shlex.split(said(capsys.readouterr().out, "next").replace("PHOTOS", "photos"))
    main([*words, *fast])
    assert len(Path("predictions.csv").read_text().splitlines()) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [
        ["ddp"],
        ["ModelParallelStrategy", "--trainer.strategy.save_distributed_checkpoint=false",
         "--trainer.strategy.data_parallel_size=2", "--trainer.strategy.tensor_parallel_size=1"],
    ],
    ids=["ddp", "shards"],
)  # fmt: skip
def test_of_several_processes_one_draws(strategy: list[str], tmp_path: Path) -> None:
    """And all learn what they would have learned without pictures."""
    root = photos(tmp_path / "photos", 8)
    weights, texts = [], []
    for i, words in enumerate([[], ["--pictures=false"]]):
        command = [sys.executable, "-m", "unimim", "pretrain", *SMALL, f"--data.root={root}", *words]
        two = ["--trainer.devices=2", "--trainer.strategy", *strategy]
        done = subprocess.run([*command, *two], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=500)
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
        (checkpoint,) = (tmp_path / f"outputs/pretrain/version_{i}").rglob("*.ckpt")
        weights.append(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert said(texts[0], "pictures") == "outputs/pretrain/version_0/pictures/epoch=0-step=2.png"
    assert [path.name for path in tmp_path.rglob("*.png")] == ["epoch=0-step=2.png"]
    assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


# Loggers


def test_tensorboard_has_the_sheet(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        logger=TensorBoardLogger(tmp_path), callbacks=[callback := PictureCallback(images=2)],
    )  # fmt: skip
    trainer.fit(tiny_model(), Images())
    events = EventAccumulator(trainer.logger.log_dir)
    events.Reload()
    (image,) = events.Images("pictures")
    assert (image.width, image.height) == Image.open(callback.path).size
    assert Path(callback.path).parent == Path(trainer.logger.log_dir) / "pictures"


def test_without_tensorboard_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("_TENSORBOARD_AVAILABLE", "_TENSORBOARDX_AVAILABLE"):
        monkeypatch.setattr(f"lightning_fabric.loggers.tensorboard.{name}", False)
    with pytest.raises(
        SystemExit, match="^unimim: error: .*TensorBoardLogger.*Neither `tensorboard` nor .* is available"
    ) as end:
        main(["pretrain", *SMALL, "--data.root=.", "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=runs"])
    assert "\n" not in str(end.value.code)


def records(path: Path) -> Iterator[Any]:
    """What a `.wandb` file holds: blocks of 32 KB of LevelDB's log format behind 7 bytes, each record a protobuf message."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # the full record, or its last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.slow
def test_a_wandb_run_offline_holds_config_curves_and_pictures(tmp_path: Path) -> None:
    root = photos(tmp_path / "photos", 8)
    command = [sys.executable, "-m", "unimim", "pretrain", *SMALL, f"--data.root={root}", "--trainer.logger=WandbLogger",
               "--trainer.logger.project=masked", "--trainer.log_every_n_steps=1"]  # fmt: skip
    own = {"WANDB_MODE": "offline", "HOME": str(tmp_path), "WANDB_API_KEY": ""}
    for _ in range(2):  # the second finds nothing of the first in its way
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **own}, capture_output=True, text=True, check=False, timeout=500
        )
        assert done.returncode == 0, done.stderr
    runs = sorted(tmp_path.rglob("*.wandb"))
    assert len(runs) == 2
    found = list(records(runs[0]))
    config = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in found
        for update in (record.run.config, record.config)
        for item in update.update
    }
    recipe = yaml.safe_load((ROOT / "conf/pretrain/mae_vit_base.yaml").read_text())["model"]
    changed = {"patch_size": 8, "width": 16, "depth": 1, "num_heads": 2, "model_args": yaml.safe_load(MODEL_ARGS)}
    for letter in LETTERS:
        given = recipe[letter] if isinstance(recipe[letter], dict) else {"class_path": recipe[letter]}
        assert config[letter]["class_path"] == given["class_path"]
        arguments = {name: changed.get(name, value) for name, value in given.get("init_args", {}).items()}
        assert {**config[letter]["init_args"], **arguments} == config[letter]["init_args"]
    assert config["masking"]["init_args"]["ratio"] == 0.75
    assert (config["lr"], config["betas"]) == (2.4e-3, [0.9, 0.95])
    history = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item} for record in found
    ]
    losses = [row["train/loss"] for row in history if "train/loss" in row]
    assert len(losses) == 4
    assert all(np.isfinite(losses))
    assert any(key.startswith("pictures") for row in history for key in row)
    assert image_files(tmp_path) == image_files(root)  # none that a run has drawn
    (picture,) = runs[0].parent.rglob("media/images/*.png")
    (beside,) = [path for path in tmp_path.rglob("epoch=0-step=4.png") if runs[0].stem.removeprefix("run-") in str(path)]
    assert Image.open(picture).tobytes() == Image.open(beside).tobytes()
    assert (beside.parent.parent / "config.yaml").is_file()
    assert (beside.parent.parent / "checkpoints").is_dir()
