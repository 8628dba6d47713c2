"""Worker processes on this machine, each of which trains one group of a sweep after the other."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from sddlskd.config import Config
from sddlskd.processes.cores import check_processes, usable_cores
from sddlskd.processes.exit_codes import ExitCode
from sddlskd.processes.interrupts import held_back, hung_up_counts
from sddlskd.record import FAILED, FINISHED, KILLED, PRUNED
from sddlskd.sweeps.estimate import seconds_left, time_left
from sddlskd.sweeps.outcome import record_outcome, result_of, state_of
from sddlskd.sweeps.runner import GroupRunner
from sddlskd.terminal.words import counted

__all__ = ["Pool", "Task"]

log = logging.getLogger(__name__)

WORKER_MB = 200  # memory of a process that has imported torch, in megabytes
POLL_S = 0.1  # seconds between two looks at the workers
FAILED_FAST = "a job failed and fail_fast is on"
ENDED = (FINISHED, FAILED, PRUNED)
DEVICE = re.compile(r"auto|(cpu|cuda|mps)(:\d+)?")  # what a list of devices may name
MOST_SHOWN = 16  # devices of a list that a message proposes


@dataclass
class Task:
    """Group of jobs in the queue of a `Pool`.

    Attributes:
        jobs: jobs that one worker process trains together, at least one.
        is_retry: whether an earlier worker process of these jobs died, was stopped, or found the
            jobs in use by another process, which has ended since.
        number: number of the group among those of the launch, from 1; the parts of a group share
            its number.
    """

    jobs: list[Config]
    is_retry: bool = False
    number: int = 1

    @property
    def devices_per_job(self) -> int:
        """Return trainer.devices of the jobs, the number of devices that share each batch."""
        return self.jobs[0].trainer.devices

    @property
    def device_failures(self) -> set[int]:
        """Return the exit codes of a worker that report a failed device of these jobs."""
        first = ExitCode.NO_DEVICE_0
        return {ExitCode.NO_DEVICE, *range(first, first + self.devices_per_job)}


class Pool(GroupRunner):
    """Runner that trains the groups of a sweep on this machine, each group in a worker process.

    The jobs of a group are trained together, with one teacher forward pass per batch. One worker at
    a time runs per device. A group that is too large for the device's memory is halved.

    - If a worker dies, its unfinished jobs continue from their checkpoints in a second worker.
    - If the second worker dies, too, a single unfinished job is marked FAILED. Of several, each
      gets a worker of its own, and is marked FAILED if that worker dies.
    - If a signal stopped the second worker, its unfinished jobs stay KILLED.
    - If a device fails, it gets no more groups, and its unfinished jobs go to the other devices. If
      too few devices that may train a job are left, the job stays to do.

    Args:
        devices: list of devices such as ["cuda:0", "cuda:1"] or ["cpu", "cpu"], one for each worker
            that runs at a time; a text such as "cuda:0" stands for a list of one. "auto" takes the
            jobs' trainer.device; if that is auto as well, the devices are all visible GPUs, else
            MPS, else the CPU. Several CPU workers share the cores.
        fail_fast: whether to stop the sweep at the first job that fails.
        start: function that starts a worker process; called like subprocess.Popen.

    Raises:
        ValueError: If `devices` is empty, or if it is neither "auto" nor names devices.
    """

    runs_locally = True
    array_parallelism = None

    def __init__(
        self,
        devices: Any,
        *,
        fail_fast: bool,
        start: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen,
    ) -> None:
        _check_devices(devices)
        self.auto = devices == "auto"
        self.devices: list[str] = []
        if not self.auto:
            listed = [devices] if isinstance(devices, str) else devices
            self.devices = [str(device) for device in listed]
        self.fail_fast = fail_fast
        self.start = start
        self.threads: int | None = None  # per CPU worker; None for torch's default
        self.queue: deque[Task] = deque()
        self.queue_open = True  # whether groups may be added to the queue
        # The running workers by the index of their device.
        self.busy: dict[int, tuple[subprocess.Popen[bytes], Task]] = {}
        self.failed_devices: set[str] = set()
        self.groups = 0  # number of groups of the launch
        self.jobs: list[Config] = []  # jobs of the launch
        self.trained_on: str | None = None  # kind of the devices
        self.ended_groups = 0  # groups whose worker has ended
        self.told_groups = 0  # of these, groups that a line of the log has counted
        self.stop_signals = 0  # number of stop signals received so far
        self.last_signal = 0  # number of the last stop signal

    def refusals(self, jobs: Sequence[Config], visible: Sequence[str]) -> Iterator[Exception]:
        """Yield a ValueError for GPUs that this machine lacks, and for more workers than cores.

        `jobs` are the jobs of the sweep; there are never more workers than jobs. `visible` are the
        devices of this machine.
        """
        gpus = [name for name in dict.fromkeys(self.devices) if name.startswith("cuda")]
        here = {"cuda", *visible} if any(name.startswith("cuda") for name in visible) else set()
        if missing := [name for name in gpus if name not in here]:
            instead = f"[{','.join(name for name in visible if name != 'cpu') or 'cpu,cpu'}]"
            yield ValueError(
                f"this machine has no {', '.join(missing)}, which hydra.launcher.devices names; "
                f"give auto, or a list such as {instead}"
            )
        # The pool with the devices "auto" has at most one worker for each device.
        workers = min(self.devices.count("cpu"), len(jobs))
        try:
            check_processes("the number of workers in hydra.launcher.devices", workers, WORKER_MB)
        except ValueError as refusal:
            yield refusal

    def places(self, jobs: Sequence[Config], visible: Sequence[str]) -> list[str]:
        """Return the devices that train the jobs, one for each worker; see `GroupRunner.places`."""
        if not self.auto:
            return self.devices
        asked_for = {job.trainer.device for job in jobs}
        if "auto" in asked_for:
            asked_for.remove("auto")
            asked_for.update(visible)
        return sorted(asked_for)

    def kind(self, jobs: Sequence[Config], visible: Sequence[str]) -> str | None:
        """Return the kind of the devices that train the jobs; see `GroupRunner.kind`."""
        kinds = {place.partition(":")[0] for place in self.places(jobs, visible)}
        return kinds.pop() if len(kinds) == 1 else None

    def requests(
        self, groups: Sequence[Sequence[Config]], seconds: Sequence[float | None]
    ) -> list[str]:
        """Return [], because the pool asks nobody for its devices."""
        return []

    def run(self, groups: Sequence[Sequence[Config]], folder: Path, visible: Sequence[str]) -> str:
        """Run every group, and wait until all of them have ended.

        SIGINT, SIGTERM or the SIGHUP of a closed terminal stops the workers, which save their
        checkpoints first; a second SIGINT or SIGTERM kills them. Call this method in the main
        thread.

        Args:
            groups: jobs to run, whose run directories hold config.yaml; the jobs of a group are
                trained together.
            folder: folder of the sweep; not used.
            visible: devices of this machine, such as ["cuda:0"]; they are used if the pool's
                `devices` and a job's trainer.device are both auto.

        Returns:
            "KILLED" if a signal stopped the sweep, otherwise "FINISHED", even if jobs failed.

        Raises:
            ValueError: If a file of a job is damaged, or if this is not the main thread.
            OSError: If a worker cannot be started.
        """
        self.groups = len(groups)
        self.jobs = [job for group in groups for job in group]
        self.trained_on = self.kind(self.jobs, visible)
        self.queue.extend(
            Task(list(group), number=number) for number, group in enumerate(groups, 1)
        )
        self.devices = self.places([task.jobs[0] for task in self.queue], visible)
        cpu_workers = self.devices.count("cpu")
        if cpu_workers > 1:
            self.threads = max(usable_cores() // cpu_workers, 1)
        asking = [signal.SIGINT, signal.SIGTERM]
        if hung_up_counts():
            asking.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._stop) for number in asking}
        try:
            while self.busy or (self.queue and not self.stop_signals):
                self._start_workers()
                if self.ended_groups > self.told_groups:  # after the freed device has work again
                    self.told_groups = self.ended_groups
                    self._say_progress()
                self._collect_workers()
                running = [job for _, task in self.busy.values() for job in task.jobs]
                if self.fail_fast and _any_failed(running):
                    self._halt(FAILED_FAST)
                time.sleep(POLL_S)
        finally:
            for worker, _ in self.busy.values():
                worker.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return KILLED if self.stop_signals else FINISHED

    def _start_workers(self) -> None:
        for slot, device in enumerate(self.devices):
            if slot in self.busy or device in self.failed_devices:
                continue
            if task := self._next(device):
                log.info(
                    "starting a worker on %s for group %d of %d", device, task.number, self.groups
                )
                self.busy[slot] = (self._start(device, task), task)
                if self.stop_signals:  # the signal came while the worker was starting
                    self.busy[slot][0].send_signal(self.last_signal)

    def _collect_workers(self) -> None:
        for slot, (worker, task) in list(self.busy.items()):
            if worker.poll() is not None:
                del self.busy[slot]
                code = worker.returncode
                if code in task.device_failures:
                    self._leave_out(self._failed_device(code, self.devices[slot]), task)
                self._ended(code, task)
                if code in task.device_failures and not self.stop_signals:
                    self._give_up()
                self.ended_groups += 1

    def _say_progress(self) -> None:
        """Log how many jobs have ended and how long the others will take, if there are others."""
        statuses = [result_of(job)["status"] for job in self.jobs]
        done = sum(status in ENDED for status in statuses)
        if self.stop_signals or not done or not (self.busy or self.queue):
            return
        failed = ""
        if FAILED in statuses:
            failed = f" ({statuses.count(FAILED)} failed)"
        left = [job for job, status in zip(self.jobs, statuses, strict=True) if status not in ENDED]
        log.info(
            "%d of %s done%s; time left: %s",
            done,
            counted(len(self.jobs), "job"),
            failed,
            time_left(seconds_left(left, self.trained_on), self._at_once(left)),
        )

    def _at_once(self, left: Sequence[Config]) -> int:
        """Return how many devices can train the groups of the jobs `left` at the same time."""
        if any(job.trainer.devices > 1 for job in left):
            return 1  # such a job takes all its devices, and no other group runs beside it
        return min(len(self._usable()), len(self.busy) + len(self.queue))

    def _usable(self) -> list[str]:
        """Return the devices that have not failed."""
        return [name for name in self.devices if name not in self.failed_devices]

    def _next(self, device: str) -> Task | None:
        """Remove and return the next group for this device; return None if no group may start now.

        A job's own trainer.device counts, unless the pool got a list of devices. A group whose jobs
        take several devices each (trainer.devices) runs only while no other group runs.
        """
        if self.stop_signals:
            return None
        if any(task.devices_per_job > 1 for _, task in self.busy.values()):
            return None
        for task in self.queue:
            if task.devices_per_job > 1 and self.busy:
                continue
            if self._may_train(device, task):
                self.queue.remove(task)
                return task
        return None

    def _may_train(self, device: str, task: Task) -> bool:
        """Return whether a device, and as many others as the jobs ask for, may train the jobs."""
        asked_for = task.devices_per_job
        # If the list was too short from the start, the worker refuses the jobs.
        too_few = len(self._gpus()) < asked_for <= len(self._listed_gpus())
        if too_few and device.startswith("cuda:"):
            return False
        return not self.auto or task.jobs[0].trainer.device in ("auto", device)

    def _start(self, device: str, task: Task) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        if task.devices_per_job > 1:
            device = device.partition(":")[0]
            if visible := self._visible_gpus():
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
        command = [sys.executable, "-m", "sddlskd.worker", "--device", device]
        command += ["--parent", str(os.getpid())]
        if self.threads and device == "cpu":
            command += ["--threads", str(self.threads)]
        if len(self.devices) > 1:
            command += ["--progress", "plain"]
        command += [job.run_dir for job in task.jobs]
        # In a session of its own, the worker receives Ctrl-C once, through this process.
        with held_back():
            return self.start(command, env=environment, start_new_session=True)

    def _listed_gpus(self) -> list[str]:
        """Return the GPUs with a number in the list of devices, each once."""
        return [name for name in dict.fromkeys(self.devices) if name.startswith("cuda:")]

    def _gpus(self) -> list[str]:
        """Return the listed GPUs that have not failed; they share the batches of a large job."""
        return [name for name in self._listed_gpus() if name not in self.failed_devices]

    def _visible_gpus(self) -> list[str]:
        """Return the GPUs of all workers as CUDA_VISIBLE_DEVICES names them; [] if there is none.

        The number in cuda:1 counts the GPUs visible to this process, which may be a subset already.
        """
        numbers = [name.removeprefix("cuda:") for name in self._gpus()]
        already = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if not already:
            return numbers
        return [already.split(",")[int(number)] for number in numbers]

    def _ended(self, code: int, task: Task) -> None:
        """Queue the unfinished jobs of a worker that has ended with exit code `code`, if useful."""
        left = [job for job in task.jobs if result_of(job)["status"] not in ENDED]
        if self.fail_fast and _any_failed(task.jobs):
            self._halt(FAILED_FAST)
        if not left or self.stop_signals or not self.queue_open:
            return
        if code in task.device_failures:
            self.queue.appendleft(Task(left, task.is_retry, task.number))
        elif code == ExitCode.BUSY:
            self._leave_to_others(left, task)
        elif code == ExitCode.TOO_LARGE and len(left) > 1:
            half = len(left) // 2
            log.warning(
                "%d jobs do not fit side by side: continuing with groups of %d and %d",
                len(left),
                half,
                len(left) - half,
            )
            parts = (left[half:], left[:half])
            self.queue.extendleft(Task(part, task.is_retry, task.number) for part in parts)
        elif code == ExitCode.STOPPED and task.is_retry:
            # The jobs have not failed: the sweep's command continues them.
            log.warning("a worker was stopped twice; left KILLED: %s", counted(len(left), "job"))
        else:
            self._retry(left, task, code)

    def _failed_device(self, code: int, device: str) -> str:
        """Return the device whose failure an exit code of a worker reports.

        `device` is the device of the worker. The code tells which one of several devices failed.
        """
        if code == ExitCode.NO_DEVICE or not device.startswith("cuda:"):
            return device
        return self._gpus()[code - ExitCode.NO_DEVICE_0]

    def _leave_out(self, device: str, task: Task) -> None:
        """Give no more groups to a device that has failed while it trained the group `task`."""
        if device in self.failed_devices:
            return
        self.failed_devices.add(device)
        reasons = [result_of(job)["reason"] for job in task.jobs]
        log.error(
            "%s is taken out of the sweep: %s",
            device,
            next((reason for reason in reasons if reason), "it failed"),
        )

    def _give_up(self) -> None:
        """Take the groups out of the queue that no device may train since a device has failed."""
        usable = self._usable()
        stay = [
            task for task in self.queue if not any(self._may_train(name, task) for name in usable)
        ]
        for task in stay:
            self.queue.remove(task)
        if stay:
            log.error(
                "too few devices are left for %s; the same command trains what stays to do",
                counted(sum(len(task.jobs) for task in stay), "job"),
            )

    def _leave_to_others(self, left: list[Config], task: Task) -> None:
        """Leave the jobs that another process is running to that process, and run the others."""
        free = [job for job in left if state_of(Path(job.run_dir)) != "running"]
        log.warning(
            "left to another process, which is running them: %s",
            counted(len(left) - len(free), "job"),
        )
        if free and len(free) < len(left):
            self.queue.append(Task(free, task.is_retry, task.number))
        elif free and not task.is_retry:  # the other process has ended in the meantime
            self.queue.append(Task(free, True, task.number))

    def _retry(self, left: list[Config], task: Task, code: int) -> None:
        """Queue the jobs of a dead worker again, or mark a job FAILED that killed two workers."""
        why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if not task.is_retry:
            log.warning(
                "a worker died (%s); to continue from its checkpoints: %s",
                why,
                counted(len(left), "job"),
            )
            self.queue.appendleft(Task(left, True, task.number))
        elif len(left) > 1:
            log.warning(
                "a second worker died of the same %d jobs (%s): running them one by one",
                len(left),
                why,
            )
            self.queue.extendleft(Task([job], True, task.number) for job in reversed(left))
        else:
            reason = f"its worker died twice ({why})"
            if why == "SIGKILL":
                reason += "; out of memory?"
            record_outcome(left[0], FAILED, reason)

    def _halt(self, reason: str) -> None:
        """Stop the workers and start no other; `reason` is for the log."""
        if not self.queue_open:
            return
        log.warning("stopping the sweep: %s", reason)
        self.queue_open = False
        self.queue.clear()
        for worker, _ in self.busy.values():
            worker.send_signal(signal.SIGTERM)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Handle a stop signal: the first stops the workers, the second kills them.

        A SIGHUP is never the second: the shell and the system both send one when a terminal closes.
        """
        if number == signal.SIGHUP and self.stop_signals:
            return
        self.stop_signals += 1
        self.last_signal = number
        if self.stop_signals == 1:
            for worker, _ in self.busy.values():
                worker.send_signal(number)
            log.warning(
                "stopping after this step with all checkpoints saved; a second signal stops at once"
            )
        else:
            for worker, _ in self.busy.values():
                worker.kill()
            log.warning("stopped")


