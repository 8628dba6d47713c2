"""The files in a sweep's folder that list its jobs: sweep.json, and plan.json for MLflow."""

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config

__all__ = [
    "LOCK",
    "LocalLaunch",
    "command_to_continue",
    "is_running",
    "local_launch",
    "marked_as_running",
    "planned_epochs",
    "planned_jobs",
    "read_manifest",
    "refusal_of_second_launch",
    "write_manifest",
    "write_plan",
]

# File in the sweep's folder. It guards the lists of jobs, which two launches may extend at once.
LOCK = ".lock"
# File in the sweep's folder that a launch locks as long as it runs the jobs.
RUNNING_LOCK = "running.lock"
# File in the sweep's folder that describes the launch that holds the lock, if it trains the jobs
# itself. It is not the lock itself, because whoever tries to lock a file empties it.
LAUNCH = "running.json"
MANIFEST = "sweep.json"
NEEDED = ("name", "command", "folder", "time", "jobs")  # keys of every manifest
PLAN = "plan.json"
# The user meant these overrides for one launch only.
FOR_ONE_LAUNCH = ("sweep.rerun=all", "sweep.plan=true")


def command_to_continue(home: str) -> str:
    """Return the shell command that continues the sweep of this process.

    The command is `python -m sddlskd.train` with the arguments of this process (`sys.argv`), except
    the overrides sweep.rerun=all and sweep.plan=true, which are meant for one call. If the
    arguments have no override home=..., home=<home> is added.
    """
    words = [word for word in sys.argv[1:] if word not in FOR_ONE_LAUNCH]
    if not any(word.startswith("home=") for word in words):
        words.append(f"home={home}")
    return shlex.join(["python", "-m", "sddlskd.train", *words])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the content of the file sweep.json in the folder of a sweep.

    The keys are "name" (of the sweep), "command" (that continues the sweep), "folder" (working
    directory for the command), "time" (of the last launch, in Unix seconds), "jobs" (list of the
    jobs' run directories, first those of the last launch), "until_decided" (whether the command may
    add jobs), "devices" (number of devices of this machine that train the jobs; 1 for a cluster)
    and "kind" (kind of the devices; null if the kinds differ). Manifests of earlier versions lack
    the last three. Raise FileNotFoundError if there is no such file, and record.Damaged (a
    ValueError) if the file is not a JSON object or lacks another key.
    """
    path = folder / MANIFEST
    content = record.read_json(path)
    if not content:
        raise FileNotFoundError(f"{path} does not exist")
    if missing := [key for key in NEEDED if key not in content]:
        raise record.Damaged(
            f"{path} is damaged (it has no {missing[0]}); delete it, and run the sweep's command "
            "again"
        )
    return content


def write_manifest(
    folder: Path, name: str, jobs: Sequence[Config], devices: int = 1, kind: str | None = None
) -> None:
    """Add the jobs of a launch to sweep.json, the list of a sweep's jobs.

    A launch is one call of the sweep's command. The folder and the file are created if they are
    missing. The jobs of earlier launches stay in the list, after those of this launch, and a job is
    listed once. The name, command, working directory and time in the file become those of this
    launch. Several processes may call this function at the same time.

    Args:
        folder: folder of the sweep, <home>/runs/sweeps/<name>.
        name: name of the sweep.
        jobs: jobs of this launch, at least one; the file lists their run directories.
        devices: number of devices of this machine that train the jobs; 1 for a cluster.
        kind: kind of the devices, such as "cuda"; None if the kinds differ.

    Raises:
        record.Damaged: If there is a sweep.json that is not a JSON object.
        OSError: If the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / LOCK):
        run_dirs = [job.run_dir for job in jobs]
        if (folder / MANIFEST).exists():
            run_dirs += read_manifest(folder)["jobs"]
        content = {
            "name": name,
            "command": command_to_continue(jobs[0].home),
            "folder": os.getcwd(),
            "time": time.time(),
            "jobs": list(dict.fromkeys(run_dirs)),
            "until_decided": jobs[0].sweep.seeds is not None,
            "devices": devices,
            "kind": kind,
        }
        record.write_text(folder / MANIFEST, json.dumps(content, indent=1))


@dataclass(frozen=True)
class LocalLaunch:
    """Launch of a sweep that trains the jobs in worker processes of its own machine.

    Attributes:
        process: id of the process.
        host: name of the machine.
        jobs: run directories of the jobs that the launch trains, or has trained already.
    """

    process: int
    host: str
    jobs: list[str]

    @property
    def is_here(self) -> bool:
        """Return whether the launch runs on this machine."""
        return self.host == socket.gethostname()


