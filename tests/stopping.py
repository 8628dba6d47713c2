"""Stop a training after a given step, as a signal from outside would."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from sddlskd.training.run import Run


@contextmanager
def stopped_at(epoch: int, step: int) -> Iterator[None]:
    """Send this process SIGTERM once in the block, when a run has done a step of an epoch."""
    original, left = Run.train_step, [True]

    def step_then_stop(self: Run, *arguments: Any) -> None:
        original(self, *arguments)
        if left and (self.epoch, self.step) == (epoch, step):
            left.pop()
            signal.raise_signal(signal.SIGTERM)

    with mock.patch.object(Run, "train_step", step_then_stop):
        yield
