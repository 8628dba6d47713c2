"""Draw the method: from logit maps over regions and z-scores to the loss.

    python docs/figures/method.py

writes method-light.svg and method-dark.svg beside this file. The maps are made up. What is drawn of
them is computed by `sddlskd.distill`: the regions are the pooled maps, the bars are z-scores.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from sddlskd.distill import region_logits, standardize

HERE = Path(__file__).parent
WIDTH, HEIGHT = 12.0, 4.6  # inches
CLASSES = 5
SCALES = [1, 2, 4]
LOGITS = (-3.0, 6.0)  # drawn in the lightest and the darkest colour


class Theme(NamedTuple):
    """Colours of a figure on a light or a dark page."""

    ink: str
    faint: str
    teacher: str
    student: str
    reverse: str  # "_r" if the cells with the largest logits are the lightest ones


THEMES = {
    "light": Theme("#1f2328", "#59636e", "#0b62c4", "#bc4c00", ""),
    "dark": Theme("#e6edf3", "#9da7b3", "#58a6ff", "#ff9b50", "_r"),
}
MAPS = {"teacher": "Blues", "student": "Oranges"}  # matplotlib's names


def maps() -> dict[str, torch.Tensor]:
    """Return a logit map (1, CLASSES, 4, 4) of each network; the student's is fainter and noisy."""
    generator = torch.Generator().manual_seed(7)
    teacher = torch.randn(1, CLASSES, 4, 4, generator=generator)
    teacher[0, 1, :2, :2] += 3.0
    teacher[0, 3, 2:, 2:] += 2.0
    noise = torch.randn(1, CLASSES, 4, 4, generator=generator)
    return {"teacher": 2.0 * teacher, "student": 0.8 * teacher + 0.5 * noise}


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str) -> None:
    """Draw a rounded frame, by its lower left corner."""
    style = FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.08",
        fc="none",
        ec=colour,
        lw=1.6,
    )
    axes.add_patch(style)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    """Draw an arrow between two points."""
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=colour, lw=1.5)
    )


def grid(
    axes: Axes, values: torch.Tensor, x: float, y: float, side: float, colours: str, edge: str
) -> None:
    """Draw the cells of a square map of one class, by its lower left corner."""
    low, high = LOGITS
    cell = side / len(values)
    for i, line in enumerate(values.tolist()):
        for j, value in enumerate(line):
            share = min(max((value - low) / (high - low), 0.0), 1.0)
            colour = mpl.colormaps[colours](0.12 + 0.7 * share)
            corner = (x + j * cell, y + side - (i + 1) * cell)
            axes.add_patch(Rectangle(corner, cell, cell, fc=colour, ec=edge, lw=0.7))


def bars(axes: Axes, values: torch.Tensor, x: float, y: float, colour: str, ink: str) -> None:
    """Draw one bar for each class around the line y, from the place x on."""
    for index, value in enumerate(values.tolist()):
        height = 0.24 * value
        axes.add_patch(Rectangle((x + 0.19 * index, y), 0.14, height, fc=colour, ec="none"))
    axes.plot([x - 0.06, x + 0.19 * CLASSES], [y, y], color=ink, lw=0.8)


def row(axes: Axes, who: str, y: float, theme: Theme) -> None:
    """Draw what happens to the map of one network, around the height y."""
    colour, colours = getattr(theme, who), MAPS[who] + theme.reverse
    logit_map = maps()[who]
    for back in (2, 1, 0):
        x, low = 2.95 + 0.1 * back, y - 0.5 + 0.1 * back
        grid(axes, logit_map[0, 1 + back], x, low, 1.0, colours, colour)
    regions = region_logits(logit_map, SCALES)[0]
    start = 0
    for x, m in zip((4.95, 5.65, 6.5), SCALES, strict=True):
        cells = regions[start : start + m * m, 1].reshape(m, m)
        start += m * m
        side = 0.45 + 0.15 * m
        grid(axes, cells, x, y - side / 2, side, colours, colour)
    chosen = 1  # the first of the four regions of m = 2
    scores = standardize(regions[chosen : chosen + 1])[0]
    bars(axes, scores, 8.55, y, colour, theme.ink)
    for begin, end in ((4.25, 4.8), (7.65, 8.35), (9.65, 10.2)):
        arrow(axes, (begin, y), (end, y), colour)


def draw(theme: Theme) -> plt.Figure:
    """Return the figure in the colours of a theme."""
    figure = plt.figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    axes.axis("off")
    top, bottom = 3.05, 1.05

    def say(x: float, y: float, text: str, colour: str = theme.ink, size: float = 12) -> None:
        axes.text(x, y, text, color=colour, fontsize=size, ha="center", va="center")

    for x, head, note in (
        (1.2, "networks", ""),
        (3.5, "logit map", "classes x height x width"),
        (6.3, "regions", "M = [1, 2, 4]: 1 + 4 + 16"),
        (9.0, "z-scores", "of each region's logits"),
        (11.05, "loss", "of each region"),
    ):
        say(x, 4.35, head, size=14)
        say(x, 4.07, note, theme.faint, 10)

    box(axes, 0.35, top - 0.5, 1.7, 1.0, theme.teacher)
    say(1.2, top + 0.13, "teacher", theme.teacher, 13)
    say(1.2, top - 0.17, "once a batch", theme.faint, 10)
    box(axes, 0.35, bottom - 0.5, 1.7, 1.0, theme.student)
    for shift in (0.12, 0.24):  # more students behind the first one
        right, upper = 2.05 + shift, bottom + 0.5 + shift
        edge = ([0.45 + shift, right, right], [upper, upper, bottom - 0.4 + shift])
        axes.plot(*edge, color=theme.student, lw=1.6, solid_joinstyle="round")
    say(1.2, bottom + 0.13, "student", theme.student, 13)
    say(1.2, bottom - 0.17, "1, 2, ... n", theme.faint, 10)
    say(1.2, 2.05, "the same images", theme.faint, 10)

    for who, y in (("teacher", top), ("student", bottom)):
        begin = 2.1 if who == "teacher" else 2.35
        arrow(axes, (begin, y), (2.85, y), getattr(theme, who))
        row(axes, who, y, theme)
    say(6.3, 2.05, "SDD", theme.faint, 11)
    say(9.0, 2.05, "LSKD", theme.faint, 11)

    box(axes, 10.3, 0.55, 1.5, 3.0, theme.ink)
    for y, text in ((2.95, "KD, DKD, NKD"), (2.65, "or your own")):
        say(11.05, y, text, size=11)
    for y, text in ((2.0, "consistent: 1"), (1.72, "complementary: 2")):
        say(11.05, y, text, theme.faint, 9.5)
    say(11.05, 1.12, "mean over all", size=11)
    say(11.05, 0.84, "regions", size=11)
    return figure


def main(folder: Path) -> None:
    """Write the figure of each theme into a folder."""
    mpl.rcParams["svg.hashsalt"] = "sddlskd"
    for name, theme in THEMES.items():
        figure = draw(theme)
        figure.savefig(
            folder / f"method-{name}.svg",
            transparent=True,
            metadata={"Date": None, "Creator": None},
        )
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
