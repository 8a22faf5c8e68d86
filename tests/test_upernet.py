"""UperNet's parts: heads and fpn by reference to transformers, pyramids block by block, gradients, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from einops import rearrange, reduce
from test_checkpoint import check_partition, saved
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BeitConfig, BeitForSemanticSegmentation, ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

from unimim import FCNHead, FeaturePyramid, UperNetHead, load_backbone

NARROW = {"img_size": 64, "patch_size": 16, "embed_dim": 16, "depth": 5, "num_heads": 2}
SHARED = {"use_abs_pos_emb": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", NARROW),
    "vit_map_pooling": ("vit_tiny_patch16_224", {**NARROW, "global_pool": "map"}),
    "vit_registers": ("vit_tiny_patch16_224", {**NARROW, "reg_tokens": 3}),
    "beit_bias_per_block": ("beit_base_patch16_224", {**NARROW, "init_values": 0.1}),
    "beit_shared_bias": ("beitv2_base_patch16_224", {**NARROW, **SHARED}),
    "eva": ("eva_giant_patch14_224", NARROW),
    "eva_rotary": ("eva02_tiny_patch14_224", NARROW),
}
HIERARCHICAL: dict[str, tuple[str, dict[str, Any]]] = {
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4},
    ),
    "convnext": ("convnext_atto", {"depths": (1, 2, 1, 1), "dims": (8, 16, 24, 32)}),
    "resnet": ("resnet18", {"channels": (8, 8, 16, 24)}),
}
ALL = {**PLAIN, **HIERARCHICAL}
FIXED = [kind for kind in ALL if kind not in ("convnext", "resnet")]


def noisy(module: nn.Module) -> Any:
    """Every parameter and every statistic of a batch norm filled with noise, for zeros and ones would hide mistakes."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    for name, buffer in module.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.5)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return module


def pyramid(kind: str, checkpointing: bool = False, **changes: Any) -> FeaturePyramid:
    torch.manual_seed(0)
    name, model_args = ALL[kind]
    backbone = timm.create_model(name, **{**model_args, **changes})
    made: FeaturePyramid = noisy(FeaturePyramid(backbone, checkpointing=checkpointing))
    return made


# The pyramid


