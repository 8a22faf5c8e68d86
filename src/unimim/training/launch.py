"""What the start of a training decides: its processes, its precision, the images of a step."""

import os
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CUDAAccelerator
from pytorch_lightning.callbacks import BackboneFinetuning, BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.strategies import FSDPStrategy
from pytorch_lightning.utilities import rank_zero_info
from torch import distributed

from unimim.errors import UserError
from unimim.lightning import cluster_environment, runs_before_training, trainer_of
from unimim.training.resume import accumulated
from unimim.weights.files import misfits

COUNTS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
"""Where launchers say how many processes they started (Slurm, Open MPI, MPICH), which Lightning does not always read."""

INTERACTIVE = ("bash", "interactive")
"""Names of a job of Slurm in which Lightning does as if there were none."""


def check_processes(trainer: pl.Trainer) -> None:
    """Looks that a launcher started as many processes as the Trainer counts, before the first step.

    With devices and strategy on auto, each of torchrun's processes on a CPU would else train on its own, and end well. Within
    processes that are already joined, a Trainer of fewer is taken as meant. Which launcher counts is the Trainer's choice, its
    cluster environment.

    Raises:
        ValueError: that launcher, or whatever set WORLD_SIZE and a rank, started another number; or srun or mpirun started
            several of which Lightning does not know.
    """
    if distributed.is_available() and distributed.is_initialized():
        return
    environment: Any = cluster_environment(trainer)
    counted, nodes = trainer.num_nodes * trainer.num_devices, trainer.num_nodes
    if isinstance(environment, LightningEnvironment):
        check_unseen(counted, nodes)
        joined = "RANK" in os.environ or "LOCAL_RANK" in os.environ  # by Lightning, too; a job of pods may count these
        launcher, started = "WORLD_SIZE says that a launcher", int(os.environ.get("WORLD_SIZE", 1)) if joined else 1
        started = max(started, counted)
    elif isinstance(environment, SLURMEnvironment):
        if "SLURM_STEP_NUM_TASKS" not in os.environ and counted > 1:
            raise UserError(
                f"the Trainer counts {counted} processes, but within a Slurm job only srun starts them: put srun before the "
                f"command (and give sbatch --ntasks-per-node {trainer.num_devices})"
            )
        launcher, started = "srun", int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
        nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    elif environment.creates_processes_externally:
        launcher, started = f"a launcher ({type(environment).__name__})", environment.world_size()
        if isinstance(environment, TorchElasticEnvironment):
            launcher, nodes = "torchrun", started // int(os.environ["LOCAL_WORLD_SIZE"])
    else:
        return
    if started != counted:
        raise UserError(
            f"{launcher} started {started} processes, but the Trainer counts {counted} ({trainer.num_nodes} nodes x "
            f"{trainer.num_devices} devices): give --trainer.devices {started // nodes} --trainer.num_nodes {nodes} "
            f"--trainer.strategy ddp, or start {counted}"
        )


def check_callbacks(trainer: pl.Trainer) -> None:
    """Looks for callbacks of Lightning that would change the batch, the rates or what learns behind the schedule's back.

    `pytorch_lightning.tuner.Tuner` uses two of them before a training, and is fine.

    Raises:
        ValueError: there is one.
    """
    callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, (LearningRateFinder, BatchSizeFinder)) and not runs_before_training(callback):
            finder = "lr_find(model, ...)" if isinstance(callback, LearningRateFinder) else "scale_batch_size(model, ...)"
            raise UserError(
                f"trainer.callbacks: {name} would find its number when the schedule is made already, which would not follow: "
                f"leave it out, and call pytorch_lightning.tuner.Tuner(trainer).{finder} before trainer.fit"
            )
        if isinstance(callback, BackboneFinetuning):
            raise UserError(
                f"trainer.callbacks: {name} adds groups of parameters that the schedule does not know, and freezes a "
                f"classifier with its backbone: leave it out; model.layer_decay slows the lower layers, a probe trains a head"
            )
        if isinstance(callback, GradientAccumulationScheduler) and trainer.accumulate_grad_batches != 1:
            raise UserError(
                f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}, and {name} would change it: leave one "
                f"of them out"
            )


