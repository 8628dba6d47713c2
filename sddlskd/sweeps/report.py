"""Text that a sweep prints for its user: its plan, its status, its failures and its outcome."""

import os
import re
import shlex
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.record import FAILED, FINISHED, PRUNED
from sddlskd.sweeps.balance import better_group_size, jobs_of_devices, split
from sddlskd.sweeps.baselines import twin_lines
from sddlskd.sweeps.estimate import networks_of, time_left
from sddlskd.sweeps.grid import reasons_together
from sddlskd.sweeps.plan import Plan, epochs_of, groups_of
from sddlskd.sweeps.status import DONE, JobStatus, SweepStatus, SweepSummary, count_states
from sddlskd.terminal.console import duration, outcomes, write_line
from sddlskd.terminal.words import counted

__all__ = [
    "plan_lines",
    "print_failures",
    "print_outcome",
    "print_plan",
    "print_status",
    "print_sweeps",
]

LOG_LINES = 3  # last lines of the log of a failed job
SHOWN_STATES = ("finished", "failed")  # those with a column in the list of sweeps
KINDS = {"cpu": "a CPU", "cuda": "a GPU", "mps": "MPS"}  # kinds of devices in words
SHOWN_GROUPS = 12  # groups that a plan lists


def plan_lines(plan: Plan) -> list[str]:
    """Return the lines of text that say what a sweep would run, and how long that would take.

    The first line has the numbers of jobs in each state, of groups to run and of jobs that cannot
    run; the jobs of a group are trained together. If jobs of the grid are equal, a line says how
    many do not run. If recipes give jobs that differ in their clipping alone, a line names these
    recipes. If jobs of a group share their teacher's forward passes, a line says how often the
    teacher goes through the data in an epoch. If halving drops jobs, a line has the epochs that are
    left. If there are jobs to run, the last line has the estimated time, or says for which jobs the
    time is not known.
    """
    counts = _counts(count_states(plan.states.values()))
    lines = [
        f"sweep {plan.name}: {counted(len(plan.jobs), 'job')} ({counts}), "
        f"{len(plan.todo)} to do in {counted(len(plan.groups), 'group')}"
    ]
    if plan.invalid:
        lines[0] += f"; {len({name for name, _ in plan.invalid})} cannot run, see below"
    if plan.repeats:
        reason = ""
        if not any(job.distiller.loss for job in plan.repeats):
            names = sorted({f"distiller={job.distiller.name}" for job in plan.repeats})
            reason = (
                ": M and the settings of a distillation have no effect "
                f"without a loss on the logits ({', '.join(names)})"
            )
        number = counted(len(plan.repeats), "more job is", "more jobs are")
        lines.append(f"{number} equal to these{reason}")
    lines += twin_lines(plan.jobs)
    with_teacher = [group for group in plan.groups if group[0].has_teacher]
    alone = sum(map(len, with_teacher))
    if len(with_teacher) < alone:
        often = "once" if len(with_teacher) == 1 else f"{len(with_teacher)} times"
        lines.append(f"the teacher goes through the data {often} an epoch instead of {alone}")
    if plan.todo and plan.todo[0].sweep.halving:
        lines.append(_halving_line(plan))
    if plan.todo:
        lines.append(_time_line(plan))
    return lines


