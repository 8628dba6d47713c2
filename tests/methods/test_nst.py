import pytest
import torch
import torch.nn.functional as F

from sddlskd.methods import create
from sddlskd.methods.base import Method
from tests.methods import drawn


def pooled(map_BCHW, side):
    step = map_BCHW.shape[2] // side
    cells = map_BCHW.unflatten(3, (side, step)).unflatten(2, (side, step))
    return cells.mean((3, 5))


def kernel(a_BCHW, b_BCHW):
    parts = [
        ((a / a.norm()) * (b / b.norm())).sum() ** 2
        for a_CHW, b_CHW in zip(a_BCHW, b_BCHW, strict=True)
        for a in a_CHW
        for b in b_CHW
    ]
    return sum(parts) / len(parts)


# The last stages have more pairs of channels than pairs of cells, so both ways of computing a
# kernel are covered.
@pytest.mark.parametrize("shapes", [(drawn.STUDENT, drawn.TEACHER), (drawn.TEACHER, drawn.STUDENT)])
def test_the_loss_is_the_discrepancy_of_the_channels(shapes: tuple) -> None:
    student = drawn.taps(shapes[0], seed=1, images=2)
    teacher = drawn.taps(shapes[1], seed=2, images=2)
    expected = 0
    for own, other in zip(student.stages[1:], teacher.stages[1:], strict=True):
        side = min(own.shape[2], other.shape[2])
        f, g = pooled(own, side), pooled(other.detach(), side)
        expected = expected + kernel(g, g) + kernel(f, f) - 2 * kernel(f, g)
    drawn.assert_same(create("nst", student, teacher), expected, student, teacher)


def test_a_dead_channel_has_finite_gradients() -> None:
    student, teacher = drawn.taps(drawn.STUDENT), drawn.taps(drawn.TEACHER)
    dead = torch.zeros_like(student.stages[2], requires_grad=True)
    stages = (*student.stages[:2], dead, student.stages[3])
    student = student._replace(stages=stages)
    create("nst", student, teacher)(student, teacher, drawn.batch()).backward()
    assert torch.isfinite(dead.grad).all()


class Broadcasting(Method):
    """NST as it must not be computed: with products of the size B x C x C x cells."""

    def forward(self, student, teacher, batch):
        parts = []
        for a, b in zip(student.stages[1:], teacher.stages[1:], strict=True):
            f, g = F.normalize(a.flatten(2), dim=2), F.normalize(b.flatten(2), dim=2)
            parts.append((f[:, None] * g[:, :, None]).sum(3).square().mean())
        return sum(parts)


def test_the_memory_of_a_batch_of_64_is_below_a_gibibyte() -> None:
    student, teacher = drawn.on_meta(drawn.RESNET8X4, 256), drawn.on_meta(drawn.RESNET32X4, 256)
    assert drawn.peak_bytes(create("nst", student, teacher), student, teacher) < 2**30
    assert drawn.peak_bytes(Broadcasting(student, teacher), student, teacher) > 2**30