def check_resumed(task: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
    """Looks, before its weights are loaded, that a checkpoint is of a model like this one.

    Of a folder of shards the weights are elsewhere, and torch says it.

    Raises:
        ValueError: keys are of another shape, or (in a Trainer, unless `strict_loading` is False) missing or unexpected.
    """
    weights = checkpoint.get("state_dict") or {}
    if not weights or (trainer_of(task) is not None and isinstance(task.trainer.strategy, FSDPStrategy)):
        return
    if found := misfits(task, weights, strict=trainer_of(task) is not None and task.strict_loading):
        raise UserError(
            f"the checkpoint is of another model than this {type(task).__name__}: {found}; give the arguments that it was "
            f"trained with"
        )


def check_unseen(counted: int, nodes: int) -> None:
    """Looks for processes that a launcher started where Lightning starts its own, so that each would train on its own.

    One on each node is as it should be if it is told its NODE_RANK, and as many as the Trainer counts if each is told its
    LOCAL_RANK.

    Raises:
        ValueError: there are others.
    """
    meant = [1, *(number for name, number in (("NODE_RANK", nodes), ("LOCAL_RANK", counted)) if name in os.environ)]
    job = os.environ.get("SLURM_JOB_NAME")
    for name, launcher in COUNTS.items():
        if (started := int(os.environ.get(name, 1))) in meant:
            continue
        if launcher == "mpirun":
            reason = "Lightning knows MPI by mpi4py alone, and each would train on its own: pip install mpi4py, or use torchrun"
        elif job in INTERACTIVE:
            reason = (
                f"in a job named {job} Lightning does not look at Slurm, and each would train on its own: name it otherwise "
                f"(salloc --job-name NAME)"
            )
        else:
            reason = "with the plugin LightningEnvironment each would start others and train on its own: leave it out"
        raise UserError(f"{launcher} started {started} processes, but {reason}")


def check_slurm(plugins: Any) -> None:
    """Looks at what Slurm set, before there is a Trainer, which would end in a traceback.

    Args:
        plugins: the Trainer's, as configured: parts with a `class_path`.

    Raises:
        ValueError: Slurm's environment is asked for where there is no Slurm; or Slurm was given --ntasks without
            --ntasks-per-node, by which Lightning cannot tell how many devices a node has.
    """
    parts = plugins if isinstance(plugins, list) else [plugins]
    names = {part.class_path.rpartition(".")[2] for part in parts if part is not None}
    asked = "SLURMEnvironment" in names
    if asked and "SLURM_PROCID" not in os.environ:
        raise UserError(
            "trainer.plugins: SLURMEnvironment is for a job of Slurm, and this is none: submit conf/slurm/train.sbatch, or "
            "take conf/trainer/ddp.yaml in place of slurm.yaml"
        )
    elastic = distributed.is_available() and distributed.is_torchelastic_launched()
    hidden = elastic or "LightningEnvironment" in names or os.environ.get("SLURM_JOB_NAME") in INTERACTIVE
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if (asked or not hidden) and tasks > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            f"Slurm was given --ntasks {tasks} alone, by which Lightning cannot tell the tasks of a node: give srun and sbatch "
            f"--ntasks-per-node {-(-tasks // int(os.environ.get('SLURM_NNODES', 1)))} too"
        )


def default_precision(accelerator: Any, plugins: Any) -> str | None:
    """The Trainer's precision where none is given: bf16 mixed on a GPU of CUDA, else None, its own 32-true.

    So too, which it says, on a GPU that has no bfloat16 (before NVIDIA's Ampere) and would emulate it.

    Args:
        accelerator, plugins: as the Trainer takes them; a precision plugin is a choice.
    """
    plugins = plugins if isinstance(plugins, list) else [plugins]
    if any(isinstance(plugin, Precision) for plugin in plugins) or not torch.cuda.is_available():
        return None
    if not isinstance(accelerator, CUDAAccelerator) and accelerator not in ("auto", "gpu", "cuda"):
        return None
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed"
    rank_zero_info(
        f"precision 32-true: {torch.cuda.get_device_name()} has no bfloat16 (--trainer.precision 16-mixed takes less time and "
        f"memory; of fp16 see that the loss stays finite)"
    )
    return None


def step_in_words(trainer: pl.Trainer, batch: int, lr: float) -> str:
    """The effective values of a step: `2048 images a step (8 devices x 256 x 1 accumulated), peak lr 0.0015, bf16-mixed`."""
    devices, gathered = trainer.world_size, accumulated(trainer, trainer.current_epoch)
    return (
        f"{devices * batch * gathered} images a step ({devices} devices x {batch} x {gathered} accumulated), "
        f"peak lr {lr:g}, precision {trainer.precision}"
    )