@pytest.mark.parametrize("size", [(64, 64), (64, 96)], ids=["square", "wide"])
@pytest.mark.parametrize("kind", ALL)
def test_levels_are_at_strides_4_8_16_32(kind: str, size: tuple[int, int]) -> None:
    made = pyramid(kind, **({"img_size": size} if kind in FIXED else {}))
    maps = made(torch.randn(2, 3, *size))
    assert [tuple(m.shape) for m in maps] == [
        (2, d, size[0] // stride, size[1] // stride) for d, stride in zip(made.channels, (4, 8, 16, 32), strict=True)
    ]


@pytest.mark.parametrize(
    ("patch", "size", "sides"),
    [(4, 64, [16, 8, 4, 2]), (8, 64, [16, 8, 4, 2]), (14, 56, [16, 8, 4, 2]), (32, 64, [16, 8, 4, 2])],
)
def test_strides_do_not_depend_on_the_patch(patch: int, size: int, sides: list[int]) -> None:
    made = pyramid("vit", patch_size=patch, img_size=size)
    assert [m.shape[-1] for m in made(torch.randn(2, 3, size, size))] == sides


def test_levels_of_8_px_patches_are_doubled_kept_halved_and_quartered() -> None:
    made = pyramid("vit", patch_size=8).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        first, second, third, last = (tokens_by_hand(made.backbone, images)[block] for block in (0, 1, 3, 4))
        levels = made(images)
        torch.testing.assert_close(levels[0], enlarged_by_hand(first, made.levels[0][0]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(levels[1], second)
        torch.testing.assert_close(levels[2], reduce(third, "b d (h p) (w q) -> b d h w", "max", p=2, q=2))
        torch.testing.assert_close(levels[3], reduce(last, "b d (h p) (w q) -> b d h w", "max", p=4, q=4))


def test_images_below_the_coarsest_stride_are_refused() -> None:
    with pytest.raises(ValueError, match="the images are 16x48 pixels, but the pyramid's coarsest stride is 32 pixels"):
        pyramid("vit", patch_size=4, dynamic_img_size=True)(torch.randn(2, 3, 16, 48))
    with pytest.raises(ValueError, match="the images are 16x16 pixels, but the pyramid's coarsest stride is 32 pixels"):
        pyramid("convnext")(torch.randn(2, 3, 16, 16))


def test_a_backbone_with_dynamic_size_gives_levels_at_any_size() -> None:
    maps = pyramid("vit", dynamic_img_size=True)(torch.randn(1, 3, 80, 48))
    assert [m.shape[-2:] for m in maps] == [(20, 12), (10, 6), (5, 3), (2, 1)]


def tokens_by_hand(backbone: Any, images: Tensor) -> list[Tensor]:
    """The patch tokens behind each block, as [b d h w]."""
    x = rearrange(backbone.patch_embed.proj(images), "b d h w -> b (h w) d")
    prefix = [backbone.cls_token, *([backbone.reg_token] if getattr(backbone, "reg_token", None) is not None else [])]
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
    if backbone.pos_embed is not None:
        x = x + backbone.pos_embed
    further: dict[str, Any] = {}
    if getattr(backbone, "rel_pos_bias", None) is not None:
        further["shared_rel_pos_bias"] = backbone.rel_pos_bias()
    if getattr(backbone, "rope", None) is not None:
        further["rope"] = backbone.rope.get_embed()
    levels = []
    for block in backbone.blocks:
        x = block(x, **further)
        patches = x[:, sum(token.shape[1] for token in prefix) :]
        levels.append(rearrange(patches, "b (h w) d -> b d h w", h=images.shape[-2] // backbone.patch_embed.patch_size[0]))
    return levels


def enlarged_by_hand(x: Tensor, deconvolution: Any) -> Tensor:
    """A transposed convolution of 2x2 with stride 2: every pixel becomes four, each by its own matrix."""
    four = torch.einsum("bihw,iopq->bohpwq", x, deconvolution.weight)
    return rearrange(four, "b o h p w q -> b o (h p) (w q)") + deconvolution.bias[:, None, None]


@pytest.mark.parametrize("kind", PLAIN)
def test_levels_of_a_plain_backbone_are_its_blocks_rescaled(kind: str) -> None:
    made = pyramid(kind, img_size=(64, 96)).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        first, second, third, last = (tokens_by_hand(made.backbone, images)[block] for block in (0, 1, 3, 4))
        up, norm, _, up_again = made.levels[0]
        x = enlarged_by_hand(first, up)
        x = (x - norm.running_mean.view(-1, 1, 1)) / (norm.running_var.view(-1, 1, 1) + norm.eps).sqrt()
        x = x * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
        expected = [
            enlarged_by_hand(x, up_again),
            enlarged_by_hand(second, made.levels[1][0]),
            third,
            reduce(last, "b d (h p) (w q) -> b d h w", "max", p=2, q=2),
        ]
        for level, by_hand in zip(made(images), expected, strict=True):
            torch.testing.assert_close(level, by_hand, atol=1e-5, rtol=1e-5)


def test_levels_of_swin_and_convnext_are_their_stages_each_normalized() -> None:
    for kind in ("swin", "convnext"):
        made = pyramid(kind).eval()
        images = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            swin = kind == "swin"
            x = (made.backbone.patch_embed if swin else made.backbone.stem)(images)
            for stage, level, norm in zip(
                made.backbone.layers if swin else made.backbone.stages, made(images), made.levels, strict=True
            ):
                x = stage(x)
                channels_last = x if swin else rearrange(x, "b d h w -> b h w d")
                spread = channels_last.var(-1, unbiased=False, keepdim=True) + (1e-5 if swin else 1e-6)
                normalized = (channels_last - channels_last.mean(-1, keepdim=True)) / spread.sqrt() * norm.weight + norm.bias
                torch.testing.assert_close(level, rearrange(normalized, "b h w d -> b d h w"), atol=1e-5, rtol=1e-5)


def test_levels_of_a_resnet_are_its_stages() -> None:
    made = pyramid("resnet").eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        x = made.backbone.maxpool(made.backbone.act1(made.backbone.bn1(made.backbone.conv1(images))))
        for name, level in zip(("layer1", "layer2", "layer3", "layer4"), made(images), strict=True):
            x = getattr(made.backbone, name)(x)
            torch.testing.assert_close(level, x)


def test_rescaling_by_reference() -> None:
    """The neck of transformers' BEiT for segmentation is that of BEiT v2's code."""
    config = BeitConfig(hidden_size=16, num_hidden_layers=12, num_attention_heads=2, add_fpn=True, out_indices=[3, 5, 7, 11])
    theirs = noisy(BeitForSemanticSegmentation(config).fpn)
    ours = pyramid("vit").levels
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))  # the same order in both
    maps = [torch.randn(2, 16, 4, 6) for _ in range(4)]
    for training in (True, False):
        ours.train(training)
        expected = theirs.train(training)(maps)
        for level, features, by_theirs in zip(ours, maps, expected, strict=True):
            torch.testing.assert_close(level(features), by_theirs)


@pytest.mark.parametrize(
    ("depth", "blocks"), [(4, [0, 1, 2, 3]), (12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (32, [9, 15, 21, 31])]
)
def test_blocks_are_the_published_ones_and_the_same_fractions_elsewhere(depth: int, blocks: list[int]) -> None:
    assert pyramid("vit", depth=depth).indices == blocks


def test_given_blocks_are_taken_and_no_block_behind_them_is_kept() -> None:
    backbone = noisy(timm.create_model(*ALL["vit"][:1], **{**NARROW, "depth": 8})).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = tokens_by_hand(backbone, images)[3]
    made = FeaturePyramid(backbone, blocks=[0, 1, 3, 4]).eval()
    assert len(made.backbone.blocks) == 5
    torch.testing.assert_close(made(images)[2], expected)


@pytest.mark.parametrize("blocks", [[0, 1, 2], [0, 1, 2, 5], [-1, 0, 1, 2], [0, 0, 1, 2], [3, 2, 1, 0]])
def test_wrong_blocks_are_refused(blocks: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"four of the backbone's 5 blocks \(0 to 4, ascending\), got blocks \{blocks}"):
        FeaturePyramid(timm.create_model(ALL["vit"][0], **NARROW), blocks)


def test_backbones_without_four_levels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"four of the backbone's 3 blocks \(0 to 2, ascending\), got fewer than four"):
        pyramid("vit", depth=3)
    with pytest.raises(ValueError, match="Linear gives no features of its blocks: take a timm model"):
        FeaturePyramid(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"LevitDistilled has levels at strides \[16, 32, 64\], but a pyramid needs four"):
        FeaturePyramid(timm.create_model("levit_128s"))
    with pytest.raises(ValueError, match="hierarchical and gives its last four stages: blocks are for a ViT, BEiT or EVA"):
        FeaturePyramid(timm.create_model("resnet18"), blocks=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="Twins knows no activation checkpointing: set checkpointing to false"):
        FeaturePyramid(timm.create_model("twins_svt_small", embed_dims=(8, 16, 24, 32)), checkpointing=True)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="the images are 32x32 pixels, but the backbone was built for 64x64"):
        pyramid("beit_shared_bias")(torch.randn(1, 3, 32, 32))


# Its gradients


def gradients(made: FeaturePyramid, images: Tensor) -> dict[str, Tensor | None]:
    """Of a sum in which every output counts differently (the plain sum of a layer norm's output would teach it nothing)."""
    torch.manual_seed(1)
    loss = sum((level * torch.randn_like(level)).mean() for level in made(images))
    assert isinstance(loss, Tensor)
    loss.backward()
    return {name: parameter.grad for name, parameter in made.named_parameters()}


@pytest.mark.parametrize("kind", ALL)
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    found = gradients(pyramid(kind, num_classes=7), torch.randn(2, 3, 64, 64))
    assert [name for name, gradient in found.items() if gradient is None] == []


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind != "resnet"])
def test_checkpointing_computes_every_block_twice_and_the_same_gradients(kind: str) -> None:
    images, calls, found = torch.randn(2, 3, 64, 64), [], []
    for checkpointing in (False, True):
        made = pyramid(kind, checkpointing)
        count: dict[nn.Module, int] = {}
        stages = getattr(made.backbone, "layers", getattr(made.backbone, "stages", [made.backbone]))
        for block in (block for stage in stages for block in stage.blocks):
            block.register_forward_pre_hook(lambda module, _, count=count: count.update({module: count.get(module, 0) + 1}))
        found.append(gradients(made, images))
        calls.append(list(count.values()))
    assert calls == [[1] * 5, [2] * 5]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("bias", ["shared", "per_block"])
