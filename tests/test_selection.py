"""Patches that do not count are not computed to the end, which changes nothing; and no shape in a step depends on the data."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import DENSE, ROOT, TINY, VISIBLE, narrow_recipe, tiny_model, tiny_student
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from unimim import (
    AttentiveMasking,
    BlockMasking,
    CenteredSoftmax,
    DecoderHead,
    EMATarget,
    FeatureTarget,
    HOGTarget,
    InstanceNorm,
    L2Norm,
    LayerNorm,
    LinearHead,
    MaskedImageModeling,
    MaskTokenStudent,
    NoMasking,
    PixelTarget,
    PromptingDecoderHead,
    PrototypeHead,
    RandomMasking,
    SoftCrossEntropyLoss,
)
from unimim.selection import LastBlock, count_of, inverse, only, pick

sys.path.insert(0, str(ROOT / "benchmarks"))
from step import built

FLAT = [kind for kind in DENSE if kind != "swin"]
NARROW = {"width": 8, "depth": 1, "num_heads": 2}


def teacher(kind: str = "vit", **changes: object) -> FeatureTarget:
    name, model_args = TINY[kind]
    return FeatureTarget(name, weights="random", model_args={**model_args, "num_classes": 0, "global_pool": ""}, **changes)


def step(model: MaskedImageModeling, last_blocks: list[LastBlock]) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients and FLOPs of a step that may leave out patches in these blocks."""
    model.last_blocks = last_blocks
    model.zero_grad()
    torch.manual_seed(1)
    counter = FlopCounterMode(display=False)
    with counter:
        loss = model.training_step(torch.rand(3, 3, *model.student.image_size), 0)
        loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None], counter.get_total_flops()


def who_leaves_out(model: MaskedImageModeling) -> list[str]:
    """The parts whose last blocks leave out the patches that do not count."""
    return [part for part in ("student", "head", "teacher") if getattr(model, part).last_block in model.last_blocks]


@pytest.mark.parametrize("selection", ["masked", "visible"])
@pytest.mark.parametrize("head", [LinearHead, partial(PrototypeHead, hidden=8, bottleneck=6)])
@pytest.mark.parametrize("kind", FLAT)
def test_what_is_left_out_changes_nothing(kind: str, head: Callable[..., nn.Module], selection: str) -> None:
    """Loss and every gradient, with drop path, of the step that computes everything."""
    name, model_args = TINY[kind]
    student = MaskTokenStudent(name, {**model_args, "drop_path_rate": 0.3})
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    model = tiny_model(student=student, teacher=teacher(kind), normalization=LayerNorm(), head=head, selection=selection)
    found = model.last_blocks
    assert len(found) == 2
    loss, gradients, flops = step(model, found)
    whole, of_whole, flops_of_whole = step(model, [])
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    assert len(gradients) == len(of_whole)
    for gradient, wanted in zip(gradients, of_whole, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)
    assert flops < 0.95 * flops_of_whole


