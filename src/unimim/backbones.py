"""Networks by their timm name, and their weights from a file: the one door to timm, with errors of one line."""

import argparse
import difflib
import json
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model_pretrained
from torch import Tensor, nn

RESERVED = ("pretrained", "checkpoint_path")
ENCODERS = ("student.backbone.", "backbone.")
"""Where a checkpoint of pretraining, and one of fine-tuning, has the encoder."""


def create_backbone(name: str, model_args: dict[str, Any], pretrained: bool = False) -> Any:
    """Makes the timm model `name` with `model_args`: an `nn.Module` with timm's attributes, which no type describes.

    Raises:
        ValueError: timm has no model of this name or no weights for it (the nearest names are listed), the model does not
            take these arguments, or its weights cannot be had, as on a machine without a network.
    """
    check_name(name)
    if taken := [key for key in RESERVED if key in model_args]:
        raise ValueError(f"model_args of {name!r} cannot hold {', '.join(taken)}; a teacher's `weights` says which")
    try:
        return timm.create_model(name, pretrained=pretrained, **model_args)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"timm's {name!r} does not take these model_args: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"the weights of {name!r} do not fit these model_args: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise ValueError(
            f"the weights of {name!r} cannot be had from the hub ({type(error).__name__}): take them from a file, "
            f"load_backbone(PATH, backbone={name!r}), or for a teacher weights=PATH (--model.teacher.weights PATH), or try the "
            f"recipe with weights='random' (--random_weights)"
        ) from error


