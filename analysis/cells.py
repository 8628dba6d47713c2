"""Define tables and their cells as data, before they are rendered as text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from . import stats
from .published import PrintedGain, Published
from .selection import Gain

__all__ = ["Cell", "Key", "Table"]

Key = tuple[str, str]  # labels of a row and of a column


@dataclass(frozen=True)
class Cell:
    """Cell of a table of results: the numbers of the runs of one row, on one pair of networks.

    A row is, for example, a method. A column is a pair of teacher and student. Numbers are, for
    example, top-1 accuracies (%). A cell may also hold the number that a paper prints, the verdict
    on how our mean compares with that number, and the gain over a baseline, another row.
    """

    # Numbers of the runs by seed. The key is the config_hash for a run without a seed, and for all
    # runs in a table that counts runs instead of seeds.
    values: Mapping[int | str, float] = field(default_factory=dict)
    mean: float | None = None  # of `values`; None if there are none
    std: float | None = None  # sample standard deviation; None for fewer than two values
    planned: int = 0  # number of seeds (or runs) of any status, also of those without a value
    troubles: tuple[str, ...] = ()  # why values are missing, as "1 failed"
    rank: str = ""  # best, second or ""
    published: Published | None = None
    published_gain: PrintedGain | None = None
    verdict: str = ""  # as `stats.verdict` returns it, "not comparable", or "" for none
    gain: Gain | None = None  # over the baseline of the row
    # Texts of the footnotes by the line of the cell: ours, published, gain or verdict.
    footnotes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Values of the source, the pair and the settings that all runs of the cell share, by name.
    # Empty for a cell without runs.
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """Return the number of `values`, over which `mean` is taken; 0 if no run has a number."""
        return len(self.values)

    @property
    def seeds(self) -> list[int]:
        """Return the seeds of the numbers in `values`, in ascending order.

        Numbers of runs without a seed are skipped. The list is empty in a table that counts runs
        instead of seeds.
        """
        return sorted(key for key in self.values if isinstance(key, int))


@dataclass(frozen=True)
class Table:
    """Table of results, ready to be written as Markdown, LaTeX, HTML or CSV.

    A row is, for example, a method; a column is a pair of teacher and student. The notes stand
    below the table and explain its numbers. The commands are shell commands that run missing,
    failed and stopped runs.
    """

    name: str  # for file names and anchors
    title: str
    quantity: str  # label of the numbers, with their unit
    counted: str  # what the n of a cell counts: seeds or runs
    decimals: int  # digits after the point
    rows: tuple[str, ...]  # labels, in order
    columns: tuple[str, ...]  # labels, in order
    cells: Mapping[Key, Cell]  # by row and column
    notes: tuple[str, ...]
    commands: tuple[str, ...]  # commands that run the missing, failed and stopped runs
    # Mean gain over all columns by row label. A row has one if at least two columns have a gain,
    # all over the same baseline method.
    aggregates: Mapping[str, stats.Aggregate] = field(default_factory=dict)
    baselines: frozenset[str] = frozenset()  # labels of the rows that the user compares others with

    @cached_property
    def footnotes(self) -> dict[str, int]:
        """Return a mapping from the text of each footnote to its number: 1, 2, 3, ...

        The numbers follow the order in which the texts first occur in the cells, row by row. Cells
        with the same text share a number. Without footnotes, the mapping is empty.
        """
        cells = (self.cells[row, column] for row in self.rows for column in self.columns)
        texts = dict.fromkeys(
            text for cell in cells for texts in cell.footnotes.values() for text in texts
        )
        return {text: i for i, text in enumerate(texts, start=1)}
