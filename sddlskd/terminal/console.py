"""Output of the commands: outcomes, errors in one line, and the log on the terminal."""

import logging
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields
from difflib import SequenceMatcher, get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import MarkedYAMLError

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.config.schema import M_CURE, FeatureConfig
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.terminal.layout import fitting_table

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

__all__ = [
    "duration",
    "explain",
    "log_to_terminal",
    "outcomes",
    "refuse_another_checkout",
    "write_line",
]

# What papers call a recipe or a key, and its name here
PAPERS = {"sdd": "sd_kd", "lskd": "kd_ls", "method": "recipe"}
# Errors of this package's own checks, with messages for users.
OWN_ERRORS = (ValueError, OSError, RuntimeError)
# Hydra's message about several values, and the line for a user
SEVERAL_VALUES = (
    (
        r"Ambiguous value for argument '([^']*)'",
        "{} has several values; put -m before the overrides to run a sweep, or [] around a list",
    ),
    (
        r"Sweep parameters '([^']*)' requires --multirun",
        "{} has several values; put -m before the overrides to run a sweep",
    ),
    (
        r"BasicSweeper does not support sweep type",
        "values such as interval(1,8) require a search; add hydra/sweeper=optuna",
    ),
)
# OmegaConf's message about a value of the wrong type
WRONG_TYPE = re.compile(
    r"Value '(?P<value>.*)' of type '.*' could not be converted to (?P<type>Integer|Float)"
)
FULL_KEY = re.compile(r"full_key: (\S+)")  # OmegaConf appends the key to its messages
# OmegaConf's message about a value that a file must give
MISSING_VALUE = re.compile(r"has missing mandatory value: (\w+)")
# Key of the name of a network of timm or torchvision
NETWORK_NAME = re.compile(r"\b(?:student|teacher|more_teachers\.\w+)\.model\.name\b")
# A setting of a feature method that belongs to no method
LOST_FEATURE = re.compile(rf"features\.({'|'.join(f.name for f in fields(FeatureConfig))})\b")
# Time as hours, minutes and seconds
CLOCK = re.compile(r"(\d+):([0-5]?\d):([0-5]?\d)")
# Unit of a number, by the end of its key
UNITS = {"_min": "minutes", "_minutes": "minutes", "_s": "seconds"}
CLOCK_TIME = "%H:%M:%S"  # of a log line
LONGEST_REASON = 40  # characters of a reason that stands in a table
# Folders of conf/ from which a user does not choose.
NO_CHOICES = ("hydra", "tuned", "adapted", "__pycache__")


def refuse_another_checkout() -> None:
    """Exit with code 1 and a message if Hydra would load the plugins of another checkout.

    Python takes this package from the current folder. Hydra takes the package's plugins (the
    modules of `hydra_plugins`) from the checkout that the environment was installed from. If these
    are two checkouts, a command would mix two revisions.
    """
    package = Path(__file__).resolve().parents[1]
    found = launchers_folder()
    if found not in (package / "hydra_plugins", package.parent / "hydra_plugins"):
        sys.stderr.write(
            f"error: the code is that of {package}, but this environment was installed from "
            f"{found.parent}; run `make setup` in {package.parent} and use its .venv/bin/python\n"
        )
        sys.exit(1)


def launchers_folder() -> Path:
    """Return the folder `hydra_plugins` from which Hydra loads this package's plugins.

    The plugins are Python modules with the launchers and sweepers of `hydra/launcher=...` and
    `hydra/sweeper=...`. The path is absolute, and links in it are resolved.
    """
    spec = find_spec("hydra_plugins.shared_teacher")
    assert spec
    assert spec.origin
    return Path(spec.origin).resolve().parent


def write_line(text: str) -> None:
    """Write `text` and a line break to stdout at once, as a command's output.

    If stdout is a pipe whose reader has gone, as in `... | head`, drop all output from now on.
    """
    try:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would report an error when it flushes the rest at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def duration(seconds: float) -> str:
    """Return a duration in seconds as text: 3725 becomes 1:02:05, and 65 becomes 1:05.

    Fractions of a second are rounded.
    """
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours}:{m:02d}:{s:02d}"
    return f"{m}:{s:02d}"


