from itertools import pairwise
from typing import Any

import pytest
import torch

from sddlskd.methods import create
from sddlskd.methods.kdsvd import _right_vectors
from tests.methods import drawn

SHAPES = ((3, 8), (4, 8), (6, 4), (5, 4))
OTHER = ((4, 8), (7, 8), (5, 4), (8, 4))


def vectors(map_CHW, count):
    """Return the first singular vectors and values of one image by torch's differentiable SVD."""
    _, values, rows = torch.linalg.svd(map_CHW.flatten(0, 1), full_matrices=False)
    return list(rows[:count]), values[:count]


def matched(own_CHW, other_CHW, k):
    """Return the pairs of vectors of one image, times the teacher's singular values."""
    theirs, values = vectors(other_CHW, k)
    values = values / values.norm()
    found = []
    for vector, value in zip(theirs, values, strict=True):
        vector = max((vector, -vector), key=lambda v: v.max())
        cosines = [(mine @ vector, mine) for mine in vectors(own_CHW, k + 3)[0]]
        cosine, mine = max(cosines, key=lambda pair: abs(pair[0].item()))
        found.append((mine * torch.sign(cosine.detach()) * value, vector * value))
    return found


@pytest.mark.parametrize(("k", "signed"), [(1, False), (1, True), (3, True)])
def test_the_loss_compares_successive_stages(k: int, signed: bool) -> None:
    student = drawn.taps(SHAPES, seed=1, images=2, signed=signed)
    teacher = drawn.taps(OTHER, seed=2, images=2, signed=signed)
    expected = 0
    for b in range(2):
        stages = [
            matched(own[b], other[b].detach(), k)
            for own, other in zip(student.stages[1:], teacher.stages[1:], strict=True)
        ]
        for before, now in pairwise(stages):
            for (f0, g0), (f1, g1) in zip(before, now, strict=True):
                for w in range(len(f1)):
                    own_V = torch.exp(-((f1[w] - f0) ** 2) / 8)
                    other_V = torch.exp(-((g1[w] - g0) ** 2) / 8)
                    expected = expected + ((own_V - other_V) ** 2).sum() / 2
    drawn.assert_same(create("kdsvd", student, teacher, k=k), expected, student, teacher)


def test_the_sign_of_the_teacher_s_vectors_does_not_matter(monkeypatch) -> None:
    student, teacher = drawn.taps(SHAPES, seed=1), drawn.taps(OTHER, seed=2)
    method = create("kdsvd", student, teacher, k=2)
    expected = method(student, teacher, drawn.batch())
    svd = torch.linalg.svd
    flips = iter([1, -1, -1, 1, 1, -1] * 3)

    def flipped(*args, **options):
        u, s, v = svd(*args, **options)
        flip = next(flips)
        return flip * u, s, flip * v

    monkeypatch.setattr(torch.linalg, "svd", flipped)
    assert torch.allclose(method(student, teacher, drawn.batch()), expected, atol=1e-12)


def test_double_precision_is_kept() -> None:
    student, teacher = drawn.taps(SHAPES, seed=1), drawn.taps(OTHER, seed=2)
    method = create("kdsvd", student, teacher)
    double = method(student, teacher, drawn.batch())
    rounded = [
        taps._replace(stages=tuple(stage.float() for stage in taps.stages))
        for taps in (student, teacher)
    ]
    single = method(*rounded, drawn.batch())
    assert (double.dtype, single.dtype) == (torch.float64, torch.float32)
    assert 0 < (single - double).abs() < 1e-5


def test_a_map_without_values_has_finite_gradients() -> None:
    student, teacher = drawn.taps(SHAPES, seed=1), drawn.taps(OTHER, seed=2)
    dead = torch.zeros_like(student.stages[2], requires_grad=True)
    student = student._replace(stages=(*student.stages[:2], dead, student.stages[3]))
    create("kdsvd", student, teacher)(student, teacher, drawn.batch()).backward()
    assert torch.isfinite(dead.grad).all()
    assert torch.isfinite(student.stages[1].grad).all()


def test_equal_singular_values_have_finite_gradients() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, 2.0])).double()[None].requires_grad_()
    _right_vectors(matrix, 2).square().sum().backward()
    assert torch.isfinite(matrix.grad).all()


def test_a_matrix_with_fewer_rows_than_columns_has_all_vectors() -> None:
    taps = drawn.taps(((1, 4), (1, 4), (1, 4)))
    wide = [stage[:, :, :1] for stage in taps.stages]
    taps = taps._replace(stages=tuple(wide))
    loss = create("kdsvd", taps, taps, k=4)(taps, taps, drawn.batch())
    assert torch.allclose(loss, torch.zeros_like(loss), atol=1e-12)


def test_stages_of_other_widths_are_refused() -> None:
    student, teacher = drawn.taps(drawn.STUDENT), drawn.taps(drawn.TEACHER)
    message = r"maps have widths \[8, 4, 2\] and the teacher's \[16, 8, 4\]; KDSVD needs equal"
    with pytest.raises(ValueError, match=message):
        create("kdsvd", student, teacher)


def test_one_stage_is_refused() -> None:
    taps = drawn.taps(SHAPES[:2])
    with pytest.raises(ValueError, match="needs two after the stem"):
        create("kdsvd", taps, taps)


@pytest.mark.parametrize("k", [0, 5, 1.5, "a"])
def test_k_is_bounded_by_the_narrowest_map(k: Any) -> None:
    taps = drawn.taps(SHAPES)
    with pytest.raises(ValueError, match=rf"k={k} must be in 1\.\.4"):
        create("kdsvd", taps, taps, k=k)
