"""Write the outcomes of runs whose processes ended without writing them."""

import math
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch

from sddlskd import config as cfg
from sddlskd import record, tracking
from sddlskd.config import Config
from sddlskd.record import FAILED, KILLED, RUNNING, Record
from sddlskd.training.ranks import Cause

__all__ = ["mark_failed", "may_retry"]


def may_retry(jobs: Sequence[Config], error: Exception) -> bool:
    """Return whether the caller may train the jobs in smaller groups after this error.

    That is the case after out-of-memory. Halving compares the runs of a group, so its groups stay
    as they are.
    """
    out_of_memory = isinstance(error, torch.OutOfMemoryError)
    return out_of_memory and len(jobs) > 1 and not jobs[0].sweep.halving


def mark_failed(jobs: Sequence[Config], cause: Cause, begun: float, since: float) -> None:
    """Mark as FAILED the jobs that have a run directory but no outcome of this call of `fit` yet.

    If one of the runs caused the failure, only that run is FAILED, and the other runs of the group
    are KILLED. If a device failed, all runs are KILLED, because another device may train them. The
    jobs that train the teachers are included if `since` is finite.

    Args:
        jobs: the jobs of the group that failed.
        cause: why the group failed.
        begun: Unix time in seconds at which the call of `fit` began. A job that was KILLED before
            has no outcome of this call.
        since: Unix time in seconds; a job whose record says RUNNING since then or later has no
            outcome. Infinity to leave RUNNING jobs alone.
    """
    frozen = [job for job in jobs if Path(job.run_dir, "config.yaml").exists()]
    # The ranks may have been training the teacher when they failed.
    if since < math.inf:
        teacher_jobs = map(cfg.teacher_job, cfg.each_teacher(jobs[0]))
        frozen = [job for job in teacher_jobs if Path(job.run_dir, "config.yaml").exists()] + frozen
    culprit = ""
    if cause.folder in {job.run_dir for job in jobs}:
        culprit = cause.folder
    marked = []
    for job in frozen:
        # Ignore a run directory in use or a full disk: the error that led here counts.
        with suppress(ValueError, OSError):
            is_open_ended = _is_open_ended(record.read_result(Path(job.run_dir)), begun, since)
            if is_open_ended and _write_failure(job, cause, begun, since, culprit):
                marked.append(job)
    if any(map(tracking.is_copied, marked)):
        with closing(tracking.Copies(marked)) as mirror:
            for job in marked:
                mirror.update(Path(job.run_dir))


def _is_open_ended(result: dict[str, Any], begun: float, since: float) -> bool:
    """Return whether a result.json tells no outcome of this call of `fit`.

    `begun` and `since` are arguments of `mark_failed`.
    """
    if not result:
        return True
    if result["status"] == KILLED:
        return bool(result["time"] < begun)
    return bool(result["status"] == RUNNING and result["time"] >= since)


def _write_failure(job: Config, cause: Cause, begun: float, since: float, culprit: str) -> bool:
    """Write the outcome of a job whose group failed, unless another process has written one.

    Args:
        job: a job with a run directory.
        cause: why the group failed.
        begun: the argument of `mark_failed`.
        since: the argument of `mark_failed`.
        culprit: run directory of the run that caused the failure; "" if no run of the group did.

    Returns:
        Whether the outcome was written.

    Raises:
        InUse: If another process has the run directory open.
        ValueError, OSError: If the record cannot be read or written.
    """
    with closing(Record(job)) as opened:
        earlier = record.read_result(Path(job.run_dir))
        # Checked again: only now does the lock keep other processes from starting the job.
        if not _is_open_ended(earlier, begun, since):
            return False
        if culprit and culprit != job.run_dir:
            name = Path(culprit).name
            opened.write_outcome(KILLED, f"{name} failed in the same group: {cause.error}")
            return True
        if earlier.get("status") == RUNNING:
            opened.log.propagate = False  # the terminal has shown the error already
            opened.log.error("rank %d raised\n%s", cause.rank, cause.trace)
        opened.write_outcome(KILLED if cause.lost else FAILED, cause.error)
        return True
