"""Distillation losses of logits, with one value per sample.

Shapes: N samples (or regions of samples), K classes; B images and R regions of each, N = B*R.

Every loss takes the logits `student_NK` and `teacher_NK` and the class ids `target_N` (int64). The
loss returns `loss_N`, which the caller weights and reduces. Any callable of this form can serve as
a loss.

A loss that compares images with each other, such as `dist` and `skd`, takes a further keyword,
`regions_per_image`. Row b*R + r is region r of image b, and only rows of the same region are
compared.

`mld` is for images with several labels: in place of class ids it takes `labels_NK`, which is 1 for
the classes that an image has and 0 for the others.

Losses are computed in float32 (float64 stays float64), with autocast disabled. They work on
log-probabilities, so that no loss takes the logarithm of a probability that has underflowed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["abkd", "dist", "dkd", "gdkd", "kd", "mld", "nkd", "rld", "skd", "sld", "ttm", "wttm"]


def _log_probabilities(logits_NK: Tensor, temperature: float) -> Tensor:
    """Return log softmax(z / T) over the classes in at least float32, with autocast disabled."""
    with torch.autocast(logits_NK.device.type, enabled=False):
        wide = torch.promote_types(logits_NK.dtype, torch.float32)
        return F.log_softmax(logits_NK.to(wide) / temperature, dim=-1)


def _kl_divergence(log_p_NK: Tensor, log_q_NK: Tensor) -> Tensor:
    """Return KL(p || q) of each row, (N,), from log-probabilities."""
    return F.kl_div(log_q_NK, log_p_NK, reduction="none", log_target=True).sum(-1)


def _binary_divergence(
    log_p_N: Tensor, log_rest_p_N: Tensor, log_q_N: Tensor, log_rest_q_N: Tensor
) -> Tensor:
    """Return KL((p, 1 - p) || (q, 1 - q)), (N,), from the logarithms of the four probabilities."""
    return _kl_divergence(
        torch.stack((log_p_N, log_rest_p_N), 1), torch.stack((log_q_N, log_rest_q_N), 1)
    )


def _by_region(x_NK: Tensor, regions_per_image: int) -> Tensor:
    """Return the rows of a batch as (B, R, K), with R = `regions_per_image`.

    Raise ValueError if R is less than 1, or if the number of rows is not a multiple of R.
    """
    N, K = x_NK.shape
    if regions_per_image < 1 or N % regions_per_image:
        raise ValueError(
            f"regions_per_image={regions_per_image} does not divide the {N} rows of the logits"
        )
    return x_NK.reshape(N // regions_per_image, regions_per_image, K)


def _unit(x: Tensor, dim: int, tolerance: float = 0.0) -> Tensor:
    """Return `x` divided by its length along `dim`; 0 if the length is at most `tolerance`."""
    length: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    nothing = length <= tolerance
    return (x / length.masked_fill(nothing, 1.0)).masked_fill(nothing, 0.0)


def _unit_deviations(log_p_BRK: Tensor, dim: int) -> Tensor:
    """Return the probabilities minus their mean over `dim`, scaled to length 1 along `dim`.

    1 minus Pearson's correlation of two sets of probabilities is half the squared distance of these
    vectors. Equal probabilities have no correlation; the result is 0 for them.
    """
    # A correlation does not depend on the scale. A largest value of 1 avoids underflow.
    scaled_BRK = (log_p_BRK - log_p_BRK.detach().amax(dim, keepdim=True)).exp()
    # The rounding errors of equal probabilities stay below this length.
    rounding = 8 * torch.finfo(scaled_BRK.dtype).eps * scaled_BRK.shape[dim] ** 0.5
    return _unit(scaled_BRK - scaled_BRK.mean(dim, keepdim=True), dim, rounding)


def _split_off_target(
    logits_NK: Tensor, target_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the softmax at `temperature` into the target class and the other classes.

    Return log p_target (N,), log(1 - p_target) (N,), and the log-probabilities (N, K-1) of the
    other classes, which are rescaled so that their probabilities sum to 1.
    """
    log_p_NK = _log_probabilities(logits_NK, temperature)
    N, K = log_p_NK.shape
    others_NK1 = torch.arange(K - 1, device=target_N.device).expand(N, K - 1)
    others_NK1 = others_NK1 + (others_NK1 >= target_N[:, None])  # class ids without the target
    log_others_NK1 = log_p_NK.gather(1, others_NK1)
    # 1 - p_target would lose all digits if p_target is close to 1; this sum does not.
    log_rest_N = log_others_NK1.logsumexp(1)
    return (
        log_p_NK.gather(1, target_N[:, None])[:, 0],
        log_rest_N,
        log_others_NK1 - log_rest_N[:, None],
    )


