"""DESIGN's contracts, for every student x head x target x masking."""

import copy
import itertools
from pathlib import Path

import pytest
import pytorch_lightning as pl
import timm
import torch
from conftest import TINY, tiny_model, tiny_student
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unimim import (
    BlockMasking,
    FeatureTarget,
    Frozen,
    HOGTarget,
    LinearHead,
    MaskedImageModeling,
    MaskTokenStudent,
    PixelTarget,
    RandomMasking,
    TargetGenerator,
)
from unimim.interfaces import Grid

GRID = (4, 4)
MASKINGS = {"block": lambda: BlockMasking(0.4), "random": lambda: RandomMasking(0.75)}
HEADS = {"linear": LinearHead}


class Teacher(nn.Module):
    """A small network with everything that must stay off: batch norm, dropout and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.BatchNorm2d(6), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def own_features() -> FeatureTarget:
    return FeatureTarget(Teacher(), dim=6, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


TARGETS = {
    "pixels": lambda: PixelTarget(patch_size=8),
    "hog": lambda: HOGTarget(patch_size=8, cell_size=4),
    "own features": own_features,
    "timm vit": lambda: FeatureTarget(
        "vit_tiny_patch16_224", weights="random", model_args={"depth": 1, "embed_dim": 12, "num_heads": 2, "img_size": 64}
    ),
    "timm cnn": lambda: FeatureTarget("resnet18", weights="random", layer=-1),
}

every_student = pytest.mark.parametrize("kind", TINY)
every_target = pytest.mark.parametrize("target", TARGETS)
every_masking = pytest.mark.parametrize("masking", MASKINGS)


def images(b: int = 3) -> Tensor:
    return torch.rand(b, 3, 32, 32)


@pytest.mark.parametrize(("kind", "head", "target", "masking"), list(itertools.product(TINY, HEADS, TARGETS, MASKINGS)))
@pytest.mark.parametrize("selection", ["masked", "visible", "all"])
def test_everything_meets_on_the_grid(kind: str, head: str, target: str, masking: str, selection: str) -> None:
    """Contracts 1 and 2: the head returns the selected patches only, in the order in which the target is indexed."""
    model = tiny_model(
        student=tiny_student(kind),
        head=HEADS[head],
        teacher=TARGETS[target](),
        masking=MASKINGS[masking](),
        selection=selection,
    ).eval()
    batch = images()
    mask = model.masking(batch, GRID)
    counts = mask.sum((1, 2))
    assert mask.shape == (3, *GRID)
    assert mask.dtype == torch.bool
    assert (counts == counts[0]).all()
    targets = model.teacher(batch, GRID)
    assert targets.shape == (3, *GRID, model.teacher.dim)
    assert targets.dtype == torch.float32
    selected = model.select(mask)
    assert selected.sum() == {"masked": mask.sum(), "visible": (~mask).sum(), "all": mask.numel()}[selection]
    tokens = model.student(batch, mask)
    assert tokens.shape == (3, *GRID, model.student.embed_dim)
    prediction = model.head(tokens, mask, selected)
    assert prediction.shape == targets[selected].shape
    everywhere = model.head(tokens, mask, torch.ones_like(mask)).unflatten(0, mask.shape)
    torch.testing.assert_close(prediction, everywhere[selected])
    assert torch.isfinite(model.training_step(batch, 0))


@every_student
@every_masking
def test_blind_to_masked_pixels_bit_for_bit(kind: str, masking: str) -> None:
    """Contract 4, and its reverse: a visible pixel does change the output."""
    student = tiny_student(kind).eval()
    batch = images()
    mask = MASKINGS[masking]()(batch, GRID)
    pixels = mask.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    others = torch.where(pixels, torch.rand_like(batch) * 1e6, batch)
    assert torch.equal(student(batch, mask), student(others, mask))
    nan = torch.where(pixels, torch.nan, batch)
    assert torch.equal(student(batch, mask), student(nan, mask))
    visible = torch.where(pixels, batch, torch.rand_like(batch))
    assert not torch.allclose(student(batch, mask), student(visible, mask))


@every_student
def test_an_empty_mask_is_timm(kind: str) -> None:
    """Contract 4: with nothing masked, the student computes timm's own `forward_features`, final norm included."""
    student = tiny_student(kind).eval()
    name, model_args = TINY[kind]
    plain = timm.create_model(name, num_classes=0, global_pool="", **model_args).eval()
    plain.load_state_dict(student.backbone.state_dict(), strict=True)
    batch = images()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = plain.forward_features((batch - mean) / std)[:, student.num_prefix_tokens :]
    tokens = student(batch, torch.zeros(3, *GRID, dtype=torch.bool))
    assert torch.equal(tokens.flatten(1, 2), expected)
    assert torch.equal(student.backbone.forward_features((batch - mean) / std)[:, student.num_prefix_tokens :], expected)
    assert not isinstance(plain.norm, nn.Identity)


@every_student
def test_the_backbone_stays_timms(kind: str) -> None:
    """Contract 5: nothing renamed, nothing added, and it says how it is to be fed."""
    name, model_args = TINY[kind]
    student = tiny_student(kind)
    fresh = timm.create_model(name, num_classes=0, global_pool="", **model_args)
    assert list(student.backbone.state_dict()) == list(fresh.state_dict())
    fresh.load_state_dict(student.backbone.state_dict(), strict=True)
    assert student.backbone.pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_a_masked_patch_becomes_the_token() -> None:
    """What the first block receives: the mask token where masked, the embedded patch elsewhere, positions on both."""
    student = tiny_student("vit_without_cls").eval()
    batch, mask = images(), BlockMasking(0.4)(images(), GRID)
    received = []
    student.backbone.blocks[0].register_forward_pre_hook(lambda _, inputs: received.append(inputs[0]))
    student(batch, mask)
    student.backbone.forward_features(student.normalize(batch))
    positions = student.backbone.pos_embed
    token = (student.mask_token + positions).expand_as(received[0])
    flat = mask.flatten(1)[..., None]
    torch.testing.assert_close(received[0], torch.where(flat, token, received[1]))


