"""A cluster's accidents: what is lost is at most what came after the last checkpoint, and each is told in one line."""

import functools
import itertools
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import tiny_model
from PIL import Image
from test_cli import SMALL
from torch import Tensor, nn
from torch.distributed import checkpoint as shards_of
from torch.nn import functional as F
from torch.utils.data import DataLoader

from unimim import (
    AtomicCheckpointIO,
    CenteredSoftmax,
    EMAHeadTarget,
    FineTuning,
    MaskedImageModeling,
    PrototypeHead,
    SoftCrossEntropyLoss,
    StopOnSignal,
    UperNetSegmentation,
)
from unimim.cli.tasks import differing, finetune, in_one_line, pretrain
from unimim.tasks.optim import fused_adamw
from unimim.training.checkpoints import is_whole, newest_first, recipe_in, replace
from unimim.weights.written import machine

SECONDS = 240
"""After which a test with processes of its own has failed; unhurried they take 15 to 30 seconds each."""
STEADY = ["--data.crop_scale=[1.0, 1.0]", "--data.flip=0", "--data.color_jitter=0", "--model.warmup_epochs=0"]


class NaNAt(nn.Module):
    """MSE; in the listed calls the loss, or only its gradient, is not a number. (The first call is the trial at the start.)"""

    def __init__(self, *calls: int, gradient_only: bool = False) -> None:
        super().__init__()
        self.calls, self.gradient_only, self.count = calls, gradient_only, 0

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        loss = F.mse_loss(prediction, target)
        self.count += 1
        if self.count - 1 not in self.calls:
            return loss
        return loss + (loss.detach() - loss).sqrt() if self.gradient_only else loss * torch.nan


class Watch(pl.Callback):
    """Weights, buffers that are saved, and optimizer state, before and after every batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, Tensor]] = []

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        state = {name: tensor.detach().clone() for name, tensor in pl_module.state_dict().items()}
        for i, moments in enumerate(trainer.optimizers[0].state.values()):
            state.update({f"{i}.{name}": value.clone() for name, value in moments.items()})
        self.states.append(state)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.look(trainer, pl_module)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self.look(trainer, pl_module)

    def changed(self) -> list[bool]:
        """For every batch, whether anything did."""
        pairs = zip(self.states, self.states[1:], strict=False)
        return [
            before.keys() != after.keys() or any(not torch.equal(before[k], after[k]) for k in after) for before, after in pairs
        ]


def fit(model: pl.LightningModule, data: object, tmp_path: Path, **trainer: object) -> tuple[pl.Trainer, Watch]:
    watch = Watch()
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **trainer}
    options["callbacks"] = [watch, *options.get("callbacks", [])]
    runner = pl.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False, **options
    )
    loader = data if isinstance(data, DataLoader) else DataLoader(data, batch_size=2)
    runner.fit(model, loader)
    return runner, watch


# Updates that are not finite


def test_the_fused_optimizer_is_adamw() -> None:
    torch.manual_seed(1)
    start, gradients = torch.randn(50), torch.randn(20, 50)
    ends = []
    for make in (fused_adamw, torch.optim.AdamW):
        parameter = nn.Parameter(start.clone())
        groups = [{"params": [parameter], "weight_decay": 0.05}]
        optimizer = make(groups, lr=1e-2, betas=(0.9, 0.98))
        for gradient in gradients:
            parameter.grad = gradient.clone()
            optimizer.step()
        ends.append(parameter.detach())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_nan_leaves_weights_and_moments_as_they_were(tmp_path: Path, gradient_only: bool) -> None:
    """Of eight updates the third and the sixth; a run of which those two batches are left out has the same end."""
    images = torch.rand(16, 3, 32, 32)
    model = tiny_model(loss=NaNAt(3, 6, gradient_only=gradient_only), max_skipped_updates=2, warmup_epochs=0)
    trainer, watch = fit(model, images, tmp_path, gradient_clip_val=1.0)
    assert watch.changed() == [True, True, False, True, True, False, True, True]
    assert trainer.global_step == 8
    assert {float(moments["step"]) for moments in trainer.optimizers[0].state.values()} == {6.0}


@pytest.mark.parametrize("bad", [3, 4])
def test_a_nan_in_a_part_of_an_accumulation_skips_the_whole_update(tmp_path: Path, bad: int) -> None:
    model = tiny_model(loss=NaNAt(bad), max_skipped_updates=1, warmup_epochs=0)
    _, watch = fit(model, torch.rand(12, 3, 32, 32), tmp_path, accumulate_grad_batches=2)
    assert watch.changed() == [False, True, False, False, False, True]


def test_the_update_after_the_last_that_may_be_skipped_ends_the_run(tmp_path: Path) -> None:
    model = tiny_model(loss=NaNAt(2, 4), max_skipped_updates=1, warmup_epochs=0)
    message = (
        r"NaN or infinite by step 3 \(lr .* norm nan, in the last update that was made 0\.\d+\): .* of 2 such updates none"
    )
    with pytest.raises(FloatingPointError, match=message) as caught:
        fit(model, torch.rand(16, 3, 32, 32), tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="max_skipped_updates is a number of updates, not below 0: got -1"):
        tiny_model(max_skipped_updates=-1)


def test_an_optimizer_of_ones_own_is_skipped_too(tmp_path: Path) -> None:
    class WithSGD(MaskedImageModeling):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)

    model = tiny_model(loss=NaNAt(2), max_skipped_updates=1)
    model.__class__ = WithSGD
    _, watch = fit(model, torch.rand(8, 3, 32, 32), tmp_path)
    assert watch.changed() == [True, False, True, True]


def test_a_grad_scaler_that_looks_for_its_scale_is_not_counted(tmp_path: Path) -> None:
    """Its first scale is far too high: it skips until it fits, with clipping, and none of that is a fault."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=1000)
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    model = tiny_model(warmup_epochs=0)
    _, watch = fit(model, torch.rand(60, 3, 32, 32), tmp_path, plugins=[plugin], gradient_clip_val=1.0)
    assert not watch.changed()[0]
    assert watch.changed()[-1]
    assert not model.guard.skipped


