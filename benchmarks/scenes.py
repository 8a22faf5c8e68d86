"""Segmentation of composed scenes: what is a pretrained encoder worth there? Prints a table and draws a figure.

    make scenes        (python benchmarks/scenes.py)          table, outputs/scenes/results.json, outputs/scenes/figure.png
    make scenes-readme (python benchmarks/scenes.py --readme) puts table and figure into README and docs
    make scenes-tune   (python benchmarks/scenes.py --tune)   the grid that chose learning rate and layer decay of both arms

The encoder is conf/pretrain/demo_scenes.yaml's. Both arms are conf/segment/sample.yaml on the same scenes in the same order:
they differ in the encoder's first weights alone; learning rate and layer decay are the best of the grid for either. The table
is measured on the test split, the grid on the validation split. A finished run is kept in outputs/scenes/runs, and is not
repeated unless its yaml or its settings have changed.
"""

import argparse
import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import demo
import matplotlib
import torch
import yaml
from torch import Tensor

from unimim import ScenesData, UperNetSegmentation
from unimim.cli import tasks as commands
from unimim.pictures.labels import palette

matplotlib.use("agg")
import matplotlib.pyplot as plt

ARMS = ("from scratch", "pretrained")
MEASURES = {"miou": "mIoU, 11 classes", "miou_foreground": "mIoU, 10 garments", "aacc": "pixel accuracy"}
SEEDS = (0, 1)
LEARNING_RATES = (3e-3, 6e-3, 1.2e-2)
LAYER_DECAYS = (0.75, 1.0)
PRETRAINING = Path("conf/pretrain/demo_scenes.yaml")
FINETUNING = Path("conf/segment/sample.yaml")
OUTPUT = Path("outputs/scenes")
DOCS = Path("docs/scenes")
ALONE = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tune", action="store_true", help="search learning rates and layer decays on the validation split instead"
    )
    parser.add_argument("--readme", action="store_true", help="put the finished results into README and docs instead")
    warnings.filterwarnings("ignore", message=".*(num_workers|LeafSpec|log_every_n_steps).*")
    arguments = parser.parse_args()
    (tune if arguments.tune else into_readme if arguments.readme else compare)()


def compare() -> None:
    """Both arms with every seed, then the table and the figure."""
    runs = [finetuned(arm, seed, "test") for seed in SEEDS for arm in ARMS]
    rows = [summarize(arm, [run for run in runs if run["arm"] == arm]) for arm in ARMS]
    results = {"rows": rows, "seeds": SEEDS, "runs": runs, "encoders": [encoder(seed) for seed in SEEDS]}
    demo.write(OUTPUT / "results.json", results)
    draw(OUTPUT / "figure.png")
    print(f"\n{table(results)}\n\n{OUTPUT / 'results.json'}\n{OUTPUT / 'figure.png'}")


