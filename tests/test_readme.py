"""What the README shows is run, parsed, or equal to what was measured."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image

from unimim.cli import main

RECIPE = str(ROOT / "conf" / "pretrain" / "maskdistill_vit_base.yaml")
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (250, 240), (60 * i, 20, 100)).save(tmp_path / "photos" / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(PYTHON[0], names)
    assert type(names["encoder"]).__name__ == "VisionTransformer"
    assert names["model"].global_step == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parsed as it stands, with the README's own mytarget.py in the working directory."""
    (tmp_path / "mytarget.py").write_text(PYTHON[1])
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    (tmp_path / "outputs" / "pretrain" / "version_0").mkdir(parents=True)
    shutil.copy(RECIPE, tmp_path / "outputs" / "pretrain" / "version_0" / "config.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    program, *words = shlex.split(command, comments=True)
    assert program == "unimim"
    with pytest.raises(SystemExit) as end:
        main([*words, "--print_config"])
    assert not end.value.code
    shown = capsys.readouterr().out
    assert {
        "pretrain": "normalization:",
        "finetune": "layer_decay:",
        "probe": "lrs:",
        "knn": "k: 20",
        "export": "to: timm",
        "segment": "auxiliary_weight:",
    }[words[0]] in shown


def test_the_options_named_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    fill = {"NAME": "vit_base_patch16_224.dino", "PATH": "weights.pt", "CHECKPOINT": "epoch=0.ckpt"}
    found = re.findall(r"`(--(?:trainer|model)[^`]+)`", README)
    assert len(found) > 10
    for words in (re.sub("NAME|PATH|CHECKPOINT", lambda match: fill[match[0]], words) for words in found):
        with pytest.raises(SystemExit) as end:
            main(["pretrain", "fit", "--config", RECIPE, *words.split(), *([] if ".help" in words else ["--print_config"])])
        assert not end.value.code, words
    assert "class_path: unimim.KNNCallback" in capsys.readouterr().out


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_table_1_is_what_the_recipes_say() -> None:
    """`make table` writes it."""
    sys.path.insert(0, str(ROOT / "docs"))
    import table1

    assert table1.readme_with_table(README) == README
    rows = [line for line in README.splitlines() if line.startswith("| [") and "](conf/pretrain/" in line]
    recipes = {path.stem for path in (ROOT / "conf" / "pretrain").glob("*.yaml") if not path.stem.startswith("demo")}
    assert {row.split("]")[0].removeprefix("| [") for row in rows} == recipes
    assert all(row.count("](") == 7 for row in rows)  # the recipe and its six letters, each a link


def test_the_demos_table_is_what_was_measured() -> None:
    """`make demo-readme` writes both."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import demo

    results = json.loads((ROOT / "docs" / "demo" / "results.json").read_text())
    assert demo.readme_with(README, results) == README
    assert {row["target"] for row in results["rows"]} == {"random init", "pixels", "hog", "features"}


def test_the_performance_page_is_what_was_measured() -> None:
    """`python benchmarks/segmentation_step.py --docs` writes the table of docs/performance.json."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import segmentation_step

    page = (ROOT / "docs" / "performance.md").read_text()
    results = json.loads((ROOT / "docs" / "performance.json").read_text())
    assert segmentation_step.document_with(page, results["segmentation_step"]) == page
