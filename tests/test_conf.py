"""Every yaml of conf/pretrain: its six letters, its header, and two optimizer steps with conf/debug.yaml."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

from unimim.commands import pretrain
from unimim.pretraining import LETTERS

ROWS = sorted((ROOT / "conf" / "pretrain").glob("*.yaml"))
DEBUG = ROOT / "conf" / "debug.yaml"
NARROW = {"embed_dim": 24, "depth": 2, "num_heads": 2}
NARROW_SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}

every_row = pytest.mark.parametrize("path", ROWS, ids=lambda path: path.stem)


def two_steps(path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> None:
    """From another working directory, so that what is written shows: pictures alone. The data is the repository's."""
    monkeypatch.chdir(folder)
    command = ["fit", "--config", str(path), "--config", str(DEBUG), "--data.root", str(ROOT / "data"), *words]
    cli = pretrain([*command, "--trainer.enable_progress_bar=false"])
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    written = {path.relative_to(folder / "outputs/debug/pictures").name for path in folder.rglob("*") if path.is_file()}
    assert written == {"epoch=0-step=2.png", ".nomedia"}


@every_row
def test_the_six_letters_in_their_order(path: Path) -> None:
    assert list(yaml.safe_load(path.read_text())["model"])[:6] == list(LETTERS)


@every_row
def test_the_header_is_a_lab_note(path: Path) -> None:
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"^# Reported: \S", header, re.M)
    assert re.search(r"Ours: \S", header)
    assert f"conf/pretrain/{path.name}" in header


@every_row
def test_two_steps_at_small_width(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load(path.read_text())
    student = config["model"]["student"]["init_args"]
    narrow = NARROW_SWIN if student["backbone"].startswith("swin") else NARROW
    teacher = config["model"]["teacher"]
    teacher = teacher if isinstance(teacher, dict) else {"class_path": teacher}
    if blocks := teacher.get("init_args", {}).get("top_blocks"):
        narrow = {**narrow, "depth": blocks}
    narrow_student = {**student.get("model_args", {}), **narrow}
    words = [f"--model.student.model_args={yaml.safe_dump(narrow_student, default_flow_style=True).strip()}"]
    network = teacher.get("init_args", {}).get("network")
    if isinstance(network, str):
        narrow_teacher = {**teacher["init_args"].get("model_args", {}), **NARROW}
        words.append(f"--model.teacher.model_args={yaml.safe_dump(narrow_teacher, default_flow_style=True).strip()}")
    two_steps(path, monkeypatch, tmp_path, *words)
    has_weights = network is not None or teacher["class_path"] in ("unimim.VQKDTarget", "unimim.DVAETarget")
    warned = f"WARNING: --random_weights: model.teacher{'.network' if isinstance(network, dict) else ''} ("
    assert (warned in capsys.readouterr().out) == has_weights


@pytest.mark.slow
def test_maskdistill_at_full_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's ViT-B with a teacher of CLIP ViT-B/16's shape."""
    two_steps(ROOT / "conf" / "pretrain" / "maskdistill_vit_base.yaml", monkeypatch, tmp_path)
    said = capsys.readouterr().out
    assert re.search(r"T  teacher +FeatureTarget +86,193,152 +frozen", said)  # the vision tower with its projection
    assert re.search(r"S  student +MaskTokenStudent +85,666,128 +trainable", said)
    assert re.search(r"H  head +LinearHead +590,592 +trainable", said)


def test_maskdistill_is_the_papers_recipe() -> None:
    """The experiment setup of the paper, and the file's own arithmetic."""
    config = yaml.safe_load((ROOT / "conf" / "pretrain" / "maskdistill_vit_base.yaml").read_text())
    model, trainer = config["model"], config["trainer"]
    assert (model["lr"], model["weight_decay"], trainer["max_epochs"]) == (1.5e-3, 0.05, 300)
    assert model["student"]["init_args"]["model_args"]["drop_path_rate"] == 0.1
    assert model["masking"]["init_args"]["ratio"] == 0.4
    assert round(0.4 * 196) == 78
    assert 8 * config["data"]["init_args"]["batch_size"] == 2048
