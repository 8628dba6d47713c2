"""The run directory: a run's frozen configuration, its metrics and its result.

The files are config.yaml (the configuration), code.json and code.diff (the state of the code),
metrics.jsonl (one line per epoch), result.json (status and scores), train.log, the checkpoints,
requeues.json (how often SLURM put the run back into its queue), rivals.json (the runs that halving
compares with this run) and mlflow.json (what MLflow has). The run directory is the authoritative
record; MLflow holds a copy.
"""

import json
import logging
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zlib import crc32

from filelock import FileLock, Timeout

from sddlskd import config as cfg
from sddlskd.config import Config
from sddlskd.config.sources import versions_in_use, versions_of
from sddlskd.config.targets import foreign_targets
from sddlskd.files.atomic import append, rotate, write_atomically

__all__ = [
    "FAILED",
    "FINISHED",
    "KILLED",
    "ONLY_IN_FILE",
    "PRUNED",
    "RUNNING",
    "Damaged",
    "InUse",
    "Onlooker",
    "Record",
    "check_has_best",
    "read_result",
]

RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"
PRUNED = "PRUNED"  # dropped by halving: other runs of its group were better
RIVALS = "rivals.json"
# Attribute of a log entry that goes to train.log alone, and not to the terminal
ONLY_IN_FILE = {"only_in_file": True}


def write_text(path: Path, text: str) -> None:
    """Write text to a file as UTF-8, completely or not at all; an existing file is replaced.

    The folder of the file is made if it is missing. Raise OSError if the file cannot be written,
    for example because the disk is full. An existing file then stays as it was.
    """
    content = text.encode()
    with write_atomically(path, len(content)) as file:
        file.write(content)


class LogFile(logging.FileHandler):
    """Logging handler for a run's train.log that silently drops a line that cannot be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Do nothing with `record`, a line that could not be written; logging calls this method."""

    def close(self) -> None:
        """Close the file, and ignore an error of the final flush, such as a full disk."""
        with suppress(OSError):
            super().close()


class InUse(ValueError):
    """Error for a run directory that another process has open for writing."""


class Damaged(ValueError):
    """Error for a damaged file of a run or a sweep; the message names the file."""


def check_has_best(folder: Path) -> None:
    """Raise ValueError if a folder is no run directory with the checkpoint of a best epoch."""
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{folder} is not a run directory: it has no config.yaml; "
            "runs are in <home>/runs/<dataset>/"
        )
    if not (folder / "best.ckpt").is_file():
        status = read_result(folder).get("status", "not started")
        cure = "wait until the run has finished an epoch"
        if status in (FAILED, KILLED, PRUNED):
            cure = "no epoch was finished: run the same command again"
        raise ValueError(f"{folder} has no best.ckpt ({status}); {cure}")


def read_result(folder: Path) -> dict[str, Any]:
    """Return the content of the result.json in the run directory `folder`.

    The entry "status" is "RUNNING", "FINISHED", "FAILED", "KILLED" or "PRUNED". If the file is
    missing, the run has not started, and the result is {}. Raise Damaged if the file is not a JSON
    object or has another status; the message says how to repair the run.
    """
    try:
        content = read_json(folder / "result.json")
        if content and content.get("status") not in (RUNNING, FINISHED, FAILED, KILLED, PRUNED):
            raise Damaged(f"{folder / 'result.json'} is damaged (status {content.get('status')!r})")
    except Damaged as error:
        raise Damaged(f"{error}; delete it: the run then goes on from its checkpoint") from None
    return content


