"""The run directory: a run's frozen configuration, its metrics and its result. It is the record; MLflow mirrors it."""

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
from sddlskd.files import append, rotate, write_atomically

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
    """Write a whole file, or leave it as it was."""
    content = text.encode()
    with write_atomically(path, len(content)) as file:
        file.write(content)


class LogFile(logging.FileHandler):
    """train.log: where it cannot be written, the run goes on without what it would have said."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Called by logging, which would print a traceback for every line."""

    def close(self) -> None:
        """Called at the end, when what a full disk did not take would be tried again."""
        with suppress(OSError):
            super().close()


class InUse(ValueError):
    """Another process has the run directory open."""


class Damaged(ValueError):
    """A file of a record that a disk or a person spoilt: every one is written whole."""


def read_result(folder: Path) -> dict[str, Any]:
    """The content of result.json; {} where the run has not started."""
    try:
        content = _read_json(folder / "result.json")
        if content and content.get("status") not in (RUNNING, FINISHED, FAILED, KILLED):
            raise Damaged(f"{folder / 'result.json'} is damaged (status {content.get('status')!r})")
    except Damaged as error:
        raise Damaged(f"{error}; delete it: the run then goes on from its checkpoint") from None
    return content


def _read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file. Raises Damaged."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise Damaged(f"{path} is damaged ({error})") from None
    return content


def note_requeues(folder: Path, job: str, times: int) -> None:
    """Note how often SLURM put this job back into its queue so far."""
    write_text(folder / "requeues.json", json.dumps({**_requeues(folder), job: times}))


def _requeues(folder: Path) -> dict[str, int]:
    path = folder / "requeues.json"
    return json.loads(path.read_text()) if path.exists() else {}


def queue_again(folder: Path) -> None:
    """Let a failed run count as interrupted: its old outcome must not be taken for that of the run to come."""
    result = read_result(folder)
    if result.get("status") == FAILED:
        result |= {"status": KILLED, "reason": f"queued again after: {result['reason']}"}
        write_text(folder / "result.json", json.dumps(result, indent=1))


def freeze(config: Config) -> Path:
    """Write the resolved configuration and the code's state into the run directory; the job reads them from there.

    A directory that holds this job already takes over where and how it runs this time (tracking, device, folders), and
    keeps the state of the code that began it. Raises ValueError where it holds another job.
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
    write_text(
        folder / "config.yaml", cfg.to_yaml(config)
    )  # last: its presence says that the record is whole
    return folder


def holds(config: Config) -> bool:
    """Whether the job's run directory was frozen for it already; ValueError where it holds another job."""
    path = Path(config.run_dir, "config.yaml")
    if not path.exists():
        return False
    earlier = cfg.load(path)
    if cfg.config_hash(earlier) != cfg.config_hash(config):
        old, new = cfg.flatten(earlier), cfg.flatten(config)
        differing = [
            f"{k}={old[k]} there, {new[k]} here"
            for k in new
            if k in cfg.identity_keys() and old[k] != new[k]
        ]
        raise ValueError(
            f"run_dir={path.parent} holds another job ({'; '.join(differing[:3])}); choose another run_dir"
        )
    return True


@cache
def code_state() -> dict[str, str]:
    """Version, git revision and uncommitted changes of this package's checkout ("" where it is not in one)."""
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

    if not git(
        "ls-files", "--", __file__
    ):  # installed into a venv inside some other project's checkout
        return {"version": version("sddlskd"), "git_sha": "", "diff": ""}
    return {
        "version": version("sddlskd"),
        "git_sha": git("rev-parse", "HEAD").strip(),
        "diff": git("diff", "HEAD"),
    }


def versions() -> str:
    """What a run's numbers may depend on, in a line."""
    names = ", ".join(f"{name} {version(name)}" for name in ("sddlskd", "torch"))
    return f"{names}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"


