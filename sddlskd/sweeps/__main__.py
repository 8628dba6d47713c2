"""`python -m sddlskd.sweeps status|logs|cancel NAME`: look at a sweep, or cancel its SLURM jobs."""

import argparse
import os
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.sweeps import slurm, states_of
from sddlskd.sweeps.outcome import STATES, read_manifest, state_of
from sddlskd.terminal.console import duration, write_line


def status(folder: Path) -> None:
    """Print the state of every job of a sweep, the time left, and the command to continue."""
    manifest = read_manifest(folder)
    folders = [Path(path) for path in manifest["jobs"]]
    try:
        live = slurm.queue(folder)
        found = states_of(folder, manifest["jobs"])
    except ConnectionError as error:
        write_line(f"cannot ask SLURM about the jobs of this sweep: {error}")
        live, found = {}, {path: state_of(Path(path)) for path in manifest["jobs"]}
    states = {path: found[str(path)] for path in folders}
    counts = Counter(states.values())
    write_line(
        f"sweep {manifest['name']}: {len(folders)} jobs: "
        + ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s])
    )
    rows = {path: record.read_rows(path) for path in folders if states[path] != "new"}
    paces = [
        row["time/epoch_s"] / record.read_result(path).get("group_size", 1)
        for path, some in rows.items()
        for row in some[-3:]
    ]
    submitted = {run_dir: one.job for one in slurm.submissions(folder) for run_dir in one.run_dirs}
    open_still = {
        path: submitted[str(path)]
        for path in folders
        if states[path] not in ("finished", "failed") and str(path) in submitted
    }
    where = slurm.causes_of_death([job for job in open_still.values() if job not in live])
    where |= {job: f"{state} ({why})" for job, (state, why) in live.items()}
    left = 0.0
    for path in folders:
        some, result = rows.get(path, []), record.read_result(path)
        top1 = result.get("best_top1")
        epochs = (
            cfg.load(path / "config.yaml").trainer.epochs if (path / "config.yaml").exists() else 0
        )
        if states[path] not in ("finished", "failed") and paces:
            left += (epochs - len(some)) * mean(paces)
        reason = (
            f"  {result['reason']}"
            if result.get("reason") and states[path] not in ("queued", "running")
            else ""
        )
        if job := open_still.get(path):
            reason += f"  SLURM job {job}: {where[job]}"
        if result.get("requeues"):
            reason += f"  requeued {result['requeues']} times"
        top1 = max((row["val/top1"] for row in some), default=None) if top1 is None else top1
        shown = "" if top1 is None else f"  top-1 {top1:.2f}"
        write_line(f"  {states[path]:<12} {len(some)}/{epochs} epochs{shown}  {path.name}{reason}")
    if set(counts) - {"finished"}:
        write_line(
            f"time left: about {duration(left)} on one device"
            if paces
            else "time left: not known yet"
        )
        write_line(f"to finish it: cd {shlex.quote(manifest['folder'])} && {manifest['command']}")


def cancel(folder: Path) -> None:
    """Cancel the sweep's jobs in SLURM's queue and print their ids."""
    jobs = slurm.cancel_tasks(folder)
    write_line(f"cancelled: {' '.join(jobs)}" if jobs else "SLURM has no job of this sweep")


def logs(folder: Path, lines: int = 5) -> None:
    """Print the path and the last `lines` lines of the log of every SLURM task of a sweep."""
    for one in slurm.submissions(folder):
        names = ", ".join(Path(run_dir).name for run_dir in one.run_dirs)
        write_line(f"{one.log}  ({names})")
        path = Path(one.log)
        for line in (
            path.read_text(errors="replace").splitlines()[-lines:]
            if path.exists()
            else ["not started yet"]
        ):
            write_line(f"    {line}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the state of a sweep or the logs of its SLURM jobs, or cancel its SLURM jobs."""
    parser = argparse.ArgumentParser(prog="python -m sddlskd.sweeps", description=main.__doc__)
    parser.add_argument("command", choices=["status", "logs", "cancel"])
    parser.add_argument("sweep", help="name or folder of the sweep")
    parser.add_argument(
        "--home", default=os.environ.get("SDDLSKD_HOME", "."), help="folder that holds runs/"
    )
    chosen = parser.parse_args(arguments)
    cfg.frame()
    sweeps = Path(chosen.home, "runs", "sweeps")
    folder = next(
        (
            path
            for path in (sweeps / chosen.sweep, Path(chosen.sweep))
            if (path / "sweep.json").exists()
        ),
        None,
    )
    if folder is None:
        known = sorted(path.parent.name for path in sweeps.glob("*/sweep.json"))
        there = ", ".join(known) or "none"
        sys.exit(
            f"error: no sweep {chosen.sweep} in {sweeps}; known sweeps: {there}; "
            "give another folder with --home HOME"
        )
    try:
        {"status": status, "logs": logs, "cancel": cancel}[chosen.command](folder)
    except ConnectionError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
