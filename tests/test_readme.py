"""Test what the READMEs say: their length, links, commands and numbers."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from sddlskd.models import names
from sddlskd.terminal.console import outcomes
from tests.pages import FENCE, LINK, READMES, REPO, broken, commands, headings, name_of
from tests.tiny import composed

README, CHINESE = (path.read_text() for path in READMES)
MOST_WORDS = 900
QUICK_START = 3  # number of its section


def test_it_is_short() -> None:
    assert len(README.split()) <= MOST_WORDS


@pytest.mark.parametrize("path", [*READMES, REPO / "CONTRIBUTING.md"], ids=name_of)
def test_links_lead_somewhere(path: object) -> None:
    assert broken(path) == []


def test_the_chinese_one_has_the_same_parts() -> None:
    assert [level for level, _ in headings(CHINESE)] == [level for level, _ in headings(README)]
    assert commands(READMES[1]) == commands(READMES[0])
    blocks = [[language for language, _ in FENCE.findall(text)] for text in (README, CHINESE)]
    assert blocks[0] == blocks[1]
    links = [sorted("".join(link) for link in LINK.findall(text)) for text in (README, CHINESE)]
    assert [link for link in links[0] if link != "README.zh.md"] == [
        link for link in links[1] if link != "README.md"
    ]
    start, shown = QUICK_START, r"^(?:    |\|).*$"
    outputs = [re.findall(shown, text.split("\n## ")[start], re.M) for text in (README, CHINESE)]
    assert outputs[0] == outputs[1] != []


def test_its_badges_are_those_of_the_script() -> None:
    figures = REPO / "docs/figures"
    badges = runpy.run_path(str(figures / "badges.py"))["badges"]()
    assert badges == {path.name: path.read_text() for path in figures.glob("badge-*.svg")}
    assert all(f"docs/figures/{name}" in README for name in badges)


def test_it_counts_the_networks_right() -> None:
    libraries = {"timm", "torchvision"}  # choices that stand for any network of a library
    # Networks for images of 224 pixels
    libraries |= {"mobilev1", *(f"imagenet_resnet{depth}" for depth in (18, 34, 50))}
    libraries |= {"deit_tiny", "pit_tiny"}
    choices = len({path.stem for path in (REPO / "conf/student").glob("*.yaml")} - libraries)
    assert f"any of {choices} networks" in README
    assert f" {choices} " in CHINESE
    assert f"any of {choices} networks" in (REPO / "docs" / "one-run.md").read_text()
    assert set(names()) <= {path.stem for path in (REPO / "conf/student").glob("*.yaml")}


@pytest.mark.parametrize("text", [README, CHINESE], ids=["en", "zh"])
def test_its_results_are_those_of_the_pages(text: str) -> None:
    table = REPO / "analysis/results/cpu_study/tables/overview_fashion_mnist.md"
    rows = {
        cells[1].strip(): re.findall(r"\d\d\.\d\d", cells[3])
        for line in table.read_text().splitlines()
        if line.startswith("|") and len(cells := line.split("|")) > 4
    }
    (row,) = [line for line in text.splitlines() if line.startswith("| Fashion-MNIST")]
    said = re.findall(r"\d\d\.\d\d", row)
    assert said == [rows[name][0] for name in ("student alone", "KD", r"SD-KD \[1,2,4\]")]
    methods = (REPO / "docs/methods.md").read_text()
    differences = re.findall(r"^\| \w+, \w+ -> \w+ \|.* (\d+e-\d+) \|$", methods, re.MULTILINE)
    assert len(differences) == 12
    assert f"[{max(differences, key=float)}](docs/methods.md" in text


def test_its_tables_look_as_the_terminal_shows_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    pair = ("dataset=digits", "teacher=resnet14", "student=resnet8")

    def shown(*runs: tuple[str, float, float, float]) -> list[str]:
        jobs = [composed(tmp_path, *pair, f"recipe={recipe}") for recipe, *_ in runs]
        results = [
            {"status": "FINISHED", "reason": "", "best_top1": best, "last_top1": last, "seconds": s}
            for _, best, last, s in runs
        ]
        outcomes(jobs, results)
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if "FINISHED" in line]

    lines = shown(("sd_kd_ls", 99.72, 99.72, 43))
    # The student alone makes the table as wide as that of the whole sweep.
    lines += shown(
        ("vanilla", 92.78, 92.50, 8), ("kd_ls", 88.89, 88.61, 32), ("sd_kd_ls", 97.50, 97.22, 32)
    )[1:]
    for path in READMES:
        rows = [line.strip() for line in path.read_text().splitlines() if "FINISHED" in line]
        assert rows == lines


def test_the_citation_is_complete() -> None:
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0"
    # The keys that the schema requires of a work and of a reference.
    assert {"message", "title", "authors"} <= cited.keys()
    for paper in cited["references"]:
        assert {"type", "title", "authors"} <= paper.keys()
        assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"])
        assert f"]({paper['url']})" in README
        assert f"]({paper['repository-code']})" in README
    assert f'version = "{cited["version"]}"' in (REPO / "pyproject.toml").read_text()
