"""The table of initial standard deviations in docs/recipes.md, each recipe's beside its official code's: `make recipes`.

What the official codes do is written out here in closed form, by reading them, and apart from what the package does.
"""

import math
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
import yaml

import unimim

ROOT = Path(__file__).parent.parent
START, END = "<!-- initial weights -->\n", "<!-- /initial weights -->"


class Numbers(NamedTuple):
    """Of a parameter's values. `largest` bounds their size."""

    mean: float
    std: float
    largest: float


class Place(NamedTuple):
    """Where a parameter is: `fan_in` and `fan_out` of its layer, its block (from 1), the grid (h, w), CLS and registers."""

    fan_in: int
    fan_out: int
    block: int
    grid: tuple[int, int]
    prefix: int


Law = Callable[[Place], Numbers]


def constant(value: float) -> Law:
    return lambda _: Numbers(value, 0.0, abs(value))


def normal(_: Place) -> Numbers:
    """0.02, cut nowhere or at 2, which is 100 standard deviations away."""
    return Numbers(0.0, 0.02, 2.0)


def cut(_: Place) -> Numbers:
    """A normal distribution of 0.02 that is cut at 1 standard deviation has the variance 1 - 2 pdf(1) / (cdf(1) - cdf(-1))."""
    unit = NormalDist()
    return Numbers(0.0, 0.02 * math.sqrt(1 - 2 * unit.pdf(1) / (unit.cdf(1) - unit.cdf(-1))), 0.02)


def cut_by_depth(place: Place) -> Numbers:
    by = math.sqrt(2 * place.block)
    return Numbers(*(number / by for number in cut(place)))


def uniform(bound: float) -> Numbers:
    return Numbers(0.0, bound / math.sqrt(3), bound)


def xavier(place: Place) -> Numbers:
    return uniform(math.sqrt(6 / (place.fan_in + place.fan_out)))


def torchs(place: Place) -> Numbers:
    """torch's default of linear layers and convolutions, weight and bias."""
    return uniform(1 / math.sqrt(place.fan_in))


def sincos(place: Place) -> Numbers:
    """The fixed table of 2 x d/4 sines and 2 x d/4 cosines a patch, with zeros for CLS."""
    (h, w), quarter = place.grid, place.fan_out // 4
    frequencies = [10000 ** (-k / quarter) for k in range(quarter)]
    angles = [at * f for row in range(h) for column in range(w) for at in (row, column) for f in frequencies]
    values = [of(angle) for angle in angles for of in (math.sin, math.cos)] + [0.0] * place.prefix * place.fan_out
    mean = math.fsum(values) / len(values)
    return Numbers(mean, math.sqrt(math.fsum(value**2 for value in values) / len(values) - mean**2), 1.0)


BLOCK = r"student\.backbone\.(?:layers\.\d+\.)?blocks\.(?P<block>\d+)\."
DECODER = r"head\.blocks\.\d+\."
KINDS = {
    "patches": r"student\.backbone\.patch_embed\.proj\.weight",
    "patches' bias": r"student\.backbone\.patch_embed\.proj\.bias",
    "positions": r"student\.backbone\.pos_embed",
    "CLS": r"student\.backbone\.cls_token",
    "mask token": r"(?:student|head)\.mask_token",
    "qkv": BLOCK + r"attn\.qkv\.weight",
    "attn.proj": BLOCK + r"attn\.proj\.weight",
    "fc1": BLOCK + r"mlp\.fc1\.weight",
    "fc2": BLOCK + r"mlp\.fc2\.weight",
    "biases": BLOCK + r"(?:attn\.(?:qkv\.bias|q_bias|v_bias|proj\.bias)|mlp\.fc[12]\.bias)",
    "norms": r"(?:student\.backbone|head)\..*norm\d?\.weight",
    "norms' bias in blocks": BLOCK + r"norm\d\.bias",
    "norms' bias": r"(?:student\.backbone|head)\..*norm\d?\.bias",
    "layer scale": BLOCK + r"gamma_[12]",
    "bias tables": r"student\.backbone\..*relative_position_bias_table",
    "merging": r"student\.backbone\.layers\.\d+\.downsample\.reduction\.weight",
    "head": r"head\.(?:linear|predict|mlp\.\d)\.weight",
    "head's bias": r"head\.(?:linear|predict|mlp\.\d)\.bias",
    "prototypes": r"head\.prototypes",
    "decoder, embedding": r"head\.embed\.weight",
    "decoder, qkv": DECODER + r"attn\.qkv\.weight",
    "decoder, q": DECODER + r"attention\.q\.weight",
    "decoder, kv": DECODER + r"attention\.kv\.weight",
    "decoder, attn.proj": DECODER + r"(?:attn\.proj|attention\.out_proj)\.weight",
    "decoder, fc1": DECODER + r"mlp\.fc1\.weight",
    "decoder, fc2": DECODER + r"mlp\.fc2\.weight",
    "decoder, biases": r"head\.(?:embed|blocks\.\d+\.(?:attn\.(?:qkv|proj)|attention\.(?:q|kv|out_proj)|mlp\.fc[12]))\.bias",
}
"""Every kind of parameter that a student or a head of the recipes has, by its name. The first that fits counts."""

