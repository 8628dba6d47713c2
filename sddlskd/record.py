"""The run directory: a run's frozen configuration, its metrics and its result.

The run directory is the authoritative record; MLflow mirrors it.
"""

import json
import logging
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zlib import crc32

from filelock import FileLock, Timeout

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.files.atomic import append, rotate, write_atomically

__all__ = [
    "FAILED",
    "FINISHED",
    "KILLED",
    "RUNNING",
    "Damaged",
    "InUse",
    "Onlooker",
    "Record",
    "read_result",
]

RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: if the write fails, the old file stays as it was."""
    content = text.encode()
    with write_atomically(path, len(content)) as file:
        file.write(content)


class LogFile(logging.FileHandler):
    """The file train.log of a run. If a line cannot be written, the run continues without it."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore that a line could not be written; logging would print a traceback for each one."""

    def close(self) -> None:
        """Close the file, and ignore an error of the final flush, such as a full disk."""
        with suppress(OSError):
            super().close()


class InUse(ValueError):
    """Raised if another process has the run directory open."""


class Damaged(ValueError):
    """Raised if a file of a run directory is damaged.

    All these files are written as a whole, so only a disk or a person can have damaged the file.
    """


def read_result(folder: Path) -> dict[str, Any]:
    """Return the content of result.json, or {} if the run has not started.

    Raises Damaged, with a way to repair the run.
    """
    try:
        content = _read_json(folder / "result.json")
        if content and content.get("status") not in (RUNNING, FINISHED, FAILED, KILLED):
            raise Damaged(f"{folder / 'result.json'} is damaged (status {content.get('status')!r})")
    except Damaged as error:
        raise Damaged(f"{error}; delete it: the run then goes on from its checkpoint") from None
    return content


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, or {} if it is missing. Raises Damaged."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise Damaged(f"{path} is damaged ({error})") from None
    return content


def note_requeues(folder: Path, job: str, times: int) -> None:
    """Write down how often SLURM has requeued this job so far.

    Args:
        folder: The run directory.
        job: The id of the SLURM job.
        times: The number of requeues of the job.
    """
    write_text(folder / "requeues.json", json.dumps({**_requeues(folder), job: times}))


def _requeues(folder: Path) -> dict[str, int]:
    path = folder / "requeues.json"
    return json.loads(path.read_text()) if path.exists() else {}


def queue_again(folder: Path) -> None:
    """Mark a FAILED run as KILLED, that is, as interrupted.

    Otherwise its old outcome could be mistaken for the outcome of the next attempt.
    """
    result = read_result(folder)
    if result.get("status") == FAILED:
        result |= {"status": KILLED, "reason": f"queued again after: {result['reason']}"}
        write_text(folder / "result.json", json.dumps(result, indent=1))


def freeze(config: Config) -> Path:
    """Write the resolved configuration and the code's state into the run directory, and return it.

    The job reads the configuration from the run directory. If the directory already holds this job,
    its settings that do not identify the job (tracking, device, folders) are updated, unless
    another process has the run open. The state of the code that started the job stays. Raises
    ValueError if the directory holds another job.
    """
    folder = Path(config.run_dir)
    if holds(config):
        if (folder / "config.yaml").read_text() != cfg.to_yaml(config) and abandoned(folder):
            write_text(folder / "config.yaml", cfg.to_yaml(config))
        return folder
    code = code_state()
    folder.mkdir(parents=True, exist_ok=True)
    write_text(
        folder / "code.json", json.dumps({k: v for k, v in code.items() if k != "diff"}, indent=1)
    )
    if code["diff"]:
        write_text(folder / "code.diff", code["diff"])
    # Last, because the presence of config.yaml says that the record is complete.
    write_text(folder / "config.yaml", cfg.to_yaml(config))
    return folder


def holds(config: Config) -> bool:
    """Return whether the run directory already holds the frozen configuration of this job.

    Raises ValueError, with the keys that differ, if the directory holds another job.
    """
    path = Path(config.run_dir, "config.yaml")
    if not path.exists():
        return False
    earlier = cfg.load(path)
    if cfg.config_hash(earlier) != cfg.config_hash(config):
        old, new = cfg.flatten(earlier), cfg.flatten(config)
        differing = [
            f"{k}={old.get(k)} there, {new.get(k)} here"
            for k in old | new
            if (k in cfg.identity_keys() or k.startswith("features.")) and old.get(k) != new.get(k)
        ]
        raise ValueError(
            f"run_dir={path.parent} holds another job ({'; '.join(differing[:3])}); choose "
            "another run_dir"
        )
    return True


