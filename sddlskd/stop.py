"""Whether a person or the scheduler asked to stop."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Stop"]

log = logging.getLogger(__name__)

ASKING = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR2,
)  # SIGUSR2: SLURM's warning before a time limit


class Stop:
    """The first SIGINT, SIGTERM or SIGUSR2 sets `signal`; each step of training looks at it.

    warned: what the reason adds to SIGUSR2.
    """

    def __init__(self, warned: str = "") -> None:
        self.signal: signal.Signals | None = None
        self.warned = warned
        self._at_once = False

    @property
    def reason(self) -> str:
        """Why runs are stopped, for their records."""
        added = self.warned if self.signal is signal.SIGUSR2 else ""
        return f"stopped by {self.signal.name}{added}" if self.signal else "stopped"

    def listen(self) -> dict[signal.Signals, Any]:
        """Take the signals over, in the main thread; elsewhere whoever called us handles them. Gives their handlers."""
        try:
            return {number: signal.signal(number, self._ask) for number in ASKING}
        except ValueError:
            return {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over, and give them back."""
        before = self.listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def acting(self, *, at_once: bool) -> Iterator[None]:
        """at_once: the signal raises KeyboardInterrupt, since nothing is under way yet that a step would save."""
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
        # Only a person ends it by asking twice: a scheduler that asks again kills when it has waited long enough.
        if self._at_once or (again and asked is signal.SIGINT):
            raise KeyboardInterrupt
        if not again:
            once_more = "; once more stops at once" if asked is signal.SIGINT else ""
            log.warning(
                "%s: stopping after this step with all checkpoints saved%s", asked.name, once_more
            )
