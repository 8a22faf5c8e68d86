"""Microseconds per image of drawing masks at 14x14, by size of the batch, beside MAE's batched draw and BEiT's loop per image.

make bench        (python benchmarks/masks.py)         a table for each batch size, outputs/bench/masks_BATCH.json
    python benchmarks/masks.py --device cuda           the same there, outputs/bench/masks_BATCH_cuda.json
"""

import argparse
import math
import random
from functools import partial

import torch
from report import in_turn, machine, report
from torch import Tensor

from unimim import BlockMasking, RandomMasking

BATCHES, GRID, RATIO, REPETITIONS = (16, 256), (14, 14), 0.4, 15


def mae(images: Tensor) -> Tensor:
    """MAE's way: argsort of noise, and the ranks below the count."""
    cells = GRID[0] * GRID[1]
    ranks = torch.rand(len(images), cells, device=images.device).argsort(1).argsort(1)
    return ranks < round(RATIO * cells)


def beit(images: Tensor) -> Tensor:
    """BEiT's way, one image and one rectangle after the other; it may stop short of the count."""
    return torch.stack([beit_of_one() for _ in images]).to(images.device)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    device = parser.parse_args().device
    for batch in BATCHES:
        measure(torch.zeros(batch, 3, 1, 1, device=device))


def measure(images: Tensor) -> None:
    """A masking reads nothing of the images but their number and device."""
    batch, device = len(images), images.device.type
    reference = "random, MAE's argsort (reference)"
    ways = {
        reference: partial(mae, images),
        "RandomMasking": partial(RandomMasking(RATIO), images, GRID),
        "BlockMasking": partial(BlockMasking(RATIO), images, GRID),
        "block, BEiT's loop per image": partial(beit, images),
    }
    seconds = in_turn(ways, REPETITIONS, device=device)
    report(
        f"masks_{batch}" if device == "cpu" else f"masks_{batch}_cuda",
        {name: {"values": [1e6 * value / batch for value in values]} for name, values in seconds.items()},
        of="masks",
        unit="us/image",
        setup=f"batch {batch}, grid {GRID}, {REPETITIONS} repetitions in turn after a warm-up",
        machine=machine(device=device),
        reference=reference,
    )


if __name__ == "__main__":
    main()
