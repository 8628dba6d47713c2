"""Scale decoupling and logit standardisation of a distillation loss.

`ScaleDecoupled` computes a scalar from two logit maps and a loss of single samples.

Shapes: B batch, K classes, H W map sides, R regions of all scales, N = B*R. Sources: SDD = Wei et
al. 2024, "Scale Decoupled Distillation" (CVPR 2024); LSKD = Sun et al. 2024, "Logit Standardization
in Knowledge Distillation" (CVPR 2024).
"""

import inspect
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "COMBINATIONS",
    "KNOWLEDGE",
    "POOLINGS",
    "REDUCTIONS",
    "STANDARDIZE",
    "PerSampleLoss",
    "ScaleDecoupled",
    "SeveralTeachers",
    "WrongShape",
    "check_scales",
    "compares_images",
    "confidence_weights",
    "region_logits",
    "standardize",
    "standardize_over_batch",
    "takes_label_sets",
]

PerSampleLoss = Callable[..., Tensor]
"""A loss (student_NK, teacher_NK, target_N, **options) -> loss_N, as in `sddlskd.losses`.

A loss that compares the images of a batch takes a further keyword, see `compares_images`.
"""

KNOWLEDGE = {"fusion": (1.0, 1.0), "consistent": (1.0, 0.0), "complementary": (0.0, 1.0)}
"""Which regions count: (factor of consistent regions, factor of complementary regions), by name.

The factors multiply the weights of the regions, see `ScaleDecoupled`. Source: SDD Table 6.
"""

STANDARDIZE: dict[str, bool | str] = {
    "none": False,
    "class": True,
    "batch": "batch",
    "class_scaled": "class_scaled",
}
"""Ways to standardise logits, see `ScaleDecoupled`, by name; False and True are other names."""

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

COMBINATIONS = ("logits", "losses", "confidence")
"""How several teachers are combined, see `SeveralTeachers`."""


def check_scales(M: Sequence[int]) -> tuple[int, ...]:
    """Return the scales `M` as a tuple, or raise ValueError if they are invalid.

    A scale m stands for the division of a map into m x m regions. `M` is valid if it is a list,
    tuple or other sequence with at least one entry, and if its entries are different integers of at
    least 1. Floats such as 2.0 and bools are invalid.
    """
    if not isinstance(M, Sequence) or isinstance(M, str) or not len(M):
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
    """Return the logits of all regions of a logit map, (B, R, K), with R the sum of m*m over `M`.

    A logit map (B, K, H, W) holds the logits of each cell, that is, of each position. A scale m in
    `M` divides the map into m x m regions by adaptive average pooling: the logits of a region are
    the mean over its cells (SDD Eq. 3 to 5). The regions are in the order of the scales in `M`, and
    row by row within a scale.

    If a side of the map is not a multiple of m, neighbouring regions overlap (7x7 at m=2), or the
    pooling repeats cells (2x2 at m=4 gives each cell four times).

    Raise ValueError unless `M` is a sequence of different integers of at least 1, see
    `check_scales`.
    """
    regions_BKm = [F.adaptive_avg_pool2d(logit_map_BKHW, m).flatten(2) for m in check_scales(M)]
    return torch.cat(regions_BKm, 2).transpose(1, 2)