def tiny_finetuning(**changes: object) -> FineTuning:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    return FineTuning("vit_tiny_patch16_224", num_classes=3, model_args=args, warmup_epochs=0, **changes)


def tiny_segmentation(**changes: object) -> UperNetSegmentation:
    args = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
    return UperNetSegmentation("vit_tiny_patch16_224", num_classes=3, model_args=args, channels=8, warmup_steps=0, **changes)


def test_the_norm_is_torchs(tmp_path: Path) -> None:
    """Before clipping; also in 64 bits, and 0 where no gradient is there."""

    norms = []

    class Compare(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
            norms.append(float(nn.utils.clip_grad_norm_(pl_module.parameters(), torch.inf)))

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: object) -> None:
            assert float(pl_module.guard.norm) == pytest.approx(norms[-1], rel=1e-6)

    for precision, dtype in (("32-true", torch.float32), ("64-true", torch.float64)):
        images = torch.rand(8, 3, 32, 32, dtype=dtype)
        fit(tiny_model(), images, tmp_path, precision=precision, gradient_clip_val=0.01, callbacks=[Compare()])
    assert len(norms) == 8
    assert min(norms) > 0.01
    model = tiny_model()
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    _, watch = fit(model, torch.rand(4, 3, 32, 32), tmp_path)
    assert watch.changed() == [False, False]
    assert not model.guard.norm


@pytest.mark.parametrize("task", ["finetuning", "segmentation"])
def test_the_other_tasks_skip_and_stop_alike(tmp_path: Path, task: str) -> None:
    """An image of infinite brightness: the weights stay, and the run ends only without a limit."""
    images = torch.rand(8, 3, 32, 32)
    images[2, 0, 0, 0] = torch.inf
    labels = torch.randint(3, (8,) if task == "finetuning" else (8, 32, 32))
    make = tiny_finetuning if task == "finetuning" else tiny_segmentation
    loader = DataLoader(list(zip(images, labels, strict=True)), batch_size=2)
    _, watch = fit(make(max_skipped_updates=1), loader, tmp_path)
    assert watch.changed() == [True, False, True, True]
    with pytest.raises(FloatingPointError, match="NaN or infinite by step 1"):
        fit(make(), loader, tmp_path)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_what_moves_in_a_forward_pass_is_put_back_with_the_weights(tmp_path: Path, accumulated: int) -> None:
    """iBOT's center takes the NaN of an image in batch 3. All batches of its update leave it as it was; then it moves on."""
    images = torch.rand(16, 3, 32, 32)
    images[6, 0, 0, 0] = torch.nan
    model = tiny_model(
        teacher=EMAHeadTarget(prototypes=16, momentum=1.0),
        normalization=CenteredSoftmax(16),
        head=functools.partial(PrototypeHead, hidden=8, bottleneck=4),
        loss=SoftCrossEntropyLoss(),
        max_skipped_updates=1,
        warmup_epochs=0,
    )
    _, watch = fit(model, images, tmp_path, accumulate_grad_batches=accumulated)
    first = 4 - accumulated
    for state in watch.states[first], watch.states[4]:
        assert all(torch.equal(state[name], watch.states[first][name]) for name in state)
    centers = [state["normalization.center"] for state in watch.states]
    assert all(not torch.equal(before, after) for before, after in itertools.pairwise(centers[4:]))
    assert centers[8].isfinite().all()


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    model = tiny_model()
    trainer, _ = fit(model, torch.rand(4, 3, 32, 32), tmp_path)
    with torch.no_grad():
        model.head.linear.bias[0] = torch.nan
    for weights_only in (False, True):
        with pytest.raises(FloatingPointError, match="not saved at step 2, because not all of it is finite: head.linear.bias;"):
            trainer.save_checkpoint(tmp_path / "bad.ckpt", weights_only=weights_only)
    assert not list(tmp_path.glob("bad*"))


# Files


