"""Test the logit losses of 2022 to 2026: numbers by hand, identities, regions, and recipes.

Shapes: B images, R regions of each, N = B*R, K classes, H W map sides.
"""

import math
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sddlskd.config import Config
from sddlskd.config.identity import METHOD_NAMES
from sddlskd.config.targets import instantiate
from sddlskd.distill import ScaleDecoupled, compares_images, region_logits
from sddlskd.losses import abkd, dist, dkd, gdkd, kd, rld, skd, sld, ttm, wttm
from sddlskd.training.checks import check_objective
from sddlskd.training.stand_ins import try_loss
from tests.newer import COMPARING, NEWER, SINGLE
from tests.test_distill import some_maps
from tests.test_losses import STUDENT_13, TARGET_1, TEACHER_13, a_batch, close
from tests.tiny import composed

each_newer = pytest.mark.parametrize("name", NEWER)
each_single = pytest.mark.parametrize("name", SINGLE)
each_comparing = pytest.mark.parametrize("name", COMPARING)
each_scales = pytest.mark.parametrize("M", [[1], [1, 2], [1, 2, 4]], ids=str)
SEEDS = range(5)


# Numbers computed by hand
#
# STUDENT_13 and TEACHER_13 have the probabilities (0.2, 0.3, 0.5) and (0.6, 0.3, 0.1) at the
# temperature 2, and p^2 / sum p^2 at 1: (0.04, 0.09, 0.25) / 0.38 and (0.36, 0.09, 0.01) / 0.46.


def test_ttm_and_wttm_by_hand():
    # gamma = 0.5 takes the root of the teacher's probabilities at T = 1: (0.6, 0.3, 0.1) again.
    q = [0.04 / 0.38, 0.09 / 0.38, 0.25 / 0.38]
    expected = sum(p * math.log(p / q[i]) for i, p in enumerate((0.6, 0.3, 0.1)))
    batch = STUDENT_13, TEACHER_13, TARGET_1
    close(ttm(*batch, gamma=0.5), expected)
    # The weight is the sum of these roots: (0.6 + 0.3 + 0.1) / sqrt(0.46).
    close(wttm(*batch, gamma=0.5), expected / math.sqrt(0.46))


@pytest.mark.parametrize(
    ("target", "below"),
    [(0, [1, 2]), (1, [2]), (2, [])],  # classes with a teacher logit below the target's
)
def test_rld_by_hand(target: int, below: list[int]):
    student, teacher = (0.2, 0.3, 0.5), (0.6, 0.3, 0.1)
    # The teacher's largest probability is 0.6, whatever the target is.
    q = student[target]
    scd = 0.6 * math.log(0.6 / q) + 0.4 * math.log(0.4 / (1 - q))
    p_sum, q_sum = sum(teacher[k] for k in below), sum(student[k] for k in below)
    mcd = sum(
        teacher[k] / p_sum * math.log(teacher[k] / p_sum / (student[k] / q_sum)) for k in below
    )
    assert (mcd > 0) == (len(below) > 1)  # one class alone has the probability 1 in both networks
    options = {"alpha": 3.0, "beta": 5.0, "temperature": 2.0, "alpha_temperature": 2.0}
    target_1 = torch.tensor([target])
    close(rld(STUDENT_13, TEACHER_13, target_1, **options), 4 * (3 * scd + 5 * mcd))


def test_gdkd_by_hand():
    # The top 2 classes of the teacher are 0 and 1, with 0.9 of its and 0.5 of the student's mass.
    d0 = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    d1 = 2 / 3 * math.log(2 / 3 / 0.4) + 1 / 3 * math.log(1 / 3 / 0.6)
    options = {"w0": 3.0, "w1": 5.0, "w2": 7.0, "temperature": 2.0}
    # One other class is left, which has the probability 1 in both networks: D2 is 0.
    close(gdkd(STUDENT_13, TEACHER_13, TARGET_1, k=2, **options), 4 * (3 * d0 + 5 * d1))


