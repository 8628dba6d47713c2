"""Data sets: the loaders that `dataset.load._target_` names, and the types that they return."""

from sddlskd.datasets.arrays import (
    Files,
    Images,
    Splits,
    cifar10,
    cifar100,
    digits,
    fake,
    fashion_mnist,
    stl10,
)
from sddlskd.datasets.folders import cub200, image_folder, imagenet, tiny_imagenet

__all__ = [
    "Files",
    "Images",
    "Splits",
    "cifar10",
    "cifar100",
    "cub200",
    "digits",
    "fake",
    "fashion_mnist",
    "image_folder",
    "imagenet",
    "stl10",
    "tiny_imagenet",
]
