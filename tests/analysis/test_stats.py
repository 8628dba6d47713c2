"""Test the statistics with formulas and printed tables."""

import math

import numpy as np
import pytest
import scipy.stats
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
    assert gain == stats.Difference(1.0, 1, 1, "paired")
    assert gain.low is gain.high is gain.p is None


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


# Gains with a common variance

groups = st.lists(st.lists(st.integers(7000, 8000).map(lambda x: x / 100), min_size=2, max_size=5),
                  min_size=2, max_size=6)  # fmt: skip


@given(groups)
def test_the_common_variance_is_that_of_the_residuals(numbers: list[list[float]]) -> None:
    varying = [group for group in numbers if np.std(group) > 1e-9]
    spread = stats.spread_of([*numbers, [75.0]])
    if not varying:
        assert spread is None
        return
    residuals = np.concatenate([np.subtract(group, np.mean(group)) for group in varying])
    df = len(residuals) - len(varying)
    assert spread is not None
    assert spread.df == df
    assert spread.std == pytest.approx(math.sqrt(np.sum(residuals**2) / df), rel=1e-9)


@given(groups.map(lambda lists: lists[:2]))
def test_with_two_methods_the_pooled_test_is_students(numbers: list[list[float]]) -> None:
    assume(all(np.std(group) > 1e-9 for group in numbers))
    ours, base = numbers
    gain = stats.pooled(ours, base, stats.spread_of(numbers))
    expected = scipy.stats.ttest_ind(ours, base)
    interval = expected.confidence_interval(0.95)
    assert gain.p == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-12)
    assert (gain.low, gain.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert (gain.n, gain.n_base, gain.df) == (len(ours), len(base), len(ours) + len(base) - 2)


def test_a_single_run_is_tested_with_the_variance_of_the_others() -> None:
    others = [[75.0, 75.4, 75.2], [76.0, 76.5, 76.3]]
    gain = stats.pooled([78.0], others[0], stats.spread_of([[78.0], *others]))
    std = math.sqrt(sum(np.var(group, ddof=1) for group in others) / 2)
    assert gain.error == pytest.approx(std * math.sqrt(1 + 1 / 3))
    assert gain.df == 4


@pytest.mark.parametrize(("factor", "equal"), [(1, True), (2, True), (100, False)])
def test_bartletts_test_refuses_variances_that_differ(factor: float, equal: bool) -> None:
    group = np.array([-0.5, 0.1, 0.4])
    spread = stats.spread_of([list(75 + group), list(75 + group * factor), list(75 - group)])
    assert spread is not None
    assert spread.equal == equal


@pytest.mark.parametrize("difference", [0.0, 0.1, -0.2, 0.3, 0.7])
def test_equivalence_is_the_larger_of_two_one_sided_tests(difference: float) -> None:
    gain = stats.Difference(difference, 3, 3, error=0.15, df=8)
    expected = max(
        student_t.sf((difference + 0.3) / 0.15, 8), student_t.cdf((difference - 0.3) / 0.15, 8)
    )
    assert stats.equivalence(gain, 0.3) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mean", "p", "p_equivalent", "verdict"),
    [
        (1.0, 0.01, 0.9, "better"),
        (-1.0, 0.01, 0.9, "worse"),
        (0.1, 0.5, 0.01, "equivalent"),
        (0.1, 0.01, 0.01, "better"),
        (1.0, 0.06, 0.9, "undecided"),
        (1.0, None, None, "undecided"),
    ],
)
def test_the_verdict_on_a_gain(
    mean: float, p: float | None, p_equivalent: float | None, verdict: str
) -> None:
    assert stats.decide(stats.Difference(mean, 3, 3), p, p_equivalent) == verdict


def test_the_smallest_gain_is_on_the_edge_of_significance() -> None:
    gain = stats.Difference(0.0, 3, 3, error=0.4, df=14)
    smallest = gain.detectable(12)
    assert smallest is not None
    p = 2 * student_t.sf(smallest / 0.4, 14)
    assert 12 * p == pytest.approx(0.05)


