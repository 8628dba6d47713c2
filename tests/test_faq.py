"""Test the quick commands of docs/faq.md, and the example of docs/coming-from.md."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "faq.md").read_text()
QUESTIONS = re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]
LINES = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
]
RUN = [line for line in LINES if "# not run" not in line and "sweep.plan" not in line]


def test_every_question_has_a_command() -> None:
    assert 12 <= len(QUESTIONS) <= 20
    for question in QUESTIONS:
        assert "```sh\npython -m " in question, question.splitlines()[0]


@pytest.mark.parametrize("command", RUN)
def test_the_quick_commands_run(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    program = {"python": [sys.executable], "sddlskd": [sys.executable, "-m", "sddlskd"]}[words[0]]
    done = subprocess.run(
        [*program, *words[1:]], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout


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
