"""Draw the papers' figures from runs, as PNG and SVG.

Each figure has a caption that says what the figure shows and on how many seeds. A *setting* is what
one line or marker stands for: the method, M, and everything else that differs between runs of the
same pair, method and M. A *panel* is a pair on a data set. The colours are those of Okabe and Ito.
Markers differ as well, so that the figures can be printed in grey.

Shapes: K classes, n images, C features, H height, W width.
"""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from scipy.stats import t as student_t

from . import stats
from .tables import BUDGET, METRICS

__all__ = [
    "Figure",
    "agreement",
    "build",
    "correlation_gap",
    "curves",
    "gains",
    "interval",
    "same_family",
]

# Largest number of panels, lines, and cells (panels x settings of a dot chart) in a figure.
PANELS, LINES, CELLS = 12, 12, 60
# Largest number of panels and of coloured classes in the t-SNE figure.
MAPS, CLASSES = 6, 10
NAMED = 15  # names that a caption lists; it counts the rest
NO_ROOM = "Not drawn for lack of space"
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
GREY = "#bbbbbb"
# 5 dash patterns and 7 colours make 35 different lines.
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
WIDE = 7.0  # inches: both columns of a page; a single panel takes one column
EXTRAS = {
    **{
        "complementary_weight": "β",
        "knowledge": "",
        "temperature": "T",
        "ce_weight": "ce",
        "kd_weight": "kd",
    },
    **{
        "lr": "lr",
        "batch_size": "batch",
        "epochs": "epochs",
        "max_steps": "steps",
        "precision": "",
        "val_fraction": "held out",
        "source": "",
    },
}
"""Columns that distinguish settings of one method and M, and the sign before their value."""
# Columns that the loss of a student alone does not read.
UNREAD_ALONE = (
    "complementary_weight",
    "knowledge",
    "temperature",
    "kd_weight",
)
KINDS = {False: "heterogeneous", True: "homogeneous"}
# Columns in which a run and its baseline agree.
COMPARABLE = ["dataset", "student", *BUDGET, "source"]

Arrays = Mapping[str, np.ndarray]


class Source(Protocol):
    """The runs that the figures read; `analysis.runs.Runs` implements this protocol."""

    @property
    def frame(self) -> pd.DataFrame: ...

    def history(
        self, metrics: Sequence[str] = ..., run_ids: Iterable[str] | None = ...
    ) -> pd.DataFrame: ...

    def predictions(self, run_id: str) -> Arrays | None: ...


@dataclass(frozen=True)
class Figure:
    """A figure that `build` has drawn."""

    name: str  # stem of its file names
    title: str
    caption: str
    png: Path
    svg: Path


def build(runs: Source, out: Path, *, metric: str = "best") -> list[Figure]:
    """Draw every figure whose data exist.

    Args:
        runs: the runs to draw, with their histories and predictions.
        out: folder for the PNG and SVG files, created if it is missing.
        metric: accuracy to show, a key of `analysis.tables.METRICS`.

    Returns:
        The figures, with captions. The list is empty if no finished run has the metric.

    Raises:
        ValueError: if `metric` is not in `analysis.tables.METRICS`.
    """
    if metric not in METRICS:
        raise ValueError(f"metric={metric} is not valid; give one of {', '.join(METRICS)}")
    frame, left_out = _standing(runs.frame, metric)
    if frame.empty:
        return []
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[Figure] = []
    with matplotlib.rc_context(STYLE):
        kept = _predictions(runs, frame)
        for made in (
            _learning_curves(runs, frame),
            _accuracy_by_scales(frame, metric),
            _gain_by_pair(frame, metric),
            _agreement(kept),
            _correlation(kept),
            _features(kept),
            _regions(kept),
            _cost(frame, metric),
        ):
            if made is not None:
                name, title, caption, drawing = made
                figure = Figure(
                    name, title, f"{caption}{left_out}", out / f"{name}.png", out / f"{name}.svg"
                )
                drawing.draw_without_rendering()
                drawing.set_layout_engine("none")  # keeps the same layout for both files
                drawing.savefig(figure.png, dpi=200, metadata={"Software": None})
                drawing.savefig(
                    figure.svg,
                    dpi=200,
                    metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
                )
                drawn.append(figure)
    return drawn


Made = tuple[str, str, str, Drawing] | None  # name, title, caption and drawing

