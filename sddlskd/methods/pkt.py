"""Probabilistic knowledge transfer (PKT).

Source: Passalis and Tefas 2018 (arXiv:1803.10837), as mdistiller computes it.

Shapes: B batch, D channels of the pooled features.
"""

import torch
from torch import Tensor

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method
from sddlskd.models import Taps

__all__ = ["PKT"]


class PKT(Method):
    """The divergence between the neighbourhoods of the images in the pooled features.

    The probability that image i picks image j is (cosine + 1) / 2, divided by the sum over j. The
    loss is the mean over all pairs of p_teacher * log(p_teacher / p_student). As in mdistiller, it
    is a mean and not a sum, and an image may pick itself.

    Args:
        student: Taps of the student for any batch.
        teacher: Taps of the teacher for any batch.
        eps: Number that is added to lengths and probabilities.

    Raises:
        ValueError: If `eps` is not greater than 0.
    """

    needs = frozenset({"pooled"})

    def __init__(self, student: Taps, teacher: Taps, *, eps: float = 1e-7) -> None:
        super().__init__(student, teacher)
        if not eps > 0:
            raise ValueError(f"eps={eps} must be greater than 0")
        self.eps = eps

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the mean over all pairs of images of p_teacher * log(p_teacher / p_student)."""
        own_BB = self._probabilities(student.pooled)
        other_BB = self._probabilities(teacher.pooled)
        ratio_BB = (other_BB + self.eps) / (own_BB + self.eps)
        return (other_BB * ratio_BB.log()).mean()

    def _probabilities(self, pooled_BD: Tensor) -> Tensor:
        length_B1: Tensor = torch.linalg.vector_norm(pooled_BD, dim=1, keepdim=True)
        unit_BD = pooled_BD / (length_B1 + self.eps)
        nearness_BB = (unit_BD @ unit_BD.mT + 1) / 2
        return nearness_BB / nearness_BB.sum(1, keepdim=True)
