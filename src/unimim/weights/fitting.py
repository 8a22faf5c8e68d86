"""Fits the weights of a file to a timm model: every key is accounted for, positions and patches are resized."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from scipy.interpolate import RectBivariateSpline  # type: ignore[import-untyped]
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch import Tensor

from unimim.errors import UserError
from unimim.printing import printable
from unimim.shapes import Grid
from unimim.weights.files import listed
from unimim.weights.layouts import Renamed, renamed
from unimim.weights.models import create_backbone

SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
EARLY_SWIN = "layers.0.downsample.norm.weight"
WRAPPERS = r"^((module|_orig_mod|model|student|backbone|encoder)\.)+"
NEEDLESS = {
    r"mask_token|masked_embed": "stands for hidden patches, in pretraining only",
    r"(lm_head|decoder\w*)(\..*)?": "the head of pretraining",
    r"cls_pt_\w+\..*": "BEiT v2's blocks for its CLS token, in pretraining only",
    r"(teacher|feature_model)\..*": "the teacher",
    r"(distill|dino|ibot)_head\..*": "the head of pretraining",
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
        entry: where in the file the weights were, such as `model` or `teacher`, and what lies beside them.
        layout: of the code that wrote the file, where it is not timm's own.
        statistics: whose mean and std are taken: the file's, the layout's, or timm's for the name.
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
    entry: str
    layout: str
    statistics: str
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
        found = ", ".join(filter(None, (self.entry, self.layout and f"in the layout of {self.layout}")))
        file = f"{self.source}{f' ({found})' if found else ''}"
        pixels = f"it normalizes pixels by mean {mean}, std {std} ({self.statistics})"
        lines = [f"{file} -> {self.backbone['name']}: {counts}; {pixels}"]
        if self.statistics.startswith("timm"):
            lines = [
                f"{self.source} does not say how pixels are normalized: give mean and std if they are others",
                *lines,
            ]
        lines += [f"  {kind}: {keys}: {note}" for kind in kinds for note, keys in self.grouped(kind).items() if note]
        return "\n".join(lines)

    def grouped(self, kind: str) -> dict[str, str]:
        """'the first key and 3 more' for each note of a kind."""
        notes = getattr(self, kind)
        same = {note: [key for key in notes if notes[key] == note] for note in notes.values()}
        return {note: f"{keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}" for note, keys in same.items()}


def filled(
    state_dict: dict[str, Tensor],
    described: dict[str, Any],
    source: str | Path,
    strict: bool,
    model_args: dict[str, Any],
    entry: str = "",
) -> Any:
    """Builds the backbone that is `described`, with `model_args`, and fills it from a state dict.

    Raises:
        ValueError: as `load_backbone`.
    """
    pooled = any(key.endswith("fc_norm.weight") and key.replace("fc_norm", "norm") not in state_dict for key in state_dict)
    pooled |= any(key.endswith("pooler.layernorm.weight") for key in state_dict)
    given = {"num_classes": 0, **described.get("model_args", {}), **model_args}
    if "global_pool" not in given:
        tokens = any(key.endswith(("cls_token", "class_embedding")) for key in state_dict)
        given["global_pool"] = "avg" if pooled else "" if not given["num_classes"] else "token" if tokens else "avg"
    backbone = create_backbone(described["name"], given)
    backbone.load_report = fit(backbone, state_dict, described, given, source, strict, entry)
    rank_zero_info("\n".join(map(printable, str(backbone.load_report).split("\n"))))
    return backbone


def fit(
    backbone: Any,
    state_dict: dict[str, Tensor],
    described: dict[str, Any],
    model_args: dict[str, Any],
    source: str | Path,
    strict: bool = True,
    entry: str = "",
) -> LoadReport:
    """Fills a timm model from a state dict, and gives it the pixel statistics that belong to it.

    These are those in `described`, else those of the layout in which the file is, else timm's for the name.

    Args:
        described: the name; mean and std, where they are known; of a checkpoint of ours also the model_args of its training.
        model_args: those with which the backbone was made.
        entry: as in `LoadReport`.

    Raises:
        ValueError: a key is missing, unexpected or of another shape, and `strict`.
    """
    expected = backbone.state_dict()
    translated = renamed(state_dict, expected)
    layout = translated.layout
    sources: dict[str, Any] = {
        "the file's, or given": (described.get("mean"), described.get("std")),
        f"{layout.name}'s" if layout else "": (layout.statistics if layout else None) or (None, None),
        "those of the training script": described.get("script") or (None, None),
        "timm's for the name": (backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"]),
    }
    chosen = [next((whose, both[at]) for whose, both in sources.items() if both[at] is not None) for at in (0, 1)]
    statistics = {key: tuple(value) for key, (_, value) in zip(("mean", "std"), chosen, strict=True)}
    backbone.pretrained_cfg = {**backbone.pretrained_cfg, **statistics}
    prefix = common_prefix(translated.weights, expected)
    weights, by_name = account(translated.weights, prefix, backbone, described)
    kinds = of_the_file(by_name, translated, prefix)
    built = {"name": described["name"], "model_args": model_args, **{key: list(value) for key, value in statistics.items()}}
    report = LoadReport(str(source), prefix, built, entry, layout.name if layout else "", chosen[0][0], **kinds)
    if report.problems and strict:
        raise UserError(f"{source} does not fit {described['name']}, nothing was loaded: {report.problems}")
    if report.problems:
        rank_zero_warn(f"{source} does not fit {described['name']}, the rest was loaded: {report.problems}")
    backbone.load_state_dict(weights, strict=False)
    return report


def of_the_file(by_name: dict[str, dict[str, str]], translated: Renamed, prefix: str) -> dict[str, dict[str, str]]:
    """The kinds of `LoadReport` by the keys of the file, of the kinds by the names that its layout gave them."""
    kinds: dict[str, dict[str, str]] = {kind: {} for kind in by_name}
    kinds["dropped"] |= translated.left_out
    for kind, notes in by_name.items():
        for name, note in notes.items():
            if kind not in FILE_KINDS:  # the model's own key: the file may have dropped one of that name
                kinds[kind][name] = note
                continue
            for key in translated.sources.get(name, [name]):
                new = kind == "loaded" and key != name
                into = f"into {name.removeprefix(prefix)}" if key != name and kind in ("loaded", "resized", "renamed") else ""
                told = ", ".join(filter(None, (note, into if "into" not in note else "")))
                if not any(key in kinds[other] for other in FILE_KINDS):
                    kinds["renamed" if new else kind][key] = told
    return kinds


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
            table, of_cls = value[: old[0] * old[1]], value[old[0] * old[1] :]
            fitted = torch.cat([resized_table(table, trained, window), of_cls.to(table.dtype)])
            note = f"table of {by(old)} to {by(new)}, cubic between geometrically spaced positions"
    return (fitted, note) if fitted.shape == wanted.shape else (value, "")


def resized_table(table: Tensor, old: Grid, new: Grid) -> Tensor:
    """A table of relative positions for another grid, as BEiT's code resizes it: [(2h-1) (2w-1), heads] -> the same of h', w'.

    The old offsets are spaced geometrically over the new range, and a cubic spline between them gives the new ones.

    Source: microsoft/unilm@768a3c8, beit/run_class_finetuning.py, whose scipy.interpolate.interp2d is FITPACK's spline too.
    """
    at = [spread(before, after) for before, after in zip(old, new, strict=True)]
    wanted = [np.arange(-(side - 1), side, dtype=np.float64) for side in new]
    heads = rearrange(table.double(), "(h w) heads -> heads h w", h=2 * old[0] - 1).numpy()
    resized = [RectBivariateSpline(*at, head, kx=min(3, len(at[0]) - 1), ky=min(3, len(at[1]) - 1))(*wanted) for head in heads]
    return rearrange(torch.from_numpy(np.stack(resized)), "heads h w -> (h w) heads").to(table.dtype)


def spread(old: int, new: int) -> np.ndarray[Any, Any]:
    """Where the 2 old - 1 offsets of a side lie among the 2 new - 1: 0 in the middle, the steps from it grow by one factor."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        factor = (low + high) / 2
        low, high = (low, factor) if (1 - factor ** (old - 1)) / (1 - factor) > new - 1 else (factor, high)
    steps = np.cumsum([factor**power for power in range(old - 1)])
    return np.concatenate([-steps[::-1], [0.0], steps])


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