# Numbers


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95 % interval (Student's t).

    The half-width has the unit of `values`. It is NaN for a single value.
    """
    array = np.asarray(list(values), float)
    if len(array) < 2:
        return float(array.mean()), float("nan")
    return float(array.mean()), float(
        student_t.ppf((1 + stats.LEVEL) / 2, len(array) - 1) * array.std(ddof=1) / len(array) ** 0.5
    )


def curves(frame: pd.DataFrame, history: pd.DataFrame) -> pd.DataFrame:
    """Return the learning curve of each panel and setting, averaged over its runs.

    The result has the columns panel, setting, epoch, mean, std (sample standard deviation) and n
    (number of runs). `frame` needs panel, setting and run_id; `history` needs run_id, epoch and
    value.
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


def gains(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the gain of every setting over its baselines, paired by seed.

    The baselines are the plain form of the same distiller ("plain") and the student alone
    ("vanilla"). If a baseline ran in several settings, the setting with the highest mean is taken.

    The result has the columns panel, setting, over (the baseline), n (number of pairs), mean (gain
    in `value`) and half (half the width of the 95 % interval, NaN if there is none). A setting that
    shares no seed with its baseline has n = 0.
    """
    rows = []
    vanilla, distilled = (
        frame[frame["distiller"] == "vanilla"],
        frame[frame["distiller"] != "vanilla"],
    )
    plain = distilled[distilled["method"] == distilled["distiller"]]
    for over, baselines, keys in (
        ("plain", plain, ["ground", "teacher", "distiller"]),
        ("vanilla", vanilla, ["ground"]),
    ):
        by_key = dict(list(baselines.groupby(keys)))
        for (panel, setting, *key), runs in distilled.groupby(
            ["panel", "setting", *keys], sort=False
        ):
            rivals = by_key.get(tuple(key))
            if rivals is None or (over == "plain" and (runs["method"] == runs["distiller"]).all()):
                continue
            best = rivals.groupby("setting")["value"].mean().idxmax()
            gain = stats.paired(_by_seed(runs), _by_seed(rivals[rivals["setting"] == best]))
            row = {"panel": panel, "setting": setting, "over": over, "n": gain.n if gain else 0}
            if gain:
                row |= {
                    "mean": gain.mean,
                    "half": float("nan") if gain.high is None else gain.high - gain.mean,
                }
            rows.append(row)
    return pd.DataFrame(rows, columns=["panel", "setting", "over", "n", "mean", "half"])


def _by_seed(runs: pd.DataFrame) -> dict[int, float]:
    """Return `value` by seed. Runs without a seed are left out."""
    values: dict[int, float] = runs.dropna(subset="seed").groupby("seed")["value"].mean().to_dict()
    return values


def agreement(arrays: Arrays) -> float:
    """Return the share (%) of test images for which student and teacher predict the same class."""
    return float(100 * (arrays["logits"].argmax(1) == arrays["teacher_logits"].argmax(1)).mean())


def correlation_gap(arrays: Arrays) -> np.ndarray:
    """Return the absolute difference of two correlation matrices of class logits, (K, K).

    The matrices are those of the teacher and of the student, over all images (SDD Fig. 3).
    """
    student_KK, teacher_KK = (
        np.corrcoef(arrays[name].astype(np.float64).T) for name in ("logits", "teacher_logits")
    )
    gap_KK: np.ndarray = np.abs(student_KK - teacher_KK)
    return gap_KK


def same_family(teacher: str, student: str) -> bool:
    """Return whether two networks are of one family, for example resnet32x4 and resnet8x4.

    The family is the part of the name before the first digit or underscore.
    """
    family = [
        name[: next((i for i, c in enumerate(name) if c == "_" or c.isdigit()), None)]
        for name in (teacher, student)
    ]
    return family[0] == family[1]


# The runs that a figure shows


def _standing(frame: pd.DataFrame, metric: str) -> tuple[pd.DataFrame, str]:
    """Return the runs that the figures show, and a sentence that counts the others.

    The runs are finished, are not superseded, and have the metric, a student and a method. The
    result has more columns than `frame`: `value`, the metric; `panel`; `setting`; `line`, the
    setting without M; `rank`, the order of settings; and `ground`, the values in which a run and
    its baseline agree.
    """
    value = frame[METRICS[metric][0]].astype("Float64").fillna(np.nan).astype(float)
    known = (frame["student"] != "") & (frame["method"] != "")
    finished = ~frame["superseded"] & (frame["status"] == "FINISHED")
    keep = finished & value.notna() & known
    lost = (
        frame.loc[~frame["superseded"] & ~finished, "status"].str.lower().value_counts().to_dict()
    )
    lost |= {"superseded": int(frame["superseded"].sum())}
    lost |= {f"without {metric} accuracy": int((finished & known & ~keep).sum())}
    lost |= {"without student or method": int((finished & ~known).sum())}
    if not keep.any():
        return frame[keep], _left_out(lost)
    shown = frame[keep].assign(value=value[keep])
    alone = shown["distiller"] == "vanilla"
    shown["M"] = shown["M"].mask(alone, "[1]")
    shown["panel"] = (shown["teacher"] + " → " + shown["student"]).mask(
        alone, shown["student"] + " alone"
    )
    if shown["dataset"].nunique() > 1:
        shown["panel"] += "\n" + shown["dataset"]
    extras = _extras(shown)
    shown["setting"] = shown["method"].map(_method) + shown["M"].map(_scales) + extras
    shown["line"] = shown["method"].str.removeprefix("sd_").map(_method) + extras
    shown["ground"] = [
        str(of_run) for of_run in shown[COMPARABLE].itertuples(index=False, name=None)
    ]
    shown["rank"] = list(
        zip(
            ~alone,
            shown["distiller"],
            shown["standardize"],
            shown["M"].map(_size),
            shown["setting"],
            strict=True,
        )
    )
    # A seed counts once. Runs that agree in everything that the loss reads are the same run, and of
    # these the latest is kept.
    seeds = shown.sort_values("started", kind="stable", na_position="first").dropna(subset="seed")
    again = seeds.index[seeds.duplicated(["panel", "setting", "seed"], keep="last")]
    lost |= {"repeated with the same seed": len(again)}
    return shown.drop(again).sort_values(["dataset", "pair"], kind="stable"), _left_out(lost)


def _left_out(lost: Mapping[str, int]) -> str:
    """Return a sentence that counts the runs left out, by reason; "" if there are none."""
    counted = ", ".join(f"{count} {what}" for what, count in lost.items() if count)
    return f" Runs left out: {counted}." if counted else ""


def _extras(frame: pd.DataFrame) -> pd.Series:
    """Return the label of the settings that differ between runs of one panel, method and M.

    The label names settings other than the seed, as ", T=2", and a source other than sddlskd, as
    ", imported".
    """
    text, inert = pd.Series("", index=frame.index), pd.Series("", index=frame.index)
    for column, sign in EXTRAS.items():
        alone, whole = frame["distiller"] == "vanilla", frame["M"] == "[1]"
        unused = (alone & (column in UNREAD_ALONE)) | (whole & (column == "complementary_weight"))
        values = frame[column].astype("object").where(frame[column].notna() & ~unused, "?")
        differs = (
            values.groupby([frame[key] for key in ("panel", "method", "M")]).transform("nunique")
            > 1
        )
        differs |= (column == "source") & (values != "sddlskd")
        shown = values.map(
            lambda value, sign=sign: (
                f", {sign}={value:g}" if sign and value != "?" else f", {sign}{value}"
            )
        )
        text += shown.where(differs, "")
        inert += frame[column].astype("object").where(unused, "").map(lambda value: f"{value},")
    settings = frame["settings_hash"].mask(frame["settings_hash"] == "")
    unseen = (
        settings.groupby([frame["panel"], frame["method"], frame["M"], text, inert]).transform(
            "nunique"
        )
        > 1
    )
    return text + (", settings_hash=" + settings).where(unseen, "").fillna("")


def _method(name: str) -> str:
    """Return the label of a method, for example SD-KD+LS for sd_kd_ls."""
    if name == "vanilla":
        return "student alone"
    return name.removesuffix("_ls").replace("_", "-").upper() + (
        "+LS" if name.endswith("_ls") else ""
    )


def _scales(M: str) -> str:
    return "" if M == "[1]" else f" {{{M.strip('[]')}}}"


def _size(M: str) -> tuple[int, ...]:
    """Return a sort key for M: few scales come first."""
    scales = json.loads(M or "[]")
    return (len(scales), *scales)


def _beside_vanilla(frame: pd.DataFrame) -> pd.DataFrame:
    """Repeat the runs of a student alone in the panel of every pair with that student."""
    alone = frame["distiller"] == "vanilla"
    panels = frame.loc[~alone, ["dataset", "student", "panel"]].drop_duplicates()
    repeated = frame[alone].drop(columns="panel").merge(panels, on=["dataset", "student"])
    lonely = frame[alone & ~frame["run_id"].isin(repeated["run_id"])]
    return pd.concat([frame[~alone], repeated, lonely], ignore_index=True)


def _few(
    frame: pd.DataFrame, column: str, panels: int = PANELS, lines: int = LINES
) -> tuple[pd.DataFrame, list[str], str]:
    """Keep as many panels and lines as a reader can tell apart: those with the most runs.

    Args:
        frame: runs, or gains.
        column: column that names the line of a row.
        panels: largest number of panels.
        lines: largest number of lines.

    Returns:
        The rows that are kept, the names of the lines in order of `rank`, and a sentence that names
        the panels and lines that are not drawn ("" if all are).
    """
    left = []
    for key, most in (("panel", panels), (column, lines)):
        counts = frame[key].value_counts(sort=False).sort_values(ascending=False, kind="stable")
        left += counts.index[most:].tolist()
        frame = frame[frame[key].isin(counts.index[:most])]
    order = frame.groupby(column)["rank"].min().sort_values().index.tolist()
    return frame, order, _listed(NO_ROOM, left)


def _listed(what: str, names: Sequence[str]) -> str:
    """Return a sentence that starts with `what` and lists the names; "" if there are none.

    The sentence starts with a space, lists at most `NAMED` names and counts the rest.
    """
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f" {what}: {'; '.join(names[:NAMED])}{more}.".replace("\n", ", ") if names else ""


def _capital(metric: str, frame: pd.DataFrame) -> str:
    """Return the start of a caption: the label of the metric, and the images it is measured on."""
    label = METRICS[metric][1]
    held_out = metric != "val" and (frame["val_fraction"] > 0).fillna(False).any()
    where = (
        " (of the held-out training images, not of the test set, for runs that hold some out)"
        if held_out
        else ""
    )
    return label[0].upper() + label[1:] + where


def _seeds(counts: Iterable[int]) -> str:
    low, high = min(counts), max(counts)
    return (
        f"n = {low} seed{'s' if low > 1 else ''}" if low == high else f"n = {low} to {high} seeds"
    )


# Drawing


def _style(index: int) -> dict[str, Any]:
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def _grid(
    panels: Sequence[str], x: str, y: str, height: float = 2.0
) -> tuple[Drawing, dict[str, Axes]]:
    """Return a drawing with one pair of axes per panel, and the axes by panel.

    Args:
        panels: names of the panels, which become their titles.
        x: label of the horizontal axes.
        y: label of the vertical axes.
        height: height of a row of panels in inches.

    Returns:
        The drawing and the axes.
    """
    columns = min(3, len(panels)) if len(panels) != 4 else 2
    rows = -(-len(panels) // columns)
    drawing = Drawing(
        figsize=(3.5 if columns == 1 else WIDE, height * rows + 0.6), layout="constrained"
    )
    axes = {}
    for index, panel in enumerate(panels):
        axis = axes[panel] = drawing.add_subplot(rows, columns, index + 1)
        axis.set_title(panel)
        axis.set_ylabel(y if index % columns == 0 else "")
        axis.set_xlabel(x if index + columns >= len(panels) else "")
    return drawing, axes


def _legend(drawing: Drawing, labels: Sequence[str], **marks: Any) -> None:
    """Add a legend below the panels, in as many columns as fit.

    Args:
        drawing: the drawing, which grows by the height of the legend.
        labels: one label per line, in the order of `_style`.
        **marks: properties of matplotlib's lines that replace those of `_style`.
    """
    handles = [
        Line2D([], [], label=label, **(_style(index) | marks)) for index, label in enumerate(labels)
    ]
    inches = 0.055 * max(map(len, labels)) + 0.55
    columns = max(1, min(len(labels), int(drawing.get_figwidth() / inches)))
    rows = -(-len(labels) // columns)
    drawing.set_figheight(drawing.get_figheight() + 0.15 * rows)
    drawing.legend(
        handles=handles, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.6
    )


def _learning_curves(runs: Source, frame: pd.DataFrame) -> Made:
    shown, settings, rest = _few(_beside_vanilla(frame), "setting")
    table = curves(shown, runs.history(("val/top1",), sorted(set(shown["run_id"]))))
    if table.empty or table["epoch"].max() < 2:
        return None
    panels = [panel for panel in shown["panel"].unique() if panel in set(table["panel"])]
    drawing, axes = _grid(panels, "epoch", "top-1 (%)")
    for (panel, setting), line in table.groupby(["panel", "setting"]):
        index = settings.index(setting)
        style = _style(index)
        axes[panel].plot(line["epoch"], line["mean"], **style, markevery=(0.04 * (index % 5), 0.2))
        low, high = line["mean"] - line["std"], line["mean"] + line["std"]
        axes[panel].fill_between(
            line["epoch"], low, high, color=style["color"], alpha=0.15, linewidth=0
        )
    for panel, lines in table.groupby("panel"):
        floor = lines["mean"].quantile(0.1)
        axes[panel].set_ylim(bottom=floor - 0.05 * (lines["mean"].max() - floor))
    _legend(drawing, settings)
    caption = (
        "Top-1 accuracy by epoch (val/top1: on the test split, or on the held-out images for runs "
        "that hold some out). Lines: mean over seeds; bands: ± one sample standard deviation, none "
        f"for a single seed; {_seeds(table['n'])}. The vertical axes start near the 10th "
        f"percentile of the means, so that the ends of the curves can be told apart.{rest}"
    )
    return "learning_curves", "Learning curves", caption, drawing


def _accuracy_by_scales(frame: pd.DataFrame, metric: str) -> Made:
    distilled = frame[(frame["distiller"] != "vanilla") & (frame["M"] != "")]
    several = distilled.groupby(["panel", "line"])["M"].transform("nunique") > 1
    if not several.any():
        return None
    shown, lines, rest = _few(distilled[several], "line")
    drawing, axes = _grid(list(shown["panel"].unique()), "scales M", "top-1 (%)")
    counts = []
    for panel, of_panel in shown.groupby("panel"):
        axis, scales = axes[panel], sorted(of_panel["M"].unique(), key=_size)
        axis.set_xticks(range(len(scales)), [f"{{{M.strip('[]')}}}" for M in scales])
        axis.set_xlim(-0.5, len(scales) - 0.5)
        axis.grid(axis="x", visible=False)
        drawn = [line for line in lines if line in set(of_panel["line"])]
        for number, line in enumerate(drawn):
            style = _style(lines.index(line))
            shift = 0.5 * ((number + 0.5) / len(drawn) - 0.5)
            values = {
                M: of_panel.loc[(of_panel["line"] == line) & (of_panel["M"] == M), "value"]
                for M in scales
            }
            values = {M: of_M for M, of_M in values.items() if len(of_M)}
            counts += [len(of_M) for of_M in values.values()]
            x = [scales.index(M) + shift for M in values]
            means, halves = zip(*map(interval, values.values()), strict=True)
            axis.errorbar(x, means, yerr=np.nan_to_num(halves), **style, elinewidth=0.8, capsize=2)
            for at, of_M in zip(x, values.values(), strict=True):
                axis.plot(
                    [at] * len(of_M), of_M, ".", color=style["color"], markersize=2.5, alpha=0.6
                )
    for axis in axes.values():
        axis.margins(y=0.1)
    _legend(drawing, lines)
    mixed = [
        name
        for name in ("temperature", "ce_weight", "kd_weight", "lr", *BUDGET)
        if (shown.groupby(["panel", "line"])[name].nunique(dropna=False) > 1).any()
    ]
    caption = (
        f"{_capital(metric, shown)}, against the scales M. Marks: mean over seeds; bars: 95 % "
        "interval of the mean (Student's t), none for a single seed; small dots: seeds; "
        f"{_seeds(counts)}."
        f"{' These settings also differ along a line: ' + ', '.join(mixed) + '.' if mixed else ''}"
        f"{rest}"
    )
    return "accuracy_by_scales", "Accuracy against the scales M", caption, drawing


def _dots(
    columns: Sequence[tuple[str, pd.DataFrame]],
    panels: Sequence[str],
    settings: Sequence[str],
    marks: Mapping[str, str],
) -> Drawing:
    """Draw dot charts of means and intervals side by side.

    Each panel is a band of rows, with one row per setting.

    Args:
        columns: label and numbers of each chart, with columns panel, setting, mean and half.
        panels: names of the panels, from top to bottom.
        settings: names of the settings, from top to bottom.
        marks: text to put after the name of a panel. Panels with a mark are shaded.

    Returns:
        The drawing, with a legend.
    """
    height = 0.12 * len(panels) * (len(settings) + 1.2) + 0.7
    drawing = Drawing(
        figsize=(WIDE if len(columns) > 1 else 5.0, max(1.8, height)), layout="constrained"
    )
    axes = drawing.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, (label, table) in zip(axes, columns, strict=True):
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
        for row, panel in enumerate(panels):
            if marks.get(panel):
                axis.axhspan(row - 0.5, row + 0.5, color="#f1f1f1", linewidth=0)
        for index, setting in enumerate(settings):
            of_setting = table[table["setting"] == setting]
            y = [
                panels.index(panel) + (index + 0.5) / len(settings) * 0.8 - 0.4
                for panel in of_setting["panel"]
            ]
            style = _style(index) | {"linestyle": "none"}
            axis.errorbar(
                of_setting["mean"],
                y,
                xerr=of_setting["half"].fillna(0),
                **style,
                elinewidth=0.8,
                capsize=1.5,
            )
    axes[0].set_ylim(len(panels) - 0.5, -0.5)
    axes[0].set_yticks(range(len(panels)), [f"{panel}{marks.get(panel, '')}" for panel in panels])
    _legend(drawing, settings, linestyle="none")
    return drawing


def _gain_by_pair(frame: pd.DataFrame, metric: str) -> Made:
    table = gains(frame)
    unpaired = sorted(set(table.loc[table["n"] == 0, "setting"]))
    table = table[table["n"] > 0]
    distilled = frame[frame["distiller"] != "vanilla"].drop_duplicates(["panel", "setting"])
    distilled = distilled.assign(
        same=[same_family(*pair) for pair in zip(distilled.teacher, distilled.student, strict=True)]
    )
    table = table.merge(distilled[["panel", "setting", "rank", "same"]], on=["panel", "setting"])
    if table.empty:
        return None
    count = table["panel"].nunique()
    shown, settings, rest = _few(
        table, "setting", lines=max(4, min(LINES, CELLS // min(count, PANELS)))
    )
    kind = shown.drop_duplicates("panel").set_index("panel")["same"]
    panels = kind.sort_values(ascending=False, kind="stable").index.tolist()
    labels = {
        "plain": "gain over the plain distiller (points)",
        "vanilla": "gain over the student alone (points)",
    }
    columns = [
        (labels[over], shown[shown["over"] == over])
        for over in labels
        if over in set(shown["over"])
    ]
    drawing = _dots(
        columns, panels, settings, {panel: "  ≠" for panel in panels if not kind[panel]}
    )
    for axis in drawing.axes:
        axis.axvline(0, color="black", linewidth=0.8)
    caption = (
        f"{_capital(metric, frame)}: gain, paired by seed. Marks: mean; bars: 95 % interval of the "
        "mean difference (Student's t), none for a single seed, not corrected for the number of "
        f"intervals; {_seeds(table['n'])}. Plain: the same distiller with M={{1}} and no "
        "standardisation; if a baseline ran in several settings, the best one is taken. Shaded and "
        "marked ≠: heterogeneous pairs (teacher and student of different families)."
        f"{_kinds(shown, settings, labels)}"
        f"{_listed('No seed in common with a baseline', unpaired)}{rest}"
    )
    return "gain_by_pair", "Gain by pair", caption, drawing


def _kinds(table: pd.DataFrame, settings: Sequence[str], labels: Mapping[str, str]) -> str:
    """Return a sentence with the mean gain over heterogeneous and over homogeneous pairs.

    It covers the first four settings and baselines that have pairs of both kinds.

    Args:
        table: gains with the columns panel, setting, over, mean and same.
        settings: names of the settings, in order.
        labels: the baselines, in order; the values are not read.

    Returns:
        The sentence; "" if no setting has pairs of both kinds.
    """
    said: list[str] = []
    for over, setting in itertools.product(labels, settings):
        rows = table[(table["over"] == over) & (table["setting"] == setting)]
        if rows["same"].nunique() == 2 and len(said) < 4:
            means, counts = rows.groupby("same")["mean"].mean(), rows["same"].value_counts()
            baseline = "plain" if over == "plain" else "the student alone"
            kinds = [f"{kind} {means[same]:+.2f} ({counts[same]})" for same, kind in KINDS.items()]
            said.append(f"{setting} over {baseline}: {', '.join(kinds)}")
    return f" Mean over (n) pairs: {'; '.join(said)}." if said else ""


def _cost(frame: pd.DataFrame, metric: str) -> Made:
    timed = frame[frame["epoch_s"].notna()].astype({"epoch_s": float})
    if timed["setting"].nunique() < 2:
        return None
    shown, settings, rest = _few(_beside_vanilla(timed), "setting")
    drawing, axes = _grid(list(shown["panel"].unique()), "time (s per epoch)", "top-1 (%)")
    counts = []
    shared = (shown["group_size"].fillna(1) > 1).astype(bool)
    for (panel, setting), runs in shown.groupby(["panel", "setting"]):
        mean, half = interval(runs["value"])
        counts.append(len(runs))
        style = _style(settings.index(setting))
        together = shared[runs.index].any()
        fill = {"markerfacecolor": "white"} if together else {}
        axes[panel].errorbar(
            runs["epoch_s"].mean(),
            mean,
            yerr=np.nan_to_num(half),
            **style | fill,
            elinewidth=0.8,
            capsize=2,
        )
    for axis in axes.values():
        axis.margins(0.15)
    _legend(drawing, settings, linestyle="none")
    places = shown["environment"].nunique()
    together = (
        " Hollow marks: some of these runs trained side by side "
        f"(up to {shown['group_size'].max()} on one teacher), so their time is that of the group."
        if shared.any()
        else ""
    )
    caption = (
        f"{_capital(metric, shown)}, against training time (of the last epoch). Marks: mean of "
        "both over seeds; bars: 95 % interval of the mean accuracy (Student's t), none for a "
        f"single seed; {_seeds(counts)}.{together}"
        f"{f' The times of {places} environments cannot be compared.' if places > 1 else ''}{rest}"
    )
    return "cost", "Accuracy against training time", caption, drawing


# Figures that need predictions


@dataclass(frozen=True, eq=False)
class _Kept:
    """The part of a run's predictions that the figures need."""

    run: Any  # a row of the frame
    agreement: float
    # The arrays without the logits, and the result of `correlation_gap`. Only the first run of a
    # panel and setting has them.
    arrays: Arrays | None
    gap_KK: np.ndarray | None


def _predictions(runs: Source, frame: pd.DataFrame) -> tuple[pd.DataFrame, list[_Kept], str]:
    """Return the runs with predictions, the predictions, and a sentence on what is not drawn.

    Runs of students alone are left out, and so are runs whose logits are not finite.
    """
    distilled = frame[frame["distiller"] != "vanilla"].sort_values("seed", kind="stable")
    if distilled.empty:
        return distilled, [], ""
    cells = len(distilled["panel"].unique())
    shown, _, rest = _few(
        distilled, "setting", lines=max(4, min(LINES, CELLS // min(cells, PANELS)))
    )
    kept: list[_Kept] = []
    for run in shown.itertuples():
        arrays = runs.predictions(run.run_id)
        if arrays is None or "teacher_logits" not in arrays:
            continue
        if not (
            np.isfinite(arrays["logits"]).all() and np.isfinite(arrays["teacher_logits"]).all()
        ):
            rest += f" Logits of run {run.name} are not finite, so it is left out."
            continue
        if any((run.panel, run.setting) == (other.run.panel, other.run.setting) for other in kept):
            kept.append(_Kept(run, agreement(arrays), None, None))
            continue
        few = {name: array for name, array in arrays.items() if "logits" not in name}
        if "sample" in few:
            few["predicted"] = arrays["teacher_logits"][few["sample"]].argmax(1)
        kept.append(_Kept(run, agreement(arrays), few, correlation_gap(arrays)))
    return shown[shown["run_id"].isin({one.run.run_id for one in kept})], kept, rest


Predictions = tuple[pd.DataFrame, list[_Kept], str]


def _agreement(predictions: Predictions) -> Made:
    shown, kept, rest = predictions
    if not kept:
        return None
    values = pd.DataFrame(
        [(one.run.panel, one.run.setting, one.agreement) for one in kept],
        columns=["panel", "setting", "value"],
    )
    table = pd.DataFrame(
        [
            (*key, *interval(of_cell))
            for key, of_cell in values.groupby(["panel", "setting"], sort=False)["value"]
        ],
        columns=["panel", "setting", "mean", "half"],
    )
    settings = shown.groupby("setting")["rank"].min().sort_values().index.tolist()
    drawing = _dots(
        [("equal predictions (%)", table)], list(values["panel"].unique()), settings, {}
    )
    caption = (
        "Share of test images for which student and teacher predict the same class, at the end of "
        "training. Marks: mean over seeds; bars: 95 % interval of the mean (Student's t), none for "
        "a single seed; "
        f"{_seeds(values.groupby(['panel', 'setting']).size())}.{rest}"
    )
    return "agreement", "Student-teacher agreement", caption, drawing


def _first(kept: Sequence[_Kept], settings: pd.DataFrame) -> list[_Kept]:
    """Return the first run of each panel and setting, by panel and then by order of settings."""
    order = settings.groupby("setting")["rank"].min().to_dict()
    panels = list(dict.fromkeys(settings["panel"]))
    first = [one for one in kept if one.gap_KK is not None]
    return sorted(first, key=lambda one: (panels.index(one.run.panel), order[one.run.setting]))


def _correlation(predictions: Predictions) -> Made:
    shown, kept, rest = predictions
    first = _first(kept, shown)
    if not first:
        return None
    drawn, left = first[:PANELS], [f"{one.run.panel} {one.run.setting}" for one in first[PANELS:]]
    titles = [f"{one.run.panel}\n{one.run.setting}" for one in drawn]
    drawing, axes = _grid(titles, "class", "class", height=2.2)
    gaps = [one.gap_KK for one in drawn if one.gap_KK is not None]
    top = float(np.nanquantile(np.concatenate([gap_KK.ravel() for gap_KK in gaps]), 0.99)) or 1.0
    for (title, axis), gap_KK in zip(axes.items(), gaps, strict=True):
        image = axis.imshow(gap_KK, cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
        apart = gap_KK[~np.eye(len(gap_KK), dtype=bool)]
        axis.set_title(f"{title}\nmean |difference| {np.nanmean(apart):.3f}")
        axis.grid(visible=False)
    drawing.colorbar(
        image, ax=list(axes.values()), label="|difference|", extend="max", aspect=40, pad=0.02
    )
    caption = (
        "Absolute difference of the correlation matrices of the teacher's and the student's class "
        "logits over the test images (SDD Fig. 3), at the end of training; n = 1 seed, the lowest "
        "of each setting. The mean is over pairs of different classes; the colours end at the 99th "
        f"percentile.{_listed(NO_ROOM, left)}{rest}"
    )
    return "logit_correlation", "Difference of the logit correlation matrices", caption, drawing


def _features(predictions: Predictions) -> Made:
    shown, kept, _ = predictions
    first = [one for one in _first(kept, shown) if one.arrays and "features" in one.arrays]
    if not first:
        return None
    counts = pd.Series([one.run.panel for one in first]).value_counts(sort=False)
    pair = str(counts.idxmax())  # the first panel with the most settings
    first = [one for one in first if one.run.panel == pair]
    # If there are too many settings, keep the plainest ones and the one with the most scales.
    drawn = first if len(first) < MAPS else [*first[: MAPS - 2], first[-1]]
    left = [one.run.setting for one in first if one not in drawn]
    left += [str(panel) for panel in counts.index if panel != pair]
    arrays = first[0].arrays or {}
    clouds = {"teacher": arrays["teacher_features"]} if "teacher_features" in arrays else {}
    clouds |= {one.run.setting: one.arrays["features"] for one in drawn if one.arrays}
    images = min(map(len, clouds.values()))
    target_n = arrays["target"][:images]
    classes, of_class = np.unique(target_n, return_counts=True)
    told = np.sort(classes[np.argsort(-of_class, kind="stable")][:CLASSES])
    drawing, axes = _grid(list(clouds), "", "")
    for name, axis in axes.items():
        points_n2 = _embedded(clouds[name][:images])
        axis.set_axis_off()
        other = ~np.isin(target_n, told)
        axis.scatter(
            points_n2[other, 0], points_n2[other, 1], s=2, color=GREY, linewidths=0, rasterized=True
        )
        for index, of_told in enumerate(told):
            style = _style(index)
            x, y = points_n2[target_n == of_told].T
            axis.scatter(
                x,
                y,
                s=7,
                marker=style["marker"],
                color=style["color"],
                linewidths=0,
                rasterized=True,
            )
    _legend(drawing, [f"class {number}" for number in told], linestyle="none")
    grey = (
        ""
        if len(told) == len(classes)
        else f" {len(told)} of {len(classes)} classes have a colour, the others are grey."
    )
    pair_text = pair.replace("\n", ", ")
    caption = (
        f"t-SNE of the spatially averaged features of {images} test images (SDD Fig. 4), "
        f"{pair_text}, at the end of training; perplexity 30 or less, started from the principal "
        "components, random state 0; n = 1 seed, the lowest of each setting. Distances and "
        f"positions cannot be compared between panels.{grey}{_listed(NO_ROOM, left)}"
    )
    return "features", f"t-SNE of features, {pair_text}", caption, drawing


def _embedded(features_nC: np.ndarray) -> np.ndarray:
    """Return t-SNE coordinates of the features, (n, 2)."""
    # The import is slow, so it waits until a run has features.
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, max(1.0, (len(features_nC) - 1) / 3))
    # With one thread, sums have the same order on every machine.
    with threadpool_limits(1):
        points: np.ndarray = TSNE(
            init="pca", perplexity=perplexity, random_state=0, max_iter=500
        ).fit_transform(features_nC.astype(np.float32))
    return points


def _regions(predictions: Predictions) -> Made:
    shown, kept, _ = predictions
    able = [
        one
        for one in _first(kept, shown)
        if one.arrays and len(one.arrays.get("sample", ())) and "images" in one.arrays
    ]
    if not able:
        return None
    one = max(able, key=lambda one: len(one.arrays["sample"]))  # type: ignore[index]
    arrays, m = one.arrays or {}, int((one.arrays or {})["scale"])
    sample, predicted = arrays["sample"], arrays["predicted"]
    target, regions = arrays["target"][sample], arrays["regions"][sample]
    wrong = predicted != target
    chosen = [*np.flatnonzero(wrong)[: PANELS // 2], *np.flatnonzero(~wrong)[: PANELS // 2]]
    chosen += [index for index in range(len(sample)) if index not in chosen][: PANELS - len(chosen)]
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    drawing = Drawing(figsize=(WIDE * columns / 6, 1.4 * rows), layout="constrained")
    for place, index in enumerate(sorted(chosen, key=lambda index: not wrong[index])):
        axis = drawing.add_subplot(rows, columns, place + 1)
        image_HWC = arrays["images"][index]
        height, width = image_HWC.shape[:2]
        axis.imshow(
            image_HWC.squeeze(), cmap="gray", interpolation="nearest", extent=(0, width, height, 0)
        )
        axis.set_axis_off()
        axis.set_title(
            f"true {target[index]}, whole {predicted[index]} {'✗' if wrong[index] else '✓'}",
            fontsize=7,
        )
        for region, (row, column) in enumerate(np.ndindex(m, m)):
            corner = (column * width / m, row * height / m)
            axis.add_patch(
                Rectangle(
                    corner, width / m, height / m, fill=False, edgecolor="white", linewidth=0.6
                )
            )
            number = regions[index, region]
            if number != predicted[index]:
                right = number == target[index]
                middle = (corner[0] + width / m / 2, corner[1] + height / m / 2)
                box = {
                    "boxstyle": "square,pad=0.15",
                    "linewidth": 0,
                    "facecolor": "#005f46" if right else "white",
                }
                text = f"{number}✓" if right else str(number)
                axis.text(
                    *middle,
                    text,
                    ha="center",
                    va="center",
                    fontsize=6,
                    bbox=box,
                    color="white" if right else "black",
                )
    caption = (
        f"Test images for which a region and the whole logit map of the teacher {one.run.teacher} "
        f"predict different classes ({one.run.dataset}, {m} x {m} regions; SDD Figs. 5 and 6). "
        "Above each image: true class and prediction of the whole map, ✓ if correct. A number in a "
        "region: its prediction, if that differs from the prediction of the whole map; ✓ on a dark "
        "background: the true class. Images with a wrong prediction of the whole map come first. "
        "The grid is drawn with equal cells; the regions overlap if the side of the map is not a "
        f"multiple of {m}. n = 1 teacher, {len(chosen)} of {len(sample)} kept examples."
    )
    return "regions", "Where regions and the whole map differ", caption, drawing
