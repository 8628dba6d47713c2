"""Build the papers' tables from the frame of runs, with the published numbers beside ours.

`declarations` says which tables there are. Columns are pairs of teacher and student. The mean in a
cell is over seeds and nothing else: if the runs of a cell differ in a setting, the row is split,
and the label of each part names the setting and its value.
"""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from . import published, stats
from .cells import Cell, Key, Table
from .declarations import Declaration, Quantity, declare
from .names import method_name, pair_name, row_key, row_name, setting_name, value_name
from .notes import notes, notes_on_gains, notes_on_pruned
from .protocol import other_budget, other_method
from .published import PrintedGain, Published
from .schema import Run
from .selection import (
    BUDGET,
    COMPARABLE,
    Gain,
    GainOptions,
    Result,
    Row,
    agree,
    gain_over,
    latest,
    result_of,
    rows,
    standing,
)

__all__ = ["build"]

# Largest number of commands of single runs. A longer list is replaced by the command of the sweep,
# if that is known.
FEW = 3


def build(
    frame: pd.DataFrame,
    *,
    metric: str = "best",
    sweep: str = "",
    command: str = "",
    options: GainOptions | None = None,
) -> list[Table]:
    """Build every table that has at least one run, with published numbers, gains and verdicts.

    The tables of the SDD paper come first, followed by ablations and training times in the same
    form. The tables of the LSKD paper follow, and then those of the READMEs of the papers' code. An
    overview of each data set comes last. A gain is the difference to the mean of a baseline method.
    A verdict says whether the mean of the runs is above, below or within the noise of a published
    number.

    Two kinds of runs are in no cell: runs that a later run replaced (column `superseded`), and runs
    that halving dropped (status PRUNED), which a note below the table names.

    Args:
        frame: runs, one per row, with the columns of `analysis.schema.COLUMNS`.
        metric: accuracy to show, a key of `analysis.selection.METRICS`, such as "best".
        sweep: name of the sweep, for the notes under the tables; "" for none.
        command: command that runs the whole sweep; "" if unknown. A table that would list more than
            `FEW` (3) commands for unfinished runs lists this command instead.
        options: how gains are tested; None for the defaults of `GainOptions`.

    Returns:
        The tables in order, ready to be rendered. Accuracies are in percent, and training times in
        milliseconds per batch. The list is empty if all runs are superseded or PRUNED.

    Raises:
        ValueError: If `metric` is not in `METRICS`, if a status in the frame is not valid, or if no
            table has a row of `options.baseline`.
        KeyError: If the frame lacks a column.
    """
    options = options or GainOptions()
    runs = standing(frame)
    declarations = declare([run for run in runs if run.status != "PRUNED"], metric)
    if options.baseline:
        _refuse_unknown_baseline(options.baseline, declarations)
    pruned = _pruned(runs)
    return [_table(declaration, pruned, sweep, command, options) for declaration in declarations]


