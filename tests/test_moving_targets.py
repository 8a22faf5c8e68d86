"""Targets with a history, in real trainings: averages that follow, codebooks that are fitted, stages, attention shared."""

import copy
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import PLAIN, tiny_model, tiny_student
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unimim import (
    AttentiveMasking,
    CenteredSoftmax,
    CodebookTarget,
    DecoderHead,
    EMAHeadTarget,
    EMATarget,
    FeatureTarget,
    HOGTarget,
    LayerNorm,
    MaskedImageModeling,
    PixelTarget,
    PrototypeHead,
    SoftCrossEntropyLoss,
    VisibleStudent,
)

GRID = (4, 4)


def fit(model: MaskedImageModeling, folder: Path, epochs: int = 1, resume: Path | None = None) -> Path:
    """Trains on 16 images in steps of 4, and gives the checkpoint that it wrote last."""
    torch.manual_seed(1)
    images = torch.rand(16, 3, 32, 32)
    saving = ModelCheckpoint(dirpath=folder, filename=f"after{epochs}", enable_version_counter=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[saving],
    )
    trainer.fit(model, DataLoader(images, batch_size=4), ckpt_path=resume, weights_only=True)
    return Path(saving.best_model_path)


def data2vec(**changes: object) -> MaskedImageModeling:
    torch.manual_seed(0)
    return tiny_model(teacher=EMATarget(top_blocks=2, momentum=0.5), normalization=LayerNorm(), warmup_epochs=0, **changes)


def ibot() -> MaskedImageModeling:
    torch.manual_seed(0)
    return tiny_model(
        teacher=EMAHeadTarget(prototypes=12, momentum=0.5, final_momentum=1.0),
        normalization=CenteredSoftmax(channels=12),
        head=partial(PrototypeHead, hidden=16, bottleneck=8),
        loss=SoftCrossEntropyLoss(),
        warmup_epochs=0,
    )


