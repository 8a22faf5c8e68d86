"""The step against equation 1 written out, and the training around it."""

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import tiny_model, tiny_student
from einops import rearrange
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from unimim import (
    AttentiveProbe,
    CodebookTarget,
    FeatureTarget,
    FineTuning,
    Frozen,
    HOGTarget,
    LayerNorm,
    LinearHead,
    LinearProbe,
    Mask,
    MaskedImageModeling,
    Masking,
    MaskTokenStudent,
    PixelTarget,
    RandomMasking,
    TargetGenerator,
    UperNetSegmentation,
)
from unimim.shapes import Grid
from unimim.tasks.optim import parameter_groups, warmup_cosine


def fit(model: MaskedImageModeling, images: Tensor, tmp_path: Path, batch_size: int = 4, **trainer: object) -> pl.Trainer:
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **trainer}
    runner = pl.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, **options
    )
    runner.fit(model, DataLoader(images, batch_size=batch_size))
    return runner


def test_the_step_is_equation_one() -> None:
    """L( N(T(x)), H(S(M(x))) ) in plain torch, patch after patch, for MaskDistill's letters."""
    teacher = nn.Conv2d(3, 6, 8, 8)
    model = tiny_model(
        teacher=FeatureTarget(teacher, dim=6, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)),
        normalization=LayerNorm(eps=1e-6),
        loss=nn.SmoothL1Loss(beta=2.0),
    ).eval()
    images = torch.rand(3, 3, 32, 32)
    torch.manual_seed(7)
    mask = model.masking(images, (4, 4))
    torch.manual_seed(7)  # the step draws the same mask
    loss = model.training_step(images, 0)

    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    target = teacher((images - mean) / std)  # [b c h w]
    tokens = model.student(images, mask).grid()
    terms = []
    for b in range(3):
        for i in range(4):
            for j in range(4):
                if not mask.tensor[b, i, j]:
                    continue
                patch = target[b, :, i, j]
                patch = (patch - patch.mean()) / torch.sqrt(((patch - patch.mean()) ** 2).mean() + 1e-6)
                prediction = model.head.linear.weight @ tokens[b, i, j] + model.head.linear.bias
                difference = (prediction - patch).abs()
                terms.append(torch.where(difference < 2.0, difference**2 / 4.0, difference - 1.0))
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    assert len(terms) == 3 * 6


def test_the_mean_is_maes() -> None:
    """MAE (official code): squared error averaged over each patch, then summed over masked patches / their number."""
    model = tiny_model(
        teacher=PixelTarget(8), normalization=LayerNorm(eps=1e-6, unbiased=True), masking=RandomMasking(0.75)
    ).eval()
    images = torch.rand(5, 3, 32, 32)
    torch.manual_seed(3)
    mask = model.masking(images, (4, 4))
    torch.manual_seed(3)
    loss = model.training_step(images, 0)

    pixels = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    patches = rearrange(pixels, "b c (h p) (w q) -> b (h w) (p q c)", p=8, q=8)
    patches = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6) ** 0.5
    prediction = model.head(model.student(images, mask), mask, mask.full()).view(5, 16, -1)
    per_patch = ((prediction - patches) ** 2).mean(-1)
    flat = mask.tensor.flatten(1).float()
    torch.testing.assert_close(loss, (per_patch * flat).sum() / flat.sum())


def test_no_decay_on_vectors_positions_and_tokens() -> None:
    """Every parameter by name, for a ViT and for a BEiT, whose bias tables decay as in the official code."""
    for kind, decayed_tables in (("vit", 0), ("beit_bias_per_block", 2), ("beit_shared_bias", 1)):
        student, head = tiny_student(kind), nn.Linear(24, 5)
        groups = parameter_groups([student, head], 0.05)
        decayed = {id(p) for group in groups if group["weight_decay"] == 0.05 for p in group["params"]}
        undecayed = {id(p) for group in groups if group["weight_decay"] == 0.0 for p in group["params"]}
        names = {id(p): name for module in (student, head) for name, p in module.named_parameters()}
        assert decayed | undecayed == set(names)
        assert not decayed & undecayed
        tables = 0
        for key, name in names.items():
            plain = name.endswith(("weight", "bias_table")) and "norm" not in name
            assert (key in decayed) == plain, name
            tables += name.endswith("bias_table")
        assert tables == decayed_tables
        assert {names[key] for key in undecayed} >= {"mask_token", "backbone.cls_token"}


