"""Composed scenes: put together again by a literal loop, the same whatever the order, and no garment in two splits."""

import math
import re
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import FashionMNIST

from unimim import ScenesData
from unimim.samples.fashion_mnist import FILES, provide
from unimim.samples.scenes import GARMENT, Scenes, garment_masks

SMALL: dict[str, Any] = {"image_size": 48, "train_scenes": 40, "val_scenes": 30, "batch_size": 8}


@pytest.fixture(scope="module")
def root() -> Path:
    """Where Fashion-MNIST is, or one line that says why not."""
    provide(ROOT / "data")
    return ROOT / "data"


@pytest.fixture(scope="module")
def data(root: Path) -> ScenesData:
    return scenes_of(root)


def scenes_of(root: Path, **options: Any) -> ScenesData:
    data = ScenesData(str(root), **{**SMALL, **options})
    data.prepare_data()
    data.setup("fit")
    return data


# One scene by loops


def outline(garment: np.ndarray) -> np.ndarray:
    """A flood from outside over pixels below 8; what it does not reach is the garment."""
    reached = {(-1, -1)}
    todo = deque(reached)
    while todo:
        y, x = todo.popleft()
        for step in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            inside = 0 <= step[0] < GARMENT and 0 <= step[1] < GARMENT
            near = -1 <= step[0] <= GARMENT and -1 <= step[1] <= GARMENT
            if near and step not in reached and (not inside or garment[step] < 8):
                reached.add(step)
                todo.append(step)
    return np.array([[(y, x) not in reached for x in range(GARMENT)] for y in range(GARMENT)])


def neighbours(v: float, u: float) -> list[tuple[int, int, float]]:
    """The four pixels around a point, those outside left out, with bilinear weights; a pixel's centre is at 0.5."""
    y, x = math.floor(v - 0.5), math.floor(u - 0.5)
    fy, fx = v - 0.5 - y, u - 0.5 - x
    corners = [(y, x, (1 - fy) * (1 - fx)), (y, x + 1, (1 - fy) * fx), (y + 1, x, fy * (1 - fx)), (y + 1, x + 1, fy * fx)]
    return [(j, i, weight) for j, i, weight in corners if 0 <= j < GARMENT and 0 <= i < GARMENT]


def literally(scenes: Scenes, labels: Tensor, index: int) -> tuple[np.ndarray, np.ndarray]:
    """The scene from its recorded pieces: the background, then the objects from the back to the front."""
    size = scenes.image_size
    image, label = np.zeros((size, size)), np.zeros((size, size), dtype=int)
    order = [(None, scenes.backgrounds)] + [(k, scenes.objects) for k in reversed(range(scenes.objects.source.shape[1]))]
    for k, pieces in order:
        source, side, top, left, mirrored, darkest, contrast = (
            field[index].item() if k is None else field[index, k].item() for field in pieces
        )
        if source < 0:
            continue
        garment = scenes.garments[source].numpy().astype(float)
        own = np.ones_like(garment, dtype=bool) if k is None else outline(garment)
        for y in range(size):
            for x in range(size):
                v, u = (y + 0.5 - top) * GARMENT / side, (x + 0.5 - left) * GARMENT / side
                u = GARMENT - u if mirrored else u
                inside = 0 <= v < GARMENT and 0 <= u < GARMENT
                if not inside or not own[int(v), int(u)]:
                    continue
                weights = [(garment[j, i], weight) for j, i, weight in neighbours(v, u) if own[j, i]]
                value = sum(g * w for g, w in weights) / sum(w for _, w in weights) / 255
                image[y, x] = darkest + contrast * value
                label[y, x] = 0 if k is None else 1 + int(labels[source])
    return image, label


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_scene_is_what_its_recorded_pieces_make(root: Path, data: ScenesData, split: str) -> None:
    labels = FashionMNIST(str(root), train=split == "train").targets
    scenes = data.splits[split]
    for index in range(6):
        image, label = literally(scenes, labels, index)
        pixels, found = scenes[index]
        differing = (found.numpy() != label).mean()
        assert differing < 1e-3, "a pixel whose centre is on the edge between two, at most"
        same = found.numpy() == label
        assert np.abs(pixels[0].numpy() - image)[same].max() <= 0.51 / 255  # rounded to 8 bits
        assert torch.equal(pixels[0], pixels[1])
        assert torch.equal(pixels[0], pixels[2])


