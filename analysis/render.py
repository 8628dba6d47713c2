"""Render a table as Markdown, LaTeX, HTML or CSV, or as text for a terminal.

In Markdown, LaTeX and text, a row of the table takes up to seven lines: our result, the published
number, our gain, its interval, its p-value, the published gain and the verdict. HTML stacks these
lines in the cell, so that rows can be sorted. CSV has one line per cell, with unrounded numbers.
"""

import csv as csv_module
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from .cells import Cell, Table
from .names import counted
from .stats import Difference

__all__ = ["CSV_COLUMNS", "FORMATS", "csv", "html", "latex", "markdown", "text"]

EMPTY = "–"
MISSING = "Commands that run the missing and failed runs:"
# Largest number of columns in a LaTeX float, and number of lines after which the next row of the
# table starts a new float.
COLUMNS_A_FLOAT = 4
LINES_A_FLOAT = 45
UNLIMITED = 10_000  # characters in a line, more than any table has
NOTES_WIDTH = 100  # largest number of characters in a line of the notes of a text
KINDS = {
    "published": "published",
    "gain": "gain",
    "interval": "95 %",
    "p": "Holm p",
    "verdict": "against the published",
    "published-gain": "published gain",
}
CSV_COLUMNS = (
    "table",
    "row",
    "column",
    "quantity",
    "mean",
    "std",
    "n",
    "planned",
    "seeds",
    "troubles",
    "rank",
    "published",
    "published_in",
    "flag",
    "published_gain",
    "gain_over",
    "gain",
    "gain_n",
    "gain_n_base",
    "gain_test",
    "ci_low",
    "ci_high",
    "p",
    "p_holm",
    "gain_verdict",
    "p_better",
    "verdict",
    "footnotes",
)


@dataclass(frozen=True)
class Text:
    """Line of text in a cell of a table, such as a mean or a p-value, before markup is added."""

    kind: str  # ours, published, gain, interval, p, published-gain or verdict
    text: str
    rank: str = ""  # best, second or ""
    marks: tuple[int, ...] = ()  # numbers of footnotes


@dataclass(frozen=True)
class Line:
    """Line of a table in Markdown or LaTeX: a label, and a text or None for each column."""

    label: str
    head: bool  # whether the line is the first of a row
    # One per column, and one for all pairs if the table has gains over all pairs; None for a column
    # without this line
    texts: tuple[Text | None, ...]


ALL_PAIRS = "all pairs"
"""Heading of the column with the gains over all pairs of teacher and student."""


def _ours(cell: Cell, table: Table) -> str:
    """Return our mean, standard deviation and count, such as "75.10 ± 0.20 (3)".

    If runs are without a number, the count says how many and why: "(2/3 seeds, 1 failed)".
    """
    number = "" if cell.mean is None else f"{cell.mean:.{table.decimals}f}"
    spread = "" if cell.std is None else f" ± {cell.std:.{table.decimals}f}"
    if cell.n == cell.planned and not cell.troubles:
        return f"{number}{spread} ({cell.n})"
    counts = ", ".join([f"{cell.n}/{cell.planned} {table.counted}", *cell.troubles])
    if not number:
        return counts
    return f"{number}{spread} ({counts})"


def _texts(cell: Cell, table: Table) -> Iterator[Text]:
    """Yield the lines of text that a cell has, from our result to the verdict."""

    def text(kind: str, body: str, rank: str = "") -> Text:
        marks = tuple(table.footnotes[note] for note in cell.footnotes.get(kind, ()))
        return Text(kind, body, rank, marks)

    if cell.planned:
        yield text("ours", _ours(cell, table), cell.rank)
    if cell.published:
        yield text("published", f"{cell.published.value:.{table.decimals}f}")
    if cell.gain:
        found = cell.gain.difference
        p = cell.gain.p_holm
        yield text("gain", f"{found.mean:+.2f} ({_counts(found)})")
        if found.low is not None and found.high is not None and p is not None:
            yield text("interval", f"[{found.low:+.2f}, {found.high:+.2f}]")
            shown_p = f"{p:.3f}" if p >= 0.001 else "<0.001"
            yield text("p", f"{shown_p} {cell.gain.verdict}")
        else:
            reason = "single seed" if min(found.n, found.n_base) == 1 else "no spread"
            yield text("interval", f"{reason}: no interval")
    if cell.published_gain:
        yield text("published-gain", f"{cell.published_gain.difference:+.2f}")
    if cell.verdict:
        yield text("verdict", cell.verdict)


