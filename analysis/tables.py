"""Build the papers' tables from the frame of runs, with the published numbers beside ours.

A `Declaration` describes a table: its runs, the row of a run, the published numbers and the
baseline of a row. One builder, `_fill`, fills the cells. Columns are pairs of teacher and
student. A cell averages over seeds and nothing else: if the runs of a cell differ in a setting,
the row is split and the label of each part names the setting and its value.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pandas as pd

from . import published, stats
from .published import PrintedGain, Published
from .schema import STATUSES, method_of

__all__ = ["METRICS", "Cell", "Gain", "Table", "build"]

Run = dict[str, Any]  # a row of the frame; a missing value is None

RECIPE = (
    "distiller",
    "M",
    "standardize",
    "knowledge",
    "complementary_weight",
    "temperature",
    "ce_weight",
    "kd_weight",
)
BUDGET = ("batch_size", "epochs", "max_steps", "precision", "val_fraction")
SETTINGS = (*RECIPE, "lr", *BUDGET)
"""Settings that distinguish runs, without the seed. Runs that differ in one are not averaged."""
PLAIN_SAME = (
    "source",
    "pair",
    "distiller",
    "standardize",
    "temperature",
    "ce_weight",
    "kd_weight",
    "lr",
    *BUDGET,
)
"""Settings that runs with regions share with their baseline on the whole map (M=[1])."""

PAPERS_WEIGHT = 2.0  # weight of complementary regions, SDD section 4.1
SIMILAR = {"resnet32x4_resnet8x4", "resnet34_resnet18", "vgg13_vgg8"}
"""Pairs of the SDD paper with similar architectures, which take M={1,2}.

The other pairs take M={1,2,4} (section 4.1).
"""
# ce_weight of KD+LS in the authors' code. The seed suite takes 1.0.
LSKD_CE_WEIGHT = {
    "cifar100": 0.1,
    "imagenet": 0.5,
}
# Settings of plain KD in the code of both papers.
PAPERS_KD: dict[str, dict[str, Any]] = {
    "cifar100": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
    "cub200": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
    "imagenet": {"temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5},
}
PAPERS_BUDGET: dict[str, dict[str, Any]] = {
    "cifar100": {"epochs": 240, "batch_size": 64},
    "cub200": {"epochs": 240, "batch_size": 64},
    "imagenet": {"epochs": 100, "batch_size": 512, "lr": 0.2},
}
# Students that the papers train at lr 0.01 on CIFAR-100. They train the others at 0.05.
LIGHT = (
    "mobilev2",
    "shufflev1",
    "shufflev2",
)
SEED_PAIRS = (
    "resnet32x4_resnet8x4",
    "resnet32x4_shufflev1",
    "wrn_40_2_shufflev1",
    "resnet32x4_mobilev2",
    "wrn_40_2_vgg8",
    "wrn_40_2_mobilev2",
)
# Subject of each table, and whether its gains are over the method without standardisation. If not,
# they are over the method on the whole map (M=[1]).
PAPERS_TABLES = {
    "SDD Table 1": ("different layers and structure, CIFAR-100", False),
    "SDD Table 2": ("different structure, CIFAR-100", False),
    "SDD Table 3": ("ImageNet, ResNet34 and ResNet18", False),
    "SDD Table 4": ("ImageNet, ResNet50 and MobileNetV1", False),
    "SDD Table 5": ("CUB-200", False),
    "LSKD Table 1": ("distinct architectures, CIFAR-100", True),
    "LSKD Table 2": ("identical architectures, CIFAR-100", True),
    "LSKD Table 3": ("ImageNet", True),
    "LSKD Table 5": ("teachers of one student, CIFAR-100", True),
}
# A longer list of commands is replaced by the command of the sweep, if that is known.
FEW = 3
NAMES = {
    "teacher": "teacher",
    "unknown": "method not known",
    "vanilla": "student alone",
    "fitnet": "FitNet",
    "semckd": "SemCKD",
    "wcord": "WCoRD",
    "reviewkd": "ReviewKD",
    "simkd": "SimKD",
    "cat_kd": "CAT-KD",
}
# Baseline of each plain method in an overview.
ALONE = dict.fromkeys(("kd", "dkd", "nkd"), "vanilla")
# Column of the frame that holds each metric, and its label.
METRICS = {
    "best": ("best", "top-1 (%), best epoch"),
    "last": ("last", "top-1 (%), last epoch"),
    "val": ("test", "top-1 (%) on the test set, at the epoch that held-out images chose"),
}
PAPERS_METRIC = (
    "The papers report the best epoch on the test set, which lay 0.3 points above the last on "
    "average in the LSKD authors' own logs."
)
VERDICTS = (
    "Verdict on a published number, from our n seeds with sample standard deviation s: within if "
    "|ours - published| <= t(n-1) * s * sqrt(1 + 1/n), half the 95 % t prediction interval for one "
    "more run; else above or below; undecided if n < 2, if all runs are equal and differ from the "
    f"published number, or if that half-width is above {stats.WIDEST:.1f} point. By chance alone "
    "one cell in twenty lies outside."
)


@dataclass(frozen=True)
class Gain:
    """The gain of a cell over its baseline in the same column, paired by seed."""

    over: str  # label of the row of the baseline
    paired: stats.Paired
    p_holm: float | None = None  # p corrected over all comparisons of the table


@dataclass(frozen=True)
class Cell:
    """The results of the runs of one row and column, and the number that the paper prints there."""

    # By seed, or by the key of the run if runs are counted or the run has no seed.
    values: Mapping[Any, float] = field(default_factory=dict)
    mean: float | None = None
    std: float | None = None  # sample standard deviation; None for one value
    planned: int = 0  # number of seeds (or runs) of any status, planned ones included
    troubles: tuple[str, ...] = ()  # why values are missing, as "1 failed"
    rank: str = ""  # best, second or ""
    published: Published | None = None
    published_gain: PrintedGain | None = None
    verdict: str = ""
    gain: Gain | None = None
    # By the line that they are on: ours, published, gain or verdict.
    footnotes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Settings that all runs of the cell share; empty for a cell without runs.
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Return the number of values that the mean is over."""
        return len(self.values)

    @property
    def seeds(self) -> list[int]:
        """Return the seeds that have a value, in ascending order."""
        return sorted(key for key in self.values if isinstance(key, int))


