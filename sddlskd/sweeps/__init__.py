"""Sweeps: plan, freeze and run many jobs, on this machine or on SLURM, and resume stopped sweeps.

    python -m sddlskd.sweeps status NAME   print the state of every job and the command to continue
    python -m sddlskd.sweeps logs NAME     print the last lines of the logs of the SLURM tasks
    python -m sddlskd.sweeps cancel NAME   cancel the sweep's SLURM jobs

The state of a sweep consists of the run directories of its jobs and a list of these directories in
runs/sweeps/<name>/sweep.json. The file slurm.json in the same folder lists the submitted SLURM
jobs. There is no other state.
"""

import json
import logging
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from filelock import FileLock

from sddlskd import config as cfg
from sddlskd import record, tracking
from sddlskd.config import Config, Rerun
from sddlskd.record import FAILED, FINISHED, KILLED, RUNNING
from sddlskd.sweeps import slurm
from sddlskd.sweeps.grid import InvalidJobs, reasons_together
from sddlskd.sweeps.outcome import LOCK, STATES, read_manifest, result_of, state_of
from sddlskd.sweeps.pool import Pool
from sddlskd.sweeps.slurm import Slurm
from sddlskd.terminal.console import duration, outcomes, write_line

__all__ = ["groups_of", "run_sweep"]

log = logging.getLogger(__name__)


def groups_of(jobs: Iterable[Config], max_group_size: int | None = None) -> list[list[Config]]:
    """Return groups of jobs that can share batches and teacher, each of at most `max_group_size`.

    A job that occurs twice in `jobs` is taken once. Without `max_group_size`, the groups are as
    large as possible.
    """
    together: dict[str, dict[str, Config]] = {}
    for job in jobs:
        together.setdefault(cfg.sharing_key(job), {})[job.run_dir] = job
    groups = [list(group.values()) for group in together.values()]
    size = max_group_size or max(map(len, groups), default=1)
    return [group[at : at + size] for group in groups for at in range(0, len(group), size)]


def run_sweep(
    jobs: Sequence[Config],
    name: str,
    *,
    pool: Pool | Slurm,
    max_group_size: int | None = None,
) -> list[dict[str, Any]]:
    """Run the unfinished jobs of a sweep and return the result of every job.

    FINISHED jobs stay untouched, interrupted jobs continue, and FAILED jobs run again (see
    `sweep.rerun`). Jobs in SLURM's queue stay there. If `sweep.plan` is set, only print the plan.

    Args:
        jobs: the jobs of the sweep; duplicates run once.
        name: name of the sweep.
        pool: launcher that runs the jobs.
        max_group_size: largest number of jobs that train side by side; None for no limit.

    Returns:
        The content of every job's result.json, in the order of `jobs`.

    Raises:
        ValueError: before anything starts, if jobs are invalid (all of them are named) or if
            several jobs have the same run directory.
        ConnectionError: if the tracking server or SLURM does not answer.
        SystemExit: with code 1 if a job failed or a planned job is invalid, 130 if the sweep was
            stopped, and 0 after printing a valid plan.
    """
    unique = list({job.run_dir: job for job in jobs}.values())
    if len(unique) < len({cfg.config_hash(job) for job in jobs}):
        raise ValueError(
            "several jobs of the sweep have one run_dir; "
            "leave run_dir out, so that each job gets its own"
        )
    folder = Path(unique[0].home, "runs", "sweeps", name)
    states = states_of(folder, [job.run_dir for job in unique])
    rerun = unique[0].sweep.rerun
    skipped = (
        {"running", "queued"}
        | ({"finished"} if rerun is not Rerun.all else set())
        | ({"failed"} if rerun is Rerun.none else set())
    )
    todo = [job for job in unique if states[job.run_dir] not in skipped]
    as_here = (
        todo
        if pool.runs_locally
        else [replace(job, trainer=replace(job.trainer, device="auto", devices=1)) for job in todo]
    )
    seen = _precheck(as_here, [job for job in unique if states[job.run_dir] == "finished"])
    if seen.invalid and not unique[0].sweep.plan:
        raise InvalidJobs(seen.invalid)
    if seen.changed:
        log.warning(
            "%d finished jobs learnt from another teacher file than the current one (%s ...); "
            "sweep.rerun=all runs them again",
            len(seen.changed),
            ", ".join(map(cfg.run_name, seen.changed[:3])),
        )
    groups = groups_of(todo, max_group_size)
    plan = _plan(name, unique, states, groups)
    if unique[0].sweep.plan:
        for line in [*plan, *(f"cannot run: {line}" for line in reasons_together(seen.invalid))]:
            write_line(line)
        sys.exit(1 if seen.invalid else 0)
    log.info("%s", "; ".join(plan))
    if todo:  # these checks come before anything is written
        tracking.check_reachable(todo)
        pool.validate(todo)
    _write_manifest(name, unique)
    if todo:
        if rerun is Rerun.all:
            for job in todo:
                _set_aside(Path(job.run_dir))
        registered = tracking.register(todo, sweep=name)
        for job in registered:
            record.freeze(job)
            record.queue_again(Path(job.run_dir))
        tracking.log_plan(registered[0], _write_plan(folder, name, unique))
    elif not _planned(folder) >= {job.run_dir for job in unique}:
        _register_what_others_ran(folder, name, unique)
    ended = FINISHED
    if todo or "queued" in states.values() or "running" in states.values():
        ended = pool.run(groups, folder, seen.devices)
        if ended == RUNNING:
            write_line(f"state: python -m sddlskd.sweeps status {folder}")
            return [result_of(job) for job in jobs]
        if todo:
            tracking.finish_sweep(registered[0], KILLED if ended == KILLED else _outcome(unique))
    results = [result_of(job) for job in unique]
    digest(unique, results)
    if any(result["status"] != FINISHED for result in results):
        write_line(
            f"to go on: {_command(unique[0].home)}    "
            f"(state: python -m sddlskd.sweeps status {folder})"
        )
        if not pool.runs_locally:
            write_line(f"logs of the tasks: python -m sddlskd.sweeps logs {folder}")
    outcomes(unique, results, stopped=ended == KILLED)
    return [result_of(job) for job in jobs]


