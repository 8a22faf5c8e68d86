"""Which files are read, how their names are shown, and what is said of workers that fail."""

import csv
import os
import random
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from test_cli import SMALL

from unimim import ClassFolderData, FineTuning, ImageFolderData, SegmentationFolderData
from unimim.cli.main import main
from unimim.cli.tasks import SegmentCLI, cause_in_workers, finetune, in_one_line
from unimim.data import folder, listing, segmentation
from unimim.data.listing import class_folders, image_endings, image_files, labelled_files
from unimim.data.photos import read_image
from unimim.data.segmentation import read_label
from unimim.pictures.labels import overlay
from unimim.printing import printable

ESCAPE = "\x1b[31mred\x1b[0m\n"
NOT_UTF8 = os.fsdecode(b"na\xefve")


def image(path: Path, value: int = 100, size: tuple[int, int] = (40, 40)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 20, 100)).save(path)
    return path


def link(path: Path, target: Path | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def found(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in image_files(root)]


def one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """With what a command ends, in one line that a terminal can show."""
    with pytest.raises(SystemExit) as end:
        main(words)
    said = end.value.code
    assert isinstance(said, str)
    assert said.startswith("unimim: error: ")
    assert said.isprintable()
    assert "Traceback" not in capsys.readouterr().err
    return said


# Which files


@pytest.mark.parametrize("seed", range(4))
def test_any_tree_is_listed_as_a_literal_walk_of_real_folders_lists_it(tmp_path: Path, seed: int) -> None:
    """The order is that of paths: the reference sorts what pathlib finds."""
    draw = random.Random(seed)
    folders = [tmp_path]
    for number in range(12):
        folders.append(draw.choice(folders) / draw.choice(["a", "b-c", "b", "B", "z.png", f"n{number}"]))
        folders[-1].mkdir(exist_ok=True)
    for place in folders:
        for name in draw.sample(["a.png", "b.JPG", "b-c.jpeg", "a b.webp", "notes.txt", "c.tif", "d.ppm", "e.bmp"], 4):
            (place / name).touch()
    known = {".png", ".jpg", ".jpeg", ".webp", ".tif", ".ppm", ".bmp"}
    expected = sorted(path for path in tmp_path.rglob("*") if path.is_file() and path.suffix.lower() in known)
    assert image_files(tmp_path) == expected


def test_links_are_followed_and_each_folder_is_listed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Loops to itself, to the root and above; a second link; a link to what lies within."""
    root = tmp_path / "root"
    for name in ("a/1.png", "b/2.png"):
        image(root / name)
    image(tmp_path / "elsewhere" / "deep" / "3.png")
    image(tmp_path / "sibling.png")
    links = {"a/loop": ".", "a/up": "..", "b/above": tmp_path, "c": "a", "d": tmp_path / "elsewhere", "e": "d/deep"}
    for name, target in links.items():
        link(root / name, target)
    link(tmp_path / "elsewhere" / "deep" / "back", root)
    with caplog.at_level("INFO"):
        assert found(root) == ["a/1.png", "b/2.png", "d/deep/3.png"]
    said = "linked to a folder that is listed already or lies above (a/loop, ...)"
    assert f"3 images in 3 folders of {root}; passed over: 6 {said}" in caplog.text
    link(tmp_path / "subset" / "n01", root / "a")  # a folder of links, as subsets of ImageNet are made
    link(tmp_path / "subset" / "n02", root / "b")
    assert found(tmp_path / "subset") == ["n01/1.png", "n02/2.png"]  # n01/up leads above itself
    link(tmp_path / "files" / "0.png", root / "a" / "1.png")
    link(tmp_path / "files" / "1.png", root / "a" / "1.png")
    assert found(tmp_path / "files") == ["0.png", "1.png"]  # links to files are files


def test_what_is_passed_over_is_counted_and_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("1.png", "._1.png", ".thumbs/1.png", ".ipynb_checkpoints/2.png", "__MACOSX/1.png", "no/x.png"):
        image(tmp_path / name)
    (tmp_path / "no" / ".nomedia").touch()
    for name in ("notes.txt", "b.xmp", "c.TXT", "README", ".DS_Store", "paper.pdf", "figure.eps"):
        (tmp_path / name).touch()
    link(tmp_path / "gone.png", "nowhere.png")
    link(tmp_path / "itself", "itself")
    os.mkfifo(tmp_path / "pipe.png")
    link(tmp_path / "zero.png", "/dev/zero")
    with caplog.at_level("INFO"):
        assert found(tmp_path) == ["1.png"]
    (record,) = caplog.records
    over = record.getMessage().removeprefix(f"1 image in 1 folder of {tmp_path}; passed over: ")
    parts = [
        "4 hidden (._1.png, ...)",
        "1 with a file .nomedia (no)",
        "2 linked to nothing (gone.png, ...)",
        "2 neither file nor folder (pipe.png, ...)",
        "6 of other endings (.txt 2, .eps 1, .pdf 1, .xmp 1, none 1)",
    ]
    for part in parts:
        assert part in over
    assert len(", ".join(parts)) == len(over)
    empty = tmp_path / "empty"
    image(empty / ".hidden.png")
    with pytest.raises(FileNotFoundError, match=r"no image in or below .*empty \(.*passed over: 1 hidden \(.hidden.png\)"):
        image_files(empty)


def test_a_folder_that_cannot_be_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As for a user without permission, which root has."""
    image(tmp_path / "a" / "1.png")
    image(tmp_path / "b" / "2.png")
    scandir = os.scandir

    def closed(path: Any) -> Any:
        if Path(path).name in ("b", "train"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(listing.os, "scandir", closed)
    with caplog.at_level("INFO"):
        assert found(tmp_path) == ["a/1.png"]
    assert "passed over: 1 not readable (b: Permission denied)" in caplog.text
    (tmp_path / "train").mkdir()
    with pytest.raises(OSError, match=r"data.root: .*train cannot be read \(Permission denied\)"):
        class_folders(tmp_path / "train")


def test_what_pillow_reads_as_a_photo_is_read(tmp_path: Path) -> None:
    for kind in ("gif", "avif", "jp2", "jfif", "jpe", "qoi", "tga", "pbm"):
        image(tmp_path / f"a.{kind}")
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (200, 10)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name in ("a.pdf", "a.eps", "a.ps", "a.h5", "a.mpg", "a.wmf", "a.pfm", "a.psd"):
        (tmp_path / name).touch()
    assert found(tmp_path) == sorted(["a.gif", "a.avif", "a.jp2", "a.jfif", "a.jpe", "a.qoi", "a.tga", "a.pbm", "moving.gif"])
    assert all(read_image(path).mode == "RGB" for path in image_files(tmp_path))
    assert np.asarray(read_image(tmp_path / "moving.gif"))[0, 0, 0] > 190  # the first frame
    torchvisions = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}
    assert torchvisions < image_endings()


def test_hidden_folders_are_no_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            image(tmp_path / split / name / "1.png")
    for name in (".ipynb_checkpoints", ".git", "__MACOSX"):
        image(tmp_path / "train" / name / "1.png")
    image(tmp_path / "train" / "stray.png")
    link(tmp_path / "train" / "all", "..")
    assert class_folders(tmp_path / "train") == ["cat", "dog"]
    data = ClassFolderData(str(tmp_path), 16, batch_size=2, num_workers=0)
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert data.classes == ["cat", "dog"]
    assert data.splits["train"].labels == [0, 1]
    first, second = (record.getMessage() for record in caplog.records)
    over = "3 hidden (.git, ...), 1 beside the class folders (stray.png), 1 linked to a folder that is listed already or lies"
    over += " above (all)"
    assert first == f"2 images in 2 folders of {tmp_path}/train; passed over: {over}"
    assert second == f"2 images in 2 folders of {tmp_path}/val"
    image(tmp_path / "train" / "cat" / "2.png")
    caplog.clear()
    with caplog.at_level("INFO"):
        files, labels = labelled_files(tmp_path / "train", ["cat", "dog"], per_class=1)
    assert labels == [0, 1]
    assert [path.name for path in files] == ["1.png", "1.png"]
    assert "(2 of them are taken, by data.labels_per_class)" in caplog.text


def test_a_fifo_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    link(tmp_path / "b.png", "a.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "c.png"))
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(ValueError, match=rf"unreadable image .*{name} \(neither a file nor a link to one\)"):
            read_image(tmp_path / name)
        with pytest.raises(ValueError, match=rf"unreadable label .*{name} \(neither a file nor a link to one\)"):
            segmentation.read_label(tmp_path / name)


# Bits


def deep(path: Path, highest: int, color: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.linspace(0, highest, 1600).reshape(40, 40).astype(np.uint16)).save(path)
    return path


def test_twelve_bits_in_sixteen_come_out_as_bright_as_eight(tmp_path: Path) -> None:
    pixels = np.array([[0, 15, 16, 2048, 4095, 4096, 65535]], dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / "deep.png")
    assert np.asarray(read_image(tmp_path / "deep.png", 12))[0, :, 1].tolist() == [0, 0, 1, 128, 255, 255, 255]
    root = tmp_path / "root"
    for split in ("train", "val"):
        deep(root / split / "a" / "0.png", 4095)
        deep(root / split / "b" / "0.png", 4095)
    deep(tmp_path / "seg/images/train/0.png", 4095)
    label = Image.fromarray(np.tile([[0, 1]], (40, 20)).astype(np.uint8))
    (tmp_path / "seg/labels/train").mkdir(parents=True)
    label.save(tmp_path / "seg/labels/train/0.png")
    for bits, brightest in ((16, 15 / 255), (12, 1.0)):
        whole = {"crop_scale": (1.0, 1.0), "flip": 0.0, "num_workers": 0, "bit_depth": bits}
        data = ImageFolderData(str(root), 40, batch_size=2, **whole)
        data.setup()
        assert float(data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0).max()) == pytest.approx(brightest)
        assert float(data.pictured(1).max()) <= brightest * 1.1
        assert float(next(iter(data.labelled_dataloader("val")))[0].max()) >= 0.9 * brightest
        folders = ClassFolderData(str(root), 40, batch_size=2, auto_augment=None, crop_pct=1.0, color_jitter=0.0, **whole)
        folders.setup("fit")
        images, _ = next(iter(folders.val_dataloader()))
        assert float(images.max()) == pytest.approx(brightest)
        folders.setup("predict")
        assert float(next(iter(folders.predict_dataloader())).max()) == pytest.approx(brightest)
        files = segmentation.LabelledImageFiles(
            segmentation.image_label_pairs(tmp_path / "seg/images/train", tmp_path / "seg/labels/train"),
            lambda image, label: (image, label),
            ["a", "b"],
            [0, 1],
            bit_depth=bits,
        )
        assert int(files[0][0].max()) == round(255 * brightest)


@pytest.mark.parametrize(
    ("highest", "bit_depth", "said"),
    [
        (4095, 16, "values up to 4095 .*nearly black where white is 65535: if they have 12 bits, give --data.bit_depth 12"),
        (16383, 16, "give --data.bit_depth 14"),
        (4095, 12, None),
        (40000, 16, None),
        (40000, 12, "partly clipped to white where white is 4095: if they have 16 bits, give --data.bit_depth 16"),
        (0, 16, None),
    ],
)
def test_bits_that_do_not_fit_are_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, highest: int, bit_depth: int, said: str | None
) -> None:
    for i in range(20):
        deep(tmp_path / f"{i}.png", highest)
    image(tmp_path / "z.jpg")
    data = ImageFolderData(str(tmp_path), 16, batch_size=2, num_workers=2, bit_depth=bit_depth)
    with caplog.at_level("INFO"):
        data.setup()
        list(data.train_dataloader())
    lines = [record.getMessage() for record in caplog.records if "16-bit" in record.getMessage()]
    assert len(lines) == (said is not None)
    if said is not None:
        assert re.search(said, lines[0])


