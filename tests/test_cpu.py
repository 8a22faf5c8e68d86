"""On a CPU a step keeps less and multiplies otherwise, with the gradients of torch's own layers."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
from conftest import TINY, tiny_model, tiny_student
from pytorch_lightning.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from timm.layers import LayerScale, Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from unimim import (
    CachedTarget,
    DecoderHead,
    FeatureTarget,
    FineTuning,
    LinearProbe,
    MaskedImageModeling,
    PixelTarget,
    UperNetSegmentation,
)
from unimim.caching.target import FixedViews
from unimim.tasks.probing import extract_features
from unimim.training import cpu
from unimim.training.cpu import CPUPrecision, FasterOnCPU, Linear, choose_cpu_precision, faster_on_cpu

pytestmark = pytest.mark.usefixtures("multiplied_by")


class Called(TorchDispatchMode):
    """Counts torch's own operations within it."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        self.times[str(function)] += 1
        return function(*args, **(kwargs or {}))


def noisy(module: nn.Module) -> nn.Module:
    """Every parameter drawn: what is initialized to 0 or 1 hides mistakes."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def both(run: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Value and gradients of a run within `FasterOnCPU`, and of the same run without."""
    results = []
    for within in (True, False):
        torch.manual_seed(1)
        for leaf in leaves:
            leaf.grad = None
        if within:
            with FasterOnCPU():
                value = run()
        else:
            value = run()
        (value * torch.linspace(-1, 1, value.numel()).view_as(value)).sum().backward()
        results.append([value.detach(), *(None if leaf.grad is None else leaf.grad.clone() for leaf in leaves)])
    return results[0], results[1]


def check(run: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    """Both ways agree, also on who has no gradient."""
    found, wanted = both(run, leaves)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6 * max(1.0, float(theirs.abs().max())))


def kept(run: Callable[[], Tensor], apart_from: list[Tensor]) -> int:
    """Bytes that the backward pass of a run keeps, without those of these tensors."""
    found, known = {}, {tensor.untyped_storage().data_ptr() for tensor in apart_from}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
        size = sum(count for place, count in found.items() if place not in known)
    del result
    return size