def test_abkd_by_hand():
    # For alpha = beta = 1: sum (p^2 / 2 + q^2 / 2 - p q) = sum (p - q)^2 / 2
    expected = (0.4**2 + 0.0**2 + 0.4**2) / 2
    options = {"alpha": 1.0, "beta": 1.0, "temperature": 2.0}
    close(abkd(STUDENT_13, TEACHER_13, TARGET_1, **options), expected)


def test_sld_by_hand():
    # The target is class 2: 0.1 and the largest probability, 0.6, change places.
    expected = 4 * sum(
        p * math.log(p / q) for p, q in zip((0.1, 0.3, 0.6), (0.2, 0.3, 0.5), strict=True)
    )
    wrong = STUDENT_13, TEACHER_13, torch.tensor([2])
    close(sld(*wrong, temperatures=[2.0]), expected)
    right = STUDENT_13, TEACHER_13, TARGET_1
    close(sld(*right, temperatures=[2.0]), kd(*right, temperature=2.0))


def test_dist_by_hand():
    # At T = 1 with two classes: the student's probabilities of class 0 are 0.1, 0.2, 0.6 and the
    # teacher's 0.9, 0.5, 0.4.
    student, teacher = (
        torch.tensor([[math.log(p), math.log(1 - p)] for p in column], dtype=torch.float64)
        for column in ((0.1, 0.2, 0.6), (0.9, 0.5, 0.4))
    )
    options = {"temperature": 1.0}
    target_3 = torch.zeros(3, dtype=torch.int64)
    # Over two classes, a correlation is 1 or -1; if both probabilities are 1/2, there is none.
    inter_3 = dist(student, teacher, target_3, beta=1.0, gamma=0.0, **options)
    close(inter_3, torch.tensor([2.0, 0.5, 2.0], dtype=torch.float64))
    # Both classes have the same deviations over the images, but for the sign: (-2, -1, 3) / 10 and
    # (3, -1, -2) / 10, so the correlation is (-6 + 1 - 6) / 14.
    intra_3 = dist(student, teacher, target_3, beta=0.0, gamma=1.0, **options)
    close(intra_3.mean(), 1 + 11 / 14)
    # An image's share is 3 / 2 times the squared difference of the deviations, divided by 14.
    close(intra_3, 3 / 2 * torch.tensor([25.0, 0.0, 25.0], dtype=torch.float64) / 14)


def test_skd_by_hand():
    # The student's two images have equal directions, the teacher's orthogonal ones. With K = 2,
    # D = ((1, 1; 1, 1) - (1, 0; 0, 1)) / 2 = (0, 1/2; 1/2, 0). The deviations of its rows from
    # their mean are (-1/4, 1/4) and (1/4, -1/4), so C = (1, -1; -1, 1) / 8. With the ridge 1/8 the
    # matrix is (2, -1; -1, 2) / 8 with the inverse (2, 1; 1, 2) * 8 / 3, and d^T ... d is
    # (1/2)^2 * 16 / 3 for both rows.
    student = torch.tensor([[3.0, 0.0], [5.0, 0.0]], dtype=torch.float64)
    teacher = torch.tensor([[2.0, 0.0], [0.0, 7.0]], dtype=torch.float64)
    target_2 = torch.tensor([0, 1])
    loss_2 = skd(student, teacher, target_2, temperature=3.0, ridge=1 / 8)
    close(loss_2 - kd(student, teacher, target_2, temperature=3.0), math.sqrt(4 / 3))


# A second implementation of each loss, in NumPy and from the papers' definitions


def softmax(z: np.ndarray, T: float = 1.0) -> np.ndarray:
    return np.exp(z / T) / np.exp(z / T).sum(-1, keepdims=True)


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float((p * np.log(p / q)).sum())


def two(p: np.ndarray, classes: list[int]) -> np.ndarray:
    """Return the probabilities of `classes` together and of all other classes."""
    mass = p[classes].sum()
    return np.array([mass, 1 - mass])


def over(p: np.ndarray, classes: list[int]) -> np.ndarray:
    """Return the probabilities of `classes`, rescaled to sum to 1."""
    return p[classes] / p[classes].sum()


