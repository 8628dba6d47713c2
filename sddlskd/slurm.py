"""SLURM runs the groups of a sweep: what is submitted, and what is asked of the queue later.

Run directories stay the only truth about runs; runs/sweeps/<name>/slurm.json adds which SLURM job has which of them.
"""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from sddlskd import config as cfg
from sddlskd import record, tracking
from sddlskd.array_task import SETUP, TEARDOWN, ArrayTask
from sddlskd.config import Config
from sddlskd.console import write_line
from sddlskd.outcome import LOCK, read_manifest, settle, state_of
from sddlskd.record import FAILED, FINISHED, KILLED, RUNNING

__all__ = ["Slurm", "Submission", "cancel", "causes_of_death", "queue", "submissions"]

log = logging.getLogger(__name__)

COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol")
MANIFEST = "slurm.json"  # in the sweep's folder
SECRET = re.compile(r"(TOKEN|PASSWORD|SECRET)\w*=")
POLL = 5.0  # seconds between looks at the queue
SUBMITTED_FOR_ALL = {
    "name",
    "timeout_min",
    "cpus_per_task",
    "gpus_per_node",
    "tasks_per_node",
    "mem_gb",
    "nodes",
}
"""What submitit knows of every cluster; its SLURM options are prefixed with slurm_."""
NO_INDEX = "4294967294"  # what scontrol shows of tasks that never started, once they are cancelled
UNSURE = "sbatch: allocation failure: Requested node configuration is not available"  # nodes may be down for a moment


@dataclass(frozen=True)
class Submission:
    """job: as squeue names it, 17_3; run_dirs: of the jobs that it trains side by side; log: what it says."""

    job: str
    run_dirs: list[str]
    log: str


def submissions(sweep: Path) -> list[Submission]:
    """Everything of this sweep that was ever submitted, oldest first."""
    path = sweep / MANIFEST
    return [Submission(**entry) for entry in json.loads(path.read_text())] if path.exists() else []


def _add(sweep: Path, new: Iterable[Submission]) -> None:
    with FileLock(sweep / LOCK):
        listed = [vars(one) for one in [*submissions(sweep), *new]]
        record.write_text(sweep / MANIFEST, json.dumps(listed, indent=1))


def queue(sweep: Path) -> dict[str, tuple[str, str]]:
    """{job: (state, reason)} of the sweep's submissions that SLURM has not ended. Raises ConnectionError."""
    mine = {one.job for one in submissions(sweep)}
    if not mine:
        return {}
    lines = _ask("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r").splitlines()
    rows = (line.strip().split("|", 2) for line in lines)
    return {job: (state, reason) for job, state, reason in rows if job in mine}


def states(sweep: Path) -> dict[str, str]:
    """queued or running, for each run directory that a live SLURM job has. Raises ConnectionError."""
    live = queue(sweep)
    return {
        run_dir: "running" if live[one.job][0] in ("RUNNING", "COMPLETING") else "queued"
        for one in submissions(sweep)
        if one.job in live
        for run_dir in one.run_dirs
    }


def cancel(sweep: Path) -> list[str]:
    """Cancel what is queued or running; gives the jobs. Tasks that run save their checkpoints first."""
    live = sorted(queue(sweep))
    if live:
        _ask("scancel", *live)
    return live


