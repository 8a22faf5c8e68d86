"""UperNetSegmentation: its loss, rates, windows and metrics against written-out ones, its backbones, its checkpoints."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from conftest import ROOT, tiny_model
from einops import repeat
from PIL import Image
from pytorch_lightning.callbacks import ModelCheckpoint
from timm.models.beit import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassJaccardIndex

from unimim import FineTuning, MaskTokenStudent, SegmentationFolderData, UperNetSegmentation, load_backbone
from unimim.pictures.labels import label_picture, overlay, palette
from unimim.shapes import IGNORED
from unimim.tasks.optim import warmup_poly
from unimim.tasks.segmentation import likeliest, starts

VIT = "vit_tiny_patch16_224"
NARROW = {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 8, "img_size": 32}
HIERA = {"img_size": 64, "embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)}
MAXVIT = {"embed_dim": (32, 32, 32, 32), "depths": (1, 1, 1, 1), "stem_width": (8, 8)}
CLASSES = ["background", "ant", "bee", "cat", "dog"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
BACKBONES = {
    "vit": (VIT, {"embed_dim": 24, "depth": 4, "num_heads": 2}),
    "beit_bias_per_block": ("beit_base_patch16_224", {"embed_dim": 24, "depth": 4, "num_heads": 2, "init_values": 0.1}),
    "beit_shared_bias": (
        "beit_base_patch16_224",
        {
            "embed_dim": 24,
            "depth": 4,
            "num_heads": 2,
            "init_values": 0.1,
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
        },
    ),
    "eva_rotary": ("eva02_tiny_patch14_224", {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 16}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "strict_img_size": False},
    ),
}


def noisy(model: nn.Module) -> nn.Module:
    """Every parameter and batch-norm buffer filled with noise, for zeros would hide mistakes."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(buffer, std=0.2)
        elif name.endswith("running_var"):
            nn.init.uniform_(buffer, 0.5, 2)
    return model


def tiny(**options: Any) -> UperNetSegmentation:
    """A narrow ViT with windows of 32 pixels that knows five classes."""
    model = UperNetSegmentation(**{"backbone": VIT, "model_args": NARROW, "num_classes": 5, "channels": 8, **options})
    noisy(model)
    return model


def a_batch(count: int = 2, side: int = 32) -> tuple[Tensor, Tensor]:
    labels = torch.randint(0, 5, (count, side, side))
    labels[0, :7] = IGNORED
    return torch.rand(count, 3, side, side), labels


class Scenes(pl.LightningDataModule):
    """Always the same images in the same order."""

    def __init__(self, count: int = 8, batch_size: int = 2, classes: list[str] | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.classes = CLASSES if classes is None else classes
        generator = torch.Generator().manual_seed(3)
        self.images = torch.rand(count, 3, 32, 32, generator=generator)
        self.labels = torch.randint(0, 5, (count, 32, 32), generator=generator)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.images, self.labels), self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.images, self.labels), 3)


class Rates(pl.Callback):
    """The rate and the decay of each parameter before each step."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []
        self.decays: dict[str, float] = {}

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
        groups = trainer.optimizers[0].param_groups
        self.rates.append({names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]})
        self.decays = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


def fitted(model: UperNetSegmentation, data: Any, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings = {**QUIET, "max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **options}
    trainer = pl.Trainer(**settings, callbacks=list(callbacks))
    trainer.fit(model, datamodule=data)
    return trainer


# Its step


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of [b classes h w] at the labels' size, a pixel at a time."""
    logits = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False)
    terms = []
    for image in range(len(labels)):
        for row in range(labels.shape[1]):
            for column in range(labels.shape[2]):
                label = int(labels[image, row, column])
                if label != IGNORED:
                    scores = logits[image, :, row, column]
                    terms.append(scores.exp().sum().log() - scores[label])
    return torch.stack(terms).mean()


@pytest.mark.parametrize("weight", [0.4, 0.0])
def test_the_loss_is_that_of_both_heads_over_the_pixels_that_count(weight: float) -> None:
    """vit_tiny normalizes by 0.5, as its `pretrained_cfg` says."""
    model = tiny(auxiliary_weight=weight).eval()
    images, labels = a_batch()
    levels = model.pyramid((images - 0.5) / 0.5)
    expected = cross_entropy(model.head(levels), labels)
    if weight:
        assert model.auxiliary_head is not None
        assert model.auxiliary_head.convolution[0].out_channels == 256
        expected = expected + 0.4 * cross_entropy(model.auxiliary_head(levels[2]), labels)
    else:
        assert model.auxiliary_head is None
    torch.testing.assert_close(model.training_step((images, labels), 0), expected)