def test_warmup_and_cosine_in_closed_form() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [parameter], "lr": 1e-3}, {"params": [], "lr": 5e-4}])
    scheduler = warmup_cosine(optimizer, warmup_steps=10, total_steps=50, warmup_lr=1e-6, min_lr=1e-5)
    rates = []
    for _ in range(51):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    rates = torch.tensor(rates)
    steps = torch.arange(51.0)
    rising = 1e-6 + (1e-3 - 1e-6) * steps / 10
    falling = 1e-5 + (1e-3 - 1e-5) * (1 + torch.cos(torch.pi * (steps - 10) / 40)) / 2
    torch.testing.assert_close(rates[:, 0], torch.where(steps < 10, rising, falling))
    torch.testing.assert_close(rates[:, 1], rates[:, 0] / 2)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_schedule_counts_optimizer_steps(tmp_path: Path, accumulation: int) -> None:
    """8 batches, 2 epochs, half an epoch of warm-up: with accumulation both ends come at half as many steps."""
    rates = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, *_: object) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    model = tiny_model(lr=1.0e-3, warmup_epochs=0.5, warmup_lr=0.0, min_lr=0.0)
    fit(
        model,
        torch.rand(32, 3, 32, 32),
        tmp_path,
        max_epochs=2,
        accumulate_grad_batches=accumulation,
        callbacks=[Watch()],
    )
    total = 16 // accumulation
    assert len(rates) == total
    assert rates[0] == 0
    assert max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) == total // 4
    assert 0 < rates[-1] < 1e-4


def test_max_steps_with_a_warmup_longer_than_the_training(tmp_path: Path) -> None:
    trainer = fit(tiny_model(warmup_epochs=10), torch.rand(8, 3, 32, 32), tmp_path, max_epochs=-1, max_steps=3)
    assert trainer.global_step == 3


def test_training_learns_and_repeats_by_seed(tmp_path: Path) -> None:
    """On one batch the loss falls; the same seed gives the same weights bit for bit, another seed others."""
    images = torch.rand(4, 3, 32, 32)

    def trained(seed: int) -> tuple[float, Tensor]:
        pl.seed_everything(seed, verbose=False)
        model = tiny_model(warmup_epochs=0, lr=3e-3)
        trainer = fit(model, images, tmp_path, max_epochs=40)
        return float(trainer.callback_metrics["train/loss"]), model.student.mask_token.detach().clone()

    first_loss = tiny_model().training_step(images, 0).item()
    loss, token = trained(0)
    assert loss < 0.5 * first_loss
    assert torch.equal(token, trained(0)[1])
    assert not torch.equal(token, trained(1)[1])


def test_update_comes_once_per_optimizer_step(tmp_path: Path) -> None:
    class Counting(PixelTarget):
        def __init__(self) -> None:
            super().__init__(8)
            self.updates: list[float] = []

        def update(self, student: nn.Module, head: nn.Module, progress: float) -> None:
            self.updates.append(progress)

    model = tiny_model(teacher=Counting())
    trainer = fit(model, torch.rand(16, 3, 32, 32), tmp_path, accumulate_grad_batches=2)
    assert trainer.global_step == 2
    assert model.teacher.updates == [0, 0.5]


def test_a_nan_loss_stops_with_one_line(tmp_path: Path) -> None:
    class Diverging(nn.Module):
        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(prediction, target) * torch.nan

    message = r"became NaN or infinite by step 0 \(lr 1.00e-06, gradient norm nan, .*\): try a lower model.lr"
    with pytest.raises(FloatingPointError, match=message) as caught:
        fit(tiny_model(loss=Diverging()), torch.rand(4, 3, 32, 32), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_nan_that_no_step_looked_at_is_seen_before_saving(tmp_path: Path) -> None:
    """As on a GPU between two looks."""
    model = tiny_model()
    trainer = fit(model, torch.rand(4, 3, 32, 32), tmp_path)
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    model.guard.skipped += 1
    with pytest.raises(FloatingPointError):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert not (tmp_path / "bad.ckpt").exists()
    with pytest.raises(FloatingPointError):
        model.guard.on_train_end(trainer, model)


@pytest.mark.parametrize("wrong", [{"selection": "hidden"}, {"lr": 0.0}, {"weight_decay": -1.0}, {"warmup_epochs": -1.0}])
def test_numbers_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tiny_model(**wrong)


def test_an_endless_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set trainer.max_epochs or trainer.max_steps"):
        fit(tiny_model(), torch.rand(4, 3, 32, 32), tmp_path, max_epochs=-1)


def test_a_loss_with_parameters_learns(tmp_path: Path) -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(1.0))

        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return F.mse_loss(prediction, target) * self.weight.exp() - self.weight

    model = tiny_model(loss=Weighted(), warmup_epochs=0)
    fit(model, torch.rand(4, 3, 32, 32), tmp_path)
    assert model.loss.weight.item() != 1.0


