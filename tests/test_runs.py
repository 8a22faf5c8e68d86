"""Runs beside each other and one after the other: what stops one, what goes on, and no run writes over another's files."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from conftest import tiny_model, tiny_student
from PIL import Image
from test_cli import SMALL
from test_faults import MINE, SECONDS, STEADY, TWO, command, tiny_finetuning, tiny_segmentation
from torch.utils.data import DataLoader

from unimim import LinearProbe, StopOnSignal
from unimim.cli.tasks import finetune, pretrain

UNIMIM = Path(sys.executable).with_name("unimim")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of eight photos, in which the test works: 4 steps an epoch."""
    for i in range(8):
        Image.new("RGB", (40, 40), (30 * i, 20, 100)).save(tmp_path / f"{i}.png")
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("UNIMIM_RESUME", raising=False)
    return tmp_path


PLAIN = [*SMALL, "--data.root=.", *STEADY, "--pictures=false", "--trainer.log_every_n_steps=1"]


def refusal(*words: str) -> str:
    """The one line in which a run is refused."""
    with pytest.raises(SystemExit) as end:
        pretrain([*PLAIN, *words])
    line = str(end.value.code)
    assert line.startswith("unimim: error: ")
    assert "\n" not in line
    return line


def content() -> dict[str, bytes]:
    """Every file below the folder of the test."""
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


# A second run in a folder

MINE_TOO = ["--trainer.logger.version=mine"]
TENSORBOARD = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.name=x", *MINE_TOO]
BOTH = (
    "--trainer.logger=[{{class_path: {}, init_args: {{save_dir: a, name: x, version: {}}}}}, "
    "{{class_path: {}, init_args: {{save_dir: b, name: x, version: {}}}}}]"
)
OWN_FOLDER = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=keep"]


@pytest.mark.parametrize(
    ("first", "second", "folder"),
    [
        (MINE_TOO, MINE_TOO, "outputs/pretrain/mine is of an earlier run, whose config.yaml is there: set another version"),
        (TENSORBOARD, TENSORBOARD, "logs/x/mine is of an earlier run"),
        (
            [BOTH.format("TensorBoardLogger", "one", "CSVLogger", "one")],
            [BOTH.format("TensorBoardLogger", "two", "CSVLogger", "one")],
            "b/x/one is of an earlier run, whose metrics.csv is there",
        ),
        (
            [BOTH.format("CSVLogger", "one", "TensorBoardLogger", "one")],
            [BOTH.format("CSVLogger", "two", "TensorBoardLogger", "one")],
            "b/x/one is of an earlier run, whose events.out.tfevents.",
        ),
        (["--trainer.logger=false"], ["--trainer.logger=false"], "checkpoints has checkpoints of an earlier run (epoch=0"),
        (OWN_FOLDER, OWN_FOLDER, "keep has checkpoints of an earlier run (epoch=0-step=4.ckpt): give another folder"),
    ],
)
def test_a_second_run_in_a_folder_is_refused_before_anything_is_written(
    photos: Path, first: list[str], second: list[str], folder: str
) -> None:
    """Every file of the first run is as it was, and there is none more."""
    pytest.importorskip("tensorboard")
    pretrain([*PLAIN, *first])
    before = content()
    assert folder in refusal(*second)
    assert content() == before


