"""How a training starts: trainer files, launchers, a real Slurm, and what docs/cluster.md says of them."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
import yaml
from conftest import PLAIN, ROOT, tiny_model
from PIL import Image
from pytorch_lightning.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from pytorch_lightning.plugins.precision import HalfPrecision
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unimim import FeatureTarget, FineTuning, MaskTokenStudent, UperNetSegmentation
from unimim.cli.main import main
from unimim.training.launch import check_processes, check_slurm, default_precision, step_in_words

PAGE = ROOT / "docs" / "cluster.md"
CODE = [line for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S) for line in block.splitlines()]
LAUNCH = [line for line in CODE if "demo_hog" in line]
ASKED = " --trainer.devices 2 --trainer.strategy ddp"
SBATCH = "conf/slurm/train.sbatch"
TRAINER_FILES = sorted((ROOT / "conf" / "trainer").glob("*.yaml"))
RECIPES = {"pretrain": "maskdistill_vit_base", "finetune": "swin_base", "segment": "upernet_vit_base", "probe": "linear"}
REFUSED = {
    ("probe", "fsdp2"): "trainer.strategy: of a probe the backbone learns nothing, so there is nothing to shard: got ModelPar"
}
"""Recipe and trainer file that do not go together, and what is said of it."""
QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
LAUNCHERS = (
    *("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"),
)
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
}
IN_A_JOB = {"SLURM_JOB_NAME": "x", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2"}
OF_RANK_0 = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = {**IN_A_JOB, **OF_RANK_0, "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2"}


# Trainer files


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What a command would do, as --print_config says it."""
    with pytest.raises(SystemExit) as end:
        main([*words, "--print_config"])
    assert not end.value.code
    found: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("path", TRAINER_FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("task", RECIPES)
def test_a_trainer_file_beside_a_recipe(task: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it says counts, and of the recipe's trainer everything else stays."""
    recipe = ROOT / "conf" / task / f"{RECIPES[task]}.yaml"
    words = [task, "fit", "--config", str(recipe), "--config", str(path), "--data.root", "x"]
    found = shown(capsys, *words)["trainer"]
    of_file, of_recipe = (yaml.safe_load(file.read_text())["trainer"] for file in (path, recipe))
    checkpoints = of_file.pop("callbacks+", [])
    strategy, plugins = of_file.pop("strategy"), of_file.pop("plugins", [])
    for key, value in {**of_recipe, **of_file}.items():
        assert found[key] == value or str(found[key]) == str(value), key
    if isinstance(strategy, str):
        assert found["strategy"] == strategy
    else:
        assert found["strategy"]["class_path"].endswith(f".{strategy['class_path']}")
        assert {key: found["strategy"]["init_args"][key] for key in strategy["init_args"]} == strategy["init_args"]
    assert [plugin["init_args"]["auto_requeue"] for plugin in found["plugins"] or []] == [False for _ in plugins]
    given = [callback.get("init_args", {}) for callback in checkpoints]
    for callback, arguments in zip(found["callbacks"] or [], given, strict=True):
        assert callback["class_path"].endswith(".ModelCheckpoint")
        assert arguments.items() <= callback["init_args"].items()


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), REFUSED)
def test_what_does_not_go_together_is_said_in_one_line(task: str, name: str, tmp_path: Path) -> None:
    """One process of an FSDP2 on a CPU is refused as many on GPUs are."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / split / "a" / "0.png")
    saved(tmp_path / "one.ckpt", tiny_model())
    words = f"""unimim {task} fit --config {ROOT}/conf/{task}/{RECIPES[task]}.yaml --config {ROOT}/conf/trainer/{name}.yaml
        --data.root . --data.num_workers 0 --data.batch_size 1 --model.backbone one.ckpt
        --trainer.accelerator cpu --trainer.devices 1 --trainer.strategy.data_parallel_size 1 --trainer.logger false"""
    code, said = run(words.replace("\n", " "), tmp_path)
    assert code == 1
    assert f"unimim: error: {REFUSED[task, name]}" in said
    assert "Traceback" not in said


def saved(path: Path, model: pl.LightningModule) -> None:
    """A model's checkpoint after one step."""
    trainer = pl.Trainer(**QUIET, max_steps=1)
    trainer.fit(model, DataLoader([torch.rand(3, 32, 32)] * 2, 2))
    trainer.save_checkpoint(path)


