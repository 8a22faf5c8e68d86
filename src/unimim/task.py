"""The base of the tasks: what a checkpoint says is data, checked before anything is made of it."""

import functools
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from lightning_fabric.utilities.cloud_io import _load
from torch import nn

import unimim
from unimim.files import check_description, check_plain, read_pickle, refusal

NETWORKS = ("backbone", "network")
"""Arguments that name a network of timm."""


class Task(pl.LightningModule):
    """A LightningModule that reads checkpoints of strangers safely: pretraining, fine-tuning, segmentation and probes are ones.

    A subclass that overrides `on_load_checkpoint` calls `super()`'s.
    """

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
            raise ValueError(f"hparams_file {hparams_file} is not read: give the arguments by name, {cls.__name__}'s")
        if weights_only is not False:
            weights_only = True  # Lightning's own default unpickles what comes from a URL
            if "://" in str(checkpoint_path):
                content = _load(checkpoint_path, map_location="cpu", weights_only=True)
                check_description(content, checkpoint_path)
            else:
                content = read_pickle(Path(checkpoint_path), mmap=True)
                check_description(content, checkpoint_path)
            said = content.get("hyper_parameters", {}) if isinstance(content, dict) else {}
            if said.get("checkpoint") is not None:  # ours name none, so that they need no other file
                raise ValueError(refusal(f"{checkpoint_path}: hyper_parameters.checkpoint", "another file"))
            kept = {key: value for key, value in said.items() if key not in ("checkpoint", *kwargs) and str(key)[0] != "_"}
            kwargs |= {key: made(value, f"{checkpoint_path}: hyper_parameters.{key}", key) for key, value in kept.items()}
            kwargs["_instantiator"] = None  # made here, and not by what the file names
        return super().load_from_checkpoint(checkpoint_path, map_location, None, strict, weights_only, **kwargs)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks the paths in the state of ModelCheckpoint, which removes the files that it finds there when it saves new ones.

        Raises:
            ValueError: a path leaves its folder by `..`, or is on another file system.
        """
        for name, state in checkpoint.get("callbacks", {}).items():
            if not isinstance(state, dict) or "dirpath" not in state:
                continue
            paths = [state.get(key) for key in ("best_model_path", "kth_best_model_path", "last_model_path")]
            for path in (*paths, *state.get("best_k_models", {})):
                folder, path = str(state["dirpath"] or ""), str(path or "")
                elsewhere = "://" in path and not path.startswith(f"{folder}/")
                if elsewhere or os.pardir in path.replace("\\", "/").split("/"):
                    raise ValueError(
                        f"the checkpoint is refused: {name.partition('{')[0]} names {path!r}, outside of {folder!r}"
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
    if key in NETWORKS and isinstance(value, str) and ":" in value:
        raise ValueError(f"{where} is refused: it is {value!r}, where only a name of timm's own may stand")
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
            if class_path in (name, f"{package}.{name}", f"{found.__module__}.{name}"):
                return found
    raise ValueError(
        f"{where} is refused: it is the class {class_path!r}, and a file may name those of unimim and torch.nn only: give "
        f"it by hand, load_from_checkpoint(PATH, {key or 'NAME'}=...)"
    )
