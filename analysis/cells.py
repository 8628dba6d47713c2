"""Define what a table is made of, before it is rendered."""

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
    """The results of the runs of one row and column, and the number that the paper prints there."""

    # By seed, or by the config_hash if runs are counted or the run has no seed.
    values: Mapping[int | str, float] = field(default_factory=dict)
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
    cells: Mapping[Key, Cell]  # by row and column
    notes: tuple[str, ...]
    commands: tuple[str, ...]  # that run the missing, failed and stopped runs
    # The gains of a row over all columns, for rows with a gain in at least two.
    aggregates: Mapping[str, stats.Aggregate] = field(default_factory=dict)

    @cached_property
    def footnotes(self) -> dict[str, int]:
        """Return the number of each footnote text, from 1 in the order of the cells."""
        cells = (self.cells[row, column] for row in self.rows for column in self.columns)
        texts = dict.fromkeys(
            text for cell in cells for texts in cell.footnotes.values() for text in texts
        )
        return {text: i for i, text in enumerate(texts, start=1)}
