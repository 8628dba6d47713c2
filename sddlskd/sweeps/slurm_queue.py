"""Ask SLURM for the tasks of a sweep, and cancel them.

runs/sweeps/<name>/slurm.json lists which SLURM job trains which run directories, and nothing else.
"""

import json
import re
import subprocess
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from sddlskd import record
from sddlskd.sweeps.manifest import LOCK

__all__ = [
    "NoCluster",
    "Submission",
    "add_submissions",
    "ask",
    "cancel_tasks",
    "causes_of_death",
    "error_message",
    "queue",
    "states",
    "submissions",
]

SUBMISSIONS = "slurm.json"  # file in the sweep's folder
# The task index that scontrol shows for tasks that were cancelled before they started.
NO_INDEX = "4294967294"
# What SLURM's commands say if this machine does not know of a cluster
NO_CLUSTER = re.compile("resolve_ctls_from_dns_srv|[Cc]ould not establish a configuration source")


@dataclass(frozen=True)
class Submission:
    """One submitted task of a SLURM job array.

    Attributes:
        job: id of the task as squeue shows it, such as "17_3".
        run_dirs: paths of the run directories of the jobs that the task trains together.
        log: path of the task's log file, which is missing until the task starts.
    """

    job: str
    run_dirs: list[str]
    log: str


class NoCluster(ConnectionError):
    """Error for a machine that has SLURM's commands but does not know of a cluster."""


def submissions(sweep: Path) -> list[Submission]:
    """Return all tasks that were ever submitted for the sweep in the folder `sweep`, oldest first.

    Return [] if none was submitted. Raise Damaged if slurm.json, which lists the tasks, is damaged.
    """
    path = sweep / SUBMISSIONS
    if not path.exists():
        return []
    try:
        return [Submission(**entry) for entry in json.loads(path.read_text())]
    except (ValueError, TypeError) as error:
        raise record.Damaged(f"{path} is damaged ({error}); delete it") from None


def add_submissions(sweep: Path, new: Iterable[Submission]) -> None:
    """Add tasks to the list of those that were submitted for the sweep in the folder `sweep`.

    Raise Damaged if slurm.json, which lists the tasks, is damaged.
    """
    with FileLock(sweep / LOCK):
        listed = [vars(one) for one in [*submissions(sweep), *new]]
        record.write_text(sweep / SUBMISSIONS, json.dumps(listed, indent=1))


def queue(sweep: Path) -> dict[str, tuple[str, str]]:
    """Return the tasks of a sweep that are in SLURM's queue: {id of the task: (state, reason)}.

    An id is that of `Submission.job`, such as "17_3". State and reason are words of squeue, such as
    "PENDING" and "Priority". Return {} if no task is in the queue. `sweep` is the sweep's folder.
    If the sweep has tasks, raise ConnectionError if squeue is missing, fails or does not answer.
    Raise Damaged if slurm.json, which lists the tasks, is damaged.
    """
    mine = {one.job for one in submissions(sweep)}
    if not mine:
        return {}
    lines = ask("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r").splitlines()
    rows = (line.strip().split("|", 2) for line in lines)
    return {job: (state, reason) for job, state, reason in rows if job in mine}


def states(sweep: Path) -> dict[str, str]:
    """Return the state of each job whose task is in SLURM's queue: {run directory: state}.

    The state is "running" if SLURM runs the task, else "queued". Jobs of the sweep without a task
    in the queue are left out. `sweep` is the sweep's folder. If the sweep has tasks, raise
    ConnectionError if squeue is missing, fails or does not answer. Raise Damaged if slurm.json,
    which lists the tasks, is damaged.
    """
    live = queue(sweep)
    found = {}
    for one in submissions(sweep):
        if one.job not in live:
            continue
        state, _ = live[one.job]
        for run_dir in one.run_dirs:
            found[run_dir] = "running" if state in ("RUNNING", "COMPLETING") else "queued"
    return found


