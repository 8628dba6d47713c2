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
    """Loss of PKT: the divergence between the neighbourhoods of the images in two networks.

    The probability that image i of a batch picks image j as a neighbour is (cosine + 1) / 2 of
    their pooled features (the input of the classifier), divided by the sum over j. The loss is
    p_teacher * log(p_teacher / p_student), averaged over all B x B pairs (i, j), as in mdistiller;
    the paper has the sum.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        eps: Small number, greater than 0, that is added to the lengths of the features and to both
            probabilities in the ratio.

    Raises:
        ValueError: If a network shows no pooled features, or if `eps` is not greater than 0.
    """

    needs = frozenset({"pooled"})

    def __init__(self, student: Taps, teacher: Taps, *, eps: float = 1e-7) -> None:
        super().__init__(student, teacher)
        if not eps > 0:
            raise ValueError(f"eps={eps} must be greater than 0")
        self.eps = eps

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the mean over all pairs of images of p_teacher * log(p_teacher / p_student).

        p is the probability that the first image picks the second as a neighbour (see `PKT`).

        Args:
            student: Maps of the student; `pooled`, (B, C), is read.
            teacher: Maps of the teacher, without gradients; `pooled` is read.
            batch: Unused.

        Returns:
            A scalar: the sum over images of KL(teacher || student), divided by B^2, but for the
            effect of `eps`.
        """
        own_BB = self._probabilities(student.pooled)
        other_BB = self._probabilities(teacher.pooled)
        ratio_BB = (other_BB + self.eps) / (own_BB + self.eps)
        return (other_BB * ratio_BB.log()).mean()

    def _probabilities(self, pooled_BD: Tensor) -> Tensor:
        length_B1: Tensor = torch.linalg.vector_norm(pooled_BD, dim=1, keepdim=True)
        unit_BD = pooled_BD / (length_B1 + self.eps)
        nearness_BB = (unit_BD @ unit_BD.mT + 1) / 2
        return nearness_BB / nearness_BB.sum(1, keepdim=True)
