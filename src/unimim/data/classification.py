"""Labelled images in class folders, with the augmentations of ImageNet fine-tuning."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_warn
from timm.data import auto_augment, create_transform
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from unimim.data.folder import ImageFiles, OnBadImage, check_reading, each_once, reading
from unimim.data.listing import Listing, class_folders, image_files, labelled_files
from unimim.data.photos import tell_depth
from unimim.data.sampling import ResumableSampler, SeededSamples
from unimim.errors import MissingFileError, UserError
from unimim.printing import printable


def timm_transform(image_size: int, **options: Any) -> Any:
    """timm's transform, bicubic, to pixels [3 H W] in [0, 1] (the model normalizes for itself).

    Raises:
        ValueError: timm does not know the words of `auto_augment`.
    """
    try:
        transform = create_transform(image_size, interpolation="bicubic", normalize=False, **options)
    except (AssertionError, ValueError) as error:
        raise UserError(f"data.auto_augment is {options.get('auto_augment')!r}, which timm does not know: {error}") from error
    for part in transform.transforms:
        for operation in chain(getattr(part, "ops", []), *getattr(part, "policy", [])):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
    return v2.Compose([transform, v2.ToDtype(torch.float32, scale=True)])


def posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, whose highest magnitude keeps 0 bits. That is black, as it always was; Pillow 13 refuses it."""
    return auto_augment.posterize(image, bits, **options) if bits else Image.new(image.mode, image.size)


class ClassFolderData(pl.LightningDataModule):
    """Batches of (images [b 3 H W] in [0, 1], labels [b]) from class folders in `train` and `val`: ImageNet's layout.

    Training images go through timm's augmentations; validation images are resized by `crop_pct`, bicubic, and cropped in the
    centre. For `predict`, `root` may be any folder of photos.

    Args:
        root: the folder.
        image_size: side of the crops in pixels.
        batch_size: images of one process in one step.
        num_workers: processes that read images.
        crop_scale: the crop's share of the image's area (ImageNet: 0.08 to 1).
        flip: probability of a horizontal flip.
        auto_augment: timm's word for RandAugment (BEiT v2: rand-m9-mstd0.5-inc1), or None.
        color_jitter: strength where there is no `auto_augment` (timm: 0.4).
        crop_pct: the validation crop's share of the resized image's side (224 of 256: 0.875).
        labels_per_class: only so many training images of each class, the first by name; None takes all.
        on_bad_image: "error" stops at an unreadable file and names it; "skip" warns, and puts the next readable image in
            its place.
        timeout: seconds after which workers that bring no batch end the run; 0 waits for ever.
        bit_depth: bits that count in 16-bit gray: white is 65535 for 16, and 4095 for the 12 of many cameras.

    Raises:
        FileNotFoundError: `train` or `val` is missing, flat, or empty.
        ValueError: `train` and `val` have other classes, a number out of its range, fewer images than one batch.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        batch_size: int = 128,
        num_workers: int = 8,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        flip: float = 0.5,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        color_jitter: float = 0.4,
        crop_pct: float = 0.875,
        labels_per_class: int | None = None,
        on_bad_image: OnBadImage = "error",
        timeout: float = 600,
        bit_depth: int = 16,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        check_reading(timeout, bit_depth)
        low, high = crop_scale
        if min(image_size, batch_size) < 1 or num_workers < 0 or (labels_per_class is not None and labels_per_class < 1):
            raise UserError(
                f"data: impossible image_size {image_size}, batch_size {batch_size}, num_workers {num_workers} or "
                f"labels_per_class {labels_per_class}"
            )
        if not 0 < low <= high <= 1 or not 0 <= flip <= 1 or not 0 < crop_pct <= 1:
            raise UserError(
                f"data: crop_scale is (low, high) within 0 to 1, flip a probability, crop_pct within 0 to 1; got "
                f"{crop_scale}, {flip}, {crop_pct}"
            )
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.labels_per_class = labels_per_class
        self.on_bad_image = on_bad_image
        self.timeout = timeout
        self.bit_depth = bit_depth
        if color_jitter < 0:
            raise UserError(f"data.color_jitter is {color_jitter}, but it is not negative")
        self.augmentation = timm_transform(
            image_size, is_training=True, scale=crop_scale, hflip=flip, color_jitter=color_jitter, auto_augment=auto_augment
        )
        self.evaluation = timm_transform(image_size, is_training=False, crop_pct=crop_pct)

    @property
    def classes(self) -> list[str]:
        """The names of the class folders, in the order of their labels.

        Raises:
            FileNotFoundError, ValueError: as the class.
        """
        found = {}
        for split in ("train", "val"):
            folder = self.root / split
            root, named = printable(self.root), printable(folder)
            if not folder.is_dir():
                raise MissingFileError(f"data.root: fine-tuning needs {root}/train and {root}/val, there is no {split}")
            found[split] = class_folders(folder)
            if not found[split]:
                listing = Listing(folder)
                listing.check_found(listing.below(folder), folder)
                inside = f"{listing.images} images, but no folder a class"
                raise MissingFileError(f"data.root: {named} has {inside}: sort them into {named}/CLASS/")
        if found["train"] != found["val"]:
            only = {
                split: sorted(set(found[split]) - set(found[other])) for split, other in (("train", "val"), ("val", "train"))
            }
            said = "; ".join(f"only in {split}: {printable(', '.join(names[:3]))}" for split, names in only.items() if names)
            raise UserError(
                f"data.root: {root} has {len(found['train'])} classes in train, {len(found['val'])} in val ({said})"
            )
        return found["train"]

    def setup(self, stage: str | None = None) -> None:
        if stage == "predict":
            files = image_files(self.root)
            tell_depth(files, self.bit_depth)
            self.splits = {"predict": ImageFiles(files, self.evaluation, self.on_bad_image, bit_depth=self.bit_depth)}
            return
        classes = self.classes
        self.splits = {}
        for split, transform in (("train", self.augmentation), ("val", self.evaluation)):
            files, labels = labelled_files(self.root / split, classes, self.labels_per_class if split == "train" else None)
            self.splits[split] = ImageFiles(files, transform, self.on_bad_image, labels, self.bit_depth)
        tell_depth([path for images in self.splits.values() for path in images.files], self.bit_depth)
        if stage == "fit" and len(self.splits["train"]) < self.batch_size:
            found = len(self.splits["train"])
            raise UserError(
                f"{printable(self.root)}/train has {found} images, which is less than one batch of {self.batch_size}: set "
                f"data.batch_size to {found} or less"
            )

    def teardown(self, stage: str) -> None:
        for split, images in self.splits.items():
            if skipped := int(images.unreadable.sum()):
                rank_zero_warn(f"{skipped} of {len(images)} image files in {printable(self.root)} ({split}) could not be read")

    def train_dataloader(self) -> DataLoader[Any]:
        images = self.splits["train"]
        return self._loader(SeededSamples(images), ResumableSampler(images), drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        images = self.splits["val"]
        return self._loader(images, each_once(images))

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.splits["predict"])

    def labelled_dataloader(self, split: str) -> DataLoader[Any]:
        """Batches of (images, labels) of `train` or `val`, not augmented, in a fixed order."""
        images = self.splits[split]
        plain = ImageFiles(images.files, self.evaluation, self.on_bad_image, images.labels, self.bit_depth)
        return DataLoader(plain, self.batch_size, **reading(self), generator=torch.Generator())

    def _loader(self, images: Dataset[Any], sampler: Any = None, drop_last: bool = False) -> DataLoader[Any]:
        return DataLoader(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            **reading(self),
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
