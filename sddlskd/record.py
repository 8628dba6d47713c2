"""The run directory: a run's frozen configuration, its metrics and its result.

The files are config.yaml (the configuration), code.json and code.diff (the state of the code),
metrics.jsonl (one line per epoch), result.json (status and scores), train.log, the checkpoints,
requeues.json (requeues by SLURM) and mlflow.json (what MLflow has). The run directory is the
authoritative record; MLflow mirrors it.
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
    """Write text to a file as UTF-8, completely or not at all.

    Raise OSError if the file cannot be written, for example because the disk is full. An old file
    then stays as it was.
    """
    content = text.encode()
    with write_atomically(path, len(content)) as file:
        file.write(content)


class LogFile(logging.FileHandler):
    """Handler that writes a run's log to train.log; a line that cannot be written is dropped."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignore a line (`record`) that could not be written; logging would print a traceback."""

    def close(self) -> None:
        """Close the file, and ignore an error of the final flush, such as a full disk."""
        with suppress(OSError):
            super().close()


class InUse(ValueError):
    """Error for a run directory that another process has open."""


class Damaged(ValueError):
    """Error for a file of a run directory that cannot be read; the message names the file.

    This package writes complete files and lines, so only a disk or a person can have damaged the
    file.
    """


def read_result(folder: Path) -> dict[str, Any]:
    """Return the content of a run's result.json.

    Return {} if the file is missing, that is, if the run has not started. Raise Damaged if the file
    is not a JSON object or has an unknown status; the message says how to repair the run.
    """
    try:
        content = _read_json(folder / "result.json")
        if content and content.get("status") not in (RUNNING, FINISHED, FAILED, KILLED):
            raise Damaged(f"{folder / 'result.json'} is damaged (status {content.get('status')!r})")
    except Damaged as error:
        raise Damaged(f"{error}; delete it: the run then goes on from its checkpoint") from None
    return content


def _read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, or {} if it is missing.

    Raise Damaged if the file is not a JSON object.
    """
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
    """Write to requeues.json how often SLURM has requeued a job of this run so far.

    Args:
        folder: run directory.
        job: id of the SLURM job. Numbers of the run's other SLURM jobs stay in the file.
        times: number of requeues of this SLURM job; it replaces an earlier number.
    """
    write_text(folder / "requeues.json", json.dumps({**_requeues(folder), job: times}))


def _requeues(folder: Path) -> dict[str, int]:
    path = folder / "requeues.json"
    return json.loads(path.read_text()) if path.exists() else {}


def queue_again(folder: Path) -> None:
    """Change the status of a run from FAILED to KILLED (interrupted) before it is tried again.

    Otherwise the old outcome could be mistaken for the outcome of the next attempt. The new reason
    quotes the old one. Do nothing if the run has another status or has not started. Raise Damaged
    if result.json is damaged.
    """
    result = read_result(folder)
    if result.get("status") == FAILED:
        result |= {"status": KILLED, "reason": f"queued again after: {result['reason']}"}
        write_text(folder / "result.json", json.dumps(result, indent=1))


def freeze(config: Config) -> Path:
    """Write a job's configuration and the state of the code into its run directory.

    From then on, the job reads its configuration from config.yaml in this directory. If the
    directory already holds the job, only the settings that do not identify a job (tracking, device,
    folders) are updated, and only while no process has the run open. The noted state of the code
    then stays that of the first start.

    Args:
        config: resolved configuration; `config.run_dir` is the directory, made if missing.

    Returns:
        The run directory.

    Raises:
        ValueError: If the directory holds another job, or if its config.yaml is damaged.
        OSError: If the files cannot be written.
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
    """Return whether the run directory of a job already holds the frozen configuration of this job.

    Return False if there is no config.yaml. Raise ValueError if config.yaml is damaged, or if it is
    that of another job; the message names up to three settings that differ.
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
    """Return the version, the git commit and the uncommitted changes of this package.

    The keys are "version", "git_sha" and "diff" (the text of `git diff HEAD`). The last two are ""
    if the package is not part of a git checkout or there is no git. The state is read once per
    process.
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

    # Without this check, a package in a venv inside the checkout of another project would get the
    # revision of that project.
    if not git("ls-files", "--", __file__):
        return {"version": version("sddlskd"), "git_sha": "", "diff": ""}
    return {
        "version": version("sddlskd"),
        "git_sha": git("rev-parse", "HEAD").strip(),
        "diff": git("diff", "HEAD"),
    }


def versions() -> str:
    """Return one line with the versions of sddlskd, torch and Python, the system and the CPU."""
    names = ", ".join(f"{name} {version(name)}" for name in ("sddlskd", "torch"))
    return f"{names}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"


