"""Scale decoupling and logit standardisation: from two logit maps and a loss to one scalar.

Shapes: B batch, K classes, H W map sides, R regions of all scales, N = B*R.
Sources: SDD = Wei et al. 2024, "Scale Decoupled Distillation" (CVPR 2024); LSKD = Sun et al. 2024,
"Logit Standardization in Knowledge Distillation" (CVPR 2024).
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "KNOWLEDGE",
    "POOLINGS",
    "REDUCTIONS",
    "PerSampleLoss",
    "ScaleDecoupled",
    "check_scales",
    "region_logits",
    "standardize",
]

PerSampleLoss = Callable[..., Tensor]
"""A loss of the form (student_NK, teacher_NK, target_N) -> loss_N."""


KNOWLEDGE = {"fusion": (1.0, 1.0), "consistent": (1.0, 0.0), "complementary": (0.0, 1.0)}
"""Which regions the loss uses: (factor of consistent, factor of complementary regions), by name.

See SDD Table 6.
"""

REDUCTIONS = ("mean", "sum")
"""How the loss of the regions is reduced.

mean: mean over all B*R regions (SDD's released code). sum: sum over the regions of an image, then
mean over images (SDD Eq. 9).
"""

POOLINGS = ("direct", "nested")
"""How the regions are pooled.

direct: every scale from the logit map (SDD Eq. 3 to 5). nested: every scale from the logit map that
is pooled to 4x4 first (SDD's released code). For the scales 1, 2 and 4, both are equal if the sides
of the map are multiples of 4.
"""
NESTED_SIDE = 4


def check_scales(M: Sequence[int]) -> tuple[int, ...]:
    """Return the scales `M` as a tuple.

    Raise ValueError if `M` is a string or an integer, is empty, holds anything but positive
    integers (True is refused), or holds a scale twice.
    """
    if isinstance(M, (str, int)) or not len(M):
        raise ValueError(
            f"M={M!r} is not a list of scales; "
            "give a list of distinct positive integers such as M=[1,2,4]"
        )
    bad = [m for m in M if isinstance(m, bool) or not isinstance(m, int) or m < 1]
    if bad:
        raise ValueError(
            f"M={list(M)} holds {bad[0]!r}; scales are distinct positive integers such as M=[1,2,4]"
        )
    if len(set(M)) < len(M):
        raise ValueError(
            f"M={list(M)} holds a scale twice; name each scale once, such as M={sorted(set(M))}"
        )
    return tuple(M)


def region_logits(logit_map_BKHW: Tensor, M: Sequence[int]) -> Tensor:
    """Return the logits of every region of every scale, (B, R, K) with R = sum of m*m for m in M.

    For each scale m in order, the map is average-pooled to m x m cells, which are listed row by row
    (SDD Eq. 3 to 5). Pooling and the linear head commute, so pooling the logit map equals
    classifying pooled features. If a side of the map is not a multiple of m, adaptive pooling lets
    neighbouring cells overlap (7x7 at m=2) or repeats cells (mobilev2's 2x2 at m=4 gives each cell
    four times).

    Raise ValueError if the scales are not distinct positive integers.
    """
    regions_BKm = [F.adaptive_avg_pool2d(logit_map_BKHW, m).flatten(2) for m in check_scales(M)]
    return torch.cat(regions_BKm, 2).transpose(1, 2)


def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Return (z - mean) / (eps + std) over the last dimension, with the unbiased std.

    The formula is LSKD Eq. 13; `eps` and the unbiased std follow LSKD's released code.
    """
    std, mean = torch.std_mean(logits, dim=-1, keepdim=True)
    return (logits - mean) / (eps + std)


class ScaleDecoupled:
    """A distillation loss that applies a per-sample loss to the regions of two logit maps.

    A region is consistent if the teacher's prediction for the region and the teacher's global
    prediction are both right or both wrong. Otherwise the region is complementary.

    Args:
        loss: (student_NK, teacher_NK, target_N) -> loss_N, for instance
            `functools.partial(kd, temperature=2.0)`.
        M: the scales; [1] is the plain loss on the logits.
        complementary_weight: SDD's beta, the weight of complementary regions. Consistent regions
            have weight 1.
        standardize: whether to apply LSKD to the logits of each region, after pooling and before
            the loss divides them by its temperature.
        knowledge: a key of `KNOWLEDGE`.
        reduction: one of `REDUCTIONS`.
        pooling: one of `POOLINGS`. As in SDD's code, M=[1] is the plain loss for both.

    Raises:
        ValueError: if a value is not valid.
    """

    def __init__(
        self,
        loss: PerSampleLoss,
        M: Sequence[int],
        complementary_weight: float = 2.0,
        standardize: bool = False,
        knowledge: str = "fusion",
        reduction: str = "mean",
        pooling: str = "direct",
    ) -> None:
        for name, value, valid in (
            ("knowledge", knowledge, KNOWLEDGE),
            ("reduction", reduction, REDUCTIONS),
            ("pooling", pooling, POOLINGS),
        ):
            if value not in valid:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(valid)}")
        if not complementary_weight >= 0:  # also true for NaN
            raise ValueError(f"complementary_weight={complementary_weight} must not be negative")
        self.loss = loss
        self.M = check_scales(M)
        self.complementary_weight = complementary_weight
        self.standardize = standardize
        self.knowledge = knowledge
        self.reduction = reduction
        self.pooling = pooling

    def __call__(
        self,
        student_map_BKHW: Tensor,
        teacher_map_BKHW: Tensor,
        target_B: Tensor,
        **options: Tensor,
    ) -> Tensor:
        """Return the loss of one batch as a scalar.

        The loss is computed in float32 (float64 stays float64) outside autocast.

        Args:
            student_map_BKHW: logit map of the student.
            teacher_map_BKHW: logit map of the teacher; its sides may differ from the student's.
            target_B: class ids, int64.
            **options: further arguments of the per-sample loss, such as a learnt `temperature`.

        Returns:
            The loss, a scalar tensor.

        Raises:
            ValueError: if the per-sample loss does not return one value per region.
        """
        with torch.autocast(student_map_BKHW.device.type, enabled=False):
            student_map_BKHW = self._to_pool(student_map_BKHW)
            teacher_map_BKHW = self._to_pool(teacher_map_BKHW)
            student_BRK = region_logits(student_map_BKHW, self.M)
            teacher_BRK = region_logits(teacher_map_BKHW, self.M)
            B, R, _ = student_BRK.shape
            weight_BR = self._weights(teacher_map_BKHW, teacher_BRK, target_B)
            if self.standardize:
                student_BRK, teacher_BRK = standardize(student_BRK), standardize(teacher_BRK)
            target_BR = target_B[:, None].expand(B, R)
            loss_N = self.loss(
                student_BRK.flatten(0, 1), teacher_BRK.flatten(0, 1), target_BR.flatten(), **options
            )
            if loss_N.shape != (B * R,):
                raise ValueError(
                    f"the loss returned shape {tuple(loss_N.shape)} for {B * R} regions; "
                    "it must return one value per region"
                )
            total = (weight_BR.flatten() * loss_N).sum()
            return total / (B * R if self.reduction == "mean" else B)

    def _to_pool(self, logit_map_BKHW: Tensor) -> Tensor:
        """Return the map that all regions are pooled from, in float32 (float64 stays float64)."""
        wide_BKHW = _wide(logit_map_BKHW)
        if self.pooling == "direct" or self.M == (1,):
            return wide_BKHW
        return F.adaptive_avg_pool2d(wide_BKHW, NESTED_SIDE)

    def _weights(self, teacher_map_BKHW: Tensor, teacher_BRK: Tensor, target_B: Tensor) -> Tensor:
        """Return the weight of each region, (B, R), from the teacher alone (SDD Eq. 6 to 9)."""
        right_globally_B1 = (teacher_map_BKHW.mean((2, 3)).argmax(1) == target_B)[:, None]
        complementary_BR = (teacher_BRK.argmax(2) == target_B[:, None]) != right_globally_B1
        consistent, complementary = KNOWLEDGE[self.knowledge]
        weight_BR = teacher_BRK.new_full(complementary_BR.shape, consistent)
        return weight_BR.masked_fill(complementary_BR, complementary * self.complementary_weight)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
