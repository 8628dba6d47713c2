"""Check the images and labels that a loader returns.

Shapes: N images of a split, K classes, H W C pixel rows, columns and channels.
"""

import torch
from torch import Tensor

from sddlskd.datasets.arrays import Images

__all__ = ["check_labels", "check_split"]


def _check_label_sets(name: str, labels_NK: Tensor, count: int, num_classes: int) -> None:
    """Raise ValueError unless the labels are zeros and ones, one for each image and class."""
    expected = (count, num_classes)
    if labels_NK.dtype != torch.int64 or labels_NK.shape != expected or not count:
        raise ValueError(
            f"{name} labels are {labels_NK.dtype} {tuple(labels_NK.shape)}; for several labels per "
            f"image they must be torch.int64 {expected}, with at least one image: set "
            "dataset.num_classes, or convert them in the loader"
        )
    if ((labels_NK != 0) & (labels_NK != 1)).any():
        raise ValueError(
            f"{name} labels are not all 0 or 1, as several labels per image must be: convert the "
            "labels in the loader"
        )


def check_split(name: str, split: Images, num_classes: int, image_shape: torch.Size) -> None:
    """Raise ValueError unless the split has labelled uint8 images of `image_shape` (H, W, C)."""
    images, labels = split
    if (
        images.dtype != torch.uint8
        or images.dim() != 4
        or images.shape[1:] != image_shape
        or 0 in image_shape
    ):
        found = f"{name} images are {images.dtype} {tuple(images.shape)}"
        raise ValueError(
            f"{found}; they must be torch.uint8 (N, H, W, C), one size in both splits: "
            "convert them in the loader"
        )
    check_labels(name, labels, len(images), num_classes)


def check_labels(name: str, labels: Tensor, count: int, num_classes: int) -> None:
    """Raise ValueError unless a split has at least one image, and valid labels for each image.

    Args:
        name: name of the split, for the message.
        labels: class of each image; must be int64, (count,), in 0..num_classes-1. For images with
            several labels, int64 (count, num_classes) of zeros and ones.
        count: number of images in the split.
        num_classes: number of classes.

    Raises:
        ValueError: If `count` is 0, or if `labels` has another shape, another type, or an entry out
            of range.
    """
    if labels.ndim == 2:
        _check_label_sets(name, labels, count, num_classes)
        return
    if labels.dtype != torch.int64 or labels.shape != (count,):
        found = f"{name} labels are {labels.dtype} {tuple(labels.shape)}"
        raise ValueError(
            f"{found}; they must be torch.int64 ({count},), one per image: "
            "convert them in the loader"
        )
    if len(labels) == 0:
        raise ValueError(
            f"{name} holds 0 images; it must hold at least 1: check the loader's files and sizes"
        )
    bad = ((labels < 0) | (labels >= num_classes)).nonzero()
    if len(bad):
        index = int(bad[0])
        found = (
            f"{name} label {int(labels[index])} at index {index} is outside 0..{num_classes - 1}"
        )
        raise ValueError(
            f"{found}: set num_classes to the number of classes, "
            "or number the classes from 0 in the loader"
        )
