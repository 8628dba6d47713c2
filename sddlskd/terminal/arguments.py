"""Recognise an argument in the form of another command: --home FOLDER for home=FOLDER, and back.

Commands that compose a job take key=value, as Hydra does; other commands take options.
"""

import argparse
import re
import shlex
from collections.abc import Collection, Sequence

__all__ = ["RUN_DIR_IN_HOME", "other_form"]

# What to give instead of home=... to a command that takes a run directory
RUN_DIR_IN_HOME = "give the run directory itself, a folder in {home}/runs"

OPTION = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)
ASSIGNMENT = re.compile(r"([A-Za-z][\w.-]*)=(.*)", re.DOTALL)


def other_form(
    parser: argparse.ArgumentParser,
    words: Sequence[str],
    *,
    keys: Collection[str] | None = None,
    home: str = "",
) -> str:
    """Return what is wrong with the first argument that has the form of another command, or "".

    Words after -- are not looked at.

    Args:
        parser: parser of the command, with all its options.
        words: arguments of the command.
        keys: the keys that the command takes as key=value; None for any key.
        home: what to give instead of the home folder, for a command that takes no such folder, with
            {home} for the folder that the user gave. "" if the command takes one.

    Returns:
        A text such as "--home is unknown; did you mean home=FOLDER?".
    """
    options = parser._option_string_actions
    follows_option = False  # whether the word is the value of the option before
    for index, word in enumerate(words):
        if word == "--":
            return ""
        if follows_option:
            follows_option = False
            continue
        follows_option = word in options and options[word].nargs != 0
        if found := OPTION.fullmatch(word):
            if any(known.startswith(f"--{found[1]}") for known in options):
                continue
            name, value = found[1].replace("-", "_"), found[2] or _value(words[index + 1 :])
            meant = f"{name}={shlex.quote(value)}"
            shown, is_known = f"--{found[1]}", keys is None or name in keys
        elif found := ASSIGNMENT.fullmatch(word):
            name, value = found[1], found[2]
            if keys is None or name in keys:
                continue
            option = f"--{name.replace('_', '-')}"
            meant = f"{option} {shlex.quote(value)}"
            shown, is_known = f"{name}=", option in options
        else:
            continue
        if is_known:
            return f"{shown} is unknown; did you mean {meant}?"
        if name == "home" and home:
            return f"{shown} is unknown here; {home.format(home=shlex.quote(value))}"
    return ""


def _value(following: Sequence[str]) -> str:
    """Return the value of an option, which is the word after it, or "..." if there is none."""
    if not following or following[0].startswith("-") or ASSIGNMENT.fullmatch(following[0]):
        return "..."
    return following[0]
