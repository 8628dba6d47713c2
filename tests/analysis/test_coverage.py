"""Test what the coverage of the published numbers counts."""

from pathlib import Path

import pytest

from analysis import coverage, published
from analysis.__main__ import main
from analysis.coverage import cover, lines, recipe_of
from analysis.schema import frame_of
from analysis.tables import build
from tests.analysis.store import make_store
from tests.analysis.synthetic import runs

ROOT = Path(__file__).parents[2]
VIT = "LSKD README ViT table"


def counts(text: str, name: str) -> list[int]:
    """Return the numbers of a row: cells, recipe, run, verdict, within, above, below."""
    (line,) = (line for line in text.splitlines() if line.startswith(name))
    return [int(word) for word in line.removeprefix(name).split()]


def test_without_runs_every_number_is_counted_with_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SDDLSKD_HOME", str(tmp_path))
    assert main(["coverage"]) == 0
    said = capsys.readouterr().out
    assert f"there is no {tmp_path / 'mlflow.db'}" in said
    assert counts(said, "SDD Table 3") == [16, 16, 0, 0, 0, 0, 0]
    assert counts(said, VIT) == [12, 4, 0, 0, 0, 0, 0]
    cells, recipes, *rest = counts(said, "all of published.csv")
    assert cells == 918
    lacking = [one for one in cover([]) if one.lacks]
    of_files = [one for one in lacking if one.number.file == "published.csv"]
    assert (recipes, rest) == (918 - len(of_files), [0] * 5)
    assert f"{len(lacking)} numbers without a recipe" in said
    assert "no student t2t_vit_7: student alone, KD+LS in LSKD README ViT table" in said


def test_runs_and_verdicts_are_those_of_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = runs("wrn_40_2", "vgg8", [73.9, 74.0, 74.1])
    rows += runs("wrn_40_2", "vgg8", [74.0], M="[1,2,4]")
    path = tmp_path / "mlflow.db"
    make_store(path, [{key: row[key] for key in row if key != "run_id"} for row in rows])
    assert main(["coverage", "--home", str(tmp_path)]) == 0
    # KD is 73.97 in the paper, and one run of SD-KD decides nothing.
    assert counts(capsys.readouterr().out, "SDD Table 1")[2:] == [2, 1, 1, 0, 0]


def test_a_number_counts_once_though_its_row_is_split() -> None:
    rows = runs("wrn_40_2", "vgg8", [73.9, 74.0]) + runs("wrn_40_2", "vgg8", [70.0], epochs=10)
    found = [one for one in cover(build(frame_of(rows))) if one.runs]
    assert [(one.number.table, one.number.method, one.runs) for one in found] == [
        ("SDD Table 1", "kd", 3)
    ]


def test_a_missing_recipe_network_and_data_set_are_named() -> None:
    number = published.of_table("SDD Table 1")[0]
    names = {"recipe": {"vanilla"}, "dataset": {"cifar100"}, "teacher": {"resnet32x4"},
             "student": {"mobilev2"}}  # fmt: skip
    reason = coverage.reason_without_recipe
    assert reason(number, names) == ""
    for group, wanted in (
        ("recipe", "no recipe vanilla"),
        ("dataset", "no data set cifar100"),
        ("teacher", "no teacher resnet32x4"),
        ("student", "no student mobilev2"),
    ):
        assert reason(number, {**names, group: set()}) == wanted


def test_without_the_configuration_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "CONF", ROOT / "no-such-folder")
    with pytest.raises(ValueError, match=r"no recipes in .*no-such-folder"):
        cover([])


def test_every_number_with_a_recipe_says_nothing() -> None:
    number = published.numbers()[0]
    assert list(lines([coverage.Cover(number, "", 0, "")]))[-1] == "Every number has a recipe."


def test_sums_of_methods_have_the_recipe_of_the_sum() -> None:
    assert [recipe_of(method) for method in ("sd_kd+crd", "kd_dot", "teacher", "at")] == [
        "sd_kd_crd",
        "dot",
        "vanilla",
        "at",
    ]
    assert [recipe_of(method) for method in ("kd_ls_batch", "kd_ls_scaled")] == [
        "luminet",
        "normkd",
    ]
