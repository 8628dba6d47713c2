"""Write the notes under a table: what its numbers are, and how its gains were tested.

A note explains a mark, a number or a test. Notes on what does not occur in the table are left out.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from . import stats
from .cells import Cell, Key
from .declarations import PAPERS_METRIC, Declaration, Quantity
from .names import counted, value_name
from .schema import NO_LOGIT_LOSS, Run
from .selection import (
    Gain,
    GainOptions,
    Result,
    differing_settings,
    setting_of,
    spread_beside,
)

__all__ = ["notes", "notes_on_gains", "notes_on_pruned"]

WEIGHTS = ("temperature", "ce_weight", "kd_weight")
"""Settings of a loss that recipes choose beside its scales and standardisation."""
UNEQUAL = f"since Bartlett's p is below {stats.ALPHA}: the variances of the rows differ"
"""Reason for a test that does not take the variance that the rows of a column share."""
CLOSE = 2 * stats.ALPHA
"""Bartlett's p below which one more seed may bring it below `ALPHA`, and so change the test."""


def notes(declaration: Declaration, cells: Mapping[Key, Cell], sweep: str) -> Iterator[str]:
    """Yield the notes below a table that explain its numbers, except those on gains.

    Args:
        declaration: description of the table.
        cells: cells of the table, by the labels of row and column.
        sweep: name of the sweep that the runs belong to; "" if there is none.

    Yields:
        Texts of a few sentences each. The first says what the numbers are. Further notes follow if
        the table has something to explain: missing numbers, ranks, published numbers, verdicts on
        these numbers, sizes of the students, settings that differ within a row, and repeated runs.
    """
    quantity = declaration.quantity
    runs = f"Runs of {sweep}: " if sweep else ""
    yield f"{runs}{quantity.label}, mean ± sample standard deviation (n {quantity.counted})."
    if quantity.note:
        yield quantity.note
    if settings := _common(declaration.runs):
        yield f"Settings of all students: {settings}."
    if any(cell.planned > cell.n > 0 for cell in cells.values()):
        yield f"2/3 {quantity.counted}: of three planned, two have a number."
    if any(cell.rank for cell in cells.values()):
        among = _among(cells, quantity)
        yield f"Bold and underlined: the best and the second mean of a column{among}."
    if declaration.published:
        tables = ", ".join(dict.fromkeys(number.table for number in declaration.published))
        metric = "" if quantity.note else f" {PAPERS_METRIC}"
        yield f"Published: {tables} (analysis/reference).{metric}"
    if any(cell.verdict not in ("", "not comparable") for cell in cells.values()):
        yield (
            "Against the published number: within, if the number lies in the 95 % t prediction "
            "interval for one more of our runs; else above or below, by the side of our mean (one "
            "in twenty by chance); undecided for a single run, for equal runs that differ from the "
            "number, and if the interval is wider than "
            f"±{stats.WIDEST:.1f} point."
        )
    if sizes := _sizes(declaration.runs):
        yield f"Students: {'; '.join(sizes)}."
    if varying := _varying(cells, quantity):
        yield f"Within a row these settings differ between pairs: {', '.join(varying)}."
    codes = [f"own_code={code}" for code in sorted({run.own_code for run in declaration.runs})]
    if any(f", {code}" in row for row, _ in cells for code in codes):
        yield (
            "own_code: versions of the files of your own code, by the first digits of their "
            "SHA-256. Runs of different versions are not averaged."
        )
    if repeated := _repeated(declaration.runs):
        yield (
            f"{repeated} failed or stopped runs were run again in the same configuration and "
            "finished: the finished runs count."
        )


def notes_on_pruned(declaration: Declaration, pruned: Sequence[tuple[Run, str]]) -> Iterator[str]:
    """Yield one note that names the runs that halving dropped on the data sets of a table, if any.

    Halving drops the worse half of the runs that are trained together.

    Args:
        declaration: description of the table.
        pruned: the dropped runs of all data sets, each with the text that names the run in the
            note.
    """
    datasets = {run.dataset for run in declaration.runs}
    named = [f"{label} ({run.reason})" for run, label in pruned if run.dataset in datasets]
    if named:
        yield (
            f"Left out because halving dropped them, so the means are over chosen runs: "
            f"{'; '.join(named)}."
        )


