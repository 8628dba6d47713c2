import math

import pytest
import torch

from sddlskd.methods import create
from tests.methods import drawn
from tests.methods.test_nst import pooled

MORE = (*drawn.STUDENT, (7, 1))


def expected(method, pairs):
    """Return the negative log-likelihood, entry by entry."""
    loss = 0
    for (own, other), layers, scale_C in zip(
        pairs, method.regressors, method.log_scales, strict=True
    ):
        side = min(own.shape[2], other.shape[2])
        mean, goal = pooled(own, side), pooled(other.detach(), side)
        for conv in (layers[0], layers[2], layers[4]):
            mean = torch.einsum("bchw,oc->bohw", mean, conv.weight[:, :, 0, 0])
            if conv is not layers[4]:
                mean = mean.clamp(min=0)
        parts = []
        for c in range(goal.shape[1]):
            variance = torch.log(1 + torch.exp(scale_C[c])) + 1e-5
            parts.append((mean[:, c] - goal[:, c]) ** 2 / variance + torch.log(variance))
        loss = loss + torch.stack(parts).mean() / 2
    return loss


@pytest.mark.parametrize("alignment", ["strict", "from_end"])
@pytest.mark.parametrize("shapes", [(drawn.STUDENT, drawn.TEACHER), (drawn.TEACHER, drawn.STUDENT)])
def test_the_loss_is_the_negative_log_likelihood(shapes: tuple, alignment: str) -> None:
    student, teacher = drawn.taps(shapes[0], seed=1), drawn.taps(shapes[1], seed=2)
    method = create("vid", student, teacher, alignment=alignment).double()
    for scale in method.log_scales:
        torch.nn.init.normal_(scale)
    pairs = list(zip(student.stages[1:], teacher.stages[1:], strict=True))
    drawn.assert_same(method, expected(method, pairs), student, teacher)


def test_the_first_maps_are_paired_if_the_teacher_has_more() -> None:
    student, teacher = drawn.taps(drawn.STUDENT, seed=1), drawn.taps(MORE, seed=2)
    method = create("vid", student, teacher).double()
    pairs = list(zip(student.stages[1:], teacher.stages[1:4], strict=True))
    drawn.assert_same(method, expected(method, pairs), student, teacher)


@pytest.mark.parametrize("shapes", [(MORE, drawn.TEACHER), (drawn.TEACHER, MORE)])
def test_the_last_maps_are_paired_from_the_end(shapes: tuple) -> None:
    student, teacher = drawn.taps(shapes[0], seed=1), drawn.taps(shapes[1], seed=2)
    method = create("vid", student, teacher, alignment="from_end").double()
    pairs = list(zip(student.stages[-3:], teacher.stages[-3:], strict=True))
    drawn.assert_same(method, expected(method, pairs), student, teacher)


def test_the_variances_begin_at_five_and_are_trained() -> None:
    student, teacher = drawn.taps(drawn.STUDENT, seed=1), drawn.taps(drawn.TEACHER, seed=2)
    method = create("vid", student, teacher)
    scale = math.log(math.exp(5 - 1e-5) - 1)
    assert all(torch.allclose(each, torch.tensor(scale)) for each in method.log_scales)
    method.double()(student, teacher, drawn.batch()).backward()
    assert all(each.grad.any() for each in method.log_scales)


def test_the_variances_stay_if_they_are_not_trained() -> None:
    student, teacher = drawn.taps(drawn.STUDENT, seed=1), drawn.taps(drawn.TEACHER, seed=2)
    method = create("vid", student, teacher, train_variance=False).double()
    method(student, teacher, drawn.batch()).backward()
    assert not any(scale.requires_grad for scale in method.log_scales)
    assert "log_scales.0" in method.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "the student has 4 stages after the stem and the teacher 3; set alignment=from_end"),
        ({"alignment": "front"}, "alignment='front'; choose one of: strict, from_end"),
        ({"train_variance": "no"}, "train_variance='no' must be true or false"),
        ({"eps": 0}, "eps=0 must be greater than 0 and less than variance=5.0"),
        ({"variance": 1e-6}, "eps=1e-05 must be greater than 0 and less than variance=1e-06"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict, message: str) -> None:
    student, teacher = drawn.taps(MORE), drawn.taps(drawn.TEACHER)
    with pytest.raises(ValueError, match=message):
        create("vid", student, teacher, **options)


def test_a_large_variance_is_finite() -> None:
    taps = drawn.taps(drawn.STUDENT)
    method = create("vid", taps, taps, variance=1000)
    assert torch.allclose(method.log_scales[0], torch.tensor(1000.0))