NORMS = {"norms": constant(1), "norms' bias in blocks": constant(0), "norms' bias": constant(0)}
BEIT = {
    **NORMS,
    **dict.fromkeys(("patches", "positions", "CLS", "mask token", "qkv", "fc1", "head"), cut),
    **dict.fromkeys(("attn.proj", "fc2"), cut_by_depth),
    **dict.fromkeys(("patches' bias", "biases", "bias tables", "head's bias"), constant(0)),
}
SIMMIM_VIT = {**BEIT, "head": torchs, "head's bias": torchs}
SIMMIM_SWIN = {
    **NORMS,
    **dict.fromkeys(("patches", "patches' bias", "head", "head's bias"), torchs),
    **dict.fromkeys(("mask token", "qkv", "attn.proj", "fc1", "fc2", "bias tables", "merging"), normal),
    "biases": constant(0),
}
MAE = {
    **NORMS,
    "positions": sincos,
    **dict.fromkeys(("CLS", "mask token"), normal),
    **dict.fromkeys(("patches", "qkv", "attn.proj", "fc1", "fc2", "head"), xavier),
    "patches' bias": torchs,
    **dict.fromkeys(("biases", "head's bias", "decoder, biases"), constant(0)),
    **dict.fromkeys((kind for kind in KINDS if kind.startswith("decoder") and kind != "decoder, biases"), xavier),
}
MASKFEAT = {
    **NORMS,
    **dict.fromkeys(("patches", "positions", "CLS", "mask token", "qkv", "attn.proj", "fc1", "fc2", "head"), normal),
    "patches' bias": torchs,
    **dict.fromkeys(("biases", "norms' bias in blocks"), constant(0.02)),
    "head's bias": constant(0),
}
IBOT = {
    **NORMS,
    **dict.fromkeys(("patches", "patches' bias", "prototypes"), torchs),
    **dict.fromkeys(("positions", "CLS", "qkv", "attn.proj", "fc1", "fc2", "head"), normal),
    **dict.fromkeys(("mask token", "biases", "head's bias"), constant(0)),
}


class Official(NamedTuple):
    """The initial weights of the official code of a recipe, and the channels of the target, which the head predicts."""

    source: str
    laws: dict[str, Law]
    channels: int
    layer_scale: float | None = None


