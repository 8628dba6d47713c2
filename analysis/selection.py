"""Select the runs behind every number of the tables and figures.

`standing` takes the runs that count from the frame of runs. `rows` puts them into rows of one
method each, and splits a row if the runs of a cell (one row, one pair of teacher and student)
differ in a setting. `result_of` takes one number per seed from the runs of a cell, and `gain_over`
compares two cells. Tables and figures use the same functions, so a mark in a figure and the cell of
a table that it stands for have the same numbers.
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
from .names import counted, setting_name
from .schema import METHOD_PARTS, NO_LOGIT_LOSS, STATUSES, Run, runs_of

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
    "differing_settings",
    "gain_over",
    "latest",
    "refuse_absent",
    "result_of",
    "rows",
    "setting_of",
    "spread_beside",
    "standing",
]

METRICS = {
    "best": ("best", "top-1 (%), best epoch"),
    "last": ("last", "top-1 (%), last epoch"),
    "val": ("test", "top-1 (%) on the test set, at the epoch that held-out images chose"),
    "mAP": ("mAP", "mAP (%), best epoch"),
}
"""Column of the frame that holds each metric, and the label of the metric."""

RECIPE = (
    "distiller",
    "features",
    "learned_temperature",
    "optimizer",
    "M",
    "standardize",
    "standardization",
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
"""Settings that a cell and its baseline must share, unless a table names others."""

EMPTY_IF_UNKNOWN = ("optimizer", "precision")
"""Settings whose value is "" in a run that does not state them; other settings are None then."""

OF_METHODS = ("features.", "distiller.")
"""Beginnings of the names of those details that belong to the method of a run."""

Read = Callable[[Run], float | str]
"""Function that returns a number of a run, or the reason why the run has none."""


def accuracy(metric: str) -> Read:
    """Return a function that reads the top-1 accuracy or the mAP (%) of a run.

    The function takes a `Run` and returns its accuracy or, if the run has none, a text with the
    reason. `metric` is "best" (best epoch), "last" (last epoch), "val" (on the test set, at the
    epoch with the best accuracy on held-out images), or "mAP" (best epoch, for images with several
    labels). Raise ValueError for another metric.
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


def refuse_absent(metric: str, runs: Iterable[Run]) -> None:
    """Raise ValueError if finished runs have accuracies, but none of them has `metric`.

    The message names the metrics that the runs have. `metric` is a key of `METRICS`.
    """
    finished = [run for run in runs if run.status == "FINISHED"]
    found = {
        name: sum(not isinstance(accuracy(name)(run), str) for run in finished) for name in METRICS
    }
    known = [name for name, number in found.items() if number]
    if known and not found[metric]:
        needs = {
            "val": "; runs have val if dataset.val_fraction is above 0",
            "mAP": "; runs have mAP if their images have several labels (dataset.multi_label=true)",
        }
        raise ValueError(
            f"--metric {metric} is logged by none of {counted(len(finished), 'finished run')}; "
            f"give --metric {known[0]}; the runs log {', '.join(known)}{needs.get(metric, '')}"
        )


# The runs that count


def standing(frame: pd.DataFrame) -> list[Run]:
    """Return the runs of a frame whose column `superseded` is False, by start time, oldest first.

    A job that was run several times may still have several runs; `latest` chooses among them. Runs
    without a start time, such as planned jobs that were never run, come last. The result does not
    depend on the order of the rows.

    The runs differ from their rows in these fields:

    - A setting that the loss of a run does not use gets a fixed value, so that `agree` and `rows`
      do not tell runs apart by this setting. `unread` keeps the recorded value.
    - In a run of sddlskd, max_steps=None becomes "all" and train_fraction=None becomes 1.
    - An empty config_hash becomes the run_id. If the run_id is empty too, it becomes
      "row <number>", with the place of the run in the result, counted from 0.

    Args:
        frame: runs, one per row, with the columns of `schema.COLUMNS`.

    Raises:
        KeyError: If the frame lacks a column.
    """
    runs = runs_of(frame[~frame["superseded"]])
    runs.sort(key=lambda run: (str(run.started), repr(run)))
    return [_as_trained(run, number) for number, run in enumerate(runs)]


