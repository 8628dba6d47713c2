"""Compute the statistics over seeds.

These are means and their intervals, gains with their tests, Holm's correction, the aggregate over
pairs, and the verdict on a published number. Student's t, Bartlett's test and the bootstrap are
scipy's.
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
    "spread_of",
    "verdict",
    "welch",
]

LEVEL = 0.95
"""Confidence level of all intervals."""
WIDEST = 1.0
"""Largest half-width of a prediction interval, in points of accuracy, that permits a verdict."""


ALPHA = 0.05
"""Level of all tests, after Holm's correction over a table."""
MARGIN = 0.3
"""Default of the largest difference, in points of accuracy, that counts as none."""
TESTS = ("pooled", "paired")
"""Tests of a gain, the default first."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Spread:
    """The standard deviation that several methods on one pair have in common."""

    std: float
    df: int  # degrees of freedom: runs minus methods
    # p of Bartlett's test that the methods have the same deviation; None for a single method
    bartlett: float | None

    @property
    def equal(self) -> bool:
        """Return whether Bartlett's test lets the methods share one deviation."""
        return self.bartlett is None or self.bartlett >= ALPHA


@dataclass(frozen=True)
class Difference:
    """A difference of two means, with what its t test and its interval are made of."""

    mean: float
    n: int  # runs of the row; in a paired test, seeds that both sides have
    n_base: int  # runs of the baseline; in a paired test, `n`
    test: str = "pooled"  # pooled, paired or welch
    left_out: int = 0  # seeds that only one side has, which a paired test leaves out
    # Standard error of `mean`, and its degrees of freedom. Both are None if the runs give none.
    error: float | None = None
    df: float | None = None

    def half_width(self, level: float = LEVEL) -> float | None:
        """Return half the width of the t interval, or None without a standard error."""
        if self.error is None or self.df is None:
            return None
        return float(stats.t.ppf((1 + level) / 2, self.df)) * self.error

    def detectable(self, tests: int) -> float | None:
        """Return the smallest gain that Holm's first step would call significant among `tests`.

        The result is None without a standard error.
        """
        return self.half_width(1 - ALPHA / tests)

    @property
    def low(self) -> float | None:
        """Return the lower end of the 95 % interval, or None if there is none."""
        half = self.half_width()
        return None if half is None else self.mean - half

    @property
    def high(self) -> float | None:
        """Return the upper end of the 95 % interval, or None if there is none."""
        half = self.half_width()
        return None if half is None else self.mean + half

    @property
    def p(self) -> float | None:
        """Return p of the two-sided t test, or None without a standard error."""
        if self.error is None or self.df is None:
            return None
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.df))


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and the sample standard deviation (n - 1 in the denominator) of `values`.

    The standard deviation is None for a single value.
    """
    std = statistics.stdev(values) if len(values) > 1 else None
    return statistics.fmean(values), std


def _is_zero(spread: float) -> bool:
    """Return whether a standard deviation is zero but for rounding.

    Accuracies come in steps: equal values mean that the spread is finer than a step. They do not
    mean that there is no spread.
    """
    return math.isclose(spread, 0, abs_tol=1e-9)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the ends of the 95 % t interval of the mean of `values`.

    The result is None for one value and for equal values.
    """
    _, std = mean_std(values)
    if std is None or _is_zero(std):
        return None
    low, high = stats.ttest_1samp(values, 0).confidence_interval(LEVEL)
    return float(low), float(high)


