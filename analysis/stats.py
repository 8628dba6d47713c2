"""Compute the statistics over seeds.

These are means and their intervals, gains paired by seed, Holm's correction and the verdict on a
published number. The t tests and their intervals are scipy's.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

__all__ = [
    "LEVEL",
    "WIDEST",
    "Paired",
    "holm",
    "interval",
    "mean_std",
    "paired",
    "prediction_half_width",
    "verdict",
]

LEVEL = 0.95
"""Confidence level of all intervals."""
WIDEST = 1.0
"""Largest half-width of a prediction interval, in points of accuracy, that permits a verdict."""


@dataclass(frozen=True)
class Paired:
    """A mean difference over the seeds that both sides have, with its paired t interval."""

    mean: float
    n: int  # number of pairs
    left_out: int  # number of seeds that only one side has
    # Ends of the 95 % interval; None for one pair and for equal differences.
    low: float | None
    high: float | None
    p: float | None  # of the two-sided test; None if the interval is


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


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Paired | None:
    """Return the gain of `values` over `base`, paired by seed.

    Both arguments map a seed to a number. The result is None if they share no seed.
    """
    shared = sorted(values.keys() & base.keys())
    if not shared:
        return None
    left_out = len(values.keys() ^ base.keys())
    ours = [values[seed] for seed in shared]
    theirs = [base[seed] for seed in shared]
    mean, std = mean_std([our - their for our, their in zip(ours, theirs, strict=True)])
    if std is None or _is_zero(std):
        return Paired(mean, len(shared), left_out, None, None, None)
    test = stats.ttest_rel(ours, theirs)
    low, high = test.confidence_interval(LEVEL)
    return Paired(mean, len(shared), left_out, float(low), float(high), float(test.pvalue))


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