@cache
def code_state() -> dict[str, str]:
    """Return version, git revision and uncommitted changes of this package.

    The keys are "version", "git_sha" and "diff". The last two are "" if the package is not part of
    a git checkout.
    """
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False
            )
        except FileNotFoundError:
            return ""
        return done.stdout if done.returncode == 0 else ""

    # Without this check, a package in a venv inside another project's checkout gets its revision.
    if not git("ls-files", "--", __file__):
        return {"version": version("sddlskd"), "git_sha": "", "diff": ""}
    return {
        "version": version("sddlskd"),
        "git_sha": git("rev-parse", "HEAD").strip(),
        "diff": git("diff", "HEAD"),
    }


def versions() -> str:
    """Return the versions that a run's numbers may depend on, as one line."""
    names = ", ".join(f"{name} {version(name)}" for name in ("sddlskd", "torch"))
    return f"{names}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"


class Record:
    """A run directory opened for writing by one process.

    Opening it freezes the configuration (`freeze`) and repairs the files that a killed process left
    unfinished.
    Raises InUse, naming the process, if another process has the directory open. Raises ValueError
    if the directory holds another job.
    """

    def __init__(self, config: Config) -> None:
        self.folder = freeze(config)
        self.config_hash = cfg.config_hash(config)
        self._lock = FileLock(self.folder / ".lock")
        holder = self.folder / ".holder"
        try:
            # In seconds. `tracking.sync` holds the lock briefly, to see whether a run is active.
            self._lock.acquire(timeout=2)
        except Timeout:
            who = holder.read_text() if holder.exists() else "another process"
            raise InUse(
                f"run_dir={self.folder} is in use by {who}; wait for it, or choose another run_dir"
            ) from None
        with suppress(OSError):  # the disk may be full
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        holds(config)  # checked again: no other process can freeze another job here from now on
        # Left by a process that was killed during a write.
        for left_over in self.folder.glob(".*.ckpt*.tmp"):
            left_over.unlink()
        # Left by a process that was killed right after a write.
        for whole in self.folder.glob("*.ckpt.new"):
            rotate(whole)
        self._log_file = LogFile(self.folder / "train.log")
        self._log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.log = logging.getLogger(f"sddlskd.run.{str(self.folder).replace('.', '_')}")
        self.log.setLevel(logging.INFO)
        self.log.addHandler(self._log_file)
        self._mend_torn_line()

    def close(self) -> None:
        """Close train.log and release the lock."""
        self.log.removeHandler(self._log_file)
        self._log_file.close()
        self._lock.release()

    def _mend_torn_line(self) -> None:
        """Drop an incomplete last line of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:  # the machine crashed during a write
                with write_atomically(path) as file:
                    file.write(whole)

    def rows(self) -> list[dict[str, Any]]:
        """Return the metrics of every finished epoch. Raises Damaged."""
        return read_rows(self.folder)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append the metrics of an epoch to metrics.jsonl.

        An epoch that is already in the file is ignored: a resumed run can repeat an epoch.
        """
        rows = self.rows()
        if rows and rows[-1]["epoch"] >= row["epoch"]:
            return
        append(self.folder / "metrics.jsonl", json.dumps(row).encode() + b"\n")

    def note_run_id(self) -> None:
        """Write the id of the run's MLflow mirror into result.json.

        MLflow can create the mirror after the outcome has been written.
        """
        content, run_id = read_result(self.folder), self._run_id()
        if content and content["run_id"] != run_id:
            with suppress(OSError):  # a full disk: it ended the run and was reported then
                write_text(
                    self.folder / "result.json", json.dumps({**content, "run_id": run_id}, indent=1)
                )

    def _run_id(self) -> str | None:
        with suppress(Damaged):  # `tracking.sync` repairs mlflow.json
            return read_mirror(self.folder).get("run_id")
        return None

    def result(self, status: str, reason: str = "", **values: Any) -> dict[str, Any]:
        """Write result.json and return its content.

        Args:
            status: RUNNING, FINISHED, FAILED or KILLED.
            reason: Why the run ended, in one line; "" if there is nothing to explain.
            **values: Further entries, such as best_top1 (%) or seconds.

        Returns:
            The content of result.json.

        Raises:
            OSError: If the file cannot be written. For FAILED the error is only logged.
        """
        content = {
            "run_id": self._run_id(),
            "status": status,
            "reason": reason,
            "config_hash": self.config_hash,
            **values,
            # By SLURM, over all jobs of the run.
            "requeues": sum(_requeues(self.folder).values()),
            "time": time.time(),
        }
        try:
            write_text(self.folder / "result.json", json.dumps(content, indent=1))
        except OSError as error:
            if status != FAILED:
                raise
            # The run's own error was logged before; most likely it is the same full disk.
            self.log.error("%s", error)
        return content

    def write_outcome(self, status: str, reason: str) -> dict[str, Any]:
        """Write result.json on behalf of a run that cannot report itself, and return its content.

        Scores, epochs and seconds come from metrics.jsonl. The entries about the data, the teacher,
        the environment and the group size stay as they were.
        """
        # The epochs of a first stage count neither as epochs nor for the best score.
        rows = [row for row in self.rows() if row["epoch"] > 0]
        earlier = read_result(self.folder)
        best = max(rows, key=lambda row: row["val/top1"], default=None)
        return self.result(
            status,
            reason,
            best_top1=best and best["val/top1"],
            best_epoch=best and best["epoch"],
            last_top1=rows[-1]["val/top1"] if rows else None,
            epochs=len(rows),
            seconds=round(sum(row["time/epoch_s"] for row in rows), 3),
            **{
                k: v
                for k, v in earlier.items()
                if k.startswith("teacher_") or k in ("data", "environment", "group_size")
            },
        )


