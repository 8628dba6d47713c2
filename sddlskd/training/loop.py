"""The training loop: one teacher forward a batch, shared by all runs of the group."""

import logging
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from sddlskd.data.streaming import Data
from sddlskd.record import FAILED
from sddlskd.terminal.progress import ProgressDisplay
from sddlskd.training.evaluation import evaluate
from sddlskd.training.ranks import Ranks
from sddlskd.training.run import NonFiniteLoss, Run
from sddlskd.training.stop import Stop
from sddlskd.training.teacher import Teacher
from sddlskd.training.teacher_cache import TeacherCache

__all__ = ["train"]

log = logging.getLogger(__name__)


def train(
    runs: Sequence[Run],  # runs of one group
    data: Data,
    teacher: Teacher | TeacherCache | None,  # shared by all runs; None without distillation
    *,
    epochs: int,  # number of the last epoch, counted from 1
    steps: int,  # batches per epoch
    log_every: int,  # steps between two reads of the losses
    save_every_s: float,  # seconds between two checkpoints inside an epoch
    precision: str,  # of the validation pass: "fp32", "bf16" or "fp16"
    ranks: Ranks,  # the ranks that share each batch
    view: ProgressDisplay,  # progress display
    stop: Stop,
    changed: Callable[[Run], None],  # called with each run whose record changed
) -> None:
    """Train all runs to the end of the last epoch, all of them on the same batches.

    Each run joins at its own position, so a group can hold interrupted and new runs. A run that
    raises an error is marked FAILED and the other runs continue, except as in `failures_of`. The
    ranks stop and save together, after a step that all have completed. A signal ends the training
    after that step, with all live runs saved. Errors of the data or the teacher are not caught.
    """
    saved = time.monotonic()

    def wishes() -> list[int]:
        return [stop.signal or 0, ranks.is_rank_zero and time.monotonic() - saved > save_every_s]

    for epoch in range(min(run.epoch for run in runs), epochs + 1):
        here = [run for run in runs if run.alive and run.epoch == epoch]
        if not here:
            continue
        started, first = time.monotonic(), min(run.step for run in here)
        batches = zip(data.batches(epoch, first), data.view_batches(epoch, first), strict=True)
        for step, ((images_BCHW, target_B), views_B) in enumerate(batches, first):
            if step == steps or not any(run.alive for run in here):
                break
            agreed = ranks.all_reduce_max(wishes)
            due = [run for run in here if run.alive and run.step == step]
            teacher_map_BKHW = teacher(images_BCHW, views_B) if teacher and due else None
            for run in due:
                with failures_of(run, changed):
                    run.train_step(images_BCHW, target_B, teacher_map_BKHW)
                    if run.step % log_every == 0:
                        run.check_loss()
            if (step + 1) % log_every == 0:
                view.refresh()
            signalled, save = agreed()
            if signalled or save:
                saved = time.monotonic()
                for run in due:
                    if run.alive:
                        with failures_of(run, changed):
                            run.check_loss()
                            run.save(seconds=saved - started)
            if signalled:
                stop.signal = signal.Signals(signalled)
                return

        scores = {}
        for run in here:
            if run.alive:
                with failures_of(run, changed):
                    run.check_loss()
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
        signalled, _ = ranks.all_reduce_max(wishes)()
        if signalled:
            stop.signal = signal.Signals(signalled)
            return


@contextmanager
def failures_of(run: Run, changed: Callable[[Run], None]) -> Iterator[None]:
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
        changed(run)
