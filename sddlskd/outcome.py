"""What became of a sweep's jobs, as their run directories tell it, and how a job that cannot tell it is settled."""

import json
import logging
from pathlib import Path
from typing import Any

from sddlskd import record, tracking
from sddlskd.config import Config
from sddlskd.record import FAILED, FINISHED, KILLED, RUNNING

__all__ = ["LOCK", "STATES", "read_manifest", "result_of", "settle", "state_of"]

log = logging.getLogger(__name__)

LOCK = ".lock"  # in the sweep's folder: two launches may add jobs to its lists at once
STATES = ("finished", "running", "queued", "interrupted", "failed", "new")


def state_of(folder: Path) -> str:
    """finished, running, interrupted, failed or new (never started)."""
    status = record.read_result(folder).get("status")
    if status == RUNNING:
        return "interrupted" if record.abandoned(folder) else "running"
    return {None: "new", FINISHED: "finished", FAILED: "failed", KILLED: "interrupted"}[status]


def result_of(job: Config) -> dict[str, Any]:
    """result.json, or what stands for it where the job has not started."""
    nothing = {
        "status": "NEW",
        "reason": "",
        "best_top1": None,
        "last_top1": None,
        "epochs": 0,
        "seconds": 0.0,
    }
    return record.read_result(Path(job.run_dir)) or nothing


def settle(job: Config, status: str, reason: str) -> None:
    """Write the outcome of a job that was killed without a word; who has it open is left alone."""
    try:
        opened = record.Record(job)
    except record.InUse as error:  # it lives on elsewhere
        log.warning("%s", error)
        return
    opened.settle(status, reason)
    opened.close()
    if job.tracking.enabled:
        mirror = tracking.Mirror()
        mirror.update(Path(job.run_dir))
        mirror.close()


def read_manifest(folder: Path) -> dict[str, Any]:
    """{name, command, folder, time, jobs}."""
    content: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return content
