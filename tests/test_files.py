"""Nothing that comes out of a file runs code or is followed, and no damaged file is taken for a good one."""

import copy
import json
import os
import pickle
import random
import socket
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from conftest import narrow_recipe
from PIL import Image
from safetensors.torch import save_file
from test_cli import SMALL
from timm.models import _builder
from torch.distributed import checkpoint as sharded

import unimim
from unimim.cli.main import main
from unimim.training.checkpoints import is_whole, recipe_in
from unimim.weights.files import CHECKSUM, check_plain, checksum, read_file, save

VIT = "vit_tiny_patch16_224"
ARGUMENTS = "{img_size: 32, patch_size: 8, embed_dim: 24, depth: 4, num_heads: 2}"
NARROW = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
QUIET = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--data.num_workers=0"]
FOUR = ["--model.num_classes=2", "--data.batch_size=4", "--data.image_size=32", *QUIET]


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def process(marker: Path) -> dict[str, Any]:
    """A class that writes a file when it is made, as a configuration names it."""
    return {"class_path": "subprocess.Popen", "init_args": {"args": f"touch {marker}", "shell": True}}


@dataclass
class World:
    """A folder with data of every kind, and a checkpoint of each task."""

    folder: Path

    def __post_init__(self) -> None:
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                for number in range(2):
                    path = self.folder / "classes" / split / name / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (40, 36), (60 * number, 20, 100)).save(path)
            for kind, mode in (("images", "RGB"), ("labels", "L")):
                for number in range(2):
                    path = self.folder / "maps" / kind / split / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.new(mode, (40, 36), 1 if mode == "L" else (60 * number, 20, 100)).save(path)
        (self.folder / "maps" / "classes.txt").write_text("ground\nsky\n")
        named = [f"--model.backbone={VIT}", f"--model.model_args={ARGUMENTS}"]
        deep = [word.replace("depth: 1", "depth: 4") for word in SMALL]
        self.small = [*deep, "--data.root=classes", "--pictures=false"]
        self.segmenting = ["--data=SegmentationFolderData", "--data.root=maps", "--data.batch_size=2", "--data.image_size=32"]
        main(["pretrain", *self.small])
        self.checkpoints = {"pretrain": self.newest()}
        main(["finetune", "fit", *named, "--data=ClassFolderData", "--data.root=classes", *FOUR])
        self.checkpoints["finetune"] = self.newest()
        heads = ["--model.channels=8", "--model.auxiliary_weight=0", "--model.num_classes=2"]
        main(["segment", "fit", *named, *heads, *self.segmenting, *QUIET])
        self.checkpoints["segment"] = self.newest()
        main(["probe", "fit", *self.probing(self.checkpoints["pretrain"])])
        self.checkpoints["probe"] = self.newest()

    def newest(self) -> Path:
        """The checkpoint that was written last."""
        return max(self.folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)

    def probing(self, backbone: Path) -> list[str]:
        return ["--model=LinearProbe", f"--model.backbone={backbone}", "--data=ClassFolderData", "--data.root=classes", *FOUR]

    def content(self, task: str) -> dict[str, Any]:
        content = torch.load(self.checkpoints[task], weights_only=True)
        del content[CHECKSUM]  # whoever changes a file can write another one
        return content


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield World(folder)