@dataclass(frozen=True)
class Table:
    """A table with its cells, notes and commands, ready to be rendered."""

    name: str  # for file names and anchors
    title: str
    quantity: str  # label of the numbers, with their unit
    counted: str  # what n counts: seeds or runs
    decimals: int  # digits after the point
    rows: tuple[str, ...]  # labels, in order
    columns: tuple[str, ...]  # labels, in order
    cells: Mapping[tuple[str, str], Cell]  # by row and column
    notes: tuple[str, ...]
    commands: tuple[str, ...]  # that run the missing, failed and stopped runs

    @cached_property
    def footnotes(self) -> dict[str, int]:
        """Return the number of each footnote text, from 1 in the order of the cells."""
        cells = (self.cells[row, column] for row in self.rows for column in self.columns)
        texts = dict.fromkeys(
            text for cell in cells for texts in cell.footnotes.values() for text in texts
        )
        return {text: i for i, text in enumerate(texts, start=1)}


@dataclass(frozen=True)
class Quantity:
    """A number that is read from each run, with the conditions under which runs are comparable."""

    label: str
    read: Callable[[Run], float | str]  # returns the number, or the reason why there is none
    note: str
    decimals: int = 2
    settings: tuple[str, ...] = SETTINGS  # runs that differ in one are never averaged
    # Settings that are equal among the cells that are ranked together.
    comparable: tuple[str, ...] = ("source", *BUDGET)
    lower_is_better: bool = False
    counted: str = "seeds"  # "seeds": each seed counts once; "runs": every run counts
    refusal: str = ""  # why no published number is comparable; "" if some may be
    footnote: Callable[[Run], str] = lambda run: ""  # returns the footnote on a run, or ""


@dataclass(frozen=True)
class Declaration:
    """The description from which `_fill` builds one table."""

    name: str
    title: str
    quantity: Quantity
    runs: Sequence[Run]
    row: Callable[[Run], str]  # returns the name of the row of a run
    label: Callable[[str], str]  # returns the label of a row name
    published: Sequence[Published] = ()
    # Returns the name of the row of a published number.
    published_row: Callable[[Published], str] = lambda number: number.method
    # Names of the first rows. Published rows follow, then the others, short names first.
    order: Sequence[str] = ()
    # Returns the name of the baseline row of a row, or None if the row has no baseline.
    baseline: Callable[[str], str | None] = lambda row: None
    # Settings that a cell and its baseline must share.
    same: tuple[str, ...] = ("source", "lr", *BUDGET)


def build(
    frame: pd.DataFrame, *, metric: str = "best", sweep: str = "", command: str = ""
) -> list[Table]:
    """Return every table that has a run in the frame.

    The tables of SDD come first and those of LSKD follow, each in the order of the paper. Overviews
    come last. Superseded runs are left out.

    Args:
        frame: runs, one per row, with the columns of `analysis.schema`.
        metric: accuracy to show, a key of `METRICS`.
        sweep: name of the sweep for the notes; "" for none.
        command: command that runs the whole sweep. It replaces a list of more than `FEW` commands.

    Returns:
        The tables, with accuracies in per cent and training times in milliseconds per batch.

    Raises:
        ValueError: if `metric` is not in `METRICS`.
    """
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; choose one of {', '.join(METRICS)}")
    runs, quantity = _runs(frame), _accuracy(metric)
    of_papers = [_paper_table(runs, quantity, table) for table in PAPERS_TABLES]
    declared = [
        *(declaration for declaration in of_papers if declaration.name.startswith("sdd")),
        *_by_family(_knowledge, runs, quantity),
        *_by_family(_scales, runs, quantity),
        *_by_family(_weights, runs, quantity),
        *_times(runs),
        _seed_suite(runs, quantity),
        *(declaration for declaration in of_papers if declaration.name.startswith("lskd")),
    ]
    placed = {run["key"] for table in declared if table.quantity is quantity for run in table.runs}
    declared += _overviews(runs, quantity, placed)
    return [_fill(declaration, sweep, command) for declaration in declared if declaration.runs]


def _runs(frame: pd.DataFrame) -> list[Run]:
    """Return the rows of the frame as dicts, oldest first and without superseded runs.

    The result does not depend on the order of the frame. The entry `key` identifies a
    configuration: its hash, else the id of the run, else the number of the row.
    """
    kept = frame[~frame["superseded"]]
    rows: list[Run] = kept.astype(object).where(kept.notna(), None).to_dict("records")
    rows.sort(key=lambda run: (str(run["started"]), repr(run)))
    return [
        _effective(run) | {"key": run["config_hash"] or run["run_id"] or f"row {i}"}
        for i, run in enumerate(rows)
    ]


