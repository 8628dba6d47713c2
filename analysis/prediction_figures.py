"""Draw the figures of predictions on the test split: agreement, correlations, features, regions.

Only runs that kept their predictions (`tracking.predictions=true`) can be drawn. Students that were
trained alone are left out. A *point* is the result of one *setting* (a method with its scales and
options) in one *panel* (a pair of teacher and student on a data set).

Shapes: K classes, n images, C features, H height, W width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.patches import Rectangle

from .charts import (
    GREY,
    NO_ROOM,
    PANELS,
    WIDE,
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
    style_of,
)
from .points import Point
from .schema import Run
from .stats import interval, mean_std

__all__ = [
    "Kept",
    "Predictions",
    "agreement",
    "agreement_chart",
    "correlation_chart",
    "correlation_gap",
    "features_chart",
    "kept_of",
    "regions_chart",
]

CONSTANT = "Not drawn because the logits are constant"
MAPS = 6  # largest number of panels in the t-SNE figure
CLASSES = 10  # largest number of coloured classes in the t-SNE figure

Arrays = Mapping[str, np.ndarray]


class Predictions(Protocol):
    """Reader of the predictions that runs saved, such as `analysis.runs.Runs`."""

    def predictions(self, run_id: str) -> Arrays | None:
        """Return the arrays that a run saved for the test images, by name; None if it saved none.

        `run_id` is the run's id in MLflow. `sddlskd.training.predictions.collect` lists the arrays,
        such as "logits" (n, K). If the array "sample", indices of k test images, is not empty,
        "images" holds the pixels of these images, uint8, (k, H, W, channels). Raise ValueError if
        the predictions cannot be read.
        """


@dataclass(frozen=True, eq=False)
class First:
    """Predictions of one run of a `Point`, which is the result of one method on a pair of networks.

    The run is the one with the lowest seed among the runs whose predictions can be drawn.
    """

    point: Point
    run: Run
    # Arrays that the run saved, without logits. With examples, "predicted" is the class that the
    # teacher predicts for each of them.
    arrays: Arrays
    gap_KK: np.ndarray  # result of `correlation_gap`


@dataclass(frozen=True)
class Kept:
    """Part of the runs' predictions that the figures show, as `kept_of` returns it.

    For each `Point`, an instance holds how often each of its runs agrees with the teacher, and the
    saved arrays (without logits) of one of these runs. It also holds the sentences for captions on
    the panels, settings and runs that are not shown.
    """

    agreements: Mapping[Point, list[float]]  # result of `agreement` (%) for each run of a point
    firsts: Sequence[First]  # one per point, by panel and then by order of settings
    rest: str  # sentences on what is left out, for the captions; "" if nothing is


def kept_of(runs: Predictions, points: Sequence[Point]) -> Kept:
    """Read the predictions of runs on the test images, and return what the figures need of them.

    Left out are students that were trained alone, runs that saved no logits of a teacher, runs with
    logits that are infinite or NaN, and the panels and settings that a figure has no room for.

    Args:
        runs: reader of the predictions.
        points: results to draw, each of one setting (a method with its options) in one panel (a
            pair of teacher and student on a data set).

    Returns:
        The `agreement` of each run that can be drawn and, per point, the arrays of the run with the
        lowest seed. Both are empty if no run can be drawn. The field `rest` names the panels and
        settings without room, and the runs with infinite or NaN logits.

    Raises:
        ValueError: If `runs` cannot read the predictions of a run.
    """
    distilled = [point for point in points if not point.alone]
    if not distilled:
        return Kept({}, [], "")
    panels = len({point.panel for point in distilled})
    shown, _, rest = few(distilled, lambda point: point.setting, settings_in_dots(panels))
    agreements: dict[Point, list[float]] = {}
    firsts: list[First] = []
    for point in shown:
        for run in sorted(point.runs, key=lambda run: (run.seed is None, run.seed)):
            arrays = runs.predictions(run.run_id)
            if arrays is None or "teacher_logits" not in arrays:
                continue
            logits = (arrays["logits"], arrays["teacher_logits"])
            if not all(np.isfinite(of_network).all() for of_network in logits):
                rest += f" Logits of run {run.name} are not finite, so it is left out."
                continue
            if point not in agreements:
                firsts.append(_first(point, run, arrays))
            agreements.setdefault(point, []).append(agreement(arrays))
    order = list(dict.fromkeys(first.point.panel for first in firsts))
    firsts.sort(key=lambda first: (order.index(first.point.panel), first.point.rank))
    return Kept(agreements, firsts, rest)


def _first(point: Point, run: Run, arrays: Arrays) -> First:
    small = {name: array for name, array in arrays.items() if "logits" not in name}
    if "sample" in small:
        small["predicted"] = arrays["teacher_logits"][small["sample"]].argmax(1)
    return First(point, run, small, correlation_gap(arrays))


# Agreement


def agreement(arrays: Arrays) -> float:
    """Return the percentage of images for which student and teacher predict the same class.

    `arrays` holds the class logits of the student, "logits", and of the teacher, "teacher_logits",
    both (n, K) with n at least 1. The result is a scalar. Raise KeyError if an array is missing.
    """
    return float(100 * (arrays["logits"].argmax(1) == arrays["teacher_logits"].argmax(1)).mean())


def agreement_chart(kept: Kept) -> Chart | None:
    """Draw how often student and teacher predict the same class, in percent of the test images.

    A mark shows the mean over the runs of one setting (a method with its options) in one panel (a
    pair of teacher and student on a data set). A bar shows the 95 % t interval of the mean; it is
    missing for a single run and for equal runs. The result is None if `kept` has no run.
    """
    if not kept.agreements:
        return None
    marks = []
    for point, shares in kept.agreements.items():
        mean, _ = mean_std(shares)
        marks.append(Dot(point.panel, point.setting, mean, half_width(interval(shares))))
    ranked = sorted(kept.agreements, key=lambda point: point.rank)
    drawing = dots(
        [("equal predictions (%)", marks)],
        list(dict.fromkeys(point.panel for point in kept.agreements)),
        {point.setting: point.number for point in ranked},
        shaded={},
    )
    caption = (
        "Share of test images for which student and teacher predict the same class, at the end of "
        "training. Marks: mean over seeds; bars: 95 % interval of the mean (Student's t), none for "
        f"a single seed; {count_seeds(map(len, kept.agreements.values()))}.{kept.rest}"
    )
    return Chart("agreement", "Student-teacher agreement", caption, drawing)


# Correlation of the logits


def correlation_gap(arrays: Arrays) -> np.ndarray:
    """Return how much the correlations between the class logits differ from student to teacher.

    `arrays` holds the class logits of the student, "logits", and of the teacher, "teacher_logits",
    both (n, K). Each network has a (K, K) matrix of Pearson correlations between the logits of two
    classes, taken over the n images. The result is the absolute difference of the two matrices (SDD
    Fig. 3). An entry is NaN if a network has constant logits for one of its two classes. Raise
    KeyError if an array is missing.
    """
    with np.errstate(invalid="ignore"):  # constant logits
        student_KK, teacher_KK = (
            np.corrcoef(arrays[name].astype(np.float64).T) for name in ("logits", "teacher_logits")
        )
    gap_KK: np.ndarray = np.abs(student_KK - teacher_KK)
    return gap_KK


def correlation_chart(kept: Kept) -> Chart | None:
    """Draw how much the correlations between class logits differ from student to teacher.

    A heat map shows the matrix of `correlation_gap` (K, K) for one run of a point, which is the
    result of one method with its options on one pair of networks. `kept` holds the runs whose
    predictions were saved. At most `PANELS` (12) points of `kept` are drawn. A point is left out if
    no two classes have a correlation, because its logits are constant. The caption names the points
    that are not drawn. The result is None if no point is drawn.
    """
    able = [first for first in kept.firsts if np.isfinite(_apart(first.gap_KK)).any()]
    if not able:
        return None
    drawn = able[:PANELS]
    titles = [f"{first.point.panel}\n{first.point.setting}" for first in drawn]
    drawing, axes = panels_of(titles, "class", "class", height=2.2, letters=26)
    every_gap = np.concatenate([first.gap_KK.ravel() for first in drawn])
    top = float(np.nanquantile(every_gap, 0.99)) or 1.0
    for axis, first in zip(axes.values(), drawn, strict=True):
        image = axis.imshow(first.gap_KK, cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
        mean = np.nanmean(_apart(first.gap_KK))
        axis.set_title(f"{axis.get_title()}\nmean |difference| {mean:.3f}")
        axis.grid(visible=False)
    drawing.colorbar(
        image, ax=list(axes.values()), label="|difference|", extend="max", aspect=40, pad=0.02
    )
    left = [f"{first.point.panel} {first.point.setting}" for first in able[PANELS:]]
    constant = [
        f"{first.point.panel} {first.point.setting}" for first in kept.firsts if first not in able
    ]
    caption = (
        "Absolute difference of the correlation matrices of the teacher's and the student's class "
        "logits over the test images (SDD Fig. 3), at the end of training; n = 1 seed, the lowest "
        "of each setting. The mean is over pairs of different classes; the colours end at the 99th "
        f"percentile.{listed(NO_ROOM, left)}{listed(CONSTANT, constant)}{kept.rest}"
    )
    title = "Difference of the logit correlation matrices"
    return Chart("logit_correlation", title, caption, drawing)


def _apart(gap_KK: np.ndarray) -> np.ndarray:
    """Return the entries of a matrix that are of two different classes, (K * (K - 1),)."""
    of_two: np.ndarray = gap_KK[~np.eye(len(gap_KK), dtype=bool)]
    return of_two


# Features


def features_chart(kept: Kept) -> Chart | None:
    """Draw t-SNE maps of the features of one pair of teacher and student, one map per network.

    The pair is the one with the most settings (methods with their options) that saved features. One
    map shows the teacher, if its features were saved. Each other map shows one run of a setting.
    There are at most `MAPS` (6) maps; the caption names the settings and pairs that are left out. A
    mark in a map is a test image. The `CLASSES` (10) most frequent classes have colours. The result
    is None if no run in `kept` has features.
    """
    able = [first for first in kept.firsts if "features" in first.arrays]
    if not able:
        return None
    in_panel: dict[str, list[First]] = {}
    for first in able:
        in_panel.setdefault(first.point.panel, []).append(first)
    panel = max(in_panel, key=lambda name: len(in_panel[name]))  # the first, if several
    here = in_panel[panel]
    drawn = here
    # If there are too many settings, keep the first ones and the last one in their order.
    arrays = here[0].arrays
    room = MAPS - 1 if "teacher_features" in arrays else MAPS
    if len(here) > room:
        drawn = [*here[: room - 1], here[-1]]
    left = [first.point.setting for first in here if first not in drawn]
    left += [other for other in in_panel if other != panel]
    clouds = {first.point.setting: first.arrays["features"] for first in drawn}
    if "teacher_features" in arrays:
        clouds = {"teacher": arrays["teacher_features"], **clouds}
    images = min(map(len, clouds.values()))
    target_n = arrays["target"][:images]
    classes, counts = np.unique(target_n, return_counts=True)
    coloured = np.sort(classes[np.argsort(-counts, kind="stable")][:CLASSES])
    drawing, axes = panels_of(list(clouds), "", "")
    for name, axis in axes.items():
        _scatter(axis, _embedded(clouds[name][:images]), target_n, coloured)
    labels = {f"class {number}": index for index, number in enumerate(coloured)}
    legend(drawing, labels, linestyle="none")
    others = ""
    if len(coloured) < len(classes):
        others = f" {len(coloured)} of {len(classes)} classes have a colour, the others are grey."
    pair = panel.replace("\n", ", ")
    caption = (
        f"t-SNE of the spatially averaged features of {images} test images (SDD Fig. 4), "
        f"{pair}, at the end of training; perplexity 30 or less, started from the principal "
        "components, random state 0; n = 1 seed, the lowest of each setting. Distances and "
        f"positions cannot be compared between panels.{others}{listed(NO_ROOM, left)}"
    )
    return Chart("features", f"t-SNE of features, {pair}", caption, drawing)


def _scatter(axis: Axes, points_n2: np.ndarray, target_n: np.ndarray, coloured: np.ndarray) -> None:
    """Draw points on axes: those of some classes in colour, and all others in grey.

    Args:
        axis: axes to draw on.
        points_n2: coordinates of the points.
        target_n: class of each point.
        coloured: classes to draw in colour.
    """
    axis.set_axis_off()
    alike: dict[str, Any] = {"linewidths": 0, "rasterized": True}
    x, y = points_n2[~np.isin(target_n, coloured)].T
    axis.scatter(x, y, s=2, color=GREY, **alike)
    for index, number in enumerate(coloured):
        style = style_of(index)
        x, y = points_n2[target_n == number].T
        axis.scatter(x, y, s=7, marker=style["marker"], color=style["color"], **alike)


def _embedded(features_nC: np.ndarray) -> np.ndarray:
    """Return coordinates of the features on a t-SNE map, (n, 2)."""
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


# Regions


def regions_chart(kept: Kept) -> Chart | None:
    """Draw test images for which the teacher's class for a region differs from that for the image.

    A region is one of m x m parts of the teacher's logit map, with the run's largest scale m. The
    images, at most `PANELS` (12), are from the run in `kept` that saved the most such images. On
    half of the images, the teacher's class for the image is wrong; on the other half, it is right.
    If the run saved too few images of one kind, more images of the other kind are drawn. The result
    is None if no run in `kept` saved images with a differing region.
    """
    able = [
        first
        for first in kept.firsts
        if len(first.arrays.get("sample", ())) and "images" in first.arrays
    ]
    if not able:
        return None
    first = max(able, key=lambda first: len(first.arrays["sample"]))
    arrays = first.arrays
    samples = len(arrays["sample"])
    m = int(arrays["scale"])
    wrong = arrays["predicted"] != arrays["target"][arrays["sample"]]
    half = PANELS // 2
    chosen = [*np.flatnonzero(wrong)[:half], *np.flatnonzero(~wrong)[:half]]
    chosen += [index for index in range(samples) if index not in chosen][: PANELS - len(chosen)]
    columns = min(6, len(chosen))
    rows = -(-len(chosen) // columns)
    drawing = Drawing(figsize=(WIDE * columns / 6, 1.4 * rows), layout="constrained")
    for place, index in enumerate(sorted(chosen, key=lambda index: not wrong[index]), start=1):
        _show_regions(drawing.add_subplot(rows, columns, place), arrays, index, m)
    caption = (
        f"Test images for which a region and the whole logit map of the teacher "
        f"{first.run.teacher} predict different classes ({first.run.dataset}, {m} x {m} regions; "
        "SDD Figs. 5 and 6). Above each image: true class and prediction of the whole map, ✓ if "
        "correct. A number in a region: its prediction, if that differs from the prediction of the "
        "whole map; ✓ on a dark background: the true class. Images with a wrong prediction of the "
        "whole map come first. The grid is drawn with equal cells; the regions overlap if the side "
        f"of the map is not a multiple of {m}. n = 1 teacher, {len(chosen)} of {samples} kept "
        "examples."
    )
    return Chart("regions", "Where regions and the whole map differ", caption, drawing)


def _show_regions(axis: Axes, arrays: Arrays, index: int, m: int) -> None:
    """Draw one image with the predictions of its regions.

    Args:
        axis: axes to draw on.
        arrays: predictions of the run.
        index: number of the image among the kept examples.
        m: number of regions on each side, so the image has m x m regions.
    """
    image_HWC = arrays["images"][index]
    height, width = image_HWC.shape[:2]
    sample = arrays["sample"][index]
    predicted = arrays["predicted"][index]
    target = arrays["target"][sample]
    axis.imshow(
        image_HWC.squeeze(), cmap="gray", interpolation="nearest", extent=(0, width, height, 0)
    )
    axis.set_axis_off()
    sign = "✓" if predicted == target else "✗"
    axis.set_title(f"true {target}, whole {predicted} {sign}", fontsize=7)
    for (row, column), of_region in zip(np.ndindex(m, m), arrays["regions"][sample], strict=True):
        corner = (column * width / m, row * height / m)
        frame: dict[str, Any] = {"fill": False, "edgecolor": "white", "linewidth": 0.6}
        axis.add_patch(Rectangle(corner, width / m, height / m, **frame))
        if of_region == predicted:
            continue
        box = {"boxstyle": "square,pad=0.15", "linewidth": 0, "facecolor": "white"}
        label = axis.text(
            corner[0] + width / m / 2,
            corner[1] + height / m / 2,
            str(of_region),
            ha="center",
            va="center",
            fontsize=6,
            bbox=box,
        )
        if of_region == target:
            label.set(text=f"{of_region}✓", color="white", bbox=box | {"facecolor": "#005f46"})
