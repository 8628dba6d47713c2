"""Distillation losses: pure, unreduced functions of (student, teacher, target).

Shapes: N samples (or regions of samples), K classes.

Every loss takes `student_NK` and `teacher_NK` (logits) and `target_N` (int64 class ids) and returns
`loss_N`; the caller weights and reduces `loss_N`. A custom loss is any callable of that form.

Losses are computed in float32 (float64 stays float64) outside autocast. They use log-probabilities
throughout, so that no loss takes the logarithm of a probability that has underflowed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dkd", "kd", "nkd"]


def _log_probabilities(logits_NK: Tensor, temperature: float) -> Tensor:
    """Return log softmax(z / T) in at least float32, with autocast disabled."""
    with torch.autocast(logits_NK.device.type, enabled=False):
        wide = torch.promote_types(logits_NK.dtype, torch.float32)
        return F.log_softmax(logits_NK.to(wide) / temperature, dim=-1)


def _kl_divergence(log_p_NK: Tensor, log_q_NK: Tensor) -> Tensor:
    """Return KL(p || q) of each row, (N,), from log-probabilities."""
    return F.kl_div(log_q_NK, log_p_NK, reduction="none", log_target=True).sum(-1)


def _split_off_target(
    logits_NK: Tensor, target_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Split the softmax at `temperature` into the target class and the other classes.

    Returns log p_target (N,), log(1 - p_target) (N,), and the log-probabilities of the K-1 other
    classes, renormalised without the target (N, K-1).
    """
    log_p_NK = _log_probabilities(logits_NK, temperature)
    N, K = log_p_NK.shape
    others_NK1 = torch.arange(K - 1, device=target_N.device).expand(N, K - 1)
    others_NK1 = others_NK1 + (others_NK1 >= target_N[:, None])  # class ids without the target
    log_others_NK1 = log_p_NK.gather(1, others_NK1)
    # Computing 1 - p_target would cancel if p_target is close to 1; this sum stays exact.
    log_rest_N = log_others_NK1.logsumexp(1)
    return (
        log_p_NK.gather(1, target_N[:, None])[:, 0],
        log_rest_N,
        log_others_NK1 - log_rest_N[:, None],
    )


def kd(student_NK: Tensor, teacher_NK: Tensor, target_N: Tensor, *, temperature: float) -> Tensor:
    """Return the knowledge distillation loss T^2 * KL(teacher || student) at temperature T.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network".

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: unused; a parameter only so that all losses have the same signature.
        temperature: T, by which the logits are divided.

    Returns:
        The loss of each sample, (N,).
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
    """Return the decoupled knowledge distillation loss T^2 * (alpha * TCKD + beta * NCKD).

    TCKD is KL(teacher || student) of the binary distributions (target, rest). NCKD is
    KL(teacher || student) of the distributions over the K-1 other classes, which sum to 1 without
    the target. The released code removes the target from NCKD by subtracting 1000 from its logit;
    this function excludes the target exactly.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", Eq. 7.

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: class ids, int64, (N,).
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T, by which the logits are divided.

    Returns:
        The loss of each sample, (N,).
    """
    s_target_N, s_rest_N, s_others_NK1 = _split_off_target(student_NK, target_N, temperature)
    t_target_N, t_rest_N, t_others_NK1 = _split_off_target(teacher_NK, target_N, temperature)
    tckd_N = _kl_divergence(
        torch.stack((t_target_N, t_rest_N), 1), torch.stack((s_target_N, s_rest_N), 1)
    )
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
    """Return the normalised knowledge distillation (NKD) loss.

    The first term is -p_t * log p_s of the target class at T = 1, with p_t the teacher's and p_s
    the student's probability. The second term is gamma * T^2 * cross-entropy of the distributions
    over the other classes.

    Source: Yang et al. 2023, "From Knowledge Distillation to Self-Knowledge Distillation", Eq. 8.

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: class ids, int64, (N,).
        gamma: weight of the second term.
        temperature: T of the second term, by which the logits are divided.
        exclude_target: whether the second term excludes the target class, as in the paper. False
            reproduces the released SDD and NKD code, in which the mask has no effect: the second
            term is then the cross-entropy over all K classes.

    Returns:
        The loss of each sample, (N,).
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
