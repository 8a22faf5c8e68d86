"""DESIGN's contracts, for every student x head x target x masking."""

import copy
import itertools
import re
from collections.abc import Callable
from functools import partial
from math import inf, nan
from pathlib import Path

import pytest
import pytorch_lightning as pl
import timm
import torch
from conftest import PLAIN, TINY, VISIBLE, all_tokens, tiny_model, tiny_student
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unimim import (
    AttentiveMasking,
    AttentiveProbe,
    BlockMasking,
    CenteredSoftmax,
    CodebookTarget,
    CosineLoss,
    DecoderHead,
    DVAETarget,
    EMAHeadTarget,
    EMATarget,
    FeatureTarget,
    FineTuning,
    Frozen,
    HOGTarget,
    KNNCallback,
    LinearHead,
    LinearProbe,
    Mask,
    MaskedImageModeling,
    MaskTokenStudent,
    MeanColorTarget,
    NoMasking,
    PixelTarget,
    PromptingDecoderHead,
    PrototypeHead,
    RandomMasking,
    SoftCrossEntropyLoss,
    TargetGenerator,
    Tokens,
    UperNetSegmentation,
    VisibleStudent,
    VQKDTarget,
)
from unimim.shapes import Grid
from unimim.tasks.knn import knn

GRID = (4, 4)
MASKINGS = {
    "block": lambda: BlockMasking(0.4),
    "random": lambda: RandomMasking(0.75),
    "units": lambda: RandomMasking(0.5, unit=2),
    "attentive": lambda: AttentiveMasking(0.75),
    "none": NoMasking,
}
NARROW = {"width": 8, "depth": 1, "num_heads": 2}
HEADS = {
    "linear": LinearHead,
    "prototypes": partial(PrototypeHead, hidden=8, bottleneck=6),
    "decoder": partial(DecoderHead, **NARROW),
    "prompting decoder": partial(PromptingDecoderHead, **NARROW),
}


