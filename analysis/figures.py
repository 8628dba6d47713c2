"""Draw the papers' figures from runs, as PNG and SVG.

Each figure has a caption that says what the figure shows and on how many seeds. The runs behind a
mark, their mean and their intervals are those of the tables (`points`, `selection`). The figures of
predictions are in `prediction_figures`.
"""

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import matplotlib
import pandas as pd
from matplotlib.ticker import MaxNLocator

from .charts import (
    STYLE,
    Chart,
    Dot,
    count_seeds,
    dots,
    few,
    half_width,
    legend,
    listed,
    panels_of,
    settings_in_dots,
    stop_at_100,
    style_of,
)
from .names import counted, scales_order
from .points import (
    Comparison,
    Point,
    baselines_named,
    beside_panels,
    comparisons,
    points_of,
    same_family,
)
from .prediction_figures import (
    Predictions,
    agreement_chart,
    correlation_chart,
    features_chart,
    kept_of,
    regions_chart,
)
from .selection import BUDGET, METRICS
from .stats import TESTS, interval

__all__ = ["Figure", "build", "curves"]

MARKED_EPOCHS = 60  # with more epochs, markers would hide the curves
KINDS = {False: "heterogeneous", True: "homogeneous"}  # whether the pair is of one family
KINDS_SAID = 4  # largest number of settings and baselines whose mean gain a caption states
OVER = {"plain": "the plain distiller", "vanilla": "the student alone"}
"""Baselines of the figure of gains if the user chose none, and what axes and caption call them."""
TITLES = {"plain": "over the same loss with M=[1], without LS", "vanilla": "over the student alone"}
"""Titles of the charts of gains over these baselines."""


class Source(Predictions, Protocol):
    """Runs that the figures are drawn from, such as `analysis.runs.Runs`.

    `frame` has one row per run, with the columns of `analysis.schema.COLUMNS`. `history` returns
    metrics by epoch, and `predictions` the arrays that a run saved, as the methods of `Runs` do.
    """

    @property
    def frame(self) -> pd.DataFrame:
        """Return the runs, one per row, with the columns of `analysis.schema.COLUMNS`."""

    def history(
        self, metrics: Sequence[str] = ..., run_ids: Iterable[str] | None = ...
    ) -> pd.DataFrame:
        """Return metrics of runs by epoch, as `analysis.runs.Runs.history` does.

        `metrics` are names such as "val/top1". `run_ids` are ids of runs in MLflow; None for all.
        """


@dataclass(frozen=True)
class Figure:
    """Title, caption and paths of a figure that `build` has written to a PNG and an SVG file."""

    name: str  # stem of its file names
    title: str
    caption: str
    png: Path
    svg: Path


def build(
    runs: Source,
    out: Path,
    *,
    metric: str = "best",
    test: str = TESTS[0],
    baseline: str = "",
) -> list[Figure]:
    """Draw every figure that the runs have data for, and write it as PNG and SVG.

    Figures are, for example, learning curves, gains by pair, and accuracy against training time.

    Args:
        runs: the runs to draw, with their metrics by epoch and their predictions.
        out: folder for the PNG and SVG files, created if it is missing.
        metric: accuracy to show, a key of `analysis.selection.METRICS`, such as "best".
        test: test of the gains: "pooled" or "paired", see `analysis.selection.GainOptions`.
        baseline: method that all others are compared with, as in `analysis.selection.GainOptions`.
            For "", and if no run is of this method, the baselines are the plain form of each loss
            and the student alone.

    Returns:
        The figures that were written. If no finished run with a known student and method has the
        metric, the list is empty and nothing is written.

    Raises:
        ValueError: If `metric` is not in `analysis.selection.METRICS`, if a status or scales in the
            frame of `runs` are not valid, or if the metrics or predictions cannot be read.
        KeyError: If the frame of `runs` lacks a column.
        OSError: If the folder or a file cannot be written.
    """
    points, left_out = points_of(runs.frame, metric)
    if not points:
        return []
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[Figure] = []
    with matplotlib.rc_context(STYLE):
        kept = kept_of(runs, points)
        for chart in (
            learning_curves(runs, points),
            accuracy_by_scales(points, metric),
            gain_by_pair(points, metric, test, baseline),
            agreement_chart(kept),
            correlation_chart(kept),
            features_chart(kept),
            regions_chart(kept),
            cost(points, metric),
        ):
            if chart is not None:
                drawn.append(_saved(chart, out, left_out))
    return drawn


