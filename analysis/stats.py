"""Compute the statistics over seeds: intervals, tests of gains, and verdicts on published numbers.

The numbers are accuracies in percent, and their differences are in points. Student's t, Bartlett's
test and the bootstrap are scipy's.
"""

import math
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

__all__ = [
    "ALPHA",
    "LEVEL",
    "MARGIN",
    "TESTS",
    "WIDEST",
    "Aggregate",
    "Difference",
    "Spread",
    "aggregate",
    "decide",
    "equivalence",
    "holm",
    "interval",
    "mean_std",
    "paired",
    "pooled",
    "prediction_half_width",
    "sequential",
    "spread_of",
    "verdict",
    "welch",
]

LEVEL = 0.95
"""Confidence level of all intervals, as a fraction."""
WIDEST = 1.0
"""Largest half-width of a prediction interval, in points of accuracy, that permits a verdict."""
ALPHA = 0.05
"""Significance level of all tests, for p-values that Holm's procedure has corrected."""
MARGIN = 0.3
"""Default of the largest difference, in points of accuracy, that counts as no difference."""
TESTS = ("pooled", "paired")
"""Names of the tests of a gain that a user can choose; the first is the default."""
RESAMPLES = 10_000
"""Number of draws of the bootstrap."""


@dataclass(frozen=True)
class Spread:
    """Standard deviation of the runs of a method, pooled over the methods on one pair."""

    std: float  # in the unit of the numbers
    df: int  # degrees of freedom: runs minus methods, of the methods that count (`spread_of`)
    # p-value of Bartlett's test of equal variances; None for a single method
    bartlett: float | None

    @property
    def equal(self) -> bool:
        """Return whether the variances of the methods count as equal by Bartlett's test.

        The result is False if the p-value of the test is below `ALPHA` (0.05). It is True if the
        standard deviation comes from a single method.
        """
        return self.bartlett is None or self.bartlett >= ALPHA


@dataclass(frozen=True)
class Difference:
    """Difference of two means, method minus baseline, with its t test and its 95 % interval.

    The standard error `error` is None if there are too few runs for a test, or if the runs do not
    vary. If a sweep tests its results several times while it adds seeds, `looks` is the number of
    planned tests; it is 1 otherwise.
    """

    mean: float
    # Number of runs of the method; in a paired or sequential test, of seeds that both sides have
    n: int
    n_base: int  # number of runs of the baseline; in a paired or sequential test, equal to `n`
    test: str = "pooled"  # pooled, paired, welch or sequential
    left_out: int = 0  # seeds of only one side, in a paired or sequential test
    # Standard error of `mean`, and its degrees of freedom. Both are None if the runs are too few or
    # do not vary.
    error: float | None = None
    df: float | None = None
    # Number of looks at the results that were planned. Intervals and p hold for all of them
    # together (Bonferroni), so a sweep may stop at any of them.
    looks: int = 1

    def half_width(self, level: float = LEVEL) -> float | None:
        """Return half the width of the t interval of the difference, in the unit of `mean`.

        `level` is the confidence level as a fraction, such as 0.95. With several `looks`, the
        interval is wider, so that the level holds for all of them together (Bonferroni). The result
        is None if `error` is None.
        """
        if self.error is None or self.df is None:
            return None
        alpha = (1 - level) / self.looks
        return float(stats.t.isf(alpha / 2, self.df)) * self.error

    def detectable(self, tests: int) -> float | None:
        """Return the smallest difference that is significant at the level `ALPHA` / `tests`.

        `tests` is a positive number of tests; the first step of Holm's procedure has this level.
        The result is positive and has the unit of `mean`. With several `looks`, the result is
        larger, as the interval of `half_width` is wider. The result is None if `error` is None.
        """
        return self.half_width(1 - ALPHA / tests)

    @property
    def low(self) -> float | None:
        """Return the lower end of the 95 % t interval of the difference; None without `error`."""
        half = self.half_width()
        return None if half is None else self.mean - half

    @property
    def high(self) -> float | None:
        """Return the upper end of the 95 % t interval of the difference; None without `error`."""
        half = self.half_width()
        return None if half is None else self.mean + half

    @property
    def p(self) -> float | None:
        """Return the p-value of the two-sided t test that the true difference is zero.

        The p-value is multiplied by `looks` and is at most 1. The result is None if `error` is
        None.
        """
        if self.error is None or self.df is None:
            return None
        p = float(2 * stats.t.sf(abs(self.mean) / self.error, self.df))
        return min(1.0, self.looks * p)


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (n - 1 in the denominator) of `values`.

    The standard deviation is None for a single value. Raise ValueError if `values` is empty.
    """
    std = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), std


def _is_zero(spread: float) -> bool:
    """Return whether a standard deviation is zero, apart from rounding errors.

    Accuracies come in steps. If all are equal, the true deviation is small compared with a step,
    but not zero.
    """
    return math.isclose(spread, 0, abs_tol=1e-9)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the lower and the upper end of the 95 % t interval of the mean of `values`.

    The result is None if there is only one value, or if all values are equal. Raise ValueError if
    `values` is empty.
    """
    _, std = mean_std(values)
    if std is None or _is_zero(std):
        return None
    low, high = stats.ttest_1samp(values, 0).confidence_interval(LEVEL)
    return float(low), float(high)


