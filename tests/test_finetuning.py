"""Fine-tuning: its step by hand, its rates, its metrics, its checkpoints; and the tasks on the command line that use them."""

import csv
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
import yaml
from conftest import PLAIN, ROOT, tiny_model
from PIL import Image
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from unimim import ClassFolderData, FineTuning, MaskTokenStudent, VisibleStudent, load_backbone
from unimim.cli.main import main
from unimim.tasks.knn import knn
from unimim.tasks.probing import accuracy, extract_features
from unimim.weights.checkpoint import describe_backbone

VIT = "vit_tiny_patch16_224"
CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
FINETUNE = sorted((ROOT / "conf" / "finetune").glob("*.yaml"))
PROBE = sorted((ROOT / "conf" / "probe").glob("*.yaml"))
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def seeded(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def noisy(model: nn.Module) -> nn.Module:
    """Every parameter filled with noise, for zeros would hide mistakes."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def tiny(**options: Any) -> FineTuning:
    """A narrow ViT from scratch that knows six classes."""
    backbone = {"backbone": VIT, "model_args": PLAIN, "num_classes": 6}
    model = FineTuning(**{**backbone, "label_smoothing": 0.0, "warmup_epochs": 1, **options})
    noisy(model.backbone)
    return model


def a_batch(count: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(count, 3, 32, 32), torch.arange(count) % 6


class Batches(pl.LightningDataModule):
    """Always the same images in the same order."""

    def __init__(self, count: int = 12, batch_size: int = 4, classes: list[str] | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.classes = CLASSES if classes is None else classes
        generator = torch.Generator().manual_seed(3)
        self.images = torch.rand(count, 3, 32, 32, generator=generator)
        self.labels = torch.randint(0, 6, (count,), generator=generator)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.images, self.labels), self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.images, self.labels), 5)


class Spy(pl.Callback):
    """What the optimizer's rates and the weights are, before each step and in each validation."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []
        self.learned: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        names = {id(parameter): name for name, parameter in pl_module.backbone.named_parameters()}
        groups = trainer.optimizers[0].param_groups
        self.rates.append({names[id(parameter)]: group["lr"] for group in groups for parameter in group["params"]})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.learned.append(pl_module.backbone.head.weight.detach().clone())

    def on_validation_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(pl_module.backbone.head.weight.detach().clone())


def fitted(model: FineTuning, data: pl.LightningDataModule, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    settings = {**QUIET, "max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **options}
    trainer = pl.Trainer(**settings, callbacks=list(callbacks))
    trainer.fit(model, datamodule=data)
    return trainer


# Its step


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of targets [b classes], written out."""
    log_probabilities = logits - logits.exp().sum(1, keepdim=True).log()
    return -(targets * log_probabilities).sum(1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_step_is_cross_entropy_of_normalized_pixels(smoothing: float) -> None:
    """vit_tiny normalizes by 0.5, as its `pretrained_cfg` says."""
    model = tiny(label_smoothing=smoothing).eval()
    images, labels = a_batch()
    targets = torch.full((6, 6), smoothing / 6)
    targets[range(6), labels] = 1 - smoothing + smoothing / 6
    expected = cross_entropy(model.backbone((images - 0.5) / 0.5), targets)
    torch.testing.assert_close(model.training_step((images, labels), 0), expected)
    torch.testing.assert_close(model(images), model.backbone((images - 0.5) / 0.5))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mixup_and_cutmix_are_timms(mixup: float, cutmix: float) -> None:
    model = tiny(label_smoothing=0.1, mixup=mixup, cutmix=cutmix).eval()
    images, labels = a_batch()
    plain = cross_entropy(model.backbone((images - 0.5) / 0.5), nn.functional.one_hot(labels, 6))
    for number in range(4):  # which of both draw mixup as well as cutmix
        seeded(number)
        loss = model.training_step((images, labels), 0)
        seeded(number)
        mixed, targets = Mixup(mixup, cutmix, label_smoothing=0.1, num_classes=6)((images - 0.5) / 0.5, labels)
        torch.testing.assert_close(loss, cross_entropy(model.backbone(mixed), targets))
        assert not torch.isclose(loss, plain)


def test_mixup_written_out() -> None:
    """Each image with its mirror in the batch, and so the smoothed targets."""
    model = tiny(label_smoothing=0.1, mixup=0.8).eval()
    images, labels = a_batch()
    seeded(5)
    mixed, targets = model.augment(images, labels)
    seeded(5)
    np.random.rand()  # whether to mix at all
    share = np.random.beta(0.8, 0.8)
    smoothed = nn.functional.one_hot(labels, 6) * 0.9 + 0.1 / 6
    torch.testing.assert_close(mixed, ((share * images + (1 - share) * images.flip(0)) - 0.5) / 0.5)
    torch.testing.assert_close(targets, share * smoothed + (1 - share) * smoothed.flip(0))


@pytest.mark.parametrize("probability", [0.5, 1.0])
def test_erasing_is_timms_on_normalized_pixels(probability: float) -> None:
    """Noise of a standard normal: only on normalized pixels is that of their size."""
    model = tiny(erasing=probability).eval()
    images, labels = a_batch()
    seeded(3)
    loss = model.training_step((images, labels), 0)
    seeded(3)
    erased = RandomErasing(probability, mode="pixel", device="cpu")((images - 0.5) / 0.5)
    torch.testing.assert_close(loss, cross_entropy(model.backbone(erased), nn.functional.one_hot(labels, 6)))
    changed = (erased != (images - 0.5) / 0.5).flatten(1).any(1).sum()
    assert changed == 6 if probability == 1 else 0 < changed < 6


def test_erasing_comes_before_mixing() -> None:
    model = tiny(erasing=1.0, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    images, labels = a_batch()
    seeded(2)
    augmented, targets = model.augment(images, labels)
    seeded(2)
    erased = RandomErasing(1.0, mode="pixel", device="cpu")((images - 0.5) / 0.5)
    expected, expected_targets = Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=6)(erased, labels)
    torch.testing.assert_close(augmented, expected)
    torch.testing.assert_close(targets, expected_targets)


def test_the_batch_is_left_as_it_was() -> None:
    model = tiny(erasing=1.0, mixup=0.8, cutmix=1.0)
    model.mean.zero_(), model.std.fill_(1.0)  # then normalizing is no excuse
    for number in range(4):
        images, labels = a_batch()
        before, labels_before = images.clone(), labels.clone()
        seeded(number)
        model.training_step((images, labels), 0)
        assert torch.equal(images, before)
        assert torch.equal(labels, labels_before)


def test_validation_and_prediction_neither_erase_nor_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(erasing=1.0, mixup=0.8, cutmix=1.0, label_smoothing=0.1).train()
    seen: list[Tensor] = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    monkeypatch.setattr(model, "log", lambda *_, **__: None)
    images, labels = a_batch()
    model.validation_step((images, labels), 0)
    probabilities, found = model.predict_step(images, 0)
    model.training_step((images, labels), 0)
    expected = (images - 0.5) / 0.5
    assert torch.equal(seen[0], expected)
    assert torch.equal(seen[1], expected)
    assert not torch.equal(seen[2], expected)
    by_hand = model.backbone(expected).exp()
    by_hand /= by_hand.sum(1, keepdim=True)
    torch.testing.assert_close(probabilities, by_hand.gather(1, found))
    assert torch.equal(found, by_hand.argsort(1, descending=True)[:, :5])


def test_the_new_head_is_scaled() -> None:
    heads = []
    for scale in (1.0, 0.001):
        torch.manual_seed(0)
        model = FineTuning(VIT, num_classes=6, model_args=PLAIN, head_init_scale=scale)
        heads.append({name: value.clone() for name, value in model.backbone.state_dict().items()})
    full, scaled = heads
    assert full["head.weight"].abs().max() > 1e-3
    for name, value in full.items():
        expected = value * 0.001 if name.startswith("head.") else value
        assert torch.equal(scaled[name], expected), name


# Its metrics


class Told(nn.Module):
    """The logits are the first row of pixels."""

    num_classes = 6
    global_pool = "avg"
    pretrained_cfg: ClassVar[dict[str, Any]] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :6]


def test_top_1_and_top_5_are_counts() -> None:
    """Over batches of 5, 5 and 3, which do not weigh the same."""
    data = Batches(count=13)
    model = FineTuning(Told())
    trainer = pl.Trainer(**QUIET)
    (measured,) = trainer.validate(model, datamodule=data, verbose=False)
    order = data.images[:, 0, 0, :6].argsort(1, descending=True).tolist()
    first = sum(label == row[0] for label, row in zip(data.labels.tolist(), order, strict=True))
    five = sum(label in row[:5] for label, row in zip(data.labels.tolist(), order, strict=True))
    assert 0 < first < five < 13
    assert measured["val/acc1"] == pytest.approx(first / 13)
    assert measured["val/acc5"] == pytest.approx(five / 13)


def test_fewer_than_five_classes() -> None:
    model = tiny(num_classes=2)
    images, _ = a_batch(4)
    probabilities, found = model.predict_step(images, 0)
    assert probabilities.shape == found.shape == (4, 2)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(4))
    assert float(model.acc5(model(images), torch.tensor([0, 1, 0, 1]))) == 1.0


# Its rates


def layer(name: str) -> int:
    """MAE's ids in a ViT of two blocks: embedding 0, blocks 1 and 2, the rest 3."""
    if name.startswith(("cls_token", "pos_embed", "patch_embed.")):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else 3


def test_the_optimizer_uses_warm_up_cosine_times_layer_decay() -> None:
    spy = Spy()
    model = tiny(lr=1e-2, layer_decay=0.65, warmup_epochs=1, warmup_lr=1e-3, min_lr=1e-4)
    trainer = fitted(model, Batches(), spy, max_epochs=3)
    assert len(spy.rates) == trainer.global_step == 9
    head = [1e-3 + (1e-2 - 1e-3) * step / 3 for step in range(3)]
    head += [1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    names = {name for name, _ in model.backbone.named_parameters()}
    assert {layer(name) for name in names} == {0, 1, 2, 3}
    for rates, rate in zip(spy.rates, head, strict=True):
        assert rates.keys() == names
        for name, used in rates.items():
            assert used == pytest.approx(rate * 0.65 ** (3 - layer(name)), rel=1e-9), name
    ends = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert ends["layer_3"] == pytest.approx(1e-4)
    assert ends["layer_0"] == pytest.approx(1e-4 * 0.65**3)


def test_another_batch_than_the_recipes_is_told_or_scaled(caplog: pytest.LogCaptureFixture) -> None:
    spy = Spy()
    with pytest.warns(UserWarning, match=r"^4 images a step, but lr 0.01 is meant for 16: 0.0025 would fit \(--model.scale_lr"):
        fitted(tiny(lr=1e-2, recipe_batch=16, warmup_epochs=0), Batches(), spy)
    assert max(spy.rates[0].values()) == pytest.approx(1e-2)
    spy = Spy()
    with caplog.at_level("INFO"):
        fitted(tiny(lr=1e-2, recipe_batch=16, warmup_epochs=0, scale_lr=True), Batches(), spy)
    assert "4 images a step, the recipe has 16: lr 0.01 becomes 0.0025" in caplog.text
    assert max(spy.rates[0].values()) == pytest.approx(2.5e-3)
    spy = Spy()  # all of the schedule
    lrs = {"lr": 1e-2, "warmup_epochs": 1, "warmup_lr": 4e-3, "min_lr": 8e-3}
    trainer = fitted(tiny(recipe_batch=16, scale_lr=True, layer_decay=1.0, **lrs), Batches(), spy, max_epochs=2)
    assert max(spy.rates[0].values()) == pytest.approx(1e-3)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(2e-3)
    spy = Spy()  # accumulated, 8 images a step
    fitted(tiny(lr=1e-2, recipe_batch=16, warmup_epochs=0, scale_lr=True), Batches(16), spy, accumulate_grad_batches=2)
    assert max(spy.rates[0].values()) == pytest.approx(5e-3)


@pytest.mark.filterwarnings("error:.*is meant for")
@pytest.mark.parametrize("recipe_batch", [None, 4])
def test_the_recipes_own_batch_is_silent(recipe_batch: int | None) -> None:
    spy = Spy()
    fitted(tiny(lr=1e-2, recipe_batch=recipe_batch, warmup_epochs=0, scale_lr=recipe_batch is not None), Batches(), spy)
    assert max(spy.rates[0].values()) == pytest.approx(1e-2)


def test_a_second_fit_does_not_scale_again() -> None:
    model = tiny(lr=1e-2, recipe_batch=16, warmup_epochs=0, scale_lr=True)
    for _ in range(2):
        spy = Spy()
        fitted(model, Batches(), spy)
        assert max(spy.rates[0].values()) == pytest.approx(2.5e-3)


def test_odd_batches_are_not_mixed() -> None:
    with pytest.raises(ValueError, match=r"^data.batch_size is 3, but mixup and cutmix mix pairs: make it even$"):
        fitted(tiny(mixup=0.8), Batches(batch_size=3))
    fitted(tiny(), Batches(batch_size=3))
    (measured,) = pl.Trainer(**QUIET).validate(tiny(mixup=0.8), datamodule=Batches(batch_size=3), verbose=False)
    assert "val/acc1" in measured


@pytest.mark.parametrize("task", ["fit", "validate"])
def test_another_number_of_classes_is_refused(task: str) -> None:
    with pytest.raises(ValueError, match=r"^the data has 2 classes, the classifier 6: set model.num_classes to 2$"):
        getattr(pl.Trainer(**QUIET, max_epochs=1), task)(tiny(), datamodule=Batches(classes=["ant", "bee"]))


# Its backbones


def test_a_backbone_made_by_the_user() -> None:
    backbone = timm.create_model(VIT, **PLAIN, num_classes=6, global_pool="avg")
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, "mean": MEAN, "std": STD}
    model = FineTuning(backbone, num_classes=1000)  # the number is a named backbone's
    assert model.backbone is backbone
    images, _ = a_batch()
    normalized = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(model(images), backbone(normalized))
    before = backbone.head.weight.detach().clone()
    trainer = fitted(model, Batches())
    assert trainer.global_step == 3
    assert not torch.equal(backbone.head.weight, before)


def test_a_classifier_from_a_file_keeps_its_scale(tmp_path: Path) -> None:
    """Only a new one starts near zero; one of another number of classes is new."""
    tuned = noisy(timm.create_model(VIT, num_classes=6, global_pool="avg", **PLAIN))
    torch.save(tuned.state_dict(), tmp_path / "tuned.pth")
    options = {"backbone": VIT, "model_args": PLAIN, "checkpoint": str(tmp_path / "tuned.pth"), "head_init_scale": 0.001}
    same = FineTuning(num_classes=6, **options)
    assert torch.equal(same.backbone.head.weight, tuned.head.weight)
    assert FineTuning(num_classes=5, **options).backbone.head.weight.abs().max() < 0.001


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"backbone": None}, "model.backbone is missing: a timm name"),
        ({"backbone": "vit_tinny_patch16_224"}, "timm has no model 'vit_tinny_patch16_224'. Nearest: "),
        ({"num_classes": 0}, "needs a backbone with a classifier"),
        ({"num_classes": 1}, "needs a backbone with a classifier"),
        ({"model_args": {**PLAIN, "global_pool": ""}}, "needs a backbone with a classifier"),
        ({"model_args": {"dept": 1}}, "does not take these model_args"),
        ({"checkpoint": "nowhere.ckpt"}, "there is no file nowhere.ckpt"),
        ({"backbone": "model"}, "model.checkpoint and model.model_args are for a backbone given by its name"),
        ({"lr": 0.0}, "lr above 0"),
        ({"layer_decay": 0.0}, "layer_decay within 0 to 1"),
        ({"layer_decay": 1.1}, "layer_decay within 0 to 1"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "model.betas are at least 0 and below 1, got [0.9, 1.0]"),
        ({"warmup_epochs": -1.0}, "warmup_epochs"),
        ({"mixup": -0.1}, "mixup"),
        ({"cutmix": -0.1}, "cutmix"),
        ({"erasing": 1.1}, "erasing a probability"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"label_smoothing": 1.5, "mixup": 0.8}, "label_smoothing"),
        ({"recipe_batch": 0}, "recipe_batch"),
        ({"min_lr": 1.0}, "min_lr and warmup_lr within 0 to lr"),
        ({"warmup_lr": -1.0}, "min_lr and warmup_lr within 0 to lr"),
        ({"head_init_scale": float("nan")}, "head_init_scale within 0 to 1"),
    ],
    ids=str,
)
def test_what_cannot_be_fine_tuned(options: dict[str, Any], expected: str) -> None:
    if options.get("backbone") == "model":
        options = {"backbone": timm.create_model(VIT, **PLAIN, num_classes=6, global_pool="avg"), "model_args": {"depth": 1}}
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        FineTuning(**{"backbone": VIT, "num_classes": 6, "model_args": PLAIN, **options})
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


