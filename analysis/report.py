"""Write the report of a sweep or experiment.

The report is one HTML file that holds everything it shows and loads nothing from the network.
"""

import base64
import hashlib
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import render
from .cells import Table
from .declarations import PAPERS_METRIC
from .figures import Figure
from .names import counted, method_name
from .schema import PARAMS, STATUSES, Run, runs_of
from .selection import METRICS

__all__ = ["write"]

PIXELS_AN_INCH = 125  # figures are larger on a screen than in print
NARROWEST = 520  # smallest width of a figure in pixels; it scrolls on a smaller screen
INLINE_BYTES = 400_000  # a figure with a larger SVG is embedded as PNG
SETTINGS = [column for column in PARAMS if column != "seed"]
# Headings of the table of runs, by field of the run.
OUTCOME = {
    "name": "run",
    "status": "status",
    "dataset": "data",
    "pair": "pair",
    "method": "method",
    "M": "M",
    "seed": "seed",
    "best": "best",
    "last": "last",
    "test": "test",
    "epochs_done": "epochs",
    "epoch_s": "s per epoch",
    "started": "started (UTC)",
    "reason": "reason",
    "source": "source",
    "run_dir": "folder",
}
NUMBERS = {
    "seed": "{:d}",
    "best": "{:.2f}",
    "last": "{:.2f}",
    "test": "{:.2f}",
    "epoch_s": "{:.1f}",
    "epochs_done": "{:d}",
}


class Source(Protocol):
    """Runs that the report shows, such as `analysis.runs.Runs`.

    Attributes:
        frame: one row per run, with the columns of `schema.COLUMNS`.
        name: name of the sweep or experiment; "" for all runs of the MLflow store.
        uri: address of the MLflow store.
        command: command that starts the sweep; "" if the command is unknown.
    """

    @property
    def frame(self) -> pd.DataFrame:
        """Return the runs, one per row, with the columns of `schema.COLUMNS`."""

    @property
    def name(self) -> str:
        """Return the name of the sweep or experiment; "" for all runs of the MLflow store."""

    @property
    def uri(self) -> str:
        """Return the address of the MLflow store."""

    @property
    def command(self) -> str:
        """Return the command that starts the sweep; "" if the command is unknown."""


