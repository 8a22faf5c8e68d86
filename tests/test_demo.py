"""The demo in miniature: every row once, kept the second time, made again when its yaml changes."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from unimim import FashionMNISTData

sys.path.insert(0, str(ROOT / "benchmarks"))
import demo


class FewGarments(FashionMNISTData):
    """640 images to learn from, 300 to test on."""

    def __init__(self) -> None:
        super().__init__(train_images=640)

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        images, labels = self.splits["test"]
        self.splits["test"] = (images[:300], labels[:300])


@pytest.mark.slow
def test_the_whole_story_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    pretrain, calls = demo.pretrain, []

    def short(row: str, seed: int, checkpoint: Path, *overrides: str) -> float:
        calls.append((row, seed))
        return pretrain(row, seed, checkpoint, "--data.train_images=640", "--trainer.max_epochs=1", *overrides)

    settings: dict[str, Any] = {"OUTPUT": tmp_path, "LABELS": 200, "FINETUNING_EPOCHS": 2, "SEEDS": (0,)}
    settings |= {"FashionMNISTData": FewGarments, "pretrain": short}
    for name, value in settings.items():
        monkeypatch.setattr(demo, name, value)
    demo.compare()
    assert calls == [(row, 0) for row in demo.ROWS]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [row["target"] for row in results["rows"]] == ["random init", "pixels", "hog", "features"]
    for row in results["rows"]:
        assert set(row) == {"target", "knn", "linear", "finetune_100", "seconds", "spread"}
        assert all(0.05 < row[key] < 0.95 for key in demo.MEASURES)
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    assert demo.table(results) in capsys.readouterr().out

    demo.compare()  # started again, nothing is repeated
    assert len(calls) == 4
    changed = tmp_path / "hog.yaml"
    changed.write_text((ROOT / "conf/pretrain/demo_hog.yaml").read_text() + "# another recipe\n")
    config_of = demo.config_of
    monkeypatch.setattr(demo, "config_of", lambda row: changed if row == "hog" else config_of(row))
    demo.compare()
    assert calls[4:] == [("hog", 0)]


def test_means_and_spread() -> None:
    runs = [{"target": "hog", "knn": a, "linear": b, "finetune_100": 0.5, "seconds": 10} for a, b in ((0.7, 0.8), (0.8, 0.9))]
    row = demo.summarize("hog", runs)
    assert row == {
        "target": "hog",
        "knn": 0.75,
        "linear": 0.85,
        "finetune_100": 0.5,
        "seconds": 10,
        "spread": {"knn": 0.05, "linear": 0.05, "finetune_100": 0},
    }
    results = {"rows": [row], "baselines": [{"target": "raw hog", "knn": 0.6, "linear": 0.7}]}
    assert demo.table(results).splitlines()[2:] == [
        "| hog | 75.0 ± 5.0 | 85.0 ± 5.0 | 50.0 ± 0.0 | 10 |",
        "| raw hog, no encoder | 60.0 | 70.0 | - | - |",
    ]
