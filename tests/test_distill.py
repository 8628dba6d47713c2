"""Test the composer with numbers computed by hand, a slow second implementation and identities.

Shapes: B batch, K classes, H W map sides, R regions of all scales, N = B*R.
"""

import cmath
import itertools
import math
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sddlskd.distill import (
    KNOWLEDGE,
    REDUCTIONS,
    STANDARDIZE,
    ScaleDecoupled,
    WrongShape,
    region_logits,
    standardize,
)
from sddlskd.losses import dkd, kd, nkd
from tests.newer import NEWER

LOSSES = {
    "kd": partial(kd, temperature=2.0),
    "dkd": partial(dkd, alpha=1.0, beta=8.0, temperature=4.0),
    "nkd": partial(nkd, gamma=1.5, temperature=2.0),
    "nkd_released": partial(nkd, gamma=1.5, temperature=2.0, exclude_target=False),
    # A loss of a user
    "mse": lambda student_NK, teacher_NK, target_N: ((student_NK - teacher_NK) ** 2).mean(1),
}
SCALES = ([1], [1, 2], [1, 4], [1, 2, 4])
# tests/test_newer_losses.py has the identities of the newer losses.
ALL = {**LOSSES, **NEWER}
each_loss = pytest.mark.parametrize("loss", ALL.values(), ids=ALL.keys())
each_scales = pytest.mark.parametrize("M", SCALES, ids=str)
raw_and_standardized = pytest.mark.parametrize(
    "standardized", [False, True], ids=["raw", "standardized"]
)
some = settings(max_examples=20, deadline=None, derandomize=True, database=None)

Maps = tuple[Tensor, Tensor, Tensor]
"""(student_map_BKHW, teacher_map_BKHW, target_B)."""


def some_maps(
    student_sides: tuple[int, int],
    teacher_sides: tuple[int, int],
    B: int = 4,
    K: int = 4,
    seed: int = 0,
):
    """Return random maps in float64 with targets.

    Every second target is the teacher's global prediction, so that both kinds of regions occur.
    """
    generator = torch.Generator().manual_seed(seed)
    student_map = 2 * torch.randn(B, K, *student_sides, generator=generator, dtype=torch.float64)
    teacher_map = 2 * torch.randn(B, K, *teacher_sides, generator=generator, dtype=torch.float64)
    target_B = torch.randint(K, (B,), generator=generator)
    target_B[::2] = teacher_map.mean((2, 3)).argmax(1)[::2]
    return student_map, teacher_map, target_B


@st.composite
def maps(draw: st.DrawFn, K_min: int = 2) -> Maps:
    side = st.sampled_from([1, 2, 3, 4, 7, 8])
    sides = (draw(side), draw(side)), (draw(side), draw(side))
    return some_maps(
        *sides,
        B=draw(st.integers(1, 4)),
        K=draw(st.integers(K_min, 6)),
        seed=draw(st.integers(0, 2**31)),
    )


loss_names = st.sampled_from(sorted(LOSSES))
scales = st.lists(st.integers(1, 4), min_size=1, unique=True)


def close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=tolerance, atol=tolerance)


# Numbers computed by hand


def test_regions_by_hand():
    # Class 0 counts the 16 cells row by row; class 1 is -10 times class 0.
    count_HW = torch.arange(16.0).reshape(4, 4)
    logit_map = torch.stack((count_HW, -10 * count_HW))[None]
    # The mean of all cells, then the means of the blocks of 2 x 2 cells, row by row (the first is
    # (0 + 1 + 4 + 5) / 4 = 2.5), then the cells
    expected_R = torch.tensor([7.5, 2.5, 4.5, 10.5, 12.5, *range(16)])
    assert torch.equal(
        region_logits(logit_map, [1, 2, 4]), torch.stack((expected_R, -10 * expected_R), 1)[None]
    )
    # The regions come in the order of the scales.
    assert region_logits(logit_map, [4, 1])[0, :, 0].tolist() == [*range(16), 7.5]


def test_regions_overlap_if_the_side_is_not_a_multiple_of_the_scale():
    logit_map = torch.arange(49.0, dtype=torch.float64).reshape(1, 1, 7, 7)
    # A side of 7 at m=2 is divided into 0 to 3 and 3 to 6, so the middle row and column count in
    # both halves.
    assert region_logits(logit_map, [2])[0, :, 0].tolist() == [
        1.5 * 8,
        1.5 * 8 + 3,
        4.5 * 7 + 1.5,
        4.5 * 8,
    ]
    assert region_logits(logit_map, [7])[0, :, 0].tolist() == list(range(49))


def test_cells_repeat_if_the_scale_is_larger_than_the_side():
    logit_map = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    expected = [1, 1, 2, 2, 1, 1, 2, 2, 3, 3, 4, 4, 3, 3, 4, 4]
    assert region_logits(logit_map, [4])[0, :, 0].tolist() == expected


