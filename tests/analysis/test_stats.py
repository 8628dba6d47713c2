"""Test the statistics with formulas and printed tables."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import t as student_t

from analysis import stats

# Two-sided 95 % quantiles of Student's t, from printed tables.
T = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 9: 2.2622}
values = st.lists(st.floats(0, 100).map(lambda x: round(x, 2)), min_size=1, max_size=8)
p_values = st.lists(st.floats(0, 1), max_size=8)


@given(values)
def test_mean_and_sample_deviation(numbers: list[float]) -> None:
    mean, std = stats.mean_std(numbers)
    assert mean == pytest.approx(np.mean(numbers), abs=1e-9)
    if len(numbers) == 1:
        assert std is None
    else:
        assert std == pytest.approx(np.std(numbers, ddof=1), abs=1e-9)


def test_a_gain_is_paired_by_seed_with_its_t_interval() -> None:
    ours, base = {0: 76.0, 1: 76.5, 2: 75.9, 7: 99.0}, {0: 74.0, 1: 74.2, 2: 74.3, 8: 1.0}
    gain = stats.paired(ours, base)
    differences = np.array([2.0, 2.3, 1.6])
    half = T[2] * differences.std(ddof=1) / math.sqrt(3)
    assert gain is not None
    assert (gain.n, gain.left_out) == (3, 2)
    assert gain.mean == pytest.approx(differences.mean())
    assert gain.low == pytest.approx(differences.mean() - half, abs=1e-4)
    assert gain.high == pytest.approx(differences.mean() + half, abs=1e-4)
    # With 2 degrees of freedom, the two-sided p-value has a closed form.
    t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
    assert gain.p == pytest.approx(1 - t / math.sqrt(t**2 + 2), rel=1e-6)


@given(st.lists(st.tuples(values, values).map(lambda lists: (lists[0][0], lists[1][0])),
                min_size=2, max_size=8))  # fmt: skip
def test_the_interval_of_a_gain_is_that_of_the_formula(pairs: list[tuple[float, float]]) -> None:
    differences = np.array([ours - theirs for ours, theirs in pairs])
    deviation = differences.std(ddof=1)
    assume(deviation > 1e-6)
    ours, theirs = zip(*pairs, strict=True)
    gain = stats.paired(dict(enumerate(ours)), dict(enumerate(theirs)))
    half = student_t.ppf(0.975, len(pairs) - 1) * deviation / math.sqrt(len(pairs))
    expected = differences.mean() - half, differences.mean() + half
    assert gain is not None
    assert (gain.low, gain.high) == pytest.approx(expected, abs=1e-9)
    assert stats.interval(differences.tolist()) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10])
def test_the_interval_of_a_mean_is_students(n: int) -> None:
    numbers = [75 + 0.1 * (i % 2) for i in range(n)]
    half = T[n - 1] * np.std(numbers, ddof=1) / math.sqrt(n)
    expected = np.mean(numbers) - half, np.mean(numbers) + half
    assert stats.interval(numbers) == pytest.approx(expected, abs=1e-4)


def test_one_value_and_equal_values_have_no_interval() -> None:
    assert stats.interval([75.0]) is None
    assert stats.interval([75.1, 75.1, 75.1]) is None


def test_one_pair_has_no_interval() -> None:
    gain = stats.paired({3: 76.0}, {3: 75.0})
    assert gain == stats.Paired(1.0, 1, 0, None, None, None)


def test_equal_differences_have_no_interval() -> None:
    gain = stats.paired({0: 76.13, 1: 75.07, 2: 75.2}, {0: 75.13, 1: 74.07, 2: 74.2})
    assert gain is not None
    assert gain.mean == pytest.approx(1)
    assert (gain.n, gain.low, gain.high, gain.p) == (3, None, None, None)


def test_no_common_seed_no_gain() -> None:
    assert stats.paired({0: 1.0}, {1: 1.0}) is None


def test_holm_on_a_worked_example() -> None:
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == []


@given(p_values)
def test_holm_by_its_definition(ps: list[float]) -> None:
    order = sorted(ps)
    steps = [min(1.0, (len(ps) - i) * p) for i, p in enumerate(order)]
    adjusted = stats.holm(ps)
    assert sorted(adjusted) == [max(steps[: i + 1]) for i in range(len(ps))]
    assert all(a >= p for a, p in zip(adjusted, ps, strict=True))
    assert all(
        adjusted[i] <= adjusted[j] for i in range(len(ps)) for j in range(len(ps)) if ps[i] < ps[j]
    )


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10])
def test_the_prediction_interval_is_for_one_more_run(n: int) -> None:
    numbers = [75 + 0.1 * (i % 2) for i in range(n)]
    expected = T[n - 1] * np.std(numbers, ddof=1) * math.sqrt(1 + 1 / n)
    assert stats.prediction_half_width(numbers) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("published", "expected"),
    [(75.1, "within"), (75.59, "within"), (75.61, "below"), (74.61, "within"), (74.59, "above")],
)
def test_verdicts(published: float, expected: str) -> None:
    numbers = [75.0, 75.1, 75.2]  # mean 75.1, s 0.1: half-width 4.3027 * 0.1 * sqrt(4/3) = 0.4968
    assert stats.verdict(numbers, published) == expected


def test_one_run_or_a_wide_interval_decides_nothing() -> None:
    assert stats.verdict([75.0], 75.0) == "undecided"
    assert stats.verdict([75.0, 76.0, 74.0], 10.0) == "undecided"


def test_equal_runs_are_within_their_own_number_alone() -> None:
    assert stats.verdict([75.0, 75.0], 75.0) == "within"
    assert stats.verdict([75.0, 75.0], 75.01) == "undecided"