def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Return (z - mean) / (eps + std) of logits z, with mean and std over the last dimension.

    The logits may have any shape (..., K), and the result has the same shape. The std is the
    unbiased one, with the divisor K - 1. For K = 1 the result is NaN. If the K logits are equal,
    the result is 0.

    Source: LSKD Eq. 13; `eps` and the unbiased std are those of LSKD's released code.
    """
    std, mean = torch.std_mean(logits, dim=-1, keepdim=True)
    return (logits - mean) / (eps + std)


def standardize_over_batch(logits_BRK: Tensor, eps: float = 1e-5) -> Tensor:
    """Return (z - mean) / sqrt(var + eps) of logits z, with mean and variance over the images.

    The logits (B, R, K) are those of R regions of B images. Each region and class has its own mean
    and variance. The variance is the biased one, with the divisor B, so a batch of one image gives
    zeros. The result has the shape of the logits.

    Source: LumiNet (TMLR 2025); `eps` and the biased variance are those of its released code.
    """
    var_1RK, mean_1RK = torch.var_mean(logits_BRK, dim=0, correction=0, keepdim=True)
    return (logits_BRK - mean_1RK) / (var_1RK + eps).sqrt()


def compares_images(loss: PerSampleLoss) -> bool:
    """Return whether a loss compares the images of a batch: has a parameter `regions_per_image`.

    `ScaleDecoupled` sets this parameter to R, the number of regions of an image: row b*R + r of the
    logits is region r of image b, and the loss must compare rows of the same region only. Return
    False for a callable that has no signature.
    """
    try:
        return "regions_per_image" in inspect.signature(loss).parameters
    except ValueError:  # some callables that are not written in Python have no signature
        return False


def takes_label_sets(loss: PerSampleLoss) -> bool:
    """Return whether a loss is for images with several labels: has a parameter `labels_NK`.

    The parameter stands in the place of `target_N` (class ids). It is 1 for the classes of a sample
    and 0 for all other classes, (N, K). Return False for a callable that has no signature.
    """
    try:
        return "labels_NK" in inspect.signature(loss).parameters
    except ValueError:  # some callables that are not written in Python have no signature
        return False


class WrongShape(ValueError):
    """Error for a per-sample loss that does not return one value per region."""


class ScaleDecoupled:
    """Distillation loss of a batch that compares the logit maps of two networks region by region.

    A logit map (B, K, H, W) holds the logits of each position; its mean over H and W is the logits
    of the image. An instance is called with the logit maps of student and teacher and the class ids
    (B,), and returns a scalar.

    `region_logits` gives the logits of R regions of each map, and `loss` gives a value for each
    region. A region is consistent if the teacher's predictions for the region and for the whole
    image are both right or both wrong. Otherwise the region is complementary. The two kinds have
    different weights. If images have several labels, all regions have weight 1.

    Args:
        loss: function (student_NK, teacher_NK, target_N) -> loss_N with one value for each of the N
            = B*R regions, for instance `functools.partial(kd, temperature=2.0)`. A keyword
            `regions_per_image` of the function is set to R, see `compares_images`.
        M: scales, different integers of at least 1. A scale m divides each map into m x m regions.
            Scale 1 has one region, the whole map.
        complementary_weight: weight of complementary regions (SDD's beta), not negative. Consistent
            regions have weight 1.
        standardize: how the logits of each region are standardised before `loss` reads them.
            "none" or False: not at all. "class" or True: over the classes (LSKD, see
            `standardize`). "batch": over the images (LumiNet, see `standardize_over_batch`).
            "class_scaled": as "class", and the loss of a region is multiplied by the variance of
            the teacher's logits over the classes (NormKD).
        knowledge: which regions count: "fusion" (all), "consistent" or "complementary". Other
            regions get weight 0.
        reduction: how the weighted losses of the regions become a scalar: "mean" (mean over all B*R
            regions) or "sum" (sum over the regions of an image, then mean over images).
        pooling: "direct" to pool every scale from the logit map, or "nested" to pool the map to 4x4
            first. With M=[1], both pool directly, as in SDD's code.

    Raises:
        ValueError: If `M` is not a sequence of different integers of at least 1, if
            `complementary_weight` is negative or NaN, if `knowledge` is not "fusion" although the
            loss is for images with several labels (`takes_label_sets`), or if `standardize`,
            `knowledge`, `reduction` or `pooling` is not one of the names above.
    """

    def __init__(
        self,
        loss: PerSampleLoss,
        M: Sequence[int],
        complementary_weight: float = 2.0,
        standardize: bool | str = False,
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
        if standardize not in {*STANDARDIZE, True, False}:
            raise ValueError(f"standardize={standardize!r} is not one of {', '.join(STANDARDIZE)}")
        if not complementary_weight >= 0:  # also true for NaN
            raise ValueError(f"complementary_weight={complementary_weight} must not be negative")
        if takes_label_sets(loss) and knowledge != "fusion":
            raise ValueError(
                f"knowledge={knowledge!r} needs one class per image; give 'fusion' for a loss of "
                "several labels"
            )
        self.loss = loss
        self.compares_images = compares_images(loss)
        self.M = check_scales(M)
        self.complementary_weight = complementary_weight
        self.standardize = STANDARDIZE.get(str(standardize), standardize)
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
            target_B: class ids, int64, (B,). For a loss of images with several labels
                (`takes_label_sets`), zeros and ones, (B, K).
            **options: keyword arguments that are passed on to the per-sample loss, such as a learnt
                `temperature`.

        Returns:
            The weighted and reduced loss, a scalar tensor.

        Raises:
            WrongShape: If the per-sample loss does not return one value per region.
        """
        with torch.autocast(student_map_BKHW.device.type, enabled=False):
            student_BRK = self.regions(student_map_BKHW)
            teacher_BRK, teacher_BK = self.regions_and_logits(teacher_map_BKHW)
            return self.compare(student_BRK, teacher_BRK, teacher_BK, target_B, **options)

    def regions(self, logit_map_BKHW: Tensor) -> Tensor:
        """Return the logits of all regions of a logit map, (B, R, K), in float32 or float64."""
        return region_logits(self._to_pool(logit_map_BKHW), self.M)

    def regions_and_logits(self, logit_map_BKHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the result of `regions`, and the logits (B, K) of the whole map."""
        logit_map_BKHW = self._to_pool(logit_map_BKHW)
        return region_logits(logit_map_BKHW, self.M), logit_map_BKHW.mean((2, 3))

    def compare(
        self,
        student_BRK: Tensor,
        teacher_BRK: Tensor,
        teacher_BK: Tensor,
        target_B: Tensor,
        *,
        image_weight_B: Tensor | None = None,
        **options: Tensor,
    ) -> Tensor:
        """Return the loss of a batch as a scalar, from the logits of the regions.

        Args:
            student_BRK: logits of the student's regions, (B, R, K), as `regions` returns them.
            teacher_BRK: logits of the teacher's regions, (B, R, K).
            teacher_BK: logits of the teacher's whole map, (B, K).
            target_B: class ids, int64, (B,). For images with several labels, zeros and ones,
                (B, K).
            image_weight_B: weight of each image, (B,), which multiplies the losses of all its
                regions; None for 1.
            **options: keyword arguments that are passed on to the per-sample loss.

        Returns:
            The weighted and reduced loss, a scalar tensor.

        Raises:
            WrongShape: If the per-sample loss does not return one value per region.
        """
        B, R, _ = student_BRK.shape
        weight_BR = self._weights(teacher_BK, teacher_BRK, target_B)
        if image_weight_B is not None:
            weight_BR = weight_BR * image_weight_B[:, None]
        if self.standardize == "class_scaled":
            weight_BR = weight_BR * teacher_BRK.std(2) ** 2
        if self.standardize == "batch":
            student_BRK = standardize_over_batch(student_BRK)
            teacher_BRK = standardize_over_batch(teacher_BRK)
        elif self.standardize:
            student_BRK, teacher_BRK = standardize(student_BRK), standardize(teacher_BRK)
        target_BR = target_B[:, None].expand(B, R, *target_B.shape[1:])
        loss_N = self.loss(
            student_BRK.flatten(0, 1),
            teacher_BRK.flatten(0, 1),
            target_BR.flatten(0, 1),
            **options,
            **({"regions_per_image": R} if self.compares_images else {}),
        )
        if not isinstance(loss_N, Tensor) or loss_N.shape != (B * R,):
            raise _not_one_value_per_region(loss_N, B * R)
        total = (weight_BR.flatten() * loss_N).sum()
        return total / (B * R if self.reduction == "mean" else B)

    def _to_pool(self, logit_map_BKHW: Tensor) -> Tensor:
        """Return the map from which all regions are pooled, in float32 (float64 stays float64)."""
        wide_BKHW = _wide(logit_map_BKHW)
        if self.pooling == "direct" or self.M == (1,):
            return wide_BKHW
        return F.adaptive_avg_pool2d(wide_BKHW, NESTED_SIDE)

    def _weights(self, teacher_BK: Tensor, teacher_BRK: Tensor, target_B: Tensor) -> Tensor:
        """Return the weight of each region, (B, R), from the teacher's logits (SDD Eq. 6 to 9).

        For images with several labels, no region is consistent or complementary: all weights are 1.
        """
        if target_B.ndim > 1:
            return teacher_BRK.new_ones(teacher_BRK.shape[:2])
        right_globally_B1 = (teacher_BK.argmax(1) == target_B)[:, None]
        complementary_BR = (teacher_BRK.argmax(2) == target_B[:, None]) != right_globally_B1
        consistent, complementary = KNOWLEDGE[self.knowledge]
        weight_BR = teacher_BRK.new_full(complementary_BR.shape, consistent)
        return weight_BR.masked_fill(complementary_BR, complementary * self.complementary_weight)


def confidence_weights(teachers_TBK: Tensor, target_B: Tensor) -> Tensor:
    """Return the weight of each of T teachers for each image, (T, B); the sum over T is 1.

    The weight is (1 - softmax_T(CE)) / (T - 1), with the cross-entropy CE of a teacher's prediction
    and the label. The better a teacher predicts the label of an image, the more the teacher counts
    for this image.

    Args:
        teachers_TBK: logits of T teachers for B images, without a temperature. T is at least 2.
        target_B: class ids, int64, (B,).

    Returns:
        The weights, not negative. Teachers with equal logits have equal weights.

    Source: CA-MKD (Zhang, Chen, Wang 2022, arXiv:2201.00007), section 2, the weights of the
    teachers' predictions.
    """
    T, B, _ = teachers_TBK.shape
    target_TB = target_B.expand(T, B)
    ce_TB = F.cross_entropy(teachers_TBK.transpose(1, 2), target_TB, reduction="none")
    return (1 - ce_TB.softmax(0)) / (T - 1)


class SeveralTeachers:
    """Distillation loss of a batch that compares a student with several teachers.

    An instance is called with the student's logit map, a list of the teachers' logit maps and the
    class ids (B,), and returns a scalar. The teachers' maps may have different sides: each map is
    pooled to its regions first, so the regions of all teachers can be mixed.

    Args:
        distill: the distillation loss with a single teacher.
        weights: weight of each teacher, not negative, with the sum 1. `combine` "confidence" does
            not read them.
        combine: how the teachers are combined:
            "logits": the logits of each region, and those of the whole map, are the weighted mean
            over the teachers, and the loss compares the student with this mixture. The softmax of
            the mean is the geometric mean of the teachers' predictions (Hinton et al. 2015).
            "losses": the loss is the weighted mean of the losses with each teacher. With the loss
            kd, its gradient is that of kd with the mean of the teachers' softened probabilities
            (You et al. 2017).
            "confidence": as "losses", with the weights of `confidence_weights` for each image
            (CA-MKD without its loss on features).

    Raises:
        ValueError: If `combine` is not one of these names.
    """

    def __init__(
        self, distill: ScaleDecoupled, weights: Sequence[float], combine: str = "logits"
    ) -> None:
        if combine not in COMBINATIONS:
            raise ValueError(f"combine={combine!r} is not one of {', '.join(COMBINATIONS)}")
        self.distill = distill
        self.weights = tuple(weights)
        self.combine = combine

    def __call__(
        self,
        student_map_BKHW: Tensor,
        teacher_maps: Sequence[Tensor],
        target_B: Tensor,
        **options: Tensor,
    ) -> Tensor:
        """Return the loss of a batch as a scalar.

        Args:
            student_map_BKHW: logit map of the student, (B, K, H, W).
            teacher_maps: logit map (B, K, H, W) of each teacher; H and W may differ.
            target_B: class ids, int64, (B,).
            **options: keyword arguments of the per-sample loss, such as a learnt `temperature`.

        Returns:
            The weighted and reduced loss, a scalar tensor, in float32 (float64 stays float64).

        Raises:
            WrongShape: If the per-sample loss does not return one value per region.
            ValueError: If there are not as many maps as weights.
        """
        with torch.autocast(student_map_BKHW.device.type, enabled=False):
            student_BRK = self.distill.regions(student_map_BKHW)
            teachers = [self.distill.regions_and_logits(map_BKHW) for map_BKHW in teacher_maps]
            weighted = list(zip(self.weights, teachers, strict=True))
            if self.combine == "logits":
                teacher_BRK = _sum([weight * regions_BRK for weight, (regions_BRK, _) in weighted])
                teacher_BK = _sum([weight * logits_BK for weight, (_, logits_BK) in weighted])
                return self.distill.compare(
                    student_BRK, teacher_BRK, teacher_BK, target_B, **options
                )
            if self.combine == "losses":
                return _sum(
                    [
                        weight * self.distill.compare(student_BRK, *teacher, target_B, **options)
                        for weight, teacher in weighted
                    ]
                )
            weight_TB = confidence_weights(
                torch.stack([logits_BK for _, logits_BK in teachers]), target_B
            )
            return _sum(
                [
                    self.distill.compare(
                        student_BRK, *teacher, target_B, image_weight_B=weight_B, **options
                    )
                    for weight_B, teacher in zip(weight_TB, teachers, strict=True)
                ]
            )


def _not_one_value_per_region(loss: object, regions: int) -> WrongShape:
    """Return the error for the result of a per-sample loss that is not of shape (`regions`,)."""
    returned = f"a {type(loss).__name__}"
    cure = "return a tensor"
    if isinstance(loss, Tensor):
        returned = f"shape {tuple(loss.shape)}"
        cure = "give its result the shape of target_N"
        if loss.ndim == 0:
            cure = (
                "do not take the mean over the batch: reduction='none' in losses of torch, then "
                "'return loss.mean(1)'"
            )
        elif loss.shape[0] == regions:
            cure = "end it with 'return loss.flatten(1).mean(1)'"
    return WrongShape(
        f"the loss returned {returned} for {regions} regions; it must return one value per region: "
        f"{cure}"
    )


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return sum(parts[1:], parts[0])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
