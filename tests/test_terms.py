"""The loss as a sum of terms: three methods of several terms against their formulas, and what every further term shares."""

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import ROOT, TINY, narrow_recipe, tiny_model, tiny_student
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import unimim
from unimim import (
    BlockMasking,
    CenteredSoftmax,
    CodebookTarget,
    CosineLoss,
    DecoderHead,
    EMAHeadTarget,
    EMATarget,
    FeatureTarget,
    HOGTarget,
    L2Norm,
    LayerNorm,
    LinearHead,
    Mask,
    MaskedImageModeling,
    PatchAggregationHead,
    PixelTarget,
    PrototypeHead,
    SoftCrossEntropyLoss,
    TargetGenerator,
    Term,
)
from unimim.cli.main import main

NARROW = {"width": 8, "depth": 1, "num_heads": 2}
CLIP = partial(DecoderHead, **NARROW)


class Codes(TargetGenerator):
    """Codes that depend on the brightness of a patch; runs are counted."""

    dim = 7

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
        self.runs += 1
        brightness = F.adaptive_avg_pool2d(images, grid_size).mean(1)
        return (brightness * 1000).long() % self.dim


class Brightness(TargetGenerator):
    """A target that only an image has."""

    dim = 3

    def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Tensor:
        return images.mean((2, 3))


def teacher(kind: str = "vit", **changes: Any) -> FeatureTarget:
    name, model_args = TINY[kind]
    return FeatureTarget(name, weights="random", model_args={**model_args, "num_classes": 0, "global_pool": ""}, **changes)


def losses_of(model: MaskedImageModeling, images: Tensor) -> tuple[dict[str, Tensor], Mask]:
    """The loss of each term, and the mask that they had."""
    torch.manual_seed(3)
    mask = model.masking(images, model.student.grid_size)
    tokens = model.student(images, mask)
    return {name: term(images, tokens, mask) for name, term in model.terms.items()}, mask


def attention(block: Any, x: Tensor, bias: Tensor | float) -> Tensor:
    """A block of BEiT, written out: [b n d], bias [heads n n] -> [b n d]"""
    attn = block.attn
    normed = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, block.norm1.eps)
    q_bias = attn.q_bias if attn.q_bias is not None else torch.zeros(x.shape[-1])
    q, k, v = F.linear(normed, attn.qkv.weight, torch.cat([q_bias, torch.zeros_like(q_bias), attn.v_bias])).chunk(3, -1)
    heads = []
    for number in range(attn.num_heads):
        size = x.shape[-1] // attn.num_heads
        part = slice(number * size, (number + 1) * size)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / size**0.5
        heads.append((scores + (bias[number] if isinstance(bias, Tensor) else bias)).softmax(-1) @ v[..., part])
    x = x + block.gamma_1 * F.linear(torch.cat(heads, -1), attn.proj.weight, attn.proj.bias)
    normed = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, block.norm2.eps)
    inner = F.gelu(F.linear(normed, block.mlp.fc1.weight, block.mlp.fc1.bias))
    return x + block.gamma_2 * F.linear(inner, block.mlp.fc2.weight, block.mlp.fc2.bias)