def test_a_checkpoint_of_pretraining_at_64_px_gives_levels_at_128(bias: str, tmp_path: Path) -> None:
    given = SHARED if bias == "shared" else {"use_rel_pos_bias": True, "init_values": 0.1}
    path, source = saved(tmp_path / "last.ckpt", "beitv2_base_patch16_224", {**NARROW, **given})
    backbone = load_backbone(path, img_size=128)
    report = backbone.load_report
    check_partition(report, torch.load(path, weights_only=True)["state_dict"], backbone)
    assert report.unexpected == report.misshapen == report.missing == {}
    tables = [key for key in source.state_dict() if key.endswith("relative_position_bias_table")]
    assert sorted(f"student.backbone.{key}" for key in tables) == sorted(report.resized)
    made = FeaturePyramid(backbone)
    assert [m.shape[-1] for m in made(torch.randn(1, 3, 128, 128))] == [32, 16, 8, 4]
    for key, value in made.backbone.state_dict().items():
        if key not in tables and not key.endswith("relative_position_index"):
            torch.testing.assert_close(value, source.state_dict()[key])


# The heads


def references(classes: int = 7) -> Any:
    """transformers' UperNet, head and auxiliary head of which mirror mmsegmentation's."""
    stages = [f"stage{number}" for number in (1, 2, 3, 4)]
    backbone = ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], out_features=stages)
    config = UperNetConfig(backbone_config=backbone, hidden_size=20, auxiliary_channels=12, num_labels=classes)
    return noisy(UperNetForSemanticSegmentation(config))


