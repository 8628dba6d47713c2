"""Lay out tables for the terminal: lines break between words only, as far as there is room."""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["fitting_table"]

LEAST = 12  # characters of a column whose words may be broken; it gets more if there is room


def fitting_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, str]],
    room: int,
    foldable: Collection[str] = (),
) -> "tuple[Table, int]":
    """Return a table that breaks no word, and its width in characters.

    If the table is wider than `room` with a blank on both sides of each cell, it has none.

    Args:
        title: title above the table.
        columns: headings, in order; at least one.
        rows: text of each cell by its heading. A text may have blanks, at which it may be broken.
        room: width of the terminal in characters.
        foldable: headings of columns with words that may be broken, such as addresses.

    Returns:
        The table and its width. The width is above `room` if the longest words of all columns need
        more.
    """
    from rich.table import Table

    width = padding = 0
    widths: dict[str, int] = {}
    for padding in (1, 0):
        borders = len(columns) * (1 + 2 * padding) + 1
        widths = _widths(columns, rows, room - borders, foldable)
        width = sum(widths.values()) + borders
        if width <= room:
            break
    table = Table(title=title, title_justify="left", padding=(0, padding))
    for column in columns:
        table.add_column(column, width=widths[column], overflow="fold")
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    return table, width


def _widths(
    columns: Sequence[str],
    rows: Sequence[Mapping[str, str]],
    room: int,
    foldable: Collection[str],
) -> dict[str, int]:
    """Return the width of each column: `room` in sum at most, or more if a word would be broken.

    The arguments are those of `fitting_table`, but `room` is without the borders.
    """
    from rich.cells import cell_len

    widths: dict[str, int] = {}
    least: dict[str, int] = {}
    for column in columns:
        texts = [column, *(row[column] for row in rows)]
        widths[column] = max(map(cell_len, texts))
        least[column] = max(cell_len(word) for text in texts for word in text.split())
        if column in foldable:
            least[column] = min(least[column], LEAST)
    narrowed: set[str] = set()
    while sum(widths.values()) > room and widths != least:
        # The column with the most room to lose gives a character, and goes on: the lines of a
        # second column need not be broken, too.
        giving = max(
            (column for column in columns if widths[column] > least[column]),
            key=lambda column: (column in narrowed, widths[column] - least[column]),
        )
        narrowed.add(giving)
        widths[giving] -= 1
    return widths
