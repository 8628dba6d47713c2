"""A figure's numbers are the table's: the same runs, the same mean, the same interval."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from analysis import figures, points, selection, stats, tables
from analysis.cells import Table
from analysis.schema import frame_of
from tests.analysis.standin import Standin
from tests.analysis.synthetic import run, runs

# No paper reports this data set, so the overview shows every run.
DATA = {"dataset": "fashion_mnist", "started": pd.Timestamp("2026-01-01", tz="UTC")}
PAIRS = (("resnet20", "resnet8"), ("resnet20", "mobilev2"))


def after(hours: int) -> dict[str, pd.Timestamp]:
    return {"started": DATA["started"] + pd.Timedelta(hours=hours)}


def difficult_runs() -> list[dict[str, Any]]:
    """Runs with repeated seeds, missing seeds, failed runs and mixed epochs."""
    noise = np.random.default_rng(0)

    def values(mean: float, seeds: int) -> list[float]:
        return [round(mean + noise.normal(0, 0.3), 2) for _ in range(seeds)]

    rows: list[dict[str, Any]] = []
    for number, (teacher, student) in enumerate(PAIRS):
        best = 70.0 + 3 * number
        rows += runs("none", student, values(best, 3), distiller="vanilla", **DATA)
        for gain, M in ((1.0, "[1]"), (1.6, "[1,2]"), (2.1, "[1,2,4]")):
            rows += runs(teacher, student, values(best + gain, 4), M=M, **DATA)
            rows += runs(teacher, student, values(best + gain, 3), M=M, standardize=True, **DATA)
    teacher, student = PAIRS[0]
    # Run again: the later run counts, whatever the order of the rows.
    again = run(teacher, student, 0, 70.5, M="[1,2]", **DATA | after(9))
    rows += [again, again | {"best": 50.0, "run_id": "older"} | after(8)]
    # A failed run that was run again, and failed and missing runs that were not.
    rows.append(run(teacher, student, 1, None, M="[1,2]", status="FAILED", **DATA))
    rows.append(run(teacher, student, 8, None, M="[1,2]", status="FAILED", **DATA))
    rows.append(run(teacher, student, 9, None, M="[1,2]", status="MISSING", **DATA))
    # One seed in two configurations that no column tells apart: neither counts.
    rows.append(run(teacher, student, 2, 60.0, M="[1,2,4]", config_hash="another", **DATA))
    # Fewer epochs, and a seed whose accuracy was never logged.
    rows += runs(teacher, student, [60.0, 60.4], epochs=30, **DATA)
    rows += runs(teacher, student, [61.0, 61.1], epochs=30, M="[1,2]", **DATA)
    rows.append(run(teacher, student, 7, float("nan"), **DATA))
    rows.append(run(teacher, student, 0, 1.0, M="[1,2]", superseded=True, **DATA))
    return [row | {"epochs_done": 3} for row in rows]


def overview(rows: Sequence[dict[str, Any]], metric: str = "best") -> Table | None:
    built = tables.build(frame_of(rows), metric=metric)
    return next((table for table in built if table.name == "overview_fashion_mnist"), None)


@pytest.fixture(scope="module")
def table() -> Table:
    found = overview(difficult_runs())
    assert found is not None
    return found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drawing]:
    """What is drawn of these runs, by the name of the figure."""
    seen: dict[str, Drawing] = {}
    save = Drawing.savefig

    def remember(drawing: Drawing, path: Path, **options: object) -> None:
        seen[Path(path).stem] = drawing
        save(drawing, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drawing, "savefig", remember)
        figures.build(Standin(difficult_runs()), tmp_path_factory.mktemp("figures"))
    return seen


def labels_of(drawing: Drawing) -> dict[Any, str]:
    """The entries of the legend by their marker."""
    (legend,) = drawing.legends
    texts = [text.get_text() for text in legend.get_texts()]
    markers = [handle.get_marker() for handle in legend.legend_handles]
    assert len(set(markers)) == len(texts)
    return dict(zip(markers, texts, strict=True))


def marks_of(axis: Axes) -> Iterator[tuple[Any, Any, Any]]:
    """The marker of each series, its points (x, y) and the ends of its bars."""
    for container in axis.containers:
        line, _, (bars,) = container.lines
        yield line.get_marker(), line.get_xydata(), np.array(bars.get_segments())


def test_accuracies_in_the_figure_are_those_of_the_table(
    table: Table, drawn: dict[str, Drawing]
) -> None:
    drawing = drawn["accuracy_by_scales"]
    compared = set()
    for axis in drawing.axes:
        ticks = [tick.get_text() for tick in axis.get_xticklabels()]
        for marker, at, bars in marks_of(axis):
            for (x, y), bar in zip(at, bars, strict=True):
                name, *parts = labels_of(drawing)[marker].split(", ")
                M = ticks[round(x)]
                method = name if M == "[1]" else f"SD-{name} {M}"
                # A line is named by what differs in its panel, a row by what differs in any.
                (row,) = {
                    row
                    for row in table.rows
                    if row in (method, ", ".join([method, *(parts or ["epochs=240"])]))
                }
                cell = table.cells[row, axis.get_title()]
                values = list(cell.values.values())
                assert y == pytest.approx(cell.mean, abs=1e-9), row
                assert sorted(bar[:, 1]) == pytest.approx(stats.interval(values), abs=1e-9), row
                compared.add((row, axis.get_title()))
    # KD+LS: three scales of both pairs. KD: three scales of mobilev2; of resnet8 two at 30 epochs
    # and three at 240.
    assert len(compared) == 14


def test_gains_in_the_figure_are_those_of_the_table(
    table: Table, drawn: dict[str, Drawing]
) -> None:
    drawing = drawn["gain_by_pair"]
    over_plain, over_alone = drawing.axes
    panels = [tick.get_text().removesuffix("  ≠") for tick in over_plain.get_yticklabels()]
    compared = set()
    for axis, baseline in ((over_plain, "KD"), (over_alone, "student alone")):
        for marker, at, bars in marks_of(axis):
            for (x, y), bar in zip(at, bars, strict=True):
                setting, panel = labels_of(drawing)[marker], panels[round(y)]
                gain = table.cells[setting, panel].gain
                if gain and gain.over.split(", ")[0] == baseline:
                    assert x == pytest.approx(gain.difference.mean, abs=1e-9), (setting, panel)
                    ends = gain.difference.low, gain.difference.high
                    assert sorted(bar[:, 0]) == pytest.approx(ends, abs=1e-9), (setting, panel)
                    compared.add((setting, panel))
    # KD over the student alone; KD+LS, SD-KD [1,2] and SD-KD [1,2,4] over KD; for each pair. For
    # resnet8 also SD-KD [1,2] at 30 epochs.
    assert len(compared) == 9


def test_curves_are_of_the_runs_of_the_table(
    table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    runs_of_store = Standin(difficult_runs())
    history = runs_of_store.history

    def remember(metrics: Sequence[str], run_ids: Sequence[str]) -> pd.DataFrame:
        asked.extend(run_ids)
        return history(metrics, run_ids)

    monkeypatch.setattr(runs_of_store, "history", remember)
    figures.build(runs_of_store, tmp_path)
    # Each run of a student alone stands in one column of the table, as each other run does.
    assert len(asked) == len(set(asked)) == sum(cell.n for cell in table.cells.values())
    assert "older" not in asked


def test_the_table_has_what_the_runs_were_made_for(table: Table) -> None:
    column = "resnet20 → resnet8"
    assert table.cells["SD-KD [1,2], epochs=240", column].values[0] == 70.5
    assert table.cells["SD-KD [1,2], epochs=240", column].troubles == ("1 failed", "1 missing")
    assert table.cells["SD-KD [1,2,4]", column].troubles == ("1 in several configurations",)
    assert table.cells["SD-KD [1,2,4]", column].seeds == [0, 1, 3]
    assert table.cells["KD, epochs=30", column].n == 2
    assert table.cells["KD, epochs=240", column].troubles == ("1 without a number (NaN)",)


some_runs = st.lists(
    st.builds(
        lambda pair, alone, recipe, seed, top1, epochs, status, hour, config, settings_hash: run(
            "none" if alone else pair[0], pair[1], None if seed == 3 else seed,
            top1 if status == "FINISHED" else None, distiller="vanilla" if alone else "kd",
            M=recipe[0], standardize=recipe[1], temperature=recipe[2], epochs=epochs, status=status,
            val_fraction=0.1 if epochs == 30 else 0.0,
            test=None if top1 is None else top1 - 0.5, settings_hash=settings_hash,
            source="imported" if seed == 3 else "sddlskd", **DATA | after(hour),
            **({"config_hash": f"{pair}{alone}{recipe}{seed}{epochs}{config}"} if config else {}),
        ),
        st.sampled_from(PAIRS),
        st.sampled_from([True, False, False, False]),
        st.sampled_from([("[1]", False, 4.0), ("[1,2]", False, 4.0), ("[1]", True, 2.0),
                         ("[1,2]", True, 2.0), ("[1,2]", True, 4.0)]),
        st.integers(0, 3),
        st.one_of(st.just(float("nan")), *[st.integers(7000, 7900).map(lambda x: x / 100)] * 9),
        st.sampled_from([240, 240, 240, 30]),
        st.sampled_from(["FINISHED"] * 4 + ["FAILED", "MISSING", "RUNNING", "KILLED"]),
        st.integers(0, 3),
        st.sampled_from(["", "", "a", "b"]),
        st.sampled_from(["", "", "x", "y"]),
    ),
    max_size=20,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(some_runs, st.sampled_from(list(selection.METRICS)))
def test_every_point_is_a_cell_and_every_cell_a_point(
    rows: list[dict[str, Any]], metric: str
) -> None:
    found, _ = points.points_of(frame_of(rows), metric)
    table = overview(rows, metric)
    columns = table.columns if table else ()
    in_figures = {}
    for point in found:
        panels = [point.panel]
        if point.alone:
            # In the table, a student alone stands in the column of every pair with that student.
            panels = [column for column in columns if column.endswith(f"→ {point.run.student}")]
        for panel in panels or [point.panel]:
            ends = stats.interval(point.values)
            in_figures[point.setting, panel] = (point.result.values, point.mean, ends)
    in_tables = {
        key: (cell.values, cell.mean, stats.interval(list(cell.values.values())))
        for key, cell in (table.cells.items() if table else ())
        if cell.n and key[0] != "teacher"
    }
    assert in_figures == in_tables


@settings(max_examples=100, deadline=None)
@given(some_runs)
def test_every_gain_over_the_same_baseline_is_the_same(rows: list[dict[str, Any]]) -> None:
    found, _ = points.points_of(frame_of(rows), "best")
    compared, _ = points.comparisons(found)
    in_figures = {
        (one.point.setting, one.point.panel, one.gain.over): one.gain.difference for one in compared
    }
    table = overview(rows)
    for (row, column), cell in table.cells.items() if table else ():
        # The tables compare KD+LS with scales to KD+LS, the figures to KD.
        figured = cell.gain and cell.gain.over.startswith(("KD,", "student alone"))
        if cell.gain and (figured or cell.gain.over == "KD"):
            assert in_figures[row, column, cell.gain.over] == cell.gain.difference
