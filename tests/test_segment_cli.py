"""`unimim segment fit|validate|predict` and conf/segment: what is written, what a checkpoint knows, mistakes in one line."""

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from PIL import Image
from torch.nn import functional as F

from unimim import SegmentationFolderData, UperNetSegmentation
from unimim.cli.main import main
from unimim.cli.tasks import SegmentCLI, finetune, segment
from unimim.pictures.labels import palette

VIT = "vit_tiny_patch16_224"
NARROW = {"embed_dim": 24, "depth": 4, "num_heads": 2, "patch_size": 8, "img_size": 32}
CLASSES = ["background", "ant", "bee", "cat"]
SEGMENT = sorted((ROOT / "conf" / "segment").glob("*.yaml"))
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def pictures(root: Path, count: int, suffix: str = "jpg", name: str = "") -> None:
    """Noisy photos, no squares, with a bright side."""
    root.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(count)
    for i in range(count):
        pixels = generator.integers(0, 120, (40 + 3 * i, 60 - i, 3), dtype=np.uint8)
        pixels[:, 20 + i :] += 100
        Image.fromarray(pixels).save(root / f"{name}{i}.{suffix}")


def labelled(root: Path, train: int, val: int) -> Path:
    """Images with label PNGs: the bright side is a class, the rest background, a stripe ignored."""
    for split, count in (("train", train), ("val", val)):
        pictures(root / "images" / split, count)
        folder = root / "labels" / split
        folder.mkdir(parents=True)
        for i in range(count):
            label = np.zeros((40 + 3 * i, 60 - i), np.uint8)
            label[:, 20 + i :] = 1
            label[-4:] = 255
            Image.fromarray(label).save(folder / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def words_for(root: Path) -> list[str]:
    options = {"image_size": 32, "batch_size": 2, "num_workers": 0, "resize": [128, 32]}
    return [
        "--data=SegmentationFolderData",
        f"--data.root={root}",
        *[f"--data.{key}={value}" for key, value in options.items()],
        *QUIET,
    ]


class Run:
    """One training on the command line, which several tests look at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = labelled(folder / "data", train=6, val=5)
        words = [f"--model.backbone={VIT}", f"--model.model_args={NARROW}", "--model.num_classes=4", "--model.channels=8"]
        words += ["--model.lr=0.01", "--model.warmup_steps=0", "--model.flip=true", "--model.auxiliary_weight=0"]
        words += [
            "--model.stride=11",
            "--trainer.max_epochs=8",
            "--trainer.check_val_every_n_epoch=8",
            "--trainer.log_every_n_steps=1",
        ]
        self.cli = segment(["fit", *words, *words_for(self.data)])
        self.reported = {
            key: float(value) for key, value in self.cli.trainer.callback_metrics.items() if key.startswith("val/")
        }
        (self.checkpoint,) = folder.rglob("epoch=*.ckpt")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        yield Run(folder)


def test_segment_fit(run: Run) -> None:
    version = run.folder / "outputs" / "segment" / "version_0"
    assert run.cli.trainer.global_step == 24
    assert run.checkpoint.is_relative_to(version)
    assert (version / "config.yaml").is_file()
    rows = list(csv.DictReader((version / "metrics.csv").open()))
    assert len([row for row in rows if row["train/loss"]]) == 24
    assert run.reported.keys() == {"val/miou", "val/macc", "val/aacc", "val/miou_foreground"}
    assert [float(row["val/miou"]) for row in rows if row["val/miou"]][-1] == pytest.approx(run.reported["val/miou"])


def test_photos_of_any_name_are_predicted(run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Names with an escape sequence and a line break, and one that is not UTF-8; hidden ones are no photos."""
    escape, not_utf8 = "\x1b[31mred\n", os.fsdecode(b"na\xefve")
    for name in (escape, not_utf8, ".hidden"):
        pictures(tmp_path / "photos" / escape, 1, name=name)
    segment(["predict", f"--ckpt_path={run.checkpoint}", *words_for(tmp_path / "photos"), f"--output={tmp_path / 'out'}"])
    written = sorted(path.name for path in (tmp_path / "out" / escape).iterdir())
    assert written == sorted(f"{name}0_{kind}.png" for name in (escape, not_utf8) for kind in ("labels", "overlay"))
    assert "\x1b[31m" not in "".join(capfd.readouterr())


def test_segment_validate_repeats_what_training_reported(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """With nothing but the checkpoint, which also knows the head, the stride and that images are flipped."""
    cli = segment(["validate", f"--ckpt_path={run.checkpoint}", *words_for(run.data)])
    measured = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    assert measured == pytest.approx(run.reported)
    assert (cli.model.stride, cli.model.flip, cli.model.auxiliary_head) == ((11, 11), True, None)
    assert re.search(r"^class +IoU +Acc +pixels\nbackground +0\.\d+", capsys.readouterr().out, re.M)


def test_what_is_given_counts(run: Run) -> None:
    cli = segment(
        ["validate", f"--ckpt_path={run.checkpoint}", "--model.flip=false", "--model.stride=32", *words_for(run.data)]
    )
    assert (cli.model.stride, cli.model.flip) == ((32, 32), False)
    words = [
        "--model.inference=whole",
        "--model.model_args.dynamic_img_size=true",
        f"--model.backbone={VIT}",
        "--model.channels=8",
    ]
    cli = segment(["validate", f"--ckpt_path={run.checkpoint}", *words, *words_for(run.data)])
    assert cli.model.inference == "whole"
    assert cli.model.pyramid.backbone.dynamic_img_size  # beside the checkpoint's arguments
    assert cli.model.pyramid.backbone.embed_dim == 24


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (
            "--model.backbone=vit_base_patch16_224",
            f"model.backbone is vit_base_patch16_224, of TUNED it is {VIT}: leave it out",
        ),
        ("--model.num_classes=7", "model.num_classes is 7, of TUNED it is 4: leave it out"),
        ("--model.blocks=[0, 1, 2, 3]", "model.blocks is [0, 1, 2, 3], of TUNED it is None: leave it out"),
        ("--model.channels=16", "model.channels is 16, of TUNED it is 8: leave it out"),
        ("--model.auxiliary_weight=0.4", "model.auxiliary_weight is 0.4, of TUNED it is 0.0: leave it out"),
        ("--config=wide.yaml", "model.channels is 16, of TUNED it is 8: leave it out"),
        ("--model.model_args.embed_dim=48", "TUNED does not fit UperNetSegmentation, nothing was loaded: "),
    ],
)
def test_a_given_layer_is_the_checkpoints_or_refused(
    run: Run,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    word: str,
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wide.yaml").write_text("model:\n  channels: 16\n")
    line = mistake(capsys, "segment", "validate", word, f"--ckpt_path={run.checkpoint}", *words_for(run.data))
    assert expected.replace("TUNED", str(run.checkpoint)) in line


def test_a_swin_that_saw_windows_sees_whole_images_where_that_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's own recipe is given beside it, and what the command line says on top of it counts."""
    monkeypatch.chdir(tmp_path)
    data = labelled(tmp_path / "data", train=2, val=2)
    swin = {"img_size": 32, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4}
    words = ["--model.backbone=swin_tiny_patch4_window7_224", f"--model.model_args={swin}", "--model.num_classes=4"]
    segment(["fit", *words, "--model.channels=8", "--trainer.max_epochs=1", *words_for(data)])
    (checkpoint,) = tmp_path.rglob("epoch=*.ckpt")
    config = tmp_path / "outputs" / "segment" / "version_0" / "config.yaml"
    given = ["--model.inference=whole", "--model.model_args.strict_img_size=false"]
    for recipe in ([], [f"--config={config}"]):
        cli = segment(["validate", *recipe, f"--ckpt_path={checkpoint}", *given, *words_for(data)])
        assert cli.model.inference == "whole"
        assert not cli.model.pyramid.backbone.patch_embed.strict_img_size
        assert cli.model.pyramid.backbone.embed_dim == 8


def test_segment_validate_with_the_runs_own_config(run: Run) -> None:
    config = run.folder / "outputs" / "segment" / "version_0" / "config.yaml"
    cli = segment(["validate", f"--config={config}", f"--ckpt_path={run.checkpoint}"])
    assert float(cli.trainer.callback_metrics["val/miou"]) == pytest.approx(run.reported["val/miou"])


def test_a_run_goes_on(run: Run) -> None:
    words = [
        "--model.warmup_steps=0",
        "--trainer.max_epochs=9",
        "--trainer.logger=false",
        "--trainer.enable_checkpointing=false",
    ]
    cli = segment(["fit", f"--ckpt_path={run.checkpoint}", *words, *words_for(run.data)])
    assert cli.trainer.global_step == 27
    assert cli.model.lr == pytest.approx(0.01)


def test_segment_predict_writes_overlays_and_label_maps(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same name in two folders, and with two endings in one, are different photos."""
    photos, output = tmp_path / "photos", tmp_path / "predicted"
    pictures(photos, 3)
    pictures(photos, 1, "png")
    pictures(photos / "more", 2)
    output.mkdir()  # empty
    written = []
    write = UperNetSegmentation.write_prediction

    def watch(self: Any, image: Any, labels: Any, destination: Path) -> None:
        write(self, image, labels, destination)
        written.append(len(list(output.rglob("*_labels.png"))))

    monkeypatch.setattr(UperNetSegmentation, "write_prediction", watch)
    words = ["predict", f"--ckpt_path={run.checkpoint}", *words_for(photos), f"--output={output}"]
    cli = segment(words)
    assert written == [1, 2, 3, 4, 5, 6]  # one by one
    assert not cli.trainer.predict_loop.predictions
    assert f"6 photos: {output}" in capsys.readouterr().out
    names = {"0.jpg": "0.jpg", "0.png": "0.png", "1.jpg": "1", "2.jpg": "2", "more/0.jpg": "more/0", "more/1.jpg": "more/1"}
    expected = {f"{name}_{kind}.png" for name in names.values() for kind in ("overlay", "labels")}
    assert {str(file.relative_to(output)) for file in output.rglob("*.png")} == expected
    model = UperNetSegmentation.load_from_checkpoint(run.checkpoint, weights_only=True).eval()
    varied = []
    for photo, name in names.items():
        pixels = torch.from_numpy(np.array(Image.open(photos / photo))).movedim(-1, 0)[None] / 255
        height, width = pixels.shape[-2:]
        factor = 32 / min(height, width)
        seen = F.interpolate(pixels, (round(height * factor), round(width * factor)), mode="bilinear", antialias=True)
        with torch.no_grad():
            labels = F.interpolate(model(seen), (height, width), mode="bilinear").argmax(1)[0]
        picture = Image.open(output / f"{name}_labels.png")
        assert picture.mode == "L"
        assert np.mean(np.array(picture) != labels.numpy()) < 0.002  # ties in rounding
        varied.append(len(labels.unique()) > 1)
        overlay = np.array(Image.open(output / f"{name}_overlay.png"))[:height, :width]
        blended = (pixels[0].movedim(0, -1).numpy() * 255 + palette(4)[torch.from_numpy(np.array(picture)).long()].numpy()) / 2
        assert np.abs(overlay - blended).max() <= 1.01
    assert sum(varied) > 1
    before = {file: file.read_bytes() for file in output.rglob("*.png")}
    with pytest.raises(SystemExit, match=r"^unimim: error: output: .*predicted is no empty folder, and is not overwritten"):
        main(["segment", *words])
    assert {file: file.read_bytes() for file in output.rglob("*.png")} == before


def test_one_folder_of_photos_keeps_its_name(run: Run, tmp_path: Path) -> None:
    """Whatever else lies beside it."""
    pictures(tmp_path / "photos" / "2024" / "may", 1)
    output = tmp_path / "predicted"
    segment(["predict", f"--ckpt_path={run.checkpoint}", *words_for(tmp_path / "photos"), f"--output={output}"])
    assert {str(file.relative_to(output)) for file in output.rglob("*_labels.png")} == {"2024/may/0_labels.png"}


def test_photos_are_seen_in_the_size_that_the_checkpoint_knows(run: Run, tmp_path: Path) -> None:
    """That of its validation, [128, 32], and not the default of ADE20K; unless it is given."""
    pictures(tmp_path / "photos", 1)

    def sides(*words: str) -> Any:
        output = f"--output={tmp_path / str(len(list(tmp_path.iterdir())))}"
        data = ["--data=SegmentationFolderData", f"--data.root={tmp_path / 'photos'}", "--data.num_workers=0"]
        return segment(["predict", f"--ckpt_path={run.checkpoint}", *data, output, *words, *QUIET]).model.sides

    assert tuple(sides()) == (128, 32)
    assert tuple(sides("--data.resize=[64, 16]")) == (64, 16)
    scenes: dict[str, Any] = {"datamodule_hyper_parameters": {"image_size": 64}}  # that are all of one size
    assert SegmentCLI.photos_as_trained_on(scenes) == {"resize": (256, 64)}
    assert SegmentCLI.photos_as_trained_on({}) == {}


def test_segment_predict_leaves_out_a_photo_that_was_skipped(run: Run, tmp_path: Path) -> None:
    photos, output = tmp_path / "photos", tmp_path / "predicted"
    pictures(photos, 4)
    (photos / "2.jpg").write_bytes(b"no image")
    words = ["predict", f"--ckpt_path={run.checkpoint}", *words_for(photos), f"--output={output}"]
    with pytest.warns(UserWarning, match="2.jpg"):
        segment([*words, "--data.on_bad_image=skip"])
    assert sorted(file.name for file in output.glob("*_labels.png")) == ["0_labels.png", "1_labels.png", "3_labels.png"]
    assert Image.open(output / "3_labels.png").size == Image.open(photos / "3.jpg").size


# Mistakes


def mistake(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which a wrong command ends."""
    with pytest.raises(SystemExit) as end:
        main(list(words))
    assert isinstance(end.value.code, str), capsys.readouterr().err
    assert "\n" not in end.value.code
    assert end.value.code.startswith("unimim: error: ")
    assert "Traceback" not in capsys.readouterr().err
    return end.value.code


NAMED = [f"--model.backbone={VIT}", "--model.num_classes=4", f"--model.model_args={NARROW}", "--model.channels=8"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["segment", "fit"], "model.backbone is missing: a timm name"),
        (["segment", "fit", *NAMED, "--model.checkpoint=nowhere.ckpt"], "there is no file nowhere.ckpt to read weights from"),
        (
            ["segment", "fit", *NAMED, "--model.checkpoint=TUNED"],
            "is a checkpoint of segmentation, whose backbone has no final",
        ),
        (["segment", "fit", *NAMED, "--model.num_classes=5"], "the data has 4 classes, the head 5: set model.num_classes to 4"),
        (["segment", "fit", *NAMED, "--model.crop_size=64"], "model.crop_size is 64x64, but the backbone was built for 32x32"),
        (["segment", "fit", *NAMED, "--data.image_size=48"], "images are 48x48 pixels, but the backbone was built for 32x32"),
        (["segment", "fit", *NAMED, "--data.batch_size=1"], "data.batch_size is 1, but UperNet's pool of 1x1"),
        (["segment", "fit", *NAMED, "--model.inference=slid"], "inference"),
        (
            ["segment", "fit", *NAMED, "--model.layer_deccay=1"],
            "no option --model.layer_deccay. Did you mean '--model.layer_dec",
        ),
        (["segment", "fit", "--model.backbone=resnet18.a1", "--model.crop_size=32"], "timm has no weights 'resnet18.a1'"),
        (["segment", "fit", *NAMED, "--data.root=nowhere"], "nowhere"),
        (["segment", "validate"], "ckpt_path is missing: validate needs --ckpt_path FILE of a segmentation"),
        (["segment", "validate", "--ckpt_path=nowhere.ckpt"], "ckpt_path: nowhere.ckpt does not exist"),
        (["segment", "validate", "--ckpt_path=CLASSIFIER"], "is no checkpoint of segmentation that names its backbone"),
        (["segment", "predict", "--ckpt_path=TUNED", "--output=nowhere/a"], "output: there is no folder nowhere"),
        (["segment", "predict", "--ckpt_path=TUNED", "--data.root=nowhere"], "data.root: there is no folder nowhere"),
        (["segment", "predict", "--ckpt_path=TUNED", "--output=classifier.ckpt"], "output: classifier.ckpt is no empty folder"),
        (["finetune", "validate", "--ckpt_path=TUNED"], "is no checkpoint of fine-tuning that names its backbone"),
        (["segment", "vlaidate"], "there is no subcommand of segment 'vlaidate'. Did you mean 'validate'?"),
    ],
    ids=lambda value: " ".join(word for word in value if word not in NAMED) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    run: Run,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    described = {"name": VIT, "model_args": {"num_classes": 4}, "mean": [0.5] * 3, "std": [0.5] * 3}
    torch.save({"state_dict": {"backbone.a": torch.zeros(1)}, "backbone": described, "classes": CLASSES}, "classifier.ckpt")
    words = [word.replace("TUNED", str(run.checkpoint)).replace("CLASSIFIER", "classifier.ckpt") for word in words]
    off = ["--trainer.max_epochs=1", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    assert expected in mistake(capsys, *words[:2], *words_for(run.data), *off, *words[2:])
    assert not list(tmp_path.rglob("*.png"))


def test_scenes_without_labels_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--config={ROOT / 'conf' / 'segment' / 'sample.yaml'}", f"--data.root={ROOT / 'data'}", "--data.train_scenes=16"]
    off = ["--trainer.logger=false", "--trainer.enable_checkpointing=false"]
    said = mistake(capsys, "segment", "fit", *words, "--data.val_scenes=4", "--data.labelled=false", *off)
    assert "segmentation needs labels, and ScenesData gives none: set data.labelled to true" in said


def test_a_fine_tuned_classifier_is_validated_as_before(run: Run, tmp_path: Path) -> None:
    """`finetune` and `segment` take each its own checkpoints."""
    root = tmp_path / "classes"
    for name in ("ant", "bee"):
        for split in ("train", "val"):
            pictures(root / split / name, 3)
    words = ["--data=ClassFolderData", f"--data.root={root}", "--data.image_size=32", "--data.batch_size=3"]
    words += ["--data.num_workers=0", "--model.warmup_epochs=0", f"--trainer.default_root_dir={tmp_path}", *QUIET]
    keeper = ["--trainer.callbacks=ModelCheckpoint", f"--trainer.callbacks.dirpath={tmp_path}"]
    fit = [f"--model.backbone={VIT}", f"--model.model_args={NARROW}", "--model.num_classes=2", "--trainer.max_epochs=1"]
    reported = finetune(["fit", *words, *fit, *keeper, "--trainer.logger=false"]).trainer.callback_metrics["val/acc1"]
    (path,) = tmp_path.glob("*.ckpt")
    cli = finetune(["validate", *words, f"--ckpt_path={path}", "--trainer.logger=false"])
    assert cli.trainer.callback_metrics["val/acc1"] == reported


# conf/segment


every_file = pytest.mark.parametrize("path", SEGMENT, ids=lambda path: path.stem)


def recipe(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def test_there_are_the_files() -> None:
    assert {path.stem for path in SEGMENT} == {*SOURCE, "sample"}


@every_file
def test_the_header_is_a_lab_note(path: Path) -> None:
    """Its own path in the command; devices times batch are the images a step that it speaks of."""
    header = "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert re.search(r"^# Reported: \S", header, re.M)
    assert re.search(r"Ours: \S", header)
    (command,) = re.findall(r"^#   unimim (\w+) fit .*conf/(\S+)", header, re.M)
    assert command == ("segment", f"segment/{path.name}")
    if path.stem == "sample":
        return
    config = recipe(path)
    (devices,) = re.findall(r"--trainer\.devices (\d+)", header)
    (images, told, each) = re.findall(r"\((\d+) images a step, here as (\d+) devices x (\d+)", header)[0]
    batch = config["data"]["init_args"]["batch_size"]
    assert (told, int(each)) == (devices, batch)
    assert int(images) == int(devices) * batch == config["model"]["recipe_batch"]
    assert re.search(rf"lr: .*absolute, at {images} images a step", path.read_text())


SOURCE = {  # lr, layer decay, drop path, width, weight decay: the configs that each header names
    "upernet_beit_vit_base": (7e-4, 0.65, 0.1, 768, 0.05),
    "upernet_mae_vit_base": (1e-4, 0.65, 0.1, 768, 0.05),
    "upernet_vit_base": (5e-5, 0.75, 0.15, 768, 0.05),
    "upernet_vit_large": (4e-5, 0.9, 0.2, 1024, 0.05),
    "upernet_swin_base": (6e-5, 1.0, 0.3, 512, 0.01),
}


@pytest.mark.parametrize("name", SOURCE)
def test_recipes_are_the_published_ones(name: str) -> None:
    config = recipe(ROOT / "conf" / "segment" / f"{name}.yaml")
    model, data, trainer = config["model"], config["data"]["init_args"], config["trainer"]
    found = (model["lr"], model["layer_decay"], model["model_args"]["drop_path_rate"], model["channels"], model["weight_decay"])
    assert found == SOURCE[name]
    assert (model["warmup_steps"], model["warmup_ratio"], model["power"], model["auxiliary_weight"]) == (1500, 1e-6, 1.0, 0.4)
    assert model["betas"] == [0.9, 0.999]
    assert (data["batch_size"], data["image_size"], model["model_args"]["img_size"]) == (2, 512, 512)
    assert (data["resize"], data["scale"], data["flip"]) == ([2048, 512], [0.5, 2.0], 0.5)
    assert (trainer["max_steps"], trainer["val_check_interval"], trainer["sync_batchnorm"]) == (160_000, 16_000, True)
    assert "gradient_clip_val" not in trainer
    if "vit" in name:
        assert (model["inference"], model["crop_size"], model["stride"]) == ("slide", 512, 341)
        assert model["blocks"] == {"base": [3, 5, 7, 11], "large": [7, 11, 15, 23]}[name.split("_")[-1]]
        if name == "upernet_mae_vit_base":
            assert set(model["model_args"]) == {"img_size", "drop_path_rate"}  # a plain ViT
            return
        assert model["model_args"]["init_values"] == {"base": 0.1, "large": 1e-6}[name.split("_")[-1]]
        assert model["model_args"]["use_rel_pos_bias"]
        assert not model["model_args"]["use_abs_pos_emb"]
    else:
        assert model["inference"] == "whole"


@pytest.fixture(scope="module")
def small_ade20k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = labelled(tmp_path_factory.mktemp("ade20k"), train=4, val=1)
    for kind, now in (("images", "images"), ("labels", "annotations")):
        for split, published in (("train", "training"), ("val", "validation")):
            (root / now).mkdir(exist_ok=True)
            (root / kind / split).rename(root / now / published)
    for path in root.rglob("annotations/*/*.png"):
        label = np.array(Image.open(path))
        Image.fromarray(np.where(label == 255, 0, label + 1).astype(np.uint8)).save(path)
    rows = [f"{i + 1}\t0.1\t1\t1\tthing {i}, object" for i in range(150)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]))
    return root


@every_file
def test_two_steps_and_a_validation_at_small_width(
    path: Path, small_ade20k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything of the file but its width and its length; nothing is written."""
    monkeypatch.chdir(tmp_path)
    config = recipe(path)
    words = ["fit", f"--config={path}", *QUIET, "--trainer.max_epochs=-1", "--trainer.max_steps=2", "--model.channels=8"]
    words += ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.val_check_interval=2"]
    words += ["--trainer.check_val_every_n_epoch=null", "--trainer.num_sanity_val_steps=0"]
    if path.stem == "sample":
        words += [f"--data.root={ROOT / 'data'}", "--data.train_scenes=64", "--data.val_scenes=8"]
        narrow: dict[str, Any] = {}
    else:
        words += [f"--data.root={small_ade20k}", "--data.num_workers=0"]
        swin = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
        narrow = swin if "swin" in path.stem else {"embed_dim": 24, "depth": 4, "num_heads": 2}
        words += [] if "swin" in path.stem else ["--model.blocks=[0, 1, 2, 3]"]
    model_args = {**config["model"]["model_args"], **narrow}
    cli = segment([*words, f"--model.model_args={yaml.safe_dump(model_args, default_flow_style=True).strip()}"])
    assert cli.trainer.global_step == 2
    assert torch.isfinite(cli.trainer.callback_metrics["train/loss"])
    assert 0 <= cli.trainer.callback_metrics["val/miou"] <= 1
    assert isinstance(cli.datamodule, SegmentationFolderData) == (path.stem != "sample")
    assert list(tmp_path.iterdir()) == []