def cancel_tasks(sweep: Path) -> list[str]:
    """Cancel a sweep's queued and running SLURM tasks, and return their ids; [] if there is none.

    Running tasks save their checkpoints before they end. `sweep` is the sweep's folder. If the
    sweep has tasks, raise ConnectionError if squeue or scancel is missing, fails or does not
    answer. Raise Damaged if slurm.json, which lists the tasks, is damaged.
    """
    live = sorted(queue(sweep))
    if live:
        ask("scancel", *live)
    return live


def causes_of_death(jobs: Collection[str]) -> dict[str, str]:
    """Return how SLURM ended each of the tasks `jobs`: {id of the task: text}.

    An id is that of `Submission.job`, such as "17_3". The text is SLURM's state, such as "TIMEOUT",
    "OUT_OF_MEMORY" or "FAILED (exit code 1:0)". If SLURM does not know the task any more or cannot
    be asked, the text is "gone, and SLURM does not know why any more".
    """
    arrays = list(dict.fromkeys(job.partition("_")[0] for job in jobs))
    found = {**_causes_in_accounts(arrays), **_causes_in_memory(arrays)}
    unknown = "gone, and SLURM does not know why any more"
    return {job: found.get(job, found.get(job.partition("_")[0], unknown)) for job in jobs}


def _causes_in_accounts(arrays: Sequence[str]) -> dict[str, str]:
    """Return {task: state in which it ended} from sacct, which may lag behind.

    sacct knows jobs long after their end, if the cluster keeps accounts. The id of an array stands
    for those tasks of the array that never started: they share one record.
    """
    found: dict[str, str] = {}
    if not arrays:
        return found
    with suppress(ConnectionError):
        fields = ["-o", "JobID,State,ExitCode"]
        for row in ask("sacct", "-nXP", "-j", ",".join(arrays), *fields).splitlines():
            task, state, code = row.split("|")
            if "[" in task:
                task = task.partition("_")[0]
            found[task] = _worded(state.split()[0], code)
    return found


def _causes_in_memory(arrays: Sequence[str]) -> dict[str, str]:
    """Return {task: state in which it ended} from scontrol, which forgets a job after minutes.

    The id of an array stands for those tasks of the array that never started: they share one
    record.
    """
    found: dict[str, str] = {}
    for array in arrays:
        with suppress(ConnectionError):
            for text in ask("scontrol", "--oneliner", "show", "job", array).splitlines():
                fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
                index = fields.get("ArrayTaskId", "")
                task = f"{array}_{index}" if index.isdigit() and index != NO_INDEX else array
                found[task] = _worded(fields["JobState"], fields["ExitCode"])
    return found


def _worded(state: str, code: str) -> str:
    """Return the state in which a job ended, with its exit code if the state is FAILED."""
    if state == "FAILED":
        return f"{state} (exit code {code})"
    return state


def ask(*command: str, text: str | None = None) -> str:
    """Run a SLURM command and return its stdout.

    Args:
        *command: command and its arguments.
        text: text for the command's stdin; None for no input.

    Raises:
        NoCluster: If the command fails because this machine does not know of a cluster.
        ConnectionError: If the command is missing, does not answer within 60 seconds, or fails; the
            message quotes the command's error message.
    """
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, timeout=60
        )
    except FileNotFoundError:
        raise ConnectionError(
            f"{command[0]} is not on PATH: run this on a machine with SLURM's commands"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"{command[0]} does not answer") from None
    if done.returncode and NO_CLUSTER.search(done.stderr):
        raise NoCluster(
            f"no SLURM answers on this machine ({command[0]}: {error_message(done.stderr)}); use a "
            "login node of the cluster"
        )
    if done.returncode:
        raise ConnectionError(f"{command[0]}: {error_message(done.stderr)}")
    return done.stdout


def error_message(stderr: str) -> str:
    """Return the error message of a SLURM command in one line, without the command's name."""
    words = re.sub(r"(?m)^s\w+: (error: )?", "", stderr).split()
    return " ".join(words) or "no error message"
