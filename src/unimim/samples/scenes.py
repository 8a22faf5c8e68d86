"""Scenes composed from Fashion-MNIST, with exact masks: a sample set for segmentation that needs no download."""

import random
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytorch_lightning as pl
import torch
from einops import rearrange, repeat
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import FashionMNIST

from unimim.data.folder import each_once
from unimim.data.sampling import Place, ResumableSampler, epoch_and_index
from unimim.errors import UserError
from unimim.printing import printable
from unimim.samples.fashion_mnist import provide

GARMENT = 28
"""Side of a Fashion-MNIST image in pixels."""
PLACES = 8
"""Places that are drawn for each object, of which the first good one is taken."""
VISIBLE = 0.5
"""The share of an object that has to be seen."""
BACKGROUNDS = 0.1
"""The share of a split's images, its last, that are backgrounds and never objects."""


class ScenesData(pl.LightningDataModule):
    """Batches of (images [b 3 H W] in [0, 1], labels long [b H W]) of composed scenes: not photographs.

    A scene is a few of Fashion-MNIST's garments on a background, some in front of others. Label 0 is the background, 1 to 10
    are the garments. Where each pixel belongs is known exactly, because the scene was put together; nobody labelled it.

    Every garment is whole inside the scene, and at least half of it is seen. Scale, place, mirroring and brightness vary. The
    background is a small piece of another garment, enlarged to the whole scene and darkened, so that most garments are
    brighter. Grey is repeated to three channels.

    The splits share no Fashion-MNIST image: `train` takes the first 55,000 training images, `val` (for choices of
    hyper-parameters) the last 5,000, `test` the 10,000 test images; in each split the last tenth serves as backgrounds only.
    A scene is a function of `seed`, split and index alone. Without `labelled`, training batches are images alone, for
    pretraining, and there is no validation.

    Args:
        root: folder of Fashion-MNIST, as in `FashionMNISTData`.
        image_size: side of a scene in pixels.
        objects: (fewest, most) garments in a scene; one that finds no place is left out.
        scale: (low, high) factor on a garment's 28 pixels.
        train_scenes: scenes in `train`.
        val_scenes: scenes in `val`, and as many in `test`.
        batch_size: scenes of one process in one step.
        num_workers: processes that read scenes; they are in memory, so 0 is fast.
        seed: other seeds are other scenes.
        labelled: whether training batches have labels.

    Raises:
        ValueError: a number out of its range; garments that are larger than the scene.
        FileNotFoundError: as `FashionMNISTData`.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int = 64,
        objects: tuple[int, int] = (2, 5),
        scale: tuple[float, float] = (0.75, 1.25),
        train_scenes: int = 4_000,
        val_scenes: int = 500,
        batch_size: int = 32,
        num_workers: int = 0,
        seed: int = 0,
        labelled: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        if not 1 <= objects[0] <= objects[1] or not 0 < scale[0] <= scale[1] or num_workers < 0 or val_scenes < 1:
            raise UserError(
                f"data: objects is (fewest, most) from 1, scale (low, high) above 0, val_scenes at least 1, num_workers not "
                f"below 0; got {objects}, {scale}, {val_scenes}, {num_workers}"
            )
        if GARMENT * scale[1] > image_size:
            raise UserError(
                f"data.image_size is {image_size}, but garments are up to {GARMENT * scale[1]:g} pixels: set data.scale to "
                f"{image_size / GARMENT:.2f} or less, or data.image_size to more"
            )
        if not 1 <= batch_size <= train_scenes:
            raise UserError(f"data.train_scenes {train_scenes} is less than one batch of data.batch_size {batch_size}")
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.objects = objects
        self.scale = scale
        self.train_scenes = train_scenes
        self.val_scenes = val_scenes
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.labelled = labelled
        self.classes = ["background", *FashionMNIST.classes] if labelled else []

    def prepare_data(self) -> None:
        rank_zero_info(f"Scenes composed from Fashion-MNIST: {printable(provide(self.root))}")

    def setup(self, stage: str | None = None) -> None:
        train, test = (FashionMNIST(str(self.root), train=train) for train in (True, False))
        pools = {
            "train": (train.data[:55_000], train.targets[:55_000], self.train_scenes),
            "val": (train.data[55_000:], train.targets[55_000:], self.val_scenes),
            "test": (test.data, test.targets, self.val_scenes),
        }
        self.splits = {
            split: Scenes(garments, labels, count, self.image_size, self.objects, self.scale, f"{self.seed} {split}")
            for split, (garments, labels, count) in pools.items()
        }

    def train_dataloader(self) -> DataLoader[Any]:
        collate = default_collate if self.labelled else images_alone
        scenes = self.splits["train"]
        return DataLoader(
            scenes,
            self.batch_size,
            sampler=ResumableSampler(scenes),
            drop_last=True,
            num_workers=self.num_workers,
            collate_fn=collate,
        )

    def val_dataloader(self) -> Any:
        """The validation split where there are labels, else none."""
        return self._in_order("val") if self.labelled else []

    def test_dataloader(self) -> DataLoader[Any]:
        return self._in_order("test")

    def pictured(self, count: int) -> Tensor:
        """The first `count` validation scenes to look at: [n 3 H W] in [0, 1]."""
        scenes = self.splits["val"]
        return images_alone([scenes[place] for place in range(min(count, len(scenes)))])

    def _in_order(self, split: Literal["val", "test"]) -> DataLoader[Any]:
        scenes = self.splits[split]
        return DataLoader(scenes, self.batch_size, num_workers=self.num_workers, sampler=each_once(scenes))


def images_alone(scenes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Pairs of an image [3 H W] and its labels -> the images [b 3 H W]."""
    return torch.stack([image for image, _ in scenes])


