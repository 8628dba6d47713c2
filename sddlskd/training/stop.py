"""Signal handling: notice that a user or the scheduler asks the training to stop."""

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from sddlskd.processes.interrupts import hung_up_counts

__all__ = ["ASKING", "Stop"]

log = logging.getLogger(__name__)

# Signals by which a user or a scheduler asks a job to stop. SLURM sends SIGUSR2 as its warning
# before a time limit. A closed terminal sends SIGHUP.
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP)


class Stop:
    """Request to stop: the first SIGINT, SIGTERM, SIGUSR2 or SIGHUP within a `listening` block.

    The training loop checks `signal` after each step.

    Args:
        warned: text that `reason` appends if the signal is SIGUSR2, SLURM's warning before a time
            limit.
        launcher: process id of the sweep that has started this process as a worker; None without
            one. The sweep passes on its signals, and says itself that it stops.

    Attributes:
        signal: the signal that arrived first; None as long as there is none.
    """

    def __init__(self, warned: str = "", launcher: int | None = None) -> None:
        self.signal: signal.Signals | None = None
        self.warned = warned
        self.launcher = launcher
        self._launcher_died = False
        self._at_once = False

    @property
    def reason(self) -> str:
        """Return why the runs are stopped, such as "stopped by SIGTERM", as text for their records.

        The text ends with `warned` if the signal is SIGUSR2. If the signal came because the
        launcher died, the text says so. Without a signal it is "stopped".
        """
        if self._launcher_died:
            return "the launching process died"
        added = self.warned if self.signal is signal.SIGUSR2 else ""
        return f"stopped by {self.signal.name}{added}" if self.signal else "stopped"

    def listen(self) -> dict[signal.Signals, Any]:
        """Install handlers for the signals of `ASKING`, and return the previous handlers.

        SIGHUP gets no handler if this process ignores it, as after `nohup`. A handler sets
        `signal`, and may raise KeyboardInterrupt (see `acting`). Python allows handlers to be
        installed in the main thread only. In any other thread, install nothing and return {}: the
        calling program then handles the signals.

        Returns:
            The previous handler of each signal, as `signal.signal` returns it.
        """
        asking = [number for number in ASKING if number != signal.SIGHUP or hung_up_counts()]
        try:
            return {number: signal.signal(number, self._ask) for number in asking}
        except ValueError:
            return {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Install the signal handlers for a block, then restore the previous handlers.

        In any other than the main thread, nothing is installed (see `listen`).
        """
        before = self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def acting(self, *, at_once: bool) -> Iterator[None]:
        """Set for a block whether the signals of `ASKING` raise KeyboardInterrupt at once.

        Args:
            at_once: True to raise KeyboardInterrupt as soon as a signal arrives, and also at the
                beginning of the block if a signal arrived before. Use True while there is no
                training progress to save. False to only set `signal`, so that the training loop can
                save checkpoints; a second signal raises KeyboardInterrupt if it is SIGINT.

        Raises:
            KeyboardInterrupt: As `at_once` says.
        """
        before, self._at_once = self._at_once, at_once
        try:
            if at_once and self.signal:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = before

    def _ask(self, number: int, frame: FrameType | None) -> None:
        asked, again = signal.Signals(number), self.signal is not None
        self.signal = self.signal or asked
        if self.launcher is not None and not again:
            self._launcher_died = os.getppid() != self.launcher
        # A second signal stops at once only if it is a user's SIGINT. A scheduler that signals
        # again kills the process by itself when it has waited long enough.
        if self._at_once or (again and asked is signal.SIGINT):
            raise KeyboardInterrupt
        launcher_says_it = self.launcher is not None and not self._launcher_died
        if not again and not launcher_says_it:
            once_more = "; send it again to stop at once" if asked is signal.SIGINT else ""
            log.warning(
                "%s: stopping after this step with all checkpoints saved%s", asked.name, once_more
            )
