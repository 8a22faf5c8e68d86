"""FSDP2 against DDP, DDP against one process, an average of the weights against a literal one; shards as files."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
from conftest import ROOT, tiny_model
from PIL import Image
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from sharding_runs import CLIP, TASKS, Spy, beit, data2vec, fit, segment, swin
from test_files import shards
from torch import Tensor, nn

from unimim import DecoderHead, PixelTarget, VisibleStudent, load_backbone
from unimim.training.shards import blocks, wrapping_policy

NARROW = {"embed_dim": 16, "depth": 3, "num_heads": 2}


class Runs:
    """What two processes found, and the files that they wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, str(ROOT / "tests" / "sharding_runs.py"), str(folder)]
        with (folder / "log").open("w") as log:
            started = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                started.wait(timeout=400)
            finally:  # of a process that died, the other waits
                with suppress(ProcessLookupError):
                    os.killpg(started.pid, signal.SIGKILL)
        assert started.returncode == 0, (folder / "log").read_text()[-4000:]
        self.found: dict[str, Any] = json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_fsdp2_is_ddp(runs: Runs, name: str) -> None:
    """After four clipped steps, also with activations computed again, two batches a step, and an average that follows."""
    found = runs.found["tasks"][name]
    assert found["difference"] <= 1e-6
    assert found["moved"] > 1e-4
    assert found["least norm"] > CLIP
    assert found["in shards"]
    assert 0.4 < found["share"] < 0.65  # a position table has one row, which the first process holds
    assert found["losses"][0] == pytest.approx(found["losses"][1], abs=1e-6)
    assert found["features"] <= 1e-6
    assert found["guard's norm"] == pytest.approx(found["last norm"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune", "swin", "segment"])
def test_shards_validate_as_ddp_does(runs: Runs, name: str) -> None:
    """Five images, of which one process has three with more windows: no process may wait for the other's next forward pass."""
    whole, sharded = runs.found["tasks"][name]["metrics"]
    assert [key for key in whole if key.startswith("val/")]
    assert whole == pytest.approx(sharded, abs=1e-6)
    if name == "segment":
        whole, sharded = runs.found["tasks"][name]["counted"]
        assert whole == sharded == 32 * (32 + 64 + 96)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TASKS if name != "segment"])
def test_two_processes_are_one(runs: Runs, name: str) -> None:
    """Half the batch in each: the gradients and the logged loss are those of the whole batch in one.

    Not segmentation: its batch norms see a process's images, and torch's synchronised ones need a GPU.
    """
    spy = Spy()
    fit(TASKS[name](), processes=1, callbacks=[spy], accumulate_grad_batches=2 if name == "swin" else 1)
    for gradients in torch.load(runs.folder / f"{name}.gradients", weights_only=True):
        assert gradients.keys() == spy.gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, spy.gradients[key], atol=1e-5, rtol=1e-5)
    for losses in runs.found["tasks"][name]["losses"]:
        assert losses == pytest.approx(spy.losses, abs=1e-5)


@pytest.mark.slow
def test_a_frozen_teacher_is_in_no_shard_and_no_file(runs: Runs) -> None:
    assert runs.found["tasks"]["beit"]["frozen"] == ["Parameter", "Parameter"]
    assert not [key for key in torch.load(runs.folder / "beit.gradients", weights_only=True)[1] if "teacher" in key]
    assert not [key for key in beit().state_dict() if "teacher" in key]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "loss, DDP", "shard"])
def test_an_update_that_is_not_finite_in_one_process_is_left_out_in_both(runs: Runs, name: str) -> None:
    """Its loss alone, or one number in one shard of a gradient."""
    found = runs.found["skipped"]
    assert found["left out"] == {"skipped": 0, "steps": [3.0], "difference": 0}
    assert found["made"]["steps"] == [4.0]
    assert found["made"]["difference"] > 1e-4
    assert found[name]["skipped"] == 1
    assert found[name]["steps"] == [3.0]
    assert found[name]["difference"] <= (1e-6 if "DDP" in name else 0)
    for said in found[name].get("ends", []):
        assert said.startswith("NotFiniteError: the loss or its gradient became NaN or infinite by step 2")


