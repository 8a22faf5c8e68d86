"""Images with label maps in folders: ADE20K as published, or anyone's own, with mmsegmentation's augmentation."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor

from unimim.data.folder import ImageFiles, OnBadImage, check_reading, each_once, reading, to_pixels
from unimim.data.listing import image_files
from unimim.data.photos import opened_photo, read_image, tell_depth
from unimim.data.sampling import ResumableSampler, SeededSamples
from unimim.data.segmentation_transforms import FitImage, PadTo, PhotometricDistortion, RandomScale, Sides, VariedCrop
from unimim.errors import MissingFileError, UserError
from unimim.printing import printable
from unimim.shapes import IGNORED

VALUES = 2**16
"""As many a label PNG can hold."""
NO_CLASS = -1
SCALE = "scale"
"""Where a label image says by what its values are multiplied."""
SCALED_BY_PILLOW = {"L;2": 85, "L;4": 17}
"""By what Pillow multiplies the values of grey PNGs of 2 and 4 bits, to fill 8 bits."""
LOOKED_AT = 200
"""Label files, at most, at the start of a run."""


class SegmentationFolderData(pl.LightningDataModule):
    """Batches of (images [b 3 H W] in [0, 1], labels long [b H W]) from `images/{train,val}` and `labels/{train,val}`.

    An image and its label have the same name but for the suffix. A label is a PNG whose grey values, or indices into its
    palette, are the classes: 0 is the first, 255 is ignored (`IGNORED`). `label_values` says so of other values, such as those
    of masks of 0 and 255. In a PNG of 1 bit black is the value 0 and white 1.

    Training: a random scale, a crop in which no class has 75 % or more, a horizontal flip, photometric distortion, and where
    an image is smaller than the crop, padding by ImageNet's mean, ignored. Validation: one whole image at a time, resized to
    fit in `resize`; its label stays at its own size, at which metrics are taken: ([1 3 H W], [1 H' W']). For `predict`,
    `root` may be any folder of photos; each comes whole and at its own size, [1 3 H W].

    Args:
        root: the folder.
        classes: their names in the order of the labels: a list, or a text file with one a line, or with a column `Name` between
            tabs. None looks into the `classes.txt` of the folder.
        image_size: side of the training crops in pixels.
        batch_size: training images of one process in one step.
        num_workers: processes that read images.
        resize: (long, short) side in pixels that images are fitted into.
        scale: (low, high) of the random factor on `resize` in training.
        flip: probability of a horizontal flip.
        on_bad_image: "error" stops at an unreadable image or label file and names it; "skip" warns, and puts the next
            readable pair in its place. A label that can be read and is wrong always stops.
        timeout: seconds after which workers that bring no batch end the run; 0 waits for ever.
        bit_depth: bits that count in 16-bit gray: white is 65535 for 16, and 4095 for the 12 of many cameras.
        label_values: the value of each class in a label PNG, in the order of `classes`: [0, 255] for masks of these two. None
            counts from 0 on. A value among them is never ignored.

    Raises:
        FileNotFoundError: a folder or the names of the classes are missing.
        ValueError: images without label or labels without image, a number out of its range, fewer images than one batch; on
            use, an unreadable file, an image and a label of different sizes, a label value that is no class.
    """

    folders: ClassVar[dict[str, tuple[str, str]]] = {
        "train": ("images/train", "labels/train"),
        "val": ("images/val", "labels/val"),
    }
    """Where images and labels of each split are."""
    classes_file: ClassVar[str] = "classes.txt"
    first_value: ClassVar[int] = 0
    """The value of the first class in a label PNG; the others follow it, if there are no `label_values`."""
    ignored_value: ClassVar[int] = IGNORED
    """The value of ignored pixels in a label PNG."""

    def __init__(
        self,
        root: str,
        classes: list[str] | str | None = None,
        image_size: int = 512,
        batch_size: int = 2,
        num_workers: int = 8,
        resize: Sides = (2048, 512),
        scale: tuple[float, float] = (0.5, 2.0),
        flip: float = 0.5,
        on_bad_image: OnBadImage = "error",
        timeout: float = 600,
        bit_depth: int = 16,
        label_values: list[int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        check_reading(timeout, bit_depth)
        if min(image_size, batch_size) < 1 or num_workers < 0:
            raise UserError(f"data: impossible image_size {image_size}, batch_size {batch_size} or num_workers {num_workers}")
        if not 1 <= resize[1] <= resize[0] or not 0 < scale[0] <= scale[1] or not 0 <= flip <= 1:
            raise UserError(
                f"data: resize is (long, short) in pixels, scale (low, high) above 0, flip a probability; got {resize}, "
                f"{scale}, {flip}"
            )
        self.root = Path(root).expanduser()
        self.resize = resize
        self.given_classes = classes
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.on_bad_image = on_bad_image
        self.timeout = timeout
        self.bit_depth = bit_depth
        self.label_values = label_values
        self.told_classes = False
        to_float = v2.ToDtype(torch.float32, scale=True)
        self.augmentation = v2.Compose(
            [
                RandomScale(resize, scale),
                VariedCrop(image_size),
                v2.RandomHorizontalFlip(flip),
                to_float,
                PhotometricDistortion(),
                PadTo(image_size),
            ]
        )
        self.evaluation = v2.Compose([FitImage(resize), to_float])

    @property
    def classes(self) -> list[str]:
        """The names of the classes, in the order of their labels.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: fewer than 2, more than 255, or the same name twice.
        """
        given = self.given_classes
        names = (
            list(given) if isinstance(given, list) else read_names(Path(given or self.root / self.classes_file).expanduser())
        )
        if not 2 <= len(names) <= IGNORED:
            raise UserError(f"data.classes: {len(names)} names, expected 2 to {IGNORED}")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"data.classes: the same name twice: {printable(', '.join(twice[:3]))}")
        return names

    def setup(self, stage: str | None = None) -> None:
        if stage == "predict":
            files = image_files(self.root)
            tell_depth(files, self.bit_depth)
            photos = ImageFiles(files, v2.Compose(to_pixels()), self.on_bad_image, bit_depth=self.bit_depth)
            self.splits: dict[str, ImageFiles] = {"predict": photos}
            return
        self.splits = {"val": self._labelled("val", self.evaluation)}
        if stage != "validate":
            self.splits["train"] = self._labelled("train", self.augmentation)
        tell_depth([path for images in self.splits.values() for path in images.files], self.bit_depth)
        if stage == "validate":
            return
        if (found := len(self.splits["train"])) < self.batch_size:
            raise UserError(
                f"{printable(self.root / self.folders['train'][0])} has {found} images, which is less than one batch of "
                f"{self.batch_size}: set data.batch_size to {found} or less"
            )

    def _labelled(self, split: str, transform: Any) -> "LabelledImageFiles":
        pairs = image_label_pairs(*(self.root / folder for folder in self.folders[split]))
        classes = self.classes
        values = self.label_values or range(self.first_value, self.first_value + len(classes))
        files = LabelledImageFiles(pairs, transform, classes, values, self.ignored_value, self.on_bad_image, self.bit_depth)
        if self.label_values is None:
            files.check_values()
        return files

    def tell_unreadable(self, device: torch.device) -> None:
        """Says how many files of each split no process could read so far (`on_bad_image: skip`). All processes call it.

        After the first epoch of a run it says which classes were in none of the training labels.

        Args:
            device: where the processes exchange what they know.
        """

        def of_all_processes(marks: Tensor) -> Tensor:
            marks = marks.to(device, torch.uint8)
            if distributed.is_available() and distributed.is_initialized():
                distributed.all_reduce(marks, distributed.ReduceOp.MAX)
            return marks.bool().cpu()

        for split, images in self.splits.items():
            if skipped := int(of_all_processes(images.unreadable).sum()):
                where = printable(self.root)
                rank_zero_info(f"{skipped} of {len(images)} image files in {where} ({split}) could not be read")
        images = self.splits["train"]
        if isinstance(images, LabelledImageFiles) and not self.told_classes:
            self.told_classes = True
            read, occurred = of_all_processes(images.read_labels), of_all_processes(images.occurred)
            absent = [printable(name) for name, found in zip(images.classes, occurred.tolist(), strict=True) if not found]
            if absent and read.any():
                named = f"{', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}"
                rank_zero_info(
                    f"{len(absent)} of {len(images.classes)} classes were in none of the {int(read.sum())} training labels "
                    f"read so far: {named}"
                )

    def teardown(self, stage: str) -> None:
        for split, images in self.splits.items():
            if skipped := int(images.unreadable.sum()):
                rank_zero_warn(f"{skipped} of {len(images)} image files in {printable(self.root)} ({split}) could not be read")

    def train_dataloader(self) -> DataLoader[Any]:
        images = self.splits["train"]
        return self._loader(SeededSamples(images), ResumableSampler(images), self.batch_size, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        images = self.splits["val"]
        return self._loader(images, each_once(images))

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.splits["predict"])

    def _loader(
        self, images: Dataset[Any], sampler: Any = None, batch_size: int = 1, drop_last: bool = False
    ) -> DataLoader[Any]:
        return DataLoader(
            images,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=drop_last,
            **reading(self),
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class ADE20KData(SegmentationFolderData):
    """ADE20K's 150 classes (Zhou et al., 2017) from `ADEChallengeData2016` as published.

    `images/{training,validation}` and `annotations/{training,validation}` are read as they are: 0 in an annotation is
    ignored, 1 to 150 are the labels 0 to 149. The names are those of the folder's `objectInfo150.txt`, the first synonym of
    each. Everything else is as in `SegmentationFolderData`.
    """

    folders: ClassVar[dict[str, tuple[str, str]]] = {
        "train": ("images/training", "annotations/training"),
        "val": ("images/validation", "annotations/validation"),
    }
    classes_file = "objectInfo150.txt"
    first_value = 1
    ignored_value = 0


class LabelledImageFiles(ImageFiles):
    """Pairs of image and label files, transformed together.

    Args:
        pairs: the paths of an image and of its label PNG.
        transform: (Image uint8 [3 H W], Mask uint8 [H W]) -> (float [3 H W], labels [H W]).
        classes: their names.
        values: what the PNGs hold for each class.
        ignored_value: what they hold for ignored pixels, unless a class has that value.
        on_bad_image: "error" or "skip", as in `SegmentationFolderData`.
        bit_depth: as `read_image`.

    Attributes:
        occurred: bool [classes], those in the labels that any worker has read.
        read_labels: bool [files], those labels.

    Raises:
        ValueError: the values are not one a class, from 0 to 65535.
    """

    transform: Any

    def __init__(
        self,
        pairs: list[tuple[Path, Path]],
        transform: Any,
        classes: list[str],
        values: Sequence[int],
        ignored_value: int = IGNORED,
        on_bad_image: OnBadImage = "error",
        bit_depth: int = 16,
    ) -> None:
        super().__init__([image for image, _ in pairs], transform, on_bad_image, bit_depth=bit_depth)
        if len(values) != len(classes) or len(set(values)) < len(values) or not all(0 <= value < VALUES for value in values):
            raise UserError(
                f"data.label_values are {len(classes)} different values from 0 to {VALUES - 1}, one a class; got {list(values)}"
            )
        self.label_files = [label for _, label in pairs]
        self.classes = classes
        self.values = values
        self.ignored_value = ignored_value
        self.labels_by_value = torch.full((VALUES,), NO_CLASS, dtype=torch.int16)
        self.labels_by_value[ignored_value] = IGNORED
        self.labels_by_value[torch.tensor(values)] = torch.arange(len(values), dtype=torch.int16)
        self.occurred = torch.zeros(len(classes), dtype=torch.bool).share_memory_()
        self.read_labels = torch.zeros(len(pairs), dtype=torch.bool).share_memory_()

    def read(self, position: int) -> tuple[Image.Image, Image.Image]:
        return read_image(self.files[position], self.bit_depth), read_label(self.label_files[position])

    def sample(self, position: int, read: tuple[Image.Image, Image.Image]) -> tuple[Tensor, Tensor]:
        image, png = read
        path = self.label_files[position]
        if image.size != png.size:
            (width, height), (label_width, label_height) = image.size, png.size
            raise UserError(
                f"{printable(self.files[position])} has {height}x{width} pixels (HxW), its label {printable(path)} has "
                f"{label_height}x{label_width}: they have to be of one size"
            )
        label = self.labels_of(png, path)
        occurred = label.flatten().bincount(minlength=IGNORED + 1)[: len(self.classes)] > 0
        self.occurred[occurred] = True  # and never False, which other processes may have changed meanwhile
        self.read_labels[position] = True
        pixels, labels = self.transform(tv_tensors.Image(image), tv_tensors.Mask(label))
        return pixels.as_subclass(Tensor), labels.as_subclass(Tensor).long()

    def labels_of(self, png: Image.Image, path: Path) -> Tensor:
        """The PNG's values as labels, uint8 [H W].

        Raises:
            ValueError: it is no PNG, holds colours, or a value that is no class.
        """
        if png.format != "PNG":
            raise UserError(
                f"{printable(path)} holds a {png.format}, not a PNG: a label has to be a PNG, which keeps its values"
            )
        if png.mode not in ("1", "L", "P", "I;16", "I"):  # 16 bits are I by an older PIL
            raise UserError(
                f"{printable(path)} has colours or transparency (mode {png.mode}): a label is a grey or palette PNG of 1 to 16 "
                f"bits, whose values are the classes"
            )
        values = pil_to_tensor(png)[0].int() // png.info.get(SCALE, 1)
        labels = self.labels_by_value[values]
        if (wrong := labels == NO_CLASS).any():
            found = values[wrong].unique().tolist()
            more = f" (and {len(found) - 1} other values)" if len(found) > 1 else ""
            given = isinstance(self.values, list)
            are = ", ".join(map(str, self.values)) if given else f"{self.values[0]} to {self.values[-1]}"
            ignored = "" if self.ignored_value in self.values else f", and {self.ignored_value} is ignored"
            raise UserError(
                f"{printable(path)} has the value {found[0]}{more}, but the {len(self.classes)} classes are {are}{ignored}: "
                f"correct the file, data.classes or data.label_values"
            )
        return labels.to(torch.uint8)

    def values_of(self, paths: Iterable[Path]) -> set[int]:
        """The labels that occur in these files, up to the first that has a second class."""
        occurred: set[int] = set()
        for path in paths:
            try:
                labels = self.labels_of(read_label(path), path)
            except ValueError:  # which is raised again where a batch needs this file
                continue
            occurred |= set(labels.unique().tolist())
            if len(occurred - {IGNORED}) > 1:
                break
        return occurred

    def check_values(self) -> None:
        """Looks at label files, spread over all, until a second class occurs: in most data that is the first file or two.

        Where none occurs and pixels are ignored, it looks at all of them.

        Raises:
            ValueError: there are one class and ignored pixels alone, as in masks of 0 and 255.
        """
        count = min(LOOKED_AT, len(self.label_files))
        occurred = self.values_of(self.label_files[place * len(self.label_files) // count] for place in range(count))
        if IGNORED in occurred and len(occurred) == 2:  # a second class may be rare
            count = len(self.label_files)
            occurred = self.values_of(self.label_files)
        if IGNORED in occurred and len(occurred) == 2:
            only, ignored, values = min(occurred), self.ignored_value, list(self.values)
            given = [values[0], ignored] if only == 0 else [ignored, values[-1]]
            which = f": {given} if {ignored} is one, {values} if it is to be ignored" if len(values) == 2 else ""
            raise UserError(
                f"{printable(self.label_files[0].parent)}: the labels ({count} looked at) hold {values[only]}, which is class "
                f"{printable(self.classes[only])}, and else only {ignored}, which is ignored, so there is nothing to learn: "
                f"give --data.label_values, the value of each class{which}"
            )


def image_label_pairs(images: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Every image below `images` with the PNG of the same name below `labels`, in order.

    Raises:
        FileNotFoundError: a folder is missing or empty.
        ValueError: two have one name, or some have no partner; the first three are named.
    """
    label_files = image_files(labels)
    others = [path for path in label_files if path.suffix.lower() != ".png"]
    of_images = by_name(image_files(images), images)
    of_labels = by_name([path for path in label_files if path not in others], labels)
    alone = {
        f"images in {printable(images)} without {printable(labels)}/NAME.png": [
            path for name, path in of_images.items() if name not in of_labels
        ],
        f"labels in {printable(labels)} without image": [path for name, path in of_labels.items() if name not in of_images],
    }
    if any(alone.values()):
        alone[f"files in {printable(labels)} that are no PNG"] = others
    said = [
        f"{len(paths)} {what}: {', '.join(printable(path.name) for path in paths[:3])}{' ...' if len(paths) > 3 else ''}"
        for what, paths in alone.items()
        if paths
    ]
    if said:
        raise UserError(f"data.root: {'; '.join(said)}")
    return [(path, of_labels[name]) for name, path in of_images.items()]