@contextmanager
def marked_as_running(folder: Path, name: str = "", jobs: Sequence[str] = ()) -> Iterator[None]:
    """Lock a file in the folder of a sweep for a block, so that `is_running` sees the launch.

    If another launch of the sweep has locked the file already, do nothing.

    Args:
        folder: folder of the sweep; it is made if it is missing.
        name: name of the sweep, for a message.
        jobs: run directories that this launch trains on this machine; () if a cluster trains them.

    Raises:
        ValueError: If another launch on this machine trains one of `jobs`.
        OSError: If a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / RUNNING_LOCK)
    with suppress(Timeout):
        lock.acquire(timeout=0.1)  # in seconds; `is_running` holds the lock briefly
    if not lock.is_locked:
        if refusal := refusal_of_second_launch(folder, name, jobs):
            raise ValueError(refusal)
        yield
        return
    try:
        (folder / LAUNCH).unlink(missing_ok=True)  # of a launch that was killed
        if jobs:
            launch = LocalLaunch(os.getpid(), socket.gethostname(), list(jobs))
            record.write_text(folder / LAUNCH, json.dumps(asdict(launch)))
        yield
    finally:
        (folder / LAUNCH).unlink(missing_ok=True)
        lock.release()


def refusal_of_second_launch(folder: Path, name: str, jobs: Sequence[str]) -> str:
    """Return why jobs of a sweep cannot be launched beside a launch that is alive; "" if they can.

    The jobs of one launch wait in its memory, so that another one on the same machine would train
    them a second time. The other launch may train jobs of its own.

    Args:
        folder: folder of the sweep.
        name: name of the sweep.
        jobs: run directories of the jobs to launch.
    """
    launch = local_launch(folder)
    if launch is None or not launch.is_here or set(launch.jobs).isdisjoint(jobs):
        return ""
    return (
        f"process {launch.process} runs sweep {name} already; wait for it, or stop it with "
        f"python -m sddlskd.sweeps cancel {folder}"
    )


def local_launch(folder: Path) -> LocalLaunch | None:
    """Return the launch that trains jobs of the sweep in `folder` on its own machine.

    Return None if there is none, or if its files cannot be read. Raise Damaged if the file that
    describes the launch is damaged.
    """
    if not is_running(folder):
        return None
    content = record.read_json(folder / LAUNCH)
    return LocalLaunch(**content) if content else None


def is_running(folder: Path) -> bool:
    """Return whether a launch of the sweep in `folder` runs jobs, or waits for a cluster's jobs.

    The end of the launch's process ends this state, however it ends. Return False for a sweep of
    another user, whose files cannot be locked.
    """
    path = folder / RUNNING_LOCK
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except PermissionError:
        return False
    lock.release()
    return False


def write_plan(folder: Path, name: str, jobs: Sequence[Config]) -> Path:
    """Write plan.json, the list of a sweep's jobs that MLflow receives.

    The file has the settings that all jobs share, and for each job its run directory, hashes of its
    settings, a command that runs the job, and those of its settings that not all jobs share. Jobs
    of earlier calls stay in the file.

    Args:
        folder: folder of the sweep; it must exist.
        name: name of the sweep.
        jobs: jobs to list, at least one.

    Returns:
        The path of plan.json.

    Raises:
        record.Damaged: If there is a plan.json that is not a JSON object, or that lists no jobs.
        OSError: If the file cannot be written.
    """
    path = folder / PLAN
    with FileLock(folder / LOCK):
        command = command_to_continue(jobs[0].home)
        content = {"name": name, "command": command, **_plan_of(path, jobs)}
        record.write_text(path, json.dumps(content, indent=1))
    return path


def _plan_of(path: Path, jobs: Sequence[Config]) -> dict[str, Any]:
    """Return "common" and "jobs" of plan.json, for the jobs in the file `path` and for `jobs`."""
    params: dict[str, dict[str, str]] = {}
    hashes: dict[str, tuple[str, str]] = {}
    for job in jobs:
        params[job.run_dir] = {key: str(value) for key, value in cfg.flatten(job).items()}
        hashes[job.run_dir] = (cfg.config_hash(job), cfg.settings_hash(job))
    # An earlier launch, which may have had other jobs, may have written the file.
    if path.exists():
        earlier = _read_plan(path)
        for listed in earlier["jobs"]:
            params.setdefault(listed["run_dir"], earlier["common"] | listed["params"])
            hashes.setdefault(listed["run_dir"], (listed["config_hash"], listed["settings_hash"]))
    common = next(iter(params.values()))
    for own in params.values():
        common = {key: value for key, value in common.items() if own.get(key) == value}
    entries = []
    for run_dir, own in params.items():
        config_hash, settings_hash = hashes[run_dir]
        entries.append(
            {
                "config_hash": config_hash,
                "settings_hash": settings_hash,
                "run_dir": run_dir,
                "command": f"python -m sddlskd.worker {shlex.quote(run_dir)}",
                "params": {key: value for key, value in own.items() if key not in common},
            }
        )
    return {"common": common, "jobs": entries}


def planned_jobs(folder: Path) -> set[str]:
    """Return the run directory of each job in the plan.json of a sweep's `folder`.

    The paths are absolute. The result is empty if the file is missing. Raise record.Damaged if the
    file is not a JSON object, or if it lists no jobs.
    """
    path = folder / PLAN
    if not path.exists():
        return set()
    return {job["run_dir"] for job in _read_plan(path)["jobs"]}


def planned_epochs(folder: Path) -> set[int]:
    """Return the numbers of epochs of the jobs in the plan.json of a sweep's `folder`.

    The result is empty if the file is missing. Raise record.Damaged if the file is not a JSON
    object, or if it lists no jobs.
    """
    path = folder / PLAN
    if not path.exists():
        return set()
    plan = _read_plan(path)
    return {int((plan["common"] | job["params"])["trainer.epochs"]) for job in plan["jobs"]}


def _read_plan(path: Path) -> dict[str, Any]:
    """Return the content of plan.json, or raise Damaged if it is not that of a plan."""
    plan = record.read_json(path)
    if not {"common", "jobs"} <= plan.keys():
        raise record.Damaged(f"{path} is damaged (it lists no jobs); delete it")
    return plan
