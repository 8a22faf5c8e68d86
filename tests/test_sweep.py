"""A sweep against a literal loop of single commands: the same trials, each present once, whatever interrupts it."""

import itertools
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from conftest import ROOT
from test_pictures import records
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from unimim.cli import sweep as sweeping
from unimim.cli import tasks as commands
from unimim.cli.main import main
from unimim.cli.sweep import Trial, parsed, points, read_sweep, summarize, table, trials_of
from unimim.data.folder import image_files

MASK_RATIO = ROOT / "conf" / "sweeps" / "mask_ratio.yaml"
RECIPE = {
    "model": {
        "teacher": {"class_path": "unimim.PixelTarget", "init_args": {"patch_size": 8}},
        "normalization": "unimim.LayerNorm",
        "masking": {"class_path": "unimim.BlockMasking", "init_args": {"ratio": 0.4}},
        "student": {
            "class_path": "unimim.MaskTokenStudent",
            "init_args": {
                "backbone": "vit_tiny_patch16_224",
                "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
            },
        },
        "head": "unimim.LinearHead",
        "loss": "torch.nn.MSELoss",
        "warmup_epochs": 1,
    },
    "data": {
        "class_path": "unimim.FashionMNISTData",
        "init_args": {"root": str(ROOT / "data"), "batch_size": 32, "train_images": 320, "val_images": 100},
    },
    "trainer": {"accelerator": "cpu", "max_epochs": 4, "enable_progress_bar": False},
}
SWEEP: dict[str, Any] = {
    "method": "grid",
    "metric": {"name": "val/knn", "goal": "maximize"},
    "parameters": {
        "config": {"values": ["pixels.yaml", "hog.yaml"]},
        "model.masking.ratio": {"values": [0.2, 0.6]},
        "trainer.callbacks": {"value": "unimim.KNNCallback"},
    },
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two small recipes and a sweep over them."""
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "UNIMIM_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    hog = {"class_path": "unimim.HOGTarget", "init_args": {"patch_size": 8, "cell_size": 4}}
    write_yaml("pixels.yaml", RECIPE)
    write_yaml("hog.yaml", {**RECIPE, "model": {**RECIPE["model"], "teacher": hog, "normalization": "torch.nn.Identity"}})
    write_yaml("sweep.yaml", SWEEP)
    return tmp_path


def write_yaml(name: str, content: Any) -> None:
    Path(name).write_text(yaml.safe_dump(content))


def with_parameters(**parameters: Any) -> dict[str, Any]:
    """The sweep with other parameters, `a__b` being a.b; None takes one out."""
    changed = {**SWEEP["parameters"], **{name.replace("__", "."): spec for name, spec in parameters.items()}}
    return {**SWEEP, "parameters": {name: spec for name, spec in changed.items() if spec is not None}}


def mistake(*words: str) -> str:
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as end:
        main([*words])
    assert isinstance(end.value.code, str)
    assert "\n" not in end.value.code
    return end.value.code.removeprefix("unimim: error: ")


def started(*words: str, **options: Any) -> subprocess.Popen[str]:
    """`unimim WORDS` in a process of its own."""
    command = [sys.executable, "-m", "unimim", *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, **{**pipes, **options})


def ended(process: subprocess.Popen[str]) -> str:
    """What a process said, which ends well; it does not outlive the test."""
    try:
        said = process.communicate(timeout=500)[0]
    finally:
        process.kill()
    assert process.returncode == 0, said
    return said


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 500) -> None:
    """Until a condition holds, while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def kept() -> dict[str, dict[str, Any]]:
    """The finished trials of sweep.yaml by their keys."""
    return {path.stem: json.loads(path.read_text()) for path in Path("outputs/sweeps/sweep/trials").glob("*.json")}


# The file


def test_the_file_is_what_wandb_takes() -> None:
    schema = json.loads((ROOT / "tests" / "sweep_schema.json").read_text())
    content = yaml.safe_load(MASK_RATIO.read_text())
    jsonschema.validate(content, schema)
    for wrong in ({"method": "gird"}, {"parameters": {}}, {"parameters": {"a": {"values": []}}}, {"metrics": []}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**content, **wrong}, schema)
    assert read_sweep(MASK_RATIO) == content
    assert all((ROOT / recipe).is_file() for recipe in content["parameters"]["config"]["values"])


def of_wandbs_agent(point: dict[str, Any]) -> list[str]:
    """What `wandb agent` starts for a trial of conf/sweeps/mask_ratio.yaml, as its `_command_run` puts the parts together."""
    content = yaml.safe_load(MASK_RATIO.read_text())
    parts = create_sweep_command_args({"args": {name: {"value": value} for name, value in point.items()}})
    parts |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [content["program"]]}
    words = [parts[word[2:-1]] if word.startswith("${") else [word] for word in create_sweep_command(content["command"])]
    return [word for part in words for word in part]


