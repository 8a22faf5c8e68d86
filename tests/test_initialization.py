"""The first weights of each recipe against its official code's, written out in closed form in docs/initial_weights.py."""

import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import PLAIN, ROOT, TINY
from torch import nn

from unimim import (
    DecoderHead,
    EMAHeadTarget,
    EMATarget,
    FeatureTarget,
    LinearHead,
    MaskedImageModeling,
    MaskTokenStudent,
    PixelTarget,
    PromptingDecoderHead,
    PrototypeHead,
    RandomMasking,
    VisibleStudent,
)
from unimim.cli.main import main
from unimim.tasks.optim import parameter_groups

sys.path.insert(0, str(ROOT / "docs"))
import initial_weights

RECIPES = sorted((ROOT / "conf" / "pretrain").glob("*.yaml"))
OURS = ("demo_features", "demo_hog", "demo_pixels", "demo_scenes", "photos")
NO_CODE = ("maskdistill_swin_base", "medic_vit_base", "vit_mean_color")
MORE_TERMS = {"beitv2_cls_vit_base": "beitv2_vit_base", "ibot_cls_vit_small": "ibot_vit_small"}
NARROW = {"embed_dim": 96, "num_heads": 3}
NARROW_SWIN = {"embed_dim": 24, "num_heads": (1, 1, 2, 2)}

every_official_recipe = pytest.mark.parametrize("name", initial_weights.OFFICIAL)


def test_no_recipe_is_left_out() -> None:
    assert {path.stem for path in RECIPES} == {*initial_weights.OFFICIAL, *OURS, *NO_CODE, *MORE_TERMS}


@pytest.mark.parametrize("name", MORE_TERMS)
def test_recipes_with_more_terms_begin_as_those_without(name: str) -> None:
    """Student and first head are made alike; what the further heads begin with is in test_terms."""
    ours, theirs = (
        yaml.safe_load((ROOT / "conf" / "pretrain" / f"{stem}.yaml").read_text())["model"] for stem in (name, MORE_TERMS[name])
    )
    assert ours.pop("terms")
    assert ours == theirs


def agree(parameters: list[initial_weights.Parameter]) -> None:
    """Mean, standard deviation and the largest value within 5 standard errors of so many draws."""
    for name, kind, ours, count, official in parameters:
        exact = kind == "positions" and official.largest == 1.0  # sine and cosine are no draws
        error = 1e-7 + (1e-4 if exact else 5 * official.std / math.sqrt(count))
        assert abs(ours.mean - official.mean) < error, (name, ours, official)
        assert abs(ours.std - official.std) < error / math.sqrt(2), (name, ours, official)
        bound = min(official.largest, 8 * official.std) if official.largest == 2.0 else official.largest
        assert ours.largest <= bound * (1 + 1e-6), (name, ours, official)
        if count > 5000 and official.std and official.largest < 1:
            assert ours.largest > 0.97 * official.largest, (name, ours, official)


@every_official_recipe
def test_every_parameter_begins_as_in_the_official_code(name: str) -> None:
    """At the recipe's own width, in two blocks: each kind of parameter of student and head, none left out."""
    agree(initial_weights.at_full_width(name))


@every_official_recipe
def test_every_block_begins_as_in_the_official_code(name: str) -> None:
    """All blocks of the recipe, at a small width: where blocks are rescaled, it goes by depth."""
    narrow = NARROW_SWIN if "swin" in name else NARROW
    parameters = initial_weights.measured(name, tuple((key, value) for key, value in narrow.items()))
    agree(parameters)
    last = max(int(found[1]) for p in parameters if (found := re.search(r"student.*blocks\.(\d+)\.", p.name)))
    deep = {"maskdistill_vit_large": 24, "maskdistill_vit_huge": 32, "eva_vit_large": 24, "simmim_swin_base": 18}
    assert last + 1 == deep.get(name, 12)


