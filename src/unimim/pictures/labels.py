"""Label maps as pictures: a colour a class, laid over the photo, with a legend of the classes that occur."""

import math

import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from unimim.errors import UserError
from unimim.printing import printable

SHADES = 8
"""Of red, green and blue: the colours that are chosen from."""
DARK = 0.4
"""OKLab's lightness, from 0 to 1, below which a colour is dark."""


def palette(count: int) -> Tensor:
    """Colours uint8 [count 3], each as far as can be from all before it, the first a grey; the same on every call.

    Distances are Euclidean in OKLab (Ottosson, 2020), in which they are about as large as they look. Dark colours, which would
    not show on a dark photo, are none of them.

    Raises:
        ValueError: there are not so many colours.
    """
    side = torch.linspace(0, 1, SHADES)
    colors = torch.cartesian_prod(side, side, side)
    colors = colors[oklab(colors)[:, 0] > DARK]
    if not 0 < count <= len(colors):
        raise UserError(f"there are colours for 1 to {len(colors)} classes, not for {count}")
    places = oklab(colors)
    chosen = [int((colors - side[SHADES // 2]).norm(dim=1).argmin())]
    distance = (places - places[chosen[0]]).norm(dim=1)
    while len(chosen) < count:
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (places - places[chosen[-1]]).norm(dim=1))
    return (colors[chosen] * 255).round().byte()


def oklab(colors: Tensor) -> Tensor:
    """sRGB [n 3] in [0, 1] -> OKLab [n 3]; the matrices are Ottosson's."""
    linear = torch.where(colors <= 0.04045, colors / 12.92, ((colors + 0.055) / 1.055) ** 2.4)
    to_cones = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    cones = linear @ torch.tensor(to_cones).T
    return cones ** (1 / 3) @ torch.tensor(to_lab).T


def label_picture(labels: Tensor) -> Image.Image:
    """[H W] -> a picture, mode L, whose pixels are the labels."""
    return Image.fromarray(labels.byte().cpu().numpy())


def overlay(image: Tensor, labels: Tensor, names: list[str]) -> Image.Image:
    """The photo half covered with its classes' colours, and below it a legend of the classes that occur, the largest first.

    Args:
        image: [3 H W] in [0, 1].
        labels: [H W], indices of `names`.
        names: of all classes.
    """
    colors, labels = palette(len(names)), labels.cpu()
    pixels = rearrange((image.cpu().clamp(0, 1) * 255).round().byte(), "c H W -> H W c").numpy()
    blended = Image.blend(Image.fromarray(pixels), Image.fromarray(colors[labels].numpy()), 0.5)
    height, width = labels.shape

    areas = labels.flatten().bincount(minlength=len(names))
    shown = [label for label in areas.argsort(descending=True, stable=True).tolist() if areas[label]]
    texts = [f"{printable(names[label])}  {100 * int(areas[label]) / labels.numel():.1f} %" for label in shown]
    size = max(12, max(height, width) // 50)  # of the letters, in pixels
    font = ImageFont.load_default(size)
    line = 3 * size // 2
    column = 3 * size + math.ceil(max(font.getlength(text) for text in texts))
    columns = max(1, width // column)
    rows = math.ceil(len(shown) / columns)

    picture = Image.new("RGB", (max(width, column), height + rows * line + size), "white")
    picture.paste(blended)
    draw = ImageDraw.Draw(picture)
    for place, (label, text) in enumerate(zip(shown, texts, strict=True)):
        left, top = place // rows * column + size // 2, height + size // 2 + place % rows * line
        square = (left, top + (line - size) // 2, left + size, top + (line + size) // 2)
        color = tuple(colors[label].tolist())
        draw.rectangle(square, fill=color, outline="black")
        draw.text((left + 3 * size // 2, top + line // 2), text, fill="black", font=font, anchor="lm")
    return picture
