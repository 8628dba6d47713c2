"""Compare the published numbers with each other and with the logs of LSKD's authors.

`lines` makes the text of docs/evidence.md from the files of `reference`: the published numbers, and
the best and the last epoch of the logs that LSKD's authors published.
"""

import csv
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from . import published
from .names import method_name, pair_name
from .published import REFERENCE, Published

__all__ = ["Log", "lines", "logs"]

LOGS = "lskd_logs.csv"
FAR = 0.3
"""Smallest difference of a log's best epoch from the published mean, in points, to be listed."""
TABLES = ("LSKD Table 1", "LSKD Table 2", "LSKD Table 3")
"""Tables of LSKD with the results of the runs in the logs."""
# Tables of published_more.csv whose names begin so repeat the logs.
REPEAT_LOGS = "LSKD logs"
ABLATIONS = ("SDD Table 6", "SDD Table 7", "SDD Table 8", "LSKD Table 4")
"""Tables of ablations, whose numbers are of variants of a method."""
HEAD = f"""\
# What the papers' own numbers say

`python -m analysis evidence` writes this page from `analysis/reference`: the published numbers
(`published.csv`, `published_more.csv`, `published_readmes.csv`) and the logs that LSKD's authors
published in the folder `logs` of github.com/sunshangquan/logit-standardization-KD (`{LOGS}` has the
best and the last epoch of each run, as `python -m analysis import-logs` reads them)."""


@dataclass(frozen=True)
class Log:
    """Run of LSKD's authors, with the top-1 (%) of the best and of the last epoch in its log."""

    log: str  # path of the log in the authors' repository
    method: str  # as `schema.method_of` spells it
    dataset: str
    teacher: str
    student: str
    epochs: int  # number of epochs
    best: float  # top-1 (%) of the best epoch
    last: float  # top-1 (%) of the last epoch

    @property
    def pair(self) -> str:
        """Return the names of teacher and student, joined by "_": "resnet32x4_resnet8x4"."""
        return f"{self.teacher}_{self.student}"


def logs() -> list[Log]:
    """Return the runs of LSKD's authors in reference/lskd_logs.csv, in the order of the file."""
    with (REFERENCE / LOGS).open(newline="", encoding="utf-8") as file:
        return [
            Log(
                **{key: row[key] for key in ("log", "method", "dataset", "teacher", "student")},
                epochs=int(row["epochs"]),
                best=float(row["best"]),
                last=float(row["last"]),
            )
            for row in csv.DictReader(file)
        ]


def lines() -> Iterator[str]:
    """Yield the Markdown text of docs/evidence.md in pieces, to be joined by line breaks.

    The text has four sections:

    - the accuracies of the best and of the last epochs in the logs of LSKD's authors;
    - runs whose best epoch in the log differs from the published mean by at least `FAR` (0.3)
      points;
    - published means that equal the best epoch of a single run;
    - results of a method on a pair that several tables print with different numbers.
    """
    runs = logs()
    yield HEAD
    yield from _best_and_last(runs)
    yield from _far_from_published(runs)
    yield from _one_run_as_mean(runs)
    yield from _printed_differently()


