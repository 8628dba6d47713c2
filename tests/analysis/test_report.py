import os
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from analysis import figures, report, tables
from tests.analysis.standin import Standin, grid, predictions, row

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "link", "input", "img", "br", "hr"}
EVIL = "<script>document.title='owned'</script>"


class Page(HTMLParser):
    """A parsed page; every tag must be closed in the right order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}"
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += f"{data} "


def rows_of_all_kinds() -> list[dict[str, Any]]:
    return [
        *grid(
            [("resnet32x4", "resnet8x4"), ("resnet32x4", "shufflev1")],
            ["vanilla", "kd", "sd_kd_ls"],
            seeds=2,
        ),
        row(3, status="FAILED", reason=f"loss is nan {EVIL}", git_sha="deadbee"),
        row(4, status="KILLED", reason="", command=""),
        row(
            5,
            status="MISSING",
            run_id="",
            command="python -m sddlskd.train student=resnet8x4 seed=5 M='[1]'",
        ),
        row(6, status="RUNNING", epochs_done=3, name='"><img src=x onerror=alert(1)>'),
        row(7, status="FAILED", reason="an older try", superseded=True),
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rows = rows_of_all_kinds()
    distilled = [
        run for run in rows if run["status"] == "FINISHED" and run["distiller"] != "vanilla"
    ]
    kept = {
        run["run_id"]: predictions(seed, images=60, classes=5, side=8)
        for seed, run in enumerate(distilled)
    }
    runs = Standin(rows, kept, uri="http://user:secret@host:5000")
    drawn = figures.build(runs, folder)
    path = folder / "new" / "report.html"
    report.write(path, runs, tables.build(runs.frame), drawn, metric="best")
    return path


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page(written.read_text())


def test_the_page_is_well_formed_and_its_ids_are_unique(page: Page) -> None:
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert [name for name, count in ids.items() if count > 1] == []
    for tag, attributes in page.tags:
        if (target := attributes.get("href", "")).startswith("#"):
            assert target[1:] in ids, f"{tag} {target}"


def test_the_page_asks_the_network_nothing(page: Page, written: Path) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"iframe", "object", "embed", "base", "form"}
        for name in (
            "src",
            "href",
            "srcset",
            "xlink:href",
            "data",
            "poster",
            "action",
            "background",
        ):
            assert attributes.get(name, "#").startswith(("#", "data:")), (
                f"{tag} {name}={attributes.get(name)}"
            )
    text = written.read_text()
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)|xmlns|fetch\(|XMLHttpRequest", text)


def test_what_runs_say_is_text(page: Page) -> None:
    assert EVIL in page.text
    assert '"><img src=x onerror=alert(1)>' in page.text
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not [
        attributes
        for _, attributes in page.tags
        if any(name.startswith("on") for name in attributes)
    ]


def test_the_summary_counts_and_explains(page: Page) -> None:
    text = " ".join(page.text.split())
    for count, status in (
        (12, "finished"),
        (1, "running"),
        (1, "failed"),
        (1, "killed"),
        (1, "missing"),
        (1, "superseded"),
    ):
        assert f" {count} {status} " in text
    assert "Metric: top-1 (%), best epoch." in text
    assert "In our runs it lies 0.30 points above the last on average (n = 12 runs)." in text
    assert "http://host:5000" in text
    assert "secret" not in text


def test_what_is_missing_and_failed_has_its_command_and_reason(page: Page) -> None:
    text = " ".join(page.text.split())
    assert "1 planned run has not been started." in text
    assert "python -m sddlskd.train student=resnet8x4 seed=5 M='[1]'" in text
    failures = text[text.index("Failures run") : text.index("Configurations Settings")]
    assert "loss is nan" in failures
    assert "not known" in failures
    assert "an older try" not in failures


def test_params_stand_once_where_they_are_common_and_in_a_row_where_they_differ(page: Page) -> None:
    text = " ".join(page.text.split())
    common = text[text.index("Settings with the same value") : text.index("Settings that differ")]
    differing = text[text.index("Settings that differ") : text.index("Environment and revisions")]
    assert "trainer.batch_size64" in common.replace(" ", "")
    for key in ("student.name", "distiller.name", "M", "standardize"):
        assert f" {key} " in differing
        assert f" {key} " not in common
    assert "0, 1, 3, 4, 5, 6" in differing
    assert "deadbee" in text
    assert "torch 2.6, cpu" in text


def test_an_empty_selection_is_a_page_too(tmp_path: Path) -> None:
    report.write(tmp_path / "report.html", Standin([], name="", command=""), [], [], metric="last")
    text = Page((tmp_path / "report.html").read_text()).text
    assert "all runs" in text
    assert "None: there are no finished runs to show." in text


# The page in a browser


def browse(path: Path, profile: Path) -> tuple[str, str]:
    """Open a page in Chromium, and return its elements and its messages on the console."""
    if CHROMIUM is None:
        if "CI" in os.environ:
            pytest.fail("CI needs chromium: apt-get install chromium")
        pytest.skip("there is no chromium; apt-get install chromium")
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--window-size=1200,900 --enable-logging=stderr --v=0 --dump-dom"
    )
    done = subprocess.run(
        [CHROMIUM, *options.split(), f"--user-data-dir={profile}", path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def answer(path: Path, folder: Path, script: str) -> str:
    """Run a script at the end of a copy of the page, and return the title that it sets."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", path.read_text())
    copy = folder / "copy.html"
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    dom, console = browse(copy, folder / "profile")
    assert console == ""
    title = re.search(r"<title>(.*?)</title>", dom, re.DOTALL)
    assert title
    return title[1]