@pytest.mark.slow
def test_the_norm_counts_whole_gradients_once_and_takes_one_collective(runs: Runs) -> None:
    found = runs.found["norms"]
    assert found["ours"] == pytest.approx(found["literal"], rel=1e-6)
    assert found["collectives"] == 1


@pytest.mark.slow
def test_processes_wait_for_each_other_only_where_the_loss_is_logged(runs: Runs) -> None:
    """In the second step, and in the epoch's last; what is logged is the mean of both processes."""
    found = runs.found["logged"]
    assert found["barriers"] == [0, 1, 1]
    means = [sum(losses) / 2 for losses in zip(*found["losses"], strict=True)]
    assert found["losses"][0] != found["losses"][1]
    assert found["logged"][0] is None
    assert found["logged"][1:] == pytest.approx(means[1:], abs=1e-6)


@pytest.mark.slow
def test_mixed_precision_is_ddps(runs: Runs) -> None:
    half = runs.found["half"]
    assert half["kept"] == ["torch.float32"]
    assert half["kept in half"] == ["torch.bfloat16"]
    assert half["difference"] <= 1e-6
    assert half["from single"] > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "file"])
def test_shards_go_on_where_they_were(runs: Runs, kind: str) -> None:
    """Saved as a folder of shards, or as one file; with the average that is the teacher."""
    assert runs.found["resumed"][kind] == 0


@pytest.mark.slow
def test_shards_become_a_file_that_load_backbone_reads(runs: Runs, tmp_path: Path) -> None:
    shards, file = runs.folder / "shards" / "1.ckpt", tmp_path / "whole.ckpt"
    with pytest.raises(ValueError, match=r"1.ckpt is a folder of shards: make it one file with python -m lightning_fabric"):
        load_backbone(shards)
    module = "lightning_fabric.utilities.consolidate_checkpoint"
    command = [sys.executable, "-m", module, str(shards), "--output_file", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    expected = torch.load(runs.folder / "shards.weights", weights_only=True)
    for path in (file, runs.folder / "file" / "1.ckpt"):
        content = torch.load(path, weights_only=True)
        assert content["state_dict"].keys() == expected.keys() == data2vec().state_dict().keys()
        backbone = load_backbone(path)
        report = backbone.load_report
        kinds = [getattr(report, kind) for kind in ("loaded", "dropped")]
        assert {key for kind in kinds for key in kind} == expected.keys()
        assert not report.problems
        for key, value in backbone.state_dict().items():
            torch.testing.assert_close(value, expected[f"student.backbone.{key}"], rtol=0, atol=0)


@pytest.mark.slow
def test_what_cannot_be_sharded_is_refused(runs: Runs) -> None:
    refused = runs.found["refused"]
    assert refused["average"].startswith("UserError: trainer.callbacks: EMAWeightAveraging holds a whole copy, which cannot")
    assert "\n" not in refused["average"]
    assert "set data_parallel_size to 2 and tensor_parallel_size to 1" in refused["tensor parallel"]
    assert "model.inference: whole resizes a copy of the backbone" in refused["whole"]
    assert "SyncBatchNorm expected input tensor to be on GPU" in refused["batch norm"]  # so they are synchronised on one


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("vit_tiny_patch16_224", NARROW, ["blocks.0", "blocks.1", "blocks.2"]),
        ("beit_base_patch16_224", NARROW, ["blocks.0", "blocks.1", "blocks.2"]),
        ("eva02_tiny_patch14_224", NARROW, ["blocks.0", "blocks.1", "blocks.2"]),
        (
            "swin_tiny_patch4_window7_224",
            {"embed_dim": 8, "depths": (1, 2), "num_heads": (1, 1)},
            ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"],
        ),
        (
            "convnext_atto",
            {"dims": (8, 8, 8, 8), "depths": (1, 1, 2, 1)},
            ["stages.0.blocks.0", "stages.1.blocks.0", "stages.2.blocks.0", "stages.2.blocks.1", "stages.3.blocks.0"],
        ),
        ("resnet10t", {}, []),
    ],
)
def test_blocks_are_found_by_structure(name: str, options: dict[str, Any], expected: list[str]) -> None:
    model = timm.create_model(name, **options)
    names = {module: key for key, module in model.named_modules()}
    assert [names[block] for block in blocks(model)] == expected


