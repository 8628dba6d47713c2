"""The training loop: one teacher forward pass per batch, shared by all runs of a group.

A group is a list of runs that are trained side by side on the same batches.
"""

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from sddlskd.data.streaming import Data
from sddlskd.record import FAILED, PRUNED
from sddlskd.terminal.progress import ProgressDisplay
from sddlskd.training.devices import device_failure
from sddlskd.training.evaluation import evaluate
from sddlskd.training.halving import Halving
from sddlskd.training.inputs import Inputs
from sddlskd.training.ranks import Ranks
from sddlskd.training.run import NonFiniteLoss, Run
from sddlskd.training.several import Teachers
from sddlskd.training.stop import Stop
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_cache import TeacherCache

__all__ = ["failures_of", "train"]

log = logging.getLogger(__name__)


def train(
    runs: Sequence[Run],
    data: Data,
    teacher: Teacher | TeacherCache | Teachers | None,
    *,
    epochs: int,
    steps: int,
    log_every: int,
    save_every_s: float,
    precision: str,
    halving: Halving,
    ranks: Ranks,
    view: ProgressDisplay,
    stop: Stop,
    on_change: Callable[[Run], None],
) -> None:
    """Train all runs of a group to the end of the last epoch, on the same batches.

    A run is the training of one student. Each run joins at its own epoch and step, so a group can
    hold resumed and new runs. A run that raises an error is marked FAILED and the other runs
    continue, except after the errors listed under "Raises". A run that halving drops is marked
    PRUNED. After a signal, all ranks stop after the same step, save the runs that have not failed,
    and return. The caller marks runs as FINISHED or KILLED.

    Args:
        runs: the runs of the group, at least one.
        data: the batches of this rank.
        teacher: the teacher, or the teachers, that all runs share; None without distillation.
        epochs: number of the last epoch, counted from 1.
        steps: batches per epoch.
        log_every: number of steps between two checks that the loss of a run is finite. Each check
            copies the loss from the device.
        save_every_s: seconds between two checkpoints inside an epoch.
        precision: precision of the validation pass: "fp32", "bf16" or "fp16".
        halving: which runs are dropped at the end of which epochs.
        ranks: the processes that share each batch; all of them must call this function.
        view: the progress display.
        stop: the stop request, checked after each step. If a signal reaches one rank, `stop.signal`
            is set on every rank.
        on_change: called with a run after its record in the run directory has changed.

    Raises:
        Exception: Any error of the data or the teacher. Also these errors of a run, which is not
            marked: with one rank, a failure of the device (`device_failure`); out-of-memory while
            other runs share the device; with several ranks, any error but NonFiniteLoss.
    """
    saved = time.monotonic()
    inputs = Inputs(runs, teacher)

    def stop_or_save() -> list[int]:
        save = ranks.is_rank_zero and time.monotonic() - saved > save_every_s
        return [stop.signal or 0, save]

    for epoch in range(min(run.epoch for run in runs), epochs + 1):
        # Runs are dropped here, not at the end of the epoch before. A resumed group thus also drops
        # the runs that an earlier process had no time to drop.
        for run, reason in halving.to_prune(epoch, runs, ranks).items():
            with failures_of(run, on_change):
                run.report(PRUNED, reason)
            on_change(run)
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
            batch, teacher_taps = inputs(batch, runs_at_step)
            for run in runs_at_step:
                with failures_of(run, on_change):
                    run.train_step(batch, teacher_taps)
                    if run.step % log_every == 0:
                        run.check_loss()
            # A resumed run may have done this step before. It waits, and its time begins with its
            # next step.
            waiting = [run for run in runs_in_epoch if run not in runs_at_step]
            started |= dict.fromkeys(waiting, time.monotonic())
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


@contextmanager
def failures_of(run: Run, on_change: Callable[[Run], None]) -> Iterator[None]:
    """Mark `run` FAILED if the `with` block raises an Exception, and suppress the error.

    The other runs can thus go on. `on_change` is called with the marked run. In three cases the
    error is raised again, and the run is not marked:

    - A failure of the device (`device_failure`), unless there are several ranks: it concerns all
      runs, and another device may train them.
    - An out-of-memory error while other runs share the device: it concerns all runs.
    - With several ranks (processes that share each batch), any error but NonFiniteLoss. Such an
      error must end all ranks, because the others may be waiting for gradients of this rank.
      NonFiniteLoss is raised by all ranks together.
    """
    try:
        yield
    except Exception as error:
        if run.crowded and isinstance(error, torch.OutOfMemoryError):
            raise
        if run.ranks.world_size == 1 and device_failure(error):
            raise
        if run.ranks.world_size > 1 and not isinstance(error, NonFiniteLoss):
            run.ranks.report_failure(error, str(run.record.folder))
            raise
        # NonFiniteLoss needs no traceback: its one-line message is complete.
        if not isinstance(error, NonFiniteLoss):
            run.record.log.exception("%s raised", run.label)
        run.report(FAILED, f"{type(error).__name__}: {error}")
        on_change(run)