def test_the_page_shows_what_is_measured() -> None:
    """`make recipes` writes it. Ours may differ by what another version of torch draws."""
    page = (ROOT / "docs" / "recipes.md").read_text()
    fresh = initial_weights.page_with_weights(page)
    pair = re.compile(r"(\d\.\d{4}) / (\d\.\d{4})")
    assert pair.sub(r"\2", fresh) == pair.sub(r"\2", page)
    assert len(pair.findall(page)) > 150
    for (shown, official), (measured, _) in zip(pair.findall(page), pair.findall(fresh), strict=True):
        assert abs(float(shown) - float(measured)) <= 0.15 * float(official)


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("kind", ["vit", "beit_shared_bias", "eva", "swin", "visible_vit"])
def test_without_init_weights_are_timms_and_the_next_draw_too(kind: str) -> None:
    """An old configuration trains as before: `init` draws nothing then."""
    import timm

    name, model_args = TINY[kind]
    student_class = VisibleStudent if kind == "visible_vit" else MaskTokenStudent
    torch.manual_seed(3)
    plain = timm.create_model(name, num_classes=0, global_pool="", **model_args)
    mask_token = nn.init.trunc_normal_(torch.zeros(plain.patch_embed.proj.out_channels), std=0.02)
    following = torch.rand(1)
    torch.manual_seed(3)
    student = student_class(name, model_args)
    if kind != "visible_vit":
        assert torch.equal(student.mask_token, mask_token)
        assert torch.equal(torch.rand(1), following)
    assert all(torch.equal(weight, weights_of(student.backbone)[key]) for key, weight in weights_of(plain).items())


def test_init_is_determined_by_the_seed() -> None:
    def drawn() -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        student = MaskTokenStudent("beit_base_patch16_224", {**PLAIN, "init_values": 0.1}, init="beit")
        return weights_of(nn.ModuleList([student, LinearHead(student, PixelTarget(8))]))

    first, second = drawn(), drawn()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_gradient_is_lost() -> None:
    """Every weight that was drawn again is still a leaf that learns."""
    student = MaskTokenStudent("vit_tiny_patch16_224", PLAIN, init="maskfeat")
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in student.parameters())


def spread(weight: torch.Tensor) -> float:
    return float(weight.detach().std())


WIDE = {"img_size": 32, "patch_size": 8, "embed_dim": 192, "depth": 1, "num_heads": 3}


def test_a_head_follows_its_student_or_has_its_own() -> None:
    torch_default = 1 / math.sqrt(3 * 192)
    student, target = MaskTokenStudent("vit_tiny_patch16_224", WIDE, init="simmim_vit"), PixelTarget(8)
    assert spread(LinearHead(student, target).linear.weight) == pytest.approx(torch_default, rel=0.02)
    assert spread(LinearHead(student, target, init="beit").linear.weight) == pytest.approx(0.0108, rel=0.02)
    assert spread(LinearHead(student, target, init="timm").linear.weight) == pytest.approx(0.02, rel=0.02)
    assert spread(DecoderHead(student, target, 96, 1, 3, init="mae").embed.weight) == pytest.approx(1 / 12, rel=0.02)
    head = PrototypeHead(student, target, hidden=64, bottleneck=48, init="ibot")
    assert spread(head.prototypes) == pytest.approx(1 / 12, rel=0.02)
    plain = MaskTokenStudent("vit_tiny_patch16_224", WIDE)
    assert spread(PrototypeHead(plain, target, hidden=64, bottleneck=48).prototypes) == pytest.approx(1, rel=0.02)


def test_a_head_of_ones_own_needs_to_know_nothing_of_it() -> None:
    class Own(LinearHead):
        def __init__(self, student: Any, target: Any) -> None:
            super().__init__(student, target)
            nn.init.constant_(self.linear.weight, 3.0)

    student = MaskTokenStudent("vit_tiny_patch16_224", PLAIN, init="beit")
    assert (Own(student, PixelTarget(8)).linear.weight == 3).all()


def model_of(student: Any, **changes: Any) -> MaskedImageModeling:
    parts = {"teacher": PixelTarget(8), "normalization": nn.Identity(), "masking": RandomMasking(0.5), "head": LinearHead}
    return MaskedImageModeling(**{**parts, "student": student, "loss": nn.MSELoss(), **changes})


def test_a_moving_average_begins_with_the_same_weights() -> None:
    student = MaskTokenStudent("vit_tiny_patch16_224", PLAIN, init="beit")
    model = model_of(student, teacher=EMATarget(top_blocks=1))
    followed = weights_of(model.teacher.average)
    assert all(torch.equal(weight, followed[name]) for name, weight in weights_of(model.student).items())
    student = MaskTokenStudent("vit_tiny_patch16_224", PLAIN, init="ibot")
    head = partial(PrototypeHead, hidden=8, bottleneck=6)
    model = model_of(student, teacher=EMAHeadTarget(prototypes=11), head=head)
    followed = weights_of(model.teacher.average_head)
    assert all(torch.equal(weight, followed[name]) for name, weight in weights_of(model.head).items())
    assert (student.mask_token == 0).all()


