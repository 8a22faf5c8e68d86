"""The layouts in which encoders are published: CLIP, DINOv2, EVA-02, transformers, mmpretrain; their keys by timm's names."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor

RGB = tuple[float, float, float]
Statistics = tuple[RGB, RGB]
IMAGENET: Statistics = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
HALF: Statistics = (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
CLIP: Statistics = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
TEXT = "the text tower"
HEAD = "the head of pretraining"
MASK = "stands for hidden patches, in pretraining only"
QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Layout:
    """One way to name the parts of a ViT.

    Attributes:
        name: of the code that writes it.
        sign: matches one key of each such file, and no key of others.
        renames: patterns of whole keys, and what they are in timm: a template of `re.Match.expand`; `NAME:q` is a third of the
            joint projection NAME, `NAME:row` gets the axes of length 1 that timm has in front, `NAME:t` is transposed.
        leaves_out: patterns of keys that no encoder has, and why.
        statistics: mean and std by which its networks normalize pixels; None where the code does not say.
    """

    name: str
    sign: str
    renames: dict[str, str] = field(default_factory=dict)
    leaves_out: dict[str, str] = field(default_factory=dict)
    statistics: Statistics | None = None


def transformers_block(before: str, layer: str, attention: str) -> dict[str, str]:
    """The renames of a block in Hugging Face's classes that have `attention.attention.query` and the like."""
    block = rf"{before}encoder\.layer\.(\d+)\."
    return {
        rf"{block}attention\.attention\.query\.{attention}": r"blocks.\1.attn.qkv.\2:q",
        rf"{block}attention\.attention\.key\.{attention}": r"blocks.\1.attn.qkv.\2:k",
        rf"{block}attention\.attention\.value\.{attention}": r"blocks.\1.attn.qkv.\2:v",
        rf"{block}attention\.output\.dense\.(\w+)": r"blocks.\1.attn.proj.\2",
        rf"{block}intermediate\.dense\.(\w+)": r"blocks.\1.mlp.fc1.\2",
        rf"{block}output\.dense\.(\w+)": r"blocks.\1.mlp.fc2.\2",
        rf"{block}(?:layernorm_before|norm1)\.(\w+)": r"blocks.\1.norm1.\2",
        rf"{block}(?:layernorm_after|norm2)\.(\w+)": r"blocks.\1.norm2.\2",
        rf"{before}embeddings\.cls_token": "cls_token",
        rf"{before}embeddings\.position_embeddings": "pos_embed",
        rf"{before}embeddings\.patch_embeddings\.projection\.(\w+)": r"patch_embed.proj.\1",
        rf"(?:{before})?{layer}\.(\w+)": r"norm.\1",
        r"classifier\.(\w+)": r"head.\1",
    }