def _disk_line(run_MB: Sequence[float], folder: Path) -> str:
    """Return a line with the disk space of runs in megabytes, and the free space at a folder."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free / 1e9
    largest, all_GB = max(run_MB), sum(run_MB) / 1e3
    return (
        f"disk: at most about {largest:.3g} MB a run, {all_GB:.2g} GB in all; free: {free:.3g} GB"
    )


def _halving_line(plan: Plan) -> str:
    ends = ", ".join(map(str, plan.todo[0].sweep.halving))
    most = sum(map(epochs_of, plan.groups))
    undisturbed = sum(job.trainer.epochs for job in plan.todo)
    return (
        f"halving at the end of epochs {ends}: these jobs train at most {counted(most, 'epoch')} "
        f"in all instead of {undisturbed}"
    )


def _time_line(plan: Plan) -> str:
    """Return a line with the estimated time of a plan that has jobs to run."""
    if plan.kind is None:
        return "the jobs run on devices of several kinds, so the time is not known"
    where = f"on {KINDS.get(plan.kind, plan.kind)}"
    known = [one for one in plan.estimates if one is not None]
    if not known:
        return f"there are no similar runs {where} yet, so the time is not known"
    seconds, at_most = sum(one.seconds for one in known), sum(one.at_most for one in known)
    runs = counted(len(frozenset().union(*(one.runs for one in known))), "run")
    line = (
        f"{_about(seconds, at_most)} on one device, estimated from {runs} of these networks {where}"
    )
    others = sum(not one.same_method for one in known)
    if others == len(known):
        line += " with other methods"
    elif others:
        line += f", for {_jobs(others)} from other methods"
    if plan.todo[0].sweep.halving:
        line += ", as if none was dropped"
    if at_most > seconds:
        sizes = frozenset().union(*(one.group_sizes for one in known if one.at_most > one.seconds))
        line += (
            f"; measured in groups of {' and '.join(map(str, sorted(sizes)))}, and smaller groups "
            "take longer, as each has its own passes of the teacher"
        )
    if len(known) == len(plan.todo):
        return line
    unknown = {
        networks_of(job): None
        for job, one in zip(plan.todo, plan.estimates, strict=True)
        if one is None
    }
    return (
        f"the time is known for {len(known)} of {_jobs(len(plan.todo))}: {line}; "
        f"there is no similar run of {', '.join(unknown)} yet"
    )


def _about(seconds: float, at_most: float) -> str:
    """Return an estimated time, such as "about 5:00", or "about 5:00 to 9:00" if it is unsure."""
    if at_most > seconds:
        return f"about {duration(seconds)} to {duration(at_most)}"
    return f"about {duration(seconds)}"


def _way_to_time(plan: Plan) -> list[str]:
    """Return a line that says how to get to know the time; [] if it is known, or no way helps."""
    unknown = [job for job, one in zip(plan.todo, plan.estimates, strict=True) if one is None]
    if not unknown or plan.kind is None or max(job.trainer.epochs for job in unknown) == 1:
        return []
    words = "trainer.epochs=1"
    if unknown[0].sweep.halving:
        words += " sweep.halving=[]"
    return [
        f"to know the time, train one epoch first (the same command with {words} and another "
        "sweep.name), then plan again"
    ]


def print_plan(
    plan: Plan,
    devices: Sequence[str],
    requests: Sequence[str],
    array_parallelism: int | None,
    notes: Sequence[str] = (),
) -> None:
    """Print what a sweep would run, how its jobs spread over the devices, and every obstacle.

    An obstacle is a reason why a job cannot run. Each one is printed once, with the names of up to
    three of its jobs.

    Args:
        plan: plan of the sweep.
        devices: devices of this machine that would train the jobs; [] on a cluster.
        requests: lines that say what the sweep would ask a cluster for; [] on this machine.
        array_parallelism: largest number of a cluster's tasks at once; None on this machine.
        notes: further lines, which come before the obstacles.
    """
    spread = _spread_lines(plan, devices)
    if array_parallelism and plan.groups:
        spread += _sharing_lines(plan, array_parallelism)
    for line in (*plan_lines(plan), *_way_to_time(plan), *spread, *requests):
        write_line(line)
    known_MB = [size for size in plan.run_MB if size is not None]
    if known_MB and len(known_MB) == len(plan.todo):
        write_line(_disk_line(known_MB, Path(plan.folder)))
    left_out = ""
    if plan.seconds is not None:
        left_out = ", for which more time is needed"
    for teacher in plan.teachers:
        write_line(f"trained first: teacher {teacher}{left_out}")
    for file in plan.downloads:
        write_line(f"to download: there is no {file}; the sweep downloads it when it starts")
    for note in notes:
        write_line(note)
    for line in reasons_together(plan.invalid):
        write_line(f"cannot run: {line}")


def _spread_lines(plan: Plan, devices: Sequence[str]) -> list[str]:
    """Return lines that say how many jobs each group and device gets, and a better group size.

    Nothing is said of devices if a cluster or several devices together train a job.
    """
    if not plan.groups:
        return []
    sizes = [len(group) for group in plan.groups]
    numbers = [f"{count} of {_jobs(size)}" for size, count in Counter(sizes).items()]
    lines = [f"groups: {', '.join(numbers)}", *_group_lines(plan.groups)]
    if not devices or any(job.trainer.devices > 1 for job in plan.todo):
        return lines
    per_device = jobs_of_devices(sizes, len(devices))
    shares = [f"{name} {_jobs(jobs)}" for name, jobs in zip(devices, per_device, strict=True)]
    lines.append(f"devices: {', '.join(shares)}")
    # Halving compares the jobs of a group, so smaller groups would change what it drops.
    if not plan.todo[0].sweep.halving:
        lines += _better_size_lines(plan, len(devices), max(per_device))
    if plan.seconds is not None and plan.at_most is not None and len(devices) > 1:
        share = max(per_device) / len(plan.todo)
        about = _about(plan.seconds * share, plan.at_most * share)
        lines.append(f"{about} on these {len(devices)} devices")
    return lines


def _better_size_lines(plan: Plan, devices: int, busiest: int) -> list[str]:
    """Return a line with the group size that ends earlier and what it changes; [] if none does.

    Args:
        plan: plan of a sweep with jobs to run.
        devices: number of devices.
        busiest: number of jobs that the busiest device trains with the present group size.
    """
    together = [len(group) for group in groups_of(plan.todo)]
    better = better_group_size(together, devices, plan.max_group_size)
    if not better:
        return []
    most = max(jobs_of_devices(split(together, better), devices))
    with_teacher = [job for job in plan.todo if job.has_teacher]
    passes = [len(groups_of(with_teacher, size)) for size in (better, plan.max_group_size)]
    changes = [f"{most} instead of {busiest} jobs on the busiest device"]
    if most == busiest:
        changes = [f"{_jobs(most)} on the busiest device as before"]
    if passes[0] != passes[1]:
        changes.append(f"{passes[0]} instead of {passes[1]} passes of the teacher an epoch")
    return [f"hydra.launcher.max_group_size={better} would end earlier: {', '.join(changes)}"]


def _sharing_lines(plan: Plan, array_parallelism: int) -> list[str]:
    """Return lines that name larger and smaller groups for a cluster, and what they would cost.

    A line names the launcher for jobs that could share their teacher. Another one names a smaller
    group size if there are fewer tasks than may run at once, or says that none would end earlier.
    """
    lines = []
    with_teacher = [job for job in plan.todo if job.has_teacher]
    apart = groups_of(with_teacher, plan.max_group_size)
    together = groups_of(with_teacher)
    longest = max(map(len, plan.groups))
    if len(together) < len(apart):
        lines.append(
            f"jobs that share a teacher and batches: {len(with_teacher)} jobs could train in "
            f"{counted(len(together), 'task')} instead of {len(apart)}, which run the teacher once "
            "for all their jobs: hydra/launcher=slurm_shared_teacher, or "
            "hydra.launcher.max_group_size=null; the longest task would then train "
            f"{_jobs(max(map(len, together)))} instead of {max(map(len, apart))}"
        )
    halves = bool(plan.todo[0].sweep.halving)  # which compares the jobs of a group
    if len(plan.groups) >= array_parallelism or longest == 1 or halves:
        return lines
    sizes = [len(group) for group in groups_of(plan.todo)]
    smaller = better_group_size(sizes, array_parallelism, plan.max_group_size)
    tasks = (
        f"{counted(len(plan.groups), 'task')} for hydra.launcher.array_parallelism="
        f"{array_parallelism}"
    )
    if not smaller or smaller > longest:
        return [*lines, f"{tasks}: no smaller hydra.launcher.max_group_size would end earlier"]
    parts = groups_of(plan.todo, smaller)
    passes = len(groups_of(with_teacher, smaller))
    lines.append(
        f"{tasks}: hydra.launcher.max_group_size={smaller} would end earlier: it makes "
        f"{counted(len(parts), 'task')}, the longest of {_jobs(smaller)} instead of {longest}, and "
        f"the teacher goes through the data {counted(passes, 'time')} an epoch instead of "
        f"{len(apart)}"
    )
    return lines


def _group_lines(groups: Sequence[Sequence[Config]]) -> list[str]:
    """Return the first groups' teachers and, in a line for each student, its seeds and methods.

    Groups that are equal but for the seed of their jobs are listed once, with all their seeds.
    """
    jobs = [job for group in groups for job in group]
    settings = {
        job.run_dir: text for job, text in zip(jobs, cfg.differing_settings(jobs), strict=True)
    }
    # {(head of the lines, [(student, methods)]): seeds of each group}
    alike: dict[tuple[str, tuple[tuple[str, str], ...]], list[list[int]]] = defaultdict(list)
    for group in groups:
        methods: dict[tuple[str, int], list[str]] = defaultdict(list)
        for job in group:
            method = cfg.title(job, seed=False, student=False)
            if settings[job.run_dir]:
                method += f" ({settings[job.run_dir]})"
            methods[job.student.name, job.seed].append(method)
        seeds: dict[tuple[str, str], list[int]] = defaultdict(list)
        for (student, seed), names in methods.items():
            seeds[student, "; ".join(names)].append(seed)
        if len(set(map(tuple, seeds.values()))) == 1:
            alike[_head(group[0]), tuple(seeds)].append(next(iter(seeds.values())))
            continue
        # The students of this group have different seeds, so the seeds are part of what it is.
        named = tuple((f"{student} {_seeds(own)}", text) for (student, text), own in seeds.items())
        alike[_head(group[0]), named].append([])
    lines = []
    left = len(groups)
    for (head, entries), of_groups in list(alike.items())[:SHOWN_GROUPS]:
        left -= len(of_groups)
        lines.append(f"  {head}:")
        if len(of_groups) > 1:
            lines[-1] = f"  {head}, {len(of_groups)} groups:"
        own = sorted({seed for seeds_of_group in of_groups for seed in seeds_of_group})
        lines += [
            f"    {' '.join([student, _seeds(own)]).strip()}: {text}" for student, text in entries
        ]
    if left:
        lines.append(f"  and {counted(left, 'more group')}")
    return lines


def _head(job: Config) -> str:
    """Return the teacher and the epochs of a job's group."""
    teacher = "no teacher"
    if job.has_teacher:
        teacher = cfg.teacher_name(job)
    return f"{teacher}, {counted(job.trainer.epochs, 'epoch')}"


