"""Checkpoints that outlive an accident: a file is whole or not there, and the newest whole one is found again."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import pytorch_lightning as pl
import torch
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from fsspec.utils import get_protocol  # type: ignore[import-untyped]
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning_fabric.utilities.cloud_io import get_filesystem
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_info
from torch import distributed

from unimim.errors import UnwritableError, UserError
from unimim.weights.files import check_checkpoint, read_pickle, save
from unimim.weights.written import remove_dead, whole

LOGGED = ("config.yaml", "metrics.csv", "events.out.tfevents.*", "checkpoints/*.ckpt")
"""What tells that a run has written into a folder of its loggers."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to `NAME.MACHINE-PROCESS.part` in the same folder, and renames it when all of it is on the disk.

    Killed meanwhile, it leaves the file that was there before, and a `.part` that nothing takes for a checkpoint, and that a
    later run removes. The content
    goes straight to the file (Lightning's own way builds all of it in memory first). Remote paths, which fsspec handles, are
    written as Lightning does. So are folders of shards, where each process writes its own file in place: `is_whole` tells one
    that was cut short. In Python: `Trainer(plugins=[AtomicCheckpointIO()])`.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """
        Raises:
            OSError: the disk is full, or cannot be written; the file that was there before is still there.
        """
        filesystem, name = url_to_fs(str(path))
        if storage_options is not None or not isinstance(filesystem, LocalFileSystem):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        destination = Path(name)
        try:
            remove_dead(destination.parent.glob(f"{glob.escape(destination.name)}.*part"))  # which makes room
            with whole(destination) as part, part.open("wb") as file:
                save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            if os.name == "posix":  # the new name is on the disk with its folder, which Windows cannot open
                folder = os.open(destination.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except BaseException as error:
            refused = next((cause for cause in causes(error) if isinstance(cause, OSError)), None)
            if refused is None:
                raise
            raise UnwritableError(
                f"the checkpoint {destination} could not be written: {refused.strerror}; make room, or set another folder "
                f"(trainer.default_root_dir, or save_dir of trainer.logger); the checkpoints before it are kept"
            ) from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those in whose handling it came: torch's writer has one of its own, later than the disk's."""
    while error is not None:
        yield error
        error = error.__context__


def is_whole(path: Path) -> bool:
    """Returns whether a checkpoint is complete and undamaged: a file of torch.save, or a folder of shards.

    Where a folder is written over, a kill leaves files of both saves: what process 0 writes must be no younger than `meta.pt`,
    which Lightning writes last. (Other nodes' clocks may be ahead.)
    """
    try:
        check_checkpoint(path)
        if path.is_dir():
            last = (path / "meta.pt").stat().st_mtime_ns
            return all(file.stat().st_mtime_ns <= last for file in (path / ".metadata", *path.glob("__0_*")))
    except (ValueError, OSError):
        return False
    return True


def run_folder(trainer: pl.Trainer) -> str:
    """Where a run writes, as Lightning's ModelCheckpoint chooses it: its first logger's, else `trainer.default_root_dir`.

    It may be any that fsspec knows. A logger that names its runs itself (W&B) does so on the first process only.
    """
    if not trainer.loggers:
        return trainer.default_root_dir
    logger = trainer.loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)  # noqa: PTH118


def check_folders(trainer: pl.Trainer, checkpoint: str | None, resumes: bool) -> None:
    """Looks, before anything is opened or written, that this run writes into no folder of another run.

    A run may go on in the folder from which its checkpoint is. Its metrics.csv, which CSVLogger would delete, is kept there
    as metrics-N.csv. Only the first process looks, which starts the others or is awaited by them.

    Args:
        checkpoint: from which the run goes on.
        resumes: the run has looked for a checkpoint (`--resume auto`) among those of other recipes, which stay as they are.

    Raises:
        ValueError: a folder of a logger, or one of the checkpoints, has an earlier run in it.
    """
    if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
    folders = [str(saver.dirpath) for saver in savers if saver.dirpath]
    if not trainer.loggers and any(not saver.dirpath for saver in savers):
        folders.append(f"{trainer.default_root_dir}/checkpoints")
    requeued = SLURMEnvironment.detect() and any(Path(trainer.default_root_dir).glob("hpc_ckpt_*.ckpt"))  # by Lightning
    for folder in folders:
        left = found_in(folder, ("*.ckpt",))
        if left and not resumes and not requeued and not goes_on_in(trainer, checkpoint, folder):
            raise UserError(
                f"{folder} has checkpoints of an earlier run ({left}): give another folder (trainer.default_root_dir, or "
                f"dirpath of ModelCheckpoint), or go on from one of them, --ckpt_path FILE"
            )
    for folder in logged_in(trainer):
        left = found_in(folder, LOGGED)
        if left and not goes_on_in(trainer, checkpoint, folder):
            raise UserError(
                f"{folder} is of an earlier run, whose {left} is there: set another version, name or save_dir of "
                f"trainer.logger (id, of W&B), or go on from its checkpoint, --ckpt_path FILE"
            )
        files = get_filesystem(folder)
        if files.isfile(metrics := f"{folder}/metrics.csv"):
            kept = next_free(metrics)
            files.mv(metrics, kept)
            rank_zero_info(f"this run goes on in {folder}: the metrics before it are kept as {kept}")


def logged_in(trainer: pl.Trainer) -> list[str]:
    """The folders of the loggers that write to disks, as far as they are known before a logger has begun."""
    folders = [str(logger.log_dir) for logger in trainer.loggers if isinstance(logger, (CSVLogger, TensorBoardLogger))]
    known = trainer.loggers and trainer.loggers[0].version is not None
    return list(dict.fromkeys([*folders, *([run_folder(trainer)] if known else [])]))


def found_in(folder: str, patterns: Iterable[str]) -> str | None:
    """The first file or folder in a folder that has one of the patterns."""
    files = get_filesystem(folder)
    found = (path for pattern in patterns for path in files.glob(f"{glob.escape(folder)}/{pattern}"))
    return next((PurePosixPath(path).name for path in found), None)


def goes_on_in(trainer: pl.Trainer, checkpoint: str | Path | None, folder: str) -> bool:
    """Whether a run that goes on from this checkpoint does so in its folder: it lies there, or W&B's run has the same id."""
    if checkpoint is None:
        return False
    named_by_wandb = trainer.loggers and isinstance(trainer.loggers[0], WandbLogger)
    return is_in(str(checkpoint), folder) or bool(named_by_wandb and folder == run_folder(trainer))


def is_in(path: str, folder: str) -> bool:
    """Whether a path is below a folder, of local disks also through links."""
    if get_protocol(path) != "file" or get_protocol(folder) != "file":
        return path.startswith(f"{folder}/")
    return Path(path).expanduser().resolve().is_relative_to(Path(folder).expanduser().resolve())


def next_free(path: str) -> str:
    """NAME-N.ENDING, with the first number for which there is none."""
    start, ending = os.path.splitext(path)  # noqa: PTH122
    files = get_filesystem(path)
    return next(name for number in count(1) if not files.exists(name := f"{start}-{number}{ending}"))


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Checkpoints by their step, the highest first; of one step by the time of the last change. Links to nothing are left out.

    By the step, because a file that is copied is younger than what was trained after it.
    """
    return sorted((path for path in paths if path.exists()), key=age, reverse=True)


def age(path: Path) -> tuple[int, int, str]:
    """What orders checkpoints, the newest last: the step, the time, the name."""
    file = meta_of(path)
    return step_of(path), file.stat().st_mtime_ns, str(path)


def meta_of(path: Path) -> Path:
    """The file that says what a checkpoint is: itself, or of a folder of shards `meta.pt`, where that is written."""
    return path / "meta.pt" if (path / "meta.pt").is_file() else path


def step_of(path: Path) -> int:
    """The step at which a checkpoint was saved, as it says itself; of one that cannot be read, as its name says, else 0."""
    try:
        content = torch.load(meta_of(path), map_location="cpu", mmap=True, weights_only=True)
        return int(content["global_step"])
    except Exception:  # it is cut off (torch raises many kinds), or none of Lightning's, which is told when it is its turn
        named = re.search(r"step=(\d+)", path.name)
        return int(named[1]) if named else 0


class KeepRecipe(pl.Callback):
    """Writes into each checkpoint from which recipe it comes, as plain data. (One of weights only is not to be resumed.)"""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = recipe

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["recipe"] = self.recipe


def recipe_in(path: Path) -> dict[str, Any] | None:
    """Returns the recipe that a checkpoint comes from: empty where it has none, None where the checkpoint cannot be read."""
    try:
        content = read_pickle(path / "meta.pt" if path.is_dir() else path, mmap=True, verify=False)
    except (ValueError, OSError):
        return None
    recipe = content.get("recipe") if isinstance(content, dict) else None
    return recipe if isinstance(recipe, dict) else {}


def replace(trainer: pl.Trainer, earlier: Path, new: Path) -> None:
    """Removes a checkpoint in whose place a new one is, if it is complete. Only the first process does."""
    if not trainer.is_global_zero or earlier.resolve() == new.resolve() or not is_whole(new):
        return
    try:
        trainer.strategy.remove_checkpoint(str(earlier))
    except OSError as error:  # it is another's, say: no reason to end with an error
        print(f"{earlier} cannot be removed ({error.strerror}), and stays", flush=True)


class SameCheckpoint(pl.Callback):
    """Ends the run before it starts where the processes would resume from different checkpoints.

    Raises:
        ValueError: they would.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        found = [self.path] * trainer.world_size
        if trainer.world_size > 1:
            distributed.all_gather_object(found, self.path)  # so each says the same: the first to end may end the others
        for process, path in enumerate(found):
            if path != found[0]:
                raise UserError(
                    f"--resume auto: process {process} found {path}, process 0 found {found[0]}: let all nodes share the "
                    f"folders of the checkpoints, or give --ckpt_path"
                )