def spread_of(groups: Sequence[Sequence[float]]) -> Spread | None:
    """Return the standard deviation that the groups have in common.

    Groups of one value or of equal values are left out: equal accuracies mean that the deviation is
    finer than a step of the accuracy. The result is None if no group is left.
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
    """Return the gain of `values` over `base` with the deviation that all methods have in common.

    Args:
        values: numbers of the row, at least one.
        base: numbers of its baseline, at least one.
        spread: the common deviation; None gives a difference without an interval.
    """
    mean = statistics.fmean(values) - statistics.fmean(base)
    if spread is None:
        return Difference(mean, len(values), len(base))
    error = spread.std * math.sqrt(1 / len(values) + 1 / len(base))
    return Difference(mean, len(values), len(base), error=error, df=spread.df)


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """Return the gain of `values` over `base`, paired by seed.

    Both arguments map a seed to a number. The result is None if they share no seed. It has no
    standard error for one seed and for equal differences.
    """
    shared = sorted(values.keys() & base.keys())
    if not shared:
        return None
    n = len(shared)
    left_out = len(values.keys() ^ base.keys())
    mean, std = mean_std([values[seed] - base[seed] for seed in shared])
    if std is None or _is_zero(std):
        return Difference(mean, n, n, "paired", left_out)
    return Difference(mean, n, n, "paired", left_out, std / math.sqrt(n), n - 1)


def welch(values: Sequence[float], base: Sequence[float]) -> Difference:
    """Return the gain of `values` over `base` by Welch's test, for unequal variances.

    The result has no standard error if a side has a single number, or if all numbers of both are
    equal.
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


def equivalence(difference: Difference, margin: float) -> float | None:
    """Return p of two one-sided t tests that the true difference is within ± `margin` points.

    The result is None without a standard error. Source: Schuirmann (1987), TOST.
    """
    if difference.error is None or difference.df is None:
        return None
    above = stats.t.sf((difference.mean + margin) / difference.error, difference.df)
    below = stats.t.sf((margin - difference.mean) / difference.error, difference.df)
    return float(max(above, below))


def decide(difference: Difference, p: float | None, p_equivalent: float | None) -> str:
    """Return what the runs say of a gain: better, worse, equivalent or undecided.

    Args:
        difference: the gain.
        p: corrected p of the test that there is no difference; None if there is none.
        p_equivalent: corrected p of `equivalence`; None if there is none.
    """
    if p is not None and p < ALPHA:
        return "better" if difference.mean > 0 else "worse"
    if p_equivalent is not None and p_equivalent < ALPHA:
        return "equivalent"
    return "undecided"


@dataclass(frozen=True)
class Aggregate:
    """A method against its baselines over several pairs."""

    gain: float  # mean over the pairs of the difference of means, in points
    low: float | None  # ends of its 95 % interval; None if a mean is of one run
    high: float | None
    improvement: float  # probability that a run is better than a run of the baseline, over pairs
    pairs: int


def aggregate(
    groups: Mapping[Hashable, Sequence[float]], pairs: Sequence[tuple[Hashable, Hashable]]
) -> Aggregate:
    """Return the gain of a method over its baselines, with every pair counted equally.

    The interval is a stratified percentile bootstrap: runs are drawn again within each group. Pairs
    with the same baseline runs, such as those of a student alone, get the same draws. A bootstrap
    of n runs is too narrow by sqrt((n - 1) / n), which is much for few seeds, so each run is first
    moved away from its mean by the inverse factor. The probability of improvement is that of
    Agarwal et al. (2021), "Deep Reinforcement Learning at the Edge of the Statistical Precipice",
    where ties count half.

    Args:
        groups: the numbers of each method on each pair.
        pairs: for each pair, the keys of the method and of its baseline in `groups`.

    Returns:
        The aggregate, without an interval if a group has a single number. The draws have a fixed
        seed, so equal groups have equal intervals.
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
    """Return the p-values adjusted by Holm's step-down procedure, in the order of `ps`."""
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def prediction_half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % t prediction interval for one more run.

    The result has the unit of `values`. It is None for a single run.
    """
    _, std = mean_std(values)
    if std is None:
        return None
    quantile = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return quantile * std * math.sqrt(1 + 1 / len(values))


def verdict(values: Sequence[float], published: float) -> str:
    """Return how our runs compare with a published number: within, above, below or undecided.

    The verdict is "within" if `published` lies in the prediction interval for one more run, and
    else the side on which our mean lies. It is "undecided" for a single run, if the half-width is
    above `WIDEST`, and if all runs are equal and differ from `published`.
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