def test_wandbs_agent_starts_what_the_sweep_runs(folder: Path) -> None:
    """In whatever order its server lists the parameters; only the logger differs, and W&B's runs draw pictures."""
    content = yaml.safe_load(MASK_RATIO.read_text())
    values = {name: spec["value"] for name, spec in content["parameters"].items() if "value" in spec}
    point = {"config": "pixels.yaml", "model.masking.ratio": 0.2, **values}
    for names in (sorted(point), sorted(point, reverse=True)):
        program, task, *words = of_wandbs_agent({name: point[name] for name in names})[1:]
        assert (program, task) == ("unimim", "pretrain")
        options = [f"--{name}={value}" for name, value in point.items()]
        theirs, ours = parsed(words), parsed(["fit", "--trainer.devices=1", "--pictures=false", *options])
        assert theirs["model"]["masking"]["init_args"]["ratio"] == 0.2
        assert theirs["trainer"].pop("logger")["class_path"].endswith("WandbLogger")
        assert ours["trainer"].pop("logger")["class_path"].endswith("CSVLogger")
        assert (theirs.pop("pictures"), ours.pop("pictures")) == (True, False)
        assert (theirs["trainer"].pop("devices"), ours["trainer"].pop("devices")) == ("auto", "1")
        assert theirs == ours


@pytest.mark.parametrize("config", [["--config=pixels.yaml"], ["--config", "pixels.yaml"], ["-c", "pixels.yaml"]])
def test_the_ratio_wins_in_any_order(folder: Path, config: list[str]) -> None:
    """The recipe says 0.4."""
    ratio, epochs = ["--model.masking.ratio=0.2"], ["--trainer.max_epochs", "7"]
    reference = parsed(["fit", *config, *ratio, *epochs])
    assert reference["model"]["masking"]["init_args"]["ratio"] == 0.2
    assert reference["trainer"]["max_epochs"] == 7
    assert parsed(["fit", *ratio, *config, *epochs]) == reference
    assert parsed(["fit", *epochs, *ratio, *config]) == reference


def test_files_keep_their_order() -> None:
    words = ["fit", "--a", "1", "--config", "x", "--b=2", "--config=y", "-c", "z", "--config"]
    assert commands.configs_first(words) == ["fit", "--config", "x", "--config=y", "-c", "z", "--config", "--a", "1", "--b=2"]
    assert commands.configs_first(["--config", "x", "fit"]) == ["--config", "x", "fit"]
    assert commands.configs_first([]) == []


def test_the_first_trials_configuration_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["sweep", "sweep.yaml", "--seeds", "7", "--print_config"])
    assert not end.value.code
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"]["masking"]["init_args"]["ratio"], shown["seed_everything"]) == (0.2, 7)
    assert not Path("outputs").exists()


# The trials


@pytest.fixture
def unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Words stand for their configuration, so that many are quick."""
    rest = {"trainer": {"devices": 1, "logger": False}, "seed_everything": 0, "cache": None, "ckpt_path": None}
    monkeypatch.setattr(sweeping, "parsed", lambda words: {"words": words, **rest})


@pytest.mark.usefixtures("unparsed")
def test_a_grid_is_every_combination_with_every_seed() -> None:
    """The words are those of W&B's own agent."""
    trials = trials_of(SWEEP, [0, 1], ["--data.root", "elsewhere"])
    literal = [
        {"config": config, "model.masking.ratio": ratio, "seed_everything": seed}
        for config, ratio, seed in itertools.product(("pixels.yaml", "hog.yaml"), (0.2, 0.6), (0, 1))
    ]
    assert [trial.point for trial in trials] == literal
    assert len({trial.key for trial in trials}) == 8
    for trial in trials:
        arguments = {**trial.point, "trainer.callbacks": "unimim.KNNCallback"}
        agent = create_sweep_command_args({"args": {name: {"value": value} for name, value in arguments.items()}})["args"]
        assert trial.words[:3] == ["fit", "--trainer.devices=1", "--pictures=false"]
        assert sorted(trial.words[3:-2]) == sorted(agent)
        assert trial.words[-2:] == ["--data.root", "elsewhere"]
    again = {trial.key for trial in trials_of(SWEEP, [1], ["--data.root", "elsewhere"])}
    assert again == {trial.key for trial in trials if trial.point["seed_everything"] == 1}  # another sweep of the same trials
    assert not {trial.key for trial in trials} & {trial.key for trial in trials_of(SWEEP, [0, 1], [])}