def causes_of_death(jobs: Collection[str]) -> dict[str, str]:
    """Why each job is over, as SLURM tells it: TIMEOUT, OUT_OF_MEMORY, NODE_FAIL, CANCELLED ..."""
    arrays = list(dict.fromkeys(job.partition("_")[0] for job in jobs))
    found: dict[
        str, str
    ] = {}  # by task; by array for its tasks that never started, which share a record
    with suppress(
        ConnectionError
    ):  # long after their end, where the cluster keeps accounts; it lags
        told = (
            _ask("sacct", "-nXP", "-j", ",".join(arrays), "-o", "JobID,State,ExitCode")
            if arrays
            else ""
        )
        for name, state, code in (row.split("|") for row in told.splitlines()):
            found[name if "[" not in name else name.partition("_")[0]] = _worded(
                state.split()[0], code
            )
    for array in arrays:
        with suppress(ConnectionError):  # for some minutes
            for text in _ask("scontrol", "--oneliner", "show", "job", array).splitlines():
                told_of = dict(word.split("=", 1) for word in text.split() if "=" in word)
                index = told_of.get("ArrayTaskId", "")
                name = f"{array}_{index}" if index.isdigit() and index != NO_INDEX else array
                found[name] = _worded(told_of["JobState"], told_of["ExitCode"])
    unknown = "gone, and SLURM does not know why any more"
    return {job: found.get(job, found.get(job.partition("_")[0], unknown)) for job in jobs}


def _worded(state: str, code: str) -> str:
    return f"{state} (exit code {code})" if state == "FAILED" else state


def _ask(*command: str, text: str | None = None) -> str:
    """What a SLURM command prints. Raises ConnectionError with its own words."""
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, check=False, timeout=60
        )
    except FileNotFoundError:
        raise ConnectionError(
            f"{command[0]} is not on PATH: run this where SLURM's commands are"
        ) from None
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"{command[0]} does not answer") from None
    if done.returncode:
        raise ConnectionError(f"{command[0]}: {_words(done.stderr)}")
    return done.stdout


@contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """For launching from inside an allocation, whose sizes would go over to what is submitted."""
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
    """Let Ctrl-C and the end of the terminal wait, for sbatch too: what it has submitted must be noted down."""
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python tells no other of signals
        yield
        return
    numbers, came = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP), list[int]()
    handlers = {
        number: signal.signal(number, lambda number, frame: came.append(number))
        for number in numbers
    }
    before = signal.pthread_sigmask(
        signal.SIG_BLOCK, numbers
    )  # sbatch inherits it; other threads still hear
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for each in came:
            signal.raise_signal(each)


def _words(text: str) -> str:
    return " ".join(re.sub(r"(?m)^s\w+: (error: )?", "", text).split()) or "it says nothing"


