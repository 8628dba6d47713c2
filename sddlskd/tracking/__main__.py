"""`python -m sddlskd.tracking sync DIR [DIR ...]`: bring the copies of runs up to date."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import FileMirror
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.terminal.arguments import other_form
from sddlskd.terminal.console import refuse_another_checkout, write_line
from sddlskd.terminal.words import counted
from sddlskd.tracking import uri as tracking_uri
from sddlskd.tracking.copies import write_copies
from sddlskd.tracking.runs import sync
from sddlskd.tracking.sweeps import is_planned, sweep_folder, sync_sweep
from sddlskd.tracking.uri import Deleted, first_line


def main(arguments: Sequence[str] | None = None) -> None:
    """Deliver to MLflow the run directories and sweeps in and below the given folders.

    The copies for TensorBoard and W&B that a run's setting `tracking.mirrors` names are brought up
    to date in its run directory, too. With `--to`, nothing is delivered to MLflow: only the copies
    that `--to` names are written, whatever `tracking.mirrors` says. In both cases, no copies are
    written for runs in training, whose own processes write them.

    The exit status is 1, with a message, if the folders hold no run directory and no sweep, or if a
    run directory or sweep cannot be delivered or copied. It is 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m sddlskd.tracking", description=main.__doc__)
    parser.add_argument("command", choices=["sync"])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument(
        "--again",
        action="store_true",
        help="deliver everything again, for example after runs were deleted in MLflow",
    )
    parser.add_argument(
        "--to",
        action="append",
        choices=[str(mirror) for mirror in FileMirror],
        help="write this copy in the run directories, and do not deliver to MLflow",
    )
    given = sys.argv[1:] if arguments is None else arguments
    if wrong := other_form(parser, given, keys=(), home="give the folder of the runs: {home}/runs"):
        parser.error(wrong)
    chosen = parser.parse_args(given)
    refuse_another_checkout()
    cfg.frame()
    runs = sorted(
        {path.parent for folder in chosen.folders for path in folder.rglob("config.yaml")}
    )
    sweeps = {path.parent for folder in chosen.folders for path in folder.rglob("plan.json")}
    if not runs and not sweeps:
        sys.exit(f"error: no run directory in {' '.join(map(str, chosen.folders))}")
    try:
        if chosen.to:
            _write_copies(runs, [FileMirror(name) for name in chosen.to], again=chosen.again)
        else:
            _deliver(runs, sweeps, again=chosen.again)
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command delivers what is missing\n")
        sys.exit(ExitCode.STOPPED)


def _deliver(runs: Sequence[Path], sweeps: set[Path], *, again: bool) -> None:
    """Deliver runs and sweeps to MLflow, and exit with status 1 if some cannot be delivered.

    Args:
        runs: the run directories.
        sweeps: the folders of sweeps; those of the runs are added.
        again: whether to deliver everything again.
    """
    problems: list[str] = []
    delivered = 0  # runs
    answering: set[str | None] = set()  # addresses of MLflow that have answered
    for run in runs:
        try:
            config = cfg.load(run / "config.yaml")
            if config.tracking.mirrors and record.abandoned(run):
                write_copies(run, config.tracking.mirrors, again=again)
            if config.tracking.uri not in answering:
                tracking_uri.check_answers(str(config.tracking.uri))
                answering.add(config.tracking.uri)
            sync(run, again=again)
            delivered += 1
            if is_planned(sweep_folder(config), config):
                sweeps.add(sweep_folder(config))
        except ConnectionError as error:
            sys.exit(f"error: {run} could not be delivered: {error}")
        except Deleted as error:
            problems.append(f"error: {error}")
        except Exception as error:  # one damaged run must not block the delivery of the others
            problems.append(f"error: {run} could not be delivered: {first_line(error)}")
    for sweep in sorted(sweeps):
        try:
            sync_sweep(sweep, again=again)
        except Deleted as error:
            problems.append(f"error: {error}")
        except Exception as error:
            problems.append(f"error: {sweep} could not be delivered: {first_line(error)}")
    write_line(f"MLflow has {counted(delivered, 'run')} up to date")
    if problems:
        # Of a deleted experiment every run has the same problem.
        sys.exit("\n".join(dict.fromkeys(problems)))


def _write_copies(runs: Sequence[Path], mirrors: Sequence[FileMirror], *, again: bool) -> None:
    """Write copies in run directories, and exit with status 1 if some cannot be written.

    A run in training is left out, because its process writes its copies.
    """
    problems: list[str] = []
    ended = [run for run in runs if record.abandoned(run)]
    for run in ended:
        try:
            write_copies(run, mirrors, again=again)
        except Exception as error:  # one damaged run must not block the copies of the others
            problems.append(f"error: {run} could not be copied: {first_line(error)}")
    if training := len(runs) - len(ended):
        write_line(f"left out: {counted(training, 'run')} in training")
    write_line(f"copies are up to date of {counted(len(ended) - len(problems), 'run')}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
