"""Data sets: the loaders that `dataset.load._target_` names, and the types that they return."""

from sddlskd.datasets.arrays import (
    Files,
    Images,
    Splits,
    cifar10,
    cifar100,
    digits,
    fake,
    fake_label_sets,
    fashion_mnist,
    stl10,
)
from sddlskd.datasets.folders import cub200, image_folder, imagenet, label_sets, tiny_imagenet

__all__ = [
    "Files",
    "Images",
    "Splits",
    "cifar10",
    "cifar100",
    "cub200",
    "digits",
    "fake",
    "fake_label_sets",
    "fashion_mnist",
    "image_folder",
    "imagenet",
    "label_sets",
    "stl10",
    "tiny_imagenet",
]
