"""Progress of a long task: a bar on a terminal, else a log line every ten seconds."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["console_of_log", "meter"]

log = logging.getLogger(__name__)

EVERY_S = 10.0  # seconds between log lines


def console_of_log() -> "Console":
    """Return the console of the package's log if it has one, else a new console on stderr.

    The log's own console prints log lines above a bar or a table, and not into it.
    """
    from rich.console import Console  # slow to import
    from rich.logging import RichHandler

    for handler in logging.getLogger("sddlskd").handlers:
        if isinstance(handler, RichHandler):
            return handler.console
    return Console(stderr=True)


@contextmanager
def meter(what: str, total: int | None, unit: str) -> Iterator[Callable[[int], None]]:
    """Show the progress of a long task while the context lasts.

    The progress is a bar on a terminal, else a log line at most every 10 seconds (EVERY_S).

    Args:
        what: name of the task, shown in front of the amounts.
        total: whole amount, in `unit`; None if it is unknown.
        unit: "bytes", which are shown in MB, or the plural name of the counted things.

    Yields:
        A function to call with the amount done so far (not with an increment).
    """
    console = console_of_log()
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
    numbers = [done, total] if total else [done]
    if unit == "bytes":
        return f"{' of '.join(f'{n / 1e6:.1f}' for n in numbers)} MB"
    return f"{' of '.join(map(str, numbers))} {unit}"
