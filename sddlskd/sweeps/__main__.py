"""`python -m sddlskd.sweeps status|logs|cancel NAME`: look at a sweep, or stop it.

Without a name, `status` lists the sweeps.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from sddlskd import config as cfg
from sddlskd.sweeps import slurm_queue
from sddlskd.sweeps.manifest import local_launch, read_manifest
from sddlskd.sweeps.report import print_status, print_sweeps
from sddlskd.sweeps.status import (
    count_states,
    states_of,
    status_of,
    summaries_of,
    teachers_in_training,
)
from sddlskd.terminal.arguments import other_form
from sddlskd.terminal.console import refuse_another_checkout, write_line

WITHOUT_LOG = ("finished", "pruned", "new")  # states of jobs whose logs need not be shown


def status(folder: Path, *, as_json: bool = False) -> None:
    """Print the state of every job of a sweep, the time left, and the command to continue.

    `folder` is the folder of the sweep, <home>/runs/sweeps/<name>. If `as_json` is true, the fields
    of `status.SweepStatus` are printed as JSON instead.

    Raises:
        FileNotFoundError: If the folder has no sweep.json.
        ValueError: If a file of the sweep or of a job is damaged.
    """
    found = status_of(folder)
    if as_json:
        write_line(json.dumps(asdict(found), indent=1))
    else:
        print_status(found)


def listing(sweeps: Path, *, as_json: bool = False) -> None:
    """Print a line for each sweep in the folder `sweeps`, <home>/runs/sweeps.

    If `as_json` is true, the fields of each `status.SweepSummary` are printed as JSON instead.
    Raise ValueError if a file of a sweep or of a job is damaged.
    """
    found = summaries_of(sweeps)
    if as_json:
        write_line(json.dumps([asdict(one) for one in found], indent=1))
    elif found:
        print_sweeps(found)
    else:
        write_line(f"there is no sweep in {sweeps}; give another folder with --home HOME")


def cancel(folder: Path) -> None:
    """Stop the sweep in `folder`: cancel its SLURM tasks, or signal the process that trains it.

    Running jobs save their checkpoints before they end. A line says what is stopped, or that
    nothing runs. Raise ConnectionError if squeue or scancel is missing, fails or does not answer,
    ValueError if a file of the sweep is damaged, and OSError if the process belongs to another
    user.
    """
    launch = local_launch(folder)
    if launch and launch.is_here:
        os.kill(launch.process, signal.SIGTERM)
        write_line(
            f"stopping process {launch.process}, which runs this sweep: its jobs end after their "
            "current steps, with all checkpoints saved"
        )
        return
    if launch:
        write_line(
            f"this sweep runs on {launch.host}; to stop it, type there: kill -TERM {launch.process}"
        )
        return
    tasks = slurm_queue.cancel_tasks(folder)
    if tasks:
        write_line(f"cancelled: {' '.join(tasks)}")
    else:
        write_line("nothing runs here, and SLURM has no job of this sweep")


def logs(folder: Path, lines: int = 5) -> None:
    """Print the end of the log of every SLURM task of a sweep, or else of every run.

    For each task that was ever submitted, print the path of its log, the names of its jobs' run
    directories, and the last lines of the log, or "not started yet" if there is no log. If no task
    was ever submitted, print the path, the state and the last lines of the train.log of each job
    that has started but is neither finished nor pruned, and of each teacher in training. A last
    line counts the other jobs.

    Args:
        folder: folder of the sweep, <home>/runs/sweeps/<name>.
        lines: number of lines of each log, at least 1.

    Raises:
        ValueError: If a file of the sweep or of a job is damaged.
    """
    submitted = slurm_queue.submissions(folder)
    for one in submitted:
        names = ", ".join(Path(run_dir).name for run_dir in one.run_dirs)
        _print_end(Path(one.log), names, lines)
    if submitted:
        return
    for run_dir in teachers_in_training(folder):
        _print_end(Path(run_dir, "train.log"), "a teacher in training", lines)
    states = states_of(folder, read_manifest(folder)["jobs"])
    for run_dir, state in states.items():
        if state not in WITHOUT_LOG:
            _print_end(Path(run_dir, "train.log"), state, lines)
    others = count_states(state for state in states.values() if state in WITHOUT_LOG)
    if others:
        counts = ", ".join(f"{number} {state}" for state, number in others.items())
        write_line(f"not shown: {counts}; the log of a run is RUN_DIRECTORY/train.log")


def _print_end(log: Path, title: str, lines: int) -> None:
    """Print the path of a log, a title and the last lines of the log."""
    write_line(f"{log}  ({title})")
    last_lines = ["not started yet"]
    if log.exists():
        last_lines = log.read_text(errors="replace").splitlines()[-lines:]
    for line in last_lines:
        write_line(f"    {line}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the state of a sweep or the ends of its logs, or stop the sweep.

    Without the name of a sweep, list the sweeps. An error ends the command with exit code 1, and a
    wrong argument with exit code 2.
    """
    parser = argparse.ArgumentParser(prog="python -m sddlskd.sweeps", description=main.__doc__)
    parser.add_argument(
        "command", nargs="?", default="status", choices=["status", "logs", "cancel"]
    )
    parser.add_argument(
        "sweep", nargs="?", help="name or folder of the sweep; status lists all sweeps without it"
    )
    parser.add_argument(
        "--home", default=os.environ.get("SDDLSKD_HOME", "."), help="folder that holds runs/"
    )
    parser.add_argument("--json", action="store_true", help="print the status as JSON")
    given = sys.argv[1:] if arguments is None else arguments
    if wrong := other_form(parser, given, keys=()):
        parser.error(wrong)
    # Intermixed: argparse would otherwise refuse the name of a sweep after an option.
    chosen = parser.parse_intermixed_args(given)
    if chosen.json and chosen.command != "status":
        parser.error(f"--json belongs to status, not to {chosen.command}")
    if chosen.sweep is None and chosen.command != "status":
        parser.error(f"{chosen.command} requires the name of a sweep; status lists the sweeps")
    refuse_another_checkout()
    cfg.frame()
    sweeps = Path(chosen.home, "runs", "sweeps")
    try:
        if chosen.sweep is None:
            listing(sweeps, as_json=chosen.json)
            return
        folder = _folder_of(chosen.sweep, sweeps)
        if chosen.command == "status":
            status(folder, as_json=chosen.json)
        elif chosen.command == "logs":
            logs(folder)
        else:
            cancel(folder)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def _folder_of(sweep: str, sweeps: Path) -> Path:
    """Return the folder of a sweep, given as its name in the folder `sweeps` or as its own path.

    Exit with code 1 and a message if there is no such sweep.
    """
    for folder in (sweeps / sweep, Path(sweep)):
        if (folder / "sweep.json").exists():
            return folder
    known = sorted(path.parent.name for path in sweeps.glob("*/sweep.json"))
    sys.exit(
        f"error: no sweep {sweep} in {sweeps}; known sweeps: {', '.join(known) or 'none'}; "
        "give another folder with --home HOME"
    )


if __name__ == "__main__":
    main()