def test_a_checkpoint_is_written_beside_and_renamed(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    target = tmp_path / "new" / "a.ckpt"
    (tmp_path / "new").mkdir()
    old = tmp_path / "new" / "a.ckpt.part"
    old.write_bytes(b"of a run that was killed")
    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    for value in (1.0, 2.0):
        io.save_checkpoint({"x": torch.full((3,), value)}, target)
        assert torch.equal(io.load_checkpoint(target, weights_only=True)["x"], torch.full((3,), value))
    assert sorted(path.name for path in target.parent.iterdir()) == ["a.ckpt"]
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint({}, target, storage_options={})


@pytest.mark.skipif(os.name != "posix", reason="only POSIX opens folders")
def test_the_new_name_is_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The content before the renaming, the folder after it."""
    synced: list[tuple[bool, bool]] = []

    def fsync(file: int) -> None:
        synced.append((stat.S_ISDIR(os.fstat(file).st_mode), (tmp_path / "a.ckpt").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt")
    assert synced == [(False, False), (True, True)]


def test_an_error_while_saving_leaves_the_file_before(tmp_path: Path) -> None:
    """One that is not the disk's keeps its own text."""
    io = AtomicCheckpointIO()
    io.save_checkpoint({"x": torch.ones(3)}, tmp_path / "a.ckpt")
    with pytest.raises(AttributeError, match="pickle"):
        io.save_checkpoint({"x": torch.zeros(3), "y": lambda: None}, tmp_path / "a.ckpt")
    assert torch.equal(io.load_checkpoint(tmp_path / "a.ckpt", weights_only=True)["x"], torch.ones(3))
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_whole_and_broken_checkpoints(tmp_path: Path) -> None:
    whole = tmp_path / "step=1.ckpt"
    torch.save({"x": torch.rand(10_000), "y": torch.rand(10)}, whole)
    content = whole.read_bytes()
    assert is_whole(whole)
    for length in (0, 10, len(content) // 2, len(content) - 1):
        whole.write_bytes(content[:length])
        assert not is_whole(whole), length
    whole.write_bytes(content[:20_000] + bytes(1000) + content[21_000:])  # as after a loss of power
    assert not is_whole(whole)


def test_the_newest_checkpoint_first(tmp_path: Path) -> None:
    """By the step that each says itself, then by time; one that is cut off by that in its name, a folder by its last file.

    Dangling links do not count. A copy is younger than what was trained after it.
    """
    steps_and_times = {"a/step=11.ckpt": (11, 1), "b/copy.ckpt": (9, 5), "b/step=99.ckpt": (10, 2), "a/again.ckpt": (10, 1)}
    for name, (step, seconds) in steps_and_times.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        torch.save({"global_step": step, "x": torch.rand(10)}, path)
        os.utime(path, (seconds, seconds))
    (tmp_path / "a/epoch=1-step=8.ckpt").write_bytes(b"cut off")
    (tmp_path / "a/none.ckpt").write_bytes(b"")
    (tmp_path / "b/last.ckpt").symlink_to("gone.ckpt")
    shards = tmp_path / "a/shards.ckpt"
    shards.mkdir()
    torch.save({"global_step": 10}, shards / "meta.pt")
    os.utime(shards / "meta.pt", (1.5, 1.5))
    found = [str(path.relative_to(tmp_path)) for path in newest_first(tmp_path.rglob("*.ckpt"))]
    assert found == [
        "a/step=11.ckpt",
        "b/step=99.ckpt",
        "a/shards.ckpt",
        "a/again.ckpt",
        "b/copy.ckpt",
        "a/epoch=1-step=8.ckpt",
        "a/none.ckpt",
    ]


def spoilt(shards: Path, folder: Path) -> dict[str, bool]:
    """Whether copies of a folder of shards are whole, each spoilt in another way."""

    def cut(path: Path) -> None:
        before = path.stat()
        os.truncate(path, before.st_size - 1)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    last = max(shards.glob("*.distcp")).name
    changes = {
        "as it is": lambda copy: None,
        "a shard that is cut off": lambda copy: cut(copy / last),
        "a shard that is missing": lambda copy: (copy / last).unlink(),
        "no plan": lambda copy: (copy / ".metadata").unlink(),
        "a plan that is cut off": lambda copy: cut(copy / ".metadata"),
        "no end": lambda copy: (copy / "meta.pt").unlink(),
        "an end that is cut off": lambda copy: cut(copy / "meta.pt"),
        "written over, not to the end": lambda copy: os.utime(copy / "__0_0.distcp", (time.time() + 60,) * 2),
    }
    found = {}
    for i, (name, change) in enumerate(changes.items()):
        copy = folder / f"{i}.ckpt"
        shutil.copytree(shards, copy)  # with the times of its files
        change(copy)
        found[name] = is_whole(copy)
    return found


def test_a_folder_of_shards_is_whole_when_every_part_is_there(tmp_path: Path) -> None:
    """As torch writes it, here in one process."""
    shards = tmp_path / "a.ckpt"
    shards_of.save({"x": torch.rand(1000), "step": 1}, checkpoint_id=shards, no_dist=True)
    assert not is_whole(shards)
    torch.save({"epoch": 1}, shards / "meta.pt")
    found = spoilt(shards, tmp_path / "copies")
    assert [name for name, whole in found.items() if whole] == ["as it is"]


@pytest.mark.slow
def test_resume_auto_among_folders_of_shards(photos: Path) -> None:
    """Two processes write one after each of two epochs: of the newer a shard is cut off, so the run goes on from the older.

    Another node's clock may be ahead.
    """
    fsdp2 = ["--trainer.devices=2", "--trainer.strategy=ModelParallelStrategy", "--trainer.strategy.data_parallel_size=2",
             "--trainer.strategy.tensor_parallel_size=1", "--trainer.use_distributed_sampler=true",
             "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_top_k=-1"]  # fmt: skip
    done = run(photos, *fsdp2, "--trainer.max_epochs=2")
    assert done.returncode == 0, done.stderr
    older, newer = sorted(photos.rglob("*.ckpt"))
    assert sorted(path.name for path in older.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp", "meta.pt"]
    assert [name for name, whole in spoilt(older, photos / "copies").items() if whole] == ["as it is"]
    os.utime(older / "__1_0.distcp", (time.time() + 60,) * 2)
    os.truncate(newer / "__1_0.distcp", (newer / "__1_0.distcp").stat().st_size - 1)
    done = run(photos, *fsdp2, "--trainer.max_epochs=2", "--resume=auto")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{newer.relative_to(photos)} is not complete, and is passed over") == 1
    assert done.stdout.count(f"this run goes on from {older.relative_to(photos)}\n") == 1
    assert len(list((photos / "outputs/pretrain/version_1").rglob("*.ckpt"))) == 1


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(8):
        Image.new("RGB", (40, 40), (30 * i, 20, 100)).save(tmp_path / f"{i}.png")
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


MINE = """
import json, os, signal

import pytorch_lightning as pl
import torch
from torch import distributed, nn
from torch.nn import functional as F

from unimim import ImageFolderData
from unimim.training.checkpoints import SameCheckpoint


class Act(pl.Callback):
    \"\"\"In a step, one process sends itself a signal, or its whole group, with the workers of the data.\"\"\"

    def __init__(self, name: str, step: int = 1, rank: int = 0, workers: bool = False) -> None:
        self.name, self.step, self.rank, self.workers = name, step, rank, workers

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            (os.killpg if self.workers else os.kill)(os.getpid(), getattr(signal, self.name))


class Tell(pl.Callback):
    \"\"\"A line for every batch: rank, step, a sum of all weights, bit for bit, and how many updates were skipped.\"\"\"

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        bits = sum(int(p.detach().view(torch.int32).long().sum()) for p in pl_module.parameters())
        line = [trainer.global_rank, trainer.global_step, bits, int(pl_module.guard.skipped)]
        with open(f"told{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps(line) + chr(10))


class Photos(ImageFolderData):
    \"\"\"A data module of one's own.\"\"\"


class Differ(SameCheckpoint):
    \"\"\"As if each process had found another checkpoint.\"\"\"

    def __init__(self) -> None:
        super().__init__(os.environ.get("LOCAL_RANK", "0") + ".ckpt")


class NaNOnOne(nn.Module):
    \"\"\"Only the second process's loss, and only some; all gradients are finite.\"\"\"

    def __init__(self, calls: list[int]) -> None:
        super().__init__()
        self.calls, self.count = calls, 0

    def forward(self, prediction, target):
        self.count += 1
        bad = distributed.is_initialized() and distributed.get_rank() == 1 and self.count - 1 in self.calls
        return F.mse_loss(prediction, target) + (torch.nan if bad else 0.0)
"""
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.use_distributed_sampler=true"]


def command(*words: str, launcher: tuple[str, ...] = ()) -> list[str]:
    return [sys.executable, "-m", *(launcher or ("unimim",)), "pretrain", *SMALL, "--data.root=.", *STEADY, *words]


def run(folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*words, launcher=launcher),
        cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip


@pytest.mark.slow
def test_killed_while_saving(tmp_path: Path) -> None:
    """SIGKILL amid the second save: the first is there and whole, the part is taken for nothing."""
    child = tmp_path / "child.py"
    child.write_text(
        "import os, time, torch\n"
        "from pathlib import Path\n"
        "from unimim import AtomicCheckpointIO\n"
        "io = AtomicCheckpointIO()\n"
        "io.save_checkpoint({'x': torch.ones(1000)}, 'step=1.ckpt')\n"
        "class Slow:\n"
        "    def __init__(self, file): self.file = file\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *_): self.file.close()\n"
        "    def write(self, data):\n"
        "        written = self.file.write(data)\n"
        "        self.file.flush()\n"
        "        if self.file.tell() > 1_000_000:\n"
        "            print('amid', flush=True)\n"
        "            time.sleep(600)\n"
        "        return written\n"
        "    def flush(self): self.file.flush()\n"
        "    def fileno(self): return self.file.fileno()\n"
        "plain = Path.open\n"
        "Path.open = lambda path, *mode: Slow(plain(path, *mode))\n"
        "io.save_checkpoint({f'{i}': torch.ones(100_000) for i in range(9)}, 'step=1.ckpt')\n"
    )
    process = subprocess.Popen([sys.executable, str(child)], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "amid\n"
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)
    left, part = sorted(path.name for path in tmp_path.glob("step*"))
    assert left == "step=1.ckpt"
    assert re.fullmatch(rf"step=1.ckpt.\d+.{machine()}-{process.pid}.part", part)
    assert is_whole(tmp_path / "step=1.ckpt")
    assert torch.load(tmp_path / "step=1.ckpt", weights_only=True)["x"].sum() == 1000
    AtomicCheckpointIO().save_checkpoint({}, tmp_path / "step=1.ckpt")
    assert [path.name for path in tmp_path.glob("step*")] == ["step=1.ckpt"]


@pytest.mark.slow
def test_a_full_disk(photos: Path) -> None:
    """A limit on the size of files between those of the first checkpoint and of the log: one line, nothing half written."""
    done = run(photos)
    assert done.returncode == 0, done.stderr
    (checkpoint,) = photos.rglob("*.ckpt")
    size = checkpoint.stat().st_size
    (photos / "limited.py").write_text(
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, resource.RLIM_INFINITY))\n"
        "sys.argv = ['unimim', *sys.argv[1:]]\n"
        "from unimim.cli.main import main\n"
        "main()\n"
    )
    words = [f"--ckpt_path={checkpoint}", "--trainer.max_epochs=3"]
    done = run(photos, *words, launcher=("limited",))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("unimim: error:")]
    assert "could not be written: File too large; make room, or set another folder" in line
    assert [path.name for path in photos.rglob("*.part")] == []
    assert list(photos.rglob("*.ckpt")) == [checkpoint]
    assert is_whole(checkpoint)


