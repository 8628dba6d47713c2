"""Test the formats of tables: parse them and compare the numbers."""

import csv
import io
import math
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import render, tables
from analysis.cells import Table
from analysis.schema import frame_of
from tests.analysis.synthetic import run, runs

PAIRS = {
    "wrn_40_2 → shufflev1": ("wrn_40_2", "shufflev1"),
    "resnet50 → vgg8": ("resnet50", "vgg8"),
    "vgg13 → mobilev2": ("vgg13", "mobilev2"),
}
# {(row, column): accuracies by seed}
OURS = {
    ("KD", "wrn_40_2 → shufflev1"): [74.81, 74.9, 75.02],
    ("SD-KD", "wrn_40_2 → shufflev1"): [76.5, 76.61, 76.95],
    ("KD", "resnet50 → vgg8"): [73.8],
    ("SD-KD", "resnet50 → vgg8"): [75.0],
    ("KD", "vgg13 → mobilev2"): [67.1, 67.9],
}
# Source: SDD Table 2
PUBLISHED = {
    ("KD", "wrn_40_2 → shufflev1"): 74.83,
    ("SD-KD", "wrn_40_2 → shufflev1"): 76.65,
    ("KD", "resnet50 → vgg8"): 73.81,
    ("SD-KD", "resnet50 → vgg8"): 74.89,
    ("KD", "vgg13 → mobilev2"): 67.37,
    ("SKD", "vgg13 → mobilev2"): 68.79,
}
SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹]")
NASTY = r"a_b & <c> 100% #1 $x^2~ {y} \z | *d* [e] `f` \"g\""


def rows_of_runs() -> list[dict[str, Any]]:
    rows = []
    for (method, column), values in OURS.items():
        rows += runs(*PAIRS[column], values, M="[1]" if method == "KD" else "[1,2,4]")
    rows.append(
        run(
            "vgg13",
            "mobilev2",
            2,
            None,
            status="FAILED",
            command="python -m sddlskd.train 'a_b=<&%>'",
        )
    )
    return rows


@pytest.fixture(scope="module")
def table() -> Table:
    return next(t for t in tables.build(frame_of(rows_of_runs())) if t.name == "sdd_table_2")


def error_of(values: Any, base: Any) -> float:
    """Return the standard error of a gain of two groups of three with a common variance."""
    variance = (np.var(values, ddof=1) + np.var(base, ddof=1)) / 2
    return float(math.sqrt(variance * (1 / 3 + 1 / 3)))


def interval_of(values: Any, base: Any) -> tuple[float, float]:
    gain = np.mean(values) - np.mean(base)
    half = 2.776445 * error_of(values, base)  # a printed quantile for 4 degrees of freedom
    return gain - half, gain + half


def p_of(values: Any, base: Any) -> float:
    """Return the two-sided p by Student's distribution of 4 degrees of freedom, in closed form."""
    t = abs(np.mean(values) - np.mean(base)) / error_of(values, base)
    x = 1 + t**2 / 4
    return float(1 - 3 / 4 * t / math.sqrt(x) * (1 - t**2 / (12 * x)))


def expected_lines(row: str, column: str) -> dict[str, str]:
    """Return {kind: text} of the lines of a cell, computed from the numbers above."""
    values, published = np.array(OURS[row, column]), PUBLISHED[row, column]
    std = values.std(ddof=1) if len(values) > 1 else math.nan
    spread = f" ± {std:.2f}" if len(values) > 1 else ""
    count = "2/3 seeds, 1 failed" if column == "vgg13 → mobilev2" else str(len(values))
    lines = {"ours": f"{values.mean():.2f}{spread} ({count})", "published": f"{published:.2f}"}
    if row == "SD-KD":
        base = np.array(OURS["KD", column])
        gain = values.mean() - base.mean()
        lines["gain"] = f"{gain:+.2f} ({len(values)})"
        lines["published gain"] = f"{published - PUBLISHED['KD', column]:+.2f}"
        if len(values) == 3:
            low, high = interval_of(values, base)
            lines["interval"] = f"[{low:+.2f}, {high:+.2f}]"
            assert p_of(values, base) < 0.001
            lines["p"] = "<0.001 better"
        else:
            lines["interval"] = "single seed: no interval"
    half = (
        {1: math.inf, 2: 12.7062, 3: 4.30265}[len(values)]
        * (std if len(values) > 1 else 1)
        * math.sqrt(1 + 1 / len(values))
    )
    inside = abs(values.mean() - published) <= half
    lines["against the published"] = (
        "undecided"
        if half > 1
        else "within"
        if inside
        else "above"
        if values.mean() > published
        else "below"
    )
    return lines


