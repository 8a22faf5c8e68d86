"""T as the tokens of DALL-E's discrete VAE (Ramesh et al., 2021), which BEiT predicts (Bao et al., 2022)."""

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unimim.errors import UserError
from unimim.letters.interfaces import Frozen, TargetGenerator, check_positive
from unimim.shapes import Grid
from unimim.weights.files import load_strictly, read_state_dict
from unimim.weights.models import own_seed

STRIDE = 8
"""Pixels of one token."""


class DVAETarget(TargetGenerator):
    """The most probable token of each patch, by the encoder of DALL-E's dVAE, which sees 8 pixels a patch.

    BEiT resizes that second view by Lanczos interpolation, here it is bicubic.

    Args:
        weights: a file with the state dict of the published encoder (`blocks.input.w`, ...); or "random" to try a recipe. The
            published `encoder.pkl` is a pickle of a whole module, which is not loaded: whoever trusts it can save its
            `state_dict()`.
        width: of its first group (published: 256).
        codes: size of the vocabulary (published: 8192).

    Raises:
        ValueError: no weights are given, or they do not fit.
        FileNotFoundError: there is no file at `weights`.
    """

    def __init__(self, weights: str | None = None, width: int = 256, codes: int = 8192) -> None:
        super().__init__()
        if weights is None:
            raise UserError(
                "DVAETarget needs a file with the state dict of DALL-E's encoder: --model.teacher.weights PATH, or 'random' to "
                "try the recipe (--random_weights); CodebookTarget fits a tokenizer of your own"
            )
        check_positive("DVAETarget", width=width, codes=codes)
        if width % 4:
            raise UserError(f"DVAETarget: width is {width}, but it is a multiple of 4")
        with own_seed():
            encoder = dvae_encoder(width, codes)
        if weights != "random":
            load_strictly(encoder, read_state_dict(weights), weights)
        self.dim = codes
        self.frozen = Frozen(encoder)

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> long [b h w]"""
        return self.logits(images, grid_size).argmax(1)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    @torch.no_grad()
    def logits(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> [b codes h w]"""
        h, w = grid_size
        pixels = self.resize(images, (h * STRIDE, w * STRIDE)) * 0.8 + 0.1  # DALL-E's logit-Laplace margin of 0.1
        return self.frozen.network(pixels.to(self.frozen.network.blocks.input.w.dtype))


class Conv(nn.Module):
    """A convolution of stride 1 that keeps the size, with the short names of the published file.

    Args:
        given, width: channels in and out.
        kernel: its side.
    """

    def __init__(self, given: int, width: int, kernel: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(width, given, kernel, kernel) / (given * kernel**2) ** 0.5)
        self.b = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[b given H W] -> [b width H W]"""
        return F.conv2d(x, self.w, self.b, padding="same")


class Bottleneck(nn.Module):
    """One block of the encoder: a residual path of four convolutions, scaled down by the square of the number of blocks.

    Args:
        given, width: channels in and out.
        blocks: of the whole encoder.
    """

    def __init__(self, given: int, width: int, blocks: int) -> None:
        super().__init__()
        narrow = width // 4
        self.gain = 1 / blocks**2
        self.id_path = Conv(given, width, 1) if given != width else nn.Identity()
        self.res_path = nn.Sequential()
        for i, (before, after, kernel) in enumerate(
            [(given, narrow, 3), (narrow, narrow, 3), (narrow, narrow, 3), (narrow, width, 1)]
        ):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU())
            self.res_path.add_module(f"conv_{i + 1}", Conv(before, after, kernel))

    def forward(self, x: Tensor) -> Tensor:
        """[b given H W] -> [b width H W]"""
        return self.id_path(x) + self.gain * self.res_path(x)


def dvae_encoder(width: int, codes: int, blocks_per_group: int = 2) -> nn.Module:
    """[b 3 H W] -> logits [b codes H/8 W/8]: four groups of blocks, each twice as wide, three times halved in size."""
    widths = [width, 2 * width, 4 * width, 8 * width]
    layers: OrderedDict[str, nn.Module] = OrderedDict(input=Conv(3, width, 7))
    given = width
    for i, wide in enumerate(widths):
        group: OrderedDict[str, nn.Module] = OrderedDict()
        for j in range(blocks_per_group):
            group[f"block_{j + 1}"] = Bottleneck(given, wide, blocks_per_group * len(widths))
            given = wide
        if i < len(widths) - 1:
            group["pool"] = nn.MaxPool2d(2)
        layers[f"group_{i + 1}"] = nn.Sequential(group)
    layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv(given, codes, 1)))
    return nn.Sequential(OrderedDict(blocks=nn.Sequential(layers)))
