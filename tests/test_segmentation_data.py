"""Images with label maps: both move together, the crop's rule and the distortion by reference, and a line for each mistake."""

import colorsys
import io
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from torch import Tensor, distributed
from torchvision import tv_tensors
from torchvision.transforms import v2

from unimim import ADE20KData, SegmentationFolderData
from unimim.data import segmentation
from unimim.data.segmentation import read_names
from unimim.data.segmentation_transforms import FitImage, PadTo, PhotometricDistortion, RandomScale, VariedCrop, fit
from unimim.shapes import IGNORED

CLASSES = ["road", "tree", "sky", "car", "house"]
OPTIONS: dict[str, Any] = {"classes": CLASSES, "image_size": 32, "batch_size": 2, "num_workers": 0, "resize": (160, 40)}


def save_pair(
    root: Path, split: str, name: str, label: np.ndarray, suffix: str = ".png", folders: Sequence[str] = ("images", "labels")
) -> tuple[Path, Path]:
    """An image that says its label in its own grey, 50 times the label, and the label."""
    image, png = root / folders[0] / split / f"{name}{suffix}", root / folders[1] / split / f"{name}.png"
    for path in (image, png):
        path.parent.mkdir(parents=True, exist_ok=True)
    grays = np.where(label == 255, 0, label) * 50
    Image.fromarray(np.stack([grays] * 3, axis=-1).astype(np.uint8)).save(image)
    Image.fromarray(label.astype(np.uint8)).save(png)
    return image, png