@pytest.mark.parametrize("make", [data2vec, ibot])
def test_an_average_follows_step_by_step_and_is_in_the_checkpoint(make: type, tmp_path: Path) -> None:
    """Against a copy that is moved by hand after each optimizer step; with the student still, it would be equal to it."""
    model = make()
    parts = {"student": model.student} if make is data2vec else {"student": model.student, "head": model.head}
    averages = {name: copy.deepcopy(part) for name, part in parts.items()}
    teacher = model.teacher
    update = teacher.update

    def by_hand(student: nn.Module, head: nn.Module, progress: float) -> None:
        update(student, head, progress)
        momentum = 0.5 if make is data2vec else 1 - 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item()) / 2
        for name, part in parts.items():
            for ours, theirs in zip(averages[name].parameters(), part.parameters(), strict=True):
                ours.data = momentum * ours.data + (1 - momentum) * theirs.data

    teacher.update = by_hand
    path = fit(model, tmp_path)
    saved = torch.load(path, weights_only=True)["state_dict"]
    for name, average in averages.items():
        for key, value in average.named_parameters():
            torch.testing.assert_close(saved[f"teacher.{name}.{key}"], value.data)
    moved = saved["teacher.student.backbone.blocks.0.mlp.fc1.weight"]
    assert not torch.equal(moved, saved["student.backbone.blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("make", [data2vec, ibot])
def test_an_average_goes_on_where_it_was(make: type, tmp_path: Path) -> None:
    """The first step after a resume has the teacher, the centre and the target of the run that went on."""
    model = make()
    path = fit(model, tmp_path)
    images = torch.rand(4, 3, 32, 32)
    expected = model.eval().normalization(model.teacher(images, GRID))
    fresh = make()
    assert not torch.allclose(fresh.eval().normalization(fresh.teacher(images, GRID)), expected)
    fit(fresh, tmp_path, epochs=1, resume=path)
    torch.testing.assert_close(fresh.eval().normalization(fresh.teacher(images, GRID)), expected)


def test_an_average_of_16_bits_is_refused(tmp_path: Path) -> None:
    model = data2vec().to(torch.bfloat16)
    with pytest.raises(ValueError, match="an EMA of weights in 16 bits cannot move: set trainer.precision to bf16-mixed"):
        model.teacher.prepare((), GRID)


def test_more_blocks_than_there_are() -> None:
    for kind, top in (("vit", 3), ("vit", 0), ("swin", 2)):
        with pytest.raises(ValueError, match=f"model.teacher.top_blocks is {top}, but"):
            EMATarget(top).attach(tiny_student(kind))
    EMATarget(1).attach(tiny_student("swin"))


def tokens(**changes: object) -> MaskedImageModeling:
    torch.manual_seed(0)
    teacher = CodebookTarget(HOGTarget(8, 4), codes=6, **changes)
    return tiny_model(teacher=teacher, loss=nn.CrossEntropyLoss(), warmup_epochs=0)


def test_a_codebook_is_fitted_when_training_starts_and_kept(tmp_path: Path) -> None:
    model = tokens()
    assert not model.teacher.codebook.any()
    path = fit(model, tmp_path)
    codebook = model.teacher.codebook.clone()
    assert model.teacher(torch.rand(4, 3, 32, 32), GRID).unique().numel() > 3
    resumed = tokens()
    torch.manual_seed(5)  # another draw of first centres would give another codebook
    fit(resumed, tmp_path, epochs=2, resume=path)
    assert torch.equal(resumed.teacher.codebook, codebook)


def test_a_codebook_from_a_file(tmp_path: Path) -> None:
    torch.save(torch.rand(6, 27 * 4), tmp_path / "codes.pt")
    model = tokens(codebook=str(tmp_path / "codes.pt"))
    fit(model, tmp_path)
    assert torch.equal(model.teacher.codebook, torch.load(tmp_path / "codes.pt", weights_only=True))
    torch.save(torch.rand(5, 7), tmp_path / "codes.pt")
    with pytest.raises(ValueError, match=r"holds \(5, 7\), but a codebook here is a tensor \(6, 108\)"):
        tokens(codebook=str(tmp_path / "codes.pt"))


def test_codebooks_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="cannot fit 6 codes to the 0 patches of 0 images"):
        tokens().teacher.prepare((), GRID)
    with pytest.raises(ValueError, match="CodebookTarget is discrete already"):
        CodebookTarget(CodebookTarget(PixelTarget(8), codes=4), codes=3).vectors(torch.rand(1, 3, 32, 32), GRID)
    with pytest.raises(ValueError, match="EMATarget has no fixed dim"):
        CodebookTarget(EMATarget())


def test_the_student_of_one_stage_is_the_teacher_of_the_next(tmp_path: Path) -> None:
    """dBOT: architecture, weights and statistics come from the checkpoint."""
    student = VisibleStudent("vit_tiny_patch16_224", PLAIN, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), positions="sincos")
    head = partial(DecoderHead, width=16, depth=1, num_heads=2)
    first = tiny_model(student=student, head=head, warmup_epochs=0)
    path = fit(first, tmp_path)
    teacher = FeatureTarget("vit_tiny_patch16_224", weights=str(path))
    images = torch.rand(2, 3, 32, 32)
    expected = student.eval()(images, torch.zeros(2, *GRID, dtype=torch.bool))[:, 1:].unflatten(1, GRID)
    torch.testing.assert_close(teacher(images, GRID), expected)
    second = tiny_model(teacher=teacher, normalization=LayerNorm(unbiased=True), student=tiny_student("visible_vit"), head=head)
    fit(second, tmp_path, epochs=1)
    assert not any(parameter.requires_grad for network in teacher.networks() for parameter in network.parameters())
    with pytest.raises(ValueError, match="does not fit"):
        FeatureTarget("vit_tiny_patch16_224", weights=str(path), model_args={"embed_dim": 48})


def test_attention_and_features_are_one_run_of_the_teacher() -> None:
    teacher = FeatureTarget("vit_tiny_patch16_224", weights="random", model_args=PLAIN)
    calls: list[Tensor] = []
    model = tiny_model(teacher=teacher, masking=AttentiveMasking(0.75))
    (network,) = teacher.networks()
    network.patch_embed.register_forward_hook(lambda module, inputs, output: calls.append(output))
    images = torch.rand(4, 3, 32, 32)
    model.training_step(images, 0)
    assert len(calls) == 1
    alone = teacher(images.clone(), GRID)
    teacher.attention(images, GRID)
    assert torch.equal(teacher(images, GRID), alone)
    other = torch.rand(4, 3, 32, 32)
    teacher.attention(images, GRID)
    assert not torch.equal(teacher(other, GRID), alone)  # features that waited are for their own images only


def test_a_network_without_cls_has_no_attention() -> None:
    for name, model_args in (("vit_tiny_patch16_224", {**PLAIN, "class_token": False, "global_pool": "avg"}), ("resnet18", {})):
        teacher = FeatureTarget(name, weights="random", model_args=model_args)
        with pytest.raises(ValueError, match=f"{name} has no CLS token to attend: use a ViT of timm that has one"):
            tiny_model(teacher=teacher, masking=AttentiveMasking(0.75))