def _counts(found: Difference) -> str:
    """Return the numbers of runs behind a difference: "3" for 3 on each side, else "5 and 3"."""
    if found.n == found.n_base:
        return str(found.n)
    return f"{found.n} and {found.n_base}"


def _aggregate(table: Table, row: str) -> dict[str, Text]:
    """Return the lines of text of a row in the column of all pairs, by kind.

    The result is {} if the row has no gain over all pairs.
    """
    found = table.aggregates.get(row)
    if found is None:
        return {}
    texts = {
        "gain": f"{found.gain:+.2f} ({counted(found.pairs, 'pair')})",
        "p": f"P(better) {found.improvement:.2f}",
    }
    if found.low is not None:
        texts["interval"] = f"[{found.low:+.2f}, {found.high:+.2f}]"
    return {kind: Text(kind, text) for kind, text in texts.items()}


def _headings(table: Table, columns: Sequence[str]) -> list[str]:
    """Return the headings of some columns of a table.

    The heading of the column of all pairs follows if `columns` ends with the last column of the
    table, and the table has gains over all pairs.
    """
    if table.aggregates and columns[-1] == table.columns[-1]:
        return [*columns, ALL_PAIRS]
    return list(columns)


def _over(table: Table, row: str, columns: Sequence[str]) -> str:
    """Return the labels of the baselines of the gains of a row in these columns, joined by " or ".

    The result is "" if the row has no gain there.
    """
    return " or ".join(
        dict.fromkeys(gain.over for column in columns if (gain := table.cells[row, column].gain))
    )


def _heading_of(table: Table, row: str) -> str:
    """Return the label of a row as it is shown, which names a baseline that the user chose."""
    return f"{row} (baseline)" if row in table.baselines else row


def _lines(table: Table, columns: Sequence[str]) -> Iterator[Line]:
    """Yield the lines of every row of a table, restricted to some columns.

    A line that is empty in all columns is left out. If a row has no result of ours, the line of the
    published numbers carries the label of the row.
    """
    for row in table.rows:
        texts = [
            {text.kind: text for text in _texts(table.cells[row, column], table)}
            for column in columns
        ]
        if ALL_PAIRS in _headings(table, columns):
            texts.append(_aggregate(table, row))
        ours = any("ours" in text for text in texts)
        published = "published" if ours else f"{row} (published)"
        labels = {
            "ours": _heading_of(table, row),
            "published": published,
            "gain": f"gain over {_over(table, row, columns)}",
            "interval": "95 % interval",
            "p": "p (Holm)",
            "published-gain": "published gain",
            "verdict": "against the published",
        }
        if any(texts) and not any({"ours", "published"} & text.keys() for text in texts):
            yield Line(row, head=True, texts=(None,) * len(texts))  # for the gain over all pairs
        for kind, label in labels.items():
            if any(kind in text for text in texts):
                head = kind == "ours" or (kind == "published" and not ours)
                yield Line(label, head, tuple(text.get(kind) for text in texts))


