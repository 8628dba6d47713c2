"""From a list of jobs to trained students: one teacher forward a batch, shared by all of them.

`fit` builds data, teacher and runs from the configurations, then `train` loops; below it nothing sees a configuration.
"""

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from sddlskd import checkpoint, distributed, predictions, record, tracking
from sddlskd import config as cfg
from sddlskd.build import (
    build_data,
    build_network,
    build_run,
    build_teacher,
    check_maps,
    check_teacher,
    leave_as_teacher,
    teacher_changed,
)
from sddlskd.config import Config
from sddlskd.console import log_to_terminal
from sddlskd.distributed import Cause, RankFailed, Ranks
from sddlskd.evaluation import evaluate
from sddlskd.precision import check_places, describe, pick_device
from sddlskd.progress import View
from sddlskd.record import FAILED, FINISHED, KILLED, RUNNING, Onlooker, Record
from sddlskd.run import NonFiniteLoss, Run
from sddlskd.stop import Stop
from sddlskd.streaming import Data
from sddlskd.teacher import Teacher
from sddlskd.teacher_cache import TeacherCache

__all__ = ["fit", "train"]

log = logging.getLogger(__name__)


def train(
    runs: Sequence[Run],
    data: Data,
    teacher: Teacher | TeacherCache | None,
    *,
    epochs: int,
    steps: int,
    log_every: int,
    save_every_s: float,
    precision: str,
    ranks: Ranks,
    view: View,
    stop: Stop,
    changed: Callable[[Run], None],
) -> None:
    """Train all runs to the end of the last epoch, side by side.

    A run takes part from its own position on, so that interrupted and new runs can stand in one group. A run that
    raises is marked FAILED and left out; the others go on. `changed` is told of every run whose record changed.
    Ranks stop and save together, after a step that all of them have done.
    """
    saved = time.monotonic()

    def wishes() -> list[int]:
        return [stop.signal or 0, ranks.first and time.monotonic() - saved > save_every_s]

    for epoch in range(min(run.epoch for run in runs), epochs + 1):
        here = [run for run in runs if run.alive and run.epoch == epoch]
        if not here:
            continue
        started, first = time.monotonic(), min(run.step for run in here)
        batches = zip(data.batches(epoch, first), data.view_batches(epoch, first), strict=True)
        for step, ((images_BCHW, target_B), views_B) in enumerate(batches, first):
            if step == steps or not any(run.alive for run in here):
                break
            agreed = ranks.agree(wishes)
            due = [run for run in here if run.alive and run.step == step]
            teacher_map_BKHW = teacher(images_BCHW, views_B) if teacher and due else None
            for run in due:
                with failures_of(run, changed):
                    run.train_step(images_BCHW, target_B, teacher_map_BKHW)
                    if run.step % log_every == 0:
                        run.look()
            if (step + 1) % log_every == 0:
                view.look()
            signalled, save = agreed()
            if signalled or save:
                saved = time.monotonic()
                for run in due:
                    if run.alive:
                        with failures_of(run, changed):
                            run.look()
                            run.save(seconds=saved - started)
            if signalled:
                stop.signal = signal.Signals(signalled)
                return

        scores = {}
        for run in here:
            if run.alive:
                with failures_of(run, changed):
                    run.look()
                    run.model.eval()
                    scores[run] = evaluate(run.forward, data.val_batches(), precision, ranks)
                    run.model.train()
        seconds = time.monotonic() - started
        for run, score in scores.items():
            with failures_of(run, changed):
                run.end_epoch(score, seconds)
            if run.alive:
                view.epoch(run)
                changed(run)
        signalled, _ = ranks.agree(wishes)()
        if signalled:
            stop.signal = signal.Signals(signalled)
            return


@contextmanager
def failures_of(run: Run, changed: Callable[[Run], None]) -> Iterator[None]:
    """What this run raises ends this run alone; but where runs share a device, its memory is everybody's matter.

    Where ranks share the run, what one of them raises ends them all: the others may be waiting for its gradients.
    """
    try:
        yield
    except Exception as error:
        if run.crowded and isinstance(error, torch.OutOfMemoryError):
            raise
        if run.ranks.count > 1 and not isinstance(error, NonFiniteLoss):  # which all ranks see
            run.ranks.blame(error, str(run.record.folder))
            raise
        if not isinstance(error, NonFiniteLoss):  # which says all in one line
            run.record.log.exception("%s raised", run.label)
        run.report(FAILED, f"{type(error).__name__}: {error}")
        changed(run)