def test_outlines_are_the_loops(root: Path) -> None:
    garments = FashionMNIST(str(root), train=True).data[:60]
    assert torch.equal(garment_masks(garments), torch.from_numpy(np.stack([outline(g.numpy()) for g in garments])))
    ring = torch.zeros(1, GARMENT, GARMENT, dtype=torch.uint8)
    ring[0, 5:12, 5:12] = 200
    ring[0, 7:10, 7:10] = 0  # a hole
    ring[0, 20, 20] = 7  # a speck
    assert garment_masks(ring).sum() == 49
    ring[0, 8, 10:12] = 0  # the hole opens
    assert garment_masks(ring).sum() == 49 - 9 - 2


# What they are a function of


def everything(loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_a_scene_depends_on_seed_split_and_index_alone(root: Path, data: ScenesData) -> None:
    torch.manual_seed(123)
    fewer = scenes_of(root, train_scenes=9, val_scenes=700, batch_size=3)
    for split, count in (("train", 9), ("val", 30), ("test", 30)):
        assert torch.equal(fewer.splits[split].images[:count], data.splits[split].images[:count])
        assert torch.equal(fewer.splits[split].labels[:count], data.splits[split].labels[:count])
    other = scenes_of(root, seed=1)
    for split in ("train", "val", "test"):
        assert not torch.equal(other.splits[split].images, data.splits[split].images)
    assert not torch.equal(data.splits["val"].images[:30], data.splits["test"].images[:30])
    assert len({image.numpy().tobytes() for image in data.splits["train"].images}) == 40  # all of them different


def test_order_and_workers_change_no_scene(root: Path, data: ScenesData) -> None:
    alone, by_workers = (everything(scenes_of(root, num_workers=workers).val_dataloader()) for workers in (0, 2))
    assert torch.equal(alone[0], by_workers[0])
    assert torch.equal(alone[1], by_workers[1])
    known = {image.numpy().tobytes(): i for i, image in enumerate(data.splits["train"].images)}
    images, labels = everything(data.train_dataloader())
    order = [known[(image[0] * 255).round().to(torch.uint8).numpy().tobytes()] for image in images]
    assert sorted(order) == list(range(40))
    assert order != sorted(order)
    assert torch.equal(labels, data.splits["train"].labels[order].long())


def test_no_image_of_fashion_mnist_is_in_two_splits_or_object_and_background(root: Path) -> None:
    data = scenes_of(root, image_size=32, objects=(1, 3), scale=(0.5, 1.0), train_scenes=1500, val_scenes=1500)
    train, test = (FashionMNIST(str(root), train=train).data for train in (True, False))
    assert torch.equal(data.splits["train"].garments, train[:55_000])
    assert torch.equal(data.splits["val"].garments, train[55_000:])
    assert torch.equal(data.splits["test"].garments, test)
    for scenes in data.splits.values():
        first = round(0.9 * len(scenes.garments))
        objects = scenes.objects.source[scenes.objects.source >= 0]
        assert objects.max() < first <= scenes.backgrounds.source.min()
        assert scenes.backgrounds.source.max() < len(scenes.garments)
        assert objects.max() > 0.95 * first  # all of the pool is drawn from
        assert objects.min() < 0.05 * first


# What is in them


def test_batches(data: ScenesData) -> None:
    assert data.classes[:2] == ["background", "T-shirt/top"]
    assert len(data.classes) == 11
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 48, 48)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < 0.2
    assert 0.6 < images.max() <= 1
    assert labels.shape == (8, 48, 48)
    assert labels.dtype == torch.long
    assert len(everything(data.val_dataloader())[0]) == len(everything(data.test_dataloader())[0]) == 30


