"""Test docs/data.md: its sections, its numbers and its commands agree with the code."""

import re
import shlex
from pathlib import Path

import pytest

from sddlskd.datasets import arrays, folders
from sddlskd.teachers import PUBLISHED
from tests.pages import composed
from tests.tiny import CONF

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
CHOICES = sorted(path.stem for path in (CONF / "dataset").glob("*.yaml"))
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]


def test_every_data_set_has_its_section_and_row() -> None:
    assert [name for name in SECTIONS if name in CHOICES] == CHOICES
    assert re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE) == CHOICES
    for name in CHOICES:
        assert f"dataset={name}" in SECTIONS[name]


def test_its_sums_and_accuracies_are_the_codes() -> None:
    sums = {
        "cifar10": arrays.CIFAR10_MD5, "cifar100": arrays.CIFAR100_MD5, "stl10": arrays.STL10_MD5,
        "cub200": folders.CUB200_MD5, "tiny_imagenet": folders.TINY_IMAGENET_MD5,
    }  # fmt: skip
    for name, md5 in sums.items():
        assert re.findall(r"`([0-9a-f]{32})`", SECTIONS[name]) == [md5]
    for name, teachers in PUBLISHED.items():
        said = dict(re.findall(r"(\w+)\s(\d\d\.\d\d)\b", SECTIONS[name]))
        assert {teacher: float(said[teacher]) for teacher in teachers} == {
            t: p.top1 for t, p in teachers.items()
        }


def test_its_lines_make_a_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for animal in ("cat", "dog"):
        (tmp_path / "pets" / "train" / animal).mkdir(parents=True)
        for number in range(11):
            (tmp_path / "pets" / "train" / animal / f"{number:02}.png").touch()
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", SECTIONS["image_folder"], re.DOTALL)
    exec(block, {})
    splits = folders.image_folder("pets")
    assert [len(split.labels_N) for split in splits] == [18, 4]
    assert isinstance(splits.test, arrays.Files)
    assert [Path(path).stem for path in splits.test.paths] == ["04", "09"] * 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for animal in ("cat", "dog"):  # the folder of the examples
        (tmp_path / "pets" / "train" / animal).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    jobs = composed(command)
    assert jobs
    given = [word for word in shlex.split(command) if word.startswith("dataset=")]
    assert not given or {job.dataset.name for job in jobs} <= {
        given[0].removeprefix("dataset="),
        "pets",
    }