def outcomes(
    jobs: Sequence[Config],
    results: Sequence[dict[str, Any]],
    *,
    stopped: bool = False,
    searched: Collection[str] = (),
    then: str = "",
) -> None:
    """Print a table of the results of runs, and the folders that hold the run directories.

    Then exit, unless every run is FINISHED or PRUNED and `stopped` is false.

    Args:
        jobs: configuration of each run.
        results: content of result.json of each run, in the order of `jobs`.
        stopped: whether the sweep as a whole was stopped.
        searched: keys that a search varies, as for `cfg.differing_settings`.
        then: line to print after the folders, such as a command that makes tables; "" for none.

    Raises:
        SystemExit: With `ExitCode.STOPPED` (130) if a run is KILLED or `stopped` is true, else with
            1 if a run is neither FINISHED nor PRUNED.
        ValueError: If there are not as many results as jobs.
    """
    from rich.console import Console

    console = Console(markup=False, highlight=False)  # a reason may contain brackets
    order = cfg.table_order(jobs)
    settings = cfg.differing_settings(jobs, searched)
    _print_results(
        console,
        [jobs[index] for index in order],
        [results[index] for index in order],
        [settings[index] for index in order],
    )
    for folder in sorted({str(Path(job.run_dir).parent) for job in jobs}):
        console.print(f"records in {folder}", soft_wrap=True)
    if line := _no_teacher_file(jobs, results):
        console.print(line, soft_wrap=True)
    if then:
        console.print(then, soft_wrap=True)
    statuses = {result["status"] for result in results}
    if "KILLED" in statuses or stopped:
        console.print("stopped; the same command continues where it stopped")
        sys.exit(ExitCode.STOPPED)
    if statuses - {"FINISHED", "PRUNED"}:
        sys.exit(1)


