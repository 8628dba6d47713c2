"""Test the published numbers: they are those of the files, separately for each paper."""

import pandas as pd
import pytest

from analysis import published

REFERENCE = published.REFERENCE


def rows_of(name: str) -> pd.DataFrame:
    return pd.read_csv(REFERENCE / name, dtype=str, keep_default_na=False)


def test_every_row_of_the_file_is_a_number() -> None:
    rows = pd.concat([rows_of(name) for name in published.FILES])
    assert len(published.numbers()) == len(rows) == 918 + 74 + 190
    for number, row in zip(published.numbers(), rows.to_dict("records"), strict=True):
        assert number.value == float(row["value"])
        assert number.pair == row["teacher"] + "_" + row["student"]
        for name in (
            "table",
            "dataset",
            "teacher",
            "student",
            "method",
            "M",
            "beta",
            "variant",
            "metric",
            "flag",
        ):
            assert getattr(number, name) == row[name]
        assert number.source == row["source_note"]


def test_a_table_gives_its_own_numbers_in_the_order_of_print() -> None:
    rows = rows_of("published.csv")
    for table, metric in (
        ("SDD Table 2", "top1"),
        ("LSKD Table 3", "top5"),
        ("SDD Table 9", "ms_per_batch"),
    ):
        expected = rows[(rows.table == table) & (rows.metric == metric)]
        found = published.of_table(table, metric)
        assert [number.value for number in found] == list(expected.value.astype(float))
        assert {number.table for number in found} == {table}


def test_papers_print_different_baselines_and_both_are_kept() -> None:
    kd = {
        table: number.value
        for table in ("SDD Table 1", "LSKD Table 1")
        for number in published.of_table(table)
        if (number.pair, number.method) == ("wrn_40_2_mobilev2", "kd")
    }
    assert kd == {"SDD Table 1": 68.87, "LSKD Table 1": 68.36}


def test_an_unknown_table_names_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"no table 'SDD Table 10' is published; there are .*SDD Table 9"
    ):
        published.of_table("SDD Table 10")


def test_every_flag_has_a_meaning() -> None:
    assert {number.flag for number in published.numbers()} == {"", *published.FLAGS}


def test_the_readme_counts_the_flagged_rows() -> None:
    readme = (REFERENCE / "README.md").read_text(encoding="utf-8")
    counts = pd.concat([rows_of(name) for name in published.FILES]).flag.value_counts()
    for flag in published.FLAGS:
        (line,) = (line for line in readme.splitlines() if line.startswith(f"| `{flag}`"))
        assert line.endswith(f"| {counts[flag]} |")
    for name in (*published.FILES, "gains.csv"):
        assert f"`{name}` ({len(rows_of(name))} rows)" in readme


def test_a_gain_is_the_difference_of_two_published_numbers() -> None:
    values = {
        (n.table, n.pair, n.method): n.value for n in published.numbers() if n.metric == "top1"
    }
    assert len(published.gains()) > 100
    for (table, pair, method), gain in published.gains().items():
        base = (
            method.removeprefix("sd_") if method.startswith("sd_") else method.removesuffix("_ls")
        )
        difference = values[table, pair, method] - values[table, pair, base]
        assert gain.difference == pytest.approx(difference, abs=1e-6)
        assert gain.agrees == (abs(gain.printed - difference) < 0.005)


def test_nine_printed_gains_are_not_their_difference() -> None:
    wrong = {key: gain.printed for key, gain in published.gains().items() if not gain.agrees}
    assert len(wrong) == 9
    assert wrong["SDD Table 2", "resnet32x4_shufflev2", "sd_kd"] == 2.32


README_ROWS = "published_readmes.csv"


def test_every_number_of_a_readme_names_commit_and_line_and_is_flagged() -> None:
    rows = rows_of(README_ROWS)
    assert rows.source_note.str.fullmatch(r"[\w-]+/\w+@[0-9a-f]{7} README\.md:\d+(; .+)?").all()
    assert set(rows.flag) == {"readme", "other_settings"}
    # A number whose settings are not those of a recipe says why.
    assert rows[rows.flag == "other_settings"].source_note.str.contains("; ").all()


def test_the_numbers_of_the_newer_losses_on_the_pair_that_all_print() -> None:
    rows = rows_of(README_ROWS)
    pair = rows[(rows.teacher == "resnet32x4") & (rows.student == "resnet8x4")]
    found = {
        (row.table.split()[0], row.method): float(row.value)
        for row in pair.itertuples()
        if row.method not in ("teacher", "vanilla")
    }
    assert found == {
        ("TTM", "kd"): 73.33,
        ("TTM", "dist"): 76.31,
        ("TTM", "ttm"): 76.17,
        ("TTM", "wttm"): 76.06,
        ("DIST", "dist"): 76.31,
        ("LumiNet", "kd"): 73.33,
        ("LumiNet", "kd_ls_batch"): 77.50,
        ("SKD", "kd"): 74.75,
        ("SKD", "skd"): 78.33,
    }
