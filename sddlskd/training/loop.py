"""The training loop: one teacher forward a batch, shared by all runs of the group."""

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from sddlskd.data.device import Batch
from sddlskd.data.streaming import Data
from sddlskd.models import Taps
from sddlskd.record import FAILED
from sddlskd.terminal.progress import ProgressDisplay
from sddlskd.training.evaluation import evaluate
from sddlskd.training.ranks import Ranks
from sddlskd.training.run import NonFiniteLoss, Run
from sddlskd.training.stop import Stop
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_cache import TeacherCache

__all__ = ["failures_of", "train"]

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
    view: ProgressDisplay,
    stop: Stop,
    on_change: Callable[[Run], None],
) -> None:
    """Train all runs to the end of the last epoch, all of them on the same batches.

    Each run joins at its own position, so a group can hold interrupted and new runs. A run that
    raises an error is marked FAILED and the other runs continue, except as in `failures_of`. The
    ranks stop and save together, after a step that all have completed. A signal ends the training
    after that step, with all live runs saved. Errors of the data or the teacher are not caught.

    Args:
        runs: the runs of one group.
        data: the batches of this rank.
        teacher: the teacher that all runs share; None without distillation.
        epochs: number of the last epoch, counted from 1.
        steps: batches per epoch.
        log_every: steps between two reads of the losses.
        save_every_s: seconds between two checkpoints inside an epoch.
        precision: precision of the validation pass: "fp32", "bf16" or "fp16".
        ranks: the ranks that share each batch.
        view: the progress display.
        stop: the stop request, checked after each step; set on every rank if any rank has one.
        on_change: called with each run whose record has changed.
    """
    saved = time.monotonic()

    def stop_or_save() -> list[int]:
        save = ranks.is_rank_zero and time.monotonic() - saved > save_every_s
        return [stop.signal or 0, save]

    for epoch in range(min(run.epoch for run in runs), epochs + 1):
        runs_in_epoch = [run for run in runs if run.alive and run.epoch == epoch]
        if not runs_in_epoch:
            continue
        started = dict.fromkeys(runs_in_epoch, time.monotonic())
        first = min(run.step for run in runs_in_epoch)
        for step, batch in enumerate(data.batches(epoch, first), first):
            if step == steps or not any(run.alive for run in runs_in_epoch):
                break
            agreed = ranks.all_reduce_max(stop_or_save)
            runs_at_step = [run for run in runs_in_epoch if run.alive and run.step == step]
            teacher_taps = None
            if teacher and runs_at_step:
                teacher_taps = ask(teacher, batch, runs_at_step)
            for run in runs_at_step:
                with failures_of(run, on_change):
                    run.train_step(batch, teacher_taps)
                    if run.step % log_every == 0:
                        run.check_loss()
            # A run that did this step before it was interrupted waits for its next step: its time
            # begins then.
            waiting = [run for run in runs_in_epoch if run not in runs_at_step]
            started |= dict.fromkeys(waiting, time.monotonic())
            if (step + 1) % log_every == 0:
                view.refresh()
            signalled, save = agreed()
            if signalled or save:
                saved = time.monotonic()
                for run in runs_at_step:
                    if run.alive:
                        with failures_of(run, on_change):
                            run.check_loss()
                            run.save(seconds=saved - started[run])
            if signalled:
                stop.signal = signal.Signals(signalled)
                return

        scores = {}
        for run in runs_in_epoch:
            if run.alive:
                with failures_of(run, on_change):
                    run.check_loss()
                    run.model.eval()
                    scores[run] = evaluate(run.forward, data.val_batches(), precision, ranks)
                    run.model.train()
        ended = time.monotonic()
        for run, score in scores.items():
            with failures_of(run, on_change):
                run.end_epoch(score, ended - started[run])
            if run.alive:
                view.epoch(run)
                on_change(run)
        signalled, _ = ranks.all_reduce_max(stop_or_save)()
        if signalled:
            stop.signal = signal.Signals(signalled)
            return


def ask(teacher: Teacher | TeacherCache, batch: Batch, runs: Sequence[Run]) -> Taps:
    """Return the teacher's taps that the losses of these runs read, and compute no others.

    Args:
        teacher: the teacher that the runs share.
        batch: the images, in two views if a run needs two.
        runs: the runs that train on the batch.

    Returns:
        Taps without gradients.
    """
    if any(run.objective.needs_taps for run in runs):
        taps = teacher.taps(batch.images, batch.views)
    else:
        logit_map_BKHW = teacher(batch.images, batch.views)
        if any(run.objective.features for run in runs):
            logit_map_BKHW = logit_map_BKHW.clone()  # autograd may keep the copy
        taps = Taps.of_map(logit_map_BKHW)
    if any("strong_map" in run.objective.needs for run in runs):
        assert batch.strong is not None
        taps = taps._replace(strong_map=teacher(batch.strong, None).clone())
    return taps


@contextmanager
def failures_of(run: Run, on_change: Callable[[Run], None]) -> Iterator[None]:
    """Confine an error to the run that raised it: mark the run FAILED and let the others continue.

    Raise the error again in two cases. If several runs share the device, an out-of-memory error
    concerns all of them. If several ranks share the run, an error of one rank must end all ranks,
    because the other ranks may be waiting for its gradients; NonFiniteLoss is excepted, because all
    ranks raise it together.
    """
    try:
        yield
    except Exception as error:
        if run.crowded and isinstance(error, torch.OutOfMemoryError):
            raise
        if run.ranks.world_size > 1 and not isinstance(error, NonFiniteLoss):
            run.ranks.report_failure(error, str(run.record.folder))
            raise
        # NonFiniteLoss needs no traceback: its one-line message is complete.
        if not isinstance(error, NonFiniteLoss):
            run.record.log.exception("%s raised", run.label)
        run.report(FAILED, f"{type(error).__name__}: {error}")
        on_change(run)