def _seeds(seeds: Sequence[int]) -> str:
    """Return seeds in words: "seed 0", "seeds 0 to 4, each" or "seeds 0, 7, each"; "" for none."""
    if not seeds:
        return ""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))) and len(seeds) > 2:
        return f"seeds {seeds[0]} to {seeds[-1]}, each"
    return f"seeds {', '.join(map(str, seeds))}, each"


def _jobs(number: int) -> str:
    return counted(number, "job")


def print_status(status: SweepStatus) -> None:
    """Print the state of every job of a sweep, the time left, and the command to continue.

    If all jobs have finished or were dropped by halving, no time is printed, and the command only
    if it may add jobs, as in a search. While the sweep runs, a line says so instead of the command,
    and names the teachers that are being trained. If SLURM could not be asked, the first line says
    why.
    """
    if status.slurm_error:
        write_line(f"cannot ask SLURM about the jobs of this sweep: {status.slurm_error}")
    write_line(
        f"sweep {status.sweep}: {counted(len(status.jobs), 'job')}: {_counts(status.counts)}"
    )
    for job in status.jobs:
        write_line(_job_line(job))
    if not status.command:
        return
    if status.running:
        teachers = [f"; it trains the teacher {teacher}" for teacher in status.teachers]
        write_line(f"the sweep is running{''.join(teachers)}")
    if all(job.state in DONE for job in status.jobs) and not status.running:
        write_line(f"to add what is left, or see the decisions or the best job: {status.command}")
        return
    left = [job.seconds_left for job in status.jobs if job.state not in DONE]
    failed = ""
    if retried := sum(job.state == "failed" and job.seconds_left != 0 for job in status.jobs):
        failed = f", with {counted(retried, 'failed job')}, which the command continues"
    write_line(f"time left: {time_left(left, status.devices)}{failed}")
    if not status.running:
        write_line(f"to finish it: {status.command}")


