"""Relational knowledge distillation (RKD).

Source: Park et al. 2019 (arXiv:1904.05068), as mdistiller computes it.

Shapes: B batch, D channels of the pooled features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.data.device import Batch
from sddlskd.methods.base import Method, check_flags
from sddlskd.models import Taps

__all__ = ["RKD"]


class RKD(Method):
    """The differences of distances and angles between the pooled features of a batch.

    The distances of all pairs of images are divided by their mean. An angle is the cosine at image
    i between the directions to the images j and k. The loss is the smooth L1 distance between
    student and teacher, a mean over pairs for the distances and over triples for the angles. A
    batch of one image has no relations, so its loss is 0.

    Args:
        student: Taps of the student for any batch.
        teacher: Taps of the teacher for any batch.
        distance_weight: Weight of the distances.
        angle_weight: Weight of the angles.
        squared: Whether to compare squared distances.
        eps: Smallest squared distance of two images.

    Raises:
        ValueError: If a weight is negative, or if `eps` is not greater than 0.
    """

    needs = frozenset({"pooled"})

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        squared: bool = False,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(student, teacher)
        check_flags(squared=squared)
        for name, weight in (("distance_weight", distance_weight), ("angle_weight", angle_weight)):
            if not weight >= 0:
                raise ValueError(f"{name}={weight} must be at least 0")
        if not eps > 0:
            raise ValueError(f"eps={eps} must be greater than 0")
        self.distance_weight, self.angle_weight = distance_weight, angle_weight
        self.squared, self.eps = squared, eps

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the weighted sum of the losses of the distances and of the angles."""
        if len(student.pooled) < 2:
            return 0 * student.pooled.sum()
        own_BB, own_BBB = self._relations(student.pooled)
        other_BB, other_BBB = self._relations(teacher.pooled)
        of_distances = F.smooth_l1_loss(own_BB, other_BB)
        of_angles = F.smooth_l1_loss(own_BBB, other_BBB)
        return self.distance_weight * of_distances + self.angle_weight * of_angles

    def _relations(self, pooled_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distances [i, j] in units of their mean, and the cosines [i, j, k] at i."""
        images = len(pooled_BD)
        to_BBD = pooled_BD[None, :] - pooled_BD[:, None]
        distance_BB = to_BBD.square().sum(2).clamp(min=self.eps)
        if not self.squared:
            distance_BB = distance_BB.sqrt()
        itself_BB = torch.eye(images, dtype=torch.bool, device=pooled_BD.device)
        distance_BB = distance_BB.masked_fill(itself_BB, 0)
        mean = distance_BB.sum() / (images * (images - 1))
        direction_BBD = F.normalize(to_BBD, dim=2)
        return distance_BB / mean, direction_BBD @ direction_BBD.mT
