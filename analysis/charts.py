"""Lay out the charts: colours and markers, panels, legends, dot charts, parts of captions.

The first colours are those of Okabe and Ito. Lines also differ in markers and dashes, so that
figures can be printed in grey.
"""

import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D

from .points import Point

__all__ = [
    "CELLS",
    "GREY",
    "LINES",
    "NO_ROOM",
    "PANELS",
    "STYLE",
    "WIDE",
    "Chart",
    "Dot",
    "count_seeds",
    "dots",
    "few",
    "half_width",
    "legend",
    "listed",
    "panels_of",
    "settings_in_dots",
    "style_of",
]

PANELS = 12  # largest number of panels in a figure
LINES = 12  # largest number of lines in a figure
CELLS = 60  # largest number of panels x settings in a dot chart
NAMED = 15  # largest number of names that a caption lists; the others are counted
NO_ROOM = "Not drawn for lack of space"
COLOURS = (
    *("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00"),
    *("#882255", "#999933", "#332288", "#8C510A", "#777777"),
)
GREY = "#bbbbbb"
# 5 dash patterns and 12 colours make 60 different lines.
DASHES: tuple[Any, ...] = (
    "-",
    "--",
    "-.",
    ":",
    (0, (6, 1, 1, 1, 1, 1)),
)
MARKERS = "osD^vPX<>*hp"
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "sddlskd",  # gives the same ids in every run
    "text.parse_math": False,  # shows a $ in a name as it is
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "figure.constrained_layout.h_pad": 0.08,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
}
WIDE = 7.0  # inches: width of both columns of a page


@dataclass(frozen=True)
class Chart:
    """Matplotlib figure with a name, a title and a caption, not yet written to files."""

    name: str  # stem of its file names
    title: str
    caption: str
    drawing: Drawing


@dataclass(frozen=True)
class Dot:
    """Mark of a chart that `dots` draws: a mean, and half the width of its interval.

    The mark is in the row of its setting (such as a method) and in the band of rows of its panel
    (such as a pair of teacher and student).
    """

    panel: str
    setting: str
    mean: float
    half: float  # half the width of the interval; 0 if there is no interval


def half_width(interval: tuple[float, float] | None) -> float:
    """Return half the width of an interval (low, high), a scalar; 0 if `interval` is None."""
    if interval is None:
        return 0.0
    low, high = interval
    return (high - low) / 2


def few(
    points: Sequence[Point],
    name: Callable[[Point], str],
    lines: int = LINES,
) -> tuple[list[Point], dict[str, int], str]:
    """Select the points that a figure has room for: at most 12 panels (`PANELS`) and `lines` lines.

    A point is the result of one setting (a method with its options) in one panel (a pair of teacher
    and student). First the panels with the most runs, summed over their points, are kept. Of the
    lines in the kept panels, those with the most runs are kept.

    Args:
        points: the points that could be drawn.
        name: returns the name of the line that a point belongs to.
        lines: largest number of lines in the whole figure.

    Returns:
        The kept points, in the given order; the names of their lines, in the order of `Point.rank`
        (that of the rows of a table), with the number of the line for `style_of`; and a sentence
        for the caption that names the panels and lines that are left out (the first 15, and the
        number of the others). The sentence starts with a space, or is "" if nothing is left out.
    """
    left: list[str] = []
    kept = list(points)
    for name_of, most in ((lambda point: point.panel, PANELS), (name, lines)):
        runs: Counter[str] = Counter()
        for point in kept:
            runs[name_of(point)] += point.n
        names = [one for one, _ in runs.most_common()]
        left += names[most:]
        kept = [point for point in kept if name_of(point) in names[:most]]
    ranked = sorted(kept, key=lambda point: point.rank)
    numbers: dict[str, int] = {}
    for point in ranked:
        if name(point) in numbers:
            continue
        number = point.number
        # Two lines of one figure never have the same colour and marker.
        while number % LINES in {other % LINES for other in numbers.values()}:
            number += 1
        numbers[name(point)] = number
    return kept, numbers, listed(NO_ROOM, left)


