"""Worker processes on this machine that train the groups of a sweep one after the other."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from sddlskd.config import Config
from sddlskd.record import FAILED, FINISHED, KILLED
from sddlskd.sweeps.outcome import record_outcome, result_of, state_of
from sddlskd.worker import BUSY, TOO_LARGE

__all__ = ["Pool", "Task"]

log = logging.getLogger(__name__)


@dataclass
class Task:
    """A group of jobs to run.

    Attributes:
        jobs: the jobs, which are trained side by side.
        deaths: number of workers that died while they ran these jobs.
    """

    jobs: list[Config]
    deaths: int = 0


class Pool:
    """Worker processes, one per device, that take groups of jobs from a queue.

    If a worker dies, its group runs again from its checkpoints. If a worker dies of the same group
    again, the group is split into single jobs, to find the job that kills workers. A group that is
    too large for the device's memory is halved.

    Args:
        devices: a list of trainer.device values, one per worker; CPU workers share the cores. The
            value auto uses the jobs' trainer.device; if that is auto too, there is one worker per
            visible GPU, or one CPU worker if there is no GPU.
        fail_fast: whether to stop the sweep at the first job that fails.
    """

    runs_locally = True  # whether the jobs run on this machine

    def __init__(self, devices: Any, *, fail_fast: bool) -> None:
        if not devices:
            raise ValueError(
                "hydra.launcher.devices=[] has no device; give auto or a list such as "
                "[cuda:0,cuda:1] or [cpu,cpu]"
            )
        self.auto = devices == "auto"
        listed = [devices] if isinstance(devices, str) else devices
        self.devices = [] if self.auto else [str(device) for device in listed]
        self.fail_fast = fail_fast
        self.queue: deque[Task] = deque()
        self.busy: dict[int, tuple[subprocess.Popen[bytes], Task]] = {}
        # The number of stop signals received so far, and the last of these signals.
        self.asked_to_stop, self.signal = 0, 0

    def validate(self, jobs: Sequence[Config]) -> None:
        """Accept all jobs; a pool has nothing to check before the sweep writes its files."""

    def run(self, groups: Sequence[Sequence[Config]], sweep: Path, visible: Sequence[str]) -> str:
        """Run every group and wait until all of them have ended.

        Args:
            groups: jobs to run; the jobs of a group are trained side by side.
            sweep: folder of the sweep; not used.
            visible: devices of this machine, for jobs and pools whose device is auto.

        Returns:
            KILLED if a signal stopped the sweep, otherwise FINISHED.
        """
        self.queue.extend(Task(list(group)) for group in groups)
        if self.auto:
            asked = {task.jobs[0].trainer.device for task in self.queue}
            self.devices = sorted(asked - {"auto"} | set(visible if "auto" in asked else []))
        on_cpu = self.devices.count("cpu")
        self.threads = max(len(os.sched_getaffinity(0)) // on_cpu, 1) if on_cpu > 1 else None
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.busy or (self.queue and not self.asked_to_stop):
                for slot in range(len(self.devices)):
                    if slot not in self.busy and (task := self._next(self.devices[slot])):
                        self.busy[slot] = self._start(slot, task)
                        if self.asked_to_stop:  # the signal came while the worker was starting
                            self.busy[slot][0].send_signal(self.signal)
                for slot, (worker, task) in list(self.busy.items()):
                    if worker.poll() is not None:
                        del self.busy[slot]
                        self._ended(worker.returncode, task)
                if self.fail_fast and any(
                    result_of(job)["status"] == FAILED
                    for _, task in self.busy.values()
                    for job in task.jobs
                ):
                    self._halt("a job failed and fail_fast is on")
                time.sleep(0.1)
        finally:
            for worker, _ in self.busy.values():
                worker.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return KILLED if self.asked_to_stop else FINISHED

    def _next(self, device: str) -> Task | None:
        """Return the next group for this device, or None if no group may start now.

        A job's own trainer.device counts, unless the sweep lists devices. A group whose jobs take
        several devices each (trainer.devices) runs only while no other group does.
        """
        if self.asked_to_stop or any(
            task.jobs[0].trainer.devices > 1 for _, task in self.busy.values()
        ):
            return None
        for task in self.queue:
            if task.jobs[0].trainer.devices > 1 and self.busy:
                continue
            if not self.auto or task.jobs[0].trainer.device in ("auto", device):
                self.queue.remove(task)
                return task
        return None

    def _start(self, slot: int, task: Task) -> tuple[subprocess.Popen[bytes], Task]:
        device, environment = self.devices[slot], dict(os.environ)
        if task.jobs[0].trainer.devices > 1:
            device = device.partition(":")[0]
            numbers = [
                name.removeprefix("cuda:") for name in self.devices if name.startswith("cuda:")
            ]
            # The numbers count the GPUs visible to this process, which may be a subset already.
            if numbers:
                seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(
                    seen[int(n)] if seen != [""] else n for n in numbers
                )
        command = [
            sys.executable,
            "-m",
            "sddlskd.worker",
            "--device",
            device,
            "--parent",
            str(os.getpid()),
        ]
        command += ["--threads", str(self.threads)] if self.threads and device == "cpu" else []
        command += ["--progress", "plain"] if len(self.devices) > 1 else []
        command += [job.run_dir for job in task.jobs]
        # In a session of its own, the worker receives Ctrl-C once, through this process.
        return subprocess.Popen(command, env=environment, start_new_session=True), task

    def _ended(self, code: int, task: Task) -> None:
        left = [job for job in task.jobs if result_of(job)["status"] not in (FINISHED, FAILED)]
        if self.fail_fast and any(result_of(job)["status"] == FAILED for job in task.jobs):
            self._halt("a job failed and fail_fast is on")
        if not left or self.asked_to_stop or not self.queue_open:
            return
        if code == BUSY:
            free = [job for job in left if state_of(Path(job.run_dir)) != "running"]
            log.warning(
                "%d jobs are left to another process, which is running them", len(left) - len(free)
            )
            if free and (len(free) < len(left) or task.deaths == 0):
                self.queue.append(Task(free, task.deaths + (len(free) == len(left))))
            return
        if code == TOO_LARGE and len(left) > 1:
            half = len(left) // 2
            log.warning(
                "%d jobs do not fit side by side: continuing with groups of %d and %d",
                len(left),
                half,
                len(left) - half,
            )
            self.queue.extendleft([Task(left[half:], task.deaths), Task(left[:half], task.deaths)])
            return
        why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if task.deaths == 0:
            log.warning(
                "a worker died (%s): its %d jobs continue from their checkpoints", why, len(left)
            )
            self.queue.appendleft(Task(left, 1))
        elif len(left) > 1:
            log.warning(
                "a second worker died of the same %d jobs (%s): running them one by one",
                len(left),
                why,
            )
            self.queue.extendleft(Task([job], 1) for job in reversed(left))
        else:
            record_outcome(
                left[0],
                FAILED,
                f"its worker died twice ({why})" + ("; out of memory?" if why == "SIGKILL" else ""),
            )

    queue_open = True

    def _halt(self, reason: str) -> None:
        if self.queue_open:
            log.warning("stopping the sweep: %s", reason)
            self.queue_open = False
            self.queue.clear()
            for worker, _ in self.busy.values():
                worker.send_signal(signal.SIGTERM)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_stop, self.signal = self.asked_to_stop + 1, number
        for worker, _ in self.busy.values():
            worker.send_signal(number) if self.asked_to_stop == 1 else worker.kill()
        log.warning(
            "%s",
            "stopping after this step with all checkpoints saved; a second signal stops at once"
            if self.asked_to_stop == 1
            else "stopped",
        )
