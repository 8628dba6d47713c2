"""Similarity-preserving distillation (SP).

Source: Tung and Mori 2019 (arXiv:1907.09682), Eq. 2 to 4, as mdistiller computes it.

Shapes: B batch, C channels, H W sides of a map, R regions, X values of an image or of its region.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.data.device import Batch
from sddlskd.distill import check_scales
from sddlskd.methods.base import Method
from sddlskd.models import Taps

__all__ = ["SP"]


class SP(Method):
    """The distance between the similarities of images in the last stages of the two networks.

    The similarities of a batch are the products of the flattened maps, a matrix B x B whose rows
    have unit length. The loss is the mean squared difference of the two matrices. Channels and
    sides of the networks may differ.

    Args:
        student: Taps of the student for any batch.
        teacher: Taps of the teacher for any batch.
        M: The scales of SD-SP (SDD, appendix). The maps are average-pooled to m x m cells for each
            m in M, each cell has similarities of its own, and the loss is the mean over the cells.
            Empty for SP, which compares the whole maps.
    """

    needs = frozenset({"stages"})

    def __init__(self, student: Taps, teacher: Taps, *, M: Sequence[int] = ()) -> None:
        super().__init__(student, teacher)
        self.M: tuple[int, ...] = ()
        if len(M):
            self.M = check_scales(M)

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the mean squared difference of the similarity matrices."""
        own_RBB, other_RBB = (self._similarities(taps.stages[-1]) for taps in (student, teacher))
        return (other_RBB - own_RBB).square().mean()

    def _similarities(self, map_BCHW: Tensor) -> Tensor:
        """Return the products of all pairs of images for each region, with rows of unit length."""
        x_RBX = map_BCHW.flatten(1)[None]
        if self.M:
            cells = [F.adaptive_avg_pool2d(map_BCHW, m).flatten(2) for m in self.M]
            x_RBX = torch.cat(cells, dim=2).permute(2, 0, 1)
        return F.normalize(x_RBX @ x_RBX.mT, dim=2)