def write(
    path: Path,
    runs: Source,
    tables: Sequence[Table],
    figures: Sequence[Figure],
    *,
    metric: str = "best",
) -> None:
    """Write the report of runs, with their tables and figures, to one HTML file.

    An existing file is replaced.

    Args:
        path: HTML file to write. Missing parent folders are created.
        runs: runs to report.
        tables: tables to show, in order.
        figures: figures to embed, in order. Their PNG and SVG files must exist.
        metric: accuracy that the tables and figures show, a key of `analysis.selection.METRICS`.

    Raises:
        KeyError: If `metric` is not in `METRICS`, or if `runs.frame` lacks a column.
        OSError: If a file of a figure cannot be read, or the report cannot be written.
        AssertionError: If an SVG file was not written by matplotlib.
    """
    frame = runs.frame
    standing = frame[~frame["superseded"]]
    every_run = runs_of(frame)
    current = [run for run in every_run if not run.superseded]
    counts = Counter(run.status for run in current)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = Markup(templates.get_template("report.js").render())
    page = templates.get_template("report.html.jinja").render(
        name=runs.name or "all runs",
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        uri=_without_password(runs.uri),
        command=runs.command,
        counts={status: counts[status] for status in STATUSES},
        superseded=len(every_run) - len(current),
        metric_label=METRICS[metric][1],
        metric_notes=_optimism(current, metric),
        tables=[(table, Markup(_scrolling(render.html(table)))) for table in tables],
        figures=[(figure, Markup(_embedded(figure))) for figure in figures],
        missing=[run for run in current if run.status == "MISSING"],
        failures=[run for run in current if run.status in ("FAILED", "KILLED")],
        common=_common(standing),
        configurations=_configurations(standing),
        environments=_counted(run.environment for run in current if run.status != "MISSING"),
        revisions=_counted(run.git_sha for run in current if run.status != "MISSING"),
        headings=list(OUTCOME.values()),
        outcomes=[(run.superseded, run.status, _outcome(run)) for run in every_run],
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _without_password(uri: str) -> str:
    """Return a URI without its user name and password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _optimism(runs: Iterable[Run], metric: str) -> list[str]:
    """Return sentences on how much is gained by choosing the best epoch on the test split.

    The first sentence is on the papers. If `metric` is "best", a second one gives the mean
    difference of the best and the last epoch of our own finished runs without held-out images, if
    there are any.
    """
    gaps = [
        run.best - run.last
        for run in runs
        if run.best is not None
        and run.last is not None
        and run.status == "FINISHED"
        and run.source == "sddlskd"
        and not run.val_fraction
    ]
    if metric != "best" or not gaps:
        return [PAPERS_METRIC]
    ours = (
        f"In our runs it lies {statistics.fmean(gaps):.2f} points above the last on average "
        f"(n = {counted(len(gaps), 'run')})."
    )
    return [PAPERS_METRIC, ours]


def _scrolling(fragment: str) -> str:
    """Return an HTML fragment with every table in a box that can be scrolled, also by keyboard.

    The text of the fragment must be escaped, so that `<table` can only be a tag.
    """
    boxed = fragment.replace("<table", '<div class="scroll" tabindex="0"><table')
    return boxed.replace("</table>", "</table></div>")


def _embedded(figure: Figure) -> str:
    """Return the HTML of a figure: inline SVG, or a PNG image if the SVG exceeds `INLINE_BYTES`.

    The ids in the SVG get the name of the figure as a prefix, so that they are unique in the page.
    """
    text = figure.svg.read_text(encoding="utf-8")
    found = re.search(r'<svg [^>]*?width="([0-9.]+)pt"', text)
    assert found, f"{figure.svg} is not an SVG file that matplotlib wrote"
    pixels = round(float(found[1]) / 72 * PIXELS_AN_INCH)
    width = f'style="width: {pixels}px; min-width: {min(pixels, NARROWEST)}px"'
    if len(text) > INLINE_BYTES:
        data = base64.b64encode(figure.png.read_bytes()).decode()
        return f'<img alt="" {width} src="data:image/png;base64,{data}">'
    svg = re.sub(
        r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL
    )
    # Matplotlib gives two images with equal pixels the same id.
    svg = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", svg)
    # HTML knows the namespaces, so the declarations can go.
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href=", "href=")
    svg = re.sub(r'(\bid="|\bhref="#|url\(#)', rf"\g<1>{figure.name}-", svg)
    return svg.replace("<svg", f'<svg aria-hidden="true" {width}', 1)


def _common(frame: pd.DataFrame) -> dict[str, str]:
    """Return the settings that have the same value in all runs, as text by configuration key."""
    return {
        PARAMS[column]: _text(column, frame[column].iloc[0])
        for column in SETTINGS
        if len(frame) and frame[column].nunique(dropna=False) == 1
    }


def _configurations(frame: pd.DataFrame) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Return the headings and the rows of the table of configurations.

    A configuration is a combination of the settings that differ between runs. Its row holds a pair
    (shown text, sort key) for each of these settings, for the seeds, and for the number of runs.
    """
    differing = [column for column in SETTINGS if frame[column].nunique(dropna=False) > 1]
    headings = [*(PARAMS[column] for column in differing), "seeds", "runs"]
    groups = [((), frame)]
    if differing:
        groups = list(frame.groupby(differing, dropna=False))
    rows = []
    for key, runs in groups:
        seeds = ", ".join(str(seed) for seed in sorted(runs["seed"].dropna().unique()))
        rows.append(
            [*map(_cell, differing, key), (seeds or "–", seeds), (str(len(runs)), str(len(runs)))]
        )
    return headings, rows


def _counted(values: Iterable[str]) -> dict[str, int]:
    """Return how often each value occurs, the most frequent value first."""
    return dict(Counter(values).most_common())


def _outcome(run: Run) -> list[tuple[str, str]]:
    """Return the cells of a run in the table of all runs, as (shown text, sort key)."""
    shown: dict[str, Any] = {column: getattr(run, column) for column in OUTCOME}
    shown["status"] = run.status.lower()
    if run.superseded:
        shown["status"] = f"superseded, {run.status.lower()}"
    if run.method:
        shown["method"] = method_name(run.method, run.M)
    return [_cell(column, value) for column, value in shown.items()]


def _cell(column: str, value: Any) -> tuple[str, str]:
    """Return (shown text, sort key) for a value of a column.

    The sort key of a missing value is "", so that it sorts last.
    """
    text = _text(column, value)
    if text == "–":
        return text, ""
    return text, str(value)


def _text(column: str, value: Any) -> str:
    if pd.isna(value) or value == "":
        return "–"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    usual = "{:g}" if isinstance(value, float) else "{}"
    return NUMBERS.get(column, usual).format(value)
