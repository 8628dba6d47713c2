"""What seeds support: means, gains paired by seed, Holm's correction and the reproduction verdict."""

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
    "mean_std",
    "paired",
    "prediction_half_width",
    "verdict",
]

LEVEL = 0.95
WIDEST = 1.0
"""Points of accuracy: a prediction interval with a wider half decides nothing."""


@dataclass(frozen=True)
class Paired:
    """The mean difference over seeds that both sides have, with its paired t interval."""

    mean: float
    n: int  # pairs
    left_out: int  # seeds that only one side has
    low: float | None  # of the 95 % interval; None: one pair, or equal differences
    high: float | None
    p: float | None  # two-sided


def mean_std(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation (n - 1); a single value has none."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def _t(n: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1))


def paired(values: Mapping[int, float], base: Mapping[int, float]) -> Paired | None:
    """The gain of `values` over `base`, each by seed; None where they share no seed."""
    shared = sorted(values.keys() & base.keys())
    if not shared:
        return None
    left_out = len(values.keys() ^ base.keys())
    differences = [values[seed] - base[seed] for seed in shared]
    mean, std = mean_std(differences)
    # Accuracies come in steps: equal differences say that the spread is finer than a step, not that there is none.
    if std is None or math.isclose(std, 0, abs_tol=1e-9):
        return Paired(mean, len(shared), left_out, None, None, None)
    half = _t(len(shared)) * std / math.sqrt(len(shared))
    p = float(
        stats.ttest_rel([values[seed] for seed in shared], [base[seed] for seed in shared]).pvalue
    )
    return Paired(mean, len(shared), left_out, mean - half, mean + half, p)


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given."""
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def prediction_half_width(values: Sequence[float]) -> float | None:
    """Half the 95 % t interval in which one more run is to be expected; None for a single run."""
    _, std = mean_std(values)
    return None if std is None else _t(len(values)) * std * math.sqrt(1 + 1 / len(values))


def verdict(values: Sequence[float], published: float) -> str:
    """Where our runs lie from a published number: within, above, below, or undecided (one run, no spread, too wide)."""
    half = prediction_half_width(values)
    if half is None or half > WIDEST:
        return "undecided"
    gap = statistics.fmean(values) - published
    if abs(gap) <= half + 1e-9:
        return "within"
    if math.isclose(
        half, 0, abs_tol=1e-9
    ):  # as in `paired`: equal accuracies do not say that there is no spread
        return "undecided"
    return "above" if gap > 0 else "below"