@contextmanager
def own_seed() -> Iterator[None]:
    """Within it, random weights do not depend on the run's seed: the same in every process, and in a run that goes on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def check_object(name: str, given: object, kind: type, example: str) -> None:
    """
    Raises:
        ValueError: an argument, called `name`, is no object of its kind: a class, perhaps, that was not called.
    """
    if isinstance(given, kind):
        return
    if isinstance(given, type) and issubclass(given, kind):
        raise ValueError(f"{name} is the class {given.__name__}, but has to be an object of it: {given.__name__}(...)")
    what = f"the class {given.__name__}" if isinstance(given, type) else f"of the type {type(given).__name__}"
    raise ValueError(f"{name} is {what}, but has to be a {kind.__name__}, such as {example}")


def check_timm_model(name: str, given: object) -> None:
    """
    Raises:
        ValueError: an argument, called `name`, is no timm model: a class, perhaps, or a student that has one.
    """
    check_object(name, given, nn.Module, "what timm.create_model or unimim.load_backbone gives")
    if not hasattr(given, "pretrained_cfg"):
        raise ValueError(
            f"{name} is a {type(given).__name__}, which is no timm model: it has no pretrained_cfg, which says how to "
            f"normalize pixels (of a student, give its backbone)"
        )


def uncompiled(backbone: Any) -> Any:
    """A network as it is; of what `torch.compile` made of one, the network itself, compiled in place.

    So its class and its names stay timm's. Its call is compiled as before; other methods, as `forward_features`, never were.
    """
    if "_orig_mod" not in getattr(backbone, "_modules", {}):
        return backbone
    network = backbone._orig_mod
    network._compiled_call_impl = backbone.dynamo_ctx(network._call_impl)
    return network


def timm_model(backbone: Any) -> Any:
    """The timm model in a wrapper such as peft's, for it has timm's class and names; what has none within is given back."""
    return next((part for part in backbone.modules() if is_timms(type(part)) and "pretrained_cfg" in vars(part)), backbone)


def is_timms(kind: type) -> bool:
    """Whether a class is a model of timm, or a subclass of one."""
    return any(parent.__module__.startswith("timm.models.") for parent in kind.__mro__)


def check_image_size(backbone: Any, images: Tensor) -> None:
    """
    Raises:
        ValueError: the images [b 3 H W] are not of the size that a timm model with fixed positions was built for.
    """
    patch_embed = getattr(timm_model(backbone), "patch_embed", None)
    built = getattr(patch_embed, "img_size", None)
    if built is not None and getattr(patch_embed, "strict_img_size", True) and tuple(images.shape[-2:]) != tuple(built):
        given, wanted = ("x".join(map(str, size)) for size in (images.shape[-2:], built))
        raise ValueError(
            f"the images are {given} pixels, but the backbone was built for {wanted}: set data.image_size, or img_size in "
            f"model_args"
        )


def checkpoint_activations(backbone: Any) -> None:
    """Lets a timm model keep only the input of each block for the backward pass, which computes the rest again.

    Raises:
        ValueError: it knows no such thing.
    """
    try:
        backbone.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise ValueError(f"{type(backbone).__name__} knows no activation checkpointing: set checkpointing to false") from error


def check_name(name: str) -> None:
    """
    Raises:
        ValueError: timm has no model of this name or no weights for it (the nearest are listed), or computes it wrongly.
    """
    architecture = name.split(".")[0]
    if ":" not in name and not timm.is_model(architecture):  # hf-hub:owner/name is another of timm's sources
        own = " (where a module of your own is taken, give its class_path)" if "." in name else ""
        raise ValueError(f"timm has no model {name!r}{own}.{nearest(architecture, timm.list_models())}")
    if ":" not in name and "." in name and not is_model_pretrained(name):
        known = timm.list_models(f"{architecture}.*", pretrained=True)
        raise ValueError(f"timm has no weights {name!r}.{nearest(name, known)}")
    refuse_wrong_gelu(name)


def refuse_wrong_gelu(name: str) -> None:
    """CLIP towers that were trained with QuickGELU also load, silently, under a name that computes GELU."""
    architecture = name.split(".")[0]
    config = get_pretrained_cfg(name) if ":" not in name else None
    if config is None or "_clip_" not in architecture or "_clip_quickgelu_" in architecture:
        return
    quick = f"{architecture.replace('_clip_', '_clip_quickgelu_')}.{config.tag}"
    if is_model_pretrained(quick):
        raise ValueError(f"{name!r} computes GELU, but its weights were trained with QuickGELU: use {quick!r}")


def nearest(name: str, known: list[str]) -> str:
    """' Nearest: a, b, c', or nothing when no known name resembles `name`."""
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Nearest: {', '.join(matches)}" if matches else ""


def is_in_shards(path: str | Path) -> bool:
    """Whether it is a checkpoint of `ModelParallelStrategy`: a folder with a file of each process."""
    return (Path(path) / "meta.pt").is_file()


def read_file(path: str | Path) -> Any:
    """What a `.safetensors` file or a file of `torch.save` holds; its pickle may hold nothing but tensors and plain data.

    An `argparse.Namespace` counts as plain data: the official codes keep their arguments beside the weights.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, of another kind, a folder of shards, or a pickle that wants to run code.
    """
    path = Path(path)
    if is_in_shards(path):
        raise ValueError(
            f"{path} is a folder of shards: make it one file with python -m lightning_fabric.utilities.consolidate_checkpoint "
            f"{path} --output_file FILE"
        )
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} to read weights from")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise ValueError(f"{path} holds no weights, it is empty")
    if path.suffix != ".safetensors" and not start.startswith((b"PK", b"\x80")):
        raise ValueError(f"{path} holds no weights, it starts with {start[:24]!r} (a web page, or a pointer of Git LFS?)")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, "pt") as tensors:
                described = (tensors.metadata() or {}).get("backbone")  # as `checkpoint.export` writes it
                weights = {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118 (it is no dict)
            return {"state_dict": weights, "backbone": json.loads(described)} if described else weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({wanted[1]}, which could run code)" if wanted else ""
        raise ValueError(
            f"{path} is refused: its pickle holds more than tensors and plain data{what}; whoever trusts it can save its "
            f"state_dict() alone"
        ) from error
    except Exception as error:  # each format has its own exceptions for a damaged file: all mean the same to the user
        raise ValueError(f"{path} cannot be read as weights, it may be truncated ({type(error).__name__})") from error


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """`state_dict_in` the content of a file.

    Raises:
        FileNotFoundError, ValueError: as `read_file` and `state_dict_in`.
    """
    return state_dict_in(read_file(path), path)


def state_dict_in(content: Any, path: str | Path) -> dict[str, Tensor]:
    """The tensors in the content of a file of weights; a dict that wraps them in `state_dict`, `model` or `module` is opened.

    Of a checkpoint of ours it is the encoder's.

    Raises:
        ValueError: `path` holds something else than a state dict.
    """
    if description(content):
        whole = content["state_dict"]
        encoder = next((prefix for prefix in ENCODERS if any(key.startswith(prefix) for key in whole)), "")
        content = {key.removeprefix(encoder): value for key, value in whole.items() if key.startswith(encoder)}
    for key in ("state_dict", "model", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
        raise ValueError(f"{path} holds no state dict (a dict of names to tensors)")
    return content


def description(content: Any) -> dict[str, Any] | None:
    """What a checkpoint of ours, or a file exported from one, says of its backbone; None of other files.

    Keys: name, model_args, mean, std.
    """
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        return None
    found = content.get("backbone")
    return found if isinstance(found, dict) and {"name", "model_args", "mean", "std"} <= set(found) else None


def load_strictly(module: nn.Module, state_dict: dict[str, Tensor], source: str | Path) -> None:
    """Loads every key or none.

    Raises:
        ValueError: keys are missing, unexpected, or of another shape; the first few are listed.
    """
    if found := misfits(module, state_dict):
        raise ValueError(f"{source} does not fit {type(module).__name__}, nothing was loaded: {found}")
    module.load_state_dict(state_dict)


def misfits(module: nn.Module, state_dict: dict[str, Tensor], strict: bool = True) -> str:
    """The first keys that do not fit, in one line; empty where all do.

    Args:
        strict: whether keys may neither be missing nor unexpected; of another shape they may never be.
    """
    expected = module.state_dict()
    return listed(
        of_another_shape=[
            f"{key} {tuple(state_dict[key].shape)} for {tuple(expected[key].shape)}"
            for key in expected
            if key in state_dict and state_dict[key].shape != expected[key].shape
        ],
        missing=[key for key in expected if strict and key not in state_dict],
        unexpected=[key for key in state_dict if strict and key not in expected],
    )


def listed(**problems: list[str]) -> str:
    """'2 missing (a, b); 1 unexpected (c)', the first few of each kind, or nothing."""
    return "; ".join(f"{len(keys)} {kind.replace('_', ' ')} ({', '.join(keys[:3])})" for kind, keys in problems.items() if keys)
