"""Reading an image file: any format, mode and orientation as upright RGB, or one line that names the file."""

import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps
from pytorch_lightning.utilities import rank_zero_info

from unimim.errors import UserError
from unimim.printing import printable

PHOTOS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""Pillow's names of the formats that hold photos. Of several frames the first is read. (HEIF: if pillow-heif is registered.)"""
DAMAGED_EXIF = (struct.error, KeyError, SyntaxError, TypeError, ValueError, ZeroDivisionError)
"""What Pillow raises at it. ImageNet has some; it says nothing."""
DEEP = (".png", ".tif", ".tiff", ".jp2", ".j2k", ".pgm")
"""Endings of images that may have 16 bits."""
LOOKED_AT = 8
"""Of such images, at the start of a run, among so many files:"""
LOOKED_THROUGH = 1000


def read_image(path: Path, bit_depth: int = 16) -> Image.Image:
    """Any image file as RGB, turned as its EXIF says; 16-bit grey is scaled to 8 bits, other modes go PIL's way (`convert`).

    Args:
        path: the file.
        bit_depth: bits that count in 16-bit gray, as in `as_rgb`.

    Raises:
        ValueError: as `opened`.
    """
    with opened(path) as image:
        turn_upright(image)
        return as_rgb(image, bit_depth)


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file of which only the head is read.

    Raises:
        ValueError: the file cannot be read as an image (here or within), or has 32 bits a pixel and so no known white; it is
            named.
    """
    try:
        with opened_photo(path) as image:
            deep_png = image.mode == "I" and image.format == "PNG"  # 16 bits, by an older PIL
            if image.mode in ("I", "F") and not deep_png:
                raise UserError(f"32-bit gray, mode {image.mode}: convert it to 8 or 16 bits")
            yield image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(
            f"unreadable image {printable(path)} ({printable(error)}); data.on_bad_image=skip goes on without it"
        ) from error


def opened_photo(path: Path) -> ImageFile.ImageFile:
    """Opens a file in one of the formats of `PHOTOS`, whatever its ending: Pillow gives EPS to Ghostscript, which is a program.

    Raises:
        OSError: the file has another format, or is a FIFO, a socket or a device, whose reader might wait for ever.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("neither a file nor a link to one")
    return Image.open(path, formats=formats())


@cache
def formats() -> list[str]:
    """Returns those of `PHOTOS` that this Pillow reads."""
    Image.init()
    return [name for name in PHOTOS if name in Image.OPEN]


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


def as_rgb(image: Image.Image, bit_depth: int = 16) -> Image.Image:
    """An image, loaded if it is not yet, in 3 times 8 bits a pixel.

    Args:
        image: of any mode.
        bit_depth: bits that count in 16-bit gray, of which the upper 8 are kept; what is brighter than they can say is white.
    """
    image.load()
    if image.mode.startswith("I"):  # PIL's own conversion clips at 255
        return image.point(lambda value: value / 2 ** (bit_depth - 8)).convert("L").convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def tell_depth(files: list[Path], bit_depth: int) -> None:
    """Says so where images of 16 bits will be nearly black or clipped, as 12-bit data is; looks at a few, spread over all.

    Args:
        files: the paths of images; one that cannot be read is passed over here, because reading it says so.
        bit_depth: bits that count in 16-bit gray, as in `as_rgb`.
    """
    deep = [path for path in files[:: 1 + len(files) // LOOKED_THROUGH] if path.suffix.lower() in DEEP]
    count = min(LOOKED_AT, len(deep))
    gray: dict[Path, int] = {}
    color: dict[Path, int] = {}
    for path in (deep[place * len(deep) // count] for place in range(count)):
        try:
            with opened(path) as image:
                kind = gray if image.mode.startswith("I") else color if ";16" in str(getattr(image, "tile", "")) else None
                if kind is not None:
                    kind[path] = int(np.max(image.getextrema()))
        except (ValueError, OSError):
            continue
    if gray:
        path, highest = max(gray.items(), key=lambda item: item[1])
        bits = max(8, highest.bit_length())
        if highest and (bits <= bit_depth - 2 or bits > bit_depth):
            shown = "nearly black" if bits <= bit_depth else "partly clipped to white"
            rank_zero_info(
                f"16-bit gray images hold values up to {highest} ({len(gray)} looked at, such as {printable(path)}), which are "
                f"{shown} where white is {2**bit_depth - 1}: if they have {bits} bits, give --data.bit_depth {bits}"
            )
    if color and 0 < (highest := max(color.values())) < 64:
        path = next(iter(color))
        rank_zero_info(
            f"16-bit color images such as {printable(path)} are nearly black: Pillow keeps their upper 8 bits, in which they "
            f"hold values up to {highest} ({len(color)} looked at): convert them to 8 bits"
        )
