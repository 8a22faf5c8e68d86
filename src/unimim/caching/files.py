"""Targets of many images on a disk: files that are whole or not there, mapped into memory, a checksum for each target."""

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unimim.errors import UnwritableError, UserError
from unimim.weights.files import content_of
from unimim.weights.written import remove_dead, save_tensors, whole

FILE_IMAGES = 1024
"""The most images in a file: so many are computed again after an interruption."""
FILE_BYTES = 2**28
"""The most bytes of targets in a file: 891 views of a ViT-B at 14x14."""


class TargetFiles:
    """The files of a cache: FOLDER/view-V/NUMBER.safetensors has the targets of `rows` images in a row, in view V.

    Beside them it has `quarters` [n 3 2 2], the mean colours of the four quarters, and `checksums` [n], CRC-32 of both.

    Args:
        folder: of the cache.
        images: of the data.
        shape: of one view's target, (h, w, c) or (h, w).
        dtype: as stored.
    """

    def __init__(self, folder: Path, images: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.folder, self.images, self.shape, self.dtype = folder, images, shape, dtype
        self.view_bytes = math.prod(shape) * dtype.itemsize
        self.rows = min(FILE_IMAGES, max(1, FILE_BYTES // self.view_bytes))
        self.count = math.ceil(images / self.rows)
        self.opened: dict[Path, dict[str, Tensor]] = {}

    def file(self, view: int, number: int) -> Path:
        return self.folder / f"view-{view}" / f"{number:05}.safetensors"

    def indices(self, number: int) -> range:
        """The images of a file."""
        return range(number * self.rows, min((number + 1) * self.rows, self.images))

    def remove_dead(self) -> None:
        """Removes what writers left that were killed."""
        remove_dead([*self.folder.glob("*.part"), *self.folder.glob("view-*/*.part")])

    def missing(self, view: int) -> list[int]:
        """The numbers of the files of a view that are not there."""
        there = {file.name for file in self.file(view, 0).parent.glob("*.safetensors")}
        return [number for number in range(self.count) if self.file(view, number).name not in there]

    def bytes_of(self, view_numbers: list[list[int]]) -> int:
        """Of the targets in some files, given as the numbers of each view."""
        return sum(len(self.indices(number)) for numbers in view_numbers for number in numbers) * self.view_bytes

    def write(self, view: int, number: int, targets: Tensor, quarters: Tensor) -> None:
        """All of a file or none: targets [n ...] as stored, quarters [n 3 2 2].

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        sums = torch.tensor([checksum(*row) for row in zip(targets, quarters, strict=True)])
        content = {"targets": targets.contiguous(), "quarters": quarters.contiguous(), "checksums": sums}
        with whole_in_cache(self.file(view, number)) as part:
            save_tensors(content, part)

    def read(self, view: int, indices: list[int], pinned: bool = False) -> tuple[Tensor, Tensor]:
        """Of these images: targets [n ...] as stored, quarters [n 3 2 2].

        Args:
            pinned: in memory that a GPU reads without waiting.

        Raises:
            ValueError: a file is damaged or missing; it is named.
        """
        targets = torch.empty(len(indices), *self.shape, dtype=self.dtype, pin_memory=pinned)
        quarters = torch.empty(len(indices), 3, 2, 2, pin_memory=pinned)
        for row, index in enumerate(indices):
            number, offset = divmod(index, self.rows)
            content = self.open(view, number)
            target, quarter = content["targets"][offset], content["quarters"][offset]
            if checksum(target, quarter) != content["checksums"][offset]:
                raise UserError(self.damaged(view, number, f"image {index} has another checksum"))
            targets[row], quarters[row] = target, quarter
        return targets, quarters

    def open(self, view: int, number: int) -> dict[str, Tensor]:
        """The tensors of a file, mapped into memory: processes share the pages.

        Raises:
            ValueError: as `read`.
        """
        file = self.file(view, number)
        if file not in self.opened:
            try:
                with safe_open(file, "pt") as content:
                    tensors = {name: content.get_tensor(name) for name in ("targets", "quarters", "checksums")}
            except (OSError, SafetensorError) as error:
                raise UserError(self.damaged(view, number, error)) from error
            expected = (len(self.indices(number)), *self.shape)
            if tensors["targets"].shape != expected or tensors["targets"].dtype != self.dtype:
                found = f"{tuple(tensors['targets'].shape)} {tensors['targets'].dtype}"
                raise UserError(self.damaged(view, number, f"{found}, not {expected} {self.dtype}"))
            self.opened[file] = tensors
        return self.opened[file]

    def open_all(self, views: int) -> None:
        """So that what is cut off, or is on another node's disk, is seen before the first step.

        Raises:
            ValueError: as `read`.
        """
        for view in range(views):
            for number in range(self.count):
                self.open(view, number)

    def damaged(self, view: int, number: int, why: object) -> str:
        return (
            f"{self.file(view, number)} is damaged or missing ({why}): delete it, and the next run with this cache writes it "
            f"again; all nodes share the folder"
        )


def checksum(target: Tensor, quarters: Tensor) -> int:
    """CRC-32 of both."""
    return zlib.crc32(content_of(quarters), zlib.crc32(content_of(target)))


@contextmanager
def whole_in_cache(path: Path) -> Iterator[Path]:
    """As `whole`, for a file or a folder of a cache.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    try:
        with whole(path) as part:
            yield part
    except (OSError, SafetensorError) as error:
        if not path.is_dir():
            raise UnwritableError(
                f"the cache cannot write {path} ({error}): make room, or give another folder (--cache)"
            ) from error


def in_words(size: float) -> str:
    """Bytes as 301 kB, 1.2 MB, 386 GB."""
    power = min(4, int(math.log10(max(size, 1)) / 3))
    number = size / 1000**power
    return f"{number:.{1 if power and number < 100 else 0}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
