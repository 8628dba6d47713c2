"""CC against numbers worked by hand and loops over pairs of images."""

import math

import pytest
import torch
from torch import Tensor

from sddlskd.methods import create
from sddlskd.methods.cc import CC
from tests.methods.drawn import STUDENT, TEACHER, assert_same, batch, detached, taps


def test_released_form_by_hand() -> None:
    student, teacher = taps(STUDENT, 2, images=3), taps(TEACHER, 2, images=3)
    student = student._replace(pooled=torch.tensor([[1.0, 2.0], [0.0, 4.0], [5.0, 1.0]]))
    teacher = teacher._replace(pooled=torch.tensor([[3.0, 1.0], [1.0, 1.0], [5.0, 4.0]]))
    method = create("cc", student, teacher, dim=2)
    for embed in (method.embed_s, method.embed_t):
        torch.nn.init.eye_(embed.linear.weight)
        torch.nn.init.zeros_(embed.linear.bias)
    # |differences|: (2, 1), (1, 3), (0, 3); products of neighbours: 2 + 3 = 5 and 0 + 9 = 9
    assert method(student, teacher, batch(3)).item() == 7.0


def test_released_form() -> None:
    student, teacher = taps(STUDENT, 6, seed=1), taps(TEACHER, 9, seed=2)
    torch.manual_seed(0)
    method = create("cc", student, teacher, dim=4).double()
    own, other = embeddings(method, student.pooled, teacher.pooled.detach())
    terms = [
        (own[b, d] - other[b, d]).abs() * (own[b + 1, d] - other[b + 1, d]).abs()
        for b in range(4)
        for d in range(4)
    ]
    assert_same(method, sum(terms[1:], terms[0]) / 4, student, teacher)


def test_gaussian_form() -> None:
    student, teacher = taps(STUDENT, 6, seed=1), taps(TEACHER, 9, seed=2)
    torch.manual_seed(0)
    method = create("cc", student, teacher, dim=4, form="gaussian", gamma=0.3, order=2).double()
    own, other = embeddings(method, student.pooled, teacher.pooled.detach())
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            expected = expected + (series(own[i], own[j]) - series(other[i], other[j])) ** 2 / 25
    assert_same(method, expected, student, teacher)


def test_gaussian_series_tends_to_the_kernel() -> None:
    student = taps(STUDENT, 6, seed=1)
    method = create("cc", student, student, form="gaussian", order=12)
    assert isinstance(method, CC)
    x_BD = torch.randn(4, 5)
    unit_BD = x_BD / x_BD.norm(dim=1, keepdim=True)
    kernel_BB = torch.exp(-0.4 * torch.cdist(unit_BD, unit_BD) ** 2)
    torch.testing.assert_close(method._kernel(x_BD), kernel_BB)


@pytest.mark.parametrize("form", ["neighbours", "gaussian"])
def test_one_image(form: str) -> None:
    student, teacher = taps(STUDENT, images=1), taps(TEACHER, images=1)
    method = create("cc", student, teacher, form=form).double()
    assert method(student, detached(teacher), batch(1)).item() == pytest.approx(0)


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="form='x' is unknown; choose one of: neighbours"):
        create("cc", taps(STUDENT), taps(TEACHER), form="x")


def embeddings(method: torch.nn.Module, own: Tensor, other: Tensor) -> list[Tensor]:
    pairs = ((method.embed_s, own), (method.embed_t, other))
    return [x @ embed.linear.weight.T + embed.linear.bias for embed, x in pairs]  # type: ignore[union-attr]


def series(x: Tensor, y: Tensor) -> Tensor:
    """Return exp(-2 gamma) (1 + 2 gamma x.y + (2 gamma x.y)^2 / 2) for unit vectors x, y."""
    product = 0.6 * (x @ y) / (x @ x).sqrt() / (y @ y).sqrt()
    return math.exp(-0.6) * (1 + product + product**2 / 2)
