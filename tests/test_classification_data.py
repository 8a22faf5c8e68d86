"""Labelled class folders: the validation transform by hand, augmentations, labels, and one line for each wrong folder."""

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor

from unimim import ClassFolderData
from unimim.data.classification import timm_transform

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
PLAIN: dict[str, Any] = {"auto_augment": None, "color_jitter": 0.0, "flip": 0.0}
COLORS = {"ant": (200, 10, 10), "bee": (10, 200, 10), "cat": (10, 10, 200)}


def photo(path: Path, color: tuple[int, int, int] | None = None, size: tuple[int, int] = (50, 40)) -> Path:
    """One colour, or noise; the suffix is the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, color or (0, 0, 0))
    if color is None:
        random_pixels = np.random.default_rng(len(path.name)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        image = Image.fromarray(random_pixels).resize(size)
    image.save(path)
    return path


def folders(root: Path, train: dict[str, int], val: dict[str, int]) -> Path:
    """So many photos in each class folder, in the class's colour."""
    for split, classes in (("train", train), ("val", val)):
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                photo(root / split / name / f"{i}.jpg", COLORS.get(name, (90, 90, 90)))
    return root


def data_of(root: Path, **options: Any) -> ClassFolderData:
    return ClassFolderData(str(root), **{"image_size": 32, "batch_size": 2, "num_workers": 0, **options})


def seeded(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def pixels_of(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def resized_and_cropped(path: Path, side: int, crop_pct: float) -> Tensor:
    """The shorter side to side / crop_pct, the longer in proportion, both rounded down; then the centre."""
    image = Image.open(path)
    short = math.floor(side / crop_pct)
    width, height = image.size
    scaled = (short, int(short * height / width)) if width <= height else (int(short * width / height), short)
    left, top = round((scaled[0] - side) / 2), round((scaled[1] - side) / 2)
    return pixels_of(image.resize(scaled, Image.Resampling.BICUBIC).crop((left, top, left + side, top + side)))


@pytest.mark.parametrize("crop_pct", [0.875, 0.7, 1.0])
@pytest.mark.parametrize("size", [(71, 50), (40, 93), (60, 60), (20, 25)])
def test_validation_images_are_resized_by_crop_pct_and_cropped(tmp_path: Path, size: tuple[int, int], crop_pct: float) -> None:
    folders(tmp_path, {"ant": 1, "bee": 1}, {"bee": 1})
    path = photo(tmp_path / "val" / "ant" / "noise.png", size=size)
    data = data_of(tmp_path, crop_pct=crop_pct)
    data.setup("validate")
    (images, labels) = next(iter(data.val_dataloader()))
    assert images.dtype == torch.float32
    assert labels.tolist() == [0, 1]
    assert images.max() > 0.5
    torch.testing.assert_close(images[0], resized_and_cropped(path, 32, crop_pct), rtol=0, atol=1e-6)


def test_training_images_are_in_0_to_1_and_of_the_size(tmp_path: Path) -> None:
    folders(tmp_path, {"bee": 2}, {"ant": 1, "bee": 1})
    for i in range(6):
        photo(tmp_path / "train" / "ant" / f"{i}.png", size=(60 + i, 33))
    data = data_of(tmp_path, batch_size=4)
    data.setup("fit")
    seeded(0)
    batches = list(data.train_dataloader())
    assert [(len(images), tuple(images.shape[1:])) for images, _ in batches] == [(4, (3, 32, 32))] * 2  # 8 images
    images = torch.cat([images for images, _ in batches])
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert 0.5 < images.max() <= 1


def test_every_image_has_the_label_of_its_folder(tmp_path: Path) -> None:
    """Colours tell the class; the order of the labels is that of the names."""
    folders(tmp_path, {"cat": 5, "ant": 3, "bee": 4}, {"bee": 2, "cat": 1, "ant": 3})
    data = data_of(tmp_path, batch_size=3, **PLAIN)
    data.setup("fit")
    assert data.classes == ["ant", "bee", "cat"]
    seeded(0)
    for loader, count in ((data.train_dataloader(), [3, 4, 5]), (data.val_dataloader(), [3, 2, 1])):
        seen = [0, 0, 0]
        for images, labels in loader:
            brightest = images.mean((2, 3)).argmax(1)  # ant is red, bee green, cat blue
            assert torch.equal(brightest, labels)
            for label in labels.tolist():
                seen[label] += 1
        assert seen == count
    loader, orders = data.train_dataloader(), []
    for epoch in range(4):
        loader.sampler.set_epoch(epoch)
        orders.append(torch.cat([labels for _, labels in loader]).tolist())
    assert orders[0] != sorted(orders[0]) or orders[1] != sorted(orders[1])  # shuffled
    assert len({tuple(order) for order in orders}) > 1


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "v0", "augmix-m10"])
def test_an_image_of_which_no_bit_is_kept_is_black(policy: str) -> None:
    """timm posterizes to 0 bits at its highest magnitude, which Pillow 13 refuses."""
    parts = timm_transform(32, is_training=True, auto_augment=policy).transforms[0].transforms
    pairs = [pair for part in parts for pair in (getattr(part, "ops", []), *getattr(part, "policy", []))]
    posterizing = [operation for pair in pairs for operation in pair if "Posterize" in operation.name]
    assert posterizing
    white = Image.new("RGB", (40, 40), "white")
    for operation in posterizing:
        operation.prob, operation.magnitude_std = 1, 0
        operation.magnitude = 10 if operation.name == "PosterizeIncreasing" else 0
        assert operation(white).getextrema() == ((0, 0),) * 3
        operation.magnitude = 5
        assert operation(white).getextrema() == ((192, 192),) * 3


