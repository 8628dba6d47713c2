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
    """Loss of RKD: how much two networks differ in the distances and angles between images.

    An image is the point that its pooled features (the input of the classifier) describe. In each
    network, the distances of all pairs of images are divided by their mean over pairs of different
    images. The angle of three images i, j, k is the cosine at i between the directions to j and to
    k. The loss is the smooth L1 loss between student and teacher: the mean over all B x B pairs for
    the distances, and over all B x B x B triples for the angles.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        distance_weight: Weight of the distances, not negative.
        angle_weight: Weight of the angles, not negative.
        squared: Whether squared distances are compared instead of distances.
        eps: Lower limit of the squared distance of two different images, greater than 0.

    Raises:
        ValueError: If a network shows no pooled features, if `squared` is not a bool, if a weight
            is negative or NaN, or if `eps` is not greater than 0.
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
        """Return the weighted sum of the losses of the distances and of the angles, a scalar.

        Args:
            student: Maps of the student; `pooled`, (B, C), is read.
            teacher: Maps of the teacher, without gradients; `pooled` is read.
            batch: Unused.

        Returns:
            The loss; 0 for a batch of one image, which has neither distances nor angles.
        """
        if len(student.pooled) < 2:
            return 0 * student.pooled.sum()
        own_BB, own_BBB = self._relations(student.pooled)
        other_BB, other_BBB = self._relations(teacher.pooled)
        of_distances = F.smooth_l1_loss(own_BB, other_BB)
        of_angles = F.smooth_l1_loss(own_BBB, other_BBB)
        return self.distance_weight * of_distances + self.angle_weight * of_angles

    def _relations(self, pooled_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distances (B, B), divided by their mean, and the cosines (B, B, B).

        Entry [i, j, k] of the cosines is the one at image i.
        """
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