# Its checkpoints


def pretrained_file(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint that a run of pretraining writes, and the encoder's weights."""
    student = MaskTokenStudent(VIT, PLAIN, mean=MEAN, std=STD)
    noisy(student)
    model = tiny_model(student=student)
    keeper = ModelCheckpoint(folder, "pretrained")
    settings = {**QUIET, "enable_checkpointing": True}
    trainer = pl.Trainer(**settings, max_epochs=1, callbacks=[keeper], log_every_n_steps=1)
    trainer.fit(model, DataLoader(torch.rand(4, 3, 32, 32), 2))
    assert trainer.global_step == 2
    return folder / "pretrained.ckpt", {key: value.clone() for key, value in student.backbone.state_dict().items()}


def test_from_a_run_of_pretraining_to_fine_tuning_bit_for_bit(tmp_path: Path) -> None:
    """The final norm alone is behind the pooling now; pixel statistics travel, against timm's 0.5 for the name."""
    path, encoder = pretrained_file(tmp_path)
    model = FineTuning(VIT, checkpoint=str(path), num_classes=6)
    weights = model.backbone.state_dict()
    fresh = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert weights.keys() - encoder.keys() == fresh
    assert encoder.keys() - weights.keys() == {"norm.weight", "norm.bias"}
    for key in weights.keys() & encoder.keys():
        assert torch.equal(weights[key], encoder[key]), key
    assert model.mean.flatten().tolist() == pytest.approx(MEAN)
    assert model.std.flatten().tolist() == pytest.approx(STD)
    images, labels = a_batch()
    normalized = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    expected = cross_entropy(model.eval().backbone(normalized), nn.functional.one_hot(labels, 6) * 0.9 + 0.1 / 6)
    torch.testing.assert_close(model.training_step((images, labels), 0), expected)


def test_the_files_model_args_can_be_changed(tmp_path: Path) -> None:
    path, _ = pretrained_file(tmp_path)
    model = FineTuning(VIT, checkpoint=str(path), num_classes=6, model_args={"img_size": 64, "drop_path_rate": 0.3})
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 6)
    assert model.backbone.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    assert model.backbone.embed_dim == 24