def _check_devices(devices: Any) -> None:
    """Raise ValueError unless the option hydra.launcher.devices is "auto" or names devices."""
    given = _as_typed(devices)
    proposed = "[cuda:0,cuda:1]"
    if type(devices) is int and 0 < devices <= MOST_SHOWN:
        proposed = _as_typed([f"cuda:{index}" for index in range(devices)])
    if not isinstance(devices, str | list):
        raise ValueError(f"hydra.launcher.devices={given} is not a list; give {proposed} or auto")
    if not devices:
        raise ValueError(
            "hydra.launcher.devices=[] has no device; give auto or a list such as "
            "[cuda:0,cuda:1] or [cpu,cpu]"
        )
    listed = [devices] if isinstance(devices, str) else devices
    unknown = [device for device in listed if not DEVICE.fullmatch(str(device))]
    if not unknown:
        return
    numbers = [f"cuda:{device}" for device in listed if type(device) is int and device >= 0]
    if len(numbers) == len(listed):
        proposed = _as_typed(numbers[:MOST_SHOWN])
    raise ValueError(
        f"hydra.launcher.devices={given} names {_as_typed(unknown[0])}, which is no device; "
        f"give {proposed}, [cpu] or auto"
    )


def _as_typed(value: Any) -> str:
    """Return a value of the command line as a user types it."""
    if isinstance(value, list):
        return f"[{','.join(map(_as_typed, value))}]"
    if value is None:
        return "null"
    return str(value)


def _any_failed(jobs: Iterable[Config]) -> bool:
    return any(result_of(job)["status"] == FAILED for job in jobs)
