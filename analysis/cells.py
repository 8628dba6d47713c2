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
    """Content of one cell of a table: the numbers of our runs, and the number the paper prints."""

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
        """Return the number of `values`: the seeds (or runs) that the mean is taken over."""
        return len(self.values)

    @property
    def seeds(self) -> list[int]:
        """Return the seeds that have a value, in ascending order; runs without one are skipped."""
        return sorted(key for key in self.values if isinstance(key, int))


@dataclass(frozen=True)
class Table:
    """Table with its cells, notes and commands, ready to be rendered."""

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

    @cached_property
    def footnotes(self) -> dict[str, int]:
        """Return the number of each footnote by its text.

        Numbers start at 1, in the order in which the texts occur in the cells, row by row. Cells
        with the same text share a number.
        """
        cells = (self.cells[row, column] for row in self.rows for column in self.columns)
        texts = dict.fromkeys(
            text for cell in cells for texts in cell.footnotes.values() for text in texts
        )
        return {text: i for i, text in enumerate(texts, start=1)}
