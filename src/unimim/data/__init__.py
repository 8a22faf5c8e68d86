"""LightningDataModules; pixels leave them in [0, 1]."""

from unimim.data.classification import ClassFolderData
from unimim.data.folder import ImageFolderData
from unimim.data.segmentation import ADE20KData, SegmentationFolderData

__all__ = ["ADE20KData", "ClassFolderData", "ImageFolderData", "SegmentationFolderData"]
