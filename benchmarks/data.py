"""Images a second that one core makes of JPEG files, beside torchvision's ImageFolder with the same augmentation through PIL.

make bench        (python benchmarks/data.py)      three tables, and outputs/bench/data*.json

The files are the photos that come with scikit-learn and scikit-image at ImageNet's typical size, 500x375, quality 90; for the
last table four by four of them as one. All is read in one process by one thread. What a worker does ends with its batch,
which is uint8; what is left, pixels and colours, is for the device: a second row has it on the same core.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import report
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from unimim import ImageFolderData

PHOTOS = {
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "skimage": ("data/astronaut.png", "data/coffee.png", "data/motorcycle_left.png", "data/rocket.jpg"),
}
TYPICAL, QUALITY = (500, 375), 90
SIZE, SCALE, FLIP, JITTER = 224, (0.2, 1.0), 0.5, 0.4  # of MaskDistill's and BEiT v2's recipes; MAE's has no jitter
FILES, LARGE_FILES, BATCH, REPETITIONS = 36, 12, 12, 40
REFERENCE = "torchvision and PIL (reference)"


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        typical, large = Path(folder, "typical"), Path(folder, "large")
        photos = [ImageOps.fit(photo, TYPICAL, Image.Resampling.BICUBIC) for photo in shipped()]
        write(typical, photos, FILES)
        write(large, [mosaic(photos)], LARGE_FILES)
        compare("data", typical, 0.0)
        compare("data_jitter", typical, JITTER)
        compare("data_large", large, 0.0)


def shipped() -> Iterator[Image.Image]:
    """The photos in the installed packages."""
    for package, names in PHOTOS.items():
        for name in names:
            with files(package).joinpath(name).open("rb") as file:
                yield Image.open(file).convert("RGB")


def mosaic(photos: list[Image.Image]) -> Image.Image:
    """Four by four photos as one large one."""
    width, height = TYPICAL
    large = Image.new("RGB", (4 * width, 4 * height))
    for i in range(16):
        large.paste(photos[i % len(photos)], (i % 4 * width, i // 4 * height))
    return large


def write(folder: Path, photos: list[Image.Image], count: int) -> None:
    """As JPEG files in turn, in a folder of one class."""
    (folder / "photos").mkdir(parents=True)
    for i in range(count):
        photos[i % len(photos)].save(folder / "photos" / f"{i}.jpg", quality=QUALITY)


def compare(key: str, folder: Path, color_jitter: float) -> None:
    """One table: the reference and ours, an epoch each in turn."""
    data = ImageFolderData(str(folder), SIZE, BATCH, 0, SCALE, FLIP, color_jitter)
    data.setup()
    ours = data.train_dataloader()
    jitter = [transforms.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []
    crop = [
        transforms.RandomResizedCrop(SIZE, SCALE, interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(FLIP),
    ]
    ways: dict[str, Callable[[], object]] = {
        REFERENCE: epoch(through_pil(folder, [*crop, *jitter])),
        **(
            {"the same, jitter before the crop as in BEiT's code": epoch(through_pil(folder, [*jitter, *crop]))}
            if jitter
            else {}
        ),
        "unimim, what a worker does": epoch(ours),
        "unimim, with what is left for the device": epoch(ours, lambda batch: data.on_after_batch_transfer(batch, 0)),
    }
    images = len(data.images)
    seconds = report.in_turn(ways, REPETITIONS)
    with Image.open(data.images.files[0]) as photo:
        width, height = photo.size
    kilobytes = sum(file.stat().st_size for file in data.images.files) / images / 1000
    report.report(
        key,
        {way: {"values": [images / each for each in seconds[way]]} for way in ways},
        of=f"{width}x{height}, {kilobytes:.0f} kB a file, to {SIZE} px" + (f", jitter {color_jitter}" if jitter else ""),
        unit="images/s",
        setup=f"one process, batch {BATCH}, {images} files, {REPETITIONS} epochs of each in turn after a warm-up",
        machine=report.machine("torchvision", "pillow"),
        reference=REFERENCE,
    )


def through_pil(folder: Path, augmentation: list[Any]) -> DataLoader[Any]:
    """torchvision's way."""
    images = ImageFolder(str(folder), transforms.Compose([*augmentation, transforms.ToTensor()]))
    return DataLoader(images, BATCH, shuffle=True, drop_last=True)


def epoch(loader: Iterable[Any], then: Callable[[Any], object] = lambda batch: batch) -> Callable[[], None]:
    """All batches once."""

    def once() -> None:
        for batch in loader:
            then(batch)

    return once


if __name__ == "__main__":
    main()