# What the tests promise, in simulations of two pairs with a baseline and six methods each, three
# seeds, and deviations of 0.5 points. Every method is compared with its baseline: 12 tests.
PAIRS, METHODS, SEEDS, STD = 2, 7, 3, 0.5
GAINS = np.linspace(1.0, 1.5, METHODS - 1)


def significant(drawn: np.ndarray, test: str) -> np.ndarray:
    """Return which of the gains of a table are significant, for accuracies by pair and method."""
    ps = []
    for pair in drawn:
        spread = stats.spread_of([list(group) for group in pair])
        for method in pair[1:]:
            if test == "pooled" and spread is not None and spread.equal:
                gain = stats.pooled(list(method), list(pair[0]), spread)
            else:
                found = stats.paired(dict(enumerate(method)), dict(enumerate(pair[0])))
                assert found is not None
                gain = found
            assert gain.p is not None
            ps.append(gain.p)
    return np.array(stats.holm(ps)) < stats.ALPHA


def simulated(test: str, gains: np.ndarray, repeats: int) -> np.ndarray:
    """Return the significance of every gain in every repeat."""
    noise = np.random.default_rng(20261128)
    means = 75 + np.concatenate([[0], gains])
    drawn = noise.normal(0, STD, (repeats, PAIRS, METHODS, SEEDS)) + means[:, None]
    return np.array([significant(one, test) for one in drawn])


def test_the_error_of_the_whole_table_is_kept() -> None:
    wrong = simulated("pooled", np.zeros(METHODS - 1), 1500).any(axis=1)
    assert wrong.mean() <= 0.06  # 0.041 in these repeats; its standard error is 0.005


def test_the_pooled_test_sees_gains_that_the_paired_test_misses() -> None:
    pooled, paired = (simulated(test, GAINS, 300).mean() for test in stats.TESTS)
    assert pooled >= 0.30
    assert paired <= 0.07


# The aggregate over pairs


def test_the_aggregate_is_the_mean_gain_over_pairs() -> None:
    groups = {"a": [76.0, 77.0], "b": [75.0, 75.0], "c": [80.0, 80.0], "d": [80.0, 81.0, 79.0]}
    pairs = [("a", "b"), ("c", "d")]
    found = stats.aggregate(groups, pairs)
    assert found.gain == pytest.approx((1.5 + 0.0) / 2)
    assert found.improvement == pytest.approx((1.0 + 0.5) / 2)
    assert found.pairs == 2
    assert found == stats.aggregate(groups, pairs)


def test_an_aggregate_with_single_runs_has_no_interval() -> None:
    found = stats.aggregate({"a": [76.0, 76.5], "b": [75.0]}, [("a", "b")])
    assert (found.gain, found.low, found.high, found.improvement) == (1.25, None, None, 1.0)


@pytest.mark.parametrize("shared", [False, True])
def test_the_interval_of_the_aggregate_covers_the_true_gain(shared: bool) -> None:
    """`shared`: one student alone is the baseline on all pairs."""
    noise = np.random.default_rng(3)
    covered = []
    for _ in range(300):
        drawn = noise.normal(0, STD, (6, 2, SEEDS))
        groups = {(pair, side): list(drawn[pair, side]) for pair in range(6) for side in (0, 1)}
        pairs = [((pair, 1), (0 if shared else pair, 0)) for pair in range(6)]
        if shared:
            groups = {key: group for key, group in groups.items() if key[1] or not key[0]}
        found = stats.aggregate(groups, pairs)
        assert found.low is not None
        assert found.high is not None
        covered.append(found.low <= 0.0 <= found.high)
    # Nominal 0.95. With draws of their own for each pair, a shared baseline gave 0.66.
    assert np.mean(covered) >= (0.82 if shared else 0.91)


def test_unequal_variances_without_common_seeds_are_compared_by_welch() -> None:
    ours, base = [72.0, 75.0, 78.0], [70.0, 70.01, 70.03]
    gain = stats.welch(ours, base)
    expected = scipy.stats.ttest_ind(ours, base, equal_var=False)
    interval = expected.confidence_interval(0.95)
    assert gain.p == pytest.approx(expected.pvalue)
    assert (gain.low, gain.high) == pytest.approx((interval.low, interval.high))
    assert stats.welch([72.0], base).p is None