# --resume auto


@pytest.fixture
def runs(photos: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of photos with one run of two epochs."""
    monkeypatch.chdir(photos)
    monkeypatch.delenv("UNIMIM_RESUME", raising=False)
    pretrain([*SMALL, "--data.root=.", *STEADY, "--trainer.max_epochs=2"])
    return photos


def resumed(*words: str) -> int:
    """The step at which `--resume auto` begins."""
    begins = []

    class Begin(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            begins.append(trainer.global_step)

    original = pl.Trainer.fit

    @functools.wraps(original)  # the command line takes its options from the signature
    def fit_with_a_look(self: pl.Trainer, *args: object, **kwargs: object) -> None:
        self.callbacks.insert(0, Begin())
        original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "fit", fit_with_a_look)
        pretrain([*SMALL, "--data.root=.", *STEADY, "--resume=auto", *words])
    return begins[0]


def test_resume_auto_takes_the_newest_whole_one_of_its_recipe(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 8 of the first run, step 12 of the second; truncated it is passed over."""
    assert resumed("--trainer.max_epochs=3") == 8
    assert "goes on from outputs/pretrain/version_0/checkpoints/epoch=1-step=8.ckpt" in capsys.readouterr().out
    assert resumed("--trainer.max_epochs=4", "--model.max_skipped_updates=3") == 12
    newest = max(runs.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes()[:-100])
    assert resumed("--trainer.max_epochs=5") == 12
    said = capsys.readouterr().out
    assert f"{newest.relative_to(runs)} is not complete, and is passed over" in said
    assert "starts anew" not in said


@pytest.mark.parametrize(
    ("words", "differs"),
    [
        (["--model.lr=1e-5"], "model.lr differs: 0.0015 in {there}, 1e-05 here"),
        (["--seed_everything=3"], "seed_everything differs: 0 in {there}, 3 here"),
        (["--data.root=other"], "data.init_args.root differs: . in {there}, other here"),
        (["--data=mine.Photos"], "data.class_path differs: unimim.ImageFolderData in {there}, mine.Photos here"),
    ],
)
def test_resume_auto_starts_anew_where_the_recipe_is_another(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], differs: str
) -> None:
    """In one line, which names the key and both values."""
    (runs / "other").symlink_to(runs)
    monkeypatch.syspath_prepend(str(runs))
    capsys.readouterr()
    assert resumed(*words) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--resume auto")]
    start = "--resume auto: outputs/pretrain has no complete checkpoint of this recipe: the run starts anew, because "
    assert line.startswith(start + differs.format(there="outputs/pretrain/version_0/checkpoints"))