class Teacher(nn.Module):
    """A small network with everything that must stay off: batch norm, dropout and parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.BatchNorm2d(6), nn.Dropout(0.5))

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)


def own_features() -> FeatureTarget:
    return FeatureTarget(Teacher(), dim=6, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


def codebook() -> CodebookTarget:
    target = CodebookTarget(own_features(), codes=5)
    target.prepare([images(2)], GRID)
    return target


TARGETS = {
    "pixels": lambda: PixelTarget(patch_size=8),
    "hog": lambda: HOGTarget(patch_size=8, cell_size=4),
    "own features": own_features,
    "timm vit": lambda: FeatureTarget(
        "vit_tiny_patch16_224", weights="random", model_args={"depth": 1, "embed_dim": 12, "num_heads": 2, "img_size": 64}
    ),
    "timm cnn": lambda: FeatureTarget("resnet18", weights="random", layer=-1),
    "mean color": lambda: MeanColorTarget(bits=1),
    "codebook": codebook,
    "vq-kd": lambda: VQKDTarget("random", codes=7, code_dim=4, model_args=PLAIN),
    "dvae": lambda: DVAETarget("random", width=4, codes=9),
    "ema": lambda: EMATarget(top_blocks=1),
    "ema of head": lambda: EMAHeadTarget(prototypes=11),
}

DISCRETE = ("mean color", "codebook", "vq-kd", "dvae")


def loss_for(target: str) -> nn.Module:
    return nn.CrossEntropyLoss() if target in DISCRETE else nn.MSELoss()


every_student = pytest.mark.parametrize("kind", TINY)
every_target = pytest.mark.parametrize("target", TARGETS)
every_masking = pytest.mark.parametrize("masking", ["block", "random", "units"])


def sensible(kind: str, head: str, target: str, masking: str) -> bool:
    """Whether these make sense together: attention comes from a ViT; prompts need hidden patches and a student that drops."""
    if masking == "attentive" and target != "timm vit":
        return False
    return head != "prompting decoder" or (kind in VISIBLE and masking != "none" and target != "ema of head")


def selections(kind: str, head: str, masking: str) -> list[str]:
    """Which patches can count: a student that drops patches needs a decoder to predict hidden ones."""
    blind = kind in VISIBLE and head in ("linear", "prototypes")
    hiding = [] if masking == "none" else ["masked"]
    return ["visible", *(["all"] if masking == "none" or not blind else []), *([] if blind else hiding)]


COMBINATIONS = [parts for parts in itertools.product(TINY, HEADS, TARGETS, MASKINGS) if sensible(*parts)]


def images(b: int = 3) -> Tensor:
    return torch.rand(b, 3, 32, 32)


@pytest.mark.parametrize(("kind", "head", "target", "masking"), COMBINATIONS)
def test_everything_meets_on_the_grid(kind: str, head: str, target: str, masking: str) -> None:
    """Contracts 1 and 2: the head returns the selected patches only, in the order in which the target is indexed."""
    teacher = TARGETS[target]()
    discrete = target in DISCRETE
    possible = selections(kind, head, masking)
    model = tiny_model(
        student=tiny_student(kind),
        head=HEADS[head],
        teacher=teacher,
        masking=MASKINGS[masking](),
        selection=possible[0],
        loss=loss_for(target),
    ).eval()
    batch = images()
    mask = model.masking(batch, GRID)
    assert mask.tensor.shape == (3, *GRID)
    assert mask.tensor.dtype == torch.bool
    assert (mask.tensor.sum((1, 2)) == mask.count).all()
    targets = model.teacher(batch, GRID)
    assert targets.shape == ((3, *GRID) if discrete else (3, *GRID, teacher.dim))
    assert targets.dtype == (torch.long if discrete else torch.float32)
    tokens = model.student(batch, mask)
    visible = int((~mask.tensor[0]).sum())
    assert tokens.prefix.shape == (3, model.student.num_prefix_tokens, model.student.embed_dim)
    assert tokens.patches.shape == (3, visible if kind in VISIBLE else 16, model.student.embed_dim)
    assert torch.equal(tokens.where.tensor, ~mask.tensor if kind in VISIBLE else torch.ones(3, *GRID, dtype=torch.bool))
    for selection in possible:
        model.selection = selection
        selected = model.select(mask)
        hidden = mask.tensor
        expected = {"masked": hidden, "visible": ~hidden, "all": torch.ones_like(hidden)}[selection]
        assert torch.equal(selected.tensor, expected)
        prediction = model.head(tokens, mask, selected)
        assert prediction.shape == (expected.sum(), teacher.dim)
        if "all" in possible:
            everywhere = model.head(tokens, mask, mask.full()).unflatten(0, hidden.shape)
            torch.testing.assert_close(prediction, everywhere[expected])
        model.training_step(batch, 0).backward()
        assert all(p.grad is None for p in model.teacher.parameters())


@pytest.mark.parametrize("kind", VISIBLE)
@pytest.mark.parametrize("head", ["linear", "prototypes"])
@pytest.mark.parametrize("selection", ["masked", "all"])
def test_hidden_patches_need_a_decoder(kind: str, head: str, selection: str) -> None:
    """Also where as many patches are hidden as visible, so that the counts would fit."""
    with pytest.raises(ValueError, match="set model.head to DecoderHead, or model.selection to visible"):
        tiny_model(student=tiny_student(kind), head=HEADS[head], masking=RandomMasking(0.5), selection=selection)


@pytest.mark.parametrize("kind", VISIBLE)
@pytest.mark.parametrize("head", ["linear", "prototypes"])
def test_visible_patches_are_found_in_the_order_of_the_grid(kind: str, head: str) -> None:
    """What a head says of a visible patch of a dropping student is what it says of that token by itself."""
    student = tiny_student(kind).eval()
    model = tiny_model(student=student, head=HEADS[head], selection="visible").eval()
    batch = images()
    mask = RandomMasking(0.75)(batch, GRID)
    tokens = student(batch, mask)
    nothing = Mask(torch.zeros(3, 1, 4, dtype=torch.bool))
    expected = model.head(Tokens(tokens.prefix, tokens.patches, ~nothing), nothing, ~nothing)
    torch.testing.assert_close(model.head(student(batch, mask), mask, ~mask), expected)


@every_student
@every_masking
def test_blind_to_masked_pixels_bit_for_bit(kind: str, masking: str) -> None:
    """Contract 4, and its reverse: a visible pixel does change the output."""
    student = tiny_student(kind).eval()
    batch = images()
    mask = MASKINGS[masking]()(batch, GRID)
    pixels = mask.tensor.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    others = torch.where(pixels, torch.rand_like(batch) * 1e6, batch)
    assert torch.equal(all_tokens(student(batch, mask)), all_tokens(student(others, mask)))
    nan = torch.where(pixels, torch.nan, batch)
    assert torch.equal(all_tokens(student(batch, mask)), all_tokens(student(nan, mask)))
    visible = torch.where(pixels, batch, torch.rand_like(batch))
    assert not torch.allclose(all_tokens(student(batch, mask)), all_tokens(student(visible, mask)))


@every_student
def test_an_empty_mask_is_timm(kind: str) -> None:
    """Contract 4: with nothing masked, the student computes timm's own `forward_features`, final norm included."""
    student = tiny_student(kind).eval()
    name, model_args = TINY[kind]
    plain = timm.create_model(name, num_classes=0, global_pool="", **model_args).eval()
    plain.load_state_dict(student.backbone.state_dict(), strict=True)
    batch = images()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = plain.forward_features((batch - mean) / std)
    assert torch.equal(student.backbone.forward_features((batch - mean) / std), expected)
    tokens = student(batch, Mask(torch.zeros(3, *GRID, dtype=torch.bool)))
    assert torch.equal(all_tokens(tokens), expected.flatten(1, 2) if expected.ndim == 4 else expected)
    assert tokens.prefix.shape[1] == student.num_prefix_tokens
    assert torch.equal(tokens.grid().flatten(1, 2), tokens.patches)
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
    flat = mask.tensor.flatten(1)[..., None]
    torch.testing.assert_close(received[0], torch.where(flat, token, received[1]))


