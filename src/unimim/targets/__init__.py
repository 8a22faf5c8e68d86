"""T, the target generators: one a file."""

from unimim.targets.features import FeatureTarget
from unimim.targets.hog import HOGTarget
from unimim.targets.pixels import PixelTarget

__all__ = ["FeatureTarget", "HOGTarget", "PixelTarget"]