def states_of(folder: Path, run_dirs: Iterable[str]) -> dict[str, str]:
    """Return {run directory: state} for the sweep in `folder`.

    An unfinished job in SLURM's queue counts as queued or running.
    """
    own, live = {run_dir: state_of(Path(run_dir)) for run_dir in run_dirs}, slurm.states(folder)
    return {
        run_dir: state if state == "finished" else live.get(run_dir, state)
        for run_dir, state in own.items()
    }


def _outcome(jobs: Iterable[Config]) -> str:
    return FINISHED if all(state_of(Path(job.run_dir)) == "finished" for job in jobs) else FAILED


def _register_what_others_ran(folder: Path, name: str, jobs: Sequence[Config]) -> None:
    """Register in MLflow a sweep whose jobs were all run by other sweeps.

    If MLflow does not answer, only log a warning: the run directories hold all results.
    """
    try:
        tracking.check_reachable(jobs)
        first = tracking.register(jobs[:1], sweep=name)[0]
    except ConnectionError as error:
        log.warning("MLflow does not know of sweep %s: %s", name, error)
        return
    tracking.log_plan(first, _write_plan(folder, name, jobs))
    tracking.finish_sweep(first, _outcome(jobs))


@dataclass
class Precheck:
    """Facts about a sweep that are known before any job starts.

    Attributes:
        invalid: (name, reason) of each job that cannot run.
        changed: finished jobs whose teacher file has been replaced since.
        devices: devices of this machine.
    """

    invalid: list[tuple[str, str]]
    changed: list[Config]
    devices: list[str]


def _precheck(todo: Sequence[Config], finished: Sequence[Config]) -> Precheck:
    if not todo and not any(job.distiller.loss for job in finished):
        return Precheck([], [], [])
    answer = ask_precheck(list(todo), list(finished))
    return Precheck(
        [(cfg.run_name(todo[at]), reason) for at, reason in answer["problems"]],
        [finished[at] for at in answer["changed"]],
        answer["devices"],
    )


