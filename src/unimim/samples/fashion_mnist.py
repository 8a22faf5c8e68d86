"""Fashion-MNIST (Xiao et al., 2017; MIT licence): small real images with labels, to be had without a network."""

import gzip
import shutil
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from einops import rearrange, repeat
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import FashionMNIST

from unimim.data.folder import each_once
from unimim.data.sampling import Place, ResumableSampler, derived_seed, epoch_and_index
from unimim.errors import MissingFileError, UserError
from unimim.printing import printable

DEBIAN_FOLDER = Path("usr/share/datasets/fashion-mnist")
FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


class FashionMNISTData(pl.LightningDataModule):
    """Batches [b 3 H W] of garments in [0, 1] for pretraining, and labelled splits for evaluation.

    With `labelled`, batches are (images, labels [b]), for fine-tuning and probes.

    Images are 28x28 and grey; they are padded to 32x32, repeated to three channels and, for another `image_size`,
    resized. Training images are flipped horizontally, half of them.

    Of the 60,000 training images the first `train_images` are for pretraining (and, with labels, for probes and k-NN), and
    the last `val_images` are a validation split for choices of hyper-parameters.

    The files are taken from where they are (`root/FashionMNIST/raw`), else from Debian's package dataset-fashion-mnist,
    unpacked below `root` (`make install` does that) or installed, else by torchvision's download; which, is printed.

    Args:
        root: folder of the data.
        image_size: side in pixels.
        batch_size: images of one process in one step.
        num_workers: processes that read images; the images are in memory, so 0 is fast.
        train_images: size of the training split.
        val_images: size of the validation split; both together are at most 60,000.
        labelled: whether training batches have labels.

    Raises:
        ValueError: the splits are larger than the set, or smaller than one batch.
        FileNotFoundError: the files are in none of the places and cannot be downloaded.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        train_images: int = 10_000,
        val_images: int = 5_000,
        labelled: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        if train_images + val_images > 60_000:
            raise UserError(f"data.train_images {train_images} + data.val_images {val_images} exceed the 60,000 there are")
        if train_images < batch_size:
            raise UserError(f"data.train_images {train_images} is less than one batch: set data.batch_size to that or less")
        self.root = Path(root).expanduser()
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train_images = train_images
        self.val_images = val_images
        self.labelled = labelled
        self.classes = list(FashionMNIST.classes) if labelled else []

    def prepare_data(self) -> None:
        rank_zero_info(f"Fashion-MNIST: {printable(provide(self.root))}")

    def setup(self, stage: str | None = None) -> None:
        train, test = (FashionMNIST(str(self.root), train=train) for train in (True, False))
        self.splits = {
            "train": (train.data[: self.train_images], train.targets[: self.train_images]),
            "val": (train.data[len(train.data) - self.val_images :], train.targets[len(train.data) - self.val_images :]),
            "test": (test.data, test.targets),
        }

    def train_dataloader(self) -> DataLoader[Any]:
        images, labels = self.splits["train"]
        garments = Garments(images, self.image_size, labels if self.labelled else None, flip=True)
        sampler = ResumableSampler(garments)
        return DataLoader(garments, self.batch_size, sampler=sampler, drop_last=True, num_workers=self.num_workers)

    def val_dataloader(self) -> Any:
        """The validation split where there are labels, else none."""
        if not self.labelled:
            return []
        every_image = self.labelled_dataloader("val").dataset
        return DataLoader(every_image, 500, sampler=each_once(every_image), num_workers=self.num_workers)

    def pictured(self, count: int) -> Tensor:
        """The first `count` validation images to look at, of training if there are none: [n 3 H W] in [0, 1], not flipped."""
        images, _ = self.splits["val" if self.val_images else "train"]
        garments = Garments(images[:count], self.image_size)
        return torch.stack([garments[place] for place in range(len(garments))])

    def labelled_dataloader(self, split: Literal["train", "val", "test"], count: int | None = None) -> DataLoader[Any]:
        """Batches of (images [b 3 H W] in [0, 1], labels [b]), not flipped, in a fixed order; the first `count`."""
        images, labels = self.splits[split]
        garments = Garments(images[:count], self.image_size, labels[:count])
        return DataLoader(garments, 500, num_workers=self.num_workers, generator=torch.Generator())


class Garments(Dataset[Any]):
    """uint8 [n 28 28] as [3 H W] in [0, 1], with `flip` mirrored half of the time; with labels [n], pairs of both.

    Whether an image is mirrored depends on (seed, epoch, index) only. To be indexed by (epoch, index), or by the index.
    """

    def __init__(self, images: Tensor, image_size: int, labels: Tensor | None = None, flip: bool = False) -> None:
        self.images = images
        self.image_size = image_size
        self.labels = labels
        self.flip = flip
        self.mirrored: tuple[int | None, Tensor] = (None, torch.zeros(0, dtype=torch.bool))

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, places: list[Place | int]) -> list[Any]:
        epochs, indices = map(list, zip(*map(epoch_and_index, places), strict=True))
        pixels = F.pad(self.images[indices], (2, 2, 2, 2)) / 255
        pixels = repeat(pixels, "b H W -> b c H W", c=3)
        if self.image_size != pixels.shape[-1]:
            size = (self.image_size, self.image_size)
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        if self.flip:
            flipped = rearrange(self.mirrored_in(epochs[0])[indices], "b -> b 1 1 1")
            pixels = torch.where(flipped, pixels.flip(-1), pixels)
        return list(pixels) if self.labels is None else list(zip(pixels, self.labels[indices], strict=True))

    def __getitem__(self, place: Place | int) -> Any:
        return self.__getitems__([place])[0]

    def mirrored_in(self, epoch: int) -> Tensor:
        """bool [n], which images are mirrored in an epoch; kept until the next."""
        seed = derived_seed("mirrored", epoch)
        if self.mirrored[0] != seed:
            self.mirrored = seed, torch.rand(len(self), generator=torch.Generator().manual_seed(seed)) < 0.5
        return self.mirrored[1]


def provide(root: Path) -> str:
    """Puts the files into `root/FashionMNIST/raw`, and says where they are from.

    Raises:
        FileNotFoundError: they are nowhere, and the download failed.
    """
    raw = root / "FashionMNIST" / "raw"
    if all((raw / name).is_file() for name in FILES):
        return f"the files in {raw}"
    for package in (root / "debian" / DEBIAN_FOLDER, Path("/") / DEBIAN_FOLDER):
        if all((package / f"{name}.gz").is_file() for name in FILES):
            raw.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                unzip(package / f"{name}.gz", raw / name)
            return f"Debian's package dataset-fashion-mnist, in {package}"
    try:
        FashionMNIST(str(root), download=True)
    except Exception as error:  # torchvision raises whatever its mirrors raised
        raise MissingFileError(
            f"Fashion-MNIST is not in {raw}, Debian's dataset-fashion-mnist is not unpacked in {root / 'debian'} (make "
            f"install does that) nor installed, and the download failed ({type(error).__name__}): give data.root"
        ) from error
    return f"torchvision's download, in {raw}"


def unzip(source: Path, destination: Path) -> None:
    """Unpacks a .gz file; whoever looks meanwhile sees the whole file or none."""
    part = destination.with_suffix(".part")
    with gzip.open(source) as packed, part.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    part.replace(destination)