def test_a_run_goes_on_in_the_folder_of_its_checkpoint(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The metrics and the configuration before it are kept; without a logger, or with a folder of checkpoints, too."""
    pretrain([*PLAIN, *MINE_TOO])
    run = Path("outputs/pretrain/mine")
    metrics, config = (run / "metrics.csv").read_text(), (run / "config.yaml").read_text()
    pretrain([*PLAIN, *MINE_TOO, "--trainer.max_epochs=2", f"--ckpt_path={run}/checkpoints/epoch=0-step=4.ckpt"])
    pretrain([*PLAIN, *MINE_TOO, "--trainer.max_epochs=3", "--resume=auto"])
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints", "config-1.yaml", "config-2.yaml", "config.yaml", "hparams.yaml", "metrics-1.csv", "metrics-2.csv",
        "metrics.csv",
    ]  # fmt: skip
    assert (run / "metrics-1.csv").read_text() == metrics
    assert (run / "config.yaml").read_text() == config
    assert "ckpt_path: outputs/pretrain/mine/checkpoints/epoch=0-step=4.ckpt" in (run / "config-1.yaml").read_text()
    for words, folder in ((["--trainer.logger=false"], "checkpoints"), (OWN_FOLDER, "keep")):
        pretrain([*PLAIN, *words])
        cli = pretrain([*PLAIN, *words, "--trainer.max_epochs=2", f"--ckpt_path={folder}/epoch=0-step=4.ckpt"])
        assert cli.trainer.global_step == 8


def test_a_trial_of_two_steps_writes_nothing_and_is_refused_nowhere(photos: Path) -> None:
    pretrain([*PLAIN, *MINE_TOO])
    before = content()
    pretrain([*PLAIN, *MINE_TOO, "--trainer.fast_dev_run=2"])
    assert content() == before


@pytest.mark.slow
def test_a_second_run_of_two_processes_is_refused(photos: Path) -> None:
    """Started by Lightning, and by torchrun: in one line, with the first run's files as they were."""
    torchrun = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "unimim")
    for launcher in ((), torchrun):
        name = "--trainer.logger.name=" + ("b" if launcher else "a")
        words = command(*TWO, *MINE_TOO, name, "--pictures=false", "--trainer.log_every_n_steps=1", launcher=launcher)
        first = subprocess.run(words, capture_output=True, text=True, check=False, timeout=SECONDS)
        assert first.returncode == 0, first.stderr
        before = {path: text for path, text in content().items() if "outputs" in path}
        assert any(path.endswith("metrics.csv") for path in before)
        second = subprocess.run(words, capture_output=True, text=True, check=False, timeout=SECONDS)
        assert second.returncode
        assert second.stderr.count("unimim: error: outputs/") == 1
        assert {path: text for path, text in content().items() if "outputs" in path} == before


def test_parts_of_killed_runs_are_removed_where_a_run_begins(photos: Path) -> None:
    """In the folders of all runs of this logger; not those of a process that lives."""
    from test_written import dead_process

    from unimim.weights.written import machine

    folder = Path("outputs/pretrain/version_0/checkpoints")
    folder.mkdir(parents=True)
    parts = {number: folder / f"epoch=0.ckpt.{machine()}-{number}.part" for number in (dead_process(), os.getppid())}
    for part in parts.values():
        part.touch()
    pretrain(PLAIN)
    assert [part.exists() for part in parts.values()] == [False, True]


# Ctrl-C


def said_line(said: str, start: str) -> str:
    (line,) = [line for line in said.splitlines() if line.startswith(start)]
    return line.removeprefix(start)


@pytest.mark.parametrize(
    ("given", "more"),
    [
        ([], "--resume auto"),
        (["--resume=auto"], "--resume auto"),
        (["--trainer.logger.name=it's mine"], "--resume auto"),
        (["--trainer.logger=unimim_test_logger.Own"], "--ckpt_path {}"),
    ],
)
def test_the_command_that_goes_on_can_be_pasted(
    photos: Path, capsys: pytest.CaptureFixture[str], given: list[str], more: str
) -> None:
    """It begins at the step that was saved."""
    (photos / "unimim_test_logger.py").write_text(
        "from pytorch_lightning.loggers import CSVLogger\n\n\nclass Own(CSVLogger):\n"
        "    def __init__(self):\n        super().__init__('elsewhere', 'x')\n"
    )
    act = ["--trainer.callbacks+=mine.Act", "--trainer.callbacks.name=SIGTERM"]
    with pytest.raises(SystemExit):
        pretrain([*PLAIN, *given, *act])
    said = capsys.readouterr().out
    line = said_line(said, "to go on: ")
    path = said_line(said, "SIGTERM after step 2: ")
    assert line.endswith(more.format(shlex.quote(path)))
    words = shlex.split(line)
    assert words[:3] == ["unimim", "pretrain", "fit"]
    assert not [word for word in words if word.startswith("--resume=")]
    end = words.index("--trainer.callbacks+=mine.Act")
    cli = pretrain([*words[2:end], *words[end + 2 :]])
    assert (cli.config.fit.ckpt_path, cli.trainer.global_step) == (path, 4)


