"""A backbone that torch.compile or peft has wrapped: rules that go by timm's names and classes hold for it as for the bare one.

peft is not needed here: its names are imitated, `base_model.model.` before timm's, and an adapter within a linear layer.
"""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
from conftest import PLAIN, TINY, tiny_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unimim import AttentiveProbe, FineTuning, UperNetSegmentation, load_backbone
from unimim.pictures.patches import encoder_features
from unimim.tasks.optim import layer_decay_groups, parameter_groups
from unimim.tasks.probing import extract_features
from unimim.training.shards import blocks
from unimim.weights.checkpoint import describe_network
from unimim.weights.models import check_image_size, checkpoint_activations, timm_model

VIT = "vit_tiny_patch16_224"
FAMILIES = ["vit", "beit_bias_per_block", "beit_shared_bias", "eva", "swin"]


class Adapted(nn.Module):
    """peft's linear layer: the frozen one and what is added."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class Forwarding(nn.Module):
    """One of peft's two layers of wrapping: what it has not, the inner one has."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.inner_name = name
        setattr(self, name, inner)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__(self.__dict__["inner_name"]), name)

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.inner_name)(x)


def adapted(model: nn.Module) -> nn.Module:
    for block in blocks(model):
        block.attn.proj = Adapted(block.attn.proj)
    return Forwarding("base_model", Forwarding("model", model))


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


