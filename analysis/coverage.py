"""Count how much of what the papers print can be run here, was run, and agrees.

Recipes, networks and data sets are files of `conf`. They are looked up when the coverage is
computed.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import published
from .cells import Cell, Table
from .names import method_name
from .published import Published

__all__ = ["Cover", "available", "cover", "lines", "reason_without_recipe", "recipe_of"]

# `conf` is beside `analysis` in a checkout, and beside `sddlskd.analysis` in a wheel.
CONF = Path(__file__).parents[1] / "conf"
GROUPS = ("recipe", "dataset", "teacher", "student")
"""Folders of `CONF` that a published number is looked up in."""
RECIPES = {
    "teacher": "vanilla",  # a teacher is a student that was trained alone
    "kd_dot": "dot",
}
"""Recipes whose name is not that of the published method."""
DECIDED = ("within", "above", "below")
"""Verdicts that decide whether our number reproduces the published one."""
HEADER = ("table", "cells", "recipe", "run", "verdict", *DECIDED)


@dataclass(frozen=True)
class Cover:
    """A published number, and what there is of it here."""

    number: Published
    lacks: str  # why no recipe can give the number; "" if one can
    runs: int  # runs whose means stand beside the number in its table
    verdict: str  # one of DECIDED, or ""


def recipe_of(method: str) -> str:
    """Return the name of the recipe of a published method, such as `sd_kd_crd` for `sd_kd+crd`."""
    return RECIPES.get(method, method.replace("+", "_"))


def available() -> dict[str, Collection[str]]:
    """Return the names of the recipes, data sets, teachers and students, by group of `GROUPS`.

    Raise ValueError if there is no folder of recipes.
    """
    if not (CONF / "recipe").is_dir():
        raise ValueError(f"no recipes in {CONF}; run the analysis of a checkout or of a wheel")
    return {group: {path.stem for path in (CONF / group).glob("*.yaml")} for group in GROUPS}


def reason_without_recipe(number: Published, names: Mapping[str, Collection[str]]) -> str:
    """Return why no recipe can train what a number was measured on, or "" if one can.

    Args:
        number: the published number.
        names: what there is, as `available` returns it.
    """
    if recipe_of(number.method) not in names["recipe"]:
        return f"no recipe {recipe_of(number.method)}"
    if number.dataset not in names["dataset"]:
        return f"no data set {number.dataset}"
    for group, network in (("teacher", number.teacher), ("student", number.student)):
        if not {network, f"{number.dataset}_{network}"} & set(names[group]):
            return f"no {group} {network}"
    return ""


def cover(built: Iterable[Table]) -> list[Cover]:
    """Return what there is of every published number, in the order of `published.numbers`.

    Args:
        built: the tables of all runs, as `tables.build` makes them.
    """
    names = available()
    cells: dict[Published, list[Cell]] = defaultdict(list)
    for table in built:
        if table.name != "seed_suite":  # which compares another method with the numbers
            for cell in table.cells.values():
                if cell.published:
                    cells[cell.published].append(cell)
    found = []
    for number in published.numbers():
        verdicts = [cell.verdict for cell in cells[number] if cell.verdict in DECIDED]
        found.append(
            Cover(
                number=number,
                lacks=reason_without_recipe(number, names),
                runs=sum(cell.n for cell in cells[number]),
                verdict=next(iter(verdicts), ""),
            )
        )
    return found


def lines(covers: Sequence[Cover]) -> Iterator[str]:
    """Yield the lines of the report: a table of counts, and the numbers without a recipe."""
    of_table: dict[str, list[Cover]] = defaultdict(list)
    of_file: dict[str, list[Cover]] = defaultdict(list)
    for one in covers:
        of_table[one.number.table].append(one)
        of_file[one.number.file].append(one)
    rows: list[tuple[str, ...]] = [HEADER]
    rows += [_counts(table, members) for table, members in of_table.items()]
    rows += [_counts(f"all of {file}", members) for file, members in of_file.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *counts in rows:
        shown = [text.rjust(width) for text, width in zip(counts, widths[1:], strict=True)]
        yield "  ".join([name.ljust(widths[0]), *shown])
    yield ""
    yield "verdict: our runs decide that the number is within their interval, above or below."
    yield "No table shows top-5 accuracies, single logs and ViT students: they have no verdict."
    yield from _without_recipe([one for one in covers if one.lacks])


def _counts(name: str, covers: Collection[Cover]) -> tuple[str, ...]:
    verdicts = Counter(one.verdict for one in covers)
    counts = (
        len(covers),
        sum(not one.lacks for one in covers),
        sum(one.runs > 0 for one in covers),
        sum(verdicts[verdict] for verdict in DECIDED),
        *(verdicts[verdict] for verdict in DECIDED),
    )
    return (name, *map(str, counts))


def _without_recipe(covers: Sequence[Cover]) -> Iterator[str]:
    """Yield a line for each reason, with the tables and methods of its numbers."""
    if not covers:
        yield "Every number has a recipe."
        return
    yield f"{len(covers)} numbers without a recipe:"
    of_reason: dict[str, list[Published]] = defaultdict(list)
    for one in covers:
        of_reason[one.lacks].append(one.number)
    for reason, numbers in of_reason.items():
        tables = dict.fromkeys(number.table for number in numbers)
        methods = dict.fromkeys(method_name(number.method) for number in numbers)
        yield f"  {len(numbers):3} {reason}: {', '.join(methods)} in {', '.join(tables)}"
