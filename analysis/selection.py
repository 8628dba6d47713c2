"""Select the runs behind every number of the tables and figures.

`standing` takes the runs that count from the frame. `rows` puts them into rows of one method each,
and splits a row if the runs of a cell differ in a setting. `result_of` takes one number per seed
from the runs of a cell, and `gain_over` compares two cells. Tables and figures use the same
functions, so a mark in a figure and the cell of a table that it stands for have the same numbers.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd

from . import stats
from .names import setting_name
from .schema import NO_LOGIT_LOSS, STATUSES, Run, runs_of

__all__ = [
    "BUDGET",
    "COMPARABLE",
    "METRICS",
    "SETTINGS",
    "Gain",
    "GainOptions",
    "Result",
    "Row",
    "accuracy",
    "agree",
    "beside_pairs",
    "gain_over",
    "latest",
    "result_of",
    "rows",
    "spread_beside",
    "standing",
]

METRICS = {
    "best": ("best", "top-1 (%), best epoch"),
    "last": ("last", "top-1 (%), last epoch"),
    "val": ("test", "top-1 (%) on the test set, at the epoch that held-out images chose"),
}
"""Column of the frame that holds each metric, and its label."""

RECIPE = (
    "distiller",
    "features",
    "learned_temperature",
    "optimizer",
    "M",
    "standardize",
    "knowledge",
    "complementary_weight",
    "temperature",
    "ce_weight",
    "kd_weight",
)
BUDGET = ("batch_size", "epochs", "max_steps", "precision", "val_fraction", "train_fraction")
SETTINGS = (*RECIPE, "lr", *BUDGET)
"""Settings that distinguish runs, without the seed. Runs that differ in one are not averaged."""

COMPARABLE = ("source", "optimizer", "lr", *BUDGET)
"""Settings that a cell and its baseline share, unless a table names others."""
TUNED = ("temperature", "ce_weight", "kd_weight")

Read = Callable[[Run], float | str]
"""Returns a number of a run, or the reason why there is none."""


def accuracy(metric: str) -> Read:
    """Return the function that reads the top-1 accuracy (%) of a run.

    Raise ValueError if `metric` is not in `METRICS`.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric} is not valid; give one of {', '.join(METRICS)}")
    column, _ = METRICS[metric]

    def read(run: Run) -> float | str:
        if metric == "val" and not run.val_fraction:
            return "without held-out images"
        value: float | None = getattr(run, column)
        if value is None or math.isnan(value):
            return "without a number (NaN)"
        return value

    return read


# The runs that count


def standing(frame: pd.DataFrame) -> list[Run]:
    """Return the runs of the frame, oldest first and without superseded runs.

    The result does not depend on the order of the frame. A run without a config_hash takes its id
    as hash, or the number of its row, so that `config_hash` identifies a configuration.
    """
    runs = runs_of(frame[~frame["superseded"]])
    runs.sort(key=lambda run: (str(run.started), repr(run)))
    return [_as_trained(run, number) for number, run in enumerate(runs)]


def _as_trained(run: Run, number: int) -> Run:
    """Return the run with fixed values for the settings that its loss does not read.

    With M=[1] this is complementary_weight; without a loss of the logits, every setting of that
    loss. Runs that differ only in such settings thus agree in all settings. The field `unread`
    keeps the recorded values. In a run of sddlskd, max_steps=None becomes "all" and
    train_fraction=None becomes 1. A run without a config_hash takes its run_id, or "row <number>"
    if it has none.

    Args:
        run: the run as it is recorded.
        number: position of the run among all runs, oldest first.
    """
    fixed: dict[str, Any] = {}
    # With M=[1] the only region is the whole map, which always agrees with itself.
    if run.M == "[1]":
        fixed = {"complementary_weight": None}
    if run.distiller in NO_LOGIT_LOSS:
        fixed = {"complementary_weight": None, "temperature": None, "kd_weight": None}
        fixed |= {"M": "[1]", "standardize": False, "knowledge": "fusion"}
    recorded = tuple(getattr(run, setting) for setting in fixed)
    if run.max_steps is None and run.source == "sddlskd":
        fixed["max_steps"] = "all"
    if run.train_fraction is None and run.source == "sddlskd":
        fixed["train_fraction"] = 1.0  # before there was a choice
    config_hash = run.config_hash or run.run_id or f"row {number}"
    return replace(run, **fixed, config_hash=config_hash, unread=recorded)


