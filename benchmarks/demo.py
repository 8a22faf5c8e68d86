"""The demo: what does a small encoder learn from three targets? Pretrains, evaluates, prints a table and draws a figure.

    make demo        (python benchmarks/demo.py)         table, outputs/demo/results.json, outputs/demo/figure.png
    make demo-readme (python benchmarks/demo.py --readme) puts table and figure into README and docs
    make demo-tune   (python benchmarks/demo.py --tune)  the grid of learning rates that chose those in the yamls

Every encoder comes from `unimim pretrain fit --config conf/pretrain/demo_TARGET.yaml`; the evaluation is the package's own
k-NN, linear probe and fine-tuning, the same for every row. A run that is finished is kept in outputs/demo/runs, and not
repeated unless its yaml or the evaluation below has changed.
"""

import argparse
import hashlib
import json
import shutil
import statistics
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import pytorch_lightning as pl
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from unimim import CPUPrecision, FashionMNISTData, FineTuning, HOGTarget, PixelTarget, load_backbone
from unimim.cli import tasks as commands
from unimim.tasks.knn import knn
from unimim.tasks.pretraining import MaskedImageModeling
from unimim.tasks.probing import accuracy, extract_features, linear_probe

matplotlib.use("agg")
import matplotlib.pyplot as plt