def by_name(files: list[Path], root: Path) -> dict[Path, Path]:
    """Each file by its path below `root` without the suffix.

    Raises:
        ValueError: two are the same but for the suffix.
    """
    named: dict[Path, Path] = {}
    for path in files:
        name = path.relative_to(root).with_suffix("")
        if name in named:
            raise UserError(
                f"data.root: {printable(named[name])} and {printable(path)} have one name: an image and its label share theirs"
            )
        named[name] = path
    return named


def read_label(path: Path) -> Image.Image:
    """A label PNG as it is; where Pillow multiplies its values, `info` says by what.

    Raises:
        ValueError: the file cannot be read as an image; it is named.
    """
    try:
        with opened_photo(path) as png:
            stored = str(png.tile[0].args) if png.tile else ""
            png.load()
            png.info[SCALE] = SCALED_BY_PILLOW.get(stored, 1)
            return png
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"unreadable label {printable(path)} ({printable(error)}); data.on_bad_image=skip goes on without it"
        ) from error


def read_names(path: Path) -> list[str]:
    """The names of classes from a text file: one a line, or the first synonym of each in a table's column `Name`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a table without such a column, or a row without a name.
    """
    if not path.is_file():
        raise MissingFileError(
            f"data.classes: there is no file {printable(path)}; give a list of names, or a text file with one a line"
        )
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines or "\t" not in lines[0]:
        return [line.strip() for line in lines]
    header = [column.strip() for column in lines[0].split("\t")]
    rows = [line.split("\t") for line in lines[1:]]
    if "Name" not in header or any(len(row) != len(header) for row in rows):
        raise UserError(f"data.classes: {printable(path)} is no table with a column Name, nor a list with one name a line")
    return [row[header.index("Name")].split(",")[0].split(";")[0].strip() for row in rows]