def test_unequal_counts_and_students_that_cannot_take_their_images() -> None:
    class Uneven(Masking):
        def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
            mask = torch.zeros(len(images), *grid_size, dtype=torch.bool)
            mask[0, 0, 0] = mask[1, 0, 0] = mask[1, 0, 1] = True
            return mask

    with pytest.raises(ValueError, match="Uneven hides 1 and 2 patches of two images: it has to be one count in every image"):
        tiny_model(masking=Uneven())
    with pytest.raises(ValueError, match=r"img_size 30x30: that is no whole number of its patches of 8 pixels"):
        MaskTokenStudent("vit_tiny_patch16_224", {"img_size": 30, "patch_size": 8})
    with pytest.raises(ValueError, match="cannot hold global_pool: a student has no classifier"):
        MaskTokenStudent("vit_tiny_patch16_224", {"global_pool": "avg"})
    with pytest.raises(ValueError, match="cannot hold pretrained"):
        MaskTokenStudent("vit_tiny_patch16_224", {"pretrained": True})


def test_parts_that_do_not_fit_fail_at_once() -> None:
    class FourColors(TargetGenerator):
        dim = 3

        def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
            return torch.zeros(len(images), *grid_size, 4)

    with pytest.raises(ValueError, match=r"FourColors gives .*\(2, 4, 4, 4\).*\(2, 4, 4, 3\)"):
        tiny_model(teacher=FourColors())
    with pytest.raises(ValueError, match=r"PixelTarget\(patch_size=16\).*do not meet.*set model.teacher.patch_size"):
        tiny_model(teacher=PixelTarget(16))
    with pytest.raises(ValueError, match="hides no patch of a grid of 16"):
        tiny_model(masking=RandomMasking(0.01))
    with pytest.raises(ValueError, match="images are 16x16 pixels, but vit_tiny_patch16_224 was built for 32x32"):
        tiny_model().student(torch.rand(2, 3, 16, 16), Mask(torch.zeros(2, 4, 4, dtype=torch.bool)))


def test_batches_that_do_not_fit_say_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images are 16x16 pixels, but vit_tiny_patch16_224 was built for 32x32"):
        fit(tiny_model(), torch.rand(4, 3, 16, 16), tmp_path)
    labelled = torch.utils.data.TensorDataset(torch.rand(4, 3, 32, 32), torch.zeros(4))
    with pytest.raises(ValueError, match=r"images alone, .* gave a list \(images and labels\?\)"):
        fit(tiny_model(), labelled, tmp_path)


def test_the_table_of_letters() -> None:
    model = tiny_model(teacher=FeatureTarget(nn.Conv2d(3, 6, 8, 8), dim=6, mean=(0, 0, 0), std=(1, 1, 1)))
    lines = model.summary().splitlines()
    assert [line[0] for line in lines[1:]] == ["T", "N", "M", "S", "H", "L"]
    assert lines[1].split() == ["T", "teacher", "FeatureTarget", f"{6 * 3 * 64 + 6:,}", "frozen"]
    assert lines[2].split()[-2:] == ["no", "parameters"]
    assert lines[4].split()[-1] == "trainable"
    assert lines[5].split()[3] == f"{24 * 6 + 6}"


def test_a_model_made_by_hand_keeps_modules_out_of_its_hyperparameters() -> None:
    model = tiny_model()
    assert model.hparams["lr"] == model.lr
    assert not {"teacher", "student", "masking", "head", "loss", "normalization"} & set(model.hparams)


