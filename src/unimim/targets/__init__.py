"""T, the target generators: one a file."""

from unimim.targets.cache import CachedTarget
from unimim.targets.color import MeanColorTarget
from unimim.targets.dalle import DVAETarget
from unimim.targets.ema import EMAHeadTarget, EMATarget
from unimim.targets.features import FeatureTarget
from unimim.targets.hog import HOGTarget
from unimim.targets.pixels import PixelTarget
from unimim.targets.tokens import CodebookTarget, VQKDTarget

__all__ = [
    "CachedTarget",
    "CodebookTarget",
    "DVAETarget",
    "EMAHeadTarget",
    "EMATarget",
    "FeatureTarget",
    "HOGTarget",
    "MeanColorTarget",
    "PixelTarget",
    "VQKDTarget",
]