def _common(runs: Iterable[Run]) -> str:
    """Return the number of epochs and the parts of the data, if all finished runs agree on them.

    Neither teachers nor runs that trained a teacher of other runs count. Fractions that stand for
    all training images are left out.
    """
    runs = list(runs)
    teachers = {run.teacher for run in runs}
    finished = [
        run
        for run in runs
        if run.status == "FINISHED" and run.source == "sddlskd" and run.method != "teacher"
        if run.teacher != "none" or run.student not in teachers
    ]
    found = []
    for name, usual in (("epochs", None), ("train_fraction", 1.0), ("val_fraction", 0.0)):
        values = {getattr(run, name) for run in finished}
        if len(values) == 1 and not values & {usual, None}:
            found.append(f"{name}={values.pop():g}")
    return ", ".join(found)


def _sizes(runs: Iterable[Run]) -> list[str]:
    """Return a text for each student with its numbers of parameters and FLOPs, if these are known.

    The texts are sorted by student, such as "vgg8 3.97 M parameters, 96.1 M FLOPs an image".
    """
    known = {
        run.student: (run.parameters, run.flops)
        for run in runs
        if run.parameters is not None and run.flops is not None
    }
    return [
        f"{student} {parameters / 1e6:.2f} M parameters, {flops / 1e6:.1f} M FLOPs an image"
        for student, (parameters, flops) in sorted(known.items())
    ]


def _among(cells: Mapping[Key, Cell], quantity: Quantity) -> str:
    """Return " among rows of the same SETTINGS", with the settings that separate the ranking.

    The result is "" if all cells are ranked together.
    """
    settings = [cell.settings for cell in cells.values() if cell.settings]
    apart = [
        name
        for name in quantity.comparable
        if len({values[name] for values in settings if values.get(name) is not None}) > 1
    ]
    return f" among rows of the same {', '.join(apart)}" if apart else ""


def notes_on_gains(
    cells: Mapping[Key, Cell],
    results: Mapping[Key, Result],
    columns: Sequence[str],
    options: GainOptions,
    aggregated: bool,
    baselines: Sequence[str],
) -> Iterator[str]:
    """Yield the notes below a table on its gains: the tests, and how large a gain must be to count.

    A gain compares the mean of a cell with that of its baseline, another row of the same column.

    Args:
        cells: cells of the table, by the labels of row and column.
        results: results of all cells, with the same keys.
        columns: labels of the columns, in order.
        options: how gains are tested, and the baseline that the user chose.
        aggregated: whether the table has a column with the mean gain over all pairs.
        baselines: labels of the rows that `options.baseline` names.

    Yields:
        Texts of one or more sentences. If the baseline that the user chose names no row or several,
        a note says so. If there are gains, a note on their tests follows, or a note that there is
        no test. If there are tests, further notes are on the smallest gain of each column that
        would be significant if no other were, and on the column of all pairs.
    """
    if options.baseline and not baselines:
        yield f"There is no row of {options.baseline} here: gains are over the table's baselines."
    if len(baselines) > 1:
        yield f"{options.baseline} names several rows; give --baseline '{baselines[0]}' or another."
    gains = {key: cell.gain for key, cell in cells.items() if cell.gain}
    if not gains:
        return
    tested = [key for key, gain in gains.items() if gain.p_holm is not None]
    if not tested:
        yield "Gains: differences of the means, without a test: too few runs, or without variance."
        return
    ways = _ways_of_testing(columns, gains, results, options)
    looking = any(gains[key].difference.test == "sequential" for key in tested)
    correction = "not corrected for the number of gains" if looking else "uncorrected"
    yield (
        f"Gains: {'; '.join(ways)}. Intervals: 95 %, {correction}. p: corrected by Holm over the "
        f"table's {counted(len(tested), 'test')}. Equivalent: within ±{options.margin:g} points, "
        "by two one-sided tests."
    )
    yield from _depending_on_the_test(gains, results)
    yield from _differing_baselines(gains, results)
    if smallest := [text for column in columns if (text := _smallest(column, gains, len(tested)))]:
        yield (
            f"A gain below about {' or '.join(smallest)} may be chance alone: to find smaller "
            "gains, run more seeds."
        )
    if aggregated:
        yield (
            "All pairs: mean of the gains with its 95 % interval (bootstrap of the runs within "
            "pair and method); P(better): probability that a run of the row is better than one of "
            "its baseline."
        )


