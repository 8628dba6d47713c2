"""Test what the README says: its links, its commands and its examples of own code."""

import re
import shlex
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torchvision
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.files import checkpoint
from sddlskd.models import create, names
from sddlskd.sweeps.grid import compose_grid
from tests.tiny import ForkedCommand

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text()
FENCE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for language, block in FENCE.findall(README + (REPO / "docs" / "tracking.md").read_text())
    if language == "sh"
    for line in block.splitlines()
    if line.strip()
]


def example(name: str) -> dict[str, str]:
    """Return {language: text} of the three blocks of an example."""
    return dict(FENCE.findall(README.split(f"<!-- example: {name} -->")[1])[:3])


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    for link in links:
        if not link.startswith(("http://", "https://", "#")):
            assert (REPO / link).exists(), link


def test_make_targets_exist() -> None:
    makefile = (REPO / "Makefile").read_text()
    targets = set(re.findall(r"`?make ([\w-]+)", README))
    assert {"demo", "test"} <= targets
    for target in targets - {"are"}:
        assert f"\n{target}:" in makefile, target


def test_it_counts_the_networks_right() -> None:
    libraries = {"timm", "torchvision"}  # choices that stand for any network of a library
    # Networks for images of 224 pixels
    libraries |= {"mobilev1", *(f"imagenet_resnet{depth}" for depth in (18, 34, 50))}
    libraries |= {"deit_tiny", "pit_tiny"}
    choices = len({path.stem for path in (REPO / "conf/student").glob("*.yaml")} - libraries)
    assert f"any of {choices} networks" in README
    assert set(names()) <= {path.stem for path in (REPO / "conf/student").glob("*.yaml")}


def composed(command: str) -> list[Config]:
    """Return the jobs of a training command."""
    cfg.frame()
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "sddlskd.train"]
    options = dict(pairwise(words))
    search = create_config_search_path(str(files("sddlskd.conf")))
    if "-cd" in options:
        search.prepend("command-line", f"file://{REPO / options['-cd']}")
    loader = ConfigLoaderImpl(search)
    sweep = loader.load_configuration(options.get("-cn", "config"), [], RunMode.MULTIRUN)
    sweep.sweep.name = "readme"
    params = sweep.hydra.sweeper.params or {}
    overrides = [f"{key}={value}" for key, value in params.items()] + [
        word for word in words if "=" in word
    ]
    (grid,) = BasicSweeper.split_arguments(
        OverridesParser.create().parse_overrides(overrides), None
    )
    return compose_grid(loader, sweep, grid)


@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if "sddlskd.train" in c and "--config-dir" not in c]
)
def test_every_command_composes(command: str) -> None:
    jobs = composed(command)
    assert jobs
    assert (len(jobs) > 1) == ("-m" in shlex.split(command)[3:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "method", "connector", "network", "dataset"])
def test_examples_run(name: str, tmp_path: Path) -> None:
    blocks = example(name)
    assert set(blocks) == {"python", "yaml", "sh"}
    for language in ("python", "yaml"):
        text = blocks[language]
        assert len(text.splitlines()) < 20
        # Hydra reads the line of the package only if it is the first one.
        lines = (line for line in text.splitlines() if not line.startswith("# @"))
        path = tmp_path / next(lines).removeprefix("# ")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    words = shlex.split(blocks["sh"])
    teacher = dict(word.split("=", 1) for word in words if "=" in word)["teacher"]
    torch.manual_seed(0)
    checkpoint.write(
        tmp_path / f"teachers/digits/{teacher}.pt", {"model": create(teacher, 10).state_dict()}
    )
    quick = ["trainer=debug", "tracking=none"]
    assert words[:2] == ["python", "-m"]
    at_home = {"SDDLSKD_HOME": str(tmp_path)}
    code, out, err = ForkedCommand(tmp_path, *words[2:], *quick, cwd=tmp_path, env=at_home).end()
    assert code == 0, out + err
    results = [
        record.read_result(path.parent)
        for path in (tmp_path / "runs").glob(f"*/{teacher}-*/result.json")
    ]
    jobs = {"loss": 2, "method": 2, "connector": 1, "network": 1, "dataset": 1}[name]
    assert [result["status"] for result in results if result.get("teacher_sha256")] == [
        "FINISHED"
    ] * jobs


def test_example_of_a_loop_of_ones_own() -> None:
    (code,) = re.findall(r"<!-- example: loop -->\n```python\n(.*?)```", README, re.DOTALL)
    torch.manual_seed(0)
    teacher_network, student_network = (
        torchvision.models.resnet18(num_classes=5),
        torchvision.models.resnet18(num_classes=5),
    )
    before = student_network.fc.weight.clone()
    scope = {
        "teacher_network": teacher_network, "student_network": student_network,
        "loader": [(torch.randn(4, 3, 64, 64), torch.arange(4))],
        "optimizer": torch.optim.SGD(student_network.parameters(), 0.01),
    }  # fmt: skip
    exec(code, scope)
    assert scope["loss"].isfinite()
    assert not torch.equal(student_network.fc.weight, before)