LEFT_OUT = {
    **dict.fromkeys(("data2vec_vit_base", "eva_vit_large", "maskfeat_dino_vit_base"), "student teacher"),
    **{f"maskdistill_vit_{size}": "student teacher" for size in ("base", "base_clip_large", "large", "huge")},
    **dict.fromkeys(("beit_vit_base", "beitv2_vit_base", "ibot_vit_small", "maskfeat_hog_vit_base"), "student"),
    **dict.fromkeys(("simmim_vit_base", "vit_mean_color", "demo_features", "demo_hog", "demo_pixels"), "student"),
    "dbot_vit_base": "head teacher",
    **dict.fromkeys(("mae_vit_base", "photos"), "head"),
}
"""In the other recipes all patches count (mvp, feature distillation, demo_scenes), or the teacher answers before the mask is
known (milan, maskalign) or on a finer grid (Swin)."""
RECIPES = [
    pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.stem.startswith("beit") else ())  # their tokenizers
    for path in sorted((ROOT / "conf" / "pretrain").glob("*.yaml"))
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_its_plain_step(recipe: Path, tmp_path: Path) -> None:
    """Loss and every gradient; and what each recipe leaves out."""
    model = built(str(narrow_recipe(recipe, tmp_path)))
    for parameter in (*model.student.parameters(), *model.head.parameters()):
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    names = " ".join(who_leaves_out(model))
    found, state = model.last_blocks, {name: value.clone() for name, value in model.state_dict().items()}
    loss, gradients, flops = step(model, found)
    model.load_state_dict(state)  # a running mean has moved
    whole, of_whole, flops_of_whole = step(model, [])
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    assert len(gradients) == len(of_whole)
    for gradient, wanted in zip(gradients, of_whole, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    if recipe.stem in LEFT_OUT:
        assert names == LEFT_OUT[recipe.stem]
        assert flops < flops_of_whole
    else:
        assert flops == flops_of_whole


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("kind", [*FLAT, "visible_vit_with_registers"])
def test_the_teacher_leaves_out_only_what_is_not_looked_at(kind: str, layer: int) -> None:
    target = teacher(kind, layer=layer)
    model = tiny_model(teacher=target, normalization=L2Norm())
    assert target.last_block in model.last_blocks
    images = torch.rand(3, 3, 32, 32)
    whole = target(images, (4, 4))
    mask = model.masking(images, (4, 4))
    with only(mask, model.last_blocks):
        some = target(images, (4, 4))
    torch.testing.assert_close(some[mask], whole[mask], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(some[~mask], whole[~mask])
    torch.testing.assert_close(target(images, (4, 4)), whole, rtol=0, atol=0)


def test_a_teacher_on_a_finer_grid_computes_everything() -> None:
    name, model_args = TINY["vit"]
    fine = FeatureTarget(name, weights="random", model_args={**model_args, "img_size": 64}, resolution=64)
    model = tiny_model(teacher=fine, normalization=LayerNorm())
    images = torch.rand(3, 3, 32, 32)
    mask = model.masking(images, (4, 4))
    with only(mask, model.last_blocks):
        some = fine(images, (4, 4))
    torch.testing.assert_close(some, fine(images, (4, 4)), rtol=0, atol=0)


def test_a_block_with_branches_is_left_whole() -> None:
    model_args = {**TINY["vit"][1], "num_classes": 0, "global_pool": ""}
    parallel = "vit_small_patch16_18x2_224"
    target = FeatureTarget(parallel, weights="random", model_args=model_args)
    del model_args["num_classes"], model_args["global_pool"]
    model = tiny_model(student=MaskTokenStudent(parallel, model_args), teacher=target, normalization=LayerNorm())
    assert model.last_blocks == []
    model.training_step(torch.rand(2, 3, 32, 32), 0).backward()


class MixingTeacher(FeatureTarget):
    """A teacher of a user, which looks at all patches behind its network."""

    def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
        target = super().forward(images, grid_size)
        return target - target.mean((1, 2), keepdim=True)


class MixingStudent(MaskTokenStudent):
    """A student of a user."""

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        tokens = super().forward(images, mask)
        return tokens - tokens.mean((1, 2), keepdim=True)


class Mixing(LinearHead):
    """A head of a user, made from one that looks at the selected patches alone."""

    def forward(self, tokens: Tensor, mask: Tensor, selected: Tensor) -> Tensor:
        return super().forward(tokens - tokens.mean((1, 2), keepdim=True), mask, selected)


class BatchNormHead(LinearHead):
    """It mixes the patches in training only."""

    def __init__(self, student: object, target: object) -> None:
        super().__init__(student, target)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm1d(24, track_running_stats=True)

    def forward(self, tokens: Tensor, mask: Tensor, selected: Tensor) -> Tensor:
        return super().forward(self.norm(tokens.flatten(0, 2)).view_as(tokens), mask, selected)


class RememberingDecoder(DecoderHead):
    """A decoder of a user, which looks at one kind of tokens in the step after."""

    def __init__(self, student: object, target: object) -> None:
        super().__init__(student, target, **NARROW)  # type: ignore[arg-type]
        self.register_buffer("mean", torch.zeros(8))

    def decode(self, tokens: Tensor, mask: Tensor) -> Tensor:
        tokens = super().decode(tokens, mask) - self.mean
        self.mean = 0.9 * self.mean + 0.1 * tokens.detach().mean((0, 1))
        return tokens


class OtherBlocks(DecoderHead):
    """A decoder of a user with blocks that are not timm's."""

    def block(self, width: int, num_heads: int) -> nn.Module:
        return nn.TransformerEncoderLayer(width, num_heads, batch_first=True)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, "student teacher"),
        ({"student": "visible_vit", "head": RememberingDecoder}, "teacher"),
        ({"student": "visible_vit", "head": partial(DecoderHead, **NARROW)}, "head teacher"),
        ({"student": "visible_vit", "head": partial(OtherBlocks, **NARROW)}, "teacher"),
        ({"head": partial(DecoderHead, **NARROW)}, "head teacher"),
        ({"head": Mixing}, "teacher"),
        ({"head": BatchNormHead}, "teacher"),
        ({"checkpointing": True}, "teacher"),
        ({"student": MixingStudent(*TINY["vit"])}, "teacher"),
        ({"teacher": MixingTeacher(TINY["vit"][0], weights="random", model_args=TINY["vit"][1])}, "student"),
        ({"teacher": EMATarget(top_blocks=2)}, "student teacher"),
        ({"student": "swin"}, "teacher"),
        ({"student": "visible_vit", "selection": "visible"}, "teacher"),
        ({"normalization": InstanceNorm()}, "student"),
        ({"normalization": CenteredSoftmax(24), "loss": SoftCrossEntropyLoss()}, "student"),
        ({"teacher": HOGTarget(patch_size=8, cell_size=4)}, "student"),
        ({"masking": NoMasking(), "selection": "all"}, "student teacher"),  # where nothing is left out
    ],
)
def test_who_looks_at_all_patches_gets_all(changes: dict[str, object], found: str) -> None:
    student, target = changes.get("student", "vit"), changes.get("teacher", teacher())
    student = tiny_student(student) if isinstance(student, str) else student
    model = tiny_model(**{"normalization": LayerNorm(), **changes, "student": student, "teacher": target})
    assert " ".join(who_leaves_out(model)) == found
    model.training_step(torch.rand(2, 3, 32, 32), 0).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