MMPRETRAIN = {
    r"backbone\.patch_embed\.projection\.(\w+)": r"patch_embed.proj.\1",
    r"backbone\.layers\.(\d+)\.ln([12])\.(\w+)": r"blocks.\1.norm\2.\3",
    r"backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\.(\w+)": r"blocks.\1.mlp.fc1.\2",
    r"backbone\.layers\.(\d+)\.ffn\.layers\.1\.(\w+)": r"blocks.\1.mlp.fc2.\2",
    r"backbone\.layers\.(\d+)\.(.+)": r"blocks.\1.\2",
    r"backbone\.ln1\.(\w+)": r"norm.\1",
    r"backbone\.(.+)": r"\1",
}
LAYOUTS = (
    Layout(
        "OpenAI's CLIP",
        r"(?:visual\.)?conv1\.weight",
        {
            r"(?:visual\.)?class_embedding": "cls_token:row",
            r"visual\.positional_embedding": "pos_embed:row",
            r"positional_embedding": "pos_embed:row",
            r"(?:visual\.)?conv1\.weight": "patch_embed.proj.weight",
            r"(?:visual\.)?ln_pre\.(\w+)": r"norm_pre.\1",
            r"(?:visual\.)?ln_post\.(\w+)": r"norm.\1",
            r"(?:visual\.)?proj": "head.weight:t",
            r"(?:visual\.)?transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)": r"blocks.\1.attn.qkv.\2",
            r"(?:visual\.)?transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)": r"blocks.\1.attn.proj.\2",
            r"(?:visual\.)?transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)": r"blocks.\1.norm\2.\3",
            r"(?:visual\.)?transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)": r"blocks.\1.mlp.fc1.\2",
            r"(?:visual\.)?transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)": r"blocks.\1.mlp.fc2.\2",
        },
        {r"(token_embedding|ln_final)\..+|text_projection|logit_scale|input_resolution|context_length|vocab_size": TEXT},
        CLIP,
    ),
    Layout(
        "DINOv2",
        r"(?:.+\.)?(?:register_tokens|blocks\.0\.(?:mlp\.w12\.weight|0\.norm1\.weight|ls1\.gamma))",
        {
            r"(?:.+\.)?register_tokens": "reg_token",
            r"(?:backbone\.)?blocks\.(\d+)\.mlp\.w12\.(\w+)": r"blocks.\1.mlp.fc1.\2",
            r"(?:backbone\.)?blocks\.(\d+)\.mlp\.w3\.(\w+)": r"blocks.\1.mlp.fc2.\2",
            r"(?:backbone\.)?blocks\.\d+\.(\d+)\.(.+)": r"blocks.\1.\2",
            r"backbone\.(.+)": r"\1",
        },
        {r"(dino|ibot)_head\..+": HEAD},
        IMAGENET,
    ),
    Layout(
        "EVA-02",
        r"(?:.+\.)?blocks\.0\.attn\.q_proj\.weight",
        {
            r"blocks\.(\d+)\.attn\.([qv])_bias": r"blocks.\1.attn.\2_proj.bias",
            r"blocks\.(\d+)\.attn\.inner_attn_ln\.(\w+)": r"blocks.\1.attn.norm.\2",
            r"blocks\.(\d+)\.mlp\.w1\.(\w+)": r"blocks.\1.mlp.fc1_g.\2",
            r"blocks\.(\d+)\.mlp\.w2\.(\w+)": r"blocks.\1.mlp.fc1_x.\2",
            r"blocks\.(\d+)\.mlp\.w3\.(\w+)": r"blocks.\1.mlp.fc2.\2",
            r"blocks\.(\d+)\.mlp\.ffn_ln\.(\w+)": r"blocks.\1.mlp.norm.\2",
        },
        {r"(?:.+\.)?rope\.freqs_(cos|sin)": "computed, not learned"},
    ),
    Layout(
        "transformers' CLIP",
        r"(?:.+\.)?pre_layrnorm\.weight",
        {
            r"(?:vision_model\.)?embeddings\.class_embedding": "cls_token:row",
            r"(?:vision_model\.)?embeddings\.position_embedding\.weight": "pos_embed:row",
            r"(?:vision_model\.)?embeddings\.patch_embedding\.(\w+)": r"patch_embed.proj.\1",
            r"(?:vision_model\.)?pre_layrnorm\.(\w+)": r"norm_pre.\1",
            r"(?:vision_model\.)?post_layernorm\.(\w+)": r"norm.\1",
            r"visual_projection\.(\w+)": r"head.\1",
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)": r"blocks.\1.attn.qkv.\3:\2",
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)": r"blocks.\1.attn.proj.\2",
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.layer_norm([12])\.(\w+)": r"blocks.\1.norm\2.\3",
            r"(?:vision_model\.)?encoder\.layers\.(\d+)\.mlp\.fc([12])\.(\w+)": r"blocks.\1.mlp.fc\2.\3",
        },
        {
            r"text_model\..+|text_projection\..+|logit_scale": TEXT,
            r"(?:.+\.)?position_ids": "computed, not learned",
        },
        CLIP,
    ),
    Layout(
        "transformers' DINOv2",
        r"(?:.+\.)?encoder\.layer\.0\.layer_scale1\.lambda1",
        {
            r"(?:dinov2\w*\.)?embeddings\.register_tokens": "reg_token",
            r"(?:dinov2\w*\.)?encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1": r"blocks.\1.ls\2.gamma",
            r"(?:dinov2\w*\.)?encoder\.layer\.(\d+)\.mlp\.weights_in\.(\w+)": r"blocks.\1.mlp.fc1.\2",
            r"(?:dinov2\w*\.)?encoder\.layer\.(\d+)\.mlp\.weights_out\.(\w+)": r"blocks.\1.mlp.fc2.\2",
            r"(?:dinov2\w*\.)?encoder\.layer\.(\d+)\.mlp\.fc([12])\.(\w+)": r"blocks.\1.mlp.fc\2.\3",
            **transformers_block(r"(?:dinov2\w*\.)?", "layernorm", r"(\w+)"),
        },
        {r"(?:.+\.)?mask_token": MASK},
        IMAGENET,
    ),
    Layout(
        "transformers' BEiT",
        r"(?:.+\.)?encoder\.layer\.0\.lambda_1",
        {
            r"(?:\w+\.)?encoder\.layer\.(\d+)\.lambda_([12])": r"blocks.\1.gamma_\2",
            r"(?:\w+\.)?encoder\.layer\.(\d+)\.attention\.attention\.query\.bias": r"blocks.\1.attn.q_bias",
            r"(?:\w+\.)?encoder\.layer\.(\d+)\.attention\.attention\.value\.bias": r"blocks.\1.attn.v_bias",
            r"(?:\w+\.)?encoder\.layer\.(\d+)\.attention\.attention\.relative_position_bias\.(\w+)": r"blocks.\1.attn.\2",
            r"(?:\w+\.)?encoder\.relative_position_bias\.(\w+)": r"rel_pos_bias.\1",
            r"(?:\w+\.)?pooler\.layernorm\.(\w+)": r"fc_norm.\1",
            **transformers_block(r"(?:\w+\.)?", "layernorm", r"(weight)"),
        },
        {r"(?:.+\.)?mask_token": MASK, r"lm_head\..+": HEAD},
        HALF,
    ),
    Layout(
        "transformers' MAE",
        r"decoder\.decoder_embed\.weight",
        transformers_block(r"(?:vit\.)?", "layernorm", r"(\w+)"),
        {r"decoder\..+": HEAD},
        IMAGENET,
    ),
    Layout(
        "transformers' ViT",
        r"(?:.+\.)?encoder\.layer\.0\.attention\.attention\.query\.weight",
        transformers_block(r"(?:vit\.)?", "layernorm", r"(\w+)"),
        {r"(?:.+\.)?mask_token": MASK, r"(?:.+\.)?pooler\..+": "a head, the model has none"},
    ),
    Layout(
        "mmpretrain",
        r"backbone\.layers\.0\.ffn\.layers\.0\.0\.weight",
        MMPRETRAIN,
        {r"(neck|head|target_generator|data_preprocessor|teacher)\..+": HEAD, r"backbone\.mask_token": HEAD},
        IMAGENET,
    ),
    Layout("MAE", r"(?:.+\.)?decoder_pos_embed", statistics=IMAGENET),
    Layout("BEiT's pretraining", r"(?:.+\.)?rel_pos_bias\.relative_position_bias_table", statistics=IMAGENET),
    Layout("SimMIM", r"(?:.+\.)?decoder\.0\.weight", statistics=IMAGENET),
)