def spread_of(groups: Sequence[Sequence[float]]) -> Spread | None:
    """Return the standard deviation that several methods have in common (pooled variance).

    `groups` holds the numbers of each method, such as its accuracies; at least one number per
    method. Only methods with at least two different numbers count. The result is None if there is
    no such method. Raise ValueError if a group is empty.
    """
    varying = [group for group in groups if not _is_zero(mean_std(group)[1] or 0.0)]
    if not varying:
        return None
    df = sum(len(group) - 1 for group in varying)
    squares = sum((len(group) - 1) * statistics.variance(group) for group in varying)
    bartlett = None
    if len(varying) > 1:
        bartlett = float(stats.bartlett(*varying).pvalue)
        # Rounding can make the statistic of equal variances negative, which gives NaN.
        bartlett = 1.0 if math.isnan(bartlett) else bartlett
    return Spread(math.sqrt(squares / df), df, bartlett)


def pooled(values: Sequence[float], base: Sequence[float], spread: Spread | None) -> Difference:
    """Return the gain of a method over its baseline, for a test with a given standard deviation.

    Args:
        values: numbers of the method, one per run; at least one.
        base: numbers of the baseline, one per run; at least one.
        spread: standard deviation that all methods of the pair of networks have in common; None if
            unknown.

    Returns:
        The mean of `values` minus the mean of `base`. If `spread` is None, the difference has no
        standard error, so no p-value and no interval.

    Raises:
        ValueError: If `values` or `base` is empty.
    """
    mean = statistics.fmean(values) - statistics.fmean(base)
    if spread is None:
        return Difference(mean, len(values), len(base))
    error = spread.std * math.sqrt(1 / len(values) + 1 / len(base))
    return Difference(mean, len(values), len(base), error=error, df=spread.df)


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """Return the gain of a method over its baseline, for a t test paired by seed.

    `values` maps a seed to the number of the method, and `base` maps a seed to that of the
    baseline. The result is the mean difference, method minus baseline, over the seeds that both
    have. It is None if they share no seed. The result has no standard error if they share a single
    seed, or if the differences of all shared seeds are equal.
    """
    shared = sorted(values.keys() & base.keys())
    if not shared:
        return None
    n = len(shared)
    left_out = len(values.keys() ^ base.keys())
    mean, std = mean_std([values[seed] - base[seed] for seed in shared])
    if std is None or _is_zero(std):
        return Difference(mean, n, n, "paired", left_out)
    return Difference(mean, n, n, "paired", left_out, error=std / math.sqrt(n), df=n - 1)


