"""The papers' tables from the frame of runs, each number of ours beside the published one.

A table is a declaration: which runs, what names a row, whose numbers stand beside, what a row is compared with. One
builder fills the cells. Columns are pairs of teacher and student. A cell averages over seeds and nothing else: where
runs of one cell differ in a setting, the row is split, and its label says by what.
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

from analysis import published, stats
from analysis.published import PrintedGain, Published
from analysis.schema import STATUSES, method_of

__all__ = ["METRICS", "Cell", "Gain", "Table", "build"]

Run = dict[str, Any]  # a row of the frame; what is missing is None

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
"""What makes two runs different things, seed aside: never averaged."""
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
"""What ablations of regions share with the method on the whole map."""

PAPERS_WEIGHT = 2.0  # of complementary regions, SDD section 4.1
SIMILAR = {"resnet32x4_resnet8x4", "resnet34_resnet18", "vgg13_vgg8"}
"""Pairs of the SDD paper with similar architectures: M={1,2}; the others: M={1,2,4} (section 4.1)."""
LSKD_CE_WEIGHT = {
    "cifar100": 0.1,
    "imagenet": 0.5,
}  # of KD+LS, in the authors' code; the seed suite takes 1.0
PAPERS_KD: dict[str, dict[str, Any]] = {  # of plain KD, in both papers' code
    "cifar100": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
    "cub200": {"temperature": 4.0, "ce_weight": 0.1, "kd_weight": 0.9},
    "imagenet": {"temperature": 1.0, "ce_weight": 0.5, "kd_weight": 0.5},
}
PAPERS_BUDGET: dict[str, dict[str, Any]] = {
    "cifar100": {"epochs": 240, "batch_size": 64},
    "cub200": {"epochs": 240, "batch_size": 64},
    "imagenet": {"epochs": 100, "batch_size": 512, "lr": 0.2},
}
LIGHT = (
    "mobilev2",
    "shufflev1",
    "shufflev2",
)  # the papers train these at lr 0.01 on CIFAR-100, the others at 0.05
SEED_PAIRS = (
    "resnet32x4_resnet8x4",
    "resnet32x4_shufflev1",
    "wrn_40_2_shufflev1",
    "resnet32x4_mobilev2",
    "wrn_40_2_vgg8",
    "wrn_40_2_mobilev2",
)
PAPERS_TABLES = {  # table: what it compares, and whether its gains are over the method without standardisation
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
FEW = 3  # commands that are listed one by one
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
ALONE = dict.fromkeys(("kd", "dkd", "nkd"), "vanilla")  # what a plain method is compared with
METRICS = {  # column of the frame, and what it is
    "best": ("best", "top-1 (%), best epoch"),
    "last": ("last", "top-1 (%), last epoch"),
    "val": ("test", "top-1 (%) on the test set, at the epoch that held-out images chose"),
}
PAPERS_METRIC = (
    "The papers report the best epoch on the test set, which lay 0.3 points above the last on average in the LSKD "
    "authors' own logs."
)
VERDICTS = (
    "Verdict on a published number, from our n seeds with sample standard deviation s: within where |ours - published| "
    "<= t(n-1) * s * sqrt(1 + 1/n), half the 95 % t prediction interval for one more run; else above or below; "
    f"undecided where n < 2, where all runs are equal and off it, or where that half-width is above {stats.WIDEST:.1f} "
    "point. By chance alone one cell in twenty lies outside."
)


@dataclass(frozen=True)
class Gain:
    """Of a cell over its baseline in the same column, paired by seed."""

    over: str  # label of the baseline's row
    paired: stats.Paired
    p_holm: float | None = None  # corrected over the table's comparisons


@dataclass(frozen=True)
class Cell:
    """What the runs of one row and column say, and what the paper prints there."""

    values: Mapping[Any, float] = field(
        default_factory=dict
    )  # by seed; by run where there is no seed
    mean: float | None = None
    std: float | None = None  # of the sample; None for one value
    planned: int = 0  # seeds that ran, run or are to run
    troubles: tuple[str, ...] = ()  # "1 failed": why there are fewer numbers than runs
    rank: str = ""  # best, second
    published: Published | None = None
    published_gain: PrintedGain | None = None
    verdict: str = ""
    gain: Gain | None = None
    footnotes: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # on: ours, published, gain or verdict
    settings: Mapping[str, Any] = field(default_factory=dict)  # that all runs of the cell share

    @property
    def n(self) -> int:
        return len(self.values)

    @property
    def seeds(self) -> list[int]:
        return sorted(key for key in self.values if isinstance(key, int))


@dataclass(frozen=True)
class Table:
    name: str  # for file names and anchors
    title: str
    quantity: str  # what a number is, with its unit
    counted: str  # seeds or runs
    decimals: int
    rows: tuple[str, ...]  # labels
    columns: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    notes: tuple[str, ...]
    commands: tuple[str, ...]  # that fill what is missing or failed

    @cached_property
    def footnotes(self) -> dict[str, int]:
        """Each text with its number, from 1 in the order of the cells."""
        cells = (self.cells[row, column] for row in self.rows for column in self.columns)
        texts = dict.fromkeys(
            text for cell in cells for texts in cell.footnotes.values() for text in texts
        )
        return {text: i for i, text in enumerate(texts, start=1)}


@dataclass(frozen=True)
class Quantity:
    """What is read from a run, and between which runs it may be compared."""

    label: str
    read: Callable[[Run], float | str]  # the number, or why there is none
    note: str
    decimals: int = 2
    settings: tuple[str, ...] = SETTINGS  # never averaged over
    comparable: tuple[str, ...] = (
        "source",
        *BUDGET,
    )  # equal among the cells that are ranked together
    lower_is_better: bool = False
    counted: str = "seeds"  # each once; or every of the runs
    refusal: str = ""  # why no published number is comparable
    footnote: Callable[[Run], str] = lambda run: ""  # on a run's number


@dataclass(frozen=True)
class Declaration:
    """One table: what it holds and how it is read."""

    name: str
    title: str
    quantity: Quantity
    runs: Sequence[Run]
    row: Callable[[Run], str]  # a run's row
    label: Callable[[str], str]  # of a row
    published: Sequence[Published] = ()
    published_row: Callable[[Published], str] = lambda number: number.method
    order: Sequence[str] = ()  # of rows; the published ones follow, then others, short names first
    baseline: Callable[[str], str | None] = lambda row: None
    same: tuple[str, ...] = ("source", "lr", *BUDGET)  # what a cell and its baseline must share


def build(
    frame: pd.DataFrame, *, metric: str = "best", sweep: str = "", command: str = ""
) -> list[Table]:
    """Every table that has a run in the frame, in the papers' order.

    sweep is named in the notes; command, which runs all of it, stands for a long list of commands.
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
    """Rows as dicts, without superseded ones, oldest first, whatever the order of the frame."""
    kept = frame[~frame["superseded"]]
    rows: list[Run] = kept.astype(object).where(kept.notna(), None).to_dict("records")
    rows.sort(key=lambda run: (str(run["started"]), repr(run)))
    return [
        _effective(run) | {"key": run["config_hash"] or run["run_id"] or f"row {i}"}
        for i, run in enumerate(rows)
    ]


