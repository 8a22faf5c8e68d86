"""The comparison on composed scenes in miniature: every run once, kept the second time, made again when its yaml changes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import scenes

PUBLISHED = ROOT / "docs" / "scenes"


def shortened(path: Path, folder: Path, note: str = "") -> Path:
    """The recipe with few scenes, for one epoch."""
    config = yaml.safe_load(path.read_text())
    config["data"]["init_args"] |= {"train_scenes": 64, "val_scenes": 16, "root": str(ROOT / "data")}
    config["trainer"] |= {"max_epochs": 1, "check_val_every_n_epoch": 1} if "segment" in str(path) else {"max_epochs": 1}
    short = folder / path.name
    short.write_text(yaml.safe_dump(config) + note)
    return short


@pytest.mark.slow
def test_the_whole_story_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("PRETRAINING", "FINETUNING"):
        monkeypatch.setattr(scenes, name, shortened(getattr(scenes, name), tmp_path))
    calls: list[list[str]] = []
    for task in ("pretrain", "segment"):
        original = getattr(scenes.commands, task)
        monkeypatch.setattr(scenes.commands, task, lambda words, original=original: calls.append(words) or original(words))
    monkeypatch.setattr(scenes, "OUTPUT", tmp_path / "outputs")
    monkeypatch.setattr(scenes, "SEEDS", (0,))
    scenes.compare()
    assert len(calls) == 3  # one encoder, and both arms
    scratch, encoder, pretrained = calls
    assert "--model.checkpoint" not in scratch
    assert str(scenes.PRETRAINING) in encoder
    assert pretrained[-2:] == ["--model.checkpoint", str(tmp_path / "outputs" / "runs" / "encoder_0.ckpt")]
    results = json.loads((tmp_path / "outputs" / "results.json").read_text())
    assert [row["arm"] for row in results["rows"]] == ["from scratch", "pretrained"]
    assert all(0 < row["miou"] < 1 and 0 < row["aacc"] < 1 for row in results["rows"])
    assert (tmp_path / "outputs" / "figure.png").stat().st_size > 20_000
    assert scenes.table(results) in capsys.readouterr().out

    scenes.compare()  # started again, nothing is repeated
    assert len(calls) == 3
    shortened(ROOT / "conf" / "segment" / "sample.yaml", tmp_path, "# a note changes no run\n")
    scenes.compare()
    assert len(calls) == 3
    scenes.PRETRAINING.write_text(scenes.PRETRAINING.read_text().replace("weight_decay: 0.05", "weight_decay: 0.06"))
    scenes.compare()
    assert len(calls) == 5  # the encoder, and what was fine-tuned from it


def test_the_search_is_the_same_for_both_arms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def finetuned(arm: str, seed: int, split: str, **overrides: float) -> dict[str, float]:
        tried.append((arm, seed, split, overrides))
        return {"miou": overrides["lr"]}

    monkeypatch.setattr(scenes, "finetuned", finetuned)
    monkeypatch.setattr(scenes, "OUTPUT", tmp_path)
    scenes.tune()
    both = [[run[1:] for run in tried if run[0] == arm] for arm in scenes.ARMS]
    assert both[0] == both[1]
    assert len(both[0]) == len(scenes.LEARNING_RATES) * len(scenes.LAYER_DECAYS)
    assert {(seed, split) for seed, split, _ in both[0]} == {(0, "val")}


def test_the_recipe_is_the_best_of_the_published_search_for_both_arms() -> None:
    searched = json.loads((PUBLISHED / "tune.json").read_text())
    recipe = yaml.safe_load((ROOT / "conf" / "segment" / "sample.yaml").read_text())["model"]
    assert list(searched) == list(scenes.ARMS)
    for scores in searched.values():
        assert max(scores, key=lambda cell: scores[cell]) == f"{recipe['lr']:g}, {recipe['layer_decay']:g}"


def test_the_readmes_table_is_what_was_measured() -> None:
    """`make scenes-readme` writes both."""
    readme = (ROOT / "README.md").read_text()
    assert scenes.readme_with(readme, json.loads((PUBLISHED / "results.json").read_text())) == readme


def test_the_published_runs_show_a_gain() -> None:
    """In both seeds the pretrained encoder is above none by more than an arm's two seeds lie apart; ten minutes a run."""
    results = json.loads((PUBLISHED / "results.json").read_text())
    runs = {(run["arm"], run["seed"]): run for run in results["runs"]}
    assert set(runs) == {(arm, seed) for arm in scenes.ARMS for seed in scenes.SEEDS}
    for measure in ("miou", "miou_foreground"):
        of_arm = {arm: [runs[arm, seed][measure] for seed in scenes.SEEDS] for arm in scenes.ARMS}
        apart = max(max(values) - min(values) for values in of_arm.values())
        gains = [a - b for a, b in zip(of_arm["pretrained"], of_arm["from scratch"], strict=True)]
        assert min(gains) > apart
    assert all(run["seconds"] < 600 for run in runs.values())
    assert results["rows"] == [scenes.summarize(arm, [runs[arm, seed] for seed in scenes.SEEDS]) for arm in scenes.ARMS]
