"""unimim: masked image modeling as one equation, L( N(T(x)), H(S(M(x))) ), in PyTorch Lightning modules.

Names are imported when they are first used, so that `unimim --help` does not wait for torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unimim.callbacks import KNNCallback as KNNCallback
    from unimim.checkpoint import load_backbone as load_backbone
    from unimim.data.fashion_mnist import FashionMNISTData as FashionMNISTData
    from unimim.data.folder import ImageFolderData as ImageFolderData
    from unimim.efficientnet_lite import EfficientNetLite0 as EfficientNetLite0
    from unimim.finetuning import FineTuning as FineTuning
    from unimim.heads import LinearHead as LinearHead
    from unimim.interfaces import Frozen as Frozen
    from unimim.interfaces import Head as Head
    from unimim.interfaces import Masking as Masking
    from unimim.interfaces import Student as Student
    from unimim.interfaces import TargetGenerator as TargetGenerator
    from unimim.masking import BlockMasking as BlockMasking
    from unimim.masking import RandomMasking as RandomMasking
    from unimim.normalizations import L2Norm as L2Norm
    from unimim.normalizations import LayerNorm as LayerNorm
    from unimim.pretraining import MaskedImageModeling as MaskedImageModeling
    from unimim.students import MaskTokenStudent as MaskTokenStudent
    from unimim.targets.features import FeatureTarget as FeatureTarget
    from unimim.targets.hog import HOGTarget as HOGTarget
    from unimim.targets.pixels import PixelTarget as PixelTarget

MODULE_OF = {
    "BlockMasking": "masking",
    "EfficientNetLite0": "efficientnet_lite",
    "FashionMNISTData": "data.fashion_mnist",
    "FeatureTarget": "targets.features",
    "FineTuning": "finetuning",
    "Frozen": "interfaces",
    "HOGTarget": "targets.hog",
    "Head": "interfaces",
    "ImageFolderData": "data.folder",
    "KNNCallback": "callbacks",
    "L2Norm": "normalizations",
    "LayerNorm": "normalizations",
    "LinearHead": "heads",
    "MaskTokenStudent": "students",
    "MaskedImageModeling": "pretraining",
    "Masking": "interfaces",
    "PixelTarget": "targets.pixels",
    "RandomMasking": "masking",
    "Student": "interfaces",
    "TargetGenerator": "interfaces",
    "load_backbone": "checkpoint",
}

__all__ = sorted(MODULE_OF)  # pyright: ignore
__version__ = version("unimim")


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module 'unimim' has no attribute {name!r}")
    return getattr(import_module(f"unimim.{MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
