"""Output of the commands: outcomes, errors in one line, and the log on the terminal."""

import logging
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.errors import (
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.config.schema import M_CURE

__all__ = ["duration", "explain", "log_to_terminal", "outcomes", "write_line"]

# Errors of this package's own checks, with messages for users.
OURS = (ValueError, OSError, RuntimeError)
# Folders of conf/ that are not groups for users to choose from.
NO_CHOICES = (
    "hydra",
    "tuned",
    "adapted",
    "__pycache__",
)


def write_line(text: str) -> None:
    """Write one line of a command's output to stdout."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def duration(seconds: float) -> str:
    """Return a duration in seconds as h:mm:ss or m:ss: 3725 becomes 1:02:05."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def outcomes(
    jobs: Sequence[Config], results: Sequence[dict[str, Any]], *, stopped: bool = False
) -> None:
    """Print a table of the results, and exit if not all runs are FINISHED.

    Args:
        jobs: The configuration of each run.
        results: The content of result.json of each run, in the order of `jobs`.
        stopped: Whether the sweep as a whole was stopped.

    Raises:
        SystemExit: With 130 if a run or the sweep was stopped, else with 1 if a run is not
            FINISHED.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title="top-1 (%) of the best and of the last epoch", title_justify="left")
    for column in ("pair", "method", "M", "seed", "status", "best", "last", "time"):
        table.add_column(column, overflow="fold", no_wrap=column not in ("pair", "status"))
    for job, result in zip(jobs, results, strict=True):
        scores = (result.get(name) for name in ("best_top1", "last_top1"))
        table.add_row(
            f"{job.teacher.name} {job.student.name}" if job.distiller.loss else job.student.name,
            job.distiller.name + ("+ls" if job.standardize else ""),
            ",".join(map(str, job.M)),
            str(job.seed),
            result["status"] + (f": {result['reason']}" if result["reason"] else ""),
            *("-" if score is None else f"{score:.2f}" for score in scores),
            duration(result["seconds"]),
        )
    console = Console()
    console.print(table)
    for folder in sorted({str(Path(job.run_dir).parent) for job in jobs}):
        console.print(f"records in {folder}", soft_wrap=True)
    statuses = {result["status"] for result in results}
    if "KILLED" in statuses or stopped:
        console.print("stopped; the same command continues where it stopped")
        sys.exit(130)
    if statuses - {"FINISHED"}:
        sys.exit(1)


def explain(error: BaseException) -> str:
    """Return one line that says what is wrong and what is valid.

    The message comes from the first error in the chain of causes that was written for users.
    """
    chain: list[BaseException] = [error]
    while (
        cause := chain[-1].__cause__ or chain[-1].__context__
    ) is not None and cause not in chain:
        chain.append(cause)
    for link in chain:
        if isinstance(link, OverrideParseException):
            return (
                f"{link.override} cannot be read ({link.message.splitlines()[0]}); "
                "give key=value, as in M=[1,2,4]"
            )
        if isinstance(link, MissingConfigException):
            return _unknown_choice(link)
        if isinstance(link, InstantiationException):  # its cause says more
            return _one_line(str(link.__cause__ if isinstance(link.__cause__, OURS) else link))
        if isinstance(link, InterpolationResolutionError) and link is not chain[-1]:
            continue  # the error of the resolver says more
        if isinstance(link, ConfigKeyError | ConfigAttributeError):
            return _unknown_key(link)
        if isinstance(link, OmegaConfBaseException) and link.msg:
            return _bad_value(str(link.full_key or ""), _one_line(link.msg), str(error))
        if isinstance(link, OURS) and not isinstance(link, HydraException):
            return _one_line(str(link))
    return _one_line(str(error))


def _unknown_choice(error: MissingConfigException) -> str:
    group, _, name = (error.missing_cfg_file or "").rpartition("/")
    if not group or not error.options:
        return f"there is no configuration {name}; use --config-dir to search another folder"
    return f"{group}={name} is unknown; {_cure(name, error.options, f'{group}=')}"


def _unknown_key(error: OmegaConfBaseException) -> str:
    node = error.parent_node
    if node is None or not hasattr(node, "keys"):
        return _one_line(str(error))
    key, path = str(error.key), str(error.full_key or error.key).rpartition(".")[0]
    valid = [str(k) for k in node if str(k) not in ("hydra", key)]
    if not path:  # at the top level, groups are valid besides keys
        valid += [
            group.name
            for group in sorted(cfg.conf_folder().iterdir(), key=lambda g: g.name)
            if group.is_dir() and group.name not in (*valid, *NO_CHOICES)
        ]
    prefix = f"{path}." if path else ""
    return f"{prefix}{key} is unknown; {_cure(key, valid, prefix)}"


def _cure(bad: str, valid: Sequence[str], prefix: str) -> str:
    close = get_close_matches(bad, valid, n=1)
    return (
        f"did you mean {prefix}{close[0]}? Valid" if close else "valid"
    ) + f" are {', '.join(valid)}"


def _bad_value(key: str, message: str, whole: str) -> str:
    override = re.match(r"Error merging override (\S+)", whole)
    shown = override[1] if override else key
    return (
        f"{shown} is not valid; {M_CURE}"
        if re.fullmatch(r"M(\[\d+\])?", key)
        else f"{shown}: {message}"
    )


def _one_line(text: str) -> str:
    lines = [line.strip() for line in re.sub(r"^\[Errno \d+\] ", "", text).splitlines()]
    return " ".join(
        l for l in lines if l and not l.startswith(("full_key", "object_type", "reference_type"))
    )


def log_to_terminal() -> None:
    """Send the package's log to stderr: coloured on a terminal, else as plain lines."""
    from rich.console import Console
    from rich.logging import RichHandler

    console = Console(stderr=True)
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(
            console=console, show_path=False, show_level=False, rich_tracebacks=False
        )
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    package = logging.getLogger("sddlskd")
    package.handlers[:] = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False
