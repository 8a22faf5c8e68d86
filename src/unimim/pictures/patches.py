"""What patches, targets and encoders look like: tensors in, pictures [b 3 H W] in [0, 1] out."""

import math
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional as F

GRAY = 0.5
"""Of hidden patches, and of those that are not predicted."""
TILE = 224
"""Pixels of a picture's shorter side on a sheet, at the least."""
DARK = 0.2
"""What is left of an image's brightness where no attention is."""
SPREAD = (0.02, 0.98)
"""The quantiles of a principal component that become black and white."""


def covered(images: Tensor, mask: Tensor) -> Tensor:
    """The images with gray patches where the mask is True: [b 3 H W], bool [b h w] -> [b 3 H W]"""
    return pasted(torch.full_like(images, GRAY), images, mask)


def pasted(patches: Tensor, images: Tensor, mask: Tensor) -> Tensor:
    """The images with those patches where the mask is True: [b 3 H W], [b 3 H W], bool [b h w] -> [b 3 H W]"""
    p, q = images.shape[-2] // mask.shape[-2], images.shape[-1] // mask.shape[-1]
    return torch.where(repeat(mask, "b h w -> b 1 (h p) (w q)", p=p, q=q), patches, images)


def picture_of(teacher: Any, values: Tensor, target: Tensor) -> Tensor:
    """Draws a target, or a prediction of it, as a person can look at it: -> [b 3 H' W'] in [0, 1].

    A teacher whose target is seen best in a way of its own has a method `picture(values, target)`. Else it is the first three
    principal components of the target, or a colour for each code.

    Args:
        teacher: gave the target.
        values: float [b h w c]; of a discrete target codes [b h w], or logits [b h w codes].
        target: float [b h w c] or long [b h w], which decides what a colour means.
    """
    if hasattr(teacher, "picture"):
        own: Tensor = teacher.picture(values, target)
        return own
    if target.dtype == torch.long:
        return code_colors(values if values.dtype == torch.long else values.argmax(-1))
    return principal_components(values, target)


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def principal_components(features: Tensor, fitted_to: Tensor | None = None) -> Tensor:
    """The first three principal components as red, green and blue: [b h w c] -> [b 3 h w].

    Args:
        features: of the patches of all images, which share the components.
        fitted_to: [b' h' w' c] that decides components, signs and contrast; the features themselves if None. With the target
            here, colours of target and prediction mean the same.
    """
    reference = (features if fitted_to is None else fitted_to).float().nan_to_num(0, 0, 0)
    rows = rearrange(reference, "b h w c -> (b h w) c")
    mean = rows.mean(0)
    components = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:3]
    strongest = components.gather(1, components.abs().argmax(1, keepdim=True))
    components = F.pad(components * strongest.sign(), (0, 0, 0, 3 - len(components)))  # fewer than three: no blue, no green
    low, high = ((rows - mean) @ components.T).quantile(rows.new_tensor(SPREAD), dim=0)
    colors = ((features.float().nan_to_num(0, 0, 0) - mean) @ components.T - low) / (high - low).clamp(min=1e-6)
    return rearrange(colors.clamp(0, 1), "b h w c -> b c h w")