def _ways_of_testing(
    columns: Sequence[str],
    gains: Mapping[Key, Gain],
    results: Mapping[Key, Result],
    options: GainOptions,
) -> list[str]:
    """Return a text for each kind of test of the gains, with its columns and degrees of freedom.

    Args:
        columns: labels of the columns, in order.
        gains: gains by the labels of row and column.
        results: results of all cells of the table, by the same labels.
        options: how gains are tested.
    """
    by_bartlett = options.test == "pooled"  # whether Bartlett's test chooses the test
    pooled = "; ".join(_tests_of("pooled", columns, gains, results))
    pairing = "; ".join(_tests_of("paired", columns, gains, results, with_bartlett=by_bartlett))
    unpaired = "; ".join(_tests_of("welch", columns, gains, results))
    looking = "; ".join(_tests_of("sequential", columns, gains, results, with_bartlett=False))
    ways = []
    if pooled:
        ways.append(f"t tests with the variance that the rows of a column share ({pooled})")
    if pairing:
        reason = f", {UNEQUAL}" if by_bartlett else ""
        ways.append(f"t tests paired by seed{reason} ({pairing})")
    if unpaired:
        ways.append(f"Welch's tests, {UNEQUAL} and the rows share too few seeds ({unpaired})")
    if looking:
        looks = max(gain.difference.looks for gain in gains.values())
        ways.append(
            "Welch's tests on the seeds that both rows have, with p and intervals that hold for "
            f"the {looks} looks together at which seeds=until_decided may stop ({looking})"
        )
    return ways


def _depending_on_the_test(
    gains: Mapping[Key, Gain], results: Mapping[Key, Result]
) -> Iterator[str]:
    """Yield a note on the verdicts that the paired test would not give, if Bartlett's p is close.

    Args:
        gains: gains by the labels of row and column.
        results: results of all cells of the table, by the same labels.
    """
    ps = {key: gain.difference.p for key, gain in gains.items() if gain.p_holm is not None}
    close: dict[Key, float] = {}
    for row, column in ps:
        beside = [result for (_, other), result in results.items() if other == column]
        spread = spread_beside(results[row, column], beside)
        is_pooled = gains[row, column].difference.test == "pooled"
        if is_pooled and spread and spread.bartlett is not None and spread.bartlett < CLOSE:
            close[row, column] = spread.bartlett
    for key in close:
        pairing = stats.paired(results[key].by_seed, gains[key].base.by_seed)
        ps[key] = pairing.p if pairing else None
    known = {key: p for key, p in ps.items() if p is not None}
    corrected = dict(zip(known, stats.holm(list(known.values())), strict=True))
    columns: dict[str, list[str]] = defaultdict(list)
    for row, column in close:
        p = corrected.get((row, column))
        if gains[row, column].verdict in ("better", "worse") and (p is None or p >= stats.ALPHA):
            by_chance = "cannot be tested" if p is None else f"has p {_shown_p(p)} (Holm)"
            columns[column].append(f"the gain of {row} {by_chance}")
    for column, texts in columns.items():
        bartlett = min(p for (_, other), p in close.items() if other == column)
        yield (
            f"Bartlett's p is close to {stats.ALPHA} ({column}: {_shown_p(bartlett)}), below which "
            f"the runs would be paired by seed. Paired, {'; '.join(texts)}: more seeds decide."
        )


