"""From a list of jobs to trained students: one teacher forward a batch, shared by all of them.

`fit` builds data, teacher and runs from the configurations, then `train` loops; below it nothing sees a configuration.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from sddlskd import checkpoint, predictions, record, tracking
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
from sddlskd.data import DeviceData
from sddlskd.evaluation import evaluate
from sddlskd.precision import describe, pick_device
from sddlskd.progress import View
from sddlskd.record import FAILED, FINISHED, KILLED, RUNNING, Record
from sddlskd.run import NonFiniteLoss, Run
from sddlskd.stop import Stop
from sddlskd.teacher import Teacher
from sddlskd.teacher_cache import TeacherCache

__all__ = ["fit", "train"]

log = logging.getLogger(__name__)


def train(
    runs: Sequence[Run],
    data: DeviceData,
    teacher: Teacher | TeacherCache | None,
    *,
    epochs: int,
    steps: int,
    log_every: int,
    save_every_s: float,
    precision: str,
    view: View,
    stop: Stop,
    changed: Callable[[Run], None],
) -> None:
    """Train all runs to the end of the last epoch, side by side.

    A run takes part from its own position on, so that interrupted and new runs can stand in one group. A run that
    raises is marked FAILED and left out; the others go on. `changed` is told of every run whose record changed.
    """
    saved = time.monotonic()
    for epoch in range(min(run.epoch for run in runs), epochs + 1):
        here = [run for run in runs if run.alive and run.epoch == epoch]
        if not here:
            continue
        started, first = time.monotonic(), min(run.step for run in here)
        batches = zip(data.batches(epoch, first), data.view_batches(epoch, first), strict=True)
        for step, ((images_BCHW, target_B), views_B) in enumerate(batches, first):
            if step == steps or not any(run.alive for run in here):
                break
            due = [run for run in here if run.alive and run.step == step]
            teacher_map_BKHW = teacher(images_BCHW, views_B) if teacher and due else None
            for run in due:
                with failures_of(run, changed):
                    run.train_step(images_BCHW, target_B, teacher_map_BKHW)
                    if run.step % log_every == 0:
                        run.look()
            if (step + 1) % log_every == 0:
                view.look()
            if stop.signal or time.monotonic() - saved > save_every_s:
                saved = time.monotonic()
                for run in due:
                    if run.alive:
                        with failures_of(run, changed):
                            run.look()
                            run.save(seconds=saved - started)
            if stop.signal:
                return

        scores = {}
        for run in here:
            if run.alive:
                with failures_of(run, changed):
                    run.look()
                    run.model.eval()
                    scores[run] = evaluate(run.forward, data.val_batches(), precision)
                    run.model.train()
        seconds = time.monotonic() - started
        for run, score in scores.items():
            with failures_of(run, changed):
                run.end_epoch(score, seconds)
            if run.alive:
                view.epoch(run)
                changed(run)
        if stop.signal:
            return


@contextmanager
def failures_of(run: Run, changed: Callable[[Run], None]) -> Iterator[None]:
    """What this run raises ends this run alone; but where runs share a device, its memory is everybody's matter."""
    try:
        yield
    except Exception as error:
        if run.crowded and isinstance(error, torch.OutOfMemoryError):
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
    KeyboardInterrupt where it was asked to stop before that. stop: of a caller that listens to signals longer.
    """
    jobs = [c if isinstance(c, Config) else cfg.resolve(c) for c in configs]
    results = {job.run_dir: record.read_result(Path(job.run_dir)) for job in jobs}
    done = [job for job in jobs if record.holds(job) and results[job.run_dir].get("status") == FINISHED]
    todo = {job.run_dir: job for job in jobs if job not in done}
    for folder in results.keys() - todo.keys():
        log.info("%s is finished already; delete it, or choose another seed or run_dir, to run again", folder)
    for job in done:
        if teacher_changed(job, results[job.run_dir]):
            log.warning("%s learnt from another teacher file than is there now", job.run_dir)
    if todo:
        stop = stop or Stop()
        with stop.listening(), stop.acting(at_once=True):
            try:
                results.update(_fit_group(list(todo.values()), stop, sweep))
            except record.InUse:
                raise  # whoever has it open writes its record
            except Exception as error:
                if len(todo) > 1 and isinstance(error, torch.OutOfMemoryError):
                    raise  # fewer side by side may fit
                _mark_frozen_as_failed(todo.values(), error)
                raise
    return [results[job.run_dir] for job in jobs]


def _mark_frozen_as_failed(jobs: Iterable[Config], error: Exception) -> None:
    marked = []
    for job in jobs:
        folder = Path(job.run_dir)
        if (folder / "config.yaml").exists() and not record.read_result(folder):
            with suppress(ValueError, OSError):  # another process has it, or the disk is full: the first error counts
                opened = Record(job)
                if not record.read_result(folder):  # again, now that nobody else can start it
                    nothing = {"best_top1": None, "last_top1": None, "epochs": 0, "seconds": 0.0}
                    opened.result(FAILED, f"{type(error).__name__}: {error}", **nothing)
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


def _fit_group(jobs: Sequence[Config], stop: Stop, sweep: str | None) -> dict[str, dict[str, Any]]:
    first = jobs[0]
    if len({cfg.sharing_key(job) for job in jobs}) > 1:
        raise ValueError(
            "these jobs cannot share batches and teacher; call fit once for each group of config.sharing_key"
        )
    device = pick_device(first.trainer.device)
    tracking.check_reachable(jobs)
    if first.teacher.checkpoint:  # a mistyped path shows before any data is fetched
        check_teacher(first)
    torch.backends.cudnn.benchmark = True
    data = build_data(first, device)
    networks = [build_network(job.student.model, job.dataset.num_classes, job.seed, device) for job in jobs]

    def train_teacher(job: Config) -> None:
        result = _fit_group([job], stop, None)[job.run_dir]
        if stop.signal:
            raise KeyboardInterrupt
        if result["status"] != FINISHED:
            raise ValueError(f"training teacher={job.student.name} ended as {result['status']}: {result['reason']}")

    teacher, teacher_network = None, None
    facts: dict[str, Any] = {}
    if first.distiller.loss:
        teacher_network = build_network(first.teacher.model, first.dataset.num_classes, 0, device)
    for job, network in zip(jobs, networks, strict=True):
        check_maps(job, network, teacher_network, data, device)
    if teacher_network is not None:
        teacher, facts = build_teacher(first, teacher_network, data, device, train_teacher)
    if any(job.tracking.enabled and job.tracking.experiment_id is None for job in jobs):
        jobs = tracking.register(jobs, sweep)

    with ExitStack() as stack:
        stack.enter_context(stop.acting(at_once=False))
        runs, steps = [], min(data.steps_per_epoch, first.trainer.max_steps or data.steps_per_epoch)
        for job, network in zip(jobs, networks, strict=True):
            opened = Record(job)
            stack.callback(opened.close)
            stack.callback(opened.note_run_id)
            _check_same_teacher(opened.folder, facts)
            runs.append(build_run(job, network, opened, device, steps))
        mirror = tracking.Mirror() if any(job.tracking.enabled for job in jobs) else None
        if mirror:
            stack.callback(mirror.close)  # the first thing to happen at the end, while the records are still held

        def changed(run: Run) -> None:
            if mirror:
                mirror.update(run.record.folder)

        for run in runs:
            run.info = {**facts, "group_size": len(runs), "environment": f"{record.versions()}, {describe(device)}"}
            run.crowded = len(runs) > 1
            run.report(RUNNING)
            changed(run)
        view = View(
            runs,
            mode=first.trainer.progress,
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
                    view=view,
                    stop=stop,
                    changed=changed,
                )
        except KeyboardInterrupt:
            stop.signal = stop.signal or signal.SIGINT
        except Exception as error:  # what all runs stand on: the data, the teacher
            crowded = len(runs) > 1 and isinstance(error, torch.OutOfMemoryError)  # fewer side by side may fit
            for run in runs:
                if run.alive:
                    with suppress(OSError):  # the disk may be what is full
                        run.report(KILLED if crowded else FAILED, f"{type(error).__name__}: {error}")
                        changed(run)
            raise
        for job, run in zip(jobs, runs, strict=True):
            if run.alive:
                with failures_of(run, changed):
                    if run.epoch <= first.trainer.epochs:
                        run.report(KILLED, stop.reason)
                    else:
                        _finish(job, run, teacher_network, data)
                    changed(run)
    return {job.run_dir: record.read_result(Path(job.run_dir)) for job in jobs}


def _finish(job: Config, run: Run, teacher_network: nn.Module | None, data: DeviceData) -> None:
    """What a trained student leaves, before it counts as finished and is not run again."""
    leave_as_teacher(job, run)
    if job.tracking.predictions:
        arrays = predictions.collect(run.model, teacher_network, data.test_batches(), job.M)
        if "sample" in arrays:
            arrays["images"] = data.test_images(arrays["sample"].tolist()).numpy()
        predictions.write(run.record.folder / "predictions.npz", arrays)
    if job.dataset.val_fraction:  # the honest number: on the test split, at the epoch that the held-out images chose
        run.model.load_state_dict(checkpoint.read(run.record.folder / "best.ckpt")["model"])
        run.model.eval()
        run.info["test_top1"] = evaluate(run.forward, data.test_batches(), run.precision)["top1"]
    run.report(FINISHED)
