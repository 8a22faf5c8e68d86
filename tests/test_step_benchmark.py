"""The benchmarks of a step in miniature: what they count and time, what they print, and that docs have a place for it."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import ROOT, narrow_recipe, tiny_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unimim import EMATarget, FeatureTarget, LayerNorm, LinearHead, Mask, Masking, MaskTokenStudent, Term
from unimim.training import cpu

sys.path.insert(0, str(ROOT / "benchmarks"))
import report
import scaling
import step

WIDTH, DEPTH, PATCHES, BATCH, CLIP = 32, 3, 16, 2, 0.01
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "class_token": False}
LINEAR = 2 * PATCHES * 12 * WIDTH**2  # of one block and image: q k v, projection and an MLP of 4 times the width
ATTENTION = 2 * 2 * PATCHES**2 * WIDTH


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(report, "OUTPUT", tmp_path / "bench")
    return tmp_path / "bench"


class Upper(Masking):
    """The upper half is hidden, whatever a training draws."""

    def forward(self, images: Tensor, grid_size: tuple[int, int]) -> Mask:
        h, w = grid_size
        mask = torch.zeros(len(images), h, w, dtype=torch.bool)
        mask[:, : h // 2] = True
        return Mask(mask, h // 2 * w)


def vit_step(**changes: object) -> step.Step:
    """A ViT with a teacher of its size, both small enough to count by hand."""
    model = tiny_model(
        teacher=FeatureTarget("vit_tiny_patch16_224", weights="random", model_args={**VIT, "global_pool": ""}),
        student=MaskTokenStudent("vit_tiny_patch16_224", VIT),
        normalization=LayerNorm(),
        masking=Upper(),
        **changes,
    )
    return step.Step(model, torch.rand(BATCH, 3, 32, 32), step.trainer("cpu", "32-true", CLIP))


def test_dense_flops_are_counted_as_by_hand() -> None:
    embedding, head = 2 * PATCHES * 3 * 8 * 8 * WIDTH, 2 * PATCHES * WIDTH * WIDTH
    network = embedding + DEPTH * (LINEAR + ATTENTION)
    assert step.dense_flops(vit_step()) == BATCH * (4 * network + 3 * head)
    second = Term("first", LayerNorm(), LinearHead, nn.MSELoss(), selection="visible")
    assert step.dense_flops(vit_step(terms={"second": second})) == BATCH * (4 * network + 2 * 3 * head)


def test_the_teacher_counts_where_the_masking_asks_it(tmp_path: Path) -> None:
    """MILAN's masking asks it for its attention, and the teacher remembers the features."""
    model = step.built(str(narrow_recipe(ROOT / "conf" / "pretrain" / "milan_vit_base.yaml", tmp_path)))
    images = torch.rand(1, 3, *model.student.image_size)
    milan = step.Step(model, images, step.trainer("cpu", "32-true"))
    whole = step.dense_flops(milan)
    model.teacher.forward = lambda images, grid: None
    assert whole > step.dense_flops(milan)
    del model.teacher.forward
    assert milan.split()["teacher"] > 0
    assert "forward" not in vars(model.teacher)


