"""Images in folders: ImageNet's layout, class folders, or any heap of photos."""

import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from PIL import Image, ImageOps
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode, v2

from unimim.interfaces import Grid

OnBadImage = Literal["error", "skip"]


class ImageFolderData(pl.LightningDataModule):
    """Batches [b 3 H W] of images in [0, 1] for pretraining, from every image below a folder.

    A folder with `train` and `val` in it is taken as ImageNet's layout: pretraining reads `train`, and the class folders
    of both serve the k-NN callback. Any other folder may be nested or flat.

    The augmentation is MAE's and BEiT v2's: a random crop resized to `image_size`, a horizontal flip, and colour jitter if
    asked for. Jitter comes last and not first, as in BEiT's code, because it is cheaper on the crop than on the photo.

    Args:
        root: the folder.
        image_size: side of the crops in pixels, or (H, W).
        batch_size: images of one process in one step.
        num_workers: processes that read images.
        crop_scale: the crop's share of the image's area (MAE and BEiT v2: 0.2 to 1).
        flip: probability of a horizontal flip.
        color_jitter: strength of jitter in brightness, contrast and saturation (BEiT: 0.4); 0 is none.
        on_bad_image: "error" stops at an unreadable file and names it; "skip" warns, and puts the next readable image in
            its place.

    Raises:
        FileNotFoundError: the folder is missing, or has no image.
        ValueError: a number out of its range; fewer images than one batch; on use, an unreadable image.
    """

    labelled = False

    def __init__(
        self,
        root: str,
        image_size: int | Grid = 224,
        batch_size: int = 256,
        num_workers: int = 8,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        flip: float = 0.5,
        color_jitter: float = 0.0,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        low, high = crop_scale
        if min(batch_size, *((image_size,) if isinstance(image_size, int) else image_size)) < 1 or num_workers < 0:
            raise ValueError(f"data: impossible image_size {image_size}, batch_size {batch_size} or num_workers {num_workers}")
        if not 0 < low <= high <= 1 or not 0 <= flip <= 1 or color_jitter < 0:
            raise ValueError(
                f"data: crop_scale is (low, high) within 0 to 1, flip a probability, color_jitter not negative; got "
                f"{crop_scale}, {flip}, {color_jitter}"
            )
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.on_bad_image = on_bad_image
        self.augmentation = v2.Compose(
            [
                v2.RandomResizedCrop(size, crop_scale, interpolation=InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(flip),
                *([v2.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []),
                *to_pixels(),
            ]
        )
        self.evaluation = v2.Compose(
            [
                v2.Resize(round(max(size) / 0.875), interpolation=InterpolationMode.BICUBIC),
                v2.CenterCrop(size),
                *to_pixels(),
            ]
        )

    @property
    def is_imagenet_layout(self) -> bool:
        """Whether the folder holds `train` and `val`."""
        return (self.root / "train").is_dir() and (self.root / "val").is_dir()

    def setup(self, stage: str | None = None) -> None:
        files = image_files(self.root / "train" if self.is_imagenet_layout else self.root)
        if len(files) < self.batch_size:
            raise ValueError(
                f"{self.root} has {len(files)} images, which is less than one batch of {self.batch_size}: "
                f"set data.batch_size to {len(files)} or less"
            )
        self.images = ImageFiles(files, self.augmentation, self.on_bad_image)

    def teardown(self, stage: str) -> None:
        if skipped := int(self.images.unreadable.sum()):
            rank_zero_warn(f"{skipped} of {len(self.images)} image files in {self.root} could not be read and were skipped")

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(
            self.images,
            self.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def labelled_dataloader(self, split: Literal["train", "val"]) -> DataLoader[Any]:
        """Batches of (images [b 3 H W] in [0, 1], labels [b]), not augmented, from the class folders of `split`.

        Raises:
            FileNotFoundError: the folder is not in ImageNet's layout.
            ValueError: `train` and `val` have other class folders.
        """
        if not self.is_imagenet_layout:
            raise FileNotFoundError(f"labels need {self.root}/train and {self.root}/val with class folders in each")
        classes = {name: class_folders(self.root / name) for name in ("train", "val")}
        if classes["train"] != classes["val"]:
            differ = sorted(set(classes["train"]) ^ set(classes["val"]))
            raise ValueError(f"{self.root}: train and val have other class folders: {', '.join(differ[:5])}")
        folders = [self.root / split / name for name in classes[split]]
        samples = [(path, label) for label, folder in enumerate(folders) for path in image_files(folder)]
        labels = [label for _, label in samples]
        files = ImageFiles([path for path, _ in samples], self.evaluation, self.on_bad_image, labels)
        return DataLoader(files, self.batch_size, num_workers=self.num_workers, generator=torch.Generator())


class ImageFiles(Dataset[Any]):
    """Image files, read as RGB and transformed; with labels, pairs of image and label.

    Args:
        files: their paths.
        transform: PIL image -> tensor [3 H W].
        on_bad_image: "error" or "skip", as in `ImageFolderData`. `unreadable`, bool [files], marks those that were skipped,
            by any worker.
        labels: one a file, or None.
    """

    def __init__(
        self,
        files: list[Path],
        transform: Callable[[Image.Image], Tensor],
        on_bad_image: OnBadImage = "error",
        labels: list[int] | None = None,
    ) -> None:
        self.files = files
        self.transform = transform
        self.on_bad_image = on_bad_image
        self.labels = labels
        self.unreadable = torch.zeros(len(files), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        for offset in range(len(self.files)):
            position = (index + offset) % len(self.files)
            try:
                read = self.read(position)
            except ValueError as error:
                if self.on_bad_image == "error":
                    raise
                if not self.unreadable[position]:
                    self.unreadable[position] = True
                    warnings.warn(f"skipped: {error} ({int(self.unreadable.sum())} skipped so far)", stacklevel=2)
                continue
            return self.sample(position, read)
        raise ValueError(f"none of the {len(self.files)} image files can be read, the first is {self.files[0]}")

    def read(self, position: int) -> Any:
        """What the files of one sample hold; a ValueError here is an unreadable file."""
        return read_image(self.files[position])

    def sample(self, position: int, read: Any) -> Any:
        """What was read, transformed, with its label."""
        pixels = self.transform(read)
        return pixels if self.labels is None else (pixels, self.labels[position])


def read_image(path: Path) -> Image.Image:
    """Any image file as RGB, turned as its EXIF says; 16-bit grey is scaled to 8 bits, other modes go PIL's way (`convert`).

    Raises:
        ValueError: the file cannot be read as an image, or has 32 bits a pixel and so no known white; it is named.
    """
    try:
        with Image.open(path) as image:
            deep_png = image.mode == "I" and image.format == "PNG"  # 16 bits, by an older PIL
            if image.mode in ("I", "F") and not deep_png:
                raise ValueError(f"32-bit gray, mode {image.mode}: convert it to 8 or 16 bits")
            image.load()
            turn_upright(image)
            if image.mode.startswith("I"):  # PIL's own conversion clips at 255
                return image.point(lambda value: value / 256).convert("L").convert("RGB")
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable image {path} ({error}); data.on_bad_image=skip goes on without it") from error


def turn_upright(image: Image.Image) -> None:
    """Turns a loaded image as its EXIF orientation says; a damaged EXIF, of which ImageNet has some, says nothing."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except (struct.error, KeyError, SyntaxError, TypeError, ValueError, ZeroDivisionError):
        return


def image_files(root: Path) -> list[Path]:
    """Every image below `root`, in order, told by the extensions that torchvision knows.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"data.root: there is no folder {root}")
    files = sorted(
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)  # subsets of ImageNet are often folders of links
        for name in names
        if name.lower().endswith(IMG_EXTENSIONS)
    )
    if not files:
        raise FileNotFoundError(f"data.root: no image in or below {root} (looked for {' '.join(IMG_EXTENSIONS)})")
    return files


def class_folders(root: Path) -> list[str]:
    """Names of the folders in `root`, in order."""
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir())


def each_once(images: Any) -> UnrepeatedDistributedSampler | None:
    """The sampler of a process by which several see every image once, and Lightning's would repeat some; None in one.

    Raises:
        ValueError: there are fewer images than processes.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if len(images) < (processes := distributed.get_world_size()):
        raise ValueError(
            f"{len(images)} images cannot be shared by {processes} processes: set trainer.devices to {len(images)} or less"
        )
    return UnrepeatedDistributedSampler(images, shuffle=False)


def to_pixels() -> list[Any]:
    """PIL image -> float tensor [3 H W] in [0, 1]."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
