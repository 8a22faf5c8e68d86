"""Images in folders: ImageNet's layout, class folders, or any heap of photos."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.overrides.distributed import UnrepeatedDistributedSampler
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, v2

from unimim.data.crops import Crop, CropAugmentation
from unimim.data.listing import Listing, class_folders, image_files, labelled_files
from unimim.data.photos import opened, read_image, tell_depth
from unimim.data.sampling import Place, ResumableSampler, derived_seed, epoch_and_index
from unimim.errors import MissingFileError, UserError
from unimim.printing import printable
from unimim.shapes import Grid

OnBadImage = Literal["error", "skip"]


class ImageFolderData(pl.LightningDataModule):
    """Batches [b 3 H W] of images in [0, 1] for pretraining, from every image below a folder.

    A folder with `train` and `val` in it is taken as ImageNet's layout: pretraining reads `train`, and the class folders
    of both serve the k-NN callback. Any other folder may be nested or flat.

    The augmentation is MAE's and BEiT v2's: a random crop resized to `image_size`, a horizontal flip, and colour jitter if
    asked for. Jitter comes last, because it is cheaper on the crop than on the photo. BEiT's code jitters first: there contrast
    turns about the mean of the whole photo, here about the mean of the crop.

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
        timeout: seconds after which workers that bring no batch end the run; 0 waits for ever.
        bit_depth: bits that count in 16-bit gray: white is 65535 for 16, and 4095 for the 12 of many cameras.

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
        timeout: float = 600,
        bit_depth: int = 16,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        check_reading(timeout, bit_depth)
        low, high = crop_scale
        if min(batch_size, *((image_size,) if isinstance(image_size, int) else image_size)) < 1 or num_workers < 0:
            raise UserError(f"data: impossible image_size {image_size}, batch_size {batch_size} or num_workers {num_workers}")
        if not 0 < low <= high <= 1 or not 0 <= flip <= 1 or color_jitter < 0:
            raise UserError(
                f"data: crop_scale is (low, high) within 0 to 1, flip a probability, color_jitter not negative; got "
                f"{crop_scale}, {flip}, {color_jitter}"
            )
        size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.on_bad_image = on_bad_image
        self.timeout = timeout
        self.bit_depth = bit_depth
        self.augmentation = CropAugmentation(size, crop_scale, flip, color_jitter, bit_depth)
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
            raise UserError(
                f"{printable(self.root)} has {len(files)} images, which is less than one batch of {self.batch_size}: "
                f"set data.batch_size to {len(files)} or less"
            )
        tell_depth(files, self.bit_depth)
        self.images = CroppedFiles(files, self.augmentation, self.on_bad_image)

    def teardown(self, stage: str) -> None:
        if skipped := int(self.images.unreadable.sum()):
            where = printable(self.root)
            rank_zero_warn(f"{skipped} of {len(self.images)} image files in {where} could not be read and were skipped")

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of uint8 crops and the jitter to be done, of which `on_after_batch_transfer` makes images."""
        return DataLoader(
            self.images,
            self.batch_size,
            sampler=ResumableSampler(self.images),
            drop_last=True,
            **reading(self),
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The rest of the augmentation, on the device: images [b 3 H W] in [0, 1], in the precision of the Trainer.

        Batches of a subclass's own loaders, which are no crops, stay as they are.
        """
        if not isinstance(batch, Crop):
            return batch
        images = self.augmentation.finish(*batch)
        return self.trainer.precision_plugin.convert_input(images) if self.trainer else images

    def pictured(self, count: int) -> Tensor:
        """At most `count` images to look at, the same always: [n 3 H W] in [0, 1], not augmented, spread over `val`.

        Without images in `val`, over those that are trained on.
        """
        val = self.root / "val"
        files = (Listing(val).below(val) if self.is_imagenet_layout else []) or self.images.files
        images = ImageFiles(files, self.evaluation, self.on_bad_image, bit_depth=self.bit_depth)
        count = min(count, len(files))
        return torch.stack([images[place * len(files) // count] for place in range(count)])

    def labelled_dataloader(self, split: Literal["train", "val"]) -> DataLoader[Any]:
        """Batches of (images [b 3 H W] in [0, 1], labels [b]), not augmented, from the class folders of `split`.

        Raises:
            FileNotFoundError: the folder is not in ImageNet's layout.
            ValueError: `train` and `val` have other class folders.
        """
        if not self.is_imagenet_layout:
            root = printable(self.root)
            raise MissingFileError(f"labels need {root}/train and {root}/val with class folders in each")
        classes = {name: class_folders(self.root / name) for name in ("train", "val")}
        if classes["train"] != classes["val"]:
            differ = sorted(set(classes["train"]) ^ set(classes["val"]))
            named = printable(", ".join(differ[:5]))
            raise UserError(f"{printable(self.root)}: train and val have other class folders: {named}")
        files, labels = labelled_files(self.root / split, classes[split], say=split != "train")  # which `setup` does
        images = ImageFiles(files, self.evaluation, self.on_bad_image, labels, self.bit_depth)
        return DataLoader(images, self.batch_size, **reading(self), generator=torch.Generator())


class Files(Dataset[Any]):
    """Image files, of which some may be unreadable.

    Args:
        files: their paths.
        on_bad_image: "error" or "skip", as in `ImageFolderData`. `unreadable`, bool [files], marks those that were skipped,
            by any worker.
    """

    def __init__(self, files: list[Path], on_bad_image: OnBadImage) -> None:
        self.files = files
        self.on_bad_image = on_bad_image
        self.unreadable = torch.zeros(len(files), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.files)

    def readable(self, index: int, read: Callable[[int], Any]) -> tuple[int, Any]:
        """The first position from `index` on that can be read, and what `read` gives there.

        Raises:
            ValueError: what `read` raises, unless it is to be skipped; none can be read.
        """
        for offset in range(len(self.files)):
            position = (index + offset) % len(self.files)
            try:
                return position, read(position)
            except ValueError as error:
                if self.on_bad_image == "error":
                    raise
                if not self.unreadable[position]:
                    self.unreadable[position] = True
                    warnings.warn(f"skipped: {error} ({int(self.unreadable.sum())} skipped so far)", stacklevel=2)
        raise UserError(f"none of the {len(self.files)} image files can be read, the first is {printable(self.files[0])}")


class ImageFiles(Files):
    """Image files, read as RGB and transformed; with labels, pairs of image and label.

    Args:
        files: their paths.
        transform: PIL image -> tensor [3 H W].
        on_bad_image: as in `Files`.
        labels: one a file, or None.
        bit_depth: as `read_image`.
    """

    def __init__(
        self,
        files: list[Path],
        transform: Callable[[Any], Any],
        on_bad_image: OnBadImage = "error",
        labels: list[int] | None = None,
        bit_depth: int = 16,
    ) -> None:
        super().__init__(files, on_bad_image)
        self.bit_depth = bit_depth
        self.transform = transform
        self.labels = labels

    def __getitem__(self, index: int) -> Any:
        return self.sample(*self.readable(index, self.read))

    def read(self, position: int) -> Any:
        """What the files of one sample hold; a ValueError here is an unreadable file."""
        return read_image(self.files[position], self.bit_depth)

    def sample(self, position: int, read: Any) -> Any:
        """What was read, transformed, with its label."""
        pixels = self.transform(read)
        return pixels if self.labels is None else (pixels, self.labels[position])


class CroppedFiles(Files):
    """Image files, of each a `Crop`.

    What is drawn depends on (seed, epoch, index) only. To be indexed by (epoch, index), or by the index.
    """

    def __init__(self, files: list[Path], augmentation: CropAugmentation, on_bad_image: OnBadImage = "error") -> None:
        super().__init__(files, on_bad_image)
        self.augmentation = augmentation

    def __getitem__(self, place: Place | int) -> Crop:
        epoch, index = epoch_and_index(place)
        # not torch's own generator: to keep and set its state, as `seeded` does, takes longer than to draw
        generator = torch.Generator().manual_seed(derived_seed("sample", epoch, index))

        def cut(position: int) -> Tensor:
            with opened(self.files[position]) as image:
                return self.augmentation.cut(image, generator)

        _, pixels = self.readable(index, cut)
        return self.augmentation.draw(pixels, generator)


def check_reading(timeout: float, bit_depth: int) -> None:
    """
    Raises:
        ValueError: a number is out of its range.
    """
    if not timeout >= 0:
        raise UserError(f"data.timeout is in seconds, at least 0, which waits for ever; got {timeout}")
    if not 8 <= bit_depth <= 16:
        raise UserError(f"data.bit_depth is 8 to 16 bits of a 16-bit image, got {bit_depth}")


def reading(data: Any) -> dict[str, Any]:
    """What the loaders of a data module are told of its workers: their number, and how long one may take for a batch."""
    return {"num_workers": data.num_workers, "timeout": data.timeout if data.num_workers else 0}


def each_once(images: Any) -> UnrepeatedDistributedSampler | None:
    """The sampler of a process by which several see every image once, and Lightning's would repeat some; None in one.

    Raises:
        ValueError: there are fewer images than processes.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    if len(images) < (processes := distributed.get_world_size()):
        raise UserError(
            f"{len(images)} images cannot be shared by {processes} processes: set trainer.devices to {len(images)} or less"
        )
    return UnrepeatedDistributedSampler(images, shuffle=False)


def to_pixels() -> list[Any]:
    """PIL image -> float tensor [3 H W] in [0, 1]."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
