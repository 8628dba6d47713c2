"""Outcomes of a sweep's jobs: read from run directories, and written for jobs that were killed."""

import logging
from pathlib import Path
from typing import Any

from sddlskd import record, tracking
from sddlskd.config import Config
from sddlskd.record import FAILED, FINISHED, KILLED, PRUNED, RUNNING
from sddlskd.tracking import runs

__all__ = ["STATES", "outcome_of", "record_outcome", "result_of", "state_of"]

log = logging.getLogger(__name__)

STATES = ("finished", "running", "queued", "killed", "failed", "pruned", "new")


def state_of(folder: Path) -> str:
    """Return the state of the run in the run directory `folder`, as one of these words.

    - "new": the run has not started, and there is no result.json.
    - "running": a process is training the run.
    - "killed": the run was stopped, or its process died.
    - "finished" or "failed": the run has ended.
    - "pruned": halving has dropped the run.

    Raise record.Damaged if result.json is damaged.
    """
    status = record.read_result(folder).get("status")
    if status == RUNNING:
        return "killed" if record.abandoned(folder) else "running"
    states = {
        None: "new",
        FINISHED: "finished",
        FAILED: "failed",
        KILLED: "killed",
        PRUNED: "pruned",
    }
    return states[status]


def result_of(job: Config) -> dict[str, Any]:
    """Return the content of a job's result.json, or a placeholder if the job has not started.

    The placeholder has the status "NEW", the reason "", None as "best_top1" and "last_top1", and 0
    as "epochs" and "seconds". Raise record.Damaged if result.json is damaged.
    """
    nothing = {
        "status": "NEW",
        "reason": "",
        "best_top1": None,
        "last_top1": None,
        "epochs": 0,
        "seconds": 0.0,
    }
    return record.read_result(Path(job.run_dir)) or nothing


def outcome_of(job: Config) -> dict[str, Any]:
    """Return what `result_of` returns, but KILLED if the process of a RUNNING job has ended.

    Raise record.Damaged if result.json is damaged.
    """
    found = result_of(job)
    if found["status"] == RUNNING:
        found = runs.result_of(Path(job.run_dir))
    return found


def record_outcome(job: Config, status: str, reason: str) -> None:
    """Write the outcome of a job whose process died without writing one.

    The outcome goes to the job's result.json and to the copies of the run, such as MLflow, that the
    job's setting `tracking` asks for. Scores and epochs come from the job's metrics.jsonl. If
    another process is training the job, only log a warning.

    Args:
        job: configuration of the job, with its run directory.
        status: "FAILED" or "KILLED", for result.json.
        reason: why the job ended, for result.json.

    Raises:
        ValueError: If the run directory holds another job, or if one of its files is damaged.
        OSError: If a file cannot be written.
    """
    try:
        opened = record.Record(job)
    except record.InUse as error:  # another process still trains the job
        log.warning("%s", error)
        return
    try:
        opened.write_outcome(status, reason)
    finally:
        opened.close()
    if tracking.is_copied(job):
        mirror = tracking.Copies([job])
        mirror.update(Path(job.run_dir))
        mirror.close()