@every_target
def test_no_gradient_reaches_the_teacher(target: str) -> None:
    """Contract 6."""
    model = tiny_model(teacher=TARGETS[target](), loss=loss_for(target))
    model.training_step(images(), 0).backward()
    assert all(p.grad is None and not p.requires_grad for n in model.teacher.networks() for p in n.parameters())
    assert all(p.grad is not None for p in model.student.parameters() if p.requires_grad)
    inside = {id(p) for p in model.parameters()}  # what DDP puts into buckets, EMA copies and state_dict names
    assert not inside & {id(p) for network in model.teacher.networks() for p in network.parameters()}
    optimized = {id(p) for group in model_groups(model) for p in group["params"]}
    assert optimized == {id(p) for m in (model.student, model.head) for p in m.parameters()}


def model_groups(model: MaskedImageModeling) -> list[dict]:
    from unimim.tasks.optim import parameter_groups

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


@pytest.mark.parametrize("student", [MaskTokenStudent, VisibleStudent])
@pytest.mark.parametrize("name", ["vit_tiny_r_s16_p8_224", "resnet18"])
def test_backbones_that_would_leak_are_refused(name: str, student: type) -> None:
    with pytest.raises(ValueError, match="use a plain ViT or BEiT|is a ViT, BEiT, EVA or Swin"):
        student(name, {"img_size": 64} if name.startswith("vit") else {})


@pytest.mark.parametrize("kind", ["beit_bias_per_block", "beit_shared_bias", "swin"])
def test_backbones_that_cannot_drop_patches_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="needs the whole grid and cannot drop patches: use MaskTokenStudent") as error:
        VisibleStudent(*TINY[kind])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", VISIBLE)
def test_a_dropping_student_is_the_backbone_on_the_visible_tokens(kind: str) -> None:
    """The same numbers as timm's own blocks give for the kept tokens, which had their positions before."""
    student = tiny_student(kind).eval()
    batch = images()
    mask = RandomMasking(0.5)(batch, GRID)
    backbone, prefix = student.backbone, student.num_prefix_tokens
    tokens = backbone._pos_embed(backbone.patch_embed(student.normalize(batch)))
    (tokens, rotary) = tokens if isinstance(tokens, tuple) else (tokens, None)
    for i in range(3):
        kept = [*range(prefix), *(prefix + n for n in range(16) if not mask.tensor[i].flatten()[n])]
        x = tokens[i : i + 1, kept]
        if hasattr(backbone, "norm_pre"):
            x = backbone.norm_pre(x)
        for block in backbone.blocks:
            x = block(x) if rotary is None else block(x, rope=rotary[[n - prefix for n in kept[prefix:]]])
        torch.testing.assert_close(all_tokens(student(batch, mask))[i], backbone.norm(x)[0], rtol=1e-5, atol=1e-5)


def test_frozen_is_shared_by_deep_copies() -> None:
    frozen = Frozen(Teacher())
    assert copy.deepcopy(frozen) is frozen
    assert copy.deepcopy(own_features()).state_dict().keys() == set()


class Dimless(TargetGenerator):
    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        return torch.zeros(len(images), *grid_size, 3)