def test_standardize_by_hand():
    # LSKD: (z - mean) / (eps + std), here with mean 3 and unbiased variance (4 + 1 + 0 + 9) / 3
    std = math.sqrt(14 / 3)
    z = torch.tensor([[1.0, 2.0, 3.0, 6.0]], dtype=torch.float64)
    close(standardize(z), torch.tensor([[-2.0, -1.0, 0.0, 3.0]]).double() / (1e-7 + std), 1e-15)
    # For logits a million times smaller, eps matters: it is 5 % of the std.
    close(standardize(1e-6 * z)[0, 3], 3e-6 / (1e-7 + 1e-6 * std), 1e-11)
    # Mean and std are over the classes only.
    assert torch.equal(
        standardize(torch.stack((z, 5 * z))), torch.stack((standardize(z), standardize(5 * z)))
    )


def confident(winners: list[int], K: int = 3) -> Tensor:
    """Return a map of 2 x 2 cells; row by row, each has logit 3 for its winner and else 0."""
    return 3 * F.one_hot(torch.tensor(winners), K).T.reshape(K, 2, 2).double()


# Image A, target 0: the mean logits are (9, 3, 0) / 4, so the global prediction 0 is right. Cells 0
#   to 2 are right as well (consistent). Cell 3 predicts 1, which is wrong (complementary).
# Image B, target 2: the mean logits are (6, 3, 3) / 4, so the global prediction 0 is wrong. Cells
#   0, 1 and 3 are wrong as well (consistent), although cell 1 predicts another class. Cell 2 is
#   right (complementary).
TEACHER_2322 = torch.stack((confident([0, 0, 0, 1]), confident([0, 1, 2, 0])))
TARGET_2 = torch.tensor([0, 2])
# Class 0 of the student has, for M=[1,2], the regions 2.5, 1, 2, 3, 4 for A and 6.5, 5, 6, 7, 8
# for B.
STUDENT_2322 = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
STUDENT_2322[:, 0] = torch.arange(1.0, 9.0).reshape(2, 2, 2)
CONSISTENT, COMPLEMENTARY = (2.5 + 1 + 2 + 3) + (6.5 + 5 + 6 + 8), 4 + 7


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # The mean over B*R = 2 * 5 regions, with beta 2
        ({}, (CONSISTENT + 2 * COMPLEMENTARY) / 10),
        ({"complementary_weight": 1.0}, (CONSISTENT + COMPLEMENTARY) / 10),
        ({"complementary_weight": 0.1}, (CONSISTENT + 0.1 * COMPLEMENTARY) / 10),
        ({"complementary_weight": 0.0}, CONSISTENT / 10),
        ({"knowledge": "consistent"}, CONSISTENT / 10),
        ({"knowledge": "complementary"}, 2 * COMPLEMENTARY / 10),
        ({"knowledge": "complementary", "complementary_weight": 5.0}, 5 * COMPLEMENTARY / 10),
        # SDD Eq. 9: the sum over the regions, then the mean over B = 2 images
        ({"reduction": "sum"}, (CONSISTENT + 2 * COMPLEMENTARY) / 2),
        ({"reduction": "sum", "knowledge": "complementary"}, 2 * COMPLEMENTARY / 2),
    ],
    ids=str,
)
def test_regions_are_weighed_by_hand(options, expected: float):
    composer = ScaleDecoupled(
        lambda student_NK, teacher_NK, target_N: student_NK[:, 0], [1, 2], **options
    )
    close(composer(STUDENT_2322, TEACHER_2322, TARGET_2), expected)


def test_the_global_prediction_needs_no_scale_of_one():
    # Without m=1 in M, each cell is of the same kind as before.
    composer = ScaleDecoupled(lambda student_NK, teacher_NK, target_N: student_NK[:, 0], [2])
    close(
        composer(STUDENT_2322, TEACHER_2322, TARGET_2), (1 + 2 + 3 + 2 * 4 + 5 + 6 + 2 * 7 + 8) / 8
    )


def kl_by_hand(teacher_z: list[float], student_z: list[float], T: float) -> float:
    """Return sum_k p_k ln(p_k / q_k), where p and q are the softmax of z / T."""
    p, q = [
        [math.exp(z / T) / sum(math.exp(y / T) for y in zs) for z in zs]
        for zs in (teacher_z, student_z)
    ]
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_scale_decoupled_kd_by_hand():
    T = 2.0
    image_a = (
        kl_by_hand([9 / 4, 3 / 4, 0], [2.5, 0, 0], T)
        + kl_by_hand([3, 0, 0], [1, 0, 0], T)
        + kl_by_hand([3, 0, 0], [2, 0, 0], T)
        + kl_by_hand([3, 0, 0], [3, 0, 0], T)
        + 2 * kl_by_hand([0, 3, 0], [4, 0, 0], T)
    )
    image_b = (
        kl_by_hand([6 / 4, 3 / 4, 3 / 4], [6.5, 0, 0], T)
        + kl_by_hand([3, 0, 0], [5, 0, 0], T)
        + kl_by_hand([0, 3, 0], [6, 0, 0], T)
        + 2 * kl_by_hand([0, 0, 3], [7, 0, 0], T)
        + kl_by_hand([3, 0, 0], [8, 0, 0], T)
    )
    composer = ScaleDecoupled(partial(kd, temperature=T), [1, 2])
    close(composer(STUDENT_2322, TEACHER_2322, TARGET_2), T**2 * (image_a + image_b) / 10)