@pytest.mark.parametrize("shared", [True, False])
def test_beit_v2s_cls_term_is_its_formula(shared: bool) -> None:
    """BEiT v2, section 2.3: the last CLS and the patches of block l go through a shallow head, which predicts the same codes.

    Everything from the embedded patches on is written out here, from the weights alone.
    """
    name, model_args = TINY["beit_shared_bias"]
    student = unimim.MaskTokenStudent(name, {**model_args, "depth": 3, "init_values": 0.1})
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    head = partial(PatchAggregationHead, block=1, depth=2, projection="first" if shared else None)
    term = Term("first", nn.Identity(), head, nn.CrossEntropyLoss(), weight=0.7)
    codes = Codes()
    model = tiny_model(student=student, teacher=codes, loss=nn.CrossEntropyLoss(), terms={"cls": term}).eval()
    for parameter in model.further_terms.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.rand(3, 3, 32, 32)
    codes.runs = 0
    losses, mask = losses_of(model, images)
    assert codes.runs == 1

    backbone, flat = student.backbone, mask.tensor.flatten(1)
    patches = backbone.patch_embed.proj((images - student.mean) / student.std).flatten(2).transpose(1, 2)
    patches = torch.where(flat[..., None], student.mask_token, patches)
    x = torch.cat([backbone.cls_token.expand(3, -1, -1), patches], 1)
    table, index = backbone.rel_pos_bias.relative_position_bias_table, backbone.rel_pos_bias.relative_position_index
    bias = table[index.flatten()].view(17, 17, -1).permute(2, 0, 1)
    for number, block in enumerate(backbone.blocks):
        x = attention(block, x, bias)
        early = x if number == 1 else early if number > 1 else None  # noqa: F821
    second = torch.cat([x[:, :1], early[:, 1:]], 1)
    for block in model.terms["cls"].head.blocks:
        second = attention(block, second, bias)
    norm, linear = (backbone.norm, model.head.linear) if shared else (term.head.norm, term.head.linear)
    target = codes(images, (4, 4))[mask.tensor]
    own = F.linear(
        F.layer_norm(x, (24,), backbone.norm.weight, backbone.norm.bias, backbone.norm.eps), *parameters(model.head.linear)
    )
    of_cls = F.linear(F.layer_norm(second, (24,), norm.weight, norm.bias, norm.eps), *parameters(linear))
    torch.testing.assert_close(losses["first"], F.cross_entropy(own[:, 1:][flat], target), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses["cls"], 0.7 * F.cross_entropy(of_cls[:, 1:][flat], target), rtol=1e-5, atol=1e-5)
    names = {name.split(".")[0] for name, _ in term.head.named_parameters()}
    assert names == ({"blocks"} if shared else {"blocks", "norm", "linear"})


