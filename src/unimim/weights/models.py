"""Networks by their timm name: the one door to timm, with errors of one line."""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model_pretrained
from torch import Tensor, nn

from unimim.errors import UserError

RESERVED = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of `timm.create_model` by which it fetches weights, and writes them."""


def create_backbone(name: str, model_args: dict[str, Any], pretrained: bool = False) -> Any:
    """Makes the timm model `name` with `model_args`: an `nn.Module` with timm's attributes, which no type describes.

    Raises:
        ValueError: timm has no model of this name or no weights for it (the nearest names are listed), the model does not
            take these arguments, or its weights cannot be had, as on a machine without a network.
    """
    check_name(name)
    if taken := [key for key in RESERVED if key in model_args]:
        raise UserError(f"model_args of {name!r} cannot hold {', '.join(taken)}; a teacher's `weights` says which")
    try:
        return timm.create_model(name, pretrained=pretrained, **model_args)
    except (TypeError, AssertionError) as error:
        raise UserError(f"timm's {name!r} does not take these model_args: {error}") from error
    except RuntimeError as error:
        raise UserError(f"the weights of {name!r} do not fit these model_args: {str(error).splitlines()[0]}") from error
    except OSError as error:
        raise UserError(
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
        raise UserError(f"{name} is the class {given.__name__}, but has to be an object of it: {given.__name__}(...)")
    what = f"the class {given.__name__}" if isinstance(given, type) else f"of the type {type(given).__name__}"
    raise UserError(f"{name} is {what}, but has to be a {kind.__name__}, such as {example}")


def check_timm_model(name: str, given: object) -> None:
    """
    Raises:
        ValueError: an argument, called `name`, is no timm model: a class, perhaps, or a student that has one.
    """
    check_object(name, given, nn.Module, "what timm.create_model or unimim.load_backbone gives")
    if not hasattr(given, "pretrained_cfg"):
        raise UserError(
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
        raise UserError(
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
        raise UserError(f"{type(backbone).__name__} knows no activation checkpointing: set checkpointing to false") from error


def check_name(name: str) -> None:
    """
    Raises:
        ValueError: timm has no model of this name or no weights for it (the nearest are listed), or computes it wrongly.
    """
    architecture = name.split(".")[0]
    if ":" not in name and not timm.is_model(architecture):  # hf-hub:owner/name is another of timm's sources
        own = " (where a module of your own is taken, give its class_path)" if "." in name else ""
        raise UserError(f"timm has no model {name!r}{own}.{nearest(architecture, timm.list_models())}")
    if ":" not in name and "." in name and not is_model_pretrained(name):
        known = timm.list_models(f"{architecture}.*", pretrained=True)
        raise UserError(f"timm has no weights {name!r}.{nearest(name, known)}")
    refuse_wrong_gelu(name)


def refuse_wrong_gelu(name: str) -> None:
    """CLIP towers that were trained with QuickGELU also load, silently, under a name that computes GELU."""
    architecture = name.split(".")[0]
    config = get_pretrained_cfg(name) if ":" not in name else None
    if config is None or "_clip_" not in architecture or "_clip_quickgelu_" in architecture:
        return
    quick = f"{architecture.replace('_clip_', '_clip_quickgelu_')}.{config.tag}"
    if is_model_pretrained(quick):
        raise UserError(f"{name!r} computes GELU, but its weights were trained with QuickGELU: use {quick!r}")


def nearest(name: str, known: list[str]) -> str:
    """' Nearest: a, b, c', or nothing when no known name resembles `name`."""
    matches = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" Nearest: {', '.join(matches)}" if matches else ""