def test_logits_are_pooled_then_standardized_then_divided_by_the_temperature_by_hand():
    # Three cells are zero and one is four times the mean of the map. The student's mean is
    # (1, 2, 3), standardised (-1, 0, 1). The teacher's mean is (6, 2, 4), standardised (1, -1, 0).
    student_map, teacher_map = torch.zeros(2, 1, 3, 2, 2, dtype=torch.float64)
    student_map[0, :, 1, 1] = torch.tensor([4.0, 8.0, 12.0])
    teacher_map[0, :, 0, 1] = torch.tensor([24.0, 8.0, 16.0])
    shrink = 1 + 1e-7  # eps + std, where the std of (1, 2, 3) is 1
    expected = 4 * kl_by_hand(
        [1 / (1 + 0.5e-7), -1 / (1 + 0.5e-7), 0], [-1 / shrink, 0, 1 / shrink], 2.0
    )
    composer = ScaleDecoupled(partial(kd, temperature=2.0), [1], standardize=True)
    close(composer(student_map, teacher_map, torch.tensor([0])), expected)


# A slow second implementation ("oracle"), written from the papers
#
# It loops over images, scales, regions and classes and uses no code of the library. The student's
# map may be complex: the product of the gradient with v is then the imaginary part of
# f(s + i h v) / h, without rounding errors.


def oracle_regions(map_KHW: np.ndarray, M: list[int]) -> list[list[complex]]:
    K, H, W = map_KHW.shape
    regions = []
    for m in M:
        for row, column in itertools.product(range(m), range(m)):
            # The first row is rounded down, the end is rounded up.
            rows = range(row * H // m, -(-(row + 1) * H // m))
            columns = range(column * W // m, -(-(column + 1) * W // m))
            cells = list(itertools.product(rows, columns))
            regions.append([sum(map_KHW[k, i, j] for i, j in cells) / len(cells) for k in range(K)])
    return regions


def oracle_standardize(z: list[complex]) -> list[complex]:
    mean = sum(z) / len(z)
    std = cmath.sqrt(sum((x - mean) ** 2 for x in z) / (len(z) - 1))
    return [(x - mean) / (1e-7 + std) for x in z]


def oracle_softmax(z: list[complex], T: float) -> list[complex]:
    powers = [cmath.exp(x / T) for x in z]
    return [x / sum(powers) for x in powers]


def oracle_without(p: list[complex], target: int) -> list[complex]:
    others = [p[k] for k in range(len(p)) if k != target]
    return [x / sum(others) for x in others]


def oracle_kl(p: list[complex], q: list[complex]) -> complex:
    return sum(a * cmath.log(a / b) for a, b in zip(p, q, strict=True))


def oracle_cross_entropy(p: list[complex], q: list[complex]) -> complex:
    return -sum(a * cmath.log(b) for a, b in zip(p, q, strict=True))


def oracle_kd(s, t, target: int) -> complex:
    return 4 * oracle_kl(oracle_softmax(t, 2.0), oracle_softmax(s, 2.0))


def oracle_dkd(s, t, target: int) -> complex:
    q, p = oracle_softmax(s, 4.0), oracle_softmax(t, 4.0)
    tckd = oracle_kl([p[target], 1 - p[target]], [q[target], 1 - q[target]])
    return 16 * (tckd + 8 * oracle_kl(oracle_without(p, target), oracle_without(q, target)))


def oracle_nkd(s, t, target: int) -> complex:
    target_term = -oracle_softmax(t, 1.0)[target] * cmath.log(oracle_softmax(s, 1.0)[target])
    p, q = (oracle_without(oracle_softmax(z, 2.0), target) for z in (t, s))
    return target_term + 1.5 * 4 * oracle_cross_entropy(p, q)


def oracle_nkd_released(s, t, target: int) -> complex:
    target_term = -oracle_softmax(t, 1.0)[target] * cmath.log(oracle_softmax(s, 1.0)[target])
    return target_term + 1.5 * 4 * oracle_cross_entropy(
        oracle_softmax(t, 2.0), oracle_softmax(s, 2.0)
    )


def oracle_mse(s, t, target: int) -> complex:
    return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)


ORACLES = {
    "kd": oracle_kd,
    "dkd": oracle_dkd,
    "nkd": oracle_nkd,
    "nkd_released": oracle_nkd_released,
    "mse": oracle_mse,
}


def oracle(name, student_map, teacher_map, target_B, M, beta, standardized, knowledge, reduction):
    """Return the loss and the number of regions of each kind."""
    total, kinds = 0j, {"consistent": 0, "complementary": 0}
    for student_KHW, teacher_KHW, target in zip(student_map, teacher_map, target_B, strict=True):
        right_globally = int(np.argmax(teacher_KHW.mean((1, 2)))) == target
        for s, t in zip(
            oracle_regions(student_KHW, M), oracle_regions(teacher_KHW, M), strict=True
        ):
            right_here = int(np.argmax(t)) == target
            kind = "consistent" if right_here == right_globally else "complementary"
            kinds[kind] += 1
            if knowledge in ("fusion", kind):
                if standardized:
                    s, t = oracle_standardize(s), oracle_standardize(t)
                total += (beta if kind == "complementary" else 1.0) * ORACLES[name](s, t, target)
    return total / (sum(kinds.values()) if reduction == "mean" else len(target_B)), kinds


def check_against_oracle(
    name: str, batch: Maps, M, beta=2.0, standardized=False, knowledge="fusion", reduction="mean"
) -> dict[str, int]:
    student_map, teacher_map, target_B = batch
    leaf = student_map.clone().requires_grad_()
    composer = ScaleDecoupled(LOSSES[name], M, beta, standardized, knowledge, reduction)
    loss = composer(leaf, teacher_map, target_B)
    loss.backward()
    direction = np.random.default_rng(0).standard_normal(student_map.shape)
    expected, kinds = oracle(
        name, student_map.numpy() + 1e-30j * direction, teacher_map.numpy(), target_B.tolist(),
        M, beta, standardized, knowledge, reduction,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.real, rel=1e-12, abs=1e-14)
    assert float((leaf.grad.numpy() * direction).sum()) == pytest.approx(
        expected.imag / 1e-30, rel=1e-8, abs=1e-10
    )
    return kinds


@pytest.mark.parametrize("name", ["kd", "dkd", "nkd", "nkd_released"])
@each_scales
@raw_and_standardized
def test_against_the_oracle(name: str, M: list[int], standardized: bool):
    seen = {"consistent": 0, "complementary": 0}
    for seed, (student_side, teacher_side) in enumerate(itertools.product((8, 4, 2), repeat=2)):
        batch = some_maps((student_side,) * 2, (teacher_side,) * 2, B=2, seed=seed)
        for kind, count in check_against_oracle(name, batch, M, standardized=standardized).items():
            seen[kind] += count
    assert seen["consistent"] > 0
    # The global region is always consistent.
    assert (seen["complementary"] > 0) == (M != [1])


@pytest.mark.parametrize("knowledge", KNOWLEDGE)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0, 3.7])
def test_options_against_the_oracle(knowledge: str, reduction: str, beta: float):
    # Odd, unequal and tiny sides; scales without 1 and not in ascending order
    for seed, sides in enumerate(
        [((7, 7), (4, 4)), ((2, 3), (5, 7)), ((1, 1), (3, 3)), ((3, 3), (1, 1))]
    ):
        for name, M in (("kd", [2]), ("mse", [3, 1])):
            check_against_oracle(
                name, some_maps(*sides, seed=seed), M, beta, False, knowledge, reduction
            )


