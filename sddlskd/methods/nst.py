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
    """The maximum mean discrepancy between the channels of the two networks, at each stage.

    A channel is a vector of cells of unit length, and the kernel of two channels is the square of
    their product. The loss of a stage is the mean kernel of teacher channels, plus the mean kernel
    of student channels, minus twice the mean kernel between both. The stages are summed. Channels
    and sides of the networks may differ.
    """

    needs = frozenset({"stages"})

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the sum over stages of the discrepancy between the channels."""
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
