"""Test the losses with numbers computed by hand and with identities.

Shapes: N samples, K classes.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sddlskd.losses import dkd, kd, nkd
from tests.newer import SINGLE

LOSSES = {
    "kd": partial(kd, temperature=2.0),
    "dkd": partial(dkd, alpha=1.0, beta=8.0, temperature=4.0),
    "nkd": partial(nkd, gamma=1.5, temperature=2.0),
    "nkd_released": partial(nkd, gamma=1.5, temperature=2.0, exclude_target=False),
}
# tests/test_newer_losses.py has the numbers and identities of the newer losses.
ALL = {**LOSSES, **SINGLE}
each_loss = pytest.mark.parametrize("loss", ALL.values(), ids=ALL.keys())
some = settings(max_examples=20, deadline=None, derandomize=True, database=None)

# The example: at temperature 2 the logits 2 ln p have the probabilities p = softmax(2 ln p / 2).
STUDENT_P, TEACHER_P = (0.2, 0.3, 0.5), (0.6, 0.3, 0.1)
STUDENT_13 = torch.tensor([[2 * math.log(p) for p in STUDENT_P]], dtype=torch.float64)
TEACHER_13 = torch.tensor([[2 * math.log(p) for p in TEACHER_P]], dtype=torch.float64)
TARGET_1 = torch.tensor([0])


@st.composite
def batches(draw: st.DrawFn, K_min: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Draw student_NK, teacher_NK (both float64) and target_N."""
    N, K = draw(st.integers(1, 5)), draw(st.integers(K_min, 7))
    spread = draw(st.sampled_from([0.1, 1.0, 10.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    student_NK, teacher_NK = spread * torch.randn(2, N, K, generator=generator, dtype=torch.float64)
    return student_NK, teacher_NK, torch.randint(K, (N,), generator=generator)


def a_batch(seed: int = 0, N: int = 4, K: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student_NK, teacher_NK = 2 * torch.randn(2, N, K, generator=generator, dtype=torch.float64)
    return student_NK, teacher_NK, torch.randint(K, (N,), generator=generator)


def close(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected.expand_as(actual), rtol=tolerance, atol=tolerance)


# Numbers computed by hand


def test_kd_by_hand():
    # Hinton et al. 2015: T^2 sum_k p^T_k ln(p^T_k / p^S_k)
    expected = 2**2 * (
        0.6 * math.log(0.6 / 0.2) + 0.3 * math.log(0.3 / 0.3) + 0.1 * math.log(0.1 / 0.5)
    )
    assert expected == pytest.approx(2.4 * math.log(3) - 0.4 * math.log(5))
    close(kd(STUDENT_13, TEACHER_13, TARGET_1, temperature=2.0), expected)


def test_kd_at_another_temperature_by_hand():
    # At T = 1 the same logits have the probabilities p_k^2 / sum p^2: (0.04, 0.09, 0.25) / 0.38 for
    # the student and (0.36, 0.09, 0.01) / 0.46 for the teacher.
    ratio = 0.38 / 0.46
    expected = (
        0.36 * math.log(9 * ratio) + 0.09 * math.log(ratio) + 0.01 * math.log(0.04 * ratio)
    ) / 0.46
    close(kd(STUDENT_13, TEACHER_13, TARGET_1, temperature=1.0), expected)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (0.0, 1.0), (1.0, 8.0), (0.5, 2.0)])
def test_dkd_by_hand(alpha: float, beta: float):
    # DKD Eq. 5, with target 0: TCKD = b^T_t ln(b^T_t / b^S_t) + b^T_rest ln(b^T_rest / b^S_rest)
    tckd = 0.6 * math.log(0.6 / 0.2) + 0.4 * math.log(0.4 / 0.8)
    # NCKD is over the other classes, renormalised: (0.3, 0.1) / 0.4 for the teacher and
    # (0.3, 0.5) / 0.8 for the student.
    nckd = 0.75 * math.log(0.75 / 0.375) + 0.25 * math.log(0.25 / 0.625)
    # DKD Eq. 7, times T^2: alpha TCKD + beta NCKD
    expected = 2**2 * (alpha * tckd + beta * nckd)
    close(dkd(STUDENT_13, TEACHER_13, TARGET_1, alpha=alpha, beta=beta, temperature=2.0), expected)


@pytest.mark.parametrize("exclude_target", [True, False])
def test_nkd_by_hand(exclude_target: bool):
    # The term of the target, -p^T_t ln p^S_t, is at T = 1, where the probabilities are
    # p_k^2 / sum p^2.
    target_term = -(0.36 / 0.46) * math.log(0.04 / 0.38)
    if exclude_target:  # the paper's term: -sum_{k != t} N(p^T)_k ln N(p^S)_k at T = 2
        other_term = -(0.75 * math.log(0.375) + 0.25 * math.log(0.625))
    else:  # the released code, whose mask masks nothing: the sum is over all K classes
        other_term = -(0.6 * math.log(0.2) + 0.3 * math.log(0.3) + 0.1 * math.log(0.5))
    expected = target_term + 1.5 * 2**2 * other_term
    close(
        nkd(
            STUDENT_13,
            TEACHER_13,
            TARGET_1,
            gamma=1.5,
            temperature=2.0,
            exclude_target=exclude_target,
        ),
        expected,
    )


def test_nkd_excludes_the_target_unless_told_otherwise():
    batch = a_batch()
    left_out = nkd(*batch, gamma=1.0, temperature=1.0, exclude_target=True)
    assert torch.equal(nkd(*batch, gamma=1.0, temperature=1.0), left_out)
    assert (
        nkd(*batch, gamma=1.0, temperature=1.0, exclude_target=False) - left_out
    ).abs().min() > 1e-3


def test_targets_are_taken_row_by_row():
    # One call with three rows, which have the same logits and different targets, must equal three
    # calls with one row each.
    student_NK, teacher_NK, target_N = (
        STUDENT_13.expand(3, 3),
        TEACHER_13.expand(3, 3),
        torch.arange(3),
    )
    for loss in (LOSSES["dkd"], LOSSES["nkd"]):
        together_N = loss(student_NK, teacher_NK, target_N)
        assert len(set(together_N.tolist())) == 3
        for n in range(3):
            close(loss(STUDENT_13, TEACHER_13, target_N[n : n + 1]), together_N[n])


# Identities


@some
@given(batches(), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_kd_is_a_divergence(batch: tuple[Tensor, Tensor, Tensor], temperature: float):
    student_NK, teacher_NK, target_N = batch
    assert (kd(teacher_NK, teacher_NK, target_N, temperature=temperature) == 0).all()
    assert (kd(student_NK, teacher_NK, target_N, temperature=temperature) >= -1e-12).all()


@some
@given(batches())
def test_kd_differs_from_cross_entropy_by_the_teachers_entropy(
    batch: tuple[Tensor, Tensor, Tensor],
):
    student_NK, teacher_NK, target_N = batch
    p_NK = teacher_NK.softmax(1)
    entropy_N = F.cross_entropy(teacher_NK, p_NK, reduction="none")
    expected_N = F.cross_entropy(student_NK, p_NK, reduction="none") - entropy_N
    close(kd(student_NK, teacher_NK, target_N, temperature=1.0), expected_N, 1e-10)


@some
@given(batches(), st.sampled_from([0.5, 1.0, 2.0, 4.0]))
def test_dkd_reformulates_kd(batch: tuple[Tensor, Tensor, Tensor], temperature: float):
    # DKD Eq. 6: KD = TCKD + (1 - p^T_t) NCKD
    student_NK, teacher_NK, target_N = batch
    for n in range(len(target_N)):
        row = student_NK[n : n + 1], teacher_NK[n : n + 1], target_N[n : n + 1]
        rest = 1 - (teacher_NK[n] / temperature).softmax(0)[target_N[n]].item()
        close(
            dkd(*row, alpha=1.0, beta=rest, temperature=temperature),
            kd(*row, temperature=temperature),
            1e-9,
        )


@some
@given(batches())
def test_dkd_of_equal_logits_is_zero(batch: tuple[Tensor, Tensor, Tensor]):
    _, teacher_NK, target_N = batch
    assert (dkd(teacher_NK, teacher_NK, target_N, alpha=1.0, beta=8.0, temperature=4.0) == 0).all()


@some
@given(batches(), st.sampled_from(sorted(LOSSES)), st.floats(-50, 50), st.floats(-50, 50))
def test_a_shift_of_the_logits_changes_nothing(
    batch: tuple[Tensor, Tensor, Tensor], name: str, student_shift: float, teacher_shift: float
):
    student_NK, teacher_NK, target_N = batch
    shifted_N = LOSSES[name](student_NK + student_shift, teacher_NK + teacher_shift, target_N)
    close(shifted_N, LOSSES[name](*batch), 1e-10)


@some
@given(batches(), st.sampled_from(sorted(LOSSES)), st.randoms(use_true_random=False))
def test_classes_have_no_order(batch: tuple[Tensor, Tensor, Tensor], name: str, random):
    student_NK, teacher_NK, target_N = batch
    order_K = torch.tensor(random.sample(range(student_NK.shape[1]), student_NK.shape[1]))
    permuted = student_NK[:, order_K], teacher_NK[:, order_K], order_K.argsort()[target_N]
    close(LOSSES[name](*permuted), LOSSES[name](*batch), 1e-10)


@some
@given(batches(), st.sampled_from(sorted(LOSSES)))
def test_samples_do_not_mix(batch: tuple[Tensor, Tensor, Tensor], name: str):
    together_N = LOSSES[name](*batch)
    assert together_N.shape == batch[2].shape
    for n in range(len(together_N)):
        close(LOSSES[name](*(x[n : n + 1] for x in batch))[0], together_N[n])


@some
@given(batches())
def test_with_two_classes_no_distribution_over_others_is_left(batch: tuple[Tensor, Tensor, Tensor]):
    student_NK, teacher_NK, target_N = batch[0][:, :2], batch[1][:, :2], batch[2] % 2
    binary = student_NK, teacher_NK, target_N
    # NCKD is 0, so TCKD is the whole divergence.
    close(dkd(*binary, alpha=1.0, beta=8.0, temperature=2.0), kd(*binary, temperature=2.0), 1e-10)
    # One other class is left, whose cross-entropy is 0, so gamma has no effect.
    close(nkd(*binary, gamma=1.5, temperature=2.0), nkd(*binary, gamma=0.0, temperature=2.0))


# Numerics


@each_loss
def test_gradients(loss):
    student_NK, teacher_NK, target_N = a_batch(N=2, K=4)
    assert torch.autograd.gradcheck(
        lambda s: loss(s, teacher_NK, target_N), student_NK.requires_grad_()
    )


@each_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_computed_in_float32(loss, dtype: torch.dtype):
    student_NK, teacher_NK, target_N = a_batch()
    student_NK, teacher_NK = student_NK.to(dtype), teacher_NK.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_N = loss(student_NK, teacher_NK, target_N)
    assert loss_N.dtype == torch.float32
    assert torch.equal(loss_N, loss(student_NK.float(), teacher_NK.float(), target_N))


@each_loss
def test_float64_stays_float64(loss):
    assert loss(*a_batch()).dtype == torch.float64


@each_loss
@pytest.mark.parametrize("K", [2, 5])
def test_extreme_logits_stay_finite(loss, K: int):
    student_NK = 1e4 * torch.eye(K).repeat(2, 1)
    student_NK[K:] *= -1
    teacher_NK = student_NK.roll(1, 0)
    for target in range(K):
        leaf_NK = student_NK.clone().requires_grad_()
        loss_N = loss(leaf_NK, teacher_NK, torch.full((2 * K,), target))
        loss_N.sum().backward()
        assert loss_N.isfinite().all()
        assert leaf_NK.grad is not None
        assert leaf_NK.grad.isfinite().all()


def test_extreme_logits_keep_their_value():
    student_NK, teacher_NK = torch.tensor([[1e4, 0.0, 0.0]]), torch.tensor([[0.0, 1e4, 0.0]])
    # The teacher is certain of class 1, whose log-probability is -1e4 for the student. No epsilon
    # may limit this value.
    close(kd(student_NK, teacher_NK, torch.tensor([1]), temperature=1.0), 1e4)
    close(dkd(student_NK, teacher_NK, torch.tensor([1]), alpha=1.0, beta=0.0, temperature=1.0), 1e4)
    close(nkd(student_NK, teacher_NK, torch.tensor([1]), gamma=0.0, temperature=1.0), 1e4)


@each_loss
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_logits_give_a_non_finite_loss(loss, side: int, value: float):
    for k in range(5):
        *logits, target_N = a_batch()
        logits[side][1, k] = value
        loss_N = loss(*logits, target_N)
        assert loss_N.isfinite().tolist() == [True, False, True, True]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_a_student_that_rules_a_class_out_is_an_infinite_loss(loss):
    for k in range(5):
        student_NK, teacher_NK, target_N = a_batch()
        student_NK[1, k] = -math.inf
        assert loss(student_NK, teacher_NK, target_N).isfinite().tolist() == [
            True,
            False,
            True,
            True,
        ]
