"""A sweep on this machine: planned, frozen, run by worker processes, continued where it stopped.

    python -m sddlskd.sweeps status NAME     what is finished, running, failed, interrupted or missing, and how to go on

A sweep is its jobs' run directories and a list of them in runs/sweeps/<name>/sweep.json; nothing else has a state.
"""

import argparse
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
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from types import FrameType
from typing import Any

from filelock import FileLock

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config, Rerun
from sddlskd.console import duration, outcomes, write_line
from sddlskd.grid import InvalidJobs, reasons_together
from sddlskd.record import FAILED, FINISHED, KILLED, RUNNING
from sddlskd.worker import BUSY, TOO_LARGE

__all__ = ["groups_of", "run_sweep", "state_of"]

log = logging.getLogger(__name__)

LOCK = ".lock"  # in the sweep's folder: two launches may add jobs to its lists at once
STATES = ("finished", "running", "interrupted", "failed", "new")


def state_of(folder: Path) -> str:
    """finished, running, interrupted, failed or new (never started)."""
    status = record.read_result(folder).get("status")
    if status == RUNNING:
        return "interrupted" if record.abandoned(folder) else "running"
    return {None: "new", FINISHED: "finished", FAILED: "failed", KILLED: "interrupted"}[status]


def groups_of(jobs: Iterable[Config], max_group_size: int | None = None) -> list[list[Config]]:
    """Jobs that can share batches and teacher, together; a job that stands in the grid twice is taken once."""
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
    devices: Any = "auto",
    max_group_size: int | None = None,
    fail_fast: bool = False,
) -> list[dict[str, Any]]:
    """Run what of the sweep is not done; gives every job's result.json, in order.

    Jobs that are FINISHED are left alone, interrupted ones continue, FAILED ones run again (`sweep.rerun`). Exits with
    1 where a job failed, 130 where the sweep was stopped. Raises ValueError, before anything starts, naming every job
    that is not valid.
    """
    unique = list({job.run_dir: job for job in jobs}.values())
    if len(unique) < len({cfg.config_hash(job) for job in jobs}):
        raise ValueError("several jobs of the sweep have one run_dir; leave run_dir out, so that each gets its own")
    states = {job.run_dir: state_of(Path(job.run_dir)) for job in unique}
    rerun = unique[0].sweep.rerun
    skipped = (
        {"running"}
        | ({"finished"} if rerun is not Rerun.all else set())
        | ({"failed"} if rerun is Rerun.none else set())
    )
    todo = [job for job in unique if states[job.run_dir] not in skipped]
    seen = _look_ahead(todo, [job for job in unique if states[job.run_dir] == "finished"])
    if seen.invalid and not unique[0].sweep.plan:
        raise InvalidJobs(seen.invalid)
    if seen.changed:
        log.warning(
            "%d finished jobs learnt from another teacher file than is there now (%s ...); "
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
    if todo:
        from sddlskd import tracking

        tracking.check_reachable(todo)  # before anything is written
    folder = _write_manifest(name, unique)
    if todo:
        if rerun is Rerun.all:
            for job in todo:
                _set_aside(Path(job.run_dir))
        registered = tracking.register(todo, sweep=name)
        for job in registered:
            record.freeze(job)
            record.queue_again(Path(job.run_dir))
        tracking.log_plan(registered[0], _write_plan(folder, name, unique))
        stopped = Pool(devices, fail_fast=fail_fast).run(groups, seen.devices)
        tracking.finish_sweep(registered[0], KILLED if stopped else _outcome(unique))
    elif not _planned(folder) >= {job.run_dir for job in unique}:
        _register_what_others_ran(folder, name, unique)
    results = [_result(job) for job in unique]
    digest(unique, results)
    if any(result["status"] != FINISHED for result in results):
        write_line(f"to go on: {_command(unique[0].home)}    (state: python -m sddlskd.sweeps status {folder})")
    outcomes(unique, results)
    by_folder = {job.run_dir: result for job, result in zip(unique, results, strict=True)}
    return [by_folder[job.run_dir] for job in jobs]


def _outcome(jobs: Iterable[Config]) -> str:
    return FINISHED if all(state_of(Path(job.run_dir)) == "finished" for job in jobs) else FAILED


def _register_what_others_ran(folder: Path, name: str, jobs: Sequence[Config]) -> None:
    """Let MLflow know a sweep of which every job was run by another; nothing is lost where it is away."""
    from sddlskd import tracking

    try:
        tracking.check_reachable(jobs)
        first = tracking.register(jobs[:1], sweep=name)[0]
    except ConnectionError as error:
        log.warning("MLflow does not know of sweep %s: %s", name, error)
        return
    tracking.log_plan(first, _write_plan(folder, name, jobs))
    tracking.finish_sweep(first, _outcome(jobs))


def _result(job: Config) -> dict[str, Any]:
    nothing = {"status": "NEW", "reason": "", "best_top1": None, "last_top1": None, "epochs": 0, "seconds": 0.0}
    return record.read_result(Path(job.run_dir)) or nothing


@dataclass
class Seen:
    """What is known before anything starts."""

    invalid: list[tuple[str, str]]  # jobs that cannot run, each with the reason
    changed: list[Config]  # finished jobs whose teacher file was replaced since
    devices: list[str]  # of this machine


def _look_ahead(todo: Sequence[Config], finished: Sequence[Config]) -> Seen:
    if not todo and not any(job.distiller.loss for job in finished):
        return Seen([], [], [])
    answer = _ask_precheck(list(todo), list(finished))
    return Seen(
        [(cfg.run_name(todo[at]), reason) for at, reason in answer["problems"]],
        [finished[at] for at in answer["changed"]],
        answer["devices"],
    )


def _ask_precheck(todo: list[Config], finished: list[Config]) -> dict[str, Any]:
    """Asked in a process of its own: this one stays small while it waits for the workers."""
    command = [sys.executable, "-m", "sddlskd.precheck"]
    done = subprocess.run(command, input=pickle.dumps((todo, finished)), stdout=subprocess.PIPE, check=False)
    if done.returncode:
        why = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
        raise ChildProcessError(f"the check of the jobs died ({why}), so none was started; what it said stands above")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def _set_aside(folder: Path) -> None:
    from sddlskd import tracking

    if folder.exists():
        if (folder / "config.yaml").exists():
            tracking.supersede(folder)
        folder.rename(folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}"))


def _plan(name: str, jobs: Sequence[Config], states: dict[str, str], groups: Sequence[Sequence[Config]]) -> list[str]:
    counts = Counter(states.values())
    state = ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s])
    todo = sum(map(len, groups))
    lines = [f"sweep {name}: {len(jobs)} jobs ({state}), {todo} to do in {len(groups)} groups"]
    taught = [group for group in groups if group[0].distiller.loss]
    if taught:
        alone = sum(map(len, taught))
        lines.append(f"the teacher goes through the data {len(taught)} times an epoch instead of {alone}")
    known = [_seconds(job) for group in groups for job in group]
    if todo and all(s is not None for s in known):
        lines.append(f"about {duration(sum(s for s in known if s is not None))} on one device, from runs like these")
    elif todo:
        lines.append("no runs like these are here yet, so the time is not known")
    return lines


