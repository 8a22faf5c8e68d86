"""Weights that travel: from a checkpoint, a timm name or a published file to a timm model and back, every key accounted for."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from timm.layers import resample_abs_pos_embed, resample_patch_embed, resize_rel_pos_bias_table
from torch import Tensor

from unimim.backbones import create_backbone
from unimim.files import CHECKSUM, description, header_checksum, listed, read_file, save, state_dict_in
from unimim.interfaces import Grid, Student
from unimim.printing import printable
from unimim.written import naming, save_tensors, whole

SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".tar", ".safetensors")
SEGMENTATION = "pyramid."
"""How the keys of a backbone begin in a checkpoint of segmentation."""
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
EARLY_SWIN = "layers.0.downsample.norm.weight"
WRAPPERS = r"^((module|_orig_mod|model|student|backbone|encoder)\.)+"
NEEDLESS = {
    r"mask_token|masked_embed": "stands for hidden patches, in pretraining only",
    r"(lm_head|decoder\w*)(\..*)?": "the head of pretraining",
    r"cls_pt_\w+\..*": "BEiT v2's blocks for its CLS token, in pretraining only",
    r"teacher\..*": "the teacher",
    r"(normalization|masking|loss)\..*": "another part of the training",
    r"mean|std": "pixel statistics, which pretrained_cfg has",
    r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask)": "computed, not learned",
}
"""Keys that no encoder has, and why they are left out; a model that has the key gets it all the same."""
FILE_KINDS = ("loaded", "resized", "renamed", "dropped", "unexpected", "misshapen")


@dataclass(frozen=True)
class LoadReport:
    """What became of every key.

    Each key of the file is in one of `loaded`, `resized`, `renamed`, `dropped`, `unexpected` and `misshapen`; each key of
    the model that the file did not fill is in `new` or `missing`. All are dicts of the key to what was done, or why; the
    last three are empty unless it was loaded with `strict=False`.

    Attributes:
        source: the file, or the timm name.
        prefix: what stands before the encoder's keys in the file.
        backbone: what was built, as a checkpoint describes it: timm name, model_args, mean and std.
        loaded: as they are.
        resized: positions and patch embeddings of another size.
        renamed: under another key in the model, or under several.
        dropped: the model has no use for them.
        new: the file cannot have them, such as a new classifier.
        unexpected: of the file, and nothing accounts for it.
        misshapen: of another shape than the model's.
        missing: of the model, and not in the file.
    """

    source: str
    prefix: str
    backbone: dict[str, Any]
    loaded: dict[str, str]
    resized: dict[str, str]
    renamed: dict[str, str]
    dropped: dict[str, str]
    new: dict[str, str]
    unexpected: dict[str, str]
    misshapen: dict[str, str]
    missing: dict[str, str]

    @property
    def problems(self) -> str:
        """The first few keys that nothing accounts for, in one line; empty when all is well."""
        misshapen = [f"{key} {shapes}" for key, shapes in self.misshapen.items()]
        return listed(missing=list(self.missing), unexpected=list(self.unexpected), of_another_shape=misshapen)

    def __str__(self) -> str:
        kinds = {kind: getattr(self, kind) for kind in ("loaded", "resized", "renamed", "dropped", "new")}
        counts = ", ".join(f"{len(notes)} {kind}" for kind, notes in kinds.items())
        mean, std = (", ".join(f"{number:.4g}" for number in self.backbone[key]) for key in ("mean", "std"))
        lines = [f"{self.source} -> {self.backbone['name']}: {counts}; it normalizes pixels by mean {mean}, std {std}"]
        lines += [f"  {kind}: {keys}: {note}" for kind in kinds for note, keys in self.grouped(kind).items() if note]
        return "\n".join(lines)

    def grouped(self, kind: str) -> dict[str, str]:
        """'the first key and 3 more' for each note of a kind."""
        notes = getattr(self, kind)
        same = {note: [key for key in notes if notes[key] == note] for note in notes.values()}
        return {note: f"{keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}" for note, keys in same.items()}


def describe_backbone(student: Student) -> dict[str, Any]:
    """What a checkpoint has to say so that `load_backbone` needs nothing else."""
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
            raise ValueError(
                f"class {label} of the data is {of_data!r}, of the checkpoint {of_checkpoint!r}: the labels would not agree"
            )
    return theirs or ours


def load_backbone(source: str | Path, backbone: str | None = None, strict: bool = True, **model_args: Any) -> Any:
    """A timm model with pretrained weights; its `load_report` (`LoadReport`) says what became of every key.

    An encoder that was pretrained ends in its final norm and has no classifier. With `num_classes=10, global_pool="avg"` it
    is a classifier: its head is new, and a norm behind the pooling (timm's `fc_norm`) is new and replaces the final norm.
    A file that was fine-tuned has both already. For another `img_size` or `patch_size`, positions and patch embedding are
    resized: absolute positions bicubically, tables of relative positions at BEiT's geometrically spaced positions. A table
    that all blocks share is copied into each block of a model made with `use_rel_pos_bias=True,
    use_shared_rel_pos_bias=False`, which computes the same.

    Its `pretrained_cfg` has the `mean` and `std` that pixels are normalized by: those in a checkpoint of ours, else timm's
    for the name. Mind the tag: `vit_base_patch16_224.mae` has ImageNet's, `vit_base_patch16_224` has 0.5.

    Args:
        source: a checkpoint of pretraining or fine-tuning, which needs nothing else, and gives the average of the weights
            where `EMAWeightAveraging` kept one; a timm name, for its weights from the hub; or a `.pth`, `.pt` or
            `.safetensors` file with the keys of timm, MAE, BEiT, BEiT v2 or Swin, under any prefix.
        backbone: the timm name to build for a file that does not say it.
        strict: False warns of keys that nothing accounts for, and loads the others.
        model_args: arguments of the timm model, beside those it was trained with, or instead of them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no weights or names no backbone; a key is missing, unexpected or of another shape.
    """
    if backbone is None and is_name(source):
        published = create_backbone(str(source), {}, pretrained=True)
        return filled(published.state_dict(), {"name": str(source), "model_args": {}}, source, strict, model_args)
    state_dict, described = opened(read_file(source), source, backbone)
    return filled(state_dict, described, source, strict, model_args)


def is_name(source: str | Path) -> bool:
    """Whether `source` is a timm name and no file, there or not."""
    path = Path(source)
    if path.is_file() or path.suffix in SUFFIXES or isinstance(source, Path):
        return False
    return ":" in source or "/" not in source


def opened(content: Any, source: str | Path, backbone: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors in the content of a file, and the description of the backbone they are for.

    Raises:
        ValueError: the file holds no state dict, or nobody says which backbone it is for; it is one of segmentation.
    """
    if description(content):
        if any(key.startswith(SEGMENTATION) for key in content["state_dict"]):
            origin = content.get("pretrained_from")
            raise ValueError(
                f"{source} is a checkpoint of segmentation, whose backbone has no final norm any more: give the one of "
                f"pretraining that it began with{f', {origin}' if origin else ''}"
            )
        return content["state_dict"], content["backbone"] | ({"name": backbone} if backbone else {})
    if backbone is None:
        raise ValueError(f"{source} does not say which backbone it holds: give backbone=, a timm name")
    return state_dict_in(content, source), {"name": backbone}


def filled(
    state_dict: dict[str, Tensor], described: dict[str, Any], source: str | Path, strict: bool, model_args: dict[str, Any]
) -> Any:
    """Builds the backbone that is `described`, with `model_args`, and fills it from a state dict.

    Raises:
        ValueError: as `load_backbone`.
    """
    pooled = any(key.endswith("fc_norm.weight") and key.replace("fc_norm", "norm") not in state_dict for key in state_dict)
    default = {"num_classes": 0, "global_pool": "avg" if pooled else ""}
    given = {**default, **described.get("model_args", {}), **model_args}
    backbone = create_backbone(described["name"], given)
    statistics = {key: tuple(described.get(key, backbone.pretrained_cfg[key])) for key in ("mean", "std")}
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, **statistics}
    prefix = common_prefix(state_dict, backbone.state_dict())
    weights, kinds = account(state_dict, prefix, backbone, described)
    built = {"name": described["name"], "model_args": given, **{key: list(value) for key, value in statistics.items()}}
    report = LoadReport(str(source), prefix, built, **kinds)
    if report.problems and strict:
        raise ValueError(f"{source} does not fit {described['name']}, nothing was loaded: {report.problems}")
    if report.problems:
        rank_zero_warn(f"{source} does not fit {described['name']}, the rest was loaded: {report.problems}")
    backbone.load_state_dict(weights, strict=False)
    backbone.load_report = report
    rank_zero_info("\n".join(map(printable, str(report).split("\n"))))
    return backbone


