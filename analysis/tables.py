"""Build the papers' tables from the frame of runs, with the published numbers beside ours.

`declarations` says which tables there are. Columns are pairs of teacher and student. A cell
averages over seeds and nothing else: if the runs of a cell differ in a setting, the row is split
and the label of each part names the setting and its value.
"""

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd

from . import published, stats
from .declarations import Declaration, Quantity, declare
from .names import pair_name
from .protocol import other_budget, other_method
from .published import PrintedGain, Published
from .schema import Run
from .selection import Gain, Result, Row, gain_over, latest, result_of, rows, standing

__all__ = ["Cell", "Table", "build"]

# A longer list of commands is replaced by the command of the sweep, if that is known.
FEW = 3
VERDICTS = (
    "Verdict on a published number, from our n seeds with sample standard deviation s: within if "
    "|ours - published| <= t(n-1) * s * sqrt(1 + 1/n), half the 95 % t prediction interval for one "
    "more run; else above or below; undecided if n < 2, if all runs are equal and differ from the "
    f"published number, or if that half-width is above {stats.WIDEST:.1f} point. By chance alone "
    "one cell in twenty lies outside."
)

Key = tuple[str, str]  # labels of a row and of a column


@dataclass(frozen=True)
class Cell:
    """The results of the runs of one row and column, and the number that the paper prints there."""

    # By seed, or by the config_hash if runs are counted or the run has no seed.
    values: Mapping[int | str, float] = field(default_factory=dict)
    mean: float | None = None
    std: float | None = None  # sample standard deviation; None for one value
    planned: int = 0  # number of seeds (or runs) of any status, planned ones included
    troubles: tuple[str, ...] = ()  # why values are missing, as "1 failed"
    rank: str = ""  # best, second or ""
    published: Published | None = None
    published_gain: PrintedGain | None = None
    verdict: str = ""
    gain: Gain | None = None
    # By the line that they are on: ours, published, gain or verdict.
    footnotes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Settings that all runs of the cell share; empty for a cell without runs.
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Return the number of values that the mean is over."""
        return len(self.values)

    @property
    def seeds(self) -> list[int]:
        """Return the seeds that have a value, in ascending order."""
        return sorted(key for key in self.values if isinstance(key, int))


@dataclass(frozen=True)
class Table:
    """A table with its cells, notes and commands, ready to be rendered."""

    name: str  # for file names and anchors
    title: str
    quantity: str  # label of the numbers, with their unit
    counted: str  # what n counts: seeds or runs
    decimals: int  # digits after the point
    rows: tuple[str, ...]  # labels, in order
    columns: tuple[str, ...]  # labels, in order
    cells: Mapping[Key, Cell]  # by row and column
    notes: tuple[str, ...]
    commands: tuple[str, ...]  # that run the missing, failed and stopped runs

    @cached_property
    def footnotes(self) -> dict[str, int]:
        """Return the number of each footnote text, from 1 in the order of the cells."""
        cells = (self.cells[row, column] for row in self.rows for column in self.columns)
        texts = dict.fromkeys(
            text for cell in cells for texts in cell.footnotes.values() for text in texts
        )
        return {text: i for i, text in enumerate(texts, start=1)}


def build(
    frame: pd.DataFrame, *, metric: str = "best", sweep: str = "", command: str = ""
) -> list[Table]:
    """Return every table that has a run in the frame.

    The tables of SDD come first and those of LSKD follow, each in the order of the paper. Overviews
    come last. Superseded runs are left out.

    Args:
        frame: runs, one per row, with the columns of `analysis.schema`.
        metric: accuracy to show, a key of `analysis.selection.METRICS`.
        sweep: name of the sweep for the notes; "" for none.
        command: command that runs the whole sweep. It replaces a list of more than `FEW` commands.

    Returns:
        The tables, with accuracies in per cent and training times in milliseconds per batch.

    Raises:
        ValueError: if `metric` is not in `analysis.selection.METRICS`.
    """
    return [_table(declaration, sweep, command) for declaration in declare(standing(frame), metric)]


def _table(declaration: Declaration, sweep: str, command: str) -> Table:
    """Build the table of a declaration.

    Args:
        declaration: the table to build.
        sweep: name of the sweep for the notes; "" for none.
        command: command that runs the whole sweep; "" if unknown.

    Returns:
        The table, with ranks, gains and verdicts.
    """
    quantity = declaration.quantity
    numbers = {
        (declaration.published_row(number), number.pair): number for number in declaration.published
    }
    columns = _columns(declaration)
    ordered = _rows(declaration, [name for name, _ in numbers])
    labelled = {row.label(declaration.label(row.name)): row for row in ordered}
    results = {
        (label, column): result_of(row.cells.get(pair, ()), quantity.read, quantity.counted)
        for label, row in labelled.items()
        for pair, column in columns.items()
    }
    ranks = _ranks(results, labelled, quantity)
    gains = _gains(results, labelled, declaration)
    cells = {}
    for label, row in labelled.items():
        for pair, column in columns.items():
            key = label, column
            number = numbers.get((row.name, pair))
            cells[key] = _cell(results[key], number, quantity, ranks.get(key, ""), gains.get(key))
    return Table(
        name=_file_name(declaration.name),
        title=declaration.title,
        quantity=quantity.label,
        counted=quantity.counted,
        decimals=quantity.decimals,
        rows=tuple(labelled),
        columns=tuple(columns.values()),
        cells=cells,
        notes=tuple(_notes(declaration, cells, sweep)),
        commands=_commands(declaration.runs, command),
    )


def _file_name(text: str) -> str:
    """Return a table name that is safe in paths and in HTML.

    The names of data sets and losses, which are part of `text`, may hold any characters. If the
    name has to change, it ends with digits of a hash, so that changed names stay different.
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:100]
    if plain == text:
        return text
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _columns(declaration: Declaration) -> dict[str, str]:
    """Return the labels of the columns by pair: published pairs first, then by name."""
    labels = {run.pair: pair_name(run.teacher, run.student) for run in declaration.runs}
    # The runs of a student alone may stand beside those of a pair, which has the name of the pair.
    labels |= {
        run.pair: pair_name(run.teacher, run.student)
        for run in declaration.runs
        if run.teacher != "none"
    }
    printed = {
        number.pair: pair_name(number.teacher, number.student) for number in declaration.published
    }
    labels |= printed
    return {pair: labels[pair] for pair in [*printed, *sorted(labels.keys() - printed.keys())]}


