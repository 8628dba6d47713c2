"""The command `sddlskd`, also `python -m sddlskd`: one name for the commands of this package.

Each subcommand runs one module with the remaining arguments: `sddlskd status NAME` runs
`python -m sddlskd.sweeps status NAME`.
"""

import os
import sys
from difflib import get_close_matches
from importlib.util import find_spec
from typing import NamedTuple

__all__ = ["main"]

HELP = ("-h", "--help", "help")
USAGE_ERROR = 2  # exit code of argparse, too


class Command(NamedTuple):
    """Subcommand of the command `sddlskd`.

    Attributes:
        module: name of the module that `python -m` runs.
        arguments: first arguments of the module; the user's arguments follow.
        help: description of the subcommand, in a few words.
    """

    module: str
    arguments: list[str]
    help: str


COMMANDS = {
    "train": Command("sddlskd.train", [], "train one student, or continue its training"),
    "sweep": Command("sddlskd.train", ["-m"], "train a grid of students, or continue the grid"),
    "status": Command(
        "sddlskd.sweeps", ["status"], "list the sweeps, or show the state of every job of one"
    ),
    "logs": Command("sddlskd.sweeps", ["logs"], "show the ends of the logs of a sweep"),
    "cancel": Command("sddlskd.sweeps", ["cancel"], "stop a sweep"),
    "teachers": Command("sddlskd.teachers", [], "list, fetch, verify or import teachers"),
    "repeat": Command("sddlskd.repeat", [], "print the command that repeats a run"),
    "convert-config": Command(
        "sddlskd.convert", [], "print the command for a file of mdistiller, SDD, LSKD, torchdistill"
    ),
    "evaluate": Command("sddlskd.evaluate", [], "measure a trained network"),
    "export": Command("sddlskd.export", [], "export a trained student"),
    "tables": Command("analysis", [], "write the tables, figures and report of a sweep"),
    "sync": Command("sddlskd.tracking", ["sync"], "deliver run directories to MLflow"),
    "server": Command("sddlskd.server", [], "run a tracking server on this machine"),
}


def main() -> None:
    """Run the subcommand that the first command line argument names.

    The function does not return: `python -m MODULE ARGUMENTS` replaces this process (`os.execv`).

    Raises:
        SystemExit: With code 0 after printing the help, if the argument is -h, --help or help. With
            code 2 after an error message, if there is no argument or no such subcommand.
    """
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in HELP:
        sys.stdout.write(_help())
        sys.exit()
    if name not in COMMANDS:
        sys.stderr.write(f"error: {_unknown(name)}\n")
        sys.exit(USAGE_ERROR)
    command = COMMANDS[name]
    module = command.module
    # The analysis is beside the package in a checkout, and inside the package if that is installed.
    if module == "analysis" and find_spec("sddlskd.analysis"):
        module = "sddlskd.analysis"
    python = [sys.executable, "-m", module, *command.arguments, *sys.argv[2:]]
    os.execv(sys.executable, python)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sddlskd COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "sddlskd COMMAND --help shows the arguments of a command.",
            "",
        ]
    )


def _unknown(name: str) -> str:
    """Return the error message for an unknown command, or for a missing one if `name` is ""."""
    wrong = f"sddlskd {name} is unknown" if name else "a command is missing"
    if name == "sweeps":  # the name of the module
        wrong = f"{wrong} (sddlskd status lists the sweeps)"
    elif close := get_close_matches(name, COMMANDS, n=1):
        wrong = f"{wrong} (did you mean {close[0]}?)"
    return f"{wrong}; valid are {', '.join(COMMANDS)}"


if __name__ == "__main__":
    main()