def of_script(content: Any) -> Statistics | None:
    """Returns the mean and std of a training script that keeps its arguments beside the weights; None of other files.

    The scripts of DeiT, MAE, MILAN, dBOT, DINO, iBOT and SimMIM know ImageNet's alone; those of BEiT, BEiT v2 and data2vec have
    an argument for it, and else 0.5 (microsoft/unilm@768a3c8, beit/run_class_finetuning.py).
    """
    arguments = [content[key] for key in ("args", "config") if key in content] if isinstance(content, dict) else []
    if not arguments:
        return None
    return IMAGENET if getattr(arguments[0], "imagenet_default_mean_and_std", True) else HALF


@dataclass
class Renamed:
    """A state dict by timm's names.

    Attributes:
        weights: its tensors; those that no layout names keep their keys.
        sources: of each name, the keys of the file that it is made of.
        left_out: keys of the file that no encoder has, and why.
        layout: the one that was found, if any.
    """

    weights: dict[str, Tensor]
    sources: dict[str, list[str]]
    left_out: dict[str, str]
    layout: Layout | None = None


def renamed(state_dict: dict[str, Tensor], expected: dict[str, Tensor]) -> Renamed:
    """Names the tensors of a file as timm does, by the layout under which most of the expected names are found.

    Args:
        state_dict: of the file.
        expected: of the model.
    """
    plain = Renamed(dict(state_dict), {key: [key] for key in state_dict}, {})
    found = [plain, *(under(layout, state_dict, expected) for layout in LAYOUTS if has(layout, state_dict))]
    best = max(found, key=lambda one: (len(expected.keys() & stripped(one.weights)), one.layout is not None))
    fold_probe(best, expected)
    return best


