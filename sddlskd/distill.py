"""Scale decoupling and logit standardisation of a distillation loss.

`ScaleDecoupled` computes a scalar from two logit maps and a loss of single samples.

Shapes: B batch, K classes, H W map sides, R regions of all scales, N = B*R. Sources: SDD = Wei et
al. 2024, "Scale Decoupled Distillation" (CVPR 2024); LSKD = Sun et al. 2024, "Logit Standardization
in Knowledge Distillation" (CVPR 2024).
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
"""A loss (student_NK, teacher_NK, target_N, **options) -> loss_N, as in `sddlskd.losses`."""

KNOWLEDGE = {"fusion": (1.0, 1.0), "consistent": (1.0, 0.0), "complementary": (0.0, 1.0)}
"""Which regions count: (factor of consistent regions, factor of complementary regions), by name.

The factors multiply the weights of the regions, see `ScaleDecoupled`. Source: SDD Table 6.
"""

REDUCTIONS = ("mean", "sum")
"""How the weighted losses of the regions become a scalar.

mean: mean over all B*R regions (SDD's released code). sum: sum over the regions of an image, then
mean over images (SDD Eq. 9).
"""

POOLINGS = ("direct", "nested")
"""How the regions are pooled.

direct: every scale is pooled from the logit map (SDD Eq. 3 to 5). nested: the logit map is pooled
to 4x4 first, and every scale is pooled from the result (SDD's released code). For the scales 1, 2
and 4, both are equal if the sides of the map are multiples of 4.
"""
NESTED_SIDE = 4


def check_scales(M: Sequence[int]) -> tuple[int, ...]:
    """Return the scales `M` as a tuple, if all of them are valid.

    A scale m stands for m x m regions of a map.

    Raise ValueError if `M` is a string or an integer, is empty, holds an entry that is not a
    positive integer (2.0 and True are refused, too), or holds a scale twice.
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
    """Return the logits of all regions of a logit map, (B, R, K).

    A scale m divides the map (B, K, H, W) into m x m regions by average pooling (SDD Eq. 3 to 5). R
    is the sum of m*m over the scales in `M`. The regions are listed scale by scale in the order of
    `M`, and row by row within a scale. The head is linear, so these logits equal the head applied
    to the pooled features. If a side of the map is not a multiple of m, adaptive pooling lets
    neighbouring regions overlap (7x7 at m=2) or repeats cells (2x2 at m=4 gives each cell four
    times).

    Raise ValueError if `M` is not a list of distinct positive integers, see `check_scales`.
    """
    regions_BKm = [F.adaptive_avg_pool2d(logit_map_BKHW, m).flatten(2) for m in check_scales(M)]
    return torch.cat(regions_BKm, 2).transpose(1, 2)


def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Return (z - mean) / (eps + std) of the logits z, with mean and std over the last dimension.

    The shape stays the same. The std is the unbiased one, so the last dimension needs at least two
    entries; with one entry the result is NaN. Equal logits become 0. The formula is LSKD Eq. 13;
    `eps` and the unbiased std follow LSKD's released code.
    """
    std, mean = torch.std_mean(logits, dim=-1, keepdim=True)
    return (logits - mean) / (eps + std)


class ScaleDecoupled:
    """Distillation loss of a batch that is computed on the regions of two logit maps.

    The per-sample loss is applied to the logits of each region, see `region_logits`. A region is
    consistent if the teacher's prediction for the region and the teacher's prediction for the whole
    image are both right or both wrong. Otherwise the region is complementary. The kind of a region
    sets the weight of its loss.

    Args:
        loss: function (student_NK, teacher_NK, target_N) -> loss_N, for instance
            `functools.partial(kd, temperature=2.0)`.
        M: scales, distinct positive integers. Scale 1 has a single region, the whole map, which is
            always consistent; its logits are the network's logits.
        complementary_weight: weight of complementary regions (SDD's beta), not negative. Consistent
            regions have weight 1.
        standardize: whether to standardise the logits of each region (LSKD), after pooling and
            before the loss divides them by its temperature.
        knowledge: which regions count: "fusion" (all), "consistent" or "complementary". Other
            regions get weight 0.
        reduction: how the weighted losses of the regions become a scalar: "mean" (mean over all B*R
            regions) or "sum" (sum over the regions of an image, then mean over images).
        pooling: "direct" to pool every scale from the logit map, or "nested" to pool the map to 4x4
            first. With M=[1] both pool the map directly, as in SDD's code.

    Raises:
        ValueError: If `check_scales` refuses `M`, if `complementary_weight` is negative or NaN, or
            if `knowledge`, `reduction` or `pooling` is not one of the names above.
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
        """Return the loss of a batch as a scalar.

        The loss is computed in float32 (float64 stays float64), with autocast disabled.

        Args:
            student_map_BKHW: logit map of the student, (B, K, H, W).
            teacher_map_BKHW: logit map of the teacher, (B, K, H, W); H and W may differ from the
                student's.
            target_B: class ids, int64, (B,).
            **options: keyword arguments that are passed on to the per-sample loss, such as a learnt
                `temperature`.

        Returns:
            The weighted and reduced loss, a tensor without dimensions.

        Raises:
            ValueError: If the per-sample loss does not return one value per region.
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
        """Return the map from which all regions are pooled, in float32 (float64 stays float64)."""
        wide_BKHW = _wide(logit_map_BKHW)
        if self.pooling == "direct" or self.M == (1,):
            return wide_BKHW
        return F.adaptive_avg_pool2d(wide_BKHW, NESTED_SIDE)

    def _weights(self, teacher_map_BKHW: Tensor, teacher_BRK: Tensor, target_B: Tensor) -> Tensor:
        """Return the weight of each region, (B, R), from the teacher's logits (SDD Eq. 6 to 9)."""
        right_globally_B1 = (teacher_map_BKHW.mean((2, 3)).argmax(1) == target_B)[:, None]
        complementary_BR = (teacher_BRK.argmax(2) == target_B[:, None]) != right_globally_B1
        consistent, complementary = KNOWLEDGE[self.knowledge]
        weight_BR = teacher_BRK.new_full(complementary_BR.shape, consistent)
        return weight_BR.masked_fill(complementary_BR, complementary * self.complementary_weight)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