def test_its_own_checkpoint_needs_no_other_file(tmp_path: Path) -> None:
    path, _ = pretrained_file(tmp_path)
    model = FineTuning(VIT, checkpoint=str(path), num_classes=6, lr=1e-2, warmup_epochs=0, head_init_scale=0.1)
    fitted(model, Batches(), ModelCheckpoint(tmp_path, "tuned"), enable_checkpointing=True)
    path.unlink()
    images, _ = a_batch()
    expected = model.eval()(images)
    backbone = load_backbone(tmp_path / "tuned.ckpt").eval()
    assert backbone.pretrained_cfg["mean"] == pytest.approx(MEAN)
    assert backbone.pretrained_cfg["std"] == pytest.approx(STD)
    normalized = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(backbone(normalized), expected)
    again = FineTuning.load_from_checkpoint(tmp_path / "tuned.ckpt", weights_only=True).eval()
    assert torch.equal(again(images), expected)
    assert again.classes == CLASSES


def test_the_checkpoint_of_a_users_own_model(tmp_path: Path) -> None:
    """It cannot say which backbone it holds; whoever loads it does."""
    backbone = noisy(timm.create_model(VIT, **PLAIN, num_classes=6, global_pool="avg"))
    model = FineTuning(backbone, warmup_epochs=0)
    fitted(model, Batches(), ModelCheckpoint(tmp_path, "own"), enable_checkpointing=True)
    with pytest.raises(ValueError, match="does not say which backbone it holds"):
        load_backbone(tmp_path / "own.ckpt")
    again = load_backbone(tmp_path / "own.ckpt", backbone=VIT, **PLAIN, num_classes=6, global_pool="avg").eval()
    images, _ = a_batch()
    torch.testing.assert_close(again((images - 0.5) / 0.5), model.eval()(images))