def test_the_augmentation_is_timms_by_hand(tmp_path: Path) -> None:
    """Crop, flip and RandAugment in this order, under the same seeds."""
    image = Image.open(photo(tmp_path / "noise.png", size=(64, 48))).convert("RGB")
    data = data_of(tmp_path, crop_scale=(0.3, 0.5), flip=0.5)
    crop = RandomResizedCropAndInterpolation(32, (0.3, 0.5), interpolation="bicubic")
    settings = {"translate_const": 14, "img_mean": (124, 116, 104), "interpolation": Image.Resampling.BICUBIC}
    rand_augment = rand_augment_transform(RAND_AUGMENT, settings)
    flips = 0
    for number in range(20):
        seeded(number)
        augmented = data.augmentation(image)
        seeded(number)
        expected = crop(image)
        if torch.rand(1) < 0.5:
            expected, flips = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT), flips + 1
        torch.testing.assert_close(augmented, pixels_of(rand_augment(expected)), rtol=0, atol=1e-6)
    assert 0 < flips < 20


def test_rand_augment_and_colour_jitter_are_on_and_off(tmp_path: Path) -> None:
    image = Image.open(photo(tmp_path / "noise.png", size=(64, 48))).convert("RGB")
    kinds = {
        "augmented": data_of(tmp_path, flip=0.0),
        "jittered": data_of(tmp_path, flip=0.0, auto_augment=None),
        "plain": data_of(tmp_path, **PLAIN),
    }
    crop = RandomResizedCropAndInterpolation(32, (0.08, 1.0), interpolation="bicubic")
    changed = {"augmented": 0, "jittered": 0, "plain": 0}
    for number in range(20):
        seeded(number)
        cropped = pixels_of(crop(image))
        for kind, data in kinds.items():
            seeded(number)
            changed[kind] += not torch.allclose(data.augmentation(image), cropped, atol=1e-6)
    assert changed["plain"] == 0
    assert changed["augmented"] >= 10  # two operations, each with probability 1/2, and some of them change nothing
    assert changed["jittered"] == 20