def _as_trained(run: Run, number: int) -> Run:
    """Return a run with fixed values for the settings that its loss does not use.

    With M=[1] this is complementary_weight; without a loss of the logits, it is every setting of
    that loss. Runs that differ only in such settings thus agree in all settings. The field `unread`
    keeps the recorded values. In a run of sddlskd, max_steps=None becomes "all" and
    train_fraction=None becomes 1. A run without a config_hash takes its run_id, or "row <number>"
    if it has none.

    Args:
        run: the run as it is recorded.
        number: position of the run among all runs, oldest first.
    """
    fixed: dict[str, Any] = {}
    # With M=[1] the only region is the whole map, so no region is complementary to it.
    if run.M == "[1]":
        fixed = {"complementary_weight": None}
    if run.distiller in NO_LOGIT_LOSS:
        fixed = {"complementary_weight": None, "temperature": None, "kd_weight": None}
        fixed |= {
            "M": "[1]",
            "standardize": False,
            "standardization": "",
            "knowledge": "fusion",
        }
    recorded = tuple(getattr(run, setting) for setting in fixed)
    if run.max_steps is None and run.source == "sddlskd":
        fixed["max_steps"] = "all"
    if run.train_fraction is None and run.source == "sddlskd":
        fixed["train_fraction"] = 1.0  # recorded before the setting existed
    config_hash = run.config_hash or run.run_id or f"row {number}"
    return replace(run, **fixed, config_hash=config_hash, unread=recorded)