def _effective(run: Run) -> Run:
    """Without the settings that the loss does not read (`inert`): runs that differ in those alone are the same."""
    fixed: Run = {}
    if run["M"] == "[1]":  # the only region is the whole map: it agrees with itself
        fixed = {"complementary_weight": None}
    if run["distiller"] == "vanilla":
        fixed = {"complementary_weight": None, "temperature": None, "kd_weight": None}
        fixed |= {"M": "[1]", "standardize": False, "knowledge": "fusion"}
    all_steps = (
        {"max_steps": "all"} if run["max_steps"] is None and run["source"] == "sddlskd" else {}
    )
    return run | fixed | all_steps | {"inert": tuple(run[setting] for setting in fixed)}


# ---- what is read from a run


def _accuracy(metric: str) -> Quantity:
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
    def read(run: Run) -> float | str:
        speed = run["images_per_s"]
        if not speed or not run["batch_size"] or run["group_size"] is None:
            return "without a time"
        return (
            1000 * run["batch_size"] / speed if run["group_size"] == 1 else "trained side by side"
        )

    machine = ("batch_size", "precision", "compile", "teacher_cache", "environment")
    return Quantity(
        label="training time (ms a batch)",
        read=read,
        note="1000 * batch size / images per second of the last epoch. Runs trained side by side share their time and "
        "are left out; machines are not mixed: each environment, precision and teacher cache is a row of its own.",
        decimals=1,
        settings=("M", *machine),
        comparable=("source", *machine),
        lower_is_better=True,
        counted="runs",
        refusal="other hardware",
    )


