"""Read the numbers that the papers print, each with its source and its flag.

A number belongs to one table of one paper. Papers print different values for the same baseline (KD
on wrn_40_2 -> mobilev2 is 68.87 in SDD and 68.36 in LSKD). For this reason, no function here looks
up a cell across tables.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["FLAGS", "REFERENCE", "PrintedGain", "Published", "gains", "numbers", "of_table"]

REFERENCE = Path(__file__).parent / "reference"
FILES = ("published.csv", "published_more.csv")
"""Files of published numbers: those of the tables, and those that were found later."""
FLAGS = {
    "disputed": "two sources of the same authors print different numbers",
    "suspect": "very likely a misprint, the value is kept as printed",
    "other_teacher": "the source trains with another, stronger teacher",
}
"""Meaning of each flag in the files of published numbers."""
STUDENTS = {
    "mobilenetv1": "mobilev1",
    "mobilenetv2": "mobilev2",
    "shufflenetv1": "shufflev1",
    "shufflenetv2": "shufflev2",
}
"""Students that gains.csv spells as the papers do, mapped to their names in `FILES`."""


@dataclass(frozen=True)
class Published:
    """A number as one table of a paper prints it."""

    table: str  # "SDD Table 1"
    dataset: str
    pair: str  # teacher_student
    teacher: str
    student: str
    # As in the column `method` of the frame; also "teacher" and methods that the papers compare
    # with.
    method: str
    M: str  # "" if the table does not state the scales
    beta: str  # weight of complementary regions, "" if the table does not state it
    variant: str  # of knowledge, in SDD Table 6
    metric: str  # top1 (%), top5 (%), top1_last (%, last epoch) or ms_per_batch
    value: float
    # Settings that the source states beside the number, or None.
    temperature: float | None
    kd_weight: float | None
    ce_weight: float | None
    source: str  # line of the paper's text, and known doubts about the number
    flag: str  # "" or one of FLAGS
    file: str  # one of FILES


@dataclass(frozen=True)
class PrintedGain:
    """A gain as the paper prints it, with the difference of the two numbers that it stands for."""

    printed: float  # points of accuracy
    difference: float  # points of accuracy
    agrees: bool  # whether the two are equal
    source: str


def _rows(name: str) -> Iterator[dict[str, str]]:
    with open(REFERENCE / name, newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


@cache
def numbers() -> tuple[Published, ...]:
    """Return every published number, in the order of `FILES` and of the rows of each file."""
    return tuple(
        Published(
            table=row["table"],
            dataset=row["dataset"],
            pair=f"{row['teacher']}_{row['student']}",
            teacher=row["teacher"],
            student=row["student"],
            method=row["method"],
            M=row["M"],
            beta=row["beta"],
            variant=row["variant"],
            metric=row["metric"],
            value=float(row["value"]),
            temperature=_number(row["temperature"]),
            kd_weight=_number(row["kd_weight"]),
            ce_weight=_number(row["ce_weight"]),
            source=row["source_note"],
            flag=row["flag"],
            file=file,
        )
        for file in FILES
        for row in _rows(file)
    )


def _number(text: str) -> float | None:
    return float(text) if text else None


def of_table(table: str, metric: str = "top1") -> list[Published]:
    """Return the numbers of one table for one metric, in the order of print.

    Raises ValueError if no file has such a table.
    """
    if table not in (tables := dict.fromkeys(number.table for number in numbers())):
        raise ValueError(f"no table {table!r} is published; there are {', '.join(tables)}")
    return [number for number in numbers() if number.table == table and number.metric == metric]


@cache
def gains() -> dict[tuple[str, str, str], PrintedGain]:
    """Return the top-1 gains that the papers print, by (table, pair, method)."""
    return {
        (
            row["table"],
            f"{row['teacher']}_{STUDENTS.get(row['student'], row['student'])}",
            row["method"],
        ): PrintedGain(
            float(row["printed_gain"]),
            float(row["computed_gain"]),
            row["ok"] == "yes",
            row["where"],
        )
        for row in _rows("gains.csv")
        if row["metric"] == "top1"
    }