def second_ttm(s: np.ndarray, t: np.ndarray, target: int) -> float:
    power = softmax(t) ** 0.1
    return kl(power / power.sum(), softmax(s))


def second_wttm(s: np.ndarray, t: np.ndarray, target: int) -> float:
    return float((softmax(t) ** 0.1).sum()) * second_ttm(s, t, target)


def second_rld(s: np.ndarray, t: np.ndarray, target: int) -> float:
    scd = kl(two(softmax(t), [int(t.argmax())]), two(softmax(s), [target]))
    below = [k for k in range(len(t)) if t[k] < t[target]]
    mcd = kl(over(softmax(t, 4), below), over(softmax(s, 4), below)) if below else 0.0
    return scd + 8 * 16 * mcd


def second_gdkd(s: np.ndarray, t: np.ndarray, target: int) -> float:
    p, q = softmax(t, 4), softmax(s, 4)
    top = [int(t.argmax())]
    rest = [k for k in range(len(t)) if k not in top]
    return 16 * (kl(two(p, top), two(q, top)) + 8 * kl(over(p, rest), over(q, rest)))


def second_abkd(s: np.ndarray, t: np.ndarray, target: int) -> float:
    p, q, a, b = softmax(t, 4), softmax(s, 4), 0.8, 0.3
    terms = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
    return float(-terms.sum() / (a * b))


def second_sld(s: np.ndarray, t: np.ndarray, target: int) -> float:
    swapped, top = t.copy(), int(t.argmax())
    swapped[target], swapped[top] = t[top], t[target]
    return sum(T**2 * kl(softmax(swapped, T), softmax(s, T)) for T in (1.0, 2.0, 4.0))


def second_dist(s: np.ndarray, t: np.ndarray) -> float:
    """Return the loss of a batch: the mean over its images."""
    p, q = softmax(t, 4), softmax(s, 4)
    inter = np.mean([1 - np.corrcoef(p[b], q[b])[0, 1] for b in range(len(p))])
    intra = np.mean([1 - np.corrcoef(p[:, k], q[:, k])[0, 1] for k in range(p.shape[1])])
    return float(16 * (2 * inter + 3 * intra))