class Prompted(nn.Module):
    """A wrapper of one's own, with a parameter beside the model and no attribute of it but the two that are asked for."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model
        self.prompt = nn.Parameter(torch.zeros(4, 4))
        self.pretrained_cfg, self.num_classes, self.global_pool = model.pretrained_cfg, model.num_classes, model.global_pool

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x + self.prompt.mean())


WRAPPERS: dict[str, Any] = {"compiled": compiled, "adapted": adapted, "both": lambda m: adapted(compiled(m)), "own": Prompted}


def make(kind: str = "vit", **model_args: Any) -> Any:
    name, own = TINY[kind]
    return timm.create_model(name, **{**own, "num_classes": 3, "global_pool": "avg", **model_args})


def rates(groups: list[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    return {id(parameter): (group["lr"], group["weight_decay"]) for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("wrapper", ["compiled", "adapted", "own"])
def test_layers_learn_at_their_rates(kind: str, wrapper: str) -> None:
    model = make(kind)
    bare = rates(layer_decay_groups(model, 1.0, 0.05, 0.5))
    rate_of_block = {lr for lr, _ in bare.values()}
    assert len(rate_of_block) > 3
    wrapped = WRAPPERS[wrapper](model)
    found = rates(layer_decay_groups(wrapped, 1.0, 0.05, 0.5))
    kept = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert {key: value for key, value in found.items() if key in bare} == {k: v for k, v in bare.items() if k in kept}
    added = {key: value for key, value in found.items() if key not in bare}
    if wrapper == "own":
        assert added == {id(wrapped.prompt): (1.0, 0.05)}
    if wrapper == "adapted":
        for block in blocks(model):
            beside = found[id(block.mlp.fc1.weight)]
            assert {added.pop(id(block.attn.proj.lora_A["default"].weight))} == {beside}
            assert {added.pop(id(block.attn.proj.lora_B["default"].weight))} == {beside}
        assert not added


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_does_not_decay_is_found(kind: str, wrapper: str) -> None:
    model = make(kind)
    bare = {id(p): group["weight_decay"] for group in parameter_groups([model], 0.05) for p in group["params"]}
    assert set(bare.values()) == {0.0, 0.05}
    wrapped = WRAPPERS["adapted" if wrapper == "both" and kind == "swin" else wrapper](model)
    found = {id(p): group["weight_decay"] for group in parameter_groups([wrapped], 0.05) for p in group["params"]}
    assert {key: found[key] for key in bare if key in found} == {key: bare[key] for key in bare if key in found}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_fine_tuning_of_a_wrapped_backbone(tmp_path: Path, wrapper: str) -> None:
    """Its rates, its names in a checkpoint, and a wrong size of images."""
    wrapped = WRAPPERS[wrapper](make())
    model = FineTuning(wrapped, layer_decay=0.5, warmup_epochs=0, lr=1e-3, min_lr=0.0)
    seen: list[set[float]] = []

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen.append({group["lr"] for group in trainer.optimizers[0].param_groups})

    fit(model, tmp_path, callbacks=[Look()])
    assert len(seen[0]) == 4
    names = {name for name, _ in model.named_parameters()}
    assert ("backbone.blocks.0.mlp.fc1.weight" in names) == (wrapper == "compiled")
    with pytest.raises(ValueError, match="images are 16x16 pixels, but the backbone was built for 32x32"):
        model(torch.rand(2, 3, 16, 16))


def fit(model: pl.LightningModule, tmp_path: Path, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **quiet, **options)
    labels = [torch.full((32, 32), 1)] * 4 if isinstance(model, UperNetSegmentation) else [0, 1, 2, 0]
    trainer.fit(model, DataLoader(list(zip(torch.rand(4, 3, 32, 32), labels, strict=True)), batch_size=2))
    return trainer


def test_a_compiled_backbone_stays_compiled() -> None:
    calls: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        return lambda *given: (calls.append(1), graph(*given))[1]

    plain = make().eval()
    images = torch.rand(2, 3, 32, 32)
    expected = FineTuning(plain).eval()(images)
    assert not calls
    torch.testing.assert_close(FineTuning(torch.compile(plain, backend=backend)).eval()(images), expected)
    assert calls


@pytest.mark.parametrize("wrapper", ["compiled", "adapted", "both"])
def test_a_checkpoint_of_a_compiled_backbone_loads(tmp_path: Path, wrapper: str) -> None:
    backbone = load_backbone(saved(tmp_path), num_classes=3, global_pool="avg")
    expected = {name: value.clone() for name, value in backbone.state_dict().items()}
    wrapped = WRAPPERS[wrapper](backbone)
    model = FineTuning(wrapped, lr=1e-9, min_lr=0.0)
    assert describe_network(model.backbone, model.hparams, model.mean, model.std) == backbone.load_report.backbone
    fit(model, tmp_path).save_checkpoint(tmp_path / "tuned.ckpt")
    if wrapper == "compiled":
        torch.testing.assert_close(load_backbone(tmp_path / "tuned.ckpt").state_dict(), expected, rtol=1e-5, atol=1e-5)
        return
    with pytest.raises(ValueError, match="does not fit vit_tiny_patch16_224, nothing was loaded: .*base_layer"):
        load_backbone(tmp_path / "tuned.ckpt")


def saved(tmp_path: Path) -> Path:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(tiny_model(), DataLoader(torch.rand(4, 3, 32, 32), batch_size=2))
    trainer.save_checkpoint(tmp_path / "encoder.ckpt")
    return tmp_path / "encoder.ckpt"


@pytest.mark.parametrize("wrapper", ["compiled", "adapted", "both"])
@pytest.mark.parametrize("kind", ["vit", "beit_bias_per_block", "eva"])
def test_segmentation_with_a_wrapped_backbone(tmp_path: Path, wrapper: str, kind: str) -> None:
    """Its rates; and whole images, for which positions are resized: as with the same weights bare."""
    torch.manual_seed(1)
    options = {"num_classes": 3, "channels": 8, "layer_decay": 0.5, "inference": "whole"}
    bare = UperNetSegmentation(make(kind, depth=4, num_classes=0, global_pool=""), **options)
    model = UperNetSegmentation(WRAPPERS[wrapper](make(kind, depth=4, num_classes=0, global_pool="")), **options)
    network = timm_model(model.pyramid.backbone)
    assert len({group["lr"] for group in layer_decay_groups(network, 1.0, 0.0, 0.5)}) > 3
    for part in blocks(network):
        if wrapper != "compiled":
            nn.init.zeros_(part.attn.proj.lora_B["default"].weight)
    weights = {
        name.replace("base_model.model.", "").replace("_orig_mod.", "").replace("base_layer.", ""): value
        for name, value in model.state_dict().items()
        if "lora_" not in name
    }
    bare.load_state_dict(weights)
    images = torch.rand(1, 3, 48, 40)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images), bare.eval()(images))
    fit(model, tmp_path)


@pytest.mark.parametrize("wrapper", ["compiled", "adapted", "both"])
def test_probes_and_features_of_a_wrapped_backbone(tmp_path: Path, wrapper: str) -> None:
    model = make(num_classes=0, global_pool="").eval()
    data = [(torch.rand(4, 3, 32, 32), torch.arange(4))]
    expected, _ = extract_features(model, data)
    pictured = encoder_features(model, data[0][0])
    of_bare = AttentiveProbe(model, 3, num_heads=2).digest
    wrapped = WRAPPERS[wrapper](model)
    for part in blocks(timm_model(wrapped)):
        if wrapper != "compiled":
            nn.init.zeros_(part.attn.proj.lora_B["default"].weight)
    torch.testing.assert_close(extract_features(wrapped, data)[0], expected)
    torch.testing.assert_close(encoder_features(wrapped, data[0][0]), pictured)
    probe = AttentiveProbe(wrapped, 3, num_heads=2)
    assert (probe.digest == of_bare) == (wrapper == "compiled")
    fit(probe, tmp_path)


@pytest.mark.parametrize("wrapper", ["compiled", "adapted", "both"])
def test_pretraining_with_a_wrapped_backbone(tmp_path: Path, wrapper: str) -> None:
    """Wrapped behind the student's back: its blocks are compiled, activations computed again, its checkpoint describes it."""
    model = tiny_model(warmup_epochs=0)
    model.student.backbone = WRAPPERS[wrapper](model.student.backbone)
    checkpoint_activations(model.student.backbone)
    assert timm_model(model.student.backbone).grad_checkpointing
    with pytest.raises(ValueError, match="built for 32x32"):
        check_image_size(model.student.backbone, torch.rand(2, 3, 16, 16))
    model.compile_blocks(backend="eager")
    assert all(block._compiled_call_impl is not None for block in blocks(timm_model(model.student.backbone)))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, **quiet)
    trainer.fit(model, DataLoader(torch.rand(4, 3, 32, 32), batch_size=2))
    trainer.save_checkpoint(tmp_path / "encoder.ckpt")
    if wrapper == "compiled":
        assert not load_backbone(tmp_path / "encoder.ckpt").load_report.problems


def test_what_is_no_wrapper_is_itself() -> None:
    model, own = make(), nn.Linear(2, 2)
    assert timm_model(model) is model
    assert timm_model(own) is own
    assert {**PLAIN}["depth"] == len(blocks(model))