def test_an_older_run_of_more_steps_is_not_gone_on_with(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--resume auto would take it: the line names the file."""
    pretrain([*PLAIN, "--trainer.max_epochs=2"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        pretrain([*PLAIN, "--trainer.callbacks+=mine.Act", "--trainer.callbacks.name=SIGINT"])
    said = capsys.readouterr().out
    assert said_line(said, "to go on: ").endswith(f"--ckpt_path {said_line(said, 'SIGINT after step 2: ')}")


SLOW = """
import time
from pathlib import Path

import pytorch_lightning as pl


class Slow(pl.Callback):
    def __init__(self, at: str, seconds: float = 60):
        self.at, self.seconds = at, seconds

    def wait(self, place):
        if place == self.at:
            Path("waiting").touch()
            end = time.monotonic() + self.seconds
            while time.monotonic() < end and Path("waiting").exists():
                time.sleep(0.02)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.wait(f"step {trainer.global_step}")

    def on_validation_start(self, trainer, pl_module):
        self.wait("trial" if trainer.sanity_checking else f"validation {trainer.global_step}")

    def on_predict_start(self, trainer, pl_module):
        self.wait("predict")
"""


def interrupted(words: list[str], times: int = 1, release: bool = True) -> subprocess.CompletedProcess[str]:
    """A command that waits by `Slow`, and gets Ctrl-C there as from a terminal: all its processes do."""
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([".", *filter(None, sys.path)])},
    )  # fmt: skip
    try:
        end = time.monotonic() + SECONDS
        while not Path("waiting").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        for _ in range(times):
            os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.5)
        if release:
            Path("waiting").unlink(missing_ok=True)
        said = process.communicate(timeout=SECONDS)[0]
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, process.returncode, said)


def slow(at: str) -> list[str]:
    Path("slow.py").write_text(SLOW)
    return ["--trainer.callbacks+=slow.Slow", f"--trainer.callbacks.at={at}"]


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(photos: Path) -> None:
    """With workers of the data, which a terminal tells too; then the very line that was said goes on."""
    words = command("--data.num_workers=2", "--trainer.max_epochs=2", *slow("step 1"))
    done = interrupted(words)
    assert done.returncode == 130, done.stdout
    assert "Ctrl-C: saves a checkpoint after the running step, and ends; once more ends at once" in done.stdout
    assert said_line(done.stdout, "SIGINT after step 2: ").endswith("epoch=0-step=2-SIGINT.ckpt")
    assert "Traceback" not in done.stdout
    line = said_line(done.stdout, "to go on: ")
    again = subprocess.run(
        line.replace("unimim", str(UNIMIM), 1), shell=True, capture_output=True, text=True, check=False, timeout=SECONDS
    )
    assert again.returncode == 0, again.stderr
    assert "goes on from outputs/pretrain/version_0/checkpoints/epoch=0-step=2-SIGINT.ckpt" in again.stdout
    assert list(Path("outputs/pretrain/version_1").rglob("epoch=1-step=8.ckpt"))


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(photos: Path) -> None:
    """Within the step that would have run on for a minute."""
    done = interrupted(command(*slow("step 1")), times=2, release=False)
    assert done.returncode == -signal.SIGINT, done.stdout
    assert not list(Path("outputs").rglob("*.ckpt"))


@pytest.mark.slow
def test_ctrl_c_to_two_processes(photos: Path) -> None:
    done = interrupted(command(*TWO, "--trainer.max_epochs=2", *slow("step 1")))
    assert done.returncode == 130, done.stdout
    assert len(list(photos.rglob("*step=2-SIGINT.ckpt"))) == 1
    assert done.stdout.count("to go on: ") == 1
    assert done.stdout.count("Ctrl-C: saves") == 1


class CtrlCAt(pl.Callback):
    """Ctrl-C at the beginning of a validation after some step, and how many batches of it there were."""

    def __init__(self, step: int) -> None:
        self.step, self.batches = step, 0

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking:
            self.batches += 1
            if self.batches == 1:
                os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_amid_a_validation_is_heeded_after_the_next_step(tmp_path: Path) -> None:
    """The validation comes to its end, which an exact resume needs."""
    loader = DataLoader(list(zip(torch.rand(8, 3, 32, 32), torch.randint(3, (8,)), strict=True)), batch_size=2)
    ctrl_c = CtrlCAt(2)
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False, enable_model_summary=False,
        max_epochs=2, val_check_interval=2, callbacks=[StopOnSignal(), ctrl_c],
    )  # fmt: skip
    with pytest.raises(SystemExit) as end:
        trainer.fit(tiny_finetuning(), loader, loader)
    assert end.value.code == 130
    assert (ctrl_c.batches, trainer.global_step) == (4, 3)
    names = sorted(path.name for path in tmp_path.rglob("*.ckpt"))
    assert names == ["epoch=0-step=2.ckpt", "epoch=0-step=3-SIGINT.ckpt"]  # the first is ModelCheckpoint's


def test_ctrl_c_ends_a_validation_of_its_own_at_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`validate` has nothing to save."""
    for split in ("train", "val"):
        for label in ("a", "b"):
            (photos / split / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32), (60 * i, 20, 100)).save(photos / split / label / f"{i}.png")
    words = ["--data=ClassFolderData", "--data.root=.", "--data.batch_size=2", "--data.num_workers=0", "--data.image_size=32",
             "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]  # fmt: skip
    tiny = "--model.model_args={img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"
    own = ["--model.backbone=vit_tiny_patch16_224", tiny, "--model.num_classes=2", "--model.warmup_epochs=0"]
    finetune(["fit", *words, *own, "--trainer.max_epochs=1"])
    seen = []

    def ctrl_c(*_: object) -> None:
        seen.append(1)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("unimim.FineTuning.validation_step", ctrl_c)
    with pytest.raises(SystemExit) as end:
        finetune(["validate", *words, f"--ckpt_path={next(photos.rglob('*.ckpt'))}"])
    assert (end.value.code, len(seen)) == (130, 1)


# W&B


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The words of a run of W&B without an account; each run is finished as a process would at its end."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return ["--trainer.logger=WandbLogger", "--trainer.logger.project=masked"]


def with_wandb(*words: str) -> pl.Trainer:
    import wandb

    try:
        return pretrain([*PLAIN, *words]).trainer
    finally:
        wandb.finish()


def test_a_run_of_wandb_is_gone_on_with(photos: Path, offline: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Given its id and a checkpoint, and by --resume auto, which knows it by the folder; another id begins a new one."""
    resume = [*offline, "--trainer.logger.id=first", "--trainer.logger.resume=must"]
    with_wandb(*offline, "--trainer.logger.id=first")
    folder = Path("outputs/masked/first")
    assert "masked/first is of an earlier run" in refusal(*offline, "--trainer.logger.id=first")
    trainer = with_wandb(*resume, "--trainer.max_epochs=2", f"--ckpt_path={folder}/checkpoints/epoch=0-step=4.ckpt")
    assert (trainer.logger.version, trainer.global_step) == ("first", 8)
    capsys.readouterr()
    trainer = with_wandb(*offline, "--trainer.max_epochs=3", "--resume=auto")
    said = capsys.readouterr().out
    assert "this run goes on from outputs/masked/first/checkpoints/epoch=1-step=8.ckpt" in said
    assert "--resume auto: it goes on with the W&B run first\n" in said
    assert (trainer.logger.version, trainer.global_step) == ("first", 12)
    assert sorted(path.name for path in folder.glob("config*")) == ["config-1.yaml", "config-2.yaml", "config.yaml"]
    trainer = with_wandb(*offline, "--trainer.logger.id=second", "--trainer.max_epochs=4", "--resume=auto")
    assert "--resume auto: a new run begins in W&B, second\n" in capsys.readouterr().out
    assert (trainer.logger.version, trainer.global_step) == ("second", 16)


# A disk that is full, or cannot be written


class Full(pl.Callback):
    """Once training starts, a file of the run is on a disk that is full."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_start(self, trainer: pl.Trainer, pl_module: object) -> None:
        path = Path(trainer.logger.log_dir, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to("/dev/full")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is full")
@pytest.mark.parametrize(
    ("name", "words"),
    [("metrics.csv", []), ("pictures/epoch=0-step=4.png", ["--pictures=true"])],
)
def test_a_full_disk_is_told_in_one_line(photos: Path, name: str, words: list[str]) -> None:
    file = f"outputs/pretrain/version_0/{name}"
    (photos / "full.py").write_text(f"import test_runs\n\n\nclass Full(test_runs.Full):\n    def __init__(self):\n"
                                    f"        super().__init__({name!r})\n")  # fmt: skip
    sys.modules.pop("full", None)
    line = refusal(*words, "--trainer.callbacks+=full.Full")
    assert line.startswith(f"unimim: error: {file} cannot be written (No space left on device): make room, ")
    assert "kept" in line


@pytest.mark.parametrize("logger", ["CSVLogger", "TensorBoardLogger"])
def test_a_folder_that_cannot_be_written_is_told_in_one_line(photos: Path, logger: str) -> None:
    """It is below a file."""
    pytest.importorskip("tensorboard")
    (photos / "file").touch()
    line = refusal(f"--trainer.logger={logger}", "--trainer.logger.save_dir=file/runs", "--trainer.logger.name=x")
    assert line.startswith(f"unimim: error: {photos}/file/runs")
    assert "cannot be written (Not a directory): make room, or set another folder (save_dir of trainer.logger" in line


def test_a_configuration_that_cannot_be_written(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("unimim.cli.tasks.Parser.save", full)
    assert refusal().startswith(
        "unimim: error: outputs/pretrain/version_0/config.yaml cannot be written (No space left on device): make room, or set"
    )


# Metrics by name


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ModelCheckpoint", "--trainer.callbacks.monitor=val/acc1"], "ModelCheckpoint waits for 'val/acc1', which nothing"),
        (
            ["EarlyStopping", "--trainer.callbacks.monitor=loss"],
            "EarlyStopping waits for 'loss', which nothing logs",
        ),
        (["ModelCheckpoint", "--trainer.callbacks.monitor=val/knn"], "(val/knn needs unimim.KNNCallback in trainer.callbacks)"),
    ],
)
def test_a_metric_that_no_one_logs_is_refused_before_the_first_step(
    photos: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: str
) -> None:
    steps = []
    monkeypatch.setattr("unimim.MaskedImageModeling.training_step", lambda *_: steps.append(1))
    line = refusal(*(f"--trainer.callbacks+={word}" if i == 0 else word for i, word in enumerate(words)))
    assert expected in line
    assert "give one of train/loss" in line
    assert not steps


def test_a_name_in_a_files_name_that_no_one_logs_is_warned_of(photos: Path) -> None:
    """Lightning writes 0 for it, which ends no run; rates are what LearningRateMonitor logs."""
    words = ["--trainer.callbacks+=LearningRateMonitor", "--trainer.callbacks+=ModelCheckpoint"]
    name = "--trainer.callbacks.filename={epoch}-{train/los:.2f}-{lr-AdamW/pg1:.1e}"
    with pytest.warns(UserWarning, match="filename of ModelCheckpoint names 'train/los', which nothing logs") as warned:
        pretrain([*PLAIN, *words, name])
    assert not any("lr-AdamW" in str(warning.message) for warning in warned)
    assert list(photos.rglob("epoch=0-train/los=0.00-lr-AdamW/pg1=*.ckpt"))


def test_a_metric_of_ones_own_is_not_refused(photos: Path) -> None:
    (photos / "more.py").write_text(
        "import pytorch_lightning as pl\n\n\nclass More(pl.Callback):\n"
        "    def on_train_epoch_end(self, trainer, pl_module):\n        pl_module.log('val/mine', 1.0)\n"
    )
    words = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=val/mine"]
    trainer = pretrain([*PLAIN, "--trainer.callbacks+=more.More", *words]).trainer
    assert trainer.checkpoint_callback.best_model_path
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/yours"]
    line = refusal("--trainer.callbacks+=more.More", *stop)
    assert "Early stopping conditioned on metric `val/yours` which is not available" in line
    assert "val/mine" in line


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--trainer.enable_checkpointing=false"], "trainer.enable_checkpointing is false"),
        (["--trainer.fast_dev_run=1"], "trainer.fast_dev_run tries the run, and saves nothing"),
        (
            ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_epochs=5"],
            "ModelCheckpoint saves by every_n_epochs 5, which this run, ended at step 4, has not reached",
        ),
        ([], None),
    ],
)
def test_a_run_without_a_checkpoint_says_why(
    photos: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str | None
) -> None:
    pretrain([*PLAIN, *words])
    said = capsys.readouterr().out
    assert (f"no checkpoint was saved: {why}\n" in said) if why else ("no checkpoint was saved" not in said)


