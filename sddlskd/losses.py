"""Distillation losses of logits, with one value per sample.

Shapes: N samples (or regions of samples), K classes.

Every loss takes the logits `student_NK` and `teacher_NK` and the class ids `target_N` (int64). The
loss returns `loss_N`, which the caller weights and reduces. Any callable of this form can serve as
a loss.

Losses are computed in float32 (float64 stays float64), with autocast disabled. They work on
log-probabilities, so that no loss takes the logarithm of a probability that has underflowed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["dkd", "kd", "nkd"]


def _log_probabilities(logits_NK: Tensor, temperature: float) -> Tensor:
    """Return log softmax(z / T) over the classes in at least float32, with autocast disabled."""
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
        target_N: unused; a parameter only so that all losses have the same signature.
        temperature: T, greater than 0 (not checked).

    Returns:
        loss_N, (N,), in float32 (float64 for float64 logits).
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
    - TCKD compares the binary distributions (target class, all other classes).
    - NCKD compares the distributions over the K-1 other classes, rescaled to sum to 1. The target
      is excluded exactly; the released code subtracts 1000 from the target's logit instead.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", Eq. 7.

    Args:
        student_NK: logits of the student, (N, K).
        teacher_NK: logits of the teacher, (N, K).
        target_N: class ids, int64, (N,).
        alpha: weight of TCKD.
        beta: weight of NCKD.
        temperature: T, greater than 0 (not checked).

    Returns:
        loss_N, (N,), in float32 (float64 for float64 logits).
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
        target_N: class ids, int64, (N,).
        gamma: weight of the second term.
        temperature: T of the second term, greater than 0 (not checked).
        exclude_target: whether the second term excludes the target class, as in the paper. If
            false, the second term is the cross-entropy over all K classes, as in the released code
            of SDD and NKD, in which the mask has no effect.

    Returns:
        loss_N, (N,), in float32 (float64 for float64 logits).
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