def settings_in_dots(panels: int) -> int:
    """Return the largest number of settings that a dot chart may show in each panel: 5 to 12.

    A setting is a row of the panel, such as a method. The result is 12 for up to 5 panels. For
    more, panels x settings is at most `CELLS` (60). `panels` must be at least 1. A number above
    `PANELS` (12) counts as 12, since no more panels are drawn.
    """
    return max(4, min(LINES, CELLS // min(panels, PANELS)))


def listed(what: str, names: Sequence[str]) -> str:
    """Return a sentence for a caption that lists names; "" if there are no names.

    With `what` "Not drawn", for example, the sentence is " Not drawn: a; b." with a space in front.
    It lists the first `NAMED` (15) names. If there are more, it ends with, for example,
    " and 3 more." A line break in a name becomes a comma.
    """
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f" {what}: {'; '.join(names[:NAMED])}{more}.".replace("\n", ", ")


def count_seeds(counts: Iterable[int]) -> str:
    """Return a text on how many seeds the marks of a figure stand for: "n = 2 to 3 seeds".

    `counts` has the number of seeds of each mark. If all are equal, the text is, for example,
    "n = 3 seeds". Raise ValueError if `counts` is empty.
    """
    counts = list(counts)
    low = min(counts)
    high = max(counts)
    if low < high:
        return f"n = {low} to {high} seeds"
    if low == 1:
        return "n = 1 seed"
    return f"n = {low} seeds"


def style_of(index: int) -> dict[str, Any]:
    """Return the colour, line style and marker of line number `index`, counted from 0.

    The result holds keyword arguments for matplotlib's lines: color, linestyle and marker. Lines 0
    to 59 all differ in colour or line style.
    """
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def panels_of(
    panels: Sequence[str], x: str, y: str, height: float = 2.0, letters: int = 34
) -> tuple[Drawing, dict[str, Axes]]:
    """Create a matplotlib figure with one empty panel (`Axes`) for each name.

    A row has up to three panels; four panels are drawn two by two. Only the panels of the first
    column have the label `y`, and only the lowest panel of each column has the label `x`.

    Args:
        panels: names of the panels, which become their titles. At least one; all different.
        x: label of the horizontal axes.
        y: label of the vertical axes.
        height: height of a row of panels in inches.
        letters: largest number of letters in a line of a title; a longer line is broken at blanks,
            and a longer word stays whole.

    Returns:
        The figure, 3.5 inches wide for one panel and `WIDE` (7 inches) for several; and the axes by
        the name of their panel, row by row.
    """
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    width = 3.5 if columns == 1 else WIDE
    drawing = Drawing(figsize=(width, height * rows + 0.6), layout="constrained")
    wrap = textwrap.TextWrapper(letters, break_long_words=False, break_on_hyphens=False)
    axes = {}
    for index, panel in enumerate(panels):
        axis = axes[panel] = drawing.add_subplot(rows, columns, index + 1)
        axis.set_title("\n".join(wrap.fill(line) for line in panel.splitlines()))
        if index % columns == 0:
            axis.set_ylabel(y)
        if index + columns >= len(panels):
            axis.set_xlabel(x)
    return drawing, axes


def stop_at_100(axis: Axes) -> None:
    """Set the upper limit of the y axis of `axis` to 100 if the limit is above 100.

    The y axis shows accuracies (%). If its lower limit is 100 or above, nothing changes.
    """
    bottom, top = axis.get_ylim()
    if top > 100 > bottom:
        axis.set_ylim(bottom, 100)


def legend(drawing: Drawing, labels: Mapping[str, int], **marks: Any) -> None:
    """Add a legend below the panels, in as many columns as fit.

    Args:
        drawing: the matplotlib figure, which is changed. Its height grows by that of the legend.
        labels: labels of the lines, at least one, each with its number for `style_of`.
        **marks: properties of matplotlib's `Line2D` that replace those of `style_of` for every
            label, such as `marker=""`.
    """
    handles = [
        Line2D([], [], label=label, **(style_of(number) | marks))
        for label, number in labels.items()
    ]
    inches = 0.055 * max(map(len, labels)) + 0.55
    columns = max(1, min(len(labels), int(drawing.get_figwidth() / inches)))
    rows = -(-len(labels) // columns)
    drawing.set_figheight(drawing.get_figheight() + 0.15 * rows)
    drawing.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.6
    )


def dots(
    columns: Sequence[tuple[str, Sequence[Dot]]],
    panels: Sequence[str],
    settings: Mapping[str, int],
    shaded: Mapping[str, str],
) -> Drawing:
    """Draw dot charts side by side: means on the horizontal axis, with bars for their intervals.

    A panel is a horizontal band that runs through all charts. Each panel has one row per setting.

    Args:
        columns: for each chart, the label of its horizontal axis and its dots. At least one chart.
        panels: names of the panels from top to bottom. Every dot that is drawn is in one of them.
        settings: names of the settings from top to bottom, at least one, each with its number for
            `style_of`. Dots of other settings are not drawn.
        shaded: maps the names of the panels that get a grey background to texts, which are appended
            to these names.

    Returns:
        The matplotlib figure, with a legend of the settings below the charts.

    Raises:
        ValueError: If a dot of one of the settings is in none of the panels, or if `settings` or
            `columns` is empty.
    """
    height = 0.12 * len(panels) * (len(settings) + 1.2) + 0.7
    width = WIDE if len(columns) > 1 else 5.0
    drawing = Drawing(figsize=(width, max(1.8, height)), layout="constrained")
    axes = drawing.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, (label, drawn) in zip(axes, columns, strict=True):
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
        for row, panel in enumerate(panels):
            if panel in shaded:
                axis.axhspan(row - 0.5, row + 0.5, color="#f1f1f1", linewidth=0)
        for index, (setting, number) in enumerate(settings.items()):
            of_setting = [dot for dot in drawn if dot.setting == setting]
            shift = (index + 0.5) / len(settings) * 0.8 - 0.4
            axis.errorbar(
                [dot.mean for dot in of_setting],
                [panels.index(dot.panel) + shift for dot in of_setting],
                xerr=[dot.half for dot in of_setting],
                **style_of(number) | {"linestyle": "none"},
                elinewidth=0.8,
                capsize=1.5,
            )
    axes[0].set_ylim(len(panels) - 0.5, -0.5)
    labels = [f"{panel}{shaded.get(panel, '')}" for panel in panels]
    axes[0].set_yticks(range(len(panels)), labels)
    legend(drawing, settings, linestyle="none")
    return drawing