def _print_results(
    console: "RichConsole",
    jobs: Sequence[Config],
    results: Sequence[dict[str, Any]],
    settings: Sequence[str],
) -> None:
    """Print a row for each run.

    A pair of networks that all runs share stands above the table. Long reasons stand below it, and
    so do settings that have no room in it.

    Args:
        console: the terminal.
        jobs: configuration of each run.
        results: content of result.json of each run, in the order of `jobs`.
        settings: text with the settings of each run that the table shows, in the same order.
    """
    title = "top-1 (%) of the best and of the last epoch"
    columns = ["pair", "method", "M", "seed", "settings", "status", "best", "last", "time"]
    if not any(settings):
        columns.remove("settings")
    rows = []
    for job, own, result in zip(jobs, settings, results, strict=True):
        pair = job.student.name
        if job.has_teacher:
            pair = f"{cfg.teacher_name(job)} -> {job.student.name}"
        rows.append(
            {
                "pair": pair,
                "method": cfg.method_name(job),
                "M": ",".join(map(str, job.M)),
                "seed": str(job.seed),
                "settings": own,
                "status": ": ".join(filter(None, (result["status"], result["reason"]))),
                "best": _score(result.get("best_top1")),
                "last": _score(result.get("last_top1")),
                "time": duration(result["seconds"]) if result["seconds"] else "-",
            }
        )
    if len({row["pair"] for row in rows}) == 1:
        console.print(rows[0]["pair"], soft_wrap=True)
        columns.remove("pair")
    reasons = list(dict.fromkeys(result["reason"] for result in results if result["reason"]))
    below: list[str] = []
    if any(len(reason) > LONGEST_REASON for reason in reasons):
        below = [f"[{number}] {reason}" for number, reason in enumerate(reasons, 1)]
        for row, result in zip(rows, results, strict=True):
            if result["reason"]:
                row["status"] = f"{result['status']} [{reasons.index(result['reason']) + 1}]"
    table, width = fitting_table(title, columns, rows, console.width)
    if width > console.width and any(settings):
        below += [f"({number}) {own}" for number, own in enumerate(settings, 1) if own]
        for number, row in enumerate(rows, 1):
            if row["settings"]:
                row["settings"] = f"({number})"
        table, width = fitting_table(title, columns, rows, console.width)
    room = console.width
    console.width = max(room, width)  # a narrow terminal breaks the lines of the table itself
    console.print(table)
    for line in below:
        wrapped = textwrap.fill(
            line,
            room,
            subsequent_indent="    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        console.print(wrapped, soft_wrap=True)


def _no_teacher_file(jobs: Sequence[Config], results: Sequence[dict[str, Any]]) -> str:
    """Return a line that says why finished students are no teacher files, "" if none is concerned.

    The students are those of jobs without a teacher that learn from a part of the images.
    """
    concerned = [
        job
        for job, result in zip(jobs, results, strict=True)
        if not job.has_teacher
        and job.dataset.train_fraction < 1
        and job.trainer.max_steps is None
        and result["status"] == "FINISHED"
    ]
    if not concerned:
        return ""
    names = ", ".join(dict.fromkeys(job.student.name for job in concerned))
    folder = concerned[0].run_dir
    if len(concerned) > 1:
        folder = "RUN_DIRECTORY"
    return (
        f"what was trained alone ({names}) is not written as a teacher file, as "
        f"dataset.train_fraction={concerned[0].dataset.train_fraction:g}; "
        f"teacher.checkpoint={folder}/best.ckpt uses it as a teacher"
    )


def _score(top1: float | None) -> str:
    return "-" if top1 is None else f"{top1:.2f}"


def explain(error: BaseException) -> str:
    """Return one line that tells a user what went wrong and, if known, what is valid.

    The line comes from the first error that is meant for users, among `error`, its cause, the cause
    of the cause and so on: a ValueError, OSError or RuntimeError, or an error of Hydra or
    OmegaConf. Errors of Hydra and OmegaConf are reworded. If there is no such error, the line is
    the message of `error`.
    """
    chain = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    for link in chain:
        if isinstance(link, OverrideParseException):
            first, *more = link.message.splitlines()
            if more and (of_function := re.search(r"while evaluating '.*': (.*)", more[0])):
                return f"{link.override} cannot be read ({of_function[1]}); give other arguments"
            return f"{link.override} cannot be read ({first}); {_readable(str(link.override))}"
        if isinstance(link, MissingConfigException):
            return _unknown_choice(link)
        if isinstance(link, InstantiationException):
            if isinstance(link.__cause__, OWN_ERRORS):
                return _one_line(str(link.__cause__))
            return _one_line(str(link))
        if isinstance(link, InterpolationResolutionError) and link is not chain[-1]:
            continue  # the error of the resolver says more
        if isinstance(link, OmegaConfBaseException) and LOST_FEATURE.match(str(link.full_key)):
            line = _package_line("features", "features.NAME", str(error))
            return f"{line}, NAME being the name of the method in tables"
        if isinstance(link, ConfigKeyError | ConfigAttributeError):
            return _unknown_key(link)
        if isinstance(link, MissingMandatoryValue) and (key := NETWORK_NAME.search(str(link))):
            return f"{key[0]} is missing; name a network of the library, as in {key[0]}=resnet18"
        if isinstance(link, OmegaConfBaseException) and link.msg:
            return _bad_value(str(link.full_key or ""), _one_line(link.msg), str(error))
        if isinstance(link, MarkedYAMLError) and (mark := link.problem_mark):
            return f"{mark.name}, line {mark.line + 1}, is not YAML ({link.problem}); correct it"
        if isinstance(link, OverflowError) and (key := FULL_KEY.search(str(link))):
            return f"{key[1]} is too large for a number; give a smaller one"
        if isinstance(link, OWN_ERRORS) and not isinstance(link, HydraException):
            return _one_line(str(link))
    said = _one_line(str(error))
    if re.search(r"Could not override '\w+@recipe\.", said):
        return _package_line("recipe", "_global_", said)
    for pattern, reason in SEVERAL_VALUES:
        if match := re.search(pattern, said):
            return reason.format(*match.groups())
    return said


def _package_line(group: str, package: str, whole: str) -> str:
    """Return the advice to put its `# @package` line into a file of `group`.

    `whole` is Hydra's message, which may name the file.
    """
    named = re.match(r"In '(.+?)'", whole)
    file = f"{named[1]}.yaml" if named else f"the file of {group}=..."
    return f"the first line of {file} must be `# @package {package}`"


def _readable(override: str) -> str:
    """Return advice how to write an override that Hydra cannot read."""
    key, equals, value = _without_quotes(override).partition("=")
    if not equals or value.startswith(("[", "{")):
        return "give key=value, as in M=[1,2,4]"
    text = _without_quotes(value).replace('"', '\\"')
    quoted = shlex.quote(f'{key}="{text}"')
    return f"put the value in quotes, and all of it in quotes for the shell: {quoted}"


def _without_quotes(text: str) -> str:
    """Return a text without the quotes around it, if it begins and ends with the same quote."""
    quoted = re.fullmatch(r"""(['"])(.*)\1""", text, re.DOTALL)
    return quoted[2] if quoted else text


def _unknown_choice(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not group or not error.options:
        return f"there is no configuration {name}; use --config-dir to search another folder"
    reason = f"{group}={name} is unknown; {_valid_names(name, error.options, f'{group}=')}"
    if group in ("teacher", "student"):
        reason = (
            f"{reason}; {group}=timm {group}.model.name=NAME takes a network of timm, and "
            f"{group}=torchvision one of torchvision"
        )
    return reason


def _unknown_key(error: OmegaConfBaseException) -> str:
    node = error.parent_node
    if node is None or not hasattr(node, "keys"):
        return _one_line(str(error))
    key = str(error.key)
    path = str(error.full_key or error.key).rpartition(".")[0]
    valid = [str(k) for k in node if str(k) not in ("hydra", key)]
    if not path:  # at the top level, groups are valid besides keys
        valid += [
            group.name
            for group in sorted(cfg.conf_folder().iterdir(), key=lambda g: g.name)
            if group.is_dir() and group.name not in (*valid, *NO_CHOICES)
        ]
    prefix = f"{path}." if path else ""
    if f"{prefix}{key}" == "hydra.launcher.devices" and "partition" in valid:
        return (
            "hydra.launcher.devices is unknown here: SLURM assigns devices; set "
            "hydra.launcher.gpus_per_node"
        )
    # The default launcher has devices, and none of the options that only SLURM knows.
    of_slurm = OmegaConf.load(cfg.conf_folder() / "hydra" / "launcher" / "slurm.yaml")
    if prefix == "hydra.launcher." and "devices" in valid and key in of_slurm:
        return f"hydra.launcher.{key} is unknown here; hydra/launcher=slurm has it"
    names = _valid_names(key, valid, prefix)
    if key == "pretrained" and "weights" in valid:  # timm's name for it
        return f"{prefix}{key} is unknown; for published weights set {prefix}weights=DEFAULT"
    config = OmegaConf.to_container(node._get_root(), resolve=False)
    places = _places_of(key, config)
    if not places and not path:  # a typo of a name below a group, such as temprature
        inner = {place.rpartition(".")[2] for place in _dotted_keys(config)}
        near = _closest(key, sorted(inner | set(valid)))
        if near and near not in valid:
            places = _places_of(near, config)
    if places:
        names = f"did you mean {' or '.join(places)}? Valid are {', '.join(valid)}"
    return f"{prefix}{key} is unknown; {names}"


def _places_of(key: str, config: Any) -> list[str]:
    """Return the dotted keys of a configuration that end in `key`; of several, the least deep ones.

    A key of the data set is left out if another group has it, too, because it is then only the
    default of the other. Of hydra's keys, only those of the launcher count.
    """
    found = [place for place in _dotted_keys(config) if place.rpartition(".")[2] == key]
    found = [
        place
        for place in found
        if not place.startswith("hydra.") or place.startswith("hydra.launcher.")
    ]
    depth = min((place.count(".") for place in found), default=0)
    nearest = [place for place in found if place.count(".") == depth > 0]
    nearest = [place for place in nearest if not place.startswith("dataset.")] or nearest
    # Who types lr means optimizer.lr more often than student.lr or teacher.lr.
    return sorted(nearest, key=lambda place: not place.startswith("optimizer."))


def _dotted_keys(config: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every value below a dictionary."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield f"{prefix}{key}"
            yield from _dotted_keys(value, f"{prefix}{key}.")


def _valid_names(bad: str, valid: Sequence[str], prefix: str) -> str:
    """Return the end of a message that lists the valid names; the name most like `bad` comes first.

    `prefix` stands before that name, as in "did you mean student=resnet8?".
    """
    names = f"are {', '.join(valid)}"
    if close := _closest(bad, valid):
        return f"did you mean {prefix}{close}? Valid {names}"
    return f"valid {names}"


def _closest(bad: str, valid: Sequence[str]) -> str | None:
    """Return the valid name most like `bad`, or None if none is like it.

    The name that `bad` means in tables or papers comes first, then one that ends in all of `bad`,
    as imagenet_resnet34 ends in resnet34. Of names that are equally like `bad`, the one with the
    same letters in another order comes first.
    """
    typed = re.sub("[-+ ]+", "_", bad.lower())  # SD-KD+LS, as tables write it, is sd_kd_ls
    typed = PAPERS.get(typed, typed)
    if typed in valid:
        return typed
    if longer := [name for name in valid if name.endswith(f"_{bad}")]:
        return longer[0]
    return max(
        get_close_matches(bad, valid),
        key=lambda name: _likeness(bad, name) + _likeness(sorted(bad), sorted(name)),
        default=None,
    )


def _likeness(one: Sequence[str], other: Sequence[str]) -> float:
    return SequenceMatcher(None, one, other).ratio()


def _bad_value(key: str, message: str, whole: str) -> str:
    override = re.match(r"Error merging override (\S+)", whole)
    shown = override[1] if override else key
    refused = WRONG_TYPE.search(message)
    is_null = "is not Optional" in message
    if not override and refused:
        shown = f"{key}={refused['value']}"
    elif not override and is_null:
        shown = f"{key}=null"
    if key == "recipe" and "Cannot convert 'DictConfig'" in message:
        return _package_line("recipe", "_global_", whole)
    if missing := MISSING_VALUE.search(message):
        group, name = key.rpartition(".")[0], missing[1]
        meaning = " (the name in tables)" if name == "name" else ""
        return f"{key} is missing; add a line `{name}: ...`{meaning} to the file of {group}=..."
    if re.fullmatch(r"M(\[\d+\])?", key):
        return f"{shown} is not valid; {M_CURE}"
    if is_null:
        return f"{shown} is not valid; give a value, or leave it out for the default"
    if refused:
        kind = "an integer" if refused["type"] == "Integer" else "a number"
        if unit := next((UNITS[end] for end in UNITS if key.endswith(end)), ""):
            kind = f"{kind} of {unit}"
        return f"{shown} is not {kind}{_clock_as_number(refused['value'], unit)}"
    return f"{shown}: {message}"


def _clock_as_number(value: str, unit: str) -> str:
    """Return "; 24:00:00 is 1440" for a time of day that should be a number of `unit`, else ""."""
    clock = CLOCK.fullmatch(value)
    if not clock or not unit:
        return ""
    hours, minutes, seconds = map(int, clock.groups())
    number = 3600 * hours + 60 * minutes + seconds
    if unit == "minutes":
        number = -(-number // 60)
    return f"; {value} is {number}"


def _one_line(text: str) -> str:
    lines = [line.strip() for line in re.sub(r"^\[Errno \d+\] ", "", text).splitlines()]
    return " ".join(
        l for l in lines if l and not l.startswith(("full_key", "object_type", "reference_type"))
    )


def log_to_terminal() -> None:
    """Send the package's log to stderr, each message with its time (HH:MM:SS).

    On a terminal, long messages are broken between words, never within a path. Messages below level
    INFO are not shown, nor are those with the attribute `only_in_file`. Earlier handlers of the
    package's log are removed, and the root logger gets none of its messages.
    """
    from rich.console import Console

    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        from sddlskd.terminal.lines import LineHandler

        handler = LineHandler(console=console)
    else:
        handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", CLOCK_TIME))
    handler.addFilter(lambda entry: not hasattr(entry, "only_in_file"))
    package = logging.getLogger("sddlskd")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False