def beside_pairs(runs: Iterable[Run], pairs: Mapping[str, str]) -> list[Run]:
    """Return the runs, with each run without a teacher repeated for every pair with its student.

    `pairs` maps the name of a pair of teacher and student to the name of its student. A run without
    a teacher is replaced by one copy per pair with its student; the field `pair` of the copy names
    the pair. The run stays as it is if there is no such pair, and so does a run with a teacher.
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
    """Return whether two runs have the same value in each of the given settings (fields of `Run`).

    None agrees with any value: the setting is unknown, or the loss does not use it. So does the
    empty text of an unknown optimizer or precision. The optimizers "dot" and "sgd" agree, because
    DOT is a form of SGD that belongs to the method.
    """
    for setting in settings:
        values = getattr(one, setting), getattr(other, setting)
        if None in values or (setting in EMPTY_IF_UNKNOWN and "" in values):
            continue
        if len({_as_optimizer(value) for value in values}) > 1:
            return False
    return True


def _as_optimizer(value: Any) -> Any:
    return "sgd" if value == "dot" else value


def latest(attempts: Sequence[Run]) -> Run:
    """Return the run that counts among several runs of one configuration.

    The run whose status comes first in `STATUSES` counts: FINISHED, RUNNING, PRUNED, FAILED,
    KILLED (interrupted), MISSING (planned, but never run). Among runs of this status, the last run
    counts. `attempts` are the runs, oldest first. Raise ValueError if there are none, or if a
    status is not in `STATUSES`.
    """
    return min(reversed(attempts), key=lambda run: STATUSES.index(run.status))


# Rows


@dataclass(frozen=True)
class Row:
    """Row of a table: the runs of one method and one source, by pair of teacher and student.

    The source is "sddlskd" or "imported". `split` holds the settings that tell the row from other
    rows of its method, with their values.
    """

    name: str  # result of the function that `rows` got
    source: str  # "sddlskd" for our own runs, or "imported"
    # Settings that differ between the rows of this name and source, with the values of this row
    split: Mapping[str, Any]
    cells: Mapping[str, Sequence[Run]]  # runs by pair

    def label(self, name: str, settings: Container[str] | None = None) -> str:
        """Return the label of the row, such as "KD, imported, temperature=4".

        Args:
            name: text for the name of the row, which begins the label.
            settings: names of the settings in `split` that the label shows; None for all of them.

        Returns:
            The name, the source if it is not "sddlskd", and the settings as "name=value", joined by
            ", ".
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
    """Return runs as the rows of a table; the runs of one row and one pair share their settings.

    Runs with the same name and source are in one row at first. If some of them have the same pair
    of teacher and student but differ in a setting, the row is split: each value of the setting gets
    a row of its own, for all pairs.

    Args:
        runs: runs on one data set, oldest first.
        name: function that returns the name of the row of a run, such as its method.
        settings: fields of `Run` that the runs of one row and pair must share. With the default
            `SETTINGS`, rows are also split by the version of the user's own code, by the settings
            in `Run.details`, and by `settings_hash` if no known setting tells the runs apart.

    Returns:
        The rows, sorted by name. Among rows of one name, the source "sddlskd" comes first; then the
        rows are sorted by source and by the values of the settings that split them.
    """
    found: dict[tuple[str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        found[name(run), run.source][run.pair].append(run)
    # Our own runs come before those of other sources.
    ordered = sorted(found, key=lambda key: (key[0], key[1] != "sddlskd", key[1]))
    split_rows = []
    splits = {key: _differing(cells.values(), settings) for key, cells in found.items()}
    edited = {
        file
        for key, split in splits.items()
        if "own_code" in split
        for file in _edited(run for members in found[key].values() for run in members)
    }
    for row, source in ordered:
        cells = found[row, source]
        split = splits[row, source]
        # Beside rows of several versions of a file, each row of the file names its version.
        if "own_code" not in split and edited and _all_use(cells, edited):
            split = [*split, "own_code"]
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
    return tuple(setting_of(run, name) for name in settings)


def setting_of(run: Run, name: str) -> Any:
    """Return the value of a setting of a run: a field of `Run`, or a detail.

    A detail has a dotted name, such as "features.crd.weight". If the run lacks it, the value is
    None. A list or dictionary is returned as JSON text.
    """
    if "." not in name:
        return getattr(run, name)
    value = json.loads(run.details or "{}").get(name)
    return json.dumps(value) if isinstance(value, list | dict) else value


def _differing(cells: Iterable[Sequence[Run]], settings: Sequence[str]) -> list[str]:
    """Return the settings in which the runs of any of the cells differ.

    With the default settings, there are three additions. If runs were trained with several versions
    of the user's own code, "own_code" is added. If runs differ in settings that no column shows,
    the details in which they differ are added. If the details do not tell the runs apart,
    "settings_hash" is added.
    """
    cells = list(cells)
    split = [
        setting
        for setting in settings
        if any(len({getattr(run, setting) for run in runs}) > 1 for runs in cells)
    ]
    if settings == SETTINGS:
        split += ["own_code"] if any(map(_several_codes, cells)) else []
        unseen = [runs for cell in cells for runs in _differ_unseen(cell)]
        split += sorted({key for runs in unseen for key in _differing_details(runs)})
        if any(_differ_unseen(runs, split) for runs in unseen):
            split.append("settings_hash")
    return split


def _several_codes(runs: Iterable[Run]) -> bool:
    """Return whether runs are known to be trained with several versions of one of the user's files.

    A run may use more files than another one, such as a loss besides a network.
    """
    return bool(_edited(runs))


def _edited(runs: Iterable[Run]) -> set[str]:
    """Return the names of the user's files of which the runs used several versions."""
    versions: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for file in run.own_code.split():
            name, _, digits = file.partition(":")
            versions[name].add(digits)
    return {name for name, several in versions.items() if len(several) > 1}


def _all_use(cells: Mapping[str, Sequence[Run]], files: set[str]) -> bool:
    """Return whether each run of a row is known to use one of the files."""
    runs = [run for members in cells.values() for run in members]
    return all(files & {file.partition(":")[0] for file in run.own_code.split()} for run in runs)


def _differ_unseen(runs: Sequence[Run], split: Sequence[str] = ()) -> list[list[Run]]:
    """Return groups of runs that agree in all columns of settings but not in the settings hash.

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
    """Return the details in which runs differ, among those that all of the runs state."""
    details = [json.loads(run.details or "{}") for run in runs]
    shared = set.intersection(*(set(one) for one in details))
    return {key for key in shared if any(one[key] != details[0][key] for one in details)}


def _place(value: Any) -> tuple[float, int, str]:
    """Return a sort key that puts numbers first, by size, and then texts, short ones first."""
    if isinstance(value, int | float):
        return value, 0, ""
    return math.inf, len(str(value)), str(value)


# Numbers


@dataclass(frozen=True)
class Result:
    """Numbers, such as accuracies, of the runs of one cell of a table: one number per seed.

    A cell holds the runs of one row and one pair of teacher and student. If `result_of` counts
    configurations instead of seeds, there is one number per configuration.
    """

    runs: Sequence[Run]  # all runs of the cell, also those that do not count
    # The run that counts and its number, by seed. The key is the config_hash if the run has no
    # seed, or if every configuration counts.
    counted: Mapping[int | str, tuple[Run, float]]
    planned: int  # number of seeds (or configurations), also of those that are without a number
    troubles: tuple[str, ...]  # how many numbers are missing and why, such as "1 failed"
    left_out: tuple[str, ...]  # sentences on seeds that are left out

    @cached_property
    def values(self) -> dict[int | str, float]:
        """Return the numbers by seed; {} if there are none.

        The key is the config_hash instead if the run has no seed, or if configurations are counted.
        """
        return {key: value for key, (_, value) in self.counted.items()}

    @property
    def by_seed(self) -> dict[int, float]:
        """Return the numbers of the runs that have a seed, by seed.

        The result is {} if configurations are counted instead of seeds.
        """
        return {key: value for key, value in self.values.items() if isinstance(key, int)}

    @property
    def mean(self) -> float | None:
        """Return the mean of the numbers, or None if there are none."""
        return self._mean_std[0]

    @property
    def std(self) -> float | None:
        """Return the sample standard deviation of the numbers; None for fewer than two."""
        return self._mean_std[1]

    @cached_property
    def _mean_std(self) -> tuple[float | None, float | None]:
        if not self.values:
            return None, None
        return stats.mean_std(list(self.values.values()))


def result_of(runs: Sequence[Run], read: Read, counted: str = "seeds") -> Result:
    """Return the numbers of the runs of one cell, with the reasons why numbers are missing.

    If a configuration (config_hash) ran several times, only the run that `latest` chooses counts.
    If a seed has several finished configurations that differ in settings the loss does not use, the
    last one counts. A seed with configurations that differ otherwise is left out.

    Args:
        runs: runs of one row of a table and one pair of networks, oldest first. They agree in every
            setting that the table distinguishes.
        read: function that returns the number of a finished run, or the reason why the run has
            none, such as the result of `accuracy`.
        counted: "seeds" to take one number per seed, "runs" to take one per configuration. Runs
            without a seed always give one per configuration.

    Returns:
        The result. It has no numbers if no finished run has one.

    Raises:
        ValueError: If a status is not in `STATUSES`.
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
        # Configurations with the same `unread` settings differ in something that no column shows.
        if len({run.unread for run in finished}) < len(finished):
            hashes = ", ".join(sorted(run.config_hash for run in finished))
            troubles["in several configurations"] += 1
            left_out.append(
                f"seed {slot} is left out: it ran in several configurations that no column here "
                f"tells apart ({hashes})"
            )
            continue
        chosen = next(run for run in reversed(runs) if run in finished)
        value = read(chosen)
        if isinstance(value, str):
            troubles[value] += 1
        else:
            numbers[slot] = chosen, value
    return Result(
        runs=runs,
        counted=numbers,
        planned=len(slots),
        troubles=tuple(f"{count} {trouble}" for trouble, count in sorted(troubles.items())),
        left_out=tuple(left_out),
    )


@dataclass(frozen=True)
class Gain:
    """Gain of a cell of a table over its baseline, the cell of another row with the same networks.

    The gain is the difference of the mean accuracies, in points, with its test.
    """

    over: str  # label of the row of the baseline
    base: Result  # result of the baseline
    difference: stats.Difference  # cell minus baseline
    # p-value corrected over all gains of the table; None without a test
    p_holm: float | None = None
    verdict: str = ""  # better, worse, equivalent or undecided; "" without a test


@dataclass(frozen=True)
class GainOptions:
    """How the gains of a table are tested, and over which baseline they are.

    Attributes:
        test: "pooled" takes the variance that the rows of a column have in common. If Bartlett's
            test refuses equal variances, the runs are paired by seed, or compared by Welch's test
            if they share fewer than two seeds. "paired" always pairs the runs by seed.
        margin: Largest difference, in points of accuracy, that counts as no difference.
        baseline: Row that all others are compared with: its method, name or label, such as "sd_kd",
            "sd_kd [1,2]" or "SD-KD [1,2]". In a table without this row, and for "", each row is
            compared with the baseline that the table declares for it.

    Raises:
        ValueError: If `test` is not in `stats.TESTS`, or if `margin` is not a positive finite
            number.
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
    """Return the gain of a result over its baseline, or a sentence that says why there is none.

    The baseline is the candidate that agrees with the result in the settings `same`. If several
    candidates do, the baseline is the one of them that agrees with the result in every setting in
    which these candidates differ, such as the temperature.

    A sweep may have added seeds until its gains were decided. The test is `stats.sequential` if a
    run of the method is of such a sweep, or if a run of the baseline is and the baseline lacks a
    seed of the method. In all other cases, `beside` determines the test; of a baseline from such a
    sweep, only the seeds of the method count.

    Args:
        result: result of the method, with at least one number.
        bases: results of the candidates on the same pair of networks, by the label of their row.
            Each has at least one number.
        same: fields of `Run` that the runs of the method and of the baseline must share.
        beside: results of all methods on the same pair, whose common variance the test takes. If
            Bartlett's test refuses equal variances, the runs are paired by seed, or compared by
            Welch's test if they share fewer than two seeds. None to pair the runs by seed.

    Returns:
        The gain, without `p_holm` and `verdict`; a sentence if no candidate or more than one fits,
        or if runs that have to be paired share no seed.
    """
    found = _baseline_of(result, bases, same)
    if isinstance(found, str):
        return found
    over, base = found
    difference = _difference(result, base, beside)
    if difference is None:
        if result.by_seed and base.by_seed:
            return f"no gain over {over}: no seed in common"
        return f"no gain over {over}: runs without seeds cannot be paired"
    return Gain(over, base, difference)


def _baseline_of(
    result: Result, bases: Mapping[str, Result], same: Sequence[str]
) -> tuple[str, Result] | str:
    """Return the baseline of a result with the label of its row, or why there is none.

    The arguments and the choice are those of `gain_over`.
    """
    run = result.runs[0]
    fitting = {label: base for label, base in bases.items() if agree(run, base.runs[0], same)}
    over = " or ".join(bases)
    if not fitting:
        wanting = _disagreeing(run, bases.values(), same)
        return f"no gain over {over}: its runs differ in {', '.join(wanting)}"
    # If the baseline ran in several settings, take the row with those of this cell.
    if len(fitting) > 1:
        telling = _telling_apart([base.runs[0] for base in fitting.values()])
        alike = {
            label: base for label, base in fitting.items() if not _disagreeing(run, [base], telling)
        }
        if not alike:
            wanting = _disagreeing(run, fitting.values(), telling)
            return f"no gain over {over}: its runs differ in {', '.join(wanting)}"
        fitting = alike
    if len(fitting) > 1:
        return f"no gain over {over}: {len(fitting)} of its rows fit, not one"
    (baseline,) = fitting.items()
    return baseline


def _difference(
    result: Result, base: Result, beside: Iterable[Result] | None
) -> stats.Difference | None:
    """Return the difference of a result and its baseline; None if runs to be paired share no seed.

    `beside` and the choice of the test are those of `gain_over`.
    """
    looks = max((one.looks or 0 for one in result.runs), default=0)
    if not base.by_seed.keys() >= result.by_seed.keys():
        # Results of other rows may have decided how many seeds the baseline got.
        looks = max(looks, *(one.looks or 0 for one in base.runs))
    if looks:
        return stats.sequential(result.by_seed, base.by_seed, looks)
    if beside is None:
        return stats.paired(result.by_seed, base.by_seed)
    values, base_values = list(result.values.values()), list(base.values.values())
    if result.by_seed and any(one.looks for one in base.runs):
        # Its numbers for the seeds of this row do not depend on the results.
        base_values = [base.by_seed[seed] for seed in result.by_seed]
    spread = spread_beside(result, beside)
    if spread is None or spread.equal:
        return stats.pooled(values, base_values, spread)
    pairing = stats.paired(result.by_seed, base.by_seed)
    if pairing is None or pairing.n < 2:
        return stats.welch(values, base_values)
    return pairing


def _telling_apart(runs: Sequence[Run]) -> list[str]:
    """Return the settings and details in which runs differ, without those that name the method."""
    columns = [
        name
        for name in SETTINGS
        if name not in METHOD_PARTS and len({getattr(run, name) for run in runs}) > 1
    ]
    code = ["own_code"] if _several_codes(runs) else []
    return [*columns, *code, *sorted(_differing_details(runs))]


def differing_settings(run: Run, other: Run, settings: Iterable[str]) -> list[str]:
    """Return the settings, details and versions of code in which two runs were trained differently.

    Arguments of losses and of feature methods do not count, because they belong to the method.
    `settings` are the fields of `Run` to compare.
    """
    columns = [name for name in settings if not agree(run, other, [name])]
    code = ["own_code"] if _several_codes([run, other]) else []
    details = sorted(_differing_details([run, other]))
    return [*columns, *code, *(key for key in details if not key.startswith(OF_METHODS))]


def _disagreeing(run: Run, bases: Iterable[Result], settings: Sequence[str]) -> list[str]:
    """Return the settings and details in which a run does not agree with one of the baselines."""
    found = (name for base in bases for name in settings if _unlike(run, base.runs[0], name))
    return list(dict.fromkeys(found))


def _unlike(run: Run, other: Run, name: str) -> bool:
    """Return whether two runs differ in a setting or detail that is known of both."""
    if name == "own_code":
        return _several_codes([run, other])
    if "." not in name:
        return not agree(run, other, [name])
    return name in _differing_details([run, other])


def spread_beside(result: Result, beside: Iterable[Result]) -> stats.Spread | None:
    """Return the standard deviation that the results of several methods on one pair have in common.

    A result counts if it has a number and agrees with `result` in its source and in the settings
    `BUDGET`, such as the batch size and the epochs.

    Args:
        result: one of the results, with at least one run.
        beside: results of all methods on the pair of networks, `result` included.

    Returns:
        The standard deviation; None if none of the results that count has two different numbers.
    """
    run = result.runs[0]
    alike = [
        list(other.values.values())
        for other in beside
        if other.values and agree(run, other.runs[0], ("source", *BUDGET))
    ]
    return stats.spread_of(alike)
