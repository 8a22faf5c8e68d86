"""Targets with a history, in real trainings: averages that follow, codebooks that are fitted, stages, attention shared."""

import copy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import PLAIN, ROOT, tiny_model, tiny_student
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unimim import (
    AttentiveMasking,
    CenteredSoftmax,
    CodebookTarget,
    DecoderHead,
    DVAETarget,
    EMAHeadTarget,
    EMATarget,
    FeatureTarget,
    HOGTarget,
    LayerNorm,
    LinearHead,
    Mask,
    MaskedImageModeling,
    MeanColorTarget,
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
    parts = {"average": model.student} if make is data2vec else {"average": model.student, "average_head": model.head}
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
    moved = saved["teacher.average.backbone.blocks.0.mlp.fc1.weight"]
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


def test_a_codebook_that_is_not_fitted_says_so() -> None:
    with pytest.raises(ValueError, match="CodebookTarget has no codebook yet: call prepare with images, or give"):
        tokens().teacher(torch.rand(1, 3, 32, 32), GRID)


def test_k_means_uses_every_code() -> None:
    """Also where most vectors are equal: no code twice, and none that nobody uses."""
    teacher = CodebookTarget(PixelTarget(8), codes=8)
    images = torch.zeros(8, 3, 32, 32)
    images[:, :, :8, :8] = torch.rand(8, 3, 8, 8)  # 8 patches that differ among 120 that are black
    teacher.prepare([images], GRID)
    assert teacher.codebook.unique(dim=0).shape[0] == 8
    assert teacher(images, GRID).unique().numel() == 8
    with pytest.raises(ValueError, match="cannot fit 10 codes to 9 distinct patches of 8 images"):
        CodebookTarget(PixelTarget(8), codes=10).prepare([images], GRID)


def test_normalized_codes_are_directions() -> None:
    teacher = CodebookTarget(PixelTarget(8), codes=8, normalize=True)
    images = torch.rand(8, 3, 32, 32)
    teacher.prepare([images], GRID)
    torch.testing.assert_close(teacher.codebook.norm(dim=1), torch.ones(8))
    cosines = nn.functional.normalize(PixelTarget(8)(images, GRID), dim=-1) @ teacher.codebook.T
    assert torch.equal(teacher(images, GRID), cosines.argmax(-1))


def test_a_codebook_is_fitted_to_what_the_step_sees(tmp_path: Path) -> None:
    """Batches go through the module's hooks, and batches that do not fit are refused before k-means."""
    seen: list[Tensor] = []

    class Bytes(MaskedImageModeling):
        def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            return batch / 255

    class Watching(HOGTarget):
        def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
            seen.append(images)
            return super().forward(images, grid_size)

    parts = tiny_model()
    model = Bytes(
        teacher=CodebookTarget(Watching(8, 4), codes=6),
        normalization=nn.Identity(),
        masking=parts.masking,
        student=tiny_student(),
        head=LinearHead,
        loss=nn.CrossEntropyLoss(),
    )
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    options = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    pl.Trainer(**options, enable_progress_bar=False).fit(model, DataLoader(images, batch_size=4))
    assert all(batch.is_floating_point() and batch.max() <= 1 for batch in seen)
    for wrong, said in (
        (torch.rand(8, 3, 64, 64), "images are 64x64 pixels"),
        ([(i, 0) for i in torch.rand(8, 3, 32, 32)], "labels"),
    ):
        with pytest.raises(ValueError, match=said):
            pl.Trainer(**options, enable_progress_bar=False).fit(tokens(), DataLoader(wrong, batch_size=4))


def test_dvae_tokens_are_of_32_bits_under_autocast() -> None:
    teacher = DVAETarget("random", width=16, codes=64)
    images = torch.rand(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = teacher.logits(images, (8, 8))
    assert torch.equal(mixed, teacher.logits(images, (8, 8)))


def test_random_networks_are_the_same_in_every_process_and_run() -> None:
    def network(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(FeatureTarget("vit_tiny_patch16_224", weights="random", model_args=PLAIN).networks()[0].parameters())

    assert torch.equal(network(1), network(2))
    torch.manual_seed(3)
    expected = torch.rand(1)
    network(3)
    assert torch.equal(torch.rand(1), expected)  # and what comes after does not notice


TWO_PROCESSES = """
import sys, torch, pytorch_lightning as pl
sys.path[:0] = [sys.argv[1]]
from conftest import tiny_model
from torch import nn
from torch.utils.data import DataLoader
from unimim import CodebookTarget, FeatureTarget
features = FeatureTarget(nn.Conv2d(3, 6, 8, 8), dim=6, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))  # drawn without a seed
model = tiny_model(teacher=CodebookTarget(features, codes=5), loss=nn.CrossEntropyLoss())
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)
trainer.fit(model, DataLoader(torch.rand(16, 3, 32, 32), batch_size=4))
(network,) = model.teacher.networks()
tensors = [network.weight, model.teacher.codebook.data, model.student.mask_token.data]
torch.save(tensors, f"{sys.argv[2]}/{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_have_one_teacher(tmp_path: Path) -> None:
    """DDP sees neither a frozen network nor what is fitted when training starts."""
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    command = [sys.executable, str(tmp_path / "script.py"), str(ROOT / "tests"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first[1].any()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, second, strict=True))


def test_codebooks_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="cannot fit 6 codes to 0 distinct patches of 0 images"):
        tokens().teacher.prepare((), GRID)
    with pytest.raises(ValueError, match="MeanColorTarget is discrete already"):
        CodebookTarget(MeanColorTarget(), codes=3).vectors(torch.rand(1, 3, 32, 32), GRID)
    with pytest.raises(ValueError, match="EMATarget follows the student"):
        CodebookTarget(EMATarget())


def test_the_student_of_one_stage_is_the_teacher_of_the_next(tmp_path: Path) -> None:
    """dBOT: architecture, weights and statistics come from the checkpoint."""
    student = VisibleStudent("vit_tiny_patch16_224", PLAIN, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), positions="sincos")
    head = partial(DecoderHead, width=16, depth=1, num_heads=2)
    first = tiny_model(student=student, head=head, warmup_epochs=0)
    path = fit(first, tmp_path)
    teacher = FeatureTarget("vit_tiny_patch16_224", weights=str(path))
    images = torch.rand(2, 3, 32, 32)
    expected = student.eval()(images, Mask(torch.zeros(2, *GRID, dtype=torch.bool))).grid()
    torch.testing.assert_close(teacher(images, GRID), expected)
    second = tiny_model(teacher=teacher, normalization=LayerNorm(unbiased=True), student=tiny_student("visible_vit"), head=head)
    fit(second, tmp_path, epochs=1)
    assert not any(parameter.requires_grad for network in teacher.networks() for parameter in network.parameters())
    with pytest.raises(ValueError, match="does not fit"):
        FeatureTarget("vit_tiny_patch16_224", weights=str(path), model_args={"embed_dim": 48})


def test_attention_and_features_are_one_run_of_the_teacher() -> None:
    teacher = FeatureTarget("vit_tiny_patch16_224", weights="random", model_args=PLAIN)
    calls: list[Tensor] = []
    (network,) = teacher.networks()
    network.blocks[-1].attn.qkv.register_forward_hook(lambda module, inputs, output: None)  # a hook of someone else
    model = tiny_model(teacher=teacher, masking=AttentiveMasking(0.75))
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
