"""Images per second of making targets: HOG beside scikit-image's per channel, pixels, features, tokens; 224 px, float32.

make bench        (python benchmarks/targets.py)       three tables, and outputs/bench/{hog_default,hog_kept,targets}.json
    python benchmarks/targets.py --device cuda         one table, outputs/bench/targets_cuda.json
On a CPU HOG is measured in two processes of their own: with malloc's defaults, and with freed memory kept.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from report import in_turn, machine, report
from skimage.feature import hog
from torch import Tensor

from unimim import DVAETarget, FeatureTarget, HOGTarget, MeanColorTarget, PixelTarget, TargetGenerator, VQKDTarget
from unimim.training.cpu import FasterOnCPU

SIZE, GRID, HOG_BATCH = 224, (14, 14), 32
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**35), "THP_MEM_ALLOC_ENABLE": "1"}
"""The Makefile's CPU_MEMORY: glibc keeps freed memory, each page is faulted in once."""
ALLOCATORS: dict[str, dict[str, str]] = {"hog_default": {}, "hog_kept": KEPT}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch_size", type=int, default=8, help="of what is not HOG beside scikit-image")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--hog", choices=ALLOCATORS, help="HOG beside scikit-image alone, in this process")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.hog:
        beside_skimage(arguments.hog, arguments.repetitions)
        return
    if arguments.device == "cpu":
        environment = {name: value for name, value in os.environ.items() if name not in KEPT}
        for key, allocator in ALLOCATORS.items():
            words = ["--hog", key, "--repetitions", str(arguments.repetitions)]
            subprocess.run([sys.executable, __file__, *words], check=True, env={**environment, **allocator})
    all_kinds(arguments.device, arguments.batch_size, arguments.repetitions)


@torch.no_grad()
def beside_skimage(key: str, repetitions: int) -> None:
    """The same histograms, but that scikit-image takes central differences, and its angles from the other axis."""
    images, target = torch.rand(HOG_BATCH, 3, SIZE, SIZE), HOGTarget()
    reference = "skimage.feature.hog, each channel (reference)"
    ways: dict[str, Callable[[], object]] = {
        "HOGTarget": partial(target, images, GRID),
        reference: partial(skimage_hog, images),
    }
    seconds = in_turn(ways, repetitions)
    report(
        key,
        {name: {"values": [HOG_BATCH / value for value in values]} for name, values in seconds.items()},
        of="HOG",
        unit="images/s",
        setup=f"float32, batch {HOG_BATCH} at {SIZE} px, {repetitions} repetitions in turn after a warm-up",
        machine=machine("scikit-image"),
        reference=reference,
    )


def skimage_hog(images: Tensor) -> list[np.ndarray]:
    """Of each channel the cells by rows, then 9 bins: cells of 8 pixels, each scaled to length 1 by itself."""
    one = partial(hog, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(1, 1), block_norm="L2")
    return [one(channel) for channel in images.flatten(0, 1).numpy()]


@torch.no_grad()
def all_kinds(device: str, batch_size: int, repetitions: int) -> None:
    """Each kind of target. Networks have random weights, which take the same time."""
    clip = "vit_base_patch16_clip_quickgelu_224.openai"
    targets: dict[str, TargetGenerator] = {
        "PixelTarget": PixelTarget(),
        "MeanColorTarget": MeanColorTarget(),
        "HOGTarget": HOGTarget(),
        "FeatureTarget, CLIP ViT-B/16": FeatureTarget(clip, weights="random", norm=False),
        "VQKDTarget (BEiT v2's tokens)": VQKDTarget("random"),
        "DVAETarget (BEiT's tokens)": DVAETarget("random"),
    }
    images = torch.rand(batch_size, 3, SIZE, SIZE, device=device)
    ways = {name: partial(target.to(device), images, GRID) for name, target in targets.items()}
    with FasterOnCPU() if device == "cpu" else nullcontext():  # as in a step
        seconds = in_turn(ways, repetitions, device=device)
    report(
        "targets" if device == "cpu" else "targets_cuda",
        {name: {"values": [batch_size / value for value in values]} for name, values in seconds.items()},
        of="target",
        unit="images/s",
        setup=f"float32, batch {batch_size} at {SIZE} px, {repetitions} repetitions in turn after a warm-up",
        machine=machine("timm", device=device),
    )


if __name__ == "__main__":
    main()
