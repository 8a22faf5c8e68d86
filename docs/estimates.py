"""Estimates of memory and time for two recipes on GPUs, by formula: nothing here was measured. `python docs/estimates.py`."""

import re
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from unimim import Mask, MaskTokenStudent

ROOT = Path(__file__).parent.parent
START, END = "<!-- estimates -->\n", "<!-- /estimates -->"
PEAK = 989e12
"""FLOP/s of an H100 SXM in dense bf16, by its data sheet."""
UTILISATION = 0.4
"""Of that, assumed."""
IMAGES = 1_281_167
"""ImageNet-1k's training images."""
GIB = 2**30
RUNS = [
    ("maskdistill_vit_base", 1, "DDP", False),
    ("maskdistill_vit_base", 1, "DDP", True),
    ("maskdistill_vit_huge", 8, "DDP", False),
    ("maskdistill_vit_huge", 8, "DDP", True),
    ("maskdistill_vit_huge", 8, "FSDP2", False),
    ("maskdistill_vit_huge", 8, "FSDP2", True),
]
"""Recipe, nodes of 8 GPUs, how the model is shared, whether blocks are computed again in the backward pass."""


def block_bytes(tokens: int, width: int, heads: int, hidden: int, layer_scale: bool, mixed: bool) -> int:
    """What a block keeps of one image for its backward pass.

    In fp32 always: the inputs of both norms, their means and deviations, and the attention's sums. In bf16 where precision is
    mixed: the norms' outputs, query, key and value, the attention's output, the MLP before and after its GELU, and what layer
    scale scales. A fused attention keeps no map of tokens x tokens.
    """
    wide = 2 * tokens * width + 4 * tokens + heads * tokens
    narrow = tokens * (6 * width + 2 * hidden + (2 * width if layer_scale else 0))
    return 4 * wide + (2 if mixed else 4) * narrow


def parts(recipe: str) -> dict[str, Any]:
    """A recipe's student, teacher and numbers; its networks are on the meta device, which holds no weights.

    FLOPs are of one image, and a multiplication and an addition are two: `frozen` the teacher's, `forward` the student's,
    `learning` student and head forward and backward.
    """
    config = yaml.safe_load((ROOT / "conf" / "pretrain" / f"{recipe}.yaml").read_text())
    letters, data = config["model"], config["data"]["init_args"]
    with torch.device("meta"):
        student = MaskTokenStudent(**letters["student"]["init_args"])
        teacher = timm.create_model(letters["teacher"]["init_args"]["network"])
        h, w = student.grid_size
        image, mask = torch.zeros(1, 3, data["image_size"], data["image_size"]), Mask(torch.zeros(1, h, w, dtype=torch.bool), 0)
    masked = round(letters["masking"]["init_args"]["ratio"] * h * w)
    with FlopCounterMode(display=False) as frozen, torch.no_grad():
        teacher.forward_features(image)
    with FlopCounterMode(display=False) as forward:
        tokens = student(image, mask)
    with FlopCounterMode(display=False) as backward:
        tokens.patches.sum().backward()
    head = 3 * 2 * masked * student.embed_dim * teacher.num_features
    return {
        "student": student,
        "teacher": teacher,
        "masked": masked,
        "batch": data["batch_size"],
        "size": data["image_size"],
        "epochs": config["trainer"]["max_epochs"],
        "frozen": frozen.get_total_flops(),
        "forward": forward.get_total_flops(),
        "learning": forward.get_total_flops() + backward.get_total_flops() + head,
    }


def memory(of: dict[str, Any], processes: int, sharded: bool, again: bool) -> dict[str, float]:
    """Bytes of one GPU in mixed precision, as docs/cluster.md says them.

    Args:
        of: a recipe's `parts`.
        processes: GPUs, each with its own batch.
        sharded: FSDP2, else DDP.
        again: blocks are computed again in the backward pass.
    """
    student, batch, blocks = of["student"], of["batch"], of["student"].backbone.blocks
    h, w = student.grid_size
    n, d, c, m = h * w + student.num_prefix_tokens, student.embed_dim, of["teacher"].num_features, of["masked"]
    heads, hidden = blocks[0].attn.num_heads, blocks[0].mlp.fc1.out_features
    learning = sum(p.numel() for p in student.parameters()) + (d + 1) * c
    in_blocks = sum(p.numel() for p in blocks.parameters())
    block = in_blocks // len(blocks)
    shards = processes if sharded else 1
    gathered = 2 * 2 * block + 4 * block + 4 * (learning - in_blocks) if sharded else 2 * in_blocks
    kept = block_bytes(n, d, heads, hidden, layer_scale=True, mixed=True)
    in_all = len(blocks) * 4 * n * d + kept if again else len(blocks) * kept
    around = 2 * 4 * (3 * of["size"] ** 2 + n * d + h * w * c + m * c) + 2 * heads * n**2
    return {
        "weights": 4 * learning / shards + gathered,
        "gradients": 4 * learning / shards,
        "optimizer": 8 * learning / shards,
        "teacher": 4 * sum(p.numel() for p in of["teacher"].parameters()),
        "activations": batch * (in_all + around),
    }


def table() -> str:
    """The whole table in Markdown."""
    lines = [
        "| recipe | nodes x GPUs x images | | again | weights | gradients | AdamW | teacher | activations | GiB "
        "| GFLOP an image | images/s of a GPU | minutes an epoch | hours in all |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    known = {recipe: parts(recipe) for recipe, *_ in RUNS}
    for recipe, nodes, strategy, again in RUNS:
        of, processes = known[recipe], 8 * nodes
        used = memory(of, processes, strategy == "FSDP2", again)
        work = of["frozen"] + of["learning"] + (of["forward"] if again else 0)
        speed = PEAK * UTILISATION / work
        minutes = IMAGES / (processes * speed) / 60
        cells = [
            f"[{recipe}](../conf/pretrain/{recipe}.yaml)",
            f"{nodes} x 8 x {of['batch']}",
            strategy,
            "yes" if again else "no",
            *(f"{value / GIB:.1f}" for value in used.values()),
            f"{sum(used.values()) / GIB:.0f}",
            f"{work / 1e9:,.0f}",
            f"{speed:,.0f}",
            f"{minutes:.1f}",
            f"{minutes * of['epochs'] / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page_with_table(text: str) -> str:
    """The page's text with the table between its marks."""
    return re.sub(f"{START}.*?{END}", lambda _: START + table() + END, text, flags=re.S)


if __name__ == "__main__":
    page = ROOT / "docs" / "cluster.md"
    page.write_text(page_with_table(page.read_text()))
    print(table(), end="")