def second_skd(s: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Return the loss of each image of a batch."""
    u, v = (z / np.sqrt((z**2).sum(1, keepdims=True)) for z in (s, t))
    D = (u @ u.T - v @ v.T) / s.shape[1]
    inverse = np.linalg.inv(np.cov(D, rowvar=False) + 0.1 * np.eye(len(D)))
    direction = [math.sqrt(d @ inverse @ d) for d in D]
    return np.array([16 * kl(softmax(b, 4), softmax(a, 4)) for a, b in zip(s, t, strict=True)]) + (
        np.array(direction)
    )


SECOND: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "ttm": second_ttm,
    "wttm": second_wttm,
    "rld": second_rld,
    "gdkd": second_gdkd,
    "abkd": second_abkd,
    "sld": second_sld,
}


@each_single
@pytest.mark.parametrize("K", [2, 3, 7])
def test_against_the_second_implementation(name: str, K: int):
    for seed in SEEDS:
        student_NK, teacher_NK, target_N = a_batch(seed, N=6, K=K)
        rows = zip(student_NK.numpy(), teacher_NK.numpy(), target_N.tolist(), strict=True)
        expected = [SECOND[name](*row) for row in rows]
        loss_N = SINGLE[name](student_NK, teacher_NK, target_N)
        close(loss_N, torch.tensor(expected, dtype=torch.float64))


def test_gdkd_against_the_second_implementation_for_more_top_classes():
    student_NK, teacher_NK, target_N = a_batch(N=6, K=7)
    loss_N = gdkd(student_NK, teacher_NK, target_N, k=3, w0=2.0, w1=3.0, w2=5.0, temperature=1.5)
    for n, (s, t) in enumerate(zip(student_NK.numpy(), teacher_NK.numpy(), strict=True)):
        p, q, order = softmax(t, 1.5), softmax(s, 1.5), list(np.argsort(-t))
        top, rest = order[:3], order[3:]
        terms = 2 * kl(two(p, top), two(q, top)) + 3 * kl(over(p, top), over(q, top))
        close(loss_N[n], 1.5**2 * (terms + 5 * kl(over(p, rest), over(q, rest))))


@pytest.mark.parametrize("K", [3, 7])  # over two classes, a correlation is 1 or -1
def test_dist_and_skd_against_the_second_implementation(K: int):
    for seed in SEEDS:
        student_BK, teacher_BK, target_B = a_batch(seed, N=6, K=K)
        s, t = student_BK.numpy(), teacher_BK.numpy()
        close(COMPARING["dist"](student_BK, teacher_BK, target_B).mean(), second_dist(s, t), 1e-10)
        loss_B = COMPARING["skd"](student_BK, teacher_BK, target_B)
        close(loss_B, torch.from_numpy(second_skd(s, t)), 1e-10)


# Identities


def test_special_cases():
    for seed in SEEDS:
        student_NK, teacher_NK, _ = batch = a_batch(seed)
        close(ttm(*batch, gamma=1.0), kd(*batch, temperature=1.0))
        close(wttm(*batch, gamma=1.0), kd(*batch, temperature=1.0))
        close(abkd(*batch, alpha=1.0, beta=1e-7, temperature=2.0), kd(*batch, temperature=2.0) / 4,
              1e-5)  # fmt: skip
        # A teacher that is right in every row
        right = student_NK, teacher_NK, teacher_NK.argmax(1)
        expected = dkd(*right, alpha=2.0, beta=3.0, temperature=4.0)
        close(rld(*right, alpha=2.0, beta=3.0, temperature=4.0, alpha_temperature=4.0), expected)
        close(gdkd(*right, k=1, w0=2.0, w1=9.0, w2=3.0, temperature=4.0), expected)
        close(sld(*right, temperatures=[4.0]), kd(*right, temperature=4.0))
        # The teacher prefers every class to the target, so RLD compares the confidences alone.
        worst = student_NK, teacher_NK, teacher_NK.argmin(1)
        close(rld(*worst, alpha=1.0, beta=0.0, temperature=4.0), NEWER["rld"](*worst))


@pytest.mark.parametrize("name", ["gdkd", "abkd", "dist", "skd"])
def test_equal_networks_have_no_loss_and_no_gradient(name: str):
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        _, teacher_NK, target_N = a_batch(N=6)
        teacher_NK = teacher_NK.to(dtype)
        student_NK = teacher_NK.clone().requires_grad_()
        loss_N = NEWER[name](student_NK, teacher_NK, target_N)
        loss_N.sum().backward()
        assert loss_N.abs().max() <= tolerance
        assert student_NK.grad.abs().max() <= tolerance


@pytest.mark.parametrize("name", sorted(NEWER.keys() - {"skd"}))
def test_a_shift_of_the_logits_changes_nothing(name: str):
    student_NK, teacher_NK, target_N = batch = a_batch()
    close(NEWER[name](student_NK + 5, teacher_NK - 50, target_N), NEWER[name](*batch), 1e-10)


@each_newer
def test_classes_have_no_order(name: str):
    for seed in SEEDS:
        student_NK, teacher_NK, target_N = batch = a_batch(seed, N=6, K=7)
        order_K = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        permuted = student_NK[:, order_K], teacher_NK[:, order_K], order_K.argsort()[target_N]
        close(NEWER[name](*permuted), NEWER[name](*batch), 1e-10)


@each_newer
def test_images_have_no_order(name: str):
    student_NK, teacher_NK, target_N = batch = a_batch(N=6)
    order_N = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted_N = NEWER[name](student_NK[order_N], teacher_NK[order_N], target_N[order_N])
    close(permuted_N, NEWER[name](*batch)[order_N], 1e-10)


@each_single
def test_samples_do_not_mix(name: str):
    batch = a_batch(N=6)
    together_N = SINGLE[name](*batch)
    for n in range(6):
        close(SINGLE[name](*(x[n : n + 1] for x in batch))[0], together_N[n])


def test_the_temperature_of_the_student_alone_is_one():
    student_NK, teacher_NK, target_N = a_batch()
    # TTM's teacher has the temperature 1 / gamma.
    close(
        ttm(student_NK, 10 * teacher_NK, target_N, gamma=0.1),
        ttm(student_NK, teacher_NK, target_N, gamma=1.0),
    )
    # A teacher that is certain has the weight 1, one that is certain of nothing K^(1 - gamma).
    certain, uncertain = 1e3 * torch.eye(5).double()[:4], torch.zeros(4, 5).double()
    for teacher_NK, weight in ((certain, 1.0), (uncertain, 5**0.9)):
        batch = student_NK, teacher_NK, target_N
        close(wttm(*batch, gamma=0.1), weight * ttm(*batch, gamma=0.1))


# Numerics


@each_newer
def test_gradients(name: str):
    student_NK, teacher_NK, target_N = a_batch(N=4, K=4)
    loss = NEWER[name]
    if name in COMPARING:
        loss = partial(loss, regions_per_image=2)
    assert torch.autograd.gradcheck(
        lambda s: loss(s, teacher_NK, target_N), student_NK.requires_grad_()
    )


@each_newer
@pytest.mark.parametrize("N", [1, 7])
@pytest.mark.parametrize("K", [2, 5])
def test_extreme_logits_stay_finite(name: str, N: int, K: int):
    generator = torch.Generator().manual_seed(N)
    extreme_NK = 1e4 * torch.randn(N, K, generator=generator).sign()
    certain_NK = 1e4 * torch.eye(K)[torch.arange(N) % K]
    equal_NK = torch.zeros(N, K)
    target_N = torch.arange(N) % K
    for teacher_NK in (extreme_NK, certain_NK, certain_NK.roll(1, 1), equal_NK, 3 + equal_NK):
        for student_NK in (extreme_NK, certain_NK, -certain_NK, equal_NK, 3 + equal_NK):
            leaf_NK = student_NK.clone().requires_grad_()
            loss_N = NEWER[name](leaf_NK, teacher_NK, target_N)
            loss_N.sum().backward()
            assert loss_N.shape == (N,)
            assert loss_N.isfinite().all()
            assert leaf_NK.grad.isfinite().all()


def test_extreme_logits_keep_their_value():
    student, teacher = torch.tensor([[1e4, 0.0, 0.0]]), torch.tensor([[0.0, 1e4, 0.0]])
    batch = student, teacher, torch.tensor([1])
    # The teacher is certain of class 1, whose log-probability is -1e4 for the student.
    close(ttm(*batch, gamma=1.0), 1e4)
    close(wttm(*batch, gamma=1.0), 1e4)
    close(rld(*batch, alpha=1.0, beta=0.0, temperature=4.0), 1e4)
    close(gdkd(*batch, k=1, w0=1.0, w1=1.0, w2=0.0, temperature=1.0), 1e4)
    close(sld(*batch, temperatures=[1.0]), 1e4)
    # Both networks are certain, of different classes.
    close(abkd(*batch, alpha=1.0, beta=1.0, temperature=1.0), 1.0)


@each_comparing
def test_low_precision_is_computed_in_float32(name: str):
    student_NK, teacher_NK, target_N = (x.bfloat16() if x.is_floating_point() else x
                                        for x in a_batch(N=6))  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss_N = COMPARING[name](student_NK, teacher_NK, target_N)
    assert loss_N.dtype == torch.float32
    expected_N = COMPARING[name](student_NK.float(), teacher_NK.float(), target_N)
    assert torch.equal(loss_N, expected_N)


def test_dist_does_not_depend_on_how_small_probabilities_are():
    # Class 0 has the probabilities exp(-500 + z) in all images, whose squares are 0 in float32.
    z_BK = a_batch(N=6, K=2)[:2]
    small_BK = [torch.stack((z[:, 0] - 500, 0 * z[:, 0]), 1).float() for z in z_BK]
    close_to_it = [torch.stack((z[:, 0] - 20, 0 * z[:, 0]), 1).float() for z in z_BK]
    options = {"beta": 0.0, "gamma": 1.0, "temperature": 1.0}
    # The other class has a probability of 1 in float32, which is constant in both networks.
    loss_B = dist(*small_BK, torch.zeros(6, dtype=torch.int64), **options)
    close(loss_B, dist(*close_to_it, torch.zeros(6, dtype=torch.int64), **options), 1e-4)
    assert (loss_B > 0).any()


@each_comparing
def test_a_batch_of_one_image_has_no_batch_term(name: str):
    batch = a_batch(N=1)
    alone = {"dist": dist(*batch, beta=2.0, gamma=0.0, temperature=4.0),
             "skd": kd(*batch, temperature=4.0)}  # fmt: skip
    close(COMPARING[name](*batch), alone[name])


def test_a_network_that_is_equal_everywhere_has_no_correlation():
    student_NK, teacher_NK, target_N = a_batch()
    equal_NK = torch.zeros_like(student_NK)
    for gamma in (0.0, 1.0):
        options = {"beta": 1.0 - gamma, "gamma": gamma, "temperature": 2.0}
        close(dist(equal_NK, teacher_NK, target_N, **options).mean(), 4 / 2)
        close(dist(student_NK, equal_NK, target_N, **options).mean(), 4 / 2)
        close(dist(equal_NK, equal_NK, target_N, **options), 0.0)


# Regions


@each_comparing
def test_regions_never_mix(name: str):
    B, R, K = 5, 3, 4
    student_NK, teacher_NK, target_N = a_batch(N=B * R, K=K)
    loss_BR = COMPARING[name](student_NK, teacher_NK, target_N, regions_per_image=R).reshape(B, R)
    for r in range(R):
        apart = (x.reshape(B, R, *x.shape[1:])[:, r] for x in (student_NK, teacher_NK, target_N))
        close(loss_BR[:, r], COMPARING[name](*apart))
    # The gradient of a region's loss reaches its own rows alone.
    leaf_NK = student_NK.clone().requires_grad_()
    loss_N = COMPARING[name](leaf_NK, teacher_NK, target_N, regions_per_image=R)
    loss_N.reshape(B, R)[:, 1].sum().backward()
    reached_BR = leaf_NK.grad.reshape(B, R, K).abs().sum(2) > 0
    assert reached_BR.tolist() == [[False, True, False]] * B


@each_comparing
def test_a_permutation_of_the_regions_changes_nothing(name: str):
    B, R, K = 5, 4, 3
    batch = a_batch(N=B * R, K=K)
    loss = partial(COMPARING[name], regions_per_image=R)
    order_R = torch.tensor([2, 0, 3, 1])
    permuted = [x.reshape(B, R, *x.shape[1:])[:, order_R].flatten(0, 1) for x in batch]
    close(loss(*permuted).reshape(B, R), loss(*batch).reshape(B, R)[:, order_R])
    order_B = torch.tensor([4, 2, 0, 1, 3])
    permuted = [x.reshape(B, R, *x.shape[1:])[order_B].flatten(0, 1) for x in batch]
    close(loss(*permuted).reshape(B, R), loss(*batch).reshape(B, R)[order_B])
    close(loss(*permuted).sum(), loss(*batch).sum())


@each_comparing
def test_one_scale_is_the_papers_loss(name: str):
    student_map, teacher_map, target_B = some_maps((4, 4), (2, 2), B=6, K=5)
    s, t = student_map.mean((2, 3)).numpy(), teacher_map.mean((2, 3)).numpy()
    expected = {"dist": second_dist, "skd": second_skd}[name](s, t)
    composer = ScaleDecoupled(COMPARING[name], [1])
    close(composer(student_map, teacher_map, target_B), np.mean(expected), 1e-10)


@each_newer
@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_the_composer_weighs_each_region_of_each_image(name: str, weight: float):
    M = [1, 2]
    student_map, teacher_map, target_B = some_maps((4, 4), (4, 4), B=6, K=5)
    student_BRK, teacher_BRK = region_logits(student_map, M), region_logits(teacher_map, M)
    right_B1 = (teacher_map.mean((2, 3)).argmax(1) == target_B)[:, None]
    complementary_BR = (teacher_BRK.argmax(2) == target_B[:, None]) != right_B1
    assert 0 < complementary_BR.sum() < complementary_BR.numel()
    weight_BR = 1 + (weight - 1) * complementary_BR.double()
    loss_BR = torch.stack(
        [NEWER[name](student_BRK[:, r], teacher_BRK[:, r], target_B) for r in range(5)], 1
    )
    for order in (M, M[::-1]):
        composer = ScaleDecoupled(NEWER[name], order, weight)
        close(composer(student_map, teacher_map, target_B), (weight_BR * loss_BR).mean(), 1e-10)


@each_scales
@pytest.mark.parametrize("standardize", [False, True], ids=["raw", "standardized"])
@each_newer
def test_every_loss_composes_with_scales_and_standardisation(
    name: str, M: list[int], standardize: bool
):
    student_map, teacher_map, target_B = some_maps((4, 4), (8, 8), B=4, K=6)
    leaf = student_map.float().requires_grad_()
    composer = ScaleDecoupled(NEWER[name], M, 2.0, standardize)
    value = composer(leaf, teacher_map.float(), target_B)
    value.backward()
    assert value.shape == ()
    assert value.isfinite()
    assert leaf.grad.isfinite().all()
    assert leaf.grad.abs().sum() > 0


def test_only_a_loss_that_asks_for_the_regions_is_told_of_them():
    seen: list[dict[str, object]] = []

    def asks(s: Tensor, t: Tensor, y: Tensor, *, scale: float, regions_per_image: int) -> Tensor:
        seen.append({"scale": scale, "regions_per_image": regions_per_image})
        return scale * s.sum(1)

    def plain(s: Tensor, t: Tensor, y: Tensor, **options: float) -> Tensor:
        seen.append(options)
        return s.sum(1)

    class Callable_:
        def __call__(self, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
            seen.append({})
            return s.sum(1)

    batch = some_maps((4, 4), (4, 4))
    losses = [partial(asks, scale=2.0), partial(plain, scale=3.0), plain, Callable_()]
    for loss in losses:
        ScaleDecoupled(loss, [1, 2])(*batch)
    assert seen == [{"scale": 2.0, "regions_per_image": 5}, {"scale": 3.0}, {}, {}]
    assert [compares_images(loss) for loss in losses] == [True, False, False, False]
    assert {name: compares_images(loss) for name, loss in NEWER.items()} == {
        name: name in COMPARING for name in NEWER
    }


def test_a_callable_without_a_signature_is_a_plain_loss():
    assert not compares_images(min)  # `inspect.signature` cannot read it


# Refusals


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (partial(ttm, gamma=-0.1), "gamma=-0.1 must not be negative"),
        (partial(wttm, gamma=math.nan), "gamma=nan must not be negative"),
        (
            partial(gdkd, k=5, w0=1.0, w1=1.0, w2=1.0, temperature=4.0),
            "k=5 does not split 5 classes; give an integer from 1 to 4",
        ),
        (partial(gdkd, k=0, w0=1.0, w1=1.0, w2=1.0, temperature=4.0), "k=0 does not split"),
        (partial(gdkd, k=2.0, w0=1.0, w1=1.0, w2=1.0, temperature=4.0), "k=2.0 does not split"),
        (
            partial(abkd, alpha=0.0, beta=0.0, temperature=4.0),
            "alpha=0.0 and beta=0.0 must be greater than 0",
        ),
        (
            partial(abkd, alpha=0.5, beta=-0.5, temperature=4.0),
            "alpha=0.5 and beta=-0.5 must be greater than 0",
        ),
        (partial(sld, temperatures=[]), "temperatures=[] is not a list of numbers greater than 0"),
        (partial(sld, temperatures=[4.0, 0.0]), "temperatures=[4.0, 0.0] is not a list"),
        (partial(skd, temperature=4.0, ridge=0.0), "ridge=0.0 must be greater than 0"),
        (
            partial(skd, temperature=4.0, ridge=0.1, regions_per_image=3),
            "regions_per_image=3 does not divide the 4 rows of the logits",
        ),
        (
            partial(dist, beta=1.0, gamma=1.0, temperature=4.0, regions_per_image=0),
            "regions_per_image=0 does not divide the 4 rows of the logits",
        ),
    ],
)
def test_options_out_of_range_are_refused(loss: Callable[..., Tensor], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        loss(*a_batch(N=4, K=5))


def test_a_job_with_too_few_classes_for_gdkd_is_refused():
    loss = {"_target_": "sddlskd.losses.gdkd", "k": 5, "w0": 1, "w1": 1, "w2": 8, "temperature": 4}
    with pytest.raises(ValueError, match="k=5 does not split 2 classes; give an integer from 1 to"):
        try_loss(loss, 2)


# Recipes


@cache
def job_of(*overrides: str) -> Config:
    return composed(Path("/home/of/tests"), *overrides)


@each_newer
def test_the_recipe_of_a_loss_builds_it(name: str):
    job = job_of(f"recipe={name}", "distiller.temperature=3")
    assert (job.recipe, job.distiller.name, job.M, job.standardize) == (name, name, [1], False)
    loss = instantiate(job.distiller.loss, _partial_=True)
    assert loss.func is NEWER[name].func
    assert loss.keywords.get("temperature", 3.0) == 3.0
    check_objective(job, torch.device("cpu"))


def test_a_loss_that_compares_images_needs_all_of_them_in_one_process():
    cpu = torch.device("cpu")
    check_objective(job_of("recipe=rld", "trainer.devices=2"), cpu)
    message = "trainer.devices=2 cannot train distiller=dist: this loss compares all images of a"
    with pytest.raises(ValueError, match=f"^{re.escape(message)} batch; set trainer.devices=1$"):
        check_objective(job_of("recipe=dist", "trainer.devices=2"), cpu)


def test_pairs_and_imagenet_have_the_values_of_the_authors_files():
    def loss_of(*overrides: str) -> dict[str, object]:
        return job_of(*overrides).distiller.loss

    for pair, w1, w2 in (
        ("resnet32x4_resnet8x4", 2.0, 8.0),
        ("resnet32x4_shufflev2", 1.0, 8.0),
        ("resnet56_resnet20", 1.0, 1.0),
        ("vgg13_vgg8", 1.0, 6.0),
        ("wrn_40_2_wrn_40_1", 2.0, 6.0),
    ):
        loss = loss_of("recipe=gdkd", f"pair={pair}")
        assert (loss["w0"], loss["w1"], loss["w2"]) == (1.0, w1, w2)
    d = job_of("recipe=skd", "pair=resnet32x4_resnet8x4").distiller
    assert (d.ce_weight, d.kd_weight) == (0.5, 0.25)
    large = ("dataset=imagenet", "pair=imagenet_resnet50_mobilev1")
    assert loss_of(*large, "recipe=dist")["temperature"] == 1.0
    d = job_of(*large, "recipe=rld").distiller
    assert (d.temperature, d.warmup_epochs, d.loss["beta"]) == (1.0, 1, 2.0)
    d = job_of(*large, "recipe=gdkd").distiller
    assert (d.temperature, d.warmup_epochs) == (1.0, 1)
    assert [d.loss[key] for key in ("w0", "w1", "w2")] == [0.5, 2.0, 2.0]


@each_newer
def test_the_documentation_has_the_weights_of_the_recipe(name: str):
    text = Path(__file__).parents[1].joinpath("docs", "methods.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {METHOD_NAMES[name]} \| `{name}` \|.*$", text, re.MULTILINE)
    _, _, reads, _, _, ce, loss, *_ = (cell.strip() for cell in row.strip("|").split("|"))
    d = job_of(f"recipe={name}", "teacher=resnet32x4", "student=vgg8").distiller
    assert (reads, float(ce)) == ("logit maps", d.ce_weight)
    assert loss.startswith(f"{METHOD_NAMES[name]}, weight {d.kd_weight:g}")
    if "temperature" in d.loss:
        assert f"T = {d.temperature:g}" in loss
