"""Multi-level logit distillation (MLKD).

Source: Jin et al. 2023, "Multi-Level Logit Distillation" (CVPR 2023), as the released code computes
it. LSKD's code computes the same numbers and can standardise the logits.

Shapes: B batch, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.data.device import Batch
from sddlskd.distill import standardize as z_score
from sddlskd.losses import kd
from sddlskd.methods.base import Method, check_flags
from sddlskd.models import Taps

__all__ = ["MASKS", "MLKD"]

MASKS = ("share", "each")
"""What the masks of the weak view do.

share: they mask nothing, and each loss is multiplied by the share of images or classes that the
mask selects (the released code). each: only the images or classes that the mask selects count.
"""


class MLKD(Method):
    """Distillation of the logits at several temperatures, image by image and by Gram matrices.

    The instances' part compares the predictions of each image, in both views. The batch's part
    compares the similarities of the images, and the classes' part those of the classes, both in the
    weak view. A mask selects the images of which the teacher is less sure than of the median image,
    and the classes that it predicts less often than the median class.

    Args:
        student: Taps of the student for any batch.
        teacher: Taps of the teacher for any batch.
        temperatures: The temperatures; each gives one term of each part.
        kd_weight: Weight of all three parts.
        ce_weight: Weight of the cross-entropy of the strong view. That of the weak view is the
            distiller's.
        standardize: Whether the logits of the instances' part are z-scored (LSKD). The Gram
            matrices take plain logits, as in LSKD's code.
        masks: One of `MASKS`.
        strong_only_at: Positions in `temperatures` at which the strong view's term takes the strong
            view. At the others it takes the weak view a second time, as the released code does from
            the fourth temperature on. None for all positions.

    Raises:
        ValueError: If a value is not valid.
    """

    needs = frozenset({"strong_map"})

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        *,
        temperatures: Sequence[float] = (4.0, 3.0, 5.0, 2.0, 6.0),
        kd_weight: float = 0.9,
        ce_weight: float = 0.1,
        standardize: bool = False,
        masks: str = "share",
        strong_only_at: Sequence[int] | None = (0, 1, 2),
    ) -> None:
        super().__init__(student, teacher)
        check_flags(standardize=standardize)
        if not temperatures or not all(temperature > 0 for temperature in temperatures):
            raise ValueError(f"temperatures={list(temperatures)} must be one or more above 0")
        if masks not in MASKS:
            raise ValueError(f"masks={masks!r} is not one of {', '.join(MASKS)}")
        places = range(len(temperatures))
        if strong_only_at is None:
            strong_only_at = places
        if bad := [place for place in strong_only_at if place not in places]:
            raise ValueError(
                f"strong_only_at={list(strong_only_at)} holds {bad[0]}, which is no position in "
                f"{len(temperatures)} temperatures: count from 0"
            )
        self.temperatures = tuple(temperatures)
        self.kd_weight, self.ce_weight = kd_weight, ce_weight
        self.standardize, self.masks = standardize, masks
        self.strong_only_at = frozenset(strong_only_at)

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the weighted sum of the three parts and the strong view's cross-entropy."""
        own, other = _Views.of(student), _Views.of(teacher)
        teacher_BK = other.weak_BK.softmax(1)
        unsure_B = _below_median(teacher_BK.amax(1))
        rare_K = _below_median(teacher_BK.sum(0))
        loss = own.weak_BK.new_zeros(())
        for place, temperature in enumerate(self.temperatures):
            weak_B = self._kd(own.weak_BK, other.weak_BK, batch.labels, temperature)
            second_B = weak_B
            if place in self.strong_only_at:
                second_B = self._kd(own.strong_BK, other.strong_BK, batch.labels, temperature)
            p_BK = (own.weak_BK / temperature).softmax(1)
            q_BK = (other.weak_BK / temperature).softmax(1)
            images_B = (p_BK @ p_BK.T - q_BK @ q_BK.T).square().sum(1)
            classes_K = (p_BK.T @ p_BK - q_BK.T @ q_BK).square().sum(1)
            loss = loss + self._masked_mean(weak_B, unsure_B) + second_B.mean()
            loss = loss + self._masked_mean(images_B, unsure_B)
            loss = loss + self._masked_mean(classes_K, rare_K)
        ce = F.cross_entropy(own.strong_BK, batch.labels)
        return self.kd_weight * loss + self.ce_weight * ce

    def _kd(self, own_BK: Tensor, other_BK: Tensor, labels_B: Tensor, temperature: float) -> Tensor:
        """Return the distillation loss of each image at a temperature, (B,)."""
        if self.standardize:
            own_BK, other_BK = z_score(own_BK), z_score(other_BK)
        return kd(own_BK, other_BK, labels_B, temperature=temperature)

    def _masked_mean(self, loss_X: Tensor, mask_X: Tensor) -> Tensor:
        """Return the mean of the losses of images or classes after the mask."""
        if self.masks == "share":
            return loss_X.mean() * mask_X.mean()
        return (loss_X * mask_X).mean()


class _Views:
    """The logits of both views of a batch."""

    def __init__(self, weak_BK: Tensor, strong_BK: Tensor) -> None:
        self.weak_BK, self.strong_BK = weak_BK, strong_BK

    @classmethod
    def of(cls, taps: Taps) -> "_Views":
        assert taps.strong_map is not None  # as `needs` says
        return cls(taps.logit_map.mean((2, 3)), taps.strong_map.mean((2, 3)))


def _below_median(value_X: Tensor) -> Tensor:
    """Return 1 for each value that is at most the median, interpolated as numpy does, else 0."""
    return (value_X <= torch.quantile(value_X, 0.5)).to(value_X.dtype)