def markdown(table: Table) -> str:
    """Return a table as GitHub Markdown: a heading, the table, its footnotes and its notes.

    The commands that run missing and failed runs follow, if there are any. A row of the table takes
    up to seven lines: the mean of our runs, the published number, our gain, its interval, its
    p-value, the published gain and the verdict. The mean of our runs is bold in a cell of rank
    "best" and underlined in a cell of rank "second".
    """

    def shown(text: Text | None) -> str:
        if text is None:
            return EMPTY
        body = _markdown(text.text)
        body = {"best": f"**{body}**", "second": f"<u>{body}</u>"}.get(text.rank, body)
        return body + "".join(f"<sup>{mark}</sup>" for mark in text.marks)

    out = [f"### {_markdown(table.title)}", ""]
    headings = _headings(table, table.columns)
    out.append(f"| {' | '.join(['', *map(_markdown, headings)])} |")
    out.append(f"|:--|{'--:|' * len(headings)}")
    for line in _lines(table, table.columns):
        label = _markdown(line.label) if line.head else f"&nbsp;&nbsp;{_markdown(line.label)}"
        out.append(f"| {' | '.join([label, *map(shown, line.texts)])} |")
    out += [""] + [f"<sup>{i}</sup> {_markdown(text)}  " for text, i in table.footnotes.items()]
    out += [""] + [f"{_markdown(note)}  " for note in table.notes]
    if table.commands:
        out += ["", MISSING, "", "```", *table.commands, "```"]
    return "\n".join(out) + "\n"


def _markdown(text: str) -> str:
    return re.sub(
        r"([\\`*_|\[\]])",
        r"\\\1",
        text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"),
    )


LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    # A bare bracket after the \\ of the line before would open an optional argument.
    "[": "{[}",
    "]": "{]}",
    '"': "''",
    "*": r"{*}",
    "±": r"$\pm$",
    "→": r"$\to$",
    "–": "--",
}


def _latex(text: str) -> str:
    """Return `text` escaped for LaTeX.

    Characters that pdflatex does not know without further packages become question marks.
    """
    return "".join(map(_latex_letter, text))


def _latex_letter(letter: str) -> str:
    if letter in LATEX:
        return LATEX[letter]
    return letter if ord(letter) < 0x180 else "?"


def latex(table: Table) -> str:
    """Return a table as LaTeX: floats, the last of which ends with the footnotes and notes.

    The commands that run missing and failed runs follow there, if there are any. A float is a
    `table` if the table has one column, else a `table*`. It has at most `COLUMNS_A_FLOAT` (4)
    columns of the table and about a page of lines; a larger table is split into several floats. The
    column of the gains over all pairs, if there is one, is added to the floats with the last column
    of the table. The floats use the rules of booktabs, or plain lines if the document does not load
    that package. The mean of our runs is bold in a cell of rank "best" and underlined in a cell of
    rank "second". Characters from U+0180 on that `LATEX` does not list become question marks.
    """

    def shown(text: Text | None) -> str:
        if text is None:
            return _latex(EMPTY)
        # A hyphen before a number is a minus.
        body = "$-$".join(map(_latex, re.split(r"(?<![\w.])-(?=\d)", text.text)))
        by_rank = {"best": rf"\textbf{{{body}}}", "second": rf"\underline{{{body}}}"}
        body = by_rank.get(text.rank, body)
        if not text.marks:
            return body
        return f"{body}$^{{{','.join(map(str, text.marks))}}}$"

    out = [
        r"\providecommand{\toprule}{\hline}\providecommand{\midrule}{\hline}\providecommand{\bottomrule}{\hline}"
    ]
    wide = len(_headings(table, table.columns)) > 1
    kind = "table*" if wide else "table"
    caption = rf"\caption{{{_latex(table.title)}}}\label{{tab:{table.name}}}"
    for start in range(0, len(table.columns), COLUMNS_A_FLOAT):
        columns = table.columns[start : start + COLUMNS_A_FLOAT]
        for lines in _pages(_lines(table, columns)):
            out += [
                rf"\begin{{{kind}}}",
                r"\centering\scriptsize\setlength{\tabcolsep}{3pt}",
                caption,
            ]
            headings = _headings(table, columns)
            out += [rf"\begin{{tabular}}{{l{'r' * len(headings)}}}", r"\toprule"]
            out += [" & ".join(["", *map(_latex, headings)]) + r" \\", r"\midrule"]
            for line in lines:
                label = _latex(line.label) if line.head else rf"\quad {_latex(line.label)}"
                out.append(" & ".join([label, *map(shown, line.texts)]) + r" \\")
            out += [r"\bottomrule", r"\end{tabular}", rf"\end{{{kind}}}"]
            caption = rf"\caption{{{_latex(table.title)} (continued)}}"
    out.pop()  # the notes belong to the last float
    out += [r"\par\smallskip{\scriptsize\raggedright"]
    out += [rf"$^{{{i}}}$ {_latex(text)}\par" for text, i in table.footnotes.items()]
    out += [rf"{_latex(note)}\par" for note in table.notes]
    if table.commands:
        out += [
            rf"{MISSING}\par",
            *(rf"\texttt{{{_latex(command)}}}\par" for command in table.commands),
        ]
    return "\n".join([*out, "}", rf"\end{{{kind}}}"]) + "\n"