class Killed(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise RuntimeError("killed")


@pytest.mark.parametrize("scale_lr", [False, True])
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path: Path, scale_lr: bool) -> None:
    def model() -> FineTuning:
        torch.manual_seed(0)
        return tiny(lr=1e-2, warmup_epochs=0.5, recipe_batch=8 if scale_lr else None, scale_lr=scale_lr)

    through, whole = model(), Spy()
    fitted(through, Batches(), whole, max_epochs=2)
    keeper = ModelCheckpoint(tmp_path, "halfway", save_on_train_epoch_end=True)
    first = Spy()
    with pytest.raises(RuntimeError, match="killed"):
        fitted(model(), Batches(), first, keeper, Killed(), max_epochs=2, enable_checkpointing=True)
    resumed, second = model(), Spy()
    noisy(resumed.backbone)  # what it begins with must not matter
    trainer = pl.Trainer(**QUIET, max_epochs=2, num_sanity_val_steps=0, callbacks=[second])
    trainer.fit(resumed, datamodule=Batches(), ckpt_path=tmp_path / "halfway.ckpt", weights_only=True)
    assert trainer.global_step == 6
    assert len(first.rates) == len(second.rates) == 3
    assert first.rates + second.rates == whole.rates
    assert max(whole.rates[2].values()) == pytest.approx(max(map(max, (r.values() for r in whole.rates))))
    for key, value in through.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_validation_and_checkpoint_take_the_moving_average(tmp_path: Path) -> None:
    """lightning's callback; the average starts from the weights after the first step."""
    spy = Spy()
    model = tiny(lr=1e-2, warmup_epochs=0)
    keeper = ModelCheckpoint(tmp_path, "averaged")
    fitted(model, Batches(), EMAWeightAveraging(decay=0.5), spy, keeper, max_epochs=2, enable_checkpointing=True)
    averages, average = [], spy.learned[0]
    for step, weight in enumerate(spy.learned):
        average = 0.5 * average + 0.5 * weight if step else weight
        averages.append(average)
    assert len(averages) == 6
    for validated, step in zip(spy.validated[::3], (2, 5), strict=True):  # three batches a validation
        torch.testing.assert_close(validated, averages[step])
        assert not torch.allclose(validated, spy.learned[step], rtol=1e-4)
    torch.testing.assert_close(load_backbone(tmp_path / "averaged.ckpt").head.weight.detach(), averages[5])
    torch.testing.assert_close(model.backbone.head.weight.detach(), averages[5])


# The command line


