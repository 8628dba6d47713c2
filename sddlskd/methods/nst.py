"""Neuron selectivity transfer (NST), with the polynomial kernel of degree 2.

Source: Huang and Wang 2017 (arXiv:1707.01219), as mdistiller computes it.

Shapes: B batch, C D channels, H W sides of a map, A = H * W.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, at_smaller_side, pairs
from sddlskd.models import Taps

__all__ = ["NST"]


class NST(Method):
    """Loss of NST: the maximum mean discrepancy between the channels of student and teacher.

    A stage is a group of layers after the stem (the first layers). Stages are paired from the
    first. If one network has more stages, its last stages do not count. Both maps (B, C, H, W) of a
    pair are average-pooled to the smaller height and the smaller width; their channels may differ.

    A channel of an image's map is a vector of H * W entries, divided by its Euclidean length. The
    kernel of two channels is the square of their dot product. The loss of a pair of maps is the
    mean kernel of two teacher channels, plus that of two student channels, minus twice that of a
    student and a teacher channel. Means are over images and over pairs of channels. The losses of
    all pairs of maps are summed.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.

    Raises:
        ValueError: If a network shows no stages after the stem.
    """

    needs = frozenset({"stages"})

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the discrepancy between the channels, summed over stages.

        Args:
            student: Maps of the student; `stages` is read.
            teacher: Maps of the teacher, without gradients; `stages` is read.
            batch: Unused.

        Returns:
            A scalar, averaged over images. The first map of `stages`, that of the stem, does not
            count.
        """
        losses = []
        for maps in pairs(student, teacher):
            own_BCA, other_BDA = map(_unit_channels, at_smaller_side(*maps))
            with torch.no_grad():
                among_teacher = _mean_kernel(other_BDA, other_BDA)
            among_student = _mean_kernel(own_BCA, own_BCA)
            losses.append(among_teacher + among_student - 2 * _mean_kernel(own_BCA, other_BDA))
        return sum(losses[1:], losses[0])


def _unit_channels(map_BCHW: Tensor) -> Tensor:
    return F.normalize(map_BCHW.flatten(2), dim=2)


def _mean_kernel(a_BCA: Tensor, b_BDA: Tensor) -> Tensor:
    """Return the mean over images and over pairs of channels c, d of (a_c . b_d)^2."""
    images, channels, cells = a_BCA.shape
    others = b_BDA.shape[1]
    if cells * cells >= channels * others:
        return (a_BCA @ b_BDA.mT).square().mean()
    # The sum over c and d of (a_c . b_d)^2 equals the sum over two cells of (a^T a) * (b^T b),
    # whose matrices are smaller here.
    total = ((a_BCA.mT @ a_BCA) * (b_BDA.mT @ b_BDA)).sum()
    return total / (images * channels * others)