# ---- the tables


def _paper_table(runs: Sequence[Run], quantity: Quantity, table: str) -> Declaration:
    """A paper's table of methods and pairs, whole, with our runs of its methods at its scales and weight."""
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
    ours = _scale_runs(runs)
    if (dataset, family) == ("cifar100", "kd_ls") and {run["pair"] for run in ours} <= set(
        SEED_PAIRS
    ):
        ours = []  # the seed suite's table is this one
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
    fused = [run for run in runs if run["M"] != "[1]" and run["knowledge"] == "fusion"]
    return Declaration(
        name=f"weights_{dataset}_{family}",
        title=f"Weight of complementary regions (form of SDD Table 8): {_method_label('sd_' + family)} on {dataset}",
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
    """Of data sets where some run has a time of its own."""
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
    """The main method over scales; nobody published it, so the parts' numbers are rows of their own."""
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
    """Whatever stands in no other table, with all runs of its pairs; data sets that no paper reports, whole."""
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


# ---- which runs, which labels


def _by_family(
    declare: Callable[[Sequence[Run], Quantity, str, str], Declaration],
    runs: Sequence[Run],
    quantity: Quantity,
) -> Iterator[Declaration]:
    """One table for each data set and loss, with and without standardisation; of which runs is not known, in none."""
    families = defaultdict(list)
    for run in runs:
        if run["method"] not in ("", "vanilla"):
            families[run["dataset"], method_of(run["distiller"], "[1]", run["standardize"])].append(
                run
            )
    for (dataset, family), members in sorted(families.items()):
        yield declare(members, quantity, dataset, family)


def _groups(runs: Iterable[Run], but: tuple[str, ...]) -> list[list[Run]]:
    """Runs that share pair, source and every setting `but` those."""
    groups = defaultdict(list)
    for run in runs:
        groups[tuple(run[key] for key in ("source", "pair", *SETTINGS) if key not in but)].append(
            run
        )
    return list(groups.values())


def _controlled(runs: Iterable[Run], factor: str) -> list[Run]:
    """Runs that stand beside others that differ in `factor` alone."""
    groups = _groups(runs, (factor,))
    return [run for group in groups if len({run[factor] for run in group}) > 1 for run in group]


def _scale_runs(runs: Iterable[Run]) -> list[Run]:
    """Runs that differ from others in M alone; of several weights of complementary regions, that with most scales."""

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
    """Students alone stand in the column of every pair (pair: student) that has them."""
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
    """A row for every teacher that the runs had: its accuracy on the test set."""
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
    """Where the run's scales or weights are not those of the published number."""
    ce_weight = LSKD_CE_WEIGHT.get(number.dataset)
    if number.method == "kd_ls" and run["ce_weight"] not in (None, ce_weight):
        return [f"ce_weight={_text(run['ce_weight'])}"]
    if not number.method.startswith("sd_"):
        return []
    scales = {"[1,2]"} if number.pair in SIMILAR else {"[1,2,4]"}
    if (
        number.dataset == "cub200"
    ):  # the text says {1,2} for similar architectures, the authors' scripts {1,2,4}
        scales.add("[1,2,4]")
    weight = float(number.beta or PAPERS_WEIGHT)
    wrong = [] if run["M"] in ({number.M} if number.M else scales) else [f"M={run['M']}"]
    if run["complementary_weight"] not in (None, weight):
        wrong.append(f"complementary_weight={_text(run['complementary_weight'])}")
    return wrong


def _other_budget(run: Run, number: Published) -> list[str]:
    """Where the run's training is not the paper's."""
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
    if (
        number.dataset == "cub200" and number.method != "vanilla"
    ):  # of students alone it is not published
        expected["lr"] = 0.05 if number.student == "vgg8" else 0.01  # SDD's configs/cub200
    return [
        f"{name}={_text(run[name])}"
        for name, value in expected.items()
        if run[name] not in (None, value)
    ]


def _agree(run: Mapping[str, Any], other: Mapping[str, Any], settings: Iterable[str]) -> bool:
    """None is a setting that is not known or not read: it agrees with any."""
    return all(run[key] == other[key] or None in (run[key], other[key]) for key in settings)


def _plain(method: str) -> str | None:
    """The method without standardisation."""
    return method.replace("_ls", "") if "_ls" in method else None


def _one_scale(method: str) -> str | None:
    """The method on the whole map alone."""
    return method.removeprefix("sd_") if method.startswith("sd_") else None


def _method_label(method: str) -> str:
    """sd_kd_ls -> SD-KD+LS."""
    return NAMES.get(method) or method.upper().replace("SD_", "SD-").replace("_", "+")


def _place(value: Any) -> tuple[float, int, str]:
    """Numbers by size, then texts, short ones first."""
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
    label: str
    row: str  # the declaration's
    cells: Mapping[str, list[Run]]  # by pair


def _fill(declaration: Declaration, sweep: str, command: str) -> Table:
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
    """A data set or a loss may have any name; a table's is part of paths and HTML. Digits tell changed names apart."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "-", text)[:100]
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def _pair_label(teacher: str, student: str) -> str:
    return f"{teacher} → {student}"


def _rows(declaration: Declaration, numbers: Iterable[tuple[str, str]]) -> list[_Row]:
    """The rows in order; one is split where runs of one of its cells differ in a setting, or come from elsewhere."""
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
    """Whether runs that are alike in every column were trained with different settings all the same."""
    alike: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for run in runs:
        if run["settings_hash"]:
            alike[(*(run[setting] for setting in SETTINGS), run["inert"])].add(run["settings_hash"])
    return any(len(hashes) > 1 for hashes in alike.values())


def _cell(runs: Sequence[Run], number: Published | None, quantity: Quantity) -> Cell:
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
                f"seed {slot} ran in configurations that differ in no column here ({hashes}): left out"
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
            f"{number.table} prints a gain of {gain.printed:+.2f} where its numbers differ by {gain.difference:+.2f} "
            f"({gain.source})"
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
    """Of runs of one configuration, which counts: a finished one before others, the latest of several."""
    return min(reversed(attempts), key=lambda run: STATUSES.index(run["status"]))


def _verdict(
    run: Run, values: Sequence[float], number: Published, quantity: Quantity
) -> tuple[str, tuple[str, ...]]:
    """The verdict, and why there is none."""
    if run["method"] == "teacher":  # a checkpoint, not a run
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
    """Marks best and second of each column, as the numbers are shown, among cells that may be compared."""
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
    """Gives each cell its gain over the baseline in its column; p-values are corrected over the table."""
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
    fitting = {
        label: c
        for label, c in bases.items()
        if _agree(cell.settings, c.settings, declaration.same)
    }
    if len(fitting) > 1:  # a baseline at several temperatures: the one at this cell's
        tuned = ("temperature", "ce_weight", "kd_weight")
        fitting = {
            label: c for label, c in fitting.items() if _agree(cell.settings, c.settings, tuned)
        }
    if len(fitting) != 1:
        why = (
            f"{len(fitting)} of its rows fit"
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
    """That run what is planned, failed or was stopped: each job's, or of many the one of the `whole` sweep."""
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
        f"Cells: mean ± sample standard deviation (n {what}); 2/3 {what}: of three planned, two have a number. In each "
        f"column the best is bold and the second underlined, among rows of the same {', '.join(quantity.comparable)}: "
        "an order of the means, no test."
    )
    if declaration.published:
        tables = ", ".join(dict.fromkeys(number.table for number in declaration.published))
        yield f"Published: {tables} (analysis/reference/published.csv); numbers of other papers are not mixed in."
    if any(cell.verdict for cell in cells.values()) and not quantity.refusal:
        yield VERDICTS
    if gains:
        tests = sum(gain.p_holm is not None for gain in gains)
        yield (
            "Gains: mean difference over the seeds that both rows have (their number in brackets), with its 95 % "
            "paired t interval, uncorrected; p: two-sided paired t test, corrected by Holm over the table's tests "
            f"({tests})."
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
        yield f"{repeated} failed or stopped runs were run again in the same configuration and finished: those count."


def _repeated(runs: Iterable[Run]) -> int:
    finished = {run["key"] for run in runs if run["status"] == "FINISHED"}
    return len(
        {
            run["run_id"]
            for run in runs
            if run["key"] in finished and run["status"] in ("FAILED", "KILLED")
        }
    )