def fit(
    configs: Sequence[Config | DictConfig], *, sweep: str | None = None, stop: Stop | None = None
) -> list[dict[str, Any]]:
    """Train one student per configuration; all of them must share batches and teacher (`config.sharing_key`).

    A job that is FINISHED already is not run again. Gives each job's result.json, in order. Raises ValueError or
    OSError, in one line, for what is wrong before training starts; jobs that were frozen already are then FAILED.
    Where the environment names other ranks they train together; else `trainer.devices` ranks are started for it.
    Raises RankFailed where one of them ended early for a reason that is no run's, KeyboardInterrupt where it was asked
    to stop before training starts. stop: of a caller that listens to signals longer.
    """
    jobs = [c if isinstance(c, Config) else cfg.resolve(c) for c in configs]
    how, stop, begun = jobs[0].trainer, stop or Stop(), time.time()
    with stop.listening(), distributed.joined(how.device, how.timeout_s) as ranks:
        distributed.hear_signals()
        finished = [
            job for job in jobs if record.holds(job) and _result(job).get("status") == FINISHED
        ]
        known = ranks.told([job.run_dir for job in finished])
        done = [job for job in jobs if job.run_dir in known]
        todo = list({job.run_dir: job for job in jobs if job not in done}.values())
        for job in done:
            log.info(
                "%s is finished already; delete it, or choose another seed or run_dir, to run again",
                job.run_dir,
            )
            if teacher_changed(job, _result(job)):
                log.warning("%s learnt from another teacher file than is there now", job.run_dir)
        try:
            if todo and ranks.count == 1 and how.devices > 1:
                _fit_on_ranks(todo, stop, sweep)
            elif todo:
                with stop.acting(at_once=ranks.first):  # the others hear of it
                    _fit_group(todo, stop, sweep, ranks)
        except record.InUse:
            raise  # whoever has it open writes its record
        except Exception as error:
            ranks.blame(error)
            if len(todo) > 1 and isinstance(error, torch.OutOfMemoryError):
                raise  # fewer side by side may fit
            if ranks.first and not distributed.looked_after():
                _mark_failed(
                    todo,
                    ranks.cause() or Cause.of(0, error),
                    begun if ranks.count > 1 else math.inf,
                )
            raise
        results: dict[str, Any] = ranks.told({job.run_dir: _result(job) for job in jobs})
    return [results[job.run_dir] for job in jobs]


def _result(job: Config) -> dict[str, Any]:
    return record.read_result(Path(job.run_dir))


