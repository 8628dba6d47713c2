"""Test the learning-rate schedules, above all at the epochs where the rate changes."""

import math
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sddlskd.config import Schedule
from sddlskd.training.schedule import learning_rate

PAPER = {"peak": 0.05, "epochs": 240, "milestones": (0.625, 0.75, 0.875), "decay": 0.1}
step = partial(learning_rate, **PAPER, schedule="step", warmup_epochs=0.0)
cosine = partial(learning_rate, **PAPER, schedule="cosine", warmup_epochs=0.0)
constant = partial(learning_rate, **PAPER, schedule="constant", warmup_epochs=0.0)


@pytest.mark.parametrize("steps", [1, 3, 391])
def test_step_is_the_papers(steps: int):
    # mdistiller: lr * 0.1 ** sum(epoch > [150, 180, 210]) for all steps of an epoch, counted from 1
    for epoch in range(1, 241):
        expected = 0.05 * 0.1 ** ((epoch > 150) + (epoch > 180) + (epoch > 210))
        for i in {0, steps // 2, steps - 1}:
            assert step(epoch - 1 + i / steps) == pytest.approx(expected, rel=1e-12), (epoch, i)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [
        (0.0, 0.05), (149.0, 0.05), (149.99, 0.05), (150.0, 0.005), (179.99, 0.005),
        (180.0, 0.0005), (209.99, 0.0005), (210.0, 0.00005), (240.0, 0.00005),
    ],
)  # fmt: skip
def test_step_at_its_milestones(progress: float, expected: float):
    assert step(progress) == pytest.approx(expected, rel=1e-12)


def test_step_milestones_are_parts_of_the_run():
    short = [round(step(epoch, epochs=8), 12) for epoch in range(8)]
    assert short == [0.05, 0.05, 0.05, 0.05, 0.05, 0.005, 0.0005, 0.00005]
    assert {step(epoch, milestones=()) for epoch in range(240)} == {0.05}


def test_cosine_goes_from_the_peak_to_zero():
    assert cosine(0.0) == 0.05
    # The formula is peak / 2 * (1 + cos(pi * progress / epochs)).
    assert cosine(60.0) == pytest.approx(0.025 * (1 + math.sqrt(0.5)), rel=1e-12)
    assert cosine(120.0) == pytest.approx(0.025, rel=1e-12)
    assert 0 < cosine(240 - 1 / 391) < 1e-9
    assert cosine(240.0) == pytest.approx(0.0, abs=1e-17)


def test_cosine_starts_after_the_warm_up():
    warm = partial(cosine, warmup_epochs=40.0)
    assert warm(40.0) == pytest.approx(0.05, rel=1e-12)
    assert warm(140.0) == pytest.approx(0.025, rel=1e-12)
    assert warm(240.0) == pytest.approx(0.0, abs=1e-17)


def test_constant_is_constant():
    assert {constant(epoch / 7) for epoch in range(240 * 7)} == {0.05}


@pytest.mark.parametrize("schedule", [step, cosine, constant])
def test_warm_up_rises_linearly_from_above_zero(schedule):
    warm = partial(schedule, warmup_epochs=5.0)
    start, *rest = rates = [warm(i / 10) for i in range(50)]
    assert 0 < start < 0.05 * 0.001  # the rate of the first step is small but not zero
    rises = [after - before for before, after in zip(rates, rest, strict=False)]
    assert rises == pytest.approx([0.05 / 50] * 49, rel=1e-9)
    assert warm(2.5) == pytest.approx(0.025, rel=1e-3)
    assert warm(5.0) == pytest.approx(0.05, rel=1e-12)


def test_warm_up_leaves_the_rest_of_the_steps_alone():
    for progress in (5.0, 149.99, 150.0, 180.0, 239.0):
        assert step(progress, warmup_epochs=5.0) == step(progress)


def test_every_schedule_of_the_config_is_known_here():
    # For an unknown name, the function would return the constant rate.
    assert {schedule: round(learning_rate(165.0, **PAPER, schedule=schedule, warmup_epochs=0.0), 6)
            for schedule in Schedule
            } == {"step": 0.005, "cosine": 0.011111, "constant": 0.05}  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(list(Schedule)), st.integers(1, 300), st.floats(0, 20),
    st.floats(0, 1, exclude_max=True)
)  # fmt: skip
def test_never_above_the_peak_nor_below_zero_nor_rising_after_the_warm_up(
    schedule: Schedule, epochs: int, warmup: float, decay: float
):
    rate = partial(
        learning_rate, peak=0.1, epochs=epochs, schedule=schedule, milestones=(0.5, 0.75),
        decay=decay, warmup_epochs=warmup,
    )  # fmt: skip
    rates = [rate(epochs * i / 50) for i in range(51)]
    assert all(0 <= value <= 0.1 for value in rates)
    assert all(value > 0 for value in rates[:-1]) or decay**2 == 0
    after = [rate(epochs * i / 50) for i in range(51) if epochs * i / 50 >= warmup]
    assert after == sorted(after, reverse=True)