def test_imports_and_trains_without_wandb_and_jsonargparse() -> None:
    """In a fresh interpreter in which neither can be imported."""
    import subprocess
    import sys

    code = """
import sys
sys.modules["wandb"] = sys.modules["jsonargparse"] = None
import torch, pytorch_lightning as pl
from torch import nn
from unimim import *
model = MaskedImageModeling(
    teacher=HOGTarget(8, 4), normalization=nn.Identity(), masking=BlockMasking(0.4), head=LinearHead, loss=nn.MSELoss(),
    student=MaskTokenStudent("vit_tiny_patch16_224", dict(img_size=32, patch_size=8, depth=1)),
)
trainer = pl.Trainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(model, torch.utils.data.DataLoader(torch.rand(8, 3, 32, 32), batch_size=4))
assert trainer.global_step == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_head_is_a_factory() -> None:
    heads = []

    def factory(student: nn.Module, target: TargetGenerator) -> LinearHead:
        heads.append((student, target))
        return LinearHead(student, target)

    model = tiny_model(head=factory)
    assert heads == [(model.student, model.teacher)]
    assert model.head.linear.weight.shape == (model.teacher.dim, model.student.embed_dim)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"teacher": HOGTarget}, "model.teacher is the class HOGTarget, but has to be an object of it: HOGTarget(...)"),
        ({"normalization": LayerNorm}, "model.normalization is the class LayerNorm, but has to be an object"),
        ({"masking": RandomMasking}, "model.masking is the class RandomMasking, but has to be an object"),
        ({"student": MaskTokenStudent}, "model.student is the class MaskTokenStudent, but has to be an object"),
        ({"loss": nn.MSELoss}, "model.loss is the class MSELoss, but has to be an object of it: MSELoss(...)"),
        ({"loss": F.mse_loss}, "model.loss is of the type function, but has to be a Module, such as torch.nn.SmoothL1Loss()"),
        (
            {"teacher": "pixels"},
            "model.teacher is of the type str, but has to be a TargetGenerator, such as unimim.HOGT",
        ),
        (
            {"masking": LayerNorm},
            "model.masking is the class LayerNorm, but has to be a Masking, such as unimim.BlockM",
        ),
        ({"student": nn.Linear(1, 1)}, "model.student is of the type Linear, but has to be a Student, such as unimim.MaskTok"),
        ({"head": LinearHead(tiny_student(), PixelTarget(8))}, "model.head is a LinearHead object, but it is made here"),
        ({"head": nn.Linear}, "model.head is the class Linear, but has to be a class of heads, such as unimim.LinearHead"),
        ({"head": "linear"}, "model.head is 'linear', but has to be a class of heads, such as unimim.LinearHead"),
        ({"head": lambda student, target: 7}, "what model.head makes is of the type int, but has to be a Head"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_class_in_place_of_an_object_and_the_reverse(parts: dict[str, object], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)) as refused:
        tiny_model(**parts)
    assert "\n" not in str(refused.value)


def test_a_part_that_a_subclass_adds_learns(tmp_path: Path) -> None:
    """With the weight decay of any other, and no other parameter is left out or comes twice."""

    class WithSecondTerm(MaskedImageModeling):
        def __init__(self, **parts: object) -> None:
            super().__init__(**parts)
            self.second = nn.Linear(self.student.embed_dim, 3)

        def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
            nothing = Mask(torch.zeros(len(images), *self.student.grid_size, dtype=torch.bool))
            second = self.second(self.student(images, nothing).patches).square().mean()
            self.log("train/second", second)
            return super().training_step(images, batch_idx) + second

    parts = {
        "teacher": PixelTarget(8),
        "normalization": nn.Identity(),
        "masking": RandomMasking(0.5),
        "student": tiny_student(),
    }
    model = WithSecondTerm(**parts, head=LinearHead, loss=nn.MSELoss(), lr=0.1, warmup_epochs=0)
    weight, bias = model.second.weight, model.second.bias
    before = weight.detach().clone()
    trainer = fit(model, torch.rand(8, 3, 32, 32), tmp_path)
    assert {"train/loss", "train/second"} <= set(trainer.callback_metrics)
    assert not torch.equal(weight, before)
    undecayed, decayed = trainer.optimizers[0].param_groups
    assert any(p is weight for p in decayed["params"])
    assert any(p is bias for p in undecayed["params"])
    learning = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(id(p) for group in (undecayed, decayed) for p in group["params"]) == sorted(learning)


@pytest.mark.parametrize("task", [FineTuning, LinearProbe, AttentiveProbe, UperNetSegmentation])
def test_a_backbone_is_a_timm_model_and_no_class(task: type[pl.LightningModule]) -> None:
    for backbone, expected in {
        VisionTransformer: r"^model.backbone is the class VisionTransformer, but has to be an object of it: VisionTrans.*\)$",
        tiny_student(): r"^model.backbone is a MaskTokenStudent, which is no timm model.*\(of a student, give its backbone\)$",
    }.items():
        with pytest.raises(ValueError, match=expected) as refused:
            task(backbone=backbone, num_classes=5)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=r"model.teacher.network is the class Conv2d, but has to be an object of it: Conv2d"):
        FeatureTarget(nn.Conv2d, dim=3, mean=(0, 0, 0), std=(1, 1, 1))
    with pytest.raises(ValueError, match=r"model.teacher.features is the class HOGTarget, but has to be an object of it: HOGT"):
        CodebookTarget(HOGTarget)
    with pytest.raises(ValueError, match=r"the network in Frozen is the class Conv2d, but has to be an object of it: Conv2d"):
        Frozen(nn.Conv2d)