def stray(root: Path, *names: str) -> Path:
    """Photos beside the class folders."""
    for name in names:
        photo(root / name, (90, 90, 90))
    return root


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda root: folders(root, {}, {"ant": 1}), ["{root}/train", "no train"]),
        (lambda root: folders(root, {"ant": 1}, {}), ["{root}/val", "no val"]),
        (lambda root: root / "nowhere", ["{root}/nowhere"]),
        (
            lambda root: stray(folders(root, {"ant": 1, "bee": 1}, {}), "val/1.jpg", "val/2.jpg", "val/3.jpg"),
            ["{root}/val has 3 images", "no folder a class"],
        ),
        (
            lambda root: stray(folders(root, {}, {"ant": 1, "bee": 1}), "train/1.jpg", "train/2.jpg"),
            ["{root}/train has 2 images", "no folder a class"],
        ),
        (lambda root: folders(root, {"ant": 2, "bee": 2}, {"ant": 1, "bee": 0}), ["no image", "{root}/val/bee"]),
        (lambda root: folders(root, {"ant": 2, "bee": 0}, {"ant": 1, "bee": 1}), ["no image", "{root}/train/bee"]),
        (
            lambda root: folders(root, {"ant": 2, "bee": 2}, {"ant": 1, "cat": 1}),
            ["2 classes in train, 2 in val", "only in train: bee", "only in val: cat"],
        ),
        (
            lambda root: folders(root, {"ant": 2, "bee": 2, "cat": 1}, {"ant": 1, "cat": 1}),
            ["3 classes in train, 2 in val", "only in train: bee"],
        ),
        (
            lambda root: folders(root, {"bee": 2}, {"ant": 1, "bee": 1, "cat": 1}),
            ["1 classes in train, 3 in val", "only in val: ant, cat"],
        ),
    ],
    ids=["no train", "no val", "no root", "flat val", "flat train", "empty val class", "empty train class", "other classes",
         "fewer in val", "fewer in train"],
)  # fmt: skip
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_wrong_folder_is_one_line_that_says_what_was_found(
    tmp_path: Path, make: Any, expected: list[str], stage: str
) -> None:
    root = make(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError)) as refused:
        data_of(root).setup(stage)
    said = str(refused.value)
    assert "\n" not in said
    assert "data.root" in said
    for words in expected:
        assert words.format(root=tmp_path) in said


def test_a_train_folder_that_exists_and_is_empty(tmp_path: Path) -> None:
    folders(tmp_path, {}, {"ant": 1})
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match=f"no image in or below {tmp_path}/train"):
        data_of(tmp_path).setup("fit")


def test_labels_per_class_takes_the_first_by_name_of_train_only(tmp_path: Path) -> None:
    folders(tmp_path, {"ant": 3, "bee": 5, "cat": 1}, {"ant": 4, "bee": 4, "cat": 4})
    data = data_of(tmp_path, labels_per_class=2)
    data.setup("fit")
    found = [(path.parent.name, path.name) for path in data.splits["train"].files]
    assert found == [("ant", "0.jpg"), ("ant", "1.jpg"), ("bee", "0.jpg"), ("bee", "1.jpg"), ("cat", "0.jpg")]
    assert data.splits["train"].labels == [0, 0, 1, 1, 2]
    assert len(data.splits["val"]) == 12
    assert [len(labels) for _, labels in data.labelled_dataloader("train")] == [2, 2, 1]


def test_too_few_images_for_a_batch(tmp_path: Path) -> None:
    folders(tmp_path, {"ant": 3, "bee": 2}, {"ant": 1, "bee": 1})
    with pytest.raises(ValueError, match=r"train has 5 images, .* one batch of 6: set data.batch_size to 5 or less"):
        data_of(tmp_path, batch_size=6).setup("fit")
    data_of(tmp_path, batch_size=5).setup("fit")
    data_of(tmp_path, batch_size=6).setup("validate")  # validation has no last batch to drop
    with pytest.raises(ValueError, match=r"train has 2 images.* one batch of 5"):
        data_of(tmp_path, batch_size=5, labels_per_class=1).setup("fit")


