"""The status of a sweep: the state of each job, the time left, and the command that finishes it."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.sweeps import slurm_queue
from sddlskd.sweeps.estimate import seconds_left
from sddlskd.sweeps.manifest import is_running, read_manifest
from sddlskd.sweeps.outcome import STATES, state_of
from sddlskd.sweeps.search import DATABASE, searched_keys
from sddlskd.terminal.words import counted

__all__ = [
    "JobStatus",
    "SweepStatus",
    "SweepSummary",
    "count_states",
    "states_of",
    "status_of",
    "summaries_of",
    "teachers_in_training",
]

ENDED = ("finished", "failed", "pruned")
AT_WORK = ("queued", "running")
DONE = ("finished", "pruned")  # what is left of a sweep whose jobs are all done


@dataclass(frozen=True)
class JobStatus:
    """State, progress and SLURM task of one job of a sweep.

    Attributes:
        name: name of the run directory.
        run_dir: path of the run directory.
        settings: settings that tell the job from others of its name, and what a search chose, as in
            the table at the end of a sweep ("temperature=2 kd_weight=9"); "" if there are none, or
            if the job's config.yaml has not been written yet.
        state: "finished", "running", "queued", "killed", "failed", "pruned" or "new".
        epochs_done: number of epochs that have ended. Epochs of a first stage, which some methods
            have, do not count.
        epochs: number of epochs of the job; 0 if its config.yaml has not been written yet.
        top1: best validation top-1 (%) so far; None before the first epoch has ended.
        mAP: best validation mAP (%) so far; None as above, or if images have one class each.
        seconds_left: estimated seconds on one device until the job ends; 0 if the sweep's command
            does not run it, None if no epoch of such a job has ended yet.
        reason: why the job failed, was stopped or was dropped by halving; "" if there is no reason,
            or if the job is queued or running again.
        requeues: how often SLURM put the job back into its queue.
        slurm_job: id of the job's latest SLURM task; None if the job has finished or failed, or was
            never submitted to SLURM.
        slurm_state: state of the task `slurm_job` in SLURM's queue, or how SLURM ended the task;
            None if `slurm_job` is None.
    """

    name: str
    run_dir: str
    settings: str
    state: str
    epochs_done: int
    epochs: int
    top1: float | None
    mAP: float | None
    seconds_left: float | None
    reason: str
    requeues: int
    slurm_job: str | None
    slurm_state: str | None


@dataclass(frozen=True)
class SweepStatus:
    """State of every job of a sweep, the time left, and the command to continue.

    Attributes:
        sweep: name of the sweep.
        counts: number of jobs in each state; a state without jobs is left out.
        jobs: status of every job, in the order of the table at the end of a sweep; jobs without a
            config.yaml come last.
        running: whether the sweep runs: a launch of it is alive, or all jobs that are left run or
            are in SLURM's queue.
        teachers: teachers that are being trained now, as "resnet14: 3/240 epochs".
        seconds_left: sum of the known `JobStatus.seconds_left`; None if there are jobs to run and
            none is known.
        devices: number of devices of this machine that train the jobs; 1 for a cluster.
        command: shell command that runs all jobs that have not finished; "" if all have finished or
            are pruned, unless the sweep may add jobs.
        slurm_error: why SLURM could not be asked; "" if SLURM answered, or if the sweep has no
            SLURM tasks.
    """

    sweep: str
    counts: dict[str, int]
    jobs: list[JobStatus]
    running: bool
    teachers: list[str]
    seconds_left: float | None
    devices: int
    command: str
    slurm_error: str


@dataclass(frozen=True)
class SweepSummary:
    """A sweep in the list of sweeps.

    Attributes:
        name: name of the sweep.
        counts: number of jobs in each state; a state without jobs is left out.
        running: whether a launch of the sweep is alive, or a job runs or is in SLURM's queue.
        time: Unix time in seconds of the last launch.
    """

    name: str
    counts: dict[str, int]
    running: bool
    time: float


def summaries_of(sweeps: Path) -> list[SweepSummary]:
    """Return a summary of each sweep in the folder `sweeps`, <home>/runs/sweeps, the newest last.

    SLURM is asked about sweeps that it runs; if it does not answer, the record of a job counts.
    Raise ValueError if a file of a sweep or of a job is damaged.
    """
    found = []
    for path in sweeps.glob("*/sweep.json"):
        folder, manifest = path.parent, read_manifest(path.parent)
        try:
            states = states_of(folder, manifest["jobs"])
        except ConnectionError:
            states = {run_dir: state_of(Path(run_dir)) for run_dir in manifest["jobs"]}
        running = is_running(folder) or any(state in AT_WORK for state in states.values())
        counts = count_states(states.values())
        found.append(SweepSummary(manifest["name"], counts, running, manifest["time"]))
    return sorted(found, key=lambda one: one.time)


def states_of(folder: Path, run_dirs: Iterable[str]) -> dict[str, str]:
    """Return the state of each job of a sweep: {run directory: state}.

    The states are "finished", "running", "queued", "killed", "failed", "pruned" (dropped by
    halving) and "new". A job whose task is in SLURM's queue is "queued" or "running", unless the
    job has finished or is pruned.

    Args:
        folder: folder of the sweep.
        run_dirs: paths of the jobs' run directories.

    Raises:
        ConnectionError: If the sweep has SLURM tasks and squeue is missing, fails or does not
            answer.
        ValueError: If a result.json or the sweep's list of SLURM tasks is damaged.
    """
    states = {run_dir: state_of(Path(run_dir)) for run_dir in run_dirs}
    in_queue = slurm_queue.states(folder)
    for run_dir, state in states.items():
        if state not in DONE:
            states[run_dir] = in_queue.get(run_dir, state)
    return states


def count_states(states: Iterable[str]) -> dict[str, int]:
    """Return the number of jobs in each state: {state: number}.

    `states` holds the state of each job, such as "finished". The result has the order of
    `outcome.STATES`. A state without jobs is left out.
    """
    counts = Counter(states)
    return {state: counts[state] for state in STATES if counts[state]}


def status_of(folder: Path) -> SweepStatus:
    """Return the status of the sweep in `folder`, which is <home>/runs/sweeps/<name>.

    If SLURM cannot be asked, `SweepStatus.slurm_error` says why, and no error is raised.

    Raises:
        FileNotFoundError: If the folder has no sweep.json.
        ValueError: If a file of the sweep or of a job is damaged.
    """
    manifest = read_manifest(folder)
    run_dirs: list[str] = manifest["jobs"]
    queue: dict[str, tuple[str, str]] = {}
    slurm_error = ""
    try:
        states = states_of(folder, run_dirs)
        queue = slurm_queue.queue(folder)
    except ConnectionError as error:
        slurm_error = str(error)
        states = {run_dir: state_of(Path(run_dir)) for run_dir in run_dirs}
    unfinished = [run_dir for run_dir in run_dirs if states[run_dir] not in ENDED]
    tasks = _tasks_of(folder, unfinished)
    task_states = _task_states(tasks.values(), queue)
    configs = {
        run_dir: cfg.load(Path(run_dir, "config.yaml"))
        for run_dir in run_dirs
        if Path(run_dir, "config.yaml").exists()
    }
    is_search = (folder / DATABASE).exists()
    searched = searched_keys(manifest["command"]) if is_search else []
    differing = cfg.differing_settings(list(configs.values()), searched)
    settings = dict(zip(configs, differing, strict=True))
    left_alone = _left_alone(manifest)
    left = [run_dir for run_dir in run_dirs if states[run_dir] not in left_alone]
    estimates = _estimates(left, configs, manifest.get("kind"))
    jobs = [
        _job_status(
            Path(run_dir),
            configs.get(run_dir),
            settings.get(run_dir, ""),
            states[run_dir],
            task=tasks.get(run_dir),
            task_states=task_states,
            estimate=estimates.get(run_dir, 0.0),
        )
        for run_dir in run_dirs
    ]
    command = ""
    # A search and a sweep with seeds until decided may add jobs, which only their command knows.
    # Manifests of earlier versions do not have the entry.
    may_add = manifest.get("until_decided") or is_search
    if may_add or any(job.state not in DONE for job in jobs):
        command = f"cd {shlex.quote(manifest['folder'])} && {manifest['command']}"
    listed = list(configs)
    order = cfg.table_order(list(configs.values()))
    place = {listed[index]: number for number, index in enumerate(order)}
    jobs.sort(key=lambda job: place.get(job.run_dir, len(place)))
    return SweepStatus(
        sweep=manifest["name"],
        counts=count_states(states.values()),
        jobs=jobs,
        running=is_running(folder)
        or (bool(left) and all(states[run_dir] in AT_WORK for run_dir in left)),
        teachers=list(_teachers_of(configs[one] for one in left if one in configs).values()),
        seconds_left=_sum_of([estimates[run_dir] for run_dir in left]),
        devices=manifest.get("devices", 1),
        command=command,
        slurm_error=slurm_error,
    )


def _estimates(
    left: Sequence[str], configs: Mapping[str, cfg.Config], kind: str | None
) -> dict[str, float | None]:
    """Return {run directory: estimated seconds until the job ends} of jobs that are left.

    None stands for a job without an estimate.

    Args:
        left: run directories of the jobs.
        configs: configurations of the jobs that have been written already, by run directory.
        kind: kind of the devices, as for `seconds_left`.
    """
    known = [run_dir for run_dir in left if run_dir in configs]
    seconds = seconds_left([configs[run_dir] for run_dir in known], kind)
    return {**dict.fromkeys(left), **dict(zip(known, seconds, strict=True))}


def _left_alone(manifest: Mapping[str, Any]) -> Sequence[str]:
    """Return the states of the jobs that the command of a sweep does not run."""
    return ENDED if "sweep.rerun=none" in shlex.split(manifest["command"]) else DONE


def teachers_in_training(folder: Path) -> dict[str, str]:
    """Return the teachers of a sweep's jobs that a process is training now.

    `folder` is the folder of the sweep. The result is {run directory of the teacher: its name and
    the epochs that are done}, such as "resnet14: 3/240 epochs". Raise ValueError if a file of the
    sweep or of a run is damaged, and FileNotFoundError if the folder has no sweep.json.
    """
    paths = [Path(run_dir, "config.yaml") for run_dir in read_manifest(folder)["jobs"]]
    return _teachers_of(cfg.load(path) for path in paths if path.exists())


def _teachers_of(jobs: Iterable[cfg.Config]) -> dict[str, str]:
    """Return what `teachers_in_training` returns, for the configurations of jobs."""
    found: dict[str, str] = {}
    for job in jobs:
        for one in cfg.each_teacher(job):
            if not one.teacher.train_if_missing or one.teacher.checkpoint:
                continue
            teacher = cfg.teacher_job(one)
            folder = Path(teacher.run_dir)
            if teacher.run_dir not in found and state_of(folder) == "running":
                done = len(record.read_rows(folder))
                epochs = counted(teacher.trainer.epochs, "epoch")
                found[teacher.run_dir] = f"{teacher.student.name}: {done}/{epochs}"
    return found


def _tasks_of(folder: Path, run_dirs: Sequence[str]) -> dict[str, str]:
    """Return {run directory: id of the latest SLURM task} of the jobs that have a task."""
    submitted = slurm_queue.submissions(folder)
    latest = {run_dir: one.job for one in submitted for run_dir in one.run_dirs}
    return {run_dir: latest[run_dir] for run_dir in run_dirs if run_dir in latest}


def _task_states(tasks: Iterable[str], queue: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Return {task: its state in the queue, or how SLURM ended it}."""
    found = slurm_queue.causes_of_death([task for task in tasks if task not in queue])
    for task, (state, reason) in queue.items():
        found[task] = f"{state} ({reason})"
    return found