def test_resume_auto_goes_on_with_another_batch_size(runs: Path) -> None:
    """What is said by the run itself, or changes no number, is no other recipe."""
    assert (
        resumed("--data.batch_size=4", "--data.num_workers=1", "--model.max_skipped_updates=3", "--trainer.max_epochs=3") == 8
    )


@pytest.mark.parametrize(
    ("logger", "folder"),
    [
        ([], "keep"),
        (["--trainer.logger=false"], "keep"),
        (["--trainer.logger=false"], None),
    ],
)
def test_resume_auto_looks_where_checkpoints_are_saved(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], logger: list[str], folder: str | None
) -> None:
    """In a folder of its own, which runs of another recipe share, and files of other kinds; and without a logger."""
    monkeypatch.chdir(photos)
    words = list(logger)
    if folder:
        words += ["--trainer.callbacks+=ModelCheckpoint", f"--trainer.callbacks.dirpath={folder}"]
    place = Path(folder or "checkpoints")
    pretrain([*SMALL, "--data.root=.", *STEADY, *words])
    (first,) = place.iterdir()
    pretrain([*SMALL, "--data.root=.", *STEADY, *words, "--model.lr=1e-5", "--resume=auto"])
    torch.save({"state_dict": {}}, place / "weights.ckpt")
    capsys.readouterr()
    assert resumed(*words, "--trainer.max_epochs=2") == 4
    assert f"--resume auto: this run goes on from {first}" in capsys.readouterr().out
    assert resumed(*words, "--seed_everything=1") == 0
    said = capsys.readouterr().out
    assert f"--resume auto: {place} " in said
    assert "has no complete checkpoint of this recipe: the run starts anew, because" in said
    assert f"{place}/weights.ckpt does not say of which recipe it is" in said
    assert "model.lr differs" not in said
    assert f"seed_everything differs: 0 in {place}, 1 here" in said


def test_what_a_checkpoint_says_of_its_recipe(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"
    torch.save({"recipe": {"model": {"lr": 0.1}}, "x": torch.rand(1000)}, path)
    assert recipe_in(path) == {"model": {"lr": 0.1}}
    path.write_bytes(path.read_bytes()[:-1])
    assert recipe_in(path) is None
    torch.save({"x": torch.rand(10)}, path)
    assert recipe_in(path) == {}
    torch.save({"x": tmp_path}, path)  # of a class that is not loaded
    assert recipe_in(path) is None


def test_resume_auto_where_there_is_nothing(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photos)
    assert resumed("--random_weights") == 0
    assert "outputs/pretrain has no complete checkpoint of this recipe: the run starts anew\n" in capsys.readouterr().out
    assert resumed("--random_weights", "--trainer.max_epochs=2") == 4  # the recipe as a run saves it


def test_resume_auto_goes_on_with_what_a_resumed_run_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning from a file: a run that resumed is of the same recipe as the first."""
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32), (60 * i, 20, 100)).save(tmp_path / split / label / f"{i}.png")
    pretrained = tiny_model()
    trainer, _ = fit(pretrained, torch.rand(4, 3, 32, 32), tmp_path)
    trainer.save_checkpoint("encoder.ckpt")
    words = ["fit", "--model.backbone=vit_tiny_patch16_224", "--model.checkpoint=encoder.ckpt", "--model.num_classes=2",
             "--data=ClassFolderData", "--data.root=.", "--data.image_size=32", "--data.batch_size=4", "--data.num_workers=0",
             "--model.warmup_epochs=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
             "--resume=auto"]  # fmt: skip
    steps = [finetune([*words, f"--trainer.max_epochs={epochs}"]).trainer.global_step for epochs in (1, 2, 3)]
    assert steps == [2, 4, 6]
    paths = [str(path) for path in sorted(tmp_path.glob("outputs/finetune/*/config.yaml"))]
    assert [f"version_{i}" in path for i, path in enumerate(paths)] == [True] * 3
    assert "ckpt_path: outputs/finetune/version_1/checkpoints/" in Path(paths[2]).read_text()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fit", "--resume=auto", "--ckpt_path=some.ckpt"], "--resume auto finds the checkpoint itself: leave --ckpt_path out"),
        (["fit", "--resume=some.ckpt"], "resume: 'some.ckpt' is none of auto"),
        (
            ["fit", "--resume=auto", "--trainer.logger=true"],
            "a CSVLogger, a TensorBoardLogger or a WandbLogger, but trainer.logger is True: put a CSVLogger before it, or",
        ),
        (
            ["fit", "--resume=auto", "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=s3://bucket/runs"],
            "looks through folders of local disks, not s3://bucket/runs: give --ckpt_path FILE",
        ),
    ],
)
def test_resume_mistakes(words: list[str], expected: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    Path("some.ckpt").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        pretrain([words[0], *SMALL[1:], "--data.root=.", *words[1:]])
    assert expected in str(end.value.code)
    with pytest.raises(SystemExit) as end:
        finetune(
            ["validate", "--model.backbone=vit_tiny_patch16_224", "--data=ClassFolderData", "--data.root=.", "--resume=auto"]
        )
    assert end.value.code == "unimim: error: --resume auto is for fit"


def test_a_started_process_takes_the_choice_of_the_one_that_started_it(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is a newer checkpoint by now; the choice of another process's parent does not count."""
    (first,) = runs.rglob("*.ckpt")
    resumed("--trainer.max_epochs=3")
    monkeypatch.setenv("LOCAL_RANK", "1")  # as Lightning tells those that it starts
    monkeypatch.setenv("UNIMIM_RESUME", f"{os.getppid()}:{first}")
    assert resumed("--trainer.max_epochs=4") == 8
    monkeypatch.setenv("UNIMIM_RESUME", f"{os.getppid()}:")
    assert resumed() == 0
    monkeypatch.setenv("UNIMIM_RESUME", f"1{os.getppid()}:{first}")
    assert resumed("--trainer.max_epochs=5") == 16  # the highest step of all, not the run just made, which began anew
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.setenv("UNIMIM_RESUME", f"{os.getppid()}:{first}")
    assert resumed("--trainer.max_epochs=6") == 20  # a run of its own, that a process which resumed has started


# Signals


class SignalAt(pl.Callback):
    def __init__(self, number: signal.Signals, batch: int) -> None:
        self.number, self.batch, self.batches = number, batch, 0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: object, batch: object, batch_idx: int) -> None:
        if batch_idx == self.batch:
            os.kill(os.getpid(), self.number)

    def on_train_batch_end(self, *_: object) -> None:
        self.batches += 1

    @property
    def state_key(self) -> str:
        return f"SignalAt {self.batch}"

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, None), (signal.SIGUSR1, None), (signal.SIGINT, 130)])
def test_a_signal_saves_where_the_weights_are_updated_and_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals, status: int | None
) -> None:
    """In the third of eight batches, two an update: saved after the second update, and handlers as they were."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    images = torch.rand(16, 3, 32, 32)
    options = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
    with pytest.raises(SystemExit) as end:
        fit(tiny_model(), images, tmp_path, callbacks=[StopOnSignal(), SignalAt(number, 2)], **options)
    assert end.value.code == status
    assert {n: signal.getsignal(n) for n in before} == before
    (path,) = tmp_path.rglob("*.ckpt")
    assert path.name == f"epoch=0-step=2-{number.name}.ckpt"
    assert f"{number.name} after step 2: {path}\n" in capsys.readouterr().out
    assert is_whole(path)
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 2
    assert saved["callbacks"]["SignalAt 2"] == {"batches": 4}  # other callbacks' work on this batch is in it


class Forgetful(AtomicCheckpointIO):
    """Writes nothing from the second checkpoint on; or not yet, as Lightning's AsyncCheckpointIO."""

    saved = 0

    def save_checkpoint(self, checkpoint: dict[str, object], path: str | Path, storage_options: object = None) -> None:
        self.saved += 1
        if self.saved == 1:
            super().save_checkpoint(checkpoint, path, storage_options)