def finished(name: str, made_by: list[Any], make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """What `make` says of the run whose checkpoint it writes: read if it is there and was made by the same, made otherwise."""
    file = OUTPUT / "runs" / f"{name}.json"
    fingerprint = hashlib.sha256(repr(made_by).encode()).hexdigest()[:16]
    if file.is_file() and (kept := json.loads(file.read_text()))["made_by"] == fingerprint:
        print(f"{name}: kept from {file}")
        return kept
    print(name, flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {**make(file.with_suffix(".ckpt")), "made_by": fingerprint}
    demo.write(file, result)
    return result


def encoder(seed: int) -> dict[str, Any]:
    """`unimim pretrain fit` on the scenes without their labels."""
    config = {**yaml.safe_load(PRETRAINING.read_text()), "seed_everything": seed}

    def make(checkpoint: Path) -> dict[str, Any]:
        start = time.perf_counter()
        words = ["fit", "--config", str(PRETRAINING), "--seed_everything", str(seed), "--pictures", "false", *ALONE]
        trainer = commands.pretrain(words).trainer
        seconds = round(time.perf_counter() - start, 1)
        trainer.save_checkpoint(checkpoint)
        return {"checkpoint": str(checkpoint), "seed": seed, "seconds": seconds}

    return finished(f"encoder_{seed}", [config], make)


def finetuned(arm: str, seed: int, split: str, **overrides: float) -> dict[str, Any]:
    """`unimim segment fit` of one arm, measured on `split`, val or test; `overrides` are the model's."""
    start_from = encoder(seed) if arm == "pretrained" else None
    config = {**yaml.safe_load(FINETUNING.read_text()), "seed_everything": seed}
    config["model"] |= overrides

    def make(checkpoint: Path) -> dict[str, Any]:
        words = ["fit", "--config", str(FINETUNING), "--seed_everything", str(seed), *ALONE]
        words += [word for name, value in overrides.items() for word in (f"--model.{name}", str(value))]
        if start_from is not None:
            words += ["--model.checkpoint", start_from["checkpoint"]]
        start = time.perf_counter()
        cli = commands.segment(words)
        seconds = round(time.perf_counter() - start, 1)
        cli.trainer.save_checkpoint(checkpoint)
        batches = cli.datamodule.test_dataloader() if split == "test" else cli.datamodule.val_dataloader()
        (measured,) = cli.trainer.validate(cli.model, batches, verbose=False)
        return {"arm": arm, "seed": seed, **{key: measured[f"val/{key}"] for key in MEASURES}, "seconds": seconds}

    made_by = [config, split, start_from and start_from["made_by"]]
    return finished(run_name(arm, seed, split, **overrides), made_by, make)


def run_name(arm: str, seed: int, split: str, **overrides: float) -> str:
    return "_".join([arm.replace(" ", "_"), str(seed), split, *(f"{name}={value:g}" for name, value in overrides.items())])


def summarize(arm: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds, and half the distance between the lowest and the highest."""
    return {"arm": arm, **demo.averaged(runs, MEASURES)}


def table(results: dict[str, Any]) -> str:
    """In Markdown, as the README has it."""
    lines = [f"| encoder | {' | '.join(MEASURES.values())} | seconds of fine-tuning |", "|---|---|---|---|---|"]
    lines += [f"| {row['arm']} | {demo.cells(row, MEASURES)} | {row['seconds']:.0f} |" for row in results["rows"]]
    return "\n".join(lines)


def into_readme() -> None:
    """What the last `make scenes` and `make scenes-tune` found into docs/scenes, the table into the README."""
    results = json.loads((OUTPUT / "results.json").read_text())
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in ("results.json", "figure.png", "tune.json"):
        if (OUTPUT / name).is_file():
            shutil.copyfile(OUTPUT / name, DOCS / name)
    readme = Path("README.md")
    readme.write_text(readme_with(readme.read_text(), results))


def readme_with(readme: str, results: dict[str, Any]) -> str:
    """The README's text with the table between its two marks."""
    return demo.between_marks(readme, "scenes", table(results))


def draw(path: Path) -> None:
    """The first test scenes: input, truth, and what both arms of the first seed say."""
    files = {arm: OUTPUT / "runs" / f"{run_name(arm, SEEDS[0], 'test')}.ckpt" for arm in ARMS}
    models = {arm: UperNetSegmentation.load_from_checkpoint(file, weights_only=True).eval() for arm, file in files.items()}
    data = ScenesData(**{**yaml.safe_load(FINETUNING.read_text())["data"]["init_args"], "train_scenes": 16})
    data.setup()
    images, labels = (part[:8] for part in next(iter(data.test_dataloader())))
    with torch.no_grad():
        answers = {arm: model(images).argmax(1) for arm, model in models.items()}
    rows: dict[str, Any] = {"image": images.movedim(1, -1).numpy(), "truth": colored(labels)}
    rows |= {arm: colored(answer) for arm, answer in answers.items()}
    figure, axes = plt.subplots(len(rows), len(images), figsize=(10.5, 5.9), layout="constrained")
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax, picture in zip(line, pictures, strict=True):
            ax.imshow(picture, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
    handles = [plt.Line2D([], [], marker="s", linestyle="", color=color) for color in (palette(11) / 255).tolist()]
    figure.legend(handles, data.classes, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def colored(labels: Tensor) -> Any:
    """[b H W] -> uint8 [b H W 3], for matplotlib"""
    return palette(11)[labels].numpy()


def tune() -> None:
    """The same grid for both arms: mIoU on the validation split, seed 0."""
    scores = {
        arm: {
            f"{lr:g}, {layer_decay:g}": round(finetuned(arm, 0, "val", lr=lr, layer_decay=layer_decay)["miou"], 4)
            for lr, layer_decay in product(LEARNING_RATES, LAYER_DECAYS)
        }
        for arm in ARMS
    }
    demo.write(OUTPUT / "tune.json", scores)
    cells = list(scores["pretrained"])
    print(f"\n| lr, layer decay | {' | '.join(cells)} |\n|---|{'---|' * len(cells)}")
    for arm, row in scores.items():
        print(
            f"| {arm} | {' | '.join(f'**{row[c]:.3f}**' if row[c] == max(row.values()) else f'{row[c]:.3f}' for c in cells)} |"
        )


if __name__ == "__main__":
    main()
