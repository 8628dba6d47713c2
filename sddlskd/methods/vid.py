"""Variational information distillation (VID).

Source: Ahn et al. 2019 (arXiv:1904.05835), Eq. 5 and 6, as RepDistiller computes it.

Shapes: B batch, C channels, H W sides of a map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sddlskd.data.device import Batch
from sddlskd.methods.base import (
    Method,
    at_smaller_side,
    check_alignment,
    check_flags,
    from_end,
    pairs,
)
from sddlskd.models import Taps
from sddlskd.terminal.words import counted

__all__ = ["VID"]


class VID(Method):
    """Loss of VID: the negative log-likelihood of the teacher's maps, predicted from the student's.

    A stage is a group of layers after the stem (the first layers). Both maps (B, C, H, W) of a
    stage are average-pooled to the smaller height and the smaller width. Each entry of the
    teacher's map has a Gaussian distribution. Three 1x1 convolutions with ReLUs between them
    predict its mean from the student's map. Its variance is one number for each channel of the
    teacher. The loss of a stage is the negative log-likelihood, averaged over images, channels and
    positions, without the constant log(2 pi) / 2. The losses of the stages are summed.

    Args:
        student: Maps of the student (`Taps`) for any batch; only their shapes are read.
        teacher: Maps of the teacher (`Taps`) for any batch; only their shapes are read.
        alignment: Which stages are paired. "strict": the first with the first, as in the released
            code. The last stages of a teacher with more stages are left out; a student with more
            stages is refused. "from_end": the last with the last. The first stages of the network
            with more stages are left out.
        train_variance: Whether the variances are trained, as in the paper and in RepDistiller. If
            false, they keep their first value, as in mdistiller.
        variance: First value of all variances, greater than `eps`.
        eps: Lower limit of the variances, greater than 0.

    Raises:
        ValueError: If a network shows no stages after the stem, if `alignment` is unknown or
            refuses the two networks, if `train_variance` is not a bool, or if not
            0 < `eps` < `variance`.
    """

    needs = frozenset({"stages"})

    def __init__(
        self,
        student: Taps,
        teacher: Taps,
        *,
        alignment: str = "strict",
        train_variance: bool = True,
        variance: float = 5.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(student, teacher)
        check_alignment(alignment)
        check_flags(train_variance=train_variance)
        if not 0 < eps < variance:
            raise ValueError(f"eps={eps} must be greater than 0 and less than variance={variance}")
        own, other = len(student.stages) - 1, len(teacher.stages) - 1
        if alignment == "strict" and own > other:
            raise ValueError(
                f"the student has {counted(own, 'stage')} after the stem and the teacher "
                f"{other}; set "
                "alignment=from_end to leave out the student's finest maps"
            )
        self.alignment, self.eps = alignment, eps
        maps = self._pairs(student, teacher)
        self.regressors = nn.ModuleList(_regressor(a.shape[1], b.shape[1]) for a, b in maps)
        # The variance is eps + softplus(scale), so the scale is the inverse of softplus.
        scale = variance - eps + math.log(-math.expm1(eps - variance))
        self.log_scales = nn.ParameterList(
            nn.Parameter(torch.full((b.shape[1],), scale), requires_grad=train_variance)
            for _, b in maps
        )

    def forward(self, student: Taps, teacher: Taps, batch: Batch) -> Tensor:
        """Return the negative log-likelihood of the teacher's maps, summed over stages.

        Args:
            student: Maps of the student; `stages` is read.
            teacher: Maps of the teacher, without gradients; `stages` is read.
            batch: Unused.

        Returns:
            A scalar, averaged over images, channels and positions; it may be negative.
        """
        losses = []
        parts = zip(self._pairs(student, teacher), self.regressors, self.log_scales, strict=True)
        for maps, regressor, scale_C in parts:
            own_BCHW, other_BCHW = at_smaller_side(*maps)
            mean_BCHW: Tensor = regressor(own_BCHW)
            variance_C11 = F.softplus(scale_C)[:, None, None] + self.eps
            error_BCHW = (mean_BCHW - other_BCHW).square()
            losses.append((error_BCHW / variance_C11 + variance_C11.log()).mean() / 2)
        return sum(losses[1:], losses[0])

    def _pairs(self, student: Taps, teacher: Taps) -> list[tuple[Tensor, Tensor]]:
        if self.alignment == "strict":
            return pairs(student, teacher)
        return from_end(student.stages[1:], teacher.stages[1:])


def _regressor(own: int, other: int) -> nn.Sequential:
    """Return three 1x1 convolutions with ReLUs from the student's channels to the teacher's."""
    return nn.Sequential(
        nn.Conv2d(own, other, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(other, other, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(other, other, 1, bias=False),
    )