class Record:
    """One run's directory, opened for writing by one process alone.

    Raises ValueError naming the process that has it open.
    """

    def __init__(self, config: Config) -> None:
        self.folder = freeze(config)
        self.config_hash = cfg.config_hash(config)
        self._lock = FileLock(self.folder / ".lock")
        holder = self.folder / ".holder"
        try:
            self._lock.acquire(
                timeout=2
            )  # seconds: `tracking.sync` takes it for a moment, to see whether a run lives
        except Timeout:
            who = holder.read_text() if holder.exists() else "another process"
            raise InUse(
                f"run_dir={self.folder} is in use by {who}; wait for it, or choose another run_dir"
            ) from None
        with suppress(OSError):  # a full disk
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        holds(config)  # again, now that nobody else can freeze another job here
        for left_over in self.folder.glob(
            ".*.ckpt*.tmp"
        ):  # of a process that was killed inside a write
            left_over.unlink()
        for whole in self.folder.glob("*.ckpt.new"):  # of one that was killed right after a write
            rotate(whole)
        self._log_file = LogFile(self.folder / "train.log")
        self._log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.log = logging.getLogger(f"sddlskd.run.{str(self.folder).replace('.', '_')}")
        self.log.setLevel(logging.INFO)
        self.log.addHandler(self._log_file)
        self._mend_torn_line()

    def close(self) -> None:
        self.log.removeHandler(self._log_file)
        self._log_file.close()
        self._lock.release()

    def _mend_torn_line(self) -> None:
        path = self.folder / "metrics.jsonl"
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:  # the machine went down inside a write
                with write_atomically(path) as file:
                    file.write(whole)

    def rows(self) -> list[dict[str, Any]]:
        """The metrics of every finished epoch."""
        return read_rows(self.folder)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add an epoch's metrics, once: an epoch that is there already (a resumed run repeats it) is left alone."""
        rows = self.rows()
        if rows and rows[-1]["epoch"] >= row["epoch"]:
            return
        append(self.folder / "metrics.jsonl", json.dumps(row).encode() + b"\n")

    def note_run_id(self) -> None:
        """Add to result.json the id of the run's mirror in MLflow, which may have come after the outcome."""
        content, run_id = read_result(self.folder), self._run_id()
        if content and content["run_id"] != run_id:
            with suppress(OSError):  # a full disk, which ended the run and was named then
                write_text(
                    self.folder / "result.json", json.dumps({**content, "run_id": run_id}, indent=1)
                )

    def _run_id(self) -> str | None:
        with suppress(Damaged):  # `tracking.sync` mends it
            return read_mirror(self.folder).get("run_id")
        return None

    def result(self, status: str, reason: str = "", **values: Any) -> dict[str, Any]:
        """Write result.json."""
        content = {
            "run_id": self._run_id(),
            "status": status,
            "reason": reason,
            "config_hash": self.config_hash,
            **values,
            "requeues": sum(
                _requeues(self.folder).values()
            ),  # by SLURM, over the whole life of the run
            "time": time.time(),
        }
        try:
            write_text(self.folder / "result.json", json.dumps(content, indent=1))
        except OSError as error:
            if status != FAILED:
                raise
            self.log.error(
                "%s", error
            )  # what made it fail was said before: the full disk, most likely
        return content

    def settle(self, status: str, reason: str) -> dict[str, Any]:
        """Write result.json for a run that is not there to report: its rows say how far it came, and who taught it
        and where stays as it was."""
        rows, earlier = self.rows(), read_result(self.folder)
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
                if k.startswith("teacher_") or k in ("environment", "group_size")
            },
        )


class Onlooker:
    """What a process has in place of the record that another process keeps: it reads the folder and writes nothing."""

    def __init__(self, config: Config) -> None:
        self.folder = Path(config.run_dir)
        self.log = logging.getLogger("sddlskd.onlooker")
        self.log.disabled = True

    def append(self, row: Mapping[str, Any]) -> None:
        pass

    def result(self, status: str, reason: str = "", **values: Any) -> dict[str, Any]:
        return {}

    def settle(self, status: str, reason: str) -> dict[str, Any]:
        return {}


def abandoned(folder: Path) -> bool:
    """Whether no process has this run open."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Every whole line of metrics.jsonl."""
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
                raise ValueError("no row of metrics")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Damaged(
                f"{folder / 'metrics.jsonl'}, line {number} is damaged ({error!r:.80}); mend that line, or delete "
                f"{folder} to start this run anew"
            ) from None
        rows.append(row)
    return rows


def read_mirror(folder: Path) -> dict[str, Any]:
    """What is known of the run's mirror in MLflow: {key, uri, run_id, rows, status}. Raises Damaged."""
    content = _read_json(folder / "mlflow.json")
    if content.pop("checksum", _checksum(content)) != _checksum(content):
        raise Damaged(f"{folder / 'mlflow.json'} is damaged (its checksum differs)")
    return content


def write_mirror(folder: Path, content: Mapping[str, Any]) -> None:
    """Write mlflow.json."""
    write_text(folder / "mlflow.json", json.dumps({**content, "checksum": _checksum(content)}))


def _checksum(content: Mapping[str, Any]) -> int:
    return crc32(
        cfg.canonical({key: value for key, value in content.items() if key != "checksum"}).encode()
    )