@pytest.mark.usefixtures("unparsed")
def test_random_draws_are_the_same_on_every_start() -> None:
    parameters = {
        "model.masking.ratio": {"min": 0.2, "max": 0.8},
        "model.lr": {"min": 1e-4, "max": 1e-2, "distribution": "log_uniform_values"},
        "trainer.max_epochs": {"min": 1, "max": 3},
        "config": {"values": ["pixels.yaml", "hog.yaml"]},
        "data.root": {"value": "data"},
    }
    drawn = {"method": "random", "metric": {"name": "val/knn"}, "parameters": parameters, "run_cap": 200}
    random.seed(time.time())
    chosen = points("random", parameters, 200)
    assert chosen == points("random", parameters, 200)
    assert chosen[:20] == points("random", parameters, 20)
    ratios, lrs = ([point[name] for point in chosen] for name in ("model.masking.ratio", "model.lr"))
    assert all(0.2 <= ratio <= 0.8 for ratio in ratios)
    assert 0.4 < sum(ratios) / 200 < 0.6
    assert 60 < sum(lr < 1e-3 for lr in lrs) < 140  # half of them: the logarithm is uniform
    assert {point["trainer.max_epochs"] for point in chosen} == {1, 2, 3}
    assert {point["config"] for point in chosen} == {"pixels.yaml", "hog.yaml"}
    assert len(trials_of({**drawn, "run_cap": 20}, [3, 4], [])) == 40
    few = {"trainer.max_epochs": {"min": 1, "max": 3}}
    assert len(trials_of({**drawn, "parameters": few}, [], [])) == 3  # a point that is drawn twice is one trial


def test_the_table_and_means_over_seeds() -> None:
    def trial(ratio: float, seed: int, reached: float | None, error: str | None = None) -> Trial:
        point = {"config": "conf/a.yaml", "model.masking.ratio": ratio, "seed_everything": seed}
        metrics = None if reached is None else {"val/knn": reached, "train/loss": 1.0}
        return Trial(point, [], f"{ratio}{seed}", True, metrics, reached and 10.0, error)

    trials = [
        trial(0.2, 0, 0.5),
        trial(0.2, 1, 0.75),
        trial(0.4, 0, 0.7),
        trial(0.4, 1, None, "a"),
        trial(0.6, 0, None, "b"),
    ]
    results = summarize("sweep", {"name": "val/knn", "goal": "maximize"}, trials)
    assert [(point["mean"], point["spread"]) for point in results["points"]] == [(0.625, 0.125), (0.7, 0), (None, None)]
    assert table(results).splitlines() == [
        "| config | model.masking.ratio | val/knn | seeds | seconds |",
        "| --- | --- | --- | --- | --- |",
        "| a | 0.2 | 0.6250 ± 0.1250 | 2 | 10 |",
        "| a | 0.4 | **0.7000** | 1 | 10 |",
        "| a | 0.6 |  | 0 | - |",
    ]
    assert "**0.6250** ± 0.1250" in table({**results, "metric": {"name": "val/knn", "goal": "minimize"}})


def test_a_figure_of_numbers_of_names_and_of_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "sweep"
    folder.mkdir()
    for number, values in enumerate(((0.2, 0.4), ("a.yaml", "b.yaml"))):
        trials = [Trial({"model.masking.ratio": value}, [], str(value), True, {"m": 0.5}, 1.0) for value in values]
        sweeping.draw(summarize("sweep", {"name": "m"}, trials), folder / f"{number}.png")
    sweeping.draw(summarize("sweep", {"name": "m"}, [Trial({}, [], "k", True, {"m": 0.5}, 1.0)]), folder / "2.png")
    sweeping.draw(summarize("sweep", {"name": "m"}, [Trial({}, [], "k", True, error="all")]), folder / "3.png")
    assert all((folder / f"{number}.png").stat().st_size > 3000 for number in range(4))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "photo.png").touch()
    assert image_files(tmp_path) == [tmp_path / "photos" / "photo.png"]  # figures are no photos