def test_the_policy_of_fsdp1_wraps_each_block() -> None:
    """As FSDP1 asks it; a training needs a GPU."""
    student = VisibleStudent("vit_tiny_patch16_224", {**NARROW, "patch_size": 8, "img_size": 32})
    model = tiny_model(student=student, teacher=PixelTarget(8), head=lambda s, t: DecoderHead(s, t, 16, 2, 2))
    chosen = wrapping_policy(model)._run_policy(model, ignored_modules=set(), root_kwargs={})
    names = {module: key for key, module in model.named_modules()}
    assert [names[module] for module in chosen if module is not model] == [
        *(f"student.backbone.blocks.{i}" for i in range(3)),
        *(f"head.blocks.{i}" for i in range(2)),
    ]


def attached(task: Any, strategy: Any) -> Any:
    """A task as its `configure_model` finds it, under a strategy that this machine cannot run."""
    task._trainer = SimpleNamespace(strategy=strategy, callbacks=[], world_size=1)
    return task


def test_an_average_under_fsdp1_is_refused() -> None:
    with pytest.raises(ValueError, match="model.teacher: an average cannot follow the flat shards of FSDPStrategy: set tr"):
        attached(data2vec(), FSDPStrategy()).configure_model()
    attached(beit(), FSDPStrategy()).configure_model()


def test_batch_norms_on_a_gpu_have_to_be_synchronised() -> None:
    strategy: Any = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    strategy.parallel_devices = [torch.device("cuda", 0)]
    strategy._device_mesh = {"data_parallel": SimpleNamespace(size=lambda: 1)}
    with pytest.raises(ValueError, match="batch norms would gather statistics of their own .* set trainer.sync_batchnorm"):
        attached(segment(), strategy).configure_model()


# The command line

MODEL = [
    "--model.backbone=vit_tiny_patch16_224",
    "--model.model_args={img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}",
    "--model.num_classes=2",
    "--model.warmup_epochs=0",
]
TWO = ["devices=2", "strategy=ModelParallelStrategy", "strategy.data_parallel_size=2", "strategy.tensor_parallel_size=1"]


@pytest.mark.slow
def test_a_command_trains_in_shards_and_goes_on(tmp_path: Path) -> None:
    for index in range(16):
        folder = tmp_path / "data" / ("train" if index < 12 else "val") / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * index, 100, 200 - 10 * index)).save(folder / f"{index}.png")
    data = ["--data=ClassFolderData", f"--data.root={tmp_path / 'data'}", "--data.image_size=32", "--data.batch_size=2"]
    trainer = [f"--trainer.{option}" for option in ("accelerator=cpu", "enable_progress_bar=false", *TWO)]
    words = ["finetune", "fit", *MODEL, *data, "--data.num_workers=0", *trainer]
    command = [sys.executable, "-m", "unimim", *words]
    first = "outputs/finetune/version_0/checkpoints/epoch=0-step=3.ckpt"
    for more in (["--trainer.max_epochs=1"], ["--trainer.max_epochs=2", f"--ckpt_path={first}"]):
        done = subprocess.run([*command, *more], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / first / "__1_0.distcp").is_file()
    assert "checkpoint: outputs/finetune/version_1/checkpoints/epoch=1-step=6.ckpt" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", *MODEL, "--trainer.strategy=ddp"], "is a folder of shards, which trainer.strategy ddp cannot read: set it to"),
        (["validate", *(f"--trainer.{option}" for option in TWO)], "is a folder of shards: make it one file with python -m"),
    ],
)
def test_a_command_that_cannot_read_shards_says_so(words: list[str], expected: str, tmp_path: Path) -> None:
    from unimim.cli.main import main

    shards(tmp_path / "some.ckpt")
    data = ["--data=ClassFolderData", "--data.root=nowhere"]
    with pytest.raises(SystemExit, match=f"unimim: error: .*some.ckpt {expected}"):
        main(["finetune", *words, *data, f"--ckpt_path={tmp_path / 'some.ckpt'}"])