def test_bits_are_said_once_for_all_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "val"):
        for name in ("a", "b"):
            deep(tmp_path / split / name / "0.png", 4095)
    for i in range(2):
        for split in ("train", "val"):
            deep(tmp_path / f"images/{split}/{i}.png", 4095)
            label = Image.fromarray(np.tile([[0, 1]], (40, 20)).astype(np.uint8))
            (tmp_path / "labels" / split).mkdir(parents=True, exist_ok=True)
            label.save(tmp_path / f"labels/{split}/{i}.png")
    for data in (
        ClassFolderData(str(tmp_path), 16, 2, 0),
        SegmentationFolderData(str(tmp_path), ["a", "b"], 16, num_workers=0),
    ):
        for stage in ("fit", "validate", "predict"):
            caplog.clear()
            with caplog.at_level("INFO"):
                data.setup(stage)
            assert caplog.text.count("give --data.bit_depth 12") == 1


# Names


def test_what_a_terminal_cannot_show_is_written_as_python_writes_it() -> None:
    assert printable("plain é 猫 \\n 'quoted'") == "plain é 猫 \\n 'quoted'"
    assert printable(ESCAPE) == r"\x1b[31mred\x1b[0m\n"
    assert printable(NOT_UTF8) == r"na\udcefve"
    for code in range(0x3000):
        shown = printable(chr(code))
        assert shown.isprintable()
        assert shown == (chr(code) if chr(code).isprintable() else repr(chr(code))[1:-1])
        assert printable(shown) == shown