def _pages(lines: Iterable[Line]) -> list[list[Line]]:
    """Split lines into parts that fit a page.

    The lines of one row stay together, so a part may be a few lines longer than `LINES_A_FLOAT`.
    """
    pages: list[list[Line]] = []
    for line in lines:
        if not pages or (line.head and len(pages[-1]) > LINES_A_FLOAT):
            pages.append([])
        pages[-1].append(line)
    return pages


def html(table: Table) -> str:
    """Return a table as an HTML fragment: the table, and then its footnotes and notes.

    The commands that run missing and failed runs follow, if there are any. The mean of our runs is
    bold in a cell of rank "best" and underlined in a cell of rank "second". The attribute
    `data-sort` of a cell holds the number to sort rows by: the mean of our runs, else the published
    number, else "". In the column of the gains over all pairs, the attribute holds the gain.
    """

    def shown(text: Text) -> str:
        body = escape(text.text)
        body = {"best": f"<strong>{body}</strong>", "second": f"<u>{body}</u>"}.get(text.rank, body)
        marks = "".join(
            f'<sup><a href="#{table.name}-{mark}">{mark}</a></sup>' for mark in text.marks
        )
        name = f"<small>{KINDS[text.kind]} </small>" if text.kind in KINDS else ""
        rank = f" {text.rank}" if text.rank else ""
        return f'<div class="{text.kind}{rank}">{name}{body}{marks}</div>'

    def cell(row: str, column: str) -> str:
        found = table.cells[row, column]
        number: float | str = ""
        if found.mean is not None:
            number = found.mean
        elif found.published:
            number = found.published.value
        lines = "".join(map(shown, _texts(found, table)))
        return f'<td data-sort="{number}">{lines or EMPTY}</td>'

    out = [
        f'<table class="results" id="{escape(table.name)}">',
        f"<caption>{escape(table.title)}</caption>",
        "<thead><tr>",
    ]
    out += [
        "<th></th>",
        *(f'<th scope="col">{escape(heading)}</th>' for heading in _headings(table, table.columns)),
        "</tr></thead>",
        "<tbody>",
    ]
    for i, row in enumerate(table.rows):
        over = _over(table, row, table.columns)
        under = f"<div><small>gain over {escape(over)}</small></div>" if over else ""
        head = escape(_heading_of(table, row))
        out.append(f'<tr><th scope="row" data-sort="{i}">{head}{under}</th>')
        out += [cell(row, column) for column in table.columns]
        if table.aggregates:
            found = _aggregate(table, row)
            number = table.aggregates[row].gain if found else ""
            lines = "".join(map(shown, found.values()))
            out.append(f'<td data-sort="{number}">{lines or EMPTY}</td>')
        out.append("</tr>")
    out += ["</tbody>", "</table>"]
    if table.footnotes:
        notes = (
            f'<li id="{table.name}-{i}">{escape(text)}</li>' for text, i in table.footnotes.items()
        )
        out += ['<ol class="footnotes">', *notes, "</ol>"]
    out += [f'<p class="note">{escape(note)}</p>' for note in table.notes]
    if table.commands:
        commands = escape("\n".join(table.commands))
        out.append(
            f'<details class="missing"><summary>{MISSING}</summary><pre>{commands}</pre></details>'
        )
    return "\n".join(out) + "\n"


