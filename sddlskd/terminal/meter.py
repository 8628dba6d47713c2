"""Progress of a long task: a bar on a terminal, else a log line every ten seconds."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["meter"]

log = logging.getLogger(__name__)

EVERY_S = 10.0  # seconds between log lines


@contextmanager
def meter(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the amount done so far and shows it.

    Args:
        what: The task, as shown in front of the amounts.
        total: The whole amount, or None if it is unknown.
        unit: "bytes", which are shown in MB, or the plural name of the counted things.
    """
    from rich.console import Console  # slow to import
    from rich.logging import RichHandler

    handlers = logging.getLogger("sddlskd").handlers
    # The log's own console, if it has one, prints log lines above the bar and not into it.
    console = next((h.console for h in handlers if isinstance(h, RichHandler)), None) or Console(
        stderr=True
    )
    if console.is_terminal:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TimeRemainingColumn,
        )

        counts = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
        with Progress(
            "{task.description}", BarColumn(), counts, TimeRemainingColumn(), console=console
        ) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    last = time.monotonic()

    def look(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= EVERY_S:
            last = time.monotonic()
            log.info("%s: %s", what, _amount(done, total, unit))

    yield look


def _amount(done: int, total: int | None, unit: str) -> str:
    shown = [f"{n / 1e6:.1f}" if unit == "bytes" else str(n) for n in (done, total or 0)]
    return f"{shown[0]}{f' of {shown[1]}' if total else ''} {'MB' if unit == 'bytes' else unit}"