class Pieces(NamedTuple):
    """What scenes are made of: garments, each with its place and its tones. Fields are [n] or [n objects]."""

    source: Tensor
    """long, which garment of the split; -1 where there is none."""
    side: Tensor
    """Of the 28x28 image when it is in the scene, in the scene's pixels."""
    top: Tensor
    """Where its upper edge is, in the scene's pixels."""
    left: Tensor
    """Where its left edge is, in the scene's pixels."""
    mirrored: Tensor
    """bool"""
    darkest: Tensor
    """What the garment's black becomes, in [0, 1]."""
    contrast: Tensor
    """What its white has above that."""


class Scenes(Dataset[Any]):
    """(image [3 H W] in [0, 1], labels long [H W]) of composed scenes.

    `backgrounds` [n] and `objects` [n objects], from the front to the back, are the pieces: a scene can be put together from
    them. Scene i depends on `seed` and i only, not on how many there are.

    Args:
        garments: uint8 [n 28 28].
        labels: long [n], 0 to 9.
        count: scenes.
        image_size, objects, scale: as in `ScenesData`.
        seed: any words.
    """

    def __init__(
        self,
        garments: Tensor,
        labels: Tensor,
        count: int,
        image_size: int,
        objects: tuple[int, int],
        scale: tuple[float, float],
        seed: str,
    ) -> None:
        self.image_size = image_size
        self.garments = garments
        fewest, most = objects
        each = 4 + 2 * PLACES
        numbers = torch.tensor([draw(f"{seed} {i}", 7 + most * each) for i in range(count)])
        for_objects = rearrange(numbers[:, 7:], "n (objects each) -> n objects each", objects=most)
        wanted = fewest + (numbers[:, 6] * (most + 1 - fewest)).long()
        self.backgrounds = self._backgrounds(numbers[:, :6])
        self.objects = self._objects(for_objects[..., :4], scale)
        self.objects.source[torch.arange(most) >= rearrange(wanted, "n -> n 1")] = -1
        places = rearrange(for_objects[..., 4:], "n objects (places yx) -> n objects places yx", yx=2)
        self.images = torch.empty(count, image_size, image_size, dtype=torch.uint8)
        self.labels = torch.zeros(count, image_size, image_size, dtype=torch.uint8)
        for rows in torch.arange(count).split(500):  # so that memory stays small
            self._compose(rows, places[rows], labels)

    def _backgrounds(self, numbers: Tensor) -> Pieces:
        """From [n 6] in [0, 1): squares of 6 to 10 pixels, four pixels or more from a garment's border, fill the scene."""
        source, square, top, left, darkest, contrast = numbers.unbind(-1)
        first = self._first_background
        square = 6 + 4 * square
        zoom = self.image_size / square
        top, left = (-(4 + (GARMENT - 8 - square) * place) * zoom for place in (top, left))
        return Pieces(
            source=first + (source * (len(self.garments) - first)).long(),
            side=GARMENT * zoom,
            top=top,
            left=left,
            mirrored=torch.zeros(len(numbers), dtype=torch.bool),
            darkest=0.15 * darkest,
            contrast=0.05 + 0.25 * contrast,
        )

    def _objects(self, numbers: Tensor, scale: tuple[float, float]) -> Pieces:
        """From [n objects 4] in [0, 1): all but the places."""
        source, side, mirrored, brightness = numbers.unbind(-1)
        low, high = scale
        white = 0.6 + 0.4 * brightness
        return Pieces(
            source=(source * self._first_background).long(),
            side=GARMENT * (low + (high - low) * side),
            top=torch.zeros_like(side),
            left=torch.zeros_like(side),
            mirrored=mirrored < 0.5,
            darkest=0.35 * white,
            contrast=0.65 * white,
        )

    @property
    def _first_background(self) -> int:
        return round(len(self.garments) * (1 - BACKGROUNDS))

    def _compose(self, rows: Tensor, places: Tensor, labels: Tensor) -> None:
        """Puts the scenes `rows` together from the front to the back, at the first good of the places [n objects places 2]."""
        tones = torch.zeros(len(rows), self.image_size, self.image_size)
        for k in range(places.shape[1]):
            waiting = torch.nonzero(self.objects.source[rows, k] >= 0)[:, 0]
            for place in places[:, k].unbind(1):
                here = rows[waiting]
                room = self.image_size - self.objects.side[here, k]
                self.objects.top[here, k], self.objects.left[here, k] = (place[waiting] * room[:, None]).unbind(-1)
                pieces = Pieces(*(field[here, k] for field in self.objects))
                pixels, mask = self.object_pixels(pieces)
                seen = mask & (self.labels[here] == 0)  # what is there already is in front
                good = seen.sum((1, 2)) >= VISIBLE * mask.sum((1, 2))
                seen &= rearrange(good, "n -> n 1 1")
                tones[waiting] = torch.where(seen, pixels, tones[waiting])
                label = rearrange(1 + labels[pieces.source], "n -> n 1 1").to(torch.uint8)
                self.labels[here] = torch.where(seen, label, self.labels[here])
                waiting = waiting[~good]
            self.objects.source[rows[waiting], k] = -1
        backgrounds = Pieces(*(field[rows] for field in self.backgrounds))
        tones = torch.where(self.labels[rows] > 0, tones, self.background_pixels(backgrounds))
        self.images[rows] = (255 * tones).round().to(torch.uint8)

    def background_pixels(self, pieces: Pieces) -> Tensor:
        """Pieces [n] -> [n H W] in [0, 1]"""
        garments = self.garments[pieces.source] / 255
        return toned(placed(garments, pieces, self.image_size, "bilinear"), pieces)

    def object_pixels(self, pieces: Pieces) -> tuple[Tensor, Tensor]:
        """Pieces [n] -> [n H W] in [0, 1], and where they are, bool [n H W].

        Pixels at the edge are means over the garment's own pixels only, so that no dark seam shows.
        """
        garments = self.garments[pieces.source]
        outline = garment_masks(garments)
        mask = placed(outline.float(), pieces, self.image_size, "nearest") > 0.5
        share = placed(outline.float(), pieces, self.image_size, "bilinear")
        values = placed(outline * garments / 255, pieces, self.image_size, "bilinear") / share.clamp_min(1e-6)
        return toned(values, pieces), mask

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, places: list[Place | int]) -> list[tuple[Tensor, Tensor]]:
        indices = [epoch_and_index(place)[1] for place in places]
        pixels = repeat(self.images[indices] / 255, "b H W -> b c H W", c=3)
        return list(zip(pixels, self.labels[indices].long(), strict=True))

    def __getitem__(self, place: Place | int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([place])[0]


def draw(seed: str, count: int) -> list[float]:
    """Numbers in [0, 1), the same on every machine and with every version of Python; of 24 bits, so that float32 holds them."""
    generator = random.Random(seed)
    return [int(2**24 * generator.random()) / 2**24 for _ in range(count)]


def garment_masks(garments: Tensor) -> Tensor:
    """uint8 [n 28 28] -> bool [n 28 28], True on the garment: all that black does not reach from outside.

    Black is below 8 of 255: Fashion-MNIST has specks of 1 to 7 around its garments.
    """
    black = F.pad(garments < 8, (1, 1, 1, 1), value=True)
    outside = F.pad(torch.zeros_like(garments, dtype=torch.bool), (1, 1, 1, 1), value=True)
    while True:
        reached = outside.clone()
        reached[:, 1:] |= outside[:, :-1]
        reached[:, :-1] |= outside[:, 1:]
        reached[:, :, 1:] |= outside[:, :, :-1]
        reached[:, :, :-1] |= outside[:, :, 1:]
        reached &= black
        if torch.equal(reached, outside):
            return ~outside[:, 1:-1, 1:-1]
        outside = reached


def placed(garments: Tensor, pieces: Pieces, image_size: int, mode: str) -> Tensor:
    """float [n 28 28] -> [n H W], each at its place in a scene, 0 around it; `mode` is grid_sample's."""
    centers = torch.arange(image_size) + 0.5

    def coordinates(edge: Tensor) -> Tensor:  # -1 at one edge of the garment, 1 at the other
        return 2 * (centers - rearrange(edge, "n -> n 1")) / rearrange(pieces.side, "n -> n 1") - 1

    y, x = coordinates(pieces.top), coordinates(pieces.left)
    x = torch.where(rearrange(pieces.mirrored, "n -> n 1"), -x, x)
    grid = torch.stack([repeat(x, "n W -> n H W", H=image_size), repeat(y, "n H -> n H W", W=image_size)], dim=-1)
    sampled = F.grid_sample(rearrange(garments, "n H W -> n 1 H W"), grid, mode, "zeros", align_corners=False)
    return rearrange(sampled, "n 1 H W -> n H W")


def toned(values: Tensor, pieces: Pieces) -> Tensor:
    """[n H W] of garments in [0, 1] -> [n H W] in the pieces' tones."""
    darkest, contrast = (rearrange(field, "n -> n 1 1") for field in (pieces.darkest, pieces.contrast))
    return darkest + contrast * values