def strange_classes(root: Path) -> list[str]:
    names = ["cat", ESCAPE, NOT_UTF8]
    for split in ("train", "val"):
        for name in names:
            for i in range(2):
                image(root / split / name / f"{i}.png", 80 * i)
    return names


def test_predictions_of_any_name_are_written_and_come_back(tmp_path: Path) -> None:
    model = FineTuning(
        "vit_tiny_patch16_224", None, 3, {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    )
    model.classes = ["cat", ESCAPE, NOT_UTF8]
    files = [tmp_path / name for name in (f"{NOT_UTF8}.png", f"{ESCAPE}.png", 'a "b", c\r.png', "é.png", "plain.png")]
    batches = [(torch.rand(5, 3), torch.tensor([[0, 1, 2]] * 5))]
    assert model.write_predictions(files, batches, tmp_path / "out.csv", [False] * 5) == 5
    with (tmp_path / "out.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [Path(row["file"]) for row in rows] == files
    assert [row["label_2"] for row in rows] == [ESCAPE] * 5
    assert [row["label_3"] for row in rows] == [NOT_UTF8] * 5
    assert b"na\xefve.png" in (tmp_path / "out.csv").read_bytes()  # as the file system has it


def test_finetuning_with_strange_names_from_fit_to_predict(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    root = tmp_path / "data"
    names = strange_classes(root)
    words = [
        "--data=ClassFolderData", f"--data.root={root}", "--data.image_size=16", "--data.batch_size=2", "--data.num_workers=0",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    small = "{img_size: 16, patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"
    model = ["--model.backbone=vit_tiny_patch16_224", f"--model.model_args={small}", "--model.num_classes=3"]
    main(["finetune", "fit", *model, *words, "--trainer.max_epochs=1", "--data.bit_depth=12"])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    photos = image(tmp_path / "photos" / ESCAPE / f"{NOT_UTF8}.png").parent.parent
    words[1] = f"--data.root={photos}"
    cli = finetune(["predict", f"--ckpt_path={checkpoint}", *words, "--output=out.csv"])
    assert cli.datamodule.splits["predict"].bit_depth == 12  # as in training
    with (tmp_path / "out.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as opened:
        (row,) = csv.DictReader(opened)
    assert Path(row["file"]) == photos / ESCAPE / f"{NOT_UTF8}.png"
    assert {row["label_1"], row["label_2"], row["label_3"]} == set(names)
    assert "\x1b[31m" not in "".join(capfd.readouterr()) + caplog.text
    assert f"6 images in 3 folders of {root}/train" in caplog.text
    fitted = {"datamodule_hyper_parameters": {"bit_depth": 12, "resize": (8, 4)}}
    assert SegmentCLI.photos_as_trained_on(fitted) == {"bit_depth": 12, "resize": (8, 4)}
    said = one_line(["finetune", "predict", f"--ckpt_path={checkpoint}", *words, f"--output={tmp_path}/{ESCAPE}/x"], capfd)
    assert r"there is no folder" in said


def test_a_strange_name_in_a_mistake_is_shown_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also from a worker, of whose traceback the last line is shown."""
    for i in range(3):
        image(tmp_path / f"{i}.png")
    (tmp_path / f"{ESCAPE}{NOT_UTF8}.png").write_bytes(b"no image")
    for workers in (0, 1):
        said = one_line(["pretrain", *SMALL, f"--data.root={tmp_path}", f"--data.num_workers={workers}"], capsys)
        assert rf"unreadable image {tmp_path}/\x1b[31mred\x1b[0m\nna\udcefve.png" in said
        assert "data.on_bad_image=skip goes on without it" in said


def test_the_legend_of_strange_classes(tmp_path: Path) -> None:
    labels = torch.zeros(20, 20, dtype=torch.long)
    pictures = [overlay(torch.rand(3, 20, 20), labels, [name, "b"]) for name in (ESCAPE, NOT_UTF8)]
    assert all(picture.height > 20 for picture in pictures)


# Workers


@pytest.mark.parametrize("more", [[], ["--cache=cached"], ["--trainer.callbacks+=KNNCallback", "--trainer.callbacks.k=2"]])
def test_a_first_file_that_is_corrupt_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        for i in range(4):
            image(tmp_path / "photos" / split / "a" / f"{i}.png")
        (tmp_path / "photos" / split / "a" / "0.png").write_bytes(b"no image")
    said = one_line(["pretrain", *SMALL, f"--data.root={tmp_path / 'photos'}", *more], capsys)
    assert "a/0.png (cannot identify image file" in said
    assert "Sampler" not in said


def in_a_worker(act: Callable[[], Any]) -> Callable[..., Any]:
    """Instead of a photo's pixels, what a worker's process does when it reads one."""

    def opened(path: Path) -> Any:
        assert torch.utils.data.get_worker_info() is not None
        return act()

    return opened


@pytest.mark.parametrize(
    ("act", "timeout", "expected"),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            60,
            ["was killed", "killed by signal: Killed", "fewer --data.num_workers"],
        ),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), 60, ["too little shared memory", "Bus error", "--shm-size"]),
        (lambda: os._exit(3), 60, ["a worker of the data ended", "exited unexpectedly"]),
        (lambda: time.sleep(30), 1, ["no batch in the time of data.timeout", "timed out after 1", "--data.timeout"]),
    ],
)
def test_workers_that_fail_are_one_line_with_the_fix(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    act: Callable[[], Any],
    timeout: int,
    expected: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        image(tmp_path / "photos" / f"{i}.png")
    monkeypatch.setattr("unimim.training.resume.check_loader", lambda trainer: None)  # reads one here
    monkeypatch.setattr(folder, "opened", in_a_worker(act))
    words = ["pretrain", *SMALL, f"--data.root={tmp_path / 'photos'}", "--data.num_workers=1", f"--data.timeout={timeout}"]
    said = one_line([*words, "--pictures=false"], capsys)
    for part in expected:
        assert part in said
    if timeout == 60:
        monkeypatch.setenv("UNIMIM_TRACEBACK", "1")
        with pytest.raises(RuntimeError, match="DataLoader"):
            main([*words, "--pictures=false"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("unable to write to file </torch_12_3_0>: No space left on device (28)", "too little shared memory"),
        ("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)", "--shm-size"),
        ("unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files (24)", "ulimit -n"),
    ],
)
def test_torchs_words_of_shared_memory(words: str, expected: str) -> None:
    def fail(text: str) -> None:
        raise RuntimeError(text)

    traced = f'Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n  File "x"\nRuntimeError: {words}\n'
    for text in (words, traced):
        with pytest.raises(SystemExit, match=expected):
            in_one_line(lambda text=text: fail(text))
    assert cause_in_workers(RuntimeError("out of resource: shared memory, Required: 1")) == ""  # a GPU's kernel
    assert cause_in_workers(ValueError(words)) == ""


def test_timeouts_are_the_loaders(tmp_path: Path) -> None:
    for i in range(3):
        for split in ("train", "val"):
            image(tmp_path / split / "a" / f"{i}.png")
    for workers, expected in ((0, 0), (1, 600)):
        for data in (ImageFolderData(str(tmp_path), 16, 2, workers), ClassFolderData(str(tmp_path), 16, 2, workers)):
            data.setup("fit")
            assert data.train_dataloader().timeout == expected
            assert data.labelled_dataloader("val").timeout == expected
    for wrong in ({"timeout": -1}, {"bit_depth": 7}, {"bit_depth": 17}):
        for kind in (ImageFolderData, ClassFolderData, SegmentationFolderData):
            with pytest.raises(ValueError, match=f"data.{next(iter(wrong))} is"):
                kind(str(tmp_path), **wrong)


def test_no_program_reads_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow tells a format by its content, and gives EPS to Ghostscript, also where the file calls itself a PNG."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.eps")
    evil = (tmp_path / "a.eps").rename(tmp_path / "a.png")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("a program was run"))
    with pytest.raises(ValueError, match="unreadable image"):
        read_image(evil)
    with pytest.raises(ValueError, match="unreadable label"):
        read_label(evil)