def _row(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _of_lskd() -> dict[tuple[str, str, str], Published]:
    """Return the top-1 (%) that LSKD published in `TABLES`, by data set, pair and method."""
    return {
        (number.dataset, number.pair, number.method): number
        for table in TABLES
        for number in published.of_table(table)
    }


def _with_number(runs: Iterable[Log]) -> Iterator[tuple[Log, Published]]:
    """Yield each run that has a published number (`_of_lskd`), with this number."""
    numbers = _of_lskd()
    for run in runs:
        if number := numbers.get((run.dataset, run.pair, run.method)):
            yield run, number


def _best_and_last(runs: list[Log]) -> Iterator[str]:
    yield ""
    yield "## Best against last epoch"
    yield ""
    yield (
        "The papers report the best epoch on the test set. Means over the runs of each method, in "
        "points of top-1. Published is the number in LSKD's table, a mean of four trials:"
    )
    yield ""
    yield _row(("", "runs", "best - last", "best - published", "last - published"))
    yield "|:--|--:|--:|--:|--:|"
    by_method: dict[str, list[Log]] = defaultdict(list)
    for run in runs:
        by_method[run.method].append(run)
    groups = {method_name(method): members for method, members in by_method.items()}
    for name, members in {**groups, "all": runs}.items():
        known = list(_with_number(members))
        yield _row(
            (
                name,
                len(members),
                f"{statistics.fmean(run.best - run.last for run in members):.2f}",
                f"{statistics.fmean(run.best - number.value for run, number in known):+.2f}",
                f"{statistics.fmean(run.last - number.value for run, number in known):+.2f}",
            )
        )
    gaps = [run.best - run.last for run in runs]
    yield ""
    yield (
        f"Over all {len(runs)} runs, the best epoch is between {min(gaps):.2f} and {max(gaps):.2f} "
        "points above the last. State which of the two a table holds: many published gains are "
        "smaller."
    )


def _far_from_published(runs: list[Log]) -> Iterator[str]:
    known = list(_with_number(runs))
    far = [(run, number) for run, number in known if round(abs(run.best - number.value), 2) >= FAR]
    far.sort(key=lambda item: item[1].value - item[0].best)
    yield ""
    yield "## Cells that differ from their own log"
    yield ""
    yield (
        f"{len(far)} of {len(known)} runs whose cell is published have a best epoch that is {FAR} "
        "points or more away from the published mean:"
    )
    yield ""
    yield _row(("cell", "log", "published", "difference"))
    yield "|:--|--:|--:|--:|"
    for run, number in far:
        cell = f"{method_name(run.method)}, {pair_name(run.teacher, run.student)} ({number.table})"
        gap = f"{run.best - number.value:+.2f}"
        yield _row((cell, f"{run.best:.2f}", f"{number.value:.2f}", gap))


def _one_run_as_mean(runs: list[Log]) -> Iterator[str]:
    equal = [
        (run, number)
        for run, number in _with_number(runs)
        if round(run.best - number.value, 2) == 0
    ]
    counts = Counter(method_name(run.method) for run, _ in equal)
    counted = ", ".join(f"{name} {count}" for name, count in counts.items())
    yield ""
    yield "## Means that equal a single run"
    yield ""
    yield (
        "The tables are means of four trials. In these cells the best epoch of the one published "
        f"run equals the mean to both decimals ({counted}):"
    )
    yield ""
    for run, number in equal:
        cell = f"{method_name(run.method)}, {pair_name(run.teacher, run.student)}"
        yield f"- {cell}: {run.best:.2f} ({number.table}; {run.log})"


def _printed_differently() -> Iterator[str]:
    """Yield a section on the results that several tables print with different numbers."""
    cells: dict[tuple[str, str, str], dict[float, list[Published]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for number in published.numbers():
        variant = number.table in ABLATIONS or number.table.startswith(REPEAT_LOGS)
        if number.metric == "top1" and not variant:
            cells[number.dataset, number.pair, number.method][number.value].append(number)
    several = {
        key: values
        for key, values in cells.items()
        if len({number.table for numbers in values.values() for number in numbers}) > 1
        and key[2] not in ("teacher", "vanilla")
    }
    differing = {key: values for key, values in several.items() if len(values) > 1}
    yield ""
    yield "## The same cell in several sources"
    yield ""
    yield (
        f"{len(several)} results of a method on a pair are printed in more than one table; "
        f"{len(several) - len(differing)} agree and {len(differing)} differ. Each table here shows "
        "the numbers of its own source only."
    )
    yield ""
    yield _row(("data set", "pair", "method", "numbers"))
    yield "|:--|:--|:--|:--|"
    for (dataset, _, method), values in sorted(differing.items()):
        number = next(iter(values.values()))[0]
        shown = "; ".join(
            f"{value:.2f} ({', '.join(dict.fromkeys(map(_source, numbers)))})"
            for value, numbers in values.items()
        )
        pair = pair_name(number.teacher, number.student)
        yield _row((dataset, pair, method_name(method), shown))


def _source(number: Published) -> str:
    # The name of the table says already that the number is from a README.
    return f"{number.table}, {number.flag}" if number.flag not in ("", "readme") else number.table
