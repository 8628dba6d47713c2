"""Test the stored results: tables follow from the runs, and a page shows them."""

import re
from pathlib import Path

import pytest

from analysis import render, tables
from analysis.schema import read_frame

ROOT = Path(__file__).parents[2]
RESULTS = sorted(path.parent for path in (ROOT / "analysis" / "results").glob("*/runs.csv"))
PAGE = (ROOT / "docs" / "tables.md").read_text()


def body(markdown: str) -> str:
    """Return only the lines of the table."""
    return "\n".join(line for line in markdown.splitlines() if line.startswith("|"))


def test_there_is_a_study() -> None:
    assert [path.name for path in RESULTS] == ["cpu_study"]


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_every_table_follows_from_the_runs(folder: Path) -> None:
    frame = read_frame(folder / "runs.csv")
    built = {table.name: table for table in tables.build(frame, sweep=folder.name)}
    kept = {path.stem for path in (folder / "tables").glob("*.md")}
    assert kept == built.keys()
    for name, table in built.items():
        for suffix, text in (
            ("md", render.markdown(table)),
            ("csv", render.csv(table)),
            ("tex", render.latex(table)),
        ):
            assert (folder / "tables" / f"{name}.{suffix}").read_text() == text


@pytest.mark.parametrize("folder", RESULTS, ids=lambda path: path.name)
def test_every_run_is_finished_and_no_folder_is_named(folder: Path) -> None:
    frame = read_frame(folder / "runs.csv")
    assert set(frame["status"]) == {"FINISHED"}
    assert not re.search(
        r"(?<![\w.:/])/(tmp|home|root|work|mnt)/", (folder / "runs.csv").read_text()
    )


def test_a_page_shows_a_table_and_a_figure_of_it() -> None:
    shown = PAGE.split("<!-- table: cpu_study -->")[1].split("<!-- end -->")[0]
    kept = (ROOT / "analysis/results/cpu_study/tables/overview_fashion_mnist.md").read_text()
    assert body(shown) == body(kept)
    figure = re.search(r"!\[[^]]*\]\(\.\./(analysis/results/cpu_study/figures/\w+\.png)\)", PAGE)
    assert figure
    assert (ROOT / figure[1]).exists()