def _seconds(job: Config) -> float | None:
    """What the job adds to a sweep: from runs of its pair and data set, which shared their time with their group."""
    label = f"{job.teacher.name}-{job.student.name}-*" if job.distiller.loss else f"{job.student.name}-*"
    done = [record.read_result(path.parent) for path in Path(job.run_dir).parent.glob(f"{label}/result.json")]
    rates = [r["seconds"] / r["epochs"] / r.get("group_size", 1) for r in done if r.get("epochs")]
    return mean(rates) * job.trainer.epochs if rates else None


def _command(home: str) -> str:
    """What was typed, with the home that it had from the environment or the current folder."""
    again = [word for word in sys.argv[1:] if word not in ("sweep.rerun=all", "sweep.plan=true")]  # meant for once
    again += [] if any(word.startswith("home=") for word in again) else [f"home={home}"]
    return shlex.join(["python", "-m", "sddlskd.train", *again])


def _write_manifest(name: str, jobs: Sequence[Config]) -> Path:
    """Add these jobs to the sweep's list."""
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
    """Every job that the sweep means to run, in MLflow's words: what all have in common once, then what differs."""
    with FileLock(folder / LOCK):
        return _add_to_plan(folder / "plan.json", name, jobs)


def _add_to_plan(path: Path, name: str, jobs: Sequence[Config]) -> Path:
    params = {job.run_dir: {key: str(value) for key, value in cfg.flatten(job).items()} for job in jobs}
    hashes = {job.run_dir: (cfg.config_hash(job), cfg.settings_hash(job)) for job in jobs}
    if path.exists():  # of an earlier start, with other jobs
        earlier = json.loads(path.read_text())
        for job in earlier["jobs"]:
            params.setdefault(job["run_dir"], earlier["common"] | job["params"])
            hashes.setdefault(job["run_dir"], (job["config_hash"], job["settings_hash"]))
    first = next(iter(params.values()))
    common = {key: value for key, value in first.items() if all(own.get(key) == value for own in params.values())}
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
    """The run directories of the jobs in the plan."""
    path = folder / "plan.json"
    return {job["run_dir"] for job in json.loads(path.read_text())["jobs"]} if path.exists() else set()


def read_manifest(folder: Path) -> dict[str, Any]:
    """{name, command, folder, time, jobs}."""
    content: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return content


