"""Checkpoints that travel: conversions by reference, published layouts with every key accounted for, wrong files refused."""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from conftest import TINY, tiny_model
from safetensors.torch import save_file
from scipy.interpolate import RectBivariateSpline
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from unimim import EMATarget, FeatureTarget, FineTuning, MaskedImageModeling, MaskTokenStudent, load_backbone
from unimim.weights import checkpoint as travel
from unimim.weights import fitting
from unimim.weights.checkpoint import LoadReport, describe_backbone, export

NARROW = {"embed_dim": 24, "depth": 2, "num_heads": 2}
SHARED = {"use_abs_pos_emb": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
PER_BLOCK = {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}
BEIT = ("beitv2_base_patch16_224", {**NARROW, **SHARED})
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


def noisy(module: nn.Module) -> Any:
    """Every parameter filled with noise, for zeros would hide mistakes."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module.eval()


def saved(path: Path, name: str, model_args: dict[str, Any], **more: object) -> tuple[Path, Any]:
    """A pretraining checkpoint as `MaskedImageModeling` writes it, and the backbone in it."""
    student = noisy(MaskTokenStudent(name, model_args, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)))
    state_dict = {f"student.{key}": value for key, value in student.state_dict().items()}
    state_dict |= {"head.linear.weight": torch.zeros(3, 24), "normalization.center": torch.zeros(3)}
    torch.save({"epoch": 1, "state_dict": state_dict, "backbone": describe_backbone(student), **more}, path)
    return path, student.backbone.eval()


def fine_tuned(path: Path, source: Path, **more: object) -> tuple[Path, Any]:
    """A fine-tuning checkpoint: the classifier below `backbone.`, and what it is."""
    classifier = noisy(load_backbone(source, num_classes=5, global_pool="avg"))
    state_dict = {f"backbone.{key}": value for key, value in classifier.state_dict().items()}
    state_dict |= {"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}
    torch.save({"state_dict": state_dict, "backbone": classifier.load_report.backbone, **more}, path)
    return path, classifier


def written(path: Path, state_dict: dict[str, Tensor], wrap: str = "model", **more: object) -> Path:
    torch.save({wrap: state_dict, **more}, path)
    return path


def check_partition(report: LoadReport, state_dict: dict[str, Tensor], backbone: nn.Module) -> None:
    """Every key of the file has one fate, and every key of the model one source."""
    kinds = ("loaded", "resized", "renamed", "dropped", "unexpected", "misshapen")
    told = [key for kind in kinds for key in getattr(report, kind)]
    assert sorted(told) == sorted(state_dict)
    assert not {*report.new, *report.missing} - set(backbone.state_dict())


def mae_file(depth: int = 2, d: int = 24, grid: int = 14) -> dict[str, Tensor]:
    """The keys of facebookresearch/mae's pretraining checkpoints."""

    def blocks(start: str, width: int) -> dict[str, tuple[int, ...]]:
        layers = {"norm1": (width,), "attn.qkv": (3 * width, width), "attn.proj": (width, width), "norm2": (width,),
                  "mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}  # fmt: skip
        names = [f"{start}.{i}.{layer}" for i in range(depth) for layer in layers]
        weights = {f"{name}.weight": layers[name.split(".", 2)[2]] for name in names}
        return weights | {f"{name}.bias": layers[name.split(".", 2)[2]][:1] for name in names}

    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d), "pos_embed": (1, grid**2 + 1, d), "mask_token": (1, 1, 16),
        "decoder_pos_embed": (1, grid**2 + 1, 16), "patch_embed.proj.weight": (d, 3, 16, 16), "patch_embed.proj.bias": (d,),
        **blocks("blocks", d), "norm.weight": (d,), "norm.bias": (d,), "decoder_embed.weight": (16, d),
        "decoder_embed.bias": (16,), **blocks("decoder_blocks", 16), "decoder_norm.weight": (16,), "decoder_norm.bias": (16,),
        "decoder_pred.weight": (768, 16), "decoder_pred.bias": (768,),
    }  # fmt: skip
    return {key: torch.randn(shape) * 0.2 for key, shape in shapes.items()}


