"""Choose which images of a training split are trained on, held out, or seen without their labels.

Shapes: N images of the training split, K classes.
"""

import torch
from torch import Tensor

from sddlskd.terminal.words import counted

__all__ = ["UNLABELLED", "held_out", "shown", "trained_on"]

UNLABELLED = -1  # label of an image whose class students must not see


def trained_on(
    labels_N: Tensor, val_fraction: float, train_fraction: float, num_classes: int
) -> Tensor:
    """Return which images of the training split are trained on.

    The choice is random but fixed: it does not depend on the seed of a run. For the same
    `val_fraction`, the images of a smaller `train_fraction` are among those of a larger one.

    Args:
        labels_N: class of each image of the training split, int64 (N,) on the CPU. With several
            labels per image, int64 (N, K): all images then count as one class in the choice.
        val_fraction: fraction of each class that is held out for validation, see `held_out`; 0 to
            hold out nothing.
        train_fraction: fraction of each class to train on, of the images that are not held out. The
            number of images is rounded to the nearest integer, but is at least one for a class with
            images that are not held out.
        num_classes: number of classes.

    Returns:
        A bool mask of shape (N,), true for images to train on.

    Raises:
        ValueError: If `val_fraction` is outside [0, 1) or `train_fraction` outside (0, 1], or if
            `val_fraction` is not 0 and holds out all images or none.
    """
    if not 0 < train_fraction <= 1:
        raise ValueError(
            f"train_fraction is {train_fraction}; it must lie in (0, 1]: give 0.1 for a tenth"
        )
    labels_N = _classes_to_draw_from(labels_N)
    rest_N = torch.ones(len(labels_N), dtype=torch.bool)
    if val_fraction:
        rest_N = ~held_out(labels_N, val_fraction, num_classes)
    if train_fraction == 1:
        return rest_N
    generator = torch.Generator().manual_seed(1)
    chosen_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in range(num_classes):
        ids = ((labels_N == label) & rest_N).nonzero()[:, 0]
        count = max(1, round(train_fraction * len(ids)))
        chosen_N[ids[torch.randperm(len(ids), generator=generator)[:count]]] = True
    return chosen_N


def shown(
    labels_N: Tensor,
    val_fraction: float,
    train_fraction: float,
    num_classes: int,
    unlabelled: bool,
) -> tuple[Tensor, Tensor]:
    """Return which images of the training split students see, and with which labels.

    Args:
        labels_N: class of each image of the training split, int64 (N,) on the CPU.
        val_fraction: fraction that is held out for validation, see `trained_on`.
        train_fraction: fraction that students see with labels, of the images that are not held out,
            see `trained_on`.
        num_classes: number of classes.
        unlabelled: whether students also see all other images that are not held out, without
            labels.

    Returns:
        A bool mask of shape (N,), true for the images that students see, and the labels (N,): if
        `unlabelled` is true, -1 for each image that students do not see with its label.

    Raises:
        ValueError: As `trained_on` does.
    """
    labelled_N = trained_on(labels_N, val_fraction, train_fraction, num_classes)
    if not unlabelled:
        return labelled_N, labels_N
    seen_N = trained_on(labels_N, val_fraction, 1.0, num_classes)
    return seen_N, labels_N.masked_fill(~labelled_N, UNLABELLED)


def held_out(labels_N: Tensor, fraction: float, num_classes: int) -> Tensor:
    """Return which images of the training split are held out for validation.

    The choice is random but fixed: it does not depend on the seed of a run.

    Args:
        labels_N: class of each image of the training split, int64 (N,) on the CPU. With several
            labels per image, int64 (N, K): all images then count as one class in the choice.
        fraction: fraction of each class to hold out. The number of images is rounded to the nearest
            integer.
        num_classes: number of classes.

    Returns:
        A bool mask of shape (N,), true for validation images.

    Raises:
        ValueError: If `fraction` is outside [0, 1), or if it holds out all images or none. A
            `fraction` of 0 therefore always raises.
    """
    if not 0 <= fraction < 1:
        raise ValueError(
            f"val_fraction is {fraction}; it must lie in [0, 1): give 0.1 to hold out a tenth"
        )
    labels_N = _classes_to_draw_from(labels_N)
    generator = torch.Generator().manual_seed(0)
    held_N = torch.zeros(len(labels_N), dtype=torch.bool)
    for label in range(num_classes):
        ids = (labels_N == label).nonzero()[:, 0]
        held_N[ids[torch.randperm(len(ids), generator=generator)[: round(fraction * len(ids))]]] = (
            True
        )
    if held_N.all() or not held_N.any():
        held = int(held_N.sum())
        of_all = counted(len(held_N), "training image")
        message = f"val_fraction is {fraction}, which holds out {held} of {of_all}"
        raise ValueError(f"{message}: give one that leaves images for training and validation")
    return held_N


def _classes_to_draw_from(labels: Tensor) -> Tensor:
    """Return the class of each image, within which images are drawn; one class for label sets."""
    return labels if labels.ndim == 1 else torch.zeros(len(labels), dtype=torch.int64)