def _effective(run: Run) -> Run:
    """Return the run with fixed values for the settings that its loss does not read.

    Runs that differ in those settings only are the same run. The entry `inert` keeps the original
    values.
    """
    fixed: Run = {}
    # With M=[1] the only region is the whole map, which always agrees with itself.
    if run["M"] == "[1]":
        fixed = {"complementary_weight": None}
    if run["distiller"] == "vanilla":
        fixed = {"complementary_weight": None, "temperature": None, "kd_weight": None}
        fixed |= {"M": "[1]", "standardize": False, "knowledge": "fusion"}
    all_steps = (
        {"max_steps": "all"} if run["max_steps"] is None and run["source"] == "sddlskd" else {}
    )
    return run | fixed | all_steps | {"inert": tuple(run[setting] for setting in fixed)}


# ---- the quantities that are read from a run


def _accuracy(metric: str) -> Quantity:
    """Return the quantity top-1 accuracy (%) by `metric`, a key of `METRICS`."""
    column, label = METRICS[metric]

    def read(run: Run) -> float | str:
        if run["method"] == "teacher":
            return "several teachers" if run["teacher_top1"] is None else float(run["teacher_top1"])
        if metric == "val" and not run["val_fraction"]:
            return "without held-out images"
        value = run[column]
        return "without a number (NaN)" if value is None or math.isnan(value) else float(value)

    def footnote(run: Run) -> str:
        held_out = (
            f"on held-out training images (val_fraction={run['val_fraction']}), not on the test set"
        )
        return held_out if run["val_fraction"] and metric != "val" else ""

    refusal = "" if metric == "best" else "the papers report the best epoch"
    return Quantity(label, read, PAPERS_METRIC, refusal=refusal, footnote=footnote)


def _time() -> Quantity:
    """Return the quantity training time (ms per batch) of runs that trained alone."""

    def read(run: Run) -> float | str:
        speed = run["images_per_s"]
        if not speed or not run["batch_size"] or run["group_size"] is None:
            return "without a time"
        return (
            1000 * run["batch_size"] / speed if run["group_size"] == 1 else "trained side by side"
        )

    machine = ("batch_size", "precision", "compile", "teacher_cache", "environment")
    return Quantity(
        label="training time (ms per batch)",
        read=read,
        note="1000 * batch size / images per second of the last epoch. Runs trained side by side "
        "are left out, because their time is that of the group. Machines are not mixed: each "
        "environment, precision and teacher cache has a row of its own.",
        decimals=1,
        settings=("M", *machine),
        comparable=("source", *machine),
        lower_is_better=True,
        counted="runs",
        refusal="other hardware",
    )


# ---- the tables


def _paper_table(runs: Sequence[Run], quantity: Quantity, table: str) -> Declaration:
    """Declare a paper's table with all its methods and pairs.

    Our runs in it are those of its methods, at its scales and weights.
    """
    numbers = published.of_table(table)
    about, over_plain = PAPERS_TABLES[table]
    known = {(number.dataset, number.pair, number.method): number for number in numbers}
    pairs = {number.pair: number.student for number in numbers}

    def belongs(run: Run) -> bool:
        number = known.get((run["dataset"], run["pair"], run["method"]))
        return (
            number is not None and run["knowledge"] == "fusion" and not _other_method(run, number)
        )

    ours = [run for run in _beside_pairs(runs, pairs) if belongs(run)]
    # Runs of students alone are not enough for a table of distillation methods.
    if all(run["method"] == "vanilla" for run in ours):
        ours = []
    return Declaration(
        name=table.lower().replace(" ", "_"),
        title=f"{table}: {about}",
        quantity=quantity,
        runs=[*_teachers(ours), *ours],
        row=lambda run: str(run["method"]),
        label=_method_label,
        published=numbers,
        baseline=_plain if over_plain else _one_scale,
    )


def _knowledge(runs: Sequence[Run], quantity: Quantity, dataset: str, family: str) -> Declaration:
    """Declare the ablation of the decoupled knowledge, with M=[1] as its baseline."""
    several = _controlled([run for run in runs if run["M"] != "[1]"], "knowledge")
    plain = [run for run in runs if run["M"] == "[1]" and run["knowledge"] == "fusion"]
    return Declaration(
        name=f"knowledge_{dataset}_{family}",
        title=f"Decoupled knowledge (form of SDD Table 6): {_method_label(family)} on {dataset}",
        quantity=quantity,
        runs=several
        + [run for run in plain if any(_agree(run, other, PLAIN_SAME) for other in several)],
        row=lambda run: "none" if run["M"] == "[1]" else str(run["knowledge"]),
        label=lambda row: f"none ({_method_label(family)})" if row == "none" else row,
        published=published.of_table("SDD Table 6")
        if (dataset, family) == ("cifar100", "kd")
        else (),
        published_row=lambda number: number.variant,
        order=("none", "consistent", "complementary", "fusion"),
        baseline=lambda row: None if row == "none" else "none",
        same=PLAIN_SAME,
    )


def _scales(runs: Sequence[Run], quantity: Quantity, dataset: str, family: str) -> Declaration:
    """Declare the ablation of the scales M, with M=[1] as its baseline."""
    ours = _scale_runs(runs)
    if (dataset, family) == ("cifar100", "kd_ls") and {run["pair"] for run in ours} <= set(
        SEED_PAIRS
    ):
        ours = []  # the table of the seed suite shows the same
    return Declaration(
        name=f"scales_{dataset}_{family}",
        title=f"Scales (form of SDD Table 7): {_method_label(family)} on {dataset}",
        quantity=quantity,
        runs=ours,
        row=lambda run: str(run["M"]),
        label=lambda row: f"M = {row}",
        published=published.of_table("SDD Table 7")
        if (dataset, family) == ("cifar100", "kd")
        else (),
        published_row=lambda number: number.M,
        baseline=lambda row: None if row == "[1]" else "[1]",
        same=("source", *(setting for setting in SETTINGS if setting != "M")),
    )