def welch(values: Sequence[float], base: Sequence[float]) -> Difference:
    """Return the gain of a method over its baseline, for Welch's test (unequal variances).

    `values` are the numbers of the method, and `base` those of the baseline, one per run. The
    result is the mean of `values` minus the mean of `base`. The result has no standard error if a
    side has a single number, or if neither side has two different numbers. Raise ValueError if a
    side is empty.
    """
    mean = statistics.fmean(values) - statistics.fmean(base)
    found = Difference(mean, len(values), len(base), "welch")
    if min(len(values), len(base)) < 2:
        return found
    parts = [statistics.variance(group) / len(group) for group in (values, base)]
    if _is_zero(math.sqrt(sum(parts))):
        return found
    freedom = [part**2 / (len(g) - 1) for part, g in zip(parts, (values, base), strict=True)]
    return replace(found, error=math.sqrt(sum(parts)), df=sum(parts) ** 2 / sum(freedom))


def sequential(
    values: Mapping[int, float], base: Mapping[int, float], looks: int
) -> Difference | None:
    """Return the gain over a baseline, for a sweep that adds seeds until its gains are decided.

    Such a sweep tests its results several times, each time with more seeds. The gain is tested by
    Welch's test on the seeds that both sides have. The p-value and the interval of the gain hold
    for all tests of the sweep together (Bonferroni).

    Args:
        values: numbers of the method, by seed.
        base: numbers of the baseline, by seed.
        looks: number of tests that the sweep planned. If the sides share n seeds and n - 2 is
            larger, n - 2 counts: one test after each seed from the third.

    Returns:
        The mean of `values` minus the mean of `base`, over the seeds that both have; None if they
        share no seed. The difference has no standard error for a single shared seed, or if the
        numbers of each side are all equal.
    """
    shared = sorted(values.keys() & base.keys())
    if not shared:
        return None
    found = welch([values[seed] for seed in shared], [base[seed] for seed in shared])
    left_out = len(values.keys() ^ base.keys())
    looks = max(looks, len(shared) - 2)  # seeds that were added by hand since
    return replace(found, test="sequential", left_out=left_out, looks=looks)


def equivalence(difference: Difference, margin: float) -> float | None:
    """Return the p-value of the hypothesis that the true difference lies outside ± `margin` points.

    A small p-value thus shows that the difference is negligible. The p-value is the larger one of
    two one-sided t tests (TOST, Schuirmann 1987), multiplied by `difference.looks`, and at most 1.
    The result is None if the difference has no standard error.
    """
    if difference.error is None or difference.df is None:
        return None
    above = stats.t.sf((difference.mean + margin) / difference.error, difference.df)
    below = stats.t.sf((margin - difference.mean) / difference.error, difference.df)
    return min(1.0, difference.looks * float(max(above, below)))


def decide(difference: Difference, p: float | None, p_equivalent: float | None) -> str:
    """Return what the tests say of a gain: "better", "worse", "equivalent" or "undecided".

    Args:
        difference: the gain.
        p: p-value of the test that the true gain is zero, corrected for the number of tests; None
            if there was no test.
        p_equivalent: p-value of `equivalence`, corrected in the same way; None if there was no
            test.

    Returns:
        "better" or "worse", by the sign of the gain, if `p` is below `ALPHA` (0.05); otherwise
        "equivalent" if `p_equivalent` is below `ALPHA`; otherwise "undecided".
    """
    if p is not None and p < ALPHA:
        return "better" if difference.mean > 0 else "worse"
    if p_equivalent is not None and p_equivalent < ALPHA:
        return "equivalent"
    return "undecided"


@dataclass(frozen=True)
class Aggregate:
    """Mean gain of a method over its baselines on several pairs of teacher and student.

    An instance also holds the gain's 95 % interval and the probability of improvement.
    """

    gain: float  # in points: the difference of the means, averaged over the pairs
    low: float | None  # lower end of the 95 % interval of `gain`; None without an interval
    high: float | None  # upper end
    # Probability that a run of the method is better than a run of the baseline, averaged over the
    # pairs
    improvement: float
    pairs: int  # number of pairs


