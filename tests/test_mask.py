"""Patches are picked by indices of a known number, and no shape in a step depends on the data."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import TINY, VISIBLE, all_tokens, tiny_model, tiny_student
from torch import Tensor

from unimim import (
    AttentiveMasking,
    BlockMasking,
    DecoderHead,
    EMATarget,
    FeatureTarget,
    LayerNorm,
    Mask,
    Masking,
    PixelTarget,
    PromptingDecoderHead,
    RandomMasking,
    UserError,
    WholeImage,
)

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
    mask = ~mask if invert else mask
    assert mask.count == mask.tensor[0].sum()
    assert mask.grid_size == (4, 4)
    assert mask.cells == 16
    for values in (torch.rand(3, 4, 4, 5), torch.randint(9, (3, 4, 4))):
        assert torch.equal(mask.of(values), values[mask.tensor])
    tokens, given = torch.rand(3, 16, 5), torch.rand(3, mask.count, 5)
    flat = mask.tensor.flatten(1)
    assert torch.equal(mask.take(tokens), torch.stack([tokens[b][flat[b]] for b in range(3)]))
    expected = tokens.clone()
    for b in range(3):
        expected[b, flat[b]] = given[b]
    assert torch.equal(mask.put(tokens, given), expected)
    assert mask.indices.tolist() == [flat[b].nonzero().flatten().tolist() for b in range(3)]
    assert mask.full().tensor.all()
    assert mask.full().count == 16


def test_a_mask_of_a_tensor_counts_itself() -> None:
    tensor = torch.zeros(2, 4, 4, dtype=torch.bool)
    tensor[:, 1, 2:] = True
    assert Mask(tensor).count == 2
    assert str(Mask(tensor)) == "Mask(2 of 4x4 patches in each of 2 images)"
    assert Mask(tensor).predicted.count == 2
    tensor[0, 0, 0] = True
    with pytest.raises(UserError, match="^a mask hides 2 and 3 patches of two images: it has to be one count in every image$"):
        Mask(tensor)
    made_of = r"^a mask is made of a bool tensor \[b h w\], True = hidden, not of "
    with pytest.raises(UserError, match=made_of + r"torch.float32 \(2, 4, 4\)$"):
        Mask(tensor.float())
    with pytest.raises(UserError, match=made_of + r"torch.bool \(2, 16\)$"):
        Mask(tensor.flatten(1))


class Own(Masking):
    """A user's: a plain tensor, or a mask of ours that was changed in place."""

    def __init__(self, changed: bool) -> None:
        super().__init__()
        self.changed = changed

    def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Mask | Tensor:
        mask = BlockMasking(0.4)(images, grid_size)
        if self.changed:
            mask.tensor[:, 0] = False
            return mask
        return mask.tensor.clone()


@pytest.mark.parametrize("kind", VISIBLE)
def test_a_users_masking_may_give_a_plain_tensor(kind: str) -> None:
    """It is wrapped where the masking is called, and the loss is that of our own."""
    model = tiny_model(student=tiny_student(kind), head=partial(DecoderHead, **NARROW), masking=Own(False))
    images = torch.rand(3, 3, 32, 32)
    torch.manual_seed(1)
    loss = model.training_step(images, 0)
    model.masking = BlockMasking(0.4)
    torch.manual_seed(1)
    assert torch.equal(model.training_step(images, 0), loss)


def test_a_mask_that_was_changed_in_place_is_refused_when_the_model_is_built() -> None:
    with pytest.raises(
        UserError, match=r"^Own gives a mask that says 6 patches, and has \[\d, \d\]: make a new one, Mask\(tensor\)$"
    ):
        tiny_model(masking=Own(True))


GIVEN: dict[str, tuple[Callable[[Mask], Any], str]] = {
    "nothing": (lambda mask: None, r"^Given: a mask is made of a bool tensor \[b h w\], True = hidden, not of a NoneType$"),
    "floats": (lambda mask: mask.tensor.float(), r"^Given: a mask is made of a bool tensor .* torch.float32 \(2, 4, 4\)$"),
    "another grid": (lambda mask: torch.ones(2, 3, 4) > 0, r"^Given gives a mask of shape \(2, 3, 4\) for two images"),
    "visible ones predicted": (
        lambda mask: Mask(mask.tensor, predicted=~mask),
        r"^Given gives a mask whose predicted patches are not all hidden",
    ),
    "a wrong count": (
        lambda mask: Mask(mask.tensor, predicted=Mask(mask.tensor, 1)),
        r"^Given gives a mask that says 1 patches, and has \[6, 6\]",
    ),
}


@pytest.mark.parametrize("kind", GIVEN)
def test_what_is_no_mask_is_one_line(kind: str) -> None:
    made, message = GIVEN[kind]

    class Given(Masking):
        def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Any:
            return made(BlockMasking(0.4)(images, grid_size))

    with pytest.raises(UserError, match=message) as caught:
        tiny_model(masking=Given())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("masking", ["block", "random"])