@dataclass
class Task:
    """A group to run, and how many workers died of it."""

    jobs: list[Config]
    deaths: int = 0


class Pool:
    """Worker processes, one a device, that take groups from a queue.

    devices: auto (the jobs' trainer.device; where that is auto too, every visible GPU, else one CPU worker) or a list
    of trainer.device values; CPU workers share the cores. A group whose worker dies is run again from its checkpoints,
    once; the next time it is split into single jobs, to find the one that kills. A group that is too large for the
    device's memory is halved.
    """

    def __init__(self, devices: Any, *, fail_fast: bool) -> None:
        if not devices:
            raise ValueError(
                "hydra.launcher.devices=[] has no device; give auto or a list such as [cuda:0,cuda:1] or [cpu,cpu]"
            )
        self.auto = devices == "auto"
        listed = [devices] if isinstance(devices, str) else devices
        self.devices = [] if self.auto else [str(device) for device in listed]
        self.fail_fast = fail_fast
        self.queue: deque[Task] = deque()
        self.busy: dict[int, tuple[subprocess.Popen[bytes], Task]] = {}
        self.asked_to_stop = 0

    def run(self, groups: Sequence[Sequence[Config]], visible: Sequence[str]) -> bool:
        """Run every group; True where a person stopped it. visible: the devices of this machine."""
        self.queue.extend(Task(list(group)) for group in groups)
        if self.auto:
            asked = {task.jobs[0].trainer.device for task in self.queue}
            self.devices = sorted(asked - {"auto"} | set(visible if "auto" in asked else []))
        on_cpu = self.devices.count("cpu")
        self.threads = max(len(os.sched_getaffinity(0)) // on_cpu, 1) if on_cpu > 1 else None
        before = {s: signal.signal(s, self._stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.queue or self.busy:
                for slot in range(len(self.devices)):
                    if slot not in self.busy and (task := self._next(self.devices[slot])):
                        self.busy[slot] = self._start(slot, task)
                for slot, (worker, task) in list(self.busy.items()):
                    if worker.poll() is not None:
                        del self.busy[slot]
                        self._ended(worker.returncode, task)
                if self.fail_fast and any(
                    _result(job)["status"] == FAILED for _, task in self.busy.values() for job in task.jobs
                ):
                    self._halt("a job failed and fail_fast is on")
                time.sleep(0.1)
        finally:
            for worker, _ in self.busy.values():
                worker.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self.asked_to_stop > 0

    def _next(self, device: str) -> Task | None:
        """The first group for this device: a job's own trainer.device counts, unless the sweep lists devices.

        One whose jobs take several devices each (trainer.devices) has them all to itself.
        """
        if any(task.jobs[0].trainer.devices > 1 for _, task in self.busy.values()):
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
            numbers = [name.removeprefix("cuda:") for name in self.devices if name.startswith("cuda:")]
            if numbers:  # of the GPUs that we see
                seen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(seen[int(n)] if seen != [""] else n for n in numbers)
        command = [sys.executable, "-m", "sddlskd.worker", "--device", device, "--parent", str(os.getpid())]
        command += ["--threads", str(self.threads)] if self.threads and device == "cpu" else []
        command += ["--progress", "plain"] if len(self.devices) > 1 else []
        # A session of its own: Ctrl-C reaches the workers through us, once.
        command += [job.run_dir for job in task.jobs]
        return subprocess.Popen(command, env=environment, start_new_session=True), task

    def _ended(self, code: int, task: Task) -> None:
        left = [job for job in task.jobs if _result(job)["status"] not in (FINISHED, FAILED)]
        if self.fail_fast and any(_result(job)["status"] == FAILED for job in task.jobs):
            self._halt("a job failed and fail_fast is on")
        if not left or self.asked_to_stop or not self.queue_open:
            return
        if code == BUSY:
            free = [job for job in left if state_of(Path(job.run_dir)) != "running"]
            log.warning("%d jobs are run by another process and are left to it", len(left) - len(free))
            if free and (len(free) < len(left) or task.deaths == 0):
                self.queue.append(Task(free, task.deaths + (len(free) == len(left))))
            return
        if code == TOO_LARGE and len(left) > 1:
            half = len(left) // 2
            log.warning("%d jobs do not fit side by side: going on with %d and %d", len(left), half, len(left) - half)
            self.queue.extendleft([Task(left[half:], task.deaths), Task(left[:half], task.deaths)])
            return
        why = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        if task.deaths == 0:
            log.warning("a worker died (%s): its %d jobs go on from their checkpoints", why, len(left))
            self.queue.appendleft(Task(left, 1))
        elif len(left) > 1:
            log.warning("a second worker died of the same %d jobs (%s): running them one by one", len(left), why)
            self.queue.extendleft(Task([job], 1) for job in reversed(left))
        else:
            _mark_failed(left[0], f"its worker died twice ({why})" + ("; out of memory?" if why == "SIGKILL" else ""))

    queue_open = True

    def _halt(self, reason: str) -> None:
        if self.queue_open:
            log.warning("stopping the sweep: %s", reason)
            self.queue_open = False
            self.queue.clear()
            for worker, _ in self.busy.values():
                worker.send_signal(signal.SIGTERM)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.asked_to_stop += 1
        self.queue.clear()
        for worker, _ in self.busy.values():
            worker.send_signal(signal.SIGINT) if self.asked_to_stop == 1 else worker.kill()
        log.warning(
            "%s",
            "stopping after this step with all checkpoints saved; once more stops at once"
            if self.asked_to_stop == 1
            else "stopped",
        )


def _mark_failed(job: Config, reason: str) -> None:
    from sddlskd import tracking

    try:
        opened = record.Record(job)
    except record.InUse as error:  # it lives on elsewhere
        log.warning("%s", error)
        return
    rows = opened.rows()
    tops = [row["val/top1"] for row in rows]
    values = {
        "best_top1": max(tops, default=None),
        "last_top1": tops[-1] if tops else None,
        "epochs": len(rows),
        "seconds": sum(row["time/epoch_s"] for row in rows),
    }
    about = {k: v for k, v in record.read_result(opened.folder).items() if k.startswith("teacher_")}
    opened.result(FAILED, reason, **values, **about)
    opened.close()
    if job.tracking.enabled:
        mirror = tracking.Mirror()
        mirror.update(Path(job.run_dir))
        mirror.close()


def cause_of(reason: str) -> str:
    """The kind of failure, to group by."""
    if "worker died" in reason:
        return "killed"
    if "OutOfMemory" in reason:
        return "out of memory"
    if found := re.search(r"NonFiniteLoss.*at epoch (\d+)", reason):
        return f"non-finite loss at epoch {found[1]}"
    return reason.split(":")[0]


def digest(jobs: Sequence[Config], results: Sequence[dict[str, Any]]) -> None:
    """Print the failures by cause, each with the end of its log and the command that runs it again."""
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


def status(folder: Path) -> None:
    """Print where a sweep stands."""
    manifest = read_manifest(folder)
    folders = [Path(path) for path in manifest["jobs"]]
    states = {path: state_of(path) for path in folders}
    counts = Counter(states.values())
    write_line(
        f"sweep {manifest['name']}: {len(folders)} jobs: " + ", ".join(f"{counts[s]} {s}" for s in STATES if counts[s])
    )
    rows = {path: record.read_rows(path) for path in folders if states[path] != "new"}
    paces = [
        row["time/epoch_s"] / record.read_result(path).get("group_size", 1)
        for path, some in rows.items()
        for row in some[-3:]
    ]
    left = 0.0
    for path in folders:
        some, result = rows.get(path, []), record.read_result(path)
        top1 = result.get("best_top1")
        epochs = cfg.load(path / "config.yaml").trainer.epochs if (path / "config.yaml").exists() else 0
        if states[path] in ("new", "running", "interrupted") and paces:
            left += (epochs - len(some)) * mean(paces)
        reason = f"  {result['reason']}" if result.get("reason") else ""
        top1 = max((row["val/top1"] for row in some), default=None) if top1 is None else top1
        shown = "" if top1 is None else f"  top-1 {top1:.2f}"
        write_line(f"  {states[path]:<12} {len(some)}/{epochs} epochs{shown}  {path.name}{reason}")
    if set(counts) - {"finished"}:
        write_line(f"time left: about {duration(left)} on one device" if paces else "time left: not known yet")
        write_line(f"to finish it: cd {shlex.quote(manifest['folder'])} && {manifest['command']}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Where a sweep stands."""
    parser = argparse.ArgumentParser(prog="python -m sddlskd.sweeps", description=main.__doc__)
    parser.add_argument("command", choices=["status"])
    parser.add_argument("sweep", help="its name, or its folder")
    parser.add_argument("--home", default=os.environ.get("SDDLSKD_HOME", "."), help="where runs/ is")
    chosen = parser.parse_args(arguments)
    cfg.frame()
    sweeps = Path(chosen.home, "runs", "sweeps")
    folder = next(
        (path for path in (sweeps / chosen.sweep, Path(chosen.sweep)) if (path / "sweep.json").exists()), None
    )
    if folder is None:
        known = sorted(path.parent.name for path in sweeps.glob("*/sweep.json"))
        sys.exit(f"error: no sweep {chosen.sweep} in {sweeps}; there are: {', '.join(known) or 'none'}")
    status(folder)


if __name__ == "__main__":
    main()
