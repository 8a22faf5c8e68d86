"""One training step of ViT-B with UperNet at 512 px: seconds and peak memory, beside transformers' BEiT with UperNet.

make bench        (python benchmarks/segmentation_step.py)      a table, outputs/bench/segmentation_step.json
With --docs the last measurement is put into docs/performance.json and its table into docs/performance.md. Each of the two
runs in a process of its own, so that the peak is its own.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

BATCH, SIZE, CLASSES, STEPS = 2, 512, 150, 3
RECIPE = Path("conf/segment/upernet_vit_base.yaml")
OUTPUT = Path("outputs/bench/segmentation_step.json")
DOCUMENT = Path("docs/performance.md")
KEPT = Path("docs/performance.json")
REFERENCE = "transformers (reference)"


def unimim_step() -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The recipe's model, and its training step."""
    from unimim import UperNetSegmentation

    model = UperNetSegmentation(**yaml.safe_load(RECIPE.read_text())["model"])
    model.log = lambda *_, **__: None  # type: ignore[method-assign]  # there is no Trainer
    return model, lambda images, labels: model.training_step((images, labels), 0)


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
    """Seconds of each step after a warm-up, peak memory of this process in GiB, parameters, and the last loss."""
    torch.manual_seed(0)
    model, step = WAYS[way]()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.05)
    images, labels = torch.rand(BATCH, 3, SIZE, SIZE), torch.randint(0, CLASSES, (BATCH, SIZE, SIZE))
    seconds = []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        loss = step(images, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of Linux, in KiB
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"seconds": seconds[1:], "peak_gib": peak, "parameters": parameters, "loss": float(loss)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--way", choices=WAYS, help="measure one of the two, and print JSON")
    parser.add_argument("--docs", action="store_true", help="put the last measurement into docs/performance.md instead")
    arguments = parser.parse_args()
    if arguments.way:
        print(json.dumps(measure(arguments.way)))
    elif arguments.docs:
        into_docs(json.loads(OUTPUT.read_text()))
    else:
        compare()


def compare() -> None:
    """Both, one after the other, as a table and as JSON."""
    measured = {}
    for way in WAYS:
        print(f"{way}: 1 + {STEPS} steps", flush=True)
        done = subprocess.run([sys.executable, __file__, "--way", way], capture_output=True, text=True, check=True)
        measured[way] = json.loads(done.stdout.splitlines()[-1])
    results = {"machine": machine(), "batch": BATCH, "size": SIZE, "ways": measured}
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table(results)}\n\n{OUTPUT}")


def machine() -> str:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpus = {line.partition(": ")[2] for line in lines if line.startswith("model name")}
    allocator = "" if os.environ.get("MALLOC_MMAP_MAX_") != "0" else ", freed memory kept (MALLOC_MMAP_MAX_=0)"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "transformers"))
    return f"{', '.join(sorted(cpus)) or platform.machine()}, {torch.get_num_threads()} threads, {packages}, float32{allocator}"


def table(results: dict[str, Any]) -> str:
    """In Markdown, as docs/performance.md has it."""
    ways = results["ways"]
    reference = statistics.median(ways[REFERENCE]["seconds"])
    lines = [
        f"{results['machine']}; batch {results['batch']} at {results['size']} px, "
        f"{len(ways[REFERENCE]['seconds'])} steps after a warm-up.",
        "",
        "| one step | median s | min | max | times the reference | peak memory, GiB | parameters, M |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, measured in ways.items():
        seconds = measured["seconds"]
        median = statistics.median(seconds)
        lines.append(
            f"| {way} | {median:.1f} | {min(seconds):.1f} | {max(seconds):.1f} | {median / reference:.2f} | "
            f"{measured['peak_gib']:.2f} | {measured['parameters'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def into_docs(results: dict[str, Any]) -> None:
    """A measurement and its table into docs."""
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    KEPT.write_text(json.dumps(kept | {"segmentation_step": results}, indent=1) + "\n")
    DOCUMENT.write_text(document_with(DOCUMENT.read_text(), results))


def document_with(document: str, results: dict[str, Any]) -> str:
    """The text of docs/performance.md with the table between its two marks."""
    before, _, rest = document.partition("<!-- segmentation step -->")
    _, _, after = rest.partition("<!-- /segmentation step -->")
    return f"{before}<!-- segmentation step -->\n{table(results)}\n<!-- /segmentation step -->{after}"


if __name__ == "__main__":
    main()