def renamed(theirs: nn.Module, names: dict[str, str]) -> dict[str, Tensor]:
    """Their parameters and statistics by the names of ours; `names`: part of theirs -> part of ours."""
    inside = {"conv": "0", "batch_norm": "1"}
    weights = {}
    for key, value in theirs.state_dict().items():
        part = max((part for part in names if key.startswith(f"{part}.")), key=len)
        words = [inside.get(word, word) for word in key[len(part) + 1 :].split(".")]
        weights[".".join([names[part], *words])] = value.clone()
    return weights


HEAD = {
    "psp_modules": "pools",
    "bottleneck": "pooled",
    "lateral_convs": "laterals",
    "fpn_convs": "smooth",
    "fpn_bottleneck": "fuse",
    "classifier": "classifier",
}
SIZES = {
    "halves": [(16, 24), (8, 12), (4, 6), (2, 3)],
    "odd": [(17, 13), (9, 7), (5, 4), (3, 2)],
    "large": [(64, 48), (32, 24), (16, 12), (8, 6)],
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_head_by_reference(sizes: str, training: bool) -> None:
    theirs = references().decode_head.train(training)
    ours = UperNetHead([8, 16, 24, 32], 20, 7, dropout=0.0).train(training)
    ours.load_state_dict(renamed(theirs, HEAD))  # strict: every tensor of ours has its own of theirs
    maps = [torch.randn(2, d, *size) for d, size in zip((8, 16, 24, 32), SIZES[sizes], strict=True)]
    logits, expected = ours(maps), theirs(maps)
    assert logits.shape == (2, 7, *SIZES[sizes][0])
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dict(ours.state_dict()), renamed(theirs, HEAD), atol=1e-5, rtol=1e-5)  # the statistics too


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_auxiliary_head_by_reference(training: bool) -> None:
    theirs = references().auxiliary_head.train(training)
    ours = FCNHead(24, 12, 7, dropout=0.0).train(training)
    ours.load_state_dict(renamed(theirs, {"convs.0": "convolution", "classifier": "classifier"}))
    maps = [torch.randn(2, d, 9, 5) for d in (8, 16, 24, 32)]
    logits = ours(maps[2])
    assert logits.shape == (2, 7, 9, 5)
    torch.testing.assert_close(logits, theirs(maps), atol=1e-5, rtol=1e-5)


