"""Sweeps on SLURM: submit the groups of jobs as tasks of job arrays, and wait for them.

The run directories stay the only record of the runs. `slurm_queue.py` records which SLURM job
trains which run directories.
"""

import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from sddlskd import config as cfg
from sddlskd import record, tracking
from sddlskd.config import Config
from sddlskd.record import FAILED, FINISHED, KILLED, PRUNED, RUNNING
from sddlskd.sweeps.array_task import SETUP, TEARDOWN, ArrayTask
from sddlskd.sweeps.manifest import read_manifest
from sddlskd.sweeps.outcome import record_outcome, state_of
from sddlskd.sweeps.runner import GroupRunner
from sddlskd.sweeps.slurm_queue import (
    NoCluster,
    Submission,
    add_submissions,
    ask,
    causes_of_death,
    error_message,
    queue,
    states,
    submissions,
)
from sddlskd.terminal.console import duration, write_line
from sddlskd.terminal.words import counted

__all__ = ["Slurm"]

log = logging.getLogger(__name__)

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
SECRET = re.compile(r"(TOKEN|PASSWORD|SECRET)\w*=")
POLL = 5.0  # seconds between two queries of the queue
# Options that submitit knows for every kind of cluster. All others have the prefix slurm_.
SUBMITTED_FOR_ALL = {
    "name",
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
}
# For each resource of a task, the options that ask for it, with their labels in a plan
RESOURCES = {
    "partition": {"partition": "partition"},
    "GPUs": {"gpus_per_node": "GPUs per node", "gpus_per_task": "GPUs per process", "gres": "gres"},
    "CPU cores": {"cpus_per_task": "CPU cores per process", "cpus_per_gpu": "CPU cores per GPU"},
    "memory": {
        "mem_gb": "GB of memory per node",
        "mem_per_cpu": "memory per CPU core",
        "mem_per_gpu": "memory per GPU",
    },
}
MARGIN = 1.5  # a time limit suffices if the estimated time, times this, fits into it
# What a plan says of a cluster's default, beside its name
AT_WORST = {"GPUs": " (maybe none: hydra.launcher.gpus_per_node=1 asks for one)"}
# Options that a plan names only if they are set
FURTHER = ("account", "qos", "constraint", "exclude", "comment")
# This refusal may be temporary: nodes may be down for a moment.
UNSURE = "sbatch: allocation failure: Requested node configuration is not available"


@contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Remove SLURM's variables from the environment for the duration of the context.

    A sweep may be launched from inside an allocation, whose sizes would otherwise carry over to the
    submitted jobs.
    """
    inherited = [
        name
        for name in os.environ
        if name.startswith(("SLURM_", "SUBMITIT_")) and name != "SLURM_CONF"
    ]
    kept = {name: os.environ.pop(name) for name in inherited}
    try:
        yield
    finally:
        os.environ.update(kept)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Delay SIGINT, SIGTERM and SIGHUP to the end of the context, for this process and for sbatch.

    Every submitted job must be written to slurm.json before a signal can end this process.
    """
    # Python delivers signals to the main thread only.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    received: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in numbers
    }
    # sbatch inherits the mask. Other threads of this process can still receive the signals, hence
    # the handlers above.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in received:
            signal.raise_signal(late)


def _refusals_of_sbatch(executor: Any) -> Iterator[ValueError]:
    """Yield a ValueError if sbatch would refuse the jobs of an executor of submitit.

    If no node can take the jobs at the moment, only log a warning.
    """
    script = executor._executor._make_submission_file_text("true", "check")
    try:
        with _outside_of_a_job():
            ask("sbatch", "--test-only", text=script)
    except NoCluster as error:
        yield ValueError(str(error))
    except ConnectionError as error:
        if str(error) == UNSURE:
            log.warning("no node can take the jobs now: %s", error)
        else:
            yield ValueError(
                f"{error}; see hydra.launcher.partition, account, qos and the resources that it "
                "requests"
            )