def test_unreadable_files_are_named_or_skipped_with_the_label_of_the_next(tmp_path: Path) -> None:
    """The substitute is of the next class, so its label has to come along."""
    folders(tmp_path, {"ant": 2, "bee": 1}, {"ant": 1, "bee": 1})
    broken = tmp_path / "train" / "ant" / "1.jpg"
    broken.write_bytes(b"no image")
    data = data_of(tmp_path, batch_size=3, **PLAIN)
    data.setup("fit")
    with pytest.raises(ValueError, match=f"unreadable image {broken}"):
        list(data.train_dataloader())
    data = data_of(tmp_path, batch_size=3, on_bad_image="skip", **PLAIN)
    data.setup("fit")
    with pytest.warns(UserWarning, match=f"skipped: unreadable image {broken}"):
        ((images, labels),) = data.train_dataloader()
    assert sorted(labels.tolist()) == [0, 1, 1]
    assert torch.equal(images.mean((2, 3)).argmax(1), labels)
    with pytest.warns(UserWarning, match=r"1 of 3 image files in .* \(train\) could not be read"):
        data.teardown("fit")


def test_any_folder_of_photos_for_predict_in_the_order_of_its_files(tmp_path: Path) -> None:
    names = ["b.jpg", "a.png", "c.jpg", "sub/0.jpg", "10.jpg", "9.jpg"]
    shades = {name: (40 * i, 40 * i, 40 * i) for i, name in enumerate(names)}
    for name, shade in shades.items():
        photo(tmp_path / name, shade)
    (tmp_path / "notes.txt").write_text("no photo")
    data = data_of(tmp_path, batch_size=4)
    data.setup("predict")
    files = [str(path.relative_to(tmp_path)) for path in data.splits["predict"].files]
    assert files == sorted(names)
    batches = list(data.predict_dataloader())
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 32, 32), (2, 3, 32, 32)]
    found = torch.cat(batches).mean((1, 2, 3)) * 255
    assert found.tolist() == pytest.approx([shades[name][0] for name in files], abs=2)
    by_hand = [resized_and_cropped(tmp_path / name, 32, 0.875) for name in files]
    torch.testing.assert_close(torch.cat(batches), torch.stack(by_hand), rtol=0, atol=1e-6)


def test_features_come_from_plain_images_in_a_fixed_order(tmp_path: Path) -> None:
    """`labelled_dataloader` neither augments nor draws random numbers."""
    folders(tmp_path, {"ant": 2, "bee": 3}, {"ant": 2, "bee": 1})
    path = photo(tmp_path / "train" / "ant" / "0.png", size=(64, 48))
    data = data_of(tmp_path)
    data.setup("validate")
    state = torch.get_rng_state()
    once, again = (list(data.labelled_dataloader("train")) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert [labels.tolist() for _, labels in once] == [[0, 0], [0, 1], [1, 1]]
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(once, again, strict=True))
    place = sorted(["0.png", "0.jpg", "1.jpg"]).index("0.png")
    images = torch.cat([images for images, _ in once])
    torch.testing.assert_close(images[place], resized_and_cropped(path, 32, 0.875), rtol=0, atol=1e-6)
    assert [labels.tolist() for _, labels in data.labelled_dataloader("val")] == [[0, 0], [1]]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"image_size": 0}, "image_size 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"num_workers": -1}, "num_workers -1"),
        ({"labels_per_class": 0}, "labels_per_class 0"),
        ({"crop_scale": (0.5, 0.2)}, "(0.5, 0.2)"),
        ({"crop_scale": (0.0, 1.0)}, "(0.0, 1.0)"),
        ({"flip": 1.5}, "1.5"),
        ({"crop_pct": 0.0}, "0.0"),
        ({"crop_pct": 1.2}, "1.2"),
        ({"color_jitter": -0.4}, "color_jitter"),
        ({"auto_augment": "rnd-m9"}, "auto_augment"),
        ({"auto_augment": "rand-x9"}, "auto_augment"),
    ],
    ids=str,
)
def test_impossible_numbers(tmp_path: Path, wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)) as refused:
        data_of(tmp_path, **wrong)
    assert "\n" not in str(refused.value)