def test_two_sweeps_side_by_side_each_write_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second writes all of it when the first is about to put its own in place."""
    path, replaced, rename = tmp_path / "results.json", [], Path.replace

    def renamed(part: Path, target: Path) -> Path:
        replaced.append(part)
        if len(replaced) == 1:
            sweeping.write(path, "second")
            assert json.loads(path.read_text()) == "second"
        return rename(part, target)

    monkeypatch.setattr(Path, "replace", renamed)
    sweeping.write(path, "first")
    assert json.loads(path.read_text()) == "first"
    assert len(set(replaced)) == 2
    assert list(tmp_path.iterdir()) == [path]


# Running them


@pytest.mark.slow
def test_a_failed_trial_stops_no_other(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "buggy.py").write_text(
        "from unimim import PixelTarget\n\n\nclass Buggy(PixelTarget):\n    def prepare(self, batches, grid_size):\n"
        "        raise KeyError('no such\\nthing')\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    buggy = {"class_path": "buggy.Buggy", "init_args": {"patch_size": 8}}
    write_yaml("buggy.yaml", {**RECIPE, "model": {**RECIPE["model"], "teacher": buggy}})
    recipes, ratios = {"values": ["buggy.yaml", "pixels.yaml"]}, {"values": [1.5, 0.6]}
    write_yaml("sweep.yaml", with_parameters(config=recipes, model__masking__ratio=ratios, trainer__max_epochs={"value": 1}))
    assert mistake("sweep", "sweep.yaml") == "3 of 4 trials failed, see above; the same command runs the unfinished again"
    said = capsys.readouterr()
    assert "| buggy | 0.6 |  | 0 | - |" in said.out
    assert "\nconfig buggy, model.masking.ratio 0.6: KeyError: 'no such\\nthing'\n" in said.out
    assert "\nconfig pixels, model.masking.ratio 1.5: model.masking.ratio is 1.5, but a share of patches to hide" in said.out
    assert "| pixels | 0.6 | **" in said.out
    assert "Traceback" in said.err  # of the bug
    results = json.loads(Path("outputs/sweeps/sweep/results.json").read_text())
    assert table(results) in said.out
    assert Path("outputs/sweeps/sweep/figure.png").stat().st_size > 5000
    assert len(kept()) == 1

    calls = []
    monkeypatch.setattr(sweeping, "pretrain", lambda words: calls.append(words) or sys.exit("unimim: error: again"))
    assert mistake("sweep", "sweep.yaml").startswith("3 of 4 trials failed")
    assert [[word for word in words if "config" in word or "ratio" in word] for words in calls] == [
        ["--config=buggy.yaml", "--model.masking.ratio=1.5"],
        ["--config=buggy.yaml", "--model.masking.ratio=0.6"],
        ["--config=pixels.yaml", "--model.masking.ratio=1.5"],
    ]
    assert "failed: again" in capsys.readouterr().out


def metrics_of(path: Path) -> str:
    (file,) = path.glob("version_0/metrics.csv")
    return file.read_text()


GATE = """
import time
from pathlib import Path

import pytorch_lightning as pl


class Gate(pl.Callback):
    'While there is a file `closed`, the second training of a process waits in its third epoch.'

    trainings = 0

    def on_train_start(self, trainer, pl_module):
        Gate.trainings += 1

    def on_train_epoch_start(self, trainer, pl_module):
        end = time.monotonic() + 300
        while Gate.trainings == 2 and trainer.current_epoch == 2 and Path("closed").exists():
            Path("waiting").touch()
            assert time.monotonic() < end
            time.sleep(0.01)
"""


@pytest.mark.slow
def test_interrupted_in_three_ways_it_ends_as_a_loop_of_single_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM, Ctrl-C and SIGKILL; then every trial is there once, with the digits of the same command run alone."""
    monkeypatch.syspath_prepend(str(folder))
    Path("gate.py").write_text(GATE)
    write_yaml("sweep.yaml", with_parameters(trainer__callbacks={"value": ["unimim.KNNCallback", "gate.Gate"]}))
    closed, waiting, runs = Path("closed"), Path("waiting"), Path("outputs/sweeps/sweep/runs")
    for finished, (number, status) in enumerate(((signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGKILL, -9)), 1):
        closed.touch()
        process = started("sweep", "sweep.yaml")
        try:
            wait_for(waiting.exists, process)
            process.send_signal(number)
            closed.unlink()
            said = process.communicate(timeout=240)[0]
        finally:
            process.kill()
        waiting.unlink()
        assert process.returncode == status, said
        assert len(kept()) == finished
        assert len(list(runs.iterdir())) == finished + 1  # it has begun no other
        assert ("the sweep ends here; the same command goes on" in said) == (number != signal.SIGKILL)
    files = {path: path.stat().st_mtime_ns for path in Path("outputs/sweeps/sweep/trials").iterdir()}
    said = ended(started("sweep", "sweep.yaml"))
    assert "4 trials, 3 of them finished before" in said
    assert "this run goes on from" in said
    assert all(path.stat().st_mtime_ns == changed for path, changed in files.items())  # none was repeated
    results = json.loads(Path("outputs/sweeps/sweep/results.json").read_text())
    assert len(kept()) == len(results["trials"]) == 4
    assert len({json.dumps(trial["point"]) for trial in results["trials"]}) == 4
    for trial in results["trials"]:
        alone = commands.pretrain([*trial["words"], f"--trainer.logger.name={trial['key']}"]).trainer
        assert trial["metrics"] == {name: float(value) for name, value in alone.callback_metrics.items()}
        assert "val/knn" in trial["metrics"]
    assert [trial["seconds"] is None for trial in results["trials"]] == [False, True, True, True]