def _weights(runs: Sequence[Run], quantity: Quantity, dataset: str, family: str) -> Declaration:
    """Declare the ablation of the weight of complementary regions, with weight 1 as baseline."""
    fused = [run for run in runs if run["M"] != "[1]" and run["knowledge"] == "fusion"]
    return Declaration(
        name=f"weights_{dataset}_{family}",
        title="Weight of complementary regions (form of SDD Table 8): "
        f"{_method_label('sd_' + family)} on {dataset}",
        quantity=quantity,
        runs=_controlled(fused, "complementary_weight"),
        row=lambda run: _text(run["complementary_weight"]),
        label=lambda row: f"weight {row}",
        published=published.of_table("SDD Table 8")
        if (dataset, family) == ("cifar100", "kd")
        else (),
        published_row=lambda number: number.beta,
        baseline=lambda row: None if row == "1" else "1",
        same=("source", *(setting for setting in SETTINGS if setting != "complementary_weight")),
    )


def _times(runs: Sequence[Run]) -> Iterator[Declaration]:
    """Declare a table of training times for each data set with a run that trained alone."""
    quantity = _time()
    runs = [run for run in runs if run["status"] == "FINISHED"]
    for dataset in sorted(
        {run["dataset"] for run in runs if isinstance(quantity.read(run), float)}
    ):
        yield Declaration(
            name=f"time_{dataset}",
            title=f"Training time (form of SDD Table 9) on {dataset}",
            quantity=quantity,
            runs=[run for run in runs if run["dataset"] == dataset],
            row=lambda run: str(run["method"] or "unknown"),
            label=_method_label,
            published=published.of_table("SDD Table 9", "ms_per_batch")
            if dataset == "cifar100"
            else (),
        )


def _seed_suite(runs: Sequence[Run], quantity: Quantity) -> Declaration:
    """Declare the table of the main method, SD-KD+LS, over the scales.

    There is no published number for this method, so the published numbers of its parts (KD+LS and
    SD-KD) have rows of their own.
    """
    family = [
        run
        for run in runs
        if run["dataset"] == "cifar100" and run["method"] in ("kd_ls", "sd_kd_ls")
    ]
    parts = [
        number
        for table, method in (
            ("LSKD Table 1", "kd_ls"),
            ("LSKD Table 2", "kd_ls"),
            ("SDD Table 1", "sd_kd"),
            ("SDD Table 2", "sd_kd"),
            ("SDD Table 7", "sd_kd"),
        )
        for number in published.of_table(table)
        if number.method == method and number.pair in SEED_PAIRS
        if table != "SDD Table 7" or (number.pair in SIMILAR and number.M == "[1,2]")
    ]
    return Declaration(
        name="seed_suite",
        title="Seed suite: SD-KD+LS over scales, CIFAR-100",
        quantity=quantity,
        runs=[run for run in _scale_runs(family) if run["pair"] in SEED_PAIRS],
        row=lambda run: str(run["M"]),
        label=lambda row: (
            f"M = {row}" if row.startswith("[") else f"{_method_label(row)}, of the papers"
        ),
        published=sorted(parts, key=lambda number: SEED_PAIRS.index(number.pair)),
        order=("[1]", "[1,2]", "[1,4]", "[1,2,4]", "kd_ls", "sd_kd"),
        baseline=lambda row: "[1]" if row.startswith("[") and row != "[1]" else None,
        same=("source", *(setting for setting in SETTINGS if setting != "M")),
    )


def _overviews(runs: Sequence[Run], quantity: Quantity, placed: set[str]) -> Iterator[Declaration]:
    """Declare an overview of each data set, with all runs of the pairs it shows.

    The pairs are those with a run that no other table shows. A data set that no paper reports is
    shown with all its pairs.

    Args:
        runs: all runs.
        quantity: the accuracy to show.
        placed: keys of the runs that other tables of accuracy show.

    Yields:
        One declaration per data set, without runs if there is no such pair.
    """
    reported = {number.dataset for number in published.numbers()}
    for dataset in sorted({run["dataset"] for run in runs}):
        here = [run for run in runs if run["dataset"] == dataset]
        here = _beside_pairs(
            here, {run["pair"]: run["student"] for run in here if run["teacher"] != "none"}
        )
        shown = {run["pair"] for run in here if dataset not in reported or run["key"] not in placed}
        yield Declaration(
            name=f"overview_{dataset}",
            title=f"Methods and scales on {dataset}",
            quantity=quantity,
            runs=[
                *_teachers(r for r in here if r["pair"] in shown),
                *(run for run in here if run["pair"] in shown),
            ],
            row=lambda run: f"{run['method'] or 'unknown'} {run['M'] or '[1]'}".removesuffix(
                " [1]"
            ),
            label=lambda row: " ".join([_method_label(row.split()[0]), *row.split()[1:]]),
            order=("teacher",),
            baseline=lambda row: _one_scale(row.split()[0]) or _plain(row) or ALONE.get(row),
        )


# ---- selection of runs, and labels