def aggregate(
    groups: Mapping[Hashable, Sequence[float]], pairs: Sequence[tuple[Hashable, Hashable]]
) -> Aggregate:
    """Return the gain of a method over its baselines, averaged over pairs of networks.

    Every pair counts equally. The interval is a stratified percentile bootstrap: runs are drawn
    again within each group of n runs. To correct its width for small n, each number is first moved
    away from the mean of its group by the factor sqrt(n / (n - 1)). The probability of improvement
    is that of Agarwal et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical
    Precipice"; ties count half.

    Args:
        groups: for each key, the numbers of the runs of one method on one pair of networks. The
            keys are free. If the same runs are the baseline on several pairs, use one key for them,
            so that all pairs get the same draws.
        pairs: for each pair of networks, the key of the method and the key of its baseline.

    Returns:
        The aggregate. Its interval is None if a group has a single number. Equal arguments give
        equal intervals, because the draws have a fixed seed.

    Raises:
        KeyError: If `pairs` holds a key that `groups` lacks.
        ValueError: If `pairs` or a group is empty.
    """
    means = {key: statistics.fmean(group) for key, group in groups.items()}
    gain = statistics.fmean(means[ours] - means[base] for ours, base in pairs)
    better = [
        np.subtract.outer(np.asarray(groups[ours]), np.asarray(groups[base]))
        for ours, base in pairs
    ]
    improvement = statistics.fmean(float(np.mean((d > 0) + 0.5 * (d == 0))) for d in better)
    if any(len(group) < 2 for group in groups.values()):
        return Aggregate(gain, None, None, improvement, len(pairs))
    place = {key: number for number, key in enumerate(groups)}

    def mean_gain(*drawn: Any, axis: int = -1) -> Any:
        of_group = [np.mean(group, axis=axis) for group in drawn]
        return np.mean(
            [of_group[place[ours]] - of_group[place[base]] for ours, base in pairs], axis=0
        )

    drawn = stats.bootstrap(
        [_widened(group) for group in groups.values()],
        mean_gain,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    low, high = drawn.confidence_interval
    return Aggregate(gain, float(low), float(high), improvement, len(pairs))


def _widened(group: Sequence[float]) -> Any:
    """Return the numbers moved away from their mean by sqrt(n / (n - 1))."""
    numbers = np.asarray(group, dtype=float)
    mean = numbers.mean()
    return mean + (numbers - mean) * math.sqrt(len(numbers) / (len(numbers) - 1))


def holm(ps: Sequence[float]) -> list[float]:
    """Return p-values corrected for the number of tests by Holm's step-down procedure.

    The corrected p-values are at most 1 and in the order of `ps`. The result is [] if `ps` is
    empty.
    """
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def prediction_half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % t prediction interval for the result of one more run.

    `values` are the results of the runs so far, such as accuracies in %. The half width has the
    same unit. It is None for a single run and 0 for equal results. Raise ValueError if `values` is
    empty.
    """
    _, std = mean_std(values)
    if std is None:
        return None
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return quantile * std * math.sqrt(1 + 1 / len(values))


def verdict(values: Sequence[float], published: float) -> str:
    """Return how our runs compare with a published number, as one word.

    Args:
        values: numbers of our runs in percent, one per seed; at least one.
        published: the published number, in percent.

    Returns:
        - "undecided" for a single run, or if half the width of the 95 % prediction interval for
          one more of our runs is above `WIDEST` (1 point);
        - otherwise "within" if `published` lies in this interval;
        - otherwise "undecided" if our numbers are all equal;
        - otherwise "above" if our mean is above `published`, else "below".

    Raises:
        ValueError: If `values` is empty.
    """
    half = prediction_half_width(values)
    if half is None or half > WIDEST:
        return "undecided"
    gap = statistics.fmean(values) - published
    if abs(gap) <= half + 1e-9:
        return "within"
    if _is_zero(half):
        return "undecided"
    return "above" if gap > 0 else "below"