@pytest.mark.slow
def test_a_trial_has_the_digits_of_the_same_command_alone(folder: Path) -> None:
    """Its second and last trial, after others in the same process, against a process of its own: every number and weight.

    Also against one that shows pictures and a progress bar, as a single command does by default.
    """
    write_yaml("sweep.yaml", with_parameters(model__masking__ratio={"value": 0.6}, trainer__max_epochs={"value": 2}))
    results = sweeping.sweep(["sweep.yaml"])
    trial = results["trials"][-1]
    ended(started("pretrain", *trial["words"]))
    default = [word for word in trial["words"] if word != "--pictures=false"]
    ended(started("pretrain", *default, "--trainer.enable_progress_bar=true", "--trainer.logger.name=shown"))
    here, *others = Path("outputs/sweeps/sweep/runs") / trial["key"], Path("outputs/pretrain"), Path("outputs/shown")
    assert [len(list(path.rglob("pictures/*.png"))) for path in (here, *others)] == [0, 0, 1]
    weights = torch.load(*here.rglob("*.ckpt"), weights_only=True)["state_dict"]
    for other in others:
        assert metrics_of(other) == metrics_of(here)
        theirs = torch.load(*other.rglob("*.ckpt"), weights_only=True)["state_dict"]
        assert all(torch.equal(value, theirs[name]) for name, value in weights.items())

    # killed between the last checkpoint and the trial's file, it has the same metrics
    file = Path("outputs/sweeps/sweep/trials") / f"{trial['key']}.json"
    file.unlink()
    assert sweeping.sweep(["sweep.yaml"])["trials"][-1]["metrics"] == trial["metrics"]
    assert file.is_file()


COUNTED = """
from unimim import PixelTarget


class Counted(PixelTarget):
    asked = 0

    def forward(self, images, grid_size):
        Counted.asked += len(images)
        return super().forward(images, grid_size)


class Mirrored(Counted):
    def forward(self, images, grid_size):
        return super().forward(images.flip(-1), grid_size)
"""


@pytest.mark.slow
def test_each_teacher_is_asked_once_with_a_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each has a folder of its own, because a cache refuses another's; one that cannot be cached stops no other."""
    monkeypatch.syspath_prepend(str(folder))
    Path("counted.py").write_text(COUNTED)
    for name in ("Counted", "Mirrored"):
        teacher = {"class_path": f"counted.{name}", "init_args": {"patch_size": 8}}
        write_yaml(f"{name}.yaml", {**RECIPE, "model": {**RECIPE["model"], "teacher": teacher}})
    write_yaml("ema.yaml", {**RECIPE, "model": {**RECIPE["model"], "teacher": {"class_path": "unimim.EMATarget"}}})
    recipes, epochs = {"values": ["Counted.yaml", "ema.yaml", "Mirrored.yaml"]}, {"value": 3}
    write_yaml("sweep.yaml", with_parameters(config=recipes, trainer__max_epochs=epochs))
    assert mistake("sweep", "sweep.yaml", "--cache=targets", "--views", "2").startswith("2 of 6 trials failed")
    said = capsys.readouterr().out
    assert "\nconfig ema, model.masking.ratio 0.2: model.teacher.teacher: EMATarget follows the student" in said
    images, views, looked_at_again, trials = 320, 2, 16, 4
    asked = sys.modules["counted"].Counted.asked
    assert 2 * images * views <= asked <= 2 * images * views + trials * looked_at_again
    assert sorted(path.name.partition("-")[0] for path in Path("targets").iterdir()) == ["Counted", "Mirrored"]
    last = {"config": "Mirrored.yaml", "model.masking.ratio": 0.6}
    (trial,) = [trial for trial in kept().values() if trial["point"] == last]
    alone = commands.pretrain(trial["words"]).trainer
    assert trial["metrics"] == {name: float(value) for name, value in alone.callback_metrics.items()}

    # the folder stays where only what changes no image differs
    words = ["--trainer.max_epochs=1", "--data.num_workers=1"]
    again = {trial.words[-1] for trial in trials_of(read_sweep(Path("sweep.yaml")), [1], [*words, "--cache=targets"])}
    assert {word.removeprefix("--cache=") for word in again} > {str(path) for path in Path("targets").iterdir()}


