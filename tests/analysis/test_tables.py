"""Test the tables of runs with known numbers; the tests compute the cells in another way."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import render, stats, tables
from analysis.cells import Cell, Table
from analysis.points import points_of
from analysis.schema import frame_of, runs_of
from analysis.selection import GainOptions, _several_codes
from tests.analysis.synthetic import run, runs

PUBLISHED = pd.read_csv(
    Path(tables.__file__).parent / "reference" / "published.csv",
    dtype={"value": float},
    keep_default_na=False,
)
SHUFFLE, SMALL = ("resnet32x4", "shufflev1"), ("resnet32x4", "resnet8x4")
COLUMN, SMALL_COLUMN = "resnet32x4 → shufflev1", "resnet32x4 → resnet8x4"
KD, SD_KD = [74.0, 74.2, 74.3], [76.0, 76.5, 75.9]


def build(rows: list[dict[str, Any]], **options: Any) -> dict[str, Table]:
    built = tables.build(frame_of(rows), **options)
    assert len({table.name for table in built}) == len(built)
    return {table.name: table for table in built}


def sd_kd(**columns: Any) -> dict[str, Any]:
    return {"M": "[1,2,4]", **columns}


def only(
    rows: list[dict[str, Any]], table: str, row: str, column: str = COLUMN, **options: Any
) -> Cell:
    return build(rows, **options)[table].cells[row, column]


# Numbers


def test_a_cell_is_the_mean_and_sample_deviation_over_seeds() -> None:
    cell = only(runs(*SHUFFLE, KD), "sdd_table_2", "KD")
    assert cell.mean == pytest.approx(np.mean(KD))
    assert cell.std == pytest.approx(np.std(KD, ddof=1))
    assert (cell.n, cell.seeds, cell.planned, cell.troubles) == (3, [0, 1, 2], 3, ())


def test_one_seed_has_no_deviation() -> None:
    cell = only(runs(*SHUFFLE, [74.0]), "sdd_table_2", "KD")
    assert (cell.mean, cell.std, cell.n) == (74.0, None, 1)


def test_a_run_of_an_unknown_method_is_averaged_with_no_other_and_marked() -> None:
    rows = runs(*SHUFFLE, KD) + runs(*SHUFFLE, SD_KD, **sd_kd())
    lacking = run(*SHUFFLE, 9, 60.0) | {"config_hash": "lacking"}
    frame = frame_of([*rows, lacking])
    # The method is "" if MLflow lacks the parameter `standardize`.
    frame.loc[frame["config_hash"] == "lacking", "method"] = ""
    built = {table.name: table for table in tables.build(frame)}
    assert built["scales_cifar100_kd"].cells["M = [1]", COLUMN].seeds == [0, 1, 2]
    assert built["overview_cifar100"].cells["method not known", COLUMN].mean == 60.0


def test_any_name_of_a_data_set_makes_a_name_of_a_file() -> None:
    names = ["a/b", "a b", "../../x", 'x"><img src=q>', "d" * 300]
    built = build([each for name in names for each in runs("a", "b", [1.0, 2.0], dataset=name)])
    assert len(built) == len(names)
    assert all(re.fullmatch(r"overview_[A-Za-z0-9_.-]{1,100}", name) for name in built)


@pytest.mark.parametrize(
    ("table", "pairs"),
    [
        (
            "SDD Table 1",
            {
                "resnet32x4 → mobilev2",
                "wrn_40_2 → vgg8",
                "wrn_40_2 → mobilev2",
                "resnet50 → shufflev1",
            },
        ),
        ("SDD Table 2", None),
        ("SDD Table 5", None),
        ("SDD Table 3", {"resnet34 → resnet18"}),
        ("SDD Table 4", {"resnet50 → mobilev1"}),
        ("LSKD Table 1", None),
        ("LSKD Table 2", None),
        ("LSKD Table 3", {"resnet34 → resnet18", "resnet50 → mobilev1"}),
        ("LSKD Table 5", None),
    ],
)
def test_published_numbers_are_those_of_the_file(table: str, pairs: set[str] | None) -> None:
    rows = PUBLISHED[(PUBLISHED.table == table) & (PUBLISHED.metric == "top1")]
    first = rows[rows.method == "kd"].iloc[0]
    built = build(runs(first.teacher, first.student, [70.0], dataset=first.dataset))[
        table.lower().replace(" ", "_")
    ]
    shown = [cell.published.value for cell in built.cells.values() if cell.published]
    assert sorted(shown) == sorted(rows.value)
    if pairs is not None:
        assert set(built.columns) == pairs
    for row in rows.itertuples():
        matching = [
            cell
            for (_, column), cell in built.cells.items()
            if column == f"{row.teacher} → {row.student}"
            and cell.published
            and cell.published.method == row.method
        ]
        assert [cell.published.value for cell in matching if cell.published] == [row.value]


def test_newer_losses_have_the_tables_of_their_readmes() -> None:
    rows = runs("resnet32x4", "resnet8x4", [76.2, 76.4, 76.3], distiller="dist", temperature=4.0)
    rows += runs("resnet32x4", "resnet8x4", [78.0, 78.2], distiller="skd", temperature=4.0)
    rows += runs("resnet32x4", "resnet8x4", [77.4, 77.6], standardization="batch")
    built = build(rows)
    dist = built["dist_readme_cifar_100"].cells["DIST", SMALL_COLUMN]
    assert dist.published is not None
    assert (dist.published.value, dist.mean) == (76.31, pytest.approx(76.3))
    assert "readme: from the README of the authors' code" in dist.footnotes["published"][0]
    luminet = built["luminet_readme_cifar_100_identical"].cells["LumiNet", SMALL_COLUMN]
    assert luminet.published is not None
    assert (luminet.published.value, luminet.n) == (77.5, 2)
    skd = built["skd_readme_cifar_100"].cells["SKD", SMALL_COLUMN]
    assert skd.verdict == "not comparable"
    assert "the source's settings are not known" in skd.footnotes["verdict"][0]


def test_several_labels_have_a_table_of_their_map() -> None:
    rows = runs(*SMALL, [97.0, 97.5], dataset="voc", distiller="mld")
    for row, value in zip(rows, (61.0, 62.0), strict=True):
        row["mAP"] = value
    (table,) = tables.build(frame_of(rows), metric="mAP")
    assert table.quantity == "mAP (%), best epoch"
    assert table.cells["MLD", SMALL_COLUMN].mean == 61.5
    (without,) = tables.build(frame_of(runs(*SMALL, [97.0], dataset="voc")), metric="mAP")
    assert without.cells["KD", SMALL_COLUMN].mean is None


def test_each_paper_keeps_its_own_baseline() -> None:
    built = build(runs("wrn_40_2", "mobilev2", [69.0]))
    for table, value in (("sdd_table_1", 68.87), ("lskd_table_1", 68.36)):
        published = built[table].cells["KD", "wrn_40_2 → mobilev2"].published
        assert published is not None
        assert published.value == value


@pytest.mark.parametrize(("metric", "expected"), [("best", 74.0), ("last", 73.75), ("val", 73.5)])
def test_the_metric_says_which_number(metric: str, expected: float) -> None:
    rows = runs(*SHUFFLE, [74.0], val_fraction=0.1, test=73.5)
    assert only(rows, "sdd_table_2", "KD", metric=metric).mean == expected


def test_an_unknown_metric_names_those_there_are() -> None:
    with pytest.raises(ValueError, match="metric=top1 is not valid; give one of best, last, val"):
        tables.build(frame_of([]), metric="top1")


def test_no_runs_no_tables() -> None:
    assert build([]) == {}


def test_runs_without_held_out_images_have_no_val_number() -> None:
    cell = only(runs(*SHUFFLE, KD), "sdd_table_2", "KD", metric="val")
    assert (cell.mean, cell.troubles) == (None, ("3 without held-out images",))


def test_numbers_on_held_out_images_are_marked_and_not_compared() -> None:
    cell = only(runs(*SHUFFLE, KD, val_fraction=0.1), "sdd_table_2", "KD")
    assert "not on the test set" in cell.footnotes["ours"][0]
    assert cell.verdict == "not comparable"


# Runs of a cell


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("epochs", 10),
        ("batch_size", 128),
        ("lr", 0.2),
        ("temperature", 3.0),
        ("ce_weight", 0.7),
        ("kd_weight", 2.0),
        ("val_fraction", 0.1),
    ],
)
def test_runs_of_other_settings_are_rows_of_their_own(setting: str, value: float) -> None:
    other = runs(*SHUFFLE, [60.0, 60.1, 60.2], **{setting: value})
    table = build(runs(*SHUFFLE, KD) + other)["sdd_table_2"]
    split = {row: table.cells[row, COLUMN].mean for row in table.rows if row.startswith("KD, ")}
    assert sorted(filter(None, split.values())) == pytest.approx([60.1, np.mean(KD)])
    assert all(f"{setting}=" in row for row in split)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("knowledge", "consistent"), ("complementary_weight", 4.0), ("M", "[1,2]")],
)
def test_other_variants_of_the_method_are_not_the_papers_cell(setting: str, value: Any) -> None:
    rows = runs(*SHUFFLE, SD_KD, **sd_kd()) + runs(*SHUFFLE, [60.0], **sd_kd(**{setting: value}))
    assert only(rows, "sdd_table_2", "SD-KD").mean == pytest.approx(np.mean(SD_KD))


def test_similar_architectures_take_the_papers_two_scales() -> None:
    pair = {"dataset": "imagenet", "epochs": 100}
    rows = runs("resnet34", "resnet18", [71.4], M="[1,2]", **pair) + runs(
        "resnet34", "resnet18", [60.0], **sd_kd(**pair)
    )
    assert only(rows, "sdd_table_3", "SD-KD", "resnet34 → resnet18").mean == 71.4
    rows = [r for M in ("[1]", "[1,2]") for r in runs(*SMALL, KD, **sd_kd(M=M, knowledge="fusion"))]
    rows += [
        r
        for M in ("[1,2]", "[1,2,4]")
        for r in runs(*SMALL, KD, **sd_kd(M=M, knowledge="consistent"))
    ]
    table = build(rows)["knowledge_cifar100_kd"]
    assert table.cells["consistent", SMALL_COLUMN].verdict != "not comparable"


IMAGENET = {"dataset": "imagenet", "epochs": 100, "batch_size": 512, "lr": 0.2}
# The values of conf/adapted/imagenet/kd.yaml
ADAPTED = {"temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5}


def test_imagenet_stands_beside_the_papers_numbers() -> None:
    rows = runs("resnet34", "resnet18", [70.6, 70.7, 70.65], **ADAPTED, **IMAGENET)
    rows += runs("resnet34", "resnet18", [71.4, 71.5, 71.45], M="[1,2]", **IMAGENET)
    rows += runs("resnet50", "mobilev1", [72.2, 72.3, 72.2], **sd_kd(**IMAGENET))
    ls = {"standardize": True, "temperature": 2.0, "ce_weight": 0.5, "kd_weight": 9.0}
    rows += [
        run("resnet50", "mobilev1", seed, 72.1 + seed / 10, **IMAGENET)
        | ls
        | {"config_hash": f"ls{seed}"}
        for seed in range(3)
    ]
    built = build(rows)
    expected = {
        ("sdd_table_3", "KD", "resnet34 → resnet18"): 70.66,
        ("sdd_table_3", "SD-KD", "resnet34 → resnet18"): 71.44,
        ("sdd_table_4", "SD-KD", "resnet50 → mobilev1"): 72.24,
        ("lskd_table_3", "KD+LS", "resnet50 → mobilev1"): 72.18,
        ("lskd_table_3", "KD", "resnet34 → resnet18"): 71.03,
    }  # fmt: skip
    for (table, row, column), value in expected.items():
        cell = built[table].cells[row, column]
        assert (cell.n, cell.published.value if cell.published else None) == (3, value)
        assert cell.verdict in ("within", "above", "below")


@pytest.mark.parametrize(
    "other", [{"batch_size": 64}, {"lr": 0.1}, {"temperature": 4.0}, {"epochs": 30}]
)
def test_another_training_on_imagenet_is_not_comparable(other: dict[str, Any]) -> None:
    rows = runs("resnet34", "resnet18", [70.6, 70.7], **(ADAPTED | IMAGENET | other))
    cell = only(rows, "sdd_table_3", "KD", "resnet34 → resnet18")
    (name, value) = next(iter(other.items()))
    assert cell.verdict == "not comparable"
    assert any(
        f"{name}={value}".removesuffix(".0") in footnote for footnote in cell.footnotes["verdict"]
    )


def test_cub200_stands_beside_the_papers_numbers() -> None:
    cub = {"dataset": "cub200", "lr": 0.01}
    rows = runs("vgg13", "mobilev2", [54.0, 53.5, 54.2], **cub) + runs(
        "vgg13", "mobilev2", [59.5, 60.1, 59.9], **sd_kd(**cub)
    )
    rows += runs("vgg13", "vgg8", [67.0, 67.5, 67.4], **sd_kd(**cub | {"lr": 0.05}))
    table = build(rows)["sdd_table_5"]
    for row, column, value in (("KD", "vgg13 → mobilev2", 53.98),
                               ("SD-KD", "vgg13 → mobilev2", 59.80),
                               ("SD-KD", "vgg13 → vgg8", 67.32)):  # fmt: skip
        cell = table.cells[row, column]
        assert (cell.n, cell.published.value if cell.published else None) == (3, value)
        assert cell.verdict in ("within", "undecided")
    other = only(
        runs("vgg13", "vgg8", [67.0, 67.5], **sd_kd(**cub)), "sdd_table_5", "SD-KD", "vgg13 → vgg8"
    )
    assert other.verdict == "not comparable"


def test_values_tuned_per_pair_leave_a_row_whole_and_are_named() -> None:
    rows = runs(*SHUFFLE, KD, temperature=3.0) + runs("resnet32x4", "shufflev2", KD)
    table = build(rows)["sdd_table_2"]
    assert "KD" in table.rows
    assert any("differ between pairs: temperature" in note for note in table.notes)


def test_settings_that_no_column_shows_are_not_averaged() -> None:
    rows = [run(*SHUFFLE, seed, 70.0 + seed, settings_hash=f"beta{seed}") for seed in (6, 8)]
    table = build(rows)["sdd_table_2"]
    cells = {row: table.cells[row, COLUMN] for row in table.rows if "beta" in row}
    assert {row: cell.mean for row, cell in cells.items()} == {
        "KD, settings_hash=beta6": 76.0,
        "KD, settings_hash=beta8": 78.0,
    }


def test_a_run_with_cut_epochs_is_not_held_against_the_paper_nor_a_baseline() -> None:
    rows = [*runs(*SHUFFLE, KD, max_steps=200), *runs(*SHUFFLE, KD, **sd_kd())]
    table = build(rows)["sdd_table_2"]
    assert table.cells["KD", COLUMN].verdict == "not comparable"
    assert table.cells["SD-KD", COLUMN].gain is None


def test_kd_at_other_weights_is_not_held_against_the_papers_kd() -> None:
    assert only(runs(*SHUFFLE, KD), "sdd_table_2", "KD").verdict == "within"
    cell = only(
        runs(*SHUFFLE, KD, temperature=2.0, ce_weight=1.0, kd_weight=9.0), "sdd_table_2", "KD"
    )
    assert cell.verdict == "not comparable"
    assert any("temperature=2" in text for text in cell.footnotes["verdict"])


def test_teachers_of_several_accuracies_are_not_averaged() -> None:
    rows = [
        run(*SHUFFLE, seed, 74.0, teacher_top1=top1)
        for seed, top1 in enumerate((79.42, 79.42, 60.0))
    ]
    cell = only(rows, "sdd_table_2", "teacher")
    assert (cell.mean, cell.troubles) == (None, ("1 several teachers",))
    assert only(rows[:2], "sdd_table_2", "teacher").mean == 79.42


def test_a_run_that_two_sweeps_share_counts_once() -> None:
    row = run(*SHUFFLE, 0, 74.0)
    again = {
        **row,
        "run_id": "again",
        "sweep": "other",
        "best": 74.1,
        "started": pd.Timestamp("2026-01-02", tz="UTC"),
    }
    cell = only(
        [{**row, "started": pd.Timestamp("2026-01-01", tz="UTC")}, again], "sdd_table_2", "KD"
    )
    assert (cell.n, cell.planned, cell.mean) == (1, 1, 74.1)


def test_one_seed_in_two_configurations_is_marked_and_left_out() -> None:
    rows = [*runs(*SHUFFLE, KD), run(*SHUFFLE, 1, 60.0, config_hash="beta6")]
    cell = only(rows, "sdd_table_2", "KD")
    assert cell.values == {0: 74.0, 2: 74.3}
    assert cell.troubles == ("1 in several configurations",)
    assert "seed 1" in cell.footnotes["ours"][0]
    assert "beta6" in cell.footnotes["ours"][0]


def test_of_runs_that_differ_in_settings_the_loss_does_not_use_one_counts() -> None:
    rows = [
        r for weight in (1.0, 2.0, 4.0) for r in runs(*SHUFFLE, KD, complementary_weight=weight)
    ]
    cell = only(rows, "sdd_table_2", "KD")
    assert (cell.values, cell.troubles) == (dict(enumerate(KD)), ())


def test_superseded_runs_are_never_used() -> None:
    assert build(runs(*SHUFFLE, KD, superseded=True)) == {}
    assert (
        only(runs(*SHUFFLE, KD) + runs(*SHUFFLE, [1.0], superseded=True), "sdd_table_2", "KD").n
        == 3
    )


def test_imported_runs_stand_in_the_same_table_in_rows_of_their_own() -> None:
    table = build(runs(*SHUFFLE, KD) + runs(*SHUFFLE, [75.0], source="imported"))["sdd_table_2"]
    assert table.cells["KD", COLUMN].n == 3
    assert table.cells["KD, imported", COLUMN].mean == 75.0
    assert table.cells["KD", COLUMN].rank == "second"
    assert table.cells["KD, imported", COLUMN].rank == "best"


def test_settings_that_an_import_does_not_state_are_no_difference() -> None:
    unknown = {"source": "imported", "optimizer": "", "precision": "", "epochs": None, "lr": None}
    rows = runs(*SHUFFLE, KD) + runs(*SHUFFLE, [75.0], M="[1,2]", **unknown)
    table = build([{**row, "dataset": "fake"} for row in rows])["overview_fake"]
    assert table.cells["SD-KD [1,2], imported", COLUMN].footnotes["ours"] == (
        "no gain over KD: its runs differ in source",
    )
    rows = runs(*SHUFFLE, KD, source="imported") + runs(*SHUFFLE, [75.0], M="[1,2]", **unknown)
    table = build([{**row, "dataset": "fake"} for row in rows])["overview_fake"]
    cell = table.cells["SD-KD [1,2], imported", COLUMN]
    assert cell.gain is not None
    assert cell.footnotes["ours"] == ()


def test_imported_runs_without_a_seed_all_count_and_pair_with_none() -> None:
    rows = [run(*SHUFFLE, None, value, source="imported", config_hash=f"log{value}", **columns)
            for value, columns in ((74.0, {}), (74.4, {}), (76.0, sd_kd()))]  # fmt: skip
    table = build(rows, options=PAIRED)["sdd_table_2"]
    assert table.cells["KD, imported", COLUMN].mean == pytest.approx(74.2)
    assert table.cells["KD, imported", COLUMN].seeds == []
    cell = table.cells["SD-KD, imported", COLUMN]
    assert cell.gain is None
    assert "runs without seeds cannot be paired" in cell.footnotes["ours"][0]
    gain = build(rows)["sdd_table_2"].cells["SD-KD, imported", COLUMN].gain
    assert gain is not None  # the pooled test needs no common seeds
    assert (gain.difference.n, gain.difference.n_base) == (1, 2)


def test_failed_stopped_missing_and_running_runs_are_counted_with_their_commands() -> None:
    rows = [
        run(*SHUFFLE, 0, 74.0),
        run(*SHUFFLE, 1, None, status="FAILED"),
        run(*SHUFFLE, 2, None, status="KILLED"),
        run(*SHUFFLE, 3, None, status="MISSING", run_id=""),
        run(*SHUFFLE, 4, None, status="RUNNING"),
        run(*SHUFFLE, 5, math.nan),
    ]
    table = build(rows)["sdd_table_2"]
    cell = table.cells["KD", COLUMN]
    assert (cell.n, cell.planned, cell.mean) == (1, 6, 74.0)
    assert set(cell.troubles) == {
        "1 failed",
        "1 killed",
        "1 missing",
        "1 running",
        "1 without a number (NaN)",
    }
    assert table.commands == tuple(
        f"python -m sddlskd.train teacher=resnet32x4 student=shufflev1 seed={i}" for i in (1, 2, 3)
    )


def test_runs_that_halving_dropped_are_left_out_and_named() -> None:
    reason = "rank 2 of 2 at epoch 1: val/top1 9.00"
    hot = run(*SHUFFLE, 0, 9.0, status="PRUNED", reason=reason, temperature=16.0)
    elsewhere = run(*SHUFFLE, 0, 9.0, status="PRUNED", reason=reason, dataset="cub200")
    kept = run(*SHUFFLE, 1, 74.0)
    continued = {**kept, "run_id": "first", "status": "PRUNED", "best": 9.0, "reason": reason}
    table = build([hot, elsewhere, continued, kept])["sdd_table_2"]
    cell = table.cells["KD", COLUMN]
    assert (cell.n, cell.planned, cell.mean, cell.troubles) == (1, 1, 74.0, ())
    (note,) = [text for text in table.notes if "halving" in text]
    assert note == (
        "Left out because halving dropped them, so the means are over chosen runs: "
        f"{COLUMN}, KD, temperature=16, seed 0 ({reason})."
    )
    assert table.commands == ()
    assert build([hot]) == {}


def test_missing_runs_alone_have_a_table() -> None:
    table = build(runs(*SHUFFLE, [None, None], status="MISSING"))["sdd_table_2"]
    assert table.cells["KD", COLUMN].troubles == ("2 missing",)
    assert len(table.commands) == 2


def test_a_failed_run_that_was_run_again_has_a_note_and_no_command() -> None:
    row = run(*SHUFFLE, 0, 74.0)
    table = build([row, {**row, "run_id": "first", "status": "FAILED", "best": None}])[
        "sdd_table_2"
    ]
    assert table.cells["KD", COLUMN].troubles == ()
    assert table.commands == ()
    assert any(note.startswith("1 failed or stopped run") for note in table.notes)


# Comparisons


PAIRED = GainOptions("paired")


def test_gains_can_be_paired_by_seed_and_are_corrected_by_holm() -> None:
    rows = runs(*SHUFFLE, KD) + runs(*SHUFFLE, SD_KD, **sd_kd())
    rows += runs("resnet32x4", "shufflev2", [74.0, 74.5, 75.0]) + runs(
        "resnet32x4", "shufflev2", [76.0, 76.1, 77.0], **sd_kd()
    )
    table = build(rows, options=PAIRED)["sdd_table_2"]
    gains = {}
    for column, ours, base in (
        (COLUMN, SD_KD, KD),
        ("resnet32x4 → shufflev2", [76.0, 76.1, 77.0], [74.0, 74.5, 75.0]),
    ):
        gain = table.cells["SD-KD", column].gain
        differences = np.subtract(ours, base)
        half = 4.3027 * differences.std(ddof=1) / math.sqrt(3)
        t = differences.mean() / (differences.std(ddof=1) / math.sqrt(3))
        assert gain is not None
        assert gain.over == "KD"
        assert gain.difference.mean == pytest.approx(differences.mean())
        assert (gain.difference.low, gain.difference.high) == pytest.approx(
            (differences.mean() - half, differences.mean() + half), abs=1e-4
        )
        gains[1 - t / math.sqrt(t**2 + 2)] = gain.p_holm
    small, large = sorted(gains)
    assert gains[small] == pytest.approx(2 * small)
    assert gains[large] == pytest.approx(max(large, 2 * small))
    assert table.cells["KD", COLUMN].gain is None


def test_gains_of_a_sweep_that_added_seeds_hold_for_all_of_its_looks() -> None:
    ours, base = [76.0, 76.5, 76.3, 76.1], [74.0, 74.2, 73.9, 74.4, 90.0]
    rows = runs(*SHUFFLE, base, looks=8) + runs(*SHUFFLE, ours, looks=8, **sd_kd())
    table = build(rows)["sdd_table_2"]
    gain = table.cells["SD-KD", COLUMN].gain
    fixed = stats.welch(ours, base[:4])
    assert gain is not None
    assert gain.difference.test == "sequential"
    assert gain.difference.mean == pytest.approx(fixed.mean)
    assert gain.p_holm == pytest.approx(8 * (fixed.p or 0))
    assert gain.difference.half_width() == pytest.approx(fixed.half_width(1 - 0.05 / 8))
    assert gain.verdict == "better"
    assert any("for the 8 looks together" in note for note in table.notes)


def test_a_row_with_chosen_seeds_is_compared_with_its_own_seeds_of_such_a_baseline() -> None:
    base, ours = [74.0, 74.2, 73.9, 74.4, 74.6], [76.0, 76.5, 76.3]
    adaptive = only(
        runs(*SHUFFLE, base, looks=8) + runs(*SHUFFLE, ours, **sd_kd()), "sdd_table_2", "SD-KD"
    )
    chosen = only(
        runs(*SHUFFLE, base[:3]) + runs(*SHUFFLE, ours, **sd_kd()), "sdd_table_2", "SD-KD"
    )
    assert adaptive.gain is not None
    assert chosen.gain is not None
    assert adaptive.gain.difference.test == "pooled"
    assert adaptive.gain.difference.mean == pytest.approx(chosen.gain.difference.mean)
    assert adaptive.gain.difference.n_base == 3


def test_a_row_with_more_chosen_seeds_than_such_a_baseline_is_corrected_for_its_looks() -> None:
    gain = only(
        runs(*SHUFFLE, [74.0, 74.2, 73.9], looks=8)
        + runs(*SHUFFLE, [76.0, 76.5, 76.3, 76.1], **sd_kd()),
        "sdd_table_2",
        "SD-KD",
    ).gain
    assert gain is not None
    assert (gain.difference.test, gain.difference.looks, gain.difference.n) == ("sequential", 8, 3)


def test_a_mean_over_pairs_of_a_sweep_that_added_seeds_has_no_interval() -> None:
    rows = []
    for pair in (SHUFFLE, ("resnet32x4", "shufflev2")):
        rows += runs(*pair, [74.0, 74.2, 73.9], looks=8)
        rows += runs(*pair, [76.0, 76.5, 76.3], looks=8, **sd_kd())
    found = build(rows)["sdd_table_2"].aggregates["SD-KD"]
    assert found.gain == pytest.approx(76.2667 - 74.0333, abs=1e-3)
    assert (found.low, found.high) == (None, None)


def test_a_mean_over_pairs_is_that_of_gains_over_different_seeds_of_one_student_alone() -> None:
    alone = runs("none", "shufflev1", [70.0, 71.0, 72.5, 64.0], looks=8, distiller="vanilla")
    rows = alone + runs(*SHUFFLE, [74.0, 75.0, 76.5])
    rows += runs("vgg13", "shufflev1", [74.0, 75.0, 76.5, 68.0])
    table = build([row | {"dataset": "digits"} for row in rows])["overview_digits"]
    gains = [cell.gain.difference for cell in table.cells.values() if cell.gain]
    assert [(gain.test, gain.n_base) for gain in gains] == [("pooled", 3), ("pooled", 4)]
    assert table.aggregates["KD"].gain == pytest.approx(np.mean([gain.mean for gain in gains]))


def test_a_single_seed_has_a_difference_and_no_interval() -> None:
    gain = only(
        [run(*SHUFFLE, 0, 74.0), run(*SHUFFLE, 0, 76.0, **sd_kd())], "sdd_table_2", "SD-KD"
    ).gain
    assert gain is not None
    assert (gain.difference.mean, gain.difference.n, gain.difference.low) == (2.0, 1, None)
    assert (gain.p_holm, gain.verdict) == (None, "")


def test_seeds_of_one_side_alone_are_left_out_and_said() -> None:
    rows = runs(*SHUFFLE, KD) + runs(*SHUFFLE, SD_KD[:2], **sd_kd())
    cell = only(rows, "sdd_table_2", "SD-KD", options=PAIRED)
    assert cell.gain is not None
    assert cell.gain.difference.mean == pytest.approx(((76.0 - 74.0) + (76.5 - 74.2)) / 2)
    assert cell.footnotes["gain"] == ("seeds that only one of the two rows has are left out: 1",)


def test_no_gain_over_a_baseline_of_another_budget() -> None:
    cell = only(
        runs(*SHUFFLE, KD, epochs=10) + runs(*SHUFFLE, SD_KD, **sd_kd()), "sdd_table_2", "SD-KD"
    )
    assert cell.gain is None
    assert "no gain over KD" in cell.footnotes["ours"][0]


def test_a_baseline_at_several_temperatures_is_the_one_at_this_temperature() -> None:
    rows = (
        runs(*SHUFFLE, KD)
        + runs(*SHUFFLE, [70.0, 70.1, 70.5], temperature=2.0)
        + runs(*SHUFFLE, SD_KD, **sd_kd())
    )
    gain = only(rows, "sdd_table_2", "SD-KD").gain
    assert gain is not None
    assert (gain.over, gain.difference.mean) == (
        "KD, temperature=4",
        pytest.approx(np.mean(np.subtract(SD_KD, KD))),
    )


def test_a_baseline_of_several_settings_is_the_one_with_those_of_the_row() -> None:
    def clipped(norm: str) -> dict[str, str]:
        details = json.dumps({"optimizer.clip_norm": norm})
        return {"details": details, "settings_hash": norm, "run_id": norm, "config_hash": norm}

    def made(top1: float, norm: str, **columns: Any) -> dict[str, Any]:
        hashes = {"run_id": f"{top1}", "config_hash": f"{top1}", "dataset": "digits"}
        return run(*SHUFFLE, 0, top1, **{**clipped(norm), **hashes, **columns})

    rows = [made(70.0, "40"), made(71.0, "None"), made(72.0, "40", M="[1,2]")]
    rows += [made(73.0, "None", M="[1,2]"), made(74.0, "None", standardize=True)]
    over = {
        "KD+LS": "KD, optimizer.clip_norm=null",
        "SD-KD [1,2], optimizer.clip_norm=40": "KD, optimizer.clip_norm=40",
        "SD-KD [1,2], optimizer.clip_norm=null": "KD, optimizer.clip_norm=null",
    }
    overview = build(rows)["overview_digits"]
    assert gains_of(overview, COLUMN) == over
    for chosen in ("KD, optimizer.clip_norm=null", "KD, optimizer.clip_norm=None"):
        found = build(rows, options=GainOptions(baseline=chosen))["overview_digits"]
        assert found.baselines == {"KD, optimizer.clip_norm=null"}
        assert set(found.rows) - gains_of(found, COLUMN).keys() == found.baselines
    (cell,) = (
        table.cells["SD-KD [1,2]", COLUMN]
        for table in [build([*rows[:2], made(72.0, "7", M="[1,2]")])["overview_digits"]]
    )
    assert "its runs differ in optimizer.clip_norm" in cell.footnotes["ours"][0]


def test_versions_of_own_code_are_rows_of_their_own() -> None:
    own = {"distiller": "mine", "dataset": "digits"}
    rows = runs(*SHUFFLE, [70.0, 70.2], own_code="my:11111111", **own)
    rows += runs(*SHUFFLE, [80.0], own_code="my:22222222", config_hash="edited", **own)
    rows += [run(*SHUFFLE, 3, None, status="MISSING", **own)]
    table = build(rows[:2] + rows[3:])["overview_digits"]
    assert table.rows == ("mine",)  # nothing is known of the code of a run that never started
    table = build(rows)["overview_digits"]
    means = {row: table.cells[row, COLUMN].mean for row in table.rows}
    assert means["mine, own_code=my:11111111"] == pytest.approx(70.1)
    assert means["mine, own_code=my:22222222"] == 80.0
    assert any(note.startswith("own_code: ") for note in table.notes)
    rows += runs(*SHUFFLE, [81.0], own_code="my:22222222", M="[1,2]", **own)
    rows += runs(*SHUFFLE, [82.0], dataset="digits")
    labels = build(rows)["overview_digits"].rows
    assert {"KD", "SD-mine [1,2], own_code=my:22222222"} <= set(labels)
    found, _ = points_of(frame_of(rows), "best")
    lines = {point.run.M: point.line for point in found if point.mean in (80.0, 81.0)}
    assert lines == dict.fromkeys(("[1]", "[1,2]"), "mine, own_code=my:22222222")


def test_a_run_with_more_files_of_ones_own_has_no_other_version() -> None:
    def differ(*codes: str) -> bool:
        rows = [row for code in codes for row in runs(*SHUFFLE, [70.0], own_code=code)]
        return _several_codes(runs_of(frame_of(rows)))

    assert not differ("loss:11111111", "loss:11111111 net:33333333", "")
    assert differ("loss:11111111", "loss:22222222 net:33333333")


def test_lskd_gains_are_over_the_method_without_standardisation() -> None:
    rows = runs(*SMALL, [73.0, 73.5]) + runs(*SMALL, [76.5, 76.6], standardize=True)
    cell = only(rows, "lskd_table_2", "KD+LS", SMALL_COLUMN)
    assert cell.gain is not None
    assert (cell.gain.over, cell.gain.difference.mean) == ("KD", pytest.approx(3.3))
    assert cell.published_gain is not None
    assert cell.published_gain.difference == 3.29


def test_a_printed_gain_that_is_not_the_difference_is_recomputed_and_said() -> None:
    cell = only(
        runs("resnet32x4", "shufflev2", [76.0], **sd_kd()),
        "sdd_table_2",
        "SD-KD",
        "resnet32x4 → shufflev2",
    )
    assert cell.published_gain is not None
    assert cell.published_gain.difference == 2.22
    assert "+2.32" in cell.footnotes["published"][0]


def test_flagged_numbers_have_a_footnote_that_says_what_the_flag_means() -> None:
    table = build(runs(*SMALL, [73.0]) + runs(*SMALL, [76.0], M="[1,2]"))["scales_cifar100_kd"]
    (footnote,) = table.cells["M = [1,2]", SMALL_COLUMN].footnotes["published"]
    assert "two sources of the same authors" in footnote
    assert "75.63" in footnote
    flagged = PUBLISHED[(PUBLISHED.table == "SDD Table 2") & (PUBLISHED.flag != "")]
    cells = build(runs(*SHUFFLE, [74.0]))["sdd_table_2"].cells.values()
    assert sum("suspect" in "".join(cell.footnotes["published"]) for cell in cells) == len(flagged)


def test_best_and_second_are_marked_with_ties_as_shown() -> None:
    rows = runs(*SHUFFLE, [74.001]) + runs(*SHUFFLE, [76.001], **sd_kd())
    rows += runs(*SHUFFLE, [75.999], distiller="dkd") + runs(*SHUFFLE, [70.0], distiller="nkd")
    table = build(rows)["sdd_table_2"]
    ranks = {row: table.cells[row, COLUMN].rank for row in ("KD", "DKD", "NKD", "SD-KD")}
    assert ranks == {"KD": "second", "DKD": "best", "NKD": "", "SD-KD": "best"}


def test_the_best_of_a_column_is_bold_and_a_row_of_another_budget_says_so() -> None:
    rows = (
        runs(*SHUFFLE, [74.0])
        + runs(*SHUFFLE, [76.0], **sd_kd())
        + runs(*SHUFFLE, [90.0], distiller="dkd", epochs=480)
    )
    table = build(rows)["sdd_table_2"]
    cells = [table.cells[row, COLUMN] for row in ("KD", "SD-KD", "DKD")]
    assert [cell.rank for cell in cells] == ["", "second", "best"]
    assert [len(cell.footnotes["ours"]) for cell in cells] == [0, 0, 2]
    no_gain, otherwise = cells[2].footnotes["ours"]
    assert no_gain.startswith("no gain over KD: its runs differ")
    assert otherwise.endswith("epochs=480 instead of 240")


def test_accuracies_on_held_out_images_are_not_ranked_with_those_on_the_test_set() -> None:
    rows = runs(*SHUFFLE, [74.0]) + runs(*SHUFFLE, [76.0], **sd_kd())
    rows += runs(*SHUFFLE, [90.0], distiller="dkd", val_fraction=0.1)
    table = build(rows)["sdd_table_2"]
    ranks = [table.cells[row, COLUMN].rank for row in ("KD", "SD-KD", "DKD")]
    assert ranks == ["second", "best", ""]
    assert any("rows of the same val_fraction" in note for note in table.notes)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([74.0, 74.1, 74.2], "within"),  # the published number is 74.07
        ([75.0, 75.1, 75.2], "above"),
        ([73.0, 73.1, 73.2], "below"),
        ([74.0], "undecided"),
        ([73.0, 74.0, 75.0], "undecided"),
    ],
)
def test_verdicts_on_published_numbers(values: list[float], expected: str) -> None:
    assert only(runs(*SHUFFLE, values), "sdd_table_2", "KD").verdict == expected


@pytest.mark.parametrize("settings_", [{"epochs": 2}, {"lr": 0.05}, {"batch_size": 128}])
def test_runs_of_another_protocol_have_no_verdict(settings_: dict[str, Any]) -> None:
    cell = only(runs(*SHUFFLE, KD, **settings_), "sdd_table_2", "KD")
    assert cell.verdict == "not comparable"
    assert next(iter(settings_)) in cell.footnotes["verdict"][0]


@pytest.mark.parametrize(
    ("method", "row", "epochs", "comparable"),
    [
        ("mlkd", "MLKD, imported", 240, True),
        ("mlkd", "MLKD, imported", 480, False),
        ("mlkd_ls", "MLKD+LS, imported", 480, True),
        ("mlkd_ls", "MLKD+LS, imported", 240, False),
    ],
)
def test_mlkd_has_epochs_of_its_own(method: str, row: str, epochs: int, comparable: bool) -> None:
    rows = runs(
        *SMALL,
        [77.0, 77.1, 77.2],
        method=method,
        distiller="mlkd",
        source="imported",
        epochs=epochs,
        lr=0.025,
    )
    verdict = only(rows, "lskd_table_2", row, SMALL_COLUMN).verdict
    assert (verdict != "not comparable") == comparable


@pytest.mark.parametrize("metric", ["last", "val"])
def test_only_the_best_epoch_is_compared_with_the_papers(metric: str) -> None:
    table = build(
        runs(*SHUFFLE, KD, test=74.0, val_fraction=0.1 if metric == "val" else 0.0), metric=metric
    )["sdd_table_2"]
    assert table.cells["KD", COLUMN].verdict == "not comparable"
    assert any("0.3 points above the last" in note for note in table.notes)


def test_the_notes_state_the_budget_of_the_students() -> None:
    small = {"dataset": "digits", "epochs": 5, "train_fraction": 0.1}
    students = runs(*SMALL, KD, **small) + runs(*SMALL, SD_KD, **small, **sd_kd())
    teacher = [run("none", SMALL[0], 0, 79.0, dataset="digits", epochs=20, distiller="vanilla")]
    stated = "Settings of all students: epochs=5, train_fraction=0.1."
    assert stated in build(students + teacher)["overview_digits"].notes
    known = [{**one, "teacher_top1": 79.0} for one in students]
    assert stated in build(known)["overview_digits"].notes  # the teacher has a row
    other = runs("none", SMALL[1], [60.0], **small | {"epochs": 9}, distiller="vanilla")
    notes = build(students + other)["overview_digits"].notes
    assert "Settings of all students: train_fraction=0.1." in notes


def test_the_notes_name_weights_in_which_a_row_differs_from_its_baseline() -> None:
    alike = runs(*SMALL, KD, dataset="digits", ce_weight=0.1)
    alike += runs(*SMALL, SD_KD, **sd_kd(), dataset="digits", ce_weight=0.1)
    assert "Other settings differ" not in " ".join(build(alike)["overview_digits"].notes)
    for row in alike[len(KD) :]:
        row["ce_weight"] = 1.0
    notes = build(alike)["overview_digits"].notes
    assert "Other settings differ, too: SD-KD [1,2,4] and KD in ce_weight (1 and 0.1)." in notes
    own = runs(*SMALL, SD_KD, dataset="digits", distiller="mine", ce_weight=1.0, kd_weight=9.0)
    over_kd = GainOptions(baseline="kd")
    notes = build(alike[: len(KD)] + own, options=over_kd)["overview_digits"].notes
    assert (
        "Other settings differ, too: mine and KD in ce_weight (1 and 0.1), kd_weight"
        in " ".join(notes)
    )


@pytest.mark.parametrize(
    ("p", "shown"),
    [
        (0.05011, "0.0501"),
        (0.2, "0.20"),
        (0.04996, "0.0500"),
        (0.0031, "0.003"),
        (0.0004, "<0.001"),
    ],
)
def test_the_notes_tell_a_p_value_from_zero_and_from_the_threshold(
    p: float, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = stats.Spread(std=1.0, df=4, bartlett=p)
    monkeypatch.setattr("analysis.notes.spread_beside", lambda *arguments: spread)
    notes = build(runs(*SHUFFLE, KD) + runs(*SHUFFLE, SD_KD, **sd_kd()))["sdd_table_2"].notes
    assert f"Bartlett's p {shown})" in " ".join(notes)


@pytest.mark.parametrize(
    ("base", "hangs"),
    # Bartlett's p is 0.075, and p of the paired test is 0.078 and 0.044.
    [([70.0, 72.6, 71.0], True), ([71.0, 70.0, 72.6], False)],
)
def test_a_verdict_that_the_paired_test_would_not_give_is_named(
    base: list[float], hangs: bool
) -> None:
    table = build(runs(*SHUFFLE, base) + runs(*SHUFFLE, [74.0, 73.8, 74.3], **sd_kd()))[
        "sdd_table_2"
    ]
    gain = table.cells["SD-KD", COLUMN].gain
    assert gain is not None
    assert gain.verdict == "better"
    told = [note for note in table.notes if "Paired, the gain of SD-KD has p 0.0" in note]
    assert len(told) == hangs


def test_the_notes_define_the_verdict_and_name_tests_and_metric() -> None:
    table = build(runs(*SHUFFLE, KD) + runs(*SHUFFLE, SD_KD, **sd_kd()), sweep="pilot")[
        "sdd_table_2"
    ]
    notes = " ".join(table.notes)
    for text in (
        "Runs of pilot",
        "best epoch",
        "0.3 points",
        "95 % t prediction interval",
        "the rows of a column share",
        "4 degrees of freedom",
        "Bartlett's p",
        "Equivalent: within ±0.3",
        "A gain below about ",
        " may be chance alone",
        "Holm",
        "SDD Table 2",
    ):
        assert text in notes


# The tables


def test_scales() -> None:
    rows = [r for M, top1 in (("[1]", 74.0), ("[1,2]", 75.0), ("[1,4]", 75.5), ("[1,2,4]", 76.0))
            for pair in (SHUFFLE, SMALL) for r in runs(*pair, [top1, top1 + 0.2], M=M)]  # fmt: skip
    table = build(rows)["scales_cifar100_kd"]
    assert table.rows == ("M = [1]", "M = [1,2]", "M = [1,4]", "M = [1,2,4]")
    for row in PUBLISHED[PUBLISHED.table == "SDD Table 7"].itertuples():
        cell = table.cells[f"M = {row.M}", f"{row.teacher} → {row.student}"]
        assert cell.published is not None
        assert cell.published.value == row.value
    assert table.cells["M = [1,4]", COLUMN].mean == pytest.approx(75.6)
    assert table.cells["M = [1,4]", COLUMN].rank == "second"


def test_scales_are_shown_only_where_nothing_else_differs() -> None:
    rows = runs(*SHUFFLE, KD) + runs(*SHUFFLE, SD_KD, **sd_kd(kd_weight=5.0))
    assert "scales_cifar100_kd" not in build(rows)


def test_scales_take_the_papers_weight_where_several_were_run() -> None:
    rows = (
        runs(*SHUFFLE, KD)
        + runs(*SHUFFLE, SD_KD, **sd_kd())
        + runs(*SHUFFLE, [70.0], **sd_kd(complementary_weight=8.0))
    )
    assert only(rows, "scales_cifar100_kd", "M = [1,2,4]").mean == pytest.approx(np.mean(SD_KD))


def test_knowledge() -> None:
    rows = runs(*SHUFFLE, KD)
    for i, knowledge in enumerate(("consistent", "complementary", "fusion")):
        rows += runs(*SHUFFLE, [75.0 + i, 75.1 + i, 75.3 + i], **sd_kd(knowledge=knowledge))
    table = build(rows)["knowledge_cifar100_kd"]
    assert table.rows == ("none (KD)", "consistent", "complementary", "fusion")
    for row in PUBLISHED[PUBLISHED.table == "SDD Table 6"].itertuples():
        label = "none (KD)" if row.variant == "none" else row.variant
        cell = table.cells[label, f"{row.teacher} → {row.student}"]
        assert cell.published is not None
        assert cell.published.value == row.value
    gain = table.cells["fusion", COLUMN].gain
    assert gain is not None
    assert gain.difference.mean == pytest.approx(77.1333 - np.mean(KD), abs=1e-3)


def test_weights() -> None:
    rows = [
        r
        for w in (1.0, 2.0, 8.0)
        for r in runs(*SHUFFLE, [75.0 + w, 75.3 + w], **sd_kd(complementary_weight=w))
    ]
    table = build(rows)["weights_cifar100_kd"]
    for row in PUBLISHED[PUBLISHED.table == "SDD Table 8"].itertuples():
        cell = table.cells[f"weight {row.beta}", COLUMN]
        assert cell.published is not None
        assert cell.published.value == row.value
    assert table.cells["weight 8", COLUMN].mean == pytest.approx(83.15)
    gain = table.cells["weight 8", COLUMN].gain
    assert gain is not None
    assert (gain.over, gain.difference.mean) == ("weight 1", pytest.approx(7))


def test_time_is_of_runs_alone_on_the_machine_and_machines_are_not_mixed() -> None:
    rows = [
        run(*SMALL, 0, 73.0, images_per_s=6400.0, group_size=1, environment="H200"),
        run(*SMALL, 1, 73.0, images_per_s=5120.0, group_size=1, environment="H200"),
        run(*SMALL, 2, 73.0, images_per_s=640.0, group_size=4, environment="H200"),
        run(*SMALL, 3, 73.0, images_per_s=64.0, group_size=1, environment="2 CPUs"),
    ]
    table = build(rows)["time_cifar100"]
    cell = table.cells["KD, environment=H200", SMALL_COLUMN]
    assert cell.mean == pytest.approx((1000 * 64 / 6400 + 1000 * 64 / 5120) / 2)
    assert (cell.n, cell.troubles, cell.verdict) == (
        2,
        ("1 trained side by side",),
        "not comparable",
    )
    assert table.cells["KD, environment=2 CPUs", SMALL_COLUMN].mean == pytest.approx(1000)
    printed = {c.published.method: c.published.value for c in table.cells.values() if c.published}
    expected = PUBLISHED[PUBLISHED.table == "SDD Table 9"]
    assert printed == dict(zip(expected.method, expected.value, strict=True))


def test_no_table_of_times_if_only_students_alone_trained_alone() -> None:
    timed = {"images_per_s": 6400.0, "dataset": "digits"}
    rows = [run(*SMALL, 0, 73.0, group_size=2, **timed)]
    rows += [run("none", SMALL[1], 0, 70.0, group_size=1, distiller="vanilla", **timed)]
    assert "time_digits" not in build(rows)
    assert "time_digits" in build([*rows, run(*SMALL, 1, 73.0, group_size=1, **timed)])
    # One method of two says nothing.
    grouped = run(*SMALL, 1, 73.0, M="[1,2]", group_size=2, **timed)
    alone = run(*SMALL, 2, 73.0, group_size=1, **timed)
    assert "time_digits" not in build([grouped, alone])


def test_times_of_other_precisions_compilations_and_teacher_caches_are_not_averaged() -> None:
    options: list[dict[str, Any]] = [
        *({"precision": "bf16"}, {"precision": "fp32"}, {"precision": "fp32", "compile": True}),
        {"precision": "fp32", "teacher_cache": "/cache"},
    ]
    rows = [
        run(
            *SMALL,
            seed,
            73.0,
            images_per_s=1000.0 * (1 + i),
            group_size=1,
            environment="H200",
            **option,
        )
        for i, option in enumerate(options)
        for seed in (0, 1)
    ]
    cells = build(rows)["time_cifar100"].cells.values()
    assert sorted((cell.mean, cell.n) for cell in cells if cell.n) == [
        (16, 2),
        (64 / 3, 2),
        (32, 2),
        (64, 2),
    ]


def test_no_gain_over_a_baseline_of_another_precision() -> None:
    rows = runs(*SHUFFLE, KD, precision="fp32") + runs(*SHUFFLE, SD_KD, **sd_kd(precision="bf16"))
    assert only(rows, "sdd_table_2", "SD-KD").gain is None


def test_the_fastest_is_best() -> None:
    rows = [run(*SMALL, 0, 73.0, images_per_s=6400.0, group_size=1)]
    rows += [run(*SMALL, 0, 76.0, images_per_s=3200.0, group_size=1, M="[1,2]")]
    table = build(rows)["time_cifar100"]
    assert [table.cells[row, SMALL_COLUMN].rank for row in ("KD", "SD-KD")] == ["best", "second"]


def test_the_seed_suite_has_six_pairs_and_the_parts_numbers_in_rows_of_their_own() -> None:
    rows = [r for M in ("[1]", "[1,2]", "[1,2,4]")
            for r in runs(*SMALL, [76.0, 76.4], M=M, standardize=True, ce_weight=1.0)]  # fmt: skip
    built = build(rows)
    table = built["seed_suite"]
    assert "scales_cifar100_kd_ls" not in built
    assert len(table.columns) == 6
    assert table.cells["M = [1,2]", SMALL_COLUMN].mean == pytest.approx(76.2)
    assert table.cells["M = [1,2]", SMALL_COLUMN].published is None
    parts = {
        (method, column): cell.published.value
        for method in ("KD+LS", "SD-KD")
        for column in table.columns
        if (cell := table.cells[f"{method}, of the papers", column]).published
    }
    assert parts["KD+LS", SMALL_COLUMN] == 76.62
    assert parts["SD-KD", SMALL_COLUMN] == 76.63
    assert len(parts) == 2 + 6


def test_the_seed_suites_global_runs_are_not_lskds() -> None:
    assert "lskd_table_2" not in build(runs(*SMALL, [76.0], standardize=True, ce_weight=1.0))


def test_teacher_and_student_alone_have_rows_in_the_columns_of_their_pairs() -> None:
    rows = runs(*SHUFFLE, KD, teacher_top1=79.42) + runs(
        "none", "shufflev1", [70.0, 71.0], distiller="vanilla"
    )
    table = build(rows)["sdd_table_2"]
    assert (table.cells["teacher", COLUMN].mean, table.cells["teacher", COLUMN].n) == (79.42, 1)
    assert table.cells["teacher", COLUMN].rank == table.cells["teacher", COLUMN].verdict == ""
    for column in (COLUMN, "wrn_40_2 → shufflev1"):
        assert table.cells["student alone", column].mean == 70.5


def test_students_alone_make_no_paper_table() -> None:
    table = build(runs("none", "shufflev1", [70.0], distiller="vanilla"))["overview_cifar100"]
    assert table.cells["student alone", "shufflev1 alone"].mean == 70.0


def test_any_data_set_gets_an_overview() -> None:
    rows = runs("resnet14", "resnet8", KD, dataset="fashion_mnist") + runs(
        "none", "resnet8", [70.0], dataset="fashion_mnist", distiller="vanilla"
    )
    rows += runs("resnet14", "resnet8", SD_KD, dataset="fashion_mnist", standardize=True, **sd_kd())
    table = build(rows)["overview_fashion_mnist"]
    column = "resnet14 → resnet8"
    assert table.rows == ("student alone", "KD", "SD-KD+LS [1,2,4]")
    assert [table.cells[row, column].mean for row in table.rows] == pytest.approx(
        [70.0, np.mean(KD), np.mean(SD_KD)]
    )


def test_the_overview_has_the_pairs_that_no_other_table_shows() -> None:
    built = build(runs(*SHUFFLE, KD) + runs("vgg13", "shufflev1", KD))
    assert built["overview_cifar100"].columns == ("vgg13 → shufflev1",)
    assert "overview_cifar100" not in build(runs(*SHUFFLE, KD))


def test_every_run_stands_in_some_table() -> None:
    rows = runs(*SHUFFLE, KD) + runs(
        "vgg13", "wrn_16_2", [70.0], knowledge="consistent", **sd_kd(M="[2]")
    )
    rows += runs("a", "b", [None], dataset="cub200", status="FAILED") + runs(
        "none", "c", [1.0], distiller="vanilla"
    )
    cells = [cell for table in build(rows).values() for cell in table.cells.values()]
    assert {value for cell in cells for value in cell.values.values()} == {*KD, 70.0, 1.0}
    assert [cell.troubles for cell in cells if cell.troubles] == [("1 failed",)]


# Properties

some_runs = st.lists(
    st.builds(
        lambda student, M, standardize, seed, top1, epochs, status: run(
            "resnet32x4", student, seed, None if status != "FINISHED" else top1, M=M,
            standardize=standardize,
            epochs=epochs, status=status, config_hash=f"{student}{M}{standardize}{seed}{epochs}",
        ),
        st.sampled_from(["shufflev1", "resnet8x4"]),
        st.sampled_from(["[1]", "[1,2]", "[1,2,4]"]),
        st.booleans(),
        st.integers(0, 2),
        st.integers(7000, 7900).map(lambda hundredths: hundredths / 100),
        st.sampled_from([240, 10]),
        st.sampled_from(["FINISHED", "FINISHED", "FAILED", "MISSING"]),
    ),
    max_size=14,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(some_runs, st.randoms(use_true_random=False))
def test_the_order_of_the_runs_changes_nothing(rows: list[dict[str, Any]], random: Any) -> None:
    shuffled = list(rows)
    random.shuffle(shuffled)
    assert tables.build(frame_of(rows)) == tables.build(frame_of(shuffled))


@settings(max_examples=25, deadline=None)
@given(some_runs)
def test_best_is_best_and_counts_add_up(rows: list[dict[str, Any]]) -> None:
    for table in tables.build(frame_of(rows)):
        for cell in table.cells.values():
            assert cell.n <= cell.planned
            assert cell.n == cell.planned or cell.troubles
            assert (cell.mean is None) == (cell.n == 0)
        for column in table.columns:
            ranked = [c for row in table.rows if (c := table.cells[row, column]).n]
            means = [round(c.mean, 2) for c in ranked if c.mean is not None]
            for cell, mean in zip(ranked, means, strict=True):
                assert (cell.rank == "best") == (mean == max(means) and len(means) > 1)
    built = {table.name: table for table in tables.build(frame_of(rows))}
    if "seed_suite" in built:
        finished = {
            row["config_hash"] for row in rows if row["status"] == "FINISHED" and row["standardize"]
        }
        assert sum(cell.n for cell in built["seed_suite"].cells.values()) <= len(finished)


def test_the_notes_say_how_large_the_students_are() -> None:
    rows = runs(*SMALL, [73.0, 73.1], parameters=1_230_000.0, flops=354_000_000.0)
    table = next(iter(build(rows).values()))
    (note,) = (note for note in table.notes if "FLOPs" in note)
    assert note == "Students: resnet8x4 1.23 M parameters, 354.0 M FLOPs an image."


# Baselines


def gains_of(table: Table, column: str) -> dict[str, str]:
    """Return the row that each row of a column is compared with."""
    return {row: cell.gain.over for row in table.rows if (cell := table.cells[row, column]).gain}


@pytest.mark.parametrize("name", ["SD-JS (ours) [1,2]", "sd_JS (ours)", "SD-JS (ours)"])
def test_a_baseline_has_the_name_that_tables_show(name: str) -> None:
    rows = runs(*SHUFFLE, KD) + runs(*SHUFFLE, SD_KD, distiller="JS (ours)", M="[1,2]")
    built = build(rows, options=GainOptions(baseline=name))
    assert built["overview_cifar100"].baselines == {"SD-JS (ours) [1,2]"}


@pytest.mark.parametrize("baseline", ["kd", "KD"])
def test_any_method_can_be_the_baseline(baseline: str) -> None:
    rows = runs(*SHUFFLE, KD) + runs(*SHUFFLE, SD_KD, **sd_kd())
    rows += runs(*SHUFFLE, [75.0, 75.1, 75.3], distiller="my_loss")
    overview = build(rows, options=GainOptions(baseline=baseline))["overview_cifar100"]
    assert gains_of(overview, COLUMN) == {"my_loss": "KD", "SD-KD [1,2,4]": "KD"}
    assert overview.baselines == {"KD"}
    own = build(rows, options=GainOptions(baseline="my_loss"))["overview_cifar100"]
    assert gains_of(own, COLUMN) == {"KD": "my_loss", "SD-KD [1,2,4]": "my_loss"}
    for cell in own.cells.values():
        if cell.gain:
            assert cell.gain.difference.low is not None
            assert cell.gain.p_holm is not None
            assert cell.gain.verdict in ("better", "worse", "equivalent", "undecided")


@pytest.mark.parametrize("baseline", ["nonsense", "teacher"])
def test_a_baseline_without_runs_is_refused(baseline: str) -> None:
    rows = runs(*SHUFFLE, KD, teacher_top1=79.0) + runs(*SHUFFLE, SD_KD, **sd_kd())
    with pytest.raises(ValueError, match=rf"baseline {baseline}; give one of KD, SD-KD \[1,2,4\]$"):
        build(rows, options=GainOptions(baseline=baseline))


def test_a_table_without_the_baseline_or_with_several_says_so() -> None:
    rows = runs(*SHUFFLE, KD) + runs(*SHUFFLE, SD_KD, **sd_kd())
    rows += runs(*SHUFFLE, SD_KD, M="[1,2]") + runs(*SHUFFLE, KD, distiller="my_loss")
    built = build(rows, options=GainOptions(baseline="sd_kd"))
    assert any("no row of sd_kd here" in note for note in built["scales_cifar100_kd"].notes)
    assert not built["scales_cifar100_kd"].baselines
    notes = " ".join(built["overview_cifar100"].notes)
    assert "sd_kd names several rows; give --baseline 'SD-KD [1,2" in notes


def test_a_chosen_baseline_is_marked_and_another_is_not() -> None:
    rows = runs(*SHUFFLE, KD) + runs(*SHUFFLE, SD_KD, **sd_kd())
    shown = [render.markdown, render.html, render.latex]
    for options, marks in ((GainOptions(baseline="kd"), 1), (GainOptions(), 0)):
        table = build(rows, options=options)["sdd_table_2"]
        assert [form(table).count("KD (baseline)") for form in shown] == [marks] * 3
        assert "baseline" not in render.csv(table)


def test_a_plain_method_is_compared_with_the_student_alone_else_with_kd() -> None:
    rows = runs(*SHUFFLE, KD) + runs(*SHUFFLE, SD_KD, distiller="my_loss")
    assert gains_of(build(rows)["overview_cifar100"], COLUMN) == {"my_loss": "KD"}
    rows += runs("none", "shufflev1", [70.0, 70.3, 70.1], distiller="vanilla")
    found = gains_of(build(rows)["overview_cifar100"], COLUMN)
    assert found == {"KD": "student alone", "my_loss": "student alone"}


def test_gains_over_different_baselines_have_no_mean_over_pairs() -> None:
    other = ("resnet32x4", "resnet20")
    rows = [r for pair in (SHUFFLE, other) for r in runs(*pair, KD)]
    rows += [r for pair in (SHUFFLE, other) for r in runs(*pair, SD_KD, distiller="my_loss")]
    assert "my_loss" in build(rows)["overview_cifar100"].aggregates
    rows += runs("none", "shufflev1", [70.0, 70.3, 70.1], distiller="vanilla")
    assert "my_loss" not in build(rows)["overview_cifar100"].aggregates


def test_training_times_have_no_gain() -> None:
    rows = [
        run(
            *SMALL, seed, 73.0, images_per_s=speed, group_size=1, environment="H200", distiller=name
        )
        for name, speed in (("kd", 6400.0), ("dkd", 3200.0))
        for seed in (0, 1)
    ]
    table = build(rows, options=GainOptions(baseline="kd"))["time_cifar100"]
    assert not any(cell.gain for cell in table.cells.values())


def test_rows_of_unequal_variances_are_compared_apart() -> None:
    rows = runs(*SHUFFLE, [70.0, 70.01, 70.02]) + runs(*SHUFFLE, [72.0, 75.0, 78.0], **sd_kd())
    table = build(rows)["sdd_table_2"]
    gain = table.cells["SD-KD", COLUMN].gain
    assert gain is not None
    assert gain.difference.test == "paired"
    reason = ", since Bartlett's p is below 0.05: the variances of the rows differ"
    assert any(f"paired by seed{reason} ({COLUMN}: 2 deg" in note for note in table.notes)
    size = gain.difference.half_width()
    assert any(f"A gain below about {size:.2f} points ({COLUMN}) may" in one for one in table.notes)
    # Each row has an error of its own.
    more = rows + runs(*SHUFFLE, [71.0, 75.0, 76.0], **sd_kd(M="[1,2]"))
    table = build([row | {"dataset": "digits"} for row in more])["overview_digits"]
    gains = [cell.gain.difference.detectable(2) or 0 for cell in table.cells.values() if cell.gain]
    sizes = f"{min(gains):.2f} to {max(gains):.2f} points, by row ({COLUMN})"
    assert len(gains) == 2
    assert any(f"A gain below about {sizes} may" in note for note in table.notes)
    apart = [row | {"seed": row["seed"] + 10 * (row["M"] != "[1]")} for row in rows]
    table = build(apart)["sdd_table_2"]
    gain = table.cells["SD-KD", COLUMN].gain
    assert gain is not None
    assert gain.difference.test == "welch"
    assert gain.difference.mean == pytest.approx(4.99)
    assert any(f"Welch's tests{reason} and the rows share too few" in one for one in table.notes)


@pytest.mark.parametrize(
    ("lr", "comparable"), [(0.03, True), (0.025, True), (0.015, False), (0.1, False), (0.05, False)]
)
def test_a_logged_learning_rate_counts_with_two_decimals(lr: float, comparable: bool) -> None:
    options = {"method": "mlkd", "distiller": "mlkd", "source": "imported", "lr": lr}
    cell = only(
        runs(*SMALL, [77.0, 77.1], **options), "lskd_table_2", "MLKD, imported", SMALL_COLUMN
    )
    assert (cell.verdict != "not comparable") == comparable
