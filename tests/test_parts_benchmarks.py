"""The benchmarks of targets, masks and start in miniature: what they compare is alike, what they print has its place."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from einops import rearrange

from unimim import HOGTarget

sys.path.insert(0, str(ROOT / "benchmarks"))
import masks
import report
import start
import targets


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "OUTPUT", tmp_path)
    return tmp_path


def kept(folder: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in folder.iterdir()}


# --- masks --------------------------------------------------------------------------------------------------------


def test_masks(output: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(masks, "BATCHES", (3, 2))
    monkeypatch.setattr(masks, "REPETITIONS", 4)
    monkeypatch.setattr(sys, "argv", ["masks.py", "--device", "cpu"])
    masks.main()
    found = kept(output)
    assert set(found) == {"masks_3", "masks_2"}
    printed = capsys.readouterr().out
    for results in found.values():
        assert [len(row["values"]) for row in results["rows"].values()] == [4] * 4
        assert report.table(results) in printed


def test_the_references_draw_masks() -> None:
    """MAE's count is exact, and its patches are alike; BEiT's blocks never pass it, and miss it in a third of the images."""
    torch.manual_seed(0)
    masks.random.seed(0)
    images = torch.empty(1000, 3, 1, 1)
    random, blocks = masks.mae(images), masks.beit(images).flatten(1)
    assert (random.sum(1) == 78).all()
    assert (random.float().mean(0) - 78 / 196).abs().max() < 5 * (0.4 * 0.6 / 1000) ** 0.5
    assert (blocks.sum(1) <= 78).all()
    assert 0.25 < (blocks.sum(1) < 78).float().mean() < 0.4


# --- targets ------------------------------------------------------------------------------------------------------


def test_hog_beside_scikit_image(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "HOG_BATCH", 2)
    monkeypatch.setattr(sys, "argv", ["targets.py", "--hog", "hog_default", "--repetitions", "3"])
    targets.main()
    (results,) = kept(output).values()
    assert results["unit"] == "images/s"
    assert [len(row["values"]) for row in results["rows"].values()] == [3, 3]


def test_scikit_image_makes_the_same_histograms() -> None:
    """Of parabolas, whose gradients by Sobel's kernels are four times the central differences, away from the border.

    Swapped rows and columns swap scikit-image's axis of angles.
    """
    generator = torch.Generator().manual_seed(0)
    y, x = (torch.linspace(-1, 1, 64).reshape(shape) for shape in ((64, 1), (1, 64)))
    slopes = torch.randn(5, 2, 3, 1, 1, generator=generator)
    images = slopes[0] * x + slopes[1] * y + slopes[2] * x * x + slopes[3] * x * y + slopes[4] * y * y  # [b 3 H W]
    ours = rearrange(HOGTarget()(images, (4, 4)), "b h w (c k i j) -> b c (h i) (w j) k", c=3, i=2, j=2)
    theirs = torch.from_numpy(np.stack(targets.skimage_hog(images.mT.contiguous())))
    theirs = rearrange(theirs, "(b c) (W H k) -> b c H W k", c=3, H=8, W=8)
    inner = (..., slice(1, -1), slice(1, -1), slice(None))
    apart = (ours[inner] - theirs[inner]).abs().amax(-1)
    assert (apart < 1e-4).float().mean() > 0.9  # rounding may put a pixel on the other side of a bin's edge
    assert (ours[inner] > 0.05).sum(-1).float().mean() > 1.5  # most cells have pixels in more bins than one


def test_hog_is_measured_with_mallocs_defaults_and_as_make_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(subprocess, "run", lambda words, check, env: started.append((words[2:], env)))
    monkeypatch.setattr(targets, "all_kinds", lambda *arguments: started.append((list(arguments), dict(os.environ))))
    monkeypatch.setattr(sys, "argv", ["targets.py", "--device", "cpu", "--repetitions", "3"])
    for name, value in targets.KEPT.items():
        assert f"{name}={value}" in (ROOT / "Makefile").read_text()
        monkeypatch.setenv(name, value)
    targets.main()
    hog = [["--hog", key, "--repetitions", "3"] for key in ("hog_default", "hog_kept")]
    assert [words for words, _ in started] == [*hog, ["cpu", 8, 3]]
    assert [targets.KEPT.items() & env.items() for _, env in started] == [set(), targets.KEPT.items(), targets.KEPT.items()]


@pytest.mark.slow
def test_all_kinds_of_targets(output: Path) -> None:
    targets.all_kinds("cpu", 1, 2)
    rows = kept(output)["targets"]["rows"]
    assert [len(row["values"]) for row in rows.values()] == [2] * 6


# --- start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["import unimim", "unimim --help"])
def test_what_starts(way: str) -> None:
    start.run(start.WAYS[way])


@pytest.mark.slow
def test_all_names_are_little_more_than_torch_timm_and_lightning() -> None:
    """Not the parser of the command line, nor what only folders of shards need."""
    words = ["-c", "from unimim import *; import sys; print({'jsonargparse', 'torch.distributed.checkpoint'} & {*sys.modules})"]
    assert subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_start_that_fails_is_no_measurement() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        start.run(["-c", "raise SystemExit(1)"])


def test_seconds_more_than_the_reference_are_of_the_same_turn(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {name: [1.0, 5.0, 2.0] for name in start.WAYS} | {"unimim pretrain fit --help": [1.5, 5.5, 9.0]}
    monkeypatch.setattr(start, "in_turn", lambda ways, repetitions: measured)
    start.main()
    rows = kept(output)["start"]["rows"]
    more = {name: row["s more than the reference"] for name, row in rows.items()}
    assert more == dict.fromkeys(start.WAYS, 0.0) | {"unimim pretrain fit --help": 0.5}


# --- docs ---------------------------------------------------------------------------------------------------------


def test_each_table_has_its_place_in_docs(output: Path) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    keys = [f"masks_{batch}{device}" for batch in masks.BATCHES for device in ("", "_cuda")]
    keys += [*targets.ALLOCATORS, "targets", "targets_cuda", "start"]
    results = {"machine": "m", "setup": "s", "of": "o", "unit": "u", "reference": None, "rows": {"row": {"values": [1.0]}}}
    assert report.document_with(page, dict.fromkeys(keys, results)).count("| row | 1.00") == len(keys)