def class_folders(root: Path, names: list[str], train: int, val: int, side: int = 40) -> Path:
    """JPEGs, each class with its own colour under noise."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(names):
        for split, count in (("train", train), ("val", val)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                color = np.array([number % 2, number // 2 % 2, number // 4]) * 8
                pixels = generator.integers(0, 248, (side, side + i, 3)) + color
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.jpg")
    return root


def words_for(root: Path) -> list[str]:
    return [
        "--data=ClassFolderData",
        f"--data.root={root}",
        "--data.image_size=32",
        "--data.batch_size=6",
        "--data.num_workers=0",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]


class Run:
    """One fine-tuning on the command line, which several tests look at."""

    def __init__(self, folder: Path) -> None:
        from unimim.cli.tasks import finetune

        self.folder = folder
        self.data = class_folders(folder / "data", CLASSES, train=4, val=3)
        self.pretrained, _ = pretrained_file(folder)
        self.encoder = folder / "encoder.ckpt"
        self.encoder.write_bytes(self.pretrained.read_bytes())
        words = [f"--model.backbone={VIT}", f"--model.checkpoint={self.pretrained}", "--model.num_classes=6"]
        words += ["--model.lr=0.003", "--model.warmup_epochs=0", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"]
        self.cli = finetune(["fit", *words, *words_for(self.data)])
        self.reported = float(self.cli.trainer.callback_metrics["val/acc1"])
        (self.checkpoint,) = folder.rglob("epoch=*.ckpt")
        self.pretrained.unlink()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        yield Run(folder)


def test_finetune_fit(run: Run) -> None:
    assert run.cli.trainer.global_step == 8  # 24 images, 6 a step
    assert run.checkpoint.is_relative_to(run.folder / "outputs" / "finetune" / "version_0")
    assert (run.folder / "outputs" / "finetune" / "version_0" / "config.yaml").is_file()
    metrics = list(csv.DictReader((run.folder / "outputs/finetune/version_0/metrics.csv").open()))
    assert len([row for row in metrics if row["train/loss"]]) == 8
    assert [float(row["val/acc1"]) for row in metrics if row["val/acc1"]][-1] == pytest.approx(run.reported)
    content = torch.load(run.checkpoint, weights_only=True)
    assert content["classes"] == CLASSES
    assert content["metrics"]["val/acc1"] == pytest.approx(run.reported)
    assert content["datamodule_hyper_parameters"]["image_size"] == 32


def test_finetune_validate_repeats_what_training_reported(run: Run) -> None:
    """With nothing but the checkpoint: the pretraining's file is gone, and no --model is given."""
    from unimim.cli.tasks import finetune

    assert not run.pretrained.exists()
    cli = finetune(["validate", f"--ckpt_path={run.checkpoint}", *words_for(run.data), "--data.batch_size=5"])
    assert float(cli.trainer.callback_metrics["val/acc1"]) == pytest.approx(run.reported)
    backbone = load_backbone(run.checkpoint).eval()
    data = ClassFolderData(str(run.data), image_size=32, batch_size=6, num_workers=0)
    data.setup("validate")
    right = 0
    with torch.no_grad():
        for images, labels in data.val_dataloader():
            logits = backbone((images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
            right += int((logits.argmax(1) == labels).sum())
    assert right / 18 == pytest.approx(run.reported)


def test_arguments_of_the_backbone_are_given_beside_the_checkpoints(run: Run) -> None:
    from unimim.cli.tasks import finetune

    words = ["validate", f"--ckpt_path={run.checkpoint}", "--model.model_args.dynamic_img_size=true", *words_for(run.data)]
    cli = finetune(words)
    assert cli.model.backbone.dynamic_img_size
    assert float(cli.trainer.callback_metrics["val/acc1"]) == pytest.approx(run.reported)


def test_finetune_that_goes_on_knows_where_it_began(run: Run) -> None:
    """A backbone by its name, as `fit --ckpt_path` makes it."""
    model = FineTuning.load_from_checkpoint(run.checkpoint, weights_only=True)
    assert model.checkpoint is None
    model.trainer = pl.Trainer(**QUIET)
    content: dict[str, Any] = {"state_dict": {}}
    model.on_save_checkpoint(content)
    assert content["pretrained_from"] == str(run.pretrained)


def test_finetune_validate_with_the_runs_own_config(run: Run) -> None:
    from unimim.cli.tasks import finetune

    config = run.folder / "outputs" / "finetune" / "version_0" / "config.yaml"
    cli = finetune(["validate", f"--config={config}", f"--ckpt_path={run.checkpoint}"])
    assert float(cli.trainer.callback_metrics["val/acc1"]) == pytest.approx(run.reported)


def test_finetune_validate_on_other_classes_is_refused(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["another", *CLASSES[1:]]
    words = words_for(class_folders(tmp_path / "data", names, train=1, val=1))
    line = mistake(capsys, "finetune", "validate", f"--ckpt_path={run.checkpoint}", *words)
    labels = sorted(names)
    first = next(label for label, (ours, theirs) in enumerate(zip(labels, CLASSES, strict=True)) if ours != theirs)
    assert f"class {first} of the data is {labels[first]!r}, of the checkpoint {CLASSES[first]!r}" in line


TWO_PROCESSES = ["--trainer.devices=2", "--trainer.strategy=ddp"]


def unimim(folder: Path, *words: str) -> str:
    """What a command says, run by itself; it has to end well."""
    command = [sys.executable, "-m", "unimim", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_processes_validate_as_one_does(run: Run, tmp_path: Path) -> None:
    """17 images: a sampler that fills up the second process's share would count one twice."""
    data = tmp_path / "data"
    shutil.copytree(run.data, data)
    next(data.glob("val/*/0.jpg")).unlink()
    words = ["finetune", "validate", f"--ckpt_path={run.checkpoint}", *words_for(data), "--data.batch_size=4"]
    one, two = ({*re.findall(r"val/acc\d.+?(0\.\d+)", unimim(tmp_path, *words, *more))} for more in ([], TWO_PROCESSES))
    assert len(one) == 2
    assert one == two


@pytest.mark.slow
def test_predict_is_one_process_whatever_is_asked(run: Run, tmp_path: Path) -> None:
    photos = photo_folder(tmp_path / "photos")
    words = ["finetune", "predict", f"--ckpt_path={run.checkpoint}", *words_for(photos), *TWO_PROCESSES, "--output=a.csv"]
    assert "10 files: a.csv" in unimim(tmp_path, *words)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["file"] for row in rows] == [str(file) for file in sorted(photos.rglob("*.png"))]


def test_finetune_predict_of_the_first_batches(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from unimim.cli.tasks import finetune

    photos, output = photo_folder(tmp_path / "photos"), tmp_path / "predicted.csv"
    words = ["predict", f"--ckpt_path={run.checkpoint}", *words_for(photos), "--data.batch_size=4", f"--output={output}"]
    finetune([*words, "--trainer.limit_predict_batches=2"])
    assert f"8 files: {output}" in capsys.readouterr().out
    rows = list(csv.DictReader(output.open()))
    assert [row["file"] for row in rows] == [str(file) for file in sorted(photos.rglob("*.png"))[:8]]
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["predicted.csv"]


def photo_folder(root: Path) -> Path:
    """Ten photos that are no squares, some below a subfolder."""
    root.mkdir()
    (root / "more").mkdir()
    generator = np.random.default_rng(1)
    for i in range(10):
        pixels = generator.integers(0, 256, (30 + 3 * i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / ("more" if i % 4 == 0 else "") / f"{i}.png")
    return root


def test_finetune_predict_writes_file_labels_and_probabilities(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unimim.cli.tasks import finetune

    photos, output = photo_folder(tmp_path / "photos"), tmp_path / "predicted.csv"
    words = ["predict", f"--ckpt_path={run.checkpoint}", *words_for(photos), "--data.batch_size=4", f"--output={output}"]
    finetune(words)
    assert f"10 files: {output}" in capsys.readouterr().out
    rows = list(csv.DictReader(output.open()))
    files = sorted(photos.rglob("*.png"))
    assert [row["file"] for row in rows] == [str(file) for file in files]
    places = [column for place in range(1, 6) for column in (f"label_{place}", f"probability_{place}")]
    assert list(rows[0]) == ["file", *places]
    backbone = load_backbone(run.checkpoint).eval()
    evaluation = ClassFolderData(str(photos), image_size=32, num_workers=0).evaluation
    for file, row in zip(files, rows, strict=True):
        pixels = evaluation(Image.open(file).convert("RGB"))
        with torch.no_grad():
            logits = backbone(((pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))[None])[0]
        softmax = (logits.exp() / logits.exp().sum()).tolist()
        best = sorted(range(6), key=lambda label: -softmax[label])[:5]
        assert [row[f"label_{place}"] for place in range(1, 6)] == [CLASSES[label] for label in best]
        written = [float(row[f"probability_{place}"]) for place in range(1, 6)]
        assert written == sorted(written, reverse=True)
        assert written == pytest.approx([softmax[label] for label in best], abs=2e-5)
    before = output.read_bytes()
    with pytest.raises(SystemExit, match=r"^unimim: error: output: .*predicted.csv exists, and is not overwritten"):
        main(["finetune", *words])
    assert output.read_bytes() == before


def test_finetune_predict_leaves_no_row_for_a_file_that_was_skipped(run: Run, tmp_path: Path) -> None:
    """The next photo stands in for it in the batch, but its answer is not this file's."""
    from unimim.cli.tasks import finetune

    photos, output = photo_folder(tmp_path / "photos"), tmp_path / "predicted.csv"
    (photos / "3.png").write_bytes(b"no image")
    words = ["predict", f"--ckpt_path={run.checkpoint}", *words_for(photos), f"--output={output}"]
    with pytest.warns(UserWarning, match="3.png"):
        finetune([*words, "--data.on_bad_image=skip"])
    rows = list(csv.DictReader(output.open()))
    expected = [str(file) for file in sorted(photos.rglob("*.png")) if file.name != "3.png"]
    assert [row["file"] for row in rows if row["label_1"]] == expected


def test_knn_is_the_one_of_the_library(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    from unimim.cli.tasks import knn as command

    data = [word for word in words_for(run.data) if word.startswith("--data")]
    reached = command([f"--checkpoint={run.encoder}", *data, "--k=3", "--device=cpu"])
    assert f"k-NN: {reached:.4f} of 18 images, k 3, 24 in the bank" in capsys.readouterr().out
    images = ClassFolderData(str(run.data), image_size=32, batch_size=7, num_workers=0)
    images.setup("validate")
    backbone = load_backbone(run.encoder)
    bank, bank_labels = extract_features(backbone, images.labelled_dataloader("train"))
    features, labels = extract_features(backbone, images.labelled_dataloader("val"))
    assert (len(bank), len(features)) == (24, 18)
    assert reached == pytest.approx(accuracy(knn(features, bank, bank_labels, k=3), labels))
    other = command([f"--checkpoint={run.encoder}", *data, "--k=3", "--device=cpu", "--feature=cls"])
    bank, _ = extract_features(backbone, images.labelled_dataloader("train"), "cls")
    features, _ = extract_features(backbone, images.labelled_dataloader("val"), "cls")
    assert other == pytest.approx(accuracy(knn(features, bank, bank_labels, k=3), labels))


@pytest.mark.parametrize(("to", "name"), [("timm", "tuned.pth"), ("safetensors", "tuned.safetensors")])
def test_export_for_timm(run: Run, tmp_path: Path, to: str, name: str) -> None:
    main(["export", f"--checkpoint={run.checkpoint}", f"--output={tmp_path / name}", f"--to={to}"])
    described = load_backbone(run.checkpoint)
    arguments = {**PLAIN, "num_classes": 6, "global_pool": "avg"}
    exported = timm.create_model(VIT, checkpoint_path=str(tmp_path / name), **arguments).eval()
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(exported(pixels), described.eval()(pixels))
    card = (tmp_path / f"{name}.md").read_text()
    assert f"timm.create_model('{VIT}'" in card
    assert "0.4, 0.5, 0.6" in card
    with pytest.raises(SystemExit, match=r"^unimim: error: .* exists and is not overwritten"):
        main(["export", f"--checkpoint={run.checkpoint}", f"--output={tmp_path / name}", f"--to={to}"])
    shutil.copy(run.checkpoint, tmp_path / "last.ckpt")  # the short way: beside the checkpoint
    main(["export", str(tmp_path / "last.ckpt"), "--to", to])
    beside = timm.create_model(VIT, checkpoint_path=str((tmp_path / "last").with_suffix(Path(name).suffix)), **arguments)
    assert torch.equal(beside.eval()(pixels), exported(pixels))


@pytest.mark.parametrize("kind", ["LinearProbe", "AttentiveProbe"])
def test_probe_fit_and_validate_with_a_checkpoint_of_pretraining(
    run: Run, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from unimim.cli.tasks import probe

    monkeypatch.chdir(tmp_path)
    model = [f"--model={kind}", f"--model.backbone={run.encoder}", "--model.num_classes=6", "--model.lrs=[0.01, 0.1]"]
    model += ["--model.warmup_epochs=0"] + (["--model.num_heads=2"] if kind == "AttentiveProbe" else [])
    cli = probe(["fit", *model, *words_for(run.data), "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"])
    assert cli.trainer.global_step == 8
    said = capsys.readouterr().out
    assert re.search(r"^ +0\.01 +\d\.\d{4}", said, re.M)
    assert len(re.findall(r"best$", said, re.M)) == 1
    expected = load_backbone(run.encoder).state_dict()
    for key, value in cli.model.backbone.network.state_dict().items():
        assert torch.equal(value, expected[key]), key
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    assert not any(key.startswith("backbone.") for key in torch.load(checkpoint, weights_only=True)["state_dict"])
    again = probe(["validate", *model, *words_for(run.data), f"--ckpt_path={checkpoint}"])
    for name in ("val/acc1", "val/acc1_lr_0.01", "val/acc1_lr_0.1", "val/best_lr"):
        assert float(again.trainer.callback_metrics[name]) == pytest.approx(float(cli.trainer.callback_metrics[name]))
    other = "AttentiveProbe" if kind == "LinearProbe" else "LinearProbe"
    validate = ["probe", "validate", *words_for(run.data)]
    assert "a probe with lrs [0.01, 0.1], this one has lrs [0.1]" in mistake(
        capsys, *validate, *model, "--model.lrs=[0.1]", f"--ckpt_path={checkpoint}"
    )
    heads = ["--model.num_heads=2"] if other == "AttentiveProbe" else []
    options = ["--model.num_classes=6", f"--model.backbone={run.encoder}", "--model.lrs=[0.01, 0.1]", *heads]
    assert f"a probe with kind {kind}, this one has kind {other}" in mistake(
        capsys, *validate, f"--model={other}", *options, f"--ckpt_path={checkpoint}"
    )
    assert "the checkpoint's probe was trained on another backbone" in mistake(
        capsys, *validate, *model, f"--model.backbone={run.checkpoint}", f"--ckpt_path={checkpoint}"
    )
    assert "not one of a probe" in mistake(capsys, *validate, *model, f"--ckpt_path={run.encoder}")


# Mistakes on the command line


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which a wrong command ends."""
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert isinstance(end.value.code, str), capsys.readouterr().err
    assert "\n" not in end.value.code
    assert end.value.code.startswith("unimim: error: ")
    assert "Traceback" not in capsys.readouterr().err
    return end.value.code


LINEAR = ["--model=LinearProbe", "--model.num_classes=6"]
NAMED = [f"--model.backbone={VIT}", "--model.num_classes=6", f"--model.model_args={PLAIN}"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit"], "model.backbone is missing: a timm name"),
        (["fit", *NAMED, "--model.checkpoint=nowhere.ckpt"], "there is no file nowhere.ckpt to read weights from"),
        (["fit", *NAMED, "--model.checkpoint=segmenter.pth"], "segmenter.pth does not fit vit_tiny_patch16_224, nothing was"),
        (["fit", *NAMED, "--model.checkpoint=truncated.ckpt"], "truncated.ckpt cannot be read as weights"),
        (["fit", *NAMED, "--model.layer_deccay=1"], "no option --model.layer_deccay. Did you mean '--model.layer_decay'?"),
        (["fit", *NAMED, "--data.imagesize=32"], "takes no 'imagesize'. Did you mean 'image_size'?"),
        (["fit", *NAMED, "--data.image_size=48"], "images are 48x48 pixels, but the backbone was built for 32x32"),
        (["fit", *NAMED, "--model.num_classes=5"], "the data has 6 classes, the classifier 5: set model.num_classes to 6"),
        (["fit", *NAMED, "--model.mixup=0.8", "--data.batch_size=3"], "data.batch_size is 3, but mixup and cutmix mix pairs"),
        (["fit", *NAMED, "--data.root=nowhere"], "fine-tuning needs nowhere/train and nowhere/val"),
        (["fit", *NAMED, "--data.batch_size=25"], "train has 24 images, which is less than one batch of 25"),
        (["fit", *NAMED, "--model.erasing=2"], "erasing a probability"),
        (["fit", "--model.backbone=vit_tinny_patch16_224"], "timm has no model 'vit_tinny_patch16_224'. Nearest: vit_tiny"),
        (["fit", *NAMED, "--model.model_args={dept: 1}"], "does not take these model_args"),
        (["validate"], "ckpt_path is missing: validate needs --ckpt_path FILE"),
        (["predict"], "ckpt_path is missing: predict needs --ckpt_path FILE"),
        (["validate", "--ckpt_path=nowhere.ckpt"], "ckpt_path: nowhere.ckpt does not exist"),
        (["validate", "--ckpt_path=truncated.ckpt"], "ckpt_path: truncated.ckpt is truncated, or no checkpoint"),
        (["validate", "--ckpt_path=encoder.ckpt"], "ckpt_path: encoder.ckpt is no checkpoint of fine-tuning"),
        (["fit", *NAMED, "--ckpt_path=encoder.ckpt"], "--model.checkpoint"),
        (["validate", "--ckpt_path=TUNED", "--model.num_classes=7"], "model.num_classes is 7, of TUNED it is 6: leave it out"),
        (["validate", "--ckpt_path=TUNED", "--model.backbone=vit_small_patch16_224"], f"of TUNED it is {VIT}: leave it out"),
        (["validate", "--ckpt_path=TUNED", "--model.model_args.embed_dim=48"], "TUNED does not fit FineTuning, nothing was"),
        (["predict", "--ckpt_path=TUNED", "--output=nowhere/a.csv"], "output: there is no folder nowhere"),
        (["predict", "--ckpt_path=TUNED", "--data.root=nowhere"], "data.root: there is no folder nowhere"),
        (["predict", "--ckpt_path=TUNED", "--data=FashionMNISTData", f"--data.root={ROOT}/data"], "predict_dataloader"),
        (["fit", *NAMED, "--data=FashionMNISTData", "--data.image_size=32", f"--data.root={ROOT}/data"], "data.labelled"),
    ],
    ids=lambda value: " ".join(word for word in value if word not in NAMED) if isinstance(value, list) else "",
)
def test_mistakes_in_finetune_are_one_line(
    run: Run,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = timm.create_model(VIT, **PLAIN, num_classes=0)
    segmenter = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    segmenter |= {"decode_head.conv_seg.weight": torch.zeros(150, 24, 1, 1), "auxiliary_head.conv_seg.bias": torch.zeros(150)}
    torch.save({"state_dict": segmenter, "meta": {"CLASSES": ["wall"]}}, "segmenter.pth")
    Path("truncated.ckpt").write_bytes(run.encoder.read_bytes()[:5000])
    Path("encoder.ckpt").write_bytes(run.encoder.read_bytes())
    words = [word.replace("TUNED", str(run.checkpoint)) for word in words]
    given = words_for(run.data)
    if "--data=FashionMNISTData" in words:
        given = [word for word in given if not word.startswith(("--data=", "--data.root"))]
        given, words = [*words[1:], *given], words[:1]
    off = ["--trainer.max_epochs=1", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    line = mistake(capsys, "finetune", words[0], *given, *off, *words[1:])
    assert expected.replace("TUNED", str(run.checkpoint)) in line
    assert not list(tmp_path.rglob("*.csv"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["probe", "fit"], "model is missing: give --model"),
        (["probe", "fit", "--model.num_classes=6"], "LinearProbe"),
        (
            ["probe", "fit", "--model=LinearPrube"],
            "no class 'LinearPrube'. Did you mean 'LinearProbe'? Known: AttentiveProbe, L",
        ),
        (["probe", "fit", *LINEAR], "model.backbone is missing: give --model.backbone"),
        (["probe", "fit", *LINEAR, "--model.backbone=nowhere.ckpt"], "there is no file nowhere.ckpt to read weights from"),
        (["probe", "fit", *LINEAR, "--model.backbone=ENCODER", "--model.num_classes=5"], "the data has 6 classes, the "),
        (["probe", "fit", *LINEAR, "--model.backbone=ENCODER", "--data.image_size=48"], "images are 48x48 pixels, but the b"),
        (["probe", "fit", *LINEAR, "--model.backbone=ENCODER", "--model.lrs=[0.1, 0.1]"], "model.lrs takes one or more diff"),
        (["probe", "validate", *LINEAR, "--model.backbone=ENCODER"], "ckpt_path is missing: validate needs --ckpt_path FILE"),
        (["knn", "--checkpoint=nowhere.ckpt"], "there is no file nowhere.ckpt"),
        (["knn"], "checkpoint is missing: give --checkpoint"),
        (["knn", "--checkpoint=ENCODER", "--k=0"], "asks 0 neighbours"),
        (
            ["knn", "--checkpoint=ENCODER", "--k=3", "--device=cdua"],
            "device: 'cdua' is none of cpu, cuda, mps. Did you mean 'c",
        ),
        (["knn", "--checkpoint=ENCODER", "--k=99"], "asks 99 neighbours, but only 24 images"),
        (["knn", "--checkpoint=ENCODER", "--faeture=cls"], "there is no option --faeture. Did you mean '--feature'?"),
        (["knn", "--checkpoint=ENCODER", "--k=3", "--data.image_size=48"], "images are 48x48 pixels"),
        (["knn", "--checkpoint=ENCODER", "--k=3", "--data.root=nowhere"], "nowhere"),
        (["export", "--checkpoint=nowhere.ckpt", "--output=a.pth"], "there is no file nowhere.ckpt"),
        (["export", "--checkpoint=ENCODER", "--output=a.txt"], "from a file that ends in .pth or .pt"),
        (["export"], "checkpoint is missing: give --checkpoint"),
        (["export", "nowhere.ckpt"], "there is no file nowhere.ckpt"),
        (["export", "ENCODER", "--output=a.pth", "--to=onnx"], "to: 'onnx' is none of timm, safetensors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_in_probe_knn_and_export_are_one_line(
    run: Run,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word.replace("ENCODER", str(run.encoder)) for word in words]
    given = [] if words[0] == "export" else words_for(run.data)
    given = [word for word in given if not word.startswith("--trainer") or words[0] == "probe"]
    command = words[:2] if words[0] == "probe" else words[:1]
    assert expected in mistake(capsys, *command, *given, *words[len(command) :])


@pytest.mark.skipif(torch.cuda.is_available(), reason="it is about a machine without a GPU")
def test_knn_on_a_device_that_is_not_there(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    data = [word for word in words_for(run.data) if word.startswith("--data")]
    line = mistake(capsys, "knn", str(run.encoder), *data, "--device=cuda")
    assert line == "unimim: error: device is cuda, but torch finds none here: give --device cpu"


# conf/finetune and conf/probe


def recipe(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


every_file = pytest.mark.parametrize("path", [*FINETUNE, *PROBE], ids=lambda path: f"{path.parent.name}_{path.stem}")


def test_there_are_the_files() -> None:
    assert {path.stem for path in FINETUNE} == {*SOURCE, "vit_huge", "sample"}
    assert {path.stem for path in PROBE} >= {"linear", "attentive"}


@every_file
def test_the_header_is_a_lab_note(path: Path) -> None:
    """Its own path in the command; devices times batch are the images a step that it speaks of."""
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"^# Reported: \S", header, re.M)
    assert re.search(r"Ours: \S", header)
    (command,) = re.findall(r"^#   unimim (\w+) fit .*conf/(\S+)", header, re.M)
    assert command == (path.parent.name, f"{path.parent.name}/{path.name}")
    if path.stem == "sample":
        return
    config = recipe(path)
    (devices,) = re.findall(r"--trainer\.devices (\d+)", header)
    (images, told, each) = re.findall(r"\(([\d,]+) images a step, here as (\d+) devices x (\d+)", header)[0]
    batch = config["data"]["init_args"]["batch_size"]
    assert (told, int(each)) == (devices, batch)
    assert int(images.replace(",", "")) == int(devices) * batch
    if path.parent.name == "finetune":
        assert config["model"]["recipe_batch"] == int(devices) * batch
        assert re.search(rf"lr: .*absolute, at {images} images a step", path.read_text())


SOURCE = {  # images a step, lr, layer decay, epochs, warm-up, drop path: the official commands and defaults of each header
    "vit_base": (1024, 5e-4, 0.65, 100, 20, 0.1),
    "vit_large": (1024, 5e-4, 0.8, 50, 5, 0.2),
    "swin_base": (2048, 1.25e-3 * 4, 0.9, 100, 20, 0.1),
    "beit_vit_base": (1024, 4e-3, 0.65, 100, 20, 0.1),
    "data2vec_vit_base": (1024, 4e-3, 0.65, 100, 10, 0.2),
    "dbot_vit_base": (1024, 3e-4 * 4, 0.65, 100, 5, 0.1),
    "eva_vit_large": (1024, 2e-4, 0.8, 50, 5, 0.2),
    "feature_distillation_vit_base": (2048, 1.25e-3 * 4, 0.6, 100, 20, 0.3),
    "ibot_vit_small": (1024, 4e-3, 0.75, 200, 20, 0.1),
    "mae_vit_base": (1024, 5e-4 * 4, 0.65, 100, 5, 0.1),
    "maskalign_vit_base": (1024, 3e-4 * 4, 0.55, 100, 5, 0.2),
    "maskfeat_vit_base": (512, 2e-3, 0.65, 100, 20, 0.1),
    "milan_vit_base": (1024, 1e-4 * 4, 0.65, 100, 5, 0.1),
    "simmim_vit_base": (2048, 1.25e-3 * 4, 0.65, 100, 20, 0.1),
}
RATES = {  # where they are others: weight decay, start of warm-up, end of the cosine, clipping
    "swin_base": (0.05, 1e-6, 1e-6, 5.0),
    "data2vec_vit_base": (0.0, 0.0, 1e-6, None),
    "eva_vit_large": (0.05, 0.0, 0.0, None),
    "feature_distillation_vit_base": (0.05, 1e-6, 1e-6, 5.0),
    "maskfeat_vit_base": (0.05, 1e-8, 1e-6, None),
    "simmim_vit_base": (0.05, 1e-6, 1e-6, 5.0),
}
CLASSIFIER = {"swin_base": 0.02, "dbot_vit_base": 0.01, "milan_vit_base": 0.02}
"""Standard deviation of a new classifier's weights where it is not 2e-5."""


@pytest.mark.parametrize("name", SOURCE)
def test_recipes_are_the_published_ones(name: str) -> None:
    config = recipe(ROOT / "conf" / "finetune" / f"{name}.yaml")
    model, data, trainer = config["model"], config["data"]["init_args"], config["trainer"]
    found = (model["recipe_batch"], model["lr"], model["layer_decay"], trainer["max_epochs"], model["warmup_epochs"])
    assert (*found, model["model_args"]["drop_path_rate"]) == pytest.approx(SOURCE[name])
    rates = (model["weight_decay"], model["warmup_lr"], model["min_lr"], trainer.get("gradient_clip_val"))
    assert rates == RATES.get(name, (0.05, 0.0, 1e-6, None))
    assert (model["mixup"], model["cutmix"], model["label_smoothing"], model["erasing"]) == (0.8, 1.0, 0.1, 0.25)
    assert model["betas"] == [0.9, 0.999]
    assert (data["auto_augment"], data["crop_scale"], data["crop_pct"]) == ("rand-m9-mstd0.5-inc1", [0.08, 1.0], 0.875)
    assert (data["image_size"], model["model_args"]["img_size"]) == (224, 224)
    assert "callbacks" not in trainer  # no moving average
    built = FineTuning(
        model["backbone"],
        num_classes=500,
        model_args={**model["model_args"], **(NARROW_SWIN if name == "swin_base" else NARROW)},
        head_init_scale=model["head_init_scale"],
    ).backbone
    assert built.get_classifier().weight.std().item() == pytest.approx(CLASSIFIER.get(name, 2e-5), rel=0.05)
    pooled = "token" if name == "ibot_vit_small" else "avg"  # CLS or the mean of the patches
    assert built.global_pool == pooled
    if name == "swin_base":
        return
    assert isinstance(built.fc_norm, nn.LayerNorm) == (pooled == "avg")
    assert isinstance(built.norm, nn.Identity) == (pooled == "avg")
    assert built.cls_token.shape[1] == 1
    biased = model["model_args"].get("use_rel_pos_bias", False)  # BEiT's kin: a bias in every block; the others: positions
    assert biased == (built.pos_embed is None)
    assert not biased or built.blocks[0].attn.relative_position_bias_table is not None


@pytest.mark.parametrize("name", ["mae_vit_base", "maskalign_vit_base", "dbot_vit_base", "milan_vit_base"])
def test_a_new_classifier_starts_so_after_a_pretraining_that_began_otherwise(name: str, tmp_path: Path) -> None:
    """The pretraining's `weight_init: jax` would start the classifier at 0."""
    model = recipe(ROOT / "conf" / "finetune" / f"{name}.yaml")["model"]
    student = VisibleStudent(VIT, {"weight_init": "jax", "img_size": 32, **NARROW}, positions="sincos")
    file = tmp_path / "encoder.ckpt"
    weights = {f"student.{key}": value for key, value in student.state_dict().items()}
    torch.save({"state_dict": weights, "backbone": describe_backbone(student)}, file)
    args = {**model["model_args"], **NARROW, "img_size": 32}
    built = FineTuning(model["backbone"], str(file), 500, args, head_init_scale=model["head_init_scale"]).backbone
    assert built.head.weight.std().item() == pytest.approx(CLASSIFIER.get(name, 2e-5), rel=0.05)


NARROW = {"embed_dim": 24, "depth": 2, "num_heads": 2}
NARROW_SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}


@pytest.fixture(scope="module")
def small_imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_folders(tmp_path_factory.mktemp("imagenet"), CLASSES, train=2, val=1, side=60)


@every_file
def test_two_steps_at_small_width(path: Path, small_imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of the file but its width, its batch and its length; nothing is written."""
    from unimim.cli import tasks as commands

    monkeypatch.chdir(tmp_path)
    config = recipe(path)
    words = ["fit", f"--config={path}", "--trainer.max_epochs=null", "--trainer.max_steps=2", "--trainer.accelerator=cpu"]
    words += ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    if path.stem == "sample":
        words += [f"--data.root={ROOT / 'data'}", "--data.val_images=100"]
    else:
        words += [f"--data.root={small_imagenet}", "--data.batch_size=4", "--data.num_workers=0"]
    if path.parent.name == "probe":
        student = MaskTokenStudent(VIT, NARROW)
        weights = {f"student.{key}": value for key, value in student.state_dict().items()}
        file = tmp_path.parent / f"{path.stem}_encoder.ckpt"
        torch.save({"state_dict": weights, "backbone": describe_backbone(student)}, file)
        words += ["--model.num_classes=6", f"--model.backbone={file}"]
    else:
        args = {**config["model"]["model_args"], **(NARROW_SWIN if "swin" in config["model"]["backbone"] else NARROW)}
        words += [f"--model.model_args={yaml.safe_dump(args, default_flow_style=True).strip()}"]
        words += [] if path.stem == "sample" else ["--model.num_classes=6"]
    cli = getattr(commands, path.parent.name)(words)
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    assert list(tmp_path.iterdir()) == []


def test_the_moving_average_as_the_headers_say(small_imagenet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unimim.cli.tasks import finetune

    monkeypatch.chdir(tmp_path)
    told = {
        path.stem: re.findall(r"^# Moving average .*: (--trainer.callbacks .*)$", path.read_text(), re.M) for path in FINETUNE
    }
    (words,) = told["vit_base"]
    assert all(found == [words] for name, found in told.items() if name != "sample")
    path = ROOT / "conf" / "finetune" / "vit_base.yaml"
    args = {**recipe(path)["model"]["model_args"], **NARROW}
    command = ["fit", f"--config={path}", f"--data.root={small_imagenet}", "--data.batch_size=4", "--data.num_workers=0"]
    command += [f"--model.model_args={yaml.safe_dump(args, default_flow_style=True).strip()}", "--model.num_classes=6"]
    command += ["--model.lr=0.01", "--model.warmup_epochs=0", "--trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    command += ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false"]
    spy = Spy()
    monkeypatch.setattr(FineTuning, "configure_callbacks", lambda self: [spy])
    cli = finetune([*command, *words.split()])
    average = spy.learned[0]
    for weight in spy.learned[1:]:
        average = 0.9999 * average + 0.0001 * weight
    assert not torch.allclose(average, spy.learned[-1], rtol=1e-3)
    torch.testing.assert_close(spy.validated[-1], average)
    torch.testing.assert_close(cli.model.backbone.head.weight.detach().cpu(), average)