def _job_status(
    run_dir: Path,
    config: cfg.Config | None,
    settings: str,
    state: str,
    *,
    task: str | None,
    task_states: Mapping[str, str],
    estimate: float | None,
) -> JobStatus:
    """Return the status of one job.

    Args:
        run_dir: run directory of the job.
        config: configuration of the job; None if its config.yaml has not been written yet.
        settings: settings that tell the job from others of its name.
        state: state of the job.
        task: id of the job's SLURM task; None without one.
        task_states: states of the tasks of the sweep, by their ids.
        estimate: estimated seconds until the job ends; None if they are not known.
    """
    epochs = config.trainer.epochs if config else 0
    rows = record.read_rows(run_dir) if state != "new" else []
    result = record.read_result(run_dir)
    if state in AT_WORK:  # result.json has the scores and the reason of an earlier attempt
        result = {key: result[key] for key in ("requeues",) if key in result}
    top1 = result.get("best_top1")
    if top1 is None:
        top1 = max((row["val/top1"] for row in rows), default=None)
    found = max((row["val/mAP"] for row in rows if "val/mAP" in row), default=None)
    reason = result.get("reason") or ""
    slurm_state = task_states[task] if task else None
    return JobStatus(
        name=run_dir.name,
        run_dir=str(run_dir),
        settings=settings,
        state=state,
        epochs_done=sum(row["epoch"] > 0 for row in rows),
        epochs=epochs,
        top1=top1,
        mAP=result.get("best_mAP", found),
        seconds_left=estimate,
        reason=reason,
        requeues=result.get("requeues", 0),
        slurm_job=task,
        slurm_state=slurm_state,
    )


def _sum_of(seconds: Sequence[float | None]) -> float | None:
    """Return the sum of the known numbers; 0 for an empty list, None if no number is known."""
    known = [one for one in seconds if one is not None]
    if seconds and not known:
        return None
    return sum(known, start=0.0)