class Slurm:
    """Submits groups as job arrays and waits for them, in the place of a `Pool`.

    wait: False submits and returns; max_requeues: how often a warned task goes back into the queue; container,
    python, srun_args: how a task's Python is started; options: what submitit takes.
    """

    here = False  # the jobs run on other machines

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
        self.wait, self.max_requeues, self.fail_fast = wait, max_requeues, fail_fast
        self.python, self.array_parallelism, self.options = python, array_parallelism, options
        self.srun_args = [*([f"--container-image={container}"] if container else []), *srun_args]

    def check(self, jobs: Sequence[Config]) -> None:
        """Called before anything is written. Raises ValueError for what SLURM will refuse, with its own words."""
        if missing := [command for command in COMMANDS if shutil.which(command) is None]:
            raise ValueError(
                f"hydra/launcher=slurm needs {', '.join(missing)}: launch on a login node of the cluster, or leave "
                "hydra/launcher out to train on this machine"
            )
        warned, limit = self.options["signal_delay_s"], 60 * self.options["timeout_min"]
        if warned >= limit:
            raise ValueError(
                f"hydra.launcher.signal_delay_s={warned} warns a job before it begins: "
                f"hydra.launcher.timeout_min={limit // 60} is no longer than that"
            )
        if secret := next(
            (line for line in self.options.get("setup") or [] if SECRET.search(line)), None
        ):
            raise ValueError(
                f"hydra.launcher.setup would write {secret.partition('=')[0]} into files that others may read; export "
                "it in the shell that you launch from, whose environment sbatch passes on"
            )
        self._check_shared(jobs)
        for ranks in {_ranks(job) for job in jobs}:
            executor = self._executor(Path(jobs[0].home), ranks, 1)
            script = executor._executor._make_submission_file_text("true", "check")
            try:
                with _outside_of_a_job():
                    _ask("sbatch", "--test-only", text=script)
            except ConnectionError as error:
                if str(error) == UNSURE:
                    log.warning("no node can take the jobs now: %s", error)
                else:
                    raise ValueError(
                        f"{error}; see hydra.launcher.partition, account, qos and what it asks for"
                    ) from None

    def _check_shared(self, jobs: Sequence[Config]) -> None:
        """What one host alone may write: a SQLite file, and the memory-mapped cache of a teacher's maps."""
        cached = {
            str(job.teacher.cache) for job in jobs if job.distiller.loss and job.teacher.cache
        }
        if not cached and not any(
            str(job.tracking.uri).startswith("sqlite:") for job in jobs if job.tracking.enabled
        ):
            return
        rows = [
            row.split()
            for row in _ask("sinfo", "--noheader", "--Node", "--format=%n %P").splitlines()
        ]
        partition = self.options.get("partition") or os.environ.get("SBATCH_PARTITION")
        names = (
            partition.split(",") if partition else [name for _, name in rows if name.endswith("*")]
        )
        hosts = {host for host, name in rows if name in names or name.rstrip("*") in names}
        tracking.check_shared(jobs, hosts)
        if cached and len(hosts) > 1:
            raise ValueError(
                f"teacher.cache={min(cached)} is written to by one host alone and the jobs run on {len(hosts)}; set "
                "teacher.cache=null"
            )

    def run(self, groups: Sequence[Sequence[Config]], sweep: Path, visible: Sequence[str]) -> str:
        """Submit every group and wait for all that the sweep has in the queue. Gives RUNNING where it did not wait to
        the end, else FINISHED."""
        with FileLock(
            sweep / ".submit.lock"
        ):  # another launch may have submitted them since this one looked
            live = states(sweep)
            groups = [
                left
                for group in groups
                if (left := [job for job in group if job.run_dir not in live])
            ]
            by_ranks: dict[int, list[Sequence[Config]]] = defaultdict(list)
            for group in groups:
                by_ranks[_ranks(group[0])].append(group)
            for ranks, some in by_ranks.items():
                self._submit(some, sweep, ranks)
        if not self.wait:
            jobs = (
                " ".join(one.job for one in submissions(sweep)[-len(groups) :])
                if groups
                else "nothing new"
            )
            write_line(f"submitted to SLURM: {jobs}")
            return RUNNING
        try:
            self._wait(sweep)
        except KeyboardInterrupt:
            write_line(
                f"the jobs stay with SLURM; to take them back: python -m sddlskd.sweeps cancel {sweep}"
            )
            raise
        _settle(sweep)
        return FINISHED

    def _submit(self, groups: Sequence[Sequence[Config]], sweep: Path, ranks: int) -> None:
        largest = int(
            re.findall(r"MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"))[0]
        )
        chunks = [groups[at : at + largest] for at in range(0, len(groups), largest)]
        folder = sweep / "slurm"
        folder.mkdir(parents=True, exist_ok=True)
        for chunk in chunks:
            import submitit

            executor = self._executor(folder, ranks, max(self.array_parallelism // len(chunks), 1))
            tasks = [
                ArrayTask(tuple(job.run_dir for job in group), str(sweep), self.max_requeues)
                for group in chunk
            ]
            with _undisturbed():
                try:
                    with _outside_of_a_job(), executor.batch():
                        jobs = [executor.submit(task) for task in tasks]
                except (
                    submitit.core.utils.FailedJobError,
                    submitit.core.utils.FailedSubmissionError,
                ) as error:
                    so_far = f"{len(submissions(sweep))} tasks are submitted, the same command submits the others"
                    raise ValueError(f"sbatch: {_words(str(error))}; {so_far}") from None
                _add(
                    sweep,
                    [
                        Submission(
                            job.job_id, list(task.run_dirs), str(folder / f"{job.job_id}_0_log.out")
                        )
                        for job, task in zip(jobs, tasks, strict=True)
                    ],
                )

    def _executor(self, folder: Path, ranks: int, parallelism: int) -> Any:
        """submitit's, with every option set. Raises ValueError for one that it does not take."""
        import submitit

        nodes = self.options["nodes"]
        if ranks % nodes:
            raise ValueError(
                f"trainer.devices={ranks} does not spread evenly over hydra.launcher.nodes={nodes}"
            )
        options = {name: value for name, value in self.options.items() if value is not None}
        options["tasks_per_node"] = ranks // nodes
        srun_args = list(self.srun_args)
        if "cpus_per_task" in options:  # srun does not take it over from sbatch (since 22.05)
            srun_args.append(f"--cpus-per-task={options['cpus_per_task']}")
        if (
            ranks > 1
        ):  # where one is gone the others wait for it in vain; time for rank 0 to deliver its last words
            srun_args.append("--wait=120")
        options |= {
            "array_parallelism": parallelism,
            "srun_args": srun_args,
            "stderr_to_stdout": True,
            "setup": [*SETUP, *(options.get("setup") or [])],
            "teardown": TEARDOWN.replace("MAX_REQUEUES", str(self.max_requeues)).splitlines(),
            "additional_parameters": {
                "requeue": True,
                **(options.get("additional_parameters") or {}),
            },
        }
        executor = submitit.AutoExecutor(
            folder, cluster="slurm", slurm_python=self.python or shlex.quote(sys.executable)
        )
        executor.update_parameters(
            **{
                name if name in SUBMITTED_FOR_ALL else f"slurm_{name}": value
                for name, value in options.items()
            }
        )
        return executor

    def _wait(self, sweep: Path) -> None:
        """Until nothing of the sweep is in the queue: one question for all of it, every few seconds."""
        told, empty, away = "", 0, False
        earlier = _failed(sweep)
        while (
            empty < 2
        ):  # a job that is being requeued, or a record on a slow file system, may be missed once
            try:
                live = queue(sweep)
                if self.fail_fast and live and _failed(sweep) - earlier:
                    log.warning("stopping the sweep: a job failed and fail_fast is on")
                    _ask("scancel", *live)
            except ConnectionError as error:
                if not away:
                    log.warning("SLURM is away (%s); its jobs go on and so does the waiting", error)
                away = True
                time.sleep(POLL)
                continue
            if away:
                log.warning("SLURM is back")
            away, empty = False, 0 if live else empty + 1
            counts = Counter(
                f"{state.lower()}{f' ({why})' if why != 'None' else ''}"
                for state, why in live.values()
            )
            line = ", ".join(f"{number} {what}" for what, number in sorted(counts.items()))
            if line != told:
                log.info("SLURM: %s", line or "all done")
            told = line
            time.sleep(POLL if live else 1.0)


def _failed(sweep: Path) -> set[str]:
    return {
        run_dir for run_dir in read_manifest(sweep)["jobs"] if state_of(Path(run_dir)) == "failed"
    }


def _ranks(job: Config) -> int:
    """Processes that share each batch of a job."""
    return job.trainer.devices


def _settle(sweep: Path) -> None:
    """Note in the records why SLURM ended jobs before they were done."""
    latest = {run_dir: one.job for one in submissions(sweep) for run_dir in one.run_dirs}
    results = {run_dir: record.read_result(Path(run_dir)) for run_dir in latest}
    left = {
        run_dir: job
        for run_dir, job in latest.items()
        if results[run_dir].get("status") not in (FINISHED, FAILED)
    }
    causes = causes_of_death(left.values())
    for run_dir, job in left.items():
        reason, over = results[run_dir].get("reason", ""), f"SLURM job {job} is over"
        if over not in reason:
            settled = replace(cfg.load(Path(run_dir, "config.yaml")), run_dir=run_dir)
            settle(settled, KILLED, f"{reason}{'; ' if reason else ''}{over}: {causes[job]}")