def test_later_counts_and_callbacks_are_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file over the recipe, the command line over both; a callback of the recipe stays."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("trainer:\n  precision: 16-mixed\n  log_every_n_steps: 7\n  callbacks:\n  - class_path: KNNCallback\n")
    base = ["pretrain", "fit", "--config", str(ROOT / "conf/pretrain/demo_hog.yaml"), "--config", str(recipe)]
    words = [*base, "--config", str(ROOT / "conf/trainer/ddp.yaml"), "--trainer.strategy.timeout=0:00:30"]
    found = shown(capsys, *words, "--trainer.precision=32-true")["trainer"]
    assert found["precision"] == "32-true"
    assert found["log_every_n_steps"] == 50
    assert found["accelerator"] == "gpu"
    names = [callback["class_path"].rpartition(".")[-1] for callback in found["callbacks"]]
    assert names == ["KNNCallback", "ModelCheckpoint", "ModelCheckpoint"]
    assert found["strategy"]["init_args"]["timeout"] == "0:00:30"


def test_the_two_checkpoints_of_a_trainer_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last epoch's, and the newest within one: six steps in two epochs, and every fourth is kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.new("RGB", (40, 40), (40 * i, 20, 100)).save(tmp_path / "photos" / f"{i}.jpg")
    small = "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"
    words = f"""pretrain fit --config {ROOT}/conf/pretrain/mae_vit_base.yaml --config {ROOT}/conf/trainer/gpu.yaml
        --trainer.accelerator cpu --trainer.precision 32-true --data.root photos --data.image_size 32 --data.batch_size 2
        --data.num_workers 0 --model.teacher.patch_size 8 --model.student.model_args '{small}' --model.head.width 16
        --model.head.num_heads 2 --trainer.max_epochs 2 --trainer.callbacks.every_n_train_steps 4
        --trainer.enable_progress_bar false"""
    main(shlex.split(words))
    assert {path.name for path in tmp_path.rglob("*.ckpt")} == {"epoch=1-step=6.ckpt", "within_epoch=1-step=4.ckpt"}


# Defaults


@pytest.mark.parametrize(
    ("accelerator", "plugins", "on_gpu"),
    [
        ("auto", None, "bf16-mixed"),
        ("gpu", [], "bf16-mixed"),
        ("cuda", None, "bf16-mixed"),
        ("cpu", None, None),
        ("auto", HalfPrecision("bf16-true"), None),
        ("auto", [HalfPrecision("bf16-true")], None),
    ],
)
def test_precision_where_none_is_given(
    accelerator: str, plugins: Any, on_gpu: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert default_precision(accelerator, plugins) == (on_gpu if there else None)


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 0), None), ((7, 5), None), ((8, 0), "bf16-mixed"), ((9, 0), "bf16-mixed")]
)
def test_a_gpu_without_bfloat16_takes_32_bits_and_says_so(
    capability: tuple[int, int], expected: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A V100 and a T4, an A100 and an H100, by what torch asks of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=capability[0]))
    with caplog.at_level("INFO"):
        assert default_precision("auto", None) == expected
        assert default_precision("cpu", None) is None
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" (")[0] for line in said] == ([] if expected else ["precision 32-true: Tesla V100 has no bfloat16"])


@pytest.mark.parametrize(("given", "expected"), [(None, "bf16-mixed"), ("32-true", "32-true"), ("bf16-true", "bf16-true")])
def test_a_given_precision_is_kept(given: str | None, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a GPU, which is asked for by `default_precision` alone."""
    from unimim.cli import tasks as commands

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "default_precision", lambda *_: "bf16-mixed")
    words = [
        "fit",
        "--config",
        str(ROOT / "conf/pretrain/demo_hog.yaml"),
        f"--data.root={ROOT / 'data'}",
        "--trainer.logger=false",
    ]
    off = ["--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false", "--trainer.max_steps=1"]
    chosen = [] if given is None else [f"--trainer.precision={given}"]
    assert commands.pretrain([*words, *off, *chosen]).trainer.precision == expected


def test_a_step_in_words() -> None:
    trainer: Any = SimpleNamespace(
        world_size=8, accumulate_grad_batches=2, precision="bf16-mixed", callbacks=[], current_epoch=0
    )
    said = step_in_words(trainer, 128, 1.5e-3)
    assert said == "2048 images a step (8 devices x 128 x 2 accumulated), peak lr 0.0015, precision bf16-mixed"


class Samples(pl.LightningDataModule):
    """The same samples in batches of four."""

    batch_size = 4

    def __init__(self, samples: list[Any]) -> None:
        super().__init__()
        self.samples = samples

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, self.batch_size)  # type: ignore[arg-type]


@pytest.mark.parametrize("task", ["finetune", "segment"])
def test_every_task_says_its_step(task: str, caplog: pytest.LogCaptureFixture) -> None:
    """With the learning rate that is taken: the recipe's batch is half of it."""
    vit = {
        "backbone": "vit_tiny_patch16_224",
        "model_args": {**PLAIN, "depth": 4},
        "lr": 1e-3,
        "recipe_batch": 4,
        "scale_lr": True,
    }
    if task == "finetune":
        model: pl.LightningModule = FineTuning(**vit, num_classes=4)
        sample: tuple[Tensor, Any] = (torch.rand(3, 32, 32), 1)
    else:
        model = UperNetSegmentation(**vit, num_classes=4, channels=8)
        sample = (torch.rand(3, 32, 32), torch.ones(32, 32, dtype=torch.long))
    with caplog.at_level("INFO", "pytorch_lightning.utilities.rank_zero"):
        trainer = pl.Trainer(**QUIET, max_epochs=1, accumulate_grad_batches=2)
        trainer.fit(model, datamodule=Samples([sample] * 8))
    assert "8 images a step (1 devices x 4 x 2 accumulated), peak lr 0.002, precision 32-true" in caplog.text


# As many processes as the Trainer counts


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing had started this process; the rank that a Trainer notes is forgotten afterwards."""
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    for name in (*LAUNCHERS, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def variables(request: pytest.FixtureRequest, no_launcher: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What launchers set is set; a parameter."""
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)


