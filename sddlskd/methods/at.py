"""Attention transfer (AT).

Source: Zagoruyko and Komodakis 2017 (arXiv:1612.03928), Eq. 2, as mdistiller computes it.

Shapes: B batch, C channels, H W sides of a map, A = H * W.
"""

import torch.nn.functional as F
from torch import Tensor

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, at_smaller_side, pairs
from sddlskd.models import Taps

__all__ = ["AT"]


class AT(Method):
    """Loss of AT: the squared difference between the attention maps of two networks at each stage.

    A stage is a group of layers after the stem (the first layers). Stages are paired from the
    first. If one network has more stages, its last stages do not count. Both maps (B, C, H, W) of a
    pair are average-pooled to the smaller height and the smaller width.

    The attention map is the mean of x^p over the channels of such a map. For each image, the H * W
    entries are divided by their Euclidean length. The loss of a pair is the mean squared difference
    over images and entries. The losses of all pairs are summed.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        p: Power, an integer of at least 1. An odd power keeps the sign of x, as in mdistiller; the
            paper has |x|^p.

    Raises:
        ValueError: If a network shows no stages after the stem, or if `p` is not an integer of at
            least 1.
    """

    needs = frozenset({"stages"})

    def __init__(self, student: Taps, teacher: Taps, *, p: int = 2) -> None:
        super().__init__(student, teacher)
        if not isinstance(p, int) or p < 1:
            raise ValueError(f"p={p} is no power; give an integer of at least 1")
        self.p = p

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the sum over stages of the mean squared difference of the attention maps.

        Args:
            student: Maps of the student; `stages` is read.
            teacher: Maps of the teacher, without gradients; `stages` is read.
            batch: Unused.

        Returns:
            A scalar. The first map of `stages`, that of the stem, does not count.
        """
        losses = []
        for maps in pairs(student, teacher):
            own_BA, other_BA = map(self._attention, at_smaller_side(*maps))
            losses.append((own_BA - other_BA).square().mean())
        return sum(losses[1:], losses[0])

    def _attention(self, map_BCHW: Tensor) -> Tensor:
        attention_BA = map_BCHW.pow(self.p).mean(1).flatten(1)
        return F.normalize(attention_BA, dim=1)
