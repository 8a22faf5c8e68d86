"""An epoch of MaskDistill with a ViT-S/16, its ViT-B/16 teacher asked in every step, beside the same epoch with cached targets.

    make bench    (python benchmarks/cache.py)             a table, and outputs/bench/cache.json (cache_cuda.json)
    python benchmarks/cache.py --device cuda --batch_size 256 --images 8192 --num_workers 8

Random weights, Fashion-MNIST at 224 px, the whole of Lightning's loop, masks at 40 %. What is timed is the second epoch of a
run of two, in turn, so that start and first allocations do not count; `processor s` is what all threads worked on it. A view is
written in a run of its own, whose time is that of one epoch of the teacher alone, with what the disk takes.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from report import machine, report, wait
from torch import nn

from unimim import (
    BlockMasking,
    CachedTarget,
    CPUPrecision,
    FashionMNISTData,
    FeatureTarget,
    LayerNorm,
    LinearHead,
    MaskedImageModeling,
    MaskTokenStudent,
    TargetGenerator,
)
from unimim.caching.files import TargetFiles, in_words

TEACHER, CACHE = "teacher in every step (reference)", "targets from the cache"


class Stopwatch(pl.Callback):
    """Seconds and the processor's seconds of the last epoch, and the time before the first."""

    def __init__(self, device: str) -> None:
        self.device = device

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.begun = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wait(self.device)
        if trainer.current_epoch == 0:
            self.before = time.perf_counter() - self.begun
        self.start = time.perf_counter(), time.process_time()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        wait(self.device)
        self.epoch = time.perf_counter() - self.start[0]
        self.worked = time.process_time() - self.start[1]


def run(teacher: TargetGenerator, arguments: argparse.Namespace, epochs: int = 2) -> Stopwatch:
    """A training of the ViT-S, of which the last epoch is timed."""
    pl.seed_everything(0, verbose=False)
    model = MaskedImageModeling(
        teacher=teacher,
        normalization=LayerNorm(),
        masking=BlockMasking(0.4),
        student=MaskTokenStudent("vit_small_patch16_224"),
        head=LinearHead,
        loss=nn.SmoothL1Loss(beta=2.0),
    )
    data = FashionMNISTData(
        image_size=224, batch_size=arguments.batch_size, train_images=arguments.images, num_workers=arguments.num_workers
    )
    watch = Stopwatch(arguments.device)
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        accelerator=arguments.device,
        devices=1,
        **({"plugins": [CPUPrecision()]} if arguments.device == "cpu" else {"precision": "bf16-mixed"}),
        max_epochs=epochs,
        callbacks=[watch],
        enable_progress_bar=False,
        **quiet,
    )
    trainer.fit(model, datamodule=data)
    return watch


def vit_base() -> FeatureTarget:
    """MaskDistill's teacher by its size."""
    return FeatureTarget("vit_base_patch16_clip_quickgelu_224", weights="random")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="unimim-cache-"))
    try:
        written = run(CachedTarget(vit_base(), str(folder), views=1), arguments, epochs=1).before
        teachers = {TEACHER: vit_base, CACHE: lambda: CachedTarget(vit_base(), str(folder), views=1)}
        watches: dict[str, list[Stopwatch]] = {name: [] for name in teachers}
        for _ in range(arguments.repetitions):
            for name, teacher in teachers.items():
                watches[name].append(run(teacher(), arguments))
    finally:
        shutil.rmtree(folder)
    rows = {
        name: {"values": [watch.epoch for watch in of_way], "processor s": median(watch.worked for watch in of_way)}
        for name, of_way in watches.items()
    }
    size = in_words(TargetFiles(folder, arguments.images, (14, 14, 768), torch.bfloat16).view_bytes)
    report(
        "cache" if arguments.device == "cpu" else "cache_cuda",
        {**rows, "writing one view, start of the run included": {"values": [written]}},
        of="an epoch",
        unit="s",
        setup=f"ViT-S/16, teacher ViT-B/16, {arguments.images} images at 224 px, batch {arguments.batch_size}, {size} a "
        f"view, {arguments.repetitions} repetitions in turn",
        machine=machine("timm", "pytorch_lightning", device=arguments.device),
        reference=TEACHER,
    )


if __name__ == "__main__":
    main()
