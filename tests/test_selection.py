"""Patches are picked by indices of a known number, and no shape in a step depends on the data."""

from functools import partial

import pytest
import torch
from conftest import TINY, VISIBLE, tiny_model, tiny_student

from unimim import (
    AttentiveMasking,
    BlockMasking,
    DecoderHead,
    EMATarget,
    FeatureTarget,
    LayerNorm,
    PixelTarget,
    PromptingDecoderHead,
    RandomMasking,
)
from unimim.selection import count_of, inverse, pick

NARROW = {"width": 8, "depth": 1, "num_heads": 2}


def teacher(kind: str = "vit", **changes: object) -> FeatureTarget:
    name, model_args = TINY[kind]
    return FeatureTarget(name, weights="random", model_args={**model_args, "num_classes": 0, "global_pool": ""}, **changes)


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