STEP = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
SCRIPT = {**IN_A_JOB, **OF_RANK_0, "SLURM_NTASKS": "2"}
POD = {"WORLD_SIZE": "2", "RANK": "0"}
COUNTS_1 = "but the Trainer counts 1 (1 nodes x 1 devices): give --trainer.devices 2"


@pytest.mark.parametrize(
    ("variables", "nodes", "devices", "expected"),
    [
        ({}, 1, 1, None),
        ({}, 1, 2, None),  # Lightning starts the second
        (TORCHRUN, 1, 2, None),
        (TORCHRUN, 1, 1, f"torchrun started 2 processes, {COUNTS_1} --trainer.num_nodes 1"),
        (TORCHRUN, 1, 4, "or start 4"),
        ({**TORCHRUN, "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 1, 8, "--trainer.devices 8 --trainer.num_nodes 2"),
        ({**TORCHRUN, **SRUN, **STEP}, 1, 2, None),  # a torchrun on each node
        (SRUN, 2, 2, None),
        (SRUN, 1, 1, f"srun started 4 processes, {COUNTS_1} --trainer.num_nodes 2"),
        (SRUN, 1, 2, "srun started 4 processes"),
        ({**SRUN, **STEP}, 1, 8, "srun started 1 processes, but the Trainer counts 8"),
        ({**SRUN, "SLURM_JOB_NAME": "interactive"}, 2, 2, "in a job named interactive Lightning does not look at Slurm"),
        ({**SRUN, **STEP, "SLURM_JOB_NAME": "bash"}, 1, 2, None),  # srun --pty bash: Lightning starts the second
        (SCRIPT, 1, 2, "put srun before the command (and give sbatch --ntasks-per-node 2)"),
        (SCRIPT, 1, 1, None),  # one process of the job's script
        (POD, 1, 1, "WORLD_SIZE says that a launcher started 2 processes"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 1, 2, None),  # of Lightning's own
        (POD, 2, 8, None),  # of two pods, in which Lightning starts eight
        ({"LOCAL_RANK": "0"}, 1, 1, None),  # left behind by an earlier fit
        ({"WORLD_SIZE": "2"}, 1, 1, None),  # without a rank, nobody's
        ({"OMPI_COMM_WORLD_SIZE": "2"}, 1, 1, "mpirun started 2 processes, but Lightning knows MPI by mpi4py alone"),
        ({"PMI_SIZE": "2"}, 1, 2, "mpirun started 2 processes"),  # two trainings of two
        ({"PMI_SIZE": "1"}, 1, 2, None),
        ({"PMI_SIZE": "2", "NODE_RANK": "0"}, 2, 4, None),  # one on each node, in which Lightning starts four
        ({"PMI_SIZE": "2", "NODE_RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}, 2, 4, None),  # and one of those
        ({"PMI_SIZE": "2", "LOCAL_RANK": "0"}, 1, 2, None),  # told their ranks by a script
    ],
    indirect=["variables"],
)
def test_the_launchers_count_is_the_trainers(variables: None, nodes: int, devices: int, expected: str | None) -> None:
    check_trainer(expected, num_nodes=nodes, devices=devices)


def check_trainer(expected: str | None, **options: Any) -> None:
    """What `check_processes` says of a Trainer, None for nothing."""
    trainer = pl.Trainer(**QUIET, **options)
    if expected is None:
        check_processes(trainer)
        return
    with pytest.raises(ValueError, match=re.escape(expected)) as error:
        check_processes(trainer)
    assert "\n" not in str(error.value)


class MPI(ClusterEnvironment):
    """An environment of a launcher other than torchrun and srun, which started two processes."""

    creates_processes_externally = True  # type: ignore[assignment]
    main_address, main_port = "127.0.0.1", 29500  # type: ignore[assignment]

    @staticmethod
    def detect() -> bool:
        return True

    def world_size(self) -> int:
        return 2

    def set_world_size(self, size: int) -> None: ...

    def global_rank(self) -> int:
        return 0

    def set_global_rank(self, rank: int) -> None: ...

    local_rank = node_rank = global_rank


@pytest.mark.parametrize(
    ("variables", "plugin", "devices", "expected"),
    [
        (SCRIPT, LightningEnvironment, 2, None),  # in a job's script Lightning starts the second
        ({**SRUN, **STEP}, LightningEnvironment, 2, None),
        (SRUN, LightningEnvironment, 2, "srun started 4 processes, but with the plugin LightningEnvironment each would start"),
        ({**SRUN, "SLURM_JOB_NAME": "bash"}, SLURMEnvironment, 2, "srun started 4 processes, but the Trainer counts 2"),
        (TORCHRUN, LightningEnvironment, 1, "WORLD_SIZE says that a launcher started 2 processes, but the Trainer counts 1"),
        ({}, MPI, 2, None),
        ({}, MPI, 4, "a launcher (MPI) started 2 processes, but the Trainer counts 4 (1 nodes x 4 devices): give --trainer.d"),
    ],
    indirect=["variables"],
)
def test_the_launcher_is_the_one_that_the_trainer_has(variables: None, plugin: Any, devices: int, expected: str | None) -> None:
    check_trainer(expected, devices=devices, plugins=plugin())


@pytest.mark.parametrize("variables", [TORCHRUN], indirect=True)
def test_a_notebooks_trainer_is_compared_too(variables: None) -> None:
    with pytest.raises(ValueError, match="torchrun started 2 processes"):
        pl.Trainer(**QUIET, max_epochs=1).fit(tiny_model(), DataLoader([torch.rand(3, 32, 32)] * 2, 2))


@pytest.mark.parametrize("variables", [TORCHRUN], indirect=True)
def test_a_trainer_within_joined_processes_may_be_smaller(variables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    check_trainer(None)


ALONE = {**OF_RANK_0, "SLURM_JOB_NAME": "x", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
NTASKS_ALONE = (
    "Slurm was given --ntasks 4 alone, by which Lightning cannot tell the tasks of a node: give srun and sbatch "
    "--ntasks-per-node 2 too"
)


@pytest.mark.parametrize(
    ("variables", "environment", "expected"),
    [
        ({}, None, None),
        (SRUN, None, None),
        (SRUN, SLURMEnvironment, None),
        (ALONE, None, NTASKS_ALONE),
        (ALONE, SLURMEnvironment, NTASKS_ALONE),
        (ALONE, LightningEnvironment, None),
        ({**ALONE, **TORCHRUN}, None, None),
        ({**ALONE, "SLURM_JOB_NAME": "bash"}, None, None),
    ],
    indirect=["variables"],
)
def test_what_slurm_set_is_refused_where_lightning_would(variables: None, environment: Any, expected: str | None) -> None:
    """Lightning makes the environment that is asked for, or the one that it detects."""
    plugins = environment and [SimpleNamespace(class_path=f"{environment.__module__}.{environment.__name__}")]
    detected = next(one for one in (TorchElasticEnvironment, SLURMEnvironment, LightningEnvironment) if one.detect())
    if expected is None:
        check_slurm(plugins)
        (environment or detected)()
        return
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        check_slurm(plugins)
    with pytest.raises(RuntimeError, match="this variable is not supported"):
        (environment or detected)()


@pytest.mark.parametrize(
    ("variables", "file", "expected"),
    [
        (ALONE, [], NTASKS_ALONE),
        (ALONE, ["--config=conf/trainer/slurm.yaml"], NTASKS_ALONE),
        ({}, ["--config=conf/trainer/slurm.yaml"], "trainer.plugins: SLURMEnvironment is for a job of Slurm, and this is none"),
    ],
    indirect=["variables"],
)
def test_slurm_is_asked_for_in_one_line(
    variables: None, file: list[str], expected: str, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`srun -n 2`, and the file of Slurm where there is none."""
    monkeypatch.chdir(checkout)
    cpu = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.precision=32-true"]
    with pytest.raises(SystemExit) as error:
        main(["pretrain", "fit", "--config", "conf/pretrain/demo_hog.yaml", *file, *cpu])
    assert str(error.value).startswith(f"unimim: error: {expected}")
    assert "\n" not in str(error.value)
    assert not (checkout / "outputs").exists()


# The launch table


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder to run the page's lines in: with the recipes and Fashion-MNIST, and no outputs."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    (tmp_path / "data").symlink_to(ROOT / "data")
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    """That of a shell in which this Python's programs are found."""
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"])
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    return {**kept, "PATH": programs, "OMP_NUM_THREADS": "1", "JSONARGPARSE_DEPRECATION_WARNINGS": "off", **more}


def run(line: str, cwd: Path, **more: str) -> tuple[int, str]:
    """A line of shell: its exit code, and what it says."""
    done = subprocess.run(
        ["bash", "-c", line], cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, done.stdout + done.stderr


def one_training_of_two(folder: Path, said: str) -> None:
    """1024 images in steps of 2 x 64 are 8 steps, in one folder."""
    assert said.count("128 images a step (2 devices x 64 x 1 accumulated), peak lr") == 1, said
    assert [path.name for path in (folder / "outputs" / "pretrain").iterdir()] == ["version_0"]
    assert [path.name for path in folder.rglob("*.ckpt")] == ["epoch=0-step=8.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in LAUNCH if not line.startswith("srun")], ids=lambda line: line.split()[0])
def test_a_line_of_the_launch_table_is_one_training(line: str, checkout: Path) -> None:
    code, said = run(line, checkout)
    assert code == 0, said
    one_training_of_two(checkout, said)


@pytest.mark.slow
def test_two_processes_with_all_on_auto_are_refused(checkout: Path) -> None:
    """The trap: each would train on its own, and end well."""
    words = shlex.join(
        word for word in shlex.split(LAUNCH[1]) if word not in ("--trainer.devices", "--trainer.strategy", "ddp")
    )
    code, said = run(words.removesuffix(" 2"), checkout)
    assert code
    error = "unimim: error: torchrun started 2 processes, but the Trainer counts 1 (1 nodes x 1 devices): give "
    assert f"{error}--trainer.devices 2 --trainer.num_nodes 1 --trainer.strategy ddp, or start 1\n" in said
    assert "launching.py" not in said  # no traceback but torchrun's own
    assert not (checkout / "outputs").exists()


HANG = """import os, signal, time
import pytorch_lightning as pl


class Fate(pl.Callback):
    def __init__(self, hangs: int = -1, dies: int = -1) -> None:
        self.hangs, self.dies = hangs, dies

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2 and trainer.global_rank == self.hangs:
            open("hangs", "w").close()
            time.sleep(900)
        if batch_idx == 2 and trainer.global_rank == self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "rank"), [(0, 0), (0, 1), (1, 0)], ids=["unimim-0", "unimim-1", "torchrun-0"])
def test_a_process_that_hangs_ends_the_training(launcher: int, rank: int, checkout: Path) -> None:
    """The others wait for it as long as the strategy's timeout says, 30 s here; then none is left, not even that one.

    torchrun gives it 30 s more.
    """
    (checkout / "fate.py").write_text(HANG)
    line = LAUNCH[launcher].replace(
        "--trainer.strategy ddp", "--trainer.strategy DDPStrategy --trainer.strategy.timeout 0:00:30"
    )
    code, said = run(f"{line} --trainer.callbacks+=fate.Fate --trainer.callbacks.hangs={rank}", checkout)
    seconds = time.time() - (checkout / "hangs").stat().st_mtime
    assert code, said
    assert seconds >= 30  # and `run` waits for less than the default timeout, so it is this one
    expected = "unimim: error: another process of this run hangs, or takes longer than trainer.strategy.timeout"
    assert expected in said, said[-3000:]
    wait_for(lambda: not left_in(checkout), 10)


def left_in(folder: Path) -> list[str]:
    """Processes that run in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "cwd").resolve() == folder.resolve() and (entry / "cmdline").read_bytes():
                found.append(entry.name)
    return found


# The script for Slurm, with programs that stand for its own

FAKES = {
    "srun": """echo $$ >srun.pid; trap "$ON_USR1" USR1; echo 1 >started; for _ in {1..300}; do sleep 0.1; done""",
    "scancel": """echo "$@" >>cancelled; kill -USR1 "$(cat srun.pid)" """,
    "scontrol": """if [ "$1" = requeue ]; then echo "$2" >requeued; else echo node; fi""",
    "squeue": """echo "$REASON" """,
}


@pytest.mark.parametrize(
    ("sent", "on_usr1", "reason", "put_back", "code"),
    [
        ("USR1", "exit 0", "None", True, 0),
        ("USR1", "exit 1", "None", False, 1),  # an error
        ("USR1", "kill -KILL $$", "None", False, 137),  # a process that died
        ("USR1", "trap - USR1; kill -USR1 $$", "None", True, 0),  # the signal came before the training was there to heed it
        ("USR1 TERM", "", "TimeLimit", True, 0),  # killed at the limit
        ("USR1 TERM", "", "None", False, 143),  # scancel
        ("USR1 TERM", "trap 'exit 0' TERM", "TimeLimit", True, 0),  # saved after the limit
        ("USR1 TERM", "trap 'exit 1' TERM", "TimeLimit", False, 1),
        ("", "", "None", False, 143),
    ],
)
def test_a_job_is_put_back_after_a_clean_stop_or_the_time_limit(
    sent: str, on_usr1: str, reason: str, put_back: bool, code: int, tmp_path: Path
) -> None:
    """And not after an error, from which it would not get further the next time."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_JOB_NODELIST": "node", "SLURM_CPUS_PER_TASK": "1"}
    found = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "ON_USR1": on_usr1 or ":", "REASON": reason}
    script = subprocess.Popen(["bash", ROOT / SBATCH, "pretrain", "x.yaml"], cwd=tmp_path, env={**os.environ, **slurm, **found})
    try:
        wait_for((tmp_path / "started").exists, 30)
        srun = int((tmp_path / "srun.pid").read_text())
        for name in sent.split():
            script.send_signal(getattr(signal, f"SIG{name}"))
            wait_for((tmp_path / "cancelled").exists, 30)
            time.sleep(0.5)
        if script.poll() is None and (not sent or "TERM" in sent):
            os.kill(srun, signal.SIGTERM)
        assert script.wait(timeout=40) == code
    finally:
        script.kill()
    assert (tmp_path / "requeued").exists() == put_back
    if sent:
        assert (tmp_path / "cancelled").read_text() == "--signal=USR1 7\n"


# A real Slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """SLURM_CONF of a real Slurm of one node."""
    path = environment()["PATH"]
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
    if missing := [program for program in programs if shutil.which(program, path=path) is None]:
        pytest.skip(f"no program {', '.join(missing)}: apt-get install slurm-wlm munge")
    folder = tmp_path_factory.mktemp("slurm")
    command = [
        "bash",
        str(ROOT / "tests" / "slurm.sh"),
        str(folder),
        "sh",
        "-c",
        'touch "$0"; exec sleep 900',
        str(folder / "up"),
    ]
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(command, env=environment(), stdout=said, stderr=said)
    try:
        wait_for(lambda: (folder / "up").exists() or process.poll() is not None, 60)
        assert process.poll() is None, (folder / "said.txt").read_text()
        yield str(folder / "slurm.conf")
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(done: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.3)


@pytest.mark.slow
def test_srun_is_one_training(slurm: str, checkout: Path) -> None:
    """The page's line; and without devices and strategy it is refused."""
    line = next(line for line in LAUNCH if line.startswith("srun"))
    code, said = run(line, checkout, SLURM_CONF=slurm)
    assert code == 0, said
    one_training_of_two(checkout, said)
    shutil.rmtree(checkout / "outputs")
    code, said = run(line.removesuffix(ASKED), checkout, SLURM_CONF=slurm)
    assert code
    assert "unimim: error: srun started 2 processes, but the Trainer counts 1 (1 nodes x 1 devices): give " in said
    assert not (checkout / "outputs").exists()
    code, said = run(line.replace("--nodes 1 --ntasks-per-node 2", "-n 2"), checkout, SLURM_CONF=slurm)
    assert code
    assert "unimim: error: Slurm was given --ntasks 2 alone, by which Lightning cannot tell the tasks of a node: give " in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_job_that_is_put_back_ends_at_the_right_step(slurm: str, checkout: Path) -> None:
    """The signal comes as before a time limit, once; then the job starts again by itself, and trains what was left."""
    options = """--data.train_images 1024 --model.student.model_args.depth 1 --trainer.max_epochs 20
        --trainer.accelerator cpu --trainer.precision 32-true"""
    flags = "--parsable --job-name tiny --ntasks-per-node 2 --gpus-per-node 0 --cpus-per-task 1"
    line = f"sbatch {flags} {SBATCH} pretrain conf/pretrain/demo_hog.yaml {options}".replace("\n", " ")
    code, said = run(line, checkout, SLURM_CONF=slurm)
    assert code == 0, said
    job = said.strip()

    def waiting() -> str:
        return run(f"squeue --noheader --job {job} 2>/dev/null", checkout, SLURM_CONF=slurm)[1].strip()

    try:
        wait_for(lambda: list(checkout.rglob("*.ckpt")) or not waiting(), 300)
        assert run(f"scancel --batch --signal=USR1 {job}", checkout, SLURM_CONF=slurm)[0] == 0
        wait_for(lambda: not waiting(), 300)
    finally:
        run(f"scancel {job}", checkout, SLURM_CONF=slurm)
    text = (checkout / "slurm-tiny.txt").read_text()
    (saved,) = re.findall(r"SIGUSR1 after step (\d+): (\S+)", text)
    assert 8 <= int(saved[0]) < 160
    assert f"goes on from {saved[1]}" in text
    assert text.count("128 images a step (2 devices x 64 x 1 accumulated)") == 2
    assert text.count("max_epochs=20` reached") == 1
    (result,) = (checkout / "outputs/tiny/pretrain/version_1/checkpoints").iterdir()
    assert result.name == "epoch=19-step=160.ckpt"


@pytest.mark.slow
def test_a_process_of_a_job_that_dies_ends_the_job(slurm: str, checkout: Path) -> None:
    """By `srun --kill-on-bad-exit`: the other one hangs, and would not notice. The job is not put back."""
    (checkout / "fate.py").write_text(HANG)
    fate = "--trainer.callbacks+=fate.Fate --trainer.callbacks.hangs=0 --trainer.callbacks.dies=1"
    flags = "--wait --job-name dies --ntasks-per-node 2 --gpus-per-node 0 --cpus-per-task 1"
    cpu = "--trainer.accelerator cpu --trainer.precision 32-true --data.train_images 1024"
    line = f"sbatch {flags} {SBATCH} pretrain conf/pretrain/demo_hog.yaml {cpu} {fate}"
    code, said = run(line, checkout, SLURM_CONF=slurm)
    text = (checkout / "slurm-dies.txt").read_text()
    assert code, said + text  # within the time of `run`, and so not after the strategy's own timeout
    assert "task 1: Killed" in text
    assert text.count("128 images a step") == 1
    wait_for(lambda: not left_in(checkout), 30)


# The page


def words_of(line: str) -> list[str]:
    """The words after `unimim` of a line in docs/cluster.md, whichever launcher is before them."""
    words = shlex.split(line, comments=True)
    if words[0] == "sbatch":
        task, recipe, *options = words[words.index(SBATCH) + 1 :]
        return [task, "fit", "--config", recipe, "--config", "conf/trainer/slurm.yaml", "--resume", "auto", *options]
    start = max(words.index(name) for name in ("unimim", "$(which unimim)") if name in words)
    return words[start + 1 :]


@pytest.mark.parametrize("line", CODE)
def test_every_command_of_the_page_is_understood(
    line: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(sys, "path", [*sys.path])
    words = words_of(line)
    for name in [word for word in words if word.startswith("outputs/")]:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({}, name) if name.endswith(".ckpt") else shutil.copy(ROOT / "conf/pretrain/demo_hog.yaml", name)
    assert shown(capsys, *words)["trainer"]["max_epochs"] != 0


@pytest.mark.parametrize("path", [*TRAINER_FILES, ROOT / SBATCH], ids=lambda path: path.name)
def test_the_command_in_a_files_header_is_understood(
    path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(checkout)
    header = path.read_text().replace("\\\n#", "")
    lines = re.findall(r"^# +((?:unimim|sbatch) .+)", header, re.M)
    assert lines
    for line in lines:
        shown(capsys, *words_of(line))


def test_numbers_of_the_page_are_those_of_conf() -> None:
    """10 minutes, 500 steps, two minutes."""
    text = " ".join(PAGE.read_text().split())
    trainers = {path.stem: yaml.safe_load(path.read_text())["trainer"] for path in TRAINER_FILES}
    waits = {trainer["strategy"]["init_args"]["timeout"] for trainer in trainers.values() if trainer["strategy"] != "auto"}
    assert waits == {"0:10:00"}
    assert "the others wait 10 minutes, the `timeout` of the strategy" in text
    for name, trainer in trainers.items():
        kept = [callback.get("init_args", {}) for callback in trainer.get("callbacks+", [])]
        assert name == "cpu" or [arguments.get("every_n_train_steps") for arguments in kept] == [None, 500]
    assert "within it every 500 steps" in text
    assert "#SBATCH --signal=B:USR1@120\n" in (ROOT / SBATCH).read_text()
    assert "Two minutes before the time limit Slurm sends SIGUSR1" in text


# The estimates


@pytest.fixture(scope="module")
def estimates() -> Any:
    sys.path.insert(0, str(ROOT / "docs"))
    import estimates

    return estimates


@pytest.mark.slow
def test_the_pages_estimates_are_the_scripts(estimates: Any) -> None:
    """`python docs/estimates.py` writes them."""
    page = PAGE.read_text()
    assert estimates.page_with_table(page) == page
    assert page.count("](../conf/pretrain/maskdistill_vit_") == len(estimates.RUNS)


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224"])
def test_what_a_block_keeps_is_what_torch_keeps(name: str, mixed: bool, estimates: Any) -> None:
    """Of every tensor that autograd keeps, its memory once; the weights' bf16 copies are counted with the weights.

    A ViT's attention is fused on a CPU too. A BEiT's, whose bias learns, is not: there torch keeps query, key and value in fp32
    and one map of probabilities, which the formula leaves out.
    """
    b, n, d, heads = 4, 17, 24, 2
    beit = {"init_values": 0.1, "drop_path_rate": 0.1, "use_rel_pos_bias": False} if name.startswith("beit") else {}
    network = timm.create_model(name, **PLAIN, **beit).train()
    bias = {"shared_rel_pos_bias": torch.rand(heads, n, n, requires_grad=True)} if beit else {}
    tokens = torch.rand(b, n, d, requires_grad=True)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", enabled=mixed):
        network.blocks[1](tokens, **bias)
    large = [tensor for pointer, tensor in kept.items() if pointer not in weights and tensor.numel() > b]  # drop path: one each
    found = sum(tensor.untyped_storage().nbytes() for tensor in large) - (2 * 12 * d * d if mixed else 0)
    expected = b * estimates.block_bytes(n, d, heads, 4 * d, layer_scale=bool(beit), mixed=mixed)
    if beit:
        expected += b * (4 * heads * n * n - 4 * heads * n + (2 * 3 * n * d if mixed else 0))
    assert found == expected


def test_the_formula_of_the_page_is_the_scripts(estimates: Any) -> None:
    """A = 2 · 4 n d + 2 n (6 d + 2 · 4 d + 2 d) + 4 n (4 + a), which is 40 bytes for each element, and a little."""
    n, d, a = 197, 768, 12
    assert estimates.block_bytes(n, d, a, 4 * d, layer_scale=True, mixed=True) == 40 * n * d + 4 * n * (4 + a)
    per_element = {
        (scale, mixed): estimates.block_bytes(n, d, a, 4 * d, scale, mixed) // (n * d)
        for scale in (True, False)
        for mixed in (True, False)
    }
    assert per_element == {(True, True): 40, (False, True): 36, (True, False): 72, (False, False): 64}


def learning(recipe: str) -> int:
    """Parameters of a recipe's student and head."""
    letters = yaml.safe_load((ROOT / f"conf/pretrain/{recipe}.yaml").read_text())["model"]
    with torch.device("meta"):
        student = MaskTokenStudent(**letters["student"]["init_args"])
        channels = timm.create_model(letters["teacher"]["init_args"]["network"]).num_features
        return sum(p.numel() for p in (*student.parameters(), *nn.Linear(student.embed_dim, channels).parameters()))


@pytest.mark.parametrize("recipe", ["maskdistill_vit_base", "maskdistill_vit_huge"])
def test_the_size_of_a_checkpoint_on_the_page(recipe: str) -> None:
    """12 bytes for each parameter of student and head."""
    count = learning(recipe)
    text = " ".join(PAGE.read_text().split())
    assert re.search(rf"\({count:,} parameters\),? {12 * count:,}", text), (count, 12 * count)


def test_a_checkpoint_has_12_bytes_a_parameter_and_no_teacher(tmp_path: Path) -> None:
    """Weights and two moments in fp32. Beside them names and sums: for each parameter, its moments and its steps."""
    teacher = FeatureTarget("vit_tiny_patch16_224", weights="random", model_args={**PLAIN, "embed_dim": 192})
    model = tiny_model(teacher=teacher, student=MaskTokenStudent("vit_tiny_patch16_224", {**PLAIN, "embed_dim": 96}))
    saved(tmp_path / "one.ckpt", model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    beside = (tmp_path / "one.ckpt").stat().st_size - 12 * sum(parameter.numel() for parameter in parameters)
    of_teacher = 4 * sum(parameter.numel() for network in teacher.networks() for parameter in network.parameters())
    assert 0 < beside < 2000 * len(parameters) < of_teacher
    assert "less than 2,000 bytes more for each of their tensors" in " ".join(PAGE.read_text().split())
