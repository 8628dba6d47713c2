"""Train the students of a list of jobs; all students share one teacher forward pass per batch.

`fit` builds data, teacher and runs from the configurations. `train` is the training loop; `train`
and the code that it calls never see a configuration.
"""

import logging
import math
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from sddlskd import config as cfg
from sddlskd import record, tracking
from sddlskd.config import Config
from sddlskd.data.streaming import Data
from sddlskd.files import checkpoint
from sddlskd.record import FAILED, FINISHED, KILLED, RUNNING, Onlooker, Record
from sddlskd.terminal.console import log_to_terminal
from sddlskd.terminal.progress import ProgressDisplay
from sddlskd.training import predictions
from sddlskd.training import ranks as distributed
from sddlskd.training.build import (
    build_data,
    build_network,
    build_run,
    build_teacher,
    check_maps,
    check_teacher,
    leave_as_teacher,
    teacher_changed,
)
from sddlskd.training.devices import check_places, describe, pick_device
from sddlskd.training.evaluation import evaluate
from sddlskd.training.loop import failures_of, train
from sddlskd.training.ranks import Cause, RankFailed, Ranks
from sddlskd.training.run import Run
from sddlskd.training.stop import Stop

__all__ = ["fit"]

log = logging.getLogger(__name__)


def fit(
    configs: Sequence[Config | DictConfig], *, sweep: str | None = None, stop: Stop | None = None
) -> list[dict[str, Any]]:
    """Train one student per configuration; all of them must share batches and teacher.

    A job that is already FINISHED is not run again. If the environment describes a group of ranks
    (`WORLD_SIZE`), this process joins the group; otherwise the function starts `trainer.devices`
    ranks by itself.

    If an error occurs before training starts, jobs whose run directory was already frozen are
    marked FAILED.

    Args:
        configs: the jobs, with equal `config.sharing_key`.
        sweep: name of the sweep in MLflow; None for jobs without a sweep.
        stop: stop request of a caller that handles signals beyond this call; None to handle signals
            during this call only.

    Returns:
        The content of each job's result.json, in the order of `configs`.

    Raises:
        ValueError, OSError: if something is wrong before training starts. The message is one line.
        InUse: if another process has a run directory open.
        torch.OutOfMemoryError: if the runs of a group do not fit on the device together; fewer
            runs may fit.
        RankFailed: if a rank ended early for a reason that does not lie in one of the runs.
        KeyboardInterrupt: if a signal asked to stop before training started.
    """
    jobs = [c if isinstance(c, Config) else cfg.resolve(c) for c in configs]
    how, stop, begun = jobs[0].trainer, stop or Stop(), time.time()
    with stop.listening(), distributed.process_group(how.device, how.timeout_s) as ranks:
        distributed.unblock_signals()
        finished = [
            job for job in jobs if record.holds(job) and _result(job).get("status") == FINISHED
        ]
        known = ranks.broadcast([job.run_dir for job in finished])
        done = [job for job in jobs if job.run_dir in known]
        todo = list({job.run_dir: job for job in jobs if job not in done}.values())
        for job in done:
            log.info(
                "%s is finished already; to run again, delete it or choose another seed or run_dir",
                job.run_dir,
            )
            if teacher_changed(job, _result(job)):
                log.warning(
                    "%s was trained with another teacher file than the current one", job.run_dir
                )
        try:
            if todo and ranks.world_size == 1 and how.devices > 1:
                _fit_on_ranks(todo, stop, sweep)
            elif todo:
                # Only rank 0 reacts at once; the other ranks learn from rank 0 that it stopped.
                with stop.acting(at_once=ranks.is_rank_zero):
                    _fit_group(todo, stop, sweep, ranks)
        except record.InUse:
            raise  # the process that has the run directory open writes its record
        except Exception as error:
            ranks.report_failure(error)
            if len(todo) > 1 and isinstance(error, torch.OutOfMemoryError):
                raise  # the caller may retry with fewer runs
            if ranks.is_rank_zero and not distributed.has_launcher():
                _mark_failed(
                    todo,
                    ranks.first_failure() or Cause.of(0, error),
                    begun if ranks.world_size > 1 else math.inf,
                )
            raise
        results: dict[str, Any] = ranks.broadcast({job.run_dir: _result(job) for job in jobs})
    return [results[job.run_dir] for job in jobs]


