"""Layer-wise learning rates: every parameter of ViT-B, BEiT-B and Swin-B against tables of the official functions' rules.

The rules: util/lr_decay.py of MAE, beit2/optim_factory.py of BEiT v2, optimizer.py of SimMIM (that of Swin's own repository).
All scale by decay ** (depth + 1 - id). The models are narrow, but of full depth.
"""

import fnmatch
from typing import Any

import pytest
import timm
import torch
from torch import nn

from unimim.tasks.optim import layer_decay_groups, layer_ids, warmup_cosine

NARROW = {"img_size": 64, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
SHARED = {"use_abs_pos_emb": False, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_cls": ("vit_base_patch16_224", NARROW),
    "vit_mean": ("vit_base_patch16_224", {**NARROW, "global_pool": "avg"}),
    "beit": ("beit_base_patch16_224", {**NARROW, "init_values": 0.1, "use_abs_pos_emb": True}),
    "beit_shared": ("beit_base_patch16_224", {**NARROW, "init_values": 0.1, **SHARED}),
    "beit_without_pooling": ("beit_base_patch16_224", {**NARROW, "global_pool": "", **SHARED}),
    "eva": ("eva_giant_patch14_224", {**NARROW, "img_size": 28, "depth": 12}),
    "swin": (
        "swin_base_patch4_window7_224",
        {"img_size": 224, "embed_dim": 8, "num_heads": (1, 1, 2, 2), "num_classes": 5},
    ),
}

# Prefix of the name -> id. MAE: token, positions and patch embedding 0, block i is i + 1, all else 13. BEiT v2 and EVA: the
# same, and a table that the blocks share is with the head; a block's own table is with its block.
PLAIN = {
    "cls_token": 0,
    "pos_embed": 0,
    "patch_embed.": 0,
    "blocks.0.": 1,
    "blocks.1.": 2,
    "blocks.2.": 3,
    "blocks.3.": 4,
    "blocks.4.": 5,
    "blocks.5.": 6,
    "blocks.6.": 7,
    "blocks.7.": 8,
    "blocks.8.": 9,
    "blocks.9.": 10,
    "blocks.10.": 11,
    "blocks.11.": 12,
    "rel_pos_bias.": 13,
    "norm.": 13,
    "fc_norm.": 13,
    "head.": 13,
}
# SimMIM: the downsampling ends its stage and has the id of the stage's last block. timm has it at the start of the next.
SWIN = {
    "patch_embed.": 0,
    "layers.0.blocks.0.": 1,
    "layers.0.blocks.1.": 2,
    "layers.1.downsample.": 2,
    "layers.1.blocks.0.": 3,
    "layers.1.blocks.1.": 4,
    "layers.2.downsample.": 4,
    "layers.2.blocks.0.": 5,
    "layers.2.blocks.1.": 6,
    "layers.2.blocks.2.": 7,
    "layers.2.blocks.3.": 8,
    "layers.2.blocks.4.": 9,
    "layers.2.blocks.5.": 10,
    "layers.2.blocks.6.": 11,
    "layers.2.blocks.7.": 12,
    "layers.2.blocks.8.": 13,
    "layers.2.blocks.9.": 14,
    "layers.2.blocks.10.": 15,
    "layers.2.blocks.11.": 16,
    "layers.2.blocks.12.": 17,
    "layers.2.blocks.13.": 18,
    "layers.2.blocks.14.": 19,
    "layers.2.blocks.15.": 20,
    "layers.2.blocks.16.": 21,
    "layers.2.blocks.17.": 22,
    "layers.3.downsample.": 22,
    "layers.3.blocks.0.": 23,
    "layers.3.blocks.1.": 24,
    "norm.": 25,
    "head.": 25,
}
# What decays, of all three; every other parameter does not.
DECAYED = (
    "patch_embed.proj.weight",
    "*.attn.qkv.weight",
    "*.attn.proj.weight",
    "*.mlp.fc?.weight",
    "*.downsample.reduction.weight",
    "head.weight",
    "head.fc.weight",
)
BEIT_DECAYED = (*DECAYED, "*relative_position_bias_table")

LR, WEIGHT_DECAY, LAYER_DECAY = 4e-3, 0.05, 0.65


def model(kind: str) -> tuple[nn.Module, dict[str, int], tuple[str, ...]]:
    name, model_args = MODELS[kind]
    table = SWIN if kind == "swin" else PLAIN
    return timm.create_model(name, **model_args), table, BEIT_DECAYED if kind.startswith("beit") else DECAYED


def official(name: str, table: dict[str, int]) -> int:
    (found,) = {id for prefix, id in table.items() if name.startswith(prefix)}
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_has_the_official_layer_rate_and_decay(kind: str) -> None:
    backbone, table, decayed = model(kind)
    last = max(table.values())
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    groups = layer_decay_groups(backbone, LR, WEIGHT_DECAY, LAYER_DECAY)
    seen = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(seen) == sorted(names.values())
    idle = {prefix for prefix in table if not any(name.startswith(prefix) for name in seen)}
    assert idle <= {"pos_embed", "rel_pos_bias.", "norm.", "fc_norm."}  # which of these there are, depends on the model
    ids = layer_ids(backbone)
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            number = official(name, table)
            decays = any(fnmatch.fnmatch(name, pattern) for pattern in decayed)
            assert ids[name] == number, name
            assert group["lr"] == pytest.approx(LR * LAYER_DECAY ** (last - number), rel=1e-12), name
            assert group["weight_decay"] == (WEIGHT_DECAY if decays else 0.0), name
            assert group["name"] == f"layer_{number}" + ("" if decays else "_no_decay"), name


@pytest.mark.parametrize(("kind", "tables"), [("beit", 12), ("beit_shared", 1), ("swin", 24)])
def test_bias_tables_decay_in_beit_and_not_in_swin(kind: str, tables: int) -> None:
    backbone, _, _ = model(kind)
    names = {id(parameter): name for name, parameter in backbone.named_parameters()}
    groups = layer_decay_groups(backbone, LR, WEIGHT_DECAY, LAYER_DECAY)
    found = [g["weight_decay"] for g in groups for p in g["params"] if names[id(p)].endswith("relative_position_bias_table")]
    assert found == [0.0 if kind == "swin" else WEIGHT_DECAY] * tables


@pytest.mark.parametrize("kind", ["vit_mean", "beit_shared", "swin"])
def test_adamw_moves_every_parameter_by_the_rate_of_its_layer(kind: str) -> None:
    """The rate that is used, not the one that is written: a constant gradient moves AdamW by lr, no gradient by lr x decay."""
    backbone, table, decayed = model(kind)
    backbone.double()
    optimizer = torch.optim.AdamW(layer_decay_groups(backbone, LR, WEIGHT_DECAY, LAYER_DECAY), lr=1.0)
    scheduler = warmup_cosine(optimizer, warmup_steps=4, total_steps=12)
    for step in range(9):  # 0 to the peak at 4, and down
        share = step / 4 if step < 4 else (1 + torch.cos(torch.tensor(torch.pi * (step - 4) / 8)).item()) / 2
        for parameter in backbone.parameters():
            parameter.data.zero_()
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
        for name, parameter in backbone.named_parameters():
            rate = share * LR * LAYER_DECAY ** (max(table.values()) - official(name, table))
            torch.testing.assert_close(-parameter.data, torch.full_like(parameter, rate), rtol=1e-5, atol=0)
    optimizer.state.clear()
    for parameter in backbone.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    share = (1 + torch.cos(torch.tensor(torch.pi * 5 / 8)).item()) / 2
    for name, parameter in backbone.named_parameters():
        rate = share * LR * LAYER_DECAY ** (max(table.values()) - official(name, table))
        decays = any(fnmatch.fnmatch(name, pattern) for pattern in decayed)
        expected = torch.full_like(parameter, rate * WEIGHT_DECAY if decays else 0.0)
        torch.testing.assert_close(1 - parameter.data, expected, rtol=1e-5, atol=1e-14)


def test_frozen_parameters_are_left_out_and_a_decay_of_one_is_none() -> None:
    backbone, _, _ = model("vit_cls")
    backbone.patch_embed.requires_grad_(False)
    groups = layer_decay_groups(backbone, LR, WEIGHT_DECAY, 1.0)
    assert {group["lr"] for group in groups} == {LR}
    kept = {id(parameter) for group in groups for parameter in group["params"]}
    assert kept == {id(parameter) for parameter in backbone.parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18"])
def test_other_families_keep_the_layers_of_timm(name: str) -> None:
    backbone = timm.create_model(name, num_classes=5)
    ours = layer_decay_groups(backbone, 1.0, WEIGHT_DECAY, LAYER_DECAY)
    timms = timm.optim.param_groups_layer_decay(backbone, WEIGHT_DECAY, layer_decay=LAYER_DECAY)
    for groups, key in ((ours, "lr"), (timms, "lr_scale")):
        for group in groups:
            group["found"] = {id(parameter): (group[key], group["weight_decay"]) for parameter in group["params"]}
    found, expected = ({k: v for group in groups for k, v in group["found"].items()} for groups in (ours, timms))
    assert found.keys() == expected.keys()
    assert all(found[key] == pytest.approx(expected[key]) for key in expected)


def test_a_schedule_from_zero_to_zero_does_not_depend_on_the_highest_rate() -> None:
    """Bit for bit: probes train several rates side by side."""
    used = []
    for highest in (0.1, 0.3, 0.7, 1e30):
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, highest)]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        scheduler = warmup_cosine(optimizer, warmup_steps=7, total_steps=23)
        rates = []
        for _ in range(23):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        used.append(rates)
    assert all(rates == used[0] for rates in used)