def csv(table: Table) -> str:
    """Return a table as CSV text with the header `CSV_COLUMNS` and one line per cell.

    Numbers are unrounded, and a field without a value is empty. After the cells, each row with a
    mean gain over all pairs has one more line, with "all pairs" in the field `column`.
    """
    file = io.StringIO()
    writer = csv_module.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for (row, column), cell in table.cells.items():
        gain = cell.gain
        writer.writerow(
            {
                "table": table.name,
                "row": row,
                "column": column,
                "quantity": table.quantity,
                "mean": cell.mean,
                "std": cell.std,
                "n": cell.n,
                "planned": cell.planned,
                "seeds": " ".join(map(str, cell.seeds)),
                "troubles": "; ".join(cell.troubles),
                "rank": cell.rank,
                "published": cell.published and cell.published.value,
                "published_in": cell.published and cell.published.table,
                "flag": cell.published and cell.published.flag,
                "published_gain": cell.published_gain and cell.published_gain.difference,
                "gain_over": gain and gain.over,
                "gain": gain and gain.difference.mean,
                "gain_n": gain and gain.difference.n,
                "gain_n_base": gain and gain.difference.n_base,
                "gain_test": gain and gain.difference.test,
                "ci_low": gain and gain.difference.low,
                "ci_high": gain and gain.difference.high,
                "p": gain and gain.difference.p,
                "p_holm": gain and gain.p_holm,
                "gain_verdict": gain and gain.verdict,
                "verdict": cell.verdict,
                "footnotes": "; ".join(text for texts in cell.footnotes.values() for text in texts),
            }
        )
    for row, found in table.aggregates.items():
        writer.writerow(
            {
                "table": table.name,
                "row": row,
                "column": ALL_PAIRS,
                "quantity": table.quantity,
                "gain": found.gain,
                "gain_n": found.pairs,
                "gain_test": "bootstrap",
                "ci_low": found.low,
                "ci_high": found.high,
                "p_better": found.improvement,
            }
        )
    return file.getvalue()


SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def text(table: Table, width: int | None) -> str:
    """Return a table as text of aligned columns: its title, the table, its footnotes and its notes.

    Lines are as in `markdown`. If the columns do not fit beside each other, the table is split, as
    in `latex`. The mean of our runs is bold in a cell of rank "best" and underlined in a cell of
    rank "second" if the text is for a terminal.

    Args:
        table: the table.
        width: width of the terminal in characters; None for text without styles and without a limit
            of the width of the table, as for a file.
    """
    from rich.console import Console  # slow to import
    from rich.measure import Measurement
    from rich.table import Table as Grid
    from rich.text import Text as Styled

    console = Console(force_terminal=width is not None, width=width or UNLIMITED)

    def shown(one: Text | None) -> Styled:
        if one is None:
            return Styled(EMPTY)
        style = {"best": "bold", "second": "underline"}.get(one.rank, "")
        marks = "".join(str(mark).translate(SUPERSCRIPTS) for mark in one.marks)
        return Styled.assemble((one.text, style), marks)

    def grid(columns: Sequence[str]) -> Grid:
        drawn = Grid()
        drawn.add_column(no_wrap=True)
        for heading in _headings(table, columns):
            drawn.add_column(Styled(heading), justify="right", no_wrap=True)
        for line in _lines(table, columns):
            label = Styled(line.label if line.head else f"  {line.label}")
            drawn.add_row(label, *map(shown, line.texts))
        return drawn

    def fits(drawn: Grid) -> bool:
        anywhere = console.options.update_width(UNLIMITED)
        return Measurement.get(console, anywhere, drawn).maximum <= console.width

    footnotes = [f"{str(i).translate(SUPERSCRIPTS)} {said}" for said, i in table.footnotes.items()]
    with console.capture() as captured:
        console.print(Styled(table.title, "bold"))
        columns = table.columns
        while columns:
            count = len(columns)
            while count > 1 and not fits(grid(columns[:count])):
                count -= 1
            console.print(grid(columns[:count]))
            columns = columns[count:]
        for line in (*footnotes, *table.notes):
            console.print(Styled(line), width=min(console.width, NOTES_WIDTH))
    return captured.get()


FORMATS: dict[str, Callable[[Table], str]] = {
    "md": markdown,
    "tex": latex,
    "html": html,
    "csv": csv,
}
"""Function that renders a table in each format, by the suffix of the files."""
