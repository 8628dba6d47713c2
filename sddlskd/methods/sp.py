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

    The similarity of two images is the dot product of their flattened last maps (the output of the
    last group of layers). The similarities of a batch are a matrix (B, B), whose rows are divided
    by their Euclidean length. The loss is the mean squared difference of the student's and the
    teacher's matrix. The maps (B, C, H, W) of the two networks may differ in channels and sides.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        M: Scales of SD-SP (SDD, appendix), different integers of at least 1. For each scale m, the
            maps are average-pooled to m x m regions. Each region has a matrix of its own, and the
            loss is the mean over all regions. Empty for plain SP, which compares the whole maps.

    Raises:
        ValueError: If a network shows no map after the stem (the first layers), or if `M` is
            neither empty nor a sequence of different integers of at least 1.
    """

    needs = frozenset({"stages"})

    def __init__(self, student: Taps, teacher: Taps, *, M: Sequence[int] = ()) -> None:
        super().__init__(student, teacher)
        self.M: tuple[int, ...] = ()
        if not isinstance(M, Sequence) or len(M):
            self.M = check_scales(M)

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the mean squared difference of the similarity matrices, a scalar.

        Args:
            student: Maps of the student; the last map of `stages` is read.
            teacher: Maps of the teacher, without gradients; the last map of `stages` is read.
            batch: Unused.

        Returns:
            The mean over pairs of images and, with scales, over regions.
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