# Identities


@some
@given(maps(), loss_names, st.sampled_from(sorted(REDUCTIONS)), st.floats(0, 10))
def test_scale_one_is_the_plain_loss(batch: Maps, name: str, reduction: str, weight: float):
    student_map, teacher_map, target_B = batch
    plain_B = LOSSES[name](student_map.mean((2, 3)), teacher_map.mean((2, 3)), target_B)
    close(
        ScaleDecoupled(LOSSES[name], [1], weight, reduction=reduction)(*batch),
        plain_B.mean(),
        1e-10,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_global_region_is_consistent_even_if_two_classes_are_close(
    dtype: torch.dtype, layout: torch.memory_format
):
    # If two classes are almost equal, pooling to 1 x 1 and the mean of the map must still agree.
    generator = torch.Generator().manual_seed(0)
    for side in (2, 3, 4, 7, 8):
        base = torch.randn(256, 1, side, side, generator=generator)
        teacher_map = (base + 1e-7 * torch.randn(256, 10, side, side, generator=generator)).to(
            dtype
        )
        teacher_map = teacher_map.contiguous(memory_format=layout)
        target_B = torch.randint(10, (256,), generator=generator)
        composer = ScaleDecoupled(LOSSES["mse"], [1], knowledge="complementary")
        assert (
            composer(torch.randn(256, 10, side, side, generator=generator), teacher_map, target_B)
            == 0
        )


@some
@given(maps(), loss_names, scales)
def test_weight_one_is_the_mean_over_regions(batch: Maps, name: str, M: list[int]):
    student_map, teacher_map, target_B = batch
    student_BRK, teacher_BRK = region_logits(student_map, M), region_logits(teacher_map, M)
    R = sum(m * m for m in M)
    by_region = torch.stack(
        [LOSSES[name](student_BRK[:, r], teacher_BRK[:, r], target_B).mean() for r in range(R)]
    )
    close(ScaleDecoupled(LOSSES[name], M, 1.0)(*batch), by_region.mean(), 1e-10)


@some
@given(maps(), st.integers(1, 4))
def test_equal_regions_average_to_the_global_logits(batch: Maps, m: int):
    logit_map = F.interpolate(batch[0], scale_factor=m)  # sides that are multiples of m
    close(region_logits(logit_map, [m]).mean(1), logit_map.mean((2, 3)))


@some
@given(maps(), scales)
def test_regions_of_several_scales_are_those_of_each(batch: Maps, M: list[int]):
    apart_BRK = torch.cat([region_logits(batch[0], [m]) for m in M], 1)
    assert torch.equal(region_logits(batch[0], M), apart_BRK)
    assert torch.equal(region_logits(batch[0], tuple(M)), apart_BRK)


@some
@given(maps(), loss_names, scales, st.booleans(), st.randoms(use_true_random=False))
def test_scales_have_no_order(batch: Maps, name: str, M: list[int], standardized: bool, random):
    shuffled = random.sample(M, len(M))
    options = {"standardize": standardized, "complementary_weight": 3.0}
    close(
        ScaleDecoupled(LOSSES[name], shuffled, **options)(*batch),
        ScaleDecoupled(LOSSES[name], M, **options)(*batch), 1e-10,
    )  # fmt: skip


@some
@given(
    maps(), loss_names, scales, st.booleans(), st.sampled_from(sorted(REDUCTIONS)), st.floats(0, 10)
)
def test_consistent_and_complementary_sum_to_fusion(
    batch: Maps, name: str, M: list[int], standardized: bool, reduction: str, weight: float
):
    parts = {
        knowledge: ScaleDecoupled(LOSSES[name], M, weight, standardized, knowledge, reduction)(
            *batch
        )
        for knowledge in KNOWLEDGE
    }
    close(parts["consistent"] + parts["complementary"], parts["fusion"], 1e-10)
    unweighted = ScaleDecoupled(LOSSES[name], M, 1.0, standardized, "complementary", reduction)(
        *batch
    )
    close(parts["complementary"], weight * unweighted, 1e-10)


@some
@given(maps(), loss_names, scales)
def test_sum_is_mean_times_regions(batch: Maps, name: str, M: list[int]):
    mean = ScaleDecoupled(LOSSES[name], M, 3.0)(*batch)
    close(
        ScaleDecoupled(LOSSES[name], M, 3.0, reduction="sum")(*batch),
        sum(m * m for m in M) * mean,
        1e-10,
    )


@some
@given(maps(K_min=3), st.floats(0.5, 100), st.floats(-100, 100))
def test_standardize_ignores_scale_and_shift(batch: Maps, a: float, b: float):
    z = batch[0].movedim(1, -1)
    close(standardize(a * z + b, eps=0.0), standardize(z, eps=0.0), 1e-9)
    close(standardize(a * z + b), standardize(z), 1e-4)  # eps causes a small difference
    close(standardize(z, eps=0.0).mean(-1), 0.0)
    close(standardize(z, eps=0.0).std(-1), 1.0)


@some
@given(maps(K_min=3), loss_names, scales, st.floats(0.5, 20), st.floats(-20, 20))
def test_standardized_distillation_ignores_scale_and_shift(
    batch: Maps, name: str, M: list[int], a: float, b: float
):
    student_map, teacher_map, target_B = batch
    composer = ScaleDecoupled(LOSSES[name], M, 3.0, standardize=True)
    close(composer(a * student_map + b, teacher_map / a - b, target_B), composer(*batch), 1e-4)
    # Without standardisation the scale matters, which shows that the option has an effect.
    if name != "mse":
        raw = ScaleDecoupled(LOSSES[name], M, 3.0)
        assert abs(raw(20 * student_map, teacher_map, target_B) - raw(*batch)) > 1e-3


@some
@given(maps(), loss_names, scales, st.booleans(), st.floats(-50, 50), st.floats(-50, 50))
def test_a_shift_of_the_logits_changes_nothing(
    batch: Maps,
    name: str,
    M: list[int],
    standardized: bool,
    student_shift: float,
    teacher_shift: float,
):
    student_map, teacher_map, target_B = batch
    if name == "mse" and not standardized:
        student_shift = teacher_shift
    composer = ScaleDecoupled(LOSSES[name], M, 3.0, standardized)
    close(
        composer(student_map + student_shift, teacher_map + teacher_shift, target_B),
        composer(*batch),
        1e-6,
    )


@some
@given(maps(), loss_names, scales, st.booleans(), st.randoms(use_true_random=False))
def test_classes_and_images_have_no_order(
    batch: Maps, name: str, M: list[int], standardized: bool, random
):
    student_map, teacher_map, target_B = batch
    B, K = student_map.shape[:2]
    images_B, classes_K = (torch.tensor(random.sample(range(n), n)) for n in (B, K))
    composer = ScaleDecoupled(LOSSES[name], M, 3.0, standardized)
    of_images = composer(student_map[images_B], teacher_map[images_B], target_B[images_B])
    close(of_images, composer(*batch), 1e-9)
    of_classes = composer(
        student_map[:, classes_K], teacher_map[:, classes_K], classes_K.argsort()[target_B]
    )
    close(of_classes, composer(*batch), 1e-9)


@some
@given(maps(), scales, st.booleans())
def test_kd_is_zero_for_equal_maps_and_positive_otherwise(
    batch: Maps, M: list[int], standardized: bool
):
    _, teacher_map, target_B = batch
    composer = ScaleDecoupled(LOSSES["kd"], M, standardize=standardized)
    assert composer(teacher_map, teacher_map, target_B) == 0
    assert composer(*batch) >= -1e-12


@some
@given(maps(), scales, st.floats(0, 10))
def test_any_callable_composes(batch: Maps, M: list[int], weight: float):
    student_map, teacher_map, target_B = batch
    B, R, K = len(target_B), sum(m * m for m in M), student_map.shape[1]
    seen = []

    def loss(*arguments: Tensor) -> Tensor:
        seen.extend(arguments)
        return F.mse_loss(*arguments[:2], reduction="none").mean(1)

    expected = F.mse_loss(region_logits(student_map, M), region_logits(teacher_map, M))
    close(ScaleDecoupled(loss, M, 1.0)(*batch), expected, 1e-10)
    assert [tuple(argument.shape) for argument in seen] == [(B * R, K), (B * R, K), (B * R,)]
    # Each row has the target of its image.
    assert torch.equal(seen[2].reshape(B, R), target_B[:, None].expand(B, R))
    assert torch.equal(seen[0].reshape(B, R, K), region_logits(student_map, M))
    constant = ScaleDecoupled(lambda s, t, y: torch.ones(B * R), M, weight)(*batch)
    assert 0 <= constant <= max(1.0, weight) + 1e-6


# Numerics


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@each_loss
@raw_and_standardized
def test_a_non_finite_logit_is_never_hidden(loss, side: int, value: float, standardized: bool):
    for (cell, knowledge), weight in itertools.product(
        [((0, 1, 0, 0), "fusion"), ((3, 0, 2, 1), "consistent"), ((1, 2, 1, 2), "complementary")],
        (0.0, 2.0),
    ):
        batch = some_maps((3, 3), (3, 3))
        batch[side][cell] = value
        composer = ScaleDecoupled(loss, [1, 2], weight, standardized, knowledge)
        assert not composer(*batch).isfinite(), (cell, knowledge, weight)


@pytest.mark.parametrize("name", LOSSES)
@raw_and_standardized
def test_minus_infinity_is_never_a_zero(name: str, standardized: bool):
    for side, k in itertools.product((0, 1), range(4)):
        batch = some_maps((3, 3), (3, 3))
        batch[side][1, k, 0, 0] = -math.inf
        value = ScaleDecoupled(LOSSES[name], [1, 2], standardize=standardized)(*batch)
        assert value != 0
        # If the teacher excludes a class, its term 0 log q of nkd is 0, and the sum stays finite.
        assert not value.isfinite() or (side == 1 and name.startswith("nkd") and not standardized)


@each_loss
@raw_and_standardized
def test_gradients(loss, standardized: bool):
    student_map, teacher_map, target_B = some_maps((3, 2), (2, 2), B=2, K=3)
    composer = ScaleDecoupled(loss, [1, 2], standardize=standardized)
    assert torch.autograd.gradcheck(
        lambda s: composer(s, teacher_map, target_B), student_map.requires_grad_()
    )


@each_loss
@raw_and_standardized
def test_a_teacher_map_of_inference_mode_serves(loss, standardized: bool):
    for M, side in (([1], 1), ([1, 2, 4], 4)):
        student_map, teacher_map, target_B = some_maps((4, 4), (side, side))
        with torch.inference_mode():
            inferred_map = teacher_map + 0
        assert inferred_map.is_inference()
        composer = ScaleDecoupled(loss, M, standardize=standardized)
        (gradient,) = torch.autograd.grad(
            composer(student_map.requires_grad_(), inferred_map, target_B), student_map
        )
        (expected,) = torch.autograd.grad(composer(student_map, teacher_map, target_B), student_map)
        assert torch.equal(gradient, expected)
        assert gradient.abs().sum() > 0


@each_loss
@raw_and_standardized
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_maps_are_computed_in_float32(loss, standardized: bool, dtype: torch.dtype):
    student_map, teacher_map, target_B = some_maps((8, 8), (4, 4), B=8, K=20)
    student_map, teacher_map = student_map.to(dtype), teacher_map.to(dtype)
    autocast = []

    def watched(*arguments: Tensor) -> Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        assert arguments[0].dtype == arguments[1].dtype == torch.float32
        return loss(*arguments)

    composer = ScaleDecoupled(watched, [1, 2, 4], standardize=standardized)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        leaf = student_map.clone().requires_grad_()
        value = composer(leaf, teacher_map, target_B)
    value.backward()
    assert value.dtype == torch.float32
    wide = student_map.float().requires_grad_()
    expected = composer(wide, teacher_map.float(), target_B)
    expected.backward()
    assert torch.equal(value, expected)
    assert leaf.grad.dtype == dtype
    assert torch.equal(leaf.grad, wide.grad.to(dtype))
    assert autocast == [False, False]


@each_loss
def test_float64_maps_are_computed_in_float64(loss):
    student_map, teacher_map, target_B = some_maps((4, 4), (4, 4))
    assert (
        ScaleDecoupled(loss, [1, 2], 0.1)(student_map, teacher_map, target_B).dtype == torch.float64
    )
    assert (
        ScaleDecoupled(loss, [1, 2])(student_map.float(), teacher_map.float(), target_B).dtype
        == torch.float32
    )


@each_loss
@raw_and_standardized
@pytest.mark.parametrize("K", [2, 5])
def test_extreme_and_constant_logits_stay_finite(loss, standardized: bool, K: int):
    student_map, teacher_map, target_B = some_maps((4, 4), (4, 4), K=K)
    extreme = (1e4 * student_map.sign()).float(), (1e4 * teacher_map.sign()).float(), target_B
    # The logits of a head that is initialised with zeros all have the same value.
    constant = torch.zeros(4, K, 4, 4), teacher_map.float(), target_B
    for student_map, teacher_map, _ in (extreme, constant, (constant[1], constant[0], target_B)):
        leaf = student_map.clone().requires_grad_()
        value = ScaleDecoupled(loss, [1, 2, 4], standardize=standardized)(
            leaf, teacher_map, target_B
        )
        value.backward()
        assert value.isfinite()
        assert leaf.grad.isfinite().all()


# Speed and compilation


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@each_loss
@raw_and_standardized
def test_no_loop_over_images_classes_or_regions(loss, standardized: bool):
    def operations(M: list[int], B: int, K: int) -> int:
        batch = some_maps((4, 4), (4, 4), B=B, K=K)
        with CountOperations() as counter:
            ScaleDecoupled(loss, M, standardize=standardized)(*batch)
        return counter.count

    assert 10 < operations([1, 2], 2, 3) == operations([1, 2], 32, 3) == operations([1, 2], 2, 17)
    assert operations([1, 2], 2, 3) == operations([1, 4], 2, 3) == operations([3, 1], 2, 3)
    assert operations([1, 2], 2, 3) < operations([1, 2, 4], 2, 3)  # there is a loop over scales


@each_loss
@each_scales
@raw_and_standardized
def test_no_value_is_read_back_to_the_host(loss, M: list[int], standardized: bool):
    # Fake tensors have no values, so .item(), bool(), tolist() and x[mask] raise.
    with FakeTensorMode():
        student_map, teacher_map = torch.randn(2, 8, 5, 4, 4).unbind()
        target_B = torch.randint(5, (8,))
        composer = ScaleDecoupled(loss, M, standardize=standardized)
        value = composer(student_map.requires_grad_(), teacher_map, target_B)
        value.backward()
    assert value.shape == ()
    assert student_map.grad.shape == student_map.shape


@pytest.mark.parametrize("name", ["kd", "dkd", "nkd", "rld", "dist", "skd"])
def test_the_composer_compiles_without_a_break(name: str):
    torch._dynamo.reset()
    student_map, teacher_map, target_B = some_maps((4, 4), (8, 8))
    composer = ScaleDecoupled(ALL[name], [1, 2, 4], standardize=True)
    compiled = torch.compile(lambda *batch: composer(*batch), backend="eager", fullgraph=True)
    value = compiled(student_map.requires_grad_(), teacher_map, target_B)
    expected = composer(student_map, teacher_map, target_B)
    assert torch.equal(value, expected)
    gradients = [torch.autograd.grad(x, student_map)[0] for x in (value, expected)]
    assert torch.equal(*gradients)


# Errors


@pytest.mark.parametrize(
    ("M", "named"),
    [
        ([], r"M=\[\]"),
        ("[1,2]", r"M='\[1,2\]'"),
        ([0], r"M=\[0\] holds 0"),
        ([1, -2], r"M=\[1, -2\] holds -2"),
        ([1.5], r"M=\[1\.5\] holds 1\.5"),
        ([1, 2.0], r"M=\[1, 2\.0\] holds 2\.0"),
        ([True], r"M=\[True\] holds True"),
        (["1"], r"M=\['1'\] holds '1'"),
    ],
    ids=str,
)
def test_scales_must_be_positive_integers(M, named: str):
    message = named + r".*distinct positive integers such as M=\[1,2,4\]"
    with pytest.raises(ValueError, match=message):
        ScaleDecoupled(LOSSES["kd"], M)
    with pytest.raises(ValueError, match=message):
        region_logits(torch.zeros(1, 2, 4, 4), M)


@pytest.mark.parametrize("M", [[1, 1], [2, 1, 2]], ids=str)
def test_scales_must_be_distinct(M: list[int]):
    with pytest.raises(ValueError, match=r"twice.*such as M=\[1") as raised:
        ScaleDecoupled(LOSSES["kd"], M)
    assert str(M) in str(raised.value)


def test_options_must_be_known():
    with pytest.raises(
        ValueError, match="knowledge='both' is not one of fusion, consistent, complementary"
    ):
        ScaleDecoupled(LOSSES["kd"], [1], knowledge="both")
    with pytest.raises(ValueError, match="reduction='none' is not one of mean, sum"):
        ScaleDecoupled(LOSSES["kd"], [1], reduction="none")


@pytest.mark.parametrize("weight", [-0.5, -math.inf, math.nan])
def test_the_weight_must_not_be_negative(weight: float):
    with pytest.raises(ValueError, match=f"complementary_weight={weight} must not be negative"):
        ScaleDecoupled(LOSSES["kd"], [1], complementary_weight=weight)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda s, t, y: F.mse_loss(s, t),
         "shape () for 10 regions; it must return one value per region: do not take the mean over "
         "the batch: reduction='none' in losses of torch, then 'return loss.mean(1)'"),
        (lambda s, t, y: (s - t) ** 2,
         "shape (10, 3) for 10 regions; it must return one value per region: end it with "
         "'return loss.flatten(1).mean(1)'"),
        (lambda s, t, y: (s - t).mean(0),
         "shape (3,) for 10 regions; it must return one value per region: give its result the "
         "shape of target_N"),
        (lambda s, t, y: 0.5,
         "a float for 10 regions; it must return one value per region: return a tensor"),
    ],
)  # fmt: skip
def test_a_loss_without_one_value_per_region_is_refused(loss: Any, said: str):
    composed = ScaleDecoupled(loss, [1, 2])
    with pytest.raises(WrongShape, match=f"^{re.escape(f'the loss returned {said}')}$"):
        composed(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0, 1]))


