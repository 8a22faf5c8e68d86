"""Microseconds per image of drawing masks for a batch of 256 at 14x14, beside MAE's batched draw and BEiT's loop per image.

make bench        (python benchmarks/masks.py)         a table, and outputs/bench/masks.json
"""

import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from unimim import BlockMasking, RandomMasking

BATCH, GRID, RATIO, REPETITIONS = 256, (14, 14), 0.4, 15


def mae(images: Tensor) -> Tensor:
    """MAE's way: argsort of noise, and the ranks below the count."""
    cells = GRID[0] * GRID[1]
    ranks = torch.rand(len(images), cells).argsort(1).argsort(1)
    return ranks < round(RATIO * cells)


def beit(images: Tensor) -> Tensor:
    """BEiT's way, one image and one rectangle after the other; it may stop short of the count."""
    return torch.stack([beit_of_one() for _ in images])


def beit_of_one() -> Tensor:
    h, w = GRID
    mask = torch.zeros(h, w, dtype=torch.bool)
    left, refusals = round(RATIO * h * w), 0
    while left > 0 and refusals < 10:
        area = random.uniform(16, left)
        aspect = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        refusals += 1
        if height < h and width < w:
            top, start = random.randint(0, h - height), random.randint(0, w - width)
            block = mask[top : top + height, start : start + width]
            added = height * width - int(block.sum())
            if 0 < added <= left:
                block[:] = True
                left, refusals = left - added, 0
    return mask


def microseconds(draw: Callable[[Tensor], Tensor], images: Tensor) -> list[float]:
    """Per image, of each repetition after a warm-up."""
    draw(images)
    times = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        draw(images)
        times.append(1e6 * (time.perf_counter() - start) / len(images))
    return times


def main() -> None:
    images = torch.zeros(BATCH, 3, 1, 1)
    ways = {
        "random, MAE's argsort (reference)": mae,
        "RandomMasking": lambda x: RandomMasking(RATIO)(x, GRID),
        "BlockMasking": lambda x: BlockMasking(RATIO)(x, GRID),
        "block, BEiT's loop per image": beit,
    }
    times = {name: microseconds(way, images) for name, way in ways.items()}
    reference = statistics.median(times["random, MAE's argsort (reference)"])
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {BATCH}, grid {GRID}"
    print(f"{machine}\n\n| masks | median us/image | min | max | times the reference |\n|---|---|---|---|---|")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"| {name} | {median:.1f} | {min(values):.1f} | {max(values):.1f} | {median / reference:.2f} |")
    file = Path("outputs/bench/masks.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine, "microseconds_per_image": times}, indent=1) + "\n")


if __name__ == "__main__":
    main()
