"""Count the published numbers that have a recipe here, runs of ours, and a verdict.

A recipe is a file of `conf/recipe` that configures one method. Data sets and networks are files of
`conf` too. A verdict says how the mean of our runs compares with the number (`stats.verdict`).
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import published
from .cells import Cell, Table
from .names import counted, method_name
from .published import Published

__all__ = ["Cover", "available", "cover", "lines", "reason_without_recipe", "recipe_of"]

# `conf` is beside `analysis` in a checkout, and beside `sddlskd.analysis` in a wheel.
CONF = Path(__file__).parents[1] / "conf"
GROUPS = ("recipe", "dataset", "teacher", "student")
"""Folders of `CONF` with the files that a run of a published number needs, one from each."""
RECIPES = {
    "teacher": "vanilla",  # a teacher is a student that was trained alone
    "kd_dot": "dot",
    "kd_ls_batch": "luminet",
    "kd_ls_scaled": "normkd",
}
"""Recipe of each published method, if the names of recipe and method differ."""
DECIDED = ("within", "above", "below")
"""Verdicts that decide whether our number reproduces the published one."""
HEADER = ("table", "cells", "recipe", "run", "verdict", *DECIDED)


@dataclass(frozen=True)
class Cover:
    """Published number, and whether there are a recipe, runs and a verdict for it.

    A recipe is a configuration in conf/recipe that trains one method. The verdict says how the runs
    compare with the number, as `stats.verdict` returns it.
    """

    number: Published
    lacks: str  # why no recipe can give the number; "" if one can
    runs: int  # number of our runs in the table cells that show the number
    verdict: str  # first verdict of these cells that is one of DECIDED; "" if there is none


def recipe_of(method: str) -> str:
    """Return the name of the recipe of a published method: "sd_kd_crd" for "sd_kd+crd".

    A recipe is a file conf/recipe/NAME.yaml that configures one method. The name is that of the
    method with "_" for "+", except for the methods in `RECIPES`: "vanilla" is the recipe of
    "teacher". Whether the file exists is not checked.
    """
    return RECIPES.get(method, method.replace("+", "_"))


def available() -> dict[str, Collection[str]]:
    """Return the names of the recipes, data sets, teachers and students that can be configured.

    A name is that of a file in the folder `conf`, without the suffix .yaml. The result maps each of
    "recipe" (configuration of a method), "dataset", "teacher" and "student" to its names. Raises
    ValueError if there is no folder conf/recipe.
    """
    if not (CONF / "recipe").is_dir():
        raise ValueError(f"no recipes in {CONF}; run the analysis of a checkout or of a wheel")
    return {group: {path.stem for path in (CONF / group).glob("*.yaml")} for group in GROUPS}


def reason_without_recipe(number: Published, names: Mapping[str, Collection[str]]) -> str:
    """Return what a run of a published number lacks, such as "no recipe wcord"; "" for nothing.

    The text names the first part that has no configuration: the recipe (configuration of the
    method), the data set, the teacher or the student. The name of a network in `names` may begin
    with the data set: "imagenet_resnet18".

    Args:
        number: the published number.
        names: names of the configurations by kind, as `available` returns them.
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
    """Return a `Cover` for every published number, in the order of `published.numbers`.

    Args:
        built: tables of the runs, as `tables.build` returns them. Without tables, no number has
            runs or a verdict. The table "seed_suite" is ignored.

    Raises:
        ValueError: If there is no folder conf/recipe.
    """
    names = available()
    cells: dict[Published, list[Cell]] = defaultdict(list)
    for table in built:
        # The seed suite shows published numbers of other methods than its own.
        if table.name != "seed_suite":
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
    """Yield the lines of a report that counts the published numbers with recipe, run and verdict.

    The report has three parts:

    - a heading, then one line for each published table and for each file of published numbers. The
      line counts the numbers of this table or file, and those of them that have a recipe
      (configuration of the method), a run, a verdict, and each of the verdicts in `DECIDED`;
    - an explanation of the verdicts;
    - the number of numbers without a recipe, then one line for each reason why there is none.

    No line ends with a line break.

    Args:
        covers: the published numbers to count, as `cover` returns them.
    """
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
    yield (
        "verdict: our runs decide that their mean is above or below the number, or that the number "
        "is within their interval."
    )
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
    """Yield a heading, and a line for each reason why numbers have no recipe.

    A line names the methods and the published tables of its numbers.

    Args:
        covers: the numbers without a recipe. If there are none, one line says so.
    """
    if not covers:
        yield "Every number has a recipe."
        return
    yield f"{counted(len(covers), 'number')} without a recipe:"
    of_reason: dict[str, list[Published]] = defaultdict(list)
    for one in covers:
        of_reason[one.lacks].append(one.number)
    for reason, numbers in of_reason.items():
        tables = dict.fromkeys(number.table for number in numbers)
        methods = dict.fromkeys(method_name(number.method) for number in numbers)
        yield f"  {len(numbers):3} {reason}: {', '.join(methods)} in {', '.join(tables)}"