NETWORKS = {
    **{kind: TINY[kind] for kind in ("vit", "beit_shared_bias", "beit_bias_per_block", "eva_rotary", "swin")},
    "vit_with_layer_scale": ("vit_tiny_patch16_224", {**TINY["vit"][1], "init_values": 0.1}),
    "clip": ("vit_base_patch16_clip_quickgelu_224.openai", TINY["vit"][1]),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_of_timm_have_the_same_values_and_gradients(kind: str) -> None:
    """With drop path, whose draws are not moved."""
    name, model_args = NETWORKS[kind]
    network = noisy(timm.create_model(name, drop_path_rate=0.3, num_classes=5, **model_args)).train()
    images = torch.rand(3, 3, 32, 32, requires_grad=True)
    check(lambda: network(images), [images, *network.parameters()])


@pytest.mark.parametrize(
    "of", [nn.LayerNorm(6), nn.LayerNorm(6, elementwise_affine=False), nn.GELU(), nn.GELU("tanh"), nn.SiLU()]
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_behind_what_is_cheap(of: nn.Module, bias: bool) -> None:
    first, second = noisy(nn.Linear(4, 6)), noisy(nn.Linear(6, 5, bias=bias))
    noisy(of)
    x = torch.randn(2, 3, 7, 4, requires_grad=True)
    check(lambda: second(of(first(x))), [x, *first.parameters(), *of.parameters(), *second.parameters()])
    frozen = noisy(nn.Linear(6, 5)).requires_grad_(False)
    check(lambda: frozen(of(first(x))), [x, *first.parameters(), *frozen.parameters()])


@pytest.mark.parametrize("learns", ["all", "scale", "weight", "bias", "input", "all but scale"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_scale_behind_a_linear_layer(bias: bool, learns: str) -> None:
    """Of each of them alone too."""
    layer, scale = noisy(nn.Linear(4, 6, bias=bias)), noisy(LayerScale(6))
    x = torch.randn(2, 3, 4)
    parts = {"scale": scale.gamma, "weight": layer.weight, "bias": layer.bias, "input": x}
    for name, part in parts.items():
        if part is not None:
            part.requires_grad_((name == learns or learns.startswith("all")) and learns != f"all but {name}")
    leaves = [part for part in parts.values() if part is not None]
    if any(leaf.requires_grad for leaf in leaves):
        check(lambda: scale(layer(x)), leaves)
        check(lambda: scale.gamma * layer(x), leaves)


def test_what_someone_else_uses_too() -> None:
    """A layer norm behind which two layers are, a linear layer's result beside its scaled one, and weights that are shared."""
    norm, first, second, scale = noisy(nn.LayerNorm(4)), noisy(nn.Linear(4, 4)), noisy(nn.Linear(4, 4)), noisy(LayerScale(4))
    x = torch.randn(3, 4, requires_grad=True)
    leaves = [x, *norm.parameters(), *first.parameters(), *second.parameters(), scale.gamma]

    def run() -> Tensor:
        normed = norm(x)
        one, two = first(normed), second(normed)
        again = first(scale(two))
        return normed + one.sin() + scale(again) * again + two

    check(run, leaves)


@pytest.mark.parametrize("change", ["norm", "activation", "linear", "a part"])
def test_what_was_changed_in_place_is_not_made_again(change: str) -> None:
    """It may be changed, as torch allows, and counts as changed."""
    norm, layer, scale = nn.LayerNorm(4), noisy(nn.Linear(4, 4)), noisy(LayerScale(4))
    x = torch.randn(2, 3, 4, requires_grad=True)

    def run() -> Tensor:
        tokens = norm(x) if change == "norm" else F.gelu(x * 1.5)
        if change in ("norm", "activation"):
            tokens = tokens.mul_(3)
        result = layer(tokens)
        if change == "linear":
            result += 1
        elif change == "a part":
            result[..., :2].mul_(2)
        return scale(result)

    check(run, [x, *norm.parameters(), *layer.parameters(), scale.gamma])


def test_in_place_layers_of_networks() -> None:
    layers = [nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 4), LayerScale(4, inplace=True), nn.Linear(4, 4)]
    network = noisy(nn.Sequential(*layers, nn.Dropout(0.5, inplace=True)))
    x = torch.randn(2, 3, 4, requires_grad=True)
    check(lambda: network(x), [x, *network.parameters()])
    qkv = torch.randn(3, 2, 2, 5, 4, requires_grad=True)
    bias = torch.randn(1, 2, 5, 5, requires_grad=True)
    check(lambda: F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=bias).mul_(2), [qkv, bias])


def test_a_scale_of_a_layer_whose_input_has_changed_since() -> None:
    """Frozen, torch allows it: the scale's gradient is of what the layer gave. Else both refuse."""
    layer, scale = noisy(nn.Linear(4, 4)), nn.Parameter(torch.randn(4))
    x = torch.randn(2, 3, 4, requires_grad=True)

    def run() -> Tensor:
        tokens = x * 1
        given = layer(tokens)
        tokens += 1
        return tokens + scale * given

    layer.requires_grad_(False)
    check(run, [x, scale])
    layer.requires_grad_(True)
    for within in (FasterOnCPU(), nullcontext()):
        with within:
            result = run()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()


def test_biases_that_torch_spreads_and_products_by_name() -> None:
    weight, x = torch.randn(5, 4, requires_grad=True), torch.randn(2, 3, 4, requires_grad=True)
    for shape in ((), (1,), (1, 5), (3, 5), (2, 3, 5)):
        bias = torch.randn(shape, requires_grad=True)
        check(lambda bias=bias: F.linear(x, weight, bias), [x, weight, bias])  # type: ignore[misc]
    check(lambda: F.linear(x, weight[0]), [x, weight])
    scale = nn.Parameter(torch.randn(5))
    check(lambda: F.linear(x, weight).mul(other=scale), [x, weight, scale])


def test_a_bias_may_change_before_the_backward_pass() -> None:
    """As torch has it: its gradient does not depend on it."""
    layer, x = noisy(nn.Linear(4, 4)), torch.randn(3, 4)
    with FasterOnCPU():
        result = layer(x)
    with torch.no_grad():
        layer.bias += 1
        layer.weight += 1  # x needs no gradient
    result.sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(4, 4))


def test_hooks_see_what_they_saw() -> None:
    """Those of modules, forward and backward, and of tensors; a gradient that is kept is there."""
    scale, mlp = noisy(LayerScale(4)), noisy(Mlp(4, 8))
    x = torch.randn(3, 4, requires_grad=True)
    seen: list[Tensor] = []

    def run(what: str) -> Tensor:
        handles = []
        if what == "backward":
            for module in (mlp.fc1, mlp.fc2, mlp.act):
                handles.append(
                    module.register_full_backward_hook(lambda module, of_input, of_output: seen.append(of_output[0]))
                )
        elif what == "forward":
            handles.append(mlp.act.register_forward_hook(lambda module, inputs, output: output * 2))
        result = mlp(x)
        if what == "tensor":
            result.register_hook(lambda gradient: seen.append(gradient))
        elif what == "kept":
            result.retain_grad()
        scaled = scale(result)
        if what == "kept":
            scaled.sum().backward()
            assert result.grad is not None
            seen.append(result.grad)
            scaled = scale(mlp(x))
        for handle in handles if what == "forward" else []:
            handle.remove()
        return scaled

    for what, times in (("backward", 3), ("forward", 0), ("tensor", 1), ("kept", 1)):
        found: list[list[Tensor]] = []
        for within in (True, False):
            seen.clear()
            if within:
                with FasterOnCPU():
                    value = run(what)
            else:
                value = run(what)
            value.sum().backward()
            found.append([value.detach(), *(gradient.clone() for gradient in seen)])
            for module in mlp.modules():
                module._backward_hooks.clear()
        assert len(found[0]) == times + 1
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


BIAS = {
    "one for all images": ((1, 2, 5, 5), {}),
    "without an axis for images": ((2, 5, 5), {}),
    "one an image": ((3, 2, 5, 5), {}),
    "one for all heads": ((1, 1, 5, 5), {}),
    "with another scale": ((1, 2, 5, 5), {"scale": 0.3}),
    "scale 0": ((1, 2, 5, 5), {"scale": 0.0}),
}


@pytest.mark.parametrize("piece", [1, 2**20])
@pytest.mark.parametrize("kind", BIAS)
def test_attention_with_a_bias_that_learns(kind: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces of one image, and at once."""
    monkeypatch.setattr(cpu, "PIECE", piece)
    shape, options = BIAS[kind]
    qkv = torch.randn(3, 5, 3, 2, 4, requires_grad=True)
    bias = torch.randn(shape, requires_grad=True)
    layer = noisy(nn.Linear(8, 6))

    def run() -> Tensor:
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, **options)
        return layer(found.transpose(1, 2).reshape(3, 5, 8))

    check(run, [qkv, bias, *layer.parameters()])


def test_attention_of_other_keys_and_what_is_left_to_torch() -> None:
    query, key, value = (torch.randn(2, 2, n, 4, requires_grad=True) for n in (3, 5, 5))
    bias = torch.randn(1, 2, 3, 5, requires_grad=True)
    check(lambda: F.scaled_dot_product_attention(query, key, value, bias), [query, key, value, bias])
    check(lambda: F.scaled_dot_product_attention(query, key, value, bias.detach()), [query, key, value])
    check(lambda: F.scaled_dot_product_attention(query, key, value), [query, key, value])
    one, few = query[:1], torch.randn(1, 2, 3, 5, requires_grad=True)  # one image asks all
    check(lambda: F.scaled_dot_product_attention(one, key, value, few), [query, key, value, few])
    hidden = torch.zeros(3, 5)
    hidden[1], hidden[2, :3] = -torch.inf, -torch.inf
    check(lambda: F.scaled_dot_product_attention(query, key, value, bias + hidden), [query, key, value, bias])
    check(lambda: F.scaled_dot_product_attention(query[0, 0], key[0, 0], value[0, 0], bias[0, 0]), [query, key, value, bias])
    mode = FasterOnCPU()
    assert mode.attention(query, key, value, bias) is not None
    assert mode.attention(query, key, value, bias, dropout_p=0.5) is None
    assert mode.attention(query, key, value, bias.double()) is None
    assert mode.attention(query[:, :, :0], key, value, bias[:, :, :0]) is None
    with torch.no_grad():
        assert mode.attention(query, key, value, bias) is None


@pytest.mark.parametrize(
    ("run", "numbers"),
    [
        ("norm", 0),  # beside what the layer norm keeps itself
        ("gelu", 0),
        ("scale", 24 * 4),  # the input of the linear layer, not its result
    ],
)
def test_what_is_not_kept(run: str, numbers: int) -> None:
    """Beside the tensors that are there anyway."""
    norm, layer, scale = noisy(nn.LayerNorm(4)), noisy(nn.Linear(4, 4)), noisy(LayerScale(4))
    x = torch.randn(24, 4, requires_grad=True)
    parameters = [*norm.parameters(), *layer.parameters(), scale.gamma]
    runs = {
        "norm": lambda: layer(norm(x)),
        "gelu": lambda: layer(F.gelu(x)),
        "scale": lambda: scale(layer(x.sin())),
    }
    without = kept(runs[run], [x, *parameters])
    with FasterOnCPU():
        within = kept(runs[run], [x, *parameters])
    statistics = 2 * 24 if run == "norm" else 0  # mean and spread of each row
    assert within == 4 * (numbers + statistics)
    assert without == within + 4 * 24 * 4


def test_no_map_of_attention_is_kept() -> None:
    qkv = torch.randn(3, 4, 2, 50, 8, requires_grad=True)
    bias = torch.randn(1, 2, 50, 50, requires_grad=True)

    def run() -> Tensor:
        return F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=bias)

    with FasterOnCPU():
        assert kept(run, [qkv, bias]) == 0
    assert kept(run, [qkv, bias]) >= 4 * 4 * 2 * 50 * 50


def test_attention_with_a_bias_that_learns_is_the_fused_kernel() -> None:
    qkv, bias = torch.randn(3, 2, 2, 5, 4, requires_grad=True), torch.randn(1, 2, 5, 5, requires_grad=True)
    fused = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    with Called() as called, FasterOnCPU():
        F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=bias)
    assert called.times[fused] == 1
    with Called() as called:
        F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=bias)
    assert called.times[fused] == 0  # torch's own choice, which keeps the maps


def test_who_multiplies(multiplied_by: str) -> None:
    results, gradients = int(multiplied_by != "mkl"), int(multiplied_by == "onednn")
    with Called() as called, FasterOnCPU():
        value = nn.Linear(4, 6)(torch.randn(2, 4, requires_grad=True))
    assert called.times["mkldnn._linear_pointwise.default"] == results
    with Called() as called:
        value.sum().backward()
    assert called.times["mkldnn._linear_pointwise.default"] == gradients
    assert called.times["aten.mkldnn_linear_backward_weights.default"] == gradients
    assert called.times["aten.mm.default"] == 2 * (1 - gradients)


def test_two_runs_are_the_same_bits() -> None:
    """With layers that are wide by themselves, and several threads."""
    mlp, x = noisy(Mlp(256, 1024)), torch.randn(8, 50, 256, requires_grad=True)
    runs = []
    for _ in range(2):
        mlp.zero_grad()
        x.grad = None
        with FasterOnCPU():
            value = mlp(x)
        value.square().sum().backward()
        runs.append([value.detach(), x.grad, *(parameter.grad for parameter in mlp.parameters())])
    assert all(torch.equal(ours, again) for ours, again in zip(*runs, strict=True))


def test_after_the_backward_pass_nothing_is_held() -> None:
    """Not by a loss that is still there, as it is while the optimizer makes its step."""
    name, model_args = TINY["beit_shared_bias"]
    network = noisy(timm.create_model(name, **model_args)).train()
    born: list[weakref.ref[Any]] = []
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.GELU)):
            module.register_forward_hook(lambda module, inputs, output: born.append(weakref.ref(output.untyped_storage())))
    with FasterOnCPU() as mode:
        loss = network(torch.rand(2, 3, 32, 32)).sum()
    loss.backward()
    assert mode.latest is None
    gc.collect()
    assert len(born) > 8
    assert [ref() for ref in born] == [None for _ in born]


def test_only_float32_on_a_cpu_is_replaced(multiplied_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Double precision, autocast and a frozen or narrow layer are torch's own."""
    called: list[object] = []

    def applied(*arguments: object) -> Tensor:
        called.append(arguments)
        return torch.zeros(3, 6)

    monkeypatch.setattr(Linear, "apply", applied)
    layer, x = nn.Linear(4, 6), torch.randn(3, 4)
    with FasterOnCPU():
        assert layer.double()(x.double()).dtype == torch.float64
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        with torch.no_grad():
            torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)
        assert layer(x[:0]).shape == (0, 6)
        by_onednn = multiplied_by == "onednn"
        monkeypatch.setattr(cpu, "WIDE", 24 + by_onednn)
        monkeypatch.setattr(cpu, "WIDE_BY_ONEDNN", 25 - by_onednn)
        assert not layer(x).any()
        monkeypatch.setattr(cpu, "WIDE", 25 - by_onednn)
        monkeypatch.setattr(cpu, "WIDE_BY_ONEDNN", 24 + by_onednn)
        assert layer(x).any()
    assert len(called) == 1


def test_who_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled or computed again, and another device."""
    network = timm.create_model("vit_tiny_patch16_224", **TINY["vit"][1])
    task = nn.Sequential(network)
    assert isinstance(faster_on_cpu(task), FasterOnCPU)
    network.set_grad_checkpointing()
    assert not isinstance(faster_on_cpu(task), FasterOnCPU)
    network.set_grad_checkpointing(False)
    assert not isinstance(faster_on_cpu(nn.Sequential(network, nn.Linear(4, 4, device="meta"))), FasterOnCPU)
    with monkeypatch.context() as without_onednn:
        without_onednn.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        assert not isinstance(faster_on_cpu(task), FasterOnCPU)
    assert isinstance(faster_on_cpu(task), FasterOnCPU)
    assert not isinstance(faster_on_cpu(nn.Sequential(torch.compile(nn.Linear(4, 4)))), FasterOnCPU)
    network.blocks[0].compile()
    assert not isinstance(faster_on_cpu(task), FasterOnCPU)


def within(model: nn.Module, run: Callable[[], object]) -> Callable[[], object]:
    """The run as a Trainer with `CPUPrecision` would have it."""

    def running() -> object:
        precision = CPUPrecision()
        precision.connect(model, [], [])
        with precision.forward_context():
            return run()

    return running


def without_gradient(kind: str) -> Callable[[], object]:
    """What runs a narrow ViT over a batch, and learns nothing by it."""
    name, model_args = TINY["vit"][0], TINY["vit"][1] | {"depth": 4}
    images, labels = torch.rand(2, 3, 32, 32), torch.arange(2)
    if kind == "features":
        network = timm.create_model(name, global_pool="", num_classes=0, **model_args)
        return lambda: extract_features(network, [(images, labels)])
    if kind == "probe":
        probe = LinearProbe(timm.create_model(name, global_pool="", num_classes=0, **model_args), num_classes=2)
        return within(probe, lambda: probe(images))
    if kind == "cache":
        model = tiny_model(teacher=CachedTarget(FeatureTarget(name, weights="random", model_args=model_args), "."))
        trainer = pl.Trainer(accelerator="cpu", plugins=[CPUPrecision()], logger=False, enable_checkpointing=False)
        trainer.precision_plugin.connect(model, [], [])
        return lambda: FixedViews(model.teacher).looked(trainer, model, images)  # type: ignore[arg-type]
    task: Any = FineTuning if kind.startswith("classes") else UperNetSegmentation
    model = task(name, num_classes=6, model_args=model_args, **({} if task is FineTuning else {"channels": 4}))
    model.eval()
    model.log = lambda *_, **__: None
    if kind.endswith("predicted"):
        return within(model, lambda: model.predict_step(images, 0))
    return within(
        model,
        lambda: model.validation_step((images, labels if task is FineTuning else torch.zeros(2, 32, 32, dtype=torch.long)), 0),
    )


@pytest.mark.parametrize(
    "kind", ["features", "probe", "cache", "classes", "classes predicted", "segments", "segments predicted"]
)
def test_what_runs_without_a_gradient_is_multiplied_so_too(kind: str, multiplied_by: str) -> None:
    run = without_gradient(kind)
    with torch.inference_mode(), Called() as called:
        run()
    times = called.times["mkldnn._linear_pointwise.default"]
    assert times == 0 if multiplied_by == "mkl" else times >= 4 * 4  # 4 blocks


def test_what_a_user_computes_again_is_plain() -> None:
    """torch.utils.checkpoint wants the same tensors kept both times."""
    norm, layer, x = noisy(nn.LayerNorm(4)), noisy(nn.Linear(4, 4)), torch.randn(3, 4, requires_grad=True)
    for reentrant in (False, True):
        check(
            lambda reentrant=reentrant: layer(norm(checkpoint(lambda t: layer(norm(t)), x, use_reentrant=reentrant))),  # type: ignore[misc]
            [x, *norm.parameters(), *layer.parameters()],
        )


@pytest.mark.parametrize("kind", ["beit_shared_bias", "visible_vit"])
def test_a_step_is_the_step_without(kind: str) -> None:
    """The whole training step of a task; and it does keep less."""
    changes: dict[str, Any] = {"student": tiny_student(kind)}
    if kind == "visible_vit":
        changes |= {"head": partial(DecoderHead, width=8, depth=2, num_heads=2), "teacher": PixelTarget(8)}
    model = tiny_model(**changes)
    images, parameters = torch.rand(3, 3, 32, 32), [p for p in model.parameters() if p.requires_grad]
    sizes, gradients = [], []
    for precision in (CPUPrecision(), Precision()):
        precision.connect(model, [], [])
        model.zero_grad()
        torch.manual_seed(1)
        with precision.train_step_context():
            sizes.append(kept(lambda: model.training_step(images, 0), parameters))
        torch.manual_seed(1)
        with precision.train_step_context():
            loss = model.training_step(images, 0)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in parameters)])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert sizes[0] < 0.8 * sizes[1]


class OwnStep(MaskedImageModeling):
    """A user's, whose step is written anew."""

    def training_step(self, images: Tensor, batch_idx: int) -> Tensor:
        mask = self.masking(images, self.student.grid_size)
        self.within.append(any(isinstance(mode, FasterOnCPU) for mode in _get_current_function_mode_stack()))
        prediction = self.head(self.student(images, mask), mask, mask)
        return self.logged(prediction.square().mean())


@pytest.mark.parametrize("plugins", [[], [CPUPrecision()]], ids=["plain", "plugin"])
def test_a_step_of_ones_own_is_faster_too(plugins: list[Any]) -> None:
    """Lightning enters the plugin's context around every step, whoever wrote it."""
    model = tiny_model(OwnStep)
    model.within = []
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, plugins=plugins, **quiet)  # type: ignore[arg-type]
    trainer.fit(model, DataLoader(torch.rand(4, 3, 32, 32), batch_size=2))
    assert model.within == [bool(plugins)] * 2
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize(
    ("chosen", "taken"),
    [
        ({}, CPUPrecision),
        ({"precision": "32-true"}, CPUPrecision),
        ({"precision": "bf16-mixed"}, MixedPrecision),
        ({"precision": "64-true"}, DoublePrecision),
        ({"plugins": [HalfPrecision("bf16-true")]}, HalfPrecision),
    ],
    ids=["nothing", "32", "bf16", "64", "a plugin"],
)
def test_the_command_line_takes_it_where_nothing_else_is_chosen(chosen: dict[str, Any], taken: type) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, **chosen)
    choose_cpu_precision(trainer)
    assert type(trainer.precision_plugin) is taken
