"""Weights that travel: from a checkpoint, a timm name or a published file to a timm model and back, every key accounted for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from unimim.errors import UserError
from unimim.printing import printable
from unimim.shapes import RGB
from unimim.weights.files import CHECKSUM, chosen_in, description, header_checksum, read_file, save
from unimim.weights.fitting import LoadReport, filled
from unimim.weights.layouts import of_script
from unimim.weights.models import create_backbone
from unimim.weights.written import naming, save_tensors, whole

SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".tar", ".safetensors")
SEGMENTATION = "pyramid."
"""How the keys of a backbone begin in a checkpoint of segmentation."""


def describe_backbone(student: Any) -> dict[str, Any]:
    """Returns what a checkpoint has to say of a `TimmStudent` so that `load_backbone` needs nothing else."""
    return {
        "name": student.name,
        "model_args": student.model_args,
        "mean": student.mean.flatten().tolist(),
        "std": student.std.flatten().tolist(),
    }


def describe_network(backbone: Any, given: Mapping[str, Any], mean: Tensor, std: Tensor) -> dict[str, Any] | None:
    """The same of a network that is trained for a task; None of a user's own one, which says neither its name nor arguments.

    Args:
        given: the task's hyperparameters: `backbone`, where it was given by name, and its `model_args`.
        mean, std: the statistics [3 1 1] that the task normalizes pixels by.
    """
    report: LoadReport | None = getattr(backbone, "load_report", None)
    if report is not None:
        return report.backbone
    if not isinstance(given.get("backbone"), str):
        return None
    statistics = {"mean": mean.flatten().tolist(), "std": std.flatten().tolist()}
    return {"name": given["backbone"], "model_args": given["model_args"], **statistics}


def agreeing_classes(ours: list[str], theirs: list[str]) -> list[str]:
    """The names of the classes in a checkpoint, or the data's where it has none.

    Raises:
        ValueError: the data, whose are `ours`, has other ones.
    """
    for label, (of_data, of_checkpoint) in enumerate(zip(ours, theirs, strict=False)):
        if of_data != of_checkpoint:
            raise UserError(
                f"class {label} of the data is {of_data!r}, of the checkpoint {of_checkpoint!r}: the labels would not agree"
            )
    return theirs or ours


def load_backbone(
    source: str | Path,
    backbone: str | None = None,
    strict: bool = True,
    checkpoint_key: str | None = None,
    mean: RGB | None = None,
    std: RGB | None = None,
    **model_args: Any,
) -> Any:
    """A timm model with pretrained weights; its `load_report` (`LoadReport`) says what became of every key.

    An encoder that was pretrained ends in its final norm and has no classifier. With `num_classes=10, global_pool="avg"` it
    is a classifier: its head is new, and a norm behind the pooling (timm's `fc_norm`) is new and replaces the final norm.
    A file that was fine-tuned has both already. For another `img_size` or `patch_size`, positions and patch embedding are
    resized: absolute positions bicubically, tables of relative positions at BEiT's geometrically spaced positions. A table
    that all blocks share is copied into each block of a model made with `use_rel_pos_bias=True,
    use_shared_rel_pos_bias=False`, which computes the same.

    Its `pretrained_cfg` has the `mean` and `std` that pixels are normalized by: those that are given, else those in a
    checkpoint of ours, else those of the published layout (MAE, BEiT's pretraining, CLIP ...), else timm's for the name,
    which is said: `vit_base_patch16_224.mae` has ImageNet's, `vit_base_patch16_224` has 0.5.

    Args:
        source: a checkpoint of pretraining or fine-tuning, which needs nothing else, and gives the average of the weights
            where `EMAWeightAveraging` kept one; a timm name, for its weights from the hub; or a `.pth`, `.pt`, `.bin` or
            `.safetensors` file in the layout of timm, an official code (MAE, BEiT, BEiT v2, data2vec, SimMIM, Swin, DINO,
            DINOv2, iBOT, EVA, EVA-02, OpenAI's CLIP, also its TorchScript archive), transformers or mmpretrain, under any
            prefix. Other objects beside the weights are not made.
        backbone: the timm name to build for a file that does not say it.
        strict: False warns of keys that nothing accounts for, and loads the others.
        checkpoint_key: the entry of the file to take, where it has several: `student` of DINO, `model_ema` of DeiT.
        mean: of the pixels in [0, 1], where the file does not say it.
        std: likewise.
        model_args: arguments of the timm model, beside those it was trained with, or instead of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no weights or names no backbone; a key is missing, unexpected or of another shape.
    """
    if backbone is None and is_name(source):
        published = create_backbone(str(source), {}, pretrained=True)
        described: dict[str, Any] = {"name": str(source), "model_args": {}, "mean": mean, "std": std}
        return filled(published.state_dict(), described, source, strict, model_args)
    return from_content(read_file(source), source, backbone, strict, checkpoint_key, mean, std, **model_args)


def from_content(
    content: Any,
    source: str | Path,
    backbone: str | None = None,
    strict: bool = True,
    checkpoint_key: str | None = None,
    mean: RGB | None = None,
    std: RGB | None = None,
    **model_args: Any,
) -> Any:
    """As `load_backbone`, of the content of a file."""
    state_dict, described, entry = opened(content, source, backbone, checkpoint_key)
    given = {key: list(value) for key, value in (("mean", mean), ("std", std)) if value is not None}
    return filled(state_dict, described | given, source, strict, model_args, entry)


def is_name(source: str | Path) -> bool:
    """Whether `source` is a timm name and no file, there or not."""
    path = Path(source)
    if path.is_file() or path.suffix in SUFFIXES or isinstance(source, Path):
        return False
    return ":" in source or "/" not in source


def opened(
    content: Any, source: str | Path, backbone: str | None = None, checkpoint_key: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Returns all tensors in the content of a file, the description of the backbone they are for, and where they were.

    Raises:
        ValueError: the file holds no state dict, or nobody says which backbone it is for; it is one of segmentation.
    """
    described = description(content)
    if described:
        if any(key.startswith(SEGMENTATION) for key in content["state_dict"]):
            origin = content.get("pretrained_from")
            raise UserError(
                f"{source} is a checkpoint of segmentation, whose backbone has no final norm any more: give the one of "
                f"pretraining that it began with{f', {origin}' if origin else ''}"
            )
        return content["state_dict"], described | ({"name": backbone} if backbone else {}), ""
    if backbone is None:
        raise UserError(f"{source} does not say which backbone it holds: give backbone, a timm name")
    state_dict, entry = chosen_in(content, source, checkpoint_key)
    return state_dict, {"name": backbone, "script": of_script(content)}, entry


def export(
    checkpoint: str | Path,
    destination: str | Path,
    format: Literal["timm", "safetensors"] = "timm",
    backbone: str | None = None,
    **options: Any,
) -> Path:
    """Writes the backbone in a file that `load_backbone` reads for `timm.create_model(..., checkpoint_path=destination)`.

    A checkpoint of pretraining gives the encoder, one of fine-tuning the classifier. Beside it, in `destination`.md, is a
    card: how to load it, the recipe, the data and the metrics as far as the checkpoint knows them, and what was left out.

    Args:
        checkpoint: of pretraining or fine-tuning, or a published file.
        destination: the file to write, `.pth` (or `.pt`), or `.safetensors`.
        format: "timm", a file of `torch.save`, or "safetensors".
        backbone: the timm name of what a file holds, where it does not say it.
        options: further ones of `load_backbone`.

    Returns:
        The file that was written.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: as `load_backbone`; the destination exists, or its ending is not the format's.
        OSError: the disk is full, or cannot be written.
    """
    destination, card = Path(destination), Path(f"{destination}.md")
    endings = {"timm": (".pth", ".pt"), "safetensors": (".safetensors",)}.get(format)
    if endings is None:
        raise UserError(f"export knows the formats timm and safetensors, not {format!r}")
    if destination.suffix not in endings:
        raise UserError(f"{destination}: timm reads the format {format!r} from a file that ends in {' or '.join(endings)}")
    if taken := [path for path in (destination, card) if path.exists()]:
        raise UserError(f"{taken[0]} exists and is not overwritten: remove it, or export to another name")
    content = read_file(checkpoint)
    network = from_content(content, checkpoint, backbone, **options)
    report: LoadReport = network.load_report
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    described = json.dumps(report.backbone)
    with naming(destination, "make room, or give another --output"):
        with whole(destination) as part:
            if format == "timm":
                save({"state_dict": weights, "backbone": report.backbone}, part)
            else:
                metadata = {"format": "pt", "backbone": described, CHECKSUM: header_checksum(weights, described)}
                save_tensors(weights, part, metadata)
        card.write_text(model_card(content, report, destination))
    return destination


def model_card(content: dict[str, Any], report: LoadReport, destination: Path) -> str:
    """What a person needs to use exported weights, in Markdown."""
    name, arguments = report.backbone["name"], report.backbone["model_args"]
    call = "".join(f", {key}={value!r}" for key, value in arguments.items())
    statistics = (f"{key} = {tuple(round(number, 4) for number in report.backbone[key])}" for key in ("mean", "std"))
    recipe = {key: value for key, value in content.get("hyper_parameters", {}).items() if not key.startswith("_")}
    data = {key: value for key, value in content.get("datamodule_hyper_parameters", {}).items() if not key.startswith("_")}
    data |= {"root": Path(str(data["root"])).name} if "root" in data else {}  # the rest of the path is nobody's business
    training = {key: content[key] for key in ("epoch", "global_step") if key in content}
    metrics = {name: f"{value:.4g}" for name, value in content.get("metrics", {}).items()}
    sections = {
        "Recipe": {letter: recipe[letter] for letter in sorted(recipe, key=lambda key: not isinstance(recipe[key], dict))},
        "Data": data,
        "Training": training,
        "Metrics": metrics,
        "Left out": {keys: reason for reason, keys in report.grouped("dropped").items()},
    }
    text = f"""# {destination.stem}

{name}, exported by unimim from {Path(report.source).name}.

```python
import timm

model = timm.create_model({name!r}, checkpoint_path={destination.name!r}{call})
```

Pixels in [0, 1] are normalized by {", ".join(statistics)}.
"""
    for title, entries in sections.items():
        lines = [f"- {printable(key)}: {brief(value)}" for key, value in entries.items()] or [
            "Nothing." if title == "Left out" else "Not in the checkpoint."
        ]
        text += f"\n## {title}\n\n" + "\n".join(lines) + "\n"
    return text


def brief(value: Any) -> str:
    """A class of a saved configuration as a call; anything else as it is."""
    if not isinstance(value, dict) or "class_path" not in value:
        return printable(value)
    arguments = ", ".join(f"{key}={brief(item)}" for key, item in (value.get("init_args") or {}).items())
    return printable(f"{value['class_path']}({arguments})")