def account(
    state_dict: dict[str, Tensor], prefix: str, backbone: Any, described: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, dict[str, str]]]:
    """The weights for the model, and the kinds of `LoadReport` with every key of the file and the model in them."""
    expected = backbone.state_dict()
    encoder = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
    grid = trained_grid(described, encoder, backbone)
    heads = head_names(backbone)
    weights: dict[str, Tensor] = {}
    faulty: set[str] = set()
    kinds: dict[str, dict[str, str]] = {kind: {} for kind in FILE_KINDS}
    for key, value in state_dict.items():
        inside = key.startswith(prefix)
        name = key.removeprefix(prefix) if inside else re.sub(WRAPPERS, "", key)
        found = converted(name, encoder, expected) if inside else {}
        fitted = {target: resize(target, tensor, expected[target], backbone, grid) for target, tensor in found.items()}
        wrong = [expected[target] for target, (tensor, _) in fitted.items() if tensor.shape != expected[target].shape]
        if not found or (wrong and name.startswith(heads) and value.shape[1:] == wrong[0].shape[1:]):
            note = why_needless(name, value, wrong, expected, heads, inside)
            if not note and not inside and "model_args" in described:  # of our checkpoints the prefix is known to be right
                note = "a part of one's own training, beside the encoder"
            kind = "dropped" if note else "unexpected"
        elif wrong:
            kind, note = "misshapen", f"{tuple(value.shape)} for {tuple(wrong[0].shape)}"
            faulty |= found.keys()
        else:
            done = next((note for _, note in fitted.values()), "")
            becomes = "" if name in found else f"into {len(found)} blocks" if len(found) > 2 else f"into {' and '.join(found)}"
            kind = "resized" if done else "renamed" if becomes else "loaded"
            note = ", ".join(filter(None, (done, becomes)))
            weights |= {target: tensor for target, (tensor, _) in fitted.items()}
        kinds[kind][key] = note
    new = new_parts(expected, weights, encoder, heads)
    missing = dict.fromkeys((key for key in expected if key not in {*weights, *new, *faulty}), "")
    return weights, {**kinds, "new": new, "missing": missing}