def _saved(chart: Chart, out: Path, left_out: str) -> Figure:
    """Write a chart to its PNG and SVG files.

    Args:
        chart: the chart to write.
        out: folder for the files.
        left_out: sentence on the runs that no figure shows, for the end of the caption.

    Returns:
        The figure, with the paths of both files and the whole caption.
    """
    png = out / f"{chart.name}.png"
    svg = out / f"{chart.name}.svg"
    chart.drawing.draw_without_rendering()
    chart.drawing.set_layout_engine("none")  # keeps the same layout for both files
    chart.drawing.savefig(png, dpi=200, metadata={"Software": None})
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    chart.drawing.savefig(svg, dpi=200, metadata=no_metadata)
    return Figure(chart.name, chart.title, f"{chart.caption}{left_out}", png, svg)


def _axis_label(metric: str) -> str:
    """Return the label of an axis with this metric: "top-1 (%)" or "mAP (%)"."""
    _, label = METRICS[metric]
    return label.partition(",")[0].partition(" on ")[0]


def _metric_label(metric: str, points: Iterable[Point]) -> str:
    """Return the start of a caption: the label of the metric, and which images it is of."""
    _, label = METRICS[metric]
    start = label[0].upper() + label[1:]
    if metric == "val" or not any(point.run.val_fraction for point in points):
        return start
    return (
        f"{start} (of the held-out training images, not of the test set, for runs that hold some "
        "out)"
    )


def _panels(points: Iterable[Point]) -> list[str]:
    """Return the panels of the points, each once, in the order of the points."""
    return list(dict.fromkeys(point.panel for point in points))


# Learning curves