def test_without_labels_the_same_images_alone(root: Path, data: ScenesData) -> None:
    alone = scenes_of(root, labelled=False)
    assert alone.classes == []
    assert alone.val_dataloader() == []
    torch.manual_seed(3)
    images = next(iter(alone.train_dataloader()))
    torch.manual_seed(3)
    assert torch.equal(images, next(iter(data.train_dataloader()))[0])


def test_every_class_occurs_and_every_object_is_seen(root: Path) -> None:
    data = scenes_of(root, image_size=64, train_scenes=200, val_scenes=100)
    for split, scenes in data.splits.items():
        share = scenes.labels.flatten().bincount(minlength=11) / scenes.labels.numel()
        assert (share > 0.005).all(), split
        assert 0.5 < share[0] < 0.9
        present = scenes.objects.source >= 0
        assert set(present.sum(1).tolist()) == {2, 3, 4, 5}
        sides, tops, lefts = scenes.objects.side[present], scenes.objects.top[present], scenes.objects.left[present]
        assert sides.min() >= 0.75 * 28
        assert sides.max() <= 1.25 * 28
        assert min(tops.min(), lefts.min()) >= 0
        assert max((tops + sides).max(), (lefts + sides).max()) <= 64 + 1e-4
        background = scenes.images[scenes.labels == 0].float().mean()
        assert scenes.images[scenes.labels > 0].float().mean() > 2 * background


def test_at_least_half_of_every_object_is_seen(data: ScenesData) -> None:
    """Counted by painting each object in a colour of its own, from the back to the front."""
    scenes = data.splits["train"]
    hidden = 0
    for index in range(20):
        owner = torch.full((48, 48), -1)
        masks = {}
        for k in reversed(range(scenes.objects.source.shape[1])):
            if scenes.objects.source[index, k] >= 0:
                piece = type(scenes.objects)(*(field[index, k : k + 1] for field in scenes.objects))
                masks[k] = scenes.object_pixels(piece)[1][0]
                owner[masks[k]] = k
        shares = [((owner == k).sum() / mask.sum()).item() for k, mask in masks.items()]
        assert min(shares) >= 0.5
        hidden += sum(share < 1 for share in shares)
    assert hidden > 10  # and many are hidden in part


def test_objects_without_room_are_left_out(root: Path) -> None:
    data = scenes_of(root, image_size=28, objects=(4, 4), scale=(1.0, 1.0))  # one place only
    counts = (data.splits["train"].objects.source >= 0).sum(1)
    assert counts.min() >= 1
    assert counts.max() < 4


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"objects": (0, 3)}, "(0, 3)"),
        ({"objects": (3, 2)}, "(3, 2)"),
        ({"scale": (0.0, 1.0)}, "(0.0, 1.0)"),
        ({"scale": (1.0, 2.0)}, "garments are up to 56 pixels: set data.scale to 1.71 or less"),
        ({"val_scenes": 0}, "val_scenes"),
        ({"num_workers": -1}, "-1"),
        ({"train_scenes": 7}, "train_scenes 7 is less than one batch of data.batch_size 8"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
    ids=str,
)
def test_impossible_numbers(wrong: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)) as refused:
        ScenesData("nowhere", **{**SMALL, **wrong})
    assert "\n" not in str(refused.value)


def test_the_files_are_where_fashion_mnist_looks_for_them(tmp_path: Path, root: Path) -> None:
    """`prepare_data` provides them, as that of FashionMNISTData."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FILES:
        (raw / name).symlink_to(root / "FashionMNIST" / "raw" / name)
    assert len(scenes_of(tmp_path).splits["train"]) == 40