def common_prefix(names: Iterable[str], expected: Iterable[str]) -> str:
    """The prefix under which most of the expected names are found; that of a student rather than its teacher's."""
    wanted, hits = set(expected), Counter[str]()
    for name in names:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        hits.update(name[:start] for start in starts if name[start:] in wanted)
    return max(hits, key=lambda prefix: (hits[prefix], "teacher" not in prefix), default="")


def converted(name: str, encoder: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a tensor of the file is in the model, by the model's names; nothing if it is nothing there."""
    stem, _, last = name.rpartition(".")
    value = encoder[name]
    found = {name: value}
    if ".downsample." in name and EARLY_SWIN in encoder and EARLY_SWIN not in expected:
        # official Swin downsamples at the end of a stage, timm at the start of the next
        found = {re.sub(r"^layers\.(\d+)", lambda stage: f"layers.{int(stage[1]) + 1}", name): value}
    elif name in expected:
        pass
    elif name == SHARED_TABLE:
        tables = [key for key in expected if re.fullmatch(r"blocks\.\d+\.attn\.relative_position_bias_table", key)]
        found = dict.fromkeys(tables, value)
    elif last in ("q_bias", "v_bias") and {f"{stem}.q_bias", f"{stem}.v_bias"} <= encoder.keys():
        q, v = encoder[f"{stem}.q_bias"], encoder[f"{stem}.v_bias"]
        found = {f"{stem}.qkv.bias": torch.cat([q, torch.zeros_like(q), v])}
    elif name.endswith(".qkv.bias"):  # a bias of the keys adds the same to all scores of a query: softmax takes it away
        attention = name.removesuffix("qkv.bias")
        q, _, v = value.chunk(3)
        found = {f"{attention}q_bias": q, f"{attention}v_bias": v}
    elif last in ("gamma_1", "gamma_2"):  # layer scale, in BEiT and in a ViT
        found = {f"{stem}.ls{last[-1]}.gamma": value}
    elif name.endswith((".ls1.gamma", ".ls2.gamma")):
        found = {f"{stem[:-3]}gamma_{stem[-1]}": value}
    elif name.startswith("head."):  # Swin
        found = {f"head.fc.{last}": value}
    return {target: tensor for target, tensor in found.items() if target in expected}


def resize(name: str, value: Tensor, wanted: Tensor, backbone: Any, grid: Grid | None) -> tuple[Tensor, str]:
    """A tensor for the model's grid or patch size, and what was done to it; as it is, where that cannot make it fit.

    Args:
        wanted: the model's tensor of this name.
        grid: (h, w) of the patches it was trained on; None takes it for a square one where it can be.
    """
    fitted, note = value, ""
    if name == "patch_embed.proj.weight" and value.ndim == 4 and value.shape[2:] != wanted.shape[2:]:
        fitted = resample_patch_embed(value, list(wanted.shape[2:]))
        note = f"patches of {by(value.shape[2:])} pixels to {by(wanted.shape[2:])}"
    elif name == "pos_embed" and value.ndim == wanted.ndim == 3:
        new = tuple(backbone.patch_embed.grid_size)
        prefix = wanted.shape[1] - new[0] * new[1]
        old = old_size(value.shape[1] - prefix, grid, new)
        if old and old != new:
            fitted = resample_abs_pos_embed(value, list(new), list(old), prefix, antialias=False)  # as MAE and BEiT do it
            note = f"{by(old)} patches to {by(new)}, bicubic"
    elif name.endswith("relative_position_bias_table") and value.ndim == wanted.ndim == 2:
        window = tuple(backbone.get_submodule(name.rpartition(".")[0]).window_size)
        new = 2 * window[0] - 1, 2 * window[1] - 1
        prefix = len(wanted) - new[0] * new[1]
        old = old_size(len(value) - prefix, grid and (2 * grid[0] - 1, 2 * grid[1] - 1), new)
        if old and old != new:
            trained = (old[0] + 1) // 2, (old[1] + 1) // 2
            fitted = resize_rel_pos_bias_table(value, window, tuple(wanted.shape), old_window_size=trained)
            note = f"table of {by(old)} to {by(new)}, linear between geometrically spaced positions"
    return (fitted, note) if fitted.shape == wanted.shape else (value, "")


def old_size(count: int, known: Grid | None, new: Grid) -> Grid | None:
    """(h, w) of a table with `count` entries: the known one, else a square, else the new one; None if none has as many."""
    if known and known[0] * known[1] == count:
        return known
    side = isqrt(max(count, 0))
    if side > 0 and side * side == count:
        return side, side
    return new if new[0] * new[1] == count else None


def trained_grid(described: dict[str, Any], encoder: dict[str, Tensor], backbone: Any) -> Grid | None:
    """(h, w) in patches, where a checkpoint of ours tells its image size."""
    patch = encoder.get("patch_embed.proj.weight")
    if "model_args" not in described or patch is None or patch.ndim != 4:
        return None
    size = described["model_args"].get("img_size") or backbone.pretrained_cfg["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else size
    return height // patch.shape[2], width // patch.shape[3]


def by(size: Iterable[int]) -> str:
    """'14x14'"""
    return "x".join(map(str, size))


def head_names(backbone: Any) -> tuple[str, ...]:
    """How the keys of a classifier start, by timm and by the official codes."""
    classifier = backbone.pretrained_cfg.get("classifier") or "head"
    return tuple(f"{name}." for name in {*([classifier] if isinstance(classifier, str) else classifier), "head", "attn_pool"})


def why_needless(
    name: str, value: Tensor, wrong: list[Tensor], expected: dict[str, Tensor], heads: tuple[str, ...], inside: bool
) -> str:
    """Why a key is left out; nothing if there is no reason."""
    if name.startswith(heads):
        if not inside:
            return "a head beside the encoder"
        if wrong:
            return f"a head of {len(value)} classes, the model's has {len(wrong[0])}"
        start = name[: name.index(".") + 1]
        return "" if any(key.startswith(start) for key in expected) else "a head, the model has none"
    if inside and name.startswith("norm.") and f"fc_{name}" in expected:
        return "the final norm: the model has one behind the pooling instead (fc_norm)"
    if inside and name.startswith("fc_norm.") and name[3:] in expected:
        return "the norm behind the pooling: the model has its final norm before it"
    return next((reason for pattern, reason in NEEDLESS.items() if re.fullmatch(pattern, name)), "")


def new_parts(
    expected: dict[str, Tensor], weights: dict[str, Tensor], encoder: dict[str, Tensor], heads: tuple[str, ...]
) -> dict[str, str]:
    """The keys of a classifier, and of the norm behind its pooling, of which the file has nothing."""
    reasons = dict.fromkeys(heads, "a fresh classifier")
    if any(name.startswith("norm.") for name in encoder):
        reasons["fc_norm."] = "a fresh norm behind the pooling"
    if any(name.startswith("fc_norm.") for name in encoder):
        reasons["norm."] = "a fresh final norm: the file has it behind the pooling (fc_norm)"
    absent = {start: why for start, why in reasons.items() if not any(name.startswith(start) for name in weights)}
    return {key: why for start, why in absent.items() for key in expected if key.startswith(start)}


def export(checkpoint: str | Path, destination: str | Path, format: Literal["timm", "safetensors"] = "timm") -> Path:
    """Writes the backbone in a checkpoint of ours for `timm.create_model(..., checkpoint_path=destination)`.

    A checkpoint of pretraining gives the encoder, one of fine-tuning the classifier. Beside it, in `destination`.md, is a
    card: how to load it, the recipe, the data and the metrics as far as the checkpoint knows them, and what was left out.

    Args:
        checkpoint: of pretraining or fine-tuning.
        destination: the file to write, `.pth` (or `.pt`), or `.safetensors`.
        format: "timm", a file of `torch.save`, or "safetensors".

    Returns:
        The file that was written.

    Raises:
        FileNotFoundError: there is no such checkpoint.
        ValueError: it is no checkpoint of ours; the destination exists, or its ending is not the format's.
        OSError: the disk is full, or cannot be written.
    """
    destination, card = Path(destination), Path(f"{destination}.md")
    endings = {"timm": (".pth", ".pt"), "safetensors": (".safetensors",)}.get(format)
    if endings is None:
        raise ValueError(f"export knows the formats timm and safetensors, not {format!r}")
    if destination.suffix not in endings:
        raise ValueError(f"{destination}: timm reads the format {format!r} from a file that ends in {' or '.join(endings)}")
    if taken := [path for path in (destination, card) if path.exists()]:
        raise ValueError(f"{taken[0]} exists and is not overwritten: remove it, or export to another name")
    content = read_file(checkpoint)
    if not description(content):
        raise ValueError(f"{checkpoint} is no checkpoint of unimim: it does not say which backbone it holds")
    backbone = filled(*opened(content, checkpoint), checkpoint, True, {})
    report: LoadReport = backbone.load_report
    weights = {key: value.contiguous() for key, value in backbone.state_dict().items()}
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
