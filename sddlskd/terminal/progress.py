"""Progress display of training: a live table on a terminal, else plain lines."""

import logging
import sys
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.table import Table

from sddlskd.terminal.console import duration

__all__ = ["ProgressDisplay"]

log = logging.getLogger(__name__)


class RunStatus(Protocol):
    """The attributes of a run that the view reads."""

    label: str
    epoch: int
    step: int
    loss: float
    val_top1: float
    state: str

    @property
    def alive(self) -> bool:
        """Whether the run has neither ended nor failed."""
        ...


class ProgressDisplay:
    """A display of epoch, loss, top-1 (%), images/s and time left of each run.

    Args:
        runs: The runs to show.
        mode: "auto" (live table on a terminal, else plain lines), "plain" or "off".
        epochs: Number of epochs of each run.
        steps: Batches per epoch.
        batch: Images per batch.
    """

    def __init__(
        self, runs: Sequence[RunStatus], *, mode: str, epochs: int, steps: int, batch: int
    ) -> None:
        self.runs, self.epochs, self.steps, self.batch = runs, epochs, steps, batch
        handlers = logging.getLogger("sddlskd").handlers
        # The log's own console, if it has one, prints log lines above the table and not into it.
        self.console = next(
            (h.console for h in handlers if isinstance(h, RichHandler)), None
        ) or Console(file=sys.stderr)
        self.live = (
            Live(console=self.console, auto_refresh=False)
            if mode == "auto" and self.console.is_terminal
            else None
        )
        self.plain = mode != "off" and self.live is None
        self.started, self.done_at_start = time.monotonic(), self._done()

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.live:
            self.live.stop()

    def _done(self) -> int:
        """Return the steps that the slowest active run has done, or all steps if none is active."""
        running = (run for run in self.runs if run.alive)
        return min(
            ((run.epoch - 1) * self.steps + run.step for run in running),
            default=self.epochs * self.steps,
        )

    def _rate(self) -> float:
        """Return the steps per second since the view was opened."""
        return (self._done() - self.done_at_start) / max(time.monotonic() - self.started, 1e-9)

    def _left(self) -> str:
        rate = self._rate()
        return duration((self.epochs * self.steps - self._done()) / rate) if rate > 0 else "?"

    def refresh(self) -> None:
        """Update the live table; called at the steps at which the losses were read."""
        if self.live:
            self.live.update(self._table(), refresh=True)

    def epoch(self, run: RunStatus) -> None:
        """Report that `run` has ended an epoch: a plain line, or an update of the live table."""
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
        self.refresh()

    def _table(self) -> Table:
        table = Table("run", "epoch", "step", "loss", "top-1", "images/s", "left", "state")
        for run in self.runs:
            at = f"{min(run.epoch, self.epochs)}/{self.epochs}"
            rate, left = f"{self._rate() * self.batch:.0f}", self._left()
            table.add_row(
                run.label,
                at,
                f"{run.step}/{self.steps}",
                f"{run.loss:.4f}",
                f"{run.val_top1:.2f}",
                rate,
                left,
                run.state,
            )
        return table
