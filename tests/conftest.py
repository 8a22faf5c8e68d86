"""What several tests share: tiny parts of the equation, and a repository root."""

from pathlib import Path

import pytest
import torch
from torch import nn

from unimim import BlockMasking, HOGTarget, LinearHead, MaskedImageModeling, MaskTokenStudent

ROOT = Path(__file__).parent.parent

TINY = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}),
    "vit_without_cls": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "class_token": False},
    ),
    "beit_bias_per_block": (
        "beit_base_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 0.1},
    ),
    "beit_shared_bias": (
        "beit_base_patch16_224",
        {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 2,
            "init_values": 0.1,
            "use_abs_pos_emb": False,
            "use_rel_pos_bias": False,
            "use_shared_rel_pos_bias": True,
        },
    ),
}


def tiny_student(kind: str = "vit") -> MaskTokenStudent:
    """A student of two narrow blocks on a 4x4 grid, every parameter filled with noise (zeros would hide mistakes)."""
    name, model_args = TINY[kind]
    student = MaskTokenStudent(name, model_args)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    return student


def tiny_model(**changes: object) -> MaskedImageModeling:
    """A whole equation of tiny parts; `changes` replace arguments."""
    parts: dict[str, object] = {
        "teacher": HOGTarget(patch_size=8, cell_size=4),
        "normalization": nn.Identity(),
        "masking": BlockMasking(0.4),
        "student": tiny_student(),
        "head": LinearHead,
        "loss": nn.MSELoss(),
        "warmup_epochs": 1,
    }
    return MaskedImageModeling(**{**parts, **changes})


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
