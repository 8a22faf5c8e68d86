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
from PIL import Image
from test_cli import SMALL
from test_faults import MINE, SECONDS, STEADY, TWO, command, tiny_finetuning
from torch.utils.data import DataLoader

from unimim import StopOnSignal
from unimim.commands import pretrain

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

    from unimim.written import machine

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
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["epoch=0-step=3-SIGINT.ckpt"]