def test_scales_must_be_a_list():
    with pytest.raises(ValueError, match="M=4 is not a list"):
        ScaleDecoupled(lambda s, t, y: s.sum(1), 4)


# Ways to standardise


def drawn_maps(B: int = 6, K: int = 5, side: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student, teacher = (
        3 * torch.randn(B, K, side, side, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    return student, teacher, torch.arange(B) % K


def test_batch_standardised_kd_is_luminet() -> None:
    student, teacher, target = drawn_maps()
    loss = ScaleDecoupled(partial(kd, temperature=4.0), [1], standardize="batch")
    rows = []
    for map_BKHW in (student, teacher):
        z = map_BKHW.mean((2, 3))
        rows.append((z - z.mean(0)) / torch.sqrt(z.var(0, unbiased=False) + 1e-5))
    own, other = ((z / 4).log_softmax(1) for z in rows)
    alpha = 33.0
    theirs = alpha**2 * (other.exp() * (other - own)).sum(1).mean()
    ours = alpha**2 / 4**2 * loss(student, teacher, target)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)


def test_scaled_standardised_kd_is_normkd() -> None:
    student, teacher, target = drawn_maps()
    loss = ScaleDecoupled(partial(kd, temperature=2.0), [1], standardize="class_scaled")
    z_s, z_t = student.mean((2, 3)), teacher.mean((2, 3))
    T_s, T_t = (2.0 * z.std(1, keepdim=True) for z in (z_s, z_t))
    own, other = (z_s / T_s).log_softmax(1), (z_t / T_t).log_softmax(1)
    theirs = ((other.exp() * (other - own)).sum(1, keepdim=True) * T_t**2).mean()
    # LSKD adds 1e-7 to the deviation, and NormKD does not.
    assert loss(student, teacher, target).item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("way", STANDARDIZE)
@pytest.mark.parametrize("M", [[1], [1, 2], [1, 2, 4]])
def test_every_way_to_standardise_is_finite_at_every_scale(way: str, M: list[int]) -> None:
    for size in (6, 1):
        student, teacher, target = drawn_maps(size)
        student.requires_grad_()
        value = ScaleDecoupled(partial(kd, temperature=2.0), M, standardize=way)(
            student, teacher, target
        )
        value.backward()
        assert value.isfinite()
        assert student.grad is not None
        assert student.grad.isfinite().all()


def test_true_and_false_are_other_names_of_class_and_none() -> None:
    student, teacher, target = drawn_maps()
    for old, new in ((True, "class"), (False, "none")):
        losses = [
            ScaleDecoupled(partial(kd, temperature=2.0), [1, 2], standardize=way)(
                student, teacher, target
            )
            for way in (old, new)
        ]
        assert torch.equal(*losses)
    with pytest.raises(ValueError, match=r"standardize='rows' is not one of none, class, batch,"):
        ScaleDecoupled(partial(kd, temperature=2.0), [1], standardize="rows")