@pytest.mark.parametrize("plugin", [AtomicCheckpointIO, Forgetful])
def test_a_signals_checkpoint_replaces_the_one_before_once_it_is_whole(tmp_path: Path, plugin: type) -> None:
    """Two signals in one run, which another's handler lets go on."""
    original = signal.signal(signal.SIGUSR1, lambda *_: None)
    callbacks = [StopOnSignal(), SignalAt(signal.SIGUSR1, 0), SignalAt(signal.SIGUSR1, 2)]
    keep = pl.callbacks.ModelCheckpoint(tmp_path, save_on_exception=False, every_n_epochs=9)
    try:
        fit(tiny_model(), torch.rand(8, 3, 32, 32), tmp_path, callbacks=[*callbacks, keep],
            enable_checkpointing=True, plugins=[plugin()])  # fmt: skip
    finally:
        signal.signal(signal.SIGUSR1, original)
    step = 3 if plugin is AtomicCheckpointIO else 1
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == [f"epoch=0-step={step}-SIGUSR1.ckpt"]


def test_a_run_that_is_requeued_keeps_one_checkpoint_of_a_signal(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of its recipe in the folders of the runs before it; not another recipe's, and not without --resume auto."""
    monkeypatch.chdir(photos)
    monkeypatch.syspath_prepend(str(photos))
    monkeypatch.delenv("UNIMIM_RESUME", raising=False)

    def stopped(step: int, *words: str) -> list[str]:
        act = ["--trainer.callbacks+=mine.Act", "--trainer.callbacks.name=SIGTERM", f"--trainer.callbacks.step={step}"]
        with pytest.raises(SystemExit) as end:
            pretrain([*SMALL, "--data.root=.", *STEADY, *act, "--trainer.max_epochs=9", *words])
        assert end.value.code is None
        found = sorted((photos / "outputs/pretrain").rglob("*.ckpt"))
        return [f"{path.parent.parent.name[-1]}/{path.stem.removesuffix('-SIGTERM')}" for path in found]

    other = ["0/epoch=0-step=2"]
    assert stopped(1, "--model.lr=1e-5") == other
    assert stopped(1) == [*other, "1/epoch=0-step=2"]
    assert stopped(2, "--resume=auto") == [*other, "2/epoch=0-step=3"]
    kept = [*other, "2/epoch=0-step=3", "3/epoch=0-step=4"]
    assert stopped(3, "--ckpt_path=outputs/pretrain/version_2/checkpoints/epoch=0-step=3-SIGTERM.ckpt") == kept
    of_the_epoch = "4/epoch=0-step=4"  # whose end was due; ModelCheckpoint's own
    assert stopped(5, "--resume=auto") == [*other, "2/epoch=0-step=3", of_the_epoch, "4/epoch=1-step=6"]


@pytest.mark.slow
def test_workers_of_the_data_outlive_the_signal_that_slurm_sends_to_all(photos: Path) -> None:
    act = ["--trainer.callbacks+=mine.Act", "--trainer.callbacks.name=SIGUSR1", "--trainer.callbacks.workers=true"]
    words = command("--data.num_workers=2", "--trainer.max_epochs=9", *act)
    done = subprocess.run(words, cwd=photos, capture_output=True, text=True, timeout=SECONDS, start_new_session=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"SIGUSR1 after step \d+: outputs/\S+-SIGUSR1.ckpt", done.stdout)
    assert len(list(photos.rglob("*-SIGUSR1.ckpt"))) == 1


def test_a_checkpoint_that_cannot_be_removed_stays_and_the_run_ends_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(path: str) -> None:
        raise PermissionError(1, "not yours")

    trainer = pl.Trainer(accelerator="cpu", logger=False)
    monkeypatch.setattr(trainer.strategy, "remove_checkpoint", refused)
    new = tmp_path / "new.ckpt"
    torch.save({}, new)
    replace(trainer, tmp_path / "old.ckpt", new)
    assert capsys.readouterr().out == f"{tmp_path}/old.ckpt cannot be removed (not yours), and stays\n"


def test_an_argument_that_a_class_has_got_since_makes_no_other_recipe() -> None:
    theirs: Any = {"model": {"lr": 1, "student": {"class_path": "S", "init_args": {"model_args": {"depth": 2}}}}}
    ours: Any = deepcopy(theirs)
    ours["model"]["late"] = ours["model"]["student"]["init_args"]["late"] = 1
    assert differing(ours, theirs) is None
    theirs["model"]["student"]["init_args"]["model_args"] = {}
    assert differing(ours, theirs) == ("model.student.init_args.model_args.depth", 2, None)


def test_a_signal_without_checkpoints_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit(tiny_model(), torch.rand(8, 3, 32, 32), tmp_path, callbacks=[SignalAt(signal.SIGTERM, 1), StopOnSignal()])
    assert "SIGTERM after step 2: there is no ModelCheckpoint, so nothing is saved" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.ckpt"))


def test_ctrl_c_before_the_first_step_ends_at_once(tmp_path: Path) -> None:
    """Where there is nothing to save: amid the trial validation, as Lightning ends."""
    loader = DataLoader(list(zip(torch.rand(8, 3, 32, 32), torch.randint(3, (8,)), strict=True)), batch_size=2)
    trial = DuringTrial(signal.SIGINT)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[StopOnSignal(), trial], **quiet)
    with pytest.raises(SystemExit):
        trainer.fit(tiny_finetuning(), loader, loader)
    assert (trial.batches, trainer.global_step) == (1, 0)