def beit_file(finetuned: bool, depth: int = 2, d: int = 24, grid: int = 14) -> dict[str, Tensor]:
    """The keys of microsoft/unilm's BEiT v2 checkpoints, of pretraining (shared table) or of fine-tuning (per block)."""
    layers = {"gamma_1": (d,), "gamma_2": (d,), "norm1.weight": (d,), "norm1.bias": (d,), "attn.q_bias": (d,),
              "attn.v_bias": (d,), "attn.qkv.weight": (3 * d, d), "attn.proj.weight": (d, d), "attn.proj.bias": (d,),
              "norm2.weight": (d,), "norm2.bias": (d,), "mlp.fc1.weight": (4 * d, d), "mlp.fc1.bias": (4 * d,),
              "mlp.fc2.weight": (d, 4 * d), "mlp.fc2.bias": (d,)}  # fmt: skip
    bias = {"relative_position_bias_table": ((2 * grid - 1) ** 2 + 3, 2), "relative_position_index": (grid**2 + 1,) * 2}
    if finetuned:
        layers |= {f"attn.{key}": shape for key, shape in bias.items()}
    shapes = {"cls_token": (1, 1, d), "patch_embed.proj.weight": (d, 3, 16, 16), "patch_embed.proj.bias": (d,)}
    shapes |= {f"blocks.{i}.{key}": shape for i in range(depth) for key, shape in layers.items()}
    if finetuned:
        shapes |= {"fc_norm.weight": (d,), "fc_norm.bias": (d,), "head.weight": (7, d), "head.bias": (7,)}
    else:
        shapes |= {f"rel_pos_bias.{key}": shape for key, shape in bias.items()}
        shapes |= {f"cls_pt_layers.{i}.{key}": shape for i in range(2) for key, shape in layers.items()}
        shapes |= {"mask_token": (1, 1, d), "norm.weight": (d,), "norm.bias": (d,), "lm_head.weight": (32, d)}
        shapes |= {"lm_head.bias": (32,)}
    return {key: torch.randn(shape) * 0.2 for key, shape in shapes.items()}


# Resizing, by reference