def stacked(lines: list[list[str]], header: list[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Return {(row, column): {kind: text}} of the lines of a Markdown or LaTeX table.

    The first entry of a line is its label. A line with an indented label belongs to the row above.
    """
    found: dict[tuple[str, str], dict[str, str]] = {}
    row = ""
    for label, *texts in lines:
        if label.startswith(">"):
            kind = label[1:]
        elif label.endswith(" (published)"):
            row, kind = label.removesuffix(" (published)"), "published"
        else:
            row, kind = label, "ours"
        kind = {"95 % interval": "interval", "p (Holm)": "p"}.get(
            kind, "gain" if kind.startswith("gain over") else kind
        )
        for column, text in zip(header, texts, strict=True):
            if text not in ("–", "--"):
                found.setdefault((row, column), {})[kind] = text
    return found


def parse_markdown(text: str) -> dict[tuple[str, str], dict[str, str]]:
    def plain(field: str) -> str:
        field = re.sub(r"<sup>\d+</sup>", "", field.strip()).replace("&nbsp;&nbsp;", ">")
        field = re.sub(r"^<u>(.*)</u>$", r"\1", re.sub(r"^\*\*(.*)\*\*$", r"\1", field))
        return re.sub(r"\\(.)", r"\1", unescape(field))

    lines = [
        re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")
    ]
    assert len({len(line) for line in lines}) == 1
    return stacked(
        [[*map(plain, line)] for line in lines[2:]], [plain(field) for field in lines[0][1:]]
    )


def parse_latex(text: str) -> dict[tuple[str, str], dict[str, str]]:
    def plain(field: str) -> str:
        field = re.sub(r"\$\^\{[\d,]+\}\$", "", field.strip()).replace("\\quad ", ">")
        field = re.sub(r"^\\(?:textbf|underline)\{(.*)\}$", r"\1", field)
        for escaped, character in (
            ("\\textless{}", "<"),
            ("$\\pm$", "±"),
            ("$-$", "-"),
            ("$\\to$", "→"),
            ("{[}", "["),
            ("{]}", "]"),
        ):
            field = field.replace(escaped, character)
        return re.sub(r"\\([_%&#$])", r"\1", field)

    found: dict[tuple[str, str], dict[str, str]] = {}
    for block in re.findall(
        r"\\begin\{tabular\}.*?\\toprule\n(.*?)\\bottomrule", text, flags=re.DOTALL
    ):
        header, body = block.split("\\midrule\n")
        split = [
            [plain(field) for field in re.split(r"(?<!\\)&", line.removesuffix("\\\\"))]
            for line in body.splitlines()
        ]
        found |= stacked(
            split, [plain(field) for field in header.strip().removesuffix("\\\\").split("&")[1:]]
        )
    return found


def parse_text(text: str) -> dict[tuple[str, str], dict[str, str]]:
    found: dict[tuple[str, str], dict[str, str]] = {}
    # A table that is too wide is split, and each part has its header.
    for part in text.split("┏")[1:]:
        (header,) = re.findall("^┃(.*)┃$", part, re.MULTILINE)
        lines = [
            [field[1:].rstrip().replace("  ", ">", 1), *map(str.strip, fields)]
            for field, *fields in (
                line.split("│") for line in re.findall("^│(.*)│$", part, re.MULTILINE)
            )
        ]
        found |= stacked(lines, [field.strip() for field in header.split("┃")[1:]])
    return found


class Parser(HTMLParser):
    """A parser that collects the cells of a table by kind, and every tag with its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: list[str] = []
        self.cells: dict[tuple[str, str], dict[str, str]] = {}
        self.sort: dict[tuple[str, str], str] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.row = self.kind = ""
        self.place = -1

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        self.open.append(tag)
        if tag == "th":
            self.row, self.place = "", -1
        if tag == "td":
            self.place += 1
            self.sort[self.row, self.columns[self.place]] = attributes["data-sort"] or ""
        if tag == "div":
            self.kind = (attributes.get("class") or "").split(" ")[0]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "th" and "thead" in self.open and self.row:
            self.columns.append(self.row)

    def handle_data(self, data: str) -> None:
        if "th" in self.open and "div" not in self.open:
            self.row += data
        if (
            "td" in self.open
            and "small" not in self.open
            and "sup" not in self.open
            and "div" in self.open
        ):
            kinds = self.cells.setdefault((self.row, self.columns[self.place]), {})
            kind = self.kind.replace("-", " ").replace("verdict", "against the published")
            kinds[kind] = kinds.get(kind, "") + data


def parse_html(text: str) -> Parser:
    parser = Parser()
    parser.feed(text)
    assert parser.open == []
    return parser


def test_every_cell_in_markdown_latex_and_html(table: Table) -> None:
    parsed = {
        "markdown": parse_markdown(render.markdown(table)),
        "latex": parse_latex(render.latex(table)),
        "html": parse_html(render.html(table)).cells,
    }
    for name, cells in parsed.items():
        for row, column in OURS:
            assert cells[row, column] == expected_lines(row, column), (name, row, column)
        assert cells["CRD", "vgg13 → mobilev2"]["published"] == "69.11"
        assert "ours" not in cells["CRD", "vgg13 → mobilev2"]
        found = {key: text["published"] for key, text in cells.items() if "published" in text}
        assert found == {
            key: f"{cell.published.value:.2f}"
            for key, cell in table.cells.items()
            if cell.published
        }


def test_every_cell_in_csv(table: Table) -> None:
    lines = list(csv.DictReader(io.StringIO(render.csv(table))))
    assert list(lines[0]) == list(render.CSV_COLUMNS)
    assert len(lines) == len(table.rows) * len(table.columns) + len(table.aggregates)
    by_cell = {(line["row"], line["column"]): line for line in lines}
    for (row, column), values in OURS.items():
        line = by_cell[row, column]
        assert float(line["mean"]) == pytest.approx(np.mean(values))
        assert (
            line["std"] == ""
            if len(values) == 1
            else float(line["std"]) == pytest.approx(np.std(values, ddof=1))
        )
        assert (int(line["n"]), line["seeds"]) == (
            len(values),
            " ".join(map(str, range(len(values)))),
        )
        assert float(line["published"]) == PUBLISHED[row, column]
        assert line["verdict"] == expected_lines(row, column)["against the published"]
        if row == "SD-KD":
            base = OURS["KD", column]
            assert float(line["gain"]) == pytest.approx(np.mean(values) - np.mean(base))
            assert line["gain_over"] == "KD"
            if len(values) == 1:
                assert line["ci_low"] == line["ci_high"] == line["p"] == line["p_holm"] == ""
            else:
                ends = float(line["ci_low"]), float(line["ci_high"])
                assert ends == pytest.approx(interval_of(values, base), abs=1e-5)
                assert float(line["p"]) == pytest.approx(p_of(values, base), rel=1e-6)
                assert line["p"] == line["p_holm"]
                assert (line["gain_test"], line["gain_verdict"]) == ("pooled", "better")
    assert by_cell["KD", "vgg13 → mobilev2"]["troubles"] == "1 failed"
    assert by_cell["CRD", "vgg13 → mobilev2"]["flag"] == "suspect"


def test_latex_has_its_notes_in_the_float_and_minus_signs(table: Table) -> None:
    text = render.latex(table)
    assert text.endswith("}\n\\end{table*}\n")
    assert text.count("\\begin{table*}") == text.count("\\end{table*}")
    one = replace(table, columns=table.columns[:1], aggregates={})
    assert "table*" not in render.latex(one)
    below = replace(one.cells[one.rows[0], one.columns[0]], mean=-4.72, planned=1)
    cells = {**one.cells, (one.rows[0], one.columns[0]): below}
    assert "$-$4.72" in render.latex(replace(one, cells=cells))


def test_best_is_bold_and_second_underlined(table: Table) -> None:
    best, second = "76.69 ± 0.23 (3)", "74.91 ± 0.11 (3)"
    assert f"**{best}**" in render.markdown(table)
    assert f"<u>{second}</u>" in render.markdown(table)
    assert r"\textbf{76.69 $\pm$ 0.23 (3)}" in render.latex(table)
    assert r"\underline{74.91 $\pm$ 0.11 (3)}" in render.latex(table)
    assert f'<div class="ours best"><strong>{best}</strong></div>' in render.html(table)
    assert f'<div class="ours second"><u>{second}</u></div>' in render.html(table)


def test_html_sorts_by_our_mean_else_by_the_published_number_and_loads_nothing(
    table: Table,
) -> None:
    text = render.html(table)
    parsed = parse_html(text)
    assert float(parsed.sort["KD", "wrn_40_2 → shufflev1"]) == pytest.approx(
        np.mean([74.81, 74.9, 75.02])
    )
    assert float(parsed.sort["CRD", "wrn_40_2 → shufflev1"]) == 76.05
    ids = {attributes["id"] for _, attributes in parsed.tags if attributes.get("id")}
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "img", "iframe", "style")
        assert "src" not in attributes
        if (link := attributes.get("href")) is not None:
            assert link[0] == "#"
            assert link[1:] in ids


def test_a_gain_over_a_single_run_has_no_interval_for_this_reason() -> None:
    pair = ("resnet32x4", "shufflev1")
    # Bartlett's test refuses equal variances, and KD has one run.
    rows = runs(*pair, [70.0]) + runs(*pair, [72.0, 75.0, 78.0], M="[1,2,4]")
    rows += runs(*pair, [70.0, 70.01, 70.02], distiller="dkd")
    table = next(t for t in tables.build(frame_of(rows)) if t.name == "sdd_table_2")
    for form in (render.markdown, render.html, render.latex):
        assert form(table).count("single seed: no interval") == 2
        assert "no spread" not in form(table)


def test_notes_footnotes_and_commands_are_under_the_table(table: Table) -> None:
    command = "python -m sddlskd.train 'a_b=<&%>'"
    assert table.commands == (command,)
    markdown, html = render.markdown(table), unescape(render.html(table))
    assert f"```\n{command}\n```" in markdown
    assert command in html
    assert r"\texttt{python -m sddlskd.train 'a\_b=\textless{}\&\%\textgreater{}'}" in render.latex(
        table
    )
    for note in (*table.notes, *table.footnotes):
        assert note in html
        assert note in re.sub(r"\\(.)", r"\1", unescape(markdown))
    assert len(table.footnotes) == markdown.count("\n<sup>")


def nasty_table() -> Table:
    rows = [
        run(
            "resnet32x4", "resnet8x4", 0, 73.0, images_per_s=6400.0, group_size=1, environment=NASTY
        )
    ]
    rows.append(
        run(
            "resnet32x4", "resnet8x4", 1, 73.0, images_per_s=6400.0, group_size=1, environment="β_1"
        )
    )
    return next(t for t in tables.build(frame_of(rows)) if t.name == "time_cifar100")


def test_whatever_a_name_holds_comes_back() -> None:
    table = nasty_table()
    label = f"KD, environment={NASTY}"
    assert label in table.rows
    key = label, "resnet32x4 → resnet8x4"
    assert parse_markdown(render.markdown(table))[key]["ours"] == "10.0 (1)"
    assert parse_html(render.html(table)).cells[key]["ours"] == "10.0 (1)"
    lines = csv.DictReader(io.StringIO(render.csv(table)))
    assert label in {line["row"] for line in lines}


def all_tables() -> list[Table]:
    """Return tables of every kind."""
    rows = rows_of_runs()
    for pair in (("resnet32x4", "shufflev1"), ("resnet32x4", "resnet8x4")):
        for M in ("[1]", "[1,2]", "[1,2,4]"):
            rows += runs(
                *pair,
                [75.0, 75.5, 76.1],
                M=M,
                images_per_s=5000.0,
                group_size=1,
                teacher_top1=79.42,
            )
            rows += runs(*pair, [76.0, 76.5, 76.6], M=M, standardize=True, ce_weight=1.0)
        rows += runs(*pair, [75.0, 75.1], M="[1,2,4]", knowledge="consistent")
        rows += runs(*pair, [75.0, 75.1], M="[1,2,4]", complementary_weight=4.0)
    rows += runs("resnet110", "resnet20", [71.0, 71.1], source="imported", standardize=True)
    rows += runs("resnet14", "resnet8", [71.0, 71.1], dataset="fashion_mnist")
    built = tables.build(frame_of(rows))
    assert {table.name.split("_")[0] for table in built} == {
        "sdd", "knowledge", "scales", "weights", "time", "seed", "lskd", "overview"
    }  # fmt: skip
    return [*built, nasty_table()]


def test_all_formats_of_all_tables_say_the_same() -> None:
    for table in all_tables():
        markdown, latex = parse_markdown(render.markdown(table)), parse_latex(render.latex(table))
        html = parse_html(render.html(table))
        all_pairs = {(row, render.ALL_PAIRS) for row in table.rows if table.aggregates}
        assert set(html.sort) == set(table.cells) | all_pairs
        assert markdown == html.cells
        # A label of this test has a "|", as Markdown's, but no box character.
        assert parse_text(SUPERSCRIPT.sub("", render.text(table, None))) == markdown
        # The LaTeX parser of this test understands only the characters of ordinary names.
        if not any(NASTY in row for row in table.rows):
            assert latex == markdown


def test_text_fits_a_terminal() -> None:
    table = all_tables()[0]
    styled = render.text(table, 80)
    plain = re.sub(r"\x1b\[\d*m", "", styled)
    assert plain != styled
    assert max(map(len, plain.splitlines())) <= 80
    assert plain.count("┏") > 1  # parts
    plain = SUPERSCRIPT.sub("", plain)
    assert parse_text(plain) == parse_text(SUPERSCRIPT.sub("", render.text(table, None)))
    said = " ".join(plain.split())
    assert all(" ".join(note.split()) in said for note in (*table.notes, *table.footnotes))


def compile_latex(folder: Path, body: str) -> None:
    if not shutil.which("pdflatex"):
        if os.environ.get("CI"):
            pytest.fail("pdflatex is not installed: apt-get install texlive-latex-base")
        pytest.skip("pdflatex is not installed: apt-get install texlive-latex-base")
    (folder / "all.tex").write_text(body, encoding="utf-8")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=folder,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-3000:]
    assert (folder / "all.pdf").stat().st_size > 10_000


# The tables must compile without booktabs, which Debian's texlive-latex-base does not contain.
PREAMBLES = {
    "plain": "",
    "booktabs where it is": r"\IfFileExists{booktabs.sty}{\usepackage{booktabs}}{}",
}


@pytest.mark.parametrize("preamble", PREAMBLES.values(), ids=PREAMBLES)
def test_latex_compiles(preamble: str, tmp_path: Path) -> None:
    body = "\\clearpage\n".join(map(render.latex, all_tables()))
    compile_latex(
        tmp_path,
        f"\\documentclass{{article}}\n{preamble}\n\\begin{{document}}\n{body}\\end{{document}}\n",
    )
