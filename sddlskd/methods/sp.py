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
    """Loss of SP: the squared difference between the similarities of images in two networks.

    The similarity of two images is the dot product of their flattened maps of the last stage. The
    similarities of a batch are a matrix (B, B), whose rows are divided by their length. The loss is
    the mean squared difference of the student's and the teacher's matrix. Channels and sides of the
    networks may differ.

    Args:
        student: Maps of the student for any batch; only their shapes are read.
        teacher: Maps of the teacher for any batch; only their shapes are read.
        M: Scales of SD-SP (SDD, appendix). For each m in `M`, the maps are average-pooled to m x m
            regions. Each region has a matrix of its own, and the loss is the mean over all regions.
            Empty for plain SP, which compares the whole maps.

    Raises:
        ValueError: If a network shows no stages after the stem, or if `check_scales` refuses `M`.
    """

    needs = frozenset({"stages"})

    def __init__(self, student: Taps, teacher: Taps, *, M: Sequence[int] = ()) -> None:
        super().__init__(student, teacher)
        self.M: tuple[int, ...] = ()
        if len(M):
            self.M = check_scales(M)

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the mean squared difference of the similarity matrices, a scalar.

        Args:
            student: Maps of the student; `stages` is read.
            teacher: Maps of the teacher, without gradients; `stages` is read.
            batch: Unused.

        Returns:
            The mean over regions and pairs of images.
        """
        own_RBB, other_RBB = (self._similarities(taps.stages[-1]) for taps in (student, teacher))
        return (other_RBB - own_RBB).square().mean()

    def _similarities(self, map_BCHW: Tensor) -> Tensor:
        """Return the similarity matrix of each region, (R, B, B), with rows of length 1."""
        x_RBX = map_BCHW.flatten(1)[None]
        if self.M:
            cells = [F.adaptive_avg_pool2d(map_BCHW, m).flatten(2) for m in self.M]
            x_RBX = torch.cat(cells, dim=2).permute(2, 0, 1)
        return F.normalize(x_RBX @ x_RBX.mT, dim=2)