def test_a_ctrl_c_that_is_ignored_stays_so(tmp_path: Path) -> None:
    """As in a job that a shell runs in the background."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    trainer, _ = fit(tiny_model(), torch.rand(8, 3, 32, 32), tmp_path, callbacks=[StopOnSignal(), SignalAt(signal.SIGINT, 1)])
    assert trainer.global_step == 4
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


class DuringTrial(pl.Callback):
    """A signal amid the validation that is tried before training."""

    def __init__(self, number: signal.Signals) -> None:
        self.number, self.batches = number, 0

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        assert trainer.sanity_checking
        self.batches += 1
        os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_before_the_first_step_ends_without_a_save(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    loader = DataLoader(list(zip(torch.rand(8, 3, 32, 32), torch.randint(3, (8,)), strict=True)), batch_size=2)
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 1}
    trainer = pl.Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[StopOnSignal(), DuringTrial(number)], **quiet)
    with pytest.raises(SystemExit) as end:
        trainer.fit(tiny_finetuning(), loader, loader)
    assert end.value.code is None
    assert trainer.global_step == 0
    told = f"{number.name} before this run's first step\n"
    assert capsys.readouterr().out.count(told) == 1
    assert not list(tmp_path.rglob("*.ckpt"))
    assert {n: signal.getsignal(n) for n in before} == before


def test_a_requeue_comes_after_the_save_and_training_goes_on(tmp_path: Path) -> None:
    """As Lightning's handler under Slurm, which was there before: it runs between two steps, and not within one."""
    calls = []

    class InStep(pl.Callback):
        inside = False

        def on_before_backward(self, *_: object) -> None:
            self.inside = True
            os.kill(os.getpid(), signal.SIGUSR1) if not calls and len(list(tmp_path.rglob("*.ckpt"))) == 0 else None

        def on_before_zero_grad(self, *_: object) -> None:
            self.inside = False

        def on_train_batch_end(self, *_: object) -> None:
            self.inside = False

    within = InStep()
    original = signal.signal(
        signal.SIGUSR1, lambda *_: calls.append((within.inside, [path.name for path in tmp_path.rglob("*.ckpt")]))
    )
    try:
        trainer, _ = fit(
            tiny_model(), torch.rand(8, 3, 32, 32), tmp_path, callbacks=[within, StopOnSignal()], enable_checkpointing=True
        )
    finally:
        signal.signal(signal.SIGUSR1, original)
    assert calls == [(False, ["epoch=0-step=1-SIGUSR1.ckpt"])]
    assert trainer.global_step == 4


# Several processes