def test_a_random_teacher_begins_as_dbots() -> None:
    """Of the student's distribution, positions too; the same in every process, whatever the run's seed."""

    def drawn(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        target = FeatureTarget("vit_tiny_patch16_224", weights="random", model_args=WIDE, init="mae")
        network: nn.Module = target.frozen.network
        return network

    network = drawn(1)
    student = VisibleStudent("vit_tiny_patch16_224", WIDE, positions="sincos", init="mae")
    assert torch.equal(network.pos_embed, student.backbone.pos_embed)
    for name, weight in weights_of(network).items():
        if weight.numel() > 1000 and "head" not in name:
            assert spread(weight) == pytest.approx(spread(student.backbone.get_parameter(name)), rel=0.02), name
    assert all(torch.equal(weight, weights_of(drawn(2))[name]) for name, weight in weights_of(network).items())


def test_pretrained_weights_of_a_teacher_are_not_drawn_again(tmp_path: Path) -> None:
    """dBOT's second stage leaves `init` in its recipe."""
    written = FeatureTarget("vit_tiny_patch16_224", weights="random", model_args=PLAIN).frozen.network
    torch.save(written.state_dict(), tmp_path / "stage.pt")
    path = str(tmp_path / "stage.pt")
    read = FeatureTarget("vit_tiny_patch16_224", weights=path, model_args=PLAIN, init="mae").frozen.network
    assert all(torch.equal(weight, weights_of(read)[name]) for name, weight in weights_of(written).items())


def test_dbots_recipe_has_it() -> None:
    config = yaml.safe_load((ROOT / "conf" / "pretrain" / "dbot_vit_base.yaml").read_text())["model"]
    assert config["teacher"]["init_args"]["init"] == config["student"]["init_args"]["init"] == "mae"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MaskTokenStudent("vit_tiny_patch16_224", PLAIN, init="xavier"),
            "model.student.init is 'xavier', known are 'timm', 'beit'",
        ),
        (
            lambda: VisibleStudent("vit_tiny_patch16_224", PLAIN, decayed=["cls"]),
            r"model.student.decayed has \['cls'\], known are cls_token, mask_token",
        ),
        (
            lambda: MaskTokenStudent(*TINY["swin"], init="beit"),
            "which SwinTransformer does not have: use init 'timm', or 'simmim_s",
        ),
        (
            lambda: LinearHead(MaskTokenStudent("vit_tiny_patch16_224", PLAIN), PixelTarget(8), init="mea"),
            "model.head.init is 'mea', known are 'student', 'timm'",
        ),
        (
            lambda: FeatureTarget("vit_tiny_patch16_224", weights="random", model_args=PLAIN, init="mea"),
            "model.teacher.init is 'mea', known are 'timm'",
        ),
        (
            lambda: FeatureTarget("resnet18", weights="random", init="mae"),
            "init 'mae' is for networks with a patch embedding, not ResNet: use init 'timm'",
        ),
        (
            lambda: FeatureTarget(nn.Conv2d(3, 6, 8, 8), dim=6, mean=(0, 0, 0), std=(1, 1, 1), init="mae"),
            "init and weights='random' are for timm's networks; Conv2d is your own",
        ),
    ],
    ids=["init", "decayed", "swin", "head", "teacher", "cnn", "own network"],
)
def test_a_mistake_is_one_line(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.student.init", "bet"], "model.student.init: 'bet' is none of timm, beit, "),
        (["--model.head.init", "mea"], "model.head.init: 'mea' is none of student, timm, beit, "),
        (["--model.student.decayed", "[cls]"], "model.student.decayed: 'cls' is none of cls_token, "),
        (["--model.student.decayed", "cls_token"], "model.student.decayed: expected a list, got cls_token: write [cls_token]"),
        (["--model.teacher.weights", "random", "--model.teacher.init", "mea"], "model.teacher.init: 'mea' is none of timm, "),
    ],
    ids=["init", "head", "decayed", "no list", "teacher"],
)
def test_the_command_line_says_what_is_known(words: list[str], said: str) -> None:
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "fit", "--config", str(ROOT / "conf" / "pretrain" / "dbot_vit_base.yaml"), *words, "--print_config"])
    assert str(end.value.code).startswith(f"unimim: error: {said}")
    assert "\n" not in str(end.value.code)


# Weight decay of tokens and positions