def has(layout: Layout, state_dict: dict[str, Tensor]) -> bool:
    """Returns whether a key of the file is the layout's sign."""
    return any(re.fullmatch(layout.sign, key) for key in state_dict)


def stripped(weights: dict[str, Tensor]) -> set[str]:
    """Returns the keys, with and without each prefix that ends in a dot."""
    return {key[start:] for key in weights for start in (0, *(dot.end() for dot in re.finditer(r"\.", key)))}


def under(layout: Layout, state_dict: dict[str, Tensor], expected: dict[str, Tensor]) -> Renamed:
    """Names the tensors of a file by one layout."""
    done = Renamed({}, {}, {}, layout)
    thirds: dict[str, dict[str, Tensor]] = {}
    visual = any(key.startswith("visual.") for key in state_dict)
    for key, value in state_dict.items():
        why = next((why for pattern, why in layout.leaves_out.items() if re.fullmatch(pattern, key)), "")
        if not why and visual and not key.startswith("visual."):
            why = TEXT
        if why:
            done.left_out[key] = why
            continue
        matches = ((re.fullmatch(pattern, key), template) for pattern, template in layout.renames.items())
        name, _, how = next((match.expand(template) for match, template in matches if match), key).partition(":")
        done.sources.setdefault(name, []).append(key)
        if how in QKV:
            thirds.setdefault(name, {})[how] = value
            continue
        done.weights[name] = HOW[how](value)
    for name, parts in thirds.items():
        like = next(iter(parts.values()))
        done.weights[name] = torch.cat([parts.get(third, torch.zeros_like(like)) for third in QKV])
    if "reg_token" in done.weights and "cls_token" in done.weights and "pos_embed" in done.weights:
        fold_cls(done, expected)
    if "head.weight" in done.weights and "head.bias" in expected and "head.bias" not in done.weights:
        done.weights["head.bias"] = torch.zeros(len(done.weights["head.weight"]))  # CLIP's projection has none
        done.sources["head.bias"] = done.sources["head.weight"]
    return done


HOW: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda value: value,
    "row": lambda value: value.reshape(1, -1, value.shape[-1]),
    "t": lambda value: value.t().contiguous(),
}
"""What is done to a tensor beside its new name."""


def fold_cls(done: Renamed, expected: dict[str, Tensor]) -> None:
    """Adds the position of CLS to CLS where timm's model has positions of patches only, as DINOv2's with registers."""
    cls, positions, wanted = done.weights["cls_token"], done.weights["pos_embed"], expected.get("pos_embed")
    if wanted is not None and round((positions.shape[1] - 1) ** 0.5) ** 2 == positions.shape[1] - 1:
        done.weights["cls_token"] = cls + positions[:, :1]
        done.weights["pos_embed"] = positions[:, 1:]
        done.sources["cls_token"] = [*done.sources["cls_token"], *done.sources["pos_embed"]]


def fold_probe(done: Renamed, expected: dict[str, Tensor]) -> None:
    """Makes one linear layer of MAE's linear probe, whose head is a batch norm without weights (eps 1e-6) before it.

    Source: facebookresearch/mae, main_linprobe.py, commit efb2a80.
    """
    start = next((key.removesuffix("0.running_mean") for key in done.weights if key.endswith("head.0.running_mean")), None)
    if start is None or f"{start}1.weight" not in done.weights:
        return
    mean, variance = done.weights.pop(f"{start}0.running_mean"), done.weights.pop(f"{start}0.running_var")
    done.weights.pop(f"{start}0.num_batches_tracked", None)
    weight, bias = done.weights.pop(f"{start}1.weight"), done.weights.pop(f"{start}1.bias")
    scale = (variance + 1e-6).rsqrt()
    done.weights[f"{start}weight"] = weight * scale
    done.weights[f"{start}bias"] = bias - (weight * scale) @ mean
    folded = [done.sources.pop(f"{start}{key}", []) for key in ("0.running_mean", "0.running_var", "0.num_batches_tracked")]
    batch_norm = [key for keys in folded for key in keys]
    done.sources[f"{start}weight"] = [*done.sources.pop(f"{start}1.weight"), *batch_norm]
    done.sources[f"{start}bias"] = [*done.sources.pop(f"{start}1.bias")]
