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
"""How a mask acts on the losses of images or classes.

share: nothing is masked; the mean loss is multiplied by the fraction of images or classes that the
mask selects (the released code). each: images or classes that are not selected count as 0 in the
mean.
"""


class MLKD(Method):
    """Loss of MLKD: distillation of the logits of two views, image by image and by Gram matrices.

    Every image has two views: a weakly and a strongly augmented one. For each temperature T, the
    loss has four terms:
    - T^2 * KL(teacher || student) of the weak view, averaged over images. The mask of images acts
      on this term.
    - T^2 * KL(teacher || student) of the strong view, averaged over images, without a mask. At some
      temperatures, the weak view is read instead, see `strong_only_at`.
    - The squared Frobenius norm of the difference between the two networks' P P^T, divided by B.
      The mask of images acts on this term. P is softmax(logits / T) of the weak view, (B, K).
    - The squared Frobenius norm of the difference between the two networks' P^T P, divided by K.
      The mask of classes acts on this term.

    The masks come from the teacher's softmax(logits) of the weak view. The mask of images selects
    the images whose largest probability is at most the median of the batch. The mask of classes
    selects the classes whose probability, summed over the batch, is at most the median of the
    classes.

    Args:
        student: Maps of the student (`Taps`) for any batch; not read.
        teacher: Maps of the teacher (`Taps`) for any batch; not read.
        temperatures: One or more temperatures, greater than 0.
        kd_weight: Weight of the sum of the four terms over all temperatures.
        ce_weight: Weight of the student's cross-entropy in the strong view, which is added to the
            terms.
        standardize: Whether the logits of both KL terms are standardised to mean 0 and standard
            deviation 1 over the classes (LSKD). P always comes from the plain logits.
        masks: How a mask acts. "share": the term is multiplied by the fraction of images or classes
            that the mask selects, as in the released code. "each": images or classes that are not
            selected count as 0 in the term.
        strong_only_at: Positions in `temperatures`, from 0, at which the second term reads the
            strong view; at other positions it reads the weak view. None for all positions.

    Raises:
        ValueError: If `temperatures` is empty or holds one that is not greater than 0, if
            `standardize` is not a bool, if `masks` is unknown, or if `strong_only_at` holds a
            number that is no position in `temperatures`.
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
        """Return the weighted sum of all terms and of the strong view's cross-entropy, a scalar.

        Args:
            student: Maps of the student; the logit maps `logit_map` (weak view) and `strong_map`
                (strong view), (B, K, H, W), are read.
            teacher: Maps of the teacher, without gradients; the same fields are read.
            batch: The labels.

        Returns:
            The loss. The logits of a view are the mean of its logit map over H and W.

        Raises:
            AssertionError: If a network has no `strong_map`.
        """
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
        """Return the KL term of each image at a temperature, (B,)."""
        if self.standardize:
            own_BK, other_BK = z_score(own_BK), z_score(other_BK)
        return kd(own_BK, other_BK, labels_B, temperature=temperature)

    def _masked_mean(self, loss_X: Tensor, mask_X: Tensor) -> Tensor:
        """Return the mean of the losses of images or classes, masked as `masks` says."""
        if self.masks == "share":
            return loss_X.mean() * mask_X.mean()
        return (loss_X * mask_X).mean()


class _Views:
    """The logits (B, K) of both views of a batch."""

    def __init__(self, weak_BK: Tensor, strong_BK: Tensor) -> None:
        self.weak_BK, self.strong_BK = weak_BK, strong_BK

    @classmethod
    def of(cls, taps: Taps) -> "_Views":
        assert taps.strong_map is not None  # `needs` asks the caller for it
        return cls(taps.logit_map.mean((2, 3)), taps.strong_map.mean((2, 3)))


def _below_median(value_X: Tensor) -> Tensor:
    """Return 1 for each value that is at most the median, else 0.

    The median of an even number of values is halfway between the middle two.
    """
    return (value_X <= torch.quantile(value_X, 0.5)).to(value_X.dtype)
