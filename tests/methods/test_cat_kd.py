"""CAT-KD against numbers worked by hand and loops over classes."""

import pytest
import torch
from torch import Tensor

from sddlskd.methods import create
from tests.methods.drawn import STUDENT, TEACHER, assert_same, batch, detached, taps


def pooled(map_HW: Tensor, side: int) -> Tensor:
    """Return the means of the cells of a square map whose side is a multiple of `side`."""
    step = len(map_HW) // side
    rows = [
        [map_HW[i * step : (i + 1) * step, j * step : (j + 1) * step].mean() for j in range(side)]
        for i in range(side)
    ]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("binarize", [True, False])
def test_loss_and_gradients(normalize: bool, binarize: bool) -> None:
    # Maps of 4x4 (student) and 8x8 (teacher)
    student = taps(STUDENT[:3], seed=1)
    teacher = taps(TEACHER[:3], seed=2)
    expected = torch.zeros((), dtype=torch.float64)
    for b in range(5):
        for k in range(3):
            target = teacher.logit_map[b, k].detach()
            if binarize:
                target = (target - target.abs().mean() > 0).double()
            maps = [pooled(student.logit_map[b, k], 2), pooled(target, 2)]
            if normalize:
                maps = [one / (one**2).sum().sqrt().clamp(min=1e-12) for one in maps]
            expected = expected + ((maps[0] - maps[1]) ** 2).sum() / (5 * 3 * 4)
    method = create("cat_kd", student, teacher, normalize=normalize, binarize=binarize)
    assert_same(method, expected, student, teacher)


def test_by_hand() -> None:
    student, teacher = taps(STUDENT, images=1, classes=1), taps(TEACHER, images=1, classes=1)
    student = student._replace(logit_map=torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]]))
    teacher = teacher._replace(logit_map=torch.tensor([[[[0.0, 2.0], [0.0, 0.0]]]]))
    # (0.6, 0, 0, 0.8) against (0, 1, 0, 0): (0.36 + 1 + 0.64) / 4
    loss = create("cat_kd", student, teacher)(student, teacher, batch(1))
    assert loss.item() == pytest.approx(0.5)
    # A resolution of 1 leaves the mean logits, 7 / 4 and 2 / 4.
    loss = create("cat_kd", student, teacher, resolution=1, normalize=False)(
        student, teacher, batch(1)
    )
    assert loss.item() == pytest.approx(1.25**2)


def test_it_reads_the_logit_maps_alone() -> None:
    student, teacher = taps(STUDENT), detached(taps(TEACHER))
    bare = [type(shown).of_map(shown.logit_map) for shown in (student, teacher)]
    method = create("cat_kd", *bare)
    assert method(*bare, batch()).item() == method(student, teacher, batch()).item()
