"""The texts that users read: the READMEs and the pages of the documentation, with their parts."""

import re
import shlex
from collections.abc import Sequence
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.sweeps.grid import compose_grid

REPO = Path(__file__).parents[1]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"^( *)```.*?^\1```$|`[^`\n]*`|<!--.*?-->", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
READMES = [REPO / "README.md", REPO / "README.zh.md"]
PAGES = sorted((REPO / "docs").rglob("*.md"))
TEXTS = [*READMES, REPO / "CONTRIBUTING.md", *PAGES]


def name_of(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def commands(path: Path) -> list[str]:
    """Return the lines of all blocks of shell commands, without the notes behind them."""
    return [
        re.split(r"\s+#\s", line)[0].strip()
        for language, block in FENCE.findall(path.read_text())
        if language == "sh"
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    ]


def headings(text: str) -> list[tuple[int, str]]:
    """Return the level and the text of each heading."""
    without = CODE.sub(lambda code: "" if "\n" in code[0] else code[0], text)
    return [(len(m[1]), m[2]) for m in re.finditer(r"^(#+) (.*)$", without, re.MULTILINE)]


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub and the site make them."""
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for _, heading in headings(path.read_text())
    }


def broken(path: Path) -> list[str]:
    """Return the links of a page to files and headings that do not exist."""
    wrong = []
    for found in LINK.findall(CODE.sub("", path.read_text())):
        link = "".join(found)
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            wrong.append(link)
    return wrong


def example(path: Path, name: str) -> list[tuple[str, str]]:
    """Return the language and the text of the blocks of an example, up to its first command."""
    (rest,) = path.read_text().split(f"<!-- example: {name} -->")[1:]
    found = []
    for language, text in FENCE.findall(rest):
        found.append((language, text))
        if language == "sh":
            break
    return found


def write_files(blocks: Sequence[tuple[str, str]], folder: Path) -> None:
    """Write each block to the file that its first comment names."""
    for language, text in blocks:
        if language != "sh":
            # Hydra reads the line of the package only if it is the first one.
            lines = (line for line in text.splitlines() if not line.startswith("# @"))
            path = folder / next(lines).removeprefix("# ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def composed(command: str, folder: Path = REPO) -> list[Config]:
    """Return the jobs of a training command that is given in a folder."""
    cfg.frame()
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "sddlskd.train"]
    options = dict(pairwise(words))
    search = create_config_search_path(str(files("sddlskd.conf")))
    for option in ("-cd", "--config-dir"):
        if option in options:
            search.prepend("command-line", f"file://{folder / options[option]}")
    loader = ConfigLoaderImpl(search)
    given = [word for word in words if "=" in word]
    # Hydra reads the choices of launchers and the settings of a sweep before it makes the grid.
    first = [word for word in given if word.startswith(("sweep.", "hydra"))]
    sweep = loader.load_configuration(options.get("-cn", "config"), first, RunMode.MULTIRUN)
    sweep.sweep.name = "readme"
    params = sweep.hydra.sweeper.params or {}
    overrides = [f"{key}={value}" for key, value in params.items()]
    overrides += [word for word in given if word not in first]
    (grid,) = BasicSweeper.split_arguments(
        OverridesParser.create().parse_overrides(overrides), None
    )
    lines = [line.split() for line in sweep.sweep.jobs] or [[]]
    return compose_grid(loader, sweep, [[*words, *line] for words in grid for line in lines])