TARGETS = ("pixels", "hog", "features")
ROWS = ("random init", *TARGETS)
MEASURES = {"knn": "k-NN", "linear": "linear probe", "finetune_100": "100 labels"}
SEEDS = (0, 1)
LABELS = 5000  # of k-NN and linear probe
FINETUNING = {"lr": 1e-3, "layer_decay": 1.0, "warmup_epochs": 10, "min_lr": 0.0}  # the same for every row
FINETUNING_EPOCHS = 80
LEARNING_RATES = (1e-3, 2e-3, 4e-3, 8e-3)
OUTPUT = Path("outputs/demo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="search the learning rates on the validation split instead")
    warnings.filterwarnings("ignore", message=".*(num_workers|LeafSpec|log_every_n_steps).*")
    parser.add_argument("--readme", action="store_true", help="put the finished results into README and docs instead")
    arguments = parser.parse_args()
    (tune if arguments.tune else into_readme if arguments.readme else compare)()


def compare() -> None:
    """Every row with every seed, then the table and the figure."""
    data = FashionMNISTData()
    data.prepare_data()
    data.setup()
    runs = [finished(row, seed, data) for seed in SEEDS for row in ROWS]
    rows = [summarize(row, [result for result in runs if result["target"] == row]) for row in ROWS]
    results = {"rows": rows, "baselines": baselines(data), "seeds": SEEDS, "labels": LABELS, "runs": runs}
    write(OUTPUT / "results.json", results)
    draw(data, results, OUTPUT / "figure.png")
    print(f"\n{table(results)}\n\n{OUTPUT / 'results.json'}\n{OUTPUT / 'figure.png'}")


def finished(row: str, seed: int, data: FashionMNISTData) -> dict[str, Any]:
    """The result of one run: read if it is there, made otherwise."""
    name = f"{row.replace(' ', '_')}_{seed}"
    file = OUTPUT / "runs" / f"{name}.json"
    made_by = fingerprint(row)
    if file.is_file() and (kept := json.loads(file.read_text()))["made_by"] == made_by:
        print(f"{row}, seed {seed}: kept from {file}")
        return kept
    print(f"{row}, seed {seed}", flush=True)
    checkpoint = file.with_suffix(".ckpt")
    seconds = pretrain(row, seed, checkpoint)
    result = {"target": row, "seed": seed, **evaluate(checkpoint, data, seed), "seconds": seconds, "made_by": made_by}
    write(file, result)
    return result


def config_of(row: str) -> Path:
    """A row's yaml; random init is the features row before its first step."""
    return Path(f"conf/pretrain/demo_{row if row in TARGETS else 'features'}.yaml")


def fingerprint(row: str) -> str:
    """Of all that a kept result depends on, but for the code."""
    settings = repr((LABELS, FINETUNING, FINETUNING_EPOCHS))
    return hashlib.sha256(config_of(row).read_bytes() + settings.encode()).hexdigest()[:16]


def pretrain(row: str, seed: int, checkpoint: Path, *overrides: str) -> float:
    """`unimim pretrain fit` with the row's yaml; writes the checkpoint and returns the seconds it took."""
    words = ["fit", "--config", str(config_of(row)), "--seed_everything", str(seed), *overrides]
    words += ["--pictures", "false", "--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]
    if row not in TARGETS:
        words += ["--trainer.max_epochs", "0"]
    start = time.perf_counter()
    trainer = commands.pretrain(words).trainer
    seconds = time.perf_counter() - start
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(checkpoint)
    return round(seconds, 1)


def evaluate(checkpoint: Path, data: FashionMNISTData, seed: int) -> dict[str, float]:
    """Test accuracies of the encoder in a checkpoint."""
    backbone = load_backbone(checkpoint)
    bank, bank_labels = extract_features(backbone, data.labelled_dataloader("train", LABELS))
    features, labels = extract_features(backbone, data.labelled_dataloader("test"))
    return {
        "knn": accuracy(knn(features, bank, bank_labels), labels),
        "linear": accuracy(linear_probe(bank, bank_labels, features), labels),
        "finetune_100": finetune(checkpoint, data, seed),
    }


def finetune(checkpoint: Path, data: FashionMNISTData, seed: int) -> float:
    """Test accuracy after fine-tuning on the first ten labelled images of each class."""
    pl.seed_everything(seed, verbose=False)
    _, labels = data.splits["train"]
    first_ten = torch.cat([(labels == label).nonzero()[:10, 0] for label in range(10)])
    pairs = [data.labelled_dataloader("train").dataset[int(index)] for index in first_ten]
    few = TensorDataset(torch.stack([image for image, _ in pairs]), torch.stack([label for _, label in pairs]))
    model = FineTuning(load_backbone(checkpoint, num_classes=10, global_pool="avg"), **FINETUNING)
    trainer = pl.Trainer(
        accelerator="cpu",
        plugins=[CPUPrecision()],
        max_epochs=FINETUNING_EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(model, DataLoader(few, batch_size=50, shuffle=True))
    trainer.limit_val_batches = 1.0
    (measured,) = trainer.validate(model, data.labelled_dataloader("test"), verbose=False)
    return measured["val/acc1"]


def baselines(data: FashionMNISTData) -> list[dict[str, Any]]:
    """The same k-NN and probe on no encoder at all: raw pixels and raw HOG."""
    rows = []
    for name, target in {"raw pixels": PixelTarget(8), "raw hog": HOGTarget(8, 4)}.items():
        bank, bank_labels = flattened(target, data.labelled_dataloader("train", LABELS))
        features, labels = flattened(target, data.labelled_dataloader("test"))
        rows.append(
            {
                "target": name,
                "knn": accuracy(knn(features, bank, bank_labels), labels),
                "linear": accuracy(linear_probe(bank, bank_labels, features), labels),
            }
        )
    return rows


def flattened(target: PixelTarget | HOGTarget, batches: Any) -> tuple[Tensor, Tensor]:
    """A target as features of the whole image: [n h*w*c] and labels [n]. The three equal channels are taken once."""
    features, labels = [], []
    for images, batch_labels in batches:
        patches = target(images, (4, 4))
        pixels = isinstance(target, PixelTarget)  # ordered row, column, channel; HOG is ordered channel, bin, cell
        features.append((patches[..., ::3] if pixels else patches[..., : target.dim // 3]).flatten(1))
        labels.append(batch_labels)
    return torch.cat(features), torch.cat(labels)


def summarize(row: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and half the distance between the lowest and the highest."""
    return {"target": row, **averaged(runs, MEASURES)}


def averaged(runs: list[dict[str, Any]], measures: Iterable[str]) -> dict[str, Any]:
    """Means of measures and seconds over runs, and as `spread` half the distance between the lowest and the highest."""
    values = {key: [result[key] for result in runs] for key in (*measures, "seconds")}
    means = {key: round(statistics.mean(values[key]), 4) for key in values}
    return {**means, "spread": {key: round((max(values[key]) - min(values[key])) / 2, 4) for key in measures}}


def cells(row: dict[str, Any], measures: Iterable[str]) -> str:
    """What `averaged` gave, as cells of a table in Markdown, in percent."""
    return " | ".join(f"{100 * row[key]:.1f} ± {100 * row['spread'][key]:.1f}" for key in measures)


def table(results: dict[str, Any]) -> str:
    """In Markdown, as the README has it."""
    lines = [f"| target | {' | '.join(MEASURES.values())} | seconds |", "|---|---|---|---|---|"]
    for row in results["rows"]:
        seconds = f"{row['seconds']:.0f}" if row["target"] in TARGETS else "-"
        lines.append(f"| {row['target']} | {cells(row, MEASURES)} | {seconds} |")
    for row in results["baselines"]:
        lines.append(f"| {row['target']}, no encoder | {100 * row['knn']:.1f} | {100 * row['linear']:.1f} | - | - |")
    return "\n".join(lines)


def into_readme() -> None:
    """The results and the figure of the last `make demo` into docs/demo, their table into the README."""
    results = json.loads((OUTPUT / "results.json").read_text())
    write(Path("docs/demo/results.json"), results)
    shutil.copyfile(OUTPUT / "figure.png", "docs/demo/figure.png")
    readme = Path("README.md")
    readme.write_text(readme_with(readme.read_text(), results))


def readme_with(readme: str, results: dict[str, Any]) -> str:
    """The README's text with the table between its two marks."""
    return between_marks(readme, "demo", table(results))


def between_marks(text: str, mark: str, content: str) -> str:
    """A text with `content` between its marks `<!-- mark -->` and `<!-- /mark -->`."""
    before, _, rest = text.partition(f"<!-- {mark} -->")
    _, _, after = rest.partition(f"<!-- /{mark} -->")
    return f"{before}<!-- {mark} -->\n{content}\n<!-- /{mark} -->{after}"


def draw(data: FashionMNISTData, results: dict[str, Any], path: Path) -> None:
    """A few test images with mask and the three targets as pictures, beside the accuracies."""
    models = {
        target: MaskedImageModeling.load_from_checkpoint(OUTPUT / "runs" / f"{target}_0.ckpt", weights_only=True).eval()
        for target in TARGETS
    }
    every, labels = next(iter(data.labelled_dataloader("test")))
    chosen = [int((labels == label).nonzero()[0]) for label in (0, 1, 5, 7, 8, 9)]
    images = every[chosen]
    h, w = grid_size = models["pixels"].student.grid_size
    torch.manual_seed(0)
    mask = models["pixels"].masking(images, grid_size)
    hidden = mask.tensor.repeat_interleave(32 // h, 1).repeat_interleave(32 // w, 2)
    with torch.no_grad():
        targets = {name: model.normalization(model.teacher(every, grid_size)) for name, model in models.items()}
    gray = rearrange(targets["pixels"], "b h w (p q c) -> b (h p) (w q) c", p=8, q=8)[chosen, ..., 0]
    colors = principal_colors(targets["features"])[chosen]
    histograms = rearrange(targets["hog"], "b h w (c k i j) -> b (h i) (w j) c k", c=3, i=2, j=2)[chosen, ..., 0, :]

    figure = plt.figure(figsize=(13, 6.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    names = ("image  x", "student sees  M(x)", "pixels  N(T(x))", "HOG  N(T(x))", "features  N(T(x))")
    axes = left.subplots(len(names), len(chosen), gridspec_kw={"wspace": 0.03, "hspace": 0.03})
    for row, name in zip(axes, names, strict=True):
        for ax in row:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for i in range(len(chosen)):
        picture = images[i].permute(1, 2, 0)
        axes[0][i].imshow(picture)
        axes[1][i].imshow(torch.where(hidden[i][..., None], torch.tensor([0.85, 0.75, 0.55]), picture))
        axes[2][i].imshow(gray[i], cmap="gray", vmin=-2, vmax=2)
        draw_histograms(axes[3][i], histograms[i])
        axes[4][i].imshow(colors[i], interpolation="nearest")
    draw_accuracies(right.subplots(), results)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def principal_colors(target: Tensor) -> Tensor:
    """[b h w c] -> the first three principal components as red, green and blue: [b h w 3] in [0, 1]."""
    patches = rearrange(target, "b h w c -> (b h w) c")
    _, _, components = torch.pca_lowrank(patches, q=3)
    projected = (target - patches.mean(0)) @ components
    low, high = (projected.flatten(0, 2).quantile(q, dim=0) for q in (0.02, 0.98))
    return ((projected - low) / (high - low)).clamp(0, 1)


def draw_histograms(ax: Any, histograms: Tensor) -> None:
    """Each cell [rows columns bins] as strokes along the edges: a bin's angle is the gradient's, the edge is across it."""
    rows, columns, bins = histograms.shape
    ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", facecolor="black")
    for k in range(bins):
        angle = torch.tensor(torch.pi * (k + 0.5) / bins)
        dx, dy = float(angle.cos()) * 0.45, -float(angle.sin()) * 0.45
        for i in range(rows):
            for j in range(columns):
                if (strength := float(histograms[i, j, k])) > 0.05:
                    x, y = j + 0.5, i + 0.5
                    ax.plot((x - dx, x + dx), (y - dy, y + dy), color="white", alpha=min(1, strength), linewidth=1)


def draw_accuracies(ax: Any, results: dict[str, Any]) -> None:
    """Bars of the means, a dot for each seed."""
    colors = dict(zip(ROWS, ("#b0b0b0", "#e0a458", "#5b8e7d", "#3d5a99"), strict=True))
    for i, row in enumerate(results["rows"]):
        for j, key in enumerate(MEASURES):
            x = j + (i - 1.5) * 0.2
            label = row["target"] if j == 0 else None
            ax.bar(x, 100 * row[key], 0.18, color=colors[row["target"]], label=label)
            ax.text(x, 100 * row[key] + 1.2, f"{100 * row[key]:.1f}", ha="center", fontsize=8)
            seeds = [100 * result[key] for result in results["runs"] if result["target"] == row["target"]]
            ax.scatter([x] * len(seeds), seeds, s=9, color="black", zorder=3, linewidths=0)
    ax.set_xticks(range(len(MEASURES)), [*MEASURES.values()])
    ax.set(ylabel="test accuracy (%)", ylim=(0, 100))
    ax.set_title("What the frozen encoder knows, and what 100 labels make of it", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, ncols=4, loc="upper center", fontsize=9)


def tune() -> None:
    """The same grid of learning rates for every target: linear probe on the validation split, seed 0."""
    data = FashionMNISTData()
    data.prepare_data()
    data.setup()
    scores: dict[str, dict[str, float]] = {}
    for target in TARGETS:
        for lr in LEARNING_RATES:
            checkpoint = OUTPUT / "tune" / f"{target}_{lr:g}.ckpt"
            if not checkpoint.is_file():
                pretrain(target, 0, checkpoint, "--model.lr", str(lr))
            backbone = load_backbone(checkpoint)
            bank, bank_labels = extract_features(backbone, data.labelled_dataloader("train", LABELS))
            features, labels = extract_features(backbone, data.labelled_dataloader("val"))
            score = accuracy(linear_probe(bank, bank_labels, features), labels)
            scores.setdefault(target, {})[f"{lr:g}"] = round(score, 4)
    write(OUTPUT / "tune.json", scores)
    print(f"\n| target | {' | '.join(f'{lr:g}' for lr in LEARNING_RATES)} |\n|---|{'---|' * len(LEARNING_RATES)}")
    for target, row in scores.items():
        best = max(row, key=lambda lr: row[lr])
        print(f"| {target} | {' | '.join(f'**{v:.3f}**' if lr == best else f'{v:.3f}' for lr, v in row.items())} |")


def write(path: Path, content: Any) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


if __name__ == "__main__":
    main()
