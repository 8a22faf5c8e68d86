"""LightningDataModules; pixels leave them in [0, 1]."""

from unimim.data.classification import ClassFolderData
from unimim.data.fashion_mnist import FashionMNISTData
from unimim.data.folder import ImageFolderData

__all__ = ["ClassFolderData", "FashionMNISTData", "ImageFolderData"]