def told(folder: Path) -> list[list[list[int]]]:
    """What `Tell` wrote: for either process [rank, step, bits of the weights, skipped]."""
    return [[json.loads(line) for line in (folder / f"told{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]


@pytest.mark.slow
def test_a_nan_on_one_of_two_processes_skips_on_both(photos: Path) -> None:
    """Bit for bit; training goes on up to the limit and then ends on both, in bounded time."""
    words = ["--trainer.max_epochs=4", "--model.loss=mine.NaNOnOne", "--model.loss.calls=[3,6]",
             "--model.max_skipped_updates=1", "--trainer.callbacks+=mine.Tell"]  # fmt: skip
    done = run(photos, *TWO, *words)
    assert done.returncode, done.stdout
    assert "unimim: error: the loss or its gradient became NaN or infinite by step 5" in done.stderr
    first, second = told(photos)
    assert [line[1:] for line in first] == [line[1:] for line in second]
    assert [line[3] for line in first] == [0, 0, 1, 1, 1]
    bits = [line[2] for line in first]
    assert [a != b for a, b in itertools.pairwise(bits)] == [True, False, True, True]
    assert all(is_whole(path) for path in photos.rglob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rank"), [("SIGTERM", 0), ("SIGUSR1", 1)])
def test_a_signal_to_one_of_two_processes_stops_both(photos: Path, name: str, rank: int) -> None:
    """At the same step, with one checkpoint, exit status 0; then --resume auto goes on there."""
    act = ["--trainer.callbacks+=mine.Act", f"--trainer.callbacks.name={name}", f"--trainer.callbacks.rank={rank}",
           "--trainer.callbacks.step=2", "--trainer.callbacks+=mine.Tell"]  # fmt: skip
    done = run(photos, *TWO, "--trainer.max_epochs=100", *act)
    assert done.returncode == 0, done.stderr
    assert [lines[-1][1] for lines in told(photos)] == [3, 3]
    (path,) = photos.rglob(f"*step=3-{name}.ckpt")
    assert f"{name} after step 3: {path.relative_to(photos)}\n" in done.stdout
    assert done.stdout.count(f"{name} after") == 1
    if rank:
        again = run(photos, *TWO, "--trainer.max_epochs=4", "--resume=auto")
        assert again.returncode == 0, again.stderr
        assert again.stdout.count("goes on from outputs/pretrain/version_0/checkpoints/epoch=1-step=3-SIGUSR1.ckpt") == 1


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_amid_the_trial_validation_ends_both(tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(
        "import signal, torch\n"
        "import pytorch_lightning as pl\n"
        "from torch.utils.data import DataLoader\n"
        "from test_faults import DuringTrial, tiny_finetuning\n"
        "from unimim import StopOnSignal\n"
        "class OnOne(DuringTrial):\n"
        "    def on_validation_batch_start(self, trainer, *_):\n"
        "        if trainer.global_rank == 1: super().on_validation_batch_start(trainer)\n"
        "loader = DataLoader([(torch.rand(3, 32, 32), 1)] * 8, batch_size=2)\n"
        "trainer = pl.Trainer(accelerator='cpu', devices=2, strategy='ddp', max_epochs=1, logger=False,\n"
        "                     callbacks=[StopOnSignal(), OnOne(signal.SIGTERM)])\n"
        "trainer.fit(tiny_finetuning(), loader, loader)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, str(child)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SIGTERM before this run's first step\n") == 1
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_processes_that_found_different_checkpoints_do_not_start(photos: Path) -> None:
    done = run(photos, *TWO, "--trainer.callbacks+=mine.Differ")
    assert done.returncode
    found = "--resume auto: process 1 found 1.ckpt, process 0 found 0.ckpt: let all nodes share the folders of the checkpoints"
    assert f"unimim: error: {found}" in done.stderr
    assert "images a step" not in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["unimim", "torchrun"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_dead_process_ends_the_job(photos: Path, launcher: str, rank: int) -> None:
    """SIGKILL in a step: the command ends in bounded time, not with status 0, and none of its processes is left."""
    act = ["--trainer.callbacks+=mine.Act", "--trainer.callbacks.name=SIGKILL", f"--trainer.callbacks.rank={rank}",
           "--trainer.callbacks.step=2"]  # fmt: skip
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "unimim")
    began = time.monotonic()
    done = run(photos, *TWO, "--trainer.max_epochs=100000", *act, launcher=torchrun if launcher == "torchrun" else ())
    assert done.returncode
    assert time.monotonic() - began < SECONDS
    assert "unimim: error: another process of this run has ended" in done.stderr
    assert not remaining(photos)


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/{}] "


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            GLOO.format("pair.cc:561")
            + "Connection closed by peer [127.0.0.1]:54188. This is typically caused by a crash. GL!",
            "another process of this run has ended; what it said tells why (Connection closed by peer [127.0.0.1]:54188)",
        ),
        (
            GLOO.format("unbound_buffer.cc:78") + "Timed out waiting 4000ms for recv operation to complete",
            "another process of this run hangs, or takes longer than trainer.strategy.timeout for a step (Timed out waiting "
            "4000ms for recv operation to complete)",
        ),
        (
            "Application timeout caused pair closure",
            "another process of this run hangs, or takes longer than trainer.strategy.timeout for a step (Application timeout "
            "caused pair closure)",
        ),
        (
            "Gloo failed: " + GLOO.format("device.cc:83") + "Unable to find address for: node7",
            "the processes of this run cannot reach each other (Unable to find address for: node7)",
        ),
    ],
)
def test_what_gloo_says_is_told_in_its_own_words(text: str, expected: str) -> None:
    """The first three as torch 2.15 raises them for a killed process and for one that sleeps."""

    def fails() -> None:
        raise RuntimeError(text)

    with pytest.raises(SystemExit) as end:
        in_one_line(fails)
    assert end.value.code == f"unimim: error: {expected}"


def remaining(folder: Path) -> list[int]:
    """Processes whose working directory is the folder, after up to 30 s in which they may end."""
    for _ in range(60):
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if (entry / "cwd").resolve() == folder.resolve() and (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    continue
        if not found:
            return []
        time.sleep(0.5)
    return found


# Images


def test_corrupt_images_in_workers_are_counted_and_training_goes_on(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of ten, one empty and one cut: with two workers, as many steps as ever, and the count at the end."""
    monkeypatch.chdir(photos)
    (photos / "8.png").write_bytes(b"")
    (photos / "9.png").write_bytes((photos / "7.png").read_bytes()[:60])
    words = ["--data.root=.", *STEADY, "--data.num_workers=2"]
    with pytest.warns(UserWarning, match="2 of 10 image files in . could not be read and were skipped"):
        cli = pretrain([*SMALL, *words, "--data.on_bad_image=skip"])
    assert cli.trainer.global_step == 5
    with pytest.raises(SystemExit, match="unreadable image"):
        pretrain([*SMALL, *words])


def test_a_zip_is_what_torch_writes(tmp_path: Path) -> None:
    """`is_whole` relies on it: torch keeps a sum of every entry."""
    torch.save({"x": torch.rand(100)}, tmp_path / "x.ckpt")
    with zipfile.ZipFile(tmp_path / "x.ckpt") as file:
        assert all(entry.CRC for entry in file.infolist() if entry.file_size)
