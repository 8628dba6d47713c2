"""Declare the tables: which runs each shows, in which rows, beside which published numbers.

`analysis.tables` builds the tables. The columns of every table are pairs of teacher and student.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import published, selection
from .names import SUFFIXES, method_name, reading_order, row_key, row_name, scales_order, value_name
from .protocol import PAPERS_WEIGHT, other_method
from .published import Published
from .schema import METHOD_PARTS, NO_LOGIT_LOSS, Run, method_of
from .selection import BUDGET, COMPARABLE, METRICS, SETTINGS, agree, beside_pairs

__all__ = ["PAPERS_METRIC", "Declaration", "Quantity", "declare"]

PLAIN_SAME = (
    "source",
    "pair",
    "distiller",
    "standardize",
    "standardization",
    "temperature",
    "ce_weight",
    "kd_weight",
    "lr",
    *BUDGET,
)
"""Settings that a run with regions (M other than [1]) shares with its baseline (M=[1])."""

SEED_PAIRS = (
    "resnet32x4_resnet8x4",
    "resnet32x4_shufflev1",
    "wrn_40_2_shufflev1",
    "resnet32x4_mobilev2",
    "wrn_40_2_vgg8",
    "wrn_40_2_mobilev2",
)
# Subject of each table, and whether the gain of a method with two tricks, regions and
# standardisation, is over the method without standardisation (True) or without regions (False).
# The gain of a sum of losses is over the sum without its last loss.
PAPERS_TABLES = {
    "SDD Table 1": ("different layers and structure, CIFAR-100", False),
    "SDD Table 2": ("different structure, CIFAR-100", False),
    "SDD Table 3": ("ImageNet, ResNet34 and ResNet18", False),
    "SDD Table 4": ("ImageNet, ResNet50 and MobileNetV1", False),
    "SDD Table 5": ("CUB-200", False),
    "SDD Appendix 6.1a (combination with feature distillation)": ("CIFAR-100", False),
    "SDD Appendix 6.1b (SP on pooled features)": ("CIFAR-100", False),
    "LSKD Table 1": ("distinct architectures, CIFAR-100", True),
    "LSKD Table 2": ("identical architectures, CIFAR-100", True),
    "LSKD Table 3": ("ImageNet", True),
    "LSKD Table 5": ("teachers of one student, CIFAR-100", True),
}
# Tables of the READMEs of the authors' code. The READMEs repeat many cells of the papers' tables.
# A README's table is therefore shown only if a run is of another method than KD.
README_TABLES = {
    "CRD README CIFAR-100 identical": ("identical architectures, CIFAR-100", True),
    "CRD README CIFAR-100 distinct": ("distinct architectures, CIFAR-100", True),
    "mdistiller README DKD cifar100 (1)": ("identical architectures, CIFAR-100", True),
    "mdistiller README DKD cifar100 (2)": ("distinct architectures, CIFAR-100", True),
    "mdistiller README DKD imagenet": ("ImageNet", True),
    "mdistiller README DOT cifar100": ("CIFAR-100", True),
    "mdistiller README DOT tiny_imagenet": ("Tiny-ImageNet", True),
    "mdistiller README DOT imagenet": ("ImageNet", True),
    "CTKD README CIFAR-100": ("CIFAR-100", True),
    "CTKD README ImageNet": ("ImageNet", True),
    "ReviewKD README ImageNet": ("ImageNet", True),
    "TTM README CIFAR-100 identical": ("identical architectures, CIFAR-100", True),
    "TTM README CIFAR-100 distinct": ("distinct architectures, CIFAR-100", True),
    "TTM README ImageNet": ("ImageNet", True),
    "DIST README CIFAR-100": ("CIFAR-100", True),
    "DIST README ImageNet": ("ImageNet", True),
    "DIST README ImageNet stronger teachers": ("stronger teachers, ImageNet", True),
    "LumiNet README CIFAR-100 identical": ("identical architectures, CIFAR-100", True),
    "LumiNet README CIFAR-100 distinct": ("distinct architectures, CIFAR-100", True),
    "LumiNet README ImageNet": ("ImageNet", True),
    "SKD README CIFAR-100": ("identical architectures, CIFAR-100", True),
}
PAPERS_METRIC = (
    "The papers report the best epoch on the test set, which lay 0.3 points above the last on "
    "average in the LSKD authors' own logs."
)


@dataclass(frozen=True)
class Quantity:
    """Kind of number that a table shows, such as top-1 accuracy (%) or training time (ms a batch).

    The fields say how to read the number from a run, which runs may be averaged, and which means
    may be ranked together.
    """

    label: str  # with the unit, for people
    read: Callable[[Run], float | str]  # returns the number, or the reason why there is none
    note: str = ""  # a sentence for under the table
    decimals: int = 2
    # Settings that runs must share to be averaged.
    settings: tuple[str, ...] = SETTINGS
    # Settings that cells must share to be ranked together. Accuracies on held-out images and on
    # the test set, for example, are not ranked together.
    comparable: tuple[str, ...] = ("val_fraction",)
    lower_is_better: bool = False
    counted: str = "seeds"  # "seeds": each seed counts once; "runs": every run counts
    refusal: str = ""  # why no published number is comparable; "" if some may be
    footnote: Callable[[Run], str] = lambda run: ""  # returns the footnote on a run, or ""


@dataclass(frozen=True)
class Declaration:
    """Description of one table, from which `analysis.tables` builds the table.

    The description holds the runs and published numbers of the table, the functions that put both
    into rows, and the rows over which gains are computed (baselines). The columns are pairs of
    teacher and student.
    """

    name: str  # for the file names of the table
    title: str
    quantity: Quantity
    runs: Sequence[Run]  # all runs that the table shows
    row: Callable[[Run], str]  # returns the name of the row of a run
    label: Callable[[str], str]  # returns the label that people read for the name of a row
    published: Sequence[Published] = ()  # the numbers beside our runs
    # Returns the name of the row of a published number.
    published_row: Callable[[Published], str] = lambda number: number.method
    # Names of the first rows. Rows of published numbers follow, then the others by `sorted_by`.
    order: Sequence[str] = ()
    # Returns the sort key of the name of a row: by default, short names come first.
    sorted_by: Callable[[str], Any] = lambda row: (len(row), row)
    # Returns the names of the rows that are possible baselines of a row, the first choice first.
    baselines: Callable[[str], Sequence[str]] = lambda row: ()
    # Settings that a cell and its baseline must share.
    same: tuple[str, ...] = COMPARABLE


def declare(runs: Sequence[Run], metric: str) -> list[Declaration]:
    """Return the descriptions of all tables that have at least one run.

    Args:
        runs: the runs that count, as `selection.standing` returns them.
        metric: accuracy to show, a key of `selection.METRICS`, such as "best".

    Returns:
        The descriptions, in the order in which the tables are written. Without runs, the list is
        empty.
        1. The tables of the SDD paper.
        2. Ablations and training times in the form of SDD's tables, also of other methods and data
           sets. After these, a table of SD-KD+LS (KD with SDD and LSKD) over the scales.
        3. The tables of the LSKD paper.
        4. The tables in the READMEs of the authors' code.
        5. An overview of each data set. It shows every pair of teacher and student with at least
           one run that no other table of accuracy shows, or with both imported runs and others. If
           no paper reports the data set, it shows all pairs.

    Raises:
        ValueError: If `metric` is not a key of `selection.METRICS`.
    """
    quantity = _accuracy(metric)
    of_papers = [_paper_table(runs, quantity, table) for table in PAPERS_TABLES]
    declared = [
        *(declaration for declaration in of_papers if declaration.name.startswith("sdd")),
        *_by_family(_knowledge, runs, quantity),
        *_by_family(_scales, runs, quantity),
        *_by_family(_weights, runs, quantity),
        *_times(runs),
        _seed_suite(runs, quantity),
        *(declaration for declaration in of_papers if declaration.name.startswith("lskd")),
        _weights_of_lskd(runs, quantity),
        *(_paper_table(runs, quantity, table, ("vanilla", "kd")) for table in README_TABLES),
    ]
    placed = {
        run.config_hash for table in declared if table.quantity is quantity for run in table.runs
    }
    declared += _overviews(runs, quantity, placed)
    return [declaration for declaration in declared if declaration.runs]


# The quantities that are read from a run


def _accuracy(metric: str) -> Quantity:
    """Return the quantity top-1 accuracy (%) of a student.

    For an entry of `_teachers`, the quantity is the accuracy of the teacher. `metric` is a key of
    `METRICS`. Raise ValueError for another metric.
    """
    accuracy_of_student = selection.accuracy(metric)

    def read(run: Run) -> float | str:
        if run.method != "teacher":
            return accuracy_of_student(run)
        if metric == "mAP":
            return "without mAP"
        if run.teacher_top1 is None:
            return "several teachers"
        return run.teacher_top1

    def footnote(run: Run) -> str:
        if not run.val_fraction or metric == "val":
            return ""
        return f"on held-out training images (val_fraction={run.val_fraction}), not on the test set"

    refusal = "" if metric == "best" else "the papers report the best epoch"
    _, label = METRICS[metric]
    return Quantity(label, read, refusal=refusal, footnote=footnote)


MACHINE = ("batch_size", "precision", "compile", "teacher_cache", "environment")
"""Settings that a training time depends on, besides the method."""


def _time() -> Quantity:
    """Return the quantity training time (ms per batch), which only runs that train alone have."""

    def read(run: Run) -> float | str:
        if not run.images_per_s or not run.batch_size or run.group_size is None:
            return "without a time"
        if run.group_size > 1:
            return "trained side by side"
        return 1000 * run.batch_size / run.images_per_s

    return Quantity(
        label="training time (ms per batch)",
        read=read,
        note="1000 * batch size / images per second of the last epoch. Runs trained side by side "
        "are left out, because their time is that of the group; hydra.launcher.max_group_size=1 "
        "trains each alone. Machines are not mixed: each "
        "environment, precision and teacher cache has a row of its own.",
        decimals=1,
        settings=("M", *MACHINE),
        comparable=("source", *MACHINE),
        lower_is_better=True,
        counted="runs",
        refusal="other hardware",
    )


# The tables of the papers


def _paper_table(
    runs: Sequence[Run], quantity: Quantity, table: str, too_few: Sequence[str] = ("vanilla",)
) -> Declaration:
    """Declare a published table with all its methods and pairs.

    Args:
        runs: all runs. The table shows those of its data set, pairs and methods that also have the
            scales and weights of the published number (`protocol.other_method`).
        quantity: the number that the table shows.
        table: name of the table, a key of `PAPERS_TABLES` or `README_TABLES`.
        too_few: methods that do not justify the table. If all runs are of these methods, the table
            shows no run.

    Returns:
        The declaration. It has no runs if none belongs to the table.
    """
    numbers = published.of_table(table)
    about, over_plain = (PAPERS_TABLES | README_TABLES)[table]
    known = {(number.dataset, number.pair, number.method): number for number in numbers}
    pairs = {number.pair: number.student for number in numbers}

    def belongs(run: Run) -> bool:
        number = known.get((run.dataset, run.pair, run.method))
        return number is not None and run.knowledge == "fusion" and not other_method(run, number)

    tricks = (_plain, _one_scale) if over_plain else (_one_scale, _plain)
    ours = [run for run in beside_pairs(runs, pairs) if belongs(run)]
    if all(run.method in too_few for run in ours):
        ours = []
    return Declaration(
        name=re.sub(r"[^a-z0-9.]+", "_", table.lower()).strip("_"),
        title=f"{table}: {about}",
        quantity=quantity,
        runs=[*_teachers(ours), *ours],
        row=lambda run: run.method,
        label=method_name,
        published=numbers,
        sorted_by=reading_order,
        baselines=lambda row: _counterparts(row, tricks),
    )


def _weights_of_lskd(runs: Sequence[Run], quantity: Quantity) -> Declaration:
    """Declare LSKD Table 4: KD by weight, on the logits z, z - mean, z / std and (z - mean) / std.

    Our runs have the logits z (KD) or (z - mean) / std (KD+LS). The softmax ignores a constant that
    is added to all logits. So KD on z - mean is KD on z, and KD on z / std is KD+LS.
    """
    numbers = published.of_table("LSKD Table 4")
    pairs = {number.pair for number in numbers}
    ours = [
        run
        for run in runs
        if (run.dataset, run.method) in (("cifar100", "kd"), ("cifar100", "kd_ls"))
        and run.pair in pairs
        and (run.temperature, run.ce_weight) == (2.0, 0.1)
    ]

    def row(run: Run) -> str:
        variant = "(z-mean)/std" if run.standardize else "z"
        return f"{variant}, weight {value_name(run.kd_weight)}"

    return Declaration(
        name="lskd_table_4",
        title="LSKD Table 4: weight of the loss of KD and KD+LS at T=2, CIFAR-100",
        quantity=quantity,
        runs=ours,
        row=row,
        label=str,
        published=numbers,
        published_row=lambda number: f"{number.variant}, weight {value_name(number.kd_weight)}",
        baselines=lambda name: [name.replace("(z-mean)/std", "z")] if name[0] == "(" else [],
        same=_all_but("standardize"),
    )


def _knowledge(runs: Sequence[Run], quantity: Quantity, dataset: str, family: str) -> Declaration:
    """Declare the ablation of SDD's knowledge: of consistent regions, complementary ones, or both.

    The baseline is the same method on the whole map (M=[1]). The arguments are those that
    `_by_family` passes to its `declare`.
    """

    def row(run: Run) -> str:
        return "none" if run.M == "[1]" else run.knowledge

    several = _controlled([run for run in runs if run.M != "[1]"], "knowledge")
    plain = [
        run
        for run in runs
        if run.M == "[1]"
        and run.knowledge == "fusion"
        and any(agree(run, other, PLAIN_SAME) for other in several)
    ]
    return Declaration(
        name=f"knowledge_{dataset}_{family}",
        title=f"Decoupled knowledge (form of SDD Table 6): {method_name(family)} on {dataset}",
        quantity=quantity,
        runs=several + plain,
        row=row,
        label=lambda row: f"none ({method_name(family)})" if row == "none" else row,
        published=_of_plain_kd("SDD Table 6", dataset, family),
        published_row=lambda number: number.variant,
        order=("none", "consistent", "complementary", "fusion"),
        baselines=_always("none"),
        same=PLAIN_SAME,
    )


def _scales(runs: Sequence[Run], quantity: Quantity, dataset: str, family: str) -> Declaration:
    """Declare the ablation of the scales M, with the whole map (M=[1]) as its baseline.

    The arguments are those that `_by_family` passes to its `declare`.
    """
    ours = _scale_runs(runs)
    in_seed_suite = {run.pair for run in ours} <= set(SEED_PAIRS)
    if (dataset, family) == ("cifar100", "kd_ls") and in_seed_suite:
        ours = []  # the table of the seed suite shows the same
    return Declaration(
        name=f"scales_{dataset}_{family}",
        title=f"Scales (form of SDD Table 7): {method_name(family)} on {dataset}",
        quantity=quantity,
        runs=ours,
        row=lambda run: run.M,
        label=lambda row: f"M = {row}",
        published=_of_plain_kd("SDD Table 7", dataset, family),
        published_row=lambda number: number.M,
        sorted_by=scales_order,
        baselines=_always("[1]"),
        same=_all_but("M"),
    )


def _weights(runs: Sequence[Run], quantity: Quantity, dataset: str, family: str) -> Declaration:
    """Declare the ablation of the weight of complementary regions, with weight 1 as baseline.

    The arguments are those that `_by_family` passes to its `declare`.
    """
    fused = [run for run in runs if run.M != "[1]" and run.knowledge == "fusion"]
    return Declaration(
        name=f"weights_{dataset}_{family}",
        title="Weight of complementary regions (form of SDD Table 8): "
        f"{method_name('sd_' + family)} on {dataset}",
        quantity=quantity,
        runs=_controlled(fused, "complementary_weight"),
        row=lambda run: value_name(run.complementary_weight),
        label=lambda row: f"weight {row}",
        published=_of_plain_kd("SDD Table 8", dataset, family),
        published_row=lambda number: number.beta,
        sorted_by=_numbers_first,
        baselines=_always("1"),
        same=_all_but("complementary_weight"),
    )


def _times(runs: Sequence[Run]) -> Iterator[Declaration]:
    """Declare a table of training times for each data set with times that can be compared.

    If the runs are of several methods, runs of two of them must have trained alone on one machine.
    """
    quantity = _time()
    finished = [run for run in runs if run.status == "FINISHED"]
    timed = [run for run in finished if _is_number(quantity.read(run))]
    for dataset in sorted({run.dataset for run in timed}):
        methods = {run.method for run in finished if run.dataset == dataset}
        by_machine: dict[tuple[Any, ...], set[str]] = defaultdict(set)
        for run in timed:
            if run.dataset == dataset:
                by_machine[tuple(getattr(run, name) for name in MACHINE)].add(run.method)
        if len(methods) > 1 and all(len(alone) == 1 for alone in by_machine.values()):
            continue
        numbers = []
        if dataset == "cifar100":
            numbers = published.of_table("SDD Table 9", "ms_per_batch")
        yield Declaration(
            name=f"time_{dataset}",
            title=f"Training time (form of SDD Table 9) on {dataset}",
            quantity=quantity,
            runs=[run for run in finished if run.dataset == dataset],
            row=lambda run: run.method or "unknown",
            label=method_name,
            published=numbers,
            sorted_by=reading_order,
        )


def _seed_suite(runs: Sequence[Run], quantity: Quantity) -> Declaration:
    """Declare the table of SD-KD+LS over the scales, on the pairs `SEED_PAIRS` of CIFAR-100.

    No paper reports this method. The published numbers of its parts, KD+LS and SD-KD, have rows of
    their own.
    """

    def label(row: str) -> str:
        return f"M = {row}" if row.startswith("[") else f"{method_name(row)}, of the papers"

    family = [
        run for run in runs if run.dataset == "cifar100" and run.method in ("kd_ls", "sd_kd_ls")
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
        # Table 7 also repeats numbers of Table 2.
        if table != "SDD Table 7" or (number.pair, number.M) == ("resnet32x4_resnet8x4", "[1,2]")
    ]
    return Declaration(
        name="seed_suite",
        title="Seed suite: SD-KD+LS over scales, CIFAR-100",
        quantity=quantity,
        runs=[run for run in _scale_runs(family) if run.pair in SEED_PAIRS],
        row=lambda run: run.M,
        label=label,
        published=sorted(parts, key=lambda number: SEED_PAIRS.index(number.pair)),
        order=("[1]", "[1,2]", "[1,4]", "[1,2,4]", "kd_ls", "sd_kd"),
        sorted_by=scales_order,
        baselines=lambda row: ["[1]"] if row.startswith("[") and row != "[1]" else [],
        same=_all_but("M"),
    )


# The overviews


def _overviews(runs: Sequence[Run], quantity: Quantity, placed: set[str]) -> Iterator[Declaration]:
    """Declare an overview of the runs on each data set, with one row per method and scales.

    The overview shows the pairs that have a run in none of the other tables, with all their runs.
    It also shows the pairs with runs of several sources, as another table may have those of one
    alone. If no paper reports the data set, the overview shows all pairs.

    Args:
        runs: all runs.
        quantity: the accuracy to show.
        placed: config_hashes of the runs that other tables of accuracy show.

    Yields:
        One declaration per data set. It has no runs if the overview shows no pair.
    """
    reported = {number.dataset for number in published.numbers()}
    for dataset in sorted({run.dataset for run in runs}):
        here = [run for run in runs if run.dataset == dataset]
        pairs = {run.pair: run.student for run in here if run.teacher != "none"}
        here = beside_pairs(here, pairs)
        shown = {
            run.pair for run in here if dataset not in reported or run.config_hash not in placed
        }
        shown |= {pair for pair in pairs if len({r.source for r in here if r.pair == pair}) > 1}
        here = [run for run in here if run.pair in shown]
        yield Declaration(
            name=f"overview_{dataset}",
            title=f"Methods and scales on {dataset}",
            quantity=quantity,
            runs=[*_teachers(here), *here],
            row=lambda run: row_key(run.method, run.M),
            label=row_name,
            sorted_by=reading_order,
            baselines=_overview_baselines,
        )


def _overview_baselines(row: str) -> list[str]:
    method, blank, scales = row.partition(" [")
    shorter = _without_last(method)
    with_scales = [f"{shorter}{blank}{scales}"] if shorter else []

    def plain(method: str) -> str | None:
        """Return the method without standardisation, and with the scales of the row."""
        return f"{one}{blank}{scales}" if (one := _plain(method)) else None

    return [*with_scales, *_counterparts(method, (_one_scale, plain, _plain))]


# Groups of runs


def _by_family(
    declare: Callable[[Sequence[Run], Quantity, str, str], Declaration],
    runs: Sequence[Run],
    quantity: Quantity,
) -> Iterator[Declaration]:
    """Declare one table for each data set and family of methods.

    A family is a method without its scales, such as KD or KD+LS. Runs of an unknown method belong
    to no family, nor do runs without a loss of the logits.

    Args:
        declare: returns the declaration of a data set and family. It receives the runs of the
            family on the data set, `quantity`, the data set and the family.
        runs: all runs.
        quantity: the number that the tables show.

    Yields:
        The declarations, sorted by data set and family.
    """
    families = defaultdict(list)
    for run in runs:
        if run.method and run.distiller not in NO_LOGIT_LOSS:
            parts = {part: getattr(run, part) for part in METHOD_PARTS}
            family = method_of(**{**parts, "M": "[1]"})
            families[run.dataset, family].append(run)
    for (dataset, family), members in sorted(families.items()):
        yield declare(members, quantity, dataset, family)


def _groups(runs: Iterable[Run], but: tuple[str, ...]) -> list[list[Run]]:
    """Group the runs that share source, pair and every setting of `SETTINGS` but those in `but`."""
    names = [name for name in ("source", "pair", *SETTINGS) if name not in but]
    groups = defaultdict(list)
    for run in runs:
        groups[tuple(getattr(run, name) for name in names)].append(run)
    return list(groups.values())


def _controlled(runs: Iterable[Run], factor: str) -> list[Run]:
    """Return each run that has a counterpart: a run that differs in the setting `factor` only."""
    return [
        run
        for group in _groups(runs, (factor,))
        if len({getattr(run, factor) for run in group}) > 1
        for run in group
    ]


def _scale_runs(runs: Iterable[Run]) -> list[Run]:
    """Return each run that has a counterpart: a run that differs in the scales M only.

    Only runs with both kinds of regions (knowledge "fusion") are considered. If runs with regions
    differ in the weight of complementary regions too, only the weight that ran with the most scales
    is kept. A tie goes to the papers' weight.
    """

    def count(group: Iterable[Run]) -> int:
        return len({run.M for run in group})

    fused = [run for run in runs if run.knowledge == "fusion"]
    kept = []
    for group in _groups(fused, ("M", "complementary_weight")):
        plain = [run for run in group if run.M == "[1]"]
        by_weight = defaultdict(list)
        for run in group:
            if run.M != "[1]":
                by_weight[run.complementary_weight].append(run)
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


def _teachers(runs: Iterable[Run]) -> list[Run]:
    """Return one entry of method "teacher" per pair, with the teacher's accuracy on the test set.

    The accuracy is None if the runs of a pair recorded different ones. Runs with held-out images
    are ignored. A pair has no entry if none of its other runs recorded the accuracy.
    """
    found: dict[str, dict[float, Run]] = defaultdict(dict)  # by pair and accuracy of the teacher
    for run in runs:
        if run.teacher_top1 is not None and not run.val_fraction:
            found[run.pair][run.teacher_top1] = run
    teachers = []
    for pair, by_top1 in found.items():
        run = next(iter(by_top1.values()))
        top1 = run.teacher_top1 if len(by_top1) == 1 else None
        teachers.append(
            Run(
                source=run.source,
                dataset=run.dataset,
                teacher=run.teacher,
                student=run.student,
                pair=pair,
                method="teacher",
                status="FINISHED",
                config_hash=f"teacher {pair}",
                teacher_top1=top1,
            )
        )
    return teachers


def _is_number(value: float | str) -> bool:
    return not isinstance(value, str)


def _of_plain_kd(table: str, dataset: str, family: str) -> Sequence[Published]:
    """Return the numbers of an ablation table of SDD for a data set and family.

    These tables are of KD on CIFAR-100. The result is empty for others.
    """
    if (dataset, family) != ("cifar100", "kd"):
        return ()
    return published.of_table(table)


def _numbers_first(row: str) -> tuple[bool, float]:
    """Return the sort key of a row that is named after a number, or "unknown"."""
    if row.replace(".", "", 1).isdecimal():
        return False, float(row)
    return True, 0.0


def _all_but(setting: str) -> tuple[str, ...]:
    """Return the source and all settings but one: what a cell shares with its baseline."""
    return ("source", *(name for name in SETTINGS if name != setting))


def _always(baseline: str) -> Callable[[str], Sequence[str]]:
    """Return a function that maps a row to [`baseline`], and the baseline itself to []."""
    return lambda row: [] if row == baseline else [baseline]


def _counterparts(method: str, tricks: Sequence[Callable[[str], str | None]]) -> list[str]:
    """Return the methods that a method may be compared with, the first choice first.

    The choices are the method without its last loss, the method without each trick, the student
    alone, and KD. The student alone and the teacher are compared with nothing.

    Args:
        method: the method, as `schema.method_of` spells it.
        tricks: functions that return the method without a trick (None if the method does not have
            the trick), the first choice first.
    """
    if method in ("vanilla", "teacher"):
        return []
    found = [_without_last(method), *(trick(method) for trick in tricks), "vanilla", "kd"]
    return [one for one in dict.fromkeys(found) if one and one != method]


def _plain(method: str) -> str | None:
    """Return the method without standardisation, or None if the method does not standardise."""
    return next(
        (method.removesuffix(suffix) for suffix in SUFFIXES if method.endswith(suffix)), None
    )


def _without_last(method: str) -> str | None:
    """Return a sum of losses without its last loss, or None if the method is a single loss."""
    whole = "kd+dot" if method == "kd_dot" else method
    return whole.rpartition("+")[0] or None


def _one_scale(method: str) -> str | None:
    """Return the method on the whole map, `kd` for `sd_kd`, or None if `method` has no `sd_`."""
    return method.removeprefix("sd_") if method.startswith("sd_") else None
