"""Augmentations that move an image and its label map together, as mmsegmentation's ADE20K recipe has them."""

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from torch import Tensor, nn
from torchvision.transforms.v2 import functional
from torchvision.tv_tensors import Image, Mask

from unimim.shapes import IGNORED

Sides = tuple[int, int]
"""(long, short) in pixels, whichever of H and W is the longer."""


def uniform(low: float, high: float) -> float:
    """One number from torch's global generator, which data loaders seed for each worker."""
    return low + (high - low) * torch.rand(()).item()


def fit(image: Tensor, sides: Sides) -> Tensor:
    """[... H W] resized to the largest size within `sides` that keeps its ratio; a Mask by the nearest pixel.

    Images are resized bilinearly and antialiased (mmsegmentation: not antialiased).
    """
    height, width = image.shape[-2:]
    scale = min(sides[0] / max(height, width), sides[1] / min(height, width))
    size = [max(1, round(side * scale)) for side in (height, width)]
    resized: Tensor = functional.resize(image, size, antialias=True)
    return resized


class FitImage(nn.Module):
    """Resizes the image to fit in `sides`, and leaves the label at its own size."""

    def __init__(self, sides: Sides) -> None:
        super().__init__()
        self.sides = sides

    def forward(self, image: Image, label: Mask) -> tuple[Tensor, Tensor]:
        return fit(image, self.sides), label


class RandomScale(nn.Module):
    """Resizes both to fit in `sides` times one random factor.

    Args:
        sides: (long, short) in pixels (ADE20K: 2048, 512).
        scale: (low, high) of the factor (ADE20K: 0.5, 2).
    """

    def __init__(self, sides: Sides, scale: tuple[float, float]) -> None:
        super().__init__()
        self.sides = sides
        self.scale = scale

    def forward(self, image: Image, label: Mask) -> tuple[Tensor, Tensor]:
        factor = uniform(*self.scale)
        sides = int(self.sides[0] * factor), int(self.sides[1] * factor)
        return fit(image, sides), fit(label, sides)


class VariedCrop(nn.Module):
    """A random crop, drawn anew while one class fills too much of it; what is smaller than the crop stays whole.

    Args:
        side: of the square crop in pixels.
        max_share: the largest share of one class among the pixels that are not ignored (mmsegmentation's cat_max_ratio: 0.75).
        tries: crops drawn after the first one; then the last stays as it is (mmsegmentation: 10).
    """

    def __init__(self, side: int, max_share: float = 0.75, tries: int = 10) -> None:
        super().__init__()
        self.side = side
        self.max_share = max_share
        self.tries = tries

    def forward(self, image: Image, label: Mask) -> tuple[Tensor, Tensor]:
        height, width = label.shape[-2:]
        for _ in range(1 + self.tries):
            top = int(torch.randint(max(height - self.side, 0) + 1, ()))
            left = int(torch.randint(max(width - self.side, 0) + 1, ()))
            window = (top, left, min(self.side, height), min(self.side, width))
            cropped = functional.crop(label, *window)
            if self.is_varied(cropped):
                break
        return functional.crop(image, *window), cropped

    def is_varied(self, label: Tensor) -> bool:
        """Whether [H W] has at least two classes, none of them with `max_share` or more."""
        counts = label[label != IGNORED].unique(return_counts=True)[1]
        return len(counts) > 1 and bool(counts.max() < self.max_share * counts.sum())


class PhotometricDistortion(nn.Module):
    """Brightness, contrast, saturation and hue, each with probability 1/2, contrast before or after the other two.

    As mmsegmentation's, in [0, 1] and without rounding: brightness adds up to 32/255, contrast multiplies pixels and
    saturation the S of HSV by 0.5 to 1.5, hue turns by up to 1/10 of the circle (18 of OpenCV's 180 steps).
    """

    def forward(self, image: Image, label: Mask) -> tuple[Tensor, Tensor]:
        """Float [3 H W] in [0, 1]; the label stays as it is."""
        if self.happens():
            image = (image + uniform(-32 / 255, 32 / 255)).clamp(0, 1)
        contrast_first = self.happens()
        if contrast_first and self.happens():
            image = self.contrast(image, uniform(0.5, 1.5))
        if self.happens():
            image = self.saturation(image, uniform(0.5, 1.5))
        if self.happens():
            image = functional.adjust_hue(image, uniform(-0.1, 0.1))
        if not contrast_first and self.happens():
            image = self.contrast(image, uniform(0.5, 1.5))
        return image, label

    def happens(self) -> bool:
        return bool(torch.rand(()) < 0.5)

    def contrast(self, image: Tensor, factor: float) -> Tensor:
        return (image * factor).clamp(0, 1)

    def saturation(self, image: Tensor, factor: float) -> Tensor:
        """Multiplies the S of HSV, up to its largest value of 1: V stays, the other channels come nearer to it or leave it."""
        value, lowest = image.amax(-3, keepdim=True), image.amin(-3, keepdim=True)
        largest = value / (value - lowest).clamp_min(1e-6)  # 1 / S
        return (value - (value - image) * largest.clamp_max(factor)).clamp(0, 1)


class PadTo(nn.Module):
    """Pads float [3 H W] on the right and below with ImageNet's mean colour, its label [H W] as ignored.

    Args:
        side: both come out with at least this many pixels in H and W.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, image: Image, label: Mask) -> tuple[Tensor, Tensor]:
        height, width = label.shape[-2:]
        padding = [0, 0, max(self.side - width, 0), max(self.side - height, 0)]  # left, top, right, bottom
        return functional.pad(image, padding, fill=list(IMAGENET_DEFAULT_MEAN)), functional.pad(label, padding, fill=IGNORED)
