"""How the cost of a step grows: with image size, batch, width and number of targets; and what a second process brings.

    make bench   (python benchmarks/scaling.py)       outputs/bench/scaling_*.json
    python benchmarks/scaling.py --device cuda --precision bf16-mixed --batch_size 64

A plain ViT of 12 blocks as student, one of its size as teacher (random weights both), 16 px patches, 40 % masked by blocks.
Around one point (224 px, width 384, one target) one number changes at a time. Each exponent is the slope of a line through the
medians, both axes logarithmic: 1 is proportional. Two processes share the threads of one, and each has a batch of its own.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import numpy as np
import torch
from report import in_turn, machine, report, wait
from step import Precision, Step, trainer
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from unimim import BlockMasking, FeatureTarget, LayerNorm, LinearHead, MaskedImageModeling, MaskTokenStudent, TargetGenerator
from unimim.shapes import Grid

SIZE, WIDTH = 224, 384
SWEEPS: dict[str, tuple[str, dict[str, tuple[float, dict[str, int]]]]] = {
    "image_size": ("pixels", {f"{size} px": (size**2, {"size": size}) for size in (112, 160, 224, 320)}),
    "batch": ("batch", {f"batch times {times}": (times, {"times": times}) for times in (1, 2, 4)}),
    "width": ("width", {f"width {width}": (width, {"width": width}) for width in (192, 384, 768)}),
    "targets": ("targets", {f"{count} targets": (count, {"targets": count}) for count in (1, 2, 4)}),
}


class Several(TargetGenerator):
    """The channels of several teachers, one behind the other."""

    def __init__(self, targets: list[TargetGenerator]) -> None:
        super().__init__()
        self.targets = nn.ModuleList(targets)
        self.dim = sum(target.dim for target in targets)

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        return torch.cat([target(images, grid_size) for target in self.targets], dim=-1)


def model(size: int = SIZE, width: int = WIDTH, targets: int = 1) -> MaskedImageModeling:
    """Student and teachers of one size."""
    network = {"img_size": size, "embed_dim": width, "num_heads": width // 64}
    teachers: list[TargetGenerator] = [
        FeatureTarget("vit_small_patch16_224", weights="random", model_args=network) for _ in range(targets)
    ]
    return MaskedImageModeling(
        teacher=teachers[0] if targets == 1 else Several(teachers),
        normalization=LayerNorm(),
        masking=BlockMasking(0.4),
        student=MaskTokenStudent("vit_small_patch16_224", network),
        head=LinearHead,
        loss=nn.SmoothL1Loss(),
    )


def step(arguments: argparse.Namespace, times: int = 1, **changes: int) -> Step:
    """Of a batch, `times` as large as the one that is asked for."""
    made = model(**changes).to(arguments.device)
    images = torch.rand(times * arguments.batch_size, 3, *made.student.image_size, device=arguments.device)
    return Step(made, images, trainer(arguments.device, arguments.precision))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed"))
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    for name in SWEEPS:
        sweep(name, arguments)
    processes(arguments)


def told(name: str, rows: dict[str, dict[str, Any]], more: str, arguments: argparse.Namespace, reference: str | None) -> None:
    """Reports one table."""
    device = arguments.device
    setup = f"{arguments.precision}, batch {arguments.batch_size}, {arguments.repetitions} repetitions after a warm-up"
    key = f"scaling_{name}" if device == "cpu" else f"scaling_{name}_cuda"
    report(
        key, rows, of="a step", unit="s", setup=f"{setup}; {more}", machine=machine("timm", device=device), reference=reference
    )


def sweep(name: str, arguments: argparse.Namespace) -> None:
    """One number changes; the exponent."""
    axis, points = SWEEPS[name]
    steps: dict[str, Callable[[], object]] = {row: step(arguments, **changes) for row, (_, changes) in points.items()}
    seconds = in_turn(steps, arguments.repetitions, device=arguments.device)
    medians = [statistics.median(values) for values in seconds.values()]
    exponent, _ = np.polyfit(np.log([at for at, _ in points.values()]), np.log(medians), 1)
    rows = {row: {"values": values} for row, values in seconds.items()}
    told(name, rows, f"seconds grow as {axis} to the power of {exponent:.2f}", arguments, next(iter(rows)))


def processes(arguments: argparse.Namespace) -> None:
    """One process against two: images a second. On GPUs, each process has one."""
    possible = arguments.device == "cpu" or torch.cuda.device_count() > 1
    rows: dict[str, dict[str, Any]] = {}
    for count in (1, 2):
        values = steps_of(count, arguments) if possible else []
        images = count * arguments.batch_size
        rows[f"processes: {count}"] = {"values": values, "images/s": images / statistics.median(values) if values else None}
    told("processes", rows, "gradients averaged by DistributedDataParallel", arguments, "processes: 1")


def steps_of(count: int, arguments: argparse.Namespace) -> list[float]:
    """Seconds of each step of so many processes, as the first of them sees them."""
    with TemporaryDirectory() as folder:
        threads = max(1, torch.get_num_threads() // count)
        multiprocessing.spawn(train, (count, folder, threads, vars(arguments)), nprocs=count)
        return [float(line) for line in (Path(folder) / "seconds").read_text().split()]


class Loss(nn.Module):
    """The training step as a module's forward pass, which DistributedDataParallel wants."""

    def __init__(self, model: MaskedImageModeling, context: Precision) -> None:
        super().__init__()
        self.model, self.context = model, context

    def forward(self, images: Tensor) -> Tensor:
        with self.context():
            return self.model.training_step(images, 0)


def train(rank: int, count: int, folder: str, threads: int, options: dict[str, Any]) -> None:
    """What each process does."""
    arguments = argparse.Namespace(**options)
    on_gpu = arguments.device != "cpu"
    torch.set_num_threads(threads)
    distributed.init_process_group("nccl" if on_gpu else "gloo", f"file://{folder}/meeting", rank=rank, world_size=count)
    if on_gpu:
        torch.cuda.set_device(rank)
    one = step(arguments)
    loss = DistributedDataParallel(Loss(one.model, one.context), device_ids=[rank] if on_gpu else None)
    seconds = []
    for _ in range(1 + arguments.repetitions):
        wait(arguments.device)
        distributed.barrier()
        start = perf_counter()
        one.backward(loss(one.images))
        one.update()
        wait(arguments.device)
        seconds.append(perf_counter() - start)
    if rank == 0:
        (Path(folder) / "seconds").write_text("\n".join(map(str, seconds[1:])))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
