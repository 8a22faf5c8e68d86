"""unimim: masked image modeling as one equation, L( N(T(x)), H(S(M(x))) ), in PyTorch Lightning modules.

Names are imported when they are first used, so that `unimim --help` does not wait for torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unimim.callbacks import KNNCallback as KNNCallback
    from unimim.callbacks import PictureCallback as PictureCallback
    from unimim.callbacks import TrainingBar as TrainingBar
    from unimim.checkpoint import export as export
    from unimim.checkpoint import load_backbone as load_backbone
    from unimim.cpu import CPUPrecision as CPUPrecision
    from unimim.data.classification import ClassFolderData as ClassFolderData
    from unimim.data.fashion_mnist import FashionMNISTData as FashionMNISTData
    from unimim.data.folder import ImageFolderData as ImageFolderData
    from unimim.data.sampling import ResumableSampler as ResumableSampler
    from unimim.data.sampling import SeededSamples as SeededSamples
    from unimim.data.scenes import ScenesData as ScenesData
    from unimim.data.segmentation import ADE20KData as ADE20KData
    from unimim.data.segmentation import SegmentationFolderData as SegmentationFolderData
    from unimim.efficientnet_lite import EfficientNetLite0 as EfficientNetLite0
    from unimim.errors import UserError as UserError
    from unimim.faults import StopOnSignal as StopOnSignal
    from unimim.finetuning import FineTuning as FineTuning
    from unimim.fitting import LoadReport as LoadReport
    from unimim.heads import DecoderHead as DecoderHead
    from unimim.heads import LinearHead as LinearHead
    from unimim.heads import PatchAggregationHead as PatchAggregationHead
    from unimim.heads import PromptingDecoderHead as PromptingDecoderHead
    from unimim.heads import PrototypeHead as PrototypeHead
    from unimim.interfaces import Frozen as Frozen
    from unimim.interfaces import Head as Head
    from unimim.interfaces import Masking as Masking
    from unimim.interfaces import Student as Student
    from unimim.interfaces import TargetGenerator as TargetGenerator
    from unimim.losses import CosineLoss as CosineLoss
    from unimim.losses import SoftCrossEntropyLoss as SoftCrossEntropyLoss
    from unimim.mask import Mask as Mask
    from unimim.mask import WholeImage as WholeImage
    from unimim.masking import AttentiveMasking as AttentiveMasking
    from unimim.masking import BlockMasking as BlockMasking
    from unimim.masking import NoMasking as NoMasking
    from unimim.masking import RandomMasking as RandomMasking
    from unimim.normalizations import CenteredSoftmax as CenteredSoftmax
    from unimim.normalizations import InstanceNorm as InstanceNorm
    from unimim.normalizations import L2Norm as L2Norm
    from unimim.normalizations import LayerNorm as LayerNorm
    from unimim.pretraining import MaskedImageModeling as MaskedImageModeling
    from unimim.probing import AttentiveProbe as AttentiveProbe
    from unimim.probing import LinearProbe as LinearProbe
    from unimim.randomness import ExactResume as ExactResume
    from unimim.saving import AtomicCheckpointIO as AtomicCheckpointIO
    from unimim.segmentation import UperNetSegmentation as UperNetSegmentation
    from unimim.students import MaskTokenStudent as MaskTokenStudent
    from unimim.students import VisibleStudent as VisibleStudent
    from unimim.targets.cache import CachedTarget as CachedTarget
    from unimim.targets.color import MeanColorTarget as MeanColorTarget
    from unimim.targets.dalle import DVAETarget as DVAETarget
    from unimim.targets.ema import EMAHeadTarget as EMAHeadTarget
    from unimim.targets.ema import EMATarget as EMATarget
    from unimim.targets.features import FeatureTarget as FeatureTarget
    from unimim.targets.hog import HOGTarget as HOGTarget
    from unimim.targets.pixels import PixelTarget as PixelTarget
    from unimim.targets.tokens import CodebookTarget as CodebookTarget
    from unimim.targets.tokens import VQKDTarget as VQKDTarget
    from unimim.term import Term as Term
    from unimim.tokens import Tokens as Tokens
    from unimim.upernet import FCNHead as FCNHead
    from unimim.upernet import FeaturePyramid as FeaturePyramid
    from unimim.upernet import UperNetHead as UperNetHead

MODULE_OF = {
    "ADE20KData": "data.segmentation",
    "AtomicCheckpointIO": "saving",
    "AttentiveMasking": "masking",
    "AttentiveProbe": "probing",
    "BlockMasking": "masking",
    "CPUPrecision": "cpu",
    "CachedTarget": "targets.cache",
    "CenteredSoftmax": "normalizations",
    "ClassFolderData": "data.classification",
    "CodebookTarget": "targets.tokens",
    "CosineLoss": "losses",
    "DVAETarget": "targets.dalle",
    "DecoderHead": "heads",
    "EMAHeadTarget": "targets.ema",
    "EMATarget": "targets.ema",
    "EfficientNetLite0": "efficientnet_lite",
    "ExactResume": "randomness",
    "FCNHead": "upernet",
    "FashionMNISTData": "data.fashion_mnist",
    "FeaturePyramid": "upernet",
    "FeatureTarget": "targets.features",
    "FineTuning": "finetuning",
    "Frozen": "interfaces",
    "HOGTarget": "targets.hog",
    "Head": "interfaces",
    "ImageFolderData": "data.folder",
    "InstanceNorm": "normalizations",
    "KNNCallback": "callbacks",
    "L2Norm": "normalizations",
    "LayerNorm": "normalizations",
    "LinearHead": "heads",
    "LinearProbe": "probing",
    "LoadReport": "fitting",
    "Mask": "mask",
    "MaskTokenStudent": "students",
    "MaskedImageModeling": "pretraining",
    "Masking": "interfaces",
    "MeanColorTarget": "targets.color",
    "NoMasking": "masking",
    "PatchAggregationHead": "heads",
    "PictureCallback": "callbacks",
    "PixelTarget": "targets.pixels",
    "PromptingDecoderHead": "heads",
    "PrototypeHead": "heads",
    "RandomMasking": "masking",
    "ResumableSampler": "data.sampling",
    "ScenesData": "data.scenes",
    "SeededSamples": "data.sampling",
    "SegmentationFolderData": "data.segmentation",
    "SoftCrossEntropyLoss": "losses",
    "StopOnSignal": "faults",
    "Student": "interfaces",
    "TargetGenerator": "interfaces",
    "Term": "term",
    "Tokens": "tokens",
    "TrainingBar": "callbacks",
    "UperNetHead": "upernet",
    "UperNetSegmentation": "segmentation",
    "UserError": "errors",
    "VQKDTarget": "targets.tokens",
    "VisibleStudent": "students",
    "WholeImage": "mask",
    "export": "checkpoint",
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
