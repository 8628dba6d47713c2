"""Test the page on what the papers' own numbers say, by numbers that pandas computes."""

from pathlib import Path

import pandas as pd
import pytest

from analysis import evidence
from analysis.__main__ import main
from analysis.published import REFERENCE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "evidence.md").read_text()
LOGS = pd.read_csv(REFERENCE / "lskd_logs.csv")
PUBLISHED = pd.read_csv(REFERENCE / "published.csv")


def cells() -> pd.DataFrame:
    """Return the runs of the logs with the number of LSKD's tables."""
    tables = ["LSKD Table 1", "LSKD Table 2", "LSKD Table 3"]
    numbers = PUBLISHED[PUBLISHED["table"].isin(tables) & (PUBLISHED["metric"] == "top1")]
    keys = ["dataset", "teacher", "student", "method"]
    return LOGS.merge(numbers[[*keys, "value"]], on=keys)


def test_the_page_is_what_the_command_writes() -> None:
    assert "\n".join(evidence.lines()) + "\n" == PAGE, (
        "python -m analysis evidence > docs/evidence.md"
    )


def test_the_command_writes_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evidence"]) == 0
    assert capsys.readouterr().out == PAGE


def test_the_mean_gaps_are_those_of_the_files() -> None:
    gaps = (LOGS["best"] - LOGS["last"]).groupby(LOGS["method"]).mean()
    for method, name in (("kd_ls", "KD+LS"), ("mlkd_ls", "MLKD+LS")):
        (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {name} |"))
        assert line.split(" | ")[2] == f"{gaps[method]:.2f}"
    assert len(LOGS) == 58
    assert f"| all | 58 | {(LOGS['best'] - LOGS['last']).mean():.2f} |" in PAGE


def test_cells_far_from_their_log_and_equal_to_it_are_counted() -> None:
    found = cells()
    gap = (found["best"] - found["value"]).round(2)
    assert f"{(gap.abs() >= 0.3).sum()} of {len(found)} runs whose cell" in PAGE
    assert PAGE.count("- MLKD+LS") == (gap == 0).sum() == 5


def test_the_same_cell_in_several_papers() -> None:
    assert (
        "| cifar100 | wrn_40_2 → mobilev2 | KD | 68.87 (SDD Table 1); 68.36 (LSKD Table 1) |"
        in PAGE
    )