ENTRIES: dict[str, tuple[str, Callable[[World, Path], object]]] = {
    "pretrain fit --ckpt_path": ("pretrain", lambda w, f: main(["pretrain", *w.small, f"--ckpt_path={f}"])),
    "finetune fit --model.checkpoint": (
        "pretrain",
        lambda w, f: main(["finetune", "fit", f"--model.backbone={VIT}", f"--model.checkpoint={f}", "--data=ClassFolderData",
                           "--data.root=classes", *FOUR]),
    ),
    "finetune fit --ckpt_path": (
        "finetune",
        lambda w, f: main(["finetune", "fit", f"--ckpt_path={f}", "--data=ClassFolderData", "--data.root=classes", *FOUR]),
    ),
    "finetune validate --ckpt_path": (
        "finetune",
        lambda w, f: main(["finetune", "validate", f"--ckpt_path={f}", "--data=ClassFolderData", "--data.root=classes",
                           "--data.image_size=32", "--data.num_workers=0"]),
    ),
    "finetune predict --ckpt_path": (
        "finetune",
        lambda w, f: main(["finetune", "predict", f"--ckpt_path={f}", "--data=ClassFolderData", "--data.root=classes/val",
                           "--data.image_size=32", "--data.num_workers=0", f"--output={f.parent / 'predictions.csv'}"]),
    ),
    "segment fit --model.checkpoint": (
        "pretrain",
        lambda w, f: main(["segment", "fit", f"--model.backbone={VIT}", f"--model.checkpoint={f}", "--model.channels=8",
                           "--model.auxiliary_weight=0", "--model.num_classes=2", *w.segmenting, *QUIET]),
    ),
    "segment fit --ckpt_path": (
        "segment",
        lambda w, f: main(["segment", "fit", f"--ckpt_path={f}", *w.segmenting, *QUIET]),
    ),
    "segment predict --ckpt_path": (
        "segment",
        lambda w, f: main(["segment", "predict", f"--ckpt_path={f}", "--data=SegmentationFolderData",
                           "--data.root=maps/images/val", "--data.num_workers=0", f"--output={f.parent / 'pictures'}"]),
    ),
    "probe fit --model.backbone": ("pretrain", lambda w, f: main(["probe", "fit", *w.probing(f)])),
    "probe fit --ckpt_path": (
        "probe",
        lambda w, f: main(["probe", "fit", *w.probing(w.checkpoints["pretrain"]), f"--ckpt_path={f}"]),
    ),
    "knn": (
        "pretrain",
        lambda w, f: main(["knn", str(f), "--k=1", "--data=ImageFolderData", "--data.root=classes", "--data.image_size=32",
                           "--data.batch_size=2", "--data.num_workers=0"]),
    ),
    "export": ("finetune", lambda w, f: main(["export", str(f), f"--output={f.parent / 'exported.pth'}"])),
    "--model.teacher.weights": (
        "pretrain",
        lambda w, f: main(["pretrain", *(word for word in w.small if "teacher" not in word), "--model.teacher=FeatureTarget",
                           f"--model.teacher.network={VIT}", f"--model.teacher.weights={f}"]),
    ),
    "--model.teacher.codebook": (
        "pretrain",
        lambda w, f: main(["pretrain", *(word for word in w.small if "teacher" not in word), "--model.teacher=CodebookTarget",
                           "--model.teacher.features=PixelTarget", "--model.teacher.features.patch_size=8",
                           f"--model.teacher.codebook={f}", "--model.loss=torch.nn.CrossEntropyLoss",
                           "--model.normalization=torch.nn.Identity"]),
    ),
    "load_backbone": ("pretrain", lambda w, f: unimim.load_backbone(f)),
    "MaskedImageModeling.load_from_checkpoint": (
        "pretrain",
        lambda w, f: unimim.MaskedImageModeling.load_from_checkpoint(f),
    ),
    "FineTuning.load_from_checkpoint": ("finetune", lambda w, f: unimim.FineTuning.load_from_checkpoint(f)),
    "UperNetSegmentation.load_from_checkpoint": (
        "segment",
        lambda w, f: unimim.UperNetSegmentation.load_from_checkpoint(f),
    ),
    "LinearProbe.load_from_checkpoint": (
        "probe",
        lambda w, f: unimim.LinearProbe.load_from_checkpoint(f, backbone=str(w.checkpoints["pretrain"])),
    ),
}  # fmt: skip


def said_by(run: Callable[[], object]) -> str:
    """The line with which a command or a call ends; nothing where it ends well."""
    try:
        run()
    except SystemExit as end:
        return end.code if isinstance(end.code, str) else "ended without a word\n"
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return ""


