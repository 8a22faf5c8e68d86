"""One training step of ViT-B with UperNet at 512 px: seconds and peak memory, beside transformers' BEiT with UperNet.

make bench        (python benchmarks/segmentation_step.py)      a table, outputs/bench/segmentation_step.json
Each of the two runs in a process of its own, so that the peak is its own.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from report import machine, peak_gib, report
from torch import Tensor, nn

from unimim.tasks.optim import fused_adamw
from unimim.training.cpu import faster_on_cpu

BATCH, SIZE, CLASSES, STEPS = 2, 512, 150, 3
RECIPE = Path("conf/segment/upernet_vit_base.yaml")
REFERENCE = "transformers (reference)"


def unimim_step() -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The recipe's model, and its training step."""
    from unimim import UperNetSegmentation

    model = UperNetSegmentation(**yaml.safe_load(RECIPE.read_text())["model"])
    model.log = lambda *_, **__: None  # type: ignore[method-assign]  # there is no Trainer

    def step(images: Tensor, labels: Tensor) -> Tensor:
        with faster_on_cpu(model):
            return model.training_step((images, labels), 0)

    return model, step


def transformers_step() -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The same network there: tables of relative positions in each block, no absolute ones, drop path 0.15, both heads."""
    from transformers import BeitConfig, BeitForSemanticSegmentation

    config = BeitConfig(
        image_size=SIZE,
        num_labels=CLASSES,
        use_relative_position_bias=True,
        use_absolute_position_embeddings=False,
        drop_path_rate=0.15,
        out_indices=[5, 7, 9, 12],  # blocks 3, 5, 7 and 10: 5.23 cannot name the last one, which runs for nothing
    )
    model = BeitForSemanticSegmentation(config)
    return model, lambda images, labels: model(pixel_values=images, labels=labels).loss


WAYS = {"unimim": unimim_step, REFERENCE: transformers_step}


def measure(way: str) -> dict[str, Any]:
    """Seconds of each step after a warm-up, peak memory of this process, and parameters."""
    torch.manual_seed(0)
    model, step = WAYS[way]()
    model.train()
    optimizer = fused_adamw([{"params": list(model.parameters()), "weight_decay": 0.05}], 5e-5, (0.9, 0.999))
    images, labels = torch.rand(BATCH, 3, SIZE, SIZE), torch.randint(0, CLASSES, (BATCH, SIZE, SIZE))
    seconds = []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        loss = step(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"values": seconds[1:], "peak memory, GiB": peak_gib(), "parameters, M": parameters / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=WAYS, help="measure one of the two, and print JSON")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way)))
    else:
        compare()


def compare() -> None:
    """Both, one after the other, as a table and as JSON."""
    rows = {}
    for way in WAYS:
        print(f"{way}: 1 + {STEPS} steps", flush=True)
        done = subprocess.run([sys.executable, __file__, "--way", way], stdout=subprocess.PIPE, text=True, check=True)
        rows[way] = json.loads(done.stdout.splitlines()[-1])
    report(
        "segmentation_step",
        rows,
        of="one step",
        unit="s",
        setup=f"float32, batch {BATCH} at {SIZE} px, {STEPS} steps after a warm-up",
        machine=machine("timm", "transformers"),
        reference=REFERENCE,
    )


if __name__ == "__main__":
    main()
