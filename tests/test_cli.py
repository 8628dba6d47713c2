"""Test the command `sddlskd`, which calls the modules by shorter names."""

import argparse
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from sddlskd import __main__ as cli
from sddlskd import server
from sddlskd.terminal.arguments import other_form

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "hydra", "omegaconf", "mlflow", "numpy", "pandas", "rich")
# What `python -m` is called with for each command and the argument X.
CALLS = {
    "train": ["sddlskd.train", "X"],
    "sweep": ["sddlskd.train", "-m", "X"],
    "status": ["sddlskd.sweeps", "status", "X"],
    "logs": ["sddlskd.sweeps", "logs", "X"],
    "cancel": ["sddlskd.sweeps", "cancel", "X"],
    "teachers": ["sddlskd.teachers", "X"],
    "repeat": ["sddlskd.repeat", "X"],
    "convert-config": ["sddlskd.convert", "X"],
    "evaluate": ["sddlskd.evaluate", "X"],
    "export": ["sddlskd.export", "X"],
    "tables": ["sddlskd.analysis", "X"],
    "sync": ["sddlskd.tracking", "sync", "X"],
    "server": ["sddlskd.server", "X"],
}


FOLDER = "give the run directory itself, a folder in /x/runs"
# Arguments in the form of another command, and what is said of them
OTHER_FORMS = [
    ("sddlskd.train", "dataset=digits --home /x", "--home is unknown; did you mean home=/x?"),
    ("sddlskd.train", "--home", "--home is unknown; did you mean home=...?"),
    ("sddlskd.train", "--M=[1,2] -m", "--M is unknown; did you mean M='[1,2]'?"),
    ("sddlskd.teachers", "list --home=/x", "--home is unknown; did you mean home=/x?"),
    ("sddlskd.evaluate", "run --home /x", "--home is unknown; did you mean home=/x?"),
    ("sddlskd.sweeps", "status first home=/x", "home= is unknown; did you mean --home /x?"),
    ("sddlskd.sweeps", "status home=/x", "home= is unknown; did you mean --home /x?"),
    ("sddlskd.export", "home=/x", f"home= is unknown here; {FOLDER}"),
    ("sddlskd.export", "run to=onnx", "to= is unknown; did you mean --to onnx?"),
    ("sddlskd.worker", "--home /x", f"--home is unknown here; {FOLDER}"),
    ("sddlskd.tracking", "sync home=/x", "home= is unknown here; give the folder of the runs: "
     "/x/runs"),
    ("sddlskd.server", "--home /x", "--home is unknown here; give the folder of the server: "
     "--folder /x/tracking-server"),
    ("sddlskd.repeat", "X --home /x", "--home is unknown; did you mean home=/x?"),
    ("sddlskd.repeat", "X seed", "seed is no override; give KEY=VALUE, such as seed=3"),
    ("sddlskd.convert", "file.yaml seed=1", "seed= is unknown; did you mean --seed 1?"),
    ("analysis.__main__", "first home=/x", "home= is unknown; did you mean --home /x?"),
    ("analysis.__main__", "coverage uri=u", "uri= is unknown; did you mean --uri u?"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "words", "said"), OTHER_FORMS)
def test_an_argument_in_the_form_of_another_command_is_named_in_the_right_form(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: str,
    words: str,
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", [module, *words.split()])
    name = module
    if find_spec(module).submodule_search_locations:
        name = f"{module}.__main__"
    with pytest.raises(SystemExit) as caught:
        import_module(name).main()
    assert caught.value.code in (1, 2)
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"error: {said}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--threads -1", "argument --threads: -1 must be at least 1"),
        ("--progress loud", "argument --progress: invalid choice: 'loud' (choose from "),
    ],
)
def test_a_wrong_option_of_a_worker_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str, said: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["sddlskd.worker", "run", *words.split()])
    with pytest.raises(SystemExit) as caught:
        import_module("sddlskd.worker").main()
    assert caught.value.code == 2
    assert f"error: {said}" in capsys.readouterr().err.splitlines()[-1]


def test_values_of_options_and_words_after_two_dashes_have_no_other_form() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--set")
    parser.add_argument("--home")
    parser.add_argument("--json", action="store_true")
    for words in (["--set", "home=x"], ["--", "home=x"], ["--hom", "x"], ["my=x"]):
        assert other_form(parser, words, keys=()) == ""
    assert other_form(parser, ["--json", "home=x"], keys=()).endswith("did you mean --home x?")


@pytest.mark.parametrize("port", ["-1", "0", "65536"])
def test_a_number_that_is_no_port_is_refused(capsys: pytest.CaptureFixture[str], port: str) -> None:
    with pytest.raises(SystemExit) as caught:
        server.main(["--port", port])
    assert caught.value.code == 2
    said = f"error: --port {port} is not valid; give a number from 1 to 65535\n"
    assert capsys.readouterr().err.endswith(said)


def call(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def replaced_by(monkeypatch: pytest.MonkeyPatch, *words: str) -> list[str]:
    """Return the command by which `sddlskd WORDS` replaces itself."""

    class Replaced(Exception):
        pass

    def execv(program: str, command: list[str]) -> None:
        assert program == command[0] == sys.executable
        raise Replaced(*command[1:])

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["sddlskd", *words])
    with pytest.raises(Replaced) as caught:
        cli.main()
    return list(caught.value.args)


def test_every_command_is_here() -> None:
    assert list(cli.COMMANDS) == list(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_a_command_is_a_module_with_the_same_arguments(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    assert replaced_by(monkeypatch, name, "X") == ["-m", *CALLS[name]]
    assert find_spec(CALLS[name][0])
    assert replaced_by(monkeypatch, name, "--help")[-1] == "--help"


def test_the_tables_come_from_a_checkout_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert replaced_by(monkeypatch, "tables", "X") == ["-m", "analysis", "X"]


@pytest.mark.parametrize("option", ["--help", "-h", "help"])
def test_help_lists_every_command_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["sddlskd", option])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert [line for line in lines if line.split() == [name, *command.help.split()]]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from sddlskd.__main__ import main\n"
        "try: main()\n"
        f"finally: sys.stderr.write(' '.join(set(sys.modules) & set({HEAVY})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sddlskd COMMAND" in done.stdout


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["frobnicate"], "sddlskd frobnicate is unknown"),
        (["sweeps"], "sddlskd sweeps is unknown (sddlskd status lists the sweeps)"),
        (["trian"], "sddlskd trian is unknown (did you mean train?)"),
        ([], "a command is missing"),
    ],
)
def test_an_unknown_command_is_one_line_that_lists_the_valid_ones(
    words: list[str], problem: str
) -> None:
    done = call("sddlskd", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {problem}; valid are {', '.join(CALLS)}\n"


def test_code_output_and_folder_are_those_of_the_module(tmp_path: Path) -> None:
    """Call a command and its module in a folder that has no sweep."""
    short = call("sddlskd", "status", "mine", cwd=tmp_path)
    long = call("sddlskd.sweeps", "status", "mine", cwd=tmp_path)
    assert (short.returncode, short.stdout, short.stderr) == (
        long.returncode,
        long.stdout,
        long.stderr,
    )
    assert long.returncode == 1
    assert long.stderr.startswith("error: no sweep mine in runs/sweeps")


def test_the_scripts_lead_to_functions() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) == {"sddlskd", "sddlskd-train"}
    for target in scripts.values():
        module, function = target.split(":")
        assert callable(getattr(import_module(module), function))