def _job_line(job: JobStatus) -> str:
    parts = [f"  {job.state:<8}  {job.epochs_done}/{counted(job.epochs, 'epoch')}"]
    if job.top1 is not None:
        parts.append(f"top-1 {job.top1:.2f}")
    if job.mAP is not None:
        parts.append(f"mAP {job.mAP:.2f}")
    parts.append(job.name)
    if job.settings:
        parts.append(job.settings)
    if job.reason:
        parts.append(job.reason)
    if job.slurm_job:
        parts.append(f"SLURM job {job.slurm_job}: {job.slurm_state}")
    if job.requeues:
        parts.append(f"requeued {counted(job.requeues, 'time')}")
    return "  ".join(parts)


def print_sweeps(sweeps: Sequence[SweepSummary]) -> None:
    """Print a line for each sweep: its name, its jobs by state, and the time of its last launch."""
    columns = ("sweep", "jobs", *SHOWN_STATES, "the rest", "last launch", "")
    lines: list[tuple[str, ...]] = [columns]
    for one in sweeps:
        jobs = sum(one.counts.values())
        shown = [one.counts.get(state, 0) for state in SHOWN_STATES]
        launched = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.time))
        running = "running" if one.running else ""
        numbers = map(str, (jobs, *shown, jobs - sum(shown)))
        lines.append((one.name, *numbers, launched, running))
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        cells = [f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)]
        write_line("  ".join(cells).rstrip())


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in counts.items())