def _rows(declaration: Declaration, printed: Sequence[str]) -> list[Row]:
    """Return the rows in order, with a row for each printed row that has no run.

    Args:
        declaration: the table.
        printed: names of the rows of the published numbers, in order.
    """
    found = rows(declaration.runs, declaration.row, declaration.quantity.settings)
    names = {row.name for row in found}
    found += [Row(name, "sddlskd", {}, {}) for name in dict.fromkeys(printed) if name not in names]
    place = {name: i for i, name in enumerate(dict.fromkeys([*declaration.order, *printed]))}
    return sorted(
        found,
        key=lambda row: (
            place.get(row.name, len(place)),
            row.name != "vanilla",
            len(row.name),
            row.name,
        ),
    )


def _ranks(
    results: Mapping[Key, Result], labelled: Mapping[str, Row], quantity: Quantity
) -> dict[Key, str]:
    """Return the best and second best cell of each column among the cells that are comparable.

    The rounded means decide, so that cells which show the same number have the same rank. Teachers
    have no rank.

    Args:
        results: results by the labels of row and column.
        labelled: rows by label.
        quantity: the quantity of the numbers.

    Returns:
        "best" or "second" by cell; cells without a rank are left out.
    """
    groups: dict[tuple[Any, ...], dict[Key, float]] = defaultdict(dict)
    for key, result in results.items():
        label, column = key
        if result.mean is not None and labelled[label].name != "teacher":
            conditions = [getattr(result.runs[0], name) for name in quantity.comparable]
            groups[column, *conditions][key] = round(result.mean, quantity.decimals)
    ranks: dict[Key, str] = {}
    for means in groups.values():
        shown = sorted(set(means.values()), reverse=not quantity.lower_is_better)
        if len(means) > 1:
            ranks |= {key: "best" for key, mean in means.items() if mean == shown[0]}
            ranks |= {key: "second" for key, mean in means.items() if mean in shown[1:2]}
    return ranks


def _gains(
    results: Mapping[Key, Result], labelled: Mapping[str, Row], declaration: Declaration
) -> dict[Key, Gain | str]:
    """Return the gain of each cell over the baseline in its column.

    The p-values are corrected over all gains of the table.

    Args:
        results: results by the labels of row and column.
        labelled: rows by label.
        declaration: the table, which names the baseline of each row.

    Returns:
        The gain by cell, or the sentence that says why there is none. A cell without a number is
        left out, and so is a cell whose baseline has none.
    """
    found: dict[Key, Gain | str] = {}
    for (label, column), result in results.items():
        baseline = declaration.baseline(labelled[label].name)
        bases = {
            other: base
            for other, row in labelled.items()
            if row.name == baseline and (base := results[other, column]).values
        }
        if result.values and bases:
            found[label, column] = gain_over(result, bases, declaration.same)
    tested = {
        key: (gain, gain.paired.p)
        for key, gain in found.items()
        if isinstance(gain, Gain) and gain.paired.p is not None
    }
    corrected = stats.holm([p for _, p in tested.values()])
    for (key, (gain, _)), p in zip(tested.items(), corrected, strict=True):
        found[key] = replace(gain, p_holm=p)
    return found