def test_null_in_quotes_is_null(folder: Path) -> None:
    """Without quotes W&B's agent and the sweep write None, which the parser refuses."""
    write_yaml("sweep.yaml", with_parameters(model__masking__ratio=None, trainer__gradient_clip_val={"values": ["null", 1.0]}))
    trials = trials_of(read_sweep(Path("sweep.yaml")), [], [])
    assert [parsed(trial.words)["trainer"]["gradient_clip_val"] for trial in trials[:2]] == [None, 1.0]
    write_yaml("sweep.yaml", with_parameters(model__masking__ratio=None, trainer__gradient_clip_val={"values": [None, 1.0]}))
    assert mistake("sweep", "sweep.yaml") == "trainer.gradient_clip_val: expected int or float, got None"


def test_students_with_other_grids_have_caches_of_their_own(folder: Path) -> None:
    """A cache refuses another grid, so the trials with it would fail; another ratio shares."""
    student = RECIPE["model"]["student"]
    fine = {**student["init_args"], "model_args": {**student["init_args"]["model_args"], "patch_size": 4}}
    write_yaml("fine.yaml", {**RECIPE, "model": {**RECIPE["model"], "student": {**student, "init_args": fine}}})
    trials = trials_of(with_parameters(config={"values": ["pixels.yaml", "fine.yaml"]}), [], ["--cache=targets"])
    coarse, again, other, other_again = (trial.words[-1] for trial in trials)
    assert coarse == again != other == other_again