@every_target
def test_no_gradient_reaches_the_teacher(target: str) -> None:
    """Contract 6."""
    model = tiny_model(teacher=TARGETS[target]())
    model.training_step(images(), 0).backward()
    assert all(p.grad is None and not p.requires_grad for n in model.teacher.networks() for p in n.parameters())
    assert all(p.grad is not None for p in model.student.parameters() if p.requires_grad)
    inside = {id(p) for p in model.parameters()}  # what DDP puts into buckets, EMA copies and state_dict names
    assert not inside & {id(p) for network in model.teacher.networks() for p in network.parameters()}
    optimized = {id(p) for group in model_groups(model) for p in group["params"]}
    assert optimized == {id(p) for m in (model.student, model.head) for p in m.parameters()}


def model_groups(model: MaskedImageModeling) -> list[dict]:
    from unimim.optim import parameter_groups

    return parameter_groups([model.student, model.head], 0.05)


class WatchTeacher(pl.Callback):
    """Notes every mode in which the teacher's network is met, and its running statistics."""

    def __init__(self, network: nn.Module) -> None:
        self.training_modes: set[bool] = set()
        network.register_forward_hook(lambda module, *_: self.training_modes.add(module.training))


def test_the_teacher_in_a_real_training(tmp_path: Path) -> None:
    """Contract 6, with Lightning, EMA of the weights and a checkpoint: no train mode, no byte, no change."""
    model = tiny_model(teacher=own_features())
    (network,) = model.teacher.networks()
    before = copy.deepcopy(network.state_dict())
    watch = WatchTeacher(network)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[watch, EMAWeightAveraging()],
    )
    trainer.fit(model, DataLoader(images(8), batch_size=4))
    assert watch.training_modes == {False}
    assert not any(module.training for module in network.modules())
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    tensors = dict(flatten(checkpoint))
    shapes = {tuple(value.shape) for value in tensors.values()}
    assert not any("teacher" in name or "network" in name for name in tensors)
    assert (6, 3, 8, 8) not in shapes
    assert (24, 3, 8, 8) in shapes  # the student's, to prove that such a tensor would have been seen
    model.train()
    assert not model.teacher.training


def flatten(content: object, path: str = "") -> list[tuple[str, Tensor]]:
    """Every tensor in a checkpoint, with its path."""
    if isinstance(content, Tensor):
        return [(path, content)]
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else []
    return [found for key, value in items for found in flatten(value, f"{path}.{key}")]


def test_the_teacher_moves_with_the_module() -> None:
    model = tiny_model(teacher=own_features()).to(torch.float64)
    (network,) = model.teacher.networks()
    assert next(network.parameters()).dtype == torch.float64
    model.to("meta")
    assert next(network.parameters()).device.type == "meta"


def test_a_trainable_teacher_of_a_user_is_not_trained() -> None:
    """A user who registers a network as a plain submodule still gets no gradient and no train mode."""

    class Careless(TargetGenerator):
        dim = 6

        def __init__(self) -> None:
            super().__init__()
            self.network = Teacher()

        def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
            return self.network(images).permute(0, 2, 3, 1)

    model = tiny_model(teacher=Careless())
    before = copy.deepcopy(model.teacher.state_dict())
    watch = WatchTeacher(model.teacher.network)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    trainer.fit(model, DataLoader(images(8), batch_size=4))
    assert watch.training_modes == {False}
    after = model.teacher.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert int(after["network.net.1.num_batches_tracked"]) == 0  # batch norm has counted nothing


def test_the_teacher_gets_its_own_statistics_and_the_student_its_own() -> None:
    """Contract 3: [0, 1] pixels in; each network normalizes for itself."""
    seen: dict[str, Tensor] = {}

    class Mirror(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen["teacher"] = images
            return images[:, :, ::8, ::8]

    teacher = FeatureTarget(Mirror(), dim=3, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    student = tiny_student()
    student.backbone.patch_embed.register_forward_pre_hook(lambda _, inputs: seen.update(student=inputs[0]))
    batch = images()
    tiny_model(teacher=teacher, student=student).training_step(batch, 0)
    for name, mean, std in (
        ("teacher", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
        ("student", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ):
        expected = (batch - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(seen[name], expected)


def test_frozen_networks_are_found_in_lists_and_dicts() -> None:
    class Several(PixelTarget):
        def __init__(self) -> None:
            super().__init__(8)
            self.stages = [Frozen(Teacher()), {"last": Frozen(Teacher())}]

    target = Several().to(torch.float64)
    assert len(target.networks()) == 2
    assert all(p.dtype == torch.float64 for network in target.networks() for p in network.parameters())


@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "resnet18"])
def test_backbones_that_would_leak_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="plain ViT or BEiT"):
        MaskTokenStudent(name, {"img_size": 64} if name.startswith("vit") else {})


def test_frozen_is_shared_by_deep_copies() -> None:
    frozen = Frozen(Teacher())
    assert copy.deepcopy(frozen) is frozen
    assert copy.deepcopy(own_features()).state_dict().keys() == set()