class Onlooker:
    """A substitute for `Record` in a process that must not write, because rank 0 keeps the record.

    It has the folder and a silent log. Its methods do nothing.
    """

    def __init__(self, config: Config) -> None:
        self.folder = Path(config.run_dir)
        self.log = logging.getLogger("sddlskd.onlooker")
        self.log.disabled = True

    def append(self, row: Mapping[str, Any]) -> None:
        """Do nothing; rank 0 appends the row."""

    def result(self, status: str, reason: str = "", **values: Any) -> dict[str, Any]:
        """Return {} and write nothing.

        Args:
            status: Ignored.
            reason: Ignored.
            **values: Ignored.
        """
        return {}

    def write_outcome(self, status: str, reason: str) -> dict[str, Any]:
        """Return {} and write nothing."""
        return {}


def abandoned(folder: Path) -> bool:
    """Return whether no process has this run directory open."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return every complete line of metrics.jsonl as a dict, or [] if the file is missing.

    Raises Damaged, naming the line.
    """
    try:
        content = (folder / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            if not isinstance(row["epoch"], int) or not all(
                isinstance(value, int | float) for value in row.values()
            ):
                raise ValueError("not a row of metrics")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Damaged(
                f"{folder / 'metrics.jsonl'}, line {number} is damaged ({error!r:.80}); repair "
                f"that line, or delete {folder} to start this run anew"
            ) from None
        rows.append(row)
    return rows


def read_mirror(folder: Path) -> dict[str, Any]:
    """Return the content of mlflow.json, the state of the run's mirror in MLflow.

    The keys are key, uri, run_id, rows and status. The dict is empty if the file is missing. Raises
    Damaged.
    """
    content = _read_json(folder / "mlflow.json")
    if content.pop("checksum", _checksum(content)) != _checksum(content):
        raise Damaged(f"{folder / 'mlflow.json'} is damaged (its checksum differs)")
    return content


def write_mirror(folder: Path, content: Mapping[str, Any]) -> None:
    """Write mlflow.json with a checksum of its content."""
    write_text(folder / "mlflow.json", json.dumps({**content, "checksum": _checksum(content)}))


def _checksum(content: Mapping[str, Any]) -> int:
    return crc32(
        cfg.canonical({key: value for key, value in content.items() if key != "checksum"}).encode()
    )