MASKINGS = {
    "block": BlockMasking(0.4),
    "random": RandomMasking(0.75),
    "units": RandomMasking(0.5, unit=2),
    "interval": RandomMasking((0.1, 0.5)),
    "attentive": AttentiveMasking(0.75),
}
PARTS: dict[str, dict[str, object]] = {
    "maskdistill": {"teacher": teacher},
    "mae": {"student": "visible_vit", "head": partial(DecoderHead, **NARROW), "normalization": LayerNorm()},
    "milan": {"student": "visible_eva_rotary", "head": partial(PromptingDecoderHead, **NARROW), "teacher": teacher},
    "maskalign": {"student": "visible_vit", "selection": "visible", "teacher": teacher},
    "distillation": {"selection": "all", "teacher": teacher},
    "data2vec": {"student": "beit_shared_bias", "teacher": lambda: EMATarget(top_blocks=2)},
    "simmim": {"student": "swin"},
}


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("parts", PARTS)
def test_no_shape_depends_on_the_data(parts: str, masking: str) -> None:
    """A device without data, which can answer no question, runs the step: a GPU is asked none. It is CUDA's sync debug mode
    for those who have no GPU, but for copies from the host."""
    given = dict(PARTS[parts])
    target = given.pop("teacher", lambda: PixelTarget(8))
    made = target()  # type: ignore[operator]
    if masking == "attentive" and not isinstance(made, FeatureTarget):
        pytest.skip("attention comes from a network")
    student = tiny_student(str(given.pop("student", "vit")))
    model = tiny_model(student=student, teacher=made, masking=MASKINGS[masking], **given).to("meta")
    loss = model.training_step(torch.rand(3, 3, 32, 32, device="meta"), 0)
    loss.backward()
    assert loss.device.type == "meta"
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "pos_embed" not in name)


@pytest.mark.parametrize("masking", [name for name in MASKINGS if name != "attentive"])
@pytest.mark.parametrize("invert", [False, True])
def test_picking_is_indexing(masking: str, invert: bool) -> None:
    mask = MASKINGS[masking](torch.rand(3, 3, 32, 32), (4, 4))
    mask = inverse(mask) if invert else mask
    assert count_of(mask) == mask[0].sum()
    for values in (torch.rand(3, 4, 4, 5), torch.randint(9, (3, 4, 4))):
        assert torch.equal(pick(values, mask), values[mask])


def test_a_count_does_not_outlive_a_change() -> None:
    """A user's masking may take patches away from one of ours, in place."""
    mask = BlockMasking(0.4)(torch.rand(3, 3, 32, 32), (4, 4))
    mask[:, :, 0] = False
    assert count_of(mask) is None
    values = torch.rand(3, 4, 4, 5)
    assert torch.equal(pick(values, mask), values[mask])


@pytest.mark.parametrize("kind", [kind for kind in VISIBLE if "rotary" not in kind])
def test_masks_that_do_not_say_their_count_work_as_well(kind: str) -> None:
    model = tiny_model(student=tiny_student(kind), head=partial(DecoderHead, **NARROW), masking=RandomMasking(0.5))
    images = torch.rand(3, 3, 32, 32)
    mask = model.masking(images, (4, 4))
    plain = mask.clone()
    assert count_of(plain) is None
    predictions = [model.head(model.student(images, m), m, m) for m in (mask, plain)]
    assert torch.equal(*predictions)


def test_in_inference_mode_no_count_is_believed() -> None:
    """There torch does not see that a mask was changed in place."""
    model = tiny_model(teacher=teacher(), normalization=LayerNorm())
    with torch.inference_mode():
        mask = BlockMasking(0.4)(torch.rand(3, 3, 32, 32), (4, 4))
        mask[:, :, 0] = False
        values = torch.rand(3, 4, 4, 5)
        assert torch.equal(pick(values, mask), values[mask])
        assert model.training_step(torch.rand(2, 3, 32, 32), 0).isfinite()


def test_fsdp1_which_may_compute_blocks_again_gets_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(teacher=teacher(), normalization=LayerNorm())
    assert len(model.last_blocks) == 2
    monkeypatch.setattr("unimim.pretraining.FSDPStrategy", SingleDeviceStrategy)  # FSDP1 itself needs a GPU
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, **quiet)  # type: ignore[arg-type]
    trainer.fit(model, DataLoader(torch.rand(2, 3, 32, 32), batch_size=2))
    assert model.last_blocks == [model.teacher.last_block]


def test_gradients_computed_again_in_the_backward_pass_are_the_same() -> None:
    """Activation checkpointing beside a teacher that leaves patches out."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = tiny_model(teacher=teacher(), normalization=LayerNorm(), checkpointing=checkpointing)
        results.append(step(model, model.last_blocks)[:2])
    (loss, gradients), (again, of_again) = results
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    for gradient, wanted in zip(of_again, gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)
