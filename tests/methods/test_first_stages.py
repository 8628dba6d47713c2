"""AB, FSP and FT: their losses, their refusals, and training with a first stage."""

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sddlskd.config import Config
from sddlskd.methods import Method, Taps, create
from sddlskd.models import create as network
from sddlskd.training.fit import fit
from sddlskd.training.run import Run
from tests.methods.drawn import (
    STUDENT,
    TEACHER,
    Shapes,
    assert_same,
    batch,
    detached,
    gradients,
    taps,
)
from tests.tiny import final, rows, same, tiny

# The teacher's channels with other sides
EQUAL: Shapes = ((4, 8), (7, 8), (5, 8), (8, 2))


def cells(map_BCHW: Tensor) -> list[tuple[int, ...]]:
    return list(torch.cartesian_prod(*map(torch.arange, map_BCHW.shape)).tolist())


def assert_first_stage(method: Method, expected: Tensor, student: Taps, teacher: Taps) -> None:
    """Check the loss of a method's first stage, and its gradients."""
    loss = method.first_stage(student, detached(teacher), batch())
    assert (loss.shape, loss.dtype) == ((), torch.float64)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    wanted = [*student.stages, *student.preacts[1:], *method.parameters()]
    for own, other in zip(gradients(loss, wanted), gradients(expected, wanted), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-9)


# AB