class Slurm(GroupRunner):
    """Runner that submits the groups of a sweep to SLURM, each as a task of a job array.

    A group is a list of jobs that are trained together, with one teacher forward pass per batch.

    Args:
        wait: whether `run` waits until the tasks have ended; if False, `run` only submits them.
        max_requeues: how often at most a task goes back into SLURM's queue after it was preempted,
            or warned of its time limit.
        fail_fast: whether to cancel the sweep's tasks as soon as a job fails; without effect if
            `wait` is False.
        python: command that starts Python on a node; None for the Python of this process.
        container: image for `srun --container-image`; None for no container.
        srun_args: arguments of srun, in addition to those that submitit gives it.
        array_parallelism: largest number of tasks that run at once. If the jobs differ in
            trainer.devices, this limit holds for each value of trainer.devices by itself.
        **options: options of submitit, without the prefix slurm_. Required are signal_delay_s
            (seconds before the time limit at which a task is warned), timeout_min (time limit in
            minutes) and nodes (number of nodes of a task).
    """

    runs_locally = False

    def __init__(
        self,
        *,
        wait: bool,
        max_requeues: int,
        fail_fast: bool,
        python: str | None,
        container: str | None,
        srun_args: Sequence[str],
        array_parallelism: int,
        **options: Any,
    ) -> None:
        self.wait = wait
        self.max_requeues = max_requeues
        self.fail_fast = fail_fast
        self.python = python
        self.srun_args = list(srun_args)
        if container:
            self.srun_args.insert(0, f"--container-image={container}")
        self.array_parallelism = array_parallelism
        self.options = options

    def refusals(self, jobs: Sequence[Config], visible: Sequence[str]) -> Iterator[Exception]:
        """Yield every reason why SLURM would not accept the jobs; write no file.

        The reasons are these: a SLURM command is missing, an option is wrong, a line of the option
        `setup` holds a password or token, several hosts would write one SQLite file or one teacher
        cache, sinfo cannot list the hosts, sbatch refuses the jobs, or any other problem. If no
        node can take the jobs at the moment, only log a warning.

        Args:
            jobs: jobs to run, at least one.
            visible: not used.
        """
        missing = [command for command in COMMANDS if shutil.which(command) is None]
        if missing:
            yield ValueError(
                f"hydra/launcher=slurm needs {', '.join(missing)}: launch on a login node of the "
                "cluster, or leave hydra/launcher out to train on this machine"
            )
        signal_delay_s = self.options["signal_delay_s"]
        timeout_min = self.options["timeout_min"]
        if signal_delay_s >= 60 * timeout_min:
            yield ValueError(
                f"hydra.launcher.signal_delay_s={signal_delay_s} must be less than the time "
                f"limit, hydra.launcher.timeout_min={timeout_min}, or a job is warned before it "
                "starts; lower signal_delay_s or raise timeout_min"
            )
        for line in self.options.get("setup") or []:
            if SECRET.search(line):
                yield ValueError(
                    f"hydra.launcher.setup would write {line.partition('=')[0]} into files that "
                    "others may read; export it in the shell that you launch from, whose "
                    "environment sbatch passes on"
                )
        if not missing:
            yield from self._shared_files(jobs)
        for ranks in sorted({job.trainer.devices for job in jobs}):
            if uneven := self._uneven(ranks):
                yield ValueError(uneven)
            elif not missing:
                yield from _refusals_of_sbatch(self._executor(Path(jobs[0].home), ranks, 1))

    def _shared_files(self, jobs: Sequence[Config]) -> Iterator[Exception]:
        """Yield an error for each kind of file that several hosts would write, and only one may.

        Such files are SQLite databases and the memory-mapped caches of a teacher's logit maps. If
        sinfo cannot list the hosts, its ConnectionError is yielded.
        """
        caches = {str(job.teacher.cache) for job in jobs if job.has_teacher and job.teacher.cache}
        in_sqlite = any(
            str(job.tracking.uri).startswith("sqlite:") for job in jobs if job.tracking.enabled
        )
        if not caches and not in_sqlite:
            return
        try:
            hosts = self._hosts()
        except ConnectionError as error:
            yield error
            return
        try:
            tracking.check_shared(jobs, hosts)
        except ValueError as error:
            yield error
        if caches and len(hosts) > 1:
            yield ValueError(
                f"teacher.cache={min(caches)} can be written by one host only, but the jobs run "
                f"on {len(hosts)} hosts; set teacher.cache=null"
            )

    def _hosts(self) -> set[str]:
        """Return the hosts of the partitions that the jobs are submitted to."""
        rows = [
            row.split()
            for row in ask("sinfo", "--noheader", "--Node", "--format=%n %P").splitlines()
        ]
        if chosen := self._partition():
            names = chosen.split(",")
            return {host for host, name in rows if name.rstrip("*") in names}
        # SLURM marks the default partition with an asterisk.
        return {host for host, name in rows if name.endswith("*")}

    def _partition(self) -> str | None:
        """Return the partitions of the jobs, separated by commas; None for SLURM's default."""
        partition: str | None = self.options.get("partition") or os.environ.get("SBATCH_PARTITION")
        return partition

    def places(self, jobs: Sequence[Config], visible: Sequence[str]) -> list[str]:
        """Return [], because SLURM chooses the devices."""
        return []

    def kind(self, jobs: Sequence[Config], visible: Sequence[str]) -> str | None:
        """Return "cuda" if tasks ask for GPUs or jobs for CUDA, else "cpu"; None if jobs differ.

        The arguments are those of `GroupRunner.kind`; `visible` is not used.
        """
        kinds = {job.trainer.device.partition(":")[0] for job in jobs}
        if "auto" in kinds:
            kinds.remove("auto")
            kind = "cpu"
            if any(self.options.get(option) for option in RESOURCES["GPUs"]):
                kind = "cuda"
            kinds.add(kind)
        return kinds.pop() if len(kinds) == 1 else None

    def requests(
        self, groups: Sequence[Sequence[Config]], seconds: Sequence[float | None]
    ) -> list[str]:
        """Return the numbers of tasks, what each asks for, and whether its time limit suffices.

        The arguments are those of `GroupRunner.requests`.
        """
        lines = []
        for ranks, tasks in _by_ranks(groups).items():
            number = counted(len(tasks), "task")
            if ranks > 1:
                number = f"{number} of {ranks} processes each"
            at_once = min(self.array_parallelism, len(tasks))
            lines.append(f"SLURM: a job array of {number}, at most {at_once} at once")
        if lines:
            lines.append(f"each task asks for: {'; '.join(self._resources())}")
            lines.append(self._time_line(seconds))
        return lines

    def _time_line(self, seconds: Sequence[float | None]) -> str:
        """Return a sentence that says whether the time limit suffices for the longest task.

        `seconds` are the estimated seconds of the tasks; None for a task without similar runs.
        """
        limit = f"hydra.launcher.timeout_min={self.options['timeout_min']}"
        known = [one for one in seconds if one is not None]
        if not known:
            return (
                f"whether {limit} suffices is not known without similar runs; a task that needs "
                f"longer is requeued, at most {counted(self.max_requeues, 'time')}, and goes on "
                "from its checkpoint; after that its jobs stay KILLED until the same command "
                "continues them"
            )
        task = "the longest task"
        if len(known) < len(seconds):
            task = "the longest task with similar runs"
        needed = f"{task} needs about {duration(max(known))}"
        # A task trains until its warning, which comes before the limit.
        usable = 60 * self.options["timeout_min"] - self.options["signal_delay_s"]
        if MARGIN * max(known) <= usable:
            return f"{needed}: {limit} suffices"
        if max(known) <= usable:
            return f"{needed}: {limit} is tight, as times differ between runs"
        # A limit that is shorter than its warning is refused, so the number does not matter then.
        requeues = math.ceil(max(known) / max(usable, 1)) - 1
        often = "once"
        if requeues > 1:
            often = f"{requeues} times"
        line = (
            f"{needed}, too long for {limit}: it will be requeued about {often}, and goes on from "
            "its checkpoint each time"
        )
        if requeues > self.max_requeues:
            line += (
                f"; hydra.launcher.max_requeues={self.max_requeues} leaves its jobs KILLED "
                "before their end, so raise one of the two, or run the same command again"
            )
        return line

    def _resources(self) -> list[str]:
        """Return the resources of a task, such as "partition: gpu" and "GPUs per node: 1"."""
        values = {**self.options, "partition": self._partition()}
        parts = []
        for resource, options in RESOURCES.items():
            asked = [
                f"{label}: {values[name]}"
                for name, label in options.items()
                if values.get(name) is not None
            ]
            parts += asked or [f"{resource}: the cluster's default{AT_WORST.get(resource, '')}"]
        further = {"time limit": counted(values["timeout_min"], "minute")}
        if values["nodes"] > 1:
            further["nodes"] = values["nodes"]
        further |= {name: values[name] for name in FURTHER if values.get(name) is not None}
        further |= values.get("additional_parameters") or {}
        return [*parts, *(f"{name}: {value}" for name, value in further.items())]

    def run(self, groups: Sequence[Sequence[Config]], folder: Path, visible: Sequence[str]) -> str:
        """Submit every group, and wait until no task of the sweep is in SLURM's queue.

        Jobs that are in the queue already are not submitted again. If SLURM ended the task of a job
        early, the cause is written into the job's result.json after the wait.

        Args:
            groups: jobs to run, whose run directories hold config.yaml; the jobs of a group are
                trained together in one task.
            folder: folder of the sweep.
            visible: devices of this machine; not used.

        Returns:
            "RUNNING", without waiting, if the runner was made with wait=False; otherwise
            "FINISHED", even if jobs failed.

        Raises:
            ConnectionError: If SLURM does not answer while the jobs are submitted. If SLURM does
                not answer later, during the wait, only a warning is logged.
            ValueError: If sbatch refuses a job, or if a file of the sweep or of a job is damaged.
                Tasks that are submitted already stay in the queue.
            KeyboardInterrupt: If Ctrl-C ends the wait; the tasks stay in the queue.
        """
        # The lock guards against another launch that submits the same jobs at the same time.
        with FileLock(folder / ".submit.lock"):
            in_queue = states(folder)
            left = [[job for job in group if job.run_dir not in in_queue] for group in groups]
            new_groups = [group for group in left if group]
            for ranks, groups_of_ranks in _by_ranks(new_groups).items():
                self._submit(groups_of_ranks, folder, ranks)
        if not self.wait:
            tasks = [one.job for one in submissions(folder)]
            new = " ".join(tasks[len(tasks) - len(new_groups) :])
            write_line(f"submitted to SLURM: {new or 'nothing new'}")
            return RUNNING
        try:
            self._wait(folder)
        except KeyboardInterrupt:
            write_line(
                "the jobs stay in SLURM's queue; to cancel them: "
                f"python -m sddlskd.sweeps cancel {folder}"
            )
            raise
        _record_dead_jobs(folder)
        return FINISHED

    def _submit(self, groups: Sequence[Sequence[Config]], sweep: Path, ranks: int) -> None:
        """Submit the groups as job arrays, and list their tasks in slurm.json.

        Args:
            groups: jobs to submit, each group as one task.
            sweep: folder of the sweep.
            ranks: processes per task.

        Raises:
            ConnectionError: If SLURM cannot be asked.
            ValueError: If sbatch refuses a job.
        """
        import submitit

        refusals = (
            submitit.core.utils.FailedJobError,
            submitit.core.utils.FailedSubmissionError,
        )
        config = ask("scontrol", "show", "config")
        largest = int(re.findall(r"MaxArraySize\s*=\s*(\d+)", config)[0])
        arrays = [groups[first : first + largest] for first in range(0, len(groups), largest)]
        parallelism = max(self.array_parallelism // len(arrays), 1)
        folder = sweep / "slurm"
        folder.mkdir(parents=True, exist_ok=True)
        for array in arrays:
            executor = self._executor(folder, ranks, parallelism)
            tasks = [
                ArrayTask(tuple(job.run_dir for job in group), str(sweep), self.max_requeues)
                for group in array
            ]
            with _undisturbed():
                try:
                    with _outside_of_a_job(), executor.batch():
                        jobs = [executor.submit(task) for task in tasks]
                except refusals as error:
                    raise ValueError(
                        f"sbatch: {error_message(str(error))}; submitted so far: "
                        f"{counted(len(submissions(sweep)), 'task')}; the same command submits the "
                        "others"
                    ) from None
                submitted = []
                for job, task in zip(jobs, tasks, strict=True):
                    log_file = str(folder / f"{job.job_id}_0_log.out")
                    submitted.append(Submission(job.job_id, list(task.run_dirs), log_file))
                add_submissions(sweep, submitted)

    def _uneven(self, ranks: int) -> str:
        """Return why tasks of `ranks` processes do not spread over the nodes; "" if they do."""
        nodes = self.options["nodes"]
        if ranks % nodes == 0:
            return ""
        return (
            f"trainer.devices={ranks} does not spread evenly over hydra.launcher.nodes={nodes}; "
            "nodes is for one job that spans several nodes: leave it out, or make trainer.devices "
            "a multiple of it (hydra.launcher.array_parallelism limits how many tasks run at once)"
        )

    def _executor(self, folder: Path, ranks: int, parallelism: int) -> Any:
        """Return submitit's executor with every option set.

        Args:
            folder: folder for the batch scripts and logs.
            ranks: processes per task.
            parallelism: largest number of tasks of the array that run at once.

        Raises:
            ValueError: If `ranks` is not a multiple of the number of nodes.
        """
        import submitit

        if uneven := self._uneven(ranks):
            raise ValueError(uneven)
        options = {name: value for name, value in self.options.items() if value is not None}
        srun_args = list(self.srun_args)
        if "cpus_per_task" in options:  # srun does not inherit it from sbatch since SLURM 22.05
            srun_args.append(f"--cpus-per-task={options['cpus_per_task']}")
        # If one rank is gone, the others wait for it in vain, so srun must end them. The delay of
        # 120 seconds gives rank 0 time to finish its records.
        if ranks > 1:
            srun_args.append("--wait=120")
        options |= {
            "tasks_per_node": ranks // self.options["nodes"],
            "array_parallelism": parallelism,
            "srun_args": srun_args,
            "stderr_to_stdout": True,
            "setup": [*SETUP, *options.get("setup", [])],
            "teardown": TEARDOWN.replace("MAX_REQUEUES", str(self.max_requeues)).splitlines(),
            "additional_parameters": {"requeue": True, **options.get("additional_parameters", {})},
        }
        python = self.python or shlex.quote(sys.executable)
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_python=python)
        parameters = {}
        for name, value in options.items():
            key = name if name in SUBMITTED_FOR_ALL else f"slurm_{name}"
            parameters[key] = value
        executor.update_parameters(**parameters)
        return executor

    def _wait(self, sweep: Path) -> None:
        """Wait until no task of the sweep is in the queue.

        With fail_fast, cancel the tasks once a job has failed. One squeue call every few seconds
        asks for all tasks at once.
        """
        earlier_failures = _failed(sweep)
        reported = ""  # the last line about the queue in the log
        empty_answers = 0
        unreachable = False
        # Require two empty answers: one query may miss a job that is being requeued, or a record on
        # a slow file system.
        while empty_answers < 2:
            try:
                live = queue(sweep)
                if self.fail_fast and live and _failed(sweep) - earlier_failures:
                    log.warning("stopping the sweep: a job failed and fail_fast is on")
                    ask("scancel", *live)
            except ConnectionError as error:
                if not unreachable:
                    log.warning("SLURM cannot be asked (%s); still waiting for its jobs", error)
                unreachable = True
                time.sleep(POLL)
                continue
            if unreachable:
                log.warning("SLURM answers again")
            unreachable = False
            line = _queue_line(live)
            if line != reported:
                log.info("SLURM: %s", line or "all done")
            reported = line
            if live:
                empty_answers = 0
                time.sleep(POLL)
            else:
                empty_answers += 1
                time.sleep(1.0)


