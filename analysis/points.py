"""Make the points that figures draw: the result of one setting in one panel.

A *setting* is what one marker stands for: a method with its scales, and with the training settings
in which runs of this method differ. The tables have a row with the same name and the same runs. A
*panel* is a pair of teacher and student on a data set.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pandas as pd

from .names import method_name, pair_name, reading_order, row_key, row_name
from .schema import Run
from .selection import (
    Gain,
    Result,
    Row,
    accuracy,
    gain_over,
    result_of,
    rows,
    setting_of,
    standing,
)
from .stats import TESTS, mean_std

__all__ = [
    "Comparison",
    "Point",
    "baselines_named",
    "beside_panels",
    "comparisons",
    "points_of",
    "same_family",
]


class Rank(NamedTuple):
    """Sort key of a `Point`: the order of the rows of a table, see `names.reading_order`."""

    place: tuple[Any, ...]
    setting: str


@dataclass(frozen=True, eq=False)
class Point:
    """Result of one setting in one panel of a figure: the accuracies (%, top-1 or mAP) of its runs.

    A setting is a method with its options, such as "SD-KD [1,2], temperature=4". A panel is a pair
    of teacher and student on a data set, or a student without a teacher.
    """

    panel: str
    setting: str
    # The setting without its scales, and without parts that tell it from settings of other panels.
    line: str
    rank: Rank
    run: Run  # one of the runs, from which to read the settings that all of them share
    runs: Sequence[Run]  # runs that count: one per seed, at least one
    result: Result  # the numbers of `runs`, at least one
    # Number of the setting among those of all points, which gives its marks the same colour in
    # every figure
    number: int = 0

    @property
    def mean(self) -> float:
        """Return the mean accuracy (%) of the runs in `runs`."""
        mean, _ = mean_std(self.values)
        return mean

    @property
    def n(self) -> int:
        """Return the number of runs in `runs`, at least 1."""
        return len(self.runs)

    @property
    def values(self) -> list[float]:
        """Return the accuracy (%) of each run in `runs`, in the same order."""
        return list(self.result.values.values())

    @property
    def alone(self) -> bool:
        """Return whether the runs train a student without distillation (distiller "vanilla")."""
        return self.run.distiller == "vanilla"

    @property
    def plain(self) -> bool:
        """Return whether the method is one loss on the logits, without regions or other extras.

        A loss with regions is computed on parts of the logit map (scales other than [1]). Other
        extras are standardised logits, further losses, a learnt temperature and the optimizer DOT.
        A student that is trained without distillation is plain, too.
        """
        return self.run.method == self.run.distiller


@dataclass(frozen=True)
class Comparison:
    """Gain in accuracy of a `Point` over a baseline, another `Point` of the same panel.

    The panel is a pair of teacher and student on a data set.
    """

    point: Point
    # "plain" for the plain form of the same loss, "vanilla" for the student alone, or the name of
    # the baseline that the user chose, such as "SD-KD [1,2]"
    over: str
    gain: Gain


def points_of(frame: pd.DataFrame, metric: str) -> tuple[list[Point], str]:
    """Return the results that figures show: one `Point` per setting and panel.

    A setting is a method with its options. A panel is a pair of teacher and student on a data set.
    Only finished runs that have the accuracy `metric`, a student and a method count, one per seed.

    Args:
        frame: runs, one per row, with the columns of `analysis.schema.COLUMNS`.
        metric: accuracy to show, a key of `analysis.selection.METRICS`, such as "best".

    Returns:
        The points, sorted by data set and pair, and a sentence for captions. The sentence counts
        the runs that are in no point, by reason, and begins with a space. The sentence is "" if
        every run is in a point. If the points are of several data sets, the name of each panel ends
        with its data set on a second line.

    Raises:
        ValueError: If `metric` is not in `METRICS`, or if a status or scales in the frame are not
            valid.
        KeyError: If the frame lacks a column.
    """
    read = accuracy(metric)
    runs = standing(frame)
    found: list[Point] = []
    for dataset in sorted({run.dataset for run in runs}):
        here = [run for run in runs if run.dataset == dataset and run.student and run.method]
        variants: dict[tuple[str, str, str], list[tuple[Row, Result]]] = defaultdict(list)
        for row in rows(here, lambda run: row_key(run.method, run.M)):
            for pair, cell in row.cells.items():
                result = result_of(cell, read)
                if result.counted:
                    variants[pair, row.name, row.source].append((row, result))
        # The lines of a method join its scales, so they have the settings of all of its rows.
        telling: dict[tuple[str, str, str], dict[str, None]] = defaultdict(dict)
        for (pair, name, source), of_method in variants.items():
            telling[pair, _line_of(name), source] |= dict.fromkeys(_varying(of_method))
        for (pair, name, source), of_method in variants.items():
            found += _points(of_method, list(telling[pair, _line_of(name), source]))
    found.sort(key=lambda point: (point.run.dataset, point.run.pair))
    if len({point.run.dataset for point in found}) > 1:
        found = [replace(point, panel=f"{point.panel}\n{point.run.dataset}") for point in found]
    ranked = sorted(found, key=lambda point: point.rank)
    settings = list(dict.fromkeys(point.setting for point in ranked))
    found = [replace(point, number=settings.index(point.setting)) for point in found]
    drawn = sum(point.n for point in found)
    return found, _left_out(frame, runs, metric, drawn)


def _line_of(row: str) -> str:
    """Return the method of the name of a row, without its scales."""
    return row.partition(" [")[0].removeprefix("sd_")


def _varying(variants: Sequence[tuple[Row, Result]]) -> list[str]:
    """Return the settings in which the rows of one method and its scales differ in one panel."""
    split = variants[0][0].split
    return [name for name in split if len({row.split[name] for row, _ in variants}) > 1]


def _points(variants: Sequence[tuple[Row, Result]], telling: Sequence[str]) -> Iterator[Point]:
    """Yield the points of one method, with its scales, and of one source in one panel.

    Args:
        variants: the rows of the method, one per variant of the training settings, with their
            results in the panel.
        telling: settings that tell the lines of the method at all of its scales apart.
    """
    varying = _varying(variants)
    for row, result in variants:
        run = result.runs[0]
        setting = row.label(row_name(row.name))
        # The settings_hash of a run depends on its scales.
        of_line = {
            name: value
            for name in telling
            if (value := setting_of(run, name)) not in (None, "") and name != "settings_hash"
        }
        of_line |= {name: row.split[name] for name in varying}
        line = replace(row, split=of_line)
        yield Point(
            panel=pair_name(run.teacher, run.student),
            setting=setting,
            line=line.label(method_name(run.method.removeprefix("sd_"))),
            rank=Rank(reading_order(row.name), setting),
            run=run,
            runs=[counted for counted, _ in result.counted.values()],
            result=result,
        )


def _left_out(frame: pd.DataFrame, runs: Sequence[Run], metric: str, drawn: int) -> str:
    """Return a sentence that counts the runs without a point, by reason; "" if there are none.

    Args:
        frame: all runs.
        runs: the runs that are not superseded (replaced by a later run).
        metric: accuracy to show, a key of `METRICS`.
        drawn: number of runs that count in a point.

    Returns:
        The sentence, with a space in front.
    """
    read = accuracy(metric)
    unfinished = Counter(run.status.lower() for run in runs if run.status != "FINISHED")
    finished = [run for run in runs if run.status == "FINISHED"]
    known = [run for run in finished if run.student and run.method]
    measured = [run for run in known if not isinstance(read(run), str)]
    counts = {
        **dict(unfinished.most_common()),
        "superseded": len(frame) - len(runs),
        f"without {metric} accuracy": len(known) - len(measured),
        "without student or method": len(finished) - len(known),
        "repeated with the same seed": len(measured) - drawn,
    }
    counted = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    if not counted:
        return ""
    return f" Runs left out: {counted}."


def beside_panels(points: Sequence[Point]) -> list[Point]:
    """Return the points, with each student without a teacher moved to the panels of its pairs.

    A panel is a pair of teacher and student on a data set. A point whose run has the teacher "none"
    is replaced by one copy in the panel of each pair with its student and data set. If there is no
    such pair, the point keeps its own panel. The order is: points with a teacher, copies, points
    that keep their own panel.
    """
    alone = [point for point in points if point.run.teacher == "none"]
    paired = [point for point in points if point.run.teacher != "none"]
    repeated = []
    lonely = []
    for point in alone:
        panels = dict.fromkeys(
            other.panel
            for other in paired
            if (other.run.dataset, other.run.student) == (point.run.dataset, point.run.student)
        )
        repeated += [replace(point, panel=panel) for panel in panels]
        if not panels:
            lonely.append(point)
    return [*paired, *repeated, *lonely]


def baselines_named(points: Sequence[Point], baseline: str) -> list[str]:
    """Return the names of the methods that a user means by `baseline`, such as ["SD-KD [1,2]"].

    As in the tables, a user gives a method, with or without its scales, as it is typed or as it is
    shown: "sd_kd", "sd_kd [1,2]" or "SD-KD [1,2]". A user may also give a setting, such as "KD,
    temperature=2". The list is empty if `points` has no such method, or if `baseline` is "".
    """
    baseline = baseline.replace("=None", "=null")  # as in the tables
    return list(
        dict.fromkeys(
            baseline if point.setting == baseline else _name(point)
            for point in points
            if _is_meant(point, baseline)
        )
    )


def _is_meant(point: Point, baseline: str) -> bool:
    method = point.run.method
    return baseline.replace("=None", "=null") in (
        point.setting,
        method,
        method_name(method),
        row_key(method, point.run.M),
        _name(point),
    )


def _name(point: Point) -> str:
    return method_name(point.run.method, point.run.M)


def comparisons(
    points: Sequence[Point], test: str = TESTS[0], baseline: str = ""
) -> tuple[list[Comparison], list[str]]:
    """Return the gain in accuracy of each point over its baselines in the same panel.

    A point is the result of one setting (a method with its options) in one panel (a pair of teacher
    and student on a data set).

    If any point fits the baseline that the user chose, the points that fit have no baseline, and
    all others are compared with those that fit in their panel. If several of these fit, such as one
    method with several scales, `selection.gain_over` chooses among them.

    Otherwise, a student alone, trained without distillation, has no baseline. Each other point is
    compared with the student alone ("vanilla") and, unless the point is plain itself
    (`Point.plain`), with the plain form of its loss on the logits ("plain").

    Args:
        points: the points to compare, baselines included. A student alone is a baseline in all
            panels with this student and data set.
        test: test of the gains, "pooled" or "paired", as in `selection.GainOptions`.
        baseline: the baseline that the user chose, as in `selection.GainOptions`; "" for none.

    Returns:
        The gains, and a text "SETTING (reason)" for each gain that cannot be computed. If the panel
        has no point of the baseline's method, there is neither a gain nor a text.
    """
    found = []
    without = []
    chosen = " or ".join(baselines_named(points, baseline))
    in_panel: dict[str, list[Point]] = defaultdict(list)
    for point in beside_panels(points):
        in_panel[point.panel].append(point)
    for point in itertools.chain.from_iterable(in_panel.values()):
        here = in_panel[point.panel]
        if chosen and _is_meant(point, baseline):
            continue
        if chosen:
            baselines = {chosen: [other for other in here if _is_meant(other, baseline)]}
        else:
            baselines = _usual_baselines(point, here)
        for over, others in baselines.items():
            if others:
                bases = {other.setting: other.result for other in others}
                beside = [other.result for other in here] if test == "pooled" else None
                gain = gain_over(point.result, bases, beside=beside)
                if isinstance(gain, str):
                    without.append(f"{point.setting} ({gain})")
                else:
                    found.append(Comparison(point, over, gain))
    return found, without


def _usual_baselines(point: Point, here: Sequence[Point]) -> dict[str, list[Point]]:
    """Return the points of a panel that a point is compared with if the user chose no baseline.

    Args:
        point: the point to compare.
        here: all points of its panel.

    Returns:
        The baselines by `Comparison.over`: "vanilla" and "plain".
    """
    if point.alone:
        return {}
    baselines = {"vanilla": [other for other in here if other.alone]}
    if not point.plain:
        loss = point.run.distiller
        baselines["plain"] = [other for other in here if other.run.method == loss]
    return baselines


def same_family(teacher: str, student: str) -> bool:
    """Return whether the names of two networks are of one family, such as resnet32x4 and resnet8x4.

    The family is the part of the name before the first digit or underscore.
    """
    return _family(teacher) == _family(student)


def _family(network: str) -> str:
    return re.split(r"[\d_]", network, maxsplit=1)[0]