def beside_pairs(runs: Iterable[Run], pairs: Mapping[str, str]) -> list[Run]:
    """Repeat the runs of students alone in every pair with that student.

    `pairs` maps a pair to its student. The runs of a student of no pair stay as they are.
    """
    moved = []
    for run in runs:
        own = [pair for pair, student in pairs.items() if student == run.student]
        if run.teacher == "none" and own:
            moved += [replace(run, pair=pair) for pair in own]
        else:
            moved.append(run)
    return moved


def agree(one: Run, other: Run, settings: Iterable[str]) -> bool:
    """Return whether two runs agree in the given settings.

    None means that a setting is unknown or not read by the loss, and agrees with any value. DOT is
    SGD with the losses treated differently, so the two agree as optimizers: DOT is a part of the
    method.
    """
    for setting in settings:
        ours = _as_optimizer(getattr(one, setting))
        theirs = _as_optimizer(getattr(other, setting))
        if ours is not None and theirs is not None and ours != theirs:
            return False
    return True


def _as_optimizer(value: Any) -> Any:
    return "sgd" if value == "dot" else value


def latest(attempts: Sequence[Run]) -> Run:
    """Return the run that counts among the runs of one configuration, oldest first.

    The status decides in the order of `STATUSES`, so a finished run precedes all others. Of several
    runs with the same status, the latest counts.
    """
    return min(reversed(attempts), key=lambda run: STATUSES.index(run.status))


# Rows


@dataclass(frozen=True)
class Row:
    """Runs of one method and source whose cells hold runs of equal settings."""

    name: str  # what the caller calls the method
    source: str
    split: Mapping[str, Any]  # settings that tell the row from others of its name, with its values
    cells: Mapping[str, Sequence[Run]]  # runs by pair

    def label(self, name: str, settings: Container[str] | None = None) -> str:
        """Return the label of the row, such as "KD, imported, temperature=4".

        Args:
            name: text for the row's name.
            settings: settings to show; None for all that the row is split by.
        """
        origin = [] if self.source == "sddlskd" else [self.source]
        parts = [
            setting_name(setting, value)
            for setting, value in self.split.items()
            if settings is None or setting in settings
        ]
        return ", ".join([name, *origin, *parts])