def hinge(own_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
    """Return the loss of one map, as a loop over its entries writes it."""
    total = torch.zeros((), dtype=torch.float64)
    for cell in cells(own_BCHW):
        own, other = own_BCHW[tuple(cell)], other_BCHW[tuple(cell)]
        if other <= 0 and own > -1:
            total = total + (own + 1) ** 2
        elif other > 0 and own <= 1:
            total = total + (own - 1) ** 2
    return total / len(own_BCHW)


def test_ab_is_the_hinge_of_the_connected_maps() -> None:
    small: Shapes = ((2, 4), (3, 4), (2, 2), (3, 1))
    large: Shapes = ((2, 8), (2, 2), (3, 4), (3, 1))
    student, teacher = taps(small, seed=1, images=3), taps(large, seed=2, images=3)
    method = create("ab", student, teacher).double()
    connected = []
    for connector, map_BCHW in zip(method.connectors, student.preacts[1:], strict=True):
        if isinstance(connector, torch.nn.Sequential):  # equal shapes need no connector
            connected.append(map_BCHW)
        else:
            connected.append(connector.bn(connector.conv(map_BCHW)))
    parts = [hinge(*maps) for maps in zip(connected, detached(teacher).preacts[1:], strict=True)]
    expected = 0.003 * (parts[0] / 4 + parts[1] / 2 + parts[2])
    assert expected > 0
    assert_first_stage(method, expected, student, teacher)
    assert [type(connector).__name__ for connector in method.connectors][2] == "Sequential"


def test_ab_serves_networks_without_maps_before_the_relu() -> None:
    student, teacher = taps(STUDENT), taps(TEACHER)
    of_stages = create("ab", student._replace(preacts=()), teacher).double()
    of_preacts = create("ab", student, teacher).double()
    of_preacts.load_state_dict(of_stages.state_dict())
    told = student._replace(preacts=(student.stages[0], *student.stages[1:]))
    loss = of_stages.first_stage(student._replace(preacts=()), detached(teacher), batch())
    assert torch.equal(loss, of_preacts.first_stage(told, detached(teacher), batch()))


def test_ab_refuses_other_numbers_of_stages() -> None:
    with pytest.raises(ValueError, match="student has 2 stages after the stem and the teacher 3"):
        create("ab", taps(STUDENT[:-1]), taps(TEACHER))


# FSP


def test_fsp_is_the_difference_of_the_matrices() -> None:
    student, teacher = taps(EQUAL, seed=1), taps(TEACHER, seed=2)

    def matrix(first: Tensor, second: Tensor) -> Tensor:
        side = min(first.shape[2], second.shape[2])
        first, second = (F.adaptive_avg_pool2d(each, side) for each in (first, second))
        entries = [
            (first[b, c] * second[b, d]).mean()
            for b in range(len(first))
            for c in range(first.shape[1])
            for d in range(second.shape[1])
        ]
        return torch.stack(entries)

    expected = torch.zeros((), dtype=torch.float64)
    for place in range(3):
        own = matrix(*student.stages[place : place + 2])
        other = matrix(*detached(teacher).stages[place : place + 2])
        expected = expected + (own - other).square().mean()
    assert_first_stage(create("fsp", student, teacher), expected, student, teacher)


def test_fsp_refuses_other_channels() -> None:
    with pytest.raises(ValueError, match=r"stages have \[3, 4, 6, 5\] channels"):
        create("fsp", taps(STUDENT), taps(TEACHER))


# FT


def convolved(map_BCHW: Tensor, layers: torch.nn.Sequential) -> Tensor:
    """Return the map after three convolutions, BatchNorms if there are any, and LeakyReLUs."""
    for place in (0, 3, 6):
        conv = layers[place]
        assert isinstance(conv, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
        apply: Callable[..., Tensor] = F.conv2d
        if isinstance(conv, torch.nn.ConvTranspose2d):
            apply = F.conv_transpose2d
        map_BCHW = apply(map_BCHW, conv.weight, conv.bias, padding=1)
        if isinstance(norm := layers[place + 1], torch.nn.BatchNorm2d):
            variance, mean = torch.var_mean(map_BCHW, (0, 2, 3), correction=0)
            map_BCHW = map_BCHW - mean[:, None, None]
            map_BCHW = map_BCHW / (variance[:, None, None] + norm.eps) ** 0.5
            map_BCHW = norm.weight[:, None, None] * map_BCHW + norm.bias[:, None, None]
        map_BCHW = torch.where(map_BCHW > 0, map_BCHW, 0.1 * map_BCHW)
    return map_BCHW


@pytest.mark.parametrize("p1", [2, None])
def test_ft_is_the_distance_of_the_factors(p1: int | None) -> None:
    student, teacher = taps(STUDENT, seed=1), taps(TEACHER, seed=2)
    method = create("ft", student, teacher, p1=p1).double()
    assert method.paraphraser["encoder"][6].weight.shape == (4, 4, 3, 3)  # half of 8 channels
    with torch.no_grad():
        other = convolved(teacher.stages[-1], method.paraphraser["encoder"])
    own = convolved(student.stages[-1], method.translator["encoder"])
    distances = []
    for a, b in zip(own, F.adaptive_avg_pool2d(other, own.shape[2]), strict=True):
        if p1:
            a, b = a.square().mean(0), b.square().mean(0)
        distances.append((a / a.square().sum().sqrt() - b / b.square().sum().sqrt()).abs().mean())
    assert_same(method, sum(distances) / len(distances), student, teacher)
    loss = method(student, detached(teacher), batch())
    assert all(
        not gradient.any() for gradient in gradients(loss, [*method.paraphraser.parameters()])
    )


def test_the_first_stage_of_ft_reconstructs_the_teachers_map() -> None:
    student, teacher = taps(STUDENT, seed=1), taps(TEACHER, seed=2)
    method = create("ft", student, teacher, stage_weight=0.2).double()
    map_BCHW = detached(teacher).stages[-1]
    again = convolved(
        convolved(map_BCHW, method.paraphraser["encoder"]), method.paraphraser["decoder"]
    )
    expected = 0.2 * (again - map_BCHW).square().mean()
    assert_first_stage(method, expected, student, teacher)
    assert set(method.state_dict()) >= {
        "paraphraser.encoder.0.weight", "paraphraser.decoder.6.bias",
        "translator.encoder.3.weight", "translator.encoder.4.running_mean",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("ab", {"stage_epochs": 0}, "stage_epochs=0 must be an integer of at least 1"),
        ("ab", {"margin": -1.0}, "margin"),
        ("ft", {"stage_epochs": 1.5}, "stage_epochs=1.5"),
        ("ft", {"rate": 0.1}, "leaves 0 of the teacher's 8 channels"),
        ("ft", {"stage_weight": 0.0}, "stage_weight"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        create(name, taps(STUDENT), taps(TEACHER), **options)


# Training


def test_a_student_whose_stages_have_no_relu_is_served() -> None:
    with torch.device("meta"):
        images = torch.zeros(1, 3, 32, 32)
        mobile, vgg, wrn = (
            network(name, 100).eval().taps(images) for name in ("mobilev2", "vgg8", "wrn_16_1")
        )
        assert not mobile.preacts
        create("ab", mobile, vgg)
        create("ft", mobile, vgg)
    with pytest.raises(ValueError, match="equally many stages"):
        create("ab", mobile, wrn)


def test_first_stages_train_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(home: str, name: str) -> Config:
        return tiny(
            tmp_path / home,
            f"recipe={name}",
            f"features.{name}.method.stage_epochs=1",
            "trainer.epochs=1",
            "optimizer.lr=0.001",
        )

    jobs = {name: job("whole", name) for name in ("ab", "fsp", "ft")}
    assert [result["status"] for result in fit([*jobs.values()])] == ["FINISHED"] * 3
    for name, weight in (("ab", 0.0), ("fsp", 0.0), ("ft", 200.0)):
        first, last = rows(jobs[name])
        assert (first["epoch"], last["epoch"]) == (0, 1)
        assert first["train/loss"] == first[f"train/loss_{name}"] > 0  # without a weight
        expected = last["train/loss_ce"] + weight * last[f"train/loss_{name}"]
        assert math.isclose(last["train/loss"], expected, rel_tol=1e-5)

    # A run that is stopped in its first stage ends as if it had not been.
    train_step = Run.train_step

    def stop_after_a_step(run: Run, *arguments: Any) -> None:
        train_step(run, *arguments)
        signal.raise_signal(signal.SIGTERM)

    resumed = job("resumed", "ft")
    with monkeypatch.context() as patched:
        patched.setattr(Run, "train_step", stop_after_a_step)
        (killed,) = fit([resumed])
    assert killed["status"] == "KILLED"
    assert (final(resumed)["progress"]["epoch"], final(resumed)["progress"]["step"]) == (0, 1)
    assert fit([resumed])[0]["status"] == "FINISHED"
    assert rows(jobs["ft"]) == rows(resumed)
    assert same(final(jobs["ft"]), final(resumed))