def _by_family(
    declare: Callable[[Sequence[Run], Quantity, str, str], Declaration],
    runs: Sequence[Run],
    quantity: Quantity,
) -> Iterator[Declaration]:
    """Declare one table for each data set and family of methods.

    A family is a loss, either with or without standardisation. Runs of an unknown method and of
    students alone belong to no family.

    Args:
        declare: makes the declaration of one data set and family.
        runs: all runs.
        quantity: the number that the tables show.

    Yields:
        The declarations, by data set and family.
    """
    families = defaultdict(list)
    for run in runs:
        if run["method"] not in ("", "vanilla"):
            families[run["dataset"], method_of(run["distiller"], "[1]", run["standardize"])].append(
                run
            )
    for (dataset, family), members in sorted(families.items()):
        yield declare(members, quantity, dataset, family)


def _groups(runs: Iterable[Run], but: tuple[str, ...]) -> list[list[Run]]:
    """Group the runs that share source, pair and every setting except those in `but`."""
    groups = defaultdict(list)
    for run in runs:
        groups[tuple(run[key] for key in ("source", "pair", *SETTINGS) if key not in but)].append(
            run
        )
    return list(groups.values())


def _controlled(runs: Iterable[Run], factor: str) -> list[Run]:
    """Return the runs for which another run differs in `factor` and in no other setting."""
    groups = _groups(runs, (factor,))
    return [run for group in groups if len({run[factor] for run in group}) > 1 for run in group]


def _scale_runs(runs: Iterable[Run]) -> list[Run]:
    """Return the runs for which another run differs in M and in no other setting.

    If a group has several weights of complementary regions, only the weight with the most scales is
    kept. A tie goes to the papers' weight.
    """

    def count(group: Iterable[Run]) -> int:
        return len({run["M"] for run in group})

    kept = []
    for group in _groups(
        [run for run in runs if run["knowledge"] == "fusion"], ("M", "complementary_weight")
    ):
        plain = [run for run in group if run["M"] == "[1]"]
        by_weight = defaultdict(list)
        for run in group:
            if run["M"] != "[1]":
                by_weight[run["complementary_weight"]].append(run)
        ranks = {
            weight: (count(members), weight == PAPERS_WEIGHT)
            for weight, members in by_weight.items()
        }
        most = [
            run
            for weight, members in by_weight.items()
            if ranks[weight] == max(ranks.values())
            for run in members
        ]
        if count(plain + most) > 1:
            kept += plain + most
    return kept


def _beside_pairs(runs: Iterable[Run], pairs: Mapping[str, str]) -> list[Run]:
    """Repeat the runs of students alone in the column of every pair with that student.

    `pairs` maps a pair to its student. A student of no pair keeps its own column.
    """
    moved = []
    for run in runs:
        columns = [
            pair
            for pair, student in pairs.items()
            if run["teacher"] == "none" and student == run["student"]
        ]
        moved += [run | {"pair": pair} for pair in columns] or [run]
    return moved


def _teachers(runs: Iterable[Run]) -> list[Run]:
    """Return one entry per pair, with the accuracy of its teacher on the test set.

    A pair whose teacher has no recorded accuracy has no entry. The accuracy is None if the runs
    of a pair had teachers of different accuracies. Runs with held-out images do not count.
    """
    none: Run = dict.fromkeys((*SETTINGS, "seed"))
    tops: dict[str, dict[float, Run]] = defaultdict(dict)
    for run in runs:
        if run["teacher_top1"] is not None and not run["val_fraction"]:
            tops[run["pair"]][run["teacher_top1"]] = run
    return [
        run
        | none
        | {
            "method": "teacher",
            "status": "FINISHED",
            "key": f"teacher {pair}",
            "teacher_top1": top1,
        }
        for pair, by_top1 in tops.items()
        for top1, run in [
            (None if len(by_top1) > 1 else next(iter(by_top1)), next(iter(by_top1.values())))
        ]
    ]


def _other_method(run: Run, number: Published) -> list[str]:
    """Return the scales and weights of the run that differ from those of the published number."""
    ce_weight = LSKD_CE_WEIGHT.get(number.dataset)
    if number.method == "kd_ls" and run["ce_weight"] not in (None, ce_weight):
        return [f"ce_weight={_text(run['ce_weight'])}"]
    if not number.method.startswith("sd_"):
        return []
    scales = {"[1,2]"} if number.pair in SIMILAR else {"[1,2,4]"}
    # For similar architectures, the paper's text says {1,2} and the authors' scripts {1,2,4}.
    if number.dataset == "cub200":
        scales.add("[1,2,4]")
    weight = float(number.beta or PAPERS_WEIGHT)
    wrong = [] if run["M"] in ({number.M} if number.M else scales) else [f"M={run['M']}"]
    if run["complementary_weight"] not in (None, weight):
        wrong.append(f"complementary_weight={_text(run['complementary_weight'])}")
    return wrong


def _other_budget(run: Run, number: Published) -> list[str]:
    """Return the training settings of the run that differ from those of the paper."""
    expected: dict[str, Any] = {
        "val_fraction": 0.0,
        "max_steps": "all",
        **PAPERS_BUDGET[number.dataset],
    }
    if "mlkd" in number.method:
        expected["epochs"] = 480
    if number.method == "kd":
        expected |= PAPERS_KD[number.dataset]
    if number.dataset == "cifar100":
        expected["lr"] = 0.01 if number.student in LIGHT else 0.05
    # The learning rates are from SDD's configs/cub200. That of students alone is not published.
    if number.dataset == "cub200" and number.method != "vanilla":
        expected["lr"] = 0.05 if number.student == "vgg8" else 0.01
    return [
        f"{name}={_text(run[name])}"
        for name, value in expected.items()
        if run[name] not in (None, value)
    ]