def _by_ranks(groups: Iterable[Sequence[Config]]) -> dict[int, list[Sequence[Config]]]:
    """Return the groups by the number of processes of their tasks, which is trainer.devices."""
    by_ranks: dict[int, list[Sequence[Config]]] = defaultdict(list)
    for group in groups:
        by_ranks[group[0].trainer.devices].append(group)
    return by_ranks


def _queue_line(live: Mapping[str, tuple[str, str]]) -> str:
    """Return how many tasks are in each state, such as "2 pending (Priority), 1 running"."""
    counts: Counter[str] = Counter()
    for state, reason in live.values():
        described = state.lower()
        if reason != "None":
            described = f"{described} ({reason})"
        counts[described] += 1
    return ", ".join(f"{number} {described}" for described, number in sorted(counts.items()))


def _failed(sweep: Path) -> set[str]:
    return {
        run_dir for run_dir in read_manifest(sweep)["jobs"] if state_of(Path(run_dir)) == "failed"
    }


def _record_dead_jobs(sweep: Path) -> None:
    """Write into the records of unfinished jobs how SLURM ended their tasks.

    A job whose run directory was deleted has no record.
    """
    latest = {
        run_dir: one.job
        for one in submissions(sweep)
        for run_dir in one.run_dirs
        if Path(run_dir, "config.yaml").exists()
    }
    results = {run_dir: record.read_result(Path(run_dir)) for run_dir in latest}
    unfinished = {
        run_dir: task
        for run_dir, task in latest.items()
        if results[run_dir].get("status") not in (FINISHED, FAILED, PRUNED)
    }
    causes = causes_of_death(unfinished.values())
    for run_dir, task in unfinished.items():
        reason = results[run_dir].get("reason", "")
        over = f"SLURM job {task} is over"
        if over in reason:
            continue
        job = replace(cfg.load(Path(run_dir, "config.yaml")), run_dir=run_dir)
        reasons = [reason, f"{over}: {causes[task]}"]
        record_outcome(job, KILLED, "; ".join(filter(None, reasons)))
