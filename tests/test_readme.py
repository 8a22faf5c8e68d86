"""What the README shows is run, parsed, or equal to what was measured."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import OF_A_TASK, ROOT
from PIL import Image

from unimim.cli.main import main

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
    assert OF_A_TASK[words[0]] in shown


PHOTOS = [Image.new("RGB", (40, 300)), Image.new("RGBA", (300, 40)), Image.new("L", (500, 400)), Image.new("P", (97, 90))]


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command of "A picture of your own photos", cut short, in a folder with `PHOTOS`."""
    monkeypatch.chdir(tmp_path)
    Path("conf").symlink_to(ROOT / "conf")
    Path("My photos", "2019").mkdir(parents=True)
    for i, photo in enumerate(PHOTOS):
        photo.save(Path("My photos", "2019" if i else "", f"{i}.png"))
    (command,) = [command for command in COMMANDS if command.endswith("--data.root PHOTOS")]
    given = shlex.split(command.replace("PHOTOS", "'My photos'"))
    return [*given[1:], "--trainer.max_steps=2", "--trainer.enable_progress_bar=false"]


def test_one_command_draws_photos_of_any_size_and_mode(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    (path,) = re.findall(r"^pictures: (.+)$", capsys.readouterr().out, re.M)
    assert Image.open(path).width > len(PHOTOS) * 224


def test_fewer_photos_than_a_batch_are_one_line_and_a_smaller_batch(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("My photos", "0.png").unlink()
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == (
        "unimim: error: My photos has 3 images, which is less than one batch of 4: set data.batch_size to 3 or less"
    )
    main([*words, "--data.batch_size=3"])
    assert "\npictures: " in capsys.readouterr().out


def test_the_options_named_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    fill = {"NAME": "vit_base_patch16_224.dino", "PATH": "weights.pt", "CHECKPOINT": "epoch=0.ckpt"}
    found = re.findall(r"`(--(?:trainer|model)[^`]+)`", README)
    assert len(found) > 5
    for words in (re.sub("NAME|PATH|CHECKPOINT", lambda match: fill[match[0]], words) for words in found):
        with pytest.raises(SystemExit) as end:
            main(["pretrain", "fit", "--config", RECIPE, *words.split(), *([] if ".help" in words else ["--print_config"])])
        assert not end.value.code, words
    assert "class_path: unimim.KNNCallback" in capsys.readouterr().out


def test_table_1_is_what_the_recipes_say() -> None:
    """`make table` writes it."""
    sys.path.insert(0, str(ROOT / "docs"))
    import table1

    assert table1.readme_with_table(README) == README
    rows = [line for line in README.splitlines() if line.startswith("| [") and "](conf/pretrain/" in line]
    ours = {"photos", *(f"demo_{name}" for name in ("pixels", "hog", "features", "scenes"))}
    recipes = {path.stem for path in (ROOT / "conf" / "pretrain").glob("*.yaml")} - ours
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
    """`make bench-docs` writes the tables of docs/performance.json."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import report

    page = (ROOT / "docs" / "performance.md").read_text()
    kept = json.loads((ROOT / "docs" / "performance.json").read_text())
    assert report.document_with(page, kept) == page