@pytest.mark.parametrize(
    ("name", "teachers", "heads"), [("beitv2_cls_vit_base", 1, 2), ("ibot_cls_vit_small", 1, 2), ("medic_vit_base", 2, 3)]
)
def test_all_terms_count(name: str, teachers: int, heads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that goes on by one whenever it is read, seconds are calls. A head that another head calls is a part of it."""
    model = step.built(str(narrow_recipe(ROOT / "conf" / "pretrain" / f"{name}.yaml", tmp_path)))
    several = step.Step(model, torch.rand(1, 3, *model.student.image_size), step.trainer("cpu", "32-true"))
    learning = {id(parameter) for group in several.optimizer.param_groups for parameter in group["params"]}
    assert learning == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    ticks = itertools.count()
    monkeypatch.setattr(step, "perf_counter", lambda: next(ticks))
    seconds = several.split()
    calls = {"teacher": teachers, "student forward": 1, "head forward": heads, "backward": 1, "optimizer": 1}
    assert {part: seconds[part] for part in step.PARTS} == calls
    assert not {"forward", "forward_image", "forward_both"} & {key for part in several.parts() for key in vars(part)}


def test_multiplications_are_all_of_the_steps() -> None:
    """Forward, and the gradients of inputs and weights, of the linear layers of all blocks."""
    found = step.Matmuls(vit_step(), share=0.0)
    blocks = BATCH * DEPTH * LINEAR * (3 + 1)
    head = BATCH // 2 * 2 * PATCHES * WIDTH * WIDTH * 3  # at half of the patches
    assert sum(found.weights.values()) == blocks + head
    found()
    found()
    assert found.rate(["torch.mm"]) in [ways["torch.mm"][1] for ways in found.rates.values()]
    assert found.rate() in [max(rates[1] for rates in ways.values()) for ways in found.rates.values()]


def test_each_way_of_multiplying_is_the_product() -> None:
    a, b = torch.randn(6, 4), torch.randn(4, 5)
    for x, y in ((a, b), (a.t().contiguous().t(), b), (a, b.t().contiguous().t())):
        for multiply in step.WAYS.values():
            torch.testing.assert_close(multiply(x, y, torch.empty(6, 5)), a @ b)


def test_multiplications_are_counted_whoever_makes_them(multiplied_by: str) -> None:
    """Forward and both gradients of a linear layer."""
    x = torch.randn(2, 3, 4, requires_grad=True)
    with step.Multiplications() as counting:
        with cpu.FasterOnCPU():
            value = nn.Linear(4, 8)(x)
        value.sum().backward()
    assert sorted(kind[:3] for kind in counting.found.elements()) == sorted([(6, 4, 8), (6, 8, 4), (8, 6, 4)])


def test_a_step_is_that_of_lightnings_loop() -> None:
    """What the optimizer keeps of the gradients, clipped to next to nothing, is that of the Trainer."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}
    kept: list[list[Tensor]] = []
    for way in ("__call__", "fit"):
        torch.manual_seed(0)
        mine = vit_step()
        if way == "fit":
            trainer = pl.Trainer(accelerator="cpu", max_steps=1, gradient_clip_val=CLIP, **quiet)  # type: ignore[arg-type]
            mine.model.configure_optimizers = lambda mine=mine: mine.optimizer
            trainer.fit(mine.model, DataLoader(mine.images, batch_size=BATCH, generator=torch.Generator()))
        else:
            getattr(mine, way)()
        kept.append([mine.optimizer.state[p]["exp_avg"].clone() for p in mine.model.parameters() if p.requires_grad])
    for one, other in zip(*kept, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * CLIP)
    share = 1 - 0.9  # of the gradient in the optimizer's first average
    assert sum(float(one.square().sum()) for one in kept[0]) ** 0.5 == pytest.approx(share * CLIP, rel=1e-3)


def test_a_teacher_that_follows_does_so_in_a_step() -> None:
    model = tiny_model(teacher=EMATarget(top_blocks=1, momentum=0.0), normalization=LayerNorm())
    step.Step(model, torch.rand(BATCH, 3, 32, 32), step.trainer("cpu", "32-true"))()
    for ours, theirs in zip(model.teacher.average.parameters(), model.student.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_table_of_each_kind(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = narrow_recipe(ROOT / "conf" / "pretrain" / "maskdistill_vit_base.yaml", tmp_path)
    monkeypatch.setattr(step, "peaks", lambda recipe, arguments, ways: dict.fromkeys(ways, 1.5))  # processes of their own
    words = ["--batch_size", "2", "--device", "cpu", "--repetitions", "2"]
    monkeypatch.setattr(sys, "argv", ["step.py", str(recipe), *words])
    step.main()
    found = {file.stem: json.loads(file.read_text()) for file in output.iterdir()}
    assert set(found) == {"step_maskdistill_vit_base", "step_maskdistill_vit_base_parts"}
    rows = found["step_maskdistill_vit_base"]["rows"]
    assert list(rows) == ["unimim"]
    for row in rows.values():
        assert len(row["values"]) == 2
        assert row["share of matmul rate"] > 0
    assert rows["unimim"]["peak memory, GiB"] == 1.5
    parts = found["step_maskdistill_vit_base_parts"]["rows"]
    assert list(parts) == [*step.PARTS, "rest"]
    assert all(len(row["values"]) == 2 and min(row["values"]) > 0 for row in parts.values())


def test_an_exponent_is_the_slope(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "step", lambda arguments, **changes: None)
    measured = {f"batch times {times}": [0.01 * times**1.5] * 3 for times in (1, 2, 4)}
    monkeypatch.setattr(scaling, "in_turn", lambda steps, repetitions, device: measured)
    arguments = scaling.argparse.Namespace(device="cpu", precision="32-true", batch_size=1, repetitions=3)
    scaling.sweep("batch", arguments)
    assert "seconds grow as batch to the power of 1.50" in json.loads((output / "scaling_batch.json").read_text())["setup"]


@pytest.mark.slow
def test_scaling_in_miniature(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All sweeps, and two processes (which are of full width: they import the script anew)."""
    monkeypatch.setattr(scaling.model, "__defaults__", (32, 64, 1))
    sweeps = {
        "image_size": ("pixels", {f"{size} px": (size**2, {"size": size}) for size in (32, 64)}),
        "width": ("width", {f"width {width}": (width, {"width": width}) for width in (64, 128)}),
        "targets": ("targets", {f"{count} targets": (count, {"targets": count}) for count in (1, 2)}),
    }
    monkeypatch.setattr(scaling, "SWEEPS", {**sweeps, "batch": scaling.SWEEPS["batch"]})
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--batch_size", "1", "--device", "cpu", "--repetitions", "2"])
    scaling.main()
    found = {file.stem: json.loads(file.read_text()) for file in output.iterdir()}
    assert set(found) == {f"scaling_{name}" for name in (*sweeps, "batch", "processes")}
    assert all(len(row["values"]) == 2 for results in found.values() for row in results["rows"].values())


@pytest.mark.slow
def test_the_peak_of_a_process_is_its_own() -> None:
    """And not that of the process which started it."""
    held = torch.ones(300_000_000)  # 1.1 GiB
    assert report.peak_gib() > 1.1
    words = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}); from report import peak_gib; print(peak_gib())"
    child = subprocess.run([sys.executable, "-c", words], check=True, capture_output=True, text=True, timeout=120)
    assert float(child.stdout) < 1.0
    assert held[0] == 1


def test_a_row_that_was_not_measured_says_so() -> None:
    rows = {"a": {"values": [2.0, 4.0, 3.0], "images/s": 1234.5}, "b": {"values": [], "images/s": None}}
    results = {"machine": "m", "setup": "s", "of": "way", "unit": "s", "reference": "a", "rows": rows}
    lines = report.table(results).splitlines()
    assert lines[-2] == "| a | 3.00 | 2.00 | 4.00 | 1.00 | 1,234 |"
    assert lines[-1] == "| b | not measured | not measured | not measured | not measured | not measured |"


def test_ways_are_measured_in_turn_and_the_first_time_does_not_count() -> None:
    calls: list[str] = []
    seconds = report.in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, 2)
    assert calls == ["a", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_docs_have_a_place_for_each_table_and_show_what_is_kept() -> None:
    document, kept = (ROOT / report.DOCUMENT).read_text(), json.loads((ROOT / report.KEPT).read_text())
    assert report.document_with(document, kept) == document
    recipes = [Path(recipe).stem for recipe in step.RECIPES]
    devices = ("", "_cuda")
    keys = [f"step_{name}{device}{more}" for name in recipes for device in devices for more in ("", "_parts")]
    keys += [f"scaling_{name}{device}" for name in (*scaling.SWEEPS, "processes") for device in devices]
    results = {"machine": "m", "setup": "s", "of": "o", "unit": "u", "reference": None, "rows": {"r": {"values": [1.0]}}}
    assert report.document_with(document, dict.fromkeys(keys, results)).count("| r | 1.00") == len(keys)
    with pytest.raises(ValueError, match="no place for nowhere"):
        report.document_with(document, {"nowhere": results})