def kd(student_NK: Tensor, teacher_NK: Tensor, target_N: Tensor, *, temperature: float) -> Tensor:
    """Return the knowledge distillation loss T^2 * KL(teacher || student) of each sample.

    Both distributions are softmax(logits / T).

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: not read. The parameter exists so that all losses take the same three tensors.
        temperature: T, a number or a scalar tensor, greater than 0 (not checked).

    Returns:
        Loss of each sample, (N,), in float32, or in float64 for float64 logits.
    """
    log_teacher_NK = _log_probabilities(teacher_NK, temperature)
    log_student_NK = _log_probabilities(student_NK, temperature)
    return temperature**2 * _kl_divergence(log_teacher_NK, log_student_NK)


def dkd(
    student_NK: Tensor,
    teacher_NK: Tensor,
    target_N: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """Return the decoupled knowledge distillation (DKD) loss of each sample.

    The loss is T^2 * (alpha * TCKD + beta * NCKD). Both terms are KL(teacher || student) of
    distributions from softmax(logits / T):
    - TCKD compares the distributions over two events: the target class, and any other class.
    - NCKD compares the distributions over the K-1 classes other than the target, rescaled to sum
      to 1. The released code keeps the target class instead, with 1000 subtracted from its logit.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", Eq. 7.

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: target class of each sample, int64, (N,), in 0..K-1.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T, a number or a scalar tensor, greater than 0 (not checked).

    Returns:
        Loss of each sample, (N,), in float32, or in float64 for float64 logits.
    """
    s_target_N, s_rest_N, s_others_NK1 = _split_off_target(student_NK, target_N, temperature)
    t_target_N, t_rest_N, t_others_NK1 = _split_off_target(teacher_NK, target_N, temperature)
    tckd_N = _binary_divergence(t_target_N, t_rest_N, s_target_N, s_rest_N)
    nckd_N = _kl_divergence(t_others_NK1, s_others_NK1)
    return temperature**2 * (alpha * tckd_N + beta * nckd_N)


def nkd(
    student_NK: Tensor,
    teacher_NK: Tensor,
    target_N: Tensor,
    *,
    gamma: float,
    temperature: float,
    exclude_target: bool = True,
) -> Tensor:
    """Return the normalised knowledge distillation (NKD) loss of each sample.

    The loss is the sum of two terms:
    - Target class: -p_t * log p_s, with p_t the teacher's and p_s the student's probability of the
      target class at temperature 1.
    - Other classes: gamma * T^2 times the cross-entropy of the student's distribution over the K-1
      other classes, with the teacher's distribution as the target. Both distributions come from
      softmax(logits / T) and are rescaled to sum to 1.

    Source: Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation", Eq. 8.

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: target class of each sample, int64, (N,), in 0..K-1.
        gamma: weight of the second term.
        temperature: T of the second term, a number or a scalar tensor, greater than 0 (not
            checked).
        exclude_target: whether the second term leaves out the target class, as in the paper. If
            false, the second term is the cross-entropy over all K classes, as in the released code
            of SDD and NKD.

    Returns:
        Loss of each sample, (N,), in float32, or in float64 for float64 logits.
    """
    log_s_NK, log_t_NK = _log_probabilities(student_NK, 1.0), _log_probabilities(teacher_NK, 1.0)
    index_N1 = target_N[:, None]
    target_term_N = -(log_t_NK.gather(1, index_N1).exp() * log_s_NK.gather(1, index_N1))[:, 0]
    if exclude_target:
        s_NK, t_NK = (
            _split_off_target(z, target_N, temperature)[2] for z in (student_NK, teacher_NK)
        )
    else:
        s_NK, t_NK = (_log_probabilities(z, temperature) for z in (student_NK, teacher_NK))
    return target_term_N - gamma * temperature**2 * (t_NK.exp() * s_NK).sum(1)


def ttm(student_NK: Tensor, teacher_NK: Tensor, target_N: Tensor, *, gamma: float) -> Tensor:
    """Return the transformed teacher matching (TTM) loss KL(p^gamma || q) of each sample.

    p and q are softmax(logits) of teacher and student. p^gamma is rescaled to sum to 1, so it is
    softmax(gamma * logits): the teacher has the temperature 1 / gamma, the student 1.

    Source: Zheng and Yang 2024, "Knowledge Distillation Based on Transformed Teacher Matching"
    (ICLR 2024).

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: not read. The parameter exists so that all losses take the same three tensors.
        gamma: exponent of the teacher's probabilities, not negative; below 1 it flattens them.

    Returns:
        Loss of each sample, (N,), in float32, or in float64 for float64 logits.

    Raises:
        ValueError: If `gamma` is negative or NaN.
    """
    return _transformed_teacher(student_NK, teacher_NK, gamma)[0]


def wttm(student_NK: Tensor, teacher_NK: Tensor, target_N: Tensor, *, gamma: float) -> Tensor:
    """Return the weighted TTM (WTTM) loss of each sample.

    The loss is `ttm` times the sum over the classes of p^gamma, with p = softmax(logits) of the
    teacher. For a gamma between 0 and 1, this weight is 1 if the teacher is certain of a class, and
    grows to K^(1 - gamma) if its K probabilities are equal.

    Source: Zheng and Yang 2024, "Knowledge Distillation Based on Transformed Teacher Matching"
    (ICLR 2024).

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: not read. The parameter exists so that all losses take the same three tensors.
        gamma: exponent of the teacher's probabilities, not negative.

    Returns:
        Loss of each sample, (N,), in float32, or in float64 for float64 logits.

    Raises:
        ValueError: If `gamma` is negative or NaN.
    """
    loss_N, weight_N = _transformed_teacher(student_NK, teacher_NK, gamma)
    return weight_N * loss_N


def _transformed_teacher(
    student_NK: Tensor, teacher_NK: Tensor, gamma: float
) -> tuple[Tensor, Tensor]:
    """Return the TTM loss of each sample, and the sum of its p^gamma, both (N,).

    Raise ValueError if `gamma` is negative or NaN.
    """
    if not gamma >= 0:  # also true for NaN
        raise ValueError(f"gamma={gamma} must not be negative")
    log_power_NK = gamma * _log_probabilities(teacher_NK, 1.0)
    log_weight_N1 = log_power_NK.logsumexp(1, keepdim=True)
    loss_N = _kl_divergence(log_power_NK - log_weight_N1, _log_probabilities(student_NK, 1.0))
    return loss_N, log_weight_N1[:, 0].exp()


def rld(
    student_NK: Tensor,
    teacher_NK: Tensor,
    target_N: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
    alpha_temperature: float = 1.0,
) -> Tensor:
    """Return the refined logit distillation (RLD) loss of each sample.

    The loss is alpha * A^2 * SCD + beta * T^2 * MCD, with A = `alpha_temperature` and T =
    `temperature`. Both terms are KL(teacher || student):
    - SCD (sample confidence) compares binary distributions at temperature A: the teacher's (most
      probable class, all others) and the student's (target class, all others).
    - MCD (masked correlation) compares the distributions at temperature T over the classes whose
      teacher logit is below that of the target, rescaled to sum to 1. MCD is 0 if there is no such
      class.

    A wrong prediction of the teacher thus reaches the student only as a confidence in the target.

    Source: Sun et al. 2025, "Knowledge Distillation with Refined Logits" (ICCV 2025).

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: target class of each sample, int64, (N,), in 0..K-1.
        alpha: weight of SCD.
        beta: weight of MCD.
        temperature: T, a number or a scalar tensor, greater than 0 (not checked).
        alpha_temperature: A, greater than 0 (not checked).

    Returns:
        Loss of each sample, (N,), in float32, or in float64 for float64 logits.
    """
    s_target_N, s_rest_N, _ = _split_off_target(student_NK, target_N, alpha_temperature)
    t_top_N, t_rest_N, _ = _split_off_target(teacher_NK, teacher_NK.argmax(1), alpha_temperature)
    scd_N = _binary_divergence(t_top_N, t_rest_N, s_target_N, s_rest_N)

    left_out_NK = teacher_NK >= teacher_NK.gather(1, target_N[:, None])
    logs = []
    for z_NK in (teacher_NK, student_NK):
        log_p_NK = _log_probabilities(z_NK, temperature)
        log_sum_N1 = log_p_NK.masked_fill(left_out_NK, -torch.inf).logsumexp(1, keepdim=True)
        # Classes that are left out have equal entries in both networks, so they add 0.
        logs.append((log_p_NK - log_sum_N1).masked_fill(left_out_NK, 0.0))
    mcd_N = _kl_divergence(*logs)
    return alpha * alpha_temperature**2 * scd_N + beta * temperature**2 * mcd_N


def gdkd(
    student_NK: Tensor,
    teacher_NK: Tensor,
    target_N: Tensor,
    *,
    k: int,
    w0: float,
    w1: float,
    w2: float,
    temperature: float,
) -> Tensor:
    """Return the generalised decoupled knowledge distillation (GDKD) loss of each sample.

    The top classes are the k classes with the largest teacher logits. The loss is
    T^2 * (w0 * D0 + w1 * D1 + w2 * D2). All three terms are KL(teacher || student) of distributions
    from softmax(logits / T):
    - D0 compares the binary distributions (all top classes, all other classes).
    - D1 compares the distributions over the top classes, rescaled to sum to 1.
    - D2 compares the distributions over the other classes, rescaled to sum to 1.

    Source: "Generalized Decoupled Knowledge Distillation", arXiv:2512.04625 (2025).

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: not read. The parameter exists so that all losses take the same three tensors.
        k: number of top classes, from 1 to K - 1.
        w0: weight of D0.
        w1: weight of D1.
        w2: weight of D2.
        temperature: T, a number or a scalar tensor, greater than 0 (not checked).

    Returns:
        Loss of each sample, (N,), in float32, or in float64 for float64 logits.

    Raises:
        ValueError: If `k` is not an integer from 1 to K - 1.
    """
    K = teacher_NK.shape[1]
    if not isinstance(k, int) or not 1 <= k < K:
        raise ValueError(f"k={k} does not split {K} classes; give an integer from 1 to {K - 1}")
    order_NK = teacher_NK.argsort(1, descending=True)
    log_t_NK, log_s_NK = (
        _log_probabilities(z_NK, temperature).gather(1, order_NK)
        for z_NK in (teacher_NK, student_NK)
    )
    sums, within = [], []
    for group in (slice(k), slice(k, None)):
        t_Ng, s_Ng = log_t_NK[:, group], log_s_NK[:, group]
        t_sum_N1, s_sum_N1 = (x_Ng.logsumexp(1, keepdim=True) for x_Ng in (t_Ng, s_Ng))
        sums.append((t_sum_N1[:, 0], s_sum_N1[:, 0]))
        within.append(_kl_divergence(t_Ng - t_sum_N1, s_Ng - s_sum_N1))
    (t_top_N, s_top_N), (t_rest_N, s_rest_N) = sums
    d0_N = _binary_divergence(t_top_N, t_rest_N, s_top_N, s_rest_N)
    return temperature**2 * (w0 * d0_N + w1 * within[0] + w2 * within[1])


def abkd(
    student_NK: Tensor,
    teacher_NK: Tensor,
    target_N: Tensor,
    *,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """Return the alpha-beta divergence (ABKD) of teacher and student of each sample.

    With p and q the softmax(logits / T) of teacher and student, a = alpha and b = beta:

        loss = sum over the classes of [(a p^(a+b) + b q^(a+b)) / ((a + b) a b) - p^a q^b / (a b)]

    The loss has no factor T^2. For a = 1, it approaches KL(p || q) as b approaches 0.

    Source: Wang et al. 2025, "ABKD: Pursuing a Proper Allocation of the Probability Mass in
    Knowledge Distillation via alpha-beta-Divergence" (ICML 2025). The formula is that of its
    released code for alpha and beta other than 0.

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: not read. The parameter exists so that all losses take the same three tensors.
        alpha: exponent a, greater than 0.
        beta: exponent b, greater than 0.
        temperature: T, a number or a scalar tensor, greater than 0 (not checked).

    Returns:
        Loss of each sample, (N,), in float32, or in float64 for float64 logits.

    Raises:
        ValueError: If `alpha` or `beta` is not greater than 0. A negative power of a probability
            can be infinite, and at 0 the formula divides by 0.
    """
    if not (alpha > 0 and beta > 0):  # also true for NaN
        raise ValueError(
            f"alpha={alpha} and beta={beta} must be greater than 0; "
            "the limit alpha=1, beta=0 is the loss kd without its factor T^2"
        )
    log_p_NK = _log_probabilities(teacher_NK, temperature)
    log_q_NK = _log_probabilities(student_NK, temperature)
    both = alpha + beta
    own_NK = alpha * (both * log_p_NK).exp() + beta * (both * log_q_NK).exp()
    joint_NK = (alpha * log_p_NK + beta * log_q_NK).exp()
    return (own_NK / both - joint_NK).sum(1) / (alpha * beta)


def dist(
    student_NK: Tensor,
    teacher_NK: Tensor,
    target_N: Tensor,
    *,
    beta: float,
    gamma: float,
    temperature: float,
    regions_per_image: int = 1,
) -> Tensor:
    """Return the DIST loss of each sample, which compares correlations.

    The loss is T^2 * (beta * inter + gamma * intra), with p and q the softmax(logits / T) of
    teacher and student:
    - inter is 1 minus Pearson's correlation of p and q over the classes.
    - intra is the mean over the classes of 1 minus Pearson's correlation of p and q over the images
      of the batch. Each region has its own intra.

    intra is one number for all images of a region. The loss of a sample has its image's share of
    this number instead. 1 minus a correlation over the images is half the squared distance of two
    vectors of length 1, with one entry per image. The share of an image is the squared difference
    of its two entries, averaged over the classes and scaled such that the mean of the shares over
    the images is intra.

    There is no correlation if a network's probabilities are all equal over the classes or images.
    If this is so in both networks, as in a batch of one image, 1 minus the correlation counts as 0.
    If this is so in only one network, 1 minus the correlation counts as 1/2.

    Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher" (NeurIPS 2022). The
    factor T^2 is that of the released code. That code also adds 1e-8 to the product of the lengths
    that a correlation divides by, which is not done here.

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: not read. The parameter exists so that all losses take the same three tensors.
        beta: weight of inter.
        gamma: weight of intra.
        temperature: T, a number or a scalar tensor, greater than 0 (not checked).
        regions_per_image: R. Row b*R + r is region r of image b.

    Returns:
        Loss of each sample, (N,), in float32, or in float64 for float64 logits.

    Raises:
        ValueError: If `regions_per_image` is less than 1 or does not divide N.
    """
    log_p_BRK, log_q_BRK = (
        _by_region(_log_probabilities(z_NK, temperature), regions_per_image)
        for z_NK in (teacher_NK, student_NK)
    )
    B, _, K = log_p_BRK.shape
    inter_BR, intra_BR = (
        ((_unit_deviations(log_p_BRK, dim) - _unit_deviations(log_q_BRK, dim)) ** 2).sum(2) / 2
        for dim in (2, 0)
    )
    return temperature**2 * (beta * inter_BR + gamma * (B / K) * intra_BR).flatten()


def sld(
    student_NK: Tensor, teacher_NK: Tensor, target_N: Tensor, *, temperatures: Sequence[float]
) -> Tensor:
    """Return the teacher's part of the swapped logit distillation (SLD) loss of each sample.

    The loss is the sum of `kd` over the temperatures, with corrected logits of the teacher: the
    logit of the target and the largest logit change places. If the teacher is right, nothing
    changes.

    The other parts of SLD are not computed: the student's own swapped logits as a second teacher
    after epoch 150, and a second view of each image.

    Source: Limantoro et al. 2025, "Swapped Logit Distillation via Bi-level Teacher Alignment"
    (Multimedia Systems).

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: target class of each sample, int64, (N,), in 0..K-1.
        temperatures: the temperatures, each greater than 0.

    Returns:
        Loss of each sample, (N,), in float32, or in float64 for float64 logits.

    Raises:
        ValueError: If `temperatures` is empty, or holds a number that is not greater than 0.
    """
    if not temperatures or not all(T > 0 for T in temperatures):  # also true for NaN
        raise ValueError(
            f"temperatures={list(temperatures)} is not a list of numbers greater than 0; "
            "give a list such as [1,2,3,4,5,6]"
        )
    index_N1 = target_N[:, None]
    top_N1, top_index_N1 = teacher_NK.max(1, keepdim=True)
    swapped_NK = teacher_NK.scatter(1, top_index_N1, teacher_NK.gather(1, index_N1))
    swapped_NK = swapped_NK.scatter(1, index_N1, top_N1)
    return torch.stack(
        [kd(student_NK, swapped_NK, target_N, temperature=T) for T in temperatures]
    ).sum(0)


def skd(
    student_NK: Tensor,
    teacher_NK: Tensor,
    target_N: Tensor,
    *,
    temperature: float,
    ridge: float,
    regions_per_image: int = 1,
) -> Tensor:
    """Return the streamlined knowledge distillation (SKD) loss of each sample.

    The loss is `kd` plus a term that compares the directions of the logits of all images. For the B
    images in one region, let u and v be the logits (B, K) of student and teacher, each row divided
    by its length. With d the row of D that belongs to the image:

        D    = (u u^T - v v^T) / K, (B, B)
        term = sqrt(d^T (C + ridge * identity)^-1 d)

    C is the covariance of the rows of D, with the divisor B - 1. For a batch of one image, D and
    the term are 0. If d is 0, the gradient of the square root counts as 0. Logits that are all 0
    have no direction: their row of u or v is 0, and the term has no gradient for them.

    Source: "Streamlined Knowledge Distillation" (CVPR 2026), in the form of its released code.

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: not read. The parameter exists so that all losses take the same three tensors.
        temperature: T of `kd`, a number or a scalar tensor, greater than 0 (not checked).
        ridge: number added to the diagonal of C (Tikhonov regularisation), greater than 0.
        regions_per_image: R. Row b*R + r is region r of image b.

    Returns:
        Loss of each sample, (N,), in float32, or in float64 for float64 logits.

    Raises:
        ValueError: If `ridge` is not greater than 0, or if `regions_per_image` is less than 1 or
            does not divide N.
    """
    if not ridge > 0:  # also true for NaN
        raise ValueError(f"ridge={ridge} must be greater than 0")
    kd_N = kd(student_NK, teacher_NK, target_N, temperature=temperature)
    with torch.autocast(student_NK.device.type, enabled=False):
        u_RBK, v_RBK = (
            _unit(_by_region(z_NK.to(kd_N.dtype), regions_per_image), 2).transpose(0, 1)
            for z_NK in (student_NK, teacher_NK)
        )
        B, K = u_RBK.shape[1:]
        D_RBB = (u_RBK @ u_RBK.mT - v_RBK @ v_RBK.mT) / K
        centred_RBB = D_RBB - D_RBB.mean(1, keepdim=True)
        C_RBB = centred_RBB.mT @ centred_RBB / max(B - 1, 1)
        ridge_BB = ridge * torch.eye(B, dtype=D_RBB.dtype, device=D_RBB.device)
        # With C + ridge = L L^T, the term is the length of L^-1 d. Unlike `cholesky`, `cholesky_ex`
        # turns NaN into NaN instead of raising an error, and does not wait for the device.
        L_RBB = torch.linalg.cholesky_ex(C_RBB + ridge_BB).L
        whitened_RBB = torch.linalg.solve_triangular(L_RBB, D_RBB.mT, upper=False)
        term_RB: Tensor = torch.linalg.vector_norm(whitened_RBB, dim=1)
        return kd_N + term_RB.T.flatten()


def mld(
    student_NK: Tensor,
    teacher_NK: Tensor,
    labels_NK: Tensor,
    *,
    temperature: float,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Tensor:
    """Return the distillation loss of each sample for images with several labels (MLD).

    Every class is a problem of two events, present and absent, with the probability p = sigmoid(z /
    T) of "present". The loss is T^2 times the sum over the classes of KL(teacher || student) of
    these two events. A class that the sample has counts `alpha` times, and a class that it does not
    have counts `beta` times, as DKD weights the target class and the other classes.

    Source: Yang et al. 2023, "Multi-Label Knowledge Distillation" (ICCV), "multi-label logits
    distillation". The sum over the classes is that of the released code. There, T, alpha and beta
    are 1. The temperature follows Hinton et al. 2015, and the two weights are an addition of this
    package.

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        labels_NK: 1 for the classes of a sample and 0 for all other classes, (N, K), of any type.
        temperature: T, a number or a scalar tensor, greater than 0 (not checked).
        alpha: weight of the classes that a sample has.
        beta: weight of the classes that a sample does not have.

    Returns:
        Loss of each sample, (N,), in float32, or in float64 for float64 logits.
    """
    wide = torch.promote_types(student_NK.dtype, torch.float32)
    with torch.autocast(student_NK.device.type, enabled=False):
        student_NK, teacher_NK = (z.to(wide) / temperature for z in (student_NK, teacher_NK))
        present_NK = F.kl_div(
            F.logsigmoid(student_NK), F.logsigmoid(teacher_NK), reduction="none", log_target=True
        )
        absent_NK = F.kl_div(
            F.logsigmoid(-student_NK), F.logsigmoid(-teacher_NK), reduction="none", log_target=True
        )
        weight_NK = torch.where(labels_NK.bool(), alpha, beta)
        return temperature**2 * (weight_NK * (present_NK + absent_NK)).sum(-1)