def _agree(run: Mapping[str, Any], other: Mapping[str, Any], settings: Iterable[str]) -> bool:
    """Return whether two runs agree in the given settings.

    None means that a setting is unknown or not read by the loss, and agrees with any value.
    """
    return all(run[key] == other[key] or None in (run[key], other[key]) for key in settings)


def _plain(method: str) -> str | None:
    """Return the method without standardisation, or None if it has none."""
    return method.replace("_ls", "") if "_ls" in method else None


def _one_scale(method: str) -> str | None:
    """Return the method on the whole map only, or None if it has no other scales."""
    return method.removeprefix("sd_") if method.startswith("sd_") else None


def _method_label(method: str) -> str:
    """Return the label of a method, for example SD-KD+LS for sd_kd_ls."""
    return NAMES.get(method) or method.upper().replace("SD_", "SD-").replace("_", "+")


def _place(value: Any) -> tuple[float, int, str]:
    """Return a sort key: numbers first, by size, then texts, short ones first."""
    return (
        (value, 0, "")
        if isinstance(value, int | float)
        else (math.inf, len(str(value)), str(value))
    )


def _text(value: Any) -> str:
    return (
        "unknown" if value is None else f"{value:.12g}" if isinstance(value, float) else str(value)
    )


# ---- the builder


@dataclass(frozen=True)
class _Row:
    """A row of a table before its cells are filled."""

    label: str
    row: str  # name of the row in the declaration
    cells: Mapping[str, list[Run]]  # runs of each cell, by pair


def _fill(declaration: Declaration, sweep: str, command: str) -> Table:
    """Build the table of a declaration.

    Args:
        declaration: the table to build.
        sweep: name of the sweep for the notes; "" for none.
        command: command that runs the whole sweep; "" if unknown.

    Returns:
        The table, with ranks, gains and verdicts.
    """
    numbers = {
        (declaration.published_row(number), number.pair): number for number in declaration.published
    }
    pairs = [pair for _, pair in numbers] + sorted({run["pair"] for run in declaration.runs})
    columns = {pair: pair for pair in pairs}
    columns |= {
        run["pair"]: f"{run['student']} alone"
        for run in declaration.runs
        if run["teacher"] == "none"
    }
    columns |= {
        run["pair"]: _pair_label(run["teacher"], run["student"])
        for run in declaration.runs
        if run["teacher"] != "none"
    }
    columns |= {
        number.pair: _pair_label(number.teacher, number.student) for number in declaration.published
    }

    rows = _rows(declaration, numbers)
    cells = {
        (row.label, columns[pair]): _cell(
            row.cells.get(pair, []), numbers.get((row.row, pair)), declaration.quantity
        )
        for row in rows
        for pair in columns
    }
    _rank(
        cells,
        [row.label for row in rows if row.row != "teacher"],
        columns.values(),
        declaration.quantity,
    )
    _compare(cells, rows, columns.values(), declaration)
    return Table(
        name=_file_name(declaration.name),
        title=declaration.title,
        quantity=declaration.quantity.label,
        counted=declaration.quantity.counted,
        decimals=declaration.quantity.decimals,
        rows=tuple(row.label for row in rows),
        columns=tuple(columns.values()),
        cells=cells,
        notes=tuple(_notes(declaration, cells, sweep)),
        commands=_commands(declaration.runs, command),
    )


def _file_name(text: str) -> str:
    """Return a table name that is safe in paths and in HTML.

    The names of data sets and losses, which are part of `text`, may hold any characters. If the
    name has to change, it ends with digits of a hash, so that changed names stay different.
    """
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:100]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _pair_label(teacher: str, student: str) -> str:
    return f"{teacher} → {student}"