COLUMN = """
const heads = [...document.querySelectorAll('#outcomes th')];
const column = (name) => heads.findIndex((head) => head.textContent === name);
const bodies = () => [...document.querySelectorAll('#outcomes tbody tr')];
const values = (name) => bodies().map((row) => row.cells[column(name)].textContent);
const click = (name) => heads[column(name)].querySelector('button').click();
"""


def test_chromium_opens_it_without_a_complaint(written: Path, tmp_path: Path) -> None:
    dom, console = browse(written, tmp_path / "profile")
    assert console == ""
    # The page's security policy allowed its own script, which adds the buttons.
    assert '<th scope="col"><button type="button"' in dom
    # No script in the name or reason of a run was executed.
    assert "<title>suite: results</title>" in dom


def test_chromium_sorts_numbers_as_numbers_and_keeps_blanks_last(
    written: Path, tmp_path: Path
) -> None:
    script = (
        f"{COLUMN} click('best'); const up = values('best'); "
        "click('best'); const down = values('best');"
    )
    script += "document.title = [up.join(), down.join(), heads[column('best')].ariaSort].join(';');"
    up, down, state = answer(written, tmp_path, script).split(";")
    best = sorted(f"{run['best']:.2f}" for run in rows_of_all_kinds() if "best" in run)
    assert up.split(",") == [*best, *["–"] * 5]
    assert down.split(",") == [*best[::-1], *["–"] * 5]
    assert state == "descending"


def test_chromium_sorts_the_papers_tables(written: Path, tmp_path: Path) -> None:
    script = """
    const all = [...document.querySelectorAll('table.results')];
    const table = all.find((one) => one.rows.length > 3);
    table.querySelectorAll('th button')[1].click();
    const keys = [...table.tBodies[0].rows].map((row) => row.cells[1].dataset.sort);
    document.title = keys.filter(Boolean).join();
    """
    values = [float(text) for text in answer(written, tmp_path, script).split(",")]
    assert len(values) > 2
    assert values == sorted(values)


def test_chromium_filters_rows_and_the_keyboard_reaches_what_sorts(
    written: Path, tmp_path: Path
) -> None:
    script = f"""{COLUMN}
    const box = document.getElementById('filter');
    box.value = 'FAILED resnet8x4'; box.dispatchEvent(new Event('input'));
    const left = bodies().filter((row) => row.offsetParent).length;
    const button = heads[0].querySelector('button'); button.focus();
    const said = document.getElementById('shown').textContent;
    const focused = document.activeElement.tagName;
    document.title = [left, said, focused, box.offsetParent !== null].join(';');
    """
    assert answer(written, tmp_path, script) == "2;2 of 17 runs;BUTTON;true"


def test_chromium_shows_it_420_pixels_wide(written: Path, tmp_path: Path) -> None:
    script = """
    document.documentElement.style.width = '420px';
    const wide = [...document.querySelectorAll('body *')].filter(
        (one) => one.getBoundingClientRect().right > 421 && !one.closest('.scroll, pre, .paper'));
    document.title = wide.map((one) => one.tagName + '.' + one.className).join() || 'fits';
    """
    assert answer(written, tmp_path, script) == "fits"


def test_a_thousand_runs_stay_small_and_quick(tmp_path: Path) -> None:
    pairs = [(f"resnet{depth}", f"student{depth}") for depth in range(50)]
    rows = grid(pairs, seeds=4)
    assert len(rows) == 1000
    path = tmp_path / "report.html"
    runs = Standin(rows)
    report.write(path, runs, tables.build(runs.frame), [], metric="best")
    assert path.stat().st_size < 5_000_000
    script = (
        f"{COLUMN} const start = performance.now(); "
        "for (const name of ['best', 'pair', 'seed']) click(name);"
    )
    script += (
        "document.body.offsetHeight; "
        "document.title = [values('seed').length, performance.now() - start].join();"
    )
    count, milliseconds = answer(path, tmp_path, script).split(",")
    assert count == "1000"
    assert float(milliseconds) < 3000