def code_colors(codes: Tensor) -> Tensor:
    """A colour for each code, the same for equal ones: long [b h w] -> [b 3 h w].

    Codes walk through the colours in Roberts's additive sequence (2018), in which those of near numbers lie far apart.
    """
    one = 2**24  # in whole numbers, so that the colours of large codes are no coarser than those of small ones
    steps = torch.tensor([round(one * 1.2207440846057596**-k) for k in (1, 2, 3)], device=codes.device)
    return rearrange((one // 2 + codes[..., None] * steps) % one / one, "b h w c -> b c h w")


def hog_glyphs(histograms: Tensor, size: int = 16) -> Tensor:
    """Histograms of oriented gradients as strokes along the edges: [b 3 rows columns bins] -> [b 3 rows*size columns*size].

    Args:
        histograms: of each cell and colour channel, as `HOGTarget` bins them: bin k has gradients turned by k to k + 1 of
            `bins` parts of half a turn from the vertical to the horizontal. 1 is a bright stroke; below 0 there is none.
        size: of a cell in pixels.
    """
    across = torch.arange(size, device=histograms.device) - (size - 1) / 2
    x, y = across[None, :], across[:, None]
    inside = torch.hypot(x, y) <= size / 2
    bins = histograms.shape[-1]
    picture = histograms.new_zeros(*histograms.shape[:-1], size, size)
    for k in range(bins):
        angle = (k + 0.5) * math.pi / bins
        distance = (x * math.sin(angle) + y * math.cos(angle)).abs()  # from the edge, to which the gradient is normal
        stroke = (1.25 - distance).clamp(0, 1) * inside
        picture = torch.maximum(picture, histograms[..., k, None, None] * stroke)
    return rearrange(picture.clamp(max=1), "b c i j p q -> b c (i p) (j q)")


def unnormalised(prediction: Tensor, target: Tensor, pixels: Tensor) -> Tensor:
    """A prediction of normalized pixels, back among pixels by the TRUE mean and spread of each patch: [b h w c] each.

    The patches lend the prediction what it was never asked for, their mean and contrast, also those that are hidden: a
    picture of it looks better than the model is, and has to say so (facebookresearch/mae #12, #197).

    Args:
        prediction: in the space of `target`.
        target: the normalized pixels, N(T(x)).
        pixels: T(x).
    """
    scale = pixels.std(-1, keepdim=True) / target.std(-1, keepdim=True).clamp(min=1e-6)
    return (prediction - target.mean(-1, keepdim=True)) * scale + pixels.mean(-1, keepdim=True)


def as_fed(backbone: nn.Module, images: Tensor) -> Tensor:
    """[b 3 H W] in [0, 1] -> [b 3 H W], normalized by the mean and std of the backbone's `pretrained_cfg`."""
    network: Any = backbone
    mean, std = (images.new_tensor(network.pretrained_cfg[key]) for key in ("mean", "std"))
    return (images - rearrange(mean, "c -> c 1 1")) / rearrange(std, "c -> c 1 1")


@torch.no_grad()
def encoder_features(backbone: nn.Module, images: Tensor) -> Tensor:
    """What a timm backbone says of each patch of whole images, behind its last block and norm.

    [b 3 H W] in [0, 1] -> float32 [b h w d]
    """
    network: Any = backbone
    (features,) = network.forward_intermediates(as_fed(backbone, images), indices=1, norm=True, intermediates_only=True)
    return rearrange(features.float(), "b d h w -> b h w d")


@torch.no_grad()
def attention_map(backbone: nn.Module, images: Tensor) -> Tensor | None:
    """How much each patch of whole images is looked at in the last block of a timm backbone, mean of its heads.

    [b 3 H W] in [0, 1] -> float32 [b h w]: by CLS where there is one, else by all patches. None where no attention is over
    all patches (Swin with several windows, convolutions).
    """
    network: Any = backbone
    attentions: list[Any] = [part for part in backbone.modules() if hasattr(part, "fused_attn") and hasattr(part, "attn_drop")]
    if not attentions:
        return None
    last, weights = attentions[-1], []
    hook = last.attn_drop.register_forward_hook(lambda module, inputs, output: weights.append(inputs[0]))
    fused, last.fused_attn = last.fused_attn, False  # the fused kernel keeps no weights
    try:
        features = encoder_features(backbone, images)
    finally:
        hook.remove()
        last.fused_attn = fused
    (h, w), prefix = features.shape[1:3], getattr(network, "num_prefix_tokens", 0)
    attention = reduce(weights[-1].float(), "b heads query key -> b query key", "mean")
    if attention.shape[0] != len(images) or attention.shape[2] != prefix + h * w:
        return None
    queries = attention[:, :1] if getattr(network, "cls_token", None) is not None else attention
    return reduce(queries[..., prefix:], "b query (h w) -> b h w", "mean", h=h)


def lit(images: Tensor, attention: Tensor) -> Tensor:
    """The images, bright where attention is and dark elsewhere: [b 3 H W], [b h w] -> [b 3 H W]"""
    light = attention / reduce(attention, "b h w -> b 1 1", "max").clamp(min=1e-12)
    h, w = attention.shape[1:]
    light = DARK + (1 - DARK) * light
    return images * repeat(light, "b h w -> b 1 (h p) (w q)", p=images.shape[-2] // h, q=images.shape[-1] // w)


def sheet(rows: dict[str, Tensor]) -> Image.Image:
    """All pictures on one, a row for each caption, which stands above it.

    Args:
        rows: [b 3 H' W'] in [0, 1], each of its own size; the smaller are enlarged pixel by pixel. What is not finite is black.
    """
    height, width = (max(pictures.shape[axis] for pictures in rows.values()) for axis in (2, 3))
    times = math.ceil(TILE / min(height, width))
    tile, gap = (height * times, width * times), 4
    size = max(15, tile[0] // 24)  # of the letters
    line = 8 * size // 5
    count = max(len(pictures) for pictures in rows.values())
    font = ImageFont.load_default(size)
    widest = math.ceil(max(font.getlength(caption) for caption in rows)) + 2 * gap
    whole = Image.new("RGB", (max(count * (tile[1] + gap) + gap, widest), len(rows) * (tile[0] + line + gap)), "white")
    draw = ImageDraw.Draw(whole)
    for i, (caption, pictures) in enumerate(rows.items()):
        top = i * (tile[0] + line + gap)
        draw.text((gap, top + line // 2), caption, fill="black", font=font, anchor="lm")
        shown = F.interpolate(pictures.float().cpu().nan_to_num(0, 0, 0).clamp(0, 1), tile, mode="nearest-exact")
        pixels = rearrange((shown * 255).round().byte(), "b c H W -> b H W c").numpy()
        for j, picture in enumerate(pixels):
            whole.paste(Image.fromarray(picture), (gap + j * (tile[1] + gap), top + line))
    return whole
