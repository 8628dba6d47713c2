"""Signal handling: detect that a user or the scheduler asked the training to stop."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Stop"]

log = logging.getLogger(__name__)

# SLURM sends SIGUSR2 as its warning before a time limit.
ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class Stop:
    """A stop request: the first SIGINT, SIGTERM or SIGUSR2 received is kept in `signal`.

    The training loop checks `signal` at each step.

    Args:
        warned: text that `reason` appends if the signal is SIGUSR2.
    """

    def __init__(self, warned: str = "") -> None:
        self.signal: signal.Signals | None = None
        self.warned = warned
        self._at_once = False

    @property
    def reason(self) -> str:
        """Return why the runs are stopped, as text for their records."""
        added = self.warned if self.signal is signal.SIGUSR2 else ""
        return f"stopped by {self.signal.name}{added}" if self.signal else "stopped"

    def listen(self) -> dict[signal.Signals, Any]:
        """Install the signal handlers and return the previous handlers by signal number.

        Python allows this in the main thread only. In any other thread, install nothing and return
        an empty dict: the calling program then handles the signals.
        """
        try:
            return {number: signal.signal(number, self._ask) for number in ASKING}
        except ValueError:
            return {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Install the signal handlers for the block, then restore the previous handlers."""
        before = self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def acting(self, *, at_once: bool) -> Iterator[None]:
        """Set for the block whether a signal raises KeyboardInterrupt at once.

        With `at_once` true, a signal raises KeyboardInterrupt immediately, also one received before
        the block. Use it while there is no training progress that could be saved. With `at_once`
        false, a signal only sets `signal`, and the training loop saves checkpoints before it stops.
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
        # A second signal stops at once only if it is a user's SIGINT. A scheduler that signals
        # again kills the process by itself when it has waited long enough.
        if self._at_once or (again and asked is signal.SIGINT):
            raise KeyboardInterrupt
        if not again:
            once_more = "; send it again to stop at once" if asked is signal.SIGINT else ""
            log.warning(
                "%s: stopping after this step with all checkpoints saved%s", asked.name, once_more
            )