@pytest.mark.parametrize("task", ["pretraining", "fine-tuning", "segmentation", "probe"])
def test_each_task_logs_what_it_declares(task: str, tmp_path: Path) -> None:
    """And nothing else."""
    loader = DataLoader(list(zip(torch.rand(8, 3, 32, 32), torch.randint(3, (8,)), strict=True)), batch_size=4)
    models = {
        "pretraining": tiny_model,
        "fine-tuning": tiny_finetuning,
        "segmentation": tiny_segmentation,
        "probe": lambda: LinearProbe(tiny_student().backbone, 3, (0.1, 0.01), warmup_epochs=0),
    }
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False, enable_model_summary=False,
        max_epochs=1, enable_checkpointing=False,
    )  # fmt: skip
    model = models[task]()
    if task == "pretraining":
        trainer.fit(model, DataLoader(torch.rand(8, 3, 32, 32), batch_size=4))
    elif task == "segmentation":
        labels = torch.randint(3, (4, 32, 32))
        pairs = DataLoader(list(zip(torch.rand(4, 3, 32, 32), labels, strict=True)), batch_size=2)
        trainer.fit(model, pairs, pairs)
    else:
        trainer.fit(model, loader, loader)
    assert sorted(trainer.callback_metrics) == sorted(model.metrics)
