"""Test the commands of docs/faq.md: those of trainings compose, others run."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_readme import composed

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "faq.md").read_text()
QUESTIONS = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
TRAINING = [line.split("  #")[0] for line in LINES if "sddlskd.train" in line and "=" in line]
RUN = [line for line in LINES if "# not run" not in line and "sweep.plan" not in line]


def test_every_question_has_a_command() -> None:
    assert 12 <= len(QUESTIONS) <= 20
    for question in QUESTIONS:
        assert "```sh\npython -m " in question, question.splitlines()[0]


@pytest.mark.parametrize("command", TRAINING)
def test_every_training_composes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for animal in ("cat", "dog"):  # the folder of the examples
        (tmp_path / "pets" / "train" / animal).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    jobs = composed(command.replace(" --cfg job", ""))
    assert (len(jobs) > 1) == ("-m" in shlex.split(command)[3:])


@pytest.mark.parametrize("command", RUN)
def test_the_quick_commands_run(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    assert words[:2] == ["python", "-m"]
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout


@pytest.mark.parametrize("page", ["faq", "troubleshooting", "coming-from"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (ROOT / "docs" / link).exists(), link


def test_the_example_of_a_converted_file_is_what_the_command_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sddlskd.convert.__main__ import main
    from tests.test_convert import cifar

    page = (ROOT / "docs" / "coming-from.md").read_text()
    command, *told = re.findall(r"```console\n\$ (.*?)```", page, re.DOTALL)[0].splitlines()
    words = shlex.split(command)
    path = tmp_path / words[2]
    path.parent.mkdir(parents=True)
    path.write_text(cifar("SDD_DKD", "resnet32x4_sdd", "ShuffleV1_sdd", 0.01))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words[1:])
    main()
    out, err = capsys.readouterr()
    assert (err + out).splitlines() == told