def test_a_signal_behind_the_last_step_ends_the_sweep(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trial is kept, the next one is not begun."""
    (folder / "late.py").write_text(
        "import os, signal\nimport pytorch_lightning as pl\n\n\nclass Late(pl.Callback):\n"
        "    def on_train_end(self, trainer, pl_module):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    late = {"value": ["unimim.KNNCallback", "late.Late"]}
    write_yaml("sweep.yaml", with_parameters(trainer__callbacks=late, trainer__max_epochs={"value": 1}))
    with pytest.raises(SystemExit) as end:
        main(["sweep", "sweep.yaml"])
    assert not end.value.code
    assert "the sweep ends here; the same command goes on" in capsys.readouterr().out
    assert len(kept()) == 1


# W&B


@pytest.mark.slow
def test_each_trial_is_an_offline_run_of_its_own(folder: Path) -> None:
    """With the file's metric, by its name, and with pictures where they are asked for."""
    write_yaml("sweep.yaml", with_parameters(config={"value": "pixels.yaml"}, trainer__max_epochs={"value": 1}))
    offline = ["--trainer.logger=WandbLogger", "--trainer.logger.offline=true", "--pictures=true"]
    ended(started("sweep", "sweep.yaml", *offline))
    runs = [path for path in Path().rglob("offline-run-*") if path.is_dir()]
    assert len(runs) == len(kept()) == 2
    files = [records(path) for run in runs for path in run.glob("*.wandb")]
    items = [item for file in files for record in file for item in record.history.item]
    measured = [json.loads(item.value_json) for item in items if "val/knn" in (item.key, "/".join(item.nested_key))]
    assert sorted(measured) == sorted(trial["metrics"]["val/knn"] for trial in kept().values())
    assert all(len(list(run.rglob("media/images/pictures*.png"))) == 1 for run in runs)


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_without_a_key_nothing_waits_for_an_answer(folder: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """wandb asks on a terminal, which is one here: nobody answers."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NETRC", str(folder / "none"))
    keyboard, screen = pty.openpty()
    ends = {"stdin": screen, "stdout": screen, "stderr": screen} if terminal else {"stdin": subprocess.DEVNULL}
    process = started("pretrain", "fit", "--config=pixels.yaml", "--trainer.logger=WandbLogger", **ends)
    os.close(screen)
    said = ""
    try:
        if terminal:
            while "Enter your choice" not in said and (chunk := read(keyboard)):
                said += chunk
            assert "Enter your choice" not in said
        else:
            said = process.communicate(timeout=240)[0]
        assert process.wait(timeout=240)
    finally:
        process.kill()
        os.close(keyboard)
    line = said.replace("\r", "").strip().splitlines()[-1]
    assert line.startswith("unimim: error: trainer.logger: W&B starts no run (")
    assert line.endswith("): give it a key with wandb login, or set WANDB_MODE=offline, which needs no account")


def read(terminal: int) -> str:
    """What a process said on a terminal; nothing once it has ended, or has been silent for long."""
    try:
        return os.read(terminal, 4096).decode(errors="replace") if select.select([terminal], [], [], 240)[0] else ""
    except OSError:
        return ""


# Mistakes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "bayes"}, "sweep.yaml: method is 'bayes', but it is grid or random (bayes needs W&B's server)"),
        ({"method": None}, "sweep.yaml: method is None"),
        ({"metric": None}, "sweep.yaml: metric is None, but it has a name, such as val/knn, and a goal, minimize or maximize"),
        ({"metric": {"goal": "maximize"}}, "sweep.yaml: metric is {'goal': 'maximize'}, but it has a name"),
        ({"metric": {"name": "val/knn", "goal": "max"}}, "and a goal, minimize or maximize"),
        ({"parameters": {}}, "sweep.yaml: parameters is {}, but it is such as model.masking.ratio: {values: [0.4, 0.6]}"),
        ({"parameters": ["ratio"]}, "parameters is ['ratio'], but it is such as"),
        ({"parameters": {"a": {"values": []}}}, "a is {'values': []}, but a parameter has a value or a list of"),
        ({"parameters": {"a": {"values": 0.4}}}, "a is {'values': 0.4}, but a parameter has"),
        ({"parameters": {"a": 0.4}}, "a is 0.4, but a parameter has"),
        ({"parameters": {"model": {"parameters": {"lr": {"value": 1}}}}}, "model.masking.ratio is one word"),
        ({"parameters": {"a": {"min": 0, "max": 1}}}, "a is {'max': 1, 'min': 0}, but a parameter has"),
        ({"method": "random"}, "sweep.yaml: run_cap is None, but it is the number of points, at least 1; method random needs"),
        ({"run_cap": 0}, "run_cap is 0"),
        ({"command": ["${env}", "--model.lr=1"]}, "command has '--model.lr=1', which unimim sweep does not read"),
        *(
            ({"method": "random", "run_cap": 2, "parameters": {"a": spec}}, f"a is {spec}, but a parameter has")
            for spec in (
                {"max": 1, "min": 2},
                {"max": 1, "min": "0"},
                {"distribution": "log_uniform_values", "max": 1, "min": 0},
                {"distribution": "beta", "max": 1, "min": 0},
                {"values": []},
                0.4,
            )
        ),
        ({"early_terminate": {}}, "unimim sweep does not know 'early_terminate'. Known: method, metric"),
    ],
)
def test_mistakes_in_the_file(folder: Path, changes: dict[str, Any], expected: str) -> None:
    write_yaml("sweep.yaml", {**SWEEP, **changes})
    assert expected in mistake("sweep", "sweep.yaml")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere.yaml"], "nowhere.yaml is no YAML of a sweep: [Errno 2] No such file or directory: 'nowhere.yaml'"),
        (["pixels.yaml"], "pixels.yaml: unimim sweep does not know 'data'. Known: method, metric, parameters"),
        (["list.yaml"], "list.yaml: method is None, but it is grid or random"),
        (["broken.yaml"], "broken.yaml is no YAML of a sweep: "),
        ([], "the following arguments are required: FILE"),
        (["sweep.yaml", "--seeds"], "argument --seeds: expected at least one argument"),
        (["sweep.yaml", "--seeds", "one"], "argument --seeds: invalid int value: 'one'"),
        (
            ["sweep.yaml", "--model.masking.ratio", "0.3"],
            "(config pixels, model.masking.ratio 0.2) and (config pixels, model.masking.ratio 0.6) are the same command",
        ),
        (["sweep.yaml", "--ckpt_path=hpc"], "a sweep runs each trial from its start and on one device: leave trainer.devices"),
        (["sweep.yaml", "--trainer.devices=2"], "on one device: leave trainer.devices and ckpt_path out"),
        (["sweep.yaml", "--model.lrr=1"], "there is no option --model.lrr. Did you mean '--model.lr'?"),
        (["typo.yaml"], "model.masking: unimim.BlockMasking takes no 'ratoi'. Did you mean 'ratio'?"),
        (["missing.yaml"], "File does not exist"),
    ],
)
def test_mistakes_in_words(folder: Path, words: list[str], expected: str) -> None:
    """All of them before the first trial is run."""
    Path("list.yaml").write_text("[1, 2]")
    Path("broken.yaml").write_text("method: [grid\nmetric: }")
    write_yaml("typo.yaml", with_parameters(model__masking__ratio=None, model__masking__ratoi={"values": [0.2]}))
    write_yaml("missing.yaml", with_parameters(config={"values": ["pixels.yaml", "missing_recipe.yaml"]}))
    assert expected in mistake("sweep", *words)
    assert not Path("outputs").exists()


@pytest.mark.usefixtures("unparsed")
def test_a_trial_without_the_metric_has_failed_but_is_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So a typo in metric.name costs nothing: no trial runs again."""
    runs = []

    def pretrain(words: list[str]) -> SimpleNamespace:
        runs.append(words)
        metrics = {"loss": 1.0, **({"val/knn": 0.5} if "--model.masking.ratio=0.2" in words else {})}
        trainer = SimpleNamespace(callback_metrics=metrics, callbacks=[])
        return SimpleNamespace(trainer=trainer, config=SimpleNamespace(fit=SimpleNamespace(ckpt_path=None)))

    monkeypatch.setattr(sweeping, "pretrain", pretrain)
    write_yaml("sweep.yaml", with_parameters(config=None))
    for _ in range(2):
        assert mistake("sweep", "sweep.yaml").startswith("1 of 2 trials failed, see above")
        said = capsys.readouterr().out
        assert "\nmodel.masking.ratio 0.6: it has not logged val/knn, but loss\n" in said
        assert "| 0.2 | **0.5000** | 1 | 0 |" in said
    write_yaml("sweep.yaml", {**yaml.safe_load(Path("sweep.yaml").read_text()), "metric": {"name": "loss"}})
    main(["sweep", "sweep.yaml"])
    assert "| 0.6 | **1.0000** | 1 | 0 |" in capsys.readouterr().out
    assert len(runs) == len(kept()) == 2


def test_the_page_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make sweep-docs` writes it; what was measured is all of the file that the page is about, with both seeds."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import sweeps

    measured = ROOT / "docs" / "sweeps" / "results.json"
    results = json.loads(measured.read_text()) if measured.is_file() else None
    page = (ROOT / "docs" / "sweeps.md").read_text()
    assert sweeps.page_with(page, results) == page
    assert ("Not measured yet." in page) == (results is None)
    content = yaml.safe_load(MASK_RATIO.read_text())
    fixed = {name: spec["value"] for name, spec in content["parameters"].items() if "value" in spec}
    assert f"{fixed['trainer.max_epochs']} epochs of {fixed['data.train_images']:,} images each" in page
    if results is not None:
        literal = [
            {"config": config, "model.masking.ratio": ratio, "seed_everything": seed}
            for config, ratio, seed in itertools.product(*(content["parameters"][name]["values"] for name in
                                                           ("config", "model.masking.ratio")), (0, 1))
        ]  # fmt: skip
        assert [trial["point"] for trial in results["trials"]] == literal
        for trial in results["trials"]:
            assert {f"--{name}={value}" for name, value in {**trial["point"], **fixed}.items()} <= set(trial["words"])
            assert trial["error"] is None
        assert results["points"] == summarize("", content["metric"], [Trial(**trial) for trial in results["trials"]])["points"]
        assert measured.with_name("figure.png").stat().st_size < 200_000
        assert "](sweeps/figure.png)" in page


def test_a_finished_sweep_goes_into_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make sweep-docs` does it, with a page elsewhere."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import sweeps

    monkeypatch.chdir(tmp_path)
    page = tmp_path / "docs" / "sweeps.md"
    page.parent.mkdir()
    page.write_text(f"before\n{sweeps.START}old\n{sweeps.END}\nafter\n")
    monkeypatch.setattr(sweeps, "PAGE", page)
    monkeypatch.setattr(sweeps, "MEASURED", page.with_suffix(""))
    with pytest.raises(SystemExit, match="make sweep"):
        sweeps.into_page()
    trials = [Trial({"model.masking.ratio": ratio}, [], str(ratio), True, {"m": ratio}, 60.0) for ratio in (0.25, 0.5)]
    results = summarize("mask_ratio", {"name": "m", "goal": "maximize"}, trials)
    finished = tmp_path / "outputs" / "sweeps" / "mask_ratio"
    sweeping.write(finished / "results.json", results)
    sweeping.draw(results, finished / "figure.png")
    for _ in range(2):
        sweeps.into_page()
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text  # noqa: PT018
        assert table(results) in text
        assert "The 2 trials took 2 minutes." in text
        assert (page.parent / "sweeps" / "figure.png").read_bytes() == (finished / "figure.png").read_bytes()
        assert json.loads((page.parent / "sweeps" / "results.json").read_text()) == results
    interrupted = summarize("mask_ratio", results["metric"], [trials[0], replace(trials[1], seconds=None)])
    assert "Some of the 2 trials were interrupted, so their time is unknown." in sweeps.page_with(page.read_text(), interrupted)
    assert "| 0.5 | **0.5000** | 1 | - |" in table(interrupted)
    failed = summarize("mask_ratio", {"name": "m"}, [Trial({}, [], "k", True, error="broken")])
    sweeping.write(finished / "results.json", failed)
    with pytest.raises(SystemExit, match="failed"):
        sweeps.into_page()
