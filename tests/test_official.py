"""Files in the layouts of official codes, read as their authors' own modules read them.

`official/cases.json` names each file, the repository and commit whose module wrote it (random numbers), the timm model and the
command that reads it; beside each file are inputs and what that module computed of them.
"""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import unimim
from unimim.weights.files import read_file
from unimim.weights.layouts import LAYOUTS

HERE = Path(__file__).parent / "official"
CASES = json.loads((HERE / "cases.json").read_text())
STATED = [case for case in CASES if case["name"] not in ("dino_backbone", "dino_teacher")]
"""All but those whose keys are timm's own and that hold nothing else: nothing in them says how pixels were normalized."""


def computed(case: dict[str, Any], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is computed here of a file's inputs."""
    path, arguments = str(HERE / case["file"]), case["model_args"]
    if case["api"] == "VQKDTarget":
        return {"want": unimim.VQKDTarget(path, case["codes"], case["code_dim"], arguments)(x, tuple(case["grid"]))}
    if case["api"] == "FeatureTarget":
        target = unimim.FeatureTarget(
            case["timm"], path, mean=case["mean"], std=case["std"], model_args=arguments, **case["target"]
        )
        return {"want": target(x, tuple(case["grid"])).flatten(1, 2)}
    model = unimim.load_backbone(path, backbone=case["timm"], **arguments).eval()
    if "logits" in case["outputs"]:
        return {"logits": model(x)}
    tokens = model.forward_features(x)
    tokens = tokens.flatten(1, 2) if tokens.ndim == 4 else tokens
    return {"cls": tokens[:, 0], "want": tokens[:, getattr(model, "num_prefix_tokens", 0) :]}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_a_published_file_computes_what_its_own_code_does(case: dict[str, Any]) -> None:
    arrays = np.load(HERE / f"{case['name']}.npz")
    with torch.no_grad():
        found = computed(case, torch.from_numpy(arrays["x"]))
    compared = found.keys() & set(case["outputs"])
    assert compared
    for key in compared:
        torch.testing.assert_close(found[key], torch.from_numpy(arrays[key]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", STATED, ids=lambda case: case["name"])
def test_a_layout_brings_its_own_pixel_statistics(case: dict[str, Any]) -> None:
    path = HERE / case["file"]
    if case["api"] == "FeatureTarget":
        target = unimim.FeatureTarget(case["timm"], str(path), model_args=case["model_args"], **case["target"])
        found = {"mean": target.mean.flatten().tolist(), "std": target.std.flatten().tolist()}
    elif case["api"] == "load_backbone":
        found = unimim.load_backbone(path, backbone=case["timm"], **case["model_args"]).pretrained_cfg
    else:
        return
    for key in ("mean", "std"):
        assert found[key] == pytest.approx(case[key])


def test_an_unknown_layout_says_so_first_and_takes_what_is_given() -> None:
    (case,) = (case for case in CASES if case["name"] == "dino_backbone")
    path = HERE / case["file"]
    report = str(unimim.load_backbone(path, backbone=case["timm"], **case["model_args"]).load_report)
    assert report.splitlines()[0] == f"{path} does not say how pixels are normalized: give mean and std if they are others"
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    model = unimim.load_backbone(path, backbone=case["timm"], **given, **case["model_args"])
    assert {key: model.pretrained_cfg[key] for key in given} == given


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_key_of_a_file_is_accounted_for(case: dict[str, Any]) -> None:
    if case["api"] != "load_backbone":
        return
    report = unimim.load_backbone(HERE / case["file"], backbone=case["timm"], **case["model_args"]).load_report
    kinds = [report.loaded, report.resized, report.renamed, report.dropped, report.unexpected, report.misshapen]
    keys = [key for kind in kinds for key in kind]
    content = read_file(HERE / case["file"])
    for entry in filter(None, report.entry.split(",")[0].split(".")):
        content = content[entry]
    assert sorted(keys) == sorted(content)
    assert all(report.renamed.values())
    assert all(report.dropped.values())


def test_a_key_that_the_file_leaves_out_hides_no_missing_one(tmp_path: Path) -> None:
    """A model's key is missing although the file has a key of that name, which its layout gives to something else."""
    (case,) = (case for case in CASES if case["name"] == "clip_state_dict_fp16")
    weights = {key: value for key, value in read_file(HERE / case["file"]).items() if not key.startswith("visual.ln_post.")}
    torch.save(weights | {"norm.weight": torch.ones(3), "norm.bias": torch.zeros(3)}, tmp_path / "clip.pth")
    with pytest.raises(ValueError, match=r"2 missing \(norm.weight, norm.bias\)"):
        unimim.load_backbone(tmp_path / "clip.pth", backbone=case["timm"], **case["model_args"])
    model = unimim.load_backbone(tmp_path / "clip.pth", backbone=case["timm"], strict=False, **case["model_args"])
    assert {*model.load_report.missing} == {"norm.weight", "norm.bias"} <= model.load_report.dropped.keys()


def test_one_of_several_state_dicts_is_chosen_and_said() -> None:
    (case,) = (case for case in CASES if case["name"] == "dino_checkpoint")
    read = {"backbone": case["timm"], **case["model_args"]}
    teacher = unimim.load_backbone(HERE / case["file"], **read)
    assert teacher.load_report.entry == "teacher, beside student (checkpoint_key takes another)"
    assert "(teacher, beside student" in str(teacher.load_report)
    student = unimim.load_backbone(HERE / case["file"], checkpoint_key="student", **read)
    assert student.load_report.entry == "student"
    assert not torch.equal(student.blocks[0].attn.qkv.weight, teacher.blocks[0].attn.qkv.weight)
    with pytest.raises(ValueError, match=r"has no entry 'ema' to take weights from \(checkpoint_key\); it has .*student"):
        unimim.load_backbone(HERE / case["file"], checkpoint_key="ema", **read)


def test_a_sign_belongs_to_one_layout() -> None:
    """No file of another code is taken for a layout's with other statistics: by the files that are here."""
    for case in CASES:
        if case["api"] == "load_backbone":
            model = unimim.load_backbone(HERE / case["file"], backbone=case["timm"], **case["model_args"])
            assert model.load_report.layout in ("", *(layout.name for layout in LAYOUTS))
            if case["name"].startswith("hf_"):
                assert model.load_report.layout.startswith("transformers'")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path, how: Any) -> None:
        self.marker, self.how = marker, how

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how, (str(self.marker),)


def write(path: str) -> dict[str, int]:
    """What a class or function of a module that is installed might do."""
    Path(path).touch()
    return {}


@pytest.mark.parametrize("how", [write, os.mkdir, Path.touch, pickle.loads], ids=["ours", "os", "method", "pickle"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_accepting_objects_beside_the_weights_opens_no_door(how: Any, zipped: bool, tmp_path: Path) -> None:
    """Whatever a pickle names, nothing of it is looked up, called or imported; the weights beside it are read or refused."""
    marker, path = tmp_path / "marker", tmp_path / "a.pth"
    content = {"model": {"norm.weight": torch.ones(2)}, "optimizer": Evil(marker, how), "list": [Evil(marker, how)]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    if how is os.mkdir:
        with pytest.raises(
            ValueError, match="is refused: its pickle holds more than tensors and plain data .posix.mkdir, which"
        ):
            read_file(path)
    else:
        read = read_file(path)
        assert torch.equal(read["model"]["norm.weight"], torch.ones(2))
        assert isinstance(read["optimizer"], dict)
    assert not marker.exists()
    if how is write:
        torch.load(path, weights_only=False)
        assert marker.exists()  # so it would have been


def test_the_commands_take_any_of_these_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the file cannot say is an option of the same name everywhere."""
    from PIL import Image

    from unimim.cli.main import main

    for split in ("train", "val"):
        for label in ("cat", "dog"):
            for number in range(3):
                path = tmp_path / "data" / split / label / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.effect_noise((40, 40), 20 + 30 * number).convert("RGB").save(path)
    monkeypatch.chdir(tmp_path)
    (case,) = (case for case in CASES if case["name"] == "dino_checkpoint")
    file, words = HERE / case["file"], ["--checkpoint_key=student", "--mean=[0.4,0.5,0.6]", "--std=[0.2,0.2,0.2]"]
    arguments = "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}"
    data = ["--data=ClassFolderData", "--data.root=data", "--data.image_size=32", "--data.batch_size=2", "--data.num_workers=0"]
    own = [f"--backbone={case['timm']}", f"--model_args={arguments}", *words]
    main(["knn", str(file), "--k=1", *data, *own])
    main(["export", str(file), "--output=student.pth", *own])
    of_model = [word.replace("--", "--model.", 1) for word in own]
    quiet = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    main(
        ["probe", "fit", "--model=LinearProbe", *of_model, f"--model.checkpoint={file}", "--model.num_classes=2", *data, *quiet]
    )
    main(["finetune", "fit", *of_model, f"--model.checkpoint={file}", "--model.num_classes=2", *data, *quiet])
    (tuned,) = tmp_path.rglob("finetune/**/*.ckpt")
    for again in (unimim.load_backbone(tuned), unimim.load_backbone(tmp_path / "student.pth")):
        assert again.pretrained_cfg["mean"] == pytest.approx((0.4, 0.5, 0.6))
    main(["finetune", "validate", f"--ckpt_path={tuned}", *data])
    capsys.readouterr()