def test_a_whole_segmentation_network_by_reference() -> None:
    """timm's ConvNeXt through pyramid and head, against transformers' own ConvNeXt with UperNet."""
    theirs = references().eval()
    made = pyramid("convnext", conv_mlp=False).eval()
    weights = {}
    for key, value in theirs.backbone.state_dict().items():
        name = key.replace("embeddings.patch_embeddings", "stem.0").replace("embeddings.layernorm", "stem.1")
        name = name.replace("encoder.stages", "stages").replace("downsampling_layer", "downsample").replace("layers", "blocks")
        name = name.replace("dwconv", "conv_dw").replace("layernorm", "norm").replace("pwconv", "mlp.fc")
        name = name.replace("layer_scale_parameter", "gamma")
        weights[name] = value
    norms = {key.replace("hidden_states_norms.stage", ""): value for key, value in weights.items() if "hidden_states" in key}
    made.backbone.load_state_dict({key: value for key, value in weights.items() if "hidden_states" not in key})
    for level, norm in enumerate(made.levels):
        norm.load_state_dict({name: norms[f"{level + 1}.{name}"] for name in ("weight", "bias")})
    ours = UperNetHead(made.channels, 20, 7).eval()
    ours.load_state_dict(renamed(theirs.decode_head, HEAD))
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        logits = F.interpolate(ours(made(images)), images.shape[-2:], mode="bilinear", align_corners=False)
        torch.testing.assert_close(logits, theirs(images).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["upernet", "fcn"])
def test_dropout_takes_whole_channels_before_the_classifier(kind: str) -> None:
    heads = [UperNetHead([4, 4, 4, 4], 32, 3, p) if kind == "upernet" else FCNHead(4, 32, 3, p) for p in (0.0, 0.5)]
    heads[1].load_state_dict(heads[0].state_dict())
    seen: list[Tensor] = []
    for head in heads:
        head.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        maps = [torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(0)) for size in (8, 4, 2, 1)]
        head(maps if kind == "upernet" else maps[0])  # type: ignore[arg-type]
    whole, dropped = seen
    kept = dropped.flatten(2).any(-1)
    assert 0.2 < kept.float().mean() < 0.8
    torch.testing.assert_close(dropped, 2 * whole * kept[..., None, None])


def test_one_image_in_training_is_refused() -> None:
    head = UperNetHead([4, 4, 4, 4], 8, 3)
    maps = [torch.randn(1, 4, size, size) for size in (8, 4, 2, 1)]
    with pytest.raises(ValueError, match=r"a batch of 1 image cannot be trained on: .* set data.batch_size to at least 2"):
        head(maps)
    assert head.eval()(maps).shape == (1, 3, 8, 8)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(head.train())
    assert not [module for module in synchronised.modules() if isinstance(module, nn.BatchNorm2d)]
    synchronised.check_batch(maps[0])  # several devices have several images


@pytest.mark.parametrize("kind", ["upernet", "fcn"])
def test_heads_begin_as_mmsegmentations(kind: str) -> None:
    """mmcv's ConvModule: Kaiming-normal over the fan out, gain sqrt(2); conv_seg: normal of 0.01, bias 0."""
    made = UperNetHead([32, 32, 32, 32], 64, 50) if kind == "upernet" else FCNHead(32, 64, 50)
    for module in (module for module in made.modules() if isinstance(module, nn.Conv2d)):
        expected = 0.01 if module is made.classifier else math.sqrt(2 / (module.out_channels * math.prod(module.kernel_size)))
        assert module.weight.mean().item() == pytest.approx(0, abs=0.1 * expected)
        assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert (module.weight.abs() > 2.5 * expected).any()  # no uniform distribution goes so far
    assert not made.classifier.bias.any()


def test_a_head_takes_four_levels() -> None:
    with pytest.raises(ValueError, match=r"UperNetHead takes four levels, got in_channels \[4, 4, 4\]"):
        UperNetHead([4, 4, 4], 8, 3)