def _smallest(column: str, gains: Mapping[Key, Gain], tests: int) -> str:
    """Return the size below which a gain of a column may be chance alone, "" without a test.

    With the variance that the rows share, the size is the median over the rows. Otherwise each row
    has an error of its own, and the text gives the smallest and the largest size, such as
    "0.40 to 2.10 points, by row (resnet14 → resnet8)".

    Args:
        column: label of the column.
        gains: gains by the labels of row and column.
        tests: number of tests of the table.
    """
    here = [gain.difference for (_, other), gain in gains.items() if other == column]
    sizes = [(one.test, size) for one in here if (size := one.detectable(tests)) is not None]
    if not sizes:
        return ""
    if all(test == "pooled" for test, _ in sizes):
        return f"{statistics.median(size for _, size in sizes):.2f} points ({column})"
    ends = dict.fromkeys(f"{end(size for _, size in sizes):.2f}" for end in (min, max))
    by_row = ", by row" if len(ends) > 1 else ""
    return f"{' to '.join(ends)} points{by_row} ({column})"


def _differing_baselines(gains: Mapping[Key, Gain], results: Mapping[Key, Result]) -> Iterator[str]:
    """Yield a note on the rows whose baseline was trained with other weights or settings.

    The gain of such a row is not the effect of its method alone.
    """
    found: dict[str, None] = {}
    for (row, column), gain in gains.items():
        own, base = results[row, column].runs[0], gain.base.runs[0]
        # A student alone has no loss on the logits whose settings could agree.
        if own.distiller != base.distiller and {own.distiller, base.distiller} & {*NO_LOGIT_LOSS}:
            continue
        differing = differing_settings(own, base, WEIGHTS)
        if differing:
            values = [
                f"{name} ({value_name(ours)} and {value_name(theirs)})"
                for name in differing
                if None not in (ours := setting_of(own, name), theirs := setting_of(base, name))
            ]
            found[f"{row} and {gain.over} in {', '.join(values or differing)}"] = None
    if found:
        yield f"Other settings differ, too: {'; '.join(found)}."


def _tests_of(
    test: str,
    columns: Iterable[str],
    gains: Mapping[Key, Gain],
    results: Mapping[Key, Result],
    *,
    with_bartlett: bool = True,
) -> Iterator[str]:
    """Yield a text for each column with gains that were tested by one of the tests.

    Args:
        test: the test to describe: "pooled", "paired", "welch" or "sequential".
        columns: labels of the columns, in order.
        gains: gains by the labels of row and column.
        results: results of all cells of the table, by the same labels.
        with_bartlett: whether to state p of Bartlett's test for equal variances.

    Yields:
        The label of the column with degrees of freedom and Bartlett's p.
    """
    for column in columns:
        beside = [result for (_, other), result in results.items() if other == column]
        details = set()
        for key, gain in gains.items():
            if key[1] == column and gain.p_holm is not None and gain.difference.test == test:
                spread = spread_beside(results[key], beside)
                bartlett = ""
                if with_bartlett and spread and spread.bartlett is not None:
                    bartlett = f", Bartlett's p {_shown_p(spread.bartlett)}"
                details.add(f"{gain.difference.df:.3g} degrees of freedom{bartlett}")
        if details:
            yield f"{column}: {' or '.join(sorted(details))}"


def _shown_p(p: float) -> str:
    """Return a p-value with two digits, with more where two would round it to 0.00 or `ALPHA`."""
    if p < 0.001:
        return "<0.001"
    digits = 3 if p < 0.01 else 2
    if abs(p - stats.ALPHA) < 0.005:
        digits = 4  # the two sides of the threshold are told apart
    return f"{p:.{digits}f}"


def _varying(cells: Mapping[Key, Cell], quantity: Quantity) -> list[str]:
    """Return the settings in which the cells of at least one row differ."""
    by_row: dict[tuple[str, str], set[Any]] = defaultdict(set)
    for (row, _), cell in cells.items():
        if cell.settings:
            for setting in quantity.settings:
                by_row[row, setting].add(cell.settings[setting])
    return list(
        dict.fromkeys(setting for (_, setting), values in by_row.items() if len(values) > 1)
    )


def _repeated(runs: Iterable[Run]) -> int:
    """Return the number of failed or stopped runs whose configuration also has a finished run."""
    runs = list(runs)
    finished = {run.config_hash for run in runs if run.status == "FINISHED"}
    return len(
        {
            run.run_id
            for run in runs
            if run.config_hash in finished and run.status in ("FAILED", "KILLED")
        }
    )