def quarters(height: int, width: int, values: Sequence[int] = (0, 1, 2, 3)) -> np.ndarray:
    label = np.empty((height, width), dtype=int)
    rows, columns = slice(None, height // 2), slice(None, width // 2)
    label[:] = values[3]
    label[rows] = values[1]
    label[:, columns] = values[2]
    label[rows, columns] = values[0]
    return label


def folder(root: Path, train: int = 3, val: int = 2, size: tuple[int, int] = (40, 60)) -> Path:
    for split, count in (("train", train), ("val", val)):
        for i in range(count):
            save_pair(root, split, f"{i}", quarters(*size))
    return root


def data_of(root: Path, **options: Any) -> SegmentationFolderData:
    return SegmentationFolderData(str(root), **{**OPTIONS, **options})


def tensors(label: np.ndarray) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """The image that encodes its label, [3 H W], and the label [H W], both uint8."""
    mask = torch.from_numpy(label).to(torch.uint8)
    return tv_tensors.Image((mask.where(mask != IGNORED, 0) * 50).expand(3, -1, -1).clone()), tv_tensors.Mask(mask)


# Image and label together


def ramps(height: int, width: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Red is twice the column and green twice the row of each pixel; the label is the number of its 12x12 block."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (
        tv_tensors.Image(torch.stack([2 * x, 2 * y, 0 * x]).to(torch.uint8)),
        tv_tensors.Mask((y // 12 * 8 + x // 12).to(torch.uint8)),
    )


def astray(image: Tensor, label: Tensor) -> float:
    """How many source pixels the place that the colours tell is outside of the label's block, at most."""
    image, label = image.as_subclass(Tensor), label.as_subclass(Tensor)
    counts = label != IGNORED
    outside = []
    for channel, block in ((0, label % 8), (1, label // 8)):
        place = image[channel] * 255 / 2
        outside.append(torch.maximum(12.0 * block - place, place - (12.0 * block + 11))[counts].max())
    return max(0.0, float(max(outside)))


@pytest.mark.parametrize("size", [(40, 60), (90, 41), (64, 64), (20, 25)])
def test_image_and_label_move_together(size: tuple[int, int]) -> None:
    """The colours tell the block after scale, crop and flip, to the size of a pixel after the strongest reduction."""
    image, label = ramps(*size)
    together = v2.Compose(
        [
            RandomScale((160, 40), (0.5, 2.0)),
            VariedCrop(32),
            v2.RandomHorizontalFlip(0.5),
            v2.ToDtype(torch.float32, scale=True),
            PadTo(32),
        ]
    )
    largest_pixel = max(1.0, 2 * min(size) / 40) + 0.1  # in pixels of the source
    mirrored, noticed = [], []
    for seed in range(60):
        torch.manual_seed(seed)
        pixels, labels = together(image, label)
        assert pixels.shape == (3, 32, 32)
        assert labels.shape == (32, 32)
        assert set(labels.unique().tolist()) <= {*label.unique().tolist(), IGNORED}  # nearest: no class in between
        assert astray(pixels, labels) < largest_pixel
        mirrored.append(bool(pixels[0, 0, 0] > pixels[0, 0, 15]))
        noticed.append([astray(pixels, wrong) > largest_pixel for wrong in (labels.roll(6, -1), labels.flip(-1))])
    assert 15 < sum(mirrored) < 45
    assert min(torch.tensor(noticed).sum(0)) > 40  # but for crops with one block from left to right


def test_what_is_not_resized_agrees_in_every_pixel() -> None:
    image, label = tensors(np.random.default_rng(0).integers(0, 5, (50, 70)))
    moved = v2.Compose([VariedCrop(32), v2.RandomHorizontalFlip(0.5)])
    flips = 0
    original = label.as_subclass(Tensor)
    windows = original.unfold(0, 32, 1).unfold(1, 32, 1)  # [19 39 32 32]
    for seed in range(20):
        torch.manual_seed(seed)
        pixels, labels = moved(image, label)
        assert torch.equal(pixels[0].int(), labels.int() * 50)
        straight = (windows == labels.as_subclass(Tensor)).all(-1).all(-1).sum()
        mirrored = (windows == labels.as_subclass(Tensor).flip(-1)).all(-1).all(-1).sum()
        assert straight + mirrored == 1
        flips += int(mirrored)
    assert 3 < flips < 17


def test_labels_are_resized_to_the_nearest_pixel() -> None:
    label = tv_tensors.Mask(torch.randint(0, 5, (37, 53), dtype=torch.uint8))
    resized = fit(label, (160, 80)).as_subclass(Tensor)
    height, width = resized.shape
    rows, columns = (torch.arange(height) * 37 / height).int(), (torch.arange(width) * 53 / width).int()
    assert torch.equal(resized, label.as_subclass(Tensor)[rows][:, columns])


@pytest.mark.parametrize(
    ("size", "sides", "expected"),
    [
        ((512, 683), (2048, 512), (512, 683)),
        ((256, 300), (2048, 512), (512, 600)),
        ((600, 400), (2048, 512), (768, 512)),
        ((100, 1000), (2048, 512), (205, 2048)),  # the long side decides
        ((1000, 100), (2048, 512), (2048, 205)),
        ((333, 500), (1024, 256), (256, 384)),
        ((1, 4000), (2048, 512), (1, 2048)),
    ],
)
def test_the_size_is_the_largest_within_the_sides(
    size: tuple[int, int], sides: tuple[int, int], expected: tuple[int, int]
) -> None:
    image, label = torch.zeros(3, *size, dtype=torch.uint8), torch.zeros(*size, dtype=torch.uint8)
    assert tuple(fit(tv_tensors.Image(image), sides).shape[1:]) == expected
    fitted, kept = FitImage(sides)(tv_tensors.Image(image), tv_tensors.Mask(label))
    assert (tuple(fitted.shape[1:]), tuple(kept.shape)) == (expected, size)


def test_the_random_scale_is_uniform_within_its_range() -> None:
    image, label = tensors(quarters(40, 60))
    scale = RandomScale((160, 40), (0.5, 2.0))
    heights = []
    for seed in range(300):
        torch.manual_seed(seed)
        pixels, labels = scale(image, label)
        assert pixels.shape[1:] == labels.shape
        assert labels.shape[1] == pytest.approx(1.5 * labels.shape[0], abs=1)
        heights.append(labels.shape[0])
    assert 20 <= min(heights) < 22
    assert 77 < max(heights) <= 80
    assert np.mean(heights) == pytest.approx(50, abs=3)
    assert np.std(heights) == pytest.approx(60 / 12**0.5, abs=2)


# The crop's rule


@pytest.mark.parametrize(
    ("columns", "varied"),
    [
        ([(0, 74), (1, 26)], True),
        ([(0, 75), (1, 25)], False),  # 75 % is too much already
        ([(0, 100)], False),
        ([(IGNORED, 100)], False),
        ([(IGNORED, 90), (0, 7), (1, 3)], True),  # of the ten that count, 70 %
        ([(IGNORED, 90), (0, 8), (1, 2)], False),
        ([(IGNORED, 90), (0, 10)], False),
        ([(0, 30), (1, 30), (2, 40)], True),
    ],
)
def test_the_75_percent_rule(columns: list[tuple[int, int]], varied: bool) -> None:
    label = torch.cat([torch.full((10, count), value) for value, count in columns], dim=1)
    assert VariedCrop(10).is_varied(label) is varied


def test_the_crop_is_drawn_anew_as_often_as_the_closed_form_says() -> None:
    """Classes 0 and 1 meet at column 32 of 64, so of a 16 wide crop at `left`, 0 to 48, class 0 has 32 - left columns.

    More than 4 and fewer than 12 they are at 7 of the 49 places. Eleven draws all fail with probability (6/7)^11 = 0.183.
    """
    label = np.zeros((16, 64), dtype=int)
    label[:, 32:] = 1
    image, mask = tensors(label)
    crop = VariedCrop(16)
    count = 1500
    torch.manual_seed(0)
    failed, lefts = 0, set()
    for _ in range(count):
        pixels, labels = crop(image, mask)
        assert torch.equal(pixels[0].int(), labels.int() * 50)
        share = (labels == 0).float().mean().item()
        if 0.25 < share < 0.75:
            lefts.add(share)
        else:
            failed += 1
    assert len(lefts) == 7
    expected = (6 / 7) ** 11
    assert failed / count == pytest.approx(expected, abs=4 * (expected * (1 - expected) / count) ** 0.5)


def test_an_image_that_is_smaller_stays_whole_and_is_padded_by_ignored_pixels() -> None:
    image, label = tensors(quarters(20, 50))
    pixels, labels = VariedCrop(32)(image, label)
    assert pixels.shape == (3, 20, 32)
    pixels, labels = PadTo(32)(pixels.float() / 255, labels)
    assert labels.shape == (32, 32)
    assert (labels[20:] == IGNORED).all()
    assert (labels[:20] != IGNORED).all()
    mean = torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
    torch.testing.assert_close(pixels[:, 20:].as_subclass(Tensor), mean.expand(-1, 12, 32))
    torch.testing.assert_close(pixels[0, :20].as_subclass(Tensor) * 255, labels[:20].as_subclass(Tensor).float() * 50)


# Photometric distortion


def scripted(coins: Sequence[bool], numbers: Sequence[float]) -> Callable[..., Tensor]:
    """torch.rand(()) that plays heads (0.1) and tails (0.9) and, after each head of a step, its number."""
    script: list[float] = []
    brightness, first, before, saturation, hue, after = coins
    script.append(0.1 if brightness else 0.9)
    script += [numbers[0]] if brightness else []
    script.append(0.1 if first else 0.9)
    if first:
        script.append(0.1 if before else 0.9)
        script += [numbers[1]] if before else []
    script.append(0.1 if saturation else 0.9)
    script += [numbers[2]] if saturation else []
    script.append(0.1 if hue else 0.9)
    script += [numbers[3]] if hue else []
    if not first:
        script.append(0.1 if after else 0.9)
        script += [numbers[1]] if after else []
    values = iter(script)
    return lambda *_: torch.tensor(next(values))


def distorted_pixel(rgb: Sequence[float], coins: Sequence[bool], numbers: Sequence[float]) -> list[float]:
    """One pixel by the standard library's HSV, in the order of mmsegmentation."""
    brightness, first, before, saturation, hue, after = coins

    def cut(values: Sequence[float]) -> list[float]:
        return [min(max(value, 0.0), 1.0) for value in values]

    pixel = list(rgb)
    if brightness:
        pixel = cut([value + (2 * numbers[0] - 1) * 32 / 255 for value in pixel])
    if first and before:
        pixel = cut([value * (0.5 + numbers[1]) for value in pixel])
    if saturation:
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        pixel = list(colorsys.hsv_to_rgb(h, min(s * (0.5 + numbers[2]), 1.0), v))
    if hue:
        h, s, v = colorsys.rgb_to_hsv(*pixel)
        pixel = list(colorsys.hsv_to_rgb((h + (2 * numbers[3] - 1) * 18 / 180) % 1, s, v))
    if not first and after:
        pixel = cut([value * (0.5 + numbers[1]) for value in pixel])
    return pixel


@pytest.mark.parametrize("case", range(24))
def test_distortion_is_mmsegmentations_by_pixel(monkeypatch: pytest.MonkeyPatch, case: int) -> None:
    generator = np.random.default_rng(case)
    coins = [True] * 6 if case == 0 else [False] * 6 if case == 1 else [bool(c) for c in generator.integers(0, 2, 6)]
    numbers = generator.random(4).tolist()
    pixels = generator.random((3, 6, 8))
    pixels[:, 0, :4] = [[0, 1, 0.5, 0.2], [0, 1, 0.5, 0.0], [0, 1, 0.5, 0.0]]  # black, white, grey, saturated red
    expected = np.array([[distorted_pixel(pixels[:, y, x], coins, numbers) for x in range(8)] for y in range(6)])
    image = tv_tensors.Image(torch.from_numpy(pixels))
    label = tv_tensors.Mask(torch.randint(0, 5, (6, 8), dtype=torch.uint8))
    before = label.clone()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "rand", scripted(coins, numbers))
        out, same = PhotometricDistortion()(image, label)
    torch.testing.assert_close(out.as_subclass(Tensor), torch.from_numpy(expected).permute(2, 0, 1), rtol=0, atol=1e-5)
    assert torch.equal(same, before)


def test_each_distortion_happens_half_of_the_time() -> None:
    pixels = torch.tensor([0.6, 0.4, 0.3], dtype=torch.float64).view(3, 1, 1)
    image, label = tv_tensors.Image(pixels), tv_tensors.Mask(torch.zeros(1, 1))
    torch.manual_seed(0)
    untouched = sum(torch.equal(PhotometricDistortion()(image, label)[0], image) for _ in range(2000))
    assert untouched / 2000 == pytest.approx(1 / 16, abs=0.025)
    outputs = torch.stack([PhotometricDistortion()(image, label)[0].as_subclass(Tensor) for _ in range(200)])
    assert outputs.min() >= 0
    assert outputs.max() <= 1


# Batches


def test_training_batches(tmp_path: Path) -> None:
    folder(tmp_path, train=5)
    save_pair(tmp_path, "train", "tiny", quarters(9, 11, (4, 4, 0, 255)))
    data = data_of(tmp_path, batch_size=3)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == 2
    for images, labels in batches:
        assert type(images) is type(labels) is Tensor
        assert images.shape == (3, 3, 32, 32)
        assert images.dtype == torch.float32
        assert 0 <= images.min() < images.max() <= 1
        assert labels.shape == (3, 32, 32)
        assert labels.dtype == torch.long
        assert set(labels.unique().tolist()) <= {0, 1, 2, 3, 4, IGNORED}
    loader.sampler.set_epoch(1)
    assert not torch.equal(batches[0][0], next(iter(loader))[0])


def test_a_validation_batch_is_one_fitted_image_with_its_label_at_its_own_size(tmp_path: Path) -> None:
    folder(tmp_path, val=0)
    labels = [quarters(30, 50), quarters(71, 20), quarters(25, 300, (4, 255, 1, 0))]
    paths = [save_pair(tmp_path, "val", f"{i}", label)[0] for i, label in enumerate(labels)]
    data = data_of(tmp_path)
    data.setup("validate")
    batches = list(data.val_dataloader())
    assert [tuple(images.shape) for images, _ in batches] == [(1, 3, 40, 67), (1, 3, 142, 40), (1, 3, 13, 160)]
    for path, label, (images, found) in zip(paths, labels, batches, strict=True):
        assert torch.equal(found[0], torch.from_numpy(label))
        assert found.dtype == torch.long
        height, width = images.shape[-2:]
        by_pil = np.array(Image.open(path).resize((width, height), Image.Resampling.BILINEAR)) / 255
        np.testing.assert_allclose(images[0].permute(1, 2, 0).numpy(), by_pil, rtol=0, atol=1.01 / 255)
    again = list(data.val_dataloader())
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))


def test_predict_takes_photos_whole_and_at_their_own_size(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    photos = {}
    for name, size in (("b.png", (31, 44)), ("a.png", (90, 17)), ("sub/0.png", (20, 20))):
        photos[name] = np.random.default_rng(size[0]).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(photos[name]).save(tmp_path / name)
    data = data_of(tmp_path, classes=None)
    data.setup("predict")
    files = data.splits["predict"].files
    assert [str(path.relative_to(tmp_path)) for path in files] == ["a.png", "b.png", "sub/0.png"]
    for path, images in zip(files, data.predict_dataloader(), strict=True):
        expected = torch.from_numpy(photos[str(path.relative_to(tmp_path))]).permute(2, 0, 1)[None] / 255
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def test_workers_give_the_same_validation(tmp_path: Path) -> None:
    folder(tmp_path, val=4)
    alone, by_workers = (data_of(tmp_path, num_workers=workers) for workers in (0, 2))
    for data in (alone, by_workers):
        data.setup("validate")
    for (images, labels), (others, other_labels) in zip(alone.val_dataloader(), by_workers.val_dataloader(), strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def test_under_several_processes_no_image_is_validated_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two and one: a sampler that fills up the second share would repeat one."""
    for i in range(3):
        save_pair(tmp_path, "val", f"{i}", np.full((40, 40), i))
    data = data_of(tmp_path)
    data.setup("validate")
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda group=None: 2)
    seen = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "get_rank", lambda group=None, rank=rank: rank)
        seen.append([int(labels[0, 0, 0]) for _, labels in data.val_dataloader()])
    assert sorted(map(len, seen)) == [1, 2]
    assert sorted(seen[0] + seen[1]) == [0, 1, 2]


def told(rank: int, root: Path, broken: list[int]) -> None:
    """What one of two processes does, which met the `broken` files of a split."""
    store = distributed.FileStore(str(root / "store"), 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    data = data_of(root, on_bad_image="skip")
    data.setup("fit")
    data.splits["train"].unreadable[broken] = True
    said: list[str] = []
    segmentation.rank_zero_info = said.append
    data.tell_unreadable(torch.device("cpu"))
    (root / f"{rank}.txt").write_text("\n".join(said))
    distributed.destroy_process_group()


@pytest.mark.parametrize(("first", "second", "count"), [([], [2], 1), ([0, 2], [2, 3], 3), ([1], [], 1), ([], [], 0)])
def test_unreadable_files_are_counted_over_all_processes(
    tmp_path: Path, first: list[int], second: list[int], count: int
) -> None:
    """A file that both met is one file; a process that met none takes part."""
    folder(tmp_path, train=4)
    processes = [get_context("fork").Process(target=told, args=(i, tmp_path, files)) for i, files in enumerate((first, second))]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = f"{count} of 4 image files in {tmp_path} (train) could not be read" if count else ""
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [expected] * 2


# Names and values


INFO = "Idx\tRatio\tTrain\tVal\tName\n" + "".join(
    f"{i}\t0.1\t{100 - i}\t{i}\t{name}\n"
    for i, name in enumerate(
        ["wall                ", "building, edifice", "windowpane, window ", "chest of drawers;chest"], start=1
    )
)


def test_names_of_classes(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("road\n traffic light \n\nsky\n")
    assert read_names(tmp_path / "plain.txt") == ["road", "traffic light", "sky"]
    (tmp_path / "info.txt").write_text(INFO)
    assert read_names(tmp_path / "info.txt") == ["wall", "building", "windowpane", "chest of drawers"]
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    assert data_of(tmp_path, classes=None).classes == ["ant", "bee"]
    assert data_of(tmp_path, classes=str(tmp_path / "plain.txt")).classes == ["road", "traffic light", "sky"]
    assert data_of(tmp_path).classes == CLASSES
    (tmp_path / "broken.txt").write_text("Idx\tLabel\n1\twall\n")
    with pytest.raises(ValueError, match=r"broken\.txt is no table with a column Name"):
        read_names(tmp_path / "broken.txt")
    (tmp_path / "broken.txt").write_text(INFO + "5\t0.1\n")
    with pytest.raises(ValueError, match=r"broken\.txt is no table"):
        read_names(tmp_path / "broken.txt")


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        (["one"], "1 names, expected 2 to 255"),
        ([str(i) for i in range(256)], "256 names"),
        (["a", "b", "a"], "same name twice: a"),
        (None, "there is no file"),
        ("nowhere/names.txt", "there is no file nowhere/names.txt"),
    ],
    ids=["one", "256", "twice", "none", "no file"],
)
def test_wrong_names(tmp_path: Path, classes: Any, expected: str) -> None:
    folder(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=expected) as refused:
        data_of(tmp_path, classes=classes).setup("fit")
    assert "data.classes" in str(refused.value)
    assert "\n" not in str(refused.value)


def ade20k(root: Path) -> Path:
    """The published folder, small: annotations 0 to 150."""
    for split, count in (("training", 2), ("validation", 1)):
        for i in range(count):
            label = np.arange(151 * 4).reshape(4, 151) % 151
            save_pair(root, split, f"ADE_{split}_{i}", label, ".jpg", ("images", "annotations"))
    names = "".join(f"{i}\t0.1\t1\t1\tname {i}, other\n" for i in range(1, 151))
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n" + names)
    return root


def test_ade20k_as_published(tmp_path: Path) -> None:
    data = ADE20KData(str(ade20k(tmp_path)), batch_size=1, num_workers=0, image_size=16, resize=(64, 16))
    assert data.classes == [f"name {i}" for i in range(1, 151)]
    data.setup("fit")
    assert [path.name for path in data.splits["train"].files] == ["ADE_training_0.jpg", "ADE_training_1.jpg"]
    ((_, labels),) = data.val_dataloader()
    values = torch.arange(151 * 4).reshape(1, 4, 151) % 151
    assert torch.equal(labels, torch.where(values == 0, IGNORED, values - 1))
    assert len(list(data.train_dataloader())) == 2
    path = tmp_path / "annotations/validation/ADE_validation_0.png"
    for value in (151, 255):
        Image.fromarray(np.full((4, 151), value, dtype=np.uint8)).save(path)
        with pytest.raises(ValueError, match=rf"{path} has the value {value}, .* 150 classes are 1 to 150, and 0 is ignored"):
            next(iter(data.val_dataloader()))


def test_label_files_may_be_grey_palette_or_16_bits(tmp_path: Path) -> None:
    folder(tmp_path, val=0)
    label = quarters(30, 50, (0, 4, 255, 2))
    png = save_pair(tmp_path, "val", "0", label)[1]
    palette = Image.fromarray(label.astype(np.uint8), mode="P")
    palette.putpalette([*np.random.default_rng(0).integers(0, 256, 768)])
    for image in (Image.fromarray(label.astype(np.uint8)), palette, Image.fromarray(label.astype(np.uint16))):
        image.save(png)
        with Image.open(png) as saved:
            assert saved.mode in (image.mode, "I;16", "I")
        data = data_of(tmp_path)
        data.setup("validate")
        ((_, labels),) = data.val_dataloader()
        assert torch.equal(labels[0], torch.from_numpy(label))
    for mode in ("RGB", "RGBA", "LA"):
        Image.new(mode, (50, 30)).save(png)
        for on_bad_image in ("error", "skip"):  # a mistake, not a broken file
            data = data_of(tmp_path, on_bad_image=on_bad_image)
            data.setup("validate")
            with pytest.raises(ValueError, match=rf"{png} has colours or transparency \(mode {mode}\)"):
                next(iter(data.val_dataloader()))


def packed(path: Path, values: np.ndarray, bits: int) -> None:
    """A grey PNG of 1, 2 or 4 bits a pixel, written by hand: Pillow writes 1 and 8 alone."""
    height, width = values.shape
    spread = (values[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = np.packbits(spread.reshape(height, width * bits).astype(np.uint8), axis=1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize(("bits", "values"), [(1, (0, 1, 1, 0)), (2, (0, 1, 2, 3)), (4, (0, 4, 3, 2))])
def test_grey_labels_of_few_bits_hold_what_is_stored(tmp_path: Path, bits: int, values: tuple[int, ...]) -> None:
    """Pillow would scale 2 and 4 bits to 0 to 255: class 1 would be 85 or 17. In 1 bit white is 1."""
    folder(tmp_path, val=0)
    label = quarters(31, 53, values)
    packed(save_pair(tmp_path, "val", "0", label)[1], label, bits)
    data = data_of(tmp_path)
    data.setup("validate")
    ((_, labels),) = data.val_dataloader()
    assert torch.equal(labels[0], torch.from_numpy(label))
    if bits == 1:
        png = next((tmp_path / "labels/val").iterdir())
        Image.fromarray(label.astype(bool)).save(png)
        with Image.open(png) as saved:
            assert saved.mode == "1"
        assert torch.equal(next(iter(data.val_dataloader()))[1][0], torch.from_numpy(label))


def binary(root: Path, train: int, foreground: int, marked: int = 1) -> SegmentationFolderData:
    """Masks of 0 and `foreground`, which is in each `marked`-th."""
    for split, count in (("train", train), ("val", 2)):
        for i in range(count):
            value = foreground if i % marked == 0 else 255
            png = save_pair(root, split, str(i), quarters(40, 60, (0, 1, 0, 1)))[1]
            Image.fromarray(quarters(40, 60, (0, value, 0, value)).astype(np.uint8)).save(png)
    return data_of(root, classes=["nothing", "thing"])


def test_masks_of_0_and_255_are_refused_with_the_fix(tmp_path: Path) -> None:
    data = binary(tmp_path, 4, 255)
    for stage in ("fit", "validate"):
        with pytest.raises(
            ValueError, match=r"labels/val: the labels \(2 looked at\) hold 0, which is class nothing, and else"
        ) as e:
            data.setup(stage)
        assert (
            "only 255, which is ignored, so there is nothing to learn: give --data.label_values, the value of each class: "
            "[0, 255] if 255 is one, [0, 1] if" in str(e.value)
        )
        assert str(e.value).endswith("[0, 1] if it is to be ignored")
    with pytest.raises(ValueError, match="give --data.label_values, the value of each class$"):
        data_of(tmp_path, classes=["nothing", "thing", "other"]).setup("fit")
    ignoring = data_of(tmp_path, classes=["nothing", "thing"], label_values=[0, 1])
    ignoring.setup("fit")
    fixed = data_of(tmp_path, classes=["nothing", "thing"], label_values=[0, 255])
    fixed.setup("fit")
    expected = torch.from_numpy(quarters(40, 60, (0, 1, 0, 1)))
    for _, labels in fixed.val_dataloader():
        assert torch.equal(labels[0], expected)
    for _, labels in ignoring.val_dataloader():
        assert torch.equal(labels[0], expected.where(expected == 0, IGNORED))


def test_a_second_class_in_few_masks_is_found(tmp_path: Path) -> None:
    binary(tmp_path, 30, 1, marked=29).setup("fit")
    inverted = binary(tmp_path / "inverted", 3, 255)
    for png in (tmp_path / "inverted/labels").rglob("*.png"):
        Image.fromarray(quarters(40, 60, (1, 255, 1, 1)).astype(np.uint8)).save(png)
    with pytest.raises(ValueError, match=r"hold 1, which is class thing, .* the value of each class: \[255, 1\] if 255 is one"):
        inverted.setup("fit")


def test_label_values_of_any_order(tmp_path: Path) -> None:
    folder(tmp_path, val=0)
    png = save_pair(tmp_path, "val", "0", quarters(40, 60, (0, 1, 2, 3)))[1]
    Image.fromarray(quarters(40, 60, (70, 300, 7, 255)).astype(np.uint16)).save(png)
    data = data_of(tmp_path, classes=["a", "b", "c"], label_values=[300, 7, 70])
    data.setup("validate")
    ((_, labels),) = data.val_dataloader()
    assert torch.equal(labels[0], torch.from_numpy(quarters(40, 60, (2, 0, 1, IGNORED))))
    Image.fromarray(quarters(40, 60, (70, 8, 7, 255)).astype(np.uint16)).save(png)
    with pytest.raises(ValueError, match="has the value 8, but the 3 classes are 300, 7, 70, and 255 is ignored: correct the"):
        next(iter(data.val_dataloader()))
    for wrong in ([0, 1], [0, 1, 1], [0, 1, 65536], [-1, 0, 1]):
        with pytest.raises(ValueError, match="data.label_values are 3 different values from 0 to 65535, one a class; got"):
            data_of(tmp_path, classes=["a", "b", "c"], label_values=wrong).setup("validate")


@pytest.mark.parametrize("workers", [0, 2])
def test_classes_that_never_occurred_are_said_once(tmp_path: Path, workers: int) -> None:
    folder(tmp_path, train=4)
    for png in (tmp_path / "labels/train").glob("*.png"):
        values = np.asarray(Image.open(png)).copy()
        values[values == 3] = 255
        Image.fromarray(values).save(png)
    data = data_of(tmp_path, num_workers=workers)
    data.setup("fit")
    list(data.train_dataloader())
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "rank_zero_info", said.append)
        data.tell_unreadable(torch.device("cpu"))
        data.tell_unreadable(torch.device("cpu"))
    absent = [name for label, name in enumerate(data.classes) if label not in present(tmp_path)]
    assert data.classes[3] in absent
    assert said == [f"{len(absent)} of 5 classes were in none of the 4 training labels read so far: {', '.join(absent)}"]


def present(root: Path) -> set[int]:
    return set().union(*(np.unique(np.asarray(Image.open(png))).tolist() for png in (root / "labels/train").glob("*.png")))


def test_a_label_that_is_no_png_inside_is_refused(tmp_path: Path) -> None:
    """A JPEG's values are no classes any more; it is a mistake, not a broken file."""
    folder(tmp_path)
    png = tmp_path / "labels/val/1.png"
    Image.fromarray(quarters(40, 60).astype(np.uint8)).save(png, "jpeg")
    data = data_of(tmp_path, on_bad_image="skip")
    data.setup("validate")
    with pytest.raises(ValueError, match=rf"{png} holds a JPEG, not a PNG"):
        list(data.val_dataloader())


def test_images_of_any_kind_are_read_as_rgb(tmp_path: Path) -> None:
    folder(tmp_path, val=0)
    image, _ = save_pair(tmp_path, "val", "0", quarters(40, 60))
    gray = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
    deep = Image.fromarray(gray.astype(np.uint16) * 256)
    kinds = {
        "L": Image.fromarray(gray),
        "P": Image.fromarray(gray).convert("P"),
        "16": deep,
        "LA": Image.fromarray(gray).convert("LA"),
    }
    for kind in kinds.values():
        kind.save(image)
        data = data_of(tmp_path)
        data.setup("validate")
        ((pixels, _),) = data.val_dataloader()
        torch.testing.assert_close(pixels[0], (torch.from_numpy(gray) / 255).expand(3, -1, -1), rtol=0, atol=1e-6)
    image.unlink()
    Image.new("CMYK", (60, 40), (0, 255, 255, 0)).save(image.with_suffix(".jpg"))  # red
    data = data_of(tmp_path)
    data.setup("validate")
    ((pixels, _),) = data.val_dataloader()
    assert pixels[0, 0].mean() > 0.9
    assert pixels[0, 1:].mean() < 0.1


# Bad input


def remove(root: Path, *names: str) -> None:
    for name in names:
        (root / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda root: remove(root, "labels/train/1.png"), ["1 images in {root}/images/train without", "1.png"]),
        (lambda root: remove(root, "images/val/0.png"), ["1 labels in {root}/labels/val without image: 0.png"]),
        (
            lambda root: remove(root, *(f"labels/train/{i}.png" for i in range(5))),
            ["5 images in {root}/images/train without {root}/labels/train/NAME.png: 0.png, 1.png, 2.png ..."],
        ),
        (
            lambda root: remove(root, "images/train/0.png", "labels/train/1.png"),
            ["1 images in {root}/images/train", "1.png", "1 labels in {root}/labels/train without image: 0.png"],
        ),
        (lambda root: remove(root, *(f"labels/val/{i}.png" for i in range(2))), ["no image in or below {root}/labels/val"]),
        (
            lambda root: (root / "labels/val/0.png").rename(root / "labels/val/0.jpg"),
            [
                "1 images in {root}/images/val without {root}/labels/val/NAME.png: 0.png",
                "1 files in {root}/labels/val that are no PNG: 0.jpg",
            ],
        ),
        (
            lambda root: save_pair(root, "val", "0", quarters(40, 60), ".jpg"),
            ["{root}/images/val/0.jpg and {root}/images/val/0.png have one name"],
        ),
        (
            lambda root: (root / "labels/val/0.PNG").write_bytes((root / "labels/val/0.png").read_bytes()),
            ["{root}/labels/val/0.PNG and {root}/labels/val/0.png have one name"],
        ),
        (lambda root: (root / "labels").rename(root / "masks"), ["there is no folder {root}/labels/val"]),
        (lambda root: (root / "images").rename(root / "photos"), ["there is no folder {root}/images/val"]),
    ],
    ids=[
        "no label",
        "no image",
        "five",
        "both",
        "no labels",
        "jpg labels",
        "two images",
        "two labels",
        "no labels folder",
        "no images folder",
    ],
)
def test_images_and_labels_without_partner_are_named(tmp_path: Path, spoil: Callable[[Path], Any], expected: list[str]) -> None:
    folder(tmp_path, train=7)
    spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        data_of(tmp_path).setup("fit")
    said = str(refused.value)
    assert "\n" not in said
    assert "data.root" in said
    for words in expected:
        assert words.format(root=tmp_path) in said


def test_sizes_that_differ_are_both_given(tmp_path: Path) -> None:
    folder(tmp_path, val=0)
    image, png = save_pair(tmp_path, "val", "0", quarters(40, 60))
    Image.fromarray(quarters(40, 61).astype(np.uint8)).save(png)
    for workers in (0, 1):
        data = data_of(tmp_path, num_workers=workers, on_bad_image="skip")
        data.setup("validate")
        with pytest.raises(ValueError, match=rf"{image} has 40x60 pixels \(HxW\), its label {png} has 40x61"):
            next(iter(data.val_dataloader()))


def test_a_value_that_is_no_class_is_named_with_its_file(tmp_path: Path) -> None:
    folder(tmp_path, val=0)
    png = save_pair(tmp_path, "val", "0", quarters(40, 60, (0, 5, 255, 1)))[1]
    data = data_of(tmp_path)
    data.setup("validate")
    with pytest.raises(ValueError, match=rf"{png} has the value 5, but the 5 classes are 0 to 4, and 255 is ignored"):
        next(iter(data.val_dataloader()))
    Image.fromarray(quarters(40, 60, (7, 9, 254, 1)).astype(np.uint8)).save(png)
    with pytest.raises(ValueError, match=rf"{png} has the value 7 \(and 2 other values\)"):
        next(iter(data.val_dataloader()))
    Image.fromarray(quarters(40, 60, (0, 300, 255, 1)).astype(np.uint16)).save(png)  # 300 is 44 in 8 bits
    with pytest.raises(ValueError, match=rf"{png} has the value 300,"):
        next(iter(data.val_dataloader()))


def truncated(path: Path) -> Path:
    """Half a JPEG, as after a broken download."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(buffer, "jpeg")
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    return path


@pytest.mark.parametrize("broken_label", [False, True])
def test_broken_files_are_named_or_skipped_and_counted(tmp_path: Path, broken_label: bool) -> None:
    folder(tmp_path, val=2)
    image, png = tmp_path / "images/val/0.png", tmp_path / "labels/val/0.png"
    if broken_label:
        png.write_bytes(png.read_bytes()[:-30])
        broken = png
    else:
        image.unlink()
        broken = truncated(image.with_suffix(".jpg"))
    data = data_of(tmp_path)
    data.setup("validate")
    with pytest.raises(ValueError, match=rf"unreadable (image|label) {broken} .*data\.on_bad_image=skip"):
        list(data.val_dataloader())
    data = data_of(tmp_path, on_bad_image="skip")
    data.setup("validate")
    with pytest.warns(UserWarning, match=rf"skipped: unreadable (image|label) {broken} .*1 skipped so far"):
        batches = list(data.val_dataloader())
    assert len(batches) == 2
    assert torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(batches[0][1], batches[1][1])
    with pytest.warns(UserWarning, match=r"1 of 2 image files in .* \(val\) could not be read"):
        data.teardown("validate")


def test_a_broken_photo_is_marked_for_predict(tmp_path: Path) -> None:
    truncated(tmp_path / "a.jpg")
    Image.new("RGB", (30, 20)).save(tmp_path / "b.jpg")
    data = data_of(tmp_path, on_bad_image="skip")
    data.setup("predict")
    with pytest.warns(UserWarning, match=r"skipped: unreadable image .*a\.jpg"):
        assert len(list(data.predict_dataloader())) == 2
    assert data.splits["predict"].unreadable.tolist() == [True, False]


def test_too_few_images_for_a_batch(tmp_path: Path) -> None:
    folder(tmp_path)
    with pytest.raises(ValueError, match=r"images/train has 3 images, .* one batch of 4: set data.batch_size to 3 or less"):
        data_of(tmp_path, batch_size=4).setup("fit")
    data_of(tmp_path, batch_size=4).setup("validate")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"image_size": 0}, "image_size 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"num_workers": -1}, "num_workers -1"),
        ({"resize": (512, 2048)}, "(512, 2048)"),
        ({"scale": (0.0, 2.0)}, "(0.0, 2.0)"),
        ({"scale": (2.0, 0.5)}, "(2.0, 0.5)"),
        ({"flip": 1.5}, "1.5"),
    ],
    ids=str,
)
def test_impossible_numbers(tmp_path: Path, wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)) as refused:
        data_of(tmp_path, **wrong)
    assert "\n" not in str(refused.value)
