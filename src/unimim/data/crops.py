"""The augmentation of pretraining in two parts: uint8 crops where files are read, pixels and colours where the network runs."""

import math
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from unimim.data.photos import as_rgb, is_turned, turn_upright
from unimim.shapes import Grid

ASPECT = 3 / 4, 4 / 3
TRIES = 10  # these two are the defaults of torchvision's RandomResizedCrop
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the numbers that torchvision's ColorJitter gives them
GAP = 2  # Pillow's own, in `Image.thumbnail`
PIECE = 8  # images that stay in a CPU's cache


class Crop(NamedTuple):
    """What a worker makes of a photo, or of a batch of them."""

    pixels: Tensor
    """uint8 [H W 3]."""
    jitter: Tensor
    """[steps 2]: of each step in turn, which it is and its factor."""


class CropAugmentation:
    """A random crop resized to `size`, a horizontal flip, colour jitter: torchvision's transforms of a PIL image, in two parts.

    What is drawn is the same, bit for bit. The pixels are, but for rounding: the crop is resized by torch in uint8, and colours
    are not rounded between the steps of the jitter. One more difference is in large photos: where a crop has at least 4 times
    the height and width of `size`, the decoder of a JPEG reduces it to 1/2, 1/4 or 1/8, down to no less than `GAP` times
    `size`. At ImageNet's typical size (500x375, crops to 224) there is no such crop.

    Args:
        size: (H, W) of the crops in pixels.
        crop_scale: the crop's share of the image's area.
        flip: probability of a horizontal flip.
        color_jitter: strength of jitter in brightness, contrast and saturation; 0 is none.
        bit_depth: bits that count in 16-bit gray, as in `as_rgb`.
    """

    def __init__(
        self, size: Grid, crop_scale: tuple[float, float], flip: float, color_jitter: float, bit_depth: int = 16
    ) -> None:
        self.size = size
        self.crop_scale = crop_scale
        narrowest, widest = torch.tensor(ASPECT).log().tolist()
        self.log_aspect = narrowest, widest
        self.flip = flip
        self.color_jitter = color_jitter
        self.bit_depth = bit_depth

    # Where the files are read

    def cut(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """An image of which only the head is read -> a random crop, uint8 [3 H W]."""
        if is_turned(image):
            turn_upright(image)
        left, top, right, bottom = box = self.draw_box(image.height, image.width, generator)
        reduced = self.reduce(image, bottom - top, right - left)
        photo = as_rgb(image, self.bit_depth)
        if reduced == 1:
            pixels = as_tensor(photo.crop(box))
            return functional.resize_image(pixels, list(self.size), InterpolationMode.BICUBIC, antialias=True)
        within = (left / reduced, top / reduced, right / reduced, bottom / reduced)  # no whole pixels, which torch cannot take
        return as_tensor(photo.resize(self.size[::-1], Image.Resampling.BICUBIC, within))

    def draw_box(self, height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of a crop, as torchvision's RandomResizedCrop draws it, which takes longer to do so."""
        for _ in range(TRIES):
            area = height * width * evenly(*self.crop_scale, generator).item()
            aspect = evenly(*self.log_aspect, generator).exp().item()
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top = int(torch.randint(0, height - h + 1, (1,), generator=generator))
                left = int(torch.randint(0, width - w + 1, (1,), generator=generator))
                return left, top, left + w, top + h
        low, high = ASPECT  # nothing fits: the largest in the centre
        w, h = min(width, round(height * high)), min(height, round(width / low))
        left, top = (width - w) // 2, (height - h) // 2
        return left, top, left + w, top + h

    def reduce(self, image: Image.Image, height: int, width: int) -> int:
        """Tells a JPEG's decoder how much smaller the photo may be, of which a crop of this size is wanted: 1, 2, 4 or 8 times.

        Images of other formats, and those that are loaded, stay as they are.
        """
        most = min(height // self.size[0], width // self.size[1]) // GAP
        part = next(part for part in (8, 4, 2, 1) if part <= max(most, 1))
        return part if image.draft(None, (image.width // part, image.height // part)) else 1

    def draw(self, pixels: Tensor, generator: torch.Generator) -> Crop:
        """uint8 [3 H W], the same or mirrored, and the jitter that is to be done."""
        if torch.rand(1, generator=generator).item() < self.flip:
            pixels = pixels.flip(-1)
        return Crop(pixels.permute(1, 2, 0), self.draw_jitter(generator))

    def draw_jitter(self, generator: torch.Generator) -> Tensor:
        """Which steps, in what order, by what factors, as torchvision's ColorJitter draws them: [steps 2]."""
        if not self.color_jitter:
            return torch.empty(0, 2)
        order = torch.randperm(HUE + 1, generator=generator).tolist()
        low, high = max(0, 1 - self.color_jitter), 1 + self.color_jitter
        factors = [evenly(low, high, generator).item() for _ in range(HUE)]
        return torch.tensor([(which, factors[which]) for which in order if which != HUE])

    # Where the network runs

    def finish(self, pixels: Tensor, jitter: Tensor) -> Tensor:
        """A batch of what `draw` gave, uint8 [b H W 3] and [b steps 2] -> float32 [b 3 H W] in [0, 1]."""
        b, H, W, c = pixels.shape
        images = torch.empty(b, c, H, W, device=pixels.device)
        piece = PIECE if images.device.type == "cpu" else b
        for part, source, steps in zip(images.split(piece), pixels.split(piece), jitter.split(piece), strict=True):
            part.copy_(rearrange(source, "b H W c -> b c H W")).div_(255)
            for step in steps.unbind(1):
                which, factor = rearrange(step, "b (two c H W) -> two b c H W", two=2, c=1, H=1)
                gray = functional.rgb_to_grayscale(part)
                toward = torch.where(which == CONTRAST, gray.mean((1, 2, 3), keepdim=True), gray)
                toward.mul_((which != BRIGHTNESS) * (1 - factor))  # brightness: toward black
                part.mul_(factor).add_(toward).clamp_(0, 1)
        return images


def as_tensor(photo: Image.Image) -> Tensor:
    """RGB -> uint8 [3 H W], whose channels lie together in memory."""
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)  # once an image: torchvision's own, and einops, take longer


def evenly(low: float, high: float, generator: torch.Generator) -> Tensor:
    """A number between the two: [1]."""
    return torch.empty(1).uniform_(low, high, generator=generator)
