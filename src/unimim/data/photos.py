"""Reading an image file: any format, mode and orientation as upright RGB, or one line that names the file."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

DAMAGED_EXIF = (struct.error, KeyError, SyntaxError, TypeError, ValueError, ZeroDivisionError)
"""What Pillow raises at it. ImageNet has some; it says nothing."""


def read_image(path: Path) -> Image.Image:
    """Any image file as RGB, turned as its EXIF says; 16-bit grey is scaled to 8 bits, other modes go PIL's way (`convert`).

    Raises:
        ValueError: as `opened`.
    """
    with opened(path) as image:
        turn_upright(image)
        return as_rgb(image)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file of which only the head is read.

    Raises:
        ValueError: the file cannot be read as an image (here or within), or has 32 bits a pixel and so no known white; it is
            named.
    """
    try:
        with Image.open(path) as image:
            deep_png = image.mode == "I" and image.format == "PNG"  # 16 bits, by an older PIL
            if image.mode in ("I", "F") and not deep_png:
                raise ValueError(f"32-bit gray, mode {image.mode}: convert it to 8 or 16 bits")
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"unreadable image {path} ({error}); data.on_bad_image=skip goes on without it") from error


def is_turned(image: Image.Image) -> bool:
    """Whether its EXIF says that it does not lie as it is stored."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except DAMAGED_EXIF:
        return False


def turn_upright(image: Image.Image) -> None:
    """Loads an image, and turns it as its EXIF orientation says."""
    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except DAMAGED_EXIF:
        return


def as_rgb(image: Image.Image) -> Image.Image:
    """An image, loaded if it is not yet, in 3 times 8 bits a pixel."""
    image.load()
    if image.mode.startswith("I"):  # PIL's own conversion clips at 255
        return image.point(lambda value: value / 256).convert("L").convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
