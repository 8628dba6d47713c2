"""Train the students of a list of jobs; all students share one teacher forward pass per batch.

A job is one training run, as its configuration describes it. `fit` decides which jobs still need
training and in which processes, and writes the outcome of jobs that no process could write.
`group.py` trains the jobs. The training loop and the code that it calls never see a configuration.
"""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from sddlskd import config as cfg
from sddlskd import record
from sddlskd.config import Config
from sddlskd.record import FINISHED, PRUNED, InUse
from sddlskd.terminal.console import log_to_terminal
from sddlskd.training.begun import check_same_data, teacher_changed
from sddlskd.training.build import present_fingerprint
from sddlskd.training.devices import DeviceFailure, check_places, device_failure
from sddlskd.training.group import fit_group
from sddlskd.training.outcomes import mark_failed, may_retry
from sddlskd.training.ranks import (
    Cause,
    RankFailed,
    Ranks,
    has_launcher,
    process_group,
    spawn,
    unblock_signals,
)
from sddlskd.training.stop import Stop

__all__ = ["fit"]

log = logging.getLogger(__name__)


def fit(
    configs: Sequence[Config | DictConfig],
    *,
    sweep: str | None = None,
    stop: Stop | None = None,
    launched: bool = False,
) -> list[dict[str, Any]]:
    """Train one student per configuration, side by side on the same batches and with one teacher.

    A job is one training run, and its status is in result.json in its run directory:

    - A job that is FINISHED is not run again. A job that halving has dropped (PRUNED) is not run
      again if it still has `sweep.halving`. Any other job continues from its newest checkpoint, or
      begins if it has none.
    - If a single run raises an error, the run becomes FAILED and the other runs go on. If several
      processes share each batch, the other runs go on only after an infinite or NaN loss; after any
      other error they become KILLED.
    - If an error concerns all runs, the runs that have started become FAILED, and the error is
      raised. After out-of-memory, several runs that halving does not compare do not become FAILED,
      because the caller may train fewer of them together. After a failure of the device, the runs
      become KILLED, because another device may train them.
    - If a signal stops runs during training, they become KILLED, and no error is raised.

    If the environment variable `WORLD_SIZE` is above 1, this process joins a group of processes
    that share each batch. Otherwise the function starts `trainer.devices` processes if that setting
    is above 1.

    Args:
        configs: the jobs, at least one, with equal `config.sharing_key` (same data, teacher and
            length of training). A DictConfig, as Hydra composes it, is resolved first.
        sweep: name of the sweep in MLflow; None for jobs without a sweep.
        stop: stop request of a caller that handles signals beyond this call; None to handle signals
            during this call only.
        launched: whether a launch has recorded the versions of the user's own code. A job whose
            code has changed since is then refused. Otherwise a run that has not begun records the
            versions that this process imported.

    Returns:
        The content of each job's result.json, in the order of `configs`.

    Raises:
        ValueError, OSError: If a setting, the data, the teacher file or a run directory cannot be
            used. The message is one line.
        InUse: If another process has a run directory open. The error is a ValueError.
        DeviceFailure: If the device is missing or broken. The error is a ValueError.
        torch.OutOfMemoryError: If the runs do not fit on the device together; fewer runs may fit.
        RankFailed: If one of several processes ended early, and no single run is the cause.
        KeyboardInterrupt: If a signal asked to stop before training started.
        Exception: Any other error that concerns all runs, such as Hydra's InstantiationException if
            a loader of data or a network raises an error.
    """
    jobs = [c if isinstance(c, Config) else cfg.resolve(c) for c in configs]
    trainer = jobs[0].trainer
    stop = stop or Stop()
    begun = time.time()
    with stop.listening(), process_group(trainer.device, trainer.timeout_s) as ranks:
        unblock_signals()
        ended = [*_finished(jobs, ranks), *_pruned(jobs, ranks)]
        todo = list({job.run_dir: job for job in jobs if job not in ended}.values())
        try:
            if todo and ranks.world_size == 1 and trainer.devices > 1:
                _fit_on_ranks(todo, stop, sweep, launched)
            elif todo:
                # Only rank 0 reacts at once; the other ranks learn from rank 0 that it stopped.
                with stop.acting(at_once=ranks.is_rank_zero):
                    fit_group(todo, stop, sweep, ranks, launched)
        except InUse:
            raise  # the process that has the run directory open writes its record
        except Exception as error:
            ranks.report_failure(error)
            # After out-of-memory the caller may retry with fewer runs.
            retry = may_retry(todo, error)
            if ranks.is_rank_zero and not has_launcher() and not retry:
                # A single process has written the outcome of each run that had started.
                since = begun if ranks.world_size > 1 else math.inf
                cause = ranks.first_failure() or Cause.of(0, error)
                mark_failed(todo, cause, begun, since)
            failure = device_failure(error)
            if failure and failure is not error:
                raise failure from error
            raise
        results: dict[str, Any] = ranks.broadcast({job.run_dir: _result(job) for job in jobs})
    return [results[job.run_dir] for job in jobs]


