"""Test that a method has one name in tables, figures and report."""

import re
from pathlib import Path
from typing import Any

import pytest

from analysis import figures, names, points, published, report, tables
from analysis.schema import frame_of, method_of
from tests.analysis.standin import Standin
from tests.analysis.synthetic import run, runs

DATA = {"dataset": "fashion_mnist"}
PAIR = ("resnet20", "resnet8")
# Loss, scales, standardisation, and the name that a person reads.
METHODS = (
    ("kd", "[1]", False, "KD"),
    ("kd", "[1]", True, "KD+LS"),
    ("kd", "[1,2]", False, "SD-KD [1,2]"),
    ("kd", "[1,2,4]", True, "SD-KD+LS [1,2,4]"),
    ("dkd", "[1,2,4]", True, "SD-DKD+LS [1,2,4]"),
    ("nkd", "[1,4]", False, "SD-NKD [1,4]"),
    ("vanilla", "[1]", False, "student alone"),
    ("MyCompetitor", "[1]", False, "MyCompetitor"),
    ("MyCompetitor", "[1,2]", True, "SD-MyCompetitor+LS [1,2]"),
    ("my_loss", "[1,2]", True, "SD-my_loss+LS [1,2]"),
)


def rows_of_methods() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, (distiller, M, standardize, _) in enumerate(METHODS):
        teacher = "none" if distiller == "vanilla" else PAIR[0]
        rows += runs(teacher, PAIR[1], [70.0 + i, 70.4 + i], distiller=distiller, M=M,
                     standardize=standardize, epoch_s=9.0 + i, epochs_done=3, **DATA)  # fmt: skip
    return [row | {"name": f"run {i}"} for i, row in enumerate(rows)]


@pytest.mark.parametrize(("distiller", "M", "standardize", "name"), METHODS)
def test_names(distiller: str, M: str, standardize: bool, name: str) -> None:
    assert names.method_name(method_of(distiller, M, standardize), M) == name


def test_tables_and_figures_say_the_same_name() -> None:
    frame = frame_of(rows_of_methods())
    (overview,) = (table for table in tables.build(frame) if table.name.startswith("overview"))
    found, _ = points.points_of(frame, "best")
    expected = {name for *_, name in METHODS}
    assert set(overview.rows) == expected
    assert {point.setting for point in found} == expected


def test_a_report_says_no_other_name(tmp_path: Path) -> None:
    runs_of_store = Standin(rows_of_methods())
    drawn = figures.build(runs_of_store, tmp_path)
    assert {"learning_curves", "accuracy_by_scales", "gain_by_pair", "cost"} <= {
        figure.name for figure in drawn
    }
    path = tmp_path / "report.html"
    report.write(path, runs_of_store, tables.build(runs_of_store.frame), drawn)
    page = path.read_text()
    for *_, name in METHODS:
        assert f"<td>{name}</td>" in page, name  # of the table of all runs
    body = re.sub(r"<(script|style)\b.*?</\1>|<svg\b.*?</svg>", "", page, flags=re.DOTALL)
    read = re.sub(r"<[^>]*>", " ", body)
    for wrong in ("MYCOMPETITOR", "MyCompetitor_ls", "sd_kd", "kd_ls", "{1"):
        assert wrong not in read, wrong


def test_a_user_reads_the_scales_as_they_are_typed(tmp_path: Path) -> None:
    drawn = figures.build(Standin(rows_of_methods()), tmp_path)
    captions = {figure.name: figure.caption for figure in drawn}
    assert "with M=[1] and no standardisation" in captions["gain_by_pair"]
    assert not [name for name, caption in captions.items() if "{" in caption]


def test_every_published_loss_of_a_table_has_the_papers_name() -> None:
    unnamed = set()
    for number in published.numbers():
        if number.table.startswith(("SDD Table", "LSKD Table")):
            loss = number.method.removeprefix("sd_").removesuffix("_ls")
            unnamed |= set(loss.split("+")) - set(names.PAPERS_LOSSES) - {"teacher", "vanilla"}
    assert unnamed == set()


def test_a_run_of_an_unknown_method_says_so() -> None:
    frame = frame_of([run(*PAIR, 0, 70.0, **DATA)])
    frame["method"] = ""
    (overview,) = tables.build(frame)
    assert overview.rows == ("method not known",)


def test_a_number_has_its_noun() -> None:
    assert [names.counted(number, "new run") for number in range(3)] == [
        "0 new runs", "1 new run", "2 new runs",
    ]  # fmt: skip


def test_an_own_loss_of_a_published_name_has_a_row_of_its_own() -> None:
    made = runs(*PAIR, [70.0, 71.0], **DATA) + runs(*PAIR, [9.0], distiller="KD", **DATA)
    (overview,) = tables.build(frame_of(made))
    means = [overview.cells[row, overview.columns[0]].mean for row in ("KD", "KD (own)")]
    assert means == [70.5, 9.0]


def test_every_loss_has_the_year_of_its_paper() -> None:
    losses = [loss for of_year in names.BY_YEAR.values() for loss in of_year]
    assert sorted(losses) == sorted(names.PAPERS_LOSSES)
    assert list(names.BY_YEAR) == sorted(names.BY_YEAR)


def test_rows_stand_in_the_order_of_publication() -> None:
    ordered = [
        "teacher", "vanilla", "kd", "kd_ls", "sd_kd [16]", "sd_kd [1,2]", "sd_kd [1,16]",
        "sd_kd [1,2,4]", "sd_kd_ls [1,2]", "kd+crd", "fitnet", "at", "crd", "reviewkd", "dkd",
        "dkd_ls", "sd_dkd [1,2]", "dist", "nkd", "sd_nkd [2]", "kd_ls_batch", "Energy", "MSE",
        "MSE_ls",
    ]  # fmt: skip
    assert sorted(reversed(ordered), key=names.reading_order) == ordered


def test_a_table_has_its_rows_in_that_order() -> None:
    made = rows_of_methods() + runs(*PAIR, [71.0], distiller="dkd", features="crd", **DATA)
    made += runs(*PAIR, [71.0], distiller="features_only", features="at", **DATA)
    built = {table.name: table for table in tables.build(frame_of(made))}
    assert built["overview_fashion_mnist"].rows == (
        "student alone", "KD", "KD+LS", "SD-KD [1,2]", "SD-KD+LS [1,2,4]", "AT",
        "SD-DKD+LS [1,2,4]", "DKD+CRD", "SD-NKD [1,4]", "MyCompetitor", "SD-MyCompetitor+LS [1,2]",
        "SD-my_loss+LS [1,2]",
    )  # fmt: skip


def test_weights_and_scales_grow_down_a_table() -> None:
    made = [
        one
        for weight in (10.0, 0.5, 2.0)
        for one in runs(*PAIR, [70.0], M="[1,2]", complementary_weight=weight, **DATA)
    ]
    for M in ("[1,2]", "[2,16]", "[4]", "[16]", "[1]"):
        made += runs(*PAIR, [70.0], M=M, distiller="dkd", **DATA)
    built = {table.name: table for table in tables.build(frame_of(made))}
    assert built["weights_fashion_mnist_kd"].rows == ("weight 0.5", "weight 2", "weight 10")
    assert built["scales_fashion_mnist_dkd"].rows == (
        "M = [1]", "M = [4]", "M = [16]", "M = [1,2]", "M = [2,16]",
    )  # fmt: skip
