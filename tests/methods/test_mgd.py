"""MGD against a computation image by image, and its masks."""

import pytest
import torch
import torch.nn.functional as F

from sddlskd.methods import Taps, create
from sddlskd.methods.mgd import MGD
from tests.methods.drawn import STUDENT, TEACHER, assert_same, batch, detached, taps


def mgd(student: Taps, teacher: Taps, **options: object) -> MGD:
    torch.manual_seed(0)
    method = create("mgd", student, teacher, **({"seed": 3, "ratio": 0.4} | options)).double()
    assert isinstance(method, MGD)
    return method


@pytest.mark.parametrize("mask", ["channel", "cell"])
@pytest.mark.parametrize("channels", [5, 8])
def test_loss_and_gradients(mask: str, channels: int) -> None:
    student = taps((*STUDENT[:3], (channels, 2)), seed=1)
    teacher = taps(TEACHER, seed=2)
    method = mgd(student, teacher, mask=mask)
    assert (method.align is None) == (channels == 8)
    expected = torch.zeros((), dtype=torch.float64)
    masked = 0
    for b in range(5):
        own = student.stages[-1][b : b + 1]
        if method.align is not None:
            weight, bias = method.align.weight[:, :, 0, 0], method.align.bias
            own = torch.einsum("tc,bchw->bthw", weight, own) + bias[:, None, None]  # type: ignore[index]
        alone = batch()._replace(index=torch.tensor([b]), labels=torch.tensor([b % 3]))
        kept = method._kept(own, alone)
        assert set(kept.unique().tolist()) <= {0.0, 1.0}
        masked += int((kept == 0).sum())
        first, _, second = method.generation
        generated = second(F.relu(first(own * kept)))
        target = F.adaptive_avg_pool2d(teacher.stages[-1][b : b + 1].detach(), 2)
        expected = expected + ((generated - target) ** 2).sum() / 5
    assert masked > 0
    assert_same(method, expected, student, teacher)


def test_the_mask_depends_on_seed_epoch_and_image_alone() -> None:
    student, teacher = taps(STUDENT, images=40), taps(TEACHER, images=40)
    method, whole = mgd(student, teacher), batch(40)
    kept = method._kept(teacher.stages[-1], whole)
    assert kept.shape == (40, 8, 1, 1)
    assert 0.5 < kept.mean() < 0.7  # 0.6 plus or minus 3.5 deviations
    torch.manual_seed(9)
    assert torch.equal(method._kept(teacher.stages[-1], whole), kept)
    assert not torch.equal(method._kept(teacher.stages[-1], whole._replace(epoch=2)), kept)
    assert not torch.equal(mgd(student, teacher, seed=4)._kept(teacher.stages[-1], whole), kept)
    cells = mgd(student, teacher, mask="cell")._kept(teacher.stages[-1], whole)
    assert cells.shape == (40, 1, 4, 4)


def test_without_a_mask_nothing_is_random() -> None:
    student, teacher = taps(STUDENT), detached(taps(TEACHER))
    method = mgd(student, teacher, ratio=0)
    first = method(student, teacher, batch(epoch=1)).item()
    assert method(student, teacher, batch(epoch=2)).item() == first


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ratio": 1.0}, r"ratio=1.0 must lie in \[0, 1\)"),
        ({"mask": "row"}, "mask='row' is unknown"),
    ],
)
def test_what_is_refused(options: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        mgd(taps(STUDENT), taps(TEACHER), **options)