def parameters(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    return linear.weight, linear.bias


def test_beit_v2s_head_begins_as_in_its_code() -> None:
    """Its blocks are made after the others were drawn, so they keep torch's bounds, divided by depth; layer scale stays."""
    student = unimim.MaskTokenStudent(
        "beit_base_patch16_224",
        {"img_size": 32, "embed_dim": 96, "depth": 12, "num_heads": 2, "init_values": 0.1, "use_shared_rel_pos_bias": True,
         "use_rel_pos_bias": False, "use_abs_pos_emb": False},
        init="beit",
    )  # fmt: skip
    head = PatchAggregationHead(student, Codes(), projection=None)
    for number, block in enumerate(head.blocks):
        bound, depth = 96**-0.5, 10 + number  # early_layers + layer_id + 1
        layers: dict[Any, float] = {
            block.attn.qkv: bound, block.mlp.fc1: bound, block.attn.proj: bound / (2 * depth) ** 0.5,
            block.mlp.fc2: 384**-0.5 / (2 * depth) ** 0.5,
        }  # fmt: skip
        for layer, limit in layers.items():
            assert 0.97 * limit < layer.weight.abs().max() <= limit
            assert float(layer.weight.detach().std()) == pytest.approx(limit / 3**0.5, rel=0.03)
        assert (block.attn.q_bias == 0).all()
        assert (block.gamma_1 == 0.1).all()
    assert head.linear.weight.abs().max() <= 0.02  # cut at one standard deviation, as BEiT's


def test_medics_three_terms_are_their_formulas_and_its_teacher_runs_once() -> None:
    clip = teacher(norm=False)
    model = tiny_model(
        teacher=clip, normalization=LayerNorm(), student=tiny_student("visible_vit"), selection="visible",
        loss=nn.SmoothL1Loss(beta=2.0),
        terms={
            "cls": Term("first", L2Norm(), LinearHead, CosineLoss(), "image", 0.5),
            "pixels": Term(PixelTarget(8), LayerNorm(unbiased=True), CLIP, nn.MSELoss(), "masked", 2.0),
        },
    ).eval()  # fmt: skip
    network, runs = clip.frozen.network, []
    network.patch_embed.register_forward_hook(lambda *args: runs.append(1))
    images = torch.rand(3, 3, 32, 32)
    losses, mask = losses_of(model, images)
    assert len(runs) == 1

    with torch.no_grad():
        x = network._pos_embed(network.patch_embed((images - clip.mean) / clip.std))
        for block in network.blocks:
            x = block(x)
    backbone, hidden = model.student.backbone, mask.tensor.flatten(1)
    embedded = backbone._pos_embed(backbone.patch_embed((images - model.student.mean) / model.student.std))
    tokens = []
    for image in range(3):
        seen = [0, *(1 + place for place in range(16) if not hidden[image, place])]
        y = embedded[image : image + 1, seen]
        for block in backbone.blocks:
            y = block(y)
        tokens.append(backbone.norm(y)[0])
    tokens = torch.stack(tokens)
    target = F.layer_norm(x[:, 1:], (24,), eps=1e-6)[~hidden]
    expected = F.smooth_l1_loss(F.linear(tokens[:, 1:].flatten(0, 1), *parameters(model.head.linear)), target, beta=2.0)
    torch.testing.assert_close(losses["first"], expected, rtol=1e-5, atol=1e-5)
    cosine = F.cosine_similarity(F.linear(tokens[:, 0], *parameters(model.terms["cls"].head.linear)), x[:, 0])
    torch.testing.assert_close(losses["cls"], 0.5 * (1 - cosine).mean(), rtol=1e-5, atol=1e-5)
    normalized = (images - model.student.mean) / model.student.std
    pixels = rearrange(normalized, "b c (h p) (w q) -> b (h w) (p q c)", p=8, q=8)[hidden]
    pixels = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
    decoder = model.terms["pixels"].head
    decoded = decoder(unimim.Tokens(tokens[:, :1], tokens[:, 1:], ~mask), mask, mask)
    ours = losses["pixels"]
    torch.testing.assert_close(ours, 2 * F.mse_loss(decoded, pixels), rtol=1e-4, atol=1e-5)


def test_ibots_two_terms_are_their_formulas_over_three_steps() -> None:
    """Two centers, one head, one run of the teacher; the centers move behind each step, as in its code."""
    head = partial(PrototypeHead, hidden=12, bottleneck=6)
    model = tiny_model(
        teacher=EMAHeadTarget(9), normalization=CenteredSoftmax(9, 0.07, 0.9), head=head, loss=SoftCrossEntropyLoss(0.1),
        terms={"cls": Term("first", CenteredSoftmax(9, 0.05, 0.8), "first", SoftCrossEntropyLoss(0.2), "image", 1.0)},
    )  # fmt: skip
    assert model.terms["cls"].head is model.head
    average, average_head = model.teacher.average, model.teacher.average_head
    runs: list[int] = []
    average.register_forward_hook(lambda *args: runs.append(1))
    center, center2 = torch.zeros(9), torch.zeros(9)
    for step in range(3):
        images = torch.rand(3, 3, 32, 32)
        runs.clear()
        losses, mask = losses_of(model, images)
        assert len(runs) == 1
        with torch.no_grad():
            tokens = average.backbone.forward_features(average.normalize(images))
            logits = F.linear(F.normalize(average_head.mlp(tokens), dim=-1), F.normalize(average_head.prototypes, dim=-1))
        seen = model.student(images, mask)
        ours = torch.cat([seen.prefix, seen.patches], 1)
        ours = F.linear(F.normalize(model.head.mlp(ours), dim=-1), F.normalize(model.head.prototypes, dim=-1))
        patch = ((logits[:, 1:] - center2) / 0.07).softmax(-1)
        of_patches = -(patch * (ours[:, 1:] / 0.1).log_softmax(-1)).sum(-1)[mask.tensor.flatten(1)].mean()
        image = ((logits[:, 0] - center) / 0.05).softmax(-1)
        of_cls = -(image * (ours[:, 0] / 0.2).log_softmax(-1)).sum(-1).mean()
        torch.testing.assert_close(losses["first"], of_patches, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(losses["cls"], of_cls, rtol=1e-4, atol=1e-5)
        center = 0.8 * center + 0.2 * logits[:, 0].mean(0)
        center2 = 0.9 * center2 + 0.1 * logits[:, 1:].mean((0, 1))
        with torch.no_grad():
            model.head.prototypes += 0.1 * step


# What holds for every further term


def several(**changes: Any) -> MaskedImageModeling:
    """A model of four terms that share and own all kinds of parts."""
    terms = {
        "visible": Term("first", LayerNorm(), LinearHead, nn.L1Loss(), "visible", 0.5),
        "ema": Term(EMATarget(top_blocks=1, momentum=0.5), nn.Identity(), LinearHead, nn.MSELoss(), "all", 0.25),
        "image": Term(Brightness(), nn.Identity(), LinearHead, nn.MSELoss(), "image"),
    }
    return tiny_model(**{"terms": terms, "lr": 1e-2, "warmup_epochs": 0, **changes})


def trained(model: MaskedImageModeling, folder: Path, steps: int, **changes: Any) -> pl.Trainer:
    """A training of that many steps; its images are the same in every call."""
    images = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    data = unimim.SeededSamples(list(images))
    loader = DataLoader(data, 3, sampler=unimim.ResumableSampler(data), drop_last=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    path = changes.pop("ckpt_path", None)
    trainer = pl.Trainer(default_root_dir=folder, max_steps=steps, log_every_n_steps=1, **{**quiet, **changes})
    pl.seed_everything(4)
    trainer.fit(model, loader, ckpt_path=path)
    return trainer


def test_the_loss_is_the_weighted_sum_and_all_is_logged(tmp_path: Path) -> None:
    model = several()
    images = torch.rand(3, 3, 32, 32)
    losses, mask = losses_of(model, images)
    tokens = model.student(images, mask)
    target = LayerNorm()(HOGTarget(8, 4)(images, (4, 4)))
    expected = 0.5 * F.l1_loss(model.terms["visible"].head(tokens, mask, ~mask), target[~mask.tensor])
    torch.testing.assert_close(losses["visible"], expected)
    expected = F.mse_loss(F.linear(tokens.prefix[:, 0], *parameters(model.terms["image"].head.linear)), images.mean((2, 3)))
    torch.testing.assert_close(losses["image"], expected)
    torch.manual_seed(3)
    torch.testing.assert_close(model.training_step(images, 0), sum(losses.values()))
    logged = trained(model, tmp_path, 2, enable_checkpointing=False).callback_metrics
    names = {f"train/loss/{name}" for name in ("first", "visible", "ema", "image")}
    assert set(logged) == {"train/loss", *names} == set(model.metrics)
    assert logged["train/loss"] == pytest.approx(sum(float(logged[name]) for name in names))


def test_a_model_of_one_term_is_what_it_was() -> None:
    model = tiny_model()
    assert list(model.terms) == ["first"]
    assert model.metrics == ("train/loss",)
    assert {name.split(".")[0] for name in model.state_dict()} == {"student", "head"}


def test_shared_parts_are_registered_once() -> None:
    model = tiny_model(
        teacher=EMAHeadTarget(9), normalization=CenteredSoftmax(9), head=partial(PrototypeHead, hidden=8, bottleneck=4),
        loss=SoftCrossEntropyLoss(), terms={"cls": Term("first", CenteredSoftmax(9), "first", SoftCrossEntropyLoss(), "image")},
    )  # fmt: skip
    tensors = [tensor.data_ptr() for tensor in model.state_dict().values() if tensor.numel()]
    assert len(tensors) == len(set(tensors))
    assert [name for name in model.state_dict() if "further" in name] == ["further_terms.cls.normalization.center"]
    copied = copy.deepcopy(model)
    assert copied.terms["cls"].head is copied.head is not model.head
    assert copied.terms["cls"].teacher is copied.teacher


def test_every_teacher_follows_and_every_term_learns(tmp_path: Path) -> None:
    model = several()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(model, tmp_path, 2, enable_checkpointing=False)
    for name, value in model.state_dict().items():
        moves = name.split(".")[-1] not in ("mean", "std") and "mask_token" not in name.split("average.")[-1]
        assert torch.equal(value, before[name]) != moves or name.endswith("mask_token"), name
    assert not any(parameter.requires_grad for parameter in model.terms["ema"].teacher.parameters())
    learning = {id(p) for group in model.configure_optimizers()["optimizer"].param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters() if p.requires_grad} == learning


def test_a_codebook_of_a_further_term_is_fitted(tmp_path: Path) -> None:
    codebook = CodebookTarget(HOGTarget(8, 4), codes=5, fit_images=6)
    model = tiny_model(terms={"codes": Term(codebook, nn.Identity(), LinearHead, nn.CrossEntropyLoss())})
    trained(model, tmp_path, 1, enable_checkpointing=False)
    assert codebook.codebook.isfinite().all()
    assert codebook.codebook.abs().sum() > 0


def test_a_run_with_terms_resumes_exactly(tmp_path: Path) -> None:
    saving = pl.callbacks.ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    whole = several()
    trained(whole, tmp_path, 6, callbacks=[saving])
    torch.manual_seed(9)
    second = several()
    trained(second, tmp_path / "second", 6, ckpt_path=tmp_path / "step=3.ckpt")
    state = second.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())


def test_every_term_is_in_the_table_and_in_the_pictures() -> None:
    model = several()
    table = model.summary().splitlines()
    assert len(table) == 1 + 6 + 3 * 4
    assert next(line for line in table if "visible.teacher" in line).split() == ["T", "visible.teacher", "that", "of", "first"]
    drawn = model.eval().pictures(torch.rand(3, 3, 32, 32))
    for name in ("first", "visible", "ema", "image"):
        target, prediction = (
            picture for caption, picture in drawn.items() if caption.startswith(f"{name}: ") and "(" in caption
        )
        assert target.shape[:2] == prediction.shape[:2] == (3, 3)
        assert 0 <= target.min() <= target.max() <= 1


def test_a_subclass_chooses_patches_for_the_first_term_only() -> None:
    class Everything(MaskedImageModeling):
        def select(self, mask: Mask) -> Mask:
            return mask.full()

    model = tiny_model(Everything, terms={"visible": Term("first", LayerNorm(), LinearHead, nn.L1Loss(), "visible")})
    mask = model.masking(torch.rand(2, 3, 32, 32), (4, 4))
    assert model.terms["first"].select(mask).count == 16
    assert model.terms["visible"].select(mask).count == 16 - mask.count


def test_a_part_that_is_replaced_is_replaced_for_all_that_share_it() -> None:
    model = several()
    other = HOGTarget(8, 4)
    model.teacher = other
    assert model.terms["visible"].teacher is other


class Silent(TargetGenerator):
    """A user's, whose `return` was forgotten."""

    dim = 3

    def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Any:
        images.mean()


class SilentHead(LinearHead):
    """Likewise."""

    def forward(self, tokens: unimim.Tokens, mask: Mask, selected: Mask) -> Any:
        self.linear(tokens.of(selected))


class Nothing(nn.Module):
    """Likewise."""

    def forward(self, *values: Tensor) -> None:
        pass


REFUSED: dict[str, tuple[Any, str]] = {
    "no such teacher": (
        lambda: {"more": Term("clip", LayerNorm(), LinearHead, nn.L1Loss())},
        r"model.terms.more.teacher is 'clip', but the terms before it are first: name one of these, or give a teacher of its",
    ),
    "no such head": (lambda: {"more": Term("first", LayerNorm(), "last", nn.L1Loss())}, r"model.terms.more.head is 'last'"),
    "a later term": (
        lambda: {
            "one": Term("two", LayerNorm(), LinearHead, nn.L1Loss()),
            "two": Term(HOGTarget(8, 4), LayerNorm(), LinearHead, nn.L1Loss()),
        },
        r"model.terms.one.teacher is 'two', but the terms before it are first",
    ),
    "a taken name": (
        lambda: {"first": Term("first", LayerNorm(), LinearHead, nn.L1Loss())},
        r"model.terms has the name 'first'",
    ),
    "a name with a dot": (
        lambda: {"a.b": Term("first", LayerNorm(), LinearHead, nn.L1Loss())},
        r"model.terms has the name 'a.b'",
    ),
    "no term": (lambda: {"more": LinearHead}, r"model.terms.more is .*LinearHead"),
    "a selection": (
        lambda: {"more": Term("first", LayerNorm(), LinearHead, nn.L1Loss(), "cls")},
        r"selection is 'cls', known are",
    ),
    "a weight": (
        lambda: {"more": Term("first", LayerNorm(), LinearHead, nn.L1Loss(), weight=0)},
        r"weight of a term is 0, but",
    ),
    "a class": (lambda: {"more": Term("first", LayerNorm, LinearHead, nn.L1Loss())}, r"normalization is the class"),
    "a target without image": (
        lambda: {"more": Term("first", LayerNorm(), LinearHead, nn.L1Loss(), "image")},
        r"HOGTarget gives no target of the whole image, which selection 'image' needs",
    ),
    "a loss of another kind": (
        lambda: {"more": Term("first", LayerNorm(), LinearHead, nn.CrossEntropyLoss())},
        r"CrossEntropyLoss is for classes or probabilities, .* set model.terms.more.loss to a regression",
    ),
    "a head of another width": (
        lambda: {"more": Term(PixelTarget(8), LayerNorm(), "first", nn.L1Loss())},
        r"LinearHead gives a prediction of shape",
    ),
    "blocks that are not there": (
        lambda: {"more": Term("first", LayerNorm(), partial(PatchAggregationHead, block=7), nn.L1Loss())},
        r"model.head.block is 7, but an earlier block of this student is one of 0 to 0",
    ),
    "a head that is shared by nobody": (
        lambda: {"more": Term("first", LayerNorm(), partial(PatchAggregationHead, block=0, projection="cls"), nn.L1Loss())},
        r"model.head.projection is 'cls', but the terms before it are first",
    ),
    "a teacher that returns nothing": (
        lambda: {"more": Term(Silent(), nn.Identity(), LinearHead, nn.L1Loss())},
        r"^Silent gives a NoneType as target, but it has to be a tensor: return one$",
    ),
    "a normalization that returns nothing": (
        lambda: {"more": Term("first", Nothing(), LinearHead, nn.L1Loss())},
        r"^Nothing gives a NoneType as target",
    ),
    "a head that returns nothing": (
        lambda: {"more": Term("first", nn.Identity(), SilentHead, nn.L1Loss())},
        r"^SilentHead gives a NoneType as prediction",
    ),
    "a loss that returns nothing": (
        lambda: {"more": Term("first", nn.Identity(), LinearHead, Nothing())},
        r"^Nothing gives a NoneType as loss, but it has to be a tensor: return one$",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_terms_that_do_not_fit_are_one_line(kind: str) -> None:
    terms, message = REFUSED[kind]
    with pytest.raises(unimim.UserError, match=message) as caught:
        tiny_model(terms=terms())
    assert "\n" not in str(caught.value)


def test_an_image_term_needs_cls() -> None:
    for kind in ("swin", "vit_without_cls"):
        with pytest.raises(unimim.UserError, match="predicted from CLS, and the student's backbone has no such token"):
            several(student=tiny_student(kind))
    with pytest.raises(unimim.UserError, match="has no CLS token to predict"):
        tiny_model(
            teacher=teacher("vit_without_cls"),
            terms={"cls": Term("first", L2Norm(), LinearHead, CosineLoss(), "image")},
        )


def test_an_average_of_one_head_predicts_for_no_other() -> None:
    with pytest.raises(unimim.UserError, match="EMAHeadTarget predicts by the head of the term 'first': name that head too"):
        tiny_model(
            teacher=EMAHeadTarget(9), normalization=CenteredSoftmax(9), loss=SoftCrossEntropyLoss(),
            terms={"cls": Term("first", CenteredSoftmax(9), LinearHead, SoftCrossEntropyLoss(), "image")},
        )  # fmt: skip


def test_the_first_term_can_be_of_the_image() -> None:
    model = tiny_model(
        teacher=teacher(), normalization=L2Norm(), loss=CosineLoss(), selection="image", masking=BlockMasking(0.4)
    )
    images = torch.rand(3, 3, 32, 32)
    network = model.teacher.frozen.network
    expected = network.forward_features((images - model.teacher.mean) / model.teacher.std)[:, 0]
    torch.testing.assert_close(model.teacher.forward_image(images, (4, 4)), expected)
    assert model.training_step(images, 0).isfinite()


@pytest.mark.parametrize("kinds", ["both", "image", "patches of two"])
def test_a_cache_gives_a_term_what_its_teacher_would(kinds: str, tmp_path: Path) -> None:
    """The stored targets are bfloat16, so that losses differ a little; the cached teacher runs in no step."""
    cls = Term("first", L2Norm(), LinearHead, CosineLoss(), "image")

    def model(cached: bool) -> MaskedImageModeling:
        torch.manual_seed(1)
        pl.seed_everything(1)
        features = teacher()
        given = unimim.CachedTarget(features, str(tmp_path / kinds), views=1) if cached else features
        terms = {"cls": copy.deepcopy(cls)}
        if kinds == "patches of two":
            terms = {"visible": Term("first", LayerNorm(), LinearHead, nn.L1Loss(), "visible")}
        selection = "image" if kinds == "image" else "masked"
        return tiny_model(teacher=given, normalization=LayerNorm(), lr=1e-3, selection=selection, terms=terms)

    runs: list[int] = []
    logged = []
    for cached in (False, True):
        made = model(cached)
        if cached:
            made.teacher.teacher.frozen.network.patch_embed.register_forward_hook(lambda *args: runs.append(len(args[2])))
        logged.append(trained(made, tmp_path / "run", 4, enable_checkpointing=False).callback_metrics)
    assert sum(runs) <= 12 + 2 * 8  # the images once, and those of two looks: no step
    plain, read = logged
    assert set(plain) == set(read) >= {"train/loss", "train/loss/first"}
    for name, value in plain.items():
        assert float(read[name]) == pytest.approx(float(value), rel=2e-2, abs=2e-3)
        if name != "train/loss":
            assert float(read[name]) != float(value)  # it was read


def test_two_caches_show_the_same_views(tmp_path: Path) -> None:
    terms = {
        "pixels": Term(unimim.CachedTarget(PixelTarget(8), str(tmp_path / "b"), views=2), LayerNorm(), LinearHead, nn.L1Loss())
    }
    model = tiny_model(teacher=unimim.CachedTarget(HOGTarget(8, 4), str(tmp_path / "a"), views=1), terms=terms)
    with pytest.raises(unimim.UserError, match="give all caches of a training the same"):
        trained(model, tmp_path, 2, enable_checkpointing=False)


# The command line


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["unimim", *words])
    main()


def test_a_recipe_with_terms_is_trained_loaded_and_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """MEDiC's recipe, narrow: a teacher of a further term gets random weights too, and the checkpoint makes the same model."""
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(narrow_recipe(ROOT / "conf" / "pretrain" / "medic_vit_base.yaml", tmp_path).read_text())
    config["model"]["terms"]["second"] = {
        "teacher": config["model"]["teacher"], "normalization": "unimim.LayerNorm", "head": "unimim.LinearHead",
        "loss": "torch.nn.MSELoss", "selection": "visible",
    }  # fmt: skip
    Path("terms.yaml").write_text(yaml.safe_dump(config))
    small = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    run(
        monkeypatch, "pretrain", "fit", "--config", "terms.yaml", "--config", str(ROOT / "conf" / "debug.yaml"),
        "--data.root", str(ROOT / "data"), "--trainer.enable_checkpointing", "true", "--trainer.default_root_dir", ".",
        "--model.terms.cls.weight", "0.25", *small,
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "model.teacher (FeatureTarget), model.terms.second.teacher (FeatureTarget) built with RANDOM weights" in said
    (path,) = Path().rglob("*.ckpt")
    loaded = MaskedImageModeling.load_from_checkpoint(path)
    assert list(loaded.terms) == ["first", "cls", "pixels", "second"]
    assert loaded.terms["cls"].weight == 0.25
    content = torch.load(path, weights_only=True)
    assert set(loaded.state_dict()) == set(content["state_dict"])
    assert all(torch.equal(value, content["state_dict"][name]) for name, value in loaded.state_dict().items())
    backbone = unimim.load_backbone(path)
    assert all(torch.equal(value, backbone.state_dict()[name]) for name, value in loaded.student.backbone.state_dict().items())


def test_terms_of_a_strangers_checkpoint_make_no_class(tmp_path: Path) -> None:
    """A class path within a term is refused like one anywhere else."""
    model = several()
    trainer = trained(model, tmp_path, 1)
    path = tmp_path / "stranger.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["terms"] = {
        "x": {
            "class_path": "unimim.Term",
            "init_args": {"loss": {"class_path": "subprocess.Popen", "init_args": {"args": "id"}}},
        }
    }
    torch.save(content, path)
    with pytest.raises(unimim.UserError, match=r"hyper_parameters.terms.x.loss is refused: it is the class 'subprocess.Popen'"):
        MaskedImageModeling.load_from_checkpoint(path)


def test_no_step_of_several_terms_waits_for_a_device() -> None:
    """A device without data, which can answer no question, runs the step."""
    model = several().to("meta")
    loss = model.training_step(torch.rand(3, 3, 32, 32, device="meta"), 0)
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if p.requires_grad and "pos_embed" not in name)


def test_the_first_head_has_none_before_it() -> None:
    with pytest.raises(
        unimim.UserError, match=r"model.head.projection is 'first', but no term is before this one: set it to null"
    ):
        tiny_model(head=partial(PatchAggregationHead, block=0))
    alone = tiny_model(head=partial(PatchAggregationHead, block=0, projection=None))
    assert alone.training_step(torch.rand(3, 3, 32, 32), 0).isfinite()
    with pytest.raises(unimim.UserError, match="PatchAggregationHead needs a student with CLS and plain blocks"):
        tiny_model(student=tiny_student("eva_rotary"), head=partial(PatchAggregationHead, block=0, projection=None))


class OwnStep(MaskedImageModeling):
    """A user's step with a second loss, as in the notebook."""

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        mask = self.masking(images, self.student.grid_size)
        tokens = self.student(images, mask)
        losses = {name: term(images, tokens, mask) for name, term in self.terms.items()}
        losses["second"] = mask.of(tokens.grid()).square().mean()
        return self.logged(losses)


def test_a_step_of_ones_own_waits_for_nothing_and_logs_each_loss(tmp_path: Path) -> None:
    """Indices are counted there too: a device without data, which can answer no question, runs it."""
    tiny_model(OwnStep).to("meta").training_step(torch.rand(3, 3, 32, 32, device="meta"), 0).backward()
    logged = trained(tiny_model(OwnStep, warmup_epochs=0), tmp_path, 2, enable_checkpointing=False).callback_metrics
    assert set(logged) == {"train/loss", "train/loss/first", "train/loss/second"}
    assert logged["train/loss"] == pytest.approx(float(logged["train/loss/first"] + logged["train/loss/second"]))