def _cell(
    result: Result, number: Published | None, quantity: Quantity, rank: str, gain: Gain | str | None
) -> Cell:
    """Return a cell with its numbers, verdict and footnotes.

    Args:
        result: the numbers of its runs.
        number: the published number of the cell, if there is one.
        quantity: the quantity of the numbers.
        rank: best, second or "".
        gain: the gain, a sentence that says why there is none, or None without a baseline.

    Returns:
        The cell.
    """
    on_ours = [text for run in result.runs if (text := quantity.footnote(run))]
    on_ours += result.left_out
    on_gain = []
    if isinstance(gain, str):
        on_ours.append(gain)
        gain = None
    elif gain and gain.paired.left_out:
        on_gain.append(
            f"seeds that only one of the two rows has are left out: {gain.paired.left_out}"
        )
    footnotes = {"ours": on_ours, "published": [], "verdict": [], "gain": on_gain}
    printed_gain = None
    verdict = ""
    if number:
        printed_gain = published.gains().get((number.table, number.pair, number.method))
        footnotes["published"] = _doubts(number, printed_gain)
    if number and result.values:
        verdict, footnotes["verdict"] = _verdict(result, number, quantity)
    settings = {}
    if result.runs:
        shared = ("source", "pair", *quantity.settings)
        settings = {name: getattr(result.runs[0], name) for name in shared}
    return Cell(
        values=result.values,
        mean=result.mean,
        std=result.std,
        planned=result.planned,
        troubles=result.troubles,
        rank=rank,
        published=number,
        published_gain=printed_gain,
        verdict=verdict,
        gain=gain,
        footnotes={line: tuple(dict.fromkeys(texts)) for line, texts in footnotes.items()},
        settings=settings,
    )


def _doubts(number: Published, gain: PrintedGain | None) -> list[str]:
    """Return the footnotes on a published number and on the gain that the paper prints for it."""
    doubts = []
    if number.flag:
        doubts.append(f"{number.flag}: {published.FLAGS[number.flag]}; {number.source}")
    if gain and not gain.agrees:
        doubts.append(
            f"{number.table} prints a gain of {gain.printed:+.2f}, but its numbers differ by "
            f"{gain.difference:+.2f} ({gain.source})"
        )
    return doubts


def _verdict(result: Result, number: Published, quantity: Quantity) -> tuple[str, list[str]]:
    """Return the verdict on a published number, and footnotes that explain a missing verdict.

    Args:
        result: our numbers, at least one.
        number: the published number.
        quantity: the quantity of the numbers.

    Returns:
        The verdict of `stats.verdict`, or "not comparable" with a footnote that names the reasons.
        The verdict on a teacher is "".
    """
    run = result.runs[0]
    # A teacher is a checkpoint and not a run.
    if run.method == "teacher":
        return "", []
    if quantity.refusal:
        reasons = [quantity.refusal]
    else:
        reasons = other_method(run, number) + other_budget(run, number)
    if reasons:
        text = f"not comparable with the published number: {', '.join(reasons)}"
        return "not comparable", [text]
    return stats.verdict(list(result.values.values()), number.value), []


def _commands(runs: Iterable[Run], whole: str) -> tuple[str, ...]:
    """Return the commands that run the missing, failed and stopped runs.

    More than `FEW` commands are replaced by the command `whole` of the sweep, if that is known.
    """
    attempts = defaultdict(list)
    for run in runs:
        attempts[run.config_hash].append(run)
    last = [latest(of_configuration) for of_configuration in attempts.values()]
    single = sorted(
        {run.command for run in last if run.status in ("FAILED", "KILLED", "MISSING")} - {""}
    )
    if whole and len(single) > FEW:
        return (whole,)
    return tuple(single)


def _notes(declaration: Declaration, cells: Mapping[Key, Cell], sweep: str) -> Iterator[str]:
    quantity = declaration.quantity
    gains = [cell.gain for cell in cells.values() if cell.gain]
    if sweep:
        yield f"Runs of {sweep}."
    yield f"{quantity.label}. {quantity.note}"
    what = quantity.counted
    yield (
        f"Cells: mean ± sample standard deviation (n {what}); 2/3 {what}: of three planned, two "
        "have a number. In each column the best is bold and the second underlined, among rows of "
        f"the same {', '.join(quantity.comparable)}: an order of the means, no test."
    )
    if declaration.published:
        tables = ", ".join(dict.fromkeys(number.table for number in declaration.published))
        yield (
            f"Published: {tables} (analysis/reference); numbers of other papers are not mixed in."
        )
    if any(cell.verdict for cell in cells.values()) and not quantity.refusal:
        yield VERDICTS
    if gains:
        tests = sum(gain.p_holm is not None for gain in gains)
        yield (
            "Gains: mean difference over the seeds that both rows have (their number in brackets), "
            "with its 95 % paired t interval, uncorrected; p: two-sided paired t test, corrected "
            f"by Holm over the table's tests ({tests})."
        )
    if varying := _varying(cells, quantity):
        yield f"Within a row these settings differ between pairs: {', '.join(varying)}."
    if repeated := _repeated(declaration.runs):
        yield (
            f"{repeated} failed or stopped runs were run again in the same configuration and "
            "finished: the finished runs count."
        )


def _varying(cells: Mapping[Key, Cell], quantity: Quantity) -> list[str]:
    """Return the settings in which the cells of a row differ."""
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
