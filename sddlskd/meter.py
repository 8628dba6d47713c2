"""How far something long has come: a bar on a terminal, a line of the log every ten seconds elsewhere."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["meter"]

log = logging.getLogger(__name__)

EVERY_S = 10.0  # seconds between lines of the log


@contextmanager
def meter(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with how much is done; total: how much there is to do, None where nobody knows.

    unit: "bytes", which are shown in MB, or the plural of what is counted.
    """
    from rich.console import Console  # slow to import
    from rich.logging import RichHandler

    handlers = logging.getLogger("sddlskd").handlers
    # The log's own console where it has one: what it prints then stands above the bar, not in it.
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