def test_where_nothing_counts_the_loss_is_zero_and_has_gradients() -> None:
    model = tiny()
    loss = model.training_step((torch.rand(2, 3, 32, 32), torch.full((2, 32, 32), IGNORED)), 0)
    loss.backward()
    assert loss == 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def pairs_on_disk(root: Path, train: int, val: int, size: tuple[int, int] = (40, 50)) -> Path:
    """Noise with noisy labels, as `SegmentationFolderData` reads them."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / f"images/{split}/{i}.png")
            Image.fromarray(generator.integers(0, 5, size, dtype=np.uint8)).save(root / f"labels/{split}/{i}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def of_folder(root: Path, **options: Any) -> SegmentationFolderData:
    settings = {"image_size": 32, "batch_size": 2, "num_workers": 0, "resize": (128, 32), **options}
    return SegmentationFolderData(str(root), **settings)


@pytest.mark.filterwarnings("default")
def test_every_epoch_ends_with_the_count_of_unreadable_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = pairs_on_disk(tmp_path, train=4, val=1)
    with caplog.at_level("INFO"):
        fitted(tiny(), of_folder(root, on_bad_image="skip"), max_epochs=1)
        assert "could not be read" not in caplog.text
        (root / "images/train/2.png").write_bytes(b"no image")
        with pytest.warns(UserWarning, match="1 of 4 image files"):  # at the very end
            fitted(tiny(), of_folder(root, on_bad_image="skip"), max_epochs=3)
    assert caplog.messages.count(f"1 of 4 image files in {root} (train) could not be read") == 3


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_step_at_512_pixels(kind: str) -> None:
    name, model_args = BACKBONES[kind]
    model = UperNetSegmentation(name, num_classes=5, model_args={**model_args, "img_size": 512}, channels=16)
    images = torch.rand(2, 3, 512, 512)
    labels = torch.randint(0, 5, (2, 512, 512))
    labels[0, :50] = IGNORED
    groups = torch.optim.AdamW(model.parameters(), lr=1e-2)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    model.training_step((images, labels), 0).backward()
    groups.step()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert not torch.equal(parameter, before[key]), key
    with torch.inference_mode():
        assert model.eval()(torch.rand(1, 3, 200, 600)).shape == (1, 5, 200, 600)


# Its rates


@pytest.mark.parametrize("power", [1.0, 0.9])
def test_poly_falls_under_the_warm_up(power: float) -> None:
    """mmcv 1: the regular rate of the step, times 1 - (1 - step / warm-up) (1 - ratio)."""
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [parameter], "lr": lr} for parameter, lr in zip(parameters, (0.5, 0.2), strict=True)]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    scheduler = warmup_poly(optimizer, 4, 20, 0.01, power)
    for step in range(21):
        regular = (1 - step / 20) ** power
        k = (1 - step / 4) * (1 - 0.01) if step < 4 else 0.0
        for group, lr in zip(optimizer.param_groups, (0.5, 0.2), strict=True):
            assert group["lr"] == pytest.approx(lr * regular * (1 - k), rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0


def layer(name: str) -> int:
    """Of a ViT of four blocks: embedding 0, blocks 1 to 4, all that is new 5."""
    name = name.removeprefix("pyramid.backbone.")
    if name.startswith(("cls_token", "pos_embed", "patch_embed.")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 5


def test_the_optimizer_uses_poly_times_layer_decay() -> None:
    spy = Rates()
    model = tiny(lr=1e-2, layer_decay=0.75, weight_decay=0.3, warmup_steps=2, warmup_ratio=0.1)
    trainer = fitted(model, Scenes(), spy, max_epochs=-1, max_steps=6)
    names = dict(model.named_parameters())
    assert len(spy.rates) == trainer.global_step == 6
    assert {layer(name) for name in names} == {0, 1, 2, 3, 4, 5}
    for step, rates in enumerate(spy.rates):
        head = 1e-2 * (1 - step / 6) * (0.1 + 0.9 * step / 2 if step < 2 else 1)
        assert rates.keys() == names.keys()
        for name, used in rates.items():
            assert used == pytest.approx(head * 0.75 ** (5 - layer(name)), rel=1e-9), name
    for name, decay in spy.decays.items():
        kept = names[name].ndim == 1 or name.endswith(("cls_token", "pos_embed"))
        assert decay == (0.0 if kept else 0.3), name
    assert spy.decays["pyramid.levels.0.0.weight"] == 0.3
    assert len({group["name"] for group in trainer.optimizers[0].param_groups}) == len(trainer.optimizers[0].param_groups)


def test_another_batch_than_the_recipes_is_told_or_scaled() -> None:
    spy = Rates()
    with pytest.warns(UserWarning, match=r"^2 images a step, but lr 0.01 is meant for 16: 0.00125 would fit"):
        fitted(tiny(lr=1e-2, recipe_batch=16, warmup_steps=0), Scenes(), spy)
    assert max(spy.rates[0].values()) == pytest.approx(1e-2)
    spy = Rates()
    fitted(tiny(lr=1e-2, recipe_batch=16, warmup_steps=0, scale_lr=True), Scenes(), spy, accumulate_grad_batches=2)
    assert max(spy.rates[0].values()) == pytest.approx(2.5e-3)


def test_batches_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"^data.batch_size is 1, but UperNet's pool of 1x1 .* set it to at least 2$"):
        fitted(tiny(), Scenes(batch_size=1))
    with pytest.raises(ValueError, match=r"^the data has 2 classes, the head 5: set model.num_classes to 2$"):
        fitted(tiny(), Scenes(classes=["ant", "bee"]))
    with pytest.raises(ValueError, match=r"the images are 40x40 pixels, but the backbone was built for 32x32"):
        tiny().training_step(a_batch(side=40), 0)
    with pytest.raises(ValueError, match=r"an endless training has no cosine and no poly"):
        fitted(tiny(), Scenes(), max_epochs=-1)


# Its windows


class Positions(nn.Module):
    """A stand-in for pyramid and head: logits at a quarter of the size, which depend on where in the window a pixel is."""

    def forward(self, images: Tensor) -> Tensor:
        pooled = F.avg_pool2d(images, 4)
        rows, columns = (torch.linspace(-1, 2, side) for side in pooled.shape[-2:])
        bump = rows[:, None].exp() + columns[None].sin()
        return torch.stack(
            [pooled[:, 0] * bump, pooled[:, 1] + bump, pooled[:, 2] - bump, -pooled[:, 0], bump + pooled[:, 2]], 1
        )


def slid(model: UperNetSegmentation, images: Tensor, window: int, stride: int) -> Tensor:
    """Every pixel is the mean over the windows it is in, written out; windows by mmsegmentation's arithmetic."""
    height, width = images.shape[-2:]
    padded = torch.zeros(len(images), 3, max(height, window), max(width, window))
    padded[..., :height, :width] = images
    rows, columns = padded.shape[-2:]
    places = []
    for row in range(max(rows - window + stride - 1, 0) // stride + 1):
        for column in range(max(columns - window + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + window, rows), min(column * stride + window, columns)
            places.append((bottom - window, right - window))
    answers = {}
    for top, left in places:
        logits = model.head(model.pyramid(padded[..., top : top + window, left : left + window]))
        answers[top, left] = F.interpolate(logits, (window, window), mode="bilinear", align_corners=False)
    result = torch.zeros(len(images), 5, height, width)
    for y in range(height):
        for x in range(width):
            over = [
                answers[top, left][..., y - top, x - left]
                for top, left in places
                if top <= y < top + window and left <= x < left + window
            ]
            result[..., y, x] = torch.stack(over).mean(0)
    return result


@pytest.mark.parametrize("size", [(20, 28), (32, 32), (24, 60), (32, 53), (53, 74), (74, 33), (100, 45)], ids=str)
@pytest.mark.parametrize("fake", [True, False], ids=["positions", "network"])
def test_sliding_windows_are_averaged(size: tuple[int, int], fake: bool) -> None:
    """Smaller than a window, equal, a multiple of the stride beyond it (53, 74) and not; the stride is 21."""
    model = tiny().eval()
    assert (model.crop_size, model.stride) == ((32, 32), (21, 21))
    if fake:
        model.pyramid, model.head = nn.Identity(), Positions()
    images = torch.rand(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(images), slid(model, (images - 0.5) / 0.5, 32, 21), atol=1e-5, rtol=1e-5)


def test_windows_of_the_published_protocol() -> None:
    assert UperNetSegmentation(VIT, model_args={**NARROW, "img_size": 512}, channels=8).stride == (341, 341)
    assert starts(512, 512, 341) == [0]
    assert starts(683, 512, 341) == [0, 171]
    assert starts(853, 512, 341) == [0, 341]
    assert starts(2048, 512, 341) == [0, 341, 682, 1023, 1364, 1536]


def test_windows_and_strides_of_ones_own() -> None:
    model = tiny(model_args={**NARROW, "img_size": [32, 48]}, stride=[16, 48]).eval()
    assert (model.crop_size, model.stride) == ((32, 48), (16, 48))
    seen: list[Tensor] = []
    model.pyramid.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        assert model(torch.rand(1, 3, 48, 96)).shape == (1, 5, 48, 96)
    assert [tuple(window.shape) for window in seen] == [(1, 3, 32, 48)] * 4


# Whole images


@pytest.mark.parametrize("kind", ["beit_bias_per_block", "beit_shared_bias", "vit", "eva_rotary"])
def test_a_whole_image_on_resized_positions(kind: str) -> None:
    """As a timm model that was made for the image's size and loaded from the small one by timm itself."""
    name, model_args = BACKBONES[kind]
    options = {"model_args": {**model_args, "img_size": 64}, "num_classes": 5, "channels": 8, "inference": "whole"}
    model = UperNetSegmentation(name, **options)
    noisy(model.eval())
    larger = UperNetSegmentation(name, **{**options, "model_args": {**model_args, "img_size": (96, 144)}}).eval()
    weights = {key.removeprefix("pyramid.backbone."): value for key, value in model.state_dict().items() if "backbone" in key}
    filters = sys.modules[type(larger.pyramid.backbone).__module__].checkpoint_filter_fn
    larger.pyramid.backbone.load_state_dict(filters(weights, larger.pyramid.backbone))
    larger.pyramid.levels, larger.head = model.pyramid.levels, model.head
    images = torch.rand(2, 3, 90, 141)
    padded = F.pad((images - model.mean) / model.std, (0, 3, 0, 6))
    keys = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.inference_mode():
        found = model(images)
        expected = F.interpolate(larger.head(larger.pyramid(padded)), (96, 144), mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected[..., :90, :141], atol=1e-4, rtol=1e-4)
    assert model.state_dict().keys() == keys.keys()
    assert all(torch.equal(value, keys[key]) for key, value in model.state_dict().items())
    model(images).sum().backward()  # what was made in inference mode serves outside of it


def test_resized_positions_follow_the_weights_and_are_few() -> None:
    name, model_args = BACKBONES["beit_bias_per_block"]
    options = {"model_args": {**model_args, "img_size": 64}, "num_classes": 5, "channels": 8, "inference": "whole"}
    model, other = (noisy(UperNetSegmentation(name, **options)).eval() for _ in range(2))
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        first = model(images)
        (kept,) = model.resized.values()
        assert torch.equal(model(images), first)
        assert model.resized[96, 96][0] is kept[0]
        assert kept[0].backbone.blocks[0].attn.qkv.weight is model.pyramid.backbone.blocks[0].attn.qkv.weight
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(images), other(images))
        for side in range(112, 112 + 16 * 6, 16):
            model(torch.rand(1, 3, side, 64))
    assert len(model.resized) == 2
    indices = {id(block.attn.relative_position_index) for block in kept[0].backbone.blocks}
    assert len(indices) == 1


def whole_beit(**model_args: Any) -> UperNetSegmentation:
    name, known = BACKBONES["beit_bias_per_block"]
    given = {**known, "img_size": 64, **model_args}
    model = UperNetSegmentation(name, model_args=given, num_classes=5, channels=8, inference="whole", dropout=0.0)
    noisy(model)
    return model


def test_a_resized_backbone_trains_and_rests_as_the_model_does() -> None:
    """Dropping paths at random in training, and never afterwards."""
    model, images = whole_beit(drop_path_rate=0.9), torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        assert not torch.equal(model.train()(images), model(images))
        assert torch.equal(model.eval()(images), model(images))
        assert not torch.equal(model.train()(images), model(images))
    statistics = model.resized[96, 96][0].levels[0][1].running_mean
    assert statistics is model.pyramid.levels[0][1].running_mean


def test_resized_backbones_are_forgotten_with_the_dtype() -> None:
    model, images = whole_beit().eval(), torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        expected = model(images)
        model.double()
        assert not model.resized
        found = model(images.double())
    assert model.resized[96, 96][0].backbone.blocks[0].attn.relative_position_bias_table.dtype == torch.float64
    torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=1e-4)


