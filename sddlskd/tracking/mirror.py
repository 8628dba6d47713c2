"""A background thread that mirrors run directories to MLflow.

Training never waits for MLflow: `Mirror` calls `sync` from a thread of its own and retries while
the server is unreachable. `python -m sddlskd.tracking sync DIR [DIR ...]` delivers what is still
missing.
"""

import logging
import math
import shlex
import threading
import time
from pathlib import Path

from sddlskd.tracking.runs import StillUnreachable, sync
from sddlskd.tracking.uri import first_line

__all__ = ["Mirror"]

log = logging.getLogger(__name__)


class Mirror:
    """Background thread that delivers changed run directories to MLflow.

    A run directory is the folder of one training run; the delivery is `runs.sync`. Creating an
    instance starts the thread. A failed delivery is retried after a pause. If several deliveries
    fail one after the other, only the first failure is logged as a warning, or none if the launch
    of the run has warned already. No error of MLflow reaches the caller.
    """

    def __init__(self) -> None:
        self._dirty: set[Path] = set()  # folders waiting for delivery
        self._busy: set[Path] = set()  # folders being delivered
        # The time.monotonic() after which a failed delivery is not retried.
        self._give_up = math.inf
        self._wake = threading.Condition()
        self._closing = False
        self._away = False
        self._thread = threading.Thread(target=self._work, name="mlflow-mirror", daemon=True)
        self._thread.start()

    def update(self, folder: Path) -> None:
        """Schedule the delivery of the changed run directory `folder`, and return at once."""
        with self._wake:
            self._dirty.add(folder)
            self._wake.notify()

    def close(self, timeout: float = 60.0, retry: float = 10.0) -> None:
        """Wait until all run directories given to `update` are delivered, and stop the thread.

        If some could not be delivered in time, a warning names them and the command that delivers
        them.

        Args:
            timeout: The longest time to wait, in seconds, if the last delivery before this call
                succeeded or there was none.
            retry: The longest time to wait, in seconds, if the last delivery before this call
                failed. A delivery that fails later than `retry` seconds after the call is not
                retried.
        """
        with self._wake:
            self._closing = True
            self._give_up = time.monotonic() + retry
            self._wake.notify()
        longest = retry if self._away else timeout
        self._thread.join(longest)
        left = self._dirty | self._busy
        if left:
            folders = shlex.join(sorted(map(str, left)))
            log.warning(
                "MLflow did not receive everything; once it is reachable, run: "
                "python -m sddlskd.tracking sync %s",
                folders,
            )

    def _work(self) -> None:
        pause = 1.0
        while True:
            with self._wake:
                while not self._dirty and not self._closing:
                    self._wake.wait()
                if not self._dirty:
                    return
                self._busy = self._dirty
                self._dirty = set()
            failed = {folder for folder in self._busy if not self._deliver(folder)}
            with self._wake:
                self._dirty |= failed
                self._busy = set()
                if failed and time.monotonic() > self._give_up:
                    return
                if failed:
                    longest = 4.0 if self._closing else pause
                    self._wake.wait(min(pause, longest))
            pause = min(pause * 2, 60.0) if failed else 1.0

    def _deliver(self, folder: Path) -> bool:
        """Deliver a run directory, and return whether MLflow has accepted it."""
        try:
            sync(folder)
        except Exception as error:  # an error of MLflow must not end the training
            if not self._away and not isinstance(error, StillUnreachable):
                reason = f"{type(error).__name__}: {first_line(error)}"
                log.warning("MLflow does not accept metrics (%s); training continues", reason)
            self._away = True
            return False
        if self._away:
            log.warning("MLflow is reachable again; delivering the metrics that it missed")
        self._away = False
        return True