def _result(job: Config) -> dict[str, Any]:
    return record.read_result(Path(job.run_dir))


def _fit_on_ranks(jobs: Sequence[Config], stop: Stop, sweep: str | None) -> None:
    """Start ranks on this machine to fit the jobs, and raise a failed rank's error in this process.

    Do not raise if a single run caused the failure: the records of the jobs then tell the outcome.
    """
    how = jobs[0].trainer
    check_places(how.device, how.devices)
    threads = max(torch.get_num_threads() // how.devices, 1)
    arguments, begun = (jobs, sweep, bool(logging.getLogger("sddlskd").handlers)), time.time()
    try:
        distributed.spawn(
            _fit_as_rank, arguments, how.devices, threads=threads, stop=lambda: stop.signal or 0
        )
    except RankFailed as failed:
        cause, says = failed.cause, failed.cause.error.partition(": ")[2]
        for elsewhere in (record.InUse, torch.OutOfMemoryError):
            if elsewhere.__name__ in cause.kinds and not cause.folder:
                raise elsewhere(says) from None
        _mark_failed(jobs, cause, begun)
        for refusal in (ValueError, OSError):
            if refusal.__name__ in cause.kinds and not cause.folder:
                raise refusal(says) from None
        log.error("%s\n%s", failed, cause.trace)
        if not cause.folder:
            raise


def _fit_as_rank(jobs: Sequence[Config], sweep: str | None, to_terminal: bool) -> None:
    """Fit the jobs in a rank's process; `to_terminal` says whether to log to the terminal."""
    cfg.frame()
    if to_terminal:
        log_to_terminal()
    fit(jobs, sweep=sweep)


def _mark_failed(jobs: Sequence[Config], cause: Cause, since: float) -> None:
    """Mark the frozen jobs that have no outcome yet as FAILED.

    A job has no outcome if it has not started, or if its record says RUNNING with a time of `since`
    or later (Unix time in seconds; infinity to leave RUNNING jobs alone). If one of the runs caused
    the failure, only that run is FAILED, and the other runs of the group are KILLED. The job that
    trains the teacher is included if `since` is finite.
    """

    def open_ended(job: Config) -> bool:
        result = _result(job)
        return not result or (result["status"] == RUNNING and result["time"] >= since)

    marked, beside = [], cause.folder in {job.run_dir for job in jobs}
    # The ranks may have been training the teacher when they failed.
    taught = jobs[0].distiller.loss and since < math.inf
    for job in [*([cfg.teacher_job(jobs[0])] if taught else []), *jobs]:
        if Path(job.run_dir, "config.yaml").exists() and open_ended(job):
            # Ignore a run directory in use or a full disk: the error that led here counts.
            with suppress(ValueError, OSError):
                opened = Record(job)
                earlier = _result(job)
                # Check again: only now does the lock keep other processes from starting the job.
                if open_ended(job):
                    status, reason = FAILED, cause.error
                    if beside and cause.folder != job.run_dir:
                        status, reason = (
                            KILLED,
                            f"{Path(cause.folder).name} failed in the same group: {cause.error}",
                        )
                    elif earlier:
                        opened.log.propagate = False  # the terminal has shown the error already
                        opened.log.error("rank %d raised\n%s", cause.rank, cause.trace)
                    opened.write_outcome(status, reason)
                    marked.append(job)
                opened.close()
    if any(job.tracking.enabled for job in marked):
        mirror = tracking.Mirror()
        for job in marked:
            mirror.update(Path(job.run_dir))
        mirror.close()


def _check_same_teacher(folder: Path, facts: dict[str, Any]) -> None:
    """Raise ValueError if a run with a checkpoint was begun with another teacher file."""
    earlier, now = record.read_result(folder).get("teacher_sha256"), facts.get("teacher_sha256")
    if earlier and earlier != now and (folder / "last.ckpt").exists():
        raise ValueError(
            f"run_dir={folder} was begun with another teacher file "
            f"(sha256 {earlier!s:.12}, now {now!s:.12}); "
            "put that file back, or delete the folder to start anew"
        )


def _fit_group(jobs: Sequence[Config], stop: Stop, sweep: str | None, ranks: Ranks) -> None:
    """Build data, teacher and runs of one group of jobs, train the runs, and finish their records.

    Train the teacher first, by a recursive call, if the teacher's file is missing and the jobs
    allow it.
    """
    first = jobs[0]
    if len({cfg.sharing_key(job) for job in jobs}) > 1:
        raise ValueError(
            "these jobs cannot share batches and teacher; "
            "call fit once for each value of config.sharing_key"
        )
    if first.trainer.batch_size < 2 * ranks.world_size:
        raise ValueError(
            f"trainer.batch_size={first.trainer.batch_size} is too small for {ranks.world_size} "
            f"processes to share; give at least {2 * ranks.world_size}, two images each"
        )
    device = ranks.device or pick_device(first.trainer.device)
    if ranks.is_rank_zero:
        tracking.check_reachable(jobs)
    # Check a given path early, so that a mistyped path fails before any data is downloaded.
    if first.teacher.checkpoint:
        check_teacher(first)
    torch.backends.cudnn.benchmark = True
    # Rank 0 goes first, so that files that are downloaded on first use are downloaded once.
    with ranks.rank_zero_first():
        data = build_data(first, device, rank=ranks.rank, ranks=ranks.world_size)
        networks = [
            build_network(job.student.model, job.dataset.num_classes, job.seed, device)
            for job in jobs
        ]
    networks = [ranks.with_shared_norm(network) for network in networks]

    def train_teacher(job: Config) -> None:
        _fit_group([job], stop, None, ranks)
        if ranks.all_reduce_max(lambda: [stop.signal or 0])()[0]:
            raise KeyboardInterrupt
        result = ranks.broadcast(_result(job))
        if result["status"] != FINISHED:
            raise ValueError(
                f"training teacher={job.student.name} ended as {result['status']}: "
                f"{result['reason']}"
            )

    teacher, teacher_network = None, None
    facts: dict[str, Any] = {}
    if first.distiller.loss:
        teacher_network = build_network(first.teacher.model, first.dataset.num_classes, 0, device)
    for job, network in zip(jobs, networks, strict=True):
        check_maps(job, network, teacher_network, data, device)
    if teacher_network is not None:
        teacher, facts = build_teacher(first, teacher_network, data, device, train_teacher, ranks)
    if ranks.is_rank_zero and any(
        job.tracking.enabled and job.tracking.experiment_id is None for job in jobs
    ):
        jobs = tracking.register(jobs, sweep)

    with ExitStack() as stack:
        stack.enter_context(stop.acting(at_once=False))
        runs: list[Run] = []
        # Errors of runs that cannot be built or resumed, by run_dir.
        refused: dict[str, Exception] = {}
        steps = min(data.steps_per_epoch, first.trainer.max_steps or data.steps_per_epoch)
        for job, network in zip(jobs, networks, strict=True):
            opened = Record(job) if ranks.is_rank_zero else Onlooker(job)
            if isinstance(opened, Record):
                stack.callback(opened.close)
                stack.callback(opened.note_run_id)
            try:
                if ranks.is_rank_zero:
                    _check_same_teacher(opened.folder, facts)
                runs.append(
                    build_run(
                        job, network, opened, device, steps, images=data.train_size, ranks=ranks
                    )
                )
            except Exception as error:
                if ranks.world_size > 1 or isinstance(error, torch.OutOfMemoryError):
                    raise
                opened.log.error("%s: %s: %s", Path(job.run_dir).name, type(error).__name__, error)
                opened.write_outcome(FAILED, f"{type(error).__name__}: {error}")
                refused[job.run_dir] = error
        mirror = (
            tracking.Mirror()
            if ranks.is_rank_zero and any(job.tracking.enabled for job in jobs)
            else None
        )
        if mirror:
            # Registered last, so that the mirror closes first, while the records are still locked.
            stack.callback(mirror.close)
            for run_dir in refused:
                mirror.update(Path(run_dir))
        if not runs:
            raise next(iter(refused.values()))
        jobs = [job for job in jobs if job.run_dir not in refused]

        def changed(run: Run) -> None:
            if mirror:
                mirror.update(run.record.folder)

        for run in runs:
            environment = f"{record.versions()}, {describe(device)}"
            environment += f", {ranks.world_size} ranks" if ranks.world_size > 1 else ""
            run.info = {**facts, "group_size": len(runs), "environment": environment}
            run.crowded = len(runs) > 1
            run.report(RUNNING)
            changed(run)
        view = ProgressDisplay(
            runs,
            mode=first.trainer.progress if ranks.is_rank_zero else "off",
            epochs=first.trainer.epochs,
            steps=steps,
            batch=first.trainer.batch_size,
        )
        try:
            with view:
                train(
                    runs,
                    data,
                    teacher,
                    epochs=first.trainer.epochs,
                    steps=steps,
                    log_every=first.trainer.log_every,
                    save_every_s=60 * first.checkpoint.every_minutes,
                    precision=first.trainer.precision,
                    ranks=ranks,
                    view=view,
                    stop=stop,
                    changed=changed,
                )
        except KeyboardInterrupt:
            stop.signal = stop.signal or signal.SIGINT
            # The other ranks may be at another point of the program, so do not communicate with
            # them any more.
            if ranks.world_size > 1:
                for run in runs:
                    if run.alive:
                        run.report(KILLED, stop.reason)
                        changed(run)
                raise
        except Exception as error:  # concerns all runs: an error of the data or the teacher
            # With several ranks, the records are written after all ranks have ended: only then is
            # it known which rank failed first.
            if ranks.world_size > 1:
                raise
            # After out-of-memory the caller may retry with fewer runs, so the runs are KILLED.
            crowded = len(runs) > 1 and isinstance(error, torch.OutOfMemoryError)
            for run in runs:
                if run.alive:
                    with suppress(OSError):  # a full disk may be the error itself
                        run.report(
                            KILLED if crowded else FAILED, f"{type(error).__name__}: {error}"
                        )
                        changed(run)
            raise
        for job, run in zip(jobs, runs, strict=True):
            if run.alive:
                with failures_of(run, changed):
                    if run.epoch <= first.trainer.epochs:
                        run.report(KILLED, stop.reason)
                    elif ranks.is_rank_zero:
                        _finish(job, run, teacher_network, data)
                    changed(run)


def _finish(job: Config, run: Run, teacher_network: nn.Module | None, data: Data) -> None:
    """Write the final files of a trained student, then mark the run FINISHED.

    FINISHED comes last, because a finished run is never run again.
    """
    leave_as_teacher(job, run)
    if job.tracking.predictions:
        arrays = predictions.collect(run.model, teacher_network, data.test_batches(), job.M)
        if "sample" in arrays:
            arrays["images"] = data.test_images(arrays["sample"].tolist()).numpy()
        predictions.write(run.record.folder / "predictions.npz", arrays)
    # The unbiased number: the accuracy on the test split at the epoch that the held-out validation
    # images selected.
    if job.dataset.val_fraction:
        run.model.load_state_dict(checkpoint.read(run.record.folder / "best.ckpt")["model"])
        run.model.eval()
        run.info["test_top1"] = evaluate(run.forward, data.test_batches(), run.precision)["top1"]
    run.report(FINISHED)