def test_no_two_large_indices_stand_beside_each_other_while_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, most = whole_beit().eval(), []
    resize = Attention.set_window_size
    made: list[Attention] = []

    def watch(self: Attention, window_size: tuple[int, int]) -> None:
        resize(self, window_size)
        made.append(self)
        most.append(len({id(attention.relative_position_index) for attention in made}))

    monkeypatch.setattr(Attention, "set_window_size", watch)
    with torch.no_grad():
        model(torch.rand(1, 3, 96, 96))
    assert most[:4] == [1, 2, 2, 2]  # the first, and the one that is made
    assert len({id(attention.relative_position_index) for attention in made}) == 1


@pytest.mark.parametrize("kind", ["swin", "dynamic_vit", "convnext"])
def test_a_whole_image_where_the_backbone_takes_any(kind: str) -> None:
    name, model_args = {
        "swin": (BACKBONES["swin"][0], {**BACKBONES["swin"][1], "img_size": 64, "window_size": 4}),
        "dynamic_vit": (VIT, {**NARROW, "dynamic_img_size": True}),
        "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    }[kind]
    model = UperNetSegmentation(
        name, model_args=model_args, num_classes=5, channels=8, inference="whole", crop_size=None if kind == "swin" else 64
    )
    noisy(model.eval())
    images = torch.rand(2, 3, 62, 93)
    patch = 8 if kind == "dynamic_vit" else 4
    padded = F.pad((images - model.mean) / model.std, (0, -93 % patch, 0, -62 % patch))
    with torch.no_grad():
        expected = F.interpolate(model.head(model.pyramid(padded)), padded.shape[-2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(images), expected[..., :62, :93])
    assert not model.resized


def test_a_swin_that_takes_one_size_says_so() -> None:
    name, model_args = BACKBONES["swin"]
    model_args = {**model_args, "strict_img_size": True, "img_size": 64}
    model = UperNetSegmentation(name, model_args=model_args, num_classes=5, channels=8, inference="whole").eval()
    expected = (
        r"^the image is 96x96 pixels, but this SwinTransformer takes only 64x64: set model.inference to slide, or strict_"
    )
    with pytest.raises(ValueError, match=expected):
        model(torch.rand(1, 3, 96, 96))


@pytest.mark.parametrize(
    ("name", "model_args", "side"),
    [("hiera_tiny_224", HIERA, 64), ("maxvit_tiny_tf_224", MAXVIT, 224)],
    ids=["hiera", "maxvit"],
)
def test_a_backbone_of_a_fixed_size_that_it_does_not_tell(name: str, model_args: dict[str, Any], side: int) -> None:
    model = UperNetSegmentation(name, model_args=model_args, num_classes=5, channels=8).eval()
    assert model.crop_size == (side, side)
    with torch.no_grad():
        assert model(torch.rand(1, 3, side, side + 9)).shape == (1, 5, side, side + 9)
        model.inference = "whole"
        with pytest.raises(ValueError, match=rf"the image is 96x96 .* takes only {side}x{side}: set model.inference to slide$"):
            model(torch.rand(1, 3, 96, 96))
    own = UperNetSegmentation(timm.create_model(name, **model_args), crop_size=side, num_classes=5, channels=8)
    assert own.crop_size == (side, side)


@pytest.mark.parametrize(("scales", "flip"), [((1.0,), True), ((0.5, 1.0, 1.75), False), ((0.75, 1.25), True)])
def test_scales_and_flips_average_probabilities(scales: tuple[float, ...], flip: bool) -> None:
    model, plain = tiny(scales=scales, flip=flip).eval(), tiny().eval()
    model.head.classifier.weight.data.mul_(20)  # so that probabilities are no nearly linear function of the logits
    plain.load_state_dict(model.state_dict())
    images = torch.rand(2, 3, 40, 52)
    probabilities = []
    with torch.no_grad():
        for scale in scales:
            size = (round(40 * scale), round(52 * scale))
            scaled = F.interpolate(images, size, mode="bilinear", antialias=True) if scale != 1 else images
            for mirror in [False, True] if flip else [False]:
                logits = plain(scaled.flip(3) if mirror else scaled)
                answer = F.interpolate(logits, (40, 52), mode="bilinear", align_corners=False).softmax(1)
                probabilities.append(answer.flip(3) if mirror else answer)
        torch.testing.assert_close(model(images).exp(), torch.stack(probabilities).mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(images).softmax(1), model(images).exp())


def test_a_scale_leaves_a_pixel() -> None:
    with torch.no_grad():
        assert tiny(scales=(0.1, 1.0)).eval()(torch.rand(1, 3, 4, 50)).shape == (1, 5, 4, 50)


def test_the_likeliest_label_at_another_size() -> None:
    logits = torch.randn(2, 19, 10, 12)
    expected = F.interpolate(logits, (33, 47), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(likeliest(logits, (33, 47)), expected)
    assert torch.equal(likeliest(logits[:, :1], (5, 5)), torch.zeros(2, 5, 5, dtype=torch.long))


def test_a_photo_is_seen_at_the_size_of_a_validation() -> None:
    """A shorter side of one window, but a longer of at most four; labels at the photo's own size."""
    model = tiny().eval()
    model.pyramid, model.head = nn.Identity(), Positions()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for size, expected in {(96, 120): (32, 40), (20, 16): (40, 32), (30, 300): (13, 128), (32, 32): (32, 32)}.items():
        photo = torch.rand(1, 3, *size)
        labels = model.predict_step(photo, 0)
        assert seen[-1].shape[-2:] == expected
        assert len(labels.unique()) > 1
        scaled = F.interpolate(photo, expected, mode="bilinear", antialias=True) if size != expected else photo
        with torch.no_grad():
            assert torch.equal(labels, F.interpolate(model(scaled), size, mode="bilinear").argmax(1))
        assert labels.shape == (1, *size)
    assert model.predict_step(torch.rand(1, 3, 1, 700), 0).shape == (1, 1, 700)


def test_a_photo_is_seen_at_the_size_of_the_datas_validation(tmp_path: Path) -> None:
    """Which need not be that of a window."""
    root = pairs_on_disk(tmp_path, train=2, val=2, size=(50, 80))
    model = tiny()
    seen: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    for resize, expected in {(128, 48): (48, 77), (60, 48): (38, 60)}.items():
        seen.clear()
        pl.Trainer(**QUIET).validate(model, datamodule=of_folder(root, resize=resize), verbose=False)
        pl.Trainer(**QUIET).predict(model, datamodule=of_folder(root / "images/val", resize=resize))
        assert seen == [expected] * 4


# Its metrics


class Oracle(UperNetSegmentation):
    """Says what the first channel of the image holds."""

    def forward(self, images: Tensor) -> Tensor:
        said = (images[:, 0] * 10).round().long()
        return 9 * F.one_hot(said, 5).movedim(-1, 1).float()


class Answers(pl.LightningDataModule):
    """Images that hold the predictions, and labels, a batch each."""

    def __init__(self, predictions: list[Tensor], labels: list[Tensor], classes: list[str] = CLASSES) -> None:
        super().__init__()
        self.batches = [
            (repeat(said / 10, "b H W -> b c H W", c=3), true) for said, true in zip(predictions, labels, strict=True)
        ]
        self.classes = classes

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)


def counted(predictions: list[Tensor], labels: list[Tensor]) -> tuple[list[float], dict[str, float]]:
    """IoU a class and the three means from counts of pixels, written out."""
    pairs = [
        (p, t)
        for said, true in zip(predictions, labels, strict=True)
        for p, t in zip(said.flatten().tolist(), true.flatten().tolist(), strict=True)
        if t != IGNORED
    ]
    ious, accuracies = [], []
    for label in range(5):
        both = sum(p == t == label for p, t in pairs)
        either = sum(label in (p, t) for p, t in pairs)
        labelled = sum(t == label for _, t in pairs)
        ious.append(both / either if either else math.nan)
        accuracies.append(both / labelled if labelled else math.nan)

    def mean(values: list[float]) -> float:
        present = [value for value in values if not math.isnan(value)]
        return sum(present) / len(present)

    return ious, {
        "val/miou": mean(ious),
        "val/macc": mean(accuracies),
        "val/aacc": sum(p == t for p, t in pairs) / len(pairs),
        "val/miou_foreground": mean(ious[1:]),
    }


@pytest.mark.parametrize("absent", ["nothing", "not_labelled", "neither"])
def test_metrics_are_those_of_all_pixels_together(absent: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Class 4 in labels and predictions, in predictions alone (IoU 0, no accuracy), or in neither (left out)."""
    known = 5 if absent == "nothing" else 4
    labels = [torch.randint(0, known, (count, side, 16)) for count, side in ((1, 12), (3, 20), (2, 7))]
    predictions = [torch.where(torch.rand(true.shape) < 0.6, true, torch.randint(0, 3, true.shape)) for true in labels]
    labels[1][0] = IGNORED
    labels[2][:, :2] = IGNORED
    if absent == "not_labelled":
        predictions[1][1, :4] = 4
    predictions[2][:, :2] = 4  # where nothing counts
    model = Oracle(VIT, model_args=NARROW, num_classes=5, channels=8)
    (measured,) = pl.Trainer(**QUIET).validate(model, datamodule=Answers(predictions, labels), verbose=False)
    ious, expected = counted(predictions, labels)
    assert measured == pytest.approx(expected, abs=1e-6)
    assert model.iou.tolist() == pytest.approx(ious, nan_ok=True, abs=1e-6)
    assert math.isnan(ious[4]) == (absent == "neither")
    metric = MulticlassJaccardIndex(5, average="macro", ignore_index=IGNORED)
    for said, true in zip(predictions, labels, strict=True):
        metric.update(said, true)
    assert measured["val/miou"] == pytest.approx(float(metric.compute()), abs=1e-6)
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.split()}
    assert lines["bee"][1] == f"{ious[2]:.4f}"
    assert (lines["dog"][1] == "-") == (absent == "neither")
    again = pl.Trainer(**QUIET).validate(model, datamodule=Answers(predictions[:1], labels[:1]), verbose=False)
    assert again[0] == pytest.approx(counted(predictions[:1], labels[:1])[1], abs=1e-6)  # nothing is left of the first


def test_without_a_background_there_is_no_foreground() -> None:
    model = Oracle(VIT, model_args=NARROW, num_classes=5, channels=8)
    labels = [torch.randint(0, 5, (1, 8, 8))]
    (measured,) = pl.Trainer(**QUIET).validate(model, datamodule=Answers(labels, labels, list("abcde")), verbose=False)
    assert measured == {"val/miou": 1.0, "val/macc": 1.0, "val/aacc": 1.0}


def test_metrics_are_taken_at_the_labels_size() -> None:
    model = tiny()
    model.pyramid, model.head = nn.Identity(), Positions()
    images, labels = torch.rand(1, 3, 40, 60), torch.randint(0, 5, (1, 57, 91))
    pl.Trainer(**QUIET).validate(model, DataLoader(TensorDataset(images, labels)), verbose=False)
    with torch.no_grad():
        said = F.interpolate(model.eval()(images), (57, 91), mode="bilinear", align_corners=False).argmax(1)
    assert len(said.unique()) > 1
    assert model.iou.tolist() == pytest.approx(counted([said], [labels])[0], nan_ok=True, abs=1e-6)


TWO_PROCESSES = """
import sys, json, torch, pytorch_lightning as pl
sys.path[:0] = [sys.argv[1]]
from test_segmentation import QUIET, Scenes, tiny
from torch.utils.data import DataLoader, TensorDataset
class Unequal(Scenes):
    def val_dataloader(self):
        own = slice(0, 5) if self.trainer.global_rank == 0 else slice(5, 8)
        return DataLoader(TensorDataset(self.images[own], self.labels[own]), 2)
    def train_dataloader(self):
        labels = self.labels.clone()
        labels[:, :] = self.labels if self.trainer.global_rank else 255  # one process has nothing to learn from
        return DataLoader(TensorDataset(self.images, labels), 2)
torch.manual_seed(0)
model = tiny(lr=1e-2, warmup_steps=0)
trainer = pl.Trainer(**QUIET, devices=2, strategy="ddp", sync_batchnorm=True, max_steps=2, num_sanity_val_steps=0,
                     use_distributed_sampler=False, limit_val_batches=0)
trainer.fit(model, datamodule=Unequal())
weights = sum(float(p.double().abs().sum()) for p in model.parameters())
model.load_state_dict(torch.load(sys.argv[2] + "/weights.pt", weights_only=True))
trainer = pl.Trainer(**QUIET, devices=2, strategy="ddp", use_distributed_sampler=False)
(measured,) = trainer.validate(model, datamodule=Unequal(), verbose=False)
json.dump([weights, measured], open(f"{sys.argv[2]}/{trainer.global_rank}.json", "w"))
"""


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Plain batch norms on a CPU, with a warning; a process without labels hangs nobody; metrics count all images once."""
    model, data = tiny(), Scenes()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (alone,) = pl.Trainer(**QUIET).validate(model, datamodule=data, verbose=False)
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    command = [sys.executable, str(tmp_path / "script.py"), str(ROOT / "tests"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Warning: trainer.sync_batchnorm: torch cannot synchronise batch norms on a CPU") == 1
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first[1] == pytest.approx(alone, abs=1e-6)
    assert done.stdout.count("class ") == 1  # the table, once


# Its backbones and checkpoints


def pretrained_file(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint that a run of pretraining at 224 pixels writes, and the encoder's weights."""
    name, model_args = BACKBONES["beit_shared_bias"]
    student = MaskTokenStudent(name, model_args, mean=MEAN, std=STD)
    noisy(student)
    from unimim import HOGTarget

    model = tiny_model(student=student, teacher=HOGTarget(patch_size=16, cell_size=8))
    keeper = ModelCheckpoint(folder, "pretrained")
    trainer = pl.Trainer(**{**QUIET, "enable_checkpointing": True}, max_epochs=1, callbacks=[keeper], log_every_n_steps=1)
    trainer.fit(model, DataLoader(torch.rand(2, 3, 224, 224), 2))
    return folder / "pretrained.ckpt", {key: value.clone() for key, value in student.backbone.state_dict().items()}


@pytest.mark.parametrize("shared", [True, False])
def test_from_pretraining_at_224_to_segmentation_at_512(tmp_path: Path, shared: bool) -> None:
    """Every key of the file is accounted for, every parameter of the pyramid's backbone comes from it."""
    path, encoder = pretrained_file(tmp_path)
    model_args = {"img_size": 512, "use_shared_rel_pos_bias": shared, "use_rel_pos_bias": not shared}
    model = UperNetSegmentation("beit_base_patch16_224", str(path), num_classes=5, model_args=model_args, channels=8)
    report = model.pyramid.backbone.load_report
    content = torch.load(path, weights_only=True)["state_dict"]
    kinds = ("loaded", "resized", "renamed", "dropped")
    assert sorted(key for kind in kinds for key in getattr(report, kind)) == sorted(content)
    assert not report.new | report.unexpected | report.misshapen | report.missing
    assert all(not key.startswith("student.backbone.") for key in report.dropped)
    assert list(report.resized) == ["student.backbone.rel_pos_bias.relative_position_bias_table"]
    weights = model.pyramid.backbone.state_dict()
    table = "rel_pos_bias.relative_position_bias_table"
    assert encoder.keys() - weights.keys() == {"norm.weight", "norm.bias"} | ({table} if not shared else set())
    assert weights.keys() - encoder.keys() == {f"blocks.{i}.attn.{table.split('.')[1]}" for i in range(4) if not shared}
    for key in (weights.keys() & encoder.keys()) - {table}:
        assert torch.equal(weights[key], encoder[key]), key
    assert model.eval()(torch.rand(1, 3, 512, 512)).shape == (1, 5, 512, 512)


def test_its_own_checkpoint_needs_no_other_file(tmp_path: Path) -> None:
    path, _ = pretrained_file(tmp_path)
    model_args = {"img_size": 64}
    model = UperNetSegmentation("beit_base_patch16_224", str(path), num_classes=5, model_args=model_args, channels=8)
    assert model.mean.flatten().tolist() == pytest.approx(MEAN)
    trainer = fitted(model, Wide(), ModelCheckpoint(tmp_path, "tuned"), enable_checkpointing=True)
    reported = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    path.unlink()
    again = UperNetSegmentation.load_from_checkpoint(tmp_path / "tuned.ckpt", weights_only=True).eval()
    assert again.classes == CLASSES
    assert again.pyramid.backbone.num_classes == 0
    images = torch.rand(1, 3, 70, 90)
    with torch.no_grad():
        assert torch.equal(again(images), model.eval()(images))
    (measured,) = pl.Trainer(**QUIET).validate(again, datamodule=Wide(), verbose=False)
    assert measured == pytest.approx(reported, abs=1e-6)
    swapped = Wide(classes=["background", "bee", "ant", "cat", "dog"])
    with pytest.raises(ValueError, match="class 1 of the data is 'bee', of the checkpoint 'ant'"):
        pl.Trainer(**QUIET).validate(again, datamodule=swapped, ckpt_path=tmp_path / "tuned.ckpt", weights_only=True)


def test_a_run_that_goes_on_knows_where_it_began(tmp_path: Path) -> None:
    torch.save(timm.create_model(VIT, num_classes=0, **NARROW).state_dict(), tmp_path / "began.pth")
    model = tiny(checkpoint=str(tmp_path / "began.pth"))
    fitted(model, Scenes(), ModelCheckpoint(tmp_path, "first"), enable_checkpointing=True)
    again = tiny()
    trainer = pl.Trainer(
        **{**QUIET, "enable_checkpointing": True}, max_epochs=2, callbacks=[ModelCheckpoint(tmp_path, "second")]
    )
    trainer.fit(again, datamodule=Scenes(), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert again.checkpoint is None
    for name in ("first", "second"):
        content = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert content["pretrained_from"] == str(tmp_path / "began.pth")


def test_names_of_classes_survive_a_checkpoint_without_them() -> None:
    model = tiny()
    model.classes = CLASSES
    model.on_load_checkpoint({"classes": []})
    assert model.classes == CLASSES


class Wide(Scenes):
    """The same at 64 pixels."""

    def __init__(self, **options: Any) -> None:
        super().__init__(4, **options)
        self.images, self.labels = self.images.repeat(1, 1, 2, 2), self.labels.repeat(1, 2, 2)


def test_it_is_no_encoder_for_other_tasks(tmp_path: Path) -> None:
    model = tiny()
    fitted(model, Scenes(), ModelCheckpoint(tmp_path, "tuned"), enable_checkpointing=True)
    path = str(tmp_path / "tuned.ckpt")
    for load in (lambda: load_backbone(path), lambda: FineTuning(VIT, checkpoint=path, num_classes=5)):
        with pytest.raises(
            ValueError, match=r"tuned.ckpt is a checkpoint of segmentation, whose backbone has no final norm"
        ) as no:
            load()
        assert "\n" not in str(no.value)


def test_from_a_fine_tuned_classifier(tmp_path: Path) -> None:
    """Its classifier is left behind."""
    tuned = noisy(timm.create_model(VIT, num_classes=6, global_pool="avg", **NARROW))
    torch.save(tuned.state_dict(), tmp_path / "tuned.pth")
    model = UperNetSegmentation(VIT, str(tmp_path / "tuned.pth"), num_classes=5, model_args=NARROW, channels=8)
    assert set(model.pyramid.backbone.load_report.dropped) >= {"head.weight", "head.bias"}
    assert torch.equal(model.pyramid.backbone.blocks[3].attn.qkv.weight, tuned.blocks[3].attn.qkv.weight)


def test_a_backbone_made_by_the_user(tmp_path: Path) -> None:
    backbone = timm.create_model(VIT, **NARROW, num_classes=0)
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, "mean": MEAN, "std": STD}
    model = UperNetSegmentation(backbone, num_classes=5, channels=8, warmup_steps=0)
    assert model.pyramid.backbone is backbone
    assert model.mean.flatten().tolist() == pytest.approx(MEAN)
    fitted(model, Scenes(), ModelCheckpoint(tmp_path, "own"), enable_checkpointing=True)
    assert "backbone" not in torch.load(tmp_path / "own.ckpt", weights_only=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"backbone": None}, "model.backbone is missing: a timm name"),
        ({"backbone": "vit_tinny_patch16_224"}, "timm has no model 'vit_tinny_patch16_224'. Nearest: "),
        ({"backbone": "model"}, "model.checkpoint and model.model_args are for a backbone given by its name"),
        ({"checkpoint": "nowhere.ckpt"}, "there is no file nowhere.ckpt"),
        ({"crop_size": 512}, "model.crop_size is 512x512, but the backbone was built for 32x32 pixels: set img_size in model"),
        ({"backbone": "convnext_atto", "model_args": None}, "model.crop_size is missing: ConvNeXt takes any size"),
        (
            {"backbone": "hiera_tiny_224", "model_args": HIERA, "crop_size": 96},
            "crop_size is 96x96, but the backbone was built for 64",
        ),
        (
            {"backbone": "maxvit_tiny_tf_224", "model_args": MAXVIT, "crop_size": 512},
            "crop_size is 512x512, but the backbone was ",
        ),
        ({"crop_size": 0}, "model.crop_size is 0x0"),
        ({"inference": "windows"}, "model.inference is slide or whole, got 'windows'"),
        ({"betas": (0.9, 1.0)}, "model.betas are at least 0 and below 1, got [0.9, 1.0]"),
        ({"betas": (-0.1, 0.9)}, "model.betas"),
        ({"stride": 33}, "model.stride is within 1 to crop_size 32x32, got 33x33"),
        ({"stride": 0}, "model.stride"),
        ({"num_classes": 1}, "num_classes within 2 to 255"),
        ({"num_classes": 256}, "num_classes within 2 to 255"),
        ({"channels": 0}, "channels"),
        ({"recipe_batch": 0}, "recipe_batch"),
        ({"lr": 0.0}, "lr above 0"),
        ({"layer_decay": 1.1}, "layer_decay within 0 to 1"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight"),
        ({"dropout": 1.0}, "dropout"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"power": 0.0}, "power above 0"),
        ({"scales": ()}, "model.scales are one or more factors above 0"),
        ({"scales": (1.0, 0.0)}, "model.scales are one or more factors above 0"),
        ({"blocks": [0, 1, 2]}, "four of the backbone's 4 blocks"),
    ],
    ids=str,
)
def test_what_cannot_be_trained(options: dict[str, Any], expected: str) -> None:
    if options.get("backbone") == "model":
        options = {"backbone": timm.create_model(VIT, **NARROW)}
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        UperNetSegmentation(**{"backbone": VIT, "num_classes": 5, "model_args": NARROW, **options})
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


# Its pictures


def test_colours_are_far_apart_and_always_the_same() -> None:
    colors = palette(150)
    assert torch.equal(palette(11), colors[:11])
    assert len({tuple(color) for color in palette(255).tolist()}) == 255
    first = colors[:11].float()
    assert torch.cdist(first, first).fill_diagonal_(1e3).min() > 60
    assert colors.int().sum(1).min() > 100  # none is dark
    with pytest.raises(ValueError, match="colours for 1 to 460 classes, not for 461"):
        palette(461)


def test_the_overlay_is_half_photo_half_colour_above_a_legend() -> None:
    image = torch.rand(3, 50, 70)
    labels = torch.zeros(50, 70, dtype=torch.long)
    labels[:10], labels[40:] = 3, 1
    names = ["wall", "sky", "tree", "a bird with a long name"]
    picture = overlay(image, labels, names)
    found = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
    expected = (image.movedim(0, -1) * 255 + palette(4)[labels]) / 2
    assert (found[:50, :70] - expected).abs().max() <= 1.01
    shown = {tuple(color) for color in found[50:].flatten(0, 1).tolist()}
    occurring = {tuple(palette(4)[label].tolist()) for label in (0, 1, 3)}
    assert occurring <= shown
    assert tuple(palette(4)[2].tolist()) not in shown
    assert picture.width >= 70 + 50  # for the name


def test_the_label_picture_holds_the_labels() -> None:
    labels = torch.randint(0, 255, (9, 7))
    picture = label_picture(labels)
    assert picture.mode == "L"
    assert list(picture.tobytes()) == labels.flatten().tolist()