def _pruned(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    """Return the runs that halving dropped, with the labels that tell them from other runs.

    A run whose configuration has another run that is not dropped is left out.
    """
    others = {run.config_hash for run in runs if run.status != "PRUNED"}
    found = []
    for dataset in dict.fromkeys(run.dataset for run in runs):
        here = [run for run in runs if run.dataset == dataset]
        for row in rows(here, lambda run: row_key(run.method, run.M)):
            label = row.label(row_name(row.name))
            for members in row.cells.values():
                found += [
                    (run, f"{pair_name(run.teacher, run.student)}, {label}, seed {run.seed}")
                    for run in members
                    if run.status == "PRUNED" and run.config_hash not in others
                ]
    return found


def _refuse_unknown_baseline(baseline: str, declarations: Sequence[Declaration]) -> None:
    tables = [
        (_labelled(rows(one.runs, one.row, one.quantity.settings), one), one)
        for one in declarations
    ]
    if tables and not any(_chosen(baseline, labelled, one) for labelled, one in tables):
        shown = dict.fromkeys(
            name
            for labelled, _ in tables
            for row in labelled.values()
            if _is_student(row)
            for name in _names_of_method(row)
        )
        raise ValueError(
            f"there are no runs of the baseline {baseline}; give one of {', '.join(shown)}"
        )


def _table(
    declaration: Declaration,
    pruned: Sequence[tuple[Run, str]],
    sweep: str,
    command: str,
    options: GainOptions,
) -> Table:
    """Build one table from its declaration.

    Args:
        declaration: which runs and published numbers the table shows, and in which rows.
        pruned: the runs that halving dropped, with their labels. A note names those on the data
            sets of the table.
        sweep: name of the sweep for the notes; "" for none.
        command: command that runs the whole sweep; "" if unknown.
        options: how gains are tested.

    Returns:
        The table, with ranks, gains and verdicts.
    """
    quantity = declaration.quantity
    numbers = {
        (declaration.published_row(number), number.pair): number for number in declaration.published
    }
    columns = _columns(declaration)
    ordered = _rows(declaration, [name for name, _ in numbers])
    labelled = _labelled(ordered, declaration)
    results = {
        (label, column): result_of(row.cells.get(pair, ()), quantity.read, quantity.counted)
        for label, row in labelled.items()
        for pair, column in columns.items()
    }
    ranks = _ranks(results, labelled, quantity)
    gains = _gains(results, labelled, declaration, options)
    cells = {}
    for label, row in labelled.items():
        for pair, column in columns.items():
            key = label, column
            number = numbers.get((row.name, pair))
            cells[key] = _cell(results[key], number, quantity, ranks.get(key, ""), gains.get(key))
    for key, text in _trained_otherwise(results, labelled).items():
        ours = (*cells[key].footnotes["ours"], text)
        cells[key] = replace(cells[key], footnotes={**cells[key].footnotes, "ours": ours})
    aggregates = _aggregates(results, gains, labelled, columns.values())
    baselines = _chosen(options.baseline, labelled, declaration)
    on_gains = notes_on_gains(
        cells, results, list(columns.values()), options, bool(aggregates), baselines
    )
    return Table(
        name=_file_name(declaration.name),
        title=declaration.title,
        quantity=quantity.label,
        counted=quantity.counted,
        decimals=quantity.decimals,
        rows=tuple(labelled),
        columns=tuple(columns.values()),
        cells=cells,
        notes=(*notes(declaration, cells, sweep), *notes_on_pruned(declaration, pruned), *on_gains),
        commands=_commands(declaration.runs, command),
        aggregates=aggregates,
        baselines=frozenset(
            gain.over for gain in gains.values() if isinstance(gain, Gain) and baselines
        ),
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
    """Return the label of each column by pair, in the order of the columns.

    The pairs of the published numbers come first, and the other pairs follow in order of their
    names.
    """
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
    """Return the rows of a table in order, with an empty row for each printed row that has no run.

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
        key=lambda row: (place.get(row.name, len(place)), declaration.sorted_by(row.name)),
    )


def _ranks(
    results: Mapping[Key, Result], labelled: Mapping[str, Row], quantity: Quantity
) -> dict[Key, str]:
    """Return which cells have the best and the second best mean of their column.

    Only cells that agree in `quantity.comparable` are ranked together, and a single cell is not
    ranked. The rounded means decide, so cells that show the same number have the same rank.
    Teachers have no rank.

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
            conditions = [getattr(result.runs[0], name) or 0 for name in quantity.comparable]
            groups[column, *conditions][key] = round(result.mean, quantity.decimals)
    ranks: dict[Key, str] = {}
    for means in groups.values():
        shown = sorted(set(means.values()), reverse=not quantity.lower_is_better)
        if len(means) > 1:
            ranks |= {key: "best" for key, mean in means.items() if mean == shown[0]}
            ranks |= {key: "second" for key, mean in means.items() if mean in shown[1:2]}
    return ranks


def _trained_otherwise(
    results: Mapping[Key, Result], labelled: Mapping[str, Row]
) -> dict[Key, str]:
    """Return a footnote for each cell that was trained with other settings than most of its column.

    The settings are those of `BUDGET`. The footnotes are by the labels of row and column.
    """
    by_column: dict[str, dict[Key, Run]] = defaultdict(dict)
    for key, result in results.items():
        label, column = key
        if result.values and _is_student(labelled[label]):
            by_column[column][key] = result.runs[0]
    notes = {}
    for runs in by_column.values():
        by_budget = {tuple(getattr(run, name) for name in BUDGET): run for run in runs.values()}
        budgets = Counter(tuple(getattr(run, name) for name in BUDGET) for run in runs.values())
        usual = by_budget[budgets.most_common(1)[0][0]]
        for key, run in runs.items():
            differing = [
                f"{setting_name(name, getattr(run, name))} "
                f"instead of {value_name(getattr(usual, name))}"
                for name in BUDGET
                if not agree(run, usual, [name])
            ]
            if differing:
                notes[key] = f"trained otherwise than most of the column: {', '.join(differing)}"
    return notes


def _gains(
    results: Mapping[Key, Result],
    labelled: Mapping[str, Row],
    declaration: Declaration,
    options: GainOptions,
) -> dict[Key, Gain | str]:
    """Return the gain of each cell over the baseline in its column.

    The p-values are corrected over all gains of the table, those of the tests of no difference and
    those of equivalence apart.

    Args:
        results: results by the labels of row and column.
        labelled: rows by label.
        declaration: the table, which names the baselines of each row.
        options: how gains are tested.

    Returns:
        The gain by cell, or the sentence that says why there is none. A cell without a number is
        left out, and so is a cell whose baseline has none.
    """
    found: dict[Key, Gain | str] = {}
    if declaration.quantity.lower_is_better:
        return found  # gains are tested for accuracies only
    chosen = _chosen(options.baseline, labelled, declaration)
    same = COMPARABLE if chosen else declaration.same
    for (label, column), result in results.items():
        if not result.values or not _is_student(labelled[label]):
            continue
        beside = [results[other, column] for other, row in labelled.items() if _is_student(row)]
        choices = [chosen]
        if not chosen:
            usual = declaration.baselines(labelled[label].name)
            choices = [
                [other for other, row in labelled.items() if row.name == name] for name in usual
            ]
        for baselines in choices:
            bases = {other: base for other in baselines if (base := results[other, column]).values}
            if bases and label not in baselines:
                of_pair = None if options.test == "paired" else beside
                found[label, column] = gain_over(result, bases, same, of_pair)
                break
    return found | _decided(found, options.margin)


def _decided(found: Mapping[Key, Gain | str], margin: float) -> dict[Key, Gain]:
    """Return the gains that have a test, with their verdicts and with p-values corrected by Holm.

    Args:
        found: the gains of a table, or the sentences that say why there is none.
        margin: largest difference, in points, that counts as no difference.
    """
    tested = {
        key: (gain, p, equal)
        for key, gain in found.items()
        if isinstance(gain, Gain)
        and (p := gain.difference.p) is not None
        and (equal := stats.equivalence(gain.difference, margin)) is not None
    }
    p_differ = stats.holm([p for _, p, _ in tested.values()])
    p_equal = stats.holm([p for _, _, p in tested.values()])
    return {
        key: replace(gain, p_holm=p, verdict=stats.decide(gain.difference, p, q))
        for (key, (gain, _, _)), p, q in zip(tested.items(), p_differ, p_equal, strict=True)
    }


def _is_student(row: Row) -> bool:
    return row.name != "teacher"


def _labelled(found: Iterable[Row], declaration: Declaration) -> dict[str, Row]:
    """Return the rows of a table by the label that people read."""
    return {row.label(declaration.label(row.name)): row for row in found}


def _chosen(baseline: str, labelled: Mapping[str, Row], declaration: Declaration) -> list[str]:
    """Return the labels of the rows that a user means by `baseline`; [] if `baseline` is "".

    A user gives the method, the name of the row, or its label, for example sd_kd, "sd_kd [1,2]",
    "SD-KD [1,2]" or "SD-KD [1,2], temperature=2".

    Args:
        baseline: text that the user gives.
        labelled: rows to choose from, by label.
        declaration: the table, for the labels of the rows.
    """
    given = baseline.replace("=None", "=null")  # Hydra takes both
    found = []
    for label, row in labelled.items():
        method = row.name.partition(" [")[0]
        names = (row.name, method, *map(declaration.label, (row.name, method)))
        # A teacher is one checkpoint, not a sample of runs.
        if _is_student(row) and given in (label, *names, *_names_of_method(row)):
            found.append(label)
    return found


def _names_of_method(row: Row) -> list[str]:
    """Return the name of the method of a row as people read it, with its scales: "SD-KD [1,2]".

    The name has no scales if the runs of the row differ in them. The list is empty if the row is
    not named after a method.
    """
    runs = [run for cell in row.cells.values() for run in cell]
    if not all(row.name in (run.method, row_key(run.method, run.M)) for run in runs):
        return []
    names = list(dict.fromkeys(method_name(run.method, run.M) for run in runs))
    return names if len(names) < 2 else [method_name(runs[0].method)]


def _aggregates(
    results: Mapping[Key, Result],
    gains: Mapping[Key, Gain | str],
    labelled: Mapping[str, Row],
    columns: Iterable[str],
) -> dict[str, stats.Aggregate]:
    """Return the mean gain over all pairs, by the label of the row.

    A row needs gains on at least two pairs, and all over rows of the same method. Other rows are
    left out.

    Args:
        results: results by the labels of row and column.
        gains: gains by the labels of row and column, or why there is none.
        labelled: rows by label.
        columns: labels of the columns.
    """
    columns = list(columns)
    found = {}
    for label in labelled:
        own = {
            column: gain
            for column in columns
            if isinstance(gain := gains.get((label, column)), Gain)
        }
        # Gains over different methods have no meaningful mean.
        if len(own) < 2 or len({labelled[gain.over].name for gain in own.values()}) > 1:
            continue
        groups: dict[Hashable, list[float]] = {}
        pairs = []
        for column, gain in own.items():
            ours, base = _samples(results[label, column], gain)
            # The same runs of a student alone may be the baseline on several pairs.
            key = tuple(sorted(gain.base.counted[seed][0].config_hash for seed in base))
            groups[label, column] = list(ours.values())
            groups[key] = list(base.values())
            pairs.append(((label, column), key))
        found[label] = stats.aggregate(groups, pairs)
        if any(gain.difference.test == "sequential" for gain in own.values()):
            # The bootstrap does not know that the results decided the number of seeds.
            found[label] = replace(found[label], low=None, high=None)
    return found


def _samples(
    result: Result, gain: Gain
) -> tuple[Mapping[int | str, float], Mapping[int | str, float]]:
    """Return the numbers of a cell and of its baseline that a gain was computed from, by seed."""
    of_looks = any(run.looks for run in gain.base.runs)
    if of_looks or gain.difference.test in ("paired", "sequential"):
        shared = sorted(result.by_seed.keys() & gain.base.by_seed.keys())
        return (
            {seed: result.by_seed[seed] for seed in shared},
            {seed: gain.base.by_seed[seed] for seed in shared},
        )
    return result.values, gain.base.values


def _cell(
    result: Result, number: Published | None, quantity: Quantity, rank: str, gain: Gain | str | None
) -> Cell:
    """Return a cell with its numbers, verdict and footnotes.

    Args:
        result: the numbers of the cell's runs.
        number: the published number of the cell, if there is one.
        quantity: the quantity of the numbers.
        rank: "best", "second" or "".
        gain: the gain, a sentence that says why there is none, or None without a baseline.
    """
    on_ours = [text for run in result.runs if (text := quantity.footnote(run))]
    on_ours += result.left_out
    on_gain = []
    if isinstance(gain, str):
        on_ours.append(gain)
        gain = None
    elif gain and gain.difference.left_out:
        on_gain.append(
            f"seeds that only one of the two rows has are left out: {gain.difference.left_out}"
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
    """Return the verdict on a published number, and footnotes that say why there can be none.

    Args:
        result: our numbers, at least one.
        number: the published number.
        quantity: the quantity of the numbers.

    Returns:
        The verdict of `stats.verdict` without footnotes, or "not comparable" with a footnote that
        names the reasons. The verdict on a teacher is "".
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

    A run does not count if its configuration also has a finished or running run. More than `FEW`
    commands are replaced by the command `whole` of the sweep, if that is not "".
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