def ask_precheck(todo: list[Config], finished: list[Config]) -> dict[str, Any]:
    """Return the answer of `sddlskd.sweeps.precheck`, run in a separate process.

    The separate process keeps this process small while it waits for the workers.

    Raises:
        ChildProcessError: if the separate process dies.
    """
    command = [sys.executable, "-m", "sddlskd.sweeps.precheck"]
    done = subprocess.run(
        command, input=pickle.dumps((todo, finished)), stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        why = (
            signal.Signals(-done.returncode).name
            if done.returncode < 0
            else f"exit code {done.returncode}"
        )
        raise ChildProcessError(
            f"the check of the jobs died ({why}), so none was started; see its output above"
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _set_aside(folder: Path) -> None:
    if folder.exists():
        if (folder / "config.yaml").exists():
            tracking.supersede(folder)
        folder.rename(folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"))


def _plan(
    name: str, jobs: Sequence[Config], states: dict[str, str], groups: Sequence[Sequence[Config]]
) -> list[str]:
    counts = Counter(states.values())
    state = ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s])
    todo = sum(map(len, groups))
    lines = [f"sweep {name}: {len(jobs)} jobs ({state}), {todo} to do in {len(groups)} groups"]
    taught = [group for group in groups if group[0].distiller.loss]
    alone = sum(map(len, taught))
    if len(taught) < alone:
        lines.append(
            f"the teacher goes through the data {len(taught)} times an epoch instead of {alone}"
        )
    known = [_seconds(job) for group in groups for job in group]
    if todo and all(s is not None for s in known):
        lines.append(
            f"about {duration(sum(s for s in known if s is not None))} on one device, "
            "estimated from similar runs"
        )
    elif todo:
        lines.append("there are no similar runs yet, so the time is not known")
    return lines


def _seconds(job: Config) -> float | None:
    """Return the estimated seconds that the job adds to a sweep, or None if there are no past runs.

    The estimate is the mean time per epoch of past runs of the same student, teacher and data set.
    The time of a run is divided by its group size, because the runs of a group share their time.
    """
    label = (
        f"{job.teacher.name}-{job.student.name}-*"
        if job.distiller.loss
        else f"{job.student.name}-*"
    )
    done = [
        record.read_result(path.parent)
        for path in Path(job.run_dir).parent.glob(f"{label}/result.json")
    ]
    rates = [r["seconds"] / r["epochs"] / r.get("group_size", 1) for r in done if r.get("epochs")]
    return mean(rates) * job.trainer.epochs if rates else None


def _command(home: str) -> str:
    """Return the command that was typed, with its home added if the command does not name one.

    The home may come from the environment or the current folder.
    """
    # The user meant these two overrides for one launch only.
    again = [word for word in sys.argv[1:] if word not in ("sweep.rerun=all", "sweep.plan=true")]
    again += [] if any(word.startswith("home=") for word in again) else [f"home={home}"]
    return shlex.join(["python", "-m", "sddlskd.train", *again])


def _write_manifest(name: str, jobs: Sequence[Config]) -> Path:
    """Add the jobs to the sweep's sweep.json and return the sweep's folder."""
    folder = Path(jobs[0].home, "runs", "sweeps", name)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        known = read_manifest(folder)["jobs"] if (folder / "sweep.json").exists() else []
        listed = list(dict.fromkeys([*known, *(job.run_dir for job in jobs)]))
        content = {
            "name": name,
            "command": _command(jobs[0].home),
            "folder": os.getcwd(),
            "time": time.time(),
            "jobs": listed,
        }
        record.write_text(folder / "sweep.json", json.dumps(content, indent=1))
    return folder


def _write_plan(folder: Path, name: str, jobs: Sequence[Config]) -> Path:
    """Write plan.json, which lists all jobs of the sweep with their MLflow parameters, for MLflow.

    Parameters that all jobs have in common are written once. Each job then lists the parameters in
    which it differs. Return the path of the file.
    """
    with FileLock(folder / LOCK):
        return _add_to_plan(folder / "plan.json", name, jobs)


def _add_to_plan(path: Path, name: str, jobs: Sequence[Config]) -> Path:
    params = {
        job.run_dir: {key: str(value) for key, value in cfg.flatten(job).items()} for job in jobs
    }
    hashes = {job.run_dir: (cfg.config_hash(job), cfg.settings_hash(job)) for job in jobs}
    # An earlier launch, which may have had other jobs, may have written the file.
    if path.exists():
        earlier = json.loads(path.read_text())
        for job in earlier["jobs"]:
            params.setdefault(job["run_dir"], earlier["common"] | job["params"])
            hashes.setdefault(job["run_dir"], (job["config_hash"], job["settings_hash"]))
    first = next(iter(params.values()))
    common = {
        key: value
        for key, value in first.items()
        if all(own.get(key) == value for own in params.values())
    }
    listed = [
        {
            "config_hash": hashes[run_dir][0],
            "settings_hash": hashes[run_dir][1],
            "run_dir": run_dir,
            "command": f"python -m sddlskd.worker {shlex.quote(run_dir)}",
            "params": {key: value for key, value in own.items() if key not in common},
        }
        for run_dir, own in params.items()
    ]
    content = {"name": name, "command": _command(jobs[0].home), "common": common, "jobs": listed}
    record.write_text(path, json.dumps(content, indent=1))
    return path


def _planned(folder: Path) -> set[str]:
    """Return the run directories of the jobs in the sweep's plan.json."""
    path = folder / "plan.json"
    return (
        {job["run_dir"] for job in json.loads(path.read_text())["jobs"]} if path.exists() else set()
    )


def cause_of(reason: str) -> str:
    """Return the kind of a failure, by which failures are grouped, for the `reason` of a result."""
    if "worker died" in reason:
        return "killed"
    if "OutOfMemory" in reason:
        return "out of memory"
    if found := re.search(r"NonFiniteLoss.*at epoch (\d+)", reason):
        return f"non-finite loss at epoch {found[1]}"
    return reason.split(":")[0]


def digest(jobs: Sequence[Config], results: Sequence[dict[str, Any]]) -> None:
    """Print the failures by cause, each with the end of its log and the command that repeats it."""
    by_cause: dict[str, list[tuple[Config, str]]] = defaultdict(list)
    for job, result in zip(jobs, results, strict=True):
        if result["status"] == FAILED:
            by_cause[cause_of(result["reason"])].append((job, result["reason"]))
    for cause, failed in by_cause.items():
        write_line(f"{len(failed)} failed: {cause}")
        for job, reason in failed:
            write_line(f"  {cfg.run_name(job)}: {reason}")
            log_file = Path(job.run_dir, "train.log")
            for line in log_file.read_text().splitlines()[-3:] if log_file.exists() else []:
                write_line(f"    {line}")
            write_line(f"    again: python -m sddlskd.worker {shlex.quote(job.run_dir)}")