UNILM, SIMMIM = "microsoft/unilm@768a3c87", "microsoft/SimMIM@d3e29bca"
SLOWFAST = "facebookresearch/SlowFast@287ec007, slowfast/models/video_model_builder.py, masked.py, head_helper.py"
BEIT_2 = f"{UNILM}, beit2/modeling_pretrain.py"
OFFICIAL = {
    "maskdistill_vit_base": Official(f"open; {BEIT_2}", BEIT, 768, 0.1),
    "maskdistill_vit_base_clip_large": Official(f"open; {BEIT_2}", BEIT, 1024, 0.1),
    "maskdistill_vit_large": Official(f"open; {BEIT_2}", BEIT, 768, 1e-5),
    "maskdistill_vit_huge": Official(f"open; {BEIT_2}", BEIT, 1024, 1e-5),
    "beit_vit_base": Official(f"{UNILM}, beit/modeling_pretrain.py", BEIT, 8192, 0.1),
    "beitv2_vit_base": Official(BEIT_2, BEIT, 8192, 0.1),
    "data2vec_vit_base": Official("facebookresearch/data2vec_vision@af9a3634, beit/modeling_cyclical.py", BEIT, 768, 1e-4),
    "dbot_vit_base": Official("liuxingbin/dbot@db3b15ec, models_mae.py", MAE, 768),
    "eva_vit_large": Official("baaivision/EVA@5623d08b, EVA-01/eva/modeling_pretrain.py", BEIT, 768),
    "feature_distillation_vit_base": Official(
        "SwinTransformer/Feature-Distillation@2115145a, models/feature_distillation.py, vision_transformer.py",
        SIMMIM_VIT,
        768,
        0.1,
    ),
    "ibot_vit_small": Official("bytedance/ibot@da316d82, models/vision_transformer.py, head.py", IBOT, 8192),
    "mae_vit_base": Official("facebookresearch/mae@efb2a806, models_mae.py", MAE, 768),
    "maskalign_vit_base": Official("OpenDriveLab/maskalign@250d018a, models_pretrain.py", MAE, 768),
    "maskfeat_dino_vit_base": Official(f"open; {SLOWFAST}", MASKFEAT, 768),
    "maskfeat_hog_vit_base": Official(SLOWFAST, MASKFEAT, 108),
    "milan_vit_base": Official("zejiangh/MILAN@7dcfe0ff, models_milan.py", MAE, 512),
    "mvp_vit_base": Official(f"open; {UNILM}, beit/modeling_pretrain.py", BEIT, 512, 0.1),
    "simmim_swin_base": Official(f"{SIMMIM}, models/simmim.py, swin_transformer.py", SIMMIM_SWIN, 3072),
    "simmim_vit_base": Official(f"{SIMMIM}, models/simmim.py, vision_transformer.py", SIMMIM_VIT, 768, 0.1),
}
"""Every recipe of conf/pretrain whose initial weights are an official code's."""


class Channels(unimim.TargetGenerator):
    """A target of so many channels, for the head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, images: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        raise NotImplementedError


def part_of(config: Any) -> tuple[Any, dict[str, Any]]:
    """The class of a yaml's part, and its arguments."""
    config = {"class_path": config} if isinstance(config, str) else config
    return getattr(unimim, config["class_path"].removeprefix("unimim.")), config.get("init_args", {})