def _result(job: Config) -> dict[str, Any]:
    return record.read_result(Path(job.run_dir))


def _finished(jobs: Sequence[Config], ranks: Ranks) -> list[Config]:
    """Return the jobs that rank 0 finds FINISHED, and log that they are not run again.

    Raise ValueError if such a job was trained on other data than its data set has now.
    """
    found = [
        job.run_dir for job in jobs if record.holds(job) and _result(job).get("status") == FINISHED
    ]
    run_dirs = ranks.broadcast(found)
    finished = [job for job in jobs if job.run_dir in run_dirs]
    refusal = ""
    if ranks.is_rank_zero:
        refusal = _why_other_data(finished)
    if refusal := ranks.broadcast(refusal):
        raise ValueError(refusal)
    for job in finished:
        log.info(
            "%s is finished already; to run again, delete it or choose another seed or run_dir",
            job.run_dir,
        )
        if teacher_changed(job, _result(job)):
            log.warning(
                "%s was trained with another teacher file than the current one", job.run_dir
            )
        if modules := record.changed_code(job):
            log.warning(
                "%s ran another version of %s than the current one", job.run_dir, ", ".join(modules)
            )
    return finished


def _pruned(jobs: Sequence[Config], ranks: Ranks) -> list[Config]:
    """Return the jobs with the setting `sweep.halving` that halving has dropped, and log them."""
    results = {job.run_dir: _result(job) for job in jobs if job.sweep.halving}
    # The other ranks may not see the run directories, so rank 0 tells them the reasons, too.
    reasons = ranks.broadcast(
        {
            run_dir: result["reason"]
            for run_dir, result in results.items()
            if result.get("status") == PRUNED
        }
    )
    pruned = [job for job in jobs if job.run_dir in reasons]
    for job in pruned:
        log.info("%s was dropped by sweep.halving: %s", job.run_dir, reasons[job.run_dir])
    return pruned


def _why_other_data(finished: Sequence[Config]) -> str:
    """Return why one of these finished jobs was trained on other data than its data set has now.

    Return "" if there is no such job. The jobs share one data set, which is loaded only if a record
    tells what its data were.
    """
    if not any(_result(job).get("data") for job in finished):
        return ""
    now = present_fingerprint(finished[0])
    try:
        for job in finished:
            check_same_data(job, now)
    except ValueError as error:
        return str(error)
    return ""


# Ranks that this process starts


def _fit_on_ranks(jobs: Sequence[Config], stop: Stop, sweep: str | None, launched: bool) -> None:
    """Start ranks on this machine to fit the jobs, and raise a failed rank's error in this process.

    Do not raise if a single run caused the failure: the records of the jobs then tell the outcome.
    """
    trainer = jobs[0].trainer
    check_places(trainer.device, trainer.devices)
    to_terminal = bool(logging.getLogger("sddlskd").handlers)
    begun = time.time()
    try:
        spawn(
            _fit_as_rank,
            (jobs, sweep, to_terminal, launched),
            trainer.devices,
            threads=max(torch.get_num_threads() // trainer.devices, 1),
            stop=lambda: stop.signal or 0,
        )
    except RankFailed as failed:
        cause = failed.cause
        message = cause.error.partition(": ")[2]
        for not_recorded in (InUse, torch.OutOfMemoryError):
            if not_recorded.__name__ in cause.kinds and not cause.folder:
                raise not_recorded(message) from None
        mark_failed(jobs, cause, begun, begun)
        if cause.lost:
            raise DeviceFailure(cause.lost, place=cause.rank) from None
        for refusal in (ValueError, OSError):
            if refusal.__name__ in cause.kinds and not cause.folder:
                raise refusal(message) from None
        log.error("%s\n%s", failed, cause.trace)
        if not cause.folder:
            raise


def _fit_as_rank(
    jobs: Sequence[Config], sweep: str | None, to_terminal: bool, launched: bool
) -> None:
    """Fit the jobs in a rank's process; `to_terminal` says whether to log to the terminal."""
    cfg.frame()
    if to_terminal:
        log_to_terminal()
    fit(jobs, sweep=sweep, launched=launched)
