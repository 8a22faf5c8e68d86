"""The base of the tasks: what a checkpoint says is data, checked before anything is made of it."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytorch_lightning as pl
import torch
from fsspec.utils import get_protocol  # type: ignore[import-untyped]
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

import unimim
from unimim.data.batches import checked
from unimim.errors import UserError
from unimim.lightning import saved_device, task_from, trainer_of
from unimim.training.faults import SkipNonFinite, guarded
from unimim.training.launch import check_callbacks, check_processes, check_resumed
from unimim.training.resume import exact_resume
from unimim.training.waiting import may_wait
from unimim.weights.files import (
    CHANGED,
    check_checkpoint,
    check_description,
    check_plain,
    damaged,
    is_changed,
    is_in_shards,
    read_pickle,
    refusal,
)

NETWORKS = ("backbone", "network")
"""Arguments that name a network of timm."""
SAVED = ("best_model_path", "kth_best_model_path", "last_model_path", "best_k_models")
"""What the state of a ModelCheckpoint says of the files that it saved, of which it removes the older ones."""


class Task(pl.LightningModule):
    """A LightningModule that reads checkpoints of strangers safely: pretraining, fine-tuning, segmentation and probes are ones.

    A subclass that overrides `setup`, `configure_callbacks`, `on_save_checkpoint` or `on_load_checkpoint` calls `super()`'s.
    """

    guard: SkipNonFinite | None = None

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Makes a task of a checkpoint.

        The classes that its hyperparameters name are those of unimim and torch.nn only. Whatever else a task was made of has to
        be given: `MaskedImageModeling.load_from_checkpoint(PATH, teacher=MyTarget())`.

        Args:
            checkpoint_path: a file, or a URL that fsspec knows.
            map_location: where its tensors go, as in torch.load.
            hparams_file: not taken; give arguments by name.
            strict: whether every key of the weights has to fit.
            weights_only: False unpickles whatever the file holds, which runs code of whoever wrote it.
            kwargs: arguments of the task, in place of those in the checkpoint.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, is a pickle of more than data, or names a class that it may not name.
        """
        if hparams_file is not None:
            raise UserError(f"hparams_file {hparams_file} is not read: give the arguments by name, {cls.__name__}'s")
        if weights_only is False:
            return super().load_from_checkpoint(checkpoint_path, map_location, None, strict, False, **kwargs)
        where = map_location or saved_device
        if "://" in str(checkpoint_path):
            with fsspec.open(str(checkpoint_path)) as file:
                content = torch.load(file, where, weights_only=True)
            if is_changed(content):
                raise UserError(damaged(checkpoint_path, CHANGED))
        else:
            content = read_pickle(Path(checkpoint_path), map_location=where)
        check_description(content, checkpoint_path)
        said = content.get("hyper_parameters", {}) if isinstance(content, dict) else None
        if not isinstance(said, dict) or not isinstance(content.get("state_dict"), dict):
            raise UserError(f"{checkpoint_path} is no checkpoint of a training: it has no hyper_parameters and no state_dict")
        if said.get("checkpoint") is not None:  # ours name none, so that they need no other file
            raise UserError(refusal(f"{checkpoint_path}: hyper_parameters.checkpoint", "another file"))
        kept = {str(key): value for key, value in said.items() if key not in ("checkpoint", *kwargs)}
        made_of = {
            key: made(value, f"{checkpoint_path}: hyper_parameters.{key}", key)
            for key, value in kept.items()
            if not key.startswith("_")  # Lightning's own, by which it would make the classes
        }
        state = {key: value for key, value in content.items() if key not in ("hyper_parameters", "hparams", "module_arguments")}
        task = task_from(cls, state, strict, **{**made_of, **kwargs})
        device = next((value.device for value in state["state_dict"].values() if isinstance(value, torch.Tensor)), None)
        return task if device is None else task.to(device)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Adds the guard against updates that are not finite, what makes a resumed run exact, and the look at the first batch.

        A subclass with callbacks of its own adds them to these: `[*super().configure_callbacks(), ...]`; else it has none.
        """
        check_callbacks(self.trainer)
        guard = [] if self.guard is None else guarded(self.trainer, self.guard)
        return [*guard, *exact_resume(self.trainer), *checked(self.trainer)]

    def setup(self, stage: str) -> None:
        """Checks the processes, and lets the Trainer's strategy verify a checkpoint before it reads it, whichever it is.

        Raises:
            ValueError: as `check_processes`.
        """
        check_processes(self.trainer)
        strategy: Any = self.trainer.strategy
        if not isinstance(strategy.load_checkpoint, functools.partial):
            strategy.load_checkpoint = functools.partial(verified, strategy.load_checkpoint)

    def logged(self, losses: Tensor | dict[str, Tensor]) -> Tensor:
        """Returns the loss of a step, the sum where it is of several terms, and logs it as `train/loss`.

        Several terms are also logged one by one, as `train/loss/NAME`. What is logged is the mean over all processes, in the
        steps that may wait for the device (`waiting.may_wait`) and in the last of an epoch. In between, the progress bar shows
        the last logged loss. (`self.log(..., sync_dist=True)` would have a barrier and a collective in every step, and the bar
        would wait for the device in every step.)
        """
        terms = losses if isinstance(losses, dict) else {"": losses}
        first, *others = terms.values()
        loss = sum(others, start=first)
        trainer = trainer_of(self)
        if trainer is None:  # Lightning says that there is nothing to log to
            self.log("train/loss", loss)
        elif may_wait(trainer) or trainer.is_last_batch:
            shown = torch.stack([part.detach().float() for part in (loss, *(terms.values() if others else ()))])
            mean: Any = trainer.strategy.reduce(shown, reduce_op="mean")
            whole, *parts = mean.cpu()
            self.log("train/loss", whole, prog_bar=True)
            self.log_dict({f"train/loss/{name}": part for name, part in zip(terms, parts, strict=False)})
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the last metrics; refuses to save what is not finite, where the task has a guard."""
        if self.guard is not None:
            self.guard.check_saved(self.trainer, checkpoint)
        checkpoint["metrics"] = {name: float(value) for name, value in self.trainer.callback_metrics.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes out of the state of callbacks the files that ModelCheckpoint would remove, and that are not in its folder.

        A backbone that was compiled is loaded by its own names.

        Raises:
            ValueError: as `check_resumed`.
        """
        weights = checkpoint.get("state_dict", {})  # in shards, they are elsewhere
        for name in [name for name in weights if "_orig_mod." in name]:
            weights[name.replace("_orig_mod.", "")] = weights.pop(name)
        trainer = trainer_of(self)
        savers = [] if trainer is None else [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
        folders = [str(saver.dirpath) for saver in savers if saver.dirpath]
        for state in checkpoint.get("callbacks", {}).values():
            for key in SAVED if isinstance(state, dict) else ():
                if key == "best_k_models" and key in state:
                    state[key] = {path: score for path, score in state[key].items() if lies_in(path, folders)}
                elif key in state and not lies_in(state[key], folders):
                    state[key] = ""
        check_resumed(self, checkpoint)


def verified(load_checkpoint: Callable[..., Any], path: str | Path, weights_only: bool | None = None) -> Any:
    """Reads a checkpoint as a strategy does, after it was verified. (With `weights_only` False, whatever it holds.)

    Raises:
        FileNotFoundError, ValueError: as `files.check_checkpoint`.
    """
    if weights_only is not False and (Path(path).is_file() or is_in_shards(path)):
        check_checkpoint(path)
    return load_checkpoint(path, weights_only=weights_only is not False)


def lies_in(path: Any, folders: list[str]) -> bool:
    """Returns whether a path lies in one of the folders, on the same file system, links and `..` followed."""
    return isinstance(path, str) and any(
        Path(path).resolve().is_relative_to(Path(folder).resolve())
        if get_protocol(folder) == "file"
        else path.startswith(f"{folder}/") and ".." not in path.split("/")
        for folder in folders
        if get_protocol(path) == get_protocol(folder)
    )


def made(value: Any, where: str, key: str = "") -> Any:
    """Makes what a value of hyperparameters stands for: an object of the class that it names, or itself.

    Args:
        where: the file and the key, for the message.
        key: the last part of `where`; `head` is a factory, and gives the class.

    Raises:
        ValueError: it names a class that is neither of unimim nor of torch.nn, or a network that is none of timm's own.
    """
    if key == "model_args":
        check_plain(value, where)
    if key in NETWORKS and isinstance(value, str) and not re.fullmatch(r"[\w.]+", value):
        raise UserError(f"{where} is refused: it is {value!r}, where only a name of timm's own may stand")
    if isinstance(value, (list, tuple)):
        return type(value)(made(part, f"{where}[{place}]") for place, part in enumerate(value))
    if not isinstance(value, dict):
        return value
    if "class_path" not in value:
        return {name: made(part, f"{where}.{name}", str(name)) for name, part in value.items()}
    chosen = class_of(value["class_path"], where, key)
    arguments = {name: made(part, f"{where}.{name}", str(name)) for name, part in (value.get("init_args") or {}).items()}
    return functools.partial(chosen, **arguments) if key == "head" else chosen(**arguments)


def class_of(class_path: Any, where: str, key: str) -> type[nn.Module]:
    """Returns the class at a path of unimim's or torch.nn's; nothing is imported by the name.

    Raises:
        ValueError: it is no module of either.
    """
    name = str(class_path).rpartition(".")[2]
    known = [getattr(unimim, name)] if name in unimim.__all__ else []
    for found in (*known, getattr(nn, name, None)):
        if isinstance(found, type) and issubclass(found, nn.Module) and not issubclass(found, pl.LightningModule):
            package = "unimim" if found.__module__.startswith("unimim.") else "torch.nn"
            if class_path == name or str(class_path).startswith(f"{package}."):  # files of ours had other modules
                return found
    raise UserError(
        f"{where} is refused: it is the class {class_path!r}, and a file may name those of unimim and torch.nn only: give "
        f"it by hand, load_from_checkpoint(PATH, {key or 'NAME'}=...)"
    )