ALL_BUT_VECTORS = {"cls_token", "mask_token", "pos_embed"}
DECAYED = {
    "beit_vit_base": {"mask_token"},  # beit/modeling_pretrain.py: no_weight_decay is {pos_embed, cls_token}
    "beitv2_vit_base": {"mask_token"},  # beit2/modeling_pretrain.py, likewise
    "beitv2_cls_vit_base": {"mask_token"},  # likewise
    "data2vec_vit_base": {"mask_token"},  # beit/modeling_cyclical.py, likewise
    "eva_vit_large": {"mask_token"},  # EVA-01/eva/modeling_pretrain.py, likewise
    "simmim_vit_base": {"mask_token"},  # models/vision_transformer.py, likewise
    "feature_distillation_vit_base": {"mask_token"},  # models/vision_transformer.py, likewise; nothing is masked
    "maskdistill_vit_base": {"mask_token"},  # BEiT v2's
    "maskdistill_vit_base_clip_large": {"mask_token"},
    "maskdistill_vit_large": {"mask_token"},
    "maskdistill_vit_huge": {"mask_token"},
    "maskdistill_swin_base": {"mask_token"},
    "mvp_vit_base": {"mask_token"},  # BEiT's
    "simmim_swin_base": {"relative_position_bias_table"},  # models/simmim.py spares the mask token; its keywords fit no name
    "mae_vit_base": {"cls_token", "mask_token"},  # main_pretrain.py: timm's add_weight_decay without a list
    "milan_vit_base": {"cls_token", "mask_token"},  # main_pretrain.py, likewise
    "dbot_vit_base": {"cls_token", "mask_token"},  # main_pretrain.py, likewise
    "maskalign_vit_base": {"cls_token"},  # main_pretrain.py spares distill_weights only; there is no mask token
    "maskfeat_hog_vit_base": ALL_BUT_VECTORS,  # ZERO_DECAY_POS_CLS False in in1k_VIT_B_MaskFeat_PT.yaml
    "maskfeat_dino_vit_base": ALL_BUT_VECTORS,
    "ibot_cls_vit_small": ALL_BUT_VECTORS,
    "ibot_vit_small": ALL_BUT_VECTORS,  # utils.py: get_params_groups spares biases and 1-D parameters
}
"""What decays of tokens, positions and Swin's bias tables in the official code. (BEiT's bias tables always do.)"""
TOKENS = re.compile(r"(?:^|\.)(cls_token|mask_token|pos_embed|relative_position_bias_table)$")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_tokens_decay_as_in_the_official_code(path: Path) -> None:
    """By name, in the groups that the optimizer gets: student and head of the recipe, in one narrow block."""
    config = yaml.safe_load(path.read_text())["model"]
    student_class, arguments = initial_weights.part_of(config["student"])
    head_class, of_head = initial_weights.part_of(config["head"])
    swin = arguments["backbone"].startswith("swin")
    narrow = (
        {"embed_dim": 24, "num_heads": [1] * 4, "depths": [1] * 4} if swin else {"embed_dim": 24, "num_heads": 2, "depth": 1}
    )
    student = student_class(**{**arguments, "model_args": {**arguments["model_args"], **narrow}})
    if "depth" in of_head:
        of_head = {**of_head, "width": 24, "depth": 1, "num_heads": 2}
    both = nn.ModuleDict({"student": student, "head": head_class(student, PixelTarget(8), **of_head)})
    groups = {group["weight_decay"]: {id(p) for p in group["params"]} for group in parameter_groups([both], 0.05)}
    assert set(groups) == {0.0, 0.05}
    learning = {name: id(parameter) for name, parameter in both.named_parameters() if parameter.requires_grad}
    assert groups[0.0] | groups[0.05] == set(learning.values())
    assert not groups[0.0] & groups[0.05]
    of_beit = {"relative_position_bias_table"} if arguments["backbone"].startswith("beit") else set()
    expected = DECAYED.get(path.stem, set()) | of_beit
    found = {match[1] for name, key in learning.items() if (match := TOKENS.search(name)) and key in groups[0.05]}
    spared = {match[1] for name, key in learning.items() if (match := TOKENS.search(name)) and key in groups[0.0]}
    assert found == expected
    assert not found & spared
    for name, key in learning.items():
        if not TOKENS.search(name):
            assert (key in groups[0.05]) == (both.get_parameter(name).ndim > 1), name


def test_a_decaying_token_shrinks_and_another_does_not() -> None:
    """One step of AdamW without a gradient: by 1 - lr * weight_decay."""
    student = VisibleStudent("vit_tiny_patch16_224", PLAIN, init="mae", decayed=["mask_token"])
    head = PromptingDecoderHead(student, PixelTarget(8), 16, 1, 2)
    before = {"mask": head.mask_token.detach().clone(), "cls": student.backbone.cls_token.detach().clone()}
    optimizer = torch.optim.AdamW(parameter_groups([student, head], 0.5), lr=0.1)
    for parameter in (*student.parameters(), *head.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(head.mask_token.detach(), before["mask"] * 0.95)
    assert torch.equal(student.backbone.cls_token, before["cls"])