def _rows(declaration: Declaration, numbers: Iterable[tuple[str, str]]) -> list[_Row]:
    """Return the rows in order.

    A row is split by source, and by every setting in which the runs of one of its cells differ.
    """
    found: dict[tuple[str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in declaration.runs:
        found[declaration.row(run), run["source"]][run["pair"]].append(run)
    printed = [row for row, _ in numbers]
    for row in set(printed) - {row for row, _ in found}:
        found[row, "sddlskd"] = {}
    place = {row: i for i, row in enumerate(dict.fromkeys([*declaration.order, *printed]))}

    def order(key: tuple[str, str]) -> Any:
        row, source = key
        return (
            place.get(row, len(place)),
            row != "vanilla",
            len(row),
            row,
            source != "sddlskd",
            source,
        )

    rows = []
    for row, source in sorted(found, key=order):
        cells = found[row, source]
        split = [
            s
            for s in declaration.quantity.settings
            if any(len({run[s] for run in c}) > 1 for c in cells.values())
        ]
        if declaration.quantity.settings == SETTINGS and any(
            _differ_unseen(runs) for runs in cells.values()
        ):
            split.append("settings_hash")
        variants: dict[tuple[Any, ...], dict[str, list[Run]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for pair, runs in cells.items():
            for run in runs:
                variants[tuple(run[setting] for setting in split)][pair].append(run)
        origin = [] if source == "sddlskd" else [source]
        for values in sorted(
            variants or {(): {}}, key=lambda values: [_place(value) for value in values]
        ):
            parts = [
                f"{setting}={_text(value)}" for setting, value in zip(split, values, strict=True)
            ]
            rows.append(
                _Row(", ".join([declaration.label(row), *origin, *parts]), row, variants[values])
            )
    return rows


def _differ_unseen(runs: Sequence[Run]) -> bool:
    """Return whether runs with equal settings in all columns have different settings hashes.

    Such runs were trained with different settings that no column shows.
    """
    alike: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for run in runs:
        if run["settings_hash"]:
            alike[(*(run[setting] for setting in SETTINGS), run["inert"])].add(run["settings_hash"])
    return any(len(hashes) > 1 for hashes in alike.values())


def _cell(runs: Sequence[Run], number: Published | None, quantity: Quantity) -> Cell:
    """Return a cell with its mean, verdict and footnotes, before ranks and gains are added.

    Args:
        runs: runs of the cell. They agree in `quantity.settings`.
        number: the published number of the cell, if there is one.
        quantity: the number to read from each run.

    Returns:
        The cell.
    """
    values: dict[Any, float] = {}
    troubles: Counter[str] = Counter()
    ours = {text: None for run in runs if (text := quantity.footnote(run))}
    slots: dict[Any, dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        counted = (
            run["seed"] if quantity.counted == "seeds" and run["seed"] is not None else run["key"]
        )
        slots[counted][run["key"]].append(run)
    for slot, tries in slots.items():
        finished = []
        for attempts in tries.values():
            last = _outcome(attempts)
            if last["status"] == "FINISHED":
                finished.append(last)
            else:
                troubles[last["status"].lower()] += 1
        same = len({run["inert"] for run in finished}) == len(finished)
        if not same:
            hashes = ", ".join(sorted(run["key"] for run in finished))
            troubles["in several configurations"] += 1
            ours[
                f"seed {slot} is left out: it ran in several configurations that no column here "
                f"tells apart ({hashes})"
            ] = None
        if finished and same:
            value = quantity.read(finished[-1])
            if isinstance(value, str):
                troubles[value] += 1
            else:
                values[slot] = value

    mean, std = stats.mean_std(list(values.values())) if values else (None, None)
    gain = published.gains().get((number.table, number.pair, number.method)) if number else None
    marks = []
    if number and number.flag:
        marks.append(f"{number.flag}: {published.FLAGS[number.flag]}; {number.source}")
    if number and gain and not gain.agrees:
        marks.append(
            f"{number.table} prints a gain of {gain.printed:+.2f}, but its numbers differ by "
            f"{gain.difference:+.2f} ({gain.source})"
        )
    verdict, reasons = (
        _verdict(runs[0], list(values.values()), number, quantity)
        if values and number
        else ("", ())
    )
    return Cell(
        values=values,
        mean=mean,
        std=std,
        planned=len(slots),
        troubles=tuple(f"{count} {trouble}" for trouble, count in sorted(troubles.items())),
        published=number,
        published_gain=gain,
        verdict=verdict,
        footnotes={"ours": tuple(ours), "published": tuple(marks), "verdict": reasons},
        settings={key: runs[0][key] for key in ("source", "pair", *quantity.settings)}
        if runs
        else {},
    )


def _outcome(attempts: Sequence[Run]) -> Run:
    """Return the run that counts among the runs of one configuration.

    The status decides in the order of `STATUSES`, so a finished run precedes all others. Of several
    runs with the same status, the latest counts.
    """
    return min(reversed(attempts), key=lambda run: STATUSES.index(run["status"]))


def _verdict(
    run: Run, values: Sequence[float], number: Published, quantity: Quantity
) -> tuple[str, tuple[str, ...]]:
    """Return the verdict on a published number, and footnotes that explain a missing verdict.

    Args:
        run: a run of the cell, for its settings.
        values: our numbers, one per seed.
        number: the published number.
        quantity: the quantity of the numbers.

    Returns:
        The verdict of `stats.verdict`, or "not comparable" with a footnote that names the reasons.
        The verdict on a teacher is "".
    """
    # A teacher is a checkpoint and not a run.
    if run["method"] == "teacher":
        return "", ()
    reasons = (
        [quantity.refusal]
        if quantity.refusal
        else _other_method(run, number) + _other_budget(run, number)
    )
    if reasons:
        return "not comparable", (
            f"not comparable with the published number: {', '.join(reasons)}",
        )
    return stats.verdict(values, number.value), ()


def _rank(
    cells: dict[tuple[str, str], Cell],
    rows: Sequence[str],
    columns: Iterable[str],
    quantity: Quantity,
) -> None:
    """Mark the best and second best cell of each column among the cells that are comparable.

    The rounded means decide, so that cells which show the same number have the same rank.

    Args:
        cells: cells by row and column. Marked cells are replaced.
        rows: labels of the rows to rank.
        columns: labels of the columns.
        quantity: the quantity of the numbers.
    """
    for column in columns:
        groups = defaultdict(list)
        for row in rows:
            if (cell := cells[row, column]).mean is not None:
                groups[tuple(cell.settings[key] for key in quantity.comparable)].append(
                    (row, cell.mean)
                )
        for members in groups.values():
            shown = sorted(
                {round(mean, quantity.decimals) for _, mean in members},
                reverse=not quantity.lower_is_better,
            )
            for row, mean in members if len(members) > 1 else []:
                place = shown.index(round(mean, quantity.decimals))
                cells[row, column] = replace(
                    cells[row, column], rank=("best", "second", "")[min(place, 2)]
                )


def _compare(
    cells: dict[tuple[str, str], Cell],
    rows: Sequence[_Row],
    columns: Iterable[str],
    declaration: Declaration,
) -> None:
    """Give each cell its gain over the baseline in its column.

    The p-values are corrected over all gains of the table.

    Args:
        cells: cells by row and column. Cells with a baseline are replaced.
        rows: the rows of the table.
        columns: labels of the columns.
        declaration: the table, which names the baseline of each row.
    """
    for column in columns:
        for row in rows:
            base, cell = declaration.baseline(row.row), cells[row.label, column]
            bases = {r.label: c for r in rows if r.row == base and (c := cells[r.label, column]).n}
            if cell.n and bases:
                cells[row.label, column] = _with_gain(cell, bases, declaration)
    tested = [
        (key, gain)
        for key, cell in cells.items()
        if (gain := cell.gain) and gain.paired.p is not None
    ]
    corrected = stats.holm([gain.paired.p for _, gain in tested if gain.paired.p is not None])
    for (key, gain), p in zip(tested, corrected, strict=True):
        cells[key] = replace(cells[key], gain=replace(gain, p_holm=p))


def _with_gain(cell: Cell, bases: Mapping[str, Cell], declaration: Declaration) -> Cell:
    """Return the cell with its gain, or with a footnote that says why it has none.

    Args:
        cell: the cell to compare.
        bases: candidates for the baseline in the same column, by the label of their row.
        declaration: the table, which names the settings that the cell and its baseline must share.

    Returns:
        A new cell.
    """
    fitting = {
        label: c
        for label, c in bases.items()
        if _agree(cell.settings, c.settings, declaration.same)
    }
    # If the baseline ran at several temperatures or weights, take the row with those of this cell.
    if len(fitting) > 1:
        tuned = ("temperature", "ce_weight", "kd_weight")
        fitting = {
            label: c for label, c in fitting.items() if _agree(cell.settings, c.settings, tuned)
        }
    if len(fitting) != 1:
        why = (
            f"{len(fitting)} of its rows fit, not one"
            if fitting
            else "its runs differ in source or settings"
        )
        return _footnote(cell, "ours", f"no gain over {' or '.join(bases)}: {why}")
    ((over, base),) = fitting.items()
    ours, theirs = ({seed: c.values[seed] for seed in c.seeds} for c in (cell, base))
    paired = stats.paired(ours, theirs)
    if paired is None:
        return _footnote(cell, "ours", f"no gain over {over}: no seed in common")
    cell = replace(cell, gain=Gain(over, paired))
    if not paired.left_out:
        return cell
    return _footnote(
        cell, "gain", f"seeds that only one of the two rows has are left out: {paired.left_out}"
    )


def _footnote(cell: Cell, kind: str, text: str) -> Cell:
    return replace(cell, footnotes={**cell.footnotes, kind: (*cell.footnotes.get(kind, ()), text)})


def _commands(runs: Iterable[Run], whole: str) -> tuple[str, ...]:
    """Return the commands that run the missing, failed and stopped runs.

    More than `FEW` commands are replaced by the command `whole` of the sweep, if that is known.
    """
    by_key = defaultdict(list)
    for run in runs:
        by_key[run["key"]].append(run)
    last = [_outcome(attempts) for attempts in by_key.values()]
    single = sorted(
        {run["command"] for run in last if run["status"] in ("FAILED", "KILLED", "MISSING")} - {""}
    )
    return (whole,) if whole and len(single) > FEW else tuple(single)


def _notes(
    declaration: Declaration, cells: Mapping[tuple[str, str], Cell], sweep: str
) -> Iterator[str]:
    quantity = declaration.quantity
    gains = [cell.gain for cell in cells.values() if cell.gain]
    if sweep:
        yield f"Runs of {sweep}."
    yield f"{quantity.label}. {quantity.note}"
    what = quantity.counted
    yield (
        f"Cells: mean ± sample standard deviation (n {what}); 2/3 {what}: of three planned, two "
        "have a number. In each column the best is bold and the second underlined, among rows of "
        f"the same {', '.join(quantity.comparable)}: an order of the means, no test."
    )
    if declaration.published:
        tables = ", ".join(dict.fromkeys(number.table for number in declaration.published))
        yield (
            f"Published: {tables} (analysis/reference/published.csv); numbers of other papers are "
            "not mixed in."
        )
    if any(cell.verdict for cell in cells.values()) and not quantity.refusal:
        yield VERDICTS
    if gains:
        tests = sum(gain.p_holm is not None for gain in gains)
        yield (
            "Gains: mean difference over the seeds that both rows have (their number in brackets), "
            "with its 95 % paired t interval, uncorrected; p: two-sided paired t test, corrected "
            f"by Holm over the table's tests ({tests})."
        )
    by_row: dict[tuple[str, str], set[Any]] = defaultdict(set)
    for (row, _), cell in cells.items():
        for setting in quantity.settings if cell.settings else ():
            by_row[row, setting].add(cell.settings[setting])
    if varying := dict.fromkeys(
        setting for (_, setting), values in by_row.items() if len(values) > 1
    ):
        yield f"Within a row these settings differ between pairs: {', '.join(varying)}."
    if repeated := _repeated(declaration.runs):
        yield (
            f"{repeated} failed or stopped runs were run again in the same configuration and "
            "finished: the finished runs count."
        )


def _repeated(runs: Iterable[Run]) -> int:
    """Return the number of failed or stopped runs whose configuration also has a finished run."""
    finished = {run["key"] for run in runs if run["status"] == "FINISHED"}
    return len(
        {
            run["run_id"]
            for run in runs
            if run["key"] in finished and run["status"] in ("FAILED", "KILLED")
        }
    )
