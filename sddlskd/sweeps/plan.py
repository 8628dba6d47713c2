"""Plan a launch of a sweep: which jobs will run, in which groups, and which jobs cannot run."""

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config, Rerun, SweepConfig
from sddlskd.sweeps.estimate import Estimate, estimates
from sddlskd.sweeps.manifest import command_to_continue
from sddlskd.sweeps.outcome import state_of
from sddlskd.sweeps.runner import GroupRunner
from sddlskd.sweeps.status import states_of
from sddlskd.terminal.words import counted

__all__ = [
    "Plan",
    "Precheck",
    "ask_precheck",
    "check_halving",
    "epochs_of",
    "groups_of",
    "make_plan",
    "no_findings",
]

log = logging.getLogger(__name__)

# Check of a launch: (jobs to run, finished jobs, whether the jobs run on this machine) -> the
# dictionary of `precheck.report`.
Precheck = Callable[[list[Config], list[Config], bool], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """Jobs that a launch of a sweep would run, with the results of their checks.

    A launch is one call of the sweep's command.

    Attributes:
        name: name of the sweep.
        folder: folder of the sweep, <home>/runs/sweeps/<name>.
        command: shell command that continues the sweep.
        jobs: jobs of the launch, without duplicates.
        repeats: jobs of the launch that are equal to one of `jobs`, and do not run.
        states: {run directory: state} of every job. The states are "finished", "running", "queued",
            "killed", "failed", "pruned" (dropped by halving) and "new".
        todo: jobs that the launch runs, if none is invalid.
        groups: the jobs of `todo` in groups. The jobs of a group are trained together, with one
            teacher forward pass per batch.
        max_group_size: largest number of jobs in a group; None for no limit.
        kind: kind of the devices that train the jobs, such as "cuda"; None if the kinds differ.
        estimates: estimated time of each job of `todo` on one device; None for a job without
            similar past runs on such a device.
        refusals: why a launch would be refused whatever its jobs; [] unless the plan is only
            printed, because an error is raised then.
        invalid: (name of the job, reason) of each job of `todo` that cannot run. A job of a plan
            that is only printed (`sweep.plan`) has an entry for each of its obstacles.
        downloads: files of data sets that are missing here and that the sweep would download; [] if
            the plan is not only printed, because such files have been downloaded then.
        changed: finished jobs that learnt from another teacher file than the current one, except
            those of `todo`.
        other_data: (finished job, how the data differ) of each job that was trained on other data
            than its data set has now, except those of `todo`.
        changed_code: (finished job, modules) of each job whose outside code, such as a loss of the
            user, has changed since its record was made, except those of `todo`.
        devices: devices of this machine, such as ["cuda:0"]; empty if no job was checked.
        teachers: missing teachers that jobs train first, such as "resnet32x4 for cifar100 (240
            epochs)".
        run_MB: estimated disk space of the run of each job of `todo` in megabytes, None if it is
            not known; [] if the plan is not only printed.
    """

    name: str
    folder: Path
    command: str
    jobs: list[Config]
    repeats: list[Config]
    states: dict[str, str]
    todo: list[Config]
    groups: list[list[Config]]
    max_group_size: int | None
    kind: str | None
    estimates: list[Estimate | None]
    refusals: list[str]
    invalid: list[tuple[str, str]]
    downloads: list[str]
    changed: list[Config]
    other_data: list[tuple[Config, str]]
    changed_code: list[tuple[Config, list[str]]]
    devices: list[str]
    teachers: list[str]
    run_MB: list[float | None]

    @property
    def seconds(self) -> float | None:
        """Return the estimated seconds for all jobs on one device; None if one is not known."""
        known = [one.seconds for one in self.estimates if one is not None]
        return sum(known) if len(known) == len(self.todo) else None

    @property
    def at_most(self) -> float | None:
        """Return the most seconds that all jobs need on one device; None if one is not known."""
        return _sum(self.group_seconds)

    @property
    def group_seconds(self) -> list[float | None]:
        """Return the most seconds that each group is estimated to need; None if not known."""
        of_job = {
            job.run_dir: one.at_most
            for job, one in zip(self.todo, self.estimates, strict=True)
            if one is not None
        }
        return [_sum(of_job.get(job.run_dir) for job in group) for group in self.groups]


def ask_precheck(
    todo: list[Config], finished: list[Config], runs_locally: bool = True
) -> dict[str, Any]:
    """Call `precheck.report` in a separate process, and return its dictionary.

    The arguments are those of `precheck.report`. Raise ChildProcessError if the separate process
    dies or ends with an error.
    """
    command = [sys.executable, "-m", "sddlskd.sweeps.precheck", "--parent", str(os.getpid())]
    done = subprocess.run(
        command,
        input=pickle.dumps((todo, finished, runs_locally)),
        stdout=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        how = f"exit code {done.returncode}"
        if done.returncode < 0:
            how = signal.Signals(-done.returncode).name
        raise ChildProcessError(
            f"the check of the jobs died ({how}), so none was started; see its output above"
        )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def no_findings() -> dict[str, Any]:
    """Return the answer of a `Precheck` that found nothing; see `precheck.report` for the keys."""
    keys = ("problems", "downloads", "changed", "other_data", "devices", "teachers", "run_MB")
    return {key: [] for key in keys}


def make_plan(
    jobs: Sequence[Config],
    name: str,
    *,
    runner: GroupRunner,
    max_group_size: int | None = None,
    precheck: Precheck = ask_precheck,
) -> Plan:
    """Return the plan of a launch, which is one call of a sweep's command; start no job.

    Nothing is written, except that the check of the jobs may download a missing data set. If
    `sweep.plan` of the first job is set, nothing is downloaded either.

    Args:
        jobs: jobs of the sweep, at least one; duplicates count once. `sweep.rerun` of the first job
            says which jobs run again.
        name: name of the sweep.
        runner: what is going to run the jobs. If they do not run on this machine, it is not checked
            whether this machine has the devices (trainer.device, trainer.devices) and the cores
            (dataset.workers) that they ask for.
        max_group_size: largest number of jobs that train together; None for no limit.
        precheck: function that checks the jobs. Its arguments are the jobs to run, the finished
            jobs that do not run again, and `runner.runs_locally`. It is not called if both lists
            are empty. It returns a dictionary like that of `precheck.report`.

    Returns:
        The plan. Jobs that cannot run are in `Plan.invalid`; they raise no error.

    Raises:
        ValueError: If different jobs have the same run directory, or if a file of the sweep or of a
            run is damaged.
        ConnectionError: If the sweep has SLURM tasks and squeue is missing, fails or does not
            answer. If `sweep.plan` of the first job is set, so that the plan is only printed, the
            message is in `Plan.refusals` instead.
        ChildProcessError: If the process that `ask_precheck` starts dies.
    """
    unique = list({job.run_dir: job for job in jobs}.values())
    if len(unique) < len({cfg.config_hash(job) for job in jobs}):
        raise ValueError(
            "several jobs of the sweep have one run_dir; "
            "leave run_dir out, so that each job gets its own"
        )
    home = unique[0].home
    folder = Path(home, "runs", "sweeps", name)
    refusals = []
    try:
        states = states_of(folder, [job.run_dir for job in unique])
    except ConnectionError as error:
        if not unique[0].sweep.plan:
            raise
        refusals.append(str(error))
        states = {job.run_dir: state_of(Path(job.run_dir)) for job in unique}
    skipped = _skipped_states(unique[0].sweep)
    todo = [job for job in unique if states[job.run_dir] not in skipped]
    finished = [
        job for job in unique if states[job.run_dir] == "finished" and "finished" in skipped
    ]
    answer = no_findings()
    if todo or finished:
        log.info(
            "checking %s (loading PyTorch takes some seconds)",
            counted(len(todo) + len(finished), "job"),
        )
        answer = precheck(todo, finished, runner.runs_locally)
    kind = runner.kind(todo, answer["devices"])
    groups = groups_of(todo, max_group_size)
    found: list[Estimate | None] = [None] * len(todo)
    if kind is not None:
        sizes = {job.run_dir: len(group) for group in groups for job in group}
        found = estimates(
            todo,
            kind,
            anew=unique[0].sweep.rerun is Rerun.all,
            group_sizes=[sizes[job.run_dir] for job in todo],
        )
    return Plan(
        name=name,
        folder=folder,
        command=command_to_continue(home),
        jobs=unique,
        repeats=_repeats(jobs),
        states=states,
        todo=todo,
        groups=groups,
        max_group_size=max_group_size,
        kind=kind,
        estimates=found,
        refusals=refusals,
        invalid=[(cfg.run_name(todo[index]), reason) for index, reason in answer["problems"]],
        downloads=answer["downloads"],
        changed=[finished[index] for index in answer["changed"]],
        other_data=[(finished[index], change) for index, change in answer["other_data"]],
        changed_code=[(job, modules) for job in finished if (modules := record.changed_code(job))],
        devices=answer["devices"],
        teachers=answer["teachers"],
        run_MB=answer["run_MB"],
    )


def _repeats(jobs: Iterable[Config]) -> list[Config]:
    """Return the jobs that are equal to an earlier one."""
    seen: set[str] = set()
    repeats = []
    for job in jobs:
        if job.run_dir in seen:
            repeats.append(job)
        seen.add(job.run_dir)
    return repeats


def check_halving(jobs: Sequence[Config], max_group_size: int | None) -> None:
    """Raise ValueError if halving has nothing to compare, because a job would train alone.

    Halving drops the worse half of the runs of a group, which are trained together. Log a warning
    if the runs would be compared on the test split.

    Args:
        jobs: all jobs of the sweep, at least one, and not only those that have not finished.
        max_group_size: largest number of jobs that train together; None for no limit.
    """
    for group in groups_of(jobs, max_group_size):
        if len(group) == 1:
            raise ValueError(
                f"sweep.halving={group[0].sweep.halving} compares the runs of a group, but "
                f"{cfg.run_name(group[0])} trains alone; vary only what leaves teacher, data and "
                "epochs the same, set trainer.data_seed=0 for several seeds, and set "
                "hydra.launcher.max_group_size=null"
            )
    if not jobs[0].dataset.val_fraction:
        log.warning(
            "sweep.halving chooses runs by their accuracy on the test split; "
            "dataset.val_fraction=0.1 holds out training images for the choice"
        )


def _skipped_states(settings: SweepConfig) -> set[str]:
    """Return the states of the jobs that a launch with these settings leaves alone."""
    skipped = {"running", "queued"}
    if settings.rerun is not Rerun.all:
        skipped.add("finished")
        if settings.halving:  # a sweep without halving continues the jobs that halving has dropped
            skipped.add("pruned")
    if settings.rerun is Rerun.none:
        skipped.add("failed")
    return skipped


def groups_of(jobs: Iterable[Config], max_group_size: int | None = None) -> list[list[Config]]:
    """Return the jobs in groups that can train together, with one teacher forward pass per batch.

    The jobs of a group have the same batches, teacher, device, precision and training length. A job
    that occurs twice is taken once. A group has at most `max_group_size` jobs; None stands for no
    limit. Without jobs, the result is [].
    """
    together: dict[str, dict[str, Config]] = {}
    for job in jobs:
        together.setdefault(cfg.sharing_key(job), {})[job.run_dir] = job
    groups = []
    for sharing in together.values():
        group = list(sharing.values())
        size = max_group_size or len(group)
        groups += [group[first : first + size] for first in range(0, len(group), size)]
    return groups


def epochs_of(group: Sequence[Config]) -> int:
    """Return the number of epochs that the jobs of a group train in all, from their first epochs.

    `sweep.halving` drops the worse half of the jobs at the end of the given epochs; of an odd
    number, the job in the middle stays. `group` has at least one job.
    """
    alive, before, epochs = len(group), 0, 0
    for end in group[0].sweep.halving:
        epochs += alive * (end - before)
        alive, before = alive - alive // 2, end
    return epochs + alive * (group[0].trainer.epochs - before)


def _sum(seconds: Iterable[float | None]) -> float | None:
    """Return the sum of the numbers, or None if one of them is None."""
    total = 0.0
    for one in seconds:
        if one is None:
            return None
        total += one
    return total