def with_backbone(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    if "backbone" in content:
        content["backbone"] = {**content["backbone"], **changes}
    return content


def in_every_dict(content: Any, evil: Any) -> Any:
    """The content with `evil` in each of its dicts, and in place of each plain value of the hyperparameters."""
    if isinstance(content, dict) and content and not any(isinstance(value, torch.Tensor) for value in content.values()):
        return {**{key: in_every_dict(value, evil) for key, value in content.items()}, "act_layer": evil}
    return content


PAYLOADS: dict[str, Callable[[dict[str, Any], Path, Path], object]] = {
    "a pickle that runs": lambda c, path, marker: torch.save({**c, "extra": Touch(marker)}, path),
    "an old pickle that runs": lambda c, path, marker: torch.save(
        {**c, "extra": Touch(marker)}, path, _use_new_zipfile_serialization=False
    ),
    "a class in model_args": lambda c, path, marker: torch.save(
        with_backbone(c, model_args={**NARROW, "act_layer": process(marker)}), path
    ),
    "a class as the name": lambda c, path, marker: torch.save(with_backbone(c, name=process(marker)), path),
    "a hub as the name": lambda c, path, marker: torch.save(with_backbone(c, name="hf-hub:owner/name"), path),
    "a folder as the name": lambda c, path, marker: torch.save(with_backbone(c, name=f"local-dir:{marker.parent}"), path),
    "a class in every dict": lambda c, path, marker: torch.save(
        {key: value if key == "state_dict" else in_every_dict(value, process(marker)) for key, value in c.items()}, path
    ),
    "a class for each hyperparameter": lambda c, path, marker: torch.save(
        {**c, "hyper_parameters": dict.fromkeys(c["hyper_parameters"], process(marker))}, path
    ),
    "functions by name": lambda c, path, marker: torch.save(
        {**c, "hyper_parameters": c["hyper_parameters"] | dict.fromkeys(("head", "loss", "teacher"), "os.abort")}, path
    ),
    "an instantiator": lambda c, path, marker: torch.save(
        {**c, "hyper_parameters": {**c["hyper_parameters"], "_instantiator": "os.system", "_class_path": "subprocess.Popen"}},
        path,
    ),
    "a class as the data's settings": lambda c, path, marker: torch.save(
        {**c, "datamodule_hyper_parameters": dict.fromkeys(("resize", "image_size", "root"), process(marker))}, path
    ),
}  # fmt: skip


@pytest.mark.parametrize("payload", [*PAYLOADS, "TorchScript"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_no_file_runs_code(
    entry: str, payload: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either one line, or what the file says there is of no use for this command and stays data."""
    task, enter = ENTRIES[entry]
    path, marker = tmp_path / "from_a_stranger.ckpt", tmp_path / "marker"
    if payload == "TorchScript":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    else:
        PAYLOADS[payload](copy.deepcopy(world.content(task)), path, marker)
    for door in ("load_state_dict_from_url", "load_state_dict_from_hf"):
        monkeypatch.setattr(_builder, door, lambda *args, **kwargs: marker.touch())
    monkeypatch.setattr(os, "abort", lambda *args: marker.touch())
    refused = said_by(lambda: enter(world, path))
    assert not marker.exists()
    assert "\n" not in refused
    assert str(path) in refused or "model." in refused or not refused
    if "pickle" in payload or payload == "TorchScript":
        assert refused, "an object in a pickle is never passed over"
    elif payload in ("a class in model_args", "a class as the name", "a hub as the name", "a folder as the name"):
        reads_it = entry not in ("pretrain fit --ckpt_path", "probe fit --ckpt_path", "LinearProbe.load_from_checkpoint")
        assert (
            not reads_it
            or "backbone.model_args.act_layer is refused: it is the class 'subprocess.Popen'" in refused
            or ("backbone.name is refused" in refused)
        )
    elif "load_from_checkpoint" in entry and payload == "a class for each hyperparameter":
        assert "refused: it is the class 'subprocess.Popen'" in refused or "hyper_parameters.checkpoint is refused" in refused
    elif entry == "MaskedImageModeling.load_from_checkpoint" and payload == "functions by name":
        assert refused
    capsys.readouterr()


def test_the_payloads_would_run_if_they_were_let(tmp_path: Path) -> None:
    """What the tests above look for does happen where a file is trusted."""
    from jsonargparse import ArgumentParser

    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Touch(marker)))
    assert marker.exists()
    marker.unlink()
    parser = ArgumentParser()
    parser.add_argument("--model_args", type=dict[str, Any])
    parser.instantiate_classes(parser.parse_object({"model_args": {"act_layer": process(marker)}})).model_args[
        "act_layer"
    ].wait()
    assert marker.exists()


def test_what_a_good_checkpoint_names_is_made(world: World, tmp_path: Path) -> None:
    """Each class of a configuration, with its arguments, as the command line made it."""
    path = world.checkpoints["pretrain"]
    model = unimim.MaskedImageModeling.load_from_checkpoint(path)
    weights = world.content("pretrain")["state_dict"]
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert (type(model.teacher), model.teacher.patch_size, model.masking.ratio) == (unimim.PixelTarget, 8, 0.4)
    again = unimim.MaskedImageModeling.load_from_checkpoint(path, masking=unimim.RandomMasking(0.75), lr=0.25)
    assert (type(again.masking), again.lr) == (unimim.RandomMasking, 0.25)
    content = world.content("pretrain")
    content["hyper_parameters"]["teacher"]["class_path"] = "mytarget.MeanColor"
    torch.save(content, tmp_path / "own.ckpt")
    with pytest.raises(
        ValueError, match=r"hyper_parameters.teacher is refused: it is the class 'mytarget.MeanColor'.+teacher="
    ):
        unimim.MaskedImageModeling.load_from_checkpoint(tmp_path / "own.ckpt")
    given = unimim.MaskedImageModeling.load_from_checkpoint(tmp_path / "own.ckpt", teacher=unimim.PixelTarget(8))
    assert type(given.teacher) is unimim.PixelTarget


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "conf/pretrain").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_made_again_of_its_checkpoint(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hyperparameters of every recipe: all its classes are let, and no argument is lost."""
    monkeypatch.chdir(tmp_path)
    root = Path(__file__).parent.parent
    narrow = narrow_recipe(path, tmp_path)
    words = ["--config", str(narrow), "--config", str(root / "conf/debug.yaml"), "--trainer.enable_progress_bar=false"]
    from unimim.cli.tasks import PretrainCLI, in_one_line, settings

    class Made(PretrainCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            """Nothing is run."""

    cli = in_one_line(lambda: Made(unimim.MaskedImageModeling, **settings("pretrain"), args=["fit", *words]))
    cli.trainer.strategy.connect(cli.model)
    cli.model.trainer = cli.trainer
    cli.trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again = unimim.MaskedImageModeling.load_from_checkpoint(tmp_path / "a.ckpt")
    assert repr(again) == repr(cli.model)
    theirs = cli.model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": "abc"}, "model.lr: Expected a <class 'float'>. Got value: abc"),
        ({"channels": [1]}, "model.channels: Expected a <class 'int'>. Got value: [1]"),
        ({"blocks": "x"}, "model.blocks: Expected a <class 'list'>"),
        (None, "is no checkpoint of segmentation that names its backbone"),
    ],
)
def test_hyperparameters_of_another_type_are_one_line(
    changes: dict[str, Any] | None, said: str, world: World, tmp_path: Path
) -> None:
    content = world.content("segment")
    if changes is None:
        del content["hyper_parameters"]
    else:
        content["hyper_parameters"].update(changes)
    torch.save(content, tmp_path / "a.ckpt")
    line = said_by(lambda: ENTRIES["segment predict --ckpt_path"][1](world, tmp_path / "a.ckpt"))
    assert line.startswith(f"unimim: error: {'ckpt_path: ' if changes is None else ''}{tmp_path / 'a.ckpt'} is ")
    assert said in line
    assert "\n" not in line


def test_a_class_in_model_args_is_refused_in_a_config_and_a_sweep_too(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    evil = json.dumps({**NARROW, "act_layer": process(marker)})
    (tmp_path / "evil.yaml").write_text(f"model: {{student: {{init_args: {{model_args: {evil}}}}}}}\n")
    sweep = {"method": "grid", "metric": {"name": "train/loss"}, "parameters": {}}
    parameters = {"config": {"value": SMALL[2]}, "model.student.model_args": {"value": evil}}
    (tmp_path / "sweep.yaml").write_text(json.dumps({**sweep, "parameters": parameters}))
    (tmp_path / "tag.yaml").write_text(f"model: !!python/object/apply:os.system ['touch {marker}']\n")
    commands = {
        "a --config": ["pretrain", *world.small, f"--config={tmp_path / 'evil.yaml'}"],
        "a word": ["finetune", "fit", f"--model.backbone={VIT}", f"--model.model_args={evil}", "--data=ClassFolderData",
                   "--data.root=classes", *FOUR],
        "a sweep": ["sweep", str(tmp_path / "sweep.yaml"), *world.small[3:]],
        "a tag in a --config": ["pretrain", "fit", f"--config={tmp_path / 'tag.yaml'}"],
        "a tag in a sweep": ["sweep", str(tmp_path / "tag.yaml")],
    }  # fmt: skip
    for words in commands.values():
        with pytest.raises(SystemExit) as end:
            main([*words[:2], *(word for word in words[2:] if not word.startswith("--model.student.model_args"))])
        assert isinstance(end.value.code, str)
        assert "\n" not in end.value.code
        assert "is the class 'subprocess.Popen'" in end.value.code or (
            "no YAML" in end.value.code and "tag:yaml.org,2002:python/object/apply:os.system" in end.value.code
        )
        assert not marker.exists()


def test_a_library_is_not_shadowed_by_the_working_directory(tmp_path: Path) -> None:
    """`unimim` finds a user's own module, but no einops.py in the folder, however it is started."""
    (tmp_path / "einops.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "mine.py").write_text("import torch\nclass Mine(torch.nn.Identity):\n    pass\n")
    console = [str(Path(sys.executable).with_name("unimim"))]
    for start in (console, [sys.executable, "-m", "unimim"]):
        words = ["pretrain", "fit", "--config", SMALL[2], "--model.normalization=mine.Mine", "--print_config"]
        done = subprocess.run([*start, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "class_path: mine.Mine" in done.stdout


def evil_states(victim: Path) -> dict[str, dict[str, Any]]:
    """What a stranger may write into the state of ModelCheckpoint, so that it removes the victim."""
    up = f"outputs/pretrain/version_0/checkpoints/../../../../{victim.name}"
    return {
        "another file system": {"dirpath": f"local://{victim.parent}", "best_model_path": f"local://{victim}"},
        "another file system for the last": {"last_model_path": f"local://{victim}"},
        "up and down": {"best_model_path": up, "last_model_path": up, "best_k_models": {up: torch.tensor(0.0)}},
        "itself": {"dirpath": str(victim.parent), "best_model_path": str(victim), "last_model_path": str(victim)},
    }


@pytest.mark.parametrize("state", evil_states(Path("/x/victim")))
@pytest.mark.parametrize("known", [True, False], ids=["with a folder", "without"])
def test_the_state_of_modelcheckpoint_removes_nothing_elsewhere(
    state: str, known: bool, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning removes the files that a checkpoint calls its best and last ones, once it has saved others."""
    monkeypatch.chdir(tmp_path)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").touch()
    content = world.content("pretrain")
    (name,) = (name for name in content["callbacks"] if name.startswith("ModelCheckpoint"))
    content["callbacks"][name].update(evil_states(victim)[state])
    if not known:
        content["callbacks"][name].pop("dirpath")
    torch.save(content, "evil.ckpt")
    further = [word.replace("max_epochs=1", "max_epochs=3") for word in world.small]
    root = f"--data.root={world.folder / 'classes'}"
    main(["pretrain", *(root if word.startswith("--data.root") else word for word in further), "--ckpt_path=evil.ckpt"])
    assert list(tmp_path.rglob("epoch=2-*.ckpt"))  # it went on, and saved
    assert (victim / "thesis.tex").is_file()


def test_a_run_in_a_folder_above_goes_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own checkpoints have `..` in their paths, and the older one is removed as before."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    root = f"--data.root={world.folder / 'classes'}"
    words = [root if word.startswith("--data.root") else word for word in world.small]
    main(["pretrain", *words, "--trainer.logger.save_dir=../runs"])
    further = [word.replace("max_epochs=1", "max_epochs=2") for word in words]
    main(["pretrain", *further, "--trainer.logger.save_dir=../runs", "--resume=auto"])
    assert [path.name[:8] for path in (tmp_path / "runs").rglob("epoch=1*.ckpt")] == ["epoch=1-"]


@pytest.mark.parametrize("places", ["hyper_parameters", "hparams", "module_arguments"])
def test_hyperparameters_reach_no_network_and_no_folder(
    places: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm would fetch weights from any address, and write them into any folder: by arguments, and by Lightning's old keys."""
    asked: list[object] = []
    monkeypatch.setattr(_builder, "load_state_dict_from_url", lambda *args, **kwargs: asked.append(args))
    monkeypatch.setattr(_builder, "load_state_dict_from_hf", lambda *args, **kwargs: asked.append(args))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: asked.append(args))
    overlay = {"url": f"file://{tmp_path}/a.pth", "hf_hub_id": None}
    evil = [
        {"model_args": {**NARROW, "pretrained_cfg_overlay": overlay, "cache_dir": str(tmp_path / "written")}},
        {"network": "hf-hub:owner/name"},
        {"network": "/etc/passwd"},
    ]
    for arguments in evil:
        content = world.content("pretrain")
        teacher = {"class_path": "unimim.FeatureTarget", "init_args": {"network": f"{VIT}.augreg_in21k", **arguments}}
        content[places] = {**content["hyper_parameters"], "teacher": teacher, "checkpoint": str(tmp_path / "other.pth")}
        if places == "hyper_parameters":
            content[places].pop("checkpoint")
        torch.save(content, tmp_path / "evil.ckpt")
        line = said_by(lambda: unimim.MaskedImageModeling.load_from_checkpoint(tmp_path / "evil.ckpt"))
        assert ("cannot hold pretrained_cfg_overlay" in line or "network is refused" in line) == (places == "hyper_parameters")
        tuned = world.content("finetune")
        tuned[places] = {**tuned["hyper_parameters"], "backbone": "hf-hub:owner/name"}
        torch.save(tuned, tmp_path / "evil.ckpt")
        line = said_by(lambda: unimim.FineTuning.load_from_checkpoint(tmp_path / "evil.ckpt"))
        assert ("backbone is refused" in line) == (places == "hyper_parameters")
    assert not asked
    assert not (tmp_path / "written").exists()


def test_plain_data_has_an_end() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="is refused: it is a list"):
        check_plain(endless, "x")
    check_plain({"a": [1, 2.5, None, True, ("b", {"c": "d"})]}, "x")
    for value in (object(), {1.5: 2}, {"a": torch.zeros(1)}, {"a": [{"class_path": "x"}]}):
        with pytest.raises(ValueError, match="x"):
            check_plain(value, "x")


# Shards


def shards(folder: Path, **extra: Any) -> Path:
    """A folder as ModelParallelStrategy writes it, with an object in one of its parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded.save({"state_dict": {"a": torch.randn(30, 4), "b": torch.arange(5)}, "step": 7, **extra}, checkpoint_id=folder)
    torch.save({"recipe": {"model": {"lr": 0.1}}, "hyper_parameters": {}}, folder / "meta.pt")
    return folder


def test_good_shards_are_whole(tmp_path: Path) -> None:
    assert is_whole(shards(tmp_path / "good"))
    assert recipe_in(tmp_path / "good") == {"model": {"lr": 0.1}}
    with pytest.raises(ValueError, match="is a folder of shards: make it one file with"):
        read_file(tmp_path / "good")


@pytest.mark.parametrize("place", [".metadata", "a part", "meta.pt"])
def test_shards_run_no_code(place: str, world: World, tmp_path: Path) -> None:
    """By `--ckpt_path`, `--resume auto`, and where they are taken for a file of weights."""
    folder = tmp_path / "runs" / "x" / "version_0" / "checkpoints" / "epoch=0-step=9.ckpt"
    marker = tmp_path / "marker"
    shards(folder, **({"evil": Touch(marker)} if place == "a part" else {}))
    if place != "a part":
        torch.save({"recipe": Touch(marker)}, folder / "meta.pt") if place == "meta.pt" else (folder / place).write_bytes(
            pickle.dumps(Touch(marker))
        )
    strategy = [
        "--trainer.strategy=ModelParallelStrategy",
        "--trainer.logger.name=x",
        f"--trainer.logger.save_dir={tmp_path / 'runs'}",
    ]
    for words in ([*strategy, f"--ckpt_path={folder}"], [*strategy, "--resume=auto"], [f"--model.teacher.weights={folder}"]):
        base = (
            [*world.small, "--model.teacher=FeatureTarget", f"--model.teacher.network={VIT}"]
            if "weights" in words[0]
            else world.small
        )
        base = [word for word in base if "weights" not in words[0] or not word.startswith("--model.teacher.patch_size")]
        assert "\n" not in said_by(lambda: main(["pretrain", *base, *words]))  # noqa: B023 (it is run at once)
        assert not marker.exists(), words
    assert not is_whole(folder)


def test_shards_with_a_flipped_bit(tmp_path: Path) -> None:
    """No flip changes a tensor and stays unseen."""
    folder, draw = shards(tmp_path / "good"), random.Random(0)
    expected = read_back(folder)
    files = sorted(path for path in folder.iterdir())
    unseen = 0
    for _ in range(200):
        path = draw.choice(files)
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        os.utime(folder / "meta.pt")
        if is_whole(folder):
            unseen += 1
            assert read_back(folder) in ("refused", expected), path
        path.write_bytes(content)
    assert unseen < 100


def read_back(folder: Path) -> dict[str, Any] | str:
    state = {"state_dict": {"a": torch.zeros(30, 4), "b": torch.zeros(5, dtype=torch.long)}, "step": 0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            sharded.load(state, checkpoint_id=folder)
        except sharded.api.CheckpointException:  # the name of a part: torch itself finds none of that name
            return "refused"
    weights = {key: value.tolist() for key, value in state["state_dict"].items()}
    return {**state, "state_dict": weights, "meta": torch.load(folder / "meta.pt", weights_only=True)}


# Damage


def equal(one: Any, other: Any) -> bool:
    """Whether two contents are the same, tensors bit for bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        same_kind = one.shape == other.shape and one.dtype == other.dtype
        return same_kind and torch.equal(one.flatten().view(torch.uint8), other.flatten().view(torch.uint8))
    return one == other or (one != one and other != other)


def flips(path: Path, count: int) -> Iterator[bytes]:
    """The file with one byte changed; half of them in its last tenth, where a zip has its directory."""
    content, draw = path.read_bytes(), random.Random(0)
    for number in range(count):
        first = 0 if number % 2 else len(content) * 9 // 10
        place = draw.randrange(first, len(content))
        yield content[:place] + bytes([content[place] ^ draw.randrange(1, 256)]) + content[place + 1 :]


@pytest.mark.parametrize("kind", ["our checkpoint", "a file of torch.save", "our export", "our export as safetensors"])
def test_two_hundred_flips_change_nothing_in_silence(kind: str, world: World, tmp_path: Path) -> None:
    """By reference: what is accepted equals, bit for bit, what was written."""
    path = world.checkpoints["finetune"]
    if kind.startswith("our export"):
        ending, form = (".safetensors", "safetensors") if "safetensors" in kind else (".pth", "timm")
        path = unimim.export(path, tmp_path / f"good{ending}", form)
    elif kind == "a file of torch.save":
        path = tmp_path / "good.pth"
        torch.save(world.content("finetune")["state_dict"], path)
    expected = read_file(path)
    flipped, refused = tmp_path / f"flipped{path.suffix}", 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in flips(path, 200):
            flipped.write_bytes(content)
            try:
                accepted = read_file(flipped)
            except ValueError:
                refused += 1
            else:
                assert equal(accepted, expected)
    assert refused > 100


@pytest.mark.parametrize("ours", [True, False], ids=["with a checksum", "without"])
def test_what_is_whole_is_read_as_it_was_written(ours: bool, tmp_path: Path) -> None:
    """A flip in every byte of a small file, and in every bit of its directory: by torch.load, also of a mapped file.

    By one bit of an entry, which zipfile passes over, torch reads other bytes.
    """
    path, flipped, draw = tmp_path / "good.pth", tmp_path / "flipped.pth", random.Random(0)
    good = {"a": torch.ones(3, 3), "b": torch.ones(2)}
    (save if ours else torch.save)(good, path)
    content, expected = path.read_bytes(), torch.load(path, weights_only=True)
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    places = [(place, draw.randrange(8)) for place in range(start)]
    places += [(place, bit) for place in range(start, len(content)) for bit in range(8)]
    others = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place, bit in places:
            flipped.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            if is_whole(flipped):
                assert equal(torch.load(flipped, weights_only=True), expected), (place - start, bit)
                assert equal(torch.load(flipped, weights_only=True, mmap=True), expected), (place - start, bit)
            else:
                others += reads_otherwise(flipped, expected)
    assert others >= 2


def reads_otherwise(path: Path, expected: Any) -> bool:
    """Whether torch alone reads a file without an error, and something else in it."""
    try:
        return not equal(torch.load(path, weights_only=True), expected)
    except Exception:
        return False


def test_resume_falls_back_to_a_good_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 400 damaged newest files, none is gone on from with other content, and none ends the run."""
    from unimim.cli.tasks import first_of

    good, newest = tmp_path / "epoch=0-step=1.ckpt", tmp_path / "epoch=0-step=2.ckpt"
    recipe = {"seed_everything": 0, "model": {"lr": 0.1}, "data": {"class_path": "unimim.ImageFolderData"}}
    weights = {"student.norm.weight": torch.randn(7), "head.weight": torch.randn(5, 7)}
    save({"recipe": recipe, "state_dict": weights, "optimizer_states": [{"step": torch.ones(())}]}, good)
    expected, taken = torch.load(good, weights_only=True), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for content in flips(good, 400):
            newest.write_bytes(content)
            path, _ = first_of(recipe, [newest, good])
            assert path is not None
            taken += path == newest
            assert path == good or equal(torch.load(newest, weights_only=True), expected)
    assert 0 < taken < 200
    capsys.readouterr()


@pytest.mark.parametrize("task", ["pretrain", "finetune", "segment", "probe"])
def test_a_run_does_not_go_on_from_a_damaged_file(task: str, world: World, tmp_path: Path) -> None:
    """By `--ckpt_path`, and by a Trainer in Python that knows nothing of it."""
    entry = next(enter for name, (of, enter) in ENTRIES.items() if of == task and "fit --ckpt_path" in name)
    content = bytearray(world.checkpoints[task].read_bytes())
    with zipfile.ZipFile(world.checkpoints[task]) as archive:
        largest = max(archive.infolist(), key=lambda one: one.file_size)
        inside = largest.header_offset + 30 + len(largest.filename) + 64 + largest.file_size // 2
    content[inside] ^= 1
    (tmp_path / "damaged.ckpt").write_bytes(content)
    with pytest.raises(SystemExit) as end:
        entry(world, tmp_path / "damaged.ckpt")
    assert "damaged.ckpt is damaged (" in str(end.value.code)
    if task == "finetune":
        model = unimim.FineTuning(VIT, num_classes=2, model_args=NARROW, warmup_epochs=0)
        data = unimim.ClassFolderData("classes", image_size=32, batch_size=4, num_workers=0)
        trainer = pl.Trainer(accelerator="cpu", max_epochs=3, logger=False, enable_checkpointing=False)
        with pytest.raises(ValueError, match="damaged.ckpt is damaged"):
            trainer.fit(model, data, ckpt_path=tmp_path / "damaged.ckpt")


def test_checksums_travel_and_files_without_one_are_read(tmp_path: Path) -> None:
    weights = {"b": torch.randn(3).bfloat16(), "a": torch.randn(2, 2).t(), "c": torch.randn(2, dtype=torch.cfloat).conj()}
    content = {"state_dict": weights, "optimizer": [{"step": torch.tensor(3), "moments": (torch.ones(2), None)}]}
    save(content, tmp_path / "a.ckpt")
    read = read_file(tmp_path / "a.ckpt")
    assert equal(read["state_dict"]["b"], weights["b"])
    assert torch.equal(read["state_dict"]["c"], weights["c"])
    torch.save({**content, CHECKSUM: checksum(content) ^ 1}, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="b.ckpt is damaged .*delete its entry 'unimim.checksum'"):
        read_file(tmp_path / "b.ckpt")
    torch.save({**content, "checksum": "sha256:0"}, tmp_path / "theirs.ckpt")
    assert read_file(tmp_path / "theirs.ckpt")["checksum"] == "sha256:0"
    save_file({"x": torch.ones(2)}, tmp_path / "foreign.safetensors", {"checksum": "abc"})
    assert read_file(tmp_path / "foreign.safetensors")["x"].sum() == 2


def test_crcs_are_written_and_what_the_checksum_leaves_out_is_verified_by_them(tmp_path: Path) -> None:
    """torch can be told to write no CRCs; a sparse tensor is in no checksum."""
    torch.serialization.set_crc32_options(False)
    try:
        save({"x": torch.eye(3).to_sparse()}, tmp_path / "a.ckpt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    content = (tmp_path / "a.ckpt").read_bytes()
    one = torch.ones(3).numpy().tobytes()  # the values on its diagonal
    assert content.count(one) == 1
    (tmp_path / "b.ckpt").write_bytes(content.replace(one, torch.full((3,), 2.0).numpy().tobytes()))
    assert read_file(tmp_path / "a.ckpt")["x"].to_dense().trace() == 3
    with pytest.raises(ValueError, match="b.ckpt is damaged"):
        read_file(tmp_path / "b.ckpt")