def built(name: str, **changes: Any) -> torch.nn.ModuleDict:
    """Student and head of a recipe, by a fixed seed, with `changes` to the model_args."""
    config = yaml.safe_load((ROOT / "conf" / "pretrain" / f"{name}.yaml").read_text())["model"]
    student_class, arguments = part_of(config["student"])
    head_class, of_head = part_of(config["head"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = student_class(**{**arguments, "model_args": {**arguments["model_args"], **changes}})
        if "depth" in of_head and "depth" in changes:
            of_head = {**of_head, "depth": changes["depth"]}
        head = partial(head_class, **of_head)(student, Channels(OFFICIAL[name].channels))
    return torch.nn.ModuleDict({"student": student, "head": head})


class Parameter(NamedTuple):
    """A parameter of a recipe as it begins: its kind, what was measured, how many values it has, what is official."""

    name: str
    kind: str
    ours: Numbers
    count: int
    official: Numbers


def parts_of(name: str, parameter: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """MILAN's queries, and its keys and values, are layers of their own in the official code."""
    if "in_proj" not in name:
        return [(name, parameter)]
    width, (before, after) = len(parameter) // 3, name.split("in_proj_")
    return [(f"{before}q.{after}", parameter[:width]), (f"{before}kv.{after}", parameter[width:])]


@cache
def measured(name: str, changes: tuple[tuple[str, Any], ...]) -> list[Parameter]:
    """Every parameter of a recipe that is built with these changes to its model_args.

    Raises:
        ValueError: a parameter of no kind, or of one of which the official code's table says nothing.
    """
    official = OFFICIAL[name]
    laws = {**official.laws, **({"layer scale": constant(official.layer_scale)} if official.layer_scale else {})}
    model = built(name, **dict(changes))
    student: Any = model["student"]
    shapes = {
        part: tensor.flatten(1).shape
        for whole, parameter in model.named_parameters()
        for part, tensor in parts_of(whole, parameter)
        if tensor.ndim > 1
    }
    found = []
    for whole, parameter in model.named_parameters():
        for part, values in parts_of(whole, parameter.detach()):
            matches = [(kind, match) for kind, pattern in KINDS.items() if (match := re.fullmatch(pattern, part))]
            if not matches or matches[0][0] not in laws:
                raise ValueError(f"{name}: the table says nothing of {part}")
            kind, match = matches[0]
            fan_out, fan_in = shapes.get(re.sub(r"bias$", "weight", part), (values.shape[-1], 1))
            if kind == "positions":
                fan_out, fan_in = values.shape[-1], 1
            block = int(match.groupdict().get("block") or 0) + 1
            law = laws[kind](Place(fan_in, fan_out, block, student.grid_size, student.num_prefix_tokens))
            spread = values.double().std(correction=0)
            ours = Numbers(float(values.double().mean()), float(spread), float(values.abs().max()))
            found.append(Parameter(part, kind, ours, values.numel(), law))
    return found


TWO_BLOCKS = (("depth", 2),)
TWO_BLOCKS_OF_SWIN = (("depths", (1, 1, 1, 1)),)
COLUMNS = ("patches", "positions", "CLS", "mask token", "qkv", "attn.proj", "fc1", "fc2", "head")


def at_full_width(name: str) -> list[Parameter]:
    """A recipe's parameters at its own width, in as few blocks as show each kind."""
    return measured(name, TWO_BLOCKS_OF_SWIN if "swin" in name else TWO_BLOCKS)


def cell(parameters: list[Parameter], kind: str) -> str:
    """Ours / official, of the first parameter of a kind, which is block 1's."""
    found = next((parameter for parameter in parameters if parameter.kind == kind), None)
    return "" if found is None else f"{found.ours.std:.4f} / {found.official.std:.4f}"


def table(names: list[str], columns: dict[str, str]) -> str:
    """One row a recipe; `columns` says which kind stands under which heading."""
    rows = [f"| recipe | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 1)}"]
    for name in names:
        parameters = at_full_width(name)
        cells = [cell(parameters, kind) for kind in columns.values()]
        rows.append(f"| [{name}](../conf/pretrain/{name}.yaml) | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def page_with_weights(text: str) -> str:
    """The page's text with the tables between their marks."""
    decoders = [name for name in OFFICIAL if any(found.kind.startswith("decoder") for found in at_full_width(name))]
    of_decoder = {kind.removeprefix("decoder, "): kind for kind in KINDS if kind.startswith("decoder") and "biases" not in kind}
    of_decoder |= {"prediction": "head"}
    sources = "\n".join(f"- {name}: {official.source}" for name, official in OFFICIAL.items())
    parts = [table(list(OFFICIAL), {kind: kind for kind in COLUMNS}), table(decoders, of_decoder), sources + "\n"]
    prototypes = cell(at_full_width("ibot_vit_small"), "prototypes")
    parts.insert(1, f"iBOT's prototypes, behind the three layers of its head: {prototypes}. In the decoders, block 1:\n")
    parts.insert(3, "Where the official values were read:\n")
    return re.sub(f"{START}.*?{END}", lambda _: START + "\n" + "\n".join(parts) + END, text, flags=re.S)
