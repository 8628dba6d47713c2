import pytest

from sddlskd.methods import create
from tests.methods import drawn


def probabilities(pooled_BD, eps):
    images = range(len(pooled_BD))
    unit = [row / ((row**2).sum().sqrt() + eps) for row in pooled_BD]
    near = [[((unit[i] * unit[j]).sum() + 1) / 2 for j in images] for i in images]
    return [[entry / sum(row) for entry in row] for row in near]


@pytest.mark.parametrize("eps", [1e-7, 0.1])
def test_the_loss_is_the_mean_of_p_log_p_over_q(eps: float) -> None:
    student = drawn.taps(drawn.STUDENT, 6, seed=1)
    teacher = drawn.taps(drawn.TEACHER, 9, seed=2)
    q = probabilities(student.pooled, eps)
    p = probabilities(teacher.pooled.detach(), eps)
    pairs = [(p[i][j], q[i][j]) for i in range(5) for j in range(5)]
    expected = sum(a * ((a + eps) / (b + eps)).log() for a, b in pairs) / 25
    drawn.assert_same(create("pkt", student, teacher, eps=eps), expected, student, teacher)


def test_equal_networks_have_no_loss() -> None:
    taps = drawn.taps(drawn.STUDENT)
    loss = create("pkt", taps, taps)(taps, drawn.detached(taps), drawn.batch())
    assert loss.item() == 0


def test_eps_is_positive() -> None:
    taps = drawn.taps(drawn.STUDENT)
    with pytest.raises(ValueError, match="eps=0 must be greater than 0"):
        create("pkt", taps, taps, eps=0)
