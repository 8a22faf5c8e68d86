"""unimim: masked image modeling as one equation, L( N(T(x)), H(S(M(x))) ), in PyTorch Lightning modules.

Names are imported when they are first used, so that `unimim --help` does not wait for torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unimim.caching.target import CachedTarget as CachedTarget
    from unimim.data.classification import ClassFolderData as ClassFolderData
    from unimim.data.folder import ImageFolderData as ImageFolderData
    from unimim.data.sampling import ResumableSampler as ResumableSampler
    from unimim.data.sampling import SeededSamples as SeededSamples
    from unimim.data.segmentation import ADE20KData as ADE20KData
    from unimim.data.segmentation import SegmentationFolderData as SegmentationFolderData
    from unimim.errors import UserError as UserError
    from unimim.letters.heads import DecoderHead as DecoderHead
    from unimim.letters.heads import LinearHead as LinearHead
    from unimim.letters.heads import PatchAggregationHead as PatchAggregationHead
    from unimim.letters.heads import PromptingDecoderHead as PromptingDecoderHead
    from unimim.letters.heads import PrototypeHead as PrototypeHead
    from unimim.letters.interfaces import Frozen as Frozen
    from unimim.letters.interfaces import Head as Head
    from unimim.letters.interfaces import Masking as Masking
    from unimim.letters.interfaces import Student as Student
    from unimim.letters.interfaces import TargetGenerator as TargetGenerator
    from unimim.letters.losses import CosineLoss as CosineLoss
    from unimim.letters.losses import SoftCrossEntropyLoss as SoftCrossEntropyLoss
    from unimim.letters.mask import Mask as Mask
    from unimim.letters.mask import WholeImage as WholeImage
    from unimim.letters.masking import AttentiveMasking as AttentiveMasking
    from unimim.letters.masking import BlockMasking as BlockMasking
    from unimim.letters.masking import NoMasking as NoMasking
    from unimim.letters.masking import RandomMasking as RandomMasking
    from unimim.letters.normalizations import CenteredSoftmax as CenteredSoftmax
    from unimim.letters.normalizations import InstanceNorm as InstanceNorm
    from unimim.letters.normalizations import L2Norm as L2Norm
    from unimim.letters.normalizations import LayerNorm as LayerNorm
    from unimim.letters.students import MaskTokenStudent as MaskTokenStudent
    from unimim.letters.students import VisibleStudent as VisibleStudent
    from unimim.letters.targets.color import MeanColorTarget as MeanColorTarget
    from unimim.letters.targets.dalle import DVAETarget as DVAETarget
    from unimim.letters.targets.ema import EMAHeadTarget as EMAHeadTarget
    from unimim.letters.targets.ema import EMATarget as EMATarget
    from unimim.letters.targets.features import FeatureTarget as FeatureTarget
    from unimim.letters.targets.hog import HOGTarget as HOGTarget
    from unimim.letters.targets.pixels import PixelTarget as PixelTarget
    from unimim.letters.targets.tokens import CodebookTarget as CodebookTarget
    from unimim.letters.targets.tokens import VQKDTarget as VQKDTarget
    from unimim.letters.term import Term as Term
    from unimim.letters.tokens import Tokens as Tokens
    from unimim.samples.efficientnet_lite import EfficientNetLite0 as EfficientNetLite0
    from unimim.samples.fashion_mnist import FashionMNISTData as FashionMNISTData
    from unimim.samples.scenes import ScenesData as ScenesData
    from unimim.tasks.callbacks import KNNCallback as KNNCallback
    from unimim.tasks.callbacks import PictureCallback as PictureCallback
    from unimim.tasks.callbacks import TrainingBar as TrainingBar
    from unimim.tasks.finetuning import FineTuning as FineTuning
    from unimim.tasks.pretraining import MaskedImageModeling as MaskedImageModeling
    from unimim.tasks.probing import AttentiveProbe as AttentiveProbe
    from unimim.tasks.probing import LinearProbe as LinearProbe
    from unimim.tasks.segmentation import UperNetSegmentation as UperNetSegmentation
    from unimim.tasks.upernet import FCNHead as FCNHead
    from unimim.tasks.upernet import FeaturePyramid as FeaturePyramid
    from unimim.tasks.upernet import UperNetHead as UperNetHead
    from unimim.training.checkpoints import AtomicCheckpointIO as AtomicCheckpointIO
    from unimim.training.cpu import CPUPrecision as CPUPrecision
    from unimim.training.faults import StopOnSignal as StopOnSignal
    from unimim.training.resume import ExactResume as ExactResume
    from unimim.weights.checkpoint import export as export
    from unimim.weights.checkpoint import load_backbone as load_backbone
    from unimim.weights.fitting import LoadReport as LoadReport

MODULE_OF = {
    "ADE20KData": "data.segmentation",
    "AtomicCheckpointIO": "training.checkpoints",
    "AttentiveMasking": "letters.masking",
    "AttentiveProbe": "tasks.probing",
    "BlockMasking": "letters.masking",
    "CPUPrecision": "training.cpu",
    "CachedTarget": "caching.target",
    "CenteredSoftmax": "letters.normalizations",
    "ClassFolderData": "data.classification",
    "CodebookTarget": "letters.targets.tokens",
    "CosineLoss": "letters.losses",
    "DVAETarget": "letters.targets.dalle",
    "DecoderHead": "letters.heads",
    "EMAHeadTarget": "letters.targets.ema",
    "EMATarget": "letters.targets.ema",
    "EfficientNetLite0": "samples.efficientnet_lite",
    "ExactResume": "training.resume",
    "FCNHead": "tasks.upernet",
    "FashionMNISTData": "samples.fashion_mnist",
    "FeaturePyramid": "tasks.upernet",
    "FeatureTarget": "letters.targets.features",
    "FineTuning": "tasks.finetuning",
    "Frozen": "letters.interfaces",
    "HOGTarget": "letters.targets.hog",
    "Head": "letters.interfaces",
    "ImageFolderData": "data.folder",
    "InstanceNorm": "letters.normalizations",
    "KNNCallback": "tasks.callbacks",
    "L2Norm": "letters.normalizations",
    "LayerNorm": "letters.normalizations",
    "LinearHead": "letters.heads",
    "LinearProbe": "tasks.probing",
    "LoadReport": "weights.fitting",
    "Mask": "letters.mask",
    "MaskTokenStudent": "letters.students",
    "MaskedImageModeling": "tasks.pretraining",
    "Masking": "letters.interfaces",
    "MeanColorTarget": "letters.targets.color",
    "NoMasking": "letters.masking",
    "PatchAggregationHead": "letters.heads",
    "PictureCallback": "tasks.callbacks",
    "PixelTarget": "letters.targets.pixels",
    "PromptingDecoderHead": "letters.heads",
    "PrototypeHead": "letters.heads",
    "RandomMasking": "letters.masking",
    "ResumableSampler": "data.sampling",
    "ScenesData": "samples.scenes",
    "SeededSamples": "data.sampling",
    "SegmentationFolderData": "data.segmentation",
    "SoftCrossEntropyLoss": "letters.losses",
    "StopOnSignal": "training.faults",
    "Student": "letters.interfaces",
    "TargetGenerator": "letters.interfaces",
    "Term": "letters.term",
    "Tokens": "letters.tokens",
    "TrainingBar": "tasks.callbacks",
    "UperNetHead": "tasks.upernet",
    "UperNetSegmentation": "tasks.segmentation",
    "UserError": "errors",
    "VQKDTarget": "letters.targets.tokens",
    "VisibleStudent": "letters.students",
    "WholeImage": "letters.mask",
    "export": "weights.checkpoint",
    "load_backbone": "weights.checkpoint",
}

__all__ = sorted(MODULE_OF)  # pyright: ignore
__version__ = version("unimim")


def __getattr__(name: str) -> Any:
    if name not in MODULE_OF:
        raise AttributeError(f"module 'unimim' has no attribute {name!r}")
    return getattr(import_module(f"unimim.{MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