class Short(TargetGenerator):
    dim = 4

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        return torch.zeros(len(images), *grid_size, dtype=torch.int32)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tiny_model(head=partial(DecoderHead, num_heads=0)), "model.head: num_heads is 0, but it is at least 1"),
        (lambda: tiny_model(head=partial(DecoderHead, width=-16)), "model.head: width is -16"),
        (lambda: tiny_model(head=partial(DecoderHead, depth=0)), "model.head: depth is 0"),
        (lambda: tiny_model(head=partial(PrototypeHead, bottleneck=-1)), "model.head: bottleneck is -1"),
        (lambda: HOGTarget(cell_size=0), "HOGTarget: cell_size is 0"),
        (lambda: PixelTarget(0), "PixelTarget: patch_size is 0"),
        (lambda: DVAETarget("random", width=2), "DVAETarget: width is 2, but it is a multiple of 4"),
        (lambda: DVAETarget("random", codes=0), "DVAETarget: codes is 0"),
        (lambda: VQKDTarget("random", codes=0), "VQKDTarget: codes is 0"),
        (lambda: EMAHeadTarget(prototypes=0), "model.teacher: prototypes is 0"),
        (lambda: CodebookTarget(PixelTarget(8), codes=0), "model.teacher: codes is 0"),
        (lambda: CenteredSoftmax(0), "channels at least 1, temperature above 0, momentum within 0 to 1; got 0"),
        (lambda: CenteredSoftmax(4, temperature=0), "got 4, 0, 0.9"),
        (lambda: CenteredSoftmax(4, momentum=5), "got 4, 0.07, 5"),
        (lambda: tiny_model(teacher=MeanColorTarget(), loss=nn.NLLLoss()), "and NLLLoss is not for its logits: set model.loss"),
        (
            lambda: tiny_model(teacher=EMAHeadTarget(8), normalization=CenteredSoftmax(8), loss=nn.SmoothL1Loss()),
            "CenteredSoftmax gives probabilities, and SmoothL1Loss would compare them with logits: set model.loss to SoftCross",
        ),
        (
            lambda: tiny_model(teacher=Dimless()),
            "model.teacher: Dimless has no dim: set it to the number of channels",
        ),
        (lambda: tiny_model(teacher=Short()), "Short gives torch.int32: discrete targets are long, add .long()"),
        (lambda: SoftCrossEntropyLoss(0), "temperature is 0, but it is above 0"),
        (lambda: CosineLoss(-1), "CosineLoss: weight is -1, but it is above 0"),
        (lambda: tiny_model(lr=nan), "lr above 0, weight_decay not below 0, both finite; got nan"),
        (lambda: tiny_model(weight_decay=nan), "both finite; got 0.0015, nan"),
        (lambda: tiny_model(warmup_epochs=nan), "warmup_epochs is a number of epochs, not below 0: got nan"),
        (lambda: tiny_model(lr=1e-6), "min_lr and warmup_lr within 0 to lr; got 1e-05, 1e-06 with lr 1e-06"),
        (lambda: tiny_model(betas=(0.9,)), "model.betas are at least 0 and below 1, got [0.9]"),
        (lambda: FineTuning("vit_tiny_patch16_224", lr=inf), "both finite; got inf"),
        (lambda: UperNetSegmentation("vit_tiny_patch16_224", weight_decay=nan), "both finite; got 5e-05, nan"),
        (lambda: LinearProbe(tiny_student().backbone, 3, weight_decay=-1), "weight_decay not below 0"),
        (lambda: LinearProbe(tiny_student().backbone, 3, momentum=2), "model.momentum is at least 0 and below 1, got 2"),
        (lambda: LinearProbe(tiny_student().backbone, 3, warmup_epochs=-1), "model.warmup_epochs is a number of epochs"),
        (lambda: AttentiveProbe(tiny_student().backbone, 3, num_heads=0), "model: num_heads is 0, but it is at least 1"),
        (lambda: AttentiveProbe(tiny_student().backbone, 3, num_heads=2, betas=(2, 2)), "model.betas are at least 0"),
        (lambda: knn(torch.eye(3), torch.eye(3), torch.arange(3), 1, 0.0), "k-NN's temperature is 0.0, but it is above 0"),
        (lambda: KNNCallback(every_n_epochs=0), "KNNCallback: every_n_epochs is 0, but it is at least 1"),
        (
            lambda: MaskTokenStudent("vit_tiny_patch16_224", std=(0.2, 0, 0.2)),
            "model.student: mean (0.485, 0.456, 0.406) and std",
        ),
        (lambda: MaskTokenStudent("vit_tiny_patch16_224", mean=(0.5,)), "three numbers each, std above 0"),
        (
            lambda: FeatureTarget("vit_tiny_patch16_224", weights="random", mean=(123.7, 116.3, 103.5)),
            "model.teacher: mean (123.7, 116.3, 103.5) and std (0.5, 0.5, 0.5) are not those of red, green and blue in [0, 1]",
        ),
        (lambda: FeatureTarget("vit_tiny_patch16_224", weights="random", resolution=0), "resolution is 0, but it is at least"),
    ],
)
def test_numbers_that_cannot_be(make: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        make()
    assert "\n" not in str(error.value)
