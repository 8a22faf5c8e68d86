"""From a pretraining checkpoint to the timm model that was pretrained, with every key accounted for."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unimim.backbones import create_backbone, description, load_strictly, read_file, state_dict_in
from unimim.interfaces import Student


def describe_backbone(student: Student) -> dict[str, Any]:
    """What a checkpoint has to say so that `load_backbone` needs nothing else."""
    return {
        "name": student.name,
        "model_args": student.model_args,
        "mean": student.mean.flatten().tolist(),
        "std": student.std.flatten().tolist(),
    }


def load_backbone(path: str | Path, **model_args: Any) -> Any:
    """The pretrained encoder in a checkpoint of `MaskedImageModeling`: a plain timm model.

    As it was pretrained, it has no classifier and ends in its final norm. With `num_classes=10, global_pool="avg"` it is a
    classifier: its head is new, and a norm behind the pooling (timm's `fc_norm`) is new and replaces the final norm, whose
    weights are left out. Its `pretrained_cfg` has the `mean` and `std` that it was pretrained with.

    Args:
        path: the checkpoint file.
        model_args: arguments of the timm model, beside those it was pretrained with, or instead of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no pretraining checkpoint, or its weights do not fit a model of these arguments.
    """
    checkpoint = read_file(path)
    described = description(checkpoint)
    if described is None:
        raise ValueError(f"{path} is no checkpoint of unimim's pretraining: it does not name a backbone")
    given = {"num_classes": 0, "global_pool": "", **described["model_args"], **model_args}
    backbone = create_backbone(described["name"], given)
    backbone.pretrained_cfg = {
        **backbone.pretrained_cfg,
        "mean": tuple(described["mean"]),
        "std": tuple(described["std"]),
    }
    load_strictly(backbone, with_new_parts(state_dict_in(checkpoint, path), backbone), path)
    return backbone


def with_new_parts(state_dict: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Adds what a classifier has and pretraining had not: its head, and its `fc_norm` in place of the final norm."""
    fresh = backbone.state_dict()
    kept = {key: value for key, value in state_dict.items() if key in fresh or not key.startswith("norm.")}
    return kept | {key: value for key, value in fresh.items() if key.startswith(("head.", "fc_norm."))}
