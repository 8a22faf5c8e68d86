"""What several tests share: tiny parts of the equation, and a repository root."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from unimim import BlockMasking, HOGTarget, LinearHead, MaskedImageModeling, MaskTokenStudent, Student, Tokens, VisibleStudent
from unimim.training import cpu

ROOT = Path(__file__).parent.parent
OF_A_TASK = {
    "pretrain": "normalization:",
    "finetune": "layer_decay:",
    "probe": "lrs:",
    "knn": "k: 20",
    "export": "to: timm",
    "segment": "auxiliary_weight:",
    "sweep": "normalization:",
}
"""What `--print_config` shows of each task."""

PLAIN = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
TINY = {
    "vit": ("vit_tiny_patch16_224", PLAIN),
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
    "eva": ("eva_giant_patch14_224", PLAIN),
    "eva_rotary": ("eva02_tiny_patch14_224", PLAIN),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {
            "img_size": 32,
            "patch_size": 1,
            "embed_dim": 12,
            "depths": (1, 2, 1, 1),
            "num_heads": (1, 1, 2, 2),
            "window_size": 4,
        },
    ),
    "visible_vit": ("vit_tiny_patch16_224", PLAIN),
    "visible_vit_with_registers": ("vit_tiny_patch16_224", {**PLAIN, "reg_tokens": 2}),
    "visible_eva": ("eva_giant_patch14_224", PLAIN),
    "visible_eva_rotary": ("eva02_tiny_patch14_224", PLAIN),
}
VISIBLE = [kind for kind in TINY if kind.startswith("visible")]


def tiny_student(kind: str = "vit") -> Student:
    """A narrow student on a 4x4 grid, every parameter filled with noise (zeros would hide mistakes)."""
    name, model_args = TINY[kind]
    student = (VisibleStudent if kind in VISIBLE else MaskTokenStudent)(name, model_args)
    for parameter in student.parameters():
        nn.init.normal_(parameter, std=0.2)
    return student


def all_tokens(tokens: Tokens) -> Tensor:
    """Prefix and patches in one, as a backbone of timm gives them: [b p+n d]"""
    return torch.cat([tokens.prefix, tokens.patches], 1)


def tiny_model(task: type[MaskedImageModeling] = MaskedImageModeling, **changes: object) -> MaskedImageModeling:
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
    return task(**{**parts, **changes})


def narrow_recipe(recipe: Path, folder: Path) -> Path:
    """The recipe with student, teacher and decoder of two narrow blocks, as a file in the folder."""
    config = yaml.safe_load(recipe.read_text())
    narrow = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    student, teacher = config["model"]["student"]["init_args"], config["model"]["teacher"]
    of_teacher = teacher.get("init_args", {}) if isinstance(teacher, dict) else {}
    if student["backbone"].startswith("swin"):
        narrow_student: dict[str, object] = {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    else:
        narrow_student = {**narrow, "depth": of_teacher.get("top_blocks", 2)}
    student["model_args"] = {**student.get("model_args", {}), **narrow_student}
    for term in (config["model"], *config["model"].get("terms", {}).values()):
        head = term["head"]
        if isinstance(head, dict) and "Decoder" in head["class_path"]:
            head["init_args"] = {**head.get("init_args", {}), "width": 24, "depth": 2, "num_heads": 2}
        if isinstance(head, dict) and "PatchAggregation" in head["class_path"]:
            head["init_args"] = {**head.get("init_args", {}), "block": 0, "depth": 1}
    if isinstance(of_teacher.get("network"), str):
        of_teacher["model_args"] = {**of_teacher.get("model_args", {}), **narrow}
    file = folder / recipe.name
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def ctrl_c() -> None:
    """Counts in each test and the processes it starts: Lightning ignores it after one, a job in the background always."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=["mkl", "both", "onednn"])
def multiplied_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Linear layers of any width are multiplied as on a processor where this library is the quicker one.

    "mkl": Intel's; "both": oneDNN for results and MKL for gradients, another with AVX2; "onednn": another with AVX-512.
    """
    monkeypatch.setattr(cpu, "WIDE", 1)
    monkeypatch.setattr(cpu, "WIDE_BY_ONEDNN", 1)
    monkeypatch.setattr(cpu, "is_intel", lambda: request.param == "mkl")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2" if request.param == "both" else "AVX512")
    by: str = request.param
    return by


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """As many in the next test: later digits depend on them."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before, "the test has set another number of threads for all that follow"