def print_outcome(
    plan: Plan, results: Sequence[dict[str, Any]], *, stopped: bool, locally: bool
) -> None:
    """Print how a sweep ended: the failures, a table of the results, and how to continue.

    If all jobs are FINISHED or PRUNED, only the table is printed, and the command that makes tables
    from the runs in MLflow.

    Args:
        plan: plan of the sweep, with its jobs.
        results: content of result.json of each job, in the order of `plan.jobs`.
        stopped: whether the sweep was stopped by a signal.
        locally: whether the jobs ran on this machine; if not, the command that prints the logs of
            the SLURM tasks is also printed.

    Raises:
        SystemExit: With code 130 (`ExitCode.STOPPED`) if a job or the sweep was stopped, else with
            1 if a job is neither FINISHED nor PRUNED.
        ValueError: If there are not as many results as jobs.
    """
    print_failures(plan.jobs, results)
    if any(result["status"] not in (FINISHED, PRUNED) for result in results):
        write_line(
            f"to go on: {plan.command}    (state: python -m sddlskd.sweeps status {plan.folder})"
        )
        if not locally:
            write_line(f"logs of the tasks: python -m sddlskd.sweeps logs {plan.folder}")
    then = ""
    if any(result["status"] == FINISHED for result in results):
        then = _command_for_tables(plan)
    outcomes(plan.jobs, results, stopped=stopped, then=then)


def _command_for_tables(plan: Plan) -> str:
    """Return a line with the command that makes tables of a sweep; "" if MLflow has no runs of it.

    The command works in every folder, and finds MLflow by the current folder and the environment,
    if it can.
    """
    job = plan.jobs[0]
    if not job.tracking.enabled:
        return ""
    words = ["python", "-m", "sddlskd.analysis", plan.name]
    home = os.environ.get("SDDLSKD_HOME", ".")
    uri = str(job.tracking.uri)
    if uri == f"sqlite:///{job.home}/mlflow.db":
        if Path(job.home).resolve() != Path(home).resolve():
            words += ["--home", job.home]
    elif uri != os.environ.get("MLFLOW_TRACKING_URI"):
        words += ["--uri", uri]
    return f"table: {shlex.join(words)}"


def print_failures(jobs: Sequence[Config], results: Sequence[dict[str, Any]]) -> None:
    """Print the FAILED jobs, grouped by the cause of the failure; nothing if no job is FAILED.

    Each job comes with its reason, those of the last three lines of its train.log that do not
    repeat the reason, and the command that runs the job again. `results` holds the content of
    result.json of each job, in the order of `jobs`. Raise ValueError if there are not as many
    results as jobs.
    """
    by_cause: dict[str, list[tuple[Config, str]]] = defaultdict(list)
    for job, result in zip(jobs, results, strict=True):
        if result["status"] == FAILED:
            by_cause[cause_of(result["reason"])].append((job, result["reason"]))
    for cause, failed in by_cause.items():
        write_line(f"{len(failed)} failed: {cause}")
        for job, reason in failed:
            write_line(f"  {cfg.run_name(job)}: {reason}")
            for line in _last_lines(Path(job.run_dir, "train.log")):
                if reason not in line:
                    write_line(f"    {line}")
            write_line(f"    again: python -m sddlskd.worker {shlex.quote(job.run_dir)}")


def _last_lines(log_file: Path) -> list[str]:
    if not log_file.exists():
        return []
    return log_file.read_text(errors="replace").splitlines()[-LOG_LINES:]


def cause_of(reason: str) -> str:
    """Return a short name for the cause of a job's failure, by which failures can be grouped.

    `reason` is the entry "reason" of the job's result.json. The name is "worker died" if the worker
    process of the job died, "out of memory" if the device's memory was full, and "non-finite loss
    at epoch N" if the loss became NaN or infinite. Otherwise the name is the part of `reason`
    before the first colon.
    """
    if "worker died" in reason:
        return "worker died"
    if "OutOfMemory" in reason:
        return "out of memory"
    if found := re.search(r"NonFiniteLoss.*at epoch (\d+)", reason):
        return f"non-finite loss at epoch {found[1]}"
    return reason.split(":")[0]