# An average of the weights


class Weights(pl.Callback):
    """The student's weights after each step."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.after.append({key: value.clone() for key, value in pl_module.student.backbone.state_dict().items()})


def test_an_average_in_pretraining_is_a_literal_one_and_what_load_backbone_gives(tmp_path: Path) -> None:
    """0.5 of itself and 0.5 of each step's weights; the file has no teacher, and the weights to go on from beside it."""
    weights, keep = Weights(), ModelCheckpoint(tmp_path, "end")
    fit(beit(), processes=1, callbacks=[weights, EMAWeightAveraging(decay=0.5, use_buffers=False), keep])
    average = weights.after[0]
    for after in weights.after[1:]:
        average = {key: 0.5 * average[key] + 0.5 * after[key] for key in after}
    loaded = load_backbone(tmp_path / "end.ckpt").state_dict()
    for key, value in loaded.items():
        torch.testing.assert_close(value, average[key])
    content = torch.load(tmp_path / "end.ckpt", weights_only=True)
    learned = {key: content["current_model_state"][f"student.backbone.{key}"] for key in loaded}
    assert all(torch.equal(learned[key], weights.after[-1][key]) for key in loaded)
    assert not all(torch.allclose(learned[key], average[key]) for key in loaded)
    saved = [*content["state_dict"], *content["current_model_state"], *content["averaging_state"]]
    assert not [key for key in saved if "teacher" in key]


@pytest.mark.parametrize("make", [beit, swin])
def test_an_average_of_integers_is_refused(make: Any) -> None:
    """At 0.9999, Lightning's default would change 41 entries of a table of relative positions."""
    with pytest.raises(ValueError, match="EMAWeightAveraging would average integers, and round them to wrong ones: set"):
        fit(make(), processes=1, callbacks=[EMAWeightAveraging(decay=0.9999)])
    model, tables = make(), {key: buffer.clone() for key, buffer in make().named_buffers()}
    fit(model, processes=1, callbacks=[EMAWeightAveraging(decay=0.9999, use_buffers=False)])
    assert any(not table.is_floating_point() for table in tables.values())
    assert all(torch.equal(buffer, tables[key]) for key, buffer in model.named_buffers())


@pytest.mark.slow
def test_an_average_goes_on_in_two_processes(runs: Runs) -> None:
    """Resumed after an epoch it is the same after the second; the averages are what is in the file."""
    assert runs.found["averaged"]["difference"] == 0
    content = [torch.load(runs.folder / folder / "1.ckpt", weights_only=True) for folder in ("averaged", "again")]
    for kept in ("state_dict", "current_model_state"):
        one, other = (each[kept] for each in content)
        assert all(torch.equal(one[key], other[key]) for key in one)
    key = "backbone.head.weight"
    assert not torch.allclose(content[0]["state_dict"][key], content[0]["current_model_state"][key])
    loaded = load_backbone(runs.folder / "averaged" / "1.ckpt")
    assert torch.equal(loaded.head.weight, content[0]["state_dict"][key])


def test_activations_computed_again_give_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (True, False):
        model = tiny_model(masking=beit().masking, checkpointing=checkpointing)
        with torch.no_grad():
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(0))
        assert model.student.backbone.grad_checkpointing is checkpointing
        model.training_step(torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)), 0).backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 20
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
