"""Progress display of training: a live table on a terminal, else log lines."""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Protocol, Self

from rich.live import Live
from rich.table import Table

from sddlskd.terminal.console import duration
from sddlskd.terminal.layout import fitting_table
from sddlskd.terminal.meter import console_of_log

__all__ = ["ProgressDisplay"]

log = logging.getLogger(__name__)

COLUMNS = ("run", "epoch", "step", "loss", "top-1", "images/s", "left", "state")
EVERY_S = 0.5  # shortest time in seconds between two updates of the live table inside an epoch


class RunStatus(Protocol):
    """Attributes of a run that the progress display reads; `training.run.Run` has them.

    Attributes:
        label: name of the run in the log lines that are written if there is no live table.
        loss: mean training loss of the current epoch so far, or of the last epoch; NaN if not
            known.
        val_top1: validation top-1 of the last epoch in %; NaN before an epoch has ended.
        state: status of the run, such as RUNNING.
    """

    label: str
    loss: float
    val_top1: float
    state: str

    @property
    def epoch(self) -> int:
        """Return the number of the current epoch, or of the next one between two epochs.

        Epochs count from 1; those of a first stage, which some methods have, are ..., -1, 0. After
        the last epoch, the result is the number of epochs plus 1.
        """
        ...

    @property
    def step(self) -> int:
        """Return the number of batches of the current epoch that are done."""
        ...

    @property
    def alive(self) -> bool:
        """Return whether the run is still training: not finished, failed, stopped or dropped."""
        ...


class ProgressDisplay:
    """Display of each run's epoch, loss and top-1 (%), with images per second and time left.

    Use the display as a context manager around the training. Images per second and time left are
    those of the slowest run that is still training. The live table vanishes at the end, because the
    outcome of the runs follows.

    Args:
        runs: runs to show; their attributes are read at each update.
        titles: name of each run in the live table, in the order of `runs`.
        mode: "auto" (live table on a terminal, else log lines), "plain" (log lines, one per epoch)
            or "off" (nothing).
        epochs: number of epochs of each run.
        steps: batches per epoch.
        batch: images per batch.
    """

    def __init__(
        self,
        runs: Sequence[RunStatus],
        titles: Sequence[str],
        *,
        mode: str,
        epochs: int,
        steps: int,
        batch: int,
    ) -> None:
        self.runs = runs
        self.titles = titles
        self.epochs = epochs
        self.steps = steps
        self.batch = batch
        self.console = console_of_log()
        self.live: Live | None = None
        if mode == "auto" and self.console.is_terminal:
            self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.plain = mode != "off" and self.live is None
        self.started = time.monotonic()
        self.updated = -math.inf  # time of the last update of the live table
        self.done_at_start = self._done()

    def __enter__(self) -> Self:
        if self.live:
            with suppress(OSError):  # the terminal was closed
                self.live.start()
            self._update()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            with suppress(OSError):  # the terminal was closed
                self.live.stop()

    def _done(self) -> int:
        """Return the steps that the slowest active run has done, or all steps if none is active."""
        done = [(run.epoch - 1) * self.steps + run.step for run in self.runs if run.alive]
        return min(done, default=self.epochs * self.steps)

    def _rate(self) -> float:
        """Return the steps per second of the slowest active run since the display was created."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        return (self._done() - self.done_at_start) / seconds

    def _left(self) -> str:
        rate = self._rate()
        if rate <= 0:
            return "?"
        return duration((self.epochs * self.steps - self._done()) / rate)

    def refresh(self) -> None:
        """Update the live table from the runs' attributes, at most twice a second (EVERY_S).

        Call this method after each step. Without a live table it does nothing.
        """
        if self.live and time.monotonic() - self.updated >= EVERY_S:
            self._update()

    def _update(self) -> None:
        if self.live:
            with suppress(OSError):  # the terminal was closed; the training goes on to its end
                self.live.update(self._table(), refresh=True)
            self.updated = time.monotonic()

    def epoch(self, run: RunStatus) -> None:
        """Report the end of a run's epoch: update the live table, or else write a log line.

        In mode "off" nothing is reported. Call this method after the run has moved on to its next
        epoch: the line is about epoch `run.epoch - 1`.
        """
        if self.plain:
            log.info(
                "%s  epoch %d/%d  loss %.4f  top-1 %.2f  %.0f images/s  %s left",
                run.label,
                run.epoch - 1,
                self.epochs,
                run.loss,
                run.val_top1,
                self._rate() * self.batch,
                self._left(),
            )
        self._update()

    def _table(self) -> Table:
        rows = []
        for run, title in zip(self.runs, self.titles, strict=True):
            step = run.step
            if run.epoch > self.epochs:  # the last epoch is done
                step = self.steps
            cells = (
                title,
                f"{min(run.epoch, self.epochs)}/{self.epochs}",
                f"{step}/{self.steps}",
                _number(run.loss, 4),
                _number(run.val_top1, 2),
                f"{self._rate() * self.batch:.0f}",
                self._left(),
                run.state,
            )
            rows.append(dict(zip(COLUMNS, cells, strict=True)))
        table, _ = fitting_table("", COLUMNS, rows, self.console.width)
        return table


def _number(value: float, digits: int) -> str:
    """Return a number with some digits after the point, or "-" if it is not known (NaN)."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
