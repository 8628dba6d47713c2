"""The learnt temperature of CTKD: its range, its reversed gradient, and its place in a run."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from sddlskd.data.device import Batch
from sddlskd.distill import ScaleDecoupled
from sddlskd.losses import kd
from sddlskd.methods.ctkd import LearnedTemperature
from sddlskd.models import Taps
from sddlskd.training.objective import Objective


def test_the_temperature_begins_as_its_authors_code_does() -> None:
    # start + span * sigmoid(1): shared notes on CTKD give 15.62, and 31.2 for LSKD's range
    assert LearnedTemperature()(1).item() == pytest.approx(15.62, abs=0.005)
    assert LearnedTemperature(start=2.0, span=40.0)(1).item() == pytest.approx(31.24, abs=0.005)


@pytest.mark.parametrize(("epoch", "factor"), [(1, -0.0245), (2, -0.0955), (10, -1.0), (99, -1.0)])
def test_the_gradient_is_reversed_more_and_more(epoch: int, factor: float) -> None:
    temperature = LearnedTemperature().double()
    (3 * temperature(epoch)).backward()
    s = 1 / (1 + math.exp(-1.0))
    assert temperature.global_T.grad is not None
    assert temperature.global_T.grad.item() == pytest.approx(
        factor * 3 * 20 * s * (1 - s), rel=2e-3
    )


def test_the_gradient_goes_through_the_squared_temperature_too() -> None:
    torch.manual_seed(0)
    student_map, teacher_map = torch.randn(2, 6, 5, 1, 1, dtype=torch.float64)
    target = torch.arange(6) % 5
    objective = Objective(
        ScaleDecoupled(partial(kd, temperature=4.0), [1]),
        ce_weight=0.1,
        kd_weight=0.9,
        warmup_epochs=1,
        temperature=LearnedTemperature().double(),
    )
    batch = Batch(torch.empty(6, 3, 1, 1), target, target, views=None, epoch=10)
    losses = objective.losses(Taps.of_map(student_map), Taps.of_map(teacher_map), batch)
    losses["loss"].backward()

    theta = torch.ones(1, dtype=torch.float64, requires_grad=True)
    T = 1 + 20 * torch.sigmoid(theta)
    student, teacher = student_map[..., 0, 0], teacher_map[..., 0, 0]
    kl = F.kl_div((student / T).log_softmax(1), (teacher / T).softmax(1), reduction="batchmean")
    (0.9 * T**2 * kl).backward()
    learnt = objective.temperature.global_T.grad
    assert theta.grad is not None
    assert learnt.item() == pytest.approx(-theta.grad.item(), rel=1e-9)
    assert losses["temperature"].item() == pytest.approx(T.item())
    assert "temperature" in objective.names


@pytest.mark.parametrize("name", ["start", "span", "ramp_epochs"])
def test_numbers_that_give_no_temperature_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be greater than 0"):
        LearnedTemperature(**{name: 0})