def read_json(path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, or {} if it is missing.

    Raise Damaged, with the path, if the file is not a JSON object.
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
    """Write to a run's requeues.json how often SLURM has put a SLURM job back into its queue.

    The file also keeps the numbers of the run's other SLURM jobs.

    Args:
        folder: run directory.
        job: id of the SLURM job, as text.
        times: number of requeues of this SLURM job; it replaces an earlier number.

    Raises:
        Damaged: If requeues.json is not a JSON object.
        OSError: If the file cannot be written.
    """
    write_text(folder / "requeues.json", json.dumps({**_requeues(folder), job: times}))


def _requeues(folder: Path) -> dict[str, int]:
    return read_json(folder / "requeues.json")


def queue_again(folder: Path) -> None:
    """Change the status of a FAILED or PRUNED run to KILLED, before it runs again.

    `folder` is the run directory. The new reason in result.json quotes the old reason. Do nothing
    if the run has another status or has not started. Raise Damaged if result.json is damaged, and
    OSError if the file cannot be written.
    """
    result = read_result(folder)
    if result.get("status") in (FAILED, PRUNED):
        result |= {"status": KILLED, "reason": f"queued again after: {result['reason']}"}
        write_text(folder / "result.json", json.dumps(result, indent=1))


def note_rivals(folder: Path, rivals: Sequence[Path]) -> None:
    """Write into rivals.json the list of the runs that halving compares with each other.

    Args:
        folder: run directory of one of these runs, which gets the file.
        rivals: run directories of all runs that are compared, this run included.

    Raises:
        OSError: If the file cannot be written.
    """
    write_text(folder / RIVALS, json.dumps({"run_dirs": [str(rival) for rival in rivals]}))


def read_rivals(folder: Path) -> list[Path]:
    """Return the list that `note_rivals` wrote: run directories of runs that halving compares.

    `folder` is the run directory of one of these runs. Return [] if the folder has no rivals.json.
    Raise Damaged if that file is not a JSON object.
    """
    return [Path(run_dir) for run_dir in read_json(folder / RIVALS).get("run_dirs", [])]


def freeze(config: Config, text: str = "") -> Path:
    """Write a job's configuration and the state of the code into its run directory.

    What is written depends on the directory:

    - A directory without a config.yaml gets config.yaml, code.json and, if the code has uncommitted
      changes, code.diff.
    - In a directory with a config.yaml of the same job, only config.yaml is replaced, because
      settings that do not identify a job (tracking, device, folders) may have changed. If a process
      has this directory open for writing, no file is written.

    Args:
        config: configuration of the job; `config.run_dir` is the directory, made if missing.
        text: `config.to_yaml(config)`, if the caller has it.

    Returns:
        The run directory.

    Raises:
        ValueError: If the directory holds another job, or if its config.yaml is damaged.
        OSError: If the files cannot be written.
    """
    folder = Path(config.run_dir)
    text = text or cfg.to_yaml(config)
    if holds(config, text):
        if (folder / "config.yaml").read_bytes() != text.encode() and abandoned(folder):
            write_text(folder / "config.yaml", text)
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_code(folder, own_code_of(config))
    # Last, because the presence of config.yaml says that the record is complete.
    write_text(folder / "config.yaml", text)
    return folder


def _write_code(folder: Path, own_code: Mapping[str, str]) -> None:
    """Write code.json and, if the code of this package has uncommitted changes, code.diff."""
    code = code_state()
    kept: dict[str, Any] = {k: v for k, v in code.items() if k != "diff"}
    if own_code:
        kept["own_code"] = own_code
    write_text(folder / "code.json", json.dumps(kept, indent=1))
    (folder / "code.diff").unlink(missing_ok=True)
    if code["diff"]:
        write_text(folder / "code.diff", code["diff"])


def has_begun(folder: Path) -> bool:
    """Return whether the run of a run directory has saved a part of its training."""
    return (folder / "last.ckpt").exists() or bool(read_rows(folder))


def note_own_code(folder: Path, own_code: Mapping[str, str]) -> None:
    """Write into a record the versions of the user's own code with which its run is to begin.

    Call this function only for a run that has not begun (`has_begun`). Nothing is written if the
    record has these versions already.

    Args:
        folder: run directory with a code.json.
        own_code: the versions, as `own_code_of` returns them.

    Raises:
        Damaged: If code.json is damaged.
        OSError: If a file cannot be written.
    """
    if read_json(folder / "code.json").get("own_code", {}) != own_code:
        _write_code(folder, own_code)


def holds(config: Config, text: str = "") -> bool:
    """Return whether the run directory of a job (`config.run_dir`) has a config.yaml of this job.

    The settings that do not identify a job (tracking, device, folders) may differ. Return False if
    there is no config.yaml. Raise ValueError if config.yaml is damaged or is that of another job;
    the message names up to three settings that differ. `text` is the YAML text of `config` (from
    `to_yaml`) if the caller has it, which saves time, else "".
    """
    path = Path(config.run_dir, "config.yaml")
    if not path.exists():
        return False
    if path.read_bytes() == (text or cfg.to_yaml(config)).encode():
        return True  # reading the configuration takes ten times as long
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


def own_code_of(config: Config) -> dict[str, str]:
    """Return {module: sha256 of its source file now} for the outside code that a job names.

    Outside code is, for example, a loss of the user (`allow_foreign_targets`). The modules that it
    imports count, unless they are installed packages; see `sources.versions_of`.
    """
    return versions_of(_targets_of(config))


def own_code_in_use(config: Config) -> dict[str, str]:
    """Return `own_code_of`, but for a module that this process imported the imported version."""
    return versions_in_use(_targets_of(config))


def _targets_of(config: Config) -> list[str]:
    return foreign_targets(asdict(config)) if config.allow_foreign_targets else []


def code_versions(own_code: Mapping[str, str]) -> str:
    """Return a text of modules with the first digits of their hashes: "my_losses:1f0c2a9b".

    `own_code` is as `own_code_of` returns it. Modules are separated by blanks.
    """
    return " ".join(f"{module}:{sha[:8]}" for module, sha in own_code.items())


def changed_code(config: Config, now: Mapping[str, str] | None = None) -> list[str]:
    """Return the modules of outside code that have changed since a job's record was made.

    A module is compared only if code.json has its hash, and if its source file is found now.

    Args:
        config: configuration of the job, whose record is in `config.run_dir`.
        now: the versions to compare with the record; None for those of the files now
            (`own_code_of`).

    Raises:
        Damaged: If code.json is damaged.
    """
    if now is None:
        now = own_code_of(config)
    if not now:
        return []
    then = read_json(Path(config.run_dir, "code.json")).get("own_code", {})
    return [module for module in now if then.get(module, now[module]) != now[module]]


@cache
def code_state() -> dict[str, str]:
    """Return the version, the git commit and the uncommitted changes of this package.

    The keys are "version", "git_sha" and "diff" (the text of `git diff HEAD` for the whole
    checkout). The last two are "" if the package is not part of a git checkout, or if git is not
    installed. The state is read once per process.
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
    """Return one line with the versions of sddlskd, torch and Python, the system and the CPU type.

    An example is "sddlskd 0.1.0, torch 2.9.1, Python 3.12.3, Linux x86_64".
    """
    names = ", ".join(f"{name} {version(name)}" for name in ("sddlskd", "torch"))
    return f"{names}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"


# Entries of result.json that `Record.write_outcome` keeps, beside those of the teacher.
KEPT = ("data", "environment", "group_size", "parameters", "flops")


class Record:
    """Run directory that this process has open for writing; no other process can open it meanwhile.

    Other processes can still read the files. Creating an instance writes the configuration into
    the directory (`freeze`), and repairs the files that a killed process left unfinished. Call
    `close` at the end.

    Args:
        config: configuration of the job; `config.run_dir` is the directory.

    Attributes:
        folder: run directory.
        config_hash: hash that identifies the job.
        log: logger whose lines go to train.log as well.

    Raises:
        InUse: If another process keeps the directory open for 2 seconds; the message names the
            process if it is known.
        ValueError: If the directory holds another job, or if its config.yaml is damaged.
        OSError: If the files cannot be written.
    """

    def __init__(self, config: Config) -> None:
        text = cfg.to_yaml(config)
        self.folder = freeze(config, text)
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
        try:
            self._open(config, text, holder)
        except BaseException:
            self._lock.release()
            raise

    def _open(self, config: Config, text: str, holder: Path) -> None:
        """Check and repair the directory, and open train.log; the lock is held."""
        with suppress(OSError):  # the disk may be full
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}")
        # Checked again: no other process can freeze another job here from now on.
        holds(config, text)
        # Left by a process that was killed during a write.
        for left_over in self.folder.glob(".*.ckpt*.tmp"):
            left_over.unlink()
        # Left by a process that was killed right after a write.
        for whole in self.folder.glob("*.ckpt.new"):
            rotate(whole)
        self._mend_torn_line()
        self._log_file = LogFile(self.folder / "train.log")
        self._log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.log = logging.getLogger(f"sddlskd.run.{str(self.folder).replace('.', '_')}")
        self.log.setLevel(logging.INFO)
        self.log.addHandler(self._log_file)

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
        """Return the metrics of every finished epoch in metrics.jsonl, one dict per epoch.

        The keys are those that `append` was given, such as "epoch" and "val/top1". Raise Damaged if
        a line of the file cannot be read.
        """
        return read_rows(self.folder)

    def append(self, row: Mapping[str, Any]) -> None:
        """Append the metrics of an epoch to metrics.jsonl.

        `row` holds numbers by name, with the number of the epoch (an int) under "epoch". Do nothing
        if the last row of the file is of the same or of a later epoch, because a resumed run can
        repeat an epoch. Raise OSError if the row cannot be written, and Damaged if the file is
        damaged.
        """
        rows = self.rows()
        if rows and rows[-1]["epoch"] >= row["epoch"]:
            return
        append(self.folder / "metrics.jsonl", json.dumps(row).encode() + b"\n")

    def note_run_id(self) -> None:
        """Update the entry "run_id" of result.json, the id of the MLflow run that copies this run.

        The MLflow run may have been created after result.json was written. Do nothing if there is
        no result.json, and ignore a file that cannot be written. Raise Damaged if result.json is
        damaged.
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
            status: "RUNNING", "FINISHED", "FAILED", "KILLED" or "PRUNED" (dropped by
                halving).
            reason: why the run ended, in one line; "" if there is nothing to explain.
            **values: more entries of result.json, such as best_top1 (%) or seconds.

        Returns:
            The content: the arguments and the entries "run_id" (of the MLflow run; None without
            one), "config_hash", "requeues" (how often SLURM requeued the run) and "time" (Unix time
            in seconds).

        Raises:
            OSError: If the file cannot be written. With the status FAILED the error is only logged.
            Damaged: If requeues.json is damaged.
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

        The entries come from two files:

        - From metrics.jsonl: the top-1 (%) on the validation images of the best and of the last
          epoch, the number of epochs and the seconds; for images with several labels also the mAP
          (%) of these two epochs. The best epoch has the highest mAP if there is one, else the
          highest top-1. Without epochs, the top-1 values are None. Epochs of a first stage, which
          some methods have (numbers 0 and below), do not count.
        - From the earlier result.json: the entries about the data, the teacher, the environment,
          the network's size and the number of runs that were trained together.

        Args:
            status: "FAILED" or "KILLED".
            reason: why the run ended, in one line.

        Returns:
            The content of the new result.json.

        Raises:
            Damaged: If metrics.jsonl, result.json or requeues.json is damaged.
            OSError: If the file cannot be written. With the status FAILED the error is only logged.
        """
        # The epochs of a first stage count neither as epochs nor for the best score.
        rows = [row for row in self.rows() if row["epoch"] > 0]
        earlier = read_result(self.folder)
        best = max(rows, key=lambda row: row.get("val/mAP", row["val/top1"]), default=None)
        several = {}
        if best and "val/mAP" in best:  # images have several labels
            several = {"best_mAP": best["val/mAP"], "last_mAP": rows[-1]["val/mAP"]}
        return self.result(
            status,
            reason,
            best_top1=best and best["val/top1"],
            best_epoch=best and best["epoch"],
            last_top1=rows[-1]["val/top1"] if rows else None,
            epochs=len(rows),
            seconds=round(sum(row["time/epoch_s"] for row in rows), 3),
            **several,
            **{k: v for k, v in earlier.items() if k.startswith("teacher_") or k in KEPT},
        )


class Onlooker:
    """Substitute for `Record` in the processes of a distributed run other than rank 0.

    Only rank 0 writes to the run directory. An onlooker writes nothing and locks nothing.

    Args:
        config: configuration of the job.

    Attributes:
        folder: run directory.
        log: logger that is silent.
    """

    def __init__(self, config: Config) -> None:
        self.folder = Path(config.run_dir)
        self.log = logging.getLogger("sddlskd.onlooker")
        self.log.disabled = True

    def append(self, row: Mapping[str, Any]) -> None:
        """Do nothing with `row`, the metrics of an epoch: rank 0 writes them."""

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
    """Return whether no process has the run directory `folder` open to write, not even this one."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    lock.release()
    return True


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of every finished epoch of a run, one dict per line of metrics.jsonl.

    `folder` is the run directory. A dict holds numbers by name, such as "epoch" and "val/top1".
    Return [] if the file is missing. Ignore a last line without a line break, which a crash leaves.
    Raise Damaged, with the number of the line, if any other line is not a JSON object of numbers
    with an integer "epoch".
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
    """Return the content of mlflow.json, which says what MLflow has of a run or of a sweep.

    For a run the entries are "key" (random text by which the run is found in MLflow), "uri"
    (address of MLflow), "run_id" (id of the MLflow run), and "rows" and "status" (the number of
    epochs and the status that MLflow has). The last three are missing until MLflow has the run. For
    a sweep the entries include "uri", "run_id" (id of the MLflow run that stands for the sweep),
    "sweep" (its name) and "status" (that MLflow should have).

    `folder` is the directory of the run or of the sweep. Return {} if there is no file. Raise
    Damaged if the file is not a JSON object or does not match its checksum.
    """
    content = read_json(folder / "mlflow.json")
    if content.pop("checksum", _checksum(content)) != _checksum(content):
        raise Damaged(f"{folder / 'mlflow.json'} is damaged (its checksum differs)")
    return content


def write_mirror(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `content` and a checksum to mlflow.json in `folder`, the directory of a run or a sweep.

    `content` holds the entries that `read_mirror` returns. An existing file is replaced.
    Raise OSError if the file cannot be written; an existing file then stays as it was.
    """
    write_text(folder / "mlflow.json", json.dumps({**content, "checksum": _checksum(content)}))


def _checksum(content: Mapping[str, Any]) -> int:
    return crc32(
        cfg.canonical({key: value for key, value in content.items() if key != "checksum"}).encode()
    )
