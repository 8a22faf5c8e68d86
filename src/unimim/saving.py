"""Checkpoints that outlive an accident: a file is whole or not there, and the newest whole one is found again."""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from torch import distributed

from unimim.files import check_checkpoint, read_pickle, with_checksum


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to `NAME.part` in the same folder, and renames it when all of it is on the disk.

    Killed meanwhile, it leaves the file that was there before, and a `.part` that nothing takes for a checkpoint. The content
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
        part = destination.with_name(f"{destination.name}.part")
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                torch.save(with_checksum(checkpoint), file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(destination)
            if os.name == "posix":  # the new name is on the disk with its folder, which Windows cannot open
                folder = os.open(destination.parent, os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except BaseException as error:
            part.unlink(missing_ok=True)
            refused = next((cause for cause in causes(error) if isinstance(cause, OSError)), None)
            if refused is None:
                raise
            raise OSError(
                f"the checkpoint {destination} could not be written: {refused.strerror}; make room, or set another folder "
                f"(trainer.default_root_dir, or save_dir of trainer.logger); the checkpoints before it are kept"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Verifies a checkpoint, and reads it as data. (`weights_only` False unpickles whatever the file holds, unverified.)

        Raises:
            FileNotFoundError, ValueError: as `files.check_checkpoint`.
        """
        if weights_only is not False and isinstance(url_to_fs(str(path))[0], LocalFileSystem):
            check_checkpoint(path)
        return super().load_checkpoint(path, map_location, weights_only is not False)


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


def newest_first(paths: Iterable[Path]) -> list[Path]:
    """Checkpoints by the time of the last change, then by the step in the name. Links to nothing are left out."""
    return sorted((path for path in paths if path.exists()), key=age, reverse=True)


def age(path: Path) -> tuple[int, int, str]:
    """What orders checkpoints, the newest last."""
    file = path / "meta.pt" if (path / "meta.pt").is_file() else path
    step = re.search(r"step=(\d+)", path.name)
    return file.stat().st_mtime_ns, int(step[1]) if step else 0, str(path)


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
                raise ValueError(
                    f"--resume auto: process {process} found {path}, process 0 found {found[0]}: let all nodes share the "
                    f"folders of the checkpoints, or give --ckpt_path"
                )
