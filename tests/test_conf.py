"""Every yaml of conf/pretrain: its six letters, its header, two steps with conf/debug.yaml, and what is trained after it."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT

import unimim
from unimim import FineTuning, UperNetSegmentation
from unimim.cli.tasks import pretrain
from unimim.tasks.pretraining import LETTERS
from unimim.weights.checkpoint import describe_backbone

ROWS = sorted((ROOT / "conf" / "pretrain").glob("*.yaml"))
DEBUG = ROOT / "conf" / "debug.yaml"
NARROW = {"embed_dim": 24, "depth": 2, "num_heads": 2}
NARROW_SWIN = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}

PAPERS = [path for path in ROWS if not path.stem.startswith(("demo_", "photos"))]
"""The recipes that are of a paper."""
TRAINED_AFTER = [path for task in ("finetune", "segment") for path in sorted((ROOT / "conf" / task).glob("*_*.yaml"))]

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


def header_of(path: Path) -> str:
    """The comment lines at the top as one line."""
    return " ".join(line.removeprefix("#").strip() for line in path.read_text().split("seed_everything")[0].splitlines())


@pytest.mark.parametrize("path", [*PAPERS, *TRAINED_AFTER], ids=lambda path: f"{path.parent.name}_{path.stem}")
def test_a_published_recipe_says_its_source(path: Path) -> None:
    """Whoever says "official" names repository and commit; no source is "a later paper"."""
    header = header_of(path)
    assert "Source: " in header
    assert "official" not in path.read_text().lower() or re.search(r"[\w.-]+/[\w.-]+@[0-9a-f]{7}\b", header)
    assert "later paper" not in header


STARTS = {  # of warm-up, where it is not 0, by the official configs; BEiT, BEiT v2, data2vec and EVA never read their option
    "feature_distillation_vit_base": 5e-7 * 2048 / 512,
    "simmim_vit_base": 5e-7 * 2048 / 512,
    "simmim_swin_base": 1e-6 * 2048 / 512,
    "maskfeat_hog_vit_base": 1e-6,
    "maskfeat_dino_vit_base": 1e-6,
}


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_warmup_begins_where_the_official_schedule_does(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["model"]["warmup_lr"] == pytest.approx(STARTS.get(path.stem, 0.0))


def test_beits_betas_are_the_official_scripts() -> None:
    assert yaml.safe_load((ROOT / "conf/pretrain/beit_vit_base.yaml").read_text())["model"]["betas"] == [0.9, 0.999]


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_jitter_after_the_crop_is_admitted(path: Path) -> None:
    """BEiT and its kin jitter the whole photo before they crop it; iBOT jitters the crop, as is done here."""
    jitters = yaml.safe_load(path.read_text())["data"]["init_args"]["color_jitter"] > 0
    assert ("deviation: colour jitter comes last, on the crop" in header_of(path)) == (
        jitters and not path.stem.startswith("ibot")
    )


def named_after(path: Path, what: str) -> Path | None:
    """The recipe of Fine-tuning or Segmentation that a header names."""
    found = re.findall(rf"\b{what}: (conf/\w+/\w+\.yaml)", header_of(path))
    return ROOT / found[0] if found else None


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_a_reported_number_has_the_recipe_that_would_reproduce_it(path: Path) -> None:
    """Or says that there is none: one method fine-tunes with SGD, and MaskDistill's ViT-H on ADE20K has no source."""
    (reported,) = re.findall(r"Reported: (.*?) Ours: ", header_of(path))
    for unit, what in ((" % top-1", "Fine-tuning"), ("mIoU", "Segmentation")):
        recipe = named_after(path, what)
        none_here = (path.stem, what) in (("vit_mean_color", "Fine-tuning"), ("maskdistill_vit_huge", "Segmentation"))
        assert none_here == (f"{what}: none here" in header_of(path))
        assert recipe is None or recipe.is_file()
        assert recipe is not None or unit not in reported or none_here


@pytest.mark.parametrize("what", ["Fine-tuning", "Segmentation"])
@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
def test_its_checkpoint_starts_the_recipe_that_it_names(path: Path, what: str, tmp_path: Path) -> None:
    """A student of it loads strictly, as a user would, and none of its rates is taken over by what is trained after it."""
    recipe = named_after(path, what)
    if recipe is None:
        return
    student = yaml.safe_load(path.read_text())["model"]["student"]
    swin = student["init_args"]["backbone"].startswith("swin")
    narrow: dict[str, Any] = NARROW_SWIN if swin else {**NARROW, "depth": 4}
    changed = {**student["init_args"], "model_args": {**student["init_args"]["model_args"], **narrow}}
    encoder = getattr(unimim, student["class_path"].removeprefix("unimim."))(**changed)
    file = tmp_path / "pretrained.ckpt"
    weights = {f"student.{key}": value for key, value in encoder.state_dict().items()}
    torch.save({"state_dict": weights, "backbone": describe_backbone(encoder)}, file)
    model = yaml.safe_load(recipe.read_text())["model"]
    given = {**model, "checkpoint": str(file), "num_classes": 6, "model_args": {**model["model_args"], **narrow}}
    if what == "Segmentation":
        given |= {"channels": 8} | ({} if swin else {"blocks": [0, 1, 2, 3]})
    task = (FineTuning if what == "Fine-tuning" else UperNetSegmentation)(**given)
    network = task.backbone if isinstance(task, FineTuning) else task.pyramid.backbone
    assert network.load_report.problems == ""
    assert all(name.startswith(("head", "fc_norm")) for name in network.load_report.new)
    torch.testing.assert_close(task.mean, encoder.mean)
    drops = [part.drop_prob for part in network.modules() if type(part).__name__ == "DropPath"]
    assert max(drops) == pytest.approx(model["model_args"]["drop_path_rate"])
    assert all(part.p == 0 for part in network.modules() if isinstance(part, torch.nn.Dropout))


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
    if "PatchAggregationHead" in path.read_text():
        words.append("--model.terms.cls.init_args.head.init_args.block=0")
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
