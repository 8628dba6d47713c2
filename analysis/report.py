"""Write the report of a sweep or experiment.

The report is one HTML file that holds everything it shows and loads nothing from the network.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from . import render
from .figures import Figure
from .schema import PARAMS, STATUSES
from .tables import METRICS, PAPERS_METRIC, Table

__all__ = ["write"]

PIXELS_AN_INCH = 125  # figures are larger on a screen than in print
NARROWEST = 520  # smallest width of a figure in pixels; it scrolls on a smaller screen
INLINE_BYTES = 400_000  # a figure with a larger SVG is embedded as PNG
SETTINGS = [column for column in PARAMS if column != "seed"]
# Headings of the table of runs, by column of the frame.
OUTCOME = {
    **{
        "name": "run",
        "status": "status",
        "dataset": "data",
        "pair": "pair",
        "method": "method",
        "M": "M",
        "seed": "seed",
    },
    **{
        "best": "best",
        "last": "last",
        "test": "test",
        "epochs_done": "epochs",
        "epoch_s": "s per epoch",
    },
    **{"started": "started (UTC)", "reason": "reason", "source": "source", "run_dir": "folder"},
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
    """The runs that the report reads; `analysis.runs.Runs` implements this protocol."""

    @property
    def frame(self) -> pd.DataFrame: ...
    @property
    def name(self) -> str: ...
    @property
    def uri(self) -> str: ...
    @property
    def command(self) -> str: ...


def write(
    path: Path,
    runs: Source,
    tables: Sequence[Table],
    figures: Sequence[Figure],
    *,
    metric: str = "best",
) -> None:
    """Write the report to a file and replace a file that exists.

    Args:
        path: HTML file to write. Missing parent folders are created.
        runs: the runs to report, with their name, MLflow URI and command.
        tables: tables to show, in order.
        figures: figures to embed, in order. Their PNG and SVG files must exist.
        metric: accuracy that the tables and figures show, a key of `analysis.tables.METRICS`.

    Raises:
        KeyError: if `metric` is not in `analysis.tables.METRICS`.
    """
    frame = runs.frame
    standing = frame[~frame["superseded"]]
    counts = standing["status"].value_counts()
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
        counts={status: int(counts.get(status, 0)) for status in STATUSES},
        superseded=len(frame) - len(standing),
        metric_label=METRICS[metric][1],
        metric_notes=_optimism(standing, metric),
        tables=[(table, Markup(_scrolling(render.html(table)))) for table in tables],
        figures=[(figure, Markup(_embedded(figure))) for figure in figures],
        missing=standing[standing["status"] == "MISSING"].to_dict("records"),
        failures=standing[standing["status"].isin(["FAILED", "KILLED"])].to_dict("records"),
        common=_common(standing),
        configurations=_configurations(standing),
        environments=_counted(standing, "environment"),
        revisions=_counted(standing, "git_sha"),
        headings=list(OUTCOME.values()),
        outcomes=[
            (run["superseded"], run["status"], _outcome(run)) for run in frame.to_dict("records")
        ],
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _without_password(uri: str) -> str:
    """Return the URI without its user name and password."""
    parts = urlsplit(uri)
    return (
        urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        if "@" in parts.netloc
        else uri
    )


def _optimism(frame: pd.DataFrame, metric: str) -> list[str]:
    """Return sentences on how much the choice of the best epoch on the test split gains.

    The first sentence is on the papers. A second one is on our own finished runs without held-out
    images, if the metric is "best" and there are such runs.
    """
    both = frame[frame["best"].notna() & frame["last"].notna() & (frame["status"] == "FINISHED")]
    on_test_split = ~(both["val_fraction"] > 0).fillna(False)
    both = both[on_test_split & (both["source"] == "sddlskd")]
    if metric != "best" or both.empty:
        return [PAPERS_METRIC]
    gap = float((both["best"] - both["last"]).mean())
    return [
        PAPERS_METRIC,
        f"In our runs it lies {gap:.2f} points above the last on average (n = {len(both)} runs).",
    ]


def _scrolling(fragment: str) -> str:
    """Put every table of the fragment in a box that scrolls, also by keyboard.

    The text of the fragment is escaped, so `<table` can only be a tag.
    """
    boxed = fragment.replace("<table", '<div class="scroll" tabindex="0"><table')
    return boxed.replace("</table>", "</table></div>")


def _embedded(figure: Figure) -> str:
    """Return the figure as inline SVG, or as a PNG image if its SVG is large.

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
    """Return the settings with the same value in all runs, by configuration key."""
    return {
        PARAMS[column]: _text(column, frame[column].iloc[0])
        for column in SETTINGS
        if len(frame) and frame[column].nunique(dropna=False) == 1
    }


def _configurations(frame: pd.DataFrame) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Return the headings and rows of the table of configurations.

    A row holds a pair (shown text, sort key) for each setting that differs between runs, then for
    the seeds and for the number of runs.
    """
    differing = [column for column in SETTINGS if frame[column].nunique(dropna=False) > 1]
    headings = [*(PARAMS[column] for column in differing), "seeds", "runs"]
    rows = []
    for key, runs in frame.groupby(differing, dropna=False) if differing else [((), frame)]:
        seeds = ", ".join(str(seed) for seed in sorted(runs["seed"].dropna().unique()))
        rows.append(
            [*map(_cell, differing, key), (seeds or "–", seeds), (str(len(runs)), str(len(runs)))]
        )
    return headings, rows


def _counted(frame: pd.DataFrame, column: str) -> dict[str, int]:
    """Return the number of runs with each value of `column`, in descending order.

    Missing runs do not count. The value "" stands for runs without a recorded value.
    """
    ran = frame[frame["status"] != "MISSING"]
    return {str(value): int(count) for value, count in ran[column].value_counts().items()}


def _outcome(run: Mapping[Any, Any]) -> list[tuple[str, str]]:
    """Return the cells of a run in the table of all runs, as (shown text, sort key)."""
    status = ("superseded, " if run["superseded"] else "") + run["status"].lower()
    return [_cell(column, status if column == "status" else run[column]) for column in OUTCOME]


def _cell(column: str, value: Any) -> tuple[str, str]:
    """Return (shown text, sort key) for a value.

    The sort key of a missing value is empty, so that the value sorts last.
    """
    text = _text(column, value)
    return text, "" if text == "–" else str(value)


def _text(column: str, value: Any) -> str:
    if pd.isna(value) or value == "":
        return "–"
    if isinstance(value, pd.Timestamp):
        return f"{value:%Y-%m-%d %H:%M}"
    form = NUMBERS.get(column, "{:g}" if isinstance(value, float) else "{}")
    return form.format(value)
