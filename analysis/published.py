"""Read the numbers that the papers print, each with its source and known doubts about it.

A number belongs to one table of one paper. Papers print different values for the same baseline: KD
on wrn_40_2 -> mobilev2 is 68.87 in SDD and 68.36 in LSKD. For this reason, no function here looks
up a number without its table.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["FLAGS", "REFERENCE", "PrintedGain", "Published", "gains", "numbers", "of_table"]

REFERENCE = Path(__file__).parent / "reference"
FILES = ("published.csv", "published_more.csv", "published_readmes.csv")
"""Files of published numbers.

The second one has the numbers that were found later. The third one has those of the losses of 2022
to 2026, from the READMEs of the authors' code.
"""
FLAGS = {
    "disputed": "two sources of the same authors print different numbers",
    "suspect": "very likely a misprint, the value is kept as printed",
    "other_teacher": "the source trains with another, stronger teacher",
    "readme": "from the README of the authors' code, not compared with the paper",
    "other_settings": "from the README of the authors' code, whose settings are not published or "
    "are not those of the recipe",
}
"""Doubts about published numbers: the meaning of each flag in the files of `FILES`."""
STUDENTS = {
    "mobilenetv1": "mobilev1",
    "mobilenetv2": "mobilev2",
    "shufflenetv1": "shufflev1",
    "shufflenetv2": "shufflev2",
}
"""Names of students in gains.csv, mapped to the names of the same networks in `FILES`."""


@dataclass(frozen=True)
class Published:
    """Number that one table of a paper prints, such as the top-1 accuracy (%) of a method.

    Besides `value`, the number itself, the fields hold the data set, the pair of networks, the
    method, the settings that the table states, and the place where the number is printed.
    """

    table: str  # for example "SDD Table 1"
    dataset: str
    pair: str  # names of teacher and student, joined by "_"
    teacher: str
    student: str
    # Name of `schema.method_of`, such as "sd_kd_ls"; "teacher" for the accuracy of a teacher; or
    # the name of a method that only the papers ran
    method: str
    M: str  # "" if the table does not state the scales
    beta: str  # weight of complementary regions, "" if the table does not state it
    # Knowledge that is distilled (SDD Table 6), form of the logits (LSKD Table 4), or number of the
    # run (CTKD in LSKD's logs); "" elsewhere
    variant: str
    metric: str  # top1 (%), top5 (%), top1_last (%, last epoch) or ms_per_batch
    value: float
    # Settings that the source states beside the number; None if it does not.
    temperature: float | None
    kd_weight: float | None
    ce_weight: float | None
    source: str  # line of the paper's text, and known doubts about the number
    flag: str  # "" or one of FLAGS
    file: str  # one of FILES


@dataclass(frozen=True)
class PrintedGain:
    """Gain in accuracy of a method with SDD or LSKD over the same method without it, as printed.

    The paper that prints the gain also prints the two accuracies. Their difference may be another
    number than the printed gain.
    """

    printed: float  # printed gain, in points of accuracy
    difference: float  # printed accuracy with SDD or LSKD minus that without it, in points
    agrees: bool  # whether `printed` equals `difference`
    source: str  # line of the paper's text that prints the gain


def _rows(name: str) -> Iterator[dict[str, str]]:
    with open(REFERENCE / name, newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


@cache
def numbers() -> tuple[Published, ...]:
    """Return all published numbers, in the order of the files in `FILES` and of their rows."""
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
    """Return the numbers that one table prints for one metric, in the order of `numbers`.

    `table` is a name such as "SDD Table 1". `metric` is "top1", "top5", "top1_last" or
    "ms_per_batch". The list is empty if the table has no number for the metric. Raise ValueError if
    there is no table of this name.
    """
    if table not in (tables := dict.fromkeys(number.table for number in numbers())):
        raise ValueError(f"no table {table!r} is published; there are {', '.join(tables)}")
    return [number for number in numbers() if number.table == table and number.metric == metric]


@cache
def gains() -> dict[tuple[str, str, str], PrintedGain]:
    """Return the printed gains in top-1 accuracy of SDD and LSKD, by (table, pair, method).

    Each gain is that of a method with SDD ("sd_kd") or with LSKD ("kd_ls") over the same method
    without it ("kd"). A key is, for example, ("SDD Table 1", "resnet32x4_mobilev2", "sd_kd"). A
    pair is the names of teacher and student, joined by "_".
    """
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