def rows(
    runs: Iterable[Run], name: Callable[[Run], str], settings: Sequence[str] = SETTINGS
) -> list[Row]:
    """Return the runs in rows: split by name, by source, and by settings that differ in a cell.

    Args:
        runs: runs on one data set, oldest first.
        name: returns the name of the row of a run.
        settings: settings that runs of one cell must share.

    Returns:
        The rows. Those of one name stand together: our own runs first, then by value of the
        settings in which they differ.
    """
    found: dict[tuple[str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        found[name(run), run.source][run.pair].append(run)
    # Our own runs come before those of other sources.
    ordered = sorted(found, key=lambda key: (key[0], key[1] != "sddlskd", key[1]))
    split_rows = []
    for row, source in ordered:
        cells = found[row, source]
        split = _differing(cells.values(), settings)
        variants: dict[tuple[Any, ...], dict[str, list[Run]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for pair, members in cells.items():
            for run in members:
                variants[_values(run, split)][pair].append(run)
        for values in sorted(variants, key=lambda values: [_place(value) for value in values]):
            by_setting = dict(zip(split, values, strict=True))
            split_rows.append(Row(row, source, by_setting, variants[values]))
    return split_rows


def _values(run: Run, settings: Iterable[str]) -> tuple[Any, ...]:
    return tuple(_setting(run, name) for name in settings)


def _setting(run: Run, name: str) -> Any:
    """Return the value of a column, or of a detail such as `features.crd.weight`."""
    if "." not in name:
        return getattr(run, name)
    value = json.loads(run.details or "{}").get(name)
    return json.dumps(value) if isinstance(value, list | dict) else value


def _differing(cells: Iterable[Sequence[Run]], settings: Sequence[str]) -> list[str]:
    """Return the settings in which the runs of one of the cells differ.

    If runs differ in settings that no column shows, their details are among them, and
    `settings_hash` if no detail tells the runs apart either.
    """
    cells = list(cells)
    split = [
        setting
        for setting in settings
        if any(len({getattr(run, setting) for run in runs}) > 1 for runs in cells)
    ]
    if settings == SETTINGS:
        unseen = [runs for cell in cells for runs in _differ_unseen(cell)]
        split += sorted({key for runs in unseen for key in _differing_details(runs)})
        if any(_differ_unseen(runs, split) for runs in unseen):
            split.append("settings_hash")
    return split


def _differ_unseen(runs: Sequence[Run], split: Sequence[str] = ()) -> list[list[Run]]:
    """Return the groups of runs with equal settings in all columns and different settings hashes.

    The runs of a group were trained with different settings that no column shows.

    Args:
        runs: runs of one cell.
        split: further settings that the runs of a group share.
    """
    alike: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run in runs:
        if run.settings_hash:
            alike[(*_values(run, (*SETTINGS, *split)), run.unread)].append(run)
    return [group for group in alike.values() if len({run.settings_hash for run in group}) > 1]


def _differing_details(runs: Sequence[Run]) -> set[str]:
    """Return the details in which the runs differ, among those that all of the runs have."""
    details = [json.loads(run.details or "{}") for run in runs]
    shared = set.intersection(*(set(one) for one in details))
    return {key for key in shared if any(one[key] != details[0][key] for one in details)}


def _place(value: Any) -> tuple[float, int, str]:
    """Return a sort key: numbers first, by size, then texts, short ones first."""
    if isinstance(value, int | float):
        return value, 0, ""
    return math.inf, len(str(value)), str(value)


# Numbers


@dataclass(frozen=True)
class Result:
    """The numbers of the runs of one cell: one per seed."""

    runs: Sequence[Run]  # all runs of the cell, also those that do not count
    # The run that counts and its number, by seed, or by config_hash if runs are counted or the run
    # has no seed.
    counted: Mapping[int | str, tuple[Run, float]]
    planned: int  # number of seeds (or runs) of any status, planned ones included
    troubles: tuple[str, ...]  # why numbers are missing, as "1 failed"
    left_out: tuple[str, ...]  # sentences on seeds that are left out

    @cached_property
    def values(self) -> dict[int | str, float]:
        """Return the numbers by seed; by config_hash if a run has no seed or every run counts."""
        return {key: value for key, (_, value) in self.counted.items()}

    @property
    def by_seed(self) -> dict[int, float]:
        """Return the numbers by seed, without those of runs that have no seed."""
        return {key: value for key, value in self.values.items() if isinstance(key, int)}

    @property
    def mean(self) -> float | None:
        """Return the mean, or None without a number."""
        return self._mean_std[0]

    @property
    def std(self) -> float | None:
        """Return the sample standard deviation, or None for fewer than two numbers."""
        return self._mean_std[1]

    @cached_property
    def _mean_std(self) -> tuple[float | None, float | None]:
        if not self.values:
            return None, None
        return stats.mean_std(list(self.values.values()))


def result_of(runs: Sequence[Run], read: Read, counted: str = "seeds") -> Result:
    """Return the result of a cell.

    Args:
        runs: runs of the cell, oldest first. They agree in every setting that a column shows.
        read: returns the number of a finished run.
        counted: "seeds" to count each seed once, "runs" to count every run.

    Returns:
        The numbers of the runs that count. Of the runs of one configuration, `latest` counts. A
        seed that ran in several configurations that no column tells apart is left out.
    """
    numbers: dict[int | str, tuple[Run, float]] = {}
    troubles: Counter[str] = Counter()
    left_out = []
    slots: dict[int | str, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if counted == "seeds" and run.seed is not None:
            slots[run.seed][run.config_hash].append(run)
        else:
            slots[run.config_hash][run.config_hash].append(run)
    for slot, configurations in slots.items():
        last = [latest(attempts) for attempts in configurations.values()]
        finished = [run for run in last if run.status == "FINISHED"]
        troubles.update(run.status.lower() for run in last if run.status != "FINISHED")
        if not finished:
            continue
        if len({run.unread for run in finished}) < len(finished):
            hashes = ", ".join(sorted(run.config_hash for run in finished))
            troubles["in several configurations"] += 1
            left_out.append(
                f"seed {slot} is left out: it ran in several configurations that no column here "
                f"tells apart ({hashes})"
            )
            continue
        value = read(finished[-1])
        if isinstance(value, str):
            troubles[value] += 1
        else:
            numbers[slot] = finished[-1], value
    return Result(
        runs=runs,
        counted=numbers,
        planned=len(slots),
        troubles=tuple(f"{count} {trouble}" for trouble, count in sorted(troubles.items())),
        left_out=tuple(left_out),
    )


@dataclass(frozen=True)
class Gain:
    """The gain of a cell over its baseline, which has the same teacher and student."""

    over: str  # label of the row of the baseline
    base: Result  # its result
    difference: stats.Difference
    p_holm: float | None = None  # p corrected over all comparisons of the table
    verdict: str = ""  # better, worse, equivalent or undecided


@dataclass(frozen=True)
class GainOptions:
    """How gains are tested.

    Attributes:
        test: "pooled" for the variance that the rows of a column have in common, and the paired
            test if Bartlett's test refuses that; "paired" for the paired test alone.
        margin: Largest difference, in points of accuracy, that counts as none.
        baseline: Name of the method that every row is compared with; "" for the baseline that each
            table gives to each row.

    Raises:
        ValueError: If `test` is not in `stats.TESTS`, or if `margin` is not a positive number.
    """

    test: str = stats.TESTS[0]
    margin: float = stats.MARGIN
    baseline: str = ""

    def __post_init__(self) -> None:
        if self.test not in stats.TESTS:
            raise ValueError(f"test={self.test} is not valid; give {' or '.join(stats.TESTS)}")
        if not 0 < self.margin < math.inf:
            raise ValueError(f"margin={self.margin:g} is not valid; give a positive number")


def gain_over(
    result: Result,
    bases: Mapping[str, Result],
    same: Sequence[str] = COMPARABLE,
    beside: Iterable[Result] | None = None,
) -> Gain | str:
    """Return the gain of a cell over its baseline, or a sentence that says why there is none.

    The baseline is the candidate that agrees with the cell in the settings `same`. If several
    candidates do, it is the one that also agrees in `TUNED`, the temperature and the weights.

    Args:
        result: the result to compare, with at least one number.
        bases: candidates for the baseline on the same pair, by the label of their row. Each has at
            least one number.
        same: settings that a result and its baseline must share.
        beside: results on the same pair, whose common variance is taken if Bartlett's test permits
            that. If not, the runs are paired by seed, or compared by Welch's test if they share
            fewer than two seeds. None to pair the runs by seed in any case.

    Returns:
        The gain; a sentence if no candidate or more than one is left, or if runs that have to be
        paired have no seed in common.
    """
    run = result.runs[0]
    fitting = {label: base for label, base in bases.items() if agree(run, base.runs[0], same)}
    # If the baseline ran at several temperatures or weights, take the row with those of this cell.
    if len(fitting) > 1:
        fitting = {
            label: base for label, base in fitting.items() if agree(run, base.runs[0], TUNED)
        }
    over = " or ".join(bases)
    if not fitting:
        return f"no gain over {over}: its runs differ in source or settings"
    if len(fitting) > 1:
        return f"no gain over {over}: {len(fitting)} of its rows fit, not one"
    ((over, base),) = fitting.items()
    if beside is not None:
        spread = spread_beside(result, beside)
        if spread is None or spread.equal:
            values = list(result.values.values())
            return Gain(over, base, stats.pooled(values, list(base.values.values()), spread))
    difference = stats.paired(result.by_seed, base.by_seed)
    if beside is not None and (difference is None or difference.n < 2):
        values = list(result.values.values())
        return Gain(over, base, stats.welch(values, list(base.values.values())))
    if difference is None:
        if result.by_seed and base.by_seed:
            return f"no gain over {over}: no seed in common"
        return f"no gain over {over}: runs without seeds cannot be paired"
    return Gain(over, base, difference)


def spread_beside(result: Result, beside: Iterable[Result]) -> stats.Spread | None:
    """Return the variance that the results of a pair with the same source and budget share.

    Args:
        result: one of the results.
        beside: all results on the pair.
    """
    run = result.runs[0]
    alike = [
        list(other.values.values())
        for other in beside
        if other.values and agree(run, other.runs[0], ("source", *BUDGET))
    ]
    return stats.spread_of(alike)