def geometric_positions(old: int, new: int) -> list[float]:
    """Where BEiT puts the entries of an axis of `old`, on one of `new`: 0, ±1, ±(1 + q), ... up to the end."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if sum(q**i for i in range(old // 2)) > new // 2 else (q, high)
    right = [sum(q**i for i in range(n)) for n in range(1, old // 2 + 1)]
    return [-x for x in reversed(right)] + [0.0] + right


def smooth_table(side: int, heads: int = 2) -> Tensor:
    """[side*side+3 heads]: falls off with the distance, as learned tables do; then the three of the CLS token."""
    offsets = torch.arange(side) - side // 2
    distance = torch.hypot(*torch.meshgrid(offsets.float(), offsets.float(), indexing="ij")).flatten()
    table = torch.stack([torch.exp(-distance / (4 + 4 * head)) for head in range(heads)], dim=1)
    smooth = torch.stack([torch.exp(-(distance**2) / (60 + 60 * head)) for head in range(heads)], dim=1)
    return torch.cat([0 * table + smooth, torch.randn(3, heads)])


@pytest.mark.parametrize("pixels", [384, 512])
@pytest.mark.parametrize("kind", ["shared", "per block"])
@pytest.mark.parametrize("rough", [False, True], ids=["smooth", "rough"])
def test_beit_at_another_resolution(tmp_path: Path, pixels: int, kind: str, rough: bool) -> None:
    """Tables by BEiT's own loop: scipy's interp2d, which it calls, is this spline; plain resizing is far from it."""
    path, _ = saved(tmp_path / "beit.ckpt", *BEIT)
    content = torch.load(path, weights_only=True)
    table = torch.randn(27 * 27 + 3, 2) if rough else smooth_table(27)
    content["state_dict"][f"student.backbone.{SHARED_TABLE}"] = table
    torch.save(content, path)
    backbone = load_backbone(path, img_size=pixels, **(PER_BLOCK if kind == "per block" else {}))
    side = 2 * (pixels // 16) - 1
    at, goal = geometric_positions(27, side), np.arange(-(side // 2), side // 2 + 1)
    flat = table[:-3].T.reshape(2, 27, 27)
    spline = torch.stack([torch.from_numpy(RectBivariateSpline(at, at, head.numpy())(goal, goal)) for head in flat])
    tables = [value for key, value in backbone.state_dict().items() if key.endswith("bias_table")]
    assert len(tables) == (2 if kind == "per block" else 1)
    for resized in tables:
        torch.testing.assert_close(resized[:-3].T.reshape(2, side, side), spline.float(), atol=2e-5, rtol=0)
        assert torch.equal(resized[-3:], table[-3:])
    (note,) = backbone.load_report.resized.values()
    assert note.startswith(f"table of 27x27 to {side}x{side}, cubic between geometrically spaced positions")
    assert backbone(torch.randn(1, 3, pixels, pixels)).shape == (1, (pixels // 16) ** 2 + 1, 24)
    for mode in ("bicubic", "bilinear"):
        assert (F.interpolate(flat[None], size=(side, side), mode=mode)[0] - spline).abs().max() > 0.05


@pytest.mark.parametrize("pixels", [384, 512])
def test_vit_at_another_resolution(tmp_path: Path, pixels: int) -> None:
    """Bicubic, as MAE's and BEiT's codes do it; the CLS token's position stays."""
    path, pretrained = saved(tmp_path / "vit.ckpt", "vit_tiny_patch16_224", NARROW)
    backbone = load_backbone(path, img_size=pixels)
    cls, patches = pretrained.pos_embed[:, :1], pretrained.pos_embed[:, 1:]
    grid = patches.reshape(1, 14, 14, 24).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, size=(pixels // 16,) * 2, mode="bicubic", align_corners=False)
    expected = torch.cat([cls, resized.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(backbone.pos_embed, expected, atol=1e-5, rtol=0)
    report = backbone.load_report
    assert report.resized == {"student.backbone.pos_embed": f"14x14 patches to {pixels // 16}x{pixels // 16}, bicubic"}
    assert backbone(torch.randn(1, 3, pixels, pixels)).shape == (1, (pixels // 16) ** 2 + 1, 24)
    same = load_backbone(path).state_dict()
    assert all(torch.equal(value, same[key]) for key, value in pretrained.state_dict().items())


def test_swin_and_another_patch_size(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "swin.ckpt", *TINY["swin"])
    backbone = load_backbone(path, window_size=2)
    assert len(backbone.load_report.resized) == sum("bias_table" in key for key in backbone.state_dict())
    path, pretrained = saved(tmp_path / "vit.ckpt", *TINY["vit"])  # 32 px, patches of 8
    backbone = load_backbone(path, patch_size=4)
    assert list(backbone.load_report.resized.values()) == [
        "4x4 patches to 8x8, bicubic",
        "patches of 8x8 pixels to 4x4",
    ]
    kernel = timm.layers.resample_patch_embed(pretrained.patch_embed.proj.weight, [4, 4])
    torch.testing.assert_close(backbone.patch_embed.proj.weight, kernel)


@pytest.mark.parametrize("kind", ["vit", "beit_shared_bias"])
def test_grids_that_are_no_square(tmp_path: Path, kind: str) -> None:
    """The checkpoint says its grid: turned, it has as many patches, and is not the same."""
    name, model_args = TINY[kind]
    path, _ = saved(tmp_path / "wide.ckpt", name, {**model_args, "img_size": [16, 64]})
    assert not load_backbone(path).load_report.resized
    turned = load_backbone(path, img_size=[64, 16])
    (note,) = turned.load_report.resized.values()
    assert note.startswith("2x8 patches to 8x2" if kind == "vit" else "table of 3x15 to 15x3")


# One key for another


def test_a_shared_table_copied_into_each_block_computes_the_same(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 224, 224)
    path, pretrained = saved(tmp_path / "beit.ckpt", *BEIT)
    backbone = load_backbone(path, **PER_BLOCK).eval()
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), pretrained.forward_features(images), atol=1e-6, rtol=0)
    assert backbone.load_report.renamed == {f"student.backbone.{SHARED_TABLE}": "into blocks.0.attn."
        "relative_position_bias_table and blocks.1.attn.relative_position_bias_table"}  # fmt: skip


def test_biases_of_queries_and_values_in_one_and_layer_scales(tmp_path: Path) -> None:
    """BEiT without positions is a ViT without positions, and back; the bias of the keys cancels in the softmax."""
    images = torch.randn(2, 3, 224, 224)
    beit_args = {**NARROW, "use_abs_pos_emb": False, "use_rel_pos_bias": False, "init_values": 0.1}
    vit_args = {**NARROW, "pos_embed": "none", "init_values": 0.1}
    beit = noisy(timm.create_model("beit_base_patch16_224", num_classes=0, global_pool="", **beit_args))
    path = written(tmp_path / "beit.pth", beit.state_dict())
    vit = load_backbone(path, "vit_base_patch16_224", **vit_args).eval()
    check_partition(vit.load_report, beit.state_dict(), vit)
    with torch.no_grad():
        torch.testing.assert_close(vit(images), beit(images), atol=1e-5, rtol=0)
        path = written(tmp_path / "vit.pth", noisy(vit).state_dict())
        again = load_backbone(path, "beit_base_patch16_224", **beit_args).eval()
        torch.testing.assert_close(again(images), vit(images), atol=1e-5, rtol=0)
    check_partition(again.load_report, vit.state_dict(), again)


def test_pooling_moves_the_final_norm(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "vit.ckpt", *TINY["vit"])
    classifier = load_backbone(path, num_classes=3, global_pool="avg")
    report = classifier.load_report
    assert set(report.new) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert {key: report.dropped[key] for key in report.dropped if "backbone" in key} == dict.fromkeys(
        ["student.backbone.norm.weight", "student.backbone.norm.bias"],
        "the final norm: the model has one behind the pooling instead (fc_norm)",
    )
    path, classifier = fine_tuned(tmp_path / "tuned.ckpt", path)
    content = torch.load(path, weights_only=True)
    same = load_backbone(path)
    check_partition(same.load_report, content["state_dict"], same)
    assert all(torch.equal(value, same.state_dict()[key]) for key, value in classifier.state_dict().items())
    assert set(same.load_report.dropped) == {"mean", "std"}
    assert same.pretrained_cfg["mean"] == pytest.approx((0.4, 0.5, 0.6))
    FineTuning(same)
    other = load_backbone(path, num_classes=9).load_report
    assert other.dropped["backbone.head.weight"] == "a head of 5 classes, the model's has 9"
    assert set(other.new) == {"head.weight", "head.bias"}
    encoder = load_backbone(path, num_classes=0, global_pool="").load_report
    assert encoder.dropped["backbone.head.bias"] == "a head, the model has none"
    assert encoder.new["norm.weight"] == "a fresh final norm: the file has it behind the pooling (fc_norm)"


# Published files


@pytest.mark.parametrize("prefix", ["", "module.", "module.student.", "encoder.", "_orig_mod.backbone."])
def test_the_layout_of_official_mae(tmp_path: Path, prefix: str) -> None:
    content = {prefix + key: value for key, value in mae_file().items()}
    path = written(tmp_path / "mae.pth", content, epoch=3, args=argparse.Namespace(lr=1.0))
    backbone = load_backbone(path, backbone="vit_base_patch16_224.mae", **NARROW)
    report = backbone.load_report
    check_partition(report, content, backbone)
    assert (report.prefix, set(report.loaded)) == (prefix, {prefix + key for key in backbone.state_dict()})
    assert (report.resized, report.renamed, report.new) == ({}, {}, {})
    assert set(report.dropped.values()) == {
        "the head of pretraining",
        "stands for hidden patches, in pretraining only",
    }
    assert torch.equal(backbone.blocks[1].attn.qkv.weight, content[f"{prefix}blocks.1.attn.qkv.weight"])
    assert backbone.pretrained_cfg["mean"] == pytest.approx((0.485, 0.456, 0.406))
    classifier = load_backbone(path, "vit_base_patch16_224.mae", num_classes=4, global_pool="avg", img_size=384, **NARROW)
    check_partition(classifier.load_report, content, classifier)
    assert classifier.load_report.resized == {f"{prefix}pos_embed": "14x14 patches to 24x24, bicubic"}


def test_the_layout_of_official_beit_pretraining(tmp_path: Path) -> None:
    content = beit_file(finetuned=False)
    path = written(tmp_path / "beit.pth", content)
    for model_args in (SHARED, PER_BLOCK, {**PER_BLOCK, "num_classes": 3, "global_pool": "avg"}):
        backbone = load_backbone(path, "beitv2_base_patch16_224", **NARROW, **model_args)
        report = backbone.load_report
        check_partition(report, content, backbone)
        assert (SHARED_TABLE in report.loaded) == (model_args is SHARED)
        assert report.dropped["rel_pos_bias.relative_position_index"] == "computed, not learned"
        assert report.dropped["cls_pt_layers.1.attn.q_bias"].startswith("BEiT v2's blocks for its CLS token")
        assert {"mask_token", "lm_head.weight", "lm_head.bias"} <= set(report.dropped)
        assert not report.resized
    tables = [block.attn.relative_position_bias_table for block in backbone.blocks]
    assert all(torch.equal(table, content[SHARED_TABLE]) for table in tables)


def test_the_layout_of_official_beit_fine_tuning(tmp_path: Path) -> None:
    content = beit_file(finetuned=True)
    path = written(tmp_path / "beit.pth", content, wrap="module")
    classifier = load_backbone(path, "beitv2_base_patch16_224", num_classes=7, **NARROW)
    report = classifier.load_report
    check_partition(report, content, classifier)
    assert set(report.loaded) == set(classifier.state_dict())
    assert set(report.dropped) == {f"blocks.{i}.attn.relative_position_index" for i in range(2)}
    larger = load_backbone(path, "beitv2_base_patch16_224", num_classes=7, img_size=384, **NARROW)
    check_partition(larger.load_report, content, larger)
    assert set(larger.load_report.resized) == {f"blocks.{i}.attn.relative_position_bias_table" for i in range(2)}


def test_the_layout_of_official_swin(tmp_path: Path) -> None:
    """SimMIM's files: below `encoder.`, downsampling at the end of a stage, buffers that timm computes."""
    name, model_args = TINY["swin"]
    swin = noisy(timm.create_model(name, num_classes=5, **model_args))
    content = {}
    for key, value in swin.state_dict().items():
        old = re.sub(r"^layers\.(\d)\.downsample", lambda stage: f"layers.{int(stage[1]) - 1}.downsample", key)
        content[old.replace("head.fc.", "head.")] = value
    content |= {"layers.0.blocks.1.attn_mask": torch.zeros(1), "layers.0.blocks.0.attn.relative_position_index": torch.zeros(1)}
    tuned = load_backbone(written(tmp_path / "a.pth", content), name, num_classes=5, global_pool="avg", **model_args).eval()
    check_partition(tuned.load_report, content, tuned)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(tuned(images), swin(images))
    simmim = {f"encoder.{key}": value for key, value in content.items() if not key.startswith("head.")}
    simmim |= {"encoder.mask_token": torch.zeros(1), "decoder.0.weight": torch.zeros(1), "decoder.0.bias": torch.zeros(1)}
    encoder = load_backbone(written(tmp_path / "b.pth", simmim), name, **model_args)
    check_partition(encoder.load_report, simmim, encoder)


def test_a_student_is_taken_rather_than_its_teacher(tmp_path: Path) -> None:
    names = ("teacher", "student")
    content = {f"module.{who}.backbone.{key}": value * (who == "student") for who in names for key, value in mae_file().items()}
    content |= {"module.student.head.mlp.0.weight": torch.zeros(1)}
    backbone = load_backbone(written(tmp_path / "a.pth", content), "vit_tiny_patch16_224", **NARROW)
    check_partition(backbone.load_report, content, backbone)
    assert backbone.cls_token.abs().sum() > 0
    assert backbone.load_report.dropped["module.teacher.backbone.cls_token"] == "the teacher"
    assert backbone.load_report.dropped["module.student.head.mlp.0.weight"] == "a head beside the encoder"


def test_a_timm_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's weights come in the model's own shape, and go the same way as a file's."""
    published = noisy(timm.create_model("vit_tiny_patch16_224", **NARROW))
    create, asked = travel.create_backbone, []

    def hub(name: str, model_args: dict[str, Any], pretrained: bool = False) -> Any:
        asked.append((name, pretrained))
        return published if pretrained else create(name, {**NARROW, **model_args})

    for module in (travel, fitting):
        monkeypatch.setattr(module, "create_backbone", hub)
    backbone = load_backbone("vit_tiny_patch16_224.augreg_in21k", img_size=384)
    assert asked == [("vit_tiny_patch16_224.augreg_in21k", True), ("vit_tiny_patch16_224.augreg_in21k", False)]
    check_partition(backbone.load_report, published.state_dict(), backbone)
    assert set(backbone.load_report.resized) == {"pos_embed"}
    assert set(backbone.load_report.dropped) == {"head.weight", "head.bias"}


# Our own files


def test_the_file_alone_is_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Through a real training, with a teacher that is in the file too; every key is told of."""
    trainer = pl.Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False,
                         enable_model_summary=False)  # fmt: skip
    model = tiny_model(teacher=EMATarget(top_blocks=2))
    trainer.fit(model, DataLoader(torch.rand(4, 3, 32, 32), batch_size=4))
    path = trainer.checkpoint_callback.best_model_path
    pretrained = trainer.lightning_module.student.backbone.state_dict()
    backbone = load_backbone(path)
    check_partition(backbone.load_report, torch.load(path, weights_only=True)["state_dict"], backbone)
    assert all(torch.equal(value, pretrained[key]) for key, value in backbone.state_dict().items())
    assert str(backbone.load_report).startswith(f"{path} -> vit_tiny_patch16_224: {len(pretrained)} loaded, 0 resized,")
    assert str(backbone.load_report) in caplog.text
    assert sum(reason == "the teacher" for reason in backbone.load_report.dropped.values()) > len(pretrained)


def test_what_a_subclass_added_is_told_and_left_out(tmp_path: Path) -> None:
    class WithMore(MaskedImageModeling):
        def __init__(self, **parts: Any) -> None:
            super().__init__(**parts)
            self.second = nn.Linear(2, 3)
            self.scale = nn.Parameter(torch.zeros(()))

    trainer = pl.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False)  # fmt: skip
    model = tiny_model(WithMore)
    trainer.fit(model, DataLoader(torch.rand(4, 3, 32, 32), batch_size=4))
    trainer.save_checkpoint(tmp_path / "more.ckpt")
    backbone = load_backbone(tmp_path / "more.ckpt")
    check_partition(backbone.load_report, model.state_dict(), backbone)
    own = "a part of one's own training, beside the encoder"
    assert {key for key, why in backbone.load_report.dropped.items() if why == own} == {"second.weight", "second.bias", "scale"}
    assert export(tmp_path / "more.ckpt", tmp_path / "more.pth").is_file()


def test_a_checkpoint_of_version_0_1(tmp_path: Path) -> None:
    """As it was written before there were reports, letter by letter."""
    backbone = noisy(timm.create_model("vit_tiny_patch16_224", num_classes=0, global_pool="", **TINY["vit"][1]))
    content = {
        "epoch": 0,
        "global_step": 1,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": {
            **{f"student.backbone.{key}": value for key, value in backbone.state_dict().items()},
            "student.mask_token": torch.zeros(24),
            "student.mean": torch.zeros(3, 1, 1),
            "student.std": torch.ones(3, 1, 1),
            "teacher.student.backbone.cls_token": torch.zeros(1, 1, 24),
            "head.linear.weight": torch.zeros(36, 24),
        },
        "backbone": {"name": "vit_tiny_patch16_224", "model_args": TINY["vit"][1], "mean": [0.5] * 3, "std": [0.25] * 3},
    }
    torch.save(content, tmp_path / "old.ckpt")
    loaded = load_backbone(tmp_path / "old.ckpt")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in backbone.state_dict().items())
    assert loaded.pretrained_cfg["std"] == (0.25, 0.25, 0.25)


# Export


@pytest.mark.parametrize("ending", [("timm", ".pth"), ("safetensors", ".safetensors")])
@pytest.mark.parametrize("kind", ["vit", "beit_shared_bias", "swin"])
def test_exported_files_load_strictly_in_timm(tmp_path: Path, kind: str, ending: tuple[str, str]) -> None:
    """By the very call on the card: equal tokens of the encoder, equal logits of the classifier."""
    name, model_args = TINY[kind]
    images = torch.randn(2, 3, 32, 32)
    encoder_path, encoder = saved(tmp_path / "a.ckpt", name, model_args)
    classifier_path, classifier = fine_tuned(tmp_path / "b.ckpt", encoder_path)
    for path, model in ((encoder_path, encoder), (classifier_path, classifier)):
        destination = tmp_path / "out" / f"{path.stem}{ending[1]}"
        assert export(path, destination, ending[0]) == destination
        (call,) = re.findall(r"model = (.+)", Path(f"{destination}.md").read_text())
        loaded = eval(call.replace(destination.name, str(destination)), {"timm": timm}).eval()
        with torch.no_grad():
            assert torch.equal(loaded(images), model(images))
        again = load_backbone(destination)  # it still knows what it is
        assert again.pretrained_cfg["mean"] == pytest.approx((0.4, 0.5, 0.6))
        assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_the_card_of_an_export(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "vit.ckpt", *TINY["vit"], metrics={"val/acc1": 0.75}, global_step=7,
                    hyper_parameters={"_instantiator": "x", "lr": 0.25, "masking": {"class_path": "unimim.BlockMasking",
                    "init_args": {"ratio": 0.4}}}, datamodule_hyper_parameters={"root": "/me/photos", "flip": 0.5})  # fmt: skip
    card = Path(f"{export(path, tmp_path / 'vit.pth')}.md").read_text()
    for line in (
        "vit_tiny_patch16_224, exported by unimim from vit.ckpt.",
        "Pixels in [0, 1] are normalized by mean = (0.4, 0.5, 0.6), std = (0.2, 0.3, 0.4).",
        "## Recipe\n\n- masking: unimim.BlockMasking(ratio=0.4)\n- lr: 0.25\n",
        "## Data\n\n- root: photos\n- flip: 0.5\n",
        "- global_step: 7\n",
        "## Metrics\n\n- val/acc1: 0.75\n",
        "- student.mean and 1 more: pixel statistics, which pretrained_cfg has\n",
        "- head.linear.weight: a head beside the encoder\n",
    ):
        assert line in card
    path, _ = saved(tmp_path / "bare.ckpt", *TINY["vit"])
    assert "## Recipe\n\nNot in the checkpoint.\n" in Path(f"{export(path, tmp_path / 'bare.pth')}.md").read_text()


def test_export_refuses(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "vit.ckpt", *TINY["vit"])
    (tmp_path / "there.pth").write_text("mine")
    (tmp_path / "carded.pth.md").write_text("mine")
    written(tmp_path / "mae.pth", mae_file())
    for source, destination, format, message in (
        (path, "there.pth", "timm", r"there.pth exists and is not overwritten"),
        (path, "carded.pth", "timm", r"carded.pth.md exists and is not overwritten"),
        (path, "x.safetensors", "timm", "from a file that ends in .pth or .pt"),
        (path, "x.pth", "onnx", "knows the formats timm and safetensors, not 'onnx'"),
        (tmp_path / "mae.pth", "x.pth", "timm", "does not say which backbone it holds: give backbone, a timm name"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            export(source, tmp_path / destination, format)
        assert "\n" not in str(error.value)
    assert (tmp_path / "there.pth").read_text() == "mine"
    assert not (tmp_path / "x.pth").exists()


# Wrong files


def without(state_dict: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {key: value for key, value in state_dict.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "model_args", "message"),
    [
        (lambda f: {f"backbone.{k}": v for k, v in f.items()} | {"decode_head.conv_seg.weight": torch.zeros(1),
         "auxiliary_head.conv_seg.bias": torch.zeros(1)}, {},
         r"2 unexpected \(decode_head.conv_seg.weight, auxiliary_head.conv_seg.bias\)"),
        (lambda f: without(f, "blocks.1.norm1.weight") | {"blocks.1.norm_1.weight": f["blocks.1.norm1.weight"]}, {},
         r"1 missing \(blocks.1.norm1.weight\); 1 unexpected \(blocks.1.norm_1.weight\)"),
        (lambda f: f, {"embed_dim": 48}, r"30 of another shape \(cls_token \(1, 1, 24\) for \(1, 1, 48\), "),
        (lambda f: f, {"depth": 3}, r"12 missing \(blocks.2.norm1.weight, "),
        (lambda f: f, {"depth": 1}, r"12 unexpected \(blocks.1.norm1.weight, "),
        (lambda f: without(f, "norm.weight", "norm.bias"), {}, r"2 missing \(norm.weight, norm.bias\)"),
        (lambda f: without(f, "norm.weight", "norm.bias"), {"num_classes": 3, "global_pool": "avg"},
         r"2 missing \(fc_norm.weight, fc_norm.bias\)"),
        (lambda f: f | {"head.weight": torch.zeros(3, 48), "head.bias": torch.zeros(3)}, {"num_classes": 3},
         r"1 of another shape \(head.weight \(3, 48\) for \(3, 24\)\)"),
        (lambda f: f | {"head.bias": torch.zeros(3)}, {"num_classes": 3}, r"1 missing \(head.weight\)"),
        (lambda f: f | {"head.fc.weight": torch.zeros(3, 24), "head.fc.bias": torch.zeros(3)}, {"num_classes": 3},
         r"2 unexpected \(head.fc.weight, head.fc.bias\)"),
        (lambda f: f | {SHARED_TABLE: torch.zeros(732, 2)}, {}, rf"1 unexpected \({SHARED_TABLE}\)"),
        (lambda f: f | {"pos_embed": torch.zeros(1, 190, 24)}, {}, r"1 of another shape \(pos_embed \(1, 190, 24\) for"),
        (lambda f: {}, {}, r"30 missing"),
        (lambda f: {"layer1.0.conv1.weight": torch.zeros(1)}, {}, r"30 missing .* 1 unexpected"),
    ],
)  # fmt: skip
def test_wrong_files_fail_in_one_line(tmp_path: Path, change: Any, model_args: dict[str, Any], message: str) -> None:
    """Nothing is loaded; with `strict=False` it is said, and the rest is."""
    content = change(mae_file())
    path = written(tmp_path / "wrong.pth", content)
    arguments = {**NARROW, **model_args}
    with pytest.raises(ValueError, match=rf"does not fit vit_tiny_patch16_224, nothing was loaded: .*{message}") as error:
        load_backbone(path, "vit_tiny_patch16_224", **arguments)
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=rf"the rest was loaded: .*{message}"):
        backbone = load_backbone(path, "vit_tiny_patch16_224", strict=False, **arguments)
    report = backbone.load_report
    check_partition(report, content, backbone)
    assert all(torch.equal(backbone.state_dict()[key.removeprefix(report.prefix)], content[key]) for key in report.loaded)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "good.ckpt", *TINY["vit"])
    (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:2000])
    (tmp_path / "page.ckpt").write_bytes(b"<!DOCTYPE html><html>not found</html>")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save(torch.nn.Identity(), tmp_path / "code.pth")  # a whole module
    save_file({"a": torch.zeros(1)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:20])
    for name, message in (
        ("cut.ckpt", "may be truncated"),
        ("cut.safetensors", "may be truncated"),
        ("page.ckpt", r"holds no weights, it starts with b'<!DOCTYPE html>"),
        ("other.ckpt", r"does not say which backbone it holds: give backbone, a timm name"),
        ("code.pth", r"is refused: its pickle holds more than tensors"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load_backbone(tmp_path / name)
        assert "\n" not in str(error.value)
    for missing in (tmp_path / "none.ckpt", "vit_tiny_patch16_224.pth", "some/where"):
        with pytest.raises(FileNotFoundError, match="there is no file"):
            load_backbone(missing)
    with pytest.raises(ValueError, match="timm has no model 'vit_tiny_patch16_225'. Nearest: vit_tiny_patch16_224"):
        load_backbone("vit_tiny_patch16_225")
    for arguments in ({}, {"num_classes": 3, "global_pool": ""}):  # no head; a head on every token
        with pytest.raises(ValueError, match="needs a backbone with a classifier"):
            FineTuning(load_backbone(path, **arguments))


def test_our_files_as_teachers(tmp_path: Path) -> None:
    """A target of features takes the encoder from any file of ours: pretraining, fine-tuning, exported."""
    path, encoder = saved(tmp_path / "a.ckpt", *TINY["vit"])
    tuned, _ = fine_tuned(tmp_path / "b.ckpt", path)
    files = [path, tuned, export(path, tmp_path / "c.pth"), export(path, tmp_path / "d.safetensors", "safetensors")]
    for file in files:
        teacher = FeatureTarget("vit_tiny_patch16_224", weights=str(file), norm=file != tuned)
        assert teacher.mean.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])
    assert torch.equal(teacher.frozen.network.cls_token, encoder.cls_token)
