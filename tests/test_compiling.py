"""The switch `compiled`: each block is one graph, made once, and computes the same, also in shards or computed again."""

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import ROOT, TINY, narrow_recipe, tiny_model, tiny_student
from torch import Tensor, distributed, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from unimim import (
    DecoderHead,
    EMATarget,
    FeatureTarget,
    LayerNorm,
    LinearHead,
    MaskedImageModeling,
    MaskTokenStudent,
    TargetGenerator,
)
from unimim.training.shards import blocks

sys.path.insert(0, str(ROOT / "benchmarks"))
from step import built


def features() -> FeatureTarget:
    name, model_args = TINY["vit"]
    return FeatureTarget(name, weights="random", model_args=model_args)


def step(model: MaskedImageModeling) -> list[Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    torch.manual_seed(1)
    loss = model.training_step(torch.rand(2, 3, 32, 32), 0)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *(g.full_tensor() if isinstance(g, DTensor) else g.clone() for g in gradients)]


def check_same(results: list[Tensor], wanted: list[Tensor]) -> None:
    for result, plain in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("kind", "head", "teacher"),
    [
        ("beit_shared_bias", LinearHead, features),
        ("eva_rotary", LinearHead, features),
        ("visible_vit", partial(DecoderHead, width=8, depth=2, num_heads=2), features),
        ("vit", LinearHead, partial(EMATarget, top_blocks=2)),
    ],
)
def test_blocks_are_whole_graphs_that_compute_the_same(
    kind: str, head: Callable[..., nn.Module], teacher: Callable[[], TargetGenerator], checkpointing: bool
) -> None:
    """`fullgraph` raises at a break, and where a block is compiled once too often. The second step makes no new graph.
    (Swin's blocks are whole graphs as well, but it takes minutes to trace them.)"""
    torch._dynamo.reset()
    counters.clear()
    parts = {"student": tiny_student(kind), "teacher": teacher(), "head": head, "normalization": LayerNorm()}
    model = tiny_model(**parts, checkpointing=checkpointing)
    names = list(model.state_dict())
    eager = step(model)
    model.compile_blocks(backend="eager", fullgraph=True)
    compiled = step(model)
    graphs = counters["stats"]["unique_graphs"]
    again = step(model)
    assert graphs > 0
    assert counters["stats"]["unique_graphs"] == graphs
    check_same(compiled, eager)
    check_same(again, eager)
    assert list(model.state_dict()) == names  # no `_orig_mod`
    check_same(step(copy.deepcopy(model)), eager)  # what an average of the weights keeps


@pytest.mark.slow
def test_every_block_of_a_deep_network_is_compiled() -> None:
    """Each has a drop path of its own, so a graph of its own, of which dynamo makes a limited number for one function."""
    torch._dynamo.reset()
    counters.clear()
    name, model_args = TINY["vit"]
    deep = {**model_args, "depth": 12}
    teacher = FeatureTarget(name, weights="random", model_args=deep)
    student = MaskTokenStudent(name, {**deep, "drop_path_rate": 0.1})
    model = tiny_model(student=student, teacher=teacher, normalization=LayerNorm())
    eager = step(model)
    model.compile_blocks(backend="eager", fullgraph=True)
    check_same(step(model), eager)
    assert counters["stats"]["unique_graphs"] >= 12


@pytest.mark.slow
def test_blocks_that_are_compiled_and_then_sharded_compute_the_same() -> None:
    """In Lightning's order: `setup`, then `configure_model`."""
    torch._dynamo.reset()
    model = tiny_model(teacher=features(), normalization=LayerNorm())
    eager, names = step(model), list(model.state_dict())
    model.compile_blocks(backend="eager")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for part in (*blocks(model.student), model.student.backbone, model.student):
            fully_shard(part, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))
        distributed.fsdp.register_fsdp_forward_method(model.student.backbone, "forward_features")
        check_same(step(model), eager)
        assert list(model.state_dict()) == names
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(("given", "compiled"), [(None, False), (False, False), (True, True)])
def test_the_switch(given: bool | None, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing is compiled unasked."""
    model = tiny_model(teacher=features(), normalization=LayerNorm(), compiled=given)
    calls: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: calls.append(self))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, **quiet)  # type: ignore[arg-type]
    trainer.fit(model, DataLoader(torch.rand(2, 3, 32, 32), batch_size=2))
    wanted = [*blocks(model.student), *(block for network in model.teacher.networks() for block in blocks(network))]
    assert calls == (wanted if compiled else [])


RECIPES = sorted((ROOT / "conf" / "pretrain").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_compiled_is_the_plain_one_and_is_traced_in_the_first_steps_only(recipe: Path, tmp_path: Path) -> None:
    """Five steps: loss and gradients of each, and no new graph after the second."""
    torch._dynamo.reset()
    counters.clear()
    model = built(str(narrow_recipe(recipe, tmp_path)))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(5, 2, 3, *model.student.image_size)

    def five() -> tuple[list[list[Tensor]], list[int]]:
        results, graphs = [], []
        for number, batch in enumerate(images):
            model.zero_grad()
            torch.manual_seed(number)
            loss = model.training_step(batch, 0)
            loss.backward()
            results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
            graphs.append(counters["stats"]["unique_graphs"])
        return results, graphs

    eager, _ = five()
    model.load_state_dict(state)  # a running mean has moved
    model.compile_blocks(backend="eager")
    compiled, graphs = five()
    assert graphs[0] > 0
    assert graphs[1:] == [graphs[1]] * 4
    for results, wanted in zip(compiled, eager, strict=True):
        check_same(results, wanted)
