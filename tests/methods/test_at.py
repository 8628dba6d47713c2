"""AT against its formula, image by image."""

import pytest
import torch
import torch.nn.functional as F

from sddlskd import methods
from sddlskd.data.device import Batch
from sddlskd.models import Taps


def taps(*shapes: tuple[int, int], seed: int) -> Taps:
    """Return taps of three images with maps of these (channels, side)."""
    generator = torch.Generator().manual_seed(seed)
    stages = tuple(
        torch.randn(3, channels, side, side, generator=generator, dtype=torch.float64)
        for channels, side in shapes
    )
    return Taps(torch.zeros(3, 5, 1, 1), stages, (), stages[-1].mean((2, 3)))


BATCH = Batch(torch.empty(3, 3, 8, 8), torch.arange(3), torch.arange(3), None)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_the_loss_and_its_gradient_follow_the_formula(p: int) -> None:
    student = taps((4, 8), (6, 8), (8, 4), seed=0)
    teacher = taps((4, 8), (5, 4), (9, 8), (9, 2), seed=1)  # its last stage does not count
    for tensor in student.stages:
        tensor.requires_grad_()
    loss = methods.create("at", student, teacher, p=p)(student, teacher, BATCH)
    found = torch.autograd.grad(loss, student.stages[1:])
    expected = torch.zeros((), dtype=torch.float64)
    for own, other in (
        (student.stages[1], teacher.stages[1]),
        (student.stages[2], teacher.stages[2]),
    ):
        side = min(own.shape[2], other.shape[2])
        for image in range(3):
            q = []
            for map_CHW in (own[image], other[image]):
                small_CHW = F.adaptive_avg_pool2d(map_CHW, side)
                flat_A = (small_CHW**p).sum(0).flatten()
                q.append(flat_A / flat_A.square().sum().sqrt())
            expected = expected + (q[0] - q[1]).square().sum() / (3 * side * side)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for a, b in zip(found, torch.autograd.grad(expected, student.stages[1:]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("p", [0, -2, 1.5, "word"])
def test_what_is_no_power_is_refused(p: object) -> None:
    example = taps((4, 8), (6, 8), seed=0)
    with pytest.raises(ValueError, match="is no power"):
        methods.create("at", example, example, p=p)