def curves(frame: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """Return the learning curve of each setting in each panel: the mean over its runs, by epoch.

    A panel is a pair of teacher and student. A setting is, for example, a method.

    Args:
        frame: runs, one per row, with the columns panel, setting and run_id. A run may have several
            rows, for several panels.
        history: values, one per run and epoch, with the columns run_id, epoch and value. Missing
            values (NaN) and runs that `frame` lacks are skipped.

    Returns:
        A frame with one row per panel, setting and epoch, sorted by epoch. The columns are panel,
        setting, epoch, mean and std of the values (sample standard deviation, NaN for one run), and
        n (number of runs that have a value). Without values, the frame is empty.
    """
    points = frame[["panel", "setting", "run_id"]].merge(
        history[["run_id", "epoch", "value"]].dropna(), on="run_id"
    )
    grouped = points.groupby(["panel", "setting", "epoch"], sort=False)["value"]
    return (
        grouped.agg(mean="mean", std="std", n="count")
        .reset_index()
        .sort_values("epoch", kind="stable")
    )


def learning_curves(runs: Source, points: Sequence[Point]) -> Chart | None:
    """Draw the top-1 accuracy (%, metric val/top1) by epoch, with one panel per pair of networks.

    A line is the mean over the runs of one setting (a method with its options), with a band of ±
    one sample standard deviation.

    Args:
        runs: source of the accuracies by epoch.
        points: results of methods, whose runs are drawn. Students that were trained alone are drawn
            in the panels of all pairs with the same student and data set.

    Returns:
        The chart, or None if no run has an accuracy after the first epoch. The chart has at most 12
        panels and 12 lines. Its caption names the panels and settings that it has no room for.

    Raises:
        ValueError: If the accuracies by epoch cannot be read.
    """
    shown, settings, rest = few(beside_panels(points), lambda point: point.setting)
    frame = pd.DataFrame(
        [(point.panel, point.setting, run.run_id) for point in shown for run in point.runs],
        columns=["panel", "setting", "run_id"],
    )
    table = curves(frame, runs.history(("val/top1",), sorted(set(frame["run_id"]))))
    if table.empty or table["epoch"].max() < 2:
        return None
    with_curve = set(table["panel"])
    panels = [panel for panel in _panels(shown) if panel in with_curve]
    drawing, axes = panels_of(panels, "epoch", "top-1 (%)")
    longest = int(table["epoch"].max())
    for (panel, setting), line in table.groupby(["panel", "setting"]):
        index = settings[setting]
        style = style_of(index)
        if longest > MARKED_EPOCHS:
            style["marker"] = ""
        axes[panel].plot(line["epoch"], line["mean"], **style, markevery=(0.04 * (index % 5), 0.2))
        axes[panel].fill_between(
            line["epoch"],
            line["mean"] - line["std"],
            line["mean"] + line["std"],
            color=style["color"],
            alpha=0.15,
            linewidth=0,
        )
    for panel, lines in table.groupby("panel"):
        floor = lines["mean"].quantile(0.1)
        axes[panel].set_ylim(bottom=floor - 0.05 * (lines["mean"].max() - floor))
        stop_at_100(axes[panel])
        axes[panel].xaxis.set_major_locator(MaxNLocator(integer=True))
    marks = {"marker": ""} if longest > MARKED_EPOCHS else {}
    legend(drawing, settings, **marks)
    caption = (
        "Top-1 accuracy by epoch (val/top1: on the test split, or on the held-out images for runs "
        "that hold some out). Lines: mean over seeds; bands: ± one sample standard deviation, none "
        f"for a single seed; {count_seeds(table['n'])}. The vertical axes start near the 10th "
        f"percentile of the means, so that the ends of the curves can be told apart.{rest}"
    )
    return Chart("learning_curves", "Learning curves", caption, drawing)


# Accuracy against the scales


def accuracy_by_scales(points: Sequence[Point], metric: str) -> Chart | None:
    """Draw accuracy (%, top-1 or mAP) against the scales M, with one panel per pair of networks.

    With a scale m, the loss is computed on m x m regions of the logit map. A line joins the means
    of one method at different M, such as [1] and [1,2,4]. A method that was trained in several
    settings may have several lines.

    Args:
        points: results of methods. Not drawn are students that were trained alone, results with
            unknown M, and lines with a single M.
        metric: accuracy that the points hold, a key of `METRICS`. The caption names the metric.

    Returns:
        The chart, or None if no line has several M. The chart has at most 12 panels and 12 lines.
        Its caption names the panels and lines that it has no room for.
    """
    scales: dict[tuple[str, str], set[str]] = {}
    for point in points:
        scales.setdefault((point.panel, point.line), set()).add(point.run.M)
    several = [
        point
        for point in points
        if not point.alone and point.run.M and len(scales[point.panel, point.line]) > 1
    ]
    if not several:
        return None
    shown, lines, rest = few(several, lambda point: point.line)
    drawing, axes = panels_of(_panels(shown), "scales M", _axis_label(metric))
    for panel, axis in axes.items():
        here = [point for point in shown if point.panel == panel]
        by_size = sorted(here, key=lambda point: scales_order(point.run.M))
        ticks = list(dict.fromkeys(point.run.M for point in by_size))
        axis.set_xticks(range(len(ticks)), ticks)
        axis.set_xlim(-0.5, len(ticks) - 0.5)
        axis.grid(axis="x", visible=False)
        drawn = [line for line in lines if any(point.line == line for point in here)]
        for number, line in enumerate(drawn):
            style = style_of(lines[line])
            shift = 0.5 * ((number + 0.5) / len(drawn) - 0.5)
            of_line = [point for point in by_size if point.line == line]
            x = [ticks.index(point.run.M) + shift for point in of_line]
            axis.errorbar(
                x,
                [point.mean for point in of_line],
                yerr=[half_width(interval(point.values)) for point in of_line],
                **style,
                elinewidth=0.8,
                capsize=2,
            )
            for at, point in zip(x, of_line, strict=True):
                small = {"color": style["color"], "markersize": 2.5, "alpha": 0.6}
                axis.plot([at] * point.n, point.values, ".", **small)
        axis.margins(y=0.1)
        stop_at_100(axis)
    legend(drawing, lines)
    mixed = ", ".join(_mixed(shown))
    also = f" These settings also differ along a line: {mixed}." if mixed else ""
    caption = (
        f"{_metric_label(metric, shown)}, against the scales M. Marks: mean over seeds; bars: 95 % "
        "interval of the mean (Student's t), none for a single seed; small dots: seeds; "
        f"{count_seeds(point.n for point in shown)}.{also}{rest}"
    )
    return Chart("accuracy_by_scales", "Accuracy against the scales M", caption, drawing)


def _mixed(points: Sequence[Point]) -> list[str]:
    """Return the settings, other than M, in which the points of at least one line differ."""
    names = ("temperature", "ce_weight", "kd_weight", "lr", *BUDGET)
    values: dict[tuple[str, str, str], set[object]] = {}
    for point in points:
        for name in names:
            of_line = values.setdefault((name, point.panel, point.line), set())
            of_line.add(getattr(point.run, name))
    differing = {name for (name, _, _), found in values.items() if len(found) > 1}
    return [name for name in names if name in differing]


# Gains


def gain_by_pair(
    points: Sequence[Point], metric: str, test: str, baseline: str = ""
) -> Chart | None:
    """Draw the gain in accuracy (percentage points) of each method over its baselines, by pair.

    The baseline is the one that the user chose, as in the tables. If the user chose none, there are
    two. One is the plain form of the method: only its loss on the logits, on the whole logit map
    (M=[1]), without standardisation. The other is the student that was trained alone. A method and
    its baseline are on the same pair of teacher and student. A mark is the difference of the means,
    with its 95 % interval. The title and the label of the axis name the baseline.

    Args:
        points: results of the methods and baselines.
        metric: accuracy that the points hold, a key of `METRICS`. The caption names the metric.
        test: test that gives the intervals: "pooled" or "paired", see `selection.GainOptions`.
        baseline: the baseline that the user chose, see `selection.GainOptions`; "" for none.

    Returns:
        The chart, or None if no point has a gain. The caption names the gains that cannot be
        computed, and the panels and settings that the chart has no room for.
    """
    gains, without = comparisons(points, test, baseline)
    if not gains:
        return None
    gaining = list(dict.fromkeys(comparison.point for comparison in gains))
    most = settings_in_dots(len(_panels(gaining)))
    shown, settings, rest = few(gaining, lambda point: point.setting, most)
    # A student alone stands in the panels of its pairs; without pairs, it has a panel of its own.
    pairs = {point.panel: point.run for point in points if point.run.teacher != "none"}
    homogeneous = {
        panel: panel not in pairs or same_family(pairs[panel].teacher, pairs[panel].student)
        for panel in _panels(shown)
    }
    panels = sorted(homogeneous, key=lambda panel: not homogeneous[panel])
    kept = set(shown)
    drawn = [comparison for comparison in gains if comparison.point in kept]
    columns = [
        (
            f"gain over {OVER.get(over, over)} (points)",
            [_dot(comparison) for comparison in drawn if comparison.over == over],
        )
        for over in _baselines_of(drawn)
    ]
    drawing = dots(
        columns,
        panels,
        settings,
        shaded={panel: "  ≠" for panel in panels if not homogeneous[panel]},
    )
    for axis, over in zip(drawing.axes, _baselines_of(drawn), strict=True):
        axis.axvline(0, color="black", linewidth=0.8)
        # The tables may have another baseline for the same row.
        axis.set_title(TITLES.get(over, f"over {over}, as in the tables"))
    caption = (
        f"{_metric_label(metric, points)}: gain. Marks: difference of the means; bars: 95 % "
        f"interval, {_tests_said(gains)}, not corrected for the number of intervals; "
        f"{count_seeds(one.gain.difference.n for one in gains)}. "
        f"{_baselines_said(points, baseline)} "
        "If a baseline ran in several settings, the one with the settings of the row is taken, as "
        "in the tables. Shaded and marked ≠: heterogeneous pairs (teacher and "
        "student of different families)."
        f"{_mean_by_kind(drawn, settings, homogeneous)}"
        f"{listed('Without a gain', sorted(set(without)))}{rest}"
    )
    return Chart("gain_by_pair", "Gain by pair", caption, drawing)


def _baselines_of(gains: Iterable[Comparison]) -> list[str]:
    """Return the baselines of the gains (`Comparison.over`), the plain form first."""
    used = dict.fromkeys(one.over for one in gains)
    return sorted(used, key=lambda over: over != "plain")


def _baselines_said(points: Sequence[Point], baseline: str) -> str:
    """Return sentences for the caption on the baselines of the figure of gains.

    Args:
        points: results of the methods and baselines.
        baseline: the baseline that the user chose; "" for none.
    """
    if named := baselines_named(points, baseline):
        panels = _panels(beside_panels(points))
        with_baseline = _panels(
            point for point in beside_panels(points) if baselines_named([point], baseline)
        )
        bare = [panel for panel in panels if panel not in with_baseline]
        without = listed(f"Pairs without {baseline}, and so without a gain", bare)
        return f"Baseline, as in the tables: {' or '.join(named)}.{without}"
    plain = "Plain: the same distiller with M=[1] and no standardisation."
    if baseline:
        return f"There is no result of {baseline}, so the baselines are the usual ones. {plain}"
    return f"{plain} The tables name the baseline of each row, which may be another one."


def _tests_said(gains: Iterable[Comparison]) -> str:
    """Return words for the caption on how the intervals of the gains were computed."""
    ways = {
        "pooled": "with the variance that the methods of a pair have in common",
        "paired": "paired by seed",
        "welch": "by Welch's test",
        "sequential": "by Welch's test for all looks of the sweep together",
    }
    used = {one.gain.difference.test for one in gains}
    return " or ".join(text for test, text in ways.items() if test in used)


def _dot(comparison: Comparison) -> Dot:
    gain = comparison.gain.difference
    half = gain.half_width() or 0.0
    return Dot(comparison.point.panel, comparison.point.setting, gain.mean, half)


def _mean_by_kind(
    gains: Sequence[Comparison], settings: Iterable[str], homogeneous: Mapping[str, bool]
) -> str:
    """Return a sentence with the mean gain over heterogeneous and over homogeneous pairs.

    The sentence covers the first `KINDS_SAID` settings and baselines that have pairs of both kinds.

    Args:
        gains: the gains that are drawn.
        settings: names of the settings, in order.
        homogeneous: whether teacher and student are of one family, by panel.

    Returns:
        The sentence, with a space in front; "" if no setting has pairs of both kinds.
    """
    said: list[str] = []
    for over, setting in itertools.product(_baselines_of(gains), settings):
        by_kind: dict[bool, list[float]] = {False: [], True: []}
        for one in gains:
            if (one.over, one.point.setting) == (over, setting):
                by_kind[homogeneous[one.point.panel]].append(one.gain.difference.mean)
        if all(by_kind.values()):
            kinds = [
                f"{KINDS[kind]} {statistics.fmean(means):+.2f} ({len(means)})"
                for kind, means in by_kind.items()
            ]
            said.append(f"{setting} over {OVER.get(over, over)}: {', '.join(kinds)}")
    if not said:
        return ""
    return f" Mean over (n) pairs: {'; '.join(said[:KINDS_SAID])}."


# Cost


def cost(points: Sequence[Point], metric: str) -> Chart | None:
    """Draw accuracy (%, top-1 or mAP) against training time (s per epoch), one panel per pair.

    A mark shows one method: the mean accuracy of its runs, and the mean time of their last epochs.
    Runs that trained side by side have only the time of their whole group. They count for the mean
    accuracy, but not for the mean time. A method whose runs all lack a time has no mark.

    Args:
        points: results of methods, with the runs that have the times.
        metric: accuracy that the points hold, a key of `METRICS`. The caption names the metric.

    Returns:
        The chart, or None if fewer than two methods (or settings of methods) have times.
    """
    times = {
        point: [
            run.epoch_s
            for run in point.runs
            if run.epoch_s is not None and (run.group_size or 1) == 1
        ]
        for point in beside_panels(points)
    }
    timed = [point for point, seconds in times.items() if seconds]
    if len({point.setting for point in timed}) < 2:
        return None
    shown, settings, rest = few(timed, lambda point: point.setting)
    drawing, axes = panels_of(_panels(shown), "time (s per epoch)", _axis_label(metric))
    for point in shown:
        style = style_of(settings[point.setting])
        axes[point.panel].errorbar(
            statistics.fmean(times[point]),
            point.mean,
            yerr=half_width(interval(point.values)),
            **style,
            elinewidth=0.8,
            capsize=2,
        )
    for axis in axes.values():
        axis.margins(0.15)
        stop_at_100(axis)
    legend(drawing, settings, linestyle="none")
    notes = ""
    if left := sorted({point.setting for point in times} - {point.setting for point in timed}):
        notes += listed("Without a time of their own, since they trained side by side", left)
    environments = {run.environment for point in shown for run in point.runs}
    if len(environments) > 1:
        notes += f" The times of {len(environments)} environments cannot be compared."
    untimed = sum(point.n - len(times[point]) for point in shown)
    if untimed:
        notes += (
            f" Without a separate time, and so for the accuracy only: {counted(untimed, 'run')}."
        )
    caption = (
        f"{_metric_label(metric, shown)}, against training time (of the last epoch). Marks: mean "
        "of both over seeds; bars: 95 % interval of the mean accuracy (Student's t), none for a "
        f"single seed; {count_seeds(point.n for point in shown)}.{notes}{rest}"
    )
    return Chart("cost", "Accuracy against training time", caption, drawing)