def test_inference_mode_changes_nothing(masking: str) -> None:
    """There torch does not see that a tensor was changed in place: a mask of a changed tensor counts anew."""
    model = tiny_model(teacher=teacher(), normalization=LayerNorm(), masking=MASKINGS[masking])
    with torch.inference_mode():
        mask = model.masking(torch.rand(3, 3, 32, 32), (4, 4))
        values = torch.rand(3, 4, 4, 5)
        assert torch.equal(mask.of(values), values[mask.tensor])
        changed = mask.tensor.clone()
        changed[:, :, 0] = True
        changed[:, :, 1:] = False
        assert Mask(changed).count == 4
        assert torch.equal(Mask(changed).of(values), values[changed])
        assert model.training_step(torch.rand(2, 3, 32, 32), 0).isfinite()


def test_fewer_patches_may_be_predicted_than_are_hidden() -> None:
    """As in CrossMAE: the term is on those, and the student sees neither."""

    class Half(Masking):
        def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Mask:
            tensor = torch.zeros(len(images), *grid_size, dtype=torch.bool)
            predicted = tensor.clone()
            tensor[:, :2], predicted[:, 0] = True, True
            return Mask(tensor, predicted=Mask(predicted))

    model = tiny_model(masking=Half(), teacher=PixelTarget(8)).eval()
    images = torch.rand(3, 3, 32, 32)
    loss = model.training_step(images, 0)
    mask = model.masking(images, (4, 4))
    tokens = model.student(images, mask)
    expected = model.teacher(images, (4, 4))[:, 0].flatten(0, 1)
    assert torch.equal(loss, (model.head.linear(tokens.grid()[:, 0].flatten(0, 1)) - expected).square().mean())
    visible = images.clone()
    visible[:, :, :16] = 0
    assert torch.equal(model.student(visible, mask).patches, tokens.patches)


@pytest.mark.parametrize("kind", ["vit", "visible_vit_with_registers"])
def test_tokens_of_some_patches_are_found_by_a_loop(kind: str) -> None:
    """Also where fewer are selected than have tokens."""
    student = tiny_student(kind).eval()
    mask = RandomMasking(0.5)(torch.rand(3, 3, 32, 32), (4, 4))
    tokens = student(torch.rand(3, 3, 32, 32), mask)
    some = Mask(torch.zeros_like(mask.tensor))
    places = [[int(n) for n in (~mask).indices[b][[1, 4, 6]]] for b in range(3)]
    for b in range(3):
        some.tensor.flatten(1)[b, places[b]] = True
    some = Mask(some.tensor)
    have = tokens.where.indices.tolist()
    expected = [tokens.patches[b, have[b].index(place)] for b in range(3) for place in places[b]]
    assert torch.equal(tokens.of(some), torch.stack(expected))
    assert torch.equal(
        tokens.of(~mask),
        torch.cat([tokens.patches[b, [have[b].index(n) for n in row]] for b, row in enumerate((~mask).indices.tolist())]),
    )
    assert torch.equal(tokens.of(WholeImage()), tokens.prefix[:, 0])
    if kind != "vit":
        for selected in (mask, mask.full(), Mask(~some.tensor)):  # all of them hidden, or some
            with pytest.raises(UserError, match="^the student drops the hidden patches, so a head without a decoder"):
                tokens.of(selected)
        with pytest.raises(UserError, match="^the student drops the hidden patches: its tokens are no whole grid"):
            tokens.grid()


@pytest.mark.parametrize(("kind", "width"), [("swin", 96), ("vit_without_cls", 24)])
def test_an_image_without_cls_has_no_token(kind: str, width: int) -> None:
    mask = BlockMasking(0.4)(torch.rand(2, 3, 32, 32), (4, 4))
    tokens = tiny_student(kind)(torch.rand(2, 3, 32, 32), mask)
    assert tokens.prefix.shape == (2, 0, width)
    with pytest.raises(UserError, match="predicted from CLS, and the student's backbone has no such token"):
        tokens.of(WholeImage())


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "swin"])
def test_earlier_blocks_come_out_on_demand(kind: str) -> None:
    """They are what a hook on the block sees, and nothing else changes."""
    student = tiny_student(kind).eval()
    images = torch.rand(3, 3, 32, 32)
    mask = RandomMasking(0.5)(images, (4, 4))
    plain = all_tokens(student(images, mask))
    seen: list[Tensor] = []
    student.backbone.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    student.ask([0])
    student.ask([0, 1])
    assert student.blocks == (0, 1)
    tokens = student(images, mask)
    assert torch.equal(all_tokens(tokens), plain)
    assert torch.equal(all_tokens(tokens.blocks[0]), seen[0])
    assert set(tokens.blocks) == {0, 1}
    with pytest.raises(UserError, match="asks for the tokens of block 2 of .*, which has blocks 0 to 1"):
        student.ask([2])


def test_blocks_of_another_width_are_refused() -> None:
    with pytest.raises(UserError, match="of those only the ones of the last width and grid can be given"):
        tiny_student("swin").ask([0])