class Record:
    """Run directory that this process has open for writing; no other process can open it meanwhile.

    Opening the directory writes the configuration (`freeze`) and repairs the files that a killed
    process left unfinished. Call `close` at the end.

    Args:
        config: resolved configuration of the job; `config.run_dir` is the directory.

    Attributes:
        folder: run directory.
        config_hash: hash that identifies the job.
        log: logger that also writes to train.log.

    Raises:
        InUse: If another process keeps the directory open for 2 seconds; the message names the
            process.
        ValueError: If the directory holds another job, or if its config.yaml is damaged.
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
        """Close train.log, and let other processes open the directory."""
        self.log.removeHandler(self._log_file)
        self._log_file.close()
        self._lock.release()

    def _mend_torn_line(self) -> None:
        """Drop an incomplete last line of metrics.jsonl, which a crash during a write leaves."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:  # the machine crashed during a write
                with write_atomically(path) as file:
                    file.write(whole)

    def rows(self) -> list[dict[str, Any]]:
        """Return the metrics of every finished epoch, one dict per epoch, as `read_rows` does.

        Raise Damaged if a line of metrics.jsonl cannot be read.
        """
        return read_rows(self.folder)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append the metrics of an epoch, with the epoch's number under "epoch", to metrics.jsonl.

        A row that is not of a later epoch than the last row in the file is ignored: a resumed run
        can repeat an epoch. Raise OSError if the row cannot be written, and Damaged if the file is
        damaged.
        """
        rows = self.rows()
        if rows and rows[-1]["epoch"] >= row["epoch"]:
            return
        append(self.folder / "metrics.jsonl", json.dumps(row).encode() + b"\n")

    def note_run_id(self) -> None:
        """Write the id of the run's MLflow mirror into result.json, if the id there is another one.

        MLflow can create the mirror after the outcome has been written. Do nothing if there is no
        result.json, and ignore a full disk. Raise Damaged if result.json is damaged.
        """
        content, run_id = read_result(self.folder), self._run_id()
        if content and content["run_id"] != run_id:
            with suppress(OSError):  # a full disk has ended the run and was reported
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
            reason: why the run ended, in one line; "" if there is nothing to explain.
            **values: further entries, such as best_top1 (%) or seconds.

        Returns:
            The content: the arguments, with the added entries "run_id" (of the MLflow run; None
            without one), "config_hash", "requeues" (by SLURM, over all jobs of the run) and "time"
            (Unix time in seconds).

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
            # The error that ended the run is in the log; a full disk most likely causes both.
            self.log.error("%s", error)
        return content

    def write_outcome(self, status: str, reason: str) -> dict[str, Any]:
        """Write result.json for a run that did not write its outcome itself.

        The best and last top-1 (%), the number of epochs and the seconds come from metrics.jsonl.
        The scores are None if no epoch has finished; epochs of a first stage (0 and below) do not
        count. The entries about the data, the teacher, the environment and the group size are kept
        from the earlier result.json.

        Args:
            status: FINISHED, FAILED or KILLED.
            reason: why the run ended, in one line.

        Returns:
            The content, as `result` returns it.

        Raises:
            Damaged: If metrics.jsonl or result.json is damaged.
            OSError: If the file cannot be written. For FAILED the error is only logged.
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
    """Substitute for `Record` in the processes of a run other than rank 0.

    Rank 0 keeps the record. An onlooker has the run directory (`folder`) and a silent logger
    (`log`). It writes nothing and locks nothing.

    Args:
        config: resolved configuration of the job.
    """

    def __init__(self, config: Config) -> None:
        self.folder = Path(config.run_dir)
        self.log = logging.getLogger("sddlskd.onlooker")
        self.log.disabled = True

    def append(self, row: Mapping[str, Any]) -> None:
        """Do nothing with `row`; rank 0 appends the metrics of the epoch."""

    def result(self, status: str, reason: str = "", **values: Any) -> dict[str, Any]:
        """Return {} and write nothing.

        Args:
            status: not used.
            reason: not used.
            **values: not used.
        """
        return {}

    def write_outcome(self, status: str, reason: str) -> dict[str, Any]:
        """Return {} and write nothing; `status` and `reason` are not used."""
        return {}


def abandoned(folder: Path) -> bool:
    """Return whether no process, this one included, has a run directory open for writing."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of every finished epoch of a run, one dict per line of metrics.jsonl.

    Return [] if the file is missing. An incomplete last line is left out. Raise Damaged, with the
    number of the line, if a line is not a JSON object of numbers with an integer "epoch".
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
    """Return the content of mlflow.json, which says what MLflow already has of a run or of a sweep.

    For a run the entries are "key" (random id of the record), "uri" (address of MLflow), "run_id"
    (of the MLflow run), "rows" (number of epochs delivered) and "status" (delivered). The last
    three are missing until MLflow has the run. For a sweep, "uri" and "run_id" (of the sweep's
    parent run) have the same meaning. Return {} if there is no file. Raise Damaged if the file is
    not a JSON object or does not match its checksum.

    Args:
        folder: directory of the run or of the sweep.
    """
    content = _read_json(folder / "mlflow.json")
    if content.pop("checksum", _checksum(content)) != _checksum(content):
        raise Damaged(f"{folder / 'mlflow.json'} is damaged (its checksum differs)")
    return content


def write_mirror(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `content` and its checksum to mlflow.json in the directory of a run or of a sweep.

    Raise OSError if the file cannot be written; an old file then stays as it was.
    """
    write_text(folder / "mlflow.json", json.dumps({**content, "checksum": _checksum(content)}))


def _checksum(content: Mapping[str, Any]) -> int:
    return crc32(
        cfg.canonical({key: value for key, value in content.items() if key != "checksum"}).encode()
    )