def _fit_on_ranks(jobs: Sequence[Config], stop: Stop, sweep: str | None) -> None:
    """Let ranks on this machine fit the jobs; what they raise is raised here."""
    how = jobs[0].trainer
    check_places(how.device, how.devices)
    threads = max(torch.get_num_threads() // how.devices, 1)
    arguments, begun = (jobs, sweep, bool(logging.getLogger("sddlskd").handlers)), time.time()
    try:
        distributed.start(
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
    cfg.frame()
    if to_terminal:
        log_to_terminal()
    fit(jobs, sweep=sweep)


def _mark_failed(jobs: Sequence[Config], cause: Cause, since: float) -> None:
    """Mark the jobs that are frozen and have not started as FAILED, and those that are RUNNING since then (a time).

    Where one of the runs is the cause, it alone is FAILED and those beside it are KILLED.
    """

    def open_ended(job: Config) -> bool:
        result = _result(job)
        return not result or (result["status"] == RUNNING and result["time"] >= since)

    marked, beside = [], cause.folder in {job.run_dir for job in jobs}
    taught = (
        jobs[0].distiller.loss and since < math.inf
    )  # the ranks may have been training the teacher
    for job in [*([cfg.teacher_job(jobs[0])] if taught else []), *jobs]:
        if Path(job.run_dir, "config.yaml").exists() and open_ended(job):
            with suppress(
                ValueError, OSError
            ):  # another process has it, or the disk is full: the first error counts
                opened = Record(job)
                earlier = _result(job)
                if open_ended(job):  # again, now that nobody else can start it
                    status, reason = FAILED, cause.error
                    if beside and cause.folder != job.run_dir:
                        status, reason = (
                            KILLED,
                            f"{Path(cause.folder).name} failed beside it: {cause.error}",
                        )
                    elif earlier:
                        opened.log.propagate = False  # the terminal has seen it
                        opened.log.error("rank %d raised\n%s", cause.rank, cause.trace)
                    opened.settle(status, reason)
                    marked.append(job)
                opened.close()
    if any(job.tracking.enabled for job in marked):
        mirror = tracking.Mirror()
        for job in marked:
            mirror.update(Path(job.run_dir))
        mirror.close()


def _check_same_teacher(folder: Path, facts: dict[str, Any]) -> None:
    earlier, now = record.read_result(folder).get("teacher_sha256"), facts.get("teacher_sha256")
    if earlier and earlier != now and (folder / "last.ckpt").exists():
        raise ValueError(
            f"run_dir={folder} was begun with another teacher file (sha256 {earlier!s:.12}, now {now!s:.12}); "
            "put that file back, or delete the folder to start anew"
        )


def _fit_group(jobs: Sequence[Config], stop: Stop, sweep: str | None, ranks: Ranks) -> None:
    first = jobs[0]
    if len({cfg.sharing_key(job) for job in jobs}) > 1:
        raise ValueError(
            "these jobs cannot share batches and teacher; call fit once for each group of config.sharing_key"
        )
    if first.trainer.batch_size < 2 * ranks.count:
        raise ValueError(
            f"trainer.batch_size={first.trainer.batch_size} is too small for {ranks.count} processes to share; "
            f"give at least {2 * ranks.count}, two images each"
        )
    device = ranks.device or pick_device(first.trainer.device)
    if ranks.first:
        tracking.check_reachable(jobs)
    if first.teacher.checkpoint:  # a mistyped path shows before any data is fetched
        check_teacher(first)
    torch.backends.cudnn.benchmark = True
    with ranks.first_before_others():  # what is fetched on first use is fetched once
        data = build_data(first, device, rank=ranks.rank, ranks=ranks.count)
        networks = [
            build_network(job.student.model, job.dataset.num_classes, job.seed, device)
            for job in jobs
        ]
    networks = [ranks.with_shared_norm(network) for network in networks]

    def train_teacher(job: Config) -> None:
        _fit_group([job], stop, None, ranks)
        if ranks.agree(lambda: [stop.signal or 0])()[0]:
            raise KeyboardInterrupt
        result = ranks.told(_result(job))
        if result["status"] != FINISHED:
            raise ValueError(
                f"training teacher={job.student.name} ended as {result['status']}: {result['reason']}"
            )

    teacher, teacher_network = None, None
    facts: dict[str, Any] = {}
    if first.distiller.loss:
        teacher_network = build_network(first.teacher.model, first.dataset.num_classes, 0, device)
    for job, network in zip(jobs, networks, strict=True):
        check_maps(job, network, teacher_network, data, device)
    if teacher_network is not None:
        teacher, facts = build_teacher(first, teacher_network, data, device, train_teacher, ranks)
    if ranks.first and any(
        job.tracking.enabled and job.tracking.experiment_id is None for job in jobs
    ):
        jobs = tracking.register(jobs, sweep)

    with ExitStack() as stack:
        stack.enter_context(stop.acting(at_once=False))
        runs: list[Run] = []
        refused: dict[str, Exception] = {}  # of runs that cannot go on from where they are
        steps = min(data.steps_per_epoch, first.trainer.max_steps or data.steps_per_epoch)
        for job, network in zip(jobs, networks, strict=True):
            opened = Record(job) if ranks.first else Onlooker(job)
            if isinstance(opened, Record):
                stack.callback(opened.close)
                stack.callback(opened.note_run_id)
            try:
                if ranks.first:
                    _check_same_teacher(opened.folder, facts)
                runs.append(
                    build_run(
                        job, network, opened, device, steps, images=data.train_size, ranks=ranks
                    )
                )
            except Exception as error:
                if ranks.count > 1 or isinstance(error, torch.OutOfMemoryError):
                    raise
                opened.log.error("%s: %s: %s", Path(job.run_dir).name, type(error).__name__, error)
                opened.settle(FAILED, f"{type(error).__name__}: {error}")
                refused[job.run_dir] = error
        mirror = (
            tracking.Mirror() if ranks.first and any(job.tracking.enabled for job in jobs) else None
        )
        if mirror:
            stack.callback(
                mirror.close
            )  # the first thing to happen at the end, while the records are still held
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
            environment += f", {ranks.count} ranks" if ranks.count > 1 else ""
            run.info = {**facts, "group_size": len(runs), "environment": environment}
            run.crowded = len(runs) > 1
            run.report(RUNNING)
            changed(run)
        view = View(
            runs,
            mode=first.trainer.progress if ranks.first else "off",
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
            if ranks.count > 1:  # the others may be elsewhere: no more words with them
                for run in runs:
                    if run.alive:
                        run.report(KILLED, stop.reason)
                        changed(run)
                raise
        except Exception as error:  # what all runs stand on: the data, the teacher
            if ranks.count > 1:
                raise  # the record says it when all ranks have ended, and which was the first
            crowded = len(runs) > 1 and isinstance(
                error, torch.OutOfMemoryError
            )  # fewer side by side may fit
            for run in runs:
                if run.alive:
                    with suppress(OSError):  # the disk may be what is full
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
                    elif ranks.first:
                        _finish(job, run, teacher_network, data)
                    changed(run)


def _finish(job: Config, run: Run, teacher_network: nn.Module | None, data: Data) -> None:
    """What a trained student leaves, before it counts as finished and is not run again."""
    leave_as_teacher(job, run)
    if job.tracking.predictions:
        arrays = predictions.collect(run.model, teacher_network, data.test_batches(), job.M)
        if "sample" in arrays:
            arrays["images"] = data.test_images(arrays["sample"].tolist()).numpy()
        predictions.write(run.record.folder / "predictions.npz", arrays)
    if (
        job.dataset.val_fraction
    ):  # the honest number: on the test split, at the epoch that the held-out images chose
        run.model.load_state_dict(checkpoint.read(run.record.folder / "best.ckpt")["model"])
        run.model.eval()
        run.info["test_top1"] = evaluate(run.forward, data.test_batches(), run.precision)["top1"]
    run.report(FINISHED)
